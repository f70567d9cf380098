#!/usr/bin/env python3
"""Fuzzes convert/convert.py: tiny sources of every kind with some of their bytes or fields changed.

    python3 tests/fuzz/fuzz_convert.py --time 20            as long as that, from a new seed
    python3 tests/fuzz/fuzz_convert.py --seed 7 --only 123   one input again
    python3 tests/fuzz/fuzz_convert.py --self-test           planted faults must be found

Every input must end in a file that is whole, or in status 1 and one line in the pattern of all errors and no file; within bounds
of memory and time, without running code from the source, starting a program, or touching a file outside the output folder.
Needs numpy, gguf and safetensors.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unittest
import warnings
import zipfile
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "golden"), str(HERE.parent.parent / "convert")]
sys.dont_write_bytecode = True

import test_convert  # noqa: E402
from test_convert import SMALL, checkpoints, convert  # noqa: E402

MEMORY = 1 << 30     # more than this on top of what was there ends in MemoryError, which is a finding
SECONDS = 60         # an input that takes this long hangs: the usual one takes some milliseconds
WORDS = ["0", "1", "-1", "2", "255", "65536", "2147483647", "4294967296", "1e9", "1e308", "1e999", "-1e-300", "NaN", "null", "true", '""',
         "[]", "{}", '"x"', "[[0]]", "99999999999999999999999999", '"\\ud800"', '"../../x"', '"/etc/passwd"', '"F32"', '"I64"']
NUMBERS = [0, 1, 2, 7, 31, 32, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1,
           1 << 63, (1 << 64) - 1]
# Pickle opcodes that name or call something, with what a hostile file would name.
PICKLES = [b"cos\nsystem\n(S'true'\ntR", b"c__builtin__\neval\n(S'1'\ntR", b"cbuiltins\nexec\n(S'1'\ntR", b"csubprocess\nPopen\n(S'true'\ntR",
           b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R", b"ctorch._utils\n_rebuild_tensor_v2\n(tR", b"\x80\x02", b"0", b"2", b"R", b"b",
           b"\x81", b"t", b"Q", b"q\x00", b"h\x00", b"j\xff\xff\xff\xff", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"."]


class Finding(Exception):
    pass


# ── What the process does meanwhile ──

class Watch:
    """Notes what no conversion may do. An audit hook stays for ever, so there is one, and it looks only while it is asked to."""
    active, folder, seen = False, "", []

    @classmethod
    def hook(cls, event, arguments):
        if not cls.active:
            return
        if event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "socket.connect",
                     "pickle.find_class", "ctypes.dlopen", "pty.spawn", "os.kill"):
            cls.seen.append(f"{event} {arguments}")
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
            mode = arguments[1] or ""
            writes = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not os.path.abspath(path).startswith(cls.folder) and path != os.devnull:
                cls.seen.append(f"wrote {path}")


sys.addaudithook(Watch.hook)


def hang(*_):
    raise Finding(f"it ran for {SECONDS} s")


def trial(source, folder, *arguments):
    """Converts a source into `folder`, which is empty. Returns 0 or 1, whether it was converted; raises a Finding."""
    out, text = folder / "x.l3", io.StringIO()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    Watch.seen, Watch.folder = [], str(folder)
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        Watch.active = True
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
            status = convert.main([str(source), "-o", str(out), *arguments])
    except SystemExit as error:
        raise Finding(f"it left by exit({error.code})") from error
    except Exception as error:
        if isinstance(error, Finding):
            raise
        raise Finding(f"{type(error).__name__} came out: {error}") from error
    finally:
        Watch.active = False
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if Watch.seen:
        raise Finding("; ".join(Watch.seen))
    said = text.getvalue()
    if "convert.py has a fault" in said:
        raise Finding(said.splitlines()[-1])
    if status == 1:
        if not re.match(test_convert.ERROR, said.splitlines()[-1]):
            raise Finding("not one line in the pattern of errors: " + said[-500:])
        if os.listdir(folder):
            raise Finding(f"a failed conversion left {os.listdir(folder)}")
    elif status == 0:
        if os.listdir(folder) != ["x.l3"]:
            raise Finding(f"a conversion left {os.listdir(folder)}")
        try:
            file = test_convert.L3(out)
            file.numbers(), file.words()
        except Exception as error:
            raise Finding(f"it wrote a file that is none: {traceback.format_exc()[-300:]}") from error
    else:
        raise Finding(f"status {status}")
    return int(status == 0)


# ── Changes ──

def change_bytes(rng, data, within):
    """Some bytes, or whole numbers at borders, in the first `within`; sometimes it is cut or grows."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, how = rng.randrange(max(1, min(within, len(data)))), rng.randrange(10)
        if how < 4 and at < len(data):
            data[at] = rng.randrange(256)
        elif how < 6:
            struct.pack_into("<I", data, min(at, max(0, len(data) - 4)), rng.choice(NUMBERS) & 0xFFFFFFFF) if len(data) >= 4 else None
        elif how < 8:
            struct.pack_into("<Q", data, min(at, max(0, len(data) - 8)), rng.choice(NUMBERS)) if len(data) >= 8 else None
        elif how == 8:
            data[at:at + rng.randrange(20)] = rng.randbytes(rng.randrange(20))
        else:
            del data[rng.randrange(len(data) + 1):]
    return bytes(data)


