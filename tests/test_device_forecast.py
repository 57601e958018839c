"""What ``plan --gpu`` is told and what it foretells."""

import json
from typing import Any

import pytest

from moe_infinity.checkpoint.hub import bundled_model_path
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint
from moe_infinity.config import EngineConfig
from moe_infinity.device_forecast import Gpu, device_forecast, parse_gpu
from moe_infinity.errors import ConfigError, MoEInfinityError
from moe_infinity.model.loading import Anatomy, examine
from moe_infinity.planning import make_plan
from support.command_line import run


@pytest.fixture(scope="module")
def bundled() -> Anatomy:
    checkpoint = SafetensorsCheckpoint(bundled_model_path())
    try:
        return examine(checkpoint, None)
    finally:
        checkpoint.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB,pcie4", Gpu(24 * 1024**3, 24.0, 450.0)),
        ("16GiB,12,288", Gpu(16 * 1024**3, 12.0, 288.0)),
        (" 8 GB , PCIe3 , 448 GB/s ", Gpu(8 * 1000**3, 12.0, 448.0)),
        ("12GiB,48.5 GB/s", Gpu(12 * 1024**3, 48.5, 450.0)),
    ],
)
def test_a_gpu_is_described(text: str, expected: Gpu) -> None:
    assert parse_gpu(text) == expected


NO_GPUS = ("", "24GiB", "24GiB,", "lots,pcie4", "24GiB,pcie9", "24GiB,0", "8GiB,1,fast", "1,2,3,4")


@pytest.mark.parametrize("text", NO_GPUS)
def test_what_describes_none(text: str) -> None:
    with pytest.raises(ConfigError, match="gpu: got"):
        parse_gpu(text)


def forecast_of(anatomy: Anatomy, text: str, **options: Any) -> Any:
    gpu = parse_gpu(text)
    plan = make_plan(anatomy, EngineConfig(ram="8GiB", **options), gpu.facts())
    made = device_forecast(plan, anatomy.shape.num_layers, gpu.link_gbps, gpu.memory_gbps, 2.0)
    assert made.in_vram + made.in_ram + made.on_disk == pytest.approx(1)
    assert min(made.in_vram, made.in_ram, made.on_disk) >= 0
    assert made.tokens_per_s_low <= made.tokens_per_s + 1e-9
    assert made.tokens_per_s <= made.tokens_per_s_high + 1e-9
    return made


def test_more_memory_and_a_faster_link_are_faster(bundled: Anatomy) -> None:
    few = forecast_of(bundled, "8GiB,pcie3", vram_slots=20)
    assert few.on_disk == 0
    assert few.in_ram > 0
    more = forecast_of(bundled, "8GiB,pcie3", vram_slots=120)
    faster = forecast_of(bundled, "8GiB,pcie5", vram_slots=20)
    assert few.tokens_per_s < more.tokens_per_s
    assert few.tokens_per_s < faster.tokens_per_s
    from_disk = forecast_of(bundled, "8GiB,pcie5", vram_slots=20, ram_slots=40)
    assert from_disk.on_disk > 0
    assert from_disk.tokens_per_s < faster.tokens_per_s


def test_the_command_says_it_is_a_forecast() -> None:
    result = run("plan", "--gpu", "8GiB,pcie4")
    assert "on a GPU with a link of 24 GB/s" in result.out
    assert "driver and libraries" in result.out
    assert "on no GPU measured" in result.out
    report = json.loads(run("plan", "--gpu", "8GiB,pcie4", "--json").out)
    assert report["device"]["budget_bytes"] < 8 * 1024**3
    assert report["device_forecast"]["in_vram"] == 1.0


def test_several_gpus_are_one_pool() -> None:
    report = json.loads(run("plan", "--gpu", "8GiB,pcie4;4GiB,pcie3", "--json").out)
    names = [each["name"] for each in (report["device"], *report["others"])]
    assert names == [f"a GPU with a link of {gbps} GB/s" for gbps in (24, 12)]
    slots = [each["slots_per_class"] for each in (report["device"], *report["others"])]
    assert slots == [[128], [128]]
    assert report["device_forecast"]["in_vram"] == 1.0


def test_a_gpu_smaller_than_the_dense_part_is_refused(bundled: Anatomy) -> None:
    with pytest.raises(MoEInfinityError, match="the smallest budget that works is"):
        make_plan(bundled, EngineConfig(ram="8GiB"), parse_gpu("500MiB,pcie4").facts())
