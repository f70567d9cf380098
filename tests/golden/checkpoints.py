#!/usr/bin/env python3
"""Tiny Llama 3 checkpoints whose weights come from a frozen integer hash: the same bits on every machine, forever.

    checkpoints.py OUT                       every model as a Hugging Face folder OUT/NAME
    checkpoints.py OUT --as meta --shards 2  as Meta folders (those models that Meta's files can express)
    checkpoints.py OUT --as gguf --type q8_0 --only NAME

As a module: MODELS, weights(model), write_hf, write_meta, write_gguf, and the containers write_safetensors and write_pth for
tests that need a strange file. Needs numpy; write_gguf also needs gguf. Never change the values that `weights` gives: the
golden logits beside this file were computed from them.

A weight is k 2^-e with an integer |k| <= 255, so f32, f16 and bf16 hold it exactly and all source formats agree.
"""

import argparse
import base64
import dataclasses
import functools
import io
import json
import math
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict

import numpy as np

# ═══ The models ══════════════════════════════════════════════════════════════════════════════════════════════════════════

# Tokens beyond the 256 bytes; each is a pair of earlier ones, so a prefix of this list is a valid byte-level BPE.
MERGED = [b" t", b"he", b" a", b"in", b" the", b"er", b"on", b"\n\n", b"re", b" w", b"at", b"nd", b"ou", b" and", b"  "]


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    merged: int = 0               # tokens beyond the 256 bytes
    tied: bool = False
    rope_factor: float = 1        # 1: no scaling
    rope_low: float = 1
    rope_high: float = 4
    rope_original: int = 8192
    theta: float = 500000
    context: int = 131072
    eps: float = 1e-5
    embedding_std: float = 1
    branch: float = 0.5           # about the size of what a layer adds to the residual stream, as a share of the embedding
    score: float = 2.7            # about the standard deviation of q.k/sqrt(E); measured ones are in golden.json
    seed: int = 1
    tokenizer: str = ""           # a tokenizer.model to take the tokens from, instead of bytes and MERGED

    @property
    def ranks(self):              # tokens of the byte-pair encoding
        return len(ranked_tokens(self))

    @property
    def vocab(self):              # and the 256 special ones
        return self.ranks + 256

    @property
    def meta_ok(self):            # Meta's params.json has no head width of its own, and nothing about the scaling
        return (self.heads * self.head_dim == self.dim
                and (self.rope_factor == 1 or (self.rope_low, self.rope_high, self.rope_original) == (1, 4, 8192)))


MODELS = [
    # name                        D  L   H  K    E    F
    Model("gqa1_e8",             72, 3,  9, 9,   8, 100, merged=3, context=8192, branch=0.3, score=2.4, seed=11),
    Model("gqa4_e8_tied",        32, 1,  4, 1,   8,  50, merged=1, tied=True, context=8192, seed=12),
    Model("gqa2_e16_tied_f32",   64, 3,  4, 2,  16, 112, tied=True, rope_factor=32, embedding_std=0.01, branch=0.6, seed=13),
    Model("gqa8_e16_short",     128, 5,  8, 1,  16, 160, merged=7, rope_factor=8, rope_original=64, theta=10000, branch=0.4,
          seed=14),
    Model("gqa5_e16_wide",       40, 2,  5, 1,  16,  72, merged=15, context=8192, seed=15),
    Model("gqa1_e64_f8",        192, 3,  3, 3,  64, 200, rope_factor=8, seed=16),
    Model("gqa4_e64_tied_f32",  256, 2,  4, 1,  64, 320, tied=True, rope_factor=32, branch=0.8, score=3.4, seed=17),
    Model("gqa3_e128_f32",       96, 1,  6, 2, 128, 224, merged=2, tied=True, rope_factor=32, branch=0.8, score=3.4, seed=18),
    Model("gqa8_e128_f8",        64, 2,  8, 1, 128,  96, rope_factor=8, seed=19),
    Model("gqa2_e128_f8",       256, 3,  2, 1, 128, 352, merged=5, rope_factor=8, branch=0.35, score=2.4, seed=20),
    Model("segments8",          512, 2, 16, 8,  32, 512, tied=True, rope_factor=32, branch=1.5, seed=21),
    Model("long_f32",            64, 2,  2, 1,  32,  96, rope_factor=32, score=3, seed=22),
]
BY_NAME = {model.name: model for model in MODELS}

