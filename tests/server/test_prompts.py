"""Messages become prompts by the model's template, or the request is refused."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from moe_infinity import bundled_model_path
from moe_infinity.server.problems import ApiError
from moe_infinity.server.prompts import Prompts, Rendering

CHATML = (
    "{%- if tools %}<|im_start|>system\nTools: {{ tools | tojson }} <tool_call>"
    "<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}</tool_call>"
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)
STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}"  # noqa: E501
USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


@pytest.fixture
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled_model_path())


def prompts(tokenizer: Any, template: str | None) -> Prompts:
    tokenizer.chat_template = template
    return Prompts(tokenizer, 300)


def text_of(made: Prompts, messages: Any, **how: Any) -> tuple[str, str]:
    prompt = made.of_messages(messages, Rendering(**how))
    return made.tokenizer.decode(prompt.ids), prompt.begun


class TestTemplates:
    def test_reasoning_is_begun_by_the_template(self, tokenizer: Any) -> None:
        made = prompts(tokenizer, CHATML)
        assert text_of(made, [USER]) == (
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n",
            "<|im_start|>assistant\n<think>\n",
        )
        _, begun = text_of(made, [USER], values={"enable_thinking": False})
        assert begun == "<|im_start|>assistant\n"

    def test_json_leaves_no_room_for_it(self, tokenizer: Any) -> None:
        made = prompts(tokenizer, CHATML)
        whole, begun = text_of(made, [USER], says_json="answer")
        assert begun.endswith("<think>\n\n</think>\n\n") and whole.endswith(begun)
        whole, _ = text_of(made, [USER], says_json="call", tools=[TOOL])
        assert whole.endswith("</think>\n\n<tool_call>\n")

    def test_tools_are_the_templates(self, tokenizer: Any) -> None:
        call = {"id": "c", "type": "function"}
        call["function"] = {"name": "f", "arguments": {"city": "Rome"}}  # type: ignore[assignment]
        messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        whole, _ = text_of(prompts(tokenizer, CHATML), messages, tools=[TOOL])
        assert whole.startswith("<|im_start|>system\nTools: [{") and "<tool_call>Rome" in whole

    def test_an_answer_that_was_begun(self, tokenizer: Any) -> None:
        messages = [USER, {"role": "assistant", "content": "Good"}]
        whole, begun = text_of(prompts(tokenizer, CHATML), messages, goes_on=True)
        assert whole.endswith("assistant\nGood") and begun == ""

    def test_one_that_knows_no_tools(self, tokenizer: Any) -> None:
        made = prompts(
            tokenizer, "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        )
        call = {"function": {"name": "f", "arguments": {"a": 1}}}
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        whole, _ = text_of(made, messages, tools=[TOOL])
        assert whole.startswith("[system] Be brief.\n\nYou may call these functions")
        assert (
            '[assistant] <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in whole
        )
        whole, _ = text_of(made, [USER], tools=[TOOL])
        assert whole.startswith("[system] You may call") and whole.endswith("[user] hello\n")

    @pytest.mark.parametrize(
        "template",
        [
            STRICT,
            "{{ 1 / 0 }}",
            "{{ messages[7].content }}",
            "{{ messages.x.y }}",
            "{% for m in messages",
            "{{ messages | nonsense }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        ],
    )
    def test_that_refuse(self, tokenizer: Any, template: str) -> None:
        messages = [{"role": "system", "content": "Be brief."}, USER]
        with pytest.raises(ApiError) as caught:
            prompts(tokenizer, template).of_messages(messages, Rendering())
        assert (caught.value.status, caught.value.code) == (400, "invalid_messages")
        assert "system, user" in caught.value.message

    def test_none_at_all(self, tokenizer: Any) -> None:
        with pytest.raises(ApiError, match="no chat template; use /v1/completions"):
            prompts(tokenizer, None).of_messages([USER], Rendering())


class TestText:
    def test_too_long_says_both_numbers(self, tokenizer: Any) -> None:
        made = prompts(tokenizer, CHATML)
        with pytest.raises(ApiError, match="got 300 tokens, expected fewer than the 300") as caught:
            made.checked([1] * 300, "prompt")
        assert caught.value.code == "context_length_exceeded"
        assert made.checked([1] * 299, "prompt")

    def test_nothing_and_what_is_no_text(self, tokenizer: Any) -> None:
        made = prompts(tokenizer, CHATML)
        with pytest.raises(ApiError, match="got no token"):
            made.of_text("", "prompt")
        with pytest.raises(ApiError, match="lone surrogate"):
            made.of_text("\ud800", "prompt")

    def test_of_what_is_far_too_long_the_beginning_is_counted(self, tokenizer: Any) -> None:
        given: list[int] = []

        class Counting:
            chat_template = CHATML

            def __getattr__(self, name: str) -> Any:
                return getattr(tokenizer, name)

            def __call__(self, text: str, **options: Any) -> Any:
                given.append(len(text))
                return tokenizer(text, **options)

        made = prompts(tokenizer, CHATML)
        made.tokenizer = Counting()
        for ask in (
            lambda text: made.of_text(text, "prompt"),
            lambda text: made.of_messages([{"role": "user", "content": text}], Rendering()),
        ):
            with pytest.raises(ApiError, match=r"got more than \d+ tokens") as caught:
                ask("a b " * 100_000)
            assert caught.value.code == "context_length_exceeded"
        assert max(given) <= 8 * made.max_context


def test_a_tokenizer_that_cannot_be_constrained() -> None:
    from moe_infinity.server.grammars import Grammars

    with pytest.raises(ApiError) as caught:
        Grammars(SimpleNamespace(), 10, [0]).of_schema({"type": "object"}, "response_format")
    assert caught.value.code == "unsupported_value"


@pytest.mark.parametrize("works", [True, False])
def test_a_vocabulary_is_read_once(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    """However many ask at once, and where it cannot be read too."""
    from moe_infinity.server.grammars import Grammars

    calls: list[object] = []

    def read(*args: object, **options: object) -> object:
        calls.append(args)
        time.sleep(0.05)
        if not works:
            raise ValueError("no")
        return "tokens"

    monkeypatch.setattr("moe_infinity.server.grammars.from_tokenizer", read)
    grammars = Grammars(SimpleNamespace(), 10, [0])
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(lambda: grammars.tokens) for _ in range(4)]
    assert len(calls) == 1
    for each in asked:
        error = each.exception()
        assert isinstance(error, ApiError) if error else each.result() == "tokens"
        assert (error is None) == works
