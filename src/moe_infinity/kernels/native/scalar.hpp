// Conversions of single numbers, and of one row to plain floats; what is not worth a vector.
#pragma once

#include <cstring>

#include "matrix.hpp"

namespace moe {

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bf16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // 2^112 moves the exponent from one bias to the other, denormals included.
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

inline uint16_t float_to_f16(float value) {  // to nearest, ties to even
    const uint32_t bits = float_to_bits(value), size = bits & 0x7fffffff;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (size >> 13 & 0x3ff));
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (size < 0x38800000) {  // denormal there: adding 0.5 leaves its bits at the end
        const float shifted = bits_to_float(size) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000));
    }
    const uint32_t rounded = size + 0xfff + (size >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

inline uint16_t load_u16(const uint8_t *at) {
    uint16_t value;
    std::memcpy(&value, at, 2);
    return value;
}

// Scale and minimum number j of 8 in a block of q4_k or q5_k: 6 bits each, in 12 bytes.
inline void six_bits(const uint8_t *at, int j, uint8_t &scale, uint8_t &minimum) {
    if (j < 4) {
        scale = at[j] & 63;
        minimum = at[j + 4] & 63;
    } else {
        scale = static_cast<uint8_t>((at[j + 4] & 15) | (at[j - 4] >> 6) << 4);
        minimum = static_cast<uint8_t>(at[j + 4] >> 4 | (at[j] >> 6) << 4);
    }
}

// Half a block (0 or 1) of a format with two levels of scales: 128 weights.
inline void unpack_super(Format format, const uint8_t *block, int half, float *out) {
    if (format == Format::q6_k) {
        const uint8_t *low = block + half * 64, *high = block + 128 + half * 32;
        const auto *scales = reinterpret_cast<const int8_t *>(block + 192 + half * 8);
        const float scale = f16_to_float(load_u16(block + 208));
        for (int g = 0; g < 4; ++g) {
            for (int i = 0; i < kGroup; ++i) {
                const int nibble = low[(g & 1) * 32 + i] >> (g / 2 * 4) & 15;
                const int q = nibble | (high[i] >> (2 * g) & 3) << 4;
                const float both = scale * static_cast<float>(scales[2 * g + i / 16]);
                out[g * kGroup + i] = both * static_cast<float>(q - 32);
            }
        }
        return;
    }
    const float scale = f16_to_float(load_u16(block)), least = f16_to_float(load_u16(block + 2));
    const uint8_t *high = block + 16, *low = block + (format == Format::q5_k ? 48 : 16) + half * 64;
    for (int g = 0; g < 4; ++g) {
        uint8_t s, m;
        six_bits(block + 4, half * 4 + g, s, m);
        const float both = scale * static_cast<float>(s), minimum = least * static_cast<float>(m);
        for (int i = 0; i < kGroup; ++i) {
            int q = low[g / 2 * 32 + i] >> ((g & 1) * 4) & 15;
            if (format == Format::q5_k) q |= (high[i] >> (half * 4 + g) & 1) << 4;
            out[g * kGroup + i] = both * static_cast<float>(q) - minimum;
        }
    }
}

// Half of 2 to the (exponent - 127): what mxfp4's numbers, held doubled, are scaled by.
inline float half_of_power(uint8_t exponent) {
    return bits_to_float(exponent < 2 ? 0x00200000u << exponent
                                      : static_cast<uint32_t>(exponent - 1) << 23);
}

constexpr int8_t kFp4Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// A group of q4_1 or q5_1: 32 weights.
inline void unpack_with_minimum(Format format, const uint8_t *group, float *out) {
    const bool has_fifth = format == Format::q5_1;
    const float scale = f16_to_float(load_u16(group)), least = f16_to_float(load_u16(group + 2));
    uint32_t fifth = 0;
    if (has_fifth) std::memcpy(&fifth, group + 4, 4);
    const uint8_t *codes = group + (has_fifth ? 8 : 4);
    for (int i = 0; i < kGroup; ++i) {
        const int low = i < 16 ? codes[i] & 15 : codes[i - 16] >> 4;
        out[i] = scale * static_cast<float>(low | (fifth >> i & 1) << 4) + least;
    }
}

inline float f8_to_float(uint8_t byte) {  // 4 bits of exponent, 3 of mantissa, no infinities
    if ((byte & 0x7f) == 0x7f) return bits_to_float(0x7fc00000);
    const auto half = static_cast<uint16_t>((byte & 0x80) << 8 | (byte & 0x7f) << 7);
    return f16_to_float(half) * 256.0f;
}

// A scale, where scales lie apart.
inline float scale_at(const Matrix &m, const uint8_t *at) {
    if (m.side_type == kE8m0) return bits_to_float(*at ? static_cast<uint32_t>(*at) << 23 : 0x00400000u);
    if (m.side_type == static_cast<uint32_t>(Type::f32)) {
        float value;
        std::memcpy(&value, at, 4);
        return value;
    }
    const uint16_t bits = load_u16(at);
    return m.side_type == static_cast<uint32_t>(Type::bf16) ? bf16_to_float(bits) : f16_to_float(bits);
}

inline float scale_of(const Matrix &m, uint32_t row, uint32_t col) {
    return scale_at(m, m.side + size_t(row / m.group_rows) * m.side_row_bytes +
                           size_t(col / m.group_cols) * m.side_col_bytes);
}

// Where awq puts the eight rows of a word.
constexpr int kAwqPlace[8] = {0, 4, 1, 5, 2, 6, 3, 7};

// The zero point of one of the eight rows of a word.
inline int zero_in_word(Format format, uint32_t word, uint32_t row) {
    const int place = format == Format::awq ? kAwqPlace[row] : static_cast<int>(row);
    const auto zero = static_cast<int>(word >> (4 * place) & 15);
    return format == Format::gptq ? (zero + 1) & 15 : zero;
}

// What is taken from a code of int4 and later formats.
inline int zero_at(const Matrix &m, uint32_t row, uint32_t group) {
    if (!m.zeros) return 8;
    uint32_t word;
    std::memcpy(&word, m.zeros + size_t(row / 8) * m.zero_row_bytes + size_t(group) * m.zero_col_bytes,
                4);
    return zero_in_word(m.format, word, row % 8);
}

// The scale, and the zero point, of the columns that a row has come to; columns only go up.
struct GroupAt {
    const uint8_t *side = nullptr;
    uint32_t row = 0, group = 0, next = 0;  // next: where the next group begins
    float scale = 0, zero = 0;

    GroupAt() = default;
    GroupAt(const Matrix &m, uint32_t row_number)
        : side(m.side + size_t(row_number / m.group_rows) * m.side_row_bytes), row(row_number) {}

    inline void come_to(const Matrix &m, uint32_t c) {
        for (; c >= next; ++group, next += m.group_cols) {
            scale = scale_at(m, side + size_t(group) * m.side_col_bytes);
            if (m.format >= Format::int4) zero = static_cast<float>(zero_at(m, row, group));
        }
    }
};

// The code of a weight of int4 and later formats.
inline int code_of(const Matrix &m, uint32_t row, uint32_t col) {
    uint32_t word;
    switch (m.format) {
    case Format::int4:
        return m.data[row * m.row_bytes + col / 2] >> (col % 2 * 4) & 15;
    case Format::awq:
        std::memcpy(&word, m.data + col * m.row_bytes + row / 8 * 4, 4);
        return word >> (4 * kAwqPlace[row % 8]) & 15;
    default:
        std::memcpy(&word, m.data + col / 8 * m.row_bytes + size_t(row) * 4, 4);
        return word >> (col % 8 * 4) & 15;
    }
}

// Weights first..first+count-1 of a row of what is decoded; both are multiples of a group's size or
// reach the end of the row.
inline void decode_weights(const Matrix &m, uint32_t row, uint32_t first, uint32_t count, float *out) {
    if (m.format == Format::q4_1 || m.format == Format::q5_1) {
        const int bytes = m.format == Format::q4_1 ? 20 : 24;
        const uint8_t *start = m.data + row * m.row_bytes;
        for (uint32_t i = 0; i < count; i += kGroup)
            unpack_with_minimum(m.format, start + (first + i) / kGroup * bytes, out + i);
        return;
    }
    for (uint32_t i = 0; i < count; ++i) {
        const float scale = scale_of(m, row, first + i);
        if (m.format == Format::f8)
            out[i] = f8_to_float(m.data[row * m.row_bytes + first + i]) * scale;
        else
            out[i] = static_cast<float>(code_of(m, row, first + i) - zero_at(m, row, (first + i) / m.group_cols)) * scale;
    }
}

inline int super_bytes(Format format) {
    return format == Format::q4_k ? 144 : format == Format::q5_k ? 176 : 210;
}

// The exceptions of one row of an exact12 matrix, in ascending columns.
struct Exceptions {
    const uint32_t *next = nullptr, *end = nullptr;

    Exceptions() = default;
    Exceptions(const Matrix &m, uint32_t row) {
        const uint8_t *table = m.side + (m.rows + 3) / 4 * 4;
        const auto *starts = reinterpret_cast<const uint32_t *>(table);
        const auto *all = starts + m.rows + 1;
        next = all + starts[row];
        end = all + starts[row + 1];
    }

    bool before(uint32_t column) const { return next != end && *next >> 16 < column; }

    // Put the true bits of columns first..first+count-1 in place.
    void patch(uint16_t *values, uint32_t first, uint32_t count) {
        for (; before(first + count); ++next) values[(*next >> 16) - first] = *next & 0xffff;
    }
};

}  // namespace moe
