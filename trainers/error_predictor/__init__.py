"""Training of G-Star's error predictor (arXiv 2510.08369)."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from trainers.error_predictor.error_predictor_config import ErrorPredictorTrainingArguments
    from trainers.error_predictor.error_predictor_trainer import ErrorPredictorTrainer
    from trainers.error_predictor.losses import bce_loss, rank_auc, ranknet_loss

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ErrorPredictorTrainer": "trainers.error_predictor.error_predictor_trainer",
        "ErrorPredictorTrainingArguments": "trainers.error_predictor.error_predictor_config",
        "bce_loss": "trainers.error_predictor.losses",
        "rank_auc": "trainers.error_predictor.losses",
        "ranknet_loss": "trainers.error_predictor.losses",
    },
)
