#!/usr/bin/env python3
"""The header in the builds of others: a matrix of compilers, standards, optimisation, OpenMP and RTTI in which every pair of two
choices occurs, libraries with hidden symbols, other processors and systems. Each cell must give the bits of the first.

    LLAMA3_PROGRAMS=build python3 tests/test_matrix.py

What is not installed (clang++, the cross compilers, qemu, Wine, ziglang) is named and left out; g++ must be there.
"""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from test_symbols import offences  # noqa: E402

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]    # for users' files

FACTORS = {
    "compiler": ("g++", "clang++"),
    "standard": ("-std=c++20", "-std=c++23"),
    "optimisation": ("-O0", "-O2", "-O3 -march=native"),
    "threads": ("-fopenmp", "-pthread"),
    "rtti": ("-frtti", "-fno-rtti"),
}
CELLS = [    # every pair of two choices of different factors is in one of them: test_every_pair_is_covered
    ("g++", "-std=c++20", "-O2", "-fopenmp", "-frtti"),
    ("g++", "-std=c++20", "-O3 -march=native", "-pthread", "-fno-rtti"),
    ("g++", "-std=c++23", "-O0", "-pthread", "-frtti"),
    ("clang++", "-std=c++20", "-O0", "-fopenmp", "-fno-rtti"),
    ("clang++", "-std=c++23", "-O2", "-pthread", "-fno-rtti"),
    ("clang++", "-std=c++23", "-O3 -march=native", "-fopenmp", "-frtti"),
]

# Windows' macros, after the standard headers that the header includes: libstdc++ takes such macros away where it meets them first.
# Two files and the implementation make a program.
MACROS = "".join(f"#include <{name}>\n" for name in (
    "algorithm", "atomic", "cstddef", "cstdint", "functional", "memory", "span", "stdexcept", "string", "string_view", "utility", "vector"))
MACROS += "#define min(a, b) (((a) < (b)) ? (a) : (b))\n#define max(a, b) (((a) > (b)) ? (a) : (b))\n"
OTHER = MACROS + """#include "llama3.hpp"
#if !defined(min) || !defined(max)
#error "the header took the macros away"
#endif
int other_file(const llama3::Model& model) {
    llama3::Options options{.threads = 2};
    const llama3::ChatOptions chat{.max_tokens = 3};
    const llama3::Sampling sampling{.temperature = 0};
    options.context = max(16, min(32, 64));
    llama3::Session session(model, options);
    const int tokens[] = {1, 2, 3};
    return static_cast<int>(session.feed(tokens).size()) + chat.max_tokens + static_cast<int>(sampling.top_k);
}
"""
USER = """#include "llama3.hpp"
#include <cstdio>
int other_file(const llama3::Model& model);
int bits();
int main() {
    llama3::Config config;
    config.n_layers = 1, config.dim = 64, config.n_heads = 2, config.n_kv_heads = 1, config.head_dim = 32, config.ffn_dim = 64;
    config.vocab_size = 266, config.context_length = 64;
    if (other_file(llama3::Model::synthetic(config, llama3::Format::q8)) != 269) return 1;
    try {
        llama3::Model::load("/nowhere");
        return 2;
    } catch (const llama3::Error& error) {
        if (error.code() != llama3::Code::file) return 3;
    }
    return bits();
}
"""

# The kernels' own tests, after a line with the instruction sets of this machine, best first.
KERNELS = """#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#include <cstdio>
using namespace llama3;
namespace d = llama3::detail;
#include "test_09_kernels.inl"
int main(int argc, char** argv) {
    for (const d::Kernels* kernels : kernels_here()) std::printf("%s ", kernels->name);
    std::printf("%s\\n", d::choose_kernels("").name);
    std::fflush(stdout);
    return doctest::Context(argc, argv).run();
}
"""


def available(cell):
    return shutil.which(cell[0]) is not None


