// What the library promises to the program around it: silence, untouched process state, sessions that do not meet, cancellation
// within a stage, and an error for every call in every order. Each check also sees a planted breach, so that it can fail.
#include "internals.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cfenv>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <sstream>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if !defined(_WIN32)
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using namespace llama3;
using test::Random;

namespace {

using Ids = std::vector<int>;

Config small_config(ChatFormat chat = ChatFormat::llama3_1) {
    Config config;
    config.n_layers = 2, config.dim = 64, config.n_heads = 4, config.n_kv_heads = 2, config.head_dim = 16, config.ffn_dim = 96;
    config.vocab_size = 530, config.context_length = 256, config.chat_format = chat;
    return config;
}

Ids some_tokens(int n, int seed = 1) {
    Ids ids;
    for (int i = 0; i < n; ++i) ids.push_back((i * 37 + seed * 101) % 530);
    return ids;
}

template <class T>
std::vector<T> copy(std::span<const T> values) {
    return {values.begin(), values.end()};
}

template <class F>
bool is_error(F&& f) {  // the library's own: what else comes out goes on, and ends the test
    try {
        f();
    } catch (const Error&) {
        return true;
    }
    return false;
}

Options with_threads(int threads, int context = 96) {
    Options options;
    options.threads = threads, options.context = context, options.chunk = 16;
    return options;
}

// A session's whole life, errors included, on a few threads. Says nothing itself.
std::string live(int threads, std::vector<Format> formats = {Format::f32, Format::bf16, Format::q8, Format::q4}) {
    std::string said;
    const auto refused = [&](auto&& f) { said += is_error(f) ? '.' : '!'; };
    refused([] { Model::load("/nowhere/model.l3"); });
    refused([] { Model::load("/"); });
    refused([] { Model::load("/dev/null", Model::Loading::read); });
    refused([] { Model::from_memory({}); });
    refused([] { Model::synthetic(Config{}, Format::q8); });
    refused([] { format_from_name("q5"); });
    for (const Format format : formats) {
        const Model model = Model::synthetic(small_config(), format);
        model.verify();
        (void)model.describe();  // its decimals are rounded as the caller rounds
        said += model.provenance();
        Options options = with_threads(threads);
        options.kv = format == Format::q8 ? Format::q8 : Format::bf16;
        (void)model.plan(options);
        Session session(model, options);
        refused([&] { session.feed(Ids{}); });
        refused([&] { session.feed(Ids{530}); });
        refused([&] { session.feed(some_tokens(97)); });
        session.feed(some_tokens(40));
        session.cancel();
        refused([&] { session.feed(Ids{1}); });
        Session other(model, options);
        Session* const both[] = {&session, &other};
        Session::feed_together(both, Ids{1, 2});
        Sampler sampler({.temperature = 1.5f, .top_p = 0.9f, .top_k = 40, .repeat_penalty = 1.1f});
        generate(other, Ids{}, sampler, {}, [&](const Generated& drawn) { return said += drawn.text, true; });
        const std::vector<float> nan(530, std::numeric_limits<float>::quiet_NaN());
        refused([&] { sampler.sample(nan); });
        Chat chat(model, {.system = "Be brief.", .max_tokens = 8}, {}, options);
        said += chat.say("Hello.");
        refused([&] { chat.say(Message{"user\n", "x"}); });
        said += chat.say("A restart, since this does not fit.");
        refused([&] { chat.say(std::string(200, 'x')); });
        options.device = reference();
        options.isa = "none such";
        Session slow(model, options);
        slow.feed(some_tokens(5));
        options.device = nullptr;
        refused([&] { Session failing(model, options); });
    }
    return said;
}

const std::string& expected_life() {
    static const std::string said = live(1, {Format::q8});
    return said;
}

#if !defined(_WIN32)

// Standard output and standard error of the process, at the level of its file descriptors, into a file.
class Redirected {
public:
    Redirected() : file_(std::tmpfile()) {
        std::fflush(nullptr);
        for (int i = 0; i < 2; ++i) saved_[i] = dup(i + 1), dup2(fileno(file_), i + 1);
    }
    Redirected(const Redirected&) = delete;
    Redirected& operator=(const Redirected&) = delete;
    ~Redirected() { restore(); }
    std::string end() {
        restore();
        std::string text(static_cast<std::size_t>(std::max(0L, (std::fseek(file_, 0, SEEK_END), std::ftell(file_)))), '\0');
        std::rewind(file_);
        text.resize(std::fread(text.data(), 1, text.size(), file_));
        std::fclose(file_);
        return text;
    }

private:
    void restore() {
        std::fflush(nullptr);
        for (int i = 0; i < 2; ++i)
            if (saved_[i] >= 0) dup2(saved_[i], i + 1), close(saved_[i]), saved_[i] = -1;
    }
    std::FILE* file_;
    int saved_[2];
};

// What a library could change behind its host's back, as lines of text.
std::string process_state() {
    std::ostringstream state;
#if defined(_OPENMP)
    omp_sched_t schedule;
    int chunk;
    omp_get_schedule(&schedule, &chunk);
    state << "OpenMP " << omp_get_max_threads() << ' ' << omp_get_dynamic() << ' ' << omp_get_max_active_levels() << ' '
          << schedule << ' ' << chunk << ' ' << omp_get_thread_limit() << ' ' << omp_get_default_device() << '\n';
#endif
    for (int signal = 1; signal < NSIG; ++signal) {
        struct sigaction action {};
        if (sigaction(signal, nullptr, &action) != 0) continue;
        void* handler = nullptr;
        std::memcpy(&handler, &action.sa_handler, sizeof handler);
        state << "signal " << signal << ' ' << handler << ' ' << action.sa_flags << '\n';
    }
    sigset_t blocked;
    sigprocmask(SIG_SETMASK, nullptr, &blocked);
    state << "blocked";
    for (int signal = 1; signal < NSIG; ++signal)
        if (sigismember(&blocked, signal) == 1) state << ' ' << signal;
    const mode_t mask = umask(0);
    umask(mask);
    state << "\numask " << mask << "\nlocale " << std::setlocale(LC_ALL, nullptr) << "\nrounding " << std::fegetround() << '\n';
#if defined(__x86_64__)
    state << "MXCSR " << (_mm_getcsr() & ~0x3fu) << '\n';  // without the flags: any sum may raise "inexact"
#endif
    state << "folder " << std::filesystem::current_path() << "\nnew " << reinterpret_cast<void*>(std::get_new_handler())
          << "\nterminate " << reinterpret_cast<void*>(std::get_terminate()) << '\n';
    std::string variables;
    for (char** variable = environ; *variable; ++variable) variables += *variable + std::string(1, '\n');
    state << "environment " << std::hash<std::string>()(variables) << '\n';
#if defined(__linux__)
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) state << "processors " << CPU_COUNT(&cpus) << '\n';
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) (void)entry, ++files;
    state << "open files " << files << '\n';
