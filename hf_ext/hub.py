"""Publishing: proof that a saved folder loads where hf_ext is absent, the model card that goes with it, and Spaces.

- `verify` trusts nothing that this process knows: it loads in another one, without our packages and without the Hub.
  What the files themselves tell is checked first: it costs no process, and the message names the file.
- The words of a card are written once, in `model_cards/<system>.md`; its figures come from the files that recipes
  write. `model_cards/` lies beside this package, in a checkout as in an installed wheel.
- A Space is like a saved model: our code travels with it, so it needs no index or repository that holds hf_ext.
- `save_many` puts several models into one repository, code once.
- Nothing here loads torch.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, RepoCard, SpaceCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from packaging.requirements import Requirement
from safetensors import SafetensorError, safe_open


_OURS = ("hf_ext", "trainers")
_CARD_FIELDS = ("title", "arxiv", "classes", "status", "summary")
_RESULT_FIELDS = ("recipe", "command", "date", "budget", "device", "rows")
_PIPELINE_TAGS = {"ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask"}
_NO_LIMITS = "A research model: outside of what is measured above, nothing is known about it."
_NO_FILES = shutil.ignore_patterns(".*", "__pycache__", "*.part", "*.pyc")
_SPACE_SYSTEM = {"os_name": "posix", "platform_system": "Linux", "sys_platform": "linux"}
_ONE_PAGE = '''"""This Space shows the page {page!r}; app.py has the others too."""

import sys

from app import main


sys.exit(main(["--only", {page!r}]))
'''

# runs in the clean process; the last line that it prints is the report
_PROBE = """
import json, sys
asked = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(asked["blocked"]))
import transformers
place = dict(subfolder=asked["subfolder"], trust_remote_code=True)
config = transformers.AutoConfig.from_pretrained(asked["folder"], **place)
report = {"auto": {"AutoConfig": type(config).__name__}, "model_type": config.model_type, "parameters": 0, "lost": {}}
for name in asked["auto"]:
    model, info = getattr(transformers, name).from_pretrained(asked["folder"], **place, output_loading_info=True)
    report["auto"][name] = type(model).__name__
    report["parameters"] = max(report["parameters"], sum(p.numel() for p in model.parameters()))
    report["lost"][name] = sorted(info["missing_keys"])
    del model
