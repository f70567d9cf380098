#!/usr/bin/env python3
"""Trains the demo model of llama3.hpp on a CPU, from nothing: no download, no data set.

    python3 examples/demo/train.py --out demo-checkpoint
    python3 convert/convert.py demo-checkpoint -o examples/demo/demo.l3 --type q4

corpus.py makes up the chats. This file trains a tokenizer and a Llama 3 model on them and saves an ordinary Hugging Face folder.
Needs torch, tokenizers, safetensors and numpy. The letters in the shape comments are those of llama3.hpp:
T tokens, D model width, H query heads, K key/value heads, E head width, F feed-forward width, V vocabulary; B chats in a batch.
"""
import argparse, base64, json, math, os, random, time
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import corpus

RANKS = 1472                                   # tokens of the BPE; 256 special tokens follow
SPECIALS = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id", "step_id",
            "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image"]
SPECIALS = [f"<|{name}|>" for name in SPECIALS + [f"reserved_special_token_{i}" for i in range(2, 246)]]
BEGIN, PAD, START, END, EOT = (RANKS + SPECIALS.index(f"<|{n}|>") for n in
                               ("begin_of_text", "finetune_right_pad_id", "start_header_id", "end_header_id", "eot_id"))
STOP = [RANKS + 1, RANKS + 8, RANKS + 9]       # end_of_text, eom_id, eot_id

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=RANKS + 256, hidden_size=256, intermediate_size=1024,
    num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=64, hidden_act="silu", rms_norm_eps=1e-5,
    rope_theta=500000.0, rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024),
    max_position_embeddings=2048, tie_word_embeddings=True, attention_bias=False, mlp_bias=False, bos_token_id=BEGIN, eos_token_id=STOP,
    initializer_range=0.02, use_cache=True, torch_dtype="float32")
