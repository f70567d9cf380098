// Declarations of what is internal to llama3.hpp, for tests that link with its implementation; and helpers for several tests.
#ifndef LLAMA3_TESTS_INTERNALS_HPP
#define LLAMA3_TESTS_INTERNALS_HPP

#include "llama3.hpp"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

namespace llama3::detail {

// §6
enum class CharClass : std::uint8_t { other, letter, number, space, none };
CharClass unicode_class(char32_t code);
std::size_t append_repaired(std::string& out, std::string_view text);
std::size_t piece_end(std::string_view text, std::size_t begin);
std::shared_ptr<const Tokenizer::Impl> make_tokenizer(std::span<const std::uint32_t> rank_starts, std::string_view rank_bytes,
                                                      std::span<const std::uint32_t> special_ids,
                                                      std::span<const std::uint32_t> name_starts, std::string_view name_bytes,
                                                      int vocab_size, int begin_token, std::vector<int> end_tokens,
                                                      std::shared_ptr<const void> owner, const std::string& where);

// §7
float relative_probability(float logit, float best, float temperature);
std::string_view strip(std::string_view text);
std::string json_string(std::string_view text);
std::vector<int> render_chat(const Tokenizer& tokenizer, ChatFormat format, std::span<const Message> messages,
                             const ChatStyle& style, bool answer);

}  // namespace llama3::detail

namespace test {

inline std::string folder() {  // tests/
    const std::string file = __FILE__;
    return file.substr(0, file.find_last_of("/\\") + 1);
}

inline std::string read_file(const std::string& path) {  // empty where there is none
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

// splitmix64: the same numbers everywhere, unlike the distributions of the standard library.
struct Random {
    std::uint64_t state;
    std::uint64_t operator()() {
        std::uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(std::size_t n) { return static_cast<int>((*this)() % n); }
    float real() { return static_cast<float>((*this)() >> 40) * 0x1p-24f; }  // 0 to 1
};

// A vocabulary as the file has it: tokens by rank, and names of special tokens, the first of which follows the last rank.
struct Vocabulary {
    std::vector<std::string> tokens, specials;
    int unused = 0;  // ids after the specials
};

// The special tokens of Llama 3.2, the first n of them.
inline std::vector<std::string> special_names(int n = 256) {
    std::vector<std::string> names = {"begin_of_text",
                                      "end_of_text",
                                      "reserved_special_token_0",
                                      "reserved_special_token_1",
                                      "finetune_right_pad_id",
                                      "step_id",
                                      "start_header_id",
                                      "end_header_id",
                                      "eom_id",
                                      "eot_id",
                                      "python_tag",
                                      "image"};
    while (static_cast<int>(names.size()) < n) names.push_back("reserved_special_token_" + std::to_string(names.size() - 10));
    names.resize(static_cast<std::size_t>(n));
    for (std::string& name : names) name = "<|" + name + "|>";
    return names;
}

inline Vocabulary byte_vocabulary(const std::vector<std::string>& merges = {}) {
    Vocabulary v;
    for (int b = 0; b < 256; ++b) v.tokens.emplace_back(1, static_cast<char>(b));
    v.tokens.insert(v.tokens.end(), merges.begin(), merges.end());
    v.specials = special_names(12);
    return v;
}

// begin: index of the begin token among the specials; the end tokens are specials 1, 8 and 9, those of them that exist.
inline llama3::Tokenizer make_tokenizer(const Vocabulary& v, int begin = 0) {
    struct Memory {
        std::vector<std::uint32_t> starts{0}, ids, name_starts{0};
        std::string bytes, names;
    };
    const auto memory = std::make_shared<Memory>();
    for (const std::string& token : v.tokens) {
        memory->bytes += token;
        memory->starts.push_back(static_cast<std::uint32_t>(memory->bytes.size()));
    }
    const int n = static_cast<int>(v.tokens.size()), m = static_cast<int>(v.specials.size());
    for (int i = 0; i < m; ++i) {
        memory->ids.push_back(static_cast<std::uint32_t>(n + i));
        memory->names += v.specials[static_cast<std::size_t>(i)];
        memory->name_starts.push_back(static_cast<std::uint32_t>(memory->names.size()));
    }
    std::vector<int> ends;
    for (const int i : {1, 8, 9})
        if (i < m) ends.push_back(n + i);
    return llama3::Tokenizer(llama3::detail::make_tokenizer(memory->starts, memory->bytes, memory->ids, memory->name_starts,
                                                            memory->names, n + m + v.unused, n + begin, ends, memory,
                                                            "test vocabulary"));
}

// A tokenizer.model: lines of base64(token) and rank.
inline Vocabulary read_tokenizer_model(const std::string& path) {
    static const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    Vocabulary v;
    std::ifstream file(path);
    std::string line, rank;
    while (file >> line >> rank) {
        std::string token;
        unsigned bits = 0, count = 0;
        for (const char c : line) {
            if (c == '=') break;
            bits = (bits << 6 | static_cast<unsigned>(digits.find(c))) & 0xFFFF;
            if ((count += 6) >= 8) token += static_cast<char>(bits >> (count -= 8) & 0xFF);
        }
        v.tokens.push_back(token);
    }
    v.specials = special_names();
    return v;
}

// The published vocabulary, where LLAMA3_TOKENIZER_MODEL names it; else nullptr.
inline const llama3::Tokenizer* published_tokenizer() {
    static const auto tokenizer = []() -> std::unique_ptr<llama3::Tokenizer> {
        const char* path = std::getenv("LLAMA3_TOKENIZER_MODEL");
        if (!path || !*path) return nullptr;
        return std::make_unique<llama3::Tokenizer>(make_tokenizer(read_tokenizer_model(path)));
    }();
    return tokenizer.get();
}

}  // namespace test

#endif
