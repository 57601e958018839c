"""GGUF files run as they are, and agree with transformers on the numbers that are in them."""

import contextlib
import itertools
import json
import math
import os
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from moe_infinity import MoE, bundled_model_path
from moe_infinity.checkpoint.gguf import GgufCheckpoint
from moe_infinity.checkpoint.gguf_header import read_gguf_header
from moe_infinity.checkpoint.hub_names import is_gguf
from moe_infinity.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedModelError,
)
from moe_infinity.kernels import native
from moe_infinity.model.loading import examine
from support.checkpoints import dense_checkpoint
from support.gguf_files import ARCHITECTURES, Kind, small_model, write_gguf
from support.super_blocks import BLOCK_BYTES

FORMATS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
FORMATS += (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.MXFP4)
# Numbers, groups, groups of groups; and every other with biases and without.
OF_EACH_KIND = (Kind.F16, Kind.Q8_0, Kind.Q4_K)
IN_EVERY_FORMAT = ("qwen3_moe", "gpt_oss")
PAIRS = [
    pytest.param(
        *(name, kind),
        id=f"{name}-{kind.name}",
        marks=[] if kind in OF_EACH_KIND or name in IN_EVERY_FORMAT else pytest.mark.slow,
    )
    for name, kind in itertools.product(sorted(ARCHITECTURES), FORMATS)
]
IDS = torch.arange(5, 45)[None]


def bundled(dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=dtype)


def logits(path: Path, **options: Any) -> torch.Tensor:
    with MoE(path, ram="8GiB", **options) as moe, torch.no_grad():
        found: torch.Tensor = moe(IDS).logits.float()
        return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file with a tokenizer's keys, a few KiB."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    tokens = [f"t{n}" for n in range(200)]
    write_gguf(small_model("qwen3_moe"), path, Kind.F16, **{"tokenizer.ggml.tokens": tokens})
    return path


