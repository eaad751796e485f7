"""Steering vectors as a PEFT type (arXiv 2505.18706)."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from hf_ext.steering.config import SteeringConfig, SteeringPeftType
    from hf_ext.steering.layer import SteeringLayer
    from hf_ext.steering.model import SteeringModel

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "SteeringConfig": "hf_ext.steering.config",
        "SteeringLayer": "hf_ext.steering.layer",
        "SteeringModel": "hf_ext.steering.model",
        "SteeringPeftType": "hf_ext.steering.config",
    },
)
