"""Checkpoints of SAE training: the SAEs as anyone loads them, transformers' state, and where the data were.

    checkpoint-N/  config.json, model.safetensors, code   one SAE; several lie in sub-folders
                   optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json   as of every Trainer
                   sae_state.safetensors, sae_state.json   buffer, order, position, tokens since each latent fired

Each is written under another name and renamed when it is whole: a kill leaves no half of one.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from trainers.sae.streaming import State


TENSORS, FACTS = "sae_state.safetensors", "sae_state.json"


def write_checkpoint(trainer: Any, state: State) -> None:
    """Write `checkpoint-N` of a trainer and its stream, push it where asked, and delete what is one too many."""
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
            tensors, facts = state
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / TENSORS)
            (part / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    if not args.save_only_model:
        trainer._save_optimizer_and_scheduler(str(part))
        trainer._save_scaler(str(part))
        trainer._save_rng_state(str(part))
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
        trainer.state.save_to_json(str(part / "trainer_state.json"))
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(final))
    if args.should_save:
        rotate_checkpoints(str(run_dir), args.save_total_limit, trainer.state.best_model_checkpoint, use_mtime=True)
    trainer.accelerator.wait_for_everyone()


def read_state(checkpoint: Path) -> State:
    """
    What `write_checkpoint` was given.

    Raises:
        ValueError: where the folder is no checkpoint of this trainer.
    """
    if not (checkpoint / FACTS).is_file():
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint of SAETrainer, but {checkpoint} has no {FACTS}."
        )
    tensors = load_file(checkpoint / TENSORS) if (checkpoint / TENSORS).is_file() else {}
    return tensors, json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))


def remove_parts(output_dir: str) -> None:
    """Delete what a kill in the midst of a save has left."""
    for part in Path(output_dir).glob(".checkpoint-*.part"):
        shutil.rmtree(part)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict of an SAE that was saved into `folder`."""
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        raise ValueError(f"{folder} must hold model.safetensors, got none. Is it a checkpoint of SAETrainer?")
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
