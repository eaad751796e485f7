"""From what a user names to what a run needs; what cannot work is refused before weights load."""

import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ext.record import record
from hf_ext.sae import SAEConfig, SAEModel
from hf_ext.sites import Hook
from trainers.sae.bundle import LossFunction, named_loss
from trainers.sae.cache import ActivationCache, TensorRows, check_places, check_room, read_index
from trainers.sae.sae_config import SAETrainingArguments
from trainers.sae.streaming import TokenRows


class Plan(NamedTuple):
    """
    What is known before any weight is there.

    Attributes:
        losses (`dict[str, Callable]`): Name of SAE -> loss.
        places (`dict[str, str]`): Name of SAE -> place of a batch that it reads.
        hooks (`dict[str, Hook]`): Place -> hook; empty where activations are ready.
        rows ([`TensorRows`], [`ActivationCache`] or `None`): Ready activations.
        tokenizer: Of the texts, where they need one.
    """

    losses: dict[str, LossFunction]
    places: dict[str, str]
    hooks: dict[str, Hook]
    rows: TensorRows | ActivationCache | None
    tokenizer: Any


def planned(
    model: Any, saes: dict[str, Any], args: SAETrainingArguments, dataset: Any, tokenizer: Any, loss_funcs: Any
) -> Plan:
    """
    Look at everything that [`SAETrainer`] is given, and set `args.max_steps`.

    Raises:
        TypeError, ValueError: where something does not go together, with what to do.
    """
    if dataset is None:
        raise ValueError("`train_dataset` must be given: texts, or activations.")
    if not saes:
        raise ValueError("`sae` must hold at least one SAE, got an empty dict.")
    configs = {name: _config_of(name, one) for name, one in saes.items()}
    losses = _losses(loss_funcs, configs, args)
    rows, hooks = None, dict[str, Hook]()
    if not holds_texts(dataset):
        rows = rows_of(dataset, configs)
        places = places_of_rows(dataset, configs)
        _check_widths(rows.widths(), configs, places)
        _set_length(args, rows)
        return Plan(losses, places, hooks, rows, tokenizer)
    places = {name: place_of(config) for name, config in configs.items()}
    hooks = {place_of(config): Hook(cast(str, config.hook_name), config.hook_io) for config in configs.values()}
    if model is None:
        raise ValueError("`model` must be given: `train_dataset` holds texts, whose activations it computes.")
    _set_length(args, None)
    by_name = isinstance(model, str | os.PathLike)
    if tokenizer is None and (by_name or model.name_or_path):
        tokenizer = _tokenizer(str(model) if by_name else model.name_or_path)
    TokenRows(dataset, tokenizer, args.context_size, args.dataset_text_field)  # refuses rows that it cannot read
    probe, dtype = skeleton(model, args) if by_name else (model, next(model.parameters()).dtype)
    widths = widths_at(probe, hooks)
    _check_widths(widths, configs, places)
    if args.activation_cache is not None:
        chosen = dtype if args.activation_dtype == "auto" else dtype_named(args.activation_dtype)
        _check_cache(Path(args.activation_cache), widths, chosen, cache_tokens(args))
    return Plan(losses, places, hooks, rows, tokenizer)


def step_tokens(args: SAETrainingArguments) -> int:
    """Tokens of an optimiser's step, of all processes."""
    return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps


def cache_tokens(args: SAETrainingArguments) -> int:
    """Tokens that a cache shall hold."""
    return args.cache_tokens or args.max_steps * step_tokens(args)


def dtype_named(name: str) -> torch.dtype:
    """The dtype called "bfloat16" or "torch.bfloat16"."""
    return getattr(torch, name.removeprefix("torch."))


def load_model(model: Any, args: SAETrainingArguments) -> Any:
    """The language model on its device, only to be read."""
    if isinstance(model, str | os.PathLike):
        model = AutoModelForCausalLM.from_pretrained(model, **_init_kwargs(args))
    return model.eval().to(args.device)


def holds_texts(dataset: Any) -> bool:
    """Whether a dataset is of texts, rather than of ready activations."""
    if isinstance(dataset, torch.Tensor | ActivationCache):
        return False
    return not (isinstance(dataset, dict) and all(isinstance(value, torch.Tensor) for value in dataset.values()))


def rows_of(dataset: Any, configs: dict[str, SAEConfig]) -> TensorRows | ActivationCache:
    """Ready activations, of the places that `configs` read."""
    if isinstance(dataset, ActivationCache):
        return ActivationCache(dataset.folder, sorted({place_of(config) for config in configs.values()}), len(dataset))
    if isinstance(dataset, torch.Tensor):
        return TensorRows({"activations": dataset})
    lacking = [name for name in configs if name not in dataset]
    if lacking:
        raise ValueError(f"Ready activations must be given for every SAE, got none of {', '.join(lacking)}.")
    return TensorRows({name: dataset[name] for name in configs})


