"""Random weights in llama.cpp's formats with two levels of scales: any bits but those of the
scales, which are small."""

import numpy as np

BLOCK_BYTES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where float16 numbers are


def random_blocks(rows: int, cols: int, number_format: str, seed: int = 0) -> np.ndarray:
    """[rows, bytes of a row] uint8."""
    rng = np.random.default_rng(seed * 1000 + rows + cols)
    size = BLOCK_BYTES[number_format]
    blocks = rng.integers(0, 256, (rows * cols // 256, size), dtype=np.uint8)
    for at in _SCALES[number_format]:
        scale = rng.uniform(1e-5, 2e-4, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


GROUP_BYTES = {"MXFP4": 17, "Q5_0": 22, "Q4_1": 20, "Q5_1": 24}


def random_groups(rows: int, cols: int, number_format: str, seed: int = 0) -> np.ndarray:
    """[rows, bytes of a row] uint8 of formats in groups of 32 that only GGUF files have."""
    rng = np.random.default_rng(seed * 1000 + rows + cols)
    groups = rng.integers(0, 256, (rows * cols // 32, GROUP_BYTES[number_format]), dtype=np.uint8)
    if number_format == "MXFP4":
        groups[:, 0] = rng.integers(110, 124, len(groups))
    else:
        for at in (0, 2) if number_format.endswith("_1") else (0,):
            scale = rng.uniform(0.001, 0.01, (len(groups), 1)).astype(np.float16)
            groups[:, at : at + 2] = scale.view(np.uint8)
    return groups.reshape(rows, -1)
