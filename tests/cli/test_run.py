"""``moe-infinity run``: what comes out, and what its words mean."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import Stats, bundled_model_path
from moe_infinity.config import parse_size
from support.checkpoints import bundled_links, tiny_checkpoint
from support.command_line import Result, run

PROMPT = "def main():"
FEW = ("--max-new-tokens", 5)
FEW_SLOTS = ("--ram-slots", 64)


def done(*arguments: object, **options: Any) -> Result:
    result = run("run", *arguments, **options)
    assert result.code == 0, result.both
    assert "Traceback" not in result.both and not result.left_running
    return result


@functools.cache
def usual() -> dict[str, Any]:
    """The report of the bundled model at its defaults, on the prompt that tests share."""
    return as_json(PROMPT, *FEW)


def as_json(*arguments: object, **options: Any) -> dict[str, Any]:
    result = done(*arguments, "--json", **options)
    assert result.out.count("\n") == 1
    return json.loads(result.out)


def test_text_goes_out_and_the_table_aside() -> None:
    result = done(PROMPT, *FEW, *FEW_SLOTS)
    assert result.out.strip() and "def main" not in result.out
    assert "64 of 256 experts fit" in result.err
    for word in ("prefill", "decode", "hit rate", "read from disk", "peak memory", "bit-exact"):
        assert word in result.err


class TestJson:
    def test_one_object_with_every_field(self) -> None:
        report = as_json(PROMPT, *FEW, *FEW_SLOTS)
        fields = {field.name for field in dataclasses.fields(Stats)}
        extra = {"text", "token_ids", "prompt_tokens", "new_tokens"}
        assert set(report) == fields | extra
        assert report["new_tokens"] == len(report["token_ids"]) == 5
        assert report["prompt_tokens"] == report["prefill"]["num_tokens"] > 1
        assert report["decode"]["num_tokens"] == 4
        assert report["slots"] == 64 and report["experts_total"] == 256
        assert report["ttft_s"] > 0 and report["tpot_s"] > 0
        assert report["bit_exact"] is True and report["lossy"] == []
        assert report["hits"] + report["misses"] + report["late"] > 0
        assert 0 < report["belady_fraction"] <= report["limit_fraction"] <= 1

    def test_text_is_what_was_streamed(self) -> None:
        report = usual()
        assert done(PROMPT, *FEW).out == report["text"] + "\n"

    def test_nothing_but_the_object(self) -> None:
        assert done("hi", *FEW, "--json").err == ""


class TestSameWords:
    def test_greedy_twice_and_at_every_setting(self) -> None:
        first = usual()["token_ids"]
        for options in (
            ("--temperature", 0, "--seed", 7),
            ("--policy", "fifo", "--ram-slots", 4),
            ("--ram", "2GiB", "--max-context", 512),
        ):
            assert as_json(PROMPT, *FEW, *options)["token_ids"] == first, options

    def test_sampling_follows_the_seed(self) -> None:
        options = (PROMPT, "--max-new-tokens", 8, "--temperature", 2.0)
        answers = [as_json(*options, "--seed", seed)["token_ids"] for seed in (1, 1, 2)]
        assert answers[0] == answers[1] != answers[2]

    def test_a_generation_config_does_not_make_greedy_sample(self, tmp_path: Path) -> None:
        path = bundled_links(tmp_path / "sampling", "generation_config.json")
        (path / "generation_config.json").write_text(
            json.dumps({"do_sample": True, "temperature": 5.0, "top_k": 50, "eos_token_id": 0})
        )
        answers = [as_json(path, PROMPT, *FEW, "--seed", seed) for seed in (1, 2)]
        assert answers[0]["token_ids"] == answers[1]["token_ids"]
        assert answers[0]["token_ids"] == usual()["token_ids"]

    def test_nuclei_and_top_k(self) -> None:
        greedy = usual()["token_ids"]
        narrow = as_json(PROMPT, *FEW, "--temperature", 2, "--top-k", 1)["token_ids"]
        assert narrow == greedy
        as_json(PROMPT, *FEW, "--temperature", 0.7, "--top-p", 0.5)


class TestWhereThePromptComesFrom:
    def test_a_lone_positional_is_the_prompt(self) -> None:
        alone = usual()
        assert alone["token_ids"] == as_json(bundled_model_path(), PROMPT, *FEW)["token_ids"]

    def test_unless_it_is_a_folder(self, tmp_path: Path) -> None:
        path = tiny_checkpoint(tmp_path / "tiny")
        assert as_json(path, "--ids", "1,2,3", *FEW)["experts_total"] == 24

    def test_standard_input(self) -> None:
        piped = as_json("-", *FEW, stdin=PROMPT)
        assert piped["token_ids"] == usual()["token_ids"]

    def test_ids(self) -> None:
        report = as_json("--ids", "10, 11,12", *FEW)
        assert report["prompt_tokens"] == 3 and report["text"] is not None

    def test_no_prompt_at_all(self) -> None:
        assert as_json(*FEW)["new_tokens"] == 5

    @pytest.mark.parametrize(
        "prompt",
        [
            "~nobody-has-this-name is here",
            "x" * 300,
            "a" + "/b" * 600,
            "Zażółć gęślą jaźń ☃ 𝄞",
            "\n",
        ],
    )
    def test_any_text(self, prompt: str) -> None:
        assert as_json(prompt, "--max-new-tokens", 2)["new_tokens"] <= 2


class TestEndToken:
    def test_it_ends_the_answer(self) -> None:
        """The prompt is one after which the model stops at once or soon: any of a few."""
        report = as_json("--ids", "0", "--max-new-tokens", 3)
        assert 1 <= report["new_tokens"] <= 3

    def test_it_can_be_ignored(self, tmp_path: Path) -> None:
        """Every token that greedy decoding begins with is declared an end token."""
        path = bundled_links(tmp_path / "stops", "generation_config.json")
        first = as_json(PROMPT, "--max-new-tokens", 1)["token_ids"][0]
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, first]}))
        short = as_json(path, PROMPT, "--max-new-tokens", 9)
        assert short["token_ids"] == [first]
        long = as_json(path, PROMPT, "--max-new-tokens", 9, "--ignore-eos")
        assert long["new_tokens"] == 9 and long["token_ids"][0] == first


class TestWithoutTokenizer:
    @pytest.fixture(scope="class")
    def tiny(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tiny_checkpoint(tmp_path_factory.mktemp("run") / "tiny")

    def test_ids_stream_as_ids(self, tiny: Path) -> None:
        report = as_json(tiny, "--ids", "1,2,3", *FEW, "--ignore-eos")
        assert report["text"] is None
        streamed = done(tiny, "--ids", "1,2,3", *FEW, "--ignore-eos").out
        assert [int(word) for word in streamed.split()] == report["token_ids"]

    def test_text_is_refused(self, tiny: Path) -> None:
        result = run("run", tiny, "hello")
        assert result.code == 2 and "no tokenizer" in result.err and result.out == ""


def test_dtype() -> None:
    assert as_json(PROMPT, *FEW, "--dtype", "float32")["new_tokens"] == 5


def test_memory_of_a_long_prompt_stays_within_the_budget() -> None:
    """Also what libraries keep of every shape they have met."""
    length = 3_500
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4000, (length,), generator=generator).tolist()
    options = ("--ids", ",".join(map(str, ids)), "--max-context", length + 5, *FEW)
    refusal = run("run", *options, "--ram", "1MiB").err
    smallest = refusal.rsplit("that works is ", 1)[1].split(";")[0]
    assert as_json(*options, "--ram", smallest)["peak_rss_bytes"] <= parse_size(smallest)


def test_help_shows_defaults_and_units() -> None:
    text = " ".join(done("--help").out.split())
    for word in ("--ram", "auto", "8GiB", "next_use", "fifo", "--ignore-eos", "stdin", "greedy"):
        assert word in text
