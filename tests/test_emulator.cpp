// The CUDA emulator itself: every mistake it is there to find is planted once and found, and the right twin of each kernel runs in
// every order of threads. What it lets through, no test of a kernel would see.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <random>
#include <thread>

#include "cuda_emu.hpp"

namespace {

using cuda_emu::Order;
using cuda_emu::Shared;
using cuda_emu::shared_memory;

constexpr unsigned all = 0xffffffff;

const char* name_of(Order order) {
    return order == Order::forward ? "forward" : order == Order::reverse ? "reverse" : "random";
}

// Runs `test` in every order, with a few seeds of the random one.
template <class Test>
void in_every_order(const Test& test) {
    for (const Order order : {Order::forward, Order::reverse, Order::random})
        for (cuda_emu::seed = 1; cuda_emu::seed <= (order == Order::random ? 5 : 1); ++cuda_emu::seed) {
            cuda_emu::order = order;
            CAPTURE(name_of(order));
            test();
        }
    cuda_emu::order = Order::forward;
}

// An array on the device.
template <class T>
struct Array {
    std::size_t n;
    T* at = nullptr;
    explicit Array(std::size_t n) : n(n) { REQUIRE(cudaMalloc(&at, n * sizeof(T)) == cudaSuccess); }
    explicit Array(const std::vector<T>& values) : Array(values.size()) {
        REQUIRE(cudaMemcpy(at, values.data(), n * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
    }
    ~Array() { cudaFree(at); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    std::vector<T> values() const {
        std::vector<T> result(n);
        REQUIRE(cudaMemcpy(result.data(), at, n * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
        return result;
    }
};

// clang-format off
template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, dim3 threads, std::size_t shared_bytes, A... arguments) {
    CHECK(cuda_emu::launch("planted", kernel, grid, threads, shared_bytes, nullptr, arguments...) == cudaSuccess);
}
template <class... P, class... A>
std::string fault_of(void (*kernel)(P...), dim3 grid, dim3 threads, std::size_t shared_bytes, A... arguments) {
    try {
        cuda_emu::launch("planted", kernel, grid, threads, shared_bytes, nullptr, arguments...);
    } catch (const cuda_emu::Fault& fault) {
        return fault.what();
    }
    return "";
}
// clang-format on

template <class F>
std::string fault_in(const F& f) {
    try {
        f();
    } catch (const cuda_emu::Fault& fault) {
        return fault.what();
    }
    return "";
}

int count(const std::string& text, const std::string& part) {
    int n = 0;
    for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
    return n;
}
#define CHECK_SAYS(text, part) CHECK_MESSAGE(count(text, part) > 0, "found: ", text)

// What a forked child prints to its standard error before it ends, and whether a signal ended it.
template <class F>
std::pair<std::string, bool> death_of(const F& f) {
    int pipes[2];
    REQUIRE(pipe(pipes) == 0);
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        dup2(pipes[1], 2);
        for (const int number : {SIGSEGV, SIGBUS}) signal(number, SIG_DFL);  // not the test framework's
        cuda_emu::install_handlers();
        f();
        _exit(0);
    }
    close(pipes[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t n = 0; (n = read(pipes[0], buffer, sizeof buffer)) > 0;) text.append(buffer, std::size_t(n));
    close(pipes[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return {text, WIFSIGNALED(status)};
}

// ─── Kernels, right and wrong ─────────────────────────────────────────────────────────────────────────────────────────────

// out[block] = the sum of the block's part of x: through shared memory, then a warp.
template <bool barrier, bool whole_mask>
void sum_kernel(float* out, const float* x) {
    const auto s = shared_memory<float>();
    const unsigned t = threadIdx.x;
    float v = x[blockIdx.x * blockDim.x + t];
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(all, v, step);
    if (t % 32 == 0) s[t / 32] = v;
    if (barrier) __syncthreads();
    if (t < 8) {
        v = s[t];
        for (int step = 4; step > 0; step /= 2) v += __shfl_xor_sync(whole_mask ? all : 0xff, v, step);
        if (t == 0) out[blockIdx.x] = v;
    }
}

void early_exit_kernel(int lanes) {
    if (int(threadIdx.x) >= lanes) return;
    __syncthreads();
}

void two_barriers_kernel(int) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
}

void barrier_against_shuffle_kernel(int) {
    int v = int(threadIdx.x);
    if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(all, v, 1);
    else __syncthreads();
    (void)v;
}

void two_shuffles_kernel(int) {
    int v = int(threadIdx.x);
    if (v < 16) v += __shfl_xor_sync(all, v, 1);
    else v += __shfl_xor_sync(all, v, 2);
    (void)v;
}

void cross_wait_kernel(
    int) {  // warp 0 at a barrier, half of warp 1 at a shuffle the other half never reaches: it waits at the barrier
    if (threadIdx.x >= 48) __syncwarp(all);
    else __syncthreads();
}

void foreign_mask_kernel(unsigned* out, unsigned mask) { out[threadIdx.x] = __ballot_sync(mask, 1); }

void outside_source_kernel(int* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff, int(threadIdx.x), 20);
}

void end_before_shuffle_kernel(int* out) {
    if (threadIdx.x == 31) return;
    out[threadIdx.x] = __shfl_sync(all, int(threadIdx.x), 0);
}

// out = x reversed within the block. `ordered`: with the barrier it needs.
template <bool ordered>
void reverse_kernel(std::uint16_t* out, const std::uint16_t* x) {
    const auto s = shared_memory<std::uint16_t>();
    s[threadIdx.x] = x[threadIdx.x];
    if (ordered) __syncthreads();
    out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}

// The same within a warp, where __syncwarp is enough.
template <bool ordered>
void reverse_warp_kernel(int* out) {
    const auto s = shared_memory<int>() + 32 * (threadIdx.x / 32);
    const unsigned lane = threadIdx.x % 32;
    for (int round = 0; round < 3; ++round) {
        s[lane] = int(threadIdx.x) + round;
        __syncwarp();
        out[threadIdx.x] = s[31 - lane];
        if (ordered) __syncwarp();
    }
}

// Two half warps that each synchronise among themselves only. `across`: the lower one reads what the upper one wrote.
template <bool across>
void half_warps_kernel(int* out) {
    const auto s = shared_memory<int>();
    const unsigned lane = threadIdx.x;
    s[lane] = int(lane);
    __syncwarp(lane < 16 ? 0xffff : 0xffff0000);
    out[lane] = s[lane < 16 ? (across ? 31 - lane : 15 - lane) : 47 - lane];
}

void shuffle_as_barrier_kernel(int* out) {
    const auto s = shared_memory<int>();
    s[threadIdx.x] = 1;
    __shfl_sync(all, 0, 0);
    out[threadIdx.x] = s[31 - threadIdx.x];
}

// All threads write one byte each of a word, then all read the words of others.
template <bool overlap>
void bytes_kernel(unsigned* out) {
    const auto bytes = shared_memory<unsigned char>();
    const unsigned t = threadIdx.x;
    bytes[t] = static_cast<unsigned char>(t);
    if (overlap && t == 5) bytes[6] = 0;
    __syncthreads();
    if (t < blockDim.x / 4) out[t] = cuda_emu::shared_cast<unsigned>(bytes)[t];
}

void count_kernel(int* out, bool plain) {
    const auto s = shared_memory<int>();
    if (threadIdx.x == 0) s[0] = 0;
    __syncthreads();
    atomicAdd(&s[0], 1);
    if (plain && threadIdx.x == 9) s[0] = 7;
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(out, s[0]);
}

// wait: -1 none, else how many groups may be under way.
template <int wait>
void copy_kernel(uint4* out, const uint4* x) {
    const auto s = shared_memory<uint4>();
    for (unsigned part = 0; part < 2; ++part) {
        cuda_emu::copy_async16(s + (part * blockDim.x + threadIdx.x), x + part * blockDim.x + threadIdx.x);
        cuda_emu::copy_async_commit();
    }
    if constexpr (wait >= 0) cuda_emu::copy_async_wait<wait>();
    for (unsigned part = 0; part < 2; ++part) {
        const uint4 v = s[part * blockDim.x + threadIdx.x];
        out[part * blockDim.x + threadIdx.x] = v;
    }
    if constexpr (wait > 0) cuda_emu::copy_async_wait<0>();
}

template <bool barrier>
void copy_for_others_kernel(uint4* out, const uint4* x) {
    const auto s = shared_memory<uint4>();
    cuda_emu::copy_async16(s + threadIdx.x, x + threadIdx.x);
    cuda_emu::copy_async_commit();
    cuda_emu::copy_async_wait<0>();
    if (barrier) __syncthreads();
    cuda_emu::store16(out + threadIdx.x, cuda_emu::load16<uint4>(s + (threadIdx.x ^ 1)));
}

void send_kernel(float* box) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    const float x = float(i) + 1;
    cuda_emu::store_remote16(box + 4 * i, make_float4(x, x, x, x));
}
void wait_kernel(const float* box, float* seen) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned looks = 0;
    float4 v = cuda_emu::load_remote16(box + 4 * i);
    for (; v.x == 0; v = cuda_emu::load_remote16(box + 4 * i)) cuda_emu::wait_for_others(looks);
    __syncthreads();
    cuda_emu::store16(seen + 4 * i, v);
}
// A number goes round, `rounds` times; -1: it is waited for, and never comes.
void ring_kernel(float* boxes, int rounds) {
    const unsigned next = (blockIdx.x + 1) % gridDim.x;
    unsigned looks = 0;
    for (int i = 0; i < (rounds < 0 ? 1 : rounds); ++i) {
        const float expected = float(i) + (blockIdx.x > 0) - float(rounds < 0) * 100;
        if (threadIdx.x == 0) {
            while (cuda_emu::load_remote16(boxes + 4 * blockIdx.x).x != expected) cuda_emu::wait_for_others(looks);
            const float x = float(i) + 1;
            cuda_emu::store_remote16(boxes + 4 * next, make_float4(x, x, x, x));
        }
        __syncthreads();
    }
}
void through_table_kernel(float* const* table, float* out) {
    cuda_emu::store16(out, cuda_emu::load16<float4>(table[0]));
}
void scale_kernel(float* p, float by, int n) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) p[i] *= by;
}
void load_kernel(uint4* out, const unsigned char* x, int offset) {
    out[threadIdx.x] = cuda_emu::load16<uint4>(x + offset + 16 * threadIdx.x);
}
void shared_index_kernel(float* out, int index) {
    const auto s = shared_memory<float>();
    s[index] = 1;
    out[0] = s[index];
}
void misaligned_shared_kernel(uint4* out) { out[0] = cuda_emu::load16<uint4>(shared_memory<float>() + 2); }
void unwritten_kernel(float* out) {
    if (threadIdx.x % 2 == 0) out[threadIdx.x] = 1;
}
void recursion_kernel(float* out) {
    volatile char large[2000];
    large[0] = 1;
    if (out[0] != 12345.f) recursion_kernel(out);
    out[1] = large[0];
}
void order_kernel(int* out, int* next) { out[atomicAdd(next, 1)] = int(blockIdx.x * blockDim.x + threadIdx.x); }
void poison_kernel(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

struct Place {
    int rows;
    float* data;
};
void place_kernel(Place place) { place.data[0] = float(place.rows); }

}  // namespace

// ─── Threads, barriers, shuffles ──────────────────────────────────────────────────────────────────────────────────────────

TEST_SUITE("core: CUDA emulator") {
    TEST_CASE("a sum over blocks, barriers and shuffles is right in every order") {
        std::vector<float> x(4 * 256);
        std::iota(x.begin(), x.end(), 0.f);
        const Array<float> in(x);
        in_every_order([&] {
            const Array<float> out(4);
            run(sum_kernel<true, false>, 4, 256, 32, out.at, in.at);
            for (int b = 0; b < 4; ++b) CHECK(out.values()[std::size_t(b)] == 256.f * (256.f * float(b)) + 255 * 128);
        });
    }

    TEST_CASE("threads and blocks run in the order that is set, and a random order is another one for another seed") {
        std::vector<std::vector<int>> found;
        in_every_order([&] {
            const Array<int> out(8 * 48), next(std::vector<int>{0});
            run(order_kernel, 8, 48, 0, out.at, next.at);
            found.push_back(out.values());
        });
        std::vector<int> forward(8 * 48);
        std::iota(forward.begin(), forward.end(), 0);
        CHECK(found[0] == forward);
        CHECK(std::equal(found[1].rbegin(), found[1].rend(), forward.begin()));
        for (std::size_t i = 2; i < found.size(); ++i) {
            CHECK(found[i] != found[i - 1]);
            CHECK(std::is_permutation(found[i].begin(), found[i].end(), forward.begin()));
        }
    }

    TEST_CASE("a missing barrier is found in every order, with both lines") {
        const Array<float> in(std::vector<float>(256, 1.f)), out(1);
        in_every_order([&] {
            const std::string fault = fault_of(sum_kernel<false, false>, 1, 256, 32, out.at, in.at);
            CHECK_SAYS(fault, "kernel planted, block (0,0,0), thread (");
            CHECK_SAYS(fault, "race on shared memory at byte");
            CHECK(count(fault, "test_emulator.cpp:") == 2);
        });
    }

    TEST_CASE("a mask that names lanes which do not come is found") {
        const Array<float> in(std::vector<float>(256, 1.f)), out(1);
        in_every_order([&] { CHECK_SAYS(fault_of(sum_kernel<true, true>, 1, 256, 32, out.at, in.at), "__shfl_xor_sync"); });
    }

    TEST_CASE("a barrier that some threads miss is found, whether they have ended or wait elsewhere") {
        in_every_order([&] {
            CHECK_SAYS(fault_of(early_exit_kernel, 1, 64, 0, 40), "__syncthreads");
            const std::string two = fault_of(two_barriers_kernel, 1, 64, 0, 0);
            CHECK_SAYS(two, "threads wait at another");
            CHECK(count(two, "test_emulator.cpp:") == 2);
            const std::string mixed = fault_of(barrier_against_shuffle_kernel, 1, 32, 0, 0);
            CHECK_SAYS(mixed, "__syncthreads");
            CHECK_SAYS(mixed, "__shfl_xor_sync");
            CHECK(count(mixed, "test_emulator.cpp:") == 2);
            const std::string cross = fault_of(cross_wait_kernel, 1, 64, 0, 0);
            CHECK_SAYS(cross, "__syncthreads");
            CHECK_SAYS(cross, "__syncwarp");
        });
        CHECK(fault_of(early_exit_kernel, 1, 64, 0, 64) == "");
    }

    TEST_CASE("lanes of a warp that call different shuffles are found, with both lines") {
        in_every_order([&] {
            const std::string fault = fault_of(two_shuffles_kernel, 1, 32, 0, 0);
            CHECK_SAYS(fault, "lanes of a warp diverge");
            CHECK(count(fault, "test_emulator.cpp:") == 2);
        });
    }

    TEST_CASE("wrong masks are found: the own lane missing, lanes the warp has not, a source outside, a lane that has ended") {
        const Array<unsigned> out(32);
        const Array<int> numbers(32);
        in_every_order([&] {
            CHECK_SAYS(fault_of(foreign_mask_kernel, 1, 32, 0, out.at, 0xfffeu), "does not name lane");
            CHECK_SAYS(fault_of(foreign_mask_kernel, 1, 20, 0, out.at, all),
                       "names lanes that the warp has not (found 20 lanes)");
            CHECK_SAYS(fault_of(outside_source_kernel, 1, 32, 0, numbers.at),
                       "reads from lane 20, which the mask 0xffff does not name");
            CHECK_SAYS(fault_of(end_before_shuffle_kernel, 1, 32, 0, numbers.at), "__shfl_sync");
            run(foreign_mask_kernel, 1, 20, 0, out.at, 0xfffffu);
            CHECK(out.values()[19] == 0xfffff);
        });
    }

    TEST_CASE("shuffles and votes give what CUDA says, for every width") {
        struct Kernel {
            static void go(int* out, int width) {
                const int lane = int(threadIdx.x);
                out[lane] = __shfl_sync(all, lane, 5, width);
                out[32 + lane] = __shfl_up_sync(all, lane, 3, width);
                out[64 + lane] = __shfl_down_sync(all, lane, 3, width);
                out[96 + lane] = __shfl_xor_sync(all, lane, 6, width);
                out[128 + lane] = int(__ballot_sync(all, lane % 3 == 0));
                out[160 + lane] = __any_sync(all, lane == 7) + 2 * __all_sync(all, lane < 31) + 4 * __all_sync(all, lane < 32);
                out[192 + lane] = int(__shfl_sync(all, (long long)lane << 33, lane ^ 1) >> 33);
            }
        };
        for (int width = 1; width <= 32; width *= 2) {
            const Array<int> out(7 * 32);
            run(Kernel::go, 1, 32, 0, out.at, width);
            const std::vector<int> v = out.values();
            for (int lane = 0; lane < 32; ++lane) {
                const int first = lane / width * width, in = lane % width;
                const auto at = [&](int row) { return v[std::size_t(32 * row + lane)]; };
                CHECK(at(0) == first + 5 % width);
                CHECK(at(1) == (in >= 3 ? lane - 3 : lane));
                CHECK(at(2) == (in + 3 < width ? lane + 3 : lane));
                CHECK(at(3) == ((lane ^ 6) < first + width ? lane ^ 6 : lane));
                CHECK(unsigned(at(4)) == 0x49249249);
                CHECK(at(5) == 5);
                CHECK(at(6) == (lane ^ 1));
            }
        }
    }

    // ─── Shared memory ────────────────────────────────────────────────────────────────────────────────────────────────────

    TEST_CASE("a race of two threads on one half of a word is found, and neighbours in one word are none") {
        std::vector<std::uint16_t> x(64);
        std::iota(x.begin(), x.end(), std::uint16_t{0});
        const Array<std::uint16_t> in(x), out(64);
        in_every_order([&] {
            run(reverse_kernel<true>, 1, 64, 128, out.at, in.at);
            const std::vector<std::uint16_t> found = out.values();
            CHECK(std::equal(found.rbegin(), found.rend(), x.begin()));
            CHECK_SAYS(fault_of(reverse_kernel<false>, 1, 64, 128, out.at, in.at), "race on shared memory");
            const Array<unsigned> words(16);
            run(bytes_kernel<false>, 1, 64, 64, words.at);
            CHECK(words.values()[1] == 0x07060504);
            CHECK_SAYS(fault_of(bytes_kernel<true>, 1, 64, 64, words.at), "race on shared memory at byte 6");
        });
    }

    TEST_CASE("__syncwarp orders the accesses of its lanes and of no others") {
        const Array<int> out(64);
        in_every_order([&] {
            run(reverse_warp_kernel<true>, 1, 64, 256, out.at);
            for (int i = 0; i < 64; ++i) CHECK(out.values()[std::size_t(i)] == i / 32 * 32 + 31 - i % 32 + 2);
            CHECK_SAYS(fault_of(reverse_warp_kernel<false>, 1, 64, 256, out.at), "race on shared memory");
            run(half_warps_kernel<false>, 1, 32, 128, out.at);
            CHECK_SAYS(fault_of(half_warps_kernel<true>, 1, 32, 128, out.at), "race on shared memory");
        });
    }

    TEST_CASE("a shuffle orders accesses within its warp, unless the setting says that only __syncwarp does") {
        const Array<int> out(32);
        in_every_order([&] {
            run(shuffle_as_barrier_kernel, 1, 32, 128, out.at);
            cuda_emu::shuffles_order_memory = false;
            CHECK_SAYS(fault_of(shuffle_as_barrier_kernel, 1, 32, 128, out.at), "race on shared memory");
            cuda_emu::shuffles_order_memory = true;
        });
    }

    TEST_CASE("atomics on shared memory do not race with each other, but with plain accesses") {
        const Array<int> out(std::vector<int>{0});
        run(count_kernel, 3, 64, 4, out.at, false);
        CHECK(out.values()[0] == 3 * 64);
        in_every_order([&] { CHECK_SAYS(fault_of(count_kernel, 3, 64, 4, out.at, true), "race on shared memory"); });
    }

    TEST_CASE("every block begins with shared memory full of NaN, and cannot leave it") {
        const Array<float> out(32);
        run(poison_kernel, 2, 32, 128, out.at);
        for (const float v : out.values()) CHECK(std::isnan(v));
        run(shared_index_kernel, 2, 1, 128, out.at, 31);
        CHECK_SAYS(fault_of(shared_index_kernel, 2, 1, 128, out.at, 32), "beyond its end: 4 bytes at 128 of 128");
        CHECK_SAYS(fault_of(shared_index_kernel, 2, 1, 128, out.at, -1), "beyond its end: 4 bytes at -4 of 128");
        const Array<uint4> wide(1);
        CHECK_SAYS(fault_of(misaligned_shared_kernel, 1, 1, 128, wide.at), "misaligned access to shared memory");
    }

    TEST_CASE("a cp.async is done by its wait: none, too few, or no barrier for the other threads is found") {
        std::vector<uint4> x(128);
        for (unsigned i = 0; i < 128; ++i) x[i] = {i, i + 1, i + 2, i + 3};
        const Array<uint4> in(x), out(128);
        in_every_order([&] {
            run(copy_kernel<0>, 1, 64, 2048, out.at, in.at);
            for (unsigned i = 0; i < 128; ++i) CHECK(out.values()[i].w == i + 3);
            CHECK_SAYS(fault_of(copy_kernel<-1>, 1, 64, 2048, out.at, in.at), "waited for the cp.async that fills it");
            CHECK_SAYS(fault_of(copy_kernel<1>, 1, 64, 2048, out.at, in.at), "waited for the cp.async that fills it");
            run(copy_for_others_kernel<true>, 1, 64, 1024, out.at, in.at);
            CHECK(out.values()[6].x == 7);
            CHECK(fault_of(copy_for_others_kernel<false>, 1, 64, 1024, out.at, in.at) != "");
        });
        struct Kernel {
            static void never_waits(const uint4* x) { cuda_emu::copy_async16(shared_memory<uint4>(), x); }
        };
        CHECK_SAYS(fault_of(Kernel::never_waits, 1, 1, 16, in.at), "before it waited for its cp.async");
    }

    // ─── Device memory ────────────────────────────────────────────────────────────────────────────────────────────────────

    TEST_CASE("reading and writing past the end of device memory, before its start or after its end of life is found") {
        const Array<float> p(std::vector<float>(100, 1.f));
        run(scale_kernel, 4, 32, 0, p.at, 2.f, 100);
        CHECK(p.values()[99] == 2.f);
        const std::string fault = fault_of(scale_kernel, 4, 32, 0, p.at, 2.f, 101);
        CHECK_SAYS(fault, "kernel planted, block (3,0,0), thread (4,0,0): invalid access to 0x");
        CHECK_SAYS(fault, "0 bytes past the end of device allocation");
        CHECK_SAYS(fault, "(400 bytes)");
        cuda_emu::guard_front = true;
        {
            const Array<float> front(std::vector<float>(1024, 1.f));
            struct Kernel {
                static void before(float* p) { p[-1] = 0; }
            };
            CHECK_SAYS(fault_of(Kernel::before, 1, 1, 0, front.at), "4 bytes before the start of device allocation");
        }
        cuda_emu::guard_front = false;
        float* freed = nullptr;
        cudaMalloc(&freed, 64);
        cudaFree(freed);
        CHECK_SAYS(fault_of(scale_kernel, 1, 1, 0, freed, 2.f, 1), "of freed device allocation");
    }

    TEST_CASE("a 16-byte load that is misaligned or out of bounds is found") {
        const Array<unsigned char> x(std::vector<unsigned char>(520));
        const Array<uint4> out(32);
        run(load_kernel, 1, 32, 0, out.at, x.at, 0);
        const std::string fault = fault_of(load_kernel, 1, 32, 0, out.at, x.at, 8);
        CHECK_SAYS(fault, "misaligned 16-byte load");
        CHECK_SAYS(fault, "test_emulator.cpp:");
        CHECK_SAYS(fault_of(load_kernel, 1, 32, 0, out.at, x.at, 16), "16-byte load out of bounds");
    }

    TEST_CASE("an output that a kernel does not write is NaN") {
        const Array<float> out(8);
        run(unwritten_kernel, 1, 8, 0, out.at);
        for (std::size_t i = 0; i < 8; ++i) CHECK(std::isnan(out.values()[i]) == (i % 2 == 1));
    }

    TEST_CASE("a host pointer that reaches a kernel is found, also inside a struct and at a load") {
        std::vector<float> host(4);
        CHECK_SAYS(fault_of(scale_kernel, 1, 1, 0, host.data(), 1.f, 1), "argument 1: a host pointer");
        float local = 0;
        CHECK_SAYS(fault_of(place_kernel, 1, 1, 0, Place{1, &local}), "argument 1: a host pointer");
        const Array<const void*> hidden(std::vector<const void*>{reinterpret_cast<const void*>(host.data())});
        const Array<uint4> out(1);
        struct Kernel {
            static void load(uint4* out, const void* const* where) { *out = cuda_emu::load16<uint4>(*where); }
        };
        CHECK_SAYS(fault_of(Kernel::load, 1, 1, 0, out.at, static_cast<const void* const*>(hidden.at)), "host");
        void* pinned = nullptr;
        cudaMallocHost(&pinned, 64);
        run(place_kernel, 1, 1, 0, Place{3, static_cast<float*>(pinned)});
        CHECK(*static_cast<float*>(pinned) == 3.f);
        cudaFreeHost(pinned);
    }

    TEST_CASE("host code that touches device memory ends with a message, and copies with the wrong side are found") {
        const Array<float> p(std::vector<float>(100, 1.f));
        const std::pair<std::string, bool> death = death_of([&] { *static_cast<volatile float*>(p.at + 3) = 1; });
        CHECK(death.second);
        CHECK_SAYS(death.first, "host code touches device memory at 0x");
        CHECK_SAYS(death.first, "byte 12 of device allocation");
        std::vector<float> host(200);
        const auto copy = [](void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
            return fault_in([&] { cudaMemcpy(to, from, bytes, kind); });
        };
        CHECK_SAYS(copy(host.data(), p.at, 400, cudaMemcpyHostToDevice), "cudaMemcpy: the destination is host memory");
        CHECK_SAYS(copy(p.at, p.at, 400, cudaMemcpyHostToDevice), "cudaMemcpy: the source is device memory");
        CHECK_SAYS(copy(host.data(), p.at, 404, cudaMemcpyDeviceToHost), "cudaMemcpy: the source is out of bounds: 404 bytes");
        CHECK_SAYS(copy(p.at + 1, host.data(), 400, cudaMemcpyHostToDevice), "cudaMemcpy: the destination is out of bounds");
        CHECK(copy(p.at, p.at, 400, cudaMemcpyDefault) == "");
    }

    TEST_CASE("a stack that overflows and a trap are faults, and the next kernel runs") {
        const Array<float> p(std::vector<float>(2, 1.f));
        CHECK_SAYS(fault_of(recursion_kernel, 1, 32, 0, p.at), "invalid access");
        struct Kernel {
            static void trap(int) noexcept { __trap(); }
        };
        CHECK_SAYS(fault_of(Kernel::trap, 1, 32, 0, 0), "__trap (test_emulator.cpp:");
        run(scale_kernel, 1, 2, 0, p.at, 2.f, 2);
        CHECK(p.values()[1] == 2.f);
    }

    TEST_CASE(
        "launches that the device would refuse are errors: threads, blocks, shared memory, and memory that is not there") {
        const Array<float> p(1);
        const auto go = [&](dim3 grid, dim3 threads, std::size_t bytes) {
            return cuda_emu::launch("planted", scale_kernel, grid, threads, bytes, nullptr, p.at, 1.f, 0);
        };
        CHECK(go(1, 1025, 0) == cudaErrorInvalidConfiguration);
        CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
        CHECK(cudaGetLastError() == cudaSuccess);
        CHECK(go(0, 32, 0) == cudaErrorInvalidConfiguration);
        CHECK(go(dim3(1, 65536), 32, 0) == cudaErrorInvalidConfiguration);
        CHECK(go(1, 32, 64 * 1024) == cudaErrorInvalidValue);
        CHECK(cudaFuncSetAttribute(scale_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) ==
              cudaErrorInvalidValue);
        CHECK(cudaFuncSetAttribute(scale_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024) == cudaSuccess);
        CHECK(go(1, 32, 64 * 1024) == cudaSuccess);
        std::size_t available = 0, total = 0;
        cudaMemGetInfo(&available, &total);
        float* q = nullptr;
        CHECK(cudaMalloc(&q, available + 1) == cudaErrorMemoryAllocation);
        CHECK(std::string(cudaGetErrorName(cudaGetLastError())) == "cudaErrorMemoryAllocation");
        CHECK(q == nullptr);
    }

    TEST_CASE("a kernel that waits for another device goes on once that has stored, and one that waits for nobody is found") {
        in_every_order([] {
            cuda_emu::device_count = 2;
            const auto on = [](int device, const auto& f) {
                cudaSetDevice(device);
                f();
                cudaSetDevice(0);
            };
            const Array<float> box(std::vector<float>(64 * 4, 0.f)), seen(64 * 4);
            cudaStream_t streams[2];
            on(0, [&] { cudaStreamCreateWithFlags(&streams[0], cudaStreamNonBlocking); });
            on(1, [&] { cudaStreamCreateWithFlags(&streams[1], cudaStreamNonBlocking), cudaDeviceEnablePeerAccess(0, 0); });
            for (const bool lazy : {false, true}) {
                cuda_emu::lazy_streams = lazy;
                CHECK(cudaMemsetAsync(box.at, 0, 64 * 16, streams[0]) == cudaSuccess);
                on(0, [&] { cuda_emu::launch("wait", wait_kernel, 2, 32, 0, streams[0], box.at, seen.at); });
                on(1, [&] { cuda_emu::launch("send", send_kernel, 2, 32, 0, streams[1], box.at); });
                CHECK(cudaStreamSynchronize(streams[0]) == cudaSuccess);
                CHECK(seen.values()[63 * 4] == 64.f);
                CHECK(cudaStreamSynchronize(streams[1]) == cudaSuccess);
            }
            cuda_emu::lazy_streams = false;
            cudaMemsetAsync(box.at, 0, 64 * 16, streams[0]);
            cuda_emu::broken_peer = {1, 0};
            on(0, [&] { cuda_emu::launch("wait", wait_kernel, 2, 32, 0, streams[0], box.at, seen.at); });
            on(1, [&] { cuda_emu::launch("send", send_kernel, 2, 32, 0, streams[1], box.at); });
            CHECK_SAYS(fault_in([&] { cudaStreamSynchronize(streams[0]); }), "waits for other devices for ever");
            cuda_emu::broken_peer = {-1, -1};
            on(1, [&] { cuda_emu::launch("send", send_kernel, 2, 32, 0, streams[1], box.at); });
            CHECK(cudaStreamSynchronize(streams[0]) == cudaSuccess);
            for (cudaStream_t stream : streams) cudaStreamDestroy(stream);
            cuda_emu::runtime().peers.clear();
            cuda_emu::device_count = 1;
            cudaGetLastError();
        });
    }

    TEST_CASE("blocks of a cooperative launch wait for each other, and blocks of another launch do so for ever") {
        in_every_order([] {
            const Array<float> boxes(std::vector<float>(3 * 4, 0.f));
            cuda_emu::cooperative = true;
            run(ring_kernel, 3, 32, 0, boxes.at, 5);
            CHECK(boxes.values()[0] == 5.f);
            cuda_emu::cooperative = true;
            CHECK_SAYS(fault_of(ring_kernel, 1, 32, 0, boxes.at, -1), "waits for ever");
            run(scale_kernel, 1, 4, 0, boxes.at, 2.f, 4);
        });
    }

    TEST_CASE("memory of another device that a kernel finds through a table is found as well") {
        cuda_emu::device_count = 2;
        cuda_emu::runtime().peers.clear();
        cudaSetDevice(1);
        {
            const Array<float> far(std::vector<float>(4, 1.f));
            cudaSetDevice(0);
            const Array<float> out(4);
            const Array<float*> table(std::vector<float*>{far.at});
            CHECK_SAYS(fault_of(through_table_kernel, 1, 1, 0, table.at, out.at), "memory that device 0 has no access to");
        }
        cuda_emu::device_count = 1;
    }

    TEST_CASE("a second device is another memory") {
        cuda_emu::device_count = 2;
        CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice);
        CHECK(cudaSetDevice(1) == cudaSuccess);
        {
            const Array<float> p(std::vector<float>(4, 1.f));
            cudaSetDevice(0);
            CHECK_SAYS(fault_of(scale_kernel, 1, 4, 0, p.at, 2.f, 4), "a pointer to memory of device 1, on device 0");
            cudaDeviceEnablePeerAccess(1, 0);
            run(scale_kernel, 1, 4, 0, p.at, 2.f, 4);
            CHECK(p.values()[3] == 2.f);
        }
        cuda_emu::device_count = 1;
        cudaGetLastError();
    }

    // ─── Numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    TEST_CASE("every half and bf16 survives float, and what lies between rounds to the nearest, ties to even") {
        for (std::uint32_t i = 0; i < 65536; ++i) {
            const auto bits = std::uint16_t(i);
            const float h = cuda_emu::half_value(bits), b = cuda_emu::bf16_value(bits);
            if (!std::isnan(h)) REQUIRE(cuda_emu::half_bits(h) == bits);
            if (!std::isnan(b)) REQUIRE(cuda_emu::bf16_bits(b) == bits);
            if ((bits & 0x7fff) >= 0x7bff) continue;
            const float next = cuda_emu::half_value(std::uint16_t(bits + 1)), middle = (h + next) / 2;
            REQUIRE(cuda_emu::half_bits(middle) == (bits & 1 ? bits + 1 : bits));
            REQUIRE(cuda_emu::half_bits(std::nextafter(middle, next)) == bits + 1);
            REQUIRE(cuda_emu::half_bits(std::nextafter(middle, h)) == bits);
        }
        CHECK(cuda_emu::half_bits(65519.9f) == 0x7bff);
        CHECK(cuda_emu::half_bits(65520.f) == 0x7c00);
        CHECK(cuda_emu::bf16_bits(std::bit_cast<float>(0x3f808000u)) == 0x3f80);
        CHECK(cuda_emu::bf16_bits(std::bit_cast<float>(0x3f818000u)) == 0x3f82);
        CHECK(std::isnan(cuda_emu::bf16_value(cuda_emu::bf16_bits(std::bit_cast<float>(0x7f800001u)))));
    }

    TEST_CASE("byte products and permutations give what CUDA says") {
        CHECK(__dp4a(int(0x80ff017f), int(0x8002037f), 10) == 128 * 128 - 2 + 3 + 127 * 127 + 10);
        CHECK(__dp4a(0xff020304u, 0xff010101u, 1u) == 255u * 255 + 2 + 3 + 4 + 1);
        CHECK(__byte_perm(0x33221100, 0x77665544, 0x7531) == 0x77553311);
        CHECK(__byte_perm(0x000000f0, 0, 0x8888) == 0xffffffff);
        CHECK(__funnelshift_r(0x11111111, 0x22222222, 4) == 0x21111111);
        CHECK(__clz(1) == 31);
        CHECK(__ffs(8) == 4);
        CHECK(__brev(1) == 0x80000000);
    }

    TEST_CASE("mma and ldmatrix, with the fragments of the PTX manual, give the matrix product") {
        // a [16, 16], b [16, 8] and bt = b transposed, row by row in shared memory.
        struct Kernel {
            static void go(float* d, const std::uint16_t* a, const std::uint16_t* b, const std::uint16_t* bt, int how) {
                const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
                const auto s = shared_memory<std::uint16_t>();
                for (int i = lane; i < 256; i += 32) s[i] = a[i];
                for (int i = lane; i < 128; i += 32) s[256 + i] = b[i], s[384 + i] = bt[i];
                __syncwarp();
                std::uint32_t left[4], right[4];
                if (how == 0) {  // by the formulas of the manual
                    const auto pair = [](std::uint16_t low, std::uint16_t high) { return std::uint32_t{high} << 16 | low; };
                    for (int i = 0; i < 4; ++i) {
                        const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
                        left[i] = pair(s[16 * row + column], s[16 * row + column + 1]);
                    }
                    for (int i = 0; i < 2; ++i)
                        right[i] = pair(s[256 + 8 * (2 * t + 8 * i) + g], s[256 + 8 * (2 * t + 8 * i + 1) + g]);
                } else {  // tiles of eight by eight: of a, rows 0 and 8, then the right half; of b, k = 0 and 8
                    cuda_emu::ldmatrix_x4(left, s + (16 * (lane % 16) + lane / 16 * 8));
                    if (how == 1) cuda_emu::ldmatrix_x4_trans(right, s + (256 + 8 * (lane % 16)));
                    else cuda_emu::ldmatrix_x4(right, s + (384 + 16 * (lane % 8) + lane / 8 % 2 * 8));
                }
                float sum[4] = {1, 1, 1, 1};
                cuda_emu::mma_m16n8k16_bf16(sum, left, right[0], right[1]);
                for (int i = 0; i < 4; ++i) d[8 * (g + i / 2 * 8) + 2 * t + i % 2] = sum[i];
            }
        };
        std::mt19937 random(1);
        std::vector<std::uint16_t> a(256), b(128), bt(128);
        const auto draw = [&](std::vector<std::uint16_t>& v) {
            for (auto& x : v) x = cuda_emu::bf16_bits(float(int(random() % 64) - 32) / 4);  // products and sums are exact
        };
        draw(a), draw(b);
        for (std::size_t k = 0; k < 16; ++k)
            for (std::size_t j = 0; j < 8; ++j) bt[16 * j + k] = b[8 * k + j];
        const Array<std::uint16_t> da(a), db(b), dbt(bt);
        in_every_order([&] {
            for (int how = 0; how < 3; ++how) {
                const Array<float> d(128);
                run(Kernel::go, 1, 32, 1024, d.at, da.at, db.at, dbt.at, how);
                const std::vector<float> found = d.values();
                for (std::size_t i = 0; i < 16; ++i)
                    for (std::size_t j = 0; j < 8; ++j) {
                        float sum = 1;
                        for (std::size_t k = 0; k < 16; ++k)
                            sum += cuda_emu::bf16_value(a[16 * i + k]) * cuda_emu::bf16_value(b[8 * k + j]);
                        REQUIRE(found[8 * i + j] == sum);
                    }
            }
        });
    }

    // ─── Streams, graphs, cuBLASLt ────────────────────────────────────────────────────────────────────────────────────────

    TEST_CASE("a captured graph does nothing until it is launched, and then the same every time") {
        cudaStream_t stream = nullptr;
        REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
        const Array<float> p(std::vector<float>(4, 1.f));
        float* pinned = nullptr;
        cudaMallocHost(&pinned, 16);
        pinned[0] = 0;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
        float by = 2;
        CHECK(cuda_emu::launch("scale", scale_kernel, 1, 4, 0, stream, p.at, by, 4) == cudaSuccess);
        by = 100;  // the argument was copied
        CHECK(cudaMemcpyAsync(pinned, p.at, 16, cudaMemcpyDeviceToHost, stream) == cudaSuccess);
        cudaGraph_t graph = nullptr;
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
        cudaGraphExec_t exec = nullptr;
        CHECK(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
        cudaGraphDestroy(graph);
        CHECK(pinned[0] == 0);
        for (int i = 1; i <= 3; ++i) {
            CHECK(cudaGraphLaunch(exec, stream) == cudaSuccess);
            CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
            CHECK(pinned[3] == float(1 << i));
        }
        cudaGraphExecDestroy(exec);
        cudaFreeHost(pinned);
        cudaStreamDestroy(stream);
    }

    TEST_CASE("a capture refuses allocations, waits and pageable memory, and streams that join must come back") {
        cudaStream_t stream = nullptr, other = nullptr;
        cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
        cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
        cudaEvent_t fork = nullptr, join = nullptr;
        cudaEventCreateWithFlags(&fork, cudaEventDisableTiming);
        cudaEventCreateWithFlags(&join, cudaEventDisableTiming);
        const Array<float> p(std::vector<float>(4, 1.f));
        cudaGraph_t graph = nullptr;
        float* q = nullptr;
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
        CHECK(cudaMalloc(&q, 16) == cudaErrorStreamCaptureUnsupported);
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        CHECK(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        float host[4];
        CHECK_SAYS(fault_in([&] { cudaMemcpyAsync(host, p.at, 16, cudaMemcpyDeviceToHost, stream); }), "pageable host memory");
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
        cudaGraphDestroy(graph);
        for (const bool joined : {true, false}) {
            cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
            cudaEventRecord(fork, stream);
            cudaStreamWaitEvent(other, fork);
            CHECK(cuda_emu::launch("scale", scale_kernel, 1, 4, 0, other, p.at, 3.f, 4) == cudaSuccess);
            cudaEventRecord(join, other);
            if (joined) cudaStreamWaitEvent(stream, join);
            CHECK(cudaStreamEndCapture(stream, &graph) == (joined ? cudaSuccess : cudaErrorStreamCaptureUnjoined));
            if (joined) cudaGraphDestroy(graph);
        }
        CHECK(p.values()[0] == 1.f);
        cudaGetLastError();
        cudaEventDestroy(fork), cudaEventDestroy(join);
        cudaStreamDestroy(stream), cudaStreamDestroy(other);
    }

    TEST_CASE("with lazy streams work waits for its synchronisation, and a missing one shows old or no results") {
        cuda_emu::lazy_streams = true;
        cudaStream_t first = nullptr, second = nullptr;
        cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking);
        cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking);
        cudaEvent_t event = nullptr;
        cudaEventCreate(&event);
        for (const bool waits : {true, false}) {
            const Array<float> p(std::vector<float>(4, 1.f));
            float* pinned = nullptr;
            cudaMallocHost(&pinned, 16);
            pinned[0] = 5;
            cuda_emu::launch("scale", scale_kernel, 1, 4, 0, first, p.at, 2.f, 4);
            cudaEventRecord(event, first);
            CHECK(cudaEventQuery(event) == cudaErrorNotReady);
            if (waits) cudaStreamWaitEvent(second, event);
            cudaMemcpyAsync(pinned, p.at, 16, cudaMemcpyDeviceToHost, second);
            CHECK(std::isnan(pinned[0]));
            cudaStreamSynchronize(second);
            CHECK(pinned[0] == (waits ? 2.f : 1.f));
            cudaStreamSynchronize(first);
            CHECK(cudaEventQuery(event) == cudaSuccess);
            cudaFreeHost(pinned);
        }
        cudaEventDestroy(event);
        cudaStreamDestroy(first), cudaStreamDestroy(second);
        cuda_emu::lazy_streams = false;
    }

    TEST_CASE("cublasLtMatmul is the matrix product for both orders and all transpositions, on top of C or not") {
        constexpr std::size_t m = 5, n = 3, k = 7;
        std::mt19937 random(1);
        std::vector<float> a(m * k), b(k * n), c(m * n);
        for (auto* v : {&a, &b, &c})
            for (float& x : *v) x = float(int(random() % 32) - 16) / 4;
        cublasLtHandle_t handle = nullptr;
        REQUIRE(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
        const Array<char> workspace(1024);
        for (int variant = 0; variant < 32; ++variant) {
            const bool row_major = variant & 1, ta = variant & 2, tb = variant & 4, to_bf16 = variant & 8;
            const float beta = variant & 16 ? 1.f : 0.f, alpha = 0.5f;
            CAPTURE(variant);
            // `x` [rows, columns] is what the product sees; stored transposed or not, in either order, with a gap after each line.
            struct Stored {
                std::uint64_t rows, columns;
                std::int64_t ld;
                std::vector<float> values;
            };
            const auto store = [&](const std::vector<float>& x, std::size_t rows, std::size_t columns, bool transposed) {
                Stored s{transposed ? columns : rows, transposed ? rows : columns, 0, {}};
                s.ld = std::int64_t(row_major ? s.columns : s.rows) + 2;
                s.values.assign(std::size_t(s.ld) * (row_major ? s.rows : s.columns), 99.f);
                for (std::size_t i = 0; i < s.rows; ++i)
                    for (std::size_t j = 0; j < s.columns; ++j)
                        s.values[row_major ? i * std::size_t(s.ld) + j : i + j * std::size_t(s.ld)] =
                            transposed ? x[j * columns + i] : x[i * columns + j];
                return s;
            };
            const auto bf16 = [](const std::vector<float>& v) {
                std::vector<std::uint16_t> result(v.size());
                std::transform(v.begin(), v.end(), result.begin(), cuda_emu::bf16_bits);
                return result;
            };
            const Stored sa = store(a, m, k, ta), sb = store(b, k, n, tb), sc = store(c, m, n, false);
            const Array<std::uint16_t> da(bf16(sa.values)), db(bf16(sb.values)), d16(bf16(sc.values));
            const Array<float> d32(sc.values);
            cublasLtMatmulDesc_t desc = nullptr;
            cublasLtMatrixLayout_t la = nullptr, lb = nullptr, ld = nullptr;
            cublasLtMatmulPreference_t preference = nullptr;
            cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
            cublasLtMatrixLayoutCreate(&la, CUDA_R_16BF, sa.rows, sa.columns, sa.ld);
            cublasLtMatrixLayoutCreate(&lb, CUDA_R_16BF, sb.rows, sb.columns, sb.ld);
            cublasLtMatrixLayoutCreate(&ld, to_bf16 ? CUDA_R_16BF : CUDA_R_32F, m, n, sc.ld);
            const std::int32_t t = CUBLAS_OP_T, order = CUBLASLT_ORDER_ROW;
            if (ta) cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t);
            if (tb) cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &t, sizeof t);
            for (const auto layout : {la, lb, ld})
                if (row_major) cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_ORDER, &order, sizeof order);
            cublasLtMatmulPreferenceCreate(&preference);
            const std::uint64_t limit = 1024;
            cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &limit, sizeof limit);
            cublasLtMatmulHeuristicResult_t best{};
            int found = 0;
            CHECK(cublasLtMatmulAlgoGetHeuristic(handle, desc, la, lb, ld, ld, preference, 1, &best, &found) ==
                  CUBLAS_STATUS_SUCCESS);
            CHECK(found == 1);
            void* const out = to_bf16 ? static_cast<void*>(d16.at) : d32.at;
            const auto go = [&](std::size_t workspace_bytes) {
                return cublasLtMatmul(handle, desc, &alpha, da.at, la, db.at, lb, &beta, out, ld, out, ld, &best.algo,
                                      workspace.at, workspace_bytes, nullptr);
            };
            CHECK(go(512) == CUBLAS_STATUS_INVALID_VALUE);
            CHECK(go(1024) == CUBLAS_STATUS_SUCCESS);
            const std::vector<float> f32 = d32.values();
            const std::vector<std::uint16_t> f16 = d16.values();
            for (std::size_t i = 0; i < m; ++i)
                for (std::size_t j = 0; j < n; ++j) {
                    float sum = 0;
                    for (std::size_t x = 0; x < k; ++x) sum += a[i * k + x] * b[x * n + j];
                    const float expected = alpha * sum + beta * c[i * n + j];
                    const std::size_t at = row_major ? i * std::size_t(sc.ld) + j : i + j * std::size_t(sc.ld);
                    if (to_bf16) REQUIRE(f16[at] == cuda_emu::bf16_bits(expected));
                    else REQUIRE(f32[at] == expected);
                }
            CHECK(f32.back() == 99.f);  // the gaps are left alone
            cublasLtMatmulPreferenceDestroy(preference);
            for (const auto layout : {la, lb, ld}) cublasLtMatrixLayoutDestroy(layout);
            cublasLtMatmulDescDestroy(desc);
        }
        cublasLtDestroy(handle);
    }

    TEST_CASE("host threads may launch at the same time") {
        std::vector<std::thread> threads;
        std::array<float, 4> found{};
        for (std::size_t i = 0; i < 4; ++i)
            threads.emplace_back([&found, i] {
                float* p = nullptr;
                cudaMalloc(&p, 4);
                const float one = 1;
                cudaMemcpy(p, &one, 4, cudaMemcpyHostToDevice);
                for (int n = 0; n < 10; ++n) cuda_emu::launch("scale", scale_kernel, 1, 32, 0, nullptr, p, 2.f, 1);
                cudaMemcpy(&found[i], p, 4, cudaMemcpyDeviceToHost);
                cudaFree(p);
            });
        for (std::thread& thread : threads) thread.join();
        for (const float x : found) CHECK(x == 1024.f);
    }
}