#endif
    return state.str();
}

// The lines of `now` that are not those of `before`.
std::string changes(const std::string& before, const std::string& now) {
    std::istringstream a(before), b(now);
    std::string was, is, changed;
    while (std::getline(b, is)) {
        std::getline(a, was);
        if (was != is) changed += was + " -> " + is + "; ";
    }
    return changed;
}

#endif

}  // namespace

TEST_SUITE_BEGIN("core: contract");

#if !defined(_WIN32)

TEST_CASE("the library writes nothing, whatever is done with it") {
    Redirected redirected;
    const std::string one = live(1), two = live(2);
    const std::string written = redirected.end();
    CHECK(written == "");
    CHECK(one == two);
    CHECK(one.find('!') == std::string::npos);  // every error came; the texts of random tokens have no exclamation mark

    for (const int descriptor : {1, 2}) {  // a library that did would be seen
        Redirected planted;
        const auto length = write(descriptor, "x", 1);
        CHECK(planted.end() == std::string(static_cast<std::size_t>(length), 'x'));
    }
}

TEST_CASE("the process is left as it was: OpenMP, signals, locale, floating-point modes, files, environment") {
    const std::vector<std::pair<std::function<void()>, std::function<void()>>> plants = {
#if defined(_OPENMP)
        {[] { omp_set_num_threads(3); }, [n = omp_get_max_threads()] { omp_set_num_threads(n); }},
        {[] { omp_set_dynamic(!omp_get_dynamic()); }, [] { omp_set_dynamic(!omp_get_dynamic()); }},
        {[] { omp_set_schedule(omp_sched_guided, 7); }, [] { omp_set_schedule(omp_sched_static, 0); }},
        {[] { omp_set_max_active_levels(3); }, [n = omp_get_max_active_levels()] { omp_set_max_active_levels(n); }},
#endif
        {[] { std::signal(SIGUSR1, [](int) {}); }, [] { std::signal(SIGUSR1, SIG_DFL); }},
        {[] { std::signal(SIGPIPE, SIG_IGN); }, [] { std::signal(SIGPIPE, SIG_DFL); }},
        {[] { std::setlocale(LC_CTYPE, "C.UTF-8"); }, [] { std::setlocale(LC_ALL, "C"); }},
        {[] { std::fesetround(FE_DOWNWARD); }, [] { std::fesetround(FE_TONEAREST); }},
#if defined(__x86_64__)
        {[] { _mm_setcsr(_mm_getcsr() | 0x8040); }, [] { _mm_setcsr(_mm_getcsr() & ~0x8040u); }},  // denormals are zero
#endif
        {[] { umask(umask(0) ^ 1); }, [] { umask(umask(0) ^ 1); }},
        {[] { setenv("LLAMA3_PLANTED", "1", 1); }, [] { unsetenv("LLAMA3_PLANTED"); }},
        {[] { (void)!chdir("/"); }, [folder = std::filesystem::current_path()] { std::filesystem::current_path(folder); }},
        {[] { std::set_new_handler([] { throw std::bad_alloc(); }); }, [] { std::set_new_handler(nullptr); }},
    };
    expected_life();  // what a first use of the C++ library opens or allocates is its own
    const std::string before = process_state();
    CHECK(live(2).size() > expected_life().size());
    CHECK(changes(before, process_state()) == "");

    // Every single one of these would be seen; and in the state that each makes the library works the same, and keeps it.
    for (const auto& [change, restore] : plants) {
        change();
        const std::string changed = process_state(), said = live(2, {Format::q8}), after = process_state();
        restore();
        CHECK(changes(before, changed) != "");
        CHECK(changes(changed, after) == "");
        CHECK(said == expected_life());
    }
}