class TestNumbers:
    @pytest.mark.parametrize("name, kind", PAIRS)
    def test_every_family_and_format(self, name: str, kind: Kind, tmp_path: Path) -> None:
        size = 256 if kind.name in BLOCK_BYTES else 32
        model = write_gguf(small_model(name, size), tmp_path / "tiny.gguf", kind)
        with torch.no_grad():
            expected = model(IDS).logits
        found = logits(tmp_path / "tiny.gguf", dtype="float32", kernel="torch", ram_slots=8)
        assert (found - expected).norm() <= 1e-5 * expected.norm()

    @pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
    def test_by_the_kernels_of_this_machine(self, kind: Kind, tmp_path: Path) -> None:
        model = write_gguf(bundled(), tmp_path / "model.gguf", kind)
        with torch.no_grad():
            expected = model(IDS).logits
        found = logits(tmp_path / "model.gguf")
        assert (found - expected).norm() <= 0.05 * expected.norm()
        assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.9

    def test_the_same_bits_as_from_the_checkpoint(self, tmp_path: Path) -> None:
        write_gguf(bundled(torch.bfloat16), tmp_path / "model.gguf", Kind.BF16)
        expected = logits(bundled_model_path())
        assert torch.equal(logits(tmp_path / "model.gguf"), expected)
        assert torch.equal(logits(tmp_path / "model.gguf", ram_slots=40), expected)

    def test_mixed_formats(self, tmp_path: Path) -> None:
        path = tmp_path / "mixed.gguf"
        model = write_gguf(small_model("qwen3_moe", 256), path, Kind.Q4_K, {"down_proj": Kind.Q6_K})
        with torch.no_grad():
            expected = model(IDS).logits
        found = logits(path, dtype="float32", kernel="torch")
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        with MoE(path, ram="8GiB") as moe:
            parts = moe._hierarchy.store.specs[0, 0].parts
            assert [part.format for part in parts] == ["Q4_K", "Q6_K"]
            assert moe.stats().bit_exact

    @pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
    def test_latent_attention_in_two_tensors(self, kind: Kind, tmp_path: Path) -> None:
        """As llama.cpp's conversion has split kv_b since 2025."""
        path = tmp_path / "split.gguf"
        model = write_gguf(small_model("deepseek_v3"), path, kind, splits_kv_b=True)
        with torch.no_grad():
            expected = model(IDS).logits
        found = logits(path, dtype="float32", kernel="torch", ram_slots=8)
        assert (found - expected).norm() <= 1e-5 * expected.norm()

    def test_latent_attention_in_both_ways_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "both.gguf"
        half = {"blk.0.attn_k_b.weight": np.zeros((4, 32, 32), dtype=np.float32)}
        write_gguf(small_model("deepseek_v3"), path, Kind.F32, more=half)
        with pytest.raises(CorruptCheckpointError, match="expected one or the other"):
            GgufCheckpoint(path)

    @pytest.mark.parametrize(
        "key",
        [
            *("leading_dense_block_count", "expert_gating_func", "block_count", "expert_count"),
            *("nextn_predict_layers", "attention.head_count", "attention.key_length"),
            *("expert_used_count", "rope.dimension_count", "expert_shared_count"),
        ],
    )
    def test_values_of_other_kinds(self, key: str, tmp_path: Path) -> None:
        for number, value in enumerate(("x", [2, 2], ["a", "b"], 2**32 - 1, True, 1.5, math.inf)):
            path = tmp_path / f"{number}.gguf"
            write_gguf(small_model("deepseek_v3"), path, Kind.F32, **{f"deepseek2.{key}": value})
            with (
                contextlib.suppress(CheckpointError),
                contextlib.closing(GgufCheckpoint(path)) as c,
            ):
                examine(c, None)

    def test_blocks_that_only_guess_ahead_are_left_out(self, tmp_path: Path) -> None:
        model, path = small_model("glm4_moe"), tmp_path / "more.gguf"
        extra = {"blk.3.nextn.eh_proj.weight": np.zeros((64, 128), dtype=np.float32)}
        extra["blk.3.ffn_gate_exps.weight"] = np.zeros((6, 32, 64), dtype=np.float32)
        more = {"glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
        model = write_gguf(model, path, Kind.F32, more=extra, **more)
        with torch.no_grad():
            expected = model(IDS).logits
        assert (logits(path) - expected).norm() <= 1e-5 * expected.norm()

    @pytest.mark.skipif(native.native is None, reason="installed without a compiler")
    @pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "glm4_moe"])
    def test_whole_experts_by_the_compiled_code(self, name: str, tmp_path: Path) -> None:
        path = tmp_path / "coded.gguf"
        model = write_gguf(small_model(name), path, Kind.MXFP4)
        with torch.no_grad():
            expected = model(IDS).logits
        with MoE(path, ram="8GiB", dtype="float32") as moe, torch.no_grad():
            found = moe(IDS).logits
            views = moe._hierarchy._views._kept.values()
            assert all(each.prepared[2].call is not None for *_, each in views)
        assert (found - expected).norm() <= 0.05 * expected.norm()

    def test_q_k_and_v_coded_differently(self, tmp_path: Path) -> None:
        """As llama.cpp's mixtures are. By the kernels of this machine, few tokens and many."""
        path = tmp_path / "mixed.gguf"
        kinds = {"v_proj": Kind.Q6_K, "k_proj": Kind.Q8_0, "down_proj": Kind.Q6_K}
        write_gguf(small_model("qwen3_moe", 256), path, Kind.Q4_K, kinds)
        expected = logits(path, kernel="torch")
        found = logits(path)
        assert (found - expected).norm() <= 0.05 * expected.norm()
        with MoE(path, ram="8GiB") as one, MoE(path, ram="8GiB", kernel="torch") as other:
            answers = [
                moe.generate(
                    IDS,
                    max_new_tokens=6,
                    output_logits=True,
                    return_dict_in_generate=True,
                    eos_token_id=None,
                    do_sample=False,
                ).logits
                for moe in (one, other)
            ]
            whole = one._wiring._whole
            assert native.native is None or (whole is not None and whole.num_passes == 4)
        for mine, theirs in zip(*answers, strict=True):
            if mine.argmax() != theirs.argmax():
                break  # other tokens follow
            assert (mine - theirs).norm() <= 0.1 * theirs.norm()

    def test_as_the_public_reader_reads_it(self, small: Path) -> None:
        theirs, ours = gguf.GGUFReader(small), read_gguf_header(small)
        expected = {
            t.name: (
                t.tensor_type.name,
                tuple(reversed(t.shape.tolist())),
                t.data_offset,
                t.n_bytes,
            )
            for t in theirs.tensors
        }
        assert {t.name: t[1:] for t in map(_astuple, ours.tensors)} == expected
        for key, value in ours.values.items():
            assert np.array_equal(theirs.fields[key].contents(), value)


def _astuple(tensor: Any) -> Any:
    from collections import namedtuple

    made = namedtuple("Tensor", "name format shape offset num_bytes")
    return made(tensor.name, tensor.format, tensor.shape, tensor.offset, tensor.num_bytes)


class TestTokenizer:
    def test_it_is_the_checkpoints(self, tmp_path: Path) -> None:
        raw = json.loads((bundled_model_path() / "tokenizer.json").read_text())
        stock = transformers.AutoTokenizer.from_pretrained(bundled_model_path())
        vocab = sorted(stock.get_vocab(), key=stock.get_vocab().get)
        added = {each["content"] for each in raw["added_tokens"]}
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
        write_gguf(
            bundled(torch.bfloat16),
            tmp_path / "model.gguf",
            Kind.BF16,
            **{
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.tokens": vocab,
                "tokenizer.ggml.token_type": [3 if token in added else 1 for token in vocab],
                "tokenizer.ggml.merges": merges,
                "tokenizer.ggml.eos_token_id": stock.eos_token_id,
                "tokenizer.chat_template": "{{ messages[0].content }}",
            },
        )
        with MoE(tmp_path / "model.gguf", ram="8GiB") as moe:
            text = "def f(x):\n    return x + 12  # Straße, 日本"
            assert moe.tokenizer(text).input_ids == stock(text).input_ids
            assert moe.tokenizer.decode(moe.tokenizer(text).input_ids) == text
            assert moe.tokenizer.eos_token_id == stock.eos_token_id
            chat = moe.tokenizer.apply_chat_template(
                [{"role": "user", "content": "hi"}], tokenize=False
            )
            assert chat == "hi"

    def test_without_one_ids_work(self, tmp_path: Path) -> None:
        write_gguf(small_model("olmoe"), tmp_path / "tiny.gguf", Kind.F32)
        with MoE(tmp_path / "tiny.gguf", ram="8GiB") as moe:
            assert moe.generate(IDS, max_new_tokens=3).shape == (1, IDS.shape[1] + 3)
            with pytest.raises(CheckpointNotFoundError, match="pass token ids"):
                moe.tokenizer  # noqa: B018


