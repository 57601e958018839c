"""Loads that compiled code begins before anybody has decided on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from moe_infinity import MoE, bundled_model_path, planning
from moe_infinity.cache import queued
from moe_infinity.cache.early_reads import NUM_EARLY, Begun, EarlyReads
from moe_infinity.cache.queued import QueuedTransfers
from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.cache.transfer import TransferState
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES as PAGE
from moe_infinity.checkpoint.direct_io import DirectFile, allocate
from moe_infinity.checkpoint.kernel_reads import KernelReads
from moe_infinity.checkpoint.safetensors import FileStore
from moe_infinity.kernels import native
from moe_infinity.model.stretch import Stretch
from moe_infinity.types import ExpertKey, ExpertSpec, ReadRange
from support.engine import BUDGET
from support.kernel_queues import require_kernel_queues

needs_compiler = pytest.mark.skipif(native.native is None, reason="installed without a compiler")
PROMPT = [5, 9, 300, 17, 44, 301, 8, 2, 77]
KEY = ExpertKey(0, 1)
NUM_PAGES = 5


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    require_kernel_queues()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[QueuedTransfers]:
    """Over a file of two experts, in chunks of a page."""
    (tmp_path / "experts").write_bytes(bytes(range(256)) * (2 * NUM_PAGES * PAGE // 256))
    file = DirectFile(tmp_path / "experts")
    size = NUM_PAGES * PAGE
    ranges = [ReadRange(0, expert * size, size, size, 0) for expert in range(2)]
    keys = [ExpertKey(0, expert) for expert in range(2)]
    specs = {k: ExpertSpec(k, (), (r,), size) for k, r in zip(keys, ranges, strict=True)}
    engine = QueuedTransfers(FileStore(specs, [file]), 1, PAGE, KernelReads(queued.DEPTH))
    yield engine
    engine.close()
    file.close()


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Begun:
    """A load of KEY of which the queue took no piece, as compiled code says it."""
    found = Begun(KEY, 1, memoryview(allocate(NUM_PAGES * PAGE)), 0)
    seen: list[Begun] = []
    monkeypatch.setattr(EarlyReads, "unseen", lambda self: [] if seen else [found])
    monkeypatch.setattr(EarlyReads, "see", lambda self, each: seen.append(each))
    return found


def wait_for_the_rest(engine: QueuedTransfers) -> None:
    while engine._unsettled:
        assert engine.take_settled() == [], "nobody has asked for it"


def test_nobody_is_told_of_it_before_it_is_claimed(engine: QueuedTransfers, begun: Begun) -> None:
    assert engine.take_settled() == []
    wait_for_the_rest(engine)
    found = engine.take_begun(KEY)
    assert found is not None
    assert found[1] == begun.spare
    assert engine.take_settled() == [found[0]]
    assert found[0].state is TransferState.DONE
    assert bytes(begun.buffer) == bytes(range(256)) * (NUM_PAGES * PAGE // 256)
    assert engine.take_begun(KEY) is None


def test_one_that_is_claimed_at_once_is_waited_for(engine: QueuedTransfers, begun: Begun) -> None:
    assert engine.take_settled() == []
    found = engine.take_begun(begun.key)
    assert found is not None
    engine.wait_any()
    assert engine.take_settled() == [found[0]]


@pytest.mark.usefixtures("begun")
def test_a_drain_forgets_it(engine: QueuedTransfers) -> None:
    assert engine.take_settled() == []
    engine.drain()
    assert engine.take_begun(KEY) is None
    assert engine.take_settled() == []


def test_a_drain_forgets_what_nobody_has_seen(engine: QueuedTransfers) -> None:
    early, into = engine.early, memoryview(allocate(NUM_PAGES * PAGE))
    assert early is not None
    early.offer(0, into)
    early._spares[0, 1:] = 1, KEY.expert, 0  # as compiled code writes it
    assert early.unseen() == [Begun(KEY, 0, into, 0)]
    engine.drain()
    assert early.unseen() == []
    assert not early.is_any_begun()
    assert early.is_at(0, into)


def test_an_expert_in_many_pieces_is_left_to_others(engine: QueuedTransfers) -> None:
    early = engine.early
    assert early is not None
    piece = ReadRange(0, 0, PAGE, PAGE, 0)
    early.plan(KEY, [piece] * 9, [3] * 9)
    assert not early.is_planned(KEY)
    engine.plan_early(KEY)
    assert early.is_planned(KEY)
    early.end()
    assert not early.is_planned(KEY)
    engine.plan_early(KEY)
    assert not early.is_planned(KEY)


@contextmanager
def opened(slots: int = 48, prefetch: str = "none") -> Iterator[MoE]:
    with MoE(bundled_model_path(), ram=BUDGET, ram_slots=slots, prefetch=prefetch) as moe:
        yield moe
        moe._hierarchy.check_integrity()


def said(moe: MoE, num_new: int = 16) -> list[int]:
    return moe.generate([PROMPT], max_new_tokens=num_new, eos_token_id=None)[0].tolist()


def figures(moe: MoE) -> tuple[int, ...]:
    decode = moe.stats(total=True).decode
    return decode.hits, decode.misses, decode.late, decode.demand_bytes, decode.prefetch_bytes


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> list[ExpertKey]:
    """Of loads that were begun early."""
    found: list[ExpertKey] = []
    real = QueuedTransfers.take_begun

    def take(self: QueuedTransfers, key: ExpertKey) -> object:
        taken = real(self, key)
        found.extend([key] if taken else [])
        return taken

    monkeypatch.setattr(QueuedTransfers, "take_begun", take)
    return found


@needs_compiler
@pytest.mark.parametrize("slots", [10, 48, 96])
def test_words_and_decisions_are_those_without(
    slots: int, claims: list[ExpertKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(slots) as moe:
        words = [said(moe) for _ in range(3)]
        with_early = figures(moe)
        assert moe.plan.num_early == NUM_EARLY
    assert len(claims) > 20
    monkeypatch.setattr(planning, "NUM_EARLY", 0)
    claims.clear()
    with opened(slots) as moe:
        assert [said(moe) for _ in range(3)] == words
        assert figures(moe) == with_early
        assert moe.plan.num_early == 0
    assert not claims


@needs_compiler
def test_who_looks_ahead_says_the_same(
    claims: list[ExpertKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened() as moe:
        expected = [said(moe) for _ in range(2)]
    monkeypatch.setattr(RamHierarchy, "looks_ahead", lambda self: True)
    with opened(prefetch="gate_lookahead") as moe:
        assert [said(moe) for _ in range(2)] == expected
    assert claims


class _Struck(Exception):
    """In place of an interrupt."""


PLACES = [
    (native.Kernel, "run_ahead"),
    (QueuedTransfers, "_take_over"),
    (QueuedTransfers, "take_begun"),
    (EarlyReads, "see"),
    (EarlyReads, "offer"),
    (RamHierarchy, "_change_places"),
    (RamHierarchy, "compute"),
]


@needs_compiler
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[name for _, name in PLACES])
def test_an_interrupt_anywhere_loses_no_memory(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or behind each of these."""
    with opened() as moe:
        expected = said(moe, 8)
        real, left = getattr(owner, name), 0

        def strike(*args: object) -> object:
            nonlocal left
            left -= 1
            if left == 0 and num_struck % 2:
                raise _Struck
            result = real(*args)
            if left == 0:
                raise _Struck
            return result

        monkeypatch.setattr(owner, name, strike)
        num_struck = 0
        for left in range(3, 18, 3):
            with suppress(_Struck):
                said(moe, 8)
            moe._hierarchy.check_integrity()
            num_struck += left <= 0
            left = 0
            assert said(moe, 8) == expected
            moe._hierarchy.check_integrity()
        assert num_struck > 2


