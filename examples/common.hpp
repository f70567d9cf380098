// What the programs share beside the parser of their flags: finding the model, the flags of those that run it, JSON, errors.
#ifndef LLAMA3_EXAMPLES_COMMON_HPP
#define LLAMA3_EXAMPLES_COMMON_HPP

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <thread>
#include <utility>

#include "args.hpp"

// Where the build says that things are; without a build system the demo model is found from the top of the source tree.
#ifndef LLAMA3_SOURCE_DIR
#define LLAMA3_SOURCE_DIR "."
#endif
#ifndef LLAMA3_DATA_DIR
#define LLAMA3_DATA_DIR "/usr/local/share/llama3"
#endif

[[noreturn]] inline void fail(llama3::Code code, const std::string& message) { throw llama3::Error(code, message); }

// The processes that mpirun has started with this one (§13): rank 0 runs the program, the others follow it and are quiet.
struct Followed {};  // thrown by a rank that has followed to the end

inline std::weak_ptr<llama3::Communicator>& world() {
    static std::weak_ptr<llama3::Communicator> communicator;  // whoever has the options owns it
    return communicator;
}
inline std::shared_ptr<llama3::Communicator> join_world([[maybe_unused]] const Place& place) {
#ifdef LLAMA3_MPI
    const char* text = std::getenv("LLAMA3_RANK_TIMEOUT");
    double timeout_seconds = 120;
    if (const std::string expected = text ? parse_value(text, timeout_seconds, Range{0}) : ""; !expected.empty())
        fail(llama3::Code::argument,
             "LLAMA3_RANK_TIMEOUT: not a time (found " + json_text(text) + ", expected " + expected + "). Set it to seconds.");
    const std::shared_ptr<llama3::Communicator> communicator = llama3::mpi(timeout_seconds);
    world() = communicator;
    return communicator;
#else
    fail(llama3::Code::device, "mpirun: this program was built without MPI (found " + std::to_string(place.processes) +
                                   " processes, expected 1). Build it with MPI, or start it by itself.");
#endif
}

// Runs a program's body. Errors become one line on standard error and exit status 1.
template <class Body>
int run(const Body& body) {
    const Place place;
    std::string message;
    try {
        body();
        if (std::cout.flush()) return 0;
        message = "standard output: writing failed (found an error, expected room for the result). Check the disk or the pipe.";
    } catch (const Followed&) {
        return 0;
    } catch (const std::bad_alloc&) {
        message = "memory: not enough for this (found none left, expected more). Use a smaller model, -c or --type.";
    } catch (const std::exception& error) {
        message = error.what();
    }
    const auto communicator = world().lock();
    if (place.rank > 0) {
        if (!communicator) return 1;
        // What rank 0 says for all, or what nobody needs as it has ended well, is not said here.
        if (!communicator->lost_step) try {
                std::vector<std::byte> first_command;
                communicator->broadcast(first_command);
                if (first_command.empty()) return 0;
            } catch (const llama3::Error&) {  // rank 0 is gone
            }
        // What several ranks have to say is said by the first, which then ends the others.
        std::this_thread::sleep_for(std::chrono::milliseconds(500 + 100 * place.rank));
        if (message.rfind("rank ", 0) != 0) message = "rank " + std::to_string(place.rank) + ", " + message;
    }
    std::replace(message.begin(), message.end(), '\n', ' ');
    std::cout.flush();
    std::cerr << message << '\n';
    // Rank 0 lets the others go by leaving, where they hear it; mpirun has less to say then, and MPICH's the right exit status.
    if (communicator && (place.rank > 0 || communicator->lost_step)) communicator->abort();
    return 1;
}

// Runs the body of a program that needs no ranks: one of the processes is enough.
template <class Body>
int run_once(const Body& body) {
    return Place().rank > 0 ? 0 : run(body);
}

