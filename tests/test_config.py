"""What a user can choose is checked once, and named where it means nothing."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_infinity.config import EngineConfig, format_bytes, parse_size, state_dir
from moe_infinity.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("8G", 8 * 2**30),
        ("8GB", 8 * 10**9),
        (" 512 MiB ", 512 * 2**20),
        ("2.5K", 2560),
        ("1TiB", 2**40),
        ("300B", 300),
        (str(2**55 + 1), 2**55 + 1),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("8XB", "-1", "0", "", " ", "GiB", "8 GiB GiB", "1e9", "0x10", "0.4B", "0.0001K", "nan"),
        *("inf", "9" * 400, "-8GiB", "8,5GiB", "auto", 0, -5, True, False, None),
    ],
)
def test_no_sizes(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--ram: got .* expected a size such as 8GiB"):
        parse_size(text, "--ram")


@given(st.integers(1, 2**60))
def test_any_positive_number_is_its_own_size(num_bytes: int) -> None:
    assert parse_size(num_bytes) == parse_size(str(num_bytes)) == num_bytes


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_named_error(text: str) -> None:
    try:
        assert parse_size(text) >= 1
    except ConfigError as error:
        assert "expected a size" in str(error)


@given(st.integers(1, 2**45))
def test_formatted_sizes_are_near(num_bytes: int) -> None:
    assert parse_size(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.006)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ram": "8XB"}, "ram: got '8XB', expected a size"),
        ({"ram": 0}, "ram: got 0, expected a size"),
        ({"vram": "8GiB", "device": "cpu"}, "vram: got '8GiB' with device cpu.*leave vram out"),
        ({"vram": "much"}, "vram: got 'much', expected a size"),
        ({"vram_slots": 0}, "vram_slots: got 0, expected a whole number of at least 1"),
        ({"device": "gpu"}, "device: got 'gpu', expected auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of .*float32, bfloat16, float16"),
        ({"miss": "skip"}, "miss: got 'skip', expected one of copy, cpu, auto"),
        ({"grammars": "no"}, "grammars: got 'no', expected True or False"),
        ({"ram_slots": 0}, "ram_slots: got 0, expected a whole number of at least 1"),
        ({"ram_slots": 2.5}, "ram_slots: got 2.5"),
        ({"ram_slots": True}, "ram_slots: got True"),
        ({"max_context": -1}, "max_context: got -1"),
        ({"max_batch": 0}, "max_batch: got 0"),
        ({"num_read_threads": 0}, "num_read_threads: got 0"),
    ],
)
def test_options_without_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_defaults() -> None:
    config = EngineConfig()
    assert (config.ram, config.ram_bytes, config.device, config.policy) == (
        "auto",
        None,
        "auto",
        "next_use",
    )
    assert EngineConfig(ram="1GiB").ram_bytes == 2**30


class TestStateFolder:
    def test_ours_before_the_systems(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
        monkeypatch.setenv("MOE_INFINITY_STATE_DIR", "/ours")
        assert state_dir() == Path("/ours")
        monkeypatch.delenv("MOE_INFINITY_STATE_DIR")
        assert state_dir() == Path("/xdg/moe-infinity")

    def test_home_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MOE_INFINITY_STATE_DIR")
        monkeypatch.setenv("XDG_STATE_HOME", "")
        monkeypatch.setenv("HOME", "/home/someone")
        assert state_dir() == Path("/home/someone/.local/state/moe-infinity")


def test_an_option_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match=r"ram_slot: no such option.*did you mean ram_slots\?"):
        EngineConfig.of({"ram_slot": 3})
    assert EngineConfig.of({"ram_slots": 3}) == EngineConfig(ram_slots=3)
