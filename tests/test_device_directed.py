"""Decode that the device directs by itself does what the host would have done, and says so after.

Triton's interpreter stands for the GPU: kernels, hand-over and account are the real ones.
"""

import functools
import gc
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moe_infinity import MoE
from moe_infinity.model.directed import DirectedExperts
from moe_infinity.residency.meters import QuickerMeter
from support.engine import BUDGET, IDS, leaving_nothing

pytest.importorskip("triton")
NUM_NEW = 6
PROMPT = IDS[:, :4]
NEVER = 10**9


class Outcome(NamedTuple):
    tokens: list[int]
    counts: tuple[int, ...]
    tiers: list[dict[str, list[int]]]
    num_directed: int


def opened(path: Path, window: int, is_on: bool, **options: Any) -> MoE:
    """window: passes after which the way changes."""
    given = {"device": "simulated", "kernel": "triton", "vram_slots": 9, "prefetch": "none"}
    moe = MoE(path, ram=BUDGET, **{**given, **options})
    assert moe._wiring._device is not None
    moe._wiring._device.meter = QuickerMeter(window=window, is_on=is_on)
    return moe


def whole_in_ram(moe: MoE) -> None:
    """Let the tier beneath read what nobody asked for, as it does between passes."""
    host, counters = moe._hierarchy.host, moe._hierarchy.counters
    while host._to_fill or host.is_reading:
        host.fill(counters)
        if host.is_reading:
            host.wait()
        assert host.collect(counters) == []


@functools.cache  # several tests compare with the same ones
def outcome(path: Path, window: int, is_on: bool, **options: Any) -> Outcome:
    with leaving_nothing(), opened(path, window, is_on, **options) as moe:
        whole_in_ram(moe)
        said = moe.generate(PROMPT, max_new_tokens=NUM_NEW, eos_token_id=None)
        decode = moe.stats().decode
        moe.check_integrity()
        assert not moe._hierarchy.residency.directory.pins.any()
        counts = (decode.hits, decode.late, decode.misses, decode.demand_bytes, decode.ram_hits)
        assert moe.stats().hits == moe.stats().prefill.hits + decode.hits
        return Outcome(said[0].tolist(), counts, moe.residency(), decode.directed_passes)


GPU, SLOW = pytest.mark.gpu, pytest.mark.slow  # kernels of all policies: tests/kernels/gpu
CASES = [pytest.param(name, "cuda", marks=GPU) for name in ("lru", "lfru", "next_use")]
CASES += [pytest.param(name, "simulated", marks=SLOW) for name in ("lru", "lfru")]


@pytest.mark.parametrize(("policy", "device"), [("next_use", "simulated"), *CASES])
def test_the_device_decides_as_the_host_would(tiny: Path, policy: str, device: str) -> None:
    by_host = outcome(tiny, NEVER, False, policy=policy, device=device)
    by_device = outcome(tiny, NEVER, True, policy=policy, device=device)
    assert by_host.num_directed == 0
    assert by_device.num_directed == NUM_NEW - 1
    assert by_host.counts[2] > 0, "nothing was missed: the test says little"
    assert by_device[:3] == by_host[:3]


def test_both_can_take_turns(tiny: Path) -> None:
    by_host = outcome(tiny, NEVER, False, policy="next_use", device="simulated")
    by_turns = outcome(tiny, 2, False)
    assert 0 < by_turns.num_directed < NUM_NEW - 1
    assert by_turns[:3] == by_host[:3]


@pytest.mark.slow
def test_with_a_predictor_that_is_not_asked_meanwhile(tiny: Path) -> None:
    by_device = outcome(tiny, NEVER, True, prefetch="gate_lookahead")
    by_host = outcome(tiny, NEVER, False, policy="next_use", device="simulated")
    assert by_device.tokens == by_host.tokens
    assert by_device.num_directed > 0


def test_logits_are_those_of_the_plain_kernel(tiny: Path) -> None:
    """Within the tolerance of other orders of sums."""
    ids = IDS[:, :6]

    def logits(**options: Any) -> torch.Tensor:
        with MoE(tiny, ram=BUDGET, device="simulated", **options) as moe:
            cache = moe.new_cache()
            moe(ids[:, :5], past_key_values=cache)
            return moe(ids[:, 5:], past_key_values=cache).logits

    plain = logits(kernel="torch").float()
    torch.testing.assert_close(logits(kernel="triton").float(), plain, rtol=2e-2, atol=2e-2)


