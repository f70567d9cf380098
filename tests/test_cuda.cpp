// kernels.cuh: every kernel and the whole CUDA back end against the plain loops of llama3.hpp, §5. Compiled as C++ with
// -DLLAMA3_CUDA_EMULATOR it runs on the emulator, compiled by nvcc on a GPU.
#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"

#include "kernels.cuh"

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cmath>
#include <optional>
#include <random>
#include <thread>

#ifndef LLAMA3_SOURCE_DIR
#define LLAMA3_SOURCE_DIR "."
#endif

using namespace llama3;
namespace d = llama3::detail;

namespace {

constexpr Format all_formats[] = {Format::f32, Format::bf16, Format::q8, Format::q4};
constexpr Format cache_formats[] = {Format::bf16, Format::q8};

struct Shape {
    int dim, heads, kv_heads, head_dim, ffn_dim;
};

Config config_of(Shape s, int context = 2048, int layers = 2) {
    Config c;
    c.n_layers = layers, c.dim = s.dim, c.n_heads = s.heads, c.n_kv_heads = s.kv_heads, c.head_dim = s.head_dim,
    c.ffn_dim = s.ffn_dim;
    c.vocab_size = 530, c.context_length = context;
    c.rope_factor = 32, c.rope_low_freq_factor = 1, c.rope_high_freq_factor = 4, c.rope_original_context = 256;
    return c;
}
const Shape small{72, 2, 1, 64, 104};       // widths that fill no block, no panel and no unit
const Shape segmented{128, 8, 2, 64, 512};  // eight segments in W_o and W_down
const Shape wide{320, 4, 4, 128, 448};      // heads of 128

std::vector<float> some_floats(std::size_t n, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<float> values(n);
    for (float& x : values) x = static_cast<float>(static_cast<int>(random() % 20001) - 10000) * 1e-4f;
    return values;
}
std::vector<int> some_tokens(int n, int vocab_size) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::vector<int> tokens(static_cast<std::size_t>(n));
    for (int& token : tokens) token = static_cast<int>(random() % static_cast<unsigned>(vocab_size));
    return tokens;
}
std::vector<float> row(std::span<const float> logits) { return {logits.begin(), logits.end()}; }

// Largest difference, as a share of the largest value. Infinite where anything is not a number.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
    double worst = 0, largest = 1e-30;
    for (std::size_t i = 0; i < a.size(); ++i) {
        const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
        worst = difference == difference ? std::max(worst, difference) : INFINITY;
        largest = std::max(largest, std::abs(static_cast<double>(b[i])));
    }
    return a.size() == b.size() && !a.empty() ? worst / largest : INFINITY;
}
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && !a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Between a product of the plain loops and one of ours: sums in another order; where activations are rounded, one of them may be
// rounded the other way.
double tolerance(Format format) { return format == Format::f32 ? 2e-5 : 6e-3; }
// Where cuBLASLt and tensor cores take part every activation is rounded to bf16.
constexpr double prompt_tolerance = 2e-2;

Options with(Format kv, int chunk = 64, int context = 600) {
    Options options;
    options.kv = kv, options.chunk = chunk, options.context = context, options.threads = 1;
    return options;
}

std::shared_ptr<Device> gpu_device() {
    static const std::shared_ptr<Device> device = cuda();
    return device;
}

// Back ends work on streams that do not wait for copies and fills, nor these for them.
void settle() { gpu::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize", "test"); }

// Rows of floats on the device, poisoned; rows are filled up to a multiple of 64 with what must not matter.
struct DeviceRows {
    gpu::Memory memory;
    Tensor tensor;
    DeviceRows(int rows, int columns) {
        tensor = {nullptr, rows, columns, static_cast<std::size_t>(round_up(columns, 64))};
        memory = gpu::Memory(gpu::Memory::Kind::device, static_cast<std::size_t>(rows) * tensor.stride * sizeof(float), "test");
        gpu::check(cudaMemset(memory.data(), 0xff, memory.bytes()), "cudaMemset", "test");
        tensor.data = memory.as<float>();
        settle();
    }
    DeviceRows(const Tensor& host) : DeviceRows(host.rows, host.columns) {
        for (int t = 0; t < host.rows; ++t)
            gpu::check(cudaMemcpy(tensor.row(t), host.row(t), sizeof(float) * static_cast<std::size_t>(host.columns),
                                  cudaMemcpyHostToDevice),
                       "cudaMemcpy", "test");
        settle();
    }
    std::vector<float> get(int rows = -1) const {
        settle();
        std::vector<float> values;
        for (int t = 0; t < (rows < 0 ? tensor.rows : rows); ++t) {
            std::vector<float> one(static_cast<std::size_t>(tensor.columns));
            gpu::check(cudaMemcpy(one.data(), tensor.row(t), one.size() * sizeof(float), cudaMemcpyDeviceToHost), "cudaMemcpy",
                       "test");
            values.insert(values.end(), one.begin(), one.end());
        }
        return values;
    }
};
std::vector<float> values_of(const Tensor& t, int rows = -1) {
    std::vector<float> values;
    for (int i = 0; i < (rows < 0 ? t.rows : rows); ++i) values.insert(values.end(), t.row(i), t.row(i) + t.columns);
    return values;
}

// One model on both back ends, stage by stage, on the same inputs.
struct Twins {
    Model model;
    Config config;
    Options options;
    std::unique_ptr<Backend> cuda_owner, reference_owner;
    gpu::CudaBackend& device;
    d::ReferenceBackend& plain;
    std::vector<std::unique_ptr<KVCache>> device_caches, plain_caches;
    std::vector<Row> device_rows, plain_rows;

    Twins(const Config& c, Format format, const Options& o, std::shared_ptr<Device> on = gpu_device())
        : model(Model::synthetic(c, format)), config(model.config()), options(o), cuda_owner(on->open(model, o)),
          reference_owner(reference()->open(model, o)), device(static_cast<gpu::CudaBackend&>(*cuda_owner)),
          plain(static_cast<d::ReferenceBackend&>(*reference_owner)) {}

    // A row per position; `together`: all of one sequence, else each of its own.
    void rows(const std::vector<int>& positions, bool together) {
        device_rows.clear(), plain_rows.clear(), device_caches.clear(), plain_caches.clear();
        for (std::size_t t = 0; t < positions.size(); ++t) {
            if (t == 0 || !together) device_caches.push_back(device.make_cache()), plain_caches.push_back(plain.make_cache());
            const int token = static_cast<int>(t * 37 + 11) % config.vocab_size;
            device_rows.push_back({token, positions[t], device_caches.back().get(), t % 3 != 1});
            plain_rows.push_back({token, positions[t], plain_caches.back().get(), t % 3 != 1});
        }
        device.fill_tables(device_batch());
    }
    Batch device_batch() const { return {device_rows}; }
    Batch plain_batch() const { return {plain_rows}; }
    int n() const { return static_cast<int>(device_rows.size()); }

    // Random keys and values in positions 0 to n - 1 of all layers and heads of both caches.
    void fill_caches(int positions) {
        for (std::size_t i = 0; i < device_caches.size(); ++i) {
            auto& device_cache = static_cast<gpu::CudaCache&>(*device_caches[i]);
            auto& plain_cache = static_cast<d::ReferenceCache&>(*plain_caches[i]);
            const gpu::CacheShape shape = gpu::cache_shape(config, options.kv);
            const int capacity = device_cache.capacity();
            const std::size_t elements = shape.elements(capacity), width = shape.element_bytes();
            std::vector<std::byte> image(shape.bytes(capacity), std::byte{0xff});  // beyond the positions: NaN
            for (int layer = 0; layer < config.n_layers; ++layer)
                for (int head = 0; head < config.n_kv_heads; ++head)
                    for (int p = 0; p < positions; ++p) {
                        const auto seed = static_cast<unsigned>(((layer * 31 + head) * 7919 + p) * 13 + static_cast<int>(i));
                        const std::vector<float> both = some_floats(2 * static_cast<std::size_t>(config.head_dim), seed);
                        plain_cache.store(layer, p, head, both.data(), both.data() + config.head_dim);
                        for (int kind = 0; kind < 2; ++kind)
                            for (int e = 0; e < config.head_dim; e += 32) {
                                const float* x = both.data() + kind * config.head_dim + e;
                                const std::size_t at = shape.element(capacity, layer, head, p) + static_cast<std::size_t>(e);
                                std::byte* to = image.data() + (static_cast<std::size_t>(kind) * elements + at) * width;
                                std::int8_t bytes[32];
                                const std::uint16_t scale = d::quantise_channels(x, 32, bytes);
                                for (std::size_t k = 0; k < 32; ++k) {
                                    if (options.kv == Format::bf16) d::store_as(to + 2 * k, d::to_bf16(x[k]));
                                    if (options.kv == Format::q8) d::store_as(to + k, bytes[k]);
                                }
                                if (options.kv == Format::q8)
                                    d::store_as(image.data() + 2 * elements + static_cast<std::size_t>(kind) * (elements / 16) +
                                                    at / 32 * 2,
                                                scale);
                            }
                    }
            gpu::check(cudaMemcpy(device_cache.data(), image.data(), image.size(), cudaMemcpyHostToDevice), "cudaMemcpy",
                       "test");
            settle();
        }
    }
};

std::vector<int> iota(int first, int n) {
    std::vector<int> values;
    for (int i = 0; i < n; ++i) values.push_back(first + i);
    return values;
}

// The logits of all tokens, one row after the other.
std::vector<float> run(const Model& model, std::span<const int> tokens, Options options, std::shared_ptr<Device> device) {
    options.device = std::move(device);
    Session session(model, options);
    std::vector<float> rows;
    session.feed(tokens, [&](int, std::span<const float> logits) { rows.insert(rows.end(), logits.begin(), logits.end()); });
    return rows;
}

#ifdef LLAMA3_CUDA_EMULATOR
// A device as it might be.
struct Device_ {
    decltype(cuda_emu::device) before = cuda_emu::device;
    ~Device_() { cuda_emu::device = before; }
};
#endif

std::string message_of(const std::function<void()>& f) {
    try {
        f();
    } catch (const Error& error) {
        return error.what();
    }
    return "no error";
}

}  // namespace

