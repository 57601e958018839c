// What every form of attention to earlier tokens has in common.
#pragma once

#include <algorithm>
#include <cmath>

#include "matrix.hpp"

namespace moe {

// Tokens whose attention is one task. Fixed: the order of sums must not depend on threads.
constexpr uint32_t kContextAtOnce = 256;
constexpr uint32_t kQueriesAtOnce = 8;  // bounds the scores on a task's stack

// Numbers that are stored as they are: the types come first among the formats.
inline Format format_of(Type type) { return static_cast<Format>(type); }

// Rows of numbers that follow one another.
inline Matrix plain_matrix(const uint8_t *data, uint32_t rows, uint32_t cols, Type type) {
    Matrix m{};
    m.data = data;
    m.row_bytes = cols * size_of(type);
    m.rows = rows;
    m.cols = cols;
    m.format = format_of(type);
    return m;
}

// The parts of one query's attention, each relative to its own largest score, made one.
inline void unite(const float *partial, uint32_t parts, uint32_t size, float *out) {
    const size_t stride = size + 2;
    float largest = partial[size], total = 0;
    for (uint32_t part = 1; part < parts; ++part)
        largest = std::max(largest, partial[part * stride + size]);
    std::fill(out, out + size, 0.0f);
    for (uint32_t part = 0; part < parts; ++part) {
        const float *own = partial + part * stride;
        const float weight = std::exp(own[size] - largest);
        total += weight * own[size + 1];
        for (uint32_t i = 0; i < size; ++i) out[i] += weight * own[i];
    }
    for (uint32_t i = 0; i < size; ++i) out[i] /= total;
}

}  // namespace moe
