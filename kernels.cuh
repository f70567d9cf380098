// kernels.cuh: the CUDA back end of llama3.hpp. MIT licence, as llama3.hpp.
//
// It defines llama3::cuda(...). Compile it once and link it with the program, with cudart and cublasLt:
//
//     nvcc -std=c++20 -O3 -arch=native -x cu -c kernels.cuh -o kernels.o
//     g++ -std=c++20 -O2 program.cpp kernels.o -L/usr/local/cuda/lib64 -lcudart -lcublasLt -pthread
//
// With -DLLAMA3_NCCL, and -lnccl, ranks in several processes meet through NCCL instead of the host.
//
// The stages are those of llama3.hpp, §3, in its order; §5 there is the specification. Up to 8 rows (decode, a few sequences at
// once) go through one matrix x vector kernel that reads the file's panels, captured as one CUDA graph per number of rows.
// More rows (prompts) are multiplied by cuBLASLt, one matrix at a time unpacked to bf16, and attended on tensor cores.
//
// Contents (each line is also a banner in the code)
//
//   K1   CUDA, or its emulator              named wrappers of what has no name in C++
//   K2   Errors and launches                every call is checked
//   K3   Number formats                     panels and caches, as a kernel reads them
//   K4   Warps and blocks                   sums and maxima in a fixed order
//   K5   Embedding                          rows of the table, turns of RoPE
//   K6   Matrix x vector                    the kernel of decode: norm, product, rotation, gate, residual
//   K7   Attention, one query at a time     split over segments of 512 positions
//   K8   Prompts                            unpack, cuBLASLt, flash attention
//   K9   Sampling                           a token from a row of logits
//   K10  Sums over ranks                    one model on several GPUs
//   K11  Memory                             weights, caches, buffers: planned before they are allocated
//   K12  A rank's stages                    what is launched for one rank
//   K13  The back end                       all ranks in lock-step, graphs
//   K14  The device                         llama3::cuda
//
// Arithmetic: no float atomics, and every sum has a fixed order. Up to 8 rows the bits of a row do not depend on the run, on
// the other rows, on the number of blocks or of ranks; with more rows they do not depend on the run. A product that feeds a sum
// is written as fmaf or __fmul_rn, because nvcc would fuse what it likes, differently in each instance of a template.
//
// Shape letters are those of llama3.hpp.

#ifndef LLAMA3_KERNELS_CUH
#define LLAMA3_KERNELS_CUH

#include "llama3.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <tuple>
#include <type_traits>

// ═══ K1  CUDA, or its emulator ═════════════════════════════════════════════════════════════════════════════════════════════════
//
// Tests compile this file as plain C++ against tests/cuda_emu.hpp, which checks every access; so kernels touch shared memory,
// wide loads, asynchronous copies and tensor cores only through these functions.

#ifdef LLAMA3_CUDA_EMULATOR
#include "cuda_emu.hpp"
namespace llama3::gpu {
using namespace cuda_emu;  // what is defined below for nvcc
}
#else
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#ifdef LLAMA3_NCCL
#include <nccl.h>
#endif

namespace llama3::gpu {

// The block's dynamic shared memory; Shared<T> is a pointer into it.
template <class T>
using Shared = T*;
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ uint4 llama3_shared_memory[];
    return reinterpret_cast<T*>(llama3_shared_memory);
}
template <class U, class T>
__device__ __forceinline__ U* shared_cast(T* shared) {
    return reinterpret_cast<U*>(shared);
}

// 16 and 8 aligned bytes.
template <class T>
__device__ __forceinline__ T load16(const void* from) {
    static_assert(sizeof(T) == 16);
    return *static_cast<const T*>(from);
}
template <class T>
__device__ __forceinline__ T load8(const void* from) {
    static_assert(sizeof(T) == 8);
    return *static_cast<const T*>(from);
}
template <class T>
__device__ __forceinline__ void store16(void* to, const T& value) {
    static_assert(sizeof(T) == 16);
    *static_cast<T*>(to) = value;
}
// Weights: read once per step, so they leave no trace in L1. Only for what no kernel writes.
__device__ __forceinline__ uint4 load_streaming16(const void* from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
__device__ __forceinline__ uint2 load_streaming8(const void* from) {
    uint2 v;
    asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}
// What another block of the same launch has written: L1 is not coherent, L2 is.
__device__ __forceinline__ float load_fresh(const float* from) { return __ldcg(from); }

// What GPUs tell each other while kernels run: memory that another one stores to is looked at until everything is there.
__device__ __forceinline__ void store_remote16(float* to, float4 v) {
    asm volatile("st.volatile.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}
__device__ __forceinline__ float4 load_remote16(const float* from) {
    float4 v;
    asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
// Before another look. A GPU that hears nothing for about half a minute gives up: an error instead of a program that hangs.
__device__ __forceinline__ void wait_for_others(unsigned& looks) {
    if (++looks == 1u << 25) __trap();
}

// From sm_80 on: asynchronous copies of 16 bytes to shared memory; a group is what was copied since the last commit.
__device__ __forceinline__ void copy_async16(std::uint16_t* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(from)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_in_flight>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups_in_flight) : "memory");
}

// Four 8 x 8 matrices of bf16: lane 8i + r gives the address of row r of matrix i, and gets of each matrix i the elements
// (lane / 4, 2 (lane % 4)) and the one after; transposed: (2 (lane % 4), lane / 4) and the one below.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const std::uint16_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const std::uint16_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}
// d [16, 8] += a [16, 16] b [16, 8], bf16 into float. With g = lane / 4 and t = lane % 4 a lane holds d[g][2t], d[g][2t+1],
// d[g+8][2t], d[g+8][2t+1]; of a, in pairs along the columns, (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8); of b, in pairs along
// the rows, (2t, g) and (2t+8, g). From sm_80 on.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                                  std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Whether the process uses a GPU already. Only the driver can tell, with which this must not be linked.
inline bool has_context(int gpu) {
    static const auto state = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault, &result);
#else
        cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault, &result);
#endif
        return reinterpret_cast<int (*)(int gpu, unsigned* flags, int* active)>(found);
    }();
    unsigned flags = 0;
    int active = 0;
    return state && state(gpu, &flags, &active) == 0 && active;
}

}  // namespace llama3::gpu
#endif

// ═══ K2  Errors and launches ═══════════════════════════════════════════════════════════════════════════════════════════════════

namespace llama3 {
namespace detail {
std::vector<float> rope_frequencies(const Config& config);  // §5
int border(int n, int unit, int rank, int ranks);           // §13
std::unique_ptr<Backend> open_in_process(Device& device, const Model& model, const Options& options);
}  // namespace detail

namespace gpu {

[[noreturn]] inline void fail(Code code, const std::string& message) { throw Error(code, message); }

inline std::string gigabytes(std::uint64_t bytes) {
    const std::uint64_t hundredths = (bytes + 5000000) / 10000000;
    return std::to_string(hundredths / 100) + "." + std::to_string(hundredths / 10 % 10) + std::to_string(hundredths % 10) +
           " GB";
}

// What to do about an error of CUDA.
inline const char* advice(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation:
            return "Use a shorter context (-c), --kv q8 or a smaller model, or free memory of the GPU.";
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorUnsupportedPtxVersion: return "Compile kernels.cuh for this GPU: nvcc -arch=native.";
        case cudaErrorInsufficientDriver:
            return "Install a newer driver of the GPU, or compile kernels.cuh with an older CUDA Toolkit.";
        case cudaErrorNoDevice: return "Check that nvidia-smi lists a GPU, or use the CPU.";
        case cudaErrorInvalidDevice: return "Choose one that nvidia-smi lists.";
        default: return "Start the program anew; if it happens again, run tests/gpu.sh, which checks every kernel.";
    }
}

// Every call is LLAMA3_CHECK(where, call(...)); `where` is the stage, tensor or buffer.
#define LLAMA3_CHECK(where, ...) ::llama3::gpu::check(__VA_ARGS__, #__VA_ARGS__, where)
inline std::string name_of(const char* call) { return {call, std::strcspn(call, "(")}; }
inline void check(cudaError_t error, const char* call, const std::string& where) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // an error that is not sticky is over with this
    fail(error == cudaErrorMemoryAllocation ? Code::memory : Code::device,
         "CUDA, " + where + ": " + name_of(call) + " failed (found " + cudaGetErrorName(error) + ": " +
             cudaGetErrorString(error) + ", expected success). " + advice(error));
}
inline void check(cublasStatus_t status, const char* call, const std::string& where) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fail(Code::device, "cuBLASLt, " + where + ": " + name_of(call) + " failed (found " + cublasLtGetStatusString(status) +
                           ", expected success). Check that the versions of cuBLASLt and of the driver belong together.");
}

inline void copy_async(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream,
                       const std::string& where) {
    LLAMA3_CHECK(where, cudaMemcpyAsync(to, from, bytes, kind, stream));
}

__host__ __device__ constexpr int div_up(int n, int by) { return (n + by - 1) / by; }

// The one place that starts kernels. The arguments are converted to the types of the kernel's parameters.
template <class... P, class... A>
void launch(const char* stage, void (*kernel)(P...), dim3 grid, unsigned threads, std::size_t shared_bytes, cudaStream_t stream,
            const A&... arguments) {
    static_assert(sizeof...(P) == sizeof...(A));
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const void* const function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024) {  // more than that must be asked for: all there is, as another thread may want less meanwhile
        cudaFuncAttributes own{};
        int device = 0, most = 0;
        LLAMA3_CHECK(stage, cudaGetDevice(&device));
        LLAMA3_CHECK(stage, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        LLAMA3_CHECK(stage, cudaFuncGetAttributes(&own, function));
        most = std::max(most - static_cast<int>(own.sharedSizeBytes), static_cast<int>(shared_bytes));
        LLAMA3_CHECK(stage, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    }
#ifdef LLAMA3_CUDA_EMULATOR
    check(cuda_emu::launch(stage, kernel, grid, dim3(threads), shared_bytes, stream, P(arguments)...), "launch", stage);
#else
    std::tuple<P...> values(arguments...);
    std::apply(
        [&](P&... value) {
            void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
            LLAMA3_CHECK(stage, cudaLaunchKernel(function, grid, dim3(threads), pointers, shared_bytes, stream));
        },
        values);
#endif
}

// ═══ K3  Number formats ════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// One struct per format of weights. `decode8` gives 8 values of a row, for what is unpacked or gathered. The rest is the inner
// loop of K6, in steps of 512 consecutive bytes per warp: lane 4v + q loads 16 bytes, which are columns of vector v and the rows
// 4q to 4q + 3. `pack` puts the activations into shared memory as the products want them.
//
//     f32     float activations, fmaf                       a step is  8 columns
//     bf16    activations rounded to bf16, fmaf in float              16 columns
//     q8      32 activations as signed bytes with a scale, dp4a       32 columns, a block
//     q4      likewise                                                64 columns, a unit

__device__ __forceinline__ float from_bf16(std::uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ std::uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
    return static_cast<std::uint32_t>(to_bf16(low)) | static_cast<std::uint32_t>(to_bf16(high)) << 16;
}
__device__ __forceinline__ uint4 pack_bf16(const float (&x)[8]) {
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}
__device__ __forceinline__ float from_fp16(std::uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu)));
}
__device__ __forceinline__ std::uint32_t word_at(const std::byte* at) { return *reinterpret_cast<const std::uint32_t*>(at); }

constexpr unsigned all_lanes = 0xffffffffu;

// f over the lanes of a warp that differ in the bits of `last` to `first`: a tree whose order is always the same.
template <int first = 16, int last = 1, class T, class F>
__device__ __forceinline__ T over_lanes(T x, const F& f) {
#pragma unroll
    for (int step = first; step >= last; step /= 2) x = f(x, __shfl_xor_sync(all_lanes, x, step));
    return x;
}
struct Sum {
    __device__ float operator()(float a, float b) const { return __fadd_rn(a, b); }
    __device__ unsigned long long operator()(unsigned long long a, unsigned long long b) const { return a + b; }
};
struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
    __device__ unsigned operator()(unsigned a, unsigned b) const { return max(a, b); }
    __device__ unsigned long long operator()(unsigned long long a, unsigned long long b) const { return max(a, b); }
};

constexpr float magic = 12582912.0f;    // 1.5 x 2^23: a float of this size counts in ones, so that adding it rounds,
constexpr int magic_bits = 0x4b400000;  // and an integer added to its bits is added to the float: a conversion for free

// sum + the products of four signed bytes; and the sum, where it was started at magic_bits.
__device__ __forceinline__ int dot4(std::uint32_t a, std::uint32_t b, int sum) {
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}
// Such a sum n as n * scale, rounded once: (magic + n) * scale - magic * scale, of which scale, an fp16, makes the latter exact.
__device__ __forceinline__ float scale_dot(int sum, float scale) {
    return fmaf(__int_as_float(sum), scale, __fmul_rn(scale, -magic));
}

// Where a lane is within a slice of a panel: units [begin, end), of which step i is its own.
struct Slice {
    const std::byte* panel;
    int begin, end;
};

// What f32 and bf16 share: 64 bytes to a unit, 8 of them in a step.
template <class W>
struct PlainWeights {
    using Loaded = uint4;
    __device__ static int steps(const Slice& s) { return div_up(s.end - s.begin, 8); }
    __device__ static Loaded load(const Slice& s, int i, int lane) {
        const int v = s.begin + 8 * i + lane / 4;
        return v < s.end ? load_streaming16(s.panel + v * 64 + lane % 4 * 16) : make_uint4(0, 0, 0, 0);
    }
    template <int columns>
    __device__ static void multiply(float (&sum)[columns][4], const Loaded& w, const Slice& s, int i, int lane,
                                    Shared<std::uint32_t> x, int words, int) {
        const int v = s.begin + 8 * i + lane / 4;
        if (v >= s.end) return;
        const std::uint32_t rows[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int c = 0; c < columns; ++c) {
            const std::uint32_t a = x[c * words + v];
#pragma unroll
            for (int r = 0; r < 4; ++r) sum[c][r] = W::add_product(sum[c][r], rows[r], a);
        }
    }
};

struct F32Weights : PlainWeights<F32Weights> {
    static constexpr Format format = Format::f32;
    __host__ __device__ static int padded(int units) { return div_up(units, 4) * 4; }  // columns that pack() fills
    __host__ __device__ static int words(int units) { return padded(units); }  // of shared memory per row of activations
    __device__ static void pack(Shared<std::uint32_t> to, int column, int, float4 v, int) {
        shared_cast<float4>(to)[column / 4] = v;
    }
    __device__ static float add_product(float sum, std::uint32_t w, std::uint32_t a) {
        return fmaf(__uint_as_float(w), __uint_as_float(a), sum);
    }
    __device__ static void decode8(float (&out)[8], const std::byte* panel, int row, int column, int units) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = column + i < units ? __uint_as_float(word_at(panel + (column + i) * 64 + row * 4)) : 0;
    }
};

struct Bf16Weights : PlainWeights<Bf16Weights> {
    static constexpr Format format = Format::bf16;
    __host__ __device__ static int padded(int units) { return div_up(units, 4) * 8; }
    __host__ __device__ static int words(int units) { return padded(units) / 2; }
    __device__ static void pack(Shared<std::uint32_t> to, int column, int, float4 v, int) {
        shared_cast<uint2>(to)[column / 4] = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
    }
    __device__ static float add_product(float sum, std::uint32_t w, std::uint32_t a) {  // a pair of columns
        sum = fmaf(from_bf16(w), from_bf16(a), sum);
        return fmaf(__uint_as_float(w & 0xffff0000u), __uint_as_float(a & 0xffff0000u), sum);
    }
    __device__ static void decode8(float (&out)[8], const std::byte* panel, int row, int column, int units) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int v = column / 2 + i;
            const std::uint32_t pair = v < units ? word_at(panel + v * 64 + row * 4) : 0;
            out[2 * i] = from_bf16(pair), out[2 * i + 1] = __uint_as_float(pair & 0xffff0000u);
        }
    }
};

// What q8 and q4 share: activations as signed bytes with one scale per 32, by the rule of llama3.hpp, §8.
struct QuantisedActivations {
    __host__ __device__ static int padded(int units) { return 64 * units; }
    __host__ __device__ static int words(int units) { return 18 * units; }  // 16 of bytes, then 2 scales
    __device__ static void pack(Shared<std::uint32_t> to, int column, int units, float4 v, int lane) {
        const std::uint32_t mask = 0x7fffffffu;
        const std::uint32_t largest = over_lanes<4>(max(max(__float_as_uint(v.x) & mask, __float_as_uint(v.y) & mask),
                                                        max(__float_as_uint(v.z) & mask, __float_as_uint(v.w) & mask)),
                                                    Max());
        const bool finite = largest < 0x7f800000u;
        const float magnitude = finite ? __uint_as_float(largest) : 0.0f;
        const bool counts = magnitude > 7.9e-31f;  // else the inverse would overflow
        const float inverse = counts ? 127 / magnitude : 0.0f;
        const auto byte = [&](float x) { return __float_as_uint(fmaf(finite ? x : 0.0f, inverse, magic)) & 0xffu; };
        if (column >= padded(units)) return;
        to[column / 4] = byte(v.x) | byte(v.y) << 8 | byte(v.z) << 16 | byte(v.w) << 24;
        if (lane % 8 == 0)
            to[16 * units + column / 32] = finite ? __float_as_uint(counts ? magnitude / 127 : 0.0f) : 0x7fc00000u;
    }
    struct Loaded {
        uint4 w;
        uint2 scales;  // fp16, of the lane's four rows
    };
    __device__ static void unpack_scales(float (&out)[4], uint2 scales) {
        out[0] = from_fp16(scales.x), out[1] = from_fp16(scales.x >> 16);
        out[2] = from_fp16(scales.y), out[3] = from_fp16(scales.y >> 16);
    }
};