TEST_SUITE("core: stages on the device") {
    TEST_CASE("each stage of 1 to 8 rows is that of the plain loops, for every format, from poisoned outputs") {
        for (const Shape& shape : {small, segmented, wide})
            for (const Format format : all_formats)
                for (const int n : {1, 2, 3, 5, 8}) {
                    Twins twins(config_of(shape), format, with(cache_formats[n % 2]));
                    CAPTURE(shape.dim);
                    CAPTURE(format_name(format));
                    CAPTURE(n);
                    std::vector<int> positions;
                    for (int t = 0; t < n; ++t) positions.push_back(0);
                    twins.rows(positions, false);
                    const Config& c = twins.config;
                    const Layer &layer = twins.device.weights().layers[1], &plain_layer = twins.model.weights().layers[1];
                    const double close = tolerance(format);

                    d::OwnedTensor x(n, c.dim), query(n, c.n_heads * c.head_dim), mixed(n, c.n_heads * c.head_dim),
                        hidden(n, c.ffn_dim), logits(n, c.vocab_size);
                    DeviceRows dx(n, c.dim), dquery(n, query.tensor.columns), dmixed(n, mixed.tensor.columns),
                        dhidden(n, c.ffn_dim), dlogits(n, c.vocab_size);
                    twins.plain.embed(x.tensor, twins.model.weights().embedding, twins.plain_batch());
                    twins.device.embed(dx.tensor, twins.device.weights().embedding, twins.device_batch());
                    CHECK(same_bits(dx.get(), values_of(x.tensor)));

                    twins.plain.project_qkv(query.tensor, x.tensor, plain_layer, twins.plain_batch());
                    twins.device.project_qkv(dquery.tensor, dx.tensor, layer, twins.device_batch());
                    CHECK(distance(dquery.get(), values_of(query.tensor)) < close);

                    // of keys and values only what attention reads of them is seen
                    twins.plain.attend(mixed.tensor, query.tensor, plain_layer, twins.plain_batch());
                    twins.device.attend(dmixed.tensor, DeviceRows(query.tensor).tensor, layer, twins.device_batch());
                    CHECK(distance(dmixed.get(), values_of(mixed.tensor)) < 2e-2);

                    twins.device.project_out(dx.tensor, DeviceRows(mixed.tensor).tensor, layer);
                    twins.plain.project_out(x.tensor, mixed.tensor, plain_layer);
                    CHECK(distance(dx.get(), values_of(x.tensor)) < close);

                    twins.device.gate_up(dhidden.tensor, DeviceRows(x.tensor).tensor, layer);
                    twins.plain.gate_up(hidden.tensor, x.tensor, plain_layer);
                    CHECK(distance(dhidden.get(), values_of(hidden.tensor)) < close);

                    DeviceRows again(x.tensor);
                    twins.device.down(again.tensor, DeviceRows(hidden.tensor).tensor, layer);
                    twins.plain.down(x.tensor, hidden.tensor, plain_layer);
                    CHECK(distance(again.get(), values_of(x.tensor)) < close);

                    int wanted = 0;
                    for (const Row& r : twins.plain_rows) wanted += r.wants_logits;
                    Tensor wanted_rows = dlogits.tensor;
                    wanted_rows.rows = wanted;
                    twins.device.logits(wanted_rows, DeviceRows(x.tensor).tensor, twins.device.weights(), twins.device_batch());
                    twins.plain.logits(logits.tensor, x.tensor, twins.model.weights(), twins.plain_batch());
                    CHECK(distance(dlogits.get(wanted), values_of(logits.tensor, wanted)) <
                          tolerance(twins.model.weights().output.format));
                }
    }

    TEST_CASE(
        "attention of single rows joins its segments as the plain loops do, at every border and for 1 to 8 heads per key") {
        for (const std::array<int, 3>& shape : std::vector<std::array<int, 3>>{
                 {2, 2, 64}, {4, 2, 128}, {3, 1, 64}, {4, 1, 64}, {5, 1, 128}, {8, 1, 64}, {16, 2, 128}})
            for (const Format kv : cache_formats) {
                const int heads = shape[0], kv_heads = shape[1], head_dim = shape[2];
                Config c = config_of({64, heads, kv_heads, head_dim, 64}, 2048, 1);
                Twins twins(c, Format::f32, with(kv, 64, 1100));
                CAPTURE(heads);
                CAPTURE(kv_heads);
                CAPTURE(head_dim);
                CAPTURE(format_name(kv));
                const std::vector<int> positions =
                    heads == 4 ? std::vector<int>{0, 6, 511, 512, 1023, 1024, 1099} : std::vector<int>{3, 520};
                twins.rows(positions, true);
                twins.fill_caches(1100);
                const int n = twins.n(), width = heads * head_dim;
                d::OwnedTensor x(n, c.dim), query(n, width), mixed(n, width);
                const std::vector<float> values = some_floats(query.memory.size(), 5);
                std::copy(values.begin(), values.end(), query.memory.begin());
                DeviceRows dx(n, c.dim), dmixed(n, width);
                twins.plain.embed(x.tensor, twins.model.weights().embedding, twins.plain_batch());
                twins.device.embed(dx.tensor, twins.device.weights().embedding, twins.device_batch());
                twins.plain.attend(mixed.tensor, query.tensor, twins.model.weights().layers[0], twins.plain_batch());
                for (int again = 0; again < 2; ++again) {  // the tickets are as before
                    twins.device.attend(dmixed.tensor, DeviceRows(query.tensor).tensor, twins.device.weights().layers[0],
                                        twins.device_batch());
                    CHECK(distance(dmixed.get(), values_of(mixed.tensor)) < 1e-5);
                }
            }
    }

    TEST_CASE("attention of a prompt is that of the plain loops within bf16, wherever it starts and ends") {
        for (const std::array<int, 3>& shape : std::vector<std::array<int, 3>>{{2, 1, 64}, {2, 2, 128}})
            for (const Format kv : cache_formats)
                for (const std::array<int, 2>& part : std::vector<std::array<int, 2>>{{0, 9}, {0, 64}, {61, 70}, {500, 33}}) {
                    const int heads = shape[0], kv_heads = shape[1], head_dim = shape[2], first = part[0], count = part[1];
                    if (head_dim == 128 && count == 64) continue;
                    Config c = config_of({64, heads, kv_heads, head_dim, 64}, 2048, 1);
                    Twins twins(c, Format::f32, with(kv, 128, 700));
                    CAPTURE(head_dim);
                    CAPTURE(format_name(kv));
                    CAPTURE(first);
                    CAPTURE(count);
                    twins.rows(iota(first, count), true);
                    twins.fill_caches(first + count);
                    const int width = heads * head_dim;
                    d::OwnedTensor query(count, width), mixed(count, width);
                    const std::vector<float> values = some_floats(query.memory.size(), 6);
                    for (std::size_t i = 0; i < values.size(); ++i) query.memory[i] = 3 * values[i];
                    DeviceRows dx(count, c.dim), dmixed(count, width);
                    std::vector<Row> plain_rows = twins.plain_rows;
                    for (int t = 0; t < count; t += 64) {  // the plain loops take 64 rows at a time
                        const int part = std::min(64, count - t);
                        const std::span<const Row> rows =
                            std::span<const Row>(plain_rows)
                                .subspan(static_cast<std::size_t>(t), static_cast<std::size_t>(part));
                        d::OwnedTensor x(part, c.dim);
                        twins.plain.embed(x.tensor, twins.model.weights().embedding, {rows});
                        const Tensor m{mixed.tensor.row(t), part, width, mixed.tensor.stride},
                            q{query.tensor.row(t), part, width, query.tensor.stride};
                        twins.plain.attend(m, q, twins.model.weights().layers[0], {rows});
                    }
                    twins.device.embed(dx.tensor, twins.device.weights().embedding, twins.device_batch());
                    twins.device.attend(dmixed.tensor, DeviceRows(query.tensor).tensor, twins.device.weights().layers[0],
                                        twins.device_batch());
                    CHECK(distance(dmixed.get(), values_of(mixed.tensor)) < 1e-2);
                }
    }

    TEST_CASE("each stage of a prompt is that of the plain loops within bf16") {
        for (const Shape& shape : {small, segmented})
            for (const Format format : all_formats) {
                const int n = 21;
                Twins twins(config_of(shape), format, with(Format::bf16));
                CAPTURE(shape.dim);
                CAPTURE(format_name(format));
                twins.rows(iota(0, n), true);
                const Config& c = twins.config;
                const Layer &layer = twins.device.weights().layers[1], &plain_layer = twins.model.weights().layers[1];
                d::OwnedTensor x(n, c.dim), query(n, c.n_heads * c.head_dim), mixed(n, c.n_heads * c.head_dim),
                    hidden(n, c.ffn_dim), logits(n, c.vocab_size);
                DeviceRows dx(n, c.dim), dquery(n, query.tensor.columns), dmixed(n, mixed.tensor.columns),
                    dhidden(n, c.ffn_dim), dlogits(n, c.vocab_size);
                twins.plain.embed(x.tensor, twins.model.weights().embedding, twins.plain_batch());
                twins.device.embed(dx.tensor, twins.device.weights().embedding, twins.device_batch());
                CHECK(same_bits(dx.get(), values_of(x.tensor)));
                twins.plain.project_qkv(query.tensor, x.tensor, plain_layer, twins.plain_batch());
                twins.device.project_qkv(dquery.tensor, dx.tensor, layer, twins.device_batch());
                CHECK(distance(dquery.get(), values_of(query.tensor)) < prompt_tolerance);
                twins.plain.attend(mixed.tensor, query.tensor, plain_layer, twins.plain_batch());
                twins.device.attend(dmixed.tensor, DeviceRows(query.tensor).tensor, layer, twins.device_batch());
                CHECK(distance(dmixed.get(), values_of(mixed.tensor)) < prompt_tolerance);
                DeviceRows out(x.tensor);
                twins.device.project_out(out.tensor, DeviceRows(mixed.tensor).tensor, layer);
                twins.plain.project_out(x.tensor, mixed.tensor, plain_layer);
                CHECK(distance(out.get(), values_of(x.tensor)) < prompt_tolerance);
                twins.device.gate_up(dhidden.tensor, DeviceRows(x.tensor).tensor, layer);
                twins.plain.gate_up(hidden.tensor, x.tensor, plain_layer);
                CHECK(distance(dhidden.get(), values_of(hidden.tensor)) < prompt_tolerance);
                DeviceRows again(x.tensor);
                twins.device.down(again.tensor, DeviceRows(hidden.tensor).tensor, layer);
                twins.plain.down(x.tensor, hidden.tensor, plain_layer);
                CHECK(distance(again.get(), values_of(x.tensor)) < prompt_tolerance);
                int wanted = 0;
                for (const Row& r : twins.plain_rows) wanted += r.wants_logits;
                REQUIRE(wanted > 8);
                Tensor wanted_rows = dlogits.tensor;
                wanted_rows.rows = wanted;
                twins.device.logits(wanted_rows, DeviceRows(x.tensor).tensor, twins.device.weights(), twins.device_batch());
                twins.plain.logits(logits.tensor, x.tensor, twins.model.weights(), twins.plain_batch());
                CHECK(distance(dlogits.get(wanted), values_of(logits.tensor, wanted)) < prompt_tolerance);
            }
    }
}

