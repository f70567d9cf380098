// How well a model predicts a text. The method is that of llama.cpp, so that numbers compare: the text is cut into windows of
// CTX tokens, the first of each is replaced by begin-of-text, and the predictions in the second half are scored. With a second
// model it also says how far the predictions of the two are apart: what quantising a model has cost, for instance.
#include <chrono>

#include "common.hpp"

// Mean and standard error of numbers that arrive one by one.
struct Mean {
    double sum = 0, squares = 0;
    long long count = 0;
    void add(double value) { sum += value, squares += value * value, ++count; }
    double value() const { return sum / static_cast<double>(count); }
    double uncertainty() const {
        const double n = static_cast<double>(count);
        return count > 1 ? std::sqrt(std::max(0.0, squares / n - value() * value()) / (n - 1)) : 0;
    }
};

double log_of_sum(std::span<const float> logits) {
    const double top = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
    double sum = 0;
    for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
    return top + std::log(sum);
}

// Kullback and Leibler's divergence of two rows of logits: Σ p (log p - log q), in nats, p from the base.
double divergence(std::span<const float> base, std::span<const float> other) {
    const double base_sum = log_of_sum(base), other_sum = log_of_sum(other);
    double sum = 0;
    for (std::size_t i = 0; i < base.size(); ++i) {
        const double log_p = static_cast<double>(base[i]) - base_sum, log_q = static_cast<double>(other[i]) - other_sum;
        sum += std::exp(log_p) * (log_p - log_q);
    }
    return sum;
}

auto most_likely(std::span<const float> logits) { return std::max_element(logits.begin(), logits.end()) - logits.begin(); }

// Two models can be compared where the same ids mean the same tokens.
void check_vocabulary(const llama3::Model& base, const llama3::Model& model, const std::string& base_path) {
    const llama3::Tokenizer &a = base.tokenizer(), &b = model.tokenizer();
    bool same = a.vocab_size() == b.vocab_size() && a.rank_count() == b.rank_count() && a.begin_token() == b.begin_token();
    for (int id = 0; same && id < a.vocab_size(); ++id) same = a.bytes(id) == b.bytes(id);
    if (!same)
        fail(llama3::Code::argument, base_path + ": its vocabulary differs from that of -m (found " +
                                         std::to_string(a.vocab_size()) + " tokens, expected the " +
                                         std::to_string(b.vocab_size()) +
                                         " of the other model). Use the same model in another number format.");
}

int main(int argc, char** argv) {
    Args args("-f FILE [flags]", "Prints how well the model predicts a text: mean negative log-likelihood and perplexity.");
    std::optional<std::string> file, base_path;
    bool as_json = false;
    args.add("-f, --file FILE", file, "the text");
    args.add("--kl-base BASE", base_path,
             "a model to compare with (the same one in f32): mean KL(BASE || M), how often the first token is the same", {1});
    args.add("--json", as_json, "print one JSON object");
    ModelFlags flags(args, "512");
    flags.options.context = 512;
    args.parse(argc, argv);
    if (!file) args.wrong("-f", "a text is needed", "none", "-f FILE");
    const int context = flags.options.context;
    if (context < 4) args.wrong("-c", "too short", std::to_string(context), "at least 4");

    return run([&] {
        const llama3::Model model = flags.load();
        std::vector<int> tokens = model.tokenizer().encode(read_file(*file));
        tokens.insert(tokens.begin(), model.tokenizer().begin_token());
        const int windows = static_cast<int>(tokens.size()) / context;
        if (windows == 0)
            fail(llama3::Code::argument, *file + ": too short (found " + std::to_string(tokens.size()) +
                                             " tokens, expected at least " + std::to_string(context) +
                                             "). Use a longer text or a smaller -c.");
        llama3::Session session(model, flags.options);
        std::optional<llama3::Session> base;
        if (base_path) {
            const llama3::Model base_model = llama3::Model::load(*base_path);
            check_vocabulary(base_model, model, *base_path);
            llama3::Options alone = flags.options;
            alone.communicator = nullptr;  // the other processes have M only
            base.emplace(base_model, alone);
        }

        const int first = context / 2;  // the first position whose prediction counts
        constexpr int step = 16;        // rows of the base that are kept at a time: [16, V]
        Mean nll, base_nll, kl, top1;
        std::vector<float> base_rows;
        auto told = std::chrono::steady_clock::now();
        for (int w = 0; w < windows; ++w) {
            const std::span<int> window(tokens.data() + static_cast<std::ptrdiff_t>(w) * context,
                                        static_cast<std::size_t>(context));
            window[0] = model.tokenizer().begin_token();
            const std::span<const int> start = window.first(static_cast<std::size_t>(first));
            session.rewind(0);
            session.feed(start);
            if (base) base->rewind(0), base->feed(start);
            // The last token is only predicted: nothing is asked about what follows it.
            for (int from = first; from + 1 < context; from += step) {
                const std::span<const int> some = window.subspan(static_cast<std::size_t>(from),
                                                                 static_cast<std::size_t>(std::min(step, context - 1 - from)));
                const auto loss = [&](int i, std::span<const float> logits) {
                    return -static_cast<double>(
                        llama3::log_probability(logits, window[static_cast<std::size_t>(from + i + 1)]));
                };
                base_rows.clear();
                if (base)
                    base->feed(some, [&](int i, std::span<const float> logits) {
                        base_nll.add(loss(i, logits));
                        base_rows.insert(base_rows.end(), logits.begin(), logits.end());
                    });
                session.feed(some, [&](int i, std::span<const float> logits) {
                    nll.add(loss(i, logits));
                    if (!base) return;
                    const auto row =
                        std::span<const float>(base_rows).subspan(static_cast<std::size_t>(i) * logits.size(), logits.size());
                    kl.add(divergence(row, logits));
                    top1.add(most_likely(row) == most_likely(logits));
                });
            }
            if (const auto now = std::chrono::steady_clock::now(); now - told > std::chrono::seconds(5)) {
                std::cerr << "window " << w + 1 << " of " << windows << ", perplexity " << std::exp(nll.value()) << '\n';
                told = now;
            }
        }

        const double perplexity = std::exp(nll.value());
        if (as_json) {
            std::vector<std::pair<std::string, std::string>> fields = {
                {"tokens", json(tokens.size())},  {"context", json(context)},
                {"windows", json(windows)},       {"scored", json(nll.count)},
                {"nll", json(nll.value())},       {"nll_uncertainty", json(nll.uncertainty())},
                {"perplexity", json(perplexity)}, {"perplexity_uncertainty", json(perplexity * nll.uncertainty())}};
            if (base)
                fields.insert(fields.end(), {{"base_nll", json(base_nll.value())},
                                             {"base_perplexity", json(std::exp(base_nll.value()))},
                                             {"kl", json(kl.value())},
                                             {"kl_uncertainty", json(kl.uncertainty())},
                                             {"same_top1", json(top1.value())}});
            std::cout << json_object(fields) << '\n';
        } else {
            std::cout << "tokens      " << tokens.size() << " (" << nll.count << " scored in " << windows << " windows of "
                      << context << ")\n"
                      << "mean NLL    " << nll.value() << " +- " << nll.uncertainty() << "\nperplexity  " << perplexity
                      << " +- " << perplexity * nll.uncertainty() << '\n';
            if (base)
                std::cout << "base        perplexity " << std::exp(base_nll.value()) << "\nmean KL     " << kl.value() << " +- "
                          << kl.uncertainty() << " nats\nsame top 1  " << 100 * top1.value() << " %\n";
        }
    });
}
