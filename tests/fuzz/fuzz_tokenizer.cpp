// Fuzzes the tokenizer: text to ids and back, in one piece and streaming.
//
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz/fuzz_tokenizer.cpp -o fuzz_tokenizer
//     ./fuzz_tokenizer tests/fuzz/corpus/tokenizer
//
// Whatever the bytes: they come back with their invalid parts replaced by U+FFFD, and no text becomes a special token unasked.
#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"

namespace {

using namespace llama3;
namespace d = llama3::detail;

#define EXPECT(condition)                                                                     \
    do {                                                                                      \
        if (!(condition)) std::fprintf(stderr, "not so: %s\n", #condition), __builtin_trap(); \
    } while (false)

// UTF-8 with U+FFFD for each maximal part that could begin a character but does not go on (the Unicode standard, 3.9), written
// from its table 3-7 and not from the library: a character is a list of ranges that its bytes must lie in.
std::string repaired(std::string_view text) {
    struct Form {
        unsigned char first[2], second[2];
        std::size_t length;
    };
    constexpr Form forms[] = {
        {{0x00, 0x7F}, {0, 0}, 1},       {{0xC2, 0xDF}, {0x80, 0xBF}, 2}, {{0xE0, 0xE0}, {0xA0, 0xBF}, 3},
        {{0xE1, 0xEC}, {0x80, 0xBF}, 3}, {{0xED, 0xED}, {0x80, 0x9F}, 3}, {{0xEE, 0xEF}, {0x80, 0xBF}, 3},
        {{0xF0, 0xF0}, {0x90, 0xBF}, 4}, {{0xF1, 0xF3}, {0x80, 0xBF}, 4}, {{0xF4, 0xF4}, {0x80, 0x8F}, 4}};
    std::string out;
    for (std::size_t i = 0; i < text.size();) {
        std::size_t good = 1;
        bool whole = false;
        for (const Form& form : forms) {
            const auto byte = [&](std::size_t k) { return static_cast<unsigned char>(text[i + k]); };
            if (byte(0) < form.first[0] || byte(0) > form.first[1]) continue;
            while (good < form.length && i + good < text.size() && byte(good) >= (good == 1 ? form.second[0] : 0x80) &&
                   byte(good) <= (good == 1 ? form.second[1] : 0xBF))
                ++good;
            whole = good == form.length;
        }
        if (whole) out += text.substr(i, good);
        else out += "\xEF\xBF\xBD";
        i += good;
    }
    return out;
}

const Model& model() {
    static const Model made = [] {
        Config c;
        c.n_layers = 1, c.dim = 2, c.n_heads = 1, c.n_kv_heads = 1, c.head_dim = 2, c.ffn_dim = 2, c.vocab_size = 1000,
        c.context_length = 16;
        d::Vocabulary v = d::synthetic_vocabulary(300);
        v.tokens.resize(256);
        for (const char* token :
             {"  ",       "    ",         "\n\n",         " \n",      "\r\n",     "th",           "he",
              "the",      " the",         " t",           "in",       "ing",      "ed",           "'s",
              "'ll",      "12",           "23",           "123",      "aa",       "aaaa",         "ab",
              "ba",       "\xC3\xA9",     "e\xCC",        "\xCC\x81", "\xE6\x97", "\xE6\x97\xA5", "\x97\xA5",
              "\xF0\x9F", "\xF0\x9F\x98", "\xEF\xBF\xBD", "\xBF\xBD", "<|",       "|>",           "eot",
              "_id",      "zzzzzzzzzz",   "hello world",  "....",     "==",       "(){",          "\t\t"})
            v.tokens.push_back(token);
        for (int i = 0;
             const char* name : {"<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eot|>", "<|", "<|\xC3\xA9|>"})
            if (std::find(v.tokens.begin(), v.tokens.end(), name) == v.tokens.end())
                v.specials.push_back({500 + 3 * i++, name});
        std::erase_if(v.specials, [](const auto& s) { return s.first < 500; });
        c.begin_token = v.specials.front().first, c.end_tokens = {v.specials.back().first};
        const auto image = std::make_shared<d::AlignedBuffer>(
            d::write_model(c, v, Format::f32, "", true, [](const TensorInfo&, std::byte*) {}));
        return Model::from_memory({image->data(), image->size()}, image);
    }();
    return made;
}

std::string streamed(const std::vector<int>& ids) {
    TextStream stream(model().tokenizer());
    std::string text;
    for (const int id : ids) {
        const std::string part = stream.push(id);
        EXPECT(repaired(part) == part);  // whole characters only
        text += part;
    }
    return text + stream.finish();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string text(reinterpret_cast<const char*>(data), size), expected = repaired(text);
    const Tokenizer& tokenizer = model().tokenizer();

    const std::vector<int> ids = tokenizer.encode(text);
    EXPECT(tokenizer.decode(ids) == expected);
    EXPECT(streamed(ids) == expected);
    for (const int id : ids) EXPECT(id >= 0 && id < tokenizer.rank_count() && !tokenizer.is_special(id));
    EXPECT(tokenizer.encode(expected) == ids);

    EXPECT(tokenizer.decode(tokenizer.encode(text, Tokenizer::Special::parse)) == expected);

    // Byte by byte, as a model might produce it: the stream repairs what encode() would have.
    std::vector<int> bytes;
    for (const char c : text)
        for (int id = 0; id < 256; ++id)
            if (tokenizer.bytes(id)[0] == c) bytes.push_back(id);
    EXPECT(tokenizer.decode(bytes) == text);
    EXPECT(streamed(bytes) == expected);

    // Any ids: an error or bytes.
    std::vector<int> any;
    for (std::size_t i = 0; i + 2 <= size; i += 2) any.push_back(data[i] | (data[i + 1] & 0x83) << 8);
    for (int& id : any) id = id >= 0x8000 ? -id : id;
    try {
        (void)tokenizer.decode(any);
        (void)streamed(any);
    } catch (const Error&) {
    }
    return 0;
}
