#!/usr/bin/env python3
"""Golden data of the tokenizer, made by tiktoken (pinned: 0.14.0) with the published pattern.

    make_tokenizer_golden.py --check TOKENIZE MODEL.l3     runs `TOKENIZE -m MODEL.l3 -0` on every string below and compares;
                                                           ranks from --tokenizer or $LLAMA3_TOKENIZER_MODEL; such a model:
                                                           checkpoints.py OUT --as meta --only NAME --tokenizer ..., converted
    make_tokenizer_golden.py --write TOKENIZER.model       writes tokenizer_demo.strings (inputs, each ended by a NUL byte) and
                                                           tokenizer_demo.ids (a line of ids per input) beside this file, so
                                                           that `tokenize -0 < tokenizer_demo.strings` prints tokenizer_demo.ids
    make_tokenizer_golden.py --chat TOKENIZER.model        writes chat_demo.tsv: the sequences of chat.tsv with these ranks
    make_tokenizer_golden.py --unicode-tables [FILE]       probes tiktoken's regular expressions: the table of llama3.hpp
    make_tokenizer_golden.py --list                        how many strings of which kind there are

The strings come from a generator of our own (splitmix64), so they are the same everywhere.
"""

import argparse
import base64
import functools
import hashlib
import os
import struct
import subprocess
import sys

import tiktoken

TIKTOKEN = "0.14.0"
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
PUBLISHED = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"   # sha256 of Meta's tokenizer.model
HERE = os.path.dirname(os.path.abspath(__file__))

# ═══ Unicode classes, as tiktoken sees them ══════════════════════════════════════════════════════════════════════════════

EVERYTHING = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def matched(pattern, text):
    """What of the text a pattern matches: an encoding drops everything else."""
    ranks = {bytes([b]): b for b in range(256)}
    bytewise = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return bytewise.decode_bytes(bytewise.encode_ordinary(text)).decode()


@functools.cache
def classes():
    """0 other, 1 letter, 2 number, 3 white space, for each code point (surrogates: other)."""
    text, of = "".join(map(chr, EVERYTHING)), bytearray(0x110000)
    for number, pattern in enumerate((r"\p{L}", r"\p{N}", r"\s"), 1):
        for c in matched(pattern, text):
            assert of[ord(c)] == 0
            of[ord(c)] = number
    assert len(matched(r"[^\s\p{L}\p{N}]", text)) == sum(of[c] == 0 for c in EVERYTHING)
    return of


def class_runs(of):
    return [(c, of[c]) for c in range(0x110000) if c == 0 or of[c] != of[c - 1]]


