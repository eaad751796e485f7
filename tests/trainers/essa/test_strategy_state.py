"""What a strategy saves: resuming to the last bit, and states that are refused."""

import json
import math
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trainers.essa import OpenAIES, SepCMAES, Strategy, make_strategy


FILES = ["strategy.json", "strategy.safetensors"]
each = pytest.mark.parametrize("name", ["sep-cma", "cma", "openai-es", "random"])


@each
def test_a_resumed_search_is_the_uninterrupted_one_to_the_bit(name, tmp_path, run, assert_same):
    whole = make_strategy(name, 6, 8, 0.4, seed=2**63, mean=np.linspace(0, 1, 6))
    run(whole, 7).ask()
    whole.save(tmp_path / "a" / "b")
    resumed = Strategy.load(tmp_path / "a" / "b")
    assert type(resumed) is type(whole)
    assert resumed.fingerprint() == whole.fingerprint()
    # another search's state is replaced entirely
    other = run(make_strategy(name, 6, 8, 0.9, seed=2**63), 3)
    other.load_state_dict(*whole.state_dict())
    for strategy in (whole, resumed, other):
        run(strategy, 9)
    assert whole.generation == 16
    assert_same(whole, resumed)
    assert_same(whole, other)
    assert np.array_equal(whole.ask(), resumed.ask())


@each
def test_a_saved_state_is_json_and_safetensors_and_needs_no_pickle(name, tmp_path, monkeypatch, run, assert_same):
    strategy = run(make_strategy(name, 5, 8, 0.4, seed=2**64 - 1), 4)
    for module_, attribute in ((pickle, "loads"), (pickle, "dumps"), (pickle, "load"), (np, "load"), (np, "save")):
        monkeypatch.setattr(module_, attribute, None)
    strategy.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    saved = json.loads((tmp_path / "strategy.json").read_text())
    assert saved["seed"] == 2**64 - 1
    assert saved["generation"] == 4
    assert np.array_equal(load_file(tmp_path / "strategy.safetensors")["mean"], strategy.mean)
    assert_same(Strategy.load(tmp_path), strategy)


def test_the_fingerprint_tells_workers_apart_by_one_bit_and_does_not_depend_on_who_asked(run):
    strategy, same = (run(SepCMAES(5, 6, 0.4, seed=0), 3) for _ in range(2))
    strategy.ask()
    assert strategy.fingerprint() == same.fingerprint()
    found = {strategy.fingerprint()}
    for key in ("mean", "C", "p_sigma", "p_c"):
        array = getattr(strategy, key)
        setattr(strategy, key, np.nextafter(array, np.inf))
        found.add(strategy.fingerprint())
        setattr(strategy, key, array)
    strategy.sigma = math.nextafter(strategy.sigma, 1)
    found.add(strategy.fingerprint())
    strategy.generation += 1
    found.add(strategy.fingerprint())
    assert len(found) == 7


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("random", {}, "`name` 'openai-es', got 'random'"),
        ("openai-es", {"dim": 6}, "`dim` 5, got 6"),
        ("openai-es", {"population_size": 10}, "`population_size` 8, got 10"),
        ("openai-es", {"seed": 4}, "`seed` 3, got 4"),
        ("openai-es", {"momentum": 0.5}, "`momentum` 0.0, got 0.5"),
    ],
)
def test_the_state_of_another_search_is_refused_with_both_values(name, options, said, tmp_path, run):
    strategy = run(OpenAIES(5, 8, 0.4, seed=3), 3)
    before = strategy.fingerprint()
    arguments = {"name": name, "dim": 5, "population_size": 8, "sigma": 0.4, "seed": 3, **options}
    other = run(make_strategy(**arguments), 3)
    with pytest.raises(ValueError, match=f"{said}.*Start anew"):
        strategy.load_state_dict(*other.state_dict())
    assert strategy.fingerprint() == before
    if name == "random":
        other.save(tmp_path)
        with pytest.raises(ValueError, match="strategy.json must hold .*'openai-es', got 'random'"):
            OpenAIES.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s, a: s.pop("generation"), "The state must hold"),
        (lambda s, a: a.pop("C"), "The state must hold"),
        (lambda s, a: s.update(generation=-1), "`generation` must be in"),
        (lambda s, a: s.update(sigma=math.nan), "`sigma` must be in"),
        (lambda s, a: a.update(C=a["C"][:-1]), r"'C' as float64 of shape \(5,\)"),
        (lambda s, a: a.update(C=a["C"].astype(np.float32)), "got float32"),
        (lambda s, a: a.update(p_c=a["p_c"] * math.nan), "without NaN"),
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(change, said, run):
    strategy = run(SepCMAES(5, 6, 0.4, seed=3), 3)
    before, (settings_, arrays) = strategy.fingerprint(), run(SepCMAES(5, 6, 0.4, seed=3), 5).state_dict()
    change(settings_, arrays)
    with pytest.raises(ValueError, match=said):
        strategy.load_state_dict(settings_, arrays)
    assert strategy.fingerprint() == before


@pytest.mark.parametrize("file", FILES)
def test_truncated_and_foreign_files_are_refused_by_name(file, tmp_path, run):
    run(SepCMAES(5, 6, 0.4, seed=3), 3).save(tmp_path)
    path = tmp_path / file
    whole = path.read_bytes()
    middle = len(whole) // 2
    shorter = (whole[:7], whole[:middle], whole[:-2], whole[:middle] + whole[middle + 1 :])
    for content in (b"", b"\x80", b"[1]", b"{}", *shorter):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=file.replace(".", r"\.")):
            Strategy.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=file):
        Strategy.load(tmp_path)


def test_files_of_two_saves_or_of_another_program_are_refused(tmp_path, run):
    strategy = run(SepCMAES(5, 6, 0.4, seed=3), 3)
    strategy.save(tmp_path / "a")
    run(strategy, 2).save(tmp_path / "b")
    os.replace(tmp_path / "b" / FILES[1], tmp_path / "a" / FILES[1])
    with pytest.raises(ValueError, match="must be of one save"):
        Strategy.load(tmp_path / "a")
    save_file({"weight": np.ones(3, dtype=np.float16)}, tmp_path / "a" / FILES[1])
    with pytest.raises(ValueError, match="must be of one save"):
        Strategy.load(tmp_path / "a")


def test_a_save_that_fails_leaves_the_earlier_one_and_no_remains(tmp_path, monkeypatch, run):
    strategy = run(SepCMAES(5, 6, 0.4, seed=3), 3)
    strategy.save(tmp_path)
    before = strategy.fingerprint()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(strategy, 1).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert Strategy.load(tmp_path).fingerprint() == before
