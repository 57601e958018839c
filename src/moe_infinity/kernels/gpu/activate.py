"""What is done to single numbers between two products, as Triton code.

Every step is rounded as the model's own torch code rounds it, to TYPE; numbers are held in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    return x.to(TYPE).to(tl.float32)


@triton.jit
def with_bias(M: tl.constexpr, sums, address, rows, TYPE: tl.constexpr):
    """[T, R] sums and the bias of these rows."""
    sums = rounded(sums, TYPE)
    if M.bias_format != "":
        at = rows * M.bias_stride
        if M.bias_format == "BF16":
            bias = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at)
        elif M.bias_format == "F16":
            bias = tl.load(address.to(tl.pointer_type(tl.float16)) + at)
        else:
            bias = tl.load(address.to(tl.pointer_type(tl.float32)) + at)
        sums = rounded(sums + rounded(bias.to(tl.float32), TYPE)[None, :], TYPE)
    return sums


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    if ACTIVATION == 4:
        return _clamped(gate, up, TYPE)
    else:
        return rounded(activated(gate, ACTIVATION, TYPE) * up, TYPE)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    """Numbers are those of kernels/activations.py; 0 leaves x as it is. NaN stays."""
    if ACTIVATION == 1:
        x = rounded(x / (1.0 + tl.exp(-x)), TYPE)
    elif ACTIVATION == 2:
        within = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # 0.5 (1 + tanh(a)) = 1 / (1 + exp(-2a))
        x = rounded(x / (1.0 + tl.exp(-2.0 * within)), TYPE)
    elif ACTIVATION == 3:
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def _clamped(gate, up, TYPE: tl.constexpr):
    """gpt-oss."""
    gate = tl.where(gate > 7.0, 7.0, gate)
    up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
    steep = rounded(gate * 1.702, TYPE)
    sigmoid = rounded(1.0 / (1.0 + tl.exp(-steep)), TYPE)
    return rounded(rounded(gate * sigmoid, TYPE) * rounded(up + 1.0, TYPE), TYPE)
