"""Training methods, and the recipes that measure them; each method is a sub-package of its own."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from trainers.error_predictor import ErrorPredictorTrainer, ErrorPredictorTrainingArguments
    from trainers.essa import ESSAConfig, ESSATrainer
    from trainers.mdlm import MDLMTrainer, MDLMTrainingArguments
    from trainers.sae import SAETrainer, SAETrainingArguments
    from trainers.steering_rl import SteeringRLConfig, SteeringRLTrainer
    from trainers.vldac import VLDACConfig, VLDACTrainer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ESSAConfig": "trainers.essa.essa_config",
        "ESSATrainer": "trainers.essa.essa_trainer",
        "SAETrainer": "trainers.sae.sae_trainer",
        "SAETrainingArguments": "trainers.sae.sae_config",
        "ErrorPredictorTrainer": "trainers.error_predictor.error_predictor_trainer",
        "ErrorPredictorTrainingArguments": "trainers.error_predictor.error_predictor_config",
        "MDLMTrainer": "trainers.mdlm.mdlm_trainer",
        "MDLMTrainingArguments": "trainers.mdlm.mdlm_config",
        "SteeringRLConfig": "trainers.steering_rl.steering_rl_config",
        "SteeringRLTrainer": "trainers.steering_rl.steering_rl_trainer",
        "VLDACConfig": "trainers.vldac.vldac_config",
        "VLDACTrainer": "trainers.vldac.vldac_trainer",
    },
)
