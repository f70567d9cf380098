// The fuzzing targets side by side in one file, each in a namespace of its own: they are compiled together with the library, which
// takes longer than all else, and so only once.
namespace fuzzing {

namespace model_file {
#define LLVMFuzzerTestOneInput model_file_target
#include "fuzz_model_file.cpp"
#undef LLVMFuzzerTestOneInput
}  // namespace model_file
namespace tokenizer {
#undef EXPECT
#define LLVMFuzzerTestOneInput tokenizer_target
#include "fuzz_tokenizer.cpp"
#undef LLVMFuzzerTestOneInput
}  // namespace tokenizer
namespace chat {
#undef EXPECT
#define LLVMFuzzerTestOneInput chat_target
#include "fuzz_chat.cpp"
#undef LLVMFuzzerTestOneInput
}  // namespace chat
namespace sampling {
#undef EXPECT
#define LLVMFuzzerTestOneInput sampling_target
#include "fuzz_sampling.cpp"
#undef LLVMFuzzerTestOneInput
}  // namespace sampling
#undef EXPECT

struct Target {
    const char* name;  // of its folder in tests/fuzz/corpus
    int (*run)(const std::uint8_t*, std::size_t);
};
constexpr Target targets[] = {{"model_file", model_file::model_file_target},
                              {"tokenizer", tokenizer::tokenizer_target},
                              {"chat", chat::chat_target},
                              {"sampling", sampling::sampling_target}};

}  // namespace fuzzing