struct Q8Weights : QuantisedActivations {
    static constexpr Format format = Format::q8;
    __device__ static int steps(const Slice& s) { return 2 * (s.end - s.begin); }
    __device__ static Loaded load(const Slice& s, int i, int lane) {
        const std::byte* unit = s.panel + (s.begin + i / 2) * 1088;
        return {load_streaming16(unit + i % 2 * 512 + lane * 16), load_streaming8(unit + 1024 + i % 2 * 32 + lane % 4 * 8)};
    }
    template <int columns>
    __device__ static void multiply(float (&sum)[columns][4], const Loaded& l, const Slice& s, int i, int lane,
                                    Shared<std::uint32_t> x, int words, int units) {
        const int block = 2 * s.begin + i;
        const std::uint32_t rows[4] = {l.w.x, l.w.y, l.w.z, l.w.w};
        float scales[4];
        unpack_scales(scales, l.scales);
#pragma unroll
        for (int c = 0; c < columns; ++c) {
            const std::uint32_t a = x[c * words + 8 * block + lane / 4];
            const float scale = __uint_as_float(x[c * words + 16 * units + block]);
#pragma unroll
            for (int r = 0; r < 4; ++r)
                sum[c][r] = fmaf(scale_dot(dot4(rows[r], a, magic_bits), scales[r]), scale, sum[c][r]);
        }
    }
    __device__ static void decode8(float (&out)[8], const std::byte* panel, int row, int column, int) {
        const std::byte* unit = panel + column / 64 * 1088;
        const float scale = from_fp16(*reinterpret_cast<const std::uint16_t*>(unit + 1024 + column % 64 / 32 * 32 + 2 * row));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const std::uint32_t bytes = word_at(unit + (column % 64 / 4 + i) * 64 + 4 * row);
#pragma unroll
            for (int b = 0; b < 4; ++b) out[4 * i + b] = __fmul_rn(static_cast<std::int8_t>(bytes >> 8 * b & 0xffu), scale);
        }
    }
};

struct Q4Weights : QuantisedActivations {
    static constexpr Format format = Format::q4;
    __device__ static int steps(const Slice& s) { return s.end - s.begin; }
    __device__ static Loaded load(const Slice& s, int i, int lane) {
        const std::byte* unit = s.panel + (s.begin + i) * 576;
        return {load_streaming16(unit + lane * 16), load_streaming8(unit + 512 + lane / 16 * 32 + lane % 4 * 8)};
    }
    template <int columns>
    __device__ static void multiply(float (&sum)[columns][4], const Loaded& l, const Slice& s, int i, int lane,
                                    Shared<std::uint32_t> x, int words, int units) {
        const int unit = s.begin + i;
        const std::uint32_t rows[4] = {l.w.x, l.w.y, l.w.z, l.w.w};
        float scales[4];
        unpack_scales(scales, l.scales);
#pragma unroll
        for (int c = 0; c < columns; ++c) {
            const std::uint32_t low = x[c * words + 16 * unit + lane / 4 * 2],
                                high = x[c * words + 16 * unit + lane / 4 * 2 + 1];
            const float scale = __uint_as_float(x[c * words + 16 * units + 2 * unit + lane / 16]);
            // Σ (nibble - 8) x = Σ nibble x - 8 Σ x: one correction for the four rows
            const int start = dot4(0xf8f8f8f8u, low, dot4(0xf8f8f8f8u, high, magic_bits));
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int dot = dot4(rows[r] & 0x0f0f0f0fu, low, dot4(rows[r] >> 4 & 0x0f0f0f0fu, high, start));
                sum[c][r] = fmaf(scale_dot(dot, scales[r]), scale, sum[c][r]);
            }
        }
    }
    __device__ static void decode8(float (&out)[8], const std::byte* panel, int row, int column, int) {
        const std::byte* unit = panel + column / 64 * 576;
        const float scale = from_fp16(*reinterpret_cast<const std::uint16_t*>(unit + 512 + column % 64 / 32 * 32 + 2 * row));
        const std::uint32_t bytes = word_at(unit + column % 64 / 8 * 64 + 4 * row);
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            out[b] = __fmul_rn(static_cast<int>(bytes >> 8 * b & 15u) - 8, scale);
            out[4 + b] = __fmul_rn(static_cast<int>(bytes >> (8 * b + 4) & 15u) - 8, scale);
        }
    }
};

// A matrix in panels on the device; the fields are those of llama3::Matrix.
struct Panels {
    const std::byte* data;
    std::size_t stride;
    int rows, units, segments;
    Panels() = default;
    explicit Panels(const Matrix& m)
        : data(m.data), stride(m.panel_stride), rows(m.rows), units(m.units()), segments(m.segments) {}
    __host__ __device__ int panels() const { return div_up(rows, 16); }
    __device__ const std::byte* panel(int i) const { return data + i * stride; }
};

// A row of a batch, in the table in device memory from which kernels read everything that changes from step to step.
struct RowEntry {
    int token, position;
    int capacity;        // of its cache
    int wanted;          // entry i: the i-th row that wants logits; 0 beyond the last
    unsigned exchanges;  // sums over ranks before this step (K10)
    std::byte* cache;
};

// Caches: keys [L][K][P][E], values likewise; for q8 then the fp16 scales of the keys, [L][K][P][E/32], and of the values. P is
// the capacity of the sequence's cache. Every pointer follows from these.
struct CacheShape {
    Format format;
    int layers, kv_heads, head_dim;
    __host__ __device__ std::size_t elements(int capacity) const { return element(capacity, layers, 0, 0); }
    __host__ __device__ std::size_t element(int capacity, int layer, int head, int position) const {
        return (static_cast<std::size_t>(layer * kv_heads + head) * capacity + position) * head_dim;
    }
    __host__ __device__ std::size_t element_bytes() const { return format == Format::bf16 ? 2 : 1; }
    __host__ __device__ std::size_t bytes(int capacity) const {
        return 2 * elements(capacity) * element_bytes() + (format == Format::q8 ? elements(capacity) / 8 : 0);
    }
};

// Keys (or values) of one sequence.
struct CacheView {
    std::byte *data, *scales;
    __device__ CacheView(const CacheShape& shape, const RowEntry& row, bool values) {
        const std::size_t elements = shape.elements(row.capacity);
        data = row.cache + (values ? elements * shape.element_bytes() : 0);
        scales = row.cache + 2 * elements + (values ? elements / 16 : 0);
    }
};
// As a kernel reads them: 8 channels from element `at` on.
struct CacheBf16 {
    using Loaded = uint4;
    __device__ static Loaded load(const CacheView& view, std::size_t at) { return load16<uint4>(view.data + 2 * at); }
    __device__ static void unpack(float (&out)[8], const Loaded& l) {
        const std::uint32_t words[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) out[2 * i] = from_bf16(words[i]), out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
};
struct CacheQ8 {
    struct Loaded {
        uint2 bytes;
        std::uint32_t scale;
    };
    __device__ static Loaded load(const CacheView& view, std::size_t at) {
        return {load8<uint2>(view.data + at), *reinterpret_cast<const std::uint16_t*>(view.scales + at / 32 * 2)};
    }
    __device__ static void unpack(float (&out)[8], const Loaded& l) {
        const float scale = from_fp16(l.scale);
        const std::uint32_t words[2] = {l.bytes.x, l.bytes.y};
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = __fmul_rn(static_cast<std::int8_t>(words[i / 4] >> 8 * (i % 4) & 0xffu), scale);
    }
};

// Stores 32 channels of a key or value, one per lane of a whole warp. q8: the rule of llama3.hpp, §8 (quantise_channels).
__device__ inline void store_channels(Format format, const CacheView& to, std::size_t at, float x, int lane) {
    if (format == Format::bf16) {
        reinterpret_cast<std::uint16_t*>(to.data)[at] = to_bf16(x);
        return;
    }
    const std::uint32_t largest = over_lanes(__float_as_uint(x) & 0x7fffffffu, Max());
    const bool finite = largest < 0x7f800000u;
    const float scale = finite ? __uint_as_float(largest) / 127 : 0.0f, inverse = scale > 1e-35f ? 1 / scale : 0.0f;
    const float rounded = fminf(fmaxf(__fadd_rn(__fmul_rn(finite ? x : 0.0f, inverse), x < 0 ? -0.5f : 0.5f), -127.0f), 127.0f);
    reinterpret_cast<std::int8_t*>(to.data)[at] = static_cast<std::int8_t>(rounded);
    if (lane == 0)
        reinterpret_cast<std::uint16_t*>(to.scales)[at / 32] = finite ? __half_as_ushort(__float2half_rn(scale)) : 0x7e00;
}

// Calls f(F32Weights{}), ...: the places where a format's id becomes its struct.
template <class F>
void with_format(Format format, const F& f) {
    switch (format) {
        case Format::f32: return f(F32Weights{});
        case Format::bf16: return f(Bf16Weights{});
        case Format::q8: return f(Q8Weights{});
        default: return f(Q4Weights{});
    }
}
template <int value>
using Constant = std::integral_constant<int, value>;
// Calls f(CacheBf16{} or CacheQ8{}, the width of a head).
template <class F>
void with_cache(const CacheShape& shape, const F& f) {
    const auto of_width = [&](auto c) { shape.head_dim == 64 ? f(c, Constant<64>{}) : f(c, Constant<128>{}); };
    shape.format == Format::bf16 ? of_width(CacheBf16{}) : of_width(CacheQ8{});
}

// ═══ K4  Warps and blocks ══════════════════════════════════════════════════════════════════════════════════════════════════════
//
// Sums are trees over lanes and then over warps: the same order in every run. Every thread of the block takes part.

// values[0] + values[stride] + ... of n values, a power of two, as the tree ((0 + 1) + (2 + 3)) + ...
template <int n>
__device__ __forceinline__ float sum_tree(Shared<float> values, int stride) {
    if constexpr (n == 1) return values[0];
    else return __fadd_rn(sum_tree<n / 2>(values, stride), sum_tree<n / 2>(values + n / 2 * stride, stride));
}
// The sum over a block of `warps` warps, a power of two; scratch [warps].
template <int warps>
__device__ float sum_block(float x, Shared<float> scratch) {
    x = over_lanes(x, Sum());
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    const float sum = sum_tree<warps>(scratch, 1);
    __syncthreads();  // scratch may be used again
    return sum;
}

// Columns k to k + 3 of a row of `width` floats; zeros behind its end.
__device__ __forceinline__ float4 load_columns(const float* x, int k, int width) {
    if (k + 4 <= width) return load16<float4>(x + k);
    return make_float4(k < width ? x[k] : 0, k + 1 < width ? x[k + 1] : 0, k + 2 < width ? x[k + 2] : 0, 0);
}
__device__ __forceinline__ float sum_of_squares(float sum, float4 v) {
    return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}
__device__ __forceinline__ float4 scaled(float4 v, float inverse, float4 weight) {
    return make_float4(__fmul_rn(__fmul_rn(v.x, inverse), weight.x), __fmul_rn(__fmul_rn(v.y, inverse), weight.y),
                       __fmul_rn(__fmul_rn(v.z, inverse), weight.z), __fmul_rn(__fmul_rn(v.w, inverse), weight.w));
}

// Rows of activations on their way into a product.
struct Input {
    const float* x;  // [rows, stride]
    std::size_t stride;
    int width;          // columns that count
    const float* norm;  // weights of an RMSNorm [width]; nullptr: taken as they are
    float eps;
    const RowEntry* rows;  // input i is row rows[i].wanted; nullptr: row i
    __device__ const float* row(int i) const { return x + (rows ? rows[i].wanted : i) * stride; }
};

// 1 / sqrt(mean(x²) + ε), by a block of `warps` warps
template <int warps>
__device__ float inverse_norm(const float* x, int width, float eps, Shared<float> scratch) {
    float squares = 0;
    for (int k = 4 * threadIdx.x; k < width; k += 4 * 32 * warps) squares = sum_of_squares(squares, load_columns(x, k, width));
    return 1 / sqrtf(sum_block<warps>(squares, scratch) / width + eps);
}

__device__ __forceinline__ float silu(float x) { return x / (1 + expf(-x)); }

// ═══ K5  Embedding ═════════════════════════════════════════════════════════════════════════════════════════════════════════════

// x[t] = table[token[t]], and cos and sin of position[t] θ'[i].          One block per row.        x: [T, D], turns: [T, E/2][2]
template <class W>
__global__ void embed_rows(Panels table, const RowEntry* rows, float* x, std::size_t stride, int width,
                           const float* frequencies, float* turns, int head_dim) {
    const int t = blockIdx.x, thread = threadIdx.x;
    const RowEntry row = rows[t];
    const std::byte* panel = table.panel(row.token / 16);
    for (int k = 8 * thread; k < width; k += 8 * blockDim.x) {
        float values[8];
        W::decode8(values, panel, row.token % 16, k, table.units);
        float* to = x + t * stride + k;
        for (int i = 0; i < 8; ++i)
            if (k + i < width) to[i] = values[i];
    }
    for (int i = thread; i < head_dim / 2; i += blockDim.x) {
        float sine, cosine;
        sincosf(__fmul_rn(row.position, frequencies[i]), &sine, &cosine);
        float* to = turns + t * head_dim + 2 * i;
        to[0] = cosine, to[1] = sine;
    }
}

// ═══ K6  Matrix x vector ═══════════════════════════════════════════════════════════════════════════════════════════════════════
//
// y = W h for 1, 2, 4 or 8 rows h at once, which share one reading of W. A block of 16 warps stages the rows in shared memory,
// normalised and in the format of the products, once; then it takes items, a fixed number of panels each, until none is left. The
// 16 warps of an item share its panels: with one panel each warp has a sixteenth of the columns (a half of a segment of W_o and
// W_down), with two an eighth. So 2048 rows fill a large card, and every warp streams one piece of memory.
//
// Order of a sum: a lane's chain, a tree over the 8 lanes with the same rows, a tree over the slices. The slices lie in the
// segments of the file, so R ranks, which own 8/R segments each and take R panels at a time, have the same slices and sub-trees.

constexpr int matvec_warps = 16, matvec_threads = 32 * matvec_warps, matvec_rows = 8;

// Where slice `s` of `slices` begins: equal parts of the segments, in units.
__device__ __forceinline__ int slice_begin(int units, int segments, int slices, int s) {
    const int per_segment = slices / segments, segment = s / per_segment, part = units / segments;
    return segment * part + part * (s % per_segment) / per_segment;
}

// Sums of 4 rows over the 8 lanes that have the same ones: lane 4v + q gets row row_of_lane(lane).
__device__ __forceinline__ int row_of_lane(int lane) { return 4 * (lane & 3) + (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0); }
__device__ __forceinline__ float sum_rows(const float (&sum)[4], int lane) {
    const bool high = lane & 16, odd = lane & 8;
    const float a = __fadd_rn(high ? sum[2] : sum[0], __shfl_xor_sync(all_lanes, high ? sum[0] : sum[2], 16));
    const float b = __fadd_rn(high ? sum[3] : sum[1], __shfl_xor_sync(all_lanes, high ? sum[1] : sum[3], 16));
    const float c = __fadd_rn(odd ? b : a, __shfl_xor_sync(all_lanes, odd ? a : b, 8));
    return __fadd_rn(c, __shfl_xor_sync(all_lanes, c, 4));
}

template <class W, int columns>
constexpr int matvec_blocks_per_sm =  // two hide each other's barriers; more columns need the registers
    columns == 1 || (columns == 2 && !std::is_base_of_v<QuantisedActivations, W>) ? 2 : 1;

template <class W, int columns>
std::size_t matvec_shared_bytes(int units) {
    return sizeof(float) * columns * (W::words(units) + 2 * matvec_warps * 16);
}

// Epilogue: what an item is, of how many panels, and what becomes of its sums.
//                                                                       n <= columns rows are used, input row first + c each
template <class W, int columns, class Epilogue>
__global__ void __launch_bounds__(matvec_threads, matvec_blocks_per_sm<W, columns>)
    matvec(Input input, Epilogue epilogue, int first, int n) {
    const int panels = epilogue.panels, slices = matvec_warps / panels;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int units = epilogue.units(), words = W::words(units);
    const Shared<std::uint32_t> x = shared_memory<std::uint32_t>();
    const Shared<float> partial = shared_cast<float>(x + columns * words);  // [panels][slices][columns][16]
    const Shared<float> total = partial + matvec_warps * columns * 16;      // [panels][columns][16]

    for (int c = 0; c < columns; ++c) {
        const float* row = input.row(first + (c < n ? c : 0));
        const float inverse = input.norm ? inverse_norm<matvec_warps>(row, input.width, input.eps, total) : 1.0f;
        for (int base = 128 * warp; base < W::padded(units); base += 128 * matvec_warps) {
            const int k = base + 4 * lane;
            float4 v = load_columns(row, k, input.width);
            if (input.norm) v = scaled(v, inverse, load_columns(input.norm, k, input.width));
            if (k < W::padded(units) || std::is_base_of_v<QuantisedActivations, W>) W::pack(x + c * words, k, units, v, lane);
        }
    }
    __syncthreads();

    for (int item = blockIdx.x; item < epilogue.items(); item += gridDim.x) {
        float sum[columns][4] = {};
        const int slice = warp % slices;
        const std::byte* panel = epilogue.panel(item, warp / slices);
        if (panel) {
            const Slice s{panel, slice_begin(units, epilogue.segments(), slices, slice),
                          slice_begin(units, epilogue.segments(), slices, slice + 1)};
            constexpr int in_flight = 4;  // 64 KB for 32 warps on an SM: enough to cover the latency of the memory
            const int steps = W::steps(s);
            for (int i = 0; i < steps; i += in_flight) {
                typename W::Loaded loaded[in_flight] = {};
#pragma unroll
                for (int j = 0; j < in_flight; ++j)
                    if (i + j < steps) loaded[j] = W::load(s, i + j, lane);
#pragma unroll
                for (int j = 0; j < in_flight; ++j)
                    if (i + j < steps) W::template multiply<columns>(sum, loaded[j], s, i + j, lane, x, words, units);
            }
        }
#pragma unroll
        for (int c = 0; c < columns; ++c) {
            const float value = sum_rows(sum[c], lane);
            if ((lane & 4) == 0) partial[(warp * columns + c) * 16 + row_of_lane(lane)] = value;
        }
        __syncthreads();
        for (int i = thread; i < panels * columns * 16; i += matvec_threads) {
            const Shared<float> parts = partial + (i / (16 * columns) * slices * columns + i / 16 % columns) * 16 + i % 16;
            total[i] = slices == 16  ? sum_tree<16>(parts, columns * 16)
                       : slices == 8 ? sum_tree<8>(parts, columns * 16)
                       : slices == 4 ? sum_tree<4>(parts, columns * 16)
                                     : sum_tree<2>(parts, columns * 16);
        }
        __syncthreads();
        epilogue.finish(
            item, [&](int panel, int column, int row) { return total[(panel * columns + column) * 16 + row]; }, first, n);
    }
}

// W h, some panels of W per item
struct OneMatrix {
    Panels w;
    int panels;
    __host__ __device__ int items() const { return div_up(w.panels(), panels); }
    __host__ __device__ int units() const { return w.units; }
    __device__ int segments() const { return w.segments; }
    __device__ const std::byte* panel(int item, int part) const {
        return item * panels + part < w.panels() ? w.panel(item * panels + part) : nullptr;
    }
};

// out = W h, or out += W h: each element has one owner
struct PutRows : OneMatrix {
    float* out;
    std::size_t stride;
    bool add;
    template <class T>
    __device__ void finish(int item, const T& total, int first, int n) const {
        for (int i = threadIdx.x; i < panels * 16 * n; i += matvec_threads) {
            const int c = i / (panels * 16), part = i / 16 % panels, row = (item * panels + part) * 16 + i % 16;
            if (row >= w.rows) continue;
            float& to = out[(first + c) * stride + row];
            to = add ? __fadd_rn(to, total(part, c, i % 16)) : total(part, c, i % 16);
        }
    }
};

// hidden = SiLU(W_gate h) ⊙ (W_up h): an item is the same panel of both
struct GateUp {
    static constexpr int panels = 2;
    Panels gate, up;
    float* hidden;
    std::size_t stride;
    __host__ __device__ int items() const { return gate.panels(); }
    __host__ __device__ int units() const { return gate.units; }
    __device__ int segments() const { return 1; }
    __device__ const std::byte* panel(int item, int part) const { return part == 0 ? gate.panel(item) : up.panel(item); }
    template <class T>
    __device__ void finish(int item, const T& total, int first, int n) const {
        for (int i = threadIdx.x; i < 16 * n; i += matvec_threads) {
            const int c = i / 16, row = item * 16 + i % 16;
            if (row < gate.rows) hidden[(first + c) * stride + row] = __fmul_rn(silu(total(0, c, i % 16)), total(1, c, i % 16));
        }
    }
};

// Where RoPE(W_q h), RoPE(W_k h) and W_v h of a batch's rows go: to memory, and to the cache.
struct QkvOut {
    float* query;  // [T, H*E]
    std::size_t stride;
    const RowEntry* rows;
    const float* turns;
    CacheShape cache;
    int layer, queries, keys;  // H*E, K*E
    // A whole warp stores 32 channels: channel i of query, key and value, one after the other; `other` is RoPE's partner of x.
    __device__ void put(int t, int i, float x, float other, int lane) const {
        const int channel = i % cache.head_dim;
        if (i < queries + keys) {
            const float* turn = turns + t * cache.head_dim + (channel & ~1);
            x = lane & 1 ? fmaf(other, turn[1], __fmul_rn(x, turn[0])) : fmaf(x, turn[0], -__fmul_rn(other, turn[1]));
        }
        if (i < queries) {
            query[t * stride + i] = x;
        } else {
            const bool value = i >= queries + keys;
            const RowEntry row = rows[t];
            const int head = (i - queries - (value ? keys : 0)) / cache.head_dim;
            const std::size_t at = cache.element(row.capacity, layer, head, row.position) + channel;
            store_channels(cache.format, CacheView(cache, row, value), at, x, lane);
        }
    }
};

// An item is 32 rows, the channels that share a scale in a q8 cache; a warp finishes one column, lane = row. Heads of 64 and 128
// channels never end within an item.
struct ProjectQkv {
    static constexpr int panels = 2;
    Panels query, key, value;
    QkvOut out;
    __host__ __device__ int items() const { return (query.rows + key.rows + value.rows) / 32; }
    __host__ __device__ int units() const { return query.units; }
    __device__ int segments() const { return 1; }
    __device__ const std::byte* panel(int item, int part) const {
        const int i = 2 * item + part, queries = query.panels(), keys = key.panels();
        return i < queries ? query.panel(i) : i < queries + keys ? key.panel(i - queries) : value.panel(i - queries - keys);
    }
    template <class T>
    __device__ void finish(int item, const T& total, int first, int n) const {
        const int c = threadIdx.x / 32, lane = threadIdx.x % 32, panel = lane / 16, row = lane % 16;
        if (c < n) out.put(first + c, item * 32 + lane, total(panel, c, row), total(panel, c, row ^ 1), lane);
    }
};

// ═══ K7  Attention, one query at a time ════════════════════════════════════════════════════════════════════════════════════════
//
// mixed[t, head] = softmax(query · keysᵀ / √E) values. A block serves all query heads of a key/value head (up to 8), so keys and
// values are read once, and one segment of 512 positions, so that a long context fills the card. Where there is more than one
// segment, the block of a head that finishes last joins them in order.

constexpr int attend_warps = 8, attend_threads = 32 * attend_warps;

// Partial results of segments, in memory for contexts of `splits` of them.
struct SplitBuffers {
    int splits = 0;
    float* partial = nullptr;     // [rows, groups, splits, heads, E]: values weighted by e^(score - largest)
    float* statistics = nullptr;  // [rows, groups, splits, heads, 2]: largest score, sum of the weights
};
struct Attend {
    const float* query;  // [T, H*E]
    float* mixed;        // [T, H*E]
    std::size_t stride;  // of both
    const RowEntry* rows;
    CacheShape cache;
    int layer;
    int shared;        // G: query heads per key/value head
    int first, count;  // rows
    SplitBuffers split;
    unsigned* tickets;  // [rows, groups]: blocks that are done; zero between launches
};

// The sum of a head's channels over the warps needs as much shared memory as the scores, which are done with by then.
constexpr std::size_t attend_shared_bytes(int head_dim, int heads) {
    return sizeof(float) * (heads * attend_warps * head_dim + 2 * heads + 1);
}

// f(j, 8 channels of position j) for a lane's positions: own, own + stride, ...; beyond `count` zeros, so that lanes stay together.
template <class C, int head_dim, class F>
__device__ __forceinline__ void for_positions(const CacheView& view, std::size_t at, int own, int count, const F& f) {
    constexpr int in_flight = 4, stride = attend_threads / (head_dim / 8);
    for (int base = own; base - own < count; base += in_flight * stride) {
        typename C::Loaded loaded[in_flight] = {};
#pragma unroll
        for (int i = 0; i < in_flight; ++i)
            if (base + i * stride < count) loaded[i] = C::load(view, at + (base + i * stride) * head_dim);
#pragma unroll
        for (int i = 0; i < in_flight; ++i) {
            float channels[8];
            C::unpack(channels, loaded[i]);
            f(base + i * stride, channels);
        }
    }
}

template <class C, int head_dim, int heads>
__global__ void __launch_bounds__(attend_threads, 2) attend_split(Attend a) {
    static_assert(attend_warps * head_dim >= attention_segment && heads <= attend_warps);
    constexpr int lanes = head_dim / 8, per_warp = 32 / lanes;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, part = lane % lanes;
    const int groups = div_up(a.shared, heads), kv_head = blockIdx.x / groups;
    const int head0 = blockIdx.x % groups * heads, n_heads = min(heads, a.shared - head0);
    const int t = a.first + blockIdx.z, split = blockIdx.y;
    const RowEntry row = a.rows[t];
    const int n = row.position + 1, begin = split * attention_segment, count = min(attention_segment, n - begin);
    if (count <= 0) return;

    const Shared<float> scores = shared_memory<float>();                        // [heads][512], then [warps][heads][E]
    const Shared<float> statistics = scores + heads * attend_warps * head_dim;  // [heads][2]
    const Shared<unsigned> is_last = shared_cast<unsigned>(statistics + 2 * heads);
    const std::size_t at = a.cache.element(row.capacity, a.layer, kv_head, begin) + 8 * part;
    const int own = warp * per_warp + lane / lanes;
    const int first_head = kv_head * a.shared + head0;

    {  // scores[h][j] = query[h] · key[j] / √E
        const CacheView keys(a.cache, row, false);
        float query[heads][8];
#pragma unroll
        for (int h = 0; h < heads; ++h) {
            const float* from = a.query + t * a.stride + (first_head + h) * head_dim + 8 * part;
#pragma unroll
            for (int e = 0; e < 8; ++e) query[h][e] = h < n_heads ? from[e] : 0;
        }
        const float scale = 1 / sqrtf(head_dim);
        for_positions<C, head_dim>(keys, at, own, count, [&](int j, const float(&key)[8]) {
#pragma unroll
            for (int h = 0; h < heads; ++h) {
                float dot = 0;
#pragma unroll
                for (int e = 0; e < 8; ++e) dot = fmaf(query[h][e], key[e], dot);
                dot = over_lanes<lanes / 2>(dot, Sum());
                if (part == h && j < count) scores[h * attention_segment + j] = __fmul_rn(dot, scale);
            }
        });
    }
    __syncthreads();
    if (warp < heads) {  // softmax of a head, but for the division
        const Shared<float> own_scores = scores + warp * attention_segment;
        float largest = -INFINITY, sum = 0;
        for (int j = lane; j < count; j += 32) largest = fmaxf(largest, own_scores[j]);
        largest = over_lanes(largest, Max());
        for (int j = lane; j < count; j += 32) {
            const float p = expf(own_scores[j] - largest);
            own_scores[j] = p;
            sum = __fadd_rn(sum, p);
        }
        sum = over_lanes(sum, Sum());
        if (lane == 0) statistics[2 * warp] = largest, statistics[2 * warp + 1] = sum;
    }
    __syncthreads();
    {  // values weighted by the scores
        const CacheView values(a.cache, row, true);
        float mix[heads][8] = {};
        for_positions<C, head_dim>(values, at, own, count, [&](int j, const float(&value)[8]) {
            if (j >= count) return;
#pragma unroll
            for (int h = 0; h < heads; ++h) {
                const float p = scores[h * attention_segment + j];
#pragma unroll
                for (int e = 0; e < 8; ++e) mix[h][e] = fmaf(p, value[e], mix[h][e]);
            }
        });
        __syncthreads();  // the scores are done with
#pragma unroll
        for (int h = 0; h < heads; ++h)
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float x = over_lanes<16, lanes>(mix[h][e], Sum());
                if (lane < lanes) scores[(warp * heads + h) * head_dim + 8 * part + e] = x;
            }
    }
    __syncthreads();

