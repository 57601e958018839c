"""Which model families run, and how closely they agree with stock transformers."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
from limits import provenance, save  # noqa: E402
from moe_infinity.errors import MoEInfinityError  # noqa: E402
from support.agreement import compare  # noqa: E402
from support.families import Family, families, modelling_files  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for item in families():
        rows.append(examine(item))
        print(rows[-1], flush=True)
    save(
        "families",
        {
            **provenance(),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "modelling_files": len(modelling_files()),
            "families": rows,
        },
    )


def examine(item: Family) -> dict:
    """One row: agreement in both dtypes, or the reason there is none."""
    row = {"family": item.name, "model_class": item.model_class, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for dtype in (torch.float32, torch.bfloat16):
                found = compare(item, Path(folder), dtype)
                row["runs"].append(dataclasses.asdict(found) | {"is_within": found.is_within})
        except MoEInfinityError as error:
            row["refused"] = str(error).replace(folder, "CHECKPOINT")
    return row


if __name__ == "__main__":
    main()
