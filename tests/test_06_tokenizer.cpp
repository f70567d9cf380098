// §6 Tokenizer: text to ids and back.
#include "internals.hpp"

#include <doctest/doctest.h>

#include <algorithm>

using namespace llama3;
using test::Random;

namespace {

using Ids = std::vector<int>;

// ── The published expression and the merge rule, as slow as they are obvious ──

struct Text {  // code points, and where each one starts
    std::u32string codes;
    std::vector<std::size_t> starts;
    std::vector<detail::CharClass> classes;

    explicit Text(std::string_view text) {
        for (std::size_t i = 0; i < text.size();) {
            const auto byte = [&](std::size_t k) { return static_cast<char32_t>(static_cast<unsigned char>(text[i + k])); };
            const std::size_t n = byte(0) < 0x80 ? 1 : byte(0) < 0xE0 ? 2 : byte(0) < 0xF0 ? 3 : 4;
            char32_t code = n == 1 ? byte(0) : byte(0) & (0x7Fu >> n);
            for (std::size_t k = 1; k < n; ++k) code = code << 6 | (byte(k) & 0x3Fu);
            codes += code;
            starts.push_back(i);
            classes.push_back(detail::unicode_class(code));
            i += n;
        }
        starts.push_back(text.size());
    }
    std::size_t size() const { return codes.size(); }
    bool is(std::size_t i, detail::CharClass kind) const { return i < size() && classes[i] == kind; }
    bool newline(std::size_t i) const { return i < size() && (codes[i] == '\n' || codes[i] == '\r'); }
};

// The alternatives one by one, greedy and with backtracking; 0 where none but the last can match.
std::size_t match(const Text& t, std::size_t i) {
    using enum detail::CharClass;
    for (const std::u32string_view c : {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"}) {
        std::size_t k = 0;
        while (k < c.size() && i + k < t.size()) {
            char32_t code = t.codes[i + k];
            if (code >= 'A' && code <= 'Z') code += 32;
            if (code == 0x17F) code = 's';
            if (code != c[k]) break;
            ++k;
        }
        if (k == c.size()) return i + k;
    }
    for (const std::size_t prefix : {1, 0}) {
        if (prefix == 1 && (t.newline(i) || t.is(i, letter) || t.is(i, number))) continue;
        std::size_t end = i + prefix;
        while (t.is(end, letter)) ++end;
        if (end > i + prefix) return end;
    }
    if (t.is(i, number)) return i + 1 + (t.is(i + 1, number) ? 1 + t.is(i + 2, number) : 0);
    for (const std::size_t prefix : {1, 0}) {
        if (prefix == 1 && t.codes[i] != ' ') continue;
        std::size_t end = i + prefix;
        while (t.is(end, other)) ++end;
        if (end == i + prefix) continue;
        while (t.newline(end)) ++end;
        return end;
    }
    std::size_t run = i;
    while (t.is(run, space)) ++run;
    for (std::size_t before = run + 1; before-- > i;) {  // \s* gives back until [\r\n]+ matches
        std::size_t end = before;
        while (t.newline(end)) ++end;
        if (end > before) return end;
    }
    for (std::size_t end = run; end > i; --end)
        if (end == t.size() || t.is(end, space)) return end;
    return run;
}

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> pieces;
    for (std::size_t i = 0; i < text.size();) {
        const std::size_t end = detail::piece_end(text, i);
        REQUIRE(end > i);
        REQUIRE(end <= text.size());
        pieces.push_back(text.substr(i, end - i));
        i = end;
    }
    return pieces;
}

std::vector<std::string> split_slowly(const std::string& text) {
    const Text t(text);
    std::vector<std::string> pieces;
    for (std::size_t i = 0; i < t.size();) {
        const std::size_t end = match(t, i);
        pieces.push_back(text.substr(t.starts[i], t.starts[end] - t.starts[i]));
        i = end;
    }
    return pieces;
}

Ids merge_slowly(const std::vector<std::string>& tokens, const std::string& piece) {
    const auto rank = [&](const std::string& bytes) { return std::find(tokens.begin(), tokens.end(), bytes) - tokens.begin(); };
    const auto none = static_cast<std::ptrdiff_t>(tokens.size());
    if (rank(piece) != none) return {static_cast<int>(rank(piece))};
    std::vector<std::string> parts;
    for (const char c : piece) parts.emplace_back(1, c);
    for (;;) {
        std::ptrdiff_t best = none;
        std::size_t at = 0;
        for (std::size_t i = 0; i + 1 < parts.size(); ++i)
            if (rank(parts[i] + parts[i + 1]) < best) best = rank(parts[i] + parts[i + 1]), at = i;
        if (best == none) break;
        parts[at] += parts[at + 1];
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    Ids ids;
    for (const std::string& part : parts) ids.push_back(static_cast<int>(rank(part)));
    return ids;
}

std::string to_utf8(char32_t code) {
    const auto byte = [](char32_t bits) { return static_cast<char>(bits); };
    if (code < 0x80) return {byte(code)};
    if (code < 0x800) return {byte(0xC0 | code >> 6), byte(0x80 | (code & 63))};
    if (code < 0x10000) return {byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 63)), byte(0x80 | (code & 63))};
    return {byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 63)), byte(0x80 | (code >> 6 & 63)), byte(0x80 | (code & 63))};
}

