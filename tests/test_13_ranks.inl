// §13: one model split over ranks has the bits of the whole, in one process and between several (here threads that only talk through
// a Communicator; with MPI: test_mpi.py), and exchanges no more than it says.
#include <thread>

namespace {

// 8 segments; from 16 ranks on key/value heads are shared.
Config ranks_config() {
    Config config = small_config();
    config.dim = 96, config.n_heads = 16, config.n_kv_heads = 8, config.head_dim = 64, config.ffn_dim = 1024;
    return config;
}

// 3 key/value heads, and channels that do not divide evenly.
Config three_config() {
    Config config = small_config();
    config.n_heads = 6, config.n_kv_heads = 3, config.head_dim = 64, config.ffn_dim = 200;
    return config;
}

Options on_ranks(int ranks, int threads = 1, int chunk = 64, Format kv = Format::bf16) {
    Options options = with(threads, chunk, kv);
    options.ranks = ranks;
    return options;
}

// Passes everything on and counts it.
struct Counting final : Communicator {
    std::shared_ptr<Communicator> inner;
    std::atomic<int> sums{0}, gathers{0}, broadcasts{0}, floats_summed{0}, floats_gathered{0};
    explicit Counting(std::shared_ptr<Communicator> c) : inner(std::move(c)) {}
    int rank() const override { return inner->rank(); }
    int ranks() const override { return inner->ranks(); }
    void all_reduce_sum(std::span<float> values) override {
        ++sums, floats_summed += static_cast<int>(values.size());
        inner->all_reduce_sum(values);
    }
    void gather(std::span<const float> part, std::span<float> whole) override {
        ++gathers, floats_gathered += static_cast<int>(part.size());
        inner->gather(part, whole);
    }
    void broadcast(std::vector<std::byte>& message) override { ++broadcasts, inner->broadcast(message); }
    void barrier() override { inner->barrier(); }
    void abort() noexcept override { inner->abort(); }
    std::string describe() const override { return inner->describe(); }
};

// Threads that share nothing but the model and a Communicator: rank 0 runs `lead`, the others follow().
template <class Lead>
std::vector<std::shared_ptr<Counting>> lead_and_follow(const Model& model, int ranks, const Lead& lead,
                                                       const std::function<Model(int)>& model_of = {},
                                                       const std::shared_ptr<Device>& device = nullptr) {
    std::vector<std::shared_ptr<Counting>> communicators;
    for (const auto& communicator : d::ranks_in_process(ranks)) communicators.push_back(std::make_shared<Counting>(communicator));
    std::vector<std::thread> threads;
    for (int rank = 1; rank < ranks; ++rank)
        threads.emplace_back([&, rank] {
            Options options = with(1, 64, Format::bf16);
            options.communicator = communicators[static_cast<std::size_t>(rank)], options.device = device;
            try {
                follow(model_of ? model_of(rank) : model, options);
            } catch (const Error&) {
                communicators[static_cast<std::size_t>(rank)]->abort();
            }
        });
    std::exception_ptr failure;
    try {
        lead(std::static_pointer_cast<Communicator>(communicators[0]));
        std::vector<std::byte> nothing;
        communicators[0]->broadcast(nothing);
    } catch (...) {
        failure = std::current_exception();
        communicators[0]->abort();
    }
    for (std::thread& thread : threads) thread.join();
    if (failure) std::rethrow_exception(failure);
    return communicators;
}

// The CPU, on which the steps of one rank fail when they are told to.
struct Failing final : Device {
    std::shared_ptr<Device> inner = cpu();
    int rank;
    bool fails = false;
    explicit Failing(int which) : rank(which) {}
    std::unique_ptr<Backend> open(const Model& model, const Options& options) override {
        if (!options.communicator) return d::open_in_process(*this, model, options);
        struct Wrapped final : Backend {
            std::unique_ptr<Backend> inner;
            const Failing* device;
            std::unique_ptr<KVCache> make_cache() override { return inner->make_cache(); }
            int max_rows() const override { return inner->max_rows(); }
            bool step(const Batch& batch, const std::atomic<bool>* cancel) override {
                if (device && device->fails) throw Error(Code::memory, "no more memory");
                return inner->step(batch, cancel);
            }
            std::span<const float> logits(int i) const override { return inner->logits(i); }
            std::string describe() const override { return inner->describe(); }
        };
        auto backend = std::make_unique<Wrapped>();
        backend->inner = inner->open(model, options);
        backend->device = options.communicator->rank() == rank ? this : nullptr;
        return backend;
    }
    std::uint64_t cache_bytes(const Config& config, const Options& options) const override { return inner->cache_bytes(config, options); }
    std::uint64_t activations_bytes(const Config& config, const Options& options) const override {
        return inner->activations_bytes(config, options);
    }
};

std::mt19937 test_random;

std::string generated(Session& session, std::span<const int> prompt, const Sampling& sampling, int n) {
    Sampler sampler(sampling);
    std::string ids;
    GenerateOptions options;
    options.max_tokens = n, options.ignore_end = true, options.logits = false;
    generate(session, prompt, sampler, options, [&](const Generated& g) {
        ids += std::to_string(g.token) + ' ';
        return true;
    });
    return ids;
}

TEST_SUITE("core: ranks") {
    TEST_CASE("1, 2, 4 and 8 ranks give the same bits, whatever the threads, chunks, cache and format") {
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
            const Model model = Model::synthetic(ranks_config(), format);
            const std::vector<int> tokens = some_tokens(37, model.config().vocab_size);
            for (Format kv : {Format::bf16, Format::q8}) {
                const std::vector<float> expected = run(model, tokens, on_ranks(1, 2, 64, kv));
                for (int ranks : {2, 4, 8})
                    for (const std::pair<int, int>& way : {std::pair{1, 64}, {2, 5}, {3, 1}}) {  // clang 14 cannot capture bindings
                        const int threads = way.first, chunk = way.second;
                        if (ranks * threads > 16) continue;
                        INFO(format_name(format), " kv ", format_name(kv), " ", ranks, " ranks of ", threads, ", chunks of ", chunk);
                        CHECK(equal(run(model, tokens, on_ranks(ranks, threads, chunk, kv)), expected));
                    }
            }
        }
    }

