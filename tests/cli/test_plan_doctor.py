"""``plan`` and ``doctor``: their numbers add up, are promises, and are there for machines."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_infinity import bundled_model_path
from moe_infinity.cli.plan import _report
from moe_infinity.config import EngineConfig, format_bytes
from support.checkpoints import bundled_links, tiny_checkpoint
from support.command_line import run

MIB = 2**20
SPEED = ("--disk-gbps", 1.0)


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.code == 0, result.both
    assert result.err == "" and not result.left_running
    return result.out


@functools.cache
def planned(*arguments: object) -> dict[str, Any]:
    return json.loads(done("plan", *arguments, *SPEED, "--json"))


class TestPlan:
    def test_it_adds_up(self) -> None:
        report = planned("--ram", "1GiB")
        parts = ("dense", "kv", "workspace", "kept", "staging", "runtime", "cache")
        assert report["used_bytes"] == sum(report[f"{part}_bytes"] for part in parts)
        assert report["used_bytes"] <= report["budget_bytes"] == 2**30
        assert report["share_resident"] == report["slots"] / report["experts_total"]
        assert report["working_set"] == report["num_layers"] * report["top_k"] == 32
        assert report["holds_working_set"] is True
        assert report["smallest_budget_bytes"] < report["budget_bytes"]

    def test_the_band_names_its_assumption(self) -> None:
        speed = planned("--ram-slots", 64)["forecast"]
        assert speed["hit_rate_low"] == 0.25 < speed["hit_rate"] < 1
        assert 0 < speed["tokens_per_s_low"] < speed["tokens_per_s"] < speed["tokens_per_s_high"]
        assert speed["bandwidths"]["disk_gbps"] == 1.0
        assert planned("--ram-slots", 64, "--hit-rate", 0.9)["forecast"]["hit_rate"] == 0.9

    def test_for_people(self) -> None:
        text = done("plan", bundled_model_path(), "--ram-slots", 20, *SPEED)
        for words in (
            *("will be slow, because one token uses 32 experts", "dense weights", "KV cache"),
            *("smallest budget that works", "experts: 256 in 8 layers", "<- more than fit at once"),
            *("tokens/s if", "of the experts are found in memory", "disk 1.00 GB/s"),
        ):
            assert words in text

    def test_of_a_model_that_is_elsewhere_it_counts_a_tokenizer(self, tmp_path: Path) -> None:
        """What lies here is only what the plan needs, which no tokenizer is."""
        for file in bundled_model_path().iterdir():
            if not file.name.startswith("tokenizer"):
                (tmp_path / file.name).symlink_to(file)
        config, found = EngineConfig(ram_slots=64), {}
        for is_here in (True, False):
            report = _report(tmp_path, config, [], None, 1.0, is_here)
            found[is_here] = report["runtime_bytes"]
        vocab_size = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
        assert found[False] - found[True] >= 1000 * vocab_size

    def test_nothing_is_loaded(self, tmp_path: Path) -> None:
        """Headers and config are enough: the weights may be a hole in the disk."""
        path = bundled_links(tmp_path / "hollow", "model.safetensors")
        source = bundled_model_path() / "model.safetensors"
        raw = source.read_bytes()
        with (path / "model.safetensors").open("wb") as file:
            file.write(raw[: 8 + int.from_bytes(raw[:8], "little")])
            file.truncate(len(raw))
        hollow, whole = planned(path, "--ram", "1GiB"), planned("--ram", "1GiB")
        for key in ("dense_bytes", "kv_bytes", "expert_bytes_total", "bytes_per_token"):
            assert hollow[key] == whole[key]

    def test_auto(self) -> None:
        report = planned()
        assert report["budget_bytes"] > report["used_bytes"] > 0
        assert "every expert stays in memory" in report["verdict"]

    def test_the_smallest_budget_as_printed_works(self) -> None:
        printed = re.search(r"smallest budget that works +([\d.]+ MiB)", done("plan", *SPEED))
        assert printed is not None
        answer = run("run", "--ram", printed[1], "--max-new-tokens", 3, "--json", "hi")
        assert answer.code == 0, answer.err
        report = json.loads(answer.out)
        assert report["slots"] >= 4
        assert report["peak_rss_bytes"] <= float(printed[1].split()[0]) * MIB

    def test_so_does_the_one_a_refusal_names(self) -> None:
        refusal = run("run", "--ram", "1MiB", "hi").err
        smallest = refusal.rsplit(" is ", 1)[1].strip()
        assert run("run", "--ram", smallest, "--max-new-tokens", 1, "hi").code == 0
        exact = planned()["smallest_budget_bytes"]
        assert format_bytes(exact).endswith(".00 MiB")
        assert run("run", "--ram", exact, "--max-new-tokens", 1, "hi").code == 0

    def test_another_model(self, tmp_path: Path) -> None:
        report = planned(tiny_checkpoint(tmp_path / "tiny"), "--max-batch", 2, "--max-context", 64)
        assert (report["experts_total"], report["max_batch"], report["max_context"]) == (24, 2, 64)


class TestDoctor:
    @pytest.fixture(scope="class")
    def report(self) -> dict[str, Any]:
        return json.loads(done("doctor", bundled_model_path(), "--json"))

    def test_what_the_machine_is(self, report: dict[str, Any]) -> None:
        assert report["cores"] >= 1 and report["torch_threads"] >= 1
        assert report["ram_bytes"] >= report["available_bytes"] > 0
        assert isinstance(report["instruction_sets"], list) and isinstance(report["gpus"], list)
        assert report["folder"] == str(bundled_model_path())
        assert {"moe-infinity", "torch", "transformers", "safetensors", "numpy"} <= set(
            report["versions"]
        )

    def test_how_fast_it_moves_bytes(self, report: dict[str, Any]) -> None:
        for name in ("disk_gbps", "memory_gbps", "matvec_gbps"):
            assert report[name] > 0
        assert isinstance(report["direct_io"], bool) and report["read_bytes"] % 4096 == 0

    def test_what_to_fix(self, report: dict[str, Any]) -> None:
        assert isinstance(report["advice"], list)
        if report["disk_gbps"] < 1:
            assert any("NVMe" in line for line in report["advice"])

    def test_for_people(self) -> None:
        text = done("doctor")
        for word in ("processor", "memory", "disk", "GPU", "versions", "GB/s"):
            assert word in text
        assert text.splitlines()[-1].startswith("- ")
