"""How programs are cut is data: what is read, and what is refused."""

import json
from pathlib import Path

import pytest

from moe_infinity.errors import ConfigError
from moe_infinity.kernels.gpu.tuning import FEW, FOLDER, load

USUAL = json.loads((FOLDER / "default.json").read_text())


def written(folder: Path, **changes: object) -> Path:
    (folder / "some.json").write_text(json.dumps({**USUAL, **changes}))
    return folder


def test_there_is_one_for_every_gpu(tmp_path: Path) -> None:
    usual = load("some GPU of tomorrow")
    assert load("default") == usual
    for num_tokens in range(1, FEW + 1):
        way = usual.way(num_tokens, False)
        assert not way.is_many and num_tokens <= way.tokens < 2 * num_tokens
        assert way.columns == 256 and usual.way(num_tokens, True).columns == 64
    assert all(usual.way(n, False).is_many for n in (FEW + 1, 100, 5000))
    written(tmp_path, gpus=["default", "Other"])
    own = {**USUAL, "gpus": ["NVIDIA A100"], "few": [{**USUAL["few"][0], "rows": 16}]}
    (tmp_path / "a100.json").write_text(json.dumps(own))
    assert load("NVIDIA A100", tmp_path).way(8, False).rows == 16
    assert load("Other", tmp_path) == load("Third", tmp_path) == usual


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": ["A100"]}, "with 'default'"),
        ({"gpus": "default"}, "gpus.*a list of names"),
        ({"many": []}, "many.*a list of entries"),
        ({"more": 1}, "keys.*gpus, few, tall, many"),
        ({"few": [{"rows": 4}]}, "an entry of few.*most_tokens, num_stages"),
        ({"few": [{**USUAL["few"][0], "rows": 3}]}, "rows of few.*got 3.*a power of two"),
        ({"few": [{**USUAL["few"][0], "num_warps": "4"}]}, "num_warps.*a whole number"),
        ({"many": [{**USUAL["many"][0], "tokens": 8}]}, "tokens of many.*at least 16"),
        ({"many": [{**USUAL["many"][0], "columns": 32}]}, "columns of many.*at least 64"),
    ],
)
def test_what_means_nothing_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load("any", written(tmp_path, **changes))


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bad\.json is no JSON"):
        load("any", tmp_path)
