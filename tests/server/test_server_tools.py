"""Answers that keep to a schema, and tool calls, asked by the openai client."""

import json
from typing import Any

import pytest
from openai import OpenAI

from support.asking import refused, say, stream, text

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 5},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


class TestFormats:
    def test_json_object(self, client: OpenAI) -> None:
        answer = say(client, "JSON", response_format={"type": "json_object"}, max_tokens=40, seed=1)
        assert (answer.choices[0].message.content or "").startswith("{")

    @pytest.mark.parametrize("temperature", [0, 2])
    def test_json_schema(self, client: OpenAI, temperature: float) -> None:
        schema = {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 9}},
            "required": ["ok", "n"],
            "additionalProperties": False,
        }
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = say(client, response_format=wanted, max_tokens=60, temperature=temperature, seed=3)
        found = json.loads(answer.choices[0].message.content or "")
        assert isinstance(found["ok"], bool) and found["n"] <= 9 and len(found) == 2
        assert answer.choices[0].finish_reason == "stop"
        chunks = stream(
            client, response_format=wanted, max_tokens=60, temperature=temperature, seed=3
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (
            answer.choices[0].message.content
        )

    def test_text_is_text(self, client: OpenAI) -> None:
        assert text(client, response_format={"type": "text"}) == text(client)

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "nonsense"},
            {"$ref": "#/nowhere"},
            {"type": "string", "pattern": "(?<=x)["},
            {"type": "object", "properties": 5},
            {"type": "array", "minItems": 5, "maxItems": 2},
            {"not": {"type": "string"}},
        ],
    )
    def test_schemas_that_cannot_be_kept_to(self, client: OpenAI, schema: Any) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        error = refused(client, response_format=wanted)
        assert error.param == "response_format.json_schema.schema"
        assert error.code == "invalid_schema"

    def test_no_schema(self, client: OpenAI) -> None:
        error = refused(client, response_format={"type": "json_schema"})
        assert error.param == "response_format.json_schema"

    def test_with_what_would_end_it_elsewhere(self, client: OpenAI) -> None:
        """Without an end token the grammar still has its end."""
        answer = say(
            client,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"enum": ["a"]}},
            },
            extra_body={"ignore_eos": True},
            max_tokens=20,
        )
        assert json.loads(answer.choices[0].message.content or "") == "a"


class TestTools:
    @pytest.mark.parametrize(
        "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
    )
    def test_a_forced_call(self, client: OpenAI, choice: Any) -> None:
        tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
        options = {"tools": tools, "tool_choice": choice, "max_tokens": 60}
        answer = say(client, "Weather in Rome?", **options)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls or []
        assert call.id.startswith("call_") and call.type == "function"
        assert call.function.name == "get_weather"
        found = json.loads(call.function.arguments)
        assert found.keys() == {"city", "unit"} and found["unit"] in "CF"

    def test_streamed(self, client: OpenAI) -> None:
        options = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}
        whole = say(client, "Rome?", **options).choices[0].message.tool_calls
        chunks = stream(client, "Rome?", **options)
        deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
        assert deltas[0].id and deltas[0].function and deltas[0].function.name == "get_weather"
        assert all(delta.index == 0 for delta in deltas) and len(deltas) > 3
        assert all(d.id is None and d.function and d.function.name is None for d in deltas[1:])
        assert whole is not None
        arguments = "".join(d.function.arguments or "" for d in deltas if d.function)
        assert arguments == whole[0].function.arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert not any(chunk.choices[0].delta.content for chunk in chunks)

    def test_one_of_several_with_definitions(self, client: OpenAI) -> None:
        tools = [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "parameters": {
                        "type": "object",
                        "properties": {"x": {"$ref": "#/$defs/one"}},
                        "required": ["x"],
                        "additionalProperties": False,
                        "$defs": {"one": {"enum": [value]}},
                    },
                },
            }
            for name, value in (("first", 1), ("second", "zwei"))
        ]
        answer = say(client, tools=tools, tool_choice="required", max_tokens=60)
        (call,) = answer.choices[0].message.tool_calls or []
        expected = {"first": 1, "second": "zwei"}[call.function.name]
        assert json.loads(call.function.arguments) == {"x": expected}

    def test_cut_short(self, client: OpenAI) -> None:
        answer = say(client, tools=[WEATHER], tool_choice="required", max_tokens=12)
        assert answer.choices[0].finish_reason == "length"

    def test_offered_or_not(self, client: OpenAI) -> None:
        free = say(client, tools=[WEATHER], tool_choice="auto")
        assert free.usage is not None and free.usage.prompt_tokens > 50  # it was told of the tool
        none = say(client, tools=[WEATHER], tool_choice="none")
        assert none.usage is not None and none.usage.prompt_tokens == 8

    def test_a_conversation_with_results(self, client: OpenAI) -> None:
        call = {"name": "get_weather", "arguments": '{"city": "Rome", "unit": "C"}'}
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"},
        ]
        assert say(client, messages=messages, tools=[WEATHER]).choices[0].message.role

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"tool_choice": "required"}, "tool_choice"),
            (
                {
                    "tools": [WEATHER],
                    "tool_choice": {"type": "function", "function": {"name": "nope"}},
                },
                "tool_choice",
            ),
            (
                {"tools": [{"type": "function", "function": {"name": "a b"}}]},
                "tools.0.function.name",
            ),
            (
                {
                    "tools": [
                        {
                            "type": "function",
                            "function": {"name": "f", "parameters": {"type": "string"}},
                        }
                    ],
                    "tool_choice": "required",
                },
                "tools",
            ),
        ],
    )
    def test_wrong_ones(self, client: OpenAI, fields: Any, param: str) -> None:
        assert refused(client, **fields).param == param
