"""Lifetimes, reports and failures of the engine, through its public face, on small models."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import MoE, Stats, bundled_model_path
from moe_infinity.errors import (
    BudgetError,
    CancelledError,
    CheckpointChangedError,
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
from support.checkpoints import dense_checkpoint, tiny_checkpoint, truncate, weights

BUDGET = "8GiB"
POLICIES = ("fifo", "lru", "lfu", "lfru", "next_use")
PATIENCE_S = 60
IDS = torch.arange(1, 31)[None]  # [1, 30] int64


class Watching(LruPolicy):
    """LRU that keeps every event it is shown."""

    seen: list[Event]

    def on_event(self, event: Event) -> None:
        Watching.seen.append(event)
        super().on_event(event)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture
def moe(tiny: Path) -> Iterator[MoE]:
    """The tiny model with 9 of its 24 experts in memory."""
    with MoE(tiny, ram=BUDGET, ram_slots=9) as opened:
        yield opened


def generate(moe: MoE, num_new: int = 8, **options: Any) -> torch.Tensor:
    return moe.generate(IDS, max_new_tokens=num_new, eos_token_id=None, **options)


def assert_at_rest(moe: MoE) -> None:
    """Nothing is pinned, in flight, lost or doubled."""
    moe.check_integrity()
    directory = moe._hierarchy.residency.directory
    assert not directory.pins.any()
    assert not moe._hierarchy._in_flight
    tiers = moe.residency()
    assert sum(len(t["ram"]) for t in tiers) <= moe.stats().slots
    for tier in tiers:
        assert sorted(tier["ram"] + tier["disk"]) == list(range(len(tier["ram"] + tier["disk"])))


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("moe-infinity-read-")]


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Fails if more threads or files are open at the end than at the beginning."""
    before = (len(readers()), num_open_files())
    yield
    assert (len(readers()), num_open_files()) == before


class Gate:
    """Holds every read of the checkpoint until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        real = os.preadv

        def held(fd: int, buffers: Any, offset: int, *flags: int) -> int:
            self.reached.set()
            assert self._open.wait(PATIENCE_S)
            return real(fd, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", held)

    def open(self) -> None:
        self._open.set()


class Request(threading.Thread):
    """A request in a thread of its own; keeps what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error

    def end(self) -> BaseException | None:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.error


class TestOpening:
    def test_closes_once_and_again(self, tiny: Path) -> None:
        with leaving_nothing():
            moe = MoE(tiny, ram=BUDGET)
            assert len(readers()) == moe.config.num_read_threads
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

    room = workspace_bytes(moe.model.config, 30, 1, moe.model.dtype, pass_tokens=30) + 96 * 4
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


