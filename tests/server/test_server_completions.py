"""/v1/completions asked by the openai client."""

from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from openai.types import Completion

from moe_infinity import MoE
from support.serving import Local, Server


def complete(client: OpenAI, prompt: Any = "The river", **fields: Any) -> Completion:
    fields = {"model": "bundled", "temperature": 0, "max_tokens": 6} | fields
    answer = client.completions.create(prompt=prompt, **fields)
    Completion.model_validate(answer.model_dump(), strict=True)
    return answer


def refused(client: OpenAI, **fields: Any) -> Any:
    with pytest.raises(BadRequestError) as caught:
        complete(client, **fields)
    return caught.value


def test_the_document(client: OpenAI) -> None:
    answer = complete(client, max_tokens=None)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].logprobs is None
    assert answer.usage is not None and answer.usage.completion_tokens == 16  # OpenAI's default
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16


def test_several_prompts_several_times(client: OpenAI) -> None:
    prompts = ["The river", "One, two,"]
    answer = complete(client, prompts, n=2)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == complete(client).choices[0].text
    assert texts[2] == texts[3] == complete(client, prompts[1]).choices[0].text
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    chunks = list(
        client.completions.create(
            model="bundled", prompt=prompts, temperature=0, max_tokens=6, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert all(chunk.object == "text_completion" for chunk in chunks)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    for index in (0, 1):
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert "".join(choice.text for choice in own) == texts[2 * index]
        assert own[-1].finish_reason == "length"


def test_prompts_as_tokens(client: OpenAI, moe: MoE) -> None:
    ids = moe.tokenizer("The river").input_ids
    text = complete(client).choices[0].text
    assert complete(client, ids).choices[0].text == text
    assert complete(client, [ids]).choices[0].text == text


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "no token"),
        ([], "expected 1 to 64"),
        ([[]], "no token"),
        ([4096], "got token 4096, expected 0 to 4095"),
        ([-1], "got token -1"),
        (["a"] * 65, "got 65"),
        ([5] * 512, "got 512 tokens, expected fewer than the 512"),
        ("word " * 600, "got 601 tokens, expected fewer than the 512"),
    ],
)
def test_prompts_that_are_none(client: OpenAI, prompt: Any, words: str) -> None:
    error = refused(client, prompt=prompt)
    assert error.param == "prompt" and words in error.message


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"echo": True}, "echo", "unsupported_value"),
        ({"suffix": "."}, "suffix", "unsupported_value"),
        ({"best_of": 2}, "best_of", "unsupported_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ],
)
def test_what_is_refused(client: OpenAI, fields: Any, param: str, code: str) -> None:
    error = refused(client, **fields)
    assert (error.param, error.code) == (param, code)


def test_what_means_nothing_is_let_in(client: OpenAI) -> None:
    assert complete(client, echo=False, suffix=None, best_of=1, user="me").choices


def test_logprobs_are_those_of_the_models_logits(local: Local) -> None:
    """Of each token, whatever is sampled; and the likeliest beside it. Penalties would show: the
    prompt holds what may well be said again."""
    prompt = "The river of the river, of the"
    fields = {"prompt": prompt, "temperature": 1.5, "seed": 5, "max_tokens": 5, "logprobs": 4}
    body = fields | {"presence_penalty": 1.0, "repetition_penalty": 1.5, "top_p": 0.9}
    choice = local.post("/v1/completions", body).json["choices"][0]
    found = choice["logprobs"]
    moe = local.moe
    ids = moe.tokenizer(prompt).input_ids
    said = moe.tokenizer(choice["text"]).input_ids
    assert [moe.tokenizer.decode([token]) for token in said] == found["tokens"]
    logits = moe(torch.tensor([ids + said])).logits[0, len(ids) - 1 : -1]
    expected = torch.log_softmax(logits.float(), -1)
    for row, token, own, top in zip(
        expected, said, found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert own == pytest.approx(float(row[token]), abs=2e-3)
        values, best = row.topk(4)
        assert list(top) == [moe.tokenizer.decode([int(each)]) for each in best]
        assert list(top.values()) == pytest.approx(values.tolist(), abs=2e-3)
    offsets = [sum(map(len, found["tokens"][:n])) for n in range(5)]
    assert found["text_offset"] == offsets


def test_streamed_logprobs(server: Server, client: OpenAI) -> None:
    whole = complete(client, logprobs=2).choices[0].logprobs
    assert whole is not None
    stream = client.completions.create(
        model="bundled", prompt="The river", temperature=0, max_tokens=6, logprobs=2, stream=True
    )
    tokens: list[str] = []
    offsets: list[int] = []
    for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        assert logprobs is not None
        tokens += logprobs.tokens or []
        offsets += logprobs.text_offset or []
    assert (tokens, offsets) == (whole.tokens, whole.text_offset)
