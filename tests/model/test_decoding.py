"""The loop of its own says what the library's says, and leaves everything else to that."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from moe_infinity import MoE
from moe_infinity.errors import CorruptCheckpointError
from moe_infinity.kernels import native
from moe_infinity.model import decoding
from moe_infinity.model.float_scores import last_scores
from support.checkpoints import tiny_checkpoint

PROMPT = [list(range(5, 25))]


class Streamed(BaseStreamer):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def put(self, value: torch.Tensor) -> None:
        self.log.append(value.flatten().tolist())

    def end(self) -> None:
        self.log.append("end")


class Raised(LogitsProcessor):
    """Writes to what it is given, and minds all tokens so far."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[0, int(input_ids.sum()) % scores.shape[1]] += 3
        return scores


class AtLength(StoppingCriteria):
    def __init__(self, length: int, log: list[Any]) -> None:
        self.length, self.log = length, log

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.log.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.fixture
def moe(tiny: Path) -> Iterator[MoE]:
    with MoE(tiny, ram="2GiB", max_context=128, max_batch=2) as moe:
        yield moe


@pytest.fixture
def never_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_choose", lambda scores, samples: pytest.fail("our loop ran"))


def library(moe: MoE, monkeypatch: pytest.MonkeyPatch, seed: int = 3, **options: Any) -> Any:
    """What the library's own loop says."""
    with monkeypatch.context() as patched:
        patched.setattr("moe_infinity.engine.own_loop", lambda model, options: {})
        torch.manual_seed(seed)
        return moe.generate(PROMPT, **options)


