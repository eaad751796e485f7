"""Training of sparse autoencoders on the activations of a language model (HierarchicalTopK, arXiv 2505.24473)."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from trainers.sae.cache import ActivationCache
    from trainers.sae.sae_config import SAETrainingArguments
    from trainers.sae.sae_trainer import SAETrainer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ActivationCache": "trainers.sae.cache",
        "SAETrainer": "trainers.sae.sae_trainer",
        "SAETrainingArguments": "trainers.sae.sae_config",
    },
)