class Folder(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        with open(os.path.join(SOURCE, "tests", "bits.cpp"), encoding="utf-8") as file:
            bits = file.read().replace("int main() {", "int bits();\nint bits() {").rstrip()
        assert bits.endswith("}")
        self.write("bits.cpp", bits[:-1] + "    return 0;\n}\n")
        self.write("other.cpp", OTHER)
        self.write("user.cpp", USER)
        self.write("macros.h", MACROS)

    def write(self, name, text):
        with open(os.path.join(self.folder, name), "w", encoding="utf-8") as file:
            file.write(text)

    def run_good(self, *command, env=None):
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=900, env={**os.environ, **(env or {})})
        self.assertEqual(done.returncode, 0, " ".join(command) + "\n" + done.stderr[-3000:])
        return done.stdout

    def silent(self, *command):
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=900)
        self.assertEqual((done.returncode, done.stderr), (0, ""), " ".join(command))

    def implementation(self, compiler, *flags, name="implementation.o"):
        """The object file of the implementation, with a look at what it calls and keeps."""
        self.run_good(*compiler, *flags, f"-I{SOURCE}", "-c", f"{SOURCE}/tests/implementation.cpp", "-o", name)

    def users(self, compiler, *flags):
        """The objects of the users' files, in which no warning is allowed."""
        for name in ("user", "other"):
            self.silent(*compiler, *flags, *STRICT, f"-I{SOURCE}", "-c", f"{name}.cpp", "-o", f"{name}.o")
        self.run_good(*compiler, *flags, f"-I{SOURCE}", "-c", "bits.cpp", "-o", "bits.o")
        return ["user.o", "other.o", "bits.o"]


expected = {}    # the output of the first cell


