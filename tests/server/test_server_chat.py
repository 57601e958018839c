"""/v1/chat/completions asked by the openai client: every field has its effect, every error its
place."""

import json
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from support.asking import refused, say, stream, text
from support.command_line import run
from support.serving import Server

HELLO: Any = [{"role": "user", "content": "hello"}]


def test_greedy_text_is_that_of_the_command_line(client: OpenAI) -> None:
    template = "Question: hello\nAnswer:"
    options = ("--max-new-tokens", 12, "--ram-slots", 64, "--max-context", 512)
    found = json.loads(run("run", template, *options, "--dtype", "float32", "--json").out)
    assert text(client, max_tokens=12) == found["text"]
    plain = client.completions.create(
        model="bundled", prompt=template, max_tokens=12, temperature=0
    )
    assert plain.choices[0].text == found["text"]


def test_the_document(client: OpenAI) -> None:
    answer = say(client)
    choice, usage = answer.choices[0], answer.usage
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    assert answer.model == "bundled" and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert usage is not None and usage.prompt_tokens == 8 and usage.completion_tokens == 8
    assert usage.total_tokens == 16 and usage.prompt_tokens_details is not None
    assert "reasoning_content" not in (choice.message.model_extra or {})


class TestStream:
    def test_deltas_join_to_the_answer(self, client: OpenAI) -> None:
        chunks = stream(client, max_tokens=12)
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert deltas[0].role == "assistant"
        assert all(delta.role is None for delta in deltas[1:])
        assert "".join(delta.content or "" for delta in deltas) == text(client, max_tokens=12)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
        assert all(chunk.usage is None for chunk in chunks)

    def test_usage_if_asked_for(self, client: OpenAI) -> None:
        chunks = stream(client, stream_options={"include_usage": True})
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (8, 8)
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert "usage" in chunks[0].model_fields_set

    def test_it_ends_as_streams_do(self, server: Server) -> None:
        body = {"messages": HELLO, "stream": True, "max_tokens": 2}
        reply = server.post("/v1/chat/completions", body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        frames = reply.body.decode().split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        assert all(frame.startswith(("data: {", ": ")) for frame in frames[:-2])

    def test_an_error_before_it_begins_has_its_status(self, client: OpenAI) -> None:
        with pytest.raises(BadRequestError):
            stream(client, content="long " * 600)


class TestLength:
    def test_either_name(self, client: OpenAI) -> None:
        for name in ("max_tokens", "max_completion_tokens"):
            answer = say(client, **({"max_tokens": None} | {name: 3}))
            assert answer.usage is not None and answer.usage.completion_tokens == 3

    def test_the_servers_own_limit(self, client: OpenAI) -> None:
        answer = say(client, max_tokens=None)
        assert answer.usage is not None and answer.usage.completion_tokens <= 24

    def test_more_than_the_context_is_cut(self, client: OpenAI) -> None:
        answer = say(client, "word " * 490, max_tokens=10**6)
        assert answer.usage is not None and answer.choices[0].finish_reason == "length"
        assert answer.usage.total_tokens == 512

    def test_a_prompt_beyond_the_context(self, client: OpenAI) -> None:
        error = refused(client, content="word " * 600)
        assert (error.param, error.code) == ("messages", "context_length_exceeded")
        assert "605" in error.message and "512" in error.message


class TestStop:
    def test_texts(self, client: OpenAI) -> None:
        whole = text(client, max_tokens=16)
        stop = whole[6:9]
        at = whole.index(stop)
        for given in (stop, ["nowhere", stop]):
            answer = say(client, stop=given, max_tokens=16)
            assert answer.choices[0].message.content == whole[:at]
            assert answer.choices[0].finish_reason == "stop"
        pieces = [
            c.choices[0].delta.content or "" for c in stream(client, stop=stop, max_tokens=16)
        ]
        assert "".join(pieces) == whole[:at]

    def test_the_end_token(self, client: OpenAI) -> None:
        answer = say(client, logit_bias={"0": 100})
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == ""
        assert answer.usage is not None and answer.usage.completion_tokens == 1
        ignored = say(client, logit_bias={"0": 100}, extra_body={"ignore_eos": True})
        assert ignored.usage is not None and ignored.usage.completion_tokens == 8


class TestChoosing:
    def test_the_seed_decides(self, client: OpenAI) -> None:
        def drawn(seed: int | None) -> str:
            return text(client, seed=seed, temperature=1.5, max_tokens=12)

        first = drawn(1)
        drawn(2)
        assert first == drawn(1)
        assert len({drawn(None) for _ in range(4)} | {first}) > 1

    @pytest.mark.parametrize(
        "fields",
        [{"top_p": 0.0}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}],
    )
    def test_what_leaves_one_token_is_greedy(self, client: OpenAI, fields: Any) -> None:
        assert text(client, temperature=2, **fields) == text(client)

    def test_temperature_near_zero_is_greedy(self, client: OpenAI) -> None:
        assert text(client, temperature=1e-9) == text(client)

    def test_a_bias_brings_a_token_and_forbids_it(self, client: OpenAI) -> None:
        assert (
            text(client, logit_bias={"65": 100}, max_tokens=3).count(
                text(client, logit_bias={"65": 100}, max_tokens=1)
            )
            == 3
        )
        first = text(client, max_tokens=1)
        assert text(client, max_tokens=1, logit_bias={str(n): -100 for n in range(4000)}) != first

    def test_penalties(self, client: OpenAI) -> None:
        plain = text(client, max_tokens=24)
        for name in ("presence_penalty", "frequency_penalty"):
            assert text(client, max_tokens=24, **{name: 2.0}) != plain
        assert text(client, max_tokens=24, extra_body={"repetition_penalty": 5.0}) != plain


