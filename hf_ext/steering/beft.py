"""The adapter's twin in PEFT's own type BEFT (a trained bias of linear layers), for those who do not have hf_ext.

Every saved adapter that BEFT can express gets one, in the folder `beft/` beside it:
`PeftModel.from_pretrained(base, "you/adapter", subfolder="beft")` needs plain peft >= 0.20.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import BeftConfig
from safetensors.torch import load_file, save_file
from torch import nn


if TYPE_CHECKING:
    from hf_ext.steering.config import SteeringConfig

FOLDER = "beft"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OWN, THEIRS = ".steering_bias", ".beft_bias"
_HEADING = "## Load this steering adapter"


def places(model: nn.Module, names: list[str], positions: str) -> list[str] | None:
    """The modules of a twin: `names`, or None where BEFT cannot express it (a norm, a Conv1D, some tokens alone)."""
    modules = [model.get_submodule(name) for name in names]
    bases = [module.get_base_layer() if hasattr(module, "get_base_layer") else module for module in modules]
    return names if positions == "all" and all(type(base) is nn.Linear for base in bases) else None


def write_twin(folder: Path, config: "SteeringConfig") -> None:
    """Write `folder/beft` from the adapter that was just saved in `folder`, or remove an old one; tell the README."""
    # Trainer, when it resumes, takes every adapter in a folder of its checkpoint for one of the model's
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        return
    twin, weights = folder / FOLDER, folder / WEIGHTS
    if config.beft_places is None or not weights.is_file():
        for name in (WEIGHTS, CONFIG):
            (twin / name).unlink(missing_ok=True)
        if twin.is_dir() and not any(twin.iterdir()):
            twin.rmdir()
    else:
        write(twin, load_file(weights), config)
    _tell(folder / "README.md", twin.is_dir())


def write(folder: Path, state: dict[str, torch.Tensor], config: "SteeringConfig") -> None:
    """
    Write an adapter of type BEFT.

    Args:
        folder (`Path`): Where; made if it is not there.
        state (`dict[str, torch.Tensor]`): The adapter's own state dict, as it is saved.
        config (`SteeringConfig`): Its configuration, put into a model already.
    """
    biases = {
        key.removesuffix(OWN) + THEIRS: (config.scale * tensor)[None] if key.endswith(OWN) else tensor
        for key, tensor in state.items()
    }
    twin = BeftConfig(
        target_modules=config.beft_places,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        inference_mode=True,
    )
    settings: dict[str, Any] = {**twin.to_dict(), "target_modules": sorted(twin.target_modules)}
    folder.mkdir(parents=True, exist_ok=True)
    # whole or not at all
    part = folder / f"{WEIGHTS}.part"
    save_file(biases, part, metadata={"format": "pt"})
    os.replace(part, folder / WEIGHTS)
    part = folder / f"{CONFIG}.part"
    part.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(part, folder / CONFIG)


def _tell(readme: Path, has_twin: bool) -> None:
    """PEFT without hf_ext says no more than KeyError: 'STEERING', so the page of the repository says the rest."""
    if not readme.is_file() or _HEADING in (text := readme.read_text(encoding="utf-8")):
        return
    without = (
        "Without hf_ext: the same vectors in a type of PEFT's own, `PeftModel.from_pretrained(base, repo, "
        f'subfolder="{FOLDER}")` (peft 0.20 or newer).'
        if has_twin
        else "Without hf_ext it cannot be loaded: hf_ext.steering.export_model makes a model that can."
    )
    readme.write_text(
        f"{text.rstrip()}\n\n{_HEADING}\n\n```python\nimport hf_ext  # makes the type known to peft\n"
        "from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, repo)\n```\n\n"
        f"`KeyError: 'STEERING'` means that the import is missing. {without}\n",
        encoding="utf-8",
    )
