"""A recipe is run as a user runs it: by its command, killed, started again; and every option that it refuses."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainers.recipes import process, results, runner
from trainers.recipes.__main__ import main
from trainers.recipes.runner import Options


ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Enough small sentences for `smoke`, with the verbs that it looks for."""
    rng = random.Random(0)
    nouns = [
        a + b for a in ("bal", "kro", "mi", "sen", "tu", "vel") for b in ("den", "fo", "gal", "lin", "mer", "sta")
    ]
    verbs = ["is", "are", "was", "were"]
    files = []
    for name, count in (("train", 700), ("valid", 300)):
        rows = [" ".join(f"The {rng.choice(nouns)} {rng.choice(verbs)} big." for _ in range(12)) for _ in range(count)]
        files.append(tmp_path_factory.mktemp("text") / f"{name}.jsonl")
        files[-1].write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return [str(file) for file in files]


def command(text, work):
    start = [sys.executable, "-m", "trainers.recipes", "lime", "--budget", "smoke"]
    return [*start, "--work", str(work), "--text", *text]


def without_costs(result):
    keep = {k: v for k, v in result.items() if k not in ("date", "commit")}
    speeds = ("tokens_per_cpu_s", "peak_rss_training")
    keep["rows"] = [row for row in result["rows"] if row["metric"] not in speeds]
    keep["cells"] = [{k: v for k, v in cell.items() if k not in ("cost", "commit")} for cell in result["cells"]]
    return keep


def test_a_recipe_killed_in_mid_cell_and_started_again_ends_with_the_same_result(text, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = subprocess.run(command(text, whole), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = json.loads((whole / "lime/smoke/lime.json").read_text())
    assert [cell["status"] for cell in expected["cells"]] == ["done"] * 4
    assert "| sums-lime | nll_solution" in done.stdout
    assert (whole / "lime/smoke/lime.png").read_bytes().startswith(b"\x89PNG")

    cells = cut / "lime/smoke/cells"
    process = subprocess.Popen(command(text, cut), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        # the later cells are in the middle of their work: some are done, one has a checkpoint and no result
        while not any(not (p.parents[1] / "cell.json").exists() for p in cells.glob("text-*/trainer/checkpoint-*")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*/cell.json")}
    assert 0 < len(before) < 4
    again = subprocess.run(command(text, cut), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr[-2000:]
    assert without_costs(json.loads((cut / "lime/smoke/lime.json").read_text())) == without_costs(expected)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished cell was repeated"


class Recipe:
    """Two cells that need no process: for what the runner does around them."""

    PAPER, ACCEPTS, UNITS = "0000.00000", (), {"x": "units"}

    @staticmethod
    def cells(options):
        return [runner.Cell("a", 0, {}), runner.Cell("a", 1, {})]

    @staticmethod
    def claims(cells):
        return []


@pytest.fixture
def finished(tmp_path):
    """A work folder in which all cells are done."""
    for cell in Recipe.cells(None):
        folder = tmp_path / "work/cells" / runner.identity(cell, {})
        cost = {"tokens": 1, "completions": 0, "wall_s": 0, "cpu_s": 0, "peak_rss": 0}
        head = {"arm": cell.arm, "seed": cell.seed, "settings": {}, "commit": "", "params_trained": 1}
        found = {"metrics": {"x": cell.seed + 1.0}, "status": "done", "cost": cost}
        results.write(folder / "cell.json", {**head, **found})
    return tmp_path / "work"


def test_finished_cells_become_rows_with_their_interval(finished, tmp_path):
    result = runner.run(Recipe, "lime", Options(), work=finished, out=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == result
    (row,) = result["rows"]
    assert (row["n"], row["mean"], row["unit"]) == (2, 1.5, "units")
    assert row["ci95"] == pytest.approx([1.5 - 12.7062 * 0.5, 1.5 + 12.7062 * 0.5], abs=1e-4)  # t(0.975, 1) = 12.7062


def test_a_results_file_of_another_schema_is_left_alone(finished, tmp_path):
    out = tmp_path / "r.json"
    out.write_text('{"schema": 7, "mine": true}')
    with pytest.raises(ValueError, match=r"must be of schema 1, got .*r.json of schema 7. Move it away"):
        runner.run(Recipe, "lime", Options(), work=finished, out=out)
    assert out.read_text() == '{"schema": 7, "mine": true}'


def test_a_full_disk_leaves_the_old_result_whole(finished, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    runner.run(Recipe, "lime", Options(), work=finished, out=out)
    old = out.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full; what it held before is intact. Make room"):
        runner.run(Recipe, "lime", Options(budget="full"), work=finished, out=out)
    assert out.read_bytes() == old
    assert [path.name for path in tmp_path.glob("r.json*")] == ["r.json"]


def test_a_recipe_that_fails_is_reported_and_tried_again(tmp_path, text):
    folder = tmp_path / "cell"
    spec = {"arm": "a", "seed": 0, "settings": {}, "shared": str(tmp_path), "facts": {}, "options": {}, "recipe": "x"}
    results.write(folder / "spec.json", spec)

    class Bad(Recipe):
        @staticmethod
        def run(cell, place):
            return {"params_trained": 1, "tokens": 1, "metrics": {"x": float("nan")}}

    process.run_cell(Bad, folder)
    cell = json.loads((folder / "cell.json").read_text())
    assert cell["status"] == "failed"
    assert "The metrics must be finite, got {'x': nan}" in cell["error"]
    assert not runner.is_done(folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lyme"], "NAME must be a recipe, got 'lyme'. The nearest are lime"),
        ([], "NAME must be a recipe, got none"),
        (["lime", "--seeds", "0"], "`--seeds` must be at least 1, got 0."),
        (["lime", "--model", "gpt2"], "`--model` is not for the recipe lime"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_text_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["lime", "--budget", "smoke", "--text", "no.jsonl", "--work", str(tmp_path)]) == 1
    assert "`--text` must name files that exist, or one Hub id, got no.jsonl" in capsys.readouterr().err


def test_a_hub_text_that_cannot_be_had_skips_the_recipe(tmp_path, capsys, monkeypatch):
    import datasets

    def away(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", away)
    assert main(["lime", "--budget", "smoke", "--work", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "lime is skipped: The texts of roneneldan/TinyStories cannot be had here (ConnectionError)" in said
