"""Makes packed folders: expert by expert, resumable after any interruption, complete or not there.

Everything is written to a folder beside the target, whose journal says what has safely arrived; the
last step gives it its name. Memory: an expert or two, their coded form, and 64 MiB read ahead.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch

from moe_infinity.checkpoint.base import Checkpoint, ExpertStore
from moe_infinity.checkpoint.direct_io import allocate
from moe_infinity.checkpoint.expert_coding import coded_expert, raw_bytes
from moe_infinity.checkpoint.journal import Journal, only_one_in
from moe_infinity.checkpoint.pack_format import (
    DENSE,
    EXPERTS,
    HEADER,
    VERSION,
    Pack,
    PackedExpert,
    aligned,
    checksums,
)
from moe_infinity.checkpoint.pack_job import (
    BLOCK_ALIGNMENT,
    JOURNAL,
    DenseTensor,
    Job,
    estimate_bytes,
    refuse,
    small_files,
)
from moe_infinity.durable import sync, sync_folder, write_atomically
from moe_infinity.errors import CheckpointError, DiskSpaceError, PackError
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import encode
from moe_infinity.types import ExpertKey

_PIECE_BYTES = 8 * 1024**2
_AHEAD_BYTES = 64 * 1024**2
_NUM_READERS = 8  # over a network a read takes long to begin


def pack(job: Job, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write ``job.target``. on_bytes: told how many bytes of the source are done, more and more.

    Raises ConfigError if the target exists or another process is at work on it, DiskSpaceError
    where the disk is or gets full, PackError where it cannot be written, UnsupportedModelError for
    experts that have no such form, and what reading the source raises.
    """
    try:
        refuse(job)
        job.partial.mkdir(exist_ok=True)
        with only_one_in(job.partial):
            if not _is_finished(job):
                _write(job, on_bytes)
            (job.partial / JOURNAL).unlink(missing_ok=True)
            sync_folder(job.partial)
            os.replace(job.partial, job.target)
            sync_folder(job.target.parent)
    except OSError as error:
        kind = DiskSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else PackError
        raise kind(
            f"{job.partial}: got {error.strerror or error}, expected to write "
            f"{estimate_bytes(job) / 1e9:.1f} GB there; what is written stays, and the same "
            f"command goes on with it"
        ) from error


def _is_finished(job: Job) -> bool:
    """Whether only the last renaming is missing."""
    if (job.partial / JOURNAL).exists() or not (job.partial / HEADER).exists():
        return False
    try:
        header = Pack.read(job.partial)
    except CheckpointError:
        return False
    found = (header.source, header.experts_format, header.dense_format)
    return found == (job.source.identity, job.experts_format, job.dense_format)


def _write(job: Job, on_bytes: Callable[[int], None]) -> None:
    """Everything up to the header."""
    experts = _write_experts(job, on_bytes)
    dense, dense_header = _write_dense(job, on_bytes)
    files = _copy_small_files(job) | {DENSE: dense_header}
    for stray in job.partial.iterdir():  # of an earlier attempt: cut off, or its source had it
        if stray.name not in (*files, EXPERTS, JOURNAL):
            stray.unlink()
    header = Pack(
        version=VERSION,
        experts_format=job.experts_format,
        source=job.source.identity,
        experts=experts,
        dense=dense,
        files=files,
        dense_format=job.dense_format,
        is_rounded=job.is_rounded,
        packed_dense={
            each.name: [each.format, *each.source.shape]
            for each in job.dense
            if each.format is not None
        },
    )
    write_atomically(job.partial / HEADER, header.to_bytes())


def _write_experts(job: Job, on_bytes: Callable[[int], None]) -> list[PackedExpert]:
    """Go on where the journal ends, as far as the file holds what it says."""
    path, journal = job.partial / EXPERTS, Journal(job.partial / JOURNAL)
    size = path.stat().st_size if path.exists() else 0
    lines = [PackedExpert(**line) for line in journal.resume(job.identity)]
    done = list(itertools.takewhile(lambda each: each.end <= size, lines))
    if len(done) < len(lines):
        journal.restart(job.identity, [asdict(each) for each in done])
    for each in done:
        on_bytes(job.specs[each.key].weight_bytes)
    store = job.source.expert_store(job.specs)
    left = sorted(job.specs.keys() - {each.key for each in done})
    with open(path, "r+b" if path.exists() else "w+b") as file:
        sync_folder(job.partial)
        end = max((each.end for each in done), default=0)
        file.truncate(end)
        for key, slot in _read(store, left):
            data, parts = coded_expert(job, key, slot)
            file.seek(end)
            file.write(data)
            file.write(bytes(aligned(len(data)) - len(data)))
            sync(file)
            each = PackedExpert(*key, end, len(data), list(map(asdict, parts)), checksums(data))
            journal.append(asdict(each))
            done.append(each)
            end = each.end
            on_bytes(job.specs[key].weight_bytes)
    return done


