"""Slots are page-aligned, apart from one another, and the same memory in both views."""

from moe_infinity.cache.slots import SlotArena
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES


def test_slots_are_aligned_and_disjoint() -> None:
    arena = SlotArena((3, 2), (5000, 100))
    addresses = []
    for slot in range(5):
        tensor = arena.tensor(slot)
        assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
        assert len(arena.buffer(slot)) == tensor.numel() == (8192 if slot < 3 else 4096)
        addresses.append((tensor.data_ptr(), tensor.numel()))
    ends = [start + size for start, size in addresses]
    assert all(end <= start for end, (start, _) in zip(ends, addresses[1:], strict=False))
    assert arena.num_bytes == 3 * 8192 + 2 * 4096
    arena.close()


def test_buffer_and_tensor_are_the_same_bytes() -> None:
    arena = SlotArena((2,), (4096,))
    arena.buffer(1)[:3] = b"abc"
    assert bytes(arena.tensor(1)[:3].tolist()) == b"abc"
    assert not arena.tensor(0).any()
    arena.close()
