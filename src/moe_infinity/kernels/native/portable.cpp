// For processors of which nothing is known. The reference of the other files' tests as well.
#include <cmath>

#include "scalar.hpp"

namespace moe {
namespace portable {

#include "elementwise.inc"

constexpr int LANES = 8;
#define FMA(a, b, c) ((a) * (b) + (c))

static inline void int8_dot(const int8_t *w, const int8_t *x, int32_t *out) {
    for (int l = 0; l < LANES; ++l) {
        int32_t sum = 0;
        for (int i = 0; i < kGroup / LANES; ++i) sum += w[l * 4 + i] * x[l * 4 + i];
        out[l] = sum;
    }
}

#include "generic.inc"

}  // namespace portable

const Kernels *portable_kernels() {
    using namespace portable;
    static const Kernels kernels = {"portable", false, floating, grouped, nullptr, nullptr, nullptr, 0, false,
                                    quantise, nullptr, activate, round_to, widen, narrow, add_scaled,
                                    normalise, exponentiate, mix};
    return &kernels;
}

}  // namespace moe