TEST_CASE("threads end with the session that started them") {
#if defined(__linux__) && !defined(_OPENMP)
    const auto threads = [] {
        int n = 0;
        for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) (void)entry, ++n;
        return n;
    };
    const Model model = Model::synthetic(small_config(), Format::f32);
    const int before = threads();
    {
        Session session(model, with_threads(4));
        session.feed(some_tokens(8));
        CHECK(threads() == before + 3);
    }
    // A thread that was joined may show in /proc a moment longer.
    for (int i = 0; i < 1000 && threads() != before; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    CHECK(threads() == before);
#endif
}

#endif

TEST_CASE("two models and eight sessions on eight threads give the bits of one after another") {
    const Model models[] = {Model::synthetic(small_config(), Format::f32, 1), Model::synthetic(small_config(), Format::q8, 2)};
    const auto run = [&](int i) {  // logits of a prompt and of drawn tokens, the text of a chat
        const Model& model = models[i % 2];
        Options options = with_threads(1 + i % 3);
        options.kv = i % 4 < 2 ? Format::bf16 : Format::q8;
        Session session(model, options);
        std::string result;
        const auto add = [&](std::span<const float> logits) {
            result.append(reinterpret_cast<const char*>(logits.data()), logits.size_bytes());
        };
        session.feed(some_tokens(40, i), [&](int, std::span<const float> logits) { add(logits); });
        Sampler sampler({.temperature = 1, .seed = static_cast<std::uint64_t>(i)});
        generate(session, Ids{}, sampler, {.max_tokens = 20}, [&](const Generated& drawn) { return add(drawn.logits), true; });
        Chat chat(model, {.max_tokens = 12}, {.temperature = 1, .seed = 5}, options);
        for (const char* text : {"One.", "Two \xF0\x9F\x99\x82", "<|eot_id|>"}) result += chat.say(text);
        for (const int id : model.tokenizer().encode("the same tokenizer " + std::to_string(i))) result += std::to_string(id);
        return result;
    };
    std::string alone[8], together[8];
    for (int i = 0; i < 8; ++i) alone[i] = run(i);
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) threads.emplace_back([&, i] { together[i] = run(i); });
    for (std::thread& thread : threads) thread.join();
    for (int i = 0; i < 8; ++i) CHECK(together[i] == alone[i]);
    for (int i = 1; i < 8; ++i) CHECK(alone[i] != alone[0]);  // or a session that saw another's would go unnoticed
}

