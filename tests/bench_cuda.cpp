// Measures the CUDA back end on a GPU against that GPU's own limits, both in the same run: how fast its memory is read, and how
// fast cuBLASLt multiplies bf16 matrices. Decodes at batch 1 and 8 and prefills 512 and 4096 tokens of random models in the shapes
// of released ones, in every format. Compiled by nvcc and linked with tests/implementation.cpp (see tests/gpu.sh). Prints a table, and JSON to the file that is named.
//
//     bench_cuda results.json [seconds]      stops before a model that would begin later than that (default 420)
#include "kernels.cuh"

#include <chrono>
#include <cstdio>
#include <fstream>
#include <sstream>

namespace {

using namespace llama3;
using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

// Milliseconds of f() on a stream, by events; median of `times`.
template <class F>
double milliseconds(cudaStream_t stream, int times, const F& f) {
    cudaEvent_t start, stop;
    gpu::check(cudaEventCreate(&start), "cudaEventCreate", "bench");
    gpu::check(cudaEventCreate(&stop), "cudaEventCreate", "bench");
    std::vector<double> all;
    for (int i = 0; i <= times; ++i) {
        gpu::check(cudaEventRecord(start, stream), "cudaEventRecord", "bench");
        f();
        gpu::check(cudaEventRecord(stop, stream), "cudaEventRecord", "bench");
        gpu::check(cudaEventSynchronize(stop), "cudaEventSynchronize", "bench");
        float ms = 0;
        gpu::check(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime", "bench");
        if (i > 0) all.push_back(static_cast<double>(ms));  // the first is a warm-up
    }
    cudaEventDestroy(start), cudaEventDestroy(stop);
    return median(all);
}

// Every thread reads 16 bytes at a time, 8 of them in flight; what they add up to is written, so that nothing is left out.
__global__ void read_all(const uint4* from, std::size_t n, unsigned* out) {
    unsigned sum = 0;
    const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
    for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)
            v[j] = i + static_cast<std::size_t>(j) * step < n
                       ? gpu::load_streaming16(from + i + static_cast<std::size_t>(j) * step)
                       : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x12345678u) *out = sum;
}

double read_gbs(int multiprocessors) {
    const std::size_t bytes = std::size_t{4} << 30;  // many times the largest L2
    const gpu::Memory memory(gpu::Memory::Kind::device, bytes, "read test"), out(gpu::Memory::Kind::device, 4, "read test");
    const gpu::Stream stream;
    gpu::check(cudaMemset(memory.data(), 1, bytes), "cudaMemset", "read test");
    double best = 0;
    for (const int blocks : {2, 4, 8}) {
        const double ms = milliseconds(stream.value, 10, [&] {
            gpu::launch("read test", read_all, dim3(static_cast<unsigned>(multiprocessors * blocks)), 512, 0, stream.value,
                        memory.as<uint4>(), bytes / 16, out.as<unsigned>());
        });
        best = std::max(best, static_cast<double>(bytes) / ms * 1e-6);
    }
    return best;
}

// bf16 products of 8192 x 8192 x 8192 by cuBLASLt
double matrix_tflops() {
    constexpr int n = 8192;
    const std::size_t elements = std::size_t{n} * n;
    const gpu::Memory a(gpu::Memory::Kind::device, 2 * elements, "matrix test"),
        b(gpu::Memory::Kind::device, 2 * elements, "matrix test"), c(gpu::Memory::Kind::device, 4 * elements, "matrix test"),
        workspace(gpu::Memory::Kind::device, gpu::Buffers::workspace_bytes, "matrix test");
    gpu::check(cudaMemset(a.data(), 0x3c, a.bytes()), "cudaMemset", "matrix test");
    gpu::check(cudaMemset(b.data(), 0x3c, b.bytes()), "cudaMemset", "matrix test");
    gpu::Gemm gemm(workspace.data());
    const gpu::Stream stream;
    const double ms = milliseconds(stream.value, 10, [&] {
        gemm.multiply("matrix test", c.as<float>(), n, a.as<std::uint16_t>(), b.as<std::uint16_t>(), n, n, n, false,
                      stream.value);
    });
    return 2.0 * n * n * n / ms * 1e-9;
}

Config released(const std::string& name) {
    Config c;
    c.vocab_size = 128256, c.context_length = 131072, c.n_kv_heads = 8, c.rope_factor = 8, c.rope_low_freq_factor = 1,
    c.rope_high_freq_factor = 4;
    c.rope_original_context = 8192;
    if (name == "llama-3.2-1b")
        c.n_layers = 16, c.dim = 2048, c.n_heads = 32, c.head_dim = 64, c.ffn_dim = 8192, c.tied_embedding = true,
        c.rope_factor = 32;
    else c.n_layers = 32, c.dim = 4096, c.n_heads = 32, c.head_dim = 128, c.ffn_dim = 14336;
    return c;
}

struct Line {
    std::string model, type, what;
    int batch, context;
    double tokens_per_second, gbs, tflops, share;
};

// Bytes of weights that a decode step reads, and multiply-adds of a token's layers.
struct Cost {
    double bytes = 0, layer_macs = 0, output_macs = 0;
    explicit Cost(const Weights& weights) {
        const auto add = [&](const Matrix& m, double& macs) {
            bytes += static_cast<double>(m.panels()) * static_cast<double>(m.panel_stride),
                macs += static_cast<double>(m.rows) * m.columns;
        };
        for (const Layer& l : weights.layers)
            for (const Matrix* m : {&l.query, &l.key, &l.value, &l.attention_out, &l.gate, &l.up, &l.down}) add(*m, layer_macs);
        add(weights.output, output_macs);
    }
};

