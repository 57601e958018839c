"""``moe-infinity plan``: will it fit, and how fast, from headers and config alone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_infinity.checkpoint.hub import bundled_model_path, headers_only, resolve
from moe_infinity.checkpoint.hub_names import is_hub_id
from moe_infinity.cli import common
from moe_infinity.cli.common import DEFAULTS
from moe_infinity.config import EngineConfig, format_bytes, parse_size

if TYPE_CHECKING:
    from moe_infinity.device_forecast import Gpu
    from moe_infinity.device_plan import DeviceFacts


def plan(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, .gguf file or hub id.")
    ] = None,
    ram: common.Ram = str(DEFAULTS.ram),
    ram_slots: common.RamSlots = None,
    max_context: common.MaxContext = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 1,
    dtype: common.Dtype = None,
    device: common.Device = DEFAULTS.device,
    vram: common.Vram = str(DEFAULTS.vram),
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A GPU that need not be here: memory, link, and GB/s of its memory if known: "
            "24GiB,pcie4 or 16GiB,12,288. Several, in quotes: "
            "'24GiB,pcie4;12GiB,pcie3'."
        ),
    ] = None,
    hit_rate: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Known hit rate, instead of a typical.")
    ] = None,
    disk_gbps: Annotated[
        float | None, typer.Option(min=0.001, help="Direct reads, 1e9 B/s. Default: measured.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Show where the memory goes and how fast decode will be, before loading anything."""
    name = model or str(bundled_model_path())
    described = _described(gpu) if gpu else []
    as_if_here = ",".join(f"cuda:{number}" for number in range(len(described)))
    config = EngineConfig(
        ram=ram if ram == "auto" else parse_size(ram, "--ram"),
        ram_slots=ram_slots,
        max_context=max_context,
        max_batch=max_batch,
        dtype=dtype,
        device=as_if_here or device,
        vram="auto" if gpu else vram,
    )
    with tempfile.TemporaryDirectory() as scratch:
        remote = is_hub_id(name)
        path = headers_only(name, Path(scratch)) if remote else resolve(name)
        report = _report(path, config, described, hit_rate, disk_gbps, measure_here=not remote)
    if json:
        common.print_json(report)
    else:
        _print(name, report)


def _described(gpus: str) -> list[Gpu]:
    from moe_infinity.device_forecast import parse_gpu

    return [parse_gpu(each) for each in gpus.split(";")]


def _report(
    path: Path,
    config: EngineConfig,
    gpus: list[Gpu],
    hit_rate: float | None,
    disk_gbps: float | None,
    measure_here: bool,
) -> dict[str, Any]:
    from moe_infinity.assembly import open_checkpoint
    from moe_infinity.device_forecast import device_forecast
    from moe_infinity.forecast import forecast, forms, overhead_s, recommended, verdict
    from moe_infinity.kernels import native
    from moe_infinity.model.block_kind import look_usual
    from moe_infinity.model.loading import are_coded, examine
    from moe_infinity.planning import make_plan

    with contextlib.closing(open_checkpoint(path)) as checkpoint:
        anatomy = examine(checkpoint, config.dtype)
        if not measure_here:  # its tokenizer may not have come along
            anatomy = dataclasses.replace(anatomy, has_tokenizer=True)
        is_packed = checkpoint.packed_specs is not None
        files = checkpoint.files if measure_here else (bundled_model_path() / "model.safetensors",)
    facts, link_gbps, device_gbps = _devices(config, gpus)
    made = make_plan(anatomy, config, *facts)
    speeds = _measure(files, anatomy, disk_gbps)
    is_compiled = native.native is not None and look_usual(anatomy)
    other_s = overhead_s(anatomy.shape.num_layers, is_compiled)
    expected = forecast(made, other_s, speeds, hit_rate)
    choices = (
        [] if is_packed or are_coded(anatomy) else forms(made, _bits_of(anatomy), other_s, speeds)
    )
    better = recommended(expected, choices)
    on_device = None
    if facts:
        device_gbps = device_gbps or speeds.memory_gbps
        measured = (link_gbps, device_gbps, speeds.disk_gbps)
        on_device = device_forecast(made, anatomy.shape.num_layers, *measured)
    return _facts(made, anatomy) | {
        "device_forecast": dataclasses.asdict(on_device) if on_device else None,
        "verdict": verdict(made, expected),
        "forecast": dataclasses.asdict(expected),
        "packed": [form._asdict() for form in choices],
        "recommended": better.experts if better else None,
    }


def _measure(files: Any, anatomy: Any, disk_gbps: float | None) -> Any:
    from moe_infinity.machine import Bandwidths, best_reading, measure_memory_gbps
    from moe_infinity.product_speed import measure_matvec_gbps

    read_bytes = next(iter(anatomy.specs.values())).read_bytes
    return Bandwidths(
        disk_gbps=disk_gbps or best_reading(files, read_bytes)[0],
        memory_gbps=measure_memory_gbps(),
        matvec_gbps=measure_matvec_gbps(read_bytes, _main_format(anatomy), anatomy.shape.top_k),
    )


