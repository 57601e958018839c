#include "block.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.hpp"
#include "engine.hpp"

namespace moe {

namespace {

constexpr float kChosen = -1;

Tokens some_of(const Tokens &x, uint32_t first, uint32_t count) {
    Tokens some = x;
    some.num_tokens = static_cast<int>(count);
    if (x.bf16) some.bf16 = x.bf16 + first * x.stride;
    if (x.f32) some.f32 = x.f32 + first * x.stride;
    return some;
}

}  // namespace

void BlockWork::make_room(const Block &b) {
    const size_t hidden = b.q.cols, num_q = b.q.rows, num_k = b.k.rows;
    const size_t most = std::max({hidden, num_q, num_k, size_t(b.router.rows)});
    float *next = static_cast<float *>(
        floats.reserve((2 * hidden + 2 * num_q + 2 * num_k + 2 * b.rotary_dim + most) * 4));
    const auto take = [&](float *&part, size_t count) { part = next, next += count; };
    take(x, hidden), take(normed, hidden);
    take(q, num_q), take(k, num_k), take(v, num_k), take(context, num_q);
    take(cos, b.rotary_dim), take(sin, b.rotary_dim);
    take(spare, most);
    while (queries.size() < b.num_kv_heads) queries.emplace_back();
}

void BlockWork::make_room(const Tail &t) {
    const size_t hidden = t.norm.size;
    x = static_cast<float *>(floats.reserve(2 * hidden * 4));
    spare = x + hidden;
}

void Engine::attend(const Block &b, const Token &token) {
    const auto turn = take_turn();
    BlockWork &w = block_work_;
    w.make_room(b);
    const size_t hidden = b.q.cols;
    kernels_.widen(b.type, token.x, w.x, hidden);
    std::copy(w.x, w.x + hidden, w.normed);
    normalise(b.before, b.type, w.normed, hidden, w);
    const Matrix *first[] = {&b.q, &b.k, &b.v};
    const void *biases[] = {b.q_bias, b.k_bias, b.v_bias};
    float *outs[] = {w.q, w.k, w.v};
    products(first, biases, outs, 3, b.type, w.normed, w);
    if (b.q_norm.weight) normalise(b.q_norm, b.type, w.q, b.q.rows, w);
    if (b.k_norm.weight) normalise(b.k_norm, b.type, w.k, b.k.rows, w);
    kernels_.widen(b.type, token.cos, w.cos, b.rotary_dim);
    kernels_.widen(b.type, token.sin, w.sin, b.rotary_dim);
    rotate(b, w.q, b.num_heads, w);
    rotate(b, w.k, b.num_kv_heads, w);
    look_back(b, token, w);
    const Matrix *last[] = {&b.o};
    float *out[] = {w.normed};
    products(last, &b.o_bias, out, 1, b.type, w.context, w);
    for (size_t i = 0; i < hidden; ++i) w.x[i] += w.normed[i];
    kernels_.round(b.type, w.x, hidden);
    kernels_.narrow(b.type, w.x, token.h, hidden);
    normalise(b.after, b.type, w.x, hidden, w);
    kernels_.narrow(b.type, w.x, token.normed, hidden);
    if (b.top_k) route(b, token, w);
}

// Rounded, with their biases. x has the matrices' columns, in the model's precision.
void Engine::products(const Matrix *const *matrices, const void *const *biases, float *const *outs,
                      size_t count, Type type, const float *x, BlockWork &w) {
    const uint32_t cols = matrices[0]->cols;
    void *narrow = w.narrow.reserve(cols * 4);
    kernels_.narrow(type, x, narrow, cols);
    size_t ready[kTogether];  // which of prepared_ a matrix is given
    rows_.clear();
    uint32_t step = 1;
    for (size_t i = 0; i < count; ++i) {
        step = std::max(step, rows_at_once(matrices[i]->format, false));
        ready[i] = i;
        for (size_t j = 0; j < i && ready[i] == i; ++j)
            if (same_kind(matrices[i]->format, matrices[j]->format)) ready[i] = ready[j];
        if (ready[i] == i) prepare(prepared_[i], matrices[i]->format, type, narrow, 1, cols);
        rows_.push_back(matrices[i]->rows);
    }
    share(rows_, step, [&](size_t i, uint32_t first, uint32_t last) {
        multiply(*matrices[i], prepared_[ready[i]].tokens, first, last, outs[i], matrices[i]->rows);
    });
    for (size_t i = 0; i < count; ++i) {
        const size_t rows = matrices[i]->rows;
        if (biases[i]) {
            kernels_.widen(type, biases[i], w.spare, rows);
            for (size_t r = 0; r < rows; ++r) outs[i][r] += w.spare[r];
        }
        kernels_.round(type, outs[i], rows);
    }
}

void Engine::normalise(const Norm &norm, Type type, float *x, size_t count, BlockWork &w) const {
    kernels_.widen(type, norm.weight, w.spare, norm.size);
    for (size_t start = 0; start < count; start += norm.size) {
        kernels_.normalise(x + start, norm.size, norm.eps);
        kernels_.round(type, x + start, norm.size);
        for (size_t i = 0; i < norm.size; ++i) x[start + i] *= w.spare[i];
    }
    kernels_.round(type, x, count);
}

// Rotary position embedding of every head: (a, b) -> (a cos - b sin, b cos + a sin) over the two
// halves of its first numbers.
void Engine::rotate(const Block &b, float *x, uint32_t num_heads, BlockWork &w) const {
    const uint32_t size = b.rotary_dim, half = size / 2;
    float *turned = w.spare;
    for (uint32_t head = 0; head < num_heads; ++head, x += b.head_dim) {
        for (uint32_t i = 0; i < half; ++i) {
            turned[i] = -x[i + half] * w.sin[i];
            turned[i + half] = x[i] * w.sin[i + half];
        }
        kernels_.round(b.type, turned, size);
        for (uint32_t i = 0; i < size; ++i) x[i] *= w.cos[i];
        kernels_.round(b.type, x, size);
        for (uint32_t i = 0; i < size; ++i) x[i] += turned[i];
        kernels_.round(b.type, x, size);
    }
}

// Writes the token's keys and values; its attention to all of them goes to w.context.
void Engine::look_back(const Block &b, const Token &token, BlockWork &w) {
    const size_t item = size_of(b.type), head_bytes = b.head_dim * item;
    const size_t all_bytes = token.room * head_bytes;
    const uint32_t group = b.num_heads / b.num_kv_heads;
    auto *narrow = static_cast<uint8_t *>(w.narrow.reserve(b.q.rows * 4));
    kernels_.narrow(b.type, w.q, narrow, b.q.rows);
    for (uint32_t g = 0; g < b.num_kv_heads; ++g) {
        const size_t at = g * all_bytes + token.position * head_bytes;
        kernels_.narrow(b.type, w.k + g * b.head_dim, static_cast<uint8_t *>(token.keys) + at, b.head_dim);
        kernels_.narrow(b.type, w.v + g * b.head_dim, static_cast<uint8_t *>(token.values) + at, b.head_dim);
        prepare(w.queries[g], format_of(b.type), b.type, narrow + g * group * head_bytes, group, b.head_dim);
    }
    const auto length = static_cast<uint32_t>(token.position + 1);
    const uint32_t parts = (length + kContextAtOnce - 1) / kContextAtOnce;
    const size_t stride = b.head_dim + 2;  // a query's sum of values, largest score, sum of weights
    auto *partial = static_cast<float *>(
        w.partial.reserve(size_t(b.num_heads) * parts * stride * 4));
    pool_.run(static_cast<int>(b.num_kv_heads * parts), [&](int task) {
        const uint32_t g = task / parts, part = task % parts, start = part * kContextAtOnce;
        const uint32_t count = std::min(kContextAtOnce, length - start);
        const size_t at = g * all_bytes + start * head_bytes;
        const Matrix keys =
            plain_matrix(static_cast<const uint8_t *>(token.keys) + at, count, b.head_dim, b.type);
        const auto *values = static_cast<const uint8_t *>(token.values) + at;
        alignas(64) float scores[kQueriesAtOnce * kContextAtOnce];
        for (uint32_t first = 0; first < group; first += kQueriesAtOnce) {
            const uint32_t num = std::min(kQueriesAtOnce, group - first);
            multiply(keys, some_of(w.queries[g].tokens, first, num), 0, count, scores, kContextAtOnce);
            float *found = partial + (size_t(g * group + first) * parts + part) * stride;
            for (uint32_t i = 0; i < num; ++i) {
                float *own = scores + i * kContextAtOnce, *out = found + i * parts * stride;
                for (uint32_t r = 0; r < count; ++r) own[r] *= b.scaling;
                kernels_.exponentiate(own, count, out + b.head_dim);
            }
            kernels_.mix(b.type, values, count, b.head_dim, scores, kContextAtOnce, num, found,
                         parts * stride);
        }
    });
    for (uint32_t head = 0; head < b.num_heads; ++head)
        unite(partial + head * parts * stride, parts, b.head_dim, w.context + head * b.head_dim);
    kernels_.round(b.type, w.context, b.q.rows);
}

// Softmax over the experts; the likeliest, of equals the first.
void Engine::route(const Block &b, const Token &token, BlockWork &w) {
    const Matrix *matrices[] = {&b.router};
    const void *none = nullptr;
    const uint32_t count = b.router.rows;
    products(matrices, &none, &token.logits, 1, b.type, w.x, w);
    float *chances = w.spare, shape[2], sum = 0;
    std::copy(token.logits, token.logits + count, chances);
    kernels_.exponentiate(chances, count, shape);
    for (uint32_t i = 0; i < count; ++i) chances[i] /= shape[1];
    for (uint32_t k = 0; k < b.top_k; ++k) {
        uint32_t best = count;  // NaN counts as likely: a broken model must not look sound
        for (uint32_t i = 0; i < count; ++i) {
            if (chances[i] == kChosen) continue;
            if (best == count || !(chances[i] <= chances[best])) best = i;
        }
        token.ids[k] = best;
        token.weights[k] = chances[best];
        sum += chances[best];
        chances[best] = kChosen;
    }
    for (uint32_t k = 0; b.normalises && k < b.top_k; ++k) token.weights[k] /= sum;
    if (b.rounds) kernels_.round(b.type, token.weights, b.top_k);
}

void Engine::sum(const Sum &s) {
    const auto turn = take_turn();
    add_up(s, 0, s.size);
}

void Engine::add_up(const Sum &s, uint32_t first, uint32_t last) const {
    constexpr uint32_t kSome = 256;
    float total[kSome];
    const size_t item = size_of(s.type);
    for (uint32_t start = first; start < last; start += kSome) {
        const uint32_t count = std::min(kSome, last - start);
        std::fill(total, total + count, 0.0f);
        for (uint32_t k = 0; k < s.top_k; ++k) {
            const auto *one = static_cast<const uint8_t *>(s.outs) + (size_t(k) * s.size + start) * item;
            kernels_.add_scaled(s.type, one, s.weights[k], s.rounds, total, count);
        }
        kernels_.round(s.type, total, count);
        kernels_.add_scaled(s.type, static_cast<const uint8_t *>(s.h) + start * item, 1, false, total, count);
        kernels_.narrow(s.type, total, static_cast<uint8_t *>(s.out) + start * item, count);
    }
}

void Engine::finish(const Tail &t) {
    const auto turn = take_turn();
    run_tail(t);
}

void Engine::run_tail(const Tail &t) {
    BlockWork &w = block_work_;
    w.make_room(t);
    kernels_.widen(t.type, t.x, w.x, t.norm.size);
    normalise(t.norm, t.type, w.x, t.norm.size, w);
    if (!t.head.rows) {
        kernels_.narrow(t.type, w.x, t.out, t.norm.size);
        return;
    }
    void *narrow = w.narrow.reserve(t.norm.size * 4);
    kernels_.narrow(t.type, w.x, narrow, t.norm.size);
    multiply_all(t.head, narrow, 1, t.type, t.out, t.bias, t.scores);
}

}  // namespace moe
