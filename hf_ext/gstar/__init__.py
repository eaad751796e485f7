"""G-Star (arXiv 2510.08369): masked diffusion that takes back what a learned predictor holds for an error."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from hf_ext.gstar.scheduling_star_shaped import (
        StarShapedProposal,
        StarShapedScheduler,
        StarShapedSchedulerOutput,
        remdm_probabilities,
    )

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "StarShapedProposal": "hf_ext.gstar.scheduling_star_shaped",
        "StarShapedScheduler": "hf_ext.gstar.scheduling_star_shaped",
        "StarShapedSchedulerOutput": "hf_ext.gstar.scheduling_star_shaped",
        "remdm_probabilities": "hf_ext.gstar.scheduling_star_shaped",
    },
)
