"""How many bytes of weights a second one token is multiplied by, format by format, beside the speed
at which memory is read. Formats take turns."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save
from moe_infinity.kernels.planes import PLANES
from moe_infinity.machine import measure_memory_gbps
from moe_infinity.product_speed import measure_matvec_gbps

FORMATS = ("BF16", "F16", "EXACT12", "Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "Q4_K", "Q5_K")
FORMATS += ("Q6_K", "MXFP4", *PLANES)
EXPERT_BYTES = 16 << 20  # matrices of 2048 by 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5)
    args = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in ("memory", *FORMATS)}
    for _ in range(args.trials):
        speeds["memory"].append(measure_memory_gbps())
        for name in FORMATS:
            speeds[name].append(measure_matvec_gbps(EXPERT_BYTES, name))
    gbps = {name: statistics.median(found) for name, found in speeds.items()}
    for name, speed in gbps.items():
        print(f"{name:14}{speed:6.1f} GB/s")
    save("kernel_speed", {**provenance(), "gbps": gbps, "trials": speeds})


if __name__ == "__main__":
    main()
