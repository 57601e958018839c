"""More requests than there is room or time for, and what who waits is told."""

import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from moe_infinity import MoE
from moe_infinity.server import exchange
from support.asking import ask, chat, in_threads
from support.serving import Local, Reply, Script, running, wait_for


class TestTooMuch:
    def test_the_queue_is_fair_and_has_an_end(self, moe: MoE, monkeypatch: Any) -> None:
        with running(lambda: Local(moe, max_waiting=3)) as local:
            said = Script(moe, *["one two"] * 4)
            monkeypatch.setattr(moe, "generate", said.generate)
            said.may_go_on.clear()

            def asked(key: str, content: str, num_waiting: int) -> Future[Reply]:
                pool = ThreadPoolExecutor(1)
                path, body = "/v1/chat/completions", chat(content)
                future = pool.submit(lambda: local.post(path, body, **{"x-api-key": key}))
                pool.shutdown(wait=False)
                wait_for(lambda: said.prompts and local.worker.num_waiting == num_waiting)
                return future

            names = [("many", "m1"), ("many", "m2"), ("many", "m3"), ("few", "f1")]
            found = [asked(*name, number) for number, name in enumerate(names)]
            reply = ask(local)
            assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
            assert reply.error["code"] == "queue_full"
            assert reply.error["type"] == "rate_limit_error"
            other = local.post("/v1/messages", {"max_tokens": 5, "messages": chat()["messages"]})
            assert other.status == 429 and other.json["error"]["type"] == "rate_limit_error"
            assert local.post("/v1/responses", {"input": "a", "stream": True}).status == 429
            said.may_go_on.set()
            assert [each.result().status for each in found] == [200] * 4
            order = [moe.tokenizer.decode(ids).split()[1] for ids in said.prompts]
            assert order == ["m1", "m2", "f1", "m3"]

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
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            sock.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            seen = b""
            while b": waiting for its turn\n\n" not in seen:
                seen += sock.recv(65536)
            said.may_go_on.set()
            while more := sock.recv(65536):
                seen += more
        assert (
            b'"finish_reason": "stop"' in seen
            and b"[DONE]" in seen
            and first.result().status == 200
        )

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


def test_who_comes_to_an_idle_server_does_not_wait(moe: MoE, monkeypatch: Any) -> None:
    """Nor is counted as waiting, before the computing thread has seen it: one runs, one waits."""
    with running(lambda: Local(moe, max_waiting=1)) as local:
        said = Script(moe, *["one two"] * 2)
        monkeypatch.setattr(moe, "generate", said.generate)
        with local.worker._changed:  # nobody is taken meanwhile
            futures = []
            pool = ThreadPoolExecutor(2)
            for _ in range(2):
                futures.append(pool.submit(ask, local))
        assert [future.result().status for future in futures] == [200, 200]
        pool.shutdown()
