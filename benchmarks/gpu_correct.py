"""Is a GPU's answer right? Logits beside stock transformers', and what must be equal bit for bit.

It knows nothing of speed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import gpu_points
from gpu_texts import Text
from moe_infinity import MoE

ROOT = Path(__file__).resolve().parent.parent
STOCK = ("eager", "grouped_mm", "batched_mm")
_PATIENCE_S = 15.0  # for tests that were told to end
_TESTS = ("test_triton_experts.py", "test_device_directory.py", "test_triton_graph.py")


class Comparison:
    """One checkpoint on one device. Errors of single parts are kept beside what was found."""

    def __init__(self, path: Path, setting: gpu_points.Setting, num_prompt: int, num_new: int):
        self._path, self._setting = path, setting
        self._num_new = num_new
        self._where = torch.device("cuda" if setting.device.startswith("cuda") else "cpu")
        self._ids = torch.tensor([Text(path).ids(num_prompt, 1)])
        self._next = self._ids[:, :1]

    def all(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("logits", "directions", "capacities"):
            try:
                found[name] = getattr(self, name)()
            except Exception as error:  # the next part may still say something
                found[name] = {"failed": f"{type(error).__name__}: {error}"}
        return found

    def logits(self) -> dict[str, Any]:
        """Largest differences from stock's eager logits: of stock's other ways of computing
        experts, of ours with either kernel, and between ours; of a prompt's and a decode pass."""
        stock = self._stock_logits()
        ours = {kernel: self._our_logits(kernel) for kernel in ("torch", "triton")}
        eager = stock["eager"]
        return {
            "size": eager.abs().max().item(),
            "stock_spread": {k: _most(v, eager) for k, v in stock.items() if k != "eager"},
            "ours": {k: _most(v, eager) for k, v in ours.items()},
            "kernels": _most(ours["torch"], ours["triton"]),
            "same_top_1": {
                k: (v.argmax(-1) == eager.argmax(-1)).float().mean().item()
                for k, v in {**stock, **ours}.items()
            },
        }

    def directions(self) -> dict[str, Any]:
        """Decode directed by the host and by the device: tokens, counts, residents."""
        found = {}
        for policy in ("lru", "lfru", "next_use"):
            ways = {way: self._answer(way, policy=policy) for way in gpu_points.WAYS}
            passes = [ways[way].pop("directed_passes") for way in gpu_points.WAYS]
            found[policy] = {
                "same": {key: ways["host"][key] == ways["device"][key] for key in ways["host"]},
                "directed_passes": dict(zip(gpu_points.WAYS, passes, strict=True)),
                "misses": ways["host"]["counts"][2],
            }
        return found

    def capacities(self) -> dict[str, Any]:
        """The same bits and the same tokens whatever fits."""
        small, large = self._slots()
        logits = [self._our_logits("triton", vram_slots=n) for n in (small, large)]
        tokens = [self._answer("device", vram_slots=n)["tokens"] for n in (small, large)]
        return {
            "vram_slots": [small, large],
            "same_bits": torch.equal(*logits),
            "same_tokens": tokens[0] == tokens[1],
        }

    def _stock_logits(self) -> dict[str, torch.Tensor]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._path, dtype="auto").to(self._where)
        found = {}
        for name in STOCK:
            try:
                model.set_experts_implementation(name)
                with torch.inference_mode():
                    said = model(self._ids.to(self._where), use_cache=True)
                    then = model(self._next.to(self._where), past_key_values=said.past_key_values)
                found[name] = torch.cat([said.logits, then.logits], 1).float().cpu()
            except (RuntimeError, ValueError, NotImplementedError):
                if name == "eager":
                    raise
        return found

    def _our_logits(self, kernel: str, **options: Any) -> torch.Tensor:
        """Of the prompt, and of one pass behind it."""
        with self._opened(kernel, **options) as moe:
            cache = moe.new_cache()
            said = moe(self._ids, past_key_values=cache).logits
            then = moe(self._next, past_key_values=cache).logits
            return torch.cat([said, then], 1).float().cpu()

    def _answer(self, way: str, **options: Any) -> dict[str, Any]:
        with self._opened("triton", **options) as moe:
            gpu_points.whole_in_ram(moe)
            gpu_points.force(moe, way)
            said = moe.generate(
                self._ids, max_new_tokens=self._num_new, min_new_tokens=self._num_new
            )
            decode = moe.stats().decode
            moe.check_integrity()
            return {
                "tokens": said[0].tolist(),
                "counts": [decode.hits, decode.late, decode.misses, decode.demand_bytes],
                "residents": moe.residency(),
                "directed_passes": decode.directed_passes,
            }

    def _opened(self, kernel: str, **options: Any) -> MoE:
        given = {"device": self._setting.device, "kernel": kernel, "ram": self._setting.ram}
        given |= {"prefetch": "none", "max_context": 128, "vram_slots": self._slots()[0]}
        return MoE(self._path, **{**given, **options})

    def _slots(self) -> tuple[int, int]:
        """About a third of the experts, and all of them."""
        from moe_infinity.assembly import open_checkpoint
        from moe_infinity.model.loading import examine

        checkpoint = open_checkpoint(self._path)
        shape = examine(checkpoint, None).shape
        checkpoint.close()
        return max(shape.top_k + 1, shape.num_total * 3 // 8), shape.num_total


class KernelTests:
    """tests/kernels/gpu on the GPU, in a process of their own beside whatever else is done."""

    def __init__(self, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        command += [f"tests/kernels/gpu/{name}" for name in _TESTS]
        env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "src")}
        with log.open("w") as out:
            self._child = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
            )

    def finish(self, timeout_s: float) -> dict[str, Any]:
        """The summary line; of what had run where there was no more time."""
        is_cut = False
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            is_cut = True
            self._child.send_signal(signal.SIGINT)
            try:
                self._child.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
        lines = [line for line in self._log.read_text().splitlines() if line.strip()]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return {
            "summary": lines[-1] if lines else "",
            "was_cut_off": is_cut,
            "exit_code": self._child.poll(),
            "failed": failed[:20],
        }


def _most(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()
