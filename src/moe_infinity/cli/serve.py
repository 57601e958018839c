"""``moe-infinity serve``: a model behind a server that speaks OpenAI's and Anthropic's API."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_infinity.checkpoint.hub import bundled_model_path
from moe_infinity.cli import common
from moe_infinity.cli.common import DEFAULTS
from moe_infinity.cli.settings_file import read_settings
from moe_infinity.errors import ConfigError


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, .gguf file or hub id.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Whoever asks has to know it. May be given several times."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without a key.")
    ] = False,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages from there may call this server, such as https://a.example."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Another name for the model in requests; *: any. Several times."),
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue.")] = 64,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of answers without max_tokens. Default: the whole context."),
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds of one request, waiting included.")
    ] = 3600.0,
    shutdown: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get at the end.")
    ] = 20.0,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with these options by name, such as port = 8000. What is given here "
            "counts more, then the environment (MOE_INFINITY_PORT), then the file.",
            callback=read_settings,
            is_eager=True,
        ),
    ] = None,
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
    log_level: Annotated[
        str, typer.Option(help="debug, info (a line for each request), warning or error.")
    ] = "info",
) -> None:
    """Serve a model: OpenAI's and Anthropic's API under /v1, a live view of its cache at /."""
    try:
        from moe_infinity.server.running import bind, serve, url_of
        from moe_infinity.server.service import Service
        from moe_infinity.server.settings import ServeConfig
    except ImportError as error:
        raise ConfigError(
            f"serve needs packages that are not there ({error}); install them with: "
            f"pip install 'moe-infinity[serve]'"
        ) from error
    from moe_infinity.engine import MoE

    settings = ServeConfig(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        insecure=insecure,
        origins=tuple(origin or ()),
        names=tuple(name or ()),
        max_waiting=max_waiting,
        max_new_tokens=max_new_tokens,
        request_timeout_s=request_timeout,
        shutdown_s=shutdown,
    )
    options: dict[str, Any] = {"ram": ram, "ram_slots": ram_slots, "max_context": max_context}
    options |= {"dtype": dtype, "device": device, "vram": vram, "miss": miss}
    options |= {"kernel": kernel, "policy": policy, "prefetch": prefetch, "grammars": True}
    _log_to_stderr(log_level)
    path = model or str(bundled_model_path())
    with bind(host, port) as sock, MoE(path, **options) as moe:
        service = Service(moe, settings, _shown_name(path, moe))
        serve(service, sock, lambda: _announce(service.name, url_of(sock), moe))


def _shown_name(given: str, moe: Any) -> str:
    """A hub id as it was given, the name of a folder or file."""
    return moe.path.name if Path(given).exists() else given


def _announce(name: str, url: str, moe: Any) -> None:
    plan = moe.plan
    print(
        f"{name} at {url}: live view there, API at {url}/v1; {plan.max_context} tokens of context, "
        f"{plan.num_slots} of {plan.experts_total} experts fit in memory. Ctrl-C ends it.",
        file=sys.stderr,
        flush=True,
    )


def _log_to_stderr(level: str) -> None:
    levels = ("debug", "info", "warning", "error")
    if level not in levels:
        raise ConfigError(f"--log-level: got {level!r}, expected one of {', '.join(levels)}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("moe_infinity")
    root.addHandler(handler)
    root.setLevel(level.upper())
