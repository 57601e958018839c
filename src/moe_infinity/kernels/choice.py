"""Which kernel a model is run with: the compiled one where there is one."""

from __future__ import annotations

import importlib.util

import torch

from moe_infinity.errors import ConfigError
from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.kernels.reference import Kernel as Reference

CPU = torch.device("cpu")


def choose(name: str, device: torch.device = CPU) -> ExpertKernel:
    """The kernel of one of config.KERNELS for tensors on ``device``, on as many threads as torch
    has.

    Raises ConfigError for native where nothing was compiled or tensors are elsewhere, and for
    triton where it is not installed or cannot run.
    """
    if name == "native" and device.type != "cpu":
        raise ConfigError(
            f"kernel: got native, which computes on the CPU, with device {device}; expected auto, "
            f"triton or torch"
        )
    if name == "triton" or (name == "auto" and device.type == "cuda" and _has_triton()):
        return _triton(device)
    if name == "torch" or (name == "auto" and (native.native is None or device.type != "cpu")):
        return Reference()
    return native.Kernel(torch.get_num_threads())


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton(device: torch.device) -> ExpertKernel:
    if not _has_triton():
        raise ConfigError(
            "kernel: got triton, which is not installed; install it (pip install "
            "'moe-infinity[gpu]'), or leave kernel out"
        )
    import triton

    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ConfigError(
            "kernel: got triton, which computes on a GPU, with device cpu; leave kernel out "
            "(TRITON_INTERPRET=1 in the environment interprets it, very slowly)"
        )
    from moe_infinity.kernels.gpu.kernel import Kernel

    return Kernel(device)
