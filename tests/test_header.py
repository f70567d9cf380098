#!/usr/bin/env python3
"""llama3.hpp as a file and as something that other projects build: contents, warnings, linking, installing.

    LLAMA3_PROGRAMS=build python3 tests/test_header.py
"""

import os
import re
import shutil
import subprocess
import tempfile
import unittest

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = os.environ.get("LLAMA3_PROGRAMS", os.path.join(SOURCE, "build"))
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
BASELINE = "-DLLAMA3_BASELINE_ONLY"  # where it is not about kernels: half the time


class Folder(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def build(self, *command):
        """Status and messages of a compiler."""
        done = subprocess.run([*command, f"-I{SOURCE}"], cwd=self.folder, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr

    def good(self, *command):
        status, messages = self.build(*command)
        self.assertEqual((status, messages), (0, ""), " ".join(command))


class Contents(unittest.TestCase):
    def setUp(self):
        with open(os.path.join(SOURCE, "llama3.hpp"), encoding="utf-8") as file:
            self.front, self.code = file.read().split("#ifndef LLAMA3_HPP", 1)

    def test_every_entry_of_the_contents_is_a_banner_in_the_code_and_the_other_way_round(self):
        entries = re.findall(r"^//\s+(§\d+)\s+(\S.*?)\s{2,}\S", self.front, re.M)
        banners = re.findall(r"^// ═══ (§\d+)\s+(\S.*?) ═+$", self.code, re.M)
        self.assertEqual(entries, banners)
        self.assertEqual([number for number, _ in entries], [f"§{i}" for i in range(1, 16)])

    def test_parts_too(self):
        entries = re.findall(r"^//\s+(Part [IV]+)\s+(\S.*)$", self.front, re.M)
        banners = re.findall(r"^// ═══ (Part [IV]+): (\S.*?) ═+$", self.code, re.M)
        self.assertEqual(entries, banners)
        self.assertEqual(len(entries), 4)

    def test_the_contents_of_kernels_cuh_are_its_banners(self):
        with open(os.path.join(SOURCE, "kernels.cuh"), encoding="utf-8") as file:
            front, code = file.read().split("#ifndef LLAMA3_KERNELS_CUH", 1)
        entries = re.findall(r"^//\s+(K\d+)\s+(\S.*?)\s{2,}\S", front, re.M)
        self.assertEqual(entries, re.findall(r"^// ═══ (K\d+)\s+(\S.*?) ═+$", code, re.M))
        self.assertEqual([number for number, _ in entries], [f"K{i}" for i in range(1, 15)])

    def test_the_version_is_the_same_everywhere(self):
        version = re.search(r'#define LLAMA3_VERSION "(.*)"', self.code)[1]
        parts = [re.search(rf"#define LLAMA3_VERSION_{part} (\d+)", self.code)[1] for part in ("MAJOR", "MINOR", "PATCH")]
        self.assertEqual(version, ".".join(parts))
        with open(os.path.join(SOURCE, "meson.build"), encoding="utf-8") as file:
            self.assertIn(f"version: '{version}'", file.read())


class UsersFiles(Folder):
    def test_the_api_alone_gives_no_warning(self):
        path = self.write("api.cpp", '#include "llama3.hpp"\n#include "llama3.hpp"\n')
        for compiler in COMPILERS:
            for standard in ("-std=c++20", "-std=c++2b"):
                self.good(compiler, standard, *STRICT, "-fsyntax-only", path)

    def test_macros_named_min_and_max_do_no_harm(self):
        """Whatever was included before: a standard library may take the macros away, or stumble over them in its next header."""
        macros = "#define min(a, b) ((a) < (b) ? (a) : (b))\n#define max(a, b) ((a) > (b) ? (a) : (b))\n"
        last = "\nint smaller(int a, int b) { return min(a, b); }\n"
        for before in ("cstdint", "string", "cmath"):
            for implementation in ("", "#define LLAMA3_IMPLEMENTATION\n") if before == "cstdint" else ("",):
                path = self.write("macros.cpp", f'#include <{before}>\n{macros}{implementation}#include "llama3.hpp"{last}')
                for compiler in COMPILERS:
                    self.good(compiler, "-std=c++20", BASELINE, "-fsyntax-only", path)

    def test_fast_math_is_refused_where_the_code_is_compiled_and_only_there(self):
        implementation = self.write("implementation.cpp", '#define LLAMA3_IMPLEMENTATION\n#include "llama3.hpp"\n')
        user = self.write("user.cpp", '#include "llama3.hpp"\n')
        for compiler in COMPILERS:
            status, messages = self.build(compiler, "-std=c++20", BASELINE, "-ffast-math", "-fsyntax-only", "-Wfatal-errors", implementation)
            self.assertNotEqual(status, 0)
            self.assertIn("-ffast-math", messages)
            self.good(compiler, "-std=c++20", "-ffast-math", "-fsyntax-only", user)

    def test_the_code_gives_no_warning_under_wall_and_wextra(self):
        path = self.write("implementation.cpp", '#define LLAMA3_IMPLEMENTATION\n#include "llama3.hpp"\n')
        for compiler in COMPILERS:
            self.good(compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", path)

    def test_it_can_be_included_by_a_relative_path_from_another_folder(self):
        for name in ("source", "third_party"):
            os.mkdir(os.path.join(self.folder, name))
        shutil.copy(os.path.join(SOURCE, "llama3.hpp"), os.path.join(self.folder, "third_party"))
        self.write("source/user.cpp", '#define LLAMA3_IMPLEMENTATION\n#include "../third_party/llama3.hpp"\n')
        for compiler in COMPILERS:
            done = subprocess.run([compiler, "-std=c++20", BASELINE, "-fsyntax-only", "source/user.cpp"], cwd=self.folder, capture_output=True,
                                  text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_two_files_and_the_implementation_link(self):
        one = self.write("one.cpp", '#include "llama3.hpp"\nconst char* name() { return llama3::format_name(llama3::Format::q8); }\n')
        two = self.write("two.cpp", '#include "llama3.hpp"\n#include <cstdio>\nconst char* name();\n'
                         'int main() { std::puts(name()); return llama3::format_from_name("q4") == llama3::Format::q4 ? 0 : 1; }\n')
        self.good("g++", "-std=c++20", BASELINE, "-c", os.path.join(SOURCE, "tests", "implementation.cpp"))
        self.good("g++", "-std=c++20", *STRICT, one, two, "implementation.o", "-pthread", "-o", "a.out")
        self.assertEqual(subprocess.run(["./a.out"], cwd=self.folder, capture_output=True).stdout, b"q8\n")


@unittest.skipUnless(shutil.which("meson") and os.path.exists(os.path.join(PROGRAMS, "build.ninja")), "no Meson build")
class Install(Folder):
    USER = '#define LLAMA3_IMPLEMENTATION\n#include <llama3.hpp>\nint main() { return llama3::format_name(llama3::Format::f32)[0] != \'f\'; }\n'

    def setUp(self):
        super().setUp()
        subprocess.run(["meson", "install", "-C", PROGRAMS, "--no-rebuild", "--quiet", "--destdir", self.folder], check=True,
                       stdout=subprocess.DEVNULL)
        self.prefix = next(path for path, folders, _ in os.walk(self.folder) if "include" in folders)

    def test_programs_have_a_prefix(self):
        for name in ("chat", "generate", "tokenize", "perplexity", "bench", "inspect"):
            done = subprocess.run([os.path.join(self.prefix, "bin", "llama3-" + name), "--help"], capture_output=True)
            self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_the_demo_model_is_looked_for_beside_the_program_then_under_the_prefix_then_in_the_source_tree(self):
        """In each place but the last a file that is no model: the one that is complained about is the one that was taken."""
        program = os.path.join(self.prefix, "bin", "llama3-generate")
        beside = os.path.join(self.prefix, "bin", "demo.l3")
        installed = os.path.join(self.prefix, "share", "llama3", "demo.l3")

        def run():
            done = subprocess.run([program, "-p", "a", "-n", "4"], capture_output=True, text=True, cwd="/")
            return done.returncode, done.stdout, done.stderr

        good = run()
        self.assertEqual((good[0], good[2]), (0, ""))
        self.assertTrue(good[1].strip())
        shutil.copy(installed, beside)
        for path in (beside, installed):
            with open(path, "wb") as file:
                file.write(b"not a model" * 100)
            status, out, errors = run()
            self.assertEqual((status, out), (1, ""))
            self.assertTrue(errors.startswith(path + ": "), errors)
            os.remove(path)
        self.assertEqual(run(), good)    # that of the source tree, from which the installed one was copied

    def test_the_installed_demo_model_is_that_of_the_source_tree(self):
        with open(os.path.join(self.prefix, "share", "llama3", "demo.l3"), "rb") as one, \
                open(os.path.join(SOURCE, "examples", "demo", "demo.l3"), "rb") as other:
            self.assertEqual(one.read(), other.read())

    def test_plain_gpp_finds_it_under_the_prefix(self):
        path = self.write("user.cpp", self.USER)
        done = subprocess.run(["g++", "-std=c++20", "-O0", BASELINE, "-isystem", os.path.join(self.prefix, "include"), path, "-pthread", "-o", "user"],
                              cwd=self.folder, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(subprocess.run(["./user"], cwd=self.folder).returncode, 0)

    @unittest.skipUnless(shutil.which("pkg-config"), "no pkg-config")
    def test_pkg_config_finds_it(self):
        env = dict(os.environ, PKG_CONFIG_PATH=os.path.join(self.prefix, "share", "pkgconfig"), PKG_CONFIG_SYSROOT_DIR=self.folder)
        flags = subprocess.run(["pkg-config", "--cflags", "--libs", "llama3"], env=env, capture_output=True, text=True, check=True).stdout.split()
        self.assertIn("-pthread", flags)
        path = self.write("user.cpp", self.USER)
        done = subprocess.run(["g++", "-std=c++20", "-O0", BASELINE, path, *flags, "-o", "user"], cwd=self.folder, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(subprocess.run(["./user"], cwd=self.folder).returncode, 0)

    @unittest.skipUnless(shutil.which("cmake"), "no CMake")
    def test_cmake_finds_it(self):
        self.write("user.cpp", self.USER)
        self.write("CMakeLists.txt", "cmake_minimum_required(VERSION 3.16)\nproject(user CXX)\nfind_package(llama3 0.1 REQUIRED)\n"
                   "add_executable(user user.cpp)\ntarget_link_libraries(user llama3::llama3)\n")
        for command in (["cmake", "-S", ".", "-B", "b", f"-DCMAKE_PREFIX_PATH={self.prefix}"], ["cmake", "--build", "b"]):
            done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(subprocess.run(["b/user"], cwd=self.folder).returncode, 0)
        self.write("CMakeLists.txt", "cmake_minimum_required(VERSION 3.16)\nproject(user CXX)\nfind_package(llama3 9.0 REQUIRED)\n")
        done = subprocess.run(["cmake", "-S", ".", "-B", "c", f"-DCMAKE_PREFIX_PATH={self.prefix}"], cwd=self.folder, capture_output=True)
        self.assertNotEqual(done.returncode, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