#if !defined(_WIN32)

// Which weights a forward pass reads is seen by taking away the right to read them: the first access to each matrix of a layer
// ends in fault_handler, which notes it, asks another thread for a cancel() where the test wants one, and gives the right back.
namespace pages {

struct Range {
    std::uintptr_t begin, end;
    int stage;
};
Range ranges[64];
int n_ranges = 0;
std::atomic<int> touched[64];
int cancel_at = -1;  // a stage
std::atomic<int> request{0};

void fault_handler(int signal, siginfo_t* info, void*) {
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    for (int i = 0; i < n_ranges; ++i) {
        if (address < ranges[i].begin || address >= ranges[i].end) continue;
        touched[ranges[i].stage] = 1;
        if (ranges[i].stage == cancel_at) {
            int none = 0;
            request.compare_exchange_strong(none, 1);  // the first of several accesses asks
            while (request != 2) sched_yield();        // until the other thread's cancel() has returned
        }
        mprotect(reinterpret_cast<void*>(ranges[i].begin), ranges[i].end - ranges[i].begin, PROT_READ | PROT_WRITE);
        return;
    }
    std::signal(signal, SIG_DFL);  // a fault of another kind: happen again, and end the test
}

}  // namespace pages

TEST_CASE("a cancel from another thread stops a forward pass before the next stage reads its weights") {
    Config config;  // every matrix fills whole pages
    config.n_layers = 4, config.dim = 1024, config.n_heads = 1, config.n_kv_heads = 1, config.head_dim = 64,
    config.ffn_dim = 64;
    config.vocab_size = 320, config.context_length = 64;
    const Model model = Model::synthetic(config, Format::q8);
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    pages::n_ranges = 0;
    const auto watch = [&](const Matrix& w, int stage) {
        const auto begin = reinterpret_cast<std::uintptr_t>(w.data),
                   end = begin + w.panel_stride * static_cast<std::size_t>(w.panels());
        REQUIRE(begin % page == 0);
        REQUIRE(end % page == 0);
        pages::ranges[pages::n_ranges++] = {begin, end, stage};
    };
    int stages = 0;  // those that read weights: project_qkv, project_out, gate_up, down in every layer, and logits
    for (const Layer& layer : model.weights().layers) {
        for (const Matrix* w : {&layer.query, &layer.key, &layer.value}) watch(*w, stages);
        watch(layer.attention_out, ++stages);
        for (const Matrix* w : {&layer.gate, &layer.up}) watch(*w, stages + 1);
        watch(layer.down, stages += 2);
        ++stages;
    }
    watch(model.weights().output, stages++);

    struct sigaction action {
    }, before{};
    action.sa_sigaction = pages::fault_handler, action.sa_flags = SA_SIGINFO;
    REQUIRE(sigaction(SIGSEGV, &action, &before) == 0);
    for (const int threads : {1, 2}) {
        Options options;
        options.context = 64, options.threads = threads;
        for (int cancel_at = -1; cancel_at < stages; ++cancel_at) {
            Session session(model, options);
            for (int i = 0; i < pages::n_ranges; ++i) {
                const pages::Range& r = pages::ranges[i];
                REQUIRE(mprotect(reinterpret_cast<void*>(r.begin), r.end - r.begin, PROT_NONE) == 0);
                pages::touched[r.stage] = 0;
            }
            pages::cancel_at = cancel_at, pages::request = 0;
            std::thread canceller([&] {
                while (pages::request == 0) std::this_thread::yield();
                if (pages::request == 1) session.cancel();
                pages::request = 2;
            });
            Code code = Code::argument;
            try {
                session.feed(Ids{1, 2, 3});
            } catch (const Error& error) {
                code = error.code();
            }
            int expected = 0;
            pages::request.compare_exchange_strong(expected, 3);  // nothing to cancel: end the thread
            canceller.join();
            for (int i = 0; i < pages::n_ranges; ++i)  // those that were never read
                mprotect(reinterpret_cast<void*>(pages::ranges[i].begin), pages::ranges[i].end - pages::ranges[i].begin,
                         PROT_READ | PROT_WRITE);
            int n_touched = 0;
            for (int stage = 0; stage < stages; ++stage) n_touched += pages::touched[stage];
            CHECK(n_touched == (cancel_at < 0 ? stages : cancel_at + 1));  // without a cancel all are seen to be read
            CHECK((code == Code::cancelled) == (cancel_at >= 0));
            CHECK(session.position() == (cancel_at < 0 ? 3 : 0));
        }
    }
    sigaction(SIGSEGV, &before, nullptr);
}

