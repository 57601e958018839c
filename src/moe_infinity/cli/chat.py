"""``moe-infinity chat``: a conversation in the terminal, its KV cache kept from turn to turn."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from moe_infinity.checkpoint.hub import bundled_model_path
from moe_infinity.cli import common
from moe_infinity.cli.common import DEFAULTS

_HELP = "/stats: report of the last answer   /reset: forget the conversation   /quit (or Ctrl-D)"


def chat(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, .gguf file or hub id.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    ram: common.Ram = str(DEFAULTS.ram),
    ram_slots: common.RamSlots = None,
    device: common.Device = DEFAULTS.device,
    vram: common.Vram = str(DEFAULTS.vram),
    max_context: common.MaxContext = None,
    dtype: common.Dtype = None,
    policy: common.Policy = DEFAULTS.policy,
    prefetch: common.Prefetch = DEFAULTS.prefetch,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 0.9,
    seed: common.Seed = 0,
) -> None:
    """Talk to a model. Ctrl-C stops the answer, Ctrl-D ends the program."""
    import torch

    from moe_infinity.cli.conversation import Conversation
    from moe_infinity.engine import MoE

    options: dict[str, Any] = {
        "ram": ram,
        "device": device,
        "vram": vram,
        "ram_slots": ram_slots,
        "max_context": max_context,
        "dtype": dtype,
    }
    options |= {"policy": policy, "prefetch": prefetch, "seed": seed}
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
    torch.manual_seed(seed)
    with MoE(model or bundled_model_path(), **options) as moe:
        talk = Conversation(moe, system, max_new_tokens, sampling)
        print(_HELP)
        while (line := _ask()) is not None:
            try:
                _serve(moe, talk, line.strip())
            except KeyboardInterrupt:  # between two answers' own handling of it
                print()


def _ask() -> str | None:
    """A line from the user; None at the end of input."""
    try:
        line = input("\n> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("\n(Ctrl-D or /quit ends the program)")
        return ""
    except UnicodeDecodeError as error:
        print(f"error: got bytes that are no text ({error}), expected UTF-8", file=sys.stderr)
        return ""
    return None if line.strip() in ("/quit", "/exit") else line


def _serve(moe: Any, talk: Any, line: str) -> None:
    if line == "/stats":
        common.print_stats(moe.stats())
    elif line == "/reset":
        talk.reset()
    elif line.startswith("/"):
        print(_HELP)
    elif line:
        talk.answer(line)
