// All fuzzing targets in one program; the name that it is called by chooses among them.
//
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz/fuzz.cpp -o fuzz_chat
//     ./fuzz_chat tests/fuzz/corpus/chat
//
// fuzz_planted has a fault behind a comparison that only a fuzzer that follows the branches gets through: it must be found.
#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"

#include "targets.inl"

namespace {

int planted(const std::uint8_t* data, std::size_t size) {
    const std::vector<std::uint8_t> copy(data, data + size);
    const bool opened = size >= 3 && copy[0] == 'l' && copy[1] == '3' && copy[2] == '!';
    return opened && copy.data()[size] != 0 ? -1 : 0;  // one byte too far
}

int (*target)(const std::uint8_t*, std::size_t);

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char*** arguments) {
    const std::string_view program = **arguments;
    for (const auto& [name, run] : fuzzing::targets)
        if (program.ends_with(name)) target = run;
    if (program.ends_with("planted")) target = planted;
    if (!target) std::fprintf(stderr, "%s: the program's name is no target's\n", **arguments), std::exit(2);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) { return target(data, size); }
