"""LIMe: Layer-Integrated Memory (arXiv 2502.09245 v2)."""

from hf_ext.lime.configuration_lime import LimeConfig
from hf_ext.lime.modeling_lime import LimeForCausalLM, LimeModel
from hf_ext.lime.optim import lime_param_groups


__all__ = ["LimeConfig", "LimeForCausalLM", "LimeModel", "lime_param_groups"]