    TEST_CASE("every instruction set has the same bits on two ranks as on one") {
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
            const Model model = Model::synthetic(ranks_config(), format);
            const std::vector<int> tokens = some_tokens(21, model.config().vocab_size);
            for (const d::Kernels* kernels : kernels_here()) {
                Options one = on_ranks(1), two = on_ranks(2);
                one.isa = two.isa = kernels->name;
                INFO(kernels->name, " ", format_name(format));
                CHECK(equal(run(model, tokens, two), run(model, tokens, one)));
            }
        }
    }

    TEST_CASE("beyond the stored segments ranks come close: 16 that share key/value heads, 3 with uneven channels") {
        for (const int ranks : {16, 3})
            for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
                const Model model = Model::synthetic(ranks == 16 ? ranks_config() : three_config(), format);
                const std::vector<int> tokens = some_tokens(37, model.config().vocab_size);
                const std::vector<float> expected = run(model, tokens, on_ranks(1)), found = run(model, tokens, on_ranks(ranks));
                INFO(ranks, " ranks ", format_name(format), " distance ", distance(found, expected));
                CHECK(distance(found, expected) < (format == Format::f32 ? 1e-4 : format == Format::bf16 ? 2e-2 : 3e-2));
            }
    }

    TEST_CASE("several sequences in one batch have the bits of one rank") {
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        std::vector<std::unique_ptr<Session>> split, whole;
        std::vector<Session*> split_pointers, whole_pointers;
        for (int i = 0; i < 3; ++i) {
            split.push_back(std::make_unique<Session>(model, on_ranks(4)));
            whole.push_back(std::make_unique<Session>(model, on_ranks(1)));
            const std::vector<int> prompt = some_tokens(4 + 3 * i, model.config().vocab_size);
            split.back()->feed(prompt), whole.back()->feed(prompt);
            split_pointers.push_back(split.back().get()), whole_pointers.push_back(whole.back().get());
        }
        const std::vector<int> tokens = some_tokens(3, model.config().vocab_size);
        Session::feed_together(split_pointers, tokens);
        Session::feed_together(whole_pointers, tokens);
        for (std::size_t i = 0; i < 3; ++i) CHECK(equal(row(split[i]->logits()), row(whole[i]->logits())));
    }

    TEST_CASE("numbers of ranks that cannot share a model are refused with the list of those that can") {
        const auto message = [](const Config& config, Format format, int ranks) {
            try {
                Session session(Model::synthetic(config, format), on_ranks(ranks));
            } catch (const Error& error) {
                CHECK(error.code() == Code::argument);
                return std::string(error.what());
            }
            return std::string();
        };
        CHECK(message(ranks_config(), Format::q8, 3) ==
              "Options::ranks: they cannot share 16 query and 8 key/value heads of 64 (found 3, expected 1, 2, 4, 8, 16). Use one of these.");
        CHECK(message(three_config(), Format::q4, 2).find("(found 2, expected 1, 3)") != std::string::npos);
        CHECK(message(small_config(), Format::f32, 2).find("(found 2, expected 1)") != std::string::npos);  // heads of 20 end inside panels
        CHECK(message(ranks_config(), Format::f32, 100000).find("found 100000") != std::string::npos);
        // One layer whose format needs wider units decides.
        Config narrow = small_config();
        narrow.n_heads = narrow.n_kv_heads = 2, narrow.head_dim = 32;
        const Model f32 = Model::synthetic(narrow, Format::f32);
        Weights mixed = f32.weights();
        CHECK_NOTHROW(share_of(f32.config(), mixed, 1, 2));
        mixed.layers[1].attention_out.format = Format::q8;
        CHECK_THROWS_AS(share_of(f32.config(), mixed, 1, 2), Error);
    }

    TEST_CASE("shares cover every weight once, and what is replicated is the embedding table, norms and shared heads") {
        for (const auto& [config, format] : {std::pair{ranks_config(), Format::q8}, {three_config(), Format::q4}}) {
            const Model model = Model::synthetic(config, format);
            for (int ranks : {1, 2, 3, 4, 8}) {
                if (!d::can_share(model.config(), model.weights(), ranks)) continue;
                const Weights& whole = model.weights();
                for (std::size_t l = 0; l < whole.layers.size(); ++l) {
                    int query = 0, key = 0, gate = 0, out = 0, down = 0, logits = 0;
                    for (int rank = 0; rank < ranks; ++rank) {
                        const Share share = share_of(model.config(), whole, rank, ranks);
                        const Layer &part = share.weights.layers[l], &layer = whole.layers[l];
                        CHECK(d::decode_weight(part.query, 5, 7) == d::decode_weight(layer.query, query + 5, 7));
                        CHECK(d::decode_weight(part.value, 5, 7) == d::decode_weight(layer.value, key + 5, 7));
                        CHECK(d::decode_weight(part.up, 9, 3) == d::decode_weight(layer.up, gate + 9, 3));
                        CHECK(d::decode_weight(part.attention_out, 17, 9) == d::decode_weight(layer.attention_out, 17, out + 9));
                        CHECK(d::decode_weight(part.down, 40, 3) == d::decode_weight(layer.down, 40, down + 3));
                        CHECK(d::decode_weight(share.weights.output, 2, 3) == d::decode_weight(whole.output, logits + 2, 3));
                        query += part.query.rows, key += part.value.rows, gate += part.up.rows;
                        out += part.attention_out.columns, down += part.down.columns, logits += share.weights.output.rows;
                    }
                    CHECK(query == whole.layers[l].query.rows);
                    CHECK(key == whole.layers[l].value.rows);
                    CHECK(gate == config.ffn_dim);
                    CHECK(out == whole.layers[l].attention_out.columns);
                    CHECK(down == config.ffn_dim);
                    CHECK(logits == config.vocab_size);
                }
            }
        }
    }

    TEST_CASE("the plan of a rank is its part of the model and what all have, and is the same from the shape alone") {
        Config config = ranks_config();
        const Model model = Model::synthetic(config, Format::q8);
        const std::uint64_t whole = model.plan(on_ranks(1)).weights_bytes;
        const Matrix& table = model.weights().embedding;
        const std::uint64_t replicated =
            static_cast<std::uint64_t>(table.panels()) * table.panel_stride + 4ull * static_cast<std::uint64_t>(config.dim * (2 * config.n_layers + 1));
        for (int ranks : {1, 2, 4, 8}) {
            const MemoryPlan plan = model.plan(on_ranks(ranks)), planned = plan_memory(config, Format::q8, on_ranks(ranks));
            CHECK(plan.weights_bytes == planned.weights_bytes);
            CHECK(plan.cache_bytes == planned.cache_bytes);
            CHECK(plan.activations_bytes == planned.activations_bytes);
            CHECK(plan.weights_bytes >= (whole - replicated) / static_cast<std::uint64_t>(ranks) + replicated);
            CHECK(plan.weights_bytes <= (whole - replicated) / static_cast<std::uint64_t>(ranks) + replicated + 16 * table.panel_stride);
            CHECK(plan.cache_bytes * static_cast<std::uint64_t>(ranks) == model.plan(on_ranks(1)).cache_bytes);
        }
        CHECK_THROWS_AS(plan_memory(config, Format::q8, on_ranks(5)), Error);
        CHECK_THROWS_AS(share_of(config, model.weights(), 2, 2), Error);
        CHECK_THROWS_AS(share_of(config, model.weights(), -1, 2), Error);
        CHECK_THROWS_AS(plan_memory(config, static_cast<Format>(9), on_ranks(1)), Error);
    }

    TEST_CASE("join_ranks adds neighbours, then pairs of them, whatever the number of ranks") {
        const std::size_t n = 1000;
        std::vector<std::vector<float>> values(7, std::vector<float>(n));
        std::mt19937 random(5);
        for (auto& part : values)
            for (float& value : part) value = static_cast<float>(random()) * 1e-6f - 500;
        std::vector<const float*> parts;
        for (const auto& part : values) parts.push_back(part.data());
        std::vector<float> out(n);
        join_ranks(out.data(), std::span(parts).first(4), n);
        for (std::size_t i = 0; i < n; ++i) CHECK(out[i] == (values[0][i] + values[1][i]) + (values[2][i] + values[3][i]));
        join_ranks(out.data(), parts, n);
        for (std::size_t i = 0; i < n; ++i)
            CHECK(out[i] == ((values[0][i] + values[1][i]) + (values[2][i] + values[3][i])) + ((values[4][i] + values[5][i]) + values[6][i]));
        join_ranks(values[0].data(), std::span(parts).first(1), n);
        join_ranks(values[0].data(), parts, n);  // in place
        CHECK(values[0] == out);
    }

    TEST_CASE("threads that are ranks get every sum whole, of lengths that grow, shrink and are less than one for each") {
        const auto ranks = d::ranks_in_process(4);
        std::atomic<int> wrong{0};
        std::vector<std::thread> threads;
        for (const auto& communicator : ranks)
            threads.emplace_back([&, rank = communicator->rank()] {
                for (int round = 0; round < 300; ++round) {
                    std::vector<float> values(static_cast<std::size_t>(round % 50 == 0 ? 3 : 17 * round));
                    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((rank + 1) * (round + static_cast<int>(i)));
                    communicator->all_reduce_sum(values);
                    for (std::size_t i = 0; i < values.size(); ++i) wrong += values[i] != 10 * static_cast<float>(round + static_cast<int>(i));
                }
            });
        for (std::thread& thread : threads) thread.join();
        CHECK(wrong == 0);
    }

    TEST_CASE("rank 0 leads others that only follow: same text, two sums per layer, one gather per token, only candidates where they decide") {
        Config config = ranks_config();
        config.dim = 512;  // rows that are a power of two apart are stored otherwise, but travel as they are
        const Model model = Model::synthetic(config, Format::q8);
        const std::vector<int> prompt = some_tokens(9, model.config().vocab_size);
        const int n_tokens = 6, layers = model.config().n_layers;
        const auto sampling = [](float temperature, int top_k) {
            Sampling s;
            s.temperature = temperature, s.top_k = top_k, s.seed = 11;
            return s;
        };
        for (const Sampling& how : {sampling(0, 0), sampling(0.9f, 40), sampling(0.9f, 64), sampling(0.9f, 0), sampling(0.9f, 65)}) {
            const int candidates = how.temperature == 0 ? 1 : how.top_k <= 64 ? how.top_k : 0;
            Session alone(model, on_ranks(1));
            const std::string expected = generated(alone, prompt, how, n_tokens);
            for (int ranks : {2, 4}) {
                std::string found;
                int sums = 0, gathers = 0, broadcasts = 0, floats_summed = 0, floats_gathered = 0;
                std::shared_ptr<Counting> counts;
                lead_and_follow(model, ranks, [&](const std::shared_ptr<Communicator>& communicator) {
                    Options options = with(1, 64, Format::bf16);
                    options.communicator = communicator;
                    Session session(model, options);
                    session.feed(prompt);
                    counts = std::static_pointer_cast<Counting>(communicator);
                    sums = counts->sums, gathers = counts->gathers, broadcasts = counts->broadcasts, floats_summed = counts->floats_summed, floats_gathered = counts->floats_gathered;
                    found = generated(session, {}, how, n_tokens);
                    sums = counts->sums - sums, gathers = counts->gathers - gathers, broadcasts = counts->broadcasts - broadcasts;
                    floats_summed = counts->floats_summed - floats_summed, floats_gathered = counts->floats_gathered - floats_gathered;
                });
                INFO(ranks, " ranks, ", candidates, " candidates");
                CHECK(found == expected);
                CHECK(sums == n_tokens * 2 * layers);
                CHECK(floats_summed == sums * (config.dim + 1));  // and the wish to stop
                CHECK(broadcasts == n_tokens + gathers);          // commands: a step, and what is gathered
                // The row after the prompt is there already; a row that stays on the ranks is not gathered after the last token.
                CHECK(gathers == (candidates ? n_tokens - 1 : n_tokens));
                if (candidates) CHECK(floats_gathered == gathers * 2 * (how.temperature == 0 ? 1 : candidates + 1));
                else CHECK(floats_gathered == gathers * share_of(model.config(), model.weights(), 0, ranks).weights.output.rows);
            }
        }
    }

    TEST_CASE("a rank reads no byte of the tensors but those of its share, which are as many as planned") {
        for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4}) {
            const Model model = Model::synthetic(ranks_config(), format);
            const std::vector<int> prompt = some_tokens(9, model.config().vocab_size);
            Session alone(model, on_ranks(1));
            const std::string expected = generated(alone, prompt, {}, 4);
            // The file as a rank needs it: what it must not read is all ones, NaN in every scale and float.
            const auto only_the_share = [&](int rank) {
                const auto image = model.impl().image;
                const auto memory = std::make_shared<d::AlignedBuffer>(image.size());
                std::copy(image.begin(), image.end(), memory->data());
                const auto from = static_cast<std::size_t>(model.tensors().front().offset);
                std::fill(memory->data() + from, memory->data() + image.size(), std::byte{0xff});
                std::uint64_t copied = 0;
                const auto copy = [&](const void* data, std::size_t bytes) {
                    const auto at = static_cast<std::size_t>(static_cast<const std::byte*>(data) - image.data());
                    std::memcpy(memory->data() + at, data, bytes);
                    copied += bytes;
                };
                const auto copy_matrix = [&](const Matrix& m) {
                    for (int p = 0; p < m.panels(); ++p) copy(m.panel(p), static_cast<std::size_t>(m.units()) * unit_bytes(m.format));
                };
                const Share share = share_of(model.config(), model.weights(), rank, 4);
                const auto norm_bytes = static_cast<std::size_t>(share.config.dim) * 4;
                copy_matrix(share.weights.embedding), copy_matrix(share.weights.output), copy(share.weights.final_norm, norm_bytes);
                for (const Layer& l : share.weights.layers) {
                    for (const Matrix* m : {&l.query, &l.key, &l.value, &l.attention_out, &l.gate, &l.up, &l.down}) copy_matrix(*m);
                    copy(l.attention_norm, norm_bytes), copy(l.ffn_norm, norm_bytes);
                }
                CHECK(copied == bytes_of(share));
                return Model::from_memory({memory->data(), memory->size()}, memory);
            };
            std::string found;
            lead_and_follow(
                model, 4,
                [&](const std::shared_ptr<Communicator>& communicator) {
                    Options options = with(1, 64, Format::bf16);
                    options.communicator = communicator;
                    Session session(only_the_share(0), options);
                    found = generated(session, prompt, {}, 4);
                },
                only_the_share);
            INFO(format_name(format));
            CHECK(found == expected);
        }
    }

    TEST_CASE("rank 0 may have several sessions, also in one batch, and end them in any order") {
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        lead_and_follow(model, 4, [&](const std::shared_ptr<Communicator>& communicator) {
            Options options = with(1, 8, Format::q8);
            options.communicator = communicator;
            auto a = std::make_unique<Session>(model, options);
            options.context = 64, options.chunk = 64;
            auto b = std::make_unique<Session>(model, options);
            Session alone_a(model, on_ranks(1, 1, 8, Format::q8)), alone_b(model, on_ranks(1, 1, 8, Format::q8));
            for (Session* session : {a.get(), &alone_a}) session->feed(some_tokens(20, model.config().vocab_size));
            for (Session* session : {b.get(), &alone_b}) session->feed(some_tokens(5, model.config().vocab_size));
            const std::vector<int> tokens = {3, 4};
            Session::feed_together(std::vector{a.get(), b.get()}, tokens);
            Session::feed_together(std::vector{&alone_a, &alone_b}, tokens);
            CHECK(equal(row(a->logits()), row(alone_a.logits())));
            CHECK(equal(row(b->logits()), row(alone_b.logits())));
            a.reset();
            b->feed(tokens), alone_b.feed(tokens);
            CHECK(equal(row(b->logits()), row(alone_b.logits())));
            a = std::make_unique<Session>(model, options);
            a->feed(tokens), alone_a.rewind(0), alone_a.feed(tokens);
            CHECK(equal(row(a->logits()), row(alone_a.logits())));
        });
    }

    TEST_CASE("a feed that fails or is being watched leaves the sampler the logits that the session has") {
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        const std::vector<int> prompt = some_tokens(9, model.config().vocab_size), other = some_tokens(4, model.config().vocab_size);
        Sampling greedy;
        greedy.temperature = 0;
        Session alone(model, on_ranks(1));
        const auto best = [](std::span<const float> logits) { return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin()); };
        const int after_prompt = best(alone.feed(prompt));
        lead_and_follow(model, 2, [&](const std::shared_ptr<Communicator>& communicator) {
            Options options = with(1, 64, Format::bf16);
            options.communicator = communicator;
            Session session(model, options);
            Sampler sampler(greedy);
            session.feed(prompt);
            CHECK_THROWS_AS(session.feed(other, [](int, std::span<const float>) { throw 1; }), int);
            CHECK(sampler.sample(session) == after_prompt);
            session.feed(other, [&](int, std::span<const float>) { CHECK(sampler.sample(session) == after_prompt); });
            CHECK(sampler.sample(session) == best(session.logits()));
        });
    }

    TEST_CASE("logits that round to one probability at the border of the top-k are chosen as one rank chooses them") {
        // A back end whose logits are given: rank r has its part of a row.
        struct Given final : Backend {
            std::vector<float> part;
            struct Cache final : KVCache {
                int capacity() const override { return 8; }
            };
            std::unique_ptr<KVCache> make_cache() override { return std::make_unique<Cache>(); }
            int max_rows() const override { return 1; }
            bool step(const Batch&, const std::atomic<bool>*) override { return true; }
            std::span<const float> logits(int) const override { return part; }
            std::string describe() const override { return "given"; }
        };
        struct GivenDevice final : Device {
            std::vector<float> row;
            std::unique_ptr<Backend> open(const Model& model, const Options& options) override {
                auto backend = std::make_unique<Given>();
                const int v = model.config().vocab_size, rank = options.communicator->rank(), ranks = options.communicator->ranks();
                backend->part.assign(row.begin() + d::border(v, 16, rank, ranks), row.begin() + d::border(v, 16, rank + 1, ranks));
                return backend;
            }
            std::uint64_t cache_bytes(const Config&, const Options&) const override { return 0; }
            std::uint64_t activations_bytes(const Config&, const Options&) const override { return 0; }
        };
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        const auto v = static_cast<std::size_t>(model.config().vocab_size);
        test_random.seed(3);
        for (int round = 0; round < 40; ++round) {
            const auto device = std::make_shared<GivenDevice>();
            // Few different values, most of them a rounding apart.
            for (std::size_t i = 0; i < v; ++i)
                device->row.push_back(std::bit_cast<float>(std::bit_cast<std::uint32_t>(2.0f) + static_cast<std::uint32_t>(test_random() % 9)));
            Sampling how;
            how.temperature = 50, how.top_k = 1 + static_cast<int>(test_random() % 5), how.top_p = 1, how.seed = test_random();
            Sampler one(how);
            std::vector<int> expected, found;
            for (int i = 0; i < 5; ++i) expected.push_back(one.sample(device->row));
            lead_and_follow(
                model, 2,
                [&](const std::shared_ptr<Communicator>& communicator) {
                    Options options = with(1, 64, Format::bf16);
                    options.communicator = communicator, options.device = device;
                    const std::unique_ptr<Backend> backend = d::open_backend(*device, model, d::checked_options(model.config(), options));
                    std::uint64_t state = how.seed;
                    for (int i = 0; i < 5; ++i) found.push_back(backend->draw(0, how, d::next_random(state)));
                },
                {}, device);
            CHECK(found == expected);
        }
    }

    TEST_CASE("a rank with another file, or other random weights, is named") {
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        for (const Model& other : {Model::synthetic(three_config(), Format::q8), Model::synthetic(ranks_config(), Format::q8, 2)}) {
            const auto lead = [&](const std::shared_ptr<Communicator>& communicator) {
                Options options;
                options.communicator = communicator;
                CHECK_THROWS_WITH_AS(Session(model, options), doctest::Contains("rank 0 and rank 2,"), Error);
                CHECK_FALSE(communicator->lost_step);
            };
            lead_and_follow(model, 4, lead, [&](int rank) { return rank == 2 ? other : model; });
        }
    }

    TEST_CASE("a rank that gives up ends the wait of the others, and the ranks can be used again") {
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        const std::vector<int> tokens = some_tokens(5, model.config().vocab_size);
        const auto device = std::make_shared<Failing>(1);
        Options options = on_ranks(4);
        options.device = device;
        Session session(model, options), alone(model, on_ranks(1));
        session.feed(tokens);
        device->fails = true;
        CHECK_THROWS_WITH_AS(session.feed(tokens), "no more memory", Error);
        CHECK(session.position() == 5);
        device->fails = false;
        session.feed(tokens);
        alone.feed(tokens), alone.feed(tokens);
        CHECK(equal(row(session.logits()), row(alone.logits())));
    }

    TEST_CASE("after a failure between ranks every session of the communicator says so, and tells the others nothing") {
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        const std::vector<int> tokens = some_tokens(5, model.config().vocab_size);
        const auto device = std::make_shared<Failing>(0);
        const auto lead = [&](const std::shared_ptr<Communicator>& communicator) {
            Options options = with(1, 64, Format::bf16);
            options.communicator = communicator, options.device = device;
            const Counting& counts = static_cast<Counting&>(*communicator);
            int told = 0;
            {
                Session failed(model, options), other(model, options);
                failed.feed(tokens), other.feed(tokens);
                CHECK_FALSE(communicator->lost_step);
                device->fails = true;
                CHECK_THROWS_WITH_AS(failed.feed(tokens), "no more memory", Error);
                CHECK(communicator->lost_step);
                device->fails = false;
                told = counts.broadcasts;
                for (Session* session : {&failed, &other}) {
                    CHECK_THROWS_WITH_AS(session->feed(tokens), doctest::Contains("rank 0: the ranks have lost step"), Error);
                    CHECK(session->position() == 5);
                }
                CHECK_THROWS_WITH_AS(Session(model, options), doctest::Contains("the ranks have lost step"), Error);
            }
            CHECK(counts.broadcasts == told);
            throw Error(Code::device, "the end");  // which frees rank 1 from the sum it waits in
        };
        CHECK_THROWS_WITH_AS(lead_and_follow(model, 2, lead), "the end", Error);
    }

    TEST_CASE("an error before the others are told anything leaves all in step") {
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        const std::vector<int> tokens = some_tokens(5, model.config().vocab_size);
        lead_and_follow(model, 2, [&](const std::shared_ptr<Communicator>& communicator) {
            Options options = with(1, 64, Format::bf16);
            options.communicator = communicator, options.context = 8;
            Session session(model, options), alone(model, on_ranks(1));
            CHECK_THROWS_AS(session.feed(some_tokens(9, model.config().vocab_size)), Error);
            CHECK_FALSE(communicator->lost_step);
            CHECK(equal(row(session.feed(tokens)), row(alone.feed(tokens))));
        });
        // A number of ranks that cannot share the model is refused by rank 0 alone; rank 1 goes home.
        const Model other = Model::synthetic(small_config(), Format::f32);
        const auto refused = [&](const std::shared_ptr<Communicator>& communicator) {
            Options options = with(1, 64, Format::bf16);
            options.communicator = communicator;
            CHECK_THROWS_WITH_AS(Session(other, options), doctest::Contains("(found 2, expected 1)"), Error);
            CHECK_FALSE(communicator->lost_step);
        };
        for (const auto& counts : lead_and_follow(other, 2, refused)) CHECK(counts->broadcasts == 1);
    }

    TEST_CASE("a cancelled step ends on all ranks, and the session goes on from where it was") {
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        const std::vector<int> tokens = some_tokens(400, model.config().vocab_size);
        Session session(model, on_ranks(4, 1, 512)), alone(model, on_ranks(1, 1, 512));
        session.feed(std::span(tokens).first(3));
        std::atomic<bool> started{false};
        std::thread canceller([&] {
            while (!started) std::this_thread::yield();
            session.cancel();
        });
        bool cancelled = false;
        for (int i = 0; i < 1000 && !cancelled; ++i) try {
                started = true;
                session.feed(std::span(tokens).first(300));
                session.rewind(3);
            } catch (const Error& error) {
                cancelled = error.code() == Code::cancelled;
            }
        canceller.join();
        CHECK(cancelled);
        CHECK(session.position() == 3);
        alone.feed(std::span(tokens).first(3));
        session.feed(std::span(tokens).subspan(3, 5)), alone.feed(std::span(tokens).subspan(3, 5));
        CHECK(equal(row(session.logits()), row(alone.logits())));
    }

    TEST_CASE("communication is a part of the time that stages take, on several ranks only") {
        const Model model = Model::synthetic(ranks_config(), Format::q8);
        const std::vector<int> tokens = some_tokens(5, model.config().vocab_size);
        const auto seconds = [&](int ranks) {
            Session session(model, on_ranks(ranks));
            session.feed(tokens);
            return session.stage_times()[static_cast<std::size_t>(Stage::communicate)];
        };
        CHECK(seconds(1) == 0);
        CHECK(seconds(2) > 0);
    }
}

}  // namespace
