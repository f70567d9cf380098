// §14: what is written is read back, and nothing that differs from convert/FORMAT.md is loaded, with an error that says where and why.
#include <cstdio>
#include <fstream>
#include <map>

namespace {
namespace model_files {

using namespace llama3;
namespace d = llama3::detail;

// Scaled RoPE, a query width that is no multiple of 16 or 64, segments in `down`, two layers, an output matrix of its own.
Config tiny_config() {
    Config c;
    c.n_layers = 2, c.dim = 24, c.n_heads = 4, c.n_kv_heads = 2, c.head_dim = 10, c.ffn_dim = 128, c.vocab_size = 300,
    c.context_length = 512;
    c.rope_factor = 8, c.rope_low_freq_factor = 1, c.rope_high_freq_factor = 4, c.rope_original_context = 256;
    c.chat_format = ChatFormat::llama3_1;
    return c;
}

// A file in memory that can be patched and sealed again.
struct Image {
    d::AlignedBuffer buffer;
    explicit Image(std::size_t size) : buffer(size) {}
    Image(const Config& config, Format format) : buffer(d::synthetic_image(config, format, 1, true)) {}
    Image(const Image& other) : buffer(other.buffer.size()) { std::memcpy(buffer.data(), other.buffer.data(), buffer.size()); }
    std::span<const std::byte> bytes() const { return {buffer.data(), buffer.size()}; }
    std::uint64_t section(int i) const { return d::load_as<std::uint64_t>(buffer.data() + 24 + 24 * i); }
    std::uint64_t entry(int i) const { return section(2) + 8 + 96 * static_cast<std::uint64_t>(i); }
    template <class T>
    void put(std::uint64_t offset, T value) {
        d::store_as(buffer.data() + offset, value);
    }
    void seal_header() { put(120, d::blake2b(bytes().first(120))); }
    void seal() {  // the checksums of the sections and of the header
        for (std::uint64_t i = 0; i < 4; ++i)
            put(40 + 24 * i, d::blake2b(bytes().subspan(section(static_cast<int>(i)),
                                                        d::load_as<std::uint64_t>(buffer.data() + 32 + 24 * i))));
        seal_header();
    }
};

// What loading says; nothing if it succeeds.
struct Outcome {
    std::string text;
    Code code = Code::argument;
};
template <class F>
Outcome outcome(F&& f) {
    try {
        f();
    } catch (const Error& error) {
        return {error.what(), error.code()};
    }
    return {};
}
Outcome load(std::span<const std::byte> bytes) {
    return outcome([&] { Model::from_memory(bytes); });
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

std::string temporary_file(std::string_view content) {
    std::string path = (std::getenv("TMPDIR") ? std::getenv("TMPDIR") : "/tmp") + std::string("/llama3_test_XXXXXX");
    const int file = mkstemp(path.data());
    REQUIRE(file >= 0);
    REQUIRE(write(file, content.data(), content.size()) == static_cast<ssize_t>(content.size()));
    close(file);
    return path;
}
std::string_view characters(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::uint64_t hash(const std::string& text) { return d::blake2b(std::as_bytes(std::span(text))); }

const std::vector<Format> formats = {Format::f32, Format::bf16, Format::q8, Format::q4};

TEST_SUITE("core: model files") {
    TEST_CASE("BLAKE2b gives the digests of Python's hashlib around every block border") {
        std::string text;
        for (int i = 0; i < 1000; ++i) text += static_cast<char>(i % 251);
        const auto first = [&](std::size_t n) {
            return __builtin_bswap64(hash(text.substr(0, n)));
        };  // as hexdigest() shows it
        CHECK(__builtin_bswap64(hash("abc")) == 0xd8bb14d833d59559);
        CHECK(__builtin_bswap64(hash(std::string(256, 'a'))) == 0x78b03efd0a5ea28b);
        CHECK(first(0) == 0xe4a6a0577479b2b4);
        CHECK(first(1) == 0x94f6d9cdd1ea8248);
        CHECK(first(127) == 0x68005651c301c41e);
        CHECK(first(128) == 0xc2d13df1b6617e82);
        CHECK(first(129) == 0xf667e47a6d5350a6);
        CHECK(first(255) == 0x94beba09a14b35a2);
        CHECK(first(256) == 0x511a778d539d7a3c);
        CHECK(first(1000) == 0x669ca836a838577f);
    }

    TEST_CASE("segments are those of FORMAT.md") {
        CHECK(d::choose_segments(2048, 32) == 8);  // Llama 3.2 1B
        CHECK(d::choose_segments(3072, 24) == 8);  // 3B
        CHECK(d::choose_segments(14336, 0) == 8);  // `down` of 8B
        CHECK(d::choose_segments(384, 6) == 2);    // 384 = 6 x 64, but 4 does not divide 6 heads
        CHECK(d::choose_segments(1024, 4) == 4);
        CHECK(d::choose_segments(128, 0) == 2);
        CHECK(d::choose_segments(72, 9) == 1);
        CHECK(d::choose_segments(100, 0) == 1);
    }

    TEST_CASE("a written file gives back its configuration, its tokenizer and every weight") {
        for (const bool tied : {false, true}) {
            Config c = tiny_config();
            c.tied_embedding = tied, c.begin_token = 290, c.end_tokens = {1, 291, 299}, c.down_segments = 2;
            d::Vocabulary vocabulary = d::synthetic_vocabulary(300);
            vocabulary.tokens.resize(256);
            vocabulary.tokens.push_back("hello");
            vocabulary.specials = {{290, "<|begin_of_text|>"}, {299, "<|eot_id|>"}};
            const auto value = [](std::string_view name, int row, std::size_t column) {
                return static_cast<float>((name.size() * 31 + static_cast<std::size_t>(row) * 7 + column) % 97) - 48;
            };
            for (const Format format : formats) {
                const d::AlignedBuffer image =
                    d::write_model(c, vocabulary, format, "source: a test\n", true, [&](const TensorInfo& t, std::byte* bytes) {
                        d::encode_tensor(t, bytes, [&](std::string_view name, int row, std::span<float> values) {
                            for (std::size_t i = 0; i < values.size(); ++i) values[i] = value(name, row, i);
                        });
                    });
                const Model model = Model::from_memory({image.data(), image.size()});
                model.verify();
                const Config& r = model.config();
                for (const auto& field : d::integer_fields) CHECK(r.*field.member == c.*field.member);
                for (const auto& field : d::real_fields) CHECK(r.*field.member == c.*field.member);
                CHECK(r.chat_format == c.chat_format);
                CHECK(r.tied_embedding == tied);
                CHECK(r.end_tokens == c.end_tokens);
                CHECK(model.provenance() == "source: a test\n");
                CHECK(model.tokenizer().rank_count() == 257);
                CHECK(model.tokenizer().encode("hello") == std::vector<int>{256});
                CHECK(model.tokenizer().special("<|eot_id|>") == 299);
                CHECK(model.tokenizer().begin_token() == 290);

                const Weights& w = model.weights();
                CHECK((w.output.data == w.embedding.data) == tied);
                CHECK(w.embedding.format == (format == Format::q4 ? Format::q8 : format));
                CHECK(model.tensors().size() == (tied ? 20 : 21));
                const auto check_matrix = [&](const Matrix& m, std::string_view name) {
                    // to the accuracy of the format: 48 needs 6 bits and the sign
                    const float tolerance = format == Format::q4 ? 6.01f : format == Format::q8 ? 0.25f : 0;
                    double worst = 0;
                    for (int row = 0; row < m.rows; ++row)
                        for (int column = 0; column < m.columns; ++column)
                            worst = std::max(worst,
                                             static_cast<double>(std::abs(d::decode_weight(m, row, column) -
                                                                          value(name, row, static_cast<std::size_t>(column)))));
                    CHECK_MESSAGE(worst <= tolerance, name, " ", format_name(format));
                };
                check_matrix(w.embedding, "embedding");
                check_matrix(w.output, tied ? "embedding" : "output");
                for (const Layer& layer : w.layers) {
                    const std::string prefix = "layers." + std::to_string(layer.index) + ".";
                    check_matrix(layer.query, prefix + "query"), check_matrix(layer.key, prefix + "key"),
                        check_matrix(layer.value, prefix + "value");
                    check_matrix(layer.attention_out, prefix + "attention_out"), check_matrix(layer.gate, prefix + "gate");
                    check_matrix(layer.up, prefix + "up"), check_matrix(layer.down, prefix + "down");
                    CHECK(layer.attention_norm[23] == value(prefix + "attention_norm", 0, 23));
                    CHECK(layer.ffn_norm[0] == value(prefix + "ffn_norm", 0, 0));
                }
                CHECK(w.layers[1].down.segments == 2);
                CHECK(w.layers[1].attention_out.segments == 1);
                CHECK(w.final_norm[5] == value("final_norm", 0, 5));
            }
        }
    }

    TEST_CASE("mapped, read and in memory a model is the same") {
        const Image image(tiny_config(), Format::q8);
        const std::string path = temporary_file(characters(image.bytes()));
        const Model mapped = Model::load(path), read = Model::load(path, Model::Loading::read),
                    memory = Model::from_memory(image.bytes());
        std::remove(path.c_str());  // a mapping keeps the file
        for (const Model& model : {mapped, read, memory}) {
            model.verify();
            CHECK(model.tensors().size() == memory.tensors().size());
            for (std::size_t i = 0; i < memory.tensors().size(); ++i) {
                const TensorInfo a = model.tensors()[i], b = memory.tensors()[i];
                CHECK((a.name == b.name && a.offset == b.offset && a.bytes == b.bytes && a.checksum == b.checksum));
            }
            CHECK(characters(model.impl().image) == characters(image.bytes()));
            CHECK(model.provenance() == memory.provenance());
            CHECK(model.tokenizer().encode("abc abc") == memory.tokenizer().encode("abc abc"));
            CHECK(reinterpret_cast<std::uintptr_t>(model.weights().layers[0].query.data) % 64 == 0);
        }
        CHECK(has(mapped.describe(), path));
        CHECK(has(memory.describe(), "model in memory"));
    }

    TEST_CASE("loading a file of 8 GB maps it and reads none of its weights") {
        const auto resident = []() -> std::uint64_t {  // bytes of this process in memory, those of mapped files included
            std::ifstream status("/proc/self/status");
            for (std::string line; std::getline(status, line);)
                if (line.rfind("VmRSS:", 0) == 0) return std::stoull(line.substr(6)) * 1024;
            return 0;
        };
        Config c = tiny_config();
        c.n_layers = 36, c.dim = 4096, c.n_heads = 32, c.n_kv_heads = 8, c.head_dim = 128, c.ffn_dim = 14336;
        c.begin_token = 256, c.end_tokens = {257}, c.vocab_size = 1024;
        c.attention_out_segments = d::out_segments(c), c.down_segments = d::down_segments(c);
        std::vector<TensorInfo> tensors = d::required_tensors(c);
        std::string parts[4] = {d::write_config(c), d::write_tokenizer(d::synthetic_vocabulary(512)), d::write_table(tensors),
                                "a: b\n"};
        std::uint64_t offsets[4], end = 128;
        for (std::size_t i = 0; i < 4; ++i) offsets[i] = d::align(end, 8), end = offsets[i] + parts[i].size();
        end = d::align(end, 4096);
        for (TensorInfo& t : tensors) {
            t.format = t.dimensions == 1 ? Format::f32 : Format::q8;
            t.offset = d::align(end, 64), t.bytes = d::tensor_bytes(t), end = t.offset + t.bytes;
        }
        CHECK(end > 8'000'000'000);
        parts[2] = d::write_table(tensors);
        std::string head("\x89llama3\n");
        d::append(head, std::uint64_t{1}, end);
        for (std::size_t i = 0; i < 4; ++i) d::append(head, offsets[i], std::uint64_t{parts[i].size()}, hash(parts[i]));
        d::append(head, hash(head));
        for (std::size_t i = 0; i < 4; ++i) head.resize(static_cast<std::size_t>(offsets[i]), '\0'), head += parts[i];

        const std::string path = temporary_file(head);  // all the rest is a hole, which takes no room on the disk
        struct stat file = {};
        const bool sparse = truncate(path.c_str(), static_cast<off_t>(end)) == 0 && stat(path.c_str(), &file) == 0 &&
                            file.st_blocks < (1 << 17);
        const std::uint64_t before = resident();
        if (sparse && before > 0) {
            const Model model = Model::load(path);
            CHECK(model.plan({}).weights_bytes > 8'000'000'000);
            std::vector<float> values(4096, 1);
            d::decode_row(model.weights().output, 1023, values.data());  // the very end of the file
            CHECK(values == std::vector<float>(4096, 0));
            CHECK(resident() < before + (64 << 20));
            for (const Layer& layer : model.weights().layers)  // the measure itself: 64 MB that are touched do count
                for (std::size_t at = 0; at < (2 << 20); at += 4096) values[0] += static_cast<float>(layer.gate.data[at]);
            CHECK(resident() >= before + (32 << 20));  // a sanitizer may have given something back meanwhile
        } else {
            MESSAGE("did not run: no file with holes in the folder for temporary files, or no /proc to measure memory with");
        }
        std::remove(path.c_str());
    }

    TEST_CASE("a tokenizer outlives its model, and a model keeps the owner of its memory") {
        auto image = std::make_shared<Image>(tiny_config(), Format::bf16);
        const std::weak_ptr<Image> watch = image;
        {
            const Tokenizer tokenizer = [&] { return Model::from_memory(image->bytes(), image).tokenizer(); }();
            image.reset();
            CHECK(!watch.expired());
            CHECK(tokenizer.decode(tokenizer.encode("still here")) == "still here");
        }
        CHECK(watch.expired());
    }

    TEST_CASE("an image in memory must be aligned") {
        Image image(tiny_config(), Format::f32);
        const Outcome o = load(image.bytes().subspan(8));
        CHECK(o.text ==
              "model in memory: the image is not aligned (found 8 bytes past, expected a multiple of 64). "
              "Copy it into memory from std::aligned_alloc or the like.");
        CHECK(o.code == Code::argument);
    }

    TEST_CASE("missing files, folders and foreign files are named as what they are") {
        const auto open = [](const std::string& path, Model::Loading loading) {
            return outcome([&] { Model::load(path, loading); });
        };
        for (const auto loading : {Model::Loading::map, Model::Loading::read}) {
            Outcome o = open("/nowhere/model.l3", loading);
            CHECK(o.text ==
                  "/nowhere/model.l3: the file cannot be opened (found No such file or directory, expected a readable file). "
                  "Give the path of a readable .l3 "
                  "file.");
            CHECK(o.code == Code::file);
            CHECK(open("/", loading).text ==
                  "/: the file cannot be read (found a directory, expected a readable file). Give the path of a readable .l3 "
                  "file.");
            CHECK(has(open("/dev/null", loading).text,
                      "/dev/null: the file cannot be read (found no ordinary file, expected a readable file)"));
            const auto content = [&](std::string_view bytes) {
                const std::string path = temporary_file(bytes);
                Outcome result = open(path, loading);
                std::remove(path.c_str());
                CHECK(result.text.substr(0, path.size() + 2) == path + ": ");
                result.text.erase(0, path.size() + 2);
                CHECK(result.code == Code::format);
                return result.text;
            };
            CHECK(content("") ==
                  "this is not an .l3 model file (found at its start nothing, expected 89 6C 6C 61 6D 61 33 0A). Make one with "
                  "convert/convert.py.");
            CHECK(has(content(std::string("GGUF\3\0\0\0 and so on", 19)),
                      "(found at its start 47 47 55 46 03 00 00 00, expected 89 6C"));
            CHECK(has(content("PK"), "(found at its start 50 4B, expected"));
            CHECK(content("\x89llama3\n") ==
                  "the file is cut short: it ends in its header (found 8 bytes, expected at least 128). Copy or download the "
                  "file again.");
        }
    }

    TEST_CASE("a file that is cut anywhere says in which part it ends") {
        const Image image(tiny_config(), Format::q4);
        const Model model = Model::from_memory(image.bytes());
        const auto& sections = model.impl().sections;
        const auto where = [&](std::size_t length) -> std::string {
            if (length == 0) return "at its start nothing";
            if (length < 128) return "its header";
            for (const int i : {0, 1, 2, 3})
                if (length < sections[static_cast<std::size_t>(i)].offset + sections[static_cast<std::size_t>(i)].bytes)
                    return std::string("its ") + d::section_names[i] + " (found " + std::to_string(length) + " bytes, ";
            for (const TensorInfo& t : model.tensors())
                if (length < t.offset + t.bytes)
                    return "its tensor " + t.name + " (found " + std::to_string(length) + " bytes, expected at least " +
                           std::to_string(image.bytes().size()) + ")";
            return "";
        };
        for (std::size_t length = 0; length < image.bytes().size(); length += length < 8192 ? 1 : 61) {
            const Outcome o = load(image.bytes().first(length));
            if (!has(o.text, where(length)) || o.text.empty()) FAIL(length, ": ", o.text);
        }
        Image longer(image.bytes().size() + 8);
        std::memcpy(longer.buffer.data(), image.buffer.data(), image.bytes().size());
        const std::string n = std::to_string(image.bytes().size()), n8 = std::to_string(image.bytes().size() + 8);
        CHECK(has(load(longer.bytes()).text,
                  "the file goes on after its end (found " + n8 + ", expected " + n + "). Copy or download the file again."));
    }

    TEST_CASE("any changed byte is noticed: in what is parsed at once, elsewhere by verify") {
        const Image good(tiny_config(), Format::bf16);
        const Model model = Model::from_memory(good.bytes());
        model.verify();
        const auto& [config, tokenizer, table, provenance] = model.impl().sections;
        const auto inside = [](std::uint64_t i, const d::Section& s) { return i >= s.offset && i < s.offset + s.bytes; };
        Image image = good;
        for (std::size_t i = 0; i < image.bytes().size(); i += i < 8192 ? 1 : 97) {
            image.buffer.data()[i] ^= std::byte{16};
            const bool parsed = i < 128 || inside(i, config) || inside(i, table);
            Outcome o = load(image.bytes());
            if (parsed != !o.text.empty() && !inside(i, tokenizer)) FAIL("byte ", i, ": ", o.text);
            if (o.text.empty()) o = outcome([&] { Model::from_memory(image.bytes()).verify(); });
            const bool between = i < model.tensors()[0].offset && !parsed && !inside(i, tokenizer) &&
                                 !inside(i, provenance);  // anything may be there
            if (o.text.empty() && !between) FAIL("byte ", i, " may change unnoticed");
            image.buffer.data()[i] ^= std::byte{16};
        }
        const TensorInfo t = model.tensors()[7];
        image.buffer.data()[t.offset + 3] ^= std::byte{1};
        const Outcome o = outcome([&] { Model::from_memory(image.bytes()).verify(); });
        CHECK(has(o.text, "model in memory: tensor layers.0.gate has changed since it was written (found "));
        CHECK(o.code == Code::checksum);
    }

    TEST_CASE("every wrong field of the header is named") {
        const Image good(tiny_config(), Format::q8);
        const auto with = [&](std::uint64_t offset, auto value) {
            Image image = good;
            image.put(offset, value);
            image.seal_header();
            return load(image.bytes()).text;
        };
        const std::uint64_t size = good.bytes().size();
        CHECK(has(with(0, 'x'), "this is not an .l3 model file (found at its start 78 6C 6C 61 6D 61 33 0A, expected 89"));
        CHECK(has(with(8, 2u), "the file is of another version of the format (found 2, expected 1). Convert the model again"));
        CHECK(has(with(12, 1u), "bytes 12 to 15 should hold nothing (found 1, expected zeros)"));
        CHECK(has(with(16, size + 64), "the size of the file is not where its last tensor ends (found " +
                                           std::to_string(size + 64) + ", expected " + std::to_string(size)));
        CHECK(has(with(16, size - 64), "lies outside the file"));
        CHECK(has(with(16, ~0ull), "the size of the file is not where its last tensor ends (found 18446744073709551615"));
        for (int i = 0; i < 4; ++i) {
            const std::string name = std::string("the ") + d::section_names[i];
            const std::uint64_t field = 24 + 24 * static_cast<std::uint64_t>(i);
            CHECK(has(with(field, good.section(i) + 4), name + " has no place in the file"));
            CHECK(has(with(field, ~7ull), name + " has no place in the file"));
            CHECK(has(with(field + 8, ~0ull), name + " has no place in the file"));
            CHECK(has(with(field, std::uint64_t{64}), "the start of " + name + " is out of range (found 64, expected 128 to "));
            CHECK(with(field + 8, size - good.section(i)) != "");  // runs over the sections after it
        }
        CHECK(has(with(24, good.section(1)), "the start of the "));
        CHECK(has(with(24, good.section(1)), " is out of range (found "));
        CHECK(has(with(24 + 8, std::uint64_t{120}), "the configuration has changed since it was written"));
        Image image = good;
        image.put(120, 1ull);
        const Outcome o = load(image.bytes());
        CHECK(has(o.text, "the header has changed since it was written (found "));
        CHECK(has(o.text, "expected 0000000000000001). Copy or download the file again."));
        CHECK(o.code == Code::checksum);
    }

    TEST_CASE("every wrong field of the configuration is named, with its range") {
        const Image good(tiny_config(), Format::q8);
        const auto with = [&](std::uint64_t offset, auto value) {
            Image image = good;
            image.put(good.section(0) + offset, value);
            image.seal();
            return load(image.bytes()).text;
        };
        for (const auto& field : d::integer_fields) {
            CHECK(has(with(field.offset, field.high + 1),
                      std::string(field.name) + " is out of range (found " + std::to_string(field.high + 1) + ", expected "));
            if (field.low > 0) CHECK(has(with(field.offset, field.low - 1), std::string(field.name) + " is out of range"));
            CHECK(has(with(field.offset, ~0u),
                      std::string(field.name) + " is out of range (found 4294967295, expected " + std::to_string(field.low) +
                          " to " + std::to_string(field.high) + ")"));
        }
        for (const auto& field : d::real_fields)
            for (const float value :
                 {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), 3e38f})
                CHECK(has(with(field.offset, value), std::string(field.name) + " is out of range (found "));
        CHECK(has(with(12, 3), "the key/value heads cannot be shared evenly (found 3, expected a divisor of 4)"));
        CHECK(has(with(16, 11), "the head width is odd (found 11, expected an even number)"));
        CHECK(has(with(40, 1.0f), "the RoPE scaling is off (factor 1) but has parameters (found 1, 4, 256, expected 1, 1, 0)"));
        CHECK(has(with(44, 4.0f),
                  "the parameters of the RoPE scaling make no sense (found 4, 4, 256, expected low < high, and a context)"));
        CHECK(has(with(52, 0),
                  "the parameters of the RoPE scaling make no sense (found 1, 4, 0, expected low < high, and a context)"));
        CHECK(has(with(56, 4), "the chat format is out of range (found 4, expected 0 to 3)"));
        CHECK(has(with(60, 2), "the mark of a tied embedding is out of range (found 2, expected 0 to 1)"));
        CHECK(has(with(64, 2), "attention_out has a wrong number of segments (found 2, expected 1)"));
        CHECK(has(with(68, 8), "down has a wrong number of segments (found 8, expected 2)"));
        CHECK(has(with(72, 300), "the begin-of-text token is out of range (found 300, expected 0 to 299)"));
        CHECK(has(with(76, 9), "the number of end tokens is out of range (found 9, expected 0 to 8)"));
        CHECK(has(with(76, 2), "the configuration after its end tokens should hold nothing"));
        CHECK(has(with(80, 299), "an end token is out of range (found 264, expected 300 to 299)"));
        CHECK(has(with(88, 300), "an end token is out of range (found 300, expected 265 to 299)"));
        CHECK(has(with(92, 1), "the configuration after its end tokens should hold nothing (found 1, expected zeros)"));
        CHECK(has(with(127, std::uint8_t{7}),
                  "the configuration after its end tokens should hold nothing (found 7, expected zeros)"));
        Image image = good;
        image.put(32, std::uint64_t{120});
        image.seal();
        CHECK(has(load(image.bytes()).text, "the configuration has a wrong size (found 120, expected 128)"));
    }

    TEST_CASE("every wrong field of the tensor table is named, with its tensor") {
        const Image good(tiny_config(), Format::q8);
        const auto with = [&](std::uint64_t offset, auto value) {
            Image image = good;
            image.put(offset, value);
            image.seal();
            return load(image.bytes()).text;
        };
        const std::uint64_t table = good.section(2), norm = good.entry(1), query = good.entry(2), out = good.entry(5);
        CHECK(has(with(table, 20u), "the tensor table has a wrong size (found 2024, expected 1928)"));
        CHECK(has(with(table, ~0u), "the tensor table has a wrong size"));
        CHECK(has(with(table + 4, 1u), "bytes 4 to 7 of the tensor table should hold nothing"));
        CHECK(has(with(query + 9, 'Q'),
                  "tensor 2 is not the one that belongs there (found layers.0.Query, expected layers.0.query)"));
        CHECK(
            has(with(query, '\0'), "tensor 2 has a damaged name (found other bytes, expected 1 to 39 characters, then zeros)"));
        CHECK(has(with(query, '\n'), "tensor 2 has a damaged name"));
        CHECK(has(with(query + 39, 'x'), "tensor 2 has a damaged name"));
        CHECK(has(with(query + 40, 4u),
                  "tensor layers.0.query has a wrong format (found 4, expected 0 to 3: f32, bf16, q8, q4)"));
        CHECK(has(with(query + 40, 1u), "tensor layers.0.query has a wrong number of bytes (found "));
        CHECK(has(with(norm + 40, 1u), "tensor layers.0.attention_norm has a wrong format (found 1, expected 0: f32)"));
        CHECK(has(with(query + 44, 1u), "tensor layers.0.query has a wrong number of dimensions (found 1, expected 2)"));
        CHECK(has(with(query + 48, 41ull), "tensor layers.0.query has a wrong number of rows (found 41, expected 40)"));
        CHECK(has(with(query + 56, 1ull << 40),
                  "tensor layers.0.query has a wrong number of columns (found 1099511627776, expected 24)"));
        CHECK(has(with(norm + 48, 2ull), "tensor layers.0.attention_norm has a wrong number of rows (found 2, expected 1)"));
        CHECK(has(with(query + 72, 64ull), "tensor layers.0.query has a wrong number of bytes (found 64, expected 3264)"));
        const std::uint64_t place = d::load_as<std::uint64_t>(good.buffer.data() + query + 64);
        CHECK(has(with(query + 64, place + 64), "tensor layers.0.query is in the wrong place (found " +
                                                    std::to_string(place + 64) + ", expected " + std::to_string(place) + ")"));
        CHECK(has(with(query + 64, place - 64), "tensor layers.0.query is in the wrong place"));
        CHECK(has(with(good.entry(0) + 64, 0ull),
                  "tensor embedding is in the wrong place (found 0, expected a multiple of 4096, at least "));
        CHECK(has(with(good.entry(0) + 64, ~4095ull), "tensor embedding lies outside the file"));
        CHECK(has(with(out + 88, 2u), "tensor layers.0.attention_out has a wrong number of segments (found 2, expected 1)"));
        CHECK(
            has(with(out + 92, 1u), "tensor layers.0.attention_out has a wrong last word in the table (found 1, expected 0)"));

        Image missing = good, tied = good;
        missing.put(table, 20u), missing.put(80, 8 + 96 * 20ull), missing.seal();
        CHECK(has(load(missing.bytes()).text, "tensor output is missing (found 20 tensors, expected 21)"));
        tied.put(good.section(0) + 60, 1u), tied.seal();
        CHECK(has(load(tied.bytes()).text, "tensor output is one too many (found 21 tensors, expected 20)"));
    }

    TEST_CASE("formats may be mixed, but not among matrices that meet the same activations") {
        const Config c = Model::synthetic(tiny_config(), Format::f32).config();
        const auto with = [&](const std::map<std::string, Format>& formats_of) {
            std::vector<TensorInfo> tensors = d::required_tensors(c);
            std::uint64_t end = 4096;
            for (TensorInfo& t : tensors) {
                t.format = t.dimensions == 1 ? Format::f32 : formats_of.count(t.name) ? formats_of.at(t.name) : Format::q8;
                t.offset = d::align(end, 64), t.bytes = d::tensor_bytes(t), end = t.offset + t.bytes;
            }
            const std::string table = d::write_table(tensors);
            return outcome([&] { d::read_table({"a file"}, std::as_bytes(std::span(table)), c, 4096, end); }).text;
        };
        CHECK(with({}) == "");
        CHECK(with({{"embedding", Format::f32},
                    {"output", Format::q4},
                    {"layers.1.down", Format::bf16},
                    {"layers.0.attention_out", Format::q4}}) == "");
        CHECK(with({{"layers.1.query", Format::bf16}, {"layers.1.key", Format::bf16}, {"layers.1.value", Format::bf16}}) == "");
        CHECK(with({{"layers.1.key", Format::bf16}}) ==
              "a file: tensor layers.1.key has another format than layers.1.query (found bf16, expected q8). Convert the model "
              "again with convert/convert.py.");
        CHECK(has(with({{"layers.0.value", Format::f32}}),
                  "tensor layers.0.value has another format than layers.0.key (found f32, expected q8)"));
        CHECK(has(with({{"layers.1.gate", Format::q4}}),
                  "tensor layers.1.up has another format than layers.1.gate (found q8, expected q4)"));
    }

    TEST_CASE("a wrong tokenizer is refused") {
        const Image good(tiny_config(), Format::q8);
        const std::uint64_t start = good.section(1), starts = start + 8, bytes = starts + 4 * 257, ids = bytes + 256;
        const auto with = [&](std::uint64_t offset, auto value) {
            Image image = good;
            image.put(offset, value);
            image.seal();
            return load(image.bytes()).text;
        };
        const std::string size = std::to_string(d::load_as<std::uint64_t>(good.buffer.data() + 56));
        CHECK(has(with(start, ~0u), "the number of tokens is out of range (found 4294967295, expected 1 to 300)"));
        CHECK(has(with(start, 0u), "the number of tokens is out of range (found 0"));
        CHECK(has(with(start, 300u), "the start of a token is out of range (found "));
        CHECK(with(start, 255u) != "");
        CHECK(has(with(start + 4, ~0u),
                  "the tokenizer ends in its ids of special tokens (found " + size + " bytes, expected at least 17179"));
        CHECK(with(start + 4, 43u) != "");
        CHECK(has(with(starts, 1u), "the start of a token is not 0 for the first (found 1, expected 0)"));
        CHECK(has(with(starts + 4, 0u), "the start of a token is out of range (found 0, expected 1 to "));
        CHECK(has(with(starts + 8, ~0u), "the start of a token is out of range (found 4294967295, expected 2 to "));
        CHECK(has(with(starts + 4 * 255, 256u), "the start of a token is out of range (found 256, expected 257 to "));
        CHECK(has(with(starts + 4 * 256, 257u), "the tokenizer after its tokens should hold nothing"));
        CHECK(has(with(bytes, '"'), "two tokens are equal (found 0 and 1, expected different bytes)"));
        CHECK(has(with(ids, 255u), "the id of a special token is out of range (found 255, expected 256 to 299)"));
        CHECK(has(with(ids, 257u), "the id of a special token is out of range (found 257, expected 258 to 299)"));
        CHECK(has(with(ids + 4 * 43, 300u), "the id of a special token is out of range (found 300, expected 299 to 299)"));
        CHECK(has(with(ids + 4 * 44, 1u), "the start of a special token is not 0 for the first (found 1, expected 0)"));
        Image image = good;
        image.put(56, d::load_as<std::uint64_t>(image.buffer.data() + 56) - 1), image.seal();
        CHECK(has(load(image.bytes()).text, "the start of a special token is out of range"));
    }

    TEST_CASE("synthetic weights are valid, of the promised size, and different for every seed") {
        Config c = tiny_config();
        c.dim = 128, c.n_heads = 4, c.head_dim = 32, c.ffn_dim = 192, c.vocab_size = 544;
        for (const bool whole : {true, false}) {
            if (!whole) c.dim = 72, c.ffn_dim = 90, c.vocab_size = 530;
            for (const Format format : formats) {
                const Model model = Model::synthetic(c, format, 3), other = Model::synthetic(c, format, 4);
                model.verify();
                CHECK(model.tokenizer().special("<|eot_id|>") == c.vocab_size - 256 + 9);
                CHECK(model.tokenizer().special("<|reserved_special_token_245|>") == c.vocab_size - 1);
                CHECK(model.tokenizer().is_end(c.vocab_size - 256 + 8));
                const Layer& layer = model.weights().layers[1];
                for (const Matrix& m : {layer.query, layer.down, layer.attention_out, model.weights().output}) {
                    double sum = 0, squares = 0;
                    int differing = 0, row = 0;
                    std::vector<float> values(static_cast<std::size_t>(m.units() * unit_columns(m.format)));
                    for (; row < m.rows; ++row) {
                        d::decode_row(m, row, values.data());
                        for (int i = 0; i < m.columns; ++i) {
                            const float x = values[static_cast<std::size_t>(i)];
                            sum += static_cast<double>(x), squares += static_cast<double>(x) * static_cast<double>(x);
                            differing += i > 0 && x != values[static_cast<std::size_t>(i - 1)];
                        }
                        for (std::size_t i = static_cast<std::size_t>(m.columns); i < values.size(); ++i) CHECK(values[i] == 0);
                    }
                    for (; row < m.panels() * panel_rows; ++row) {
                        d::decode_row(m, row, values.data());
                        CHECK(std::all_of(values.begin(), values.end(), [](float x) { return x == 0; }));
                    }
                    const double n = static_cast<double>(m.rows) * m.columns,
                                 deviation = std::sqrt(squares / n) * std::sqrt(static_cast<double>(m.columns));
                    CHECK(deviation > 0.65);
                    CHECK(deviation < 1.5);
                    CHECK(std::abs(sum / n) * std::sqrt(static_cast<double>(m.columns)) < 0.1);
                    CHECK(differing > n * 0.8);
                    if (m.format == Format::q8)
                        for (int p = 0; p < m.panels(); ++p)
                            for (int u = 0; u < m.units(); ++u)
                                for (int i = 0; i < 1024; ++i) CHECK(m.panel(p)[u * 1088 + i] != std::byte{0x80});
                }
                CHECK(std::memcmp(layer.up.data, other.weights().layers[1].up.data, 256) != 0);
                CHECK(characters(model.impl().image) == characters(Model::synthetic(c, format, 3).impl().image));
            }
        }
    }

    TEST_CASE("a synthetic model of any vocabulary from 266 on loads; smaller ones and impossible shapes are refused") {
        Config c = tiny_config();
        for (const int vocab_size : {266, 511, 512, 513, 1200, 20000}) {
            c.vocab_size = vocab_size;
            const Model model = Model::synthetic(c, Format::q4);
            CHECK(model.tokenizer().rank_count() == std::max(256, vocab_size - 256));
            CHECK(model.tokenizer().begin_token() == model.tokenizer().special("<|begin_of_text|>"));
        }
        const auto refused = [](auto change) {
            Config config = tiny_config();
            change(config);
            const Outcome o = outcome([&] { Model::synthetic(config, Format::q8); });
            CHECK(o.code == Code::argument);
            return o.text;
        };
        CHECK(has(
            refused([](Config& b) { b.vocab_size = 265; }),
            "synthetic model: the vocabulary is out of range (found 265, expected 266 to 16777216). Choose another value."));
        CHECK(has(refused([](Config& b) { b.vocab_size = -1; }), "the vocabulary is out of range (found -1"));
        CHECK(has(
            refused([](Config& b) { b.n_heads = 0; }),
            "configuration: the number of query heads is out of range (found 0, expected 1 to 1024). Choose another value."));
        CHECK(has(refused([](Config& b) { b.n_layers = -5; }), "the number of layers is out of range (found -5"));
        CHECK(has(refused([](Config& b) { b.head_dim = 1 << 30, b.n_heads = 1 << 10; }), "the head width is out of range"));
        CHECK(has(refused([](Config& b) { b.norm_eps = 0; }),
                  "the epsilon of RMSNorm is out of range (found 0, expected 1e-30 to 1)"));
    }

    TEST_CASE("the plan counts the bytes of the tensors, and asks the device for the rest") {
        const Model model = Model::synthetic(tiny_config(), Format::q8);
        Options options;
        options.device = reference(), options.context = 100;
        const MemoryPlan plan = model.plan(options);
        std::uint64_t bytes = 0;
        for (const TensorInfo& t : model.tensors()) bytes += t.bytes;
        CHECK(plan.weights_bytes == bytes);
        CHECK(plan.cache_bytes == options.device->cache_bytes(model.config(), options));
        options.context = 0;
        CHECK(model.plan(options).cache_bytes > 5 * plan.cache_bytes);  // the model's own context, 512
    }
}

}  // namespace model_files
}  // namespace
