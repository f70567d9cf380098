// The tests' main(). Each tests/test_NN_*.cpp holds the tests of one section of llama3.hpp.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
