"""The documents agree with what they speak of: cards, files, commands and results; and they name no machine of ours.

- `model_cards/*.md` is the only list of systems. README's table is made from it by model_cards/render.py.
- Files are what git would hold: tracked ones, and new ones that it does not ignore.
"""

import json
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from hf_ext import hub
from model_cards import render


ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile"]
# a path of somebody's machine; planted ones in tests are somebody's
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:(?:work|root|opt)/|home/(?!somebody/)\w)")
SCRATCH_PATH = re.compile(r"(?<![\w.~/-])/tmp/")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|\bhttps?://\S+/simple\b", re.IGNORECASE)
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")
SCHEME = re.compile(r"[a-z]+:|#")
CODE = re.compile(r"^(```+).*?^\1`*\s*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
FENCES = re.compile(r"^```\w*\n(.*?)^```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)

RECIPE_FIELDS = {
    "schema",
    "recipe",
    "command",
    "commit",
    "date",
    "budget",
    "device",
    "versions",
    "cells",
    "rows",
    "claims",
}
CELL_FIELDS = {"arm", "seed", "params_trained", "metrics", "cost", "status"}
COST_FIELDS = {"tokens", "completions", "wall_s", "cpu_s", "peak_rss"}
ROW_FIELDS = {"arm", "metric", "unit", "n", "mean", "ci95"}
CLAIM_FIELDS = {"id", "paper", "statement", "statistic", "estimate", "ci95", "threshold", "verdict", "note"}
BENCHMARK_FIELDS = {"name", "command", "commit", "date", "device", "ours", "peer", "ratio", "goal"}

CARDS = hub.system_cards()
RECIPES = sorted(ROOT.glob("model_cards/results/*.json"))
BENCHMARKS = sorted(ROOT.glob("tests/benchmarks/results/*.json"))


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def git_files():
    """The texts that git holds or would hold, by their path from the root."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout: the rule is about what is committed")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in sorted(set(names) - {""}):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in content[:8192]:
            yield name, content.decode("utf-8", errors="replace")


def named_machines(name, text):
    """Lines of a file that name a path of a machine or the host of a registry."""
    patterns = [MACHINE_PATH, REGISTRY]
    if Path(name).suffix in {".md", ".json", ".toml"}:
        patterns.append(SCRATCH_PATH)
    return [
        f"{name}:{number}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), start=1)
        if any(pattern.search(line) for pattern in patterns)
    ]


def broken_links(path, root):
    """Relative links of a Markdown file that lead nowhere; code is no link."""
    targets = [a or b for a, b in LINK.findall(CODE.sub("", path.read_text(encoding="utf-8")))]
    places = {target: (path.parent / target.partition("#")[0]) for target in targets if not SCHEME.match(target)}
    return [
        f"{path.relative_to(root).as_posix()}: {target}"
        for target, place in places.items()
        if not place.exists() or not place.resolve().is_relative_to(root)
    ]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_document_is_there_and_not_empty(name):
    assert text_of(name).strip()


def test_the_readme_lists_every_system_and_every_claim():
    readme = text_of("README.md")
    for key, card in CARDS.items():
        assert f"| [{card['title']}](model_cards/{key}.md) | [{card['arxiv']}]" in readme
    for path in [*RECIPES, *BENCHMARKS]:
        result = json.loads(path.read_text(encoding="utf-8"))
        for id in [claim["id"] for claim in result.get("claims", [])] or [result["name"]]:
            assert f"| {id} |" in readme


@pytest.mark.parametrize("key", CARDS)
def test_a_card_has_a_body_only_where_its_system_is_built(key):
    body = text_of(f"model_cards/{key}.md").split("\n---\n", 1)[1].strip()
    assert CARDS[key]["status"] in ("built", "planned")
    assert bool(body) == (CARDS[key]["status"] == "built")
    assert re.fullmatch(r"\d{4}\.\d{5}", CARDS[key]["arxiv"])


@pytest.mark.parametrize("key", [key for key, card in CARDS.items() if card["status"] == "built"])
def test_what_the_card_of_a_built_system_names_is_there(key):
    card = CARDS[key]
    packages = [import_module(path.parent.name) for path in ROOT.glob("*/__init__.py")]
    assert set(card["classes"]) <= {name for package in packages for name in package.__all__}
    if "page" in card:
        assert (ROOT / "spaces" / "lab" / "pages" / f"{card['page']}.py").is_file()
    headings = re.findall(r"^## (.+)$", text_of(f"model_cards/{key}.md"), re.MULTILINE)
    wanted = ["What it does", "Use it", "The paper's settings", "Measured here", "Limits", "Source and citation"]
    assert [heading for heading in headings if heading in wanted] == wanted


def test_no_file_names_a_machine_or_a_registry():
    found = [line for name, text in git_files() for line in named_machines(name, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "line", "is_found"),
    [
        ("a.py", "open('/ro" + "ot/x')", True),
        ("a.py", "cd /wo" + "rk/main", True),
        ("a.md", "see /ho" + "me/jane/x", True),
        ("a.md", "in /t" + "mp/x", True),
        ("a.py", "in /t" + "mp/x", False),
        ("a.txt", "--index-url https://mirror.example/si" + "mple", True),
        ("a.cfg", "https://download.py" + "torch.org/whl/cpu", True),
        ("a.md", "docs/work/root.md, https://x.example/root/a and ~/opt/x", False),
    ],
)
def test_the_search_for_machines_finds_planted_ones(name, line, is_found):
    assert bool(named_machines(name, f"first\n{line}\n")) == is_found


def test_relative_links_lead_to_files():
    pages = [ROOT / name for name, _ in git_files() if name.endswith(".md")]
    assert not [link for page in pages for link in broken_links(page, ROOT)]


def test_the_search_for_links_finds_a_planted_one(tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "[a](page.md) [b](page.md#part) [c](https://x.example) [d](#part) `[e](code.md)`\n"
        '```md\n[f](code.md)\n```\n![g](none.png) [h](../../outside.md) <img src="lost.png">\n'
    )
    (tmp_path.parent / "outside.md").touch()
    assert broken_links(page, tmp_path) == [f"docs/page.md: {n}" for n in ("none.png", "../../outside.md", "lost.png")]


def test_contributing_takes_less_than_60_lines():
    assert len(text_of("CONTRIBUTING.md").splitlines()) < 60


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", ".ci/run"])
def test_every_make_target_that_is_named_exists(name):
    targets = set(re.findall(r"^([a-z][\w-]*):", text_of("Makefile"), re.MULTILINE))
    text = text_of(name)
    code = text if name == ".ci/run" else "\n".join("".join(found) for found in FENCES.findall(text))
    code = re.sub(r"#.*", "", code)
    named = set(re.findall(r"(?:^|[;&|\s])make ([a-z][\w-]*)", code, re.MULTILINE))
    assert named <= targets
    assert named >= {"demo", "test"} or name != "README.md", "README shows the two commands"


def lacking(fields, entry):
    return sorted(fields - entry.keys())


def test_the_results_of_every_recipe_have_every_field():
    for path in RECIPES:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert not lacking(RECIPE_FIELDS, result), path.name
        assert result["recipe"] == path.stem
        assert result["budget"] in ("smoke", "small", "full")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
        for cell in result["cells"]:
            assert not lacking(CELL_FIELDS, cell), path.name
            assert not lacking(COST_FIELDS, cell["cost"]), path.name
            assert cell["status"] in ("done", "failed")
        for row in result["rows"]:
            assert not lacking(ROW_FIELDS, row), path.name
        for claim in result["claims"]:
            assert not lacking(CLAIM_FIELDS, claim), path.name
            assert claim["verdict"] in ("holds", "fails", "inconclusive")


def test_the_results_of_every_benchmark_have_every_field():
    assert BENCHMARKS
    for path in BENCHMARKS:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert not lacking(BENCHMARK_FIELDS, result), path.name
        assert result["name"] == path.stem
        assert not lacking({"median", "iqr"}, result["ours"]), path.name
        assert not lacking({"name", "version", "median", "iqr"}, result["peer"]), path.name
        assert result["ratio"] > 0


def test_what_is_made_from_data_is_up_to_date():
    stale = [path.name for path, text in render.documents().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run: python model_cards/render.py"