    const int segments = div_up(n, attention_segment);
    const std::size_t group = blockIdx.z * gridDim.x + blockIdx.x;
    const std::size_t first_partial = group * a.split.splits * heads;
    for (int i = thread; i < n_heads * head_dim; i += attend_threads) {
        const int h = i / head_dim;
        float x = scores[i];
        for (int w = 1; w < attend_warps; ++w) x = __fadd_rn(x, scores[w * heads * head_dim + i]);
        if (segments == 1) {
            a.mixed[t * a.stride + first_head * head_dim + i] = x / statistics[2 * h + 1];
        } else {
            const std::size_t index = first_partial + split * heads + h;
            a.split.partial[index * head_dim + i % head_dim] = x;
            if (i % head_dim < 2) a.split.statistics[2 * index + i % head_dim] = statistics[2 * h + i % head_dim];
        }
    }
    if (segments == 1) return;

    __threadfence();  // what this block wrote is visible before its ticket is
    __syncthreads();
    if (thread == 0) {
        const bool last = atomicAdd(a.tickets + group, 1u) + 1 == static_cast<unsigned>(segments);
        is_last[0] = last;
        if (last) a.tickets[group] = 0;
    }
    __syncthreads();
    if (!is_last[0]) return;
    __threadfence();
    for (int i = thread; i < n_heads * head_dim; i += attend_threads) {
        float largest = -INFINITY, sum = 0, mix = 0;
        for (int s = 0; s < segments; ++s) {
            const std::size_t index = first_partial + s * heads + i / head_dim;
            const float segment_largest = load_fresh(a.split.statistics + 2 * index), both = fmaxf(largest, segment_largest);
            const float old_share = expf(largest - both), new_share = expf(segment_largest - both);
            sum = fmaf(load_fresh(a.split.statistics + 2 * index + 1), new_share, __fmul_rn(sum, old_share));
            mix = fmaf(load_fresh(a.split.partial + index * head_dim + i % head_dim), new_share, __fmul_rn(mix, old_share));
            largest = both;
        }
        a.mixed[t * a.stride + first_head * head_dim + i] = mix / sum;
    }
}

// ═══ K8  Prompts ═══════════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// More than 8 rows: every matrix is unpacked to bf16, row after row, into one buffer that the next one overwrites, and multiplied
// by cuBLASLt, whose sums are float32. Unpacking costs the same for 16 rows as for 2048; hence long chunks. Attention is
// "FlashAttention-2" (Dao, 2023) on tensor cores. Needs bf16 tensor cores, sm_80; older devices take 8 rows at a time as above.

// Row-major bf16 of rows [first, first + rows) of W, `columns` of them, a multiple of 8.       One thread per row and 8 columns
template <class W>
__global__ void unpack_rows(Panels w, std::uint16_t* out, int first, int rows, int columns) {
    // 8 neighbours write 128 bytes of a row; 16 rows of 64 columns are one or a few whole units
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x, tiles = div_up(columns, 64), tile = index / 128;
    const int row = tile / tiles * 16 + index / 8 % 16, column = tile % tiles * 64 + index % 8 * 8;
    if (row >= rows || column >= columns) return;
    float values[8];
    W::decode8(values, w.panel((first + row) / 16), (first + row) % 16, column, w.units);
    store16(out + static_cast<std::size_t>(row) * columns + column, pack_bf16(values));
}

// Rows of activations as bf16, normalised if there is a norm, filled up with zeros to `columns`.          One block per row
constexpr int row_warps = 8, row_threads = 32 * row_warps;
static __global__ void __launch_bounds__(row_threads) pack_rows(Input input, std::uint16_t* out, int columns) {
    const Shared<float> scratch = shared_memory<float>();  // [row_warps]
    const int t = blockIdx.x;
    const float* row = input.row(t);
    const float inverse = input.norm ? inverse_norm<row_warps>(row, input.width, input.eps, scratch) : 1.0f;
    for (int k = 4 * threadIdx.x; k < columns; k += 4 * row_threads) {
        float4 v = load_columns(row, k, input.width);
        if (input.norm) v = scaled(v, inverse, load_columns(input.norm, k, input.width));
        std::uint32_t* to = reinterpret_cast<std::uint32_t*>(out + static_cast<std::size_t>(t) * columns + k);
        to[0] = pack_bf16(v.x, v.y), to[1] = pack_bf16(v.z, v.w);
    }
}

// Rotates the queries in place and stores keys and values, [T, K*E] each.            A warp per row and 32 channels of one of them
static __global__ void __launch_bounds__(row_threads)
    rotate_rows(QkvOut out, const float* key, const float* value, std::size_t stride) {
    const int lane = threadIdx.x % 32, t = blockIdx.x, i = blockIdx.y * row_threads + threadIdx.x;
    const int own_key = i - out.queries, own_value = own_key - out.keys;
    if (own_value >= out.keys) return;  // a whole warp: all three widths are multiples of 32
    const float x = own_key < 0     ? out.query[t * out.stride + i]
                    : own_value < 0 ? key[t * stride + own_key]
                                    : value[t * stride + own_value];
    out.put(t, i, x, __shfl_xor_sync(all_lanes, x, 1), lane);
}

// hidden = SiLU(hidden) ⊙ up                                                                   grid: [columns / threads, T]
static __global__ void __launch_bounds__(row_threads)
    gate_rows(float* hidden, const float* up, std::size_t stride, int columns) {
    const int i = blockIdx.x * row_threads + threadIdx.x;
    const std::size_t at = blockIdx.y * stride + i;
    if (i < columns) hidden[at] = __fmul_rn(silu(hidden[at]), up[at]);
}

// Attention of rows of one sequence with consecutive positions.
constexpr int flash_rows = 64, flash_positions = 64, flash_threads = 128;
template <int head_dim>
constexpr int flash_row_halves = head_dim + 8;  // 16 bytes more than a power of two: 8 rows of a matrix lie in different banks
template <int head_dim>
constexpr std::size_t flash_shared_bytes = 2 * 2 * flash_positions* flash_row_halves<head_dim> * sizeof(std::uint16_t);

// Keys (or values) of positions [begin, begin + 64) to shared memory as bf16; zeros from position n on, since 0 x NaN is NaN.
template <class C, int head_dim>
__device__ void stage_tile(Shared<std::uint16_t> to, const CacheView& view, std::size_t at, int begin, int n) {
    constexpr int pieces = head_dim / 8;  // of 8 channels
    for (int i = threadIdx.x; i < flash_positions * pieces; i += flash_threads) {
        const int j = i / pieces, channel = i % pieces * 8;
        const Shared<std::uint16_t> piece = to + (j * flash_row_halves<head_dim> + channel);
        const std::size_t from = at + (begin + j) * head_dim + channel;
        if (std::is_same_v<C, CacheBf16> && begin + j < n) {
            copy_async16(piece, view.data + 2 * from);
        } else {
            float values[8];
            C::unpack(values, begin + j < n ? C::load(view, from) : typename C::Loaded{});
            shared_cast<uint4>(piece)[0] = pack_bf16(values);
        }
    }
}

