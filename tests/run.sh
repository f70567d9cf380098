#!/bin/sh
# Runs the tests: sh tests/run.sh           everyday, at most 12 minutes on 2 cores
#                 sh tests/run.sh --all     and under sanitizers, with every instruction set, fuzzing; at most 45 minutes
#                 sh tests/run.sh --fuzz N  only the fuzzing, N seconds for each target
#                 sh tests/run.sh --soak N  only the long run of chats and sessions, N seconds
# Installs what they need (Debian, Ubuntu), builds in build/, prints a line per check and at the end the number of test cases that
# passed and failed. LLAMA3_TOKENIZER_MODEL names the real tokenizer.model of Llama 3 for the check that needs it.
set -u
cd "$(dirname "$0")/.."
root=$PWD

all=no
only=
seconds=20
case "${1-}" in
    "") ;;
    --all) all=yes ;;
    --fuzz | --soak)
        all=yes only=${1#--} seconds=${2-}
        case "$seconds" in
            "" | *[!0-9]*) echo "$1: the seconds are no number (found '$seconds', expected one). See sh tests/run.sh --help." >&2; exit 2 ;;
        esac ;;
    -h | --help) sed -n '2,7s/^# //p' "$0"; exit 0 ;;
    *) echo "$1: no such flag (found $1, expected --all, --fuzz or --soak). See sh tests/run.sh --help." >&2; exit 2 ;;
esac

# ── What is needed ────────────────────────────────────────────────────────────────────────────────────────────────────

compiles() { # a line of C++ and flags of a compiler: does it build?
    line=$1
    shift
    printf '%s\n' "$line" | "$@" -x c++ - -o /dev/null >/dev/null 2>&1
}
missing() {
    command -v g++ >/dev/null 2>&1 || printf ' g++'
    command -v ninja >/dev/null 2>&1 || printf ' ninja-build'
    command -v pkg-config >/dev/null 2>&1 || printf ' pkg-config'
    compiles '#include <doctest/doctest.h>' g++ -c || printf ' doctest-dev'
    command -v cmake >/dev/null 2>&1 || printf ' cmake'
    compiles '#include <histedit.h>' g++ -c || printf ' libedit-dev'
    command -v mpicxx >/dev/null 2>&1 || printf ' libopenmpi-dev'
    command -v mpirun >/dev/null 2>&1 || printf ' openmpi-bin'
    python3 -c 'import venv, ensurepip' >/dev/null 2>&1 || printf ' python3 python3-venv'
    [ $all = no ] && return
    command -v clang++ >/dev/null 2>&1 || printf ' clang'
    compiles 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' \
        clang++ -fsanitize=fuzzer,address,undefined || printf ' libclang-rt-dev'
    [ -n "$only" ] && return
    compiles '#include <omp.h>' clang++ -fopenmp -c || printf ' libomp-dev'
    command -v aarch64-linux-gnu-g++ >/dev/null 2>&1 || printf ' g++-aarch64-linux-gnu'
    command -v qemu-aarch64 >/dev/null 2>&1 || printf ' qemu-user'
    command -v x86_64-w64-mingw32-g++-posix >/dev/null 2>&1 || printf ' g++-mingw-w64-x86-64-posix'
    command -v wine >/dev/null 2>&1 || printf ' wine wine64'
}
packages=$(missing)
if [ -n "$packages" ]; then
    if [ "$(id -u)" = 0 ]; then as_root=
    elif command -v sudo >/dev/null 2>&1; then as_root=sudo
    else as_root=none; fi
    if [ "$as_root" = none ] || ! command -v apt-get >/dev/null 2>&1; then
        echo "tests/run.sh: tools are missing (found none of:$packages). Install them (Debian, Ubuntu: apt-get install$packages)." >&2
        exit 1
    fi
    echo "Installing$packages ..."
    export DEBIAN_FRONTEND=noninteractive
    $as_root apt-get update -q >/dev/null
    if ! $as_root apt-get install -q -y --no-install-recommends $packages >/dev/null; then
        # Before Debian 12 and Ubuntu 24.04 the sanitizers' package has a version in its name, or comes with clang.
        packages=$(printf '%s' "$packages" | sed 's/ libclang-rt-dev//')
        [ -z "$packages" ] || $as_root apt-get install -q -y --no-install-recommends $packages >/dev/null || exit 1
    fi
fi

mkdir -p build/logs
if ! cmp -s tests/requirements.txt build/venv/requirements.txt; then
    echo "Installing Python packages in build/venv ..."
    rm -rf build/venv
    python3 -m venv build/venv && build/venv/bin/pip install -q --disable-pip-version-check -r tests/requirements.txt &&
        cp tests/requirements.txt build/venv/ || { echo "tests/run.sh: the Python packages cannot be installed. See above." >&2; exit 1; }
fi
PATH=$root/build/venv/bin:$PATH
export PATH

