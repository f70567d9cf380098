// §15: memory, files, what the processor has, floating-point modes, and the table of Unicode classes.
#include <cfenv>
#include <cstdio>
#include <fstream>

namespace {
namespace platform {

using namespace llama3;
namespace d = llama3::detail;

long resident_kilobytes() {
    long pages = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> pages >> resident;
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

std::string error_of(const std::function<void()>& f) {
    try {
        f();
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

TEST_SUITE("core: platform") {
    TEST_CASE("buffers are aligned, zeroed, movable, and cost nothing until they are touched") {
        for (const std::size_t size :
             {std::size_t{1}, std::size_t{63}, std::size_t{4096}, d::large_buffer - 1, d::large_buffer, d::large_buffer + 1})
            for (const bool dense : {false, true}) {
                d::AlignedBuffer a(size, dense);
                CHECK(a.size() == size);
                CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % 64 == 0);
                CHECK(std::all_of(a.data(), a.data() + size, [](std::byte b) { return b == std::byte{0}; }));
                std::memset(a.data(), 1, size);
                std::byte* const data = a.data();
                d::AlignedBuffer b(std::move(a));
                CHECK(b.data() == data);
                CHECK(a.data() == nullptr);  // NOLINT: what a move leaves behind
                CHECK(a.size() == 0);
                a = std::move(b);
                CHECK(a.data() == data);
                a = d::AlignedBuffer(3);
                CHECK(a.size() == 3);
            }
        CHECK(d::AlignedBuffer().data() == nullptr);
        CHECK(d::AlignedBuffer(0).size() == 0);
        const long before = resident_kilobytes();
        const d::AlignedBuffer large(std::size_t{1} << 31);
        large.data()[12345] = std::byte{1};
        CHECK(resident_kilobytes() - before < 100000);
    }

    TEST_CASE("memory that the system does not have is refused with the number of bytes") {
        const std::size_t bytes = std::size_t{1} << 60;
        CHECK(error_of([&] { d::AlignedBuffer buffer(bytes); }) ==
              "memory: the system has not enough (found less, expected 1152921504606846976 bytes). Choose a smaller context or cache format, or a smaller "
              "model.");
    }

    TEST_CASE("a mapped file and a read one have the same bytes, also where they end off a page") {
        const std::string path = (std::getenv("TMPDIR") ? std::getenv("TMPDIR") : "/tmp") + std::string("/llama3_platform_") +
                                 std::to_string(getpid());
        for (const std::size_t size : {0, 1, 4095, 4096, 4097, 3000000}) {
            std::string content(size, '\0');
            for (std::size_t i = 0; i < size; ++i) content[i] = static_cast<char>(i * 31 >> 3);
            std::ofstream(path, std::ios::binary) << content;
            for (const d::Image& image : {d::map_file(path), d::read_file(path)})
                CHECK(std::string_view(reinterpret_cast<const char*>(image.bytes.data()), image.bytes.size()) == content);
        }
        std::remove(path.c_str());
        const auto both = [&](const std::string& file) {
            const std::string mapped = error_of([&] { d::map_file(file); }),
                              read = error_of([&] { d::read_file(file); });
            CHECK(mapped == read);
            return mapped;
        };
        CHECK(both(path) ==
              path + ": the file cannot be opened (found No such file or directory, expected a readable file). Give the path of a readable .l3 file.");
        CHECK(both("/tmp").find("found a directory") != std::string::npos);
    }

    TEST_CASE("files leave no descriptor open, whether they open or fail") {
        const auto descriptor = [] {
            const int n = dup(0);
            close(n);
            return n;
        };
        const int before = descriptor();
        for (const char* path : {"/", "/dev/null", "/nowhere", "/proc/self/exe"}) {
            error_of([&] { d::map_file(path); });
            error_of([&] { d::read_file(path); });
        }
        CHECK(descriptor() == before);
    }

    TEST_CASE("the processor's features agree with what the compiler's own test finds") {
        const d::CpuFeatures f = d::cpu_features();
#if defined(__x86_64__)
        __builtin_cpu_init();
        CHECK(f.avx2_fma_f16c == (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
        CHECK(f.avx512 == (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")));
        CHECK(f.avx512_vnni == (f.avx512 && __builtin_cpu_supports("avx512vnni")));
        std::string line, flags;
        for (std::ifstream info("/proc/cpuinfo"); std::getline(info, line);)
            if (line.rfind("flags", 0) == 0) flags = line + " ";
        if (!flags.empty()) {
            const auto listed = [&](const std::string& flag) { return flags.find(" " + flag + " ") != std::string::npos; };
            CHECK(f.avx2_fma_f16c == (listed("avx2") && listed("fma") && listed("f16c")));
            CHECK(f.avx_vnni == listed("avx_vnni"));
            CHECK(f.avx512_bf16 == listed("avx512_bf16"));
        }
        CHECK(!f.dotprod);
#else
        CHECK(!f.avx2_fma_f16c);
        CHECK(!f.avx512);
        std::string line;  // an emulator shows the flags of its host instead
        for (std::ifstream info("/proc/cpuinfo"); std::getline(info, line);)
            if (line.rfind("Features", 0) == 0) CHECK(f.dotprod == ((line + " ").find(" asimddp ") != std::string::npos));
#endif
        CHECK((f.avx512 || !(f.avx512_vnni || f.avx512_bf16)));
    }

    TEST_CASE("the number of processors is that of this process, not of the machine") {
        const int all = d::usable_cpus();
        CHECK(all >= 1);
#if defined(__linux__)
        cpu_set_t before, one;
        REQUIRE(sched_getaffinity(0, sizeof before, &before) == 0);
        CPU_ZERO(&one);
        for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++i)
            if (CPU_ISSET(i, &before)) CPU_SET(i, &one);
        sched_setaffinity(0, sizeof one, &one);
        CHECK(d::usable_cpus() == 1);
        sched_setaffinity(0, sizeof before, &before);
        CHECK(d::usable_cpus() == all);
#endif
    }

    TEST_CASE("floating-point modes are the default ones inside, and the caller's again outside") {
        volatile float tiny = 1e-38f, one = 1, three = 3;
        const float nearest = one / three;
        REQUIRE(std::fesetround(FE_UPWARD) == 0);
        const float upward = one / three;
        {
            const d::FloatEnvironment environment;
            const float inside = one / three;
            CHECK(inside == nearest);
        }
        CHECK(std::fegetround() == FE_UPWARD);
        CHECK((one / three) == upward);
        std::fesetround(FE_TONEAREST);
#if defined(__x86_64__)
        const unsigned modes = _mm_getcsr();
        _mm_setcsr(modes | 0x8040);  // flush results and operands to zero
        {
            const d::FloatEnvironment environment;
            const float inside = tiny / 16;
            CHECK(inside > 0);
        }
        const float outside = tiny / 16;
        CHECK(outside == 0);
        _mm_setcsr(modes);
#endif
    }

    TEST_CASE("the runs of Unicode classes ascend, cover everything, and alternate") {
        const auto runs = d::unicode_classes();
        CHECK(runs.size() > 1000);
        CHECK((runs.front() >> 2) == 0);
        CHECK((runs.back() >> 2) <= 0x10ffff);
        for (std::size_t i = 1; i < runs.size(); ++i) {
            CHECK((runs[i - 1] >> 2) < (runs[i] >> 2));
            CHECK((runs[i - 1] & 3) != (runs[i] & 3));
        }
        const auto of = [&](std::uint32_t code) {
            return *(std::upper_bound(runs.begin(), runs.end(), code << 2 | 3) - 1) & 3;
        };
        CHECK(of('a') == 1);
        CHECK(of('7') == 2);
        CHECK(of(' ') == 3);
        CHECK(of('.') == 0);
        CHECK(of(0x3042) == 1);   // HIRAGANA LETTER A
        CHECK(of(0x00a0) == 3);   // NO-BREAK SPACE
        CHECK(of(0x0664) == 2);   // ARABIC-INDIC DIGIT FOUR
        CHECK(of(0x1f600) == 0);  // GRINNING FACE
        CHECK(of(0x10ffff) == 0);
    }
}

}  // namespace platform
}  // namespace