// Few different characters, so that every rule of the split is met often.
std::string random_text(Random& random, int most) {
    static const std::vector<std::string> characters = {" ",
                                                        " ",
                                                        " ",
                                                        "\t",
                                                        "\n",
                                                        "\n",
                                                        "\r",
                                                        "\v",
                                                        "\xC2\x85",
                                                        "\xC2\xA0",
                                                        "\xE2\x80\xA8",
                                                        "\xE3\x80\x80",
                                                        "'",
                                                        "'",
                                                        "s",
                                                        "S",
                                                        "\xC5\xBF",
                                                        "t",
                                                        "r",
                                                        "e",
                                                        "E",
                                                        "v",
                                                        "l",
                                                        "L",
                                                        "m",
                                                        "d",
                                                        "a",
                                                        "b",
                                                        "Z",
                                                        "\xC3\xA9",
                                                        "\xCC\x81",
                                                        "1",
                                                        "2",
                                                        "\xC2\xB2",
                                                        "\xE2\x85\x93",
                                                        "\xD9\xA3",
                                                        "!",
                                                        ".",
                                                        "-",
                                                        "_",
                                                        "<|",
                                                        "\xE2\x80\x99",
                                                        "\xE4\xB8\xAD",
                                                        "\xF0\x9F\x98\x80",
                                                        std::string(1, '\0'),
                                                        "\x1C",
                                                        "\xE2\x80\x8B",
                                                        "\xEF\xBB\xBF",
                                                        "\xE2\x84\xAA"};
    std::string text;
    for (int n = random.below(static_cast<std::size_t>(most)) + 1; n > 0; --n)
        text += random.below(8) ? characters[static_cast<std::size_t>(random.below(characters.size()))]
                                : to_utf8(static_cast<char32_t>(random.below(0xD800)));
    return text;
}

std::string repaired(std::string_view text) {
    std::string out;
    if (detail::append_repaired(out, text) < text.size()) out += "\xEF\xBF\xBD";
    return out;
}

std::string stream(const Tokenizer& tokenizer, const Ids& ids) {
    TextStream stream(tokenizer);
    std::string text;
    for (const int id : ids) text += stream.push(id);
    return text + stream.finish();
}

Code code_of(const std::function<void()>& f, std::string* message = nullptr) {
    try {
        f();
    } catch (const Error& error) {
        if (message) *message = error.what();
        return error.code();
    }
    FAIL("no error was thrown");
    return Code::argument;
}

}  // namespace

TEST_SUITE_BEGIN("core: tokenizer");

TEST_CASE("the split follows the published expression on random text") {
    Random random{1};
    for (int i = 0; i < 20000; ++i) {
        const std::string text = random_text(random, i % 40 + 1);
        CAPTURE(text);
        REQUIRE(split(text) == split_slowly(text));
    }
}

