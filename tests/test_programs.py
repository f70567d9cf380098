#!/usr/bin/env python3
"""The programs in examples/: flags, exit statuses, outputs. Each test runs them as a user would.

    LLAMA3_PROGRAMS=build LLAMA3_TEST_DATA=build/data python3 tests/test_programs.py
"""

import json
import math
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = os.environ.get("LLAMA3_PROGRAMS", os.path.join(SOURCE, "build"))
DEMO = os.path.join(SOURCE, "examples", "demo", "demo.l3")
DATA = os.environ.get("LLAMA3_TEST_DATA", os.path.join(PROGRAMS, "data"))
ALL = ("chat", "generate", "tokenize", "perplexity", "bench", "inspect")
# where: what is wrong (found X, expected Y). What to do.
ERROR = re.compile(r"^[^\n]+: [^\n]+ \(found [^\n]+, expected [^\n]+\)\. [^\n]+\.\n$")


def run(name, *flags, input=b"", env=None):
    done = subprocess.run([os.path.join(PROGRAMS, name), *flags], input=input, capture_output=True, timeout=300,
                          env=dict(os.environ, **env) if env else None)
    return done.returncode, done.stdout, done.stderr.decode()


def output(name, *flags, input=b""):
    status, out, errors = run(name, *flags, input=input)
    if status != 0:
        raise AssertionError(f"{name} {flags}: {status} {errors}")
    return out


def read_npy(path):
    """Shape and rows of a float32 file, without numpy."""
    with open(path, "rb") as f:
        data = f.read()
    assert data[:8] == b"\x93NUMPY\x01\x00" and struct.unpack("<H", data[8:10])[0] == 118 and data[127:128] == b"\n"
    header = eval(data[10:128])
    assert header["descr"] == "<f4" and header["fortran_order"] is False
    rows, columns = header["shape"]
    assert len(data) == 128 + 4 * rows * columns
    return header["shape"], [data[128 + 4 * columns * i:128 + 4 * columns * (i + 1)] for i in range(rows)]


class CommandLine(unittest.TestCase):
    def wrong(self, name, *flags):
        status, out, errors = run(name, *flags)
        self.assertEqual((status, out), (2, b""), errors)
        self.assertRegex(errors, ERROR)
        return errors

    def test_help_prints_the_usage_to_standard_output(self):
        for name in ALL:
            for flag in ("--help", "-h"):
                status, out, errors = run(name, flag)
                self.assertEqual((status, errors), (0, ""), name)
                self.assertTrue(out.startswith(b"usage: " + name.encode()), name)
                self.assertLess(max(map(len, out.decode().splitlines())), 140)

    def test_unknown_flags_are_named_and_give_status_2(self):
        for name in ALL:
            self.assertIn("--no-such-flag", self.wrong(name, "--no-such-flag"))
        self.assertIn("-x", self.wrong("generate", "-p", "a", "-x"))
        self.assertIn("stray", self.wrong("generate", "stray"))
        self.assertIn('"line\\nbreak"', self.wrong("generate", "line\nbreak"))
        self.assertIn('"second"', self.wrong("inspect", "first", "second"))

    def test_missing_values_are_named_and_give_status_2(self):
        for name, flag in (("chat", "-sys"), ("generate", "-p"), ("generate", "--tokens"), ("perplexity", "-f"), ("bench", "--type")):
            self.assertTrue(self.wrong(name, flag).startswith(flag + ": "))

    def test_ill_formed_values_are_quoted_and_give_status_2(self):
        for name, *flags in (("generate", "-p", "a", "-n", "ten"), ("generate", "-p", "a", "-n", "1.5"), ("generate", "-p", "a", "-n", "-2"),
                             ("generate", "-p", "a", "--temp", "nan"), ("generate", "-p", "a", "--temp", "-1"),
                             ("generate", "-p", "a", "-s", "-2"), ("generate", "-p", "a", "-c", "99999999999999999999"),
                             ("generate", "-p", "a", "--kv", "q9"), ("generate", "-p", "a", "--kv", "q4"), ("generate", "-p", "a", "--device", "tpu"),
                             ("generate", "-p", "a", "--top-p", "2"), ("generate", "-p", "a", "--min-p", "1.5"), ("generate", "-p", "a", "-m", ""), ("generate", "-p", "a", "-t", "100000"), ("generate", "--tokens", "1,-2"),
                             ("generate", "--tokens", "1,,2"), ("generate", "--tokens", ""),
                             ("chat", "--chat-style", "alpaca"), ("chat", "--overflow", "shift"), ("bench", "-t", "1,x"), ("bench", "--batch", "0")):
            self.assertIn(json.dumps(flags[-1]), self.wrong(name, *flags))

    def test_flags_that_contradict_each_other_are_refused(self):
        for name, *flags in (("generate", "-p", "a", "-p", "b"), ("generate", "-p", "a", "--ids", "--json"),
                             ("tokenize", "--decode", "--special"), ("bench", "--type", "q8")):
            self.wrong(name, *flags)

    def test_what_must_be_given_is_asked_for(self):
        self.assertIn("found 0 of them", self.wrong("generate"))
        self.assertIn("found 2 of them", self.wrong("generate", "-p", "a", "--tokens", "1"))
        self.wrong("perplexity")
        self.wrong("bench", "-m", "a.l3", "--synthetic", "llama-3.2-1b")
        self.wrong("inspect", "a.l3", "-m", "b.l3")


