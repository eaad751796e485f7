"""The bar of a run: reward, step size, tokens per second, and the time left."""

from typing import Any

from transformers.trainer_callback import ProgressCallback


class ESSAProgress(ProgressCallback):
    """transformers' bar, with the figures of the last generation beside it instead of a line for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if "sigma" in logs:
            shown = {"reward": logs["reward"], "sigma": logs["sigma"], "tok/s": logs["tokens_per_second"]}
            self.training_bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
        else:  # an evaluation or the end
            super().on_log(args, state, control, logs, **kwargs)
