"""Tensors that exist only as places in files, and the library's conversions applied to them.

Loading code describes how checkpoint tensors become parameters (stack, concatenate, transpose,
de-interleave). Here the same steps are taken on strides and offsets, so that the bytes of one
expert can be found, and read, without any of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_infinity.checkpoint.base import TensorEntry
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Piece:
    """A strided box of one stored tensor, placed at ``origin`` in a virtual one (in elements)."""

    entry: TensorEntry
    offset: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Virtual:
    """A tensor made of disjoint pieces that cover it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, entry: TensorEntry) -> Virtual:
        strides, step = [], 1
        for size in reversed(entry.shape):
            strides.append(step)
            step *= size
        zero = (0,) * len(entry.shape)
        piece = Piece(entry, 0, zero, entry.shape, tuple(reversed(strides)))
        return cls(entry.shape, (piece,))

    def unstack(self) -> list[Virtual]:
        """One virtual tensor per index of the first dimension."""
        rows: list[list[Piece]] = [[] for _ in range(self.shape[0])]
        for p in self.pieces:
            for i in range(p.shape[0]):
                offset = p.offset + i * p.strides[0]
                row = Piece(p.entry, offset, p.origin[1:], p.shape[1:], p.strides[1:])
                rows[p.origin[0] + i].append(row)
        return [Virtual(self.shape[1:], tuple(pieces)) for pieces in rows]

    def transpose(self, a: int, b: int) -> Virtual:
        def swap(values: tuple[int, ...]) -> tuple[int, ...]:
            swapped = list(values)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            return tuple(swapped)

        pieces = tuple(
            replace(p, origin=swap(p.origin), shape=swap(p.shape), strides=swap(p.strides))
            for p in self.pieces
        )
        return Virtual(swap(self.shape), pieces)

    def narrow(self, dim: int, start: int, length: int) -> Virtual:
        pieces = []
        for p in self.pieces:
            low = max(p.origin[dim], start)
            high = min(p.origin[dim] + p.shape[dim], start + length)
            if low < high:
                offset = p.offset + (low - p.origin[dim]) * p.strides[dim]
                origin = _with(p.origin, dim, low - start)
                pieces.append(
                    replace(p, offset=offset, origin=origin, shape=_with(p.shape, dim, high - low))
                )
        return Virtual(_with(self.shape, dim, length), tuple(pieces))

    def deinterleave(self, dim: int) -> Virtual:
        """Even indices of ``dim`` first, odd ones after them."""
        half = self.shape[dim] // 2
        if self.shape[dim] % 2:
            raise ValueError(f"{self.shape[dim]} rows cannot be de-interleaved")
        pieces = []
        for p in self.pieces:
            if p.shape[dim] != self.shape[dim]:
                raise ValueError("a tensor that was concatenated cannot be de-interleaved")
            strides = _with(p.strides, dim, 2 * p.strides[dim])
            for parity in (0, 1):
                pieces.append(
                    replace(
                        p,
                        offset=p.offset + parity * p.strides[dim],
                        origin=_with(p.origin, dim, parity * half),
                        shape=_with(p.shape, dim, half),
                        strides=strides,
                    )
                )
        return Virtual(self.shape, tuple(pieces))


def stack(parts: Sequence[Virtual]) -> Virtual:
    """Join equal shapes along a new first dimension."""
    _refuse_mismatch(parts, [part.shape for part in parts], "equal shapes")
    pieces = tuple(
        replace(p, origin=(i, *p.origin), shape=(1, *p.shape), strides=(0, *p.strides))
        for i, part in enumerate(parts)
        for p in part.pieces
    )
    return Virtual((len(parts), *parts[0].shape), pieces)


def concatenate(parts: Sequence[Virtual], dim: int) -> Virtual:
    """Join along an existing dimension."""
    shapes = [_with(part.shape, dim, 0) for part in parts]
    _refuse_mismatch(parts, shapes, f"shapes that differ at most in dimension {dim}")
    pieces, start = [], 0
    for part in parts:
        pieces += [
            replace(p, origin=_with(p.origin, dim, p.origin[dim] + start)) for p in part.pieces
        ]
        start += part.shape[dim]
    return Virtual(_with(parts[0].shape, dim, start), tuple(pieces))


def _refuse_mismatch(
    parts: Sequence[Virtual], compared: Sequence[tuple[int, ...]], expected: str
) -> None:
    """The library would stop here too: a tensor is missing, or is not the one its name says."""
    if not parts:
        raise CorruptCheckpointError("got no tensors for some experts; is a shard missing?")
    for part, shape in zip(parts, compared, strict=True):
        if shape != compared[0]:
            raise CorruptCheckpointError(
                f"expert tensors {_first_name(parts[0])} (shape {list(parts[0].shape)} with those "
                f"that belong to it) and {_first_name(part)} ({list(part.shape)}) do not fit "
                f"together, expected {expected}; is a tensor missing?"
            )


