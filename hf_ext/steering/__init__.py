"""Steering vectors as a PEFT type (arXiv 2505.18706)."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from hf_ext.steering.config import SteeringConfig, SteeringPeftType
    from hf_ext.steering.configuration_steered import SteeredConfig
    from hf_ext.steering.contrastive import contrastive_vectors
    from hf_ext.steering.export import export_model
    from hf_ext.steering.layer import SteeringLayer
    from hf_ext.steering.model import SteeringModel
    from hf_ext.steering.modeling_steered import SteeredModelForCausalLM
    from hf_ext.steering.vectors import add_vectors, read_vectors, save_gguf, save_npy

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "SteeredConfig": "hf_ext.steering.configuration_steered",
        "SteeredModelForCausalLM": "hf_ext.steering.modeling_steered",
        "SteeringConfig": "hf_ext.steering.config",
        "SteeringLayer": "hf_ext.steering.layer",
        "SteeringModel": "hf_ext.steering.model",
        "SteeringPeftType": "hf_ext.steering.config",
        "add_vectors": "hf_ext.steering.vectors",
        "contrastive_vectors": "hf_ext.steering.contrastive",
        "export_model": "hf_ext.steering.export",
        "read_vectors": "hf_ext.steering.vectors",
        "save_gguf": "hf_ext.steering.vectors",
        "save_npy": "hf_ext.steering.vectors",
    },
)