// A block has 64 rows of one head, a warp 16 of them; keys and values come 64 positions at a time, the next ones while these are
// multiplied. A lane has rows g and g + 8 of its warp's tile, g = lane / 4, as mma deals them out.
template <class C, int head_dim>
__global__ void __launch_bounds__(flash_threads) flash_attention(Attend a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    __trap();  // the host never launches it there
#else
    constexpr int row_halves = flash_row_halves<head_dim>, tile_halves = flash_positions * row_halves;
    constexpr int key_steps = head_dim / 16, score_tiles = flash_positions / 8, value_tiles = head_dim / 8;
    const Shared<std::uint16_t> tiles = shared_memory<std::uint16_t>();  // [2 stages][keys, values][64][row_halves]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, pair = lane % 4 * 2;
    const int head = blockIdx.y, tile_row = blockIdx.x * flash_rows;
    const RowEntry first = a.rows[a.first];
    const CacheView keys(a.cache, first, false), values(a.cache, first, true);
    const std::size_t at = a.cache.element(first.capacity, a.layer, head / a.shared, 0);
    const int n = first.position + min(a.count, tile_row + flash_rows);  // positions that the tile's last row sees
    const int rows[2] = {tile_row + warp * 16 + g, tile_row + warp * 16 + g + 8};

    // Queries as fragments a of mma, scaled so that the softmax is a power of 2: e^(s / √E) = 2^(s log2(e) / √E)
    const float scale = 1.44269504f / sqrtf(head_dim);
    std::uint32_t query[key_steps][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float* from = a.query + (a.first + rows[r]) * a.stride + head * head_dim + pair;
#pragma unroll
        for (int k = 0; k < key_steps; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* x = from + 16 * k + 8 * half;
                query[k][r + 2 * half] = rows[r] < a.count ? pack_bf16(__fmul_rn(x[0], scale), __fmul_rn(x[1], scale)) : 0;
            }
    }
    float mixed[value_tiles][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

    const int n_tiles = div_up(n, flash_positions);
    stage_tile<C, head_dim>(tiles, keys, at, 0, n);
    stage_tile<C, head_dim>(tiles + tile_halves, values, at, 0, n);
    copy_async_commit();
    for (int tile = 0; tile < n_tiles; ++tile) {
        if (tile + 1 < n_tiles) {
            const Shared<std::uint16_t> next = tiles + (tile + 1) % 2 * 2 * tile_halves;
            stage_tile<C, head_dim>(next, keys, at, (tile + 1) * flash_positions, n);
            stage_tile<C, head_dim>(next + tile_halves, values, at, (tile + 1) * flash_positions, n);
            copy_async_commit();
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        const Shared<std::uint16_t> key = tiles + tile % 2 * 2 * tile_halves, value = key + tile_halves;

        float score[score_tiles][4] = {};
#pragma unroll
        for (int k = 0; k < key_steps; ++k)
#pragma unroll
            for (int j = 0; j < score_tiles; j += 2) {  // 16 positions x 16 channels
                std::uint32_t b[4];
                ldmatrix_x4(b, key + ((j * 8 + lane / 16 * 8 + lane % 8) * row_halves + k * 16 + lane / 8 % 2 * 8));
                mma_m16n8k16_bf16(score[j], query[k], b[0], b[1]);
                mma_m16n8k16_bf16(score[j + 1], query[k], b[2], b[3]);
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int sees =
                first.position + rows[r] - tile * flash_positions;  // the last position of this tile that row r sees
            float tile_largest = -INFINITY;
#pragma unroll
            for (int j = 0; j < score_tiles; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[j][2 * r + i];
                    if (j * 8 + pair + i > sees) s = -INFINITY;
                    tile_largest = fmaxf(tile_largest, s);
                }
            const float both =
                fmaxf(largest[r],
                      over_lanes<2>(tile_largest, Max()));  // finite: a tile's first position is seen, or an earlier tile was
            const float share = exp2f(largest[r] - both);
            float tile_sum = 0;
#pragma unroll
            for (int j = 0; j < score_tiles; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[j][2 * r + i];
                    s = exp2f(s - both);
                    tile_sum = __fadd_rn(tile_sum, s);
                }
            sum[r] = fmaf(sum[r], share, tile_sum);
            largest[r] = both;
#pragma unroll
            for (int e = 0; e < value_tiles; ++e) {
                mixed[e][2 * r] = __fmul_rn(mixed[e][2 * r], share);
                mixed[e][2 * r + 1] = __fmul_rn(mixed[e][2 * r + 1], share);
            }
        }
#pragma unroll
        for (int j = 0; j < score_tiles; j += 2) {  // the scores of 16 positions are fragment a of the next product
            const std::uint32_t p[4] = {pack_bf16(score[j][0], score[j][1]), pack_bf16(score[j][2], score[j][3]),
                                        pack_bf16(score[j + 1][0], score[j + 1][1]),
                                        pack_bf16(score[j + 1][2], score[j + 1][3])};
#pragma unroll
            for (int e = 0; e < value_tiles; e += 2) {
                std::uint32_t b[4];
                ldmatrix_x4_trans(b, value + ((j * 8 + lane % 16) * row_halves + e * 8 + lane / 16 * 8));
                mma_m16n8k16_bf16(mixed[e], p, b[0], b[1]);
                mma_m16n8k16_bf16(mixed[e + 1], p, b[2], b[3]);
            }
        }
        __syncthreads();  // before the next copies overwrite this stage
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[r] = over_lanes<2>(sum[r], Sum());
        if (rows[r] >= a.count) continue;
        float* to = a.mixed + (a.first + rows[r]) * a.stride + head * head_dim + pair;
#pragma unroll
        for (int e = 0; e < value_tiles; ++e) {
            to[8 * e] = mixed[e][2 * r] / sum[r];
            to[8 * e + 1] = mixed[e][2 * r + 1] / sum[r];
        }
    }
#endif
}

// ═══ K9  Sampling ══════════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// Sampler::sample of llama3.hpp, §7, by one block, so that only the token's id leaves the device. Probabilities are relative to
// the best. What is summed are whole numbers (shares of 2^-38), so no order of threads and atomics changes the result. The set
// of candidates is described by its border: those above the border's key, the bits of a probability, and the first few at it.

constexpr int sample_threads = 1024, sample_warps = sample_threads / 32;
using Mass = unsigned long long;

// What changes from draw to draw, in a table in device memory.
struct DrawEntry {
    float temperature, top_p, min_p;
    int top_k, row, token;  // row: of the logits; token is the result, -1 if no logit is a number
    double uniform;         // 0 to 1, from the sampler's generator
};
struct Draw : DrawEntry {
    const float* logits;
    int n;
};
struct Border {
    unsigned key;
    Mass equals;  // how many candidates of this very key are kept, lowest ids first
};
constexpr Mass no_limit = ~Mass{0};

__device__ __forceinline__ float relative_probability(float logit, float best, float temperature) {
    if (logit == best) return 1;
    const float x = (logit - best) / temperature;
    return x > -87.0f ? expf(x) : 0.0f;  // 0 for NaN too
}
__device__ __forceinline__ Mass mass_of(float probability) { return static_cast<Mass>(probability * 274877906944.0f); }

// The sum of x over this lane and those before it.
__device__ __forceinline__ Mass running_sum(Mass x, int lane) {
    for (int step = 1; step < 32; step *= 2) {
        const Mass other = __shfl_up_sync(all_lanes, x, step);
        if (lane >= step) x += other;
    }
    return x;
}

// f(id, logit) for the ids first + lane, first + lane + step, ... of a range, 8 loads at a time, on every thread as often: beyond
// the range the logit is NaN, whose probability is 0.
template <class F>
__device__ __forceinline__ void for_logits(const Draw& d, int first, int last, int lane, int step, const F& f) {
    for (int base = first; base < last; base += 8 * step) {
        float logits[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int id = base + i * step + lane;
            logits[i] = id < last ? d.logits[id] : __uint_as_float(0x7fffffffu);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) f(base + i * step + lane, logits[i]);
    }
}

// Moves the border up to where, in order of probability, more than `limit` of the measure has been passed: the number of
// candidates, or their mass. A part of the key's bits at a time, from the highest: a histogram, then the bin in which it happens.
// The first part is the exponent and 4 bits, 16 bins to the octave, so that few threads meet in a bin.
constexpr int sample_bins = 2048;
__device__ inline void keep_best(Border& border, const Draw& d, float best, bool by_mass, Mass limit, Shared<Mass> bins,
                                 Shared<Mass> found) {
    const int thread = threadIdx.x, lane = thread % 32;
    Mass passed = 0;
    unsigned prefix = 0;
    for (const int shift : {19, 9, 0}) {
        const int above = shift == 19 ? 31 : shift == 9 ? 19 : 9;  // the bits from here on are known
        const auto bin_of = [&](unsigned key) { return (key & ((1u << above) - 1)) >> shift; };
        for (int i = thread; i < sample_bins; i += sample_threads) bins[i] = 0;
        __syncthreads();
        for_logits(d, 0, d.n, thread, sample_threads, [&](int, float logit) {
            const float p = relative_probability(logit, best, d.temperature);
            const unsigned key = __float_as_uint(p);
            const bool candidate = key > border.key || (key == border.key && border.equals == no_limit);
            if (candidate && key >> above == prefix >> above) atomicAdd(bins + bin_of(key), by_mass ? mass_of(p) : Mass{1});
        });
        if (thread == 0 && border.equals != no_limit && border.key >> above == prefix >> above)
            atomicAdd(bins + bin_of(border.key), border.equals * (by_mass ? mass_of(__uint_as_float(border.key)) : Mass{1}));
        __syncthreads();
        constexpr int per_lane = sample_bins / 32;
        if (thread < 32) {  // lane 0 has the highest bins
            Mass own = 0;
            for (int b = 0; b < per_lane; ++b) own += bins[sample_bins - 1 - per_lane * lane - b];
            Mass before = passed + running_sum(own, lane) - own;
            const unsigned exceeded = __ballot_sync(all_lanes, before + own > limit);
            if (exceeded == 0 && lane == 0) found[0] = sample_bins;
            if (exceeded != 0 && lane == __ffs(static_cast<int>(exceeded)) - 1) {
                int bin = sample_bins - 1 - per_lane * lane;
                for (Mass here = bins[bin]; before + here <= limit; here = bins[bin]) before += here, --bin;
                found[0] = static_cast<Mass>(bin), found[1] = before;
            }
        }
        __syncthreads();
        const Mass bin = found[0];
        if (bin == sample_bins) return;  // all are kept
        passed = found[1], prefix |= static_cast<unsigned>(bin) << shift;
    }
    const Mass equals = (limit - passed) / (by_mass ? mass_of(__uint_as_float(prefix)) : Mass{1}) + 1;
    border = {prefix, prefix == border.key ? min(equals, border.equals) : equals};
}

static __global__ void __launch_bounds__(sample_threads)
    draw_token(const float* logits, std::size_t stride, int n, DrawEntry* entry) {
    Draw d{*entry, nullptr, n};
    d.logits = logits + d.row * stride;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Shared<Mass> bins = shared_memory<Mass>();  // [sample_bins]
    const Shared<Mass> found = bins + sample_bins;    // [2]
    const Shared<Mass> above = found + 2;             // [warps] mass above the border
    const Shared<Mass> equal = above + sample_warps;  // [warps] candidates at the border

    // The best logit and its lowest id, as one number: floats in the order of integers, then the complement of the id
    Mass largest = 0;
    for_logits(d, 0, d.n, thread, sample_threads, [&](int id, float logit) {
        const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are equal
        const unsigned order = bits >> 31 ? ~bits : bits | 0x80000000u;
        if (logit == logit) largest = max(largest, static_cast<Mass>(order) << 32 | ~static_cast<unsigned>(id));
    });
    largest = over_lanes(largest, Max());
    if (lane == 0) above[warp] = largest;
    __syncthreads();
    for (int w = 0; w < sample_warps; ++w) {
        const Mass other = above[w];
        largest = max(largest, other);
    }
    __syncthreads();
    if (largest == 0 || d.temperature == 0) {
        if (thread == 0) entry->token = largest == 0 ? -1 : static_cast<int>(~static_cast<unsigned>(largest));
        return;
    }
    const float best = d.logits[~static_cast<unsigned>(largest)];

    Border border{1, no_limit};  // every probability above 0
    if (d.top_k > 0) keep_best(border, d, best, false, static_cast<Mass>(d.top_k - 1), bins, found);

    // What lies above the border and at it, per warp. Each has a contiguous range of ids.
    const int range = div_up(d.n, sample_warps), first = min(d.n, warp * range), last = min(d.n, first + range);
    const auto measure = [&] {  // mass of all candidates
        Mass own = 0, equals = 0;
        for_logits(d, first, last, lane, 32, [&](int, float logit) {
            const float p = relative_probability(logit, best, d.temperature);
            if (__float_as_uint(p) > border.key) own += mass_of(p);
            equals += __float_as_uint(p) == border.key;
        });
        own = over_lanes(own, Sum()), equals = over_lanes(equals, Sum());
        __syncthreads();
        if (lane == 0) above[warp] = own, equal[warp] = equals;
        __syncthreads();
        Mass total = 0, all_equal = 0;
        for (int w = 0; w < sample_warps; ++w) total += above[w], all_equal += equal[w];
        return total + min(all_equal, border.equals) * mass_of(__uint_as_float(border.key));
    };
    if (d.top_p < 1)
        keep_best(border, d, best, true, static_cast<Mass>(static_cast<double>(d.top_p) * static_cast<double>(measure())), bins,
                  found);
    if (const unsigned least = __float_as_uint(d.min_p); least > border.key) border = {least, no_limit};
    const Mass total = measure();

    // The candidates in order of their ids: the one in whose share of the mass the point lies.
    const Mass point = min(static_cast<Mass>(d.uniform * static_cast<double>(total)), total - 1);
    Mass passed = 0, equals = 0;  // before this warp's range
    const Mass each = mass_of(__uint_as_float(border.key));
    for (int w = 0; w < warp; ++w) {
        const Mass here = equal[w], room = border.equals - min(equals, border.equals);
        passed += above[w] + min(here, room) * each;
        equals += here;
    }
    const Mass room = border.equals - min(equals, border.equals), here = equal[warp];
    if (point < passed || point >= passed + above[warp] + min(here, room) * each) return;  // it is in the range of one warp
    for_logits(d, first, last, lane, 32, [&](int id, float logit) {
        const float p = relative_probability(logit, best, d.temperature);
        const unsigned key = __float_as_uint(p), at_border = __ballot_sync(all_lanes, key == border.key);
        const Mass rank = equals + __popc(at_border & ((1u << lane) - 1));
        const Mass own = key > border.key || (key == border.key && rank < border.equals) ? mass_of(p) : 0;
        const Mass until = passed + running_sum(own, lane);
        if (until - own <= point && point < until) entry->token = id;  // of one lane
        passed = __shfl_sync(all_lanes, until, 31);
        equals += __popc(at_border);
    });
}
constexpr std::size_t sample_shared_bytes = sizeof(Mass) * (sample_bins + 2 + 2 * sample_warps);

// ═══ K10  Sums over ranks ══════════════════════════════════════════════════════════════════════════════════════════════════════
//
// x += the products of attention_out (or down) of all ranks, summed by the tree of join_ranks() in llama3.hpp, by every rank for
// itself: the bits are those of one rank.
//
// Few rows: "one-shot". The product of a rank pushes its sums into its slot in the memory of every rank, and each looks at its
// slots until they are full. Nothing else is sent: an empty slot holds a number that no sum is, so that what arrives is its own
// signal. There are three sets of slots, in turns. Exchange i fills set i % 3, and empties set (i + 2) % 3, which exchange i - 1
// has filled and read: nobody fills it before this rank's part of exchange i + 1 has arrived there, which is sent after this.
// Set (i + 1) % 3 must be left alone, because a rank that is ahead may be filling it already.
//
// Many rows: "two-shot". Each rank has the sums of some of the rows: it waits for the products of all, by events, reads its rows of
// them where they are, and leaves the sums in its own; then each adds the sums of all. A rank reads 2 (R - 1) / R products, not R - 1.

constexpr int most_ranks = 16;  // that meet here

// An empty slot: a NaN with a payload that arithmetic does not make; a sum that has it nevertheless is sent as another NaN. (With
// -0, which TensorRT-LLM takes, the signs of zeros would depend on the number of ranks.)
__device__ __forceinline__ float empty_slot() { return __uint_as_float(0xffffffffu); }
__device__ __forceinline__ bool is_empty(float x) { return __float_as_uint(x) == 0xffffffffu; }
__device__ __forceinline__ bool is_empty(float4 v) { return is_empty(v.x) || is_empty(v.y) || is_empty(v.z) || is_empty(v.w); }
__device__ __forceinline__ float sendable(float x) { return is_empty(x) ? __uint_as_float(0x7fffffffu) : x; }

// part(0) + part(1) + ... of `ranks` parts, at most n, as the tree ((0 + 1) + (2 + 3)) + ...: what is missing is left out.
template <int n, class F>
__device__ __forceinline__ float sum_ranks(int first, int ranks, const F& part) {
    if constexpr (n == 1) return part(first);
    else {
        const float low = sum_ranks<n / 2>(first, ranks, part);
        return first + n / 2 < ranks ? __fadd_rn(low, sum_ranks<n / 2>(first + n / 2, ranks, part)) : low;
    }
}

// The slots of every rank, [3][ranks][rows][stride], and which set it is the turn of.
struct Slots {
    float* of[most_ranks];
    int rank, ranks;  // this one, and how many
    std::size_t stride;
    const RowEntry* table;
    unsigned index;  // of the exchange, within the step
    static constexpr int rows = matvec_rows;
    __device__ unsigned exchange() const { return table[0].exchanges + index; }
    __device__ std::size_t at(unsigned exchange, int from) const { return (exchange % 3 * ranks + from) * rows * stride; }
};

// This rank's part for 4 columns at `at` of the slots, to every rank.
__device__ __forceinline__ void push_part(const Slots& slots, unsigned exchange, std::size_t at, float4 v) {
    v = make_float4(sendable(v.x), sendable(v.y), sendable(v.z), sendable(v.w));
    for (int r = 0; r < slots.ranks; ++r) store_remote16(slots.of[r] + slots.at(exchange, slots.rank) + at, v);
}
// The sum of the parts for 4 columns, once all are there. Then the set after next is emptied.
template <int n>
__device__ __forceinline__ float4 join_parts(const Slots& slots, unsigned exchange, std::size_t at) {
    float* const own = slots.of[slots.rank] + at;
    float4 parts[n];
#pragma unroll
    for (int r = 0; r < n; ++r)
        if (r < slots.ranks) parts[r] = load_remote16(own + slots.at(exchange, r));
    unsigned looks = 0;
#pragma unroll
    for (int r = 0; r < n; ++r)
        while (r < slots.ranks && is_empty(parts[r])) {
            wait_for_others(looks);
            parts[r] = load_remote16(own + slots.at(exchange, r));
        }
    const float empty = empty_slot();
    for (int r = 0; r < slots.ranks; ++r)
        store_remote16(own + slots.at(exchange + 2, r), make_float4(empty, empty, empty, empty));
    return make_float4(sum_ranks<n>(0, slots.ranks, [&](int r) { return parts[r].x; }),
                       sum_ranks<n>(0, slots.ranks, [&](int r) { return parts[r].y; }),
                       sum_ranks<n>(0, slots.ranks, [&](int r) { return parts[r].z; }),
                       sum_ranks<n>(0, slots.ranks, [&](int r) { return parts[r].w; }));
}

// W h, of one rank, to the slots of all. With R panels per item a warp has the slice of the columns that it has where there is one
// rank.
struct PushRows : OneMatrix {
    Slots slots;
    template <class T>
    __device__ void finish(int item, const T& total, int first, int n) const {
        for (int i = threadIdx.x; i < panels * 4 * n; i += matvec_threads) {
            const int c = i / (panels * 4), part = i / 4 % panels, quad = i % 4 * 4, row = (item * panels + part) * 16 + quad;
            const auto value = [&](int k) { return row + k < w.rows ? total(part, c, quad + k) : 0.0f; };
            if (row < w.rows)
                push_part(slots, slots.exchange(), (first + c) * slots.stride + row,
                          make_float4(value(0), value(1), value(2), value(3)));
        }
    }
};

// x += Σ slots                                                               One thread per 4 columns of a row; columns = D / 4
constexpr int join_threads = 128;
template <int n>
__global__ void __launch_bounds__(join_threads) join_slots(Slots slots, float* x, int rows, int columns) {
    const int i = blockIdx.x * join_threads + threadIdx.x;
    if (i >= rows * columns) return;
    const std::size_t at = i / columns * slots.stride + i % columns * 4;
    const float4 sum = join_parts<n>(slots, slots.exchange(), at), old = load16<float4>(x + at);
    store16(x + at,
            make_float4(__fadd_rn(old.x, sum.x), __fadd_rn(old.y, sum.y), __fadd_rn(old.z, sum.z), __fadd_rn(old.w, sum.w)));
}

// out = Σ parts, which lie as it does                                                          grid: [columns / threads, rows]
struct Partials {
    const float* of[most_ranks];
    int ranks;
};
static __global__ void __launch_bounds__(join_threads)
    sum_partials(Partials parts, float* out, std::size_t stride, int columns) {
    const int i = blockIdx.x * join_threads + threadIdx.x;
    const std::size_t at = blockIdx.y * stride + i;
    if (i < columns) out[at] = sum_ranks<most_ranks>(0, parts.ranks, [&](int r) { return parts.of[r][at]; });
}
// x += the sums, of which rank r has `rows` rows from row r * rows on                             grid: [columns / threads, T]
static __global__ void __launch_bounds__(join_threads)
    add_sums(Partials sums, int rows, float* x, std::size_t stride, int columns) {
    const int i = blockIdx.x * join_threads + threadIdx.x;
    const std::size_t at = blockIdx.y * stride + i;
    if (i < columns) x[at] = __fadd_rn(x[at], sums.of[blockIdx.y / rows][at]);
}

// Whether GPUs reach each other's memory: one stores there, and loads from there.                    One thread per 4 floats
static __global__ void __launch_bounds__(join_threads) probe_peer(float* to, const float* from, float* copy, unsigned seed) {
    const unsigned i = blockIdx.x * join_threads + threadIdx.x, first = seed + 4 * i;
    store_remote16(to + 4 * i, make_float4(first, first + 1, first + 2, first + 3));
    store16(copy + 4 * i, load_remote16(from + 4 * i));
}

// ═══ K11  Memory ═══════════════════════════════════════════════════════════════════════════════════════════════════════════════

// The GPU that a thread uses while this lives; then the caller's again, if the caller used one: to set a GPU takes memory there.
class UseGpu {
public:
    explicit UseGpu(int index, bool must = true) : index_(index) {  // must not: in destructors
        cudaGetDevice(&before_);
        const cudaError_t error = before_ == index && has_context(index) ? cudaSuccess : cudaSetDevice(index);
        if (must && error != cudaSuccess) check(error, "cudaSetDevice", "device " + std::to_string(index));
    }
    ~UseGpu() {
        if (before_ != index_ && has_context(before_)) cudaSetDevice(before_);
    }
    UseGpu(const UseGpu&) = delete;
    UseGpu& operator=(const UseGpu&) = delete;

private:
    int index_, before_ = 0;
};

// What is known of a GPU.
struct Gpu {
    int index = 0, major = 0, minor = 0, multiprocessors = 1;
    std::size_t shared_bytes = 48 * 1024;  // that a block may ask for
    std::uint64_t memory_bytes = 0;
    std::string name;
    bool tensor_cores = false;  // for bf16, in the GPU and in what was compiled
    std::string text() const { return "GPU " + std::to_string(index) + " (" + name + ")"; }
};

// Says before anything is allocated what does not fit.
inline void check_free(const Gpu& gpu, const std::string& what, std::uint64_t needed) {
    std::size_t available = 0, total = 0;
    LLAMA3_CHECK(gpu.text(), cudaMemGetInfo(&available, &total));
    if (needed > available)
        fail(Code::memory, gpu.text() + ": " + what + " does not fit (found " + gigabytes(available) + " free of " +
                               gigabytes(total) + ", expected " + gigabytes(needed) + "). " +
                               advice(cudaErrorMemoryAllocation));
}

// Memory of the device, or of the host and pinned. Released on the device where it was made.
class Memory {
public:
    enum class Kind { device, pinned };
    Memory() = default;
    Memory(Kind kind, std::size_t bytes, const std::string& what) : bytes_(bytes) {
        if (bytes == 0) return;
        const std::string where = what + ", " + gigabytes(bytes);
        void* data = nullptr;
        int gpu = 0;
        LLAMA3_CHECK(where, cudaGetDevice(&gpu));
        if (kind == Kind::device) LLAMA3_CHECK(where, cudaMalloc(&data, bytes));
        else LLAMA3_CHECK(where, cudaMallocHost(&data, bytes));
        data_ = {static_cast<std::byte*>(data), Release{kind, gpu}};
    }
    std::byte* data() const { return data_.get(); }
    std::size_t bytes() const { return bytes_; }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data());
    }

private:
    struct Release {
        Kind kind;
        int gpu;
        void operator()(std::byte* data) const {
            const UseGpu use(gpu, false);
            kind == Kind::device ? cudaFree(data) : cudaFreeHost(data);
        }
    };
    std::unique_ptr<std::byte, Release> data_;
    std::size_t bytes_ = 0;
};

