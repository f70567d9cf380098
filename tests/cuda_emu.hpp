// Runs CUDA C++ on the processor: kernels.cuh compiles against this file as ordinary C++20, with g++ or clang, and every kernel,
// launch, stream and graph of the CUDA back end runs in a unit test, under AddressSanitizer if wanted, without a GPU.
//
//   §1  Settings and faults     the order of threads, what is checked, how an error is reported
//   §2  CUDA's names            qualifiers, vector types, bf16 and half, arithmetic
//   §3  Memory                  device memory the host cannot touch, with guard pages; pinned memory
//   §4  Fibers and blocks       one fiber per CUDA thread; barriers; what happens when threads disagree
//   §5  Shared memory           pointers that check bounds, alignment and races
//   §6  Warps and tensor cores  shuffles, votes, cp.async, mma, ldmatrix
//   §7  The runtime             launches, streams, events, graphs, copies, devices
//   §8  cuBLASLt                a matrix product as plain loops
//
// What it is after is a wrong kernel, not a fast one. A block's threads run one at a time, each up to its next rendezvous, in an
// order that the test chooses; blocks run one after the other, or, in a cooperative launch, in turns. A kernel that waits for what
// another device stores gives the streams of the others a turn. A missing barrier therefore changes the result in some order, and
// the race check finds it in every order. A fault is thrown on the host, as cuda_emu::Fault, by the call that ran the kernel.
// It cannot see what only hardware has: missing memory fences, blocks that run at the same moment, spills, speed.
#ifndef LLAMA3_CUDA_EMU_HPP
#define LLAMA3_CUDA_EMU_HPP

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// Elsewhere, or with LLAMA3_EMU_UCONTEXT, threads are switched by the C library, whose system calls cost ten times as much.
#if defined(__x86_64__) && !defined(LLAMA3_EMU_UCONTEXT)
#define LLAMA3_EMU_ASSEMBLY 1
#endif
#if defined(__SANITIZE_ADDRESS__)
#define LLAMA3_EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LLAMA3_EMU_ASAN 1
#endif
#endif
// What runs at every access and every switch is left alone by sanitizers: they are to look at kernels, and took most of the time here.
// It calls little that is instrumented, since that would not be inlined.
#define LLAMA3_EMU_BARE __attribute__((no_sanitize("address", "undefined")))
#define LLAMA3_EMU_INLINE __attribute__((always_inline))
#ifdef LLAMA3_EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ═══ §1  Settings and faults ══════════════════════════════════════════════════════════════════════════════════════════════

namespace cuda_emu {

// What the emulator found wrong: the kernel, its block and thread, and the lines of source concerned.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Order { forward, reverse, random };

inline Order order_from_environment() {
    const char* const text = std::getenv("LLAMA3_EMU_ORDER");
    const std::string name = text ? text : "forward";
    if (name == "forward") return Order::forward;
    if (name == "reverse") return Order::reverse;
    if (name == "random") return Order::random;
    std::fprintf(stderr, "LLAMA3_EMU_ORDER: no such order (found %s, expected forward, reverse or random).\n", text);
    std::exit(2);
}

inline Order order = order_from_environment();  // of the threads of a block, and of the blocks of a grid
inline std::uint64_t seed = 1;                  // of Order::random; every launch goes on from the last one's state
inline bool check_races = true;                 // on shared memory
inline bool shuffles_order_memory = true;  // false: only __syncwarp orders accesses within a warp, as CUDA promises no more
inline bool lazy_streams = false;  // true: work on a stream waits until the host synchronises, so a missing wait is seen
inline bool guard_front = false;   // true: a guard page right before each allocation; false: right behind it
// The host's accesses to device memory fault. Without protection keys it costs two system calls per allocation and launch, and
// there false leaves them out.
inline bool protect_memory = true;
inline int device_count = 1;
inline bool peers_possible = true;               // false: no device can be given access to the memory of another
inline bool too_many_peers = false;              // true: no device is given access to the memory of one more
inline std::pair<int, int> broken_peer{-1, -1};  // what kernels on the first store in the memory of the second is lost

// What every emulated device says it is. Few multiprocessors, so that a grid made for them is small.
struct Device {
    int major = 8, minor = 0, multiProcessorCount = 4, sharedMemPerBlockOptin = 163 * 1024;
    std::size_t memory = std::size_t{1} << 32;  // cudaMalloc fails beyond
    int driver = 13000;
    bool has_kernels = true;  // false: compiled for other devices
    int ptx = 0;              // version of what was compiled; 0: the device's own
    const char* name = "emulated device";
};
inline Device device;

// A place in the source, as the default argument of a primitive: the line that called it.
struct Site {
    const char* file;
    int line;
    LLAMA3_EMU_INLINE constexpr Site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
    LLAMA3_EMU_BARE bool operator==(const Site& other) const {
        return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
    }
    std::string text() const {
        const char* const slash = std::strrchr(file, '/');
        return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
    }
};

// Ends the kernel and throws a Fault from the launch; outside kernels throws it at once. The text is that of the pieces one after
// the other. Kernels are left by a switch of stacks and not by an exception, so that a noexcept function in between does not end
// the program; for the same reason the pieces own no memory.
template <class... Piece>
[[noreturn]] void fail(const Piece&... pieces);

}  // namespace cuda_emu

// ═══ §2  CUDA's names ═════════════════════════════════════════════════════════════════════════════════════════════════════

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUDART_VERSION 13000
#define CUDART_INF_F __builtin_inff()

