"""The paper's optimiser groups: routers at a learning rate of their own and without weight decay."""

from typing import Any

from torch import nn


def lime_param_groups(
    model: nn.Module, *, lr: float = 1e-3, router_lr: float = 1e-2, weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """
    Parameter groups for any torch optimiser: routers, other matrices, and vectors (norms, biases; never decayed).

    A plain `Trainer` takes them by one argument, and its schedule scales each group's own learning rate:

    ```python
    Trainer(model, args, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": lime_param_groups(model)}), ...)
    ```

    Args:
        model (`nn.Module`): A LIMe model, or one wrapped by PEFT. Only parameters that require a gradient are taken.
        lr (`float`, *optional*, defaults to 1e-3): Learning rate of everything else.
        router_lr (`float`, *optional*, defaults to 1e-2): Learning rate of the routers, ten times the rest.
        weight_decay (`float`, *optional*, defaults to 0.1): Decay of the matrices; routers and vectors have none.

    Returns:
        `list[dict]`: up to three groups with `params`, `lr`, `weight_decay` and `name`; empty ones are left out.

    Raises:
        ValueError: if a number is negative, or the model has no trainable parameter.

    Source: arXiv 2502.09245 v2, section 4 (router learning rate 1e-2, weight decay 0; the rest 1e-3 and 0.1).
    """
    for name, value in (("lr", lr), ("router_lr", router_lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"`{name}` must be a number >= 0, got {value}.")
    routers: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_router = ".router." in f".{name}"
            (routers if is_router else matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [
        {"params": routers, "lr": router_lr, "weight_decay": 0.0, "name": "routers"},
        {"params": matrices, "lr": lr, "weight_decay": weight_decay, "name": "matrices"},
        {"params": vectors, "lr": lr, "weight_decay": 0.0, "name": "vectors"},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("`model` must have parameters that require a gradient, got none. Unfreeze some first.")
    return groups
