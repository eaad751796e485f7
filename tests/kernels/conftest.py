"""Kernels run on a GPU where there is one, else in Triton's interpreter, which must be chosen before they are made."""

import os

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    pytest.importorskip("triton", reason="the extra `kernels` brings it")
    return DEVICE
