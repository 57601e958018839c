"""The device that a name stands for."""

from __future__ import annotations

import torch

from moe_infinity.devices.base import Device
from moe_infinity.devices.simulated import PCIE4_GBPS, SimulatedDevice
from moe_infinity.errors import ConfigError


def open_device(name: str, is_needed: bool = False) -> Device | None:
    """The device of one of EngineConfig's names; None: the CPU computes from RAM.

    is_needed: with "auto", whether doing without is an error. Raises ConfigError where there is no
    such device.
    """
    kind, _, number = name.partition(":")
    if kind == "simulated":
        return SimulatedDevice(float(number) if number else PCIE4_GBPS)
    if kind == "auto" and not torch.cuda.is_available():
        if is_needed:
            raise ConfigError(
                "vram: got a size, expected a GPU for it: torch finds none; leave vram out, or "
                "name the device to see why it cannot be used (device=cuda)"
            )
        return None
    if kind == "cpu":
        return None
    from moe_infinity.devices.cuda import CudaDevice

    return CudaDevice(int(number or 0))
