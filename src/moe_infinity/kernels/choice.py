"""Which kernel a model is run with: the compiled one where there is one."""

from __future__ import annotations

import torch

from moe_infinity.errors import ConfigError
from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.kernels.reference import Kernel as Reference

CPU = torch.device("cpu")


def choose(name: str, device: torch.device = CPU) -> ExpertKernel:
    """The kernel of one of config.KERNELS for tensors on ``device``, on as many threads as torch
    has.

    Raises ConfigError for native where nothing was compiled or tensors are elsewhere.
    """
    if name == "native" and device.type != "cpu":
        raise ConfigError(
            f"kernel: got native, which computes on the CPU, with device {device}; expected auto "
            f"or torch"
        )
    if name == "torch" or (name == "auto" and (native.native is None or device.type != "cpu")):
        return Reference()
    return native.Kernel(torch.get_num_threads())
