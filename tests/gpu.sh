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
rm -f "$folder"/*.status "$folder"/*.o "$folder/test_cuda"

PATH=$PATH:/usr/local/cuda/bin
if ! command -v nvcc >/dev/null; then
    echo "tests/gpu.sh: nvcc is missing (found none, expected the CUDA Toolkit). Install it, or add its bin folder to PATH." >&2
    exit 1
fi
cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
export LD_LIBRARY_PATH="$cuda/lib64:$cuda/lib:${LD_LIBRARY_PATH-}" # the system need not know the Toolkit's libraries
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
has() { echo "#include <$1>" | g++ -I"$folder" -I"$cuda/include" -x c++ -E - >/dev/null 2>&1; }
flags="-std=c++20 -arch=native -I. -I$folder -Xcompiler -pthread"
background kernels nvcc -std=c++20 -O3 -arch=native -Xptxas -v -x cu -c kernels.cuh -o "$folder/kernels.o"
background implementation g++ -std=c++20 -O2 -fopenmp -I. -c tests/implementation.cpp -o "$folder/implementation.o"
background build_bench_cuda nvcc $flags -O3 -x cu -c tests/bench_cuda.cpp -o "$folder/bench_cuda.o"
background build_stage_cost nvcc -std=c++20 -O3 -arch=native tests/stage_cost.cu -o "$folder/stage_cost"
nccl=
if has nccl.h; then nccl="-DLLAMA3_NCCL -L$cuda/lib -lnccl"; else echo "not run: the test of NCCL, which is not installed"; fi
if has doctest/doctest.h; then
    background build_test_cuda nvcc $flags -O1 $nccl -lineinfo -diag-suppress 1675 -x cu "-DLLAMA3_SOURCE_DIR=\"$PWD\"" tests/test_cuda.cpp \
        -lcublasLt -o "$folder/test_cuda"
else
    echo "FAILED: the tests need doctest (found none, expected doctest-dev, or doctest.h in $folder/doctest). Install it."
    failed=1
fi
wait
libraries="-L$cuda/lib64 -L$cuda/lib -lcudart -lcublasLt"
background link_bench_cuda g++ -fopenmp "$folder/bench_cuda.o" "$folder/implementation.o" $libraries -o "$folder/bench_cuda"
for program in generate bench perplexity; do
    background "build_$program" g++ -std=c++20 -O2 -fopenmp -I. -DLLAMA3_CUDA "-DLLAMA3_SOURCE_DIR=\"$PWD\"" "examples/$program.cpp" \
        "$folder/implementation.o" "$folder/kernels.o" $libraries -o "$folder/$program"
done
report_background() {
    wait
    for status in "$folder"/*.status; do
        [ -f "$status" ] || continue
        report "$(basename "$status" .status)" "$(cat "$status")"
        rm "$status"
    done
}
report_background

# ── Is it right? ──
if [ -x "$folder/test_cuda" ]; then
    run tests 150 "$folder/test_cuda"
    grep -E "test cases:|assertions:" "$folder/tests.log"
    if command -v compute-sanitizer >/dev/null; then # on single steps, a prompt and sampling, beside what comes next
        for tool in memcheck racecheck; do
            background $tool env LLAMA3_CUDA_GRAPHS=0 timeout 100 compute-sanitizer --tool $tool --error-exitcode 9 \
                "$folder/test_cuda" "-tc=rewinding*,a cancelled step leaves the session usable,sessions that drew*"
        done
    else
        echo "not run: memcheck and racecheck, because compute-sanitizer of the CUDA Toolkit is not installed"
    fi
fi
run demo_cpu 60 "$folder/generate" -p "Once upon a time" -n 64 --temp 0 --ids
run demo_cuda 60 "$folder/generate" -p "Once upon a time" -n 64 --temp 0 --ids --device cuda
for ranks in 1 2 4; do # in lock-step on one GPU; the prompt has fewer than 9 tokens, so that the bits do not depend on ranks
    run "demo_cuda_${ranks}_ranks" 60 "$folder/generate" -p "Once upon a time" -n 64 --temp 0 --ids --device cuda --ranks $ranks &&
        { cmp "$folder/demo_cuda.log" "$folder/demo_cuda_${ranks}_ranks.log" >"$folder/${ranks}_ranks_equal_the_first_run.log"
          report "${ranks}_ranks_equal_the_first_run" $?; }
done
echo "tokens that CPU and GPU share from the start: $(cat "$folder/demo_cpu.log" "$folder/demo_cuda.log" |
    awk '{ for (i = 1; i <= NF; ++i) t[NR, i] = $i; n = NF } END { i = 1; while (i <= n && t[1, i] == t[2, i]) ++i; print i - 1 " of " n }')"
run story 60 "$folder/generate" -p "Once upon a time" -n 600 --ignore-eos
for device in cpu cuda; do
    run "perplexity_$device" 60 "$folder/perplexity" -f "$folder/story.log" -c 128 --device $device &&
        tail -n 1 "$folder/perplexity_$device.log"
done
report_background

# ── Is it fast? ──
run stage_cost 40 "$folder/stage_cost" && cat "$folder/stage_cost.log"
run stages 90 "$folder/bench" --synthetic llama-3.1-8b -n 32 -r 1 --device cuda --ranks 1,2 &&
    grep -A 2 "^time by stage" "$folder/stages.log"
left=$((500 - $(elapsed)))
[ $left -ge 100 ] || left=100
run bench_cuda $left "$folder/bench_cuda" "$folder/results.json" $((left - 70)) && cat "$folder/bench_cuda.log"
echo "$(elapsed) s in all"
exit $failed