// clang-format off
struct alignas(2) char2 { signed char x, y; };
struct alignas(4) char4 { signed char x, y, z, w; };
struct alignas(2) uchar2 { unsigned char x, y; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(4) short2 { short x, y; };
struct alignas(8) short4 { short x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct int3 { int x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline char4 make_char4(signed char x, signed char y, signed char z, signed char w) { return {x, y, z, w}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
// clang-format on

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// What a kernel writes plainly, min(a, b), is overloaded by CUDA for mixed types in this way.
// clang-format off
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return float(1 / std::sqrt(double(a))); }
inline float __saturatef(float a) { return std::fmin(std::fmax(a, 0.f), 1.f); }
inline unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
inline int __float_as_int(float a) { return std::bit_cast<int>(a); }
inline float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }
inline float __int_as_float(int a) { return std::bit_cast<float>(a); }
inline int __float2int_rn(float a) { return int(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return int(a); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
inline int __popc(unsigned a) { return std::popcount(a); }
inline int __popcll(unsigned long long a) { return std::popcount(a); }
inline int __clz(int a) { return std::countl_zero(unsigned(a)); }
inline int __clzll(long long a) { return std::countl_zero(static_cast<unsigned long long>(a)); }
inline int __ffs(int a) { return a ? std::countr_zero(unsigned(a)) + 1 : 0; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) { return unsigned((std::uint64_t{high} << 32 | low) >> (n & 31)); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) { return unsigned((std::uint64_t{high} << 32 | low) << (n & 31) >> 32); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
// clang-format on

// glibc declares functions of these names for itself, so they are macros here.
#define __expf(x) std::exp(float(x))
#define __exp10f(x) std::pow(10.f, float(x))
#define __logf(x) std::log(float(x))
#define __log2f(x) std::log2(float(x))
#define __powf(x, y) std::pow(float(x), float(y))
#define __sinf(x) std::sin(float(x))
#define __cosf(x) std::cos(float(x))
#define rsqrtf(x) __frsqrt_rn(x)

inline unsigned __brev(unsigned a) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
    return reversed;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const std::uint64_t bytes = std::uint64_t{y} << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> 4 * i & 15;
        unsigned byte = unsigned(bytes >> 8 * (pick & 7)) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
inline int __dp4a(int a, int b, int c) {
    unsigned sum = unsigned(c);  // the hardware wraps
    for (int i = 0; i < 32; i += 8) sum += unsigned(int(std::int8_t(a >> i)) * int(std::int8_t(b >> i)));
    return int(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
    return c;
}

namespace cuda_emu {

inline std::uint16_t bf16_bits(float value) {  // round to nearest even, as __float2bfloat16_rn
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bf16_value(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

inline std::uint16_t half_bits(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const auto sign = std::uint16_t(bits >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;                                         // beyond half of the last step
    if (size < 0x1p-14f) return sign | std::uint16_t(std::nearbyint(size * 0x1p24f));  // subnormal: multiples of 2^-24
    const std::uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);      // may carry into the exponent, rightly
    return sign | std::uint16_t((rounded >> 13) - (112 << 10));
}
inline float half_value(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction ? __builtin_nanf("") : __builtin_inff())
                       : exponent == 0 ? std::ldexp(float(fraction), -24)
                                       : std::ldexp(float(fraction + 1024), exponent - 25);
    return bits & 0x8000 ? -size : size;
}

}  // namespace cuda_emu

// Trivial types like CUDA's own, so that they can lie in unions and in arrays that nobody initialises.
struct __nv_bfloat16 {
    std::uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float value) : bits(cuda_emu::bf16_bits(value)) {}
    operator float() const { return cuda_emu::bf16_value(bits); }
};
struct __half {
    std::uint16_t bits;
    __half() = default;
    __half(float value) : bits(cuda_emu::half_bits(value)) {}
    operator float() const { return cuda_emu::half_value(bits); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;

// clang-format off
inline __nv_bfloat16 __float2bfloat16(float a) { return {a}; }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return {a}; }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline float __low2float(__nv_bfloat162 a) { return a.x; }
inline float __high2float(__nv_bfloat162 a) { return a.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return std::bit_cast<__nv_bfloat16>(a); }
inline __half __float2half(float a) { return {a}; }
inline __half __float2half_rn(float a) { return {a}; }
inline float __half2float(__half a) { return a; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
inline __half2 __float2half2_rn(float a) { return {a, a}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline __half __ushort_as_half(unsigned short a) { return std::bit_cast<__half>(a); }
inline __half2 __hadd2(__half2 a, __half2 b) { return {float(a.x) + float(b.x), float(a.y) + float(b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {float(a.x) * float(b.x), float(a.y) * float(b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {  // in double: one rounding, as the hardware's
    return {float(double(a.x) * double(b.x) + double(c.x)), float(double(a.y) * double(b.y) + double(c.y))};
}
// clang-format on

// ═══ §3  Memory ═══════════════════════════════════════════════════════════════════════════════════════════════════════════
// Device memory lies in an address range of its own that has no access rights while host code runs; kernels and copies open it.
// Each allocation ends at a page border (up to 16-byte alignment) with a page behind it that is never opened, and no address is
// used twice, so reading past the end or after cudaFree faults. New memory is filled with NaN: an unwritten output is seen.

namespace cuda_emu {

inline std::string hex(std::uintptr_t value) {
    char text[32];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

struct Allocation {
    std::uintptr_t start;
    std::size_t size;
    std::uintptr_t pages;  // where its pages begin, and how many bytes they are
    std::size_t page_bytes;
    int device;  // -1: pinned host memory
    int number;
};

struct Memory {
    static constexpr std::size_t range = std::size_t{1} << 38;  // addresses, not memory

    std::recursive_mutex mutex;  // the emulated machine does one thing at a time
    std::uintptr_t base = 0, next = 0;
    std::map<std::uintptr_t, Allocation> live;   // device and pinned, by start
    std::map<std::uintptr_t, Allocation> freed;  // device only, for the messages
    std::vector<std::size_t> used = std::vector<std::size_t>(64);
    int opened = 0, count = 0, changes = 0;
    // x86-64's protection key of device memory: a register says whether the thread may touch it. -1: there are none.
    const int key = pkey_alloc(0, PKEY_DISABLE_ACCESS);

    Memory() {
        void* const at = mmap(nullptr, range, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) {
            std::fprintf(stderr, "cuda_emu: cannot reserve addresses for device memory\n");
            std::abort();
        }
        base = next = reinterpret_cast<std::uintptr_t>(at);
    }

    bool on_device(const void* p) const { return reinterpret_cast<std::uintptr_t>(p) - base < range; }

    const Allocation* find(const void* p) const {
        const auto address = reinterpret_cast<std::uintptr_t>(p);
        auto it = live.upper_bound(address);
        if (it == live.begin()) return nullptr;
        --it;
        // One past the end is a fair pointer, but to nothing.
        return address - it->second.start <= it->second.size ? &it->second : nullptr;
    }

    // "12 bytes past the end of allocation 3 (4096 bytes, device 0)"
    std::string describe(std::uintptr_t address) const {
        const Allocation* nearest = nullptr;
        std::uintptr_t distance = 1 << 20;
        const char* state = "";
        const auto look = [&](const std::map<std::uintptr_t, Allocation>& all, const char* name) {
            for (const auto& [start, a] : all) {
                const std::uintptr_t away = address < start            ? start - address
                                            : address < start + a.size ? 0
                                                                       : address - (start + a.size) + 1;
                if (away < distance) distance = away, nearest = &a, state = name;
            }
        };
        look(live, "");
        look(freed, "freed ");
        if (!nearest) return hex(address) + (address - base < range ? ", in no device allocation" : ", not device memory");
        const Allocation& a = *nearest;
        const std::string where = address < a.start ? std::to_string(a.start - address) + " bytes before the start"
                                  : address < a.start + a.size
                                      ? "byte " + std::to_string(address - a.start)
                                      : std::to_string(address - a.start - a.size) + " bytes past the end";
        return hex(address) + ", " + where + " of " + state +
               (a.device < 0 ? "pinned host allocation " : "device allocation ") + std::to_string(a.number) + " (" +
               std::to_string(a.size) + " bytes" +
               (device_count > 1 && a.device >= 0 ? ", device " + std::to_string(a.device) : "") + ")";
    }

    void* allocate(std::size_t size, int device) {
        const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
        const std::size_t page_bytes = (size + page - 1) / page * page;
        if (page_bytes + 2 * page > base + range - next) return nullptr;
        next += page;
        Allocation a{next, size, next, page_bytes, device, ++count};
        next += page_bytes;
        if (!guard_front) a.start += (page_bytes - size) & ~std::size_t{15};
        void* const pages = reinterpret_cast<void*>(a.pages);
        if (pkey_mprotect(pages, page_bytes, PROT_READ | PROT_WRITE, key) != 0) return nullptr;
        std::memset(pages, 0xff, page_bytes);
#ifdef LLAMA3_EMU_ASAN
        // The guard page is found by its fault; the rest of the first and last page is what only AddressSanitizer can see.
        ASAN_POISON_MEMORY_REGION(pages, a.start - a.pages);
        ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(a.start + size), a.pages + page_bytes - a.start - size);
#endif
        live[a.start] = a, ++changes;
        used[std::size_t(device)] += size;
        return reinterpret_cast<void*>(a.start);
    }

    void release(const Allocation& found) {
        const Allocation a = found;
        void* const pages = reinterpret_cast<void*>(a.pages);
#ifdef LLAMA3_EMU_ASAN
        ASAN_UNPOISON_MEMORY_REGION(pages, a.page_bytes);
#endif
        const auto written = [](std::uintptr_t from, std::uintptr_t to) {
            const auto* const bytes = reinterpret_cast<const unsigned char*>(from);
            return std::any_of(bytes, bytes + (to - from), [](unsigned char byte) { return byte != 0xff; });
        };
        const bool stray = written(a.pages, a.start) || written(a.start + a.size, a.pages + a.page_bytes);
        madvise(pages, a.page_bytes, MADV_DONTNEED);
        mprotect(pages, a.page_bytes, PROT_NONE);
        live.erase(a.start), ++changes;
        freed[a.start] = a;
        used[std::size_t(a.device)] -= a.size;
        if (stray) fail("cudaFree: something was written next to device allocation ", a.number, " (", a.size, " bytes)");
    }

    void open(bool yes) {
        if (key >= 0) pkey_set(key, yes ? 0 : PKEY_DISABLE_ACCESS);
        if (key >= 0 || !protect_memory) return;
        for (const auto& [start, a] : live)
            if (a.device >= 0) mprotect(reinterpret_cast<void*>(a.pages), a.page_bytes, yes ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
};

inline Memory* const the_memory = new Memory;  // never destroyed: objects of static lifetime may free device memory after it
LLAMA3_EMU_INLINE inline Memory& memory() { return *the_memory; }

// While one of these lives, this program may touch device memory.
struct DeviceAccess {
    const std::lock_guard<std::recursive_mutex> lock{memory().mutex};
    DeviceAccess() {
        if (memory().opened++ == 0) memory().open(true);
    }
    ~DeviceAccess() {
        if (--memory().opened == 0) memory().open(false);
    }
    DeviceAccess(const DeviceAccess&) = delete;
    DeviceAccess& operator=(const DeviceAccess&) = delete;
};

// ═══ §4  Fibers and blocks ════════════════════════════════════════════════════════════════════════════════════════════════
// A thread runs until it must wait for others, then the next thread that can run does, by a direct switch of stacks. A thread that
// never waits needs no stack of its own: the next one begins on the same.

}  // namespace cuda_emu

#ifdef LLAMA3_EMU_ASSEMBLY
// Saves the registers a callee must keep on the old stack and its top in *save, and goes on from where the new one was left. In
// assembly at file scope, where the compiler can assume nothing about the registers it leaves alone.
extern "C" void llama3_emu_switch(void** save, void* load);
extern "C" void llama3_emu_resume(void* load);
asm(R"(
.pushsection .text
.weak llama3_emu_switch
.type llama3_emu_switch, @function
llama3_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rdi
    jmp llama3_emu_resume
.size llama3_emu_switch, .-llama3_emu_switch
.weak llama3_emu_resume
.type llama3_emu_resume, @function
llama3_emu_resume:
    movq %rdi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size llama3_emu_resume, .-llama3_emu_resume
.popsection
)");
#endif

namespace cuda_emu {

struct Fiber {
#ifdef LLAMA3_EMU_ASSEMBLY
    void* top = nullptr;  // of the stack, where the registers are
#else
    ucontext_t context;
#endif
    char* stack = nullptr;
    std::size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

#ifdef LLAMA3_EMU_ASAN
constexpr std::size_t stack_bytes = 256 * 1024;
#else
constexpr std::size_t stack_bytes = 128 * 1024;
#endif

void run_threads();  // what a fiber does

inline void prepare(Fiber& fiber, std::size_t number) {
#ifdef LLAMA3_EMU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, fiber.stack_bytes);
    fiber.fake_stack = nullptr;
#endif
    // Stacks that all begin at the same offset in a page would share a few lines of the first-level cache.
    const std::size_t stagger = number % 16 * 256;
#ifdef LLAMA3_EMU_ASSEMBLY
    void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - stagger);
    *--top = nullptr;  // where a debugger's backtrace ends
    *--top = reinterpret_cast<void*>(&run_threads);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.top = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = fiber.stack_bytes - stagger;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &run_threads, 0);
#endif
}

// `leaving` for good: the stack of `from` is not needed any more.
LLAMA3_EMU_BARE inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool leaving = false) {
#ifdef LLAMA3_EMU_ASAN
    __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
    asm volatile("" ::: "memory");
#ifdef LLAMA3_EMU_ASSEMBLY
    llama3_emu_switch(&from.top, to.top);
#else
    swapcontext(&from.context, &to.context);
#endif
    asm volatile("" ::: "memory");
#ifdef LLAMA3_EMU_ASAN
    __sanitizer_finish_switch_fiber(std::exchange(from.fake_stack, nullptr), nullptr, nullptr);
#endif
}

#ifdef LLAMA3_EMU_ASAN
// Frees what AddressSanitizer keeps for a fiber that will not go on, by pretending to switch to it and to leave it for good.
__attribute__((no_sanitize("address"))) inline void drop_fake_stack(Fiber& host, Fiber& fiber) {
    if (!fiber.fake_stack) return;
    __sanitizer_start_switch_fiber(&host.fake_stack, fiber.stack, fiber.stack_bytes);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
    __sanitizer_start_switch_fiber(nullptr, host.stack, host.stack_bytes);
    __sanitizer_finish_switch_fiber(host.fake_stack, nullptr, nullptr);
    host.fake_stack = fiber.fake_stack = nullptr;
}
#endif

struct Copy {  // a cp.async that has not happened yet
    std::size_t to;
    const void* from;
    unsigned group;
    Site site;
};

struct Thread {
    Fiber* fiber = nullptr;  // null: not begun
    uint3 index{};
    int number = 0, warp = 0, lane = 0;
    Site site{nullptr, 0};  // where it last met others
    unsigned group = 0;
    std::vector<Copy> copies;
};

struct Arrival {  // of a lane at a warp primitive
    const char* what;
    unsigned mask;
    int variant;  // of one primitive: the width of a shuffle
    Site site;
    void* payload;
};

struct Warp {
    int first = 0, size = 0;  // its threads
    unsigned ready = 0;       // lanes that can run
    unsigned waiting = 0;     // at a warp primitive
    unsigned at_barrier = 0;  // at __syncthreads
    unsigned done = 0;
    Arrival arrival[32];
    // The clock of the race check: it ticks when lanes synchronise. Lane t knows the accesses of lane u before tick known[t][u].
    std::uint32_t tick = 0, all_known = 0;
    bool partial = false;
    std::uint32_t known[32][32];
};

// One shared word, or one byte of it, in the present epoch (the time between two barriers of the block).
struct Record {
    struct Readers {
        std::uint32_t lanes, tick;
        int warp;
        Site site{nullptr, 0};
    };
    std::uint32_t epoch = 0, write_tick = 0;
    int writer = -1;
    bool atomic = false, by_bytes = false;
    Site write_site{nullptr, 0};
    Readers readers[2] = {};  // two warps are enough: a writer is in at most one of them
};

// A vector whose elements are reached without a call.
template <class T>
struct Elements {
    std::vector<T> owner;
    T* data = nullptr;
    std::size_t size = 0;

    void resize(std::size_t n) { owner.resize(n), data = owner.data(), size = n; }
    LLAMA3_EMU_INLINE T& operator[](int i) const { return data[i]; }
    LLAMA3_EMU_INLINE T& operator[](std::size_t i) const { return data[i]; }
    LLAMA3_EMU_INLINE T* begin() const { return data; }
    LLAMA3_EMU_INLINE T* end() const { return data + size; }
};

struct Resident {  // a block that has begun
    uint3 index{};
    Elements<Thread> all;
    Elements<Warp> warps;
    std::uint32_t ready_warps = 0;
    Thread* current = nullptr;
    int at_barrier = 0, finished = 0;
    Site barrier_site;
    int barrier_variant = 0, barrier_sum = 0, barrier_result = 0;
    unsigned char* shared = nullptr;  // 16-byte aligned and no more, as CUDA promises no more
    std::uint32_t epoch = 0;
    Elements<Record> words, bytes;
    Elements<std::uint16_t> pending;  // of each word: copies under way
    std::vector<unsigned char> shared_store;
};

struct Block : Resident {  // the one that runs
    // The launch.
    const char* kernel = "";
    void (*call)(const void*) = nullptr;
    const void* arguments = nullptr;
    int threads = 0;
    bool running = false;
    std::string fault;
    std::uintptr_t fault_address = 0;
    bool segmentation = false;
    std::size_t shared_bytes = 0;
    int device = 0;
    bool waits = false;       // for what another block or device stores
    unsigned generation = 0;  // a fault ends what is under way
    unsigned long long remote_stores = 0;
    // The fibers.
    Fiber host;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> idle;
    std::uint64_t random = 0, last_seed = 0;
    unsigned long long switches = 0;

    LLAMA3_EMU_INLINE Thread& thread(int warp, int lane) { return all[warps[warp].first + lane]; }
    LLAMA3_EMU_BARE std::uint32_t draw() {  // xorshift64*
        random ^= random >> 12, random ^= random << 25, random ^= random >> 27;
        return std::uint32_t(random * 0x2545f4914f6cdd1d >> 32);
    }
};

inline Block* const the_block = new Block;
LLAMA3_EMU_INLINE inline Block& block() { return *the_block; }
inline thread_local bool in_kernel = false;

// The pieces of a message.
struct Hex {
    std::uint64_t value;
};
struct Address {
    std::uintptr_t value;
};
struct Lanes {
    unsigned mask;
};
struct Deadlock {};

inline std::string text(Lanes lanes) {  // "0-15, 20"
    std::string result;
    for (int i = 0; i < 32; ++i) {
        if (!(lanes.mask >> i & 1)) continue;
        int last = i;
        while (last < 31 && lanes.mask >> (last + 1) & 1) ++last;
        result += (result.empty() ? "" : ", ") + std::to_string(i) + (last > i ? "-" + std::to_string(last) : "");
        i = last;
    }
    return result;
}

inline void append(std::string& to, const char* piece) { to += piece; }
inline void append(std::string& to, const std::string& piece) { to += piece; }
inline void append(std::string& to, const Site& site) { to += site.text(); }
inline void append(std::string& to, Hex number) { to += hex(number.value); }
inline void append(std::string& to, Address address) { to += memory().describe(address.value); }
inline void append(std::string& to, Lanes lanes) { to += text(lanes); }
inline void append(std::string& to, uint3 i) {
    to += "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}
template <class T>
requires std::is_arithmetic_v<T>
void append(std::string& to, T number) { to += std::to_string(number); }
// Everyone waits: says where, by the threads that differ.
inline void append(std::string& result, Deadlock) {
    Block& b = block();
    result += "the threads wait for each other for ever:";
    int lines = 0;
    for (std::size_t w = 0; w < b.warps.size && lines < 4; ++w) {
        const Warp& warp = b.warps[w];
        const unsigned everyone = warp.size == 32 ? ~0u : (1u << warp.size) - 1;
        const auto line = [&](unsigned lanes, const std::string& at) {
            if (lanes == 0 || lines >= 4) return;
            result += " warp " + std::to_string(w) + " lanes " + text(Lanes{lanes}) + " " + at + ";", ++lines;
        };
        if (warp.at_barrier != everyone) {
            line(warp.at_barrier, "at __syncthreads (" + b.barrier_site.text() + ")");
            for (unsigned left = warp.waiting; left;) {
                const Arrival& first = warp.arrival[std::countr_zero(left)];
                unsigned same = 0;
                for (int i = 0; i < 32; ++i)
                    if (left >> i & 1 && warp.arrival[i].site == first.site) same |= 1u << i;
                line(same, std::string("at ") + first.what + " (" + first.site.text() + ")");
                left &= ~same;
            }
            line(warp.done, "gone");
        }
    }
    result.back() = '.';
}

template <class... Piece>
std::string join(const Piece&... pieces) {
    std::string result;
    (append(result, pieces), ...);
    return result;
}

// Where the kernel is: "kernel scale, block (1,0,0), thread (4,0,0): ".
inline std::string place() {
    const Block& b = block();
    return join("kernel ", b.kernel, ", block ", blockIdx, ", thread ", b.current->index, ": ");
}

inline void leave_kernel() {
    Block& b = block();
    switch_fiber(*b.current->fiber, b.host, true);
}

template <class... Piece>
[[noreturn]] void fail(const Piece&... pieces) {
    if (!in_kernel) throw Fault(join(pieces...));
    block().fault = place() + join(pieces...);
    leave_kernel();
    __builtin_unreachable();
}

inline Fiber* take_fiber() {
    Block& b = block();
    if (b.idle.empty()) {
        auto fiber = std::make_unique<Fiber>();
        const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
        void* const at =
            mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) fail("no memory for the stack of a thread");
        mprotect(at, page, PROT_NONE);  // where a stack that is too large faults
        fiber->stack = static_cast<char*>(at) + page;
        fiber->stack_bytes = stack_bytes;
        prepare(*fiber, b.fibers.size());
        b.idle.push_back(fiber.get());
        b.fibers.push_back(std::move(fiber));
    }
    Fiber* const fiber = b.idle.back();
    b.idle.pop_back();
    return fiber;
}

LLAMA3_EMU_BARE inline int pick_bit(unsigned bits) {
    if (order == Order::forward) return __builtin_ctz(bits);
    if (order == Order::reverse) return 31 - __builtin_clz(bits);
    const int turn = int(block().draw() & 31);
    return (__builtin_ctz(bits >> turn | bits << (-turn & 31)) + turn) & 31;
}

// The next thread to run, made the current one; null if there is none.
LLAMA3_EMU_BARE inline Thread* pick() {
    Block& b = block();
    if (b.ready_warps == 0) return nullptr;
    const int w = pick_bit(b.ready_warps);
    Warp& warp = b.warps[w];
    const int lane = pick_bit(warp.ready);
    warp.ready &= ~(1u << lane);
    if (warp.ready == 0) b.ready_warps &= ~(1u << w);
    Thread& next = b.thread(w, lane);
    b.current = &next;
    threadIdx = next.index;
    return &next;
}

// Runs others until somebody makes this thread ready again.
LLAMA3_EMU_BARE inline void wait() {
    Block& b = block();
    Thread* const self = b.current;
    Thread* const next = pick();
    if (!next) fail(Deadlock());
    if (next == self) return;
    if (!next->fiber) next->fiber = take_fiber();
    ++b.switches;
    switch_fiber(*self->fiber, *next->fiber);
}

LLAMA3_EMU_BARE inline void make_ready(int w, unsigned lanes) {
    Block& b = block();
    b.warps[w].ready |= lanes;
    b.ready_warps |= 1u << w;
}

LLAMA3_EMU_BARE inline void thread_ends() {
    Block& b = block();
    Thread& t = *b.current;
    Warp& warp = b.warps[t.warp];
    if (!t.copies.empty()) fail("the thread ends before it waited for its cp.async (", t.copies.front().site, ")");
    if (b.at_barrier > 0)
        fail("the thread ends, while ", b.at_barrier, " threads wait at __syncthreads (", b.barrier_site, ")");
    for (unsigned left = warp.waiting; left; left &= left - 1) {
        const int other = std::countr_zero(left);
        const Arrival& a = warp.arrival[other];
        if (a.mask >> t.lane & 1)
            fail("the thread ends, while lane ", other, " of its warp waits for it at ", a.what, " (", a.site, ")");
    }
    warp.done |= 1u << t.lane;
    ++b.finished;
}

LLAMA3_EMU_BARE inline void run_threads() {
    Block& b = block();
#ifdef LLAMA3_EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    Fiber* const mine = b.current->fiber;
    for (;;) {
        b.call(b.arguments);
        thread_ends();
        Thread* const next = pick();
        if (next && !next->fiber) {
            next->fiber = mine;
            continue;
        }
        if (!next && b.finished < b.threads) fail(Deadlock());
        b.idle.push_back(mine);
        ++b.switches;
        switch_fiber(*mine, next ? *next->fiber : b.host);
    }
}

// The barrier of the block; also counts the threads whose predicate holds, for its three variants. Stricter than the hardware,
// which lets threads arrive from different lines and forgets those that have ended: neither is ever wanted.
LLAMA3_EMU_BARE inline int block_barrier(const char* what, int variant, bool predicate, Site site) {
    Block& b = block();
    if (!in_kernel) fail(what, " outside a kernel");
    Thread& t = *b.current;
    Warp& warp = b.warps[t.warp];
    t.site = site;
    if (b.finished > 0) fail(what, " (", site, ") is reached after ", b.finished, " threads have ended");
    if (b.at_barrier > 0 && (!(b.barrier_site == site) || b.barrier_variant != variant))
        fail(what, " (", site, ") is reached, while ", b.at_barrier, " threads wait at another (", b.barrier_site, ")");
    for (unsigned left = warp.waiting; left; left &= left - 1) {
        const Arrival& a = warp.arrival[std::countr_zero(left)];
        if (a.mask >> t.lane & 1)
            fail(what, " (", site, ") is reached, while lane ", std::countr_zero(left),
                 " of the warp waits for this thread at ", a.what, " (", a.site, ")");
    }
    if (b.at_barrier++ == 0) b.barrier_site = site, b.barrier_variant = variant, b.barrier_sum = 0;
    b.barrier_sum += predicate;
    warp.at_barrier |= 1u << t.lane;
    if (b.at_barrier == b.threads) {
        b.barrier_result = b.barrier_sum;
        b.at_barrier = 0;
        ++b.epoch;
        for (std::size_t w = 0; w < b.warps.size; ++w) {
            make_ready(int(w), b.warps[w].at_barrier);
            b.warps[w].at_barrier = 0;
        }
    }
    wait();
    return b.barrier_result;  // the next barrier cannot complete before this thread has read it
}

}  // namespace cuda_emu

// clang-format off
inline void __syncthreads(cuda_emu::Site site = cuda_emu::Site()) { cuda_emu::block_barrier("__syncthreads", 0, false, site); }
inline int __syncthreads_count(int p, cuda_emu::Site site = cuda_emu::Site()) { return cuda_emu::block_barrier("__syncthreads_count", 1, p != 0, site); }
inline int __syncthreads_or(int p, cuda_emu::Site site = cuda_emu::Site()) { return cuda_emu::block_barrier("__syncthreads_or", 2, p != 0, site) != 0; }
inline int __syncthreads_and(int p, cuda_emu::Site site = cuda_emu::Site()) { return cuda_emu::block_barrier("__syncthreads_and", 3, p != 0, site) == cuda_emu::block().threads; }
inline void __trap(cuda_emu::Site site = cuda_emu::Site()) { cuda_emu::fail("__trap (", site, ")"); }
// clang-format on

namespace cuda_emu {

// A memory fault in a kernel becomes a Fault: the handler makes the program go on in the host's context. One of the host in device
// memory is explained before the program ends.
inline struct sigaction previous_segv, previous_bus;

// Not instrumented: AddressSanitizer's frame of this function would belong to the stack that it leaves.
__attribute__((no_sanitize("address"))) inline void on_memory_fault(int signal, siginfo_t* info, void* context) {
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    if (in_kernel) {
        Block& b = block();
        b.segmentation = true;
        b.fault_address = address;
#ifdef LLAMA3_EMU_ASAN
        __sanitizer_start_switch_fiber(nullptr, b.host.stack, b.host.stack_bytes);
#endif
#ifdef LLAMA3_EMU_ASSEMBLY
        auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
        registers[REG_RDI] = reinterpret_cast<greg_t>(b.host.top);
        registers[REG_RIP] = reinterpret_cast<greg_t>(&llama3_emu_resume);
        return;
#else
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, signal);
        sigprocmask(SIG_UNBLOCK, &set, nullptr);
        setcontext(&b.host.context);
#endif
    }
    if (memory().on_device(info->si_addr)) {
        const std::string message = "cuda_emu: host code touches device memory at " + memory().describe(address) + "\n";
        if (write(2, message.data(), message.size()) < 0) std::abort();
    }
    const struct sigaction& previous = signal == SIGBUS ? previous_bus : previous_segv;
    if (previous.sa_flags & SA_SIGINFO) previous.sa_sigaction(signal, info, context);
    else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) previous.sa_handler(signal);
    else sigaction(signal, &previous, nullptr);  // the access is made again, and ends the program
}

// Test frameworks install handlers of their own for each test, so this is asked before every launch.
inline void install_handlers() {
    struct sigaction now {};
    sigaction(SIGSEGV, nullptr, &now);
    if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_memory_fault) {
        struct sigaction ours {};
        ours.sa_sigaction = on_memory_fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &ours, &previous_segv);
        sigaction(SIGBUS, &ours, &previous_bus);
    }
    stack_t alternate{};
    sigaltstack(nullptr, &alternate);
    if (alternate.ss_flags & SS_DISABLE) {  // a stack that overflowed cannot hold its handler
        static thread_local std::unique_ptr<char[]> memory;
        if (!memory) memory = std::make_unique<char[]>(64 * 1024);
        alternate = {};
        alternate.ss_sp = memory.get();
        alternate.ss_size = 64 * 1024;
        sigaltstack(&alternate, nullptr);
    }
}

inline void begin_block(std::uint64_t index) {
    Block& b = block();
    blockIdx = {unsigned(index % gridDim.x), unsigned(index / gridDim.x % gridDim.y), unsigned(index / gridDim.x / gridDim.y)};
    b.at_barrier = b.finished = 0;
    ++b.epoch;
    if (b.shared_bytes) std::memset(b.shared, 0xff, b.shared_bytes);
    std::fill(b.pending.begin(), b.pending.end(), std::uint16_t{0});
    for (std::size_t w = 0; w < b.warps.size; ++w) {
        Warp& warp = b.warps[w];
        warp.ready = warp.waiting = warp.at_barrier = warp.done = 0;
        warp.tick = 1, warp.all_known = 0;
        warp.partial = false;
        make_ready(int(w), warp.size == 32 ? ~0u : (1u << warp.size) - 1);
    }
    for (Thread& t : b.all) t.fiber = nullptr, t.group = 0, t.site.line = 0;
}

// A launch: once it has begun it may have to wait, and goes on later.
struct Grid {
    bool begun = false;
    unsigned generation = 0;
    std::vector<std::uint32_t> sequence;  // of its blocks; empty: in order
    std::uint64_t next = 0;               // that has not begun
    std::vector<Resident> waiting;
};

// Gives way to other blocks, and other devices, and comes back.
inline void wait_for_others(unsigned&, Site site = Site()) {
    Block& b = block();
    if (!in_kernel) fail("wait_for_others outside a kernel (", site, ")");
    Thread& t = *b.current;
    t.site = site;
    b.waits = true;
    make_ready(t.warp, 1u << t.lane);
    ++b.switches;
    switch_fiber(*t.fiber, b.host);
}

// Runs the blocks of a grid, one after the other or, of a cooperative one, in turns. `call` runs the kernel for the current thread.
// False: it waits for another device.
inline bool run_grid(Grid& state, const char* kernel, dim3 grid, dim3 threads, std::size_t shared_bytes,
                     void (*call)(const void*), const void* arguments, bool cooperative, int device) {
    const DeviceAccess access;
    Block& b = block();
    if (b.running) fail("a kernel is launched from within a kernel");
    if (state.begun && state.generation != b.generation) return state = {}, true;  // its threads were dropped
    install_handlers();
#ifdef LLAMA3_EMU_ASAN
    static thread_local std::pair<char*, std::size_t> own_stack = [] {
        pthread_attr_t attributes;
        void* at = nullptr;
        std::size_t size = 0;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &at, &size);
        pthread_attr_destroy(&attributes);
        return std::pair(static_cast<char*>(at), size);
    }();
    b.host.stack = own_stack.first, b.host.stack_bytes = own_stack.second;
#endif
    b.kernel = kernel, b.call = call, b.arguments = arguments, b.device = device;
    b.fault.clear();
    b.segmentation = false;
    gridDim = grid, blockDim = threads;
    if (seed != b.last_seed) b.random = (b.last_seed = seed) * 0x9e3779b97f4a7c15 | 1;
    const int count = int(threads.x * threads.y * threads.z);
    b.threads = count;
    b.shared_bytes = shared_bytes;
    const auto make_room = [&] {
        b.all.resize(std::size_t(count));
        b.warps.resize(std::size_t(count + 31) / 32);
        for (int i = 0; i < count; ++i) {
            Thread& t = b.all[i];
            t.index = {unsigned(i) % threads.x, unsigned(i) / threads.x % threads.y, unsigned(i) / threads.x / threads.y};
            t.number = i, t.warp = i / 32, t.lane = i % 32;
            t.copies.clear();
        }
        for (std::size_t w = 0; w < b.warps.size; ++w)
            b.warps[w].first = int(w) * 32, b.warps[w].size = std::min(32, count - int(w) * 32);
        const std::size_t words = (shared_bytes + 3) / 4;
        b.shared_store.resize(std::max(b.shared_store.size(), shared_bytes + 64));
        b.shared = b.shared_store.data();
        b.shared += (48 - reinterpret_cast<std::uintptr_t>(b.shared) % 32) % 32;
        if (b.words.size < words) b.words.resize(words), b.bytes.resize(4 * words);
        b.pending.resize(words);
    };
    const auto put_aside = [&] { state.waiting.push_back(std::exchange(static_cast<Resident&>(b), Resident())); };
    const auto take_back = [&](std::size_t i) {
        static_cast<Resident&>(b) = std::move(state.waiting[i]);
        state.waiting.erase(state.waiting.begin() + std::ptrdiff_t(i));
        blockIdx = b.index;
    };

    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    if (!state.begun) {
        state.begun = true, state.generation = b.generation, state.next = 0;
        if (order == Order::random) {
            state.sequence.resize(blocks);
            std::iota(state.sequence.begin(), state.sequence.end(), 0u);
            for (std::size_t i = blocks; i > 1; --i) std::swap(state.sequence[i - 1], state.sequence[b.draw() % i]);
        }
        if (!cooperative) make_room();
    }
    const auto begin_next = [&] {
        const std::uint64_t i = state.next++;
        begin_block(!state.sequence.empty() ? state.sequence[i] : order == Order::reverse ? blocks - 1 - i : i);
        b.index = blockIdx;
    };
    for (; cooperative && state.next < blocks; put_aside()) make_room(), begin_next();

    bool give_way = false;
    std::uint64_t idle = 0;  // turns of blocks since one of them did something
    while (b.fault.empty() && !give_way) {
        if (!state.waiting.empty()) take_back(order == Order::random ? b.draw() % state.waiting.size() : 0);
        else if (state.next == blocks) break;
        else begin_next();
        const unsigned long long stores = b.remote_stores;
        const int finished = b.finished;
        b.running = true, b.waits = false;
        Thread* const first = pick();
        if (!first->fiber) first->fiber = take_fiber();
        in_kernel = true;
        switch_fiber(b.host, *first->fiber);
        in_kernel = false;
        b.running = false;
        if (b.segmentation)
            b.fault = place() +
                      (b.fault_address ? "invalid access to " + memory().describe(b.fault_address)
                                       : "invalid access: a null or misaligned pointer, or one to no address at all") +
                      (b.current->site.line ? "; the thread last met others at " + b.current->site.text() : "");
        else if (b.fault.empty() && b.waits) {
            idle = b.remote_stores != stores || b.finished != finished ? 0 : idle + 1;
            if (cooperative && idle > 1000 * blocks) b.fault = place() + "waits for ever at " + b.current->site.text();
            if (b.fault.empty()) put_aside();
            give_way = !cooperative;
        }
    }
    if (give_way && b.fault.empty()) return false;
    b.current = nullptr;
    state = {};
    if (b.fault.empty()) return true;
    // The threads that were under way are dropped; kernels have nothing on their stacks that needs a destructor.
    ++b.generation;
    b.idle.clear();
    b.ready_warps = 0;
    for (std::size_t i = 0; i < b.fibers.size(); ++i) {
#ifdef LLAMA3_EMU_ASAN
        drop_fake_stack(b.host, *b.fibers[i]);
#endif
        prepare(*b.fibers[i], i);
        b.idle.push_back(b.fibers[i].get());
    }
    throw Fault(b.fault);
}

// ═══ §5  Shared memory ════════════════════════════════════════════════════════════════════════════════════════════════════
// Kernels see the block's dynamic shared memory through a pointer that looks at every access. Two accesses race if they are made by
// different threads to one byte, one of them writes, and neither a barrier nor, within a warp, a warp primitive lies between.

enum class Use { read, write, atomic, async };  // async: the beginning or the end of a cp.async

LLAMA3_EMU_BARE inline bool ordered(const Warp& warp, int other_lane, std::uint32_t tick, int lane) {
    return tick < warp.all_known || (warp.partial && tick < warp.known[lane][other_lane]);
}

[[noreturn]] inline void fail_race(std::size_t offset, const char* did, int other, Site before, const char* does, Site now) {
    Block& b = block();
    fail("race on shared memory at byte ", offset, ": thread ", b.all[other].index, " ", did, " it (", before,
         ") and thread ", b.current->index, " ", does, " it (", now, ") with no barrier between");
}

LLAMA3_EMU_BARE inline void touch(Record& r, std::size_t offset, Use use, Site site) {
    Block& b = block();
    const Thread& t = *b.current;
    const Warp& warp = b.warps[t.warp];
    const bool writes = use != Use::read, atomic = use == Use::atomic;
    const char* const does = writes ? "writes" : "reads";
    if (r.epoch != b.epoch) {
        r.epoch = b.epoch;
        r.writer = -1;
        r.by_bytes = false;
        r.readers[0].lanes = r.readers[1].lanes = 0;
    }
    if (r.writer >= 0 && r.writer != t.number && !(atomic && r.atomic)) {
        const Thread& other = b.all[r.writer];
        if (other.warp != t.warp || !ordered(warp, other.lane, r.write_tick, t.lane))
            fail_race(offset, "wrote", r.writer, r.write_site, does, site);
    }
    if (!writes) {
        Record::Readers& slot = r.readers[0].lanes == 0 || r.readers[0].warp == t.warp ? r.readers[0] : r.readers[1];
        if (slot.lanes != 0 && slot.warp != t.warp) return;
        if (slot.lanes == 0 || slot.tick != warp.tick) slot = {0, warp.tick, t.warp, site};
        slot.lanes |= 1u << t.lane;
        return;
    }
    for (Record::Readers& slot : r.readers) {
        unsigned lanes = slot.lanes;
        if (lanes && slot.warp == t.warp) lanes &= ~(1u << t.lane);
        for (; lanes; lanes &= lanes - 1) {
            const int lane = __builtin_ctz(lanes);
            if (slot.warp != t.warp || !ordered(warp, lane, slot.tick, t.lane))
                fail_race(offset, "read", slot.warp * 32 + lane, slot.site, does, site);
        }
        slot.lanes = 0;
    }
    r.writer = t.number, r.write_tick = warp.tick, r.atomic = atomic, r.write_site = site;
}

LLAMA3_EMU_BARE inline void note_shared(const void* p, std::size_t bytes, std::size_t alignment, Use use, Site site) {
    Block& b = block();
    if (!in_kernel) fail("shared memory is used outside a kernel (", site, ")");
    const std::size_t offset = std::size_t(static_cast<const unsigned char*>(p) - b.shared);
    if (offset >= b.shared_bytes || bytes > b.shared_bytes - offset)
        fail("shared memory is used beyond its end: ", bytes, " bytes at ", std::ptrdiff_t(offset), " of ", b.shared_bytes,
             " (", site, ")");
    if (reinterpret_cast<std::uintptr_t>(p) % alignment != 0)
        fail("misaligned access to shared memory: byte ", offset, ", expected a multiple of ", alignment, " (", site, ")");
    for (std::size_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
        if (use != Use::async && b.pending[word])
            for (const Thread& t : b.all)
                for (const Copy& copy : t.copies)
                    if (copy.to / 4 <= word && word < copy.to / 4 + 4)
                        fail("shared memory is used (", site, ") before thread ", t.index,
                             " waited for the cp.async that fills it (", copy.site, ")");
        if (!check_races) continue;
        Record& whole = b.words[word];
        const std::size_t first = offset > 4 * word ? offset : 4 * word;
        const std::size_t last = offset + bytes < 4 * word + 4 ? offset + bytes : 4 * word + 4;
        const bool by_bytes = whole.epoch == b.epoch && whole.by_bytes;
        if (!by_bytes && last - first == 4) {
            touch(whole, 4 * word, use, site);
            continue;
        }
        if (!by_bytes) {  // from here to the next barrier this word is known by its bytes
            if (whole.epoch != b.epoch) whole = Record{.epoch = b.epoch};
            whole.by_bytes = false;
            for (std::size_t i = 0; i < 4; ++i) b.bytes[4 * word + i] = whole;
            whole.by_bytes = true;
        }
        for (std::size_t i = first; i < last; ++i) touch(b.bytes[i], i, use, site);
    }
}

template <class T>
struct Shared;

// What s[i] is: reading and writing it are looked at.
template <class T>
struct SharedReference {
    using Value = std::remove_const_t<T>;
    T* at;
    Site site;

    LLAMA3_EMU_INLINE Value read() const {
        note_shared(at, sizeof(T), alignof(T), Use::read, site);
        return *at;
    }
    LLAMA3_EMU_INLINE void write(const Value& value) const {
        note_shared(at, sizeof(T), alignof(T), Use::write, site);
        *at = value;
    }
    LLAMA3_EMU_INLINE operator Value() const { return read(); }
    const SharedReference& operator=(const Value& value) const { return write(value), *this; }
    const SharedReference& operator=(const SharedReference& other) const { return write(other.read()), *this; }
    template <class U>
    const SharedReference& operator=(const SharedReference<U>& other) const {
        return write(Value(other.read())), *this;
    }
    LLAMA3_EMU_INLINE SharedReference(T* at, Site site) : at(at), site(site) {}
    SharedReference(const SharedReference&) = default;
    Shared<T> operator&() const { return {at}; }

    // clang-format off
    template <class U> const SharedReference& operator+=(const U& value) const { return write(Value(read() + value)), *this; }
    template <class U> const SharedReference& operator-=(const U& value) const { return write(Value(read() - value)), *this; }
    template <class U> const SharedReference& operator*=(const U& value) const { return write(Value(read() * value)), *this; }
    template <class U> const SharedReference& operator/=(const U& value) const { return write(Value(read() / value)), *this; }
    template <class U> const SharedReference& operator|=(const U& value) const { return write(Value(read() | value)), *this; }
    template <class U> const SharedReference& operator&=(const U& value) const { return write(Value(read() & value)), *this; }
    template <class U> const SharedReference& operator^=(const U& value) const { return write(Value(read() ^ value)), *this; }
    // clang-format on
    const SharedReference& operator++() const { return *this += 1; }
    const SharedReference& operator--() const { return *this -= 1; }
    Value operator++(int) const {
        const Value old = read();
        return write(Value(old + 1)), old;
    }
};

// An index that knows the line it is written on.
struct Index {
    std::ptrdiff_t value;
    Site site;
    template <class I>
    requires std::is_convertible_v<I, std::ptrdiff_t> LLAMA3_EMU_INLINE Index(const I& value, Site site = Site())
        : value(std::ptrdiff_t(value)), site(site) {}
};

template <class T>
struct Shared {
    using Value = T;
    T* at = nullptr;

    Shared() = default;
    Shared(T* at) : at(at) {}
    operator Shared<const T>() const requires(!std::is_const_v<T>) { return {at}; }
    LLAMA3_EMU_INLINE SharedReference<T> operator[](Index i) const { return {at + i.value, i.site}; }
    SharedReference<T> operator*() const { return {at, Site("shared memory", 0)}; }
    explicit operator bool() const { return at != nullptr; }
    // clang-format off
    Shared operator+(std::ptrdiff_t n) const { return {at + n}; }
    Shared operator-(std::ptrdiff_t n) const { return {at - n}; }
    Shared& operator+=(std::ptrdiff_t n) { return at += n, *this; }
    Shared& operator-=(std::ptrdiff_t n) { return at -= n, *this; }
    Shared& operator++() { return ++at, *this; }
    std::ptrdiff_t operator-(Shared other) const { return at - other.at; }
    bool operator==(const Shared&) const = default;
    auto operator<=>(const Shared&) const = default;
    // clang-format on
};

// The dynamic shared memory of the block. Every call gives the same bytes.
template <class T>
Shared<T> shared_memory(Site site = Site()) {
    if (!in_kernel) fail("shared_memory outside a kernel (", site, ")");
    return {reinterpret_cast<T*>(block().shared)};
}

template <class U, class T>
auto shared_cast(Shared<T> p) {
    using To = std::conditional_t<std::is_const_v<T>, const U, U>;
    return Shared<To>(reinterpret_cast<To*>(p.at));
}

// ═══ §6  Warps and tensor cores ═══════════════════════════════════════════════════════════════════════════════════════════

bool has_access(int device, int other);  // to its memory

// Checks an access of a kernel to device memory (or pinned memory, or a local array).
LLAMA3_EMU_BARE inline void check_global(const void* p, std::size_t bytes, std::size_t alignment, const char* what, Site site) {
    if (!in_kernel) fail(what, " outside a kernel (", site, ")");
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    if (address % alignment != 0)
        fail("misaligned ", what, ": ", Address{address}, ", expected a multiple of ", alignment, " (", site, ")");
    const Fiber& fiber = *block().current->fiber;
    if (address - reinterpret_cast<std::uintptr_t>(fiber.stack) < fiber.stack_bytes) return;
    static Allocation recent[16];  // an address range is never used twice, but it may be freed
    static int recent_count = -1;
    if (recent_count != memory().changes) std::fill_n(recent, 16, Allocation()), recent_count = memory().changes;
    Allocation& guess = recent[address >> 14 & 15];
    const auto check_reach = [&](const Allocation& a) {
        const int device = block().device;
        if (a.device >= 0 && a.device != device && !has_access(device, a.device))
            fail(what, " of memory that device ", device, " has no access to: ", Address{address}, " (", site, ")");
    };
    if (address - guess.start >= guess.size || bytes > guess.size - (address - guess.start)) {
        const Allocation* const found = memory().find(p);
        if (!found || address - found->start + bytes > found->size) {
            if (!found && !memory().on_device(p)) fail(what, " of a host pointer in a kernel: ", Hex{address}, " (", site, ")");
            fail(what, " out of bounds: ", bytes, " bytes at ", Address{address}, " (", site, ")");
        }
        guess = *found;
    }
    check_reach(guess);
}

template <class T, class U>
T load16(Shared<U> p, Site site = Site()) {
    static_assert(sizeof(T) == 16 && std::is_trivially_copyable_v<T>);
    note_shared(p.at, 16, 16, Use::read, site);
    T value;
    std::memcpy(&value, p.at, 16);
    return value;
}
template <class T>
T load16(const void* p, Site site = Site()) {
    static_assert(sizeof(T) == 16 && std::is_trivially_copyable_v<T>);
    check_global(p, 16, 16, "16-byte load", site);
    T value;
    std::memcpy(&value, p, 16);
    return value;
}
template <class T, class U>
T load8(Shared<U> p, Site site = Site()) {
    static_assert(sizeof(T) == 8 && std::is_trivially_copyable_v<T>);
    note_shared(p.at, 8, 8, Use::read, site);
    T value;
    std::memcpy(&value, p.at, 8);
    return value;
}
template <class T>
T load8(const void* p, Site site = Site()) {
    static_assert(sizeof(T) == 8 && std::is_trivially_copyable_v<T>);
    check_global(p, 8, 8, "8-byte load", site);
    T value;
    std::memcpy(&value, p, 8);
    return value;
}
inline uint4 load_streaming16(const void* p, Site site = Site()) { return load16<uint4>(p, site); }
inline uint2 load_streaming8(const void* p, Site site = Site()) { return load8<uint2>(p, site); }
inline float load_fresh(const float* p, Site site = Site()) {
    check_global(p, 4, 4, "load", site);
    return *p;
}
template <class T, class U>
void store16(Shared<U> p, const T& value, Site site = Site()) {
    static_assert(sizeof(T) == 16 && std::is_trivially_copyable_v<T>);
    note_shared(p.at, 16, 16, Use::write, site);
    std::memcpy(p.at, &value, 16);
}
template <class T>
void store16(void* p, const T& value, Site site = Site()) {
    static_assert(sizeof(T) == 16 && std::is_trivially_copyable_v<T>);
    check_global(p, 16, 16, "16-byte store", site);
    std::memcpy(p, &value, 16);
}

inline void store_remote16(float* p, const float4& value, Site site = Site()) {
    check_global(p, 16, 16, "16-byte store", site);
    Block& b = block();
    ++b.remote_stores;
    const bool lost = broken_peer.first == b.device && memory().find(p)->device == broken_peer.second;
    if (!lost) std::memcpy(p, &value, 16);
}
inline float4 load_remote16(const float* p, Site site = Site()) { return load16<float4>(p, site); }

// A copy begins by spoiling what it will fill, and is made by the wait for it, so that a kernel that reads too early sees NaN.
template <class T>
void copy_async16(Shared<T> to, const void* from, Site site = Site()) {
    note_shared(to.at, 16, 16, Use::async, site);
    check_global(from, 16, 16, "cp.async", site);
    Block& b = block();
    const auto offset = std::size_t(reinterpret_cast<const unsigned char*>(to.at) - b.shared);
    std::memset(b.shared + offset, 0xff, 16);
    for (std::size_t i = 0; i < 4; ++i) ++b.pending[offset / 4 + i];
    b.current->copies.push_back({offset, from, b.current->group, site});
}
inline void copy_async_commit() { ++block().current->group; }
template <int N>
void copy_async_wait() {
    Block& b = block();
    Thread& t = *b.current;
    std::erase_if(t.copies, [&](const Copy& copy) {
        if (copy.group + unsigned(N) >= t.group) return false;
        note_shared(b.shared + copy.to, 16, 16, Use::async, copy.site);
        std::memcpy(b.shared + copy.to, copy.from, 16);
        for (std::size_t i = 0; i < 4; ++i) --b.pending[copy.to / 4 + i];
        return true;
    });
}

// After this, lanes of `mask` know all that any of them did or knew.
LLAMA3_EMU_BARE inline void synchronise_clocks(Warp& warp, unsigned mask) {
    const unsigned everyone = warp.size == 32 ? ~0u : (1u << warp.size) - 1;
    ++warp.tick;
    if (mask == everyone) {
        warp.all_known = warp.tick;
        return;
    }
    if (!warp.partial) std::memset(warp.known, 0, sizeof warp.known);
    warp.partial = true;
    std::uint32_t joined[32] = {};
    for (int v = 0; v < 32; ++v)
        for (int u = 0; mask >> v & 1 && u < 32; ++u)
            joined[u] = mask >> u & 1 ? warp.tick : std::max(joined[u], warp.known[v][u]);
    for (int v = 0; v < 32; ++v)
        if (mask >> v & 1) std::copy_n(joined, 32, warp.known[v]);
}

// Every warp primitive: the lanes of the mask meet, the last to come does the work for all of them.
template <class Payload, class Work>
LLAMA3_EMU_BARE void meet(const char* what, unsigned mask, int variant, bool orders_memory, Site site, Payload& payload, const Work& work) {
    Block& b = block();
    if (!in_kernel) fail(what, " (", site, ") outside a kernel");
    Thread& t = *b.current;
    Warp& warp = b.warps[t.warp];
    const unsigned everyone = warp.size == 32 ? ~0u : (1u << warp.size) - 1;
    t.site = site;
    if (!(mask >> t.lane & 1))
        fail(what, " (", site, "): the mask ", Hex{mask}, " does not name lane ", t.lane, ", which calls");
    if (mask & ~everyone)
        fail(what, " (", site, "): the mask ", Hex{mask}, " names lanes that the warp has not (found ", warp.size, " lanes)");
    if (mask & warp.done)
        fail(what, " (", site, "): the mask ", Hex{mask}, " names lanes that have ended (lanes ", Lanes{mask & warp.done}, ")");
    if (mask & warp.at_barrier)
        fail(what, " (", site, ") waits for lanes ", Lanes{mask & warp.at_barrier}, ", which wait at __syncthreads (",
             b.barrier_site, ")");
    for (unsigned left = warp.waiting; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        const Arrival& other = warp.arrival[lane];
        if (!(mask >> lane & 1) && !(other.mask >> t.lane & 1)) continue;
        if (other.mask != mask || other.variant != variant || !(other.site == site) || (other.what != what && std::strcmp(other.what, what) != 0))
            fail("lanes of a warp diverge: lane ", t.lane, " is at ", what, " (", site, ") with mask ", Hex{mask}, ", lane ",
                 lane, " at ", other.what, " (", other.site, ") with mask ", Hex{other.mask},
                 (variant != other.variant ? " and another width" : ""));
        break;  // those that wait already agree with each other
    }
    warp.arrival[t.lane] = {what, mask, variant, site, &payload};
    warp.waiting |= 1u << t.lane;
    if ((warp.waiting & mask) == mask) {
        work([&warp](int lane) LLAMA3_EMU_INLINE -> Payload& { return *static_cast<Payload*>(warp.arrival[lane].payload); });
        if (orders_memory) synchronise_clocks(warp, mask);
        warp.waiting &= ~mask;
        make_ready(t.warp, mask);
    }
    wait();
}

template <class T>
struct PlainValue {
    using type = T;
};
template <class T>
struct PlainValue<SharedReference<T>> {
    using type = std::remove_const_t<T>;
};

// `source(lane)` is the lane to read from, or the lane itself where CUDA says so.
template <class T, class Source>
LLAMA3_EMU_BARE T shuffle(const char* what, unsigned mask, T value, int parameter, int width, Site site, const Source& source) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    struct Payload {
        T value;
        int parameter;
        T result;
    } payload{value, parameter, value};
    if (width < 1 || width > 32 || (width & (width - 1)))
        fail(what, " (", site, "): the width is no power of two up to 32 (found ", width, ")");
    meet(what, mask, width, shuffles_order_memory, site, payload, [&](const auto& of) LLAMA3_EMU_BARE {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            const int from = source(lane, of(lane).parameter);
            if (!(mask >> from & 1))
                fail(what, " (", site, "): lane ", lane, " reads from lane ", from, ", which the mask ", Hex{mask},
                     " does not name");
            of(lane).result = of(from).value;
        }
    });
    return payload.result;
}

LLAMA3_EMU_BARE inline unsigned ballot(const char* what, unsigned mask, bool predicate, Site site) {
    struct Payload {
        bool predicate;
        unsigned result;
    } payload{predicate, 0};
    meet(what, mask, 0, shuffles_order_memory, site, payload, [&](const auto& of) LLAMA3_EMU_BARE {
        unsigned result = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1 && of(lane).predicate) result |= 1u << lane;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) of(lane).result = result;
    });
    return payload.result;
}

// d += a b, a: [16, 16], b: [16, 8], d: [16, 8], with the fragments of mma.sync.aligned.m16n8k16 (PTX ISA): with g = lane / 4 and
// t = lane % 4, lane holds of a the rows g and g + 8 in columns 2t, 2t + 1, 2t + 8, 2t + 9; of b those rows in column g; of d the rows
// g and g + 8 in columns 2t and 2t + 1. A pair of neighbours is one register, the lower index in the lower half.
struct MmaFragment {
    float* d;
    const std::uint32_t* a;
    const std::uint32_t* b;
};

template <class Value>
void mma_m16n8k16(const char* what, float d[4], const std::uint32_t a[4], const std::uint32_t b[2], Value value, Site site) {
    MmaFragment payload{d, a, b};
    meet(what, ~0u, 0, false, site, payload, [&](const auto& of) LLAMA3_EMU_BARE {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane)
            for (int half = 0; half < 2; ++half) {
                const int g = lane / 4, k = 2 * (lane % 4) + half;
                const auto part = [&](std::uint32_t pair) { return value(std::uint16_t(pair >> 16 * half)); };
                const MmaFragment& f = of(lane);
                left[g][k] = part(f.a[0]), left[g + 8][k] = part(f.a[1]);
                left[g][k + 8] = part(f.a[2]), left[g + 8][k + 8] = part(f.a[3]);
                right[k][g] = part(f.b[0]), right[k + 8][g] = part(f.b[1]);
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                float sum = of(lane).d[i];
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                of(lane).d[i] = sum;
            }
    });
}
inline void mma_m16n8k16_bf16(float d[4], const std::uint32_t a[4], const std::uint32_t b[2], Site site = Site()) {
    mma_m16n8k16("mma.m16n8k16.bf16", d, a, b, bf16_value, site);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                              Site site = Site()) {
    const std::uint32_t b[2] = {b0, b1};
    mma_m16n8k16("mma.m16n8k16.bf16", d, a, b, bf16_value, site);
}
inline void mma_m16n8k16_f16(float d[4], const std::uint32_t a[4], const std::uint32_t b[2], Site site = Site()) {
    mma_m16n8k16("mma.m16n8k16.f16", d, a, b, half_value, site);
}

// Four 8x8 tiles of 16-bit values: lane i gives the address of row i % 8 of tile i / 8, and gets of tile j, in r[j], the two values
// in row lane / 4 from column 2 (lane % 4) on; transposed, those in column lane / 4 from row 2 (lane % 4) on.
template <class T>
void ldmatrix_x4(std::uint32_t r[4], Shared<T> row, bool transposed, const char* what, Site site) {
    struct Payload {
        std::uint16_t values[8];
        std::uint32_t* r;
    } payload;
    payload.r = r;
    note_shared(row.at, 16, 16, Use::read, site);
    std::memcpy(payload.values, row.at, 16);
    meet(what, ~0u, 0, false, site, payload, [&](const auto& of) LLAMA3_EMU_BARE {
        for (int lane = 0; lane < 32; ++lane)
            for (int tile = 0; tile < 4; ++tile) {
                const int i = lane / 4, j = 2 * (lane % 4);
                const std::uint16_t* const straight = of(8 * tile + i).values + j;
                const std::uint16_t low = transposed ? of(8 * tile + j).values[i] : straight[0];
                const std::uint16_t high = transposed ? of(8 * tile + j + 1).values[i] : straight[1];
                of(lane).r[tile] = std::uint32_t{high} << 16 | low;
            }
    });
}
template <class T>
void ldmatrix_x4(std::uint32_t r[4], Shared<T> row, Site site = Site()) {
    ldmatrix_x4(r, row, false, "ldmatrix.x4", site);
}
template <class T>
void ldmatrix_x4_trans(std::uint32_t r[4], Shared<T> row, Site site = Site()) {
    ldmatrix_x4(r, row, true, "ldmatrix.x4.trans", site);
}

}  // namespace cuda_emu

inline void __syncwarp(unsigned mask = 0xffffffff, cuda_emu::Site site = cuda_emu::Site()) {
    int nothing = 0;
    cuda_emu::meet("__syncwarp", mask, 0, true, site, nothing, [](const auto&) {});
}
template <class T>
LLAMA3_EMU_BARE auto __shfl_sync(unsigned mask, T value, int from, int width = 32, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::shuffle<typename cuda_emu::PlainValue<T>::type>(
        "__shfl_sync", mask, value, from, width, site,
        [width](int lane, int from) LLAMA3_EMU_INLINE { return (lane & ~(width - 1)) | (from & (width - 1)); });
}
template <class T>
LLAMA3_EMU_BARE auto __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::shuffle<typename cuda_emu::PlainValue<T>::type>(
        "__shfl_up_sync", mask, value, int(by), width, site,
        [width](int lane, int by) LLAMA3_EMU_INLINE { return (lane & (width - 1)) < by ? lane : lane - by; });
}
template <class T>
LLAMA3_EMU_BARE auto __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::shuffle<typename cuda_emu::PlainValue<T>::type>(
        "__shfl_down_sync", mask, value, int(by), width, site,
        [width](int lane, int by) LLAMA3_EMU_INLINE { return (lane & (width - 1)) + by >= width ? lane : lane + by; });
}
template <class T>
LLAMA3_EMU_BARE auto __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::shuffle<typename cuda_emu::PlainValue<T>::type>(
        "__shfl_xor_sync", mask, value, bits, width, site,
        [width](int lane, int bits) LLAMA3_EMU_INLINE { return (lane ^ bits) >= (lane & ~(width - 1)) + width ? lane : (lane ^ bits) & 31; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::ballot("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::ballot("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::ballot("__all_sync", mask, predicate != 0, site) == mask;
}

template <class T>
T __ldg(const T* p, cuda_emu::Site site = cuda_emu::Site()) {
    cuda_emu::check_global(p, sizeof(T), alignof(T), "__ldg", site);
    return *p;
}
template <class T>
T __ldcs(const T* p, cuda_emu::Site site = cuda_emu::Site()) {
    return __ldg(p, site);
}
template <class T>
T __ldcg(const T* p, cuda_emu::Site site = cuda_emu::Site()) {
    return __ldg(p, site);
}
template <class T>
void __stcs(T* p, const T& value, cuda_emu::Site site = cuda_emu::Site()) {
    cuda_emu::check_global(p, sizeof(T), alignof(T), "__stcs", site);
    *p = value;
}

// Atomics exist for integers only: a sum of floats in the order of arrival would differ from run to run.
namespace cuda_emu {
template <class T>
concept Atomic = std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

template <Atomic T, class Change>
T atomic_change(T* p, Site site, const Change& change) {
    check_global(p, sizeof(T), sizeof(T), "atomic", site);
    const T old = *p;
    *p = change(old);
    return old;
}
template <Atomic T, class Change>
T atomic_change(Shared<T> p, Site site, const Change& change) {
    note_shared(p.at, sizeof(T), sizeof(T), Use::atomic, site);
    const T old = *p.at;
    *p.at = change(old);
    return old;
}
template <class P>
struct Pointed;
template <class T>
struct Pointed<T*> {
    using type = T;
};
template <class T>
struct Pointed<Shared<T>> {
    using type = T;
};
template <class P>
using PointedType = typename Pointed<P>::type;
}  // namespace cuda_emu

template <class P, class T = cuda_emu::PointedType<P>>
T atomicAdd(P p, std::type_identity_t<T> by, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::atomic_change(p, site,
                                   [&](T old) { return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(by)); });
}
template <class P, class T = cuda_emu::PointedType<P>>
T atomicSub(P p, std::type_identity_t<T> by, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::atomic_change(p, site,
                                   [&](T old) { return T(std::make_unsigned_t<T>(old) - std::make_unsigned_t<T>(by)); });
}
template <class P, class T = cuda_emu::PointedType<P>>
T atomicMax(P p, std::type_identity_t<T> value, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::atomic_change(p, site, [&](T old) { return std::max(old, value); });
}
template <class P, class T = cuda_emu::PointedType<P>>
T atomicMin(P p, std::type_identity_t<T> value, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::atomic_change(p, site, [&](T old) { return std::min(old, value); });
}
template <class P, class T = cuda_emu::PointedType<P>>
T atomicExch(P p, std::type_identity_t<T> value, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::atomic_change(p, site, [&](T) { return value; });
}
template <class P, class T = cuda_emu::PointedType<P>>
T atomicCAS(P p, std::type_identity_t<T> expected, std::type_identity_t<T> value, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::atomic_change(p, site, [&](T old) { return old == expected ? value : old; });
}
template <class P, class T = cuda_emu::PointedType<P>>
T atomicOr(P p, std::type_identity_t<T> bits, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::atomic_change(p, site, [&](T old) { return T(old | bits); });
}
template <class P>
unsigned atomicInc(P p, unsigned last, cuda_emu::Site site = cuda_emu::Site()) {
    return cuda_emu::atomic_change(p, site, [&](unsigned old) { return old >= last ? 0u : old + 1; });
}

// ═══ §7  The runtime ══════════════════════════════════════════════════════════════════════════════════════════════════════
// What real CUDA reports as an error code is one here; what it leaves undefined (a wrong pointer, a host access) is a Fault. Work on
// a stream runs at once, or, with cuda_emu::lazy_streams, when the host or another stream waits for it.

// clang-format off
enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInitializationError = 3,
    cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevicePointer = 17, cudaErrorInvalidMemcpyDirection = 21,
    cudaErrorInsufficientDriver = 35, cudaErrorInvalidDeviceFunction = 98, cudaErrorNoDevice = 100, cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209, cudaErrorPeerAccessUnsupported = 217, cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorInvalidResourceHandle = 400, cudaErrorNotReady = 600, cudaErrorIllegalAddress = 700, cudaErrorLaunchOutOfResources = 701,
    cudaErrorPeerAccessAlreadyEnabled = 704, cudaErrorTooManyPeers = 711, cudaErrorLaunchFailure = 719, cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900, cudaErrorStreamCaptureInvalidated = 901, cudaErrorStreamCaptureUnmatched = 903,
    cudaErrorStreamCaptureUnjoined = 904, cudaErrorUnknown = 999
};
inline const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define LLAMA3_EMU_NAME(name) case name: return #name;
        LLAMA3_EMU_NAME(cudaSuccess) LLAMA3_EMU_NAME(cudaErrorInvalidValue) LLAMA3_EMU_NAME(cudaErrorMemoryAllocation)
        LLAMA3_EMU_NAME(cudaErrorInitializationError) LLAMA3_EMU_NAME(cudaErrorInvalidConfiguration)
        LLAMA3_EMU_NAME(cudaErrorInvalidDevicePointer) LLAMA3_EMU_NAME(cudaErrorInvalidMemcpyDirection)
        LLAMA3_EMU_NAME(cudaErrorInsufficientDriver) LLAMA3_EMU_NAME(cudaErrorInvalidDeviceFunction) LLAMA3_EMU_NAME(cudaErrorNoDevice)
        LLAMA3_EMU_NAME(cudaErrorInvalidDevice) LLAMA3_EMU_NAME(cudaErrorNoKernelImageForDevice)
        LLAMA3_EMU_NAME(cudaErrorPeerAccessUnsupported) LLAMA3_EMU_NAME(cudaErrorUnsupportedPtxVersion)
        LLAMA3_EMU_NAME(cudaErrorInvalidResourceHandle) LLAMA3_EMU_NAME(cudaErrorNotReady) LLAMA3_EMU_NAME(cudaErrorIllegalAddress)
        LLAMA3_EMU_NAME(cudaErrorLaunchOutOfResources) LLAMA3_EMU_NAME(cudaErrorPeerAccessAlreadyEnabled)
        LLAMA3_EMU_NAME(cudaErrorLaunchFailure) LLAMA3_EMU_NAME(cudaErrorTooManyPeers) LLAMA3_EMU_NAME(cudaErrorNotSupported) LLAMA3_EMU_NAME(cudaErrorStreamCaptureUnsupported)
        LLAMA3_EMU_NAME(cudaErrorStreamCaptureInvalidated) LLAMA3_EMU_NAME(cudaErrorStreamCaptureUnmatched)
        LLAMA3_EMU_NAME(cudaErrorStreamCaptureUnjoined) LLAMA3_EMU_NAME(cudaErrorUnknown)
#undef LLAMA3_EMU_NAME
    }
    return "unrecognized error code";
}
// clang-format on
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
        default: return cudaGetErrorName(error);
    }
}

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventBlockingSync = 1,
                   cudaEventDisableTiming = 2, cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2,
                   cudaHostAllocWriteCombined = 4;

