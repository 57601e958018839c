"""Triton's interpreter cuts bfloat16 off where GPUs round: here it rounds to nearest, too."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _bfloat16_is_rounded() -> Iterator[None]:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = pytest.importorskip("triton.language")
    usual = interpreter._convert_float

    def convert(data, from_type, to_type, rounding_mode):  # type: ignore[no-untyped-def]
        if from_type == language.float32 and to_type == language.bfloat16:
            floats = np.ascontiguousarray(data).view(np.float32)
            return torch.from_numpy(floats).bfloat16().view(torch.uint16).numpy()
        return usual(data, from_type, to_type, rounding_mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield
