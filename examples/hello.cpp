#define LLAMA3_IMPLEMENTATION  // in exactly one source file; elsewhere only the #include
#include "llama3.hpp"

#include <iostream>

int main(int argc, char** argv) try {
    llama3::Chat chat(llama3::Model::load(argc > 1 ? argv[1] : "examples/demo/demo.l3"));
    chat.say("Tell me a story.", [](std::string_view text) { return bool(std::cout << text << std::flush); });
    std::cout << '\n';
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
