"""Where things are inside a model: a site such as `resid_post` and a layer become a module path and a side of it.

- One table, `FAMILIES`, keyed by `config.model_type`. A new family is one entry; nothing else knows a model's name.
- Paths start at the model that is handed in: a causal LM, its base model, or either inside a PEFT wrapper.
- Nothing is guessed: for a family outside the table the user names the path, `Hook("model.layers.3", "output")`.
"""

import operator
from typing import Any, NamedTuple

from torch import nn


class Hook(NamedTuple):
    """
    One side of one module.

    Attributes:
        path (`str`): The module's name in `model.named_modules()`, for example `"model.layers.3.mlp"`.
        io (`str`): `"output"`, the module's output or the first tensor of an output tuple; or `"input"`, its first
            positional argument or, where it has none, the keyword `hidden_states`.
    """

    path: str
    io: str


class Family(NamedTuple):
    """
    Where one family keeps things; paths are relative to the base model (the module that owns the layers).

    Attributes:
        layers (`str`): The list of layers.
        final_norm (`str`): The norm between the last layer and the head.
        sites (`dict[str, tuple[str, str]]`): Site -> (module within a layer, `""` for the layer itself; `io`).
        mlp_end (`str`): The module within a layer that ends the MLP's branch: a constant added to its output is added
            to the stream (before a dropout, if there is one). A linear map with a place for a bias, where the family
            ends in one; the norm after it in post-norm families; the whole block where experts are mixed.
    """

    layers: str
    final_norm: str
    sites: dict[str, tuple[str, str]]
    mlp_end: str


LLAMA = Family(
    layers="layers",
    final_norm="norm",
    sites={
        "resid_pre": ("", "input"),
        "resid_mid": ("post_attention_layernorm", "input"),
        "resid_post": ("", "output"),
        "attn_out": ("self_attn", "output"),
        "mlp_out": ("mlp", "output"),
        "q": ("self_attn.q_proj", "output"),
        "k": ("self_attn.k_proj", "output"),
        "v": ("self_attn.v_proj", "output"),
        "z": ("self_attn.o_proj", "input"),
    },
    mlp_end="mlp.down_proj",
)
MOE = LLAMA._replace(mlp_end="mlp")
# a norm stands between each branch and the stream
_POST_NORM = {
    "attn_out": ("post_attention_layernorm", "output"),
    "mlp_out": ("post_feedforward_layernorm", "output"),
}
GEMMA = LLAMA._replace(
    sites=LLAMA.sites | _POST_NORM | {"resid_mid": ("pre_feedforward_layernorm", "input")},
    mlp_end="post_feedforward_layernorm",
)
# the branches read the stream itself, without a norm
OLMO2 = GEMMA._replace(sites=GEMMA.sites | {"resid_mid": ("mlp", "input")})
# where q, k and v leave one fused projection, they are nobody's input or output
PHI3 = LLAMA._replace(
    sites={site: place for site, place in LLAMA.sites.items() if site not in ("q", "k", "v")}
    | {"attn_out": ("resid_attn_dropout", "output"), "mlp_out": ("resid_mlp_dropout", "output")}
)
GPT2 = Family(
    layers="h",
    final_norm="ln_f",
    sites={
        "resid_pre": ("", "input"),
        "resid_mid": ("ln_2", "input"),
        "resid_post": ("", "output"),
        "attn_out": ("attn", "output"),
        "mlp_out": ("mlp", "output"),
        "z": ("attn.c_proj", "input"),
    },
    mlp_end="mlp.c_proj",
)
# attention and MLP read the same stream (use_parallel_residual): there is no place between them
GPT_NEOX = Family(
    layers="layers",
    final_norm="final_layer_norm",
    sites={
        "resid_pre": ("", "input"),
        "resid_post": ("", "output"),
        "attn_out": ("post_attention_dropout", "output"),
        "mlp_out": ("post_mlp_dropout", "output"),
        "z": ("attention.dense", "input"),
    },
    mlp_end="mlp.dense_4h_to_h",
)


def _text_tower(family: Family) -> Family:
    """The language model inside a vision-language model."""
    return family._replace(layers=f"language_model.{family.layers}", final_norm=f"language_model.{family.final_norm}")


FAMILIES = {
    "gemma2": GEMMA,
    "gemma3": _text_tower(GEMMA),
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "lime": LLAMA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MOE,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen2_5_vl": _text_tower(LLAMA),
    "qwen2_5_vl_text": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": MOE,
}
SITES = tuple(LLAMA.sites)


