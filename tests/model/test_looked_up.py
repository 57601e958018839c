"""An embedding that stays on disk: the same rows, and the same logits, from every kind of file."""

import contextlib
import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from moe_infinity import MoE, bundled_model_path, needs, planning
from moe_infinity.assembly import open_checkpoint
from moe_infinity.checkpoint.base import Checkpoint
from moe_infinity.checkpoint.packing import pack
from moe_infinity.config import EngineConfig
from moe_infinity.errors import CheckpointChangedError, CorruptCheckpointError, ReadError
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import PACKED, row_bytes
from moe_infinity.kernels.planes import PLANES
from moe_infinity.model import looked_up
from moe_infinity.model.loading import Anatomy, examine
from moe_infinity.model.looked_up import LookedUp, Rows, find_looked_up, is_only_looked_up
from moe_infinity.planning import make_plan
from moe_infinity.preparation import opened_source, packing_job
from support.gguf_files import Kind, small_model, write_gguf

NUM_IDS, NUM_COLS, NUM_KEPT = 4096, 192, 16  # of the bundled model
IDS = torch.arange(3, 150)[None] * 7 % 200


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have tiny embeddings; few of their rows are kept, and plans have no slack."""
    monkeypatch.setattr(planning, "_WORTH_LOOKING_UP_BYTES", 1)
    monkeypatch.setattr(looked_up, "_KEPT_BYTES", NUM_KEPT * NUM_COLS * 2)
    monkeypatch.setattr(looked_up, "_THREAD_BYTES", 0)
    monkeypatch.setattr(needs, "resident_bytes", lambda: 2**29)  # in every plan


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, its output a matrix of its own: as its embedding, rows in reverse."""
    path = tmp_path_factory.mktemp("untied")
    model = bundled_untied()
    model.save_pretrained(path)
    return path


def bundled_untied() -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        bundled_model_path(), dtype=torch.bfloat16
    )
    model.config.tie_word_embeddings = False
    rows = model.get_input_embeddings().weight.detach().flip(0)
    model.lm_head.weight = nn.Parameter(rows.clone(), requires_grad=False)
    return model


@contextlib.contextmanager
def opened(path: Path, dtype: str | None = None) -> Iterator[tuple[Checkpoint, Anatomy]]:
    with contextlib.closing(open_checkpoint(path)) as checkpoint:
        yield checkpoint, examine(checkpoint, dtype)


def packed(source: Path, to: Path, experts: str, dense: str) -> None:
    with opened_source(source) as checkpoint:
        pack(packing_job(checkpoint, to, experts, dense))


def tight(path: Path) -> int:
    """A budget within which some of its experts have to stay on disk."""
    with opened(path) as (_, anatomy):
        return make_plan(anatomy, EngineConfig(ram="8GiB", max_context=256)).smallest_budget_bytes


