"""Headers that lie get a named error, and tensors are read as the format's own library does."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from moe_infinity.checkpoint import safetensors
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES, DirectFile
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint, read_header
from moe_infinity.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
)

INDEX = "model.safetensors.index.json"
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def packed(header: Any, data: bytes = bytes(32), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def changed(**values: Any) -> dict[str, Any]:
    return {**GOOD, "b": {**GOOD["b"], **values}}


def refused(tmp_path: Path, content: bytes) -> str:
    """The message of the error that reading this file must raise, in little memory."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError) as caught:
            read_header(path, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1024**2 + 50 * len(content)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(path))
    return str(caught.value)


def folder(path: Path, shards: dict[str, Any], index: Any = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    if index is not None:
        text = index if isinstance(index, str) else json.dumps(index)
        (path / INDEX).write_text(text)
    return path


def read(checkpoint: SafetensorsCheckpoint, name: str) -> bytes:
    entry = checkpoint.tensors[name]
    out = bytearray(entry.num_bytes)
    checkpoint.read_tensor(entry, memoryview(out))
    return bytes(out)


def test_a_good_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({"__metadata__": {"format": "pt"}, **GOOD}))
    first, second = read_header(path, 7)
    assert (first.name, first.format, first.shape, first.file) == ("a", "F32", (2, 3), 7)
    assert (second.offset - first.offset, second.num_bytes) == (24, 8)
    assert first.offset + 32 == path.stat().st_size


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = packed(GOOD)
    for length in range(len(whole)):
        refused(tmp_path, whole[:length])


@pytest.mark.parametrize(
    "values",
    [
        {"data_offsets": [24, 33], "shape": [9], "dtype": "I8"},  # behind the end of the file
        {"data_offsets": [2**40, 2**40 + 8]},
        {"data_offsets": [2**70, 2**70 + 8]},
        {"data_offsets": [32, 24]},
        {"data_offsets": [32, 24], "dtype": "F4_NEW"},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [20, 28]},  # overlaps a
        {"data_offsets": [0, 8]},
        {"data_offsets": [24, 30]},  # too few bytes for the shape
        {"data_offsets": [24.0, 32.0]},
        {"data_offsets": [True, 32]},
        {"data_offsets": ["24", "32"]},
        {"data_offsets": [24]},
        {"data_offsets": [24, 32, 40]},
        {"data_offsets": None},
        {"data_offsets": {"24": 1, "32": 2}},
        {"shape": [5]},
        {"shape": [-4]},
        {"shape": [2, -2, -1]},
        {"shape": [2**62, 2**62]},
        {"shape": [2**64]},
        {"shape": [4.0]},
        {"shape": [True, 4]},
        {"shape": ["4"]},
        {"shape": "4"},
        {"shape": ""},
        {"shape": {}},
        {"shape": 4},
        {"shape": [[4]]},
        {"shape": None},
        {"shape": [1] * 100 + [4]},
        {"dtype": "F64"},
        {"dtype": 7},
        {"dtype": None},
        {"dtype": ["BF16"]},
    ],
    ids=str,
)
def test_a_header_that_lies(tmp_path: Path, values: dict[str, Any]) -> None:
    assert "'b'" in refused(tmp_path, packed(changed(**values)))


@pytest.mark.parametrize("info", [None, 1, "text", [], [1, 2, 3], {}, {"dtype": "BF16"}], ids=str)
def test_a_description_that_is_none(tmp_path: Path, info: Any) -> None:
    assert "'b'" in refused(tmp_path, packed({**GOOD, "b": info}))


