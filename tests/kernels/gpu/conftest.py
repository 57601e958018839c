"""Kernels run under Triton's interpreter, on CPU tensors; tests/conftest.py asks for it in time."""

import pytest

triton = pytest.importorskip("triton")