class TestSeveral:
    def test_n_answers(self, client: OpenAI) -> None:
        answer = say(client, n=3, temperature=1.5, seed=7, max_tokens=6)
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) > 1
        assert answer.usage is not None and answer.usage.completion_tokens <= 18
        assert answer.usage.prompt_tokens == 8
        again = say(client, n=3, temperature=1.5, seed=7, max_tokens=6)
        assert [choice.message.content for choice in again.choices] == texts
        alone = say(client, temperature=1.5, seed=7, max_tokens=6)
        assert alone.choices[0].message.content == texts[0]

    def test_n_streams(self, client: OpenAI) -> None:
        whole = say(client, n=2, temperature=1.5, seed=3)
        found = {0: "", 1: ""}
        finish = {}
        for chunk in stream(client, n=2, temperature=1.5, seed=3):
            choice = chunk.choices[0]
            found[choice.index] += choice.delta.content or ""
            finish[choice.index] = choice.finish_reason or finish.get(choice.index)
        assert list(found.values()) == [choice.message.content for choice in whole.choices]
        assert finish == {0: "length", 1: "length"}


class TestLogprobs:
    def test_of_each_token_and_the_likeliest(self, client: OpenAI) -> None:
        choice = say(client, logprobs=True, top_logprobs=3).choices[0]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        rows = choice.logprobs.content
        assert len(rows) == 8
        assert "".join(row.token for row in rows) == choice.message.content
        for row in rows:
            assert len(row.top_logprobs) == 3 and row.logprob <= 0
            assert row.top_logprobs[0].token == row.token  # greedy
            assert row.top_logprobs[0].logprob == row.logprob
            assert bytes(row.bytes or []).decode() == row.token

    def test_without_the_likeliest(self, client: OpenAI) -> None:
        logprobs = say(client, logprobs=True).choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert all(row.top_logprobs == [] for row in logprobs.content)

    def test_streamed(self, client: OpenAI) -> None:
        whole = say(client, logprobs=True, top_logprobs=2).choices[0].logprobs
        rows: list[Any] = []
        for chunk in stream(client, logprobs=True, top_logprobs=2):
            logprobs = chunk.choices[0].logprobs
            rows += (logprobs.content or []) if logprobs else []
        assert whole is not None and whole.content is not None
        assert [row.token for row in rows] == [row.token for row in whole.content]
        assert [row.logprob for row in rows] == pytest.approx(
            [row.logprob for row in whole.content], abs=1e-4
        )

    def test_they_are_the_models_whatever_chose(self, client: OpenAI) -> None:
        """Before temperature, bias and penalties."""
        plain = say(client, logprobs=True, top_logprobs=5, max_tokens=1)
        bent = say(
            client, logprobs=True, top_logprobs=5, max_tokens=1, temperature=1.7, seed=4,
            logit_bias={"65": 50}, extra_body={"repetition_penalty": 3.0},
        )  # fmt: skip
        tops = [
            {
                top.token: top.logprob
                for top in (answer.choices[0].logprobs.content or [])[0].top_logprobs
            }
            for answer in (plain, bent)
            if answer.choices[0].logprobs
        ]
        assert tops[0].keys() == tops[1].keys()
        for token, value in tops[0].items():
            assert value == pytest.approx(tops[1][token], abs=1e-3)

    def test_a_number_without_asking(self, client: OpenAI) -> None:
        assert refused(client, top_logprobs=3).param == "top_logprobs"


