"""What happens to requests when clients leave, disks fail, time runs out or too many come."""

import errno
import json
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from openai import APIError, OpenAI

from moe_infinity import MoE
from moe_infinity.server import exchange
from support.engine import assert_at_rest
from support.serving import Local, Reply, Script, running, wait_for

LONG = "Tell me of the old mill by the river, of the miller, and of his seven daughters. " * 4


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


class TestClientsThatLeave:
    def test_the_answer_ends_with_the_next_token(self, local: Local, script: Any) -> None:
        said: Script = script("one two three four five six seven eight nine ten")
        said.may_go_on.clear()
        sock = local.begin_stream("/v1/chat/completions", chat(max_tokens=100))
        job = local.worker.running
        sock.close()
        wait_for(lambda: job.is_cancelled)
        said.may_go_on.set()
        local.wait_idle()
        assert job.num_new == 2 and job.finish == "cancelled"

    @pytest.mark.parametrize("is_streamed", [True, False])
    def test_a_prompt_is_left_at_the_next_layer(self, local: Local, is_streamed: bool) -> None:
        expected = answer(local, LONG)
        local.forget()
        reached, may_go_on = threading.Event(), threading.Event()

        def hold(*_: Any) -> None:
            reached.set()
            assert may_go_on.wait(60)

        hook = local.moe.model.get_input_embeddings().register_forward_pre_hook(hold)
        sock = local.connect()
        raw = json.dumps(chat(LONG, stream=is_streamed)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}"
        sock.sendall(head.encode() + b"\r\n\r\n" + raw)
        assert reached.wait(60)
        job = local.worker.running
        sock.close()
        wait_for(lambda: local.moe._hierarchy.cancelled.is_set())
        hook.remove()
        may_go_on.set()
        local.wait_idle()
        assert job.num_new == 0 and job.is_cancelled
        assert_at_rest(local.moe)
        assert answer(local, LONG) == expected

    def test_the_kept_cache_is_right_afterwards(self, local: Local) -> None:
        """What was computed for somebody who left is used, and changes no answer."""
        expected = answer(local, LONG, max_tokens=24)
        local.forget()
        sock = local.begin_stream("/v1/chat/completions", chat(LONG, max_tokens=200))
        sock.close()
        local.wait_idle()
        reply = ask(local, LONG, max_tokens=24).json
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert reply["choices"][0]["message"]["content"] == expected

    def test_whoever_waits_leaves_the_queue(self, local: Local, script: Any) -> None:
        said: Script = script("one two")
        said.may_go_on.clear()
        first = in_threads(1, ask, local)[0]
        wait_for(lambda: local.worker.running)
        sock = local.connect()
        raw = json.dumps(chat()).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}"
        sock.sendall(head.encode() + b"\r\n\r\n" + raw)
        wait_for(lambda: local.worker.num_waiting == 1)
        sock.close()
        wait_for(lambda: local.worker.num_waiting == 0)
        said.may_go_on.set()
        assert first.result().status == 200 and len(said.prompts) == 1


