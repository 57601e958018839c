// AVX2, FMA and F16C: most processors since 2013.
#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <utility>

#include "scalar.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // its pragmas differ
#include "intrinsics.hpp"
#pragma GCC target("avx2,fma,f16c")

namespace moe {
namespace avx2 {

#include "elementwise.inc"
#include "avx2.inc"
#include "avx2_panels.inc"

}  // namespace avx2

const Kernels *avx2_kernels() {
    using namespace avx2;
    static const Kernels kernels = {"avx2", false, floating, grouped, super, floating_many,
                                    grouped_many, kGroupedManyFrom, false, quantise, arrange, activate,
                                    round_to, widen, narrow, add_scaled, normalise, exponentiate, mix};
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
