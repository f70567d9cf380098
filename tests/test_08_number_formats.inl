// §8: every format against a decoder written here from convert/FORMAT.md.
#include <cmath>
#include <random>

namespace {

double fp16_value(unsigned bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

TEST_SUITE("core: number formats") {
    TEST_CASE("fp16 decodes all 65536 patterns, and encodes to the nearest, ties to even") {
        for (unsigned bits = 0; bits < 65536; ++bits) {
            const float value = d::from_fp16(static_cast<std::uint16_t>(bits));
            const double expected = fp16_value(bits);
            if (std::isnan(expected)) {
                REQUIRE(std::isnan(value));
                REQUIRE(std::isnan(d::from_fp16(d::to_fp16(value))));
                continue;
            }
            REQUIRE(static_cast<double>(value) == expected);
            REQUIRE(d::to_fp16(value) == bits);
            if ((bits & 0x7fff) >= 0x7bff) continue;
            const double next = fp16_value(bits + 1), middle = (expected + next) / 2;
            REQUIRE(d::to_fp16(static_cast<float>(middle)) == (bits & 1 ? bits + 1 : bits));
            REQUIRE(d::to_fp16(std::nextafter(static_cast<float>(middle), static_cast<float>(next))) == bits + 1);
        }
        CHECK(d::to_fp16(65519.996f) == 0x7bff);
        CHECK(d::to_fp16(65520.0f) == 0x7c00);
        CHECK(d::to_fp16(-1e-9f) == 0x8000);
    }

    TEST_CASE("bf16 rounds to the nearest, ties to even, and keeps NaN") {
        CHECK(d::round_to_bf16(1.00390625f) == 1.0f);
        CHECK(d::round_to_bf16(1.01171875f) == 1.015625f);
        CHECK(d::round_to_bf16(std::nextafter(1.00390625f, 2.0f)) == 1.0078125f);
        CHECK(std::isnan(d::round_to_bf16(std::bit_cast<float>(0x7f800001u))));
        CHECK(std::isinf(d::round_to_bf16(3.4e38f)));
    }

    TEST_CASE("a panel of every format decodes to what FORMAT.md says, near what was encoded") {
        std::mt19937 random(1);
        const int columns = 128;
        std::vector<float> rows(16 * columns);
        for (float& x : rows) x = static_cast<float>(static_cast<int>(random() % 20001) - 10000) / 3000;
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
            const std::size_t bytes = static_cast<std::size_t>(columns / unit_columns(format)) * unit_bytes(format);
            std::vector<std::byte> panel(bytes);
            d::encode_panel(format, rows.data(), columns, panel.data());
            const Matrix matrix{format, panel.data(), 16, columns, 1, bytes};
            const auto byte = [&](std::size_t i) { return std::to_integer<int>(panel[i]); };
            for (int r = 0; r < 16; ++r)
                for (int c = 0; c < columns; ++c) {
                    const float found = d::decode_weight(matrix, r, c), wanted = rows[static_cast<std::size_t>(r * columns + c)];
                    const std::size_t ur = static_cast<std::size_t>(r), uc = static_cast<std::size_t>(c);
                    double expected = 0, step = 0;
                    if (format == Format::f32) {
                        float value;
                        std::memcpy(&value, &panel[64 * uc + 4 * ur], 4);
                        expected = static_cast<double>(value);
                    } else if (format == Format::bf16) {
                        const std::size_t at = 64 * (uc / 2) + 4 * ur + 2 * (uc % 2);
                        expected = static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(byte(at) | byte(at + 1) << 8) << 16));
                        step = std::abs(static_cast<double>(wanted)) / 256;
                    } else {
                        const bool q8 = format == Format::q8;
                        const std::size_t unit = uc / 64 * (q8 ? 1088 : 576), block = uc % 64 / 32, in = uc % 32, scales = unit + (q8 ? 1024 : 512) + 32 * block + 2 * ur;
                        const double scale = fp16_value(static_cast<unsigned>(byte(scales) | byte(scales + 1) << 8));
                        if (q8) {
                            const int value = byte(unit + 64 * (8 * block + in / 4) + 4 * ur + in % 4);
                            expected = (value < 128 ? value : value - 256) * scale;
                        } else {
                            const int value = byte(unit + 64 * (4 * block + in / 8) + 4 * ur + in % 4);
                            expected = ((in % 8 < 4 ? value & 15 : value >> 4) - 8) * scale;
                        }
                        step = std::abs(scale) * (q8 ? 0.58 : 1.02);
                    }
                    REQUIRE(static_cast<double>(found) == expected);
                    REQUIRE(std::abs(static_cast<double>(found - wanted)) <= step + 1e-9);
                }
        }
    }

    TEST_CASE("quantised activations reproduce their group within half a step, and hand on NaN and infinity") {
        std::mt19937 random(2);
        float x[32];
        std::int8_t bytes[32];
        for (int round = 0; round < 1000; ++round) {
            for (float& v : x) v = static_cast<float>(static_cast<int>(random() % 65536) - 32768) * std::ldexp(1.0f, static_cast<int>(random() % 3) - 20 + round % 40);
            const float scale = d::quantise_group(x, bytes);
            for (int i = 0; i < 32; ++i) REQUIRE(std::abs(static_cast<float>(bytes[i]) * scale - x[i]) <= 0.5001f * scale);
        }
        x[7] = INFINITY;
        CHECK(std::isnan(d::quantise_group(x, bytes)));
        x[7] = NAN;
        CHECK(std::isnan(d::quantise_group(x, bytes)));
        for (float& v : x) v = 1e-39f;
        CHECK(d::quantise_group(x, bytes) == 0);
    }

    TEST_CASE("format names go both ways, and an unknown one is refused with the list") {
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) CHECK(format_from_name(format_name(format)) == format);
        try {
            format_from_name("q5");
            FAIL("no error");
        } catch (const Error& error) {
            CHECK(std::string(error.what()).find("q5") != std::string::npos);
            CHECK(std::string(error.what()).find("f32 bf16 q8 q4") != std::string::npos);
        }
    }
}

}  // namespace