TEST_SUITE("core: identities on the device") {
    // W [rows, columns] times n rows of x by items of `panels` panels.
    std::vector<float> product(const Matrix& w, const Tensor& x, int n, int blocks, int panels) {
        DeviceRows input(Tensor{x.data, n, x.columns, x.stride}), out(n, w.rows);
        gpu::with_format(w.format, [&]<class W>(W) {
            const gpu::Input in{input.tensor.data, input.tensor.stride, x.columns, nullptr, 0, nullptr};
            const gpu::PutRows epilogue{{gpu::Panels(w), panels}, out.tensor.data, out.tensor.stride, false};
            const auto launch = [&]<int columns>(gpu::Constant<columns>) {
                gpu::launch("test", gpu::matvec<W, columns, gpu::PutRows>, dim3(static_cast<unsigned>(blocks)),
                            gpu::matvec_threads, gpu::matvec_shared_bytes<W, columns>(w.units()), cudaStream_t{}, in, epilogue,
                            0, n);
            };
            if (n == 1) launch(gpu::Constant<1>{});
            else if (n == 2) launch(gpu::Constant<2>{});
            else if (n <= 4) launch(gpu::Constant<4>{});
            else launch(gpu::Constant<8>{});
        });
        return out.get();
    }

    TEST_CASE("a row's product has the same bits in a batch of 1 to 8 and on any number of blocks") {
        for (const Format format : all_formats) {
            const Model model = Model::synthetic(config_of(segmented), format);
            const gpu::DeviceWeights weights(model, share_of(model.config(), model.weights(), 0, 1), gpu::Gpu{}, {});
            const Matrix& w = weights.weights().layers[0].down;
            d::OwnedTensor x(8, w.columns);
            const std::vector<float> values = some_floats(x.memory.size(), 9);
            std::copy(values.begin(), values.end(), x.memory.begin());
            const std::vector<float> all = product(w, x.tensor, 8, 3, 1);
            for (const int n : {1, 2, 3, 5, 8})
                for (const int blocks : {1, 4, 1000}) {
                    if (n != 2 && blocks != 4) continue;
                    CAPTURE(format_name(format));
                    CAPTURE(n);
                    CHECK(same_bits(product(w, x.tensor, n, blocks, 1), {all.begin(), all.begin() + n * w.rows}));
                }
        }
    }

    TEST_CASE("2, 4 and 8 ranks, each with its segments of the columns, give the bits of one") {
        for (const Format format : all_formats) {
            const Model model = Model::synthetic(config_of(segmented), format);
            const gpu::DeviceWeights weights(model, share_of(model.config(), model.weights(), 0, 1), gpu::Gpu{}, {});
            const Matrix& w = weights.weights().layers[0].down;
            REQUIRE(w.segments == 8);
            d::OwnedTensor x(1, w.columns);
            const std::vector<float> values = some_floats(x.memory.size(), 10);
            std::copy(values.begin(), values.end(), x.memory.begin());
            const std::vector<float> whole = product(w, x.tensor, 1, 4, 1);
            for (const int ranks : {2, 4, 8}) {
                std::vector<std::vector<float>> parts;
                for (int rank = 0; rank < ranks; ++rank) {
                    Matrix part = w;
                    part.columns /= ranks, part.segments /= ranks;
                    part.data += static_cast<std::size_t>(rank * part.units()) * unit_bytes(format);
                    const Tensor slice{x.tensor.data + rank * part.columns, 1, part.columns,
                                       static_cast<std::size_t>(part.columns)};
                    parts.push_back(product(part, slice, 1, 4, ranks));
                }
                for (; parts.size() > 1; parts.resize(parts.size() / 2))
                    for (std::size_t i = 0; i < parts.size() / 2; ++i)
                        for (std::size_t j = 0; j < whole.size(); ++j) {
                            const float sum = parts[2 * i][j] + parts[2 * i + 1][j];
                            parts[i][j] = sum;
                        }
                CAPTURE(format_name(format));
                CAPTURE(ranks);
                CHECK(same_bits(parts[0], whole));
            }
        }
    }
}

