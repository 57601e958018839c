"""The loop around a request's passes, where it is of the usual kind: one row, greedy or sampled.

The library's own loop is made for everything at once: rows that end earlier than others, masks,
token types, what is to be returned beside tokens. For one row it takes as long as a block of a
small model. This one asks the model, the processors and the criteria for the same in the same
order; everything else goes through the library's.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from moe_infinity.errors import CorruptCheckpointError
from moe_infinity.model.cache_name import CACHE
from moe_infinity.model.float_scores import last_scores

# Of ``generate``: what changes neither how its tokens are found nor what it returns. Not
# stop_strings, whose tokenizer the library forgets where the loop is not its own.
_USUAL_OPTIONS = frozenset(
    {"attention_mask", CACHE, "prefill_chunk_size"}
    | {"logits_processor", "stopping_criteria", "streamer"}
    | {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"}
    | {"repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"}
    | {"eos_token_id", "pad_token_id", "min_length", "min_new_tokens", "max_time"}
)
# Of a pass of such a request.
_TOLD = frozenset({CACHE, "position_ids", "use_cache"})
_MAY_BE_TOLD = _TOLD | {"logits_to_keep"}
_OWN_STEPS = (
    "generate",
    "_sample",
    "_prefill",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_optimize_model_for_decode",
)


def own_loop(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """``decode`` as an option of ``generate``; none where it is asked, by its options or by how the
    model is set up, for more than one token after the other."""
    from transformers import GenerationMixin
    from transformers.generation import GenerationMode

    modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    if not options.keys() <= _USUAL_OPTIONS or model.config.is_encoder_decoder:
        return {}
    defaults = model.generation_config
    if defaults.get_generation_mode() not in modes or defaults.penalty_alpha is not None:
        return {}
    is_stock = all(
        getattr(type(model), name, None) is getattr(GenerationMixin, name, ...)
        and name not in vars(model)
        for name in _OWN_STEPS
    )
    # The streamer the library would forget, too.
    loop = functools.partial(decode, streamer=options.get("streamer"))
    return {"custom_generate": loop} if is_stock else {}


def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **told: Any,
) -> torch.Tensor:
    """Token ids [rows, length + new], as the library's loop returns them for the same arguments. In
    our own loop raises CorruptCheckpointError where a prompt's scores are no numbers."""
    is_one_row = input_ids.shape[0] == 1 and input_ids.device.type == "cpu"
    is_plain = not synced_gpus and not generation_config.return_dict_in_generate
    if is_one_row and is_plain and _is_usual(told) and _are_plain(logits_processor):
        is_end = _Ends(stopping_criteria)
        said = model._prefill(input_ids, generation_config, told)
        told = {name: value for name, value in told.items() if name in _MAY_BE_TOLD}
        samples = generation_config.do_sample
        return _go_on(model, input_ids, said, told, logits_processor, samples, is_end, streamer)
    return model._sample(  # type: ignore[no-any-return]
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        synced_gpus=synced_gpus,
        streamer=streamer,
        **told,
    )


def _go_on(
    model: Any,
    input_ids: torch.Tensor,
    said: Any,
    told: dict[str, Any],
    processors: Any,
    samples: bool,
    is_end: _Ends,
    streamer: Any,
) -> torch.Tensor:
    """From what the model said to a prompt [1, length] to the end. told: its options then."""
    position = told["position_ids"][..., -1:]
    is_first = True
    while True:
        scores = last_scores(said)
        del said
        for process in processors:
            scores = process(input_ids, scores)
        if is_first:
            _require_numbers(scores)
            is_first = False
        token = _choose(scores, samples)
        input_ids = torch.cat([input_ids, token], dim=-1)
        is_over = is_end(input_ids, int(token))
        if streamer is not None:
            streamer.put(token[0])
        if is_over:
            break
        position = position + 1
        told["position_ids"] = position
        said = model(input_ids=token, return_dict=True, **told)
    if streamer is not None:
        streamer.end()
    return input_ids


def _require_numbers(scores: torch.Tensor) -> None:
    """Or the first of those that are none would be taken for the likeliest, pass after pass."""
    if bool(scores.isnan().any()):
        raise CorruptCheckpointError(
            "logits of the prompt: got NaN, expected numbers; weights are damaged (most formats "
            "have no checksums: compare with the source), or values too large for the dtype"
        )


def _choose(scores: torch.Tensor, samples: bool) -> torch.Tensor:
    """One id [1, 1] by scores [1, V]; of the same random numbers the library's."""
    if not samples:
        return torch.argmax(scores, dim=-1, keepdim=True)
    return torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)


def _is_usual(told: dict[str, Any]) -> bool:
    given = {name for name, value in told.items() if value is not None}
    position = told.get("position_ids")
    return (
        _TOLD <= given <= _MAY_BE_TOLD
        and told["use_cache"] is True
        and isinstance(position, torch.Tensor)
        and position.dim() == 2
        and not getattr(told[CACHE], "is_compileable", True)
    )


def _are_plain(processors: Any) -> bool:
    """Whether none wants more than ids and scores."""
    return all(len(inspect.signature(each.__call__).parameters) <= 2 for each in processors)


class _Ends:
    """Whether a criterion says that a row is over. The most common ones only compare numbers."""

    def __init__(self, criteria: Any) -> None:
        from transformers import EosTokenCriteria, MaxLengthCriteria

        self._most, self._ends = float("inf"), set[int]()
        self._others = []
        for each in criteria:
            # Beyond the positions that a model knows the library warns.
            if type(each) is MaxLengthCriteria and each.max_length <= (
                each.max_position_embeddings or each.max_length
            ):
                self._most = min(self._most, each.max_length)
            elif type(each) is EosTokenCriteria:
                self._ends.update(each.eos_token_id.flatten().tolist())
            else:
                self._others.append(each)

    def __call__(self, ids: torch.Tensor, token: int) -> bool:
        """ids: [1, length] with the token; every criterion is asked, for some of them count."""
        others = [each(ids, None) for each in self._others]
        is_over = any(map(bool, others))
        return is_over or token in self._ends or ids.shape[1] >= self._most
