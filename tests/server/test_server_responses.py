"""/v1/responses asked by the openai client; every document and event is one it knows."""

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from moe_infinity.server.jobs import Ended
from moe_infinity.server.parts import Arguments, Call
from moe_infinity.server.responses import _OutputItems
from support.serving import Local

EVENTS: Any = TypeAdapter(ResponseStreamEvent)
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def respond(client: OpenAI, given: Any = "hello", **fields: Any) -> Response:
    fields = {"model": "bundled", "temperature": 0, "max_output_tokens": 8} | fields
    answer = client.responses.create(input=given, **fields)
    Response.model_validate(answer.model_dump(by_alias=True), strict=True)
    return answer


def events(client: OpenAI, given: Any = "hello", **fields: Any) -> list[Any]:
    fields = {"model": "bundled", "temperature": 0, "max_output_tokens": 8} | fields
    found = list(client.responses.create(input=given, stream=True, **fields))
    for event in found:
        EVENTS.validate_python(event.model_dump(by_alias=True), strict=True)
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def chat_text(client: OpenAI, messages: Any, **fields: Any) -> str | None:
    fields = {"model": "bundled", "temperature": 0, "max_tokens": 8} | fields
    return client.chat.completions.create(messages=messages, **fields).choices[0].message.content


def refused(client: OpenAI, **fields: Any) -> Any:
    with pytest.raises(BadRequestError) as caught:
        respond(client, **fields)
    return caught.value


def test_the_document(client: OpenAI) -> None:
    answer = respond(client, instructions="Be brief.", metadata={"a": "b"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert answer.output_text == chat_text(client, messages)
    assert answer.id.startswith("resp_") and answer.object == "response"
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and answer.usage.output_tokens == 8
    assert answer.usage.total_tokens == answer.usage.input_tokens + 8
    assert answer.metadata == {"a": "b"} and answer.instructions == "Be brief."
    (item,) = answer.output
    assert item.type == "message" and item.role == "assistant" and item.status == "incomplete"


def test_events_tell_the_same(client: OpenAI) -> None:
    found = events(client)
    kinds = [event.type for event in found]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    text = "".join(event.delta for event in found[4:-4])
    assert text == found[-4].text == found[-1].response.output_text == respond(client).output_text
    assert found[0].response.status == "in_progress" and found[0].response.output == []
    assert {event.item_id for event in found[3:-2]} == {found[2].item.id}
    assert found[-1].response.id == found[0].response.id
    assert found[-2].item.status == found[-1].response.output[0].status == "incomplete"


def test_a_complete_one(client: OpenAI) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"enum": ["yes"]}}
    answer = respond(client, text={"format": form}, max_output_tokens=30)
    assert answer.status == "completed" and json.loads(answer.output_text) == "yes"
    assert answer.output[0].status == "completed"  # type: ignore[union-attr]
    assert answer.text is not None and answer.text.format is not None
    assert events(client, text={"format": form}, max_output_tokens=30)[-1].type == (
        "response.completed"
    )
    thing = respond(client, text={"format": {"type": "json_object"}})
    assert thing.output_text.startswith("{")


class TestTools:
    def test_a_forced_call(self, client: OpenAI) -> None:
        choice: Any = {"type": "function", "name": "get_weather"}
        for wanted in ("required", choice):
            answer = respond(client, tools=[TOOL], tool_choice=wanted, max_output_tokens=60)
            (item,) = answer.output
            assert item.type == "function_call" and item.name == "get_weather"
            assert json.loads(item.arguments) == {"city": "Rome"} and item.call_id
            assert answer.status == "completed" and answer.tools[0].strict is True

    def test_streamed(self, client: OpenAI) -> None:
        found = events(client, tools=[TOOL], tool_choice="required", max_output_tokens=60)
        deltas = [e.delta for e in found if e.type == "response.function_call_arguments.delta"]
        (done,) = [e for e in found if e.type == "response.function_call_arguments.done"]
        assert "".join(deltas) == done.arguments and json.loads(done.arguments)
        assert found[-1].response.output[0].arguments == done.arguments

    def test_their_results_come_back(self, client: OpenAI) -> None:
        given = [
            {"role": "user", "content": "Weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "21 degrees"},
        ]
        assert respond(client, given, tools=[TOOL]).output_text

    def test_of_other_kinds(self, client: OpenAI) -> None:
        assert refused(client, tools=[{"type": "web_search"}]).param == "tools"
        choice = {"type": "file_search"}
        assert refused(client, tools=[TOOL], tool_choice=choice).param == "tool_choice"


def test_input_as_items(client: OpenAI) -> None:
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]},
        {"type": "message", "role": "user", "content": "again"},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "again"},
    ]
    assert respond(client, given).output_text == chat_text(client, messages)


def test_logprobs(client: OpenAI) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (item,) = respond(client, **fields).output
    assert item.type == "message" and item.content[0].type == "output_text"
    rows = item.content[0].logprobs or []
    assert len(rows) == 8 and all(len(row.top_logprobs) == 2 for row in rows)
    found = events(client, **fields)
    told = [row for e in found if e.type == "response.output_text.delta" for row in e.logprobs]
    assert [row.token for row in told] == [row.token for row in rows]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"given": []}, "input"),
        ({"given": [{"type": "computer_call"}]}, "input.0"),
        ({"given": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0"),
        ({"given": "word " * 600}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}},
            "text.format.schema",
        ),
    ],
)
def test_what_is_refused(client: OpenAI, fields: Any, param: str) -> None:
    assert refused(client, **fields).param == param


def test_reasoning_is_an_item_of_its_own(local: Local, script: Any) -> None:
    body = {"input": "hello", "max_output_tokens": 100}
    script("<think>\nHm.</think>\n\nYes.")
    answer = Response.model_validate(local.post("/v1/responses", body).json, strict=True)
    reasoning, message = answer.output
    assert reasoning.type == "reasoning" and reasoning.content
    assert reasoning.content[0].text == "Hm." and answer.output_text == "Yes."
    assert message.type == "message" and answer.status == "completed"
    script("<think>\nHm.</think>\n\nYes.")
    raw = local.post("/v1/responses", body | {"stream": True}).body.decode()
    found = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: ")]
    for event in found:
        EVENTS.validate_python(event)
    assert (
        "".join(e["delta"] for e in found if e["type"] == "response.reasoning_text.delta") == "Hm."
    )
    assert "".join(e["delta"] for e in found if e["type"] == "response.output_text.delta") == "Yes."
    assert [e["output_index"] for e in found if e["type"].endswith("item.added")] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "status"), [('{"city": "Rome"}', "completed"), ('{"city": "Ro', "incomplete")]
)
def test_a_call_is_complete_if_its_arguments_are(arguments: str, status: str) -> None:
    items = _OutputItems()
    items.add(Call(0, "call_1", "get_weather"))
    items.add(Arguments(0, arguments))
    items.finish_by(Ended(0, "length", 9))
    assert items.items[0]["status"] == status
