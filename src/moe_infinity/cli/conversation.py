"""A conversation: messages through the chat template, the KV cache of what was said before."""

from __future__ import annotations

import sys
from typing import Any

from moe_infinity.errors import ConfigError, PlanExceededError
from moe_infinity.model.kept_caches import KeptCaches


class Conversation:
    """Keeps messages and the KV cache that matches them token by token."""

    def __init__(
        self, moe: Any, system: str | None, max_new_tokens: int, sampling: dict[str, Any]
    ) -> None:
        if not getattr(moe.tokenizer, "chat_template", None):
            raise ConfigError(
                f"{moe.path}: its tokenizer has no chat template; use 'run', or add a "
                f"chat_template.jinja to its folder and name that folder"
            )
        self._moe = moe
        self._system = system
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._messages: list[dict[str, str]] = []
        if self._system:
            self._messages.append({"role": "system", "content": self._system})
        self._caches = KeptCaches(self._moe.new_cache, self._moe.plan.max_context)

    def answer(self, text: str) -> str:
        """Stream the answer to standard output; Ctrl-C keeps what was said so far."""
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = self._prompt_ids(messages)
        new_tokens = min(self._max_new_tokens, self._moe.plan.max_context - len(prompt))
        if new_tokens < 1:
            print(f"error: {self._too_long(len(prompt))}", file=sys.stderr)
            return ""
        cache, _ = self._caches.take(prompt)
        printer = _Printer(self._moe.tokenizer)
        is_cut = False
        try:
            self._moe.generate(
                [prompt],
                max_new_tokens=new_tokens,
                past_key_values=cache,
                streamer=printer,
                **self._sampling,
            )
        except KeyboardInterrupt:
            print(" [stopped]")
            is_cut = True
        self._caches.give_back(prompt + printer.token_ids, is_cut)
        said = self._moe.tokenizer.decode(printer.token_ids, skip_special_tokens=True)
        self._messages = [*messages, {"role": "assistant", "content": said}]
        return str(said)

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        try:
            encoded = self._moe.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"{self._moe.path}: its chat template refuses messages of {roles} ({error}); "
                f"try without --system"
            ) from error
        return list(encoded["input_ids"])

    def _too_long(self, length: int) -> str:
        plan = self._moe.plan.max_context
        return str(
            PlanExceededError(
                f"context: got {length} tokens, expected fewer than the planned {plan}; /reset "
                f"forgets the conversation, --max-context plans a longer one"
            )
        )


class _Printer:
    """Prints text as its tokens come; holds back what may yet become another character."""

    def __init__(self, tokenizer: Any) -> None:
        self.token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._printed = 0
        self._is_prompt = True

    def put(self, value: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.token_ids += value.reshape(-1).tolist()
        text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self._printed :], end="", flush=True)
            self._printed = len(text)

    def end(self) -> None:
        text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        print(text[self._printed :], flush=True)
