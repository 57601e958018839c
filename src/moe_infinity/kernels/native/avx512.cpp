// AVX-512 with VNNI: Intel since Cascade Lake and Ice Lake, AMD since Zen 4.
#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <utility>

#include "scalar.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // its pragmas differ
#include "intrinsics.hpp"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")

namespace moe {
namespace avx512 {

#include "elementwise.inc"
#include "avx512.inc"
#include "avx512_panels.inc"

}  // namespace avx512

const Kernels *avx512_kernels() {
    using namespace avx512;
    static const Kernels kernels = {"avx512", false, floating, grouped, super, floating_many,
                                    grouped_many, kGroupedManyFrom, true, quantise, arrange, activate, round_to,
                                    widen, narrow, add_scaled, normalise, exponentiate, mix};
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512vnni");
    return has && avx2_kernels() ? &kernels : nullptr;
}

}  // namespace moe

#else
namespace moe {
const Kernels *avx512_kernels() { return nullptr; }
}  // namespace moe
#endif
