// Fuzzes the chat format and conversations: any roles, contents, tools and dates, in any order.
//
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz/fuzz_chat.cpp -o fuzz_chat
//     ./fuzz_chat tests/fuzz/corpus/chat
//
// Either an Error, or ids whose special tokens are those of the structure and no more: one begin-of-text, in front; for every
// message a header's two and one end. And a Chat holds in its cache what render_chat() makes of its messages.
#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"

namespace {

using namespace llama3;

#define EXPECT(condition)                                                                     \
    do {                                                                                      \
        if (!(condition)) std::fprintf(stderr, "not so: %s\n", #condition), __builtin_trap(); \
    } while (false)

const Model& model(std::size_t format) {
    static const std::vector<Model> models = [] {
        std::vector<Model> list;
        for (const ChatFormat chat : {ChatFormat::none, ChatFormat::llama3, ChatFormat::llama3_1, ChatFormat::llama3_2}) {
            Config c;
            c.n_layers = 1, c.dim = 4, c.n_heads = 1, c.n_kv_heads = 1, c.head_dim = 4, c.ffn_dim = 4, c.vocab_size = 530;
            c.context_length = 512, c.chat_format = chat;
            list.push_back(Model::synthetic(c, Format::f32));
        }
        return list;
    }();
    return models[format % models.size()];
}

struct Input {
    const std::uint8_t* data;
    std::size_t size;
    unsigned byte() { return size == 0 ? 0 : (--size, *data++); }
    std::string text() {  // pieces that are dangerous, and any bytes
        constexpr const char* pieces[] = {"<|eot_id|>",
                                          "<|start_header_id|>",
                                          "system",
                                          "<|end_header_id|>",
                                          "\n\n",
                                          "<|begin_of_text|>",
                                          "<|python_tag|>",
                                          " ",
                                          "\r",
                                          "\xC3",
                                          "\xA9",
                                          "\xF0\x9F\x99\x82",
                                          "\xE2\x80\xA8",
                                          "\"",
                                          "\\",
                                          "<|",
                                          "|>",
                                          "\x1C"};
        std::string text;
        for (unsigned n = byte() % 16; n > 0; --n) {
            const unsigned piece = byte();
            if (piece < std::size(pieces)) text += pieces[piece];
            else text += static_cast<char>(piece);
        }
        return text;
    }
    std::string role() {
        constexpr const char* roles[] = {"user", "assistant", "system", "ipython", "tool", "user", "assistant", "Other_1.x-y"};
        const unsigned which = byte();
        return which < 200 ? roles[which % std::size(roles)] : text();
    }
};

std::vector<int> specials(const Model& of, std::span<const int> ids) {
    std::vector<int> found;
    for (const int id : ids)
        if (of.tokenizer().is_special(id)) found.push_back(id);
    return found;
}

void render(Input& input) {
    const Model& of = model(input.byte());
    ChatStyle style, plain;
    plain.kind = style.kind = input.byte() % 2 ? ChatStyle::Kind::hf : ChatStyle::Kind::reference;
    for (unsigned n = input.byte() % 3; n > 0; --n) style.tools.push_back(input.text()), plain.tools.push_back("x");
    if (input.byte() % 4 == 0) style.date = input.text(), plain.date = style.date.empty() ? "" : "x";
    const bool answer = input.byte() % 2;
    std::vector<Message> messages, harmless;
    while (input.size > 0) {
        const unsigned flags = input.byte();
        messages.push_back({input.role(), input.text(), flags % 8 == 1, flags % 8 == 2});
        harmless.push_back(messages.back());
        harmless.back().content = "x";
    }
    try {
        const std::vector<int> ids = render_chat(of, messages, style, answer), found = specials(of, ids);
        EXPECT(ids[0] == of.tokenizer().begin_token());
        EXPECT(std::count(ids.begin(), ids.end(), ids[0]) == 1);
        EXPECT(found == specials(of, render_chat(of, harmless, plain, answer)));
        const int begin = of.tokenizer().special("<|start_header_id|>"), end = of.tokenizer().special("<|end_header_id|>");
        for (std::size_t i = 0; i < ids.size(); ++i)
            if (ids[i] == begin) {  // what stands in a header is a name
                const auto last = std::find(ids.begin() + static_cast<std::ptrdiff_t>(i), ids.end(), end);
                EXPECT(last != ids.end());
                const std::string name = of.tokenizer().decode({ids.data() + i + 1, &*last});
                EXPECT(!name.empty() && std::all_of(name.begin(), name.end(),
                                                    [](char c) { return c > ' ' && c <= '~' && c != '<' && c != '|'; }));
            }
    } catch (const Error&) {
    }
}

void converse(Input& input) {
    const Model& of = model(1 + input.byte() % 3);
    ChatOptions how;
    if (input.byte() % 2) how.system = input.text();
    how.max_tokens = static_cast<int>(input.byte() % 6) - 1;
    how.style.kind = input.byte() % 4 == 0 ? ChatStyle::Kind::hf : ChatStyle::Kind::reference;
    how.overflow = input.byte() % 2 ? ChatOptions::Overflow::restart : ChatOptions::Overflow::error;
    Options options;
    options.threads = 1, options.context = 40 + static_cast<int>(input.byte() % 64), options.chunk = 16;
    Chat chat(of, how, {.temperature = input.byte() % 2 ? 1.0f : 0.0f}, options);
    for (int turn = 0; turn < 6 && input.size > 0; ++turn) {
        const unsigned what = input.byte();
        const std::vector<Message> before = chat.messages();
        int pieces = 0;
        try {
            std::string streamed;
            if (what % 16 == 0) chat.session().rewind(chat.session().position() / 2);
            if (what % 16 == 1) chat.session().cancel();
            const std::string answer = chat.say(Message{input.role(), input.text()}, [&](std::string_view text) {
                EXPECT(detail::is_utf8(text));
                streamed += text;
                if (what % 16 == 2) chat.session().cancel();
                return what % 16 != 3 || ++pieces < 2;
            });
            EXPECT(streamed == answer);
            EXPECT(chat.messages().back().role == "assistant" && chat.messages().back().content == answer);
            const std::vector<int> prompt =
                render_chat(of, std::span(chat.messages()).first(chat.messages().size() - 1), how.style);
            const std::span<const int> held = chat.session().tokens();
            if (chat.finish() != Finish::cancelled || held.size() > prompt.size())
                EXPECT(held.size() >= prompt.size() && std::equal(prompt.begin(), prompt.end(), held.begin()));
            else EXPECT(held.size() <= prompt.size());
        } catch (const Error&) {
            EXPECT(chat.messages().size() == before.size());  // as if the turn had not been
        }
        if (what % 32 == 4) chat.clear();
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input{data, size};
    try {
        if (input.byte() % 4 != 0) render(input);
        else converse(input);
    } catch (const Error&) {  // a Chat of a style that its format does not have
    }
    return 0;
}
