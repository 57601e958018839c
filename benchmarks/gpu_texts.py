"""What benchmarks/gpu.py asks a model, and when each token came. It knows nothing of engines."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor

PROMPTS = Path(__file__).resolve().parent / "prompts" / "domains.jsonl"


@dataclass
class Text:
    """Token ids, others for every run: of the prompts where there is a tokenizer, else at random.
    What is random is answered with random tokens too, for random models soon repeat themselves."""

    path: Path
    _ids: list[int] = field(default_factory=list)

    @property
    def is_real(self) -> bool:
        return (self.path / "tokenizer.json").exists()

    def ids(self, count: int, number: int) -> list[int]:
        if not self.is_real:
            most = json.loads((self.path / "config.json").read_text())["vocab_size"]
            generator = torch.Generator().manual_seed(number)
            return torch.randint(2, most, (count,), generator=generator).tolist()
        if not self._ids:
            from transformers import AutoTokenizer

            lines = PROMPTS.read_text().splitlines()
            text = "\n\n".join(json.loads(line)["prompt"] for line in lines)
            self._ids = list(AutoTokenizer.from_pretrained(self.path)(text).input_ids)
        start = 997 * number % len(self._ids)
        repeated = self._ids[start:] + self._ids * (1 + count // len(self._ids))
        return repeated[:count]


class Forced(LogitsProcessor):
    """Leaves one token to choose: the next of the text."""

    def __init__(self, num_prompt: int, answer: Sequence[int]) -> None:
        self._num_prompt, self._answer = num_prompt, answer

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self._answer[ids.shape[1] - self._num_prompt]] = 0.0
        return chosen


class Clock:
    """A streamer that notes when each token came. on_token: told its number, prompt 0."""

    def __init__(self, on_token: Any = None) -> None:
        self.stamps: list[float] = []
        self._on_token = on_token

    def put(self, value: object) -> None:
        self.stamps.append(time.perf_counter())
        if self._on_token is not None:
            self._on_token(len(self.stamps) - 1)

    def end(self) -> None:
        pass
