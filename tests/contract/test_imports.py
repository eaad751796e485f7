"""Who may import whom: packages by import-linter, files by their syntax tree; each rule catches a planted breach.

- A shippable file (`configuration_*`, `modeling_*`, and the siblings that they import) is copied to the Hub, where
  transformers finds siblings by lines of text and no hf_ext is there.
- `spaces/` and `kernels/` are folders without `__init__.py`, so import-linter cannot see them.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from importlinter.api import read_configuration


ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("configuration_*.py", "modeling_*.py")
SINGLE = ("scheduling_*.py", "pipeline_*.py", "gstar/modeling_*.py", "vldac/modeling_*.py")  # loaded alone elsewhere
# families whose classes extend those of a library that is no dependency of hf_ext
BUILT_ON = {"gstar": {"diffusers"}, "steering": {"peft"}}
# transformers' own search for siblings, which reads docstrings too
SIBLING_LINE = re.compile(r"^\s*from\s+\.(\S+)\s+import|^\s*import\s+\.(\S+)\s*$", re.MULTILINE)


class Import(NamedTuple):
    """`from <level dots><module> import <names>`, or `import <module>` with no names; local: inside a function."""

    line: int
    level: int
    module: str
    names: tuple[str, ...]
    local: bool

    @property
    def root(self):
        return self.module.partition(".")[0]


def imports(path):
    """Every import in the file, but not those under `if TYPE_CHECKING`, which never run."""
    found = []

    def visit(node, local):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(Import(node.lineno, 0, alias.name, (), local) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            found.append(Import(node.lineno, node.level, node.module or "", names, local))
        for child in ast.iter_child_nodes(node):
            visit(child, local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def files(root, folder, patterns=("*.py",)):
    found = {path for pattern in patterns for path in (root / folder).rglob(pattern)}
    return sorted(path for path in found if "__pycache__" not in path.parts)


def breach(root, path, line, what):
    return f"{path.relative_to(root).as_posix()}:{line}: {what}"


def shippable(root):
    """The shipped files, and the siblings that travel with them."""
    found, waiting = set(), files(root, "hf_ext", SHIPPED)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            siblings = [path.with_name(f"{i.module}.py") for i in imports(path) if i.level == 1]
            waiting += [sibling for sibling in siblings if sibling.is_file()]
    return sorted(found)


def foreign_imports(root):
    """Shippable files import torch, transformers, huggingface_hub.dataclasses and the standard library only."""
    for path in shippable(root):
        for i in imports(path):
            known = i.root in {"torch", "transformers", *sys.stdlib_module_names}
            if not i.level and not known and i.module != "huggingface_hub.dataclasses":
                yield breach(root, path, i.line, f"imports {i.module}, which is not there where the file is loaded")


def odd_siblings(root):
    """Siblings are imported as `from .sibling import Name`, the only form that transformers follows."""
    for path in shippable(root):
        for i in imports(path):
            if i.level and (i.level > 1 or not i.module.isidentifier() or "*" in i.names):
                yield breach(root, path, i.line, "must be written as `from .sibling import Name`")
            elif i.level and not path.with_name(f"{i.module}.py").is_file():
                yield breach(root, path, i.line, f"there is no sibling {i.module}.py")


def sibling_lines_in_text(root):
    """No docstring line looks like a sibling's import, since transformers would look for that file."""
    for path in shippable(root):
        text = path.read_text(encoding="utf-8")
        lines = {i.line for i in imports(path) if i.level}
        for match in SIBLING_LINE.finditer(text):
            line = text.count("\n", 0, match.end()) + 1
            if line not in lines:
                yield breach(root, path, line, "reads like an import to transformers; write it otherwise")


def siblings_of_single_files(root):
    """Files that are loaded alone import no sibling."""
    for path in files(root, "hf_ext", SINGLE):
        for i in imports(path):
            if i.level or i.root == "hf_ext":
                yield breach(root, path, i.line, "is loaded alone, so it must not import other files of ours")


