"""The device that a name stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from moe_infinity.devices.base import Device
from moe_infinity.devices.simulated import PCIE4_GBPS, SimulatedDevice
from moe_infinity.errors import ConfigError, DeviceError

_TRIED_NUMBERS = 2**18  # of 4 bytes, that go to another device and back


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
    others = [_open_beside(first, name) for name in names[1:]]
    for other in others:
        _refuse_wrong_copies(first, other)
    return (first, *others)


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


def _refuse_wrong_copies(first: Device, other: Device) -> None:
    """On some machines GPUs reach each other's memory through an IOMMU that brings other bytes, and
    no error: pytorch/pytorch issues 84803 and 132397."""
    said = torch.arange(_TRIED_NUMBERS, dtype=torch.int32)
    with computing_on(first):
        sent = said.to(first.torch_device)  # kept, or its memory would be what comes back
    with computing_on(other):
        there = other.bring(sent, first)
        is_right = torch.equal(there.cpu(), said)
    with computing_on(first):
        back = first.bring(there, other)
        is_right &= torch.equal(back.cpu(), said)
    if not is_right:
        raise ConfigError(
            f"device: numbers copied from {first.name} to {other.name} and back came out as "
            f"others, expected the same; name one of them, or turn the system's IOMMU and PCIe "
            f"access control (ACS) off"
        )


def _gbps(number: str) -> float:
    gbps = float(number) if number else PCIE4_GBPS
    if gbps <= 0:
        raise ConfigError(f"device: got simulated:{number}, expected GB/s above 0")
    return gbps