class Anatomy(NamedTuple):
    """A model's family, the path of its base model as a prefix (`""` or `"model."`), and its number of layers."""

    family: Family
    prefix: str
    num_layers: int


def resolve(model: nn.Module, site: str, layer: int) -> Hook:
    """
    The hook of a site in a layer, for `record` and `edit`.

    | site | what it is | shape |
    |---|---|---|
    | `resid_pre`, `resid_post` | residual stream before and after the layer | `(batch, seq, hidden_size)` |
    | `resid_mid` | residual stream between attention and MLP | `(batch, seq, hidden_size)` |
    | `attn_out`, `mlp_out` | what attention and MLP add to the stream | `(batch, seq, hidden_size)` |
    | `q`, `k`, `v` | projections, before any norm or rotation of the heads | `(batch, seq, heads * head_dim)` |
    | `z` | the heads' outputs side by side, before the output projection | `(batch, seq, heads * head_dim)` |

    Args:
        model (`torch.nn.Module`): A causal LM or its base model, plain or inside a PEFT wrapper.
        site (`str`): One of the sites above.
        layer (`int`): Counts from 0; negative numbers count from the end.

    Returns:
        `Hook`, whose path starts at `model`.

    Raises:
        TypeError: if `layer` is no integer.
        ValueError: if the architecture is not in the table, the family lacks the site, or `layer` is out of range.

    Example:

        with record(model, {"stream": resolve(model, "resid_post", -1)}) as acts:
            model(input_ids)
        acts["stream"][0]  # [B, T, D]
    """
    family, prefix, num_layers = anatomy(model)
    if site not in family.sites:
        lacks = f"{_model_type(model)} lacks {site!r}" if site in SITES else f"got {site!r}"
        raise ValueError(
            f"`site` must be one of {', '.join(family.sites)}; {lacks}. "
            'For any other place pass a path: Hook("PATH", "output"), PATH as in model.named_modules().'
        )
    try:
        index = operator.index(layer)
    except TypeError:
        raise TypeError(f"`layer` must be an integer, got {layer!r}. Layers count from 0.") from None
    if not -num_layers <= index < num_layers:
        raise ValueError(
            f"`layer` must be in [{-num_layers}, {num_layers - 1}], got {index}. The model has {num_layers} layers."
        )
    return _hook(family, prefix, site, index % num_layers)


def anatomy(model: nn.Module) -> Anatomy:
    """
    Family, base model's prefix and number of layers of `model`.

    Raises:
        ValueError: if `config.model_type` is not in `FAMILIES`; the message says how to pass a path instead.
    """
    path, owner = base_model(model)
    family = FAMILIES.get(_model_type(model) or "")
    if family is None:
        raise ValueError(
            f"`model` must be of a known family ({', '.join(FAMILIES)}), got {_model_type(model)!r} "
            f'({type(model).__name__}). Pass a path yourself, for example Hook("model.layers.3", "output"); '
            "model.named_modules() lists them."
        )
    prefix = f"{path}." if path else ""
    return Anatomy(family, prefix, len(owner.get_submodule(family.layers)))  # type: ignore[arg-type]


def base_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the model that owns the layers, also inside a PEFT wrapper; any other model is its own."""
    inner = unwrap(model)
    owner = getattr(inner, "base_model", inner)
    # the paths of a compiled wrapper start with a name that the model itself does not know
    root = getattr(model, "_orig_mod", model)
    return next(((name, module) for name, module in root.named_modules() if module is owner), ("", root))


def unwrap(model: Any) -> Any:
    """The model inside a wrapper of torch.compile or PEFT; any other model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def reads_stream(model: nn.Module, hook: Hook) -> bool:
    """Whether `hook` is the input of what reads the stream in mid-layer: the residual path holds the same tensor."""
    if _model_type(model) not in FAMILIES:
        return False
    family, prefix, num_layers = anatomy(model)
    return "resid_mid" in family.sites and hook in {
        _hook(family, prefix, "resid_mid", layer) for layer in range(num_layers)
    }


def _hook(family: Family, prefix: str, site: str, layer: int) -> Hook:
    module, io = family.sites[site]
    return Hook(f"{prefix}{family.layers}.{layer}" + (f".{module}" if module else ""), io)


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(unwrap(model), "config", None), "model_type", None)
