// §10 to §12: the CPU back end against the plain loops, and the identities: no bit depends on threads, chunks, batches or vectors.
#include <random>

namespace {

Config small_config() {
    Config config;
    config.n_layers = 2, config.dim = 136, config.n_heads = 6, config.n_kv_heads = 2, config.head_dim = 20, config.ffn_dim = 200;
    config.vocab_size = 530, config.context_length = 2048;
    config.rope_factor = 32, config.rope_low_freq_factor = 1, config.rope_high_freq_factor = 4, config.rope_original_context = 256;
    return config;
}

Config segmented_config() {
    Config config = small_config();
    config.dim = 96, config.n_heads = 8, config.n_kv_heads = 4, config.head_dim = 64, config.ffn_dim = 512, config.tied_embedding = true;
    return config;
}

std::vector<int> some_tokens(int n, int vocab_size) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::vector<int> tokens(static_cast<std::size_t>(n));
    for (int& token : tokens) token = static_cast<int>(random() % static_cast<unsigned>(vocab_size));
    return tokens;
}

// The logits of all tokens, one row after the other.
std::vector<float> run(const Model& model, std::span<const int> tokens, const Options& options) {
    Session session(model, options);
    std::vector<float> rows;
    session.feed(tokens, [&](int, std::span<const float> logits) { rows.insert(rows.end(), logits.begin(), logits.end()); });
    return rows;
}

Options with(int threads, int chunk, Format kv, const std::string& isa = {}) {
    Options options;
    options.context = 600, options.threads = threads, options.chunk = chunk, options.kv = kv, options.isa = isa;
    return options;
}

std::vector<float> row(std::span<const float> logits) { return {logits.begin(), logits.end()}; }

bool equal(const std::vector<float>& a, const std::vector<float>& b) { return a.size() == b.size() && same_bits(a.data(), b.data(), a.size()); }