class TestMessages:
    def test_a_conversation_that_goes_on_is_not_read_again(self, client: OpenAI) -> None:
        first = "Tell me of the old mill by the river, and of the miller's daughter."
        messages: Any = [{"role": "user", "content": first}]
        answer = say(client, messages=messages)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        messages.append({"role": "user", "content": "And the sea?"})
        usage = say(client, messages=messages).usage
        assert answer.usage and usage and usage.prompt_tokens_details
        assert usage.prompt_tokens_details.cached_tokens or answer.usage.prompt_tokens <= 0

    def test_parts_of_text(self, client: OpenAI) -> None:
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        assert text(client, messages=[{"role": "user", "content": parts}]) == text(client)

    def test_parts_that_are_none(self, client: OpenAI) -> None:
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}
        error = refused(client, messages=[{"role": "user", "content": [part]}])
        assert (error.param, error.code) == ("messages.0.content.0", "unsupported_value")

    def test_the_servers_names(self, client: OpenAI) -> None:
        assert say(client, model="other").model == "bundled"
        with pytest.raises(NotFoundError) as caught:
            say(client, model="gpt-17")
        assert caught.value.code == "model_not_found" and caught.value.param == "model"
        assert "bundled" in caught.value.message

    def test_values_of_the_template(self, client: OpenAI) -> None:
        kwargs = {"chat_template_kwargs": {"enable_thinking": False, "anything": [1]}}
        assert text(client, extra_body=kwargs) == text(client)
        for name in ("messages", "tools", "tokenize", "chat_template", "add_generation_prompt"):
            error = refused(client, extra_body={"chat_template_kwargs": {name: "x"}})
            assert error.param == "chat_template_kwargs"
        for odd in ({"conversation": 1}, {"continue_final_message": True}, {"padding": "x"}):
            try:
                say(client, extra_body={"chat_template_kwargs": odd})
            except APIStatusError as error:
                assert error.status_code == 400

    def test_unknown_fields(self, client: OpenAI) -> None:
        extra = {"safe_prompt": True, "user": "me", "documents": []}
        assert text(client, extra_body=extra) == text(client)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"functions": [{"name": "f"}]}, "functions"),
            ({"modalities": ["audio"]}, "modalities"),
            ({"temperature": 3}, "temperature"),
            ({"n": 1000}, "n"),
            ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ],
    )
    def test_unsupported_values(self, client: OpenAI, fields: Any, param: str) -> None:
        assert refused(client, **fields).param == param
