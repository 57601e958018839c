"""The original package's call keeps working; keys without meaning here warn once, by name."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from moe_infinity import MoE, original_api
from moe_infinity.errors import ConfigError
from moe_infinity.original_api import translate
from support.checkpoints import tiny_checkpoint


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(original_api, "_warned", set())
    yield


def test_the_ratio_is_of_all_memory() -> None:
    total = psutil.virtual_memory().total
    assert translate({"device_memory_ratio": 0.5}) == {"ram": int(total * 0.5)}
    assert translate({"device_memory_ratio": 1}) == {"ram": total}


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, "0.75", None, True])
def test_other_ratios_are_refused(ratio: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"device_memory_ratio: got .*expected a number in \(0, 1"
    ):
        translate({"device_memory_ratio": ratio})


@pytest.mark.parametrize(
    "key",
    ["offload_path", "host_memory_ratio", "trace_capacity", "trace_path", "num_threads", "madeup"],
)
def test_keys_without_meaning_warn_once(key: str) -> None:
    with pytest.warns(UserWarning, match=f"'{key}' has no meaning here"):
        assert translate({key: 0.9}) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert translate({key: 0.9}) == {}


def test_prefetch_was_a_switch() -> None:
    assert translate({"prefetch": False}) == {}
    with pytest.warns(UserWarning, match="'prefetch' has no meaning"):
        assert translate({"prefetch": True}) == {}
    assert translate({"prefetch": "none"}) == {"prefetch": "none"}


def test_a_json_file_may_hold_it(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"device_memory_ratio": 0.25}))
    assert set(translate(file)) == set(translate(str(file))) == {"ram"}


@pytest.mark.parametrize("text", ["{", "[]", '"8GiB"'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"config: got .*expected a dictionary"):
        translate(file)


@pytest.mark.parametrize("config", ["/no/such/file.json", 5, ["ram"]])
def test_something_else_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"config: got .*expected a dictionary"):
        translate(config)


def test_the_call_of_its_readme(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "tiny")
    with pytest.warns(UserWarning, match="'offload_path' has no meaning here: experts are read"):
        moe = MoE(path, {"offload_path": str(tmp_path / "off"), "device_memory_ratio": 0.75})
    with moe:
        assert moe.plan.budget_bytes == int(psutil.virtual_memory().total * 0.75)
        assert moe.generate([[1, 2, 3]], max_new_tokens=2).shape[0] == 1
    assert not (tmp_path / "off").exists()


def test_the_warning_points_at_the_caller(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as caught, pytest.raises(ConfigError):
        MoE(tmp_path, {"trace_path": "x"}, ram="nothing")
    assert caught[0].filename == __file__


def test_our_own_options_go_before(tmp_path: Path) -> None:
    with MoE(tiny_checkpoint(tmp_path / "tiny"), {"device_memory_ratio": 0.01}, ram="4GiB") as moe:
        assert moe.plan.budget_bytes == 4 * 2**30
