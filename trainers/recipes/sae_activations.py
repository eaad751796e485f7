"""Activations that the cells of recipe `sae_hierarchical` share: of a model on texts, of the story model on stories.

shared/MODEL-TEXT/        the cache of training activations, see `trainers.sae.cache`
shared/MODEL-TEXT.held-out.safetensors   rows whole: input_ids (R, T), x (R, T, D), kept (R, T)
shared/stories-MODEL.safetensors         train (N, D), test (M, D), labels (M, L); names of the L in its metadata
"""

import random
from hashlib import sha256
from pathlib import Path
from typing import Any


CONTEXT, ROWS_AT_ONCE, NORM_RATIO = 256, 8, 10.0
SEED = 0


def hook_of(model: str) -> tuple[str, str]:
    """The output of the middle layer, by the model's skeleton."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_ext import tiny
    from hf_ext.sites import resolve

    config = AutoConfig.from_pretrained(tiny.path(model))
    with torch.device("meta"):
        probe = AutoModelForCausalLM.from_config(config)
    hook = resolve(probe, "resid_post", config.num_hidden_layers // 2)
    return hook.path, hook.io


def harvest_texts(
    model: str, hook: tuple[str, str], train: list[str], held_out: list[str], folder: Path, tokens: int, rows: int
) -> None:
    """
    Fill the cache up to `tokens` tokens of `train`, and write `rows` rows of `held_out`; nothing that is there.

    First positions, special tokens and norms beyond 10 medians are left out of both, as they are of training.
    """
    import torch
    from safetensors.torch import save_file

    from hf_ext import tiny
    from hf_ext.record import record
    from hf_ext.sites import Hook
    from trainers.sae.cache import describe, harvest
    from trainers.sae.streaming import ModelSource, TokenRows

    target = held_out_file(folder)
    if target.is_file():
        return
    lm, tokenizer = tiny.load(model)
    site = Hook(*hook)
    place = f"{site.path}.{site.io}"
    for part in (train, held_out):
        random.Random(SEED).shuffle(part)
    data = [{"text": text} for text in train]
    source = ModelSource(
        lm,
        {place: site},
        TokenRows(data, tokenizer, CONTEXT, "text"),
        rows_at_once=ROWS_AT_ONCE,
        skip_positions=1,
        special_ids=set(tokenizer.all_special_ids),
        max_norm_ratio=NORM_RATIO,
    )
    widths = {place: lm.config.hidden_size}
    harvest(folder, source, describe(lm, source, widths, lm.dtype, data), tokens)
    if source.medians is None:  # the cache was whole already
        source.next()
    limit = NORM_RATIO * source.medians[place]  # type: ignore[index]
    ids = TokenRows([{"text": text} for text in held_out], tokenizer, CONTEXT, "text").take(rows)
    parts = []
    for some in ids.split(ROWS_AT_ONCE):
        with torch.no_grad(), record(lm, {place: site}, stop=True) as seen:
            lm(input_ids=some, use_cache=False)
        parts.append(seen[place][0])
    x = torch.cat(parts)
    kept = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids)) & (x.float().norm(dim=2) <= limit)
    kept[:, 0] = False
    _save(save_file, {"input_ids": ids, "x": x, "kept": kept}, target)


def held_out_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.held-out.safetensors")


def stories_model() -> Path | None:
    """The bundled story model, None where the package has none."""
    from hf_ext import tiny

    folder = Path(tiny.__file__).with_name("stories")
    return folder if (folder / "config.json").is_file() else None


def checksum(folder: Path) -> str:
    """Of a model's weights."""
    digest = sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def harvest_stories(folder: Path, file: Path, tokens: int, test: int) -> None:
    """
    Activations of the answers of chats, `tokens` tokens to train on and `test` with what is known of each.

    Properties are pairs (latent, value) of the grammar: whether this latent has this value at the end of the token.
    """
    import json

    import torch
    from safetensors.torch import save_file

    from hf_ext import tiny
    from hf_ext.record import record
    from hf_ext.sites import Hook
    from hf_ext.tasks import stories
    from trainers.recipes.stories import seen_story

    if file.is_file():
        return
    lm, tokenizer = tiny.load(folder, dtype="float32")
    site = Hook(*hook_of(str(folder)))
    rng = random.Random(SEED)
    parts: list[Any] = []
    known: list[list[dict[str, str]]] = []
    have = 0
    while have < tokens + test:
        drawn = [seen_story(rng) for _ in range(32)]
        asked = tokenizer.apply_chat_template(
            [stories.messages(story.prompt) for story in drawn], tokenize=False, add_generation_prompt=True
        )
        told = tokenizer([story.text for story in drawn], return_offsets_mapping=True, add_special_tokens=False)
        prompts = tokenizer(asked, add_special_tokens=False)["input_ids"]
        rows = [before + after for before, after in zip(prompts, told["input_ids"], strict=True)]
        ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)  # padded on the right: what comes before sees none of it
        with torch.no_grad(), record(lm, {"x": site}, stop=True) as seen:
            lm(input_ids=ids, use_cache=False)
        hidden = seen["x"][0]
        for at, story in enumerate(drawn):
            answer = hidden[at, len(prompts[at]) : len(rows[at])]
            parts.append(answer.to(torch.bfloat16))
            known.append(stories.token_latents(story, told["offset_mapping"][at]))
            have += len(answer)
    x = torch.cat(parts)
    facts = [fact for story in known for fact in story][tokens : tokens + test]
    names = sorted({pair for fact in facts for pair in fact.items()})
    labels = torch.tensor([[fact.get(latent) == value for latent, value in names] for fact in facts])
    content = {"train": x[:tokens].contiguous(), "test": x[tokens : tokens + test].contiguous(), "labels": labels}
    _save(save_file, content, file, {"names": json.dumps(names), "hook": json.dumps(list(site))})


def _save(save_file: Any, tensors: dict[str, Any], file: Path, metadata: dict[str, str] | None = None) -> None:
    part = file.with_name(f"{file.name}.part")
    save_file(tensors, part, metadata={"format": "pt", **(metadata or {})})
    part.replace(file)
