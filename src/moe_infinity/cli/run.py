"""``moe-infinity run``: one prompt, streamed answer, small table."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from moe_infinity.checkpoint.hub import bundled_model_path
from moe_infinity.cli import common
from moe_infinity.cli.common import DEFAULTS
from moe_infinity.errors import ConfigError

_DEFAULT_PROMPT = "def main():\n"


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, .gguf file or hub id; alone, it may be the prompt."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="Text, or - to read it from stdin.")] = None,
    ids: Annotated[str | None, typer.Option(help="Prompt as token ids: 1,2,3.")] = None,
    ram: common.Ram = str(DEFAULTS.ram),
    ram_slots: common.RamSlots = None,
    max_context: common.MaxContext = None,
    dtype: common.Dtype = None,
    device: common.Device = DEFAULTS.device,
    vram: common.Vram = str(DEFAULTS.vram),
    miss: common.Miss = DEFAULTS.miss,
    kernel: common.Kernel = DEFAULTS.kernel,
    policy: common.Policy = DEFAULTS.policy,
    prefetch: common.Prefetch = DEFAULTS.prefetch,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest; 0: all.")] = 0,
    seed: common.Seed = 0,
    ignore_eos: Annotated[bool, typer.Option(help="Do not stop at the end token.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Check every byte of a packed model before the first token.")
    ] = False,
    json: common.Json = False,
) -> None:
    """Continue a prompt: streams text, then a table of speed, hits, bytes and memory."""
    from moe_infinity.engine import MoE

    path, text = _model_and_prompt(model, prompt, ids)
    given = _parse_ids(ids) if ids is not None else None
    options: dict[str, Any] = {
        "ram": ram,
        "ram_slots": ram_slots,
        "max_context": max_context,
        "dtype": dtype,
    }
    options |= {"device": device, "policy": policy, "prefetch": prefetch, "seed": seed}
    options |= {"kernel": kernel, "vram": vram, "miss": miss}
    sampling = _sampling(temperature, top_p, top_k, max_new_tokens)
    with MoE(path, **options) as moe:
        if verify:
            _verify(moe, quiet=json)
        if not json:
            _say_plan(moe)
        input_ids = given or _encode(moe, text)
        new_ids = _generate(moe, input_ids, sampling, seed, ignore_eos, stream=not json)
        if json:
            _print_json(moe, input_ids, new_ids)
        else:
            common.print_stats(moe.stats())


def _model_and_prompt(
    model: str | None, prompt: str | None, ids: str | None
) -> tuple[str, str | None]:
    """With --ids there is no text to give, so a lone positional is MODEL even if it is missing."""
    if ids is None:
        path, text = common.split_positionals(model, prompt)
        return path, _as_text(_stdin() if text == "-" else text)
    if prompt is None and model is not None and any(map(str.isspace, model)):
        prompt = model
    if prompt is not None:
        raise ConfigError(
            f"--ids: got a prompt as well ({prompt!r:.60}), expected only one of them"
        )
    return model or str(bundled_model_path()), None


def _as_text(prompt: str | None) -> str | None:
    try:
        (prompt or "").encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"prompt: got bytes that are no text ({error}), expected UTF-8"
        ) from error
    return prompt


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"-: got bytes that are no text ({error}), expected UTF-8") from error


def _generate(
    moe: Any,
    input_ids: list[int],
    sampling: dict[str, Any],
    seed: int,
    ignore_eos: bool,
    stream: bool,
) -> list[int]:
    import torch

    torch.manual_seed(seed)
    if stream:
        sampling["streamer"] = _streamer(moe)
    if ignore_eos:
        sampling["eos_token_id"] = None
        sampling["min_new_tokens"] = sampling["max_new_tokens"]
    out = moe.generate([input_ids], **sampling)
    return out[0, len(input_ids) :].tolist()  # type: ignore[no-any-return]


def _sampling(temperature: float, top_p: float, top_k: int, max_new: int) -> dict[str, Any]:
    if temperature == 0:
        # Named, for a model's generation config may ask for sampling.
        return {"max_new_tokens": max_new, "do_sample": False, "num_beams": 1} | {
            name: None for name in ("temperature", "top_p", "top_k")
        }
    return {
        "max_new_tokens": max_new,
        "do_sample": True,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
    }


def _verify(moe: Any, quiet: bool) -> None:
    from moe_infinity.checkpoint.packed import PackedCheckpoint
    from moe_infinity.cli.pack import progress

    checkpoint = moe.checkpoint
    if not isinstance(checkpoint, PackedCheckpoint):
        raise ConfigError(
            f"--verify: got {moe.path}, expected a packed folder; other checkpoints hold no "
            f"checksums"
        )
    with progress("checking", sum(f.stat().st_size for f in checkpoint.files), quiet) as on_bytes:
        checkpoint.verify(on_bytes)


def _parse_ids(ids: str) -> list[int]:
    try:
        return [int(part) for part in ids.split(",")]
    except ValueError:
        raise ConfigError(f"--ids: got {ids!r}, expected numbers such as 1,2,3") from None


def _encode(moe: Any, text: str | None) -> list[int]:
    encoded: list[int] = moe.tokenizer(_DEFAULT_PROMPT if text is None else text).input_ids
    if not encoded:
        raise ConfigError("the prompt is empty, expected at least one token of text")
    return encoded


def _streamer(moe: Any) -> Any:
    from transformers import TextStreamer

    from moe_infinity.errors import CheckpointNotFoundError

    try:
        tokenizer = moe.tokenizer
    except CheckpointNotFoundError:
        return _IdStreamer()
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class _IdStreamer:
    """Prints token ids as they come, for checkpoints without a tokenizer."""

    def __init__(self) -> None:
        self._is_prompt = True

    def put(self, value: Any) -> None:
        if not self._is_prompt:
            print(*value.reshape(-1).tolist(), end=" ", flush=True)
        self._is_prompt = False

    def end(self) -> None:
        print()


def _say_plan(moe: Any) -> None:
    import psutil

    from moe_infinity.config import format_bytes

    plan = moe.plan
    total = psutil.virtual_memory().total
    if plan.budget_bytes > total:
        print(f"note: this machine has {format_bytes(total)} of memory", file=sys.stderr)
    fits = f"{plan.num_slots} of {plan.experts_total} experts fit"
    for top in plan.devices:
        fits += f"; {format_bytes(top.budget_bytes)} of {top.name}, {top.num_slots} fit"
    print(
        f"[{moe.path.name}: {format_bytes(plan.budget_bytes)} of memory, {fits}; "
        f"{plan.max_context} tokens of context]",
        file=sys.stderr,
    )


def _print_json(moe: Any, input_ids: list[int], new_ids: list[int]) -> None:
    from moe_infinity.errors import CheckpointNotFoundError

    try:
        text = moe.tokenizer.decode(new_ids, skip_special_tokens=True)
    except CheckpointNotFoundError:
        text = None
    common.print_json(
        common.stats_dict(moe.stats())
        | {
            "text": text,
            "token_ids": new_ids,
            "prompt_tokens": len(input_ids),
            "new_tokens": len(new_ids),
        }
    )
