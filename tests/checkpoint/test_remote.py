"""Packing straight from the hub, against a stand-in on localhost: nothing of it stays here."""

import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moe_infinity import bundled_model_path
from moe_infinity.checkpoint import download, packing, remote
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.checkpoint.hub import resolve
from moe_infinity.checkpoint.packing import pack
from moe_infinity.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    ReadError,
)
from moe_infinity.preparation import opened_source, packing_job, require_forms
from moe_infinity.types import ExpertKey, ExpertSpec, ReadRange
from support.hub import StandInHub, serving

ID = "someone/bundled"
WEIGHTS = "model.safetensors"
PATIENCE_S = 60


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[StandInHub]:
    monkeypatch.setattr(download, "_MAX_FAILURES", 0)
    with serving(monkeypatch, home) as standing_in:
        standing_in.publish(ID, bundled_model_path(), "v1")
        yield standing_in


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The model, packed from its folder."""
    return packed(str(bundled_model_path()), tmp_path_factory.mktemp("packed") / "out")


def packed(model: str, target: Path, dense: str = "int8") -> dict[str, bytes]:
    with opened_source(model) as source:
        pack(packing_job(source, target, "int4", dense))
    return {file.name: file.read_bytes() for file in target.iterdir()}


def weight_bytes() -> int:
    return (bundled_model_path() / WEIGHTS).stat().st_size


@pytest.mark.parametrize("name", [ID, f"{ID}@v1"])
def test_it_is_what_a_folder_gives(
    hub: StandInHub, home: Path, tmp_path: Path, expected: dict[str, bytes], name: str
) -> None:
    assert packed(name, tmp_path / "out") == expected
    kept = [file for file in home.rglob("*") if file.is_file() and file.stat().st_size > 100_000]
    assert not [file for file in kept if file.name != "tokenizer.json"]
    # Experts are read in whole pages: 7% more where they are as small as these.
    assert hub.body_bytes(WEIGHTS) < 1.1 * weight_bytes(), "bytes were read twice"


def test_through_broken_connections(
    hub: StandInHub, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    hub.cuts[WEIGHTS] = [8, 5_000, 70_000, 1, 30_000]
    assert packed(ID, tmp_path / "out") == expected
    assert not hub.cuts[WEIGHTS]


def test_a_hub_that_goes_away_and_comes_back(
    hub: StandInHub, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    def leave(num_bytes: int) -> None:
        done.append(num_bytes)
        if sum(done) > weight_bytes() // 2:
            hub.cuts[WEIGHTS] = [0] * 1000

    done: list[int] = []
    with opened_source(ID) as source:
        job = packing_job(source, tmp_path / "out", "int4", "int8")
        with pytest.raises(ReadError, match=r"check the connection.*what is done stays"):
            pack(job, leave)
    assert not (tmp_path / "out").exists()
    hub.cuts.clear()
    hub.forget()
    assert packed(ID, tmp_path / "out") == expected
    assert hub.body_bytes(WEIGHTS) < 0.6 * weight_bytes(), "what was done was done again"


class Stuck(ExpertStore):
    """Gives its first expert at once, and waits for whoever reads others to be given up."""

    def __init__(self, specs: Mapping[ExpertKey, ExpertSpec]) -> None:
        self.specs = specs
        self.given_up = threading.Event()

    def read_into(self, key: ExpertKey, buffer: memoryview, chunk: ReadRange) -> None:
        if key != min(self.specs):
            assert self.given_up.wait(PATIENCE_S)
            raise ReadError("given up")

    def give_up(self) -> None:
        self.given_up.set()


def test_who_stops_waits_for_no_other_read(tmp_path: Path) -> None:
    with opened_source(bundled_model_path()) as source:
        specs = packing_job(source, tmp_path / "out", "int4", "int8").specs
    store = Stuck(specs)
    reads = packing._read(store, sorted(specs))
    assert next(reads)[0] == min(specs)
    reads.close()
    assert store.given_up.is_set()


def test_a_read_that_is_given_up_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*asked: Any) -> None:
        asked[-1].pause(PATIENCE_S)  # a connection that says nothing

    monkeypatch.setattr(remote, "fetch", fetch)
    file = remote.RemoteFile("http://nowhere", 100)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(file.read_into, memoryview(bytearray(100)), 0, 100)
        file.give_up()
        with pytest.raises(CancelledError):
            reading.result(PATIENCE_S)


def test_another_commit_starts_anew(
    hub: StandInHub, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    def stop(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with opened_source(ID) as source, pytest.raises(KeyboardInterrupt):
        pack(packing_job(source, tmp_path / "out", "int4", "int8"), stop)
    other = tmp_path / "other"
    shutil.copytree(bundled_model_path(), other)
    hub.publish(ID, other)
    hub.forget()
    assert packed(ID, tmp_path / "out") == expected
    assert hub.body_bytes(WEIGHTS) > weight_bytes()


def test_what_was_downloaded_is_used(
    hub: StandInHub, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    resolve(ID)
    hub.forget()
    assert packed(ID, tmp_path / "out") == expected
    assert hub.body_bytes(WEIGHTS) == 0
    hub.close()
    assert packed(ID, tmp_path / "again") == expected


def test_bad_names_and_bad_files(hub: StandInHub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--experts: got 'int5'"):
        require_forms("int5", "bf16")
    with (
        pytest.raises(CheckpointNotFoundError, match="nor a model on the hub"),
        opened_source("someone/else"),
    ):
        pass
    bad = tmp_path / "bad"
    shutil.copytree(bundled_model_path(), bad)
    (bad / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + bytes(4096))
    hub.publish("someone/bad", bad)
    with pytest.raises(CorruptCheckpointError, match="truncated or not safetensors"):
        packed("someone/bad", tmp_path / "out")