class Errors(unittest.TestCase):
    def fails(self, name, *flags, input=b""):
        status, out, errors = run(name, *flags, input=input)
        self.assertEqual(status, 1, errors)
        self.assertRegex(errors, ERROR)
        return errors

    def test_a_missing_model_is_named(self):
        for name, *flags in (("generate", "-p", "a", "-m"), ("chat", "-m"), ("tokenize", "-m"), ("perplexity", "-f", __file__, "-m"),
                             ("bench", "-m"), ("inspect",)):
            self.assertIn("no/such.l3", self.fails(name, *flags, "no/such.l3"))

    def test_a_foreign_file_is_refused(self):
        self.assertIn("test_programs.py", self.fails("inspect", __file__))

    def test_a_device_that_is_not_built_in_is_refused(self):
        self.assertIn("CUDA", self.fails("generate", "-p", "a", "--device", "cuda"))

    def test_an_unknown_instruction_set_lists_the_available_ones(self):
        status, _, errors = run("generate", "-p", "a", env={"LLAMA3_ISA": "mmx"})
        self.assertEqual(status, 1)
        self.assertIn("mmx", errors)
        self.assertIn("baseline", errors)

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full")
    def test_a_full_disk_is_an_error(self):
        for name, *flags in (("generate", "--tokens", "1", "-n", "2", "--ids"), ("inspect", DEMO), ("tokenize",)):
            with open("/dev/full", "wb") as full:
                done = subprocess.run([os.path.join(PROGRAMS, name), *flags], stdout=full, stderr=subprocess.PIPE, input=b"a", timeout=60)
            self.assertEqual(done.returncode, 1, name)


class Generate(unittest.TestCase):
    def test_the_same_seed_gives_the_same_text_and_another_seed_another(self):
        texts = [output("generate", "-p", "Once upon a time", "-n", "40", "--temp", "1", "-s", s) for s in ("1", "1", "2", "3")]
        self.assertEqual(texts[0], texts[1])
        self.assertGreater(len(set(texts)), 1)
        self.assertGreater(len({output("generate", "-p", "Once upon a time", "-n", "40", "--temp", "1", "-s", "-1") for _ in "123"}), 1)

    def test_a_text_may_come_from_standard_input(self):
        self.assertEqual(output("generate", "-f", "-", "-n", "20", input=b"Once upon a time"),
                         output("generate", "-p", "Once upon a time", "-n", "20"))

    def test_threads_do_not_change_the_text(self):
        texts = {output("generate", "-p", "Once upon a time", "-n", "40", "-t", t) for t in "123"}
        self.assertEqual(len(texts), 1)

    def test_ranks_do_not_change_a_bit_and_numbers_that_cannot_work_are_listed(self):
        with tempfile.TemporaryDirectory() as folder:
            seen = set()
            for ranks in "1248":
                path = os.path.join(folder, "logits.npy")
                ids = output("generate", "-p", "Once upon a time", "-n", "12", "--ids", "-t", "1", "--ranks", ranks, "--logits", path)
                with open(path, "rb") as file:
                    seen.add((ids, file.read()))
            self.assertEqual(len(seen), 1)
        for ranks in ("3", "16"):
            status, out, errors = run("generate", "-p", "a", "--ranks", ranks)
            self.assertEqual((status, out), (1, b""))
            self.assertRegex(errors, ERROR)
            self.assertIn(f"found {ranks}, expected 1, 2, 4, 8)", errors)

    def test_ids_decode_to_the_text(self):
        flags = ("-p", "A story about a fox", "-n", "30")
        ids = output("generate", *flags, "--ids")
        self.assertRegex(ids, rb"^\d+( \d+)*\n$")
        answer = json.loads(output("generate", *flags, "--json"))
        self.assertEqual(answer["tokens"], [int(i) for i in ids.split()])
        self.assertEqual(output("generate", *flags).decode(), answer["text"] + "\n")
        self.assertEqual(len(answer["logprobs"]), len(answer["tokens"]))
        self.assertLessEqual(max(answer["logprobs"]), 0)

    def test_text_gets_begin_of_text_once_and_tokens_are_taken_as_given(self):
        ids = output("tokenize", input=b"Hello").split()
        text = json.loads(output("generate", "-p", "Hello", "-n", "1", "--json"))
        begin = json.loads(output("inspect", DEMO, "--json"))["configuration"]["begin_token"]
        self.assertEqual(text["prompt"], [begin] + [int(i) for i in ids])
        tokens = json.loads(output("generate", "--tokens", ",".join(map(str, text["prompt"])), "-n", "1", "--json"))
        self.assertEqual(tokens, text)
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"Hello")
            file.flush()
            self.assertEqual(json.loads(output("generate", "-f", file.name, "-n", "1", "--json")), text)

    def test_n_0_prints_nothing_but_a_newline(self):
        self.assertEqual(output("generate", "-p", "a", "-n", "0", "--ids"), b"\n")

    def test_ignore_eos_goes_on(self):
        answer = json.loads(output("generate", "--tokens", "10", "-n", "300", "--ignore-eos", "--json", "--temp", "1"))
        self.assertEqual((len(answer["tokens"]), answer["finish"]), (300, "length"))

    def test_token_ids_out_of_range_are_named(self):
        status, _, errors = run("generate", "--tokens", "1,999999")
        self.assertEqual(status, 1)
        self.assertIn("999999", errors)

    def test_a_full_context_is_said_and_a_prompt_beyond_it_refused(self):
        status, out, errors = run("generate", "--tokens", "5,6,7,8", "-c", "16", "--ignore-eos", "--ids")
        self.assertEqual(status, 0)
        self.assertIn("context is full", errors)
        self.assertIn(len(out.split()), (12, 13))
        status, out, errors = run("generate", "--tokens", "5,6,7,8", "-c", "3")
        self.assertEqual((status, out), (1, b""))
        self.assertRegex(errors, ERROR)


