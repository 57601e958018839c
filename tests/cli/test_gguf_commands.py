"""GGUF files through the command line."""

import json
from pathlib import Path

import pytest

from support.command_line import refused, run
from support.gguf_files import Kind, small_model, write_gguf

IDS = ("--ids", "5,6,7")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(small_model("olmoe"), path, Kind.Q8_0)
    return path


def test_run_and_plan(small: Path) -> None:
    found = run("run", small, *IDS, "--max-new-tokens", 4, "--ignore-eos", "--json")
    assert found.code == 0 and len(json.loads(found.out)["token_ids"]) == 4
    assert run("run", small.parent, *IDS, "--max-new-tokens", 1).code == 0
    assert "12 of 12" in run("run", small, *IDS, "--max-new-tokens", 1).both
    assert "experts: 12 in 2 layers" in run("plan", small).out


def test_what_is_wrong_is_said(small: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(small.read_bytes()[:-5])
    assert "it is truncated: download it again" in refused("run", tmp_path / "cut.gguf", *IDS)
    (tmp_path / "text.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "expected GGUF; is it another kind of file?" in refused("plan", tmp_path / "text.gguf")
    assert "has no tokenizer in its metadata" in refused("run", small, "hello")
    (tmp_path / "empty.gguf").touch()
    assert "is empty, expected a GGUF file" in refused("plan", tmp_path / "empty.gguf")
    missing = refused("run", tmp_path / "none.gguf", *IDS)
    assert "no such file, expected a GGUF file; beside it are cut.gguf, empty.gguf" in missing


def test_files_of_another_name(small: Path, tmp_path: Path) -> None:
    for name in ("model.GGUF", "sha256-00ff"):
        (tmp_path / name).write_bytes(small.read_bytes())
        assert "experts: 12 in 2 layers" in run("plan", tmp_path / name).out
