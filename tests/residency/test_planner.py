"""What is worth prefetching, in which order."""

import numpy as np

from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.residency.directory import Directory
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey
from support.routing import event, grid


class Fixed(ExpertPredictor):
    scores: np.ndarray | None = None

    def observe(self, event: Event) -> None:
        pass

    def predict(self) -> np.ndarray | None:
        return self.scores


def planner(scores: np.ndarray | None) -> PrefetchPlanner:
    shape = grid(3, 4, per_layer=[4, 3, 4])
    predictor = Fixed(shape)
    predictor.scores = scores
    plan = PrefetchPlanner(predictor, Directory(shape, (6,), (0, 0, 0)))
    plan.horizon.layers = 3.0
    return plan


def test_nothing_said_nothing_planned() -> None:
    assert planner(None).plan(0).load == []
    assert planner(np.full((3, 4), 0.34)).plan(0).load == []


def test_best_first_nearer_layers_weigh_more() -> None:
    scores = np.zeros((3, 4))
    scores[0, 3], scores[1, 2], scores[2, 0], scores[2, 1] = 0.8, 1.0, 0.8, 0.9
    planned = planner(scores).plan(1).load
    assert planned == [ExpertKey(2, 1), ExpertKey(2, 0), ExpertKey(0, 3), ExpertKey(1, 2)]


def test_what_is_here_or_coming_is_left_out() -> None:
    plan = planner(np.ones((3, 4)))
    plan.directory.begin_load(ExpertKey(0, 0))
    plan.directory.begin_load(ExpertKey(2, 3))
    plan.directory.complete(ExpertKey(2, 3))
    planned = plan.plan(0).load
    assert ExpertKey(0, 0) not in planned and ExpertKey(2, 3) not in planned


def test_experts_a_smaller_layer_lacks_are_never_planned() -> None:
    assert ExpertKey(1, 3) not in planner(np.ones((3, 4))).plan(0).load


def test_not_a_number_is_not_worth_it() -> None:
    plan = planner(np.full((3, 4), np.nan))
    plan.predictor.observe(event(0, [1], 4))
    assert plan.plan(0).load == []
