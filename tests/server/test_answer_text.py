"""Tokens become text piece by piece: all of it, whole characters, nothing from a stop text on."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_infinity import bundled_model_path
from moe_infinity.server.answer_text import AnswerText


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled_model_path())


def told(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Any]:
    text, pieces = AnswerText(tokenizer, stop, keeps_special=False), []
    for token in ids:
        pieces.append(text.put(token))
        if text.stopped:
            return pieces, text
    pieces.append(text.end())
    return pieces, text


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@given(text=st.text(max_size=30))
def test_pieces_are_the_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    pieces, _ = told(tokenizer, ids)
    assert "".join(pieces) == decoded(tokenizer, ids)
    assert "".join(pieces) == text.replace("<|endoftext|>", "")


@given(ids=st.lists(st.integers(0, 4095), max_size=30))
def test_any_tokens_at_all(tokenizer: Any, ids: list[int]) -> None:
    """Bytes that are no UTF-8 too: they become the same marks."""
    assert "".join(told(tokenizer, ids)[0]) == decoded(tokenizer, ids)


@given(ids=st.lists(st.tuples(st.integers(0, 4095), st.booleans()), max_size=30))
def test_some_tokens_at_a_time(tokenizer: Any, ids: list[tuple[int, bool]]) -> None:
    """Text that nobody needs yet comes with a later token's, or at the end."""
    text, said = AnswerText(tokenizer, (), keeps_special=False), ""
    for token, is_asked in ids:
        if is_asked:
            said += text.put(token)
        else:
            text.add(token)
    assert said + text.end() == decoded(tokenizer, [token for token, _ in ids])


@given(text=st.text("ab\u2603\U0001d11e", max_size=20), data=st.data())
def test_nothing_of_a_stop_text_or_behind_it(
    tokenizer: Any, text: str, data: st.DataObject
) -> None:
    texts = st.text("ab\u2603", min_size=1, max_size=3)
    stop = tuple(data.draw(st.lists(texts, min_size=1, max_size=3)))
    pieces, found = told(tokenizer, tokenizer(text).input_ids, stop)
    ends = [(text.find(each), each) for each in stop if each in text]
    if not ends:
        assert "".join(pieces) == text and not found.stopped
        return
    # Seen token by token: of two stop texts in one token the first one counts.
    assert found.stopped and found.stop in stop
    assert "".join(pieces) == text[: min(ends)[0]]
    assert text.startswith(found.stop, min(ends)[0])


def test_half_a_character_waits(tokenizer: Any) -> None:
    ids = tokenizer("\u2603").input_ids
    assert len(ids) == 3
    assert told(tokenizer, ids)[0] == ["", "", "\u2603", ""]
    assert told(tokenizer, ids[:2])[0] == ["", "", "\N{REPLACEMENT CHARACTER}"]


def test_what_may_be_a_stop_text_waits(tokenizer: Any) -> None:
    text = AnswerText(tokenizer, ("END",), keeps_special=False)
    said = [text.put(token) for char in "xENyEN" for token in tokenizer(char).input_ids]
    assert said == ["x", "", "", "ENy", "", ""]
    assert text.end() == "EN"


def test_special_tokens(tokenizer: Any) -> None:
    ids = [*tokenizer("a").input_ids, tokenizer.eos_token_id]
    kept = AnswerText(tokenizer, (), keeps_special=True)
    assert [kept.put(token) for token in ids] == ["a", "<|endoftext|>"]
    skipped = AnswerText(tokenizer, (), keeps_special=False)
    assert [skipped.put(token) for token in ids] == ["a", ""]


def test_garbage_without_end_is_told_before_the_end(tokenizer: Any) -> None:
    """Bytes that begin no character do not pile up."""
    continuation = tokenizer("\u2603").input_ids[1]
    text = AnswerText(tokenizer, (), keeps_special=False)
    pieces = [text.put(continuation) for _ in range(200)]
    assert any(pieces[:40])
    assert len("".join(pieces) + text.end()) == 200
