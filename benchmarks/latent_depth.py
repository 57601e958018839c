"""Time per token at depth of a model with latent attention, beside stock transformers.

Both hold everything in memory and begin behind the same random latents, so that nobody has to read
16,000 tokens first. A B A B: each depth is measured by both before the next trial.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save

DEPTHS = (100, 4_000, 16_000)
CONTEXT = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--stock-tokens", type=int, default=2)
    args = parser.parse_args()
    import torch
    import transformers

    from moe_infinity import MoE

    stock = transformers.AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="auto")
    times: dict[tuple[str, int], list[float]] = {}
    with MoE(args.checkpoint, max_context=CONTEXT) as moe, torch.no_grad():
        systems = {
            "moe_infinity": (moe, args.new_tokens),
            "transformers": (stock, args.stock_tokens),
        }
        for _ in range(args.trials):
            for depth in DEPTHS:
                for name, (model, count) in systems.items():
                    found = ms_per_token(model, stock.config, depth, count)
                    times.setdefault((name, depth), []).append(found)
                    print(f"{name} at {depth}: {found:.1f} ms", flush=True)
        kv_bytes = moe.plan.kv_bytes
    points = [point(depth, times) for depth in DEPTHS]
    facts = {"checkpoint": args.checkpoint.name, "num_layers": stock.config.num_hidden_layers}
    facts |= {"max_context": CONTEXT, "planned_kv_bytes": kv_bytes, "points": points}
    save("latent_depth", {**provenance(), **facts})


def point(depth: int, times: dict[tuple[str, int], list[float]]) -> dict:
    ours, stock = (times[name, depth] for name in ("moe_infinity", "transformers"))
    return {
        "depth": depth,
        "ms_per_token": statistics.median(ours),
        "stock_ms_per_token": statistics.median(stock),
        "ratio": statistics.median(s / o for o, s in zip(ours, stock, strict=True)),
        "trials": [list(pair) for pair in zip(ours, stock, strict=True)],
    }


def ms_per_token(model: object, config: object, depth: int, count: int) -> float:
    """Median of the passes after one that warms up."""
    import torch

    cache = filled(model, config, depth)
    spent = []
    for step in range(count + 1):
        ids = torch.tensor([[1000 + 17 * step]])
        start = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=True)
        spent.append(time.perf_counter() - start)
    return 1e3 * statistics.median(spent[1:])


def filled(model: object, config: object, depth: int) -> object:
    """The cache that each uses, with ``depth`` random tokens in it."""
    import torch
    import transformers

    own = hasattr(model, "new_cache")
    cache = model.new_cache() if own else transformers.DynamicCache(config=config)
    generator = torch.Generator().manual_seed(depth)
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
    for layer in range(config.num_hidden_layers):
        states = [torch.randn(1, 1, depth, n, generator=generator).to(config.dtype) for n in sizes]
        cache.update(*states, layer)
    return cache


if __name__ == "__main__":
    main()
