"""Shows predictors and traces what they asked for, and costs nothing where nobody asked."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_infinity.cache.base import Hierarchy
from moe_infinity.config import PREFILL_CHUNK_TOKENS
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.model.routers import RouterTaps, Wishes, as_recorded
from moe_infinity.model.taps import Step
from moe_infinity.predictors.base import Foresight, ForesightMode
from moe_infinity.tracing.trace import MISSING
from moe_infinity.tracing.trace_recorder import TraceRecorder

_log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What belongs to one event, as far as somebody asked: [T, E], [T, H], [T, D, E]."""

    router_logits: NDArray[np.float32] | None = None
    router_input: NDArray[np.float32] | None = None
    foreseen: NDArray[np.float32] | None = None


_NOTHING = Seen()
_LEARNS_EACH = 4  # pass in which nobody looks ahead
LONE = np.ones(1, dtype=np.bool_)  # token of a pass, and real


@dataclass
class Observer:
    """Between the model's routers and those who watch them.

    names: of the experts modules, in the order of layers. wish: the predictor's own foresight,
    which is passed on to the cache.
    """

    model: nn.Module
    names: list[str]
    num_experts: list[int]
    hierarchy: Hierarchy
    kernel: ExpertKernel
    wishes: Wishes
    wish: Foresight | None
    trace: TraceRecorder | None = None
    traced: tuple[Foresight, ...] = ()  # the trace's
    fault: str | None = None

    def __post_init__(self) -> None:
        self._taps: RouterTaps | None = None
        self.is_paused = False  # nobody may be asked: the device decides, without the host
        self._handles: list[RemovableHandle] = []
        self._norm_handles: list[RemovableHandle] = []
        self._step = Step(0, "prefill", 1, 1)
        self.ask(self.wishes)

    def ask(self, wishes: Wishes) -> None:
        """Watch for this too from now on. Raises ConfigError if the model cannot tell."""
        self.wishes = self.wishes | wishes
        if self.wishes.needs_routers and self._taps is None:
            self._taps = RouterTaps(self.model, self.names, self.num_experts, self.kernel)
        self._set_up()

    def drop(self, wishes: Wishes) -> None:
        """Watch for no more than ``wishes`` from now on."""
        self.wishes = wishes
        self._set_up()
        if self._taps is not None and not wishes.needs_routers:
            self._taps.close()
            self._taps = None

    def close(self) -> None:
        self.drop(Wishes())

    def _set_up(self) -> None:
        self._modes = {wish.mode for wish in self.wishes.foresight}
        wanted = "next_norm" in self._modes
        if wanted and not self._handles:
            assert self._taps is not None
            self._norm_handles = self._taps.watch_norms()
            self._handles = [
                block.register_forward_hook(self._after_block(layer))
                for layer, block in enumerate(self._taps.blocks)
            ]
        if not wanted:
            self._stop_watching_norms()
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def begin_step(self, step: Step) -> NDArray[np.float32] | None:
        """A forward pass starts; returns the embeddings [T, H] of its tokens, padding left out,
        where asked for."""
        self._step = step
        if self._taps is not None:
            self._taps.begin_step()
        embeddings = self._embed(step) if self.wishes.embeddings else None
        if self.trace is not None:
            rows = step.request_rows(step.num_rows * step.length)
            ids = step.token_ids
            self.trace.begin_pass(step.number, step.phase, rows, step.is_real, ids, embeddings)
        if embeddings is None or step.is_real is None:
            return embeddings
        return embeddings[step.is_real]

    def end_step(self) -> None:
        if self.trace is not None:
            self.trace.end_pass()

    def see_token(
        self,
        layer: int,
        x: torch.Tensor,
        logits: torch.Tensor,
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
    ) -> Seen:
        """A router ran without its module: on x [1, H] it said logits [1, E] and chose ids and
        weights [1, K]."""
        if self._taps is not None and self.wants_routers:
            self._taps.show(layer, x, logits)
            return self.see(layer, 0, ids, weights, LONE)
        if self.is_learning:
            self.learn_input(layer, x)
        self.note_token(layer, ids, weights)
        return _NOTHING

    @property
    def wants_routers(self) -> bool:
        """Whether somebody wants more of this pass's events than experts and their weights."""
        if self._taps is None:
            return False
        return self.wishes.in_events or bool(self._awaited())

    @property
    def records_routers(self) -> bool:
        """Whether somebody beside a predictor that looks ahead wants that."""
        if self._taps is None:
            return False
        return self.wishes.in_events or (self.trace is not None and bool(self.traced))

    def changes(self, layer: int, depth: int) -> NDArray[np.float32]:
        """The mean change, as far as it is learned, from the input of a layer's router to those of
        the next ``depth``: [depth, H] or more rows, which change as it is learned."""
        assert self._taps is not None, "nobody asked for routers"
        return self._taps.changes(layer, depth)

    @property
    def is_learning(self) -> bool:
        """Whether ``learn_input`` is to be told of this pass though nobody asks routers in it: what
        foresight learns must not grow stale. Now and then, for it costs."""
        is_residual = self._taps is not None and "residual" in self._modes
        return is_residual and self._step.number % _LEARNS_EACH == 0

    def learn_input(self, layer: int, x: torch.Tensor) -> None:
        """What a router is shown, [1, H], in a pass of decode."""
        assert self._taps is not None, "nobody asked for routers"
        self._taps.see_input(layer, x)

    def note_token(self, layer: int, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        """Record what was chosen [1, K] for one token, where that is all anybody wants."""
        if self.trace is not None:
            self.trace.record_token(layer, ids, weights)

    def see(
        self,
        layer: int,
        start: int,
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        real: NDArray[np.bool_],
    ) -> Seen:
        """One layer's routing of the tokens from ``start`` on: ids and weights [T, K]; real: [T]
        which of them are in the event."""
        seen = Seen()
        if self._taps is not None:
            seen = self._see_router(self._taps, layer, start, len(ids))
        if self.trace is not None:
            routed = (ids >= 0) & (ids < self.num_experts[layer])
            known = ids if routed.all() else np.where(routed, ids, MISSING)
            found = {"ids": known, "weights": weights, "logits": seen[0], "hidden": seen[1]}
            self._note(layer, start, found)
        return seen if real.all() else Seen(*(v if v is None else v[real] for v in seen))

    def _see_router(self, taps: RouterTaps, layer: int, start: int, count: int) -> Seen:
        last = taps.last(layer, start, count)
        if last is None:
            return Seen()
        shown, said = last
        if self._norm_handles:
            taps.learn_norms(layer, shown)
            if layer == len(self.names) - 1:
                self._stop_watching_norms()
        logits = as_recorded(said) if self.wishes.router_logits else None
        hidden = as_recorded(shown) if self.wishes.router_input else None
        foreseen = None
        if self._step.phase == "decode":
            if "residual" in self._modes:
                taps.see_input(layer, shown)
            foreseen = self._foresee_input(taps, layer, start, shown)
        elif count < PREFILL_CHUNK_TOKENS:
            taps.forget()
        return Seen(logits, hidden, foreseen)

    def _foresee_input(
        self, taps: RouterTaps, layer: int, start: int, x: torch.Tensor
    ) -> NDArray[np.float32] | None:
        foreseen = None
        for mode, depth in self._awaited().items():
            if mode != "next_norm":
                said = self._ask(taps, mode, layer, x, depth)
                if said is not None:
                    foreseen = self._tell(layer, start, mode, said, foreseen)
        return foreseen

    def _ask(
        self, taps: RouterTaps, mode: ForesightMode, layer: int, x: torch.Tensor, depth: int
    ) -> NDArray[np.float32] | None:
        """What later routers say; a model whose routers cannot be asked is left in peace."""
        try:
            return taps.foresee(mode, layer, x, depth)
        except Exception as error:
            self.fault = f"looking ahead failed ({type(error).__name__}: {error}); it was given up"
            _log.warning("%s", self.fault, exc_info=error)
            self.wish, self.traced = None, ()
            return None

    def _after_block(self, layer: int) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if self._step.phase != "decode" or self._taps is None or self._norm_handles:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            x = hidden.reshape(-1, hidden.shape[-1])
            for mode, depth in self._awaited().items():
                if mode == "next_norm":
                    said = self._ask(self._taps, mode, layer, x, depth)
                    foreseen = None if said is None else self._tell(layer, 0, mode, said, None)
                    if foreseen is not None:
                        self.hierarchy.foresee(layer, foreseen)

        return look

    def _awaited(self) -> dict[ForesightMode, int]:
        """Depth by mode: a trace records everything, the cache listens while it waits for loads."""
        if self.is_paused:
            return {}
        wishes = list(self.traced) if self.trace is not None else []
        if self.wish is not None and self.hierarchy.looks_ahead():
            wishes.append(self.wish)
        depths: dict[ForesightMode, int] = {}
        for mode, depth in wishes:
            depths[mode] = max(depth, depths.get(mode, 0))
        return depths

    def _tell(
        self,
        layer: int,
        start: int,
        mode: ForesightMode,
        said: NDArray[np.float32],
        foreseen: NDArray[np.float32] | None,
    ) -> NDArray[np.float32] | None:
        """Record what the trace asked for; returns what the predictor did, or ``foreseen``."""
        for wish in self.traced if self.trace is not None else ():
            if wish.mode == mode:
                self._note(layer, start, {f"foresight.{mode}": said[:, : wish.depth]})
        if self.wish is not None and self.wish.mode == mode:
            return said[:, : self.wish.depth]
        return foreseen

    def _note(self, layer: int, start: int, found: dict[str, NDArray[Any] | None]) -> None:
        if self.trace is None:
            return
        for name, values in found.items():
            if values is not None:
                self.trace.record(name, layer, start, values)

    def _stop_watching_norms(self) -> None:
        for handle in self._norm_handles:
            handle.remove()
        self._norm_handles = []

    def _embed(self, step: Step) -> NDArray[np.float32] | None:
        if step.token_ids is None:
            return None
        embed: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.from_numpy(step.token_ids).to(embed.weight.device)
        vectors: torch.Tensor = embed(ids)
        return as_recorded(vectors)
