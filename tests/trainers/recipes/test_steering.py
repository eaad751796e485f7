"""The recipes of steering at their smallest, and the parts that their figures stand on."""

import json
import random

import pytest

from trainers.recipes import steering, steering_smollm2
from trainers.recipes.__main__ import main


def test_a_tag_decides_how_often_an_answer_is_right():
    rng = random.Random(0)
    for tag, share in steering.SHARE_T.items():
        rows = [steering.sample(rng, tag) for _ in range(2000)]
        right = 0
        for asked, said in rows:
            a, b = asked.removeprefix(tag).removesuffix("=").split("+")
            assert len(said) == 4 and said[0] in "TS"
            if said[0] == "T":
                assert int(said[1:]) == int(a) + int(b)
            right += said[0] == "T"
        assert right / 2000 == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)


def test_sums_that_are_asked_are_never_trained_on():
    train, asked = (
        {row["prompt"][0]["content"] for row in steering_smollm2.sums(1, 9, 0, 3000, held_out=side)}
        for side in (False, True)
    )
    assert not train & asked and len(train) + len(asked) == 81
    assert steering_smollm2.is_right(" 12.\n", "12") and not steering_smollm2.is_right("1 + 2 = 3", "3")


def test_both_recipes_run_every_kind_of_arm_and_answer_their_claims(tmp_path):
    assert main(["steering", "--budget", "smoke", "--work", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "steering/smoke/steering.json").read_text())
    assert {cell["arm"].partition("-")[0] for cell in result["cells"]} == {"full", "lora", "steering", "random"}
    assert all(cell["status"] == "done" for cell in result["cells"])
    trained = {cell["arm"].partition("-")[0]: cell["params_trained"] for cell in result["cells"]}
    assert trained["steering"] == trained["random"] == 3 * 64
    assert {claim["id"] for claim in result["claims"]} == {"steering_recovers_full", "steering_random_reward_nothing"}


def test_claims_take_each_arm_at_its_best_rate():
    def cell(arm, seed, accuracy):
        metrics = {"accuracy": accuracy, "accuracy_start": 0.2}
        return {"arm": arm, "seed": seed, "status": "done", "metrics": metrics}

    cells = [
        cell(arm, seed, accuracy + 0.01 * seed)
        for seed in range(3)
        for arm, accuracy in (
            ("full-0.0001", 0.5), ("full-0.0003", 1.0), ("steering-0.01", 0.9), ("steering-0.03", 0.3),
            ("random-0.01", 0.2), ("random-0.03", 0.9),
        )
    ]  # fmt: skip
    recovers, nothing = steering.claims(cells)
    assert recovers["estimate"] == pytest.approx(sum((0.7 + d) / (0.8 + d) for d in (0, 0.01, 0.02)) / 3, abs=1e-5)
    assert recovers["verdict"] == "holds" and "random-0.01" in nothing["statistic"] and nothing["verdict"] == "holds"
