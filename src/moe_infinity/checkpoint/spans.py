"""Bytes of files that an expert needs, and how they are read into a slot."""

from __future__ import annotations

from dataclasses import dataclass

from moe_infinity.checkpoint.direct_io import align_down, align_up
from moe_infinity.types import ReadRange

# Reading this much for nothing costs less than a second request to the SSD.
_JOIN_GAP_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one file that an expert needs."""

    file: int
    start: int
    end: int


def read_ranges(needed: list[Span]) -> list[ReadRange]:
    """How to read them into a slot: whole pages, and what lies close together at once."""
    gap = min(_JOIN_GAP_BYTES, sum(span.end - span.start for span in needed) // 8)
    ranges, end_offset = [], 0
    for span in join(needed, gap):
        start, end = align_down(span.start), align_up(span.end)
        ranges.append(ReadRange(span.file, start, end - start, span.end - start, end_offset))
        end_offset += end - start
    return ranges


def slot_offset(ranges: list[ReadRange], file: int, start: int) -> int:
    """Where byte ``start`` of a file lies in the slot."""
    for r in ranges:  # by what it needs: ranges that share a page overlap in what they read
        if r.file == file and r.file_offset <= start < r.file_offset + r.needed_bytes:
            return r.slot_offset + start - r.file_offset
    raise AssertionError(f"no range holds byte {start} of file {file}")


def join(spans: list[Span], max_gap: int) -> list[Span]:
    joined: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.file, s.start)):
        last = joined[-1] if joined else None
        if last and last.file == span.file and span.start <= last.end + max_gap:
            joined[-1] = Span(span.file, last.start, max(last.end, span.end))
        else:
            joined.append(span)
    return joined
