"""Jobs on the GPU's kernel: how they are batched, cut and placed does not show in results."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from moe_infinity.kernels.base import ExpertMath, Job, Views
from moe_infinity.kernels.gpu import kernel as gpu
from moe_infinity.kernels.gpu.launches import Jobs
from moe_infinity.kernels.gpu.layout import kind_of, lay_out
from moe_infinity.kernels.gpu.tuning import FEW, Tuning
from moe_infinity.kernels.packed import PackedMatrix
from support.gpu import (
    DEVICE,
    FORMATS,
    GATED,
    LARGE,
    OF_256,
    Shape,
    close,
    encoded,
    expert,
    random,
    stored,
    strange,
    there,
    views_there,
)

KERNEL = gpu.Kernel(DEVICE, LARGE)
POSTED = ExpertMath(True, False, False, GATED.gate, lambda x: 3 * x + 1)
SMALL_SHAPE = Shape(40, 24)


def one(number_format: str, value: int) -> dict[str, int]:
    return {"most_tokens": 1024, "rows": value, "num_warps": 4, "num_stages": 2}


def cut(rows: int, tokens: int, columns: int) -> Tuning:
    many = {**one("many", max(16, rows)), "tokens": tokens, "columns": columns}
    return Tuning((one("few", rows),), (one("tall", rows),), (many,))


@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact12_equals_bf16_to_the_bit(tokens: int, dtype: torch.dtype) -> None:
    parts = {"gate_up_proj": [strange(67, 300, seed) for seed in (1, 2)]}
    parts["down_proj"] = [strange(300, 67, 3)]
    x = (random(tokens, 300, seed=3) * 10).to(dtype).to(DEVICE)
    packed = {name: [encoded(each, "EXACT12") for each in part] for name, part in parts.items()}
    found = [KERNEL.forward(GATED, views_there(Views(each)), x) for each in (parts, packed)]
    assert torch.equal(*found)


@settings(max_examples=12)
@given(st.integers(1, 40), st.integers(1, 330), st.sampled_from([1, 2, 9]))
@example(1, 1, 1)
@example(3, 256, 2)
@example(2, 255, 9)
@example(33, 129, 9)
def test_exact12_of_any_shape(rows: int, cols: int, tokens: int) -> None:
    whole = random(rows, cols).bfloat16()
    whole[rows // 2, cols // 3] = 1e-30
    x = random(tokens, cols, seed=1).bfloat16().to(DEVICE)
    packed = encoded_or_none(whole)
    if packed is not None:
        found, expected = (KERNEL.linear(there(each), x) for each in (packed, whole))
        assert torch.equal(found, expected)
    KERNEL.close()


def encoded_or_none(whole: torch.Tensor) -> PackedMatrix | None:
    try:
        return encoded(whole, "EXACT12")
    except AssertionError:  # more exceptions than pay
        return None


@settings(max_examples=20)
@given(st.data())
def test_products_of_any_shape_and_address(data: st.DataObject) -> None:
    number_format = data.draw(st.sampled_from(FORMATS))
    plain = number_format in ("BF16", "F16", "F32", "EXACT12")
    step = 1 if plain else 256 if number_format in OF_256 else 32
    cols = step * data.draw(st.integers(1, 600 // step))
    rows = data.draw(st.integers(1, 9)) * (1 if step > 32 or plain else 8)
    block = there(stored(number_format, rows, cols))
    if isinstance(block, PackedMatrix):
        offset = data.draw(st.sampled_from([0, 1, 2, 4, 6, 8]))
        room = block.data.new_full((block.data.numel() + 64,), 0xFF)
        moved = room[offset : offset + block.data.numel()]
        moved.copy_(block.data)
        block = PackedMatrix(number_format, rows, cols, moved, block.scales, block.zeros)
    tokens = data.draw(st.sampled_from([1, 3, FEW + 1, 17]))
    x = random(tokens, cols, seed=1).to(DEVICE)
    bias = data.draw(st.sampled_from([None, random(rows, seed=2).to(DEVICE)]))
    whole = KERNEL._on_device(block, False).float()
    close(KERNEL.linear(block, x, bias), torch.nn.functional.linear(x, whole, bias).cpu())
    KERNEL.close()


def some_jobs(counts: list[int]) -> list[Job]:
    jobs = []
    for seed, count in enumerate(counts):
        views = views_there(expert(("BF16", "EXACT12", "BF16")[seed % 3], SMALL_SHAPE, seed))
        x = (random(count, 40, seed=seed) * 10).bfloat16().to(DEVICE)
        jobs.append(Job(views, x, torch.empty_like(x)))
    return jobs


@pytest.mark.parametrize("math", [GATED, POSTED], ids=["plain", "post"])
def test_jobs_together_are_those_apart(math: ExpertMath) -> None:
    jobs = some_jobs([1, 3, 8, 9, 1, 20])
    expected = [KERNEL.forward(math, job.views, job.x) for job in jobs]
    KERNEL.run(math, jobs)
    for job, each in zip(jobs, expected, strict=True):
        assert torch.equal(job.out, each)


def test_few_tokens_do_not_see_one_another() -> None:
    (job,) = some_jobs([FEW])
    together = KERNEL.forward(GATED, job.views, job.x)
    for token in range(FEW):
        alone = KERNEL.forward(GATED, job.views, job.x[token : token + 1])
        assert torch.equal(alone[0], together[token])


def test_how_launches_are_cut_does_not_show() -> None:
    (few, many) = some_jobs([3, 19])
    for job in (few, many):
        expected = KERNEL.forward(GATED, job.views, job.x)
        for tuning in (cut(4, 16, 64), cut(16, 32, 256)):
            found = gpu.Kernel(DEVICE, tuning).forward(GATED, job.views, job.x)
            assert job is many or torch.equal(
                found, expected
            )  # of dot the interpreter's is numpy's
            close(found, expected.cpu())


@pytest.mark.parametrize("math", [GATED, POSTED], ids=["plain", "post"])
def test_only_the_places_asked_for_are_written(math: ExpertMath) -> None:
    """Tokens and places as rows of two tensors, as decode has them, in any order."""
    jobs = some_jobs([1, 1, 1])
    x = torch.stack([random(40, seed=1), random(40, seed=2)]).bfloat16().to(DEVICE)
    room = torch.full((9, 40), 7.0).bfloat16().to(DEVICE)
    out = room[1:8]
    places, tokens = [5, 0, 3], [1, 0, 1]
    placed = [
        Job(job.views, x[token : token + 1], out[place : place + 1])
        for job, token, place in zip(jobs, tokens, places, strict=True)
    ]
    KERNEL.run(math, placed)
    for job in placed:
        assert torch.equal(job.out, KERNEL.forward(math, job.views, job.x))
    others = [row for row in range(9) if row - 1 not in places]
    assert (room[others] == 7).all()


@pytest.mark.parametrize("math", [GATED, POSTED], ids=["plain", "post"])
@pytest.mark.parametrize("is_many", [False, True])
def test_jobs_on_the_device_and_those_of_no_expert(math: ExpertMath, is_many: bool) -> None:
    jobs = some_jobs([2, 1, 2])[::2]
    found = [lay_out(kind_of(math), job.views) for job in jobs]
    assert found[0] is not None and found[1] is not None and found[0][0] == found[1][0]
    table = torch.tensor([found[0][1], found[1][1]], dtype=torch.int64)
    x = torch.cat([job.x for job in jobs])
    whole = torch.full((8, 40), 7.0).bfloat16().to(DEVICE)
    lists = ([1, -1, 0, -1], [0, 2, 4, 6, 7], [2, 3, 0, 1, 1, 0, 0], [6, 4, 1, 2, 3, 0, 5])
    on_device = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in lists]
    way = LARGE.way(FEW + 1 if is_many else 2, False)
    KERNEL.compute(math, found[0][0], way, Jobs(table.to(DEVICE), *on_device), x, whole)
    expected = [KERNEL.forward(math, job.views, job.x) for job in jobs]
    close(whole[[6, 4]], expected[1].cpu())
    close(whole[[0, 3]], expected[0].cpu())
    assert (whole[[1, 2, 5, 7]] == 7).all()


def test_layers_with_leading_dimensions_and_none() -> None:
    block = there(stored("Q8_0", 24, 64))
    x = random(2, 3, 64).to(DEVICE)
    found = KERNEL.linear(block, x)
    assert torch.equal(found, KERNEL.linear(block, x.reshape(6, 64)).reshape(2, 3, 24))
    assert KERNEL.linear(block, x[:0]).shape == (0, 3, 24)
    KERNEL.close()
