"""``moe-infinity chat``: turns, commands, Ctrl-C, and what of a conversation is computed again."""

import os
import pty
import re
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import MoE, bundled_model_path
from moe_infinity.cli import chat
from moe_infinity.cli.conversation import Conversation, _Printer
from moe_infinity.model import kept_caches
from support.checkpoints import bundled_links
from support.command_line import Process, run

PATIENCE_S = 120
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def moe() -> Iterator[MoE]:
    with MoE(bundled_model_path(), ram="8GiB", dtype="float32", max_context=300) as opened:
        yield opened


def conversation(moe: MoE, num_new: int = 12, system: str | None = None) -> Conversation:
    return Conversation(moe, system, num_new, GREEDY)


class TestProgram:
    """In a process of its own, lines piped in."""

    def test_turns_commands_and_the_end(self) -> None:
        lines = "hello\n\n/stats\n/nosuch\n/reset\nhello\n"
        result = run("chat", "--max-new-tokens", 8, "--temperature", 0, stdin=lines)
        assert result.code == 0, result.err
        assert "Traceback" not in result.both and not result.left_running
        answers = result.out.split("> ")
        assert answers[0].startswith("/stats:") and "Ctrl-D" in answers[0]
        assert answers[1].strip() and answers[1] == answers[6]  # /reset forgets all
        assert "/reset: forget the conversation" in answers[4]
        assert "prefill" in result.err and "hit rate" in result.err

    def test_quit_ends_it_before_the_end(self) -> None:
        result = run("chat", "--max-new-tokens", 4, stdin="/quit\nnever read\n")
        assert result.code == 0 and result.out.count("> ") == 1

    def test_the_seed_decides(self) -> None:
        options = ("chat", "--max-new-tokens", 8, "--temperature", 1.5, "--seed")
        answers = [run(*options, seed, stdin="hello\n").out for seed in (1, 1, 2)]
        assert answers[0] == answers[1] != answers[2]

    def test_a_system_message(self) -> None:
        options = ("chat", "--max-new-tokens", 8, "--temperature", 0)
        plain = run(*options, stdin="hello\n")
        told = run(*options, "--system", "You are a pirate. " * 5, stdin="hello\n/stats\n")
        assert told.code == plain.code == 0 and told.out != plain.out

    def test_bytes_that_are_no_text(self) -> None:
        result = run("chat", "--max-new-tokens", 4, stdin=b"\xff\xfe\n/quit\n")
        assert result.code == 0 and "expected UTF-8" in result.err

    def test_a_conversation_too_long_says_so_and_goes_on(self) -> None:
        lines = f"{'long ' * 80}\nhello\n/reset\nhello\n"
        result = run("chat", "--max-context", 40, "--temperature", 0, stdin=lines)
        assert result.code == 0
        assert "error: context: got" in result.err and "/reset forgets" in result.err
        answers = result.out.split("> ")
        assert answers[2].strip() == answers[4].strip() != ""


