"""The model's own next routers, asked early on the input of this layer's router, as it is."""

from __future__ import annotations

from moe_infinity.predictors.base import Foresight
from moe_infinity.predictors.gate_lookahead import DEPTH
from moe_infinity.predictors.gate_lookahead import Predictor as GateLookahead


class Predictor(GateLookahead):
    """Gate reuse as in Mixtral-Offloading (arXiv 2312.17238): earliest, least sure."""

    foresight = Foresight("raw", DEPTH)
