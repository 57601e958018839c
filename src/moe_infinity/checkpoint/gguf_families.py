"""What GGUF files of each family say, in the words of its config.json and of its checkpoints.

A file names its architecture; keys of the model begin with it. What llama.cpp has in its code and
the file does not tell stands here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
_KNOWN_SCALING = {
    f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class Family(NamedTuple):
    """model_type: transformers' name. config: what is beside the common values. splits_rotary:
    llama.cpp turns neighbours, so rows of q and k were moved for it."""

    model_type: str
    config: Callable[[Values], dict[str, Any]]
    splits_rotary: bool = False


def _qwen3moe(key: Values) -> dict[str, Any]:
    return {
        "num_experts": key["expert_count"],
        "moe_intermediate_size": key["expert_feed_forward_length"],
        "norm_topk_prob": True,
    }


def _qwen2moe(key: Values) -> dict[str, Any]:
    shared = key.get("expert_shared_feed_forward_length", key["feed_forward_length"])
    return {
        "num_experts": key["expert_count"],
        "moe_intermediate_size": key["expert_feed_forward_length"],
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": False,
    }


def _olmoe(key: Values) -> dict[str, Any]:
    return {"num_experts": key["expert_count"], "norm_topk_prob": False}


def _mixtral(key: Values) -> dict[str, Any]:
    return {"num_local_experts": key["expert_count"], "sliding_window": None}


FAMILIES = {
    "qwen3moe": Family("qwen3_moe", _qwen3moe),
    "qwen2moe": Family("qwen2_moe", _qwen2moe),
    "olmoe": Family("olmoe", _olmoe),
    "llama": Family("mixtral", _mixtral, splits_rotary=True),
}


def model_name(name: str) -> str | None:
    """The model's name of a tensor; None: it belongs to no family known here."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    block, part, kind = match.groups()
    known = (_OUTSIDE if block is None else _OF_BLOCK).get(part)
    if known is None:
        return None
    return f"{known}.{kind}" if block is None else f"model.layers.{block}.{known}.{kind}"


def config_values(family: Family, key: Values, values: Values) -> dict[str, Any]:
    """What config.json would hold, but for vocabulary, tied embeddings and number format. key: the
    architecture's own keys, without its name; values: all. Raises KeyError for what is missing."""
    heads = int(key["attention.head_count"])
    found = {
        "model_type": family.model_type,
        "hidden_size": int(key["embedding_length"]),
        "intermediate_size": key.get("feed_forward_length") or key["expert_feed_forward_length"],
        "num_hidden_layers": int(key["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(key.get("attention.head_count_kv", heads)),
        "head_dim": int(key.get("attention.key_length", key["embedding_length"] // heads)),
        "rms_norm_eps": key["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": int(key["context_length"]),
        "num_experts_per_tok": int(key["expert_used_count"]),
        "rope_parameters": _rope(key),
        **family.config(key),
    }
    if not 0 < key["expert_used_count"] <= key["expert_count"]:
        raise ValueError(f"{key['expert_used_count']} of {key['expert_count']} experts are used")
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        found[f"{name}_token_id"] = values.get(f"tokenizer.ggml.{theirs}_token_id")
    return found


def _rope(key: Values) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": key.get("rope.freq_base", 1e4)}
    kind = key.get("rope.scaling.type", "none")
    unknown = {n for n in key if n.startswith("rope.scal")} - _KNOWN_SCALING
    if kind not in ("none", "linear", "yarn") or unknown:
        raise ValueError(f"rope scaling {kind} with {sorted(unknown)} is not known")
    if kind != "none":
        found |= {"rope_type": kind, "factor": key["rope.scaling.factor"]}
        original = key.get("rope.scaling.original_context_length")
        if original:
            found["original_max_position_embeddings"] = original
    return found