TEST_SUITE("core: the CUDA back end") {
    TEST_CASE("tokens one by one, from graphs, give the logits of the plain loops") {
        for (const Shape& shape : {small, segmented})
            for (const Format format : all_formats)
                for (const Format kv : cache_formats) {
                    if (format != Format::q8 && kv != Format::bf16) continue;
                    const Model model = Model::synthetic(config_of(shape), format);
                    const std::vector<int> tokens = some_tokens(7, model.config().vocab_size);
                    const std::vector<float> expected = run(model, tokens, with(kv, 1), reference());
                    const std::vector<float> found = run(model, tokens, with(kv, 1), gpu_device());
                    CAPTURE(shape.dim);
                    CAPTURE(format_name(format));
                    CAPTURE(format_name(kv));
                    CHECK(distance(found, expected) < 2e-2);
                    CHECK(same_bits(run(model, tokens, with(kv, 1), gpu_device()), found));
                }
    }

    TEST_CASE("steps of up to 8 tokens have the bits of single steps; longer ones come close, and repeat their own") {
        for (const Format format : all_formats) {
            const Model model = Model::synthetic(config_of(segmented), format);
            const std::vector<int> tokens = some_tokens(18, model.config().vocab_size);
            const std::vector<float> single = run(model, tokens, with(Format::bf16, 1), gpu_device());
            CAPTURE(format_name(format));
            for (const int chunk : {5, 8})
                CHECK(same_bits(run(model, tokens, with(Format::bf16, chunk), gpu_device()), single));
            // q8 and q4: single steps round activations to bytes, prompts to bf16, and neither is exact
            const double close = format == Format::q8 || format == Format::q4 ? 2 * prompt_tolerance : prompt_tolerance;
            for (const int chunk : {9, 18}) {
                const std::vector<float> found = run(model, tokens, with(Format::bf16, chunk), gpu_device());
                CHECK(distance(found, single) < close);
                CHECK(same_bits(run(model, tokens, with(Format::bf16, chunk), gpu_device()), found));
            }
        }
    }

    TEST_CASE("1 to 9 sequences fed together, with contexts of different sizes, have the logits that each has alone") {
        const Model model = Model::synthetic(config_of(segmented, 2048, 1), Format::q8);
        for (const int n : {3, 8, 9}) {
            std::vector<std::unique_ptr<Session>> together, alone;
            std::vector<Session*> pointers;
            for (int i = 0; i < n; ++i) {
                Options options = with(Format::bf16, 8, i == 1 ? 1300 : 600);  // more segments than the first session has
                options.device = gpu_device();
                together.push_back(std::make_unique<Session>(model, options));
                alone.push_back(std::make_unique<Session>(model, options));
                const std::vector<int> prompt = some_tokens(1 + 2 * i, model.config().vocab_size);
                together.back()->feed(prompt), alone.back()->feed(prompt);
                pointers.push_back(together.back().get());
            }
            for (int step = 0; step < 2; ++step) {
                std::vector<int> tokens;
                for (int i = 0; i < n; ++i) tokens.push_back((step * 71 + i * 13) % model.config().vocab_size);
                Session::feed_together(pointers, tokens);
                for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
                    alone[i]->feed(std::span(&tokens[i], 1));
                    CAPTURE(n);
                    CAPTURE(i);
                    if (n <= 8) CHECK(same_bits(row(together[i]->logits()), row(alone[i]->logits())));
                    else CHECK(distance(row(together[i]->logits()), row(alone[i]->logits())) < 2 * prompt_tolerance);
                }
            }
        }
    }

    TEST_CASE("a context that crosses the border of a segment continues from a prompt as the plain loops do") {
        const Model model = Model::synthetic(config_of({64, 2, 1, 64, 64}, 2048, 1), Format::f32);
        const std::vector<int> tokens = some_tokens(516, model.config().vocab_size);
        for (const Format kv : {Format::bf16, Format::q8}) {
            Options options = with(kv, 64);
            options.device = reference();
            Session plain(model, options);
            options.device = gpu_device(), options.chunk = 256;
            Session device(model, options);
            const std::span<const int> all(tokens);
            plain.feed(all.first(510)), device.feed(all.first(510));
            for (std::size_t i = 510; i < 516; ++i) {
                const std::vector<float> expected = row(plain.feed(all.subspan(i, 1)));
                CHECK(distance(row(device.feed(all.subspan(i, 1))), expected) < prompt_tolerance);
            }
        }
    }

    TEST_CASE("rewinding and feeding again gives the same bits, from the same graphs") {
        const Model model = Model::synthetic(config_of(small), Format::q4);
        Options options = with(Format::q8, 4);
        options.device = gpu_device();
        Session session(model, options);
        const std::vector<int> tokens = some_tokens(12, model.config().vocab_size);
        const std::vector<float> expected = row(session.feed(tokens));
        session.rewind(5);
        CHECK(same_bits(row(session.feed(std::span<const int>(tokens).subspan(5))), expected));
        session.rewind(0);
        CHECK(same_bits(row(session.feed(tokens)), expected));
    }

    TEST_CASE("the demo model ranks the tokens of a text as the CPU does, wherever the CPU is sure") {
        const Model model = Model::load(LLAMA3_SOURCE_DIR "/examples/demo/demo.l3");
        std::vector<int> tokens = model.tokenizer().encode("Once upon a time there was a little dog who liked to sing.");
        tokens.insert(tokens.begin(), model.config().begin_token);
        tokens.resize(std::min<std::size_t>(tokens.size(), 14));
        for (const int chunk : {1, 64}) {
            const std::vector<float> expected = run(model, tokens, with(Format::bf16, 64), cpu());
            const std::vector<float> found = run(model, tokens, with(Format::bf16, chunk), gpu_device());
            // Few tokens: activations of eight bits on both sides. Many: bf16 here, as cuBLASLt wants them, eight bits on the CPU.
            CHECK(distance(found, expected) < (chunk <= 8 ? 2e-2 : 1e-1));
            const std::size_t v = static_cast<std::size_t>(model.config().vocab_size);
            int sure = 0;
            for (std::size_t t = 0; t < tokens.size(); ++t) {
                std::vector<float> cpu_row(expected.begin() + static_cast<std::ptrdiff_t>(t * v),
                                           expected.begin() + static_cast<std::ptrdiff_t>((t + 1) * v));
                const std::vector<float> gpu_row(found.begin() + static_cast<std::ptrdiff_t>(t * v),
                                                 found.begin() + static_cast<std::ptrdiff_t>((t + 1) * v));
                const auto best = std::max_element(cpu_row.begin(), cpu_row.end()) - cpu_row.begin();
                const auto gpu_best = std::max_element(gpu_row.begin(), gpu_row.end()) - gpu_row.begin();
                std::nth_element(cpu_row.begin(), cpu_row.begin() + 1, cpu_row.end(), std::greater<float>());
                const double margin = static_cast<double>(cpu_row[0] - cpu_row[1]);
                if (margin <=
                    2 * distance(found, expected) * static_cast<double>(*std::max_element(expected.begin(), expected.end())))
                    continue;
                ++sure;
                CHECK(gpu_best == best);
            }
            CHECK(sure > 3);
        }
    }

    TEST_CASE("a cancelled step leaves the session usable") {
        const Model model = Model::synthetic(config_of(small), Format::q8);
        Options options = with(Format::bf16);
        options.device = gpu_device();
        Session session(model, options);
        const std::vector<int> tokens = some_tokens(20, model.config().vocab_size);
        const std::vector<float> expected = row(session.feed(tokens));
        session.rewind(0);
        session.cancel();
        CHECK(message_of([&] { session.feed(tokens); }).find("cancelled") != std::string::npos);
        CHECK(same_bits(row(session.feed(tokens)), expected));
    }

    TEST_CASE("weights are on the device once for all sessions of a model, and their copy reports its progress") {
        const Model model = Model::synthetic(config_of(segmented), Format::q8);
        std::uint64_t done = 0, total = 0;
        int calls = 0;
        Options options = with(Format::bf16);
        options.device = cuda({0}, [&](std::uint64_t d, std::uint64_t t) { done = d, total = t, ++calls; });
        std::optional<Session> first(std::in_place, model, options);
        CHECK(calls > 0);
        CHECK(done == total);
        CHECK(total == gpu::DeviceWeights::bytes_of(share_of(model.config(), model.weights(), 0, 1)));
        const int before = calls;
        Session second(model, options);
        CHECK(calls == before);
        first.reset();
        const int token = 3;
        CHECK(second.feed(std::span(&token, 1)).size() == 530);
    }
}

