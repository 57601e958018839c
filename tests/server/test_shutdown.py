"""The end of a server: what runs may finish, what waits is told, and the exit code is 0."""

import signal
from concurrent.futures import ThreadPoolExecutor

from support.command_line import refused
from support.serving import SMALL, Server, assert_clean, wait_for

LONG = {"prompt": "One two", "max_tokens": 400, "ignore_eos": True}


def is_refused(server: Server) -> bool:
    try:
        server.get("/health")
    except OSError:
        return True
    return False


def test_sigterm_lets_a_stream_finish() -> None:
    server = Server(*SMALL)
    sock = server.begin_stream("/v1/completions", LONG | {"max_tokens": 60})
    server.signal(signal.SIGTERM)
    wait_for(lambda: is_refused(server))
    seen = b""
    while more := sock.recv(65536):
        seen += more
    sock.close()
    assert b"[DONE]" in seen and b'"length"' in seen
    code, log = server.wait()
    assert code == 0, log
    assert_clean(log)
    assert " ok: prompt " in log


def test_ctrl_c_without_grace() -> None:
    """What runs is cut off, what waits is refused, and nothing is said of tasks and loops."""
    server = Server(*SMALL, "--shutdown", 0, "--max-waiting", 5)
    with ThreadPoolExecutor(2) as pool:
        sock = server.begin_stream("/v1/completions", LONG)
        waiting = [
            pool.submit(server.post, "/v1/completions", LONG | {"stream": stream})
            for stream in (False, True)
        ]
        wait_for(lambda: server.get("/v1/stats").json["queue"]["waiting"] == 2)
        with server.connect() as idle, server.connect() as begun:
            begun.sendall(b"GET /health HT")
            server.signal(signal.SIGINT)
            code, log = server.wait()
            assert idle.recv(10) == b""
        seen = b""
        while more := sock.recv(65536):
            seen += more
        assert b'"shutting_down"' in seen
        for each in waiting:
            assert each.result().status == 503
            assert each.result().error["code"] == "shutting_down"
    sock.close()
    assert code == 0, log
    assert_clean(log)


def test_beyond_this_machine_only_with_a_key() -> None:
    assert "--insecure" in refused("serve", "--host", "0.0.0.0")


def test_a_port_that_is_taken(server: Server) -> None:
    port = server.address[1]
    assert "choose another" in refused("serve", "--port", port)
