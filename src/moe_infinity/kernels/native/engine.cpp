#include "engine.hpp"

#include <algorithm>
#include <cstring>
#include <new>

#include "parts.hpp"

namespace moe {

namespace {

// Of a tile, of a panel, and of a register of words for eight rows each.
constexpr uint32_t kRowsAtOnce = 4, kManyRowsAtOnce = 32, kAwqRowsAtOnce = 128;
// A piece is this part of what is left for each thread, and no smaller than that of all.
constexpr uint32_t kShareOfLeft = 2, kShareOfAll = 16;

// Whether some tokens are multiplied as int8 by what this format codes.
bool takes_int8(const Kernels &kernels, Format format, bool is_many) {
    if (is_many)
        return is_grouped(format) && kernels.grouped_many &&
               (format != Format::q8_0 || kernels.has_q8_many);
    return is_grouped(format) || (is_super(format) && kernels.super);
}

bool is_bf16(Format format) { return format == Format::bf16 || format == Format::exact12; }

// Whether tokens are multiplied as the bf16 that they are.
bool stays_bf16(const Kernels &kernels, Format format, Type type, bool is_many) {
    return kernels.dots_bf16 && type == Type::bf16 &&
           (is_bf16(format) || is_super(format) || (is_decoded(format) && is_many));
}

size_t stride_of(uint32_t cols, bool is_many) { return padded(cols) + (is_many ? kSkew : 0); }

}  // namespace

bool same_kind(Format a, Format b) {
    const auto is_plain = [](Format f) { return !is_grouped(f) && !is_super(f) && !is_decoded(f); };
    return a == b || (is_plain(a) && is_plain(b) && is_bf16(a) == is_bf16(b));
}

uint32_t rows_at_once(Format format, bool is_many) {
    if (format == Format::awq) return kAwqRowsAtOnce;
    const bool has_words = format == Format::gptq || format == Format::gptq_v2;
    return is_many || has_words ? kManyRowsAtOnce : kRowsAtOnce;
}

void *Scratch::reserve(size_t num_bytes) {
    if (num_bytes > size_) {
        std::free(data_);
        size_ = 0;
        data_ = std::aligned_alloc(64, (num_bytes + 63) / 64 * 64);
        if (!data_) throw std::bad_alloc();
        size_ = num_bytes;
    }
    return data_;
}

bool Engine::are_many(Format weights, uint32_t num_tokens) const {
    return kernels_.floating_many &&
           num_tokens >= (takes_int8(kernels_, weights, true) ? kernels_.grouped_many_from : kManyFloating);
}

void Engine::reserve(Prepared &room, Format weights, Type type, uint32_t num_tokens,
                     uint32_t cols) const {
    const bool is_many = are_many(weights, num_tokens);
    const size_t stride = stride_of(cols, is_many), count = num_tokens * stride;
    if (takes_int8(kernels_, weights, is_many)) {
        room.values.reserve(count + stride * 4);  // one token's floats lie behind all the int8
        room.scales.reserve(count / kGroup * 4);
        room.sums.reserve(count);
    } else {
        room.values.reserve(count * (stays_bf16(kernels_, weights, type, is_many) ? 2 : 4));
    }
}

void Engine::prepare(Prepared &room, Format weights, Type type, const void *x, uint32_t num_tokens,
                     uint32_t cols) {
    const bool is_many = are_many(weights, num_tokens);
    const size_t stride = stride_of(cols, is_many), rest = stride - cols;
    const size_t token_bytes = cols * size_of(type);
    const auto *from = static_cast<const uint8_t *>(x);
    reserve(room, weights, type, num_tokens, cols);
    room.tokens = Tokens();
    room.tokens.num_tokens = static_cast<int>(num_tokens);
    room.tokens.stride = stride;
    room.tokens.is_many = is_many;
    if (takes_int8(kernels_, weights, is_many)) {
        prepare_grouped(room, weights, type, x, cols);
    } else if (stays_bf16(kernels_, weights, type, is_many)) {
        auto *to = static_cast<uint16_t *>(room.values.data());
        for (uint32_t t = 0; t < num_tokens; ++t) {
            std::memcpy(to + t * stride, from + t * token_bytes, token_bytes);
            std::memset(to + t * stride + cols, 0, rest * 2);
        }
        room.tokens.bf16 = to;
    } else {
        auto *to = static_cast<float *>(room.values.data());
        for (uint32_t t = 0; t < num_tokens; ++t) {
            kernels_.widen(type, from + t * token_bytes, to + t * stride, cols);
            std::memset(to + t * stride + cols, 0, rest * 4);
            if (!is_many && kernels_.arrange) kernels_.arrange(weights, to + t * stride, stride);
        }
        room.tokens.f32 = to;
    }
}

void Engine::prepare_grouped(Prepared &room, Format weights, Type type, const void *x,
                             uint32_t cols) {
    const size_t stride = room.tokens.stride, token_bytes = cols * size_of(type);
    const auto num_tokens = static_cast<size_t>(room.tokens.num_tokens);
    const auto *from = static_cast<const uint8_t *>(x);
    auto *to = static_cast<int8_t *>(room.values.data());
    auto *floats = reinterpret_cast<float *>(to + num_tokens * stride);
    auto *scales = static_cast<float *>(room.scales.data());
    auto *sums = static_cast<int32_t *>(room.sums.data());
    for (size_t t = 0; t < num_tokens; ++t) {
        int32_t *sum = sums + t * stride / 4;
        kernels_.widen(type, from + t * token_bytes, floats, cols);
        std::memset(floats + cols, 0, (stride - cols) * 4);
        kernels_.quantise(weights, room.tokens.is_many, floats, padded(cols), to + t * stride,
                          scales + t * stride / kGroup, sum);
        for (size_t i = 0; room.tokens.is_many && i < padded(cols) / 4; i += 8)
            for (size_t j = 1; j < 8; ++j) sum[i] += sum[i + j];
    }
    room.tokens.q8 = to;
    room.tokens.scale = scales;
    room.tokens.sum = sums;
}

void Engine::multiply(const Matrix &m, const Tokens &x, uint32_t first, uint32_t last, float *out,
                      size_t out_stride) const {
    const bool int8 = takes_int8(kernels_, m.format, x.is_many);
    const Product few = !int8 ? kernels_.floating : is_grouped(m.format) ? kernels_.grouped : kernels_.super;
    const Product many = int8 ? kernels_.grouped_many : kernels_.floating_many;
    const Product product = x.is_many ? many : few;
    product(m, x, first, last, out, out_stride);
}

// Large pieces first, for long stretches of memory are read best; small ones at the end, so that
// threads are done together, also where one was interrupted or came later.
void Engine::cut(const std::vector<uint32_t> &rows, uint32_t at_once, Step step) {
    uint64_t left = 0;
    for (const uint32_t each : rows) left += each;
    const auto num_threads = static_cast<uint64_t>(pool_.num_threads());
    const uint64_t least = left / (num_threads * kShareOfAll);
    for (uint32_t i = 0; i < rows.size(); ++i) {
        for (uint64_t first = 0, last; first < rows[i]; first = last) {
            const uint64_t wanted = std::max(least, left / (num_threads * kShareOfLeft));
            last = std::min<uint64_t>(rows[i], first + (wanted / at_once + 1) * at_once);
            pieces_.push_back(
                {i, static_cast<uint32_t>(first), static_cast<uint32_t>(last), step});
            left -= last - first;
        }
    }
}

void Engine::share(const std::vector<uint32_t> &rows, uint32_t at_once, const Rows &body) {
    pieces_.clear();
    cut(rows, at_once, Step::outer);
    pool_.run(static_cast<int>(pieces_.size()), [&](int task) {
        const Piece &piece = pieces_[task];
        body(piece.index, piece.first, piece.last);
    });
}

void Engine::product(const Matrix &m, const void *x, uint32_t num_tokens, Type type, void *out,
                     const void *bias) {
    const auto turn = take_turn();
    multiply_all(m, x, num_tokens, type, out, bias, nullptr);
}

void Engine::multiply_all(const Matrix &m, const void *x, uint32_t num_tokens, Type type, void *out,
                          const void *bias, float *scores) {
    const size_t item = size_of(type);
    float *biases = nullptr;
    if (bias) {
        biases = static_cast<float *>(bias_.reserve(size_t(m.rows) * 4));
        kernels_.widen(type, bias, biases, m.rows);
    }
    const Parts parts(num_tokens, m.rows);
    for (uint32_t part = 0; part < parts.count(); ++part) {
        const uint32_t start = parts.start(part), count = parts.size(part);
        prepare(prepared_[0], m.format, type, static_cast<const uint8_t *>(x) + start * item * m.cols,
                count, m.cols);
        auto *values = static_cast<float *>(result_.reserve(size_t(count) * m.rows * 4));
        auto *to = static_cast<uint8_t *>(out) + size_t(start) * m.rows * item;
        rows_.assign(1, m.rows);
        const Tokens &tokens = prepared_[0].tokens;
        const uint32_t step = rows_at_once(m.format, tokens.is_many);
        share(rows_, step, [&](size_t, uint32_t first, uint32_t last) {
            multiply(m, tokens, first, last, values, m.rows);
            for (uint32_t t = 0; t < count; ++t) {
                float *row = values + size_t(t) * m.rows;
                if (biases)
                    for (uint32_t i = first; i < last; ++i) row[i] += biases[i];
                uint8_t *rounded = to + (size_t(t) * m.rows + first) * item;
                kernels_.narrow(type, row + first, rounded, last - first);
                if (scores) kernels_.widen(type, rounded, scores + first, last - first);
            }
        });
    }
}

}  // namespace moe
