// How fast a model runs, as a share of what the machine could do at best: decode is bound by reading the weights, prefill by
// multiplying. Both limits are measured in the same process, before and after what is held against them, and reading between
// its parts, too: other work on the machine comes and goes.
#include <iomanip>
#include <map>
#include <numeric>

#include "limits.hpp"
#include "released.hpp"

std::string rounded(double value) { return json(std::round(value * 100) / 100); }

using Fields = std::vector<std::pair<std::string, std::string>>;

// Measurements of one quantity; `put` writes the fields name, name_min and name_max.
struct Samples {
    std::vector<double> values;  // ascending
    void add(double value) { values.insert(std::upper_bound(values.begin(), values.end(), value), value); }
    double median() const {
        return values.empty() ? std::nan("") : (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
    }
    void put(Fields& fields, const std::string& name) const {
        fields.emplace_back(name, json(median()));
        fields.emplace_back(name + "_min", json(values.empty() ? std::nan("") : values.front()));
        fields.emplace_back(name + "_max", json(values.empty() ? std::nan("") : values.back()));
    }
};

struct Result {
    int ranks, threads, batch, context;  // threads of each rank
    std::string transport;               // between the ranks
    Samples prefill_tps, prefill_share, decode_tps, decode_gbs, decode_share;
    llama3::StageTimes prefill_stages, decode_stages;  // seconds, of all repetitions
};

// What the stages took between two readings, added to `sum`.
void add_stages(llama3::StageTimes& sum, const llama3::StageTimes& before, const llama3::StageTimes& after) {
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += after[i] - before[i];
}

double share_of_all(const llama3::StageTimes& stages, std::size_t stage) {
    return stages[stage] / std::accumulate(stages.begin(), stages.end(), 0.0);
}
double communicating(const llama3::StageTimes& stages) {
    return share_of_all(stages, static_cast<std::size_t>(llama3::Stage::communicate));
}

// What one pass over a model costs.
struct Work {
    std::vector<std::span<const std::byte>>
        read;                                // by a token's decode: every matrix but the embedding, of which it takes a row
    double layer_macs = 0, output_macs = 0;  // multiply-adds per token

    explicit Work(const llama3::Weights& weights) {
        const auto take = [&](const llama3::Matrix& m, double& macs) {
            read.emplace_back(m.data, static_cast<std::size_t>(m.panels()) * m.panel_stride);
            macs += static_cast<double>(m.rows) * m.columns;
        };
        for (const llama3::Layer& l : weights.layers)
            for (const llama3::Matrix* m : {&l.query, &l.key, &l.value, &l.attention_out, &l.gate, &l.up, &l.down})
                take(*m, layer_macs);
        take(weights.output, output_macs);
    }
};

struct Bench {
    llama3::Model model;
    llama3::Options options;
    std::string device, name, type;
    int prompt, predict, repetitions;
    limits::Machine machine;
    limits::Memory memory;
    bool own_bf16;  // the instruction set multiplies bf16 with an instruction of its own

    // Threads of all ranks, for what they are held against: none where ranks are processes, which this one does not drive.
    int all_threads(int threads) const { return options.communicator ? 0 : threads * options.ranks; }
    bool has_limits() const { return device == "cpu" && !options.communicator; }
    double read_rate(int threads) const { return has_limits() ? memory.rate(all_threads(threads)) : 0; }
    double multiply_rate(int threads) const { return has_limits() ? multiply().rate(all_threads(threads)) : 0; }
    const limits::Multiply& multiply() const {
        if (type == "f32" || (type == "bf16" && !own_bf16)) return machine.f32;
        return type == "bf16" ? machine.bf16 : machine.int8;
    }
    std::vector<int> tokens(int count, int first) const {  // any cost the same; these are not all alike
        std::vector<int> ids;
        for (int i = first; i < first + count; ++i)
            ids.push_back(static_cast<int>((i * 7919LL + 11) % model.config().vocab_size));
        return ids;
    }