struct cudaDeviceProp {
    char name[256];
    std::size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int regsPerBlock, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, major, minor, multiProcessorCount, l2CacheSize;
    int maxGridSize[3], maxThreadsDim[3];
    int integrated, canMapHostMemory, unifiedAddressing, concurrentKernels, ECCEnabled, memoryBusWidth, pciDomainID, pciBusID,
        pciDeviceID;
    struct {
        char bytes[16];
    } uuid;
};
struct cudaFuncAttributes {
    std::size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes, preferredShmemCarveout;
};

using cudaHostFn_t = void (*)(void*);

using Work = std::function<bool()>;  // false: it waits for another device, and is to be called again

struct CUgraph_st {
    std::vector<Work> nodes;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    bool broken = false;
};
struct CUgraphExec_st {
    std::shared_ptr<const std::vector<Work>> nodes;
};
struct CUstream_st {
    CUstream_st(int device, bool blocking) : device(device), blocking(blocking) {}

    int device;
    bool blocking;  // it waits for the stream 0, and that for it
    std::deque<Work> queue;
    std::uint64_t issued = 0, done = 0;
    bool running = false;
    CUgraph_st* capture = nullptr;
    bool origin = false;         // of the capture
    std::uint64_t unjoined = 0;  // nodes that a stream which joined the capture has issued and nobody has waited for
};
struct CUevent_st {
    struct State {
        CUstream_st* stream = nullptr;  // null: not recorded
        std::uint64_t position = 0;
        CUgraph_st* capture = nullptr;
        std::chrono::steady_clock::time_point time;
    };
    std::shared_ptr<State> state = std::make_shared<State>();
    bool timing = true;
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;
struct cudaGraphNode_st;
using cudaGraphNode_t = cudaGraphNode_st*;

namespace cuda_emu {

struct Runtime {
    std::vector<CUstream_st*> streams;
    std::map<int, CUstream_st*> legacy;  // stream 0 of each device
    std::map<const void*, int> shared_limit;
    std::vector<CUgraph_st*> captures;
    std::map<std::pair<int, int>, bool> peers;
    std::map<int, bool> contexts;  // of the devices that the process uses
};
inline Runtime& runtime() {
    static Runtime* const instance = new Runtime;
    return *instance;
}
inline bool has_context(int device) {
    const auto guard = std::unique_lock(memory().mutex);
    return runtime().contexts[device];
}
inline bool has_access(int device, int other) { return device == other || runtime().peers[{device, other}]; }
inline thread_local int current_device = 0;
inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}
inline std::unique_lock<std::recursive_mutex> lock() { return std::unique_lock(memory().mutex); }

inline CUstream_st* stream_of(cudaStream_t stream) {
    if (stream) {
        const auto& all = runtime().streams;
        if (std::find(all.begin(), all.end(), stream) == all.end()) fail("a stream that was destroyed, or never made, is used");
        return stream;
    }
    CUstream_st*& legacy = runtime().legacy[current_device];
    if (!legacy) legacy = new CUstream_st(current_device, true);
    return legacy;
}

// Runs the first piece of work of a stream. False: it has to wait.
inline bool advance(CUstream_st& stream) {
    if (stream.running) return false;
    auto work = std::move(stream.queue.front());
    stream.queue.pop_front();
    ++stream.done;  // before it runs: a Fault does not come twice
    struct Running {
        bool& running;
        ~Running() { running = false; }
    } const running{stream.running = true};
    if (work()) return true;
    --stream.done;
    stream.queue.push_front(std::move(work));
    return false;
}
inline bool advance_others(const CUstream_st& stream) {
    bool some = false;
    const std::vector<CUstream_st*> streams = runtime().streams;
    for (CUstream_st* other : streams)
        if (other != &stream && !other->queue.empty()) some = advance(*other) || some;
    return some;
}
// Runs what was issued to the stream up to a position, and on others what it waits for.
inline void drain(CUstream_st& stream, std::uint64_t position = ~std::uint64_t{0}, bool must = true) {
    for (int tries = 0; !stream.queue.empty() && stream.done < position;) {
        if (advance(stream) || advance_others(stream)) {
            tries = 0;
            continue;
        }
        if (!must) return;
        if (++tries == 1000) fail("a stream of device ", stream.device, " waits for other devices for ever");
    }
}
inline void drain_device(int device, bool blocking_only) {
    for (CUstream_st* stream : runtime().streams)
        if (stream->device == device && (stream->blocking || !blocking_only)) drain(*stream);
    if (const auto legacy = runtime().legacy.find(device); legacy != runtime().legacy.end()) drain(*legacy->second);
}

// A call that CUDA forbids while a stream is captured.
inline bool forbidden() {
    bool found = false;
    for (CUgraph_st* capture : runtime().captures)
        if (capture->mode != cudaStreamCaptureModeRelaxed) capture->broken = found = true;
    return found;
}

template <class F>
cudaError_t submit(cudaStream_t handle, F f) {
    Work work;
    if constexpr (std::is_same_v<decltype(f()), bool>) work = std::move(f);
    else
        work = [f = std::move(f)]() mutable {
            f();
            return true;
        };
    CUstream_st& stream = *stream_of(handle);
    if (stream.capture) {
        if (stream.capture->broken) return result(cudaErrorStreamCaptureInvalidated);
        stream.capture->nodes.push_back(std::move(work));
        if (!stream.origin) ++stream.unjoined;
        return cudaSuccess;
    }
    if (!handle) {
        for (CUgraph_st* capture : runtime().captures)
            if (capture->mode != cudaStreamCaptureModeRelaxed) {
                capture->broken = true;
                return result(cudaErrorStreamCaptureUnsupported);
            }
        for (CUstream_st* other : runtime().streams)
            if (other->device == stream.device && other->blocking) drain(*other);
    } else if (stream.blocking) {
        if (const auto legacy = runtime().legacy.find(stream.device); legacy != runtime().legacy.end()) drain(*legacy->second);
    }
    stream.queue.push_back(std::move(work));
    ++stream.issued;
    if (!lazy_streams) {
        drain(stream, ~std::uint64_t{0}, false);
        while (advance_others(stream)) drain(stream, ~std::uint64_t{0}, false);
    }
    return cudaSuccess;
}

// Is a word inside a struct that a kernel gets a pointer into this program's memory? Numbers are hardly ever: those addresses are
// above 2^46, and mapped. But padding can hold half of an old pointer, and not every compiler can clear it; so below a small number
// is taken for the other half.
inline bool is_host_pointer(std::uint64_t word) {
#if !__has_builtin(__builtin_clear_padding)
    if ((word & 0xffffffff) < 1 << 20) return false;
#endif
    if (word < std::uint64_t{0x5500} << 32 || word >> 47) return false;
    const std::uint64_t page = std::uint64_t(sysconf(_SC_PAGESIZE));
    return msync(reinterpret_cast<void*>(word / page * page), page, MS_ASYNC) == 0;
}

// A kernel's argument that points to memory of the host, or of a device that this one has no access to.
template <class T>
void check_argument(const char* kernel, int number, const T& value, int device) {
    const auto name = [&] { return std::string("kernel ") + kernel + ", argument " + std::to_string(number) + ": "; };
    T copy = value;
    std::uint64_t words[(sizeof(T) + 7) / 8] = {};
#if __has_builtin(__builtin_clear_padding)
    __builtin_clear_padding(&copy);
#endif
    std::memcpy(words, &copy, sizeof(T));
    if constexpr (alignof(T) >= 8)
        for (const std::uint64_t word : words) {
            const void* const p = reinterpret_cast<const void*>(word);
            if (const Allocation* a = memory().find(p)) {
                if (a->device >= 0 && !has_access(device, a->device))
                    fail(name(), "a pointer to memory of device ", a->device, ", on device ", device,
                         ", which has no access to it");
            } else if (std::is_pointer_v<T> && memory().on_device(p)) {
                fail(name(), "a pointer to no live allocation, ", Address{word});
            } else if (!memory().on_device(p) && (std::is_pointer_v<T> ? word != 0 : is_host_pointer(word))) {
                fail(name(), "a host pointer (", Hex{word}, "); kernels take device memory");
            }
        }
}

inline thread_local bool cooperative = false;                                // the next launch: its blocks run in turns
inline std::function<cudaError_t(const std::string& kernel)> before_launch;  // whose error, if any, is the launch's

template <class... P, class... A>
cudaError_t launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 threads, std::size_t shared_bytes,
                   cudaStream_t stream, A&&... arguments) {
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
    static_assert((std::is_trivially_copyable_v<P> && ...), "arguments are copied to the device byte by byte");
    static_assert((sizeof(P) + ... + 0) <= 4096, "CUDA takes at most 4 KB of arguments");
    const auto guard = lock();
    runtime().contexts[current_device] = true;
    const std::uint64_t count = std::uint64_t{threads.x} * threads.y * threads.z;
    if (count == 0 || count > 1024 || threads.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff ||
        grid.y > 65535 || grid.z > 65535)
        return result(cudaErrorInvalidConfiguration);
    const auto limit = runtime().shared_limit.find(reinterpret_cast<const void*>(kernel));
    if (shared_bytes > std::size_t(limit == runtime().shared_limit.end() ? 48 * 1024 : std::max(48 * 1024, limit->second)))
        return result(cudaErrorInvalidValue);
    if (const cudaError_t error = before_launch ? before_launch(name) : cudaSuccess) return result(error);
    const int on = stream_of(stream)->device;
    if (on != current_device) return result(cudaErrorInvalidResourceHandle);
    struct Call {
        void (*kernel)(P...);
        std::tuple<P...> arguments;
        static void run(const void* self) {
            std::apply(static_cast<const Call*>(self)->kernel, static_cast<const Call*>(self)->arguments);
        }
    };
    return submit(stream, [name = std::string(name), call = Call{kernel, {static_cast<P>(arguments)...}}, grid, threads,
                           shared_bytes, on, in_turns = std::exchange(cooperative, false), state = std::make_shared<Grid>()] {
        int number = 0;
        std::apply([&](const auto&... argument) { (check_argument(name.c_str(), ++number, argument, on), ...); },
                   call.arguments);
        return run_grid(*state, name.c_str(), grid, threads, shared_bytes, &Call::run, &call, in_turns, on);
    });
}

