#!/usr/bin/env python3
"""The logits of tiny checkpoints, converted by convert.py and run by `generate`, against those of Hugging Face transformers.

    LLAMA3_PROGRAMS=build LLAMA3_TEST_DATA=build/data python3 tests/test_golden.py

golden/golden.json says how the expected rows were made. Needs numpy. Error: max|difference| / max|logit|.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import unittest

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "golden")
sys.path.insert(0, GOLDEN)
import checkpoints  # noqa: E402

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
        if kind == "f32":  # the long sequence has a tolerance of its own, but not for its first positions
            self.assertLess(np.abs(found - expected)[rows <= 300].max() / np.abs(expected).max(), 1e-4, name)
        # The most likely token is the same wherever the expected margin is larger than what the tolerance allows.
        top = np.sort(expected, axis=1)
        clear = top[:, -1] - top[:, -2] > entry["tolerance"] * np.abs(expected).max()
        self.assertTrue(clear.any())
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

    def test_planted_mutants_miss_by_at_least_20_tolerances(self):
        """Each mutant is a change of the file that has the effect of the bug: run through the whole runtime, it must be seen."""
        mutants = [("gqa2_e16_tied_f32", "factor 8 for 32", set_factor(8)), ("gqa3_e128_f32", "factor 8 for 32", set_factor(8)),
                   ("gqa4_e64_tied_f32", "no scaling", set_factor(1)), ("gqa8_e128_f8", "no scaling", set_factor(1)),
                   ("gqa1_e8", "half-split RoPE", half_split), ("segments8", "half-split RoPE", half_split),
                   ("segments8", "tiled KV heads", tile_heads), ("gqa3_e128_f32", "tiled KV heads", tile_heads),
                   ("gqa2_e16_tied_f32", "eps left out, as outside the root it nearly is", set_eps(1e-30))]
        for name, what, change in mutants:
            with self.subTest(model=name, mutant=what), tempfile.TemporaryDirectory() as folder:
                mutant = os.path.join(folder, "mutant.l3")
                with open(os.path.join(DATA, f"{name}.f32.l3"), "rb") as f:
                    file = bytearray(f.read())
                change(file, MODELS[name]["parameters"])
                seal(file)
                with open(mutant, "wb") as f:
                    f.write(file)
                rows, entry = golden(MODELS[name]["rows"]), MODELS[name]["logits"]["f32"]
                found = run_logits(mutant, golden(MODELS[name]["tokens"]))[rows]
                miss = error(found, golden(entry["file"]))
                print(f"{name}, {what}: {miss:.2e}", file=sys.stderr)
                self.assertGreater(miss, 20 * entry["tolerance"])


# What follows edits a file in place; offsets are those of convert/FORMAT.md.

def blake2b_64(data):
    return hashlib.blake2b(data, digest_size=8).digest()


def seal(file):
    """Makes the checksums of header and configuration right again; those of tensors are checked on request only."""
    offset, size = struct.unpack_from("<QQ", file, 24)
    file[40:48] = blake2b_64(file[offset:offset + size])
    file[120:128] = blake2b_64(file[:120])


def set_float(at, value):
    def change(file, parameters):
        struct.pack_into("<f", file, struct.unpack_from("<Q", file, 24)[0] + at, value)
    return change


def set_factor(factor):
    def change(file, parameters):
        start = struct.unpack_from("<Q", file, 24)[0]
        struct.pack_into("<f", file, start + 40, factor)
        if factor == 1:
            struct.pack_into("<ffI", file, start + 44, 1, 1, 0)
    return change


def set_eps(eps):
    return set_float(32, eps)


def rows_of(file, wanted):
    """The tensors whose names end in one of `wanted`, as writable arrays [panels, columns, 16] of f32 panels."""
    table = struct.unpack_from("<Q", file, 72)[0]
    for i in range(struct.unpack_from("<I", file, table)[0]):
        entry = table + 8 + 96 * i
        name = file[entry:entry + 40].rstrip(b"\0").decode()
        rows, columns, offset, size = struct.unpack_from("<QQQQ", file, entry + 48)
        if name.split(".")[-1] in wanted:
            yield rows, np.frombuffer(file, np.float32, size // 4, offset).reshape(-1, columns, 16)


def permute(file, wanted, order_of):
    for rows, panels in rows_of(file, wanted):
        matrix = panels.transpose(0, 2, 1).reshape(-1, panels.shape[1]).copy()
        matrix[:rows] = matrix[:rows][order_of(rows)]
        panels[:] = matrix.reshape(-1, 16, panels.shape[1]).transpose(0, 2, 1)


def half_split(file, parameters):
    """Rows of query and key in Hugging Face's order: pairs are then (i, i + E/2)."""
    e = parameters["head_dim"]
    order = np.arange(e).reshape(e // 2, 2).T.ravel()
    permute(file, ("query", "key"), lambda rows: (np.arange(rows // e)[:, None] * e + order).ravel())


def tile_heads(file, parameters):
    """Query head h reads key/value head h mod K instead of h // (H/K): the heads trade places, in W_q's rows and W_o's columns."""
    h, k, e = parameters["heads"], parameters["kv_heads"], parameters["head_dim"]
    heads = np.arange(h).reshape(h // k, k).T.ravel()
    order = (heads[:, None] * e + np.arange(e)).ravel()
    permute(file, ("query",), lambda rows: order)
    for _, panels in rows_of(file, ("attention_out",)):
        panels[:] = panels[:, order].copy()


def make_data(folder):
    """The .l3 files of all models and types: what the build makes beforehand in LLAMA3_TEST_DATA. Those of q8 and q4 are made
    from the weights that transformers ran, multiples of gguf's scales, which the converter keeps exactly."""
    subprocess.run([sys.executable, os.path.join(GOLDEN, "checkpoints.py"), folder], check=True, stdout=subprocess.DEVNULL)
    for name, entry in MODELS.items():
        for kind in entry["logits"]:
            source = os.path.join(folder, name)
            if kind in ("q8", "q4"):
                source += "-" + kind
                model = checkpoints.BY_NAME[name]
                checkpoints.write_hf(source, model, dtype="float32", tensors=checkpoints.dequantised(model, kind))
            subprocess.run([sys.executable, CONVERT, source, "-o", os.path.join(folder, f"{name}.{kind}.l3"), "--type", kind],
                           check=True, capture_output=True)


if __name__ == "__main__":
    if DATA:
        unittest.main(verbosity=2)
    with tempfile.TemporaryDirectory() as DATA:
        make_data(DATA)
        unittest.main(verbosity=2)
