#!/usr/bin/env python3
"""Tests of convert/convert.py: python3 tests/test_convert.py [-k WORD]

Needs numpy, gguf and safetensors, no torch. Checkpoints come from golden/checkpoints.py; files are read back by a reader of its
own, written from FORMAT.md alone. The checks against the real tokenizer run where LLAMA3_TOKENIZER_MODEL names it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import unittest
import warnings
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import safetensors.numpy

HERE = Path(__file__).resolve().parent
CONVERT = HERE.parent / "convert" / "convert.py"
sys.path[:0] = [str(CONVERT.parent), str(HERE / "golden")]
sys.dont_write_bytecode = True

import checkpoints  # noqa: E402
import convert  # noqa: E402

TOKENIZER_MODEL = os.environ.get("LLAMA3_TOKENIZER_MODEL", "")
ALL_TYPES = ("f32", "bf16", "q8", "q4")

# Every error, on one line: where: what is wrong (found X, expected Y). What to do.
ERROR = r"^convert: .+: .+ \(found .+, expected .+\)\. .+\.$"

# ═══ A reader of .l3 files from FORMAT.md, in plain loops where that makes it easier to believe ══════════════════════════════


def blake(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class L3:
    def __init__(self, path):
        self.data = data = Path(path).read_bytes()
        assert data[:8] == b"\x89llama3\n" and struct.unpack_from("<2IQ", data, 8) == (1, 0, len(data))
        assert struct.unpack_from("<Q", data, 120)[0] == blake(data[:120])
        self.sections, place = [], 128
        for at in (24, 48, 72, 96):
            offset, count, digest = struct.unpack_from("<3Q", data, at)
            assert offset % 8 == 0 and offset >= place and blake(data[offset:offset + count]) == digest
            assert not any(data[place:offset])
            self.sections.append(data[offset:offset + count])
            place = offset + count
        self.config, self.tokenizer, table, self.provenance = self.sections
        assert len(self.config) == 128
        self.tensors = {}
        count, zero = struct.unpack_from("<2I", table)
        assert zero == 0 and len(table) == 8 + 96 * count
        for i in range(count):
            name, *entry, zero = struct.unpack_from("<40sIIQQQQQII", table, 8 + 96 * i)
            form, dimensions, rows, columns, offset, size, digest, segments = entry
            assert zero == 0 and offset % 64 == 0 and offset >= place and blake(data[offset:offset + size]) == digest
            assert i or offset % 4096 == 0
            assert not any(data[place:offset]) and offset - place < (4096 if i == 0 else 64)
            place = offset + size
            self.tensors[name.rstrip(b"\0").decode()] = (form, dimensions, rows, columns, data[offset:place], segments)
        assert place == len(data)

    def numbers(self):
        names = "layers width heads kv_heads head_width ffn vocabulary context eps theta factor low high original chat tied " \
                "segments_out segments_down begin ends".split()
        values = dict(zip(names, struct.unpack_from("<8I5f7I", self.config)))
        assert self.config[112:] == bytes(16)
        ends = struct.unpack_from("<8I", self.config, 80)
        assert not any(ends[values["ends"]:])
        values["ends"] = list(ends[:values["ends"]])
        return values

    def words(self):
        t = self.tokenizer
        n, m = struct.unpack_from("<2I", t)
        starts = struct.unpack_from(f"<{n + 1}I", t, 8)
        at = 8 + 4 * (n + 1)
        ranks = [t[at + a:at + b] for a, b in zip(starts, starts[1:])]
        at += starts[-1]
        assert starts[0] == 0 and not any(t[at:at + -at % 4])
        at += -at % 4
        ids = struct.unpack_from(f"<{m}I", t, at)
        starts = struct.unpack_from(f"<{m + 1}I", t, at + 4 * m)
        at += 4 * m + 4 * (m + 1)
        assert starts[0] == 0 and at + starts[-1] == len(t) and list(ids) == sorted(ids)
        return ranks, {i: t[at + a:at + b].decode() for i, a, b in zip(ids, starts, starts[1:])}

    def blocks(self, name):
        """A q8 or q4 tensor as scales [rows, blocks] (fp16 bits) and integers [rows, blocks, 32]."""
        form, dimensions, rows, columns, data, _ = self.tensors[name]
        assert form in (2, 3) and dimensions == 2
        units = -(-columns // 64)
        size = 1088 if form == 2 else 576
        panels = -(-rows // 16)
        assert len(data) == panels * units * size
        raw = np.frombuffer(data, np.uint8).reshape(panels, units, size)
        vectors = raw[:, :, :-64].reshape(panels, units, -1, 16, 4)                          # [.., vector, row, byte]
        values = np.zeros((panels, 16, units, 2, 32), np.int8)
        per_block = vectors.shape[2] // 2
        for block in range(2):
            for v in range(per_block):
                for b in range(4):
                    byte = vectors[:, :, per_block * block + v, :, b].swapaxes(1, 2)         # [panel, row, unit]
                    if form == 2:
                        values[:, :, :, block, 4 * v + b] = byte.view(np.int8)
                    else:
                        values[:, :, :, block, 8 * v + b] = (byte & 15).astype(np.int8) - 8
                        values[:, :, :, block, 8 * v + 4 + b] = (byte >> 4).astype(np.int8) - 8
        scales = raw[:, :, -64:].copy().view("<u2").reshape(panels, units, 2, 16).transpose(0, 3, 1, 2)
        scales, values = scales.reshape(16 * panels, -1), values.reshape(16 * panels, -1, 32)
        assert (scales[rows:] == 0).all() and (values[rows:] == 0).all()                     # rows that fill up
        assert (values.reshape(len(values), -1)[:, columns:] == 0).all() and (values != -128).all()
        return scales[:rows], values[:rows]

    def floats(self, name):
        form, dimensions, rows, columns, data, _ = self.tensors[name]
        if dimensions == 1:
            assert form == 0 and rows == 1 and len(data) == 4 * columns
            return np.frombuffer(data, "<f4")
        if form >= 2:
            scales, values = self.blocks(name)
            return (values * scales.view(np.float16).astype(np.float32)[..., None]).reshape(rows, -1)[:, :columns]
        panels, units = -(-rows // 16), -(-columns // (1 + form))
        assert len(data) == panels * units * 64
        if form == 0:
            values = np.frombuffer(data, "<f4").reshape(panels, units, 16).swapaxes(1, 2)
        else:
            bits = np.frombuffer(data, "<u2").reshape(panels, units, 16, 2).swapaxes(1, 2).astype(np.uint32) << 16
            values = bits.view(np.float32)
        values = values.reshape(16 * panels, -1)
        assert not values[rows:].any() and not values[:, columns:].any()
        return values[:rows, :columns]


META_NAMES = {"attention_norm": "attention_norm", "query": "attention.wq", "key": "attention.wk", "value": "attention.wv",
              "attention_out": "attention.wo", "ffn_norm": "ffn_norm", "gate": "feed_forward.w1", "up": "feed_forward.w3",
              "down": "feed_forward.w2", "embedding": "tok_embeddings", "final_norm": "norm", "output": "output"}


def meta_name(name):
    *layer, part = name.rsplit(".", 1)
    return ".".join([*layer, META_NAMES[part], "weight"])


def in_order(model):
    layers = [f"layers.{i}.{part}" for i in range(model.layers) for part in list(META_NAMES)[:9]]
    return ["embedding", *layers, "final_norm"] + ["output"] * (not model.tied)


# ═══ Running the converter ═══════════════════════════════════════════════════════════════════════════════════════════════════


def run(*arguments):
    """In this process, for speed: exit status and standard error."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        try:
            status = convert.main([str(a) for a in arguments])
        except SystemExit as error:
            status = error.code
    return status, text.getvalue()


SEGMENTS8 = checkpoints.BY_NAME["segments8"]                # 512 wide, 16 heads over 8, tied, factor 32: all shard counts
UNTIED = dataclasses.replace(checkpoints.BY_NAME["gqa1_e64_f8"], merged=1, ffn=201)    # 192 wide, 3 heads, factor 8
ODD = checkpoints.BY_NAME["gqa1_e8"]                        # 72 wide, inner width 100, 9 heads of 8, no scaling
SMALL = dataclasses.replace(checkpoints.BY_NAME["gqa4_e8_tied"], name="small", merged=2, ffn=64, layers=2, kv_heads=2,
                            tied=False)


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        memory = "/dev/shm"    # files are flushed to the disk, which takes most of the time on a real one
        cls.home = Path(tempfile.mkdtemp(prefix="l3-convert-", dir=memory if os.access(memory, os.W_OK) else None))
        cls.addClassCleanup(shutil.rmtree, cls.home)

    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(dir=self.home))
        warnings.simplefilter("ignore", ResourceWarning)    # a process that ends with an error leaves its files open

    def convert(self, source, *arguments):
        out = self.dir / f"{len(list(self.dir.iterdir()))}.l3"
        status, text = run(source, "-o", out, *arguments)
        self.assertEqual(status, 0, text)
        self.said = text
        return L3(out)

    def refused(self, source, *parts, arguments=(), status=1):
        """The source is refused: in one line that has these parts, in the pattern of all errors, without any file left."""
        out = self.dir / "refused"
        out.mkdir(exist_ok=True)
        found, text = run(source, "-o", out / "x.l3", *arguments)
        self.assertEqual(found, status, text)
        line = text.splitlines()[-1]
        self.assertRegex(line, ERROR)
        for part in parts:
            self.assertIn(part, line)
        self.assertNotIn("convert.py has a fault", text)
        self.assertEqual(os.listdir(out), [])
        return line


def hf(folder, model=SMALL, **edits):
    """A Hugging Face folder, with changes to its config.json."""
    options = {key: edits.pop(key) for key in ("shards", "tokenizer", "names", "tensors", "dtype") if key in edits}
    checkpoints.write_hf(folder, model, **options)
    if edits:
        edit_json(Path(folder) / "config.json", **edits)
    return Path(folder)


def meta(folder, model=SMALL, shards=1, **edits):
    options = {key: edits.pop(key) for key in ("share_tied", "tensors", "dtype") if key in edits}
    checkpoints.write_meta(folder, model, shards, **options)
    if edits:
        edit_json(Path(folder) / "params.json", **edits)
    return Path(folder)


def edit_json(path, **edits):
    doc = json.loads(path.read_text())
    for key, value in edits.items():
        if value is REMOVED:
            del doc[key]
        else:
            doc[key] = value
    path.write_text(json.dumps(doc))


REMOVED = object()

