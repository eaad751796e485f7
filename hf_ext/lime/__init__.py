"""LIMe: Layer-Integrated Memory (arXiv 2502.09245 v2)."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from hf_ext.lime.configuration_lime import LimeConfig
    from hf_ext.lime.modeling_lime import LimeForCausalLM, LimeModel
    from hf_ext.lime.optim import lime_param_groups

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LimeConfig": "hf_ext.lime.configuration_lime",
        "LimeForCausalLM": "hf_ext.lime.modeling_lime",
        "LimeModel": "hf_ext.lime.modeling_lime",
        "lime_param_groups": "hf_ext.lime.optim",
    },
)
