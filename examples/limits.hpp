// What this machine can do at best, measured with loops of our own: reading memory, and the multiply instructions of each
// instruction set. bench.cpp holds the runtime against these. Rates count a multiplication and an addition as two operations.
#ifndef LLAMA3_EXAMPLES_LIMITS_HPP
#define LLAMA3_EXAMPLES_LIMITS_HPP

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <span>
#include <string>
#include <thread>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace limits {

inline double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// body(thread) on several threads at once: seconds from the first start to the last end.
template <class Body>
double timed(int threads, const Body& body) {
    std::vector<double> starts(static_cast<std::size_t>(threads)), ends(starts);
    std::atomic<int> waiting{threads};
    const auto work = [&](int t) {
        --waiting;
        while (waiting > 0) std::this_thread::yield();
        starts[static_cast<std::size_t>(t)] = seconds();
        body(t);
        ends[static_cast<std::size_t>(t)] = seconds();
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (std::thread& other : others) other.join();
    return *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
}

// Right after a model's work OpenMP's threads still spin, on the cores that are measured here: waits until they are asleep.
inline void settle() {
    for (int i = 0; i < 100; ++i) {
        const std::clock_t used = std::clock();  // by all threads
        std::this_thread::sleep_for(std::chrono::milliseconds(3));
        if (std::clock() - used < CLOCKS_PER_SEC / 1000) return;
    }
}

inline std::atomic<std::uint64_t> sink;  // results go here, so that no compiler drops the work

// Each reads `streams` equal parts of the bytes side by side, 256 bytes of each in turn, fetching them `ahead` bytes early, and
// `farther` bytes early into the second-level cache.
using Reader = std::uint64_t (*)(const std::byte* data, std::size_t bytes, int streams, int ahead, int farther);

inline std::uint64_t read_plain(const std::byte* data, std::size_t bytes, int streams, int, int) {
    const std::size_t part = bytes / static_cast<std::size_t>(streams) / 256 * 256;
    std::uint64_t sums[4] = {};
    for (std::size_t at = 0; at < part; at += 32)
        for (int s = 0; s < streams; ++s) {
            const auto* words = reinterpret_cast<const std::uint64_t*>(data + static_cast<std::size_t>(s) * part + at);
            for (int i = 0; i < 4; ++i) sums[i] ^= words[i];
        }
    return sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
}

#ifdef __x86_64__
__attribute__((target("avx512f"))) inline std::uint64_t read_avx512(const std::byte* data, std::size_t bytes, int streams,
                                                                    int ahead, int farther) {
    const std::size_t part = bytes / static_cast<std::size_t>(streams) / 256 * 256;
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (std::size_t at = 0; at < part; at += 256)
        for (int s = 0; s < streams; ++s) {
            const std::byte* p = data + static_cast<std::size_t>(s) * part + at;
            for (int line = 0; line < 256; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(p + ahead + line), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(p + farther + line), _MM_HINT_T1);
            }
            a = _mm512_xor_si512(a, _mm512_load_si512(p));
            b = _mm512_xor_si512(b, _mm512_load_si512(p + 64));
            c = _mm512_xor_si512(c, _mm512_load_si512(p + 128));
            d = _mm512_xor_si512(d, _mm512_load_si512(p + 192));
        }
    a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    alignas(64) std::uint64_t lanes[8];
    _mm512_store_si512(lanes, a);
    return lanes[0] ^ lanes[7];
}

__attribute__((target("avx2"))) inline std::uint64_t read_avx2(const std::byte* data, std::size_t bytes, int streams, int ahead,
                                                               int farther) {
    const std::size_t part = bytes / static_cast<std::size_t>(streams) / 256 * 256;
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (std::size_t at = 0; at < part; at += 256)
        for (int s = 0; s < streams; ++s) {
            const std::byte* p = data + static_cast<std::size_t>(s) * part + at;
            for (int line = 0; line < 256; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(p + ahead + line), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(p + farther + line), _MM_HINT_T1);
            }
            const auto* v = reinterpret_cast<const __m256i*>(p);
            a = _mm256_xor_si256(_mm256_xor_si256(a, _mm256_load_si256(v)), _mm256_load_si256(v + 1));
            b = _mm256_xor_si256(_mm256_xor_si256(b, _mm256_load_si256(v + 2)), _mm256_load_si256(v + 3));
            c = _mm256_xor_si256(_mm256_xor_si256(c, _mm256_load_si256(v + 4)), _mm256_load_si256(v + 5));
            d = _mm256_xor_si256(_mm256_xor_si256(d, _mm256_load_si256(v + 6)), _mm256_load_si256(v + 7));
        }
    a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    return static_cast<std::uint64_t>(_mm256_extract_epi64(a, 0) ^ _mm256_extract_epi64(a, 3));
}

