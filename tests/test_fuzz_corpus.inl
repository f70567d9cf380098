// The inputs in tests/fuzz/corpus, each of which once found a new path through the code, run again here: the fuzzing targets
// themselves, without the fuzzer.
#include <filesystem>
#include <fstream>
#include <iterator>

namespace replay {
namespace model_file {
#define LLVMFuzzerTestOneInput replay_model_file
#include "fuzz/fuzz_model_file.cpp"
#undef LLVMFuzzerTestOneInput
}  // namespace model_file
namespace tokenizer {
#undef EXPECT
#define LLVMFuzzerTestOneInput replay_tokenizer
#include "fuzz/fuzz_tokenizer.cpp"
#undef LLVMFuzzerTestOneInput
}  // namespace tokenizer
namespace chat {
#undef EXPECT
#define LLVMFuzzerTestOneInput replay_chat
#include "fuzz/fuzz_chat.cpp"
#undef LLVMFuzzerTestOneInput
}  // namespace chat
namespace sampling {
#undef EXPECT
#define LLVMFuzzerTestOneInput replay_sampling
#include "fuzz/fuzz_sampling.cpp"
#undef LLVMFuzzerTestOneInput
}  // namespace sampling
#undef EXPECT
}  // namespace replay

TEST_SUITE("core: fuzzing corpus") {
    TEST_CASE("every input that fuzzing kept is taken without a fault") {
        const char* source = std::getenv("LLAMA3_SOURCE");
        const std::filesystem::path corpus = std::filesystem::path(source ? source : ".") / "tests/fuzz/corpus";
        const std::pair<const char*, int (*)(const std::uint8_t*, std::size_t)> targets[] = {
            {"model_file", replay::model_file::replay_model_file},
            {"tokenizer", replay::tokenizer::replay_tokenizer},
            {"chat", replay::chat::replay_chat},
            {"sampling", replay::sampling::replay_sampling}};
        for (const auto& [name, target] : targets) {
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
