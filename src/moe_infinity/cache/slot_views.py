"""Views of what lies in slots, kept for as long as they are true."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe_infinity.kernels.base import Views
from moe_infinity.kernels.formats import is_viewable, part_views
from moe_infinity.types import ExpertKey, ExpertSpec, Part


class SlotViews:
    """Of most models all experts lie in their slots in the same way: a slot's views serve whichever
    is there."""

    def __init__(self, specs: Mapping[ExpertKey, ExpertSpec]) -> None:
        self._specs = specs
        numbers: dict[tuple[Part, ...], int] = {}  # of layouts
        self._layouts = {k: numbers.setdefault(s.parts, len(numbers)) for k, s in specs.items()}
        self._kept: dict[int, tuple[int, torch.Tensor, Views]] = {}  # layout, memory, views

    def of(self, key: ExpertKey, slot: int, memory: torch.Tensor) -> Views:
        """The parts of ``key`` in its slot, whose memory is [slot_bytes] uint8."""
        layout = self._layouts[key]
        kept = self._kept.get(slot)
        if kept is not None and kept[0] == layout and kept[1] is memory:
            return kept[2]
        spec = self._specs[key]
        views = part_views(spec, memory)
        if is_viewable(spec):  # copies must not outlive the call: they are in no budget
            self._kept[slot] = (layout, memory, views)
        return views

    def clear(self) -> None:
        self._kept.clear()
