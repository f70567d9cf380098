#!/usr/bin/env python3
"""Builds tests/bits.cpp with several compilers and flags: every build must print the same hashes and the same drawn tokens.

    LLAMA3_PROGRAMS=build python3 tests/test_bits.py

No third-party modules. The first build is Meson's. A compiler that is not installed is named and left out; g++ must be there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
BUILT = os.path.join(os.environ.get("LLAMA3_PROGRAMS", os.path.join(ROOT, "build")), "bits")    # with the flags of the programs
BUILDS = [
    ["g++", "-O3", "-march=native", "-pthread"],
    ["clang++", "-O3", "-march=native", "-pthread"],    # test_matrix.py has more, without -march
]


class Bits(unittest.TestCase):
    def test_compilers_and_flags_do_not_change_a_bit(self):
        programs = {"built": BUILT}
        outputs = {}
        with tempfile.TemporaryDirectory() as folder:
            for number, (compiler, *flags) in enumerate(BUILDS):
                if not shutil.which(compiler):
                    print(f"{compiler} is not installed: its builds did not run", file=sys.stderr)
                    continue
                program = programs[" ".join([compiler, *flags])] = os.path.join(folder, f"bits{number}")
                subprocess.run([compiler, "-std=c++20", *flags, "-I", ROOT, os.path.join(ROOT, "tests/bits.cpp"),
                                os.path.join(ROOT, "tests/implementation.cpp"), "-o", program], check=True)
            for name, program in programs.items():
                for isa in ("", "baseline"):
                    done = subprocess.run([program], capture_output=True, text=True, check=True, env={**os.environ, "LLAMA3_ISA": isa})
                    outputs[f"{name} {isa}"] = done.stdout
        expected = outputs["built "]
        self.assertEqual(len(expected.splitlines()), 8)
        self.assertEqual(len(set(expected.splitlines())), 8, "formats must not agree with each other")
        for build, found in outputs.items():
            self.assertEqual(found, expected, build)


if __name__ == "__main__":
    unittest.main(verbosity=2)
