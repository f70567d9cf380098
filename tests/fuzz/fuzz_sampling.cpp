// Fuzzes the sampler and log_probability: any options, any bits as logits, any history.
//
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz/fuzz_sampling.cpp -o fuzz_sampling
//     ./fuzz_sampling tests/fuzz/corpus/sampling
//
// Either an Error, or a token that may be drawn: a number, not less than -inf unless all are, the largest at
// temperature 0; and the same one again from the same seed.
#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"

namespace {

using namespace llama3;

#define EXPECT(condition)                                                                     \
    do {                                                                                      \
        if (!(condition)) std::fprintf(stderr, "not so: %s\n", #condition), __builtin_trap(); \
    } while (false)

struct Input {
    const std::uint8_t* data;
    std::size_t size;
    std::uint64_t take(std::size_t bytes) {  // zeros after the end
        std::uint64_t value = 0;
        for (std::size_t i = 0; i < bytes && size > 0; ++i, ++data, --size) value |= std::uint64_t{*data} << (8 * i);
        return value;
    }
    // A usual value, a border, or any bits.
    float real(float usual) {
        constexpr float borders[] = {0,        -0.0f,  1,       -1,     1e-45f,    1e-38f,           3.4e38f,
                                     -3.4e38f, 88.72f, -87.33f, 1e-30f, 0.999999f, __builtin_inff(), -__builtin_inff()};
        const std::uint64_t how = take(1);
        if (how < 100) return usual;
        if (how < 170) return borders[how % std::size(borders)];
        if (how < 220) return static_cast<float>(take(1)) / 16 - 8;
        return std::bit_cast<float>(static_cast<std::uint32_t>(take(4)));
    }
};

int drawn(const Sampling& sampling, std::span<const float> logits, std::span<const int> history, int times) {
    Sampler sampler(sampling);
    int token = -1;
    for (int i = 0; i < times; ++i) {
        token = sampler.sample(logits, history);
        EXPECT(token >= 0 && static_cast<std::size_t>(token) < logits.size());
    }
    return token;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input{data, size};
    Sampling s;
    s.temperature = input.real(0.7f), s.top_p = input.real(0.9f), s.min_p = input.real(0), s.repeat_penalty = input.real(1);
    s.top_k =
        input.take(1) < 200 ? static_cast<int>(input.take(1)) : static_cast<int>(static_cast<std::uint32_t>(input.take(4)));
    s.repeat_last = input.take(1) < 200 ? 64 : static_cast<int>(static_cast<std::uint32_t>(input.take(4)));
    s.seed = input.take(2);
    std::vector<int> history;
    for (std::uint64_t n = input.take(1) % 8; n > 0; --n)
        history.push_back(input.take(1) < 230 ? static_cast<int>(input.take(1) % 16)
                                              : static_cast<int>(static_cast<std::uint32_t>(input.take(4))));
    const std::uint64_t layout = input.take(1);  // how many of the logits are of one value
    std::vector<float> logits(layout >= 240 ? 1000 : 0, input.real(1));
    while (input.size > 0) logits.push_back(input.real(static_cast<float>(logits.size() % 7)));

    const auto number = [](float x) { return x == x; };
    const bool any_number = std::any_of(logits.begin(), logits.end(), number);
    try {
        const int token = drawn(s, logits, history, 2);
        EXPECT(any_number);
        const float logit = logits[static_cast<std::size_t>(token)];
        float best = -std::numeric_limits<float>::infinity();
        for (const float x : logits) best = x > best ? x : best;
        EXPECT(number(logit));
        const bool penalised = s.repeat_penalty != 1 && !history.empty();  // may turn numbers into infinities
        if (!penalised) {
            EXPECT(logit > -std::numeric_limits<float>::infinity() || logit == best);
            if (s.temperature == 0 || std::isinf(best)) EXPECT(logit == best);
        }
        EXPECT(drawn(s, logits, history, 2) == token);
        EXPECT(log_probability(logits, token) <= 0);
    } catch (const Error&) {
    }
    for (std::size_t i = 0; i < logits.size() && i < 8; ++i) {
        try {
            const float p = log_probability(logits, static_cast<int>(i));
            EXPECT(p <= 0 && (number(logits[i]) || std::isinf(p)));
        } catch (const Error&) {
            EXPECT(!any_number);
        }
    }
    return 0;
}
