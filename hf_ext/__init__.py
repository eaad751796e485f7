"""hf_ext: ten research systems as everyday Hugging Face citizens.

- Importing this package costs milliseconds and loads no torch: public names are resolved on first use.
- Importing it makes our models known to transformers' Auto classes and our adapter to PEFT, in any order of imports.
"""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach
from hf_ext._registration import register_adapters, register_models


if TYPE_CHECKING:
    from hf_ext.gstar import (
        ErrorPredictor,
        ErrorPredictorConfig,
        GStarPipeline,
        MDLMConfig,
        MDLMForMaskedLM,
        MDLMModel,
        StarShapedScheduler,
    )
    from hf_ext.lime import LimeConfig, LimeForCausalLM, LimeModel, lime_param_groups
    from hf_ext.sae import (
        SAEAugmentedConfig,
        SAEAugmentedModelForCausalLM,
        SAEConfig,
        SAEModel,
        SparseCodes,
        export_sae,
        hierarchical_loss,
        load_sae,
    )
    from hf_ext.steering import SteeredConfig, SteeredModelForCausalLM, SteeringConfig, SteeringLayer, SteeringModel
    from hf_ext.vldac import ValueHead, ValueHeadConfig

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LimeConfig": "hf_ext.lime",
        "LimeForCausalLM": "hf_ext.lime",
        "LimeModel": "hf_ext.lime",
        "ErrorPredictor": "hf_ext.gstar",
        "ErrorPredictorConfig": "hf_ext.gstar",
        "GStarPipeline": "hf_ext.gstar",
        "MDLMConfig": "hf_ext.gstar",
        "MDLMForMaskedLM": "hf_ext.gstar",
        "MDLMModel": "hf_ext.gstar",
        "StarShapedScheduler": "hf_ext.gstar",
        "SteeredConfig": "hf_ext.steering",
        "SteeredModelForCausalLM": "hf_ext.steering",
        "SteeringConfig": "hf_ext.steering",
        "SteeringLayer": "hf_ext.steering",
        "SteeringModel": "hf_ext.steering",
        "SAEAugmentedConfig": "hf_ext.sae",
        "SAEAugmentedModelForCausalLM": "hf_ext.sae",
        "SAEConfig": "hf_ext.sae",
        "SAEModel": "hf_ext.sae",
        "SparseCodes": "hf_ext.sae",
        "ValueHead": "hf_ext.vldac",
        "ValueHeadConfig": "hf_ext.vldac",
        "export_sae": "hf_ext.sae",
        "hierarchical_loss": "hf_ext.sae",
        "lime_param_groups": "hf_ext.lime",
        "load_sae": "hf_ext.sae",
    },
)

register_models()
register_adapters()