# ═══ The weights ═════════════════════════════════════════════════════════════════════════════════════════════════════════


def splitmix(x):
    """One output of splitmix64 per element of the uint64 array x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashes(seed, name, count):
    """`count` 64-bit hashes of (seed, name, index)."""
    key = 0xCBF29CE484222325                                       # FNV-1a of "seed:name"
    for byte in f"{seed}:{name}".encode():
        key = (key ^ byte) * 0x100000001B3 % 2**64
    return splitmix(splitmix(np.uint64(key) + np.arange(count, dtype=np.uint64)))


def normal(seed, name, shape, std):
    """Nearly normal values k 2^-e with |k| <= 255: four 16-bit uniforms summed, scaled in integers."""
    h = hashes(seed, name, math.prod(shape))
    mask = np.uint64(0xFFFF)
    total = sum(((h >> np.uint64(s)) & mask).astype(np.int64) for s in (0, 16, 32, 48)) - 2 * 65535
    e = math.floor(math.log2(72 / std))                            # std 2^e is in (36, 72]; the sum reaches 3.47 std
    multiplier = round(std * 2.0**e / (65536 / math.sqrt(3)) * 2**20)
    k = (total * multiplier + 2**19) >> 20
    assert np.abs(k).max() <= 255 and e <= 24
    return (k.astype(np.float32) * np.float32(2.0**-e)).reshape(shape)


def near_one(seed, name, size):
    """Norm weights: multiples of 1/128 from 0.75 to 1.24."""
    return ((hashes(seed, name, size) % np.uint64(64)).astype(np.float32) + 96) / 128


def token_ids(model, count, salt="tokens"):
    """A reproducible sequence of token ids."""
    return (hashes(model.seed, salt, count) % np.uint64(model.vocab)).astype(np.int32)


def weights(model):
    """All tensors by Meta's names and in Meta's order of rows (RoPE pairs are rows 2i, 2i+1), as float32."""
    m, t = model, OrderedDict()
    wide, narrow = m.heads * m.head_dim, m.kv_heads * m.head_dim
    attention = math.sqrt(m.score / m.dim)                         # q and k elements: std sqrt(score)
    branch = m.branch * m.embedding_std

    def matrix(name, rows, columns, std):
        t[name] = normal(m.seed, name, (rows, columns), std)

    matrix("tok_embeddings.weight", m.vocab, m.dim, m.embedding_std)
    for i in range(m.layers):
        at = f"layers.{i}."
        matrix(at + "attention.wq.weight", wide, m.dim, attention)
        matrix(at + "attention.wk.weight", narrow, m.dim, attention)
        matrix(at + "attention.wv.weight", narrow, m.dim, 1 / math.sqrt(m.dim))
        matrix(at + "attention.wo.weight", m.dim, wide, 1.5 * branch / math.sqrt(wide))
        matrix(at + "feed_forward.w1.weight", m.ffn, m.dim, 1.5 / math.sqrt(m.dim))
        matrix(at + "feed_forward.w2.weight", m.dim, m.ffn, 1.5 * branch / math.sqrt(m.ffn))
        matrix(at + "feed_forward.w3.weight", m.ffn, m.dim, 1 / math.sqrt(m.dim))
        t[at + "attention_norm.weight"] = near_one(m.seed, at + "attention_norm.weight", m.dim)
        t[at + "ffn_norm.weight"] = near_one(m.seed, at + "ffn_norm.weight", m.dim)
    t["norm.weight"] = near_one(m.seed, "norm.weight", m.dim)
    if m.tied:
        t["output.weight"] = t["tok_embeddings.weight"]
    else:
        matrix("output.weight", m.vocab, m.dim, 3 / math.sqrt(m.dim))
    return t


def to_half_split(matrix, heads):
    """Rows of wq or wk from Meta's order (pairs 2i, 2i+1) to Hugging Face's (i, i + E/2)."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_weights(model, tensors=None):
    """The tensors by Hugging Face's names and in its order of rows; `tensors`: other values under Meta's names."""
    w, t = tensors or weights(model), OrderedDict()
    t["model.embed_tokens.weight"] = w["tok_embeddings.weight"]
    for i in range(model.layers):
        at, to = f"layers.{i}.", f"model.layers.{i}."
        t[to + "input_layernorm.weight"] = w[at + "attention_norm.weight"]
        t[to + "mlp.down_proj.weight"] = w[at + "feed_forward.w2.weight"]
        t[to + "mlp.gate_proj.weight"] = w[at + "feed_forward.w1.weight"]
        t[to + "mlp.up_proj.weight"] = w[at + "feed_forward.w3.weight"]
        t[to + "post_attention_layernorm.weight"] = w[at + "ffn_norm.weight"]
        t[to + "self_attn.k_proj.weight"] = to_half_split(w[at + "attention.wk.weight"], model.kv_heads)
        t[to + "self_attn.o_proj.weight"] = w[at + "attention.wo.weight"]
        t[to + "self_attn.q_proj.weight"] = to_half_split(w[at + "attention.wq.weight"], model.heads)
        t[to + "self_attn.v_proj.weight"] = w[at + "attention.wv.weight"]
    t["model.norm.weight"] = w["norm.weight"]
    if not model.tied:
        t["lm_head.weight"] = w["output.weight"]
    return t


