"""Sparse autoencoders, and HierarchicalTopK (arXiv 2505.24473): one of them, good at every sparsity up to K."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from hf_ext.sae.configuration_sae import SAEConfig
    from hf_ext.sae.configuration_sae_augmented import SAEAugmentedConfig
    from hf_ext.sae.convert import ConventionReport, export_sae, load_sae, read_tensors
    from hf_ext.sae.feature_index import FeatureIndex
    from hf_ext.sae.feature_index_build import build_feature_index
    from hf_ext.sae.formats.saebench import to_saebench
    from hf_ext.sae.losses import auxk_loss, hierarchical_loss, matryoshka_loss, multi_topk_loss, reconstruction_loss
    from hf_ext.sae.modeling_sae import SAEModel, SAEOutput
    from hf_ext.sae.modeling_sae_augmented import SAEAugmentedModelForCausalLM
    from hf_ext.sae.sparse_ops import SparseCodes

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ConventionReport": "hf_ext.sae.convert",
        "FeatureIndex": "hf_ext.sae.feature_index",
        "SAEAugmentedConfig": "hf_ext.sae.configuration_sae_augmented",
        "SAEAugmentedModelForCausalLM": "hf_ext.sae.modeling_sae_augmented",
        "SAEConfig": "hf_ext.sae.configuration_sae",
        "SAEModel": "hf_ext.sae.modeling_sae",
        "SAEOutput": "hf_ext.sae.modeling_sae",
        "SparseCodes": "hf_ext.sae.sparse_ops",
        "auxk_loss": "hf_ext.sae.losses",
        "build_feature_index": "hf_ext.sae.feature_index_build",
        "export_sae": "hf_ext.sae.convert",
        "hierarchical_loss": "hf_ext.sae.losses",
        "load_sae": "hf_ext.sae.convert",
        "matryoshka_loss": "hf_ext.sae.losses",
        "multi_topk_loss": "hf_ext.sae.losses",
        "read_tensors": "hf_ext.sae.convert",
        "reconstruction_loss": "hf_ext.sae.losses",
        "to_saebench": "hf_ext.sae.formats.saebench",
    },
)
