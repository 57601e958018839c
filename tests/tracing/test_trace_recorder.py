"""What a running model tells, pass by pass, becomes a trace."""

from typing import Any

import numpy as np
import pytest

from moe_infinity.tracing.trace_recorder import TraceRecorder
from support.routing import grid

SHAPE = grid(3, 8, top_k=2)
IDS = np.array([[5, 1], [0, 7], [3, 2]])  # [L, K]
WEIGHTS = np.array([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], dtype=np.float32)


def recorded(told: Any, num_passes: int = 3) -> dict[str, np.ndarray]:
    """The arrays of a prompt of two tokens and some tokens of decode, which ``told`` tells."""
    recorder = TraceRecorder(SHAPE, {"model": "tiny"})
    recorder.begin_request()
    recorder.begin_pass(1, "prefill", np.zeros(2, dtype=np.int64), None, np.array([4, 9]))
    for layer in range(3):
        recorder.record("ids", layer, 0, np.repeat(IDS[layer : layer + 1], 2, axis=0))
        recorder.record("weights", layer, 0, np.repeat(WEIGHTS[layer : layer + 1], 2, axis=0))
    recorder.end_pass()
    for number in range(num_passes):
        token = np.array([number])
        recorder.begin_pass(2 + number, "decode", np.zeros(1, dtype=np.int64), None, token)
        told(recorder, number)
        recorder.end_pass()
    trace = recorder.trace()
    trace.require_complete("all")
    return {
        name: getattr(trace, name)
        for name in ("ids", "weights", "step", "position", "phase", "request", "token_ids")
    }


def one_by_one(recorder: TraceRecorder, number: int) -> None:
    for layer in range(3):
        recorder.record("ids", layer, 0, IDS[None, layer])
        recorder.record("weights", layer, 0, WEIGHTS[None, layer])


def at_once(recorder: TraceRecorder, number: int) -> None:
    for layer in range(3):
        recorder.record_token(layer, IDS[None, layer], WEIGHTS[None, layer])


def mixed(recorder: TraceRecorder, number: int) -> None:
    """Some layers of a model are run by compiled code, others are not."""
    recorder.record_token(0, IDS[None, 0], WEIGHTS[None, 0])
    recorder.record("ids", 1, 0, IDS[None, 1])
    recorder.record("weights", 1, 0, WEIGHTS[None, 1])
    recorder.record_token(2, IDS[None, 2], WEIGHTS[None, 2])


@pytest.mark.parametrize("told", [at_once, mixed])
def test_a_lone_token_is_recorded_as_any_other(told: Any) -> None:
    found, expected = recorded(told), recorded(one_by_one)
    assert found["position"].tolist() == [0, 1, 2, 3, 4]
    assert found["ids"][3].tolist() == IDS.tolist()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype
        assert np.array_equal(array, found[name]), name


def test_layers_that_choose_fewer() -> None:
    def told(recorder: TraceRecorder, number: int) -> None:
        recorder.record_token(0, IDS[None, 0], WEIGHTS[None, 0])
        recorder.record_token(1, IDS[None, 1, :1], WEIGHTS[None, 1, :1])
        recorder.record_token(2, IDS[None, 2], WEIGHTS[None, 2])

    found = recorded(told)
    assert found["ids"][2].tolist() == [[5, 1], [0, -1], [3, 2]]
    assert found["weights"][2].tolist() == [[0.75, 0.25], [0.5, 0.0], [1.0, 0.0]]


def test_other_tokens_than_the_pass_has() -> None:
    """An image's, in a layer that sees no others."""
    recorder = TraceRecorder(SHAPE, {})
    recorder.begin_request()
    recorder.record_token(0, IDS[None, 0], WEIGHTS[None, 0])  # before any pass
    recorder.begin_pass(1, "prefill", np.zeros(2, dtype=np.int64), None, None)
    recorder.record_token(0, IDS[None, 0], WEIGHTS[None, 0])
    recorder.end_pass()
    assert recorder.trace().num_tokens == 0
