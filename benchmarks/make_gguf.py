"""The same weights as a GGUF file, for llama.cpp: olmoe and qwen3_moe checkpoints.

Every matrix in one format, norms and routers in F32, no vocabulary (token ids go in). Needs the
gguf package.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
ARCHITECTURES = {"olmoe": "olmoe", "qwen3_moe": "qwen3moe"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("F16", "Q8_0", "Q4_0"), default="F16")
    args = parser.parse_args()
    import gguf

    config = transformers.AutoConfig.from_pretrained(args.checkpoint)
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        sys.exit(f"got {config.model_type}, expected one of {', '.join(ARCHITECTURES)}")
    writer = gguf.GGUFWriter(args.out, architecture, use_temp_file=False)
    describe(writer, config)
    kind = gguf.GGMLQuantizationType[args.type]
    layout = plan(Tensors(args.checkpoint), config, kind)
    for name, shape, number_format, _ in layout:
        if number_format in ("F32", "F16"):
            dtype = np.float32 if number_format == "F32" else np.float16
            writer.add_tensor_info(name, shape, np.dtype(dtype), np.prod(shape) * dtype().nbytes)
        else:
            raw = gguf.quants.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, raw, np.dtype(np.uint8), int(np.prod(raw)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, number_format, make in layout:
        writer.write_tensor_data(coded(make(), number_format, kind))
        print(name, flush=True) if "blk" not in name else None
    writer.close()


def describe(writer, config) -> None:
    writer.add_context_length(min(config.max_position_embeddings, 40960))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    heads = config.num_attention_heads
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_tokenizer_model("no_vocab")


class Tensors:
    """A checkpoint's tensors by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def plan(tensors: Tensors, config, kind) -> list:
    """(name, shape, format, function that reads it) of every tensor, in the file's order."""
    found = []

    def add(name: str, source: str, number_format: str) -> None:
        shape = tuple(tensors[source].shape)
        found.append((name, shape, number_format, lambda: tensors[source]))

    add("token_embd.weight", "model.embed_tokens.weight", kind.name)
    add("output_norm.weight", "model.norm.weight", "F32")
    head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    add("output.weight", head, kind.name)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for theirs, ours in NAMES.items():
            source = f"{prefix}{theirs}.weight"
            if source in tensors:
                plain = "norm" in ours or ours == "ffn_gate_inp"
                add(f"blk.{layer}.{ours}.weight", source, "F32" if plain else kind.name)
        for theirs, ours in EXPERTS.items():
            sources = [
                f"{prefix}mlp.experts.{e}.{theirs}.weight" for e in range(config.num_experts)
            ]
            shape = (len(sources), *tensors[sources[0]].shape)
            make = lambda sources=sources: torch.stack([tensors[s] for s in sources])  # noqa: E731
            found.append((f"blk.{layer}.{ours}.weight", shape, kind.name, make))
    return found


def coded(tensor: torch.Tensor, number_format: str, kind) -> np.ndarray:
    import gguf

    if number_format == "F32":
        return tensor.float().numpy()
    if number_format == "F16":
        return tensor.half().numpy()
    from moe_infinity.kernels.packed import encode

    rows = tensor.reshape(-1, tensor.shape[-1])
    parts = [encode(part, number_format) for part in rows.split(65536)]
    raw = gguf.quants.quant_shape_to_byte_shape(tuple(tensor.shape), kind)
    return np.concatenate(parts).reshape(raw)


if __name__ == "__main__":
    main()
