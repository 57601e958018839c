"""``moe-infinity doctor``: what this machine can do, and what to fix."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_infinity.checkpoint.hub import bundled_model_path
from moe_infinity.cli import common
from moe_infinity.config import format_bytes
from moe_infinity.errors import CheckpointNotFoundError
from moe_infinity.versions import version_of

_PACKAGES = ("moe-infinity", "torch", "transformers", "safetensors", "numpy")
_READ_BYTES = 4 * 1024**2
_PROBE_BYTES = 64 * 1024**2


def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder whose disk is measured, a checkpoint's best.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Measure cores, memory, disk and versions, and say what would make models run faster."""
    report = _examine(folder or bundled_model_path())
    if json:
        common.print_json(report)
    else:
        _print(report)


def _examine(folder: Path) -> dict[str, Any]:
    import psutil
    import torch

    from moe_infinity import machine
    from moe_infinity.checkpoint.direct_io import DirectFile
    from moe_infinity.kernels.choice import choose
    from moe_infinity.state_file import StateFile, device_of

    files = _readable_files(folder)
    probe = DirectFile(files[0])
    direct = probe.is_direct
    probe.close()
    speeds = machine.measure(files, _READ_BYTES)
    remembered = StateFile()
    remembered.set_bandwidths(device_of(files[0], _READ_BYTES), speeds)
    remembered.save()
    kernel = choose("auto")
    kernel.close()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report: dict[str, Any] = {
        "cpu": machine.cpu_name(),
        "cores": machine.num_cores(),
        "torch_threads": torch.get_num_threads(),
        "instruction_sets": machine.instruction_sets(),
        "kernel": kernel.name,
        "ram_bytes": int(psutil.virtual_memory().total),
        "available_bytes": machine.available_bytes(),
        "gpus": gpus,
        "folder": str(folder),
        "direct_io": direct,
        "read_bytes": _READ_BYTES,
        **dataclasses.asdict(speeds),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in _PACKAGES},
    }
    report["advice"] = _advice(report)
    return report


def _readable_files(folder: Path) -> list[Path]:
    if folder.is_file() and folder.stat().st_size > _PROBE_BYTES:
        return [folder]
    files = sorted(f for f in folder.glob("*.safetensors")) if folder.is_dir() else []
    files = files or [
        f for f in folder.glob("*") if f.is_file() and f.stat().st_size > _PROBE_BYTES
    ]
    if not files:
        got = "no file so large" if folder.exists() else "no such folder or file"
        raise CheckpointNotFoundError(
            f"{folder}: {got}, expected a folder or file on the disk that is to be measured, with "
            f"at least {format_bytes(_PROBE_BYTES)} to read; whether a checkpoint is sound is seen "
            f"by 'plan' and 'run --verify'"
        )
    return files


def _advice(report: dict[str, Any]) -> list[str]:
    advice = []
    if not report["direct_io"]:
        advice.append(
            "the file system refuses direct reads: experts pass through the page cache, slower; "
            "keep checkpoints on a local ext4, xfs or btrfs disk"
        )
    if report["disk_gbps"] < 1.0:
        advice.append(
            f"the disk reads {report['disk_gbps']:.2f} GB/s; an NVMe drive reads 2 to 7: misses "
            f"cost that much less"
        )
    if report["kernel"] == "torch":
        advice.append(
            "no compiled kernels: products run on torch at about half of memory speed, and int8, "
            "int4 and exact12 experts are unpacked for every token; install again with a C++ "
            "compiler (g++) and Python headers"
        )
    if "avx512_bf16" not in report["instruction_sets"]:
        advice.append("no AVX-512 BF16: 16-bit products are slower on this processor")
    if report["gpus"]:
        advice.append("a GPU is here, but this version computes on the CPU")
    return advice


def _print(report: dict[str, Any]) -> None:
    rows = {
        "processor": f"{report['cpu']}, {report['cores']} cores, {report['torch_threads']} threads",
        "instructions": ", ".join(report["instruction_sets"]) or "none known",
        "kernel": report["kernel"],
        "memory": f"{format_bytes(report['ram_bytes'])}, "
        f"{format_bytes(report['available_bytes'])} available",
        "memory speed": f"{report['memory_gbps']:.1f} GB/s read, "
        f"{report['matvec_gbps']:.1f} GB/s through 16-bit products",
        "disk": f"{report['disk_gbps']:.2f} GB/s in reads of "
        f"{format_bytes(report['read_chunk_bytes'])}, {report['read_threads']} at once, "
        + ("direct" if report["direct_io"] else "through the page cache"),
        "GPU": ", ".join(report["gpus"]) or "none",
        "system": f"{report['system']}, Python {report['python']}",
        "versions": ", ".join(f"{name} {v}" for name, v in report["versions"].items()),
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    print()
    for line in report["advice"] or ["nothing to fix"]:
        print(f"- {line}")
