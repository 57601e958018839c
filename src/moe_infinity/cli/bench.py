"""``moe-infinity bench``: decode and prefill speed of a model here, warm, over several trials."""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import typer

from moe_infinity.checkpoint.hub import bundled_model_path
from moe_infinity.cli import common
from moe_infinity.cli.common import DEFAULTS
from moe_infinity.errors import CheckpointNotFoundError, ConfigError

_TEXT = """The library on the hill had stood for two hundred years before anyone thought to count
its books. def count(shelves): return sum(len(shelf) for shelf in shelves). If every shelf holds 32
books and there are 1,250 shelves, how many readers can borrow three books each? Question: who wrote
the oldest of them? Answer: nobody knows, for the first page is missing. """
# What is shown of all trials: (name, unit).
_MEASURES = (
    ("tokens_per_s", "tokens/s"),
    ("ttft_s", "s to the first token"),
    ("tpot_s", "s per token"),
    ("hit_rate", "hit rate"),
    ("read_bytes_per_token", "bytes read per token"),
    ("read_gbps", "GB/s while reading"),
    ("compute_gbps", "GB/s through experts"),
    ("limit_fraction", "of the physical limit"),
    ("belady_fraction", "of it with the best cache"),
)
_PROFILE = (
    ("experts_s", "s in experts"),
    ("dense_s", "s in dense layers"),
    ("stall_s", "s waiting for reads"),
    ("rest_s", "s for all the rest"),
    ("rest_per_layer_s", "s of that per MoE layer"),
)


def bench(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, .gguf file or hub id.")
    ] = None,
    ram: common.Ram = str(DEFAULTS.ram),
    ram_slots: common.RamSlots = None,
    device: common.Device = DEFAULTS.device,
    vram: common.Vram = str(DEFAULTS.vram),
    miss: common.Miss = DEFAULTS.miss,
    kernel: common.Kernel = DEFAULTS.kernel,
    policy: common.Policy = DEFAULTS.policy,
    prefetch: common.Prefetch = DEFAULTS.prefetch,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    depth: Annotated[
        int, typer.Option(min=0, help="Context before the first new token; more than the prompt.")
    ] = 0,
    trials: Annotated[int, typer.Option(min=1, help="Measured requests, after a warm-up.")] = 3,
    profile: Annotated[bool, typer.Option(help="Where the time of a token goes.")] = False,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Measure decode and prefill: warm-up, then medians over trials and their spread."""
    from moe_infinity.engine import MoE

    length = max(prompt_tokens, depth)
    options: dict[str, Any] = {"ram": ram, "ram_slots": ram_slots, "kernel": kernel}
    options |= {"device": device, "vram": vram, "miss": miss}
    options |= {"policy": policy, "prefetch": prefetch, "max_context": length + new_tokens}
    with MoE(model or str(bundled_model_path()), **options) as moe:
        _require_context(moe, length + new_tokens)
        ids = _prompt(moe, length)
        moe.bandwidths()  # measured before the clock runs, if it never was
        _request(moe, ids, new_tokens, seed)
        rows = [_request(moe, ids, new_tokens, seed + trial) for trial in range(trials)]
        facts = {
            "model": moe.path.name,
            "kernel": moe.kernel.name,
            "device": moe.stats().device,
            "slots": moe.stats().slots,
            "experts_total": moe.plan.experts_total,
            "prompt_tokens": length,
            "new_tokens": new_tokens,
            "peak_rss_bytes": moe.stats().peak_rss_bytes,
        }
    found = facts | {"trials": rows, "median": _over(rows, statistics.median)}
    found["spread"] = _over(rows, lambda values: max(values) - min(values))
    if json:
        common.print_json(found)
    else:
        _print(found, profile)


def _require_context(moe: Any, length: int) -> None:
    from moe_infinity.model.config_values import first_number

    limit = first_number(moe.model.config.get_text_config(), "max_position_embeddings")
    if limit is not None and length > limit:
        raise ConfigError(
            f"--prompt-tokens, --depth: got {length} tokens with the new ones, expected at most "
            f"the model's {limit}"
        )


def _prompt(moe: Any, length: int) -> list[int]:
    """Ordinary text, where there is a tokenizer: routing of noise is not that of text."""
    try:
        ids: list[int] = moe.tokenizer(_TEXT).input_ids
    except CheckpointNotFoundError:
        ids = list(range(10, 10 + length))
    return (ids * (length // len(ids) + 1))[:length]


def _request(moe: Any, ids: list[int], new_tokens: int, seed: int) -> dict[str, float | None]:
    """One request, sampled at temperature 1: a greedy answer may loop, and loops cache well."""
    import torch

    torch.manual_seed(seed)
    dense_s = moe.kernel.dense_s
    moe.generate(
        [ids],
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    stats = moe.stats()
    decode, passes = stats.decode, new_tokens - 1
    dense_s = (moe.kernel.dense_s - dense_s) / passes
    experts_s, stall_s = decode.compute_s / passes, decode.stall_s / passes
    rest_s = decode.wall_s / passes - experts_s - stall_s - dense_s
    read_bytes = decode.demand_bytes + decode.prefetch_bytes
    return {
        "tokens_per_s": stats.tokens_per_s,
        "ttft_s": stats.ttft_s,
        "tpot_s": stats.tpot_s,
        "hit_rate": decode.hit_rate,
        "read_bytes_per_token": read_bytes / passes,
        "read_gbps": decode.read_gbps,
        "compute_gbps": moe.plan.bytes_per_token / experts_s / 1e9 if experts_s else None,
        "limit_fraction": decode.limit_fraction,
        "belady_fraction": decode.belady_fraction,
        "experts_s": experts_s,
        "dense_s": dense_s,
        "stall_s": stall_s,
        "rest_s": rest_s,
        "rest_per_layer_s": rest_s / len(moe.residency()),
    }


def _over(rows: list[dict[str, float | None]], function: Any) -> dict[str, float | None]:
    """A function of each measure's values, None where there are none."""
    found: dict[str, float | None] = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        found[name] = function(values) if values else None
    return found


def _print(found: dict[str, Any], profile: bool) -> None:
    print(
        f"{found['model']}: {found['slots']} of {found['experts_total']} experts in memory, "
        f"{found['prompt_tokens']} + {found['new_tokens']} tokens, kernel {found['kernel']}"
    )
    for name, unit in _MEASURES + (_PROFILE if profile else ()):
        value, spread = found["median"][name], found["spread"][name]
        if value is not None:
            print(f"{value:>14.5g}  {unit:<28} spread {spread:.3g}")
