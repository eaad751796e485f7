"""Checkpoints of a search: an ordinary adapter, transformers' state, and what the search itself needs to go on.

    checkpoint-N/  adapter_model.safetensors, adapter_config.json, tokenizer   the mean, for anyone
                   trainer_state.json, rng_state.pth                          as of every Trainer
                   strategy.json, strategy.safetensors                        the strategy
                   essa_bases.safetensors                                     singular vectors: what x means
                   essa.json                                                  counts, and what a resumed run must share

Each is written under another name and renamed when it is whole: a kill leaves no half of one.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from trainers.essa.strategies import Strategy


BASES, SEARCH = "essa_bases.safetensors", "essa.json"


def write_checkpoint(trainer: Any, search: dict[str, Any]) -> None:
    """Write `checkpoint-N` of a trainer's state, push it where asked, and delete what is one too many."""
    args = trainer.args
    run_dir = Path(args.output_dir)
    final = run_dir / f"checkpoint-{trainer.state.global_step}"
    part = run_dir / f".{final.name}.part"
    if args.should_save:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        trainer.save_model(str(part), _internal_call=True)
        if trainer.state.best_global_step:
            best = run_dir / f"checkpoint-{trainer.state.best_global_step}"
            if best == final or best.is_dir():
                trainer.state.best_model_checkpoint = str(best)
        if not args.save_only_model:
            trainer.strategy.save(part)
            save_file(trainer.space.state_dict(), part / BASES)
            (part / SEARCH).write_text(json.dumps(search, indent=1), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    if not args.save_only_model:
        trainer._save_rng_state(str(part))  # one file of each process, for reward functions that draw
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
        trainer.state.save_to_json(str(part / "trainer_state.json"))
        for file in part.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(final))
    if args.should_save:
        rotate_checkpoints(str(run_dir), args.save_total_limit, trainer.state.best_model_checkpoint, use_mtime=True)
    trainer.accelerator.wait_for_everyone()


def read_checkpoint(trainer: Any, checkpoint: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """
    Put a checkpoint's search into a trainer; what `write_checkpoint` was given.

    Raises:
        ValueError: where the checkpoint is of another trainer or of another search, with what differs.
    """
    if not (checkpoint / SEARCH).is_file():
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint of ESSATrainer, but {checkpoint} has no {SEARCH}."
        )
    search = json.loads((checkpoint / SEARCH).read_text(encoding="utf-8"))
    for name, now in identity.items():
        if search["run"].get(name) != now:
            raise ValueError(
                f"`resume_from_checkpoint` must be of the same {name}, but {checkpoint} has "
                f"{search['run'].get(name)!r} and this run {now!r}. Start from the same data and adapter with the "
                "same options, or begin a new run in another output_dir."
            )
    trainer.strategy.load_state_dict(*Strategy.load(checkpoint).state_dict())
    trainer.space.load_state_dict(load_file(checkpoint / BASES))
    trainer._load_rng_state(str(checkpoint))
    return search


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """The folder to resume from, if any: True is the last of `output_dir`."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        found = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
        if found is None:
            raise ValueError(
                f"`resume_from_checkpoint=True` needs a checkpoint in {output_dir}, which has none. Leave it out to "
                "start anew."
            )
        return found
    if not (Path(resume_from_checkpoint) / "trainer_state.json").is_file():
        raise ValueError(
            f"`resume_from_checkpoint` must be a folder checkpoint-N that a trainer wrote, got "
            f"{resume_from_checkpoint!r}."
        )
    return resume_from_checkpoint


def remove_parts(output_dir: str) -> None:
    """Delete what a kill in the midst of a save has left."""
    for part in Path(output_dir).glob(".checkpoint-*.part"):
        shutil.rmtree(part)