# ═══ All sources mean the same ═══════════════════════════════════════════════════════════════════════════════════════════════


class Sources(Case):
    def same(self, model, sources, *arguments, types=ALL_TYPES):
        for kind in types:
            files = {name: self.convert(path, "--type", kind, *arguments) for name, path in sources.items()}
            first = next(iter(files.values()))
            self.assertEqual(list(first.tensors), in_order(model))
            for name, file in files.items():
                self.assertEqual(file.config, first.config, name)
                self.assertEqual(file.tokenizer, first.tokenizer, name)
                self.assertEqual(file.tensors, first.tensors, name)
        return first

    def test_meta_hugging_face_and_gguf_give_the_same_tensors_and_tokenizer(self):
        d = self.dir
        sources = {f"meta{n}": meta(d / f"m{n}", SEGMENTS8, n, share_tied=n != 2) for n in (1, 2, 8)}
        sources.update({f"hf{n}": hf(d / f"h{n}", SEGMENTS8, shards=n) for n in (1, 3)})
        for kind in ("f32", "f16", "bf16"):
            checkpoints.write_gguf(d / f"{kind}.gguf", SEGMENTS8, kind)
            sources[kind] = d / f"{kind}.gguf"
        checkpoints.write_gguf(d / "split.gguf", SEGMENTS8, "bf16", split_tensors=5)
        sources["split"] = next(d.glob("split-00001-of-*.gguf"))
        sources["split, another part"] = next(d.glob("split-00003-of-*.gguf"))
        # Meta's files do not hold these two for a model of this shape
        self.same(SEGMENTS8, sources, "--rope-factor", 32, "--chat", "llama3.2", types=("f32", "q4"))

    def test_so_they_do_without_any_flag_where_metas_files_say_all(self):
        d = self.dir
        checkpoints.write_gguf(d / "g.gguf", UNTIED, "bf16")
        file = self.same(UNTIED, {"meta1": meta(d / "m1", UNTIED), "meta3": meta(d / "m3", UNTIED, 3), "gguf": d / "g.gguf",
                                  "hf": hf(d / "h", UNTIED), "f16": hf(d / "h16", UNTIED, dtype="float16")})
        numbers = file.numbers()
        self.assertEqual((numbers["chat"], numbers["factor"], numbers["tied"], numbers["context"]), (2, 8, 0, 131072))

    def test_widths_that_are_no_multiple_of_a_block_are_filled_up(self):
        d = self.dir
        checkpoints.write_gguf(d / "g.gguf", ODD, "f32")
        self.same(ODD, {"meta": meta(d / "m", ODD), "hf": hf(d / "h", ODD), "gguf": d / "g.gguf"})

    def test_f32_and_bf16_hold_the_weights_exactly(self):
        for model, kind in itertools.product((SEGMENTS8, ODD), ("f32", "bf16")):
            file, weights = self.convert(hf(self.dir / model.name, model), "--type", kind), checkpoints.weights(model)
            for name in in_order(model):
                np.testing.assert_array_equal(file.floats(name), weights[meta_name(name)], name)

    def test_q8_is_that_of_the_gguf_package_value_for_value(self):
        for model, kind in itertools.product((SEGMENTS8, ODD), ("q8", "q4")):
            file, weights = self.convert(hf(self.dir / model.name, model), "--type", kind), checkpoints.weights(model)
            for name in in_order(model):
                if file.tensors[name][1] == 1:
                    continue
                ours = "q8" if name in ("embedding", "output") else kind
                self.assertEqual(file.tensors[name][0], ALL_TYPES.index(ours))
                if ours == "q8":
                    self.same_blocks(file.blocks(name), weights[meta_name(name)], "Q8_0")

    def same_blocks(self, blocks, weights, type):
        padded = np.pad(weights, [(0, 0), (0, -weights.shape[1] % 32)])
        scales, values = (part[:, :padded.shape[1] // 32] for part in blocks)
        self.assertFalse(blocks[0][:, scales.shape[1]:].any())    # a block that only fills up a unit has scale 0
        raw = gguf.quants.quantize(padded, gguf.GGMLQuantizationType[type]).reshape(*scales.shape, -1)
        np.testing.assert_array_equal(scales, np.ascontiguousarray(raw[..., :2]).view("<u2")[..., 0])
        np.testing.assert_array_equal(values, raw[..., 2:].view(np.int8))

    def test_no_block_of_q4_is_worse_than_in_q4_0_and_all_of_them_are_a_twelfth_better(self):
        def q4_0(values):
            padded = np.pad(values, [(0, 0), (0, -values.shape[1] % 32)])
            kind = gguf.GGMLQuantizationType.Q4_0
            return gguf.quants.dequantize(gguf.quants.quantize(padded, kind), kind)[:, :values.shape[1]]

        def by_block(error):
            return np.pad(error ** 2, [(0, 0), (0, -error.shape[1] % 32)]).reshape(len(error), -1, 32).sum(2)

        ours = theirs = 0
        for model in (SEGMENTS8, ODD):
            file, weights = self.convert(hf(self.dir / model.name, model), "--type", "q4"), checkpoints.weights(model)
            for name in in_order(model):
                if file.tensors[name][0] == ALL_TYPES.index("q4"):
                    wanted = weights[meta_name(name)].astype(np.float64)
                    mine, other = by_block(file.floats(name) - wanted), by_block(q4_0(weights[meta_name(name)]) - wanted)
                    self.assertTrue((mine <= other * (1 + 1e-5)).all(), name)
                    ours, theirs = ours + mine.sum(), theirs + other.sum()
        self.assertLess(ours, theirs * 11 / 12)

    def test_blocks_that_q4_can_hold_are_held_exactly(self):
        """n d with d an fp16 of either sign, n from -8 to 7, the largest |n| anything from 0 to 8, in blocks full and sparse."""
        rng, blocks = np.random.default_rng(1), []
        for most, share in itertools.product(range(9), (1, 0.3, 0.04)):
            n = rng.integers(-most, min(most, 7) + 1, (64, 32)) * (rng.random((64, 32)) < share)
            d = (rng.choice([-1, 1], (64, 1)) * np.exp(rng.uniform(-15, 8, (64, 1)))).astype(np.float16)
            blocks.append(n * d.astype(np.float32))
        values = np.concatenate(blocks).astype(np.float32).reshape(-1, 64)
        np.testing.assert_array_equal(self.through("q4", values), values)

    def through(self, kind, values):
        """Values [multiple of 16, multiple of 64] as the file has them."""
        tensor = convert.Tensor("t", convert.F32, values.shape, lambda a, b: values[a:b].view(np.uint8))
        file = L3.__new__(L3)
        data = convert.encode(tensor, kind, 0, len(values)).tobytes()
        file.tensors = {"t": (ALL_TYPES.index(kind), 2, *values.shape, data, 1)}
        return file.floats("t")

    def test_hard_values_are_encoded_like_the_gguf_package_or_better(self):
        # ties, halves, 0.49999997, equal magnitudes of both signs, zeros, tiny and large numbers
        rows = [[127, 0.5, -0.5, 1.5, 2.5, 0.49999997, -0.49999997, 126.5] * 4, [-8, 8, 3.5, -3.5, 0.5, -0.5, 7.5, -7.5] * 4,
                [8, -8, 1, 2] * 8, [0] * 32, [-0.0] * 32, [1e-30] * 32, [1e-38, -1e-38] * 16, [1e-7 * i for i in range(32)],
                [60000 * 8 - i for i in range(32)], [6e-8 * 127] + [3e-8] * 31, [-1] * 32, [1e-45] * 32,
                *([x * y] * 32 for x in (127, 8) for y in (0.9e-35, 1e-35, 1.1e-35))]
        rng = np.random.default_rng(1)
        rows += list(rng.standard_normal((500, 32)) * np.exp(rng.standard_normal((500, 1)) * 3))
        values = np.array(rows, np.float32).reshape(-1, 64)
        values = np.concatenate([values, values[:-len(values) % 16 or None]])[:len(values) // 16 * 16 + 16]
        kinds = gguf.GGMLQuantizationType
        for kind, type in (("q8", kinds.Q8_0), ("q4", kinds.Q4_0)):
            found = self.through(kind, values).reshape(-1, 32)
            with np.errstate(over="ignore", invalid="ignore"):
                theirs = gguf.quants.dequantize(gguf.quants.quantize(values, type), type).reshape(-1, 32)
            # up to there 1/d is 0, by FORMAT.md; 1/d of the smallest is infinite, and gguf's bytes are noise
            live = np.abs(values.reshape(-1, 32)).max(1) / np.float32(127 if kind == "q8" else 8) > np.float32(1e-35)
            if kind == "q8":
                np.testing.assert_array_equal(found[live], theirs[live])
            else:
                error, other = (((each - values.reshape(-1, 32)).astype(np.float64) ** 2).sum(1) for each in (found, theirs))
                self.assertTrue((error <= other * (1 + 1e-5))[live].all())
            self.assertFalse(found[~live].any())

    def test_blocks_of_a_quantised_gguf_are_moved_without_a_change(self):
        for type, kind in (("q8_0", "q8"), ("q4_0", "q4")):
            path = self.dir / f"{type}.gguf"
            checkpoints.write_gguf(path, SEGMENTS8, type)
            file = self.convert(path, "--verify")
            self.assertIn(f"-> {kind}: nothing is lost", self.said)
            stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
            for name in in_order(SEGMENTS8):
                tensor = stored[checkpoints.gguf_name(meta_name(name))]
                np.testing.assert_array_equal(file.floats(name), gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            raw = stored["blk.0.ffn_up.weight"].data.reshape(512, 16, -1)
            scales, _ = file.blocks("layers.0.up")
            np.testing.assert_array_equal(scales, np.ascontiguousarray(raw[..., :2]).view("<u2")[..., 0])

    def test_q4_0_becomes_q8_without_loss(self):
        path = self.dir / "q4.gguf"
        checkpoints.write_gguf(path, SEGMENTS8, "q4_0")
        small, large = self.convert(path), self.convert(path, "--type", "q8", "--verify")
        self.assertIn("14 matrices Q4_0 -> q8: nothing is lost", self.said)
        for name in in_order(SEGMENTS8):
            np.testing.assert_array_equal(small.floats(name), large.floats(name))

    def test_k_quants_are_decoded_and_encoded_again_and_this_is_said(self):
        path = self.dir / "k.gguf"
        checkpoints.write_gguf(path, SEGMENTS8, "q4_k")
        file = self.convert(path, "--verify")
        self.assertIn("type: q8", self.said)
        self.assertIn("14 matrices Q4_K -> q8: decoded and encoded again", self.said)
        self.assertIn("1 matrix Q6_K -> q8: decoded and encoded again", self.said)
        tensor = {t.name: t for t in gguf.GGUFReader(path).tensors}["blk.1.attn_q.weight"]
        self.same_blocks(file.blocks("layers.1.query"), gguf.quants.dequantize(tensor.data, tensor.tensor_type), "Q8_0")

    def test_l3_files_change_their_type_like_the_first_source(self):
        source, direct = hf(self.dir / "h", ODD), {}
        for kind in ALL_TYPES:
            self.assertEqual(run(source, "-o", self.dir / f"{kind}.l3", "--type", kind)[0], 0)
            direct[kind] = L3(self.dir / f"{kind}.l3")
        for kind in ALL_TYPES:
            again = self.convert(self.dir / "f32.l3", "--type", kind, "--verify")
            self.assertEqual((again.config, again.tokenizer, again.tensors),
                             (direct[kind].config, direct[kind].tokenizer, direct[kind].tensors))
            same = self.convert(self.dir / f"{kind}.l3", "--verify")              # without --type nothing changes
            self.assertEqual(same.tensors, direct[kind].tensors)
        lossless = self.convert(self.dir / "q4.l3", "--type", "q8")
        for name in in_order(ODD):
            np.testing.assert_array_equal(lossless.floats(name), direct["q4"].floats(name))
        self.assertIn(b"earlier sha256 model.safetensors: ", lossless.provenance)

    def test_mp16_keeps_one_of_the_copies_of_each_key_value_head(self):
        weights = checkpoints.weights(SEGMENTS8)
        doubled = {name: a if not name.endswith(("wk.weight", "wv.weight")) else
                   np.repeat(a.reshape(8, 32, -1), 2, axis=0).reshape(512, -1) for name, a in weights.items()}
        wide = dataclasses.replace(SEGMENTS8, kv_heads=16)
        file = self.convert(meta(self.dir / "mp16", wide, 16, tensors=doubled), "--verify")
        self.assertIn("key/value heads: 8 (the 16 shards hold each 2 times)", self.said)
        plain = self.convert(meta(self.dir / "plain", SEGMENTS8))
        self.assertEqual((file.config, file.tensors), (plain.config, plain.tensors))
        doubled["layers.1.attention.wv.weight"] = doubled["layers.1.attention.wv.weight"].copy()
        doubled["layers.1.attention.wv.weight"][33] *= -1
        self.refused(meta(self.dir / "odd", wide, 16, tensors=doubled), "layers.1.attention.wv.weight", "copies")

    def fp8(self, model):
        """Matrices of the feed-forward as e4m3 bytes, a scale per row, and their product."""
        rng, weights = np.random.default_rng(8), checkpoints.weights(model)
        table = {}
        for name, array in weights.items():
            if "feed_forward" in name:
                code = (rng.integers(0, 127, array.shape) | rng.integers(0, 2, array.shape) << 7).astype(np.uint8)
                scale = (rng.random(len(array)) * 1e-3).astype(np.float32)
                exponent, fraction = (code >> 3 & 15).astype(int), (code & 7).astype(float)
                value = np.where(exponent > 0, (1 + fraction / 8) * 2.0 ** (exponent - 7), fraction / 8 * 2.0 ** -6)
                value = np.where(code > 127, -value, value).astype(np.float32)
                table[name] = (code, scale, value * scale[:, None])
        return table, {name: table[name][2] if name in table else a for name, a in weights.items()}

    def test_hugging_face_fp8_is_multiplied_with_its_scales(self):
        table, weights = self.fp8(SMALL)
        path = hf(self.dir / "h", quantization_config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
        parts = {name: ("BF16", a.shape, checkpoints.to_bytes(a, "bfloat16"))
                 for name, a in checkpoints.hf_weights(SMALL).items()}
        for name, (code, scale, _) in table.items():
            layer, part = name.split(".")[1], {"w1": "gate", "w2": "down", "w3": "up"}[name.split(".")[-2]]
            theirs = f"model.layers.{layer}.mlp.{part}_proj.weight"
            parts[theirs] = ("F8_E4M3", code.shape, code.tobytes())
            parts[f"{theirs}_scale"] = ("F32", (len(scale), 1), scale.tobytes())
        checkpoints.write_safetensors(path / "model.safetensors", parts)
        file = self.convert(path, "--type", "f32", "--verify")
        for name in in_order(SMALL):
            np.testing.assert_array_equal(file.floats(name), weights[meta_name(name)], name)
        del parts["model.layers.1.mlp.up_proj.weight_scale"]
        checkpoints.write_safetensors(path / "model.safetensors", parts)
        self.refused(path, "model.layers.1.mlp.up_proj.weight_scale is missing")

    def test_metas_fp8_is_multiplied_with_the_scales_of_each_shard(self):
        table, weights = self.fp8(SMALL)
        path, T, S = meta(self.dir / "m", SMALL, 2), checkpoints.Tensor, checkpoints.Storage
        for r in range(2):
            tensors, scales = OrderedDict(), {}
            for name, array in checkpoints.weights(SMALL).items():
                piece = checkpoints.shard(name, array, r, 2)
                if name not in table:
                    tensors[name] = T(S.of(piece), piece.shape)
                    continue
                code, scale, _ = table[name]
                code = checkpoints.shard(name, code, r, 2)
                tensors[name] = Fp8Tensor(code)
                scale = scale if name.endswith("w2.weight") else np.split(scale, 2)[r]
                key = name.replace("layers.", "").replace(".", "_", 1).replace(".weight", f"_{r}")
                scales[key] = T(S.of(scale, "float32"), scale.shape)
            checkpoints.write_pth(path / f"consolidated.{r:02d}.pth", tensors)
            checkpoints.write_pth(path / f"fp8_scales_{r}.pt", scales)
        file = self.convert(path, "--type", "f32", "--verify")
        for name in in_order(SMALL):
            np.testing.assert_array_equal(file.floats(name), weights[meta_name(name)], name)
        (path / "fp8_scales_1.pt").unlink()
        self.refused(path, "fp8_scales_1.pt")

    def test_strided_and_shared_storages_of_a_pickle_are_honoured(self):
        weights, T, S = checkpoints.weights(SMALL), checkpoints.Tensor, checkpoints.Storage
        path = meta(self.dir / "m")
        tensors = {name: T(S.of(a), a.shape) for name, a in weights.items()}
        wide = np.zeros((40, 50), np.float32)
        wide[3:35, 4:36] = weights["layers.0.attention.wq.weight"]
        tensors["layers.0.attention.wq.weight"] = T(S.of(wide), (32, 32), (50, 1), 3 * 50 + 4)
        turned = weights["layers.1.feed_forward.w2.weight"]
        tensors["layers.1.feed_forward.w2.weight"] = T(S.of(np.ascontiguousarray(turned.T)), turned.shape, (1, 32))
        both = S.of(np.concatenate([weights["norm.weight"], weights["layers.0.ffn_norm.weight"]]), "float32")
        tensors["norm.weight"], tensors["layers.0.ffn_norm.weight"] = T(both, (32,)), T(both, (32,), offset=32)
        checkpoints.write_pth(path / "consolidated.00.pth", {"model": tensors})    # wrapped, as some third parties do
        file = self.convert(path, "--type", "f32")
        for name in in_order(SMALL):
            np.testing.assert_array_equal(file.floats(name), weights[meta_name(name)], name)

    def test_shared_safetensors_files_of_the_package_are_read(self):
        path = hf(self.dir / "h")
        tensors = {name: np.asarray(a, np.float32) for name, a in checkpoints.hf_weights(SMALL).items()}
        before = self.convert(path, "--type", "f32")
        safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        self.assertEqual(self.convert(path, "--type", "f32").tensors, before.tensors)

    def test_two_runs_give_the_same_file(self):
        path = hf(self.dir / "h")
        self.assertEqual(self.convert(path).data, self.convert(path).data)

    def test_the_provenance_names_every_file_with_its_hash(self):
        path = hf(self.dir / "named", shards=2)
        lines = self.convert(path).provenance.decode().splitlines()
        self.assertEqual(lines[0], "source: named")
        self.assertTrue(lines[1].startswith("converter: "))
        hashes = {line.split(": ")[0][7:]: line.split(": ")[1] for line in lines[2:]}
        for name, digest in hashes.items():
            self.assertEqual(digest, hashlib.sha256((path / name).read_bytes()).hexdigest())
        self.assertEqual(sorted(hashes), sorted(os.listdir(path)))
        (path / "chat_template.jinja").write_text("{{ '<|start_header_id|>' }}")
        (path / "tokenizer.json").unlink()
        checkpoints.write_hf(self.dir / "original", SMALL, tokenizer="original")
        shutil.copytree(self.dir / "original" / "original", path / "original")
        for template in (True, False):
            if not template:
                (path / "chat_template.jinja").unlink()
            lines = self.convert(path).provenance.decode().splitlines()[2:]
            files = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
            self.assertEqual(sorted(line.split(": ")[0][7:] for line in lines), sorted(files))
        path = hf(self.dir / "again")
        lines = self.convert(path, "--no-hash").provenance.decode()
        self.assertIn("sha256 tokenizer.json: ", lines)
        self.assertNotIn("safetensors:", lines)


class Fp8Tensor(checkpoints.Tensor):
    """How torch pickles types without a storage class of their own: an untyped storage, counted in bytes."""
    def __init__(self, codes):
        super().__init__(checkpoints.Storage(codes.tobytes(), "storage.UntypedStorage", codes.size), codes.shape)

    def __reduce__(self):
        G, (rows, columns) = checkpoints.Global, self.shape
        return G("torch._utils", "_rebuild_tensor_v3"), (
            self.storage, 0, (rows, columns), (columns, 1), False, OrderedDict(), G("torch", "float8_e4m3fn"))


# ═══ What a source leaves open ═══════════════════════════════════════════════════════════════════════════════════════════════


class Decisions(Case):
    def test_segments_follow_the_shape(self):
        for heads, width, ffn, expected in ((32, 64, 8192, (8, 8)), (24, 128, 8192, (8, 8)), (16, 32, 512, (8, 8)),
                                            (3, 64, 200, (1, 1)), (2, 128, 352, (2, 1)), (4, 64, 320, (4, 1)),
                                            (4, 32, 256, (2, 4))):
            config = convert.Config(1, 64, heads, 1, width, ffn, 300, 1, 1e-5, 5e5, convert.Rope(), "none", True, 256, [])
            self.assertEqual(tuple(config.segments().values()), expected)
        table = self.convert(hf(self.dir / "h", SEGMENTS8)).tensors
        self.assertEqual({t[5] for n, t in table.items() if n.endswith(("down", "attention_out"))}, {8})
        self.assertEqual({t[5] for n, t in table.items() if not n.endswith(("down", "attention_out"))}, {1})

    def test_the_configuration_is_the_models(self):
        for model in checkpoints.MODELS:
            numbers = self.convert(hf(self.dir / model.name, model)).numbers()
            expected = dict(
                layers=model.layers, width=model.dim, heads=model.heads, kv_heads=model.kv_heads, head_width=model.head_dim,
                ffn=model.ffn, vocabulary=model.vocab, context=model.context, eps=float(np.float32(model.eps)),
                theta=model.theta, factor=model.rope_factor, tied=int(model.tied), begin=model.ranks,
                chat={1: 1, 8: 2, 32: 3}[model.rope_factor], low=1, high=model.rope_high if model.rope_factor > 1 else 1,
                original=model.rope_original if model.rope_factor > 1 else 0,
                ends=sorted({*checkpoints.end_tokens(model)}))
            self.assertEqual({key: numbers[key] for key in expected}, expected)

    def test_meta_folders_decide_by_scaling_and_shape(self):
        names = {"llama3": "<|reserved_special_token_4|>", "head": "<|eom_id|>"}
        for dims, scaled, expected in (
                ((2048, 16), True, ("llama3.2", 32, 131072, "head")), ((3072, 28), True, ("llama3.2", 32, 131072, "head")),
                ((4096, 32), True, ("llama3.1", 8, 131072, "head")), ((4096, 32), False, ("llama3", 1, 8192, "llama3"))):
            chat, factor, context, scheme = expected
            # A folder with the numbers of a released model, but other weights: decisions are printed before the tensors matter.
            path = meta(self.dir / f"{dims[0]}{scaled}", SMALL, dim=dims[0], n_layers=dims[1], use_scaled_rope=scaled)
            status, text = run(path)
            why = f"{dims[0]} wide, {dims[1]} layers, {'scaled' if scaled else 'unscaled'} RoPE"
            self.assertEqual(status, 1)
            self.assertIn(f"RoPE factor: {factor} ({why}; override with --rope-factor)", text)
            self.assertIn(f"context: {context} ({why}; override with --context)", text)
            self.assertIn(f"special tokens: {'llama3.2' if scheme == 'head' else 'llama3'} (", text)
        path = meta(self.dir / "m", SMALL)
        file = self.convert(path)
        self.assertIn("chat format: llama3 (32 wide, 2 layers, unscaled RoPE, assumed instruct; override with --chat)",
                      self.said)
        self.assertEqual(file.words()[1][SMALL.ranks + 8], names["llama3"])
        self.assertEqual(file.numbers()["ends"], [SMALL.ranks + 1, SMALL.ranks + 9])
        edit_json(path / "params.json", use_scaled_rope=True)
        file = self.convert(path)
        self.assertEqual(file.words()[1][SMALL.ranks + 8], names["head"])
        self.assertEqual(file.numbers()["ends"], [SMALL.ranks + 1, SMALL.ranks + 8, SMALL.ranks + 9])

    def test_every_decision_can_be_overridden(self):
        path, n = meta(self.dir / "m", SMALL), SMALL.ranks
        numbers = self.convert(path, "--rope-factor", 32, "--chat", "none", "--context", 77, "--end-tokens", "<|eot_id|>,5",
                               "--token-names", "hf").numbers()
        self.assertEqual([numbers[k] for k in ("factor", "low", "high", "original", "chat", "context", "ends")],
                         [32, 1, 4, 8192, 0, 77, [5, n + 9]])
        numbers = self.convert(hf(self.dir / "h", UNTIED), "--rope-factor", 1).numbers()
        self.assertEqual([numbers[k] for k in ("factor", "low", "high", "original")], [1, 1, 1, 0])
        before = next(self.dir.glob("*.l3"))
        numbers = self.convert(before, "--rope-factor", 8, "--chat", "llama3", "--end-tokens", "1").numbers()
        self.assertEqual([numbers[k] for k in ("factor", "low", "high", "original", "chat", "ends")],
                         [8, 1, 4, 8192, 1, [1]])

    def test_the_chat_format_follows_end_tokens_and_template(self):
        n = SMALL.ranks
        header = "{{ '<|start_header_id|>' }}"
        for template, ends, expected in (
                (None, [n + 1], 0), (None, [n + 1, n + 9], 1), (header, [n + 1, n + 9], 1), (header, [n + 1], 0),
                (header + "Cutting Knowledge Date builtin_tools", [n + 9], 2),
                (header + "Cutting Knowledge Date builtin_tools strftime_now", [n + 9], 3),
                ("<|im_start|>", [n + 9], 0),
                ([{"name": "default", "template": header + "Cutting Knowledge Date builtin_tools"}], n + 9, 2)):
            path = hf(self.dir / "h", eos_token_id=ends)
            edit_json(path / "generation_config.json", eos_token_id=REMOVED)
            edit_json(path / "tokenizer_config.json", chat_template=template, eos_token=REMOVED)
            self.assertEqual(self.convert(path).numbers()["chat"], expected, (template, ends))
        edit_json(path / "tokenizer_config.json", chat_template=REMOVED)
        (path / "chat_template.jinja").write_text(header + "Cutting Knowledge Date strftime_now")
        self.assertEqual(self.convert(path).numbers()["chat"], 3)
        (path / "chat_template.jinja").write_text(header)
        edit_json(path / "config.json", eos_token_id=[n + 1])
        for name in ("<|eot_id|>", {"content": "<|eot_id|>"}, "<|end_of_text|>"):
            edit_json(path / "tokenizer_config.json", eos_token=name)
            self.assertEqual(self.convert(path).numbers()["chat"], 0 if name == "<|end_of_text|>" else 1)
        self.assertIn("taken for a base model", self.said)

    def test_end_tokens_of_both_configurations_and_of_known_names_are_joined(self):
        n = UNTIED.ranks
        path = hf(self.dir / "h", UNTIED, eos_token_id=3)
        edit_json(path / "generation_config.json", eos_token_id=[7])
        self.assertEqual(self.convert(path).numbers()["ends"], [3, 7, n + 1, n + 8, n + 9])

    def test_a_tied_output_is_found_by_declaration_absence_or_equality(self):
        tied = dataclasses.replace(SMALL, tied=True)
        weights = checkpoints.hf_weights(tied)
        self.assertNotIn("lm_head.weight", weights)
        for declared in (True, REMOVED):
            path = hf(self.dir / f"{declared is True}", tied, tie_word_embeddings=declared)
            self.assertEqual(self.convert(path).numbers()["tied"], 1)
        path = hf(self.dir / "false", tied, tie_word_embeddings=False)
        self.refused(path, "the tensor lm_head.weight is missing")
        for share in (True, False):
            self.assertEqual(self.convert(meta(self.dir / f"m{share}", tied, share_tied=share)).numbers()["tied"], 1)
        self.assertEqual(self.convert(meta(self.dir / "m", SMALL)).numbers()["tied"], 0)
        self.refused(hf(self.dir / "h", SMALL, tie_word_embeddings=True), "lm_head.weight", "they differ")

    def test_special_names_come_from_the_source(self):
        n = SMALL.ranks
        for options, name in (({"names": "hf"}, "<|reserved_special_token_2|>"), ({"names": "head"}, "<|step_id|>"),
                              ({"tokenizer": "original"}, "<|reserved_special_token_3|>"),
                              ({"tokenizer": "both", "names": "head"}, "<|step_id|>")):
            path = hf(self.dir / str(len(list(self.dir.iterdir()))), **options)
            self.assertEqual(self.convert(path).words()[1][n + 5], name)
        (path / "tokenizer.json").unlink()    # the names of tokenizer_config.json, the ranks of original/tokenizer.model
        self.assertEqual(self.convert(path).words()[1][n + 5], "<|step_id|>")
        ranks, names = self.convert(path).words()
        self.assertEqual(ranks, checkpoints.ranked_tokens(SMALL))
        self.assertEqual(list(names), list(range(n, n + 256)))

    def test_a_vocabulary_may_be_larger_than_its_tokens_or_lack_special_ones(self):
        large = self.convert(hf(self.dir / "h", vocab_size=SMALL.vocab + 8, tensors=self.rows(8)))
        self.assertEqual(len(large.words()[1]), 256)
        few = self.convert(meta(self.dir / "m", vocab_size=SMALL.vocab - 250, tensors=self.rows(-250)))
        self.assertEqual(list(few.words()[1].values())[:2], ["<|begin_of_text|>", "<|end_of_text|>"])
        self.assertEqual((len(few.words()[1]), few.numbers()["chat"]), (6, 0))
        self.refused(meta(self.dir / "none", vocab_size=SMALL.vocab - 256, tensors=self.rows(-256)), "<|begin_of_text|>")

    @staticmethod
    def rows(extra):
        tensors = dict(checkpoints.weights(SMALL))
        for name in ("tok_embeddings.weight", "output.weight"):
            a = tensors[name]
            tensors[name] = np.concatenate([a, a[:extra]]) if extra > 0 else a[:extra]
        return tensors

    def test_the_divisors_are_those_of_the_published_file(self):
        divisors = convert.Rope(8, 1, 4, 8192).divisors(500000, 128).astype("<f4").tobytes()
        self.assertEqual(hashlib.sha256(divisors).hexdigest(),
                         "80fd5efb2f729381785b293a091a268cfeceb0079167f6ece9b07070e662b222")
        for model in checkpoints.MODELS:
            rope = convert.Rope(model.rope_factor, model.rope_low, model.rope_high, model.rope_original)
            np.testing.assert_allclose(rope.divisors(model.theta, model.head_dim), checkpoints.rope_divisors(model), rtol=1e-6)

    def test_the_factor_of_a_gguf_is_found_from_its_divisors(self):
        for name, factor in (("long_f32", 32), ("gqa2_e128_f8", 8), ("gqa5_e16_wide", 1)):
            checkpoints.write_gguf(self.dir / f"{name}.gguf", checkpoints.BY_NAME[name], "bf16")
            self.assertEqual(self.convert(self.dir / f"{name}.gguf").numbers()["factor"], factor)
        other = checkpoints.BY_NAME["gqa8_e16_short"]            # scaled from 64 instead of 8192 positions
        checkpoints.write_gguf(self.dir / "other.gguf", other, "bf16")
        self.refused(self.dir / "other.gguf", "rope_freqs.weight", "divisor ", "for the factor 8")

    def test_a_gguf_of_a_long_context_without_divisors_is_pointed_out(self):
        model = dataclasses.replace(SMALL, context=131072)
        checkpoints.write_gguf(self.dir / "g.gguf", model, "bf16")
        self.convert(self.dir / "g.gguf")
        self.assertIn("RoPE factor: 1 (no rope_freqs.weight, for a context of 131072", self.said)

    def test_the_default_name_is_that_of_the_source_and_the_type(self):
        path = hf(self.dir / "Tiny-Llama")
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.dir)
        self.assertEqual(run(path)[0], 0)
        self.assertEqual(run("Tiny-Llama-q8.l3", "--type", "q4")[0], 0)
        self.assertTrue((self.dir / "Tiny-Llama-q8.l3").exists() and (self.dir / "Tiny-Llama-q4.l3").exists())
        snapshot = hf(self.dir / "models--someone--Llama-X" / "snapshots" / "0123abcd")
        self.assertEqual(run(snapshot)[0], 0)
        checkpoints.write_gguf(self.dir / "0123abcd", SMALL, "bf16")
        (self.dir / "Llama-Y.gguf").symlink_to(self.dir / "0123abcd")
        self.assertEqual(run("Llama-Y.gguf")[0], 0)
        self.assertTrue((self.dir / "Llama-X-q8.l3").exists() and (self.dir / "Llama-Y-q8.l3").exists())

    def test_names_of_special_tokens_follow_the_published_lists(self):
        for scheme, digest in {
                "llama3": "cf9350c4f1881b484e8500a9fe9ad770da9c40569c706c39bbc3e51dff7cb304",
                "llama3.1": "2457b558e6d5610745b5fe67feb8e1f189104848161c485ed43397ae158d4239",
                "llama3.2": "4835f1d80c292ed23fc4be5c8d6d28f2df14ef983d68bb9bf3c1d56a7575edf6",
                "hf": "760dd30310b8e13e92ca971f8779887e6e8e8ecaf88388b841efa53bd999569a"}.items():
            names = "\n".join(convert.special_names(scheme, 256))
            self.assertEqual(hashlib.sha256(names.encode()).hexdigest(), digest)


@unittest.skipUnless(TOKENIZER_MODEL, "LLAMA3_TOKENIZER_MODEL is not set: the real tokenizer was not checked")
class RealTokenizer(Case):
    def digest(self, value):
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        for character in "<>&":
            text = text.replace(character, f"\\u{ord(character):04x}")
        return hashlib.sha256(text.encode()).hexdigest()

    def test_tokens_and_merges_have_the_published_hashes_and_all_sources_agree(self):
        model = dataclasses.replace(SMALL, name="real", merged=0, dim=16, kv_heads=2, heads=2, ffn=16, layers=1, tied=True)
        ranks = convert.read_tiktoken(Path(TOKENIZER_MODEL))
        visible = [checkpoints.printable(token) for token in ranks]
        names = convert.special_names("llama3", 256)
        self.assertEqual(self.digest(visible + names), "765b529dbcbc42dd202ce657341c63807b51f3b07e09898f6aa6196326865d5a")
        merges = [f"{checkpoints.printable(a)} {checkpoints.printable(b)}" for a, b in checkpoints.merges(ranks)]
        self.assertEqual(self.digest(merges), "d0cbac1fcc9dcf03724b8db5c9bfb593ae1cf68fb9bc72eb1d15274dcbbf618b")
        weights = {name: np.resize(a, (128256, 16)) if "tok_" in name or name.startswith("output") else a
                   for name, a in checkpoints.weights(model).items()}
        path = meta(self.dir / "m", model, tensors=weights, vocab_size=128256)
        shutil.copy(TOKENIZER_MODEL, path / "tokenizer.model")
        first = self.convert(path)
        self.assertEqual(first.numbers()["ends"], [128001, 128009])
        self.assertEqual(first.words(), (ranks, dict(enumerate(names, 128000))))
        path = hf(self.dir / "h", model, tensors=weights, vocab_size=128256, eos_token_id=[128001, 128009])
        edit_json(path / "generation_config.json", eos_token_id=128009)
        doc = json.loads((path / "tokenizer.json").read_text())
        doc["model"].update(vocab={token: i for i, token in enumerate(visible)}, merges=[m.split(" ") for m in merges])
        doc["added_tokens"] = [{"id": 128000 + i, "content": name} for i, name in enumerate(names)]
        (path / "tokenizer.json").write_text(json.dumps(doc))
        self.assertEqual(self.convert(path).tokenizer, first.tokenizer)
        self.assertNotIn("note:", self.said)


# ═══ --verify ════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class Verify(Case):
    def test_every_kind_of_source_and_type_verifies(self):
        checkpoints.write_gguf(self.dir / "q.gguf", SEGMENTS8, "q4_0")
        sources = hf(self.dir / "h", ODD), meta(self.dir / "m", UNTIED, 3), self.dir / "q.gguf"
        for source, kind in itertools.product(sources, ALL_TYPES):
            self.convert(source, "--type", kind, "--verify")
            self.assertIn("verified: ", self.said)

    def flipped(self, kind, change):
        """What --verify says of a file that `change` has spoilt between writing and reading."""
        path, true_write = hf(self.dir / "h", ODD), convert.write

        def write(source, type, part, options):
            true_write(source, type, part, options)
            data = bytearray(part.read_bytes())
            change(data)
            part.write_bytes(data)
        with mock.patch.object(convert, "write", write):
            return self.refused(path, arguments=["--type", kind, "--verify"])

    def test_a_flipped_byte_anywhere_is_found(self):
        for kind in ALL_TYPES:
            size = len(self.convert(hf(self.dir / "h", ODD), "--type", kind).data)
            for at in (0, 8, 30, 119, 121, 130, 300, 5000, size // 2, size - 1):
                def flip(data):
                    data[at] ^= 1
                self.flipped(kind, flip)

    def test_a_wrong_value_with_a_right_checksum_is_found(self):
        """As if the encoder or the layout had a fault: the file is sound, but not the source's."""
        for kind in ALL_TYPES:
            def spoil(data):
                table = struct.unpack_from("<Q", data, 72)[0]
                entry = table + 8 + 96 * 2                        # layers.0.query
                offset, size = struct.unpack_from("<2Q", data, entry + 64)
                data[offset:offset + 128] = data[offset + 64:offset + 128] + data[offset:offset + 64]
                struct.pack_into("<Q", data, entry + 80, blake(data[offset:offset + size]))
                count = struct.unpack_from("<Q", data, 80)[0]
                struct.pack_into("<Q", data, 88, blake(data[table:table + count]))
                struct.pack_into("<Q", data, 120, blake(data[:120]))
            self.assertIn("tensor layers.0.query is not that of the source", self.flipped(kind, spoil))


# ═══ Bad input ═══════════════════════════════════════════════════════════════════════════════════════════════════════════════


class BadInput(Case):
    def test_a_source_that_is_not_there_or_something_else_is_named(self):
        self.refused(self.dir / "absent", "absent: there is no such file or folder")
        (self.dir / "empty").mkdir()
        self.refused(self.dir / "empty", "neither a Meta nor a Hugging Face folder (found nothing")
        (self.dir / "notes.txt").write_text("hello world")
        self.refused(self.dir / "notes.txt", "neither a GGUF nor an .l3 file (found b'hello wo' at its start, ")
        (self.dir / "nothing.gguf").write_text("")
        self.refused(self.dir / "nothing.gguf", "neither a GGUF nor an .l3 file")
        self.refused(meta(self.dir / "m") / "consolidated.00.pth", "give the folder")
        self.refused(hf(self.dir / "h") / "model.safetensors", "give the folder")

    def test_missing_files_are_named(self):
        for name, part in (("config.json", "neither a Meta"), ("model.safetensors", "neither model.safetensors"),
                           ("tokenizer.json", "neither tokenizer.json nor tokenizer.model")):
            path = hf(self.dir / name)
            (path / name).unlink()
            self.refused(path, part)
        for name in ("params.json", "tokenizer.model"):
            path = meta(self.dir / name)
            (path / name).unlink()
            self.refused(path, name)
        path = meta(self.dir / "m8", SEGMENTS8, 8)
        (path / "consolidated.03.pth").unlink()
        self.refused(path, "consolidated.03.pth is missing (found consolidated.00.pth, ")
        path = hf(self.dir / "h3", shards=3)
        (path / "model-00002-of-00003.safetensors").unlink()
        self.refused(path, "model-00002-of-00003.safetensors: cannot be opened")
        checkpoints.write_gguf(self.dir / "s.gguf", SMALL, "bf16", split_tensors=8)
        first, second, *_ = sorted(self.dir.glob("s-*.gguf"))
        second.unlink()
        self.refused(first, f"{second.name}: cannot be opened")

    def test_a_truncated_file_of_any_kind_is_refused(self):
        folder, other, l3, g = hf(self.dir / "h"), meta(self.dir / "m"), self.dir / "x.l3", self.dir / "g.gguf"
        self.assertEqual(run(folder, "-o", l3)[0], 0)
        checkpoints.write_gguf(g, SMALL, "bf16")
        inside = [(folder, folder / name) for name in ("model.safetensors", "config.json", "tokenizer.json")]
        inside += [(other, other / name) for name in ("consolidated.00.pth", "params.json", "tokenizer.model")]
        for source, file in [*inside, (l3, l3), (g, g)]:
            whole = file.read_bytes()
            for size in (0, 3, 7, 9, 40, 150, len(whole) // 2, len(whole) - 3):
                with self.subTest(file=file.name, size=size):
                    file.write_bytes(whole[:size])
                    self.refused(source, file.name if size > 8 else "")
            file.write_bytes(whole)

    def test_noise_in_any_header_ends_in_one_line(self):
        folder, other, l3, g = hf(self.dir / "h"), meta(self.dir / "m"), self.dir / "x.l3", self.dir / "g.gguf"
        self.assertEqual(run(folder, "-o", l3)[0], 0)
        checkpoints.write_gguf(g, SMALL, "bf16")
        rng = np.random.default_rng(3)
        for source, file, header in (
                (folder, folder / "model.safetensors", 2500), (folder, folder / "config.json", 900), (l3, l3, 9000), (g, g, 9000),
                (folder, folder / "tokenizer.json", 3000), (other, other / "consolidated.00.pth", 4500)):
            whole = file.read_bytes()
            for _ in range(60):
                data = bytearray(whole)
                for at in rng.integers(0, min(header, len(whole)), rng.integers(1, 4)):
                    data[at] = rng.integers(0, 256)
                file.write_bytes(data)
                status, text = run(source, "-o", self.dir / "noise.l3")
                self.assertIn(status, (0, 1))
                self.assertNotIn("convert.py has a fault", text)
                if status:
                    self.assertRegex(text.splitlines()[-1], ERROR)
                self.assertEqual(status == 0, (self.dir / "noise.l3").exists())
                (self.dir / "noise.l3").unlink(missing_ok=True)
            file.write_bytes(whole)
        self.assertEqual(list(self.dir.glob("*.part")), [])

    def test_a_value_of_another_kind_is_the_documents_fault(self):
        for number, added in enumerate(([7], [{"content": "x"}], [{"id": 600, "content": 5}], [{"id": "600", "content": "x"}],
                                        [{"id": [1], "content": "x"}], [{"id": 600, "content": "\ud800"}])):
            path = hf(self.dir / f"t{number}")
            edit_json(path / "tokenizer.json", added_tokens=added)
            self.refused(path, "tokenizer.json: ")
        path = hf(self.dir / "d")
        data = (path / "model.safetensors").read_bytes()
        length = struct.unpack_from("<Q", data)[0]
        header = data[8:8 + length].replace(b'"BF16"', b'{}', 1)
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length:])
        self.refused(path, "model.safetensors: its header is wrong", "a dtype is no text")
        path = hf(self.dir / "n", tokenizer="both")
        (path / "tokenizer.json").unlink()
        edit_json(path / "tokenizer_config.json", added_tokens_decoder={"x": {"content": "y"}})
        self.refused(path, "tokenizer_config.json: this is no tokenizer_config.json")
        path = meta(self.dir / "z")
        data = bytearray((path / "consolidated.00.pth").read_bytes())
        end = data.rfind(b"PK\5\6")    # the archive's directory, said to begin before the file
        struct.pack_into("<2I", data, end + 12, len(data), 0)
        (path / "consolidated.00.pth").write_bytes(data)
        self.refused(path, "consolidated.00.pth: this is not a whole file of torch.save")

    def test_shards_that_do_not_fit_together_are_refused(self):
        a = meta(self.dir / "a", SEGMENTS8, 2)
        b = meta(self.dir / "b", dataclasses.replace(SEGMENTS8, seed=99), 2)
        shutil.copy(b / "consolidated.01.pth", a)
        self.refused(a, "the shards do not fit together")
        c = meta(self.dir / "c", SEGMENTS8, 4)
        shutil.copy(c / "consolidated.01.pth", a)
        self.refused(a, "shape")
        (a / "consolidated.01.pth").unlink()
        self.refused(a, "(found [256, 512], expected [512, 512])")
        other = meta(self.dir / "d", dataclasses.replace(SEGMENTS8, layers=1), 2)
        a = meta(self.dir / "a2", SEGMENTS8, 2)
        shutil.copy(other / "consolidated.01.pth", a)
        self.refused(a, "is not in every shard")
        h = hf(self.dir / "h", SEGMENTS8, shards=3)
        shutil.copy(h / "model-00001-of-00003.safetensors", h / "model-00002-of-00003.safetensors")
        self.refused(h, "model-00002-of-00003.safetensors: tensor ", "the shards do not fit together")
        checkpoints.write_gguf(self.dir / "s.gguf", SMALL, "bf16", split_tensors=8)
        first, second, third = sorted(self.dir.glob("s-*.gguf"))
        shutil.copy(second, third)
        self.refused(first, "the parts do not fit together")

    def rewritten(self, change):
        """A Hugging Face folder whose tensors were changed."""
        path = self.dir / f"r{len(list(self.dir.iterdir()))}"
        hf(path)
        weights = checkpoints.hf_weights(SMALL)
        parts = {name: ("BF16", a.shape, checkpoints.to_bytes(a, "bfloat16")) for name, a in weights.items()}
        change(parts)
        checkpoints.write_safetensors(path / "model.safetensors", parts)
        return path

    def test_a_tensor_that_is_missing_extra_or_of_another_shape_is_named(self):
        q = "model.layers.1.self_attn.q_proj.weight"
        self.refused(self.rewritten(lambda t: t.pop(q)), f"the tensor {q} is missing")
        self.refused(self.rewritten(lambda t: t.update({"model.extra.weight": t[q]})), "model.extra.weight", "is not one of")
        self.refused(self.rewritten(lambda t: t.update({q.replace("layers.1", "layers.2"): t[q]})), "model.layers.2.self_attn")
        self.refused(self.rewritten(lambda t: t.update({q: ("BF16", (16, 64), t[q][2])})), q,
                     "(found [16, 64], expected [32, 32])")
        self.refused(self.rewritten(lambda t: t.update({q: ("I64", (32, 8), t[q][2])})), q)
        self.refused(self.rewritten(lambda t: t.update({q: ("F64", (32, 32), t[q][2] * 4)})), q, "F64")
        self.refused(hf(self.dir / "more", num_hidden_layers=3), "is missing")
        self.refused(hf(self.dir / "many", num_hidden_layers=10 ** 9), "1000000000 layers")

    def test_foreign_checkpoints_are_refused_by_name(self):
        q = "model.layers.1.self_attn.q_proj"
        for suffix, what in ((".bias", "biases"), (".weight.absmax", "bitsandbytes"), (".SCB", "bitsandbytes"),
                             (".qweight", "GPTQ or AWQ"), (".lora_A.weight", "LoRA")):
            self.refused(self.rewritten(lambda t: t.update({q + suffix: ("BF16", (1,), b"\0\0")})), q + suffix, what)
        for method in ("bitsandbytes", "gptq", "awq", "compressed-tensors"):
            self.refused(hf(self.dir / method, quantization_config={"quant_method": method}), f"the weights are quantised (found {method}, ")
        for key, value in (("model_type", "mistral"), ("architectures", ["LlamaForSequenceClassification"]),
                           ("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("sliding_window", 4096),
                           ("partial_rotary_factor", 0.5)):
            self.refused(hf(self.dir / key, **{key: value}), "config.json", f"{key} is not that of Llama 3 (found {value!r}, ")
        for rope in ({"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}):
            self.refused(hf(self.dir / "rope", rope_scaling=rope), "the RoPE scaling is")
        (hf(self.dir / "lora") / "adapter_config.json").write_text("{}")
        self.refused(self.dir / "lora", "LoRA adapter")
        for key, value, what in (("quantization_args", {"spinquant": True, "group_size": 32}, "SpinQuant"),
                                 ("lora_args", {"rank": 16}, "QLoRA"), ("vision_chunk_size", 448, "vision"),
                                 ("quantization_args", {"scheme": "int4_weight_int8_dynamic_activation"}, "4-bit")):
            self.refused(meta(self.dir / what, **{key: value}), f"this is a {what} checkpoint")
        weights, T, S = checkpoints.weights(SMALL), checkpoints.Tensor, checkpoints.Storage
        path = meta(self.dir / "int4")
        tensors = {name: T(S.of(a), a.shape) for name, a in weights.items()}
        for name in list(tensors):
            if "attention.w" in name:
                tensors[name] = T(S(bytes(weights[name].size), "CharStorage", weights[name].size), weights[name].shape)
                tensors[name.replace(".weight", ".scales")] = T(S.of(np.ones(32)), (32,))
        checkpoints.write_pth(path / "consolidated.00.pth", tensors)
        self.refused(path, "SpinQuant or QLoRA")

    def test_configurations_that_make_no_sense_are_refused(self):
        crossed = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
                   "original_max_position_embeddings": 8192}
        for key, value in (("hidden_size", 0), ("num_attention_heads", 0), ("num_attention_heads", "8"), ("head_dim", 7),
                           ("num_key_value_heads", 3), ("intermediate_size", -1), ("vocab_size", 2 ** 40), ("rms_norm_eps", 0),
                           ("rope_theta", -1), ("rope_theta", None), ("max_position_embeddings", 0), ("eos_token_id", "x"),
                           ("eos_token_id", 10 ** 6), ("rope_scaling", {"rope_type": "llama3"}), ("rope_scaling", 5),
                           ("num_hidden_layers", True), ("rope_scaling", crossed)):
            with self.subTest(key=key, value=value):
                path = hf(self.dir / "h", **{key: value})
                self.refused(path)

    def test_numbers_beyond_the_limits_of_the_loader_are_refused(self):
        good = dict(layers=2, width=32, heads=4, kv_heads=2, head_width=8, ffn_width=64, vocabulary=514, context=8192,
                    epsilon=1e-5, theta=5e5, rope=convert.Rope(8, 1, 4, 8192), chat="none", tied=False, begin=258, ends=[3, 5])
        convert.Config(**good).check("x")
        for name, least, most in (
                ("layers", 1, 1024), ("width", 1, 1 << 17), ("heads", 2, 1024), ("kv_heads", 1, 4), ("head_width", 2, 1024),
                ("ffn_width", 1, 1 << 20), ("vocabulary", 259, 1 << 24), ("context", 1, 1 << 20), ("epsilon", 1e-30, 1.0),
                ("theta", 1.0, 1e30), ("factor", 1.001, 1e6), ("low", 1e-6, 3.9), ("high", 1.1, 1e6), ("original", 1, 1 << 20),
                ("begin", 0, 513)):
            def changed(value):
                rope = good["rope"]._replace(**{name: value}) if name in convert.Rope._fields else good["rope"]
                return convert.Config(**{**good, "rope": rope, **({} if name in convert.Rope._fields else {name: value})})
            for value in (least, most):
                self.assertEqual(convert.Config.unpack(changed(value).check("x").pack(), "x").layers, changed(value).layers)
            below, above = (least - 1, most + 1) if isinstance(least, int) else (least * 0.89, most * 1.1)
            for value in (below, above):
                with self.subTest(name=name, value=value), self.assertRaisesRegex(convert.Fail, ERROR[10:]):
                    changed(value).check("x")
        for wrong in (dict(ends=[5, 3]), dict(ends=[3, 3]), dict(ends=[514]), dict(ends=[*range(9)]), dict(epsilon=math.nan),
                      dict(rope=convert.Rope(1, 1, 4, 8192)), dict(rope=convert.Rope(1 + 1e-9, 1, 4, 8192))):
            with self.assertRaisesRegex(convert.Fail, ERROR[10:]):
                convert.Config(**{**good, **wrong}).check("x")
        self.assertRaises(convert.Fail, convert.Config.unpack, convert.Config(**good).pack()[:-1] + b"\1", "x")
        # after the flags too, and for .l3 files
        folder, l3 = hf(self.dir / "h"), self.dir / "x.l3"
        self.assertEqual(run(folder, "-o", l3)[0], 0)
        for source in (folder, l3):
            self.refused(source, "RoPE", arguments=["--rope-factor", "1.000000001"])
        self.refused(hf(self.dir / "long", max_position_embeddings=1 << 21), "context is out of range")
        self.convert(hf(self.dir / "long", max_position_embeddings=1 << 21), "--context", 4096)
        few = dict(checkpoints.weights(SMALL))
        for name in ("tok_embeddings.weight", "output.weight"):
            few[name] = few[name][:-250]
        few = meta(self.dir / "few", vocab_size=SMALL.vocab - 250, tensors=few)
        self.assertEqual(run(few, "-o", self.dir / "few.l3")[0], 0)
        self.refused(self.dir / "few.l3", "--chat: ", arguments=["--chat", "llama3"])

    def test_a_flag_without_an_effect_is_refused(self):
        path, l3, g = hf(self.dir / "h"), self.dir / "x.l3", self.dir / "g.gguf"
        self.assertEqual(run(path, "-o", l3)[0], 0)
        checkpoints.write_gguf(g, SMALL, "bf16")
        for source in (path, l3, g):
            self.refused(source, "--token-names: this flag has no effect", arguments=["--token-names", "hf"])
            self.convert(source, "--chat", "none", "--context", 77, "--rope-factor", 8, "--end-tokens", 5, "--no-hash")
        self.convert(meta(self.dir / "m"), "--token-names", "hf")

    def test_a_pickle_that_names_anything_else_is_refused_by_that_name(self):
        marker = self.dir / "ran"

        class Evil:
            def __init__(self, call, argument):
                self.call, self.argument = call, argument

            def __reduce__(self):
                return self.call, (self.argument,)
        G = checkpoints.Global
        for module, name in (("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"),
                             ("numpy", "load"), ("torch", "load"), ("torch._utils", "_rebuild_qtensor"), ("convert", "say")):
            path = meta(self.dir / f"{module}.{name}")
            evil = Evil(G(module, name), f"touch {marker}")
            checkpoints.write_pth(path / "consolidated.00.pth", {"tok_embeddings.weight": evil})
            self.refused(path, f"nothing of it was run (found {module}.{name}, ")
        self.assertFalse(marker.exists())

    def test_pickles_that_are_no_checkpoints_are_refused(self):
        T, S, G = checkpoints.Tensor, checkpoints.Storage, checkpoints.Global
        whole = S.of(np.zeros((4, 4), np.float32))
        views = [T(whole, (5, 5)), T(whole, (4, 4), (-4, 1), 15), T(whole, (4, 4), offset=1), T(whole, (4, 4), (4, 2)),
                 T(whole, (2, 2, 4)), T(whole, ()), T(whole, (0, 4)), T(S(b"1234", "BFloat16Storage", 2), ("a", 2)),
                 T(S(b"1234", "BFloat16Storage", 10 ** 12), (10 ** 6, 10 ** 6)), G("collections", "OrderedDict"), "text", None]
        for thing in ([1, 2], {"x": 3}, *({"tok_embeddings.weight": view} for view in views)):
            path = meta(self.dir / "m")
            checkpoints.write_pth(path / "consolidated.00.pth", thing)
            self.refused(path, "consolidated.00.pth")

    def test_a_safetensors_header_that_lies_is_refused(self):
        data = bytes(64)
        good = {"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
                "b": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]}}

        def changed(**edits):
            return {**good, "b": {**good["b"], **edits}}
        for what, header in {
                "outside": changed(data_offsets=[32, 96]), "overlap": changed(data_offsets=[16, 48]), "a list": [1],
                "gap": changed(data_offsets=[40, 72]), "backwards": changed(data_offsets=[64, 32]), "text": {**good, "b": "x"},
                "wrong size": changed(shape=[15]), "another type": changed(dtype="F32"), "unknown type": changed(dtype="F7"),
                "negative": changed(shape=[-16]), "fraction": changed(shape=[16.0]), "huge": changed(shape=[2 ** 62, 2 ** 62]),
                "no offsets": {"a": {"dtype": "F32", "shape": [2, 4]}}, "short": {"a": good["a"]},
                "three offsets": changed(data_offsets=[32, 64, 64])}.items():
            with self.subTest(what):
                path = hf(self.dir / "h")
                text = json.dumps(header).encode()
                (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
                self.refused(path, "model.safetensors: its header is wrong")
        for length, text in ((2 ** 63, b"{}"), (10 ** 9, b"{}"), (4, b"{{{{"), (3, b"\xff\xff\xff"), (100000, b"[" * 100000)):
            (path / "model.safetensors").write_bytes(struct.pack("<Q", length) + text)
            self.refused(path, "model.safetensors: its header is wrong")

    def test_a_gguf_header_that_lies_is_refused(self):
        path = self.dir / "g.gguf"
        checkpoints.write_gguf(path, SMALL, "bf16")
        whole = path.read_bytes()
        key = whole.index(b"tokenizer.ggml.tokens") + 21            # type 9, element type 8, count
        info = whole.index(b"blk.0.attn_q.weight") + 19             # dimensions, sizes, type, offset
        for what, at, value in (
                ("version", 4, struct.pack("<I", 1)), ("big-endian", 4, struct.pack(">I", 3)), ("tensors", 8, b"\xff" * 8),
                ("keys", 16, b"\xff" * 7 + b"\0"), ("list", key + 8, b"\xff" * 6), ("kind", key, b"\x63"),
                ("inner kind", key + 4, b"\x09"), ("dimensions", info, b"\xff" * 4), ("size", info + 4, b"\xff" * 8),
                ("format", info + 20, b"\x63"), ("offset", info + 24, b"\xff" * 7), ("overlap", info + 24, bytes(8))):
            with self.subTest(what):
                path.write_bytes(whole[:at] + value + whole[at + len(value):])
                self.refused(path, "g.gguf")
        path.write_bytes(whole.replace(b"llama-bpe", b"gpt2-bpe!"))
        self.refused(path, "tokenizer.ggml.pre is not that of Llama 3 (found 'gpt2-bpe!', ")
        path.write_bytes(whole.replace(b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama",
                                       b"general.architecture" + struct.pack("<IQ", 8, 5) + b"gemma"))
        self.refused(path, "general.architecture is not that of Llama 3 (found 'gemma', ")

    def test_an_l3_file_that_lies_is_refused(self):
        path = self.dir / "x.l3"
        self.assertEqual(run(hf(self.dir / "h"), "-o", path)[0], 0)
        whole = path.read_bytes()
        for at in (8, 16, 24, 60, 119, 127, 128, 140, 300, 4000, len(whole) - 1):
            data = bytearray(whole)
            data[at] ^= 0xFF
            path.write_bytes(data)
            self.refused(path, "x.l3")
        path.write_bytes(whole + b"\0")
        self.refused(path, "size")

    def test_tokenizers_of_other_models_are_refused(self):
        def edited(**edits):
            path = hf(self.dir / "h")
            doc = json.loads((path / "tokenizer.json").read_text())
            for key, value in edits.items():
                part, key = (doc["model"], key[6:]) if key.startswith("model_") else (doc, key)
                part[key] = value
            (path / "tokenizer.json").write_text(json.dumps(doc))
            return path
        merged = checkpoints.ranked_tokens(SMALL)[-1]
        left, right = (checkpoints.printable(merged[i:i + 1]) for i in (0, 1))
        for edits, part in (({"model_type": "Unigram"}, "(found 'Unigram', "), ({"normalizer": {"type": "NFC"}}, "normalizer is"),
                            ({"model_ignore_merges": False}, "ignore_merges is not that of Llama 3 (found False, "),
                            ({"model_byte_fallback": True}, "byte_fallback"),
                            ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}, "the pre-tokenizer is"),
                            ({"model_merges": [f"{right} {left}"]}, "makes no token"), ({"model_vocab": {"a": 0, "b": 2}}, "gaps"),
                            ({"model_vocab": {"a": 0}, "model_merges": []}, "of the 256 bytes"),
                            ({"model_vocab": {" ": 0}}, "the token ' '"),
                            ({"added_tokens": []}, "<|begin_of_text|>")):
            with self.subTest(part):
                self.refused(edited(**edits), "tokenizer.json", part)
        self.convert(edited(model_ignore_merges=None))
        self.assertIn("does not say ignore_merges", self.said)
        path = hf(self.dir / "split")
        doc = (path / "tokenizer.json").read_text()
        (path / "tokenizer.json").write_text(doc.replace("{1,3}", "{1,2}"))
        self.refused(path, "the pre-tokenizer is")
        path = meta(self.dir / "m")
        for text in (b"\x0a\x0e\x0a\x05<unk>", b"IQ== 0\nIg== 2\n", b"IQ== 0\n!!!! 1\n", b"IQ==\n"):
            (path / "tokenizer.model").write_bytes(text)
            self.refused(path, "tokenizer.model: line ")
        (path / "tokenizer.model").write_bytes(b"")
        self.refused(path, "vocabulary (found 0 and 256 special ones, expected 514)")
        self.convert(edited(model_merges=[]))
        self.assertIn("leaves out 2 that the runtime makes as well", self.said)

    def test_numbers_that_a_format_cannot_hold_are_refused_with_their_place(self):
        def spoilt(value, dtype="F32"):
            def change(parts):
                name = "model.layers.1.mlp.down_proj.weight"
                array = checkpoints.hf_weights(SMALL)[name].copy()
                array[17, 35] = value
                parts[name] = ("F32", array.shape, array.astype("<f4").tobytes())
            return self.rewritten(change)
        for value in (math.nan, math.inf, -math.inf):
            for kind in ALL_TYPES:
                self.refused(spoilt(value), "model.layers.1.mlp.down_proj.weight", "row 17, column 35 is not finite",
                             arguments=["--type", kind])
        for kind in ("q8", "q4"):
            self.refused(spoilt(1e8), "down_proj.weight", "row 17, column 32 needs a scale", arguments=["--type", kind])
        self.convert(spoilt(1e8), "--type", "bf16")
        self.refused(spoilt(3.4e38), "row 17, column 35 is too large for bf16", arguments=["--type", "bf16"])
        self.assertEqual(self.convert(spoilt(3.4e38), "--type", "f32").floats("layers.1.down")[17, 35], np.float32(3.4e38))
        path = self.dir / "q.gguf"
        checkpoints.write_gguf(path, SEGMENTS8, "q8_0")
        tensor = {t.name: t for t in gguf.GGUFReader(path).tensors}["blk.1.attn_v.weight"]
        whole = bytearray(path.read_bytes())
        at = tensor.data_offset + 3 * tensor.data.shape[1] + 34 * 2
        whole[at + 2 + 7] = 0x80
        path.write_bytes(whole)
        self.refused(path, "blk.1.attn_v.weight", "row 3, column 71 is -128")
        whole[at:at + 2] = b"\x00\x7c"
        whole[at + 2 + 7] = 0
        path.write_bytes(whole)
        self.refused(path, "blk.1.attn_v.weight", "row 3, column 64 needs a scale beyond fp16")

    def test_the_source_is_never_written_over(self):
        path = self.dir / "x.l3"
        self.assertEqual(run(hf(self.dir / "h"), "-o", path)[0], 0)
        before = path.read_bytes()
        link = self.dir / "link.l3"
        link.symlink_to(path)
        for out in (path, link):
            status, text = run(path, "-o", out, "--type", "q4")
            self.assertEqual((status, path.read_bytes()), (1, before))
            self.assertIn("the source, which would be overwritten", text)
        model = self.dir / "h" / "model.safetensors"
        self.assertEqual(run(self.dir / "h", "-o", model)[0], 1)

    def test_an_existing_file_is_replaced_only_by_a_whole_one(self):
        path, out = hf(self.dir / "h"), self.dir / "out.l3"
        out.write_text("precious")
        with mock.patch.object(convert, "encode", side_effect=KeyboardInterrupt):
            status, text = run(path, "-o", out)
        self.assertEqual((status, text.splitlines()[-1]), (130, "convert: interrupted. Nothing was written."))
        with mock.patch.object(convert, "encode", side_effect=lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
            self.assertEqual(run(path, "-o", out)[0], 143)
        with mock.patch.object(convert, "encode", side_effect=MemoryError("too much")):
            self.assertEqual(run(path, "-o", out)[0], 1)
        self.assertEqual(out.read_text(), "precious")
        self.assertEqual(sorted(os.listdir(self.dir)), ["h", "out.l3"])
        self.assertEqual(run(path, "-o", out)[0], 0)
        L3(out)

    def test_a_target_that_cannot_be_written_is_named(self):
        path = hf(self.dir / "h")
        for out, part in ((self.dir / "no" / "x.l3", "its folder does not exist"), (self.dir, "this is not a file"), (Path("/dev/null"), "this is not a file"),
                          (Path("/proc/x.l3"), "/proc/x.l3.part: ")):
            status, text = run(path, "-o", out)
            self.assertEqual(status, 1)
            self.assertRegex(text.splitlines()[-1], ERROR)
            self.assertIn(part, text)
        with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=1000)):
            self.refused(path, "the disk is too full (found 0.00 MB free")

    def test_a_read_only_target_is_named(self):
        path, true_open = hf(self.dir / "h"), open

        def read_only(name, mode="r", *rest, **more):
            if "w" in mode:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
            return true_open(name, mode, *rest, **more)
        with mock.patch("builtins.open", read_only), mock.patch.object(Path, "unlink", side_effect=OSError(errno.EROFS, "read-only")):
            self.refused(path, "x.l3.part: cannot be written (found Read-only file system, ")

    def test_a_disk_that_fills_up_leaves_nothing_behind(self):
        path, out = hf(self.dir / "h", SEGMENTS8), self.dir / "out"
        out.mkdir()

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        result = subprocess.run([sys.executable, CONVERT, path, "-o", out / "x.l3"], preexec_fn=limit, capture_output=True,
                                text=True)
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertRegex(result.stderr.splitlines()[-1], ERROR)
        self.assertIn("x.l3.part: cannot be written (found File too large, ", result.stderr)
        self.assertEqual((os.listdir(out), result.stdout), ([], ""))

    def test_a_missing_gguf_package_is_only_missed_where_it_is_needed(self):
        for kind in ("q4_k", "q8_0"):
            checkpoints.write_gguf(self.dir / f"{kind}.gguf", SEGMENTS8, kind)
        convert.gguf_package.cache_clear()
        with mock.patch.dict(sys.modules, {"gguf": None, "gguf.quants": None}):
            self.refused(self.dir / "q4_k.gguf", "Install it: pip install gguf")
            self.convert(self.dir / "q8_0.gguf")
        convert.gguf_package.cache_clear()

    def test_a_missing_numpy_is_named(self):
        code = "import runpy, sys; sys.modules['numpy'] = None; runpy.run_path(sys.argv[1])"
        result = subprocess.run([sys.executable, "-c", code, CONVERT], capture_output=True, text=True)
        self.assertEqual((result.returncode, len(result.stderr.splitlines())), (1, 1))
        self.assertRegex(result.stderr, ERROR)

    def test_wrong_flags_end_in_one_line_and_status_2(self):
        for arguments, part in (
                (["--type", "q5", "x"], "--type"), (["--nope", "x"], "--nope"), (["x", "-o"], "-o"), ([], "SRC"), (["x", "y"], "y"),
                (["x", "--rope-factor", "much"], "--rope-factor"), (["x", "--rope-factor", "nan"], "--rope-factor"),
                (["x", "--context", "0"], "--context"), (["x", "--chat", "chatml"], "--chat"),
                (["x", "--rope-factor", "1000001"], "--rope-factor"), (["x", "--context", "1048577"], "--context"),
                (["x", "--verify=1"], "--verify"), (["x", "--token-names", "x"], "expected one of llama3, "),
                (["--type", "q9", "x"], "--type: unknown value (found 'q9', expected one of f32, bf16, q8, q4). See --help.")):
            status, text = run(*arguments)
            self.assertEqual((status, len(text.splitlines())), (2, 1), text)
            self.assertRegex(text, ERROR)
            self.assertIn(part, text)
        path = hf(self.dir / "h")
        self.refused(path, "--end-tokens", "'<|nope|>'", arguments=["--end-tokens", "<|nope|>"])
        self.refused(path, "end tokens", arguments=["--end-tokens", "1,2,3,4,5,6,7,8,9"])
        self.refused(path, "end tokens", arguments=["--end-tokens", "100000"])
        few = dict(checkpoints.weights(SMALL))
        for name in ("tok_embeddings.weight", "output.weight"):
            few[name] = few[name][:-250]
        self.refused(meta(self.dir / "few", vocab_size=SMALL.vocab - 250, tensors=few), "--chat", arguments=["--chat", "llama3"])


class CommandLine(Case):
    def test_help_names_every_flag_and_needs_no_file(self):
        result = subprocess.run([sys.executable, CONVERT, "--help"], capture_output=True, text=True)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        for flag in ("--type", "--verify", "--chat", "--rope-factor", "--context", "--end-tokens", "--token-names", "--no-hash",
                     "--debug"):
            self.assertIn(flag, result.stdout)

    @unittest.skipUnless(Path("/proc/self/status").exists(), "no /proc to read the peak of memory from")
    def test_a_large_matrix_is_never_held_whole(self):
        """An embedding of 128256 x 2048 bf16, a hole of 525 MB, which would be 1051 MB as f32, in 300 MB."""
        path, V, D = hf(self.dir / "h", SMALL, vocab_size=128256, hidden_size=2048, head_dim=8, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True), 128256, 2048
        layer = {"self_attn.q_proj": [16, D], "self_attn.k_proj": [16, D], "self_attn.v_proj": [16, D],
                 "self_attn.o_proj": [D, 16], "mlp.gate_proj": [64, D], "mlp.up_proj": [64, D], "mlp.down_proj": [D, 64],
                 "input_layernorm": [D], "post_attention_layernorm": [D]}
        shapes = {"model.embed_tokens.weight": [V, D], "model.norm.weight": [D],
                  **{f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}}
        header, end = {}, 0
        for name, shape in shapes.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
        text = json.dumps(header).encode()
        with open(path / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import convert; status = convert.main(sys.argv[2:]); "
                "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1]); sys.exit(status)")
        result = subprocess.run([sys.executable, "-c", code, CONVERT.parent, path, "-o", self.dir / "x.l3", "--type", "q4",
                                 "--no-hash"], capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertLess(int(result.stdout), 300_000)

    def test_a_run_prints_its_decisions_and_no_progress_bar_into_a_pipe(self):
        path = hf(self.dir / "h")
        result = subprocess.run([sys.executable, CONVERT, path, "-o", self.dir / "x.l3"], capture_output=True, text=True)
        self.assertEqual((result.returncode, result.stdout), (0, ""))
        self.assertEqual([line.split(":")[0] for line in result.stderr.splitlines()],
                         ["chat format", "end tokens", "type", f"wrote {self.dir / 'x.l3'}"])
        self.assertNotIn("\r", result.stderr)

    def test_a_progress_bar_moves_on_a_terminal_and_leaves_no_trace(self):
        """On a terminal of 80 columns, whose bytes are kept as they come; standard output stays empty."""
        path = hf(self.dir / "h", dataclasses.replace(SMALL, name="long", layers=24))
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("<4H", 24, 80, 0, 0))
        process = subprocess.Popen([sys.executable, CONVERT, path, "-o", self.dir / "x.l3"], stdout=subprocess.PIPE, stderr=slave,
                                   env=dict(os.environ, TQDM_MININTERVAL="0"))
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):    # the program's end is an error of the terminal on Linux
            while part := os.read(master, 4096):
                shown += part
        os.close(master)
        self.assertEqual((process.communicate()[0], process.returncode), (b"", 0))
        text = shown.decode().replace("\r\n", "\n")
        percent = [int(found) for found in re.findall(r"\r *(\d+)%\|", text)]
        self.assertGreater(len(set(percent)), 3, text)
        self.assertEqual((percent, percent[0], percent[-1]), (sorted(percent), 0, 100))
        # Everything that a carriage return went back over, which a terminal shows no more, is wiped out by blanks.
        lines = [line.rsplit("\r", 1) for line in text.split("\n")]
        self.assertEqual([line[-1].split(":")[0] for line in lines],
                         ["chat format", "end tokens", "type", f"wrote {self.dir / 'x.l3'}", ""])
        bar = lines[3][0].split("\r")
        self.assertEqual(bar[-1].strip(), "")
        self.assertGreaterEqual(len(bar[-1]), len(bar[-2].rstrip()))


if __name__ == "__main__":
    unittest.main(verbosity=2)
