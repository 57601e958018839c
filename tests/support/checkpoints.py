"""Small checkpoints for tests of engine and command line, and ways to spoil them.

Knows file formats and stock transformers; nothing about this project's engine.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from moe_infinity import bundled_model_path

# The tiny model: 3 MoE layers x 8 experts, top-2.
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tiny_checkpoint(path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random Qwen3-MoE without a tokenizer, saved as transformers saves it."""
    config = transformers.Qwen3MoeConfig(**{**TINY, "tie_word_embeddings": False, **changes})
    return _save(transformers.Qwen3MoeForCausalLM, config, path, dtype)


def dense_checkpoint(path: Path) -> Path:
    """A random dense Llama."""
    known = {k: v for k, v in TINY.items() if "expert" not in k and "moe" not in k}
    config = transformers.LlamaConfig(**known)
    return _save(transformers.LlamaForCausalLM, config, path, torch.float32)


def _save(model_class: Any, config: Any, path: Path, dtype: torch.dtype) -> Path:
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = model_class(config).to(dtype)
    torch.random.set_rng_state(state)
    model.save_pretrained(path)
    return path


def bundled_copy(path: Path) -> Path:
    """The bundled model in another folder; its weights are a copy, not a link."""
    return shutil.copytree(bundled_model_path(), path)


def bundled_part(path: Path, num_layers: int = 2) -> Path:
    """The first layers of the bundled model, beside everything else that is in its folder."""
    shutil.copytree(bundled_model_path(), path, ignore=shutil.ignore_patterns("*.safetensors"))
    prefixes = tuple(f"model.layers.{layer}." for layer in range(num_layers))
    tensors = {
        name: tensor
        for name, tensor in load_file(weights(bundled_model_path())).items()
        if name.startswith(prefixes) or ".layers." not in name
    }
    save_file(tensors, weights(path), metadata={"format": "pt"})
    edit_config(path, num_hidden_layers=num_layers)
    return path


def bundled_links(path: Path, *left_out: str) -> Path:
    """A folder that links to the bundled model's files, some of them left out."""
    path.mkdir(parents=True)
    for file in bundled_model_path().iterdir():
        if file.name not in left_out:
            (path / file.name).symlink_to(file)
    return path


def weights(path: Path) -> Path:
    return path / "model.safetensors"


def truncate(path: Path, share: float = 0.5) -> None:
    os.truncate(weights(path), int(weights(path).stat().st_size * share))


def edit_config(path: Path, **changes: Any) -> None:
    """Change values of config.json; None removes one."""
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file; the data stay where they are."""
    raw = weights(path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    weights(path).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def first_expert(header: dict[str, Any]) -> dict[str, Any]:
    """The header's entry of some routed expert's matrix."""
    return next(v for k, v in header.items() if ".experts." in k)
