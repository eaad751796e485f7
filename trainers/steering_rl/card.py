"""The model card of steering vectors that were trained by reinforcement learning."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData


_SHOWN = (
    "learning_rate", "num_generations", "max_completion_length", "temperature", "loss_type", "scale_rewards", "beta",
    "signed_rewards", "depth_scaled_lr", "seed",
)  # fmt: skip
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ count }} steering vectors of {{ width }} numbers each, added within {{ base or "their base model" }},
which stays as it is; trained by reinforcement learning ([arXiv 2505.18706](https://arxiv.org/abs/2505.18706)).

```python
import hf_ext  # makes the adapter's type known to PEFT
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

repo = "you/{{ name }}"  # the id of this repository, or a folder that holds it
model = AutoPeftModelForCausalLM.from_pretrained(repo)
tokenizer = AutoTokenizer.from_pretrained(repo)
```

Where hf_ext is not installed, PEFT does not know the type STEERING. `hf_ext.steering` exports the vectors in forms
that need nothing of ours.

## Training

{{ steps }} steps; rewards: {{ rewards }}{% if dataset %}; prompts: {{ dataset }}{% endif %}.

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
`reward` is the mean over completions sampled in training; `steering/ratio_mean` the norm of a vector over that of the
stream.

## Limits

Measured by its own reward functions alone, in one run: what else has changed is not known. Part of a gain at
temperature 1 is a sharper distribution: compare greedy answers too.

## Citation

```bibtex
@misc{steering,
  title = {Steering LLM Reasoning Through Bias-Only Adaptation},
  year = {2025},
  eprint = {2505.18706},
  archivePrefix = {arXiv}
}
```
"""


def steering_card(trainer: Any, name: str, dataset: str | None = None, tags: Any = None) -> ModelCard:
    """The card of a trainer's vectors; a base model is named where it has an id on the Hub."""
    from hf_ext.hub import is_hub_id

    policy = trainer.accelerator.unwrap_model(trainer.model)
    base = policy.active_peft_config.base_model_name_or_path
    base = base if is_hub_id(base) else None
    names = [tags] if isinstance(tags, str) else list(tags or [])
    named = [f"base_model:adapter:{base}"] if base else []
    data = ModelCardData(
        library_name="peft",
        base_model=base,
        pipeline_tag="text-generation",
        tags=sorted({*names, *trainer._tag_names, "arxiv:2505.18706", *named}),
    )
    history = trainer.state.log_history
    figures = []
    for figure in ("reward", "completions/mean_length", "entropy", "steering/norm_mean", "steering/ratio_mean"):
        values = [entry[figure] for entry in history if entry.get(figure) is not None]
        if values:
            figures.append((figure, f"{values[0]:.4g}", f"{values[-1]:.4g}"))
    vectors = trainer.vectors()
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=name,
        base=base,
        count=len(vectors),
        width=len(next(iter(vectors.values()))),
        steps=trainer.state.global_step,
        rewards=", ".join(f"`{reward}`" for reward in trainer.reward_func_names),
        dataset=dataset,
        options=[(option, getattr(trainer.args, option)) for option in _SHOWN],
        figures=figures,
    )
