// §5 and the arithmetic under it, against the C library in double precision and against published values.
#include <cmath>
#include <random>

namespace {

using namespace llama3;
namespace d = llama3::detail;

double worst_relative(double (*mine)(double), double (*theirs)(double), double from, double to) {
    std::mt19937_64 random(7);
    std::uniform_real_distribution<double> pick(from, to);
    double worst = 0;
    for (int i = 0; i < 20000; ++i) {
        const double x = static_cast<double>(static_cast<float>(pick(random)));
        worst = std::max(worst, std::abs(mine(x) - theirs(x)) / std::abs(theirs(x)));
    }
    return worst;
}

Config rope_config(int head_dim, float factor) {
    Config config;
    config.head_dim = head_dim, config.rope_factor = factor;
    config.rope_low_freq_factor = 1, config.rope_high_freq_factor = 4, config.rope_original_context = 8192;
    return config;
}

TEST_SUITE("core: reference") {
    TEST_CASE("exp is within two units in the last place, and defined at its ends") {
        CHECK(worst_relative([](double x) { return static_cast<double>(d::exp(static_cast<float>(x))); }, std::exp, -87, 88) < 2.4e-7);
        CHECK(d::exp(0) == 1);
        CHECK(d::exp(-88) == 0);
        CHECK(d::exp(-INFINITY) == 0);
        CHECK(d::exp(89) == INFINITY);
        CHECK(std::isnan(d::exp(NAN)));
    }

    TEST_CASE("log, exp64 and cos_sin agree with the C library to 1e-14") {
        CHECK(worst_relative(d::log, std::log, 1.001, 1e7) < 1e-14);
        CHECK(worst_relative(d::exp64, std::exp, -30, 30) < 1e-14);
        std::mt19937_64 random(3);
        double worst = 0;
        for (int i = 0; i < 20000; ++i) {
            const double angle = static_cast<double>(static_cast<float>(random() % 131072) * std::bit_cast<float>(0x3f000000u | static_cast<std::uint32_t>(random() & 0x7fffff)));
            double cosine, sine;
            d::cos_sin(angle, cosine, sine);
            worst = std::max({worst, std::abs(cosine - std::cos(angle)), std::abs(sine - std::sin(angle))});
        }
        CHECK(worst < 1e-11);
    }

    TEST_CASE("fma rounds once, also where it is made of doubles") {
        std::mt19937_64 random(11);
        int differ_from_two_roundings = 0;
        for (int i = 0; i < 300000; ++i) {
            const auto any = [&] { return std::bit_cast<float>(static_cast<std::uint32_t>((random() & 0x807fffffu) | ((112 + random() % 30) << 23))); };
            const float a = any(), b = any(), c = i % 3 ? any() : -a * b * (1 + static_cast<float>(static_cast<int>(random() % 64) - 32) * 5.96e-8f);
            const float expected = std::fma(a, b, c), found = d::fma(a, b, c);
            if (std::bit_cast<std::uint32_t>(expected) != std::bit_cast<std::uint32_t>(found)) FAIL(a, " ", b, " ", c, " ", expected, " ", found);
            volatile float product = a * b;
            differ_from_two_roundings += product + c != found;
        }
        CHECK(differ_from_two_roundings > 1000);
        CHECK(std::isinf(d::fma(3e38f, 2, 0)));
        CHECK(std::isnan(d::fma(INFINITY, 0, 1)));
        CHECK(d::fma(1e-30f, 1e-30f, 0) == std::fma(1e-30f, 1e-30f, 0.0f));
        CHECK(d::fma(1e-20f, 1e-20f, 1e-40f) == std::fma(1e-20f, 1e-20f, 1e-40f));
    }

    TEST_CASE("rmsnorm divides by the root of the mean square") {
        std::mt19937 random(5);
        for (int n : {1, 8, 15, 16, 17, 100, 2048}) {
            std::vector<float> x(static_cast<std::size_t>(n)), weight(x.size()), out(x.size());
            double squares = 0;
            for (std::size_t i = 0; i < x.size(); ++i) {
                x[i] = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 300, weight[i] = static_cast<float>(random() % 100) / 50;
                squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
            }
            d::rmsnorm(out.data(), x.data(), weight.data(), n, 1e-5f);
            for (std::size_t i = 0; i < x.size(); ++i)
                CHECK(static_cast<double>(out[i]) == doctest::Approx(static_cast<double>(x[i]) / std::sqrt(squares / n + 1e-5) * static_cast<double>(weight[i])).epsilon(1e-6));
        }
    }

    TEST_CASE("rope leaves position zero unchanged and keeps the length of every pair") {
        const std::vector<float> frequencies = d::rope_frequencies(rope_config(64, 32));
        std::vector<float> turns(64), x(64), turned;
        for (std::size_t i = 0; i < 64; ++i) x[i] = static_cast<float>(i) - 20;
        d::rope_turns(turns.data(), frequencies, 0);
        turned = x;
        d::rope(turned.data(), turns.data(), 64);
        CHECK(turned == x);
        d::rope_turns(turns.data(), frequencies, 131071);
        d::rope(turned.data(), turns.data(), 64);
        CHECK(turned != x);
        for (std::size_t i = 0; i < 64; i += 2)
            CHECK(std::hypot(turned[i], turned[i + 1]) == doctest::Approx(static_cast<double>(std::hypot(x[i], x[i + 1]))).epsilon(1e-6));
    }

    TEST_CASE("rope frequencies and their scaling have the published values") {
        const auto plain = d::rope_frequencies(rope_config(128, 1)), eight = d::rope_frequencies(rope_config(128, 8)), thirty_two = d::rope_frequencies(rope_config(128, 32));
        CHECK(plain[0] == 1);
        CHECK(plain[1] == doctest::Approx(0.8146172339).epsilon(1e-7));
        CHECK(plain[28] == doctest::Approx(3.211445995e-3).epsilon(1e-6));
        CHECK(plain[63] == doctest::Approx(2.455140791e-6).epsilon(1e-6));
        const double divisors_8[] = {1, 1.207484, 1.553415, 2.026313, 2.694530, 3.684253, 5.257327, 8};
        const double divisors_32[] = {1, 1.234937, 1.651329, 2.276660, 3.292262, 5.171596, 9.666729, 32};
        for (std::size_t i = 0; i < 8; ++i) {
            CHECK(plain[28 + i] / eight[28 + i] == doctest::Approx(divisors_8[i]).epsilon(2e-6));
            CHECK(plain[28 + i] / thirty_two[28 + i] == doctest::Approx(divisors_32[i]).epsilon(2e-6));
        }
        CHECK(d::rope_frequencies(rope_config(64, 1))[31] == doctest::Approx(3.013858152e-6).epsilon(1e-6));
    }

    TEST_CASE("attention weighs values by the softmax of the scores") {
        Config config;
        config.n_layers = 2, config.n_heads = 2, config.n_kv_heads = 1, config.head_dim = 6;
        const int n = 1100;
        d::ReferenceCache cache(config, n, Format::f32);
        std::mt19937 random(9);
        const auto value = [&] { return static_cast<float>(static_cast<int>(random() % 4001) - 2000) / 700; };
        std::vector<std::vector<float>> keys, values;
        for (int p = 0; p < n; ++p) {
            std::vector<float> k(6), v(6);
            for (int e = 0; e < 6; ++e) k[static_cast<std::size_t>(e)] = value(), v[static_cast<std::size_t>(e)] = value();
            cache.store(1, p, 0, k.data(), v.data());
            keys.push_back(k), values.push_back(v);
        }
        for (int length : {1, 16, 511, 512, 513, 1100}) {
            float query[6], out[6];
            for (float& q : query) q = value();
            d::attend_reference(out, query, cache, 1, 0, length, 6);
            double total = 0, mix[6] = {};
            for (int p = 0; p < length; ++p) {
                double dot = 0;
                for (std::size_t e = 0; e < 6; ++e) dot += static_cast<double>(query[e]) * static_cast<double>(keys[static_cast<std::size_t>(p)][e]);
                total += std::exp(dot / std::sqrt(6.0));
                for (std::size_t e = 0; e < 6; ++e) mix[e] += std::exp(dot / std::sqrt(6.0)) * static_cast<double>(values[static_cast<std::size_t>(p)][e]);
            }
            for (std::size_t e = 0; e < 6; ++e) CHECK(static_cast<double>(out[e]) == doctest::Approx(mix[e] / total).epsilon(1e-4));
        }
    }
}

}  // namespace