// n rounds of one instruction (or group) on twelve independent chains, registers 0 to 11, enough to hide its latency.
#define LLAMA3_CHAINS(line) \
    line("0") line("1") line("2") line("3") line("4") line("5") line("6") line("7") line("8") line("9") line("10") line("11")
#define LLAMA3_MULTIPLY(name, v, line)                                                                                 \
    inline void name(long n) {                                                                                         \
        static const std::uint32_t one = 0x3f803f80; /* bf16 1, 1; f32 1.002; int8 -128, 63, -128, 63 */               \
        asm volatile("vbroadcastss (%1), %%" v "12\n\tvbroadcastss (%1), %%" v "13\n\tvbroadcastss (%1), %%" v         \
                     "14\n"                                                                                            \
                     "1:\n\t" LLAMA3_CHAINS(line) "decq %0\n\tjnz 1b\n\tvzeroupper"                                    \
                     : "+r"(n)                                                                                         \
                     : "r"(&one)                                                                                       \
                     : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                       "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                                          \
    }
#define LLAMA3_INT8_AVX512(i) "vpdpbusd %%zmm12, %%zmm13, %%zmm" i "\n\t"
#define LLAMA3_BF16_AVX512(i) "vdpbf16ps %%zmm12, %%zmm13, %%zmm" i "\n\t"
#define LLAMA3_F32_AVX512(i) "vfmadd231ps %%zmm12, %%zmm13, %%zmm" i "\n\t"
#define LLAMA3_INT8_AVXVNNI(i) "%{vex%} vpdpbusd %%ymm12, %%ymm13, %%ymm" i "\n\t"
#define LLAMA3_INT8_AVX2(i)                                                         \
    "vpsignb %%ymm13, %%ymm12, %%ymm15\n\tvpmaddubsw %%ymm15, %%ymm13, %%ymm15\n\t" \
    "vpmaddwd %%ymm14, %%ymm15, %%ymm15\n\tvpaddd %%ymm15, %%ymm" i ", %%ymm" i "\n\t"
#define LLAMA3_F32_AVX2(i) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" i "\n\t"
LLAMA3_MULTIPLY(int8_avx512, "zmm", LLAMA3_INT8_AVX512)
LLAMA3_MULTIPLY(bf16_avx512, "zmm", LLAMA3_BF16_AVX512)
LLAMA3_MULTIPLY(f32_avx512, "zmm", LLAMA3_F32_AVX512)
LLAMA3_MULTIPLY(int8_avxvnni, "ymm", LLAMA3_INT8_AVXVNNI)
LLAMA3_MULTIPLY(int8_avx2, "ymm", LLAMA3_INT8_AVX2)
LLAMA3_MULTIPLY(f32_avx2, "ymm", LLAMA3_F32_AVX2)
#endif

#if defined(__x86_64__) && defined(__linux__)
// The same for tiles of 16 x 16: four chains. The runtime has asked the system for the tile registers.
#define LLAMA3_TILE_MULTIPLY(name, instruction)                                                      \
    __attribute__((target("amx-tile,amx-int8,amx-bf16"))) inline void name(long n) {                 \
        alignas(64) std::uint8_t shapes[64] = {1};                                                   \
        for (int tile = 0; tile < 8; ++tile) shapes[16 + 2 * tile] = 64, shapes[48 + tile] = 16;     \
        asm volatile("" ::: "memory"); /* g++ 12 believes that the next instruction reads 8 bytes */ \
        _tile_loadconfig(shapes);                                                                    \
        for (long i = 0; i < n; ++i) {                                                               \
            instruction(0, 4, 6);                                                                    \
            instruction(1, 4, 7);                                                                    \
            instruction(2, 5, 6);                                                                    \
            instruction(3, 5, 7);                                                                    \
        }                                                                                            \
        _tile_release();                                                                             \
    }
LLAMA3_TILE_MULTIPLY(int8_amx, _tile_dpbssd)
LLAMA3_TILE_MULTIPLY(bf16_amx, _tile_dpbf16ps)
#endif

inline void f32_plain(long n) {
    volatile float start = 1;
    float chains[12] = {}, x = start, y = start;
    for (long i = 0; i < n; ++i)
        for (float& chain : chains) chain += x * y;
    for (const float chain : chains) sink = sink + static_cast<std::uint64_t>(chain);
}

// The fastest multiplication of one type that an instruction set of the runtime uses; nullptr where it has none.
struct Multiply {
    void (*round)(long n) = nullptr;
    int operations = 0;  // per instruction or group
    int chains = 12;
    long n = 10'000'000;

    double rate(int threads) const {  // giga-operations per second
        if (round == nullptr) return 0;
        settle();
        return static_cast<double>(n) * chains * operations * threads / timed(threads, [&](int) { round(n); }) * 1e-9;
    }
};

struct Machine {
    Reader read = read_plain;
    Multiply int8, bf16, f32 = {f32_plain, 2}, int8_tiles, bf16_tiles;

    explicit Machine([[maybe_unused]] const std::string& isa) {
#ifdef __x86_64__
#ifdef __linux__
        if (isa == "amx") int8_tiles = {int8_amx, 32768, 4, 1'000'000}, bf16_tiles = {bf16_amx, 16384, 4, 1'000'000};
#endif
        if (isa.find("avx512") != std::string::npos || isa == "amx") {
            read = read_avx512, f32 = {f32_avx512, 32}, int8 = {int8_avx512, 128};
            if (__builtin_cpu_supports("avx512bf16")) bf16 = {bf16_avx512, 64};
        } else if (isa.find("avx") != std::string::npos) {
            read = read_avx2, f32 = {f32_avx2, 16}, int8 = {int8_avx2, 64};
            if (isa.find("vnni") != std::string::npos) int8 = {int8_avxvnni, 64};
        }
#endif
    }
};

// Reading a model's weights, each matrix cut into one contiguous part per thread, as decode does.
struct Memory {
    std::vector<std::span<const std::byte>> ranges;
    Reader read;
    int streams = 1, ahead = 0, farther = 0;  // of each thread

    std::size_t bytes() const {
        std::size_t sum = 0;
        for (const auto& range : ranges) sum += range.size();
        return sum;
    }
    double rate(int threads) const {  // gigabytes per second
        settle();
        const int passes = static_cast<int>(1 + 500'000'000 / bytes());
        const double time = timed(threads, [&](int t) {
            for (int pass = 0; pass < passes; ++pass)
                for (const auto& range : ranges) {
                    const std::size_t part = range.size() / static_cast<std::size_t>(threads) / 64 * 64;
                    sink = sink ^ read(range.data() + static_cast<std::size_t>(t) * part, part, streams, ahead, farther);
                }
        });
        return static_cast<double>(bytes()) * passes / time * 1e-9;
    }
    // Finds the best number of streams, without prefetching, with it, and with it into two levels of caches.
    void tune(int threads) {
        double best = 0;
        Memory trial = *this;
        for (int round = 0; round < 3; ++round)
            for (trial.streams = 1; trial.streams <= 4; trial.streams *= 2)
                for (const auto& [first, second] : {std::pair(0, 0), {1024, 1024}, {2048, 2048}, {1024, 4096}, {2048, 8192}}) {
                    trial.ahead = first, trial.farther = second;
                    if (const double rate = trial.rate(threads); rate > best)
                        best = rate, streams = trial.streams, ahead = trial.ahead, farther = trial.farther;
                }
    }
};

}  // namespace limits

#endif
