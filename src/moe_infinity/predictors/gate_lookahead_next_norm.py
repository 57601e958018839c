"""The model's own next routers, asked early: on a layer's output, after the next layer's norm."""

from __future__ import annotations

from moe_infinity.predictors.base import Foresight
from moe_infinity.predictors.gate_lookahead import DEPTH
from moe_infinity.predictors.gate_lookahead import Predictor as GateLookahead


class Predictor(GateLookahead):
    """Later and surer than the router's input (compare Speculating Experts, arXiv 2603.19289)."""

    foresight = Foresight("next_norm", DEPTH)
