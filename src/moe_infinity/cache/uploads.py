"""Copies from host slots to device slots: demand at once, the others chunk by chunk behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from moe_infinity.devices.base import Device, Mark, Stream
from moe_infinity.types import ExpertKey, Priority

# A demand copy waits for this much of a prefetch at most: 0.2 ms of PCIe 4. Smaller ones cost the
# link more than they win.
CHUNK_BYTES = 4 * 1024**2
_CHUNKS_AT_ONCE = 2  # on the link: one that is copied, one that follows without a gap


Piece = tuple[torch.Tensor, torch.Tensor]  # target and source, [n] uint8 both


@dataclass
class _Upload:
    key: ExpertKey
    left: deque[Piece]
    after: list[Mark]
    is_awaited: bool
    last: Mark | None = None


@dataclass
class Uploads:
    """Begins copies on two streams of their own. A demanded upload whose last byte is on a stream
    is told of at once, and whoever uses it lets that stream's mark pass first; a prefetch is told
    of when it is there, so that one which comes late is seen to.

    Prefetches are put on their stream a chunk at a time, each time somebody looks: what is not on
    it yet can be overtaken or cancelled.
    """

    device: Device
    chunk_bytes: int = CHUNK_BYTES
    _queue: deque[_Upload] = field(default_factory=deque)  # of prefetches, oldest first
    _begun: list[_Upload] = field(default_factory=list)
    _on_link: deque[Mark] = field(default_factory=deque)  # ends of chunks of prefetches

    def __post_init__(self) -> None:
        self._demand: Stream = self.device.new_stream("up")
        self._ahead: Stream = self.device.new_stream("up")

    def begin(
        self,
        key: ExpertKey,
        pieces: Iterable[Piece],
        priority: Priority,
        after: list[Mark],
        in_chunks: bool = True,
    ) -> None:
        """Copy what an expert consists of, once the marks are reached. in_chunks: a prefetch that
        others may overtake or cancel."""
        upload = _Upload(key, deque(pieces), after, priority is Priority.DEMAND)
        if priority is Priority.DEMAND:
            self._finish(upload, self._demand)
        elif in_chunks:
            self._queue.append(upload)
        else:
            self._finish(upload, self._ahead)

    def promote(self, key: ExpertKey) -> None:
        """An event waits for it."""
        for begun in self._begun:
            if begun.key == key:
                begun.is_awaited = True
        upload = self._take(key)
        if upload is None:
            return
        upload.is_awaited = True
        if upload.last is not None:
            upload.after.append(upload.last)
        self._finish(upload, self._demand)

    def cancel(self, key: ExpertKey) -> Mark | None:
        """Copy no more of a queued upload. Returns what its slots have to wait for: None if no
        part of it is on the link. Raises KeyError if it is not queued."""
        upload = self._take(key)
        if upload is None:
            raise KeyError(key)
        return upload.last

    def is_queued(self, key: ExpertKey) -> bool:
        return any(upload.key == key for upload in self._queue)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to ``wait`` for."""
        return bool(self._on_link or self._begun)

    def take_settled(self) -> list[tuple[ExpertKey, Mark]]:
        """Uploads that can be used, once their marks are reached."""
        self._pump()
        settled, begun = [], []
        for upload in self._begun:
            assert upload.last is not None
            if upload.is_awaited or upload.last.is_reached():
                settled.append((upload.key, upload.last))
            else:
                begun.append(upload)
        self._begun = begun
        return settled

    def wait(self) -> None:
        """Until more of the queue can be put on the link, or something that was is there."""
        if self._on_link:
            self._on_link[0].wait()
        elif self._begun and self._begun[0].last is not None:
            self._begun[0].last.wait()

    def drain(self) -> None:
        """Drop what is queued and wait for what is on the link."""
        self._queue.clear()
        self._begun.clear()
        self._on_link.clear()
        for stream in (self._demand, self._ahead):
            stream.mark().wait()

    def _pump(self) -> None:
        while self._on_link and self._on_link[0].is_reached():
            self._on_link.popleft()
        while self._queue and len(self._on_link) < _CHUNKS_AT_ONCE:
            upload = self._queue[0]
            if self._finish(upload, self._ahead, self.chunk_bytes):
                self._queue.popleft()
            assert upload.last is not None
            self._on_link.append(upload.last)

    def _finish(self, upload: _Upload, stream: Stream, most_bytes: int | None = None) -> bool:
        """Put all that is left on ``stream``, or the next so many bytes; whether it was all."""
        while upload.after:
            stream.after(upload.after.pop())
        while upload.left:
            target, source = upload.left.popleft()
            stream.copy(target[:most_bytes], source[:most_bytes])
            if most_bytes is not None:
                if source.numel() > most_bytes:
                    upload.left.appendleft((target[most_bytes:], source[most_bytes:]))
                break
        upload.last = stream.mark()
        if upload.left:
            return False
        self._begun.append(upload)
        return True

    def _take(self, key: ExpertKey) -> _Upload | None:
        for upload in self._queue:
            if upload.key == key:
                self._queue.remove(upload)
                return upload
        return None
