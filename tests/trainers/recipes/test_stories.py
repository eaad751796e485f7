"""The story recipe's data: what it leaves out of training, and what a perfect model's loss would be."""

import json
import random
import re

import pytest
import torch

from hf_ext.tasks import stories, word_problems
from trainers.recipes import stories as recipe
from trainers.recipes.runner import Options


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("shared")
    recipe.prepare(Options("smoke"), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_no_held_out_pair_is_in_the_training_chats():
    rng = random.Random(0)
    seen = 0
    for _ in range(3000):
        user, assistant = recipe.chat(rng)
        numbers = [int(n) for n in re.findall(r"\d+", user["content"])]
        if len(numbers) == 2:  # a problem or a sum: its two operands
            assert not word_problems.held_out(*numbers)
            seen += 1
        else:
            story = stories.parse(user["content"], assistant["content"])
            assert not recipe.uses_held_out(story)
    assert 1300 < seen < 1700  # half of 3000, five standard deviations either way are 137


def test_a_story_that_adds_a_held_out_pair_is_recognised():
    pair = next((a, b) for a in range(4, 12) for b in range(2, 9) if word_problems.held_out(a, b))
    kept = next((a, b) for a in range(4, 12) for b in range(2, 9) if not word_problems.held_out(a, b))
    for (a, b), held_out in ((pair, True), (kept, False)):
        text = (
            f"One sunny day, Mia took {a} shells to the park. In the park, she found {b} more of them near a tree. "
            f"Now she had {a + b} shells. That made her happy."
        )
        assert recipe.uses_held_out(stories.parse("Tell me a story.", text)) == held_out


def test_the_tokenizer_keeps_chats_and_numbers_apart(tokenizer):
    chat = stories.messages("What is 17 + 5?", "22")
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nWhat is 17 + 5?<|im_end|>\n<|im_start|>assistant\n22<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("22")["input_ids"]) == ["2", "2"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)


def test_rows_hold_whole_chats_in_an_order_of_the_seed_and_teach_their_answers(tokenizer):
    rows = recipe.packed(tokenizer, 6, seed=1)
    assert [len(row["input_ids"]) for row in rows] == [recipe.LENGTH] * 6
    again = recipe.packed(tokenizer, 6, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))
    chats = 0
    for row in rows:
        starts = (row["position_ids"] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], recipe.LENGTH], strict=True):
            ids, labels = row["input_ids"][start:end], row["labels"][start:end]
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            if ids[0] == tokenizer.pad_token_id:
                assert end == recipe.LENGTH and (ids == ids[0]).all() and (labels == -100).all()
                continue
            chats += 1
            asked, answer = tokenizer.decode(ids).split("<|im_start|>assistant\n")
            assert asked.startswith("<|im_start|>user\n") and answer.endswith("<|im_end|>")
            learned = labels != -100
            assert tokenizer.decode(labels[learned]) == answer and torch.equal(labels[learned], ids[learned])
    assert chats > 10


def test_a_model_that_knows_the_grammar_has_no_gap(tokenizer):
    """The gap of a model that gives every answer its exact probability, spread over the answer's tokens."""
    held_out = recipe.stories_of(tokenizer, 40, seed=5)

    class Perfect:
        def __call__(self, ids, use_cache):
            logits = torch.zeros(*ids.shape, len(tokenizer))
            for i, row in enumerate(ids):
                known = next(r for r in held_out if torch.equal(r["input_ids"], row))
                count = int((known["labels"] != -100).sum())
                share = torch.tensor(known["log_prob"] / count).exp()  # of each token's probability
                rest = (1 - share) / (len(tokenizer) - 1)
                logits[i] = rest.log()
                logits[i, torch.arange(len(row) - 1), row[1:]] = share.log()
            return type("Output", (), {"logits": logits})

    from trainers.recipes.fit import nll

    for row, loss in zip(held_out, nll(Perfect(), held_out), strict=True):
        count = int((row["labels"] != -100).sum())
        assert loss * count == pytest.approx(-row["log_prob"], rel=1e-4)  # float32 log-softmax over 768 entries


def test_the_recipe_runs_and_its_models_can_be_bundled(tmp_path):
    from hf_ext import tiny
    from trainers.recipes.__main__ import main
    from trainers.recipes.bundle_stories import bundle

    assert main(["stories", "--budget", "smoke", "--work", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "stories/smoke/stories.json").read_text())
    assert [cell["status"] for cell in result["cells"]] == ["done", "done"]
    assert {claim["id"] for claim in result["claims"]} >= {"stories_parse", "stories_adds", "stories_lime_entropy"}
    llama, lime = (cell["params_trained"] for cell in result["cells"])
    # the twin's routers: G^2 (L (L + 1) / 2 - 1) for 6 heads and 4 layers
    assert lime - llama == 36 * 9
    assert llama <= 2_500_000
    made = bundle(tmp_path / "stories/smoke/cells", tmp_path / "tiny")
    assert [folder.name for folder in made] == ["stories_lime", "stories"]
    for folder, cell in zip(made, result["cells"][::-1], strict=True):
        model, tokenizer = tiny.load(folder)
        assert model.dtype == torch.bfloat16
        assert tokenizer.padding_side == "left"
        assert model.num_parameters() == cell["params_trained"]
        assert not list(folder.glob("*.py"))
        assert json.loads((folder / "training.json").read_text())["seed"] == 0
        card = (folder / "README.md").read_text()
        assert card.count("> **") == min(10, len(cell["samples"]))
        assert "python -m trainers.recipes stories" in card
