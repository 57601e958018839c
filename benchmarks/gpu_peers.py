"""Other ways to run the same checkpoint on the same GPU, for benchmarks/gpu.py.

It knows nothing of this project's engine.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_texts import Clock, Forced, Text

NOT_THERE = "not there"
_CONTEXT, _NEW_TOKENS = 100, 6


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another system. vram_bytes: None for everything on the GPU."""

    system: str
    model: str
    vram_bytes: int | None

    @property
    def name(self) -> str:
        size = "all" if self.vram_bytes is None else f"{self.vram_bytes / 1024**3:.0f}GiB"
        return f"peer {self.system} {self.model} {size}"


def run(peer: Peer, path: Path) -> dict[str, Any]:
    if peer.system == "llama.cpp":
        return llama_cpp()
    return accelerate(path, peer.vram_bytes, _CONTEXT, _NEW_TOKENS)


def accelerate(path: Path, vram_bytes: int | None, context: int, new_tokens: int) -> dict[str, Any]:
    """transformers with accelerate: what does not fit into ``vram_bytes`` stays in RAM and is
    copied layer by layer; None: everything lies on the GPU."""
    if importlib.util.find_spec("accelerate") is None:
        return {"failed": f"accelerate: {NOT_THERE}"}
    import psutil
    from transformers import AutoModelForCausalLM, LogitsProcessorList

    options: dict[str, Any] = {"device_map": {"": 0 if torch.cuda.is_available() else "cpu"}}
    if vram_bytes is not None:
        most = {"cpu": int(psutil.virtual_memory().available * 0.9)}
        if torch.cuda.is_available():
            most |= {0: vram_bytes}
        options = {"device_map": "auto", "max_memory": most}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)
    ids, found = Text(path).ids(context + new_tokens, 1), {}
    try:
        for tokens in (2, new_tokens):  # the first is to warm up
            clock = Clock()
            model.generate(
                torch.tensor([ids[:context]], device=model.device),
                attention_mask=torch.ones(1, context, dtype=torch.int64, device=model.device),
                max_new_tokens=tokens,
                eos_token_id=None,
                do_sample=False,
                streamer=clock,
                logits_processor=LogitsProcessorList([Forced(context, ids[context:])]),
            )
            steps = [b - a for a, b in itertools.pairwise(clock.stamps)]
            tpot_s = statistics.median(steps[1:])
            found = {"ttft_s": steps[0], "tpot_s": tpot_s, "steady_tokens_per_s": 1 / tpot_s}
        peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
        return found | {"vram_peak_bytes": peak}
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def llama_cpp() -> dict[str, Any]:
    """Whether llama.cpp is here to be compared with; make_gguf.py makes its file."""
    found = [name for name in ("llama-bench", "llama-cli") if shutil.which(name)]
    found += ["llama_cpp"] if importlib.util.find_spec("llama_cpp") else []
    return {"failed": f"llama.cpp: {NOT_THERE}"} if not found else {"found": found}
