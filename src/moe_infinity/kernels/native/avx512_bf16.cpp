// AVX-512 with BF16: Intel since Cooper Lake, AMD since Zen 4. Tokens in bf16 are multiplied as
// they are, twice as fast as floats.
#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <utility>

#include "scalar.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // its pragmas differ
#include "intrinsics.hpp"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")

namespace moe {
namespace avx512_bf16 {

#include "elementwise.inc"
#include "avx512.inc"
#include "avx512_panels.inc"

// Two sums each: one would wait for itself longer than for what is multiplied.
template <template <int> class Rows>
struct Bf16Tiles {
    template <int R, int T>
    static void run(const Matrix &m, uint32_t first, const Tokens &x, int token, float *out,
                    size_t out_stride) {
        if constexpr (R * T > 8) {  // more sums than there are registers for
            static_assert(R % 2 == 0);
            run<R / 2, T>(m, first, x, token, out, out_stride);
            run<R / 2, T>(m, first + R / 2, x, token, out, out_stride);
        } else {
            all_at_once<R, T>(m, first, x, token, out, out_stride);
        }
    }

private:
    template <int R, int T>
    static MOE_HOT void all_at_once(const Matrix &m, uint32_t first, const Tokens &x, int token, float *out,
                                    size_t out_stride) {
        Rows<R> rows(m, first, ahead_of<R, T>(m));
        __m512 sums[R][T], others[R][T];
        for (auto &row : sums) for (auto &sum : row) sum = _mm512_setzero_ps();
        for (auto &row : others) for (auto &sum : row) sum = _mm512_setzero_ps();
        const uint16_t *tokens = x.bf16 + token * x.stride;
        for (uint32_t c = 0; c < m.cols; c += 64) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                __m512i a, b;
                rows.load64(r, c, a, b);
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    const uint16_t *at = tokens + t * x.stride + c;
                    sums[r][t] = _mm512_dpbf16_ps(sums[r][t], (__m512bh)a, (__m512bh)load(at));
                    others[r][t] = _mm512_dpbf16_ps(others[r][t], (__m512bh)b, (__m512bh)load(at + 32));
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) sums[r][t] = _mm512_add_ps(sums[r][t], others[r][t]);
        store_sums(sums, first, out + token * out_stride, out_stride);
    }
};

static void either(const Matrix &m, const Tokens &x, uint32_t first, uint32_t last, float *out,
                   size_t out_stride) {
    if (x.bf16 && m.format == Format::bf16)
        by_tokens<Bf16Tiles<Bf16Rows>, 1>(m, x, first, last, out, out_stride);
    else if (x.bf16)
        by_tokens<Bf16Tiles<Exact12Rows>, 1>(m, x, first, last, out, out_stride);
    else
        floating(m, x, first, last, out, out_stride);
}

template <class Row>
struct PairSource {
    static constexpr uint32_t kColumns = 64, kRegisters = 2;
    Row row;

    PairSource(const Matrix &m, uint32_t r) : row(m, r, tile_ahead<1>(m)) {}

    inline void read(uint32_t c, __m512i *w, float *) { row.load64(0, c, w[0], w[1]); }
};

// Rows of floats, rounded.
template <class Row>
struct RoundedSource {
    static constexpr uint32_t kColumns = 64, kRegisters = 2;
    Row row;

    RoundedSource(const Matrix &m, uint32_t r) : row(m, r, tile_ahead<1>(m)) {}

    inline void read(uint32_t c, __m512i *w, float *) {
        __m512 values[4];
        row.load64(0, c, values);
        w[0] = (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]);
        w[1] = (__m512i)_mm512_cvtne2ps_pbh(values[3], values[2]);
    }
};

struct PairPanels {
    static constexpr int kTokens = 12;
    static constexpr uint32_t kWordColumns = 2;

    static inline const void *tokens(const Tokens &x) { return x.bf16; }
    static MOE_HOT Floats both(Floats first, Floats second) {  // columns
        const auto low = (__m256i)_mm512_cvtneps_pbh(first), high = (__m256i)_mm512_cvtneps_pbh(second);
        const __m512i above = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
        return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(low), above));
    }
    static inline __m512 add(__m512 sum, __m512i w, __m512i x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
    }
};

static void either_many(const Matrix &m, const Tokens &x, uint32_t first, uint32_t last, float *out,
                        size_t out_stride) {
    const auto run = !x.bf16                    ? floating_many
                     : is_super(m.format)       ? panels<PairPanels, RoundedSource<SuperRows<1>>>
                     : m.format == Format::f8   ? panels<PairPanels, RoundedSource<F8Rows<1>>>
                     : m.format == Format::int4 ? panels<PairPanels, RoundedSource<Int4Row>>
                     : m.format == Format::awq  ? panels<PairPanels, WordSource<true>>
                     : m.format > Format::int4  ? panels<PairPanels, WordSource<false>>
                     : is_decoded(m.format)     ? panels<PairPanels, RoundedSource<MinimumRows<1>>>
                     : m.format == Format::bf16 ? panels<PairPanels, PairSource<Bf16Rows<1>>>
                                                : panels<PairPanels, PairSource<Exact12Rows<1>>>;
    run(m, x, first, last, out, out_stride);
}

}  // namespace avx512_bf16

const Kernels *avx512_bf16_kernels() {
    using namespace avx512_bf16;
    static const Kernels kernels = {"avx512_bf16", true, either, grouped, super, either_many,
                                    grouped_many, kGroupedManyFrom, true, quantise, arrange, activate, round_to,
                                    widen, narrow, add_scaled, normalise, exponentiate, mix};
    return avx512_kernels() && __builtin_cpu_supports("avx512bf16") ? &kernels : nullptr;
}

}  // namespace moe

#else
namespace moe {
const Kernels *avx512_bf16_kernels() { return nullptr; }
}  // namespace moe
#endif
