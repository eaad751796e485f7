"""ESSA: evolution strategies on the singular values of a LoRA (arXiv 2507.04453 v3)."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from trainers.essa.essa_config import ESSAConfig
    from trainers.essa.essa_trainer import ESSATrainer
    from trainers.essa.full_cma import FullCMAES
    from trainers.essa.strategies import (
        OpenAIES,
        RandomSearch,
        SepCMAES,
        Strategy,
        Told,
        TooFewCandidates,
        make_strategy,
    )
    from trainers.essa.svd_lora import SearchSpace, SvdLora

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ESSAConfig": "trainers.essa.essa_config",
        "ESSATrainer": "trainers.essa.essa_trainer",
        "FullCMAES": "trainers.essa.full_cma",
        "OpenAIES": "trainers.essa.strategies",
        "RandomSearch": "trainers.essa.strategies",
        "SepCMAES": "trainers.essa.strategies",
        "SearchSpace": "trainers.essa.svd_lora",
        "Strategy": "trainers.essa.strategies",
        "SvdLora": "trainers.essa.svd_lora",
        "Told": "trainers.essa.strategies",
        "TooFewCandidates": "trainers.essa.strategies",
        "make_strategy": "trainers.essa.strategies",
    },
)
