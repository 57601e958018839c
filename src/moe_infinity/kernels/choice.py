"""Which kernel a model is run with: the compiled one where there is one."""

from __future__ import annotations

import torch

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.kernels.reference import Kernel as Reference


def choose(name: str) -> ExpertKernel:
    """The kernel of one of config.KERNELS, on as many threads as torch has.

    Raises ConfigError for native where nothing was compiled.
    """
    if name == "torch" or (name == "auto" and native.native is None):
        return Reference()
    return native.Kernel(torch.get_num_threads())
