"""What recording costs: seconds spent in the recorder over seconds of decoding, bundled model."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save
from prefetch_live import PROMPTS, opened, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    lines = PROMPTS.read_text().splitlines()[: args.prompts]
    prompts = [json.loads(line)["prompt"] for line in lines]
    options = {"ids": {}, "logits and inputs": {"logits": True, "hidden": True}}
    shares = {name: share_of(wanted, prompts, args.new_tokens) for name, wanted in options.items()}
    print(shares)
    save("trace_cost", {**provenance(), "share_of_decode": shares})


def share_of(wanted: dict[str, Any], prompts: list[str], new_tokens: int) -> float:
    with opened("next_use", "none", slots=None) as moe:
        run(moe, prompts[:1], new_tokens)
        with moe.recording(**wanted):
            observer = moe._wiring._runtime.observer
            spent = [0.0]
            for name in ("see", "see_token", "begin_step", "end_step"):
                setattr(observer, name, timed(getattr(observer, name), spent))
            total = run(moe, prompts, new_tokens)
    return spent[0] / total["wall_s"]


def timed(function: Any, spent: list[float]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start

    return call


if __name__ == "__main__":
    main()
