// Fuzzes the loader of .l3 files, and a forward pass over whatever loads. An input is a list of changes to a small valid file; most
// of the time the checksums are made right again afterwards, so that the changes reach the code behind them.
//
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz/fuzz_model_file.cpp -o fuzz_model_file
//     ./fuzz_model_file tests/fuzz/corpus/model_file
//
// Only llama3::Error and std::bad_alloc may come out; anything else ends the run.
#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"

namespace {

using namespace llama3;
namespace d = llama3::detail;

// Reads the fuzzer's bytes; zeros after their end.
struct Input {
    const std::uint8_t* data;
    std::size_t size;
    bool empty() const { return size == 0; }
    std::uint64_t take(std::size_t bytes) {
        std::uint64_t value = 0;
        for (std::size_t i = 0; i < bytes && size > 0; ++i, ++data, --size) value |= std::uint64_t{*data} << (8 * i);
        return value;
    }
};

const d::AlignedBuffer& base(std::size_t choice) {
    static const std::vector<d::AlignedBuffer> images = [] {
        std::vector<d::AlignedBuffer> list;
        for (const bool large : {false, true})
            for (const Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
                Config c;
                c.n_layers = large ? 1 : 2, c.dim = large ? 64 : 24, c.n_heads = 4, c.n_kv_heads = 2,
                c.head_dim = large ? 32 : 10;
                c.ffn_dim = large ? 128 : 40, c.vocab_size = large ? 288 : 270, c.context_length = 64, c.tied_embedding = large;
                if (large) c.rope_factor = 8, c.rope_high_freq_factor = 4, c.rope_original_context = 32;
                list.push_back(d::synthetic_image(c, format, 1, true));
            }
        return list;
    }();
    return images[choice % images.size()];
}

template <class T>
T read(const std::vector<std::byte>& image, std::size_t offset) {
    return offset + sizeof(T) <= image.size() ? d::load_as<T>(image.data() + offset) : T{};
}
template <class T>
void write(std::vector<std::byte>& image, std::size_t offset, T value) {
    if (offset <= image.size() && sizeof(T) <= image.size() - offset) d::store_as(image.data() + offset, value);
}

// Changes one number: to any value, to one near the old one, or to one that is often a border.
template <class T>
void change(std::vector<std::byte>& image, std::size_t offset, Input& input) {
    const T old = read<T>(image, offset);
    constexpr std::uint64_t borders[] = {0,          1,          2,          255,        256,        0x7fff,
                                         0x8000,     0xffff,     0x7fffffff, 0x80000000, 0xffffffff, 0x7f800000,
                                         0x7fc00000, 0xff800000, 1ull << 63, ~0ull};
    const std::uint64_t how = input.take(1);
    if (how < 64) return write(image, offset, static_cast<T>(input.take(sizeof(T))));
    if (how < 160) return write(image, offset, static_cast<T>(old + static_cast<T>(static_cast<std::int8_t>(input.take(1)))));
    if (how < 176) return write(image, offset, static_cast<T>(image.size() - input.take(1)));
    write(image, offset, static_cast<T>(borders[how % 16]));
}

// The checksums of the sections, where these are in the file, and of the header.
void seal(std::vector<std::byte>& image) {
    const std::span<const std::byte> bytes(image);
    for (std::size_t i = 0; i < 4; ++i) {
        const auto offset = read<std::uint64_t>(image, 24 + 24 * i), size = read<std::uint64_t>(image, 32 + 24 * i);
        if (offset <= image.size() && size <= image.size() - offset)
            write(image, 40 + 24 * i, d::blake2b(bytes.subspan(offset, size)));
    }
    if (image.size() >= 128) write(image, 120, d::blake2b(bytes.first(120)));
}

void use(const Model& model, std::uint64_t bits, int token) {
    (void)model.describe();
    (void)model.provenance();
    try {
        if (bits >= 240) model.verify();  // seldom, it takes most of the time here
    } catch (const Error&) {
    }
    const std::vector<int> ids = model.tokenizer().encode("Hello <|eot_id|>, \xC3\xA9 \xFF", Tokenizer::Special::parse);
    (void)model.tokenizer().decode(ids);
    Options options;
    options.device = bits & 1 ? reference() : cpu();
    options.kv = bits & 2 ? Format::q8 : bits & 4 ? Format::f32 : Format::bf16;
    options.context = 4, options.threads = 1, options.chunk = bits & 8 ? 1 : 4;
    Session session(model, options);
    const int tokens[] = {token % model.config().vocab_size, model.config().begin_token};
    const std::span<const float> logits = session.feed(tokens);
    Sampler sampler;
    const int next = sampler.sample(logits, session.tokens());
    if (next < 0 || next >= model.config().vocab_size) __builtin_trap();
    (void)session.feed(std::span(&next, 1));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input{data, size};
    const d::AlignedBuffer& original = base(input.take(1));
    const std::uint64_t bits = input.take(1);  // how the model is used, if it loads
    const int token = static_cast<int>(input.take(2));
    std::vector<std::byte> image(original.data(), original.data() + original.size());
    const bool sealed = input.take(1) % 8 != 7;
    const std::size_t tokenizer = read<std::uint64_t>(image, 48), table = read<std::uint64_t>(image, 72),
                      tensors = read<std::uint32_t>(image, table);
    while (!input.empty()) {
        switch (input.take(1) % 8) {
            case 0: change<std::uint32_t>(image, 128 + 4 * (input.take(1) % 32), input); break;  // configuration
            case 1: change<std::uint64_t>(image, 16 + 8 * (input.take(1) % 14), input); break;   // header
            case 2:
                change<std::uint64_t>(image, table + 8 + 96 * (input.take(1) % tensors) + 8 * (input.take(1) % 12), input);
                break;
            case 3:
                change<std::uint32_t>(image, table + 4 * (input.take(2) % (2 + 24 * tensors)), input);
                break;  // half a field
            case 4: change<std::uint32_t>(image, tokenizer + 4 * (input.take(2) % 400), input); break;
            case 5: change<std::uint8_t>(image, tokenizer + input.take(2), input); break;  // texts, and what follows
            case 6:
                change<std::uint16_t>(image, 2 * (input.take(3) % (image.size() / 2)), input);
                break;  // anything: scales, weights
            default:
                if (input.take(1) < 32) image.resize(input.take(3) % (image.size() + 100));
        }
        if (image.size() < 2) break;
    }
    if (sealed) seal(image);
    // A buffer of exactly this size, so that AddressSanitizer sees a step too far.
    const std::unique_ptr<std::byte, void (*)(std::byte*)> memory(
        static_cast<std::byte*>(::operator new (std::max<std::size_t>(image.size(), 1), std::align_val_t{64})),
        [](std::byte* p) { ::operator delete (p, std::align_val_t{64}); });
    std::copy(image.begin(), image.end(), memory.get());
    try {
        use(Model::from_memory({memory.get(), image.size()}), bits, token);
    } catch (const Error&) {
    } catch (const std::bad_alloc&) {
    }
    return 0;
}