    void prefill(llama3::Session& session, const Work& work, Result& result) const {
        session.rewind(0);
        const std::vector<int> ids = tokens(prompt, 0);
        const double before = multiply_rate(result.threads);
        const llama3::StageTimes stages = session.stage_times();
        const double start = limits::seconds();
        session.feed(ids);
        const double time = limits::seconds() - start;
        add_stages(result.prefill_stages, stages, session.stage_times());
        const double rate = (before + multiply_rate(result.threads)) / 2;
        const double operations = 2 * (work.layer_macs * prompt + work.output_macs);
        result.prefill_tps.add(prompt / time);
        if (rate > 0) result.prefill_share.add(operations / time * 1e-9 / rate);
    }

    void decode(std::vector<llama3::Session>& sessions, Result& result, Samples& reads) const {
        std::vector<llama3::Session*> pointers;
        for (llama3::Session& session : sessions) {
            session.rewind(0);
            if (result.context > 0) session.feed(tokens(result.context, 0));
            pointers.push_back(&session);
        }
        // Seconds of decoding alone; the mean time of a byte that is read, from readings a quarter of a second apart.
        double time = 0, slowness = 0;
        int readings = 0;
        const auto time_reading = [&] {
            if (const double rate = read_rate(result.threads); rate > 0) reads.add(rate), slowness += 1 / rate, ++readings;
        };
        time_reading();
        const llama3::StageTimes stages = sessions[0].stage_times();
        double start = limits::seconds();
        llama3::Sampler greedy({.temperature = 0});
        const bool draws =
            result.batch == 1 && device != "cpu";  // a GPU draws the tokens itself: measured as generate() runs it
        if (draws) {
            if (result.context == 0) sessions[0].feed(tokens(1, 0));
            llama3::generate(sessions[0], {}, greedy, {predict, true, false}, {});
            time = limits::seconds() - start;
        }
        for (int i = 0; i < predict && !draws; ++i) {
            const std::vector<int> next = tokens(result.batch, i);
            if (result.batch == 1) sessions[0].feed(next);
            else llama3::Session::feed_together(pointers, next);
            if (limits::seconds() - start < 0.25 && i + 1 < predict) continue;
            time += limits::seconds() - start;
            time_reading();
            start = limits::seconds();
        }
        add_stages(result.decode_stages, stages, sessions[0].stage_times());
        const double position_bytes =
            static_cast<double>(options.device->cache_bytes(model.config(), options)) / options.context;  // of all ranks
        const double cache_bytes = result.batch * position_bytes * (result.context + predict / 2.0);
        const double gbs = (static_cast<double>(memory.bytes()) + cache_bytes) * predict / time * 1e-9;
        result.decode_tps.add(static_cast<double>(predict) * result.batch / time);
        result.decode_gbs.add(gbs);
        if (readings > 0) result.decode_share.add(gbs * slowness / readings);
    }