def rope_divisors(model):
    """What the 3.1 scaling divides theta^(-2i/E) by: wavelengths in f64, then f32 at every step. For Llama 3.1 8B these are the
    published rope_freqs.weight (sha256 80fd5efb...)."""
    divisors = []
    for i in range(model.head_dim // 2):
        wavelength = 2 * math.pi * model.theta ** (2 * i / model.head_dim)
        if wavelength < model.rope_original / model.rope_high:
            divisors.append(1.0)
        elif wavelength > model.rope_original / model.rope_low:
            divisors.append(float(model.rope_factor))
        else:
            smooth = np.float32(model.rope_original) / np.float32(wavelength)
            smooth = (smooth - np.float32(model.rope_low)) / np.float32(model.rope_high - model.rope_low)
            divisors.append(1 / ((np.float32(1) - smooth) / np.float32(model.rope_factor) + smooth))
    return np.array(divisors, np.float32)


# ═══ The tokenizer ═══════════════════════════════════════════════════════════════════════════════════════════════════════

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
# Bytes in GPT-2's order: those that have a printable Latin-1 character first.
BYTE_ORDER = [*range(33, 127), *range(161, 173), *range(174, 256), *range(0, 33), *range(127, 161), 173]


def ranked_tokens(model):
    if model.tokenizer:
        return read_tokens(model.tokenizer)
    return [bytes([b]) for b in BYTE_ORDER] + MERGED[: model.merged]


@functools.cache
def read_tokens(path):
    with open(path, "rb") as f:
        return [base64.b64decode(line.split()[0]) for line in f]


def special_names(model, scheme=None):
    """The 256 literal names by offset from the rank count. Schemes: llama3, head (Meta since 3.2), hf (3.1 and later). By
    default those that a Meta folder of this model means, so that all sources give the same tokenizer."""
    scheme = scheme or ("llama3" if model.rope_factor == 1 else "head")
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    if scheme != "llama3":
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    if scheme == "head":
        named |= {5: "step_id", 11: "image"}
    reserved = iter(range(256))
    return [f"<|{named[i] if i in named else f'reserved_special_token_{next(reserved)}'}|>" for i in range(256)]


def end_tokens(model):
    return [model.ranks + i for i in ((1, 9) if model.rope_factor == 1 else (1, 8, 9))]


def printable(token):
    """Bytes in GPT-2's byte-to-unicode form."""
    return "".join(_PRINTABLE[b] for b in token)


_PRINTABLE = {b: chr(b) if n < 188 else chr(256 + n - 188) for n, b in enumerate(BYTE_ORDER)}


def merges(tokens):
    """All ways to cut each token in two others, by rank of the token, then of the left and of the right half."""
    rank = {token: i for i, token in enumerate(tokens)}
    cuts = (((token[:n], token[n:]) for n in range(1, len(token))) for token in tokens)
    return [pair for pairs in cuts
            for pair in sorted((p for p in pairs if p[0] in rank and p[1] in rank), key=lambda p: (rank[p[0]], rank[p[1]]))]


def tokenizer_model(model):
    return b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(ranked_tokens(model)))


