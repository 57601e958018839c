"""What a request wishes for, as arguments of ``generate`` and changes of scores."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_infinity.server.sampling import BiasProcessor, PenaltyProcessor, Sampling

GREEDY = SimpleNamespace(do_sample=None, temperature=None, repetition_penalty=None)
DRAWS = SimpleNamespace(do_sample=True, temperature=0.6, repetition_penalty=1.05)
IDS = torch.tensor([[1, 2, 3, 3, 4]])


def options(defaults: Any = GREEDY, **wishes: Any) -> dict[str, Any]:
    return Sampling(**wishes).options(defaults)


def test_without_a_wish_the_model_decides_or_openai() -> None:
    assert options() == {
        "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    assert options(DRAWS)["temperature"] == 0.6
    assert "top_k" not in options(DRAWS) and "top_p" not in options(DRAWS)  # its own stay


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-9])
def test_no_temperature_is_greedy(temperature: float) -> None:
    found = options(DRAWS, temperature=temperature, top_p=0.5)
    assert found["do_sample"] is False and found["temperature"] is None and found["top_p"] is None


def test_wishes_count_more_than_the_model() -> None:
    found = options(DRAWS, temperature=1.5, top_p=0.5, top_k=3, min_p=0.1)
    assert (found["temperature"], found["top_p"], found["top_k"]) == (1.5, 0.5, 3)
    assert found["min_p"] == 0.1
    assert options(ignore_eos=True)["eos_token_id"] is None


def test_a_bias_is_added() -> None:
    scores = torch.zeros(1, 6)
    found = BiasProcessor(((1, 2.5), (4, -100.0), (1, 1.0)))(IDS, scores)
    assert found.tolist() == [[0, 3.5, 0, 0, -100, 0]] and not scores.any()


def test_penalties_are_of_the_answer_only() -> None:
    found = PenaltyProcessor(1.0, 0.5, prompt_length=2)(IDS, torch.zeros(1, 6))
    assert found.tolist() == [[0, 0, 0, -2.0, -1.5, 0]]
    untouched = PenaltyProcessor(1.0, 0.5, prompt_length=5)(IDS, torch.zeros(1, 6))
    assert not untouched.any()
    raised = PenaltyProcessor(-1.0, 0.0, prompt_length=2)(IDS, torch.zeros(1, 6))
    assert raised.tolist() == [[0, 0, 0, 1.0, 1.0, 0]]


def test_the_order_of_what_changes_scores() -> None:
    grammars: Any = SimpleNamespace(matcher=lambda grammar: object())
    wishes = Sampling(logit_bias=((1, 1.0),), presence_penalty=1.0, grammar="x")
    names = [type(each).__name__ for each in wishes.processors(3, grammars, DRAWS)]
    assert names == [
        "RepetitionPenaltyLogitsProcessor", "BiasProcessor", "PenaltyProcessor", "GrammarProcessor"
    ]  # fmt: skip
    assert Sampling().processors(3, grammars, GREEDY) == []


def test_the_models_own_penalty_is_not_the_librarys_to_apply() -> None:
    """Which would do it before log-probabilities are noted."""
    grammars: Any = None
    assert options(DRAWS)["repetition_penalty"] == 1.0
    assert [each.penalty for each in Sampling().processors(3, grammars, DRAWS)] == [1.05]
    wishes = Sampling(repetition_penalty=1.2)
    assert [each.penalty for each in wishes.processors(3, grammars, DRAWS)] == [1.2]
    assert Sampling(repetition_penalty=1.0).processors(3, grammars, DRAWS) == []
