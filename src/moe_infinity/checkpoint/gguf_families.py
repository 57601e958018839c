"""What GGUF files of each family say, in the words of its config.json and of its checkpoints.

A file names its architecture; keys of the model begin with it. What llama.cpp has in its code and
the file does not tell stands here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Values = Mapping[str, Any]

# Tensors of a block, but for its experts: without "blk.N." and ".weight" or ".bias".
_OF_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SHARED = {
    f"ffn_{name}_shexp": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")
}
_POST_NORM = {"post_attention_norm": "post_attention_layernorm"}
_GPT_OSS = {**_POST_NORM, "ffn_gate_inp": "mlp.router"}
_GLM = {**_POST_NORM, **_SHARED}
_DEEPSEEK = {
    **_SHARED,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
# Names with their endings, where the model's do not have them.
_WHOLE = {
    "attn_sinks.weight": "self_attn.sinks",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_SCALING = "rope.scaling."
_KNOWN_SCALING = {
    *(f"{_SCALING}{n}" for n in ("type", "factor", "original_context_length", "finetuned")),
    *(f"{_SCALING}yarn_{n}" for n in ("log_multiplier", "beta_fast", "beta_slow")),
}
_SIGMOID = 2  # of expert_gating_func
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class Family(NamedTuple):
    """model_type: transformers' name. config: what is beside the common values, of its keys and its
    tensors' names. names: its tensors' where they are not the usual ones. splits_rotary: llama.cpp
    turns neighbours, so rows of q and k were moved for it. is_transposed: transformers holds its
    experts [in, out]."""

    model_type: str
    config: Callable[[Values, Container[str]], dict[str, Any]]
    names: Mapping[str, str] = MappingProxyType({})
    splits_rotary: bool = False
    is_transposed: bool = False


def _qwen3moe(key: Values, stored: Container[str]) -> dict[str, Any]:
    return {
        "num_experts": key["expert_count"],
        "moe_intermediate_size": key["expert_feed_forward_length"],
        "norm_topk_prob": True,
    }


def _qwen2moe(key: Values, stored: Container[str]) -> dict[str, Any]:
    shared = key.get("expert_shared_feed_forward_length", key["feed_forward_length"])
    return {
        "num_experts": key["expert_count"],
        "moe_intermediate_size": key["expert_feed_forward_length"],
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": False,
    }


def _olmoe(key: Values, stored: Container[str]) -> dict[str, Any]:
    return {"num_experts": key["expert_count"], "norm_topk_prob": False}


def _mixtral(key: Values, stored: Container[str]) -> dict[str, Any]:
    return {"num_local_experts": key["expert_count"], "sliding_window": None}


def _gpt_oss(key: Values, stored: Container[str]) -> dict[str, Any]:
    rope = _rope(key)
    if rope["rope_type"] == "yarn":
        rope |= {"truncate": False}
    return {
        "num_local_experts": key["expert_count"],
        "intermediate_size": key["expert_feed_forward_length"],
        "sliding_window": key["attention.sliding_window"],
        "rope_parameters": rope,
    }


def _glm4moe(key: Values, stored: Container[str]) -> dict[str, Any]:
    rotary = key["rope.dimension_count"] / key["attention.key_length"]
    return _with_shared_experts(key) | {
        "use_qk_norm": "blk.0.attn_q_norm.weight" in stored,
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "rope_parameters": _rope(key) | {"partial_rotary_factor": rotary},
    }


def _deepseek2(key: Values, stored: Container[str]) -> dict[str, Any]:
    rotary = key["rope.dimension_count"]
    heads = key["attention.head_count"]
    groups = key.get("expert_group_count", 1)
    return _with_shared_experts(key) | {
        "num_key_value_heads": heads,  # where keys are not expanded, files say 1
        "q_lora_rank": key.get("attention.q_lora_rank"),
        "kv_lora_rank": key["attention.kv_lora_rank"],
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": _mla(key, "key_length") - rotary,
        "v_head_dim": _mla(key, "value_length"),
        "head_dim": rotary,
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
    }


def _mla(key: Values, name: str) -> int:
    """Of a head as the model has it; without the ending it may be that of the latent cache."""
    return int(key.get(f"attention.{name}_mla", key[f"attention.{name}"]))


def _with_shared_experts(key: Values) -> dict[str, Any]:
    return {
        "n_routed_experts": key["expert_count"],
        "n_shared_experts": key["expert_shared_count"],
        "moe_intermediate_size": key["expert_feed_forward_length"],
        "first_k_dense_replace": int(key.get("leading_dense_block_count", 0)),
        "routed_scaling_factor": key.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(key.get("expert_weights_norm", False)),
        "n_group": key.get("expert_group_count", 1),
        "topk_group": key.get("expert_group_used_count", 1),
    }


_DEEPSEEK_V3 = Family("deepseek_v3", _deepseek2, _DEEPSEEK)
FAMILIES = {
    "qwen3moe": Family("qwen3_moe", _qwen3moe),
    "qwen2moe": Family("qwen2_moe", _qwen2moe),
    "olmoe": Family("olmoe", _olmoe),
    "llama": Family("mixtral", _mixtral, splits_rotary=True),
    "deepseek2": Family("deepseek_v2", _deepseek2, _DEEPSEEK),
    "gpt-oss": Family("gpt_oss", _gpt_oss, _GPT_OSS, is_transposed=True),
    "glm4moe": Family("glm4_moe", _glm4moe, _GLM),
}


def family_of(architecture: str, key: Values) -> Family:
    """One name stands for DeepSeek's second and third model: these route in different ways."""
    if architecture == "deepseek2" and key.get("expert_gating_func") == _SIGMOID:
        return _DEEPSEEK_V3
    return FAMILIES[architecture]


