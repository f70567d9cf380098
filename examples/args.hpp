// The flag parser that all programs share. A program binds each flag to a variable whose value is the default:
//
//     Args args("-p TEXT [flags]", "Completes a text.");
//     args.add("--temp NUMBER", temperature, "sampling temperature (0.6)", {0});  // at least 0
//     args.add("--json", json, "print one JSON object");                          // bool: a switch
//     args.parse(argc, argv);
//
// A wrong command line gives one line on standard error and exit status 2; -h and --help print the usage and exit with 0.
#ifndef LLAMA3_EXAMPLES_ARGS_HPP
#define LLAMA3_EXAMPLES_ARGS_HPP

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <iostream>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "llama3.hpp"

// A text in double quotes, as JSON writes it, on one line.
inline std::string json_text(std::string_view text) {
    std::string out = "\"";
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') out += '\\', out += c;
        else if (c == '\n') out += "\\n";
        else if (byte < 0x20 || byte == 0x7f)
            out += "\\u00", out += "0123456789abcdef"[byte >> 4], out += "0123456789abcdef"[byte & 15];
        else out += c;
    }
    return out + '"';
}

// parse_value reads a flag's text and returns what it expected where that is something else. Overload it for other types.
struct Range {  // of a number; of the length of a text
    double least = -std::numeric_limits<double>::infinity(), most = std::numeric_limits<double>::infinity();
};

inline std::string parse_value(std::string_view text, std::string& value, Range range) {
    if (static_cast<double>(text.size()) < range.least) return "something";
    return value = text, "";
}

inline std::string parse_value(std::string_view, bool& value, Range) { return value = true, ""; }  // a switch

inline std::string parse_value(std::string_view text, llama3::Format& format, Range) {
    for (const auto known : {llama3::Format::f32, llama3::Format::bf16, llama3::Format::q8, llama3::Format::q4})
        if (text == llama3::format_name(known)) return format = known, "";
    return "f32, bf16, q8 or q4";
}

template <class Number>
requires std::is_arithmetic_v<Number> std::string parse_value(std::string_view text, Number& value, Range range) {
    const std::string copy(text);
    bool good = false;
    Number number{};
    if constexpr (std::is_floating_point_v<Number>) {
        char* end = nullptr;
        number = static_cast<Number>(std::strtod(copy.c_str(), &end));
        good = !copy.empty() && end == copy.c_str() + copy.size() && std::isfinite(number);
    } else {
        const auto [end, error] = std::from_chars(copy.data(), copy.data() + copy.size(), number);
        good = error == std::errc() && end == copy.data() + copy.size();
    }
    const auto shown = [](double limit) { return std::to_string(static_cast<long long>(limit)); };
    if (good && static_cast<double>(number) >= range.least && static_cast<double>(number) <= range.most)
        return value = number, "";
    std::string expected = std::is_integral_v<Number> ? "a whole number" : "a number";
    if (std::isfinite(range.least)) expected += " of at least " + shown(range.least);
    if (std::isfinite(range.most)) expected += " and at most " + shown(range.most);
    return expected;
}

template <class Value>
std::string parse_value(std::string_view text, std::vector<Value>& values, Range range) {  // 1,2,3
    values.clear();
    for (std::size_t from = 0; from <= text.size();) {
        const std::size_t comma = std::min(text.find(',', from), text.size());
        const std::string expected = parse_value(text.substr(from, comma - from), values.emplace_back(), range);
        if (!expected.empty()) return expected + ", or several separated by commas";
        from = comma + 1;
    }
    return "";
}

template <class Value>
std::string parse_value(std::string_view text, std::optional<Value>& value, Range range) {
    return parse_value(text, value.emplace(), range);
}