    Result measure(const Work& work, int batch, int depth, const std::string& transport, Samples& reads) {
        options.context = std::max(prompt, depth + predict) + 2;
        if (device != "cpu") options.chunk = 4096;
        std::vector<llama3::Session> sessions;
        const auto open = [&] {
            sessions.clear();
            for (int b = 0; b < batch; ++b) sessions.emplace_back(model, options);
        };
        const int ranks = options.ranks, threads = options.threads;
        Result result{ranks, threads, batch, depth, transport, {}, {}, {}, {}, {}, {}, {}}, warm_up = result, timed = result;
        Samples ignored;
        const auto repeat = [&](const std::string& what, Result& into, Samples& into_reads) {
            std::cerr << name << ' ' << type << ", " << ranks << " ranks, " << threads << " threads, batch " << batch
                      << ", context " << depth << ": " << what << '\n';
            if (prompt > 0) prefill(sessions[0], work, into);
            if (predict > 0) decode(sessions, into, into_reads);
        };
        open();
        repeat("warming up", warm_up, ignored);
        for (int r = 1; r <= repetitions; ++r)
            repeat(std::to_string(r) + " of " + std::to_string(repetitions), result, reads);
        if (device != "cpu") {  // a GPU that runs stage after stage is slower: it does so apart
            options.time_stages = true;
            open();
            repeat("warming up", warm_up, ignored);
            repeat("stage by stage", timed, ignored);
            options.time_stages = false;
            result.prefill_stages = timed.prefill_stages, result.decode_stages = timed.decode_stages;
        }
        return result;
    }
};

// Throws where the weights cannot fit, which is kinder than the system's way of saying so.
void check_memory(const llama3::Config& c, llama3::Format type) {
    const double values = c.n_layers * (2.0 * c.dim * (c.n_heads + c.n_kv_heads) * c.head_dim + 3.0 * c.dim * c.ffn_dim) +
                          (c.tied_embedding ? 1.0 : 2.0) * c.vocab_size * c.dim;
    const double needed =
        values * static_cast<double>(llama3::unit_bytes(type)) / llama3::panel_rows / llama3::unit_columns(type);
    const double memory = static_cast<double>(machine_memory()) / std::max(1, Place().local_processes);
    if (memory > 0 && needed > 0.95 * memory)
        fail(llama3::Code::memory, "--synthetic: too large for this machine (found " + gigabytes(memory) +
                                       " of memory, expected " + gigabytes(needed) + "). Use a smaller model or --type.");
}

int main(int argc, char** argv) {
    Args args("[-m M | --synthetic NAME --type q8] [flags]",
              "Measures prefill and decode, and the limits of this machine: reading the weights and multiplying. Shares are of "
              "these\n"
              "limits: bytes that a decode reads (weights and the used part of the cache) of the read rate, matrix operations "
              "of a prefill\n"
              "(attention not counted) of the multiply rate for the weights' type. Medians of the repetitions.");
    std::string model_path, synthetic;
    DeviceName device_name;
    CacheFormat kv;
    std::optional<llama3::Format> asked_type;
    llama3::Options options;
    int prompt = 512, predict = 128, repetitions = 5;
    std::vector<int> threads = {0}, batches = {1}, depths = {0}, ranks;
    bool as_json = false;
    args.add("-m, --model M", model_path, "model, an .l3 file (the demo model)", {1});
    args.add("--synthetic NAME", synthetic, std::string("random weights in the shape of ") + released_names);
    args.add("--type FORMAT", asked_type, "with --synthetic: f32, bf16, q8 or q4 (q8)");
    args.add("-p, --n-prompt N", prompt, "tokens of a prefill, 0: none (512)", {0});
    args.add("-n, --n-gen N", predict, "tokens of a decode, 0: none (128)", {0});
    args.add("-d, --n-depth LIST", depths, "tokens in the cache before the decode (0)", {0});
    args.add("--batch LIST", batches, "sequences decoded together (1)", {1});
    args.add("-t, --threads LIST", threads, "CPU threads of each rank, 0: all, shared by the ranks (0)", {0});
    args.add("-r, --repetitions N", repetitions, "repetitions (5)", {1});
    args.add("--kv FORMAT", kv, "format of the key/value cache: bf16, f32 or q8 (bf16)");
    args.add("--device D", device_name, "cpu, cuda or cuda:0,1 (cpu)");
    args.add("--ranks LIST", ranks, ranks_help, {1});
    args.add("--json", as_json, "print one JSON object");
    args.parse(argc, argv);
    if (asked_type && synthetic.empty()) args.wrong("--type", "a file has its type", "no --synthetic", "--synthetic NAME");
    const llama3::Format type = asked_type.value_or(llama3::Format::q8);
    if (!model_path.empty() && !synthetic.empty()) args.wrong("-m", "one model at a time", "-m and --synthetic", "one of them");

    if (Place().processes > 1 && (threads.size() > 1 || ranks.size() > 1))
        args.wrong(threads.size() > 1 ? "-t" : "--ranks", "the processes of mpirun have their threads and ranks", "a list",
                   "one value");

    return run([&] {
        options.kv = kv.format;
        options.threads = threads[0];
        if (!ranks.empty()) options.ranks = ranks[0];
        take_place(options, device_name);
        if (ranks.empty() || options.communicator) ranks = {std::max(options.ranks, options.device->ranks())};
        if (options.communicator && options.threads > 0) threads = {options.threads};
        if (!synthetic.empty()) check_memory(released(synthetic), type);
        else if (model_path.empty()) model_path = demo_model();
        const llama3::Model model =
            synthetic.empty() ? llama3::Model::load(model_path) : llama3::Model::synthetic(released(synthetic), type);
        options.context = 16, options.ranks = ranks[0];
        follow_if_told(model, options);
        const auto describe = [&] {  // by itself: the other processes wait for a session's commands
            llama3::Options alone = options;
            if (alone.communicator) alone.communicator = nullptr, alone.ranks = 1;
            if (options.communicator && device_name.name != "cpu") return std::string("CUDA");
            return alone.device->open(model, alone)->describe();
        };
        const std::string description = describe();  // with several ranks it goes "..., each avx512, ..."
        const std::size_t each = description.find("each ");
        const std::string own = each == std::string::npos ? description : description.substr(each + 5);
        const std::string isa = own.substr(0, own.find_first_of(" ,:\n"));
        const limits::Machine machine(isa);
        const Work work(model.weights());
        Bench bench{model,
                    options,
                    device_name.name,
                    synthetic.empty() ? std::filesystem::path(model_path).stem().string() : synthetic,
                    llama3::format_name(model.weights().layers.at(0).gate.format),
                    prompt,
                    predict,
                    repetitions,
                    machine,
                    limits::Memory{work.read, machine.read},
                    isa == "avx512_bf16" || isa == "amx"};

        const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
        std::vector<Result> results;
        std::map<int, Samples> reads;  // by number of threads
        Fields read_limit, int8_limit, bf16_limit, f32_limit, int8_tiles_limit, bf16_tiles_limit;
        for (const int t : threads)
            for (const int r : ranks) {
                bench.options.ranks = options.ranks = r;
                bench.options.threads = options.threads = t > 0 ? t : std::max(1, options.communicator ? all : all / r);
                const int together = std::max(1, bench.all_threads(bench.options.threads));
                bench.memory.tune(together);
                const std::string transport = options.communicator ? options.communicator->describe() : r > 1 ? describe() : "";
                for (const int batch : batches)
                    for (const int depth : depths)
                        results.push_back(bench.measure(work, batch, depth, transport, reads[together]));
                if (reads[together].values.empty()) reads[together].add(bench.memory.rate(together));
            }
        for (const auto& [t, samples] : reads) {
            read_limit.emplace_back(std::to_string(t), rounded(samples.median()));
            for (const auto& [limit, of] : {std::pair(&int8_limit, &machine.int8),
                                            {&bf16_limit, &machine.bf16},
                                            {&f32_limit, &machine.f32},
                                            {&int8_tiles_limit, &machine.int8_tiles},
                                            {&bf16_tiles_limit, &machine.bf16_tiles}})
                limit->emplace_back(std::to_string(t), of->round == nullptr ? "null" : rounded(of->rate(t)));
        }

        if (!as_json) {
            std::cout << bench.name << ' ' << bench.type << ", " << isa << '\n';
            for (std::size_t i = 0; i < read_limit.size(); ++i)
                std::cout << read_limit[i].first << " threads: read " << read_limit[i].second << " GB/s, int8 "
                          << int8_limit[i].second << " Gop/s, bf16 " << bf16_limit[i].second << " GFLOP/s, f32 "
                          << f32_limit[i].second << " GFLOP/s"
                          << (isa != "amx" ? ""
                                           : ", tiles " + int8_tiles_limit[i].second + " Gop/s and " +
                                                 bf16_tiles_limit[i].second + " GFLOP/s")
                          << '\n';
            std::cout
                << "ranks  threads  batch  context  prefill tok/s  of peak  decode tok/s    GB/s  of read  ms/step  exchange\n"
                << std::fixed << std::setprecision(2);
            for (const Result& r : results)
                std::cout << std::setw(5) << r.ranks << std::setw(9) << r.threads << std::setw(7) << r.batch << std::setw(9)
                          << r.context << std::setw(15) << r.prefill_tps.median() << std::setw(9) << r.prefill_share.median()
                          << std::setw(14) << r.decode_tps.median() << std::setw(8) << r.decode_gbs.median() << std::setw(9)
                          << r.decode_share.median() << std::setw(9) << 1e3 * r.batch / r.decode_tps.median() << std::setw(10)
                          << communicating(r.decode_stages) << '\n';
            for (const Result& r : results) {
                if (!r.transport.empty()) std::cout << "ranks " << r.ranks << ": " << r.transport << '\n';
                std::cout << "time by stage, " << r.ranks << " ranks, " << r.threads << " threads, batch " << r.batch
                          << ", context " << r.context << ':';
                for (const auto& [phase, stages] : {std::pair("prefill", &r.prefill_stages), {"decode", &r.decode_stages}}) {
                    std::cout << "\n    " << phase;
                    for (std::size_t i = 0; i < stages->size(); ++i)
                        std::cout << "  " << llama3::stage_names[i] << ' ' << rounded(share_of_all(*stages, i));
                }
                std::cout << '\n';
            }
            return;
        }
        std::vector<std::string> list;
        for (const Result& r : results) {
            Fields fields = {
                {"model", json_text(bench.name)}, {"type", json_text(bench.type)},  {"device", json_text(device_name.name)},
                {"threads", json(r.threads)},     {"ranks", json(r.ranks)},         {"batch", json(r.batch)},
                {"context", json(r.context)},     {"prefill_tokens", json(prompt)}, {"decode_tokens", json(predict)}};
            r.prefill_tps.put(fields, "prefill_tps");
            r.prefill_share.put(fields, "prefill_share");
            r.decode_tps.put(fields, "decode_tps");
            r.decode_gbs.put(fields, "decode_gbs");
            r.decode_share.put(fields, "decode_share");
            fields.emplace_back("transport", r.transport.empty() ? "null" : json_text(r.transport));
            fields.emplace_back("communicate_share", json(communicating(r.decode_stages)));
            for (const auto& [name, stages] :
                 {std::pair("prefill_stages", &r.prefill_stages), {"decode_stages", &r.decode_stages}}) {
                Fields shares;
                for (std::size_t i = 0; i < stages->size(); ++i)
                    shares.emplace_back(llama3::stage_names[i], json(share_of_all(*stages, i)));
                fields.emplace_back(name, json_object(shares));
            }
            list.push_back(json_object(fields));
        }
        std::cout << json_object({{"machine", json_text(proc_value("/proc/cpuinfo", "model name") + ", " + std::to_string(all) +
                                                        " threads")},
                                  {"isa", json_text(isa)},
                                  {"limits", json_object({{"read_gbs", json_object(read_limit)},
                                                          {"int8_gops", json_object(int8_limit)},
                                                          {"bf16_gflops", json_object(bf16_limit)},
                                                          {"f32_gflops", json_object(f32_limit)},
                                                          {"int8_tiles_gops", json_object(int8_tiles_limit)},
                                                          {"bf16_tiles_gflops", json_object(bf16_tiles_limit)}})},
                                  {"results", json_list(list)}})
                  << '\n';
    });
}