class TestFiles:
    def split(self, path: Path, folder: Path, count: int = 3) -> list[Path]:
        """The file's tensors over several files, as llama.cpp's tool names them."""
        whole = gguf.GGUFReader(path)
        names = [folder / f"part-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
        for number, name in enumerate(names):
            writer = gguf.GGUFWriter(name, "qwen3moe")
            for key, field in whole.fields.items():
                if number == 0 and key.startswith("qwen3moe."):
                    writer.add_key_value(key, field.contents(), field.types[0])
            writer.add_uint16("split.count", count)
            for each in whole.tensors[number::count]:
                writer.add_tensor(each.name, each.data, raw_dtype=each.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return names

    def test_split_files(self, small: Path, tmp_path: Path) -> None:
        names = self.split(small, tmp_path)
        expected = logits(small)
        for path in (names[0], names[2], tmp_path):
            assert torch.equal(logits(path), expected)
        names[1].rename(tmp_path / "lost")
        with pytest.raises(CorruptCheckpointError, match=r"1 of 3 files are missing"):
            GgufCheckpoint(names[0])

    def test_a_part_under_another_name(self, small: Path, tmp_path: Path) -> None:
        names = self.split(small, tmp_path)
        alone = names[0].rename(tmp_path / "alone.gguf")
        with pytest.raises(CorruptCheckpointError, match="one of 3 files by its header"):
            GgufCheckpoint(alone)

    def test_which_paths_are_gguf(self, small: Path, tmp_path: Path) -> None:
        assert is_gguf(small) and is_gguf(small.parent)
        assert not is_gguf(tmp_path) and not is_gguf(bundled_model_path())

    def test_two_models_in_a_folder(self, small: Path, tmp_path: Path) -> None:
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes(small.read_bytes())
        with pytest.raises(CheckpointNotFoundError, match=r"got 2 GGUF models.*name the file"):
            GgufCheckpoint(tmp_path)

    def test_fingerprints_tell_models_apart(self, small: Path, tmp_path: Path) -> None:
        raw = bytearray(small.read_bytes())
        raw[len(raw) // 2 // 4096 * 4096 + 5] ^= 1
        (tmp_path / "other.gguf").write_bytes(raw)
        one, other = GgufCheckpoint(small), GgufCheckpoint(tmp_path / "other.gguf")
        assert one.fingerprint == other.fingerprint
        assert one.identity != other.identity
        one.close()
        other.close()


class TestBadFiles:
    def refused(self, raw: bytes, path: Path, kind: type[CheckpointError], message: str) -> None:
        path.write_bytes(raw)
        with pytest.raises(kind, match=message):
            GgufCheckpoint(path).close()

    @pytest.mark.parametrize(
        ("at", "value", "kind", "message"),
        [
            (0, b"GGML", CorruptCheckpointError, "begins with b'GGML', expected GGUF"),
            (4, struct.pack("<I", 1), CorruptCheckpointError, "is of version 1, expected"),
            (4, struct.pack("<I", 4), CorruptCheckpointError, "is of version 4, expected"),
            (4, struct.pack(">I", 3), CorruptCheckpointError, "is big-endian, expected"),
            (8, struct.pack("<Q", 2**60), CorruptCheckpointError, "claims .* tensors"),
            (16, struct.pack("<Q", 2**60), CorruptCheckpointError, "claims .* keys"),
            (24, struct.pack("<Q", 2**60), CorruptCheckpointError, "bytes too early"),
        ],
    )
    def test_headers_that_lie(
        self,
        small: Path,
        tmp_path: Path,
        at: int,
        value: bytes,
        kind: type[CheckpointError],
        message: str,
    ) -> None:
        raw = bytearray(small.read_bytes())
        raw[at : at + len(value)] = value
        self.refused(bytes(raw), tmp_path / "bad.gguf", kind, message)

    def test_truncated_anywhere(self, small: Path, tmp_path: Path) -> None:
        raw = small.read_bytes()
        ends = sorted({*range(0, 200, 7), *range(200, len(raw), len(raw) // 60), len(raw) - 1})
        for end in ends:
            self.refused(raw[:end], tmp_path / "cut.gguf", CorruptCheckpointError, "expected")

    def test_a_format_that_is_not_known(self, small: Path, tmp_path: Path) -> None:
        raw = small.read_bytes()
        name = b"blk.0.ffn_down_exps.weight"
        at = raw.index(name) + len(name) + 4 + 3 * 8
        for number, kind, message in (
            (99, CorruptCheckpointError, "in a format of number 99, expected one of F32"),
            (30, CorruptCheckpointError, None),  # BF16 as large: it is taken
            (16, CorruptCheckpointError, "rows of a multiple of 256"),
        ):
            changed = raw[:at] + struct.pack("<I", number) + raw[at + 4 :]
            if message is not None:
                self.refused(changed, tmp_path / "bad.gguf", kind, message)

    def test_what_has_no_experts_or_is_not_known(self, tmp_path: Path) -> None:
        def write(architecture: str, **keys: int) -> Path:
            path = tmp_path / f"{architecture}.gguf"
            writer = gguf.GGUFWriter(path, architecture)
            for key, value in keys.items():
                writer.add_uint32(f"{architecture}.{key}", value)
            writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return path

        with pytest.raises(UnsupportedModelError, match=r"'llama' without experts, expected"):
            GgufCheckpoint(write("llama"))
        with pytest.raises(UnsupportedModelError, match=r"architecture 'mamba', expected one of"):
            GgufCheckpoint(write("mamba"))
        with pytest.raises(CorruptCheckpointError, match=r"no sound value of olmoe\.\*"):
            GgufCheckpoint(write("olmoe", expert_count=4))

    @pytest.mark.parametrize("lost", ["blk.1.ffn_up_exps", "token_embd", "blk.0.attn_q"])
    def test_a_tensor_is_missing(self, small: Path, tmp_path: Path, lost: str) -> None:
        raw = small.read_bytes()
        other = lost[:-1] + "x"  # of the same length, and no model's
        changed = raw.replace(lost.encode() + b".weight", other.encode() + b".weight")
        (tmp_path / "bad.gguf").write_bytes(changed)
        with (
            pytest.raises(CheckpointError, match="expected"),
            MoE(tmp_path / "bad.gguf"),
        ):
            pass

    @pytest.mark.parametrize(
        "name", ["blk.0.attn_q.bias", "blk.1.ffn_gate.weight", "rope_freqs.weight"]
    )
    def test_a_tensor_that_the_model_has_no_place_for(self, name: str, tmp_path: Path) -> None:
        """It would change what llama.cpp computes."""
        path = tmp_path / "more.gguf"
        write_gguf(small_model("mixtral"), path, Kind.F32, more={name: np.ones(64, np.float32)})
        with pytest.raises(UnsupportedModelError, match=rf"got .*{name[-4:]}"), MoE(path):
            pass

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("expert_count", 5, "got 6 experts in layer 0, expected 5 from its config"),
            ("expert_count", 2**31, "got 6 experts in layer 0, expected 2147483648 from its"),
            ("expert_used_count", 99, "99 of 6 experts are used"),
            ("expert_used_count", 0, "0 of 6 experts are used"),
            ("block_count", 1, r"experts in 2 blocks up to 1, expected them from 0 up to 0"),
            ("block_count", 3, r"experts in 2 blocks up to 1, expected them from 0 up to 2"),
            ("embedding_length", 32, "expected .* from its config"),
            ("attention.head_count_kv", 3, "expected a matrix of whole heads"),
            ("rope.scaling.type", "longrope", "rope scaling longrope"),
            ("rope.scaling.attn_factor", 2, r"rope scaling none with .*attn_factor"),
        ],
    )
    def test_keys_that_disagree_with_the_tensors(
        self, key: str, value: int | str, message: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "other.gguf"
        write_gguf(small_model("mixtral"), path, Kind.F32, **{f"llama.{key}": value})
        with pytest.raises(CheckpointError, match=message), MoE(path):
            pass

    @pytest.mark.parametrize("number", ["00000-of-00000", "00003-of-00002", "00000-of-00002"])
    def test_impossible_parts(self, small: Path, tmp_path: Path, number: str) -> None:
        (tmp_path / f"x-{number}.gguf").write_bytes(small.read_bytes())
        with pytest.raises(CheckpointNotFoundError, match="by its name, expected"):
            GgufCheckpoint(tmp_path / f"x-{number}.gguf")

    def test_a_file_that_is_large_and_holds_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "sparse.gguf"
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
        strings = struct.pack("<Q", 3) + b"key" + struct.pack("<IIQ", 9, 8, 10_000_000)
        for value, message in (
            (struct.pack("<Q", 8 << 30), "no end of its header"),
            (struct.pack("<Q", 3) + b"key" + struct.pack("<IIQ", 9, 0, 9 << 30), "no end of its"),
            (strings, "has 10000000 values, expected at most"),
        ):
            path.write_bytes(head + value)
            os.truncate(path, 20 << 30)
            with pytest.raises(CorruptCheckpointError, match=message):
                GgufCheckpoint(path)

    def test_no_folder_for_a_dense_model(self, tmp_path: Path) -> None:
        dense_checkpoint(tmp_path / "dense")
        assert not is_gguf(tmp_path / "dense")

    @pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
    def test_mutated_headers_are_refused_or_read(
        self, small: Path, tmp_path: Path, count: int
    ) -> None:
        raw, draw = small.read_bytes(), random.Random(0)
        header = min(tensor.offset for tensor in read_gguf_header(small).tensors)
        path, outcomes = tmp_path / "bad.gguf", []
        for _ in range(count):
            changed = bytearray(raw)
            for _ in range(draw.choice((1, 1, 2, 8))):
                changed[draw.randrange(header)] = draw.randrange(256)
            path.write_bytes(changed)
            try:
                with contextlib.closing(GgufCheckpoint(path)) as checkpoint:
                    examine(checkpoint, None)
                outcomes.append("read")
            except CheckpointError as error:
                assert "expected" in str(error)
                outcomes.append("refused")
        assert {key for key, _ in itertools.groupby(sorted(outcomes))} == {"read", "refused"}
