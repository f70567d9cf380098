#!/usr/bin/env python3
"""Compiles kernels.cuh with nvcc: no warnings, no spills, and registers and shared memory within limits, on every architecture.

    python3 tests/test_nvcc.py                              all seven, and with NCCL: some ten minutes
    LLAMA3_ARCHITECTURES=80 python3 tests/test_nvcc.py      those named, one or two minutes each

It needs no GPU. Where there is no nvcc it says so and leaves everything out.
"""

import os
import re
import shutil
import subprocess
import tempfile
import unittest

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = [int(a) for a in os.environ.get("LLAMA3_ARCHITECTURES", "75 80 86 89 90 100 120").split()]

# Registers a kernel may use: what its threads per block and blocks per multiprocessor leave of 65536.
LIMITS = [  # the first that matches the name
    (r"matvec<\w+, 1,", 64),  # 512 threads, 2 blocks
    (r"matvec<(F32|Bf16)Weights, 2,", 64),
    (r"matvec<", 128),
    (r"attend_split<", 128),  # 256 threads, 2 blocks
    (r"flash_attention<", 255),  # 128 threads, 2 blocks
    (r"draw_token", 64),
    (r"join_slots<(8|16)>", 128),  # 128 threads; 8 or 16 parts of 4 columns in flight together
    (r"", 64),
]


@unittest.skipUnless(NVCC, "nvcc is not installed")
class Nvcc(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory() as folder:
            command = [NVCC, "-std=c++20", "-O3", "-x", "cu", "-c", "kernels.cuh", "-o", os.path.join(folder, "kernels.o"), "-Xptxas", "-v",
                       "--threads", str(min(len(ARCHITECTURES), os.cpu_count() or 1))]
            for a in ARCHITECTURES:
                ptx = 80 if a in (86, 89) and 80 in ARCHITECTURES else a  # nothing in the file tells these from 80
                command += ["-gencode", f"arch=compute_{ptx},code=sm_{a}"]
            done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
        cls.status, cls.messages = done.returncode, done.stdout + done.stderr
        cls.kernels = []  # (architecture, name, registers, stack, spilled bytes, static shared bytes)
        mangled, rows = [], []
        architecture = stack = spilled = None
        for line in cls.messages.splitlines():
            if m := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
                mangled.append(m[1])
                architecture = m[2]
            elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
                stack, spilled = int(m[1]), int(m[2]) + int(m[3])
            elif m := re.search(r"Used (\d+) registers", line):
                shared = re.search(r"(\d+) bytes smem", line)
                rows.append((architecture, int(m[1]), stack, spilled, int(shared[1]) if shared else 0))
        names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True).stdout.splitlines()
        for name, row in zip(names, rows):
            cls.kernels.append((row[0], re.sub(r"llama3::gpu::|^void |\(.*", "", name), *row[1:]))

    def test_it_compiles_without_warnings(self):
        expected = re.compile(r"^ptxas info|^\s*\d+ bytes stack frame|^\s*$")
        others = [line for line in self.messages.splitlines() if not expected.match(line)]
        self.assertEqual((self.status, others), (0, []))

    def test_every_architecture_has_every_kernel(self):
        by_architecture = {}
        for architecture, name, *_ in self.kernels:
            by_architecture.setdefault(architecture, []).append(name)
        self.assertEqual(sorted(by_architecture), sorted(f"sm_{a}" for a in ARCHITECTURES))
        for names in by_architecture.values():
            self.assertEqual(sorted(names), sorted(by_architecture[f"sm_{ARCHITECTURES[0]}"]))
            self.assertGreater(len(names), 80)

    def test_no_kernel_keeps_arrays_or_more_than_a_few_bytes_in_local_memory(self):
        # Where registers end at 64 a kernel may put a few bytes aside, outside its inner loop; not an array.
        bad = [k for k in self.kernels if max(k[3], k[4]) > (64 if k[1].startswith("draw_token") else 24)]  # one block for a token
        bad = [k for k in bad if not k[1].startswith("embed_rows")]  # sincosf reduces large angles in local memory
        self.assertEqual([], bad, "\n".join(map(str, bad)))

    def test_registers_are_within_the_limits(self):
        for architecture, name, registers, *_ in self.kernels:
            limit = next(n for pattern, n in LIMITS if re.search(pattern, name))
            self.assertLessEqual(registers, limit, f"{name} on {architecture}")

    def test_shared_memory_is_all_dynamic(self):
        self.assertEqual([k for k in self.kernels if k[5] > 0 and not k[0] in ("sm_90", "sm_100", "sm_120")], [])
        self.assertEqual([k for k in self.kernels if k[5] > 1024], [])  # from sm_90 on the system takes 1 KB


NCCL = [folder for folder in ("/usr/local/cuda", "/usr/local", "/usr") if os.path.exists(os.path.join(folder, "include/nccl.h"))]


@unittest.skipUnless(NVCC and NCCL, "did not run: nvcc or nccl.h is not installed")
class Nccl(unittest.TestCase):
    def test_with_nccl_it_compiles_without_warnings_and_a_program_links(self):
        cuda = os.path.dirname(os.path.dirname(os.path.realpath(NVCC)))
        libraries = [os.path.join(folder, "lib64") for folder in (cuda, *NCCL)] + [os.path.join(folder, "lib") for folder in (cuda, *NCCL)]
        with tempfile.TemporaryDirectory() as folder:
            program = os.path.join(folder, "program.cpp")
            with open(program, "w") as file:
                file.write('#define LLAMA3_IMPLEMENTATION\n#include "llama3.hpp"\nint main() { return llama3::cuda() ? 0 : 1; }\n')
            for command in (
                    [NVCC, "-std=c++20", "-O1", "-DLLAMA3_NCCL", "-arch=sm_80", "-x", "cu", "-c", "kernels.cuh", "-o", folder + "/kernels.o",
                     "-I" + NCCL[0] + "/include"],
                    ["g++", "-std=c++20", "-O1", "-I.", program, folder + "/kernels.o", "-o", folder + "/program",
                     *("-L" + l for l in libraries), "-lnccl", "-lcudart", "-lcublasLt", "-pthread"]):
                done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))


if __name__ == "__main__":
    unittest.main(verbosity=2)
