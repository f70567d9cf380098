// A conversation: the cache is kept between turns, the answer is streamed, Ctrl-C stops the answer and not the program.
#include <atomic>

#include "common.hpp"
#include "read_line.hpp"

std::atomic<llama3::Session*> answering = nullptr;  // what Ctrl-C cancels

int main(int argc, char** argv) {
    Args args("[flags]",
              "Chats with a model. Reads turns from the terminal or a pipe, one per line. A line that ends with \\ goes on in the\n"
              "next; empty lines are skipped.");
    llama3::ChatOptions options;
    llama3::Sampling sampling;
    std::optional<std::string> first;
    std::string style = "reference", overflow = "restart";
    args.add("-sys, --system-prompt TEXT", options.system, "system message (none)");
    args.add("-p, --prompt TEXT", first, "the first turn");
    args.add("-n, --predict N", options.max_tokens, "at most N tokens per answer, -1: until the context is full (-1)", {-1});
    args.add("--overflow WAY", overflow,
             "when the context is full: restart (keep the system message and the latest turns) or error (restart)");
    args.add("--chat-style STYLE", style,
             "rendering of the chat: reference (Meta's code) or hf (the templates on Hugging Face) (reference)");
    args.add("--date D", options.style.date, "hf: the date in the system message (26 Jul 2024)");
    ModelFlags flags(args);
    add_sampling_flags(args, sampling);
    args.parse(argc, argv);
    if (style == "hf") options.style.kind = llama3::ChatStyle::Kind::hf;
    else if (style != "reference") args.wrong("--chat-style", "no such style", json_text(style), "reference or hf");
    if (overflow == "error") options.overflow = llama3::ChatOptions::Overflow::error;
    else if (overflow != "restart") args.wrong("--overflow", "no such way", json_text(overflow), "restart or error");

    return run([&] {
        const llama3::Model model = flags.load();
        llama3::Chat chat(model, options, sampling, flags.options);
        LineReader input;
        const bool terminal = on_terminal();
        if (terminal) {
            std::cerr << model.describe() << "\n/clear begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer.\n\n";
            on_interrupt([](int) {
                if (llama3::Session* session = answering.load()) session->cancel();
            });
        }

        std::string begun;  // of a turn, by lines that end with a backslash
        for (bool interrupted = false;;) {
            std::string line;
            if (first) {
                line = std::exchange(first, std::nullopt).value();
            } else if (const Read read = input.read(line); read == Read::interrupted && !interrupted) {
                interrupted = true;
                begun.clear();
                std::cerr << "\nCtrl-C again or Ctrl-D ends.\n";
                continue;
            } else if (read != Read::line) {
                if (begun.empty()) break;
            } else if (line.ends_with('\\')) {
                line.back() = '\n';
                begun += line;
                continue;
            }
            interrupted = false;
            line.insert(0, std::exchange(begun, {}));
            if (line.empty()) continue;
            if (terminal && line == "/quit") break;
            if (terminal && line == "/clear") {
                chat.clear();
                std::cerr << "A new conversation.\n";
                continue;
            }

            const int restarts = chat.restarts();
            chat.session().reset_cancel();  // a Ctrl-C that came too late for the answer before
            answering = &chat.session();
            try {
                chat.say(line, [](std::string_view text) { return static_cast<bool>(std::cout << text << std::flush); });
            } catch (
                const llama3::Error& error) {  // a turn that does not fit, for instance: the conversation is as it was before
                answering = nullptr;
                if (!terminal || error.code() == llama3::Code::device) throw;
                std::cerr << error.what() << '\n';
                continue;
            }
            answering = nullptr;
            std::cout << std::endl;
            if (!std::cout) break;
            if (chat.restarts() > restarts) std::cerr << "note: the context was full: the oldest turns were forgotten.\n";
            if (chat.finish() == llama3::Finish::cancelled) std::cerr << "note: the answer was stopped.\n";
            if (chat.finish() == llama3::Finish::context)
                std::cerr << "note: the answer was cut: the context is full. -c makes it longer.\n";
            if (chat.finish() == llama3::Finish::length)
                std::cerr << "note: the answer was cut at -n " << options.max_tokens << ".\n";
        }
    });
}
