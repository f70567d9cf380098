#!/usr/bin/env python3
"""The logits of tiny checkpoints, converted by convert.py and run by `generate`, against those of Hugging Face transformers.

    LLAMA3_PROGRAMS=build LLAMA3_TEST_DATA=build/data python3 tests/test_golden.py

golden/golden.json says how the expected rows were made. Needs numpy. Error: max|difference| / max|logit|.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "golden")
CONVERT = os.path.join(HERE, "..", "convert", "convert.py")
PROGRAMS = os.environ.get("LLAMA3_PROGRAMS", os.path.join(HERE, "..", "build"))
DATA = os.environ.get("LLAMA3_TEST_DATA", "")
MANIFEST = json.load(open(os.path.join(GOLDEN, "golden.json")))
MODELS = MANIFEST["models"]


def golden(name):
    return np.load(os.path.join(GOLDEN, name))


def run_logits(model_file, tokens, *flags):
    """All rows of logits that `generate` computes for the tokens, [T, V]."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "logits.npy")
        command = [os.path.join(PROGRAMS, "generate"), "-m", model_file, "--tokens", ",".join(map(str, tokens)), "-n", "0",
                   "-c", str(len(tokens) + 1), "--kv", "f32", "--logits", out, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(" ".join(command[:3]) + ": " + done.stderr)
        return np.load(out)


def error(found, expected):
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


class Golden(unittest.TestCase):
    def check(self, name, kind):
        entry = MODELS[name]["logits"][kind]
        tokens, rows = golden(MODELS[name]["tokens"]), golden(MODELS[name]["rows"])
        expected = golden(entry["file"])
        found = run_logits(os.path.join(DATA, f"{name}.{kind}.l3"), tokens)
        self.assertEqual(found.shape, (len(tokens), expected.shape[1]))
        found = found[rows]
        self.assertLess(error(found, expected), entry["tolerance"], f"{name} {kind}")
        # The most likely token is the same wherever the expected margin is larger than twice what the tolerance allows.
        top = np.sort(expected, axis=1)
        clear = top[:, -1] - top[:, -2] > 2 * entry["tolerance"] * np.abs(expected).max()
        self.assertTrue((found.argmax(1) == expected.argmax(1))[clear].all(), f"{name} {kind}: top-1 differs")
        return error(found, expected)

    def check_all(self, kind):
        names = [name for name in MODELS if kind in MODELS[name]["logits"] and not (name.startswith("long") and kind != "f32")]
        self.assertGreaterEqual(len(names), 10 if kind in ("f32", "bf16") else 3)
        for name in names:
            with self.subTest(model=name):
                print(f"{name} {kind}: {self.check(name, kind):.2e}", file=sys.stderr)

    def test_f32_logits_are_those_of_transformers_also_at_position_8447(self):
        self.check_all("f32")

    def test_bf16_logits_are_those_of_transformers(self):
        self.check_all("bf16")

    def test_q8_logits_are_those_of_transformers_on_weights_dequantised_by_gguf(self):
        self.check_all("q8")

    def test_q4_logits_are_those_of_transformers_on_weights_dequantised_by_gguf(self):
        self.check_all("q4")

    def test_a_wrong_rope_factor_would_be_seen(self):
        """Mutants of this runtime: the same checkpoint converted with another factor misses by at least 20 tolerances."""
        for name, factor in (("gqa2_e16_tied_f32", "8"), ("gqa3_e128_f32", "8"), ("gqa4_e64_tied_f32", "1"), ("gqa8_e128_f8", "1")):
            with self.subTest(model=name, factor=factor), tempfile.TemporaryDirectory() as folder:
                mutant = os.path.join(folder, "mutant.l3")
                done = subprocess.run([sys.executable, CONVERT, os.path.join(DATA, f"{name}.f32.l3"), "-o", mutant, "--type", "f32",
                                       "--rope-factor", factor], capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stderr)
                rows, entry = golden(MODELS[name]["rows"]), MODELS[name]["logits"]["f32"]
                found = run_logits(mutant, golden(MODELS[name]["tokens"]))[rows]
                self.assertGreater(error(found, golden(entry["file"])), 20 * entry["tolerance"])

    def test_the_other_planted_mutants_were_seen_when_the_data_was_made(self):
        for mutant in ("half_split_rope", "tiled_kv_heads", "eps_outside_root", "rope_factor_8_for_32", "no_rope_scaling"):
            best = max(entry["mutants"].get(mutant, 0) / entry["logits"]["f32"]["tolerance"] for entry in MODELS.values())
            self.assertGreater(best, 20, mutant)


def make_data(folder):
    """The .l3 files of all models and types: what the build makes beforehand in LLAMA3_TEST_DATA."""
    subprocess.run([sys.executable, os.path.join(GOLDEN, "checkpoints.py"), folder], check=True, stdout=subprocess.DEVNULL)
    for name, entry in MODELS.items():
        for kind in entry["logits"]:
            subprocess.run([sys.executable, CONVERT, os.path.join(folder, name), "-o", os.path.join(folder, f"{name}.{kind}.l3"),
                            "--type", kind], check=True, capture_output=True)


if __name__ == "__main__":
    if DATA:
        unittest.main()
    with tempfile.TemporaryDirectory() as DATA:
        make_data(DATA)
        unittest.main()