# ── Checks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

: >build/logs/counts
trap 'trap - TERM; kill 0' INT  # what runs in the background does not see Ctrl-C

# check NAME COMMAND...: runs it with its output in build/logs/NAME.log, and adds the test cases that the log reports: doctest's and
# unittest's, one for each of meson's tests that died without a report, and one for a command that reports none.
check() {
    label=$1
    log=$root/build/logs/$(printf '%s' "$1" | tr -d , | tr ' ' _).log
    shift
    start=$(date +%s)
    "$@" >"$log" 2>&1 </dev/null
    status=$?
    # Meson keeps the output of its tests in a file of its own.
    testlog=$(sed -n 's/^Full log written to //p' "$log")
    [ -z "$testlog" ] || cat "$testlog" >>"$log"
    set -- $(awk '
        /^\[doctest\] test cases:/ { gsub(/\|/, " "); for (i = 1; i < NF; i++) { if ($(i+1) == "passed") p += $i; if ($(i+1) == "failed") f += $i } seen = 1 }
        /^Ran [0-9]+ tests? in/ { ran = $2; bad = 0; skipped = 0; seen = 1 }
        /^(OK|FAILED)( \(.*\))?$/ && ran != "" {
            line = $0
            while (match(line, /(failures|errors|unexpected successes|skipped)=[0-9]+/)) {
                part = substr(line, RSTART, RLENGTH); line = substr(line, RSTART + RLENGTH)
                n = part; sub(/.*=/, "", n); if (part ~ /^skipped/) skipped += n; else bad += n
            }
            p += ran - bad - skipped; f += bad; ran = ""
        }
        END { print p + 0, f + 0 }' "$log")
    good=$1
    bad=$2
    if [ $status -ne 0 ] && [ "$bad" = 0 ]; then bad=1; fi
    if [ $status -eq 0 ] && [ "$good" = 0 ]; then good=1; fi
    echo "$good $bad" >>build/logs/counts
    if [ $status -eq 0 ]; then mark='ok    '; else mark='FAILED'; fi
    printf '%s  %-28s %5d passed, %d failed  (%d s)\n' "$mark" "$label" "$good" "$bad" $(($(date +%s) - start))
    # What did not run is said, with the reason.
    grep -hoE "(\.\.\.|^)[^.]*skipped '.*'|[^ :]*:? ?did not run:? .*|[a-z+]+ is not installed.*" "$log" | sed "s/^\.\.\. //" | sort | uniq -c |
        sed 's/^ *\([0-9]*\) /        not run, \1: /'
    [ $status -eq 0 ] || { sed 's/^/    /' "$log" | tail -60; echo "    ... all of it is in $log"; }
    return $status
}

finish() {
    if [ -z "${LLAMA3_TOKENIZER_MODEL-}" ]; then
        echo "The check with the real tokenizer did not run: LLAMA3_TOKENIZER_MODEL is not set."
    fi
    awk '{ p += $1; f += $2 } END { print p + 0 " passed, " f + 0 " failed"; exit f > 0 }' build/logs/counts
    exit
}

built() { # the targets named, or all
    [ -f build/build.ninja ] || env CXX="${CXX:-g++}" meson setup build -Dtests=enabled || return
    ninja -C build "$@"
}

# Fuzzes each target for some seconds, from the committed corpus and what earlier runs found.
fuzz() {
    check "build, fuzzing" clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DLLAMA3_NO_UNROLL -I. -pthread \
        tests/fuzz/fuzz.cpp -o build/fuzz_planted || return
    check "fuzzing, planted fault" sh -c \
        'build/fuzz_planted -runs=10000000 -artifact_prefix=build/ 2>&1 | grep "AddressSanitizer: heap-buffer-overflow"'
    for target in model_file tokenizer chat sampling; do
        name=fuzz_$target
        mkdir -p "build/corpus/$name"
        ln -f build/fuzz_planted "build/$name"
        check "$name for $1 s" "build/$name" -max_total_time="$1" -rss_limit_mb=4096 -timeout=60 -print_final_stats=1 \
            -artifact_prefix=build/logs/ "build/corpus/$name" "tests/fuzz/corpus/$target"
    done
    check "fuzz_convert, planted faults" python3 tests/fuzz/fuzz_convert.py --self-test &&
        check "fuzz_convert for $1 s" python3 tests/fuzz/fuzz_convert.py --time "$1"
}

# Old and fresh objects side by side for some seconds; a leak and a forgotten state must be seen.
soak() {
    check "build, soak" built soak || return
    for plant in leak state; do
        check "soak, planted $plant" sh -c "build/soak 1 --plant $plant; [ \$? = 1 ]"
    done
    check "soak for $1 s" build/soak "$1"
}

# The core and the logits with each instruction set but the best of the machine, which the suite took.
instruction_sets() {
    best=$(build/bench -p 1 -n 0 -r 1 --json 2>/dev/null | sed -n 's/.*"isa": "\([a-z0-9_]*\)".*/\1/p')
    for isa in baseline avx2 avx_vnni avx512 avx512_bf16 neon; do
        # The plain loops take minutes for the longest of the golden sequences; core shows that their bits are those of the others.
        case $isa in baseline) golden= ;; *) golden='--suite golden' ;; esac
        [ "$isa" != "$best" ] || continue
        if LLAMA3_ISA=$isa build/bench -p 1 -n 0 -r 1 >/dev/null 2>&1; then
            check "core, $isa" env LLAMA3_ISA=$isa meson test -C build --no-rebuild --suite core --suite contract $golden
        else
            echo "        not run: $isa, which this machine does not have"
        fi
    done
}

