"""Compiled kernels against plain ones, on every instruction set that this processor has."""

import itertools
import threading

import numpy as np
import pytest
import torch

from moe_infinity.errors import ConfigError
from moe_infinity.kernels import native
from moe_infinity.kernels.activations import recognise
from moe_infinity.kernels.base import ExpertMath, Job, Views
from moe_infinity.kernels.choice import choose
from moe_infinity.kernels.described import describe
from moe_infinity.kernels.packed import PackedMatrix, encode, row_bytes
from moe_infinity.kernels.reference import Kernel as Reference

pytestmark = pytest.mark.skipif(native.native is None, reason="installed without a compiler")

SETS = native.native.instruction_sets() if native.native is not None else []
TYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = ("BF16", "F16", "F32", "Q8_0", "Q4_0", "EXACT12")
# Of the largest value. Products are summed in float32: what is left is the rounding of the result,
# and for Q8_0 and Q4_0 that of the tokens to 8 bits.
ROUNDING = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
GROUPED = 0.02
FEW = 7  # tokens: multiplied one way by all kernels, MANY in another by some
MANY = 32


def silu_gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def odd_gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.clamp(max=7)) * (up + 1)


GATED = ExpertMath(True, False, False, silu_gate)


@pytest.fixture(params=SETS)
def kernel(request: pytest.FixtureRequest) -> native.Kernel:
    return native.Kernel(2, str(request.param))


def stored(matrix: torch.Tensor, number_format: str) -> torch.Tensor | PackedMatrix:
    plain = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    if number_format in plain:
        return matrix.to(plain[number_format])
    data = encode(matrix.bfloat16(), number_format)
    assert data is not None
    return PackedMatrix(number_format, *matrix.shape, torch.from_numpy(data))


def plain(block: torch.Tensor | PackedMatrix) -> torch.Tensor:
    return (block.decode() if isinstance(block, PackedMatrix) else block).float()


def random(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + rows + cols)
    return torch.randn(rows, cols, generator=generator) * 0.05


def product(kernel: native.Kernel, block: torch.Tensor | PackedMatrix, x: torch.Tensor):
    rows = block.rows if isinstance(block, PackedMatrix) else len(block)
    return kernel.linear(describe(block), rows, x.contiguous())


def close(found: torch.Tensor, expected: torch.Tensor, number_format: str) -> None:
    tolerance = ROUNDING[found.dtype] + (GROUPED if number_format[0] == "Q" else 0)
    error = (found.float() - expected).abs().max()
    assert error <= tolerance * expected.abs().max() + 1e-7, float(error)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(64, 256), (7, 96), (33, 160), (5, 1408), (1, 32), (6, 2080), (40, 4160)]
)
def test_products(kernel: native.Kernel, number_format: str, shape: tuple[int, int]) -> None:
    block = stored(random(*shape), number_format)
    for dtype, tokens in itertools.product(TYPES, (1, 3, 4, 9, 20, 107)):
        x = (random(tokens, shape[1], seed=1) * 20).to(dtype)
        close(product(kernel, block, x), x.float() @ plain(block).T, number_format)


@pytest.mark.parametrize("number_format", ["BF16", "F16", "F32", "EXACT12"])
@pytest.mark.parametrize("cols", [1, 2, 31, 33, 63, 65, 127, 129, 191])
def test_columns_of_any_number(kernel: native.Kernel, number_format: str, cols: int) -> None:
    block = stored(random(9, cols), number_format)
    for dtype in TYPES:
        for tokens in (2, 15):
            x = (random(tokens, cols, seed=1) * 20).to(dtype)
            close(product(kernel, block, x), x.float() @ plain(block).T, number_format)


@pytest.mark.parametrize("number_format", ["Q8_0", "Q4_0"])
def test_a_row_that_is_not_finite_leaves_others_alone(
    kernel: native.Kernel, number_format: str
) -> None:
    """Five groups to a row: fewer than are read at once are left at its end."""
    block = stored(random(10, 160), number_format)
    assert isinstance(block, PackedMatrix)
    x = random(MANY, 160, seed=1).bfloat16()
    before = {count: product(kernel, block, x[:count]) for count in (1, FEW, MANY)}
    rows = block.data.view(10, row_bytes(number_format, 160))
    rows[1::2, :2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)  # a scale that is NaN
    for count, expected in before.items():
        found = product(kernel, block, x[:count])
        assert torch.equal(found[:, ::2], expected[:, ::2]) and found[:, 1::2].isnan().all()


