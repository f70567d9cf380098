// The inputs in tests/fuzz/corpus, each of which once found a new path through the code, run again here: the fuzzing targets
// themselves, without the fuzzer.
#include <filesystem>
#include <fstream>
#include <iterator>

#include "fuzz/targets.inl"

TEST_SUITE("core: fuzzing corpus") {
    TEST_CASE("every input that fuzzing kept is taken without a fault") {
        const char* source = std::getenv("LLAMA3_SOURCE");
        const std::filesystem::path corpus = std::filesystem::path(source ? source : ".") / "tests/fuzz/corpus";
        for (const auto& [name, target] : fuzzing::targets) {
            int inputs = 0;
            REQUIRE_MESSAGE(std::filesystem::is_directory(corpus / name), "LLAMA3_SOURCE must name the source folder");
            for (const auto& entry : std::filesystem::directory_iterator(corpus / name)) {
                std::ifstream file(entry.path(), std::ios::binary);
                const std::string bytes{std::istreambuf_iterator<char>(file), {}};
                CAPTURE(entry.path());
                CHECK(target(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()) == 0);
                ++inputs;
            }
            CHECK(inputs >= 10);
        }
    }
}