// A range that a copy or a library reads or writes: inside one allocation of the device, or wholly host memory.
inline void check_range(const char* what, const char* side, const void* p, std::size_t bytes, bool expect_device) {
    if (bytes == 0) return;
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    const Allocation* const found = memory().find(p);
    const bool pinned = found && found->device < 0;
    if (memory().on_device(p) != expect_device && !(expect_device && pinned))
        fail(what, ": the ", side, " is ", (expect_device ? "host" : "device"), " memory (found ", Address{address},
             ", expected memory of the ", (expect_device ? "device)" : "host)"));
    if ((expect_device && !found) || (found && address - found->start + bytes > found->size))
        fail(what, ": the ", side, " is out of bounds: ", bytes, " bytes at ", Address{address});
}

inline void check_copy(const char* what, const void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    check_range(what, "destination", to, bytes, kind == cudaMemcpyDefault ? memory().on_device(to) : to_device);
    check_range(what, "source", from, bytes, kind == cudaMemcpyDefault ? memory().on_device(from) : from_device);
}

}  // namespace cuda_emu

// clang-format off
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_emu::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return cuda_emu::last_error; }
// clang-format on

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = cuda_emu::device_count;
    return cuda_emu::result(cuda_emu::device_count > 0 ? cudaSuccess : cudaErrorNoDevice);
}
inline cudaError_t cudaSetDevice(int device) {
    const auto guard = cuda_emu::lock();
    if (device < 0 || device >= cuda_emu::device_count) return cuda_emu::result(cudaErrorInvalidDevice);
    cuda_emu::current_device = device;
    cuda_emu::runtime().contexts[device] = true;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_emu::current_device, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (device < 0 || device >= cuda_emu::device_count) return cuda_emu::result(cudaErrorInvalidDevice);
    const cuda_emu::Device& d = cuda_emu::device;
    *p = {};
    std::snprintf(p->name, sizeof p->name, "%s", d.name);
    p->totalGlobalMem = d.memory;
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = std::size_t(d.sharedMemPerBlockOptin);
    p->sharedMemPerMultiprocessor = std::size_t(d.sharedMemPerBlockOptin) + 1024;
    p->regsPerBlock = 65536, p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
    p->major = d.major, p->minor = d.minor, p->multiProcessorCount = d.multiProcessorCount, p->l2CacheSize = 4 << 20;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->canMapHostMemory = p->unifiedAddressing = p->concurrentKernels = 1;
    p->memoryBusWidth = 256, p->pciBusID = device + 1, p->uuid.bytes[0] = char(device + 1);
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (const cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(p.sharedMemPerBlock); break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(p.sharedMemPerBlockOptin); break;
    }
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = cuda_emu::device.driver, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
    return *can = device != peer && cuda_emu::peers_possible, cudaSuccess;
}
inline cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
    const auto guard = cuda_emu::lock();
    if (!cuda_emu::peers_possible) return cuda_emu::result(cudaErrorPeerAccessUnsupported);
    if (cuda_emu::too_many_peers) return cuda_emu::result(cudaErrorTooManyPeers);
    bool& enabled = cuda_emu::runtime().peers[{cuda_emu::current_device, peer}];
    return cuda_emu::result(std::exchange(enabled, true) ? cudaErrorPeerAccessAlreadyEnabled : cudaSuccess);
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    const auto guard = cuda_emu::lock();
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > cuda_emu::device.sharedMemPerBlockOptin) return cuda_emu::result(cudaErrorInvalidValue);
    cuda_emu::runtime().shared_limit[kernel] = value;
    return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    const auto guard = cuda_emu::lock();
    const auto limit = cuda_emu::runtime().shared_limit.find(kernel);
    const int version = 10 * cuda_emu::device.major + cuda_emu::device.minor;
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 64,
    attributes->binaryVersion = version;
    attributes->ptxVersion = cuda_emu::device.ptx > 0 ? cuda_emu::device.ptx : version;
    attributes->maxDynamicSharedSizeBytes = limit == cuda_emu::runtime().shared_limit.end() ? 48 * 1024 : limit->second;
    return cuda_emu::result(cuda_emu::device.has_kernels ? cudaSuccess : cudaErrorNoKernelImageForDevice);
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
    return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int threads, std::size_t shared_bytes) {
    *blocks = std::min(2048 / std::max(threads, 1),
                       shared_bytes ? int(std::size_t(cuda_emu::device.sharedMemPerBlockOptin) / shared_bytes) : 32);
    return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** p, std::size_t bytes) {
    const auto guard = cuda_emu::lock();
    cuda_emu::runtime().contexts[cuda_emu::current_device] = true;
    *p = nullptr;
    if (cuda_emu::device_count <= 0) return cuda_emu::result(cudaErrorNoDevice);
    if (cuda_emu::forbidden()) return cuda_emu::result(cudaErrorStreamCaptureUnsupported);
    cuda_emu::install_handlers();
    cuda_emu::Memory& m = cuda_emu::memory();
    if (bytes == 0) return cudaSuccess;
    const std::size_t used = m.used[std::size_t(cuda_emu::current_device)];
    if (used > cuda_emu::device.memory || bytes > cuda_emu::device.memory - used)
        return cuda_emu::result(cudaErrorMemoryAllocation);
    const cuda_emu::DeviceAccess access;
    *p = m.allocate(bytes, cuda_emu::current_device);
    return cuda_emu::result(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}
template <class T>
cudaError_t cudaMalloc(T** p, std::size_t bytes) {
    void* untyped = nullptr;
    const cudaError_t error = cudaMalloc(&untyped, bytes);
    *p = static_cast<T*>(untyped);
    return error;
}
inline cudaError_t cudaFree(void* p) {
    if (!p) return cudaSuccess;
    const auto guard = cuda_emu::lock();
    if (cuda_emu::forbidden()) return cuda_emu::result(cudaErrorStreamCaptureUnsupported);
    const cuda_emu::Allocation* const found = cuda_emu::memory().find(p);
    if (!found || found->device < 0 || found->start != reinterpret_cast<std::uintptr_t>(p))
        return cuda_emu::result(cudaErrorInvalidValue);
    cuda_emu::drain_device(found->device, false);
    const cuda_emu::DeviceAccess access;
    cuda_emu::memory().release(*found);
    return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** p, std::size_t bytes, unsigned) {
    const auto guard = cuda_emu::lock();
    cuda_emu::runtime().contexts[cuda_emu::current_device] = true;
    *p = nullptr;
    if (cuda_emu::device_count <= 0) return cuda_emu::result(cudaErrorNoDevice);
    if (cuda_emu::forbidden()) return cuda_emu::result(cudaErrorStreamCaptureUnsupported);
    if (bytes == 0) return cudaSuccess;
    *p = std::malloc(bytes);
    if (!*p) return cuda_emu::result(cudaErrorMemoryAllocation);
    std::memset(*p, 0xff, bytes);
    cuda_emu::Memory& m = cuda_emu::memory();
    const auto start = reinterpret_cast<std::uintptr_t>(*p);
    m.live[start] = {start, bytes, start, bytes, -1, ++m.count}, ++m.changes;
    return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** p, std::size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
template <class T>
cudaError_t cudaMallocHost(T** p, std::size_t bytes) {
    void* untyped = nullptr;
    const cudaError_t error = cudaHostAlloc(&untyped, bytes, 0);
    *p = static_cast<T*>(untyped);
    return error;
}
inline cudaError_t cudaFreeHost(void* p) {
    if (!p) return cudaSuccess;
    const auto guard = cuda_emu::lock();
    cuda_emu::Memory& m = cuda_emu::memory();
    const auto found = m.live.find(reinterpret_cast<std::uintptr_t>(p));
    if (found == m.live.end() || found->second.device >= 0) return cuda_emu::result(cudaErrorInvalidValue);
    for (int device = 0; device < cuda_emu::device_count; ++device) cuda_emu::drain_device(device, false);
    m.live.erase(found), ++m.changes;
    std::free(p);
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(std::size_t* available, std::size_t* total) {
    const auto guard = cuda_emu::lock();
    *total = cuda_emu::device.memory;
    *available = *total - std::min(*total, cuda_emu::memory().used[std::size_t(cuda_emu::current_device)]);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
    const auto guard = cuda_emu::lock();
    cuda_emu::check_copy("cudaMemcpyAsync", to, from, bytes, kind);
    const auto pageable = [](const void* p) { return !cuda_emu::memory().on_device(p) && !cuda_emu::memory().find(p); };
    if (bytes && cuda_emu::stream_of(stream)->capture && (pageable(to) || pageable(from)))
        cuda_emu::fail(
            "cudaMemcpyAsync: a graph is to copy from or to pageable host memory, which need not exist when it runs");
    // CUDA copies pageable memory before it returns; what it copies to pinned memory is not there before the stream was waited for.
    if (cuda_emu::lazy_streams && bytes && !cuda_emu::stream_of(stream)->capture && !cuda_emu::memory().on_device(to) &&
        !pageable(to))
        std::memset(to, 0xff, bytes);
    const bool now = !cuda_emu::stream_of(stream)->capture && (pageable(to) || pageable(from));
    const cudaError_t error = cuda_emu::submit(stream, [=] {
        const cuda_emu::DeviceAccess access;
        cuda_emu::check_copy("cudaMemcpyAsync", to, from, bytes, kind);
        if (bytes) std::memmove(to, from, bytes);
    });
    if (now) cuda_emu::drain(*cuda_emu::stream_of(stream));
    return error;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    const auto guard = cuda_emu::lock();
    cuda_emu::check_copy("cudaMemcpy", to, from, bytes, kind);
    if (const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr)) return error;
    cuda_emu::drain(*cuda_emu::stream_of(nullptr));
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                                     std::size_t width, std::size_t height, cudaMemcpyKind kind,
                                     cudaStream_t stream = nullptr) {
    const auto guard = cuda_emu::lock();
    if (width > to_pitch || width > from_pitch) return cuda_emu::result(cudaErrorInvalidValue);
    for (std::size_t row = 0; row < height; ++row)
        if (const cudaError_t error = cudaMemcpyAsync(static_cast<char*>(to) + row * to_pitch,
                                                      static_cast<const char*>(from) + row * from_pitch, width, kind, stream))
            return error;
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t stream = nullptr) {
    const auto guard = cuda_emu::lock();
    cuda_emu::check_range("cudaMemsetAsync", "destination", p, bytes, true);
    return cuda_emu::submit(stream, [=] {
        const cuda_emu::DeviceAccess access;
        cuda_emu::check_range("cudaMemsetAsync", "destination", p, bytes, true);
        if (bytes) std::memset(p, value, bytes);
    });
}
inline cudaError_t cudaMemset(void* p, int value, std::size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    const auto guard = cuda_emu::lock();
    cuda_emu::runtime().contexts[cuda_emu::current_device] = true;
    if (cuda_emu::device_count <= 0) return cuda_emu::result(cudaErrorNoDevice);
    *stream = new CUstream_st(cuda_emu::current_device, (flags & cudaStreamNonBlocking) == 0);
    cuda_emu::runtime().streams.push_back(*stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    const auto guard = cuda_emu::lock();
    CUstream_st& stream = *cuda_emu::stream_of(handle);
    if (stream.capture) {
        stream.capture->broken = true;
        return cuda_emu::result(cudaErrorStreamCaptureUnsupported);
    }
    if (!handle) cuda_emu::drain_device(stream.device, true);
    cuda_emu::drain(stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const auto guard = cuda_emu::lock();
    cuda_emu::runtime().contexts[cuda_emu::current_device] = true;
    cuda_emu::drain(*cuda_emu::stream_of(stream));
    std::erase(cuda_emu::runtime().streams, stream);
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
    const auto guard = cuda_emu::lock();
    cuda_emu::runtime().contexts[cuda_emu::current_device] = true;
    if (cuda_emu::forbidden()) return cuda_emu::result(cudaErrorStreamCaptureUnsupported);
    cuda_emu::drain_device(cuda_emu::current_device, false);
    return cudaSuccess;
}
inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    const auto guard = cuda_emu::lock();
    return cuda_emu::submit(stream, [=] { function(data); });
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    *event = new CUevent_st;
    (*event)->timing = (flags & cudaEventDisableTiming) == 0;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const auto guard = cuda_emu::lock();
    cuda_emu::runtime().contexts[cuda_emu::current_device] = true;
    return delete event, cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle = nullptr) {
    const auto guard = cuda_emu::lock();
    CUstream_st& stream = *cuda_emu::stream_of(handle);
    event->state = std::make_shared<CUevent_st::State>();  // who waits for the last record still does
    event->state->stream = &stream;
    if (stream.capture) {
        event->state->capture = stream.capture;
        event->state->position = stream.unjoined;
        return cudaSuccess;
    }
    const cudaError_t error =
        cuda_emu::submit(handle, [state = event->state] { state->time = std::chrono::steady_clock::now(); });
    event->state->position = stream.issued;
    return error;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned = 0) {
    const auto guard = cuda_emu::lock();
    CUstream_st& stream = *cuda_emu::stream_of(handle);
    const auto state = event->state;
    if (!state->stream) return cudaSuccess;
    if (state->capture) {
        // The captured nodes run in the order of the calls, so joining needs no edges; forgetting to is still an error.
        if (stream.capture && stream.capture != state->capture) return cuda_emu::result(cudaErrorInvalidValue);
        if (!stream.capture) stream.capture = state->capture, stream.origin = false, stream.unjoined = 0;
        if (state->stream != &stream && state->position == state->stream->unjoined && !state->stream->origin) {
            stream.unjoined += stream.origin ? 0 : state->stream->unjoined;
            state->stream->unjoined = 0;
        }
        return cudaSuccess;
    }
    return cuda_emu::submit(handle, [state] {
        cuda_emu::drain(*state->stream, state->position, false);
        return state->stream->done >= state->position;
    });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const auto guard = cuda_emu::lock();
    if (event->state->capture) return cuda_emu::result(cudaErrorStreamCaptureUnsupported);
    if (event->state->stream) cuda_emu::drain(*event->state->stream, event->state->position);
    return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    const auto guard = cuda_emu::lock();
    const bool done = !event->state->stream || event->state->stream->done >= event->state->position;
    return done ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    if (!begin->timing || !end->timing || !begin->state->stream || !end->state->stream)
        return cuda_emu::result(cudaErrorInvalidResourceHandle);
    if (cudaEventQuery(begin) != cudaSuccess || cudaEventQuery(end) != cudaSuccess) return cuda_emu::result(cudaErrorNotReady);
    *milliseconds = std::chrono::duration<float, std::milli>(end->state->time - begin->state->time).count();
    return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    const auto guard = cuda_emu::lock();
    if (!handle) return cuda_emu::result(cudaErrorStreamCaptureUnsupported);
    CUstream_st& stream = *cuda_emu::stream_of(handle);
    if (stream.capture) return cuda_emu::result(cudaErrorInvalidValue);
    stream.capture = new CUgraph_st{.nodes = {}, .mode = mode};
    stream.origin = true;
    cuda_emu::runtime().captures.push_back(stream.capture);
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    const auto guard = cuda_emu::lock();
    CUstream_st& stream = *cuda_emu::stream_of(handle);
    *graph = nullptr;
    if (!stream.capture) return cuda_emu::result(cudaErrorInvalidValue);
    if (!stream.origin) return cuda_emu::result(cudaErrorStreamCaptureUnmatched);
    CUgraph_st* const captured = stream.capture;
    bool joined = true;
    for (CUstream_st* other : cuda_emu::runtime().streams)
        if (other->capture == captured) {
            joined &= other->unjoined == 0;
            other->capture = nullptr, other->origin = false, other->unjoined = 0;
        }
    std::erase(cuda_emu::runtime().captures, captured);
    if (!captured->broken && joined) return *graph = captured, cudaSuccess;
    const cudaError_t error = captured->broken ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnjoined;
    delete captured;
    return cuda_emu::result(error);
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    const auto guard = cuda_emu::lock();
    const CUgraph_st* const capture = cuda_emu::stream_of(stream)->capture;
    *status = !capture          ? cudaStreamCaptureStatusNone
              : capture->broken ? cudaStreamCaptureStatusInvalidated
                                : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long = 0) {
    *exec = new CUgraphExec_st{std::make_shared<const std::vector<Work>>(graph->nodes)};
    return cudaSuccess;
}
inline cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, std::size_t* count) {
    return *count = graph->nodes.size(), cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    const auto guard = cuda_emu::lock();
    return cuda_emu::submit(stream, [nodes = exec->nodes, done = std::size_t{0}]() mutable {
        const cuda_emu::DeviceAccess access;  // opened once for all of them
        while (done < nodes->size() && (*nodes)[done]()) ++done;
        return done == nodes->size();
    });
}
inline cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

// ═══ §8  cuBLASLt ═════════════════════════════════════════════════════════════════════════════════════════════════════════
// D = alpha op(A) op(B) + beta C with sums in float, in the order of k. Column-major unless a layout says otherwise.

// clang-format off
enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_ALLOC_FAILED = 3, CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8, CUBLAS_STATUS_EXECUTION_FAILED = 13, CUBLAS_STATUS_INTERNAL_ERROR = 14, CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasComputeType_t { CUBLAS_COMPUTE_16F = 64, CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_16BF = 75 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
using cudaDataType_t = cudaDataType;
enum cublasLtOrder_t { CUBLASLT_ORDER_COL = 0, CUBLASLT_ORDER_ROW = 1 };
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_TYPE = 0, CUBLASLT_MATRIX_LAYOUT_ORDER = 1, CUBLASLT_MATRIX_LAYOUT_ROWS = 2, CUBLASLT_MATRIX_LAYOUT_COLS = 3,
    CUBLASLT_MATRIX_LAYOUT_LD = 4, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
};
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4, CUBLASLT_MATMUL_DESC_EPILOGUE = 7 };
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1 };
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_SEARCH_MODE = 0, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};
enum cublasLtReductionScheme_t {
    CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_INPLACE = 1, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
    CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4, CUBLASLT_REDUCTION_SCHEME_MASK = 7
};
// clang-format on

