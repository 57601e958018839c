"""Memory a forward pass needs beside weights and KV cache, from the model's shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_infinity.config import PREFILL_CHUNK_TOKENS
from moe_infinity.model.config_values import first_number

# [heads, context, context] tensors alive at once: scores, biases, masks, softmax. Measured on
# Switch and NLLB in fp32 and bf16 at 2048 tokens: 2.1 to 3.5 in generate, 3.3 to 7.1 in one call.
_EAGER_ATTENTION_COPIES = 7
# Tokens whose values a compiled kernel holds at once, as floats: of an expert the two halves of its
# inner layer, its tokens made ready for each product and its output; and a dense product's.
_KERNEL_TOKENS = 192


def workspace_bytes(
    model: Any,
    context: int,
    rows: int,
    dtype: torch.dtype,
    pass_tokens: int = PREFILL_CHUNK_TOKENS,
) -> int:
    """Activations of one pass of up to ``pass_tokens`` a row, masks and one row of logits.

    model: may be on the meta device. An encoder takes its whole context in one pass. Attention
    that is not the fused one holds scores of every token with every other.
    """
    config = model.config
    text = config.get_text_config()
    item = dtype.itemsize
    tokens = min(pass_tokens, context) * rows
    hidden = first_number(text, "hidden_size", "d_model") or 1
    heads = first_number(text, "num_attention_heads", "num_heads") or 1
    head_dim = first_number(text, "head_dim", "v_head_dim", "d_kv") or hidden // heads
    inner = _inner_size(model, text)
    top_k = first_number(text, "num_experts_per_tok") or 8
    per_token = item * (8 * hidden + 4 * heads * head_dim + 3 * inner + (top_k + 3) * hidden)
    mask = tokens * context * (1 + item) if context > PREFILL_CHUNK_TOKENS or rows > 1 else 0
    if config.is_encoder_decoder:
        tokens = context * rows
    if config.is_encoder_decoder or config._attn_implementation == "eager":
        mask = _EAGER_ATTENTION_COPIES * tokens * heads * context * item
    kernel = min(tokens, _KERNEL_TOKENS) * 4 * (4 * inner + 4 * hidden + heads * head_dim)
    logits = rows * (first_number(text, "vocab_size") or 1) * 4 * 4
    return tokens * per_token + kernel + mask + logits


def visit_bytes(model: Any, context: int, rows: int, dtype: torch.dtype) -> int:
    """Where experts are computed apart from the model: tokens of one pass, their results, before
    the model's own norm and after, those to be copied back (model/elsewhere.py: as many as there
    are tokens), and what is between an expert's products."""
    text = model.config.get_text_config()
    tokens = min(PREFILL_CHUNK_TOKENS, context) * rows
    hidden = first_number(text, "hidden_size", "d_model") or 1
    top_k = first_number(text, "num_experts_per_tok") or 8
    per_token = (2 + 2 * top_k) * hidden + 3 * _inner_size(model, text)
    return tokens * dtype.itemsize * per_token


def _inner_size(model: Any, text: Any) -> int:
    """The widest layer inside an expert or another feed-forward part. Configs name the size of
    dense ones even where there are none."""
    names = ["moe_intermediate_size", "shared_expert_intermediate_size", "d_ff", "encoder_ffn_dim"]
    dense = first_number(text, "intermediate_size")
    widths = {m.out_features for m in model.modules() if isinstance(m, nn.Linear)}
    if dense in widths or first_number(text, "moe_intermediate_size") is None:
        names.append("intermediate_size")
    return max(first_number(text, name) or 0 for name in names)
