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
    products = [_product(math, plain(block).to(x.dtype), x) for block in views[name]]
    out = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    if math.has_bias:
        out = out + _whole([plain(block) for block in views[f"{name}_bias"]]).to(x.dtype)
    return out


def plain(block: torch.Tensor | PackedMatrix) -> torch.Tensor:
    """The block as an ordinary tensor."""
    return block.decode() if isinstance(block, PackedMatrix) else block


def _product(math: ExpertMath, block: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ block if math.is_transposed else functional.linear(x, block)


def _whole(blocks: list[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