def test_a_model_that_does_not_fit_into_ram_is_directed_by_the_host(tiny: Path) -> None:
    with opened(tiny, NEVER, True, ram_slots=20) as moe:
        moe.generate(PROMPT, max_new_tokens=3, eos_token_id=None)
        assert moe.stats().decode.directed_passes == 0


@pytest.mark.slow
def test_recording_needs_the_host(tiny: Path) -> None:
    with opened(tiny, NEVER, True) as moe:
        whole_in_ram(moe)
        with moe.recording() as recorder:
            moe.generate(PROMPT, max_new_tokens=3, eos_token_id=None)
        assert moe.stats().decode.directed_passes == 0
        assert len(list(recorder.trace().passes())) == 3
        moe.generate(PROMPT, max_new_tokens=3, eos_token_id=None)
        assert moe.stats().decode.directed_passes == 2


@pytest.mark.slow
def test_nothing_is_recorded_before_it_was_done_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled must not be so in a recording. And a recording must not ask the host."""
    order: list[str] = []
    real = DirectedExperts.run
    monkeypatch.setattr(
        DirectedExperts, "run", lambda self, *a: order.append("layer") or real(self, *a)
    )
    with opened(tiny, 2, False) as moe:
        whole_in_ram(moe)
        monkeypatch.setattr(
            moe.device, "capture", lambda work: order.append("record") or (lambda: work())
        )
        moe.generate(PROMPT, max_new_tokens=NUM_NEW + 2, eos_token_id=None)
    assert "record" in order
    assert order.index("record") >= 3  # layers


def test_positions_that_are_given_are_used(tiny: Path) -> None:
    def logits(kernel: str, position: int) -> torch.Tensor:
        with MoE(tiny, ram=BUDGET, device="simulated", kernel=kernel) as moe:
            cache = moe.new_cache()
            moe(PROMPT, past_key_values=cache)
            given = {"past_key_values": cache, "position_ids": torch.tensor([[position]])}
            return moe(PROMPT[:, :1], **given).logits.float()

    near = {"rtol": 2e-2, "atol": 2e-2}
    here, far = logits("triton", 4), logits("triton", 50)
    torch.testing.assert_close(here, logits("torch", 4), **near)
    torch.testing.assert_close(far, logits("torch", 50), **near)
    assert not torch.allclose(here, far, **near)


def test_a_request_lets_go_of_its_cache(tiny: Path) -> None:
    with opened(tiny, NEVER, True) as moe:
        cache = moe.new_cache()
        moe.generate(PROMPT, max_new_tokens=3, eos_token_id=None, past_key_values=cache)
        kept = weakref.ref(cache)
        del cache
        gc.collect()
        assert kept() is None


@pytest.mark.slow
def test_a_hand_over_that_fails_leaves_no_wrong_expert(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(tiny, NEVER, True, policy="next_use", device="simulated").tokens
    with opened(tiny, NEVER, True) as moe:
        whole_in_ram(moe)
        directory = moe._wiring._runtime.directed._directory
        with monkeypatch.context() as patch:
            patch.setattr(directory, "store_to", raising(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                moe.generate(PROMPT, max_new_tokens=4, eos_token_id=None)
        moe.check_integrity()
        assert not any(layer["vram"] for layer in moe.residency())
        said = moe.generate(PROMPT, max_new_tokens=NUM_NEW, eos_token_id=None)
        assert said[0].tolist() == expected


def raising(error: BaseException) -> Any:
    def call(*_: object) -> Any:
        raise error

    return call


def test_what_cannot_be_recorded_is_launched_and_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = raising(RuntimeError("operation not permitted when stream is capturing"))
    by_host = outcome(tiny, NEVER, False, policy="next_use", device="simulated")
    with opened(tiny, NEVER, True) as moe:
        whole_in_ram(moe)
        monkeypatch.setattr(moe.device, "capture", refuse)
        said = moe.generate(PROMPT, max_new_tokens=NUM_NEW, eos_token_id=None)
        assert said[0].tolist() == by_host.tokens
        assert moe.stats().decode.directed_passes == NUM_NEW - 1
        assert any("was not recorded as a graph" in fault for fault in moe.stats().faults)
