"""`python -m tests.benchmarks`: names, resuming by commit, and rows of another schema."""

import json
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """The runner's names, looking at a folder with two benchmarks that write a row when they run."""
    for name in ("quick_row", "slow_row"):
        row = dict.fromkeys(("date", "device", "unit", "ours", "peer"), "") | {"ratio": 1.0, "goal": 0.9}
        (tmp_path / f"{name}.py").write_text(
            "import json, pathlib\n"
            f"row = {row!r} | {{'name': '{name}-peer', 'command': 'c', 'commit': 'abc'}}\n"
            "folder = pathlib.Path(__file__).with_name('results'); folder.mkdir(exist_ok=True)\n"
            f"(folder / '{name}-peer.json').write_text(json.dumps(row))\n"
            f"with open(pathlib.Path(__file__).with_name('ran'), 'a') as file: file.write('{name} ')  # rows.write(\n"
        )
    found = runpy.run_path(str(ROOT / "tests/benchmarks/__main__.py"))
    scope = found["main"].__globals__
    monkeypatch.setitem(scope, "HERE", tmp_path)
    monkeypatch.setitem(scope, "commit", lambda: "abc")
    results = scope["results"]
    monkeypatch.setitem(scope, "results", lambda name: results(name, tmp_path / "results"))
    return scope


def test_all_runs_what_has_no_row_of_this_commit(runner, tmp_path, capsys):
    assert runner["main"](["quick_row"]) == 0
    assert runner["main"](["--all"]) == 0
    assert (tmp_path / "ran").read_text().split() == ["quick_row", "slow_row"]
    said = capsys.readouterr().out
    assert "quick_row is done at abc" in said
    assert "slow_row-peer: ratio 1.0, goal 0.9: met" in said


def test_files_that_were_changed_make_every_row_old(runner, tmp_path, monkeypatch):
    monkeypatch.setitem(runner, "commit", lambda: "")
    assert runner["main"](["--all"]) == 0
    assert runner["main"](["--all"]) == 0
    assert len((tmp_path / "ran").read_text().split()) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["quik"], "got 'quik'. The nearest are quick_row"), ([], "got none. There are quick_row, slow_row, or --all")],
)
def test_a_name_that_is_none_gets_the_nearest(runner, arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        runner["main"](arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_row_of_another_schema_is_named(runner, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/quick_row-peer.json").write_text(json.dumps({"speed": 3}))
    with pytest.raises(SystemExit, match=r"quick_row-peer.json is no benchmark's row"):
        runner["main"](["quick_row"])


def test_the_scripts_of_the_project_are_found():
    scope = runpy.run_path(str(ROOT / "tests/benchmarks/__main__.py"))
    assert {"lime_training_step", "record_overhead", "lab_first_token"} <= set(scope["names"]())
    assert "rows" not in scope["names"]()