// Where mpirun, or another of its kind, has put this process. Asked of the environment, so that a program which is alone never
// starts MPI, and one that needs no ranks does not either.
struct Place {
    int rank = 0, processes = 1, local_rank = 0, local_processes = 1;  // local: of this machine
    Place() {
        const auto take = [](int& value, std::initializer_list<const char*> names) {  // Open MPI; MPICH and its kin; Slurm
            for (const char* name : names)
                if (const char* text = std::getenv(name); text && parse_value(text, value, Range{0}).empty()) return;
        };
        take(rank, {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"});
        take(processes, {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"});
        if (std::getenv("PMIX_RANK")) take(processes, {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"});
        take(local_rank, {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"});
        take(local_processes, {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"});
        if (processes <= 1) rank = 0;  // a name of others, which does not say how many they are
    }
};

class Args {
public:
    Args(std::string synopsis, std::string about) : synopsis_(std::move(synopsis)), about_(std::move(about)) {}

    // spec: the flag's names and what its value is called, "-n, --predict N"; without a dash it is a plain argument, "M".
    template <class Value>
    void add(const std::string& spec, Value& value, std::string help, Range range = {}) {
        Flag flag{
            {}, "", spec, std::move(help), [&value, range](std::string_view text) { return parse_value(text, value, range); }};
        for (std::size_t from = 0, end = 0; end < spec.size(); from = spec.find_first_not_of(", ", end)) {
            end = std::min(spec.find_first_of(", ", from), spec.size());
            (spec[from] == '-' ? flag.names.emplace_back() : flag.value) = spec.substr(from, end - from);
        }
        if (flag.names.empty()) flag.names = {plain};
        flags_.push_back(std::move(flag));
    }

    void parse(int argc, char** argv) {
        program_ = argc > 0 ? argv[0] : "";
        program_ = program_.substr(program_.find_last_of("/\\") + 1);
        for (int i = 1; i < argc; ++i) {
            const std::string word = argv[i];
            if (word == "-h" || word == "--help") usage();
            Flag* flag = find(word.empty() || word[0] != '-' ? plain : word);
            if (flag == nullptr) wrong(word, "no such flag", json_text(word), "one that --help lists");
            if (std::exchange(flag->given, true)) wrong(word, "given twice", json_text(word), "it once");
            if (flag->names[0] == plain) flag->names[0] = "taken";
            else if (!flag->value.empty() && ++i == argc)
                wrong(word, "its value is missing", "the end of the line", flag->value);
            const std::string expected = flag->set(argv[i]);
            if (!expected.empty()) wrong(word, "an ill-formed value", json_text(argv[i]), expected);
        }
    }

    // One line in the form of the library's errors.
    [[noreturn]] void wrong(const std::string& where, const std::string& what, const std::string& found,
                            const std::string& expected) const {
        if (Place().rank > 0) std::exit(0);  // rank 0 says it
        const std::string line = json_text(where);
        std::cerr << line.substr(1, line.size() - 2) << ": " << what << " (found " << found << ", expected " << expected
                  << "). See " << program_ << " --help.\n";
        std::exit(2);
    }

private:
    struct Flag {
        std::vector<std::string> names;
        std::string value;  // what the value is called; empty: a switch
        std::string spec, help;
        std::function<std::string(std::string_view)> set;  // returns what it expected
        bool given = false;
    };
    static constexpr const char* plain = "";  // the name of a plain argument

    Flag* find(const std::string& name) {
        for (Flag& flag : flags_)
            if (std::find(flag.names.begin(), flag.names.end(), name) != flag.names.end()) return &flag;
        return nullptr;
    }

    [[noreturn]] void usage() const {
        if (Place().rank > 0) std::exit(0);
        std::cout << "usage: " << program_ << ' ' << synopsis_ << "\n\n" << about_ << "\n\n";
        for (const Flag& flag : flags_)
            std::cout << "  " << flag.spec << std::string(flag.spec.size() < 30 ? 30 - flag.spec.size() : 1, ' ') << flag.help
                      << '\n';
        std::cout << "  -h, --help                    this text\n";
        std::exit(std::cout.flush() ? 0 : 1);
    }

    std::string synopsis_, about_, program_;
    std::vector<Flag> flags_;
};

#endif
