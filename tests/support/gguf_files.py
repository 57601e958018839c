"""GGUF files of transformers models, by the public gguf package: its names, its number formats.

Knows nothing about this project.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from support.super_blocks import BLOCK_BYTES, random_blocks

ARCHITECTURES = {
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
}
Kind = gguf.GGMLQuantizationType
PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


def small_model(name: str, size: int = 32, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a family whose matrices have rows of a multiple of ``size``, and what
    llama.cpp takes for granted of it."""
    config = transformers.AutoConfig.for_model(
        name,
        vocab_size=96,
        hidden_size=2 * size,
        intermediate_size=size,
        moe_intermediate_size=size,
        shared_expert_intermediate_size=2 * size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size // 2,
        num_experts=6,
        num_local_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=name == "qwen3_moe",
        max_position_embeddings=256,
        tie_word_embeddings=name == "olmoe",
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=(2 / parameter.shape[-1]) ** 0.5)
    return model.eval()


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    kind: Kind,
    kinds: Mapping[str, Kind] = MappingProxyType({}),
    more: Mapping[str, np.ndarray] = MappingProxyType({}),
    **values: Any,
) -> PreTrainedModel:
    """Write ``model`` with matrices in one number format, give it the numbers that were written,
    and return it.

    kinds: other formats, by a part of a tensor's name. more: tensors that are not the model's.
    values: more metadata. What the package cannot encode is random.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, model.config)
    for key, value in values.items():
        writer.kv_data[0].pop(key, None)  # described already, otherwise
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for part, source in _parts(name, tensor):
            special = (other for name, other in kinds.items() if name in part)
            chosen = _kind_of(part, source, next(special, kind))
            written, decoded = _coded(source, chosen)
            source.copy_(decoded)
            stem, _, suffix = part.rpartition(".")
            if architecture is gguf.MODEL_ARCH.LLAMA and stem.endswith(("q_proj", "k_proj")):
                written = _permuted(written, model.config, is_q=stem.endswith("q_proj"))
            theirs = names.get_name(stem)
            assert theirs is not None, part
            _add_tensor(writer, f"{theirs}.{suffix}", written, chosen)
    for name, data in more.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _parts(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Experts as transformers' checkpoints name them, [E, out, in] each."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.data.chunk(2, dim=1)
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", tensor.data)]
    return [(name, tensor.data)]


def _kind_of(name: str, tensor: torch.Tensor, kind: Kind) -> Kind:
    is_small = tensor.dim() < 2 or name.endswith(("gate.weight", "shared_expert_gate.weight"))
    return Kind.F32 if is_small else kind


def _coded(tensor: torch.Tensor, kind: Kind) -> tuple[np.ndarray, torch.Tensor]:
    """What is written, and the numbers it stands for."""
    if kind in PLAIN:
        stored = tensor.to(PLAIN[kind]).contiguous()
        raw = stored.view(torch.int16) if kind is Kind.BF16 else stored
        return raw.numpy(), stored.to(tensor.dtype)
    if kind.name in BLOCK_BYTES:  # the package decodes these only
        rows = random_blocks(tensor[..., 0].numel(), tensor.shape[-1], kind.name)
        raw = rows.reshape(*tensor.shape[:-1], -1)
    else:
        raw = gguf.quants.quantize(tensor.float().numpy(), kind)
    return raw, torch.from_numpy(gguf.quants.dequantize(raw, kind)).to(tensor.dtype)


def _permuted(rows: np.ndarray, config: Any, is_q: bool) -> np.ndarray:
    """As llama.cpp's conversion moves rows of q and k: a head's halves become neighbours."""
    heads = config.num_attention_heads if is_q else config.num_key_value_heads
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _add_tensor(writer: gguf.GGUFWriter, name: str, data: np.ndarray, kind: Kind) -> None:
    if kind is Kind.BF16:
        writer.add_tensor(name, data.view(np.uint8), raw_dtype=kind)
    else:
        writer.add_tensor(name, data, raw_dtype=None if kind in PLAIN else kind)


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {type(value).__name__}")
