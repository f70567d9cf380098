// Text to token ids and back: the tokenizer alone, on standard input and output.
#include "common.hpp"

std::vector<int> read_ids(std::string_view line, int vocab_size) {
    std::vector<int> ids;
    for (std::size_t from = 0; (from = line.find_first_not_of(" \t\r\n", from)) != std::string_view::npos;) {
        const std::size_t end = std::min(line.find_first_of(" \t\r\n", from), line.size());
        const std::string_view word = line.substr(from, end - from);
        int id = 0;
        if (!parse_value(word, id, Range{0}).empty() || id >= vocab_size)
            fail(llama3::Code::argument, "standard input: not a token id (found " + json_text(word) + ", expected 0 to " +
                                             std::to_string(vocab_size - 1) + "). Give ids separated by blanks.");
        ids.push_back(id);
        from = end;
    }
    return ids;
}

int main(int argc, char** argv) {
    Args args(
        "[-m M] [--decode] [--special] [-0] < input",
        "Prints the token ids of standard input on one line, without begin-of-text in front. All of the input is one text.");
    std::string path;
    bool decode = false, special = false, nul = false;
    args.add("-m, --model M", path, "model whose tokenizer is used (the demo model)", {1});
    args.add("--decode", decode, "the other way: ids, separated by blanks, to exactly their text");
    args.add("--special", special, "read <|eot_id|> and the like as special tokens, not as text");
    args.add("-0", nul,
             "several inputs, each ends with a NUL byte: a line of ids for each; --decode: each line to a text and a NUL");
    args.parse(argc, argv);
    if (decode && special) args.wrong("--special", "it has no meaning with --decode", "both", "one of them");

    return run_once([&] {
        const llama3::Model model = llama3::Model::load(path.empty() ? demo_model() : path);
        const llama3::Tokenizer& tokenizer = model.tokenizer();
        const auto mode = special ? llama3::Tokenizer::Special::parse : llama3::Tokenizer::Special::as_text;
        std::ios::sync_with_stdio(false);
        const std::string input((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());

        const char separator = decode ? '\n' : '\0';
        std::size_t from = 0;
        do {  // the last input may lack its separator
            const std::size_t end = nul ? std::min(input.find(separator, from), input.size()) : input.size();
            const std::string_view one = std::string_view(input).substr(from, end - from);
            if (nul && one.empty() && from == input.size()) break;  // -0 without any input
            if (decode) {
                std::cout << tokenizer.decode(read_ids(one, tokenizer.vocab_size()));
                if (nul) std::cout << '\0';
            } else {
                const char* blank = "";
                for (const int id : tokenizer.encode(one, mode)) std::cout << blank << id, blank = " ";
                std::cout << '\n';
            }
            from = end + 1;
        } while (from < input.size());
    });
}