# The suite under AddressSanitizer and UndefinedBehaviorSanitizer, and its core under ThreadSanitizer, with the team of std::threads and
# ranks in one process: OpenMP's threads are opaque to them, and MPI's own leaks and races are not ours. Meson builds what the chosen tests need.
memory_sanitized() {
    check "sanitizers, planted overflow" sees address,undefined 'int main(int n, char**) { return n > 9 ? 0 : (new int[2])[n + 1]; }'
    check "sanitizers, planted leak" sees address,undefined 'int* p; int main() { p = new int; p = nullptr; }'
    check "sanitizers, planted shift" sees address,undefined 'int main(int n, char**) { return 1 << (n + 31) ? 0 : 0; }'
    check "suite, sanitizers" sanitized asan address,undefined --no-suite builds --no-suite cuda
}
threads_sanitized() {
    check "thread sanitizer, planted race" sees thread \
        '#include <thread>
int n; int main() { std::thread t([] { ++n; }); ++n; t.join(); }'
    # Without fault injection, which replaces what ThreadSanitizer replaces too, and long tests of kernels and models by one thread.
    check "core, thread sanitizer" sanitized tsan thread --suite core --suite contract \
        --test-args='"--test-case-exclude=attention has the bits*,products have the bits*,any changed byte*,a megabyte of hostile*"'
}
sanitized() { # a folder, sanitizers, and meson's choice of tests
    folder=build/$1
    [ -f "$folder/build.ninja" ] || CXX=clang++ CXXFLAGS='-fno-sanitize-recover=all -DLLAMA3_NO_UNROLL' meson setup "$folder" "-Db_sanitize=$2" -Dtests=enabled \
        -Dopenmp=disabled -Dmpi=disabled -Dcuda=disabled -Db_lundef=false -Doptimization=1 || return
    shift 2
    meson test -C "$folder" --timeout-multiplier 5 "$@"
}

cuda_sanitized() {
    # clang leaves padding in kernels' arguments as it was, and the emulator may take that for a host pointer: g++ for these.
    # Without four long ones whose kernels and back end the others run too; and without stacks beside the fibers' own, which double the time.
    check "CUDA on the emulator, sanitizers" sh -c 'g++ -std=c++20 -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -pthread -I. -Itests \
        -DLLAMA3_CUDA_EMULATOR -DLLAMA3_BASELINE_ONLY -Wno-unknown-pragmas -DLLAMA3_SOURCE_DIR="\"$PWD\"" tests/test_cuda.cpp -o build/cuda_tests_sanitized &&
        ASAN_OPTIONS=detect_stack_use_after_return=0 build/cuda_tests_sanitized --test-case-exclude="the slots are in order*,2 and 4 GPUs that*,GPUs that cannot*,2??4 and 8 ranks on*"'
}
cuda_compiled() { check "nvcc, all architectures" python3 tests/test_nvcc.py; }
matrix() {
    build/venv/bin/pip install -q --disable-pip-version-check ziglang==0.17.1  # clang with the headers of macOS; 100 MB, so not for everyone
    check "build matrix" python3 tests/test_matrix.py
}
fuzzed() { fuzz "$seconds"; }
soaked() { soak 60; }

# sees FLAG TEXT: a program with a planted fault, which the sanitizer must end.
sees() {
    printf '%s\n' "$2" | clang++ -std=c++20 -g "-fsanitize=$1" -fno-sanitize-recover=all -pthread -x c++ - -o "build/planted_$1" &&
        ! "build/planted_$1"
}

export ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
case "$only" in
    fuzz) fuzz "$seconds"; finish ;;
    soak) soak "$seconds"; finish ;;
esac

check build built || finish
check suite meson test -C build --no-rebuild

# Two at a time, the longest first: most of these use one core.
others() {
    for task in memory_sanitized cuda_sanitized cuda_compiled matrix threads_sanitized instruction_sets fuzzed soaked; do
        mkdir "build/logs/$task.taken" 2>/dev/null && "$task"
    done
}
if [ $all = yes ]; then
    rm -rf build/logs/*.taken
    others &
    others &
    wait
fi
finish