def places_of_rows(dataset: Any, configs: dict[str, SAEConfig]) -> dict[str, str]:
    """Name of SAE -> place among ready activations."""
    if isinstance(dataset, ActivationCache):
        return {name: place_of(config) for name, config in configs.items()}
    return {name: "activations" if isinstance(dataset, torch.Tensor) else name for name in configs}


def place_of(config: SAEConfig) -> str:
    """The place that an SAE's hook is, "model.layers.12.output"."""
    if config.hook_name is None:
        raise ValueError(
            "`hook_name` of the SAE must be a module path such as 'model.layers.12', got None. "
            "hf_ext.sites.resolve(model, 'resid_post', 12).path gives that of a site."
        )
    return f"{config.hook_name}.{config.hook_io}"


def _config_of(name: str, given: Any) -> SAEConfig:
    if isinstance(given, SAEConfig):
        return given
    if isinstance(given, SAEModel):
        return given.config
    raise TypeError(f"`sae` must be an SAEModel, an SAEConfig or a dict of them, got {type(given).__name__} ({name}).")


def _losses(given: Any, configs: dict[str, SAEConfig], args: SAETrainingArguments) -> dict[str, LossFunction]:
    chosen = given if isinstance(given, dict) else dict.fromkeys(configs, given)
    unknown = [name for name in chosen if name not in configs]
    if unknown:
        raise ValueError(f"`loss_funcs` must be named as SAEs are, {', '.join(configs)}, got {', '.join(unknown)}.")
    losses = {}
    for name, config in configs.items():
        one = chosen.get(name) or args.loss
        losses[name] = one if callable(one) else named_loss(one, args, config)
        if config.activation in ("relu", "jumprelu") and not args.sparsity_coefficient:
            raise ValueError(
                f"`sparsity_coefficient` must be above 0 for activation={config.activation!r}, got 0: nothing else "
                "keeps its codes sparse."
            )
    return losses


def _init_kwargs(args: SAETrainingArguments) -> dict[str, Any]:
    return cast(dict[str, Any], args.model_init_kwargs or {})


def skeleton(name: Any, args: SAETrainingArguments) -> tuple[Any, torch.dtype]:
    """The model called `name` without weights, and the dtype that it will have."""
    options = {"trust_remote_code": _init_kwargs(args).get("trust_remote_code")}
    config = AutoConfig.from_pretrained(name, **options)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, **options)
    dtype: Any = _init_kwargs(args).get("dtype", "auto")
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    return skeleton, dtype_named(str(dtype))


def widths_at(probe: Any, hooks: dict[str, Hook]) -> dict[str, int]:
    """Place -> width of its activations, by two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(probe.parameters()).device)
    try:
        with torch.no_grad(), record(probe, hooks, stop=True) as seen:
            probe(input_ids=ids)
    except ValueError as error:
        raise ValueError(f"`hook_name` of an SAE must be a module of the model. {error}") from error
    silent = [place for place, found in seen.items() if not found]
    if silent:
        raise ValueError(f"`hook_name` must be a module that the model calls, got {', '.join(silent)}.")
    return {place: found[0].shape[-1] for place, found in seen.items()}


def _check_widths(widths: dict[str, int], configs: dict[str, SAEConfig], places: dict[str, str]) -> None:
    for name, config in configs.items():
        width = widths[places[name]]
        if config.d_in != width:
            raise ValueError(
                f"`d_in` of {name!r} must be {width}, the width of the activations at {places[name]!r}, got "
                f"{config.d_in}."
            )


def _check_cache(folder: Path, widths: dict[str, int], dtype: torch.dtype, tokens: int) -> None:
    """What the index and the disk tell before the model is there; `harvest` looks at the rest."""
    index, have = read_index(folder), 0
    if index is not None:
        check_places(folder, index["info"], list(widths))
        have = sum(shard["tokens"] for shard in index["shards"])
    if have < tokens:
        check_room(folder, {"hooks": widths, "dtype": str(dtype).removeprefix("torch.")}, tokens - have)


def _set_length(args: SAETrainingArguments, rows: TensorRows | ActivationCache | None) -> None:
    """`max_steps` from tokens or, for ready rows, from epochs."""
    step = step_tokens(args)
    if args.train_tokens is not None:
        args.max_steps = args.train_tokens // step
        if args.max_steps < 1:
            raise ValueError(f"`train_tokens` must be at least a step of {step} tokens, got {args.train_tokens}.")
    elif args.max_steps <= 0 and rows is None:
        raise ValueError("`train_tokens` or `max_steps` must be given: a stream of texts has no end.")
    elif args.max_steps <= 0 and rows is not None:
        args.max_steps = int(len(rows) // step * args.num_train_epochs)
        if args.max_steps < 1:
            raise ValueError(
                f"`train_dataset` must hold at least a step of {step} tokens, got {len(rows)}. Lower "
                "per_device_train_batch_size."
            )
    if args.cache_tokens is not None and args.cache_tokens < step:
        raise ValueError(f"`cache_tokens` must be at least a step of {step} tokens, got {args.cache_tokens}.")


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
