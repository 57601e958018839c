// What the kernels are given: matrices as they lie in a slot, and the tokens to multiply by them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe {

// How a row of weights is coded; docs/packed_format.md gives the layouts byte by byte.
// Those of llama.cpp's with a K have two levels of scales; they come in GGUF files only, as q5_0,
// q4_1, q5_1 and mxfp4 do. From mx4 on scales lie apart from the codes: kernels/planes.py.
enum class Format : uint32_t {
    bf16 = 0, f16 = 1, f32 = 2, q8_0 = 3, q4_0 = 4, exact12 = 5, q4_k = 6, q5_k = 7, q6_k = 8,
    mxfp4 = 9, q5_0 = 10, q4_1 = 11, q5_1 = 12,
    mx4 = 13, f8 = 14, int4 = 15, gptq = 16, gptq_v2 = 17, awq = 18
};

inline bool is_super(Format format) {
    return format == Format::q4_k || format == Format::q5_k || format == Format::q6_k;
}

// Multiplied as int8, in groups of 32 with a scale each.
inline bool is_grouped(Format format) {
    return format == Format::q8_0 || format == Format::q4_0 || format == Format::q5_0 ||
           format == Format::mxfp4 || format == Format::mx4;
}

// Become floats before they are multiplied.
inline bool is_decoded(Format format) {
    return format == Format::q4_1 || format == Format::q5_1 || format >= Format::f8;
}

// Type of activations: what comes in, what is rounded to after every step, what goes out.
enum class Type : uint32_t { bf16 = 0, f16 = 1, f32 = 2 };

inline size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// What scales may be beside a Type: 8 bits, an exponent.
constexpr uint32_t kE8m0 = 3;

// clamped: of gpt-oss, of gate and up together.
enum class Activation : uint32_t { none = 0, silu = 1, gelu_tanh = 2, relu = 3, clamped = 4 };

// One [rows, cols] matrix, rows of row_bytes each. Plain data: Python writes it with struct.
struct Matrix {
    const uint8_t *data;
    // exact12 only: top exponents u8 [rows]; then, from the next multiple of 4, first exception of
    // each row u32 [rows + 1] and the exceptions u32 (column << 16 | bits).
    // Where scales lie apart: they, one for so many rows and columns.
    const uint8_t *side;
    const uint8_t *zeros;  // int4 and later: words of eight rows' zero points; null: all are 8
    uint64_t row_bytes;    // of gptq from eight columns' words to the next, of awq from a column's
    uint32_t rows, cols;
    Format format;
    uint32_t side_type;    // a Type or kE8m0
    uint32_t side_row_bytes, side_col_bytes;  // from scale to scale
    uint32_t group_rows, group_cols;
    uint32_t zero_row_bytes, zero_col_bytes;  // from word to word
};
static_assert(sizeof(Matrix) == 72, "Python packs it so");

constexpr int kGroup = 32;        // weights per scale of q8_0 and q4_0
constexpr int kQ8Bytes = 34;      // f16 scale, 32 int8
constexpr int kQ4Bytes = 18;      // f16 scale, 16 bytes: element i low, element i + 16 high
constexpr int kQ5Bytes = 22;      // f16 scale, fifth bits, 16 bytes as of q4_0
constexpr int kMx4Bytes = 17;     // exponent, 16 bytes as of q4_0
constexpr int kSuper = 256;       // weights of a block of q4_k, q5_k and q6_k
constexpr int kUnit = 128;        // weights per unit of exact12
constexpr int kUnitBytes = 192;   // 128 bytes of sign and mantissa, 64 bytes of codes
constexpr int kPadding = 128;     // tokens are padded with zeros to a multiple of this

// From how many tokens on it pays to lay weights out anew for them, where both are floats.
constexpr uint32_t kManyFloating = 32;
// Beside the columns of each of many tokens, or one column of all would share a set of the cache.
constexpr size_t kSkew = 32;

inline size_t padded(size_t cols) { return (cols + kPadding - 1) / kPadding * kPadding; }

// Tokens made ready for one kind of weights: num_tokens rows of `stride` elements, the columns
// followed by zeros. Only what that kind needs is set; the order within q8 and sum, and within
// a few columns of f32, is the kernels' own affair.
struct Tokens {
    int num_tokens = 0;
    size_t stride = 0;              // padded(cols), and kSkew more if they are many
    const uint16_t *bf16 = nullptr;
    const float *f32 = nullptr;
    const int8_t *q8 = nullptr;     // groups of 32 with a scale each
    const float *scale = nullptr;   // [T, stride / 32]
    // [T, stride / 4] what to add for weights stored with an offset; for q4_k and q5_k each token
    // begins with floats: of eight groups the scales, then the sums, and so on.
    const int32_t *sum = nullptr;
    bool is_many = false;           // made ready for the products of many tokens
};

// out[t * out_stride + row] = row of m . token t, for rows first..last-1. A result depends on its
// row and its token alone: not on the range, the number of tokens, threads or addresses. `first` of
// gptq and awq is a multiple of 8, for their words hold so many rows' zero points or codes.
using Product = void (*)(const Matrix &m, const Tokens &x, uint32_t first, uint32_t last,
                         float *out, size_t out_stride);

// What one instruction set offers.
struct Kernels {
    const char *name;
    bool dots_bf16;                  // bf16 tokens are multiplied as they are
    Product floating;                // bf16, f16, f32, exact12, and those that are decoded
    Product grouped;                 // q8_0, q4_0, q5_0, mxfp4, mx4
    Product super;                   // q4_k, q5_k, q6_k of int8 tokens; null: floating does them
    // The same for many tokens, summed in another order; null: there is nothing better. Formats
    // with a K go the floating way then, in bf16 where tokens are.
    Product floating_many, grouped_many;
    uint32_t grouped_many_from;      // so many tokens on it pays
    bool has_q8_many;                // grouped_many takes q8_0 too; false: that goes the floating way
    // One token: padded floats to int8, [n], scales [n / 32] and sums [n / 4], for what is
    // multiplied as int8. For many tokens the same for all of these.
    void (*quantise)(Format weights, bool is_many, const float *x, size_t n, int8_t *q, float *scale,
                     int32_t *sum);
    // Padded floats into the order in which few tokens are multiplied by a format, in place; null:
    // always that of the columns.
    void (*arrange)(Format weights, float *x, size_t count);
    void (*activate)(Activation which, float *x, size_t count);  // in place
    void (*round)(Type to, float *x, size_t count);              // in place
    void (*widen)(Type from, const void *x, float *out, size_t count);
    void (*narrow)(Type to, const float *x, void *out, size_t count);
    // total += scale * x; each product is rounded to x's type before, if it says so.
    void (*add_scaled)(Type type, const void *x, float scale, bool rounds, float *total, size_t count);
    void (*normalise)(float *x, size_t count, float eps);        // in place, to a mean square of 1
    // x to exp(x - largest x), in place; the largest and the sum of the results.
    void (*exponentiate)(float *x, size_t count, float *largest_and_sum);
    // out[t] = sum over rows r of weights[t][r] * rows[r]; rows [num_rows, cols] are contiguous.
    void (*mix)(Type type, const void *rows, size_t num_rows, size_t cols, const float *weights,
                size_t weight_stride, size_t num_tokens, float *out, size_t out_stride);
};

// Null where the compiler or the processor does not have them.
const Kernels *portable_kernels();
const Kernels *avx2_kernels();         // with FMA and F16C
const Kernels *avx512_kernels();       // F, BW, DQ, VL and VNNI
const Kernels *avx512_bf16_kernels();  // and BF16

}  // namespace moe