def change_json(rng, text):
    """One value of a JSON document becomes another, or a key or a list is torn: the syntax stays right, most of the time."""
    if rng.randrange(8) == 0:
        return change_bytes(rng, text.encode(), len(text)).decode("utf-8", "surrogateescape")
    values = list(re.finditer(r'-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|"(?:[^"\\]|\\.)*"|true|false|null|[\[\]{},:]', text))
    for _ in range(rng.choice((1, 1, 2))):
        found = rng.choice(values[:4000] if rng.randrange(2) else values)
        new = rng.choice((*WORDS, rng.choice(values).group())) if rng.randrange(6) else ""
        text = text[:found.start()] + new + text[found.end():]
        values = [v for v in values if v.end() <= min(found.start(), len(text))] or values[:1]
    return text


def change_safetensors(rng, data):
    length = struct.unpack_from("<Q", data)[0]
    if rng.randrange(4) == 0:
        return change_bytes(rng, data, length + 8)
    header = change_json(rng, data[8:8 + length].decode()).encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(header)) + header + data[8 + length:]


def change_pth(rng, data):
    """Inside the archive, with its checksums made right again; sometimes the archive itself."""
    if rng.randrange(4) == 0:
        return change_bytes(rng, data, len(data))
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        victim = rng.choice(old.namelist()) if rng.randrange(5) == 0 else next(n for n in old.namelist() if n.endswith("data.pkl"))
        for info in old.infolist():
            content, name = old.read(info), info.filename
            if name == victim:
                how = rng.randrange(6)
                if how < 3:
                    content = change_bytes(rng, content, len(content))
                elif how < 5 and content:
                    at = rng.randrange(len(content))
                    content = content[:at] + rng.choice(PICKLES) + content[at + rng.randrange(3):]
                else:
                    name = rng.choice(("../evil", "/tmp/evil", name + "x", ""))
            new.writestr(zipfile.ZipInfo(name), content)
    return made.getvalue()


