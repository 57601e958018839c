"""Code that nobody runs any more does not count against the budget; what was written stays."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch

from moe_infinity import MoE
from moe_infinity.mapped_code import can_let_go, code_bytes, let_go, unchanged_code

NUM_BYTES = 4 * 2**20
NEW = b"new"
linux = pytest.mark.skipif(not can_let_go(), reason="Linux says what lies in files")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "library"
    path.write_bytes(b"old" + bytes(range(1, 256)) * (NUM_BYTES // 255))
    return path


def as_code(path: Path, write: bytes) -> tuple[mmap.mmap, int]:
    """Mapped as code is, all of it resident, and where; what is written to its begin lies in
    memory only."""
    with path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    if write:
        mapped[: len(write)] = write
    assert sum(mapped[:: mmap.PAGESIZE]) > 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    size = ctypes.c_size_t(len(mapped))
    access = mmap.PROT_READ | mmap.PROT_EXEC
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), size, access) == 0
    return mapped, address


def resident_at(address: int) -> int:
    found = unchanged_code(Path("/proc/self/smaps").read_text())
    return next(each.resident_bytes for each in found if each.start == address)


@linux
def test_pages_of_code_go_and_come_back(file: Path) -> None:
    mapped, address = as_code(file, write=b"")
    assert resident_at(address) >= NUM_BYTES - mmap.PAGESIZE
    let_go()
    assert resident_at(address) == 0
    assert mapped[:3] == b"old" and mapped[-1] == file.read_bytes()[-1]
    assert torch.equal(torch.ones(300, 300) @ torch.ones(300, 300), torch.full((300, 300), 300.0))


@linux
def test_what_was_written_stays(file: Path) -> None:
    mapped, _ = as_code(file, write=NEW)
    let_go()
    assert mapped[: len(NEW)] == NEW
    assert file.read_bytes()[: len(NEW)] == b"old"


def a_mapping(access: str = "r-xp", path: str = "/lib/a.so", **sizes: int) -> str:
    lines = {"Size": 2048, "Rss": 1024, "Anonymous": 0, "Swap": 0} | sizes
    shown = [f"{name + ':':<16}{size:>8} kB" for name, size in lines.items()]
    head = f"7f0000000000-7f0000200000 {access} 00001000 fe:00 12345    {path}"
    return "\n".join([head, *shown, "VmFlags: rd ex mr mw me"])


def test_only_code_that_is_what_its_file_says() -> None:
    (found,) = unchanged_code(a_mapping())
    assert found == (0x7F0000000000, 2 * 2**20, 2**20)
    assert len(list(unchanged_code("\n".join([a_mapping(), a_mapping(), ""])))) == 2
    for other in (
        a_mapping(access="r--p"),  # constants: patched when a library is loaded, maybe swapped out
        a_mapping(access="rwxp"),
        a_mapping(access="r-xs"),
        a_mapping(path=""),
        a_mapping(path="[vdso]"),
        a_mapping(Anonymous=4),
        a_mapping(Swap=4),
    ):
        assert not list(unchanged_code(other))


@linux
def test_an_open_model_holds_no_code_that_only_opening_ran(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MoE(tiny, ram="2GiB"):
        without = code_bytes()
    monkeypatch.setattr("moe_infinity.wiring.let_go", lambda: None)
    with MoE(tiny, ram="2GiB"):
        assert without < code_bytes() / 2
