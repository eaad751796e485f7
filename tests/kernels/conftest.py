"""Kernels run on a GPU where there is one, else in Triton's interpreter (tests/conftest.py chooses it)."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    pytest.importorskip("triton", reason="the extra `kernels` brings it")
    return "cuda" if torch.cuda.is_available() else "cpu"