// Owners of CUDA's other things.
template <class T, auto destroy>
struct Owner {
    T value{};
    Owner() = default;
    ~Owner() { reset(); }
    Owner(const Owner&) = delete;
    Owner& operator=(const Owner&) = delete;
    void reset() {
        if (value) destroy(value);
        value = {};
    }
};
struct Stream : Owner<cudaStream_t, cudaStreamDestroy> {
    Stream() { LLAMA3_CHECK("stream", cudaStreamCreateWithFlags(&value, cudaStreamNonBlocking)); }
    void wait(const std::string& where) const { LLAMA3_CHECK(where, cudaStreamSynchronize(value)); }
};
struct Event : Owner<cudaEvent_t, cudaEventDestroy> {
    explicit Event(unsigned flags = cudaEventDisableTiming) { LLAMA3_CHECK("event", cudaEventCreateWithFlags(&value, flags)); }
    void record(const Stream& stream) const { LLAMA3_CHECK("event", cudaEventRecord(value, stream.value)); }
};
using Graph = Owner<cudaGraphExec_t, cudaGraphExecDestroy>;
// Records what a stream is given, instead of running it.
struct Capture : Owner<cudaGraph_t, cudaGraphDestroy> {
    const Stream& stream;
    explicit Capture(const Stream& s) : stream(s) {
        LLAMA3_CHECK("step", cudaStreamBeginCapture(stream.value, cudaStreamCaptureModeThreadLocal));
    }
    ~Capture() {
        if (!value) cudaStreamEndCapture(stream.value, &value);
    }
    void end() { LLAMA3_CHECK("step", cudaStreamEndCapture(stream.value, &value)); }
};

// Hands out the parts of one piece of memory, at multiples of 256 bytes as cuBLASLt likes them; without memory it only counts.
class Parts {
public:
    explicit Parts(std::byte* memory = nullptr) : memory_(memory) {}
    template <class T>
    T* take(std::size_t n) {
        const std::size_t at = used_;
        used_ += round_up(n * sizeof(T), 256);
        return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
    }
    Tensor tensor(int rows, int columns) {
        const std::size_t stride = round_up(columns, 64);
        return {take<float>(rows * stride), rows, columns, stride};
    }
    std::size_t used() const { return used_; }

private:
    std::byte* memory_;
    std::size_t used_ = 0;
};

using Progress = std::function<void(std::uint64_t done, std::uint64_t total)>;

// A rank's share of a model on a GPU: its panels one after the other, as they are in the file. Shared by all sessions.
class DeviceWeights {
public:
    // Through two pinned buffers: one is filled, from the file's pages, while the other is on its way.
    DeviceWeights(Model model, Share share, const Gpu& gpu, const Progress& progress)
        : model_(std::move(model)), share_(std::move(share)), memory_(Memory::Kind::device, bytes_of(share_), "weights") {
        const std::string where = "weights to " + gpu.text();
        const std::size_t room = std::min<std::size_t>(memory_.bytes(), std::size_t{64} << 20);
        const Memory pinned[2] = {Memory(Memory::Kind::pinned, room, "upload"), Memory(Memory::Kind::pinned, room, "upload")};
        const Event sent[2];
        const Stream stream;
        std::size_t first = 0, i = 0;  // the buffer i % 2 is for the bytes from `first` on
        const auto send = [&](std::size_t end) {
            copy_async(memory_.data() + first, pinned[i % 2].data(), end - first, cudaMemcpyHostToDevice, stream.value, where);
            sent[i % 2].record(stream);
            first = end;
            if (++i >= 2) LLAMA3_CHECK(where, cudaEventSynchronize(sent[i % 2].value));
            if (progress) progress(end, memory_.bytes());
        };
        Weights& w = share_.weights;
        const std::byte* const table = w.embedding.data;
        Parts parts(memory_.data());
        for_pieces(share_, [&](auto*& data, std::size_t bytes, std::size_t times, std::size_t& stride) {
            std::byte* const there = parts.take<std::byte>(bytes * times);
            for (std::size_t t = 0; t < times; ++t)
                for (std::size_t done = 0; done < bytes;) {
                    const std::size_t to = there - memory_.data() + t * bytes + done;
                    if (to >= first + room) send(first + room);
                    const std::size_t n = std::min(bytes - done, first + room - to);
                    std::memcpy(pinned[i % 2].data() + (to - first),
                                reinterpret_cast<const std::byte*>(data) + t * stride + done, n);
                    done += n;
                }
            data = reinterpret_cast<std::remove_reference_t<decltype(data)>>(there), stride = bytes;
        });
        if (share_.config.tied_embedding) w.output.data = w.embedding.data + (w.output.data - table);  // rows of the table
        send(memory_.bytes());
        stream.wait(where);
    }
    static std::size_t bytes_of(Share share) {
        Parts parts;
        for_pieces(share,
                   [&](auto*, std::size_t bytes, std::size_t times, std::size_t) { parts.take<std::byte>(bytes * times); });
        return parts.used();
    }
    const Share& share() const { return share_; }
    const Weights& weights() const { return share_.weights; }

private:
    // f(data, bytes, times, stride) for everything in the order in which it lies on the GPU: `times` times `bytes`, `stride` apart.
    template <class F>
    static void for_pieces(Share& share, const F& f) {
        std::size_t norm_bytes = share.config.dim * sizeof(float);
        const auto matrix = [&](Matrix& m) { f(m.data, m.units() * unit_bytes(m.format), m.panels(), m.panel_stride); };
        const auto norm = [&](const float*& weights) { f(weights, norm_bytes, 1, norm_bytes); };
        Weights& w = share.weights;
        matrix(w.embedding), norm(w.final_norm);
        for (Layer& l : w.layers) {
            for (Matrix* m : {&l.query, &l.key, &l.value, &l.attention_out, &l.gate, &l.up, &l.down}) matrix(*m);
            norm(l.attention_norm), norm(l.ffn_norm);
        }
        if (!share.config.tied_embedding) matrix(w.output);
    }

    Model model_;  // keeps the file mapped
    Share share_;
    Memory memory_;
};

inline CacheShape cache_shape(const Config& c, Format format) { return {format, c.n_layers, c.n_kv_heads, c.head_dim}; }

class CudaCache final : public KVCache {
public:
    // No position is read before it was written.
    CudaCache(int capacity, std::shared_ptr<std::mutex> turn) : capacity_(capacity), turn_(std::move(turn)) {}
    ~CudaCache() override {
        const std::lock_guard turn(*turn_);
        parts_.clear();
    }
    void add(std::size_t bytes) { parts_.emplace_back(Memory::Kind::device, bytes, "key/value cache"); }
    int capacity() const override { return capacity_; }
    std::byte* data(std::size_t rank = 0) const { return parts_[rank].data(); }

private:
    int capacity_;
    std::vector<Memory> parts_;  // of each rank
    std::shared_ptr<std::mutex> turn_;
};

// Query heads per block of attend_split, and blocks per key/value head.
inline int heads_per_block(const Config& c) { return c.n_heads / c.n_kv_heads > 4 ? 8 : 4; }
inline int head_groups(const Config& c) { return c.n_kv_heads * div_up(c.n_heads / c.n_kv_heads, heads_per_block(c)); }

// The buffers of a back end: everything whose size follows from the model and the number of rows.
struct Buffers {
    static constexpr std::size_t workspace_bytes = std::size_t{32} << 20;  // what NVIDIA recommends for sm_90
    static constexpr std::size_t most_unpacked = std::size_t{1} << 27;     // elements: larger matrices go in pieces of rows

    Tensor x, query, mixed, hidden, logits, up, partial;
    float *turns, *frequencies, *slots;
    RowEntry* rows;
    DrawEntry* draw;
    unsigned* tickets;
    std::size_t slots_bytes = 0;
    std::uint16_t *packed = nullptr, *unpacked = nullptr;
    std::size_t unpacked_elements = 0;
    std::byte* workspace = nullptr;

    Buffers(Parts&& parts, const Config& c, int ranks, int n_rows) {
        const std::size_t n = n_rows, head_dim = c.head_dim;
        const int queries = c.n_heads * c.head_dim;
        x = parts.tensor(n_rows, c.dim);
        query = parts.tensor(n_rows, queries);
        mixed = parts.tensor(n_rows, queries);
        hidden = parts.tensor(n_rows, c.ffn_dim);
        logits = parts.tensor(matvec_rows, c.vocab_size);
        turns = parts.take<float>(n * head_dim);
        frequencies = parts.take<float>(head_dim / 2);
        rows = parts.take<RowEntry>(n);
        draw = parts.take<DrawEntry>(1);
        tickets = parts.take<unsigned>(matvec_rows * head_groups(c));
        partial = parts.tensor(ranks > 1 ? n_rows : 0, c.dim);
        slots_bytes = ranks > 1 ? 3 * ranks * Slots::rows * partial.stride * sizeof(float) : 0;
        slots = parts.take<float>(slots_bytes / sizeof(float));
        if (n_rows <= matvec_rows) return;
        const auto padded = [](int columns) -> std::size_t { return round_up(columns, 64); };
        up = parts.tensor(n_rows, std::max<int>(c.ffn_dim, 2 * padded(c.n_kv_heads * c.head_dim)));  // keys and values first
        packed = parts.take<std::uint16_t>(n * padded(std::max({c.dim, queries, c.ffn_dim})));
        const std::size_t largest = std::max({padded(queries) * padded(c.dim), padded(c.ffn_dim) * padded(c.dim),
                                              std::min(most_unpacked, padded(c.vocab_size) * padded(c.dim))});
        unpacked_elements = std::max(std::min(largest, most_unpacked), 64 * padded(std::max({c.dim, queries, c.ffn_dim})));
        unpacked = parts.take<std::uint16_t>(unpacked_elements);
        workspace = parts.take<std::byte>(workspace_bytes);
    }
    static std::size_t bytes(const Config& c, int ranks, int n_rows) {
        Parts parts;
        Buffers(std::move(parts), c, ranks, n_rows);
        return parts.used();
    }
};

inline int splits_of(int capacity) { return div_up(capacity, attention_segment); }
// Partial results of attention, E + 2 numbers each.
inline std::size_t split_results(const Config& c, int splits) {
    return static_cast<std::size_t>(matvec_rows * head_groups(c) * heads_per_block(c)) * splits;
}
inline std::size_t split_bytes(const Config& c, int splits) {
    return split_results(c, splits) * (c.head_dim + 2) * sizeof(float);
}

// Products of bf16 matrices by cuBLASLt. The algorithm is chosen once per shape, so that a shape has the same bits in every run.
class Gemm {
public:
    explicit Gemm(std::byte* workspace) : workspace_(workspace) { LLAMA3_CHECK("prompts", cublasLtCreate(&handle_.value)); }

