"""Every conversion on strides against the library's own on real tensors."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import core_model_loading as library

from moe_infinity.checkpoint.base import TensorEntry
from moe_infinity.checkpoint.virtual import Virtual, concatenate, run_operations, stack
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError

Tensors = dict[str, list[torch.Tensor]]
ANY_SHAPE = (0,)  # no operation without check_dims looks at it


class Stored:
    """Tensors with a place, so that a virtual tensor can be put together from its pieces."""

    def __init__(self) -> None:
        self.flat: dict[str, torch.Tensor] = {}

    def add(self, tensor: torch.Tensor) -> Virtual:
        name = f"t{len(self.flat)}"
        self.flat[name] = tensor.contiguous().flatten()
        return Virtual.of(TensorEntry(name, "F32", tuple(tensor.shape), 0, 0, tensor.nbytes))

    def materialise(self, virtual: Virtual) -> torch.Tensor:
        out, times = torch.zeros(virtual.shape), torch.zeros(virtual.shape)
        for p in virtual.pieces:
            box = tuple(slice(o, o + n) for o, n in zip(p.origin, p.shape, strict=True))
            out[box] = self.flat[p.entry.name].as_strided(p.shape, p.strides, p.offset)
            times[box] += 1
        assert bool((times == 1).all()), "pieces do not cover the tensor exactly once"
        return out


def compare(
    operations: list[Any],
    tensors: Tensors,
    targets: list[str],
    expected_shape: tuple[int, ...] = ANY_SHAPE,
) -> dict[str, torch.Tensor]:
    """Run both; returns the library's result."""
    stored, sources = Stored(), list(tensors)
    collected = {name: [stored.add(t) for t in found] for name, found in tensors.items()}
    results = run_operations(operations, collected, sources, targets, expected_shape)
    real: Any = {name: list(found) for name, found in tensors.items()}
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(expected_shape))
    for operation in operations:
        real = operation.convert(
            real, sources, targets, model=model, full_layer_name=targets[0], config=None
        )
    assert results.keys() == real.keys()
    for name, virtual in results.items():
        expected = real[name][0] if isinstance(real[name], list) else real[name]
        assert virtual.shape == tuple(expected.shape)
        assert torch.equal(stored.materialise(virtual), expected)
        for row, whole in zip(virtual.unstack(), expected, strict=True):
            assert torch.equal(stored.materialise(row), whole)
    return real


_starts = itertools.count(step=1000)


def numbered(*shape: int) -> torch.Tensor:
    """No other tensor of the test has any of its values."""
    start = float(next(_starts) % 2**23)  # whole numbers that float32 tells apart
    return torch.arange(torch.Size(shape).numel()).reshape(shape) + start


SIZES = st.integers(1, 4)


@given(SIZES, SIZES, SIZES)
def test_merge(num_experts: int, rows: int, columns: int) -> None:
    parts = [numbered(rows, columns) for _ in range(num_experts)]
    compare([library.MergeModulelist(0)], {"e.*.w": parts}, ["e.w"])


@given(SIZES, SIZES, SIZES, SIZES)
def test_merge_then_concatenate(experts: int, gate: int, up: int, columns: int) -> None:
    """The commonest: gate and up of every expert become one parameter."""
    tensors = {
        "e.*.gate": [numbered(gate, columns) for _ in range(experts)],
        "e.*.up": [numbered(up, columns) for _ in range(experts)],
    }
    compare([library.MergeModulelist(0), library.Concatenate(1)], tensors, ["e.gate_up"])


@given(st.lists(SIZES, min_size=1, max_size=4), st.integers(0, 2))
def test_concatenate(lengths: list[int], dim: int) -> None:
    shapes = [[2, 3, 4] for _ in lengths]
    for shape, length in zip(shapes, lengths, strict=True):
        shape[dim] = length
    tensors = {f"s{n}": [numbered(*shape)] for n, shape in enumerate(shapes)}
    compare([library.Concatenate(dim)], tensors, ["t"])


def test_concatenate_takes_the_order_of_the_patterns() -> None:
    stored = Stored()
    first, second = numbered(2, 2), numbered(2, 2)
    collected = {"b": [stored.add(second)], "a": [stored.add(first)]}
    found = run_operations([library.Concatenate(0)], collected, ["a", "gone", "b"], ["t"], (4, 2))
    assert torch.equal(stored.materialise(found["t"]), torch.cat([first, second]))


@given(st.integers(-3, 2), st.integers(-3, 2))
def test_transpose(dim0: int, dim1: int) -> None:
    compare([library.Transpose(dim0, dim1)], {"s": [numbered(2, 3, 4)]}, ["t"])


@pytest.mark.parametrize("expected", [(2, 3, 4), (2, 4, 3)])
def test_transpose_only_to_reach_the_shape(expected: tuple[int, ...]) -> None:
    operation = library.Transpose(1, 2, check_dims=True)
    real = compare([operation], {"s": [numbered(2, 3, 4)]}, ["t"], expected)
    assert tuple(real["t"].shape) == expected


@pytest.mark.parametrize("expected", [(2, 3, 4), (2, 4, 3)])
def test_merge_then_transpose_to_reach_the_shape(expected: tuple[int, ...]) -> None:
    operations = [library.MergeModulelist(0), library.Transpose(1, 2, check_dims=True)]
    compare(operations, {"s": [numbered(3, 4), numbered(3, 4)]}, ["t"], expected)


