// The shapes of the released models, for programs that need no weights, or only random ones.
#ifndef LLAMA3_EXAMPLES_RELEASED_HPP
#define LLAMA3_EXAMPLES_RELEASED_HPP

#include "common.hpp"

constexpr const char* released_names = "llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b or llama-3.1-405b";

inline llama3::Config released(const std::string& name) {
    struct Shape {
        const char *name, *size;
        int layers, dim, heads, head_dim, ffn;
        float rope_factor;
        bool tied;
    };
    static const Shape shapes[] = {{"llama-3.2-1b", "1b", 16, 2048, 32, 64, 8192, 32, true},
                                   {"llama-3.2-3b", "3b", 28, 3072, 24, 128, 8192, 32, true},
                                   {"llama-3.1-8b", "8b", 32, 4096, 32, 128, 14336, 8, false},
                                   {"llama-3.1-70b", "70b", 80, 8192, 64, 128, 28672, 8, false},
                                   {"llama-3.1-405b", "405b", 126, 16384, 128, 128, 53248, 8, false}};
    for (const Shape& s : shapes) {
        if (name != s.name && name != s.size) continue;
        llama3::Config config;
        config.n_layers = s.layers, config.dim = s.dim, config.n_heads = s.heads, config.n_kv_heads = 8,
        config.head_dim = s.head_dim;
        config.ffn_dim = s.ffn, config.vocab_size = 128256, config.context_length = 131072;
        config.rope_factor = s.rope_factor, config.rope_low_freq_factor = 1, config.rope_high_freq_factor = 4;
        config.rope_original_context = 8192, config.tied_embedding = s.tied;
        config.attention_out_segments = config.down_segments = llama3::max_segments;
        config.begin_token = 128000, config.end_tokens = {128001, 128008, 128009};
        return config;
    }
    fail(llama3::Code::argument,
         "--synthetic: no such model (found " + json_text(name) + ", expected " + released_names + "). Use one of these.");
}

#endif
