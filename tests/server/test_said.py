"""Reasoning and calls as models say them, through the whole server."""

import json
from typing import Any

import pytest

from support.asking import answer, ask
from support.serving import Local

TOOL: Any = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def test_reasoning_and_calls(local: Local, script: Any) -> None:
    said = (
        "<think>\nHm.</think>\n\nI look.<tool_call>\n"
        '{"name": "clock", "arguments": {"zone": "é"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "clock", "arguments": {}}\n</tool_call>'
    )
    script(said)
    choice = ask(local, tools=[TOOL], max_tokens=200).json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["content"].strip()) == ("Hm.", "I look.")
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [
        {"name": "clock", "arguments": '{"zone": "é"}'},
        {"name": "clock", "arguments": "{}"},
    ]
    script(said)
    lone = ask(local, tools=[TOOL], max_tokens=200, parallel_tool_calls=False).json
    assert len(lone["choices"][0]["message"]["tool_calls"]) == 1
    script(said)
    raw = ask(local, tools=[TOOL], max_tokens=200, stream=True).body.decode()
    chunks = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls if "id" in call] == [0, 1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_calls_nobody_asked_for_are_text(local: Local, script: Any) -> None:
    said = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    script(said)
    choice = ask(local, max_tokens=200).json["choices"][0]
    assert choice["message"]["content"] == said and choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]


def test_a_bug_is_told_as_one(
    local: Local, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret words")

    monkeypatch.setattr(local.moe, "generate", fail)
    reply = ask(local)
    assert reply.status == 500 and reply.error["code"] == "ZeroDivisionError"
    assert "secret" not in reply.error["message"] and "secret words" in caplog.text
    monkeypatch.undo()
    assert answer(local)