class Logits(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = os.path.join(self.folder, "logits.npy")

    def test_every_prompt_token_and_generated_token_has_a_row(self):
        flags = ("--tokens", "9,8,7", "-n", "5", "--temp", "0", "--ignore-eos")
        ids = [int(i) for i in output("generate", *flags, "--ids", "--logits", self.path).split()]
        self.assertEqual(ids, [int(i) for i in output("generate", *flags, "--ids").split()])
        (rows, columns), data = read_npy(self.path)
        vocab = json.loads(output("inspect", DEMO, "--json"))["configuration"]["vocab_size"]
        self.assertEqual((rows, columns), (8, vocab))
        for token, row in zip(ids, data[2:]):  # row 2 is after the prompt's last token: from it the first token was drawn
            values = struct.unpack(f"<{columns}f", row)
            self.assertEqual(token, values.index(max(values)))
        self.assertEqual(os.listdir(self.folder), ["logits.npy"])

    def test_rows_of_a_prompt_are_those_of_the_same_tokens_generated(self):
        ids = output("generate", "--tokens", "9,8,7", "-n", "5", "--temp", "0", "--ignore-eos", "--ids", "--logits", self.path).split()
        _, drawn = read_npy(self.path)
        prompt = "9,8,7," + ",".join(i.decode() for i in ids)
        output("generate", "--tokens", prompt, "-n", "0", "--logits", self.path)
        _, given = read_npy(self.path)
        self.assertEqual(drawn, given)

    def test_every_token_has_a_row_also_when_the_context_fills_up(self):
        status, out, errors = run("generate", "--tokens", "9,8,7", "-c", "8", "--ignore-eos", "--ids", "--logits", self.path)
        self.assertEqual(status, 0)
        self.assertIn("context is full", errors)
        self.assertEqual((len(out.split()), read_npy(self.path)[0][0]), (5, 8))

    def test_an_error_leaves_no_file(self):
        for flags in (("--tokens", "9,8,999999"), ("--tokens", "9,8,7", "-c", "2")):
            status, _, errors = run("generate", *flags, "--logits", self.path)
            self.assertEqual(status, 1)
            self.assertRegex(errors, ERROR)
        self.assertEqual(os.listdir(self.folder), [])
        status, _, errors = run("generate", "--tokens", "9", "--logits", os.path.join(self.folder, "no", "logits.npy"))
        self.assertEqual(status, 1)
        self.assertIn("logits.npy", errors)


class Tokenize(unittest.TestCase):
    def test_inputs_that_end_with_nul_come_back(self):
        texts = ["Hello, world!", "", "  two\nlines\n", "caf\u00e9 \U0001f600 \u4f60\u597d", "<|eot_id|>", " ", "x" * 1000]
        packed = "".join(text + "\0" for text in texts).encode()
        for flags in ((), ("--special",)):
            lines = output("tokenize", "-0", *flags, input=packed)
            self.assertEqual(lines.count(b"\n"), len(texts))
            self.assertEqual(output("tokenize", "--decode", "-0", input=lines), packed)

    def test_all_of_the_input_is_one_text_without_a_flag(self):
        text = "One line\nand another, \0 and more\n".encode()
        ids = output("tokenize", input=text)
        self.assertEqual(ids.count(b"\n"), 1)
        self.assertEqual(output("tokenize", "--decode", input=ids), text)
        self.assertEqual(output("tokenize", input=b""), b"\n")
        self.assertEqual(output("tokenize", "-0", input=b""), b"")

    def test_special_tokens_are_read_only_when_asked_for(self):
        self.assertGreater(len(output("tokenize", input=b"<|eot_id|>").split()), 1)
        special = output("tokenize", "--special", input=b"<|eot_id|>").split()
        self.assertEqual(len(special), 1)
        self.assertIn(int(special[0]), json.loads(output("inspect", DEMO, "--json"))["configuration"]["end_tokens"])

    def test_what_is_no_id_is_quoted(self):
        for text in (b"1 two", b"99999999", b"-1"):
            status, _, errors = run("tokenize", "--decode", input=text)
            self.assertEqual(status, 1)
            self.assertRegex(errors, ERROR)


class Inspect(unittest.TestCase):
    def test_json_describes_the_whole_file(self):
        found = json.loads(output("inspect", DEMO, "--verify", "--json"))
        self.assertIs(found["verified"], True)
        self.assertEqual(len(found["tensors"]), 2 + 9 * found["configuration"]["layers"] + (not found["configuration"]["tied_embedding"]))
        last = found["tensors"][-1]
        self.assertEqual(last["offset"] + last["bytes"], os.path.getsize(DEMO))
        self.assertIn("source: ", found["provenance"])
        contexts = {plan["context"] for plan in found["memory"]}
        self.assertIn(1024, contexts)
        self.assertLessEqual(max(contexts), found["configuration"]["context_length"])
        for plan in found["memory"]:
            self.assertEqual(plan["total_bytes"], plan["weights_bytes"] + plan["cache_bytes"] + plan["activations_bytes"])

    def test_text_says_the_same(self):
        self.assertEqual(output("inspect").decode().splitlines()[2:], output("inspect", "-m", DEMO).decode().splitlines()[2:])
        text = output("inspect", DEMO, "--verify").decode()
        for word in ("layers.0.query", "final_norm", "source: ", "bf16", "all checksums match"):
            self.assertIn(word, text)

    def test_a_rank_is_planned_its_part_of_every_matrix_from_the_shape_alone(self):
        """The same sums as the file format's description gives them."""
        def panels(rows, columns, kind):
            unit, size = {"f32": (1, 64), "bf16": (2, 64), "q8": (64, 1088), "q4": (64, 576)}[kind]
            return math.ceil(rows / 16) * math.ceil(columns / unit) * size

        shapes = {"1b": (16, 2048, 32, 64, 8192, True), "8b": (32, 4096, 32, 128, 14336, False),
                  "70b": (80, 8192, 64, 128, 28672, False), "405b": (126, 16384, 128, 128, 53248, False)}
        for name, (layers, dim, heads, head_dim, ffn, tied) in shapes.items():
            for kind in ("f32", "bf16", "q8", "q4"):
                found = json.loads(output("inspect", "--synthetic", name, "--type", kind, "-c", "4096", "--json"))
                self.assertEqual([plan["ranks"] for plan in found["cards"]], [1, 2, 4, 8, 16])
                outer = "q8" if kind == "q4" else kind
                for plan in found["cards"]:
                    ranks = plan["ranks"]
                    queries, keys = heads * head_dim // ranks, max(1, 8 // ranks) * head_dim
                    channels = math.ceil(ffn / 64 / ranks) * 64 if ffn % (64 * ranks) else ffn // ranks  # of the largest rank
                    logits = math.ceil(math.ceil(128256 / 16) / ranks) * 16
                    layer = (panels(queries, dim, kind) + 2 * panels(keys, dim, kind) + panels(dim, queries, kind)
                             + 2 * panels(channels, dim, kind) + panels(dim, channels, kind))
                    weights = (layers * layer + panels(128256, dim, outer) + (0 if tied else panels(logits, dim, outer))
                               + 4 * dim * (2 * layers + 1))
                    self.assertEqual(plan["weights_bytes"], weights, (name, kind, ranks))
                    self.assertEqual(plan["cache_bytes"], layers * 4096 * 2 * keys * 2, (name, kind, ranks))
                    self.assertEqual(plan["total_bytes"], plan["weights_bytes"] + plan["cache_bytes"] + plan["activations_bytes"])
                    self.assertEqual(plan["fits_gb"], {str(gb): plan["total_bytes"] <= gb * 10**9 for gb in (8, 12, 16, 24, 48, 80, 141)})

    def test_a_plan_for_ranks_is_less_for_each_and_is_refused_where_they_cannot_share(self):
        for model in ((DEMO,), ("--synthetic", "405b")):
            one, four = (json.loads(output("inspect", *model, "--ranks", ranks, "--json")) for ranks in "14")
            self.assertEqual((one["ranks"], four["ranks"]), (1, 4))
            for a, b in zip(one["memory"], four["memory"]):
                self.assertLess(b["weights_bytes"], a["weights_bytes"])
                self.assertEqual(4 * b["cache_bytes"], a["cache_bytes"])
            self.assertEqual([p["weights_bytes"] for p in four["cards"] if p["ranks"] == 4], [four["memory"][0]["weights_bytes"]])
            status, out, errors = run("inspect", *model, "--ranks", "3")
            self.assertEqual((status, out), (1, b""))
            self.assertRegex(errors, ERROR)
            self.assertIn("found 3, expected 1, 2, 4, 8", errors)
        self.assertIn("cannot share", output("inspect", DEMO).decode())  # 16 ranks, 8 heads
        self.assertIn("llama-3.1-405b", run("inspect", "--synthetic", "gpt-5")[2])

    def test_verify_names_the_tensor_with_a_flipped_bit(self):
        tensors = json.loads(output("inspect", DEMO, "--json"))["tensors"]
        with open(DEMO, "rb") as file:
            data = bytearray(file.read())
        tensor = tensors[len(tensors) // 2]
        data[tensor["offset"] + tensor["bytes"] // 2] ^= 4
        with tempfile.NamedTemporaryFile(suffix=".l3") as file:
            file.write(data)
            file.flush()
            self.assertEqual(run("inspect", file.name)[0], 0)
            status, out, errors = run("inspect", file.name, "--verify")
        self.assertEqual((status, out), (1, b""))
        self.assertIn(tensor["name"], errors)
        self.assertRegex(errors, ERROR)


def log_softmax(row):
    top = max(row)
    total = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - total for x in row]


class Perplexity(unittest.TestCase):
    def test_it_is_the_mean_over_the_second_halves_of_the_windows(self):
        """Computed again from the logits that generate writes."""
        text = ("Once upon a time there was a fox. " * 40).encode()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "text.txt")
            with open(path, "wb") as file:
                file.write(text)
            found = json.loads(output("perplexity", "-f", path, "-c", "32", "--json"))
            begin = json.loads(output("inspect", DEMO, "--json"))["configuration"]["begin_token"]
            ids = [begin] + [int(i) for i in output("tokenize", input=text).split()]
            windows = [[begin] + ids[i + 1:i + 32] for i in range(0, len(ids) - 31, 32)]
            total = count = 0
            for window in windows:
                npy = os.path.join(folder, "logits.npy")
                output("generate", "--tokens", ",".join(map(str, window)), "-n", "0", "-c", "32", "--logits", npy)
                (_, columns), rows = read_npy(npy)
                for position in range(16, 31):
                    row = struct.unpack(f"<{columns}f", rows[position])
                    top = max(row)
                    total += top + math.log(sum(math.exp(v - top) for v in row)) - row[window[position + 1]]
                    count += 1
        self.assertEqual((found["tokens"], found["windows"], found["scored"]), (len(ids), len(windows), count))
        self.assertAlmostEqual(found["nll"], total / count, places=4)
        self.assertAlmostEqual(found["perplexity"], math.exp(found["nll"]), places=6)

    def test_the_divergence_from_a_base_is_that_of_the_two_models_logits(self):
        """Computed again from the logits that generate writes."""
        text = ("Once upon a time there was a fox. " * 12).encode()
        with tempfile.TemporaryDirectory() as folder:
            path, npy = os.path.join(folder, "text.txt"), os.path.join(folder, "logits.npy")
            with open(path, "wb") as file:
                file.write(text)
            same = json.loads(output("perplexity", "-f", path, "-c", "40", "--json", "--kl-base", DEMO))
            self.assertEqual((same["kl"], same["same_top1"], same["base_nll"]), (0, 1, same["nll"]))
            alone = json.loads(output("perplexity", "-f", path, "-c", "40", "--json"))
            self.assertEqual({key: same[key] for key in alone}, alone)

            # The base: the demo model with one norm smaller, which is enough for other words here and there.
            tensors = json.loads(output("inspect", DEMO, "--json"))["tensors"]
            norm = next(t for t in tensors if t["name"] == "layers.1.ffn_norm")
            with open(DEMO, "rb") as file:
                data = bytearray(file.read())
            part = slice(norm["offset"], norm["offset"] + norm["bytes"])
            count = norm["bytes"] // 4
            data[part] = struct.pack(f"<{count}f", *(x / 4 for x in struct.unpack(f"<{count}f", data[part])))
            base = os.path.join(folder, "base.l3")
            with open(base, "wb") as file:
                file.write(data)
            found = json.loads(output("perplexity", "-f", path, "-c", "40", "--json", "--kl-base", base))
            begin = json.loads(output("inspect", DEMO, "--json"))["configuration"]["begin_token"]
            ids = [begin] + [int(i) for i in output("tokenize", input=text).split()]
            total = base_nll = same_top = count = 0
            for window in [[begin] + ids[i + 1:i + 40] for i in range(0, len(ids) - 39, 40)]:
                rows = []
                for model in (base, DEMO):
                    output("generate", "-m", model, "--tokens", ",".join(map(str, window)), "-n", "0", "-c", "40", "--logits", npy)
                    (_, columns), data = read_npy(npy)
                    rows.append([struct.unpack(f"<{columns}f", row) for row in data])
                for position in range(20, 39):
                    p, q = (log_softmax(each[position]) for each in rows)
                    total += sum(math.exp(a) * (a - b) for a, b in zip(p, q))
                    base_nll -= p[window[position + 1]]
                    same_top += p.index(max(p)) == q.index(max(q))
                    count += 1
        self.assertEqual((found["scored"], found["same_top1"]), (count, same_top / count))
        self.assertTrue(0 < found["same_top1"] < 1)
        self.assertGreater(found["kl"], 0.01)
        self.assertAlmostEqual(found["kl"], total / count, places=5)
        self.assertAlmostEqual(found["base_nll"], base_nll / count, places=4)
        self.assertAlmostEqual(found["base_perplexity"], math.exp(found["base_nll"]), places=6)

    @unittest.skipUnless(os.path.isdir(DATA), "no golden checkpoints")
    def test_a_base_with_another_vocabulary_is_refused(self):
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"Hello " * 100)
            file.flush()
            other = sorted(name for name in os.listdir(DATA) if name.endswith(".l3"))[0]
            status, out, errors = run("perplexity", "-f", file.name, "-c", "32", "--kl-base", os.path.join(DATA, other))
        self.assertEqual((status, out), (1, b""))
        self.assertRegex(errors, ERROR)
        self.assertIn(other, errors)

    def test_a_text_shorter_than_a_window_is_refused(self):
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"Hello")
            file.flush()
            status, _, errors = run("perplexity", "-f", file.name)
        self.assertEqual(status, 1)
        self.assertRegex(errors, ERROR)