class Matrix(Folder):
    def same_bits(self, output, name):
        self.assertEqual(len(set(output.splitlines())), 8, "formats must not agree with each other")
        self.assertEqual(output, expected.setdefault("bits", output), name)

    def test_every_pair_is_covered(self):
        wanted = {pair for a, b in itertools.combinations(FACTORS.values(), 2) for pair in itertools.product(a, b)}
        covered = {pair for cell in CELLS for pair in itertools.combinations(cell, 2)}
        self.assertEqual(wanted - covered, set())
        self.assertTrue(wanted - {pair for cell in CELLS[1:] for pair in itertools.combinations(cell, 2)}, "the first cell is needed")

    def test_1_every_cell_builds_without_a_warning_for_users_and_gives_the_same_bits(self):
        for cell in CELLS:
            if not available(cell):
                print(f"{cell[0]} is not installed: {' '.join(cell)} did not run", file=sys.stderr)
                continue
            with self.subTest(cell=" ".join(cell)):
                compiler, *flags = " ".join(cell).split()
                flags = [flag.replace("c++23", "c++2b") for flag in flags]    # the name that clang 14 knows
                self.implementation([compiler], *flags)
                self.assertEqual(offences(os.path.join(self.folder, "implementation.o")), [])
                self.run_good(compiler, *flags, *self.users([compiler], *flags), "implementation.o", "-o", "program")
                for isa in ("", "baseline") if "-O0" not in cell else ("",):
                    self.same_bits(self.run_good("./program", env={"LLAMA3_ISA": isa}), " ".join(cell) + isa)

    def test_2_a_static_and_a_shared_library_with_hidden_symbols(self):
        flags = ["-std=c++20", "-O1", "-pthread", "-fPIC", "-fvisibility=hidden"]
        self.implementation(["g++"], *flags, "-include", f"{self.folder}/macros.h")
        self.users(["g++"], *flags)
        self.run_good("ar", "rcs", "libengine.a", "implementation.o", "other.o", "bits.o")
        self.run_good("g++", "user.o", "-L.", "-lengine", "-pthread", "-o", "program")
        self.same_bits(self.run_good("./program"), "static")

        # A plugin that keeps the whole library to itself and exports one function; two of them in one process do not meet.
        self.write("plugin.cpp", '#include "llama3.hpp"\nint bits();\nint other_file(const llama3::Model&);\n'
                   'extern "C" __attribute__((visibility("default"))) int plugin_run() { return bits(); }\n')
        self.run_good("g++", *flags, f"-I{SOURCE}", "-c", "plugin.cpp", "-o", "plugin.o")
        for name in ("one.so", "two.so"):
            self.run_good("g++", "-shared", "-fvisibility=hidden", "plugin.o", "bits.o", "implementation.o", "-pthread", "-o", name)
        # Its own names, mangled; libstdc++ says itself that its templates are seen, also those over types of the library.
        exported = [line.split()[-1] for line in self.run_good("nm", "-D", "--defined-only", "one.so").splitlines()]
        self.assertEqual([name for name in exported if not re.match(r"_Z(?:T[VIS]|GV)?Z?N?K?(?:St|9__gnu_cxx)", name)], ["plugin_run"])
        self.write("host.cpp", "#include <dlfcn.h>\n#include <initializer_list>\nint main() {\n    for (const char* name : {\"./one.so\", \"./two.so\"}) {\n"
                   "        void* plugin = dlopen(name, RTLD_NOW | RTLD_LOCAL);\n        if (!plugin) return 1;\n"
                   "        if (reinterpret_cast<int (*)()>(dlsym(plugin, \"plugin_run\"))() != 0) return 2;\n        dlclose(plugin);\n"
                   "    }\n}\n")
        self.run_good("g++", "host.cpp", "-ldl", "-o", "host")
        output = self.run_good("./host")
        self.same_bits(output[:len(output) // 2], "first plugin")
        self.same_bits(output[len(output) // 2:], "second plugin")

    def test_a_warning_in_a_users_file_would_fail_a_cell(self):
        self.write("user.cpp", USER + "int narrow(long x) { return x; }\n")
        with self.assertRaises(AssertionError):
            self.users(["g++"], "-std=c++20", "-O0")

    def test_a_wrong_bit_would_fail_a_cell(self):
        saved = dict(expected)
        expected["bits"] = "\n".join(f"f32 bf16 {i} 0" for i in range(8))
        with self.assertRaises(AssertionError):
            self.same_bits("\n".join(f"f32 bf16 {i + 1} 0" for i in range(8)), "planted")
        with self.assertRaises(AssertionError):
            self.same_bits("\n".join("f32 bf16 0 0" for _ in range(8)), "planted")
        self.same_bits(expected["bits"], "good")
        expected.clear(), expected.update(saved)


class Elsewhere(Folder):
    """Other processors and systems, as far as their tools are installed."""
    FLAGS = ["-std=c++20", "-O1"]

    def aarch64(self):
        """Its compiler and emulator, where they are installed."""
        compiler, runner = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        if not shutil.which(compiler):
            self.skipTest(f"{compiler} is not installed: aarch64 did not run")
        if not runner:
            self.skipTest("qemu-aarch64 is not installed: the programs for aarch64 did not run")
        return compiler, runner

    def test_1_aarch64_gives_the_same_bits_under_qemu(self):
        compiler, runner = self.aarch64()
        self.implementation([compiler], *self.FLAGS, "-pthread")
        self.assertEqual(offences(os.path.join(self.folder, "implementation.o")), [])
        # What only some processors have stays in the set that only they run.
        listing = self.run_good("aarch64-linux-gnu-objdump", "-d", "implementation.o")
        users = {part.split(">:", 1)[0].split("<")[-1] for part in listing.split("\n\n") if re.search(r"\bsdot\b", part)}
        self.assertTrue(users)
        self.assertEqual([name for name in users if "neon_dotprod" not in name], [])
        self.run_good(compiler, *self.users([compiler], *self.FLAGS), "implementation.o", "-static", "-pthread", "-o", "program")
        native = expected.get("bits") or self.native_bits()
        for processor in ("max", "cortex-a53"):
            self.assertEqual(self.run_good(runner, "-cpu", processor, "./program"), native, processor)

    def test_aarch64_chooses_neon_and_its_kernels_have_the_bits_of_the_reference(self):
        compiler, runner = self.aarch64()
        self.write("kernels.cpp", KERNELS)
        self.doctest_alone()
        for one in ([compiler], ["clang++", "--target=aarch64-linux-gnu"]):
            if not shutil.which(one[0]):
                print(f"{one[0]} is not installed: its kernels for aarch64 did not run", file=sys.stderr)
                continue
            self.run_good(*one, *self.FLAGS, f"-I{SOURCE}", f"-I{SOURCE}/tests", f"-I{self.folder}", "-c", "kernels.cpp", "-o", "kernels.o")
            self.run_good(compiler, "kernels.o", "-static", "-pthread", "-o", "kernels")
            for processor, sets, cases in (("max", "neon_dotprod neon baseline neon_dotprod", "*"), ("cortex-a53", "neon baseline neon", "none")):
                with self.subTest(compiler=one[0], processor=processor):
                    output = self.run_good(runner, "-cpu", processor, "./kernels", f"--test-case={cases}")
                    self.assertEqual(output.splitlines()[0], sets)

    def test_aarch64_compiles_whatever_the_compiler_takes_for_granted(self):
        compiler, _ = self.aarch64()
        for flag in ("-march=armv8-a+crypto", "-mcpu=a64fx", "-mcpu=neoverse-v1"):    # without dot products; ARMv8.2 without; with, and SVE
            self.implementation([compiler], "-std=c++20", "-O0", flag)

    def test_macos_compiles_with_clang_and_libcxx(self):
        if importlib.util.find_spec("ziglang") is None:
            self.skipTest("ziglang is not installed: macOS did not compile")
        for target in ("x86_64-macos", "aarch64-macos"):
            with self.subTest(target=target):
                compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target]
                self.implementation(compiler, "-std=c++20", "-O0")
                self.users(compiler, "-std=c++20", "-O0")

    def doctest_alone(self):
        """Its headers in this folder, without their neighbours, which are this system's."""
        self.write("includes.cpp", "#include <doctest/doctest.h>\n")
        found = re.search(r"\S+/doctest/doctest\.h", self.run_good("g++", "-M", "-std=c++20", "includes.cpp"))
        os.symlink(os.path.dirname(found[0]), os.path.join(self.folder, "doctest"))

    def native_bits(self):
        self.implementation(["g++"], *self.FLAGS, "-pthread", name="native.o")
        self.run_good("g++", *self.users(["g++"], *self.FLAGS), "native.o", "-pthread", "-o", "native")
        return self.run_good("./native")

    def test_2_windows_compiles_with_mingw_and_gives_the_same_bits_under_wine(self):
        compiler = "x86_64-w64-mingw32-g++-posix"
        if not shutil.which(compiler):
            print(f"{compiler} is not installed: Windows did not run", file=sys.stderr)
            return
        native = expected.get("bits") or self.native_bits()
        self.write("windows.cpp", '#include <windows.h>\n#include "macros.h"\n#define LLAMA3_IMPLEMENTATION\n#include "llama3.hpp"\n')
        self.run_good(compiler, *self.FLAGS, f"-I{SOURCE}", "-c", "windows.cpp", "-o", "windows.o")
        self.run_good(compiler, *self.users([compiler], *self.FLAGS), "windows.o", "-static", "-o", "program.exe")
        wine = shutil.which("wine64") or shutil.which("wine")
        if not wine:
            print("Wine is not installed: the program for Windows did not run", file=sys.stderr)
            return
        env = {"WINEDEBUG": "-all", "WINEPREFIX": os.path.join(self.folder, "wine"), "LLAMA3_SOURCE": SOURCE}
        self.assertEqual(self.run_good(wine, "program.exe", env=env).replace("\r", ""), native)

        # The suite core, without its tests of files, which need POSIX, and one that compares with std::fma, which rounds twice there.
        self.doctest_alone()
        tests = f"{SOURCE}/tests/"
        for sources in ((tests + "main.cpp", tests + "test_06_tokenizer.cpp", tests + "test_07_generation.cpp", "windows.o"),
                        (tests + "internals.cpp",)):
            self.run_good(compiler, *self.FLAGS, f"-I{self.folder}", f"-I{SOURCE}", *sources, "-static", "-o", "core.exe")
            self.assertIn("Status: SUCCESS", self.run_good(wine, "core.exe", "--test-case-exclude=fma rounds once*", env=env))


@unittest.skipUnless(shutil.which("meson"), "no meson")
class Subproject(Folder):
    def test_meson_finds_it_as_a_subproject(self):
        os.mkdir(os.path.join(self.folder, "subprojects"))
        os.symlink(SOURCE, os.path.join(self.folder, "subprojects", "llama3"))
        self.write("implementation.cpp", '#define LLAMA3_IMPLEMENTATION\n#include "llama3.hpp"\n')
        self.write("meson.build", "project('user', 'cpp', default_options: ['cpp_std=c++20', 'optimization=1'])\n"
                   "add_project_arguments('-DLLAMA3_BASELINE_ONLY', language: 'cpp')\n"
                   "executable('user', 'user.cpp', 'other.cpp', 'bits.cpp', 'implementation.cpp', dependencies: dependency('llama3', "
                   "fallback: ['llama3', 'llama3_dep']))\n")
        self.run_good("meson", "setup", "b")
        self.run_good("ninja", "-C", "b")
        self.assertEqual(len(self.run_good("b/user").splitlines()), 8)


if __name__ == "__main__":
    unittest.main(verbosity=2)