TEST_CASE("the split follows the published expression for every character alone, after a space, and between letters") {
    for (char32_t code = 0; code < 0x110000; code += code < 0x3100 || code % 8 ? 1 : 29) {
        if (code >= 0xD800 && code < 0xE000) continue;
        const std::string c = to_utf8(code), text = c + " " + c + "a" + c + "'" + c + "1" + c + "\n" + c + "!" + c + c;
        if (split(text) != split_slowly(text)) FAIL("U+" << std::hex << static_cast<unsigned>(code));
    }
}

TEST_CASE("exactly the 25 White_Space characters are whitespace") {
    std::u32string spaces;
    for (char32_t code = 0; code < 0x110000; ++code)
        if (detail::unicode_class(code) == detail::CharClass::space) spaces += code;
    CHECK(
        spaces ==
        U"\t\n\v\f\r "
        U"\u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000");
}

TEST_CASE("the merge takes the lowest rank first and the leftmost of equals") {
    Random random{2};
    for (int round = 0; round < 60; ++round) {
        std::vector<std::string> merges;  // over three letters, in random order: ranks say nothing about lengths
        for (int i = 0; i < 40; ++i) {
            std::string token;
            for (int n = random.below(5) + 2; n > 0; --n) token += "abc"[random.below(3)];
            if (std::find(merges.begin(), merges.end(), token) == merges.end()) merges.push_back(token);
        }
        const test::Vocabulary vocabulary = test::byte_vocabulary(merges);
        const Tokenizer tokenizer = test::make_tokenizer(vocabulary);
        for (int i = 0; i < 40; ++i) {
            std::string piece;
            for (int n = random.below(i < 38 ? 60 : 600) + 1; n > 0; --n) piece += "abc"[random.below(3)];
            CAPTURE(piece);
            REQUIRE(tokenizer.encode(piece) == merge_slowly(vocabulary.tokens, piece));
        }
    }
}

TEST_CASE("a piece that is a token is taken whole, also where merging cannot reach it") {
    const Tokenizer tokenizer = test::make_tokenizer(test::byte_vocabulary({"bc", "abcd"}));
    CHECK(tokenizer.encode("abcd") == Ids{257});
    CHECK(tokenizer.encode("abc") == Ids{'a', 256});
}

TEST_CASE("encoding and decoding gives the text back") {
    const Tokenizer tokenizer = test::make_tokenizer(test::byte_vocabulary({"he", "ll", "hell", " w", "\xE4\xB8"}));
    Random random{3};
    for (int i = 0; i < 2000; ++i) {
        const std::string text = random_text(random, 50);
        REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
        REQUIRE(stream(tokenizer, tokenizer.encode(text)) == text);
    }
    CHECK(tokenizer.encode("").empty());
    CHECK(tokenizer.decode({}) == "");
}

TEST_CASE("special tokens are read only when asked for, and adds none by itself") {
    const Tokenizer tokenizer = test::make_tokenizer(test::byte_vocabulary());
    const int eot = tokenizer.special("<|eot_id|>");
    CHECK(eot == 256 + 9);
    const std::string text = "a<|eot_id|> b<|eot_id|";
    const Ids plain = tokenizer.encode(text), parsed = tokenizer.encode(text, Tokenizer::Special::parse);
    CHECK(std::count(plain.begin(), plain.end(), eot) == 0);
    CHECK(plain.size() == text.size());
    CHECK(parsed.size() == text.size() - 9);
    CHECK(parsed[1] == eot);
    CHECK(tokenizer.decode(parsed) == text);
    CHECK(tokenizer.encode("<|eot_id|><|begin_of_text|>", Tokenizer::Special::parse) == Ids{eot, 256});
    CHECK(tokenizer.encode("", Tokenizer::Special::parse).empty());
}

TEST_CASE("the text before a special token is encoded on its own") {
    const Tokenizer tokenizer = test::make_tokenizer(test::byte_vocabulary({"  "}));
    CHECK(tokenizer.encode("a  <") == Ids{'a', ' ', ' ', '<'});  // the last space joins the sign
    CHECK(tokenizer.encode("a  <|eot_id|>", Tokenizer::Special::parse) == Ids{'a', 256, 257 + 9});
}