inline std::string read_file(const std::string& path) {  // "-": standard input
    std::ifstream file;
    if (path != "-") file.open(path, std::ios::binary);
    if (!file || std::filesystem::is_directory(path))
        fail(llama3::Code::file, path + ": cannot be read (found nothing readable, expected a file). Check the path.");
    std::istream& from = path == "-" ? std::cin : file;
    return {std::istreambuf_iterator<char>(from), std::istreambuf_iterator<char>()};
}

// A line of the form `name<spaces>: value` in one of Linux's /proc files, for instance the size of the memory; empty elsewhere.
inline std::string proc_value(const char* path, std::string_view name) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);)
        if (line.rfind(name, 0) == 0) return line.substr(std::min(line.size(), line.find_first_not_of(" \t:", name.size())));
    return "";
}

// The demo model is looked for beside the program, then under the install prefix, then in the source tree.
inline std::string demo_model() {
    namespace fs = std::filesystem;
    std::error_code ignored;
    const fs::path program = fs::read_symlink("/proc/self/exe", ignored);
    const fs::path places[] = {program.parent_path() / "demo.l3", program.parent_path() / "../share/llama3/demo.l3",
                               LLAMA3_DATA_DIR "/demo.l3", LLAMA3_SOURCE_DIR "/examples/demo/demo.l3"};
    std::string looked;
    for (const fs::path& place : places) {
        if (fs::exists(place, ignored)) return place.lexically_normal().string();
        looked += (looked.empty() ? "" : ", ") + place.lexically_normal().string();
    }
    fail(llama3::Code::file,
         "demo.l3: the demo model is missing (found nothing at " + looked + ", expected a file). Name a model with -m.");
}

// The value of --device.
struct DeviceName {
    std::string name = "cpu";
    std::vector<int> gpus = {};
};
inline std::string parse_value(std::string_view text, DeviceName& device, Range) {
    device.name = text, device.gpus = {0};
    const bool known = text == "cpu" || text == "cuda" ||
                       (text.substr(0, 5) == "cuda:" && parse_value(text.substr(5), device.gpus, Range{0}).empty());
    return known ? "" : "cpu, cuda or cuda:0,1";
}

// The value of --kv.
struct CacheFormat {
    llama3::Format format = llama3::Format::bf16;
};
inline std::string parse_value(std::string_view text, CacheFormat& cache, Range range) {
    const bool known = parse_value(text, cache.format, range).empty() && cache.format != llama3::Format::q4;
    return known ? "" : "f32, bf16 or q8";
}

inline std::shared_ptr<llama3::Device> device([[maybe_unused]] const DeviceName& device) {
    if (device.name == "cpu") return llama3::cpu();
#ifdef LLAMA3_CUDA
    return llama3::cuda(device.gpus, [shown = 0](std::uint64_t done, std::uint64_t total) mutable {
        const int percent = static_cast<int>(100 * done / total);
        if (total < 1000000000 || percent < shown + 10) return;  // large models only, every tenth
        std::cerr << "copying the weights to the GPU: " << (shown = percent / 10 * 10) << " %\n";
    });
#else
    fail(llama3::Code::device,
         "--device: this program was built without CUDA (found " + json_text(device.name) + ", expected cpu). Leave it out.");
#endif
}

// Device, ranks and threads of this process: all ranks, or the one that it is.
inline void take_place(llama3::Options& options, DeviceName device_name) {
    const Place place;
    if (place.processes > 1) {
        options.communicator = join_world(place);
        if (options.ranks == 1) options.ranks = options.communicator->ranks();
        if (device_name.gpus.size() > 1)
            device_name.gpus = {device_name.gpus[static_cast<std::size_t>(place.local_rank) % device_name.gpus.size()]};
        // Processes that mpirun has not bound to processors of their own share all of them.
        const bool bound =
            proc_value("/proc/self/status", "Cpus_allowed_list") != proc_value("/sys/devices/system/cpu/online", "");
        if (options.threads == 0 && !bound)
            options.threads =
                std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / std::max(1, place.local_processes));
    }
    options.device = device(device_name);
}
// On any rank but 0 this is all that the program does.
inline void follow_if_told(const llama3::Model& model, const llama3::Options& options) {
    if (!options.communicator || options.communicator->rank() == 0) return;
    llama3::follow(model, options);
    throw Followed();
}

