// What a dependent stage costs on a GPU: the time of a chain of matrix x vector kernels in the five shapes of a layer, beyond the
// time in which its bytes are read. Compares, for the shapes of Llama 3.2 1B and 3.1 8B in bf16:
//
//     stream        one launch after the other
//     graph         the same, captured
//     dependent     the same with programmatic dependent launch (sm_90 on): a kernel starts while the one before it ends
//     prefetched    the same, and each kernel asks for its first weights before it waits
//     cooperative   one kernel with a barrier of the whole grid between the stages
//
// Weights rotate through a buffer larger than L2, and each chain is timed alone: chains that overlap give false gains. Decides
// whether kernels.cuh should use more than a plain graph. nvcc -std=c++20 -O3 -arch=native tests/stage_cost.cu -o stage_cost
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                                                 \
    do {                                                                                                            \
        const cudaError_t error = call;                                                                             \
        if (error != cudaSuccess) std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)), std::exit(1); \
    } while (0)

struct Stage {
    const uint4* weights;  // [rows, columns] bf16, row after row
    int rows, columns;
    const float* in;  // [columns]
    float* out;       // [rows]
};

constexpr int threads = 512, in_flight = 8;

__device__ float dot(uint4 w, const float* x) {
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        sum += __uint_as_float(words[i] << 16) * x[2 * i] + __uint_as_float(words[i] & 0xffff0000u) * x[2 * i + 1];
    return sum;
}

// A warp per row; the first `in_flight` pieces of its first row may have been loaded before.
__device__ void multiply(const Stage& s, uint4 (&first)[in_flight], bool loaded) {
    const int warp = (blockIdx.x * threads + threadIdx.x) / 32, warps = gridDim.x * threads / 32, lane = threadIdx.x % 32,
              pieces = s.columns / 8;
    for (int row = warp; row < s.rows; row += warps) {
        const uint4* w = s.weights + static_cast<size_t>(row) * pieces;
        float sum = 0;
        for (int base = 0; base < pieces; base += 32 * in_flight) {
            if (!loaded)
#pragma unroll
                for (int i = 0; i < in_flight; ++i)
                    if (base + 32 * i + lane < pieces) first[i] = __ldcs(w + base + 32 * i + lane);
            loaded = false;
#pragma unroll
            for (int i = 0; i < in_flight; ++i)
                if (base + 32 * i + lane < pieces) sum += dot(first[i], s.in + 8 * (base + 32 * i + lane));
        }
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) s.out[row] = sum * 1e-3f;
    }
}
__device__ void load_first(const Stage& s, uint4 (&first)[in_flight]) {
    const int warp = (blockIdx.x * threads + threadIdx.x) / 32, lane = threadIdx.x % 32, pieces = s.columns / 8;
    if (warp < s.rows)
#pragma unroll
        for (int i = 0; i < in_flight; ++i)
            if (32 * i + lane < pieces) first[i] = __ldcs(s.weights + static_cast<size_t>(warp) * pieces + 32 * i + lane);
}

template <bool dependent, bool prefetched>
__global__ void __launch_bounds__(threads, 2) one_stage(Stage s) {
    uint4 first[in_flight];
#if __CUDA_ARCH__ >= 900
    if (dependent) cudaTriggerProgrammaticLaunchCompletion();
    if (prefetched) load_first(s, first);
    if (dependent) cudaGridDependencySynchronize();
#endif
    multiply(s, first, prefetched);
}

