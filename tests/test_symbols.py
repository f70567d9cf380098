#!/usr/bin/env python3
"""What the object file of the implementation says about its manners: which functions it calls, and what it could keep between calls.

    LLAMA3_PROGRAMS=build python3 tests/test_symbols.py
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = os.environ.get("LLAMA3_PROGRAMS", os.path.join(SOURCE, "build"))
LIBRARY = os.path.join(PROGRAMS, "libllama3_implementation.a")

# Functions that end the process, write somewhere, or change what belongs to the host.
FORBIDDEN = [
    r"exit|_exit|_Exit|quick_exit|at_quick_exit|atexit|__cxa_atexit|abort|raise|kill|tgkill|pthread_kill",
    r"__assert.*|__ubsan.*|std::set_terminate.*|std::set_new_handler.*",
    r"v?f?d?printf|__v?f?d?printf_chk|puts|fputs|putchar|putc|fputc|fwrite|write|writev|pwrite|perror|psignal|syslog|vsyslog",
    r"std::(cout|cerr|clog|ios_base::Init).*",
    r"setlocale|uselocale|std::locale::global.*",
    r"signal|bsd_signal|sigaction|sigprocmask|pthread_sigmask|sigaltstack|alarm|setitimer",
    r"fe(set|update|hold|clear|raise|enable|disable).*",
    r"omp_(set|init)_.*|kmp_set_.*|__kmpc_push_proc_bind",
    r"setenv|putenv|unsetenv|chdir|fchdir|umask|fork|vfork|exec.*|system|popen|dlopen|setrlimit|sched_setaffinity|nice|setpriority",
    r"s?rand|random|srandom|drand48|time|clock|gettimeofday|clock_gettime|localtime|strtok",
]
# std::terminate ends the process, but only inside the standard library's own types: std::thread's destructor calls it where a
# thread was not joined (Team's destructor joins all), and so does what leaves a noexcept function, of which none here throws.

# What a section of data that can be written may hold. The pool of waiters is libstdc++'s own, behind std::atomic::wait.
MUTABLE = [r"std::__detail::__waiter_pool_base::.*", r"guard variable for std::.*", r"DW\.ref\..*"]


def demangled(text):
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def offences(path):
    """The forbidden functions that an object file or a library calls, and the data in it that can change."""
    found = []
    undefined = demangled(subprocess.run(["nm", "-u", path], capture_output=True, text=True, check=True).stdout)
    for line in undefined.splitlines():
        name = re.sub(r"^\s*[Uw] ", "", line).split("@")[0]
        if any(re.fullmatch(pattern, name) for pattern in FORBIDDEN):
            found.append("calls " + name)
    # Sections that may be written, without those that only the dynamic linker writes, at the start (.data.rel.ro).
    table = subprocess.run(["objdump", "-t", "-w", path], capture_output=True, text=True, check=True).stdout
    for line in table.splitlines():
        fields = re.match(r"^[0-9a-f]+ (.{7}) (\S+)\s+([0-9a-f]+)\s+(?:\.hidden |0x\S+ )*(.*)$", line)
        if not fields:
            continue
        flags, section, size, name = fields.groups()
        if not re.match(r"\.(data|bss|tdata|tbss|sdata|sbss|lbss|ldata)|\*COM\*", section) or section.startswith(".data.rel.ro"):
            continue
        name = demangled(name).strip()
        if int(size, 16) == 0 or "d" in flags or any(re.fullmatch(pattern, name) for pattern in MUTABLE):
            continue
        found.append(f"may change {name}")
    return sorted(set(found))


class Symbols(unittest.TestCase):
    @unittest.skipUnless(os.path.exists(LIBRARY), "not built")
    def test_the_library_calls_nothing_that_ends_writes_or_changes_the_process_and_keeps_no_globals(self):
        self.assertEqual(offences(LIBRARY), [])

    @unittest.skipUnless(os.path.exists(LIBRARY), "not built")
    def test_all_its_symbols_are_its_own(self):
        """Everything it defines for others lies in namespace llama3, or is the standard library's."""
        symbols = demangled(subprocess.run(["nm", "--defined-only", "-g", LIBRARY], capture_output=True, text=True, check=True).stdout)
        names = [line.split(None, 2)[2] for line in symbols.splitlines() if re.match(r"^[0-9a-f]+ \w ", line)]
        self.assertGreater(len(names), 100)
        foreign = [name for name in names if not re.search(r"llama3::|std::|__gnu_cxx::|^(operator|DW\.ref\.|__clang_call_terminate)", name)]
        self.assertEqual(foreign, [])

    def test_a_planted_offence_of_every_kind_is_found(self):
        plants = {
            "#include <cstdlib>\nvoid f() { std::exit(1); }": "calls exit",
            "#include <cstdlib>\nvoid f() { std::abort(); }": "calls abort",
            "#include <cassert>\nvoid f(int i) { assert(i); }": "calls __assert_fail",
            "#include <cstdio>\nvoid f(int i) { std::printf(\"%d\", i); }": "calls printf",
            "#include <iostream>\nvoid f(int i) { std::cerr << i; }": "calls std::cerr",
            "#include <clocale>\nvoid f() { std::setlocale(LC_ALL, \"\"); }": "calls setlocale",
            "#include <csignal>\nvoid f() { std::signal(2, SIG_IGN); }": "calls signal",
            "#include <cfenv>\nvoid f() { std::fesetround(FE_UPWARD); }": "calls fesetround",
            "#include <ctime>\nlong f() { return std::time(nullptr); }": "calls time",
            "extern \"C\" void omp_set_num_threads(int);\nvoid f() { omp_set_num_threads(2); }": "calls omp_set_num_threads",
            "int counter;\nint f() { return ++counter; }": "may change counter",
            "int f() { static int calls = 7; return ++calls; }": "may change f()::calls",
            "int f() { thread_local int calls = 7; return ++calls; }": "may change f()::calls",
            "#include <string>\nnamespace llama3 { static std::string last; void f(const char* s) { last = s; } }": "may change llama3::last",
        }
        with tempfile.TemporaryDirectory() as folder:
            path, made = os.path.join(folder, "planted.cpp"), os.path.join(folder, "planted.o")
            for text, expected in plants.items():
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text)
                subprocess.run(["g++", "-std=c++20", "-O1", "-c", path, "-o", made], check=True)
                self.assertIn(expected, offences(made), text)
            with open(path, "w", encoding="utf-8") as file:
                file.write("static const char* const names[] = {\"a\", \"b\"};\nconst char* f(int i) { return names[i]; }")
            subprocess.run(["g++", "-std=c++20", "-O1", "-fPIC", "-c", path, "-o", made], check=True)
            self.assertEqual(offences(made), [])


if __name__ == "__main__":
    if not all(shutil.which(tool) for tool in ("nm", "objdump", "c++filt")):
        print("did not run: binutils are not installed", file=sys.stderr)
        sys.exit(0)
    unittest.main(verbosity=2)
