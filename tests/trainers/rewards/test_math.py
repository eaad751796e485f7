"""Right answers: numbers in any dress against integers, and boxed expressions against what mathematics says."""

import doctest
import os
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.rewards import boxed_reward, gsm8k_reward
from trainers.rewards import math as rewards_math


# 9^(9^(9^9)) has more digits than there are atoms: no machine compares it with anything
ENDLESS = r"\boxed{9^{9^{9^9}}}"


@pytest.fixture(autouse=True)
def nothing_remembered():
    rewards_math._equal.cache_clear()
    rewards_math._worker.has_warned = False


def test_the_examples_in_the_docstrings_are_true():
    failed, tried = doctest.testmod(rewards_math)
    assert (failed, tried) == (0, 3)


DRESSES = ["{:,}", "{}", "${:,}.00", "{}.0", " {} ", "{:,} apples.", "= {:,}", "$ {:,}", "**{}**", "({:,})", "{:_}"]


@settings(deadline=None)
@given(value=st.integers(-(10**15), 10**15), other=st.integers(-(10**15), 10**15), dress=st.sampled_from(DRESSES))
def test_a_number_in_any_dress_is_that_number_and_no_other(value, other, dress):
    text = "After 3 - 2 steps:\n#### " + dress.format(value).replace("_", " ")
    assert gsm8k_reward([text], answer=[f"worked out\n#### {value:,}"]) == [1.0]
    assert gsm8k_reward([text], answer=[value]) == [1.0]
    assert gsm8k_reward([text], answer=[str(other)]) == [float(value == other)]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("#### 18", "9 * 2 = 18\n#### 18", 1.0),
        ("#### 18", "18", 1.0),
        ("the answer is 18", "18", 1.0),
        ("#### 18\n\nQuestion: Tom has 5", "18", 1.0),
        ("#### Step 1\nfive\n#### 18 dollars", "18", 1.0),
        ("#### Answer\n\n18", "18", 1.0),
        ("#### 9 * 2 = 18", "18", 1.0),
        ("18\n####", "18", 0.0),
        ("18 and #### nothing", "18", 0.0),
        ("#### 18.5", "18", 0.0),
        ("#### -18", "18", 0.0),
        ("", "18", 0.0),
        ("#### 18", "no number", None),
        ("#### 18", "18\n#### unknown", None),
        ("#### 18", None, None),
        ("#### 18", float("nan"), None),
        ("#### 0.1", 0.1, 1.0),
    ],
)
def test_the_number_after_the_last_mark_decides(completion, answer, reward):
    assert gsm8k_reward([completion], answer=[answer]) == [reward]


@pytest.mark.parametrize("reward", [gsm8k_reward, boxed_reward])
def test_messages_are_worth_what_their_text_is_worth(reward):
    texts = [r"#### \boxed{7}", r"#### \boxed{8}"]
    as_messages = [[{"role": "assistant", "content": text}] for text in texts]
    unused = {"prompts": ["", ""], "completion_ids": [[1], [2]], "trainer_state": None, "log_metric": None}
    assert reward(completions=as_messages, answer=["7", "7"], **unused) == [1.0, 0.0]
    assert reward(completions=texts, answer=["7", "7"]) == [1.0, 0.0]


@pytest.mark.parametrize("reward", [gsm8k_reward, boxed_reward])
def test_lists_of_different_lengths_and_odd_answers_are_refused(reward):
    with pytest.raises(ValueError, match="`answer` must have 2 rows, as `completions`, got 1"):
        reward(["1", "2"], answer=["1"])
    with pytest.raises(TypeError, match=r"`answer` must hold texts or numbers, got \[1\]"):
        reward(["1"], answer=[[1]])


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} then \boxed{\frac{1}", "1"),
        (r"} \boxed{5} {", "5"),
        (r"\boxed{}", ""),
        (r"\boxed5", None),
        (r"\boxed{5", None),
        ("5", None),
    ],
)
def test_the_last_box_whose_braces_close_is_found(text, inner):
    assert rewards_math.last_boxed(text) == inner


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "}", r"\boxed{1}", "\\"])
def test_looking_for_a_box_takes_time_in_proportion_to_the_text(piece):
    start = time.perf_counter()
    rewards_math.last_boxed(piece * 100_000)
    # a quadratic search takes minutes, a linear one a fraction of a second: a wide margin for a busy machine
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("found", "gold", "reward"),
    [
        ("(x+1)^2", "x^2+2x+1", 1.0),
        (r"\frac{2}{4}", r"\dfrac12", 1.0),
        (r"\sqrt{8}", r"2\sqrt{2}", 1.0),
        (r"5\text{ cm}", "5", 1.0),
        ("c + a", "a + c", 1.0),
        (r"\{2, 1\}", r"\{1, 2\}", 1.0),
        ("x = 5", "5", 1.0),
        ("1,000", "1000", 1.0),
        (r"1{,}000", "1000", 1.0),
        (r"\text{Monday}", r"\text{Monday}", 1.0),
        ("3", r"so \boxed{3}", 1.0),
        ("3", "$3$", 1.0),
        ("3", 3, 1.0),
        ("0.5", 0.5, 1.0),
        ("(x+2)^2", "x^2+2x+1", 0.0),
        (r"\text{Tuesday}", r"\text{Monday}", 0.0),
        ("", "5", 0.0),
        ("__import__('os').getcwd()", "5", 0.0),
        ("5", "", None),
        ("5", None, None),
    ],
    ids=lambda value: str(value)[:24],
)
def test_boxed_expressions_are_equal_where_mathematics_says_so(found, gold, reward):
    assert boxed_reward([f"Thus \\boxed{{{found}}}."], answer=[gold]) == [reward]


