// What is inside a model file, whether it is intact, and how much memory it needs at which context length.
#include <iomanip>
#include <sstream>

#include "released.hpp"

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

// Graphics cards by their memory, in GB of 10^9 bytes: a little less than they have, which the driver takes for itself.
constexpr int cards[] = {8, 12, 16, 24, 48, 80, 141};
constexpr int rank_counts[] = {1, 2, 4, 8, 16};

std::uint64_t total(const llama3::MemoryPlan& plan) { return plan.weights_bytes + plan.cache_bytes + plan.activations_bytes; }

int main(int argc, char** argv) {
    Args args("[M | --synthetic NAME] [--verify] [flags]",
              "Prints a model's configuration, tensors, origin and memory plan, and on which cards its parts fit.");
    std::string path, named, synthetic;
    std::optional<llama3::Format> asked_type;
    int ranks = 1, context = 8192;
    bool verify = false, as_json = false;
    DeviceName device_name;
    args.add("M", path, "model, an .l3 file (the demo model)", {1});
    args.add("-m, --model M", named, "the same", {1});
    args.add("--synthetic NAME", synthetic, std::string("instead, a shape: ") + released_names);
    args.add("--type FORMAT", asked_type, "with --synthetic: f32, bf16, q8 or q4 (q8)");
    args.add("--verify", verify, "read everything and compare all checksums");
    args.add("--ranks R", ranks, "plan for one of R ranks that share each matrix (1)", {1});
    args.add("-c, --ctx-size CTX", context, "positions in the context, for the table of cards (8192)", {1, 1 << 20});
    args.add("--device D", device_name, "cpu, cuda or cuda:1: whose memory is planned (cpu)");
    args.add("--json", as_json, "print one JSON object");
    args.parse(argc, argv);
    if (!path.empty() && !named.empty()) args.wrong("M", "one model at a time", "M and -m", "one of them");
    if (path.empty()) path = named;
    if (!path.empty() && !synthetic.empty()) args.wrong("M", "one model at a time", "M and --synthetic", "one of them");
    if (asked_type && synthetic.empty()) args.wrong("--type", "a file has its type", "no --synthetic", "--synthetic NAME");
    if (verify && !synthetic.empty()) args.wrong("--verify", "a shape has no checksums", "--synthetic", "a file");
    const llama3::Format type = asked_type.value_or(llama3::Format::q8);

    return run_once([&] {
        std::optional<llama3::Model> model;
        if (synthetic.empty()) model = llama3::Model::load(path.empty() ? path = demo_model() : path);
        const llama3::Config config = model ? model->config() : released(synthetic);
        const std::vector<llama3::TensorInfo> tensors = model ? model->tensors() : std::vector<llama3::TensorInfo>();
        if (verify) model->verify();

        // Memory of one session, and of one rank of those that share it, at each context length and for each format of the cache.
        struct Plan {
            int context;
            llama3::Format kv;
            llama3::MemoryPlan bytes;
        };
        device_name.gpus.resize(1);  // several would mean as many ranks, which --ranks says here
        const std::shared_ptr<llama3::Device> planned = device(device_name);
        const std::uint64_t memory = device_name.name == "cpu" ? machine_memory() : planned->memory_bytes();
        const auto plan = [&](int of_context, llama3::Format kv, int of_ranks, bool on_card = false) {
            llama3::Options options;
            if (on_card)
                options.threads = 1, options.chunk = 2048;  // as the programs ask a GPU; this machine's threads are no matter
            options.context = std::min(of_context, config.context_length), options.kv = kv, options.device = planned;
            options.ranks = of_ranks;
            return Plan{options.context, kv, model ? model->plan(options) : llama3::plan_memory(config, type, options)};
        };
        std::vector<Plan> plans;
        for (int positions = 1024; positions / 2 < config.context_length; positions *= 2)
            for (const auto kv : {llama3::Format::f32, llama3::Format::bf16, llama3::Format::q8})
                plans.push_back(plan(positions, kv, ranks));
        // What one of several ranks needs; nothing where that many cannot share the model.
        std::vector<std::pair<int, std::optional<Plan>>> on_cards;
        for (const int r : rank_counts) try {
                on_cards.emplace_back(r, plan(context, llama3::Format::bf16, r, true));
            } catch (const llama3::Error& error) {
                if (error.code() != llama3::Code::argument) throw;
                on_cards.emplace_back(r, std::nullopt);
            }
        const auto fits_card = [](const Plan& p, int gigabytes) {
            return total(p.bytes) <= static_cast<std::uint64_t>(gigabytes) * 1000000000;
        };
        const auto fits = [&](const Plan& p) { return memory == 0 ? "unknown" : total(p.bytes) < memory ? "yes" : "no"; };

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
            const auto bytes = [](const llama3::MemoryPlan& p) {
                return std::vector<std::pair<std::string, std::string>>{{"weights_bytes", json(p.weights_bytes)},
                                                                        {"cache_bytes", json(p.cache_bytes)},
                                                                        {"activations_bytes", json(p.activations_bytes)},
                                                                        {"total_bytes", json(total(p))}};
            };
            for (const Plan& p : plans) {
                auto fields = bytes(p.bytes);
                fields.insert(fields.begin(), {{"context", json(p.context)}, {"kv", json_text(llama3::format_name(p.kv))}});
                fields.emplace_back("fits", memory == 0 ? "null" : json(total(p.bytes) < memory));
                plan_list.push_back(json_object(fields));
            }
            std::vector<std::string> card_list;
            for (const auto& [r, p] : on_cards) {
                if (!p) continue;
                auto fields = bytes(p->bytes), fit = decltype(fields){};
                for (const int card : cards) fit.emplace_back(std::to_string(card), json(fits_card(*p, card)));
                fields.insert(fields.begin(), {{"ranks", json(r)}, {"context", json(p->context)}});
                fields.emplace_back("fits_gb", json_object(fit));
                card_list.push_back(json_object(fields));
            }
            std::cout << json_object({{"file", model ? json_text(path) : "null"},
                                      {"configuration", json_object(configuration(config))},
                                      {"tensors", json_list(tensor_list)},
                                      {"provenance", model ? json_text(model->provenance()) : "null"},
                                      {"verified", verify ? "true" : "null"},
                                      {"machine_memory", memory == 0 ? "null" : json(memory)},
                                      {"ranks", json(ranks)},
                                      {"memory", json_list(plan_list)},
                                      {"cards", json_list(card_list)}})
                      << '\n';
            return;
        }
        std::cout << (model ? path : synthetic + " " + llama3::format_name(type)) << "\n\nConfiguration\n";
        for (const auto& [name, value] : configuration(config))
            std::cout << "  " << std::left << std::setw(24) << name << value << '\n';
        if (model) {
            std::cout
                << "\nTensors\n  name                        format  shape                  offset           bytes  checksum\n";
            for (const llama3::TensorInfo& t : tensors)
                std::cout << "  " << std::left << std::setw(28) << t.name << std::setw(8) << llama3::format_name(t.format)
                          << std::setw(16) << shape(t) << std::right << std::setw(13) << t.offset << std::setw(16) << t.bytes
                          << "  " << hex(t.checksum) << '\n';
            std::cout << "\nOrigin\n";
            std::string line;
            for (std::istringstream lines(model->provenance()); std::getline(lines, line);) std::cout << "  " << line << '\n';
        }
        const auto megabytes = [](std::uint64_t bytes) { return (bytes + 999999) / 1000000; };
        std::cout << "\nMemory for one session" << (ranks > 1 ? ", of each of " + std::to_string(ranks) + " ranks" : "") << " ("
                  << (device_name.name == "cpu" ? "this machine" : device_name.name) << " has "
                  << (memory == 0 ? "?" : gigabytes(static_cast<double>(memory)))
                  << ")\n  context  cache      weights        cache      buffers        total  fits\n";
        for (const Plan& p : plans) {
            std::cout << std::right << std::setw(9) << p.context << "  " << std::left << std::setw(6)
                      << llama3::format_name(p.kv) << std::right;
            for (const std::uint64_t bytes :
                 {p.bytes.weights_bytes, p.bytes.cache_bytes, p.bytes.activations_bytes, total(p.bytes)})
                std::cout << std::setw(10) << megabytes(bytes) << " MB";
            std::cout << "  " << fits(p) << '\n';
        }
        std::cout << "\nCards that it fits on, with a context of " << std::min(context, config.context_length)
                  << " in bf16\n  cards     of each";
        for (const int card : cards) std::cout << std::setw(5) << card << " GB";
        std::cout << '\n';
        for (const auto& [r, p] : on_cards) {
            std::cout << std::setw(7) << r;
            if (p) std::cout << std::setw(9) << megabytes(total(p->bytes)) << " MB";
            else std::cout << "   they cannot share its heads evenly";
            for (const int card : cards)
                if (p) std::cout << std::setw(8) << (fits_card(*p, card) ? "yes" : "no");
            std::cout << '\n';
        }
        if (verify) std::cout << "\nVerified: all checksums match.\n";
    });
}
