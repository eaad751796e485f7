"""Training of vision-language agents in Gymnasium worlds (VL-DAC, arXiv 2508.04280)."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from trainers.vldac.loading import language_lora
    from trainers.vldac.policy import Prompt, VisionPolicy
    from trainers.vldac.rollout import evaluate
    from trainers.vldac.vldac_config import VLDACConfig
    from trainers.vldac.vldac_trainer import VLDACTrainer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Prompt": "trainers.vldac.policy",
        "VLDACConfig": "trainers.vldac.vldac_config",
        "VLDACTrainer": "trainers.vldac.vldac_trainer",
        "VisionPolicy": "trainers.vldac.policy",
        "evaluate": "trainers.vldac.rollout",
        "language_lora": "trainers.vldac.loading",
    },
)
