"""What every predictor must do, whichever files there are."""

import ast
import inspect
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from moe_infinity.errors import TraceError
from moe_infinity.predictors import find_predictor, predictor_names
from moe_infinity.predictors.base import ExpertPredictor
from support.routing import event, grid, random_decode

SHAPE = grid(3, 8, top_k=3, per_layer=[8, 5, 8])


@pytest.fixture(params=predictor_names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def observed(name: str) -> list[np.ndarray | None]:
    predictor = find_predictor(name)(SHAPE, seed=1)
    answers = [predictor.predict()]
    for _ in range(2):
        predictor.begin_request()
        predictor.observe(event(0, range(8), 8, "prefill"))
        for each in random_decode(SHAPE, 5, seed=2):
            predictor.observe(each)
            answers.append(predictor.predict())
        predictor.end_request()
    return answers


def test_predicts_a_grid_of_chances_or_nothing(name: str) -> None:
    for scores in observed(name):
        if scores is not None:
            assert scores.shape == (3, 8)
            assert np.isfinite(scores).all()


def test_the_same_seed_predicts_the_same(name: str) -> None:
    for first, second in zip(observed(name), observed(name), strict=True):
        assert (first is None) == (second is None)
        assert first is None or second is None or (first == second).all()


def test_saved_state_can_be_loaded(name: str, tmp_path: Path) -> None:
    predictor: ExpertPredictor = find_predictor(name)(SHAPE)
    predictor.observe(event(1, [2], 8))
    predictor.save(tmp_path / "learned")
    if (tmp_path / "learned").exists():
        find_predictor(name)(SHAPE).load(tmp_path / "learned")


def test_learned_arrays_of_other_dimensions_are_refused(name: str, tmp_path: Path) -> None:
    predictor: ExpertPredictor = find_predictor(name)(SHAPE)
    path = tmp_path / "learned"
    for _ in range(2):
        predictor.begin_request()
        predictor.begin_pass("decode", np.ones((1, 4), np.float32), np.array([7]))
        for layer in range(3):
            predictor.observe(event(layer, [2], 8))
        predictor.end_request()
    predictor.save(path)
    if not path.exists():
        return
    with safe_open(path, "np") as file:
        header = file.metadata()
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, array in arrays.items():
        wider = np.concatenate([array, array[..., :1]], axis=-1)
        broken = {k: v for k, v in arrays.items() if k != key}
        for change in ({key: wider}, {key: array[None]}, {}):
            save_file(broken | change, path, header)
            if array.ndim > 1 or len(arrays) == 1 or wider.ndim != array.ndim or not change:
                with pytest.raises(TraceError, match=key):
                    find_predictor(name)(SHAPE).load(path)


def test_sees_no_tensors_and_stays_short(name: str) -> None:
    source = Path(inspect.getfile(find_predictor(name))).read_text()
    names = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom | ast.Import)]
    assert not any("torch" in ast.unparse(n) for n in names)
    assert len(source.splitlines()) < 100


def test_none_says_nothing() -> None:
    assert all(scores is None for scores in observed("none"))


def test_takes_no_more_memory_than_is_planned_for(name: str) -> None:
    """Filled by a thousand passes of a model of usual proportions, small."""
    shape = grid(6, 32, top_k=4)
    kind = find_predictor(name)
    planned = kind.memory.num_bytes(shape, hidden_size=64)
    tracemalloc.start()
    try:
        predictor = kind(shape)
        if kind.needs_future:
            predictor.set_future([])
        for number, each in enumerate(random_decode(shape, 200, seed=3)):
            if number % 60 == 0:
                predictor.end_request()
                predictor.begin_request()
            if each.layer == 0:
                predictor.begin_pass("decode", np.full((1, 64), number, dtype=np.float32))
            predictor.observe(each)
            predictor.predict()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken <= planned + 256 * 1024