class TestRows:
    @pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
    def test_they_are_those_of_the_whole(self, kind: str, tmp_path: Path) -> None:
        size = 256 if kind.endswith("_K") else 64
        write_gguf(small_model("qwen3_moe", size), tmp_path / "tiny.gguf", Kind[kind])
        with opened(tmp_path / "tiny.gguf", "bfloat16") as (checkpoint, anatomy):
            embedding = anatomy.looked_up
            assert embedding is not None and embedding.entry.format == kind
            rows = Rows(checkpoint, embedding, torch.bfloat16)
            with MoE(tmp_path / "tiny.gguf", dtype="bfloat16", ram="8GiB") as moe:
                assert not moe.plan.looks_up, "everything fits"
                whole = moe.model.get_input_embeddings()
                shapes = [(1, 1), (1, 40), (3, 5), (2, 0)]
                for seed, shape in enumerate(shapes * 3):
                    generator = torch.Generator().manual_seed(seed)
                    ids = torch.randint(0, 96, shape, generator=generator)
                    assert torch.equal(rows.of(ids), whole(ids))

    def test_those_kept_are_not_read_again(
        self, untied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(untied) as (checkpoint, anatomy):
            assert anatomy.looked_up is not None
            read: list[int] = []
            real = type(checkpoint).read_part

            def counting(self: Checkpoint, entry: object, start: int, into: memoryview) -> None:
                read.append(start // len(into))
                real(self, entry, start, into)  # type: ignore[arg-type]

            monkeypatch.setattr(type(checkpoint), "read_part", counting)
            rows = Rows(checkpoint, anatomy.looked_up, torch.bfloat16)
            rows.of(torch.arange(NUM_KEPT)[None])
            rows.of(torch.tensor([[0]]))  # the latest now
            assert sorted(read) == list(range(NUM_KEPT))
            rows.of(torch.tensor([[90]]))  # in the place of 1
            read.clear()
            rows.of(torch.tensor([[0, 90, 2]]))
            assert read == []
            rows.of(torch.tensor([[1]]))
            assert read == [1]

    def test_of_many_those_at_the_end_are_kept(
        self, untied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(looked_up, "_DECODED_AT_ONCE", 7 * NUM_COLS)
        generator = torch.Generator().manual_seed(0)
        text = torch.randperm(NUM_IDS, generator=generator)[:100]
        text = torch.cat([text, text[:3], text[:50].flip(0)[40:]]).to(torch.int32)
        with opened(untied) as (checkpoint, anatomy):
            assert anatomy.looked_up is not None
            rows = Rows(checkpoint, anatomy.looked_up, torch.bfloat16)
            found = rows.of(text[None])
            alone = [rows.of(text[i : i + 1]) for i in range(len(text))]
            assert torch.equal(found[0], torch.cat(alone))
            rows.of(text[None])
            at_the_end = list(dict.fromkeys(text.flip(0).tolist()))[:NUM_KEPT]
            monkeypatch.setattr(type(checkpoint), "read_part", None)  # nothing is read
            for row in at_the_end:
                rows.of(torch.tensor(row))

    @pytest.mark.parametrize("ids", [[[5, -1]], [[5, NUM_IDS]], [[-1]], [[NUM_IDS]]])
    def test_no_such_row(self, untied: Path, ids: list[list[int]]) -> None:
        with opened(untied) as (checkpoint, anatomy):
            assert anatomy.looked_up is not None
            wrong = f"got {ids[0][-1]}, expected 0 to {NUM_IDS - 1}"
            with pytest.raises(IndexError, match=wrong):
                Rows(checkpoint, anatomy.looked_up, torch.bfloat16).of(torch.tensor(ids))

    def test_a_failing_read_leaves_nothing_behind(
        self, untied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(untied) as (checkpoint, anatomy):
            assert anatomy.looked_up is not None
            rows = Rows(checkpoint, anatomy.looked_up, torch.bfloat16)
            expected = rows.of(torch.arange(50)).clone()
            rows = Rows(checkpoint, anatomy.looked_up, torch.bfloat16)
            with monkeypatch.context() as patch:

                def failing(self: Checkpoint, entry: object, start: int, into: object) -> None:
                    raise ReadError("no disk")

                patch.setattr(type(checkpoint), "read_part", failing)
                for ids in (torch.arange(3), torch.arange(50)):
                    with pytest.raises(ReadError, match="no disk"):
                        rows.of(ids)
            assert torch.equal(rows.of(torch.arange(50)), expected)

    def test_every_format_that_has_rows_is_taken(self, untied: Path) -> None:
        with opened(untied) as (_, anatomy):
            assert anatomy.looked_up is not None
            sizes = {name: NUM_COLS * each.itemsize for name, each in DTYPES.items()}
            sizes |= {name: row_bytes(name, NUM_COLS) for name in PACKED}
            for number_format, size in sizes.items():
                for num_bytes in (NUM_IDS * size, NUM_IDS * size - 1):
                    entry = dataclasses.replace(
                        anatomy.looked_up.entry, format=number_format, num_bytes=num_bytes
                    )
                    dense = [entry if e.name == entry.name else e for e in anatomy.dense]
                    found = find_looked_up(anatomy.meta, _same_names, dense)
                    has_rows = number_format not in (*PLANES, "EXACT12")
                    assert (found is not None) == (has_rows and num_bytes == NUM_IDS * size)


class TestModels:
    def logits(self, path: Path, **options: object) -> tuple[torch.Tensor, list[int], bool]:
        with MoE(path, max_context=256, **options) as moe, torch.no_grad():
            found = moe(IDS, logits_to_keep=40).logits.float()
            said = moe.generate(IDS, max_new_tokens=30, do_sample=False)[0].tolist()
            return found, said, moe.plan.looks_up

    @pytest.mark.parametrize("kind", ["safetensors", "packed", "gguf"])
    def test_the_same_bits(self, untied: Path, kind: str, tmp_path: Path) -> None:
        path = untied
        if kind == "packed":
            path = tmp_path / "packed"
            packed(untied, path, "int8", "int8")
        if kind == "gguf":
            path = tmp_path / "tiny.gguf"
            write_gguf(bundled_untied(), path, Kind.Q8_0)
        expected, text, looks_up = self.logits(path, ram="8GiB")
        assert not looks_up
        found, same_text, looks_up = self.logits(path, ram=tight(path))
        assert looks_up and torch.equal(found, expected) and same_text == text

    def test_plans_say_so_and_have_room_for_more(self, untied: Path) -> None:
        budget = tight(untied)
        with opened(untied) as (_, anatomy):
            config = EngineConfig(ram=budget, max_context=256)
            made = make_plan(anatomy, config)
            assert "looked up)" in made.arithmetic()
            whole = make_plan(dataclasses.replace(anatomy, looked_up=None), config)
            assert made.dense_bytes + made.looked_up_bytes == whole.dense_bytes
            assert made.num_slots > whole.num_slots
            with_all = make_plan(anatomy, EngineConfig(ram="8GiB", max_context=256))
            assert not with_all.looks_up
            assert with_all.smallest_budget_bytes == made.smallest_budget_bytes
            by_hand = make_plan(anatomy, EngineConfig(ram="8GiB", ram_slots=5))
            assert not by_hand.looks_up, "memory is not what is short"

    def test_a_changed_file_is_an_error_of_the_call(self, untied: Path, tmp_path: Path) -> None:
        path = tmp_path / "model"
        shutil.copytree(untied, path)
        with MoE(path, ram=tight(path), max_context=256) as moe:
            assert moe.plan.looks_up
            with (path / "model.safetensors").open("ab") as file:
                file.write(b"more")
            with pytest.raises(CheckpointChangedError):
                moe.generate(IDS, max_new_tokens=2)

    def test_a_flipped_byte_of_a_packed_one_is_found_at_opening(
        self, untied: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "packed"
        packed(untied, path, "int8", "bf16")
        with opened(path) as (_, anatomy):
            assert anatomy.looked_up is not None
            entry = anatomy.looked_up.entry
        budget = tight(path)
        with (path / "dense.safetensors").open("r+b") as file:
            file.seek(entry.offset + entry.num_bytes - 1)
            byte = file.read(1)[0]
            file.seek(entry.offset + entry.num_bytes - 1)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(CorruptCheckpointError, match="embed_tokens"):
            MoE(path, ram=budget, max_context=256)


class TestWhichModels:
    def test_a_tied_one_is_in_memory_for_its_output(self) -> None:
        with opened(bundled_model_path()) as (_, anatomy):
            assert anatomy.looked_up is None

    def test_what_computes_with_the_weight_itself_has_to_have_it(self, untied: Path) -> None:
        with opened(untied) as (_, anatomy):
            embedding, meta = anatomy.looked_up, anatomy.meta
            assert embedding is not None and is_only_looked_up(meta, embedding)
            table = meta.get_input_embeddings()
            attention = meta.model.layers[0].self_attn
            real = attention.forward

            for use in (lambda w: w[0], lambda w: w.T[:, 0], lambda w: w.data[0]):

                def reading(*args: object, use: Any = use, **kwargs: object) -> object:
                    out, *rest = real(*args, **kwargs)
                    return out + use(table.weight), *rest

                attention.forward = reading
                assert not is_only_looked_up(meta, embedding)

    @pytest.mark.parametrize("change", ["norm", "kind", "shared"])
    def test_unusual_tables(self, untied: Path, change: str) -> None:
        with opened(untied) as (_, anatomy):
            meta = anatomy.meta
            if change == "norm":
                meta.get_input_embeddings().max_norm = 1.0
            if change == "kind":
                meta.model.embed_tokens.__class__ = type("Scaled", (nn.Embedding,), {})
            if change == "shared":
                meta.model.another = nn.Embedding(1, 1, device="meta")
                meta.model.another.weight = meta.get_input_embeddings().weight
            assert find_looked_up(meta, _same_names, anatomy.dense) is None

    def test_encoder_decoder_models_share_theirs(self, untied: Path) -> None:
        with opened(untied) as (_, anatomy):
            anatomy.meta.config = transformers.T5Config()
            assert find_looked_up(anatomy.meta, _same_names, anatomy.dense) is None


def _same_names(name: str) -> object:
    from moe_infinity.checkpoint.expert_layout import NameRule

    return NameRule(name, None, None)


PROGRAM = """
import os, sys
from pathlib import Path
from moe_infinity.assembly import open_checkpoint
from moe_infinity.machine import peak_resident_bytes
from moe_infinity.model.loading import examine, load
for looks_up in (False, True):
    if os.fork() == 0:  # its peak is its own
        checkpoint = open_checkpoint(Path(sys.argv[1]))
        load(checkpoint, examine(checkpoint, None), None, looks_up)
        print(peak_resident_bytes(), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_the_table_is_never_in_memory(tmp_path: Path) -> None:
    """Not even while the library loads the model."""
    model = small_model("qwen3_moe", 64)
    model.resize_token_embeddings(400_000)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    table_bytes = 400_000 * 64 * 2
    said = subprocess.check_output([sys.executable, "-c", PROGRAM, str(tmp_path)])
    whole, without = map(int, said.split())
    assert whole - without > 0.8 * table_bytes


def test_memory_is_that_of_kept_rows(untied: Path) -> None:
    with opened(untied) as (_, anatomy):
        embedding = anatomy.looked_up
        assert isinstance(embedding, LookedUp)
        assert embedding.memory_bytes(torch.bfloat16) == NUM_KEPT * NUM_COLS * 2
        assert embedding.saved_bytes(torch.bfloat16) == (NUM_IDS - NUM_KEPT) * NUM_COLS * 2