    // out [n, stride] (+)= x [n, k] wᵀ [k, rows], row-major. cuBLASLt counts columns first: there it is outᵀ (+)= w xᵀ, w transposed.
    void multiply(const char* stage, float* out, std::size_t stride, const std::uint16_t* w, const std::uint16_t* x, int rows,
                  int n, int k, bool add, cudaStream_t stream) {
        Owner<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> operation;
        const cublasOperation_t transposed = CUBLAS_OP_T;
        LLAMA3_CHECK(stage, cublasLtMatmulDescCreate(&operation.value, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        LLAMA3_CHECK(stage, cublasLtMatmulDescSetAttribute(operation.value, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                                           sizeof transposed));
        struct Layout : Owner<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy> {
            Layout(const char* stage, cudaDataType_t type, int height, int width, std::size_t leading) {
                LLAMA3_CHECK(stage, cublasLtMatrixLayoutCreate(&value, type, height, width, leading));
            }
        };
        const Layout w_layout(stage, CUDA_R_16BF, k, rows, k), x_layout(stage, CUDA_R_16BF, k, n, k),
            out_layout(stage, CUDA_R_32F, rows, n, stride);

        const std::uint32_t alignment = reinterpret_cast<std::uintptr_t>(out) % 256 == 0 ? 256 : 64;  // a rank's columns
        const std::array<long long, 6> shape = {rows, n, k, static_cast<long long>(stride), add, alignment};
        auto found = algorithms_.find(shape);
        if (found == algorithms_.end()) {
            Owner<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference;
            LLAMA3_CHECK(stage, cublasLtMatmulPreferenceCreate(&preference.value));
            const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const auto& value) {
                LLAMA3_CHECK(stage, cublasLtMatmulPreferenceSetAttribute(preference.value, what, &value, sizeof value));
            };
            prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::uint64_t{Buffers::workspace_bytes});
            prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,  // those that have a fixed order
                   std::uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
            prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment);
            prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment);
            cublasLtMatmulHeuristicResult_t result{};
            int count = 0;
            LLAMA3_CHECK(stage, cublasLtMatmulAlgoGetHeuristic(handle_.value, operation.value, w_layout.value, x_layout.value,
                                                               out_layout.value, out_layout.value, preference.value, 1, &result,
                                                               &count));
            if (count == 0) check(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic", stage);
            found = algorithms_.emplace(shape, result.algo).first;
        }
        const float one = 1, beta = add ? 1 : 0;
        LLAMA3_CHECK(stage, cublasLtMatmul(handle_.value, operation.value, &one, w, w_layout.value, x, x_layout.value, &beta,
                                           out, out_layout.value, out, out_layout.value, &found->second, workspace_,
                                           Buffers::workspace_bytes, stream));
    }

private:
    Owner<cublasLtHandle_t, cublasLtDestroy> handle_;
    std::byte* workspace_;
    std::map<std::array<long long, 6>, cublasLtMatmulAlgo_t> algorithms_;
};

// ═══ K12  A rank's stages ══════════════════════════════════════════════════════════════════════════════════════════════════════

// A GPU as one back end uses it: the ranks on it share a stream, in which everything has its order.
struct Lane {
    Gpu gpu;
    Stream stream;
    Event event;
    std::array<Graph, matvec_rows> graphs{};
    explicit Lane(const Gpu& g) : gpu(g) {}
};

// What is launched for one rank: its share of the weights, its buffers, and the kernels of each stage.
class CudaRank {
public:
    CudaRank(std::shared_ptr<const DeviceWeights> weights, Lane& lane, const Options& options, int max_rows)
        : lane_(lane), weights_(std::move(weights)), config_(share().config), cache_(cache_shape(config_, options.kv)),
          max_rows_(max_rows), memory_(Memory::Kind::device, Buffers::bytes(config_, share().ranks, max_rows_), "buffers"),
          buffers_(Parts(memory_.data()), config_, share().ranks, max_rows_),
          tables_(Memory::Kind::pinned, max_rows_ * sizeof(RowEntry), "tables") {
        if (max_rows_ > matvec_rows) gemm_ = std::make_unique<Gemm>(buffers_.workspace);
        const std::vector<float> frequencies = detail::rope_frequencies(config_);
        LLAMA3_CHECK("buffers", cudaMemset(memory_.data(), 0, memory_.bytes()));
        LLAMA3_CHECK("buffers", cudaMemset(buffers_.slots, 0xff, buffers_.slots_bytes));  // all empty
        LLAMA3_CHECK("RoPE frequencies", cudaMemcpy(buffers_.frequencies, frequencies.data(),
                                                    frequencies.size() * sizeof(float), cudaMemcpyHostToDevice));
        LLAMA3_CHECK("buffers", cudaDeviceSynchronize());  // all were on another stream than the steps will be
        reserve_splits(options.context);
    }

    const Share& share() const { return weights_->share(); }
    const Weights& weights() const { return share().weights; }
    const Buffers& buffers() const { return buffers_; }
    Lane& lane() const { return lane_; }
    cudaStream_t stream() const { return lane_.stream.value; }
    int n_tokens() const { return n_tokens_; }
    bool few() const { return n_tokens_ <= matvec_rows; }

    void embed(Tensor x, const Matrix& table) {
        with_format(table.format, [&]<class W>(W) {
            launch("embed", embed_rows<W>, dim3(n_tokens_), 256, 0, stream(), Panels(table), buffers_.rows, x.data, x.stride,
                   x.columns, buffers_.frequencies, buffers_.turns, config_.head_dim);
        });
    }

    void project_qkv(Tensor query, Tensor x, const Layer& layer) {
        const char* stage = "project_qkv";
        const Input input{x.data, x.stride, x.columns, layer.attention_norm, config_.norm_eps, nullptr};
        const QkvOut out{query.data, query.stride, buffers_.rows,    buffers_.turns,
                         cache_,     layer.index,  layer.query.rows, layer.key.rows};
        if (few())
            return multiply_rows(stage, layer.query.format, input, n_tokens_,
                                 ProjectQkv{Panels(layer.query), Panels(layer.key), Panels(layer.value), out});
        const Tensor rows = buffers_.up;  // keys, then values, in each
        float* const value = rows.data + padded(layer.key.rows);
        pack(stage, input, n_tokens_);
        multiply_packed(stage, layer.query, query.data, query.stride, n_tokens_, false);
        multiply_packed(stage, layer.key, rows.data, rows.stride, n_tokens_, false);
        multiply_packed(stage, layer.value, value, rows.stride, n_tokens_, false);
        launch(stage, rotate_rows, dim3(n_tokens_, div_up(out.queries + 2 * out.keys, row_threads)), row_threads, 0, stream(),
               out, rows.data, value, rows.stride);
    }

    void attend(Tensor mixed, Tensor query, const Layer& layer, const Batch& batch) {
        Attend a{
            query.data, mixed.data, query.stride, buffers_.rows,   cache_, layer.index, config_.n_heads / config_.n_kv_heads,
            0,          0,          splits_,      buffers_.tickets};
        const int heads = heads_per_block(config_);
        for (; a.first < n_tokens_; a.first += a.count) {
            a.count = few() ? n_tokens_ : run_length(batch, a.first);
            with_cache(cache_, [&]<class C, int e>(C, Constant<e>) {
                if (a.count > matvec_rows)
                    launch("attend", flash_attention<C, e>, dim3(div_up(a.count, flash_rows), config_.n_heads), flash_threads,
                           flash_shared_bytes<e>, stream(), a);
                else
                    launch("attend", heads == 4 ? attend_split<C, e, 4> : attend_split<C, e, 8>,
                           dim3(head_groups(config_), splits_.splits, a.count), attend_threads, attend_shared_bytes(e, heads),
                           stream(), a);
            });
        }
    }

    // W times the rows: added to x where there is one rank, else this rank's part of a sum, for the slots of all or here.
    void product(const char* stage, Tensor x, const Matrix& w, Tensor rows, const Slots* slots) {
        const Input input{rows.data, rows.stride, rows.columns, nullptr, 0, nullptr};
        const int ranks = share().ranks, panels = ranks % 8 == 0 ? 8 : ranks == 4 ? 4 : ranks == 2 ? 2 : 1;
        const Tensor out = ranks == 1 ? x : buffers_.partial;
        if (!few()) {
            pack(stage, input, n_tokens_);
            multiply_packed(stage, w, out.data, out.stride, n_tokens_, ranks == 1);
        } else if (slots) {
            multiply_rows(stage, w.format, input, n_tokens_, PushRows{{Panels(w), panels}, *slots});
        } else {
            multiply_rows(stage, w.format, input, n_tokens_, PutRows{{Panels(w), panels}, out.data, out.stride, ranks == 1});
        }
    }
    // x += the parts of all ranks in the slots
    void join(const char* stage, Tensor x, const Slots& slots) {
        const int quads = div_up(x.columns, 4);
        launch(stage, slots.ranks <= 8 ? join_slots<8> : join_slots<most_ranks>, dim3(div_up(n_tokens_ * quads, join_threads)),
               join_threads, 0, stream(), slots, x.data, n_tokens_, quads);
    }
    // n rows of this rank's part become the sums of the parts
    void sum(const char* stage, int first, int n, const Partials& parts) {
        const Tensor out = buffers_.partial;
        launch(stage, sum_partials, dim3(div_up(out.columns, join_threads), std::max(n, 0)), join_threads, 0, stream(), parts,
               out.row(first), out.stride, out.columns);
    }
    void add(const char* stage, Tensor x, const Partials& sums, int rows) {
        launch(stage, add_sums, dim3(div_up(x.columns, join_threads), n_tokens_), join_threads, 0, stream(), sums, rows, x.data,
               x.stride, x.columns);
    }

    void gate_up(Tensor hidden, Tensor x, const Layer& layer) {
        const char* stage = "gate_up";
        const Input input{x.data, x.stride, x.columns, layer.ffn_norm, config_.norm_eps, nullptr};
        if (few())
            return multiply_rows(stage, layer.gate.format, input, n_tokens_,
                                 GateUp{Panels(layer.gate), Panels(layer.up), hidden.data, hidden.stride});
        pack(stage, input, n_tokens_);
        multiply_packed(stage, layer.gate, hidden.data, hidden.stride, n_tokens_, false);
        multiply_packed(stage, layer.up, buffers_.up.data, hidden.stride, n_tokens_, false);  // its rows are at least as wide
        launch(stage, gate_rows, dim3(div_up(hidden.columns, row_threads), n_tokens_), row_threads, 0, stream(), hidden.data,
               buffers_.up.data, hidden.stride, hidden.columns);
    }

    void logits(Tensor logits, Tensor x, const Weights& weights) {
        const char* stage = "logits";
        const Input input{x.data, x.stride, x.columns, weights.final_norm, config_.norm_eps, buffers_.rows};
        if (logits.rows <= matvec_rows)
            return multiply_rows(stage, weights.output.format, input, logits.rows,
                                 PutRows{{Panels(weights.output), 2}, logits.data, logits.stride, false});
        pack(stage, input, logits.rows);
        multiply_packed(stage, weights.output, logits.data, logits.stride, logits.rows, false);
    }

    // The table of the batch's rows, and of those that want logits, on the way to the device. Returns how many do.
    int fill_tables(const Batch& batch, std::size_t part, unsigned exchanges) {
        n_tokens_ = batch.size();
        const std::size_t n = n_tokens_;
        RowEntry* const rows = tables_.as<RowEntry>();
        int wanted = 0;
        for (std::size_t t = 0; t < n; ++t) {
            const Row& row = batch.rows[t];
            const auto* cache = static_cast<const CudaCache*>(row.cache);
            rows[t] = {row.token, row.position, cache->capacity(), 0, exchanges, cache->data(part)};
            if (row.wants_logits) rows[wanted++].wanted = t;
        }
        copy_async(buffers_.rows, rows, sizeof(RowEntry) * n, cudaMemcpyHostToDevice, stream(), "table of rows");
        return wanted;
    }
    void empty_slots(std::size_t first_set, std::size_t sets) {
        const std::size_t set = buffers_.slots_bytes / 3;
        LLAMA3_CHECK("slots", cudaMemsetAsync(reinterpret_cast<std::byte*>(buffers_.slots) + first_set * set, 0xff, sets * set,
                                              stream()));
    }

    // ── Memory that grows ──

    bool reserve_splits(int capacity) {  // whether it has moved
        const int splits = splits_of(capacity);
        if (splits <= splits_.splits) return false;
        splits_ = {}, split_memory_ = {};
        split_memory_ = Memory(Memory::Kind::device, split_bytes(config_, splits), "partial attention");
        float* const partial = split_memory_.as<float>();
        splits_ = {splits, partial, partial + split_results(config_, splits) * config_.head_dim};
        return true;
    }
    Tensor reserve_logits(int rows) {
        Tensor logits = buffers_.logits;
        logits.rows = rows;
        if (rows <= matvec_rows) return logits;
        const std::size_t bytes = sizeof(float) * rows * logits.stride;
        if (many_logits_.bytes() < bytes) {
            many_logits_ = {};
            many_logits_ = Memory(Memory::Kind::device, bytes, "logits of " + std::to_string(rows) + " rows");
        }
        logits.data = many_logits_.as<float>();
        return logits;
    }

private:
    // Rows from `first` on that continue one sequence.
    static int run_length(const Batch& batch, int first) {
        int n = 1;
        const auto row = [&](int i) -> const Row& { return batch.rows[first + i]; };
        while (first + n < batch.size() && row(n).cache == row(0).cache && row(n).position == row(0).position + n) ++n;
        return n;
    }

    // ── Up to 8 rows: matrix x vector ──

    template <class Epilogue>
    void multiply_rows(const char* stage, Format format, const Input& input, int n, const Epilogue& epilogue) {
        with_format(format, [&]<class W>(W) { multiply_columns<W, matvec_rows>(stage, input, n, epilogue); });
    }
    // As many rows at a time as there are and have room in shared memory.
    template <class W, int columns, class Epilogue>
    void multiply_columns(const char* stage, const Input& input, int n, const Epilogue& epilogue) {
        const std::size_t shared = matvec_shared_bytes<W, columns>(epilogue.units()), room = lane_.gpu.shared_bytes;
        if constexpr (columns > 1)
            if (columns / 2 >= n || shared > room) return multiply_columns<W, columns / 2>(stage, input, n, epilogue);
        const int resident = 2 * shared <= room ? matvec_blocks_per_sm<W, columns> : 1;
        const dim3 blocks(std::min(epilogue.items(), lane_.gpu.multiprocessors * resident));
        for (int first = 0; first < n; first += columns)
            launch(stage, matvec<W, columns, Epilogue>, blocks, matvec_threads, shared, stream(), input, epilogue, first,
                   std::min(columns, n - first));
    }

    // ── Prompts: cuBLASLt ──

    static int padded(int columns) { return round_up(columns, 64); }
    void pack(const char* stage, const Input& input, int n) {
        launch(stage, pack_rows, dim3(n), row_threads, row_warps * sizeof(float), stream(), input, buffers_.packed,
               padded(input.width));
    }
    // out (+)= W times the packed rows
    void multiply_packed(const char* stage, const Matrix& w, float* out, std::size_t stride, int n, bool add) {
        const int columns = padded(w.columns);
        const int most = buffers_.unpacked_elements / columns / 64 * 64;
        for (int first = 0; first < w.rows; first += most) {
            const int rows = std::min(most, w.rows - first);
            with_format(w.format, [&]<class W>(W) {
                launch(stage, unpack_rows<W>, dim3(div_up(div_up(rows, 16) * (columns / 64) * 128, 256)), 256, 0, stream(),
                       Panels(w), buffers_.unpacked, first, rows, columns);
            });
            gemm_->multiply(stage, out + first, stride, buffers_.unpacked, buffers_.packed, rows, n, columns, add, stream());
        }
    }

    Lane& lane_;
    std::shared_ptr<const DeviceWeights> weights_;
    const Config& config_;  // of the share
    CacheShape cache_;
    int max_rows_, n_tokens_ = 0;
    Memory memory_;
    Buffers buffers_;
    Memory tables_;  // pinned: RowEntry [max_rows]
    Memory many_logits_, split_memory_;
    SplitBuffers splits_;
    std::unique_ptr<Gemm> gemm_;
};

// ═══ K13  The back end ═════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// The stages in the order of llama3.hpp, §3, for all ranks of this process in lock-step: one thread launches each stage on all of
// them before the next. forward() passes what belongs to the first; the others have their own. Up to 8 rows each stage is one
// launch per rank; what changes from step to step (tokens, positions, caches, which rows want logits) is in tables in device memory,
// so the graph of a number of rows is captured once per GPU and only launched after that.

// How the parts of a sum reach the other ranks.
struct Transport {
    enum class Kind {
        none,    // one rank
        peers,   // GPUs (or one) that reach each other's memory
        staged,  // Options::communicator, from and to pinned memory of the host
        nccl,
    } kind = Kind::none;
    std::string why;
};