@pytest.mark.parametrize("cols", [160, 544])  # short rows and long ones, with groups left over
@pytest.mark.parametrize("number_format", FORMATS)
def test_a_result_depends_on_its_row_and_token_alone(
    kernel: native.Kernel, number_format: str, cols: int
) -> None:
    """Not on threads or addresses, nor on other tokens: there is one way for few tokens and one
    for many."""
    block = stored(random(53, cols), number_format)
    x = (random(117, cols, seed=1) * 20).bfloat16()
    few = product(kernel, block, x[:FEW])
    for token in range(FEW):
        assert torch.equal(product(kernel, block, x[token : token + 1])[0], few[token])
    for count in range(2, FEW):
        assert torch.equal(product(kernel, block, x[:count]), few[:count])
    together = product(kernel, block, x)
    for start, end in ((0, MANY), (3, 100), (5, 45), (85, 117)):
        assert torch.equal(product(kernel, block, x[start:end]), together[start:end])
    for threads in (1, 3):
        other = native.Kernel(threads, kernel.instruction_set)
        assert torch.equal(product(other, block, x), together)
    for offset in (2, 4, 6, 34):
        if isinstance(block, PackedMatrix):
            room = torch.empty(block.data.numel() + 64, dtype=torch.uint8)
            moved = room[offset : offset + block.data.numel()]
            moved.copy_(block.data)
            if number_format == "EXACT12" and offset % 4:
                continue  # its lists are words
            again = product(kernel, PackedMatrix(number_format, 53, cols, moved), x)
        else:
            room = torch.empty(block.numel() + 64, dtype=block.dtype)
            moved = room[offset : offset + block.numel()].view(block.shape)
            moved.copy_(block)
            again = product(kernel, moved, x)
        assert torch.equal(again, together)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact12_equals_bf16_to_the_bit(kernel: native.Kernel, dtype: torch.dtype) -> None:
    matrix = random(70, 2500).bfloat16()
    strange = np.random.default_rng(0).choice(matrix.numel(), 600, replace=False)
    matrix.view(-1)[strange] = torch.tensor([0.0, -0.0, 1e-38, 30.0, -1e4]).bfloat16().repeat(120)
    for tokens in (1, 5, 40):
        x = (random(tokens, 2500, seed=1) * 20).to(dtype)
        packed, whole = (product(kernel, stored(matrix, f), x) for f in ("EXACT12", "BF16"))
        assert torch.equal(packed, whole)


