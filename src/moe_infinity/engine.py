"""Owns lifetimes: opens a model, runs requests, reports, closes. The public Python API."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_infinity.assembly import (
    Chosen,
    build_hierarchy,
    choose_prefetch,
    find_choices,
    open_checkpoint,
    plan_here,
    speeds_of,
)
from moe_infinity.checkpoint.hub import resolve
from moe_infinity.config import PREFILL_CHUNK_TOKENS, EngineConfig
from moe_infinity.devices.choice import computing_on
from moe_infinity.errors import CheckpointError, ConfigError
from moe_infinity.interrupts import deferred_interrupt
from moe_infinity.learned import Learned
from moe_infinity.live import Live
from moe_infinity.machine import Bandwidths
from moe_infinity.model.cache_name import CACHE, name_cache
from moe_infinity.model.config_values import first_number
from moe_infinity.model.decoding import own_loop
from moe_infinity.model.inputs import (
    as_batch,
    context_tokens,
    load_tokenizer,
    may_be_padded,
    num_rows,
    placed,
    take_cache,
    tokens_left,
)
from moe_infinity.model.kv_cache import new_cache
from moe_infinity.model.loading import examine, load
from moe_infinity.model.routers import Wishes
from moe_infinity.model.rules import KeepRouting
from moe_infinity.model.workspace import workspace_bytes
from moe_infinity.original_api import translate
from moe_infinity.predictors.base import FORESIGHT_MODES, Foresight
from moe_infinity.reporting import RunFacts, build_stats
from moe_infinity.request import Request
from moe_infinity.speeds import Speeds
from moe_infinity.stats import Counters, PhaseCounters, Stats
from moe_infinity.tracing.trace_recorder import TraceRecorder
from moe_infinity.wiring import Wiring

_log = logging.getLogger(__name__)


class MoE:
    """A Mixture-of-Experts model whose experts are streamed through a bounded cache.

    model: a checkpoint's folder or a hub id. Options: see EngineConfig; a dictionary as the
    second argument takes the original package's keys. Use it as a context manager, or ``close``.
    One request at a time; ``cancel``, ``stats`` and ``residency`` may be called from any thread.

    Raises CheckpointError, BudgetError or ConfigError if the model cannot be opened as asked.
    """

    model: Any  # the transformers model

    def __init__(
        self, model: str | Path, config: dict[str, Any] | str | Path | None = None, **options: Any
    ) -> None:
        self.config = EngineConfig.of({**translate(config), **options})
        find_choices(self.config)  # a wrong name must not wait for a download
        self.path = resolve(model)
        with contextlib.ExitStack() as undo:
            self.checkpoint = open_checkpoint(self.path)
            undo.callback(self.checkpoint.close)
            anatomy = examine(self.checkpoint, self.config.dtype)
            self.devices, self.plan = plan_here(anatomy, self.config)
            self.device = self.devices[0] if self.devices else None  # the model's own
            _log.info("plan for %s:\n%s", self.path, self.plan.arithmetic())
            prefetch = choose_prefetch(self.config, anatomy, self.plan)
            read_bytes = next(iter(anatomy.specs.values())).read_bytes
            self._speeds = Speeds(self.checkpoint.files, read_bytes)
            chosen = Chosen(prefetch, self._speeds.remembered, self.devices)
            self._hierarchy = build_hierarchy(
                self.checkpoint, anatomy, self.plan, self.config, chosen
            )
            undo.callback(self._hierarchy.close)
            self.model, modules = load(self.checkpoint, anatomy, self.device, self.plan.looks_up)
            self._hierarchy.get_ready()
            parts = (self.model, modules, anatomy, self._hierarchy)
            self._wiring = Wiring(*parts, KeepRouting(), self.config, self.plan)
            undo.callback(self._wiring.close)
            self._learned = Learned(
                self._hierarchy.residency.policy,
                self._hierarchy.runner.planner.predictor,
                (self.config.policy, prefetch),
                self.checkpoint.identity,
            )
            self._cleanup = undo.pop_all()
        self.kernel = self._wiring.kernel  # what computes experts
        self.prefetch, self._shape = prefetch, anatomy.shape
        self._num_ids = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        self._vocab_size = first_number(anatomy.config.get_text_config(), "vocab_size") or 1
        self._running, self._closed = threading.Lock(), False
        self._owner: int | None = None  # thread of the running request
        self._total = (PhaseCounters(), PhaseCounters())
        self.live = Live(self._wiring, self._hierarchy, self._total, self.checkpoint.lossy)
        self._tokenizer: Any = None

    def __enter__(self) -> MoE:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, input_ids: Any, **kwargs: Any) -> Any:
        """One forward pass, as the transformers model's own; returns its output (``.logits``).

        Raises PlanExceededError beyond the planned rows, context or room for logits.
        """
        name_cache(kwargs)
        ids = scored = as_batch(input_ids, self._num_ids)
        config = self.model.config
        self.plan.require(ids.shape[0], ids.shape[1], "input_ids")
        if kwargs.get("decoder_input_ids") is not None:
            scored = kwargs["decoder_input_ids"] = as_batch(kwargs["decoder_input_ids"])
            self.plan.require(scored.shape[0], scored.shape[1], "decoder_input_ids")
        kept = kwargs.get("logits_to_keep", 0)
        positions = kept if isinstance(kept, int) and kept else scored.shape[1]
        self._require_room(ids, scored.shape[0] * positions)
        ids, kwargs = placed((ids, kwargs), self.model.device)
        with self._requesting(generates=False), torch.inference_mode():
            if not (config.is_encoder_decoder and CACHE in kwargs):
                # Their encoders refuse to be told to use a cache.
                kwargs.setdefault("use_cache", CACHE in kwargs)
            return self.model(input_ids=ids, **kwargs)

    def generate(self, input_ids: Any, max_new_tokens: int = 32, **kwargs: Any) -> torch.Tensor:
        """transformers' ``generate``: sampling, streamers, stopping criteria and all.

        input_ids: [rows, length] or [length]. Returns [rows, length + new] token ids. Raises
        PlanExceededError beyond the planned rows or context, CancelledError after ``cancel``.
        """
        ids = as_batch(input_ids, self._num_ids)
        config = self.model.config
        rows = num_rows(self.model.generation_config, ids, kwargs)
        length = context_tokens(config, ids, max_new_tokens, kwargs)
        self.plan.require(rows, length, "prompt and new tokens")
        if not may_be_padded(self.model.generation_config, ids):
            kwargs.setdefault("attention_mask", torch.ones_like(ids))
        cache = take_cache(self.model.generation_config, kwargs, self.new_cache)
        if ids.shape[1] > PREFILL_CHUNK_TOKENS and not config.is_encoder_decoder:
            if cache is not None:
                kwargs.setdefault("prefill_chunk_size", PREFILL_CHUNK_TOKENS)
            else:
                self._require_room(ids, ids.shape[0])
        left = None if config.is_encoder_decoder else tokens_left(ids, cache)
        ids, kwargs = placed((ids, kwargs | own_loop(self.model, kwargs)), self.model.device)
        with self._requesting(generates=True, prompt_left=left), torch.inference_mode():
            tokens = self.model.generate(ids, max_new_tokens=max_new_tokens, **kwargs)
        return placed(tokens, torch.device("cpu"))  # type: ignore[no-any-return]

    def new_cache(self) -> Any:
        """An empty KV cache of the planned context, for ``past_key_values``, or ``cache`` as newer
        libraries say; None for families that must begin every prompt with one the library makes."""
        return new_cache(self.model.config, self.plan.max_context)

    def cancel(self) -> None:
        """End the running request before its next expert that has to be loaded, or else its next
        token; it raises CancelledError."""
        self._hierarchy.cancelled.set()

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded when first asked for.

        Raises CheckpointNotFoundError if it has none; token ids work without.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint)
        return self._tokenizer

    def stats(self, total: bool = False) -> Stats:
        """The report of the last request (or the running one), or of all since opening."""
        request = self._wiring.request
        counters = request.counters or self._hierarchy.counters
        bandwidths = None
        with contextlib.suppress(CheckpointError, OSError):  # a report outlives its disk
            bandwidths = self.bandwidths()
        facts = RunFacts(
            shape=self._shape,
            num_slots=self._hierarchy.residency.directory.num_usable,
            dense_bytes=self.plan.dense_read_bytes,
            bytes_written=self._speeds.bytes_written + self._learned.bytes_written,
            lossy=self.live.lossy,
            bandwidths=bandwidths,
            faults=self.live.faults,
            choices=(self.config.policy, self.prefetch),
            device=speeds_of(self.devices),
            ram_slots=self.plan.num_slots if self.device else 0,
        )
        if total:
            return build_stats(Counters(counters.expert_bytes, *self._total), facts, None, None)
        return build_stats(counters, facts, request.ttft_s, self._wiring.routing())

    @contextlib.contextmanager
    def recording(
        self, logits: bool = False, hidden: bool = False, foresight: int = 0
    ) -> Iterator[TraceRecorder]:
        """Record the routing of every request made inside the block: see ``trace()``.

        logits: all router logits too. hidden: router inputs and embeddings too. foresight: what
        the routers of so many next layers would say already at each one. Raises ConfigError if
        the model cannot tell, or where another recording runs.
        """
        modes = tuple(Foresight(mode, foresight) for mode in FORESIGHT_MODES if foresight)
        meta = {"model": self.path.name, "fingerprint": self.checkpoint.identity}
        with self._wiring.recording(Wishes(logits, hidden, hidden, modes), meta) as recorder:
            yield recorder

    def residency(self) -> list[dict[str, list[int]]]:
        """For every MoE layer, which experts are in which tier: ``{"ram": [...], "disk": ...}``,
        and ``"vram"`` with a device."""
        return self._hierarchy.tiers()

    def bandwidths(self) -> Bandwidths | None:
        """Speeds of this machine: remembered and checked, or measured now (about two seconds).

        None while a request runs and nothing is known: a busy disk must not be remembered.
        """
        return self._speeds.ask(not self._running.locked() and not self._closed)

    def check_integrity(self) -> None:
        """Raise AssertionError if the cache has lost or doubled a slot."""
        self._hierarchy.check_integrity()

    def close(self) -> None:
        """Stop every thread, close files, let go of weights and slots. Idempotent.

        Raises ConfigError from inside a request on its own thread, which would wait for itself.
        """
        if self._owner == threading.get_ident():
            raise ConfigError("close() was called from inside the running request; cancel() it")
        self._closed = True
        self.cancel()
        with self._running:
            try:
                self._learned.save()
            finally:
                self._cleanup.close()
        self._speeds.save()

    def _require_room(self, ids: torch.Tensor, num_logits: int) -> None:
        rows, length = ids.shape
        needed = workspace_bytes(self.model, length, rows, self.model.dtype, pass_tokens=length)
        needed += num_logits * self._vocab_size * 4
        self.plan.require_room(needed, f"{rows} x {length} tokens in one pass")

    @contextlib.contextmanager
    def _requesting(self, generates: bool, prompt_left: int | None = None) -> Iterator[None]:
        """Everything between the start and the end of one request."""
        if not self._running.acquire(blocking=False):
            raise ConfigError("a request is running; one at a time, or cancel() it first")
        self._owner = threading.get_ident()
        try:
            self._hierarchy.cancelled.clear()
            if self._closed:
                raise ConfigError("the model is closed; open it again")
            with deferred_interrupt(self.cancel), computing_on(self.device):
                self._begin_request(generates, prompt_left)
                try:
                    yield
                finally:
                    self._hierarchy.end_request()
                    self._finish()
        finally:
            self._owner = None
            self._running.release()

    def _begin_request(self, generates: bool, prompt_left: int | None) -> None:
        self._hierarchy.counters.take()
        resident = frozenset(self._hierarchy.resident_flat())
        request = Request(time.perf_counter(), resident, generates, prompt_left)
        self._wiring.begin_request(request)
        self._hierarchy.begin_request()

    def _finish(self) -> None:
        counters = self._hierarchy.counters
        self._wiring.finish(counters)
        with self.live.settling:
            for total, part in zip(self._total, (counters.prefill, counters.decode), strict=True):
                total.add(part)
            self._wiring.request.counters = counters.take()
