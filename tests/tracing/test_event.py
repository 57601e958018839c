"""Events count tokens per expert; indices outside the layer mean no expert."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_infinity.tracing.event import Event
from moe_infinity.tracing.recorder import Recorder
from moe_infinity.types import ExpertKey


def event_of(index: list[list[int]], num_experts: int) -> Event:
    ids = np.array(index, dtype=np.int64).reshape(len(index), 2)
    weights = np.linspace(0.1, 1.0, ids.size, dtype=np.float32).reshape(ids.shape)
    return Event(0, "decode", 2, np.zeros(len(ids), dtype=np.int64), ids, weights, num_experts)


@given(st.lists(st.lists(st.integers(-1, 6), min_size=2, max_size=2), max_size=6))
def test_counts_and_weights(index: list[list[int]]) -> None:
    event = event_of(index, 5)
    routed = zip(event.top_k_index.flat, event.top_k_weights.flat, strict=True)
    real = [(expert, weight) for expert, weight in routed if 0 <= expert < 5]
    assert event.counts.tolist() == [sum(e == expert for e, _ in real) for expert in range(5)]
    expected = [sum(float(w) for e, w in real if e == expert) for expert in range(5)]
    np.testing.assert_allclose(event.weights, expected, rtol=1e-6)
    assert event.experts.tolist() == sorted({int(e) for e, _ in real})
    assert event.keys == [ExpertKey(2, e) for e in event.experts]


def test_recorder_says_when_it_is_full() -> None:
    recorder = Recorder(max_events=2)
    for _ in range(3):
        recorder.record(event_of([[0, 3]], 5))
    assert len(recorder.accesses) == 2 and not recorder.is_complete
    assert recorder.accesses[0].experts.tolist() == [0, 3]
    recorder.clear()
    assert recorder.is_complete and not recorder.accesses
