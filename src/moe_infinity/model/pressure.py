"""Out of device memory in mid-run: the cache makes room, and the pass is done again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.errors import BudgetError, DeviceError
from moe_infinity.model.kv_cache import PreallocatedLayer

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
        self._stock: Callable[..., Any] = model.forward
        self._give_up_direction = give_up_direction
        model.forward = self.forward

    def close(self) -> None:
        self._model.__dict__.pop("forward", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises BudgetError where a pass cannot be done again or nothing is left to give, and
        DeviceError where the device does not answer any more."""
        cache = kwargs.get("past_key_values")
        length = cache.get_seq_length() if cache is not None else 0
        while True:
            try:
                return self._stock(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                self._make_room(error, cache)
                for layer in getattr(cache, "layers", ()):
                    layer.keep(length)
            except torch.AcceleratorError as error:
                name = self._hierarchy.device.name
                raise DeviceError(
                    f"{name}: lost in mid-run ({str(error).splitlines()[0]}), expected it to "
                    f"answer; see the system's log, and open the model anew"
                ) from error

    def _make_room(self, error: BaseException, cache: Any) -> None:
        self._give_up_direction()
        layers = getattr(cache, "layers", ())
        can_again = all(type(layer) is PreallocatedLayer for layer in layers)
        num_gone = self._hierarchy.shrink() if can_again else 0
        if not num_gone:
            raise BudgetError(
                f"{self._hierarchy.device.name}: out of memory in mid-run, and the cache has "
                f"nothing to give ({str(error).splitlines()[0]}); open the model with less vram "
                f"or a smaller max_context, or close what else uses the GPU"
            ) from error
        left = self._hierarchy.residency.directory.num_usable
        self.fault = f"out of device memory in mid-run: the cache was cut to {left} slots"
        _log.warning("%s", self.fault)
