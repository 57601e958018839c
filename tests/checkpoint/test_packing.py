"""Packed folders: the same weights, whole or not there, and no flipped byte goes unnoticed."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import MoE, bundled_model_path
from moe_infinity.assembly import open_checkpoint
from moe_infinity.checkpoint import journal, packing
from moe_infinity.checkpoint.direct_io import allocate
from moe_infinity.checkpoint.pack_format import DENSE, EXPERTS, HEADER, Pack
from moe_infinity.checkpoint.packed import PackedCheckpoint
from moe_infinity.checkpoint.packing import pack
from moe_infinity.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    DiskSpaceError,
    UnsupportedModelError,
)
from moe_infinity.kernels.formats import part_views
from moe_infinity.kernels.reference import plain
from moe_infinity.model.loading import examine
from moe_infinity.preparation import opened_source, packing_job
from moe_infinity.types import ExpertKey
from support.checkpoints import bundled_copy, bundled_part, tiny_checkpoint, weights
from support.command_line import Process, refused, run

FORMATS = ("bf16", "int8", "int4", "exact12")
IDS = torch.arange(5, 45)[None]


def packed(source: Path, target: Path, experts: str = "exact12", on_bytes: Any = None) -> Path:
    with opened_source(source) as opened:
        pack(packing_job(opened, target, experts), on_bytes or (lambda _: None))
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, packed in every form."""
    folder = tmp_path_factory.mktemp("packed")
    return {name: packed(bundled_model_path(), folder / name, name) for name in FORMATS}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Less of it, to be packed again and again."""
    return bundled_part(tmp_path_factory.mktemp("source") / "part")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, bytes]:
    """What comes of that."""
    return contents(packed(source, tmp_path_factory.mktemp("expected") / "out"))


def logits(path: Path, **options: Any) -> torch.Tensor:
    with MoE(path, ram="8GiB", **options) as moe:
        found: torch.Tensor = moe(IDS).logits
        assert moe.stats().bit_exact is (not moe.checkpoint.lossy)
        return found


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("experts", ["bf16", "exact12"])
def test_lossless_forms_give_the_same_bits(
    folders: dict[str, Path], experts: str, kernel: str
) -> None:
    expected = logits(bundled_model_path(), kernel=kernel)
    assert torch.equal(logits(folders[experts], kernel=kernel, ram_slots=40), expected)


@pytest.mark.parametrize(("experts", "agreement"), [("int8", 0.9), ("int4", 0.6)])
def test_lossy_forms_stay_close_and_say_so(
    folders: dict[str, Path], experts: str, agreement: float
) -> None:
    exact = logits(bundled_model_path()).argmax(dim=-1)
    for kernel in ("auto", "torch"):
        found = logits(folders[experts], kernel=kernel).argmax(dim=-1)
        assert (found == exact).float().mean() >= agreement
    with MoE(folders[experts], ram="8GiB") as moe:
        moe.generate(IDS, max_new_tokens=2)
        assert moe.stats().lossy == (f"experts {experts}",)


def matrices(path: Path) -> dict[tuple[ExpertKey, str], torch.Tensor]:
    """Every expert tensor of a checkpoint, as the model sees it."""
    checkpoint = open_checkpoint(path)
    specs = examine(checkpoint, None).specs
    store = checkpoint.expert_store(specs)
    found = {}
    for key, spec in specs.items():
        slot = memoryview(allocate(spec.slot_bytes))
        for chunk in store.chunks(key, 2**20):
            store.read_into(key, slot[chunk.slot_offset :][: chunk.num_bytes], chunk)
        for name, blocks in part_views(spec, torch.frombuffer(slot, dtype=torch.uint8)).items():
            found[key, name] = torch.cat([plain(block) for block in blocks])
    checkpoint.close()
    return found


def test_exact12_holds_every_bit_of_every_matrix(folders: dict[str, Path]) -> None:
    source, found = matrices(bundled_model_path()), matrices(folders["exact12"])
    assert source.keys() == found.keys() and len(source) == 512
    for name, matrix in source.items():
        assert torch.equal(matrix.view(torch.int16), found[name].view(torch.int16))
    formats = {p["format"] for e in Pack.read(folders["exact12"]).experts for p in e.parts}
    assert formats == {"EXACT12"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class _Interrupted(Exception):
    pass


def stop_after(num_bytes: float) -> Any:
    left = [num_bytes]

    def stop(done: int) -> None:
        left[0] -= done
        if left[0] < 0:
            raise _Interrupted

    return stop


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.98])
def test_an_interrupted_job_goes_on(
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "out"
    with pytest.raises(_Interrupted):
        packed(source, target, on_bytes=stop_after(share * weights(source).stat().st_size))
    assert not target.exists()
    coded = []
    real = packing.coded_expert
    monkeypatch.setattr(packing, "coded_expert", lambda *a: coded.append(a[2]) or real(*a))
    packed(source, target)
    assert len(coded) < 64 * (1.02 - share)
    assert contents(target) == expected
    assert not target.with_name("out.partial").exists()


def test_a_torn_journal_counts_as_far_as_it_is_sound(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    with pytest.raises(_Interrupted):
        packed(source, target, on_bytes=stop_after(3e6))
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    with open(tmp_path / "out.partial" / EXPERTS, "ab") as file:
        file.write(b"half an expert")
    assert contents(packed(source, target)) == expected


def test_a_journal_of_another_job_is_not_gone_on_with(
    folders: dict[str, Path], source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    partial = tmp_path / "out.partial"
    shutil.copytree(folders["int8"], partial)
    (partial / "journal.jsonl").write_bytes(journal.line_of({"version": 1, "source": "other"}))
    found = contents(packed(source, tmp_path / "out"))
    assert found[EXPERTS] == expected[EXPERTS]


def test_what_the_file_lost_is_packed_again(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A sound journal beside a file that is shorter than it says."""
    target = tmp_path / "out"
    with pytest.raises(_Interrupted):
        packed(source, target, on_bytes=stop_after(4e6))
    os.truncate(tmp_path / "out.partial" / EXPERTS, 1_000_000)
    assert contents(packed(source, target)) == expected