class Bench(unittest.TestCase):
    def test_json_has_limits_and_results(self):
        found = json.loads(output("bench", "-p", "16", "-n", "4", "-r", "2", "-t", "1,2", "--json"))
        self.assertEqual(set(found), {"machine", "isa", "limits", "results"})
        for limit in ("read_gbs", "int8_gops", "bf16_gflops", "f32_gflops"):
            self.assertEqual(list(found["limits"][limit]), ["1", "2"])
        self.assertGreater(found["limits"]["read_gbs"]["1"], 0)
        self.assertEqual([r["threads"] for r in found["results"]], [1, 2])
        for result in found["results"]:
            for key in ("model", "type", "device", "ranks", "batch", "context", "prefill_tokens"):
                self.assertIn(key, result)
            for key in ("prefill_tps", "decode_tps", "decode_gbs"):
                self.assertTrue(0 < result[key + "_min"] <= result[key] <= result[key + "_max"], key)

    def test_ranks_are_measured_one_after_the_other_with_what_they_exchange(self):
        found = json.loads(output("bench", "-p", "8", "-n", "4", "-r", "1", "-t", "1", "--ranks", "1,2", "--batch", "1,2", "--json"))
        self.assertEqual([(r["ranks"], r["batch"]) for r in found["results"]], [(1, 1), (1, 2), (2, 1), (2, 2)])
        self.assertEqual(list(found["limits"]["read_gbs"]), ["1", "2"])  # threads of all ranks
        for result in found["results"]:
            alone = result["ranks"] == 1
            self.assertEqual(result["communicate_share"] == 0, alone)
            self.assertEqual(result["communicate_share"], result["decode_stages"]["communicate"])
            self.assertEqual(result["transport"] is None, alone)
        self.assertIn("2 ranks in one process", found["results"][2]["transport"])
        self.assertIn("ranks 2: 2 ranks in one process", output("bench", "-p", "0", "-n", "2", "-r", "1", "--ranks", "2").decode())

    def test_an_unknown_synthetic_model_lists_the_known_ones(self):
        status, _, errors = run("bench", "--synthetic", "gpt-5")
        self.assertEqual(status, 1)
        self.assertIn("llama-3.2-1b", errors)


