"""What a model takes beside its expert slots, from headers and config alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from moe_infinity.config import EngineConfig
from moe_infinity.device_plan import DeviceFacts, DeviceNeeds
from moe_infinity.heap import can_trim
from moe_infinity.machine import resident_bytes
from moe_infinity.mapped_code import code_bytes
from moe_infinity.model.config_values import first_number
from moe_infinity.model.dense_sizes import dense_bytes
from moe_infinity.model.kv_shape import KvShape
from moe_infinity.model.loading import Anatomy
from moe_infinity.model.workspace import visit_bytes, workspace_bytes
from moe_infinity.predictors import AUTO_PREFETCH, find_predictor
from moe_infinity.product_speed import BEYOND_CACHES_BYTES

# Beyond what is resident when planning starts: what the library imports later, thread stacks, the
# allocator's and oneDNN's own buffers, Python objects of a long run. Measured: 26 MiB with
# widened16 in 4 bit within 1.1 GB. More where the allocator cannot be asked to give back what it
# keeps (heap.py).
RUNTIME_MARGIN_BYTES = (48 if can_trim() else 112) * 1024**2
# Of libraries' code and constants, what a run uses: 36 to 41 MiB measured with widened16 and OLMoE
# in 4 bit, prompts and sampling included. mapped_code.py lets go of the rest; a GPU's driver has
# code of its own.
CODE_BYTES = 44 * 1024**2
# For each id, while a tokenizer is loaded, which may be late, and then while a server makes
# grammars over it: measured for BPEs of 50,000 to 151,000 tokens, of files of several kinds,
# 1,050 to 1,410 and 1,280 to 1,300. Half of that stays.
_TOKENIZER_BYTES_PER_ID, _GRAMMAR_BYTES_PER_ID = 1600, 1400
# Between two looks of heap.py, a layer apart, the allocator keeps so much of a pass's workspace
# that is in use no more. Measured: 80 MiB of 213 (widened16, 2,000 tokens, AVX2). No tensor of more
# than 32 MiB is kept, which large workspaces mostly are of.
_KEPT_SHARE, _MOST_KEPT_BYTES = 0.4, 256 * 1024**2
# Scratch of the threads that read dense tensors while a model opens. What the allocator keeps of
# it at the top of a thread's own arena cannot be given back.
_TRANSFER_BYTES = 32 * 1024**2


class Needs:
    """What a model takes beside its expert slots, as a function of the context."""

    def __init__(
        self,
        anatomy: Anatomy,
        config: EngineConfig,
        facts: Sequence[DeviceFacts],
    ) -> None:
        self._facts = facts
        self._prediction_bytes = _prediction_bytes(anatomy, config)
        self.looked_up_bytes = 0  # of the embedding, left on disk
        self.dense_bytes = dense_bytes(anatomy)
        self.runtime_bytes = resident_bytes() + CODE_BYTES + RUNTIME_MARGIN_BYTES
        self.runtime_bytes -= 0 if facts else code_bytes()
        self.runtime_bytes += _tokenizer_bytes(anatomy, config)
        self.runtime_bytes += sum(each.host_bytes for each in facts)
        self.kv = KvShape.of(anatomy.meta)
        self._anatomy = anatomy
        self._rows = config.max_batch

    def looking_up(self, saved_bytes: int) -> Needs:
        """With so much of the embedding left on disk."""
        other = copy.copy(self)
        other.looked_up_bytes = saved_bytes
        other.dense_bytes -= saved_bytes
        return other

    def kv_bytes(self, context: int) -> int:
        return self.kv.num_bytes(context, self._anatomy.dtype.itemsize) * self._rows

    def workspace_bytes(self, context: int) -> int:
        return workspace_bytes(self._anatomy.meta, context, self._rows, self._anatomy.dtype)

    def kept_bytes(self, context: int) -> int:
        if self._facts:
            return 0
        return min(_MOST_KEPT_BYTES, int(self.workspace_bytes(context) * _KEPT_SHARE))

    def staging_bytes(self, context: int) -> int:
        """For prediction, for what is read through, and beyond the workspace for measuring."""
        passes = 0 if self._facts else self.workspace_bytes(context)
        # Between requests: so much for the disk's buffers, then for products, then for reading.
        return max(_TRANSFER_BYTES, BEYOND_CACHES_BYTES - passes) + self._prediction_bytes

    def computing(self, context: int) -> DeviceNeeds:
        """What lies where products are computed."""
        growing = (self.kv_bytes(context), self.workspace_bytes(context))
        return DeviceNeeds(self.dense_bytes, *growing)

    def visiting(self, context: int) -> DeviceNeeds:
        """What lies where experts are computed only."""
        anatomy = self._anatomy
        return DeviceNeeds(0, 0, visit_bytes(anatomy.meta, context, self._rows, anatomy.dtype))

    def total(self, context: int) -> int:
        """In RAM."""
        beside = self.staging_bytes(context) + self.runtime_bytes
        if self._facts:
            return beside
        return self.computing(context).total + self.kept_bytes(context) + beside

    @property
    def is_on_device(self) -> bool:
        return bool(self._facts)

    def beside_slots(self, context: int) -> int:
        """In the memory that the context has to fit into."""
        if not self._facts:
            return self.total(context)
        return self.computing(context).total + self._facts[0].runtime_bytes

    def at_opening(self) -> int:
        """In RAM, before slots are used: dense weights pass through it on their way to a device."""
        return self.dense_bytes + _TRANSFER_BYTES + self._prediction_bytes + self.runtime_bytes


def _tokenizer_bytes(anatomy: Anatomy, config: EngineConfig) -> int:
    """With its grammars, if there are to be some."""
    per_id = _TOKENIZER_BYTES_PER_ID + (_GRAMMAR_BYTES_PER_ID if config.grammars else 0)
    vocab_size = first_number(anatomy.config.get_text_config(), "vocab_size") or 0
    return vocab_size * per_id if anatomy.has_tokenizer else 0


def _prediction_bytes(anatomy: Anatomy, config: EngineConfig) -> int:
    """What the predictor learns and is shown; "auto" may turn out to need less."""
    name = AUTO_PREFETCH if config.prefetch == "auto" else config.prefetch
    hidden_size = first_number(anatomy.config.get_text_config(), "hidden_size", "d_model") or 0
    return find_predictor(name).memory.num_bytes(anatomy.shape, hidden_size)