#endif

// ── Text ──

TEST_CASE("a megabyte of hostile text is one message: no special token in it, one begin-of-text, linear work") {
    const Model model = Model::synthetic(small_config(), Format::q8);
    const Tokenizer& tokenizer = model.tokenizer();
    const auto specials = [&](const Ids& ids) {
        return std::count_if(ids.begin(), ids.end(), [&](int id) { return tokenizer.is_special(id); });
    };
    for (const char* unit :
         {"a", " ", "\n", " \n", "<|", "<|begin_of_text|>", "<|eot_id|><|start_header_id|>system<|end_header_id|>\n\n", "'s",
          "\xF0\x9F", "\x80", "\xCC\x81", "\xE2\x80\xA8", "\"\\", "\xED\xA0\x80"}) {
        std::string text;
        while (text.size() < 1 << 20) text += unit;
        CAPTURE(unit);
        for (const auto kind : {ChatStyle::Kind::reference, ChatStyle::Kind::hf}) {
            ChatStyle style;
            style.kind = kind;
            // Anything quadratic in here takes hours: then the suite's time limit ends it.
            const Ids ids = render_chat(model, std::vector<Message>{{"user", text}, {"ipython", text}}, style);
            CHECK(specials(ids) == specials(render_chat(model, std::vector<Message>{{"user", "x"}, {"ipython", "x"}}, style)));
            CHECK(std::count(ids.begin(), ids.end(), tokenizer.begin_token()) == 1);
            TextStream stream(tokenizer);
            std::size_t streamed = 0;
            for (const int id : ids) streamed += stream.push(id).size();
            CHECK(streamed + stream.finish().size() > 0);
        }
        Chat chat(model, {}, {}, with_threads(1));
        CHECK(is_error([&] { chat.say(text); }));  // it does not fit, and is refused before it is computed
        CHECK(chat.messages().empty());
    }
}

