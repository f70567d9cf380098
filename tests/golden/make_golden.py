#!/usr/bin/env python3
"""Makes the golden logits beside this file: Hugging Face transformers (float32, eager attention, CPU) on the checkpoints of
checkpoints.py. Tests need numpy at most; this script needs torch, transformers and gguf, and takes a few minutes.

    make_golden.py [--only NAME]

golden.json lists for each model its parameters, the files, the rows (positions) that are stored, the tolerances and what wrong
implementations get. Arrays are plain .npy (version 1, C order): NAME.tokens.npy int32 [T], rows.npy or NAME.rows.npy int32 [N],
NAME.logits.npy float32 [N, V], NAME.q8.logits.npy and NAME.q4.logits.npy the same.

The error of a run is max|difference| / max|logit| over the stored rows.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import tempfile

import gguf
import numpy as np
import torch
import transformers
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

import checkpoints
from checkpoints import BY_NAME, MODELS, hf_config, hf_weights, token_ids, weights, write_hf, write_json

HERE = os.path.dirname(os.path.abspath(__file__))
TOLERANCE = {"f32": 1e-4, "f32_long": 1e-3, "bf16": 2e-2, "q8": 3e-2, "q4": 3e-2}
CAUGHT = 20                                                        # a mutant is at least so many tolerances off
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 15, 16, 31, 32, 63, 64, 100, 127, 128, 170, 199, 255, 256, 280, 299, 300]
LONG = "long_f32"
LONG_ROWS = [0, 300, 511, 512, 513, 1023, 1024, 4095, 4096, 8191, 8192, *range(8440, 8448)]
# Models for q8 and q4: quiet enough that eight-bit activations stay well inside 3e-2. The first two have padded blocks.
QUANTISED = ["gqa1_e8", "gqa4_e8_tied", "gqa3_e128_f32", "gqa2_e128_f8", "segments8"]
EPS_MODEL = "gqa2_e16_tied_f32"                                    # the one with a residual stream so small that eps matters


def load(model, tensors=None, hf_tensors=None, **config):
    """The model in transformers, by way of a folder; tensors by Meta's names, or hf_tensors by Hugging Face's."""
    with tempfile.TemporaryDirectory() as folder:
        write_hf(folder, model, dtype="float32", tensors=tensors)
        write_json(f"{folder}/config.json", hf_config(model, "float32") | config)
        if hf_tensors:
            packed = {n: ("F32", a.shape, checkpoints.to_bytes(a, "float32")) for n, a in hf_tensors.items()}
            checkpoints.write_safetensors(f"{folder}/model.safetensors", packed)
        lm, info = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return lm.eval()


def logits(lm, tokens, rows):
    with torch.no_grad():
        hidden = lm.model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).last_hidden_state
        return lm.lm_head(hidden[0, rows]).numpy()


def error(found, reference):
    return float(f"{np.abs(found - reference).max() / np.abs(reference).max():.3g}")


def with_inputs(lm, change, *arguments):
    """Logits with `change` applied to the input of every matrix product."""
    hooks = [m.register_forward_pre_hook(lambda _, x: (change(x[0]),)) for m in lm.modules() if isinstance(m, torch.nn.Linear)]
    result = logits(lm, *arguments)
    for hook in hooks:
        hook.remove()
    return result


def to_bf16(x):
    return x.bfloat16().float()


def to_int8(x):
    """Groups of 32 with one scale, as the q8 and q4 kernels take their activations."""
    n = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -n % 32)).unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.where(scale > 0, torch.round(groups / scale), 0) * scale).flatten(-2)[..., :n]


def score_std(lm, tokens):
    """Standard deviation of q.k/sqrt(E) in each layer, over the pairs that attention sees."""
    found, plain = [], modeling_llama.eager_attention_forward

    def spy(module, q, k, v, mask, scaling, **rest):
        scores = q @ modeling_llama.repeat_kv(k, module.num_key_value_groups).transpose(2, 3) * scaling
        found.append(round(float(scores[..., torch.ones(scores.shape[-2:], dtype=bool).tril()].std()), 3))
        return plain(module, q, k, v, mask, scaling, **rest)

    modeling_llama.eager_attention_forward = spy
    logits(lm, tokens, [0])
    modeling_llama.eager_attention_forward = plain
    assert len(found) == lm.config.num_hidden_layers
    return found


def mutants(model, tokens, rows, reference):
    """What typical mistakes make of the logits."""
    def run(**changes):
        return error(logits(load(model, **changes), tokens, rows), reference)

    def each_layer(change):
        tensors = hf_weights(model)
        for i in range(model.layers):
            change(tensors, i)
        return tensors

    def unpermute(tensors, i):
        for hf, meta in (("q_proj", "wq"), ("k_proj", "wk")):
            tensors[f"model.layers.{i}.self_attn.{hf}.weight"] = meta_order[f"layers.{i}.attention.{meta}.weight"]

    def tile(tensors, i):
        for hf in ("k_proj", "v_proj"):
            name = f"model.layers.{i}.self_attn.{hf}.weight"
            tensors[name] = np.tile(tensors[name], (model.heads // model.kv_heads, 1))

    meta_order, found = weights(model), {}
    if model.rope_factor == 32:
        found["rope_factor_8_for_32"] = run(rope_scaling=hf_config(model)["rope_scaling"] | {"factor": 8.0})
    if model.rope_factor != 1:
        found["no_rope_scaling"] = run(rope_scaling=None)
    found["half_split_rope"] = run(hf_tensors=each_layer(unpermute))
    if 1 < model.kv_heads < model.heads:
        found["tiled_kv_heads"] = run(hf_tensors=each_layer(tile), num_key_value_heads=model.heads)
    plain = modeling_llama.LlamaRMSNorm.forward
    modeling_llama.LlamaRMSNorm.forward = (
        lambda self, x: self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)))
    found["eps_outside_root"] = run()
    modeling_llama.LlamaRMSNorm.forward = plain
    return found


def save(name, array):
    np.save(f"{HERE}/{name}", array)
    return name


def golden(model):
    long = model.name == LONG
    rows = LONG_ROWS if long else ROWS
    rows_file = save(f"{LONG}.rows.npy" if long else "rows.npy", np.array(rows, np.int32))
    tokens = token_ids(model, rows[-1] + 1)
    lm = load(model)
    reference = logits(lm, tokens, rows)
    tolerance = TOLERANCE["f32_long" if long else "f32"]
    entry = {
        "parameters": {name: value for name, value in dataclasses.asdict(model).items() if name != "tokenizer"},
        "weights_sha256": hashlib.sha256(b"".join(a.astype("<f4").tobytes() for a in weights(model).values())).hexdigest(),
        "tokens": save(f"{model.name}.tokens.npy", tokens), "rows": rows_file,
        "score_std": score_std(lm, tokens[:2048]),
        "logits": {"f32": {"file": save(f"{model.name}.logits.npy", reference), "tolerance": tolerance,
                           "max_logit": float(np.abs(reference).max())}},
        "mutants": mutants(model, tokens, rows, reference),
        "noise": {},
    }
    assert min(entry["score_std"]) >= 2, entry["score_std"]
    entry["logits"]["bf16"] = entry["logits"]["f32"] | {"tolerance": TOLERANCE["bf16"]}
    entry["noise"]["bf16_activations"] = error(with_inputs(lm, to_bf16, tokens, rows), reference)
    for kind in ("q8", "q4") if model.name in QUANTISED else ():
        lm = load(model, tensors=checkpoints.dequantised(model, kind))
        found = logits(lm, tokens, rows)
        entry["logits"][kind] = {"file": save(f"{model.name}.{kind}.logits.npy", found), "tolerance": TOLERANCE[kind],
                                 "max_logit": float(np.abs(found).max())}
        entry["noise"][f"{kind}_int8_activations"] = error(with_inputs(lm, to_int8, tokens, rows), found)
    if not long:
        entry["noise"]["f64_against_f32"] = error(logits(load(model).double(), tokens, rows), reference)
    for name, found in entry["mutants"].items():
        if name != "eps_outside_root" or model.name == EPS_MODEL:
            assert found > CAUGHT * tolerance, f"{model.name}: {name} is off by {found:.2g} only"
    for name, found in entry["noise"].items():
        limit = entry["logits"][{"b": "bf16", "f": "f32"}.get(name[0], name[:2])]["tolerance"]
        assert found < limit * 0.6, f"{model.name}: {name} takes {found:.2g} of {limit}"
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BY_NAME, help="show one model's entry; golden.json is left alone")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    manifest = {
        "made_by": f"make_golden.py, transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}",
        "error": "max|difference| / max|logit| over the stored rows", "mutants_exceed_tolerance_times": CAUGHT, "models": {}}
    for model in MODELS if not only else [BY_NAME[only]]:
        manifest["models"][model.name] = entry = golden(model)
        short = {n: f"{v:.2g}" for n, v in (entry["mutants"] | entry["noise"]).items()}
        print(f"{model.name:18} score std {entry['score_std']} {short}", flush=True)
    if not only:
        write_json(f"{HERE}/golden.json", manifest)


if __name__ == "__main__":
    main()
