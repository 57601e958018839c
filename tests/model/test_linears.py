"""Compiled dense layers: the same numbers, only while the layer is what it was, few threads in
decode and no longer."""

import pytest
import torch
from torch import nn

from moe_infinity.kernels import native
from moe_infinity.model import linears
from moe_infinity.model.linears import FewThreads, speed_up
from moe_infinity.model.taps import Step

pytestmark = pytest.mark.skipif(native.native is None, reason="installed without a compiler")
DECODE = Step(1, "decode", 1, 1)


def model(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64, bias=bias), nn.Linear(64, 32)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 32, 33])
@torch.no_grad()
def test_equals_torch_up_to_rounding(bias: bool, dtype: torch.dtype, tokens: int) -> None:
    plain, fast = model(bias, dtype), model(bias, dtype)
    assert speed_up(fast, native.Kernel(2))
    x = torch.randn(2, tokens, 96)[:1].to(dtype)
    torch.testing.assert_close(fast(x), plain(x), atol=0.02, rtol=0.02)
    assert fast[0](x[:, :0]).shape == (1, 0, 64)


@torch.no_grad()
def test_a_replaced_or_changed_weight_counts() -> None:
    fast = model()
    speed_up(fast, native.Kernel(2))
    x = torch.randn(1, 96).bfloat16()
    fast[0].weight = nn.Parameter(torch.zeros(64, 96).bfloat16())
    assert torch.equal(fast[0](x)[0], fast[0].bias)
    fast[1].weight.data = torch.zeros(32, 64).bfloat16()
    assert torch.equal(fast[1](fast[0](x))[0], fast[1].bias)


def test_gradients_flow() -> None:
    fast = model()
    speed_up(fast, native.Kernel(2))
    fast(torch.randn(1, 96).bfloat16()).sum().backward()
    assert fast[0].weight.grad is not None


@torch.no_grad()
def test_float32_and_transposed_weights_stay_with_torch() -> None:
    assert not speed_up(model(dtype=torch.float32), native.Kernel(2))
    lone = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    lone[0].weight = nn.Parameter(torch.randn(8, 8).bfloat16().t())
    assert not speed_up(lone, native.Kernel(2))


class TestFewThreads:
    @pytest.fixture(autouse=True)
    def _three(self):
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        yield
        torch.set_num_threads(before)

    def test_only_in_decode_and_no_longer(self) -> None:
        threads = FewThreads(True)
        threads.begin(DECODE)
        assert torch.get_num_threads() == 1
        threads.begin(DECODE)
        threads.end()
        threads.end()
        assert torch.get_num_threads() == 3
        threads.begin(Step(2, "prefill", 1, 9))
        assert torch.get_num_threads() == 3

    def test_helpers_that_may_spin_end_before_decode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        at = list[int]()
        monkeypatch.setattr(linears, "end_idle_threads", lambda: at.append(torch.get_num_threads()))
        threads = FewThreads(True)
        threads.begin(Step(2, "prefill", 1, 9))
        assert not at
        threads.begin(DECODE)
        threads.begin(DECODE)
        threads.end()
        assert at == [3], "once, while torch still has them"

    def test_two_at_once(self) -> None:
        first, second = FewThreads(True), FewThreads(True)
        first.begin(DECODE)
        second.begin(DECODE)
        first.end()
        second.end()
        assert torch.get_num_threads() == 3

    def test_a_prompt_after_decode_has_them_all(self) -> None:
        threads = FewThreads(True)
        threads.begin(DECODE)
        threads.begin(Step(2, "prefill", 1, 9))
        assert torch.get_num_threads() == 3

    @pytest.mark.parametrize(
        "step", [Step(1, "decode", 40, 1), Step(1, "decode", 1, 1, context=9999)]
    )
    def test_large_steps_keep_them(self, step: Step) -> None:
        threads = FewThreads(True)
        threads.begin(step)
        assert torch.get_num_threads() == 3
