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
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
}
Kind = gguf.GGMLQuantizationType
PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


def small_model(
    name: str, size: int = 32, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A random model of a family whose matrices have rows of a multiple of ``size``, and what
    llama.cpp takes for granted of it."""
    usual = {
        "vocab_size": 96,
        "hidden_size": 2 * size,
        "intermediate_size": size,
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": 2 * size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": size // 2,
        "num_experts": 6,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": name == "qwen3_moe",
        "max_position_embeddings": 256,
        "tie_word_embeddings": name == "olmoe",
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(name, **usual | _special(name, size) | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=(2 / parameter.shape[-1]) ** 0.5)
    return model.eval()


def _special(name: str, size: int) -> dict[str, Any]:
    """What only some families have."""
    if name == "gpt_oss":
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False}
        yarn |= {"original_max_position_embeddings": 64}
        return {"rope_parameters": yarn, "sliding_window": 16}
    if name == "glm4_moe":
        return {**_SHARED, "use_qk_norm": True, "attention_bias": True}
    if name == "deepseek_v3":
        return {**_SHARED, **_latent(size), "q_lora_rank": size, "n_group": 2, "topk_group": 1}
    if name == "deepseek_v2":
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.707}
        yarn |= {"original_max_position_embeddings": 64, "mscale_all_dim": 0.707}
        groups = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
        return {**_SHARED, **_latent(size), **groups, "q_lora_rank": None, "rope_parameters": yarn}
    return {}


_SHARED = {
    "num_hidden_layers": 3,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}


def _latent(size: int) -> dict[str, int]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": size}
    return {
        **heads,
        "qk_nope_head_dim": size,
        "qk_rope_head_dim": 16,
        "head_dim": 16,
        "v_head_dim": size,
    }


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    kind: Kind,
    kinds: Mapping[str, Kind] = MappingProxyType({}),
    more: Mapping[str, np.ndarray] = MappingProxyType({}),
    splits_kv_b: bool = False,
    **values: Any,
) -> PreTrainedModel:
    """Write ``model`` with matrices in one number format, give it the numbers that were written,
    and return it.

    kinds: other formats, by a part of a tensor's name. more: tensors that are not the model's.
    splits_kv_b: into keys and values, by head. values: more metadata. What the package cannot
    encode is random.
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
        parts = _parts(name, tensor, architecture is gguf.MODEL_ARCH.GPT_OSS)
        if splits_kv_b and name.endswith("kv_b_proj.weight"):
            parts = _split_kv_b(name, tensor.data, model.config)
        for part, source in parts:
            special = (other for name, other in kinds.items() if name in part)
            chosen = _kind_of(part, source, next(special, kind))
            written, decoded = _coded(source, chosen)
            source.copy_(decoded)
            stem, _, suffix = part.rpartition(".")
            if part.endswith("_correction_bias"):
                stem, suffix = part.removesuffix("_bias"), "bias"
            elif part.endswith("sinks"):
                stem, suffix = part, "weight"
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


def _parts(name: str, tensor: torch.Tensor, is_oss: bool) -> list[tuple[str, torch.Tensor]]:
    """Experts as transformers' checkpoints name them, [E, out, in] each; of gpt-oss, whose are
    [E, in, out] with gate and up in turns, views the other way round."""
    kind = "bias" if name.endswith("_bias") else "weight"
    stem = name.removesuffix("_bias")

    if "experts." not in name or name.endswith(".weight"):
        return [(name, tensor.data)]
    data = tensor.data.transpose(1, 2) if is_oss and kind == "weight" else tensor.data
    if stem.endswith("down_proj"):
        return [(f"{stem}.{kind}", data)]
    gate, up = (data[:, 0::2], data[:, 1::2]) if is_oss else data.chunk(2, dim=1)
    stem = stem.removesuffix("gate_up_proj")
    return [(f"{stem}gate_proj.{kind}", gate), (f"{stem}up_proj.{kind}", up)]


def _split_kv_b(name: str, tensor: torch.Tensor, config: Any) -> list[tuple[str, torch.Tensor]]:
    sizes = (config.qk_nope_head_dim, config.v_head_dim)
    keys, values = tensor.view(config.num_attention_heads, sum(sizes), -1).split(sizes, dim=1)
    stem = name.removesuffix("kv_b_proj.weight")
    return [(f"{stem}k_b_proj.weight", keys.transpose(1, 2)), (f"{stem}v_b_proj.weight", values)]


def _kind_of(name: str, tensor: torch.Tensor, kind: Kind) -> Kind:
    routers = ("gate.weight", "router.weight", "shared_expert_gate.weight")
    is_small = tensor.dim() < 2 or name.endswith((*routers, ".bias"))
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
    count = getattr(config, "n_routed_experts", None) or getattr(config, "num_local_experts", None)
    writer.add_expert_count(count or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if hasattr(config, "n_shared_experts"):
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        is_second = config.model_type == "deepseek_v2"
        function = (
            gguf.ExpertGatingFuncType.SOFTMAX if is_second else gguf.ExpertGatingFuncType.SIGMOID
        )
        writer.add_expert_gating_func(function)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if hasattr(config, "kv_lora_rank"):
        if config.q_lora_rank:
            writer.add_q_lora_rank(config.q_lora_rank)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
        writer.add_value_length(config.v_head_dim)
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
    elif getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type == "glm4_moe":
        writer.add_rope_dimension_count(config.head_dim // 2)
    if config.model_type == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_sliding_window(config.sliding_window)
    _describe_yarn(writer, config.rope_parameters)


def _describe_yarn(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    if rope["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "mscale_all_dim" in rope:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {type(value).__name__}")