TEST_CASE("of special tokens that begin alike the longest is taken, and a begun name is no token") {
    test::Vocabulary vocabulary = test::byte_vocabulary();
    vocabulary.specials = {"<a", "<ab", "<abcd", "x", "\xC3\xA9!"};
    const Tokenizer tokenizer = test::make_tokenizer(vocabulary);
    const auto parse = [&](std::string_view text) { return tokenizer.encode(text, Tokenizer::Special::parse); };
    CHECK(parse("<abc<abcd<<ax") == Ids{257, 'c', 258, '<', 256, 259});
    CHECK(parse("\xC3\xA9!") == Ids{260});
    CHECK(parse("<") == Ids{'<'});
    CHECK(tokenizer.special("<ab") == 257);
    CHECK(tokenizer.special("<abc") == -1);
    CHECK(tokenizer.special("<") == -1);
    CHECK(tokenizer.special("") == -1);
    CHECK(tokenizer.special("zzz") == -1);
}

TEST_CASE("invalid UTF-8 becomes U+FFFD as in Python") {
    const std::string r = "\xEF\xBF\xBD";
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"a\xFF"
         "b",
         "a" + r + "b"},
        {"\x80", r},
        {"\xC0\xAF", r + r},  // an overlong slash
        {"\xC3", r},          // cut
        {"\xE2\x82", r},      // one part of a character, one replacement
        {"\xE2\x82"
         "a",
         r + "a"},
        {"\xE0\x80\x80", r + r + r},  // overlong
        {"\xED\xA0\x80", r + r + r},  // a surrogate
        {"\xF0\x9F\x98", r},
        {"\xF0\x9F\x98\xF0\x9F\x98\x80", r + "\xF0\x9F\x98\x80"},
        {"\xF0\x80\x80\x80", r + r + r + r},  // overlong
        {"\xF4\x90\x80\x80", r + r + r + r},  // above U+10FFFF
        {"\xF5\x80", r + r},
        {"\xF4\x8F\xBF\xBF", "\xF4\x8F\xBF\xBF"},  // U+10FFFF
        {"\xED\x9F\xBF\xEE\x80\x80", "\xED\x9F\xBF\xEE\x80\x80"},
    };
    const Tokenizer tokenizer = test::make_tokenizer(test::byte_vocabulary());
    for (const auto& c : cases) {
        const auto &bytes = c.first, &text = c.second;
        CAPTURE(bytes);
        CHECK(repaired(bytes) == text);
        CHECK(tokenizer.encode(bytes) == tokenizer.encode(text));
        CHECK(tokenizer.decode(tokenizer.encode(bytes)) == text);
        Ids ids;
        for (const char c : bytes) ids.push_back(static_cast<unsigned char>(c));
        CHECK(stream(tokenizer, ids) == text);
    }
}

TEST_CASE("a stream of random bytes gives the text of the whole, in whole characters") {
    const Tokenizer tokenizer = test::make_tokenizer(test::byte_vocabulary({"\x9F\x98", "a\xE2",
                                                                            "\x82\xAC"
                                                                            "b"}));
    Random random{4};
    for (int i = 0; i < 5000; ++i) {
        Ids ids;
        for (int n = random.below(30); n > 0; --n)
            ids.push_back(random.below(5) ? "\xE2\x82\xAC\xF0\x9F\x98\x80"
                                            "a"[random.below(8)] &
                                                0xFF
                                          : random.below(259));
        TextStream stream(tokenizer);
        std::string text;
        for (const int id : ids) {
            const std::string part = stream.push(id);
            REQUIRE(repaired(part) == part);
            text += part;
        }
        text += stream.finish();
        REQUIRE(text == repaired(tokenizer.decode(ids)));
    }
}

TEST_CASE("a special token gives no text and ends a cut character") {
    const Tokenizer tokenizer = test::make_tokenizer(test::byte_vocabulary());
    TextStream stream(tokenizer);
    CHECK(stream.push(0xE2) == "");
    CHECK(stream.push(256) == "\xEF\xBF\xBD");
    CHECK(stream.push(256) == "");
    CHECK(stream.push('a') == "a");
    CHECK(stream.finish() == "");
    CHECK(stream.push(0xF0) == "");
    CHECK(stream.finish() == "\xEF\xBF\xBD");
    CHECK(stream.finish() == "");
}

