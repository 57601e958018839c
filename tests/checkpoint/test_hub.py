"""Hub ids against a stand-in on localhost: downloads, resuming, offline, headers alone, errors."""

import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Qwen3MoeForCausalLM

from moe_infinity.checkpoint import download
from moe_infinity.checkpoint import hub as ours
from moe_infinity.checkpoint.hub import bundled_model_path, headers_only, resolve
from moe_infinity.checkpoint.hub_names import choose_weights, is_hub_id
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint
from moe_infinity.errors import CheckpointNotFoundError, CorruptCheckpointError, DiskSpaceError
from moe_infinity.model.loading import examine
from support.families import family, tiny_config
from support.hub import StandInHub, serving

ID = "someone/tiny-moe"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
INDEX = "model.safetensors.index.json"
SMALL = {"config.json", "generation_config.json", INDEX, *TOKENIZER}
DECOYS = ("original/model.safetensors", "original/params.json", "consolidated.safetensors")
DECOYS += ("pytorch_model.bin", "README.md", ".gitattributes", "picture.png")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is on the hub: a checkpoint in shards, and what people put beside one."""
    folder = tmp_path_factory.mktemp("original")
    config = tiny_config(family("qwen3_moe"))
    config.moe_intermediate_size = 128  # so that weights are large against headers: 3.5 MB
    Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size="1MB")
    for name in TOKENIZER:
        shutil.copy(bundled_model_path() / name, folder)
    for name in DECOYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, home: Path, original: Path) -> Iterator[StandInHub]:
    with serving(monkeypatch, home) as standing_in:
        standing_in.publish(ID, original, "v1", "refs/pr/1")
        yield standing_in


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt that brings nothing is the last."""
    monkeypatch.setattr(download, "_MAX_FAILURES", 0)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def same_weights(folder: Path, original: Path) -> bool:
    return [f.read_bytes() for f in shards(folder)] == [f.read_bytes() for f in shards(original)]


def unfinished(home: Path) -> list[Path]:
    return sorted(home.rglob("*.incomplete"))


def write_safetensors(file: Path, num_bytes: int) -> None:
    """One tensor of zeros, sparse."""
    header = {"x": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(file, 8 + len(raw) + num_bytes)


# ---- paths and names -------------------------------------------------------------------------


def test_a_folder_here_goes_before_the_hub(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(ID)
    Path(ID).mkdir(parents=True)
    assert not is_hub_id(ID)
    assert resolve(ID) == Path(ID)
    assert resolve(tmp_path) == tmp_path
    assert not hub.requests


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"got a file.*name the folder"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["tiny-moe", "./a/b", "a/b/c", "someone/tiny@", "some one/b"])
def test_neither_path_nor_id(hub: StandInHub, name: str) -> None:
    assert not is_hub_id(name)
    with pytest.raises(CheckpointNotFoundError, match=r"neither an existing folder nor a hub id"):
        resolve(name)
    assert not hub.requests


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["b.safetensors", "a.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["original/model.safetensors", "pytorch_model.bin", "model.gguf"], []),
    ],
)
def test_which_weights_without_an_index(
    names: list[str], chosen: list[str], tmp_path: Path
) -> None:
    assert choose_weights(names, tmp_path) == chosen


# ---- downloads -------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["", "@v1", "@refs/pr/1", "@commit"])
def test_download_what_is_needed(hub: StandInHub, original: Path, revision: str) -> None:
    folder = resolve(ID + revision.replace("commit", hub.repos[ID].commit))
    assert {file.name for file in folder.iterdir()} == SMALL | {f.name for f in shards(original)}
    assert same_weights(folder, original)
    assert not any(hub.asked(name) for name in DECOYS)
    assert all(len(hub.asked(file.name)) == 1 for file in folder.iterdir())
    checkpoint = SafetensorsCheckpoint(folder)
    assert examine(checkpoint, None).specs
    checkpoint.close()


def test_second_resolve_asks_for_no_file(hub: StandInHub) -> None:
    folder = resolve(ID)
    hub.forget()
    assert resolve(ID) == folder
    assert hub.requests
    assert not [request for request in hub.requests if request.name]


