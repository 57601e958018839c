"""What a user can choose, validated once. The only file that reads the environment."""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from moe_infinity.errors import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*")
_DTYPES = (None, "auto", "float32", "bfloat16", "float16")
_MISS_RULES = ("copy", "cpu", "auto")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?|simulated(:\d{1,4}(\.\d{1,3})?)?")
_IN_LISTS = ("cuda", "simulated")  # kinds of which several can be used
KERNELS = ("auto", "native", "torch", "triton")

# Tokens of one prefill chunk. A constant, never a function of the budget: the number of rows of a
# matrix product decides its last bits, and logits must not depend on how much memory there is.
PREFILL_CHUNK_TOKENS = 2048
_LEAST_RAM_BYTES = 1024**2
MAX_DEFAULT_CONTEXT = 32_768


def parse_size(value: int | str, name: str = "size") -> int:
    """Bytes of ``"8GiB"``, ``"512M"``, ``"2.5 GB"`` or a plain number of bytes.

    Raises ConfigError for anything else, zero and negative sizes included.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(str(value))
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    factor = units.get(match[2].lower(), 0) if match else 0
    num_bytes = int(Fraction(match[1]) * factor) if match else 0
    if num_bytes < 1:
        raise ConfigError(
            f"{name}: got {value!r}, expected a size such as 8GiB, 512MiB, 2.5GB or a positive "
            f"number of bytes"
        )
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """``8.00 GiB``, ``12.5 MiB``: for people, never parsed again."""
    for unit, factor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{int(num_bytes)} B"


def state_dir() -> Path:
    """Folder of the small state file (measured bandwidths, later: learned traces)."""
    base = os.environ.get("MOE_INFINITY_STATE_DIR")
    if base:
        return Path(base)
    shared = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state")
    return Path(os.path.expanduser(shared)) / "moe-infinity"


def learned_path(fingerprint: str, name: str) -> Path:
    """Where a policy or predictor keeps what it learned of the model with this fingerprint."""
    return state_dir() / "learned" / fingerprint / f"{name.replace(':', '.')}.safetensors"


def let_idle_threads_sleep() -> None:
    """Ask OpenMP, before torch loads it, not to spin between parallel regions.

    Its idle threads would take cores from the reader threads and from other programs: on two busy
    cores decode was measured 40 times faster without. A policy the user has set stands. Where
    torch is loaded already this would come too late: model/spinning.py sees to it then.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def may_idle_threads_spin() -> bool:
    """Whether nobody has told OpenMP, in time, what its idle threads are to do."""
    return not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()


