// AVX2, FMA and F16C: most processors since 2013.
#include <cmath>

#include "scalar.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // its pragmas differ
#include "intrinsics.hpp"
#pragma GCC target("avx2,fma,f16c")

namespace moe {
namespace avx2 {

#include "elementwise.inc"

constexpr int LANES = 8;
#define FMA(a, b, c) __builtin_fmaf(a, b, c)

static inline void int8_dot(const int8_t *w, const int8_t *x, int32_t *out) {
    const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i *>(w));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
    // |a| x (b with a's sign): at most 128 x 127 twice, which 16 bits hold.
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
    const __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    _mm256_store_si256(reinterpret_cast<__m256i *>(out), quads);
}

#include "generic.inc"

}  // namespace avx2

const Kernels *avx2_kernels() {
    using namespace avx2;
    static const Kernels kernels = {"avx2", false, floating, grouped, nullptr, nullptr, nullptr,
                                    quantise, activate, round_to, widen, narrow, normalise,
                                    exponentiate, mix};
    const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c");
    return has ? &kernels : nullptr;
}

}  // namespace moe

#else
namespace moe {
const Kernels *avx2_kernels() { return nullptr; }
}  // namespace moe
#endif