@pytest.mark.parametrize("tokens", [1, 33, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_experts_of_exact12_equal_bf16_to_the_bit(
    kernel: native.Kernel, tokens: int, dtype: torch.dtype
) -> None:
    matrices = {"gate_up_proj": [random(192, 512), random(192, 512, 2)]}
    matrices["down_proj"] = [random(512, 192)]
    x = (random(tokens, 512, seed=3) * 20).to(dtype)
    found = [
        kernel.forward(
            GATED, Views({n: [stored(m, f) for m in ms] for n, ms in matrices.items()}), x
        )
        for f in ("EXACT12", "BF16")
    ]
    assert torch.equal(*found)


def test_experts_together_are_those_apart(kernel: native.Kernel) -> None:
    """However they are grouped, and on any number of threads."""
    jobs = []
    for seed in range(5):
        views = Views(
            gate_up_proj=[
                stored(random(96, 160, seed), "BF16"),
                stored(random(96, 160, 9), "BF16"),
            ],
            down_proj=[stored(random(160, 96, seed), "BF16")],
        )
        x = (random(1 + 4 * seed, 160, seed) * 20).bfloat16()
        jobs.append(Job(views, x, torch.empty_like(x)))
    expected = [kernel.forward(GATED, job.views, job.x) for job in jobs]
    for threads in (1, 2, 3):
        native.Kernel(threads, kernel.instruction_set).run(GATED, jobs)
        assert all(torch.equal(job.out, each) for job, each in zip(jobs, expected, strict=True))


def test_experts_of_one_token_are_those_apart(kernel: native.Kernel) -> None:
    """What is made ready for one of them serves others, where their formats agree."""
    formats = ["Q8_0", "Q4_0", "BF16", "Q4_0", "EXACT12", "Q8_0", "F16", "Q4_0"]
    for order in (formats, formats[::-1]):
        x = (random(3, 160) * 20).bfloat16()
        jobs = []
        for seed, name in enumerate(order):
            gate_up = [stored(random(96, 160, seed), name), stored(random(96, 160, 9), name)]
            down = [stored(random(160, 96, seed), order[-1 - seed])]
            views = Views(gate_up_proj=gate_up, down_proj=down)
            jobs.append(Job(views, x, torch.empty_like(x)))
        kernel.run(GATED, jobs)
        for job in jobs:
            assert torch.equal(job.out, kernel.forward(GATED, job.views, x))


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 4, 1, 9), (0, 5), (40,)])
def test_experts_placed_together_are_those_apart(
    kernel: native.Kernel, counts: tuple[int, ...]
) -> None:
    """Each expert's rows of the tokens, to its own rows of the results."""
    rng = np.random.default_rng(0)
    x, top_k = (random(40, 160) * 20).bfloat16(), 3
    out = torch.zeros(len(x) * top_k, 160, dtype=x.dtype)
    experts, places = [], np.split(rng.permutation(len(out)), np.cumsum(counts))[:-1]
    for seed in range(len(counts)):
        gate_up = [stored(random(96, 160, seed), "Q8_0"), stored(random(96, 160, 9), "Q8_0")]
        down = [stored(random(160, 96, seed), "Q8_0")]
        experts.append(Views(gate_up_proj=gate_up, down_proj=down))
    expected = out.clone()
    for views, rows in zip(experts, places, strict=True):
        if len(rows):
            expected[rows] = kernel.forward(GATED, views, x[rows // top_k])
    kernel.run_placed(GATED, experts, x, out, [rows // top_k for rows in places], places)
    assert torch.equal(out, expected)


# Bytes of a group with its scale, its codes behind them, and bytes of the codes.
EXTREMES = [
    *(("Q8_0", b"\x00\x3c", bytes([code]) * 32) for code in (0x80, 0x7F)),
    *(("Q4_0", b"\x00\x3c", bytes([code]) * 16) for code in (0x00, 0xFF)),
    *(("Q5_0", b"\x00\x3c", bytes([code]) * 20) for code in (0x00, 0xFF)),
    *(("MXFP4", b"\x7f", bytes([code]) * 16) for code in (0x77, 0xFF)),
]


@pytest.mark.parametrize(("number_format", "scale", "codes"), EXTREMES)
def test_the_largest_products(
    kernel: native.Kernel, number_format: str, scale: bytes, codes: bytes
) -> None:
    """Nothing is bounded on the way: all weights and all tokens are as large as they can be."""
    rows, groups = 17, 37
    data = np.frombuffer((scale + codes) * rows * groups, dtype=np.uint8).copy()
    block = PackedMatrix(number_format, rows, groups * 32, torch.from_numpy(data))
    for tokens, sign in itertools.product((1, 4, 9, 40), (1.0, -1.0)):
        x = torch.full((tokens, groups * 32), sign)
        close(product(kernel, block, x), x @ plain(block).T, number_format)


def test_what_is_not_finite_shows(kernel: native.Kernel) -> None:
    for number_format, value in itertools.product(FORMATS, (float("nan"), float("inf"))):
        for tokens in (1, 10):
            x = torch.ones(tokens, 64).bfloat16()
            x[-1, 5] = value
            found = product(kernel, stored(random(3, 64), number_format), x)
            assert not found[-1].isfinite().any() and found[:-1].isfinite().all()


def test_matrices_that_do_not_fit_are_the_references_affair(kernel: native.Kernel) -> None:
    views = Views(gate_up_proj=[random(64, 64)], down_proj=[random(64, 48)])
    with pytest.raises(RuntimeError, match="shapes"):
        kernel.forward(GATED, views, random(2, 64))


def test_rows_of_a_larger_matrix(kernel: native.Kernel) -> None:
    """Rows apart from one another, as fused checkpoints have them."""
    whole = random(20, 300).bfloat16()
    whole[:, 200:] = float("nan")
    for tokens in (3, 10):
        x = (random(tokens, 200, seed=1) * 20).bfloat16()
        close(product(kernel, whole[:, :200], x), x.float() @ whole[:, :200].float().T, "BF16")


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("gate", [silu_gate, odd_gate])
def test_experts(kernel: native.Kernel, number_format: str, gate: object) -> None:
    """Fused where the gate is known, else with the model's own gate between two products."""
    math = ExpertMath(True, False, False, gate, post=lambda out: out * 2)  # type: ignore[arg-type]
    first, second = random(96, 160), random(96, 160, seed=2)
    views = Views(
        gate_up_proj=[stored(first, number_format), stored(second, number_format)],
        down_proj=[stored(random(160, 96), number_format)],
    )
    for dtype, tokens in itertools.product(TYPES, (1, 6, 33)):
        views = Views(views)  # as loaded anew: nothing prepared
        x = (random(tokens, 160, seed=3) * 20).to(dtype)
        exact = {name: [plain(block) for block in blocks] for name, blocks in views.items()}
        expected = Reference().forward(math, Views(exact), x.float())
        found = kernel.forward(math, views, x)
        assert found.dtype == dtype
        tolerance = 4 * ROUNDING[dtype] + 2 * (GROUPED if number_format[0] == "Q" else 0)
        tolerance += ROUNDING[torch.bfloat16] * (number_format in ("BF16", "F16", "EXACT12"))
        assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        torch.nn.functional.silu,
        torch.relu,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    ],
)
def test_bf16_experts_round_as_torch_does(
    kernel: native.Kernel, has_gate: bool, function: object
) -> None:
    """Each step rounded to the model's type: nearly all results are torch's to the bit."""

    def gate(x: torch.Tensor) -> torch.Tensor:
        if not has_gate:
            return function(x)  # type: ignore[operator]
        half, up = x.chunk(2, dim=-1)
        return function(half) * up  # type: ignore[operator]

    math = ExpertMath(has_gate, False, False, gate)
    assert recognise(math) is not None
    views = Views(down_proj=[random(128, 256).bfloat16()])
    name, rows = ("gate_up_proj", 512) if has_gate else ("up_proj", 256)
    views[name] = [random(rows, 128).bfloat16()]
    x = (random(8, 128, seed=3) * 20).bfloat16()
    found, expected = kernel.forward(math, views, x), Reference().forward(math, views, x)
    assert (found == expected).float().mean() > 0.9
    assert (found.float() - expected.float()).abs().max() <= 0.01 * expected.abs().max()


def test_gates_that_bound_their_input_are_not_taken_for_plain_ones() -> None:
    assert recognise(GATED) is not None
    assert recognise(ExpertMath(True, False, False, odd_gate)) is None
    exact_gelu = ExpertMath(False, False, False, torch.nn.functional.gelu)
    assert recognise(exact_gelu) is None


def test_what_it_cannot_do_the_reference_does(kernel: native.Kernel) -> None:
    x = (random(3, 64, seed=1) * 20).bfloat16()
    whole = {"gate_up_proj": random(64, 64).bfloat16(), "down_proj": random(32, 64).bfloat16()}
    transposed = ExpertMath(True, False, True, silu_gate)
    views = Views({name: [matrix] for name, matrix in whole.items()})
    assert torch.equal(
        kernel.forward(transposed, views, x), Reference().forward(transposed, views, x)
    )
    assert kernel.forward(
        GATED, Views(gate_up_proj=[random(64, 64)], down_proj=[random(64, 32)]), x[:0].float()
    ).shape == (0, 64)


def test_an_unknown_instruction_set_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'avx1024'.*portable"):
        native.Kernel(1, "avx1024")


def test_threads_end_with_the_kernel() -> None:
    def num_threads() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Threads"))

    before = num_threads()
    opened = native.Kernel(4)
    assert num_threads() == before + 3
    opened.close()
    assert num_threads() == before


def test_many_short_rounds_lose_nothing(kernel: native.Kernel) -> None:
    """Workers that sleep, spin and come late: every product is whole."""
    many = native.Kernel(4, kernel.instruction_set)
    block, x = random(37, 64), random(1, 64, seed=1) * 20
    expected = product(kernel, block, x)
    for number in range(300):
        if number % 50 == 0:
            threading.Event().wait(0.002)  # long enough for workers to fall asleep
        assert torch.equal(product(many, block, x), expected)


def test_second_products_wait_for_the_first(kernel: native.Kernel) -> None:
    """Nothing that an earlier run left is multiplied: tokens differ from run to run."""
    many = native.Kernel(4, kernel.instruction_set)
    views = [
        Views(
            gate_up_proj=[stored(random(96, 64, seed), name), stored(random(96, 64, 9), name)],
            down_proj=[stored(random(64, 96, seed), name)],
        )
        for seed, name in enumerate(["Q8_0", "BF16", "Q4_0", "Q8_0", "F16"])
    ]
    for number in range(100):
        jobs = []
        for place, each in enumerate(views):
            count = (1, 2, 1, 7, 8, 33)[(number + place * (number % 4 == 3)) % 6]
            x = (random(count, 64, seed=number) * 20).bfloat16()
            jobs.append(Job(each, x, torch.empty_like(x)))
        many.run(GATED, jobs)
        for job in jobs:
            assert torch.equal(job.out, kernel.forward(GATED, job.views, job.x))


class TestWithoutCompiler:
    @pytest.fixture(autouse=True)
    def _none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "native", None)

    def test_auto_is_torch(self) -> None:
        assert isinstance(choose("auto"), Reference)

    def test_native_is_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match="no compiled kernels"):
            choose("native")
