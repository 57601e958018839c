"""Scores that compiled code made beside the logits are taken for as long as they are those."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from moe_infinity import MoE
from moe_infinity.kernels import native
from moe_infinity.model.float_scores import last_scores, note_scores
from moe_infinity.model.whole_pass import WholePass
from support.checkpoints import tiny_checkpoint
from support.families import tiny_input_ids


def output() -> tuple[Any, torch.Tensor, torch.Tensor]:
    logits = torch.randn(1, 1, 7).bfloat16()
    scores = logits[0].float()
    said = MoeCausalLMOutputWithPast(logits=logits)
    note_scores(said, logits, scores)
    return said, logits, scores


def test_scores_are_given_once_and_then_copied() -> None:
    said, logits, scores = output()
    assert dict(said).keys() == {"logits"}, "nobody else sees them"
    assert last_scores(said) is scores
    scores.zero_()
    assert torch.equal(last_scores(said), logits[0].float())


@pytest.mark.parametrize("is_inference", [False, True])
def test_logits_that_were_written_to_are_read_anew(is_inference: bool) -> None:
    said, logits, _ = output()
    with torch.inference_mode(is_inference):
        logits[0, 0, 3] += 1
        assert torch.equal(last_scores(said), logits[0].float())


def test_other_logits_are_read() -> None:
    said, logits, _ = output()
    said.logits = torch.cat([logits, logits + 1], dim=1)  # of two tokens
    assert torch.equal(last_scores(said), (logits[0] + 1).float())


@pytest.mark.skipif(native.native is None, reason="installed without a compiler")
@pytest.mark.parametrize("way", ["in place", "unseen", "another"])
def test_who_changes_the_logits_is_heard(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ban(module: Any, args: Any, said: Any) -> None:
        likeliest = said.logits[0, -1].argmax()
        said.logits = said.logits.clone() if way == "another" else said.logits
        logits = said.logits.data if way == "unseen" else said.logits
        logits[0, -1, likeliest] = -torch.inf

    path = tiny_checkpoint(tmp_path, torch.bfloat16)

    def answer(before: Callable[[MoE], object]) -> list[int]:
        with MoE(path, ram="8GiB") as moe:
            before(moe)
            ids = tiny_input_ids(rows=1, length=12)
            said: list[int] = moe.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
            return said

    banned = answer(lambda moe: moe.model.register_forward_hook(ban))
    assert banned != answer(lambda moe: None)
    monkeypatch.setattr(WholePass, "_can", lambda *args: False)
    assert banned == answer(lambda moe: moe.model.register_forward_hook(ban))
