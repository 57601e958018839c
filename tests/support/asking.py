"""Chat completions: by the openai client, every document checked against its types, and raw."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from support.serving import Local, Reply


def say(client: OpenAI, content: str = "hello", **fields: Any) -> ChatCompletion:
    """One answer, greedy unless told; the document is strictly what the client knows."""
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    fields = {"model": "bundled", "temperature": 0, "max_tokens": 8} | fields
    answer = client.chat.completions.create(messages=messages, **fields)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    return answer


def text(client: OpenAI, content: str = "hello", **fields: Any) -> str:
    return say(client, content, **fields).choices[0].message.content or ""


def stream(client: OpenAI, content: str = "hello", **fields: Any) -> list[ChatCompletionChunk]:
    fields = {"model": "bundled", "temperature": 0, "max_tokens": 8} | fields
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **fields))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    return chunks


def refused(client: OpenAI, **fields: Any) -> Any:
    with pytest.raises(BadRequestError) as caught:
        say(client, **fields)
    error = caught.value
    assert error.type == "invalid_request_error" and error.message
    return error


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": content}
    return {"messages": [message], "temperature": 0, "max_tokens": 8} | fields


def ask(local: Local, content: str = "hello", **fields: Any) -> Reply:
    return local.post("/v1/chat/completions", chat(content, **fields))


def answer(local: Local, content: str = "hello", **fields: Any) -> str:
    reply = ask(local, content, **fields)
    assert reply.status == 200, reply.body
    return str(reply.json["choices"][0]["message"]["content"])


def in_threads(number: int, function: Any, *args: Any) -> list[Future[Any]]:
    pool = ThreadPoolExecutor(number)
    found = [pool.submit(function, *args) for _ in range(number)]
    pool.shutdown(wait=False)
    return found
