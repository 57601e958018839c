"""A cache goes to the library by the name that it has there, whichever the caller knows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import MoE
from moe_infinity.model.cache_name import CACHE, _name_in, name_cache
from support.checkpoints import tiny_checkpoint
from support.families import tiny_input_ids


@pytest.mark.parametrize("version", ["5.17.0", "5.23.1", "5.9.0"])
def test_older_libraries(version: str) -> None:
    assert _name_in(version) == "past_key_values"


@pytest.mark.parametrize("version", ["5.24.0", "5.24.0.dev0", "5.100.1", "6.0rc1"])
def test_newer_libraries(version: str) -> None:
    assert _name_in(version) == "cache"


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(TypeError, match="got both"):
        name_cache({"cache": object(), "past_key_values": object()})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_either_name_is_taken(name: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, torch.bfloat16)
    ids = tiny_input_ids(rows=1, length=8)
    with MoE(tmp_path, max_context=32) as moe:
        cache = moe.new_cache()
        tokens = moe.generate(ids, max_new_tokens=4, **named(name, cache))
        assert cache.get_seq_length() == tokens.shape[1] - 1
        said = moe(tokens[:, -1:], **named(name, cache))
        assert said[CACHE] is cache and cache.get_seq_length() == tokens.shape[1]


def named(name: str, cache: Any) -> dict[str, Any]:
    return {name: cache}