print()
print(json.dumps(report))
"""


def verify(
    folder: str | os.PathLike[str], *, auto: tuple[str, ...] = ("AutoModel",), subfolder: str = ""
) -> dict[str, Any]:
    """
    Prove that a saved folder loads where hf_ext is not installed.

    The folder is loaded by `AutoConfig` and by each class of `auto` with `trust_remote_code=True`, in a new Python
    process that can import neither hf_ext nor trainers, reaches no Hub and has an empty cache. Takes some seconds,
    and runs the code in the folder.

    Args:
        folder (`str` or `os.PathLike`): What `save_pretrained` wrote.
        auto (`tuple[str, ...]`, *optional*, defaults to `("AutoModel",)`):
            Names of transformers' Auto classes that shall load it; `()` loads the configuration alone.
        subfolder (`str`, *optional*, defaults to `""`): One of the models that `save_many` wrote into `folder`.

    Returns:
        `dict`: `auto` (Auto class -> name of the class that it gave), `model_type`, `parameters` (number of the
        largest model loaded, shared ones counted once), `files` (sorted names), `seconds` (of the clean process).

    Raises:
        ValueError: Where a file is missing, cut off or foreign, `auto_map` lacks an entry, or weights are missing.
        RuntimeError: Where loading fails in the clean process, with the last lines of its error.

    Example:

    ```python
    >>> from hf_ext import LimeConfig, LimeModel, hub

    >>> LimeModel(LimeConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    ...                      vocab_size=64)).save_pretrained("tiny-lime")
    >>> hub.verify("tiny-lime")["auto"]
    {'AutoConfig': 'LimeConfig', 'AutoModel': 'LimeModel'}

    ```"""
    if not isinstance(auto, tuple | list) or not all(isinstance(name, str) for name in auto):
        raise TypeError(f'`auto` must be a tuple of names of Auto classes, got {auto!r}. Pass ("AutoModel",).')
    root = Path(folder)
    _check_files(root, tuple(auto), subfolder)
    asked = {"folder": str(root.resolve()), "subfolder": subfolder, "auto": list(auto), "blocked": list(_OURS)}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hf_ext-verify-") as home:
        caches = ("HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE")
        kept = {name: value for name, value in os.environ.items() if name not in caches}
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE, json.dumps(asked)],
            env={**kept, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    if done.returncode:
        last = "\n".join(line for line in done.stderr.splitlines() if line.strip()).splitlines()[-6:]
        raise RuntimeError(
            f"{root} must load where hf_ext is absent, but the clean process ended with {done.returncode}:\n"
            + "\n".join(last)
        )
    report = json.loads(done.stdout.splitlines()[-1])
    for name, lost in report.pop("lost").items():
        if lost:
            raise ValueError(
                f"{root} must hold every weight of its {name}, {report['auto'][name]}, but {len(lost)} are missing "
                f"({', '.join(lost[:3])}). Save a model of that class, or leave {name} out of `auto`."
            )
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {**report, "files": files, "seconds": round(time.perf_counter() - started, 2)}


def _check_files(root: Path, auto: tuple[str, ...], subfolder: str) -> None:
    """Raise `ValueError` for what the files of the folder `root` themselves show to be wrong."""
    place = root / subfolder
    again = "Write the folder again with `save_pretrained`."
    if not root.is_dir():
        raise ValueError(f"`folder` must be a folder that `save_pretrained` wrote, got {str(root)!r}: no such folder.")
    config = _read_json(place / "config.json", again)
    auto_map = config.get("auto_map") or {}
    for name in ("AutoConfig", *auto):
        target = auto_map.get(name)
        if not isinstance(target, str):
            raise ValueError(
                f"`auto_map` in {place / 'config.json'} must name the code of {name}, got only "
                f"{sorted(auto_map)}. Save a model of a class that hf_ext exports."
            )
        code = root / f"{target.rpartition('.')[0]}.py"
        if "--" in target:
            raise ValueError(
                f"`auto_map` in {place / 'config.json'} must name code in the folder for {name}, got {target!r}. "
                "Load the model with `trust_remote_code=True` and save it again."
            )
        if not code.is_file():
            raise ValueError(f"{code} must be there, since `auto_map` names it for {name}. {again}")
    if not auto:
        return
    shards, index = [place / "model.safetensors"], place / "model.safetensors.index.json"
    if not shards[0].is_file() and index.is_file():
        shards = sorted({place / name for name in _read_json(index, again).get("weight_map", {}).values()})
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard} must be there: it holds the weights. {again}")
        try:
            with safe_open(shard, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{shard} must be a whole safetensors file, got {shard.stat().st_size} bytes that are not ({error}). "
                "Copy or download it again."
            ) from error


def _read_json(path: Path, cure: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} must be there, but is not. {cure}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} must be JSON, got {error}. {cure}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, got a {type(content).__name__}. {cure}")
    return content


def save_many(folder: str | os.PathLike[str], models: Mapping[str, Any]) -> None:
    """
    Save several models into one folder, to be pushed as one repository: weights and settings of each in a sub-folder,
    the code once in the root, where transformers looks for it.

    Sub-folders that the folder has already are kept, or replaced where `models` names them; the code becomes that of
    `models`. Each sub-folder is written whole under another name before it takes its place.

    Args:
        folder (`str` or `os.PathLike`): Made if it does not exist.
        models (`Mapping[str, PreTrainedModel]`): Sub-folder, `"layer12"` or `"layer12/k64"` -> a model of ours.

    Raises:
        TypeError, ValueError: where a name is no sub-folder, a value no model, or two models need different code of
            the same name; nothing has been written then.

    Example:

    ```python
    >>> from hf_ext import SAEConfig, SAEModel, hub

    >>> hub.save_many("saes", {f"layer{i}": SAEModel(SAEConfig(d_in=8, d_sae=32, k=4)) for i in (3, 9)})
    >>> hub.verify("saes", subfolder="layer9")["auto"]
    {'AutoConfig': 'SAEConfig', 'AutoModel': 'SAEModel'}
    >>> sae = AutoModel.from_pretrained("saes", subfolder="layer9", trust_remote_code=True)

    ```"""
    if not isinstance(models, Mapping) or not models:
        kind = "an empty one" if isinstance(models, Mapping) else type(models).__name__
        raise TypeError(f'`models` must be a dict of sub-folders and models, got {kind}. Pass {{"layer12": sae}}.')
    for name, model in models.items():
        parts = name.split("/") if isinstance(name, str) else [""]
        if any(not part.strip(". ") or re.search(r'[\\:*?"<>|]', part) for part in parts):
            raise ValueError(f'`models` must be named by sub-folders like "layer12" or "layer12/k64", got {name!r}.')
        if not hasattr(model, "save_pretrained"):
            raise TypeError(f"`models[{name!r}]` must be a model with save_pretrained, got {type(model).__name__}.")
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise ValueError(f"`folder` must be a folder or not exist yet, got the file {str(root)!r}.")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".save_many-", dir=root) as parts_of:
        fresh, code = Path(parts_of), dict[str, Path]()
        for name, model in models.items():
            model.save_pretrained(fresh / "models" / name)
            for file in sorted((fresh / "models" / name).glob("*.py")):
                if file.name in code and code[file.name].read_bytes() != file.read_bytes():
                    raise ValueError(
                        f"`models` must share their code, got another {file.name} with {name!r}. Save models that "
                        "were loaded by one version of it."
                    )
                code.setdefault(file.name, file)
        for name, file in code.items():
            os.replace(file, root / name)
        for name in models:
            for file in (fresh / "models" / name).glob("*.py"):
                file.unlink()
            target = root / name
            if target.exists():
                (fresh / "old" / name).parent.mkdir(parents=True, exist_ok=True)
                target.rename(fresh / "old" / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            (fresh / "models" / name).rename(target)


def system_cards() -> dict[str, dict[str, Any]]:
    """
    The front matter of the card of every system, by its key (`"lime"`, ...), sorted by key.

    Returns:
        `dict[str, dict]`: Fields `title`, `arxiv` (id), `classes` (names), `status` (`"built"` or `"planned"`),
        `summary`; and, where there are any, `recipe`, `page`.
    """
    return {key: read.data.to_dict() for key, read in _cards().items()}


def _cards() -> dict[str, RepoCard]:
    paths = sorted(path for path in _cards_folder().glob("*.md") if path.name != "template.md")
    cards = {path.stem: RepoCard(path.read_text(encoding="utf-8")) for path in paths}
    for key, read in cards.items():
        lacking = [field for field in _CARD_FIELDS if read.data.get(field) is None]
        if lacking:
            raise ValueError(f"The front matter of model_cards/{key}.md must hold {', '.join(lacking)}, got none.")
        if not isinstance(read.data["arxiv"], str):
            raise ValueError(
                f"`arxiv` in model_cards/{key}.md must be a text, got {read.data['arxiv']!r}. Put it in quotes, or "
                "YAML drops a zero at its end."
            )
    return cards


def _cards_folder() -> Path:
    folder = Path(__file__).resolve().parent.parent / "model_cards"
    if not (folder / "template.md").is_file():
        raise FileNotFoundError(f"{folder} must hold template.md and the cards, but does not. Install hf_ext again.")
    return folder


def card(obj: Any, system: str, results: Mapping[str, Any] | str | os.PathLike[str] | None = None) -> ModelCard:
    """
    The model card of a model of ours, ready for `.save("folder/README.md")` or `.push_to_hub("you/name")`.

    Args:
        obj (`PreTrainedModel` or `PreTrainedConfig`): The model, or its configuration.
        system (`str`): Key of the system, as in `system_cards()`: its card gives the words.
        results (`dict`, `str` or `os.PathLike`, *optional*):
            What a recipe measured, or the path of its JSON. Its rows become a table and entries of the `model-index`.
            Without it the card says 'Not measured'.

    Returns:
        `huggingface_hub.ModelCard`: Its `data` (license apache-2.0, tags, base model, ...) may be changed before it
        is saved: a base model under another license asks for that.

    Raises:
        TypeError: Where `obj` is no model and no configuration.
        ValueError: Where the system is unknown, or `results` is no results file.
    """
    config = getattr(obj, "config", obj)
    if not hasattr(config, "model_type"):
        raise TypeError(f"`obj` must be a model or its configuration, got {type(obj).__name__}.")
    cards = _cards()
    if system not in cards:
        raise ValueError(f"`system` must be one of {', '.join(cards)}, got {system!r}.")
    words = cards[system].data
    measured = _read_results(results) if results is not None else {}
    class_name = _class_name(obj, config)
    pipeline_tag = next((tag for suffix, tag in _PIPELINE_TAGS.items() if class_name.endswith(suffix)), None)
    base_model = next(filter(is_hub_id, (getattr(config, "base_model_name_or_path", None), config.name_or_path)), None)
    data = ModelCardData(
        library_name="transformers",
        license="apache-2.0",
        tags=["hf_ext", system, f"arxiv:{words['arxiv']}"],
        pipeline_tag=pipeline_tag,
        base_model=base_model,
        model_name=system if measured else None,
        eval_results=_eval_results(measured, pipeline_tag or "other"),
    )
    limits = re.search(r"^## Limits[ \t]*\n(.*?)(?=^## |\Z)", cards[system].text, re.MULTILINE | re.DOTALL)
    return ModelCard.from_template(
        data,
        template_path=str(_cards_folder() / "template.md"),
        system=system,
        title=words["title"],
        summary=words["summary"],
        arxiv=words["arxiv"],
        class_name=class_name,
        auto_class=_auto_class(config, class_name),
        measured=measured,
        rows=[{**row, "mean": _short(row["mean"]), "ci95": _short(row["ci95"])} for row in measured.get("rows", [])],
        claims=[
            {**claim, **{name: _short(claim.get(name)) for name in ("estimate", "ci95", "threshold")}}
            for claim in measured.get("claims", [])
        ],
        limits=limits[1].strip() if limits else _NO_LIMITS,
    )


def _read_results(results: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    cure = "Pass the JSON that a recipe wrote."
    content = results if isinstance(results, Mapping) else _read_json(Path(results), cure)
    lacking = [name for name in _RESULT_FIELDS if name not in content]
    if lacking:
        raise ValueError(f"`results` must hold {', '.join(_RESULT_FIELDS)}, got none of {', '.join(lacking)}. {cure}")
    for row in content["rows"]:
        lacking = [name for name in ("arm", "metric", "unit", "n", "mean", "ci95") if name not in row]
        if lacking:
            raise ValueError(f"Each row of `results` must hold {', '.join(lacking)}, got {row!r}. {cure}")
    return content


def _eval_results(measured: Mapping[str, Any], task: str) -> list[EvalResult] | None:
    """Entries of the model index; a row without a number (a failed cell) is none."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=measured["recipe"],
            dataset_name=measured["recipe"],
            metric_type=row["metric"],
            metric_name=f"{row['metric']} ({row['unit']}), {row['arm']}",
            metric_value=row["mean"],
            metric_args={name: row[name] for name in ("arm", "unit", "n", "ci95")},
        )
        for row in measured.get("rows", [])
        if isinstance(row["mean"], int | float) and math.isfinite(row["mean"])
    ] or None


