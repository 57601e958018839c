"""Would several requests at once, in one batch, be answered faster than one after another?"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save

ROWS = (2, 4)
PROMPTS = (
    "def main():\n    x =",
    "Question: A farmer has 12 cows and buys 5 more. How many cows does the farmer have? Answer:",
    "The city of Paris is",
    "SELECT name, age FROM people WHERE",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="Default: the bundled model.")
    parser.add_argument("--shares", default="1,0.25", help="Of the experts that fit, as slots.")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    from moe_infinity import bundled_model_path

    points = []
    for model in args.models or [bundled_model_path()]:
        for share in map(float, args.shares.split(",")):
            points.append(measure(model, share, args.trials, args.new_tokens))
            print(points[-1], flush=True)
    save("batching", {**provenance(), "new_tokens": args.new_tokens, "points": points})


def measure(model: Path, share: float, trials: int, new_tokens: int) -> dict[str, object]:
    """Tokens/s of all requests together: alone, in turns, and in batches; ratios trial by trial."""
    from moe_infinity import MoE

    with MoE(model, max_context=256, max_batch=max(ROWS)) as moe:
        slots = max(1, round(share * moe.plan.experts_total))
    with MoE(model, max_context=256, max_batch=max(ROWS), ram_slots=slots) as moe:
        in_turns(moe, new_tokens)
        found: dict[int, list[float]] = {rows: [] for rows in ROWS}
        alone = []
        for _ in range(trials):
            alone.append(in_turns(moe, new_tokens))
            for rows in ROWS:
                found[rows].append(in_batches(moe, rows, new_tokens))
        return {
            "model": moe.path.name,
            "slots": slots,
            "experts": moe.plan.experts_total,
            "in_turns_tokens_per_s": statistics.median(alone),
            "batched": [
                {
                    "rows": rows,
                    "tokens_per_s": statistics.median(rates),
                    "ratio": statistics.median(b / a for a, b in zip(alone, rates, strict=True)),
                }
                for rows, rates in found.items()
            ],
        }


def in_turns(moe: object, new_tokens: int) -> float:
    return _rate(moe, [[prompt] for prompt in PROMPTS], new_tokens)


def in_batches(moe: object, rows: int, new_tokens: int) -> float:
    batches = [list(PROMPTS[i : i + rows]) for i in range(0, len(PROMPTS), rows)]
    return _rate(moe, batches, new_tokens)


def _rate(moe: object, batches: list[list[str]], new_tokens: int) -> float:
    import torch

    start = time.perf_counter()
    for batch in batches:
        ids = [moe.tokenizer(text).input_ids for text in batch]
        length = max(map(len, ids))
        rows = [[0] * (length - len(row)) + row for row in ids]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in ids]
        moe.generate(
            rows,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            attention_mask=torch.tensor(mask),
        )
    return len(PROMPTS) * new_tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
