"""Which of the activations that compiled code has a model's own gate is."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_infinity.kernels.base import ExpertMath

# Numbers are those of native/matrix.hpp.
_ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    1: torch.nn.functional.silu,
    2: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    3: torch.relu,
}
_PROBES = 1024


def recognise(math: ExpertMath) -> int | None:
    """Which compiled activation does what the model's own gate does; None: none.

    Asked on a thousand numbers, large ones too: some models bound what goes into their gates.
    """
    points = torch.arange(_PROBES)
    spread = torch.linspace(-12, 12, _PROBES, dtype=torch.float64)
    gate = torch.where(points % 7 == 0, spread * 1000, spread)[:, None]
    up = torch.where(points % 5 == 0, spread.flip(0) * 1000, spread.flip(0))[:, None]
    wide = [gate, gate, up, up] if math.has_gate else [gate, gate]
    try:
        said = math.gate(torch.cat(wide, dim=1))[:, :1]
    except Exception:  # a gate may want shapes or types of its own
        return None
    for number, function in _ACTIVATIONS.items():
        expected = function(gate) * up if math.has_gate else function(gate)
        if said.shape == expected.shape and torch.allclose(said, expected, rtol=1e-6, atol=1e-6):
            return number
    return None
