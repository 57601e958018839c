"""Out of device memory in mid-run: the cache makes room, and the pass is done again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.errors import BudgetError
from moe_infinity.model.cache_name import CACHE
from moe_infinity.model.elsewhere import FullElsewhereError
from moe_infinity.model.kv_cache import PreallocatedLayer
from moe_infinity.model.standing import stand_aside, stand_before

_log = logging.getLogger(__name__)


class UnderPressure:
    """Stands before a model's ``forward``. fault: what was given up, if anything.

    give_up_direction: called before slots go; what knew of them must let go.
    """

    def __init__(
        self, model: Any, hierarchy: VramHierarchy, give_up_direction: Callable[[], None]
    ) -> None:
        self.fault: str | None = None
        self._model, self._hierarchy = model, hierarchy
        self._give_up_direction = give_up_direction
        self._stock = stand_before(model, self.forward)

    def close(self) -> None:
        stand_aside(self._model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises BudgetError where a pass cannot be done again or nothing is left to give."""
        cache = kwargs.get(CACHE)
        length = cache.get_seq_length() if cache is not None else 0
        while True:
            try:
                return self._stock(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                self._make_room(error, cache)
                for layer in getattr(cache, "layers", ()):
                    layer.keep(length)

    def _make_room(self, error: BaseException, cache: Any) -> None:
        self._give_up_direction()
        layers = getattr(cache, "layers", ())  # other kinds have what cannot be taken back
        is_plain = bool(layers) and all(type(layer) is PreallocatedLayer for layer in layers)
        can_again = cache is None or is_plain
        device = error.device if isinstance(error, FullElsewhereError) else 0
        num_gone = self._hierarchy.shrink(device) if can_again else 0
        if not num_gone:
            name = self._hierarchy.memory.devices[device].name
            raise BudgetError(
                f"{name}: out of memory in mid-run, and the cache has "
                f"nothing to give ({str(error).splitlines()[0]}); open the model with less vram "
                f"or a smaller max_context, or close what else uses the GPU"
            ) from error
        left = self._hierarchy.residency.directory.num_usable
        self.fault = f"out of device memory in mid-run: the cache was cut to {left} slots"
        _log.warning("%s", self.fault)