class Terminal:
    """A program (or a path) on a terminal of its own; its standard output goes to a pipe."""

    def __init__(self, name, *flags):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen([os.path.join(PROGRAMS, name), *flags], stdin=slave, stdout=subprocess.PIPE, stderr=slave,
                                        start_new_session=True, preexec_fn=self.take_terminal)
        os.close(slave)
        self.screen = b""  # what it has shown, from the last thing that was waited for

    @staticmethod
    def take_terminal():
        import fcntl
        import termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text):
        os.write(self.master, text)

    def wait_for(self, text, seconds=60):
        start = time.time()
        while text not in self.screen:
            if time.time() - start > seconds:
                raise AssertionError(f"no {text!r} in {self.screen!r}")
            if select.select([self.master], [], [], 0.1)[0]:
                self.screen += os.read(self.master, 4096)
        before, self.screen = self.screen.split(text, 1)
        return before

    def wait_for_prompt(self):
        before = self.wait_for(b"> ")
        time.sleep(0.5)  # it is shown just before the terminal is set up for editing
        return before

    def end(self):
        deadline = time.time() + 60
        while self.process.poll() is None and time.time() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self.master, 4096)
                except OSError:
                    break
        out = self.process.communicate(timeout=60)[0]
        os.close(self.master)
        return self.process.returncode, out