@pytest.mark.parametrize(
    "raw",
    [
        b"{not json}",
        b"\xff\xfe\x00\x01 not text",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"[]",
        b'["a"]',
        b"null",
        b"42",
        b'"text"',
        b"{} {}",
        b"  ",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_not_a_table(tmp_path: Path, raw: bytes) -> None:
    refused(tmp_path, packed(raw))


@pytest.mark.parametrize("length", [0, 1, 10**6, 10**8, 10**9, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(tmp_path: Path, length: int) -> None:
    assert str(length) in refused(tmp_path, packed(GOOD, length=length))


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**31 + 100)  # sparse: takes no disk
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match=f"{path}: got a header of {2**31}"):
            read_header(path, 0)
        assert tracemalloc.get_traced_memory()[1] < 1024**2
    finally:
        tracemalloc.stop()


def test_an_unknown_format_is_no_lie(tmp_path: Path) -> None:
    """What to do about it is decided by who needs the tensor."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(changed(dtype="F4_NEW")))
    assert read_header(path, 0)[1].format == "F4_NEW"


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointNotFoundError, match=str(path)):
            read_header(path, 0)


@settings(max_examples=400)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["set", "delete", "insert"]),
            st.integers(0, 10**6),
            st.binary(max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_headers(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int, bytes]]
) -> None:
    """Whatever is spoilt: a named error, or entries that lie inside the file and apart."""
    content = bytearray(packed(GOOD))
    for kind, where, value in changes:
        start = where % (len(content) + 1)
        end = {"set": start + len(value), "delete": start + 1, "insert": start}[kind]
        content[start:end] = b"" if kind == "delete" else value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        entries = read_header(path, 0)
    except CorruptCheckpointError as error:
        assert str(path) in str(error)
        return
    end = 8
    for entry in sorted((e for e in entries if e.num_bytes), key=lambda e: e.offset):
        assert entry.offset >= end
        end = entry.offset + entry.num_bytes
    assert end <= len(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON) | JSON)
def test_any_json_for_a_header(tmp_path_factory: pytest.TempPathFactory, header: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "json.safetensors"
    path.write_bytes(packed(header))
    try:
        read_header(path, 0)
    except CorruptCheckpointError as error:
        assert str(path) in str(error)


# ---- folders


X = {"x": torch.arange(4.0)}
Y = {"y": torch.arange(3.0)}


def test_one_file_wins_over_others(tmp_path: Path) -> None:
    path = folder(tmp_path, {"model.safetensors": X, "consolidated.safetensors": X})
    checkpoint = SafetensorsCheckpoint(path)
    assert [f.name for f in checkpoint.files] == ["model.safetensors"]
    checkpoint.close()


def test_an_index_names_the_files(tmp_path: Path) -> None:
    shards = {"b.safetensors": X, "a.safetensors": Y, "other.safetensors": X}
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}
    checkpoint = SafetensorsCheckpoint(folder(tmp_path, shards, index))
    assert [f.name for f in checkpoint.files] == ["a.safetensors", "b.safetensors"]
    assert checkpoint.tensors["x"].file == 1
    checkpoint.close()


@pytest.mark.parametrize(
    ("shards", "index", "message"),
    [
        ({"a.safetensors": X, "b.safetensors": X}, None, "b.safetensors: tensor 'x' is also in a"),
        ({"a.safetensors": X}, {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}, "b."),
        ({"a.safetensors": X}, {"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}, "'y'"),
        ({"a.safetensors": X}, {"weight_map": {"x": "\0"}}, "1 of 1 shards are missing"),
        ({"a.safetensors": X}, {"metadata": {}}, INDEX),
        ({"a.safetensors": X}, {"weight_map": {}}, INDEX),
        ({"a.safetensors": X}, {"weight_map": None}, INDEX),
        ({"a.safetensors": X}, {"weight_map": ["a.safetensors"]}, INDEX),
        ({"a.safetensors": X}, {"weight_map": {"x": 1}}, INDEX),
        ({"a.safetensors": X}, {"weight_map": {"x": 1, "y": "a.safetensors"}}, INDEX),
        ({"a.safetensors": X}, {"weight_map": {"x": ["a.safetensors"]}}, INDEX),
        ({"a.safetensors": X}, "[]", INDEX),
        ({"a.safetensors": X}, "not json", INDEX),
        ({"a.safetensors": X}, "[" * 200_000, INDEX),
        ({"a.safetensors": X}, "", INDEX),
    ],
)
def test_folders_that_contradict_themselves(
    tmp_path: Path, shards: dict[str, Any], index: Any, message: str
) -> None:
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        SafetensorsCheckpoint(folder(tmp_path, shards, index))
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointNotFoundError, match=str(path)):
            SafetensorsCheckpoint(path)


# ---- reading


def many_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = (0, 1, 3, 1000, 4095, 4096, 4097, 8192, 3 * 8192 + 5, 70_000)
    found = {f"u8_{n}": torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes}
    found |= {f"f32_{n}": torch.randn(n, 2) for n in (0, 1, 5000)}
    return {**found, "bf16": torch.randn(33, 7).bfloat16(), "scalar": torch.tensor(3.0)}


@pytest.mark.parametrize("scratch_bytes", [ALIGNMENT_BYTES, 2 * ALIGNMENT_BYTES, 8 * 1024**2])
def test_read_tensor_as_the_library_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch_bytes: int
) -> None:
    real_read = DirectFile.read_into

    def read_on_the_grid(file: DirectFile, buffer: memoryview, offset: int, needed: int) -> None:
        """What direct I/O would refuse must not pass because buffered reading takes over."""
        assert offset % ALIGNMENT_BYTES == len(buffer) % ALIGNMENT_BYTES == 0
        real_read(file, buffer, offset, needed)

    monkeypatch.setattr(DirectFile, "read_into", read_on_the_grid)
    monkeypatch.setattr(safetensors, "_SCRATCH_BYTES", scratch_bytes)
    path = folder(tmp_path, {"model.safetensors": many_tensors()})
    checkpoint = SafetensorsCheckpoint(path)
    with safe_open(path / "model.safetensors", "pt") as real:
        assert set(real.keys()) == set(checkpoint.tensors)
        for name, entry in checkpoint.tensors.items():
            expected = real.get_tensor(name)
            assert entry.shape == tuple(expected.shape)
            raw = expected.flatten().view(torch.uint8).numpy().tobytes()
            assert read(checkpoint, name) == raw, name
    checkpoint.close()
    checkpoint.close()


def test_read_tensor_of_a_changed_file(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(folder(tmp_path, {"model.safetensors": X}))
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointChangedError, match=r"model\.safetensors"):
        read(checkpoint, "x")
    checkpoint.close()


def rename(path: Path) -> None:
    save_file({"z": X["x"]}, path / "model.safetensors")


def reshape(path: Path) -> None:
    save_file({"x": X["x"].reshape(2, 2)}, path / "model.safetensors")


def configure(path: Path) -> None:
    (path / "config.json").write_text('{"changed": 1}')


def add(path: Path) -> None:
    save_file({**X, **Y}, path / "model.safetensors")


def test_the_fingerprint_stays(tmp_path: Path) -> None:
    assert fingerprint(folder(tmp_path / "a", {"model.safetensors": X})) == fingerprint(
        folder(tmp_path / "b", {"model.safetensors": X})
    )


@pytest.mark.parametrize("change", [rename, reshape, configure, add])
def test_the_fingerprint_changes(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = folder(tmp_path, {"model.safetensors": X})
    before = fingerprint(path)
    change(path)
    assert fingerprint(path) != before


def test_the_fingerprint_without_a_config(tmp_path: Path) -> None:
    path = folder(tmp_path, {"model.safetensors": X})
    (path / "config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        fingerprint(path)


def fingerprint(path: Path) -> str:
    checkpoint = SafetensorsCheckpoint(path)
    try:
        return checkpoint.fingerprint
    finally:
        checkpoint.close()
