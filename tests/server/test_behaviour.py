"""What happens to requests when clients leave, disks fail, time runs out or too many come."""

import errno
import json
import socket
import threading
import time
from typing import Any

import pytest
from openai import APIError, OpenAI

from moe_infinity import MoE
from support.asking import answer, ask, chat, in_threads
from support.bad_reads import fail_reads
from support.engine import assert_at_rest
from support.serving import Local, Script, request_bytes, running, wait_for

LONG = "Tell me of the old mill by the river, of the miller, and of his seven daughters. " * 4


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
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}"
        )
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
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}"
        )
        sock.sendall(head.encode() + b"\r\n\r\n" + raw)
        wait_for(lambda: local.worker.num_waiting == 1)
        sock.close()
        wait_for(lambda: local.worker.num_waiting == 0)
        said.may_go_on.set()
        assert first.result().status == 200 and len(said.prompts) == 1


class TestClientsThatReadNothing:
    @pytest.fixture
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moe_infinity.server import running

        monkeypatch.setattr(running, "_STALLED_S", 0.2)

    def deaf(self, local: Local, path: str, body: dict[str, Any]) -> socket.socket:
        """A connection with little room for what it never reads."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(local.address)
        sock.sendall(request_bytes(path, body))
        return sock

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("is_streamed", [True, False])
    def test_they_are_cut_off(
        self, local: Local, script: Any, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
    ) -> None:
        from moe_infinity.server import chat as answers

        script("one two three")
        fill = answers.data_frame
        monkeypatch.setattr(answers, "data_frame", lambda *a: fill(*a) + b" " * 8_000_000)
        monkeypatch.setattr(local.service, "name", "m" * (1 if is_streamed else 8_000_000))
        before = local.worker.last
        with self.deaf(local, "/v1/chat/completions", chat(stream=is_streamed, model=None)):
            wait_for(lambda: local.worker.last is not before)
            wait_for(lambda: local.num_connections == 0)

    @pytest.mark.usefixtures("impatient")
    def test_slow_ones_are_not(
        self, local: Local, script: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script("one two three")
        monkeypatch.setattr(local.service, "name", "m" * 40_000_000)
        size, begun_s = 0, time.monotonic()
        with local.connect() as sock:
            sock.sendall(request_bytes("/v1/chat/completions", chat(model=None)))
            while more := sock.recv(1_000_000):
                size += len(more)
                time.sleep(0.01)
        assert size > 40_000_000 and time.monotonic() - begun_s > 2 * 0.2


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

    def test_who_asks_for_it_is_computed_anew(self, local: Local) -> None:
        """As on the first day, and what is kept for others stays."""
        local.forget()
        first = ask(local, LONG, max_tokens=12).json
        for _ in range(2):
            anew = ask(local, LONG, max_tokens=12, cache_prompt=False).json
            assert anew["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert anew["choices"] == first["choices"]
        again = ask(local, LONG, max_tokens=12).json["usage"]["prompt_tokens_details"]
        assert again["cached_tokens"] > 0

    def test_a_prompt_that_is_answered_several_times_is_counted_once(self, local: Local) -> None:
        usage = ask(local, LONG, n=3, temperature=1).json["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        usage = ask(local, LONG, n=3, temperature=1).json["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1

    def test_of_several_prompts_those_read_are_told(self, local: Local, script: Any) -> None:
        said: Script = script("one two", "three four")
        said.may_go_on.clear()
        body = {"prompt": [[5] * 7, [6] * 30], "max_tokens": 4}
        reply = in_threads(1, local.post, "/v1/completions", body)[0]
        wait_for(lambda: local.worker.running and local.worker.running.num_new)
        assert local.get("/v1/stats").json["running"]["prompt_done"] == 7
        said.may_go_on.set()
        assert reply.result().json["usage"]["prompt_tokens"] == 37
        assert local.get("/v1/stats").json["totals"]["prompt_tokens"] >= 37

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
        fail_reads(monkeypatch.setattr, 20)
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


def _messages() -> Any:
    return {"messages": [{"role": "user", "content": "hello"}]}


def test_a_device_that_is_lost(moe: MoE) -> None:
    from moe_infinity.errors import DeviceError

    with running(lambda: Local(moe)) as local:
        assert local.get("/health").json == {"status": "ok"}
        local.worker.lost = DeviceError("gone")
        reply = local.get("/health")
        assert reply.status == 503 and reply.json == {"status": "lost", "reason": "gone"}
        assert ask(local).error["code"] == "DeviceError"
