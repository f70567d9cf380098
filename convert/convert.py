#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["numpy", "gguf", "tqdm"]
# ///
"""Convert the released weights of a Llama 3, 3.1, 3.2 or 3.3 text model to one `.l3` file.

    python3 convert/convert.py Llama-3.2-1B-Instruct                 a Meta or a Hugging Face folder
    python3 convert/convert.py model-Q8_0.gguf -o model.l3           a GGUF file, or any part of a split one
    python3 convert/convert.py model.l3 --type q4 -o small.l3        an .l3 file, to change its number format

The file format is FORMAT.md beside this file. From top to bottom:

    1  Tensors of a source   element types; rows on demand; shards joined, heads reordered
    2  Number formats        floats to f32, bf16, q8, q4; rows to panels and back
    3  Configuration         what the forward pass needs, and the list of tensors that follows from it
    4  Tokenizer             ranks and special tokens
    5  Sources               MetaFolder, HuggingFaceFolder, GgufFile, L3File: alike to all that follows
    6  Writing               the file, its checksums, --verify
    7  Command line

Most sources need numpy only. The package gguf decodes K-quants; tqdm draws the progress bar on a terminal.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

try:
    import numpy as np
except ImportError:
    sys.exit("convert: numpy: this Python package is missing (found no numpy, expected numpy to be installed). Install it: "
             "pip install numpy, or let uv do it: uv run convert/convert.py SRC.")

VERSION = "1.0"
AGAIN = "It is truncated or damaged: download it again."
TOGETHER = "Take all files from one download."
ONLY = "Only Llama 3 text models can be converted."
FULL = "Convert the bf16 release of this model instead."


class Fail(Exception):
    """What a user sees when something is wrong, in one line: where: what is wrong (found X, expected Y). What to do."""

    def __init__(self, where: object, what: str, found: object, expected: object, to_do: str):
        found = found if str(found).strip() else "nothing"
        super().__init__(" ".join(f"{where}: {what} (found {found}, expected {expected}). {to_do}".split()))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ═══ 1  Tensors of a source ══════════════════════════════════════════════════════════════════════════════════════════
# A tensor is never held whole: 8B models must convert in less than 3 GB. It is read a few rows at a time, as raw bytes,
# so that joining shards and reordering heads are the same few lines for every element type.


class Type(NamedTuple):
    """An element type of a source: `size` bytes hold `block` neighbouring columns."""
    name: str
    block: int
    size: int


F32, F16, BF16, FP8 = Type("F32", 1, 4), Type("F16", 1, 2), Type("BF16", 1, 2), Type("F8_E4M3", 1, 1)
SCALED_FP8 = Type("F8_E4M3", 1, 4)    # multiplied with its scales already, so f32
I8, U8 = Type("I8", 1, 1), Type("U8", 1, 1)
Q8_0, Q4_0 = Type("Q8_0", 32, 34), Type("Q4_0", 32, 18)
BLOCKS = {Q8_0: np.dtype([("scale", "<u2"), ("values", "i1", 32)]),
          Q4_0: np.dtype([("scale", "<u2"), ("values", "u1", 16)])}    # columns 0-15 in the low, 16-31 in the high bits

# float8 e4m3fn: bias 7, no infinities, all ones is NaN
FP8_VALUES = np.array([math.nan if code & 127 == 127 else (-1) ** (code >> 7) * math.ldexp(
    (code & 7) + 8 * (code & 120 > 0), max(code >> 3 & 15, 1) - 10) for code in range(256)], np.float32)


@dataclasses.dataclass(frozen=True)
class Tensor:
    where: str                                # for messages: file and name
    type: Type
    shape: tuple
    read: Callable[[int, int], np.ndarray]    # rows [first, last) as uint8 [last - first, bytes per row]

    @property
    def rows(self) -> int:                    # a tensor of one dimension has one row
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        return -(-self.columns // self.type.block) * self.type.size

    def blocks_of_rows(self) -> Iterator[tuple]:
        """Cuts the rows in ranges of whole panels whose f32 fit in the caches: twice as fast as ranges of 4 MB."""
        step = max(16, (1 << 17) // self.columns // 16 * 16)
        return ((first, min(first + step, self.rows)) for first in range(0, self.rows, step))

    def floats(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last) as f32 [last - first, columns]. Exact: also the product of an fp16 and an int8 fits."""
        values = decode(self.type, self.read(first, last))[:, :self.columns]
        refuse(self, first, ~np.isfinite(values), values, "is not finite", "a finite one", "another copy of the checkpoint")
        return values


class File:
    """A file of the source. Reads are copies, not maps: mapped pages would count as memory of this process."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.handle = open(path, "rb")
            self.size = os.fstat(self.handle.fileno()).st_size
        except OSError as error:
            raise Fail(path, "cannot be opened", error.strerror, "a file that can be read",
                       "Check the name and the permissions.") from None

    def read(self, offset: int, count: int) -> np.ndarray:
        if min(offset, count) < 0 or offset + count > self.size:
            raise Fail(self.path, "the file ends early", f"{self.size} bytes", f"{offset + count} or more", AGAIN)
        data = np.empty(count, np.uint8)
        try:
            self.handle.seek(offset)
            found = self.handle.readinto(data)
        except OSError as error:
            raise Fail(self.path, "cannot be read", error.strerror, f"{count} bytes", "Check the disk.") from None
        if found != count:
            raise Fail(self.path, "the file became shorter while it was read", f"{found} bytes", count, "Convert it again.")
        return data

    def tensor(self, name: str, type: Type, shape: tuple, offset: int) -> Tensor:
        """The usual case: row after row in one piece."""
        def read(first: int, last: int) -> np.ndarray:
            row = tensor.row_bytes
            return self.read(offset + first * row, (last - first) * row).reshape(last - first, row)
        tensor = Tensor(f"{self.path}: tensor {name}", type, shape, read)
        if not shape or shape[-1] % type.block:
            raise Fail(tensor.where, f"the shape does not consist of whole blocks of {type.name}", list(shape),
                       f"rows of a multiple of {type.block}", AGAIN)
        return tensor


def join(where: str, parts: list, axis: int) -> Tensor:
    """Shards joined along their rows (0) or columns (1)."""
    kinds = [f"{list(part.shape)} {part.type.name}" for part in parts]
    if len({(part.type, len(part.shape), part.shape[1 - axis]) for part in parts}) > 1:
        raise Fail(where, "the shards do not fit together", ", ".join(dict.fromkeys(kinds)), "one type and shape", TOGETHER)

    def read(first: int, last: int) -> np.ndarray:
        if axis == 1:
            return np.concatenate([part.read(first, last) for part in parts], axis=1)
        starts = itertools.accumulate([0] + [part.rows for part in parts])
        ranges = [(part, max(first - start, 0), min(last - start, part.rows)) for part, start in zip(parts, starts)]
        return np.concatenate([part.read(lo, hi) for part, lo, hi in ranges if lo < hi])

    shape = [parts[0].rows, parts[0].columns]
    shape[axis] = sum(part.shape[axis] for part in parts)
    return Tensor(where, parts[0].type, tuple(shape), read)


def scaled(tensor: Tensor, scales: Tensor) -> Tensor:
    """fp8 with one scale per row."""
    values = scales.floats(0, scales.rows).reshape(-1, 1)
    if len(values) != tensor.rows:
        raise Fail(scales.where, "the number of scales is wrong", len(values), f"{tensor.rows}, one per row", TOGETHER)
    return dataclasses.replace(tensor, type=SCALED_FP8, read=lambda first, last: (
        tensor.floats(first, last) * values[first:last]).view(np.uint8))


def interleaved(tensor: Tensor, head_width: int) -> Tensor:
    """Hugging Face keeps the halves of a head apart; Meta, GGUF and we keep the two rows that RoPE turns side by side:
    row c E/2 + i of a head becomes row 2i + c, for c = 0, 1."""
    def read(first: int, last: int) -> np.ndarray:
        start, stop = first // head_width * head_width, -(-last // head_width) * head_width
        rows = tensor.read(start, stop)
        pairs = rows.reshape(-1, 2, head_width // 2, rows.shape[1]).swapaxes(1, 2)
        return pairs.reshape(rows.shape)[first - start:last - start]
    return dataclasses.replace(tensor, where=f"{tensor.where} (in Meta's order of rows)", read=read)


def without_copies(tensor: Tensor, head_width: int, copies: int) -> Tensor:
    """Every head is stored several times, one copy after the other: keeps the first."""
    def read(first: int, last: int) -> np.ndarray:
        start, stop = first // head_width, -(-last // head_width)
        rows = tensor.read(start * copies * head_width, stop * copies * head_width)
        stored = rows.reshape(stop - start, copies, head_width, -1)
        if (stored != stored[:, :1]).any():
            raise Fail(tensor.where, "the copies of a key/value head differ", "different numbers", f"{copies} equal copies",
                       TOGETHER)
        return np.ascontiguousarray(stored[:, 0]).reshape(-1, rows.shape[1])[first - start * head_width:][:last - first]
    return dataclasses.replace(tensor, shape=(tensor.rows // copies, tensor.columns), read=read)


def equal(a: Tensor, b: Tensor) -> bool:
    return (a.type, a.shape) == (b.type, b.shape) and all(
        np.array_equal(a.read(*rows), b.read(*rows)) for rows in a.blocks_of_rows())


def decode(type: Type, raw: np.ndarray) -> np.ndarray:
    """Rows of bytes to f32 [rows, columns]."""
    if type in (F32, SCALED_FP8):
        return raw.view("<f4")
    if type == F16:
        return raw.view("<f2").astype(np.float32)
    if type == BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if type == FP8:
        return FP8_VALUES[raw]
    if type in BLOCKS:
        scales, values = split_blocks(type, raw)
        scales = scales.view("<f2").astype(np.float32)
        return (values.reshape(*scales.shape, 32) * scales[..., None]).reshape(len(raw), -1)
    gguf = gguf_package()
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type.name])


def split_blocks(type: Type, raw: np.ndarray) -> tuple:
    """Rows of Q8_0 or Q4_0 to their fp16 scales [rows, blocks] and signed values [rows, columns]."""
    blocks = raw.view(BLOCKS[type])
    values = blocks["values"]
    if type == Q4_0:
        values = np.concatenate([values & 15, values >> 4], axis=2).view(np.int8) - np.int8(8)
    return np.ascontiguousarray(blocks["scale"]), values.reshape(len(raw), -1)


@functools.lru_cache(None)
def gguf_package() -> Any:
    try:
        import gguf
        import gguf.quants
        return gguf
    except ImportError:
        raise Fail("gguf", "this Python package, which decodes the numbers of this file, is missing", "no gguf",
                   "gguf to be installed", "Install it: pip install gguf.") from None


# ═══ 2  Number formats ═══════════════════════════════════════════════════════════════════════════════════════════════
# A matrix of the file is cut in panels of 16 rows, and a panel is a sequence of units along the columns (FORMAT.md,
# section 5). In every format a unit holds 4-byte words of all 16 rows side by side: one f32, two bf16, four q8 values
# or eight q4 values of a row. So packing is the same for all: swap rows and words inside a panel.


class Format(NamedTuple):
    number: int
    unit_columns: int
    unit: np.dtype
    source: Type    # the element type of a source that holds the same numbers

    def bytes(self, rows: int, columns: int) -> int:
        return -(-rows // 16) * -(-columns // self.unit_columns) * self.unit.itemsize


def _unit(words: int, scales: int = 0) -> np.dtype:
    return np.dtype([("words", "<u4", (words, 16))] + [("scales", "<u2", (scales, 16))] * (scales > 0))


FORMATS = {"f32": Format(0, 1, _unit(1), F32), "bf16": Format(1, 2, _unit(1), BF16),
           "q8": Format(2, 64, _unit(16, 2), Q8_0), "q4": Format(3, 64, _unit(8, 2), Q4_0)}


def is_lossless(type: Type, format: str) -> bool:
    """Blocks of a source move to the file without a change. q8 holds those of Q4_0 too, with the same scale."""
    return FORMATS[format].source == type or (type, format) == (Q4_0, "q8")


def encode(tensor: Tensor, format: str, first: int, last: int) -> np.ndarray:
    """Rows [first, last) of a source as the bytes of their panels; first is a multiple of 16."""
    scales = None
    if tensor.type in BLOCKS and is_lossless(tensor.type, format):
        scales, values = split_blocks(tensor.type, tensor.read(first, last))
        refuse(tensor, first, values == -128, values, "is -128, which q8 does not have", "-127 to 127", "--type bf16")
    else:
        values = tensor.floats(first, last)
        if format == "bf16":
            exact, values = values, to_bf16(values)
            refuse(tensor, first, values & 0x7FFF == 0x7F80, exact, "is too large for bf16", "at most 3.38e38", "--type f32")
        elif format in ("q8", "q4"):
            scales, values = (quantize_q8 if format == "q8" else quantize_q4)(pad(values, 1, 32))
    if scales is not None:
        refuse(tensor, first, scales & 0x7C00 == 0x7C00, scales.view("<f2"), "needs a scale beyond fp16", "at most 65504",
               "--type bf16", 32)
        scales = pad(scales, 16, 2)
    values = pad(values, 16, FORMATS[format].unit_columns)
    if format == "q4":    # of eight columns the first four in the low, the others in the high four bits
        bits = (values + np.int8(8)).view(np.uint8).reshape(len(values), -1, 2, 4)
        values = (bits[:, :, 0] | bits[:, :, 1] << 4).reshape(len(values), -1)
    return pack(format, values, scales)


def pad(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Filled up with zeros to multiples of these."""
    missing = [(0, -len(values) % rows), (0, -values.shape[1] % columns)]
    return np.pad(values, missing) if missing != [(0, 0), (0, 0)] else values


