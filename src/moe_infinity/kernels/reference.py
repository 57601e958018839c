"""The plain torch kernel: the reference every faster one is compared with."""

from __future__ import annotations

import torch
from torch.nn import functional

from moe_infinity.kernels.base import ExpertKernel, ExpertMath, Views
from moe_infinity.kernels.packed import PackedMatrix


class Kernel(ExpertKernel):
    """torch's own matrix products over views of the slot; packed weights are unpacked for each."""

    name = "torch"

    def forward(self, math: ExpertMath, views: Views, x: torch.Tensor) -> torch.Tensor:
        first = "gate_up_proj" if math.has_gate else "up_proj"
        inner = math.gate(_project(math, views, first, x))  # [T, I]
        out = _project(math, views, "down_proj", inner)  # [T, H]
        return math.post(out) if math.post else out


def _project(math: ExpertMath, views: Views, name: str, x: torch.Tensor) -> torch.Tensor:
    out = _joined(math, name, [_product(math, block, x) for block in views[name]])
    if math.has_bias:
        biases = [plain(block) for block in views[f"{name}_bias"]]
        out = out + _joined(math, name, biases).to(x.dtype)
    return out


def _joined(math: ExpertMath, name: str, blocks: list[torch.Tensor]) -> torch.Tensor:
    """What belongs to blocks of a part, [..., rows] each, as the model would have it."""
    if len(blocks) == 2 and name == "gate_up_proj" and math.is_interleaved:
        return torch.stack(blocks, dim=-1).flatten(-2)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def plain(block: torch.Tensor | PackedMatrix) -> torch.Tensor:
    """The block as an ordinary tensor."""
    return block.decode() if isinstance(block, PackedMatrix) else block


def _product(math: ExpertMath, block: torch.Tensor | PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    weight = plain(block).to(x.dtype)
    if math.is_transposed and not isinstance(block, PackedMatrix):
        return x @ weight
    return functional.linear(x, weight)