def checks_of_own_classes(root):
    """No isinstance or issubclass against our own classes: a copy loaded from the Hub has others."""
    for path in shippable(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        own |= {name for i in imports(path) if i.level for name in i.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                against = {n.id for argument in node.args[1:] for n in ast.walk(argument) if isinstance(n, ast.Name)}
                for name in sorted(against & own):
                    yield breach(root, path, node.lineno, f"checks for {name}, which a remote copy does not share")


def upward_imports(root):
    """kernels import nothing of ours, and a Space imports no other Space; nothing imports tests."""
    ours = {"hf_ext", "trainers", "spaces", "tests"}
    for folder, forbidden in (("kernels/*/torch-ext", ours), ("spaces", {"spaces", "tests"})):
        for path in (path for place in root.glob(folder) for path in files(root, place)):
            for i in imports(path):
                is_library = folder == "spaces" and (i.module, i.names) == ("spaces", ("GPU",))  # Hugging Face's
                if not i.level and i.root in forbidden and not is_library:
                    yield breach(root, path, i.line, f"must not import {i.module}")


def optional_imports_at_the_top(root):
    """Optional libraries are imported inside the function that needs them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in project["dependencies"]}
    for path in files(root, "hf_ext"):
        there = {"hf_ext", *core, *sys.stdlib_module_names, *BUILT_ON.get(path.parent.name, ())}
        for i in imports(path):
            if not i.local and not i.level and i.root not in there:
                yield breach(root, path, i.line, f"imports {i.root} at the top; import it where it is used")


RULES = [
    foreign_imports,
    odd_siblings,
    sibling_lines_in_text,
    siblings_of_single_files,
    checks_of_own_classes,
    upward_imports,
    optional_imports_at_the_top,
]
MODELING = "hf_ext/new/modeling_new.py"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_files_keep_the_rule(rule):
    assert not list(rule(ROOT)), rule.__doc__


def test_the_rules_see_the_files_that_ship():
    assert {"configuration_lime.py", "modeling_lime.py"} <= {path.name for path in shippable(ROOT)}


@pytest.mark.parametrize(
    ("rule", "name", "source", "said"),
    [
        (foreign_imports, MODELING, "import numpy as np", "imports numpy"),
        (
            foreign_imports,
            MODELING,
            "def f():\n    from hf_ext.sites import Hook",
            "new.py:2: imports hf_ext.sites",
        ),
        (foreign_imports, MODELING, "from huggingface_hub import HfApi", "imports huggingface_hub"),
        (
            foreign_imports,
            "hf_ext/new/configuration_new.py",
            "try:\n    import triton\nexcept ImportError: ...",
            "triton",
        ),
        (foreign_imports, MODELING, "from .helper import mix", "hf_ext/new/helper.py:1: imports scipy"),
        (odd_siblings, MODELING, "from . import helper", "from .sibling import Name"),
        (odd_siblings, MODELING, "from .helper import *", "from .sibling import Name"),
        (odd_siblings, MODELING, "from ..sites import Hook", "from .sibling import Name"),
        (odd_siblings, MODELING, "from .absent import Hook", "no sibling absent.py"),
        (
            sibling_lines_in_text,
            MODELING,
            '"""How:\n    from .helper import mix\n"""',
            "new.py:2: reads like",
        ),
        (siblings_of_single_files, "hf_ext/gstar/scheduling_star.py", "from .helper import mix", "is loaded alone"),
        (siblings_of_single_files, "hf_ext/gstar/modeling_new.py", "from .helper import mix", "is loaded alone"),
        (siblings_of_single_files, "hf_ext/gstar/pipeline_star.py", "import hf_ext.sites", "is loaded alone"),
        (checks_of_own_classes, MODELING, "class A: ...\nisinstance(1, A)", "modeling_new.py:2: checks for A"),
        (checks_of_own_classes, MODELING, "from .helper import B\nissubclass(int, (str, B))", "checks for B"),
        (upward_imports, "kernels/k/torch-ext/k/__init__.py", "import hf_ext", "must not import hf_ext"),
        (
            upward_imports,
            "spaces/lab/app.py",
            "from spaces.other.app import build_demo",
            "must not import spaces.other",
        ),
        (upward_imports, "spaces/lab/app.py", "import spaces", "must not import spaces"),
        (optional_imports_at_the_top, "hf_ext/new/convert.py", "import plotly", "imports plotly at the top"),
    ],
)
def test_the_rule_finds_a_planted_breach(rule, name, source, said, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source)
    path.with_name("helper.py").write_text("import scipy")
    assert said in "\n".join(rule(tmp_path))


def test_the_rules_allow_what_is_meant(tmp_path):
    folder = tmp_path / "hf_ext" / "new"
    folder.mkdir(parents=True)
    (folder / "modeling_new.py").write_text(
        "import math\nimport torch.nn\nfrom huggingface_hub.dataclasses import strict\n"
        "from transformers import Trainer\nfrom .helper import b\nisinstance(b, (int, str))\n"
    )
    (folder / "helper.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\n")
    (folder / "convert.py").write_text("import torch\ndef f():\n    import plotly\n")
    (tmp_path / "spaces").mkdir()
    (tmp_path / "spaces" / "app.py").write_text("import hf_ext\nfrom spaces import GPU\n")
    assert [list(rule(tmp_path)) for rule in RULES] == [[]] * len(RULES)


def lint(folder):
    """Exit code and output of import-linter over the packages that lie in `folder`."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_the_packages_keep_the_contracts():
    code, said = lint(ROOT)
    assert code == 0, said
    assert "4 kept, 0 broken" in said


def test_import_linter_looks_at_every_package_of_ours():
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    packages += [path.parent.name for path in ROOT.glob("kernels/*/torch-ext/*/__init__.py")]
    listed = read_configuration(str(ROOT / ".importlinter"))["session_options"]["root_packages"]
    assert sorted(listed) == sorted(packages), "root_packages in .importlinter must list every package"


@pytest.mark.parametrize(
    ("contract", "planted"),
    [
        ("kernels <- hf_ext <- trainers <- spaces", {"hf_ext/record.py": "def f():\n    import trainers.essa"}),
        ("kernels <- hf_ext <- trainers <- spaces", {"trainers/essa/a.py": "import hf_ext, tests"}),
        ("Families import", {"hf_ext/sae/a.py": "from hf_ext.lime import LimeConfig"}),
        ("Families import", {"hf_ext/lime/a.py": "def f():\n    from hf_ext.analysis.lens import logit_lens"}),
        ("Families import", {"hf_ext/lime/a.py": "from hf_ext.hub import card"}),
        ("Families import", {"hf_ext/sites.py": "from hf_ext.lime import optim"}),
        ("One trainer", {"trainers/essa/a.py": "from trainers.sae import b", "trainers/sae/b.py": ""}),
        (
            "No circle",
            {"hf_ext/sites.py": "import hf_ext.record", "hf_ext/record.py": "import hf_ext.sites"},
        ),
    ],
)
def test_a_contract_breaks_on_a_planted_import(contract, planted, tmp_path):
    names = ["hf_ext/lime/optim.py", "hf_ext/sae/b.py", "hf_ext/analysis/lens.py", "hf_ext/hub.py", "hf_ext/record.py"]
    for name in [*names, "hf_ext/sites.py", *planted]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(planted.get(name, ""))
        (tmp_path / name).with_name("__init__.py").touch()
        (tmp_path / name.partition("/")[0] / "__init__.py").touch()
    roots = sorted(path.name for path in tmp_path.iterdir())
    indented = "\n    ".join(roots)
    settings = (ROOT / ".importlinter").read_text(encoding="utf-8")
    settings = re.sub(r"root_packages =\n(    \w+\n)+", f"root_packages =\n    {indented}\n", settings)
    (tmp_path / ".importlinter").write_text(settings)
    code, said = lint(tmp_path)
    assert code == 1, said
    assert "3 kept, 1 broken" in said
    assert re.search(rf"^{re.escape(contract)}.* BROKEN", said, re.MULTILINE), said
