"""Networks fitted to the history of a benchmark, and to nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def fit_networks(history: Any, state: Path) -> None:
    """Fit what is trained beforehand to the trace ``history``, into the folder ``state``, which
    becomes the state folder of this process and of those it starts."""
    from moe_infinity.config import learned_path
    from moe_infinity.training import TRAINERS

    os.environ["MOE_INFINITY_STATE_DIR"] = str(state)
    for name, train in TRAINERS.items():
        measures = train(history, learned_path(str(history.fingerprint), name), 0)
        print("fitted", name, measures, flush=True)
