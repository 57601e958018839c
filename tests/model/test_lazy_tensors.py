"""What the library's loader is given: coded tensors become numbers piece by piece."""

import numpy as np
import pytest
import torch

from moe_infinity.checkpoint.base import TensorEntry
from moe_infinity.kernels.gguf_formats import decode_blocks
from moe_infinity.model import lazy_tensors
from moe_infinity.model.lazy_tensors import lazy_tensor
from support.super_blocks import random_blocks

ROWS, COLS = 1300, 512


class Source:
    """Holds one tensor after some other bytes, and notes what is read at once."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data.tobytes()
        self.pieces: list[int] = []

    def read_tensor(self, entry: TensorEntry, into: memoryview) -> None:
        start = entry.offset - 100
        into[:] = self.data[start : start + entry.num_bytes]
        self.pieces.append(entry.num_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coded_tensors_are_decoded_in_pieces(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_tensors, "_DECODED_AT_ONCE", 600 * COLS)
    blocks = random_blocks(ROWS, COLS, "Q6_K")
    source = Source(blocks)
    entry = TensorEntry("x", "Q6_K", (ROWS, COLS), 0, 100, blocks.size)
    found = lazy_tensor(source, entry, [], dtype)  # type: ignore[arg-type]
    assert found.get_shape() == [ROWS, COLS]
    expected = decode_blocks(blocks.reshape(-1, 210), "Q6_K").reshape(ROWS, COLS)
    assert torch.equal(found[...], torch.from_numpy(expected).to(dtype))
    row = blocks.shape[1]
    assert source.pieces == [512 * row, 512 * row, 276 * row]  # whole heads
