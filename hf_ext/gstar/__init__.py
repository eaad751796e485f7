"""G-Star (arXiv 2510.08369): masked diffusion that takes back what a learned predictor holds for an error."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from hf_ext.gstar.convert import import_mdlm
    from hf_ext.gstar.metrics import NELBO, nelbo
    from hf_ext.gstar.modeling_error_predictor import ErrorPredictor, ErrorPredictorConfig, ErrorPredictorOutput
    from hf_ext.gstar.modeling_mdlm import MDLMConfig, MDLMForMaskedLM, MDLMModel, MDLMOutput
    from hf_ext.gstar.pipeline_gstar import GStarFrame, GStarPipeline, GStarPipelineOutput
    from hf_ext.gstar.scheduling_star_shaped import (
        StarShapedProposal,
        StarShapedScheduler,
        StarShapedSchedulerOutput,
        remdm_probabilities,
    )

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ErrorPredictor": "hf_ext.gstar.modeling_error_predictor",
        "ErrorPredictorConfig": "hf_ext.gstar.modeling_error_predictor",
        "ErrorPredictorOutput": "hf_ext.gstar.modeling_error_predictor",
        "GStarFrame": "hf_ext.gstar.pipeline_gstar",
        "GStarPipeline": "hf_ext.gstar.pipeline_gstar",
        "GStarPipelineOutput": "hf_ext.gstar.pipeline_gstar",
        "MDLMConfig": "hf_ext.gstar.modeling_mdlm",
        "MDLMForMaskedLM": "hf_ext.gstar.modeling_mdlm",
        "MDLMModel": "hf_ext.gstar.modeling_mdlm",
        "MDLMOutput": "hf_ext.gstar.modeling_mdlm",
        "NELBO": "hf_ext.gstar.metrics",
        "StarShapedProposal": "hf_ext.gstar.scheduling_star_shaped",
        "StarShapedScheduler": "hf_ext.gstar.scheduling_star_shaped",
        "StarShapedSchedulerOutput": "hf_ext.gstar.scheduling_star_shaped",
        "import_mdlm": "hf_ext.gstar.convert",
        "nelbo": "hf_ext.gstar.metrics",
        "remdm_probabilities": "hf_ext.gstar.scheduling_star_shaped",
    },
)