@settings(deadline=None)
@given(
    pair=st.tuples(st.fractions(max_denominator=50), st.fractions(max_denominator=50)),
    form=st.sampled_from([r"{0.numerator}/{0.denominator}", r"\frac{{{0.numerator}}}{{{0.denominator}}}"]),
)
def test_plain_fractions_are_told_apart_without_the_process(pair, form):
    gold, found = (abs(Fraction(value)) for value in pair)
    said = rewards_math._plainly_equal(str(gold), form.format(found))
    assert said is True if gold == found else said is not True


def test_whole_numbers_and_equal_texts_never_reach_the_process(monkeypatch):
    monkeypatch.setattr(rewards_math._Worker, "ask", lambda *args: pytest.fail("the process was asked"))
    found, gold = (
        ["7", "8", "1,000", r"\dfrac{1}{2}", r"\frac{2}{4}", r"x^{2}"],
        ["7", "7", 1000, "0.5", "1/2", "$x^{2}$"],
    )
    completions = [f"\\boxed{{{text}}}" for text in found]
    assert boxed_reward(completions, answer=gold) == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_comparing_works_in_threads_at_the_same_time():
    results = {}

    def work(i):
        results[i] = boxed_reward([rf"\boxed{{x + {i} + 1}}", r"\boxed{x}"], answer=[f"{i + 1} + x"] * 2)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [1.0, 0.0] for i in range(4)}


def test_a_comparison_that_hangs_counts_nothing_and_does_not_stop_the_next_ones(caplog):
    boxed_reward([r"\boxed{y}"], answer=["z"])  # so that the limit below is all that is waited for
    start = time.perf_counter()
    long = "x + " * 99 + "x"
    # the limit is some 50 times what the second comparison takes, for a busy machine
    rewards = boxed_reward([ENDLESS, r"\boxed{x + 1}", ENDLESS], answer=[long, "1 + x", long], time_limit=2)
    took = time.perf_counter() - start
    assert rewards == [0.0, 1.0, 0.0]
    assert rewards_math._equal.cache_info().hits == 1, "the same question is asked twice"
    assert 2 <= took < 120  # the limit, and a new start of some seconds
    (record,) = caplog.records
    assert "did not end within 2 s" in record.message
    assert "later cases are not logged" in record.message
    assert "..." in record.message
    assert len(record.message) < 300


def test_a_process_that_is_killed_is_replaced():
    assert boxed_reward([r"\boxed{a + b}"], answer=["b + a"]) == [1.0]
    rewards_math._worker.process.kill()
    assert boxed_reward([r"\boxed{a + c}"], answer=["c + a"]) == [1.0]


def test_a_comparison_whose_process_dies_twice_counts_nothing(monkeypatch, caplog):
    start = rewards_math._Worker._running

    def start_and_kill(worker):
        process = start(worker)
        process.kill()
        process.wait()
        return process

    with monkeypatch.context() as patched:
        patched.setattr(rewards_math._Worker, "_running", start_and_kill)
        assert boxed_reward([r"\boxed{x + 1}"], answer=["1 + x"]) == [0.0]
    assert "Comparing '1 + x' with 'x + 1' ended its process twice" in caplog.text
    assert boxed_reward([r"\boxed{x + 2}"], answer=["2 + x"]) == [1.0]


def test_a_model_cannot_make_python_run(tmp_path):
    target = tmp_path / "planted"
    code = f"__import__('pathlib').Path('{target}').touch()"
    forms = [code, rf"\text{{{code}}}", rf"\operatorname{{eval}}({code})", f"({code},)"]
    boxed_reward([f"\\boxed{{{form}}}" for form in forms], answer=["x + 1"] * 4)
    gsm8k_reward(forms, answer=["1"] * 4)
    assert not target.exists()


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'pip install "hf_ext\[trainers\]"'):
        boxed_reward([r"\boxed{7}"], answer=["7"])


@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("5", TypeError)]
)
def test_a_time_limit_that_is_no_time_is_refused(limit, error):
    with pytest.raises(error, match="`time_limit` must be"):
        boxed_reward([r"\boxed{7}"], answer=["7"], time_limit=limit)


def test_a_process_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(rewards_math, "_WORKER", "raise SystemExit('no such thing')")
    rewards_math._worker.process.kill()
    with pytest.raises(RuntimeError, match="did not start: no such thing"):
        boxed_reward([r"\boxed{a + d}"], answer=["d + a"])


# no `if __name__ == "__main__"`: starting the process must not run the script again
SCRIPT = r"""
import os, sys
print("once")
from trainers.rewards import boxed_reward
from trainers.rewards import math as rewards_math
assert boxed_reward([r"\boxed{x + 1}"], answer=["1 + x"]) == [1.0]
if hasattr(os, "fork"):
    child = os.fork()
    if child == 0:
        ok = boxed_reward([r"\boxed{x + 2}"], answer=["2 + x"]) == [1.0]
        rewards_math._worker._stop()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
assert boxed_reward([r"\boxed{x + 3}"], answer=["3 + x"]) == [1.0]
print(rewards_math._worker.process.pid)
"""


def test_a_script_and_its_forks_compare_and_leave_no_process_behind(run_python):
    once, pid = run_python(SCRIPT, block=()).split()
    assert once == "once"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process outlives the script")
