"""An embedding that stays on disk: the rows of a token or two are all that a pass wants of it.

In large vocabularies it is hundreds of megabytes, and so much room for experts. What decides
whether it is worth the reads is the plan; this is how.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_infinity.checkpoint.base import Checkpoint, PackedShape, TensorEntry
from moe_infinity.checkpoint.expert_layout import NameRule
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import PACKED, PackedMatrix, row_bytes
from moe_infinity.kernels.planes import PLANES
from moe_infinity.model.direct_use import weights_read_directly
from moe_infinity.model.lazy_tensors import Placeholder

_KEPT_BYTES = 8 * 1024**2  # of rows that were asked for lately: text repeats itself
# Of a prompt, read at once; each thread, the caller's too, reads through memory of its own.
_NUM_THREADS, _THREAD_BYTES = 4, 2 * 1024**2
_FEW_ROWS = 8  # are not worth threads
_DECODED_AT_ONCE = 1024**2  # numbers, in memory that the prompt's blocks will use later


@dataclass(frozen=True)
class LookedUp:
    """A model's input embedding, whose rows can be read one by one."""

    name: str  # the model's, of the weight
    entry: TensorEntry

    @property
    def shape(self) -> PackedShape:
        return PackedShape(self.entry.format, *self.entry.shape)

    def num_kept(self, dtype: torch.dtype) -> int:
        """Rows of ``dtype`` that are kept in memory."""
        return min(self.shape.rows, max(1, _KEPT_BYTES // (self.shape.cols * dtype.itemsize)))

    def memory_bytes(self, dtype: torch.dtype) -> int:
        """What it takes nevertheless."""
        kept = self.num_kept(dtype) * self.shape.cols * dtype.itemsize
        return kept + (_NUM_THREADS + 1) * _THREAD_BYTES

    def saved_bytes(self, dtype: torch.dtype) -> int:
        """How much less that is than all of it."""
        whole = self.shape.rows * self.shape.cols * dtype.itemsize
        return max(0, whole - self.memory_bytes(dtype))


def find_looked_up(
    meta: Any, rule: Callable[[str], NameRule], dense: Sequence[TensorEntry]
) -> LookedUp | None:
    """The input embedding of a model, if it is one tensor, nobody else's weight, and stored in rows
    that mean something by themselves."""
    table, head = meta.get_input_embeddings(), meta.get_output_embeddings()
    if meta.config.is_encoder_decoder or type(table) is not nn.Embedding:
        return None
    if table.max_norm is not None or getattr(head, "weight", None) is table.weight:
        return None
    names = [n for n, p in meta.named_parameters(remove_duplicate=False) if p is table.weight]
    # Only of what has its shape: to ask for a name takes long.
    like_it = (entry for entry in dense if tuple(entry.shape) == tuple(table.weight.shape))
    named = [(entry, rule(entry.name)) for entry in like_it]
    found = [(entry, way) for entry, way in named if way.parameter in names]
    if len(names) != 1 or len(found) != 1 or found[0][1].converter is not None:
        return None
    entry = found[0][0]
    if entry.format not in {*DTYPES, *PACKED}.difference(PLANES, ("EXACT12",)):
        return None
    is_whole = entry.num_bytes == entry.shape[0] * _row_bytes(entry)
    return LookedUp(names[0], entry) if is_whole else None


def _row_bytes(entry: TensorEntry) -> int:
    dtype, cols = DTYPES.get(entry.format), entry.shape[-1]
    return cols * dtype.itemsize if dtype else row_bytes(entry.format, cols)


def is_only_looked_up(meta: Any, embedding: LookedUp) -> bool:
    """Whether the model asks its embedding for rows, and never for the weight."""
    touched = weights_read_directly(meta)
    return touched is not None and embedding.name not in touched


def attach_looked_up(
    model: nn.Module, checkpoint: Checkpoint, embedding: LookedUp, dtype: torch.dtype
) -> None:
    """Let a model's embedding read its rows from the checkpoint, which has to stay open.

    Raises CorruptCheckpointError where the checkpoint has a checksum and it is wrong, ReadError.
    """
    checkpoint.check_tensor(embedding.entry)
    module: Any = model.get_submodule(embedding.name.removesuffix(".weight"))
    placeholder = Placeholder(embedding.shape, dtype)[...]  # the library may have made room for it
    module.weight = nn.Parameter(placeholder, requires_grad=False)
    module.forward = Rows(checkpoint, embedding, dtype).of


class Rows:
    """Rows of an embedding, those asked for lately in memory. One thread asks at a time."""

    def __init__(self, checkpoint: Checkpoint, embedding: LookedUp, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._entry = embedding.entry
        self._dtype = dtype
        self._num_rows, self._cols = embedding.entry.shape
        self._row_bytes = _row_bytes(embedding.entry)
        self._kept = torch.empty(embedding.num_kept(dtype), self._cols, dtype=dtype)
        self._places: OrderedDict[int, int] = OrderedDict()  # row: where it lies, latest last

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., H] of ids [...]. Raises IndexError for one that does not exist, ReadError."""
        if ids.numel() == 1 and 0 <= (row := int(ids)) < self._num_rows:
            return self._find([row]).view(*ids.shape, self._cols)
        # From the last id on: where each row is asked for the last time.
        backwards = ids.numpy().ravel()[::-1]
        rows, lasts, places = np.unique(backwards, return_index=True, return_inverse=True)
        if rows.size and (rows[0] < 0 or rows[-1] >= self._num_rows):
            wrong = rows[0] if rows[0] < 0 else rows[-1]
            raise IndexError(f"token id: got {wrong}, expected 0 to {self._num_rows - 1}")
        by_time = np.argsort(-lasts)
        found = self._find(rows[by_time].tolist())
        of_each = np.argsort(by_time)[places[::-1]]
        return found[torch.from_numpy(of_each)].view(*ids.shape, self._cols)

    def _find(self, rows: list[int]) -> torch.Tensor:
        """[rows, H], all different, in the order in which they were asked for."""
        found = torch.empty(len(rows), self._cols, dtype=self._dtype)
        here = [i for i, row in enumerate(rows) if row in self._places]
        if here:
            found[here] = self._kept[[self._places[rows[i]] for i in here]]
        for i in here:
            self._places.move_to_end(rows[i])
        missing = [i for i, row in enumerate(rows) if row not in self._places]
        if missing:
            self._read([rows[i] for i in missing], missing, found)
            latest = [i for i in missing if i >= len(rows) - len(self._kept)]
            self._kept[[self._place_for(rows[i]) for i in latest]] = found[latest]
        return found

    def _place_for(self, row: int) -> int:
        """Where a row is kept from now on; the one that was asked for least lately goes."""
        place = len(self._places)
        if place == len(self._kept):
            _, place = self._places.popitem(last=False)
        self._places[row] = place
        return place

    def _read(self, rows: list[int], places: list[int], found: torch.Tensor) -> None:
        """Rows from the checkpoint to their places in found [.., H], some at a time."""
        at_once = max(1, _DECODED_AT_ONCE // self._cols)
        parts = [slice(start, start + at_once) for start in range(0, len(rows), at_once)]
        if len(rows) <= _FEW_ROWS:
            for part in parts:
                found[places[part]] = self._decoded(rows[part], map)
            return
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            for part in parts:
                found[places[part]] = self._decoded(rows[part], threads.map)

    def _decoded(self, rows: list[int], each: Callable[..., Iterable[None]]) -> torch.Tensor:
        """[rows, H]. each: calls a function with each of some arguments, maybe by threads, which
        only read: what an allocator keeps of theirs cannot be given back (heap.py)."""
        raw = torch.empty(len(rows) * self._row_bytes, dtype=torch.uint8)
        into = memoryview(raw.numpy())  # type: ignore[arg-type]

        def read(number: int) -> None:
            place = into[number * self._row_bytes : (number + 1) * self._row_bytes]
            self._checkpoint.read_part(self._entry, rows[number] * self._row_bytes, place)

        for _ in each(read, range(len(rows))):
            pass  # a thread's error is raised here
        dtype = DTYPES.get(self._entry.format)
        if dtype is not None:
            return raw.view(dtype).view(-1, self._cols).to(self._dtype)
        matrix = PackedMatrix(self._entry.format, len(rows), self._cols, raw)
        return matrix.decode().to(self._dtype)
