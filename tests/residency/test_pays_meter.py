"""Whether looking ahead pays is found out by doing without it in turns."""

import pytest

from moe_infinity.residency.meters import PaysMeter


def num_on(
    meter: PaysMeter,
    with_it: tuple[float, float],
    without_s: float,
    num_passes: int,
    num_events: int = 1,
) -> int:
    """Of so many passes; with_it: seconds of an event, and those in which it waited."""
    on = 0
    for _ in range(num_passes):
        on += meter.is_on
        wall_s, stall_s = with_it if meter.is_on else (without_s, 0.0)
        meter.spend(num_events * wall_s, num_events, num_events * stall_s)
    return on


def share_on(meter: PaysMeter, with_it_s: float, without_s: float, num_events: int) -> float:
    return num_on(meter, (with_it_s, 0.0), without_s, num_events) / num_events


def passes_on(meter: PaysMeter, with_it: tuple[float, float], without_s: float, num: int) -> int:
    return num_on(meter, with_it, without_s, num, num_events=10)


@pytest.mark.parametrize(("with_it_s", "low", "high"), [(0.5, 0.9, 1.0), (2.0, 0.0, 0.1)])
def test_the_faster_way_is_kept(with_it_s: float, low: float, high: float) -> None:
    meter = PaysMeter(window=10)
    share_on(meter, with_it_s, 1.0, 50)  # both were tried
    assert low <= share_on(meter, with_it_s, 1.0, 3200) <= high


def test_the_other_way_is_tried_again() -> None:
    """A model that grows into a cache: first it pays, later it does not, and the reverse."""
    meter = PaysMeter(window=10)
    share_on(meter, 0.5, 1.0, 500)
    share_on(meter, 2.0, 1.0, 20)
    assert share_on(meter, 2.0, 1.0, 3200) < 0.15
    share_on(meter, 0.5, 1.0, 640)
    assert share_on(meter, 0.5, 1.0, 3200) > 0.85


def test_it_begins_without() -> None:
    assert not PaysMeter(window=10).is_on


def test_an_empty_cache_speaks_for_neither_way() -> None:
    meter = PaysMeter(window=10)
    share_on(meter, 9.0, 9.0, 10)
    assert share_on(meter, 1.5, 1.0, 3200) < 0.1


def test_a_first_short_answer_is_not_tried_on() -> None:
    meter = PaysMeter(window=10, settling=4)
    assert share_on(meter, 0.5, 1.0, 50) == 0
    assert share_on(meter, 0.5, 1.0, 10) == 1
    share_on(meter, 0.5, 1.0, 20)
    assert share_on(meter, 0.5, 1.0, 3200) > 0.9


@pytest.mark.parametrize(("waited_s", "expected"), [(0.1, 0), (0.3, 30)])
def test_where_much_is_waited_for_it_is_tried_early(waited_s: float, expected: int) -> None:
    meter, on = PaysMeter(window=10, settling=4), 0
    for _ in range(40):
        on += meter.is_on
        meter.spend(1.0, 1, waited_s)
    assert on == expected


def test_what_was_tried_early_has_to_pay_too() -> None:
    meter = PaysMeter(window=10, settling=4)
    for _ in range(80):
        meter.spend(1.5 if meter.is_on else 1.0, 1, 0.3)
    assert share_on(meter, 1.5, 1.0, 3200) < 0.1


def test_passes_that_grow_dearer_do_not_make_the_other_way_look_cheap() -> None:
    """A long conversation: what a trial cost long ago says nothing of now."""
    meter, on, cost_s = PaysMeter(window=10), 0, 1.0
    for _ in range(4000):
        cost_s *= 1.001
        on += meter.is_on
        meter.spend(1.2 * cost_s if meter.is_on else cost_s)
    assert on < 0.1 * 4000


def test_one_window_that_was_dear_for_other_reasons_is_soon_made_good() -> None:
    meter = PaysMeter(window=10)
    share_on(meter, 9.0, 9.0, 10)
    share_on(meter, 1.5, 4.0, 10)  # much was missed without it
    share_on(meter, 1.5, 1.0, 100)
    assert share_on(meter, 1.5, 1.0, 3200) < 0.1


def test_a_trial_that_nothing_can_save_is_cut_short() -> None:
    lost, slower = (1.5, 0.2), (1.5, 0.7)  # without waiting 1.3 and 0.8 of what it takes without
    assert passes_on(PaysMeter(window=80), lost, 1.0, 64) == 2
    assert passes_on(PaysMeter(window=80), slower, 1.0, 64) >= 16
    meter = PaysMeter(window=80)
    passes_on(meter, lost, 1.0, 64)
    assert passes_on(meter, lost, 1.0, 3200) < 3200 / 32
    passes_on(meter, (0.5, 0.1), 1.0, 640)
    assert passes_on(meter, (0.5, 0.1), 1.0, 640) > 600, "it is tried again"


def test_looking_ahead_that_grows_dearer_is_left_in_its_window() -> None:
    meter = PaysMeter(window=80)
    passes_on(meter, (0.5, 0.0), 1.0, 64)
    assert passes_on(meter, (0.5, 0.0), 1.0, 80) > 70
    assert passes_on(meter, (4.0, 0.0), 1.0, 16) <= 8


@pytest.mark.parametrize("passes_each", [100, 300])
def test_short_and_long_contexts_in_turns(passes_each: int) -> None:
    """What a pass cost without it long ago, in a short context, is no verdict in a long one."""
    meter = PaysMeter(window=80)
    on = sum(
        passes_on(meter, (0.7 * cost_s, 0.1), cost_s, passes_each) for cost_s in (1.0, 2.0) * 8
    )
    assert on > 0.85 * 16 * passes_each
