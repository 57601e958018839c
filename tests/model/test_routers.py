"""Asking routers early: found beside the experts, shown what they are used to, never in the way."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_infinity import MoE, bundled_model_path
from moe_infinity.errors import ConfigError
from moe_infinity.model.routers import RouterTaps
from support.engine import BUDGET, generate
from support.families import family, save_tiny

# Of a plain kind; with experts behind a projection that the router does not see (two); with biases.
ASKED = ("qwen3_moe", "nemotron_h", "muse_spark", "gpt_oss", "deepseek_v3", "lfm2_moe")
IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 2]])


def generated(path: Path, **options: object) -> tuple[torch.Tensor, MoE]:
    with MoE(path, ram=BUDGET, max_batch=2, **options) as moe:
        out = moe.generate(IDS, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
        return out, moe


@pytest.mark.parametrize("name", ASKED)
def test_looking_ahead_changes_no_word(name: str, tmp_path: Path) -> None:
    save_tiny(family(name), tmp_path)
    plain, moe = generated(tmp_path, prefetch="none")
    slots = max(moe.plan.working_set // 2 + 2, moe.plan.num_slots // 2)
    ahead, moe = generated(tmp_path, ram_slots=slots, prefetch="gate_lookahead")
    assert torch.equal(ahead, plain)
    assert moe._wiring._runtime.observer is not None
    assert moe._hierarchy.faults == ()


def test_a_model_without_a_router_in_sight_loads_nothing_ahead(tmp_path: Path) -> None:
    save_tiny(family("afmoe"), tmp_path)
    _, moe = generated(tmp_path, ram_slots=6)
    assert moe.prefetch == "none"
    with pytest.raises(ConfigError, match="found no router beside these experts"):
        generated(tmp_path, ram_slots=6, prefetch="gate_lookahead")


@pytest.mark.parametrize(("slots", "chosen"), [(256, "none"), (64, "gate_lookahead"), (12, "none")])
def test_auto_looks_ahead_where_it_can_be_of_use(slots: int, chosen: str) -> None:
    with MoE(bundled_model_path(), ram=BUDGET, ram_slots=slots) as moe:
        assert moe.prefetch == chosen


def test_recording_leaves_no_hooks_behind() -> None:
    def num_hooks(moe: MoE) -> int:
        modules = moe.model.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    for prefetch in ("none", "gate_lookahead"):
        with MoE(bundled_model_path(), ram=BUDGET, ram_slots=64, prefetch=prefetch) as moe:
            before = num_hooks(moe)
            with moe.recording(logits=True, hidden=True, foresight=2) as recorder:
                generate(moe, num_new=3)
                assert num_hooks(moe) > before
            assert num_hooks(moe) == before
            generate(moe, num_new=3)  # and it still runs
            assert recorder.trace().num_tokens > 0


def test_what_routers_say_early_is_what_they_would_say() -> None:
    """On its own input, a router asked early gives the logits it gave."""
    with MoE(bundled_model_path(), ram=BUDGET, ram_slots=64) as moe:
        observer = moe._wiring._runtime.observer
        assert observer is not None
        taps = observer._taps
        assert isinstance(taps, RouterTaps)
        with moe.recording(logits=True, hidden=True, foresight=2) as recorder:
            generate(moe, num_new=6)
        trace = recorder.trace().of_phase("decode")
        x = torch.from_numpy(trace.hidden[:, 3].astype(np.float32)).to(torch.bfloat16)
        said = taps.foresee("raw", 2, x, 1)[:, 0]
        assert np.abs(said - trace.logits[:, 3].astype(np.float32)).max() < 0.05
        assert trace.foresight["raw"].shape[2] == 2
        assert (trace.foresight["raw"][:, -1] == -np.inf).all()  # after the last layer is none


def test_a_prompts_router_input_does_not_outlive_its_layer() -> None:
    with MoE(bundled_model_path(), ram=BUDGET, ram_slots=64) as moe:
        moe(torch.arange(1, 40)[None])
        assert moe._wiring._runtime.observer._taps._input is None
