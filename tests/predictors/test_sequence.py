"""sequence: a token at a time in numpy is the whole text at once in torch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_infinity.errors import TraceError
from moe_infinity.predictors._networks import sparsemax
from moe_infinity.predictors.sequence import FORM, WINDOW, Predictor
from moe_infinity.tracing.state_tensors import save_state
from moe_infinity.training import sequence as training
from support.routing import event, grid

LAYERS, EXPERTS, WIDTH = 3, 6, 5
SHAPE = grid(LAYERS, EXPERTS)


def loaded(folder: Path) -> tuple[Predictor, training.Network, torch.Tensor, torch.Tensor]:
    """A predictor with a random network, and the torch one for inputs (x - mean) * scale."""
    torch.manual_seed(0)
    network = training.Network(WIDTH, LAYERS * EXPERTS)
    for weights in network.parameters():
        weights.data *= 3  # so that attention is not even
    mean, scale = torch.randn(WIDTH), torch.rand(WIDTH) + 0.5
    arrays = training.arrays_of(network, mean, scale)
    save_state(folder / "network", FORM, arrays, SHAPE, "of this model")
    predictor = Predictor(SHAPE)
    predictor.load(folder / "network")
    return predictor, network, mean, scale


def text_of(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, WIDTH)).astype(np.float32)


def test_computes_what_torch_computes(tmp_path: Path) -> None:
    predictor, network, mean, scale = loaded(tmp_path)
    text = text_of(WINDOW + 20)  # longer than attention sees
    with torch.no_grad():
        wanted = network(((torch.from_numpy(text) - mean) * scale)[None])[0]
    predictor.begin_request()
    got = np.stack([predictor.logits(embedding) for embedding in text])
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 9, 64])
def test_sparsemax_is_the_nearest_point_of_the_simplex(size: int) -> None:
    scores = np.random.default_rng(size).normal(size=size).astype(np.float32) * 2
    weights = sparsemax(scores)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1, abs=1e-5)
    threshold = (scores - weights)[weights > 0]  # the same for all that have weight
    np.testing.assert_allclose(threshold, threshold[0], atol=1e-5)
    assert (scores[weights == 0] <= threshold[0] + 1e-5).all()
    wanted = training.sparsemax(torch.from_numpy(scores)).numpy()
    np.testing.assert_allclose(weights, wanted, atol=1e-6)


def test_passes_continue_the_text_and_requests_begin_it_anew(tmp_path: Path) -> None:
    predictor = loaded(tmp_path)[0]
    text = text_of(6)
    predictor.begin_request()
    wanted = [predictor.logits(embedding) for embedding in text]
    for _ in range(2):
        predictor.begin_request()
        predictor.begin_pass("prefill", text[:5])
        prompt = predictor.predict()
        assert prompt is not None
        chances = 1 / (1 + np.exp(-np.stack(wanted[:5]).astype(np.float64)))
        np.testing.assert_allclose(prompt.ravel(), 1 - (1 - chances).prod(axis=0), atol=1e-5)
        predictor.begin_pass("decode", text[5:])
        scores = predictor.predict()
        assert scores is not None
        np.testing.assert_allclose(scores.ravel(), 1 / (1 + np.exp(-wanted[5])), atol=1e-5)


def test_speaks_of_the_layers_that_did_not_run_yet(tmp_path: Path) -> None:
    predictor = loaded(tmp_path)[0]
    predictor.begin_pass("decode", text_of(1))
    for layer in range(LAYERS):
        scores = predictor.predict()
        assert scores is not None
        assert scores.any(axis=1).tolist() == [each >= layer for each in range(LAYERS)]
        predictor.observe(event(layer, [1], EXPERTS))


def test_says_nothing_unloaded_or_without_embeddings(tmp_path: Path) -> None:
    unloaded, predictor = Predictor(SHAPE), loaded(tmp_path)[0]
    unloaded.begin_pass("decode", text_of(1))
    predictor.begin_pass("decode", None)
    assert unloaded.predict() is None and predictor.predict() is None


def test_another_model_is_refused(tmp_path: Path) -> None:
    predictor = loaded(tmp_path)[0]
    with pytest.raises(TraceError, match="this one has"):
        Predictor(grid(LAYERS, EXPERTS + 1)).load(tmp_path / "network")
    with pytest.raises(TraceError, match="inputs are 6 wide"):
        predictor.begin_pass("decode", np.zeros((1, WIDTH + 1), dtype=np.float32))
