// Fault injection: every allocation of the library fails in turn, operator new and mmap alike, once alone and once with all that
// follow. An Error or std::bad_alloc must come out, nothing may leak, and what there was before must work on with the same bits.
// A program of its own, since it replaces operator new.
#include "internals.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <new>
#include <optional>
#include <thread>
#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace faults {

std::atomic<bool> armed{false};  // allocations are counted, and may fail
std::atomic<long> seen{0};       // since it was armed
std::atomic<long> failing{-1};   // the number of the one that fails; -1: none
std::atomic<bool> and_on{false};
std::atomic<long> blocks{0};  // that are in use: of operator new, armed or not
std::atomic<long> pages{0};   // bytes of the mappings in use that were made while armed or after
std::atomic<long> injected{0};

bool fails() {
    if (!armed) return false;
    const long number = seen++, first = failing;
    const bool now = first >= 0 && (number == first || (and_on && number > first));
    injected += now;
    return now;
}

void* allocate(std::size_t bytes, std::size_t alignment) {
    if (fails()) return nullptr;
    void* memory =
        std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment + (bytes == 0 ? alignment : 0));
    blocks += memory != nullptr;
    return memory;
}
void release(void* memory) {
    blocks -= memory != nullptr;
    std::free(memory);
}
void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
    if (void* memory = allocate(bytes, alignment)) return memory;
    throw std::bad_alloc();
}

}  // namespace faults

