"""Tiny random Switch and NLLB-MoE models, and the stock models they are compared with."""

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

VOCAB = 96


def switch(**overrides: object) -> transformers.PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    layers = {"num_layers": 4, "num_decoder_layers": 4}
    sparse = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    own = {"num_experts": 6, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(**(sizes | layers | sparse | own | overrides))
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb(**overrides: object) -> transformers.PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 64}
    layers = {"encoder_layers": 2, "decoder_layers": 4, "decoder_sparse_step": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    own = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_experts": 5, "encoder_sparse_step": 1}
    torch.manual_seed(0)
    config = transformers.NllbMoeConfig(**(sizes | layers | heads | own | overrides))
    return transformers.NllbMoeForConditionalGeneration(config)


@dataclasses.dataclass(frozen=True)
class Family:
    build: Callable[..., transformers.PreTrainedModel]
    top_k: int
    tight: dict[str, object]  # config in which experts overflow
    roomy: dict[str, object]  # and in which they do not
    crowded: dict[str, object]  # with ``tight``: padding takes room in several layers


FAMILIES = {
    "switch_transformers": Family(
        switch,
        1,
        {"expert_capacity": 2},
        {"expert_capacity": 99},
        {"num_experts": 3, "num_sparse_encoder_layers": 4},
    ),
    "nllb_moe": Family(
        nllb,
        2,
        {"moe_eval_capacity_token_fraction": 0.2},
        {"moe_eval_capacity_token_fraction": 1.0},
        {"router_ignore_padding_tokens": True, "encoder_layers": 4},
    ),
}


def save(model: transformers.PreTrainedModel, path: Path, dtype: torch.dtype) -> Path:
    """Save with random biases and norms: none is left at its start value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.to(dtype).save_pretrained(path)
    return path


def load_stock(
    path: Path, dtype: torch.dtype = torch.float32, **overrides: object
) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(path)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(path, dtype=dtype, **overrides).eval()
    for module in model.modules():
        if type(module).__name__ == "NllbMoeExperts":
            module.forward = types.MethodType(_published_loop, module)
    return model


def _published_loop(
    self: torch.nn.Module, hidden: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """NLLB-MoE's combination as published: every expert with a combining weight is run."""
    out = torch.zeros_like(hidden)
    for expert in range(self.num_experts):
        tokens = weights[:, expert].nonzero()[:, 0]
        own = self[f"expert_{expert}"](hidden[tokens]) * weights[tokens, expert, None]
        out.index_add_(0, tokens, own * (1 - self.moe_token_dropout))
    return out


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def padded(
    model: transformers.PreTrainedModel, side: str = "right", num_padding: int = 3
) -> dict[str, torch.Tensor]:
    """Two rows, the second of them with padding."""
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 9 - num_padding :] = 0
    mask = mask if side == "right" else mask.flip(1)
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: object, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, decoder_input_ids=tokens(2, 7, seed=1)).logits