def keep_kernel_caches_small() -> None:
    """Ask oneDNN, before its first product, to remember few compiled kernels, not 1024.

    Each number of rows is a kernel of half a megabyte, and in prefill every expert gets another
    number: 500 MB in a prompt of 8192 tokens, in no budget. With 64 (decode needs about ten) no
    run was measured to be slower. What the user has set stands.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")  # torch's own, in front of oneDNN's


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of ``MoE(...)``; the command line is derived from these names and defaults."""

    ram: int | str = "auto"  # bytes for the whole process; "auto": what the machine can spare
    vram: int | str = "auto"  # bytes of each device's memory; "auto": what it can spare; 8GiB,12GiB
    # cpu; cuda, cuda:1; simulated, simulated:12 (GB/s); cuda:0,cuda:1: several; auto: cuda or cpu
    device: str = "auto"
    dtype: str | None = None  # None: as the checkpoint says
    kernel: str = "auto"  # native: compiled for this CPU; triton: for GPUs; torch; auto: the best
    policy: str = "next_use"
    prefetch: str = "auto"  # "auto": ask the model's next routers early, where that is possible
    miss: str = "copy"  # to the device; cpu: computed in RAM; auto: both at once, as far as it pays
    ram_slots: int | None = None  # capacity in experts, all layers together; with ram, both bind
    vram_slots: int | None = None  # the same of the device
    max_context: int | None = None  # None: the model's limit, shortened to what the budget holds
    max_batch: int = 1
    grammars: bool = False  # leave memory for keeping answers to a schema, as serve can
    # None: the kernel reads by itself where it can; threads as measured on this machine, or four.
    num_read_threads: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, options: dict[str, Any]) -> EngineConfig:
        """The configuration with these values. Raises ConfigError, for names it has not too."""
        known = [each.name for each in fields(cls)]
        for name in options.keys() - set(known):
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name}: no such option, expected one of {', '.join(known)}{meant}")
        return cls(**options)

    def __post_init__(self) -> None:
        if self.ram != "auto" and parse_size(self.ram, "ram") < _LEAST_RAM_BYTES:
            raise ConfigError(
                f"ram: got {self.ram!r}, that is {parse_size(self.ram)} bytes, expected memory for "
                f"a whole process; did you mean {str(self.ram).strip()}GiB?"
            )
        _check_devices(self.device, self.devices)
        _ = self.vram_bytes  # which says what is wrong with it
        if self.device == "cpu" and self.needs_device:
            name = self.needs_device
            raise ConfigError(
                f"{name}: got {getattr(self, name)!r} with device cpu, which computes from RAM; "
                f"leave {name} out, or choose device cuda"
            )
        _choice("dtype", self.dtype, _DTYPES)
        _choice("miss", self.miss, _MISS_RULES)
        _choice("kernel", self.kernel, KERNELS)
        _positive("ram_slots", self.ram_slots)
        _positive("vram_slots", self.vram_slots)
        _positive("max_context", self.max_context)
        _positive("max_batch", self.max_batch)
        if not isinstance(self.grammars, bool):
            raise ConfigError(f"grammars: got {self.grammars!r}, expected True or False")
        _positive("num_read_threads", self.num_read_threads)

    @property
    def ram_bytes(self) -> int | None:
        """The budget in bytes, None for "auto"."""
        return None if self.ram == "auto" else parse_size(self.ram, "ram")

    @property
    def needs_device(self) -> str:
        """An option that was chosen and makes no sense without a device; "" if there is none."""
        chosen = {"vram": self.vram != "auto", "vram_slots": self.vram_slots is not None}
        chosen["miss"] = self.miss != "copy"
        return next((name for name, is_chosen in chosen.items() if is_chosen), "")

    @property
    def devices(self) -> tuple[str, ...]:
        """Names, the model's own first."""
        return tuple(name.strip() for name in self.device.split(","))

    @property
    def vram_bytes(self) -> tuple[int | None, ...]:
        """Each device's budget in bytes, None for "auto". Raises ConfigError."""
        sizes = [size.strip() for size in str(self.vram).split(",")]
        if len(sizes) == 1:
            sizes *= len(self.devices)
        if len(sizes) != len(self.devices):
            raise ConfigError(
                f"vram: got {len(sizes)} sizes ({self.vram}), expected one, or one for each of the "
                f"devices named: {self.device}"
            )
        return tuple(None if size == "auto" else parse_size(size, "vram") for size in sizes)


def _check_devices(given: str, names: tuple[str, ...]) -> None:
    """Raise ConfigError for what no device is called, and for what cannot be used together."""
    expected = "expected auto, cpu, cuda, cuda:N or simulated"
    kinds = {name.partition(":")[0] for name in names}
    if not all(map(_DEVICE.fullmatch, names)):
        raise ConfigError(f"device: got {given!r}, {expected}, or several such as cuda:0,cuda:1")
    if len(names) == 1:
        return
    if len(kinds) > 1 or not kinds <= {*_IN_LISTS}:
        raise ConfigError(
            f"device: got {given!r}, expected several of one kind ({' or '.join(_IN_LISTS)}), or "
            f"one device"
        )
    indices = [int(name.partition(":")[2] or 0) for name in names if name.startswith("cuda")]
    if len(set(indices)) < len(indices):
        raise ConfigError(f"device: got {given!r}, expected each GPU once")


def _choice(name: str, got: str | None, known: tuple[str | None, ...]) -> None:
    if got not in known:
        raise ConfigError(f"{name}: got {got!r}, expected one of {', '.join(filter(None, known))}")


def _positive(name: str, got: int | None) -> None:
    if got is not None and (not isinstance(got, int) or isinstance(got, bool) or got < 1):
        raise ConfigError(f"{name}: got {got!r}, expected a whole number of at least 1")
