"""The model card of SAEs that were trained: what they read, how, and what came of it."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trainers.sae.loading import step_tokens


_SHOWN = (
    "loss", "budgets", "groups", "sparsity_coefficient", "auxk_coefficient", "k_aux", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "max_grad_norm", "per_device_train_batch_size", "context_size",
    "skip_positions", "drop_special_tokens", "max_norm_ratio", "seed",
)  # fmt: skip
_BIBTEX = """@misc{hierarchical_topk,
  title = {HierarchicalTopK},
  year = {2025},
  eprint = {2505.24473},
  archivePrefix = {arXiv}
}"""
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

Sparse autoencoder{{ "s" if several }} of the activations of {{ base or "a language model" }}.

| name | hook | activation | d_in | d_sae | k |
|---|---|---|---|---|---|
{% for row in saes -%}
| {{ row | join(" | ") }} |
{% endfor %}
The code lies beside the weights: transformers is all that is needed. `trust_remote_code=True` runs that code, so read
it first.

```python
from transformers import AutoModel

repo = "you/{{ name }}"  # the id of this repository, or a folder that holds it
sae = AutoModel.from_pretrained(repo, {% if several %}subfolder="{{ saes[0][0] }}", {% endif %}trust_remote_code=True)
```

`sae.encode(x)` gives the active latents of activations `x` (..., d_in), `sae(x).reconstruction` what they add up to;
for `topk` any smaller budget is one argument, `sae.encode(x, k=8)`.

## Training

{{ tokens }} tokens in {{ steps }} steps{% if dataset %} of {{ dataset }}{% endif %}.

| option | value |
|---|---|
{% for option, value in options -%}
| {{ option }} | {{ value }} |
{% endfor %}
## Measured

{% if figures -%}
On tokens that were held out, at the end of training:

| SAE | metric | value |
|---|---|---|
{% for row in figures -%}
| {{ row | join(" | ") }} |
{% endfor %}
`ev_global` is 1 - sum |x - x^|^2 / sum |x - mean x|^2.
{%- else -%}
Not measured on tokens that were held out.
{%- endif %}

## Limits

Trained on one kind of text, at one place of one model: for others nothing is known.

## Citation

```bibtex
{{ bibtex }}
```
"""


def sae_card(trainer: Any, name: str | None = None, dataset: str | None = None, tags: Any = None) -> ModelCard:
    """The card of a trainer's SAEs; a base model is named where it has an id on the Hub."""
    from hf_ext.hub import is_hub_id

    base = next((one.config.base_model_name_or_path for one in trainer.saes.values()), None)
    base = base if is_hub_id(base) else None
    names = [tags] if isinstance(tags, str) else list(tags or [])
    hierarchical = trainer.args.loss == "hierarchical"
    data = ModelCardData(
        library_name="transformers",
        license="apache-2.0",
        base_model=base,
        tags=sorted({*names, "hf_ext", "sae", "sparse-autoencoder", *(["arxiv:2505.24473"] if hierarchical else [])}),
    )
    saes = [
        (key, f"{one.config.hook_name} ({one.config.hook_io})", one.config.activation, one.config.d_in,
         one.config.d_sae, one.config.k)
        for key, one in trainer.saes.items()
    ]  # fmt: skip
    history = trainer.state.log_history
    measured = [entry for entry in history if any(key.endswith("ev_global") for key in entry)]
    last = measured[-1] if measured else {}
    figures = []
    for key, value in last.items():
        if key.startswith("eval_") and key not in ("eval_runtime",):
            sae, _, metric = key.removeprefix("eval_").rpartition("/")
            figures.append((sae or "sae", metric, f"{value:.4g}"))
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=name or "sae",
        several=trainer._several,
        base=f"[{base}](https://huggingface.co/{base})" if base else None,
        saes=saes,
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step * step_tokens(trainer.args),
        dataset=dataset,
        options=[(option, getattr(trainer.args, option)) for option in _SHOWN],
        figures=figures,
        bibtex=_BIBTEX,
    )
