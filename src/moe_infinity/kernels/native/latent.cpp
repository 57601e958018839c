// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) of one token, in its absorbed form: a
// query meets latents as they are stored, and a head's values are made of their weighted sum alone.
#include <cstring>

#include "attention.hpp"
#include "engine.hpp"

namespace moe {

void Engine::attend_latents(const Latent &l) {
    const auto turn = take_turn();
    LatentWork &w = latent_work_;
    const size_t item = size_of(l.type), query_size = l.num_plain + l.num_rotary;
    const size_t head_bytes = size_t(l.num_plain + l.num_values) * l.rank * item;
    const auto *weight = static_cast<const uint8_t *>(l.weight);
    const auto heads = static_cast<int>(l.num_heads);
    const uint32_t chunks = (l.num_heads + kQueriesAtOnce - 1) / kQueriesAtOnce;
    const uint32_t parts = (l.length + kContextAtOnce - 1) / kContextAtOnce;
    while (w.plain.size() < chunks) w.plain.emplace_back(), w.rotary.emplace_back();
    while (w.context.size() < l.num_heads) w.context.emplace_back();

    // Queries through the keys' half of the weight, and their other part, each head's one by one.
    auto *queries = static_cast<float *>(
        w.floats.reserve(l.num_heads * (query_size + l.rank + l.num_values) * 4));
    float *absorbed = queries + l.num_heads * query_size;
    float *values = absorbed + size_t(l.num_heads) * l.rank;
    auto *narrow = static_cast<uint8_t *>(
        w.narrow.reserve(l.num_heads * (l.rank + size_t(l.num_rotary)) * item));
    uint8_t *rotary = narrow + size_t(l.num_heads) * l.rank * item;
    kernels_.widen(l.type, l.queries, queries, l.num_heads * query_size);
    pool_.run(heads, [&](int h) {
        float *own = absorbed + size_t(h) * l.rank;
        kernels_.mix(l.type, weight + h * head_bytes, l.num_plain, l.rank, queries + h * query_size, 0,
                     1, own, 0);
        kernels_.narrow(l.type, own, narrow + size_t(h) * l.rank * item, l.rank);
        const auto *turned = static_cast<const uint8_t *>(l.queries) + (h * query_size + l.num_plain) * item;
        std::memcpy(rotary + size_t(h) * l.num_rotary * item, turned, l.num_rotary * item);
    });
    for (uint32_t c = 0; c < chunks; ++c) {
        const size_t first = size_t(c) * kQueriesAtOnce;
        const auto num = static_cast<uint32_t>(std::min<size_t>(kQueriesAtOnce, l.num_heads - first));
        prepare(w.plain[c], format_of(l.type), l.type, narrow + first * l.rank * item, num, l.rank);
        prepare(w.rotary[c], format_of(l.type), l.type, rotary + first * l.num_rotary * item, num,
                l.num_rotary);
    }
    auto *partial = static_cast<float *>(
        w.partial.reserve(size_t(l.num_heads) * parts * (l.rank + 2) * 4));
    pool_.run(static_cast<int>(parts), [&](int part) {
        look_back(l, static_cast<uint32_t>(part), parts, w);
    });
    pool_.run(heads, [&](int h) {
        float *own = absorbed + size_t(h) * l.rank, *found = values + size_t(h) * l.num_values;
        uint8_t *rounded = narrow + size_t(h) * l.rank * item;
        unite(partial + size_t(h) * parts * (l.rank + 2), parts, l.rank, own);
        kernels_.narrow(l.type, own, rounded, l.rank);
        prepare(w.context[h], format_of(l.type), l.type, rounded, 1, l.rank);
        const uint8_t *half = weight + h * head_bytes + size_t(l.num_plain) * l.rank * item;
        const Matrix m = plain_matrix(half, l.num_values, l.rank, l.type);
        multiply(m, w.context[h].tokens, 0, l.num_values, found, l.num_values);
        kernels_.narrow(l.type, found, static_cast<uint8_t *>(l.out) + size_t(h) * l.num_values * item,
                        l.num_values);
    });
}

// Some earlier tokens: of every head the weighted sum of their latents, relative to its own largest
// score.
void Engine::look_back(const Latent &l, uint32_t part, uint32_t parts, LatentWork &w) const {
    const size_t item = size_of(l.type), start = size_t(part) * kContextAtOnce, stride = l.rank + 2;
    const auto count = static_cast<uint32_t>(std::min<size_t>(kContextAtOnce, l.length - start));
    const auto *rows = static_cast<const uint8_t *>(l.latents) + start * l.rank * item;
    const auto *turned = static_cast<const uint8_t *>(l.rotary) + start * l.num_rotary * item;
    const Matrix latents = plain_matrix(rows, count, l.rank, l.type);
    const Matrix rotary = plain_matrix(turned, count, l.num_rotary, l.type);
    auto *partial = static_cast<float *>(w.partial.reserve(0));
    alignas(64) float scores[kQueriesAtOnce * kContextAtOnce], more[kQueriesAtOnce * kContextAtOnce];
    for (uint32_t first = 0; first < l.num_heads; first += kQueriesAtOnce) {
        const uint32_t num = std::min(kQueriesAtOnce, l.num_heads - first), c = first / kQueriesAtOnce;
        multiply(latents, w.plain[c].tokens, 0, count, scores, kContextAtOnce);
        multiply(rotary, w.rotary[c].tokens, 0, count, more, kContextAtOnce);
        float *found = partial + (size_t(first) * parts + part) * stride;
        for (uint32_t i = 0; i < num; ++i) {
            float *own = scores + i * kContextAtOnce, *out = found + i * parts * stride;
            for (uint32_t r = 0; r < count; ++r)
                own[r] = (own[r] + more[i * kContextAtOnce + r]) * l.scaling;
            kernels_.exponentiate(own, count, out + l.rank);
        }
        kernels_.mix(l.type, rows, count, l.rank, scores, kContextAtOnce, num, found, parts * stride);
    }
}

}  // namespace moe
