"""Where the codes, scales and zero points of some rows of a coded tensor lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_infinity.checkpoint.base import SidePlane, Sides
from moe_infinity.checkpoint.spans import Span, slot_offset
from moe_infinity.checkpoint.virtual import Piece
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError
from moe_infinity.kernels.formats import SIDE_DTYPES
from moe_infinity.kernels.packed import row_bytes
from moe_infinity.types import Block, Plane, ReadRange

_IN_ROWS = ("MXFP4_PLANES", "F8_E4M3", "INT4")  # others hold several rows in a word


@dataclass(frozen=True, slots=True)
class CodedPlace:
    """Rows first..first+rows-1 of a tensor [all rows, cols]."""

    piece: Piece
    sides: Sides
    first: int
    rows: int
    cols: int

    @classmethod
    def of(cls, piece: Piece, sides: Mapping[str, Sides]) -> CodedPlace:
        """Raises UnsupportedModelError for a piece that is not whole rows, CorruptCheckpointError
        for a tensor without scales."""
        entry = piece.entry
        if entry.name not in sides:
            raise CorruptCheckpointError(
                f"tensor {entry.name!r} is stored as {entry.format} without scales, expected them "
                f"beside it and a quantization_config in config.json"
            )
        *lead, num_rows, cols = entry.shape
        all_rows = math.prod(lead) * num_rows
        inner = next((d for d, s in enumerate(piece.strides) if s == 1), -1)
        is_rows = len(piece.shape) == 2 and inner >= 0 and piece.shape[inner] == cols
        is_rows = is_rows and piece.strides[1 - inner] == cols and piece.offset % cols == 0
        rows = piece.shape[1 - inner] if is_rows else 0
        found = cls(piece, sides[entry.name], piece.offset // cols, rows, cols)
        is_whole = found.first == 0 and rows == all_rows
        splits = any(found.first % plane.group[0] for plane in found._planes)
        if not is_rows or splits or not (is_whole or entry.format in _IN_ROWS):
            raise UnsupportedModelError(
                f"expert tensor {entry.name!r} ({entry.format}) would have to be taken apart, "
                f"expected whole rows and groups of it; use the model's 16-bit checkpoint"
            )
        return found

    @property
    def spans(self) -> Sequence[Span]:
        return (self._codes, *(self._span(plane) for plane in self._planes))

    @property
    def num_bytes(self) -> int:
        return sum(span.end - span.start for span in self.spans)

    def block(self, origin: int, ranges: list[ReadRange]) -> Block:
        """In rows, whatever the model calls them."""

        def plane(side: SidePlane | None) -> Plane | None:
            if side is None:
                return None
            span = self._span(side)
            at = slot_offset(ranges, span.file, span.start)
            shape = (self._num_rows_of(side), side.shape[1])
            return Plane(at, side.entry.format, shape, side.strides, side.group)

        codes = self._codes
        at = slot_offset(ranges, codes.file, codes.start)
        shape, strides = (self.rows, self.cols), (self.cols, 1)
        return Block(at, shape, strides, origin, plane(self.sides.scales), plane(self.sides.zeros))

    @property
    def _planes(self) -> list[SidePlane]:
        return [plane for plane in self.sides if plane is not None]

    @property
    def _codes(self) -> Span:
        entry = self.piece.entry
        size = row_bytes(entry.format, self.cols)
        start = entry.offset + self.first * size
        return Span(entry.file, start, start + self.rows * size)

    def _num_rows_of(self, plane: SidePlane) -> int:
        return -(-self.rows // plane.group[0])

    def _span(self, plane: SidePlane) -> Span:
        item, stride = SIDE_DTYPES[plane.entry.format].itemsize, plane.strides[0]
        start = plane.entry.offset + self.first // plane.group[0] * stride * item
        last = (self._num_rows_of(plane) - 1) * stride + (plane.shape[1] - 1) * plane.strides[1]
        return Span(plane.entry.file, start, start + (last + 1) * item)
