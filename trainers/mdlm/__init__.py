"""Training of masked diffusion language models (MDLM, arXiv 2406.07524)."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from trainers.mdlm.mdlm_config import MDLMTrainingArguments
    from trainers.mdlm.mdlm_trainer import MDLMTrainer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"MDLMTrainer": "trainers.mdlm.mdlm_trainer", "MDLMTrainingArguments": "trainers.mdlm.mdlm_config"},
)
