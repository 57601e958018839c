"""How a prompt's members come to be computed: in order, and those of few tokens together."""

from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_infinity.predictors import find_predictor
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.runner import EventRunner
from moe_infinity.residency.running import Load
from moe_infinity.simulator.cost_model import Cost, SimulatedCarrier
from moe_infinity.types import ExpertKey, Priority
from support.routing import event, grid, new_residency

NUM_EXPERTS = 12


class Logged(SimulatedCarrier):
    """Keeps what is loaded and what is computed."""

    def __init__(self, cost: Cost) -> None:
        super().__init__(cost, 2)
        self.loads: list[Load] = []
        self.computed: list[list[ExpertKey]] = []

    def start(self, loads: list[Load], priority: Priority) -> None:
        self.loads += loads
        super().start(loads, priority)

    def compute(self, keys: list[ExpertKey]) -> None:
        self.computed.append(keys)
        super().compute(keys)


def serve(
    carrier: Logged, num_slots: int, prompts: Sequence[Sequence[int]], layers: Sequence[int]
) -> None:
    """prompts: of each, tokens by expert."""
    residency = new_residency(grid(2, NUM_EXPERTS), [num_slots])
    predictor = find_predictor("none")(residency.directory.shape)
    runner = EventRunner(residency, PrefetchPlanner(predictor, residency.directory))
    for layer, tokens in zip(layers, prompts, strict=True):
        runner.begin_pass("prefill", carrier)
        chosen = [expert for expert, count in enumerate(tokens) if count]
        counts = [tokens[expert] for expert in chosen]
        if chosen:
            runner.run(event(layer, chosen, NUM_EXPERTS, "prefill", 0, counts), carrier)


def test_of_those_in_memory_as_many_at_once_as_share_a_few_tokens() -> None:
    carrier = Logged(Cost())
    counts = [20, 20, 24, 1, 200, 3, 60, 1, 1, 64, 2, 2]
    serve(carrier, 24, [counts, counts], [0, 0])
    assert [len(keys) for keys in carrier.computed[:NUM_EXPERTS]] == [1] * NUM_EXPERTS
    groups = [[key.expert for key in keys] for keys in carrier.computed[NUM_EXPERTS:]]
    assert groups == [[0, 1, 2], [3], [4], [5, 6, 7], [8], [9], [10, 11]]


_tokens = st.lists(st.integers(0, 40), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS)


@settings(max_examples=60)
@example([([1] * 12, 1), ([1] * 12, 0), ([1] * 12, 1)], 16, 1.0)  # 8 of layer 1 streams ahead
@given(
    prompts=st.lists(st.tuples(_tokens, st.integers(0, 1)), max_size=6),
    num_slots=st.integers(2, 24),
    load_s=st.sampled_from([0.001, 0.01, 1.0]),
)
def test_neither_the_disk_nor_the_company_changes_what_is_loaded_and_computed(
    prompts: list[tuple[list[int], int]], num_slots: int, load_s: float
) -> None:
    counts, layers = [tokens for tokens, _ in prompts], [layer for _, layer in prompts]
    quick, slow = Logged(Cost()), Logged(Cost(load_s=load_s, layer_s=0.02))
    for carrier in (quick, slow):
        serve(carrier, num_slots, counts, layers)
    assert quick.loads == slow.loads
    assert quick.computed == slow.computed
    wanted = [
        [ExpertKey(layer, expert) for expert in range(NUM_EXPERTS) if tokens[expert]]
        for tokens, layer in prompts
    ]
    computed = [key for keys in quick.computed for key in keys]
    for members in wanted:  # each once
        assert sorted(computed[: len(members)]) == members
        del computed[: len(members)]
    assert not computed
