#!/usr/bin/env python3
"""What the README promises on its first screen: the 12-line program with its one command, and the quick start.

    LLAMA3_PROGRAMS=build python3 tests/test_readme.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import unittest

from test_programs import DEMO, PROGRAMS, SOURCE, OnTerminal, output


class Readme(unittest.TestCase):
    def setUp(self):
        with open(os.path.join(SOURCE, "README.md"), encoding="utf-8") as file:
            self.readme = file.read()
        with open(os.path.join(SOURCE, "BENCHMARKS.md"), encoding="utf-8") as file:
            self.benchmarks = file.read()
        with open(os.path.join(SOURCE, "examples", "hello.cpp"), encoding="utf-8") as file:
            self.hello = file.read()

    def test_its_program_is_hello_cpp_word_for_word(self):
        self.assertIn("```cpp\n" + self.hello + "```", self.readme)
        self.assertLessEqual(self.hello.count("\n"), 25)

    def test_the_header_begins_with_the_same_program(self):
        with open(os.path.join(SOURCE, "llama3.hpp"), encoding="utf-8") as file:
            front = "".join(line[2:].removeprefix("     ") for line in file.read().split("#ifndef", 1)[0].splitlines(True))
        self.assertIn(self.hello, front)

    def test_the_table_of_several_gpus_follows_from_its_formula(self):
        published = {2: ((4, 3.9), (32, 4.5), (256, 7.9)), 4: ((4, 3.7), (32, 4.8), (256, 13.9)), 8: ((4, 5.7), (32, 7.8), (256, 16.7))}

        def latency(ranks, size):  # µs, of a sum of so many bytes
            points = published[ranks]
            (left, low), (right, high) = points[:2] if size <= 32 * 1024 else points[1:]
            return low + (size / 1024 - left) / (right - left) * (high - low)

        rows = re.findall(r"^\| (\d+)B (q\d) \|(.*)\|$", self.benchmarks, re.M)
        self.assertEqual(len(rows), 6)
        for size, kind, figures in rows:
            plan = json.loads(output("inspect", "--synthetic", size + "b", "--type", kind, "--json"))
            layers, dim, vocab = (plan["configuration"][key] for key in ("layers", "dim", "vocab_size"))
            self.assertIn(f"{8 * layers * (dim + 1) / 1e6:.1f} MB", self.readme)
            table = vocab // 16 * (dim // 64) * 1088  # the embedding, of which a token reads one row
            for on, figure in zip(plan["cards"], figures.split("|")):
                ranks = on["ranks"]
                seconds = (on["weights_bytes"] - table) / (0.85 * 3.35e12) + (5 * layers + 3) * 2e-6
                seconds += 2 * layers * latency(ranks, 4 * (dim + 1)) * 1e-6 if ranks > 1 else 0
                self.assertEqual(figure.strip(), f"{1 / seconds:.0f}" if on["fits_gb"]["80"] else "", (size, kind, ranks))

    def test_its_program_builds_with_its_one_command_and_tells_a_story(self):
        command = re.search(r"^g\+\+ .*program\.cpp.*$", self.readme, re.M)[0]
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "program.cpp"), "w", encoding="utf-8") as file:
                file.write(re.search(r"```cpp\n(.*?)```", self.readme, re.S)[1])
            shutil.copy(os.path.join(SOURCE, "llama3.hpp"), folder)
            subprocess.run(command, shell=True, check=True, cwd=folder, timeout=300)
            program = os.path.join(folder, "a.out")
            done = subprocess.run([program], cwd=SOURCE, capture_output=True, timeout=60)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertGreater(len(done.stdout), 20)
            done = subprocess.run([program, "no/such.l3"], capture_output=True, timeout=60)
            self.assertEqual(done.returncode, 1)
            self.assertIn(b"no/such.l3", done.stderr)

    def test_its_longer_example_compiles_without_warnings(self):
        example = re.findall(r"```cpp\n(.*?)```", self.readme, re.S)[1]
        program = "#include \"llama3.hpp\"\n#include <iostream>\nint main() {\n" + example + "}\n"
        done = subprocess.run([os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I" + SOURCE,
                               "-x", "c++", "-"], input=program.encode(), capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_hello_is_built_with_the_other_programs(self):
        done = subprocess.run([os.path.join(PROGRAMS, "hello")], cwd=SOURCE, capture_output=True, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertEqual(done.stdout, output("chat", "-m", DEMO, "-p", "Tell me a story."))


class Quickstart(OnTerminal):
    SCRIPT = os.path.join(SOURCE, "examples", "quickstart.sh")

    def test_it_builds_chat_and_answers_a_pipe(self):
        done = subprocess.run(["sh", self.SCRIPT], input=b"Hello\n", capture_output=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertGreater(len(done.stdout.strip()), 0)

    def test_what_is_built_without_mpi_says_so_once_under_mpirun(self):
        subprocess.run(["sh", self.SCRIPT, "--help"], capture_output=True, check=True, timeout=300)  # builds chat
        for rank in "01":
            done = subprocess.run(["sh", self.SCRIPT], input=b"Hello\n", capture_output=True, timeout=60,
                                  env=dict(os.environ, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK=rank))
            self.assertEqual((done.returncode, done.stdout, done.stderr.count(b"without MPI")), (1, b"", int(rank == "0")))

    def test_on_a_terminal_it_answers_ctrl_c_stops_an_answer_and_ctrl_d_ends(self):
        subprocess.run(["sh", self.SCRIPT, "--help"], capture_output=True, check=True, timeout=300)  # builds chat
        terminal, _, _ = self.terminal_with_a_stopped_answer(shutil.which("sh"), self.SCRIPT)
        terminal.type(b"Hello\n")
        self.assertTrue(os.read(terminal.process.stdout.fileno(), 1))
        terminal.wait_for_prompt()
        terminal.type(b"\x04")
        self.assertEqual(terminal.end()[0], 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    unittest.main(verbosity=2)
