"""What every device promises: copies in order, marks that wait, memory that is said to be there."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from moe_infinity.checkpoint.direct_io import allocate
from moe_infinity.devices.base import Device
from moe_infinity.devices.choice import open_device, open_devices
from moe_infinity.devices.cuda import CudaDevice
from moe_infinity.devices.simulated import SimulatedDevice
from moe_infinity.errors import BudgetError, ConfigError
from support.stores import TurnedClock

MIB = 1024**2
SIZE = 8 * MIB


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    opened = open_device(request.param)
    assert opened is not None
    yield opened
    opened.close()
    opened.close()


TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(
    params=["simulated,simulated:12", pytest.param("cuda:0,cuda:1", marks=TWO_GPUS)],
)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Device, Device]]:
    first, second = open_devices(request.param.split(","))
    yield first, second
    for each in (first, second):
        each.close()


def host(fill: int) -> torch.Tensor:
    """[SIZE] uint8 of page-aligned memory, as slots are."""
    made = torch.frombuffer(allocate(SIZE), dtype=torch.uint8)
    return made.fill_(fill)


def test_bytes_go_up_and_down(device: Device) -> None:
    source, back, there = host(7), host(0), device.allocate(SIZE)
    up, down = device.new_stream("up"), device.new_stream("down")
    up.copy(there, source)
    down.after(up.mark())
    down.copy(back, there)
    mark = down.mark()
    mark.wait()
    assert mark.is_reached()
    assert (back == 7).all()


def test_a_stream_keeps_its_order(device: Device) -> None:
    there, back, up = device.allocate(SIZE), host(0), device.new_stream("up")
    for fill in (1, 2, 3):
        up.copy(there, host(fill))
        up.mark().wait()
    down = device.new_stream("down")
    down.copy(back, there)
    down.mark().wait()
    assert (back == 3).all()


def test_the_computation_waits_on_the_device(device: Device) -> None:
    there, up = device.allocate(SIZE), device.new_stream("up")
    source = host(5)
    assert device.pin(source) in (True, False)
    up.copy(there, source)
    device.compute.after(up.mark())
    assert int(there.sum()) == 5 * SIZE
    assert device.take_stall_s() >= 0
    device.close()


def test_what_was_launched_is_waited_for(device: Device) -> None:
    there, up = device.allocate(SIZE), device.new_stream("up")
    there.fill_(1)
    total = there.sum(dtype=torch.int64)
    up.after(device.compute.mark())
    up.copy(there, host(9))
    up.mark().wait()
    assert int(total) == SIZE
    assert int(there[0]) == 9


def test_work_is_recorded_without_being_done(device: Device) -> None:
    number = torch.zeros(4, device=device.torch_device)

    def add() -> None:
        number.add_(1)

    add()
    again = device.capture(add)
    assert number.tolist() == [1.0] * 4
    again()
    again()
    assert number.tolist() == [3.0] * 4


def test_speeds_and_sizes_are_positive(device: Device) -> None:
    assert device.link_gbps() > 0
    assert (device.memory_gbps() or 1) > 0
    assert 0 < device.free_bytes() <= device.total_bytes()
    assert device.name


def test_a_simulated_device_does_not_grow_where_others_give_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = iter([3 * MIB, 2 * MIB, 5 * MIB])
    monkeypatch.setattr("moe_infinity.devices.simulated.available_bytes", lambda: next(left))
    device = SimulatedDevice()
    assert [device.free_bytes(), device.free_bytes()] == [2 * MIB, 3 * MIB]
    assert device.total_bytes() == 3 * MIB


def test_more_than_there_is_is_refused(device: Device) -> None:
    with pytest.raises(BudgetError, match="expected at most the"):
        device.allocate(device.total_bytes() * 2)


class TestTwo:
    def test_a_tensor_is_brought_there_and_back(self, pair: tuple[Device, Device]) -> None:
        first, second = pair
        with first.computing():
            there = torch.arange(1000, device=first.torch_device).view(10, 100)
            here = second.bring(there, first)
            with second.computing():
                changed = here + 1
            back = first.bring(changed, second)
            there.zero_()
            assert here.device == changed.device == second.torch_device
            assert back.device == first.torch_device
            assert torch.equal(back.cpu(), torch.arange(1000).view(10, 100) + 1)

    def test_whatever_streams_the_caller_uses(self, pair: tuple[Device, Device]) -> None:
        first, second = pair
        with first.computing():
            there = torch.arange(1000, device=first.torch_device)
        with _on_streams_of_its_own(first), _on_streams_of_its_own(second):
            here = second.bring(there, first)
        with second.computing():
            assert torch.equal(here.cpu(), torch.arange(1000))

    def test_what_one_sent_down_the_other_takes_up(self, pair: tuple[Device, Device]) -> None:
        first, second = pair
        there, here, between = first.allocate(SIZE), second.allocate(SIZE), host(0)
        there.fill_(6)
        here.zero_()
        down, up = first.new_stream("down"), second.new_stream("up")
        down.after(first.compute.mark())
        down.copy(between, there)
        up.after(second.compute.mark())
        up.after(down.mark())
        up.copy(here, between)
        second.compute.after(up.mark())
        with second.computing():
            assert int(here.sum()) == 6 * SIZE

    def test_memory_pinned_once_is_pinned_for_both(self, pair: tuple[Device, Device]) -> None:
        source = host(5)
        was_pinned = pair[0].pin(source)
        for each in pair:
            there, up = each.allocate(SIZE), each.new_stream("up")
            up.copy(there, source)
            each.compute.after(up.mark())
            with each.computing():
                assert int(there.sum()) == 5 * SIZE
        if was_pinned:
            pair[0].unpin(source)


@pytest.mark.parametrize("wrong", [1, 2])
def test_devices_that_bring_each_other_other_bytes_are_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """wrong: which copy, the one there or the one back."""
    real, calls = SimulatedDevice.bring, []

    def bring(device: SimulatedDevice, tensor: torch.Tensor, source: Device) -> torch.Tensor:
        calls.append(1)
        brought = real(device, tensor, source)
        return torch.zeros_like(brought) if len(calls) == wrong else brought

    monkeypatch.setattr(SimulatedDevice, "bring", bring)
    with pytest.raises(ConfigError, match="copied from simulated, 24 GB/s to simulated, 12 GB/s"):
        open_devices(["simulated", "simulated:12"])


def test_a_link_without_speed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got simulated:0\.0, expected GB/s"):
        open_device("simulated:0.0")


def _on_streams_of_its_own(device: Device) -> contextlib.AbstractContextManager[object]:
    if device.torch_device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device.torch_device))


def test_gpus_copy_on_the_streams_that_both_compute_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: torch orders a copy by the current streams, which are a caller's to choose."""
    open_now: set[str] = set()

    class Tokens(torch.Tensor):
        def to(self, *args: object, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
            assert open_now == {"first", "second"}
            return torch.ones(1)

    @contextlib.contextmanager
    def computing(device: CudaDevice) -> Iterator[None]:
        open_now.add(device.name)
        yield
        open_now.remove(device.name)

    monkeypatch.setattr(CudaDevice, "computing", computing)
    pair = [CudaDevice.__new__(CudaDevice) for _ in range(2)]
    for each, name in zip(pair, ("first", "second"), strict=True):
        each.name, each.torch_device = name, torch.device("cpu")
    assert pair[1].bring(Tokens(), pair[0]) == 1


class TestSimulated:
    """Beyond the contract: copies take effect when they end, and the link's time is kept."""

    def test_a_copy_is_not_there_before_its_time(self) -> None:
        clock = TurnedClock()
        device = SimulatedDevice(1.0, clock)
        there, up = device.allocate(SIZE), device.new_stream("up")
        there.zero_()
        up.copy(there, host(1))
        mark = up.mark()
        clock.at_s = 0.99 * SIZE / 1e9
        assert not mark.is_reached()
        assert not there.any()
        clock.at_s = SIZE / 1e9
        assert mark.is_reached()
        assert there.all()

    def test_one_direction_is_shared_and_the_other_is_not(self) -> None:
        clock = TurnedClock()
        device = SimulatedDevice(1.0, clock)
        there, other = device.allocate(SIZE), device.allocate(SIZE)
        for stream in (device.new_stream("up"), device.new_stream("up")):
            stream.copy(there, host(1))
            stream.mark().wait()
        assert clock.at_s == pytest.approx(2 * SIZE / 1e9)
        up, down = device.new_stream("up"), device.new_stream("down")
        before_s = clock.at_s
        up.copy(there, host(1))
        down.copy(host(0), other)
        up.mark().wait()
        down.mark().wait()
        assert clock.at_s - before_s == pytest.approx(SIZE / 1e9)

    def test_stall_is_what_the_computation_waited(self) -> None:
        clock = TurnedClock()
        device = SimulatedDevice(1.0, clock)
        there, up = device.allocate(SIZE), device.new_stream("up")
        up.copy(there, host(1))
        clock.at_s = 0.25 * SIZE / 1e9
        device.compute.after(up.mark())
        assert device.take_stall_s() == pytest.approx(0.75 * SIZE / 1e9)
        assert device.take_stall_s() == 0

    def test_tokens_take_the_slower_links_time_and_wait_for_both(self) -> None:
        clock = TurnedClock()
        first = SimulatedDevice(2.0, clock)
        second = SimulatedDevice(1.0, beside=first)
        tokens = torch.zeros(1000, dtype=torch.uint8)
        second.bring(tokens, first)
        assert clock.at_s == pytest.approx(1000 / 1e9)
        second.compute.lag_s = 3.0
        before_s = clock.at_s
        first.bring(tokens, second)
        assert clock.at_s - before_s == pytest.approx(3.0 + 1000 / 1e9)

    def test_links_are_each_ones_own(self) -> None:
        clock = TurnedClock()
        first = SimulatedDevice(1.0, clock)
        second = SimulatedDevice(1.0, beside=first)
        ups = [each.new_stream("up") for each in (first, second)]
        for up in ups:
            up.copy(first.allocate(SIZE), host(1))
        for up in ups:
            up.mark().wait()
        assert clock.at_s == pytest.approx(SIZE / 1e9)