@needs_compiler
def test_what_was_read_for_a_pass_that_is_thrown_away_is_spare_again(
    claims: list[ExpertKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library does that pass; it may choose other experts."""
    with opened() as moe:
        expected = said(moe)
        early = moe._hierarchy.early
        assert early is not None
        is_on, num_left = False, 0
        real_run = Stretch._run_ahead

        def run(self: Stretch, *args: object) -> object:
            found = real_run(self, *args)  # type: ignore[arg-type]
            nonlocal num_left
            if is_on and early.is_any_begun():
                num_left += 1
                raise _Struck
            return found

        monkeypatch.setattr(Stretch, "_run_ahead", run)
        is_on = True
        for num_struck in range(1, 5):
            with pytest.raises(_Struck):
                said(moe)
            assert num_left == num_struck
            assert early.is_any_begun()
            moe._hierarchy.begin_pass("prefill")
            assert not early.is_any_begun()
        is_on = False
        claims.clear()
        assert said(moe) == expected
        assert claims


@needs_compiler
def test_bytes_that_do_not_arrive_are_read_again(
    claims: list[ExpertKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reads less than was asked for: threads try again."""
    with opened() as moe:
        expected = [said(moe) for _ in range(2)]
    assert claims
    claims.clear()
    real = EarlyReads.plan

    def behind_the_end(
        self: EarlyReads, key: ExpertKey, pieces: Sequence[ReadRange], files: Sequence[int]
    ) -> None:
        real(self, key, [piece._replace(file_offset=1 << 40) for piece in pieces], files)

    monkeypatch.setattr(EarlyReads, "plan", behind_the_end)
    with opened() as moe:
        assert [said(moe) for _ in range(2)] == expected
    assert claims


@needs_compiler
def test_a_model_may_be_closed_while_something_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as moe:
        said(moe)

        def strike(*args: object) -> None:
            raise _Struck

        monkeypatch.setattr(QueuedTransfers, "_take_over", strike)
        with pytest.raises(_Struck):
            said(moe)
        moe.close()
        early = moe._hierarchy.early
        assert early is not None
        assert not early.is_offered()
        monkeypatch.setattr(RamHierarchy, "check_integrity", lambda self: None)
