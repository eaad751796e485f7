"""Detection, fuzzing, entropies and F1 on latents whose meaning was planted."""

import math

import pytest
import torch

from hf_ext.sae import SparseCodes
from hf_ext.sae.interpretability import (
    Context,
    activations_of,
    best_f1,
    common_tokens,
    contains,
    multitoken_ratio,
    score_latents,
    token_entropy,
)


VOCABULARY, ROWS, T = 120, 240, 93
TOKEN, PAIR, TWO, COIN, RARE, SILENT = range(6)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCABULARY, (ROWS, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def codes(ids):
    """Latents that fire on a token, on one after certain others, on either of two, at random, once, and never."""
    generator = torch.Generator().manual_seed(1)
    fires = torch.zeros(ROWS, T, 6, dtype=torch.bool)
    fires[..., TOKEN] = ids == 7
    fires[..., PAIR] = (ids == 9) & (torch.roll(ids, 1, 1) < 60) & (torch.arange(T) > 0)
    fires[..., TWO] = (ids == 30) | (ids == 31)
    fires[..., COIN] = torch.rand(ROWS, T, generator=generator) < 0.02
    fires[0, 0, RARE] = True
    values = fires * (1 + torch.rand(ROWS, T, 6, generator=generator))
    top = values.topk(6, dim=-1)
    return SparseCodes(top.values, top.indices, 6)


def by_latent(scores):
    return {score.latent: score for score in scores}


def test_activations_of_some_latents_are_columns_of_the_dense_codes(codes):
    torch.testing.assert_close(activations_of(codes, [3, 0]), codes.dense()[..., [3, 0]])


def test_planted_latents_are_detected_and_a_coin_is_not(codes, ids):
    found = by_latent(score_latents(codes, ids))
    assert set(found) == {TOKEN, PAIR, TWO, COIN}  # the rare and the silent one have too few contexts
    assert found[TOKEN].detection == found[TOKEN].fuzzing == 1
    assert found[TWO].detection == found[TWO].fuzzing == 1
    assert found[TOKEN].explanation == {(7,)} and found[TWO].explanation == {(30,), (31,)}
    # it fires after half of the other tokens: looking for 9 alone finds all and is wrong on some
    assert 0.75 < found[PAIR].detection < 1
    # 0.5 with a standard deviation of 0.5 / sqrt(2 * contexts)
    assert abs(found[COIN].detection - 0.5) < 4 * 0.5 / math.sqrt(2 * found[COIN].contexts)
    assert found[COIN].fuzzing < 0.7


def test_scores_depend_on_the_seed_alone(codes, ids):
    assert score_latents(codes, ids, seed=3) == score_latents(codes, ids, seed=3)
    assert score_latents(codes, ids, [COIN], seed=3) != score_latents(codes, ids, [COIN], seed=4)


def test_a_judge_that_is_given_sees_at_most_eight_contexts_and_no_activation(codes, ids):
    asked = []

    def judge(explanation, contexts):
        assert explanation == "on sevens" and 1 <= len(contexts) <= 8
        assert all(len(context.ids) == 31 and context.activations == () for context in contexts)
        asked.extend(contexts)
        return [7 in context.ids for context in contexts]

    (score,) = score_latents(codes, ids, [TOKEN], explain=lambda active, silent: "on sevens", judge=judge, contexts=20)
    assert score.detection == 1 and score.contexts == 20
    # detection of 20 + 20; fuzzing of 20 right, 10 shifted and 10 scattered ones, of which the judge calls 30 right
    assert [bool(context.marks) for context in asked] == 40 * [False] + 40 * [True]
    assert score.fuzzing == (1 + 10 / 20) / 2
    right, shifted, scattered = asked[40:60], asked[60:70], asked[70:]
    for context in right:
        assert context.marks == tuple(i == 7 for i in context.ids)
    for context in shifted:
        assert sum(context.marks) == context.ids.count(7)
        assert all(i != 7 for i, mark in zip(context.ids, context.marks, strict=True) if mark)
    assert all(7 not in context.ids and any(context.marks) for context in scattered)


def test_what_is_judged_is_not_what_was_explained(codes, ids):
    shown, judged = set(), set()

    def explain(active, silent):
        shown.update(context.ids for context in active + silent)

    def judge(explanation, contexts):
        judged.update(context.ids for context in contexts)
        return [True] * len(contexts)

    score_latents(codes, ids, [TOKEN, COIN], explain=explain, judge=judge)
    (alone,) = score_latents(codes, ids, [TOKEN], explain=lambda *_: None, judge=lambda _, some: [True] * len(some))
    assert alone.detection == alone.fuzzing == 0.5  # who always says yes
    shown, judged = set(), set()
    score_latents(codes, ids, [TOKEN], explain=explain, judge=judge)
    assert shown and judged and not shown & judged


def test_an_explanation_takes_pairs_where_tokens_do_not_tell():
    active = [Context((1, 2, 3, 4), (0, 1.0, 0, 0)), Context((5, 1, 2, 6), (0, 0, 2.0, 0))]
    silent = [Context((2, 1, 3, 4)), Context((4, 2, 5, 1))]
    explanation = common_tokens(active, silent)
    assert explanation == {(1, 2)}
    assert contains(explanation, [Context((0, 1, 2)), Context((2, 1))]) == [True, False]
    marked = [Context((0, 1, 2), marks=(False, False, True)), Context((0, 1, 2), marks=(True, True, False))]
    assert contains(explanation, marked) == [True, False]


def test_entropy_and_multitoken_ratio_of_planted_latents(codes, ids):
    one, _, two, coin, _, silent = token_entropy(codes, ids, range(6))
    assert one == 0
    share = codes.dense()[..., TWO][ids == 30].sum() / codes.dense()[..., TWO].sum()
    assert two == pytest.approx(-float(share * share.log() + (1 - share) * (1 - share).log()), abs=1e-6)
    assert 3 < coin <= math.log(VOCABULARY) and math.isnan(silent)
    ratios = multitoken_ratio(codes, range(6))
    assert ratios[RARE] == pytest.approx(1 / T) and math.isnan(ratios[SILENT])
    rows = (ids == 7).double().mean(1)
    assert ratios[TOKEN] == pytest.approx(float(rows[rows > 0].mean()))


def test_best_f1_by_hand():
    # latent 0 fires on tokens 0, 1, 4, 5; latent 1 on 0, 4, 6, 7; property 0 holds on 0, 4, 5, 6
    fires = torch.zeros(8, 2)
    fires[[0, 1, 4, 5], 0] = 1
    fires[[0, 4, 6, 7], 1] = 1
    codes = SparseCodes(*fires.topk(2, dim=1), 2)
    labels = torch.zeros(8, 2, dtype=torch.bool)
    labels[[0, 4, 5, 6], 0] = True
    chosen_on = torch.arange(8) < 4
    f1, latents = best_f1(codes, labels, chosen_on)
    # on the first four latent 0 has TP 1, FP 1: 2/3, and latent 1 TP 1: 1; on the others latent 1 has TP 2, FP 1, FN 1
    assert latents[0] == 1 and f1[0] == pytest.approx(2 / 3)
    assert math.isnan(f1[1])


def test_the_best_of_many_random_latents_is_not_flattered():
    generator = torch.Generator().manual_seed(0)
    tokens, latents = 400, 3000
    indices = torch.randint(latents, (tokens, 8), generator=generator)
    codes = SparseCodes(torch.ones(tokens, 8), indices, latents)
    labels = torch.rand(tokens, 10, generator=generator) < 0.02
    half = torch.rand(tokens, generator=generator) < 0.5
    f1, _ = best_f1(codes, labels, half)
    same, _ = best_f1(codes, labels, torch.ones(tokens, dtype=torch.bool))
    assert f1.nan_to_num().mean() < 0.1 and same.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(3, 5, dtype=torch.long)}, r"`codes` and `input_ids` must be of the same rows"),
        ({"length": 94}, r"`length` must be in \[2, T=93\], the tokens of a row, got 94"),
        ({"latents": [1, 6]}, r"`latents` must be in \[0, d_sae=6\), got \[6\]"),
        ({"least": 65}, r"`least` must be in \[1, contexts=64\], got 65"),
        (
            {"judge": lambda explanation, contexts: [True]},
            r"`judge` must answer for each of 8 contexts, got 1 answers",
        ),
    ],
)
def test_what_does_not_fit_is_refused(codes, ids, change, message):
    given = {"codes": codes, "input_ids": ids, **change}
    with pytest.raises(ValueError, match=message):
        score_latents(**given)
