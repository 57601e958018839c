"""``moe-infinity bench``: medians and spreads, as a table and as JSON."""

import json

import pytest

from support.command_line import refused, run

SMALL = ("--ram-slots", 64, "--prompt-tokens", 12, "--new-tokens", 4, "--trials", 2)


def test_json() -> None:
    result = run("bench", *SMALL, "--kernel", "torch", "--json")
    assert result.code == 0, result.both
    found = json.loads(result.out)
    assert (found["kernel"], found["slots"], found["prompt_tokens"]) == ("torch", 64, 12)
    assert len(found["trials"]) == 2
    median, spread = found["median"], found["spread"]
    rates = [trial["tokens_per_s"] for trial in found["trials"]]
    assert median["tokens_per_s"] == pytest.approx(sum(rates) / 2)
    assert spread["tokens_per_s"] == pytest.approx(abs(rates[0] - rates[1]))
    assert median["ttft_s"] > 0 and 0 < median["hit_rate"] < 1
    parts = ("experts_s", "dense_s", "stall_s", "rest_s")
    for trial in found["trials"]:
        wall_s = sum(trial[part] for part in parts)
        assert wall_s == pytest.approx(1 / trial["tokens_per_s"], rel=0.05)
    assert median["dense_s"] == 0  # torch's are not told apart


def test_depth_makes_the_prompt_longer_and_profile_shows_more() -> None:
    result = run("bench", *SMALL, "--depth", 40, "--profile")
    assert result.code == 0, result.both
    assert "40 + 4 tokens" in result.out
    assert "s of that per MoE layer" in result.out


def test_refuses() -> None:
    assert "auto" in refused("bench", "--kernel", "fast")


def test_more_context_than_the_model_has_is_refused() -> None:
    assert "expected at most the model's 2048" in refused("bench", "--depth", 9000, "--trials", 1)