void* operator new(std::size_t n) { return faults::allocate_or_throw(n, 16); }
void* operator new[](std::size_t n) { return faults::allocate_or_throw(n, 16); }
void* operator new(std::size_t n, std::align_val_t a) { return faults::allocate_or_throw(n, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t n, std::align_val_t a) { return faults::allocate_or_throw(n, static_cast<std::size_t>(a)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return faults::allocate(n, 16); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return faults::allocate(n, 16); }
void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
    return faults::allocate(n, static_cast<std::size_t>(a));
}
void operator delete(void* p) noexcept { faults::release(p); }
void operator delete[](void* p) noexcept { faults::release(p); }
void operator delete(void* p, std::size_t) noexcept { faults::release(p); }
void operator delete[](void* p, std::size_t) noexcept { faults::release(p); }
void operator delete(void* p, std::align_val_t) noexcept { faults::release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { faults::release(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { faults::release(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { faults::release(p); }

#if defined(__linux__)

// The program's own mmap comes before the C library's; what that maps for itself does not pass here. Both of its names, since
// the C library's header may turn one into the other.
extern "C" void* faulty_mmap(void*, std::size_t, int, int, int, off_t) noexcept __asm__("mmap");
extern "C" void* faulty_mmap64(void*, std::size_t, int, int, int, off_t) noexcept __asm__("mmap64");
extern "C" void* faulty_mmap(void* address, std::size_t bytes, int protection, int flags, int file, off_t offset) noexcept {
    if (faults::fails()) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    const long result = syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
    if (result != -1) faults::pages += static_cast<long>(bytes);
    return reinterpret_cast<void*>(result);
}
extern "C" void* faulty_mmap64(void* address, std::size_t bytes, int protection, int flags, int file, off_t offset) noexcept {
    return faulty_mmap(address, bytes, protection, flags, file, offset);
}
extern "C" int munmap(void* address, std::size_t bytes) noexcept {
    faults::pages -= static_cast<long>(bytes);
    return static_cast<int>(syscall(SYS_munmap, address, bytes));
}

#endif

using namespace llama3;

namespace {

using Ids = std::vector<int>;

struct Use {
    long blocks = faults::blocks, pages = faults::pages;
    bool operator==(const Use&) const = default;
};

// Runs f with its 0th, 1st, 2nd ... allocation failing, until there are none left to fail; then `after`, which checks what was
// there before. Returns how many were made to fail.
template <class F, class After>
long inject(F&& f, After&& after) {
    long total = 0;
    for (const bool and_on : {false, true})
        for (long number = 0;; ++number) {
            const Use before;
            bool strange = false;
            faults::and_on = and_on, faults::failing = number, faults::seen = 0, faults::injected = 0, faults::armed = true;
            try {
                f();
            } catch (const Error& error) {
                strange = error.code() != Code::memory && error.code() != Code::file;
            } catch (const std::bad_alloc&) {
            } catch (...) {
                strange = true;
            }
            faults::armed = false;
            const long injected = faults::injected;
            const Use used;
            if (strange || !(used == before)) {
                CHECK_MESSAGE(!strange, "a foreign error after allocation ", number);
                CHECK(used.blocks == before.blocks);
                CHECK(used.pages == before.pages);
                return total;
            }
            after();
            if (injected == 0) break;
            total += injected > 0;
            if (number > 100000) FAIL("this never ends");
        }
    CHECK(total > 0);
    return total;
}

std::atomic<long> all_injected{0};

Config config(int context = 128) {
    Config c;
    c.n_layers = 2, c.dim = 64, c.n_heads = 4, c.n_kv_heads = 2, c.head_dim = 16, c.ffn_dim = 96;
    c.vocab_size = 530, c.context_length = context, c.chat_format = ChatFormat::llama3_1;
    return c;
}
// Its weights are more than a megabyte, so that they come from mmap.
const Model& model() {
    static const Model made = [] {
        Config c = config();
        c.dim = 256, c.ffn_dim = 512;
        return Model::synthetic(c, Format::f32);
    }();
    return made;
}
Options options(int threads) {
    Options o;
    o.threads = threads, o.context = 128, o.chunk = 16;
    return o;
}
Ids tokens(int n) {
    Ids ids;
    for (int i = 0; i < n; ++i) ids.push_back((i * 37 + 11) % 530);
    return ids;
}
std::vector<float> logits_after(const Ids& ids) {
    Session session(model(), options(1));
    const auto row = session.feed(ids);
    return {row.begin(), row.end()};
}
bool same(std::span<const float> a, const std::vector<float>& b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

struct TemporaryFile {
    std::string path;
    explicit TemporaryFile(const std::string& content) {
        const char* folder = std::getenv("TMPDIR");
        path = (folder ? folder : "/tmp") + std::string("/llama3_faults_XXXXXX");
        const int file = mkstemp(path.data());
        write(file, content);
    }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;
    ~TemporaryFile() { std::remove(path.c_str()); }
    static void write(int file, const std::string& content) {
        REQUIRE(file >= 0);
        REQUIRE(::write(file, content.data(), content.size()) == static_cast<ssize_t>(content.size()));
        close(file);
    }
};

// A whole .l3 file: the image of a synthetic model begins in memory where its first section's header says, 128 bytes in front.
std::string file_content() {
    const Model made = model();
    const std::vector<TensorInfo> list = made.tensors();
    const auto* first = reinterpret_cast<const char*>(made.weights().embedding.data) - list[0].offset;
    return {first, static_cast<std::size_t>(list.back().offset + list.back().bytes)};
}

}  // namespace

TEST_SUITE_BEGIN("core: faults");

TEST_CASE("an allocation that is lost would be noticed, and one that fails unseen too") {
    const Use before;
    void* lost = ::operator new(8);
    const Use after;
    CHECK_FALSE(before == after);
    ::operator delete(lost);
    CHECK(before == Use());
    bool refused = false;
    faults::failing = 0, faults::seen = 0, faults::armed = true;
    try {
        ::operator delete(::operator new(8));
    } catch (const std::bad_alloc&) {
        refused = true;
    }
    faults::armed = false;
    CHECK(refused);
}

TEST_CASE("loading: mapped, read, from memory and synthetic") {
    const TemporaryFile file(file_content());
    const Model reference = Model::load(file.path);  // loaded before, and in use while others fail
    Session session(reference, options(1));
    const std::vector<float> expected = logits_after(tokens(3));
    const auto still_good = [&] {
        session.rewind(0);
        CHECK(same(session.feed(tokens(3)), expected));
    };
    all_injected += inject([&] { Model::load(file.path); }, still_good);
    all_injected += inject([&] { Model::load(file.path, Model::Loading::read); }, still_good);
    all_injected += inject([&] { Model::synthetic(config(), Format::q4, 3); }, still_good);
    const std::string content = file_content();
    const auto memory = std::make_shared<std::vector<std::byte>>(content.size() + 64);
    std::byte* aligned = memory->data() + (64 - reinterpret_cast<std::uintptr_t>(memory->data()) % 64) % 64;
    std::memcpy(aligned, content.data(), content.size());
    all_injected += inject([&] { Model::from_memory({aligned, content.size()}, memory); }, still_good);
    CHECK(memory.use_count() == 1);  // no failed load keeps it
}

TEST_CASE("asking a model: description, plan, tensors, checksums") {
    const Model reference = model();
    const std::string description = reference.describe();
    all_injected += inject(
        [&] {
            (void)reference.describe();
            (void)reference.provenance();
            (void)reference.tensors();
            (void)reference.plan(options(2));
            reference.verify();
        },
        [&] { CHECK(reference.describe() == description); });
}

TEST_CASE("making a session, on one thread and on a team") {
    const std::vector<float> expected = logits_after(tokens(5));
    for (const int threads : {1, 3})
        for (const bool slow : {false, true}) {
            Options o = options(threads);
            if (slow) o.device = reference();
            all_injected += inject(
                [&] {
                    Session session(model(), o);
                    (void)session.position();
                },
                [] {});
        }
    CHECK(logits_after(tokens(5)) == expected);
}

TEST_CASE("ranks: a session, a prompt, a token") {
    Options o = options(1);
    o.ranks = 2;
    const Ids all = tokens(20);
    Session session(model(), o);
    const auto row = session.feed(all);
    const std::vector<float> expected(row.begin(), row.end());
    session.rewind(3);
    all_injected += inject([&] { Session(model(), o); }, [] {});
    all_injected += inject([&] { session.feed(std::span<const int>(all).subspan(3)); },
                           [&] {
                               if (session.position() == 20) session.rewind(3);
                               CHECK(session.position() == 3);
                           });
    session.feed(std::span<const int>(all).subspan(3));
    CHECK(same(session.logits(), expected));
}

TEST_CASE("feeding: a prompt in chunks, single tokens, every token's logits, several sessions together") {
    const Model small = Model::synthetic(config(), Format::q8);
    for (const bool slow : {false, true}) {
        const Model& of = slow ? small : model();
        Options o = options(2);
        const std::size_t n = slow ? 6 : 40;
        if (slow) o.device = reference(), o.chunk = 2;
        Session session(of, o);
        const Ids all = tokens(static_cast<int>(n));
        const std::span<const int> first = std::span<const int>(all).first(3), more = std::span<const int>(all).subspan(3);
        const auto row = session.feed(first);
        const std::vector<float> start(row.begin(), row.end());
        const auto unchanged = [&] {
            if (session.position() == static_cast<int>(n)) session.rewind(2), session.feed(first.last(1));
            CHECK(session.position() == 3);
            CHECK(same(session.logits(), start));
        };
        all_injected += inject([&] { session.feed(more); }, unchanged);
        const std::function<void(int, std::span<const float>)> each = [](int, std::span<const float>) {};
        all_injected += inject([&] { session.feed(more, each); }, unchanged);
        session.feed(more);
        Session calm(of, o);
        const auto end = calm.feed(all);
        CHECK(std::equal(end.begin(), end.end(), session.logits().begin()));
    }
    Session a(model(), options(1)), b(model(), options(1));
    a.feed(tokens(4)), b.feed(tokens(7));
    Session* const both[] = {&a, &b};
    const std::vector<float> before_a = logits_after(tokens(4)), before_b = logits_after(tokens(7));
    const Ids next = {1, 2};
    all_injected += inject([&] { Session::feed_together(both, next); },
                           [&] {
                               CHECK((a.position() - 4) == (b.position() - 7));  // both or none
                               if (a.position() == 5)
                                   for (Session* s : both) {
                                       const int n = s->position();
                                       s->rewind(n - 2),
                                           s->feed(std::span<const int>(tokens(n)).subspan(static_cast<std::size_t>(n - 2), 1));
                                   }
                               CHECK(same(a.logits(), before_a));
                               CHECK(same(b.logits(), before_b));
                           });
}

TEST_CASE("sampling and generating") {
    Session session(model(), options(1));
    session.feed(tokens(10));
    const std::vector<float> logits = logits_after(tokens(10));
    const Sampling sampling{.temperature = 1, .top_p = 0.8f, .top_k = 50, .repeat_penalty = 1.2f};
    const int expected = Sampler(sampling).sample(logits, session.tokens());
    all_injected += inject(
        [&] {
            Sampler sampler(sampling);
            (void)sampler.sample(logits, session.tokens());
        },
        [&] { CHECK(Sampler(sampling).sample(logits, session.tokens()) == expected); });
    all_injected += inject(
        [&] {
            Sampler sampler(sampling);
            generate(session, tokens(3), sampler, {.max_tokens = 4}, {});
        },
        [&] {
            CHECK(session.position() >= 10);
            session.rewind(9);
            CHECK(same(session.feed(std::span<const int>(tokens(10)).last(1)), logits));
        });
}

TEST_CASE("the tokenizer and its stream") {
    const Tokenizer tokenizer = model().tokenizer();
    const std::string text = "Hello, w\xC3\xB6rld \xFF <|eot_id|> aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 12345";
    const Ids ids = tokenizer.encode(text, Tokenizer::Special::parse);
    all_injected += inject(
        [&] {
            const Ids again = tokenizer.encode(text, Tokenizer::Special::parse);
            (void)tokenizer.decode(again);
            TextStream stream(tokenizer);
            for (const int id : again) (void)stream.push(id);
            (void)stream.finish();
            (void)tokenizer.special("<|eot_id|>");
        },
        [&] { CHECK(tokenizer.encode(text, Tokenizer::Special::parse) == ids); });
}

TEST_CASE("a conversation: the messages are those before the turn that failed, and the next turn gives the same answer") {
    const ChatOptions how{.system = "Be brief.", .max_tokens = 3};
    const Sampling greedy{.temperature = 0};
    Chat calm(model(), how, greedy, options(1));
    const std::string first = calm.say("Hi."), second = calm.say("So?");
    std::optional<Chat> chat;
    const auto begin = [&] {
        chat.emplace(model(), how, greedy, options(1));
        CHECK(chat->say("Hi.") == first);
    };
    begin();
    all_injected +=
        inject([] { Chat other(model(), {.system = "Be brief.", .max_tokens = 3}, {.temperature = 0}, options(1)); }, [] {});
    for (const bool and_on : {false, true})
        for (long number = 0;; ++number) {
            const std::string text = "So?";
            bool good = false;
            faults::and_on = and_on, faults::failing = number, faults::seen = 0, faults::injected = 0, faults::armed = true;
            try {
                good = chat->say(text) == second;
            } catch (const std::bad_alloc&) {
            } catch (const Error& error) {
                CHECK(error.code() == Code::memory);
            }
            faults::armed = false;
            const long injected = faults::injected;
            all_injected += injected > 0;
            CHECK(chat->messages().size() == (good ? 5u : 3u));
            if (!good) CHECK(chat->say(text) == second);
            begin();
            if (injected == 0) break;
        }
}

#if defined(__linux__)

TEST_CASE("a system without threads to give leaves a session that runs on those there are") {
#if !defined(_OPENMP)  // libgomp ends the process instead: README, "Threads"
    const std::vector<float> expected = logits_after(tokens(6));
    const pid_t child = fork();
    if (child == 0) {
        const rlimit none = {0, 0};
        const bool limited = setrlimit(RLIMIT_NPROC, &none) == 0 && setuid(65534) == 0;  // root knows no limit
        bool started = true;
        try {
            std::thread([] {}).join();
        } catch (const std::system_error&) {
            started = false;
        }
        if (!limited || started) _exit(2);
        Session session(model(), options(4));
        _exit(same(session.feed(tokens(6)), expected) ? 0 : 1);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) != 1);
    if (WEXITSTATUS(status) == 2) MESSAGE("the limit of threads did not run: it needs root");
#endif
}

TEST_CASE("a file that shrinks or is replaced after it was read into memory changes nothing; a mapped one survives replacing") {
    const std::string content = file_content();
    const TemporaryFile file(content);
    const std::vector<float> expected = logits_after(tokens(6));
    const auto works = [&](const Model& loaded) {
        Session session(loaded, options(1));
        CHECK(same(session.feed(tokens(6)), expected));
        CHECK(loaded.tokenizer().decode(loaded.tokenizer().encode("Hello")) == "Hello");
    };
    const Model read = Model::load(file.path, Model::Loading::read), mapped = Model::load(file.path);
    const std::string other = file.path + ".new";
    TemporaryFile::write(open(other.c_str(), O_CREAT | O_WRONLY, 0600), "another file");
    REQUIRE(std::rename(other.c_str(), file.path.c_str()) == 0);  // as a download does it: the old file lives on
    works(read), works(mapped);
    CHECK_THROWS_AS(Model::load(file.path), Error);
    TemporaryFile::write(open(file.path.c_str(), O_TRUNC | O_WRONLY), content);
    const Model again = Model::load(file.path, Model::Loading::read);
    REQUIRE(truncate(file.path.c_str(), 100) == 0);
    works(again);
    REQUIRE(std::remove(file.path.c_str()) == 0);
    works(again);
}

TEST_CASE("a mapped file that is cut raises SIGBUS, as the documentation says") {
    const TemporaryFile file(file_content());
    const pid_t child = fork();
    if (child == 0) {
        std::signal(SIGBUS, [](int) { _exit(42); });
        const Model mapped = Model::load(file.path);
        if (truncate(file.path.c_str(), 4096) != 0) _exit(1);
        Session session(mapped, options(1));
        session.feed(tokens(6));
        _exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 42);
}

TEST_CASE("a file that is written while it is mapped may give other numbers, but no access outside it") {
    const std::string content = file_content();
    for (int seed = 1; seed <= 30; ++seed) {
        const TemporaryFile file(content);
        const Model mapped = Model::load(file.path);
        const Tokenizer tokenizer = mapped.tokenizer();
        test::Random random{static_cast<std::uint64_t>(seed)};
        std::string noise = content;
        for (char& c : noise) c = static_cast<char>(random());
        TemporaryFile::write(open(file.path.c_str(), O_WRONLY), noise);
        try {
            (void)mapped.describe();
            (void)mapped.provenance();
            (void)tokenizer.decode(tokenizer.encode("Hello <|eot_id|> \xC3\xA9 aaaa", Tokenizer::Special::parse));
            Session session(mapped, options(1));
            Sampler sampler;
            generate(session, tokens(6), sampler, {.max_tokens = 3}, {});
            mapped.verify();
            FAIL("verify() must see it");
        } catch (const Error&) {
        }
    }
}

#endif

TEST_CASE("enough was made to fail") {
    MESSAGE(all_injected.load(), " faults injected");
    CHECK(all_injected > 2000);
}

TEST_SUITE_END();
