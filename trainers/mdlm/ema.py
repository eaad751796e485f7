"""An exponential moving average of a model's weights, as a callback of any Trainer.

The average is what one evaluates and saves at the end; checkpoints hold both, so that a run resumes to the bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback


FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """
    Keep shadow <- d shadow + (1 - d) weights after every optimiser step, with d = min(decay, (1 + n) / (10 + n)) at
    step n, so that a short run is not an average of its random start.

    Args:
        model (`nn.Module`): Its parameters that need a gradient are averaged.
        decay (`float`): In [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.shadow: dict[str, torch.Tensor] = {}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.shadow:
            self.shadow = {name: value.detach().float().clone() for name, value in self._parameters().items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, value in self._parameters().items():
            shadow = self.shadow[name]
            self.shadow[name] = shadow.to(value.device).lerp_(value.detach().float(), 1 - decay)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_file({name: value.cpu().contiguous() for name, value in self.shadow.items()}, folder / FILE)

    def load(self, checkpoint: str) -> None:
        """The average that a checkpoint holds."""
        path = Path(checkpoint) / FILE
        if not path.is_file():
            raise ValueError(f"{path} must be there to go on with the average, but is not. Set `ema_decay` to None.")
        self.shadow = load_file(path)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """The averaged weights become the model's."""
        for name, value in self._parameters().items():
            value.copy_(self.shadow[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights."""
        if not self.shadow:
            yield
            return
        kept = {name: value.detach().clone() for name, value in self._parameters().items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self._parameters().items():
                    value.copy_(kept[name])