def test_break_in_mid_file_is_resumed(hub: StandInHub, original: Path) -> None:
    broken = shards(original)[1]
    hub.cuts[broken.name] = [200_000, 300_000]
    folder = resolve(ID)
    assert same_weights(folder, original)
    last = broken.stat().st_size - 1
    assert [request.range for request in hub.asked(broken.name)] == [
        f"bytes=0-{last}",
        f"bytes=200000-{last}",
        f"bytes=500000-{last}",
    ]
    assert hub.body_bytes(broken.name) == broken.stat().st_size
    assert not unfinished(folder.parents[3])


@pytest.mark.usefixtures("impatient")
def test_another_process_goes_on(hub: StandInHub, original: Path, home: Path) -> None:
    broken = shards(original)[0]
    hub.cuts[broken.name] = [200_000, 0]
    with pytest.raises(CheckpointNotFoundError, match="goes on where it stopped"):
        resolve(ID)
    assert len(hub.asked(broken.name)) == 2
    program = f"from moe_infinity.checkpoint.hub import resolve; print(resolve({ID!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | hub.environment(home),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert same_weights(Path(done.stdout.strip()), original)
    assert hub.asked(broken.name)[2].range == f"bytes=200000-{broken.stat().st_size - 1}"
    assert hub.body_bytes(broken.name) == broken.stat().st_size


