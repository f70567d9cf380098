// How well a model predicts a text. The method is that of llama.cpp, so that numbers compare: the text is cut into windows of
// CTX tokens, the first of each is replaced by begin-of-text, and the predictions in the second half are scored.
#include <chrono>

#include "common.hpp"

int main(int argc, char** argv) {
    Args args("-f FILE [flags]", "Prints how well the model predicts a text: mean negative log-likelihood and perplexity.");
    std::optional<std::string> file;
    bool as_json = false;
    args.add("-f, --file FILE", file, "the text");
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

        const int first = context / 2;  // the first position whose prediction counts
        double sum = 0, squares = 0;
        long long scored = 0;
        auto told = std::chrono::steady_clock::now();
        for (int w = 0; w < windows; ++w) {
            const std::span<int> window(tokens.data() + static_cast<std::ptrdiff_t>(w) * context,
                                        static_cast<std::size_t>(context));
            window[0] = model.tokenizer().begin_token();
            session.rewind(0);
            session.feed(window.first(static_cast<std::size_t>(first)));
            // The last token is only predicted: nothing is asked about what follows it.
            const std::span<const int> rest =
                window.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(context - first - 1));
            session.feed(rest, [&](int i, std::span<const float> logits) {
                const double nll =
                    -static_cast<double>(llama3::log_probability(logits, window[static_cast<std::size_t>(first + i + 1)]));
                sum += nll, squares += nll * nll, ++scored;
            });
            if (const auto now = std::chrono::steady_clock::now(); now - told > std::chrono::seconds(5)) {
                std::cerr << "window " << w + 1 << " of " << windows << ", perplexity "
                          << std::exp(sum / static_cast<double>(scored)) << '\n';
                told = now;
            }
        }

        const double n = static_cast<double>(scored), mean = sum / n, perplexity = std::exp(mean);
        const double uncertainty =
            scored > 1 ? std::sqrt(std::max(0.0, squares / n - mean * mean) / (n - 1)) : 0;  // of the mean
        if (as_json)
            std::cout << json_object({{"tokens", json(tokens.size())},
                                      {"context", json(context)},
                                      {"windows", json(windows)},
                                      {"scored", json(scored)},
                                      {"nll", json(mean)},
                                      {"nll_uncertainty", json(uncertainty)},
                                      {"perplexity", json(perplexity)},
                                      {"perplexity_uncertainty", json(perplexity * uncertainty)}})
                      << '\n';
        else
            std::cout << "tokens      " << tokens.size() << " (" << scored << " scored in " << windows << " windows of "
                      << context << ")\n"
                      << "mean NLL    " << mean << " +- " << uncertainty << "\nperplexity  " << perplexity << " +- "
                      << perplexity * uncertainty << '\n';
    });
}
