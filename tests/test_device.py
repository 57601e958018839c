"""The engine with a device tier, simulated: the same words to the last bit, budgets, reports."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import MoE, bundled_model_path
from moe_infinity.devices.simulated import SimulatedDevice
from moe_infinity.errors import (
    BudgetError,
    ConfigError,
    DeviceError,
    MoEInfinityError,
    PlanExceededError,
)
from moe_infinity.kernels.packed import PackedMatrix
from moe_infinity.model.packed_linears import attach_packed, move
from support.encoder_decoder import switch
from support.engine import BUDGET, generate, leaving_nothing

PROMPT = torch.randint(1, 4000, (1, 40), generator=torch.Generator().manual_seed(3))  # [1, S] int64
NUM_STEPS = 6
NARROW = "simulated:0.5"  # GB/s: copies are waited for


def logits(**options: Any) -> list[torch.Tensor]:
    """Of a prefill and some decode steps of the bundled model."""
    with MoE(bundled_model_path(), ram=BUDGET, **options) as moe:
        cache = moe.new_cache()
        said = [moe(PROMPT, past_key_values=cache).logits]
        for step in range(NUM_STEPS):
            said.append(moe(PROMPT[:, step : step + 1], past_key_values=cache).logits)
            moe.check_integrity()
    return said


@pytest.fixture(scope="module")
def without() -> list[torch.Tensor]:
    return logits(device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"vram_slots": 4},
        {"vram_slots": 13, "ram_slots": 4},
        {"vram_slots": 40, "ram_slots": 40, "policy": "lru"},
        {"vram_slots": 40, "ram_slots": 220, "prefetch": "gate_lookahead"},
        {"vram_slots": 256, "ram_slots": 8},
        {"vram_slots": 40, "device": NARROW, "prefetch": "gate_lookahead"},
        {"vram_slots": 40, "ram_slots": 60, "device": NARROW},
        {"vram_slots": 13, "miss": "cpu"},
        {"vram_slots": 40, "ram_slots": 60, "miss": "cpu", "kernel": "native"},
        {"vram_slots": 13, "miss": "auto", "device": NARROW},
    ],
    ids=str,
)
def test_the_device_changes_no_bit(options: dict[str, Any], without: list[torch.Tensor]) -> None:
    said = logits(**{"device": "simulated", **options})
    assert all(map(torch.equal, said, without))


def test_another_kernel_beside_the_device_is_near() -> None:
    """The processor computes with its own kernel, the device with torch's."""
    said = logits(device="simulated", vram_slots=13, miss="cpu", kernel="torch", dtype="float32")
    plain = logits(device="cpu", kernel="torch", dtype="float32")
    for ours, theirs in zip(said, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_report_counts_each_tier(tiny: Path) -> None:
    with leaving_nothing(), MoE(tiny, ram=BUDGET, device=NARROW, vram_slots=8, ram_slots=9) as moe:
        generate(moe, 16)
        stats = moe.stats()
        assert stats.device == "simulated, 0.5 GB/s"
        assert (stats.slots, stats.ram_slots) == (8, 9)
        loads = stats.misses + stats.late  # of members; what came ahead in vain is beside them
        both = (stats.prefill, stats.decode)
        assert sum(phase.ram_hits + phase.disk_loads for phase in both) >= stats.misses
        assert loads and sum(phase.disk_loads for phase in both) >= moe.stats().experts_total
        assert sum(phase.demoted_bytes for phase in both) > 0
        assert stats.stall_s > 0
        assert 0 < (stats.limit_fraction or 0) <= 1
        tiers = moe.residency()
        assert sum(len(layer["vram"]) for layer in tiers) == 8
        for layer in tiers:
            assert sorted(layer["vram"] + layer["ram"] + layer["disk"]) == list(range(8))


def test_misses_that_the_processor_computes_are_counted_and_named(tiny: Path) -> None:
    with MoE(tiny, ram=BUDGET, device="simulated", vram_slots=16, miss="cpu") as moe:
        generate(moe, 16)
        generate(moe, 16)
        decode = moe.stats().decode
        assert decode.on_cpu == decode.misses > 0  # RAM holds everything by now
        assert decode.demand_bytes == 0 < decode.prefetch_bytes  # they are copied beside that
        assert moe.stats().lossy == ("misses computed on the CPU",)
        assert not moe.stats().bit_exact
        moe.check_integrity()


def test_what_fits_into_ram_is_read_once(tiny: Path) -> None:
    with MoE(tiny, ram=BUDGET, device="simulated", vram_slots=8) as moe:
        generate(moe, 8)
        generate(moe, 8)
        total = moe.stats(total=True)
        assert sum(p.disk_loads for p in (total.prefill, total.decode)) <= total.experts_total
        assert moe.stats().decode.disk_loads == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"vram": "100KiB"}, BudgetError, "the smallest budget that works is"),
        ({"vram": "4096TiB"}, BudgetError, "that are free"),
        ({"vram_slots": 1}, BudgetError, "vram_slots: got 1, expected at least"),
        ({"vram": "8GiB", "device": "cpu"}, ConfigError, "leave vram out"),
        ({"miss": "cpu", "device": "cpu"}, ConfigError, "leave miss out"),
        ({"miss": "skip"}, ConfigError, "expected one of copy, cpu, auto"),
        ({"device": "gpu"}, ConfigError, "expected auto, cpu, cuda"),
        ({"vram": "lots"}, ConfigError, "vram: got 'lots'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    tiny: Path, options: dict[str, Any], error: type[MoEInfinityError], words: str
) -> None:
    with leaving_nothing(), pytest.raises(error, match=words):
        MoE(tiny, **{"ram": BUDGET, "device": "simulated", **options})


