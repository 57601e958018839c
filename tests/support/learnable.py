"""Made-up traces whose routing is a function of what was recorded beside it."""

from dataclasses import replace

import numpy as np

from moe_infinity.tracing.trace import Trace
from support.traces import trace_of

LAYERS, EXPERTS, TOP_K, WIDTH, CLASSES = 4, 12, 2, 8, 10


def by_hidden(tokens: int, seed: int, shuffled: bool = False) -> Trace:
    """A layer's experts follow from the class of the layer before's router input."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(CLASSES, size=(tokens, LAYERS))
    before = np.concatenate([classes[:, :1], classes[:, :-1]], axis=1)
    ids = _tables()[np.arange(LAYERS), before]
    trace = trace_of(rng.permutation(ids) if shuffled else ids, EXPERTS)
    return replace(trace, hidden=_codes(classes, rng))


def by_embedding(tokens: int, seed: int, shuffled: bool = False) -> Trace:
    """Experts follow from the class of the token; in odd layers, of the token before it."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(CLASSES, size=tokens)
    ids = _tables()[np.arange(LAYERS)[None], classes[:, None]]
    earlier = np.concatenate([classes[:1], classes[:-1]])
    is_first = np.arange(tokens) % 10 == 0  # of its request
    earlier = np.where(is_first, classes, earlier)
    ids[:, 1::2] = _tables()[np.arange(1, LAYERS, 2)[None], earlier[:, None]]
    trace = trace_of(rng.permutation(ids) if shuffled else ids, EXPERTS)
    return replace(trace, embeddings=_codes(classes, rng))


def with_logits(trace: Trace) -> Trace:
    """Router logits that say what was chosen."""
    logits = np.zeros((*trace.ids.shape[:2], EXPERTS), dtype=np.float16)
    np.put_along_axis(logits, trace.ids.astype(np.int64), np.float16(5), axis=2)
    return replace(trace, logits=logits)


def _tables() -> np.ndarray:
    """[L, CLASSES, K] experts of a class, the same for every trace."""
    rng = np.random.default_rng(7)
    rows = [rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS * CLASSES)]
    return np.sort(rows, axis=1).reshape(LAYERS, CLASSES, TOP_K)


def _codes(classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[..., H] a direction per class, and noise."""
    codes = np.random.default_rng(8).normal(size=(CLASSES, WIDTH))
    return (codes[classes] + 0.1 * rng.normal(size=(*classes.shape, WIDTH))).astype(np.float16)
