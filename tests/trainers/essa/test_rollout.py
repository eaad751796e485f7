import numpy as np
import pytest
import torch

from trainers.essa.rollout import Prompts, generate_rows


def complete(model, prompts, **options):
    settings = {"pad_token_id": 0, "eos_token_ids": [1], "max_new_tokens": 6}
    return generate_rows(model, prompts, **settings | options)


def test_rows_of_unequal_length_are_completed_as_each_would_be_alone(lora):
    model, prompts = lora(), [[5, 6, 7, 8], [9], [10, 11]]
    together = complete(model, prompts)
    assert together.completion_ids == [complete(model, [prompt]).completion_ids[0] for prompt in prompts]
    for row, ids in enumerate(together.completion_ids):
        assert together.finished[row] == (ids[-1] == 1)
        assert 1 not in ids[:-1]
        assert together.finished[row] or len(ids) == 6


def test_greedy_completions_are_those_of_transformers(lora):
    model = lora()
    ids = torch.tensor([[5, 6, 7]])
    wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert complete(model, [[5, 6, 7]]).completion_ids[0] == wanted[0, 3:].tolist()[: len(wanted[0]) - 3]


def test_noise_depends_on_its_key_and_not_on_the_batch(lora):
    model = lora()
    keys = [(0, 0, 1), (0, 0, 2), (0, 0, 1)]
    prompts = [[5, 6], [7, 8, 9], [5, 6]]
    drawn = complete(model, prompts, temperature=1.0, noise_keys=keys)
    alone = complete(model, prompts[1:2], temperature=1.0, noise_keys=keys[1:2])
    assert drawn.completion_ids[0] == drawn.completion_ids[2]
    assert drawn.completion_ids[1] == alone.completion_ids[0]
    later = complete(model, prompts, temperature=1.0, noise_keys=[(0, 1, key[2]) for key in keys])
    assert later.completion_ids != drawn.completion_ids


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}])
def test_noise_draws_from_the_models_own_distribution(lora, options):
    model, count, temperature = lora(), 4000, 1.5
    prompts = [[5, 6, 7]] * count
    found = complete(
        model,
        prompts,
        max_new_tokens=1,
        temperature=temperature,
        noise_keys=[(0, 0, i) for i in range(count)],
        **options,
    )
    with torch.no_grad():
        wanted = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / temperature).softmax(-1)
    if "top_k" in options:
        wanted[wanted < wanted.topk(3).values[-1]] = 0
    if "top_p" in options:
        ordered, at = wanted.sort(descending=True)
        wanted[at[ordered.cumsum(0) - ordered > 0.7]] = 0
    wanted = wanted / wanted.sum()
    seen = np.bincount([ids[0] for ids in found.completion_ids], minlength=64) / count
    # total variation of 4 000 draws over at most 64 values: below sqrt(64 / 4000) / 2 = 0.063 on average
    assert 0.5 * np.abs(seen - wanted.numpy()).sum() < 0.08
    assert not seen[wanted.numpy() == 0].any()


def test_a_row_whose_logits_are_nan_fails_alone(lora):
    model = lora()
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    found = complete(model, [[5, 6], [50, 6], [7, 8]], max_new_tokens=1)
    assert found.failed.tolist() == [False, True, False]
    assert found.completion_ids[0] == complete(model, [[5, 6]], max_new_tokens=1).completion_ids[0]


def test_a_dataset_is_read_with_its_columns_and_refused_by_row(letters, prompts):
    rows = prompts(5)
    read = Prompts(rows, letters, room=20)
    assert read.columns([1, 3]) == {"wanted": [rows[1]["wanted"], rows[3]["wanted"]]}
    assert read.ids[2] == letters(rows[2]["prompt"])["input_ids"]
    chat = [{"prompt": [{"role": "user", "content": "AB"}]}]
    assert letters.decode(Prompts(chat, letters, room=20).ids[0]) == "(AB)>"
    assert Prompts(rows, letters, 20).fingerprint == read.fingerprint
    assert Prompts(rows[:4], letters, 20).fingerprint != read.fingerprint
    for data, match in (
        ([], "`train_dataset` must have rows, got none"),
        ([{"question": "A"}], '"prompt" .* got None in row 0, whose columns are question'),
        ([{"prompt": "A"}, {"prompt": ""}], "got '' in row 1"),
        ([{"prompt": "A" * 21}], "from 1 to 20 tokens, .* got 21 in row 0"),
    ):
        with pytest.raises(ValueError, match=match):
            Prompts(data, letters, room=20)
    with pytest.raises(TypeError, match="must have a length"):
        Prompts((row for row in rows), letters, room=20)
