"""Lifetimes, reports and failures of the engine, through its public face, on small models."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import MoE, Stats, bundled_model_path
from moe_infinity.cache.transfer import READ_THREADS
from moe_infinity.errors import (
    BudgetError,
    CheckpointNotFoundError,
    ConfigError,
    NotAnMoEError,
    PlanExceededError,
    ReadError,
    UnknownNameError,
)
from moe_infinity.model.workspace import workspace_bytes
from moe_infinity.policies.lru import Policy as LruPolicy
from moe_infinity.simulator.belady import optimal_misses
from moe_infinity.stats import PhaseStats
from moe_infinity.tracing.event import Event
from support.checkpoints import dense_checkpoint
from support.engine import (
    BUDGET,
    IDS,
    assert_at_rest,
    generate,
    leaving_nothing,
    readers,
)

POLICIES = ("fifo", "lru", "lfu", "lfru", "next_use")


class Watching(LruPolicy):
    """LRU that keeps every event it is shown."""

    seen: list[Event]

    def on_event(self, event: Event) -> None:
        Watching.seen.append(event)
        super().on_event(event)


class TestOpening:
    def test_closes_once_and_again(self, tiny: Path) -> None:
        others = len(readers())
        with leaving_nothing():
            moe = MoE(tiny, ram=BUDGET)
            assert len(readers()) == others + READ_THREADS
            moe.close()
            moe.close()

    def test_five_times_leaks_nothing(self, tiny: Path) -> None:
        with leaving_nothing():
            for _ in range(5):
                with MoE(tiny, ram=BUDGET, num_read_threads=3) as moe:
                    generate(moe, 2)

    def test_two_models_at_once(self, tiny: Path) -> None:
        with MoE(tiny, ram=BUDGET, ram_slots=4) as one, MoE(tiny, ram=BUDGET) as two:
            assert torch.equal(generate(one), generate(two))
            assert torch.equal(one(IDS).logits, two(IDS).logits)

    def test_a_closed_model_says_so(self, tiny: Path) -> None:
        with MoE(tiny, ram=BUDGET) as moe:
            generate(moe)
        for use in (generate, lambda m: m(IDS)):
            with pytest.raises(ConfigError, match="closed; open it again"):
                use(moe)
        assert moe.stats().misses > 0  # reports outlive the model

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"ram": "100MiB"}, BudgetError),
            ({"ram_slots": 1}, BudgetError),
            ({"policy": "nosuch"}, UnknownNameError),
            ({"policy": "nosuch.module:Class"}, UnknownNameError),
            ({"policy": "support.checkpoints:Path"}, ConfigError),
            ({"prefetch": "nosuch"}, UnknownNameError),
        ],
    )
    def test_a_refusal_leaves_nothing(
        self, tiny: Path, options: dict[str, Any], error: type[Exception]
    ) -> None:
        with leaving_nothing(), pytest.raises(error):
            MoE(tiny, **{"ram": BUDGET, **options})

    def test_a_wrong_name_does_not_wait_for_a_download(self) -> None:
        for options in ({"policy": "nosuch"}, {"prefetch": "nosuch"}):
            with pytest.raises(UnknownNameError, match="there are: "):
                MoE("nobody/nothing", **options)

    def test_a_dense_model_leaves_nothing(self, tmp_path: Path) -> None:
        path = dense_checkpoint(tmp_path / "dense")
        with leaving_nothing(), pytest.raises(NotAnMoEError, match=r"llama.*no routed experts"):
            MoE(path, ram=BUDGET)

    def test_a_failed_read_leaves_nothing(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        with leaving_nothing():
            monkeypatch.setattr(os, "preadv", fail)
            with pytest.raises(ReadError, match=r"Input/output error.*check the disk"):
                MoE(tiny, ram=BUDGET)

    def test_without_a_tokenizer_only_the_tokenizer_is_missing(self, moe: MoE) -> None:
        assert generate(moe, 2).shape == (1, 32)
        with pytest.raises(CheckpointNotFoundError, match=r"no tokenizer.*token ids instead"):
            _ = moe.tokenizer

    def test_a_path_may_be_a_string(self, tiny: Path) -> None:
        with MoE(str(tiny), ram=BUDGET) as moe:
            assert moe.path == tiny


class TestInput:
    def test_one_row_may_come_flat(self, moe: MoE) -> None:
        flat = moe.generate(IDS[0].tolist(), max_new_tokens=4)
        assert torch.equal(flat, moe.generate(IDS, max_new_tokens=4))

    @pytest.mark.parametrize("ids", [[], [[]], [[[1, 2]]], 5])
    def test_other_shapes_are_refused(self, moe: MoE, ids: Any) -> None:
        with pytest.raises(ConfigError, match=r"input_ids: got shape .*expected \[rows, length\]"):
            moe.generate(ids)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([[1, 2], [3]], "expected rows of token ids of one length.*attention_mask"),
            ("hello", "got 'hello', expected rows of token ids"),
            (None, "got None, expected rows of token ids"),
            ([2**70], "expected rows of token ids"),
            ([1.5, 2.5], "got torch.float32 numbers, expected whole ones"),
            ([1, 96], "got 1 to 96, expected 0 to 95"),
            ([-1, 5], "got -1 to 5, expected 0 to 95"),
        ],
    )
    def test_other_ids_are_refused(self, moe: MoE, ids: Any, message: str) -> None:
        for use in (moe.generate, moe):
            with pytest.raises(ConfigError, match=f"input_ids: .*{message}"):
                use(ids)

    @pytest.mark.parametrize("length", [5, 30, 34])
    def test_a_prompt_that_its_cache_holds_already_is_refused(self, moe: MoE, length: int) -> None:
        """At the very length of the cache the library took every token for a new one."""
        cache = moe.new_cache()
        tokens = generate(moe, 5, past_key_values=cache)
        assert cache.get_seq_length() == 34
        with pytest.raises(ConfigError, match=rf"got {length} tokens, expected more than the 34"):
            moe.generate(tokens[:, :length], past_key_values=cache)
        again = moe.generate(tokens, max_new_tokens=3, eos_token_id=None, past_key_values=cache)
        assert again.shape == (1, 38)
        assert_at_rest(moe)

    @pytest.mark.parametrize("number", [0, -1, None, "5", 2.5])
    def test_so_are_other_numbers_of_new_tokens(self, moe: MoE, number: Any) -> None:
        with pytest.raises(ConfigError, match=r"max_new_tokens: got .*whole number of at least 1"):
            moe.generate(IDS, max_new_tokens=number)

    @pytest.mark.parametrize(
        "options",
        [{"num_beams": 2, "do_sample": False}, {"num_return_sequences": 2, "do_sample": True}],
    )
    def test_rows_beyond_the_plan_are_refused(self, moe: MoE, options: dict[str, Any]) -> None:
        with pytest.raises(PlanExceededError, match=r"got 2 rows, expected at most.*max_batch=2"):
            moe.generate(IDS, max_new_tokens=2, **options)
        with pytest.raises(PlanExceededError, match="got 2 rows"):
            moe(torch.cat([IDS, IDS]))

    def test_rows_named_in_a_generation_config_count(self, moe: MoE) -> None:
        import transformers

        config = transformers.GenerationConfig(num_beams=3, pad_token_id=0)
        with pytest.raises(PlanExceededError, match="got 3 rows"):
            moe.generate(IDS, max_new_tokens=2, generation_config=config)

    def test_beams_hold_the_sequences_that_are_returned(self, tiny: Path) -> None:
        with MoE(tiny, ram=BUDGET, max_batch=3) as moe:
            out = generate(moe, 4, num_beams=3, num_return_sequences=2, do_sample=False)
            assert out.shape == (2, 34)

    def test_logits_beyond_the_budget_are_refused(self, tiny: Path) -> None:
        with MoE(tiny, ram=BUDGET) as moe:
            smallest = moe.plan.smallest_budget_bytes
        with MoE(tiny, ram=smallest + 2**20, max_context=250, max_batch=1) as moe:
            assert moe(IDS[:, :1]).logits.shape == (1, 1, 96)
            moe.plan = _without_room(moe)
            with pytest.raises(PlanExceededError, match=r"1 x 30 tokens.*keep=1"):
                moe(IDS)
            assert moe(IDS, logits_to_keep=1).logits.shape == (1, 1, 96)


def _without_room(moe: MoE) -> Any:
    """The plan with room for 30 tokens' activations, one position's logits, and no more."""
    from dataclasses import replace

    room = workspace_bytes(moe.model, 30, 1, moe.model.dtype, pass_tokens=30) + 96 * 4
    used = moe.plan.used_bytes - moe.plan.workspace_bytes
    return replace(moe.plan, workspace_bytes=room, budget_bytes=used + room)


class TestReport:
    def test_before_any_request(self, moe: MoE) -> None:
        for report in (moe.stats(), moe.stats(total=True)):
            assert (report.hits, report.misses, report.late, report.demand_bytes) == (0, 0, 0, 0)
            for value in (report.hit_rate, report.ttft_s, report.tpot_s, report.tokens_per_s):
                assert value is None
            assert report.limit_fraction is None and report.belady_fraction is None
            assert (report.slots, report.experts_total) == (9, 24)
            assert report.bit_exact and report.lossy == ()
            assert report.peak_rss_bytes > 0

    def test_prefill_and_decode_apart(self, moe: MoE) -> None:
        generate(moe, 8)
        report = moe.stats()
        assert (report.prefill.num_tokens, report.decode.num_tokens) == (30, 7)
        _assert_consistent(report)
        assert report.ttft_s is not None and report.tpot_s is not None
        assert 0 < report.ttft_s < report.prefill.wall_s + report.decode.wall_s
        assert report.tpot_s == pytest.approx(report.decode.wall_s / 7)

    @pytest.mark.parametrize("length", [1, 2])
    def test_a_short_prompt_is_prefill(self, moe: MoE, length: int) -> None:
        moe.generate(IDS[:, :length], max_new_tokens=3, eos_token_id=None)
        report = moe.stats()
        assert (report.prefill.num_tokens, report.decode.num_tokens) == (length, 2)
        assert report.ttft_s is not None and report.ttft_s > 0

    def test_one_new_token_needs_no_decode(self, moe: MoE) -> None:
        generate(moe, 1)
        report = moe.stats()
        assert report.decode.num_tokens == 0
        assert report.ttft_s is not None and report.tpot_s is None
        _assert_consistent(report)

    def test_a_forward_pass_has_no_first_token(self, moe: MoE) -> None:
        moe(IDS)
        assert moe.stats().ttft_s is None
        assert moe.stats().prefill.num_tokens == 30
        _assert_consistent(moe.stats())

    def test_rows_of_a_batch_share_a_pass(self, tiny: Path) -> None:
        with MoE(tiny, ram=BUDGET, max_batch=2) as moe:
            moe.generate(torch.cat([IDS, IDS + 1]), max_new_tokens=5, eos_token_id=None)
            report = moe.stats()
        assert (report.prefill.num_tokens, report.decode.num_tokens) == (60, 8)
        assert report.tpot_s == pytest.approx(report.decode.wall_s / 4)

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("num_slots", [2, 9, 24])
    def test_every_setting_adds_up(self, tiny: Path, policy: str, num_slots: int) -> None:
        with MoE(tiny, ram=BUDGET, policy=policy, ram_slots=num_slots) as moe:
            for number in range(3):
                moe.generate(IDS[:, : 5 + number], max_new_tokens=6, eos_token_id=None)
                _assert_consistent(moe.stats())
                assert_at_rest(moe)
            if num_slots == 24:
                assert moe.stats().decode.hit_rate is not None

    def test_counts_are_those_of_the_events(self, tiny: Path) -> None:
        Watching.seen = []
        with MoE(tiny, ram=BUDGET, ram_slots=7, policy=f"{__name__}:Watching") as moe:
            generate(moe, 10)
            report = moe.stats()
        for phase, part in (("prefill", report.prefill), ("decode", report.decode)):
            events = [e for e in Watching.seen if e.phase == phase]
            assert part.hits + part.late + part.misses == sum(len(e.experts) for e in events)
        assert len(Watching.seen) == 3 * 10
        accesses = [(e.layer, e.experts.astype("int16")) for e in Watching.seen]
        read = report.demand_bytes + report.prefetch_bytes
        per_expert = moe.plan.read_bytes_per_token // moe.plan.working_set
        assert read // per_expert >= sum(optimal_misses(accesses, 7, 8))

    def test_total_is_the_sum(self, moe: MoE) -> None:
        reports = []
        for length in (4, 11, 7):
            moe.generate(IDS[:, :length], max_new_tokens=3, eos_token_id=None)
            reports.append(moe.stats())
        total = moe.stats(total=True)
        for name in ("hits", "misses", "late", "demand_bytes", "prefetch_bytes"):
            assert getattr(total, name) == sum(getattr(r, name) for r in reports), name
        for name in ("stall_s", "compute_s"):
            assert getattr(total, name) == pytest.approx(sum(getattr(r, name) for r in reports))
        assert total.prefill.num_tokens == 22 and total.decode.num_tokens == 6
        assert total.ttft_s is None and total.belady_fraction is None
        assert moe.stats().misses == reports[-1].misses

    def test_residency_fills_up(self, moe: MoE) -> None:
        assert [tier["ram"] for tier in moe.residency()] == [[], [], []]
        generate(moe)
        assert sum(len(tier["ram"]) for tier in moe.residency()) == moe.stats().slots == 9

    def test_more_slots_than_experts_are_all(self, tiny: Path) -> None:
        with MoE(tiny, ram=BUDGET, ram_slots=10**6) as moe:
            assert moe.stats().slots == 24

    def test_speeds_are_measured_once_and_the_file_is_counted(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MOE_INFINITY_STATE_DIR", str(tmp_path / "state"))
        with MoE(tiny, ram=BUDGET) as moe:
            assert not (tmp_path / "state").exists()
            moe.stats()
        (file,) = (tmp_path / "state").iterdir()
        assert moe.stats().bytes_written == file.stat().st_size
        with MoE(tiny, ram=BUDGET) as again:
            assert again.bandwidths() == moe.bandwidths()
        assert again.stats().bytes_written == 0


def _assert_consistent(report: Stats) -> None:
    phases: tuple[PhaseStats, PhaseStats] = (report.prefill, report.decode)
    for name in ("hits", "misses", "late", "demand_bytes", "prefetch_bytes"):
        assert getattr(report, name) == sum(getattr(p, name) for p in phases), name
    for part in (report, *phases):
        looked_up = part.hits + part.late + part.misses
        assert part.hit_rate == (part.hits / looked_up if looked_up else None)
        assert part.wasted_prefetch_bytes <= part.prefetch_bytes
        assert part.demand_bytes % 4096 == 0
        assert (part.demand_bytes == 0) == (part.misses == 0)
        if part.limit_fraction is not None:
            assert 0 < part.limit_fraction <= 1
            assert part.belady_fraction is None or part.belady_fraction <= part.limit_fraction
    assert report.belady_fraction is not None
    for part in phases:
        assert part.stall_s + part.compute_s <= part.wall_s or part.num_tokens == 0


def test_the_bundled_model_speaks() -> None:
    with MoE(bundled_model_path(), ram_slots=64) as moe:
        ids = moe.tokenizer("Question: What is 2 + 3? Answer:", return_tensors="pt").input_ids
        text = moe.tokenizer.decode(moe.generate(ids, max_new_tokens=12)[0])
        report = moe.stats()
    assert text.startswith("Question: What is 2 + 3? Answer:") and len(text) > 40
    assert report.slots == 64 and report.experts_total == 256
    assert report.peak_rss_bytes <= moe.plan.budget_bytes
