"""Answers of every format apart into reasoning, calls and content, however they come in pieces."""

# ruff: noqa: RUF001 - DeepSeek writes its marks with such bars

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_infinity.server.formats import AnswerFormat, format_of
from moe_infinity.server.parts import AnswerParser, Arguments, Call, Content, ForcedCall, Part

PARIS = {"city": "Paris", "days": 2}
ROME = {"city": 'Rom\u00e9 "a" {b} \\n', "days": 3}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
    for name in ("weather", "get-time")
]

# By format: the mark of its templates, how one call is written, and what stands around all calls.
CALLS: dict[str, tuple[str, Any, str, str]] = {
    "hermes": (
        "{{ '<tool_call>' }}",
        lambda name, args: (
            f'\n<tool_call>\n{{"name": "{name}", "arguments": {args}}}\n</tool_call>'
        ),
        "",
        "",
    ),
    "plain": (
        "{{ message.content }}",
        lambda name, args: f'<tool_call>{{ "name":"{name}","parameters" : {args} }}</tool_call>\n',
        "",
        "",
    ),
    "qwen_xml": (
        "{{ '<tool_call>\n<function=' }}",
        lambda name, args: (
            f"\n<tool_call>\n<function={name}>\n"
            + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in json.loads(args).items())
            + "</function>\n</tool_call>"
        ),
        "",
        "",
    ),
    "glm": (
        "{{ '<tool_call>' + '<arg_key>' }}",
        lambda name, args: (
            f"\n<tool_call>{name}\n"
            + "".join(
                f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n"
                for k, v in json.loads(args).items()
            )
            + "</tool_call>"
        ),
        "",
        "",
    ),
    "deepseek": (
        "{{ '<｜tool▁call▁begin｜>' }}",
        lambda name, args: f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{args}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_r1": (
        "{{ '<｜tool▁call▁begin｜>' }}",
        lambda name, args: (
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
            f"{name}\n```json\n{args}\n```<｜tool▁call▁end｜>\n"
        ),
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "mistral_args": (
        "{{ '[TOOL_CALLS]' + '[ARGS]' }}",
        lambda name, args: f"[TOOL_CALLS]{name}[ARGS]{args}",
        "",
        "",
    ),
}
THINKS = {"mistral_args": ("[THINK]", "[/THINK]"), "mistral": ("[THINK]", "[/THINK]")}


def found_in(template: str) -> AnswerFormat:
    return format_of(SimpleNamespace(chat_template=template))


def read(parser: AnswerParser | ForcedCall, pieces: list[str]) -> list[Part]:
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return parts + parser.end()


def summary(parts: list[Part]) -> dict[str, Any]:
    """Contents and reasoning as text, calls by name and arguments."""
    said: dict[str, Any] = {"Content": "", "Reasoning": "", "calls": []}
    for part in parts:
        if isinstance(part, Call):
            assert part.number == len(said["calls"]) and part.id.startswith("call_")
            said["calls"].append([part.name, ""])
        elif isinstance(part, Arguments):
            assert part.number == len(said["calls"]) - 1
            said["calls"][-1][1] += part.text
        else:
            said[type(part).__name__] += part.text
    return said


