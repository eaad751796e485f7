"""Shared by all tests: offline, one thread, no cache of the user's; a loopback Hub and clean Python processes."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


# read once, when the libraries are imported: so before anything below or in a test imports them, and for each worker
_HOME = tempfile.mkdtemp(prefix="hf_ext-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HOME": _HOME,
    "OMP_NUM_THREADS": "1",
}
# Triton decides between its interpreter and a GPU when a kernel's module is first imported, by whichever test
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small models are many times slower with two threads on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`run_python(code, env=None, block=("hf_ext", "trainers"))` -> what `code` prints in a clean Python process.

    The modules of `block` cannot be imported there. `env` adds variables, `None` as a value removes one; HF_HOME is an
    empty folder unless `env` gives it. A process that fails raises AssertionError with all that it wrote.
    """

    def run(code: str, *, env: dict[str, str | None] | None = None, block: tuple[str, ...] = ("hf_ext", "trainers")):
        folder = tmp_path_factory.mktemp("process")
        script = folder / "script.py"
        # -I alone does not hide an editable install
        script.write_text(f"import sys; sys.modules.update(dict.fromkeys({list(block)}))\n{code}", encoding="utf-8")
        variables = {**os.environ, "HF_HOME": str(folder / "home"), **(env or {})}
        done = subprocess.run(
            [sys.executable, "-I", str(script)],
            env={name: value for name, value in variables.items() if value is not None},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


class LoopbackHub(NamedTuple):
    """A running `tests/loopback_hub.py`: its address, and the environment of clients in other processes."""

    url: str
    env: dict[str, str | None]


@pytest.fixture(scope="session")
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub in memory for the entire session: let each test use repository names of its own."""
    command = [sys.executable, str(Path(__file__).with_name("loopback_hub.py")), "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        env = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": None}
        yield LoopbackHub(url, env)
        process.stdin.close()