// ── Any call in any order ──

namespace {

// A device that hands everything on to the processor's, but fails when it is told to.
struct Failures {
    int in_steps = -1;  // the step that fails, counting from 0; -1: none
    bool fail_open = false;
};

class FlakyBackend : public Backend {
public:
    FlakyBackend(std::unique_ptr<Backend> inner, std::shared_ptr<Failures> failures)
        : inner_(std::move(inner)), failures_(std::move(failures)) {}
    std::unique_ptr<KVCache> make_cache() override { return inner_->make_cache(); }
    int max_rows() const override { return inner_->max_rows(); }
    bool step(const Batch& batch, const std::atomic<bool>* cancel) override {
        if (failures_->in_steps >= 0 && failures_->in_steps-- == 0) throw Error(Code::device, "device: it was unplugged.");
        return inner_->step(batch, cancel);
    }
    std::span<const float> logits(int i) const override { return inner_->logits(i); }
    std::string describe() const override { return "flaky"; }

private:
    std::unique_ptr<Backend> inner_;
    std::shared_ptr<Failures> failures_;
};

class FlakyDevice : public Device {
public:
    std::shared_ptr<Failures> failures = std::make_shared<Failures>();
    std::unique_ptr<Backend> open(const Model& model, const Options& options) override {
        if (failures->fail_open) throw std::bad_alloc();
        return std::make_unique<FlakyBackend>(inner_->open(model, options), failures);
    }
    std::uint64_t cache_bytes(const Config& c, const Options& o) const override { return inner_->cache_bytes(c, o); }
    std::uint64_t activations_bytes(const Config& c, const Options& o) const override {
        return inner_->activations_bytes(c, o);
    }

private:
    std::shared_ptr<Device> inner_ = cpu();
};

}  // namespace

