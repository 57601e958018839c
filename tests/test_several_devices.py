"""The engine over several devices, simulated: one pool of experts, the bits of one device."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import MoE, bundled_model_path
from moe_infinity.cache.device_pool import DevicePool
from moe_infinity.config import EngineConfig
from moe_infinity.errors import BudgetError, ConfigError, DeviceError, MoEInfinityError
from moe_infinity.kernels.base import ExpertMath
from moe_infinity.model import elsewhere
from moe_infinity.model.elsewhere import maths_on
from support.engine import BUDGET, IDS, generate, leaving_nothing

PROMPT = torch.randint(1, 4000, (1, 40), generator=torch.Generator().manual_seed(3))  # [1, S] int64
NUM_STEPS = 6
BOTH = "simulated:24,simulated:12"
UNEVEN = "simulated:24,simulated:0.5"  # GB/s: the second one's copies are waited for
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def logits(**options: Any) -> list[torch.Tensor]:
    """Of a prefill and some decode steps of the bundled model."""
    with MoE(bundled_model_path(), ram=BUDGET, **options) as moe:
        cache = moe.new_cache()
        said = [moe(PROMPT, past_key_values=cache).logits]
        for step in range(NUM_STEPS):
            said.append(moe(PROMPT[:, step : step + 1], past_key_values=cache).logits)
            moe.check_integrity()
        assert moe.stats().bit_exact == (moe.config.miss == "copy")
    return said


def slots_held(moe: MoE) -> list[int]:
    """How many experts lie on each device."""
    assert isinstance(moe._hierarchy.memory, DevicePool)
    return [len(memory.slot_of) for memory in moe._hierarchy.memory.memories]


@pytest.fixture(scope="module")
def without() -> list[torch.Tensor]:
    return logits(device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"vram_slots": 4, "ram_slots": 4, "device": UNEVEN},
        {"vram_slots": 40, "ram_slots": 60, "policy": "lru"},
        {"vram": "40MiB,8MiB", "max_context": 512, "prefetch": "gate_lookahead"},
        {"vram": "10MiB,12MiB", "max_context": 512, "policy": "activation", "device": UNEVEN},
        {"vram_slots": 30, "device": f"{UNEVEN},simulated:3"},
        {"vram_slots": 13, "miss": "auto", "device": UNEVEN},
    ],
    ids=str,
)
def test_more_devices_change_no_bit(options: dict[str, Any], without: list[torch.Tensor]) -> None:
    said = logits(**{"device": BOTH, **options})
    assert all(map(torch.equal, said, without))


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_another_kernel_computes_the_same_everywhere(tiny: Path, kernel: str) -> None:
    if kernel == "triton":
        pytest.importorskip("triton")

    def said(device: str) -> torch.Tensor:
        options = {"device": device, "kernel": kernel, "vram_slots": 9, "dtype": "bfloat16"}
        with leaving_nothing(), MoE(tiny, ram=BUDGET, **options) as moe:
            cache = moe.new_cache()
            first = moe(IDS[:, :1], past_key_values=cache).logits
            return torch.cat([first, moe(IDS[:, 1:2], past_key_values=cache).logits], dim=1)

    assert torch.equal(said(BOTH), said("simulated"))


def test_experts_and_their_copies_are_spread_over_both(tiny: Path) -> None:
    def opened(device: str, **options: Any) -> tuple[MoE, list[int]]:
        with MoE(tiny, ram=BUDGET, device=device, prefetch="none", **options) as moe:
            tokens = generate(moe, 16)
            return moe, tokens[0].tolist()

    several, said = opened(BOTH, vram_slots=12)
    alone, expected = opened("simulated", vram_slots=12)
    assert said == expected
    stats, plain = several.stats(), alone.stats()
    assert (stats.hits, stats.misses) == (plain.hits, plain.misses)
    assert stats.demand_bytes == plain.demand_bytes
    assert stats.device == "simulated, 24 GB/s + simulated, 12 GB/s"
    assert stats.slots == 12
    assert all(device._busy_until_s["up"] > 0 for device in several.devices)


@pytest.mark.parametrize("number", [0, 1])
def test_tokens_go_there_once_an_event_and_results_come_back(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """number: of the device to which nothing but zeros come."""
    with MoE(tiny, ram=BUDGET, device=BOTH) as moe:
        num_layers = len(moe.residency())
        expected = moe(IDS).logits
        brought = []
        for place, device in enumerate(moe.devices):

            def bring(tensor: torch.Tensor, source: Any, place: int = place) -> torch.Tensor:
                assert source is moe.devices[1 - place]
                brought.append(place)
                return torch.zeros_like(tensor) if place == number else tensor.clone()

            monkeypatch.setattr(device, "bring", bring)
        assert not torch.equal(moe(IDS).logits, expected)
        assert brought == [1, 0] * num_layers


def test_results_come_back_a_few_at_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "_FEW_ROWS", 1)
    with MoE(tiny, ram=BUDGET, device=BOTH) as moe:
        in_pieces = moe(IDS).logits
    with MoE(tiny, ram=BUDGET, device="simulated") as moe:
        assert torch.equal(moe(IDS).logits, in_pieces)


def test_what_a_model_does_after_its_experts_is_done_there() -> None:
    norm = torch.nn.RMSNorm(4)
    math = ExpertMath(True, False, False, gate=torch.relu, post=norm)
    plain, moved = maths_on(torch.device("meta"), [replace(math, post=None), math])
    assert plain.post is None
    assert isinstance(moved.post, torch.nn.RMSNorm)
    assert moved.post.weight.device.type == "meta"
    assert norm.weight.device.type == "cpu"


def test_residency_and_plan_are_of_all(tiny: Path) -> None:
    options = {"device": f"{BOTH},simulated:3", "vram_slots": 9, "ram_slots": 8}
    with leaving_nothing(), MoE(tiny, ram=BUDGET, **options) as moe:
        generate(moe, 16)
        assert [plan.num_slots for plan in moe.plan.devices] == [3, 3, 3]
        assert all(count > 0 for count in slots_held(moe))
        tiers = moe.residency()
        assert sum(len(layer["vram"]) for layer in tiers) == sum(slots_held(moe)) == 9
        assert moe.stats().decode.demoted_bytes > 0
        arithmetic = moe.plan.arithmetic()
        assert "on simulated, 24 GB/s:\n  dense weights" in arithmetic
        assert "on simulated, 3 GB/s:\n  tokens and results" in arithmetic
        moe.check_integrity()


def test_every_budget_is_kept(tiny: Path) -> None:
    options = {"device": BOTH, "max_context": 64, "vram": "700KiB,300KiB"}
    with MoE(tiny, ram=BUDGET, **options) as moe:
        generate(moe)
        for plan, asked in zip(moe.plan.devices, (700, 300), strict=True):
            assert plan.used_bytes <= plan.budget_bytes == asked * 1024
        first, second = moe.plan.devices
        assert second.dense_bytes == second.kv_bytes == 0 < second.workspace_bytes
        assert second.num_slots > 0
        assert moe.stats().slots == first.num_slots + second.num_slots


@pytest.mark.parametrize("budgets", ["20KiB,64MiB", "64MiB,20KiB"])
def test_the_smallest_budget_of_each_works(tiny: Path, budgets: str) -> None:
    options = {"ram": BUDGET, "device": BOTH, "max_context": 64}
    with leaving_nothing(), pytest.raises(BudgetError) as refused:
        MoE(tiny, vram=budgets, **options)
    assert "vram=20.00 KiB of simulated" in str(refused.value)
    smallest = str(refused.value).rsplit("the smallest budget that works is ", 1)[1]
    with MoE(tiny, vram=budgets.replace("20KiB", smallest), **options) as moe:
        generate(moe)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"device": "cuda:0,cuda:0"}, ConfigError, "expected each GPU once"),
        ({"device": "cuda,cuda:0"}, ConfigError, "expected each GPU once"),
        ({"device": "cuda:0,simulated"}, ConfigError, "expected several of one kind"),
        ({"device": "simulated,cpu"}, ConfigError, "expected several of one kind"),
        ({"device": "auto,cuda:1"}, ConfigError, "expected several of one kind"),
        ({"device": "simulated,"}, ConfigError, "or several such as cuda:0,cuda:1"),
        ({"vram": "1GiB,1GiB,1GiB"}, ConfigError, "vram: got 3 sizes"),
        ({"vram": "1GiB,lots"}, ConfigError, "vram: got 'lots'"),
        ({"device": "simulated", "vram": "1GiB,1GiB"}, ConfigError, "vram: got 2 sizes"),
        ({"vram": "64MiB,4096TiB"}, BudgetError, "that are free of simulated, 12 GB/s"),
        ({"vram": "64MiB,100KiB"}, BudgetError, "beside the model's own has to hold tokens"),
        ({"vram_slots": 1}, BudgetError, "vram_slots: got 1, expected at least"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    tiny: Path, options: dict[str, Any], error: type[MoEInfinityError], words: str
) -> None:
    with leaving_nothing(), pytest.raises(error, match=words):
        MoE(tiny, **{"ram": BUDGET, "device": BOTH, **options})


def test_one_size_is_each_ones() -> None:
    gib = 1024**3
    assert EngineConfig(device="cuda:0, cuda:1", vram="8GiB").vram_bytes == (8 * gib, 8 * gib)
    assert EngineConfig(device="cuda:1,cuda:0", vram="auto,2GiB").vram_bytes == (None, 2 * gib)
    assert EngineConfig(device="cuda:1,cuda:0").vram_bytes == (None, None)
    assert EngineConfig(device="cuda:1,cuda:0").devices == ("cuda:1", "cuda:0")


class TestTheSecondDeviceFails:
    @staticmethod
    def bringing(moe: MoE, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> None:
        """From its fifth event on tokens do not come to it, so many times."""
        device, calls = moe.devices[1], []
        real = device.bring

        def failing(*args: Any) -> torch.Tensor:
            calls.append(1)
            if 5 <= len(calls) < 5 + times:
                raise error
            return real(*args)

        monkeypatch.setattr(device, "bring", failing)

    def test_out_of_memory_it_gives_slots_back(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with MoE(tiny, ram=BUDGET, device=BOTH, vram_slots=16) as moe:
            expected = generate(moe)
        with leaving_nothing(), MoE(tiny, ram=BUDGET, device=BOTH, vram_slots=16) as moe:
            self.bringing(moe, monkeypatch, torch.OutOfMemoryError("no room"), times=1)
            assert torch.equal(generate(moe), expected)
            stats = moe.stats()
            assert stats.slots < 16
            assert f"the cache was cut to {stats.slots} slots" in stats.faults[0]
            assert slots_held(moe)[1] <= stats.slots - 8  # the first one has its eight still
            assert torch.equal(generate(moe), expected)
            assert slots_held(moe)[0] == 8
            moe.check_integrity()

    def test_until_nothing_is_left_to_give(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with MoE(tiny, ram=BUDGET, device=BOTH, vram_slots=16) as moe:
            self.bringing(moe, monkeypatch, torch.OutOfMemoryError("no room"), times=999)
            with pytest.raises(BudgetError, match="simulated, 12 GB/s: out of memory in mid-run"):
                generate(moe)
            moe.check_integrity()

    def test_lost_it_is_named(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with MoE(tiny, ram=BUDGET, device=BOTH, vram_slots=16) as moe:
            self.bringing(moe, monkeypatch, torch.AcceleratorError("an illegal access"), times=1)
            with pytest.raises(DeviceError, match=r"simulated, 12 GB/s: lost in mid-run \(an ill"):
                generate(moe)

    def test_lost_it_is_named_by_whatever_the_cache_asks_of_it(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lost(*_: object) -> None:
            raise torch.AcceleratorError("an illegal access")

        with (
            MoE(tiny, ram=BUDGET, device=BOTH, vram_slots=16) as moe,
            monkeypatch.context() as patch,
        ):
            assert isinstance(moe._hierarchy.memory, DevicePool)
            for method in ("await_all", "drain"):
                patch.setattr(moe._hierarchy.memory.memories[1], method, lost)
            with pytest.raises(DeviceError, match="simulated, 12 GB/s: lost in mid-run"):
                generate(moe)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("vram_slots", [9, 24])
def test_two_gpus_say_what_one_says(tiny: Path, vram_slots: int) -> None:
    def said(device: str) -> list[int]:
        with MoE(tiny, ram=BUDGET, device=device, vram_slots=vram_slots) as moe:
            tokens = generate(moe, 16)
            moe.check_integrity()
            if "," in device:
                assert all(count > 0 for count in slots_held(moe))
            return tokens[0].tolist()

    same = torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1)
    together = said("cuda:0,cuda:1")
    if same:
        assert together == said("cuda:0")


@pytest.mark.gpu
@two_gpus
def test_the_model_may_be_on_any_gpu(tiny: Path) -> None:
    with MoE(tiny, ram=BUDGET, device="cuda:1,cuda:0", vram_slots=16) as moe:
        generate(moe)
        assert moe.model.device == torch.device("cuda", 1)
        assert torch.cuda.current_device() == 0
