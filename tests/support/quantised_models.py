"""Small models of which everything that is quantised has sides of 32 and more."""

from typing import Any

import torch
import transformers

from support.checkpoints import TINY

SIZES = TINY | {"hidden_size": 64, "moe_intermediate_size": 32, "num_key_value_heads": 4}
SIZES |= {"head_dim": 16, "intermediate_size": 64, "tie_word_embeddings": False}


def build(name: str) -> Any:
    """A random one."""
    torch.manual_seed(0)
    if name == "gpt_oss":
        config = transformers.GptOssConfig(
            **SIZES | {"intermediate_size": 32, "num_local_experts": 8, "sliding_window": 16}
        )
        return transformers.GptOssForCausalLM(config)
    if name == "deepseek_v3":
        config = transformers.DeepseekV3Config(
            **SIZES | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
            first_k_dense_replace=1,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
        )
        return transformers.DeepseekV3ForCausalLM(config)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES))