def _read(store: ExpertStore, keys: Sequence[ExpertKey]) -> Iterator[tuple[ExpertKey, memoryview]]:
    """The experts' bytes as they are stored, in this order; the next ones are read meanwhile."""
    left, most = iter(keys), 1 + _AHEAD_BYTES // store.slot_bytes
    coming: deque[tuple[memoryview, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        try:
            for key in keys:
                coming += [
                    _begin(pool, store, each) for each in itertools.islice(left, most - len(coming))
                ]
                slot, reads = coming.popleft()
                for read in reads:
                    read.result()
                yield key, slot
                del slot
        except BaseException:  # of whoever asked, too
            store.give_up()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(
    pool: ThreadPoolExecutor, store: ExpertStore, key: ExpertKey
) -> tuple[memoryview, list[Future[None]]]:
    """An expert's slot and the reads that fill it."""
    slot = memoryview(allocate(store.specs[key].slot_bytes))
    return slot, [
        pool.submit(store.read_into, key, slot[each.slot_offset :][: each.num_bytes], each)
        for each in store.chunks(key, _PIECE_BYTES)
    ]


def _write_dense(job: Job, on_bytes: Callable[[int], None]) -> tuple[dict[str, int], int]:
    """All other tensors as one safetensors file: (crc32 by tensor, crc32 of the header)."""
    table: dict[str, Any] = {}
    end = 0
    tensors = sorted(job.dense, key=lambda each: each.name)
    for each in tensors:
        is_plain = each.format is None
        table[each.name] = {
            "dtype": each.stored_as if is_plain else "U8",
            "shape": each.source.shape if is_plain else [each.num_bytes],
            "data_offsets": [end, end + each.num_bytes],
        }
        end += each.num_bytes
    body = json.dumps(table, separators=(",", ":")).encode()
    body += b" " * (-(8 + len(body)) % BLOCK_ALIGNMENT)
    header = struct.pack("<Q", len(body)) + body
    found: dict[str, int] = {}
    told: set[str] = set()  # of the source: some are packed twice, plain and coded
    with open(job.partial / DENSE, "wb") as file:
        file.write(header)
        for each in tensors:
            found[each.name] = 0
            for data in _pieces(job.source, each):
                file.write(data)
                found[each.name] = zlib.crc32(data, found[each.name])
            if each.source.name not in told:
                on_bytes(each.source.num_bytes)
            told.add(each.source.name)
        sync(file)
    return found, zlib.crc32(header)


def _pieces(source: Checkpoint, tensor: DenseTensor) -> Iterator[memoryview]:
    """A tensor's bytes as they are packed: whole rows at a time where they are coded."""
    if tensor.numbers is not None:
        for rows in tensor.numbers():
            coded = raw_bytes(rows) if tensor.format is None else encode(rows, tensor.format)
            yield memoryview(coded)  # type: ignore[arg-type]
        return
    entry = tensor.source
    stored_bytes = entry.num_bytes // entry.shape[0] if tensor.format else 1
    step = max(1, _PIECE_BYTES // stored_bytes) * stored_bytes
    for start in range(0, entry.num_bytes, step):
        size = min(step, entry.num_bytes - start)
        piece = replace(entry, offset=entry.offset + start, num_bytes=size)
        data = memoryview(bytearray(size))
        source.read_tensor(piece, data)
        if tensor.format is not None:
            rows = torch.frombuffer(data, dtype=DTYPES[entry.format]).view(-1, entry.shape[1])
            data = memoryview(encode(rows, tensor.format))  # type: ignore[arg-type]
        yield data


def _copy_small_files(job: Job) -> dict[str, int]:
    """Config, tokenizer, licence: everything beside the weights. Returns crc32 by name."""
    found = {}
    contents = {path.name: path.read_bytes() for path in small_files(job)} | dict(job.made_files)
    for name, data in contents.items():
        write_atomically(job.partial / name, data)
        found[name] = zlib.crc32(data)
    return found
