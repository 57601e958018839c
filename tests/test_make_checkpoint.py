"""Tests of benchmarks/make_checkpoint.py: widening keeps the function, shapes load, refusals."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "make_checkpoint.py"
SMALL_SIZES = {
    "olmoe-1b-7b": {"hidden_size": 256, "intermediate_size": 32, "vocab_size": 512},
    "qwen3-30b-a3b": {"hidden_size": 64, "moe_intermediate_size": 16, "vocab_size": 512},
    "deepseek-v2-lite": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 16,
        "vocab_size": 512,
    },
}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up there
    spec.loader.exec_module(module)
    return module


make_checkpoint = load_script()


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A folder emptied afterwards: pytest would keep up to a gigabyte of each of three runs."""
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out")


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sizes in SMALL_SIZES.items():
        shape = {**make_checkpoint.SHAPES[name], **sizes}
        monkeypatch.setitem(make_checkpoint.SHAPES, name, shape)


def load(path: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def run(model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] and the sorted experts of every layer [L, B * S, K]."""
    experts: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: experts.append(out[2]))
        for layer in model.model.layers
    ]
    logits = model(input_ids).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(experts).sort(dim=-1).values


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def random_ids(vocab_size: int, shape: tuple[int, int] = (3, 48)) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("factor", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_widening_keeps_logits_and_routing(out: Path, factor: int) -> None:
    make_checkpoint.write_widened(make_checkpoint.BUNDLED, out, factor, dtype=torch.float32)
    input_ids = random_ids(4096)
    logits, experts = run(load(make_checkpoint.BUNDLED), input_ids)
    wide = load(out)
    assert wide.config.hidden_size == factor * 192
    wide_logits, wide_experts = run(wide, input_ids)
    torch.testing.assert_close(wide_logits, logits, rtol=0, atol=1e-4)
    assert torch.equal(wide_experts, experts)


def test_copies_differ_by_noise_of_the_stated_size(out: Path) -> None:
    factor = 2
    make_checkpoint.write_widened(make_checkpoint.BUNDLED, out, factor, dtype=torch.float32)
    narrow = read_weights(make_checkpoint.BUNDLED)
    wide = read_weights(out)
    assert set(wide) == {*narrow, "lm_head.weight"}
    for kind in ("mlp.experts.7.gate_proj", "mlp.experts.7.down_proj", "self_attn.q_proj"):
        weight = narrow[f"model.layers.3.{kind}.weight"].float() / factor
        rows, columns = weight.shape
        copies = wide[f"model.layers.3.{kind}.weight"].view(-1, rows, factor, columns)
        noise = copies - weight[:, None]
        assert noise.std() / weight.std() == pytest.approx(0.5, rel=0.02)
        assert noise.sum(dim=2).abs().max() < 1e-6
        for repeat, copy in enumerate(copies.unbind(0)):
            assert (copy[:, 0] != copy[:, 1]).float().mean() > 0.99
            others = torch.cat([copies[:repeat], copies[repeat + 1 :]])
            assert not (others == copy).all(dim=-1).any()


def test_bfloat16_checkpoint_is_complete(out: Path) -> None:
    assert make_checkpoint.main(["--widen", "2", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json"}
    weights = read_weights(out)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights)
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", False)


def entry(name: str, num_weights: int) -> object:
    def fill(generator: torch.Generator) -> torch.Tensor:
        return torch.empty(num_weights).normal_(generator=generator)

    return make_checkpoint.Entry(name=name, shape=(num_weights,), dtype=torch.float32, fill=fill)


def test_shards_leave_experts_whole_and_seeds_decide(tmp_path: Path) -> None:
    matrices = ("down_proj", "gate_proj", "up_proj")
    entries = [entry(f"l.0.experts.{e}.{m}.weight", 10) for m in matrices for e in range(12)]
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_checkpoint.write_checkpoint(entries, tmp_path / out, seed=seed, shard_bytes=300)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    shards: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        shards.setdefault(file, []).append(name)
    assert len(shards) == 6
    experts = [f"l.0.experts.{e}.{m}.weight" for e in range(12) for m in matrices]
    assert [name for names in shards.values() for name in names] == experts
    first, again, other = (read_weights(tmp_path / out) for out in "abc")
    assert all(torch.equal(first[name], again[name]) for name in experts)
    assert not any(torch.equal(first[name], other[name]) for name in experts)


@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize("shape", SMALL_SIZES)
def test_random_shape_loads_with_stock_names(
    tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    num_layers = "2" if shape == "deepseek-v2-lite" else "1"  # its first layer is dense
    arguments = ["--shape", shape, "--layers", num_layers, "--dtype", "float32", str(tmp_path)]
    assert make_checkpoint.main(arguments) == 0
    assert str(tmp_path) in capsys.readouterr().out
    logits = load(tmp_path)(random_ids(512)).logits
    assert 0.5 < logits.std() < 2


@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize(("routing", "low", "high"), [("skewed", 0.6, 0.8), ("uniform", 0.25, 0.4)])
def test_routing_is_as_skewed_as_said(
    tmp_path: Path, routing: str, low: float, high: float
) -> None:
    config = make_checkpoint.shape_config("olmoe-1b-7b", num_layers=2)
    make_checkpoint.write_random(config, tmp_path, routing=routing, dtype=torch.float32)
    _, experts = run(load(tmp_path), random_ids(512, (4, 128)))
    for layer in experts:
        uses = layer.flatten().bincount(minlength=64).sort(descending=True).values
        assert low < uses[:16].sum() / uses.sum() < high


@pytest.mark.parametrize("arguments", [["--widen", "2"], ["--shape", "olmoe-1b-7b"]])
def test_refuses_a_folder_with_something_in_it(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    assert make_checkpoint.main([*arguments, str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_refuses_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=10**9))
    out = tmp_path / "deep" / "out"
    assert make_checkpoint.main(["--widen", "16", str(out)]) == 2
    assert "needs 7.3 GB, the disk has 1.0 GB free" in capsys.readouterr().err
    assert not out.exists()


def test_refuses_what_it_cannot_widen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert make_checkpoint.main(["--widen", "1", out]) == 2
    assert "a factor of at least 2" in capsys.readouterr().err
    assert make_checkpoint.main(["--widen", "2", "--source", str(tmp_path), out]) == 2
    assert "expected an unsharded model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        make_checkpoint.main(["--widen", "2", "--layers", "4", out])
    with pytest.raises(make_checkpoint.CheckpointRefused, match="no rule"):
        make_checkpoint.widening_rule("model.layers.0.self_attn.sinks")