class TestConversations:
    def test_one_that_goes_on_is_the_same_as_a_fresh_one(self, local: Local) -> None:
        first = answer(local, LONG, max_tokens=12)
        messages = [
            {"role": "user", "content": LONG},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And the sea?"},
        ]
        body = chat() | {"messages": messages}
        going_on = local.post("/v1/chat/completions", body).json
        assert going_on["usage"]["prompt_tokens_details"]["cached_tokens"] > 80
        local.forget()
        fresh = local.post("/v1/chat/completions", body).json
        assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert fresh["choices"] == going_on["choices"]
        assert fresh["usage"]["prompt_tokens"] == going_on["usage"]["prompt_tokens"]

    def test_two_in_turn(self, local: Local) -> None:
        others = "Sum up: " + LONG
        for content in (LONG, others):
            answer(local, content)
        for content in (LONG, others):
            usage = ask(local, content).json["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


class TestDiskErrors:
    def test_it_fails_and_the_next_one_works(
        self, local: Local, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = answer(local, LONG)
        local.forget()
        _break_disk(monkeypatch)
        reply = ask(local, LONG)
        assert reply.status == 500 and reply.error["type"] == "server_error"
        assert reply.error["code"] == "ReadError"
        assert reply.error["message"].startswith("ReadError: ")
        body = {"max_tokens": 5, "messages": chat(LONG)["messages"]}
        other = local.post("/v1/messages", body)
        assert other.status == 500 and other.json["error"]["type"] == "api_error"
        monkeypatch.undo()
        assert answer(local, LONG) == expected
        assert_at_rest(local.moe)
        assert local.get("/health").status == 200

    def test_in_the_middle_of_a_stream(
        self, local: Local, script: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: Script = script("one two three")

        def generate(*args: Any, **options: Any) -> None:
            said.generate(*args, **(options | {"stopping_criteria": [_Fails(options)]}))

        monkeypatch.setattr(local.moe, "generate", generate)
        with (
            OpenAI(base_url=f"{local.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(APIError, match="OSError") as caught,
        ):
            list(client.chat.completions.create(model="bundled", stream=True, **_messages()))
        assert caught.value.code == "OSError"
        for path, fields in (("messages", {}), ("responses", {"input": "a"})):
            script("one two three")
            said._texts.append("one two three")
            monkeypatch.setattr(local.moe, "generate", generate)
            raw = local.post(f"/v1/{path}", chat(stream=True) | fields).body.decode()
            *_, last = raw.strip().split("\n\n")
            assert last.startswith("event: error\ndata: {")
            assert "OSError" in json.loads(last.split("data: ")[1]).get("message", last)
        monkeypatch.undo()
        assert answer(local)


class _Fails:
    def __init__(self, options: Any) -> None:
        self._sink = options["stopping_criteria"][0]
        self._left = 2

    def __call__(self, ids: Any, scores: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            wait_for(lambda: not self._sink._job._events)  # what came before was told
            raise OSError(errno.EIO, "Input/output error")
        return self._sink(ids, scores)


def _runs(local: Local) -> bool:
    return local.worker.running is not None


def _messages() -> Any:
    return {"messages": [{"role": "user", "content": "hello"}]}


def _break_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real, lock, left = os.preadv, threading.Lock(), [20]

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        with lock:
            left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


class TestTooMuch:
    def test_the_queue_is_fair_and_has_an_end(self, moe: MoE, monkeypatch: Any) -> None:
        with running(lambda: Local(moe, max_waiting=3)) as local:
            said = Script(moe, *["one two"] * 4)
            monkeypatch.setattr(moe, "generate", said.generate)
            said.may_go_on.clear()

            def asked(key: str, content: str) -> Future[Reply]:
                before = local.worker.num_waiting
                headers = {"x-api-key": key}
                pool = ThreadPoolExecutor(1)
                body = chat(content)
                found = pool.submit(local.post, "/v1/chat/completions", body, **headers)
                pool.shutdown(wait=False)
                wait_for(lambda: local.worker.num_waiting > before or not before and _runs(local))
                return found

            first = asked("many", "m1")
            wait_for(lambda: said.prompts)
            found = [first, asked("many", "m2"), asked("many", "m3"), asked("few", "f1")]
            reply = ask(local)
            assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
            assert reply.error["code"] == "queue_full"
            assert reply.error["type"] == "rate_limit_error"
            other = local.post("/v1/messages", {"max_tokens": 5} | _messages())
            assert other.status == 429 and other.json["error"]["type"] == "rate_limit_error"
            assert local.post("/v1/responses", {"input": "a", "stream": True}).status == 429
            said.may_go_on.set()
            assert [each.result().status for each in found] == [200] * 4
            order = [moe.tokenizer.decode(ids).split()[1] for ids in said.prompts]
            assert order in (["m1", "m2", "f1", "m3"], ["m1", "f1", "m2", "m3"])

    def test_two_hundred_at_once(self, moe: MoE, monkeypatch: Any) -> None:
        with running(lambda: Local(moe)) as local:
            said = Script(moe, *["one two"] * 65)
            monkeypatch.setattr(moe, "generate", said.generate)
            said.may_go_on.clear()
            found = in_threads(200, ask, local)
            wait_for(lambda: sum(each.done() for each in found) == 135)
            assert {each.result().status for each in found if each.done()} == {429}
            assert local.worker.num_waiting == 64
            said.may_go_on.set()
            assert sorted(each.result().status for each in found) == [200] * 65 + [429] * 135
            local.wait_idle()

    def test_time_is_up(self, moe: MoE, monkeypatch: Any) -> None:
        monkeypatch.setattr(exchange, "HEARTBEAT_S", 0.02)
        with running(lambda: Local(moe, request_timeout_s=0.05)) as local:
            said = Script(moe, *["one two"] * 2)
            monkeypatch.setattr(moe, "generate", said.generate)
            said.may_go_on.clear()
            both = in_threads(2, ask, local)  # one runs, the other waits
            for each in both:
                reply = each.result()
                assert reply.status == 504 and reply.error["code"] == "timeout"
                assert reply.error["type"] == "timeout_error"
            said.may_go_on.set()
            local.wait_idle()
            assert len(said.prompts) == 1

    def test_signs_of_life_while_waiting(
        self, local: Local, script: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(exchange, "HEARTBEAT_S", 0.02)
        said: Script = script("one two", "three four")
        said.may_go_on.clear()
        first = in_threads(1, ask, local)[0]
        wait_for(lambda: local.worker.running)
        with local.connect() as sock:
            raw = json.dumps(chat(stream=True)).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            sock.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            seen = b""
            while b": waiting for its turn\n\n" not in seen:
                seen += sock.recv(65536)
            said.may_go_on.set()
            while more := sock.recv(65536):
                seen += more
        assert b'"finish_reason": "stop"' in seen and b"[DONE]" in seen and first.result().status == 200

    def test_progress_of_the_prompt_if_asked_for(
        self, local: Local, script: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(exchange, "HEARTBEAT_S", 0.02)
        said: Script = script("one", "two three")
        said.may_go_on.clear()
        first = in_threads(1, ask, local)[0]
        wait_for(lambda: local.worker.running)
        second = in_threads(1, lambda: ask(local, stream=True, return_progress=True))[0]
        wait_for(lambda: local.worker.num_waiting)
        threading.Timer(0.1, said.may_go_on.set).start()
        frames = second.result().body.decode().split("\n\n")
        progress = [json.loads(f[6:])["prompt_progress"] for f in frames if "prompt_progress" in f]
        assert progress[0].keys() == {"total", "cached", "processed", "time_ms"}
        assert progress[0]["total"] == 8 and first.result().status == 200


class TestAnswers:
    """Reasoning and calls as models say them, through the whole server."""

    TOOL: Any = {"type": "function", "function": {"name": "clock", "parameters": {}}}

    def test_reasoning_and_calls(self, local: Local, script: Any) -> None:
        said = (
            "<think>\nHm.</think>\n\nI look.<tool_call>\n"
            '{"name": "clock", "arguments": {"zone": "é"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "clock", "arguments": {}}\n</tool_call>'
        )
        script(said)
        choice = ask(local, tools=[self.TOOL], max_tokens=200).json["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert (message["reasoning_content"], message["content"].strip()) == ("Hm.", "I look.")
        functions = [call["function"] for call in message["tool_calls"]]
        assert functions == [
            {"name": "clock", "arguments": '{"zone": "é"}'},
            {"name": "clock", "arguments": "{}"},
        ]
        script(said)
        lone = ask(local, tools=[self.TOOL], max_tokens=200, parallel_tool_calls=False).json
        assert len(lone["choices"][0]["message"]["tool_calls"]) == 1
        script(said)
        raw = ask(local, tools=[self.TOOL], max_tokens=200, stream=True).body.decode()
        chunks = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call["index"] for call in calls if "id" in call] == [0, 1]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    def test_calls_nobody_asked_for_are_text(self, local: Local, script: Any) -> None:
        said = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
        script(said)
        choice = ask(local, max_tokens=200).json["choices"][0]
        assert choice["message"]["content"] == said and choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]

    def test_a_bug_is_told_as_one(
        self, local: Local, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("secret words")

        monkeypatch.setattr(local.moe, "generate", fail)
        reply = ask(local)
        assert reply.status == 500 and reply.error["code"] == "ZeroDivisionError"
        assert "secret" not in reply.error["message"] and "secret words" in caplog.text
        monkeypatch.undo()
        assert answer(local)


def test_a_device_that_is_lost(moe: MoE) -> None:
    from moe_infinity.errors import DeviceError

    with running(lambda: Local(moe)) as local:
        assert local.get("/health").json == {"status": "ok"}
        local.worker.lost = DeviceError("gone")
        reply = local.get("/health")
        assert reply.status == 503 and reply.json == {"status": "lost", "reason": "gone"}
        assert ask(local).error["code"] == "DeviceError"