def test_ctrl_c_keeps_what_is_there(
    hub: StandInHub, original: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend, once = ours.extend, threading.Lock()

    def part(file: Path, url: str, end: int, progress: Any) -> None:
        extend(file, url, 100_000, progress)
        if once.acquire(blocking=False):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        progress.pause(60)  # ends at once: the interrupt stops every thread

    with monkeypatch.context() as patch:
        patch.setattr(ours, "extend", part)
        with pytest.raises(KeyboardInterrupt):
            resolve(ID)
    kept = {file.stem: file.stat().st_size for file in unfinished(home)}
    assert 100_000 in kept.values()
    hub.forget()
    assert same_weights(resolve(ID), original)
    for name, etag in hub.repos[ID].etags.items():
        if etag in kept:
            assert (hub.asked(name)[0].range or "").startswith(f"bytes={kept[etag]}-")


def test_damaged_remains_are_noticed(
    hub: StandInHub, original: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = shards(original)[0].name
    etag = hub.repos[ID].etags[name]
    remains = home / f"hub/models--someone--tiny-moe/blobs/{etag}.incomplete"
    remains.parent.mkdir(parents=True)
    remains.write_bytes(bytes(100_000))
    assert same_weights(resolve(ID), original)
    assert "damaged" in caplog.text
    assert [(r.range or "").split("-")[0] for r in hub.asked(name)] == ["bytes=100000", "bytes=0"]


def test_resuming_where_ranges_are_ignored(hub: StandInHub, original: Path) -> None:
    hub.ignores_ranges = True
    hub.cuts[shards(original)[0].name] = [200_000]
    assert same_weights(resolve(ID), original)


def test_token_goes_to_the_hub_alone(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated[ID] = 403
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    resolve(ID)
    assert all(bool(r.token) != r.path.startswith("/content/") for r in hub.requests)
    assert hub.asked(".safetensors")


# ---- without a connection --------------------------------------------------------------------


def test_complete_cache_needs_no_server(
    hub: StandInHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = resolve(ID)
    hub.close()
    with caplog.at_level(logging.WARNING):
        assert resolve(ID) == folder
    assert "using the copy" in caplog.text
    assert headers_only(ID, tmp_path) == folder


def test_offline_mode_asks_nobody(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(ID)
    hub.forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(ID) == folder
    with pytest.raises(CheckpointNotFoundError, match=r"no connection.*offline mode is enabled"):
        resolve("someone/else")
    assert not hub.requests


@pytest.mark.usefixtures("impatient")
def test_incomplete_cache_is_not_taken_for_the_model(hub: StandInHub, original: Path) -> None:
    hub.cuts[shards(original)[-1].name] = [10_000, 0]
    with pytest.raises(CheckpointNotFoundError):
        resolve(ID)
    hub.close()
    with pytest.raises(CheckpointNotFoundError, match="no complete earlier download"):
        resolve(ID)


# ---- refusals --------------------------------------------------------------------------------

Get = Callable[[str], Path]


@pytest.fixture(params=["resolve", "headers_only"])
def get(request: pytest.FixtureRequest, tmp_path: Path) -> Get:
    return resolve if request.param == "resolve" else lambda name: headers_only(name, tmp_path)


@pytest.mark.parametrize("logged_in", [True, False])
def test_unknown_id(hub: StandInHub, get: Get, logged_in: bool) -> None:
    hub.anonymous_404 = logged_in
    with pytest.raises(CheckpointNotFoundError, match=r"someone/else: neither.*check the spelling"):
        get("someone/else")


def test_impossible_id(hub: StandInHub, get: Get) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"neither a folder here nor a possible hub"):
        get("someone/el--se")


@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub: StandInHub, get: Get, status: int) -> None:
    hub.gated[ID] = status
    with pytest.raises(CheckpointNotFoundError, match=r"is gated; accept its terms.*HF_TOKEN"):
        get(ID)


def test_unknown_revision(hub: StandInHub, get: Get) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"tiny-moe@v9: .*not this revision"):
        get(ID + "@v9")


def test_no_connection(hub: StandInHub, get: Get) -> None:
    hub.close()
    with pytest.raises(CheckpointNotFoundError, match=r"no connection to the hub.*run again"):
        get(ID)


def test_disk_too_small(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    one_mib = SimpleNamespace(total=1024**2, used=0, free=1024**2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: one_mib)
    with pytest.raises(DiskSpaceError, match=r"needs 3\.\d\d MiB, got 1\.00 MiB free.*HF_HOME"):
        resolve(ID)
    assert not hub.asked(".safetensors")


def test_no_safetensors(hub: StandInHub, get: Get, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    hub.publish("someone/pickled", folder)
    with pytest.raises(CheckpointNotFoundError, match=r"got no \*\.safetensors file"):
        get("someone/pickled")


def test_index_of_files_that_are_not_there(hub: StandInHub, get: Get, tmp_path: Path) -> None:
    folder = tmp_path / "lying"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../../x.safetensors"}}))
    hub.publish("someone/lying", folder)
    with pytest.raises(CorruptCheckpointError, match=r"1 of the 1 files.*\.\./\.\./x"):
        get("someone/lying")


# ---- headers alone ---------------------------------------------------------------------------


def test_headers_only(hub: StandInHub, original: Path, tmp_path: Path) -> None:
    assert headers_only(ID, tmp_path) == tmp_path
    here, there = SafetensorsCheckpoint(tmp_path), SafetensorsCheckpoint(original)
    assert here.tensors == there.tensors
    assert here.fingerprint == there.fingerprint
    assert examine(here, None).specs == examine(there, None).specs
    headers = sum(8 + struct.unpack("<Q", f.read_bytes()[:8])[0] for f in shards(original))
    assert hub.body_bytes(".safetensors") == headers < 32 * 1024
    assert sum(file.stat().st_blocks * 512 for file in shards(tmp_path)) < 64 * 1024
    here.close()
    there.close()


def test_headers_only_of_one_file(hub: StandInHub, tmp_path: Path) -> None:
    hub.publish("someone/bundled", bundled_model_path())
    folder = headers_only("someone/bundled", tmp_path)
    checkpoint = SafetensorsCheckpoint(folder)
    size = (bundled_model_path() / "model.safetensors").stat().st_size
    assert checkpoint.files[0].stat().st_size == size
    assert hub.body_bytes(".safetensors") < size / 100
    checkpoint.close()


def test_headers_only_where_ranges_are_ignored(hub: StandInHub, tmp_path: Path) -> None:
    """Reading stops after the header; what the sockets' buffers swallowed does not matter."""
    folder = tmp_path / "large"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", 64 * 1024**2)
    hub.publish("someone/large", folder)
    hub.ignores_ranges = True
    (tmp_path / "headers").mkdir()
    checkpoint = SafetensorsCheckpoint(headers_only("someone/large", tmp_path / "headers"))
    assert checkpoint.tensors["x"].num_bytes == 64 * 1024**2
    checkpoint.close()
    hub.close()
    assert 0 < hub.body_bytes(".safetensors") < 32 * 1024**2


@pytest.mark.parametrize("claim", [2**63, 50_000, 0])
def test_headers_only_of_a_bad_header(hub: StandInHub, tmp_path: Path, claim: int) -> None:
    """The reader of headers complains as it does about a file on disk; nothing else is fetched."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", claim) + bytes(40_000))
    hub.publish("someone/bad", folder)
    (tmp_path / "headers").mkdir()
    with pytest.raises(CorruptCheckpointError, match="got a header of"):
        SafetensorsCheckpoint(headers_only("someone/bad", tmp_path / "headers"))
    assert hub.body_bytes(".safetensors") == 8