class TestOneAtATime:
    def test_a_second_request_is_refused(self, moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = Gate(monkeypatch)
        first = Request(lambda: generate(moe))
        assert gate.reached.wait(PATIENCE_S)
        with pytest.raises(ConfigError, match=r"a request is running.*cancel\(\)"):
            generate(moe)
        assert moe.residency() and moe.stats().decode.num_tokens == 0  # may be asked meanwhile
        gate.open()
        assert first.end() is None
        assert_at_rest(moe)

    def test_cancel_in_prefill(self, moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = generate(moe)
        moe.generate(IDS + 40, max_new_tokens=2)
        gate = Gate(monkeypatch)
        request = Request(lambda: generate(moe))
        assert gate.reached.wait(PATIENCE_S)
        moe.cancel()
        gate.open()
        assert isinstance(request.end(), CancelledError)
        assert_at_rest(moe)
        assert torch.equal(generate(moe), expected)

    def test_cancel_in_decode(self, moe: MoE) -> None:
        class CancelsAt:
            def __init__(self) -> None:
                self.num_tokens = 0

            def put(self, value: Any) -> None:
                self.num_tokens += 1
                if self.num_tokens == 4:
                    moe.cancel()

            def end(self) -> None:
                raise AssertionError("the answer was not cancelled")

        streamer = CancelsAt()
        with pytest.raises(CancelledError, match="was cancelled"):
            generate(moe, 20, streamer=streamer)
        assert streamer.num_tokens == 4
        assert moe.stats().decode.num_tokens == 3  # the report is of what was done
        assert_at_rest(moe)

    def test_cancel_of_nothing_is_forgotten(self, moe: MoE) -> None:
        moe.cancel()
        assert generate(moe).shape == (1, 38)

    def test_close_ends_the_running_request(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with leaving_nothing():
            moe = MoE(tiny, ram=BUDGET)
            gate = Gate(monkeypatch)
            request = Request(lambda: generate(moe))
            assert gate.reached.wait(PATIENCE_S)
            closing = Request(moe.close)
            _wait_until(moe._hierarchy.cancelled.is_set)
            gate.open()
            assert isinstance(request.end(), CancelledError)
            assert closing.end() is None

    def test_an_error_of_the_callers_own_passes_through(self, moe: MoE) -> None:
        class Breaks:
            def put(self, value: Any) -> None:
                raise BrokenPipeError("the reader has left")

            def end(self) -> None: ...

        with pytest.raises(BrokenPipeError):
            generate(moe, streamer=Breaks())
        assert_at_rest(moe)
        assert generate(moe).shape == (1, 38)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class TestCtrlC:
    """Wherever it strikes, the request ends as KeyboardInterrupt and the model goes on."""

    @pytest.mark.parametrize("number", [0, 1, 2, 7, 20, 60])
    def test_between_experts(self, moe: MoE, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        import signal

        expected = generate(moe)
        moe.generate(IDS + 40, max_new_tokens=2)
        residency = moe._hierarchy.residency
        real, calls = residency.finish, []

        def interrupted(key: Any) -> None:
            calls.append(key)
            if len(calls) == number + 1:
                os.kill(os.getpid(), signal.SIGINT)
            real(key)

        monkeypatch.setattr(residency, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(moe)
        monkeypatch.undo()
        assert len(calls) <= number + 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert_at_rest(moe)
        assert torch.equal(generate(moe), expected)

    def test_a_second_one_does_not_wait(self, moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
        import signal

        def stuck(event: Any, compute: Any) -> None:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second Ctrl-C was put off")

        monkeypatch.setattr(moe._hierarchy, "run_event", stuck)
        with pytest.raises(KeyboardInterrupt):
            generate(moe)
        monkeypatch.undo()
        assert generate(moe).shape == (1, 38)

    def test_a_handler_of_the_callers_own_is_left_alone(self, moe: MoE) -> None:
        import signal

        caught = []
        before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
        try:

            class Interrupts:
                def put(self, value: Any) -> None:
                    os.kill(os.getpid(), signal.SIGINT)

                def end(self) -> None: ...

            assert generate(moe, 3, streamer=Interrupts()).shape == (1, 33)
        finally:
            signal.signal(signal.SIGINT, before)
        assert len(caught) == 4


class TestDiskTrouble:
    """In mid-generation: a named error, nothing pinned, and the next request as the disk allows."""

    @pytest.fixture
    def copy(self, tiny: Path, tmp_path: Path) -> Path:
        import shutil

        return shutil.copytree(tiny, tmp_path / "copy")

    def _fail_after(
        self, monkeypatch: pytest.MonkeyPatch, number: int, fail: Callable[..., int]
    ) -> None:
        """Every read after so many ends in ``fail``."""
        real, lock, left = os.preadv, threading.Lock(), [number]

        def preadv(fd: int, buffers: Any, offset: int, *flags: int) -> int:
            with lock:
                left[0] -= 1
                failing = left[0] < 0
            return (fail if failing else real)(fd, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", preadv)

    @pytest.mark.parametrize("number", [0, 1, 5, 17, 30])
    def test_a_failing_disk(self, moe: MoE, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        def fail(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        with MoE(moe.path, ram=BUDGET) as other:
            expected = generate(other)
        self._fail_after(monkeypatch, number, fail)
        for _ in range(2):
            with pytest.raises(ReadError, match=r"safetensors: reading \d+ bytes at \d+ failed"):
                generate(moe, 20)
            assert_at_rest(moe)
        monkeypatch.undo()
        assert torch.equal(generate(moe), expected)
        assert_at_rest(moe)

    @pytest.mark.parametrize("got", [0, 100])
    def test_a_short_read(self, moe: MoE, monkeypatch: pytest.MonkeyPatch, got: int) -> None:
        expected = generate(moe)
        moe.generate(IDS + 40, max_new_tokens=2)
        self._fail_after(monkeypatch, 2, lambda *_: got)
        with pytest.raises(ReadError, match=rf"got {got} bytes at .*download it again"):
            generate(moe)
        assert_at_rest(moe)
        monkeypatch.undo()
        assert torch.equal(generate(moe), expected)

    def test_a_read_in_two_parts(self, moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.preadv
        with MoE(moe.path, ram=BUDGET) as other:
            expected = other(IDS).logits

        def half(fd: int, buffers: Any, offset: int, *flags: int) -> int:
            return real(fd, [buffers[0][:4096]], offset, *flags)

        self._fail_after(monkeypatch, 0, half)
        assert torch.equal(moe(IDS).logits, expected)

    def test_truncated_since_it_was_opened(self, copy: Path) -> None:
        with MoE(copy, ram=BUDGET, ram_slots=4) as moe:
            generate(moe)
            truncate(copy)
            for _ in range(2):
                with pytest.raises(CheckpointChangedError, match=r"changed on disk.*open the"):
                    generate(moe)
                assert_at_rest(moe)

    def test_rewritten_since_it_was_opened(self, copy: Path) -> None:
        with MoE(copy, ram=BUDGET, ram_slots=4) as moe:
            generate(moe)
            with weights(copy).open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\0\0\0\0")
            stat = weights(copy).stat()
            os.utime(weights(copy), ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
            with pytest.raises(CheckpointChangedError, match="open the model again"):
                generate(moe)
            assert_at_rest(moe)

    def test_deleted_since_it_was_opened(self, copy: Path) -> None:
        """An open file outlives its name."""
        with MoE(copy, ram=BUDGET, ram_slots=4) as moe:
            expected = generate(moe)
            weights(copy).unlink()
            assert torch.equal(generate(moe), expected)
            assert moe.stats().misses > 0


def test_the_bundled_model_speaks() -> None:
    with MoE(bundled_model_path(), ram_slots=64) as moe:
        ids = moe.tokenizer("Question: What is 2 + 3? Answer:", return_tensors="pt").input_ids
        text = moe.tokenizer.decode(moe.generate(ids, max_new_tokens=12)[0])
        report = moe.stats()
    assert text.startswith("Question: What is 2 + 3? Answer:") and len(text) > 40
    assert report.slots == 64 and report.experts_total == 256
    assert report.peak_rss_bytes <= moe.plan.budget_bytes