def tokenizer_json(model, scheme=None):
    tokens, names = ranked_tokens(model), special_names(model, scheme)
    bos = names[0]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": model.ranks + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [
            byte_level | {"add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {"type": "TemplateProcessing",
             "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                      {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {bos: {"id": bos, "ids": [model.ranks], "tokens": [bos]}}}]},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {printable(t): i for i, t in enumerate(tokens)},
                  "merges": [f"{printable(a)} {printable(b)}" for a, b in merges(tokens)]},
    }


# ═══ Containers ══════════════════════════════════════════════════════════════════════════════════════════════════════════

DTYPES = {"bfloat16": ("BF16", "BFloat16Storage"), "float16": ("F16", "HalfStorage"), "float32": ("F32", "FloatStorage")}


def to_bytes(array, dtype):
    """Little-endian bytes of a float32 array in `dtype`; refuses to round."""
    array = np.ascontiguousarray(array, np.float32)
    if dtype == "float32":
        return array.astype("<f4").tobytes()
    if dtype == "float16":
        half = array.astype("<f2")
        assert (half.astype(np.float32) == array).all(), "not exact in float16"
        return half.tobytes()
    bits = array.view(np.uint32)
    assert not (bits & 0xFFFF).any(), "not exact in bfloat16"
    return (bits >> 16).astype("<u2").tobytes()


