"""How many misses the processor takes: not more than pays by its own account, or for long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_infinity.residency.miss_split import MissSplit

NUM_LAYERS = 4
EXPERT_BYTES = 10_000_000


def spend(split: MissSplit, num_passes: int, with_s: float, without_s: float) -> None:
    for _ in range(num_passes):
        split.pays.spend(with_s if split.pays.is_on else without_s, NUM_LAYERS)


def switched_on(link_gbps: float, cpu_gbps: float) -> MissSplit:
    split = MissSplit("auto", link_gbps, cpu_gbps, NUM_LAYERS)
    spend(split, 16, 1.0, 1.0)
    assert split.pays.is_on
    return split


@given(
    link_gbps=st.floats(1, 100),
    cpu_gbps=st.floats(1, 200),
    fixed_s=st.floats(0, 0.01),
    num_misses=st.integers(0, 12),
)
def test_sharing_is_at_most_as_long_as_copying(
    link_gbps: float, cpu_gbps: float, fixed_s: float, num_misses: int
) -> None:
    split = switched_on(link_gbps, cpu_gbps)
    split.fixed_s = fixed_s
    count = split.choose(num_misses, EXPERT_BYTES)
    copy_s, cpu_s = EXPERT_BYTES / link_gbps / 1e9, EXPERT_BYTES / cpu_gbps / 1e9
    took_s = max((num_misses - count) * copy_s, fixed_s + count * cpu_s if count else 0.0)
    assert 0 <= count <= num_misses
    assert took_s <= num_misses * copy_s + 1e-12


@pytest.mark.parametrize(("mode", "count"), [("copy", 0), ("cpu", 5), ("auto", 0)])
def test_before_any_trial(mode: str, count: int) -> None:
    split = MissSplit(mode, 24.0, 40.0, NUM_LAYERS)  # type: ignore[arg-type]
    assert split.choose(5, EXPERT_BYTES) == count


def test_equal_speeds_share_equally() -> None:
    split = switched_on(20.0, 20.0)
    split.fixed_s = 0.0
    assert split.choose(8, EXPERT_BYTES) == 4


def test_a_step_that_costs_more_than_it_saves_is_not_made() -> None:
    split = switched_on(24.0, 40.0)
    for _ in range(200):
        split.learn(1, EXPERT_BYTES, 0.05)
    assert split.choose(2, EXPERT_BYTES) == 0


def test_what_is_slower_is_left_within_50_tokens() -> None:
    split = MissSplit("auto", 24.0, 40.0, NUM_LAYERS)
    used = []
    for _ in range(400):
        spend(split, 1, with_s=1.5, without_s=1.0)
        used.append(split.choose(8, EXPERT_BYTES) > 0)
    assert any(used[:50]), "it was never tried"
    assert not any(used[40:50])
    assert sum(used) / len(used) <= 0.1


def test_what_is_quicker_stays() -> None:
    split = MissSplit("auto", 24.0, 40.0, NUM_LAYERS)
    used = []
    for _ in range(400):
        spend(split, 1, with_s=1.0, without_s=1.5)
        used.append(split.choose(8, EXPERT_BYTES) > 0)
    assert sum(used[16:]) / len(used[16:]) > 0.9
