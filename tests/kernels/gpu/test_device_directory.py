"""The directory on the device decides as the Python one does, event by event."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from moe_infinity.errors import ConfigError, TraceError
from moe_infinity.kernels.gpu.directed import (
    FORMS,
    Decision,
    DeviceDirectory,
    TracedEvent,
    gather,
    kernel_form,
)
from moe_infinity.policies import find_policy
from moe_infinity.policies._guarded import GuardedPolicy
from moe_infinity.policies.base import CachePolicy
from moe_infinity.residency.directory import Directory, State
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape
from support.routing import Driver, event, grid, new_residency, random_decode

SOURCES = Path(__file__).parents[3] / "src"


class Pair(NamedTuple):
    """The same cache twice: on the host, and on what stands in for a device."""

    host: Driver
    device: DeviceDirectory

    @property
    def directory(self) -> Directory:
        return self.host.residency.directory

    @property
    def policy(self) -> CachePolicy:
        return self.host.residency.policy


def new_pair(shape: ExpertShape, num_slots: int, form: str, trace_events: int = 0) -> Pair:
    device = DeviceDirectory(shape, num_slots, form, "cpu", trace_events)
    return Pair(Driver(new_residency(shape, [num_slots], form)), device)


def decide(device: DeviceDirectory, each: Event) -> Decision:
    return device.decide(each.layer, torch.from_numpy(each.top_k_index.copy()))


def traced(host: Driver, each: Event) -> tuple[object, ...]:
    """What the host does with an event, in the words of the device's trace."""
    before = len(host.log)
    found = host.run(each)
    return each.layer, each.experts.tolist(), found.hits, host.log[before:]


def in_words(done: TracedEvent) -> tuple[object, ...]:
    return done.event.layer, done.event.experts.tolist(), done.hits, done.loads


def assert_same_place(pair: Pair) -> None:
    pair.device.check_integrity()
    assert pair.device.slot_of.tolist() == pair.directory.slots.tolist()


def assert_same_state(pair: Pair) -> None:
    state = np.concatenate([a.ravel() for a in pair.policy.state_arrays().values()])
    assert pair.device.state.numpy().tobytes() == state.tobytes()