struct cublasLtContext {};
using cublasLtHandle_t = cublasLtContext*;
struct cublasLtMatmulDescOpaque_t {
    cublasComputeType_t compute;
    cudaDataType scale;
    std::int32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
};
struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType type;
    std::uint64_t rows, columns;
    std::int64_t ld;
    std::int32_t order = CUBLASLT_ORDER_COL, batch = 1;
    std::int64_t batch_stride = 0;

    std::size_t element_bytes() const { return type == CUDA_R_32F ? 4 : 2; }
    std::size_t at(std::uint64_t row, std::uint64_t column) const {
        return std::size_t(order == CUBLASLT_ORDER_COL ? row + column * std::uint64_t(ld) : row * std::uint64_t(ld) + column);
    }
    bool valid() const {
        return rows && columns && ld >= std::int64_t(order == CUBLASLT_ORDER_COL ? rows : columns) && batch >= 1;
    }
    std::size_t bytes() const {
        return (at(rows - 1, columns - 1) + 1 + std::size_t(batch - 1) * std::size_t(batch_stride)) * element_bytes();
    }
};
struct cublasLtMatmulPreferenceOpaque_t {
    std::uint64_t workspace = 0;
};
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;
struct cublasLtMatmulAlgo_t {
    std::uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    std::size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
};

inline const char* cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
        case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_ARCH_MISMATCH: return "CUBLAS_STATUS_ARCH_MISMATCH";
        case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_INTERNAL_ERROR: return "CUBLAS_STATUS_INTERNAL_ERROR";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "unknown";
}
inline const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }
inline std::size_t cublasLtGetVersion() { return 130000; }

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return *handle = new cublasLtContext, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return delete handle, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType scale) {
    return *desc = new cublasLtMatmulDescOpaque_t{compute, scale}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return delete desc, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, std::uint64_t rows,
                                                 std::uint64_t columns, std::int64_t ld) {
    return *layout = new cublasLtMatrixLayoutOpaque_t{type, rows, columns, ld}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return delete layout, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    return *preference = new cublasLtMatmulPreferenceOpaque_t, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return delete preference, CUBLAS_STATUS_SUCCESS;
}

namespace cuda_emu {
template <class T>
cublasStatus_t set_attribute(T& to, const void* from, std::size_t bytes) {
    if (!from || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(&to, from, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
}  // namespace cuda_emu

inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, std::size_t bytes) {
    std::int32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_TRANSA: return cuda_emu::set_attribute(desc->transpose_a, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSB: return cuda_emu::set_attribute(desc->transpose_b, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            if (const cublasStatus_t status = cuda_emu::set_attribute(epilogue, value, bytes)) return status;
            return epilogue == CUBLASLT_EPILOGUE_DEFAULT ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute,
                                                       const void* value, std::size_t bytes) {
    switch (attribute) {
        case CUBLASLT_MATRIX_LAYOUT_TYPE: return cuda_emu::set_attribute(layout->type, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_ORDER: return cuda_emu::set_attribute(layout->order, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_ROWS: return cuda_emu::set_attribute(layout->rows, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_COLS: return cuda_emu::set_attribute(layout->columns, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_LD: return cuda_emu::set_attribute(layout->ld, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return cuda_emu::set_attribute(layout->batch, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return cuda_emu::set_attribute(layout->batch_stride, value, bytes);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                           std::size_t bytes) {
    std::uint32_t ignored = 0;
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
        return cuda_emu::set_attribute(preference->workspace, value, bytes);
    return cuda_emu::set_attribute(ignored, value, bytes);
}

namespace cuda_emu {

inline cublasStatus_t check_matmul(const cublasLtMatmulDescOpaque_t& desc, const cublasLtMatrixLayoutOpaque_t& a,
                                   const cublasLtMatrixLayoutOpaque_t& b, const cublasLtMatrixLayoutOpaque_t& c,
                                   const cublasLtMatrixLayoutOpaque_t& d) {
    const bool ta = desc.transpose_a == CUBLAS_OP_T, tb = desc.transpose_b == CUBLAS_OP_T;
    if (!a.valid() || !b.valid() || !c.valid() || !d.valid()) return CUBLAS_STATUS_INVALID_VALUE;
    if ((ta ? a.columns : a.rows) != d.rows || (tb ? b.rows : b.columns) != d.columns ||
        (ta ? a.rows : a.columns) != (tb ? b.columns : b.rows) || c.rows != d.rows || c.columns != d.columns)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (a.batch != d.batch || b.batch != d.batch || c.batch != d.batch) return CUBLAS_STATUS_INVALID_VALUE;
    if (desc.compute != CUBLAS_COMPUTE_32F || desc.scale != CUDA_R_32F || a.type != b.type || c.type != d.type ||
        (d.type != CUDA_R_32F && d.type != a.type))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

inline float element(const void* base, cudaDataType type, std::size_t at) {
    if (type == CUDA_R_32F) return static_cast<const float*>(base)[at];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(base)[at];
    return type == CUDA_R_16BF ? bf16_value(bits) : half_value(bits);
}
inline void set_element(void* base, cudaDataType type, std::size_t at, float value) {
    if (type == CUDA_R_32F) static_cast<float*>(base)[at] = value;
    else static_cast<std::uint16_t*>(base)[at] = type == CUDA_R_16BF ? bf16_bits(value) : half_bits(value);
}

}  // namespace cuda_emu

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                                     cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                                     cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference,
                                                     int wanted, cublasLtMatmulHeuristicResult_t* results, int* found) {
    *found = 0;
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    if (const cublasStatus_t status = cuda_emu::check_matmul(*desc, *a, *b, *c, *d)) return status;
    // All the workspace that is allowed is asked for, so that one that is too small, or missing, is seen.
    results[0] = {{}, std::size_t(preference ? preference->workspace : 0), CUBLAS_STATUS_SUCCESS, 1.f, {}};
    results[0].algo.data[0] = results[0].workspaceSize;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                                     cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                                     const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                                     cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo, void* workspace,
                                     std::size_t workspace_bytes, cudaStream_t stream) {
    const auto guard = cuda_emu::lock();
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (const cublasStatus_t status = cuda_emu::check_matmul(*desc, *a_layout, *b_layout, *c_layout, *d_layout)) return status;
    if (algo && algo->data[0] > workspace_bytes) return CUBLAS_STATUS_INVALID_VALUE;
    if (reinterpret_cast<std::uintptr_t>(workspace) % 16) return CUBLAS_STATUS_INVALID_VALUE;
    const float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
    const auto work = [=, device = cuda_emu::stream_of(stream)->device, desc = *desc, la = *a_layout, lb = *b_layout,
                       lc = *c_layout, ld = *d_layout] {
        const cuda_emu::DeviceAccess access;
        cuda_emu::check_range("cublasLtMatmul", "matrix A", a, la.bytes(), true);
        cuda_emu::check_range("cublasLtMatmul", "matrix B", b, lb.bytes(), true);
        if (keep != 0) cuda_emu::check_range("cublasLtMatmul", "matrix C", c, lc.bytes(), true);
        cuda_emu::check_range("cublasLtMatmul", "matrix D", d, ld.bytes(), true);
        cuda_emu::check_range("cublasLtMatmul", "workspace", workspace, workspace_bytes, true);
        for (const void* p : {a, b, c, static_cast<const void*>(d), static_cast<const void*>(workspace)})
            if (const auto* found = cuda_emu::memory().find(p))
                if (found->device >= 0 && !cuda_emu::has_access(device, found->device))
                    cuda_emu::fail("cublasLtMatmul: memory of device ", found->device, ", on device ", device);
        const bool ta = desc.transpose_a == CUBLAS_OP_T, tb = desc.transpose_b == CUBLAS_OP_T;
        const std::size_t m = ld.rows, n = ld.columns, inner = ta ? la.rows : la.columns;
        if (workspace_bytes) std::memset(workspace, 0xff, workspace_bytes);
        std::vector<float> right(inner * n), sums(n);
        for (std::size_t batch = 0; batch < std::size_t(ld.batch); ++batch) {
            for (std::size_t k = 0; k < inner; ++k)
                for (std::size_t j = 0; j < n; ++j)
                    right[k * n + j] =
                        cuda_emu::element(b, lb.type, (tb ? lb.at(j, k) : lb.at(k, j)) + batch * std::size_t(lb.batch_stride));
            for (std::size_t i = 0; i < m; ++i) {
                std::fill(sums.begin(), sums.end(), 0.f);
                for (std::size_t k = 0; k < inner; ++k) {
                    const float left =
                        cuda_emu::element(a, la.type, (ta ? la.at(k, i) : la.at(i, k)) + batch * std::size_t(la.batch_stride));
                    for (std::size_t j = 0; j < n; ++j) sums[j] += left * right[k * n + j];
                }
                for (std::size_t j = 0; j < n; ++j) {
                    float value = scale * sums[j];
                    if (keep != 0)
                        value += keep * cuda_emu::element(c, lc.type, lc.at(i, j) + batch * std::size_t(lc.batch_stride));
                    cuda_emu::set_element(d, ld.type, ld.at(i, j) + batch * std::size_t(ld.batch_stride), value);
                }
            }
        }
    };
    return cuda_emu::submit(stream, work) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
#endif  // LLAMA3_CUDA_EMU_HPP
