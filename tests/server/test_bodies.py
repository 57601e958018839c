"""What of a request's body is wrong is said by name; what is right arrives unchanged."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from moe_infinity.server.bodies import Model, read
from moe_infinity.server.chat_bodies import ChatBody, CompletionBody, Tools
from moe_infinity.server.message_bodies import MessagesBody
from moe_infinity.server.problems import ApiError
from moe_infinity.server.response_bodies import ResponseBody

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"messages": HELLO}
NO_BIAS = {str(token): "x" for token in range(200_000)}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> ChatBody:
    return read(ChatBody, json.dumps(CHAT | fields).encode())


def refusal(model: type[Model], raw: bytes | dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(model, raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    assert caught.value.status == 400
    assert caught.value.message.isprintable()
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages.0.content.0.type"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"seed": "1"}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": {"a": 1}}, "stop"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"tools": [{"type": "magic"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ],
)
def test_a_wrong_value_is_named(fields: dict[str, Any], param: str) -> None:
    error = refusal(ChatBody, CHAT | fields)
    assert (error.param, error.code) == (param, "invalid_value")
    assert error.message.startswith(param)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"messages": [}',
        b'{"messages": "\xff\xfe"}',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
    ],
)
def test_what_is_no_json(raw: bytes) -> None:
    assert refusal(ChatBody, raw).code == "invalid_json"


@pytest.mark.parametrize("raw", [b"5", b"[]", b'"text"', b"null", b"true"])
def test_json_that_is_no_object(raw: bytes) -> None:
    assert refusal(ChatBody, raw).message.startswith("body: ")


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_that_json_has_not(literal: bytes) -> None:
    refusal(ChatBody, b'{"messages": [{"role": "user"}], "temperature": ' + literal + b"}")


@pytest.mark.parametrize(
    ("model", "raw"),
    [
        (ChatBody, b'{"messages": [' + b"1," * 500_000 + b"1]}"),
        (ChatBody, b'{"messages": [{"role": "user", "content": [' + b"1," * 500_000 + b"1]}]}"),
        (ChatBody, b'{"messages": [{"role": "user"}], "tools": [' + b"1," * 500_000 + b"1]}"),
        (CompletionBody, b'{"prompt": [' + b'{},' * 300_000 + b"1]}"),
        (CompletionBody, b'{"prompt": [' + b'[""],' * 300_000 + b"1]}"),
        (MessagesBody, b'{"max_tokens": 1, "messages": [' + b"1," * 500_000 + b"1]}"),
        (ResponseBody, b'{"input": [' + b"1," * 500_000 + b"1]}"),
        (ChatBody, json.dumps(CHAT | {"logit_bias": NO_BIAS}).encode()),
    ],
)  # fmt: skip
def test_a_million_wrong_values_cost_no_more_than_one(model: type[Model], raw: bytes) -> None:
    found = refusal(model, raw)
    assert len(found.message) < 500
    assert isinstance(found.__cause__, ValidationError)
    assert found.__cause__.error_count() < 50, "of one value, by the types it may be of"


def test_nested_blocks_cost_no_more_than_others() -> None:
    """Each level may be one of several types: trying them all again at each would take years."""
    inner: Any = [{"type": "text", "text": 5}]
    for _ in range(60):
        inner = [{"type": "tool_result", "content": inner}]
    found = refusal(
        MessagesBody, {"max_tokens": 1, "messages": [{"role": "user", "content": inner}]}
    )
    assert isinstance(found.__cause__, ValidationError)
    assert found.__cause__.error_count() < 2 * 60, "one or two of each level"


def test_unknown_fields_are_let_in() -> None:
    body = chat(user="me", service_tier="auto", store=True, metadata={"a": "b"}, whatever=[1])
    assert body.messages[0].content == "hello"
    body = chat(messages=[{"role": "user", "content": "a", "weird": 1}])
    assert body.plain_messages() == [{"role": "user", "content": "a"}]


def test_every_field_that_says_how_to_choose_arrives() -> None:
    fields = {
        "temperature": 1, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": -1, "stop": "x",
        "presence_penalty": 1.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1,
        "logit_bias": {"5": -100, "7": 2.5}, "max_tokens": 9, "ignore_eos": True,
    }  # fmt: skip
    sampling = chat(**fields).sampling(100, 50, 3, "grammar")
    assert sampling.temperature == 1 and sampling.top_p == 0.5 and sampling.min_p == 0.1
    assert sampling.top_k == 0 and sampling.seed == 2**63 - 1 and sampling.stop == ("x",)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -0.5)
    assert sampling.repetition_penalty == 1.1 and sampling.max_tokens == 9
    assert sampling.logit_bias == ((5, -100.0), (7, 2.5)) and sampling.ignore_eos
    assert (sampling.num_logprobs, sampling.grammar) == (3, "grammar")
    assert (
        sampling.cache_prompt and not chat(cache_prompt=False).sampling(100, 50, None).cache_prompt
    )
    assert chat().sampling(100, 50, None).max_tokens == 50
    assert chat(max_completion_tokens=3, max_tokens=9).sampling(100, 50, None).max_tokens == 3


@pytest.mark.parametrize("bias", [{"100": 1}, {"-1": 1}, {"x": 1}, {"5": 101}, {"\u0665": 1}])
def test_a_bias_on_no_token_or_beyond_bounds(bias: dict[str, float]) -> None:
    with pytest.raises(ApiError) as caught:
        chat(logit_bias=bias).sampling(100, 5, None)
    assert (caught.value.param, caught.value.code) == ("logit_bias", "invalid_value")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "modalities"),
    ],
)
def test_what_would_have_to_be_ignored_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields).refuse_unsupported()
    assert (caught.value.param, caught.value.code) == (param, "unsupported_value")


def test_messages_as_templates_want_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "r"},
            {"role": "tool", "tool_call_id": "c1", "content": "5"},
        ]
    )
    call["function"] = {"name": "f", "arguments": {"a": 1}}
    assert body.plain_messages() == [
        {"role": "system", "content": "be"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "r"},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 9999}}]},
    ],
)
def test_parts_that_cannot_be_read(message: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=[message]).plain_messages()
    assert caught.value.param is not None and caught.value.param.startswith("messages.0")


def test_prompts_of_plain_completions() -> None:
    for prompt, expected in (
        ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]]),
    ):  # fmt: skip
        body = read(CompletionBody, json.dumps({"prompt": prompt}).encode())
        assert body.prompts() == expected
    for prompt in (5, None, [1, "a"], [1.5], {}, [[1], "a"]):
        assert refusal(CompletionBody, {"prompt": prompt}).param in (
            "prompt",
            "prompt.0",
            "prompt.1",
        )


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of")],
)
def test_what_completions_refuse(fields: dict[str, Any], param: str) -> None:
    body = read(CompletionBody, json.dumps({"prompt": "a"} | fields).encode())
    with pytest.raises(ApiError) as caught:
        body.refuse_unsupported()
    assert (caught.value.status, caught.value.param) == (400, param)


class TestTools:
    def test_choices(self) -> None:
        assert Tools([TOOL], None).offered == [TOOL] and not Tools([TOOL], "auto").is_forced
        assert Tools([TOOL], "none").offered == []
        assert Tools([TOOL], "required").is_forced and Tools([TOOL], {"name": "f"}).is_forced

    @pytest.mark.parametrize("choice", ["required", {"name": "f"}])
    def test_a_call_without_tools(self, choice: Any) -> None:
        with pytest.raises(ApiError, match="tool_choice"):
            Tools([], choice)

    def test_a_function_that_is_not_offered(self) -> None:
        with pytest.raises(ApiError, match="'g', expected one of f"):
            Tools([TOOL], {"name": "g"})
