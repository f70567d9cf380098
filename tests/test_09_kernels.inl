// §9: every kernel of every instruction set that this machine has, bit for bit against §5.
#include <numeric>
#include <random>

namespace {

#ifndef LLAMA3_TESTED_KERNELS  // or which ones, for a file that includes this
std::vector<const d::Kernels*> kernels_here() {
    std::vector<const d::Kernels*> found;
    for (const d::KernelChoice& choice : d::all_kernels())
        if (choice.supported) found.push_back(choice.kernels);
    return found;
}
#endif

std::vector<float> random_floats(std::size_t n, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<float> values(n);
    for (float& x : values) x = static_cast<float>(static_cast<int>(random() % 40001) - 20000) / 8000;
    return values;
}

bool same_bits(const float* a, const float* b, std::size_t n) { return std::memcmp(a, b, 4 * n) == 0; }

// A matrix of random weights in panels, with memory of its own.
struct RandomMatrix {
    d::AlignedBuffer memory;
    Matrix matrix;
    RandomMatrix(Format format, int rows, int columns, int segments, std::uint64_t seed) {
        const int padded = static_cast<int>(round_up(columns, unit_columns(format)));
        matrix = {format, nullptr, rows, columns, segments, static_cast<std::size_t>(padded / unit_columns(format)) * unit_bytes(format)};
        memory = d::AlignedBuffer(static_cast<std::size_t>(matrix.panels()) * matrix.panel_stride);
        matrix.data = memory.data();
        const std::vector<float> values = random_floats(static_cast<std::size_t>(rows * columns), seed);
        for (int panel = 0; panel < matrix.panels(); ++panel) {
            std::vector<float> sixteen(static_cast<std::size_t>(16 * padded));
            for (int r = 0; r < 16 && panel * 16 + r < rows; ++r)
                std::copy_n(values.begin() + (panel * 16 + r) * columns, columns, sixteen.begin() + r * padded);
            d::encode_panel(format, sixteen.data(), padded, memory.data() + static_cast<std::size_t>(panel) * matrix.panel_stride);
        }
    }
};

void check_product(const d::Kernels& kernels, const RandomMatrix& w, int tokens, bool add) {
    const Matrix& m = w.matrix;
    const std::size_t stride = static_cast<std::size_t>(round_up(m.columns, 64)), out_stride = static_cast<std::size_t>(round_up(m.rows, 64));
    std::vector<float> x(static_cast<std::size_t>(tokens) * stride);
    for (int t = 0; t < tokens; ++t) {
        const std::vector<float> row = random_floats(static_cast<std::size_t>(m.columns), static_cast<std::uint64_t>(t + 1));
        std::copy(row.begin(), row.end(), x.begin() + t * static_cast<int>(stride));
    }
    d::AlignedBuffer packed(static_cast<std::size_t>(tokens + d::max_tile_tokens) * d::packed_bytes(m.format, m.columns));
    const int together = kernels.tokens_together(m.format, tokens);
    for (int t = 0; t < tokens; t += together)
        kernels.pack(m.format, packed.data() + static_cast<std::size_t>(t) * d::packed_bytes(m.format, m.columns), x.data() + static_cast<std::size_t>(t) * stride, stride,
                     std::min(together, tokens - t), together, m.columns);
    std::vector<float> out(static_cast<std::size_t>(tokens) * out_stride, 0.25f);
    const int half = m.panels() / 2;  // in two runs of panels, as two threads would
    d::AlignedBuffer room(d::room_bytes(m.columns));
    kernels.multiply({m, packed.data(), tokens, together, out.data(), out_stride, add, half, m.panels(), room.data(), 1});
    kernels.multiply({m, packed.data(), tokens, together, out.data(), out_stride, add, 0, half, room.data(), 4});
    std::vector<float> expected(static_cast<std::size_t>(m.rows));
    for (int t = 0; t < tokens; ++t) {
        d::linear(expected.data(), m, x.data() + static_cast<std::size_t>(t) * stride);
        for (std::size_t r = 0; r < expected.size(); ++r) {
            if (add) expected[r] = 0.25f + expected[r];
            const float found = out[static_cast<std::size_t>(t) * out_stride + r];
            if (m.format == Format::bf16 && kernels.own_bf16) {
                // A sum of n products of size 1 is rounded by 1e-7 n, whatever the order.
                const float close = 1e-4f * (1 + std::abs(expected[r])) + 2e-7f * static_cast<float>(m.columns);
                if (!(std::abs(found - expected[r]) <= close)) FAIL(kernels.name, " token ", t, " row ", r, ": ", found, " for ", expected[r]);
            } else if (!same_bits(&found, &expected[r], 1)) {
                FAIL(kernels.name, " ", format_name(m.format), " ", m.rows, "x", m.columns, " token ", t, " of ", tokens, " row ", r, ": ", found, " for ", expected[r]);
            }
        }
    }
}

TEST_SUITE("core: kernels") {
    TEST_CASE("products have the bits of the reference for every format, shape, batch and segment count") {
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4})
            for (const auto& [rows, columns, segments] : {std::array{16, 64, 1}, std::array{40, 100, 1}, std::array{5, 7, 1}, std::array{64, 512, 8}, std::array{72, 128, 2}, std::array{48, 448, 1}}) {
                const RandomMatrix w(format, rows, columns, segments, static_cast<std::uint64_t>(rows * columns));
                for (const d::Kernels* kernels : kernels_here()) {
                    for (int tokens : {1, 2, 3, 4, 5, 6, 7, 8, 15, 31}) check_product(*kernels, w, tokens, tokens % 2 == 0);
                    const int tile = kernels->tile_tokens[static_cast<std::size_t>(format)];  // many tokens: whole tiles and a rest
                    for (int rest = 0; rest < tile; rest += tile < 16 ? 1 : 5) {
                        check_product(*kernels, w, 4 * tile + rest, rest % 2 == 0);
                        check_product(*kernels, w, 12 * tile + rest, rest % 2 == 1);  // so many that weights are unpacked
                    }
                }
            }
        CHECK(kernels_here().size() >= 1);
    }

    TEST_CASE("panels and tokens that are taken a part at a time have the bits of the reference") {
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
            const RandomMatrix tall(format, 30 * panel_rows, 4096, 1, 9), wide(format, panel_rows, 8192, 8, 10);
            CHECK(15 * tall.matrix.panel_stride > 2 * d::panels_at_once);  // so each half takes several goes
            for (const d::Kernels* kernels : kernels_here()) {
                const int tile = kernels->tile_tokens[static_cast<std::size_t>(format)];
                check_product(*kernels, tall, 4 * tile + 1, false);
                check_product(*kernels, wide, 9 * tile, false);  // weights that are unpacked
                const int many = static_cast<int>(d::tokens_at_once / d::packed_bytes(format, 8192)) + 20;
                if (format == Format::f32 || format == Format::q8) check_product(*kernels, wide, many, true);
            }
        }
    }

    TEST_CASE("extreme bytes do not saturate") {
        RandomMatrix q8(Format::q8, 16, 64, 1, 3), q4(Format::q4, 16, 64, 1, 4);
        for (std::size_t i = 0; i < 1024; ++i) q8.memory.data()[i] = static_cast<std::byte>(i % 3 ? 127 : 129);
        for (std::size_t i = 0; i < 512; ++i) q4.memory.data()[i] = static_cast<std::byte>(i % 3 ? 0xff : 0x0f);
        std::vector<float> x(64);
        for (std::size_t i = 0; i < 64; ++i) x[i] = i % 5 == 4 ? -1.0f : 1.0f;
        for (const RandomMatrix* w : {&q8, &q4})
            for (const d::Kernels* kernels : kernels_here()) {
                std::vector<float> out(64), expected(16);
                d::AlignedBuffer packed(d::packed_bytes(w->matrix.format, 64)), room(d::room_bytes(64));
                kernels->pack(w->matrix.format, packed.data(), x.data(), 64, 1, 1, 64);
                kernels->multiply({w->matrix, packed.data(), 1, 1, out.data(), 64, false, 0, 1, room.data()});
                d::linear(expected.data(), w->matrix, x.data());
                CHECK(same_bits(out.data(), expected.data(), 16));
            }
    }

    TEST_CASE("NaN and infinity in the activations reach every output they touch") {
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
            const RandomMatrix w(format, 16, 64, 1, 5);
            for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
                for (const d::Kernels* kernels : kernels_here()) {
                    std::vector<float> x(64, 1.0f), out(64);
                    x[40] = bad;
                    d::AlignedBuffer packed(d::packed_bytes(format, 64)), room(d::room_bytes(64));
                    kernels->pack(format, packed.data(), x.data(), 64, 1, 1, 64);
                    kernels->multiply({w.matrix, packed.data(), 1, 1, out.data(), 64, false, 0, 1, room.data()});
                    for (int r = 0; r < 16; ++r) CHECK(!(std::abs(out[static_cast<std::size_t>(r)]) < 1e30f));
                }
        }
    }

    TEST_CASE("the norm and SwiGLU have the bits of the reference at every width") {
        for (const d::Kernels* kernels : kernels_here())
            for (int n : {1, 3, 8, 15, 16, 17, 40, 100, 256}) {
                const std::size_t padded = static_cast<std::size_t>(round_up(n, 64)), count = static_cast<std::size_t>(n);
                std::vector<float> x = random_floats(padded, 6), weight = random_floats(padded, 7), out(padded), expected(padded);
                kernels->normalise(out.data(), x.data(), weight.data(), n, 1e-5f);
                d::rmsnorm(expected.data(), x.data(), weight.data(), n, 1e-5f);
                CHECK(same_bits(out.data(), expected.data(), count));
                std::vector<float> gate = random_floats(padded, 8), up = random_floats(padded, 9);
                for (std::size_t i = 0; i < padded; ++i) gate[i] *= 40, expected[i] = d::silu(gate[i]) * up[i];
                kernels->swiglu(gate.data(), up.data(), static_cast<int>(padded));
                CHECK(same_bits(gate.data(), expected.data(), padded));
            }
    }

    TEST_CASE("the rotation of a head has the bits of the reference at every width") {
        for (const d::Kernels* kernels : kernels_here())
            for (int n : {2, 6, 8, 16, 20, 34, 64, 128}) {
                const std::size_t width = static_cast<std::size_t>(n);
                std::vector<float> x = random_floats(width, 10), expected = x, turns = random_floats(2 * width, 11);
                for (std::size_t i = 0; i < width; i += 2) turns[width + i] = -turns[i + 1], turns[width + i + 1] = turns[i];
                kernels->rope(x.data(), turns.data(), n);
                d::rope(expected.data(), turns.data(), n);
                CHECK(same_bits(x.data(), expected.data(), width));
            }
    }

    TEST_CASE("attention has the bits of the reference for every cache format, head width, group of heads and block of rows") {
        Config config;
        config.n_layers = 2, config.n_kv_heads = 2;
        for (int head_dim : {2, 8, 16, 20, 64, 80, 128, 520})
            for (Format kv : {Format::f32, Format::bf16, Format::q8}) {
                config.head_dim = head_dim;
                const int capacity = head_dim > 128 ? 530 : 1100;
                const std::size_t width = static_cast<std::size_t>(head_dim);
                d::ReferenceCache reference(config, capacity, kv);
                d::CpuCache cache(config, capacity, kv);
                const auto fill = [&](d::ReferenceCache* expected, int p, float factor) {
                    for (int head = 0; head < 2; ++head) {
                        std::vector<float> key = random_floats(width, static_cast<std::uint64_t>(p * 4 + head)), value = random_floats(width, static_cast<std::uint64_t>(p * 4 + head + 2));
                        for (float& x : value) x *= factor;
                        for (float& x : key) x *= factor;
                        if (expected) expected->store(1, p, head, key.data(), value.data());
                        cache.store(1, head, p, key.data(), value.data());
                    }
                };
                for (int p = 0; p < capacity; ++p) fill(&reference, p, 1);
                struct Case {
                    int group;
                    std::vector<int> positions;
                };
                std::vector<int> run(64);  // over the border between two segments
                std::iota(run.begin(), run.end(), 470);
                for (const Case& c : {Case{1, {0}}, {3, {0, 1, 2}}, {8, {14}}, {1, {15}}, {4, {16, 17, 18, 19, 20}}, {5, {62, 63, 64, 65, 66}}, {2, {126, 127, 128}}, {4, {510}}, {8, {511}}, {3, {512}},
                                      {1, run}, {4, {run.begin(), run.begin() + 16}}, {2, {5, 70, 300, 511, 512, 529}}, {4, {1049}}, {5, {700}}, {3, {1000, 1001, 1023, 1024}}, {5, {1040, 1049}}}) {
                    const int last = c.positions.back(), n_rows = static_cast<int>(c.positions.size()), queries = n_rows * c.group;
                    if (last >= capacity || (head_dim > 128 && queries > 40 && kv != Format::f32)) continue;  // one format of these: the reference takes seconds
                    // What lies behind the last row is not there yet; no row may see what lies behind its own position.
                    for (int p = last + 1; p < std::min(last + 40, capacity); ++p) fill(nullptr, p, p % 2 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN());
                    const std::size_t used = static_cast<std::size_t>(c.group) * width, stride = used + 5;
                    const std::vector<float> query = random_floats(static_cast<std::size_t>(n_rows) * stride, static_cast<std::uint64_t>(last));
                    std::vector<float> expected(query.size(), -1.0f), out;
                    std::vector<Row> rows;
                    for (int t = 0; t < n_rows; ++t) {
                        rows.push_back({0, c.positions[static_cast<std::size_t>(t)], &cache, false});
                        for (int g = 0; g < c.group; ++g) {
                            const std::size_t at = static_cast<std::size_t>(t) * stride + static_cast<std::size_t>(g) * width;
                            d::attend_reference(expected.data() + at, query.data() + at, reference, 1, 1, rows.back().position + 1, head_dim);
                        }
                    }
                    std::vector<float> scratch(d::attention_floats(queries, head_dim)), joined(d::mix_floats(queries, head_dim)), mix(joined.size());
                    for (const d::Kernels* kernels : kernels_here()) {
                        for (std::vector<float>* memory : {&scratch, &joined, &mix}) std::fill(memory->begin(), memory->end(), std::numeric_limits<float>::quiet_NaN());
                        out.assign(query.size(), -1.0f);
                        d::Attention attention{{}, rows.data(), query.data(), out.data(), stride, n_rows, c.group, scratch.data()};
                        for (int s = 0; s < attention.segments(); ++s) {
                            attention.cache = cache.view(1, 1, s);
                            kernels->attend(attention, s, s == 0 ? joined.data() : mix.data());
                            kernels->join(attention, s, joined.data(), mix.data());
                        }
                        if (!same_bits(out.data(), expected.data(), out.size())) FAIL(kernels->name, " E ", head_dim, " kv ", format_name(kv), " group ", c.group, " rows ", n_rows, " up to ", last);
                    }
                    for (int p = last + 1; p < std::min(last + 40, capacity); ++p) fill(nullptr, p, 1);
                }
            }
    }

    TEST_CASE("what a later row of the block sees does not reach an earlier one: NaN, infinity, and the sign of zero") {
        Config config;
        config.n_layers = 1, config.n_kv_heads = 1, config.head_dim = 16;
        for (Format kv : {Format::f32, Format::bf16, Format::q8})
            for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1.0f})
                for (int first : {0, 61, 509, 515})
                    for (int bad_from : {1, 2, 5}) {
                        d::ReferenceCache reference(config, 600, kv);
                        d::CpuCache cache(config, 600, kv);
                        for (int p = 0; p < 600; ++p) {
                            const bool late = p > first + bad_from;
                            std::vector<float> key(16, late ? bad : 0.5f), value(16, late ? bad : -1e-45f);  // a mix of these rounds to -0
                            reference.store(0, p, 0, key.data(), value.data()), cache.store(0, 0, p, key.data(), value.data());
                        }
                        const std::vector<float> query = random_floats(8 * 16, 3);
                        std::vector<Row> rows;
                        for (int t = 0; t < 8; ++t) rows.push_back({0, first + t, &cache, false});
                        std::vector<float> scratch(d::attention_floats(8, 16)), joined(d::mix_floats(8, 16)), mix(joined), out(query), expected(16);
                        for (const d::Kernels* kernels : kernels_here()) {
                            d::Attention attention{{}, rows.data(), query.data(), out.data(), 16, 8, 1, scratch.data()};
                            for (int s = 0; s < attention.segments(); ++s) {
                                attention.cache = cache.view(0, 0, s);
                                kernels->attend(attention, s, s == 0 ? joined.data() : mix.data());
                                kernels->join(attention, s, joined.data(), mix.data());
                            }
                            for (std::size_t t = 0; t < 8; ++t) {
                                d::attend_reference(expected.data(), query.data() + 16 * t, reference, 0, 0, first + static_cast<int>(t) + 1, 16);
                                if (std::isnan(expected[0])) CHECK(std::isnan(out[16 * t]));
                                else CHECK(same_bits(out.data() + 16 * t, expected.data(), 16));
                                if (static_cast<int>(t) <= bad_from) CHECK(!std::isnan(out[16 * t]));
                            }
                        }
                    }
    }
}

}  // namespace
