#!/usr/bin/env python3
"""Speed beside llama.cpp: one shape, random weights, the two programs in turn.

    python3 tests/side_by_side.py LLAMA_BENCH [--bench build/bench] [--types q8,q4,bf16] [--threads 1,2] [--rounds 3]

LLAMA_BENCH is llama.cpp's llama-bench, built for this machine (cmake -DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release, target llama-bench;
its source is also inside the source package of llama-cpp-python). A GGUF file in the shape of Llama 3.2 1B is written with random blocks
of Q8_0, Q4_0 (embedding in Q8_0, as here) or BF16; bench makes its own random weights of the same shape and types. Each round measures
prefill of 512 tokens and decode of 64 with each program, one after the other, so that a machine whose speed drifts is unfair to neither;
the table has medians and, in brackets, the least and the most. Needs numpy and gguf.
"""
import argparse
import json
import os
import statistics
import subprocess
import tempfile

import gguf
import numpy as np

LAYERS, DIM, HEADS, KV_HEADS, FFN, VOCABULARY = 16, 2048, 32, 8, 8192, 128256
GGUF_TYPES = {"q8": gguf.GGMLQuantizationType.Q8_0, "q4": gguf.GGMLQuantizationType.Q4_0, "bf16": gguf.GGMLQuantizationType.BF16}


def random_blocks(kind, rows, columns, random):
    """Rows of a tensor as the bytes that the file holds, of deviation about 1 / sqrt(columns)."""
    if kind == "bf16":
        values = (random.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))).view(np.uint32) >> 16
        return values.astype(np.uint16).view(np.uint8)
    block = 34 if kind == "q8" else 18
    data = random.integers(0, 256, (rows, columns // 32, block), dtype=np.uint8)
    scale = np.float16(1 / np.sqrt(columns) / (73 if kind == "q8" else 4.6))  # deviations of uniform bytes and nibbles
    data[:, :, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return data.reshape(rows, -1)


def write_gguf(path, kind):
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(131072)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name, rows, columns, of=kind):
        writer.add_tensor(name, random_blocks(of, rows, columns, random), raw_dtype=GGUF_TYPES[of])

    matrix("token_embd.weight", VOCABULARY, DIM, "q8" if kind == "q4" else kind)
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(DIM, dtype=np.float32))
        kv = DIM // HEADS * KV_HEADS
        for name, rows, columns in (("attn_q", DIM, DIM), ("attn_k", kv, DIM), ("attn_v", kv, DIM), ("attn_output", DIM, DIM),
                                    ("ffn_gate", FFN, DIM), ("ffn_up", FFN, DIM), ("ffn_down", DIM, FFN)):
            matrix(f"blk.{i}.{name}.weight", rows, columns)
    writer.add_tensor("output_norm.weight", np.ones(DIM, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(program, path, threads):
    output = subprocess.run([program, "-m", path, "-p", "512", "-n", "64", "-t", str(threads), "-r", "1", "-o", "json"],
                            check=True, capture_output=True, text=True).stdout
    tests = json.loads(output)
    return [next(t["avg_ts"] for t in tests if t[key]) for key in ("n_prompt", "n_gen")]


def ours(program, kind, threads):
    output = subprocess.run([program, "--synthetic", "llama-3.2-1b", "--type", kind, "-p", "512", "-n", "64", "-t", str(threads), "-r", "1",
                             "--json"], check=True, capture_output=True, text=True).stdout
    result = json.loads(output)["results"][0]
    return [result["prefill_tps"], result["decode_tps"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_bench")
    parser.add_argument("--bench", default="build/bench")
    parser.add_argument("--types", default="q8,q4,bf16")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| format | threads | program | prefill 512, tokens/s | decode, tokens/s |\n|---|---|---|---|---|")
    for kind in args.types.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "random.gguf")
            write_gguf(path, kind)
            for threads in map(int, args.threads.split(",")):
                runs = {"llama.cpp": [], "llama3.hpp": []}
                for _ in range(args.rounds):
                    runs["llama.cpp"].append(llama_cpp(args.llama_bench, path, threads))
                    runs["llama3.hpp"].append(ours(args.bench, kind, threads))
                for name, found in runs.items():
                    cells = [f"{statistics.median(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in zip(*found)]
                    print(f"| {kind} | {threads} | {name} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