TEST_CASE("any call in any order gives what it should or an error, and never changes what it should not") {
    const Model models[] = {Model::synthetic(small_config(), Format::f32, 1), Model::synthetic(small_config(), Format::q8, 2)};
    const auto device = std::make_shared<FlakyDevice>();
    Options options;
    options.device = device, options.context = 24, options.threads = 1, options.chunk = 5;

    // The logits after some tokens, from a session that does nothing else; those of the last failure would show in them.
    std::map<std::pair<int, Ids>, std::vector<float>> known;
    const auto expected = [&](int model, const Ids& tokens) -> const std::vector<float>& {
        std::vector<float>& logits = known[{model, tokens}];
        if (logits.empty()) {
            Options plain = options;
            plain.device = nullptr;
            Session session(models[model], plain);
            logits = copy(session.feed(tokens));
        }
        return logits;
    };

    struct Slot {
        std::optional<Session> session;
        int model = 0;
        Ids tokens;
        bool moved = false, has_logits = false, cancelled = false;
    };
    int errors = 0, successes = 0, thrown = 0;
    for (std::uint64_t seed = 1; seed <= 60; ++seed) {
        Random random{seed};
        Slot slots[4];
        Sampler sampler({.temperature = 1, .seed = seed});
        *device->failures = {};
        for (int step = 0; step < 50; ++step) {
            Slot& slot = slots[random.below(4)];
            Slot& other = slots[random.below(4)];
            device->failures->in_steps = random.below(6) == 0 ? random.below(4) : -1;
            device->failures->fail_open = random.below(8) == 0;
            const bool will_fail = device->failures->in_steps >= 0;
            Ids tokens;
            for (int n = random.below(12); n > 0; --n)
                tokens.push_back(random.below(40) == 0 ? random.below(2000) - 500 : random.below(530));
            const auto what_happens = [&](auto&& call) {  // true: no error
                try {
                    call();
                    ++successes;
                    return true;
                } catch (const Error&) {
                    ++errors;
                } catch (const std::bad_alloc&) {
                    ++errors;
                } catch (int) {
                    ++thrown;
                }
                return false;
            };
            const auto fed = [&](Slot& to, const Ids& ids) {  // what a good feed() leaves behind
                to.tokens.insert(to.tokens.end(), ids.begin(), ids.end());
                to.has_logits = true;
            };
            const bool good_tokens = std::all_of(tokens.begin(), tokens.end(), [](int id) { return id >= 0 && id < 530; }) &&
                                     slot.tokens.size() + tokens.size() <= 24 && (!tokens.empty() || slot.has_logits);
            const int what = random.below(14);
            if (what == 0 || !slot.session) {  // a new one; the old one ends
                const int model = random.below(2);
                if (what_happens([&] {
                        Session made(models[model], options);
                        slot.session.emplace(std::move(made));
                    }))
                    slot = {std::move(slot.session), model, {}, false, false, false};
            } else if (what <= 4) {
                const bool good = what_happens([&] { slot.session->feed(tokens); });
                CHECK((good || slot.moved || slot.cancelled || will_fail || !good_tokens));
                CHECK_FALSE((good && (slot.moved || slot.cancelled || !good_tokens)));
                if (good) fed(slot, tokens);
                else if (good_tokens) slot.cancelled = false;  // a cancel is taken after the arguments are found good
            } else if (what == 5) {                            // a callback that misuses its session, or throws
                const int misuse = random.below(6);
                const bool good = what_happens([&] {
                    slot.session->feed(tokens, [&](int i, std::span<const float> row) {
                        CHECK(row.size() == 530);
                        if (i == 2 && misuse == 1) slot.session->feed(Ids{1});
                        if (i == 2 && misuse == 2) slot.session->rewind(0);
                        if (i == 2 && misuse == 3) throw 5;
                        if (i == 2 && misuse == 4) slot.session->cancel();
                    });
                });
                if (good) fed(slot, tokens);
                else if (good_tokens) slot.cancelled = false;
                if (!slot.moved) slot.cancelled = slot.session->cancelled();
            } else if (what == 6) {
                const int to = random.below(30) - 3;
                if (what_happens([&] { slot.session->rewind(to); })) {
                    CHECK((!slot.moved && to >= 0 && to <= static_cast<int>(slot.tokens.size())));
                    slot.tokens.resize(static_cast<std::size_t>(to)), slot.has_logits = false;
                }
            } else if (what == 7) {
                slot.session->cancel();
                slot.cancelled = !slot.moved;
            } else if (what == 8) {
                slot.session->reset_cancel();
                slot.cancelled = false;
            } else if (what == 9 && &other != &slot && other.session) {
                *other.session = std::move(*slot.session);
                other = {std::move(other.session), slot.model, slot.tokens, slot.moved, slot.has_logits, slot.cancelled};
                slot.moved = true, slot.tokens.clear(), slot.has_logits = slot.cancelled = false;
            } else if (what == 10) {
                std::vector<Session*> list;
                std::vector<Slot*> which;
                Ids ids;
                for (Slot& s : slots)
                    if (s.session && random.below(3))
                        list.push_back(&*s.session), which.push_back(&s), ids.push_back(random.below(540));
                if (random.below(9) == 0) list.push_back(nullptr), ids.push_back(0);
                if (random.below(9) == 0 && !list.empty()) list.push_back(list[0]), ids.push_back(0);
                if (what_happens([&] { Session::feed_together(list, ids); })) {
                    for (std::size_t i = 0; i < which.size(); ++i) fed(*which[i], {ids[i]});
                } else {
                    for (Slot* s : which) s->cancelled = s->session->cancelled();
                }
            } else if (what == 11 || what == 12) {
                const int misuse = random.below(8);
                Ids drawn;
                GenerateOptions how{random.below(12) - 1, random.below(2) == 0};
                if (random.below(12) == 0) how.max_tokens = -7;
                std::size_t before = slot.tokens.size();
                const bool good = what_happens([&] {
                    generate(*slot.session, tokens, sampler, how, [&](const Generated& g) {
                        if (misuse == 1 && drawn.size() == 2) slot.session->rewind(0);
                        if (misuse == 2 && drawn.size() == 2) slot.session->cancel();
                        if (misuse == 3 && drawn.size() == 2) throw 7;
                        drawn.push_back(g.token);
                        return misuse != 4 || drawn.size() < 3;
                    });
                });
                (void)good;
                if (!slot.moved) {  // whatever happened, it holds a beginning of what it was given and what was drawn
                    Ids all = slot.tokens;
                    all.insert(all.end(), tokens.begin(), tokens.end()), all.insert(all.end(), drawn.begin(), drawn.end());
                    slot.tokens = copy(slot.session->tokens());
                    if (misuse != 1 || !slot.tokens.empty()) CHECK(slot.tokens.size() >= before);
                    CHECK(slot.tokens.size() <= all.size());
                    CHECK(std::equal(slot.tokens.begin(), slot.tokens.end(), all.begin()));
                    slot.has_logits = !slot.session->logits().empty();
                    slot.cancelled = slot.session->cancelled();
                }
            } else if (what == 13) {
                slot.session.reset();
                slot = {};
                continue;
            }
            for (Slot& s : slots) {
                if (!s.session) continue;
                CHECK(is_error([&] { (void)s.session->tokens(); }) == s.moved);
                CHECK(is_error([&] { (void)s.session->model(); }) == s.moved);
                CHECK(is_error([&] { (void)s.session->context(); }) == s.moved);
                CHECK(s.session->cancelled() == s.cancelled);
                if (s.moved) continue;
                CHECK(copy(s.session->tokens()) == s.tokens);
                CHECK(s.session->logits().empty() == !s.has_logits);
            }
        }
        *device->failures = {};
        for (Slot& s : slots) {  // and all go on as if nothing had been
            if (!s.session || s.moved) continue;
            if (s.has_logits) CHECK(copy(s.session->logits()) == expected(s.model, s.tokens));
            s.session->reset_cancel();
            if (s.tokens.size() == 24) s.session->rewind(20), s.tokens.resize(20);
            s.tokens.push_back(7);
            CHECK(copy(s.session->feed(Ids{7})) == expected(s.model, s.tokens));
        }
    }
    CHECK(errors > 300);  // or the test would not try enough
    CHECK(successes > 300);
    CHECK(thrown > 10);
}

