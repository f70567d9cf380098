// Lines from standard input: edited, with a history, on a terminal where the build found libedit; plainly everywhere else.
#ifndef LLAMA3_EXAMPLES_READ_LINE_HPP
#define LLAMA3_EXAMPLES_READ_LINE_HPP

#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <string>
#ifdef _WIN32
#include <io.h>
#else
#include <unistd.h>
#endif
#ifdef LLAMA3_LIBEDIT
#include <histedit.h>
#endif

inline bool on_terminal() {
#ifdef _WIN32
    return _isatty(_fileno(stdin)) != 0;
#else
    return isatty(STDIN_FILENO) != 0;
#endif
}

// Ctrl-C calls handler and interrupts a read that waits for input.
inline void on_interrupt(void (*handler)(int)) {
#ifdef _WIN32
    std::signal(SIGINT, handler);
#else
    struct sigaction action = {};
    action.sa_handler = handler;  // without SA_RESTART: the read returns
    sigaction(SIGINT, &action, nullptr);
#endif
}

enum class Read { line, end, interrupted };

// On a terminal the prompt and the editing go to standard error, so that standard output has nothing but answers.
class LineReader {
public:
#ifdef LLAMA3_LIBEDIT
    LineReader() {
        if (!on_terminal()) return;
        std::setlocale(LC_CTYPE, "");
        if (MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");
        editor_ = el_init("llama3", stdin, stderr, stderr);
        history_ = history_init();
        HistEvent event;
        history(history_, &event, H_SETSIZE, 1000);
        el_set(
            editor_, EL_PROMPT, +[](EditLine*) { return const_cast<char*>("> "); });
        el_set(editor_, EL_EDITOR, "emacs");
        el_set(editor_, EL_HIST, history, history_);
        el_source(editor_, nullptr);  // the user's ~/.editrc
    }
    ~LineReader() {
        if (editor_ == nullptr) return;
        history_end(history_);
        el_end(editor_);
    }
    Read read(std::string& line) {
        if (editor_ == nullptr) return read_plain(line);
        int bytes = 0;
        const char* text = el_gets(editor_, &bytes);
        if (text == nullptr) return bytes < 0 && errno == EINTR ? Read::interrupted : Read::end;
        line.assign(text, static_cast<std::size_t>(bytes));
        HistEvent event;
        if (line.size() > 1) history(history_, &event, H_ENTER, text);
        if (line.back() == '\n') line.pop_back();
        return Read::line;
    }
#else
    LineReader() = default;
    Read read(std::string& line) {
        if (on_terminal()) std::cerr << "> " << std::flush;
        return read_plain(line);
    }
#endif
    LineReader(const LineReader&) = delete;
    LineReader& operator=(const LineReader&) = delete;

private:
    static Read read_plain(std::string& line) {
        errno = 0;
        if (std::getline(std::cin, line)) return Read::line;
        if (errno != EINTR || std::feof(stdin)) return Read::end;
        std::cin.clear(), std::clearerr(stdin);
        return Read::interrupted;
    }

#ifdef LLAMA3_LIBEDIT
    EditLine* editor_ = nullptr;
    History* history_ = nullptr;
#endif
};

#endif