double distance(const std::vector<float>& a, const std::vector<float>& b) {
    double worst = 0, largest = 1e-30;
    for (std::size_t i = 0; i < a.size(); ++i) {
        worst = std::max(worst, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
        largest = std::max(largest, std::abs(static_cast<double>(b[i])));
    }
    return a.size() == b.size() ? worst / largest : INFINITY;
}

TEST_SUITE("core: cpu back end") {
    TEST_CASE("every instruction set gives the bits of the reference loops; bf16 instructions come close") {
        for (const Config& config : {small_config(), segmented_config()})
            for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
                const Model model = Model::synthetic(config, format);
                const std::vector<int> tokens = some_tokens(40, config.vocab_size);
                for (Format kv : {Format::f32, Format::bf16, Format::q8}) {
                    Options reference_options = with(1, 16, kv);
                    reference_options.device = reference();
                    const std::vector<float> expected = run(model, tokens, reference_options);
                    REQUIRE(expected.size() == 40 * static_cast<std::size_t>(config.vocab_size));
                    REQUIRE(*std::max_element(expected.begin(), expected.end()) > 1e-3f);
                    for (const d::Kernels* kernels : kernels_here()) {
                        const std::vector<float> found = run(model, tokens, with(2, 64, kv, kernels->name));
                        INFO(kernels->name, " ", format_name(format), " kv ", format_name(kv), " distance ", distance(found, expected));
                        if (format == Format::bf16 && kernels->own_bf16) CHECK(distance(found, expected) < 2e-2);
                        else CHECK(equal(found, expected));
                    }
                }
            }
    }

    TEST_CASE("converted checkpoints, with sharp attention and odd shapes, have the bits of the reference loops too") {
        const char* folder = std::getenv("LLAMA3_TEST_DATA");
        if (!folder) {
            MESSAGE("did not run: LLAMA3_TEST_DATA is not set");
            return;
        }
        int files = 0;
        for (const char* name : {"gqa1_e8", "gqa4_e8_tied", "gqa3_e128_f32", "gqa2_e128_f8", "segments8"})
            for (const char* type : {"f32", "q8", "q4"}) {
                const Model model = Model::load(std::string(folder) + "/" + name + "." + type + ".l3");
                const std::vector<int> tokens = some_tokens(40, model.config().vocab_size);
                Options reference_options = with(1, 16, Format::bf16);
                reference_options.device = reference();
                const std::vector<float> expected = run(model, tokens, reference_options);
                for (const d::Kernels* kernels : kernels_here()) {
                    INFO(name, " ", type, " ", kernels->name);
                    CHECK(equal(run(model, tokens, with(2, 64, Format::bf16, kernels->name)), expected));
                }
                ++files;
            }
        CHECK(files == 15);
    }

    TEST_CASE("threads and chunks do not change a bit") {
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
            const Model model = Model::synthetic(segmented_config(), format);
            const std::vector<int> tokens = some_tokens(90, model.config().vocab_size);
            const std::vector<float> expected = run(model, tokens, with(1, 512, Format::bf16));
            for (int threads : {1, 2, 3, 7, 19})  // more than cores: some are late, and others take their panels
                for (int chunk : {1, 5, 64, 512}) {
                    INFO(format_name(format), " ", threads, " threads, chunks of ", chunk);
                    CHECK(equal(run(model, tokens, with(threads, chunk, Format::bf16)), expected));
                }
        }
    }

    TEST_CASE("a context that crosses the borders of attention segments gives the same bits in one piece and token by token") {
        const Model model = Model::synthetic(small_config(), Format::q8);
        const std::vector<int> tokens = some_tokens(560, model.config().vocab_size);
        for (Format kv : {Format::f32, Format::q8}) {
            Session whole(model, with(2, 512, kv)), single(model, with(1, 1, kv));
            const std::vector<float> expected = row(whole.feed(tokens));
            for (int token : tokens) single.feed(std::span(&token, 1));
            CHECK(equal(row(single.logits()), expected));
            // more threads than key/value heads: they share the segments of a row, and of two sequences at once
            Session spread(model, with(5, 512, kv)), beside(model, with(5, 512, kv));
            spread.feed(std::span(tokens).first(550)), beside.feed(std::span(tokens).first(300));
            for (std::size_t i = 550; i < 555; ++i) spread.feed(std::span(&tokens[i], 1));
            for (std::size_t i = 555; i < 560; ++i) {
                Session* both[] = {&beside, &spread};
                const int next[] = {tokens[i], tokens[i]};
                Session::feed_together(both, next);
            }
            CHECK(equal(row(spread.logits()), expected));
        }
    }

    TEST_CASE("a sequence alone has the bits that it has beside others") {
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
            const Model model = Model::synthetic(small_config(), format);
            std::vector<std::unique_ptr<Session>> together, alone;
            std::vector<Session*> pointers;
            for (int i = 0; i < 9; ++i) {
                together.push_back(std::make_unique<Session>(model, with(2, 64, Format::bf16)));
                alone.push_back(std::make_unique<Session>(model, with(1, 64, Format::bf16)));
                const std::vector<int> prompt = some_tokens(3 + 5 * i, model.config().vocab_size);
                together.back()->feed(prompt), alone.back()->feed(prompt);
                pointers.push_back(together.back().get());
            }
            for (int step = 0; step < 3; ++step) {
                std::vector<int> tokens;
                for (int i = 0; i < 9; ++i) tokens.push_back((step * 71 + i * 13) % model.config().vocab_size);
                Session::feed_together(pointers, tokens);
                for (std::size_t i = 0; i < 9; ++i) {
                    alone[i]->feed(std::span(&tokens[i], 1));
                    CHECK(equal(row(together[i]->logits()), row(alone[i]->logits())));
                }
            }
        }
    }

    TEST_CASE("rewinding and feeding again gives the same bits") {
        const Model model = Model::synthetic(small_config(), Format::q4);
        const std::vector<int> tokens = some_tokens(30, model.config().vocab_size);
        Session session(model, with(2, 64, Format::q8));
        const std::vector<float> expected = row(session.feed(tokens));
        session.rewind(7);
        session.feed(some_tokens(11, model.config().vocab_size));
        session.rewind(7);
        session.feed(std::span(tokens).subspan(7));
        CHECK(equal(row(session.logits()), expected));
    }

    TEST_CASE("an unknown instruction set is refused with the list of those that work") {
        const Model model = Model::synthetic(small_config(), Format::q8);
        try {
            Session session(model, with(1, 64, Format::bf16, "mmx"));
            FAIL("no error");
        } catch (const Error& error) {
            CHECK(error.code() == Code::device);
            CHECK(std::string(error.what()).find("mmx") != std::string::npos);
            CHECK(std::string(error.what()).find("baseline") != std::string::npos);
        }
    }

    TEST_CASE("the floating-point modes of the caller neither matter nor change") {
        const Model model = Model::synthetic(small_config(), Format::f32);
        const std::vector<int> tokens = some_tokens(20, model.config().vocab_size);
        const std::vector<float> expected = run(model, tokens, with(1, 64, Format::bf16));
#if defined(__x86_64__)
        const unsigned before = _mm_getcsr();
        _mm_setcsr(0x1f80 | 0x8040 | 0x6000);  // flush denormals, round toward zero
        const std::vector<float> found = run(model, tokens, with(1, 64, Format::bf16));
        const unsigned after = _mm_getcsr();
        _mm_setcsr(before);
        CHECK((after & 0xffc0) == (0x1f80 | 0x8040 | 0x6000));
        CHECK(equal(found, expected));
#endif
    }
}

}  // namespace