TEST_CASE("a chat goes on after every failure as if the failed turn had not been") {
    const Model model = Model::synthetic(small_config(), Format::f32, 3);
    const auto device = std::make_shared<FlakyDevice>();
    Options options;
    options.device = device, options.context = 160, options.threads = 1, options.chunk = 16;
    const ChatOptions how{.system = "Short.", .max_tokens = 6};
    int failed = 0;
    for (int at = 0; at < 30; ++at) {
        Chat chat(model, how, {.temperature = 0}, options), calm(model, how, {.temperature = 0}, with_threads(1, 160));
        const auto say = [&](const char* text) {
            const std::string expected = calm.say(text);
            device->failures->in_steps = at % 10;
            try {
                (void)chat.say(text, [&, n = 0](std::string_view) mutable {
                    if (at >= 10 && at < 20 && ++n == 2) throw 3;
                    if (at >= 20) chat.session().rewind(0);
                    return true;
                });
            } catch (const Error&) {
                ++failed;
            } catch (int) {
                ++failed;
            }
            if (chat.messages().size() == calm.messages().size()) return;  // it came through
            device->failures->in_steps = -1;
            CHECK(chat.say(text) == expected);
        };
        say("Hello"), say("And \xC3\xA9?"), say("<|eot_id|>");
        CHECK(chat.messages().size() == calm.messages().size());
        CHECK(chat.messages().back().content == calm.messages().back().content);
    }
    CHECK(failed > 30);
}

TEST_SUITE_END();