def _first_name(virtual: Virtual) -> str:
    return repr(virtual.pieces[0].entry.name) if virtual.pieces else "of no bytes"


Collected = dict[str, list[Virtual]]
_Step = Callable[[Any, Collected, list[str], list[str]], Collected]


def run_operations(
    operations: Sequence[Any],
    collected: Collected,
    sources: list[str],
    targets: list[str],
    expected_shape: tuple[int, ...],
) -> dict[str, Virtual]:
    """Take a WeightConverter's operations on virtual tensors. Returns them by target pattern.

    expected_shape: of the first target's parameter; some conversions transpose only to reach it.
    Raises UnsupportedModelError for an operation that has no form on strides,
    CorruptCheckpointError for tensors that do not fit together.
    """
    for operation in operations:
        step = _STEPS.get(type(operation).__name__)
        if step is None:
            raise UnsupportedModelError(
                f"experts are stored in a form that needs the conversion "
                f"{type(operation).__name__}, which cannot be done in place; there are: "
                f"{', '.join(sorted(_STEPS))}"
            )
        try:
            checks = getattr(operation, "check_dims", False)
            if checks and _single(collected).shape == expected_shape:
                collected = {targets[0]: [_single(collected)]}
            else:
                collected = step(operation, collected, sources, targets)
        except (ValueError, IndexError) as error:
            raise UnsupportedModelError(
                f"{type(operation).__name__} cannot be done in place on these experts: {error}"
            ) from error
    return {name: parts[0] for name, parts in collected.items()}


def _merge(op: Any, collected: Collected, sources: list[str], targets: list[str]) -> Collected:
    _expect_first(op.dim)
    only = len(collected) == 1
    return {targets[0] if only else name: [stack(parts)] for name, parts in collected.items()}


def _concat(op: Any, collected: Collected, sources: list[str], targets: list[str]) -> Collected:
    parts = [part for name in sources if name in collected for part in collected[name]]
    return {targets[0]: [concatenate(parts, op.dim)]}


def _transpose(op: Any, collected: Collected, sources: list[str], targets: list[str]) -> Collected:
    part = _single(collected)
    name = sources[0] if len(targets) > 1 else targets[0]
    return {name: [part.transpose(op.dim0, op.dim1)]}


def _interleave(op: Any, collected: Collected, sources: list[str], targets: list[str]) -> Collected:
    if op.inverse:
        raise ValueError("interleaving is not a view")
    return {targets[0]: [_single(collected).deinterleave(op.dim)]}


def _chunk(op: Any, collected: Collected, sources: list[str], targets: list[str]) -> Collected:
    if getattr(op, "num_shards_attribute", None):
        raise ValueError("the number of its parts is in the config")
    part = _single(collected)
    size = -(-part.shape[op.dim] // len(targets))
    starts = range(0, part.shape[op.dim], size)
    return {
        name: [part.narrow(op.dim, start, min(size, part.shape[op.dim] - start))]
        for name, start in zip(targets, starts, strict=True)
    }


def _split_modalities(
    op: Any, collected: Collected, sources: list[str], targets: list[str]
) -> Collected:
    """Ernie VL: one list of experts, the first ones for text, the rest for images."""
    _expect_first(op.stack_dim)
    split: Collected = {target: [] for target in targets}
    for name in sources:
        parts = collected.get(name, [])
        size = -(-len(parts) // len(targets))
        for number, target in enumerate(targets):
            split[target].append(stack(parts[number * size : (number + 1) * size]))
    return {name: [concatenate(parts, op.concat_dim)] for name, parts in split.items()}


_STEPS: Mapping[str, _Step] = {
    "MergeModulelist": _merge,
    "Concatenate": _concat,
    "Transpose": _transpose,
    "Interleave": _interleave,
    "Chunk": _chunk,
    "ErnieFuseAndSplitTextVisionExperts": _split_modalities,
}


def _expect_first(dim: int) -> None:
    if dim != 0:
        raise ValueError(f"experts are stacked along dimension {dim}, expected 0")


def _single(collected: Collected) -> Virtual:
    (parts,) = collected.values()
    if len(parts) != 1:
        raise ValueError(f"got {len(parts)} tensors, expected one")
    return parts[0]


def _with(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    if not -len(values) <= index < len(values):
        raise ValueError(f"got {len(values)} dimensions, expected one numbered {index}")
    index %= len(values)
    return (*values[:index], value, *values[index + 1 :])
