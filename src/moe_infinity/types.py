"""The words every layer shares: expert keys, expert specs, size classes. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

Phase = Literal["prefill", "decode"]
TierName = Literal["disk", "ram", "vram"]


class ExpertKey(NamedTuple):
    """One routed expert. ``layer`` counts MoE layers from 0, ``expert`` experts within it."""

    layer: int
    expert: int


class Priority(IntEnum):
    """Order of service in a transfer queue: a demand load goes before every prefetch."""

    DEMAND = 0
    PREFETCH = 1


@dataclass(frozen=True, slots=True)
class Plane:
    """Numbers that a coded block keeps apart from its codes, as they lie in a slot.

    shape, strides: in elements, [out, in] order. group: how many rows and columns of weights one
    stands for.
    """

    offset_bytes: int
    format: str
    shape: tuple[int, int]
    strides: tuple[int, int]
    group: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Block:
    """A strided rectangle of one part's matrix, as it lies in a slot.

    offset_bytes: from the start of the slot. shape, strides: in elements, [out, in] order of the
    part as the model sees it (one dimension for biases). origin: the rectangle's first row (or
    column) along the dimension in which blocks follow one another. scales, zeros: of what is
    coded, where they lie apart.
    """

    offset_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    origin: int
    scales: Plane | None = None
    zeros: Plane | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an expert (``gate_up_proj``, ``down_proj``, a bias).

    Its blocks follow one another along ``concat_dim`` and cover it completely.
    """

    name: str
    format: str  # a name of kernels/formats.py: "BF16", "F16", "F32"
    shape: tuple[int, ...]
    concat_dim: int
    blocks: tuple[Block, ...]


class ReadRange(NamedTuple):
    """Consecutive bytes of one file that land at one place of a slot.

    file_offset, num_bytes and slot_offset are multiples of the store's alignment; the last range
    of a file may reach past its end, ``needed_bytes`` says how much has to arrive.
    """

    file: int
    file_offset: int
    num_bytes: int
    needed_bytes: int
    slot_offset: int


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """Where an expert's bytes are and how they lie once they are in a slot."""

    key: ExpertKey
    parts: tuple[Part, ...]
    ranges: tuple[ReadRange, ...]
    weight_bytes: int  # bytes the computation uses

    @property
    def read_bytes(self) -> int:
        """Bytes one load moves, alignment included."""
        return sum(r.num_bytes for r in self.ranges)

    @property
    def slot_bytes(self) -> int:
        return max(r.slot_offset + r.num_bytes for r in self.ranges)


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The grid of routed experts of a model, and how many one token uses."""

    num_layers: int
    num_experts: int  # the largest of all layers
    top_k: int
    experts_per_layer: tuple[int, ...]

    @property
    def num_total(self) -> int:
        return sum(self.experts_per_layer)

    @property
    def working_set(self) -> int:
        """Experts one token touches in one pass: below this many slots recency collapses."""
        return self.num_layers * self.top_k
