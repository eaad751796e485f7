"""Make the steering adapter known to PEFT, whose own way of registering refuses types that its enum does not list."""

import peft
from peft import mapping

from hf_ext.steering.config import SteeringConfig, SteeringPeftType
from hf_ext.steering.model import SteeringModel


def register() -> None:
    """
    Put the type into PEFT's four dictionaries. Doing so twice changes nothing.

    Raises:
        RuntimeError: if PEFT, or another package, has a type of this name already.
    """
    kind = SteeringPeftType.STEERING
    taken = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind, SteeringConfig)
    if kind.value in peft.PeftType.__members__ or taken is not SteeringConfig:
        raise RuntimeError(
            f"peft {peft.__version__} must not have a type STEERING of its own, got {taken.__module__}. Install a "
            "version of peft that hf_ext lists as tested, or a newer hf_ext."
        )
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = SteeringConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = SteeringModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = SteeringModel.prefix
    mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[kind] = SteeringModel
