"""``moe-infinity trace``: run prompts and write down which experts they were routed to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_infinity.checkpoint.hub import bundled_model_path
from moe_infinity.cli import common
from moe_infinity.cli.common import DEFAULTS
from moe_infinity.errors import ConfigError
from moe_infinity.tracing.trace import Trace
from moe_infinity.tracing.trace_file import save_trace


def trace(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, .gguf file or hub id.")
    ] = None,
    prompts: Annotated[
        Path, typer.Option(help='Lines {"prompt": ..., "task": ...}; the task is optional.')
    ] = ...,  # type: ignore[assignment]
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The trace, a .safetensors file.")
    ] = ...,  # type: ignore[assignment]
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 64,
    logits: Annotated[bool, typer.Option(help="All router logits too.")] = False,
    hidden: Annotated[
        bool, typer.Option(help="Router inputs and embeddings too; kept in memory until written.")
    ] = False,
    foresight: Annotated[
        int, typer.Option(min=0, help="What the next N layers' routers would say already.")
    ] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: common.Seed = 0,
    ram: common.Ram = str(DEFAULTS.ram),
    ram_slots: common.RamSlots = None,
    max_context: common.MaxContext = None,
    json: common.Json = False,
) -> None:
    """Record the routing of many prompts, for ``simulate``, ``fit`` and ``trace-show``."""
    asked = list(read_prompts(prompts))
    common.require_suffix("--output", output, ".safetensors")
    options = {"ram": ram, "ram_slots": ram_slots, "max_context": max_context, "seed": seed}
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0}
    wanted = {"logits": logits, "hidden": hidden, "foresight": foresight}
    recorded = _record(model or bundled_model_path(), options, asked, sampling, wanted, json)
    _save(recorded, output, len(asked), json)


def _record(
    model: str | Path,
    options: dict[str, Any],
    asked: list[tuple[str, str | None]],
    sampling: dict[str, Any],
    wanted: dict[str, Any],
    quiet: bool,
) -> Trace:
    import torch

    from moe_infinity.engine import MoE

    torch.manual_seed(options["seed"])
    with MoE(model, **options) as moe, moe.recording(**wanted) as recorder:
        for text, task in common.progress(asked, "tracing", quiet=quiet):
            recorder.domain = task
            ids = moe.tokenizer(text)["input_ids"]
            if ids:
                moe.generate([ids], **sampling)
        return recorder.trace()


def _save(recorded: Trace, output: Path, num_prompts: int, as_json: bool) -> None:
    save_trace(recorded, output)
    size = output.stat().st_size
    facts = {"trace": str(output), "requests": num_prompts, "tokens": recorded.num_tokens}
    if as_json:
        common.print_json(facts | {"bytes": size})
        return
    print(
        f"{output}: {recorded.num_tokens} tokens of {num_prompts} prompts, {size:,} bytes; "
        f"look at it with: moe-infinity trace-show {output}"
    )


def read_prompts(path: Path) -> Iterator[tuple[str, str | None]]:
    """(prompt, task) of every line. Raises ConfigError naming the line that is none."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: cannot read {path} ({error})") from error
    if not any(line.strip() for line in lines):
        raise ConfigError(f"--prompts: {path} is empty, expected a JSON object per line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = entry.get("prompt", entry.get("text"))
        except (ValueError, AttributeError) as error:
            raise ConfigError(
                f"--prompts: {path}, line {number} is not a JSON object ({error})"
            ) from error
        if not isinstance(text, str) or not text:
            raise ConfigError(
                f'--prompts: {path}, line {number} has no "prompt", expected {{"prompt": "..."}}'
            )
        task = entry.get("task", entry.get("domain"))
        yield text, str(task) if task else None