@given(st.integers(0, 2), SIZES)
def test_interleave(dim: int, half: int) -> None:
    shape = [3, 2, 5]
    shape[dim] = 2 * half
    compare([library.Interleave(dim)], {"s": [numbered(*shape)]}, ["t"])


@given(st.integers(0, 1), SIZES)
def test_transpose_then_interleave(dim: int, half: int) -> None:
    shape = [3, 2 * half, 2 * half]
    operations = [library.Transpose(1, 2), library.Interleave(dim + 1)]
    compare(operations, {"s": [numbered(*shape)]}, ["t"])


@given(st.integers(0, 2), st.integers(1, 3), SIZES)
def test_chunk(dim: int, num_chunks: int, size: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = num_chunks * size
    targets = [f"t{n}" for n in range(num_chunks)]
    compare([library.Chunk(dim)], {"s": [numbered(*shape)]}, targets)


def test_chunk_with_a_shorter_last_part() -> None:
    compare([library.Chunk(1)], {"s": [numbered(2, 5, 3)]}, ["a", "b"])


def test_transpose_then_chunk() -> None:
    operations = [library.Transpose(1, 2), library.Chunk(1)]
    compare(operations, {"s": [numbered(2, 3, 4)]}, ["a", "b"])


@given(st.integers(2, 5), SIZES, SIZES)
def test_chunk_across_pieces(experts: int, gate: int, columns: int) -> None:
    """A part may begin inside one stored tensor and end inside another."""
    stored = Stored()
    tensors = [numbered(gate, columns) for _ in range(experts)]
    joined = concatenate([stored.add(t) for t in tensors], 0)
    whole = torch.cat(tensors)
    for start in range(len(whole)):
        for length in range(1, len(whole) - start + 1):
            found = stored.materialise(joined.narrow(0, start, length))
            assert torch.equal(found, whole[start : start + length])


@given(st.integers(2, 6), SIZES, st.sampled_from([1, 2]))
def test_text_and_vision_experts(num_experts: int, rows: int, concat_dim: int) -> None:
    shapes = [(rows, 3), (rows, 3)]
    tensors = {
        name: [numbered(*shape) for _ in range(num_experts)]
        for name, shape in zip(("gate.*", "up.*"), shapes, strict=True)
    }
    operation = library.ErnieFuseAndSplitTextVisionExperts(0, concat_dim)
    compare([operation], tensors, ["text", "vision"])


@pytest.mark.parametrize("operation", [library.PermuteForRope(), library.SplitModulelist(0)])
def test_an_operation_without_a_form_on_strides(operation: Any) -> None:
    name = type(operation).__name__
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*MergeModulelist"):
        run_operations([operation], {"s": [Stored().add(numbered(2, 2))]}, ["s"], ["t"], (2, 2))


@pytest.mark.parametrize(
    ("operation", "shapes", "targets"),
    [
        (library.MergeModulelist(1), [(2, 2)], ["t"]),
        (library.ErnieFuseAndSplitTextVisionExperts(1, 1), [(2, 2), (2, 2)], ["t", "v"]),
        (library.Interleave(1, inverse=True), [(2, 2)], ["t"]),
        (library.Interleave(1), [(2, 3)], ["t"]),
        (library.Interleave(5), [(2, 2)], ["t"]),
        (library.Interleave(0), [(2, 2), (2, 2)], ["t"]),
        (library.Transpose(0, 7), [(2, 2)], ["t"]),
        (library.Concatenate(4), [(2, 2), (2, 2)], ["t"]),
        (library.Chunk(0), [(5, 2)], ["a", "b", "c", "d"]),  # torch makes three of them
        (library.Chunk(0, "num_experts"), [(4, 2)], ["e.*"]),  # as many as the config says
    ],
)
def test_what_cannot_be_done_in_place(
    operation: Any, shapes: list[tuple[int, ...]], targets: list[str]
) -> None:
    stored = Stored()
    collected = {"s": [stored.add(numbered(*shape)) for shape in shapes]}
    with pytest.raises(UnsupportedModelError, match=type(operation).__name__):
        run_operations([operation], collected, ["s"], targets, ANY_SHAPE)


def test_a_concatenated_tensor_cannot_be_deinterleaved() -> None:
    stored = Stored()
    operations = [library.Concatenate(0), library.Interleave(0)]
    collected = {"s": [stored.add(numbered(2, 2)), stored.add(numbered(2, 2))]}
    with pytest.raises(UnsupportedModelError, match=r"Interleave.*concatenated"):
        run_operations(operations, collected, ["s"], ["t"], ANY_SHAPE)


def test_tensors_that_do_not_fit_together_are_named() -> None:
    stored = Stored()
    parts = [stored.add(numbered(2, 2)), stored.add(numbered(2, 3))]
    with pytest.raises(CorruptCheckpointError, match=r"'t0'.*'t1'"):
        stack(parts)
    with pytest.raises(CorruptCheckpointError, match=r"'t0'.*'t1'"):
        concatenate(parts, 0)
    with pytest.raises(CorruptCheckpointError, match="no tensors"):
        stack([])
