// The tests of the sections whose types exist only inside the implementation: one program, compiled together with it.
#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "test_05_reference.inl"
#include "test_08_number_formats.inl"
#include "test_09_kernels.inl"
#include "test_12_cpu_backend.inl"
#include "test_13_ranks.inl"
#if !defined(_WIN32)  // temporary files, descriptors and /proc are POSIX's
#include "test_14_model_files.inl"
#include "test_15_platform.inl"
#endif
#include "test_fuzz_corpus.inl"
