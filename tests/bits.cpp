// Prints a hash of the logits of synthetic models for every format: builds by different compilers and flags must print the same.
#include <cstdio>
#include <cstring>

#include "llama3.hpp"

int main() {
    using namespace llama3;
    Config config;
    config.n_layers = 2, config.dim = 136, config.n_heads = 8, config.n_kv_heads = 2, config.head_dim = 64, config.ffn_dim = 512;
    config.vocab_size = 530, config.context_length = 2048;
    config.rope_factor = 8, config.rope_low_freq_factor = 1, config.rope_high_freq_factor = 4, config.rope_original_context = 256;
    std::vector<int> tokens;
    for (int i = 0; i < 40; ++i) tokens.push_back((i * 37 + 11) % config.vocab_size);
    for (Format format : {Format::f32, Format::bf16, Format::q8, Format::q4})
        for (Format kv : {Format::bf16, Format::q8}) {
            Options options;
            options.context = 64, options.kv = kv;
            if (format == Format::bf16) options.isa = "baseline";  // the one format whose bits an instruction set may change
            Session session(Model::synthetic(config, format), options);
            std::uint64_t hash = 14695981039346656037u;
            const auto add = [&](float value) {
                std::uint32_t bits;
                std::memcpy(&bits, &value, 4);
                hash = (hash ^ bits) * 1099511628211u;
            };
            session.feed(tokens, [&](int, std::span<const float> logits) {
                for (float value : logits) add(value);
            });
            Sampler sampler({.temperature = 0.8f, .top_p = 0.95f, .seed = 7});
            std::string drawn;
            for (int i = 0; i < 8; ++i) {
                const int token = sampler.sample(session.logits());
                drawn += " " + std::to_string(token);
                session.feed(std::span(&token, 1));
            }
            std::printf("%s %s %016llx%s\n", format_name(format), format_name(kv), static_cast<unsigned long long>(hash), drawn.c_str());
        }
}