def _class_name(obj: Any, config: Any) -> str:
    """The model's class; of a configuration, the class that saved it, or else what `AutoModel` would give."""
    if obj is not config:
        return type(obj).__name__
    architectures = getattr(config, "architectures", None) or []
    auto_map = getattr(config, "auto_map", None) or {}
    return architectures[0] if architectures else auto_map.get("AutoModel", type(config).__name__).rpartition(".")[2]


def _auto_class(config: Any, class_name: str) -> str:
    auto_map = getattr(config, "auto_map", None) or {}
    return next((auto for auto, name in auto_map.items() if name.rpartition(".")[2] == class_name), "AutoModel")


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is like "user/name" and no folder: a card must not tell a path of somebody's machine."""
    if not name or name.count("/") != 1 or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def push_space(
    repo_id: str,
    folder: str | os.PathLike[str] | None = None,
    only: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """
    Upload the lab, or another folder with a Gradio app, as a Space; pushed again, the Space becomes what is there now.

    The Space gets the folder's files; hf_ext and trainers as they are here, where requirements.txt names hf_ext, with
    what the named extras need in place of that line; and the version of the installed gradio in its front matter.
    Files of the Space that are not among these are deleted.

    Args:
        repo_id (`str`): As "user/name"; made if it does not exist.
        folder (`str` or `os.PathLike`, *optional*, defaults to the `spaces/lab` of this checkout):
            Holds README.md with the front matter of a Space, and app.py.
        only (`str`, *optional*): The page to show, one of the folder's `pages`; by default all.
        private (`bool`, *optional*): Whether a new Space is private; by default as the account makes them.
        token (`str` or `bool`, *optional*): By default that of `hf auth login`.

    Returns:
        `str`: The address of the Space.

    Raises:
        ValueError: for an id that cannot be one, a folder that is no Space, or a page that it lacks.
        ImportError: without gradio, whose version the Space is to have.

    Example:

    ```python
    from hf_ext import hub

    hub.push_space("you/essa", only="essa")
    ```
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'`repo_id` must be like "user/name", got {repo_id!r} ({error})') from error
    here = Path(__file__).resolve().parent.parent
    root = here / "spaces" / "lab" if folder is None else Path(folder)
    lacking = [name for name in ("README.md", "app.py") if not (root / name).is_file()]
    if lacking:
        raise ValueError(
            f"`folder` must be that of a Gradio Space, got {str(root)!r} without {' and '.join(lacking)}. Give the "
            "path of spaces/lab in a checkout of hf_ext, or a Space of your own."
        )
    pages = sorted(path.stem for path in (root / "pages").glob("*.py"))
    if only is not None and only not in pages:
        raise ValueError(f"`only` must be a page of {root}, one of {', '.join(pages) or '(none)'}, got {only!r}.")
    try:
        sdk_version = metadata.version("gradio")
    except metadata.PackageNotFoundError as error:
        raise ImportError('A Space needs gradio: pip install "hf_ext[demo]"') from error
    with tempfile.TemporaryDirectory(prefix="hf_ext-space-") as place:
        space = Path(place)
        shutil.copytree(root, space, ignore=_NO_FILES, dirs_exist_ok=True)
        card = SpaceCard((root / "README.md").read_text(encoding="utf-8"))
        data: Any = card.data
        data.sdk, data.sdk_version, data.app_file = "gradio", sdk_version, "app.py"
        if only:
            data.app_file, data.title = f"app_{only}.py", f"{data.title}: {only}"
            (space / f"app_{only}.py").write_text(_ONE_PAGE.format(page=only), encoding="utf-8")
        card.save(space / "README.md")
        _bring_ours(space, here)
        api = HfApi(token=token)
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, repo_type="space", folder_path=space, delete_patterns="*")
    return str(url)


def _bring_ours(space: Path, here: Path) -> None:
    """Our packages into a Space whose requirements name hf_ext, and what they need instead of its line."""
    file = space / "requirements.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    ours = [line for line in lines if re.match(r"hf[_-]ext\b", line)]
    if not ours:
        return
    needed = {line for name in ours for line in _needs(Requirement(name).extras)}
    others = [line for line in lines if line not in ours]
    file.write_text("\n".join([*others, *sorted(needed, key=str.lower)]) + "\n", encoding="utf-8")
    for package in _OURS:
        shutil.copytree(here / package, space / package, ignore=_NO_FILES)


def _needs(extras: Collection[str]) -> Iterator[str]:
    """What hf_ext needs with some extras, on the Linux of a Space, which brings gradio itself."""
    for line in metadata.requires("hf_ext") or []:
        needed = Requirement(line)
        if needed.marker and not any(needed.marker.evaluate({**_SPACE_SYSTEM, "extra": e}) for e in extras or [""]):
            continue
        needed.marker = None
        if needed.name == "hf_ext":
            yield from _needs(needed.extras)
        elif needed.name != "gradio":
            yield str(needed)


def _short(value: Any) -> str:
    """Four digits of a number or of each end of an interval; a dash where there is none."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_short(end) for end in value)}]"
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