@st.composite
def caches(draw: st.DrawFn) -> tuple[ExpertShape, int, list[Event]]:
    """A grid, a capacity from top-k to all experts, and routings of one token in layer order,
    some of them popular; now and then an id is no expert's or comes twice."""
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    top_k = draw(st.integers(1, min(5, num_experts)))
    shape = grid(num_layers, num_experts, top_k)
    num_slots = draw(st.integers(top_k, num_layers * num_experts))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    events = random_decode(shape, max(2, 18 // num_layers), seed=int(rng.integers(9999)))
    odd = draw(st.sampled_from([0.0, 0.0, 0.1]))
    routed = []
    for each in events:
        ids = rng.permutation(each.top_k_index[0])
        strange = rng.choice([-1, -7, num_experts, 2**40, ids[0]], size=top_k)
        ids = np.where(rng.random(top_k) < odd, strange, ids)
        routed.append(event(each.layer, ids.tolist(), num_experts, step=each.step))
    return shape, num_slots, routed


@settings(max_examples=8)
@given(cache=caches())
@pytest.mark.parametrize("form", FORMS)
def test_decides_as_the_host_does(form: str, cache: tuple[ExpertShape, int, list[Event]]) -> None:
    shape, num_slots, events = cache
    pair = new_pair(shape, num_slots, form)
    for each in events:
        expected = traced(pair.host, each)
        decision = decide(pair.device, each)
        (done,) = pair.device.read_trace()
        assert in_words(done) == expected
        assert done.event.step == each.step
        assert_same_place(pair)
        loads = [(pair.directory.flat(load.key), load.slot) for load in done.loads]
        loads += [(-1, -1)] * (shape.top_k - len(loads))
        found = zip(decision.load_keys.tolist(), decision.load_slots.tolist(), strict=True)
        assert list(found) == loads
        row = pair.directory.slots.reshape(pair.policy.grid)[each.layer].tolist()
        ids = each.top_k_index[0].tolist()
        expected_slots = [row[i] if 0 <= i < shape.num_experts else -1 for i in ids]
        assert decision.slots.tolist() == expected_slots
    assert_same_state(pair)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_more_slots_than_are_ranked_at_a_time(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_infinity.kernels.gpu.directed._CHUNK_SLOTS", 8)
    shape = grid(5, 20, top_k=6)
    pair = new_pair(shape, 37, form)
    expected = [traced(pair.host, each) for each in random_decode(shape, 6, seed=8)]
    for each in random_decode(shape, 6, seed=8):
        decide(pair.device, each)
    assert [in_words(done) for done in pair.device.read_trace()] == expected
    assert_same_place(pair)


@settings(max_examples=5)
@given(cache=caches(), turns=st.lists(st.integers(1, 8), min_size=2, max_size=4))
@pytest.mark.parametrize("form", FORMS)
def test_host_and_device_take_turns(
    form: str, cache: tuple[ExpertShape, int, list[Event]], turns: list[int]
) -> None:
    """Whoever serves an event, all goes on as if one of them had served everything."""
    shape, num_slots, events = cache
    alone = Driver(new_residency(shape, [num_slots], form))
    pair = new_pair(shape, num_slots, form)
    coming, is_host = iter(events), True
    for turn in turns:
        served = [each for _, each in zip(range(turn), coming, strict=False)]
        expected = [traced(alone, each) for each in served]
        if is_host:
            assert [traced(pair.host, each) for each in served] == expected
        else:
            pair.device.load_from(pair.directory, pair.policy, step=7)
            for each in served:
                decide(pair.device, each)
            done = pair.device.read_trace()
            assert [in_words(one) for one in done] == expected
            assert not done or done[0].event.step == 7
            pair.device.store_to(pair.directory, pair.policy)
            pair.directory.check_integrity()
            assert_same_state(pair)
        is_host = not is_host


@pytest.mark.parametrize("form", FORMS)
def test_what_streamed_through_goes_first_there_too(form: str) -> None:
    """A prompt between two turns of the device: its experts leave before those of decode."""
    shape = grid(2, 24, top_k=4)
    alone = Driver(new_residency(shape, [32], form))
    pair = new_pair(shape, 32, form)
    room, rng, streamed = pair.host.residency.room, np.random.default_rng(1), 0
    for _ in range(3):
        for layer in range(2):
            prompt = event(layer, range(layer, 22 + layer), 24, "prefill")
            assert traced(pair.host, prompt) == traced(alone, prompt)
        before = room.passing(0)
        pair.device.load_from(pair.directory, pair.policy, before)
        events = [event(i % 2, rng.choice(24, 4, replace=False), 24) for i in range(4)]
        expected = [traced(alone, each) for each in events]
        for each in events:
            decide(pair.device, each)
        done = pair.device.read_trace()
        assert [in_words(one) for one in done] == expected
        streamed += sum(load.victim in before for one in done for load in one.loads)
        room.take_passing(0, pair.device.store_to(pair.directory, pair.policy))
        assert room.passing(0) == alone.residency.room.passing(0)
    assert streamed > 3, "the device evicted none of them"


@pytest.mark.parametrize("form", FORMS)
def test_the_host_follows_by_the_trace_alone(form: str) -> None:
    """Replayed into the Python objects a trace makes their state, slots included."""
    shape = grid(3, 10, top_k=3)
    pair = new_pair(shape, 11, form)
    for each in random_decode(shape, 8, seed=4):
        decide(pair.device, each)
    for done in pair.device.read_trace():
        assert traced(pair.host, done.event)[2:] == (done.hits, done.loads)
    assert_same_place(pair)
    assert_same_state(pair)


def test_trace_of_many_events_goes_round_the_ring() -> None:
    shape = grid(2, 6)
    pair = new_pair(shape, 5, "lru", trace_events=7)
    events = random_decode(shape, 10, seed=2)
    for first in range(0, 20, 5):
        expected = [traced(pair.host, each) for each in events[first : first + 5]]
        for each in events[first : first + 5]:
            decide(pair.device, each)
        done = pair.device.read_trace()
        assert [in_words(one) for one in done] == expected
        assert [one.event.step for one in done] == [e.step for e in events[first : first + 5]]
    assert pair.device.read_trace() == []


def test_overflow_of_the_ring_is_an_error_once() -> None:
    shape = grid(2, 6)
    device = DeviceDirectory(shape, 5, "lru", "cpu", trace_events=3)
    events = random_decode(shape, 3, seed=2)
    for each in events[:4]:
        decide(device, each)
    with pytest.raises(TraceError, match="4 events since the last reading, the ring holds 3"):
        device.read_trace()
    decide(device, events[4])
    (done,) = device.read_trace()
    assert done.event.experts.tolist() == events[4].experts.tolist()


def test_what_cannot_be_handed_over_is_refused() -> None:
    shape = grid(2, 6)
    device = DeviceDirectory(shape, 5, "lru", "cpu")
    for wrong in (grid(2, 6, top_k=3), grid(3, 6)):
        with pytest.raises(ConfigError, match="size class"):
            device.load_from(Directory(wrong, (5,), (0,) * wrong.num_layers), find("lru", wrong))
    for slots, classes in (((6,), (0, 0)), ((3, 2), (0, 1))):
        with pytest.raises(ConfigError, match="size class"):
            device.load_from(Directory(shape, slots, classes), find("lru", shape))
    with pytest.raises(ConfigError, match=r"policies\.lfru"):
        device.load_from(Directory(shape, (5,), (0, 0)), find("lfru", shape))
    with pytest.raises(ConfigError, match="fifo has no kernel"):
        DeviceDirectory(shape, 5, "fifo", "cpu")
    with pytest.raises(ConfigError, match="1 slots"):
        DeviceDirectory(shape, 1, "lru", "cpu")


def find(name: str, shape: ExpertShape) -> CachePolicy:
    return find_policy(name)(shape, 5)


def test_a_kernel_is_for_one_class_exactly() -> None:
    """A policy derived from one that has a kernel may score otherwise."""
    shape = grid(2, 6)
    assert [kernel_form(find(name, shape)) for name in (*FORMS, "fifo")] == [*FORMS, None]
    assert kernel_form(GuardedPolicy(find("next_use", shape))) == "next_use"
    derived = type("Derived", (find_policy("lru"),), {})
    assert kernel_form(derived(shape, 5)) is None


@settings(max_examples=12)
@given(
    num_words=st.integers(1, 40),
    loads=st.lists(st.integers(-1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_gather_brings_the_bytes_and_touches_nothing_else(
    num_words: int, loads: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    num_bytes = 16 * num_words
    host = torch.from_numpy(rng.integers(0, 255, (6, num_bytes + 16), dtype=np.uint8))
    arena = torch.from_numpy(rng.integers(0, 255, (4, num_bytes + 16), dtype=np.uint8))
    expected = arena.clone()
    slots = rng.permutation(4)[: len(loads)].astype(np.int32)
    for key, slot in zip(loads, slots.tolist(), strict=True):
        if key >= 0:
            expected[slot, :num_bytes] = host[key, :num_bytes]
    keys = torch.tensor(loads, dtype=torch.int32)
    decision = Decision(keys, keys, torch.from_numpy(slots))
    sources = torch.tensor([row.data_ptr() for row in host])
    targets = torch.tensor([row.data_ptr() for row in arena])
    gather(decision, sources, targets, num_bytes)
    assert torch.equal(arena, expected)


def test_gather_refuses_odd_sizes() -> None:
    none = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ConfigError, match="24 bytes"):
        gather(Decision(none, none, none), none, none, 24)


def test_a_token_finds_the_bytes_of_its_experts() -> None:
    """Decisions and copies together, over a working set larger than the cache."""
    shape = grid(3, 8, top_k=3)
    device = DeviceDirectory(shape, 10, "next_use", "cpu")
    host = torch.arange(24, dtype=torch.int64)[:, None].repeat(1, 4)  # 32 bytes an expert
    arena = torch.full((10, 4), -1)
    sources = torch.tensor([row.data_ptr() for row in host])
    targets = torch.tensor([row.data_ptr() for row in arena])
    for each in random_decode(shape, 6, seed=9):
        decision = decide(device, each)
        gather(decision, sources, targets, 32)
        wanted = each.layer * 8 + each.top_k_index[0]
        assert arena[decision.slots.long()].tolist() == host[wanted].tolist()


COMPILE = textwrap.dedent(
    """
    import struct
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from moe_infinity.kernels.gpu import directory

    LARGE = dict(L=48, E=128, S=3000, K=8, K2=8, E2=128, CHUNK=2048)
    SMALL = dict(L=1, E=2, S=1, K=1, K2=1, E2=2, CHUNK=1)

    def built(kernel, capability, pointers, constants, **options):
        names = [*kernel.arg_names]
        kinds = pointers.split() + ["constexpr"] * (len(names) - len(pointers.split()))
        source = ASTSource(kernel, dict(zip(names, kinds)), constexprs=constants)
        target = GPUTarget("cuda", capability, 32)
        asm = compile(source, target=target, options=options).asm
        assert asm["cubin"]
        return asm["ptx"]

    def check_decide(capability, form, sizes):
        ptx = built(
            directory.decide_kernel,
            capability,
            "*i64 i32 *i32 *i32 *i32 *fp64 *i64 *i64 *i32 *i32",
            dict(POLICY=form, RING=3072, FLOOR=0.01, **sizes),
            num_warps=16,
            enable_fp_fusion=False,
        )
        assert "fma.rn.f64" not in ptx, form
        for number in (0.9, 0.998, 1e-4, 0.01) if form == "next_use" else ():
            double = "0d" + struct.pack(">d", number).hex().upper()
            assert double in ptx, f"{number} is not a double"

    def check_gather(capability):
        sizes = dict(NUM_WORDS=1 << 20, PROGRAMS=32, BLOCK=2048)
        ptx = built(directory.gather_kernel, capability, "*i32 *i32 *i64 *i64", sizes)
        assert "ld.global.cg.v2.b64" in ptx, "not 16 bytes at a time"

    for capability in (80, 90):
        for form in ("lru", "lfru", "next_use"):
            check_decide(capability, form, LARGE)
        check_gather(capability)
    check_decide(90, "next_use", SMALL)
    """
)


def test_kernels_compile_for_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For sm_80 and sm_90, without one: doubles stay doubles, and nothing is rounded less often."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(SOURCES))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_handed_over_while_loads_are_under_way() -> None:
    shape = grid(2, 6)
    residency = new_residency(shape, [5])
    residency.begin_event(event(0, [1, 2], 6))
    residency.admit()
    assert residency.directory.keys_in(State.IN_FLIGHT)
    device = DeviceDirectory(shape, 5, "lru", "cpu")
    with pytest.raises(AssertionError, match="in flight"):
        device.load_from(residency.directory, residency.policy)
