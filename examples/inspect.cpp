// What is inside a model file, whether it is intact, and how much memory it needs at which context length.
#include <iomanip>
#include <sstream>

#include "common.hpp"

std::string hex(std::uint64_t value) {
    std::string digits(16, '0');
    for (auto digit = digits.rbegin(); digit != digits.rend(); ++digit, value >>= 4) *digit = "0123456789abcdef"[value & 15];
    return digits;
}

std::string shape(const llama3::TensorInfo& t) {
    return t.dimensions == 1 ? "[" + std::to_string(t.columns) + "]"
                             : "[" + std::to_string(t.rows) + ", " + std::to_string(t.columns) + "]";
}

const char* chat_format_name(llama3::ChatFormat format) {
    switch (format) {
        case llama3::ChatFormat::llama3: return "llama3";
        case llama3::ChatFormat::llama3_1: return "llama3.1";
        case llama3::ChatFormat::llama3_2: return "llama3.2";
        default: return "none";
    }
}

// Names and JSON values.
std::vector<std::pair<std::string, std::string>> configuration(const llama3::Config& c) {
    return {{"layers", json(c.n_layers)},
            {"dim", json(c.dim)},
            {"heads", json(c.n_heads)},
            {"kv_heads", json(c.n_kv_heads)},
            {"head_dim", json(c.head_dim)},
            {"ffn_dim", json(c.ffn_dim)},
            {"vocab_size", json(c.vocab_size)},
            {"context_length", json(c.context_length)},
            {"norm_eps", json(c.norm_eps)},
            {"rope_theta", json(c.rope_theta)},
            {"rope_factor", json(c.rope_factor)},
            {"rope_low_freq_factor", json(c.rope_low_freq_factor)},
            {"rope_high_freq_factor", json(c.rope_high_freq_factor)},
            {"rope_original_context", json(c.rope_original_context)},
            {"chat_format", json_text(chat_format_name(c.chat_format))},
            {"tied_embedding", json(c.tied_embedding)},
            {"attention_out_segments", json(c.attention_out_segments)},
            {"down_segments", json(c.down_segments)},
            {"begin_token", json(c.begin_token)},
            {"end_tokens", json_list(c.end_tokens)}};
}

int main(int argc, char** argv) {
    Args args("M [--verify] [--device D] [--json]", "Prints a model's configuration, tensors, origin and memory plan.");
    std::string path;
    bool verify = false, as_json = false;
    DeviceName device_name;
    args.add("M", path, "model, an .l3 file");
    args.add("--verify", verify, "read everything and compare all checksums");
    args.add("--device D", device_name, "cpu, cuda or cuda:1: whose memory is planned (cpu)");
    args.add("--json", as_json, "print one JSON object");
    args.parse(argc, argv);
    if (path.empty()) args.wrong("M", "a model is needed", "none", "an .l3 file");

    return run([&] {
        const llama3::Model model = llama3::Model::load(path);
        const llama3::Config& config = model.config();
        const std::vector<llama3::TensorInfo> tensors = model.tensors();
        if (verify) model.verify();

        // Memory of one session beside the weights, at each context length and for each format of the cache.
        struct Plan {
            int context;
            llama3::Format kv;
            llama3::MemoryPlan bytes;
            std::uint64_t total() const { return bytes.weights_bytes + bytes.cache_bytes + bytes.activations_bytes; }
        };
        const std::shared_ptr<llama3::Device> planned = device(device_name);
        const std::uint64_t memory = device_name.name == "cpu" ? machine_memory() : planned->memory_bytes();
        std::vector<Plan> plans;
        for (int context = 1024; context <= 131072; context *= 2)
            for (const auto kv : {llama3::Format::f32, llama3::Format::bf16, llama3::Format::q8}) {
                llama3::Options options;
                options.context = std::min(context, config.context_length), options.kv = kv, options.device = planned;
                if (context / 2 < config.context_length) plans.push_back({options.context, kv, model.plan(options)});
            }
        const auto fits = [&](const Plan& plan) { return memory == 0 ? "unknown" : plan.total() < memory ? "yes" : "no"; };

        if (as_json) {
            std::vector<std::string> tensor_list, plan_list;
            for (const llama3::TensorInfo& t : tensors)
                tensor_list.push_back(json_object({{"name", json_text(t.name)},
                                                   {"format", json_text(llama3::format_name(t.format))},
                                                   {"shape", shape(t)},
                                                   {"segments", json(t.segments)},
                                                   {"offset", json(t.offset)},
                                                   {"bytes", json(t.bytes)},
                                                   {"checksum", json_text(hex(t.checksum))}}));
            for (const Plan& p : plans)
                plan_list.push_back(json_object({{"context", json(p.context)},
                                                 {"kv", json_text(llama3::format_name(p.kv))},
                                                 {"weights_bytes", json(p.bytes.weights_bytes)},
                                                 {"cache_bytes", json(p.bytes.cache_bytes)},
                                                 {"activations_bytes", json(p.bytes.activations_bytes)},
                                                 {"total_bytes", json(p.total())},
                                                 {"fits", memory == 0 ? "null" : json(p.total() < memory)}}));
            std::cout << json_object({{"file", json_text(path)},
                                      {"configuration", json_object(configuration(config))},
                                      {"tensors", json_list(tensor_list)},
                                      {"provenance", json_text(model.provenance())},
                                      {"verified", verify ? "true" : "null"},
                                      {"machine_memory", memory == 0 ? "null" : json(memory)},
                                      {"memory", json_list(plan_list)}})
                      << '\n';
            return;
        }
        std::cout << path << "\n\nConfiguration\n";
        for (const auto& [name, value] : configuration(config))
            std::cout << "  " << std::left << std::setw(24) << name << value << '\n';
        std::cout
            << "\nTensors\n  name                        format  shape                  offset           bytes  checksum\n";
        for (const llama3::TensorInfo& t : tensors)
            std::cout << "  " << std::left << std::setw(28) << t.name << std::setw(8) << llama3::format_name(t.format)
                      << std::setw(16) << shape(t) << std::right << std::setw(13) << t.offset << std::setw(16) << t.bytes
                      << "  " << hex(t.checksum) << '\n';
        std::cout << "\nOrigin\n";
        std::string line;
        for (std::istringstream lines(model.provenance()); std::getline(lines, line);) std::cout << "  " << line << '\n';
        std::cout << "\nMemory for one session (" << (device_name.name == "cpu" ? "this machine" : device_name.name) << " has "
                  << (memory == 0 ? "?" : gigabytes(static_cast<double>(memory)))
                  << ")\n  context  cache      weights        cache      buffers        total  fits\n";
        for (const Plan& p : plans) {
            std::cout << std::right << std::setw(9) << p.context << "  " << std::left << std::setw(6)
                      << llama3::format_name(p.kv) << std::right;
            for (const std::uint64_t bytes : {p.bytes.weights_bytes, p.bytes.cache_bytes, p.bytes.activations_bytes, p.total()})
                std::cout << std::setw(10) << (bytes + 1048575) / 1048576 << " MB";
            std::cout << "  " << fits(p) << '\n';
        }
        if (verify) std::cout << "\nVerified: all checksums match.\n";
    });
}
