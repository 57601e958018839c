"""/v1/messages asked by the anthropic client."""

import json
from typing import Any

import pytest
from anthropic import Anthropic, BadRequestError, NotFoundError
from anthropic.types import Message
from openai import OpenAI

from support.serving import Local, Server

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {
    "name": "get_weather",
    "description": "Of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def create(claude: Anthropic, messages: Any = HELLO, **fields: Any) -> Message:
    # The client no longer knows a temperature; servers do.
    temperature = {"temperature": fields.pop("temperature", 0)}
    fields = {"model": "bundled", "max_tokens": 8, "extra_body": temperature} | fields
    answer = claude.messages.create(messages=messages, **fields)
    Message.model_validate(answer.model_dump(), strict=True)
    return answer


def refused(claude: Anthropic, **fields: Any) -> str:
    with pytest.raises(BadRequestError) as caught:
        create(claude, **fields)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    return str(body["error"]["message"])


def text(answer: Message) -> str:
    return "".join(block.text for block in answer.content if block.type == "text")


def test_the_document(claude: Anthropic, client: OpenAI) -> None:
    answer = create(claude, system="Be brief.")
    chat = client.chat.completions.create(
        model="bundled", max_tokens=8, temperature=0,
        messages=[{"role": "system", "content": "Be brief."}, HELLO[0]],
    )  # fmt: skip
    assert text(answer) == chat.choices[0].message.content
    assert answer.type == "message" and answer.role == "assistant" and answer.model == "bundled"
    assert answer.stop_reason == "max_tokens" and answer.stop_sequence is None
    usage = answer.usage
    assert usage.output_tokens == 8
    assert chat.usage is not None
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens


def test_streamed(claude: Anthropic) -> None:
    whole = create(claude)
    with claude.messages.stream(
        model="bundled", max_tokens=8, messages=HELLO, extra_body={"temperature": 0}
    ) as stream:
        found = [event for event in stream if event.type != "ping"]
        final = stream.get_final_message()
    assert text(final) == text(whole) and final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 8
    raw = [event.type for event in found if event.type != "text"]
    assert raw[:2] == ["message_start", "content_block_start"]
    assert raw[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(raw[2:-3]) == {"content_block_delta"}


def test_events_have_their_names(server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    frames = server.post("/v1/messages", body).body.decode().strip().split("\n\n")
    for frame in frames:
        name, data = frame.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_stop_sequences(claude: Anthropic) -> None:
    whole = text(create(claude, max_tokens=16))
    stop = whole[6:9]
    answer = create(claude, max_tokens=16, stop_sequences=["nowhere", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert text(answer) == whole[: whole.index(stop)]


class TestTools:
    @pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
    def test_a_forced_call(self, claude: Anthropic, choice: Any) -> None:
        answer = create(claude, tools=[TOOL], tool_choice=choice, max_tokens=60)
        (block,) = answer.content
        assert block.type == "tool_use" and block.name == "get_weather"
        assert block.input == {"city": "Rome"} and answer.stop_reason == "tool_use"

    def test_streamed(self, claude: Anthropic) -> None:
        with claude.messages.stream(
            model="bundled",
            max_tokens=60,
            messages=HELLO,
            tools=[TOOL],
            tool_choice={"type": "any"},
        ) as stream:
            deltas = [event.partial_json for event in stream if event.type == "input_json"]
            final = stream.get_final_message()
        assert json.loads("".join(deltas)) == {"city": "Rome"}
        assert final.content[0].type == "tool_use" and final.content[0].input == {"city": "Rome"}
        assert final.stop_reason == "tool_use"

    def test_their_results_come_back(self, claude: Anthropic) -> None:
        messages = [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": [{"type": "text", "text": "21 degrees"}],
                    },
                    {"type": "text", "text": "And?"},
                ],
            },
        ]
        assert create(claude, messages, tools=[TOOL]).content

    def test_wrong_ones(self, claude: Anthropic) -> None:
        assert "expected one of get_weather" in refused(
            claude, tools=[TOOL], tool_choice={"type": "tool", "name": "other"}
        )
        assert "bash_20250124" in refused(claude, tools=[{"type": "bash_20250124", "name": "bash"}])


def test_an_answer_that_was_begun_goes_on(claude: Anthropic) -> None:
    whole = text(create(claude, max_tokens=10))
    begun = whole[:8].rstrip()
    messages = [*HELLO, {"role": "assistant", "content": begun}]
    answer = create(claude, messages, max_tokens=10)
    assert (begun + text(answer)).strip().startswith(whole.strip())


def test_tokens_are_counted(claude: Anthropic) -> None:
    count = claude.messages.count_tokens(model="bundled", messages=HELLO)
    assert count.input_tokens == 8
    with_tools = claude.messages.count_tokens(
        model="bundled", messages=HELLO, tools=[TOOL], system="Be brief."
    )
    assert with_tools.input_tokens > 50


@pytest.mark.parametrize("num_words", [600, 3000])
def test_tokens_beyond_the_context_are_counted(claude: Anthropic, num_words: int) -> None:
    messages = [{"role": "user", "content": "word " * num_words}]
    count = claude.messages.count_tokens(model="bundled", messages=messages)
    assert num_words < count.input_tokens < 1.01 * num_words + 10


def test_tokens_of_text_without_spaces_are_counted(claude: Anthropic) -> None:
    messages = [{"role": "user", "content": "abcdefgh" * 2000}]
    count = claude.messages.count_tokens(model="bundled", messages=messages)
    assert 2000 < count.input_tokens < 16000


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": 5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "512"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"system": [{"type": "text", "text": 5}]}, "system"),
        ({"thinking": {"type": "deep"}}, "thinking"),
    ],
)
def test_what_is_refused(claude: Anthropic, fields: Any, words: str) -> None:
    assert words in refused(claude, **fields)


def test_another_model(claude: Anthropic) -> None:
    with pytest.raises(NotFoundError) as caught:
        create(claude, model="claude-x")
    body: Any = caught.value.body
    assert body["error"]["type"] == "not_found_error"


def test_reasoning_is_thinking(local: Local, script: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 99}
    script("<think>\nHm.</think>\n\nYes.")
    answer = Message.model_validate(local.post("/v1/messages", body).json)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].type == "thinking" and answer.content[0].thinking == "Hm."
    assert text(answer) == "Yes." and answer.stop_reason == "end_turn"
    script("<think>\nHm.</think>\n\nYes.")
    with (
        Anthropic(base_url=local.url, api_key="none") as claude,
        claude.messages.stream(model="bundled", max_tokens=99, messages=HELLO) as stream,
    ):
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]


def test_half_a_surrogate_pair_in_what_the_model_says(local: Local, script: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 99, "tools": [TOOL]}
    said = '<tool_call>{"name": "get_weather", "arguments": {"city": "\\ud83d"}}</tool_call>'
    script(said)
    assert local.post("/v1/messages", body).json["content"][0]["input"] == {"city": "?"}
