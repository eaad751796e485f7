"""A Space on a loopback Hub: it holds what it needs and no more, opens where hf_ext is absent, and is updated."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from hf_ext import hub


pytest.importorskip("gradio", reason="a Space has the version of the installed gradio: pip install hf_ext[demo]")
ROOT = Path(__file__).parents[2]
LAB = ROOT / "spaces" / "lab"

TRIP = """
import json
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from hf_ext import hub

def seen(repo):
    info, files = HfApi().space_info(repo), HfApi().list_repo_files(repo, repo_type="space")
    return dict(files=files, private=info.private, sha=info.sha, sdk=info.sdk)

report = dict(url=hub.push_space("tester/essa", only="essa", private=True), essa=seen("tester/essa"))
snapshot_download("tester/essa", repo_type="space", local_dir="{place}")
hub.push_space("tester/essa", only="essa")
report["again"] = seen("tester/essa")
hub.push_space("tester/essa")
report["all"] = seen("tester/essa")
hub.push_space("mine", "{mine}")  # a name alone is of the user's own
report["mine"] = seen("tester/mine")
report["requirements"] = open(hf_hub_download("tester/mine", "requirements.txt", repo_type="space")).read()
print()
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def trip(loopback_hub, run_python, tmp_path_factory):
    """What the Hub has after a push, the same push again, and one of all pages; the first as a folder."""
    place, mine = (tmp_path_factory.mktemp("spaces") / name for name in ("essa", "mine"))
    mine.mkdir()
    (mine / "README.md").write_text("---\ntitle: mine\n---\nHello\n")
    (mine / "app.py").write_text("import gradio\n")
    (mine / "requirements.txt").write_text("# plots\nplotly>=7\n")
    code = TRIP.format(place=place, mine=mine)
    report = json.loads(run_python(code, env=loopback_hub.env, block=()).splitlines()[-1])
    shutil.rmtree(place / ".cache", ignore_errors=True)  # huggingface_hub's own
    return report, place


def front_matter(folder):
    return yaml.safe_load(re.match("---\n(.*?)\n---", (folder / "README.md").read_text(), re.DOTALL)[1])


def travelling(folder):
    """Files below a folder that Git knows or would add: neither caches nor what is hidden."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."]
    found = subprocess.run(listed, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    return {file for file in found if (folder / file).is_file()}


def test_a_space_holds_the_lab_our_packages_and_the_file_that_shows_one_page(trip):
    report, place = trip
    assert report["url"].endswith("/spaces/tester/essa")
    assert (report["essa"]["sdk"], report["essa"]["private"]) == ("gradio", True)
    expected = travelling(LAB) | {"app_essa.py"}
    expected |= {f"{name}/{file}" for name in ("hf_ext", "trainers") for file in travelling(ROOT / name)}
    assert set(report["essa"]["files"]) - {".gitattributes"} == expected
    assert (place / "pages" / "essa.py").read_bytes() == (LAB / "pages" / "essa.py").read_bytes()


def test_its_front_matter_names_the_installed_gradio_and_the_file_that_is_there(trip):
    _, place = trip
    own, shown = front_matter(LAB), front_matter(place)
    changed = {"sdk_version": metadata.version("gradio"), "app_file": "app_essa.py", "title": "hf_ext lab: essa"}
    assert shown == {**own, **changed}
    assert (place / shown["app_file"]).is_file()
    assert own["pinned"] is False
    body = (LAB / "README.md").read_text().split("---\n", 2)[2].strip()
    assert body in (place / "README.md").read_text()


def test_the_same_push_changes_nothing_and_another_takes_away_what_is_no_longer_there(trip):
    report, _ = trip
    assert report["again"] == report["essa"]
    assert set(report["essa"]["files"]) - set(report["all"]["files"]) == {"app_essa.py"}


def test_the_space_opens_its_page_with_the_code_that_travelled_and_nothing_else_of_ours(trip, tmp_path):
    _, place = trip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # no index and an empty cache: SmolLM2 cannot be had, and the page opens all the same
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "PIP_NO_INDEX": "1"}
    env |= {"HF_EXT_CACHE": str(tmp_path), "PYTHONPATH": ""}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "app_essa.py"], cwd=place, env=env, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
                    config = json.load(answer)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
                time.sleep(0.2)
    finally:
        process.terminate()
        process.wait(30)
    tabs = [part["props"]["label"] for part in config["components"] if part["type"] == "tabitem"]
    assert tabs == ["ESSA"]


def test_the_code_that_a_space_runs_is_its_own(trip, run_python):
    _, place = trip
    code = f"sys.path.insert(0, {str(place)!r})\nimport hf_ext, trainers\nprint(hf_ext.__file__, trainers.__file__)"
    assert all(Path(file).is_relative_to(place) for file in run_python(code, block=()).split())


def test_its_requirements_are_those_of_the_extra_written_out(trip):
    _, place = trip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["demo"], *extras["trainers"]]
    if {Requirement(line).name for line in metadata.requires("hf_ext")} != {
        Requirement(line).name for line in [*project["dependencies"], *sum(extras.values(), [])]
    }:
        pytest.skip("hf_ext was installed from an older pyproject.toml: pip install -e . again")
    expected = {Requirement(line).name for line in lines} - {"gradio", "hf_ext"}
    assert {"peft", "torch", "trl"} <= expected
    found = [Requirement(line) for line in (place / "requirements.txt").read_text().splitlines()]
    assert {one.name for one in found} == expected
    assert not any(one.marker for one in found)


def test_requirements_follow_extras_of_extras_and_leave_out_other_systems(monkeypatch):
    lines = [
        "torch>=2.11",
        'triton>=3.7; sys_platform == "linux"',
        'pywin32; sys_platform == "win32"',
        'gradio<7,>=6.31; extra == "demo"',
        'hf_ext[trainers]; extra == "demo"',
        'peft<0.22,>=0.20; extra == "trainers"',
        'ruff; extra == "dev"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert set(hub._needs({"demo"})) == {"torch>=2.11", "triton>=3.7", "peft<0.22,>=0.20"}
    assert set(hub._needs(())) == {"torch>=2.11", "triton>=3.7"}


def test_a_space_of_ones_own_keeps_its_requirements_and_takes_no_code_of_ours(trip):
    report, _ = trip
    assert set(report["mine"]["files"]) - {".gitattributes"} == {"README.md", "app.py", "requirements.txt"}
    assert report["requirements"] == "# plots\nplotly>=7\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"repo_id": "you/a space"}, "`repo_id` must be like \"user/name\", got 'you/a space'"),
        ({"repo_id": "a/b/c"}, "`repo_id` must be like \"user/name\", got 'a/b/c'"),
        ({"repo_id": "you/x", "folder": "no/such/folder"}, "got 'no/such/folder' without README.md and app.py."),
        ({"repo_id": "you/x", "only": "essay"}, "one of essa, lens, lime, steering, got 'essay'."),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(arguments, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        hub.push_space(**arguments)