def change_lines(rng, data):
    """tokenizer.model: lines of base64 and a rank."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 2))):
        at = rng.randrange(len(lines))
        lines[at] = rng.choice((b"", b"=", b"AA== 5", b"!!! 7", lines[at][:-1], lines[at] + b"0", lines[rng.randrange(len(lines))],
                                b"A" * 100000 + b" 1", b"QQ== 99999999999999999999", b"QQ== -1", b"\xff\xfe"))
    return b"\n".join(lines)


def sources(home):
    """Folders or files, with those of their files that are changed and how."""
    test_convert.hf(home / "hf"), test_convert.hf(home / "shards", shards=3), test_convert.meta(home / "meta")
    test_convert.hf(home / "old", tokenizer="both")
    (home / "old" / "tokenizer.json").unlink()
    for kind in ("bf16", "q8_0", "q4_k"):
        checkpoints.write_gguf(home / f"{kind}.gguf", test_convert.SEGMENTS8 if kind == "q4_k" else SMALL, kind)
    with contextlib.redirect_stderr(io.StringIO()):
        assert convert.main([str(home / "hf"), "-o", str(home / "x.l3")]) == 0
    text = lambda change: lambda rng, data: change(rng, data.decode()).encode("utf-8", "surrogateescape")  # noqa: E731
    listed = [(home / "hf", "model.safetensors", change_safetensors), (home / "hf", "config.json", text(change_json)),
              (home / "hf", "tokenizer.json", text(change_json)), (home / "shards", "model.safetensors.index.json", text(change_json)),
              (home / "shards", "model-00002-of-00003.safetensors", change_safetensors),
              (home / "meta", "consolidated.00.pth", change_pth), (home / "meta", "params.json", text(change_json)),
              (home / "meta", "tokenizer.model", change_lines), (home / "old", "tokenizer_config.json", text(change_json)),
              (home / "old", "generation_config.json", text(change_json)), (home / "old", "original/tokenizer.model", change_lines)]
    for kind in ("bf16", "q8_0", "q4_k"):
        listed.append((home / f"{kind}.gguf", "", lambda rng, data: change_bytes(rng, data, rng.choice((200, 3000, 9000, len(data))))))
    listed.append((home / "x.l3", "", lambda rng, data: change_bytes(rng, data, rng.choice((128, 400, 9000, len(data))))))
    return [(path, path / name if name else path, change) for path, name, change in listed]


def one_input(listed, seed, number, home):
    """Changes one file, tries the conversion, and puts the file back."""
    rng = random.Random(f"{seed} {number}")
    source, file, change = rng.choice(listed)
    whole = file.read_bytes()
    folder = home / "out"
    folder.mkdir()
    try:
        file.write_bytes(change(rng, whole))
        return trial(source, folder, "--type", rng.choice(("f32", "bf16", "q8", "q4")))
    except Finding as error:
        raise Finding(f"{file.relative_to(home)}: {error}") from error
    finally:
        file.write_bytes(whole)
        shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=float, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    home = Path(tempfile.mkdtemp(prefix="l3-fuzz-", dir=memory))
    try:
        listed = sources(home)
        done = good = 0
        end = time.monotonic() + options.time
        while time.monotonic() < end:
            number = done if options.only is None else options.only
            try:
                good += one_input(listed, options.seed, number, home)
            except Finding as error:
                print(f"--seed {options.seed} --only {number}: {error}")
                return 1
            done += 1
            if options.only is not None:
                break
        print(f"{done} inputs from seed {options.seed}: {good} converted, {done - good} refused")
        return 0
    finally:
        shutil.rmtree(home)


class SelfTest(unittest.TestCase):
    """Each kind of finding, planted in the converter."""

    def setUp(self):
        warnings.simplefilter("ignore")
        self.home = Path(tempfile.mkdtemp(prefix="l3-fuzz-"))
        self.addCleanup(shutil.rmtree, self.home)
        self.source = test_convert.hf(self.home / "hf")
        (self.home / "out").mkdir()

    def planted(self, fault, expected):
        true_source = convert.open_source

        def open_source(*arguments):
            fault()
            return true_source(*arguments)
        with mock.patch.object(convert, "open_source", open_source), self.assertRaisesRegex(Finding, expected):
            trial(self.source, self.home / "out")

    def test_a_good_source_is_no_finding(self):
        self.assertEqual(trial(self.source, self.home / "out"), 1)

    def test_an_error_of_python_is_found(self):
        self.planted(lambda: {}["tensor"], "has a fault")

    def test_a_conversion_that_needs_too_much_memory_is_found(self):
        self.planted(lambda: bytearray(2 * MEMORY), "has a fault.*MemoryError")

    def test_one_that_runs_a_program_is_found(self):
        self.planted(lambda: os.system("true"), "os.system")

    def test_one_that_unpickles_freely_is_found(self):
        import pickle
        self.planted(lambda: pickle.loads(b"cos\ngetpid\n."), "pickle.find_class")

    def test_one_that_writes_elsewhere_is_found(self):
        self.planted(lambda: (self.home / "elsewhere").write_text("x"), "wrote .*elsewhere")

    def test_one_that_hangs_is_found(self):
        with mock.patch.dict(globals(), SECONDS=1):
            self.planted(lambda: time.sleep(30), "it ran for|Finding")

    def test_one_that_leaves_something_is_found(self):
        def leave():
            (self.home / "out" / "x.l3.part").write_text("x")
            raise convert.Fail("here", "planted", "it", "nothing", "Go on.")
        self.planted(leave, "left .*part")

    def test_one_that_writes_a_broken_file_is_found(self):
        true_write = convert.write

        def write(source, kind, part, options):
            true_write(source, kind, part, options)
            data = bytearray(Path(part).read_bytes())
            data[-1] ^= 1
            Path(part).write_bytes(data)
        with mock.patch.object(convert, "write", write), self.assertRaisesRegex(Finding, "a file that is none"):
            trial(self.source, self.home / "out")


if __name__ == "__main__":
    if sys.argv[1:] == ["--self-test"]:
        unittest.main(argv=sys.argv[:1], verbosity=2)
    sys.exit(main())