TEST_CASE("ids outside the vocabulary are refused with the id and its bounds") {
    test::Vocabulary vocabulary = test::byte_vocabulary();
    vocabulary.unused = 5;
    const Tokenizer tokenizer = test::make_tokenizer(vocabulary);
    const int size = 256 + 12 + 5;
    CHECK(tokenizer.vocab_size() == size);
    CHECK(tokenizer.rank_count() == 256);
    for (const int id : {-1, size, 2147483647, -2147483647 - 1}) {
        std::string message;
        CHECK(code_of([&] { tokenizer.decode(Ids{65, id}); }, &message) == Code::argument);
        CHECK(message.find("found " + std::to_string(id) + ", expected 0 to " + std::to_string(size - 1)) != std::string::npos);
        CHECK(code_of([&] { tokenizer.bytes(id); }) == Code::argument);
        CHECK(code_of([&] { tokenizer.is_special(id); }) == Code::argument);
        CHECK(code_of([&] { tokenizer.is_end(id); }) == Code::argument);
        CHECK(code_of([&] { TextStream(tokenizer).push(id); }) == Code::argument);
    }
    CHECK(tokenizer.decode(Ids{65, size - 1, 66}) == "AB");  // an id that stands for nothing
    CHECK_FALSE(tokenizer.is_special(size - 1));
    CHECK_FALSE(tokenizer.is_special(255));
    CHECK(tokenizer.is_special(256));
    CHECK(tokenizer.bytes(256) == "<|begin_of_text|>");
    CHECK(tokenizer.begin_token() == 256);
    CHECK(tokenizer.is_end(256 + 9));
    CHECK_FALSE(tokenizer.is_end(256));
    CHECK(tokenizer.end_tokens().size() == 3);
}

TEST_CASE("a vocabulary with equal tokens, equal names or a missing byte is refused") {
    std::string message;
    test::Vocabulary vocabulary = test::byte_vocabulary({"ab", "cd", "ab"});
    CHECK(code_of([&] { test::make_tokenizer(vocabulary); }, &message) == Code::format);
    CHECK(message.find("test vocabulary: two tokens are equal (found 256 and 258,") == 0);
    vocabulary = test::byte_vocabulary();
    vocabulary.tokens[7] = "seven";
    CHECK(code_of([&] { test::make_tokenizer(vocabulary); }, &message) == Code::format);
    CHECK(message.find("a single byte has no token (found 7,") != std::string::npos);
    vocabulary = test::byte_vocabulary();
    vocabulary.specials[3] = vocabulary.specials[8];
    CHECK(code_of([&] { test::make_tokenizer(vocabulary); }, &message) == Code::format);
    CHECK(message.find("<|eom_id|>") != std::string::npos);
}

TEST_CASE("hostile text is encoded in nearly linear time") {
    std::vector<std::string> merges;
    for (std::size_t n = 2; n <= 128; n *= 2)
        for (const char* c : {"a", " ", "\xCC\x81", "\n"}) {
            std::string token;
            for (std::size_t i = 0; i < n; ++i) token += c;
            merges.push_back(token);
        }
    merges.push_back("\xCC\x81");
    const Tokenizer tokenizer = test::make_tokenizer(test::byte_vocabulary(merges));
    for (const char* unit :
         {"a", " ", "\xCC\x81", "\n", " \n", "<|", "<|eot_id|", "'s", "\xF0\x9F", "\x80", "1", "ab ", "a!"}) {
        std::string text;
        while (text.size() < 1 << 19) text += unit;
        CAPTURE(unit);
        // Anything quadratic in here takes hours: then the suite's time limit ends it.
        CHECK(tokenizer.encode(text, Tokenizer::Special::parse).size() > 1000);
        CHECK(repaired(text) == stream(tokenizer, tokenizer.encode(text)));
    }
}

TEST_SUITE_END();
TEST_SUITE_BEGIN("core: published tokenizer");