class OnTerminal(unittest.TestCase):
    def terminal(self, *command):
        terminal = Terminal(*command)
        self.addCleanup(terminal.process.kill)
        return terminal

    def terminal_with_a_stopped_answer(self, *command):
        """A terminal that waits at its prompt again, after the question and what was said of its answer before Ctrl-C."""
        question = "Tell me a long story."
        for _ in range(5):  # the answer may be complete before Ctrl-C arrives
            terminal = self.terminal(*command, "--temp", "0", "-t", "1")
            terminal.wait_for_prompt()
            terminal.type(question.encode() + b"\n")
            stdout = terminal.process.stdout.fileno()
            answer = os.read(stdout, 1)  # the answer has begun
            terminal.type(b"\x03")
            try:
                terminal.wait_for(b"the answer was stopped", 5)
            except AssertionError:
                continue
            while not answer.endswith(b"\n"):
                answer += os.read(stdout, 4096)
            terminal.wait_for_prompt()
            return terminal, question, answer[:-1].decode()
        self.fail("no answer was stopped")


def rendered(*contents):
    """The ids of a conversation in the llama3 format, of the user and the assistant in turn, made here from the parts."""
    special = {name: int(output("tokenize", "--special", input=f"<|{name}|>".encode()))
               for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id")}
    parts = ["user", "assistant", "\n\n", *map(str.strip, contents)]
    user, assistant, newlines, *texts = (
        [int(i) for i in line.split()]
        for line in output("tokenize", "-0", input="".join(part + "\0" for part in parts).encode()).splitlines())
    ids = [special["begin_of_text"]]
    for i, text in enumerate([*texts, None]):
        ids += [special["start_header_id"], *(assistant if i % 2 else user), special["end_header_id"], *newlines]
        ids += [] if text is None else [*text, special["eot_id"]]
    return ids


def answer_to(*contents):
    """What the model says next, most likely tokens only, computed by generate from ids that were put together here."""
    return output("generate", "--tokens", ",".join(map(str, rendered(*contents))), "--temp", "0").decode()


class Chat(OnTerminal):

    def test_turns_come_from_a_pipe_one_per_line(self):
        two = output("chat", "-n", "20", input=b"Hello\nTell me a story.\n")
        one = output("chat", "-n", "20", input=b"Hello\n")
        self.assertTrue(two.startswith(one))
        self.assertGreater(len(two), len(one) + 1)
        self.assertEqual(output("chat", "-n", "20", "-p", "Hello", input=b"Tell me a story.\n"), two)
        self.assertEqual(output("chat", "-n", "20", input=b"\nHello\n\n\nTell me a story."), two)  # empty lines; no last newline

    def test_a_line_that_ends_with_a_backslash_goes_on_in_the_next(self):
        whole = output("chat", "-n", "20", "-p", "Tell me\n\na story.")
        self.assertEqual(output("chat", "-n", "20", input=b"Tell me\\\n\\\na story.\n"), whole)
        self.assertEqual(output("chat", "-n", "20", input=b"Tell me\\\n\\\na story.\\"), output("chat", "-n", "20", "-p", "Tell me\n\na story.\n"))

    def test_the_same_seed_gives_the_same_answers(self):
        answers = [output("chat", "-n", "30", "--temp", "1", "-s", seed, input=b"Tell me a story.\n") for seed in ("7", "7", "8", "9")]
        self.assertEqual(answers[0], answers[1])
        self.assertGreater(len(set(answers)), 1)

    def test_a_system_message_and_a_chat_style_are_taken(self):
        def answer(*flags):
            return output("chat", "-n", "40", "--temp", "1", "-s", "3", *flags, input=b"Tell me a story about a fox.\n")
        self.assertEqual(answer(), answer("--chat-style", "reference"))
        self.assertEqual(answer("-sys", ""), answer())
        self.assertNotEqual(answer("-sys", "Talk about owls and nothing else, in very short sentences."), answer())
        self.assertTrue(answer("--chat-style", "hf").endswith(b"\n"))  # the same ids: the format llama3 differs in white space only
        status, _, errors = run("chat", "--date", "1 Jan 2026", input=b"Hi\n")  # the demo model's chat format has no date
        self.assertEqual(status, 1)
        self.assertIn("date", errors)

    def test_a_full_context_forgets_old_turns_and_says_so(self):
        turns = b"Tell me a story about a fox and a frog.\n" * 8
        status, out, errors = run("chat", "-c", "128", "-n", "24", "--temp", "0", input=turns)
        self.assertEqual(status, 0, errors)
        self.assertIn("forgotten", errors)
        self.assertGreaterEqual(out.count(b"\n"), 8)

    def test_a_turn_that_cannot_fit_is_an_error(self):
        status, _, errors = run("chat", "-c", "32", input=b"word " * 100 + b"\n")
        self.assertEqual(status, 1)
        self.assertRegex(errors, ERROR)

    def test_what_happens_in_a_full_context_is_chosen(self):
        turns = b"Tell me a story about a fox and a frog.\n" * 8
        flags = ("chat", "-c", "128", "-n", "24", "--temp", "0", "--overflow")
        self.assertEqual(run(*flags, "restart", input=turns), run(*flags[:-1], input=turns))
        status, out, errors = run(*flags, "error", input=turns)
        self.assertEqual(status, 1)
        self.assertNotIn("forgotten", errors)
        self.assertRegex(errors.splitlines(True)[-1], ERROR)
        self.assertIn("at most 127", errors)
        self.assertIn(out.count(b"\n"), range(2, 7))  # the turns before it were answered
        terminal = self.terminal(*flags, "error")
        for _ in range(8):  # on a terminal the program goes on, and /clear makes room
            if b"does not fit" in terminal.wait_for_prompt():
                break
            terminal.type(b"Tell me a story about a fox and a frog.\n")
        else:
            self.fail("everything fitted")
        terminal.type(b"/clear\n")
        terminal.wait_for(b"A new conversation.")
        terminal.wait_for_prompt()
        terminal.type(b"Hello\n/quit\n")
        status, out = terminal.end()
        self.assertEqual(status, 0)
        self.assertTrue(out.splitlines()[-1])

    def test_answers_are_those_of_the_whole_conversation_rendered_anew(self):
        turns = ("Hello", "Tell me a story about a fox.", "who was it about?")
        found, said = output("chat", "--temp", "0", input="\n".join(turns).encode()).decode(), []
        for turn in turns:
            said += [turn, answer_to(*said, turn)]
        self.assertEqual(found, "".join(said[1::2]))

    def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(self):
        terminal, question, answer = self.terminal_with_a_stopped_answer("chat")
        self.assertNotEqual(answer, "")
        self.assertTrue(answer_to(question).startswith(answer))
        terminal.type(b"who was it about?\n")
        terminal.wait_for_prompt()
        terminal.type(b"/clear\n")
        terminal.wait_for(b"A new conversation.")
        terminal.wait_for_prompt()
        terminal.type(b"who was it about?\n")
        terminal.wait_for_prompt()
        terminal.type(b"\x04")
        status, out = terminal.end()
        self.assertEqual(status, 0)
        kept, new = answer_to(question, answer, "who was it about?"), answer_to("who was it about?")
        self.assertNotEqual(kept, new)  # or this test would see nothing
        self.assertEqual(out.decode(), kept + new)

    def test_ctrl_d_ends(self):
        terminal = self.terminal("chat")
        terminal.wait_for_prompt()
        terminal.type(b"\x04")
        self.assertEqual(terminal.end(), (0, b""))

    def test_ctrl_c_twice_at_the_prompt_ends(self):
        terminal = self.terminal("chat")
        terminal.wait_for_prompt()
        terminal.type(b"\x03")
        terminal.wait_for(b"Ctrl-C again")
        terminal.wait_for_prompt()
        terminal.type(b"\x03")
        self.assertEqual(terminal.end()[0], 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    unittest.main(verbosity=2)
