"""An expert store in memory: for tests and for models that were never on disk."""

from __future__ import annotations

from collections.abc import Mapping

from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.errors import ReadError
from moe_infinity.types import ExpertKey, ExpertSpec, ReadRange


class MemoryStore(ExpertStore):
    """Serves experts from byte strings that stand for files."""

    def __init__(self, specs: Mapping[ExpertKey, ExpertSpec], files: list[bytes]) -> None:
        self.specs = specs
        self._files = files

    def read_into(self, key: ExpertKey, buffer: memoryview, chunk: ReadRange) -> None:
        data = self._files[chunk.file][chunk.file_offset : chunk.file_offset + chunk.num_bytes]
        if len(data) < chunk.needed_bytes:
            raise ReadError(f"{key}: got {len(data)} bytes, expected {chunk.needed_bytes}")
        buffer[: len(data)] = data
