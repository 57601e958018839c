"""Random matrices in formats whose scales lie apart, laid out as their files have them."""

import numpy as np
import torch

from moe_infinity.kernels.packed import PackedMatrix
from moe_infinity.kernels.planes import Scales


def random_planes(
    number_format: str,
    rows: int,
    cols: int,
    seed: int = 0,
    has_zeros: bool = True,
    group: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> PackedMatrix:
    """rows and cols: multiples of 8 where words hold them; cols of 32 for MXFP4. group, dtype: of
    scales; what is usual if they are not given."""
    rng = np.random.default_rng(seed)
    if number_format == "F8_E4M3":
        codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
        codes[codes & 127 == 127] = 0  # no number
        group = group or (128, 128)
        grid = (-(-rows // group[0]), -(-cols // group[1]))
        if dtype is torch.uint8:
            values = torch.from_numpy(rng.integers(115, 122, grid, dtype=np.uint8))
        else:
            values = torch.from_numpy(rng.uniform(0.001, 0.01, grid).astype(np.float32))
            values = values.to(dtype or torch.float32)
        return PackedMatrix(number_format, rows, cols, _flat(codes), Scales(values, group))
    if number_format == "MXFP4_PLANES":
        codes = rng.integers(0, 256, (rows, cols // 2), dtype=np.uint8)
        exponents = rng.integers(110, 124, (rows, cols // 32), dtype=np.uint8)
        scales = Scales(torch.from_numpy(exponents), (1, 32))
        return PackedMatrix(number_format, rows, cols, _flat(codes), scales)
    size = group[1] if group else 32 if cols % 64 else 64
    codes = rng.integers(0, 256, rows * cols // 2, dtype=np.uint8)
    num_groups = -(-cols // size)
    is_across = number_format == "INT4"  # [R, groups], else [groups, R]
    shape = (rows, num_groups) if is_across else (num_groups, rows)
    values = torch.from_numpy(rng.uniform(0.01, 0.1, shape).astype(np.float32))
    values = values.to(dtype or (torch.bfloat16 if is_across else torch.float16))
    zeros = None
    if has_zeros:
        shape = (rows // 8, num_groups) if is_across else (num_groups, rows // 8)
        words = rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)
        zeros = torch.from_numpy(words)
    if not is_across:
        values = values.T
        zeros = None if zeros is None else zeros.T
    return PackedMatrix(number_format, rows, cols, _flat(codes), Scales(values, (1, size)), zeros)


def _flat(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes.reshape(-1))
