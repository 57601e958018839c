"""Latent attention of a lone token: the absorbed form gives what the library's own gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moe_infinity import MoE
from moe_infinity.assembly import open_checkpoint
from moe_infinity.kernels import native
from moe_infinity.model.latent_attention import absorbed_weights
from moe_infinity.model.loading import examine
from support.gguf_files import Kind, small_model, write_gguf

SETS = native.native.instruction_sets() if native.native is not None else []
needs_compiler = pytest.mark.skipif(not SETS, reason="installed without a compiler")
NAMES = ("deepseek_v2", "deepseek_v3")
LENGTH, NUM_NEW = 300, 5  # more than one part of the context that compiled code takes at once


def reference(
    query: torch.Tensor,
    weight: torch.Tensor,
    latents: torch.Tensor,
    rotary: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Expanded, in float64; sizes as of Kernel.attend_latents."""
    query, weight, latents, rotary = (x.double() for x in (query, weight, latents, rotary))
    plain = query.shape[1] - rotary.shape[1]
    both = torch.einsum("hdr,sr->hsd", weight, latents)
    keys, values = both[..., :plain], both[..., plain:]
    scores = torch.einsum("hd,hsd->hs", query[:, :plain], keys) + query[:, plain:] @ rotary.T
    return torch.einsum("hs,hsd->hd", (scores * scaling).softmax(dim=-1), values)


@needs_compiler
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("heads", [1, 7, 16, 40])
@pytest.mark.parametrize("length", [1, 5, 256, 700])
def test_as_if_expanded(instruction_set: str, heads: int, length: int) -> None:
    kernel, (plain, turned, values, rank) = native.Kernel(2, instruction_set), (24, 16, 40, 96)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
        torch.manual_seed(heads * length)
        sizes = [(heads, plain + turned), (heads, plain + values, rank), (length, rank)]
        tensors = [torch.randn(size).to(dtype) for size in (*sizes, (length, turned))]
        found = kernel.attend_latents(*tensors, 0.05)
        expected = reference(*tensors, 0.05)
        assert found.dtype is dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        again = native.Kernel(1, instruction_set).attend_latents(*tensors, 0.05)
        assert torch.equal(found, again), "does not depend on threads"


@needs_compiler
def test_sizes_that_do_not_fit_are_refused() -> None:
    kernel = native.Kernel(1)
    sizes = [(2, 12), (2, 16, 8), (5, 8), (4, 4)]
    with pytest.raises(ValueError, match="expected them to fit together"):
        kernel.attend_latents(*(torch.zeros(size) for size in sizes), 1.0)


def save(name: str, dtype: torch.dtype, path: Path) -> Any:
    model = small_model(name, 64).to(dtype)
    model.config.max_position_embeddings = 512
    model.save_pretrained(path)
    return model


def ids() -> torch.Tensor:
    return torch.randint(1, 96, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def token_by_token(model: Any, config: Any) -> torch.Tensor:
    """Logits of the last tokens, each in a pass of its own."""
    cache = transformers.DynamicCache(config=config)
    start = LENGTH - NUM_NEW
    with torch.no_grad():
        model(ids()[:, :start], past_key_values=cache, use_cache=True)
        each = [
            model(ids()[:, n : n + 1], past_key_values=cache, use_cache=True).logits[0, -1]
            for n in range(start, LENGTH)
        ]
    return torch.stack(each).float()


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
class TestModels:
    def test_exact_numbers(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = save(name, torch.float32, tmp_path)
        calls = []
        attend = native.Kernel.attend_latents
        monkeypatch.setattr(
            native.Kernel, "attend_latents", lambda *args: calls.append(1) or attend(*args)
        )
        with MoE(tmp_path, ram="4GiB") as moe:
            found = token_by_token(moe, model.config)
        assert len(calls) == NUM_NEW * 3, "one in each of three layers"
        expected = token_by_token(model, model.config)
        assert (found - expected).norm() <= 1e-5 * expected.norm()

    def test_no_further_from_the_truth_in_16_bit(self, name: str, tmp_path: Path) -> None:
        model = save(name, torch.bfloat16, tmp_path)
        stock = token_by_token(model, model.config)
        truth = token_by_token(model.float(), model.config)
        with MoE(tmp_path, ram="4GiB") as moe:
            found = token_by_token(moe, model.config)
        assert (found - truth).norm() <= 1.5 * (stock - truth).norm()

    def test_rows_with_padding_go_the_usual_way(self, name: str, tmp_path: Path) -> None:
        save(name, torch.float32, tmp_path)
        row = ids()[0, :40].tolist()
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        with MoE(tmp_path, ram="4GiB", max_batch=2) as moe:
            alone = moe.generate([row], **options)[0, 40:]
            padded = torch.tensor([[0] * 8 + row])
            mask = (torch.arange(48) >= 8).long()[None]
            found = moe.generate(padded, attention_mask=mask, **options)[0, 48:]
            both = moe.generate([row, row], **options)[:, 40:]
        assert torch.equal(found, alone)
        assert torch.equal(both[0], alone)
        assert torch.equal(both[1], alone)

    def test_its_weight_stays_numbers(self, name: str, tmp_path: Path) -> None:
        path = tmp_path / "coded.gguf"
        write_gguf(small_model(name, 64), path, Kind.Q8_0)
        checkpoint = open_checkpoint(path)
        anatomy = examine(checkpoint, None)
        checkpoint.close()
        names = absorbed_weights(anatomy.meta)
        assert len(names) == 3
        assert not names & anatomy.coded.keys()
        assert anatomy.coded


@needs_compiler
def test_whoever_attends_to_some_tokens_only_goes_the_usual_way(tmp_path: Path) -> None:
    """DeepSeek-V3.2 looks at its config to know which function attends."""
    config = small_model("deepseek_v3", 64).config.to_dict() | {"index_topk": 4}
    config |= {"index_n_heads": 2, "index_head_dim": 32, "max_position_embeddings": 512}
    config.pop("model_type")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("deepseek_v32", **config)
    ).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids()[:, :40]).logits
    with MoE(tmp_path, ram="4GiB", dtype="float32") as moe, torch.no_grad():
        found = moe(ids()[:, :40]).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
