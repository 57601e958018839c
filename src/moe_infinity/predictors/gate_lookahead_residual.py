"""The model's own next routers, asked early: this router's input plus the mean change to theirs."""

from __future__ import annotations

from moe_infinity.predictors.base import Foresight
from moe_infinity.predictors.gate_lookahead import DEPTH
from moe_infinity.predictors.gate_lookahead import Predictor as GateLookahead


class Predictor(GateLookahead):
    """DALI's correction (arXiv 2602.03495); the mean change is learned while running."""

    foresight = Foresight("residual", DEPTH)