def refuse(tensor: Tensor, first: int, bad: np.ndarray, found: np.ndarray, what: str, expected: str, instead: str,
           columns: int = 1) -> None:
    """Each of `bad` and `found` stands for so many columns of the tensor."""
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise Fail(tensor.where, f"the number in row {first + row}, column {columns * column} {what}", found[row, column],
                   expected, f"Use {instead}.")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def quantize_q8(values: np.ndarray) -> tuple:
    """d = max|x| / 127 of 32 columns; x / d to the nearest integer, halves away from zero."""
    largest = np.abs(values).reshape(-1)
    for _ in range(5):    # 32 to 1 by halves: four times as fast as numpy's max over a short axis
        largest = np.maximum(largest[0::2], largest[1::2])
    scales = largest.reshape(len(values), -1) / np.float32(127)
    steps = values.reshape(*scales.shape, 32) * reciprocal(scales)[..., None]
    steps += np.copysign(np.float32(0.49999997), steps)    # just below 1/2: 1/2 would round 0.49999997 up to 1
    return to_f16(scales), steps.astype(np.int8).reshape(values.shape)


# What a scale of q4 makes of the value of largest magnitude of its block, for each scale that is tried. Squared errors with these
# are 10 % below those of Q4_0 (Gaussian, Laplacian and trained weights); a search in steps of 0.1 gains 0.4 % more.
Q4_PEAKS = (-8.7, -8.3, -7.8, -7.2)


def quantize_q4(values: np.ndarray) -> tuple:
    """d of the least squared error that was found for 32 columns; x / d to the nearest integer from -8 to 7. Three kinds of d
    compete: Q4_0's, (the value of largest magnitude, with its sign) / -8, so that no block is worse than there; the best of
    Q4_PEAKS, each replaced by what suits its integers n best, sum(x n) / sum(n n); and (that value) / 1 to 7, one of which finds
    the d of a block that consists of multiples of an fp16 number already."""
    x = np.ascontiguousarray(values.reshape(-1, 32).T)    # [32, blocks]: sums over a block are sums of rows, which are fast
    largest, smallest = x.max(0), x.min(0)
    peak = np.where(largest > -smallest, largest, smallest)
    equal = np.flatnonzero(largest == -smallest)    # argmax for all would take a fifth of the time
    peak[equal] = x[np.abs(x[:, equal]).argmax(0), equal]
    inverse, most, best = reciprocal(peak), np.zeros_like(peak), np.zeros_like(peak)

    def measure(x: np.ndarray, scales: np.ndarray) -> tuple:
        d = scales.view("<f2").astype(np.float32)
        n = nearest(x, reciprocal(d))
        return n, np.add.reduce((x - n * d) ** 2, 0)

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):    # NaN is never better than anything
        for steps in Q4_PEAKS:
            n = nearest(x, inverse * np.float32(steps))
            mixed, squares = np.add.reduce(x * n, 0), np.add.reduce(n * n, 0)
            gain = mixed * mixed / squares    # the squared error is sum(x x) less this
            better = gain > most
            most[better], best[better] = gain[better], mixed[better] / squares[better]
        scales, fine = to_f16(peak / np.float32(-8)), to_f16(best)
        (n, error), (fine_n, fine_error) = measure(x, scales), measure(x, fine)
        better = fine_error < error
        scales, n, error = np.where(better, fine, scales), np.where(better, fine_n, n), np.where(better, fine_error, error)
        for steps in range(1, 8):    # a look at four columns rules out nearly every block
            few = x[:4] * (inverse * np.float32(steps))
            some = np.flatnonzero((np.abs(few - np.rint(few)) < 1e-3).all(0) & (error > 0))
            exact = to_f16(peak[some] / np.float32(steps))
            exact_n, exact_error = measure(x[:, some], exact)
            some, kept = some[exact_error == 0], exact_error == 0
            scales[some], n[:, some], error[some] = exact[kept], exact_n[:, kept], 0
    return scales.reshape(len(values), -1), np.ascontiguousarray(n.astype(np.int8).T).reshape(values.shape)