class TestMemory:
    """Only what is new goes through the model; the words are those of the whole."""

    def test_the_second_turn_computes_less(self, moe: MoE, capsys: pytest.CaptureFixture) -> None:
        talk = conversation(moe)
        first = talk.answer("Tell me about the river.")
        whole = moe.stats().prefill.num_tokens
        second = talk.answer("And the sea?")
        messages = [
            {"role": "user", "content": "Tell me about the river."},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And the sea?"},
        ]
        prompt = moe.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert whole < len(prompt)
        assert 0 < moe.stats().prefill.num_tokens < len(prompt) - whole
        alone = moe.generate([prompt], max_new_tokens=12, **GREEDY)[0, len(prompt) :]
        assert second == moe.tokenizer.decode(alone, skip_special_tokens=True)
        assert capsys.readouterr().out == f"{first}\n{second}\n"

    def test_reset_forgets_the_cache_too(self, moe: MoE) -> None:
        talk = conversation(moe)
        first = talk.answer("hello")
        num_tokens = moe.stats().prefill.num_tokens
        talk.answer("again")
        talk.reset()
        assert talk.answer("hello") == first
        assert moe.stats().prefill.num_tokens == num_tokens

    def test_other_tokens_for_the_same_text_are_computed_again(
        self, moe: MoE, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A template may write the answer otherwise than it was generated."""
        talk = conversation(moe)
        talk.answer("hello")
        talk._messages[-1]["content"] = "Good day to you!"
        second = talk.answer("again")
        talk.reset()
        talk._messages = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "Good day to you!"},
        ]
        assert talk.answer("again") == second

    def test_a_cache_that_cannot_be_cropped_is_begun_anew(
        self, moe: MoE, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        talk = conversation(moe)
        talk.answer("hello")
        talk._messages[-1]["content"] = "Good day to you!"

        def refuse(*_: Any) -> None:
            raise RuntimeError("the sliding window size was already reached")

        monkeypatch.setattr(type(moe.new_cache()), "crop", refuse)
        monkeypatch.setattr(kept_caches, "_is_plain", lambda cache: False)
        talk.answer("again")
        assert moe.stats().prefill.num_tokens == len(_prompt(moe, talk))


def _prompt(moe: MoE, talk: Conversation) -> list[int]:
    return talk._prompt_ids(talk._messages[:-1])


class TestStopping:
    def test_what_was_said_is_kept(
        self, moe: MoE, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        talk = conversation(moe)
        whole = talk.answer("hello")
        talk.reset()
        real, number = _Printer.put, [0]

        def put(self: _Printer, value: Any) -> None:
            real(self, value)
            number[0] += 1
            if number[0] == 6:
                raise KeyboardInterrupt

        monkeypatch.setattr(_Printer, "put", put)
        said = talk.answer("hello")
        monkeypatch.undo()
        assert said and whole.startswith(said) and said != whole
        assert "[stopped]" in capsys.readouterr().out
        assert talk._messages[-1] == {"role": "assistant", "content": said}
        assert talk.answer("again")
        moe.check_integrity()

    def test_an_error_leaves_the_conversation_as_it_was(
        self, moe: MoE, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        talk = conversation(moe)
        talk.answer("hello")
        before = list(talk._messages)

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no more")

        monkeypatch.setattr(moe, "generate", fail)
        with pytest.raises(OSError, match="no more"):
            talk.answer("again")
        monkeypatch.undo()
        assert talk._messages == before
        assert talk.answer("again")

    def test_ctrl_c_between_two_answers(self, moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = iter(["hello", "/quit"])
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        monkeypatch.setattr(chat, "_serve", _interrupted)
        monkeypatch.setattr("moe_infinity.engine.MoE", lambda *_, **__: _Open(moe))
        chat.chat()


class _Open:
    """A model that is open already and stays so."""

    def __init__(self, moe: MoE) -> None:
        self._moe = moe

    def __enter__(self) -> MoE:
        return self._moe

    def __exit__(self, *_: object) -> None: ...


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


class TestPrinter:
    def test_half_a_character_is_held_back(self, moe: MoE, capsys: pytest.CaptureFixture) -> None:
        ids = moe.tokenizer("ab ☃ 𝄞 cd").input_ids
        printer = _Printer(moe.tokenizer)
        printer.put(torch.tensor([[1, 2, 3]]))
        shown = []
        for token in ids:
            printer.put(torch.tensor([token]))
            shown.append(capsys.readouterr().out)
        printer.end()
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
        assert "".join(shown) + capsys.readouterr().out == "ab ☃ 𝄞 cd\n"
        assert "" in shown and printer.token_ids == ids


class Terminal:
    """A program on a terminal of its own, as a person sees it."""

    def __init__(self, *arguments: object) -> None:
        self._master, self._slave = pty.openpty()
        name = os.ttyname(self._slave)
        self._process = Process(arguments, stdin=name, stdout=name, stderr=name)
        self.seen = ""

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern comes; returns what came before and with it."""
        deadline = time.monotonic() + PATIENCE_S
        while (match := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._master], [], [], 1.0)[0]:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
        taken, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return taken

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> tuple[int, bool]:
        ended = self._process.wait()
        os.close(self._master)
        os.close(self._slave)
        return ended


def test_on_a_terminal(tmp_path: Path) -> None:
    path = bundled_links(tmp_path / "talkative", "generation_config.json")
    (path / "generation_config.json").write_text('{"pad_token_id": 0}')  # without an end token
    terminal = Terminal("chat", path, "--temperature", 0, "--max-new-tokens", 2000)
    terminal.wait_for(r"\n> ")
    terminal.type("hello\n")
    terminal.wait_for(r"hello\r\n[^\r\n]*\w")  # the answer has begun
    terminal.type("\x03")
    terminal.wait_for(r"\[stopped\]")
    terminal.wait_for(r"\n> ")
    terminal.type("\x03\n")  # between prompt and reading, Ctrl-C is noticed at the next key
    terminal.wait_for(r"Ctrl-D or /quit ends the program")
    terminal.wait_for(r"\n> ")
    terminal.type("/stats\n")
    report = terminal.wait_for(r"bit-exact")
    assert "prefill" in report and "decode" in report and "Traceback" not in report
    terminal.wait_for(r"\n> ")
    terminal.type("\x04")
    assert terminal.end() == (0, False)
