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
