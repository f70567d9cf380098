// llama3.hpp: Llama 3, 3.1, 3.2 and 3.3 text models in one C++20 header. MIT licence, at the end of the file.
//
// What it is: the tokenizer, the grouped-query transformer and the sampler of Llama 3, with vector kernels for AMX, AVX-512,
// AVX-VNNI, AVX2, NEON and plain C++, chosen at run time. It needs a C++20 compiler (g++ 11, clang 14 or later) and nothing else;
// with -fopenmp it runs on OpenMP, without on a small team of std::threads. Models are .l3 files made by convert/convert.py.
//
// A whole program:
//
//     #define LLAMA3_IMPLEMENTATION  // in exactly one source file; elsewhere only the #include
//     #include "llama3.hpp"
//
//     #include <iostream>
//
//     int main(int argc, char** argv) try {
//         llama3::Chat chat(llama3::Model::load(argc > 1 ? argv[1] : "examples/demo/demo.l3"));
//         chat.say("Tell me a story.", [](std::string_view text) { return bool(std::cout << text << std::flush); });
//         std::cout << '\n';
//     } catch (const std::exception& error) {
//         std::cerr << error.what() << '\n';
//         return 1;
//     }
//
// Build it with: g++ -std=c++20 -O2 -fopenmp program.cpp (or -pthread). No -m flag is needed, and none changes a result.
//
// Routes through this file
//     use it (5 minutes)                     §1
//     understand Llama 3 (40 minutes)        §3, §4, §5, then §6 and §7
//     make it fast                           §8 to §12
//     port it to another device              §2, §3, §12, then kernels.cuh
//     split it over several devices          §13
//
// Contents (each line is also a banner in the code: search for it)
//
//   Part I    What you call
//     §1  Public API                          model, session, sampler, tokenizer, chat, errors
//     §2  Data                                configuration, formats, matrices, the key/value cache, batches
//     §3  Stages, back ends, communicators    the verbs of a forward pass, and the seams for new devices
//   Part II   What Llama 3 computes
//     §4  The forward pass                    the paper, on one screen
//     §5  The stages as plain loops           RMSNorm, RoPE, grouped-query attention, SwiGLU: the specification
//     §6  Tokenizer                           text to ids
//     §7  Sampling, chat and generation       ids to text
//   Part III  How to make it fast
//     §8  Number formats                      f32, bf16, q8, q4: what a value is and how it is stored
//     §9  CPU kernels                         written once, compiled once per instruction set
//     §10 Choosing the instruction set        at run time, best first
//     §11 Threads                             OpenMP, or a team of std::threads
//     §12 The CPU back end                    the stages with threads and kernels
//     §13 Ranks                               one model split over several devices
//   Part IV   Plumbing
//     §14 Model files                         map, parse, validate, write
//     §15 Platform                            memory mapping, CPU features, Unicode classes
//
// Shape letters, used in every comment: T tokens in this call, D model width, H query heads, K key/value heads, E head width,
// F feed-forward width, V vocabulary, L layers, P positions in the cache, G query heads that share a key/value head, R ranks.
// Arrays are row-major, the last index runs fastest.

#ifndef LLAMA3_HPP
#define LLAMA3_HPP

#if __cplusplus < 202002L && !defined(_MSC_VER)
#error "llama3.hpp: needs C++20. Compile with -std=c++20."
#endif

#define LLAMA3_VERSION_MAJOR 0
#define LLAMA3_VERSION_MINOR 1
#define LLAMA3_VERSION_PATCH 0
#define LLAMA3_VERSION "0.1.0"

#pragma push_macro("min")  // windows.h without NOMINMAX makes macros of these, over which standard headers stumble
#pragma push_macro("max")
#undef min
#undef max

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#pragma pop_macro("min")
#pragma pop_macro("max")

namespace llama3 {

// ═══ Part I: What you call ═════════════════════════════════════════════════════════════════════════════════════════════════════

// ═══ §1  Public API ════════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// A Model is a loaded file: immutable, cheap to copy, shared by any number of threads. A Session is one sequence of tokens with
// its key/value cache: it belongs to one thread at a time. A Chat is a Session that speaks the chat format. What fails throws
// Error, or std::bad_alloc; a Model, a Session and the messages of a Chat are then as they were before the call (generate() keeps
// what it had fed). The library never prints, exits or keeps global state.

struct Config;
struct Weights;
class Device;
class Communicator;
class Sampler;
struct Generated;
struct GenerateOptions;
enum class Finish;

enum class Code {
    argument,   // a value the caller passed is out of range
    file,       // a file cannot be opened or read
    format,     // a file is not what it should be: foreign, truncated, of another version, inconsistent
    checksum,   // a file's bytes have changed since it was written
    memory,     // not enough memory; nothing was kept
    context,    // the tokens do not fit into the context
    cancelled,  // Session::cancel() was called; the session is where it was before the call
    device,     // a device or an instruction set is missing or failed
};

// what() reads `where: what is wrong (found X, expected Y). What to do.`
class Error : public std::runtime_error {
public:
    Error(Code code, const std::string& message) : std::runtime_error(message), code_(code) {}
    Code code() const noexcept { return code_; }

private:
    Code code_;
};

// How values are stored, in weights and in the key/value cache (§8).
enum class Format : std::uint32_t { f32 = 0, bf16 = 1, q8 = 2, q4 = 3 };
const char* format_name(Format format);          // "f32", "bf16", "q8", "q4"
Format format_from_name(std::string_view name);  // throws Error with the list of names

// Text to token ids and back (§6). Immutable and thread-safe; references into its Model, whose lifetime it shares.
class Tokenizer {
public:
    enum class Special { as_text, parse };  // is "<|eot_id|>" in a text seven ordinary tokens, or the special one?

    // Ids of a UTF-8 text; adds nothing in front. Each maximal invalid part of the text counts as U+FFFD. Linear in the text's
    // length.
    std::vector<int> encode(std::string_view text, Special special = Special::as_text) const;
    // The bytes of the tokens, one after the other; special tokens appear by name. The result is UTF-8 if the tokens' bytes
    // are.
    std::string decode(std::span<const int> ids) const;

    std::string_view bytes(int id) const;  // what one token stands for; for a special token its name
    bool is_special(int id) const;
    int special(std::string_view name) const;  // id of "<|eot_id|>" and the like; -1 where the model has none
    int begin_token() const;                   // <|begin_of_text|>
    bool is_end(int id) const;                 // does this token end an answer?
    std::span<const int> end_tokens() const;
    int rank_count() const;  // ordinary tokens: ids 0 to rank_count() - 1
    int vocab_size() const;  // V

    struct Impl;
    explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
    Tokenizer(const Tokenizer&) = default;  // a move is a copy: none is ever empty
    Tokenizer& operator=(const Tokenizer&) = default;

private:
    std::shared_ptr<const Impl> impl_;
};

// Turns a stream of tokens into text that is always whole UTF-8 characters. Special tokens give no text, but end a character
// that is cut before them. One thread at a time.
class TextStream {
public:
    explicit TextStream(Tokenizer tokenizer) : tokenizer_(std::move(tokenizer)) {}
    std::string push(int id);  // the characters that this token completes, possibly none; invalid bytes become U+FFFD
    std::string finish();      // what is left at the end: U+FFFD if a character was cut, else nothing

private:
    Tokenizer tokenizer_;
    std::string pending_;  // an incomplete character, at most 3 bytes
};

struct Options;
struct MemoryPlan {                       // of one rank, the one that needs most
    std::uint64_t weights_bytes = 0;      // in the file, mapped
    std::uint64_t cache_bytes = 0;        // key/value cache of one session
    std::uint64_t activations_bytes = 0;  // buffers of one session
};
// The plan of a model of this shape and number format, before there is one. Throws Error(argument) as Model::plan() does, for
// numbers of ranks that cannot share the model too.
MemoryPlan plan_memory(const Config& config, Format format, const Options& options);

// A tensor of a model file, in the file's order. Dimensions 1: plain f32 values [columns]; 2: a matrix in panels (§2).
struct TensorInfo {
    std::string name;  // "layers.0.query", see convert/FORMAT.md
    Format format = Format::f32;
    int dimensions = 0;
    int rows = 0;
    int columns = 0;
    int segments = 1;
    std::uint64_t offset = 0;  // in the file or image
    std::uint64_t bytes = 0;
    std::uint64_t checksum = 0;  // BLAKE2b-64, as the file states it
};

class Model {
public:
    enum class Loading {
        map,   // the file's pages are shared and read on first use; a file truncated meanwhile raises SIGBUS on any system
        read,  // all of it is read into memory now; the file may then change or vanish
    };
    static Model load(const std::string& path, Loading loading = Loading::map);
    // A model in memory, aligned to 64 bytes; it must stay there as long as owner (or, without one, any copy of the Model)
    // lives.
    static Model from_memory(std::span<const std::byte> image, std::shared_ptr<const void> owner = nullptr);
    // Random weights in the shape of config: for tests and benchmarks. Matrices in `format`, normalised so that activations
    // stay small.
    static Model synthetic(const Config& config, Format format, std::uint64_t seed = 1);

    const Config& config() const;
    const Tokenizer& tokenizer() const;
    const Weights& weights() const;
    std::string describe() const;             // a few lines for people
    std::string provenance() const;           // lines of `key: value`
    std::vector<TensorInfo> tensors() const;  // as the file lists them
    void verify() const;                      // all checksums; throws Error(checksum) naming the first tensor that differs
    MemoryPlan plan(const Options& options) const;  // before anything is allocated

    struct Impl;
    explicit Model(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
    Model(const Model&) = default;  // a move is a copy: none is ever empty
    Model& operator=(const Model&) = default;
    const Impl& impl() const { return *impl_; }

private:
    std::shared_ptr<const Impl> impl_;
};

std::shared_ptr<Device> cpu();  // this machine's processor
// A GPU, or several, whose sessions must share this Device: they take turns in it. Defined in kernels.cuh, which is compiled by
// nvcc. `progress` is called while weights are copied.
std::shared_ptr<Device> cuda(const std::vector<int>& gpus = {0},
                             const std::function<void(std::uint64_t done, std::uint64_t total)>& progress = {});

// The processes that `mpirun -n R program` started, as ranks (§13); defined where LLAMA3_MPI is, together with the
// implementation. Starts MPI if the program has not; the last owner ends it, and on rank 0 sends the others home from follow().
// A rank that does not hear from the others for timeout_seconds throws Error(device). Call it once.
std::shared_ptr<Communicator> mpi(double timeout_seconds = 120);

struct Options {
    std::shared_ptr<Device> device{};  // nullptr: cpu()
    int context = 0;                   // positions in the cache; 0: the model's, at most 8192
    Format kv = Format::bf16;          // format of the cache: f32 (not on GPUs), bf16 or q8
    int threads = 0;                   // CPU threads of each rank; 0: what the machine gives this process, shared by its ranks
    int ranks = 1;                     // that share each matrix (§13): threads of this process, or GPUs that it drives
    std::shared_ptr<Communicator> communicator{};  // instead: this process is one rank of several; all sessions with it then
                                                   // belong to one thread at a time
    int chunk = 512;                               // tokens per step of a long prompt; a GPU is faster with 2048
    bool time_stages = false;  // a GPU then has stage_times(), and runs stage after stage instead of a graph: slower
    std::string isa{};  // "avx512", "avx2", ...; empty: LLAMA3_ISA from the environment, or the best there is
};

// What a process does that is not rank 0 of Options::communicator: its share of every step of the sessions that rank 0 has.
// Returns when rank 0 lets go of its communicator. The number of threads is this rank's own; the kind of device and the isa must
// be those of rank 0, and the rest is. After an error call communicator->abort(): the others wait for this rank.
void follow(const Model& model, const Options& options);

// Seconds spent in each stage (§3), indexed by Stage; communicate: in the sums over ranks, waiting for the others included.
enum class Stage { embed, project_qkv, attend, project_out, gate_up, down, logits, communicate };
constexpr const char* stage_names[] = {"embed",   "project_qkv", "attend", "project_out",
                                       "gate_up", "down",        "logits", "communicate"};
using StageTimes = std::array<double, 8>;

// One sequence of tokens. Results never depend on threads, chunks, or which sessions are fed together. A callback may read and
// cancel its session, but not replace or destroy it.
class Session {
public:
    explicit Session(Model model, const Options& options = {});
    ~Session();
    Session(Session&&) noexcept;
    Session& operator=(Session&&) noexcept;

    // Runs the tokens after those already there and returns the logits [V] that follow the last one, valid until the next call.
    // No tokens: the logits that are there, or an error. A call that throws leaves the session as it was, its logits included.
    std::span<const float> feed(std::span<const int> tokens);
    // The same, with the logits of every token: each(index of the token in `tokens`, logits [V]).
    void feed(std::span<const int> tokens, const std::function<void(int, std::span<const float>)>& each);
    // One token for each of several sessions with one model and the same options (the context may differ), in one pass; then
    // read each one's logits(). A cancel() that waits in one of them stops the call before it begins.
    static void feed_together(std::span<Session* const> sessions, std::span<const int> tokens);

    std::span<const float> logits() const;  // of the last token fed, [V]; empty before the first
    std::span<const int> tokens() const;    // all that are in the cache
    int position() const;                   // their number
    int context() const;                    // how many fit
    StageTimes stage_times() const;         // of its back end, since it was opened; on a GPU see Options::time_stages
    const Model& model() const;
    void rewind(int position);        // forgets the tokens from `position` on; logits() is then empty
    void cancel() noexcept;           // from any thread: a running feed() stops with Error(cancelled) within one stage, or
                                      // where ranks meet next; on a GPU at the end of what it has been given, at most a step
    bool cancelled() const noexcept;  // a cancel() is waiting for the next feed() or generate(), which consumes it
    void reset_cancel() noexcept;

    struct Impl;

private:
    friend class Sampler;
    friend Finish generate(Session&, std::span<const int>, Sampler&, const GenerateOptions&,
                           const std::function<bool(const Generated&)>&);
    std::unique_ptr<Impl> impl_;
};

// Temperature 0 takes the most likely token (the lowest id of equals). Filters act in this order: repetition penalty,
// temperature, top-k, top-p (the nucleus of Meta's reference: the token that crosses the threshold stays), min-p.
struct Sampling {
    float temperature = 0.6f;
    float top_p = 0.9f;        // 1: off
    float min_p = 0;           // keeps tokens at least this share as likely as the best; 0: off
    int top_k = 0;             // 0: off
    float repeat_penalty = 1;  // 1: off; divides positive and multiplies negative logits of recent tokens
    int repeat_last = 64;      // how many tokens are recent
    std::uint64_t seed = 1;
};

// Same seed, same logits: same tokens, on every platform. One thread at a time.
class Sampler {
public:
    explicit Sampler(const Sampling& sampling = {});
    int sample(std::span<const float> logits, std::span<const int> history = {});
    int sample(Session& session);  // from its logits and tokens; on its device, if that can draw and there is no penalty
    const Sampling& sampling() const { return sampling_; }

private:
    Sampling sampling_;
    std::uint64_t state_;
    std::vector<std::pair<float, int>> candidates_;  // (probability, id), kept between calls to save allocations
    std::vector<float> penalised_;
};

float log_probability(std::span<const float> logits, int token);  // natural logarithm, of the untempered logits

struct Generated {
    int token;
    std::string_view text;          // the characters it completes
    std::span<const float> logits;  // the row it was drawn from, [V]
};
enum class Finish { end_token, length, context, cancelled, stopped };  // stopped: the callback returned false

struct GenerateOptions {
    int max_tokens = -1;      // -1: until the context is full
    bool ignore_end = false;  // go on after end tokens
    bool logits = true;       // false: Generated::logits is empty; a GPU then draws by itself and sends only the token
};
// Feeds the prompt (none: goes on from the session's logits), then draws tokens until one of Finish. The callback sees each
// token before it is fed, the end token too, which has no text of its own. Every token that was drawn is fed, so the session continues
// where the text ends; except the last one of a full context, and one that is on its way when the session is cancelled.
Finish generate(Session& session, std::span<const int> prompt, Sampler& sampler, const GenerateOptions& options,
                const std::function<bool(const Generated&)>& on_token);

enum class ChatFormat : std::uint32_t { none = 0, llama3 = 1, llama3_1 = 2, llama3_2 = 3 };

struct Message {
    std::string role{};     // "system", "user", "assistant", "ipython" ("tool" is rendered as ipython); letters, digits, _ - .
    std::string content{};  // white space at its ends is dropped in hf style and in the llama3 format, as in their originals;
                            // in hf style a tool's result becomes a JSON string
    bool python_tag = false;      // assistant: starts with <|python_tag|>, a call of a built-in tool or of the interpreter
    bool end_of_message = false;  // ends with <|eom_id|>: waits for a tool's result; else <|eot_id|>
};

struct ChatStyle {
    enum class Kind { reference, hf } kind = Kind::reference;  // Meta's code, or the templates of the Hugging Face releases
    std::string date{};                                        // hf: "26 Jul 2024" unless given
    // hf: JSON of each tool exactly as it shall appear (indented by 4), shown in the first user message
    std::vector<std::string> tools{};
};
// Token ids of a conversation, begin-of-text in front, ending with the header of the assistant's answer if `answer`. Roles and
// contents are ordinary text: nothing in them becomes a special token. Throws Error for a model without a chat format.
std::vector<int> render_chat(const Model& model, std::span<const Message> messages, const ChatStyle& style = {},
                             bool answer = true);

struct ChatOptions {
    std::string system{};  // system message; empty: none
    ChatStyle style{};
    int max_tokens = -1;  // per answer; -1: no limit but the context
    enum class Overflow {
        error,
        restart
    } overflow = Overflow::restart;  // restart: keep the system message and the latest turns that fit
};

// A conversation. What is fed is always render_chat() of its messages; the cache is kept between turns, only what is new is
// computed.
class Chat {
public:
    explicit Chat(Model model, const ChatOptions& chat = {}, const Sampling& sampling = {}, const Options& options = {});
    // Adds the user's message, streams the answer (whole characters) and returns it. If the callback returns false or the
    // session is cancelled, the answer ends there and the conversation goes on from it.
    std::string say(std::string_view text, const std::function<bool(std::string_view)>& on_text = {});
    // The same with any message, for instance a tool's result: Message{"ipython", "{\"result\": 7}"}.
    std::string say(Message message, const std::function<bool(std::string_view)>& on_text = {});

    const std::vector<Message>& messages() const { return messages_; }
    Finish finish() const { return finish_; }   // how the last answer ended
    int restarts() const { return restarts_; }  // how often the context was full and older turns were dropped
    Session& session() { return session_; }
    void clear();  // a new conversation with the same system message

private:
    Session session_;
    ChatOptions options_;
    Sampler sampler_;
    std::vector<Message> messages_;
    Finish finish_ = Finish::end_token;
    int restarts_ = 0;
    bool busy_ = false;  // a say() is running
};

// ═══ §2  Data ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// The nouns of the forward pass. A new back end (kernels.cuh is one) needs this section and the next, no more.

struct Config {
    int n_layers = 0;        // L
    int dim = 0;             // D
    int n_heads = 0;         // H
    int n_kv_heads = 0;      // K, divides H: H / K query heads share a key/value head
    int head_dim = 0;        // E, even
    int ffn_dim = 0;         // F
    int vocab_size = 0;      // V
    int context_length = 0;  // that the model was made for
    float norm_eps = 1e-5f;
    float rope_theta = 500000;
    float rope_factor = 1;  // 1: no scaling; 8: Llama 3.1 and 3.3; 32: Llama 3.2
    float rope_low_freq_factor = 1;
    float rope_high_freq_factor = 1;
    int rope_original_context = 0;
    ChatFormat chat_format = ChatFormat::none;
    bool tied_embedding = false;  // the output matrix is the embedding table
    int attention_out_segments = 1;
    int down_segments = 1;
    int begin_token = 0;
    std::vector<int> end_tokens{};  // at most 8
};

inline constexpr int panel_rows = 16;          // output rows per panel: one lane each
inline constexpr int block_columns = 32;       // q8, q4: columns that share a scale
inline constexpr int attention_segment = 512;  // positions per softmax segment
inline constexpr int max_segments = 8;         // of attention_out and down

// By Format. See convert/FORMAT.md, section 5.
struct FormatInfo {
    const char* name;
    int unit_columns;        // columns of a unit
    std::size_t unit_bytes;  // bytes of a unit of a panel
};
inline constexpr FormatInfo format_infos[] = {
    {"f32", 1, 64}, {"bf16", 2, 64}, {"q8", 64, 1088}, {"q4", 64, 576}, {"unknown", 0, 0}};
constexpr const FormatInfo& format_info(Format f) { return format_infos[f <= Format::q4 ? static_cast<int>(f) : 4]; }
constexpr int unit_columns(Format format) { return format_info(format).unit_columns; }
constexpr std::size_t unit_bytes(Format format) { return format_info(format).unit_bytes; }
constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Activations: rows of float32 in the memory of the back end. Rows are padded with zeros to a multiple of 64 columns.
struct Tensor {
    float* data = nullptr;
    int rows = 0;
    int columns = 0;
    std::size_t stride = 0;  // elements from row to row
    float* row(int i) const { return data + static_cast<std::size_t>(i) * stride; }
};

// A weight matrix W [rows, columns], y = W x, in panels of 16 rows. A view: owns nothing.
// Rows can be sliced at panels; columns at segments, which leaves gaps between the panels: hence panel_stride.
struct Matrix {
    Format format = Format::f32;
    const std::byte* data = nullptr;  // first unit of the first panel
    int rows = 0;
    int columns = 0;
    int segments = 1;              // equal parts of the columns, summed by a fixed tree
    std::size_t panel_stride = 0;  // bytes from panel to panel
    int panels() const { return (rows + panel_rows - 1) / panel_rows; }
    int units() const { return (columns + unit_columns(format) - 1) / unit_columns(format); }
    const std::byte* panel(int i) const { return data + static_cast<std::size_t>(i) * panel_stride; }
};

struct Layer {
    int index = 0;
    const float* attention_norm = nullptr;  // [D]
    Matrix query;                           // [H*E, D], rows 2i and 2i+1 of a head are a RoPE pair
    Matrix key;                             // [K*E, D], likewise
    Matrix value;                           // [K*E, D]
    Matrix attention_out;                   // [D, H*E]
    const float* ffn_norm = nullptr;        // [D]
    Matrix gate;                            // [F, D]
    Matrix up;                              // [F, D]
    Matrix down;                            // [D, F]
};

struct Weights {
    Matrix embedding;                   // [V, D]
    std::vector<Layer> layers;          // L
    const float* final_norm = nullptr;  // [D]
    Matrix output;                      // [V, D]; the embedding again if tied
};

// What one rank of several owns of a model, as views: H/R query heads, K/R key/value heads (or one, which it has in common with
// others, where R > K), about F/R channels and V/R logits. Norms and the embedding table are whole.
struct Share {
    Config config;    // with the rank's n_heads, n_kv_heads, ffn_dim and segments
    Weights weights;  // weights.output has the rank's rows only
    int rank = 0, ranks = 1;
};
// Throws Error(argument) with the numbers of ranks that can share the model (§13).
Share share_of(const Config& config, const Weights& weights, int rank, int ranks);
std::uint64_t bytes_of(const Share& share);  // of its weights

// Keys and values of one sequence, in the memory of the back end that made it. Positions 0 to capacity() - 1; which of them
// hold tokens is the Session's affair. The rows of a batch that share a cache must have increasing positions.
class KVCache {
public:
    virtual ~KVCache() = default;
    virtual int capacity() const = 0;
};

// One token of a forward pass. Prefill is many rows of one cache, decode one row, batched serving rows of several caches.
struct Row {
    int token;
    int position;
    KVCache* cache;
    bool wants_logits;
};

struct Batch {
    std::span<const Row> rows;  // T
    int size() const { return static_cast<int>(rows.size()); }
};

// The buffers between the stages, T rows each.
struct Activations {
    Tensor x;       // [T, D]      the residual stream
    Tensor query;   // [T, H*E]
    Tensor mixed;   // [T, H*E]    attention's mix of the values
    Tensor hidden;  // [T, F]      gated
    Tensor logits;  // [rows that want logits, V]
};

// ═══ §3  Stages, back ends, communicators ══════════════════════════════════════════════════════════════════════════════════════
//
// A stage is one line of the paper and one barrier (or launch). §5 implements the stages as plain loops, §12 with threads and
// vector kernels, kernels.cuh on GPUs, always in this order. W h stands for a matrix product, ⊙ for the elementwise one.

class Stages {
public:
    virtual ~Stages() = default;

    // x[t] = table[token[t]]                                                   x: [T, D]
    virtual void embed(Tensor x, const Matrix& table, const Batch& batch) = 0;

    // h = RMSNorm(x);  query = RoPE(W_q h);  the cache gets RoPE(W_k h) and W_v h       query: [T, H*E], x: [T, D]
    virtual void project_qkv(Tensor query, Tensor x, const Layer& layer, const Batch& batch) = 0;

    // mixed[t, head] = softmax(query · keysᵀ / √E) values, over positions 0 to position[t]     mixed, query: [T, H*E]
    virtual void attend(Tensor mixed, Tensor query, const Layer& layer, const Batch& batch) = 0;

    // x += Σ over ranks of W_o mixed                                           x: [T, D], mixed: [T, H*E]
    virtual void project_out(Tensor x, Tensor mixed, const Layer& layer) = 0;

    // h = RMSNorm(x);  hidden = SiLU(W_gate h) ⊙ (W_up h)                       hidden: [T, F], x: [T, D]
    virtual void gate_up(Tensor hidden, Tensor x, const Layer& layer) = 0;

    // x += Σ over ranks of W_down hidden                                       x: [T, D], hidden: [T, F]
    virtual void down(Tensor x, Tensor hidden, const Layer& layer) = 0;

    // logits = W_out RMSNorm(x), for the rows that want them                   logits: [rows, V], x: [T, D]
    virtual void logits(Tensor logits, Tensor x, const Weights& weights, const Batch& batch) = 0;
};

// §4. Every device, batch and rank runs this one function.
void forward(Stages& stages, const Weights& weights, const Activations& activations, const Batch& batch);

// What a Session needs of a device: caches, and one forward pass per call. One thread at a time.
class Backend {
public:
    virtual ~Backend() = default;
    virtual std::unique_ptr<KVCache> make_cache() = 0;
    virtual int max_rows() const = 0;  // the largest batch that step() takes
    // Runs forward() over the batch. Afterwards logits(i) is the row of the i-th token that wanted logits, in host memory,
    // until the next call; of one rank of several, its part of the row. Returns false if *cancel became true meanwhile (the
    // caches' new positions are then undefined).
    virtual bool step(const Batch& batch, const std::atomic<bool>* cancel) = 0;
    virtual std::span<const float> logits(int i) const = 0;
    virtual StageTimes stage_times() const { return {}; }  // zeros where it is not measured
    // Draws a token from logits(i) as Sampler::sample does without a penalty, where they are; random is the next number of the
    // sampler's generator. -1: this back end leaves it to the host.
    virtual int draw(int /*i*/, const Sampling& /*sampling*/, std::uint64_t /*random*/) { return -1; }
    virtual std::string describe() const = 0;  // instruction set or device, threads, memory
};

class Device {
public:
    virtual ~Device() = default;
    virtual std::unique_ptr<Backend> open(const Model& model, const Options& options) = 0;
    virtual std::uint64_t cache_bytes(const Config& config, const Options& options) const = 0;
    virtual std::uint64_t activations_bytes(const Config& config, const Options& options) const = 0;
    virtual std::uint64_t memory_bytes() const { return 0; }  // of the device itself; 0: unknown
    virtual int ranks() const { return 1; }                   // that share a model where Options say 1 and no communicator
};

// The plain loops of §5 as a device: slow, single-threaded, the specification that everything else is tested against.
std::shared_ptr<Device> reference();

// How ranks meet (§13): in the sum at the end of project_out and of down, and when logits are gathered. Every rank makes the same
// calls in the same order, from one thread at a time. What fails throws Error(device) on every rank that waits.
class Communicator {
public:
    virtual ~Communicator() = default;
    virtual int rank() const = 0;
    virtual int ranks() const = 0;
    // values[i] = the sum over the ranks by join_ranks(), on every rank
    virtual void all_reduce_sum(std::span<float> values) = 0;
    // Every rank's part, in order of rank, into `whole` of rank 0; the parts may differ in length.
    virtual void gather(std::span<const float> part, std::span<float> whole) = 0;
    virtual void broadcast(std::vector<std::byte>& message) = 0;  // from rank 0, of any length; may be waited for without end
    virtual void barrier() = 0;
    virtual void abort() noexcept = 0;  // this rank gives up, so the others must not wait for it: with MPI all processes end
    virtual std::string describe() const = 0;  // the transport

    bool lost_step = false;  // after a failure between ranks nobody knows what the others wait for: only abort() is left
};

// out[i] = the sum of parts[rank][i] by a binary tree over the ranks: (0 + 1) + (2 + 3), ... The same bits for every number of
// ranks up to the segments of attention_out and down, whose tree it continues. out may be one of the parts.
void join_ranks(float* out, std::span<const float* const> parts, std::size_t n);

}  // namespace llama3

#endif  // LLAMA3_HPP

#if defined(LLAMA3_IMPLEMENTATION) && (defined(LLAMA3_KERNELS) || !defined(LLAMA3_IMPLEMENTED))
#define LLAMA3_IMPLEMENTED  // once, however often the header is included

#if !defined(__GNUC__)
#error "llama3.hpp: the implementation needs g++ 11, clang 14, or a later one of these."
#endif
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0)
#error "llama3.hpp: compile the file that defines LLAMA3_IMPLEMENTATION without -ffast-math (-Ofast): results would change."
#endif

#ifndef LLAMA3_KERNELS  // the header includes itself once per instruction set: then only §9 is read

#pragma push_macro("min")  // as above
#pragma push_macro("max")
#undef min
#undef max

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <concepts>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef LLAMA3_MPI
#include <mpi.h>
#endif
#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

// The order of arithmetic is part of the specification (bits are equal across compilers and flags), so a compiler must not fuse
// a product and a sum that the text keeps apart. Every fused multiply-add that is wanted is written as one.
#if defined(__clang__)
#pragma float_control(push)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif
static_assert(FLT_EVAL_METHOD == 0, "llama3.hpp: floats must be rounded to float: compile with -msse2 -mfpmath=sse.");

namespace llama3::detail {

// A piece of a text: characters that live elsewhere, or a number.
class Part {
public:
    Part(std::string_view text) : text_(text) {}
    Part(const std::string& text) : text_(text) {}
    Part(const char* text) : text_(text) {}
    template <std::integral Number>
    Part(Number number) {
        if constexpr (std::is_signed_v<Number>) write("%lld", static_cast<long long>(number));
        else write("%llu", static_cast<unsigned long long>(number));
    }
    Part(float number) { write("%.7g", static_cast<double>(number)); }
    std::string_view text() const { return digits_[0] ? digits_ : text_; }

private:
    template <class Number>
    void write(const char* format, Number number) {
        std::snprintf(digits_, sizeof digits_, format, number);
    }
    std::string_view text_;
    char digits_[24] = {};
};

std::string to_text(std::initializer_list<Part> parts) {
    std::string text;
    for (const Part& part : parts) text += part.text();
    return text;
}

// Every error of the library: `where: what is wrong (found X, expected Y). What to do.`
[[noreturn]] void fail(Code code, std::string_view where, std::string_view what, const Part& found, const Part& expected,
                       std::string_view to_do) {
    throw Error(code, to_text({where, ": ", what, " (found ", found, ", expected ", expected, "). ", to_do, "."}));
}

// fma(a, b, c) = a b + c, rounded once. Where the processor may lack the instruction it is made of exact steps in double: the
// product of two floats is exact there; the sum is rounded to odd (its error is known, by Knuth's two-sum), so that the
// final rounding to float is the only one (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    const double product = static_cast<double>(a) * static_cast<double>(b);
    const double addend = static_cast<double>(c);
    const double sum = product + addend;
    const double part = sum - product;
    const double error = (product - (sum - part)) + (addend - part);
    std::uint64_t bits = std::bit_cast<std::uint64_t>(sum);
    const bool inexact = error != 0 && error == error;  // error is NaN where sum is not finite
    const bool away = (error > 0) == (sum > 0);
    const std::uint64_t odd = away ? bits + 1 : bits - 1;
    bits = inexact && (bits & 1) == 0 ? odd : bits;
    return static_cast<float>(std::bit_cast<double>(bits));
#endif
}

// e^x, within 2 units in the last place: x = n ln 2 + r with |r| <= ln(2) / 2, then Taylor's series to r^7 by Horner's rule.
// No library function decides a result: std::exp differs from platform to platform. Below -87.3 the result is 0.
inline float exp(float x) {
    constexpr float log2_e = 1.44269504088896341f;
    constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // high has 9 bits: n * high is exact
    constexpr float round = 12582912.0f;                                 // 1.5 * 2^23: adding it rounds to an integer
    if (!(x <= 88.72f)) return x == x ? std::numeric_limits<float>::infinity() : x;
    if (x < -87.33f) return 0;
    const float n = fma(x, log2_e, round) - round;
    const float r = fma(n, -ln2_low, fma(n, -ln2_high, x));
    float p = 1.0f / 5040;
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, term);
    const int exponent = static_cast<int>(n);  // -126 to 128; 2^128 is no float: scale in two steps
    const int half = exponent >> 1;
    return p * std::bit_cast<float>((127 + half) << 23) * std::bit_cast<float>((127 + exponent - half) << 23);
}

// Sums that are not chains run over 16 lanes (element i goes to lane i mod 16), joined by this tree.
inline float sum_lanes(const float* lanes) {
    float sums[16];
    std::copy(lanes, lanes + 16, sums);
    for (int half = 8; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    return sums[0];
}

// splitmix64 (Steele, Lea and Flood, 2014): as fast as memory, and random enough for weights.
inline std::uint64_t next_random(std::uint64_t& state) {
    std::uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

// Natural logarithm in double, for x > 0: x = 2^n m with m in [√½, √2), log m = 2 atanh((m - 1) / (m + 1)) by its series.
inline double log(double x) {
    std::uint64_t bits = std::bit_cast<std::uint64_t>(x);
    int n = static_cast<int>(bits >> 52) - 1023;
    double m = std::bit_cast<double>((bits & 0xfffffffffffffu) | 0x3ff0000000000000u);
    if (m > 1.4142135623730951) m *= 0.5, ++n;
    const double s = (m - 1) / (m + 1), s2 = s * s;
    double series = 0;
    for (int k = 25; k >= 1; k -= 2) series = series * s2 + 1.0 / k;
    return n * 0.6931471805599453 + 2 * s * series;
}

// e^x in double, for |x| < 700.
inline double exp64(double x) {
    const double n = static_cast<double>(static_cast<long long>(x * 1.4426950408889634 + (x < 0 ? -0.5 : 0.5)));
    const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double series = 1;
    for (int k = 17; k >= 1; --k) series = series * r / k + 1;
    return series * std::bit_cast<double>(static_cast<std::uint64_t>(1023 + static_cast<long long>(n)) << 52);
}

// cos and sin of an angle up to 2^20, in double: quarter turns are taken off in two parts (the first has 33 bits, so that
// its product with their number is exact), then Taylor's series on [-π/4, π/4].
inline void cos_sin(double angle, double& cosine, double& sine) {
    const double n = static_cast<double>(static_cast<long long>(angle * 0.63661977236758134 + (angle < 0 ? -0.5 : 0.5)));
    const double r = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
    const double r2 = r * r;
    double c = 1, s = 1;
    for (int k = 18; k >= 2; k -= 2) c = 1 - c * r2 / (k * (k - 1));
    for (int k = 19; k >= 3; k -= 2) s = 1 - s * r2 / (k * (k - 1));
    s *= r;
    const long long quarters = static_cast<long long>(n);
    if (quarters & 2) c = -c, s = -s;
    cosine = quarters & 1 ? -s : c;
    sine = quarters & 1 ? c : s;
}

// ── What the sections before §15 use of it ──

// Zeroed memory, aligned to 64 bytes. Large buffers come from the system page by page, so what is never touched costs nothing;
// `dense` says that all of it will be touched: then larger pages are asked for, which are faster to get and to walk.
class AlignedBuffer {
public:
    AlignedBuffer() = default;
    explicit AlignedBuffer(std::size_t bytes, bool dense = false);  // throws Error(memory)
    std::byte* data() const { return data_.get(); }
    std::size_t size() const { return data_ ? data_.get_deleter().bytes : 0; }

private:
    struct Free {
        std::size_t bytes;
        void operator()(std::byte* data) const;
    };
    std::unique_ptr<std::byte, Free> data_;
};

using Bytes = std::span<const std::byte>;

// Bytes that stay where they are as long as their owner lives.
struct Image {
    Bytes bytes;
    std::shared_ptr<const void> owner;
};
Image in_memory(AlignedBuffer buffer);
Image map_file(const std::string& path);   // shares the pages of the file; throws Error(file)
Image read_file(const std::string& path);  // throws Error(file), Error(memory)

// The default modes (round to nearest, denormals kept, nothing trapped) while it lives; then the caller's again.
class FloatEnvironment {
public:
    FloatEnvironment() noexcept;
    ~FloatEnvironment();
    FloatEnvironment(const FloatEnvironment&) = delete;
    FloatEnvironment& operator=(const FloatEnvironment&) = delete;

private:
    std::uint64_t saved_ = 0;
};

// What the processor has and the operating system saves. All false where there is no such thing.
struct CpuFeatures {
    bool avx2_fma_f16c = false;
    bool avx_vnni = false;
    bool avx512 = false;       // F, BW, DQ, VL
    bool avx512_vnni = false;  // together with avx512
    bool avx512_bf16 = false;  // likewise
    bool intel = false;
    bool amx = false;      // int8 and bf16, with tile registers from the system
    bool dotprod = false;  // aarch64: dot products of bytes
};
CpuFeatures cpu_features();
int usable_cpus();  // that this process may run on: affinity and container limits, at least 1

std::span<const std::uint32_t> unicode_classes();  // runs of code points, ascending: first code point << 2 | class (§6)

}  // namespace llama3::detail

// ═══ Part II: What Llama 3 computes ════════════════════════════════════════════════════════════════════════════════════════════

// ═══ §4  The forward pass ══════════════════════════════════════════════════════════════════════════════════════════════════════
//
// "The Llama 3 Herd of Models" (Meta, 2024), section 3.2: a pre-norm transformer with grouped-query attention and SwiGLU. One
// text for prefill, decode, several sequences at once, every device and every rank. What a line means is in §3, how it is
// computed in §5 (plainly) and §12 (fast). Weights and activations are of one rank; ranks meet inside project_out, down and
// logits.

namespace llama3 {

// clang-format off
void forward(Stages& stages, const Weights& weights, const Activations& a, const Batch& batch) {
    stages.embed(a.x, weights.embedding, batch);             // x = table[token]                      [T, D]
    for (const Layer& layer : weights.layers) {
        // x = x + W_o Attention(RoPE(W_q h), RoPE(W_k h), W_v h),    h = RMSNorm(x)
        stages.project_qkv(a.query, a.x, layer, batch);      // keys and values go to the caches      [T, H*E]
        stages.attend(a.mixed, a.query, layer, batch);       // softmax(query keysᵀ / √E) values      [T, H*E]
        stages.project_out(a.x, a.mixed, layer);             //                                       [T, D]
        // x = x + W_down (SiLU(W_gate h) ⊙ (W_up h)),                h = RMSNorm(x)
        stages.gate_up(a.hidden, a.x, layer);                //                                       [T, F]
        stages.down(a.x, a.hidden, layer);                   //                                       [T, D]
    }
    stages.logits(a.logits, a.x, weights, batch);            // W_out RMSNorm(x)                      [rows, V]
}
// clang-format on

}  // namespace llama3

// ═══ §5  The stages as plain loops ═════════════════════════════════════════════════════════════════════════════════════════════
//
// The mathematics of Llama 3, one small function per formula, and ReferenceBackend, which makes the stages of them. This is the
// specification: it fixes not only what is computed but in which order, so that §12 can be compared with it bit for bit.
//
//     products    one chain per output element, acc = fma(w, x, acc), columns ascending; with q8 and q4 weights one exact
//                 integer dot product per block of 32, then acc = fma(float(dot) * w_scale, x_scale, acc)
//     W_o, W_down the columns in `segments` equal parts, a chain each, joined by a binary tree
//     sums        over 16 lanes, joined by a binary tree (detail::sum_lanes)
//     attention   over segments of 512 positions, joined in order

namespace llama3 {
namespace detail {

// Of §8, which says how values are stored:
float decode_weight(const Matrix& w, int row, int column);  // W[row, column]
void decode_row(const Matrix& w, int row, float* out);      // W[row, :], with the columns that fill up the last unit
float round_to_bf16(float x);
float quantise_group(const float* x, std::int8_t* bytes);  // 32 activations -> bytes and their scale
int block_dot(const Matrix& w, int row, int column, const std::int8_t* bytes, float& w_scale);  // q8, q4: an exact product of 32
void round_trip(Format format, float* to, const float* from, int n);  // what a cache of this format gives back of a head

// out = x / sqrt(mean(x²) + ε) ⊙ weight       [D]      (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019)
void rmsnorm(float* out, const float* x, const float* weight, int n, float eps) {
    float lanes[16] = {};
    for (int i = 0; i < n; ++i) lanes[i % 16] = fma(x[i], x[i], lanes[i % 16]);
    const float inverse = 1 / std::sqrt(sum_lanes(lanes) / static_cast<float>(n) + eps);
    for (int i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

// Turns of the RoPE pairs per position, θ'[i] for i < E/2. θ[i] = theta^(-2i/E) (Su et al., "RoFormer", 2021). Llama 3.1
// stretches long wavelengths by `factor`, keeps short ones, and blends in between, so that positions beyond the original
// context look familiar.
std::vector<float> rope_frequencies(const Config& config) {
    const FloatEnvironment environment;
    std::vector<float> frequencies(static_cast<std::size_t>(config.head_dim / 2));
    const double log_theta = log(static_cast<double>(config.rope_theta));
    for (std::size_t i = 0; i < frequencies.size(); ++i) {
        const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
        float frequency = 1 / static_cast<float>(exp64(static_cast<double>(exponent) * log_theta));
        if (config.rope_factor != 1) {
            const float wavelength = 6.28318530717958648f / frequency;
            const float context = static_cast<float>(config.rope_original_context);
            const float low = config.rope_low_freq_factor, high = config.rope_high_freq_factor;
            if (wavelength > context / low) frequency = frequency / config.rope_factor;
            else if (wavelength >= context / high) {
                const float keep = (context / wavelength - low) / (high - low);
                frequency = fma(keep, frequency, (1 - keep) * frequency / config.rope_factor);
            }
        }
        frequencies[i] = frequency;
    }
    return frequencies;
}

// cos and sin of position * θ'[i], the angle rounded to float as in Meta's code       turns: [E/2][2]
void rope_turns(float* turns, const std::vector<float>& frequencies, int position) {
    for (std::size_t i = 0; i < frequencies.size(); ++i) {
        double cosine, sine;
        cos_sin(static_cast<double>(static_cast<float>(position) * frequencies[i]), cosine, sine);
        turns[2 * i] = static_cast<float>(cosine), turns[2 * i + 1] = static_cast<float>(sine);
    }
}

// Rotates each pair (x[2i], x[2i+1]) of one head by its angle                          x: [E], turns: [E/2][2]
void rope(float* x, const float* turns, int head_dim) {
    for (int i = 0; i < head_dim; i += 2) {
        const float a = x[i], b = x[i + 1], cosine = turns[i], sine = turns[i + 1];
        x[i] = fma(a, cosine, -(b * sine));  // not a * cosine - b * sine: GCC's vectoriser fuses that, contraction off or not
        x[i + 1] = fma(a, sine, b * cosine);
    }
}

// SiLU(x) = x / (1 + e^-x)                               (Shazeer, "GLU Variants Improve Transformer", 2020, for SwiGLU)
inline float silu(float x) { return x / (1 + exp(-x)); }

// One chain: columns [first, last) of row `row` of W, times x. `first` and `last` are multiples of the format's unit.
float chain(const Matrix& w, int row, int first, int last, const float* x) {
    float sum = 0;
    if (w.format == Format::f32)
        for (int c = first; c < last; ++c) sum = fma(decode_weight(w, row, c), x[c], sum);
    if (w.format == Format::bf16)  // meets activations rounded to bf16, as in the original
        for (int c = first; c < last; ++c) sum = fma(decode_weight(w, row, c), round_to_bf16(x[c]), sum);
    if (w.format == Format::q8 || w.format == Format::q4)
        for (int c = first; c < last; c += block_columns) {
            std::int8_t bytes[block_columns];
            float w_scale;
            const float x_scale = quantise_group(x + c, bytes);
            const int dot = block_dot(w, row, c, bytes, w_scale);
            sum = fma(static_cast<float>(dot) * w_scale, x_scale, sum);
        }
    return sum;
}

// y = W x                                                y: [rows], x: [columns], filled up with zeros to whole units
void linear(float* y, const Matrix& w, const float* x) {
    const int columns = w.units() * unit_columns(w.format), part = columns / w.segments;
    for (int row = 0; row < w.rows; ++row) {
        float sums[max_segments] = {};
        for (int s = 0; s < w.segments; ++s) sums[s] = chain(w, row, s * part, (s + 1) * part, x);
        for (int n = w.segments; n > 1; n /= 2)
            for (int s = 0; s < n / 2; ++s) sums[s] = sums[2 * s] + sums[2 * s + 1];
        y[row] = sums[0];
    }
}

// A cache that keeps what a cache of its format would give back: [L][P][K][E] floats for keys and for values.
class ReferenceCache final : public KVCache {
public:
    ReferenceCache(const Config& config, int capacity, Format format)
        : config_(config), capacity_(capacity), format_(format), keys_(offset(config.n_layers, 0, 0)), values_(keys_.size()) {}
    int capacity() const override { return capacity_; }
    void store(int layer, int position, int head, const float* key, const float* value) {
        round_trip(format_, keys_.data() + offset(layer, position, head), key, config_.head_dim);
        round_trip(format_, values_.data() + offset(layer, position, head), value, config_.head_dim);
    }
    const float* key(int layer, int position, int head) const { return keys_.data() + offset(layer, position, head); }
    const float* value(int layer, int position, int head) const { return values_.data() + offset(layer, position, head); }

private:
    std::size_t offset(int layer, int position, int head) const {
        const std::int64_t row = std::int64_t{layer} * capacity_ + position;
        return static_cast<std::size_t>((row * config_.n_kv_heads + head) * config_.head_dim);
    }

    Config config_;
    int capacity_;
    Format format_;
    std::vector<float> keys_, values_;
};

// softmax(q · keysᵀ / √E) values over positions 0 to n - 1, for one query head                      out, query: [E]
void attend_reference(float* out, const float* query, const ReferenceCache& cache, int layer, int kv_head, int n, int head_dim) {
    const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
    const std::size_t width = static_cast<std::size_t>(head_dim);
    std::vector<float> scores(attention_segment), mix(width);
    float largest = 0, total = 0;
    for (int first = 0; first < n; first += attention_segment) {
        const int count = std::min(attention_segment, n - first);
        float segment_largest = -std::numeric_limits<float>::infinity(), lanes[16] = {};
        for (int j = 0; j < count; ++j) {
            const float* key = cache.key(layer, first + j, kv_head);
            float dot = 0;
            for (std::size_t e = 0; e < width; ++e) dot = fma(query[e], key[e], dot);
            scores[static_cast<std::size_t>(j)] = dot * scale;
            segment_largest = std::max(segment_largest, dot * scale);
        }
        std::fill(mix.begin(), mix.end(), 0.0f);
        for (int j = 0; j < count; ++j) {
            const float p = exp(scores[static_cast<std::size_t>(j)] - segment_largest);
            lanes[j % 16] = lanes[j % 16] + p;
            const float* value = cache.value(layer, first + j, kv_head);
            for (std::size_t e = 0; e < width; ++e) mix[e] = fma(p, value[e], mix[e]);
        }
        if (first == 0) {
            largest = segment_largest, total = sum_lanes(lanes);
            std::copy(mix.begin(), mix.end(), out);
            continue;
        }
        const float both = std::max(largest, segment_largest);  // the running softmax of Milakov and Gimelshein, 2018
        const float old_share = exp(largest - both), new_share = exp(segment_largest - both);
        total = fma(sum_lanes(lanes), new_share, total * old_share);
        for (std::size_t e = 0; e < width; ++e) out[e] = fma(mix[e], new_share, out[e] * old_share);
        largest = both;
    }
    const float inverse = 1 / total;
    for (std::size_t e = 0; e < width; ++e) out[e] = out[e] * inverse;
}

// A tensor with memory of its own, rows filled up with zeros to a multiple of 64.
struct OwnedTensor {
    std::vector<float> memory;
    Tensor tensor;
    OwnedTensor(const OwnedTensor&) = delete;  // tensor points into memory
    OwnedTensor(int rows, int columns)
        : memory(static_cast<std::size_t>(rows * round_up(columns, 64))),
          tensor{memory.data(), rows, columns, static_cast<std::size_t>(round_up(columns, 64))} {}
};

class ReferenceBackend final : public Backend, public Stages {
public:
    ReferenceBackend(Model model, const Options& options)
        : model_(std::move(model)), config_(model_.config()), options_(options), rows_(std::min(options.chunk, 64)),
          frequencies_(rope_frequencies(config_)), x_(rows_, config_.dim), query_(rows_, config_.n_heads * config_.head_dim),
          mixed_(rows_, config_.n_heads * config_.head_dim), hidden_(rows_, config_.ffn_dim),
          logits_(rows_, config_.vocab_size) {}

    std::unique_ptr<KVCache> make_cache() override {
        return std::make_unique<ReferenceCache>(config_, options_.context, options_.kv);
    }
    int max_rows() const override { return rows_; }
    std::span<const float> logits(int i) const override {
        return {logits_.tensor.row(i), static_cast<std::size_t>(config_.vocab_size)};
    }
    std::string describe() const override { return "reference loops, one thread"; }
    bool step(const Batch& batch, const std::atomic<bool>* cancel) override {
        const FloatEnvironment environment;
        cancel_ = cancel;
        forward(*this, model_.weights(), {x_.tensor, query_.tensor, mixed_.tensor, hidden_.tensor, logits_.tensor}, batch);
        return !stopped();
    }

    void embed(Tensor x, const Matrix& table, const Batch& batch) override {
        for (int t = 0; t < batch.size(); ++t) decode_row(table, batch.rows[static_cast<std::size_t>(t)].token, x.row(t));
        n_tokens_ = batch.size();
    }

    void project_qkv(Tensor query, Tensor x, const Layer& layer, const Batch& batch) override {
        if (stopped()) return;
        const int head_dim = config_.head_dim;
        std::vector<float> h(x.stride), key(static_cast<std::size_t>(layer.key.rows)), value(key.size()),
            turns(static_cast<std::size_t>(head_dim));
        for (int t = 0; t < n_tokens_; ++t) {
            const Row& row = batch.rows[static_cast<std::size_t>(t)];
            rmsnorm(h.data(), x.row(t), layer.attention_norm, config_.dim, config_.norm_eps);
            linear(query.row(t), layer.query, h.data());
            linear(key.data(), layer.key, h.data());
            linear(value.data(), layer.value, h.data());
            rope_turns(turns.data(), frequencies_, row.position);
            for (int head = 0; head < config_.n_heads; ++head) rope(query.row(t) + head * head_dim, turns.data(), head_dim);
            for (int head = 0; head < config_.n_kv_heads; ++head) {
                rope(key.data() + head * head_dim, turns.data(), head_dim);
                static_cast<ReferenceCache*>(row.cache)->store(layer.index, row.position, head, key.data() + head * head_dim,
                                                               value.data() + head * head_dim);
            }
        }
    }

    void attend(Tensor mixed, Tensor query, const Layer& layer, const Batch& batch) override {
        if (stopped()) return;
        const int shared = config_.n_heads / config_.n_kv_heads;  // query heads h of one group read key/value head h / shared
        for (int t = 0; t < n_tokens_; ++t)
            for (int head = 0; head < config_.n_heads; ++head) {
                const Row& row = batch.rows[static_cast<std::size_t>(t)];
                attend_reference(mixed.row(t) + head * config_.head_dim, query.row(t) + head * config_.head_dim,
                                 *static_cast<ReferenceCache*>(row.cache), layer.index, head / shared, row.position + 1,
                                 config_.head_dim);
            }
    }

    void project_out(Tensor x, Tensor mixed, const Layer& layer) override { add_linear(x, layer.attention_out, mixed); }

    void gate_up(Tensor hidden, Tensor x, const Layer& layer) override {
        if (stopped()) return;
        std::vector<float> h(x.stride), up(static_cast<std::size_t>(config_.ffn_dim));
        for (int t = 0; t < n_tokens_; ++t) {
            rmsnorm(h.data(), x.row(t), layer.ffn_norm, config_.dim, config_.norm_eps);
            linear(hidden.row(t), layer.gate, h.data());
            linear(up.data(), layer.up, h.data());
            for (int i = 0; i < config_.ffn_dim; ++i)
                hidden.row(t)[i] = silu(hidden.row(t)[i]) * up[static_cast<std::size_t>(i)];
        }
    }

    void down(Tensor x, Tensor hidden, const Layer& layer) override { add_linear(x, layer.down, hidden); }

    void logits(Tensor logits, Tensor x, const Weights& weights, const Batch& batch) override {
        if (stopped()) return;
        std::vector<float> h(x.stride);
        int row = 0;
        for (int t = 0; t < n_tokens_; ++t) {
            if (!batch.rows[static_cast<std::size_t>(t)].wants_logits) continue;
            rmsnorm(h.data(), x.row(t), weights.final_norm, config_.dim, config_.norm_eps);
            linear(logits.row(row++), weights.output, h.data());
        }
    }

private:
    bool stopped() const { return cancel_ && cancel_->load(); }
    void add_linear(Tensor x, const Matrix& w, Tensor input) {
        if (stopped()) return;
        std::vector<float> y(static_cast<std::size_t>(w.rows));
        for (int t = 0; t < n_tokens_; ++t) {
            linear(y.data(), w, input.row(t));
            for (int d = 0; d < w.rows; ++d) x.row(t)[d] = x.row(t)[d] + y[static_cast<std::size_t>(d)];
        }
    }

    Model model_;
    Config config_;
    Options options_;
    int rows_, n_tokens_ = 0;
    const std::atomic<bool>* cancel_ = nullptr;
    std::vector<float> frequencies_;
    OwnedTensor x_, query_, mixed_, hidden_, logits_;
};

class ReferenceDevice final : public Device {
public:
    std::unique_ptr<Backend> open(const Model& model, const Options& options) override {
        if (options.ranks != 1)
            fail(Code::argument, "Options::ranks", "the plain loops do not split a model", options.ranks, 1,
                 "Use cpu() or cuda()");
        return std::make_unique<ReferenceBackend>(model, options);
    }
    std::uint64_t cache_bytes(const Config& c, const Options& options) const override {
        return static_cast<std::uint64_t>(std::int64_t{8} * c.n_layers * options.context * c.n_kv_heads * c.head_dim);
    }
    std::uint64_t activations_bytes(const Config& c, const Options& options) const override {
        const int floats = c.dim + 2 * c.n_heads * c.head_dim + c.ffn_dim + c.vocab_size;  // of a row
        return 4ull * static_cast<std::uint64_t>(std::min(options.chunk, 64)) * static_cast<std::uint64_t>(floats);
    }
};

}  // namespace detail

std::shared_ptr<Device> reference() { return std::make_shared<detail::ReferenceDevice>(); }

}  // namespace llama3
// ═══ §6  Tokenizer ═════════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// Text becomes ids in three steps. Repair: what is not UTF-8 becomes U+FFFD. Split: the text is cut into pieces (a word with
// the space before it, up to three digits, punctuation, whitespace). Merge: a piece starts as single bytes; the two neighbours
// whose union is the token of lowest rank are joined, again and again, until no two make a token. A token's rank is its id.
// Repair and split are linear in the length of the text, merge is n log n: a megabyte of one letter is one piece.
// To change the split, change piece_end(); the classes of characters are in §15.

namespace llama3 {
namespace detail {

// ── Characters ──

enum class CharClass : std::uint8_t { other, letter, number, space, none };  // \p{L}, \p{N}, \s; none: the text ends here

CharClass unicode_class(char32_t code) {
    const auto runs = unicode_classes();  // §15: (first code point << 2) | class
    return static_cast<CharClass>(*(std::upper_bound(runs.begin(), runs.end(), code << 2 | 3) - 1) & 3);
}

// The first character of a text. Where that is not UTF-8, `length` is that of the longest part that could begin a character, at
// least 1: the part that one U+FFFD replaces, in Python's errors="replace" as in the Unicode standard (3.9, table 3-11).
struct Character {
    char32_t code;
    unsigned length;
    bool valid;
    bool cut;  // the text ends inside it: more bytes could make it valid
};

Character read_character(std::string_view text) {
    const auto byte = [&](unsigned i) { return static_cast<unsigned char>(text[i]); };
    const unsigned first = byte(0);
    if (first < 0x80) return {first, 1, true, false};
    const unsigned length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    if (first < 0xC2 || first > 0xF4) return {0xFFFD, 1, false, false};
    // The second byte is narrower where the code would have a shorter form, be a surrogate, or lie above U+10FFFF.
    unsigned low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    unsigned high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    char32_t code = first & (0x7Fu >> length);
    for (unsigned i = 1; i < length; ++i) {
        if (i == text.size()) return {0xFFFD, i, false, true};
        if (byte(i) < low || byte(i) > high) return {0xFFFD, i, false, false};
        code = code << 6 | (byte(i) & 0x3Fu);
        low = 0x80, high = 0xBF;
    }
    return {code, length, true, false};
}

constexpr std::string_view replacement = "\xEF\xBF\xBD";  // U+FFFD

// Appends the text with its invalid parts replaced, up to a character that the end of the text cuts. Returns the bytes used.
std::size_t append_repaired(std::string& out, std::string_view text) {
    std::size_t i = 0;
    while (i < text.size()) {
        const Character c = read_character(text.substr(i));
        if (c.cut) break;
        out += c.valid ? text.substr(i, c.length) : replacement;
        i += c.length;
    }
    return i;
}

bool is_utf8(std::string_view text) {
    for (std::size_t i = 0; i < text.size();) {
        while (i < text.size() && static_cast<unsigned char>(text[i]) < 0x80) ++i;  // most text, most of the time
        if (i == text.size()) break;
        const Character c = read_character(text.substr(i));
        if (!c.valid) return false;
        i += c.length;
    }
    return true;
}

// ── Split ──
//
// The published expression, whose alternatives are tried in this order at every position:
//
//     (?i:'s|'t|'re|'ve|'m|'ll|'d)       1  contractions
//     [^\r\n\p{L}\p{N}]?\p{L}+           2  letters, with one other character before them
//     \p{N}{1,3}                         3  up to three digits
//     [ ]?[^\s\p{L}\p{N}]+[\r\n]*        4  (a space and) anything else, with the line ends after it
//     \s*[\r\n]+                         5  whitespace up to the last line end of its run
//     \s+(?!\S)                          6  whitespace, all but the last of its run unless the text ends with it
//     \s+                                7  what remains: one whitespace character

// Class and length of the character at i, in valid UTF-8.
inline CharClass class_at(std::string_view text, std::size_t i, std::size_t& length) {
    length = 1;
    if (i >= text.size()) return CharClass::none;
    const auto first = static_cast<unsigned char>(text[i]);
    if ((first | 0x20u) - 'a' < 26u) return CharClass::letter;
    if (first - unsigned{'0'} < 10u) return CharClass::number;
    if (first == ' ' || first - unsigned{'\t'} < 5u) return CharClass::space;
    if (first < 0x80) return CharClass::other;
    const Character c = read_character(text.substr(i));
    length = c.length;
    return unicode_class(c.code);
}

// The end of the run of characters of one class that starts at i.
inline std::size_t skip(std::string_view text, std::size_t i, CharClass kind) {
    std::size_t length = 0;
    while (class_at(text, i, length) == kind) i += length;
    return i;
}

// The end of the contraction that follows the apostrophe at i - 1, or 0. U+017F, the long s, is an s that ignores case.
std::size_t contraction_end(std::string_view text, std::size_t i) {
    const auto lower = [&](std::size_t at) { return at < text.size() ? text[at] | 0x20 : 0; };
    const int a = lower(i), b = lower(i + 1);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 1;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return i + 2;
    return text.substr(i, 2) == "\xC5\xBF" ? i + 2 : 0;
}

// The end of the piece that starts at `begin`, in valid UTF-8.
std::size_t piece_end(std::string_view text, std::size_t begin) {
    const auto is_newline = [&](std::size_t i) { return i < text.size() && (text[i] == '\n' || text[i] == '\r'); };
    std::size_t length = 0, next_length = 0;
    const CharClass kind = class_at(text, begin, length);
    if (kind == CharClass::letter) return skip(text, begin + length, CharClass::letter);
    if (kind == CharClass::number) {
        std::size_t end = begin + length;
        for (int digits = 1; digits < 3 && class_at(text, end, length) == CharClass::number; ++digits) end += length;
        return end;
    }
    const std::size_t second = begin + length;
    const CharClass next = class_at(text, second, next_length);
    if (text[begin] == '\'') {
        if (const std::size_t end = contraction_end(text, second)) return end;
    }
    if (next == CharClass::letter && !is_newline(begin)) return skip(text, second + next_length, CharClass::letter);
    if (kind == CharClass::other || (text[begin] == ' ' && next == CharClass::other)) {
        std::size_t end = skip(text, second, CharClass::other);
        while (is_newline(end)) ++end;
        return end;
    }
    std::size_t end = begin, last = begin, line_end = 0;  // of the whitespace run, of its last character, of its last line end
    while (class_at(text, end, length) == CharClass::space) {
        if (is_newline(end)) line_end = end + 1;
        last = end;
        end += length;
    }
    if (line_end) return line_end;
    return end == text.size() || last == begin ? end : last;
}

// ── Merge ──

constexpr std::uint32_t no_rank = 0xFFFFFFFFu;

std::uint64_t hash_bytes(std::string_view text) {
    constexpr std::uint64_t odd = 0x9E3779B97F4A7C15u;
    const std::size_t n = text.size();
    const auto load = [&](std::size_t i, std::size_t bytes) {
        std::uint64_t value = 0;
        std::memcpy(&value, text.data() + i, bytes);
        return value;
    };
    std::uint64_t hash = n * odd, tail = 0;
    for (std::size_t i = 0; i + 8 < n; i += 8) hash = (hash ^ load(i, 8)) * odd, hash ^= hash >> 29;
    if (n >= 8) tail = load(n - 8, 8);  // overlaps what the loop has seen: no bytewise rest
    else if (n >= 4) tail = load(0, 4) << 32 | load(n - 4, 4);
    else if (n > 0) tail = load(0, 1) << 16 | load(n / 2, 1) << 8 | load(n - 1, 1);
    hash = (hash ^ tail) * odd;
    hash = (hash ^ hash >> 32) * odd;
    return hash ^ hash >> 29;
}

}  // namespace detail

struct Tokenizer::Impl {
    struct Slot {
        std::uint32_t rank = detail::no_rank;
        std::uint32_t tag = 0;  // other bits of the hash than those that chose the slot
    };
    std::span<const std::uint32_t> starts;  // [N+1] where each token's bytes start
    std::string_view rank_bytes;
    std::span<const std::uint32_t> special_ids;   // [M] ascending
    std::vector<std::string_view> special_names;  // [M] in the order of special_ids
    std::vector<std::uint32_t> by_name;           // [M] indexes into both, in order of the names
    std::array<bool, 256> begins_special{};       // by the first byte of a name
    std::array<std::uint32_t, 256> byte_rank{};
    std::vector<Slot> slots;  // a power of two of them, at most half full; linear probing
    std::size_t longest = 0;  // bytes of the longest token
    int vocab_size = 0;
    int begin_token = 0;
    std::vector<int> end_tokens;
    std::shared_ptr<const void> owner;  // of the memory behind the views

    int rank_count() const { return static_cast<int>(starts.size()) - 1; }
    std::string_view token(std::size_t rank) const {  // a file that is written while it is mapped may have any starts by now
        const std::size_t begin = std::min<std::size_t>(starts[rank], rank_bytes.size());
        return rank_bytes.substr(begin, starts[rank + 1] - begin);
    }

    std::uint32_t rank(std::string_view piece) const {
        if (piece.size() > longest) return detail::no_rank;
        const std::uint64_t hash = detail::hash_bytes(piece);
        const auto tag = static_cast<std::uint32_t>(hash >> 32);
        for (std::size_t i = hash & (slots.size() - 1);; i = (i + 1) & (slots.size() - 1)) {
            const Slot slot = slots[i];
            if (slot.rank == detail::no_rank || (slot.tag == tag && token(slot.rank) == piece)) return slot.rank;
        }
    }

    // -1 for an ordinary token and for the ids that nothing uses
    int special_index(int id) const {
        const auto wanted = static_cast<std::uint32_t>(id);
        const auto found = std::lower_bound(special_ids.begin(), special_ids.end(), wanted);
        return found != special_ids.end() && *found == wanted ? static_cast<int>(found - special_ids.begin()) : -1;
    }

    // The special token whose name the text starts with, the longest of several; its index, or -1.
    int special_at(std::string_view text) const {
        auto low = by_name.begin(), high = by_name.end();  // the names that begin like the text
        int found = -1;
        for (std::size_t i = 0; i < text.size() && low != high; ++i) {
            if (special_names[*low].size() == i) ++low;  // a name that ends here sorts first, and was noted
            const auto c = static_cast<unsigned char>(text[i]);
            const auto letter = [&](std::uint32_t name) { return static_cast<unsigned char>(special_names[name][i]); };
            low = std::partition_point(low, high, [&](std::uint32_t name) { return letter(name) < c; });
            high = std::partition_point(low, high, [&](std::uint32_t name) { return letter(name) == c; });
            if (low != high && special_names[*low].size() == i + 1) found = static_cast<int>(*low);
        }
        return found;
    }

    void check(const char* where, int id) const {
        if (id < 0 || id >= vocab_size)
            detail::fail(Code::argument, where, "a token id is out of range", id, detail::to_text({"0 to ", vocab_size - 1}),
                         "Use ids of this model's vocabulary");
    }

    std::string_view bytes(int id) const {
        if (id < rank_count()) return token(static_cast<std::size_t>(id));
        const int special = special_index(id);
        return special < 0 ? std::string_view() : special_names[static_cast<std::size_t>(special)];
    }

    // Joins neighbours until no two make a token, the lowest rank first, the leftmost of equals, with a heap of all pairs.
    struct Part {
        std::uint32_t previous, next;  // a part is named by where it begins
        std::uint32_t token;
        std::uint32_t pair;  // rank of this part and the next as one
    };
    struct Scratch {  // kept from piece to piece, to save allocations
        std::vector<Part> parts;
        std::vector<std::uint64_t> heap;  // rank << 32 | part; an entry may outlive its pair
    };
    void merge(std::string_view piece, Scratch& scratch, std::vector<int>& ids) const {
        const auto n = static_cast<std::uint32_t>(piece.size());
        std::vector<Part>& parts = scratch.parts;
        std::vector<std::uint64_t>& heap = scratch.heap;
        heap.clear();
        parts.resize(n);
        const auto add_pair = [&](std::uint32_t i) {
            const std::uint32_t next = parts[i].next;
            parts[i].pair = next == n ? detail::no_rank : rank(piece.substr(i, parts[next].next - i));
            if (parts[i].pair != detail::no_rank) heap.push_back(static_cast<std::uint64_t>(parts[i].pair) << 32 | i);
            return parts[i].pair != detail::no_rank;
        };
        const auto later = std::greater<std::uint64_t>();
        for (std::uint32_t i = 0; i < n; ++i) parts[i] = {i - 1, i + 1, byte_rank[static_cast<unsigned char>(piece[i])], 0};
        for (std::uint32_t i = 0; i < n; ++i) add_pair(i);
        std::make_heap(heap.begin(), heap.end(), later);
        while (!heap.empty()) {
            std::pop_heap(heap.begin(), heap.end(), later);
            const auto i = static_cast<std::uint32_t>(heap.back());
            const auto pair = static_cast<std::uint32_t>(heap.back() >> 32);
            heap.pop_back();
            if (parts[i].pair != pair) continue;  // one of the two has joined another part since
            Part& gone = parts[parts[i].next];
            parts[i].token = pair;
            parts[i].next = gone.next;
            if (gone.next < n) parts[gone.next].previous = i;
            gone.pair = detail::no_rank;
            if (add_pair(i)) std::push_heap(heap.begin(), heap.end(), later);
            if (i > 0 && add_pair(parts[i].previous)) std::push_heap(heap.begin(), heap.end(), later);
        }
        for (std::uint32_t i = 0; i < n; i = parts[i].next) ids.push_back(static_cast<int>(parts[i].token));
    }

    void encode_ordinary(std::string_view text, std::vector<int>& ids) const {
        Scratch scratch;
        for (std::size_t begin = 0; begin < text.size();) {
            const std::size_t end = detail::piece_end(text, begin);
            const std::string_view piece = text.substr(begin, end - begin);
            const std::uint32_t whole = rank(piece);  // not only for speed: 588 tokens cannot be reached by merging
            if (whole != detail::no_rank) ids.push_back(static_cast<int>(whole));
            else merge(piece, scratch, ids);
            begin = end;
        }
    }
};

namespace detail {

// Views of a file's tokenizer section (convert/FORMAT.md, section 3), whose memory `owner` keeps alive. §14 has checked the
// numbers (starts and ids ascend, all within their bounds); here the tokens themselves are checked. `where` names the file.
std::shared_ptr<const Tokenizer::Impl> make_tokenizer(std::span<const std::uint32_t> rank_starts, std::string_view rank_bytes,
                                                      std::span<const std::uint32_t> special_ids,
                                                      std::span<const std::uint32_t> name_starts, std::string_view name_bytes,
                                                      int vocab_size, int begin_token, std::vector<int> end_tokens,
                                                      std::shared_ptr<const void> owner, const std::string& where) {
    const auto refuse = [&](const char* what, const Part& found, const Part& expected) {
        fail(Code::format, where, what, found, expected, "Convert the model again");
    };
    const std::size_t n = rank_starts.size() - 1, m = special_ids.size();
    auto impl = std::make_shared<Tokenizer::Impl>();
    impl->starts = rank_starts;
    impl->rank_bytes = rank_bytes;
    impl->special_ids = special_ids;
    impl->vocab_size = vocab_size;
    impl->begin_token = begin_token;
    impl->end_tokens = std::move(end_tokens);
    impl->owner = std::move(owner);

    const std::size_t mask = std::bit_ceil(2 * n + 2) - 1;
    impl->slots.resize(mask + 1);
    for (std::size_t rank = 0; rank < n; ++rank) {
        const std::string_view token = impl->token(rank);
        impl->longest = std::max(impl->longest, token.size());
        const std::uint64_t hash = hash_bytes(token);
        std::size_t slot = hash & mask;
        for (int probes = 0; impl->slots[slot].rank != no_rank; slot = (slot + 1) & mask) {
            const Tokenizer::Impl::Slot other = impl->slots[slot];
            if (other.tag == static_cast<std::uint32_t>(hash >> 32) && impl->token(other.rank) == token)
                refuse("two tokens are equal", to_text({other.rank, " and ", rank}), "different bytes");
            if (++probes == 1000)  // half full, chance gives a run of some dozens
                refuse("the tokens were chosen to collide", "1000 probes", "some dozens");
        }
        impl->slots[slot] = {static_cast<std::uint32_t>(rank), static_cast<std::uint32_t>(hash >> 32)};
    }
    for (unsigned byte = 0; byte < 256; ++byte) {
        const char text = static_cast<char>(byte);
        impl->byte_rank[byte] = impl->rank({&text, 1});
        if (impl->byte_rank[byte] == no_rank) refuse("a single byte has no token", byte, "all 256");
    }

    for (std::size_t i = 0; i < m; ++i) {
        impl->special_names.push_back(name_bytes.substr(name_starts[i], name_starts[i + 1] - name_starts[i]));
        impl->by_name.push_back(static_cast<std::uint32_t>(i));
        impl->begins_special[static_cast<unsigned char>(impl->special_names[i][0])] = true;
    }
    const auto& names = impl->special_names;
    auto& sorted = impl->by_name;
    std::sort(sorted.begin(), sorted.end(), [&](std::uint32_t a, std::uint32_t b) { return names[a] < names[b]; });
    for (std::size_t i = 1; i < m; ++i)
        if (names[sorted[i]] == names[sorted[i - 1]])
            refuse("two special tokens have one name", names[sorted[i]], "different names");

    return impl;
}

}  // namespace detail

// ── The public classes ──

std::vector<int> Tokenizer::encode(std::string_view text, Special special) const {
    std::string repaired;
    if (!detail::is_utf8(text)) {
        if (detail::append_repaired(repaired, text) < text.size()) repaired += detail::replacement;
        text = repaired;
    }
    if (text.size() > 0x7FFFFFFFu)
        detail::fail(Code::argument, "Tokenizer::encode", "the text is too long", detail::to_text({text.size(), " bytes"}),
                     "less than 2 GiB", "Encode it in parts");
    std::vector<int> ids;
    ids.reserve(text.size() / 4 + 8);
    std::size_t begin = 0;  // of the ordinary text before the next special token, which is encoded on its own
    for (std::size_t i = 0; special == Special::parse && i < text.size(); ++i) {
        const int found = impl_->begins_special[static_cast<unsigned char>(text[i])] ? impl_->special_at(text.substr(i)) : -1;
        if (found < 0) continue;
        impl_->encode_ordinary(text.substr(begin, i - begin), ids);
        ids.push_back(static_cast<int>(impl_->special_ids[static_cast<std::size_t>(found)]));
        begin = i + impl_->special_names[static_cast<std::size_t>(found)].size();
        i = begin - 1;
    }
    impl_->encode_ordinary(text.substr(begin), ids);
    return ids;
}

std::string Tokenizer::decode(std::span<const int> ids) const {
    std::string text;
    for (const int id : ids) {
        impl_->check("Tokenizer::decode", id);
        text += impl_->bytes(id);
    }
    return text;
}

std::string_view Tokenizer::bytes(int id) const {
    impl_->check("Tokenizer::bytes", id);
    return impl_->bytes(id);
}

bool Tokenizer::is_special(int id) const {
    impl_->check("Tokenizer::is_special", id);
    return impl_->special_index(id) >= 0;
}

int Tokenizer::special(std::string_view name) const {
    const int index = impl_->special_at(name);
    if (index < 0 || impl_->special_names[static_cast<std::size_t>(index)].size() != name.size()) return -1;
    return static_cast<int>(impl_->special_ids[static_cast<std::size_t>(index)]);
}

bool Tokenizer::is_end(int id) const {
    impl_->check("Tokenizer::is_end", id);
    return std::ranges::find(impl_->end_tokens, id) != impl_->end_tokens.end();
}

int Tokenizer::begin_token() const { return impl_->begin_token; }
std::span<const int> Tokenizer::end_tokens() const { return impl_->end_tokens; }
int Tokenizer::rank_count() const { return impl_->rank_count(); }
int Tokenizer::vocab_size() const { return impl_->vocab_size; }

std::string TextStream::push(int id) {
    if (tokenizer_.is_special(id)) return finish();  // a special token ends the text before it
    pending_ += tokenizer_.bytes(id);
    std::string text;
    pending_.erase(0, detail::append_repaired(text, pending_));
    return text;
}

std::string TextStream::finish() {
    const std::string text(pending_.empty() ? "" : detail::replacement);
    pending_.clear();
    return text;
}

}  // namespace llama3

// ═══ §7  Sampling, chat and generation ═════════════════════════════════════════════════════════════════════════════════════════
//
// A Session turns ids into logits, a Sampler logits into an id, generate() does both in turn, and a Chat wraps messages in the
// special tokens that a model was trained with. A seed gives the same text everywhere: generator and arithmetic are our own.
// A new chat format goes into detail::render_chat; a new filter of the sampler into detail::draw_token, into its twin in
// kernels.cuh (K9), and into LeadBackend::draw, which passes on as many candidates as the filters can need.

namespace llama3 {

// ── Session ──

struct Session::Impl {
    Model model;
    Options options;                 // as given, but with the context in numbers
    std::shared_ptr<Device> device;  // the backend, and what it made, end before it
    std::unique_ptr<Backend> backend{};
    std::unique_ptr<KVCache> cache{};
    std::vector<int> tokens{};     // those in the cache; has room for all, so that adding them cannot fail
    std::vector<float> logits{};   // [V] of the last token, or empty; has room too
    int backend_row = -1;          // the back end has them as its logits(backend_row), perhaps it alone; -1: no longer
    bool drawn_on_device = false;  // the last token that was drawn
    bool busy = false;             // a feed() is running
    std::atomic<bool> cancel{false};
};

namespace detail {

void check_range(const char* name, const Part& value, bool good, std::string_view expected) {
    if (!good) fail(Code::argument, name, "the value is out of range", value, expected, "Choose another value");
}

std::unique_ptr<Backend> open_backend(Device& device, const Model& model, const Options& options);  // §13

Options checked_options(const Config& config, Options options) {
    const int most = config.context_length;
    check_range("Options::context", options.context, options.context >= 0 && options.context <= most,
                "1 to " + std::to_string(most) + ", the model's, or 0 for that or 8192");
    if (options.kv != Format::f32 && options.kv != Format::bf16 && options.kv != Format::q8)
        fail(Code::argument, "Options::kv", "the cache cannot have this format", format_name(options.kv), "f32, bf16 or q8",
             "Choose one of these");
    check_range("Options::threads", options.threads, options.threads >= 0 && options.threads <= 4096, "0 to 4096");
    check_range("Options::ranks", options.ranks, options.ranks >= 1, "1 or more");
    if (options.ranks == 1 && !options.communicator && options.device) options.ranks = options.device->ranks();
    if (options.communicator) {
        const int ranks = options.communicator->ranks();
        check_range("Options::ranks", options.ranks, options.ranks == 1 || options.ranks == ranks,
                    "1 or " + std::to_string(ranks) + ", those of Options::communicator");
        options.ranks = ranks;
    }
    check_range("Options::chunk", options.chunk, options.chunk >= 1 && options.chunk <= 65536, "1 to 65536");
    if (options.context == 0) options.context = std::min<int>(most, 8192);
    return options;
}

Session::Impl& alive(const std::unique_ptr<Session::Impl>& impl, const char* where) {
    if (!impl)
        fail(Code::argument, where, "the session was moved from", "an empty one", "a session", "Use the one it was moved to");
    return *impl;
}

// Holds a flag up while it lives: a call inside a callback of the same object, or a session that is listed twice, is an error.
struct Lower {
    void operator()(bool* busy) const { *busy = false; }
};
using InUse = std::unique_ptr<bool, Lower>;
InUse use(bool& busy, const char* where) {
    if (busy)
        fail(Code::argument, where, "it is in use", "a call inside its own callback, or a session twice in a list",
             "one use at a time", "Wait until the first has returned");
    busy = true;
    return InUse(&busy);
}

void check_tokens(const Session::Impl& session, std::span<const int> tokens, const char* where) {
    const int vocabulary = session.model.config().vocab_size;
    for (const int id : tokens)
        if (id < 0 || id >= vocabulary)
            fail(Code::argument, where, "a token id is out of range", id, to_text({"0 to ", vocabulary - 1}),
                 "Encode the text with this model's tokenizer");
    const std::size_t room = static_cast<std::size_t>(session.options.context) - session.tokens.size();
    if (tokens.size() > room)
        fail(Code::context, where, to_text({"the tokens do not fit into the context of ", session.options.context}),
             to_text({tokens.size(), " after ", session.tokens.size()}), to_text({"at most ", room}),
             "Feed fewer, rewind(), or set a larger Options::context");
}

[[noreturn]] void fail_cancelled(Session::Impl& session, const char* where) {
    session.cancel = false;
    fail(Code::cancelled, where, "the call was cancelled", "a cancel()", "none",
         to_text({"Call it again to go on from the ", session.tokens.size(), " tokens that the session holds"}));
}

// Cannot fail, so that a session changes as a whole or not at all. `tokens` may be part of session.tokens, which stays put.
void commit(Session::Impl& session, std::span<const int> tokens, std::span<const float> logits) {
    session.tokens.resize(session.tokens.size() + tokens.size());
    std::copy(tokens.begin(), tokens.end(), session.tokens.end() - static_cast<std::ptrdiff_t>(tokens.size()));
    session.logits.assign(logits.begin(), logits.end());
    session.backend_row = -1;
}

// Copies the logits that the back end alone has.
void bring_logits(Session::Impl& session) {
    if (session.backend_row < 0 || !session.logits.empty()) return;
    const std::span<const float> logits = session.backend->logits(session.backend_row);
    session.logits.assign(logits.begin(), logits.end());
}

// False where a cancel() stopped it, which takes the cancel back. `lazy`: the logits stay on the device, for a token that is drawn
// there; that one step is not cancelled once it has begun, since the logits before it are lost.
bool feed(Session::Impl& session, std::span<const int> tokens,
          const std::function<void(int, std::span<const float>)>* each = nullptr, bool lazy = false) {
    const char* where = "Session::feed";
    const InUse in_use = use(session.busy, where);
    check_tokens(session, tokens, where);
    if (!lazy) bring_logits(session);
    if (tokens.empty() && session.logits.empty())
        fail(Code::argument, where, "there are no logits to go on from", "0 tokens", "at least 1",
             "Feed the begin token at least");
    if (session.cancel.exchange(false)) return false;
    if (tokens.empty()) return true;
    if (lazy) session.logits.clear();
    session.backend_row = -1;  // the back end's rows are another call's from here on, whether or not this one succeeds

    const int position = static_cast<int>(session.tokens.size()), count = static_cast<int>(tokens.size());
    int chunk = std::min({count, session.options.chunk, session.backend->max_rows()});
    if (each) chunk = std::min(chunk, (1 << 24) / session.model.config().vocab_size);  // 64 MB of logits
    std::vector<Row> rows;
    rows.reserve(static_cast<std::size_t>(chunk));
    for (int first = 0; first < count; first += chunk) {
        rows.clear();
        for (int i = first; i < count && i < first + chunk; ++i)
            rows.push_back({tokens[static_cast<std::size_t>(i)], position + i, session.cache.get(), each || i + 1 == count});
        if (!session.backend->step({rows}, lazy ? nullptr : &session.cancel)) return session.cancel = false;
        for (int i = 0; each && i < static_cast<int>(rows.size()); ++i) (*each)(first + i, session.backend->logits(i));
    }
    const int row = each ? static_cast<int>(rows.size()) - 1 : 0;
    commit(session, tokens, lazy ? std::span<const float>() : session.backend->logits(row));
    session.backend_row = row;
    return true;
}

}  // namespace detail

Session::Session(Model model, const Options& options)
    : impl_(new Impl{std::move(model), options, options.device ? options.device : cpu()}) {
    Impl& session = *impl_;
    session.options = detail::checked_options(session.model.config(), options);
    session.backend = detail::open_backend(*session.device, session.model, session.options);
    session.cache = session.backend->make_cache();
    session.tokens.reserve(static_cast<std::size_t>(session.options.context));
    session.logits.reserve(static_cast<std::size_t>(session.model.config().vocab_size));
}

Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

std::span<const float> Session::feed(std::span<const int> tokens) {
    if (!detail::feed(detail::alive(impl_, "Session::feed"), tokens)) detail::fail_cancelled(*impl_, "Session::feed");
    return impl_->logits;
}

void Session::feed(std::span<const int> tokens, const std::function<void(int, std::span<const float>)>& each) {
    if (!detail::feed(detail::alive(impl_, "Session::feed"), tokens, each ? &each : nullptr))
        detail::fail_cancelled(*impl_, "Session::feed");
}

void Session::feed_together(std::span<Session* const> sessions, std::span<const int> tokens) {
    const char* where = "Session::feed_together";
    const auto refuse = [&](const char* what, const detail::Part& found, const detail::Part& expected) {
        detail::fail(Code::argument, where, what, found, expected,
                     "Pass one token for each of several sessions with the same Options");
    };
    if (sessions.size() != tokens.size())
        refuse("every session needs one token", detail::to_text({tokens.size(), " tokens"}),
               detail::to_text({sessions.size(), ", as there are sessions"}));
    std::vector<detail::InUse> in_use;
    std::vector<Impl*> impls;
    for (std::size_t i = 0; i < sessions.size(); ++i) {
        if (!sessions[i]) refuse("a session is missing", "a null pointer at " + std::to_string(i), "a session");
        Impl& session = detail::alive(sessions[i]->impl_, where);
        in_use.push_back(detail::use(session.busy, where));
        detail::check_tokens(session, tokens.subspan(i, 1), where);
        impls.push_back(&session);
        const Options &a = session.options, &b = impls[0]->options;
        const bool same_model = &session.model.impl() == &impls[0]->model.impl();
        const bool same_team = a.device == b.device && a.threads == b.threads && a.ranks == b.ranks && a.isa == b.isa &&
                               a.communicator == b.communicator;
        if (!same_model || !same_team || a.kv != b.kv)
            refuse("sessions differ", "another model, device, kv, threads, ranks or isa at " + std::to_string(i),
                   "those of the first");
    }
    for (Impl* session : impls)
        if (session->cancel) detail::fail_cancelled(*session, where);
    for (Impl* session : impls) detail::bring_logits(*session), session->backend_row = -1;

    std::vector<std::vector<float>> logits(impls.size());  // all are kept until all are there
    std::vector<Row> rows;
    for (std::size_t i = 0; i < impls.size(); ++i) {
        rows.push_back({tokens[i], static_cast<int>(impls[i]->tokens.size()), impls[i]->cache.get(), true});
        Backend& backend = *impls[0]->backend;
        if (i + 1 < impls.size() && static_cast<int>(rows.size()) < backend.max_rows()) continue;
        backend.step({rows}, nullptr);
        for (std::size_t row = 0; row < rows.size(); ++row) {
            const std::span<const float> result = backend.logits(static_cast<int>(row));
            logits[i + 1 - rows.size() + row].assign(result.begin(), result.end());
        }
        rows.clear();
    }
    for (std::size_t i = 0; i < impls.size(); ++i) detail::commit(*impls[i], tokens.subspan(i, 1), logits[i]);
}

std::span<const float> Session::logits() const {
    detail::bring_logits(detail::alive(impl_, "Session::logits"));
    return impl_->logits;
}
std::span<const int> Session::tokens() const { return detail::alive(impl_, "Session::tokens").tokens; }
StageTimes Session::stage_times() const { return detail::alive(impl_, "Session::stage_times").backend->stage_times(); }
int Session::position() const { return static_cast<int>(detail::alive(impl_, "Session::position").tokens.size()); }
int Session::context() const { return detail::alive(impl_, "Session::context").options.context; }
const Model& Session::model() const { return detail::alive(impl_, "Session::model").model; }

void Session::rewind(int position) {
    Impl& session = detail::alive(impl_, "Session::rewind");
    const detail::InUse in_use = detail::use(session.busy, "Session::rewind");
    const int most = this->position();
    detail::check_range("Session::rewind", position, position >= 0 && position <= most, "0 to " + std::to_string(most));
    session.tokens.resize(static_cast<std::size_t>(position));
    session.logits.clear(), session.backend_row = -1;
}

// Only a store to an atomic: a signal handler may call it.
void Session::cancel() noexcept {
    if (impl_) impl_->cancel = true;
}
bool Session::cancelled() const noexcept { return impl_ && impl_->cancel; }
void Session::reset_cancel() noexcept {
    if (impl_) impl_->cancel = false;
}

// ── Sampling ──

namespace detail {

// NaN is no logit. The largest may be infinite: +inf beats all others, and -inf means that they are all equally unlikely.
float largest(std::span<const float> logits, const char* where) {
    float best = -std::numeric_limits<float>::infinity();
    for (const float logit : logits) best = logit > best ? logit : best;
    if (std::ranges::find(logits, best) == logits.end())
        fail(Code::argument, where, "there is no logit that is a number", to_text({logits.size(), " others"}), "some",
             "Check the model: its weights may be damaged");
    return best;
}

// e^((logit - best) / temperature): the probability relative to that of the best. In double, where products and sums are
// exact enough without fma, which a processor may have to imitate: exp() would take ten times as long then.
float relative_probability(float logit, float best, float temperature) {
    if (logit == best) return 1;
    const double x = static_cast<double>((logit - best) / temperature);
    if (!(x > -87.0)) return 0;                                              // NaN as well
    const auto n = static_cast<std::int64_t>(x * 1.4426950408889634 - 0.5);  // x = n ln 2 + r, then Taylor's series to r^7
    const double r = x - static_cast<double>(n) * 0.6931471805599453;
    double series = 1.0 / 5040;
    for (const double term : {1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0}) series = series * r + term;
    return static_cast<float>(series * std::bit_cast<double>((1023 + n) << 52));
}

using Candidate = std::pair<float, int>;  // relative probability, id

bool more_likely(const Candidate& a, const Candidate& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
}

// Keeps the candidates before which, in order of probability, at most `limit` of the measure has been passed: with measure 1
// and limit k - 1 the best k, with the probability as measure the nucleus. Most of the order is found by counting: candidates
// are thrown into bins by their leading bits, 16 to the octave, and only the bin where the limit is passed is sorted.
void keep_best(std::vector<Candidate>& candidates, double limit, bool counts) {
    const auto measure = [&](float probability) { return counts ? 1.0 : static_cast<double>(probability); };
    const auto bin_of = [](const Candidate& c) { return std::bit_cast<std::uint32_t>(c.first) >> 19; };  // 1.0 is in bin 2032
    std::array<double, 2048> bins{};
    for (const Candidate& c : candidates) bins[bin_of(c)] += measure(c.first);
    double passed = 0;
    std::size_t bin = bins.size() - 1;
    for (; bin > 0 && passed + bins[bin] <= limit; --bin) passed += bins[bin];
    std::vector<Candidate> border;
    for (const Candidate& c : candidates)
        if (bin_of(c) == bin) border.push_back(c);
    if (border.empty()) return;  // all are kept
    std::sort(border.begin(), border.end(), more_likely);
    Candidate last = border[0];
    for (const Candidate& c : border) {
        if (passed > limit) break;
        last = c;
        passed += measure(c.first);
    }
    std::erase_if(candidates, [&](const Candidate& c) { return more_likely(last, c); });
}

// Draws from a row of logits, after the penalty; `random` is a number of the generator.
int draw_token(std::span<const float> logits, const Sampling& s, std::uint64_t random, std::vector<Candidate>& candidates) {
    const float best = largest(logits, "Sampler::sample");
    if (s.temperature == 0) return static_cast<int>(std::ranges::find(logits, best) - logits.begin());

    candidates.clear();
    candidates.reserve(logits.size());
    for (std::size_t i = 0; i < logits.size(); ++i) {
        const float p = relative_probability(logits[i], best, s.temperature);
        if (p > 0) candidates.emplace_back(p, static_cast<int>(i));
    }
    if (s.top_k > 0) keep_best(candidates, s.top_k - 1, true);
    if (s.top_p < 1) {
        float lanes[16] = {};
        for (const auto& [p, id] : candidates) lanes[id % 16] += p;
        const double limit = static_cast<double>(s.top_p) * static_cast<double>(sum_lanes(lanes));
        keep_best(candidates, limit, false);
    }
    if (s.min_p > 0) std::erase_if(candidates, [&](const auto& c) { return c.first < s.min_p; });

    // Candidates are in order of their ids; the one is drawn in whose share of the sum a random point lies.
    double sum = 0, passed = 0;
    for (const auto& [p, id] : candidates) sum += static_cast<double>(p);
    const double point = static_cast<double>(random >> 11) * 0x1p-53 * sum;
    for (const auto& [p, id] : candidates)
        if ((passed += static_cast<double>(p)) > point) return id;
    return candidates.back().second;  // the product was rounded up to the sum
}

}  // namespace detail

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling), state_(sampling.seed) {
    const Sampling& s = sampling_;
    const auto check = [](const char* name, auto value, bool good, const char* expected) {
        detail::check_range(name, value, good && std::isfinite(static_cast<double>(value)), expected);
    };
    check("Sampling::temperature", s.temperature, s.temperature >= 0, "0 or more");
    check("Sampling::top_p", s.top_p, s.top_p > 0 && s.top_p <= 1, "more than 0, at most 1");
    check("Sampling::min_p", s.min_p, s.min_p >= 0 && s.min_p <= 1, "0 to 1");
    check("Sampling::top_k", s.top_k, s.top_k >= 0, "0 or more");
    check("Sampling::repeat_penalty", s.repeat_penalty, s.repeat_penalty > 0, "more than 0");
    check("Sampling::repeat_last", s.repeat_last, s.repeat_last >= 0, "0 or more");
}

int Sampler::sample(std::span<const float> logits, std::span<const int> history) {
    const detail::FloatEnvironment environment;
    const Sampling& s = sampling_;
    const auto recent = history.last(std::min<std::size_t>(history.size(), static_cast<std::size_t>(s.repeat_last)));
    if (s.repeat_penalty != 1 && !recent.empty()) {
        penalised_.assign(logits.begin(), logits.end());
        for (const int id : recent) {
            if (id < 0 || static_cast<std::size_t>(id) >= logits.size())
                detail::check_range("Sampler::sample, history", id, false, "ids below " + std::to_string(logits.size()));
            const float logit = logits[static_cast<std::size_t>(id)];  // from the original: a token is penalised once
            penalised_[static_cast<std::size_t>(id)] = logit > 0 ? logit / s.repeat_penalty : logit * s.repeat_penalty;
        }
        logits = penalised_;
    }
    std::uint64_t state = state_;
    const std::uint64_t random = s.temperature == 0 ? 0 : detail::next_random(state);
    const int token = detail::draw_token(logits, s, random, candidates_);
    state_ = state;
    return token;
}

int Sampler::sample(Session& session) {
    Session::Impl& s = detail::alive(session.impl_, "Sampler::sample");
    if (s.backend_row >= 0 && sampling_.repeat_penalty == 1) {
        std::uint64_t state = state_;
        const std::uint64_t random = sampling_.temperature == 0 ? 0 : detail::next_random(state);
        if (const int token = s.backend->draw(s.backend_row, sampling_, random); token >= 0) {
            s.drawn_on_device = true, state_ = state;
            return token;
        }
    }
    s.drawn_on_device = false;
    if (session.logits().empty())
        detail::fail(Code::argument, "Sampler::sample", "there are no logits to draw from", "none", "those of a token",
                     "Feed a token first");
    return sample(session.logits(), session.tokens());
}

float log_probability(std::span<const float> logits, int token) {
    const detail::FloatEnvironment environment;
    detail::check_range("log_probability", token, token >= 0 && static_cast<std::size_t>(token) < logits.size(),
                        "ids below " + std::to_string(logits.size()));
    const float best = detail::largest(logits, "log_probability"), logit = logits[static_cast<std::size_t>(token)];
    float lanes[16] = {};
    for (std::size_t i = 0; i < logits.size(); ++i) lanes[i % 16] += detail::relative_probability(logits[i], best, 1);
    if (logit != logit) return -std::numeric_limits<float>::infinity();
    const double difference = logit == best ? 0 : static_cast<double>(logit) - static_cast<double>(best);
    return static_cast<float>(difference - detail::log(static_cast<double>(detail::sum_lanes(lanes))));
}

// ── Generation ──

Finish generate(Session& session, std::span<const int> prompt, Sampler& sampler, const GenerateOptions& options,
                const std::function<bool(const Generated&)>& on_token) {
    detail::check_range("GenerateOptions::max_tokens", options.max_tokens, options.max_tokens >= -1, "-1, 0 or more");
    const Tokenizer tokenizer = session.model().tokenizer();
    TextStream stream(tokenizer);
    if (!detail::feed(*session.impl_, prompt)) return Finish::cancelled;
    for (int drawn = 0; drawn != options.max_tokens; ++drawn) {
        if (session.impl_->cancel.exchange(false)) return Finish::cancelled;
        const int token = sampler.sample(session);
        const bool end = !options.ignore_end && tokenizer.is_end(token), full = session.position() == session.context();
        std::string text = stream.push(token);
        if (end || full || drawn + 1 == options.max_tokens) text += stream.finish();
        const int position = session.position();
        const bool go_on = !on_token || on_token({token, text, options.logits ? session.logits() : std::span<const float>()});
        if (session.position() != position)
            detail::fail(Code::argument, "generate", "the callback changed its session",
                         detail::to_text({session.position(), " tokens"}), position, "Change it between two calls");
        const bool lazy = !options.logits && session.impl_->drawn_on_device;
        if (!full && !detail::feed(*session.impl_, {&token, 1}, nullptr, lazy)) return Finish::cancelled;
        if (end) return Finish::end_token;
        if (!go_on) return Finish::stopped;
        if (full) return Finish::context;
    }
    return Finish::length;
}

// ── Chat ──

namespace detail {

// Python's str.strip(): \s and U+001C to U+001F.
std::string_view strip(std::string_view text) {
    std::size_t begin = text.size(), end = text.size();  // of what is not white space
    for (std::size_t i = 0, length = 0; i < text.size(); i += length) {
        if (class_at(text, i, length) == CharClass::space || (text[i] >= 0x1C && text[i] <= 0x1F)) continue;
        begin = std::min(begin, i);
        end = i + length;
    }
    return text.substr(begin, end - begin);
}

// Python's json.dumps(text, ensure_ascii=False).
std::string json_string(std::string_view text) {
    std::string json = "\"";
    for (const char c : text) {
        const std::size_t escape = std::string_view("\"\\\n\r\t\b\f").find(c);
        if (escape != std::string_view::npos) {
            json += {'\\', "\"\\nrtbf"[escape]};
        } else if (static_cast<unsigned char>(c) < 0x20) {
            json += {'\\', 'u', '0', '0', c < 16 ? '0' : '1', "0123456789abcdef"[c & 15]};
        } else {
            json += c;
        }
    }
    return json + "\"";
}

// Special tokens come from here alone: every text is encoded as text. Meta's code encodes the blank line after a header apart
// from the content, Hugging Face's templates as one string with it; that is the same, since these strip the content.
std::vector<int> render_chat(const Tokenizer& tokenizer, ChatFormat format, std::span<const Message> messages,
                             const ChatStyle& style, bool answer) {
    const char* where = "render_chat";
    if (format == ChatFormat::none)
        fail(Code::argument, where, "the model has no chat format", "none", "llama3, llama3.1 or llama3.2",
             "Use generate() with plain text, or convert an instruction-tuned model");
    const bool hf = style.kind == ChatStyle::Kind::hf, hf_tools = hf && format != ChatFormat::llama3;
    if (!hf_tools && !(style.tools.empty() && style.date.empty()))
        fail(Code::argument, where, "this chat style has no place for tools and a date",
             style.date.empty() ? "tools" : "a date", "neither",
             "Use ChatStyle::Kind::hf with a model of Llama 3.1 or later, or write them into a message");

    std::vector<int> ids = {tokenizer.begin_token()};
    const auto refuse = [&](const char* what, const Part& found, const char* expected, const char* to_do) {
        fail(Code::argument, where, what, found, expected, to_do);
    };
    const auto special = [&](const char* name) {
        ids.push_back(tokenizer.special(name));
        if (ids.back() < 0) refuse("the model lacks a token", "none", name, "Convert it with the right chat format");
    };
    const auto text = [&](std::string_view content) {
        const std::vector<int> encoded = tokenizer.encode(content);
        ids.insert(ids.end(), encoded.begin(), encoded.end());
    };
    const auto header = [&](const std::string& role) {
        constexpr const char* allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.";
        if (role.empty() || role.find_first_not_of(allowed) != role.npos)
            refuse("a role is not a name", json_string(role), "letters, digits, _, - and .",
                   "Use system, user, assistant or ipython");
        special("<|start_header_id|>"), text(role), special("<|end_header_id|>");
    };
    const auto message = [&](const std::string& role, const std::string& content, bool python_tag, const char* end) {
        header(role);
        text("\n\n");
        if (python_tag) special("<|python_tag|>");
        text(content);
        special(end);
    };

    std::size_t i = 0;
    if (hf_tools) {
        std::string system = style.tools.empty() ? "" : "Environment: ipython\n";
        system += "Cutting Knowledge Date: December 2023\nToday Date: ";
        system += (style.date.empty() ? "26 Jul 2024" : style.date) + "\n\n";
        if (!messages.empty() && messages[0].role == "system") system += strip(messages[i++].content);
        message("system", system, false, "<|eot_id|>");
    }
    std::string tools;  // shown in front of the first user's text
    if (!style.tools.empty())
        tools = "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
                "best answers the given prompt.\n\nRespond in the format {\"name\": function name, \"parameters\": dictionary "
                "of argument name and its value}.Do not use variables.\n\n";
    for (const std::string& tool : style.tools) tools += tool + "\n\n";
    for (; i < messages.size(); ++i) {
        const Message& m = messages[i];
        const bool result = m.role == "ipython" || m.role == "tool";
        std::string content = hf_tools && result ? json_string(m.content) : m.content;
        if (hf || format == ChatFormat::llama3) content = strip(content);
        if (!tools.empty() && m.role != "user")
            refuse("the tools belong to the first message", "that of " + json_string(m.role), "the user's",
                   "Let the user begin");
        if ((m.python_tag || m.end_of_message) && m.role != "assistant")
            refuse("a message calls a tool", "that of " + json_string(m.role), "the assistant's",
                   "Clear python_tag and end_of_message");
        message(result ? "ipython" : m.role, std::exchange(tools, "") + content, m.python_tag,
                m.end_of_message ? "<|eom_id|>" : "<|eot_id|>");
    }
    if (answer && !tools.empty()) refuse("the tools belong to the user's first message", "none", "one", "Let the user begin");
    if (answer) header("assistant"), text("\n\n");
    return ids;
}

}  // namespace detail

std::vector<int> render_chat(const Model& model, std::span<const Message> messages, const ChatStyle& style, bool answer) {
    return detail::render_chat(model.tokenizer(), model.config().chat_format, messages, style, answer);
}

Chat::Chat(Model model, const ChatOptions& chat, const Sampling& sampling, const Options& options)
    : session_(std::move(model), options), options_(chat), sampler_(sampling) {
    detail::check_range("ChatOptions::max_tokens", chat.max_tokens, chat.max_tokens >= -1, "-1, 0 or more");
    if (!chat.system.empty()) messages_.push_back({"system", chat.system});
    render_chat(session_.model(), messages_, chat.style, false);  // for its errors
}

void Chat::clear() {
    session_.rewind(0);
    messages_.erase(messages_.begin() + (options_.system.empty() ? 0 : 1), messages_.end());
    sampler_ = Sampler(sampler_.sampling());
    finish_ = Finish::end_token;
    restarts_ = 0;
}

std::string Chat::say(std::string_view text, const std::function<bool(std::string_view)>& on_text) {
    return say(Message{"user", std::string(text)}, on_text);
}

// The whole conversation is rendered each time, which costs little beside a forward pass, and what the cache holds of it
// already is kept. So each prompt is exactly render_chat(messages()), after an answer that was cut, an error or a restart too.
std::string Chat::say(Message message, const std::function<bool(std::string_view)>& on_text) {
    const detail::InUse in_use = detail::use(busy_, "Chat::say");
    const Model& model = session_.model();
    const ChatStyle& style = options_.style;
    const auto context = static_cast<std::size_t>(session_.context());
    std::vector<Message> messages = messages_;
    messages.push_back(std::move(message));
    std::vector<int> prompt = render_chat(model, messages, style);

    // A context is full when an answer finds less room than a quarter of it. Half is kept then: the next turns need no restart.
    const std::size_t longest = options_.max_tokens < 0 ? context : static_cast<std::size_t>(options_.max_tokens);
    const std::size_t room = std::max<std::size_t>(1, std::min<std::size_t>(longest, context / 4));
    int restarts = restarts_;
    if (options_.overflow == ChatOptions::Overflow::restart && prompt.size() + room > context) {
        const auto first = messages.begin() + (options_.system.empty() ? 0 : 1);
        std::vector<std::vector<Message>::iterator> turns;  // where they start: with a message of the user
        for (auto m = first; m != messages.end(); ++m)
            if (m != first && m->role == "user") turns.push_back(m);
        const auto keep_from = [&](auto turn) {
            std::vector<Message> kept(messages.begin(), first);
            kept.insert(kept.end(), turn, messages.end());
            return kept;
        };
        if (!turns.empty()) {
            const auto turn = std::ranges::partition_point(turns, [&](auto start) {
                return render_chat(model, keep_from(start), style).size() > context / 2;
            });
            messages = keep_from(turn == turns.end() ? turns.back() : *turn);
            prompt = render_chat(model, messages, style);
            ++restarts;
        }
    }
    if (prompt.size() >= context)
        detail::fail(Code::context, "Chat::say", "the conversation does not fit into the context",
                     detail::to_text({prompt.size(), " tokens"}), detail::to_text({"at most ", context - 1}),
                     "Shorten the message, or set a larger Options::context");

    const auto cached = session_.tokens();
    const auto common = std::mismatch(prompt.begin(), prompt.end() - 1, cached.begin(), cached.end()).first - prompt.begin();
    session_.rewind(static_cast<int>(common));
    const auto to_feed = std::span<const int>(prompt).subspan(static_cast<std::size_t>(common));
    const Tokenizer& tokenizer = model.tokenizer();
    const int python_tag = tokenizer.special("<|python_tag|>"), end_of_message = tokenizer.special("<|eom_id|>");
    Message reply{"assistant", ""};
    bool begins = true;
    const Finish finish =
        generate(session_, to_feed, sampler_, {options_.max_tokens, false, false}, [&](const Generated& drawn) {
            if (std::exchange(begins, false)) reply.python_tag = drawn.token == python_tag;
            reply.end_of_message = drawn.token == end_of_message;
            reply.content += drawn.text;
            return drawn.text.empty() || !on_text || on_text(drawn.text);
        });
    std::string text = reply.content;
    messages.push_back(std::move(reply));
    messages_ = std::move(messages);  // from here on nothing fails: a say() that throws leaves the conversation as it was
    finish_ = finish;
    restarts_ = restarts;
    return text;
}

}  // namespace llama3

// ═══ Part III: How to make it fast ═════════════════════════════════════════════════════════════════════════════════════════════

// ═══ §8  Number formats ════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// What a stored value is, one struct per format: `encode` fills one unit of a panel (16 rows x unit_columns) from floats,
// `decode` gives back one value of it. To add a format: a struct here, a line in format_infos (§2), a tile in §9, a decoder
// in kernels.cuh. The layout of the units is convert/FORMAT.md, section 5.

namespace llama3 {
namespace detail {

// bfloat16 is the upper half of a float; to_bf16 rounds to the nearest, ties to even, and keeps NaN a NaN.
inline float from_bf16(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
inline std::uint16_t to_bf16(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE half precision: 1 sign, 5 exponent (bias 15) and 10 fraction bits. Both directions are exact or rounded to nearest even,
// by letting float arithmetic do the shifting: 2^112 moves the exponent's bias from 15 to 127.
inline float from_fp16(std::uint16_t half) {
    const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
    float value = std::bit_cast<float>(magnitude) * std::bit_cast<float>((127u + 112u) << 23);
    if ((half & 0x7c00u) == 0x7c00u) value = std::bit_cast<float>(magnitude | 0x7f800000u);
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | (static_cast<std::uint32_t>(half & 0x8000u) << 16));
}
inline std::uint16_t to_fp16(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    std::uint32_t half = 0;
    if (magnitude > 0x7f800000u) half = 0x7e00u;        // NaN
    else if (magnitude >= 0x477ff000u) half = 0x7c00u;  // rounds to 65536 or more: infinity
    else if (magnitude < 0x38800000u)                   // subnormal: adding 0.5 aligns the bits and rounds them
        half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    else half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    return static_cast<std::uint16_t>(sign | half);
}

inline constexpr float smallest_scale = 1e-35f;  // scales below it are 0 in fp16, and their inverse might not be finite

// Rounds half away from zero, as Q8_0 does.
inline int round_away(float x) { return static_cast<int>(x < 0 ? x - 0.5f : x + 0.5f); }

template <class T>
T load_as(const std::byte* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class T>
void store_as(std::byte* to, T value) {
    std::memcpy(to, &value, sizeof value);
}

struct F32 {
    static constexpr Format format = Format::f32;
    static float decode(const std::byte* unit, int row, int) { return load_as<float>(unit + 4 * row); }
    static void encode(const float* rows, std::size_t stride, std::byte* unit) {
        for (int r = 0; r < panel_rows; ++r) store_as(unit + 4 * r, rows[static_cast<std::size_t>(r) * stride]);
    }
};

struct BF16 {
    static constexpr Format format = Format::bf16;
    static float decode(const std::byte* unit, int row, int column) {
        return from_bf16(load_as<std::uint16_t>(unit + 4 * row + 2 * column));
    }
    static void encode(const float* rows, std::size_t stride, std::byte* unit) {
        for (int r = 0; r < panel_rows; ++r)
            for (int c = 0; c < 2; ++c)
                store_as(unit + 4 * r + 2 * c,
                         to_bf16(rows[static_cast<std::size_t>(r) * stride + static_cast<std::size_t>(c)]));
    }
};

// The rule of q8, for a block of weights and for a group of up to 32 channels in a q8 cache. Returns the fp16 scale.
inline std::uint16_t quantise_channels(const float* x, int n, std::int8_t* bytes) {
    std::uint32_t bits = 0;
    for (int i = 0; i < n; ++i) bits = std::max(bits, std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffu);
    const bool finite = bits < 0x7f800000u;
    const float scale = finite ? std::bit_cast<float>(bits) / 127 : 0, inverse = scale > smallest_scale ? 1 / scale : 0;
    for (int i = 0; i < n; ++i)
        bytes[i] = static_cast<std::int8_t>(finite ? std::clamp(round_away(x[i] * inverse), -127, 127) : 0);
    return finite ? to_fp16(scale) : std::uint16_t{0x7e00};  // infinity or NaN in: NaN out
}

// What q8 and q4 share: weight = value * scale. A unit is `vectors` of [16 rows][4 bytes], then [2 blocks][16 rows] scales.
template <class Q>
struct Blocks {
    static std::size_t scale_at(int row, int block) { return static_cast<std::size_t>(64 * Q::vectors + 32 * block + 2 * row); }
    static float scale(const std::byte* unit, int row, int block) {
        return from_fp16(load_as<std::uint16_t>(unit + scale_at(row, block)));
    }
    static float decode(const std::byte* unit, int row, int column) {
        return static_cast<float>(Q::value(unit, row, column)) * scale(unit, row, column / block_columns);
    }
};

// value = byte. A row's bytes in a vector are 4 columns.
struct Q8 : Blocks<Q8> {
    static constexpr Format format = Format::q8;
    static constexpr int vectors = 16;
    static int value(const std::byte* unit, int row, int column) {
        return static_cast<std::int8_t>(unit[64 * (column / 4) + 4 * row + column % 4]);
    }
    static void encode(const float* rows, std::size_t stride, std::byte* unit) {
        for (int r = 0; r < panel_rows; ++r)
            for (int block = 0; block < 2; ++block) {
                std::int8_t bytes[block_columns];
                const float* x = rows + static_cast<std::size_t>(r) * stride + block * block_columns;
                store_as(unit + scale_at(r, block), quantise_channels(x, block_columns, bytes));
                for (int c = 0; c < block_columns; ++c)
                    unit[64 * (8 * block + c / 4) + 4 * r + c % 4] = static_cast<std::byte>(bytes[c]);
            }
    }
};

// value = nibble - 8. In vector v of a block byte b of a row holds columns 8v + b (low nibble) and 8v + 4 + b (high nibble).
struct Q4 : Blocks<Q4> {
    static constexpr Format format = Format::q4;
    static constexpr int vectors = 8;
    static int value(const std::byte* unit, int row, int column) {
        const int byte = std::to_integer<int>(unit[64 * (column / 8) + 4 * row + column % 4]);
        return (column % 8 < 4 ? byte & 15 : byte >> 4) - 8;
    }
    static void encode(const float* rows, std::size_t stride, std::byte* unit) {
        std::memset(unit, 0, 64 * vectors);
        for (int r = 0; r < panel_rows; ++r)
            for (int block = 0; block < 2; ++block) {
                const float* x = rows + static_cast<std::size_t>(r) * stride + block * block_columns;
                float extreme = 0;  // the value of largest magnitude, the first of equals
                for (int c = 0; c < block_columns; ++c)
                    if ((x[c] < 0 ? -x[c] : x[c]) > (extreme < 0 ? -extreme : extreme)) extreme = x[c];
                const float scale = extreme / -8, inverse = scale > smallest_scale || scale < -smallest_scale ? 1 / scale : 0;
                store_as(unit + scale_at(r, block), to_fp16(extreme == 0 ? 0.0f : scale));
                for (int c = 0; c < block_columns; ++c) {
                    const float value = x[c] * inverse + 8.5f;
                    const int nibble = value >= 0 && value < 16 ? static_cast<int>(value) : value >= 16 ? 15 : 0;  // NaN: 0
                    unit[64 * (4 * block + c / 8) + 4 * r + c % 4] |= static_cast<std::byte>(c % 8 < 4 ? nibble : nibble << 4);
                }
            }
    }
};

// Calls f(F32{}), f(BF16{}), ...: the one place that turns a format's id into its struct.
template <class F>
decltype(auto) with_format(Format format, F&& f) {
    switch (format) {
        case Format::f32: return f(F32{});
        case Format::bf16: return f(BF16{});
        case Format::q8: return f(Q8{});
        default: return f(Q4{});
    }
}

// One panel from 16 rows of floats, [16][columns], the columns already filled up to whole units.
void encode_panel(Format format, const float* rows, int columns, std::byte* panel) {
    with_format(format, [&](auto f) {
        for (int c = 0; c < columns; c += unit_columns(format), panel += unit_bytes(format))
            f.encode(rows + c, static_cast<std::size_t>(columns), panel);
    });
}

float decode_weight(const Matrix& matrix, int row, int column) {
    const int per_unit = unit_columns(matrix.format);
    const std::byte* unit =
        matrix.panel(row / panel_rows) + static_cast<std::size_t>(column / per_unit) * unit_bytes(matrix.format);
    return with_format(matrix.format, [&](auto f) { return f.decode(unit, row % panel_rows, column % per_unit); });
}

void decode_row(const Matrix& matrix, int row, float* out) {
    with_format(matrix.format, [&](auto f) {
        const std::byte* unit = matrix.panel(row / panel_rows);
        for (int u = 0; u < matrix.units(); ++u, unit += unit_bytes(f.format))
            for (int c = 0; c < unit_columns(f.format); ++c) *out++ = f.decode(unit, row % panel_rows, c);
    });
}

float round_to_bf16(float x) { return from_bf16(to_bf16(x)); }

// The exact product of one block of a q8 or q4 matrix with 32 quantised activations, and the scale of the block's weights.
int block_dot(const Matrix& matrix, int row, int column, const std::int8_t* bytes, float& scale) {
    const std::byte* unit = matrix.panel(row / panel_rows) + static_cast<std::size_t>(column / 64) * unit_bytes(matrix.format);
    const auto multiply = [&](auto f) {
        int dot = 0;
        for (int i = 0; i < block_columns; ++i) dot += f.value(unit, row % panel_rows, column % 64 + i) * bytes[i];
        scale = f.scale(unit, row % panel_rows, column % 64 / block_columns);
        return dot;
    };
    return matrix.format == Format::q8 ? multiply(Q8{}) : multiply(Q4{});
}

// Activations that meet q8 or q4 weights: groups of 32 signed bytes with one float scale, x ≈ byte * scale. The largest magnitude
// is found in the integer order of the bits, where NaN is above infinity: a group that holds either gets the scale NaN.
float quantise_group(const float* x, std::int8_t* bytes) {
    std::uint32_t largest = 0;
    for (int i = 0; i < block_columns; ++i) largest = std::max(largest, std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffu);
    const bool finite = largest < 0x7f800000u;
    const float magnitude = finite ? std::bit_cast<float>(largest) : 0.0f;
    // 2^-100: a smaller group counts as zero, and the inverse of all others is finite
    const float inverse = magnitude > 7.9e-31f ? 127 / magnitude : 0.0f;
    constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
    for (int i = 0; i < block_columns; ++i) {
        const float rounded = fma(finite ? x[i] : 0.0f, inverse, round);
        bytes[i] = static_cast<std::int8_t>(std::bit_cast<std::int32_t>(rounded) - std::bit_cast<std::int32_t>(round));
    }
    return finite ? (magnitude > 7.9e-31f ? magnitude / 127 : 0.0f) : std::numeric_limits<float>::quiet_NaN();
}

void round_trip(Format format, float* to, const float* from, int n) {
    for (int i = 0; i < n; ++i) to[i] = format == Format::bf16 ? round_to_bf16(from[i]) : from[i];
    for (int first = 0; format == Format::q8 && first < n; first += block_columns) {
        std::int8_t bytes[block_columns];
        const int count = std::min(block_columns, n - first);
        const float scale = from_fp16(quantise_channels(from + first, count, bytes));
        for (int i = 0; i < count; ++i) to[first + i] = static_cast<float>(bytes[i]) * scale;
    }
}

}  // namespace detail

const char* format_name(Format format) { return format_info(format).name; }

Format format_from_name(std::string_view name) {
    std::string known;
    for (const Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
        if (name == format_name(format)) return format;
        known += std::string(" ") + format_name(format);
    }
    detail::fail(Code::argument, "format", "unknown name", "'" + std::string(name) + "'", "one of" + known,
                 "Choose one of these");
}

}  // namespace llama3

// ═══ §9  CPU kernels ═══════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// Every loop that counts, written once (§9b) over a handful of vector functions (§9a), and compiled once per instruction set:
// the header includes itself with LLAMA3_KERNELS set to the name of the set, inside a region where the compiler may use it. A
// lane is an output row (products), a position (scores) or a channel (the mix of values), never a piece of one sum: that is why
// the width of the vectors does not show in the results. To add an instruction set: an entry before §9a, a block in it, and a line
// in §10.

namespace llama3 {
namespace detail {

// out[t, row] = Σ_c W[row, c] x[t, c] for panels [first_panel, last_panel) of W and all tokens.
struct Product {
    Matrix w;
    const std::byte* x;  // packed by Kernels::pack
    int tokens;          // T
    int together;        // tokens that were packed side by side
    float* out;          // [T, stride], rows filled up to whole panels
    std::size_t stride;
    bool add;  // out += instead of out =
    int first_panel, last_panel;
    std::byte* room;  // of room_bytes()
    int streams = 1;  // runs of panels that a single token meets side by side: 1 or 4, whichever this processor reads faster
    float* output(int token, int panel) const { return out + static_cast<std::size_t>(token) * stride + panel * panel_rows; }
};

// Keys and values of one segment of positions, of one layer and key/value head. Keys stand in tiles of 16 positions, so that a lane
// is a position; values by position.
struct CacheView {
    Format format;
    std::byte* keys;              // [P/16][E][16]
    std::uint16_t* key_scales;    // q8: [P/16][E/32][16]
    std::byte* values;            // [P][E rounded up to 16]
    std::uint16_t* value_scales;  // q8: [P][E/32]
    int head_dim;
};

// out[t, g] = softmax(query[t, g] · keysᵀ / √E) values over positions 0 to that of row t, for consecutive rows of one sequence
// and the G query heads that share a key/value head: each key and value that is read serves all of them.
struct Attention {
    CacheView cache;     // of the segment that is asked for
    const Row* rows;     // [n_rows]
    const float* query;  // [n_rows, stride], of which G E are used
    float* out;          // likewise
    std::size_t stride;
    int n_rows;
    int n_queries;   // G
    float* scratch;  // of attention_floats()
    int queries() const { return n_rows * n_queries; }
    int segments() const { return rows[n_rows - 1].position / attention_segment + 1; }
    // Positions of a segment that query head q of all rows sees.
    int seen(int q, int segment) const {
        return std::clamp(rows[q / n_queries].position + 1 - segment * attention_segment, 0, attention_segment);
    }
};

// n in parts of about the same size, at most `most`, but at least 1.
inline int equal_parts(int n, int most) {
    const int parts = (n + std::max(most, 1) - 1) / std::max(most, 1);
    return (n + parts - 1) / parts;
}

struct Kernels {
    const char* name;
    std::array<int, 4> tile_tokens;  // in a tile where there are many, for weights of each format
    int few_tokens;                  // at most in a tile where there are few
    bool own_bf16;                   // bf16 products by an instruction with its own rounding
    void (*normalise)(float* out, const float* x, const float* weight, int n, float eps);  // RMSNorm
    void (*rope)(float* x, const float* turns, int head_dim);  // turns: [2][E/2][2]
    // Tokens that pack() puts side by side: full tiles where there are many, else tiles of about the same size.
    int tokens_together(Format format, int tokens) const {
        const int tile = tile_tokens[static_cast<std::size_t>(format)], few = equal_parts(tokens, few_tokens);
        return tokens < 4 * tile ? few : tile;
    }
    // x: [tokens, stride], at most `together` of them; what is missing is zero
    void (*pack)(Format format, std::byte* out, const float* x, std::size_t stride, int tokens, int together, int columns);
    void (*multiply)(const Product& product);
    void (*swiglu)(float* gate, const float* up, int n);  // gate = SiLU(gate) ⊙ up
    // mix: [queries, attention_width] sums of one segment, not yet divided; [queries] largest scores; [queries] totals
    void (*attend)(const Attention& attention, int segment, float* mix);
    // joined: the first segment's mix, to which this one's is added (segment 0: nothing is); out, where it is the last
    void (*join)(const Attention& attention, int segment, float* joined, const float* mix);
};

// Bytes of one packed token: floats, or per block of 32 columns 32 bytes, a float and an int32.
inline std::size_t packed_bytes(Format format, int columns) {
    const std::size_t n = static_cast<std::size_t>(round_up(columns, 64));
    return format == Format::f32 || format == Format::bf16 ? 4 * n : n / block_columns * (block_columns + 8);
}

constexpr int max_tile_tokens = 16;
// Bytes of what a product of many tokens has in use: weights in the first level of caches, panels and chains in the second, tokens
// in the third.
constexpr std::size_t weights_at_once = 18 << 10, panels_at_once = 1 << 18, chains_at_once = 1 << 17, tokens_at_once = 6 << 20;
inline std::size_t room_bytes(int columns) {  // chains and unpacked weights, or a panel of q8
    return std::max(chains_at_once + weights_at_once,
                    static_cast<std::size_t>(round_up(columns, 64)) / unit_columns(Format::q8) * unit_bytes(Format::q8));
}

// Bytes of an element of the cache, head width as it is stored for values, and groups of channels that share a scale.
constexpr std::size_t element_bytes(Format format) { return format == Format::f32 ? 4 : format == Format::bf16 ? 2 : 1; }
inline std::size_t padded_width(int head_dim) { return static_cast<std::size_t>(round_up(head_dim, 16)); }
inline std::size_t scale_groups(int head_dim) {
    return static_cast<std::size_t>(round_up(head_dim, block_columns) / block_columns);
}

// Attention decodes attention_chunk positions of the cache at a time, for all queries of a block. Scores and queries stand in
// rows of one length, known to the compiler and no power of two: the same column of all rows would share few sets of the cache.
constexpr int attention_chunk = 64, attention_queries = 96, score_stride = attention_segment + 16;
inline std::size_t attention_width(int head_dim) { return static_cast<std::size_t>(round_up(head_dim, 64)); }
inline std::size_t mix_floats(int queries, int head_dim) {
    return static_cast<std::size_t>(round_up(queries * (round_up(head_dim, 64) + 2), 16));
}
inline std::size_t attention_floats(int queries, int head_dim) {
    const int rows = 1 + (head_dim + attention_segment - 1) / attention_segment;  // scores, and a query in parts
    return static_cast<std::size_t>(queries * rows * score_stride) + attention_chunk * attention_width(head_dim);
}

}  // namespace detail
}  // namespace llama3

#define LLAMA3_STRING_(x) #x
#define LLAMA3_STRING(x) LLAMA3_STRING_(x)
#if defined(LLAMA3_NO_UNROLL)  // for builds with sanitizers, which compile in half the time without and run as fast
#define LLAMA3_UNROLL
#elif defined(__clang__)
#define LLAMA3_UNROLL _Pragma("unroll")
#else
#define LLAMA3_UNROLL _Pragma("GCC unroll 16")
#endif
#if defined(__clang__)
#define LLAMA3_TARGET_BEGIN(features) \
    _Pragma(LLAMA3_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define LLAMA3_TARGET_END _Pragma("clang attribute pop")
#else
#define LLAMA3_TARGET_BEGIN(features) _Pragma("GCC push_options") _Pragma(LLAMA3_STRING(GCC target(features)))
#define LLAMA3_TARGET_END _Pragma("GCC pop_options")
#endif
#define LLAMA3_INLINE static inline __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own AVX-512 intrinsics start from undefined registers
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// Any processor: SSE2, or what the compiler makes of vectors of 4. Its fma takes thirty instructions: unrolled loops of them
// would only be long.
#pragma push_macro("LLAMA3_UNROLL")
#undef LLAMA3_UNROLL
#define LLAMA3_UNROLL
#define LLAMA3_KERNELS baseline
#define LLAMA3_WIDTH 4
#include "llama3.hpp"
#pragma pop_macro("LLAMA3_UNROLL")

// mingw's GCC misaligns wide spills. LLAMA3_BASELINE_ONLY: for builds that are about something else, in half the time.
#if (defined(__x86_64__) || defined(_M_X64)) && !(defined(_WIN32) && !defined(__clang__)) && !defined(LLAMA3_BASELINE_ONLY)
#define LLAMA3_X86_KERNELS 1

// Intel since Haswell (2013), AMD since Excavator and Zen
LLAMA3_TARGET_BEGIN("avx2,fma,f16c")
#define LLAMA3_KERNELS avx2
#define LLAMA3_WIDTH 8
#include "llama3.hpp"
LLAMA3_TARGET_END

// Intel's desktop chips since Alder Lake (2021), which lack AVX-512
LLAMA3_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
#define LLAMA3_KERNELS avx_vnni
#define LLAMA3_LIKE avx2
#define LLAMA3_WIDTH 8
#define LLAMA3_VNNI 1
#include "llama3.hpp"
LLAMA3_TARGET_END

// Intel Ice Lake (2019), AMD Zen 4 (2022) and later
LLAMA3_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define LLAMA3_KERNELS avx512
#define LLAMA3_WIDTH 16
#define LLAMA3_VNNI 1
#include "llama3.hpp"
LLAMA3_TARGET_END

// Intel Cooper Lake and Sapphire Rapids, AMD Zen 4 and later
LLAMA3_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define LLAMA3_KERNELS avx512_bf16
#define LLAMA3_LIKE avx512
#define LLAMA3_WIDTH 16
#define LLAMA3_VNNI 1
#define LLAMA3_BF16 1
#include "llama3.hpp"
LLAMA3_TARGET_END

#if defined(__linux__)
// Intel Sapphire Rapids and later, where the system hands out the tile registers
LLAMA3_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,amx-bf16")
#define LLAMA3_KERNELS amx
#define LLAMA3_AMX 1
#include "llama3.hpp"
LLAMA3_TARGET_END
#endif

#elif defined(__aarch64__)

#if !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")  // which would load more values ahead than there are registers
#endif

// Every aarch64: Cortex-A53, A72
#define LLAMA3_KERNELS neon
#define LLAMA3_NEON 1
#define LLAMA3_WIDTH 4
#include "llama3.hpp"

// Cortex-A55 and A75 (2017), Neoverse, Apple's since A13 and M1, and later
#if defined(__clang__)
LLAMA3_TARGET_BEGIN("dotprod")
#elif defined(__ARM_FEATURE_DOTPROD) || defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
LLAMA3_TARGET_BEGIN("+dotprod")
#else  // with less the assembler asks for ARMv8.2; crypto, since the intrinsics may have been compiled with it
LLAMA3_TARGET_BEGIN("arch=armv8.2-a+crypto+dotprod")
#endif
#define LLAMA3_KERNELS neon_dotprod
#define LLAMA3_NEON 1
#define LLAMA3_WIDTH 4
#define LLAMA3_DOTPROD 1
#include "llama3.hpp"
LLAMA3_TARGET_END

#if !defined(__clang__)
#pragma GCC pop_options
#endif
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#elif !defined(LLAMA3_AMX)  // LLAMA3_KERNELS: one instruction set

namespace llama3 {
namespace detail {
namespace LLAMA3_KERNELS {

// ─── §9a  Vector functions ──────────────────────────────────────────────────────────────────────────────────────────────────────
//
// F: `lanes` floats, with the operators + - * / of the compiler's vector types. I: as many int32, or four times as many bytes.
// A weight vector meets the unsigned side of a byte product, so it is turned into unsigned bytes: by adding 8 (q4, as stored)
// or 128 (q8, `signed_bias`); the accumulator then starts at -bias * (sum of the activations). All of it is exact. Where both
// sides are signed, nothing is added to q8. It also starts at the bits of the float `magic`, so that it ends with those of
// magic + (sum of the products), and needs no conversion (scale_sum).

#if LLAMA3_WIDTH == 16

using F = __m512;
using I = __m512i;
constexpr int lanes = 16, tile_tokens = 7, few_tokens = 8, tile_panels = 2, signed_bias = 128, fetched_ahead = 4352,
              reads_rows = 1;
LLAMA3_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
LLAMA3_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
LLAMA3_INLINE F splat(float x) { return _mm512_set1_ps(x); }
LLAMA3_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
LLAMA3_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
LLAMA3_INLINE F repeat_even(F x) { return _mm512_moveldup_ps(x); }
LLAMA3_INLINE F repeat_odd(F x) { return _mm512_movehdup_ps(x); }
LLAMA3_INLINE F where_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
LLAMA3_INLINE F load_fp16(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LLAMA3_INLINE F load_bf16(const std::byte* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
LLAMA3_INLINE F load_bytes(const std::byte* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
LLAMA3_INLINE I load_bits(const std::byte* p) { return _mm512_loadu_si512(p); }
LLAMA3_INLINE void store_bits(std::byte* p, I x) { _mm512_storeu_si512(p, x); }
LLAMA3_INLINE I splat_int(int x) { return _mm512_set1_epi32(x); }
LLAMA3_INLINE I to_int(F x) { return _mm512_cvttps_epi32(x); }
LLAMA3_INLINE I max_int(I a, I b) { return _mm512_max_epi32(a, b); }
LLAMA3_INLINE int sum_of(I x) { return _mm512_reduce_add_epi32(x); }
LLAMA3_INLINE int max_of(I x) { return _mm512_reduce_max_epi32(x); }
LLAMA3_INLINE void store_bytes(std::int8_t* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
LLAMA3_INLINE I dot_bytes(I sum, I unsigned_bytes, I signed_bytes) {
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
}
LLAMA3_INLINE I high_nibbles(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
LLAMA3_INLINE I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
LLAMA3_INLINE I flip_signs(I x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
#ifdef LLAMA3_BF16
LLAMA3_INLINE F dot_bf16(F sum, I w, I x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
#endif

#elif LLAMA3_WIDTH == 8

using F = __m256;
using I = __m256i;
constexpr int lanes = 8, tile_panels = 1, reads_rows = 1;
LLAMA3_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
LLAMA3_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
LLAMA3_INLINE F splat(float x) { return _mm256_set1_ps(x); }
LLAMA3_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
LLAMA3_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
LLAMA3_INLINE F repeat_even(F x) { return _mm256_moveldup_ps(x); }
LLAMA3_INLINE F repeat_odd(F x) { return _mm256_movehdup_ps(x); }
LLAMA3_INLINE F where_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
LLAMA3_INLINE F load_fp16(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LLAMA3_INLINE F load_bf16(const std::byte* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
LLAMA3_INLINE F load_bytes(const std::byte* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
LLAMA3_INLINE I load_bits(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
LLAMA3_INLINE void store_bits(std::byte* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
LLAMA3_INLINE I splat_int(int x) { return _mm256_set1_epi32(x); }
LLAMA3_INLINE I to_int(F x) { return _mm256_cvttps_epi32(x); }
LLAMA3_INLINE I max_int(I a, I b) { return _mm256_max_epi32(a, b); }
LLAMA3_INLINE int sum_of(I x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
LLAMA3_INLINE int max_of(I x) {
    __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
LLAMA3_INLINE void store_bytes(std::int8_t* p, I x) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
LLAMA3_INLINE I high_nibbles(I x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
LLAMA3_INLINE I low_nibbles(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
#ifdef LLAMA3_VNNI
constexpr int signed_bias = 128, tile_tokens = 6, few_tokens = 4, fetched_ahead = 4352;
LLAMA3_INLINE I dot_bytes(I sum, I unsigned_bytes, I signed_bytes) {
    return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
}
LLAMA3_INLINE I flip_signs(I x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
#else
constexpr int signed_bias = 0, tile_tokens = 5, few_tokens = 4, fetched_ahead = 3264;  // 4352 in 4 streams is slower on Zen 3
LLAMA3_INLINE I flip_signs(I x) { return x; }
// GCC 12 would compute all products first and then their sum, and has no registers for so many.
LLAMA3_INLINE I add_now(I x) {
    asm("" : "+x"(x));
    return x;
}
// vpmaddubsw adds pairs of products in 16 bits and saturates: exact only if they stay small. With |w| <= 127 and the sign moved
// to the activation a pair is at most 2 * 127 * 127 = 32258; a nibble makes 2 * 15 * 127 = 3810, and eight of those still fit.
LLAMA3_INLINE I add_dot(Q8, I sum, I w, I x) {
    const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return add_now(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
LLAMA3_INLINE I add_dot(Q4, I sum16, I nibbles, I x) {
    return add_now(_mm256_add_epi16(sum16, _mm256_maddubs_epi16(nibbles, x)));
}
#endif

#else  // vectors of 4, in the compiler's own notation, and what NEON has instructions for

typedef float F __attribute__((vector_size(16)));
typedef std::int32_t I __attribute__((vector_size(16)));
typedef std::uint32_t U __attribute__((vector_size(16)));
typedef std::uint8_t B __attribute__((vector_size(16)));
constexpr int lanes = 4, tile_panels = 1, signed_bias = 0, fetched_ahead = 1088;
LLAMA3_INLINE F load(const float* p) {
    F x;
    std::memcpy(&x, p, 16);
    return x;
}
LLAMA3_INLINE void store(float* p, F x) { std::memcpy(p, &x, 16); }
LLAMA3_INLINE F splat(float x) { return F{x, x, x, x}; }
LLAMA3_INLINE F where_less(F a, F b, F yes, F no) {
    const I less = a < b;
    return (F)(((I)yes & less) | ((I)no & ~less));
}
LLAMA3_INLINE F max(F a, F b) { return where_less(b, a, a, b); }
LLAMA3_INLINE F repeat_even(F x) { return F{x[0], x[0], x[2], x[2]}; }
LLAMA3_INLINE F repeat_odd(F x) { return F{x[1], x[1], x[3], x[3]}; }
LLAMA3_INLINE I load_bits(const std::byte* p) {
    I x;
    std::memcpy(&x, p, 16);
    return x;
}
LLAMA3_INLINE void store_bits(std::byte* p, I x) { std::memcpy(p, &x, 16); }
LLAMA3_INLINE I splat_int(int x) { return I{x, x, x, x}; }
LLAMA3_INLINE I max_int(I a, I b) {
    const I greater = a > b;
    return (a & greater) | (b & ~greater);
}
LLAMA3_INLINE I high_nibbles(I x) { return (I)((B)x >> 4); }
LLAMA3_INLINE I low_nibbles(I x) { return x & splat_int(0x0f0f0f0f); }
LLAMA3_INLINE I flip_signs(I x) { return x; }  // both sides of dot_bytes are signed here
#ifdef LLAMA3_NEON
constexpr int tile_tokens = 4, few_tokens = 4, reads_rows = 1;
LLAMA3_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
LLAMA3_INLINE F load_fp16(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
LLAMA3_INLINE F load_bf16(const std::byte* p) { return (F)((U)vmovl_u16(vcreate_u16(load_as<std::uint64_t>(p))) << 16); }
LLAMA3_INLINE F load_bytes(const std::byte* p) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(load_as<std::uint32_t>(p))))));
}
LLAMA3_INLINE I to_int(F x) { return vcvtq_s32_f32(x); }  // lanes out of range differ from the other sets': exp() drops them
LLAMA3_INLINE int sum_of(I x) { return vaddvq_s32(x); }
LLAMA3_INLINE int max_of(I x) { return vmaxvq_s32(x); }
LLAMA3_INLINE void store_bytes(std::int8_t* p, I x) {
    const int16x4_t words = vmovn_s32(x);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    std::memcpy(p, &bytes, 4);
}
#ifdef LLAMA3_DOTPROD
// vdotq_lane_s32, which clang 14 hides unless the whole file is compiled for it; x has the same bytes in every lane.
LLAMA3_INLINE I dot_bytes(I sum, I w, I x) {
    asm("sdot %0.4s, %1.16b, %2.4b[0]" : "+w"(sum) : "w"(w), "w"(std::bit_cast<float>(x[0])));
    return sum;
}
#else
LLAMA3_INLINE I dot_bytes(I sum, I w, I x) {  // a pair of products is at most 2 * 128 * 127, and fits in 16 bits
    const int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
    return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
}
#endif
#else
constexpr int tile_tokens = 2, few_tokens = 2, reads_rows = 0;  // fma takes the time, not reading the cache twice
__attribute__((noinline)) static F fma(F a, F b, F c) {
    F y;
    for (int i = 0; i < 4; ++i) y[i] = detail::fma(a[i], b[i], c[i]);
    return y;
}
LLAMA3_INLINE F load_fp16(const std::uint16_t* p) {
    return F{from_fp16(p[0]), from_fp16(p[1]), from_fp16(p[2]), from_fp16(p[3])};
}
LLAMA3_INLINE F load_bf16(const std::byte* p) {
    std::uint16_t x[4];
    std::memcpy(x, p, 8);
    return F{from_bf16(x[0]), from_bf16(x[1]), from_bf16(x[2]), from_bf16(x[3])};
}
LLAMA3_INLINE F load_bytes(const std::byte* p) {
    std::int8_t x[4];
    std::memcpy(x, p, 4);
    return F{static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]), static_cast<float>(x[3])};
}
LLAMA3_INLINE I to_int(F x) {
    I y;  // a plain conversion has no meaning for lanes out of range; the processor's instruction gives this value
    for (int i = 0; i < 4; ++i)
        y[i] = x[i] > -2147483648.0f && x[i] < 2147483648.0f ? static_cast<std::int32_t>(x[i]) : INT32_MIN;
    return y;
}
LLAMA3_INLINE int sum_of(I x) { return x[0] + x[1] + x[2] + x[3]; }
LLAMA3_INLINE int max_of(I x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }
LLAMA3_INLINE void store_bytes(std::int8_t* p, I x) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<std::int8_t>(x[i]);
}
LLAMA3_INLINE I dot_bytes(I sum, I w, I x) {
    std::int8_t a[16], b[16];
    std::memcpy(a, &w, 16), std::memcpy(b, &x, 16);
    for (int i = 0; i < 4; ++i)
        sum[i] += a[4 * i] * b[4 * i] + a[4 * i + 1] * b[4 * i + 1] + a[4 * i + 2] * b[4 * i + 2] + a[4 * i + 3] * b[4 * i + 3];
    return sum;
}
#endif

#endif

// What all sets say in the compiler's own notation.
typedef std::int32_t S __attribute__((vector_size(4 * lanes)));
typedef std::uint32_t U __attribute__((vector_size(4 * lanes)));
LLAMA3_INLINE F to_float(I x) { return __builtin_convertvector((S)x, F); }
LLAMA3_INLINE F as_float(I x) { return (F)x; }
LLAMA3_INLINE I as_int(F x) { return (I)x; }
LLAMA3_INLINE I add_int(I a, I b) { return (I)((U)a + (U)b); }
LLAMA3_INLINE I sub_int(I a, I b) { return (I)((U)a - (U)b); }
LLAMA3_INLINE I shift_left(I x, int n) { return (I)((U)x << n); }
LLAMA3_INLINE I shift_right(I x, int n) { return (I)((S)x >> n); }
LLAMA3_INLINE I splat_four(const std::byte* p) { return splat_int(load_as<std::int32_t>(p)); }

// add_dot: sum += w · x over the four columns of each lane. A sum over biased weights begins at `start`, which takes the bias
// away again.
#if LLAMA3_WIDTH == 8 && !defined(LLAMA3_VNNI)  // q4: in 16 bits
LLAMA3_INLINE I begin_sum(Q8, const std::byte* start) { return splat_four(start); }
LLAMA3_INLINE I begin_sum(Q4, const std::byte*) { return splat_int(0); }
LLAMA3_INLINE I finish_sum(Q8, I sum, const std::byte*) { return sum; }
LLAMA3_INLINE I finish_sum(Q4, I sum16, const std::byte* start) {
    return add_int(_mm256_madd_epi16(sum16, _mm256_set1_epi16(1)), splat_four(start));
}
#else                                           // in 32 bits, exactly
template <class Type>
LLAMA3_INLINE I add_dot(Type, I sum, I w, I x) {
    return dot_bytes(sum, w, x);
}
template <class Type>
LLAMA3_INLINE I begin_sum(Type, const std::byte* start) {
    return splat_four(start);
}
template <class Type>
LLAMA3_INLINE I finish_sum(Type, I sum, const std::byte*) {
    return sum;
}
#endif

// Such a sum n as n * scale, rounded once: fma(magic + n, scale, -magic * scale), whose last part is exact, scale being an fp16.
constexpr float magic = 12582912.0f;  // 1.5 * 2^23: floats around it are the integers, and count up as their bits do
#if LLAMA3_WIDTH < 8 && !defined(LLAMA3_NEON)  // no fma: a conversion costs less
constexpr std::int32_t magic_bits = 0;
LLAMA3_INLINE F scale_sum(I sum, F scale, F) { return to_float(sum) * scale; }
#else
constexpr std::int32_t magic_bits = std::bit_cast<std::int32_t>(magic);
LLAMA3_INLINE F scale_sum(I sum, F scale, F offset) { return fma(as_float(sum), scale, offset); }
#endif

// add_dot with a token's four bytes in memory. AVX-512 reads them for all lanes as it multiplies, which no intrinsic says: an
// instruction less, but a load more where two panels meet the token. So tiles of two read two of three tokens this way.
template <class Type>
LLAMA3_INLINE I add_dot_at(Type type, I sum, I w, const std::byte* x) {
#if LLAMA3_WIDTH == 16
    static_cast<void>(type);
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const std::byte(*)[4]>(x)));
    return sum;
#else
    return add_dot(type, sum, w, splat_four(x));
#endif
}

// a · x + c with the number x in memory, for all lanes: likewise.
LLAMA3_INLINE F fma_at(F a, const std::byte* x, F c) {
#if LLAMA3_WIDTH == 16
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(a), "m"(*reinterpret_cast<const std::byte(*)[4]>(x)));
    return c;
#else
    return fma(a, splat(load_as<float>(x)), c);
#endif
}

// detail::exp, lane by lane, in the same operations, for x <= 88.72 or NaN.
LLAMA3_INLINE F exp_finite(F x) {
    const F round = splat(magic);
    const F n = fma(x, splat(1.44269504088896341f), round) - round;
    const F r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    F p = splat(1.0f / 5040);
    LLAMA3_UNROLL
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, splat(term));
#if LLAMA3_WIDTH == 16
    p = _mm512_scalef_ps(p, n);
#else
    const I exponent = to_int(n), half = shift_right(exponent, 1);
    const F first = as_float(shift_left(add_int(half, splat_int(127)), 23));
    const F second = as_float(shift_left(add_int(sub_int(exponent, half), splat_int(127)), 23));
    p = p * first * second;
#endif
    return where_less(x, splat(-87.33f), splat(0), p);
}
LLAMA3_INLINE F exp(F x) { return where_less(splat(88.72f), x, splat(std::numeric_limits<float>::infinity()), exp_finite(x)); }

constexpr int parts = panel_rows / lanes;  // vectors per panel column
#ifdef LLAMA3_BF16
constexpr bool own_bf16 = true;
#else
constexpr bool own_bf16 = false;
#endif

// ─── §9b  The kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────────

#ifdef LLAMA3_LIKE  // only products differ
using LLAMA3_LIKE::attend, LLAMA3_LIKE::join, LLAMA3_LIKE::normalise, LLAMA3_LIKE::rope, LLAMA3_LIKE::swiglu;
constexpr int float_tile_tokens = LLAMA3_LIKE::tile_tokens;
#else
constexpr int float_tile_tokens = tile_tokens;

// §5, rmsnorm.
void normalise(float* out, const float* x, const float* weight, int n, float eps) {
    F sums[parts];
    for (int h = 0; h < parts; ++h) sums[h] = splat(0);
    int i = 0;
    for (; i + 16 <= n; i += 16) LLAMA3_UNROLL
    for (int h = 0; h < parts; ++h) {
        const F value = load(x + i + h * lanes);
        sums[h] = fma(value, value, sums[h]);
    }
    float sum[16];
    for (int h = 0; h < parts; ++h) store(sum + h * lanes, sums[h]);
    for (; i < n; ++i) sum[i % 16] = detail::fma(x[i], x[i], sum[i % 16]);
    const float inverse = 1 / std::sqrt(sum_lanes(sum) / static_cast<float>(n) + eps);
    for (i = 0; i + lanes <= n; i += lanes) store(out + i, load(x + i) * splat(inverse) * load(weight + i));
    for (; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

// §5, rope; the second half of turns: [E/2][2] has -sin and cos.
void rope(float* x, const float* turns, int head_dim) {
    int i = 0;
    for (; i + lanes <= head_dim; i += lanes) {
        const F pairs = load(x + i);
        store(x + i, fma(repeat_even(pairs), load(turns + i), repeat_odd(pairs) * load(turns + head_dim + i)));
    }
    if (i < head_dim) detail::rope(x + i, turns + i, head_dim - i);
}

#endif

// §8, quantise_group, for 32 floats; returns the scale and the sum of the bytes.
LLAMA3_INLINE float quantise(const float* x, std::int8_t* bytes, std::int32_t& total) {
    constexpr int n = block_columns / lanes;
    I largest = splat_int(0);
    LLAMA3_UNROLL
    for (int i = 0; i < n; ++i) largest = max_int(largest, as_int(load(x + i * lanes)) & splat_int(0x7fffffff));
    const std::int32_t most = max_of(largest);
    const bool finite = most < 0x7f800000;
    const float magnitude = finite ? std::bit_cast<float>(most) : 0.0f;
    const float inverse = magnitude > 7.9e-31f ? 127 / magnitude : 0.0f;
    const F round = splat(magic);
    I sums = splat_int(0);
    LLAMA3_UNROLL
    for (int i = 0; i < n; ++i) {
        const F value = finite ? load(x + i * lanes) : splat(0);
        const I rounded = sub_int(as_int(fma(value, splat(inverse), round)), as_int(round));
        store_bytes(bytes + i * lanes, rounded);
        sums = add_int(sums, rounded);
    }
    total = sum_of(sums);
    return finite ? (magnitude > 7.9e-31f ? magnitude / 127 : 0.0f) : std::numeric_limits<float>::quiet_NaN();
}

// Puts the columns of up to `together` tokens in the order in which a tile reads them: f32 [column][token]; bf16
// the same, rounded, or [pair of columns][token] for dot_bf16; for q8 and q4 per block [8 groups of 4 bytes][token],
// [token] scales, [token] int32 where a sum of products begins: magic_bits - bias Σ bytes.
void pack(Format format, std::byte* out, const float* x, std::size_t stride, int tokens, int together, int columns) {
    const std::size_t n = static_cast<std::size_t>(together), width = static_cast<std::size_t>(round_up(columns, 64));
    if (tokens < together) std::memset(out, 0, n * packed_bytes(format, columns));
    for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
        const float* row = x + t * stride;
        if (format == Format::f32)
            for (std::size_t c = 0; c < width; ++c) store_as(out + 4 * (c * n + t), row[c]);
        else if (format == Format::bf16)
            for (std::size_t c = 0; c < width; ++c)
                if (own_bf16) store_as(out + 4 * (c / 2 * n + t) + 2 * (c % 2), to_bf16(row[c]));
                else store_as(out + 4 * (c * n + t), from_bf16(to_bf16(row[c])));
        else
            for (std::size_t block = 0; block < width / block_columns; ++block) {
                std::int8_t bytes[block_columns];
                std::int32_t total;
                const float scale = quantise(row + block * block_columns, bytes, total);
                std::byte* to = out + block * 40 * n;
                for (std::size_t g = 0; g < 8; ++g) std::memcpy(to + 4 * (g * n + t), bytes + 4 * g, 4);
                store_as(to + 32 * n + 4 * t, scale);
                store_as(to + 36 * n + 4 * t, magic_bits - (format == Format::q8 ? signed_bias : 8) * total);
            }
    }
}

// Weights that were unpacked for many tokens: of bf16 the floats; of q8 and q4 per unit [16 groups of 4 columns][16 rows] of 4
// bytes, as add_dot takes them, and [2 blocks][16 rows] float scales.
template <class Type>
struct Unpacked : Type {
    static constexpr int vectors = 16;
    static constexpr std::size_t bytes = Type::format == Format::f32 ? 64 : 64 * vectors + 128;  // of a unit
};
template <class Type>
constexpr bool is_unpacked = requires { Type::bytes; };

// Bytes of a unit, and of a packed token that meet it.
template <class Type>
constexpr std::size_t read_bytes = unit_bytes(Type::format);
template <class Type>
constexpr std::size_t read_bytes<Unpacked<Type>> = Unpacked<Type>::bytes;
template <class Type>
constexpr std::size_t packed_unit = Type::format == Format::f32    ? 4
                                    : Type::format == Format::bf16 ? (own_bf16 ? 4 : 8)
                                                                   : 2 * (block_columns + 8);

// Fetches a line that one of P streams of weights reads soon; where there is more than one, or more than one token, and so more to
// do meanwhile, a farther one into the second-level cache, which can wait for more lines than the first. Lines on their way are
// those of fetched_ahead bytes of all streams, and of four times as many.
template <class Type, int P, int N>
LLAMA3_INLINE void fetch_ahead(const std::byte* w) {
    if constexpr (!is_unpacked<Type>) __builtin_prefetch(w + fetched_ahead / P);
    if constexpr (!is_unpacked<Type> && P * N > 1) __builtin_prefetch(w + 4 * fetched_ahead / P, 0, 2);
}

// One unit of P panels times N tokens, added to the chains sums[panel][part][token]; x moves on to the next unit.
template <int P, int N, class Type>
    requires(Type::format == Format::f32)
LLAMA3_INLINE void multiply_unit(Type, F (&sums)[P][parts][N], const std::byte* const (&w)[P], const std::byte*& x) {
    LLAMA3_UNROLL
    for (int p = 0; p < P; ++p) fetch_ahead<Type, P, N>(w[p]);
    LLAMA3_UNROLL
    for (int t = 0; t < N; ++t) {
        const F value = splat(load_as<float>(x + 4 * t));
        LLAMA3_UNROLL
        for (int p = 0; p < P; ++p) LLAMA3_UNROLL
        for (int h = 0; h < parts; ++h) {
            const F weights = load(reinterpret_cast<const float*>(w[p]) + h * lanes);
            sums[p][h][t] = t % 2 == 1 ? fma_at(weights, x + 4 * t, sums[p][h][t]) : fma(weights, value, sums[p][h][t]);
        }
    }
    x += 4 * N;
}

template <int P, int N>
LLAMA3_INLINE void multiply_unit(BF16, F (&sums)[P][parts][N], const std::byte* const (&w)[P], const std::byte*& x) {
    I pairs[P][parts];
    LLAMA3_UNROLL
    for (int p = 0; p < P; ++p) {
        fetch_ahead<BF16, P, N>(w[p]);
        LLAMA3_UNROLL
        for (int h = 0; h < parts; ++h) pairs[p][h] = load_bits(w[p] + h * lanes * 4);
    }
#ifdef LLAMA3_BF16
    LLAMA3_UNROLL
    for (int t = 0; t < N; ++t, x += 4) LLAMA3_UNROLL
    for (int p = 0; p < P; ++p) LLAMA3_UNROLL
    for (int h = 0; h < parts; ++h) sums[p][h][t] = dot_bf16(sums[p][h][t], pairs[p][h], splat_four(x));
#else
    LLAMA3_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
        F values[P][parts];
        LLAMA3_UNROLL
        for (int p = 0; p < P; ++p) LLAMA3_UNROLL
        for (int h = 0; h < parts; ++h)
            values[p][h] = as_float(odd ? pairs[p][h] & splat_int(static_cast<int>(0xffff0000u)) : shift_left(pairs[p][h], 16));
        LLAMA3_UNROLL
        for (int t = 0; t < N; ++t, x += 4) {
            const F value = splat(load_as<float>(x));
            LLAMA3_UNROLL
            for (int p = 0; p < P; ++p) LLAMA3_UNROLL
            for (int h = 0; h < parts; ++h) sums[p][h][t] = fma(values[p][h], value, sums[p][h][t]);
        }
    }
#endif
}

// Four columns of a block's weights for add_dot, the v-th of 8.
LLAMA3_INLINE I load_four(Q8, const std::byte* block, int v) { return flip_signs(load_bits(block + 64 * v)); }
LLAMA3_INLINE I load_four(Q4, const std::byte* block, int v) {
    const I nibbles = load_bits(block + v / 2 * 64);
    return v % 2 ? high_nibbles(nibbles) : low_nibbles(nibbles);
}
template <class Type>
LLAMA3_INLINE I load_four(Unpacked<Type>, const std::byte* block, int v) {
    return load_bits(block + 64 * v);
}

template <class Type>
LLAMA3_INLINE F load_scales(Type, const std::byte* unit, int block, int part) {
    return load_fp16(reinterpret_cast<const std::uint16_t*>(unit + 64 * Type::vectors + 32 * block) + part * lanes);
}
template <class Type>
LLAMA3_INLINE F load_scales(Unpacked<Type>, const std::byte* unit, int block, int part) {
    return load(reinterpret_cast<const float*>(unit + 64 * 16 + 64 * block) + part * lanes);
}

// Integer dot products of each block, then sums += dots * scales of the weights * scales of the tokens.
template <int P, int N, class Type>
LLAMA3_INLINE void multiply_unit(Type type, F (&sums)[P][parts][N], const std::byte* const (&w)[P], const std::byte*& x) {
    constexpr int half = static_cast<int>(unit_bytes(Type::format) / 2);
    for (int block = 0; block < 2; ++block, x += 40 * N) {
        I dots[P][parts][N];
        LLAMA3_UNROLL
        for (int p = 0; p < P; ++p) LLAMA3_UNROLL
        for (int h = 0; h < parts; ++h) LLAMA3_UNROLL
        for (int t = 0; t < N; ++t) dots[p][h][t] = begin_sum(type, x + 36 * N + 4 * t);
        LLAMA3_UNROLL
        for (int v = 0; v < 8; ++v) {
            LLAMA3_UNROLL
            for (int p = 0; p < P; ++p)
                if (Type::vectors * v % 16 == 0) fetch_ahead<Type, P, N>(w[p] + half * block + 4 * Type::vectors * v);
            I four[P][parts];
            LLAMA3_UNROLL
            for (int p = 0; p < P; ++p) LLAMA3_UNROLL
            for (int h = 0; h < parts; ++h) four[p][h] = load_four(type, w[p] + 32 * Type::vectors * block + h * lanes * 4, v);
            LLAMA3_UNROLL
            for (int t = 0; t < N; ++t) {
                const std::byte* const token = x + 4 * (v * N + t);
                const I loaded = splat_four(token);
                LLAMA3_UNROLL
                for (int p = 0; p < P; ++p) LLAMA3_UNROLL
                for (int h = 0; h < parts; ++h)
                    dots[p][h][t] = P == 1 || t % 3 != 0 ? add_dot_at(type, dots[p][h][t], four[p][h], token)
                                                         : add_dot(type, dots[p][h][t], four[p][h], loaded);
            }
        }
        LLAMA3_UNROLL
        for (int p = 0; p < P; ++p) fetch_ahead<Type, P, N>(w[p] + half * block + 32 * Type::vectors);
        LLAMA3_UNROLL
        for (int p = 0; p < P; ++p) LLAMA3_UNROLL
        for (int h = 0; h < parts; ++h) {
            const F w_scale = load_scales(type, w[p], block, h), offset = w_scale * splat(-magic);
            LLAMA3_UNROLL
            for (int t = 0; t < N; ++t) {
                const F dot = scale_sum(finish_sum(type, dots[p][h][t], x + 36 * N + 4 * t), w_scale, offset);
                sums[p][h][t] = fma_at(dot, x + 32 * N + 4 * t, sums[p][h][t]);
            }
        }
    }
}

// A register tile, P panels times N tokens: the sums [panel][part][token] of `units` units, begun at 0 or where they stand. Where
// weights are read as Unpacked ones, the packed columns of the next tile, `next` bytes on, are fetched meanwhile.
template <class Read, int P, int N>
void multiply_tile(F* result, bool fresh, const std::byte* const* w, const std::byte* x, int units, std::size_t next) {
    F sums[P][parts][N];
    const std::byte* from[P];
    LLAMA3_UNROLL
    for (int p = 0; p < P; ++p) {
        from[p] = w[p];
        LLAMA3_UNROLL
        for (int h = 0; h < parts; ++h) LLAMA3_UNROLL
        for (int t = 0; t < N; ++t) sums[p][h][t] = fresh ? splat(0) : result[(p * parts + h) * N + t];
    }
    for (int i = 0; i < units; ++i) {
        if constexpr (is_unpacked<Read>) LLAMA3_UNROLL
        for (std::size_t line = 0; line < N * packed_unit<Read>; line += 64) __builtin_prefetch(x + next + line);
        multiply_unit<P, N>(Read{}, sums, from, x);
        LLAMA3_UNROLL
        for (int p = 0; p < P; ++p) from[p] += read_bytes<Read>;
    }
    LLAMA3_UNROLL
    for (int p = 0; p < P; ++p) LLAMA3_UNROLL
    for (int h = 0; h < parts; ++h) LLAMA3_UNROLL
    for (int t = 0; t < N; ++t) result[(p * parts + h) * N + t] = sums[p][h][t];
}

template <class Type>
void unpack(const std::byte* from, int units, std::byte* out) {
    const std::size_t bytes = static_cast<std::size_t>(units) * unit_bytes(Type::format);
    for (const std::byte* const end = from + bytes; from < end; from += unit_bytes(Type::format)) {
        if constexpr (Type::format == Format::bf16) {
            LLAMA3_UNROLL
            for (int h = 0; h < parts; ++h, out += lanes * 4) {
                const I pairs = load_bits(from + h * lanes * 4);
                store_bits(out, shift_left(pairs, 16));
                store_bits(out + 64, pairs & splat_int(static_cast<int>(0xffff0000u)));
            }
            out += 64;
        } else {
            for (int block = 0; block < 2; ++block) LLAMA3_UNROLL
            for (int h = 0; h < parts; ++h) {
                LLAMA3_UNROLL
                for (int v = 0; v < 8; ++v)
                    store_bits(out + 512 * block + 64 * v + h * lanes * 4,
                               load_four(Type{}, from + 32 * Type::vectors * block + h * lanes * 4, v));
                store(reinterpret_cast<float*>(out + 1024 + 64 * block) + h * lanes, load_scales(Type{}, from, block, h));
            }
            out += Unpacked<Type>::bytes;
        }
    }
}

#ifdef LLAMA3_LIKE
using LLAMA3_LIKE::most_panels, LLAMA3_LIKE::multiply_few, LLAMA3_LIKE::multiply_many, LLAMA3_LIKE::Tile;
#else
// One multiply_tile, for code that walks over panels and tokens and is the same for all of them.
struct Tile {
    int panels, tokens;                   // P, N
    int units;                            // that are read of each that is stored
    std::size_t unit_bytes, token_bytes;  // of a unit that is read, and of a packed token that meets it
    void (*multiply)(F* result, bool fresh, const std::byte* const* w, const std::byte* x, int units, std::size_t next);
    void (*unpack)(const std::byte* from, int units, std::byte* out);  // nullptr: weights are read as they are stored
};
constexpr int most_panels = 4;

// Joins chains by the tree: the sums of segment s are added to those of the segments before it, two of a level to one of the next.
// levels: [level, step], the last of which has the sum of all segments in the end.
void join_segment(int s, F* sums, int size, F* levels, int step) {
    for (; s % 2 != 0; s /= 2, levels += step)
        for (int i = 0; i < size; ++i) sums[i] = levels[i] + sums[i];
    for (int i = 0; i < size; ++i) levels[i] = sums[i];
}
constexpr int last_level(int segments) { return static_cast<int>(std::bit_width(static_cast<unsigned>(segments))) - 1; }
constexpr int join_levels = last_level(max_segments) + 1;

// Stores the sums [part, together] of a panel and the `tokens` from `token` on, or adds them to what is there.
void put_out(const Product& product, int panel, int token, int tokens, const F* sums, int together) {
    float* out = product.output(token, panel);
    for (int t = 0; t < tokens; ++t, out += product.stride)
        for (int h = 0; h < parts; ++h) {
            const F sum = sums[h * together + t];
            store(out + h * lanes, product.add ? load(out + h * lanes) + sum : sum);
        }
}

// Panels `step` apart times `tiles` register tiles, from `token` on: one chain per segment, joined by the tree. Where weights are
// unpacked, so many units at a time meet all tokens as stay in the first-level cache. Panels from `last` on give no output: where
// the panels do not fill the tile, it reads the last one again, which costs less than the code of narrower tiles would.
void multiply_tiles(const Product& product, const Tile& tile, int panel, int step, int last, int token, int tiles) {
    const Matrix& w = product.w;
    const int P = tile.panels, N = tile.tokens, size = P * parts * N;
    const int units = w.units() / w.segments, top = last_level(w.segments);
    const std::size_t panel_bytes = static_cast<std::size_t>(tile.units) * tile.unit_bytes,  // of a unit that is stored
        token_bytes = packed_bytes(w.format, w.columns), tile_bytes = static_cast<std::size_t>(N) * token_bytes;
    const int at_once =
        tile.unpack ? equal_parts(units, static_cast<int>(weights_at_once / (static_cast<std::size_t>(P) * panel_bytes)))
                    : units;
    const std::byte *panels[most_panels], *begin[most_panels];
    for (int p = 0; p < P; ++p) panels[p] = w.panel(std::min(panel + p * step, last - 1));
    const std::byte* x = product.x + static_cast<std::size_t>(token) * token_bytes;
    F* const chains = reinterpret_cast<F*>(product.room);  // [level, tiles, size]
    for (int s = 0; s < w.segments; ++s)
        for (int u = 0, n; u < units; u += n) {
            n = std::min(at_once, units - u);
            const bool ends = u + n == units, is_last = ends && s + 1 == w.segments;
            for (int p = 0; p < P; ++p) {
                begin[p] = panels[p];
                if (tile.unpack) {
                    std::byte* const out = product.room + chains_at_once + static_cast<std::size_t>(p * n) * panel_bytes;
                    tile.unpack(panels[p], n, out);
                    begin[p] = out;
                }
                panels[p] += static_cast<std::size_t>(n) * unit_bytes(w.format);
            }
            // What is unpacked next arrives meanwhile, `ahead` bytes of each panel with each tile: all at once they would be waited for.
            const std::int64_t ahead =
                tile.unpack ? round_up(static_cast<std::int64_t>(unit_bytes(w.format)) * n / tiles, 64) : 0;
            const std::byte* next = panels[0] + (is_last ? static_cast<std::size_t>(P - 1) * w.panel_stride : 0);
            for (int i = 0; i < tiles; ++i) {
                const int first = token + i * N;
                F* const result = chains + (top * tiles + i) * size;
                for (std::int64_t line = 0; line < ahead; line += 64, next += 64)
                    for (int p = 0; p < P; ++p) __builtin_prefetch(next + static_cast<std::size_t>(p) * w.panel_stride, 0, 2);
                for (int p = 0; is_last && p < P; ++p)  // the output arrives while the tile is computed
                    for (int t = 0; t < N; ++t) __builtin_prefetch(product.output(first + t, panel + p * step), 1);
                tile.multiply(result, u == 0, begin, x + static_cast<std::size_t>(i) * tile_bytes, n * tile.units, tile_bytes);
                if (ends && top > 0) join_segment(s, result, size, chains + i * size, tiles * size);
                for (int p = 0; is_last && p < P && panel + p * step < last; ++p)
                    put_out(product, panel + p * step, first, std::min(N, product.tokens - first), result + p * parts * N, N);
            }
            x += static_cast<std::size_t>(n * tile.units * N) * tile.token_bytes;
        }
}

// Many tokens: panels that stay in the second-level cache meet all of them, or as many as stay in the third-level cache until the
// next panels come, or as many as there is room for their chains.
void multiply_many(const Product& product, const Tile& tile) {
    const Matrix& w = product.w;
    const std::size_t P = static_cast<std::size_t>(tile.panels), N = static_cast<std::size_t>(tile.tokens),
                      chain_bytes = P * parts * N * sizeof(F) * static_cast<std::size_t>(last_level(w.segments) + 1);
    const int panels = std::max(static_cast<int>(panels_at_once / (P * w.panel_stride)), 1) * tile.panels;
    const int tiles = (product.tokens + tile.tokens - 1) / tile.tokens,
              cached = equal_parts(tiles, static_cast<int>(tokens_at_once / (N * packed_bytes(w.format, w.columns)))),
              at_once = equal_parts(cached, static_cast<int>(chains_at_once / chain_bytes));
    for (int begin = 0; begin < tiles; begin += cached)
        for (int first = product.first_panel; first < product.last_panel; first += panels)
            for (int t = begin, end = std::min(begin + cached, tiles); t < end; t += at_once)
                for (int panel = first; panel < std::min(first + panels, product.last_panel); panel += tile.panels)
                    multiply_tiles(product, tile, panel, 1, product.last_panel, t * tile.tokens, std::min(at_once, end - t));
}

// Few tokens, of which a tile takes as many as were packed together. Panels are cut into as many runs as a tile has panels: streams
// that are read side by side. Several tiles share panels that stay in the cache.
void multiply_few(const Product& product, const Tile& tile) {
    const int block = product.tokens <= product.together ? product.last_panel - product.first_panel : 16;
    for (int first = product.first_panel; first < product.last_panel; first += block) {
        const int last = std::min(first + block, product.last_panel), run = (last - first + tile.panels - 1) / tile.panels;
        for (int t = 0; t < product.tokens; t += product.together)
            for (int panel = first; panel < first + run; ++panel) multiply_tiles(product, tile, panel, run, last, t, 1);
    }
}
#endif

// What many tokens read: unpacked weights, where that takes enough work off a tile.
template <class Type>
using Many = std::conditional_t<
    lanes == 16 && Type::format == Format::bf16 && !own_bf16, Unpacked<F32>,
    std::conditional_t<(signed_bias != 0 && Type::format == Format::q8) || (lanes >= 8 && Type::format == Format::q4),
                       Unpacked<Type>, Type>>;

template <class Type, class Read, int P, int N>
constexpr Tile tile = [] {
    Tile t{P, N, unit_columns(Type::format) / unit_columns(Read::format), read_bytes<Read>, packed_unit<Read>,
           multiply_tile<Read, P, N>, nullptr};
    if constexpr (is_unpacked<Read>) t.unpack = unpack<Type>;
    return t;
}();

template <class Type, int N>
const Tile& few_tile(const Product& product) {
    if constexpr (N > 1)
        if (product.together < N) return few_tile<Type, N - 1>(product);
    if constexpr (lanes >= 8 && N == 1)
        if (product.streams == most_panels) return tile<Type, Type, most_panels, 1>;
    return tile<Type, Type, 1, N>;
}

template <class Type>
void multiply_as(const Product& product) {
    if (product.together != tile_tokens || product.tokens < 4 * tile_tokens)
        return multiply_few(product, few_tile<Type, few_tokens>(product));
    if constexpr (Type::format != Format::q4)
        if (product.tokens <= 7 * tile_tokens)  // unpacking would not pay
            return multiply_many(product, tile<Type, Type, tile_panels, tile_tokens>);
    multiply_many(product, tile<Type, Many<Type>, tile_panels, tile_tokens>);
}

void multiply(const Product& product) {
#ifdef LLAMA3_BF16
    if (product.w.format == Format::bf16) multiply_as<BF16>(product);
    else LLAMA3_LIKE::multiply(product);
#elif defined(LLAMA3_LIKE)
    if (product.w.format == Format::q8) multiply_as<Q8>(product);
    else if (product.w.format == Format::q4) multiply_as<Q4>(product);
    else LLAMA3_LIKE::multiply(product);
#else
    with_format(product.w.format, [&](auto type) { multiply_as<decltype(type)>(product); });
#endif
}

#ifndef LLAMA3_LIKE
void swiglu(float* gate, const float* up, int n) {
    for (int i = 0; i < n; i += lanes) {
        const F g = load(gate + i);
        store(gate + i, g / (splat(1) + exp(splat(0) - g)) * load(up + i));
    }
}

// 16 keys' channel e, or a vector of a value's channels, as floats.
template <Format kv>
LLAMA3_INLINE F load_cached(const std::byte* from, std::size_t index, F scale) {
    if constexpr (kv == Format::f32) return load(reinterpret_cast<const float*>(from) + index);
    else if constexpr (kv == Format::bf16) return load_bf16(from + 2 * index);
    else return load_bytes(from + index) * scale;
}

// Query heads at a time, and vectors of positions or channels that each meets: as many sums as there are registers for.
constexpr int attention_heads = 6, attention_vectors = lanes == 8 ? 2 : 4, last_vectors = lanes == 16 ? 2 : attention_vectors;
constexpr int attention_step = attention_vectors * lanes;

// `count` positions from `first` on, a multiple of attention_step: their keys [position / step][E][step], their values
// [position][attention_width].
template <Format kv>
void decode_chunk(const CacheView& cache, bool keys, int first, int count, float* to) {
    const std::size_t width = static_cast<std::size_t>(cache.head_dim), padded = padded_width(cache.head_dim),
                      groups = scale_groups(cache.head_dim);
    // Sixteens: positions of one channel, or channels of one position. A group of them has one vector of scales.
    const std::size_t sixteens = keys ? width : padded / 16, group = keys ? block_columns : block_columns / 16,
                      stride = keys ? attention_step : 16;
    for (int j = 0; j < count; j += keys ? 16 : 1) {
        const std::size_t p = static_cast<std::size_t>(first + j);
        const std::byte* from = keys ? cache.keys : cache.values;
        float* out = keys ? to + static_cast<std::size_t>(j / attention_step * attention_step) * width + j % attention_step
                          : to + static_cast<std::size_t>(j) * attention_width(cache.head_dim);
        for (std::size_t g = 0; g < groups; ++g) {
            F scales[parts];
            for (int h = 0; h < parts; ++h) {
                scales[h] = splat(0);
                if constexpr (kv == Format::q8)
                    scales[h] = keys ? load_fp16(cache.key_scales + (p / 16 * groups + g) * 16 + h * lanes)
                                     : splat(from_fp16(cache.value_scales[p * groups + g]));
            }
            for (std::size_t i = g * group; i < std::min(sixteens, (g + 1) * group); ++i) LLAMA3_UNROLL
            for (int h = 0; h < parts; ++h)
                store(out + i * stride + h * lanes,
                      load_cached<kv>(from, (keys ? p * width : p * padded) + i * 16 + static_cast<std::size_t>(h * lanes),
                                      scales[h]));
        }
    }
}

struct HeadProducts {
    float* sums;  // [heads, sums_stride], V vectors of each
    std::size_t sums_stride;
    const float* factors;  // [heads, score_stride]
    const float* vectors;  // [count, stride]
    std::size_t stride;
    int count;
    bool fresh;              // sums start at 0
    const std::byte* ahead;  // what will be read soon
    std::size_t ahead_stride;
};

// sums[n] += Σ_i factors[n][i] vectors[i] for N heads, a chain per element: scores (i: channel, lane: position) and the mix of
// values (i: position, lane: channel).
template <int N, int V = attention_vectors>
void add_products(const HeadProducts& p, int n) {
    if constexpr (N > 1)
        if (n < N) return add_products<N - 1, V>(p, n);
    F sums[N][V];
    LLAMA3_UNROLL
    for (int h = 0; h < N; ++h) LLAMA3_UNROLL
    for (int v = 0; v < V; ++v)
        sums[h][v] = p.fresh ? splat(0) : load(p.sums + static_cast<std::size_t>(h) * p.sums_stride + v * lanes);
    const float *factors = p.factors, *vectors = p.vectors;
    const std::byte* ahead = p.ahead;
    for (const float* end = factors + p.count; factors < end; ++factors, vectors += p.stride, ahead += p.ahead_stride) {
        __builtin_prefetch(ahead, 0, 2);
        F x[V];
        LLAMA3_UNROLL
        for (int v = 0; v < V; ++v) x[v] = load(vectors + v * lanes);
        LLAMA3_UNROLL
        for (int h = 0; h < N; ++h) {
            const F factor = splat(factors[h * score_stride]);
            LLAMA3_UNROLL
            for (int v = 0; v < V; ++v) sums[h][v] = fma(factor, x[v], sums[h][v]);
        }
    }
    LLAMA3_UNROLL
    for (int h = 0; h < N; ++h) LLAMA3_UNROLL
    for (int v = 0; v < V; ++v) store(p.sums + static_cast<std::size_t>(h) * p.sums_stride + v * lanes, sums[h][v]);
}

// The largest of row[j], j < count; what follows is -∞ up to a multiple of 16.
__attribute__((noinline)) float largest_score(float* row, int count) {
    F most = splat(-std::numeric_limits<float>::infinity());
    for (int j = count; j % 16 != 0; ++j) row[j] = -std::numeric_limits<float>::infinity();
    for (int j = 0; j < count; j += 16) LLAMA3_UNROLL
    for (int h = 0; h < 16; h += lanes) most = max(most, load(row + j + h));
    float values[lanes];
    store(values, most);
    for (int half = lanes / 2; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) values[i] = std::max(values[i], values[i + half]);
    return values[0];
}

// row[j] = e^(scale row[j] - largest), none of which is above 1; returns their sum, over 16 lanes.
__attribute__((noinline)) float exponentiate(float* row, int count, float scale, float largest) {
    F sums[parts];
    for (int h = 0; h < parts; ++h) sums[h] = splat(0);
    for (int j = 0; j < count; j += 16) LLAMA3_UNROLL
    for (int h = 0; h < parts; ++h) {
        const F p = exp_finite(load(row + j + h * lanes) * splat(scale) - splat(largest));
        store(row + j + h * lanes, p);
        sums[h] = sums[h] + p;
    }
    float values[16];
    for (int h = 0; h < parts; ++h) store(values + h * lanes, sums[h]);
    return sum_lanes(values);
}

// One segment (§5, attend_reference): all scores, then the softmax, then the mix.
void attend_segment(const Attention& a, int segment, float* mix) {
    const CacheView& cache = a.cache;
    const std::size_t width = static_cast<std::size_t>(cache.head_dim), mix_width = attention_width(cache.head_dim),
                      padded = padded_width(cache.head_dim), element = element_bytes(cache.format);
    const auto decode = cache.format == Format::f32    ? decode_chunk<Format::f32>
                        : cache.format == Format::bf16 ? decode_chunk<Format::bf16>
                                                       : decode_chunk<Format::q8>;
    const int queries = a.queries(), count = a.seen(queries - 1, segment);
    int begin = 0;
    while (a.seen(begin, segment) == 0) begin += a.n_queries;
    const auto row = [](float* rows, int q) { return rows + static_cast<std::size_t>(q) * score_stride; };
    float *const scores = a.scratch, *const vectors = row(scores, queries),
                 *const packed = vectors + attention_chunk * mix_width;
    for (int q = begin; q < queries; ++q)
        for (std::size_t e = 0; e < width; e += attention_segment)
            std::copy_n(a.query + static_cast<std::size_t>(q / a.n_queries) * a.stride +
                            static_cast<std::size_t>(q % a.n_queries) * width + e,
                        std::min<std::size_t>(width - e, attention_segment),
                        row(packed, static_cast<int>(e) / attention_segment * queries + q));
    for (int j = 0; j < count; j += attention_chunk) {
        const std::size_t position = static_cast<std::size_t>(j);
        decode(cache, true, j, static_cast<int>(round_up(std::min(count - j, attention_chunk), 16)), vectors);
        for (int q = begin, n; q < queries; q += n) {
            n = std::min(queries - q, attention_heads);
            const int seen = std::min(a.seen(q + n - 1, segment) - j, attention_chunk);
            for (int i = 0; i < seen; i += attention_step) {
                const auto add_scores = seen - i <= last_vectors * lanes ? add_products<attention_heads, last_vectors>
                                                                         : add_products<attention_heads>;
                for (std::size_t e = 0; e < width; e += attention_segment)
                    add_scores({row(scores, q) + j + i, score_stride,
                                row(packed, static_cast<int>(e) / attention_segment * queries + q),
                                vectors + (static_cast<std::size_t>(i) * width + e * attention_step), attention_step,
                                static_cast<int>(std::min<std::size_t>(width - e, attention_segment)), e == 0,
                                cache.keys + (position + attention_chunk + static_cast<std::size_t>(i)) * width * element,
                                attention_step * element},
                               n);
            }
        }
    }
    float *const largest = mix + static_cast<std::size_t>(queries) * mix_width, *const total = largest + queries;
    const float scale = 1 / std::sqrt(static_cast<float>(cache.head_dim));
    // Two loops: the processor can look for the largest score of one head while it still waits for that of another.
    for (int q = begin; q < queries; ++q) largest[q] = largest_score(row(scores, q), a.seen(q, segment)) * scale;
    for (int q = begin; q < queries; ++q) total[q] = exponentiate(row(scores, q), a.seen(q, segment), scale, largest[q]);
    for (int j = 0; j < count; j += attention_chunk) {
        const std::size_t position = static_cast<std::size_t>(j);
        const int here = std::min(count - j, attention_chunk);
        decode(cache, false, j, here, vectors);
        for (std::size_t c = 0; c < mix_width; c += attention_step)
            for (int q = begin, n; q < queries; q += n) {
                n = std::min(queries - q, attention_heads);
                // Together as far as the first of them sees: a product with a weight of zero would still let NaN through.
                const int common = std::clamp(a.seen(q, segment) - j, 0, here);
                HeadProducts p{mix + static_cast<std::size_t>(q) * mix_width + c,
                               mix_width,
                               row(scores, q) + j,
                               vectors + c,
                               mix_width,
                               common,
                               j == 0,
                               cache.values + ((position + attention_chunk) * padded + c) * element,
                               padded * element};
                add_products<attention_heads>(p, n);
                p.fresh = false, p.factors += common, p.vectors += static_cast<std::size_t>(common) * mix_width;
                for (int other = q + 1; other < q + n && common < here; ++other) {
                    p.sums += mix_width, p.factors += score_stride;
                    p.count = std::min(a.seen(other, segment) - j, here) - common;
                    if (p.count > 0) add_products<1>(p, 1);
                }
            }
    }
}

constexpr int most_row_width = 256;  // of a head

// The same for a single row, whose few heads use every key and value once: these go from the cache straight into registers, keys
// from several places of memory at once (see multiply_few).
template <Format kv>
void attend_row(const Attention& a, int segment, float* mix) {
    constexpr int heads = 4, vectors = lanes == 16 ? 4 : 2, block = 32, most_groups = most_row_width / block_columns;
    constexpr std::size_t element = element_bytes(kv), ahead = 1024;  // bytes
    const CacheView& cache = a.cache;
    const std::size_t width = static_cast<std::size_t>(cache.head_dim), groups = width / block_columns;
    const int count = a.seen(0, segment), tiles = (count + 15) / 16, run = (tiles + vectors - 1) / vectors;
    const auto row = [&](int head) { return a.scratch + head * score_stride; };
    // `heads` of them from `first` on, where the last is repeated if there are not as many
    const auto head = [&](int first, int h) { return static_cast<std::size_t>(std::min(first + h, a.n_queries - 1)); };
    for (int i = 0; i < run * parts; ++i)
        for (int first = 0; first < a.n_queries; first += heads) {
            const int tile = i / parts, lane = i % parts * lanes;
            const float* query[heads];
            std::size_t at[vectors];
            F sums[heads][vectors];
            for (int v = 0; v < vectors; ++v) at[v] = static_cast<std::size_t>(std::min(tile + v * run, tiles - 1));
            LLAMA3_UNROLL
            for (int h = 0; h < heads; ++h) {
                query[h] = a.query + head(first, h) * width;
                LLAMA3_UNROLL
                for (int v = 0; v < vectors; ++v) sums[h][v] = splat(0);
            }
            for (std::size_t g = 0; g < groups; ++g) {
                F scales[vectors];
                for (int v = 0; v < vectors; ++v)
                    scales[v] = kv == Format::q8 ? load_fp16(cache.key_scales + (at[v] * groups + g) * 16 + lane) : splat(0);
                for (std::size_t e = g * block_columns; e < (g + 1) * block_columns; ++e) {
                    F x[vectors];
                    LLAMA3_UNROLL
                    for (int v = 0; v < vectors; ++v) {
                        const std::size_t from = (at[v] * width + e) * 16 + static_cast<std::size_t>(lane);
                        __builtin_prefetch(cache.keys + from * element + ahead);
                        x[v] = load_cached<kv>(cache.keys, from, scales[v]);
                    }
                    LLAMA3_UNROLL
                    for (int h = 0; h < heads; ++h) LLAMA3_UNROLL
                    for (int v = 0; v < vectors; ++v) sums[h][v] = fma(splat(query[h][e]), x[v], sums[h][v]);
                }
            }
            LLAMA3_UNROLL
            for (int h = 0; h < heads; ++h) LLAMA3_UNROLL
            for (int v = 0; v < vectors; ++v) store(row(first + h) + (tile + v * run) * 16 + lane, sums[h][v]);
        }
    float *const largest = mix + static_cast<std::size_t>(a.n_queries) * width, *const total = largest + a.n_queries;
    const float scale = 1 / std::sqrt(static_cast<float>(cache.head_dim));
    for (int h = 0; h < a.n_queries; ++h) largest[h] = largest_score(row(h), count) * scale;
    for (int h = 0; h < a.n_queries; ++h) total[h] = exponentiate(row(h), count, scale, largest[h]);
    for (int j = 0; j < count; j += block) {
        const std::size_t begin = static_cast<std::size_t>(j), end = static_cast<std::size_t>(std::min(j + block, count));
        float scales[block * most_groups];
        if constexpr (kv == Format::q8)
            for (std::size_t i = begin * groups; i < end * groups; i += lanes)
                store(scales + (i - begin * groups), load_fp16(cache.value_scales + i));
        for (int first = 0; first < a.n_queries; first += heads)
            for (std::size_t c = 0; c < width; c += vectors * lanes) {
                F sums[heads][vectors];
                LLAMA3_UNROLL
                for (int h = 0; h < heads; ++h) LLAMA3_UNROLL
                for (int v = 0; v < vectors; ++v)
                    sums[h][v] = j == 0 ? splat(0) : load(mix + head(first, h) * width + c + v * lanes);
                const float* const weights = row(first);
                const std::byte* values = cache.values + (begin * width + c) * element;
                for (std::size_t p = begin; p < end; ++p, values += width * element) {
                    F x[vectors];
                    LLAMA3_UNROLL
                    for (int v = 0; v < vectors; ++v) {
                        const std::size_t channel = static_cast<std::size_t>(v * lanes);
                        if (channel * element % 64 == 0) __builtin_prefetch(values + channel * element + ahead);
                        float factor = 0;
                        if constexpr (kv == Format::q8) factor = scales[(p - begin) * groups + (c + channel) / block_columns];
                        x[v] = load_cached<kv>(values, channel, splat(factor));
                    }
                    LLAMA3_UNROLL
                    for (int h = 0; h < heads; ++h) LLAMA3_UNROLL
                    for (int v = 0; v < vectors; ++v) {
                        const F weight = splat(weights[p + static_cast<std::size_t>(h * score_stride)]);
                        sums[h][v] = fma(weight, x[v], sums[h][v]);
                    }
                }
                for (int h = 0; h < std::min(heads, a.n_queries - first); ++h) LLAMA3_UNROLL
                for (int v = 0; v < vectors; ++v) store(mix + head(first, h) * width + c + v * lanes, sums[h][v]);
            }
    }
}

void attend(const Attention& a, int segment, float* mix) {
    if constexpr (reads_rows != 0)
        if (a.n_rows == 1 && a.cache.head_dim % 64 == 0 && a.cache.head_dim <= most_row_width) {
            if (a.cache.format == Format::f32) return attend_row<Format::f32>(a, segment, mix);
            if (a.cache.format == Format::bf16) return attend_row<Format::bf16>(a, segment, mix);
            return attend_row<Format::q8>(a, segment, mix);
        }
    attend_segment(a, segment, mix);
}

// §5, attend_reference: the running softmax over segments.
void join(const Attention& a, int segment, float* joined, const float* mix) {
    const std::size_t width = static_cast<std::size_t>(a.cache.head_dim), mix_width = attention_width(a.cache.head_dim),
                      queries = static_cast<std::size_t>(a.queries());
    for (std::size_t q = 0; q < queries; ++q) {
        float *to = joined + q * mix_width, *largest = joined + queries * mix_width + q, *total = largest + queries;
        if (segment > 0 && a.seen(static_cast<int>(q), segment) > 0) {
            const float *from = mix + q * mix_width, *other = mix + queries * mix_width + q;
            const float both = std::max(*largest, other[0]);
            float shares[2 * lanes];
            store(shares, exp(splat(*largest - both))), store(shares + lanes, exp(splat(other[0] - both)));
            const float old_share = shares[0], new_share = shares[lanes];
            *total = detail::fma(other[queries], new_share, *total * old_share);
            *largest = both;
            for (std::size_t e = 0; e < mix_width; e += lanes)
                store(to + e, fma(load(from + e), splat(new_share), load(to + e) * splat(old_share)));
        }
        if (segment + 1 < a.segments()) continue;
        const std::size_t group = static_cast<std::size_t>(a.n_queries);
        float* out = a.out + q / group * a.stride + q % group * width;
        const float inverse = 1 / *total;
        std::size_t e = 0;
        for (; e + lanes <= width; e += lanes) store(out + e, load(to + e) * splat(inverse));
        for (; e < width; ++e) out[e] = to[e] * inverse;
    }
}

#endif

const Kernels kernels = {LLAMA3_STRING(LLAMA3_KERNELS),
                         {float_tile_tokens, float_tile_tokens, tile_tokens, tile_tokens},
                         few_tokens,
                         own_bf16,
                         normalise,
                         rope,
                         pack,
                         multiply,
                         swiglu,
                         attend,
                         join};

}  // namespace LLAMA3_KERNELS
}  // namespace detail
}  // namespace llama3

#else  // LLAMA3_AMX

// ─── §9c  Tile registers ────────────────────────────────────────────────────────────────────────────────────────────────────────
//
// Intel's AMX multiplies 16 tokens by 16 rows at once: a tile of 16 token rows of 64 bytes times a tile of up to 16 panel
// vectors, which lie in memory just as it wants them. q8 and q4 give the bits of every other set; bf16 has sums of the
// instruction's own, over 32 columns at a time, and so uses it for a single token too.

namespace llama3 {
namespace detail {
namespace amx {

using namespace avx512;

constexpr int tile_tokens = 16, tile_columns = 32;
constexpr std::size_t tile_bytes = 1024, unit_of_tokens = 2 * 16 * (block_columns + 4);

// No load or store moves across this: what the tile instructions read is unknown to the compiler.
LLAMA3_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
    void load() const {
        settle_memory();  // g++ 12 believes that the instruction reads 8 bytes
        _tile_loadconfig(this);
    }
    void set(int tile, int n_rows, int bytes) {
        rows[tile] = static_cast<std::uint8_t>(n_rows), row_bytes[tile] = static_cast<std::uint16_t>(bytes);
    }
};

// Sixteen tokens (q8, q4): per block [16][32] bytes and [16] float scales. Any number (bf16): per 32 columns [tokens][64 bytes].
void pack(Format format, std::byte* out, const float* x, std::size_t stride, int tokens, int together, int columns) {
    const std::size_t width = static_cast<std::size_t>(round_up(columns, 64)), n = static_cast<std::size_t>(tokens);
    if (format == Format::bf16) {
        for (std::size_t t = 0; t < n; ++t)
            for (std::size_t c = 0; c < width; c += lanes) {
                const F value = load(x + t * stride + c);
                const I bits = as_int(value), odd = shift_right(bits, 16) & splat_int(1);
                const I rounded = add_int(add_int(bits, odd), splat_int(0x7fff)),
                        quiet = _mm512_or_si512(bits, splat_int(0x400000));
                const I chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), rounded, quiet);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (c / 32 * n + t) * 64 + c % 32 * 2),
                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
            }
    } else if (format == Format::f32 || together != tile_tokens) {
        avx512::pack(format, out, x, stride, tokens, together, columns);
    } else {
        for (std::size_t block = 0; block < width / block_columns; ++block, out += unit_of_tokens / 2) {
            std::memset(out + n * block_columns, 0, (tile_tokens - n) * block_columns);
            for (std::size_t t = 0; t < tile_tokens; ++t) {
                std::int32_t total;
                store_as(out + tile_tokens * block_columns + 4 * t,
                         t < n ? quantise(x + t * stride + block * block_columns,
                                          reinterpret_cast<std::int8_t*>(out + t * block_columns), total)
                               : 0.0f);
            }
        }
    }
}

// A panel of q4 in the form of q8.
void unpack(const Matrix& w, int panel, std::byte* out) {
    const std::byte* from = w.panel(panel);
    for (int unit = 0; unit < w.units(); ++unit, from += unit_bytes(Format::q4), out += unit_bytes(Format::q8)) {
        for (int v = 0; v < Q4::vectors; ++v) {
            const I nibbles = load_bits(from + 64 * v), eight = _mm512_set1_epi8(8);
            store_bits(out + 128 * v, _mm512_sub_epi8(low_nibbles(nibbles), eight));
            store_bits(out + 128 * v + 64, _mm512_sub_epi8(high_nibbles(nibbles), eight));
        }
        std::memcpy(out + 64 * Q8::vectors, from + 64 * Q4::vectors, 64);
    }
}

// Products of the two blocks of a unit, in tiles 0 and 1, on their way while the unit before is being scaled.
LLAMA3_INLINE void begin_unit(const std::byte* x, const std::byte* w) {
    _tile_loadd(4, x, block_columns);
    _tile_loadd(6, w, 64);
    _tile_zero(0);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, x + unit_of_tokens / 2, block_columns);
    _tile_loadd(7, w + 512, 64);
    _tile_zero(1);
    _tile_dpbssd(1, 5, 7);
}

LLAMA3_INLINE void finish_unit(std::byte* dots) {
    _tile_stored(0, dots, 64);
    _tile_stored(1, dots + tile_bytes, 64);
}

// Sixteen tokens times a panel of q8 at w.
void multiply_tile(const Product& product, int panel, const std::byte* w, int token) {
    alignas(64) std::byte dots[2][2 * tile_bytes];
    const int segments = product.w.segments, units = product.w.units() / segments;
    const std::byte* x = product.x + static_cast<std::size_t>(token) * packed_bytes(Format::q8, product.w.columns);
    F levels[join_levels][tile_tokens];
    begin_unit(x, w);
    finish_unit(dots[0]);
    for (int s = 0; s < segments; ++s) {
        F sums[tile_tokens];
        LLAMA3_UNROLL
        for (int t = 0; t < tile_tokens; ++t) sums[t] = splat(0);
        for (int u = 0; u < units; ++u, x += unit_of_tokens, w += unit_bytes(Format::q8)) {
            const bool more = s + 1 < segments || u + 1 < units;
            const std::byte* ready = dots[(s * units + u) % 2];
            if (more) begin_unit(x + unit_of_tokens, w + unit_bytes(Format::q8));
            for (int block = 0; block < 2; ++block) {
                const F w_scale = load_scales(Q8{}, w, block, 0);
                const std::byte* x_scales =
                    x + unit_of_tokens / 2 * static_cast<std::size_t>(block) + tile_tokens * block_columns;
                LLAMA3_UNROLL
                for (int t = 0; t < tile_tokens; ++t)
                    sums[t] = fma(to_float(load_bits(ready + static_cast<std::size_t>(block) * tile_bytes + 64 * t)) * w_scale,
                                  splat(load_as<float>(x_scales + 4 * t)), sums[t]);
            }
            if (more) finish_unit(dots[(s * units + u + 1) % 2]);
        }
        F* const result = levels[last_level(segments)];
        LLAMA3_UNROLL
        for (int t = 0; t < tile_tokens; ++t) result[t] = sums[t];
        join_segment(s, result, tile_tokens, levels[0], tile_tokens);
    }
    put_out(product, panel, token, std::min(tile_tokens, product.tokens - token), levels[last_level(segments)], tile_tokens);
}

void multiply_blocks(const Product& product) {
    TileShapes shapes;
    for (int i = 0; i < 2; ++i) shapes.set(i, 16, 64), shapes.set(4 + i, 16, block_columns), shapes.set(6 + i, 8, 64);
    const std::size_t token_bytes = packed_bytes(Format::q8, product.w.columns);
    shapes.load();
    // Tokens that stay in the second-level cache (2 MB) while panel after panel passes.
    const int block = std::max(static_cast<int>((std::size_t{3} << 19) / (token_bytes * tile_tokens)), 4) * tile_tokens;
    for (int first = 0; first < product.tokens; first += block)
        for (int panel = product.first_panel; panel < product.last_panel; ++panel) {
            const std::byte* w = product.w.panel(panel);
            if (product.w.format == Format::q4) unpack(product.w, panel, product.room), w = product.room;
            settle_memory();
            for (int t = first; t < std::min(first + block, product.tokens); t += tile_tokens)
                multiply_tile(product, panel, w, t);
        }
    _tile_release();
}

// Up to 16 tokens times 4 panels of bf16, `step` apart; those from the last panel on give no output.
void multiply_pairs(const Product& product, int panel, int step, int token, int tokens) {
    constexpr int P = 4;
    const Matrix& w = product.w;
    const std::byte* x = product.x + static_cast<std::size_t>(token) * packed_bytes(Format::bf16, w.columns);
    F levels[join_levels][P][16], (&sums)[P][16] = levels[last_level(w.segments)];
    alignas(64) std::byte rest[P][tile_bytes];
    const int columns = w.columns / w.segments;
    const std::byte* data[P];
    for (int p = 0; p < P; ++p) data[p] = w.panel(std::min(panel + p * step, product.last_panel - 1));
    for (int s = 0; s < w.segments; ++s) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int c = 0; c < columns; c += tile_columns, x += tokens * 64) {
            const std::byte* from[P];
            for (int p = 0; p < P; ++p) {
                for (std::size_t line = 0; line < tile_bytes; line += 64) __builtin_prefetch(data[p] + 2048 + line);
                from[p] = data[p], data[p] += tile_bytes;
            }
            if (columns - c < tile_columns) {  // the matrix ends inside the tile: filled up with zeros
                settle_memory();
                std::memset(rest, 0, sizeof rest);
                for (int p = 0; p < P; ++p) {
                    std::memcpy(rest[p], from[p], static_cast<std::size_t>(columns - c + 1) / 2 * 64);
                    from[p] = rest[p];
                }
                settle_memory();
            }
            _tile_loadd(4, x, 64);
            _tile_loadd(5, from[0], 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, from[1], 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, from[2], 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, from[3], 64);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        settle_memory();
        join_segment(s, &sums[0][0], P * 16, &levels[0][0][0], P * 16);
    }
    for (int p = 0; p < P && panel + p * step < product.last_panel; ++p)
        put_out(product, panel + p * step, token, tokens, sums[p], 16);
}

void multiply_bf16(const Product& product) {
    const int quads = (product.last_panel - product.first_panel + 3) / 4;
    // One group of tokens: four runs of panels side by side. Several: four panels, for one group after the other.
    const bool alone = product.tokens <= product.together;
    int shaped = 0;
    for (int i = 0; i < quads; ++i)
        for (int t = 0; t < product.tokens; t += product.together) {
            const int tokens = std::min(product.together, product.tokens - t);
            if (tokens != shaped) {
                TileShapes shapes;
                for (int tile = 0; tile < 4; ++tile)
                    shapes.set(tile, tokens, 64), shapes.set(4 + tile, tile == 0 ? tokens : 16, 64);
                shapes.load();
                shaped = tokens;
            }
            multiply_pairs(product, product.first_panel + (alone ? i : 4 * i), alone ? quads : 1, t, tokens);
        }
    _tile_release();
}

void multiply(const Product& product) {
    if (product.w.format == Format::bf16) multiply_bf16(product);
    else if (product.w.format == Format::f32 || product.together != tile_tokens) avx512::multiply(product);
    else multiply_blocks(product);
}

const Kernels kernels = {"amx",
                         {avx512::tile_tokens, tile_tokens, tile_tokens, tile_tokens},
                         avx512::few_tokens,
                         true,
                         normalise,
                         avx512::rope,
                         pack,
                         multiply,
                         swiglu,
                         attend,
                         join};

}  // namespace amx
}  // namespace detail
}  // namespace llama3

#endif  // LLAMA3_KERNELS

#ifndef LLAMA3_KERNELS

// ═══ §10  Choosing the instruction set ═════════════════════════════════════════════════════════════════════════════════════════
//
// The sets that were compiled, best first; the first that this processor has is taken, or the one that Options::isa or
// LLAMA3_ISA names.

namespace llama3 {
namespace detail {

struct KernelChoice {
    const Kernels* kernels;
    bool supported;
};

std::vector<KernelChoice> all_kernels() {
    std::vector<KernelChoice> choices;
#ifdef LLAMA3_X86_KERNELS
    const CpuFeatures cpu = cpu_features();
    choices.push_back({&avx512_bf16::kernels, cpu.avx512 && cpu.avx512_vnni && cpu.avx512_bf16});
    choices.push_back({&avx512::kernels, cpu.avx512 && cpu.avx512_vnni});
#if defined(__linux__)
    choices.insert(choices.begin(), {&amx::kernels, cpu.amx && cpu.avx512_vnni});
#endif
    if (cpu.intel)
        std::swap(choices[choices.size() - 2], choices.back());  // there vdpbf16ps has half the rate of two fused multiply-adds
    choices.push_back({&avx_vnni::kernels, cpu.avx2_fma_f16c && cpu.avx_vnni});
    choices.push_back({&avx2::kernels, cpu.avx2_fma_f16c});
#elif defined(__aarch64__)
    choices.push_back({&neon_dotprod::kernels, cpu_features().dotprod});
    choices.push_back({&neon::kernels, true});
#endif
    choices.push_back({&baseline::kernels, true});
    return choices;
}

const Kernels& choose_kernels(const std::string& wanted) {
    const char* const preset = std::getenv("LLAMA3_ISA");
    const std::string name = wanted.empty() && preset ? preset : wanted;
    std::string available;
    for (const KernelChoice& choice : all_kernels()) {
        if (!choice.supported) continue;
        if (name.empty() || name == choice.kernels->name) return *choice.kernels;
        available += (available.empty() ? "" : ", ") + std::string(choice.kernels->name);
    }
    fail(Code::device, wanted.empty() ? "LLAMA3_ISA" : "instruction set", "this machine cannot run it", "'" + name + "'",
         "one of " + available, "Choose one of these, or none for the best");
}

}  // namespace detail
}  // namespace llama3

// ═══ §11  Threads ══════════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// A team runs one function on every thread; threads meet at barriers. With OpenMP the team is a parallel region, so that a host
// that uses OpenMP itself keeps one pool of threads; without, and for ranks, the threads are ours.

namespace llama3::detail {

inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits a little for `word` to change from `old`: first spinning, for partners that run, then asleep, for those that do not.
inline void wait_for_change(const std::atomic<std::uint32_t>& word, std::uint32_t old) {
    for (int i = 0; i < 1050; ++i) {
        if (word.load(std::memory_order_acquire) != old) return;
        if (i < 1000) pause_briefly();
        else std::this_thread::yield();
    }
#if defined(__GLIBCXX__) && !defined(__linux__)
    // Without futexes libstdc++ looks, locks and waits, and misses the notify_all() in between (seen with GCC 12 on Windows): a
    // team would hang. So sleepers look again by themselves.
    for (int i = 0; word.load(std::memory_order_acquire) == old; ++i) {
        if (i < 1000) std::this_thread::yield();
        else std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
#else
    while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
#endif
}

class Barrier {
public:
    void resize(int threads) { threads_ = threads; }
    // The last thread to arrive calls f before the others go on.
    template <class F>
    void wait(F&& f) {
        const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            f();
            phase_.store(phase + 1);  // a full fence: notify_all() must not look for sleepers before it
            phase_.notify_all();
        } else {
            wait_for_change(phase_, phase);
        }
    }

private:
    int threads_ = 1;
    alignas(64) std::atomic<int> arrived_{0};  // apart: those who wait read the one, those who come write the other
    alignas(64) std::atomic<std::uint32_t> phase_{0};
};

// A team of std::threads, which belong to it and sleep between the calls.
class ThreadTeam {
public:
    explicit ThreadTeam(int threads) : threads_(threads) {
        try {
            for (int i = 1; i < threads; ++i) members_.emplace_back([this, i] { serve(i); });
        } catch (...) {  // the system has no more threads: run with those there are
            threads_ = static_cast<int>(members_.size()) + 1;
        }
    }
    ~ThreadTeam() {
        stop_ = true;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (std::thread& member : members_) member.join();
    }
    int threads() const { return threads_; }
    static const char* name() { return "std::thread"; }
    template <class F>
    void run(Barrier& barrier, const F& f) {
        barrier.resize(threads_);
        task_ = [](const void* context, int thread, int threads) { (*static_cast<const F*>(context))(thread, threads); };
        context_ = &f;
        working_.store(static_cast<std::uint32_t>(threads_ - 1), std::memory_order_relaxed);
        epoch_.fetch_add(1);
        epoch_.notify_all();
        f(0, threads_);
        while (const std::uint32_t left = working_.load(std::memory_order_acquire)) wait_for_change(working_, left);
    }

private:
    void serve(int thread) {
        for (std::uint32_t epoch = 0;;) {
            wait_for_change(epoch_, epoch);
            ++epoch;
            if (stop_) return;
            task_(context_, thread, threads_);
            working_.fetch_sub(1);
            working_.notify_all();
        }
    }

    int threads_;
    std::vector<std::thread> members_;
    void (*task_)(const void*, int, int) = nullptr;
    const void* context_ = nullptr;
    std::atomic<bool> stop_{false};
    std::atomic<std::uint32_t> epoch_{0}, working_{0};
};

#ifdef _OPENMP

class Team {
public:
    explicit Team(int threads) : threads_(threads) {}
    int threads() const { return threads_; }
    static const char* name() { return "OpenMP"; }
    // f(thread, number of threads), which may be fewer than asked for; must not throw.
    template <class F>
    void run(Barrier& barrier, const F& f) {
#pragma omp parallel num_threads(threads_)
        {
#pragma omp single
            barrier.resize(omp_get_num_threads());
            f(omp_get_thread_num(), omp_get_num_threads());
        }
    }

private:
    int threads_;
};

#else

using Team = ThreadTeam;

#endif

}  // namespace llama3::detail

// ═══ §12  The CPU back end ═════════════════════════════════════════════════════════════════════════════════════════════════════
//
// Every thread runs forward(); a stage does the thread's share and ends at a barrier. Shares are contiguous runs of panels, so
// that each thread reads one stream of weights; what a slow core has not begun of its own is taken by those that are done. The
// bits are those of §5, stage by stage: only the order in which outputs are made differs.

namespace llama3 {
namespace detail {

// The CPU's cache, [segment][layer][key/value head] the arrays of CacheView: in the order in which a conversation fills it, so
// that large pages, which spare attention most of its page walks, take no memory long before it is needed.
class CpuCache final : public KVCache {
public:
    static std::size_t bytes(const Config& config, int capacity, Format format) {
        return static_cast<std::size_t>(round_up(capacity, 16)) * position_bytes(config, format) *
               static_cast<std::size_t>(config.n_layers) * static_cast<std::size_t>(config.n_kv_heads);
    }

    CpuCache(const Config& config, int capacity, Format format)
        : n_layers_(config.n_layers), n_kv_heads_(config.n_kv_heads), head_dim_(config.head_dim), capacity_(capacity),
          format_(format), position_bytes_(position_bytes(config, format)), memory_(bytes(config, capacity, format), true) {}

    int capacity() const override { return capacity_; }

    CacheView view(int layer, int head, int segment) const {
        const std::size_t width = static_cast<std::size_t>(head_dim_), padded = padded_width(head_dim_),
                          groups = scale_groups(head_dim_), element = element_bytes(format_);
        const std::size_t first = static_cast<std::size_t>(segment) * attention_segment,
                          heads = static_cast<std::size_t>(n_kv_heads_),
                          positions = std::min<std::size_t>(attention_segment,
                                                            static_cast<std::size_t>(round_up(capacity_, 16)) - first);
        std::byte* at =
            memory_.data() + (first * static_cast<std::size_t>(n_layers_) * heads +
                              (static_cast<std::size_t>(layer) * heads + static_cast<std::size_t>(head)) * positions) *
                                 position_bytes_;
        CacheView view{format_, at, nullptr, at + positions * width * element, nullptr, head_dim_};
        if (format_ == Format::q8) {
            view.key_scales = reinterpret_cast<std::uint16_t*>(view.values + positions * padded);
            view.value_scales = view.key_scales + positions * groups;
        }
        return view;
    }

    // Writes the key and value [E] of one position.
    void store(int layer, int head, int position, const float* key, const float* value) {
        const CacheView view = this->view(layer, head, position / attention_segment);
        const std::size_t width = static_cast<std::size_t>(head_dim_), padded = padded_width(head_dim_),
                          groups = scale_groups(head_dim_);
        const std::size_t p = static_cast<std::size_t>(position % attention_segment), tile = p / 16 * width * 16 + p % 16;
        const auto put = [&](std::byte* to, std::size_t i, float x) {
            if (format_ == Format::bf16) store_as(to + 2 * i, to_bf16(x));
            else store_as(to + 4 * i, x);
        };
        for (std::size_t i = 0; format_ != Format::q8 && i < width; ++i)
            put(view.keys, tile + i * 16, key[i]), put(view.values, p * padded + i, value[i]);
        for (std::size_t first = 0; format_ == Format::q8 && first < width; first += block_columns) {
            const std::size_t n = std::min<std::size_t>(block_columns, width - first), group = first / block_columns;
            std::int8_t bytes[block_columns];
            view.key_scales[(p / 16 * groups + group) * 16 + p % 16] =
                quantise_channels(key + first, static_cast<int>(n), bytes);
            for (std::size_t i = 0; i < n; ++i) view.keys[tile + (first + i) * 16] = static_cast<std::byte>(bytes[i]);
            view.value_scales[p * groups + group] = quantise_channels(value + first, static_cast<int>(n), bytes);
            std::memcpy(view.values + p * padded + first, bytes, n);
        }
    }

private:
    static std::size_t position_bytes(const Config& config, Format format) {  // of one head
        return element_bytes(format) * (static_cast<std::size_t>(config.head_dim) + padded_width(config.head_dim)) +
               (format == Format::q8 ? 4 * scale_groups(config.head_dim) : 0);
    }

    int n_layers_, n_kv_heads_, head_dim_, capacity_;
    Format format_;
    std::size_t position_bytes_;
    AlignedBuffer memory_;
};

// Hands out the parts of one piece of memory; without memory it only counts.
class Arena {
public:
    explicit Arena(std::byte* memory = nullptr) : memory_(memory) {}
    template <class T>
    T* take(std::size_t n) {
        const std::size_t at = used_;
        used_ += static_cast<std::size_t>(round_up(static_cast<std::int64_t>(n * sizeof(T)), 64));
        return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
    }
    Tensor tensor(int rows, int columns) {
        // Products write a few columns of many rows. A power of two apart these would share a few sets of the cache.
        const std::size_t width = static_cast<std::size_t>(round_up(columns, 64)), stride = width % 512 ? width : width + 16;
        return {take<float>(static_cast<std::size_t>(rows) * stride), rows, columns, stride};
    }
    std::size_t used() const { return used_; }

private:
    std::byte* memory_;
    std::size_t used_ = 0;
};

struct CpuBuffers {
    Tensor x, query, key, value, mixed, hidden, up;
    Tensor partial;     // [T + 1, D] this rank's part of a sum over ranks, and a row for the wish to stop; one rank has none
    std::byte* packed;  // activations in the order of a product's tiles
    std::size_t packed_bytes;
    float* turns;    // [T, 2, E] cos and sin of each row's position, -sin and cos
    float* scratch;  // [threads, scratch_floats] rows of a thread's own
    std::size_t scratch_floats;
    std::byte* room;  // [threads, room_bytes]: what a product has in use
    std::size_t room_bytes;

    CpuBuffers(Arena&& arena, const Config& c, int rows, int threads, int ranks) {
        const int widest = std::max({c.dim, c.n_heads * c.head_dim, c.ffn_dim});
        const std::size_t n = static_cast<std::size_t>(rows);
        x = arena.tensor(rows, c.dim);
        query = arena.tensor(rows, c.n_heads * c.head_dim);
        key = arena.tensor(rows, c.n_kv_heads * c.head_dim);
        value = arena.tensor(rows, c.n_kv_heads * c.head_dim);
        mixed = arena.tensor(rows, c.n_heads * c.head_dim);
        hidden = arena.tensor(rows, c.ffn_dim);
        up = arena.tensor(rows, c.ffn_dim);
        const std::size_t sums = static_cast<std::size_t>(round_up(c.dim, 64));  // without a gap: they travel as they stand
        if (ranks > 1) partial = {arena.take<float>((n + 1) * sums), rows + 1, c.dim, sums};
        packed_bytes = static_cast<std::size_t>(rows + max_tile_tokens) * detail::packed_bytes(Format::f32, widest);
        packed = arena.take<std::byte>(packed_bytes);
        turns = arena.take<float>(2 * n * static_cast<std::size_t>(c.head_dim));
        const int queries = std::max(attention_queries, c.n_heads / c.n_kv_heads);
        scratch_floats = std::max<std::size_t>(max_tile_tokens * x.stride,
                                               attention_floats(queries, c.head_dim) + 2 * mix_floats(queries, c.head_dim));
        scratch = arena.take<float>(static_cast<std::size_t>(threads) * scratch_floats);
        room_bytes = static_cast<std::size_t>(round_up(static_cast<std::int64_t>(detail::room_bytes(widest)), 64));
        room = arena.take<std::byte>(static_cast<std::size_t>(threads) * room_bytes);
    }
};

std::unique_ptr<Backend> open_in_process(Device& device, const Model& model, const Options& options);  // §13

class CpuBackend final : public Backend {
public:
    // The whole model, or the share of one rank.
    CpuBackend(Model model, const Options& options, Share share)
        : model_(std::move(model)), share_(std::move(share)), config_(share_.config), communicator_(options.communicator),
          context_(options.context), kv_(options.kv), kernels_(choose_kernels(options.isa)),
          streams_(cpu_features().intel ? 4 : 1), team_(options.threads), taken_(static_cast<std::size_t>(team_.threads())),
          rows_(std::min(options.chunk, options.context)), frequencies_(rope_frequencies(config_)),
          memory_(buffer_bytes(config_, rows_, team_.threads(), share_.ranks)),
          buffers_(Arena(memory_.data()), config_, rows_, team_.threads(), share_.ranks) {}

    static std::size_t buffer_bytes(const Config& config, int rows, int threads, int ranks) {
        Arena count;
        const CpuBuffers counted(std::move(count), config, rows, threads, ranks);
        return count.used();
    }

    std::unique_ptr<KVCache> make_cache() override { return std::make_unique<CpuCache>(config_, context_, kv_); }
    int max_rows() const override { return rows_; }
    std::span<const float> logits(int i) const override {
        return {logits_.data() + static_cast<std::size_t>(i) * logits_stride(), static_cast<std::size_t>(n_logits())};
    }
    std::string describe() const override {
        return std::string(kernels_.name) + ", CPU, " + std::to_string(team_.threads()) +
               (team_.threads() == 1 ? " thread (" : " threads (") + Team::name() + ")";
    }
    StageTimes stage_times() const override { return stage_times_; }
    bool step(const Batch& batch, const std::atomic<bool>* cancel) override;

private:
    friend class CpuWorker;
    // The number of the next piece of a thread's share that nobody has begun. The count of an earlier stage stands for 0.
    int take(int owner, std::uint32_t stage) {
        std::atomic<std::uint64_t>& pieces = taken_[static_cast<std::size_t>(owner)].pieces;
        std::uint64_t now = pieces.load(std::memory_order_relaxed), then;
        do then = (now >> 32 == stage ? now : std::uint64_t{stage} << 32) + 1;
        while (!pieces.compare_exchange_weak(now, then, std::memory_order_relaxed));
        return static_cast<int>(then & 0xffffffffu) - 1;
    }
    int n_logits() const { return share_.weights.output.rows; }
    std::size_t logits_stride() const { return static_cast<std::size_t>(round_up(n_logits(), 64)); }
    // The first thread's part of a sum over ranks. Here, and only here, ranks agree to stop: the wish travels with the sum.
    void sum_over_ranks(int n_tokens) noexcept {
        const Tensor& partial = buffers_.partial;
        float* const stop = partial.row(n_tokens);
        *stop = cancel_ && cancel_->load(std::memory_order_relaxed) ? 1.0f : 0.0f;
        try {
            communicator_->all_reduce_sum({partial.data, static_cast<std::size_t>(n_tokens) * partial.stride + 1});
            stopped_ = *stop > 0;
        } catch (...) {
            failure_ = std::current_exception(), stopped_ = true;
        }
    }

    Model model_;
    Share share_;
    const Config& config_;
    std::shared_ptr<Communicator> communicator_;  // where there are several ranks
    int context_;
    Format kv_;
    const Kernels& kernels_;
    int streams_;
    Team team_;
    Barrier barrier_;
    struct alignas(64) Taken {
        std::atomic<std::uint64_t> pieces{0};  // of a thread's share, below the number of the stage
    };
    std::vector<Taken> taken_;
    int rows_;
    std::vector<float> frequencies_;
    AlignedBuffer memory_;
    CpuBuffers buffers_;
    std::vector<float> logits_;     // [rows that wanted them, V rounded up]
    std::vector<int> logits_rows_;  // which rows want logits
    StageTimes stage_times_{};      // of the first thread
    const std::atomic<bool>* cancel_ = nullptr;
    bool stopped_ = false;  // read and written at barriers only, so that all threads agree
    std::exception_ptr failure_;
};

// One thread's part of every stage.
class CpuWorker final : public Stages {
public:
    CpuWorker(CpuBackend& backend, int thread, int threads)
        : b_(backend), config_(backend.config_), kernels_(backend.kernels_), buffers_(backend.buffers_), thread_(thread),
          threads_(threads), scratch_(buffers_.scratch + static_cast<std::size_t>(thread) * buffers_.scratch_floats),
          room_(buffers_.room + static_cast<std::size_t>(thread) * buffers_.room_bytes) {}

    void embed(Tensor x, const Matrix& table, const Batch& batch) override {
        n_tokens_ = batch.size();
        const auto [first, last] = share(n_tokens_);
        for (int t = first; t < last; ++t) {
            decode_row(table, batch.rows[static_cast<std::size_t>(t)].token, x.row(t));
            float *const turn = turns(t), *const turned = turn + config_.head_dim;
            rope_turns(turn, b_.frequencies_, batch.rows[static_cast<std::size_t>(t)].position);
            for (int i = 0; i < config_.head_dim; i += 2) turned[i] = -turn[i + 1], turned[i + 1] = turn[i];
        }
        end(Stage::embed);
    }

    void project_qkv(Tensor query, Tensor x, const Layer& layer, const Batch& batch) override {
        if (b_.stopped_) return;
        pack_rows(layer.query.format, x, n_tokens_, layer.attention_norm);
        const int queries = layer.query.panels(), keys = layer.key.panels(), values = layer.value.panels();
        for_panels(queries + keys + values, [&](int first, int last) {
            multiply_panels(layer.query, query, n_tokens_, first, last);
            multiply_panels(layer.key, buffers_.key, n_tokens_, first - queries, last - queries);
            multiply_panels(layer.value, buffers_.value, n_tokens_, first - queries - keys, last - queries - keys);
        });
        meet();
        const int n_heads = config_.n_heads, all_heads = n_heads + config_.n_kv_heads, head_dim = config_.head_dim;
        const auto [first_head, last_head] = share(n_tokens_ * all_heads);
        for (int i = first_head; i < last_head; ++i) {
            const int t = i / all_heads, head = i % all_heads;
            const Row& row = batch.rows[static_cast<std::size_t>(t)];
            if (head < n_heads) {
                kernels_.rope(query.row(t) + head * head_dim, turns(t), head_dim);
            } else {
                float* key = buffers_.key.row(t) + (head - n_heads) * head_dim;
                const float* value = buffers_.value.row(t) + (head - n_heads) * head_dim;
                kernels_.rope(key, turns(t), head_dim);
                static_cast<CpuCache*>(row.cache)->store(layer.index, head - n_heads, row.position, key, value);
            }
        }
        end(Stage::project_qkv);
    }

    void attend(Tensor mixed, Tensor query, const Layer& layer, const Batch& batch) override {
        if (b_.stopped_) return;
        const int n_kv_heads = config_.n_kv_heads, group = config_.n_heads / n_kv_heads, head_dim = config_.head_dim;
        // A block is as many rows of a sequence as leave some blocks for every thread. Where even single rows do not, the
        // segments of a row are shared out as well, and joined when all are there.
        const int most = std::clamp(n_tokens_ * n_kv_heads / (4 * threads_), 1, std::max(1, attention_queries / group));
        int segments = 1;
        for (const Row& row : batch.rows) segments = std::max(segments, row.position / attention_segment + 1);
        const std::size_t floats = mix_floats(group, head_dim),
                          parts = static_cast<std::size_t>(n_tokens_ * n_kv_heads) * static_cast<std::size_t>(segments);
        float* const mixes = reinterpret_cast<float*>(buffers_.packed);  // not in use now
        const bool split =
            segments > 1 && n_tokens_ * n_kv_heads < 2 * threads_ && parts * floats * sizeof(float) <= buffers_.packed_bytes;
        float* const joined = scratch_ + attention_floats(most * group, head_dim);
        float* const mix = joined + mix_floats(most * group, head_dim);
        for (int phase = 0; phase <= split; ++phase) {
            // Few items are dealt out in turn; where there are many, a thread that is done takes the next one.
            int item = 0, next = most > 1 ? b_.take(0, ++stage_) : thread_;
            const auto mine = [&] {
                if (item++ != next) return false;
                next = most > 1 ? b_.take(0, stage_) : next + threads_;
                return true;
            };
            for (int t = 0, n; t < n_tokens_; t += n) {
                const Row* rows = batch.rows.data() + t;
                for (n = 1; n < most && t + n < n_tokens_ && rows[n].cache == rows->cache;) ++n;
                for (int head = 0; head < n_kv_heads; ++head) {
                    const bool whole = split && phase == 0 ? false : mine();
                    const int column = head * group * head_dim;
                    const CpuCache& cache = *static_cast<const CpuCache*>(rows->cache);
                    Attention a{{}, rows, query.row(t) + column, mixed.row(t) + column, query.stride, n, group, scratch_};
                    for (int s = 0; s < a.segments(); ++s) {
                        float* const slot =
                            mixes + (static_cast<std::size_t>(t * n_kv_heads + head) * static_cast<std::size_t>(segments) +
                                     static_cast<std::size_t>(s)) *
                                        floats;
                        a.cache = cache.view(layer.index, head, s);
                        if (split && phase == 0) {
                            if (mine()) kernels_.attend(a, s, slot);
                        } else if (whole) {
                            if (!split) kernels_.attend(a, s, s == 0 ? joined : mix);
                            kernels_.join(a, s, split ? slot - static_cast<std::size_t>(s) * floats : joined,
                                          split ? slot : mix);
                        }
                    }
                }
            }
            if (phase < split) meet();
        }
        end(Stage::attend);
    }

    void project_out(Tensor x, Tensor mixed, const Layer& layer) override {
        add_product(Stage::project_out, x, layer.attention_out, mixed);
    }

    void gate_up(Tensor hidden, Tensor x, const Layer& layer) override {
        if (b_.stopped_) return;
        pack_rows(layer.gate.format, x, n_tokens_, layer.ffn_norm);
        for_panels(layer.gate.panels(), [&](int first, int last) {
            // A few panels at a time where there are many tokens, so that gate and up are still in the cache when they meet.
            const int block = n_tokens_ < 64 ? last - first : 4;
            for (int panel = first; panel < last; panel += block) {
                const int end = std::min(panel + block, last);
                multiply_panels(layer.gate, hidden, n_tokens_, panel, end);
                multiply_panels(layer.up, buffers_.up, n_tokens_, panel, end);
                const int n = (end - panel) * panel_rows;
                for (int t = 0; t < n_tokens_; ++t) {
                    const int ahead = std::min(t + 4, n_tokens_ - 1);  // other rows are too far away for the processor to foresee
                    for (int i = 0; i < std::min(n, 4 * panel_rows); i += panel_rows) {
                        __builtin_prefetch(hidden.row(ahead) + panel * panel_rows + i, 1);
                        __builtin_prefetch(buffers_.up.row(ahead) + panel * panel_rows + i);
                    }
                    kernels_.swiglu(hidden.row(t) + panel * panel_rows, buffers_.up.row(t) + panel * panel_rows, n);
                }
            }
        });
        end(Stage::gate_up);
    }

    void down(Tensor x, Tensor hidden, const Layer& layer) override { add_product(Stage::down, x, layer.down, hidden); }

    void logits(Tensor logits, Tensor x, const Weights& weights, const Batch&) override {
        if (b_.stopped_ || logits.rows == 0) return;
        pack_rows(weights.output.format, x, logits.rows, weights.final_norm, b_.logits_rows_.data());
        for_panels(weights.output.panels(),
                   [&](int first, int last) { multiply_panels(weights.output, logits, logits.rows, first, last); });
        end(Stage::logits);
    }

private:
    struct Range {
        int first, last;
    };
    // A thread's contiguous part of n items.
    Range share(int n, int thread) const {
        const auto border = [&](int i) { return static_cast<int>(static_cast<std::int64_t>(n) * i / threads_); };
        return {border(thread), border(thread + 1)};
    }
    Range share(int n) const { return share(n, thread_); }
    // Calls multiply(first, last) for pieces of n panels: half of this thread's share, the rest of it little by little, and then
    // what slower threads have left of theirs. Of these it asks few, at every distance.
    template <class F>
    void for_panels(int n, const F& multiply) {
        ++stage_;
        for (int distance = threads_; distance > 0; distance /= 2) {
            const int owner = (thread_ + distance) % threads_;
            const auto [first, last] = share(n, owner);
            const int large = threads_ == 1 ? last - first : (last - first) / (2 * small_piece) * small_piece;
            for (int begin, end = first; end < last;) {
                const int piece = b_.take(owner, stage_);
                begin = first + (piece == 0 ? 0 : large + (piece - 1) * small_piece);
                end = std::min(last, begin + (piece == 0 ? large : small_piece));
                if (begin < end) multiply(begin, end);
            }
        }
    }
    void meet() {
        b_.barrier_.wait([this] {
            if (b_.share_.ranks == 1) b_.stopped_ = b_.cancel_ && b_.cancel_->load(std::memory_order_relaxed);
        });
    }
    void end(Stage stage) {
        meet();
        if (thread_ != 0) return;
        const auto now = std::chrono::steady_clock::now();
        b_.stage_times_[static_cast<std::size_t>(stage)] += std::chrono::duration<double>(now - stage_began_).count();
        stage_began_ = now;
    }
    float* turns(int t) const {
        return buffers_.turns + 2 * static_cast<std::size_t>(t) * static_cast<std::size_t>(config_.head_dim);
    }

    // Rows 0 to n - 1 of x (or those that `rows` lists), normalised if there is a norm, packed for products.
    void pack_rows(Format format, Tensor x, int n, const float* norm, const int* rows = nullptr) {
        const int tile = kernels_.tokens_together(format, n);
        const auto [first, last] = share((n + tile - 1) / tile);
        for (int t = first * tile; t < std::min(last * tile, n); t += tile) {
            const int tokens = std::min(tile, n - t);
            for (int i = 0; norm && i < tokens; ++i) {
                float* const row = scratch_ + static_cast<std::size_t>(i) * x.stride;
                kernels_.normalise(row, x.row(rows ? rows[t + i] : t + i), norm, x.columns, config_.norm_eps);
                std::fill(row + x.columns, row + x.stride, 0.0f);  // what other stages left behind the last column
            }
            kernels_.pack(format, buffers_.packed + static_cast<std::size_t>(t) * packed_bytes(format, x.columns),
                          norm ? scratch_ : x.row(t), x.stride, tokens, tile, x.columns);
        }
        meet();
    }

    // Panels [first, last) of W, as far as it has them, times the packed rows.
    void multiply_panels(const Matrix& w, Tensor out, int n, int first, int last, bool add = false) {
        first = std::max(first, 0), last = std::min(last, w.panels());
        if (first < last)
            kernels_.multiply(
                {w, buffers_.packed, n, kernels_.tokens_together(w.format, n), out.data, out.stride, add, first, last, room_,
                 b_.streams_});
    }

    void add_product(Stage stage, Tensor x, const Matrix& w, Tensor input) {
        if (b_.stopped_) return;
        pack_rows(w.format, input, n_tokens_, nullptr);
        const bool alone = b_.share_.ranks == 1;
        for_panels(w.panels(), [&](int first, int last) {
            multiply_panels(w, alone ? x : buffers_.partial, n_tokens_, first, last, alone);
        });
        end(stage);
        if (alone) return;
        if (thread_ == 0) b_.sum_over_ranks(n_tokens_);
        meet();
        const auto [first, last] = share(w.panels());
        for (int t = 0; t < n_tokens_; ++t)
            for (int i = first * panel_rows; i < std::min(last * panel_rows, w.rows); ++i)
                x.row(t)[i] = x.row(t)[i] + buffers_.partial.row(t)[i];
        end(Stage::communicate);
    }

    CpuBackend& b_;
    const Config& config_;
    const Kernels& kernels_;
    const CpuBuffers& buffers_;
    int thread_, threads_, n_tokens_ = 0;
    static constexpr int small_piece = 4;  // panels
    std::uint32_t stage_ = 0;              // number of what is shared out, the same for all threads
    float* scratch_;
    std::byte* room_;
    std::chrono::steady_clock::time_point stage_began_ = std::chrono::steady_clock::now();
};

bool CpuBackend::step(const Batch& batch, const std::atomic<bool>* cancel) {
    logits_rows_.clear();
    for (int t = 0; t < batch.size(); ++t)
        if (batch.rows[static_cast<std::size_t>(t)].wants_logits) logits_rows_.push_back(t);
    logits_.resize(logits_rows_.size() * logits_stride());
    cancel_ = cancel, stopped_ = false, failure_ = nullptr;
    for (Taken& taken : taken_) taken.pieces = 0;
    const Tensor logits{logits_.data(), static_cast<int>(logits_rows_.size()), n_logits(), logits_stride()};
    const Activations activations{buffers_.x, buffers_.query, buffers_.mixed, buffers_.hidden, logits};
    team_.run(barrier_, [&](int thread, int threads) {
        const FloatEnvironment environment;
        CpuWorker worker(*this, thread, threads);
        forward(worker, share_.weights, activations, batch);
    });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    return !stopped_;
}

class CpuDevice final : public Device {
public:
    std::unique_ptr<Backend> open(const Model& model, const Options& options) override {
        if (options.ranks > 1 && !options.communicator) return open_in_process(*this, model, with_threads(options));
        const int rank = options.communicator ? options.communicator->rank() : 0;
        return std::make_unique<CpuBackend>(model, with_threads(options),
                                            share_of(model.config(), model.weights(), rank, options.ranks));
    }
    std::uint64_t cache_bytes(const Config& config, const Options& options) const override {
        return CpuCache::bytes(config, options.context, options.kv);
    }
    std::uint64_t activations_bytes(const Config& config, const Options& options) const override {
        return CpuBackend::buffer_bytes(config, std::min(options.chunk, options.context), with_threads(options).threads,
                                        options.ranks);
    }

private:
    static Options with_threads(Options options) {
        if (options.threads == 0) {
            int threads = usable_cpus();
#ifdef _OPENMP
            threads = std::min(threads, omp_get_max_threads());
#endif
            options.threads = std::max(1, options.communicator ? threads : threads / options.ranks);
        }
        return options;
    }
};

}  // namespace detail

std::shared_ptr<Device> cpu() { return std::make_shared<detail::CpuDevice>(); }

}  // namespace llama3

// ═══ §13  Ranks ════════════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// Tensor splitting (Shoeybi et al., "Megatron-LM", 2019): a rank owns some query heads and the key/value heads that these read,
// some channels of the feed-forward and some logits, that is, rows of query, key, value, gate, up and output, and the columns of
// attention_out and down that meet them. It runs forward() over its share like anybody else; ranks meet only where the products
// of attention_out and down are summed, twice per layer, and when somebody asks for logits. A rank's columns are whole segments,
// so that its sum is a sub-tree of the one rank's, and join_ranks() the rest of the tree: the bits stay.
//
// LocalRanks drives ranks that are threads of this process. Between processes (MPI) rank 0 has the sessions, in a LeadBackend
// that tells the others what to do, and those are in follow().

namespace llama3 {
namespace detail {

// ── Shares ──

// Rows from a panel's first on, as a view.
Matrix rows_of(Matrix m, int first, int rows) {
    if (m.data) m.data = m.panel(first / panel_rows);
    m.rows = rows;
    return m;
}
// Columns from a unit's first on: the panels keep their distance.
Matrix columns_of(Matrix m, int first, int columns, int segments) {
    if (m.data) m.data += static_cast<std::size_t>(first / unit_columns(m.format)) * unit_bytes(m.format);
    m.columns = columns, m.segments = segments;
    return m;
}

// Where the part of a rank begins, if n things are cut into `ranks` parts at multiples of `unit`.
int border(int n, int unit, int rank, int ranks) {
    const std::int64_t units = (n + unit - 1) / unit;
    return static_cast<int>(std::min<std::int64_t>(units * rank / ranks * unit, n));
}
int share_of_segments(int segments, int ranks) { return segments % ranks == 0 ? segments / ranks : 1; }

// R divides H; it divides K or is a multiple of it; heads fill whole panels, and units of attention_out; no rank stays empty.
bool can_share(const Config& c, const Weights& weights, int ranks) {
    if (ranks == 1) return true;
    int unit = panel_rows;
    for (const Layer& layer : weights.layers) unit = std::max(unit, unit_columns(layer.attention_out.format));
    const int heads = c.n_heads / ranks, kv_heads = std::max(1, c.n_kv_heads / ranks);
    return c.n_heads % ranks == 0 && (c.n_kv_heads % ranks == 0 || ranks % c.n_kv_heads == 0) &&
           heads * c.head_dim % unit == 0 && kv_heads * c.head_dim % panel_rows == 0 && (c.ffn_dim + 63) / 64 >= ranks &&
           (c.vocab_size + panel_rows - 1) / panel_rows >= ranks;
}

}  // namespace detail

Share share_of(const Config& config, const Weights& weights, int rank, int ranks) {
    if (ranks < 1 || ranks > config.n_heads || !detail::can_share(config, weights, ranks)) {
        std::string possible;
        for (int r = 1; r <= config.n_heads; ++r)
            if (detail::can_share(config, weights, r)) possible += (possible.empty() ? "" : ", ") + std::to_string(r);
        const std::string what = detail::to_text({"they cannot share ", config.n_heads, " query and ", config.n_kv_heads,
                                                 " key/value heads of ", config.head_dim});
        detail::fail(Code::argument, "Options::ranks", what, ranks, possible, "Use one of these");
    }
    detail::check_range("share_of, rank", rank, rank >= 0 && rank < ranks, "0 to " + std::to_string(ranks - 1));
    Share share{config, weights, rank, ranks};
    if (ranks == 1) return share;
    Config& c = share.config;
    c.n_heads = config.n_heads / ranks, c.n_kv_heads = std::max(1, config.n_kv_heads / ranks);
    c.attention_out_segments = detail::share_of_segments(config.attention_out_segments, ranks);
    c.down_segments = detail::share_of_segments(config.down_segments, ranks);
    const int channel = detail::border(config.ffn_dim, 64, rank, ranks);
    c.ffn_dim = detail::border(config.ffn_dim, 64, rank + 1, ranks) - channel;
    const int query = rank * c.n_heads * c.head_dim, queries = c.n_heads * c.head_dim;
    const int key = rank * config.n_kv_heads / ranks * c.head_dim, keys = c.n_kv_heads * c.head_dim;
    for (Layer& layer : share.weights.layers) {
        layer.query = detail::rows_of(layer.query, query, queries);
        layer.key = detail::rows_of(layer.key, key, keys);
        layer.value = detail::rows_of(layer.value, key, keys);
        layer.attention_out = detail::columns_of(layer.attention_out, query, queries, c.attention_out_segments);
        layer.gate = detail::rows_of(layer.gate, channel, c.ffn_dim);
        layer.up = detail::rows_of(layer.up, channel, c.ffn_dim);
        layer.down = detail::columns_of(layer.down, channel, c.ffn_dim, c.down_segments);
    }
    const int logit = detail::border(config.vocab_size, panel_rows, rank, ranks);
    share.weights.output =
        detail::rows_of(weights.output, logit, detail::border(config.vocab_size, panel_rows, rank + 1, ranks) - logit);
    return share;
}

std::uint64_t bytes_of(const Share& share) {
    const auto bytes = [](const Matrix& m) {
        return static_cast<std::uint64_t>(m.panels()) * static_cast<std::uint64_t>(m.units()) * unit_bytes(m.format);
    };
    std::uint64_t sum = bytes(share.weights.embedding);
    if (!share.config.tied_embedding) sum += bytes(share.weights.output);
    for (const Layer& l : share.weights.layers)
        for (const Matrix* m : {&l.query, &l.key, &l.value, &l.attention_out, &l.gate, &l.up, &l.down}) sum += bytes(*m);
    return sum + 4ull * static_cast<std::uint64_t>(share.config.dim) * (2 * share.weights.layers.size() + 1);
}

void join_ranks(float* out, std::span<const float* const> parts, std::size_t n) {
    constexpr std::size_t block = 256;  // keeps the tree's nodes in the cache
    std::vector<std::array<float, block>> nodes(parts.size());
    for (std::size_t first = 0; first < n; first += block) {
        const std::size_t count = std::min(block, n - first);
        for (std::size_t r = 0; r < parts.size(); ++r) std::copy_n(parts[r] + first, count, nodes[r].begin());
        for (std::size_t left = nodes.size(); left > 1; left = (left + 1) / 2)
            for (std::size_t r = 0; r < left; r += 2)
                for (std::size_t i = 0; i < count; ++i)
                    nodes[r / 2][i] = r + 1 < left ? nodes[r][i] + nodes[r + 1][i] : nodes[r][i];
        std::copy_n(nodes[0].begin(), count, out + first);
    }
}

namespace detail {

std::uint64_t identity_of(const Model& model);  // §14

// What the rank that needs most needs.
MemoryPlan plan_ranks(const Config& config, const Weights& weights, Options options) {
    if (!options.device) options.device = cpu();
    MemoryPlan plan;
    for (int rank = 0; rank < options.ranks; ++rank) {
        const Share share = share_of(config, weights, rank, options.ranks);
        plan.weights_bytes = std::max(plan.weights_bytes, bytes_of(share));
        plan.cache_bytes = std::max(plan.cache_bytes, options.device->cache_bytes(share.config, options));
        plan.activations_bytes = std::max(plan.activations_bytes, options.device->activations_bytes(share.config, options));
    }
    return plan;
}

// ── Ranks in one process ──

// Ranks that are threads. What they exchange stays where it is, and is looked at by the others between two meetings.
class InProcess final : public Communicator {
public:
    struct Group {
        explicit Group(int n) : ranks(n), parts(static_cast<std::size_t>(n)), sums(parts.size()) {}
        const int ranks;
        std::vector<std::span<const float>> parts;  // of each rank
        std::vector<std::span<float>> sums;         // the same
        std::vector<std::byte>* message = nullptr;
        std::atomic<int> arrived{0};
        std::atomic<std::uint32_t> meeting{0};  // twice their number; odd: a rank has given up
    };
    InProcess(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {}

    int rank() const override { return rank_; }
    int ranks() const override { return group_->ranks; }
    std::string describe() const override { return std::to_string(ranks()) + " ranks in one process"; }
    void all_reduce_sum(std::span<float> values) override {
        Group& g = *group_;
        const std::size_t rank = static_cast<std::size_t>(rank_), ranks = g.sums.size();
        const std::size_t first = values.size() * rank / ranks, n = values.size() * (rank + 1) / ranks - first;
        g.sums[rank] = values;
        barrier();
        std::vector<const float*> parts;
        for (const auto& part : g.sums) parts.push_back(part.data() + first);
        join_ranks(values.data() + first, parts, n);
        for (const auto& sum : g.sums)  // a piece of all ranks' values that nobody else reads or writes
            if (sum.data() != values.data()) std::copy_n(values.data() + first, n, sum.data() + first);
        barrier();
    }
    void gather(std::span<const float> part, std::span<float> whole) override {
        group_->parts[static_cast<std::size_t>(rank_)] = part;
        barrier();
        auto to = whole.begin();
        for (std::size_t r = 0; rank_ == 0 && r < group_->parts.size(); ++r)
            to = std::copy(group_->parts[r].begin(), group_->parts[r].end(), to);
        barrier();
    }
    void broadcast(std::vector<std::byte>& message) override {
        if (rank_ == 0) group_->message = &message;
        barrier();
        if (rank_ != 0) message = *group_->message;
        barrier();
    }
    void barrier() override {
        Group& g = *group_;
        const std::uint32_t meeting = g.meeting.load(std::memory_order_acquire);
        if (!(meeting & 1) && g.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == g.ranks) {
            g.arrived.store(0, std::memory_order_relaxed);
            g.meeting.fetch_add(2);
            g.meeting.notify_all();
            return;
        }
        if (!(meeting & 1)) wait_for_change(g.meeting, meeting);
        if (g.meeting.load() >> 1 == meeting >> 1)
            fail(Code::device, to_text({"rank ", rank_}), "another rank gave up", "its failure", "an answer",
                 "See the error of that rank");
    }
    void abort() noexcept override {
        group_->meeting.fetch_or(1);
        group_->meeting.notify_all();
    }
    void mend() const {  // once no rank is inside any more
        group_->meeting = 0, group_->arrived = 0;
    }

private:
    std::shared_ptr<Group> group_;
    int rank_;
};

std::vector<std::shared_ptr<InProcess>> ranks_in_process(int ranks) {
    const auto group = std::make_shared<InProcess::Group>(ranks);
    std::vector<std::shared_ptr<InProcess>> communicators;
    for (int r = 0; r < ranks; ++r) communicators.push_back(std::make_shared<InProcess>(group, r));
    return communicators;
}

// All ranks of a model as threads of this process: a back end and a cache for each.
class LocalRanks final : public Backend {
public:
    LocalRanks(Device& device, const Model& model, const Options& options)
        : vocabulary_(static_cast<std::size_t>(model.config().vocab_size)), communicators_(ranks_in_process(options.ranks)),
          backends_(communicators_.size()), team_(options.ranks) {
        if (team_.threads() != options.ranks)
            fail(Code::memory, "Options::ranks", "the system has no more threads", team_.threads(), options.ranks,
                 "Use fewer ranks");
        on_all([&](std::size_t rank) {
            Options own = options;
            own.communicator = communicators_[rank];
            backends_[rank] = device.open(model, own);
        });
    }

    std::unique_ptr<KVCache> make_cache() override {
        auto cache = std::make_unique<Cache>();
        cache->parts.resize(backends_.size());
        on_all([&](std::size_t rank) { cache->parts[rank] = backends_[rank]->make_cache(); });
        return cache;
    }
    int max_rows() const override { return backends_[0]->max_rows(); }
    bool step(const Batch& batch, const std::atomic<bool>* cancel) override {
        int wanted = 0;
        for (const Row& row : batch.rows) wanted += row.wants_logits;
        logits_.resize(static_cast<std::size_t>(wanted) * vocabulary_);
        bool done = true;  // by all or by none
        on_all([&](std::size_t rank) {
            std::vector<Row> rows(batch.rows.begin(), batch.rows.end());
            for (Row& row : rows) row.cache = static_cast<Cache*>(row.cache)->parts[rank].get();
            const bool own = backends_[rank]->step({rows}, rank == 0 ? cancel : nullptr);
            if (rank == 0) done = own;
        });
        auto to = logits_.begin();
        for (int i = 0; done && i < wanted; ++i)
            for (const auto& backend : backends_) to = std::ranges::copy(backend->logits(i), to).out;
        return done;
    }
    std::span<const float> logits(int i) const override {
        return std::span(logits_).subspan(static_cast<std::size_t>(i) * vocabulary_, vocabulary_);
    }
    StageTimes stage_times() const override { return backends_[0]->stage_times(); }
    std::string describe() const override { return communicators_[0]->describe() + ", each " + backends_[0]->describe(); }

private:
    struct Cache final : KVCache {
        std::vector<std::unique_ptr<KVCache>> parts;  // of each rank
        int capacity() const override { return parts[0]->capacity(); }
    };
    // f(rank) on every rank's thread. One that fails frees the others from waiting for it; the first is the one to be heard of.
    template <class F>
    void on_all(const F& f) {
        team_.run(barrier_, [&](int rank, int) {
            try {
                f(static_cast<std::size_t>(rank));
            } catch (...) {
                if (!failed_.test_and_set()) failure_ = std::current_exception();
                communicators_[0]->abort();
            }
        });
        if (!failure_) return;
        failed_.clear();
        communicators_[0]->mend();
        std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    std::size_t vocabulary_;
    std::vector<std::shared_ptr<InProcess>> communicators_;
    std::vector<std::unique_ptr<Backend>> backends_;
    std::vector<float> logits_;
    std::atomic_flag failed_;
    std::exception_ptr failure_;
    Barrier barrier_;
    ThreadTeam team_;
};

std::unique_ptr<Backend> open_in_process(Device& device, const Model& model, const Options& options) {
    return std::make_unique<LocalRanks>(device, model, options);
}

// ── Ranks in several processes ──

// What rank 0 tells the others; `count` rows follow a step. Back ends and caches are known by where they are on rank 0.
struct Command {
    enum class Kind : std::uint32_t { compare, open, make_cache, forget, step, gather } kind{};
    Format kv{};
    std::int32_t context = 0, chunk = 0, index = 0, count = 0;  // count: of rows, or of candidates (0: all logits)
    std::uint64_t backend = 0, cache = 0;
};
std::uint64_t name_of(const void* object) { return reinterpret_cast<std::uintptr_t>(object); }

void check_in_step(const Communicator& communicator) {
    if (communicator.lost_step)
        fail(Code::device, to_text({"rank ", communicator.rank()}), "the ranks have lost step", "an earlier failure", "none",
             "Let all ranks end: Communicator::abort()");
}

void tell(Communicator& communicator, const Command& command, std::span<const Row> rows = {}) {
    check_in_step(communicator);
    std::vector<std::byte> message(sizeof command + rows.size_bytes());
    std::memcpy(message.data(), &command, sizeof command);
    if (!rows.empty()) std::memcpy(message.data() + sizeof command, rows.data(), rows.size_bytes());
    communicator.broadcast(message);
}

// The ranks that have loaded something else than rank 0, as rank 0 finds out by four numbers of 16 bits, which floats hold exactly.
std::string ranks_that_differ(Communicator& communicator, const Model& model) {
    std::uint64_t hash = identity_of(model);
    std::array<float, 4> words;
    for (float& word : words) word = static_cast<float>(hash & 0xffff), hash >>= 16;
    std::vector<float> all(communicator.rank() == 0 ? words.size() * static_cast<std::size_t>(communicator.ranks()) : 0);
    communicator.gather(words, all);
    std::string others;
    for (std::size_t i = 0; i < all.size(); i += words.size())
        if (!std::equal(words.begin(), words.end(), all.begin() + static_cast<std::ptrdiff_t>(i)))
            others += (others.empty() ? "" : ", ") + std::to_string(i / words.size());
    return others;
}

// The best k logits of a rank's part of a row, each followed by its id, which floats hold exactly up to 2^24. NaN is no logit, as in
// Sampler::sample; what is missing is NaN.
std::vector<float> best_candidates(std::span<const float> logits, int first_id, int k) {
    std::vector<Candidate> best;
    for (std::size_t i = 0; i < logits.size(); ++i)
        if (logits[i] == logits[i]) best.emplace_back(logits[i], first_id + static_cast<int>(i));
    const auto last = best.begin() + static_cast<std::ptrdiff_t>(std::min(best.size(), static_cast<std::size_t>(k)));
    std::partial_sort(best.begin(), last, best.end(), more_likely);
    std::vector<float> flat;
    for (auto candidate = best.begin(); candidate != last; ++candidate) {
        flat.push_back(candidate->first);
        flat.push_back(static_cast<float>(candidate->second));
    }
    flat.resize(2 * static_cast<std::size_t>(k), std::numeric_limits<float>::quiet_NaN());
    return flat;
}

// Rank 0's side: every call is told to the others, and done here as well.
class LeadBackend final : public Backend {
public:
    LeadBackend(Device& device, const Model& model, const Options& options)
        : communicator_(options.communicator), vocabulary_(static_cast<std::size_t>(model.config().vocab_size)) {
        if (communicator_->rank() != 0)
            fail(Code::argument, "Session", "this process is not the one that leads", to_text({"rank ", communicator_->rank()}),
                 "rank 0", "Call follow() here");
        std::string others;
        together({.kind = Kind::compare}, {}, [&] { others = ranks_that_differ(*communicator_, model); });
        if (!others.empty())
            fail(Code::format, "model", "not all ranks have the same model and version",
                 "a difference between rank 0 and rank " + others, "the same file everywhere", "Copy the file to all machines");
        together({.kind = Kind::open, .kv = options.kv, .context = options.context, .chunk = options.chunk}, {},
                 [&] { backend_ = device.open(model, options); });
    }
    ~LeadBackend() override { forget(*communicator_, {.kind = Kind::forget, .backend = name_of(this)}); }

    std::unique_ptr<KVCache> make_cache() override {
        auto cache = std::make_unique<Cache>(communicator_);
        together({.kind = Kind::make_cache, .cache = name_of(cache.get())}, {}, [&] { cache->local = backend_->make_cache(); });
        return cache;
    }
    int max_rows() const override { return backend_->max_rows(); }
    bool step(const Batch& batch, const std::atomic<bool>* cancel) override {
        std::vector<Row> rows(batch.rows.begin(), batch.rows.end());
        for (Row& row : rows) row.cache = static_cast<Cache*>(row.cache)->local.get();
        row_ = -1;
        bool done = false;
        together({.kind = Kind::step, .count = batch.size()}, batch.rows, [&] { done = backend_->step({rows}, cancel); });
        return done;
    }
    std::span<const float> logits(int i) const override {
        if (row_ == i) return whole_;
        whole_.resize(vocabulary_);
        together({.kind = Kind::gather, .index = i}, {}, [&] { communicator_->gather(backend_->logits(i), whole_); });
        row_ = i;
        return whole_;
    }
    // Where the best few decide, only those of each rank travel.
    int draw(int i, const Sampling& sampling, std::uint64_t random) override {
        const bool greedy = sampling.temperature == 0;
        if (!greedy && (sampling.top_k < 1 || sampling.top_k > 64)) return -1;
        const FloatEnvironment environment;
        if (row_ != i && !gather_candidates(i, greedy ? 1 : sampling.top_k + 1, sampling)) logits(i);
        return draw_token(whole_, sampling, random, candidates_);
    }
    StageTimes stage_times() const override { return backend_->stage_times(); }
    std::string describe() const override { return communicator_->describe() + ", rank 0: " + backend_->describe(); }

private:
    using Kind = Command::Kind;
    struct Cache final : KVCache {
        std::shared_ptr<Communicator> communicator;
        std::unique_ptr<KVCache> local;
        explicit Cache(std::shared_ptr<Communicator> c) : communicator(std::move(c)) {}
        ~Cache() override { forget(*communicator, {.kind = Kind::forget, .cache = name_of(this)}); }
        int capacity() const override { return local->capacity(); }
    };
    // Tells the others and does the same here. What fails here has perhaps not failed there: nobody knows what to wait for then.
    template <class F>
    void together(Command command, std::span<const Row> rows, const F& f) const {
        command.backend = name_of(this);
        try {
            tell(*communicator_, command, rows);
            f();
        } catch (...) {
            communicator_->lost_step = true;
            throw;
        }
    }
    static void forget(Communicator& communicator, const Command& command) noexcept {
        try {
            tell(communicator, command);
        } catch (...) {  // the others are gone: nothing is left to be freed there
        }
    }
    // Fills whole_ with the best n of each rank, the rest NaN. The top-k are among them: two logits may round to one probability,
    // but where the last of a rank is below the k-th of all, so is what the rank has not sent. False where that is not so.
    bool gather_candidates(int i, int n, const Sampling& sampling) {
        const std::size_t count = static_cast<std::size_t>(n);
        std::vector<float> gathered(2 * count * static_cast<std::size_t>(communicator_->ranks())), probabilities;
        const std::vector<float> own = best_candidates(backend_->logits(i), 0, n);
        together({.kind = Kind::gather, .index = i, .count = n}, {}, [&] { communicator_->gather(own, gathered); });
        row_ = -1;
        whole_.assign(vocabulary_, std::numeric_limits<float>::quiet_NaN());
        for (std::size_t at = 0; at < gathered.size(); at += 2)
            if (gathered[at] == gathered[at]) whole_[static_cast<std::size_t>(gathered[at + 1])] = gathered[at];
        if (n == 1) return true;
        const float best = largest(whole_, "Sampler::sample");
        for (std::size_t at = 0; at < gathered.size(); at += 2)
            probabilities.push_back(relative_probability(gathered[at], best, sampling.temperature));
        std::vector<float> sorted = probabilities;
        std::ranges::nth_element(sorted, sorted.begin() + (n - 2), std::greater<float>());
        const float border = std::max(sorted[count - 2], std::numeric_limits<float>::denorm_min());
        for (std::size_t last = count - 1; last < probabilities.size(); last += count)
            if (probabilities[last] >= border) return false;
        return true;
    }

    std::shared_ptr<Communicator> communicator_;
    std::size_t vocabulary_;
    std::unique_ptr<Backend> backend_;
    mutable std::vector<float> whole_;
    mutable int row_ = -1;  // which row whole_ is
    std::vector<Candidate> candidates_;
};

std::unique_ptr<Backend> open_backend(Device& device, const Model& model, const Options& options) {
    share_of(model.config(), model.weights(), 0, options.ranks);  // for its error, before threads start or other ranks are told
    if (options.communicator && options.ranks > 1) return std::make_unique<LeadBackend>(device, model, options);
    return device.open(model, options);
}

}  // namespace detail

void follow(const Model& model, const Options& options) {
    using Kind = detail::Command::Kind;
    Options own = detail::checked_options(model.config(), options);
    if (!own.communicator || own.communicator->rank() == 0)
        detail::fail(Code::argument, "follow", "this process leads", own.communicator ? "rank 0" : "no communicator",
                     "another rank of several", "Make a Session here");
    Communicator& communicator = *own.communicator;
    const std::shared_ptr<Device> device = own.device ? own.device : cpu();
    const int first_logit = detail::border(model.config().vocab_size, panel_rows, communicator.rank(), own.ranks);
    std::map<std::uint64_t, std::unique_ptr<Backend>> backends;
    std::map<std::uint64_t, std::unique_ptr<KVCache>> caches;
    std::vector<std::byte> message;
    std::vector<Row> rows;
    try {
        for (;;) {
            communicator.broadcast(message);
            if (message.empty()) return;
            detail::Command command{};
            if (message.size() >= sizeof command) std::memcpy(&command, message.data(), sizeof command);
            const std::size_t n_rows = command.kind == Kind::step ? static_cast<std::size_t>(command.count) : 0;
            if (message.size() != sizeof command + n_rows * sizeof(Row))
                detail::fail(Code::device, "follow", "rank 0 said something else", detail::to_text({message.size(), " bytes"}),
                             "a command", "Run the same version of the program on all ranks");
            const auto backend = [&]() -> Backend& { return *backends.at(command.backend); };
            switch (command.kind) {
                case Kind::compare: detail::ranks_that_differ(communicator, model); break;
                case Kind::open:
                    own.kv = command.kv, own.context = command.context, own.chunk = command.chunk;
                    backends[command.backend] = device->open(model, own);
                    break;
                case Kind::make_cache: caches[command.cache] = backend().make_cache(); break;
                case Kind::forget: backends.erase(command.backend), caches.erase(command.cache); break;
                case Kind::step:
                    rows.clear();
                    for (std::size_t at = sizeof command; at < message.size(); at += sizeof(Row)) {
                        rows.push_back(detail::load_as<Row>(message.data() + at));
                        rows.back().cache = caches.at(detail::name_of(rows.back().cache)).get();
                    }
                    backend().step({rows}, nullptr);
                    break;
                case Kind::gather:
                    const std::span<const float> logits = backend().logits(command.index);
                    if (command.count == 0) communicator.gather(logits, {});
                    else communicator.gather(detail::best_candidates(logits, first_logit, command.count), {});
            }
        }
    } catch (...) {
        communicator.lost_step = true;
        throw;
    }
}

#ifdef LLAMA3_MPI
namespace detail {

// Ranks that are processes. Sums are gathered by all and joined here: MPI's own reductions have no fixed order.
class MpiRanks final : public Communicator {
public:
    explicit MpiRanks(double timeout_seconds) : timeout_seconds_(timeout_seconds) {
        check_range("mpi, timeout_seconds", timeout_seconds, timeout_seconds > 0, "more than 0");
        int initialised = 0, finalised = 0, provided = 0;
        MPI_Initialized(&initialised);
        MPI_Finalized(&finalised);
        if (finalised) fail(Code::device, "mpi", "MPI has ended", "a second start", "one", "Keep the communicator");
        if (!initialised) check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided), "MPI_Init_thread");
        owner_ = !initialised;
        check(MPI_Comm_dup(MPI_COMM_WORLD, &world_), "MPI_Comm_dup");
        MPI_Comm_set_errhandler(world_, MPI_ERRORS_RETURN);
        MPI_Comm_rank(world_, &rank_);
        MPI_Comm_size(world_, &ranks_);
    }
    ~MpiRanks() override {
        if (rank_ != 0 && std::uncaught_exceptions() > 0) lost_step = true;  // the others are not at their end
        try {
            std::vector<std::byte> nothing;
            if (rank_ == 0) broadcast(nothing);
            barrier();
        } catch (...) {  // the others are gone, and MPI_Finalize would wait for them without end
            return;
        }
        MPI_Comm_free(&world_);
        if (owner_) MPI_Finalize();
    }
    int rank() const override { return rank_; }
    int ranks() const override { return ranks_; }
    std::string describe() const override {
        char version[MPI_MAX_LIBRARY_VERSION_STRING];
        int length = 0;
        MPI_Get_library_version(version, &length);
        const std::string_view text(version, static_cast<std::size_t>(length));
        return to_text({ranks_, " processes, MPI (", text.substr(0, text.find_first_of(",\n")), ")"});
    }
    void all_reduce_sum(std::span<float> values) override {
        constexpr std::size_t most = 1 << 16;  // at a time: bounds the memory
        const std::size_t ranks = static_cast<std::size_t>(ranks_);
        std::vector<const float*> parts(ranks);
        for (std::size_t first = 0; first < values.size(); first += most) {
            const std::size_t n = std::min(most, values.size() - first);
            const int count = static_cast<int>(n);
            if (gathered_.size() < n * ranks) gathered_.resize(n * ranks);
            run("MPI_Iallgather", "a sum", [&](MPI_Request* request) {
                return MPI_Iallgather(&values[first], count, MPI_FLOAT, gathered_.data(), count, MPI_FLOAT, world_, request);
            });
            for (std::size_t r = 0; r < ranks; ++r) parts[r] = gathered_.data() + r * n;
            join_ranks(values.data() + first, parts, n);
        }
    }
    void gather(std::span<const float> part, std::span<float> whole) override {
        const char* what = "a gather";
        if (rank_ != 0) {
            run("MPI_Isend", what, [&](MPI_Request* request) {
                return MPI_Isend(part.data(), static_cast<int>(part.size()), MPI_FLOAT, 0, 0, world_, request);
            });
            return;
        }
        auto to = std::copy(part.begin(), part.end(), whole.begin());
        for (int r = 1, count = 0; r < ranks_; ++r, to += count) {
            const MPI_Status status = run("MPI_Irecv", what, [&](MPI_Request* request) {
                return MPI_Irecv(std::to_address(to), static_cast<int>(whole.end() - to), MPI_FLOAT, r, 0, world_, request);
            });
            MPI_Get_count(&status, MPI_FLOAT, &count);
        }
    }
    void broadcast(std::vector<std::byte>& message) override {
        std::uint64_t bytes = message.size();
        run("MPI_Ibcast", rank_ == 0 ? "a command" : nullptr,
            [&](MPI_Request* request) { return MPI_Ibcast(&bytes, 1, MPI_UINT64_T, 0, world_, request); });
        message.resize(static_cast<std::size_t>(bytes));
        if (bytes == 0) return;
        run("MPI_Ibcast", "a command", [&](MPI_Request* request) {
            return MPI_Ibcast(message.data(), static_cast<int>(bytes), MPI_BYTE, 0, world_, request);
        });
    }
    void barrier() override {
        run("MPI_Ibarrier", "a barrier", [&](MPI_Request* request) { return MPI_Ibarrier(world_, request); });
    }
    void abort() noexcept override {
        MPI_Abort(MPI_COMM_WORLD, 1);  // MPICH would write to each rank of another communicator, and wait for one that is stopped
    }

private:
    void check(int status, const char* call) {
        if (status == MPI_SUCCESS) return;
        char text[MPI_MAX_ERROR_STRING];
        int length = 0;
        MPI_Error_string(status, text, &length);
        lost_step = true;
        fail(Code::device, to_text({"rank ", rank_, ", ", call}), "MPI failed",
             std::string(text, static_cast<std::size_t>(length)), "success", "See what happened to the other ranks");
    }
    // Starts a call and waits: for an answer as long as is allowed, for the next command (what: nullptr) as long as it takes, but
    // then asleep. After a failure nothing is started any more: what was on its way may still want memory that is gone.
    template <class F>
    MPI_Status run(const char* call, const char* what, const F& start) {
        check_in_step(*this);
        MPI_Request request = MPI_REQUEST_NULL;
        MPI_Status status;
        check(start(&request), call);
        const auto began = std::chrono::steady_clock::now();
        for (int tries = 0, done = 0;; ++tries) {
            check(MPI_Test(&request, &done, &status), "MPI_Test");
            if (done) return status;
            if (tries < 1000) {
                pause_briefly();
                continue;
            }
            std::this_thread::yield();
            const double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
            if (!what && waited > 0.2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
            if (!what || waited < timeout_seconds_) continue;
            lost_step = true;
            fail(Code::device, to_text({"rank ", rank_, ", ", what}), "the other ranks do not answer",
                 to_text({"nothing for ", static_cast<float>(timeout_seconds_), " seconds"}), "their part",
                 "See whether they still run, or wait longer: mpi(timeout_seconds)");
        }
    }

    double timeout_seconds_;
    bool owner_ = false;
    MPI_Comm world_ = MPI_COMM_NULL;
    int rank_ = 0, ranks_ = 1;
    std::vector<float> gathered_;
};

}  // namespace detail

std::shared_ptr<Communicator> mpi(double timeout_seconds) { return std::make_shared<detail::MpiRanks>(timeout_seconds); }
#endif

}  // namespace llama3

// ═══ Part IV: Plumbing ═════════════════════════════════════════════════════════════════════════════════════════════════════════

// ═══ §14  Model files ══════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// The reader and a writer of convert/FORMAT.md. Nothing in a file is believed: every number is compared with what it must be or
// bounded by the file's size before it is used, and a loaded model is exactly what §2 says. A new field or tensor starts in
// FORMAT.md and ends in integer_fields, real_fields or required_tensors below, which reader and writer share.

namespace llama3 {

struct Model::Impl {
    std::string name;                   // in messages: the path, or what else it is
    std::span<const std::byte> image;   // all of it
    std::shared_ptr<const void> owner;  // of the image: a mapping, a buffer, the caller's
    bool synthetic = false;             // made in this process, without checksums of the tensors
    Config config;
    Tokenizer tokenizer{nullptr};
    Weights weights;
    std::vector<TensorInfo> tensors;
    struct Section {
        std::uint64_t offset = 0, bytes = 0, checksum = 0;
    };
    std::array<Section, 4> sections;  // of the header, in its order
};

namespace detail {

static_assert(std::endian::native == std::endian::little, "llama3.hpp reads its files in place, and they are little-endian.");

// BLAKE2b (Aumasson et al., 2013; RFC 7693) with a digest of 8 bytes and no key, as a little-endian number.
std::uint64_t blake2b(Bytes data) {
    static constexpr std::uint64_t iv[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                            0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
    static constexpr std::uint8_t sigma[10][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
    std::uint64_t h[8], v[16], m[16];
    std::copy(iv, iv + 8, h);
    h[0] ^= 0x01010000 ^ 8;  // parameters: fanout 1, depth 1, no key, 8 bytes of digest
    for (std::size_t done = 0; done == 0 || done < data.size();) {
        const std::size_t n = std::min<std::size_t>(128, data.size() - done);
        std::memset(m, 0, sizeof m);
        if (n) std::memcpy(m, data.data() + done, n);
        done += n;
        std::copy(h, h + 8, v);
        std::copy(iv, iv + 8, v + 8);
        v[12] ^= done;
        if (done == data.size()) v[14] = ~v[14];  // the last block
        LLAMA3_UNROLL
        for (int round = 0; round < 12; ++round) {
            const std::uint8_t* s = sigma[round % 10];
            const auto mix = [&](int a, int b, int c, int d, int i) {
                v[a] += v[b] + m[s[i]], v[d] = std::rotr(v[d] ^ v[a], 32), v[c] += v[d], v[b] = std::rotr(v[b] ^ v[c], 24);
                v[a] += v[b] + m[s[i + 1]], v[d] = std::rotr(v[d] ^ v[a], 16), v[c] += v[d], v[b] = std::rotr(v[b] ^ v[c], 63);
            };
            mix(0, 4, 8, 12, 0), mix(1, 5, 9, 13, 2), mix(2, 6, 10, 14, 4), mix(3, 7, 11, 15, 6);
            mix(0, 5, 10, 15, 8), mix(1, 6, 11, 12, 10), mix(2, 7, 8, 13, 12), mix(3, 4, 9, 14, 14);
        }
        for (int i = 0; i < 8; ++i) h[i] ^= v[i] ^ v[i + 8];
        if (n < 128) break;
    }
    return h[0];
}

// ── What a file must hold: shared by the reader and the writer ──

constexpr unsigned char magic[8] = {0x89, 'l', 'l', 'a', 'm', 'a', '3', '\n'};
constexpr std::uint32_t format_version = 1;
constexpr std::size_t header_bytes = 128, config_bytes = 128, entry_bytes = 96, name_bytes = 40;
constexpr const char* section_names[4] = {"configuration", "tokenizer", "tensor table", "provenance"};
enum { config_section, tokenizer_section, table_section, provenance_section };

constexpr const char* convert_again = "Convert the model again with convert/convert.py";
constexpr const char* copy_again = "Copy or download the file again";
constexpr const char* choose_another = "Choose another value";

// The numbers of the configuration: offset in the section, and the range that the rest of the code is made for.
template <class T>
struct Field {
    const char* name;
    T Config::*member;
    std::size_t offset;
    T low, high;
};
constexpr Field<int> integer_fields[] = {
    {"the number of layers", &Config::n_layers, 0, 1, 1024},
    {"the model width", &Config::dim, 4, 1, 1 << 17},
    {"the number of query heads", &Config::n_heads, 8, 1, 1024},
    {"the number of key/value heads", &Config::n_kv_heads, 12, 1, 1024},
    {"the head width", &Config::head_dim, 16, 2, 1024},
    {"the feed-forward width", &Config::ffn_dim, 20, 1, 1 << 20},
    {"the vocabulary", &Config::vocab_size, 24, 256, 1 << 24},
    {"the context length", &Config::context_length, 28, 1, 1 << 20},
    {"the original context of the RoPE scaling", &Config::rope_original_context, 52, 0, 1 << 20},
    {"the number of segments of attention_out", &Config::attention_out_segments, 64, 1, max_segments},
    {"the number of segments of down", &Config::down_segments, 68, 1, max_segments},
    {"the begin-of-text token", &Config::begin_token, 72, 0, (1 << 24) - 1},
};
constexpr Field<float> real_fields[] = {
    {"the epsilon of RMSNorm", &Config::norm_eps, 32, 1e-30f, 1.0f},
    {"the RoPE theta", &Config::rope_theta, 36, 1.0f, 1e30f},
    {"the RoPE scaling factor", &Config::rope_factor, 40, 1.0f, 1e6f},
    {"the low frequency factor", &Config::rope_low_freq_factor, 44, 1e-6f, 1e6f},
    {"the high frequency factor", &Config::rope_high_freq_factor, 48, 1e-6f, 1e6f},
};
constexpr std::size_t chat_format_offset = 56, tied_offset = 60, end_count_offset = 76, end_tokens_offset = 80;
constexpr int max_end_tokens = 8;

// Compares what a file (or a caller) gives with what it must be.
struct Check {
    std::string where;
    const char* to_do = convert_again;
    Code code = Code::format;

    [[noreturn]] void bad(std::string_view what, const Part& found, const Part& expected) const {
        fail(code, where, what, found, expected, to_do);
    }
    template <class T>
    void equal(std::string_view what, const char* problem, T found, T expected) const {
        if (found != expected) bad(to_text({what, " ", problem}), found, expected);
    }
    template <class T>
    void range(std::string_view what, T value, T low, T high) const {
        if (!(value >= low && value <= high))  // NaN is not in it
            bad(to_text({what, " is out of range"}), value, to_text({low, " to ", high}));
    }
    void zero(std::string_view what, Bytes bytes) const {
        for (const std::byte b : bytes)
            if (b != std::byte{0}) bad(to_text({what, " should hold nothing"}), std::to_integer<int>(b), "zeros");
    }
    void sum(std::string_view what, Bytes bytes, std::uint64_t stated) const {
        const std::uint64_t computed = blake2b(bytes);
        char found[20], expected[20];
        std::snprintf(found, sizeof found, "%016llx", static_cast<unsigned long long>(computed));
        std::snprintf(expected, sizeof expected, "%016llx", static_cast<unsigned long long>(stated));
        if (computed != stated)
            Check{where, copy_again, Code::checksum}.bad(to_text({what, " has changed since it was written"}), found, expected);
    }
    [[noreturn]] void truncated(std::string_view part, std::size_t size, std::uint64_t expected) const {
        Check{where, copy_again}.bad(to_text({"the file is cut short: it ends in its ", part}), to_text({size, " bytes"}),
                                     to_text({"at least ", expected}));
    }
};

// The largest power of two up to 8 that cuts `columns` into multiples of 64 and, with `heads` > 0, into whole heads.
int choose_segments(std::int64_t columns, int heads) {
    int segments = max_segments;
    while (segments > 1 && (columns % (64 * segments) != 0 || heads % segments != 0)) segments /= 2;
    return segments;
}
int out_segments(const Config& c) { return choose_segments(std::int64_t{c.n_heads} * c.head_dim, c.n_heads); }
int down_segments(const Config& c) { return choose_segments(c.ffn_dim, 0); }

// Every rule for the fields, of each alone and between them.
void check_config(const Check& check, const Config& c) {
    for (const auto& f : integer_fields) check.range(f.name, c.*f.member, f.low, f.high);
    for (const auto& f : real_fields) check.range(f.name, c.*f.member, f.low, f.high);
    check.range("the chat format", static_cast<int>(c.chat_format), 0, 3);
    if (c.n_heads % c.n_kv_heads != 0)
        check.bad("the key/value heads cannot be shared evenly", c.n_kv_heads, to_text({"a divisor of ", c.n_heads}));
    if (c.head_dim % 2 != 0) check.bad("the head width is odd", c.head_dim, "an even number");

    const float low = c.rope_low_freq_factor, high = c.rope_high_freq_factor;
    const int context = c.rope_original_context;
    if (c.rope_factor == 1 && (low != 1 || high != 1 || context != 0))
        check.bad("the RoPE scaling is off (factor 1) but has parameters", to_text({low, ", ", high, ", ", context}),
                  "1, 1, 0");
    if (c.rope_factor != 1 && (low >= high || context == 0))
        check.bad("the parameters of the RoPE scaling make no sense", to_text({low, ", ", high, ", ", context}),
                  "low < high, and a context");

    check.equal("attention_out", "has a wrong number of segments", c.attention_out_segments, out_segments(c));
    check.equal("down", "has a wrong number of segments", c.down_segments, down_segments(c));
    check.range("the begin-of-text token", c.begin_token, 0, c.vocab_size - 1);
    check.range<std::size_t>("the number of end tokens", c.end_tokens.size(), 0, max_end_tokens);
    int least = 0;
    for (const int token : c.end_tokens) check.range("an end token", token, least, c.vocab_size - 1), least = token + 1;
}

// The tensors of a model, in the order of the file; format, place and checksum are left open.
std::vector<TensorInfo> required_tensors(const Config& c) {
    std::vector<TensorInfo> list;
    std::string layer;
    const auto add = [&](const char* name, int dimensions, int rows, int columns, int segments = 1) {
        list.push_back({layer + name, Format::f32, dimensions, rows, columns, segments, 0, 0, 0});
    };
    const int query_width = c.n_heads * c.head_dim, key_width = c.n_kv_heads * c.head_dim;
    add("embedding", 2, c.vocab_size, c.dim);
    for (int i = 0; i < c.n_layers; ++i) {
        layer = to_text({"layers.", i, "."});
        add("attention_norm", 1, 1, c.dim);
        add("query", 2, query_width, c.dim);
        add("key", 2, key_width, c.dim);
        add("value", 2, key_width, c.dim);
        add("attention_out", 2, c.dim, query_width, c.attention_out_segments);
        add("ffn_norm", 1, 1, c.dim);
        add("gate", 2, c.ffn_dim, c.dim);
        add("up", 2, c.ffn_dim, c.dim);
        add("down", 2, c.dim, c.ffn_dim, c.down_segments);
    }
    layer.clear();
    add("final_norm", 1, 1, c.dim);
    if (!c.tied_embedding) add("output", 2, c.vocab_size, c.dim);
    return list;
}

// Neither can overflow: rows and columns are at most 2^24 and 2^20.
std::uint64_t panel_bytes(const TensorInfo& t) {
    const std::int64_t per_unit = unit_columns(t.format);
    return static_cast<std::uint64_t>(round_up(t.columns, per_unit) / per_unit) * unit_bytes(t.format);
}
std::uint64_t tensor_bytes(const TensorInfo& t) {
    if (t.dimensions == 1) return 4 * static_cast<std::uint64_t>(t.columns);
    return static_cast<std::uint64_t>(round_up(t.rows, panel_rows) / panel_rows) * panel_bytes(t);
}
std::uint64_t align(std::uint64_t n, std::uint64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ── Reading ──

using Section = Model::Impl::Section;

// The bytes that a section covers, once read_header has checked that they are there.
Bytes section_of(Bytes image, const Section& s) {
    return image.subspan(static_cast<std::size_t>(s.offset), static_cast<std::size_t>(s.bytes));
}

// Returns the size that the file says it has. Less may be there, but all sections are.
std::uint64_t read_header(const Check& check, Bytes image, std::array<Section, 4>& sections) {
    const std::size_t shown = std::min(image.size(), sizeof magic);
    if (shown == 0 || std::memcmp(image.data(), magic, shown) != 0) {
        std::string found = shown ? "" : " nothing";
        char hex[4];
        for (std::size_t i = 0; i < shown; ++i)
            std::snprintf(hex, sizeof hex, " %02X", std::to_integer<unsigned>(image[i])), found += hex;
        Check{check.where, "Make one with convert/convert.py"}.bad("this is not an .l3 model file", "at its start" + found,
                                                                   "89 6C 6C 61 6D 61 33 0A");
    }
    if (image.size() < header_bytes) check.truncated("header", image.size(), header_bytes);
    const std::byte* header = image.data();
    check.equal("the file", "is of another version of the format", load_as<std::uint32_t>(header + 8), format_version);
    check.sum("the header", image.first(120), load_as<std::uint64_t>(header + 120));
    check.zero("bytes 12 to 15", image.subspan(12, 4));

    const std::uint64_t size = load_as<std::uint64_t>(header + 16);
    for (std::size_t i = 0; i < sections.size(); ++i) {
        const std::byte* entry = header + 24 + 24 * i;
        Section& s = sections[i];
        s = {load_as<std::uint64_t>(entry), load_as<std::uint64_t>(entry + 8), load_as<std::uint64_t>(entry + 16)};
        if (s.offset % 8 != 0 || s.offset > size || s.bytes > size - s.offset)
            check.bad(to_text({"the ", section_names[i], " has no place in the file"}),
                      to_text({s.bytes, " bytes at ", s.offset}), to_text({"a multiple of 8 and an end by ", size}));
        if (s.offset + s.bytes > image.size()) check.truncated(section_names[i], image.size(), size);
    }
    std::array<std::size_t, 4> order = {0, 1, 2, 3};
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return sections[a].offset < sections[b].offset; });
    std::uint64_t end = header_bytes;
    for (const std::size_t i : order) {
        check.range(to_text({"the start of the ", section_names[i]}), sections[i].offset, end, size);
        end = sections[i].offset + sections[i].bytes;
    }
    return size;
}

Config read_config(const Check& check, Bytes section) {
    check.equal("the configuration", "has a wrong size", section.size(), config_bytes);
    Config config;
    const auto integer = [&](std::size_t offset, const char* name, int low, int high) {
        const std::int64_t value = load_as<std::uint32_t>(section.data() + offset);
        check.range<std::int64_t>(name, value, low, high);
        return static_cast<int>(value);
    };
    for (const auto& f : integer_fields) config.*f.member = integer(f.offset, f.name, f.low, f.high);
    for (const auto& f : real_fields) config.*f.member = load_as<float>(section.data() + f.offset);
    config.chat_format = static_cast<ChatFormat>(integer(chat_format_offset, "the chat format", 0, 3));
    config.tied_embedding = integer(tied_offset, "the mark of a tied embedding", 0, 1) != 0;
    const auto ends = static_cast<std::size_t>(integer(end_count_offset, "the number of end tokens", 0, max_end_tokens));
    for (std::size_t i = 0; i < ends; ++i)
        config.end_tokens.push_back(integer(end_tokens_offset + 4 * i, "an end token", 0, 1 << 24));
    check.zero("the configuration after its end tokens", section.subspan(end_tokens_offset + 4 * ends));
    check_config(check, config);
    return config;
}

// Cuts the section into its lists, which stay where they are. make_tokenizer (§6) looks at the tokens and names themselves.
Tokenizer read_tokenizer(const Check& check, Bytes section, const Config& config, std::shared_ptr<const void> owner) {
    std::size_t position = 0;
    const auto take = [&](std::uint64_t bytes, const char* what) {
        if (bytes > section.size() - position)
            check.bad(to_text({"the tokenizer ends in its ", what}), to_text({section.size(), " bytes"}),
                      to_text({"at least ", position + bytes}));
        position += static_cast<std::size_t>(bytes);
        return section.data() + position - bytes;
    };
    const auto numbers = [&](std::uint64_t count, const char* what) {
        const std::byte* first = take(4 * count, what);
        return std::span(reinterpret_cast<const std::uint32_t*>(first), static_cast<std::size_t>(count));
    };
    const auto ascending = [&](std::span<const std::uint32_t> list, std::uint64_t least, std::uint64_t high, const char* what) {
        for (const std::uint64_t number : list) {
            check.range(what, number, least, high);
            least = number + 1;
        }
    };
    const auto text = [&](std::span<const std::uint32_t> starts, const char* what) {
        check.equal(what, "is not 0 for the first", starts.front(), 0u);
        ascending(starts, 0, section.size() - position, what);
        return std::string_view(reinterpret_cast<const char*>(take(starts.back(), what)), starts.back());
    };

    const auto counts = numbers(2, "counts");
    const std::uint32_t vocabulary = static_cast<std::uint32_t>(config.vocab_size);
    check.range("the number of tokens", counts[0], 1u, vocabulary);
    const auto starts = numbers(std::uint64_t{counts[0]} + 1, "starts of tokens");
    const std::string_view tokens = text(starts, "the start of a token");
    const std::size_t padding = (4 - position % 4) % 4;
    check.zero("the tokenizer after its tokens", {take(padding, "tokens"), padding});
    const auto ids = numbers(counts[1], "ids of special tokens");
    ascending(ids, counts[0], vocabulary - 1, "the id of a special token");
    const auto name_starts = numbers(std::uint64_t{counts[1]} + 1, "starts of special tokens");
    const std::string_view names = text(name_starts, "the start of a special token");
    check.equal("the tokenizer", "has a wrong size", section.size(), position);
    return Tokenizer(make_tokenizer(starts, tokens, ids, name_starts, names, config.vocab_size, config.begin_token,
                                    config.end_tokens, std::move(owner), check.where));
}

// The name in an entry of the tensor table, fit to be shown.
std::string read_name(const Check& check, const std::byte* entry, std::size_t i) {
    const std::string_view field(reinterpret_cast<const char*>(entry), name_bytes), name = field.substr(0, field.find('\0'));
    const bool printable = std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c <= '~'; });
    if (name.empty() || name.size() == name_bytes || !printable || field.find_first_not_of('\0', name.size()) != field.npos)
        check.bad(to_text({"tensor ", i, " has a damaged name"}), "other bytes", "1 to 39 characters, then zeros");
    return std::string(name);
}

// The tensors, each compared with the one that must stand there. `end`: of the last section; `size`: of the file.
std::vector<TensorInfo> read_table(const Check& check, Bytes table, const Config& config, std::uint64_t end, std::uint64_t size) {
    const std::uint64_t stated = table.size() < 8 ? 0 : load_as<std::uint32_t>(table.data());
    check.equal("the tensor table", "has a wrong size", std::uint64_t{table.size()}, 8 + entry_bytes * stated);
    const std::size_t count = (table.size() - 8) / entry_bytes;
    check.zero("bytes 4 to 7 of the tensor table", table.subspan(4, 4));

    std::vector<TensorInfo> tensors = required_tensors(config);
    for (std::size_t i = 0; i < std::max(count, tensors.size()); ++i) {
        if (i == count)
            check.bad(to_text({"tensor ", tensors[i].name, " is missing"}), to_text({count, " tensors"}), tensors.size());
        const std::byte* entry = table.data() + 8 + entry_bytes * i;
        const std::string name = read_name(check, entry, i), tensor = "tensor " + name;
        if (i == tensors.size()) check.bad(to_text({tensor, " is one too many"}), to_text({count, " tensors"}), tensors.size());
        TensorInfo& t = tensors[i];
        if (name != t.name) check.bad(to_text({"tensor ", i, " is not the one that belongs there"}), name, t.name);

        const auto word = [&](std::size_t offset) { return load_as<std::uint32_t>(entry + offset); };
        const auto number = [&](std::size_t offset) { return load_as<std::uint64_t>(entry + offset); };
        const std::uint32_t format = word(40);  // read once: the file may change meanwhile
        if (format > (t.dimensions == 1 ? 0u : 3u))
            check.bad(to_text({tensor, " has a wrong format"}), format,
                      t.dimensions == 1 ? "0: f32" : "0 to 3: f32, bf16, q8, q4");
        t.format = static_cast<Format>(format), t.offset = number(64), t.bytes = number(72), t.checksum = number(80);
        check.equal(tensor, "has a wrong number of dimensions", word(44), static_cast<std::uint32_t>(t.dimensions));
        check.equal(tensor, "has a wrong number of rows", number(48), static_cast<std::uint64_t>(t.rows));
        check.equal(tensor, "has a wrong number of columns", number(56), static_cast<std::uint64_t>(t.columns));
        check.equal(tensor, "has a wrong number of segments", word(88), static_cast<std::uint32_t>(t.segments));
        check.equal(tensor, "has a wrong last word in the table", word(92), 0u);
        check.equal(tensor, "has a wrong number of bytes", t.bytes, tensor_bytes(t));
        if (i > 0) check.equal(tensor, "is in the wrong place", t.offset, align(end, 64));
        if (i == 0 && (t.offset % 4096 != 0 || t.offset < end))
            check.bad(to_text({tensor, " is in the wrong place"}), t.offset, to_text({"a multiple of 4096, at least ", end}));
        if (t.offset > size || t.bytes > size - t.offset)
            check.bad(to_text({tensor, " lies outside the file"}), to_text({t.bytes, " bytes at ", t.offset}),
                      to_text({"an end by ", size}));
        end = t.offset + t.bytes;
    }
    check.equal("the size of the file", "is not where its last tensor ends", size, end);
    for (std::size_t i = 1; i < tensors.size(); ++i)  // these meet the same packed activations, so they share a format
        for (const std::string_view part : {".key", ".value", ".up"})
            if (tensors[i].name.ends_with(part) && tensors[i].format != tensors[i - 1].format)
                check.bad(to_text({"tensor ", tensors[i].name, " has another format than ", tensors[i - 1].name}),
                          format_name(tensors[i].format), format_name(tensors[i - 1].format));
    return tensors;
}

// Views of the tensors, which are in the order of required_tensors.
Weights bind_weights(const std::byte* image, const Config& config, const std::vector<TensorInfo>& tensors) {
    auto next = tensors.begin();
    const auto norm = [&] { return reinterpret_cast<const float*>(image + (next++)->offset); };
    const auto matrix = [&] {
        const TensorInfo& t = *next++;
        return Matrix{t.format, image + t.offset, t.rows, t.columns, t.segments, static_cast<std::size_t>(panel_bytes(t))};
    };
    Weights weights;
    weights.embedding = matrix();
    for (int i = 0; i < config.n_layers; ++i) {  // a list in braces is evaluated from left to right
        Layer layer{i, norm(), matrix(), matrix(), matrix(), matrix(), norm(), matrix(), matrix(), matrix()};
        weights.layers.push_back(layer);
    }
    weights.final_norm = norm();
    weights.output = config.tied_embedding ? weights.embedding : matrix();
    return weights;
}

// Reads the header, the configuration, the tensor table and the tokenizer, and touches nothing else.
std::shared_ptr<Model::Impl> open_model(const std::string& name, Image file) {
    const Check check{name};
    auto model = std::make_shared<Model::Impl>();
    model->name = name, model->image = file.bytes, model->owner = std::move(file.owner);
    const Bytes image = model->image;
    const std::uint64_t size = read_header(check, image, model->sections);
    const auto& [config, tokenizer, table, provenance] = model->sections;
    check.sum("the configuration", section_of(image, config), config.checksum);
    check.sum("the tensor table", section_of(image, table), table.checksum);
    std::uint64_t end = 0;
    for (const Section& s : model->sections) end = std::max(end, s.offset + s.bytes);
    model->config = read_config(check, section_of(image, config));
    model->tensors = read_table(check, section_of(image, table), model->config, end, size);
    for (const TensorInfo& t : model->tensors)
        if (t.offset + t.bytes > image.size()) check.truncated("tensor " + t.name, image.size(), size);
    Check{name, copy_again}.equal("the file", "goes on after its end", std::uint64_t{image.size()}, size);
    model->tokenizer = read_tokenizer(check, section_of(image, tokenizer), model->config, model->owner);
    model->weights = bind_weights(image.data(), model->config, model->tensors);
    return model;
}

// ── Writing: synthetic models, and files for tests ──

// The tokens of a model: ordinary ones by rank; special ones with their ids, ascending.
struct Vocabulary {
    std::vector<std::string> tokens;
    std::vector<std::pair<int, std::string>> specials;
};

// The 256 bytes, then aa, ab, ..., zzzz, ...; at the end the special tokens of Llama 3.2, at most 256.
Vocabulary synthetic_vocabulary(int vocab_size) {
    const int ranks = std::max(256, vocab_size - 256);
    Vocabulary v;
    const auto visible = [](int b) { return (b > 32 && b < 127) || (b > 160 && b != 173); };  // first in Llama's order
    for (const bool wanted : {true, false})
        for (int b = 0; b < 256; ++b)
            if (visible(b) == wanted) v.tokens.emplace_back(1, static_cast<char>(b));
    for (std::string next = "aa"; static_cast<int>(v.tokens.size()) < ranks;) {
        v.tokens.push_back(next);
        std::size_t i = next.size();
        while (i > 0 && next[i - 1] == 'z') next[--i] = 'a';  // count up: carry over the z's
        if (i > 0) ++next[i - 1];
        else next += 'a';
    }
    constexpr const char* names[] = {"begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                                     "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
                                     "python_tag", "image"};
    for (int i = 0; ranks + i < vocab_size; ++i) {
        const std::string name = i < 12 ? names[i] : to_text({"reserved_special_token_", i - 10});
        v.specials.emplace_back(ranks + i, to_text({"<|", name, "|>"}));
    }
    return v;
}

// Appends values as they are in memory.
template <class... T>
void append(std::string& to, const T&... values) {
    (to.append(reinterpret_cast<const char*>(&values), sizeof values), ...);
}

std::string write_config(const Config& c) {
    std::string section(config_bytes, '\0');
    const auto put = [&](std::size_t offset, auto value) { std::memcpy(section.data() + offset, &value, sizeof value); };
    for (const auto& f : integer_fields) put(f.offset, c.*f.member);
    for (const auto& f : real_fields) put(f.offset, c.*f.member);
    put(chat_format_offset, c.chat_format);
    put(tied_offset, std::uint32_t{c.tied_embedding});
    put(end_count_offset, static_cast<std::uint32_t>(c.end_tokens.size()));
    for (std::size_t i = 0; i < c.end_tokens.size(); ++i) put(end_tokens_offset + 4 * i, c.end_tokens[i]);
    return section;
}

std::string write_tokenizer(const Vocabulary& v) {
    std::string section, tokens, names;
    append(section, static_cast<std::uint32_t>(v.tokens.size()), static_cast<std::uint32_t>(v.specials.size()), 0u);
    for (const std::string& token : v.tokens) tokens += token, append(section, static_cast<std::uint32_t>(tokens.size()));
    section += tokens;
    section.resize(static_cast<std::size_t>(align(section.size(), 4)));
    for (const auto& special : v.specials) append(section, special.first);
    append(section, 0u);
    for (const auto& special : v.specials) names += special.second, append(section, static_cast<std::uint32_t>(names.size()));
    return section + names;
}

std::string write_table(const std::vector<TensorInfo>& tensors) {
    std::string section;
    append(section, static_cast<std::uint64_t>(tensors.size()));  // u32 count, u32 0
    for (const TensorInfo& t : tensors) {
        section += t.name + std::string(name_bytes - t.name.size(), '\0');
        append(section, t.format, t.dimensions, static_cast<std::uint64_t>(t.rows), static_cast<std::uint64_t>(t.columns));
        append(section, t.offset, t.bytes, t.checksum, static_cast<std::uint64_t>(t.segments));  // u32 segments, u32 0
    }
    return section;
}

std::vector<TensorInfo> tensors_of_type(const Config& config, Format format) {
    if (unit_columns(format) == 0)
        fail(Code::argument, "format", "it is unknown", static_cast<std::uint32_t>(format), "f32, bf16, q8 or q4",
             "Choose one of these");
    std::vector<TensorInfo> tensors = required_tensors(config);
    for (TensorInfo& t : tensors) {
        const bool sensitive = format == Format::q4 && (t.name == "embedding" || t.name == "output");  // FORMAT.md, section 8
        t.format = t.dimensions == 1 ? Format::f32 : sensitive ? Format::q8 : format;
    }
    return tensors;
}

// A whole file in memory, allocated once. fill(tensor, bytes) writes the bytes of a tensor in place; they are zeros before.
template <class F>
AlignedBuffer write_model(const Config& config, const Vocabulary& vocabulary, Format format, const std::string& provenance,
                          bool checksums, const F& fill) {
    const Check check{"configuration", choose_another, Code::argument};
    check_config(check, config);
    std::vector<TensorInfo> tensors = tensors_of_type(config, format);
    std::string parts[4] = {write_config(config), write_tokenizer(vocabulary), write_table(tensors), provenance};
    std::uint64_t offsets[4], end = header_bytes;
    for (std::size_t i = 0; i < 4; ++i) offsets[i] = align(end, 8), end = offsets[i] + parts[i].size();
    end = align(end, 4096);
    for (TensorInfo& t : tensors) t.offset = align(end, 64), t.bytes = tensor_bytes(t), end = t.offset + t.bytes;
    check.range<std::uint64_t>("the size of the model", end, 0, std::numeric_limits<std::size_t>::max());

    AlignedBuffer image(static_cast<std::size_t>(end), true);
    for (TensorInfo& t : tensors) {
        fill(t, image.data() + t.offset);
        if (checksums) t.checksum = blake2b({image.data() + t.offset, static_cast<std::size_t>(t.bytes)});
    }
    parts[table_section] = write_table(tensors);
    std::string header(reinterpret_cast<const char*>(magic), sizeof magic);
    append(header, std::uint64_t{format_version}, end);  // u32 version, u32 0
    for (std::size_t i = 0; i < 4; ++i) {
        append(header, offsets[i], std::uint64_t{parts[i].size()}, blake2b(std::as_bytes(std::span(parts[i]))));
        std::memcpy(image.data() + offsets[i], parts[i].data(), parts[i].size());
    }
    append(header, blake2b(std::as_bytes(std::span(header))));
    std::memcpy(image.data(), header.data(), header.size());
    return image;
}

// Encodes a tensor from rows of floats: fill_row(name, row, values [columns]).
template <class F>
void encode_tensor(const TensorInfo& t, std::byte* bytes, const F& fill_row) {
    const auto columns = static_cast<std::size_t>(t.columns);
    if (t.dimensions == 1) return fill_row(t.name, 0, std::span(reinterpret_cast<float*>(bytes), columns));
    const auto padded = static_cast<std::size_t>(round_up(t.columns, unit_columns(t.format)));
    for (int row = 0; row < t.rows; row += panel_rows, bytes += panel_bytes(t)) {
        std::vector<float> rows(panel_rows * padded);
        for (int r = 0; r < panel_rows && row + r < t.rows; ++r)
            fill_row(t.name, row + r, std::span(rows).subspan(static_cast<std::size_t>(r) * padded, columns));
        encode_panel(t.format, rows.data(), static_cast<int>(padded), bytes);
    }
}

// Weights of standard deviation 1 / √columns, drawn as bits of the format. Only for shapes that need no filling up.
void random_panels(const TensorInfo& t, std::byte* bytes, std::uint64_t& state) {
    const double deviation = 1 / std::sqrt(static_cast<double>(t.columns));
    // f32, bf16: sign and fraction are drawn, the exponent e is the same for all: ±[1, 2) 2^e, of deviation 1.53 x 2^e
    const auto exponent = static_cast<std::uint64_t>(127 + std::ilogb(deviation / 1.08));
    std::uint64_t keep = ~0ull, set = 0, odd = 0;
    if (t.format == Format::f32) keep = 0x807fffff807fffff, set = (exponent << 23) * 0x0000000100000001;
    if (t.format == Format::bf16) keep = 0x807f807f807f807f, set = (exponent << 7) * 0x0001000100010001;
    if (t.format == Format::q8) odd = 0x0101010101010101;  // negative bytes become odd: none is -128
    // q8, q4: uniform bytes (deviation 73.9) and nibbles (4.6); scales differ by up to 12 %, in q4 also in their sign
    const std::size_t unit = unit_bytes(t.format), scales = t.format == Format::q8 || t.format == Format::q4 ? unit - 64 : unit;
    const int scale = to_fp16(static_cast<float>(deviation / (t.format == Format::q8 ? 78 : 4.9)));
    const int varied = t.format == Format::q8 ? 0x007f : 0x807f;
    for (const std::byte* end = bytes + t.bytes; bytes < end; bytes += unit) {
        for (std::size_t i = 0; i < scales; i += 8) {
            const std::uint64_t random = next_random(state);
            store_as(bytes + i, ((random | ((random >> 7) & odd)) & keep) | set);
        }
        for (std::size_t i = scales; i < unit; i += 2)
            store_as(bytes + i, static_cast<std::uint16_t>(scale + (static_cast<int>(next_random(state)) & varied)));
    }
}

// A file of random weights. Segments, begin and end tokens are set here, whatever the configuration says.
AlignedBuffer synthetic_image(Config c, Format format, std::uint64_t seed, bool checksums) {
    const FloatEnvironment environment;
    const Check check{"synthetic model", choose_another, Code::argument};
    check.range("the vocabulary", c.vocab_size, 266, 1 << 24);  // 256 bytes and the special tokens up to <|eot_id|>
    const Vocabulary vocabulary = synthetic_vocabulary(c.vocab_size);
    const int first = vocabulary.specials[0].first;
    c.begin_token = first, c.end_tokens = {first + 1, first + 8, first + 9};  // end_of_text, eom_id, eot_id
    c.attention_out_segments = out_segments(c), c.down_segments = down_segments(c);
    std::uint64_t state = seed;
    const auto fill = [&](const TensorInfo& t, std::byte* bytes) {
        if (t.dimensions == 2 && t.rows % panel_rows == 0 && t.columns % unit_columns(t.format) == 0)
            return random_panels(t, bytes, state);
        const float width = std::sqrt(12 / static_cast<float>(t.columns));  // of a uniform distribution of the same deviation
        encode_tensor(t, bytes, [&](const std::string&, int, std::span<float> row) {
            for (float& x : row) {
                const float uniform = static_cast<float>(next_random(state) >> 40) * 0x1p-24f;
                x = t.dimensions == 1 ? 1 : (uniform - 0.5f) * width;
            }
        });
    };
    const std::string provenance = "source: random numbers\nconverter: llama3.hpp " LLAMA3_VERSION "\n";
    return write_model(c, vocabulary, format, provenance, checksums, fill);
}

}  // namespace detail

// ── Model ──

Model Model::load(const std::string& path, Loading loading) {
    return Model(detail::open_model(path, loading == Loading::map ? detail::map_file(path) : detail::read_file(path)));
}

Model Model::from_memory(std::span<const std::byte> image, std::shared_ptr<const void> owner) {
    const detail::Check check{"model in memory", "Copy it into memory from std::aligned_alloc or the like", Code::argument};
    const auto past = reinterpret_cast<std::uintptr_t>(image.data()) % 64;
    if (past != 0) check.bad("the image is not aligned", detail::to_text({past, " bytes past"}), "a multiple of 64");
    return Model(detail::open_model("model in memory", {image, std::move(owner)}));
}

Model Model::synthetic(const Config& config, Format format, std::uint64_t seed) {
    const detail::Image image = detail::in_memory(detail::synthetic_image(config, format, seed, false));
    const auto impl = detail::open_model("synthetic model", image);
    impl->synthetic = true;
    return Model(impl);
}

const Config& Model::config() const { return impl_->config; }
const Tokenizer& Model::tokenizer() const { return impl_->tokenizer; }
const Weights& Model::weights() const { return impl_->weights; }
std::vector<TensorInfo> Model::tensors() const { return impl_->tensors; }

std::string Model::provenance() const {
    const auto text = detail::section_of(impl_->image, impl_->sections[detail::provenance_section]);
    return {reinterpret_cast<const char*>(text.data()), text.size()};
}

std::string Model::describe() const {
    const Config& c = impl_->config;
    constexpr const char* chat_formats[] = {"none", "llama3", "llama3.1", "llama3.2"};
    std::uint64_t parameters = 0, bytes[4] = {};
    for (const TensorInfo& t : impl_->tensors) {
        parameters += static_cast<std::uint64_t>(t.rows) * static_cast<std::uint64_t>(t.columns);
        bytes[static_cast<std::size_t>(t.format)] += t.bytes;
    }
    const auto millions = [](std::uint64_t n) { return static_cast<float>(n) / 1e6f; };
    std::string text =
        detail::to_text({impl_->name, ": ", millions(parameters), " million parameters, ", c.n_layers, " layers\nwidth ", c.dim,
                        ", feed-forward ", c.ffn_dim, ", ", c.n_heads, " query and ", c.n_kv_heads, " key/value heads of ",
                        c.head_dim, ", vocabulary ", c.vocab_size, c.tied_embedding ? ", tied embedding" : "", "\ncontext ",
                        c.context_length, ", RoPE theta ", c.rope_theta, ", scaling ",
                        c.rope_factor == 1 ? "none" : detail::to_text({c.rope_factor, " beyond ", c.rope_original_context}),
                        ", chat format ", chat_formats[static_cast<std::size_t>(c.chat_format)], "\nweights"});
    for (std::size_t i = 0; i < 4; ++i)
        if (bytes[i]) text += detail::to_text({" ", format_name(static_cast<Format>(i)), " ", millions(bytes[i]), " MB"});
    return text + "\n";
}

void Model::verify() const {
    const Impl& m = *impl_;
    if (m.synthetic) return;  // never was a file
    const detail::Check check{m.name};
    check.sum("the header", m.image.first(120), detail::load_as<std::uint64_t>(m.image.data() + 120));
    std::uint64_t end = m.tensors[0].offset;
    for (std::size_t i = 0; i < m.sections.size(); ++i)
        check.sum(detail::to_text({"the ", detail::section_names[i]}), detail::section_of(m.image, m.sections[i]),
                  m.sections[i].checksum);
    for (const TensorInfo& t : m.tensors) {
        check.zero("the gap before tensor " + t.name, detail::section_of(m.image, {end, t.offset - end, 0}));
        check.sum("tensor " + t.name, detail::section_of(m.image, {t.offset, t.bytes, 0}), t.checksum);
        end = t.offset + t.bytes;
    }
}

// A hash of what the file says of itself (configuration, tokenizer, tensors and their checksums) and, as random weights have no
// checksums, of where the embedding table begins, which all ranks have.
std::uint64_t detail::identity_of(const Model& model) {
    std::string identity = LLAMA3_VERSION;
    for (const auto& section : model.impl().sections) append(identity, section.bytes, section.checksum);
    identity.append(reinterpret_cast<const char*>(model.weights().embedding.data), 64);
    return blake2b(std::as_bytes(std::span(identity)));
}

MemoryPlan Model::plan(const Options& options) const {
    return detail::plan_ranks(impl_->config, impl_->weights, detail::checked_options(impl_->config, options));
}

MemoryPlan plan_memory(const Config& config, Format format, const Options& options) {
    Config c = config;
    c.attention_out_segments = detail::out_segments(c), c.down_segments = detail::down_segments(c);
    detail::check_config({"plan_memory", detail::choose_another, Code::argument}, c);
    const Weights nowhere = detail::bind_weights(nullptr, c, detail::tensors_of_type(c, format));
    return detail::plan_ranks(c, nowhere, detail::checked_options(c, options));
}

}  // namespace llama3

// ═══ §15  Platform ═════════════════════════════════════════════════════════════════════════════════════════════════════════════
//
// All that depends on the operating system or on the processor's name: files, memory, floating-point modes, what the machine
// has; and the one table that nobody wants to read. A new system changes this section, a new processor CpuFeatures and §10.

namespace llama3::detail {

// ── Files and memory ──

// The system's words for its last error.
std::string system_error() {
#if defined(_WIN32)
    return std::system_category().message(static_cast<int>(GetLastError()));
#else
    return std::system_category().message(errno);
#endif
}

[[noreturn]] void fail_file(const std::string& path, const std::string& what, const std::string& found,
                            const char* to_do = "Give the path of a readable .l3 file") {
    fail(Code::file, path, what, found, "a readable file", to_do);
}


// Large buffers are pages of their own: zero, and backed by memory only once they are touched.
constexpr std::size_t large_buffer = std::size_t{1} << 20;

AlignedBuffer::AlignedBuffer(std::size_t bytes, [[maybe_unused]] bool dense) {
    if (bytes == 0) return;
    void* memory = nullptr;
    if (bytes < large_buffer) {
        memory = ::operator new (bytes, std::align_val_t{64}, std::nothrow);
        if (memory) std::memset(memory, 0, bytes);
    } else {
#if defined(_WIN32)
        memory = VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
#else
        memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) memory = nullptr;
#if defined(MADV_HUGEPAGE)
        else if (dense) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: it may fail
#endif
#endif
    }
    if (!memory)
        fail(Code::memory, "memory", "the system has not enough", "less", to_text({bytes, " bytes"}),
             "Choose a smaller context or cache format, or a smaller model");
    data_ = {static_cast<std::byte*>(memory), Free{bytes}};
}

void AlignedBuffer::Free::operator()(std::byte* data) const {
    if (bytes < large_buffer) ::operator delete (data, std::align_val_t{64});
#if defined(_WIN32)
    else VirtualFree(data, 0, MEM_RELEASE);
#else
    else munmap(data, bytes);
#endif
}

// An open file. Its size is taken once: a file that changes while it is read is an error, not a surprise.
class File {
    static constexpr const char* read_instead = "Load it with Loading::read instead";
    std::string path_;
    std::uint64_t size_ = 0;
    struct Handle {
#if defined(_WIN32)
        HANDLE value = INVALID_HANDLE_VALUE;
        ~Handle() { CloseHandle(value); }
#else
        int value = -1;
        ~Handle() { ::close(value); }
#endif
    } handle_;

public:
#if defined(_WIN32)
    explicit File(const std::string& path) : path_(path) {
        std::wstring wide(path.size(), L'\0');  // UTF-8 has at least as many units as UTF-16
        wide.resize(static_cast<std::size_t>(MultiByteToWideChar(CP_UTF8, 0, path.data(), static_cast<int>(path.size()),
                                                                 wide.data(), static_cast<int>(wide.size()))));
        handle_.value =
            CreateFileW(wide.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
        if (handle_.value == INVALID_HANDLE_VALUE) fail_file(path, "the file cannot be opened", system_error());
        LARGE_INTEGER size;
        if (!GetFileSizeEx(handle_.value, &size)) fail_file(path, "the file has no size", system_error());
        size_ = static_cast<std::uint64_t>(size.QuadPart);
    }
    const void* map() const {
        const Handle mapping{CreateFileMappingW(handle_.value, nullptr, PAGE_READONLY, 0, 0, nullptr)};  // kept alive by the view
        const void* view = mapping.value ? MapViewOfFile(mapping.value, FILE_MAP_READ, 0, 0, 0) : nullptr;
        if (!view) fail_file(path_, "the file cannot be mapped", system_error(), read_instead);
        return view;
    }
    static void unmap(const void* data, std::size_t) { UnmapViewOfFile(data); }
    // Reads up to n bytes at the current position; 0 at the end, negative after an error.
    std::int64_t read(std::byte* to, std::size_t n) const {
        DWORD done = 0;
        return ReadFile(handle_.value, to, static_cast<DWORD>(std::min<std::size_t>(n, 1u << 30)), &done, nullptr)
                   ? static_cast<std::int64_t>(done)
                   : -1;
    }
#else
    explicit File(const std::string& path) : path_(path), handle_{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)} {
        if (handle_.value < 0) fail_file(path, "the file cannot be opened", system_error());
        struct stat status;
        if (fstat(handle_.value, &status) != 0) fail_file(path, "the file cannot be read", system_error());
        if (!S_ISREG(status.st_mode))
            fail_file(path, "the file cannot be read", S_ISDIR(status.st_mode) ? "a directory" : "no ordinary file");
        size_ = static_cast<std::uint64_t>(status.st_size);
    }
    const void* map() const {
        const void* view = mmap(nullptr, size(), PROT_READ, MAP_SHARED, handle_.value, 0);
        if (view == MAP_FAILED) fail_file(path_, "the file cannot be mapped", system_error(), read_instead);
        return view;
    }
    static void unmap(const void* data, std::size_t size) { munmap(const_cast<void*>(data), size); }
    std::int64_t read(std::byte* to, std::size_t n) const {
        for (;;) {
            const auto done = ::read(handle_.value, to, std::min<std::size_t>(n, 1u << 30));
            if (done >= 0 || errno != EINTR) return done;
        }
    }
#endif

    File(const File&) = delete;
    File& operator=(const File&) = delete;
    std::size_t size() const {
        if (size_ > std::numeric_limits<std::size_t>::max())
            fail_file(path_, "the file is too large", "this program has addresses of 32 bits", "Use a 64-bit system");
        return static_cast<std::size_t>(size_);
    }
};

Image map_file(const std::string& path) {
    const File file(path);
    const std::size_t size = file.size();
    if (size == 0) return {};  // systems refuse to map nothing
    std::shared_ptr<const void> view(file.map(), [size](const void* data) { File::unmap(data, size); });
    return {{static_cast<const std::byte*>(view.get()), size}, view};
}

Image in_memory(AlignedBuffer buffer) {
    const auto owner = std::make_shared<const AlignedBuffer>(std::move(buffer));
    return {{owner->data(), owner->size()}, owner};
}

Image read_file(const std::string& path) {
    const File file(path);
    AlignedBuffer buffer(file.size(), true);
    for (std::size_t done = 0; done < buffer.size();) {
        const std::int64_t n = file.read(buffer.data() + done, buffer.size() - done);
        if (n < 0) fail_file(path, "the file cannot be read", system_error());
        if (n == 0)
            fail_file(path, "the file became shorter while it was read", to_text({done, " of ", buffer.size(), " bytes"}),
                      "Try again");
        done += static_cast<std::size_t>(n);
    }
    return in_memory(std::move(buffer));
}

// ── The processor ──

CpuFeatures cpu_features() {
    CpuFeatures features;
#if defined(__x86_64__)
    std::uint32_t a, b, c, d;
    const auto query = [&](std::uint32_t leaf, std::uint32_t subleaf) { __cpuid_count(leaf, subleaf, a, b, c, d); };
    const auto has = [](std::uint32_t bits, int bit) { return (bits >> bit & 1) != 0; };
    query(0, 0);
    features.intel = b == 0x756e6547;  // "Genu"ineIntel
    if (a < 7) return features;
    query(1, 0);
    if (!has(c, 27)) return features;  // no OSXSAVE: the system saves no wide registers
    const bool avx_fma_f16c = has(c, 28) && has(c, 12) && has(c, 29);
    // XCR0: the state that the system saves when it switches threads. Bits 1, 2: xmm and ymm; 5 to 7: masks and zmm.
    std::uint32_t saved, high;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    query(7, 0);
    const std::uint32_t subleaves = a;
    features.avx2_fma_f16c = avx_fma_f16c && (saved & 0x06) == 0x06 && has(b, 5);
    features.avx512 = features.avx2_fma_f16c && (saved & 0xe6) == 0xe6 && has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);
    features.avx512_vnni = features.avx512 && has(c, 11);
#if defined(__linux__)
    // The system must save the tile registers (XCR0, bits 17 and 18), and hands them out on request, for the whole process.
    constexpr long request_permission = 0x1023, tile_data = 18;
    features.amx = features.avx512 && has(d, 22) && has(d, 24) && has(d, 25) && (saved & 0x60000) == 0x60000 &&
                   syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#endif
    if (subleaves >= 1) {
        query(7, 1);
        features.avx_vnni = features.avx2_fma_f16c && has(a, 4);
        features.avx512_bf16 = features.avx512 && has(a, 5);
    }
#elif defined(__ARM_FEATURE_DOTPROD)  // what the compiler takes for granted, as Apple's does for a Mac
    features.dotprod = true;
#elif defined(__aarch64__) && defined(__linux__)
    features.dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    return features;
}

int usable_cpus() {
    int cpus = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
    cpu_set_t mask;  // the first 1024 processors; with more of them the call fails and the number above stands
    if (sched_getaffinity(0, sizeof mask, &mask) == 0) cpus = std::max(1, CPU_COUNT(&mask));
    // A container may have less time than processors: "200000 100000" is 200 of every 100 ms.
    if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "re")) {
        long long quota = 0, period = 0;
        if (std::fscanf(file, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0)
            cpus = static_cast<int>(std::clamp((quota + period - 1) / period, 1LL, static_cast<long long>(cpus)));
        std::fclose(file);
    }
#endif
    return cpus;
}

// MXCSR 0x1f80: round to nearest, keep denormals, trap nothing. FPCR 0: the same.
FloatEnvironment::FloatEnvironment() noexcept {
#if defined(__x86_64__)
    saved_ = _mm_getcsr();
    _mm_setcsr(0x1f80);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
#endif
}

FloatEnvironment::~FloatEnvironment() {
#if defined(__x86_64__)
    _mm_setcsr(static_cast<unsigned>(saved_));
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_));
#endif
}

// ── Unicode ──

// Written by tests/golden/make_tokenizer_golden.py --unicode-tables with tiktoken 0.14.0.
// The runs of code points of one class, from 0 on: (length << 2) | class in hexadecimal, the lowest digit first, written a to p,
// the last one as a capital; class 0 other, 1 letter, 2 number, 3 white space. Not ASCII, but matched in contractions: U+017F
// (long s) as s.
constexpr std::string_view packed_runs =
    "eChBiEHmDkCmBjGiBjGiCHiGHeCFmBKEFMGFEOEnFEnHEjcHaBbDiDfBmBFEFeaCfBEJIbBEFiBFENEFEbFEneBEncCaCjjCEjJIFiBfKmbBnGaBbBeLnKeFkC"
    "aBJEniBEFmDJmBJkCNIFaEFEjHeHfgBmCFiDkCfIeCJaBFeBjFaBFeCFMFmFfGmBnCeBbGEjBeEjKiOjNMFiEFmBjCaBkCEbEaBbCIJIjFEnBEFMbBMFaEFeDJ"
    "ENaBkCJIkBIFaCjBaBJIjFEnBEJEJEJmHbBEFmBkCINaEfCENEjFEnBEJEfBMFiEFmDJaBkCeCFmCbCIJIjFEnBEJEfBMFiHJENaBkCEFkBmCFEjBMNEbBMJEF"
    "EJMJMNMbDiFFeFgDiEbCENEnFEbEMFiGNIFIJaBkCaCoBEFaBbCENEnFEjCEfBMFmHJEJaBkCEJeEfCENEfKIFaEFeBNEoBNaBoEEjBeBjEMbGEfCEFInBmHkC"
    "eEbMEJaDnBeCkCmJJEFEfBEbGEFEjCEJeCFIfBEFeCkCIbBaIFmHcFaDbCEbJmGfBmmBnKaFFkCiBjBaBbBMFMJmBNaBfDaDFEkCiBjJEFeBFInKEfdFEbBInB"
    "EFEbBIfKEbBIfIEbBInBEFEbBInDEfOEbBInaBiDcFMbEaEjfBIjBMblJIfEHjGeBncBMObCmBjEeDnEiDjEiDfDENmDbNmIFaBFMkCiBkCiFkCiBfgBmBfBIj"
    "IEFeBjbBiCnHmJkCjHIfBmCbLaBjGiBoCeJnFeCfNmKkCiBkCeDFehBnLeEbCMkCeKjHeDJkCbLiGbJaHkCMNkCbJInCeBnKINeKbBEjBEJMFeBbaDaaBjfEIj"
    "BIjJIjBIbCEFEFEFEnHIfNEnBEFMNEnBMbBIjBaBfDeBNEnBMpCeHLeBHmLHaEGFIkBeBFkCiBfDejBFaBFIjCEFMfBiBFEFEFEbBEnCIbBeBfBaBFEoMJgBif"
    "LcPidBkFinJkHalbBfjDiBbBMJeCGIjJEFeBFIbOmBFaEnFeCnBEnBEnBEnBEnBEnBEnBEnBaeBFaeHHaBJGeGgCmBfBIOJaBjfBiBNEjgBEbBeBnKEjhBMcBi"
    "CbIaMbEaIkCiHcCEoDaIkCmJoDaaFbahGaaBfdkfBmaBjLIfdEMbEkCJaFnLaEnHIjbBkCmJfCInjBInaBIJEFEbCeFbEENEbBEnFeDkBiCbNiDjMaHkCaGjBM"
    "FEJEkCbHiCnFeGfHmBnLaHFkCiBfBEjCkCfBEfKmFNEbCaBkCiBnFMFMjMEFMJIfBIFEFaGNInCmBNaDjBIjBIjBeCnBEnBEnKEjDiBnmBeDkCiBbjoKaDnFaB"
    "fMabeIjlFIjkBiJnBaDfBeBFEjCEfDEfBEFEJEJEblBeInkFiEbaBIjNaKbDanBfBEnbCmEkCmBjGiBjGmCfgBMjBIjBIjBINmIbDEjGEnEEJEnDIjDiInoBaD"
    "gLaDgOeEKanDfHMfMaEoGaBbIcBeCbFGbCGeBjJiCjHIbJaBbCEgBiKjhCIkCiBbJaBbJaBbKaCbNaDnCEnDEnBEJEnCEnDEnBEJMbNaDnnEeCjFiCbCaGjBEj"
    "KEfCebBjBIFEbLEJMFInFIcCnFIoBnHaCgCaMnEEJeBgBjFkBaBjGibBbOaBKJcEIkLFmDbBENEfHiCgCmFfHKEfHOaIbCEbHiBgBaEjNiCjFIcCnEeBcCjEmF"
    "oBaeBfcBmNnMeDnMmBkBbJaDkCiBkCbHeCnFigDoHEjKiBJaENmOfHkCFaCjFmCcBmGjEiLfFoBaFnFaDfNiGkHEJIFeDfLaIfGmBkCeCbJmDkCaBFIFaCnIMF"
    "aDbMiDbBmCkCFEFaBcFmCjEEfGmEJmPnBEFEbBEnDEjCmBnLeEkCmCbCIJIjFEnBEJEfBMFiEFaDfBiHjCEFIFEjJEFeGFEFaLfNiEbBeBkCeBNiHbMaFJEFaC"
    "kCijCnLeKbBaJbMaFFmCkCiJnKeDFmBkCiBcFaHnGeFcDaBnBeoCbLanBbaBoEaDbCIFIbCEJEbGmDFEFiDkCibBbCInJaEFEFaHFiCbKmBFeFFmCjLmEFiEfc"
    "BmbDfImDkCiBfCEfJeEFmDgHeBjHamBnBEJEjJeFFeCkCiBjBEJEbIiDFmBkCinEnEmDFEfDEjIaHkCifBFmDgFmKjgOijBolBeEbbDadjCfiBmDbmaBeEjBeG"
    "ngoDeBnbJeokGjHiEkCiblBfoImBnHEkCiBndBEkCiBjHiEbMaEbBaDkCEoBEfFeBnEamGfLMkCibDbaBoFekBncBeBFiaBfDaaBJEFaHbopFaCjfdBeKjCmjl"
    "IbBEnBEJEniEmDFeHNIFiDbBaCbdGabeCnkBeBfDMfCmBjCifbEkCibhBcFaDcFalBgGmbCffBEnbBEJIFIJIbBEbDEFEnBEfaBEbBIbCEnBEbHEbBEfBEFMnB"
    "EbfFIfGEfGEnHEfGEnHEfGEnHEfGEnHEfGEbCIkMaamBnHiBjBebEjPieCfLiCnBIkCaBFeaFjHiEbLaBkCifHbHaBkCifDjHIFkCejHnBEbBEJEnDEfbDIgCa"
    "MbbBmBFaBkCmfMoOEOEcBadBgLEoDiaDbBEnGEJEFIFEjCEbBEFEFiBFaBFEFEFENEJEFIFEFEFEFEFEJEFIbBEnBEbBEbBEFEjCEfEeBNEfBEfEabJgDmilCk"
    "CibaBbiljCaIjoaEiBjhDIjakFiDfmeHmDjlJiigCjhIiihBncnEeBbibEaebhhD";

constexpr auto unicode_runs = [] {
    std::array<std::uint32_t, std::count_if(packed_runs.begin(), packed_runs.end(), [](char c) { return c <= 'P'; })> runs{};
    std::uint32_t first = 0, number = 0;
    int shift = 0;
    auto run = runs.begin();
    for (const char c : packed_runs) {
        number |= static_cast<std::uint32_t>(c - (c <= 'P' ? 'A' : 'a')) << shift;
        shift += 4;
        if (c > 'P') continue;
        *run++ = first << 2 | (number & 3);
        first += number >> 2, number = 0, shift = 0;
    }
    return runs;
}();

std::span<const std::uint32_t> unicode_classes() { return unicode_runs; }

}  // namespace llama3::detail

#pragma pop_macro("min")
#pragma pop_macro("max")
#if defined(__clang__)
#pragma float_control(pop)
#else
#pragma GCC pop_options
#endif
#undef LLAMA3_STRING_
#undef LLAMA3_STRING
#undef LLAMA3_UNROLL
#undef LLAMA3_TARGET_BEGIN
#undef LLAMA3_TARGET_END
#undef LLAMA3_INLINE
#undef LLAMA3_X86_KERNELS

#else  // the next set says for itself what it is
#undef LLAMA3_KERNELS
#undef LLAMA3_LIKE
#undef LLAMA3_WIDTH
#undef LLAMA3_VNNI
#undef LLAMA3_BF16
#undef LLAMA3_AMX
#undef LLAMA3_NEON
#undef LLAMA3_DOTPROD
#endif  // LLAMA3_KERNELS
#endif  // LLAMA3_IMPLEMENTATION

// MIT License
//
// Copyright (c) 2026 the llama3.hpp authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy
// of this software and associated documentation files (the "Software"), to deal
// in the Software without restriction, including without limitation the rights
// to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
// copies of the Software, and to permit persons to whom the Software is
// furnished to do so, subject to the following conditions:
//
// The above copyright notice and this permission notice shall be included in all
// copies or substantial portions of the Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
// IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
// FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
// AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
// LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
// OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
// SOFTWARE.