template <bool prefetched>
__global__ void __launch_bounds__(threads, 1) all_stages(const Stage* stages, int n) {
    uint4 first[in_flight];
    Stage s = stages[0];
    if (prefetched) load_first(s, first);
    for (int i = 0; i < n; ++i) {
        multiply(s, first, prefetched);
        if (i + 1 < n) s = stages[i + 1];
        if (prefetched && i + 1 < n) load_first(s, first);
        cooperative_groups::this_grid().sync();
    }
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
    const size_t pool_bytes = size_t{4} << 30;
    char* pool;
    float* activations;
    Stage* device_stages;
    CHECK(cudaMalloc(&pool, pool_bytes));
    CHECK(cudaMemset(pool, 0, pool_bytes));
    CHECK(cudaMalloc(&activations, 2 * 65536 * sizeof(float)));
    CHECK(cudaMemset(activations, 0, 2 * 65536 * sizeof(float)));
    CHECK(cudaMalloc(&device_stages, 1024 * sizeof(Stage)));
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    const auto microseconds = [&](auto&& f) {
        std::vector<float> times;
        for (int i = 0; i < 25; ++i) {
            CHECK(cudaStreamSynchronize(stream));
            CHECK(cudaEventRecord(start, stream));
            f();
            CHECK(cudaEventRecord(stop, stream));
            CHECK(cudaEventSynchronize(stop));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, start, stop));
            if (i >= 5) times.push_back(1000 * ms);
        }
        std::sort(times.begin(), times.end());
        return times[times.size() / 2];
    };

    std::printf("model  chain         stages      us  us/stage  GB/s  us/stage beyond the largest rate\n");
    for (const bool large : {false, true}) {
        // qkv, attention (16 MB of cache), out, gate and up, down
        const int d = large ? 4096 : 2048, f = large ? 14336 : 8192, kv = large ? 1024 : 512, layers = large ? 8 : 16;
        const int shapes[5][2] = {{d + 2 * kv, d}, {256, d}, {d, d}, {2 * f, d}, {d, f}};
        std::vector<Stage> stages;
        size_t at = 0, bytes = 0;
        for (int layer = 0; layer < layers; ++layer)
            for (const auto& [rows, columns] : shapes) {
                const size_t size = size_t(rows) * columns * 2;
                if (at + size > pool_bytes) at = 0;
                const size_t i = stages.size();
                stages.push_back({reinterpret_cast<const uint4*>(pool + at), rows, columns, activations + i % 2 * 65536,
                                  activations + (i + 1) % 2 * 65536});
                at += size, bytes += size;
            }
        const int n = static_cast<int>(stages.size()), blocks = 2 * device.multiProcessorCount;
        CHECK(cudaMemcpy(device_stages, stages.data(), sizeof(Stage) * stages.size(), cudaMemcpyHostToDevice));
        const auto launch_all = [&](void (*kernel)(Stage), bool dependent) {
            for (Stage& s : stages) {
                cudaLaunchConfig_t config{};
                cudaLaunchAttribute attribute{};
                config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.stream = stream;
                attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
                attribute.val.programmaticStreamSerializationAllowed = 1;
                config.attrs = &attribute, config.numAttrs = dependent ? 1 : 0;
                CHECK(cudaLaunchKernelEx(&config, kernel, s));
            }
        };
        const auto graph_of = [&](void (*kernel)(Stage), bool dependent) {
            cudaGraph_t graph;
            cudaGraphExec_t exec;
            CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            launch_all(kernel, dependent);
            CHECK(cudaStreamEndCapture(stream, &graph));
            CHECK(cudaGraphInstantiate(&exec, graph, 0));
            CHECK(cudaGraphDestroy(graph));
            const float us = microseconds([&] { CHECK(cudaGraphLaunch(exec, stream)); });
            CHECK(cudaGraphExecDestroy(exec));
            return us;
        };
        const auto cooperative = [&](void (*kernel)(const Stage*, int)) {
            int count = n;
            void* arguments[] = {&device_stages, &count};
            return microseconds([&] {
                CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(device.multiProcessorCount),
                                                  dim3(threads), arguments, 0, stream));
            });
        };
        // The rate of one large product stands for the stream of bytes without any boundary.
        const Stage whole{reinterpret_cast<const uint4*>(pool), static_cast<int>(pool_bytes / 2 / 8192), 8192, activations,
                          activations + 65536};
        const Stage part{whole.weights, 65536, 8192, whole.in, whole.out};
        const double ideal = 65536.0 * 8192 * 2 / microseconds([&] {
                                 one_stage<false, false><<<blocks, threads, 0, stream>>>(part);
                             });  // bytes per us
        const auto line = [&](const char* name, float us) {
            std::printf("%-6s %-13s %6d %7.1f %9.2f %5.0f %9.2f\n", large ? "8B" : "1B", name, n, us, us / n, bytes / us * 1e-3,
                        (us - bytes / ideal) / n);
        };
        line("stream", microseconds([&] { launch_all(one_stage<false, false>, false); }));
        line("graph", graph_of(one_stage<false, false>, false));
        if (device.major >= 9) {
            line("dependent", graph_of(one_stage<true, false>, true));
            line("prefetched", graph_of(one_stage<true, true>, true));
        }
        line("cooperative", cooperative(all_stages<false>));
        line("coop.prefetch", cooperative(all_stages<true>));
    }
}
