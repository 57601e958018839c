"""Feedback for prefetching: does it pay, and how far ahead should it look? Reads no clock."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

_MEMORY = 0.02  # weight of the newest guess in the running share of right ones: about 50 guesses
_TURNS = 2  # windows of each way
_LEAST_PATIENCE = 4
_MARGIN = 1.1  # two passes are no more exact
_MUCH_WAITING = 0.15  # of the time; what looking ahead could save, and more than it costs
_PRIOR = 0.5


@dataclass
class StallMeter:
    """Says whether there is enough waiting for looking ahead to be worth its own time.

    share: running share of the time spent waiting for loads. Looking ahead ends below ``little``
    and begins again above ``much``.
    """

    little: float = 0.02
    much: float = 0.04
    share: float = _PRIOR
    is_worth_it: bool = True

    def spend(self, stall_s: float, wall_s: float, num_events: int = 1) -> None:
        """Some events, from the end of the one before: seconds waited and seconds passed."""
        if wall_s <= 0:
            return
        weight = 1 - (1 - _MEMORY) ** num_events
        self.share += weight * (min(1.0, stall_s / wall_s) - self.share)
        if self.share < self.little:
            self.is_worth_it = False
        elif self.share > self.much:
            self.is_worth_it = True


@dataclass
class PaysMeter:
    """Finds out whether looking ahead makes decode faster here: first without it, then with it.

    Its own time, and the processor that reads take from products, differ from machine to machine
    and from model to model; what counts is the time between events with it and without. What is
    asked for differs from window to window too, so each way is tried ``_TURNS`` times in turn at
    first; the first windows, ``settling`` of them, tell nothing, for the cache is empty then, and a
    first short answer is over before a trial could pay for itself: behind the first window it looks
    ahead where much of the time was waited for loads. The way that was slower is tried again for
    one ``window`` of events, and judged by those right before it: after a few windows, and each
    time that it is slower again after twice as many, up to ``retry``.

    A trial of looking ahead that nothing can save ends after a quarter of its window: where it
    would be the slower way, and not by little, even if nobody had to wait for a load. Blocks run
    in compiled code as long as nobody looks ahead by more than later routers, so with few misses
    such a trial costs twice the time.
    """

    window: int
    retry: int = 32
    settling: int = 1
    is_on: bool = False
    _num_events: int = 0
    _spent_s: float = 0.0
    _waited_s: float = 0.0  # of them
    _num_windows: int = 0
    _best: bool | None = None  # the way that was quicker
    _patience: int = _LEAST_PATIENCE  # windows until the other one is tried again
    _num_waited: int = 0
    _costs: dict[bool, deque[float]] = field(  # seconds per event of the last windows
        default_factory=lambda: {way: deque(maxlen=_TURNS) for way in (False, True)}
    )

    def spend(self, wall_s: float, num_events: int = 1, stall_s: float = 0.0) -> None:
        """Some events, from the end of the one before: seconds passed, and those of them in which
        loads were waited for."""
        self._num_events += num_events
        self._spent_s += wall_s
        self._waited_s += stall_s
        is_lost = self._is_lost()
        if self._num_events < self.window and not is_lost:
            return
        cost_s = self._spent_s / self._num_events
        is_waiting = self._waited_s > _MUCH_WAITING * self._spent_s
        self._num_events, self._spent_s, self._waited_s = 0, 0.0, 0.0
        self._num_windows += 1
        if self._num_windows <= self.settling:
            self.is_on = self.is_on or is_waiting
            return
        self._costs[self.is_on].append(cost_s)
        if is_lost and self._best:  # by what it cost long ago: look anew
            self._try_other()
        elif is_lost:
            self._best = False
            self._judge()
        elif self._best is None and len(self._costs[not self.is_on]) < _TURNS:
            self.is_on = not self.is_on
        elif self._best is None or self.is_on != self._best:
            self._judge()
        else:
            self._wait()

    def _is_lost(self) -> bool:
        """Whether this window need not be gone through: it would not be quicker without waiting."""
        without_s = self._costs[False]
        if not self.is_on or not without_s or self._num_events < self.window / 4:
            return False
        least_s = (self._spent_s - self._waited_s) / self._num_events
        return least_s > _MARGIN * statistics.mean(without_s)

    def _judge(self) -> None:
        without_s, with_s = (statistics.mean(self._costs[way]) for way in (False, True))
        best = with_s <= without_s
        is_known = best == self._best
        self._patience = min(self.retry, 2 * self._patience) if is_known else _LEAST_PATIENCE
        self._best = self.is_on = best
        self._num_waited = 0

    def _wait(self) -> None:
        self._num_waited += 1
        if self._num_waited >= self._patience:
            self._try_other()

    def _try_other(self) -> None:
        self.is_on = not self.is_on
        self._costs[self.is_on].clear()  # of other times


@dataclass
class QuickerMeter:
    """Finds out which of two ways of doing a pass is the quicker here, by medians: a way's first
    passes compile what it needs. The other one is tried again for one window in ``retry``."""

    window: int = 16
    retry: int = 64
    is_on: bool = False  # the way that is tried second
    _spent_s: list[float] = field(default_factory=list)
    _costs_s: dict[bool, float] = field(default_factory=dict)
    _num_windows: int = 0

    def spend(self, seconds: float) -> None:
        """One pass, done the way that ``is_on`` says."""
        self._spent_s.append(seconds)
        if len(self._spent_s) < self.window:
            return
        self._costs_s[self.is_on] = statistics.median(self._spent_s)
        self._spent_s.clear()
        self._num_windows += 1
        if len(self._costs_s) < 2 or self._num_windows % self.retry == 0:
            self.is_on = not self.is_on
        else:
            self.is_on = self._costs_s[True] < self._costs_s[False]


@dataclass
class WasteMeter:
    """Switches prefetching off when its guesses do not pay, and on again when they would.

    Guesses are judged whether they were loaded or not, so it also sees when a predictor that is
    switched off has become good. Between the two bounds it throttles: fewer loads at a time.
    """

    pays_not: float = 0.25  # off below this share of right guesses
    pays: float = 0.4  # on again above
    share_right: float = _PRIOR
    is_on: bool = True

    def judge(self, num_right: int, num_wrong: int) -> None:
        """Guesses that a router has confirmed or disproved."""
        for was_right in [1.0] * num_right + [0.0] * num_wrong:
            self.share_right += _MEMORY * (was_right - self.share_right)
        if self.share_right < self.pays_not:
            self.is_on = False
        elif self.share_right > self.pays:
            self.is_on = True

    def allowance(self, most: int) -> int:
        """Loads ahead at a time, at most ``most``."""
        if not self.is_on:
            return 0
        span = (self.share_right - self.pays_not) / (self.pays - self.pays_not)
        return max(1, round(most * min(1.0, span)))


@dataclass
class Threshold:
    """The chance of use from which an expert is loaded ahead.

    While loads arrive in time the link has time to spare, and a guess may be wrong often; the more
    of them come late, the more a wrong one delays the right ones behind it.
    """

    idle: float = 0.25  # where every load is in time
    busy: float = 0.75  # where every load comes late
    late_share: float = 0.5

    def judge(self, num_late: int, num_in_time: int) -> None:
        """Right guesses that were loaded ahead, and whether they had arrived when needed."""
        for was_late in [1.0] * num_late + [0.0] * num_in_time:
            self.late_share += _MEMORY * (was_late - self.late_share)

    @property
    def chance(self) -> float:
        return self.idle + (self.busy - self.idle) * self.late_share


@dataclass
class Horizon:
    """How many layers ahead to load: further when loads come late, nearer when they go to waste.

    After the feedback rule of ExpertFlow (Shen et al., arXiv 2510.26730), with counts in place of
    times, so that a replay decides the same.
    """

    most: int
    layers: float = 2.0
    step_late: float = 0.25
    step_wasted: float = 0.05

    def learn(self, num_late: int, num_wasted: int) -> None:
        change = self.step_late * num_late - self.step_wasted * num_wasted
        self.layers = min(float(self.most), max(1.0, self.layers + change))

    @property
    def reach(self) -> int:
        return round(self.layers)
