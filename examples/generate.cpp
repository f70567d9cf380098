// Completes a text: tokens in, tokens out, and the logits of every one of them for whoever wants to compare.
#include <cstdio>

#include "common.hpp"

// A float32 array [rows, V] in NumPy's format, written row by row; the header gets the number of rows at the end. The file has
// its name only once it is complete.
class LogitsFile {
public:
    LogitsFile(const std::string& path, int columns) : path_(path), columns_(columns), file_(part(), std::ios::binary) {
        header();
    }
    ~LogitsFile() {
        if (!path_.empty()) file_.close(), std::remove(part().c_str());
    }
    void write(std::span<const float> row) {
        file_.write(reinterpret_cast<const char*>(row.data()), static_cast<std::streamsize>(row.size_bytes()));
        ++rows_;
        check(file_.good());
    }
    void finish() {
        file_.seekp(0);
        header();
        file_.close();
        check(file_.good() && std::rename(part().c_str(), path_.c_str()) == 0);
        path_.clear();
    }

private:
    void header() {
        std::string text = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows_) + ", " +
                           std::to_string(columns_) + "), }";
        text.resize(117, ' ');
        file_ << std::string_view("\x93NUMPY\x01\x00\x76\x00", 10) << text << '\n';  // version 1.0, then 118 bytes
        check(file_.good());
    }
    void check(bool good) const {
        if (!good)
            fail(llama3::Code::file,
                 path_ + ": cannot be written (found an error, expected room for the logits). Check the path and the disk.");
    }
    std::string part() const { return path_ + ".part"; }

    std::string path_;
    int columns_, rows_ = 0;
    std::ofstream file_;
};

const char* finish_name(llama3::Finish finish) {
    switch (finish) {
        case llama3::Finish::end_token: return "end_token";
        case llama3::Finish::length: return "length";
        case llama3::Finish::context: return "context";
        case llama3::Finish::cancelled: return "cancelled";
        default: return "stopped";
    }
}

int main(int argc, char** argv) {
    Args args("(-p TEXT | -f FILE | --tokens 1,2,3) [flags]",
              "Completes a text. The text is tokenized with begin-of-text in front; --tokens are taken as they are.");
    std::optional<std::string> text, file;
    std::optional<std::vector<int>> tokens;
    llama3::Sampling sampling;
    llama3::GenerateOptions generation;
    std::string logits_path;
    bool ids = false, as_json = false;
    args.add("-p, --prompt TEXT", text, "the text");
    args.add("-f, --file FILE", file, "a file with the text", {1});
    args.add("--tokens IDS", tokens, "token ids, separated by commas", {0});
    args.add("-n, --predict N", generation.max_tokens, "at most N tokens, -1: until the context is full (-1)", {-1});
    args.add("--ignore-eos", generation.ignore_end, "go on after end tokens");
    args.add("--ids", ids, "print token ids, separated by spaces, instead of text");
    args.add("--logits FILE.npy", logits_path,
             "write the logits after every token of the prompt and of the answer, float32 [tokens, V]", {1});
    args.add("--json", as_json, "print one JSON object: prompt and tokens (ids), text, logprobs, finish");
    ModelFlags flags(args);
    add_sampling_flags(args, sampling);
    args.parse(argc, argv);
    if (const int given = text.has_value() + file.has_value() + tokens.has_value(); given != 1)
        args.wrong("prompt", "exactly one is needed", std::to_string(given) + " of them", "-p TEXT, -f FILE or --tokens IDS");

    if (ids && as_json) args.wrong("--ids", "the JSON object holds the ids", "--ids and --json", "one of them");

    return run([&] {
        const llama3::Model model = flags.load();
        std::vector<int> prompt;
        if (tokens) {
            prompt = *tokens;
        } else {
            prompt = model.tokenizer().encode(file ? read_file(*file) : *text);
            prompt.insert(prompt.begin(), model.tokenizer().begin_token());
        }
        llama3::Session session(model, flags.options);
        llama3::Sampler sampler(sampling);

        // With --logits the prompt is fed here, row by row; generate() then starts from the session's logits. Every generated
        // token needs a row of its own, so the one that would be drawn beyond a full context is not.
        std::optional<LogitsFile> logits;
        bool clipped = false;
        std::span<const int> to_feed = prompt;
        if (!logits_path.empty()) {
            logits.emplace(logits_path, model.config().vocab_size);
            session.feed(prompt, [&](int, std::span<const float> row) { logits->write(row); });
            to_feed = {};
            const int room = session.context() - session.position();
            clipped = generation.max_tokens < 0 || generation.max_tokens > room;
            if (clipped) generation.max_tokens = room;
        }

        generation.logits = logits || as_json;  // else a GPU keeps them to itself

        std::vector<int> drawn;
        std::vector<float> logprobs;
        std::string answer;
        llama3::Finish finish = llama3::generate(session, to_feed, sampler, generation, [&](const llama3::Generated& next) {
            if (logits && !drawn.empty()) logits->write(next.logits);  // the row after the token before
            if (as_json) logprobs.push_back(llama3::log_probability(next.logits, next.token)), answer += next.text;
            else if (ids) std::cout << (drawn.empty() ? "" : " ") << next.token << std::flush;
            else std::cout << next.text << std::flush;
            drawn.push_back(next.token);
            return static_cast<bool>(std::cout);
        });
        if (logits && finish != llama3::Finish::stopped) {  // stopped: nobody reads the result, which run() will say
            if (!drawn.empty()) logits->write(session.logits());
            logits->finish();
        }
        if (clipped && finish == llama3::Finish::length) finish = llama3::Finish::context;
        if (as_json)
            std::cout << json_object({{"prompt", json_list(prompt)},
                                      {"tokens", json_list(drawn)},
                                      {"text", json_text(answer)},
                                      {"logprobs", json_list(logprobs)},
                                      {"finish", json_text(finish_name(finish))}});
        std::cout << '\n';
        if (finish == llama3::Finish::context)
            std::cerr << "note: the context is full at " << session.context() << " tokens; -c makes it longer.\n";
    });
}