def write_safetensors(path, tensors):
    """tensors: name -> (dtype such as "BF16", shape, bytes)."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            f.write(data)


@dataclasses.dataclass(frozen=True)
class Global:
    """Stands for module.name in a pickle, without importing it."""
    module: str
    name: str

    def __call__(self):
        raise TypeError("a stand-in")


@dataclasses.dataclass(eq=False)
class Storage:
    """One member data/KEY of a .pth file. Tensors may share it."""
    data: bytes
    kind: str = "BFloat16Storage"
    count: int = 0

    @classmethod
    def of(cls, array, dtype="bfloat16"):
        return cls(to_bytes(array, dtype), DTYPES[dtype][1], array.size)


@dataclasses.dataclass(eq=False)
class Tensor:
    """A view of a storage, pickled as torch does it. Offset and strides count elements."""
    storage: Storage
    shape: tuple
    stride: tuple = None
    offset: int = 0

    def __reduce__(self):
        stride = self.stride
        if stride is None:
            stride = tuple(math.prod(self.shape[i + 1:]) for i in range(len(self.shape)))
        return Global("torch._utils", "_rebuild_tensor_v2"), (
            self.storage, self.offset, (*self.shape,), stride, False, OrderedDict())


class _TorchPickler(pickle._Pickler):
    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.keys = {}                                             # storage -> its name, one string object per storage
        self.globals = {}

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        key = self.keys.setdefault(obj, str(len(self.keys)))
        return ("storage", Global("torch", obj.kind), key, "cpu", obj.count)

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Global):
            return super().save(obj, save_persistent_id)
        obj = self.globals.setdefault((obj.module, obj.name), obj)  # the memo goes by id()
        if id(obj) in self.memo:
            self.write(self.get(self.memo[id(obj)][0]))
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            self.memoize(obj)


def write_pth(path, tensors, top=None):
    """A torch.save file: a stored zip of a pickle and raw storages at multiples of 64 bytes. tensors: any picklable object of
    dicts, strings, numbers, Tensor and Global."""
    top = top or os.path.basename(path).rsplit(".", 1)[0]
    text = io.BytesIO()
    pickler = _TorchPickler(text)
    pickler.dump(tensors)
    members = [("data.pkl", text.getvalue()), (".format_version", b"1"), (".storage_alignment", b"64"),
               ("byteorder", b"little")]
    members += [(f"data/{key}", storage.data) for storage, key in pickler.keys.items()]
    members += [("version", b"3\n"), (".data/serialization_id", b"0" * 40)]
    with open(path, "wb") as f, zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as z:
        for name, data in members:
            info = zipfile.ZipInfo(f"{top}/{name}", (1980, 1, 1, 0, 0, 0))
            padding = -(f.tell() + 30 + len(info.filename.encode()) + 4) % 64
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            z.writestr(info, data)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


# ═══ Checkpoints ═════════════════════════════════════════════════════════════════════════════════════════════════════════

# Not the published templates, but with the marks by which one tells them apart.
TEMPLATE = {
    1: "{% set loop_messages = messages %}{% for message in loop_messages %}{{ bos_token if loop.first }}"
       "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}"
       "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    8: "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = \"26 Jul 2024\" %}{%- endif %}"
       "{%- if builtin_tools is defined %}{{- \"Environment: ipython\\n\" }}{%- endif %}"
       "{{- \"Cutting Knowledge Date: December 2023\\n\" }}{{- \"Today Date: \" + date_string + \"\\n\\n\" }}"
       "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
    32: "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now(\"%d %b %Y\") %}{%- else %}{%- set date_string = \"26 Jul 2024\" %}"
        "{%- endif %}{%- endif %}{{- \"Cutting Knowledge Date: December 2023\\n\" }}"
        "{{- \"Today Date: \" + date_string + \"\\n\\n\" }}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
}


def hf_config(model, dtype="bfloat16"):
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": model.ranks, "eos_token_id": end_tokens(model), "head_dim": model.head_dim, "hidden_act": "silu",
        "hidden_size": model.dim, "initializer_range": 0.02, "intermediate_size": model.ffn,
        "max_position_embeddings": model.context, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": model.heads, "num_hidden_layers": model.layers, "num_key_value_heads": model.kv_heads,
        "pretraining_tp": 1, "rms_norm_eps": model.eps, "rope_scaling": None, "rope_theta": float(model.theta),
        "tie_word_embeddings": model.tied, "torch_dtype": dtype, "use_cache": True, "vocab_size": model.vocab,
    }
    if model.rope_factor != 1:
        config["rope_scaling"] = {
            "factor": float(model.rope_factor), "low_freq_factor": float(model.rope_low),
            "high_freq_factor": float(model.rope_high), "original_max_position_embeddings": model.rope_original,
            "rope_type": "llama3"}
    if model.heads * model.head_dim == model.dim and model.rope_factor == 1:
        del config["head_dim"]                                     # as the first releases, which did not have it
    return config


def write_hf(folder, model, shards=1, dtype="bfloat16", tokenizer="json", names=None, tensors=None):
    """tokenizer: "json", "original" (original/tokenizer.model alone) or "both". tensors: other values, by Meta's names."""
    os.makedirs(folder, exist_ok=True)
    write_json(f"{folder}/config.json", hf_config(model, dtype))
    write_json(f"{folder}/generation_config.json", {
        "bos_token_id": model.ranks, "do_sample": True, "eos_token_id": end_tokens(model), "temperature": 0.6, "top_p": 0.9})
    if tokenizer in ("json", "both"):
        literal = special_names(model, names)
        write_json(f"{folder}/tokenizer.json", tokenizer_json(model, names))
        write_json(f"{folder}/tokenizer_config.json", {
            "added_tokens_decoder": {str(model.ranks + i): {
                "content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
                for i, name in enumerate(literal)},
            "bos_token": literal[0], "chat_template": TEMPLATE[int(model.rope_factor)], "clean_up_tokenization_spaces": True,
            "eos_token": literal[9], "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": model.context, "tokenizer_class": "PreTrainedTokenizerFast"})
    if tokenizer in ("original", "both"):
        os.makedirs(f"{folder}/original", exist_ok=True)
        with open(f"{folder}/original/tokenizer.model", "wb") as f:
            f.write(tokenizer_model(model))
    parts = list(hf_weights(model, tensors).items())
    packed = {name: (DTYPES[dtype][0], a.shape, to_bytes(a, dtype)) for name, a in parts}
    if shards == 1:
        write_safetensors(f"{folder}/model.safetensors", packed)
        return
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        inside = list(packed)[s * len(packed) // shards:(s + 1) * len(packed) // shards]
        write_safetensors(f"{folder}/{file}", {name: packed[name] for name in inside})
        weight_map |= {name: file for name in inside}
    write_json(f"{folder}/model.safetensors.index.json", {
        "metadata": {"total_size": sum(len(data) for _, _, data in packed.values())}, "weight_map": weight_map})


def shard(name, array, r, shards):
    """Shard r of a tensor as Meta cuts it: norms whole, wo and w2 by columns, all others by rows."""
    if array.ndim == 1:
        return array
    axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
    if array.shape[axis] % shards:
        raise ValueError(f"{name}: {array.shape[axis]} cannot be cut in {shards}")
    return np.ascontiguousarray(np.split(array, shards, axis)[r])


def params(model):
    third = 2 * 4 * model.dim // 3
    value = {"dim": model.dim, "n_layers": model.layers, "n_heads": model.heads, "n_kv_heads": model.kv_heads,
             "vocab_size": model.vocab, "ffn_dim_multiplier": round((model.ffn + 0.5) / third, 6), "multiple_of": 1,
             "norm_eps": model.eps, "rope_theta": float(model.theta)}
    assert int(value["ffn_dim_multiplier"] * third) == model.ffn
    if model.rope_factor != 1:
        value["use_scaled_rope"] = True
    return value


def write_meta(folder, model, shards=1, dtype="bfloat16", share_tied=True, tensors=None):
    """share_tied: output.weight of a tied model is the embedding's storage in the pickle, otherwise a copy of it."""
    if not model.meta_ok:
        raise ValueError(f"{model.name}: Meta's files cannot express this model")
    os.makedirs(folder, exist_ok=True)
    all_tensors = tensors or weights(model)
    if (model.heads % shards or model.kv_heads % shards):
        raise ValueError(f"{model.name}: {model.heads} heads over {model.kv_heads} cannot be cut in {shards}")
    for r in range(shards):
        pieces = OrderedDict()
        for name, array in all_tensors.items():
            if name == "output.weight" and model.tied and share_tied:
                pieces[name] = Tensor(pieces["tok_embeddings.weight"].storage, pieces["tok_embeddings.weight"].shape)
            else:
                piece = shard(name, array, r, shards)
                pieces[name] = Tensor(Storage.of(piece, dtype), piece.shape)
        write_pth(f"{folder}/consolidated.{r:02d}.pth", dict(pieces))
    write_json(f"{folder}/params.json", params(model))
    with open(f"{folder}/tokenizer.model", "wb") as f:
        f.write(tokenizer_model(model))


GGUF_NAMES = {"attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
              "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
              "attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}


def gguf_name(name):
    part = name.removesuffix(".weight").split(".", 2)
    if part[0] == "layers":
        return f"blk.{part[1]}.{GGUF_NAMES[part[2]]}.weight"
    return {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}[part[0]] + ".weight"


def k_quant_blocks(seed, name, shape, kind):
    """Blocks of Q4_K or Q6_K made of hash bytes, with sane scales: gguf has no encoder for these. Not the model's weights,
    but of about their size."""
    size, floats = {"Q4_K": (144, ((0, 0.0006), (2, 0.004))), "Q6_K": (210, ((208, 0.00004),))}[kind]
    blocks = math.prod(shape) // 256
    raw = hashes(seed, name + kind, blocks * size).astype(np.uint8).reshape(blocks, size)
    for at, scale in floats:
        value = (1 + raw[:, at].astype(np.float32) / 256) * np.float32(scale)
        raw[:, at:at + 2] = value.astype("<f2").view(np.uint8).reshape(blocks, 2)
    return raw.reshape(shape[0], -1)


def dequantised(model, kind):
    """The weights through gguf's Q8_0 or Q4_0: blocks of 32 along the inputs, the last one filled up with zeros."""
    import gguf
    kinds = gguf.GGMLQuantizationType

    def through(name, a):
        if a.ndim == 1:
            return a
        outer = name in ("tok_embeddings.weight", "output.weight")
        as_type = kinds.Q8_0 if kind == "q8" or outer else kinds.Q4_0
        padded = np.pad(a, ((0, 0), (0, -a.shape[1] % 32)))
        return gguf.quants.dequantize(gguf.quants.quantize(padded, as_type), as_type)[:, : a.shape[1]]
    return {name: through(name, a) for name, a in weights(model).items()}


def write_gguf(path, model, type="bf16", split_tensors=0, names=None, tensors=None):
    """type: f32, f16, bf16, q8_0, q4_0 (embedding and output q8_0), q4_k (embedding and output q6_k; see k_quant_blocks).
    split_tensors: that many tensors per file, named PATH-00001-of-0000N.gguf. Quantised types need columns that are
    multiples of 32, q4_k of 256."""
    import gguf
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_tensors, small_first_shard=False)
    kind = gguf.GGMLQuantizationType
    inner = {"f32": kind.F32, "f16": kind.F16, "bf16": kind.BF16, "q8_0": kind.Q8_0, "q4_0": kind.Q4_0, "q4_k": kind.Q4_K}[type]
    outer = {kind.Q4_0: kind.Q8_0, kind.Q4_K: kind.Q6_K}.get(inner, inner)
    file_type = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k": 15, "bf16": 32}[type]
    writer.add_name(model.name)
    writer.add_type("model")
    writer.add_file_type(file_type)
    if type.startswith("q"):
        writer.add_quantization_version(2)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.dim)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(model.eps)
    if model.heads * model.head_dim != model.dim or model.rope_factor != 1:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    writer.add_rope_freq_base(model.theta)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(model.vocab)
    tokens = ranked_tokens(model)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([printable(t) for t in tokens] + special_names(model, names))
    writer.add_token_types([1] * model.ranks + [3] * 256)
    writer.add_token_merges([f"{printable(a)} {printable(b)}" for a, b in merges(tokens)])
    writer.add_bos_token_id(model.ranks)
    writer.add_eos_token_id(model.ranks + 9)
    writer.add_chat_template(TEMPLATE[int(model.rope_factor)])
    for name, array in (tensors or weights(model)).items():
        if name == "norm.weight" and model.rope_factor != 1:
            writer.add_tensor("rope_freqs.weight", rope_divisors(model))
        if name == "output.weight" and model.tied:
            continue
        as_type = outer if name in ("tok_embeddings.weight", "output.weight") else inner
        if array.ndim == 1 or as_type == kind.F32:
            writer.add_tensor(gguf_name(name), array)
        elif as_type == kind.F16:
            writer.add_tensor(gguf_name(name), array.astype(np.float16))
        elif as_type in (kind.Q4_K, kind.Q6_K):
            writer.add_tensor(gguf_name(name), k_quant_blocks(model.seed, name, array.shape, as_type.name), raw_dtype=as_type)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--as", dest="form", choices=("hf", "meta", "gguf"), default="hf")
    parser.add_argument("--type", help="hf and meta: bfloat16, float16, float32; gguf: f32, f16, bf16, q8_0, q4_0, q4_k")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--only", help="one model's name")
    parser.add_argument("--tokenizer", default="", help="a tokenizer.model to use instead of the tiny ones (V grows with it)")
    arguments = parser.parse_args()
    if arguments.only and arguments.only not in BY_NAME:
        sys.exit(f"--only: no model {arguments.only} (there are {', '.join(BY_NAME)})")
    os.makedirs(arguments.out, exist_ok=True)
    for model in MODELS if not arguments.only else [BY_NAME[arguments.only]]:
        model = dataclasses.replace(model, tokenizer=arguments.tokenizer)
        to = f"{arguments.out}/{model.name}"
        if arguments.form == "gguf":
            write_gguf(to + ".gguf", model, arguments.type or "bf16")
        elif arguments.form == "hf":
            write_hf(to, model, arguments.shards, arguments.type or "bfloat16")
        elif model.meta_ok:
            write_meta(to, model, arguments.shards, arguments.type or "bfloat16")


if __name__ == "__main__":
    main()
