"""The ESSA page: searches on a tiny model, what is refused, what the adapter says elsewhere, what a browser shows."""

import re
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gradio
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def settings(model, **changes):
    from essa_settings import Settings

    wanted = {"reward": "instruction", "instruction": "change_case:english_lowercase", "sigma": "0.5", "population": 6}
    return Settings(model, **{**wanted, "prompts": 4, "generations": 3, "supervised_steps": 1, **changes})


def search(model, **changes):
    from essa_search import Search
    from store import Store

    return Search(Store(model), settings(model, **changes))


def until(condition, seconds=250):
    """Wait for what a thread does; the limit only ends a test that would hang."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def done(lively):
    """A search that ran to its end, and the folder of its adapter."""
    found = search(lively)
    found.wait()
    assert found.adapter is not None, found.seen["status"]
    place = Path(found.adapter).with_suffix("")
    zipfile.ZipFile(found.adapter).extractall(place.with_name("unpacked"))
    return found, place.with_name("unpacked")


def test_a_search_shows_each_generation_and_the_answers_before_and_after(done):
    seen = done[0].seen
    assert re.match(r"Finished after 3 generations. Held-out prompts: mean reward \d", seen["status"])
    assert seen["dim"] == 3 * 4 * 2 * 2  # layers, matrices, factors, rank
    assert [len(found["fitness"]) for found in seen["generations"]] == [6, 6, 6]
    assert all(0 <= reward <= 1 for found in seen["generations"] for reward in found["fitness"])
    assert len({found["sigma"] for found in seen["generations"]}) > 1  # it has learned something
    assert len(seen["answers"]) == 16
    assert any(row["before"] != row["after"] for row in seen["answers"])
    assert all(row["after_reward"] == row["after"].islower() for row in seen["answers"])


def test_the_adapter_of_the_zip_says_in_plain_peft_what_the_page_shows_after_the_search(done):
    from essa_settings import TASKS
    from peft import AutoPeftModelForCausalLM

    found, place = done
    assert not [file for file in place.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    model = AutoPeftModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    asked = [row["prompt"] for row in TASKS["capitals"].rows(True)[:16]]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    said = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == [row["after"] for row in found.seen["answers"]]


def test_a_search_goes_on_from_an_adapter_that_is_given(done, lively):
    found, place = done
    again = search(lively, adapter=str(place), supervised_steps=0, generations=1)
    again.wait()
    assert [row["before"] for row in again.seen["answers"]] == [row["after"] for row in found.seen["answers"]]


def test_a_stopped_search_keeps_its_mean_and_saves_it(lively):
    found = search(lively, generations=1000)
    until(lambda: len(found.seen["generations"]) >= 2)
    found.stop()
    found.wait()
    made = len(found.seen["generations"])
    assert 2 <= made < 1000
    assert found.seen["status"].startswith(f"Stopped after {made} generations")
    assert "adapter_model.safetensors" in zipfile.ZipFile(found.adapter).namelist()


def test_searches_take_turns_and_one_that_is_left_ends_without_a_result(lively):
    first = search(lively, generations=1000)
    until(lambda: first.seen["status"].startswith("Supervised"))
    second = search(lively)
    until(lambda: first.seen["generations"])
    assert second.seen["status"].startswith("Waiting for another search")
    first.close()
    until(lambda: not second.seen["status"].startswith("Waiting"))
    second.stop()
    for found in (first, second):
        found.wait()
        assert found.adapter is None
    assert second.seen["status"].startswith("Stopped before the first generation was over")


def test_a_model_without_a_chat_template_continues_texts_and_auto_finds_a_step_size(lively, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(lively)
    tokenizer = AutoTokenizer.from_pretrained(lively)
    tokenizer.chat_template = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    found = search(str(tmp_path), task="word_problems", sigma="auto", generations=1)
    found.wait()
    assert found.seen["status"].startswith("Finished after 1 generation."), found.seen["status"]
    assert found.seen["answers"][0]["question"].endswith("?")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"population": 3}, "`population_size` must be a whole number >= 4, got 3."),
        ({"prompts": 0}, "`batch_size_per_candidate` must be a whole number >= 1, got 0."),
        ({"prompts": 5000}, "`batch_size_per_candidate` must be at most the task's 1000 rows, got 5000."),
        ({"sigma": "large"}, "`sigma` must be a number > 0 or \"auto\", got 'large'."),
        ({"alpha": 1.5}, "`svd_fraction` must be above 0 and at most 1, got 1.5."),
        ({"alpha": 0.1}, "floor(alpha * rank) must be at least 1, got 0.1 * 2: raise one."),
        ({"generations": 0}, "`generations` must be a whole number >= 1, got 0."),
        ({"rank": 0}, "`rank` must be a whole number >= 1, got 0."),
        ({"supervised_steps": 0}, "`supervised_steps` must be a whole number >= 1, got 0."),
        ({"seed": None}, "`seed` must be given, got nothing."),
        ({"reward": "last_number"}, "`reward` must be one of correct, exact, json, length, instruction, got"),
        ({"reward": "length", "min_tokens": 5}, "`min_tokens` must be in [0, max_tokens=4], got 5."),
        ({"instruction": "be nice"}, "must hold ids of IFEval, got 'be nice'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(lab, changes, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        search("no model of this name", **changes)


def test_what_goes_wrong_in_a_search_is_said_in_its_status(lively, folder, done, tmp_path):
    other = LlamaForCausalLM.config_class.from_pretrained(folder, hidden_size=16)
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "other")
    for model, adapter, reason in (
        (str(tmp_path), "", "without config.json"),
        (lively, str(tmp_path), "must be a folder or Hub id of a LoRA"),
        (str(tmp_path / "other"), str(done[1]), "`adapter` must be one of"),
    ):
        found = search(model, adapter=adapter)
        found.wait()
        assert found.seen["status"].startswith("**The search cannot go on.**")
        assert reason in found.seen["status"]


@pytest.mark.parametrize("task", ["capitals", "json_sum", "word_problems", "expressions"])
def test_what_supervised_steps_teach_is_right_and_no_held_out_prompt_is_among_it(lab, task):
    from essa_settings import TASKS

    chosen = TASKS[task]
    known, asked = chosen.rows(False), chosen.rows(True)
    assert all(chosen.correct(chosen.teach(row), row["answer"]) for row in known)
    assert not {str(row["prompt"]) for row in known} & {str(row["prompt"]) for row in asked}


def test_a_session_has_one_search_and_leaving_ends_it(lab, lively):
    from pages import essa

    request = SimpleNamespace(session_hash="a session")
    store = lab.Store(lively)
    found = essa.begin(store, "a session", settings(lively))
    with pytest.raises(gradio.Error, match="press Stop"):
        essa.begin(store, "a session", settings(lively))
    essa.leave(request)
    essa.leave(request)  # a page that was left already
    found.wait()
    assert found.adapter is None
    assert "a session" not in essa.SESSIONS


SEEN = {
    "task": "a task", "reward": "some", "planned": 4, "dim": 8,
    "generations": [
        {"fitness": [0.0, 0.25, 0.5, 1.0, None], "sigma": 0.2, "seconds": 1.0, "tokens_per_second": None},
        {"fitness": [0.5, 0.5, 0.5, 0.5, 0.5], "sigma": 0.19, "seconds": 2.5, "tokens_per_second": 1234.5},
    ],
    "answers": [
        {"question": "q1", "answer": "A", "before": "a", "before_reward": 0.0, "after": "A", "after_reward": 1.0},
        {"question": "q2", "answer": "B", "before": "B", "before_reward": 1.0, "after": "B", "after_reward": 1.0},
    ],
}  # fmt: skip


def test_the_charts_show_each_candidate_that_was_scored_its_mean_best_and_middle_half(lab):
    from pages import essa

    shown = essa.reward_charts(SEEN)
    radii = re.findall(r'class="dot" cx="([^"]*)" cy="[^"]*" r="([^"]*)"', shown)
    # one of the first five has failed, and the second five are equal: 2.5 * sqrt(5)
    assert [radius for _, radius in radii] == ["2.5"] * 4 + ["5.6"]
    assert len({x for x, _ in radii}) == 2
    # quartiles of 0, 0.25, 0.5, 1 by linear interpolation: 0.1875 and 0.625
    assert "generation 1: best 1.000, mean 0.438; the middle half of 4 candidates from 0.188 to 0.625" in shown
    assert "generation 2: sigma 0.190" in shown
    assert "1,234 tokens/s, 2.5 s a generation" in shown
    assert ">4</text>" in shown  # room for the generations to come


def test_the_table_colours_the_answers_that_have_changed_and_no_others(lab):
    from pages import essa

    cells = re.findall(r"<td [^>]*--p:(\d+)[^>]*>([^<]*)</td>", essa.answer_table(SEEN))
    assert cells == [("0", "a"), ("100", "A"), ("0", "B"), ("0", "B")]
    running = {"answers": [{"question": "q", "answer": "A", "before": "a", "before_reward": 0.0}]}
    assert "..." in essa.answer_table(running)


def fill(opened, **fields):
    for label, value in fields.items():
        opened.get_by_role("spinbutton", name=label, exact=True).fill(str(value))


@pytest.fixture
def opened(page):
    def open_at(width, theme="light"):
        opened = page(width, theme)
        opened.get_by_role("tab", name="ESSA", exact=True).click()
        opened.get_by_role("button", name="Start").wait_for()
        return opened

    return open_at


def test_a_search_is_started_refused_a_second_time_stopped_and_downloaded(opened, tmp_path):
    shown = opened(390, "dark")
    fill(shown, Population=4, Prompts=2, Generations=1000)
    shown.get_by_role("button", name="Start").click()
    shown.get_by_text(re.compile(r"Generation \d+ of 1000: mean reward")).wait_for(timeout=120_000)
    assert shown.get_by_role("button", name="Download the adapter").is_disabled()
    shown.get_by_role("button", name="Start").click()
    shown.get_by_text("A search of this window is running").wait_for()
    shown.get_by_role("button", name="Stop").last.click()
    shown.get_by_text(re.compile("Stopped after")).wait_for(timeout=60_000)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
    with shown.expect_download() as download:
        shown.get_by_role("button", name="Download the adapter").click()
    download.value.save_as(tmp_path / "adapter.zip")
    assert "adapter_model.safetensors" in zipfile.ZipFile(tmp_path / "adapter.zip").namelist()


def test_a_bad_setting_is_said_plainly_and_the_example_stays(opened):
    shown = opened(1280)
    before = shown.locator("circle.dot").count()
    fill(shown, Population=3)
    shown.get_by_role("button", name="Start").click()
    shown.get_by_text("must be a whole number >= 4, got 3.").wait_for()
    assert before == shown.locator("circle.dot").count() > 8


def test_rewards_follow_the_task_and_bring_their_own_fields(opened):
    shown = opened(1280)
    assert not shown.get_by_role("combobox", name="Instruction").is_visible()
    shown.get_by_role("combobox", name="Reward").click()
    assert shown.get_by_role("option", name="last_number_reward").count() == 0
    shown.get_by_role("option", name="instruction_reward").click()
    shown.get_by_role("combobox", name="Instruction").wait_for()
    shown.get_by_role("combobox", name="Task").click()
    shown.get_by_role("option", name="Add two numbers").click()
    shown.wait_for_timeout(500)
    shown.get_by_role("combobox", name="Reward").click()
    shown.get_by_role("option", name="last_number_reward").wait_for()


def test_closing_the_window_ends_its_search(opened):
    from pages import essa

    shown = opened(1280)
    fill(shown, Population=4, Prompts=2, Generations=1000)
    shown.get_by_role("button", name="Start").click()
    until(lambda: any(one.running for one in essa.SESSIONS.values()))
    (found,) = [one for one in essa.SESSIONS.values() if one.running]
    shown.close()
    until(lambda: not found.running)
    assert found.adapter is None
