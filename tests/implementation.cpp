// The one source file that compiles the library's code; every program and test links with it.
#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"
