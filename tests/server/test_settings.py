"""Settings are checked when they are given; flags count more than the environment, that more than
the file."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_infinity import engine
from moe_infinity.cli import serve as serve_module
from moe_infinity.cli.app import build_app
from moe_infinity.errors import ConfigError, MoEInfinityError
from moe_infinity.server import running
from moe_infinity.server.settings import ServeConfig


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"])
def test_hosts_of_this_machine(host: str) -> None:
    assert ServeConfig(host=host).is_local


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_other_hosts_need_a_key_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match="without a key"):
        ServeConfig(host=host)
    assert not ServeConfig(host=host, api_keys=("k",)).is_local
    assert not ServeConfig(host=host, insecure=True).is_local


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1}, {"port": 65536}, {"max_waiting": 0}, {"max_body_bytes": 0},
        {"max_new_tokens": 0}, {"request_timeout_s": 0}, {"request_timeout_s": float("nan")},
        {"body_timeout_s": -1}, {"shutdown_s": -1}, {"shutdown_s": float("inf")},
        {"shutdown_s": float("nan")}, {"api_keys": ("",)}, {"api_keys": ("k\xe9y",)},
        {"api_keys": ("a\nb",)},
    ],
)  # fmt: skip
def test_wrong_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).rstrip("s")):
        ServeConfig(**wrong)


class Given:
    """What ``serve`` was about to do."""

    config: ServeConfig
    options: dict[str, Any]
    path: str


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    found = Given()

    def keep(config: ServeConfig) -> None:
        found.config = config
        raise SystemExit(0)

    monkeypatch.setattr(running, "bind", lambda host, port: keep(found.config))
    real = ServeConfig.__post_init__

    def note(self: ServeConfig) -> None:
        real(self)
        found.config = self

    monkeypatch.setattr(ServeConfig, "__post_init__", note)
    monkeypatch.setattr(serve_module, "_log_to_stderr", lambda level: None)
    return found


def serve(*arguments: object) -> None:
    result = CliRunner().invoke(build_app(), ["serve", *map(str, arguments)])
    if isinstance(result.exception, MoEInfinityError):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_flags_over_environment_over_file(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('port = 1001\nmax-waiting = 11\nrequest_timeout = 5\napi-key = ["file"]\n')
    serve("--config", path)
    assert (given.config.port, given.config.max_waiting) == (1001, 11)
    assert given.config.request_timeout_s == 5 and given.config.api_keys == ("file",)
    monkeypatch.setenv("MOE_INFINITY_PORT", "1002")
    monkeypatch.setenv("MOE_INFINITY_API_KEY", "one two")
    serve("--config", path)
    assert (given.config.port, given.config.max_waiting) == (1002, 11)
    assert given.config.api_keys == ("one", "two")
    serve("--config", path, "--port", 1003, "--api-key", "flag")
    assert (given.config.port, given.config.api_keys) == (1003, ("flag",))
    monkeypatch.setenv("MOE_INFINITY_CONFIG", str(path))
    monkeypatch.delenv("MOE_INFINITY_PORT")
    serve()
    assert given.config.port == 1001


def test_defaults_are_those_of_the_settings(given: Given) -> None:
    serve()
    assert given.config == ServeConfig()


def test_a_list_and_a_switch(given: Given, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('host = "0.0.0.0"\ninsecure = true\nname = ["a", "b"]\norigin = ["https://x"]')
    serve("--config", path)
    assert given.config.insecure and given.config.names == ("a", "b")
    assert given.config.origins == ("https://x",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "::"), "--insecure"),
        (("--host", "no.such.host.invalid", "--insecure"), "address of this machine"),
        (("--api-key", ""), "api_key"),
        (("--api-key", "a b"), "api_key"),
        (("--log-level", "loud"), "debug, info"),
    ],
)
def test_what_cannot_be_served(options: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        serve(*options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "got prot, expected names among"),
        ("port =", "is no TOML"),
        ("port = [1]", "expected one value"),
        ("[port]\na = 1", "expected one value"),
        ('api-key = "k"', "expected a list of texts"),
        ("api-key = [1]", "expected a list of texts"),
        ("config = 'x'", "got config"),
    ],
)
def test_files_that_mean_nothing(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        serve("--config", path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        serve("--config", tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is no TOML"):
        serve("--config", tmp_path / "bytes.toml")


def test_serve_leaves_memory_for_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any request may ask for an answer to a schema."""
    told: dict[str, Any] = {}

    def opened(path: str, **options: Any) -> None:
        told.update(options)
        raise ConfigError("that is enough")

    monkeypatch.setattr(engine, "MoE", opened)
    with pytest.raises(ConfigError, match="that is enough"):
        serve_module.serve(port=0)
    assert told["grammars"] is True
