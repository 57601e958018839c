"""learned: the numpy networks are the torch ones; which rows speak, and when."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_infinity.errors import TraceError
from moe_infinity.predictors.learned import FORM, STRIDE, Predictor
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import save_state
from moe_infinity.training.learned import arrays_of, new_network
from support.routing import event, grid

LAYERS, EXPERTS, WIDTH = 4, 6, 5
SHAPE = grid(LAYERS, EXPERTS)


def loaded(folder: Path) -> tuple[Predictor, list[torch.nn.Sequential], torch.Tensor, torch.Tensor]:
    """A predictor with random networks, and the torch ones for inputs (x - mean) * scale."""
    torch.manual_seed(0)
    networks = [new_network(WIDTH, EXPERTS) for _ in range(LAYERS)]
    mean, scale = torch.randn(WIDTH), torch.rand(WIDTH) + 0.5
    arrays = [arrays_of(network, mean, scale) for network in networks]
    stacked = {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}
    save_state(folder / "networks", FORM, stacked, SHAPE, "of this model")
    predictor = Predictor(SHAPE)
    predictor.load(folder / "networks")
    return predictor, networks, mean, scale


def layer_event(layer: int, inputs: np.ndarray) -> Event:
    ids = np.tile(np.arange(2), (len(inputs), 1))
    weights = np.full(ids.shape, 0.5, dtype=np.float32)
    rows = np.zeros(len(inputs), dtype=np.int64)
    return Event(0, "decode", layer, rows, ids, weights, EXPERTS, router_input=inputs)


def inputs_of(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, WIDTH)).astype(np.float32)


def test_computes_what_torch_computes(tmp_path: Path) -> None:
    predictor, networks, mean, scale = loaded(tmp_path)
    inputs = inputs_of(7)
    for layer, network in enumerate(networks):
        with torch.no_grad():
            wanted = network((torch.from_numpy(inputs) - mean) * scale).sigmoid()
        got = predictor.chances(layer, inputs)
        np.testing.assert_allclose(got.reshape(7, -1), wanted.numpy(), atol=1e-5)


def test_several_tokens_want_what_any_of_them_wants(tmp_path: Path) -> None:
    predictor = loaded(tmp_path)[0]
    inputs = inputs_of(3)
    each = predictor.chances(0, inputs)
    predictor.observe(layer_event(0, inputs))
    scores = predictor.predict()
    assert scores is not None
    wanted = 1 - (1 - each[0]) * (1 - each[1]) * (1 - each[2])
    np.testing.assert_allclose(scores[1 : 1 + STRIDE], wanted, atol=1e-6)


def test_speaks_of_two_layers_until_they_ran(tmp_path: Path) -> None:
    predictor = loaded(tmp_path)[0]
    predictor.begin_request()
    assert predictor.predict() is None
    spoken = []
    for layer in range(LAYERS):
        predictor.observe(layer_event(layer, inputs_of(1, layer)))
        scores = predictor.predict()
        assert scores is not None
        spoken.append(np.flatnonzero(scores.any(axis=1)).tolist())
    assert spoken == [[1, 2], [2, 3], [3], []]


def test_the_nearer_saying_replaces_the_farther(tmp_path: Path) -> None:
    predictor = loaded(tmp_path)[0]
    for layer in (0, 1):
        predictor.observe(layer_event(layer, inputs_of(1, layer)))
    scores = predictor.predict()
    assert scores is not None
    np.testing.assert_allclose(scores[2], predictor.chances(1, inputs_of(1, 1))[0, 0], atol=1e-6)


def test_says_nothing_unloaded_or_without_inputs(tmp_path: Path) -> None:
    unloaded, predictor = Predictor(SHAPE), loaded(tmp_path)[0]
    unloaded.observe(layer_event(0, inputs_of(1)))
    predictor.observe(event(0, [1], EXPERTS))
    assert unloaded.predict() is None and predictor.predict() is None


def test_a_run_writes_nothing(tmp_path: Path) -> None:
    predictor = loaded(tmp_path)[0]
    predictor.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_another_model_is_refused(tmp_path: Path) -> None:
    predictor = loaded(tmp_path)[0]
    with pytest.raises(TraceError, match="this one has"):
        Predictor(grid(LAYERS, EXPERTS + 1)).load(tmp_path / "networks")
    other = Predictor(SHAPE)
    other.fingerprint = "of another"
    with pytest.raises(TraceError, match="of this model"):
        other.load(tmp_path / "networks")
    wide = np.zeros((1, WIDTH + 1), dtype=np.float32)
    with pytest.raises(TraceError, match="inputs are 6 wide"):
        predictor.observe(layer_event(0, wide))
