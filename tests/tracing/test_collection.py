"""The EAM collection: incremental matching equals matching afresh; files are safe."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity.errors import TraceError
from moe_infinity.predictors import find_predictor
from moe_infinity.tracing.collection import EAMCollection, Query
from moe_infinity.tracing.eam import counts_by_row
from moe_infinity.tracing.event import Event
from support.routing import grid
from support.traces import random_trace

SHAPE = grid(3, 5, top_k=2)


def random_counts(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 6, size=(2, 3, 5)).astype(np.float32)


def filled(capacity: int, count: int, seed: int = 0) -> EAMCollection:
    rng = np.random.default_rng(seed)
    collection = EAMCollection(SHAPE, capacity)
    for _ in range(count):
        collection.add(random_counts(rng))
    return collection


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-12))


Steps = st.lists(
    st.tuples(st.integers(0, 2), st.sets(st.integers(0, 4), min_size=1, max_size=3)), max_size=12
)


@settings(max_examples=60)
@given(steps=Steps, seed=st.integers(0, 99))
def test_incremental_matching_equals_the_plain_one(
    steps: list[tuple[int, set[int]]], seed: int
) -> None:
    """Decode only: cosine over the rows seen so far."""
    collection = filled(6, 4, seed)
    query, counts, seen = Query(collection), np.zeros((3, 5), dtype=np.float32), set()
    for layer, experts in steps:
        ids = np.array(sorted(experts))
        query.add(1, layer, ids, np.ones(len(ids), dtype=np.float32))
        counts[layer, ids] += 1
        seen.add(layer)
    rows = sorted(seen)
    expected = [
        cosine(counts[rows], entry[1][rows]) if rows else 0.0 for entry in collection.entries[:4]
    ]
    assert query.similarities() == pytest.approx(expected, abs=1e-5)
    assert (query.counts[1] == counts).all()


def test_the_prompt_leads_a_decode_phase_that_has_just_begun() -> None:
    collection = EAMCollection(SHAPE, 4)
    one, other = np.zeros((2, 2, 3, 5), dtype=np.float32)
    one[0, :, 0], one[1, :, 1] = 9, 9
    other[0, :, 2], other[1, :, 3] = 9, 9
    collection.add(one)
    collection.add(other)
    query = Query(collection)
    for layer in range(3):
        query.add(0, layer, np.array([2]), np.array([7.0], dtype=np.float32))
    assert query.similarities().argmax() == 1
    for _ in range(40):  # decode says otherwise, and in the end it counts for more
        for layer in range(3):
            query.add(1, layer, np.array([1]), np.array([1.0], dtype=np.float32))
    assert query.similarities().argmax() == 0


def test_a_full_collection_replaces_the_most_similar() -> None:
    collection = filled(3, 3)
    entries = collection.entries.copy()
    newcomer = entries[1] * 2  # the same direction
    assert collection.add(newcomer) == 1
    assert collection.size == 3
    assert (collection.entries[1] == newcomer).all()
    assert (collection.entries[[0, 2]] == entries[[0, 2]]).all()


def test_saved_and_loaded(tmp_path: Path) -> None:
    collection, path = filled(5, 4), tmp_path / "eamc.safetensors"
    collection.save(path, "this model")
    loaded = EAMCollection(SHAPE, 5)
    loaded.load(path, "this model")
    assert loaded.size == 4
    assert (loaded.entries == collection.entries).all()
    assert (loaded.by_expert == collection.by_expert).all()
    smaller = EAMCollection(SHAPE, 2)
    smaller.load(path, "")
    assert (smaller.entries == collection.entries[2:4]).all()


def test_another_models_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "eamc.safetensors"
    filled(2, 2).save(path, "one")
    with pytest.raises(TraceError, match="learned from the checkpoint one, this one is other"):
        EAMCollection(SHAPE, 2).load(path, "other")
    with pytest.raises(TraceError, match="layers x experts"):
        EAMCollection(grid(3, 6, top_k=2), 2).load(path, "one")


def test_truncated_and_future_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "eamc.safetensors"
    filled(2, 2).save(path, "one")
    whole = path.read_bytes()
    for size in (0, 7, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TraceError, match=r"spoiled or truncated|version|format"):
            EAMCollection(SHAPE, 2).load(path, "one")
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"7"'))
    with pytest.raises(TraceError, match="version '7', this program reads up to 1"):
        EAMCollection(SHAPE, 2).load(path, "one")


def test_killed_while_saving_the_old_file_stands(tmp_path: Path) -> None:
    path = tmp_path / "eamc.safetensors"
    filled(2, 2).save(path, "one")
    before = path.read_bytes()
    code = f"""
import os, signal
from moe_infinity.durable import write_atomically
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(__import__('pathlib').Path({str(path)!r}), b'half')
"""
    died = subprocess.run([sys.executable, "-c", code], env=os.environ)
    assert died.returncode == -signal.SIGKILL
    assert path.read_bytes() == before


def test_rows_of_a_batch_are_counted_apart() -> None:
    index = np.array([[0, 1], [1, 2], [3, -1], [0, 1]])
    batch = Event(0, "prefill", 1, np.array([0, 0, 1, 2]), index, np.ones((4, 2), np.float32), 5)
    rows = {row: counts.tolist() for row, counts in counts_by_row(batch).items()}
    assert rows == {0: [1, 2, 1, 0, 0], 1: [0, 0, 0, 1, 0], 2: [1, 1, 0, 0, 0]}
    assert sum(map(np.array, rows.values())).tolist() == batch.counts.tolist()


def test_a_batch_adds_one_matrix_per_request() -> None:
    predictor = find_predictor("eamc")(SHAPE)
    predictor.begin_request()
    for layer in range(3):
        index = np.array([[0, 1], [3, 4]])
        ones = np.ones((2, 2), np.float32)
        predictor.observe(Event(0, "decode", layer, np.array([0, 1]), index, ones, 5))
    predictor.end_request()
    assert predictor.collection.size == 2
    assert predictor.collection.entries[0, 1, 0].tolist() == [1, 1, 0, 0, 0]
    assert predictor.collection.entries[1, 1, 2].tolist() == [0, 0, 0, 1, 1]


def test_one_passs_matrix_equals_the_plain_count() -> None:
    """The iEAM of a pass, and its sum over a request, from the events alone."""
    trace = random_trace(3, 5, 2, 10, seed=3)
    query = Query(EAMCollection(SHAPE, 1))
    for each in trace.passes():
        for event in each.events:
            experts = np.flatnonzero(event.counts)
            query.add(1, event.layer, experts, event.counts[experts].astype(np.float32))
    plain = np.zeros((3, 5))
    for token in trace.ids:
        for layer, chosen in enumerate(token):
            plain[layer, chosen] += 1
    assert (query.counts[1] == plain).all()
    assert not query.counts[0].any()