constexpr const char* ranks_help = "split each matrix over R ranks, or as many as GPUs, or as mpirun has processes (1)";

// The flags of every program that runs a model.
struct ModelFlags {
    std::string model;
    DeviceName device_name;
    CacheFormat kv;
    llama3::Options options;

    explicit ModelFlags(Args& args, const std::string& usual_context = "the model's, at most 8192") {
        args.add("-m, --model M", model, "model, an .l3 file (the demo model)", {1});
        args.add("-c, --ctx-size CTX", options.context, "positions in the context (" + usual_context + ")", {0, 1 << 20});
        args.add("-t, --threads N", options.threads, "CPU threads (all that this process may use)", {0, 4096});
        args.add("--kv FORMAT", kv, "format of the key/value cache: bf16, f32 or q8 (bf16)");
        args.add("--device D", device_name, "cpu, cuda or cuda:0,1 (cpu)");
        args.add("--ranks R", options.ranks, ranks_help, {1});
    }
    llama3::Model load() {
        options.kv = kv.format;
        if (device_name.name != "cpu") options.chunk = 2048;  // long prompts are faster in larger steps there
        take_place(options, device_name);
        const llama3::Model loaded = llama3::Model::load(model.empty() ? demo_model() : model);
        follow_if_told(loaded, options);
        return loaded;
    }
};

// The seed.
inline std::string parse_value(std::string_view text, llama3::Sampling& sampling, Range) {
    if (text == "-1") return sampling.seed = std::random_device()() | std::uint64_t{std::random_device()()} << 32, "";
    return parse_value(text, sampling.seed, Range{}).empty() ? "" : "a whole number from 0 to 18446744073709551615, or -1";
}

inline void add_sampling_flags(Args& args, llama3::Sampling& sampling) {
    args.add("--temp NUMBER", sampling.temperature, "temperature, 0: always the most likely token (0.6)", {0});
    args.add("--top-k N", sampling.top_k, "only the N most likely tokens, 0: off (0)", {0});
    args.add("--top-p NUMBER", sampling.top_p, "only the most likely tokens that make up this probability, 1: off (0.9)",
             {1e-6, 1});
    args.add("--min-p NUMBER", sampling.min_p, "only tokens at least this share as likely as the best, 0: off (0)", {0, 1});
    args.add("--repeat-penalty NUMBER", sampling.repeat_penalty, "makes recent tokens less likely, 1: off (1)", {1e-6});
    args.add("--repeat-last-n N", sampling.repeat_last, "how many tokens are recent (64)", {0});
    args.add("-s, --seed SEED", sampling, "seed: the same one gives the same text everywhere, -1: another each time (1)");
}

// JSON, written from the inside out: json_object({{"tokens", json_list(ids)}, {"text", json_text(text)}}).
inline std::string json(const std::string& written) { return written; }
template <class Number>
requires std::is_arithmetic_v<Number> std::string json(Number value) {
    if constexpr (std::is_same_v<Number, bool>) {
        return value ? "true" : "false";
    } else {
        if constexpr (std::is_floating_point_v<Number>)
            if (!std::isfinite(value)) return "null";
        char buffer[64];
        return std::string(buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr);
    }
}
template <class List>
std::string json_list(const List& list) {
    std::string out;
    for (const auto& value : list) out += (out.empty() ? "" : ", ") + json(value);
    return "[" + out + "]";
}
inline std::string json_object(const std::vector<std::pair<std::string, std::string>>& fields) {
    std::string out;
    for (const auto& [name, value] : fields) out += (out.empty() ? "" : ", ") + json_text(name) + ": " + value;
    return "{" + out + "}";
}

inline std::string gigabytes(double bytes) {
    const std::string text = std::to_string(bytes * 1e-9);
    return text.substr(0, text.find('.') + 2) + " GB";
}
inline std::uint64_t machine_memory() {
    return std::strtoull(proc_value("/proc/meminfo", "MemTotal").c_str(), nullptr, 10) * 1024;
}

#endif
