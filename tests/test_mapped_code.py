"""Code that nobody runs any more does not count against the budget; what was written stays."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch

from moe_infinity import MoE
from moe_infinity.machine import own_bytes, resident_bytes
from moe_infinity.mapped_code import can_let_go, let_go

pytestmark = pytest.mark.skipif(not can_let_go(), reason="Linux says what lies in files")

NUM_BYTES = 4 * 2**20
NEW = b"new"


def in_files_bytes() -> int:
    return resident_bytes() - own_bytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "library"
    path.write_bytes(b"old" + bytes(range(1, 256)) * (NUM_BYTES // 255))
    return path


def read_only(path: Path, write: bytes) -> tuple[mmap.mmap, int]:
    """A private mapping, all of it resident; what is written to its begin lies in memory only."""
    with path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    if write:
        mapped[: len(write)] = write
    assert sum(mapped[:: mmap.PAGESIZE]) > 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    size = ctypes.c_size_t(len(mapped))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), size, mmap.PROT_READ) == 0
    return mapped, address


def test_files_pages_go_and_come_back(file: Path) -> None:
    mapped, _ = read_only(file, write=b"")
    before = in_files_bytes()
    let_go()
    assert in_files_bytes() < before - NUM_BYTES
    assert mapped[:3] == b"old" and mapped[-1] == file.read_bytes()[-1]
    assert torch.equal(torch.ones(300, 300) @ torch.ones(300, 300), torch.full((300, 300), 300.0))


def test_what_was_written_stays(file: Path) -> None:
    mapped, _ = read_only(file, write=NEW)
    let_go()
    assert mapped[: len(NEW)] == NEW
    assert file.read_bytes()[: len(NEW)] == b"old"


def test_an_open_model_holds_no_code_that_only_opening_ran(tiny: Path) -> None:
    with MoE(tiny, ram="2GiB") as moe:
        opened = in_files_bytes()
        moe.generate([[5, 6, 7]], max_new_tokens=4)
        assert opened < in_files_bytes(), "a request runs some of it again"
        assert opened < own_bytes() / 4
