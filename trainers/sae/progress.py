"""The bar of a run: FVU, L0, dead share and tokens per second beside the time left."""

from typing import Any

from transformers.trainer_callback import ProgressCallback


class SAEProgress(ProgressCallback):
    """transformers' bar, with the figures of the last log entry beside it instead of a line for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if "tokens_per_second" not in logs:  # an evaluation or the end
            super().on_log(args, state, control, logs, **kwargs)
            return
        shown = {}
        for key, short in (("fvu", "FVU"), ("l0", "L0"), ("dead_fraction", "dead")):
            values = [value for name, value in logs.items() if name == key or name.endswith(f"/{key}")]
            if values:  # of several SAEs the range
                ends = sorted({f"{min(values):.3g}", f"{max(values):.3g}"}, key=float)
                shown[short] = "-".join(ends)
        self.training_bar.set_postfix({**shown, "tok/s": f"{logs['tokens_per_second']:.3g}"})
