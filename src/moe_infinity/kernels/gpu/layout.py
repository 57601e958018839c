"""How an expert lies in its slot, apart from where: what a GPU launch knows beforehand of all its
experts, and the addresses that are each one's own. Knows nothing of Triton.

A row of a *table* of experts is NUM_FIELDS addresses: of gate, up and down each the codes, the
scales (EXACT12: its lists), the zero points and the bias; 0 where there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moe_infinity.kernels.activations import recognise
from moe_infinity.kernels.base import ExpertMath, Views
from moe_infinity.kernels.described import Blocks, num_cols, num_rows
from moe_infinity.kernels.gguf_formats import BLOCKS
from moe_infinity.kernels.packed import PackedMatrix, row_bytes, side_offset

FIELDS = 4  # of one matrix in a row of a table
GATE, UP, DOWN = 0, FIELDS, 2 * FIELDS
NUM_FIELDS = 3 * FIELDS
PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_WIDEST = 16  # bytes of one load
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, **{name: size for name, (_, size) in BLOCKS.items()}}
_IN_COLUMNS = ("GPTQ", "GPTQ_V2", "AWQ")  # neighbours in memory are rows of one column
_MOST_BYTES = 2**31  # within a matrix offsets are int32
Row = tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """[rows, cols] of a block: row r of it is the block's row first + every * r.

    row_stride, col_stride: of plain numbers in elements, of codes the first one in bytes. align:
    divides every address of codes, in bytes. scale, zero and bias strides are in elements. group:
    rows and columns of weights that one scale stands for.
    """

    format: str
    rows: int
    cols: int
    first: int
    every: int
    block_rows: int
    row_stride: int
    col_stride: int
    align: int
    scale_format: str = ""
    scale_rows: int = 0
    scale_cols: int = 0
    group_rows: int = 1
    group_cols: int = 1
    has_zeros: bool = False
    zero_rows: int = 0
    zero_cols: int = 0
    bias_format: str = ""
    bias_stride: int = 0

    @property
    def is_tall(self) -> bool:
        """Whether neighbours in memory are rows, not columns."""
        return self.format in _IN_COLUMNS or self.col_stride > 1


@dataclass(frozen=True)
class Layout:
    """activation: a number of kernels/activations.py; 0: torch does the model's own gate.
    is_interleaved: how the model's own gate wants gate and up."""

    gate: Matrix | None
    up: Matrix
    down: Matrix
    activation: int
    is_interleaved: bool

    @property
    def hidden(self) -> int:
        return self.up.cols

    @property
    def inner(self) -> int:
        return self.up.rows


