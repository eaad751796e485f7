"""Triton kernels for the decoder of a sparse autoencoder, each with a plain reference in `sae_decoder.reference`."""

from . import reference
from .products import decode, values_gradient


__all__ = ["decode", "reference", "values_gradient"]