def test_nothing_of_an_earlier_attempt_is_left(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(_Interrupted):
        packed(source, target, on_bytes=stop_after(4e6))
    (partial / "added_tokens.json").write_text("{}")
    assert contents(packed(source, target)) == expected


def test_only_the_renaming_is_left(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders["exact12"], tmp_path / "out.partial")
    monkeypatch.setattr(packing, "coded_expert", lambda *_: pytest.fail("packed again"))
    assert contents(packed(bundled_model_path(), tmp_path / "out")) == contents(folders["exact12"])


def test_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with (
        journal.only_one_in(tmp_path / "out.partial"),
        pytest.raises(ConfigError, match="another process"),
    ):
        packed(bundled_model_path(), tmp_path / "out")


def killed_once(target: Path, after_s: float) -> bool:
    """Pack in a process of its own and kill it; whether it was still at work."""
    files = {"stdin": os.devnull, "stdout": os.devnull, "stderr": os.devnull}
    process = Process(("pack", bundled_model_path(), target), **files)
    deadline = time.monotonic() + 60
    partial = target.with_name(target.name + ".partial")
    while not (partial.exists() or target.exists()) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(after_s)
    process.kill()
    code, _ = process.wait()
    return code == -signal.SIGKILL


def test_killed_and_resumed(folders: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert killed_once(target, 0.05)
    assert not target.exists()
    assert contents(packed(bundled_model_path(), target)) == contents(folders["exact12"])


@pytest.mark.slow
def test_killed_at_twenty_moments(folders: dict[str, Path], tmp_path: Path) -> None:
    moments = random.Random(0)
    for number in range(20):
        target = tmp_path / f"out{number}"
        killed_once(target, moments.uniform(0, 1.2))
        if not target.exists():
            packed(bundled_model_path(), target)
        assert contents(target) == contents(folders["exact12"])
        shutil.rmtree(target)


def check(folder: Path) -> None:
    checkpoint = PackedCheckpoint(folder)
    try:
        checkpoint.verify()
    finally:
        checkpoint.close()


def flip(path: Path, offset: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def find_flips(folder: Path, number: int) -> None:
    """Random single bits of all files, one after the other; each is put back."""
    files = sorted(folder.iterdir())
    sizes = [path.stat().st_size for path in files]
    draw = random.Random(number)
    check(folder)
    for _ in range(number):
        # Half of them anywhere, half in a file drawn first: small files would not be met else.
        path = draw.choice(files) if draw.random() < 0.5 else draw.choices(files, sizes)[0]
        offset, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flip(path, offset, bit)
        with pytest.raises(CheckpointError):
            check(folder)
        flip(path, offset, bit)
    check(folder)


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    """In a small folder with everything in it, for each time all of it is checked."""
    source, sizes = tmp_path / "source", {"hidden_size": 64, "moe_intermediate_size": 32}
    tiny_checkpoint(source, torch.bfloat16, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundled_model_path() / name, source)
    find_flips(packed(source, tmp_path / "packed", "int4"), 60)


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_found(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["exact12"], folder)
    find_flips(folder, 1000)


def test_a_damaged_expert_is_named_before_it_is_used(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["exact12"], folder)
    hurt = Pack.read(folder).experts[37]
    flip(folder / EXPERTS, hurt.offset + 5000, 3)
    message = f"layer {hurt.layer} expert {hurt.expert}.*checksum"
    with MoE(folder, ram="8GiB") as moe, pytest.raises(CorruptCheckpointError, match=message):
        moe(torch.arange(1, 400)[None])
    assert "checksum" in refused("run", folder, "Hi", "--max-new-tokens", 2, "--verify")


def test_damaged_dense_weights_are_found_when_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["exact12"], folder)
    flip(folder / DENSE, (folder / DENSE).stat().st_size - 1000, 0)
    with pytest.raises(CorruptCheckpointError, match=r"tensor .* checksum"):
        MoE(folder, ram="8GiB")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_small_files_are_those_that_were_packed(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["bf16"], folder)
    (folder / name).write_text((folder / name).read_text() + " ")
    with pytest.raises(CorruptCheckpointError, match=name):
        MoE(folder, ram="8GiB")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        MoE(folder, ram="8GiB")


def test_an_incomplete_or_later_folder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["bf16"], folder)
    with open(folder / EXPERTS, "r+b") as file:
        file.truncate(10**6)
    with pytest.raises(CorruptCheckpointError, match="incomplete"):
        MoE(folder, ram="8GiB")
    header = Pack.read(folder)
    later = Pack(**{**header.__dict__, "version": 99})
    (folder / HEADER).write_bytes(later.to_bytes())
    with pytest.raises(CorruptCheckpointError, match="version 99"):
        MoE(folder, ram="8GiB")


class TestTrouble:
    def test_a_full_disk_is_seen_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=10**7)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DiskSpaceError, match=r"0\.0 GB free"):
            packed(bundled_model_path(), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_disk_that_fills_up(
        self,
        source: Path,
        expected: dict[str, bytes],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        left, real = [100], os.fsync

        def fsync(fd: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskSpaceError, match=r"No space left.*goes on"):
            packed(source, tmp_path / "out")
        left[0] = 10**9
        assert contents(packed(source, tmp_path / "out")) == expected

    def test_a_source_that_is_cut_off_in_between(self, tmp_path: Path) -> None:
        source = bundled_copy(tmp_path / "source")
        left = [8e6]

        def cut(num_bytes: int) -> None:
            left[0] -= num_bytes
            if left[0] < 0:
                os.truncate(weights(source), 1000)

        with pytest.raises(CheckpointError, match=weights(source).name):
            packed(source, tmp_path / "out", on_bytes=cut)
        assert not (tmp_path / "out").exists()

    def test_columns_that_are_not_divisible(self, tmp_path: Path) -> None:
        source = tiny_checkpoint(
            tmp_path / "tiny", hidden_size=48, moe_intermediate_size=24, dtype=torch.bfloat16
        )
        with pytest.raises(UnsupportedModelError, match="divisible by 32"):
            packed(source, tmp_path / "out", "int4")
        packed(source, tmp_path / "exact", "exact12")

    def test_exact12_wants_bf16(self, tmp_path: Path) -> None:
        source = tiny_checkpoint(tmp_path / "tiny")  # float32
        with pytest.raises(UnsupportedModelError, match="expected BF16"):
            packed(source, tmp_path / "out", "exact12")

    def test_packed_folders_are_not_packed_again(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        with pytest.raises(UnsupportedModelError, match="packed already"):
            packed(folders["int8"], tmp_path / "out")

    def test_targets_that_exist_or_cannot(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(ConfigError, match="exists already"):
            packed(bundled_model_path(), tmp_path / "out")
        (tmp_path / "out" / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match="is OUT missing"):
            packed(bundled_model_path(), tmp_path / "out")
        with pytest.raises(ConfigError, match="no such folder"):
            packed(bundled_model_path(), tmp_path / "none" / "out")


def test_command_line(tmp_path: Path) -> None:
    result = run("pack", tmp_path / "out", "--experts", "int8", "--json")
    assert result.code == 0, result.both
    facts = json.loads(result.out)
    assert facts["experts"] == "int8" and facts["bytes"] > 10**7
    assert "note:" not in result.err
    answer = run("run", tmp_path / "out", "Hi", "--max-new-tokens", 3, "--verify", "--json")
    assert answer.code == 0, answer.both
    assert json.loads(answer.out)["lossy"] == ["experts int8"]
    assert "one of bf16, int8" in refused("pack", tmp_path / "new", "--experts", "int3")
    assert "packed folder" in refused("run", "Hi", "--max-new-tokens", 1, "--verify")


def test_who_packs_to_something_larger_is_told_before(tmp_path: Path) -> None:
    """Rows of 96 and 192 in units of 128 weights."""
    result = run("pack", tmp_path / "out", "--experts", "exact12")
    assert result.code == 0, result.both
    assert "more than the" in result.err and "bundled runs as it is" in result.err
    assert "note:" not in refused("pack", tmp_path / "out", "--experts", "exact12")
