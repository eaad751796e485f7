"""Training methods, and the recipes that measure them; each method is a sub-package of its own."""

__all__: list[str] = []