def read_every_way(
    form: AnswerFormat, text: str, prefix: str = "", tools: Any = TOOLS
) -> dict[str, Any]:
    """Whole, char by char, and cut once anywhere, it means the same."""
    ways = [[text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]
    found = [
        summary(read(AnswerParser(form.reading(bool(tools)), prefix, tools), way)) for way in ways
    ]
    assert all(each == found[0] for each in found[1:])
    return found[0]


def parsed(calls: list[list[str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("name", CALLS)
def test_reasoning_an_answer_and_two_calls(name: str) -> None:
    template, write, before, behind = CALLS[name]
    form = found_in(template)
    assert form.name == name.removesuffix("_r1")
    begin, end = THINKS.get(name, ("<think>", "</think>"))
    calls = [("weather", PARIS), ("get-time", ROME)]
    written = "".join(write(n, json.dumps(a, ensure_ascii=False)) for n, a in calls)
    text = f"{begin}\nLet me\nsee. {end}\n\nI ask.{before}{written}{behind}"
    found = read_every_way(form, text)
    assert found["Reasoning"] == "Let me\nsee."
    assert found["Content"].strip() == "I ask."
    assert parsed(found["calls"]) == calls


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_not_finished(name: str) -> None:
    """What was not told as a call is content; nothing is lost and nothing fails."""
    template, write, before, _ = CALLS[name]
    form, written = found_in(template), write("weather", json.dumps(PARIS))
    for length in range(1, len(written)):
        found = summary(
            read(AnswerParser(form.reading(True), "", TOOLS), [before, written[:length]])
        )
        if not found["calls"]:
            assert found["Content"] == before + written[:length]


@pytest.mark.parametrize("name", CALLS)
def test_without_tools_calls_are_what_was_said(name: str) -> None:
    template, write, before, behind = CALLS[name]
    text = "Look: " + before + write("weather", json.dumps(PARIS)) + behind
    assert read_every_way(found_in(template), text, tools=None)["Content"] == text


def test_mistral_lists_its_calls() -> None:
    form = found_in("{{ '[TOOL_CALLS]' }}")
    assert form.name == "mistral"
    calls = [("weather", PARIS), ("get-time", ROME)]
    told = json.dumps([{"name": name, "arguments": args} for name, args in calls])
    found = read_every_way(form, f"[THINK]well[/THINK]I ask.[TOOL_CALLS]{told}")
    assert found["Reasoning"] == "well" and found["Content"] == "I ask."
    assert parsed(found["calls"]) == calls
    bad = '[TOOL_CALLS][{"name": "weather"}, 5]'
    assert read_every_way(form, bad)["Content"] == bad


class TestHarmony:
    form = found_in("{{ '<|channel|>' }}")

    def test_channels(self) -> None:
        text = (
            "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary"
            "<|message|>I ask.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
            f"<|constrain|>json<|message|>{json.dumps(PARIS)}<|call|>"
        )
        found = read_every_way(self.form, text)
        assert found["Reasoning"] == "think" and found["Content"] == "I ask."
        assert parsed(found["calls"]) == [("weather", PARIS)]

    def test_the_other_order_of_a_call(self) -> None:
        text = (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.get-time"
            f"<|channel|>commentary json<|message|>{json.dumps(ROME)}<|call|>"
        )
        found = read_every_way(self.form, text)
        assert parsed(found["calls"]) == [("get-time", ROME)]

    def test_the_final_answer(self) -> None:
        text = (
            "<|channel|>analysis<|message|>one<|end|>"
            "<|start|>assistant<|channel|>final<|message|>It is 5 < 6.<|return|>"
        )
        found = read_every_way(self.form, text, tools=None)
        assert found == {"Reasoning": "one", "Content": "It is 5 < 6.", "calls": []}

    def test_what_is_in_no_channel(self) -> None:
        assert read_every_way(self.form, "Hello there.")["Content"] == "Hello there."


class TestHermes:
    form = found_in("<tool_call>")

    def test_the_template_began_the_reasoning(self) -> None:
        found = read_every_way(self.form, "so</think>\n\nYes", prefix="assistant\n<think>\n")
        assert found == {"Reasoning": "so", "Content": "Yes", "calls": []}

    def test_arguments_are_told_as_they_come(self) -> None:
        parser = AnswerParser(self.form.reading(True), "", TOOLS)
        first = parser.feed('<tool_call>{"name": "weather", "arguments": {"city": "Pa')
        assert isinstance(first[0], Call)
        assert first[1] == Arguments(0, '{"city": "Pa')
        assert parser.feed('ris"}}') == [Arguments(0, 'ris"}')]
        assert parser.feed("</tool_call>") == [] and parser.end() == []
        assert parser.num_calls == 1

    @pytest.mark.parametrize(
        "inner",
        [
            '{"name": "weather", "arguments": 5}',
            '{"name": "weather" oh',
            '{"name": "wea\\qther", "arguments": {}}',
            "5",
            "[]",
            '{"name": 7, "arguments": {}}',
            '{"arguments": {}}',
            '"text"',
            "",
            "[" * 3000,
        ],
    )
    def test_what_is_no_call_is_content(self, inner: str) -> None:
        text = f"One.<tool_call>{inner}</tool_call>Two."
        whole = summary(read(AnswerParser(self.form.reading(True), "", TOOLS), [text]))
        chars = summary(read(AnswerParser(self.form.reading(True), "", TOOLS), list(text)))
        assert whole == chars == {"Content": text, "Reasoning": "", "calls": []}

    def test_a_good_call_behind_a_bad_one(self) -> None:
        good = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
        found = read_every_way(self.form, f"<tool_call>no</tool_call>{good}Done.")
        assert found["Content"] == "<tool_call>no</tool_call>Done."
        assert found["calls"] == [["weather", "{}"]]

    @pytest.mark.parametrize(
        ("inner", "arguments"),
        [
            ('{"arguments": {"city": "x"}, "name": "weather"}', '{"city": "x"}'),
            ('{"name": "weather", "arguments": "{\\"city\\": \\"x\\"}"}', '{"city": "x"}'),
            ('{"name": "weather"}', "{}"),
            ('{"name": "weather", "arguments":\n {"city": "x"} , "id": {"a": 1}}', '{"city": "x"}'),
        ],
    )
    def test_other_ways_to_write_a_call(self, inner: str, arguments: str) -> None:
        found = read_every_way(self.form, f"<tool_call>{inner}</tool_call>")
        assert found["calls"] == [["weather", arguments]]
        assert found["Content"] == ""


def test_arguments_that_look_like_a_call_are_none() -> None:
    """Where the format names the call outside, a tool may have such parameters itself."""
    args = {"name": "bob", "arguments": {"a": 1}}
    form = found_in("[TOOL_CALLS][ARGS]")
    found = read_every_way(form, f"[TOOL_CALLS]weather[ARGS]{json.dumps(args)}")
    assert parsed(found["calls"]) == [("weather", args)]


def test_a_tokenizer_that_brings_its_own() -> None:
    own = {"fields": {"content": {"content": "text"}}}
    form = format_of(SimpleNamespace(chat_template="tools", response_template=own))
    assert (form.name, form.response, form.shows_tools) == ("own", own, True)
    both = SimpleNamespace(chat_template={"default": "x", "tool_use": "<tool_call>"})
    assert format_of(both).name == "hermes"
    assert format_of(SimpleNamespace(chat_template=None)).name == "plain"


def test_a_forced_call_in_pieces() -> None:
    text = '{"name": "weather", "arguments": {"city": "a}\\"", "l": [{}, []]}}'
    for pieces in ([text], list(text)):
        found = summary(read(ForcedCall(), pieces))
        assert found["calls"] == [["weather", '{"city": "a}\\"", "l": [{}, []]}']]


@given(
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "a", "arguments": ',
             "{", "}", '"', "\\", "\n", " ", "text", "<", "[TOOL_CALLS]", "[ARGS]", "<function=f>"]
        ),
        max_size=12,
    ),
    st.sampled_from(["<tool_call>", "<function=", "<arg_key>", "[ARGS]", "[TOOL_CALLS]"]),
)  # fmt: skip
def test_whatever_a_model_says_is_read(words: list[str], mark: str) -> None:
    """Pieces and the whole mean the same, and nothing raises."""
    form, text = found_in(mark), "".join(words)
    in_words = summary(read(AnswerParser(form.reading(True), "", TOOLS), words))
    in_chars = summary(read(AnswerParser(form.reading(True), "", TOOLS), list(text)))
    assert (
        in_words == in_chars == summary(read(AnswerParser(form.reading(True), "", TOOLS), [text]))
    )


def test_what_is_no_call_is_plain_content_without_a_format() -> None:
    assert read(AnswerParser(None, "", None), ["<think>", "", "a"]) == [
        Content("<think>"),
        Content("a"),
    ]
