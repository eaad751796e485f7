"""Looking into models: each module holds functions over any causal LM that return small dataclasses of tensors."""