void measure(const std::string& name, Format type, const std::shared_ptr<Device>& device, double read, double matrix,
             std::vector<Line>& lines) {
    const Model model = Model::synthetic(released(name), type);
    const Cost cost(model.weights());
    Options options;
    options.context = 8192 + 256, options.chunk = 4096;
    const std::unique_ptr<Backend> backend = device->open(model, options);
    std::vector<std::unique_ptr<KVCache>> caches;
    for (int i = 0; i < 8; ++i) caches.push_back(backend->make_cache());
    const double position_bytes = static_cast<double>(device->cache_bytes(model.config(), options)) / options.context;
    const Sampling greedy{.temperature = 0};

    for (const auto& [batch, context] : {std::pair{1, 0}, {1, 8192}, {8, 0}}) {
        constexpr int steps = 64;
        std::vector<double> times;
        for (int repetition = 0; repetition < 4; ++repetition) {
            const Clock::time_point start = Clock::now();
            for (int i = 0; i < steps; ++i) {
                std::vector<Row> rows;
                for (int b = 0; b < batch; ++b)
                    rows.push_back(
                        {(i * 7919 + b * 31) % 128000, context + i, caches[static_cast<std::size_t>(b)].get(), true});
                backend->step({rows}, nullptr);
                backend->draw(0, greedy, 0);  // what generate() does; it also waits
            }
            if (repetition > 0) times.push_back(seconds_since(start) / steps);
        }
        const double time = median(times), bytes = cost.bytes + batch * position_bytes * (context + steps / 2.0);
        lines.push_back({name, format_name(type), "decode", batch, context, batch / time, bytes / time * 1e-9, 0,
                         bytes / time * 1e-9 / read});
    }
    for (const int tokens : {512, 4096}) {
        std::vector<Row> rows;
        for (int i = 0; i < tokens; ++i) rows.push_back({i * 31 % 128000, i, caches[0].get(), i + 1 == tokens});
        std::vector<double> times;
        for (int repetition = 0; repetition < 4; ++repetition) {
            const Clock::time_point start = Clock::now();
            backend->step({rows}, nullptr);
            backend->draw(0, greedy, 0);
            if (repetition > 0) times.push_back(seconds_since(start));
        }
        const double time = median(times), tflops = 2 * (cost.layer_macs * tokens + cost.output_macs) / time * 1e-12;
        lines.push_back({name, format_name(type), "prefill", 1, tokens, tokens / time, 0, tflops, tflops / matrix});
    }
}

}  // namespace

int main(int argc, char** argv) try {
    const Clock::time_point start = Clock::now();
    const double limit = argc > 2 ? std::atof(argv[2]) : 420;
    const std::shared_ptr<Device> device = cuda();
    const gpu::Gpu& gpu = static_cast<const gpu::CudaDevice&>(*device).gpu();
    const double read = read_gbs(gpu.multiprocessors), matrix = gpu.tensor_cores ? matrix_tflops() : 0;
    std::printf("%s: reads %.0f GB/s, multiplies bf16 matrices at %.0f TFLOP/s\n\n", gpu.text().c_str(), read, matrix);
    std::printf("model         type  what     batch  context  tokens/s    GB/s  TFLOP/s  share\n");
    std::vector<Line> lines;
    std::size_t printed = 0;
    for (const char* name : {"llama-3.2-1b", "llama-3.1-8b"})
        for (const Format type : {Format::bf16, Format::q8, Format::q4}) {
            if (seconds_since(start) > limit) {
                std::printf("%-13s %-5s left out: more than %.0f s have passed\n", name, format_name(type), limit);
                continue;
            }
            try {
                measure(name, type, device, read, matrix, lines);
            } catch (const Error& error) {  // what does not fit is said, and the rest measured
                std::printf("%-13s %-5s left out: %s\n", name, format_name(type), error.what());
            }
            for (; printed < lines.size(); ++printed) {
                const Line& l = lines[printed];
                std::printf("%-13s %-5s %-8s %5d %8d %9.1f %7.0f %8.1f  %4.1f %%\n", l.model.c_str(), l.type.c_str(),
                            l.what.c_str(), l.batch, l.context, l.tokens_per_second, l.gbs, l.tflops, 100 * l.share);
            }
            std::fflush(stdout);
        }
    if (argc > 1) {
        std::ofstream json(argv[1]);
        json << "{\"machine\": \"" << gpu.name << "\", \"limits\": {\"read_gbs\": " << read << ", \"bf16_tflops\": " << matrix
             << "}, \"results\": [";
        for (std::size_t i = 0; i < lines.size(); ++i) {
            const Line& l = lines[i];
            json << (i ? ", " : "") << "{\"model\": \"" << l.model << "\", \"type\": \"" << l.type << "\", \"what\": \""
                 << l.what << "\", \"batch\": " << l.batch << ", \"context\": " << l.context
                 << ", \"tokens_per_second\": " << l.tokens_per_second << ", \"gbs\": " << l.gbs << ", \"tflops\": " << l.tflops
                 << ", \"share\": " << l.share << "}";
        }
        json << "]}\n";
    }
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
