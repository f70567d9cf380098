#!/bin/sh
# Everything that needs a GPU, in at most 9 minutes: sh tests/gpu.sh [FOLDER]
#
# Builds kernels.cuh for this machine's GPU, the tests and the programs (in FOLDER, else build/gpu), runs every CUDA test on the
# device, the sanitizers of the CUDA Toolkit on a small model, compares the demo model with the CPU, and measures: the cost of a
# dependent stage, and decode and prefill against the limits of the GPU. Ends with a table; results.json in FOLDER has the numbers.
set -u
cd "$(dirname "$0")/.."
folder=${1:-build/gpu}
mkdir -p "$folder"
started=$(date +%s)
failed=0

PATH=$PATH:/usr/local/cuda/bin
cuda=$(dirname "$(dirname "$(command -v nvcc)")" 2>/dev/null)
if ! command -v nvcc >/dev/null; then
    echo "tests/gpu.sh: nvcc is missing (found none, expected the CUDA Toolkit). Install it, or add its bin folder to PATH." >&2
    exit 1
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "tests/gpu.sh: there is no GPU (found none, expected one that nvidia-smi lists). Run it on a machine that has one." >&2
    exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv

elapsed() { echo $(($(date +%s) - started)); }
report() { # NAME STATUS
    if [ "$2" = 0 ]; then printf 'ok      %-40s (%d s)\n' "$1" "$(elapsed)"
    else printf 'FAILED  %-40s (%d s): see %s\n' "$1" "$(elapsed)" "$folder/$1.log"; failed=1; fi
}
run() { # NAME SECONDS COMMAND...: with a time limit, its output in a file
    name=$1 limit=$2
    shift 2
    timeout "$limit" "$@" >"$folder/$name.log" 2>&1
    status=$?
    report "$name" $status
    return $status
}
background() { # NAME COMMAND...: the status goes to a file
    name=$1
    shift
    ( "$@" >"$folder/$name.log" 2>&1; echo $? >"$folder/$name.status" ) &
}

# ── Build: what does not depend on each other at once ──
doctest=
for include in /usr/include /usr/local/include; do [ -f "$include/doctest/doctest.h" ] && doctest=yes; done
flags="-std=c++20 -O3 -arch=native -I. -Xcompiler -pthread"
rm -f "$folder"/*.status
background kernels nvcc -std=c++20 -O3 -arch=native -Xptxas -v -x cu -c kernels.cuh -o "$folder/kernels.o"
background implementation g++ -std=c++20 -O2 -fopenmp -I. -c tests/implementation.cpp -o "$folder/implementation.o"
background build_bench_cuda nvcc $flags -x cu -c tests/bench_cuda.cpp -o "$folder/bench_cuda.o"
background build_stage_cost nvcc -std=c++20 -O3 -arch=native tests/stage_cost.cu -o "$folder/stage_cost"
nccl=
if [ -f "$cuda/include/nccl.h" ]; then nccl="-DLLAMA3_NCCL -L$cuda/lib -lnccl"; else echo "not run: NCCL, which is not installed"; fi
[ -z "$doctest" ] || background build_test_cuda nvcc $flags $nccl -lineinfo -diag-suppress 1675 -x cu "-DLLAMA3_SOURCE_DIR=\"$PWD\"" tests/test_cuda.cpp -lcublasLt -o "$folder/test_cuda"
wait
link="$folder/implementation.o $folder/kernels.o -L$cuda/lib64 -L$cuda/targets/x86_64-linux/lib -Wl,-rpath,$cuda/lib64 -lcudart -lcublasLt"
background link_bench_cuda g++ -fopenmp "$folder/bench_cuda.o" "$folder/implementation.o" -L"$cuda/lib64" -Wl,-rpath,"$cuda/lib64" -lcudart -lcublasLt -o "$folder/bench_cuda"
for program in generate bench perplexity; do
    background "build_$program" g++ -std=c++20 -O2 -fopenmp -I. -DLLAMA3_CUDA "-DLLAMA3_SOURCE_DIR=\"$PWD\"" "examples/$program.cpp" $link -o "$folder/$program"
done
wait
for status in "$folder"/*.status; do report "$(basename "$status" .status)" "$(cat "$status")"; done

# ── Is it right? ──
if [ -n "$doctest" ]; then
    run tests 150 "$folder/test_cuda"
    grep -E "test cases:|assertions:" "$folder/tests.log"
    export LLAMA3_CUDA_GRAPHS=0
    small="rewinding*"
    command -v compute-sanitizer >/dev/null || echo "the next two fail: compute-sanitizer of the CUDA Toolkit is not installed"
    run memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$folder/test_cuda" "-tc=$small"
    run racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 "$folder/test_cuda" "-tc=$small"
    unset LLAMA3_CUDA_GRAPHS
else
    echo "not run: the tests, because doctest is not installed (apt-get install doctest-dev)"
fi
run demo_cpu 60 "$folder/generate" -p "Once upon a time" -n 64 --temp 0 --ids
run demo_cuda 60 "$folder/generate" -p "Once upon a time" -n 64 --temp 0 --ids --device cuda
run demo_cuda_again 60 "$folder/generate" -p "Once upon a time" -n 64 --temp 0 --ids --device cuda
cmp -s "$folder/demo_cuda.log" "$folder/demo_cuda_again.log"
report "two_runs_are_equal" $?
for ranks in 2 4; do # in lock-step on one GPU; the prompt is short enough for matrix x vector, whose bits do not depend on ranks
    run "demo_cuda_${ranks}_ranks" 60 "$folder/generate" -p "Once upon a time" -n 64 --temp 0 --ids --device cuda --ranks $ranks
    cmp -s "$folder/demo_cuda.log" "$folder/demo_cuda_${ranks}_ranks.log"
    report "${ranks}_ranks_equal_one" $?
done
echo "tokens that CPU and GPU share from the start: $(cat "$folder/demo_cpu.log" "$folder/demo_cuda.log" |
    awk '{ for (i = 1; i <= NF; ++i) t[NR, i] = $i; n = NF } END { i = 1; while (i <= n && t[1, i] == t[2, i]) ++i; print i - 1 " of " n }')"

# ── Is it fast? ──
run stage_cost 40 "$folder/stage_cost" && cat "$folder/stage_cost.log"
left=$((500 - $(elapsed)))
run bench_cuda "$left" "$folder/bench_cuda" "$folder/results.json" $((left - 70)) && cat "$folder/bench_cuda.log"
echo "$(elapsed) s in all"
exit $failed