@dataclass(frozen=True)
class Kind:
    """What of an ExpertMath shows in layouts."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_interleaved: bool
    activation: int


def kind_of(rules: ExpertMath) -> Kind:
    return Kind(
        rules.has_gate,
        rules.has_bias,
        rules.is_transposed,
        rules.is_interleaved,
        recognise(rules) or 0,
    )


def lay_out(kind: Kind, views: Views) -> tuple[Layout, Row] | None:
    """An expert in its slot; None where its shape is none of those known here."""
    name = "gate_up_proj" if kind.has_gate else "up_proj"
    first = _halves(kind, views[name]) if kind.has_gate else _lone(kind, views[name])
    last = _lone(kind, views["down_proj"])
    if first is None or last is None:
        return None
    matrices = [*first, *last]
    if kind.has_bias:
        biases = [*_bias_halves(kind, views[f"{name}_bias"]), *views["down_proj_bias"]]
        if len(biases) != len(matrices):
            return None
        matrices = [_with_bias(m, bias) for m, bias in zip(matrices, biases, strict=True)]
    gate = matrices[0] if kind.has_gate else (None, (0,) * FIELDS)
    up, down = matrices[-2:]
    if any(matrix is None for matrix, _ in (up, down)) or (kind.has_gate and gate[0] is None):
        return None
    assert up[0] is not None and down[0] is not None
    layout = Layout(gate[0], up[0], down[0], kind.activation, kind.is_interleaved)
    return (layout, (*gate[1], *up[1], *down[1])) if _fits(layout) else None


def lay_out_matrix(
    block: PackedMatrix | torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[Matrix, Row] | None:
    """One matrix [out, in] by itself, as the up of an expert."""
    placed = _place(block, False, 0, 1, num_rows(block))
    if bias is not None:
        placed = _with_bias(placed, bias)
    matrix, row = placed
    return None if matrix is None else (matrix, (*(0,) * UP, *row, *(0,) * (NUM_FIELDS - DOWN)))


_Placed = tuple[Matrix | None, Row]


def _fits(layout: Layout) -> bool:
    """The plain kernel says what is wrong with others."""
    inner, hidden = layout.inner, layout.hidden
    gate_fits = layout.gate is None or (layout.gate.rows, layout.gate.cols) == (inner, hidden)
    return gate_fits and (layout.down.rows, layout.down.cols) == (hidden, inner)


def _lone(kind: Kind, blocks: Blocks) -> list[_Placed] | None:
    if len(blocks) != 1:
        return None
    turned = _turned(kind, blocks[0])
    return [_place(blocks[0], turned, 0, 1, _num_rows(blocks[0], turned))]


def _halves(kind: Kind, blocks: Blocks) -> list[_Placed] | None:
    """Gate and up: two blocks, or the two halves of one."""
    turned = _turned(kind, blocks[0])
    rows = [_num_rows(block, _turned(kind, block)) for block in blocks]
    if len(blocks) == 2 and rows[0] == rows[1]:
        return [_place(block, _turned(kind, block), 0, 1, rows[0]) for block in blocks]
    half, odd = divmod(rows[0], 2)
    if len(blocks) != 1 or odd:
        return None
    every, second = (2, 1) if kind.is_interleaved else (1, half)
    return [_place(blocks[0], turned, at, every, half) for at in (0, second)]


def _turned(kind: Kind, block: torch.Tensor | PackedMatrix) -> bool:
    return kind.is_transposed and not isinstance(block, PackedMatrix)


def _num_rows(block: torch.Tensor | PackedMatrix, turned: bool) -> int:
    return num_cols(block) if turned else num_rows(block)


def _place(
    block: torch.Tensor | PackedMatrix, turned: bool, first: int, every: int, rows: int
) -> _Placed:
    if isinstance(block, PackedMatrix):
        return _place_packed(block, first, every, rows)
    if block.ndim != 2 or block.dtype not in PLAIN:
        return None, ()
    whole = block.T if turned else block
    (block_rows, cols), (row_stride, col_stride) = whole.shape, whole.stride()
    size = block.element_size()
    if (block_rows * row_stride + cols * col_stride) * size >= _MOST_BYTES:
        return None, ()
    steps = (row_stride, 1) if col_stride == 1 else (1, col_stride)
    align = math.gcd(_WIDEST, block.data_ptr(), *(step * size for step in steps if step != 1))
    name = PLAIN[block.dtype]
    matrix = Matrix(name, rows, cols, first, every, block_rows, row_stride, col_stride, align)
    return matrix, (block.data_ptr(), 0, 0, 0)


def _place_packed(block: PackedMatrix, first: int, every: int, rows: int) -> _Placed:
    name, at = block.format, block.data.data_ptr()
    stride = row_bytes(name, block.cols)
    if block.rows * stride >= _MOST_BYTES or (name in _IN_COLUMNS and at % 4):
        return None, ()
    align = math.gcd(_WIDEST, at, stride, _BLOCK_BYTES.get(name, _WIDEST))
    if name in _IN_COLUMNS:
        align = math.gcd(_WIDEST, at, 4 * block.rows if name != "AWQ" else block.rows // 2)
    head = (name, rows, block.cols, first, every, block.rows, stride, 1, align)
    if block.scales is None:
        side = side_offset(name, block.rows, block.cols) if name == "EXACT12" else 0
        return Matrix(*head), (at, at + side if side else 0, 0, 0)
    values, group = block.scales
    zeros = block.zeros
    form = "E8M0" if values.dtype is torch.uint8 else PLAIN[values.dtype]
    down, across = (0, 0) if zeros is None else zeros.stride()
    has_zeros = zeros is not None
    matrix = Matrix(*head, form, *values.stride(), *group, has_zeros, down, across)  # type: ignore[call-arg, arg-type]
    return matrix, (at, values.data_ptr(), 0 if zeros is None else zeros.data_ptr(), 0)


def _bias_halves(kind: Kind, blocks: Blocks) -> Blocks:
    if not kind.has_gate or len(blocks) != 1 or not isinstance(blocks[0], torch.Tensor):
        return blocks
    bias = blocks[0]
    return [bias[0::2], bias[1::2]] if kind.is_interleaved else list(bias.chunk(2))


def _with_bias(placed: _Placed, bias: torch.Tensor | PackedMatrix) -> _Placed:
    matrix, row = placed
    if isinstance(bias, PackedMatrix) or bias.dtype not in PLAIN or matrix is None:
        return None, ()
    if bias.shape != (matrix.rows,):
        return None, ()
    ends = {"bias_format": PLAIN[bias.dtype], "bias_stride": bias.stride(0)}
    return Matrix(**{**matrix.__dict__, **ends}), (*row[:3], bias.data_ptr())