def nearest(x: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """x / d as integers of q4."""
    n = x * inverse
    return np.clip(np.rint(n, out=n), np.float32(-8), np.float32(7), out=n)


def reciprocal(scales: np.ndarray) -> np.ndarray:
    """1/d, and 0 where |d| is at most 1e-35, which fp16 does not hold and for which 1/d may be infinite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    inverse[np.abs(scales) <= np.float32(1e-35)] = 0
    return inverse


def to_f16(scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):    # an infinite one is refused by `encode`, which knows the tensor
        return scales.astype("<f2").view("<u2")


def pack(format: str, values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Encoded rows to the bytes of their panels."""
    unit = FORMATS[format].unit
    words = np.ascontiguousarray(values).view("<u4").reshape(len(values) // 16, 16, -1, unit["words"].shape[0])
    units = np.empty((words.shape[0], words.shape[2]), unit)
    units["words"] = words.transpose(0, 2, 3, 1)
    if scales is not None:
        units["scales"] = scales.reshape(len(words), 16, -1, 2).transpose(0, 2, 3, 1)
    return units.view(np.uint8).reshape(-1)


def unpack(format: str, panels: np.ndarray, columns: int) -> np.ndarray:
    """The bytes of panels back to rows of the source type that holds the same numbers."""
    _, unit_columns, unit, source = FORMATS[format]
    units = panels.view(unit).reshape(-1, -(-columns // unit_columns))
    rows = 16 * len(units)
    values = np.ascontiguousarray(units["words"].transpose(0, 3, 1, 2)).reshape(rows, -1).view(np.uint8)
    if source not in BLOCKS:
        return np.ascontiguousarray(values[:, :columns * source.size])
    blocks = np.empty((rows, -(-columns // 32)), BLOCKS[source])
    blocks["scale"] = units["scales"].transpose(0, 3, 1, 2).reshape(rows, -1)[:, :blocks.shape[1]]
    values = values.reshape(rows, -1, 32 if source == Q8_0 else 16)[:, :blocks.shape[1]]
    if source == Q4_0:    # from halves of eight columns to halves of 32
        values = np.stack([values.reshape(*values.shape[:2], 4, 4) & 15, values.reshape(*values.shape[:2], 4, 4) >> 4], 3)
        values = values.reshape(*values.shape[:2], 2, 16)
        values = values[:, :, 0] | values[:, :, 1] << 4
    blocks["values"] = values.view(blocks["values"].dtype)
    return blocks.view(np.uint8).reshape(rows, -1)


# ═══ 3  Configuration ════════════════════════════════════════════════════════════════════════════════════════════════

CHATS = ("none", "llama3", "llama3.1", "llama3.2")


def single(value: float) -> float:
    """As f32, the type that the file has for it; too large ones are infinite."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


class Rope(NamedTuple):
    """Llama 3.1's scaling: wavelengths over original / low are slowed by factor, those under original / high are kept."""
    factor: float = 1
    low: float = 1
    high: float = 1
    original: int = 0

    def with_factor(self, factor: float) -> Rope:
        """The same with another factor; borders that are not given are those of all releases."""
        if factor == 1:
            return Rope()
        return Rope(factor, 1, 4, 8192) if self.factor == 1 else self._replace(factor=factor)

    def divisors(self, theta: float, head_width: int) -> np.ndarray:
        """What the frequency of each pair is divided by, f32 from the wavelength on, as in published files."""
        factor, low, high, one = map(np.float32, (self.factor, self.low, self.high, 1))
        if factor == 1:
            return np.ones(head_width // 2, np.float32)
        wavelength = 2 * math.pi * theta ** (np.arange(0, head_width, 2) / head_width)
        smooth = (np.float32(self.original) / wavelength.astype(np.float32) - low) / (high - low)
        blend = one / ((one - smooth) / factor + smooth)
        return np.where(wavelength < self.original / high, one, np.where(wavelength > self.original / low, factor, blend))


@dataclasses.dataclass
class Config:
    """Section 2 of FORMAT.md, in its order."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    vocabulary: int
    context: int
    epsilon: float
    theta: float
    rope: Rope
    chat: str
    tied: bool
    begin: int
    ends: list

    LAYOUT = "<8I 5f I 2I 2I 2I 8I 16x"

    # What a loader accepts, as in llama3.hpp, section 14. Those of f32 are compared as f32.
    LIMITS = {"layers": (1, 1024), "width": (1, 1 << 17), "heads": (1, 1024), "kv_heads": (1, 1024), "head_width": (2, 1024),
              "ffn_width": (1, 1 << 20), "vocabulary": (256, 1 << 24), "context": (1, 1 << 20), "epsilon": (1e-30, 1.0),
              "theta": (1.0, 1e30), "factor": (1.0, 1e6), "low": (1e-6, 1e6), "high": (1e-6, 1e6), "original": (0, 1 << 20)}

    def check(self, where: object) -> Config:
        """A source whose numbers a loader would refuse is refused here, before any work."""
        def need(good: bool, what: str, found: object, expected: object) -> None:
            if not good:
                raise Fail(where, what, found, expected,
                           "Check the configuration of the source, and the flags that change it.")
        for name, (least, most) in self.LIMITS.items():
            value = getattr(self.rope if name in Rope._fields else self, name)
            stored = single if isinstance(most, float) else int
            text = ("RoPE " if name in Rope._fields else "") + name.replace("_", " ")
            need(stored(least) <= stored(value) <= stored(most), f"{text} is out of range", value, f"{least} to {most}")
        need(self.heads % self.kv_heads == 0, "the query heads cannot share the key/value heads evenly",
             f"{self.kv_heads} key/value heads", f"a divisor of the {self.heads} query heads")
        need(self.head_width % 2 == 0, "the head width is odd", self.head_width, "an even number")
        factor, low, high, original = map(single, self.rope)
        need((low, high, original) == (1, 1, 0) if factor == 1 else low < high and original > 0,
             "the RoPE scaling makes no sense", "factor {:g}, low {:g}, high {:g}, original context {}".format(*self.rope),
             "low < high and an original context; 1, 1, 0 for the factor 1")
        need(0 <= self.begin < self.vocabulary, "the begin-of-text token is out of range", self.begin,
             f"0 to {self.vocabulary - 1}")
        need(self.ends == sorted({end for end in self.ends if 0 <= end < self.vocabulary}) and len(self.ends) <= 8,
             "the end tokens are wrong", self.ends, f"at most 8, ascending, all below {self.vocabulary}")
        return self

    def segments(self) -> dict:
        """In how many pieces the inner dimension is summed (section 6)."""
        def most(columns: int, heads: int) -> int:
            return next((s for s in (8, 4, 2) if columns % (64 * s) == 0 and heads % s == 0), 1)
        return {"attention_out": most(self.heads * self.head_width, self.heads), "down": most(self.ffn_width, 8)}

    def tensors(self) -> dict:
        """Names and shapes in the order of the file."""
        D, F, V = self.width, self.ffn_width, self.vocabulary
        HE, KE = self.heads * self.head_width, self.kv_heads * self.head_width
        layer = {"attention_norm": (D,), "query": (HE, D), "key": (KE, D), "value": (KE, D), "attention_out": (D, HE),
                 "ffn_norm": (D,), "gate": (F, D), "up": (F, D), "down": (D, F)}
        return {"embedding": (V, D), **{f"layers.{i}.{name}": shape for i in range(self.layers)
                                        for name, shape in layer.items()},
                "final_norm": (D,), **({} if self.tied else {"output": (V, D)})}

    def pack(self) -> bytes:
        return struct.pack(
            self.LAYOUT, self.layers, self.width, self.heads, self.kv_heads, self.head_width, self.ffn_width,
            self.vocabulary, self.context, self.epsilon, self.theta, *self.rope, CHATS.index(self.chat), self.tied,
            *self.segments().values(), self.begin, len(self.ends), *self.ends, *[0] * (8 - len(self.ends)))

    @classmethod
    def unpack(cls, data: bytes, where: object) -> Config:
        f = struct.unpack(cls.LAYOUT, data)
        if f[14] >= len(CHATS) or f[15] > 1 or f[19] > 8:
            raise Fail(where, "the configuration has unknown values",
                       f"chat format {f[14]}, tied {f[15]}, {f[19]} end tokens", f"at most {len(CHATS) - 1}, 1 and 8",
                       "Use a newer convert.py.")
        config = cls(*f[:10], Rope(*f[10:14]), CHATS[f[14]], bool(f[15]), f[18], list(f[20:20 + f[19]])).check(where)
        if config.pack() != data:
            raise Fail(where, "the configuration has wrong segments or unused bytes", f"segments {f[16]} and {f[17]}",
                       "segments {} and {}, unused bytes 0".format(*config.segments().values()), "Convert the model again.")
        return config


# ═══ 4  Tokenizer ════════════════════════════════════════════════════════════════════════════════════════════════════

BEGIN, END, EOM, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"

# The published split. With another one the runtime would cut text in other words than the model was trained on.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
PRE_TOKENIZER = [{"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                 {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]

# The special tokens by distance from the first one, in four schemes. All others are reserved ones, counted from 0.
_llama3 = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_hf = {**_llama3, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
TOKEN_NAMES = {"llama3": _llama3, "llama3.1": {**_hf, 5: "step_id"}, "llama3.2": {**_hf, 5: "step_id", 11: "image"},
               "hf": _hf}

# GPT-2's way to write bytes as visible characters: visible ones stand for themselves, the others for U+0100 and up.
_visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {**{byte: 0xFFFF for byte in range(256)}, **{byte: byte for byte in _visible},
           **{256 + i: byte for i, byte in enumerate(sorted(set(range(256)).difference(_visible)))}}


def special_names(scheme: str, count: int) -> list:
    named, reserved = TOKEN_NAMES[scheme], itertools.count()
    return [f"<|{named[i]}|>" if i in named else f"<|reserved_special_token_{next(reserved)}|>" for i in range(count)]


def visible_to_bytes(token: str, where: object) -> bytes:
    try:
        return token.translate(BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        bad = next(character for character in token if ord(character) not in BYTE_OF or BYTE_OF[ord(character)] > 255)
        raise Fail(where, f"the token {token!r} is not one of a byte-level BPE", repr(bad),
                   "characters that stand for bytes", ONLY) from None


@dataclasses.dataclass
class Tokenizer:
    ranks: list      # bytes of each token; id = rank
    specials: dict   # id -> literal name

    @functools.cached_property
    def ids(self) -> dict:
        return {name: number for number, name in self.specials.items()}

    def check(self, where: object, vocabulary: int) -> Tokenizer:
        def need(good: bool, what: str, found: object, expected: object) -> None:
            if not good:
                raise Fail(where, what, found, expected, "Take tokenizer and weights from the same release of Llama 3.")
        count, different = len(self.ranks), len(set(self.ranks) - {b""})
        need(different == count, "a token is empty or occurs twice", f"{different} different tokens", count)
        lost = {bytes([b]) for b in range(256)}.difference(self.ranks)
        need(not lost, "some of the 256 bytes are no tokens", f"{256 - len(lost)} without {min(lost, default=b'').hex()}", 256)
        need(all(name.isprintable() for name in self.ids), "a special token has a name that cannot be shown",
             next((repr(name)[:80] for name in self.ids if not name.isprintable()), ""), "printable characters")
        need(len(set(self.ids) - {""}) == len(self.specials), "a special token has no name, or that of another",
             f"{len(set(self.ids) - {''})} names", len(self.specials))
        need(count <= vocabulary, "there are more tokens than the vocabulary has", count, f"at most {vocabulary}")
        for number, name in self.specials.items():
            need(count <= number < vocabulary, f"the special token {name} has a wrong id", number,
                 f"{count} to {vocabulary - 1}")
        need(BEGIN in self.ids, "a special token is missing", f"{len(self.ids)} without {BEGIN}", BEGIN)
        return self

    def pack(self) -> bytes:
        def strings(items: list) -> bytes:
            return np.cumsum([0, *map(len, items)]).astype("<u4").tobytes() + b"".join(items)
        numbers = sorted(self.specials)
        head = struct.pack("<2I", len(self.ranks), len(numbers)) + strings(self.ranks)
        return (head + bytes(-len(head) % 4) + np.array(numbers, "<u4").tobytes()
                + strings([self.specials[number].encode() for number in numbers]))

    @classmethod
    def unpack(cls, data: bytes, where: object) -> Tokenizer:
        stream = io.BytesIO(data)

        def take(count: int) -> bytes:
            piece = stream.read(count)
            if len(piece) != count:
                raise Fail(where, "the tokenizer section is too short", f"{len(piece)} bytes", count,
                           "Convert the model again.")
            return piece

        def numbers(count: int) -> list:
            return np.frombuffer(take(4 * count), "<u4").tolist()

        def strings(count: int) -> list:
            starts = numbers(count + 1)
            text = take(starts[-1])
            return [text[start:stop] for start, stop in zip(starts, starts[1:])]

        count, specials = numbers(2)
        ranks = strings(count)
        take(-stream.tell() % 4)
        ids = numbers(specials)
        return cls(ranks, dict(zip(ids, (name.decode("utf-8", "replace") for name in strings(specials)))))


def read_tiktoken(path: Path) -> list:
    """Meta's tokenizer.model: lines of base64(token) SPACE rank, in the order of the ranks."""
    ranks = []
    for line in read_bytes(path).splitlines():
        try:
            token, rank = line.split()
            ranks.append(base64.b64decode(token, validate=True))
            if int(rank) != len(ranks) - 1:
                raise ValueError
        except ValueError:
            raise Fail(path, f"line {len(ranks) + 1} is wrong", repr(line[:40]), "base64(token) and the next rank",
                       "Take tokenizer.model from the release; this is another model's (Llama 2?), or damaged.") from None
    return ranks


@contextlib.contextmanager
def shaped(where: object, what: str) -> Iterator[None]:
    """While a document is taken apart: a value of another kind than the code expects is the document's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise Fail(where, f"this is no {what}", f"{type(error).__name__}: {error}", "the fields of one, each of its kind",
                   AGAIN) from None


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Hugging Face's tokenizer.json; whatever in it changes how text is cut must be as the runtime does it."""
    with shaped(path, "tokenizer.json"):
        return tokenizer_of_json(path)


def tokenizer_of_json(path: Path) -> Tokenizer:
    doc = Keys.of_json(path)
    model, split = Keys(path, doc("model", dict)), doc("pre_tokenizer", dict)
    doc.expect("normalizer", None)
    model.expect("type", "BPE", None)
    model.expect("byte_fallback", False, None)
    model.expect("ignore_merges", True, None)    # False: 588 tokens of Llama 3 could not be reached
    if model.values.get("ignore_merges") is None:
        say(f"note: {path} does not say ignore_merges, as those of early 2024; words that are one token stay whole")
    found = [{key: value for key, value in step.items() if key != "trim_offsets"}
             for step in split.get("pretokenizers", [split])]
    if found != PRE_TOKENIZER:
        raise Fail(path, "the pre-tokenizer is not that of Llama 3", json.dumps(found), json.dumps(PRE_TOKENIZER), ONLY)
    added = {entry["id"]: entry["content"] for entry in doc("added_tokens", list)}
    if not all(type(number) is int and type(name) is str for number, name in added.items()):
        raise ValueError("an added token has no number or no name")
    vocabulary = {number: token for token, number in model("vocab", dict).items() if number not in added}
    if sorted(vocabulary) != list(range(len(vocabulary))):
        raise Fail(path, "the ids of the vocabulary have gaps", f"{len(vocabulary)} ids up to {max(vocabulary)}",
                   f"0 to {len(vocabulary) - 1}", AGAIN)
    ranks = [visible_to_bytes(vocabulary[number], path) for number in range(len(vocabulary))]
    check_merges(model("merges", list), ranks, path)
    return Tokenizer(ranks, added)


def check_merges(merges: list, ranks: list, where: object) -> None:
    """The runtime merges by rank and needs no list of merges. That gives the same words if the list has every way to
    cut a token in two others, in the order of the tokens, as those of all releases do."""
    number, given, last = {token: rank for rank, token in enumerate(ranks)}, set(), 0
    for merge in merges:
        pair = tuple(visible_to_bytes(part, where) for part in (merge.split(" ") if isinstance(merge, str) else merge))
        merged = number.get(b"".join(pair), -1)
        if len(pair) != 2 or merged < last or not number.keys() >= set(pair):
            raise Fail(where, "a merge makes no token, or not in the order of their ids", repr(merge)[:80],
                       "two tokens that make the next one", ONLY)
        last = merged
        given.add(pair)
    missing = sum((token[:cut], token[cut:]) not in given for token in ranks for cut in range(1, len(token))
                  if token[:cut] in number and token[cut:] in number)
    if missing:
        say(f"note: {where} lists {len(given)} merges and leaves out {missing} that the runtime makes as well; rare words "
            "may be cut in other tokens")


# ═══ 5  Sources ══════════════════════════════════════════════════════════════════════════════════════════════════════

# Our name of each tensor, and that of Meta, Hugging Face and GGUF, which all end in ".weight".
PLACES = {
    "embedding": ("tok_embeddings", "model.embed_tokens", "token_embd"),
    "attention_norm": ("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "query": ("layers.{}.attention.wq", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "key": ("layers.{}.attention.wk", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "value": ("layers.{}.attention.wv", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "attention_out": ("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "ffn_norm": ("layers.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "gate": ("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "up": ("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "down": ("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    "final_norm": ("norm", "model.norm", "output_norm"),
    "output": ("output", "lm_head", "output"),
}

# Tensors by which one sees what kind of checkpoint this is, when it is none of ours.
FOREIGN = {
    r"\.bias$": "a model with biases", r"\.(SCB|absmax|nested_absmax|quant_map|quant_state.*)$": "a bitsandbytes checkpoint",
    r"\.(qweight|qzeros|g_idx)$": "a GPTQ or AWQ checkpoint", r"\.adaptor\.": "a QLoRA checkpoint",
    r"lora_[AB]": "a LoRA adapter", r"\.(scales|zeros)$": "a SpinQuant or QLoRA checkpoint",
    r"(_exps|experts|moe|ffn_gate_inp)": "a mixture of experts", r"(vision|cross_attn|multi_modal)": "a vision model",
    r"(q|k)_norm\.": "a model with normalised queries and keys",
}


class Keys:
    """The values of a JSON object or of a GGUF header: each of its kind, and there unless it has a default."""

    def __init__(self, where: object, values: dict):
        self.where, self.values = where, values

    @classmethod
    def of_json(cls, path: Path) -> Keys:
        try:
            values = json.loads(read_bytes(path))
        except (ValueError, RecursionError) as error:
            raise Fail(path, "this is not JSON", error, "a JSON object", AGAIN) from None
        if not isinstance(values, dict):
            raise Fail(path, "this is another kind of JSON", type(values).__name__, "an object", AGAIN)
        return cls(path, values)

    def __call__(self, key: str, kind: type, default: Any = None) -> Any:
        value = default if self.values.get(key) is None else self.values[key]    # null is absent
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise Fail(self.where, f"{key} is {'missing' if value is None else 'of the wrong kind'}",
                       "nothing" if value is None else repr(value)[:80], kind.__name__, AGAIN)
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        if self.values.get(key) not in allowed:
            raise Fail(self.where, f"{key} is not that of Llama 3", repr(self.values.get(key))[:80], repr(allowed[0]), ONLY)


def read_bytes(path: Path) -> bytes:
    file = File(path)
    with file.handle:
        return file.read(0, file.size).tobytes()


class Source:
    """A checkpoint: its configuration, its tokenizer, and its tensors by our names. Constructors fill these in."""
    config: Config
    tokenizer: Tokenizer
    tensors: dict
    column: int     # in PLACES

    def __init__(self, path: Path, options: argparse.Namespace):
        self.path, self.options = path, options
        self.files: list = []     # all that is read, for the provenance, and so that none of it is written over
        self.history = ""         # provenance of an .l3 file
        self.decided: set = set()     # options that this source leaves open

    def place(self, name: str) -> str:
        """The source's name of our tensor: layers.3.query is blk.3.attn_q.weight in GGUF."""
        number, part = name.split(".")[1:] if "." in name else ("", name)
        return PLACES[part][self.column].format(number) + ".weight"

    def decide(self, what: str, option: str, value: Any, why: str = "") -> Any:
        """The user's word, else `value`. Said aloud, unless it is the source's own word (no `why`)."""
        self.decided.add(option)
        given = getattr(self.options, option.replace("-", "_"))
        chosen = value if given is None else given
        if given is not None or why:
            text = f"{chosen:g}" if isinstance(chosen, float) else chosen
            say(f"{what}: {text} ({f'by --{option}' if given is not None else f'{why}; override with --{option}'})")
        return chosen

    def finish(self, where: Path, available: dict, numbers: dict, chat: tuple, ends: list, tied: bool | None = None,
               ignored: str = "$^") -> None:
        """Puts the configuration together and picks the model's tensors out of the available ones. Every shape must be
        right; none may be missing, and none left over."""
        for name, (pattern, what) in itertools.product(available, FOREIGN.items()):
            if re.search(pattern, name):
                raise Fail(available[name].where, "this tensor is none of a plain Llama 3", what,
                           "a text model in full precision", FULL)
        if numbers["layers"] > len(available):
            raise Fail(where, "there are fewer tensors than layers", f"{len(available)} tensors",
                       f"9 for each of {numbers['layers']} layers", TOGETHER)
        self.config = config = Config(
            **numbers, chat=self.decide("chat format", "chat", *chat), tied=self.is_tied(available, tied),
            begin=self.tokenizer.ids[BEGIN], ends=self.end_tokens(ends, numbers["vocabulary"]))
        self.check(where)
        shapes = config.tensors()
        names = {self.place(name): name for name in shapes}
        missing = [name for name in names if name not in available]
        if missing:
            raise Fail(self.path, f"the tensor {missing[0]} is missing{also(missing)}",
                       f"{len(names) - len(missing)} tensors", len(names), TOGETHER)
        left = [name for name in available if name not in names and not (config.tied and name == self.place("output"))]
        extra = [name for name in left if not re.search(ignored, name)]
        if extra:
            raise Fail(available[extra[0]].where, "this tensor is not one of a Llama 3" + also(extra),
                       f"{len(available)} tensors", f"the {len(names)} of {config.layers} layers", ONLY)
        if left:
            say(f"note: {left[0]} is left out{also(left)}; it follows from the configuration")
        self.tensors = {ours: available[theirs] for theirs, ours in names.items()}
        for name, tensor in self.tensors.items():
            if tensor.shape != shapes[name]:
                raise Fail(tensor.where, "the shape is wrong", list(tensor.shape), list(shapes[name]), TOGETHER)
            if tensor.type not in (F32, F16, BF16, SCALED_FP8) and tensor.type.block == 1:
                raise Fail(tensor.where, "the type of the numbers is wrong", tensor.type.name, "F32, F16 or BF16", FULL)

    def check(self, where: object) -> None:
        """After all decisions: what a loader or a chat would refuse; and no flag was given in vain."""
        self.config.check(where)
        needed = {START_HEADER, END_HEADER, EOT}
        if self.config.chat != "none" and not needed <= self.tokenizer.ids.keys():
            raise Fail("--chat", f"the chat format {self.config.chat} needs special tokens that this model does not have",
                       ", ".join(sorted(needed & self.tokenizer.ids.keys())), ", ".join(sorted(needed)), "Use --chat none.")
        for option in ("chat", "context", "rope-factor", "token-names"):
            given = getattr(self.options, option.replace("-", "_"))
            if given is not None and option not in self.decided:
                raise Fail(f"--{option}", "this flag has no effect on this source, which says it itself", given,
                           "no such flag", "Leave it out.")

    def is_tied(self, available: dict, declared: bool | None) -> bool:
        """Whether the output matrix is the embedding: by declaration, because there is none, or because they are equal."""
        embedding, output = available.get(self.place("embedding")), available.get(self.place("output"))
        if output is None or embedding is None:
            return declared is not False    # declared as not tied, it will be reported as missing
        same = equal(embedding, output)
        if declared and not same:
            raise Fail(output.where, "the configuration ties this matrix to the embedding, but they differ",
                       "different numbers", "equal ones", "Set tie_word_embeddings to false, or remove the tensor.")
        return same

    def end_tokens(self, given: list, vocabulary: int) -> list:
        names, ids = self.tokenizer.specials, self.tokenizer.ids
        ends = {*given, *(ids[name] for name in (END, EOM, EOT) if name in ids)}
        if self.options.end_tokens is not None:
            items = [item for item in self.options.end_tokens.split(",") if item]
            unknown = [item for item in items if item not in ids and not item.isdecimal()]
            if unknown:
                raise Fail("--end-tokens", "unknown value", repr(unknown[0]), "a special token of this model, or an id",
                           f"Give ids, or names like {EOT}.")
            ends = {ids[item] if item in ids else int(item) for item in items}
        if len(ends) > 8 or any(not 0 <= number < vocabulary for number in ends):
            raise Fail(self.path, "the end tokens are wrong", sorted(ends), f"at most 8, all below {vocabulary}",
                       "Choose them with --end-tokens.")
        shown = ", ".join(f"{number} {names.get(number, '')}".strip() for number in sorted(ends)) or "none"
        say(f"end tokens: {shown} ({'by' if self.options.end_tokens is not None else 'override with'} --end-tokens)")
        return sorted(ends)

    def meta_tokenizer(self, path: Path, is_scaled: bool, vocabulary: int) -> Tokenizer:
        """tokenizer.model has no special tokens: Meta's code adds 256 after the ranks, under names that changed."""
        ranks = read_tiktoken(path)
        scheme = self.decide("special tokens", "token-names", "llama3.2" if is_scaled else "llama3",
                             f"names of {'3.2 and later' if is_scaled else 'Llama 3'}, by use_scaled_rope")
        if vocabulary > len(ranks) + 256:
            raise Fail(path, "there are too few tokens for the vocabulary", f"{len(ranks)} and 256 special ones",
                       vocabulary, AGAIN)
        return Tokenizer(ranks, dict(enumerate(special_names(scheme, max(0, vocabulary - len(ranks))), len(ranks))))

    def chat_by_template(self, template: str, ends: list) -> tuple:
        """The chat format, and why. The template itself is never run."""
        ids = self.tokenizer.ids
        if not {START_HEADER, END_HEADER, EOT} <= ids.keys():
            return "none", "no header tokens"
        if template and START_HEADER not in template:
            return "none", "its chat template is not one of Llama 3"
        if "Cutting Knowledge Date" in template and "strftime_now" in template:
            return "llama3.2", "by its chat template"
        if "Cutting Knowledge Date" in template and "builtin_tools" in template:
            return "llama3.1", "by its chat template"
        if ids[EOT] in ends:
            return "llama3", f"by its {'chat template' if template else 'end tokens, no chat template'}"
        return "none", f"taken for a base model, since it does not say that {EOT} ends its texts"


def also(names: list) -> str:
    return f", and {len(names) - 1} more" if names[1:] else ""


# ─── Meta ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Storage(NamedTuple):
    type: Type
    offset: int    # in the file
    count: int     # elements


class PthReader(pickle._Unpickler):
    """Reads a torch.save archive, which is a zip of a pickle and raw storages, without torch and without running anything
    that the pickle names: every global is one of the few stand-ins below, all others are refused. The base is the
    unpickler in Python: that in C lets three bytes of a damaged file take gigabytes for its table of seen objects."""
    GLOBALS = {
        "collections.OrderedDict": collections.OrderedDict,
        "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *_: (storage, offset, size, stride),
        "torch._utils._rebuild_tensor_v3": lambda storage, offset, size, stride, grad, hooks, type, *_: (
            storage._replace(type=type, count=storage.count // type.size), offset, size, stride),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch.BFloat16Storage": BF16, "torch.HalfStorage": F16, "torch.FloatStorage": F32, "torch.CharStorage": I8,
        "torch.ByteStorage": U8, "torch.storage.UntypedStorage": U8, "torch.float8_e4m3fn": FP8,
    }

    def __init__(self, path: Path):
        self.file = File(path)
        try:
            archive = zipfile.ZipFile(self.file.handle)
            self.members = {member.filename: member for member in archive.infolist()}
            pickles = [name for name in self.members if name.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1 or self.members[pickles[0]].file_size > 1 << 28:
                raise zipfile.BadZipFile("no data.pkl")
            self.top = pickles[0][:-len("data.pkl")]
            super().__init__(io.BytesIO(archive.read(pickles[0])), encoding="utf-8")
            if f"{self.top}byteorder" in self.members and archive.read(f"{self.top}byteorder") != b"little":
                raise zipfile.BadZipFile("it is big-endian")
        except Exception as error:    # zipfile says so in many ways
            raise Fail(path, "this is not a whole file of torch.save", error, "a zip archive with data.pkl",
                       AGAIN) from None

    def tensors(self) -> dict:
        try:
            doc = self.load()
            doc = doc["model"] if isinstance(doc.get("model"), dict) else doc    # some third-party files wrap it
            return {name: self.tensor(str(name), *value) for name, value in doc.items()}
        except Fail:
            raise
        except Exception as error:    # a pickle is a program; a damaged one can fail in any way
            raise Fail(self.file.path, "its pickle is not a dictionary of tensors", f"{type(error).__name__}: {error}",
                       "names and tensors", AGAIN) from None

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.GLOBALS:
            raise Fail(self.file.path, "the pickle names what no checkpoint needs; nothing of it was run",
                       f"{module}.{name}", "tensors of torch", "Do not trust this file: take it from the release.")
        return self.GLOBALS[f"{module}.{name}"]

    def persistent_load(self, pid: tuple) -> Storage:
        _, type, key, _, count = pid
        member = self.members[f"{self.top}data/{key}"]
        local = self.file.read(member.header_offset, 30).tobytes()    # ends in the lengths of the name and extra that follow
        if member.compress_type or member.flag_bits & 1 or member.file_size < count * type.size or local[:2] != b"PK":
            raise Fail(self.file.path, f"its member {member.filename} is too short or packed", f"{member.file_size} bytes",
                       f"{count} {type.name}, not packed", AGAIN)
        return Storage(type, member.header_offset + 30 + sum(struct.unpack("<2H", local[26:])), count)

    def tensor(self, name: str, storage: Storage, offset: int, size: tuple, stride: tuple) -> Tensor:
        """A strided view of a storage, which can be larger, and shared by several tensors."""
        type, where = storage.type, f"{self.file.path}: tensor {name}"
        end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride))
        if len(size) not in (1, 2) or len(stride) != len(size) or min(*size, 1) < 1 or min(offset, *stride) < 0 \
                or end > storage.count or storage.offset + storage.count * type.size > self.file.size:
            raise Fail(where, "its elements are not all inside their storage", f"{list(size)} from {offset} with strides "
                       f"{list(stride)}", f"at most {storage.count} elements", AGAIN)
        pitch, step = (size[-1], *stride)[-2:]
        start = storage.offset + offset * type.size
        if step == 1 and pitch == size[-1]:
            return self.file.tensor(name, type, tuple(size), start)

        def read(first: int, last: int) -> np.ndarray:
            count = (last - first - 1) * pitch + (size[-1] - 1) * step + 1
            flat = self.file.read(start + first * pitch * type.size, count * type.size).view(f"V{type.size}")
            view = np.lib.stride_tricks.as_strided(flat, (last - first, size[-1]), (pitch * type.size, step * type.size))
            return np.ascontiguousarray(view).view(np.uint8).reshape(last - first, -1)
        return Tensor(where, type, tuple(size), read)


class MetaFolder(Source):
    """consolidated.NN.pth, params.json, tokenizer.model."""
    column = 0

    def __init__(self, path: Path, options: argparse.Namespace):
        super().__init__(path, options)
        where, tokenizer = path / "params.json", path / "tokenizer.model"
        params = Keys.of_json(where)
        self.refuse(params)
        found = {p.name for p in path.glob("consolidated.*.pth")}
        names = [f"consolidated.{number:02d}.pth" for number in range(len(found))]
        missing = [name for name in names if name not in found]
        if missing:
            raise Fail(path, f"{missing[0]} is missing", ", ".join(sorted(found)), f"{names[0]} to {names[-1]}",
                       "Download it as well.")
        self.files = [*(path / name for name in names), where, tokenizer]
        shards = [PthReader(path / name).tensors() for name in names]
        available = self.merge([self.without_fp8(number, shard) for number, shard in enumerate(shards)])
        lost = [name for name in map(self.place, ("embedding", "layers.0.gate")) if name not in available]
        if lost:
            raise Fail(path, f"the tensor {lost[0]} is missing", f"{len(available)} other tensors", "those of Llama 3",
                       ONLY)

        layers, width, heads = (params(key, int) for key in ("n_layers", "dim", "n_heads"))
        head_width = params("head_dim", int, width // max(heads, 1))
        kv_heads = self.true_kv_heads(available, params("n_kv_heads", int, heads), head_width, len(names))
        vocabulary = params("vocab_size", int, -1)
        vocabulary = vocabulary if vocabulary > 0 else available[self.place("embedding")].rows

        # params.json has neither the RoPE factor nor the context, and no word on what the model was tuned for.
        is_scaled = params("use_scaled_rope", bool, False)
        is_small = (width, layers) in ((2048, 16), (3072, 28))    # 3.2 1B and 3B, the only ones with factor 32
        why = f"{width} wide, {layers} layers, {'scaled' if is_scaled else 'unscaled'} RoPE"
        factor = params("rope_scaling_factor", float, 32.0 if is_small else 8.0) if is_scaled else 1.0
        self.tokenizer = self.meta_tokenizer(tokenizer, is_scaled, vocabulary).check(tokenizer, vocabulary)
        chat = "llama3" if not is_scaled else "llama3.2" if is_small else "llama3.1"
        self.finish(where, available, dict(
            layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_width=head_width,
            ffn_width=available[self.place("layers.0.gate")].rows, vocabulary=vocabulary,
            context=self.decide("context", "context", 131072 if is_scaled else 8192, why),
            epsilon=params("norm_eps", float), theta=params("rope_theta", float),
            rope=Rope().with_factor(self.decide("RoPE factor", "rope-factor", factor, why))),
            chat=(chat, f"{why}, assumed instruct") if EOT in self.tokenizer.ids else ("none", "no header tokens"), ends=[],
            ignored=r"^rope\.freqs$")

    @staticmethod
    def refuse(params: Keys) -> None:
        """What params.json says about other kinds of checkpoint."""
        values = params.values
        quantised = values.get("quantization_args") or {}
        spins = isinstance(quantised, dict) and quantised.get("spinquant")
        vision = [key for key in values if key.startswith("vision")]
        for found, key, what in ((values.get("lora_args"), "lora_args", "QLoRA"), (spins, "quantization_args", "SpinQuant"),
                                 ("int" in str(quantised), "quantization_args", "4-bit"),
                                 (values.get("moe_args"), "moe_args", "mixture-of-experts"),
                                 (vision, "".join(vision[:1]), "vision")):
            if found:
                raise Fail(params.where, f"this is a {what} checkpoint", key, "a text model in full precision", FULL)

    def without_fp8(self, shard: int, tensors: dict) -> dict:
        """The fp8 release of 405B: a file of scales beside each shard, one for every row of its slices."""
        if all(tensor.type != FP8 for tensor in tensors.values()):
            return tensors
        path = self.path / f"fp8_scales_{shard}.pt"
        scales = PthReader(path).tensors()
        self.files.append(path)
        for name, tensor in tensors.items():
            if tensor.type == FP8:
                key = re.sub(r"layers\.(\d+)\.(feed_forward\.w[123])\.weight", rf"\1_\2_{shard}", name)
                if key not in scales:
                    raise Fail(path, f"the scale {key} is missing", f"{len(scales)} others", "one for each fp8 tensor",
                               TOGETHER)
                tensors[name] = scaled(tensor, scales[key])
        return tensors

    def merge(self, shards: list) -> dict:
        """One checkpoint of N. Norms are whole in every shard; two matrices are cut by columns, all others by rows."""
        def merged(name: str) -> Tensor:
            parts, where = [shard[name] for shard in shards], f"{self.path}: tensor {name}"
            if len(parts[0].shape) == 1:
                if not all(equal(part, parts[0]) for part in parts):
                    raise Fail(where, "the shards do not fit together", "different numbers", "the same in each of them",
                               TOGETHER)
                return parts[0]
            return join(where, parts, 1 if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else 0)

        odd = sorted(set().union(*shards).difference(*[set(shards[0]).intersection(*shards)]))
        if odd:
            raise Fail(self.path, f"the tensor {odd[0]} is not in every shard",
                       f"it in {sum(odd[0] in shard for shard in shards)}", f"it in all {len(shards)}", TOGETHER)
        return shards[0] if len(shards) == 1 else {name: merged(name) for name in shards[0]}

    def true_kv_heads(self, available: dict, stored: int, head_width: int, shards: int) -> int:
        """The 16 shards of 405B hold one key/value head each, so that each of its 8 is stored twice: drops the copies."""
        first = available.get(self.place("layers.0.key"))
        if shards == 1 or stored != shards or first is None or first.rows != stored * head_width:
            return stored
        keys, copies = first.read(0, first.rows).reshape(stored, -1), 1
        while stored % (2 * copies) == 0 and (keys.reshape(-1, 2 * copies, keys.shape[1]) == keys[::2 * copies, None]).all():
            copies *= 2
        if copies > 1:
            say(f"key/value heads: {stored // copies} (the {stored} shards hold each {copies} times)")
            for name in [name for name in available if name.endswith(("attention.wk.weight", "attention.wv.weight"))]:
                available[name] = without_copies(available[name], head_width, copies)
        return stored // copies


# ─── Hugging Face ────────────────────────────────────────────────────────────────────────────────────────────────────

SAFETENSORS = {type.name: type for type in (
    F32, F16, BF16, FP8, I8, U8, *(Type(name, 1, size) for name, size in (
        ("F64", 8), ("I64", 8), ("U64", 8), ("I32", 4), ("U32", 4), ("I16", 2), ("U16", 2), ("BOOL", 1), ("F8_E5M2", 1))))}


def read_safetensors(path: Path) -> dict:
    """u64 length of the header, JSON header, data. All that the header says is checked against the file."""
    file = File(path)

    def lie(what: str, found: object, expected: object) -> Fail:
        return Fail(path, f"its header is wrong: {what}", found, expected, AGAIN)

    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > min(file.size - 8, 100_000_000):
        raise lie("its length", f"{length} bytes", f"at most 100000000 in a file of {file.size}")
    try:
        header = json.loads(file.read(8, length).tobytes())
        entries = [(*entry["data_offsets"], name, entry["dtype"], tuple(entry["shape"]))
                   for name, entry in header.items() if name != "__metadata__"]
        if any(type(n) is not int or n < 0 for begin, end, _, _, shape in entries for n in (begin, end, *shape)):
            raise ValueError("a count is not a whole number")
        if any(type(dtype) is not str for *_, dtype, _ in entries):
            raise ValueError("a dtype is no text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise lie("no list of tensors", f"{type(error).__name__}: {error}", "dtype, shape and data_offsets of each") from None
    start, position, tensors = 8 + length, 0, {}
    for begin, end, name, dtype, shape in sorted(entries):
        if dtype not in SAFETENSORS:
            raise lie(f"the type of tensor {name}", repr(dtype), f"one of {', '.join(SAFETENSORS)}")
        expected = position + math.prod(shape) * SAFETENSORS[dtype].size
        if (begin, end) != (position, expected):
            raise lie(f"the place of tensor {name}, {list(shape)} {dtype}", f"{begin} to {end}", f"{position} to {expected}")
        position = end
        tensors[name] = file.tensor(name, SAFETENSORS[dtype], shape, start + begin)
    if start + position != file.size:
        raise lie("the end of its tensors", start + position, f"{file.size}, the end of the file")
    return tensors


class HuggingFaceFolder(Source):
    """config.json, *.safetensors, tokenizer.json."""
    column = 1

    def __init__(self, path: Path, options: argparse.Namespace):
        super().__init__(path, options)
        where = path / "config.json"
        doc = self.json(where)
        self.refuse(doc)
        layers, width, heads = (doc(key, int) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        head_width, vocabulary = doc("head_dim", int, width // max(heads, 1)), doc("vocab_size", int)
        rope, theta = self.read_rope(doc)
        available = self.without_fp8(self.read_weights())
        self.tokenizer = self.read_tokenizer(rope.factor != 1, vocabulary)
        ends, template = self.read_ends(doc), self.read_template()
        self.finish(where, available, dict(
            layers=layers, width=width, heads=heads, kv_heads=doc("num_key_value_heads", int, heads), head_width=head_width,
            ffn_width=doc("intermediate_size", int), vocabulary=vocabulary,
            context=self.decide("context", "context", doc("max_position_embeddings", int)),
            epsilon=doc("rms_norm_eps", float), theta=theta,
            rope=rope.with_factor(self.decide("RoPE factor", "rope-factor", rope.factor))),
            chat=self.chat_by_template(template, ends), ends=ends, ignored=r"rotary_emb\.inv_freq$",
            tied=doc("tie_word_embeddings", bool) if doc.values.get("tie_word_embeddings") is not None else None)
        for name, tensor in self.tensors.items():
            if name.endswith((".query", ".key")):
                self.tensors[name] = interleaved(tensor, head_width)

    def json(self, path: Path) -> Keys:
        if path not in self.files:
            self.files.append(path)
        return Keys.of_json(path)

    @staticmethod
    def refuse(doc: Keys) -> None:
        """What config.json can say that the forward pass does not do."""
        doc.expect("model_type", "llama")
        doc.expect("architectures", ["LlamaForCausalLM"])
        quantised = doc("quantization_config", dict, {})
        if quantised and quantised.get("quant_method") != "fbgemm_fp8":
            raise Fail(doc.where, "the weights are quantised", quantised.get("quant_method"), "fbgemm_fp8 or none", FULL)
        for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"), ("sliding_window", None),
                           ("partial_rotary_factor", 1), ("num_local_experts", None)):
            doc.expect(key, plain, None)

    @staticmethod
    def read_rope(doc: Keys) -> tuple:
        """rope_theta and rope_scaling, which newer versions of transformers fold into rope_parameters."""
        rope = Keys(doc.where, doc("rope_parameters", dict, doc("rope_scaling", dict, {})))
        theta = (rope if "rope_theta" in rope.values else doc)("rope_theta", float)
        kind = rope("rope_type", str, rope("type", str, "default"))
        if kind == "default":
            return Rope(), theta
        if kind != "llama3":
            raise Fail(doc.where, "the RoPE scaling is not that of Llama 3", repr(kind), "'llama3' or none", ONLY)
        scaling = Rope(*(rope(key, float) for key in ("factor", "low_freq_factor", "high_freq_factor")),
                       rope("original_max_position_embeddings", int))
        return scaling.with_factor(scaling.factor), theta

    def read_weights(self) -> dict:
        """model.safetensors, or the shards of an index: every tensor is in the shard that the index says."""
        single, index_path = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if (self.path / "adapter_config.json").exists():
            raise Fail(self.path, "this is a LoRA adapter", "adapter_config.json", "a whole model",
                       "Merge it with its base model first.")
        if not index_path.exists():
            if not single.exists():
                found = ", ".join(sorted(p.name for p in self.path.glob("*.[sb][ai]*")))
                raise Fail(self.path, "neither model.safetensors nor model.safetensors.index.json is here",
                           found or "no weights", "one of them", "Download it as well.")
            self.files.append(single)
            return read_safetensors(single)
        index = self.json(index_path)("weight_map", dict)
        tensors: dict = {}
        for name in sorted(set(map(str, index.values()))):
            if Path(name).name != name:
                raise Fail(index_path, "it names a file that is not in this folder", repr(name), "names without a folder",
                           AGAIN)
            self.files.append(self.path / name)
            for tensor, value in read_safetensors(self.path / name).items():
                if index.get(tensor) != name:
                    raise Fail(value.where, "the shards do not fit together", f"it in {name}",
                               f"it in {index.get(tensor, 'no file')}, by the index", TOGETHER)
                tensors[tensor] = value
        missing = [name for name in index if name not in tensors]
        if missing:
            raise Fail(self.path / index[missing[0]], f"the tensor {missing[0]} is missing{also(missing)}",
                       f"{len(tensors)} tensors", f"{len(index)}, by the index", TOGETHER)
        return tensors

    @staticmethod
    def without_fp8(tensors: dict) -> dict:
        """fbgemm_fp8: an fp8 `weight`, and `weight_scale` with one scale per row."""
        scales = {name: tensors.pop(name) for name in [name for name in tensors if name.endswith(".weight_scale")]}
        for name, tensor in tensors.items():
            if tensor.type == FP8:
                if f"{name}_scale" not in scales:
                    raise Fail(tensor.where, f"{name}_scale is missing", "no scales", "one for each row of fp8", TOGETHER)
                tensors[name] = scaled(tensor, scales.pop(f"{name}_scale"))
        tensors.update(scales)    # what is left over will be refused
        return tensors

    def read_tokenizer(self, is_scaled: bool, vocabulary: int) -> Tokenizer:
        places = [self.path / name for name in ("tokenizer.json", "original/tokenizer.model", "tokenizer.model")]
        path = next((p for p in places if p.exists()), None)
        if path is None:
            raise Fail(self.path, "neither tokenizer.json nor tokenizer.model is here", "no tokenizer", "one of them",
                       "Download it as well.")
        self.files.append(path)
        if path == places[0]:
            return read_tokenizer_json(path).check(path, vocabulary)
        config = self.tokenizer_config()
        with shaped(config.where, "tokenizer_config.json"):
            specials = {int(number): Keys(config.where, entry)("content", str)
                        for number, entry in config("added_tokens_decoder", dict, {}).items()}
        tokenizer = Tokenizer(read_tiktoken(path), specials) if specials else \
            self.meta_tokenizer(path, is_scaled, vocabulary)
        return tokenizer.check(path, vocabulary)

    def read_ends(self, doc: Keys) -> list:
        path, ends = self.path / "generation_config.json", []
        for keys in [doc] + ([self.json(path)] if path.exists() else []):
            value = keys.values.get("eos_token_id")
            ends += value if isinstance(value, list) else [] if value is None else [value]
            if any(type(number) is not int for number in ends):
                raise Fail(keys.where, "eos_token_id is of the wrong kind", repr(value)[:80], "ids", AGAIN)
        name = self.tokenizer_config().values.get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        return ends + ([self.tokenizer.ids[name]] if isinstance(name, str) and name in self.tokenizer.ids else [])

    def tokenizer_config(self) -> Keys:
        path = self.path / "tokenizer_config.json"
        return self.json(path) if path.exists() else Keys(path, {})

    def read_template(self) -> str:
        """The text of the chat template, or of all of them where there are several."""
        plain = self.path / "chat_template.jinja"
        if plain.exists():
            self.files.append(plain)
            return read_bytes(plain).decode("utf-8", "replace")
        template = self.tokenizer_config().values.get("chat_template")
        return template if isinstance(template, str) else json.dumps(template) if template else ""


# ─── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class GgufReader:
    """One GGUF file: its keys, and its tensors. Every count is checked against the file before it is used."""
    SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
    TYPES = {0: F32, 1: F16, 2: Q4_0, 8: Q8_0, 30: BF16}

    def __init__(self, path: Path):
        self.file, self.position = File(path), 4
        if self.file.size < 32:
            raise self.damaged("it ends inside its header", f"{self.file.size} bytes", "32 or more")
        with mmap.mmap(self.file.handle.fileno(), 0, access=mmap.ACCESS_READ) as self.data:
            version = self.number("I")
            if self.data[:4] != b"GGUF" or version not in (2, 3):
                raise Fail(path, "cannot be read as GGUF", f"{self.data[:4]!r} version {version}",
                           "b'GGUF' version 2 or 3, little-endian", "Make it again with a current llama.cpp.")
            count, keys = self.number("Q"), self.number("Q")
            self.keys = {self.text(): self.value(self.number("I")) for _ in range(keys)}
            entries = []
            for _ in range(count):
                name, shape = self.text(), [self.number("Q") for _ in range(min(self.number("I"), 5))]
                kind, offset = self.number("I"), self.number("Q")
                entries.append((offset, name, kind, tuple(shape[::-1])))    # theirs is the fastest axis first
        alignment = max(Keys(path, self.keys)("general.alignment", int, 32), 1)
        start = end = -(-self.position // alignment) * alignment
        self.tensors: dict = {}
        for offset, name, kind, shape in sorted(entries):
            if name in self.tensors or start + offset < end or len(shape) not in (1, 2) or min(shape) < 1:
                raise self.damaged(f"the tensor {name} overlaps, is a second one or no matrix", f"{list(shape)} at {offset}",
                                   f"one or two dimensions, at {end - start} or later")
            tensor = self.tensors[name] = self.file.tensor(name, self.type(kind, name), shape, start + offset)
            end = start + offset + tensor.rows * tensor.row_bytes
            if end > self.file.size:
                raise self.damaged(f"the tensor {name} ends after the file", end, f"at most {self.file.size}")

    def damaged(self, what: str, found: object, expected: object) -> Fail:
        return Fail(self.file.path, what, found, expected, AGAIN)

    def number(self, format: str) -> Any:
        try:
            value, = struct.unpack_from("<" + format, self.data, self.position)
        except struct.error:
            raise self.damaged("it ends inside its header", f"{self.file.size} bytes", "more") from None
        self.position += struct.calcsize("<" + format)
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > min(self.file.size - self.position, 1 << 26):
            raise self.damaged("a string of its header is too long", f"{length} bytes",
                               f"at most {min(self.file.size - self.position, 1 << 26)}")
        self.position += length
        return self.data[self.position - length:self.position].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind in self.SCALARS:
            return self.number(self.SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if kind != 9 or inner not in (*self.SCALARS, 8) or count > 1 << 24:
            raise self.damaged("its header has a value of an unknown type, or too long a list",
                               f"type {kind}, {count} of type {inner}", f"types 0 to 12, at most {1 << 24} of them")
        return [self.value(inner) for _ in range(count)]

    def type(self, number: int, name: str) -> Type:
        if number in self.TYPES:
            return self.TYPES[number]
        constants = gguf_package().constants
        if number not in list(constants.GGMLQuantizationType):
            raise Fail(f"{self.file.path}: tensor {name}", "its type is unknown", number, "one that the package gguf knows",
                       "Update the package gguf.")
        return Type(constants.GGMLQuantizationType(number).name,
                    *constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType(number)])


class GgufFile(Source):
    """A GGUF file, or all parts of a split one."""
    column = 2

    def __init__(self, path: Path, options: argparse.Namespace):
        match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
        files = [path.with_name(f"{match[1]}-{part:05d}-of-{match[2]}.gguf")
                 for part in range(1, int(match[2]) + 1)] if match else [path]
        super().__init__(files[0], options)
        self.files = files
        readers = [GgufReader(file) for file in files]
        keys = Keys(files[0], readers[0].keys)
        available = {name: tensor for reader in readers for name, tensor in reader.tensors.items()}
        parts, total = keys("split.count", int, 1), keys("split.tensors.count", int, len(available))
        if (max(parts, 1), total) != (len(files), sum(len(reader.tensors) for reader in readers)) or total != len(available):
            raise Fail(path, "the parts do not fit together", f"{len(available)} tensors in {len(files)} parts",
                       f"{total} in {parts}", "Keep the names NAME-00001-of-0000N.gguf, all in one folder.")
        self.refuse(keys)
        layers, width, heads = (keys(f"llama.{key}", int) for key in
                                ("block_count", "embedding_length", "attention.head_count"))
        head_width = keys("llama.attention.key_length", int, width // max(heads, 1))
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            keys.expect(key, head_width, None)
        vocabulary = len(keys("tokenizer.ggml.tokens", list))
        self.tokenizer = self.read_tokenizer(keys).check(files[0], vocabulary)
        ends = [keys(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")
                if f"tokenizer.ggml.{name}_token_id" in keys.values]
        context, theta = keys("llama.context_length", int), keys("llama.rope.freq_base", float)
        rope = self.read_rope(available.pop("rope_freqs.weight", None), theta, head_width, context)
        self.finish(files[0], available, dict(
            layers=layers, width=width, heads=heads, kv_heads=keys("llama.attention.head_count_kv", int, heads),
            head_width=head_width, ffn_width=keys("llama.feed_forward_length", int), vocabulary=vocabulary,
            context=self.decide("context", "context", context), rope=rope, theta=theta,
            epsilon=keys("llama.attention.layer_norm_rms_epsilon", float)),
            chat=self.chat_by_template(keys("tokenizer.chat_template", str, ""), ends), ends=ends)

    @staticmethod
    def refuse(keys: Keys) -> None:
        keys.expect("general.architecture", "llama")
        keys.expect("tokenizer.ggml.model", "gpt2")
        keys.expect("tokenizer.ggml.pre", "llama-bpe", "llama3", "llama-v3")
        keys.expect("llama.expert_count", 0, None)
        keys.expect("llama.attention.sliding_window", 0, None)
        keys.expect("llama.rope.scaling.type", "none", None)

    def read_tokenizer(self, keys: Keys) -> Tokenizer:
        tokens, types = keys("tokenizer.ggml.tokens", list), keys("tokenizer.ggml.token_type", list)
        count = types.index(3) if 3 in types else len(types)
        if len(types) != len(tokens) or types[:count] != [1] * count or 1 in types[count:]:
            raise Fail(self.path, "the token types are wrong",
                       f"{len(types)} for {len(tokens)} tokens, the first special one at {count}",
                       "one for each: ordinary ones (1), then special ones (3)", ONLY)
        ranks = [visible_to_bytes(token, self.path) for token in tokens[:count]]
        check_merges(keys("tokenizer.ggml.merges", list, []), ranks, self.path)
        # 3 control, 4 added by a user; those of type 5 only fill up the vocabulary
        return Tokenizer(ranks, {number: tokens[number] for number, kind in enumerate(types) if kind in (3, 4)})

    def read_rope(self, divisors: Tensor | None, theta: float, head_width: int, context: int) -> Rope:
        """GGUF has no factor, only the divisors that follow from it: finds the factor, and checks them all."""
        if divisors is None:
            why = "" if context <= 8192 else (f"no rope_freqs.weight, for a context of {context}; files of Llama 3.1 made "
                                              "before August 2024 lack it")
            return Rope().with_factor(self.decide("RoPE factor", "rope-factor", 1.0, why))
        values = divisors.floats(0, 1)[0]
        if 2 * values.size != head_width:
            raise Fail(divisors.where, "the number of divisors is wrong", values.size, f"half the head width {head_width}",
                       AGAIN)
        rope = Rope().with_factor(float(values.max()))
        expected = rope.divisors(theta, head_width)
        pair = int(np.argmax(np.abs(values / expected - 1)))
        if abs(values[pair] / expected[pair] - 1) > 1e-4:
            raise Fail(divisors.where, f"divisor {pair} is wrong", f"{values[pair]:.6g}",
                       f"{expected[pair]:.6g} for the factor {rope.factor:g}",
                       "Only the RoPE scaling of Llama 3.1 and later can be converted.")
        return rope.with_factor(self.decide("RoPE factor", "rope-factor", rope.factor))


# ─── .l3 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

MAGIC = b"\x89llama3\n"
ENTRY = "<40s2I5Q2I"


def checksum(data: Any) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class L3File(Source):
    """Our own format: to change its type or configuration, and for --verify."""

    def __init__(self, path: Path, options: argparse.Namespace | None):
        super().__init__(path, options)
        self.files, self.file = [path], File(path)
        head = self.file.read(0, 128).tobytes()
        magic, version, _, size, *sections, digest = struct.unpack("<8s2IQ12QQ", head)
        if magic != MAGIC or version != 1:
            raise Fail(path, "not an .l3 file of version 1", f"{magic!r} version {version}", f"{MAGIC!r} version 1",
                       "Use a newer convert.py.")
        self.need("the header", f"{checksum(head[:120]):016x}", f"{digest:016x}")
        self.need("the size", self.file.size, size)
        config, tokenizer, table, history = (self.section(*sections[i:i + 3]) for i in (0, 3, 6, 9))
        self.need("the configuration", len(config), 128)
        self.config = Config.unpack(config, path)
        self.tokenizer = Tokenizer.unpack(tokenizer, path).check(path, self.config.vocabulary)
        self.history = history.decode("utf-8", "replace")
        self.read_table(table)
        if options is not None:
            self.check_tensors()
            for what, option, key in (("chat format", "chat", "chat"), ("context", "context", "context")):
                setattr(self.config, key, self.decide(what, option, getattr(self.config, key)))
            self.config.rope = self.config.rope.with_factor(
                self.decide("RoPE factor", "rope-factor", self.config.rope.factor))
            if options.end_tokens is not None:
                self.config.ends = self.end_tokens([], self.config.vocabulary)
            self.check(path)

    def need(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            raise Fail(self.path, f"{what} is damaged", found, expected, "Convert the model again.")

    def section(self, offset: int, count: int, digest: int) -> bytes:
        data = self.file.read(offset, count).tobytes()
        self.need(f"the section at {offset}", f"{checksum(data):016x}", f"{digest:016x}")
        return data

    def read_table(self, table: bytes) -> None:
        shapes = self.config.tensors()
        self.need("the tensor table", f"{len(table)} bytes", f"{8 + 96 * len(shapes)} bytes")
        entries = struct.iter_unpack(ENTRY, table[8:])
        self.tensors, self.formats, self.places = {}, {}, {}
        names = {layout.number: format for format, layout in FORMATS.items()}
        for (name, shape), entry in zip(shapes.items(), entries):
            stored, number, dimensions, rows, columns, offset, count, digest, *_ = entry
            self.need("the tensor table", stored.rstrip(b"\0").decode("latin-1"), name)
            format = names.get(number, "f32") if len(shape) == 2 else "f32"
            size = FORMATS[format].bytes(*shape) if len(shape) == 2 else 4 * shape[0]
            self.need(f"tensor {name}", [number, dimensions, rows, columns, count, offset % 64],
                      [FORMATS[format].number, len(shape), *(1, *shape)[-2:], size, 0])
            self.need(f"the end of tensor {name}", max(offset + count, self.file.size), self.file.size)
            self.formats[name], self.places[name] = format, (offset, count, digest)
            self.tensors[name] = self.file.tensor(name, F32, shape, offset) if dimensions == 1 else Tensor(
                f"{self.path}: tensor {name}", FORMATS[format].source, shape, functools.partial(self.rows, name, columns))

    def rows(self, name: str, columns: int, first: int, last: int) -> np.ndarray:
        start, stop = first // 16, -(-last // 16)
        return unpack(self.formats[name], self.panels(name, start, stop), columns)[first - 16 * start:last - 16 * start]

    def panels(self, name: str, start: int, stop: int) -> np.ndarray:
        size = FORMATS[self.formats[name]].bytes(16, self.tensors[name].columns)
        return self.file.read(self.places[name][0] + start * size, (stop - start) * size)

    def check_tensors(self) -> None:
        for name, (offset, count, expected) in self.places.items():
            digest = hashlib.blake2b(digest_size=8)
            for position in range(offset, offset + count, 1 << 22):
                digest.update(self.file.read(position, min(1 << 22, offset + count - position)))
            self.need(f"tensor {name}", digest.digest()[::-1].hex(), f"{expected:016x}")


# ═══ 6  Writing ══════════════════════════════════════════════════════════════════════════════════════════════════════


def format_of(kind: str, name: str, tensor: Tensor) -> str:
    """Norms stay f32; in a q4 file the embedding and the output matrix are q8 (FORMAT.md, section 8)."""
    if len(tensor.shape) == 1:
        return "f32"
    return "q8" if kind == "q4" and name in ("embedding", "output") else kind


class Hashes(threading.Thread):
    """sha256 of the source's files, while the main thread converts. A daemon, so that a failure there need not wait."""

    def __init__(self, paths: list):
        super().__init__(daemon=True)
        self.paths, self.digests, self.error = paths, [], None
        self.start()

    def run(self) -> None:
        try:
            for path in self.paths:
                digest = hashlib.sha256()
                with open(path, "rb") as file:
                    for piece in iter(lambda: file.read(1 << 20), b""):
                        digest.update(piece)
                self.digests.append(digest.hexdigest())
        except OSError as error:
            self.error = error

    def result(self) -> list:
        self.join()
        if self.error:
            raise Fail(self.error.filename, "cannot be read", self.error.strerror, "all its bytes", "Convert it again.")
        return self.digests


def provenance(source: Source, files: list, digests: list) -> bytes:
    root = source.path if source.path.is_dir() else source.path.parent
    lines = [f"source: {model_name(source.path)}", f"converter: llama3.hpp convert.py {VERSION}"]
    lines += [f"sha256 {path.relative_to(root).as_posix()}: {digest}" for path, digest in zip(files, digests)]
    lines += [f"earlier {line}" for line in source.history.splitlines()]
    return "".join(line + "\n" for line in lines).encode("utf-8", "replace")


def write(source: Source, kind: str, part: Path, options: argparse.Namespace) -> None:
    """The layout of the file follows from the configuration. So tensors are written as they are encoded, and what stands
    before them, checksums and hashes, is filled in at the end."""
    weights = () if options.hash else (".pth", ".pt", ".safetensors", ".gguf", ".l3")
    files = [path for path in source.files if path.suffix not in weights]
    hashes = Hashes(files)
    config, tokenizer = source.config.pack(), source.tokenizer.pack()
    history = provenance(source, files, ["0" * 64] * len(files))    # as long as it will be
    sizes = [len(config), len(tokenizer), 8 + 96 * len(source.tensors), len(history)]
    starts = list(itertools.accumulate(sizes, lambda start, size: (start + size + 7) // 8 * 8, initial=128))
    end = -(-starts.pop() // 4096) * 4096
    entries = []
    for name, tensor in source.tensors.items():
        format, start = format_of(kind, name, tensor), -(-end // 64) * 64
        end = start + (FORMATS[format].bytes(*tensor.shape) if len(tensor.shape) == 2 else 4 * tensor.columns)
        entries.append((name, tensor, format, start, end - start))
    free = shutil.disk_usage(part.parent).free
    if free < end:
        raise Fail(part, "the disk is too full", f"{size_text(free)} free", size_text(end),
                   "Free some space, or choose another place with -o.")

    table, segments = struct.pack("<2I", len(entries), 0), source.config.segments()
    with open(part, "wb") as file, progress_bar(sum(t.rows * t.row_bytes for t in source.tensors.values())) as advance:
        for name, tensor, format, start, count in entries:
            digest = hashlib.blake2b(digest_size=8)
            file.write(bytes(start - file.tell()))
            for first, last in tensor.blocks_of_rows():
                data = encode(tensor, format, first, last) if len(tensor.shape) == 2 else tensor.floats(first, last)
                digest.update(data)
                file.write(data)
                advance((last - first) * tensor.row_bytes)
            table += struct.pack(ENTRY, name.encode(), FORMATS[format].number, len(tensor.shape), *(1, *tensor.shape)[-2:],
                                 start, count, int.from_bytes(digest.digest(), "little"),
                                 segments.get(name.split(".")[-1], 1), 0)
        head = MAGIC + struct.pack("<2IQ", 1, 0, end)
        for start, data in zip(starts, (config, tokenizer, table, provenance(source, files, hashes.result()))):
            head += struct.pack("<3Q", start, len(data), checksum(data))
            file.seek(start)
            file.write(data)
        file.seek(0)
        file.write(head + struct.pack("<Q", checksum(head)))
        file.flush()
        os.fsync(file.fileno())    # some file systems find out only here that the disk is full


def verify(source: Source, path: Path) -> None:
    """Reads the file and the source again: every checksum, every panel against a fresh encoding, and every number, as
    decoded from the panels, against the source's, within what the format may round."""
    written = L3File(path, None)
    written.check_tensors()
    if written.config.pack() != source.config.pack() or written.tokenizer != source.tokenizer:
        raise Fail(path, "the configuration or the tokenizer differs from the source's", "other bytes", "the same",
                   "Convert the model again.")
    for name, tensor in source.tensors.items():
        format, back = written.formats[name], written.tensors[name]
        for first, last in tensor.blocks_of_rows():
            wanted, found = tensor.floats(first, last), back.floats(first, last)
            wrong = ~(np.abs(wanted - found) <= tolerance(tensor, format, back, first, last, wanted))
            same = len(tensor.shape) == 1 or np.array_equal(
                written.panels(name, first // 16, -(-last // 16)), encode(tensor, format, first, last))
            if wrong.any() or not same:
                row, column = np.argwhere(wrong)[0] if wrong.any() else (0, 0)
                raise Fail(path, f"tensor {name} is not that of the source near row {first + row}, column {column}",
                           found[row, column], wanted[row, column], "Convert the model again.")
    written.file.handle.close()    # some systems do not rename a file that is open


def tolerance(tensor: Tensor, format: str, back: Tensor, first: int, last: int, wanted: np.ndarray) -> np.ndarray:
    """How far a number of the file may be from that of the source."""
    if format == "f32" or is_lossless(tensor.type, format):
        return np.zeros((1, 1), np.float32)
    if format == "bf16":
        return np.abs(wanted) * np.float32(2 ** -8) + np.float32(2 ** -133)
    # Half a step of q8, and the scale's own rounding to fp16, up to 127 times. In q4 half a step too, or what lies beyond 7 steps.
    scales = np.abs(split_blocks(back.type, back.read(first, last))[0].view("<f2").astype(np.float32))
    steps = np.repeat(scales, 32, axis=1)[:, :tensor.columns]
    if format == "q4":
        return np.maximum(steps * np.float32(0.501), np.abs(wanted) - steps * np.float32(6.999))
    return steps * np.float32(0.5005 + 127 / 2048) + np.float32(127 / 2 ** 25)


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], Any]]:
    """A function that moves a bar on a terminal by so many bytes; it does nothing elsewhere."""
    try:
        import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        yield lambda count: None
    else:
        with tqdm.tqdm(total=total, unit="B", unit_scale=True, leave=False) as bar:
            yield bar.update


# ═══ 7  Command line ═════════════════════════════════════════════════════════════════════════════════════════════════


def open_source(path: Path, options: argparse.Namespace) -> Source:
    """Which of the four kinds this is, by what is there and not by its name."""
    if path.is_dir():
        if (path / "config.json").exists():
            return HuggingFaceFolder(path, options)
        if any(path.glob("consolidated.*.pth")):
            return MetaFolder(path, options)
        found = ", ".join(sorted(child.name for child in path.iterdir())[:5]) or "nothing"
        raise Fail(path, "neither a Meta nor a Hugging Face folder", found, "consolidated.00.pth or config.json",
                   "Give the folder that holds the weights, or the GGUF file itself.")
    with File(path).handle as file:
        start = file.read(8)
    if start[:4] == b"GGUF":
        return GgufFile(path, options)
    if start == MAGIC:
        return L3File(path, options)
    raise Fail(path, "neither a GGUF nor an .l3 file", f"{start!r} at its start", f"b'GGUF' or {MAGIC!r}",
               "For .pth and .safetensors files give the folder that holds them.")


def model_name(path: Path) -> str:
    """Of a file or folder as it is named, not of what a link leads to: caches keep files under their hashes."""
    path = Path(os.path.abspath(path))
    if path.is_dir():
        if path.parent.name == "snapshots":    # of Hugging Face's cache: models--ORGANISATION--NAME/snapshots/HASH
            return path.parent.parent.name.split("--")[-1]
        return path.parent.name if path.name == "original" else path.name
    return re.sub(r"(-00001-of-\d{5})?\.gguf$|(-(f32|bf16|q8|q4))?\.l3$", "", path.name)


def choose_type(source: Source, given: str | None) -> str:
    """q8, unless the source is quantised already. Also says what becomes of quantised tensors."""
    matrices = {name: tensor for name, tensor in source.tensors.items() if len(tensor.shape) == 2}
    amounts: collections.Counter = collections.Counter()
    for tensor in matrices.values():
        amounts[tensor.type] += tensor.rows * tensor.columns
    most = amounts.most_common(1)[0][0]
    same = [format for format, layout in FORMATS.items() if layout.source == most]
    if given:
        kind, why = given, "by --type"
    elif same and (most in BLOCKS or isinstance(source, L3File)):
        kind, why = same[0], "as the source; override with --type"
    elif most.block > 1:
        kind, why = "q8", f"keeps nearly all of {most.name}; --type q4 is half as large and less exact"
    else:
        kind, why = "q8", f"the source is {most.name}; override with --type"
    say(f"type: {kind} ({why})")
    moves = collections.Counter((tensor.type, format_of(kind, name, tensor)) for name, tensor in matrices.items()
                                if tensor.type.block > 1)
    for (type, format), count in moves.items():
        exact = format == "f32" or is_lossless(type, format)
        say(f"{count} {'matrix' if count == 1 else 'matrices'} {type.name} -> {format}: "
            + ("nothing is lost" if exact else "decoded and encoded again, which loses a little"))
    return kind


def size_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def convert(options: argparse.Namespace) -> None:
    started, path = time.monotonic(), Path(options.source)
    if not path.exists():
        raise Fail(path, "there is no such file or folder", "nothing",
                   "a Meta folder, a Hugging Face folder, a .gguf or an .l3 file", "Check the name.")
    source = open_source(path, options)
    kind = choose_type(source, options.type)
    out = Path(options.output or f"{model_name(source.path)}-{kind}.l3")
    part = out.with_name(out.name + ".part")
    if out.exists() and not out.is_file():
        raise Fail(out, "this is not a file", "a folder" if out.is_dir() else "a device", "a file, or nothing yet",
                   "Choose a file name with -o.")
    if not out.parent.is_dir():
        raise Fail(out, "its folder does not exist", "nothing", f"the folder {out.parent}", "Choose a file name with -o.")
    for written, read in itertools.product((out, part), source.files):
        if written.exists() and os.path.samefile(read, written):
            raise Fail(written, "this file is the source, which would be overwritten", read, "another file",
                       "Choose another name with -o.")
    try:
        write(source, kind, part, options)
        if options.verify:
            verify(source, part)
            say(f"verified: {len(source.tensors)} tensors, the tokenizer and all checksums")
        size = part.stat().st_size
        os.replace(part, out)
    except OSError as error:
        todo = "Free some space, or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Choose"
        raise Fail(error.filename or part, "cannot be written", error.strerror, f"room for {out.name}",
                   f"{todo} another place with -o.") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    say(f"wrote {out}: {size_text(size)} in {time.monotonic() - started:.0f} s")


class Usage(Fail):
    """A mistake in the command line."""

    def __init__(self, where: str, what: str, found: object, expected: object):
        super().__init__(where, what, found, expected, "See --help.")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        flag, _, problem = message.replace("argument ", "", 1).partition(": ")
        if problem.startswith("expected"):
            raise Usage(flag, "its value is missing", "nothing", "one value")
        raise Usage(flag, "wrong usage", problem, "as in --help")


def one_of(flag: str, names: Any) -> dict:
    def parse(text: str) -> str:
        if text not in names:
            raise Usage(flag, "unknown value", repr(text), f"one of {', '.join(names)}")
        return text
    return {"type": parse, "metavar": f"{{{','.join(names)}}}"}


def number(flag: str, kind: type, most: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if 1 <= kind(text) <= most:
                return kind(text)
        raise Usage(flag, "unknown value", repr(text), f"{'a whole' if kind is int else 'a'} number from 1 to {most}")
    return parse


def parse_arguments(arguments: list) -> argparse.Namespace:
    parser = Parser(prog="convert.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    description=__doc__.split("\n\nThe file format")[0])
    add = parser.add_argument
    add("source", nargs="?", metavar="SRC", help="Meta folder, Hugging Face folder, GGUF file or .l3 file")
    add("-o", "--output", metavar="OUT", help="file to write (default: NAME-TYPE.l3 in the current folder)")
    add("--type", **one_of("--type", FORMATS),
        help="number format of the matrices (default: q8, or that of a quantised source)")
    add("--verify", action="store_true", help="read the file again and compare every number with the source")
    add("--chat", **one_of("--chat", CHATS), help="chat format (default: by the source)")
    add("--rope-factor", type=number("--rope-factor", float, 1e6), metavar="F",
        help="RoPE scaling: 8 (3.1, 3.3), 32 (3.2), 1 for none")
    add("--context", type=number("--context", int, 1 << 20), metavar="N", help="context length that the model was made for")
    add("--end-tokens", metavar="A,B", help="ids or names of the tokens that end a text")
    add("--token-names", **one_of("--token-names", TOKEN_NAMES),
        help="names of special tokens, where tokenizer.model is the source")
    add("--no-hash", dest="hash", action="store_false", help="leave the sha256 of the weights out of the provenance")
    add("--debug", action="store_true", help="on an error, show where in this program it was found")
    options, rest = parser.parse_known_args(arguments)
    if rest:
        raise Usage(rest[0], "unknown argument", repr(" ".join(rest)), "one source and the flags of --help")
    if options.source is None:
        raise Usage("SRC", "there is no source", "nothing", "a folder, a .gguf or an .l3 file")
    return options


def main(arguments: list) -> int:
    try:
        options = parse_arguments(arguments)
    except Usage as error:
        say(f"convert: {error}")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # an exception, so that the unfinished file is removed
    try:
        convert(options)
        return 0
    except KeyboardInterrupt:
        say("convert: interrupted. Nothing was written.")
        return 130
    except Exception as error:
        if options.debug:
            raise
        fail = error if isinstance(error, Fail) else Fail(
            options.source, "it is damaged, or convert.py has a fault", f"{type(error).__name__}: {error}", "none",
            "Run it again with --debug and report what it shows.")
        say(f"convert: {fail}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
