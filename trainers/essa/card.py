"""The model card of an adapter that ESSA found."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData


_SHOWN = (
    "population_size", "batch_size_per_candidate", "optimizer", "sigma", "sigma_mode", "svd_fraction", "resample",
    "max_completion_length", "temperature", "seed",
)  # fmt: skip
_BIBTEX = """@misc{essa,
  title = {ESSA: Evolutionary Strategies for Scalable Alignment},
  year = {2025},
  eprint = {2507.04453},
  archivePrefix = {arXiv}
}"""
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A LoRA whose singular values were found by evolution strategies (ESSA, [arXiv 2507.04453](https://arxiv.org/abs/2507.04453)):
its singular vectors are those of the LoRA that the search started from. No gradient was computed.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

repo = "you/{{ name }}"  # the id of this repository, or a folder that holds it
model = AutoPeftModelForCausalLM.from_pretrained(repo)
tokenizer = AutoTokenizer.from_pretrained(repo)
```

## Search

{{ dim }} singular values, {{ steps }} generations, {{ completions }} completions, {{ tokens }} generated tokens;
rewards: {{ rewards }}{% if dataset %}; prompts: {{ dataset }}{% endif %}.

| option | value |
|---|---|
{% for option, value in options -%}
| {{ option }} | {{ value }} |
{% endfor %}
| | first | last |
|---|---|---|
{% for name, first, last in figures -%}
| {{ name }} | {{ first }} | {{ last }} |
{% endfor %}
Rewards are means over completions: `reward` of a generation's candidates, `eval_reward` of the search's mean, which is
what this repository holds.

## Limits

Measured by its own reward functions alone, in one run: what else has changed is not known.

## Citation

```bibtex
{{ bibtex }}
```
"""


def essa_card(trainer: Any, name: str | None = None, dataset: str | None = None, tags: Any = None) -> ModelCard:
    """The card of a trainer's result; a base model is named where it has an id on the Hub."""
    from hf_ext.hub import is_hub_id

    base = trainer.model.peft_config[trainer.model.active_adapters[0]].base_model_name_or_path
    base = base if is_hub_id(base) else None
    names = [tags] if isinstance(tags, str) else list(tags or [])
    data = ModelCardData(
        library_name="peft",
        base_model=base,
        pipeline_tag="text-generation",
        tags=sorted(
            {*names, "hf_ext", "essa", "lora", "arxiv:2507.04453", *([f"base_model:adapter:{base}"] if base else [])}
        ),
    )
    history = trainer.state.log_history
    figures = []
    for figure in sorted(
        {key for entry in history for key in entry if key in ("reward", "sigma") or key.endswith(("_reward", "_kl"))}
    ):
        values = [entry[figure] for entry in history if figure in entry]
        figures.append((figure, f"{values[0]:.4g}", f"{values[-1]:.4g}"))
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=name or "essa-adapter",
        dim=trainer.space.dim,
        steps=trainer.state.global_step,
        completions=trainer._counts["completions"],
        tokens=trainer._counts["tokens"],
        rewards=", ".join(f"`{reward}`" for reward in trainer.rewards.names),
        dataset=dataset,
        bibtex=_BIBTEX,
        options=[(option, getattr(trainer.args, option)) for option in _SHOWN],
        figures=figures,
    )