#ifdef LLAMA3_NCCL
inline void check(ncclResult_t status, const char* call, const std::string& where) {
    if (status == ncclSuccess) return;
    fail(Code::device,
         "NCCL, " + where + ": " + name_of(call) + " failed (found " + ncclGetErrorString(status) + ": " +
             ncclGetLastError(nullptr) +
             ", expected success). Give each rank a GPU of its own; NCCL_DEBUG=INFO in the environment says more.");
}
constexpr bool with_nccl = true;
// Ranks that are processes with a GPU each; their communicator only hands round the name of the meeting.
struct Nccl : Owner<ncclComm_t, ncclCommDestroy> {
    explicit Nccl(Communicator& communicator) {
        ncclUniqueId id{};
        std::vector<std::byte> message(sizeof id);
        ncclResult_t status = ncclSuccess;
        if (communicator.rank() == 0) status = ncclGetUniqueId(&id);
        std::memcpy(message.data(), &id, sizeof id);
        if (status != ncclSuccess) message.resize(1);  // the others do not wait in vain
        communicator.broadcast(message);
        if (message.size() != sizeof id) check(status == ncclSuccess ? ncclRemoteError : status, "ncclGetUniqueId", "rank 0");
        std::memcpy(&id, message.data(), sizeof id);
        LLAMA3_CHECK("start", ncclCommInitRank(&value, communicator.ranks(), id, communicator.rank()));
    }
    ~Nccl() {
        if (std::uncaught_exceptions()) abort();  // the others may never come
    }
    void abort() noexcept {
        if (value) ncclCommAbort(value);
        value = nullptr;  // with which every later call is an error
    }
    void wait(cudaStream_t stream, const std::string& where) {
        const auto begin = std::chrono::steady_clock::now();
        for (cudaError_t error; (error = cudaStreamQuery(stream)) != cudaSuccess; std::this_thread::yield()) {
            if (error != cudaErrorNotReady) check(error, "cudaStreamQuery", where);
            ncclResult_t status = ncclInvalidUsage;
            if (value) ncclCommGetAsyncError(value, &status);
            const bool late = std::chrono::steady_clock::now() - begin > std::chrono::seconds(limit_s);
            if (late || (status != ncclSuccess && status != ncclInProgress)) abort();  // else the stream is never done
            if (late)
                fail(Code::device, "NCCL, " + where + ": the other ranks do not answer (found a time-out of " +
                                       std::to_string(limit_s) + " s, expected an answer). See what happened to them.");
            if (!value) check(status, "ncclCommGetAsyncError", where);
        }
    }
    void all_gather(const char* stage, const float* from, float* to, std::size_t n, cudaStream_t stream) const {
        LLAMA3_CHECK(stage, ncclAllGather(from, to, n, ncclFloat, value, stream));
    }
    static constexpr int limit_s = 120;
};
#else
constexpr bool with_nccl = false;
struct Nccl {
    explicit Nccl(Communicator&) {}
    void abort() noexcept {}
    void wait(cudaStream_t, const std::string&) const {}
    void all_gather(const char*, const float*, float*, std::size_t, cudaStream_t) const {}
};
#endif

class CudaBackend final : public Backend, public Stages {
public:
    struct Place {  // of a rank
        Gpu gpu;
        std::shared_ptr<const DeviceWeights> weights;
    };
    CudaBackend(const std::vector<Place>& places, Model model, const Options& options, Transport transport,
                std::shared_ptr<Nccl> nccl, std::shared_ptr<std::mutex> turn, int max_rows)
        : turn_(std::move(turn)), model_(std::move(model)), options_(options), transport_(std::move(transport)),
          nccl_(std::move(nccl)), max_rows_(max_rows) {
        for (const Place& place : places) {
            const UseGpu use(place.gpu.index);
            auto lane =
                std::find_if(lanes_.begin(), lanes_.end(), [&](const auto& l) { return l->gpu.index == place.gpu.index; });
            if (lane == lanes_.end()) lane = lanes_.insert(lane, std::make_unique<Lane>(place.gpu));
            ranks_.push_back(std::make_unique<CudaRank>(place.weights, **lane, options, max_rows_));
        }
        const Buffers& b = ranks_[0]->buffers();
        const std::size_t stride = b.logits.stride;
        host_logits_ = Memory(Memory::Kind::pinned, sizeof(float) * matvec_rows * stride, "logits");
        if (transport_.kind == Transport::Kind::staged)
            staging_ = Memory(Memory::Kind::pinned, (staged_rows * b.x.stride + 1) * sizeof(float), "sums over ranks");
        const char* graphs = std::getenv("LLAMA3_CUDA_GRAPHS");  // 0: every step is launched stage by stage, for debuggers
        use_graphs_ =
            transport_.kind != Transport::Kind::staged && !options.time_stages && (!graphs || std::strcmp(graphs, "0") != 0);
    }
    ~CudaBackend() override {
        for (const auto& lane : lanes_) {
            const UseGpu use(lane->gpu.index, false);
            if (nccl_ && std::uncaught_exceptions() && cudaStreamQuery(lane->stream.value) == cudaErrorNotReady) nccl_->abort();
            try {
                wait(*lane, "end");   // before memory is freed that others store to
            } catch (const Error&) {  // which has been reported, or is nobody's any more
            }
            for (Graph& graph : lane->graphs) graph.reset();
        }
        const std::lock_guard turn(*turn_);
        const UseGpu use(lanes_[0]->gpu.index, false);
        ends_.clear(), ranks_.clear(), lanes_.clear();
        host_logits_ = {}, staging_ = {}, drawn_ = {};
    }

    std::unique_ptr<KVCache> make_cache() override {
        std::map<int, std::uint64_t> needed;
        const auto bytes = [&](const CudaRank& r) {
            return cache_shape(r.share().config, options_.kv).bytes(options_.context);
        };
        each([&](CudaRank& r) { needed[r.lane().gpu.index] += bytes(r); });
        each([&](CudaRank& r) { check_free(r.lane().gpu, "the key/value cache", needed[r.lane().gpu.index]); });
        auto cache = std::make_unique<CudaCache>(options_.context, turn_);
        const std::lock_guard turn(*turn_);
        each([&](CudaRank& r) { cache->add(bytes(r)); });
        return cache;
    }
    int max_rows() const override { return max_rows_; }
    std::span<const float> logits(int i) const override {
        const Tensor& l = device_logits_;
        if (on_the_way_ > 0) {
            // Copied when they are asked for: a token that is drawn on the device does not need them.
            const UseGpu use(lanes_[0]->gpu.index);
            const std::size_t bytes = sizeof(float) * on_the_way_ * l.stride;
            if (host_logits_.bytes() < bytes) {
                const std::lock_guard turn(*turn_);
                host_logits_ = Memory(Memory::Kind::pinned, bytes, "logits on the host");
            }
            copy_async(host_logits_.data(), l.data, bytes, cudaMemcpyDeviceToHost, ranks_[0]->stream(), "logits");
            wait(*lanes_[0], "logits");
            on_the_way_ = 0;
        }
        return {host_logits_.as<float>() + i * l.stride, static_cast<std::size_t>(l.columns)};
    }
    std::string describe() const override {
        std::string text = "CUDA";
        for (const auto& lane : lanes_)
            text += ", " + lane->gpu.text() + ", sm_" + std::to_string(lane->gpu.major) + std::to_string(lane->gpu.minor) +
                    ", " + std::to_string(lane->gpu.multiprocessors) + " multiprocessors" +
                    (lane->gpu.tensor_cores ? "" : ", prompts in steps of 8 tokens (no bf16 tensor cores, or compiled for less than sm_80)");
        const Share& share = ranks_[0]->share();
        if (share.ranks == 1) return text;
        return text + ", " +
               (options_.communicator ? "rank " + std::to_string(share.rank) + " of " + std::to_string(share.ranks)
                                      : std::to_string(share.ranks) + " ranks") +
               ", sums " + transport_.why;
    }

    bool step(const Batch& batch, const std::atomic<bool>* cancel) override {
        const UseGpu use(lanes_[0]->gpu.index);
        cancel_ = cancel, stopped_ = false;
        on_the_way_ = 0;
        wait_all("step");                        // the tables may still be on their way to the last one
        if (std::exchange(unfinished_, true)) {  // an error in the last step: parts may be where they were not joined
            each([&](CudaRank& r) { r.empty_slots(0, 3); });
            wait_all("step");
            exchanges_ = 0, slot_rows_ = 0;
        }
        std::unique_lock turn(*turn_, std::defer_lock);
        if (lanes_.size() > 1) turn.lock();
        const int n = batch.size(), wanted = fill_tables(batch);
        // a graph has a row for each, whether or not it is wanted
        Tensor logits = ranks_[0]->reserve_logits(n <= matvec_rows ? n : wanted);
        logits.columns = split_logits() ? ranks_[0]->weights().output.rows : model_.config().vocab_size;
        if (transport_.kind == Transport::Kind::nccl) agree();
        const Buffers& b = ranks_[0]->buffers();
        const Activations activations{b.x, b.query, b.mixed, b.hidden, logits};
        const auto pass = [&] {
            index_ = 0, ends_.clear();
            end({});
            forward(*this, weights(), activations, batch);
        };
        const std::size_t i = n - 1;
        if (n <= matvec_rows && use_graphs_ && lanes_[0]->graphs[i].value) {
            if (!stop()) {
                for (const auto& lane : lanes_)
                    on(*lane, [&] { LLAMA3_CHECK("step", cudaGraphLaunch(lane->graphs[i].value, lane->stream.value)); });
                exchanges_ = (exchanges_ + 2 * model_.config().n_layers) % 3;
            }
        } else {
            pass();  // loads the kernels, which a capture must not do
            exchanges_ = (exchanges_ + index_) % 3;
            if (n <= matvec_rows && use_graphs_ && !stop()) capture(i, pass);
        }
        if (transport_.kind == Transport::Kind::peers) meet();  // the first has all logits then
        if (turn.owns_lock()) turn.unlock();
        // The work of few rows goes on while the host comes back for logits or a token; a prompt is waited for here.
        if (n > matvec_rows || options_.time_stages || stop()) wait_all("step of " + std::to_string(n) + " tokens");
        add_times();
        device_logits_ = logits, on_the_way_ = wanted, unfinished_ = false;
        return !stop();
    }
    int draw(int i, const Sampling& s, std::uint64_t random) override {
        if (split_logits()) return -1;
        const UseGpu use(lanes_[0]->gpu.index);
        const Buffers& b = ranks_[0]->buffers();
        const cudaStream_t stream = ranks_[0]->stream();
        DrawEntry& entry = *drawn_.as<DrawEntry>();
        entry = {s.temperature, s.top_p, s.min_p, s.top_k, i, -1, static_cast<double>(random >> 11) * 0x1p-53};
        copy_async(b.draw, &entry, sizeof entry, cudaMemcpyHostToDevice, stream, "sampling");
        launch("sampling", draw_token, 1, sample_threads, sample_shared_bytes, stream, device_logits_.data,
               device_logits_.stride, device_logits_.columns, b.draw);
        copy_async(&entry, b.draw, sizeof entry, cudaMemcpyDeviceToHost, stream, "sampling");
        wait(*lanes_[0], "step and sampling");
        return entry.token;
    }

    StageTimes stage_times() const override { return times_; }

    // ── The stages ──

    void embed(Tensor x, const Matrix& table, const Batch&) override {
        run(Stage::embed, [&](CudaRank& r) { r.embed(own(r, x, &Buffers::x), leads(r) ? table : r.weights().embedding); });
    }
    void project_qkv(Tensor query, Tensor x, const Layer& layer, const Batch&) override {
        run(Stage::project_qkv,
            [&](CudaRank& r) { r.project_qkv(own(r, query, &Buffers::query), own(r, x, &Buffers::x), own(r, layer)); });
    }
    void attend(Tensor mixed, Tensor query, const Layer& layer, const Batch& batch) override {
        run(Stage::attend, [&](CudaRank& r) {
            r.attend(own(r, mixed, &Buffers::mixed), own(r, query, &Buffers::query), own(r, layer), batch);
        });
    }
    void project_out(Tensor x, Tensor mixed, const Layer& layer) override {
        add_product(Stage::project_out, x, layer, &Layer::attention_out, mixed, &Buffers::mixed);
    }
    void gate_up(Tensor hidden, Tensor x, const Layer& layer) override {
        run(Stage::gate_up,
            [&](CudaRank& r) { r.gate_up(own(r, hidden, &Buffers::hidden), own(r, x, &Buffers::x), own(r, layer)); });
    }
    void down(Tensor x, Tensor hidden, const Layer& layer) override {
        add_product(Stage::down, x, layer, &Layer::down, hidden, &Buffers::hidden);
    }
    // Every rank of this process has some columns of the first one's rows.
    void logits(Tensor logits, Tensor x, const Weights& weights, const Batch&) override {
        run(Stage::logits, [&](CudaRank& r) {
            Tensor part = logits;
            if (!leads(r)) part.data += detail::border(model_.config().vocab_size, panel_rows, r.share().rank, r.share().ranks);
            if (logits.rows > 0) r.logits(part, own(r, x, &Buffers::x), leads(r) ? weights : r.weights());
        });
    }

    // The table of the batch's rows, and of those that want logits, on the way to the ranks. Returns how many do.
    int fill_tables(const Batch& batch) {
        const int n = batch.size();
        if (n > max_rows_)
            fail(Code::argument, "CUDA, step: too many rows (found " + std::to_string(n) + ", expected at most " +
                                     std::to_string(max_rows_) + "). Split the batch.");
        int wanted = 0, capacity = 1;
        for (const Row& row : batch.rows) capacity = std::max(capacity, row.cache->capacity());
        bool moved = false;
        std::size_t part = 0;
        each([&](CudaRank& r) {
            moved = r.reserve_splits(capacity) || moved;
            wanted = r.fill_tables(batch, part++, exchanges_);
        });
        if (transport_.kind == Transport::Kind::peers && n <= matvec_rows) {
            // The last exchange is still in its set, which the first one of this step empties for its own rows only.
            if (n < slot_rows_) each([&](CudaRank& r) { r.empty_slots((exchanges_ + 2) % 3, 1); });
            slot_rows_ = n;
        }
        for (std::size_t i = 0; moved && i < lanes_.size(); ++i)
            for (Graph& graph : lanes_[i]->graphs) graph.reset();  // they hold the old addresses
        return wanted;
    }

    const Weights& weights() const { return ranks_[0]->weights(); }
    const CudaRank& rank(std::size_t i) const { return *ranks_[i]; }

private:
    static constexpr int staged_rows = 64;  // that are summed at a time

    template <class F>
    static void on(const Lane& lane, const F& f) {
        const UseGpu use(lane.gpu.index);
        f();
    }
    template <class F>
    void each(const F& f) {
        for (const auto& rank : ranks_) on(rank->lane(), [&] { f(*rank); });
    }
    // What a stage is given belongs to the first rank; the others have their own.
    bool leads(const CudaRank& r) const { return &r == ranks_[0].get(); }
    Tensor own(const CudaRank& r, Tensor given, Tensor Buffers::*tensor) const {
        return leads(r) ? given : r.buffers().*tensor;
    }
    const Layer& own(const CudaRank& r, const Layer& layer) const { return leads(r) ? layer : r.weights().layers[layer.index]; }
    template <class F>
    void run(Stage stage, const F& f) {
        if (stop()) return;
        each(f);
        end(stage);
    }
    bool split_logits() const { return options_.communicator && ranks_[0]->share().ranks > 1; }

    // Whether the step ends early. One thread decides for all its ranks; where others are elsewhere, they agree in the sums.
    bool stop() {
        if (!split_logits()) stopped_ = stopped_ || wish();
        return stopped_;
    }
    bool wish() const { return cancel_ && cancel_->load(std::memory_order_relaxed); }
    void agree() {
        float wishes = wish();
        options_.communicator->all_reduce_sum({&wishes, 1});
        stopped_ = wishes > 0;
    }

    void wait(const Lane& lane, const std::string& where) const {
        if (nccl_) nccl_->wait(lane.stream.value, where);
        else lane.stream.wait(where);
    }
    void wait_all(const std::string& where) const {
        for (const auto& lane : lanes_) wait(*lane, where);
    }
    // Every lane waits for what all have been given so far, by way of the first.
    void meet() {
        const auto wait_for = [](const Lane& lane, const Lane& other) {
            on(other, [&] { other.event.record(other.stream); });
            on(lane, [&] { LLAMA3_CHECK("ranks", cudaStreamWaitEvent(lane.stream.value, other.event.value, 0)); });
        };
        for (std::size_t l = 1; l < lanes_.size(); ++l) wait_for(*lanes_[0], *lanes_[l]);
        for (std::size_t l = 1; l < lanes_.size(); ++l) wait_for(*lanes_[l], *lanes_[0]);
    }

    // Options::time_stages: an event at the end of every stage, on the first GPU. A stage lasts from the end of the one before it.
    struct End {
        std::optional<Stage> stage;  // none: the step's beginning
        Event event{cudaEventDefault};
    };
    void end(std::optional<Stage> stage) {
        if (!options_.time_stages) return;
        ends_.emplace_back().stage = stage;
        ends_.back().event.record(lanes_[0]->stream);
    }
    void add_times() {
        for (std::size_t i = 1; i < ends_.size(); ++i) {
            float milliseconds = 0;
            LLAMA3_CHECK("step", cudaEventElapsedTime(&milliseconds, ends_[i - 1].event.value, ends_[i].event.value));
            times_[static_cast<std::size_t>(*ends_[i].stage)] += 1e-3 * static_cast<double>(milliseconds);
        }
    }

    // x += Σ over ranks of W input
    void add_product(Stage which, Tensor x, const Layer& layer, Matrix Layer::*w, Tensor input, Tensor Buffers::*own_input) {
        if (stop()) return;
        const char* stage = stage_names[static_cast<std::size_t>(which)];
        const int n = n_tokens();
        const bool one_shot = transport_.kind == Transport::Kind::peers && n <= matvec_rows;
        Partials parts{{}, static_cast<int>(ranks_.size())};
        Slots all{{}, 0, parts.ranks, ranks_[0]->buffers().partial.stride, nullptr, index_};
        for (std::size_t i = 0; i < ranks_.size(); ++i)
            parts.of[i] = ranks_[i]->buffers().partial.data, all.of[i] = ranks_[i]->buffers().slots;
        const auto slots = [&](const CudaRank& r) {
            Slots own = all;
            own.rank = r.share().rank, own.table = r.buffers().rows;
            return own;
        };
        each([&](CudaRank& r) {
            const Slots to = slots(r);
            r.product(stage, own(r, x, &Buffers::x), own(r, layer).*w, own(r, input, own_input), one_shot ? &to : nullptr);
        });
        end(which);
        if (transport_.kind == Transport::Kind::none) return;
        if (one_shot) {
            each([&](CudaRank& r) { r.join(stage, own(r, x, &Buffers::x), slots(r)); });
            ++index_;
        } else if (transport_.kind == Transport::Kind::peers) {
            const int rows = div_up(n, parts.ranks);  // of a rank
            meet();
            each([&](CudaRank& r) {
                const int first = r.share().rank * rows;
                Partials own_rows = parts;
                for (int i = 0; i < parts.ranks; ++i) own_rows.of[i] += first * all.stride;
                r.sum(stage, first, std::min(rows, n - first), own_rows);
            });
            meet();
            each([&](CudaRank& r) { r.add(stage, own(r, x, &Buffers::x), parts, rows); });
            meet();  // before the parts are overwritten
        } else {
            if (transport_.kind == Transport::Kind::staged) sum_on_host(n);
            else gather_parts(stage, n);
            if (!stopped_) ranks_[0]->add(stage, x, parts, n);
        }
        end(Stage::communicate);
    }
    int n_tokens() const { return ranks_[0]->n_tokens(); }

