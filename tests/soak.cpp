// A long run: soak SECONDS [--plant leak|state]. Chats and sessions that live through thousands of rounds of random prompts,
// cancels from another thread, rewinds, full contexts and restarts. After every round the text is compared with that of fresh
// objects that saw nothing of it; at the end the memory in use with that after the first rounds. With --plant it makes the
// mistake that it should notice. Exit status 0 if all was well.
#include <unistd.h>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "llama3.hpp"

namespace {

using namespace llama3;

struct Random {
    std::uint64_t state;
    std::uint64_t operator()() {
        std::uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>((*this)() % static_cast<std::uint64_t>(n)); }
};

long resident_kilobytes() {
    long pages = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> pages >> resident;
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

Model make_model(Format format, std::uint64_t seed) {
    Config c;
    c.n_layers = 2, c.dim = 64, c.n_heads = 4, c.n_kv_heads = 2, c.head_dim = 16, c.ffn_dim = 128, c.vocab_size = 530;
    c.context_length = 512, c.chat_format = ChatFormat::llama3_1;
    return Model::synthetic(c, format, seed);
}

Options make_options(int i) {
    Options options;
    options.context = 160 + 64 * i, options.threads = 1 + i % 2, options.chunk = 7 + 16 * i;
    options.kv = i == 1 ? Format::q8 : Format::bf16;
    return options;
}

std::string random_text(Random& random) {
    static const char* const pieces[] = {"Hello", " there", "\n",   "<|eot_id|>", " \xC3\xA9t\xC3\xA9", "\xF0\x9F\x99\x82",
                                         "42",    "   ",    "\xFF", "why?"};
    std::string text;
    for (int n = 1 + random.below(random.below(8) == 0 ? 60 : 8); n > 0; --n) text += pieces[random.below(10)];
    return text;
}

// Calls f again until no cancel() came between.
template <class F>
void until_done(F&& f) {
    for (;;) try {
            return f();
        } catch (const Error& error) {
            if (error.code() != Code::cancelled) throw;
        }
}

struct Players {
    Chat chat;
    Session session;
    Players(const Model& model, int i)
        : chat(model, {.system = i == 2 ? "Be brief." : "", .max_tokens = 10}, {.temperature = 0.9f}, make_options(i)),
          session(model, make_options(i)) {}
};

struct Totals {
    long turns = 0, tokens = 0, restarts = 0, refused = 0, cancels = 0;
};

// What the players say and compute in the round `seed`; `noise`: another thread cancels the session now and then.
std::string play(Players& players, std::uint64_t seed, bool noise, Totals& totals) {
    Random random{seed};
    std::string said;
    players.chat.clear();
    for (int turn = 1 + random.below(5); turn > 0; --turn) {
        const std::string text = random_text(random);
        try {
            int left = random.below(4) == 0 ? random.below(4) : 1000;  // a listener that loses interest
            said += players.chat.say(text, [&](std::string_view) { return left-- > 0; }) + '|';
        } catch (const Error& error) {
            if (error.code() != Code::context) throw;
            said += "too long|", ++totals.refused;
        }
        ++totals.turns;
    }
    totals.restarts += players.chat.restarts();

    Session& session = players.session;
    session.reset_cancel();
    session.rewind(0);
    std::atomic<bool> done{false};
    std::thread canceller;
    if (noise)
        canceller = std::thread([&, wait = random.below(300)] {
            for (int i = 0; i < 3 && !done; ++i) {
                std::this_thread::sleep_for(std::chrono::microseconds(wait * (i + 1)));
                session.cancel();
                ++totals.cancels;
            }
        });
    else random.below(300);
    for (int step = 3 + random.below(8); step > 0; --step) {
        std::vector<int> ids;
        for (int n = 1 + random.below(60); n > 0; --n) ids.push_back(random.below(530));
        if (session.position() + static_cast<int>(ids.size()) > session.context()) session.rewind(random.below(20));
        until_done([&] { session.feed(ids); });
        totals.tokens += static_cast<long>(ids.size());
        said += std::to_string(log_probability(session.logits(), ids[0])) + ' ';
        if (random.below(3) == 0) {
            session.rewind(session.position() - random.below(static_cast<int>(ids.size())) - 1);
            const int id = random.below(530);
            until_done([&] { session.feed({&id, 1}); });
        }
    }
    done = true;
    if (canceller.joinable()) canceller.join();
    said.append(reinterpret_cast<const char*>(session.logits().data()), session.logits().size_bytes());
    return said;
}

}  // namespace

int main(int argc, char** argv) try {
    const std::string plant = argc == 4 && std::strcmp(argv[2], "--plant") == 0 ? argv[3] : "";
    const double seconds = argc >= 2 ? std::atof(argv[1]) : 0;
    if (!(seconds > 0) || (argc != 2 && plant != "leak" && plant != "state")) {
        std::fprintf(stderr,
                     "soak: the command line is wrong (found %d arguments, expected SECONDS and perhaps --plant leak or "
                     "state). See its first lines.\n",
                     argc - 1);
        return 2;
    }
    const Model models[] = {make_model(Format::f32, 1), make_model(Format::q8, 2), make_model(Format::q4, 3)};
    Players old[] = {{models[0], 0}, {models[1], 1}, {models[2], 2}};
    Totals totals, fresh_totals;
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    constexpr int warm_up = 30;  // rounds after which every buffer has its size
    long start_kilobytes = 0;
    std::uint64_t round = 0;
    for (; round < 2 * warm_up || std::chrono::steady_clock::now() < end; ++round) {
        const int i = static_cast<int>(round % 3);
        const std::string lived = play(old[i], round, true, totals);
        Players fresh(models[i], i);
        const std::string expected = play(fresh, round + (plant == "state" && round == 40 ? 3 : 0), false, fresh_totals);
        if (lived != expected) {
            std::fprintf(stderr, "soak: round %" PRIu64 " of old objects is not that of fresh ones\n", round);
            return 1;
        }
        if (plant == "leak") std::memset(std::malloc(1 << 20), 1, 1 << 20);
        if (round == warm_up) start_kilobytes = resident_kilobytes();
    }
    const long growth = resident_kilobytes() - start_kilobytes;
    std::printf(
        "%" PRIu64
        " rounds, %ld turns of chats, %ld restarts, %ld refused, %ld tokens fed, %ld cancels; memory %ld kB, grown by %ld kB\n",
        round, totals.turns, totals.restarts, totals.refused, totals.tokens, totals.cancels, start_kilobytes, growth);
    if (totals.restarts == 0 || totals.cancels == 0)
        return std::fprintf(stderr, "soak: nothing was restarted or cancelled\n"), 1;
    if (growth > 16384) return std::fprintf(stderr, "soak: the memory grows\n"), 1;
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "soak: %s\n", error.what());
    return 1;
}
