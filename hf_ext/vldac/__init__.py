"""What VL-DAC (arXiv 2508.04280) adds to a vision-language model: a critic on its hidden states."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from hf_ext.vldac.modeling_value_head import ValueHead, ValueHeadConfig

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ValueHead": "hf_ext.vldac.modeling_value_head",
        "ValueHeadConfig": "hf_ext.vldac.modeling_value_head",
    },
)