def _devices(
    config: EngineConfig, gpus: list[Gpu]
) -> tuple[list[DeviceFacts], float, float | None]:
    """What is known of the described devices or of this machine's: their memory, GB/s of all links
    and of the first one's memory (None: the machine's)."""
    from moe_infinity.assembly import facts_of
    from moe_infinity.devices.choice import open_devices

    if gpus:
        link_gbps = sum(gpu.link_gbps for gpu in gpus)
        return [gpu.facts() for gpu in gpus], link_gbps, gpus[0].memory_gbps
    devices = open_devices(config.devices, config.needs_device)
    if not devices:
        return [], 0.0, None
    link_gbps = sum(device.link_gbps() for device in devices)
    return [facts_of(device) for device in devices], link_gbps, devices[0].memory_gbps()


def _facts(made: Any, anatomy: Any) -> dict[str, Any]:
    return {
        **dataclasses.asdict(made),
        "slots": made.num_slots,
        "share_resident": made.share_resident,
        "cache_bytes": made.cache_bytes,
        "used_bytes": made.used_bytes,
        "holds_working_set": made.holds_working_set,
        "num_layers": anatomy.shape.num_layers,
        "top_k": anatomy.shape.top_k,
        "arithmetic": made.arithmetic(),
        "expert_formats": _formats_of(anatomy),
    }


def _formats_of(anatomy: Any) -> list[str]:
    """That the experts' matrices are stored in, the one of most numbers first."""
    sizes: dict[str, int] = {}
    for spec in anatomy.specs.values():
        for part in spec.parts:
            if len(part.shape) == 2:
                sizes[part.format] = sizes.get(part.format, 0) + math.prod(part.shape)
    return sorted(sizes, key=lambda name: -sizes[name])


def _said(number_format: str) -> str:
    """As its users call it."""
    return {"MXFP4_PLANES": "MXFP4", "F8_E4M3": "FP8", "GPTQ_V2": "GPTQ"}.get(
        number_format, number_format
    )


def _main_format(anatomy: Any) -> str:
    return _formats_of(anatomy)[0]


def _bits_of(anatomy: Any) -> int:
    """Of one expert weight as it is stored."""
    spec = next(iter(anatomy.specs.values()))
    return int(8 * spec.weight_bytes // sum(math.prod(part.shape) for part in spec.parts))


def _print(name: str, report: dict[str, Any]) -> None:
    speed = report["forecast"]
    print(f"{name}: {report['verdict']}\n")
    print(f"memory for the whole process, {format_bytes(report['budget_bytes'])}:")
    print(report["arithmetic"])
    print(
        f"  {'smallest budget that works':<40} {format_bytes(report['smallest_budget_bytes']):>12}"
    )
    print()
    print(
        f"experts: {report['experts_total']} in {report['num_layers']} layers, "
        f"{format_bytes(report['expert_bytes_total'])} in all, stored as "
        f"{', '.join(map(_said, report['expert_formats']))}; {report['share_resident']:.0%} fit"
    )
    print(
        f"one token: {report['working_set']} experts, {format_bytes(report['bytes_per_token'])} of "
        f"their weights" + ("" if report["holds_working_set"] else "  <- more than fit at once")
    )
    if report["device_forecast"]:
        _print_device(report)
        return
    print(
        f"decode: about {speed['tokens_per_s']:.1f} tokens/s if {speed['hit_rate']:.0%} of the "
        f"experts are found in memory (typical routing); {speed['tokens_per_s_low']:.1f} if "
        f"routing is random ({speed['hit_rate_low']:.0%}), {speed['tokens_per_s_high']:.1f} "
        f"once all hit"
    )
    _print_forms(report)
    bandwidths = speed["bandwidths"]
    print(
        f"measured here: disk {bandwidths['disk_gbps']:.2f} GB/s, "
        f"{_said(report['expert_formats'][0])} products {bandwidths['matvec_gbps']:.1f} GB/s"
    )


def _print_device(report: dict[str, Any]) -> None:
    speed = report["device_forecast"]
    name = " and ".join(each["name"] for each in (report["device"], *report["others"]))
    print(
        f"decode: about {speed['tokens_per_s']:.1f} tokens/s with typical routing "
        f"({speed['in_vram']:.0%} of a token's experts on the device, {speed['in_ram']:.0%} in "
        f"RAM, {speed['on_disk']:.0%} on disk); {speed['tokens_per_s_low']:.1f} if routing is "
        f"random, {speed['tokens_per_s_high']:.1f} once all lie on the device"
    )
    print(f"for {name}; what a layer costs beside bytes is assumed, on no GPU measured")


def _print_forms(report: dict[str, Any]) -> None:
    if not report["packed"]:
        return
    print("packed (moe-infinity pack), within the same budget:")
    for form in report["packed"]:
        options = f"--experts {form['experts']}"
        options += "" if form["is_lossless"] else f" --dense {form['experts']}"
        note = "no bit changed" if form["is_lossless"] else "weights changed"
        mark = "  <- recommended" if form["experts"] == report["recommended"] else ""
        print(
            f"  {options:<30} {form['share_resident']:>5.0%} of the experts fit, about "
            f"{form['tokens_per_s']:.1f} tokens/s, {note}{mark}"
        )