TEST_SUITE("core: ranks on the device") {
    Options shared_by(int ranks, Format kv, int chunk) {
        Options options = with(kv, chunk);
        options.ranks = ranks;
        return options;
    }
    // The emulator's devices without tensor cores need no workspace for cuBLASLt, which takes time to make.
    void without_tensor_cores([[maybe_unused]] bool without) {
#ifdef LLAMA3_CUDA_EMULATOR
        cuda_emu::device.major = without ? 7 : 8, cuda_emu::device.minor = without ? 5 : 0;
#endif
    }
    bool says(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

    TEST_CASE("2, 4 and 8 ranks on one GPU give the bits of one, from graphs, also where they outnumber the key/value heads") {
        without_tensor_cores(true);
        const auto device = cuda();
        without_tensor_cores(false);
        for (const Format format : all_formats) {
            const Model model = Model::synthetic(config_of(segmented, 2048, 1), format);
            const std::vector<int> tokens = some_tokens(7, model.config().vocab_size);
            for (const int chunk : {1, 3, 8}) {
                if (chunk != 1 && format != Format::q8) continue;
                const Format kv = cache_formats[chunk % 2];
                const std::vector<float> alone = run(model, tokens, with(kv, chunk), device);
                for (const int ranks : {2, 4, 8}) {
                    if (chunk == 3 && ranks != 4) continue;
                    CAPTURE(format_name(format));
                    CAPTURE(chunk);
                    CAPTURE(ranks);
                    CHECK(same_bits(run(model, tokens, shared_by(ranks, kv, chunk), device), alone));
                }
            }
        }
    }

    TEST_CASE("ranks give the same bits without graphs, and draw the tokens of one") {
        const Model model = Model::synthetic(config_of(segmented), Format::q4);
        const std::vector<int> tokens = some_tokens(4, model.config().vocab_size);
        const std::vector<float> alone = run(model, tokens, with(Format::q8, 1), gpu_device());
        setenv("LLAMA3_CUDA_GRAPHS", "0", 1);
        const std::vector<float> found = run(model, tokens, shared_by(2, Format::q8, 1), gpu_device());
        unsetenv("LLAMA3_CUDA_GRAPHS");
        CHECK(same_bits(found, alone));
        std::vector<int> drawn[2];
        for (const int ranks : {1, 4}) {
            Options options = shared_by(ranks, Format::bf16, 64);
            options.device = gpu_device();
            Session session(model, options);
            Sampler sampler({.temperature = 0.9f, .top_p = 0.9f, .seed = 5});
            generate(session, tokens, sampler, {4, true, false}, [&](const Generated& g) {
                drawn[ranks > 1].push_back(g.token);
                return true;
            });
        }
        CHECK(drawn[0] == drawn[1]);
    }

    TEST_CASE("prompts on several ranks come close to one rank's, and repeat their own bits") {
        for (const Format format : {Format::bf16, Format::q8}) {
            const Model model = Model::synthetic(config_of(segmented), format);
            const std::vector<int> tokens = some_tokens(18, model.config().vocab_size);
            const std::vector<float> alone = run(model, tokens, with(Format::bf16, 18), gpu_device());
            const std::vector<float> found = run(model, tokens, shared_by(2, Format::bf16, 18), gpu_device());
            CHECK(distance(found, alone) < prompt_tolerance);
            CHECK(same_bits(run(model, tokens, shared_by(2, Format::bf16, 18), gpu_device()), found));
        }
    }

    TEST_CASE("where stages are timed each has a time, the sums of several ranks too, and the bits stay the same") {
        const Model model = Model::synthetic(config_of(segmented), Format::q8);
        const std::vector<int> tokens = some_tokens(10, model.config().vocab_size);
        for (const int ranks : {1, 2})
            for (const int chunk : {5, 10}) {
                CAPTURE(ranks);
                CAPTURE(chunk);
                Options options = shared_by(ranks, Format::bf16, chunk);
                options.device = gpu_device();
                Session plain(model, options);
                options.time_stages = true;
                Session timed(model, options);
                CHECK(same_bits(row(timed.feed(tokens)), row(plain.feed(tokens))));
                CHECK(plain.stage_times() == StageTimes{});
                const StageTimes times = timed.stage_times();
                for (std::size_t stage = 0; stage < times.size(); ++stage) {
                    CAPTURE(stage);
                    CHECK((times[stage] > 0) == (ranks > 1 || static_cast<Stage>(stage) != Stage::communicate));
                }
            }
    }

    TEST_CASE("a cancelled step of several ranks leaves the session usable, and its slots in order") {
        const Model model = Model::synthetic(config_of(segmented), Format::q8);
        Options options = shared_by(2, Format::bf16, 4);
        options.device = gpu_device();
        Session session(model, options);
        const std::vector<int> tokens = some_tokens(10, model.config().vocab_size);
        const std::vector<float> expected = row(session.feed(tokens));
        for (int i = 0; i < 2; ++i) {
            session.rewind(0);
            session.cancel();
            CHECK(says(message_of([&] { session.feed(tokens); }), "cancelled"));
            CHECK(same_bits(row(session.feed(tokens)), expected));
        }
    }

    TEST_CASE("a rank's copy of the weights holds its share: rows, columns, and the table of a tied model once") {
        for (const bool tied : {false, true}) {
            Config c = config_of(segmented);
            c.tied_embedding = tied;
            const Model model = Model::synthetic(c, Format::q8);
            std::size_t whole = gpu::DeviceWeights::bytes_of(share_of(model.config(), model.weights(), 0, 1));
            for (int rank = 0; rank < 4; ++rank) {
                const Share share = share_of(model.config(), model.weights(), rank, 4);
                const gpu::DeviceWeights weights(model, share, gpu::Gpu{}, {});
                const std::size_t bytes = gpu::DeviceWeights::bytes_of(share), pieces = 3 + 9 * share.weights.layers.size();
                CHECK(bytes >= bytes_of(share));
                CHECK(bytes <= bytes_of(share) + 256 * pieces);
                CHECK(bytes < whole / 2);
                const Matrix &there = weights.weights().layers[1].down, &here = share.weights.layers[1].down;
                REQUIRE(there.panel_stride == static_cast<std::size_t>(here.units()) * unit_bytes(Format::q8));
                std::vector<std::byte> found(there.panel_stride);
                for (int p = 0; p < here.panels(); ++p) {
                    gpu::check(cudaMemcpy(found.data(), there.panel(p), found.size(), cudaMemcpyDeviceToHost), "cudaMemcpy",
                               "test");
                    CHECK(std::memcmp(found.data(), here.panel(p), found.size()) == 0);
                }
                const Matrix& output = weights.weights().output;
                gpu::check(cudaMemcpy(found.data(), output.data, found.size(), cudaMemcpyDeviceToHost), "cudaMemcpy", "test");
                CHECK(std::memcmp(found.data(), share.weights.output.data, found.size()) == 0);
            }
        }
    }

    // Ranks as blocks of one launch, which run at the same time: several exchanges through the slots, each with its own sums.
    enum class Mistake { none, next_set_is_emptied, empty_is_sent };
    struct Protocol {
        gpu::Slots slots;
        int exchanges;
        const float* parts;  // [exchanges, ranks, stride]
        float* sums;         // likewise
    };
    template <int n, Mistake mistake>
    __global__ void exchange_parts(Protocol p) {
        const int rank = static_cast<int>(blockIdx.y), ranks = p.slots.ranks;
        const std::size_t at = 4 * (static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x);
        gpu::Slots slots = p.slots;
        slots.rank = rank;
        for (int e = 0; e < p.exchanges; ++e, ++slots.index) {
            const std::size_t row =
                (slots.index * static_cast<std::size_t>(ranks) + static_cast<std::size_t>(rank)) * slots.stride + at;
            const unsigned exchange = slots.exchange();
            const float4 part = gpu::load16<float4>(p.parts + row);
            if (mistake == Mistake::empty_is_sent)
                for (int r = 0; r < ranks; ++r) gpu::store_remote16(slots.of[r] + slots.at(exchange, rank) + at, part);
            else gpu::push_part(slots, exchange, at, part);
            gpu::store16(p.sums + row, gpu::join_parts<n>(slots, exchange, at));
            const float empty = gpu::empty_slot();
            for (int r = 0; mistake == Mistake::next_set_is_emptied && r < ranks; ++r)
                gpu::store_remote16(slots.of[rank] + slots.at(exchange + 1, r) + at, make_float4(empty, empty, empty, empty));
            __threadfence_system();  // between kernels there is more than that
        }
    }
    template <int n, Mistake mistake>
    bool exchanged_well(int exchanges, bool with_empty_payload) {
        constexpr unsigned blocks = 2, threads = 32;
        constexpr std::size_t stride = 4 * blocks * threads;
        const std::size_t count = static_cast<std::size_t>(exchanges) * n * stride,
                          slots = std::size_t{n} * 3 * n * gpu::Slots::rows * stride;
        std::vector<float> parts = some_floats(count, 17), found(count);
        parts[1] = -0.0f;
        if (with_empty_payload) std::memset(&parts[2 * stride], 0xff, sizeof(float));
        const auto device = [](std::size_t floats) {
            return gpu::Memory(gpu::Memory::Kind::device, floats * sizeof(float), "test");
        };
        const gpu::Memory all_slots = device(slots), from = device(count), to = device(count),
                          table = device(sizeof(gpu::RowEntry));
        gpu::RowEntry entry{};
        entry.exchanges = 2;
        gpu::check(cudaMemset(all_slots.data(), 0xff, all_slots.bytes()), "cudaMemset", "test");
        gpu::check(cudaMemcpy(from.data(), parts.data(), from.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy", "test");
        gpu::check(cudaMemcpy(table.data(), &entry, sizeof entry, cudaMemcpyHostToDevice), "cudaMemcpy", "test");
        settle();
        Protocol p{{{}, 0, n, stride, table.as<gpu::RowEntry>(), 0}, exchanges, from.as<float>(), to.as<float>()};
        for (int r = 0; r < n; ++r) p.slots.of[r] = all_slots.as<float>() + static_cast<std::size_t>(r) * (slots / n);
#ifdef LLAMA3_CUDA_EMULATOR
        cuda_emu::cooperative = true;
        gpu::launch("protocol", exchange_parts<n, mistake>, dim3(blocks, n), threads, 0, cudaStream_t{}, p);
#else
        void* arguments[] = {&p};
        gpu::check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(exchange_parts<n, mistake>), dim3(blocks, n),
                                               dim3(threads), arguments, 0, cudaStream_t{}),
                   "cudaLaunchCooperativeKernel", "protocol");
#endif
        settle();
        gpu::check(cudaMemcpy(found.data(), to.data(), to.bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy", "test");
        bool good = true;
        for (std::size_t e = 0; e < static_cast<std::size_t>(exchanges); ++e) {
            const float* rows[n];
            for (std::size_t r = 0; r < n; ++r) rows[r] = parts.data() + (e * n + r) * stride;
            std::vector<float> sum(stride);
            join_ranks(sum.data(), rows, stride);
            for (std::size_t r = 0; r < n; ++r)
                for (std::size_t i = 0; i < stride; ++i) {
                    const float x = found[(e * n + r) * stride + i];
                    good = good && (std::isnan(sum[i]) ? std::isnan(x) : std::memcmp(&x, &sum[i], sizeof x) == 0);
                }
        }
        return good;
    }

    TEST_CASE(
        "ranks that run at the same time exchange their parts through the slots, again and again, with the sums of the tree") {
        CHECK(exchanged_well<2, Mistake::none>(7, false));
        CHECK(exchanged_well<4, Mistake::none>(7, true));
        CHECK(exchanged_well<8, Mistake::none>(4, true));
    }

    // Over several GPUs, where there are as many.
    std::shared_ptr<Device> several(int n) {
        int count = 0;
        cudaGetDeviceCount(&count);
        std::vector<int> gpus;
        for (int i = 0; i < n; ++i) gpus.push_back(i);
        return count < n ? nullptr : cuda(gpus);
    }
    void check_several(int gpus, int ranks, const char* transport) {
        for (const Format format : {Format::q8, Format::f32}) {
            const Model model = Model::synthetic(config_of(segmented, 2048, format == Format::q8 ? 2 : 1), format);
            const std::vector<int> tokens = some_tokens(10, model.config().vocab_size);
            for (const int chunk : {1, 5, 10}) {
                if ((chunk == 5) != (format == Format::f32) && chunk != 1) continue;
                without_tensor_cores(chunk <= 8);
                const auto device = several(gpus), one = cuda();
                without_tensor_cores(false);
                if (!device) return;
                CAPTURE(gpus);
                CAPTURE(ranks);
                CAPTURE(chunk);
                const int as = chunk <= 8 ? 1 : std::max(ranks, gpus);  // prompts on as many ranks
                CHECK(same_bits(run(model, tokens, shared_by(ranks, Format::bf16, chunk), device),
                                run(model, tokens, shared_by(as, Format::bf16, chunk), one)));
                if (chunk > 1) continue;
                const auto backend = device->open(model, shared_by(std::max(ranks, gpus), Format::bf16, 8));
                CAPTURE(backend->describe());
                CHECK(says(backend->describe(), transport));
            }
        }
    }

#ifdef LLAMA3_CUDA_EMULATOR
    struct Machine {  // with several GPUs
        explicit Machine(int gpus) {
            const cuda_emu::DeviceAccess open;
            cuda_emu::device_count = gpus, cuda_emu::protect_memory = false;  // too many allocations for it to be fast
        }
        ~Machine() {
            cuda_emu::protect_memory = true;
            cuda_emu::device_count = 1, cuda_emu::broken_peer = {-1, -1};
            cuda_emu::peers_possible = true, cuda_emu::too_many_peers = false, cuda_emu::before_launch = nullptr;
            cuda_emu::lazy_streams = false, cuda_emu::order = cuda_emu::order_from_environment();
        }
    };

    TEST_CASE("the protocol survives every order of blocks, and two planted mistakes do not") {
        const Machine restore(1);
        cuda_emu::order = cuda_emu::Order::random;
        int lost = 0, stuck = 0;
        for (cuda_emu::seed = 1; cuda_emu::seed <= 6; ++cuda_emu::seed) {
            CHECK(exchanged_well<4, Mistake::none>(5, true));
            const auto fails = [&](const auto& f) {
                try {
                    return !f();
                } catch (const cuda_emu::Fault& fault) {
                    return says(fault.what(), "waits for ever");
                }
            };
            lost += fails([] { return exchanged_well<4, Mistake::next_set_is_emptied>(5, false); });
            stuck += fails([] { return exchanged_well<4, Mistake::empty_is_sent>(5, true); });
        }
        cuda_emu::seed = 1;
        CHECK(lost > 0);
        CHECK(stuck == 6);
    }

    TEST_CASE("2 and 4 GPUs that reach each other push their parts, with the bits of one GPU, whichever is ahead") {
        const Machine restore(4);
        check_several(2, 1, "2 ranks, sums pushed between 2 GPUs");
        check_several(4, 4, "4 ranks, sums pushed between 4 GPUs");
        cuda_emu::lazy_streams = true;
        check_several(2, 4, "4 ranks, sums pushed between 2 GPUs");
    }

    TEST_CASE("GPUs that cannot reach each other, or lose what is stored, meet on the host, with the same bits") {
        const Machine restore(2);
        cuda_emu::broken_peer = {1, 0};
        check_several(2, 2,
                      "rank 0 of 2, sums through the host, because what GPU 1 (emulated device) stores in GPU 0 (emulated "
                      "device) does not arrive");
        cuda_emu::peers_possible = false;
        check_several(2, 4, "sums through the host, because GPU 0 (emulated device) cannot reach the memory of GPU 1");
    }

    TEST_CASE("a test of two GPUs that fails leaves no verdict, and access that is refused is one") {
        const Device_ memory;
        const Machine restore(2);
        const Model model = Model::synthetic(config_of(segmented, 2048, 1), Format::q8);
        const auto device = cuda({0, 1});
        const std::size_t room = std::exchange(cuda_emu::device.memory, 0);
        CHECK(says(message_of([&] { device->open(model, shared_by(2, Format::bf16, 8)); }), "test of GPU 0"));
        cuda_emu::device.memory = room, cuda_emu::broken_peer = {0, 1};
        CHECK(says(device->open(model, shared_by(2, Format::bf16, 8))->describe(), "does not arrive"));
        cuda_emu::broken_peer = {-1, -1}, cuda_emu::too_many_peers = true;
        CHECK(says(cuda({0, 1})->open(model, shared_by(2, Format::bf16, 8))->describe(),
                   "GPU 0 (emulated device) is not given access to GPU 1 (emulated device) (cudaErrorTooManyPeers)"));
    }

    TEST_CASE("a session on one GPU takes nothing of another one, and the caller's GPU stays what it was") {
        const Machine restore(3);
        const Model model = Model::synthetic(config_of(segmented, 2048, 1), Format::q8);
        cudaSetDevice(0);
        cuda_emu::runtime().contexts.clear();
        for (const int caller : {0, 2}) {
            if (caller > 0) cudaSetDevice(caller);
            run(model, some_tokens(3, model.config().vocab_size), with(Format::bf16, 3), cuda({1}));
            CHECK(!cuda_emu::has_context(0));
            CHECK(cuda_emu::has_context(1));
            int now = -1;
            cudaGetDevice(&now);
            CHECK(now == (caller > 0 ? caller : 1));
        }
        cudaSetDevice(0);
    }

    // Steps of 2 ranks, after each of which the logits are those of one rank, and of the slots only those of the step's rows are
    // full, in the set of the last exchange.
    struct Steps {
        Model model = Model::synthetic(config_of(segmented), Format::q8);
        std::vector<int> tokens = some_tokens(8, model.config().vocab_size);
        struct Side {
            std::unique_ptr<Backend> backend;
            std::unique_ptr<KVCache> cache;
        } one, two;
        explicit Steps(const std::vector<int>& gpus) {
            without_tensor_cores(true);
            for (Side* side : {&one, &two}) {
                side->backend =
                    (side == &one ? cuda() : cuda(gpus))->open(model, shared_by(side == &one ? 1 : 2, Format::bf16, 8));
                side->cache = side->backend->make_cache();
            }
            without_tensor_cores(false);
        }
        bool step(Side& side, int n, const std::atomic<bool>* cancel = nullptr) {
            std::vector<Row> rows;
            for (int t = 0; t < n; ++t) rows.push_back({tokens[static_cast<std::size_t>(t)], t, side.cache.get(), true});
            return side.backend->step({rows}, cancel);
        }
        void check(int n) {
            CAPTURE(n);
            REQUIRE(step(one, n));
            REQUIRE(step(two, n));
            for (int i = 0; i < n; ++i) CHECK(same_bits(row(two.backend->logits(i)), row(one.backend->logits(i))));
            for (const std::size_t rank : {0, 1}) {
                const gpu::Buffers& b = dynamic_cast<gpu::CudaBackend&>(*two.backend).rank(rank).buffers();
                std::vector<std::uint32_t> slots(b.slots_bytes / sizeof(float));
                gpu::RowEntry first{};
                cudaMemcpy(slots.data(), b.slots, b.slots_bytes, cudaMemcpyDeviceToHost);
                cudaMemcpy(&first, b.rows, sizeof first, cudaMemcpyDeviceToHost);
                const std::size_t last = first.exchanges + 2 * static_cast<unsigned>(model.config().n_layers) - 1;
                std::size_t wrong = 0;
                for (std::size_t i = 0; i < slots.size(); ++i) {
                    const std::size_t line = i / b.partial.stride, row = line % gpu::Slots::rows;
                    const bool full = line / gpu::Slots::rows / 2 == last % 3 && row < static_cast<std::size_t>(n);
                    wrong += full != (slots[i] != ~0u) && i % b.partial.stride < static_cast<std::size_t>(b.partial.columns);
                }
                CHECK(wrong == 0);
            }
        }
    };

    TEST_CASE("the slots are in order after every step, whatever was the number of rows, cancelled or failed before it") {
        const Machine restore(2);
        for (const std::vector<int>& gpus : {std::vector<int>{0}, {0, 1}}) {
            CAPTURE(gpus.size());
            Steps steps(gpus);
            for (const int n : {8, 1, 5, 4, 4, 2, 8, 1, 5}) steps.check(n);

            int launches = 0, last = 0;
            std::atomic<bool> cancel = false;
            cuda_emu::before_launch = [&](const std::string&) {
                if (++launches == last) cancel = true;
                return cudaSuccess;
            };
            REQUIRE(steps.step(steps.two, 3));
            const int all = launches;           // a step without a graph, which is then captured
            for (const int quarter : {1, 3}) {  // so in the step and in the capture
                launches = 0, last = all * quarter / 4, cancel = false;
                CHECK(!steps.step(steps.two, 6 + quarter / 2, &cancel));
                steps.check(1), steps.check(4), steps.check(2);
            }

            for (const int at : {2, 3, 4}) {  // the second product, the first join, the second
                int calls = 0;
                cuda_emu::before_launch = [&](const std::string& kernel) {
                    return kernel == "project_out" && ++calls == at ? cudaErrorLaunchOutOfResources : cudaSuccess;
                };
                CHECK(says(message_of([&] { steps.step(steps.two, 6); }), "project_out"));
                cuda_emu::before_launch = nullptr;
                steps.check(1), steps.check(5), steps.check(2);
            }
        }
    }

    TEST_CASE("a model that is too large for one GPU runs on two, and what does not fit there is refused by name") {
        const Device_ memory;
        const Machine restore(2);
        const Model model = Model::synthetic(config_of({128, 8, 2, 64, 2048}), Format::f32);
        const std::size_t whole = gpu::DeviceWeights::bytes_of(share_of(model.config(), model.weights(), 0, 1));
        std::size_t free[2], total = 0;
        for (int i : {0, 1}) cudaSetDevice(i), cudaMemGetInfo(&free[i], &total);
        cudaSetDevice(0);
        Options options = with(Format::bf16, 8, 64);
        cuda_emu::device.major = 7, cuda_emu::device.minor = 5;  // no workspace for cuBLASLt
        cuda_emu::device.memory = whole + (total - free[0]);
        CHECK(says(message_of([&] { cuda({0})->open(model, options); }), "GPU 0 (emulated device): the model does not fit"));
        options.device = cuda({0, 1});
        run(model, some_tokens(2, 530), options, options.device);  // on two

        const MemoryPlan by_device = model.plan(options);
        options.ranks = 2;
        CHECK(by_device.weights_bytes == model.plan(options).weights_bytes);
        CHECK(by_device.activations_bytes == model.plan(options).activations_bytes);
        cuda_emu::device.memory = whole / 2;
        CHECK(says(message_of([&] { cuda({1, 0})->open(model, options); }), "the model does not fit"));
    }

    TEST_CASE("processes find out whether two of them have the same GPU, with which NCCL cannot work") {
        const Machine restore(2);
        const Model model = Model::synthetic(config_of(segmented, 2048, 1), Format::q8);
        for (const bool shared : {true, false}) {
            const auto communicators = d::ranks_in_process(2);
            const auto open = [&](int rank) {
                Options options = with(Format::bf16, 8);
                options.communicator = communicators[static_cast<std::size_t>(rank)], options.ranks = 2;
                return cuda({shared ? 0 : rank})->open(model, options)->describe();
            };
            std::string other;
            std::thread thread([&] { other = open(1); });
            const std::string found = open(0);
            thread.join();
            const std::string why = shared ? "because ranks share a GPU" : "because NCCL is not compiled in";
            CHECK(says(found, "rank 0 of 2, sums through the host, " + why));
            CHECK(says(other, "rank 1 of 2, sums through the host, " + why));
        }
    }

    TEST_CASE("a rank per thread, meeting through a communicator, gives the bits of one rank and stops with the others") {
        const Model model = Model::synthetic(config_of(segmented), Format::q8);
        const std::vector<int> tokens = some_tokens(11, model.config().vocab_size);
        for (const int chunk : {8, 11}) {
            const int ranks = chunk == 8 ? 4 : 2;
            const auto communicators = d::ranks_in_process(ranks);
            std::vector<std::shared_ptr<Device>> devices;  // one each, as processes have
            for (int rank = 0; rank < ranks; ++rank) devices.push_back(cuda());
            std::vector<std::thread> others;
            std::vector<std::string> messages(static_cast<std::size_t>(ranks));
            const auto options_of = [&](int rank) {
                Options options = with(Format::bf16, chunk);
                options.device = devices[static_cast<std::size_t>(rank)];
                options.communicator = communicators[static_cast<std::size_t>(rank)];
                return options;
            };
            for (int rank = 1; rank < ranks; ++rank)
                others.emplace_back([&, rank] {
                    messages[static_cast<std::size_t>(rank)] = message_of([&] { follow(model, options_of(rank)); });
                    if (messages[static_cast<std::size_t>(rank)] != "no error")
                        communicators[static_cast<std::size_t>(rank)]->abort();
                });
            messages[0] = message_of([&] {
                const std::vector<float> found = run(model, tokens, options_of(0), devices[0]);
                CHECK(
                    same_bits(found, run(model, tokens, shared_by(chunk == 8 ? 1 : ranks, Format::bf16, chunk), gpu_device())));
                {
                    Session session(model, options_of(0));
                    session.cancel();
                    CHECK(says(message_of([&] { session.feed(tokens); }), "cancelled"));
                    session.feed(tokens);
                    CHECK(session.logits().size() == 530);
                    CHECK(Sampler({.temperature = 0}).sample(session) >= 0);
                }
                std::vector<std::byte> nothing;
                communicators[0]->broadcast(nothing);
            });
            if (messages[0] != "no error") communicators[0]->abort();
            for (std::thread& other : others) other.join();
            for (const std::string& message : messages) CHECK(message == "no error");
        }
    }
#else
    TEST_CASE("2 and 4 GPUs that reach each other give the bits of one GPU") {
        check_several(2, 1, "2 ranks, sums ");
        check_several(4, 4, "4 ranks, sums ");
    }
#endif

#ifdef LLAMA3_NCCL  // on a GPU only; with one rank, since NCCL puts no two on a GPU
    TEST_CASE("NCCL gathers from one rank what it gave, at once and from a graph") {
        using namespace gpu;
        const auto alone = d::ranks_in_process(1);
        const Nccl nccl(*alone[0]);
        constexpr std::size_t n = 1000, bytes = n * sizeof(float);
        const Memory from(Memory::Kind::device, bytes, "test"), to(Memory::Kind::device, bytes, "test");
        const Stream stream;
        std::vector<float> given(n), found(n);
        const auto gathered = [&](float first, const auto& gather) {
            for (std::size_t i = 0; i < n; ++i) given[i] = first + static_cast<float>(i);
            check(cudaMemcpy(from.data(), given.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy", "test");
            check(cudaMemset(to.data(), 0xff, bytes), "cudaMemset", "test");
            check(cudaDeviceSynchronize(), "cudaDeviceSynchronize", "test");
            gather();
            nccl.wait(stream.value, "test");
            check(cudaMemcpy(found.data(), to.data(), bytes, cudaMemcpyDeviceToHost), "cudaMemcpy", "test");
            return found == given;
        };
        const auto gather = [&] { nccl.all_gather("test", from.as<float>(), to.as<float>(), n, stream.value); };
        CHECK(gathered(1, gather));
        Graph graph;
        cudaGraph_t captured{};
        check(cudaStreamBeginCapture(stream.value, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture", "test");
        gather();
        check(cudaStreamEndCapture(stream.value, &captured), "cudaStreamEndCapture", "test");
        check(cudaGraphInstantiate(&graph.value, captured, 0), "cudaGraphInstantiate", "test");
        cudaGraphDestroy(captured);
        for (const float first : {2.0f, 3.0f})
            CHECK(gathered(first, [&] { check(cudaGraphLaunch(graph.value, stream.value), "cudaGraphLaunch", "test"); }));
    }
#endif
}

TEST_SUITE("core: sampling on the device") {
    int drawn_by_kernel(const std::vector<float>& logits, const Sampling& s, std::uint64_t random) {
        DeviceRows row(Tensor{const_cast<float*>(logits.data()), 1, static_cast<int>(logits.size()), logits.size()});
        const gpu::Memory table(gpu::Memory::Kind::device, sizeof(gpu::DrawEntry), "test");
        gpu::DrawEntry draw{s.temperature, s.top_p, s.min_p, s.top_k, 0, -2, static_cast<double>(random >> 11) * 0x1p-53};
        gpu::check(cudaMemcpy(table.data(), &draw, sizeof draw, cudaMemcpyHostToDevice), "cudaMemcpy", "test");
        settle();
        gpu::launch("test", gpu::draw_token, 1, gpu::sample_threads, gpu::sample_shared_bytes, cudaStream_t{}, row.tensor.data,
                    row.tensor.stride, row.tensor.columns, table.as<gpu::DrawEntry>());
        settle();
        gpu::check(cudaMemcpy(&draw, table.data(), sizeof draw, cudaMemcpyDeviceToHost), "cudaMemcpy", "test");
        return draw.token;
    }

    TEST_CASE("the kernel draws what the sampler draws, with every filter, ties and logits that are no numbers") {
        const float infinity = INFINITY, nan = NAN;
        std::vector<std::vector<float>> rows = {some_floats(700, 1),
                                                some_floats(33, 2),
                                                std::vector<float>(100, 1.5f),
                                                {5},
                                                {-infinity, -infinity},
                                                {nan, 2, nan, 2, 1},
                                                {0, -0.0f, -1},
                                                {infinity, 0, infinity},
                                                {-infinity, 3, 3, 3, 2, 2, 2, 2}};
        for (float& x : rows[0]) x *= 8;
        for (std::size_t i = 0; i < 700; i += 3) rows[0][i] = rows[0][i / 2];  // ties all over
        const Sampling settings[] = {{.temperature = 0},
                                     {.temperature = 1, .top_p = 1},
                                     {.temperature = 0.6f, .top_p = 0.9f},
                                     {.temperature = 2, .top_p = 0.3f},
                                     {.temperature = 1, .top_p = 1, .top_k = 1},
                                     {.temperature = 1, .top_p = 1, .top_k = 5},
                                     {.temperature = 1.5f, .top_p = 0.8f, .top_k = 40},
                                     {.temperature = 1, .top_p = 1, .min_p = 0.2f},
                                     {.temperature = 1, .top_p = 0.95f, .min_p = 0.05f, .top_k = 3},
                                     {.temperature = 1, .top_p = 1, .min_p = 1}};
        for (const auto& logits : rows)
            for (Sampling s : settings)
                for (s.seed = 1; s.seed <= (s.temperature == 0 ? 1 : 4); ++s.seed) {
                    std::uint64_t state = s.seed;
                    CAPTURE(logits.size());
                    CAPTURE(&s - settings);
                    CAPTURE(s.temperature);
                    CAPTURE(s.top_p);
                    CAPTURE(s.top_k);
                    CHECK(drawn_by_kernel(logits, s, d::next_random(state)) == Sampler(s).sample(logits));
                }
        CHECK(drawn_by_kernel({nan, nan}, {}, 0) == -1);
    }

    TEST_CASE(
        "generation on the device gives the tokens that the host draws from the same logits, and leaves the session the same") {
        const Model model = Model::synthetic(config_of(small), Format::q8);
        Options options = with(Format::bf16);
        options.device = gpu_device();
        const std::vector<int> prompt = some_tokens(5, model.config().vocab_size);
        const Sampling sampling{.temperature = 0.8f, .top_k = 50, .seed = 4};

        Session by_hand(model, options);
        Sampler host(sampling);
        std::vector<int> expected;
        by_hand.feed(prompt);
        for (int i = 0; i < 6; ++i) {
            expected.push_back(host.sample(by_hand.logits()));
            by_hand.feed(std::span(&expected.back(), 1));
        }
        for (const bool logits : {false, true}) {
            Session session(model, options);
            Sampler sampler(sampling);
            std::vector<int> drawn;
            generate(session, prompt, sampler, {6, true, logits}, [&](const Generated& g) {
                drawn.push_back(g.token);
                CHECK(g.logits.size() == (logits ? 530 : 0));
                return true;
            });
            CHECK(drawn == expected);
            CHECK(row(session.tokens().size() == 11 ? session.logits() : std::span<const float>()) == row(by_hand.logits()));
            CHECK(sampler.sample(session.logits()) == Sampler(host).sample(by_hand.logits()));
            session.rewind(5);
            CHECK(session.logits().empty());
        }
    }

    TEST_CASE("sessions that drew on the device can be fed together afterwards") {
        const Model model = Model::synthetic(config_of(small), Format::q8);
        Options options = with(Format::bf16);
        options.device = gpu_device();
        Session a(model, options), b(model, options), alone(model, options);
        Sampler sampler({.temperature = 0});
        const std::vector<int> prompt = some_tokens(4, model.config().vocab_size);
        for (Session* s : {&a, &b, &alone}) generate(*s, prompt, sampler, {2, true, false}, {});
        Session* both[] = {&b, &a};
        const int tokens[] = {7, 7};
        const std::vector<float> before = row(a.logits());
        Session::feed_together(both, tokens);
        CHECK(same_bits(row(alone.feed(std::span(tokens, 1))), row(a.logits())));
        CHECK(sampler.sample(a) == sampler.sample(alone));
        CHECK(!same_bits(before, row(a.logits())));
    }
}

TEST_SUITE("core: errors of the CUDA back end") {
    TEST_CASE("what this version cannot do is refused, with what was found and expected") {
        CHECK(message_of([] { cuda({}); }).find("found 0, expected 1 to 16") != std::string::npos);
        CHECK(message_of([] { cuda({99}); }).find("cuda:99: there is no such GPU") != std::string::npos);
        const Model narrow = Model::synthetic(config_of({80, 2, 1, 40, 64}), Format::q8);
        CHECK(message_of([&] { gpu_device()->open(narrow, with(Format::f32)); }).find("found f32, expected bf16 or q8") !=
              std::string::npos);
        CHECK(message_of([&] { gpu_device()->open(narrow, with(Format::bf16)); }).find("found 40, expected 64 or 128") !=
              std::string::npos);
        const Model model = Model::synthetic(config_of(small), Format::q8);
        Options options = with(Format::bf16);
        options.ranks = 3;
        CHECK(message_of([&] { gpu_device()->open(model, options); }).find("found 3, expected 1, 2") != std::string::npos);
        options.ranks = 1;
        const auto backend = gpu_device()->open(model, options);
        const auto cache = backend->make_cache();
        const std::vector<Row> rows(static_cast<std::size_t>(backend->max_rows()) + 1, Row{1, 0, cache.get(), false});
        CHECK(message_of([&] { backend->step({rows}, nullptr); }).find("too many rows") != std::string::npos);
    }

#ifdef LLAMA3_CUDA_EMULATOR
    TEST_CASE("a device without bf16 tensor cores takes prompts 8 tokens at a time, with the bits of single steps") {
        const Device_ restore;
        cuda_emu::device.major = 7, cuda_emu::device.minor = 5;
        const auto turing = cuda();
        const Model model = Model::synthetic(config_of(small), Format::q8);
        const std::vector<int> tokens = some_tokens(13, model.config().vocab_size);
        CHECK(same_bits(run(model, tokens, with(Format::bf16), turing), run(model, tokens, with(Format::bf16, 1), turing)));
        CHECK(turing->open(model, with(Format::bf16))->describe().find("8 tokens") != std::string::npos);

        cuda_emu::device.major = 9, cuda_emu::device.minor = 0, cuda_emu::device.ptx = 75;  // translated when it was loaded
        const auto translated = cuda();
        CHECK(translated->open(model, with(Format::bf16))->max_rows() == turing->open(model, with(Format::bf16))->max_rows());
        CHECK(same_bits(run(model, tokens, with(Format::bf16), translated), run(model, tokens, with(Format::bf16), turing)));
    }

    TEST_CASE("a launch with less shared memory leaves a kernel all that another thread may have asked for") {
        const auto limit = [](std::size_t bytes) {
            gpu::launch("test", gpu::gate_rows, dim3(1), 32, bytes, nullptr, nullptr, nullptr, std::size_t{0}, 0);
            cudaFuncAttributes attributes{};
            CHECK(cudaFuncGetAttributes(&attributes, gpu::gate_rows) == cudaSuccess);
            return attributes.maxDynamicSharedSizeBytes;
        };
        CHECK(limit(50 << 10) == cuda_emu::device.sharedMemPerBlockOptin);
        CHECK(limit(140 << 10) == limit(60 << 10));
    }

    TEST_CASE("a device or driver that is too old, or was not compiled for, says so in one line") {
        const Device_ restore;
        cuda_emu::device.major = 7, cuda_emu::device.minor = 0;
        CHECK(message_of([] { cuda(); }).find("too old (found sm_70, expected sm_75 or later)") != std::string::npos);
        cuda_emu::device.major = 8;
        cuda_emu::device.has_kernels = false;
        CHECK(message_of([] { cuda(); }).find("Compile kernels.cuh for this GPU") != std::string::npos);
        cuda_emu::device.has_kernels = true;
        cuda_emu::device.driver = 11080;
        CHECK(message_of([] { cuda(); }).find("too old (found one for CUDA 11.8, expected 13.0)") != std::string::npos);
        cuda_emu::device.driver = 0;
        CHECK(message_of([] { cuda(); }).find("there is none") != std::string::npos);
    }

    TEST_CASE("nothing is read before the work on it is done, though streams run only when they are waited for") {
        const Model model = Model::synthetic(config_of(small), Format::bf16);
        const std::vector<int> tokens = some_tokens(11, model.config().vocab_size);
        for (const int chunk : {1, 64}) {
            const std::vector<float> expected = run(model, tokens, with(Format::bf16, chunk), gpu_device());
            cuda_emu::lazy_streams = true;
            const std::vector<float> found = run(model, tokens, with(Format::bf16, chunk), cuda());
            cuda_emu::lazy_streams = false;
            CHECK(same_bits(found, expected));
        }
    }

    TEST_CASE("what does not fit is refused before anything is allocated, with what is needed and free") {
        const Device_ restore;
        const Model model = Model::synthetic(config_of(segmented), Format::f32);
        cuda_emu::device.memory = 1 << 20;
        const auto tiny = cuda();
        std::size_t before = 0, after = 0, total = 0;
        cudaMemGetInfo(&before, &total);
        const std::string message = message_of([&] { tiny->open(model, with(Format::bf16)); });
        CHECK(message.find("the model does not fit (found 0.00 GB free of 0.00 GB, expected 0.0") != std::string::npos);
        CHECK(message.find("shorter context") != std::string::npos);
        cudaMemGetInfo(&after, &total);
        CHECK(before == after);
    }

    TEST_CASE("a matrix that is too wide for the shared memory of a device is named") {
        const Device_ restore;
        cuda_emu::device.sharedMemPerBlockOptin = 49152;
        const auto narrow = cuda();
        const Model model = Model::synthetic(config_of({64, 1, 1, 64, 13000}, 64, 1), Format::f32);
        CHECK(message_of([&] { narrow->open(model, with(Format::bf16, 8, 64)); }).find("tensor down is too wide") !=
              std::string::npos);
    }

    TEST_CASE("rows for which shared memory has no room together are multiplied in turns, to the same bits") {
        const Device_ restore;
        const Model model = Model::synthetic(config_of({64, 1, 1, 64, 3000}, 64, 1), Format::f32);
        const std::vector<int> tokens = some_tokens(8, model.config().vocab_size);
        const std::vector<float> expected = run(model, tokens, with(Format::bf16, 8, 64), gpu_device());
        cuda_emu::device.sharedMemPerBlockOptin = 49152;
        CHECK(same_bits(run(model, tokens, with(Format::bf16, 8, 64), cuda()), expected));
    }
#endif

    TEST_CASE("an error of CUDA names the call, the place and what to do") {
        const std::string message =
            message_of([] { gpu::check(cudaErrorNoKernelImageForDevice, "cudaLaunchKernel", "gate_up"); });
        CHECK(message.find("CUDA, gate_up: cudaLaunchKernel failed") == 0);
        CHECK(message.find("nvcc -arch=native") != std::string::npos);
        CHECK(message.find('\n') == std::string::npos);
    }
}