def model_name(family: Family, name: str) -> str | None:
    """The model's name of a tensor; None: it is none of the family's."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    block, part, kind = match.groups()
    if block is None:
        known = _OUTSIDE.get(part)
        return None if known is None else f"{known}.{kind}"
    known = family.names.get(part, _OF_BLOCK.get(part))
    whole = _WHOLE.get(f"{part}.{kind}", f"{known}.{kind}")
    return (
        None if known is None and whole not in _WHOLE.values() else f"model.layers.{block}.{whole}"
    )


def num_layers(key: Values) -> int:
    """Without those that only guess tokens further ahead."""
    return int(key["block_count"]) - int(key.get("nextn_predict_layers", 0))


def config_values(
    family: Family, key: Values, values: Values, stored: Container[str]
) -> dict[str, Any]:
    """What config.json would hold, but for vocabulary, tied embeddings and number format. key: the
    architecture's own keys, without its name; values: all; stored: names of tensors. Raises
    KeyError for what is missing."""
    heads = int(key["attention.head_count"])
    found = {
        "model_type": family.model_type,
        "hidden_size": int(key["embedding_length"]),
        "intermediate_size": key.get("feed_forward_length") or key["expert_feed_forward_length"],
        "num_hidden_layers": num_layers(key),
        "num_attention_heads": heads,
        "num_key_value_heads": int(key.get("attention.head_count_kv", heads)),
        "head_dim": int(key.get("attention.key_length", key["embedding_length"] // heads)),
        "rms_norm_eps": key["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": int(key["context_length"]),
        "num_experts_per_tok": int(key["expert_used_count"]),
        "rope_parameters": _rope(key),
        **family.config(key, stored),
    }
    if not 0 < key["expert_used_count"] <= key["expert_count"]:
        raise ValueError(f"{key['expert_used_count']} of {key['expert_count']} experts are used")
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        found[f"{name}_token_id"] = values.get(f"tokenizer.ggml.{theirs}_token_id")
    return found


def _rope(key: Values) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": key.get("rope.freq_base", 1e4)}
    kind = key.get("rope.scaling.type", "none")
    unknown = {n for n in key if n.startswith("rope.scal") and n not in _KNOWN_SCALING}
    if kind not in ("none", "linear", "yarn") or unknown:
        raise ValueError(f"rope scaling {kind} with {sorted(unknown)} is not known")
    if kind != "none":
        found |= {"rope_type": kind, "factor": key["rope.scaling.factor"]}
        original = key.get("rope.scaling.original_context_length")
        if original:
            found["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if f"{_SCALING}yarn_{name}" in key:
                found[name] = key[f"{_SCALING}yarn_{name}"]
        if f"{_SCALING}yarn_log_multiplier" in key:
            found["mscale"] = found["mscale_all_dim"] = key[f"{_SCALING}yarn_log_multiplier"] * 10
    return found