def contraction_letters():
    """What follows the apostrophe in a contraction, in every form that is matched, with ASCII letters around it left out."""
    found = set()
    for shape in ("'{}\n", "'{}e\n", "'{}l\n", "'r{}\n", "'v{}\n", "'l{}\n"):
        text = "".join(shape.format(chr(c)) for c in EVERYTHING if c not in (0x27, 0x0A))
        found |= set(matched(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", text).split("'")) - {""}
    return sorted(found)


def unicode_tables(out):
    of = classes()
    runs = class_runs(of)
    beyond_ascii = [s for s in contraction_letters() if not s.isascii()]
    assert [hex(ord(s)) for s in beyond_ascii] == ["0x17f"], beyond_ascii
    print(f"// Written by tests/golden/make_tokenizer_golden.py --unicode-tables with tiktoken {tiktoken.__version__}.\n"
          "// The runs of code points of one class, from 0 on: (length << 2) | class in hexadecimal, the lowest digit first, written a to p,\n"
          "// the last one as a capital; class 0 other, 1 letter, 2 number, 3 white space. Not ASCII, but matched in contractions: U+017F\n"
          "// (long s) as s.", file=out)
    text = ""
    for (first, number), (end, _) in zip(runs, runs[1:] + [(0x110000, 0)]):
        digits = f"{(end - first) << 2 | number:x}"[::-1]
        text += "".join(chr(ord("a") + int(d, 16)) for d in digits[:-1]) + chr(ord("A") + int(digits[-1], 16))
    lines = [f'    "{text[i:i + 122]}"' for i in range(0, len(text), 122)]
    print("constexpr std::string_view packed_runs =\n" + "\n".join(lines) + ";", file=out)
    counts = {name: (sum(v == n for v in of), sum(v == n for _, v in runs))
              for n, name in ((1, "letters"), (2, "numbers"), (3, "white space"))}
    print(f"{len(runs)} entries; " + ", ".join(f"{a} {name} in {b} runs" for name, (a, b) in counts.items())
          + f"; contractions: {' '.join(contraction_letters())}", file=sys.stderr)


# ═══ The strings ═════════════════════════════════════════════════════════════════════════════════════════════════════════

# Text and, where they are published, its ids in the published vocabulary.
TRAPS = [
    ("DON'T", "85741 17773"), ("'there", None), ("don\u2019t", "15357 1431"), ("'\u017f", None), ("it'\u017fx", None),
    ("1234567", "4513 10961 22"), (" 123", "220 4513"), ("\u00b2\u00b3\u00b9\u2153", None), ("a  1", "64 220 220 16"),
    ("a   b", "64 256 293"), ("x  ", "87 256"), ("a \n b", "64 720 293"), ("\n\n  x", "271 220 865"),
    ("a\r\n\r\nb", "64 881 65"), ("!!\n\nfoo", "25833 8134"), ("!! \n\nfoo", "3001 4815 8134"), ("  !\r\n", "220 758 319"),
    ("a\u00a0b", "64 115648"), ("a\u3000b", "64 23249 65"), ("a\u0085b", "64 116360 65"), ("e\u0301a", "68 54939 64"),
    ("\u0915\u093e\u092e", "65804 100497"), ("\0\0abc", "188 188 13997"), ("<|eot_id|>", "27 91 68 354 851 91 29"),
    ("This is a test sentence.", "2028 374 264 1296 11914 13"), ("\n\n", "271"), ("\n\n\n", "1432"), ("!", "0"), (" ", "220"),
    ("a\x1cb \x1d\n", None), ("\u180ea \u200bb \ufeffc", None), ("x\u2028\u2029y\x0b\x0cz", None), ("\u1680\u202f\u205fq", None),
    ("Tell me about the french revolution.", "41551 757 922 279 42293 14110 13"), ("What is deep learning?", "3923 374 5655 6975 30"),
    ("  \n", None), (" \r", None), ("\r \n \r x", None), ("\t\tx", None), (" \u0301", None), ("  \u0301a", None), ("'", None),
    ("''s", None), ("'s's", None), ("s'", None), ("'S", None), ("'LL", None), ("'lL", None), ("'r", None), ("'re", None), ("'rE1", None),
    ("\u1e9e'\u1e9e", None), ("\u212a'm", None), ("12\u0663\u06644", None), ("\u216712", None), ("\U0001d7ce\U0001d7cf9", None),
]

WORDS = """the of and a to in is was he for it with as his on be at by had not are but from or have an they which one you were
all her she there would their we him been has when who will no more if out so up said what its about than into them
can only other time new some could these two may first then do any like my now over such our man me even most made
after also did many off before must well back through years where much your way down should because long each just
state people those too Mr how little good world make very year still see own work men day get here old life both
between being under never know same last another while us might great go come since against right came take used
himself few house American use place during high without again home around small however found Mrs part school
thought went say general once upon war until always away something fact though water less public put think almost
hand enough far took head yet government system better set told nothing night end why called didn't eyes find going
look asked later knew point next program city business give group toward young days let room word president side
several social order rather National tokenization Internationalization antidisestablishmentarianism HTTP JSON UTF-8
pre-trained e-mail 3.14 $100 50% O'Neill rock'n'roll café naïve Zürich Москва привет мир שלום עולם مرحبا بالعالم
नमस्ते दुनिया สวัสดีชาวโลก 你好 世界 こんにちは 世界 안녕하세요 세계 Γειά σου Κόσμε xin chào việc Việt Nam điều người ΑΒΓ straße
İstanbul ﬁne ½ ² ™ № Ⅷ ٣ ४५६ ๑๒ ① 𝔘𝔫𝔦 👍 👩‍👩‍👧‍👦 🇩🇪 ❤️ 🤷🏽‍♂️ … — – “quoted” ‘single’ «guillemets»""".split()

CODE = """int main(int argc, char **argv) {|for (size_t i = 0; i < n; ++i) sum += a[i] * b[i];|    return x == nullptr ? -1 : 0x7fff;|}
#include <vector>|template <typename T> class Foo : public Bar<T> {};|std::cout << "Hello, World!\\n" << std::endl;|// TODO(bob): fix me!!!
def f(self, *args, **kwargs):|        return {k: v for k, v in kwargs.items() if v is not None}|@property|\tif x != y:|\t\tpass
<div class="a b-c" id='x1'>&nbsp;text</div>|{"name": "f", "parameters": {"city": "Paris", "n": [1, 2.5e-3, null]}}|SELECT * FROM t WHERE a>=10;
git commit -m "it's done" && make -j8 2>&1|https://example.com/a/b?q=1&r=%20#top|$ curl -sSL http://127.0.0.1:8080/|x = y**2 + 3*z - w//7 % 5
fn main() -> Result<(), Box<dyn Error>> { Ok(()) }|let re = /^[\\w.+-]+@\\w+\\.\\w{2,}$/gi;|@media (max-width:600px){a{color:#fff}}|---|===|***|///
\\documentclass{article} \\begin{document} $\\alpha_{i}^2$|    mov rax, qword ptr [rbp-0x10]|CamelCaseIdentifier snake_case_name kebab-case-name|if(a&&b||!c){}
""".replace("\n", "|").split("|")

SOUP = [" ", " ", " ", "  ", "    ", "\t", "\n", "\n", "\r", "\r\n", "\u00a0", "\u3000", "\u2028", "\u0085", "\u200b", "\x1c", "\x0b",
        "a", "B", "1", "22", "!", "'", "s", "\u0301", "\u00e9", "\u4e16", ".", "-"]

MARKS = ["\u0300", "\u0301", "\u0308", "\u0327", "\u0338", "\u20d0", "\u20e3", "\ufe0f", "\u093f", "\u094d", "\u0e31", "\u0e49", "\u05b8",
         "\u064b", "\u0651", "\u3099", "\u1ab0", "\U000e0101", "\u200d", "\u0b83"]

EMOJI = ["\U0001f600", "\U0001f44d\U0001f3fd", "\U0001f469\u200d\U0001f4bb", "\U0001f1fa\U0001f1f8", "\u2764\ufe0f", "\u0031\ufe0f\u20e3",
         "\U0001f3f4\U000e0067\U000e0062\U000e007f", "\u263a", "\U0001fae8", "\u200d", "\ufe0f"]

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
           "<|python_tag|>", "<|reserved_special_token_0|>", "<|reserved_special_token_245|>", "<|image|>", "<|eot_id", "|>", "<|",
           "<|unknown|>", "<|<|eot_id|>|>"]


class Random:
    def __init__(self, name):
        self.state = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

    def below(self, n):
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        x = self.state
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return ((x ^ (x >> 31)) >> 11) * n >> 53

    def pick(self, items):
        return items[self.below(len(items))]

    def join(self, items, n, between=""):
        return between.join(self.pick(items) for _ in range(n))


def unicode_blocks(r):
    """Each row of 16 code points outside the large ideographic and private areas, and each page of 256 of all."""
    def mixed(first, width):
        out = ""
        for _ in range(3 + r.below(6)):
            c = first + r.below(width)
            out += "\ufffd" if 0xD800 <= c < 0xE000 or c == 0 else chr(c)
            if r.below(3) == 0:
                out += r.pick([" ", "a", "7", "'", "\n", ".", "  "])
        return out
    for first in range(0, 0x20000, 16):
        if not any(a <= first < b for a, b in ((0x3400, 0xA000), (0xAC00, 0xF900), (0x12550, 0x16800), (0x17000, 0x1B000))):
            yield mixed(first, 16)
    for first in range(0, 0x110000, 256):
        if not 0xD800 <= first < 0xE000:
            yield mixed(first, 256)


def class_borders(r):
    """Around every code point where the class changes, and simple case partners of the letters in contractions."""
    for first, _ in class_runs(classes()):
        for c in (first - 1, first):
            if c > 0 and not 0xD800 <= c < 0xE000:
                yield r.pick(["a{0}b", "1{0}2", " {0}", "{0}{0}x", "  {0}", "{0}\n", "!{0}", "{0} 1"]).format(chr(c))


def random_bytes(r):
    for i in range(2500):
        high = (256, 256, 192, 245)[i % 4]
        raw = bytes(r.below(high) or 1 for _ in range(1 + r.below(48)))
        yield raw.decode("utf-8", errors="replace")
    for _ in range(500):                                           # whole and cut sequences side by side
        raw = b"".join(chr(r.pick(EVERYTHING) or 1).encode()[: 1 + r.below(6)] for _ in range(1 + r.below(10)))
        yield raw.decode("utf-8", errors="replace")


def code(r):
    for _ in range(1500):
        yield "".join("    " * r.below(4) + r.pick(CODE) + r.pick(["\n", "\n", "\n\n", "\r\n", " ", "\n\t"])
                      for _ in range(1 + r.below(4)))


def prose(r):
    for _ in range(2000):
        yield "".join(r.pick(WORDS) + r.pick([" ", " ", " ", " ", ", ", ". ", "! ", "? ", "\n", "; ", "'s ", "-", ""])
                      for _ in range(1 + r.below(14)))


def chat_logs(r):
    for _ in range(1000):
        out = ""
        for _ in range(1 + r.below(4)):
            out += r.pick(["User: ", "assistant: ", "[12:0" + str(r.below(10)) + "] <bob> ", "> ", r.pick(SPECIAL),
                           r.pick(SPECIAL) + "\n\n"])
            out += r.join(WORDS, 1 + r.below(7), " ") + r.pick(["\n", "...", " :-)", "!!1", r.pick(SPECIAL), "\n\n"])
        yield out


def white_space(r):
    for i in range(3500):
        yield r.join(SOUP, 1 + r.below(4 + i % 16))


def contractions(r):
    for tail in ("s", "S", "\u017f", "t", "T", "re", "Re", "rE", "RE", "ve", "VE", "m", "M", "ll", "Ll", "lL", "LL", "d", "D",
                 "r", "v", "l", "st", "\u017ft", "\u1e9e", "\u212a", "l\u0301l", "r e", "\u0455"):
        for quote in ("'", "\u2019", "\u02bc", "''", "`"):
            for _ in range(8):
                yield (r.pick(["", "x", " ", "1", "!", "\n", "I", "she", "\u00e9", "\u4e16", "  "]) + quote + tail
                       + r.pick(["", "", "a", "1", "'", " ", "\n", "'s", "\u0301", "!"]))


def digits(r):
    numbers = [chr(c) for c, v in enumerate(classes()) if v == 2]
    for i in range(0, len(numbers), 3):
        yield "".join(r.pick(numbers[i:i + 10]) for _ in range(1 + r.below(8))) + r.pick(["", "a", " 1", ".5", "\n"])
    for _ in range(400):
        yield r.join(numbers + list("0123456789" * 100) + [",", ".", " ", "-"] * 40, 1 + r.below(20))


def combining(r):
    for _ in range(600):
        yield "".join(r.pick(["a", "e", " ", "\u0915", "\u0e01", "1", "\n", "\u05d0", ".", "\u4e16"]) + r.join(MARKS, r.below(4))
                      for _ in range(1 + r.below(8)))


def emoji(r):
    for _ in range(400):
        yield "".join(r.pick(EMOJI) + r.pick(["", "", "", " ", "a", "\n"]) for _ in range(1 + r.below(7)))


def long_runs(r):
    for unit in (" ", "a", "\u0301", "\n", "!", "1", "\u4e16", "\t", "\r\n", "=", "ab", "\u00e9", "\U0001f600", " \n", "A ",
                 "'s", "\u00a0", "\u0915\u094d", "aA"):
        for n in (50, 99, 100, 101, 129, 257, 1000):
            yield unit * n
            yield "x" + unit * (n + r.below(20)) + r.pick(["", "y", "1", " ", "\n", "!"])


def vocabulary(r, tokens):
    """Single tokens (whole pieces that merging may not reach, most of them late in the list) and a few in a row."""
    texts = []
    for token in tokens:
        try:
            texts.append(token.decode())
        except UnicodeDecodeError:
            pass
    late = texts[-(len(texts) // 4):]
    for i in range(2500):
        yield r.pick(late if i % 2 else texts)
    for _ in range(2500):
        yield r.join(texts, 2 + r.below(4))


def strings(tokens):
    """kind -> list of distinct strings."""
    kinds, seen = {"traps": [text for text, _ in TRAPS]}, {text for text, _ in TRAPS}
    for make in (prose, code, chat_logs, white_space, contractions, digits, combining, emoji, random_bytes, unicode_blocks,
                 class_borders, long_runs, vocabulary):
        r = Random(make.__name__)
        made = make(r, tokens) if make is vocabulary else make(r)
        kinds[make.__name__] = [s for s in made if s and not (s in seen or seen.add(s))]
    return kinds


# ═══ Write and check ═════════════════════════════════════════════════════════════════════════════════════════════════════


def read_tokens(path):
    tokens = []
    with open(path, "rb") as f:
        for line in f:
            token, rank = line.split()
            assert int(rank) == len(tokens), f"{path}: rank {rank} in line {len(tokens) + 1}"
            tokens.append(base64.b64decode(token))
    return tokens


def encoding(tokens, special=None):
    ranks = {t: i for i, t in enumerate(tokens)}
    return tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special or {})


def expected_ids(tokens, texts, special=None):
    """A line of ids per text. Special tokens are read only where their names are given."""
    e = encoding(tokens, special)
    allowed = "all" if special else set()
    return [" ".join(map(str, e.encode(t, allowed_special=allowed, disallowed_special=()))) for t in texts]


def l3_special_tokens(path):
    """name -> id, from a flat file (convert/FORMAT.md, section 3)."""
    with open(path, "rb") as f:
        header = f.read(128)
        at, size, _ = struct.unpack_from("<QQQ", header, 48)
        f.seek(at)
        data = f.read(size)
    ranks, count = struct.unpack_from("<II", data)
    at = 8 + 4 * (ranks + 1)
    at += (struct.unpack_from("<I", data, at - 4)[0] + 3) // 4 * 4
    ids = struct.unpack_from(f"<{count}I", data, at)
    starts = struct.unpack_from(f"<{count + 1}I", data, at + 4 * count)
    names = data[at + 4 * (2 * count + 1):]
    return {names[a:b].decode(): i for i, a, b in zip(ids, starts, starts[1:])}


def run(command, texts):
    """Lines that the program prints for the texts, through -0 where no text contains a NUL byte."""
    if any("\0" in t for t in texts):
        return [line for t in texts for line in lines(command, t.encode())]
    return lines([*command, "-0"], b"".join(t.encode() + b"\0" for t in texts))


def lines(command, stdin):
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    return done.stdout.decode().splitlines()


def compare(what, texts, expected, found):
    if len(found) != len(texts):
        sys.exit(f"{what}: {len(found)} lines for {len(texts)} strings")
    wrong = [(t, e, f) for t, e, f in zip(texts, expected, found) if e != f.strip()]
    for text, e, f in wrong[:10]:
        print(f"{what}: {ascii(text)[:300]}\n    expected {e[:300]}\n    found    {f[:300]}")
    if wrong:
        sys.exit(f"{what}: {len(wrong)} of {len(texts)} strings differ")


def check(program, model, path):
    if not path:
        print("check of the tokenizer against tiktoken: NOT RUN (no --tokenizer and LLAMA3_TOKENIZER_MODEL is not set)")
        return
    tokens = read_tokens(path)
    if sha256(path) == PUBLISHED:
        known = [(text, ids) for text, ids in TRAPS if ids]
        compare("tiktoken against the printed ids", [t for t, _ in known], [i for _, i in known],
                expected_ids(tokens, [t for t, _ in known]))
    command = [program, "-m", model]
    texts = [t for kind in strings(tokens).values() for t in kind]
    with_nul, without = [t for t in texts if "\0" in t], [t for t in texts if "\0" not in t]
    for part in (with_nul[:20], without):
        compare("ids", part, expected_ids(tokens, part), run(command, part))
    special = l3_special_tokens(model)
    logs = [t for t in without if "<|" in t]
    compare("--special", logs, expected_ids(tokens, logs, special), run([*command, "--special"], logs))
    print(f"{len(without)} strings, {len(logs)} of them with special tokens too: equal to tiktoken {tiktoken.__version__}")


def write(path):
    """About 2,000 strings: every trap, an even sample of the other kinds, nothing long but a few runs."""
    tokens = read_tokens(path)
    share = {"prose": 260, "code": 130, "chat_logs": 90, "white_space": 300, "contractions": 170, "digits": 110, "combining": 90,
             "emoji": 60, "random_bytes": 130, "unicode_blocks": 220, "class_borders": 250, "long_runs": 24, "vocabulary": 170}
    chosen = []
    for kind, texts in strings(tokens).items():
        texts = [t for t in texts if "\0" not in t and (kind in ("long_runs", "traps") or len(t.encode()) <= 72)]
        n = min(share.get(kind, len(texts)), len(texts))
        chosen += [texts[i * len(texts) // n] for i in range(n)]
    with open(f"{HERE}/tokenizer_demo.strings", "wb") as f:
        f.write(b"".join(t.encode() + b"\0" for t in chosen))
    with open(f"{HERE}/tokenizer_demo.ids", "w", newline="\n") as f:
        f.writelines(line + "\n" for line in expected_ids(tokens, chosen))
    print(f"{len(chosen)} strings, sha256 of {path}: {sha256(path)}")


def chat(path, published_path):
    """The published sequences in another vocabulary: their texts between special tokens are decoded with the published ranks and
    encoded with these; special tokens keep their distance from begin-of-text. Meta's code encodes the newlines after a header
    by themselves, the templates of Hugging Face encode them together with the content."""
    if not published_path or sha256(published_path) != PUBLISHED:
        sys.exit("--chat needs Meta's tokenizer.model (--tokenizer or LLAMA3_TOKENIZER_MODEL)")
    published, tokens = read_tokens(published_path), read_tokens(path)
    theirs, ours, end_header = encoding(published), encoding(tokens), len(published) + 7
    with open(f"{HERE}/chat.tsv", encoding="utf-8") as f:
        rows = [line.rstrip("\n").split("\t") for line in f]
    lines = []
    for row in rows:
        if row[0] == "case":
            name, style = row[1], row[3]
        if row[0] != "ids":
            continue
        ids, before, run = [], None, []
        for id in [*map(int, row[3].split()), None]:    # None: the end
            if id is not None and id < len(published):
                run.append(id)
                continue
            text, parts = theirs.decode_bytes(run).decode(), []
            if style == "reference" and before == end_header:
                assert text.startswith("\n\n"), name
                parts.append("\n\n")
            for part in [*parts, text[2 * len(parts):]]:
                ids += ours.encode_ordinary(part)
            if id is not None:
                ids.append(id - len(published) + len(tokens))
            before, run = id, []
        lines.append(f"{name}\t{' '.join(map(str, ids))}\n")
    with open(f"{HERE}/chat_demo.tsv", "w", newline="\n") as f:
        f.write("# The cases of chat.tsv with the demo model's vocabulary: name, ids. Made by make_tokenizer_golden.py --chat.\n")
        f.writelines(lines)
    print(f"{len(lines)} chats, sha256 of {path}: {sha256(path)}")


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", nargs=2, metavar=("TOKENIZE", "MODEL.l3"))
    what.add_argument("--write", metavar="TOKENIZER.model")
    what.add_argument("--chat", metavar="TOKENIZER.model")
    what.add_argument("--unicode-tables", nargs="?", const="-", metavar="FILE")
    what.add_argument("--list", action="store_true")
    parser.add_argument("--tokenizer", default=os.environ.get("LLAMA3_TOKENIZER_MODEL"), help="tokenizer.model for --check, --chat, --list")
    arguments = parser.parse_args()
    if tiktoken.__version__ != TIKTOKEN:
        sys.exit(f"tiktoken: wrong version (found {tiktoken.__version__}, expected {TIKTOKEN}). pip install tiktoken=={TIKTOKEN}")
    if arguments.check:
        check(*arguments.check, arguments.tokenizer)
    elif arguments.write:
        write(arguments.write)
    elif arguments.chat:
        chat(arguments.chat, arguments.tokenizer)
    elif arguments.unicode_tables == "-":
        unicode_tables(sys.stdout)
    elif arguments.unicode_tables:
        with open(arguments.unicode_tables, "w", newline="\n") as f:
            unicode_tables(f)
    else:
        for kind, texts in strings(read_tokens(arguments.tokenizer) if arguments.tokenizer else [b"a"]).items():
            print(f"{kind:16} {len(texts):6} strings, {sum(len(t.encode()) for t in texts):8} bytes")


if __name__ == "__main__":
    main()
