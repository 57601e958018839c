"""Code that nobody runs any more does not count against the budget; what was written stays."""

import ctypes
import mmap
import re
from pathlib import Path

import pytest
import torch

from moe_infinity import MoE
from moe_infinity.mapped_code import (
    can_let_go,
    code_bytes,
    code_places,
    let_go,
    unchanged_code,
)
from support.smaps import mappings

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
    found = {each.start: each.resident_bytes for each in unchanged_code()}
    return found.get(address, 0)


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


@linux
def test_code_that_was_written_to_is_not_what_its_file_says(file: Path) -> None:
    kept = [as_code(file, write) for write in (b"", NEW)]
    found = {each.start: each for each in unchanged_code()}
    assert found[kept[0][1]].num_bytes >= NUM_BYTES
    assert kept[1][1] not in found


@linux
def test_as_much_as_the_system_counts() -> None:
    """Its own sums cost a look at every page of the process."""
    places = {start for start, _ in code_places(Path("/proc/self/maps").read_text())}
    counted = 0
    for part in mappings():
        sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", part, re.MULTILINE))
        start = int(part.partition("-")[0], 16)
        if start in places and sizes["Anonymous"] == sizes["Swap"] == "0":
            counted += int(sizes["Rss"]) * 1024
    assert counted > 2**20
    assert abs(code_bytes() - counted) < 2**20, "the second look ran through code, too"


@linux
def test_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_infinity.mapped_code._PAGEMAP", tmp_path)  # exists, cannot be read
    assert can_let_go() and code_bytes() == 0
    let_go()
    for says_little in (tmp_path / "short", Path("/dev/zero")):
        (tmp_path / "short").touch()
        monkeypatch.setattr("moe_infinity.mapped_code._PAGEMAP", says_little)
        assert unchanged_code() == []


def test_places_of_code() -> None:
    line = "7f0000{:x}00000-7f0000{:x}00000 {} {:08x} fe:00 12345    {}"
    name = "/lib/a library.so"
    pieces = enumerate(("r--p", "r-xp", "r--p", "rw-p"), start=1)
    library = [line.format(at, at + 1, access, at << 20, name) for at, access in pieces]
    others = [
        line.format(0, 1, "r--p", 9 << 20, name),  # beside the library, but not a part of it
        *library,
        line.format(5, 6, "r--p", 0, "/lib/b.so"),  # nobody runs it
        line.format(7, 8, "r--p", 0, name),  # not where the library is
        line.format(8, 9, "r--p", 0, "/lib/c.so"),  # of another file than the code behind it
        line.format(9, 10, "r-xp", 0, "/lib/d.so"),
        line.format(11, 12, "rwxp", 0, "/lib/e.so"),
        line.format(12, 13, "r-xs", 0, "/lib/f.so"),
        line.format(13, 14, "r-xp", 0, "").rstrip(),
        line.format(14, 15, "r-xp", 0, "[vdso]"),
    ]
    expected = [(at << 20, at + 1 << 20) for at in (1, 2, 3, 9)]
    found = code_places("\n".join([*others, ""]))
    assert [(start - (0x7F0000 << 24), end - (0x7F0000 << 24)) for start, end in found] == expected


@linux
def test_an_open_model_holds_no_code_that_only_opening_ran(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_infinity.wiring.let_go", let_go)  # conftest.py leaves it out
    with MoE(tiny, ram="2GiB"):
        without = code_bytes()
    monkeypatch.setattr("moe_infinity.wiring.let_go", lambda: None)
    with MoE(tiny, ram="2GiB"):
        assert without < code_bytes() / 2
