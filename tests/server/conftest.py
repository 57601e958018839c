"""One real server for all tests that only ask, and one in a thread for those that look inside."""

from collections.abc import Iterator

import pytest
from anthropic import Anthropic
from openai import OpenAI

from moe_infinity import MoE, bundled_model_path
from support.serving import SMALL, Local, Script, Server, assert_clean


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    started = Server(*SMALL, "--max-new-tokens", 24, "--name", "other", "--max-waiting", 300)
    yield started
    code, log = started.stop()
    assert code == 0, log
    assert_clean(log)


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="session")
def claude(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="session")
def moe() -> Iterator[MoE]:
    with MoE(bundled_model_path(), ram_slots=64, dtype="float32", max_context=512) as opened:
        yield opened


@pytest.fixture(scope="session")
def shared_local(moe: MoE) -> Iterator[Local]:
    started = Local(moe, max_new_tokens=24)
    yield started
    started.stop()


@pytest.fixture
def local(shared_local: Local) -> Iterator[Local]:
    """Nothing kept, nothing running; and so it is left."""
    shared_local.forget()
    yield shared_local
    shared_local.wait_idle()
    assert shared_local.worker._thread.is_alive()


@pytest.fixture
def script(local: Local, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Called with texts: what the model says next, answer by answer."""

    def say(*texts: str) -> Script:
        script = Script(local.moe, *texts)
        monkeypatch.setattr(local.moe, "generate", script.generate)
        return script

    return say