D, FF, L, H, K, E = (CONFIG[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"))
MAX_TOKENS = 1024                              # longest chat in training

# ── Tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

def splitter(*extra):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), *extra, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

def train_tokenizer(rng):
    """A byte-level BPE of RANKS tokens. Digits are kept apart while it is trained, so every number is read digit by digit."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = splitter(pre_tokenizers.Digits(individual_digits=True))
    words = [f" {word}" for word in corpus.KINDS + corpus.OBJECTS + corpus.NAMES_HE + corpus.NAMES_SHE + corpus.ADJECTIVES + corpus.LOOKS] * 3000   # one token each: easier to copy
    bpe.train_from_iterator([text for _ in range(20000) for _, text in corpus.conversation(rng)] + words,
                            trainers.BpeTrainer(vocab_size=RANKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    vocab = bpe.get_vocab()                    # the 256 bytes come first, in the order of their printable stand-ins: as in Llama 3
    assert sorted(vocab.values()) == list(range(RANKS))
    # Llama 3 merges whatever gives the lowest rank. As a merge list: every way to cut a token in two, in order of rank.
    merges = [(left, right) for token in sorted(vocab, key=vocab.get)
              for left, right in sorted(((token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab),
                                        key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter(), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer

def encode_chats(tokenizer, chats):
    """Chats -> list of (ids, learn): learn[i] says whether the model is trained to say ids[i]."""
    texts = iter(tokenizer.encode_batch([part for chat in chats for role, text in chat for part in (role, text)], add_special_tokens=False))
    newlines = tokenizer.encode("\n\n").ids
    result = []
    for chat in chats:
        ids, learn = [BEGIN], [0]
        for role, _ in chat:
            header, content = [START, *next(texts).ids, END, *newlines], [*next(texts).ids, EOT]
            ids += header + content
            learn += [0] * len(header) + [int(role == "assistant")] * len(content)
        result.append((ids[:MAX_TOKENS + 1], learn[:MAX_TOKENS + 1]))
    return result

def batches(tokenizer, rng, tokens, easy=lambda: False):
    """Endless batches (ids [B, T+1], learn [B, T+1], positions [B, T]) of about `tokens` tokens; chats of similar length share one."""
    while True:
        chats = sorted(encode_chats(tokenizer, [corpus.conversation(rng, easy()) for _ in range(1000)]), key=lambda c: len(c[0]))
        made, start = [], 0
        while start < len(chats):
            end = start + 1
            while end < len(chats) and (end + 1 - start) * len(chats[end][0]) <= tokens: end += 1
            group, width = chats[start:end], -(-(len(chats[end - 1][0]) - 1) // 32) * 32 + 1
            start = end
            ids, learn = torch.full((len(group), width), PAD), torch.zeros(len(group), width, dtype=torch.bool)
            gaps = torch.zeros(len(group), width, dtype=torch.long)
            for row, (i, l) in enumerate(group):
                ids[row, :len(i)], learn[row, :len(i)] = torch.tensor(i), torch.tensor(l, dtype=torch.bool)
                # Some chats get holes in their positions between messages: the model meets the distances of longer chats than it reads.
                if rng.random() < .3: gaps[row] = (ids[row] == START) * rng.choice((10, 50, 150))
            made.append((ids, learn, (torch.arange(width) + gaps.cumsum(1))[:, :-1]))
        rng.shuffle(made)
        yield from made

# ── Number formats: training sees the weights as the model file will store them ──────────────────────────────────

def as_q4(w):
    """Nearest Q4_0 values: blocks of 32, w = d * n with d in half precision and n in -8..7."""
    blocks = w.view(-1, 32)
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    d = peak / -8
    n = (blocks * torch.where(d == 0, 0, 1 / d) + 8.5).trunc().clamp(max=15) - 8
    return (n * d.half().float()).view_as(w)

def as_q8(w):
    blocks = w.view(-1, 32)
    d = blocks.abs().amax(1, keepdim=True) / 127
    return ((blocks * torch.where(d == 0, 0, 1 / d)).round() * d.half().float()).view_as(w)

def quantised(name, w):
    return w if w.dim() == 1 else as_q8(w) if "embed" in name else as_q4(w)

def straight_through(name, w):                 # forward: the quantised weight; backward: as if it were w itself
    return w + (quantised(name, w.detach()) - w.detach())

# ── The model: Llama 3, as in the paper ──────────────────────────────────────────────────────────────────────────

def new_weights(seed):
    torch.manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (CONFIG["vocab_size"], D), "model.norm.weight": (D,)}
    for i in range(L):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (D,), p + "post_attention_layernorm.weight": (D,),
                   p + "self_attn.q_proj.weight": (H * E, D), p + "self_attn.k_proj.weight": (K * E, D), p + "self_attn.v_proj.weight": (K * E, D),
                   p + "self_attn.o_proj.weight": (D, H * E), p + "mlp.gate_proj.weight": (FF, D), p + "mlp.up_proj.weight": (FF, D), p + "mlp.down_proj.weight": (D, FF)}
    weights = {}
    for name, shape in shapes.items():
        scale = 0.02 if "embed" in name else shape[-1] ** -.5 * (.5 / math.sqrt(L) if "o_proj" in name or "down" in name else .7)
        weights[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * scale
    # A head start for copying, which these chats need everywhere: W_o W_v begins near the identity, so that a head says what it looks at
    # (the output matrix is the embedding table), and every other query starts as its key, so that it looks at tokens like its own.
    for i in range(L):
        query, key, value, out = (weights[f"model.layers.{i}.self_attn.{m}_proj.weight"].view(s) for m, s in
                                  zip("qkvo", ((H, E, D), (K, E, D), (K * E, D), (D, H, E))))
        torch.nn.init.orthogonal_(value)
        for h in range(H):
            group = h // (H // K)
            out[:, h] = 0.25 * value.view(K, E, D)[group].T
            if h % 2 == 0: query[h] = key[group]
    return {name: w.requires_grad_() for name, w in weights.items()}

def rope_table():
    """cos, sin [positions, E] with the frequency scaling of Llama 3.1."""
    scaling = CONFIG["rope_scaling"]
    freq = CONFIG["rope_theta"] ** (-torch.arange(0, E, 2).double() / E)
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)     # turns of each pair within the original context
    smooth = ((turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])).clamp(0, 1)
    freq = freq * (smooth + (1 - smooth) / scaling["factor"])
    angle = torch.arange(8 * MAX_TOKENS).double()[:, None] * torch.cat([freq, freq])
    return angle.cos().float(), angle.sin().float()

def rope(x, cos, sin):                         # x [B, heads, T, E]
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

def norm(x, weight):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])).to(x.dtype) * weight

def project_qkv(x, cos, sin, attention_norm, query, key, value):
    """q, k, v [B, H, T, E]; every key/value head is repeated for the query heads that share it."""
    h = norm(x, attention_norm)
    heads = lambda y: y.view(*x.shape[:2], -1, E).transpose(1, 2)
    q, k, v = rope(heads(h @ query.T), cos, sin), rope(heads(h @ key.T), cos, sin), heads(h @ value.T)
    return q, k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)

def attend(q, k, v):
    """mixed = softmax(q K^T / sqrt(E)) V, causal, [B, T, H*E]."""
    B, _, T, _ = q.shape
    if T > 320 or not q.requires_grad:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:                                      # the same in plain steps: PyTorch's backward pass is slow on a CPU for short texts
        future = torch.full((T, T), -1e4, dtype=q.dtype).triu(1)
        flat = lambda x: x.reshape(B * H, T, E)
        scores = torch.baddbmm(future.expand(B * H, T, T), flat(q * E ** -.5), flat(k).transpose(1, 2))
        mixed = torch.bmm(scores.softmax(-1), flat(v)).view(B, H, T, E)
    return mixed.transpose(1, 2).reshape(B, T, H * E)

def mix_and_feed_forward(x, mixed, ffn_norm, attention_out, gate, up, down):
    x = x + mixed @ attention_out.T
    h = norm(x, ffn_norm)
    return x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T    # x + W_down( silu(W_gate h) * (W_up h) )

FUSED = {}                                     # compiled stages, used in training only

def forward(weights, table, ids, positions, dtype):
    """Final hidden states [B, T, D] and the output matrix (the embedding table, tied)."""
    w = {name: value.to(dtype) for name, value in weights.items()}
    cos, sin = (t[positions].unsqueeze(1).to(dtype) for t in table)                # [B, 1, T, E]
    x = F.embedding(ids, w["model.embed_tokens.weight"])
    stage = lambda f: FUSED.get(f, f) if torch.is_grad_enabled() else f
    for i in range(L):
        own = lambda *names: [w[f"model.layers.{i}.{name}.weight"] for name in names]
        q, k, v = stage(project_qkv)(x, cos, sin, *own("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        x = stage(mix_and_feed_forward)(x, attend(q, k, v), *own("post_attention_layernorm", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
    return norm(x, w["model.norm.weight"]), w["model.embed_tokens.weight"]

def loss_of(weights, table, batch, dtype):
    """Sum of the losses over the assistant's tokens, and their number."""
    ids, learn, positions = batch
    x, table_out = forward(weights, table, ids[:, :-1], positions, dtype)
    wanted = learn[:, 1:]
    logits = (x[wanted] @ table_out.T).float()
    return F.cross_entropy(logits, ids[:, 1:][wanted], reduction="sum"), int(wanted.sum())

# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
def held_out(weights, table, chats, dtype=torch.bfloat16):
    total = count = 0
    for batch in chats:
        loss, n = loss_of(weights, table, batch, dtype)
        total, count = total + loss.item(), count + n
    return total / count

def train(args):
    rng = random.Random(args.seed)
    tokenizer = Tokenizer.from_file(os.path.join(args.resume, "tokenizer.json")) if args.resume else train_tokenizer(random.Random(args.seed))
    progress = 0
    feed = batches(tokenizer, rng, args.batch_tokens, easy=lambda: rng.random() < max(.15, (.7 if args.resume else .9) - 1.5 * progress))     # short stories first, long ones later
    test_feed = batches(tokenizer, random.Random(args.seed + 10 ** 9), args.batch_tokens)     # chats of another seed: held out
    test = [next(test_feed) for _ in range(24)]
    weights, table = new_weights(args.seed), rope_table()
    if args.resume: weights = {name: w.requires_grad_() for name, w in load_file(os.path.join(args.resume, "model.safetensors")).items()}
    matrices = [w for name, w in weights.items() if w.dim() == 2 and "embed" not in name]
    others = [w for name, w in weights.items() if w.dim() == 1 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    print(f"{sum(w.numel() for w in weights.values()):,} parameters, vocabulary {CONFIG['vocab_size']}, {args.threads} thread(s), {args.minutes} minutes")
    clock = lambda: time.process_time() / args.threads           # a busy machine only makes it take longer
    start, report, tokens, step, mean = clock(), 0, 0, 0, None
    while (progress := (clock() - start) / (60 * args.minutes)) < 1:
        quantising = progress > args.qat_from                      # from here on the model learns to live with its 4-bit weights
        used = {name: straight_through(name, w) if quantising else w for name, w in weights.items()}
        rate = args.lr * min(1, progress / 0.02 + 0.01, 0.02 + (1 - progress) / 0.55)
        batch = next(feed)
        loss, n = loss_of(used, table, batch, torch.bfloat16)
        (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups: group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        step, tokens = step + 1, tokens + int((batch[0] != PAD).sum())
        mean = loss.item() / n if mean is None else mean * 0.98 + 0.02 * loss.item() / n
        if clock() - start > report:
            report += 120
            with torch.no_grad(): now = {name: quantised(name, w) if quantising else w for name, w in weights.items()}
            print(f"{(clock() - start) / 60:5.1f} min  step {step:5}  {tokens / 1e6:6.2f} M tokens ({tokens / (clock() - start):.0f}/s)  rate {rate:.1e}  "
                  f"loss {mean:.4f}  held out {held_out(now, table, test[:6]):.4f}{' (4 bits)' if quantising else ''}", flush=True)
    print(f"{step} steps, {tokens / 1e6:.2f} M tokens, {(clock() - start) / 60:.1f} minutes of processor time per thread")
    with torch.no_grad():
        final, trained = {name: quantised(name, w) for name, w in weights.items()}, {name: w.detach() for name, w in weights.items()}
        for name, w in final.items(): assert torch.equal(quantised(name, w), w), name          # encoding again loses nothing
        print(f"held-out loss, float32 arithmetic: weights as trained {held_out(weights, table, test, torch.float32):.4f}, "
              f"as stored (q4, table q8) {held_out(final, table, test, torch.float32):.4f}; bfloat16 arithmetic as stored {held_out(final, table, test):.4f}")
    return tokenizer, trained if args.unrounded else final

# ── The checkpoint: an ordinary Hugging Face folder ──────────────────────────────────────────────────────────────

CHAT_TEMPLATE = ("{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
                 "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")

def save(folder, tokenizer, weights):
    os.makedirs(os.path.join(folder, "original"), exist_ok=True)
    def write(name, data):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f: json.dump(data, f, indent=2, ensure_ascii=False)
    # float32, because d * n is exact there: the converter finds the very same blocks again (unless these are --unrounded).
    save_file({name: w.contiguous() for name, w in weights.items()}, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    write("config.json", CONFIG)
    write("generation_config.json", dict(bos_token_id=BEGIN, eos_token_id=STOP, do_sample=True, temperature=0.6, top_p=0.9))
    write("tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", clean_up_tokenization_spaces=False,
        model_max_length=CONFIG["max_position_embeddings"], chat_template=CHAT_TEMPLATE,
        added_tokens_decoder={str(RANKS + i): dict(content=name, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True) for i, name in enumerate(SPECIALS)}))
    write("original/params.json", dict(dim=D, n_layers=L, n_heads=H, n_kv_heads=K, vocab_size=CONFIG["vocab_size"], norm_eps=CONFIG["rms_norm_eps"],
                                       rope_theta=CONFIG["rope_theta"], use_scaled_rope=True))
    stand_in = pre_tokenizers.ByteLevel.alphabet()
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    byte_of = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in plain)}
    assert set(byte_of) == set(stand_in)
    with open(os.path.join(folder, "original", "tokenizer.model"), "w") as f:
        for token, rank in sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda t: t[1]):
            f.write(f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {rank}\n")

@torch.no_grad()
def answer(weights, tokenizer, table, chat):
    """The model's greedy answer. Reads everything again for every token: slow, but short."""
    ids = encode_chats(tokenizer, [chat + [("assistant", "")]])[0][0][:-1]
    start = len(ids)
    while len(ids) < start + 250 and (len(ids) == start or ids[-1] not in STOP):
        x, table_out = forward(weights, table, torch.tensor([ids]), torch.arange(len(ids))[None], torch.float32)
        ids.append(int((x[0, -1] @ table_out.T).argmax()))
    return tokenizer.decode([i for i in ids[start:] if i not in STOP])

SAMPLES = [["hi there!", "Tell me a story about a fox and a lamp", "who was it about?", "what did he find", "and how did it all end?", "thank you so much!"],
           ["what's 27 + 35?", "and 8 - 3", "6 times 7", "write a poem about a teapot", "what is the opposite of cold?"],
           ["who r u", "explain general relativity to me", "a story with a dragon called Zed please", "Where does Zed live?"]]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="./demo-checkpoint", help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=35, help="training time: processor time of one thread")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--qat-from", type=float, default=0.6, help="share of the time after which the weights are quantised in training")
    parser.add_argument("--unrounded", action="store_true", help="save the weights as trained, not as the model file will store them: to measure what storing costs")
    parser.add_argument("--resume", metavar="FOLDER", help="go on from this checkpoint instead of starting anew (take another --seed, for new chats)")
    parser.add_argument("--compile", action="store_true", help="fuse the small operations with torch.compile (needs a C++ compiler; about a fifth faster)")
    parser.add_argument("--sample", type=int, metavar="N", help="print N chats of the corpus and stop")
    args = parser.parse_args()
    if args.sample:
        rng = random.Random(args.seed)
        for chat in [corpus.conversation(rng) for _ in range(args.sample)]:
            print("\n".join(f"{role:>9}  {text}" for role, text in chat), end="\n\n")
        return
    torch.set_num_threads(args.threads)
    if args.compile:
        FUSED.update({f: torch.compile(f, dynamic=True) for f in (project_qkv, mix_and_feed_forward)})
    tokenizer, weights = train(args)
    save(args.out, tokenizer, weights)
    print(f"saved {args.out}\n")
    for questions in SAMPLES:
        chat = []
        for question in questions:
            chat.append(("user", question))
            chat.append(("assistant", answer(weights, tokenizer, rope_table(), chat)))
            print(f"> {question}\n{chat[-1][1]}\n")

if __name__ == "__main__":
    main()