    // This rank's part becomes the sum, some rows at a time: on the host,
    void sum_on_host(int n) {
        const Tensor part = ranks_[0]->buffers().partial;
        float* const sum = staging_.as<float>();
        for (int first = 0; first < n && !stopped_; first += staged_rows) {
            const std::size_t count = std::min(staged_rows, n - first) * part.stride, bytes = count * sizeof(float);
            copy_async(sum, part.row(first), bytes, cudaMemcpyDeviceToHost, ranks_[0]->stream(), "sums over ranks");
            wait_all("sums over ranks");
            sum[count] = wish();  // travels with the sum
            options_.communicator->all_reduce_sum({sum, count + 1});
            stopped_ = sum[count] > 0;
            copy_async(part.row(first), sum, bytes, cudaMemcpyHostToDevice, ranks_[0]->stream(), "sums over ranks");
        }
    }
    // or by NCCL, as many as the slots, which nothing else is in, have room for.
    void gather_parts(const char* stage, int n) {
        if (n > matvec_rows) agree();
        const Buffers& b = ranks_[0]->buffers();
        constexpr int room = 3 * Slots::rows;
        for (int first = 0; first < n && !stopped_; first += room) {
            const int rows = std::min(room, n - first);
            const std::size_t count = rows * b.partial.stride;
            nccl_->all_gather(stage, b.partial.row(first), b.slots, count, ranks_[0]->stream());
            Partials parts{{}, ranks_[0]->share().ranks};
            for (int r = 0; r < parts.ranks; ++r) parts.of[r] = b.slots + r * count;
            ranks_[0]->sum(stage, first, rows, parts);
        }
    }

    // One graph on each GPU, since each has a stream of its own in which nothing waits for another one's work but kernels.
    void capture(std::size_t i, const std::function<void()>& pass) {
        std::deque<Capture> captures;
        for (const auto& lane : lanes_) captures.emplace_back(lane->stream);
        pass();
        for (Capture& c : captures) c.end();
        std::vector<Graph> graphs(lanes_.size());
        for (std::size_t l = 0; l < lanes_.size(); ++l)
            on(*lanes_[l], [&] {
                LLAMA3_CHECK("step", cudaGraphInstantiate(&graphs[l].value, captures[l].value, 0));
                // now, not while kernels of other GPUs wait for it
                LLAMA3_CHECK("step", cudaGraphUpload(graphs[l].value, lanes_[l]->stream.value));
            });
        if (stop()) return;
        for (std::size_t l = 0; l < lanes_.size(); ++l) std::swap(lanes_[l]->graphs[i].value, graphs[l].value);
    }

    // All GPUs get the work of sessions in the same order, and memory is freed, which waits for a GPU, in between: the ranks of a
    // sum wait for each other while they occupy the GPUs.
    std::shared_ptr<std::mutex> turn_;
    Model model_;
    Options options_;
    Transport transport_;
    std::shared_ptr<Nccl> nccl_;
    bool use_graphs_, stopped_ = false;
    int max_rows_;
    std::vector<std::unique_ptr<Lane>> lanes_;
    std::vector<std::unique_ptr<CudaRank>> ranks_;
    mutable Memory host_logits_;  // pinned: [rows that wanted them, V rounded up]
    Memory staging_;              // pinned: [staged_rows, D], and the wish to stop
    Memory drawn_{Memory::Kind::pinned, sizeof(DrawEntry), "token"};
    Tensor device_logits_;                // of the last step
    mutable int on_the_way_ = 0;          // rows of them that the host has not got
    unsigned exchanges_ = 0, index_ = 0;  // sums through the slots: before this step, modulo 3, and in it
    int slot_rows_ = 0;                   // of the last of them, or more
    bool unfinished_ = false;             // the last step ended with an error
    std::deque<End> ends_;                // of the stages of the last step, where they are timed
    StageTimes times_{};
    const std::atomic<bool>* cancel_ = nullptr;
};

// ═══ K14  The device ═══════════════════════════════════════════════════════════════════════════════════════════════════════════

class CudaDevice final : public Device {
public:
    CudaDevice(const std::vector<int>& gpus, Progress progress) : progress_(std::move(progress)) {
        int driver = 0, runtime = 0, count = 0;
        LLAMA3_CHECK("driver", cudaDriverGetVersion(&driver));
        LLAMA3_CHECK("runtime", cudaRuntimeGetVersion(&runtime));
        const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
        if (driver / 1000 < runtime / 1000)  // within a major version drivers are compatible
            fail(Code::device, driver == 0 ? "CUDA, driver: there is none (found no NVIDIA driver, expected one for CUDA " +
                                                 version(runtime) + "). Install it, or use the CPU."
                                           : "CUDA, driver: too old (found one for CUDA " + version(driver) + ", expected " +
                                                 version(runtime) + "). " + advice(cudaErrorInsufficientDriver));
        LLAMA3_CHECK("devices", cudaGetDeviceCount(&count));
        if (gpus.empty() || gpus.size() > most_ranks)
            fail(Code::argument, "cuda: the number of GPUs is out of range (found " + std::to_string(gpus.size()) +
                                     ", expected 1 to " + std::to_string(most_ranks) + "). Name them, as in cuda:0,1.");
        for (const int index : gpus) gpus_.push_back(look_at(index, count));
    }

    std::unique_ptr<Backend> open(const Model& model, const Options& given) override {
        const Config& c = model.config();
        Options options = given;
        if (options.ranks == 1) options.communicator = nullptr;
        const bool alone = !options.communicator;  // in one process
        if (options.kv != Format::bf16 && options.kv != Format::q8)
            fail(Code::argument, std::string("CUDA: a key/value cache in this format is not supported (found ") +
                                     format_name(options.kv) + ", expected bf16 or q8). Leave --kv out, or use the CPU.");
        if (c.head_dim != 64 && c.head_dim != 128)
            fail(Code::argument, "CUDA: heads of this width are not supported (found " + std::to_string(c.head_dim) +
                                     ", expected 64 or 128). Use the CPU.");
        std::vector<Share> shares;
        for (int r = 0; r < (alone ? options.ranks : 1); ++r)
            shares.push_back(share_of(c, model.weights(), alone ? r : options.communicator->rank(), options.ranks));
        if ((alone || with_nccl) && options.ranks > most_ranks)
            fail(Code::argument, "Options::ranks: too many for GPUs (found " + std::to_string(options.ranks) +
                                     ", expected at most " + std::to_string(most_ranks) + "). Use fewer.");
        // Ranks that do not reach each other's memory become threads that meet on the host.
        std::unique_lock lock(*turn_);
        const std::string why_not = veto(options.ranks, alone);
        if (alone && options.ranks > 1 && !why_not.empty()) {
            lock.unlock();  // its ranks come here
            return detail::open_in_process(*this, model, options);
        }
        const UseGpu use(gpu_of(shares[0]).index);
        std::vector<CudaBackend::Place> places;
        std::map<int, std::uint64_t> needed;
        std::uint64_t done = 0, total = 0;  // of the weights that are not there yet
        for (const Share& share : shares) {
            const Gpu& gpu = gpu_of(share);
            check_widths(gpu, share.weights);
            places.push_back({gpu, known(model, share).lock()});
            const std::uint64_t bytes = places.back().weights ? 0 : DeviceWeights::bytes_of(share);
            total += bytes;
            needed[gpu.index] += bytes + cache_bytes(share.config, options) + activations_bytes(share.config, options);
        }
        for (const CudaBackend::Place& place : places) {
            const UseGpu own(place.gpu.index);
            check_free(place.gpu, "the model", needed[place.gpu.index]);
        }
        for (std::size_t i = 0; i < shares.size(); ++i) {
            auto& [gpu, weights] = places[i];
            if (weights) continue;
            const UseGpu own(gpu.index);
            const Progress progress = [&](std::uint64_t n, std::uint64_t) { progress_(done + n, total); };
            weights = std::make_shared<const DeviceWeights>(model, shares[i], gpu, progress_ ? progress : Progress());
            known(model, shares[i]) = weights, done += DeviceWeights::bytes_of(shares[i]);
        }
        std::shared_ptr<Nccl> nccl;
        Transport transport = transport_of(options, why_not);
        if (transport.kind == Transport::Kind::nccl && !(nccl = nccl_.lock()))
            nccl_ = nccl = std::make_shared<Nccl>(*options.communicator);
        return std::make_unique<CudaBackend>(places, model, options, std::move(transport), std::move(nccl), turn_,
                                             rows_of(options));
    }
    std::uint64_t cache_bytes(const Config& config, const Options& options) const override {
        return cache_shape(config, options.kv).bytes(options.context);
    }
    std::uint64_t activations_bytes(const Config& config, const Options& options) const override {
        return Buffers::bytes(config, options.ranks, rows_of(options)) + split_bytes(config, splits_of(options.context));
    }
    std::uint64_t memory_bytes() const override { return gpus_[0].memory_bytes; }
    int ranks() const override { return gpus_.size(); }
    const Gpu& gpu() const { return gpus_[0]; }

private:
    static Gpu look_at(int index, int count) {
        if (index < 0 || index >= count)
            fail(Code::device, "cuda:" + std::to_string(index) + ": there is no such GPU (found " + std::to_string(count) +
                                   " of them, expected more than " + std::to_string(index) + "). " +
                                   advice(cudaErrorInvalidDevice));
        Gpu gpu;
        gpu.index = index;
        cudaDeviceProp properties{};
        LLAMA3_CHECK(gpu.text(), cudaGetDeviceProperties(&properties, index));
        gpu.name = properties.name, gpu.major = properties.major, gpu.minor = properties.minor;
        gpu.memory_bytes = properties.totalGlobalMem;
        gpu.multiprocessors = std::max(1, properties.multiProcessorCount);
        gpu.shared_bytes = std::max<std::size_t>(gpu.shared_bytes, properties.sharedMemPerBlockOptin);
        const std::string version = "sm_" + std::to_string(gpu.major) + std::to_string(gpu.minor);
        if (gpu.major * 10 + gpu.minor < 75)
            fail(Code::device, gpu.text() + ": too old (found " + version + ", expected sm_75 or later). Use the CPU.");
        const UseGpu use(index);
        cudaFuncAttributes attributes{};
        LLAMA3_CHECK(gpu.text() + ", " + version, cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(pack_rows)));
        gpu.tensor_cores = gpu.major >= 8 && attributes.ptxVersion >= 80;
        return gpu;
    }
    const Gpu& gpu_of(const Share& share) const { return gpus_[share.rank % gpus_.size()]; }
    // The most rows of a step: without bf16 tensor cores no prompts but those of matrix x vector.
    int rows_of(const Options& options) const {
        const bool prompts = std::ranges::all_of(gpus_, &Gpu::tensor_cores);  // see flash_attention
        return std::max(matvec_rows,
                        prompts ? std::min({options.chunk, options.context, 16384}) : 0);  // a grid's y has 16 bits
    }
    std::weak_ptr<const DeviceWeights>& known(const Model& model, const Share& share) {
        return weights_[{&model.impl(), share.rank, share.ranks}];
    }

    // A row of activations must have room in shared memory.
    static void check_widths(const Gpu& gpu, const Weights& weights) {
        const auto check_matrix = [&](const char* name, const Matrix& w) {
            with_format(w.format, [&]<class W>(W) {
                const std::size_t needed = matvec_shared_bytes<W, 1>(w.units());
                if (needed > gpu.shared_bytes)
                    fail(Code::device, gpu.text() + ": tensor " + name + " is too wide for its shared memory (found " +
                                           std::to_string(gpu.shared_bytes) + " bytes, expected " + std::to_string(needed) +
                                           "). Convert the model to bf16, q8 or q4, or use another GPU.");
            });
        };
        for (const Layer& layer : weights.layers) {
            check_matrix("query", layer.query), check_matrix("attention_out", layer.attention_out);
            check_matrix("gate", layer.gate), check_matrix("down", layer.down);
        }
        check_matrix("output", weights.output);
    }

    // Whether two ranks have the same GPU, with which NCCL cannot work.
    bool shared_gpu(Communicator& communicator) const {
        const Gpu& gpu = gpus_[communicator.rank() % gpus_.size()];
        cudaDeviceProp properties{};
        LLAMA3_CHECK(gpu.text(), cudaGetDeviceProperties(&properties, gpu.index));
        std::uint16_t words[sizeof properties.uuid.bytes / 2];  // which floats hold exactly
        std::memcpy(words, properties.uuid.bytes, sizeof words);
        std::vector<float> all(std::size(words) * communicator.ranks());
        std::ranges::copy(words, all.begin() + std::size(words) * communicator.rank());
        communicator.all_reduce_sum(all);
        std::set<std::vector<float>> different;
        for (auto at = all.begin(); at != all.end(); at += std::size(words)) different.emplace(at, at + std::size(words));
        return static_cast<int>(different.size()) < communicator.ranks();
    }
    Transport transport_of(const Options& options, const std::string& why_not) const {
        using Kind = Transport::Kind;
        const std::size_t n = std::min<std::size_t>(gpus_.size(), options.ranks);
        if (options.ranks == 1) return {};
        if (options.communicator) {
            const std::string why = !why_not.empty()                    ? why_not
                                    : shared_gpu(*options.communicator) ? "ranks share a GPU"
                                    : !with_nccl                        ? "NCCL is not compiled in"
                                                                        : "";
            return why.empty() ? Transport{Kind::nccl, "by NCCL"} : Transport{Kind::staged, "through the host, because " + why};
        }
        return {Kind::peers, n == 1 ? "in the memory of one GPU"
                                    : "pushed between " + std::to_string(n) + " GPUs that reach each other's memory"};
    }
    // Why some two of the GPUs of so many ranks cannot work together, or nothing. An error of a test is no verdict.
    std::string veto(int ranks, bool test) {
        const std::span used(gpus_.data(), std::min<std::size_t>(ranks, gpus_.size()));
        for (const Gpu& from : used)
            for (const Gpu& to : used) {
                auto known = vetoes_.find({from.index, to.index});
                if (from.index == to.index || (known == vetoes_.end() && !test)) continue;
                if (known == vetoes_.end()) known = vetoes_.emplace(std::pair(from.index, to.index), veto_of(from, to)).first;
                if (!known->second.empty()) return known->second;
            }
        return "";
    }
    // Why a GPU cannot use the memory of another, or nothing. That the driver allows it is not enough: on some machines what is
    // stored there gets lost.
    static std::string veto_of(const Gpu& from, const Gpu& to) {
        const std::string pair = from.text() + " and " + to.text();
        int can = 0;
        LLAMA3_CHECK(pair, cudaDeviceCanAccessPeer(&can, from.index, to.index));
        if (!can) return from.text() + " cannot reach the memory of " + to.text();
        const UseGpu use(from.index);
        const cudaError_t error = cudaDeviceEnablePeerAccess(to.index, 0);
        if (error != cudaSuccess) cudaGetLastError();
        if (error != cudaSuccess && error != cudaErrorPeerAccessAlreadyEnabled)
            return from.text() + " is not given access to " + to.text() + " (" + cudaGetErrorName(error) + ")";

        constexpr unsigned blocks = 16, n = blocks * join_threads * 4, seed = 1000000;
        std::vector<float> sent(n), found(n);
        for (unsigned i = 0; i < n; ++i) sent[i] = i;
        const Memory copy(Memory::Kind::device, n * sizeof(float), "test of " + pair);
        const auto there = [&] {
            const UseGpu other(to.index);
            return Memory(Memory::Kind::device, 2 * n * sizeof(float), "test of " + pair);
        }();
        float* const source = there.as<float>();
        LLAMA3_CHECK(pair, cudaMemcpy(source, sent.data(), n * sizeof(float), cudaMemcpyHostToDevice));
        LLAMA3_CHECK(pair, cudaDeviceSynchronize());
        launch("test of peers", probe_peer, blocks, join_threads, 0, cudaStream_t{}, source + n, source, copy.as<float>(),
               seed);
        LLAMA3_CHECK(pair, cudaDeviceSynchronize());
        LLAMA3_CHECK(pair, cudaMemcpy(found.data(), copy.data(), n * sizeof(float), cudaMemcpyDeviceToHost));
        if (found != sent) return from.text() + " loads something else from " + to.text() + " than is there";
        for (float& x : sent) x += seed;
        LLAMA3_CHECK(pair, cudaMemcpy(found.data(), source + n, n * sizeof(float), cudaMemcpyDeviceToHost));
        return found == sent ? "" : "what " + from.text() + " stores in " + to.text() + " does not arrive";
    }

    std::vector<Gpu> gpus_;  // rank r is on number r % size
    Progress progress_;
    const std::shared_ptr<std::mutex> turn_ = std::make_shared<std::mutex>();                         // of its back ends, too
    std::map<std::tuple<const Model::Impl*, int, int>, std::weak_ptr<const DeviceWeights>> weights_;  // for all sessions
    std::map<std::pair<int, int>, std::string> vetoes_;                                               // of pairs of GPUs
    std::weak_ptr<Nccl> nccl_;
};

}  // namespace gpu

std::shared_ptr<Device> cuda(const std::vector<int>& gpus, const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
    return std::make_shared<gpu::CudaDevice>(gpus, progress);
}

}  // namespace llama3

#undef LLAMA3_CHECK
#endif  // LLAMA3_KERNELS_CUH