TEST_CASE("the published vocabulary gives the ids of the reference where others go wrong") {
    const Tokenizer* tokenizer = test::published_tokenizer();
    if (!tokenizer) {
        MESSAGE("did not run: LLAMA3_TOKENIZER_MODEL names no tokenizer.model");
        return;
    }
    const std::vector<std::pair<std::string, Ids>> cases = {
        // published values
        {"This is a test sentence.", {2028, 374, 264, 1296, 11914, 13}},
        {"DON'T", {85741, 17773}},
        {"don\u2019t", {15357, 1431}},
        {"1234567", {4513, 10961, 22}},
        {" 123", {220, 4513}},
        {"a  1", {64, 220, 220, 16}},
        {"a   b", {64, 256, 293}},
        {"x  ", {87, 256}},
        {"a \n b", {64, 720, 293}},
        {"\n\n  x", {271, 220, 865}},
        {"a\r\n\r\nb", {64, 881, 65}},
        {"!!\n\nfoo", {25833, 8134}},
        {"!! \n\nfoo", {3001, 4815, 8134}},
        {"  !\r\n", {220, 758, 319}},
        {"a\u00a0b", {64, 115648}},
        {"a\u3000b", {64, 23249, 65}},
        {"a\xC2\x85"
         "b",
         {64, 116360, 65}},
        {"e\u0301a", {68, 54939, 64}},
        {"\u0915\u093e\u092e", {65804, 100497}},
        {std::string("\0\0abc", 5), {188, 188, 13997}},
        {"<|eot_id|>", {27, 91, 68, 354, 851, 91, 29}},
        {" vi\u1EC7c", {100769}},
        {" Vi\u1EC7t", {101798}},
        {std::string(128, ' '), {tokenizer->encode(std::string(128, ' ')).at(0)}},
        {"\n\n", {271}},
    };
    for (const auto& c : cases) {
        const std::string& text = c.first;
        const Ids& ids = c.second;
        CAPTURE(text);
        CHECK(tokenizer->encode(text) == ids);
        CHECK(tokenizer->decode(ids) == text);
    }
    CHECK(tokenizer->begin_token() == 128000);
    CHECK(tokenizer->vocab_size() == 128256);
    CHECK(tokenizer->encode("<|eot_id|>", Tokenizer::Special::parse) == Ids{128009});
    CHECK(Ids(tokenizer->end_tokens().begin(), tokenizer->end_tokens().end()) == Ids{128001, 128008, 128009});
}

TEST_CASE("every token of the published vocabulary that is text encodes to itself, and is cut nowhere") {
    const Tokenizer* tokenizer = test::published_tokenizer();
    if (!tokenizer) {
        MESSAGE("did not run: LLAMA3_TOKENIZER_MODEL names no tokenizer.model");
        return;
    }
    int not_text = 0, different = 0;
    for (int id = 0; id < tokenizer->rank_count(); ++id) {
        const std::string text(tokenizer->bytes(id));
        if (repaired(text) != text) ++not_text;
        else if (tokenizer->encode(text) != Ids{id}) ++different;
    }
    CHECK(tokenizer->rank_count() == 128000);
    CHECK(not_text == 1352);
    CHECK(different == 0);
}

TEST_CASE("the strings of the golden files get tiktoken's ids from the demo model") {
    const std::string strings = test::read_file(test::folder() + "golden/tokenizer_demo.strings");
    const std::string expected = test::read_file(test::folder() + "golden/tokenizer_demo.ids");
    const std::string path = test::folder() + "../examples/demo/demo.l3";
    REQUIRE(!strings.empty());
    REQUIRE(!expected.empty());
    const Model model = Model::load(path);
    int count = 0, different = 0;
    for (std::size_t i = 0, line = 0; i < strings.size(); ++count) {
        const std::size_t end = strings.find('\0', i), line_end = expected.find('\n', line);
        REQUIRE(end != std::string::npos);
        REQUIRE(line_end != std::string::npos);
        std::string ids;
        for (const int id : model.tokenizer().encode(std::string_view(strings).substr(i, end - i)))
            ids += (ids.empty() ? "" : " ") + std::to_string(id);
        if (ids != expected.substr(line, line_end - line) && ++different <= 5)
            CHECK_MESSAGE(false, "string " << count << ": " << strings.substr(i, end - i));
        i = end + 1, line = line_end + 1;
    }
    CHECK(count > 1000);
    CHECK(different == 0);
}

TEST_SUITE_END();
