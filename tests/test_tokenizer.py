#!/usr/bin/env python3
"""The ids of the program `tokenize` against tiktoken with the published pattern and ranks, on some 29,000 strings.

    LLAMA3_PROGRAMS=build LLAMA3_TOKENIZER_MODEL=tokenizer.model python3 tests/test_tokenizer.py

The real tokenizer.model is not part of this project. Without it the check does not run, and says so. Needs tiktoken, numpy.
"""

import os
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
TOKENIZER_MODEL = os.environ.get("LLAMA3_TOKENIZER_MODEL", "")
PROGRAMS = os.environ.get("LLAMA3_PROGRAMS", os.path.join(HERE, "..", "build"))


def run(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


@unittest.skipUnless(TOKENIZER_MODEL, "LLAMA3_TOKENIZER_MODEL is not set: the check against tiktoken did not run")
class PublishedTokenizer(unittest.TestCase):
    def test_ids_are_those_of_tiktoken(self):
        with tempfile.TemporaryDirectory() as folder:
            model = os.path.join(folder, "model.l3")
            run(os.path.join(HERE, "golden", "checkpoints.py"), folder, "--only", "gqa2_e16_tied_f32", "--as", "meta", "--tokenizer", TOKENIZER_MODEL)
            run(os.path.join(HERE, "..", "convert", "convert.py"), os.path.join(folder, "gqa2_e16_tied_f32"), "-o", model, "--chat", "llama3.1")
            said = run(os.path.join(HERE, "golden", "make_tokenizer_golden.py"), "--check", os.path.join(PROGRAMS, "tokenize"), model,
                       "--tokenizer", TOKENIZER_MODEL)
            print(said.strip(), file=sys.stderr)
            self.assertRegex(said, r"(?m)^2\d,?\d{3} strings, .* equal to tiktoken")


if __name__ == "__main__":
    unittest.main(verbosity=2)
