"""Options of the steering adapter, in the shape of PEFT's own configurations."""

import enum
import math
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from hf_ext.steering.beft import write_twin


POSITIONS = ("all", "first", "completion")


class SteeringPeftType(str, enum.Enum):  # noqa: UP042  PEFT reads the type after the dot of its str()
    """The type's name. PEFT's own enum is closed; its dictionaries take any str enum, which equals its string."""

    STEERING = "STEERING"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SteeringConfig(PeftConfig):
    """
    One trained vector for each layer, added to the residual stream; everything else is frozen.

        h_l <- h_l + c s_l      at every token;  s_l in R^d, zero at the start;  c = `scale`

    The paper's settings (arXiv 2505.18706) are the defaults but for the place: the authors write the bias of
    `mlp.down_proj`, which is the stream itself in Llama and Qwen2. `placement="down_proj"` is their literal choice,
    also where a norm follows it. Their vectors are bfloat16 like the model: `get_peft_model(...,
    autocast_adapter_dtype=False)`. PEFT's default, float32, is safer (bfloat16 stops moving entries beyond about 0.5).

    Args:
        placement (`str`, *optional*, defaults to `"residual"`): What the vector is added to; see the field's help.
        layers_to_transform (`int` or `list[int]`, *optional*): Layers with a vector; all if not given.
        scale (`float`, *optional*, defaults to 1.0): Factor c.
        positions (`str`, *optional*, defaults to `"all"`): Tokens that are steered; see the field's help.
        target_modules (`str` or `list[str]`, *optional*): Instead of `placement`, in PEFT's own meaning.
        modules_to_save (`list[str]`, *optional*): Modules trained and saved besides, as in every PEFT type.
        model_type, hidden_size, num_hidden_layers: The base model's: filled in when the adapter is put in, saved,
            and checked when it is loaded.

    Raises:
        TypeError, ValueError: for a value of no meaning; and when the adapter is put into a model, for a layer or a
            place that it does not have, or a base of other width, depth or type.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from hf_ext import SteeringConfig

    >>> model = get_peft_model(model, SteeringConfig(layers_to_transform=[10, -1]))
    ```"""

    placement: str | None = _option(
        "residual",
        'What the vector is added to. "residual": the residual stream after the layer, in each family where that is '
        '(hf_ext.sites). "down_proj": the output of mlp.down_proj, the authors\' literal choice. Else the path of a '
        'module within a layer ("self_attn.o_proj"), or of one module of the model ("model.layers.3.mlp"), whose '
        "output is a tensor or a tuple that starts with one.",
    )
    layers_to_transform: list[int] | int | None = _option(
        None, "Layers with a vector, counted from 0, negative ones from the end; all if not given."
    )
    scale: float = _option(1.0, "Factor of the vector: 1 as in the paper, 0 is the base model.")
    positions: str = _option(
        "all",
        'Tokens that are steered. "all": every token, prompt and padding too (the paper). "first": only the token '
        'whose output is the first token of the completion, the last one of the prompt. "completion": from that token '
        "on. The last two need to know where the completion begins: `generate` does; a forward call takes it from "
        "`labels` or from `logits_to_keep`.",
    )
    target_modules: list[str] | str | None = _option(
        None, "Instead of `placement`: names' endings, or one regular expression, as for any PEFT type."
    )
    modules_to_save: list[str] | None = _option(None, "Modules that are trained and saved besides the vectors.")
    model_type: str | None = _option(None, "Base model's type. Filled in.")
    hidden_size: int | None = _option(None, "Base model's width d. Filled in.")
    num_hidden_layers: int | None = _option(None, "Base model's number of layers. Filled in.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SteeringPeftType.STEERING
        if self.target_modules is not None:
            if self.placement not in (None, "residual"):
                raise ValueError(
                    f"`target_modules` and `placement` must not both be given, got {self.target_modules!r} and "
                    f"{self.placement!r}. Leave one of them out."
                )
            self.placement = None
            if not isinstance(self.target_modules, str):
                self.target_modules = sorted(self.target_modules)
        elif not isinstance(self.placement, str) or not self.placement:
            raise ValueError(
                f'`placement` must be "residual", "down_proj" or the path of a module, got {self.placement!r}.'
            )
        if self.positions not in POSITIONS:
            raise ValueError(f"`positions` must be one of {', '.join(POSITIONS)}, got {self.positions!r}.")
        self.scale = check_scale(self.scale)
        _check_layers(self.layers_to_transform)
        # where PEFT's own BEFT would put the vectors, if it can; known once the adapter is in a model, never saved
        self.beft_places: list[str] | None = None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, which calls it after the weights are written; and the twin that loads without hf_ext, in `beft/`."""
        super().save_pretrained(save_directory, **kwargs)
        write_twin(Path(save_directory), self)


def check_scale(scale: Any) -> float:
    """`scale` as a finite float; TypeError or ValueError if it is none."""
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"`scale` must be a number, got {scale!r}.")
    if not math.isfinite(scale):
        raise ValueError(f"`scale` must be finite, got {scale}.")
    return float(scale)


def _check_layers(layers: Any) -> None:
    numbers = layers if isinstance(layers, list | tuple | set | range) else [] if layers is None else [layers]
    for number in numbers:
        try:
            operator.index(number)
        except TypeError:
            raise TypeError(
                f"`layers_to_transform` must hold integers, got {number!r}. Layers count from 0, -1 is the last."
            ) from None
    if layers is not None and not len(numbers):
        raise ValueError("`layers_to_transform` must name a layer or be None for all, got none.")
