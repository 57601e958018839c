"""The device that a name stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from moe_infinity.devices.base import Device
from moe_infinity.devices.simulated import PCIE4_GBPS, SimulatedDevice
from moe_infinity.errors import ConfigError, DeviceError


@contextlib.contextmanager
def computing_on(device: Device | None) -> Iterator[None]:
    """What the calling thread launches goes to the device's own stream. Raises DeviceError where
    the device does not answer any more, wherever that is noticed."""
    try:
        with contextlib.nullcontext() if device is None else device.computing():
            yield
    except torch.AcceleratorError as error:
        name = device.name if device is not None else "the device"
        raise DeviceError(
            f"{name}: lost in mid-run ({str(error).splitlines()[0]}), expected it to answer; see "
            f"the system's log, and open the model anew"
        ) from error


def open_devices(names: Sequence[str], needed_by: str = "") -> tuple[Device, ...]:
    """The devices of EngineConfig's names, the model's own first; none: the CPU computes from RAM.
    Raises as ``open_device``."""
    first = open_device(names[0], needed_by)
    if first is None:
        return ()
    return (first, *(_open_beside(first, name) for name in names[1:]))


def open_device(name: str, needed_by: str = "") -> Device | None:
    """The device of one of EngineConfig's names; None: the CPU computes from RAM.

    needed_by: an option that makes no sense without one. Raises ConfigError where there is no such
    device.
    """
    kind, _, number = name.partition(":")
    if kind == "simulated":
        return SimulatedDevice(_gbps(number))
    if kind == "auto" and not torch.cuda.is_available():
        if needed_by:
            raise ConfigError(
                f"{needed_by}: expected a GPU for it, torch finds none; leave {needed_by} out, or "
                f"name the device to see why it cannot be used (device=cuda)"
            )
        return None
    if kind == "cpu":
        return None
    from moe_infinity.devices.cuda import CudaDevice

    return CudaDevice(int(number or 0))


def _open_beside(first: Device, name: str) -> Device:
    if isinstance(first, SimulatedDevice):
        return SimulatedDevice(_gbps(name.partition(":")[2]), beside=first)
    device = open_device(name)
    assert device is not None, f"{name} is no device"
    return device


def _gbps(number: str) -> float:
    return float(number) if number else PCIE4_GBPS
