"""Requests that are cancelled, interrupted or starved: a named end, and the next one works."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import MoE
from moe_infinity.errors import (
    CancelledError,
    CheckpointChangedError,
    ConfigError,
    ReadError,
)
from support.bad_reads import fail_reads
from support.checkpoints import truncate, weights
from support.engine import (
    BUDGET,
    IDS,
    PATIENCE_S,
    Gate,
    Request,
    assert_at_rest,
    generate,
    leaving_nothing,
    wait_until,
)


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
            wait_until(moe._hierarchy.cancelled.is_set)
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
        assert len({key.layer for key in calls[number:]}) == 1  # some are computed at once
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert_at_rest(moe)
        assert torch.equal(generate(moe), expected)

    def test_the_first_one_waits_for_a_safe_point(self, moe: MoE) -> None:
        import signal

        class Interrupts:
            survived = False

            def put(self, value: Any) -> None:
                if not self.survived:
                    os.kill(os.getpid(), signal.SIGINT)
                    self.survived = True  # not raised here, but where a cancellation would be

            def end(self) -> None: ...

        streamer = Interrupts()
        with pytest.raises(KeyboardInterrupt):
            generate(moe, streamer=streamer)
        assert streamer.survived
        assert_at_rest(moe)

    def test_a_second_one_does_not_wait(self, moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
        import signal

        def stuck(event: Any, compute: Any, foreseen: Any = None) -> None:
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

    @pytest.mark.parametrize("number", [0, 1, 5, 17, 30])
    def test_a_failing_disk(self, moe: MoE, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        with MoE(moe.path, ram=BUDGET) as other:
            expected = generate(other)
        fail_reads(monkeypatch.setattr, number)
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
        fail_reads(monkeypatch.setattr, 2, lambda *_: got)
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

        fail_reads(monkeypatch.setattr, 0, half)
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