def ours(moe: MoE, monkeypatch: pytest.MonkeyPatch, seed: int = 3, **options: Any) -> Any:
    """The same where the library's loop must not be entered."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the library's loop ran")

    with monkeypatch.context() as patched:
        patched.setattr(GenerationMixin, "_sample", refuse)
        patched.setattr(decoding, "_OWN_STEPS", ())
        torch.manual_seed(seed)
        return moe.generate(PROMPT, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True},
    "sampled of few": {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8},
    "not the same again": {"do_sample": False, "repetition_penalty": 1.3},
    "at least": {"do_sample": True, "min_new_tokens": 10, "eos_token_id": list(range(5, 60))},
    "chunks": {"do_sample": False, "prefill_chunk_size": 7},
    "processed": {"do_sample": False, "logits_processor": LogitsProcessorList([Raised()])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_same_tokens_from_the_same_random_numbers(
    moe: MoE, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    expected = library(moe, monkeypatch, max_new_tokens=24, **options)
    said = ours(moe, monkeypatch, max_new_tokens=24, **options)
    assert said.dtype == expected.dtype and torch.equal(said, expected)


@pytest.mark.skipif(native.native is None, reason="installed without a compiler")
def test_scores_of_compiled_code_are_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What processors see, bit by bit, and that it was made beside the logits."""
    seen: list[torch.Tensor] = []
    made: list[bool] = []

    def noted(said: Any) -> torch.Tensor:
        scores = last_scores(said)
        made.append(scores.data_ptr() != 0 and getattr(said, "_float_scores", 0) is None)
        return scores

    class Seen(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(scores.clone())
            return scores

    monkeypatch.setattr(decoding, "last_scores", noted)
    options = {"max_new_tokens": 20, "logits_processor": LogitsProcessorList([Seen()])}
    with MoE(tiny_checkpoint(tmp_path, torch.bfloat16), ram="2GiB") as moe:
        ours(moe, monkeypatch, do_sample=False, **options)
        mine = seen[:]
        seen.clear()
        library(moe, monkeypatch, do_sample=False, **options)
    assert sum(made) > 10
    assert torch.equal(torch.cat(mine), torch.cat(seen))


def test_ends_where_the_library_does(moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
    text = library(moe, monkeypatch, max_new_tokens=12, do_sample=False)[0].tolist()
    end = text[len(PROMPT[0]) + 5]
    expected = library(moe, monkeypatch, max_new_tokens=12, do_sample=False, eos_token_id=end)
    said = ours(moe, monkeypatch, max_new_tokens=12, do_sample=False, eos_token_id=end)
    assert torch.equal(said, expected)
    assert int(said[0, -1]) == end and said.shape[1] < len(text)


@pytest.mark.parametrize("samples", [False, True])
def test_criteria_and_streamers_see_what_the_library_shows_them(
    moe: MoE, monkeypatch: pytest.MonkeyPatch, samples: bool
) -> None:
    logs: list[list[Any]] = [[], []]
    for say, log in zip((library, ours), logs, strict=True):
        criteria = StoppingCriteriaList([AtLength(len(PROMPT[0]) + 4, log), MaxTimeCriteria(60)])
        options = {"stopping_criteria": criteria, "streamer": Streamed(log)}
        said = say(moe, monkeypatch, max_new_tokens=12, do_sample=samples, **options)
        assert said.shape[1] == len(PROMPT[0]) + 4
        log.append(said.tolist())
    assert logs[0] == logs[1]
    assert [type(each) for each in logs[0]] == [list, *4 * [int, list], str, list]


def test_goes_on_where_a_cache_ends(moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = library(moe, monkeypatch, max_new_tokens=16, do_sample=False)
    cache = moe.new_cache()
    some = moe.generate(PROMPT, max_new_tokens=8, do_sample=False, past_key_values=cache)
    rest = moe.generate(some, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert torch.equal(rest, whole)


UNUSUAL: dict[str, dict[str, Any]] = {
    "a table": {"return_dict_in_generate": True, "output_scores": True},
    "beams": {"num_beams": 2},
    "several": {"num_return_sequences": 2, "do_sample": True},
    "no cache": {"use_cache": False},
    "a config": {"generation_config": GenerationConfig(do_sample=False)},
}


@pytest.mark.parametrize("options", UNUSUAL.values(), ids=UNUSUAL.keys())
@pytest.mark.usefixtures("never_ours")
def test_leaves_the_rest_to_the_library(
    moe: MoE, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    expected = library(moe, monkeypatch, max_new_tokens=6, **options)
    torch.manual_seed(3)
    said = moe.generate(PROMPT, max_new_tokens=6, **options)
    sequences = [getattr(each, "sequences", each) for each in (said, expected)]
    assert torch.equal(*sequences)
    assert type(said) is type(expected)


@pytest.mark.usefixtures("never_ours")
def test_rows_of_several_lengths_are_the_librarys(moe: MoE) -> None:
    ids = torch.tensor([PROMPT[0], PROMPT[0][::-1]])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    assert moe.generate(ids, max_new_tokens=4, attention_mask=mask).shape == (2, 24)
    one = moe.generate(ids[1:], max_new_tokens=4, attention_mask=mask[1:])
    assert one.shape == (1, 24)


def test_a_mode_that_needs_more_is_refused_as_the_library_does(
    moe: MoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe.model.generation_config, "penalty_alpha", 0.6)
    assert decoding.own_loop(moe.model, {}) == {}
    with pytest.raises(ValueError):
        moe.generate(PROMPT, max_new_tokens=4, top_k=4, do_sample=False)


@pytest.mark.usefixtures("never_ours")
def test_a_model_with_a_way_of_its_own_keeps_it(moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = type(moe.model).prepare_inputs_for_generation
    asked = []

    def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return kept(model, *args, **kwargs)

    monkeypatch.setattr(type(moe.model), "prepare_inputs_for_generation", prepare)
    moe.generate(PROMPT, max_new_tokens=4)
    assert len(asked) == 4


def test_a_model_that_says_no_numbers_is_refused(moe: MoE) -> None:
    with torch.no_grad():
        moe.model.model.norm.weight[3] = torch.nan
    with pytest.raises(CorruptCheckpointError, match="got NaN, expected numbers"):
        moe.generate(PROMPT, max_new_tokens=2)