def test_a_gpu_without_bf16_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedDevice, "has_bf16", False)
    with leaving_nothing(), pytest.raises(ConfigError, match="choose dtype float16"):
        MoE(tiny, ram=BUDGET, device="simulated", dtype="bfloat16")
    with MoE(tiny, ram=BUDGET, device="simulated", dtype="float16") as moe:
        generate(moe)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch was built for CUDA")
def test_a_gpu_that_is_not_there_is_named(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="install a CUDA build of torch"):
        MoE(tiny, device="cuda")
    with pytest.raises(ConfigError, match="expected a GPU for it"):
        MoE(tiny, vram="8GiB")


def test_smallest_device_budget_works(tiny: Path) -> None:
    with pytest.raises(BudgetError) as refused:
        MoE(tiny, ram=BUDGET, device="simulated", vram="100KiB", max_context=64)
    smallest = str(refused.value).rsplit("the smallest budget that works is ", 1)[1]
    options = {"device": "simulated", "vram": smallest, "max_context": 64}
    with MoE(tiny, ram=BUDGET, **options) as moe:
        generate(moe)
        assert moe.plan.device is not None
        assert moe.plan.device.used_bytes <= moe.plan.device.budget_bytes


class TestOutOfMemory:
    """In mid-run: what another program took, or a pass that needs more than was planned."""

    @staticmethod
    def once(moe: MoE, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int = 1) -> None:
        """The last block raises in the third pass, after the others have written their keys."""
        block = moe.model.model.layers[-1]
        real, calls = block.forward, []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if 3 <= len(calls) < 3 + times:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(block, "forward", failing)

    @pytest.mark.parametrize("ram_slots", [None, 9])
    def test_the_cache_makes_room(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch, ram_slots: int | None
    ) -> None:
        options = {"ram": BUDGET, "device": "simulated", "ram_slots": ram_slots}
        with leaving_nothing(), MoE(tiny, vram_slots=16, **options) as moe:
            expected = generate(moe)
        with leaving_nothing(), MoE(tiny, vram_slots=16, **options) as moe:
            self.once(moe, monkeypatch, torch.OutOfMemoryError("no room"))
            assert torch.equal(generate(moe), expected)
            stats = moe.stats()
            assert stats.slots < 16
            assert f"the cache was cut to {stats.slots} slots" in stats.faults[0]
            moe.check_integrity()
            assert torch.equal(generate(moe), expected)

    def test_until_nothing_is_left_to_give(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with MoE(tiny, ram=BUDGET, device="simulated", vram_slots=16) as moe:
            self.once(moe, monkeypatch, torch.OutOfMemoryError("no room"), times=99)
            with pytest.raises(BudgetError, match="the cache has nothing to give"):
                generate(moe)
            moe.check_integrity()

    def test_a_lost_device_is_named(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with MoE(tiny, ram=BUDGET, device="simulated", vram_slots=16) as moe:
            self.once(moe, monkeypatch, torch.AcceleratorError("an illegal memory access"))
            with pytest.raises(DeviceError, match=r"lost in mid-run \(an illegal memory access\)"):
                generate(moe)


class TestAsOnTheCpu:
    """What the library and its users may pass, and get, does not depend on the device."""

    def test_the_model_is_called_alike(self, tiny: Path) -> None:
        def passed(device: str, **options: Any) -> list[Any]:
            seen: list[Any] = []

            def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
                tensors = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
                seen.append({name: list(tensor.shape) for name, tensor in tensors.items()})

            with MoE(tiny, ram=BUDGET, device=device) as moe:
                moe.model.model.register_forward_pre_hook(look, with_kwargs=True)
                head = moe.model.lm_head
                head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
                generate(moe, 4, **options)
            return seen

        assert len(passed("cpu")) == 2 * 4
        assert passed("simulated") == passed("cpu")
        given = {"logits_to_keep": 1}
        assert passed("simulated", **given) == passed("cpu", **given)

    def test_left_padding(self, tiny: Path) -> None:
        ids = torch.arange(1, 13).view(2, 6)
        ids[1, :2] = 0
        mask = torch.ones_like(ids)
        mask[1, :2] = 0

        def said(device: str) -> torch.Tensor:
            with MoE(tiny, ram=BUDGET, device=device, max_batch=2) as moe:
                return moe.generate(
                    ids,
                    max_new_tokens=4,
                    attention_mask=mask,
                    eos_token_id=None,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                ).logits[-1]

        assert torch.equal(said("simulated"), said("cpu"))


def test_a_pass_of_an_encoder_and_a_decoder_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their caches have parts that cannot be taken back."""
    switch().save_pretrained(tmp_path)
    with MoE(tmp_path, ram=BUDGET, device="simulated") as moe:
        block = moe.model.get_decoder().block[-1]
        real, calls = block.forward, []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError("no room")
            return real(*args, **kwargs)

        monkeypatch.setattr(block, "forward", failing)
        with pytest.raises(BudgetError, match="open the model with less vram"):
            generate(moe)
        moe.check_integrity()


def test_room_for_a_pass_is_the_devices(tiny: Path) -> None:
    with MoE(tiny, ram=BUDGET, device="simulated", vram="64MiB", max_context=64) as moe:
        assert moe.plan.device is not None
        moe.plan.require_room(moe.plan.device.workspace_bytes, "a pass")
        with pytest.raises(PlanExceededError, match="one pass needs"):
            moe.plan.require_room(moe.plan.device.budget_bytes + 1, "a pass")


def test_placeholders_of_coded_layers_stay_small() -> None:
    linear = torch.nn.Linear(64, 64, bias=False)
    linear.weight = torch.nn.Parameter(torch.full((1,), torch.nan).expand(64, 64), False)
    attach_packed(linear, PackedMatrix("Q8_0", 64, 64, torch.zeros(64 * 68, dtype=torch.uint8)))
    model = torch.nn.Sequential(linear, torch.nn.Linear(4, 4))
    move(model, torch.device("meta"))
    assert linear.weight.untyped_storage().nbytes() == 4
    assert linear.weight.device.type == model[1].weight.device.type == "meta"
