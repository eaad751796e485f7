"""Seconds from `make demo`, all installed and cached, to the first token of an answer.

    python -m tests.benchmarks lab_first_token

Starts `make demo` on a free port, asks through gradio_client as soon as the page answers, and stops it; five times.
The peer is the limit of 30 s that the project sets itself.
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import gradio
import httpx
import rows
from gradio_client import Client
from tqdm import tqdm


LIMIT, RUNS = 30.0, 5
ROOT = Path(__file__).resolve().parents[2]


def first_token() -> float:
    """One start, in seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    env.pop("OMP_NUM_THREADS", None)  # as a user starts it
    start = time.perf_counter()
    demo = subprocess.Popen(
        ["make", "demo"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while True:
            try:
                client = Client(f"http://127.0.0.1:{port}", verbose=False)
                break
            except (OSError, ValueError, httpx.HTTPError):
                if demo.poll() is not None or time.perf_counter() - start > 120:
                    raise SystemExit("`make demo` gave no page: run it by hand to see why.") from None
                time.sleep(0.1)
        for text in client.submit("What is the capital of France?", "smollm2", 8, 0, api_name="/chat"):
            if text:
                return time.perf_counter() - start
        raise SystemExit("The lab wrote no token.")
    finally:
        os.killpg(demo.pid, signal.SIGTERM)
        demo.wait()


def main() -> None:
    seconds = [first_token() for _ in tqdm(range(RUNS), desc="starts")]
    rows.write(
        "lab_first_token-limit",
        "python -m tests.benchmarks lab_first_token",
        "seconds from make demo to the first token, 2 cores",
        seconds,
        ("the limit", f"gradio {gradio.__version__}", [LIMIT] * RUNS),
        goal=1.0,
    )


if __name__ == "__main__":
    main()
