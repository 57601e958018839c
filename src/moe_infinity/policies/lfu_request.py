"""Least frequently used in the running request; ties go to the least recently used."""

from __future__ import annotations

from moe_infinity.policies.lfu import Policy as WholeTraceLfu


class Policy(WholeTraceLfu):
    """LFU whose counts start anew with every request."""

    def begin_request(self) -> None:
        self._uses[:] = 0
