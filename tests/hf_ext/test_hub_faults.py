"""Pushing to and loading from a Hub that fails: no half commit, no endless wait, no damaged model, helpful words.

Two processes meet all faults one after another; waits between the library's attempts are recorded, not slept.
"""

import json
from typing import NamedTuple

import pytest


COMMON = """
import hashlib, json, os, shutil, time, urllib.request
import torch

waits = []
time.sleep = waits.append  # the library waits up to 23 s between its attempts

def control(verb, **fault):
    body = json.dumps(fault).encode() if fault else None
    request = urllib.request.Request(os.environ["HF_ENDPOINT"] + "/faults", body, method=verb)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)

def forget():
    shutil.rmtree(os.path.join(os.environ["HF_HOME"], "hub"), ignore_errors=True)

def attempt(action, *faults):
    control("DELETE")
    waits.clear()
    for fault in faults:
        control("POST", **fault)
    started, result, error = time.perf_counter(), None, ""
    try:
        result = action()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    seconds = time.perf_counter() - started
    requests = control("GET")
    control("DELETE")
    return dict(result=result, error=error, seconds=seconds, waited=sum(waits), requests=requests)

def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()

WEIGHTS = "tester/faulty/resolve/.*/model.safetensors"
CUT = 11_000_000
report = {}
"""
WITH_US = (
    COMMON
    + """
from huggingface_hub import HfApi
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from hf_ext import LimeConfig, LimeForCausalLM, tiny

def model(seed, vocab_size=50):
    torch.manual_seed(seed)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LimeForCausalLM(
        LimeConfig(vocab_size=vocab_size, hidden_size=64, intermediate_size=32, tie_word_embeddings=True, **heads)
    )

def error(method, path, times=1):
    return dict(kind="error", method=method, path=path, times=times)

def state():
    sha = HfApi().model_info("tester/pushed").sha
    return [sha, fingerprint(LimeForCausalLM.from_pretrained("tester/pushed"))]

push = lambda seed: (model(seed).push_to_hub("tester/pushed"), None)[1]
push(1)
report["before"] = state()
report["old"], report["new"] = fingerprint(model(1)), fingerprint(model(2))
for name, fault in dict(
    upload=error("PUT", "^/lfs/", None), commit=error("POST", "tester/pushed/commit", None)
).items():
    report[f"push_{name}"] = attempt(lambda: push(2), fault)
    report[f"after_{name}"] = state()
report["push_once"] = attempt(
    lambda: push(3), error("POST", "tester/pushed/preupload"), error("POST", "tester/pushed.git/info"),
    error("PUT", "^/lfs/"), error("POST", "^/lfs/verify"),
)
report["pushed_once"] = state()[1] == fingerprint(model(3))
report["push_again"] = attempt(lambda: push(2))
report["pushed_again"] = state()

large = model(0, 44_000)  # more than the 10 MiB from which the library keeps what it has of a file
large.push_to_hub("tester/faulty")
core = Tokenizer(models.BPE({"<end>": 0, "a": 1}, []))
PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").push_to_hub("tester/faulty")
report["expected"] = fingerprint(large)
report["size"] = HfApi().get_paths_info("tester/faulty", ["model.safetensors"])[0].size

load = lambda: fingerprint(tiny.load("tester/faulty", dtype="float32")[0])
faults = dict(
    hang_weights=dict(kind="hang", path=WEIGHTS, times=None),
    error=dict(kind="error", path=WEIGHTS),
    cut=dict(kind="cut", path=WEIGHTS, after=CUT),
    cut_ever=dict(kind="cut", path=WEIGHTS, after=1000, times=None),
    short=dict(kind="short", path=WEIGHTS, after=1000),
    wrong=dict(kind="wrong", path=WEIGHTS, after=1_000_000),
    hang=dict(kind="hang", path="tester/faulty", times=None),
)
for name, fault in faults.items():
    forget()
    report[name] = attempt(load, fault)
    report[f"{name}_then"] = attempt(load)
report["hang_cached"] = attempt(load, faults["hang"])
print()
print(json.dumps(report))
"""
)
WITHOUT_US = (
    COMMON
    + """
import huggingface_hub.file_download
from transformers import AutoModelForCausalLM

huggingface_hub.file_download._ETAG_RETRY_TIMEOUT = 1  # the library's own 60 s, which no variable changes
load = lambda: fingerprint(AutoModelForCausalLM.from_pretrained("tester/faulty", trust_remote_code=True))
for name, fault in dict(
    hang=dict(kind="hang", method="HEAD", path="tester/faulty/resolve/.*/config.json", times=None),
    error=dict(kind="error", path=WEIGHTS),
    cut=dict(kind="cut", path=WEIGHTS, after=CUT),
    cut_ever=dict(kind="cut", path=WEIGHTS, after=1000, times=None),
    short=dict(kind="short", path=WEIGHTS, after=1000),
).items():
    forget()
    report[name] = attempt(load, fault)
    report[f"{name}_then"] = attempt(load)
print()
print(json.dumps(report))
"""
)


class Attempt(NamedTuple):
    result: str | None
    error: str
    seconds: float
    waited: float
    requests: list


@pytest.fixture(scope="module")
def reports(loopback_hub, run_python):
    """What a process with hf_ext (`ours`) and then one without it (`theirs`) met; the first publishes the model."""
    env = {**loopback_hub.env, "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    ours = run_python(WITH_US, env=env, block=())
    theirs = run_python(WITHOUT_US, env=env)
    found = {"ours": ours, "theirs": theirs}
    for who, printed in found.items():
        report = json.loads(printed.splitlines()[-1])
        found[who] = {name: Attempt(**it) if isinstance(it, dict) else it for name, it in report.items()}
    found["theirs"] |= {name: found["ours"][name] for name in ("expected", "size")}
    return found


@pytest.fixture
def ours(reports):
    return reports["ours"]


@pytest.fixture(params=["ours", "theirs"])
def both(request, reports):
    """`tiny.load`, and `from_pretrained(..., trust_remote_code=True)` where hf_ext is absent."""
    return reports[request.param]


def count(attempt, method, part):
    return sum(found == method and part in path for found, path, _ in attempt.requests)


def test_a_push_that_meets_one_500_at_each_step_of_the_upload_ends_well(ours):
    push = ours["push_once"]
    assert push.error == ""
    assert ours["pushed_once"]
    assert push.waited == 4  # one second before each of the four second attempts
    assert [count(push, "POST", "preupload"), count(push, "PUT", "/lfs/"), count(push, "POST", "/commit/")] == [
        2,
        2,
        1,
    ]


@pytest.mark.parametrize("step", ["upload", "commit"])
def test_a_push_that_fails_leaves_the_repository_as_it_was_and_names_what_failed(ours, step):
    error = ours[f"push_{step}"].error
    assert ("uploading 'model.safetensors'" if step == "upload" else "500 Internal Server Error") in error
    assert ours[f"after_{step}"] == ours["before"]
    assert ours["before"][1] == ours["old"]


def test_a_push_after_a_failed_one_succeeds_and_uploads_no_weights_twice(ours):
    assert ours["push_again"].error == ""
    assert ours["pushed_again"][1] == ours["new"]
    assert count(ours["push_again"], "PUT", "/lfs/") == 0  # the weights came with the push whose commit failed


def test_a_hub_that_does_not_answer_ends_a_load_within_the_timeouts(reports):
    # at most 7 attempts of 1 s by the two variables; 2 s more for a busy machine
    waits = {"hang": 0, "hang_weights": 5}
    for name, waited in waits.items():
        load = reports["ours"][name]
        assert load.seconds < 9
        assert load.waited == waited
        assert "ConnectionError: `name` must be a folder, or a Hub id while the Hub can be reached" in load.error
        assert "got tester/faulty" in load.error
    load = reports["theirs"]["hang"]
    assert load.seconds < 9
    assert load.waited == 23
    assert "OSError: We couldn't connect to" in load.error


def test_a_cached_model_loads_while_the_hub_does_not_answer(ours):
    assert ours["hang_cached"].error == ""
    assert ours["hang_cached"].result == ours["expected"]
    assert ours["hang_cached"].seconds < 5  # one attempt of 1 s, and the load


def test_a_download_that_is_cut_fetches_only_the_rest_and_gives_the_same_bits(both):
    assert both["cut"].error == ""
    assert both["cut"].result == both["expected"]
    gets = [asked for method, path, asked in both["cut"].requests if method == "GET" and "model.safetensors" in path]
    kept = 10 * 2**20  # the library writes pieces of 10 MiB, of which one had come before the cut
    assert gets == ["", f"bytes={kept}-"]
    assert kept < both["size"]


@pytest.mark.parametrize("fault", ["cut_ever", "error", "short"])
def test_weights_that_never_come_whole_are_an_error_and_the_next_load_works(both, fault):
    assert both[fault].result is None
    assert "tester/faulty" in both[fault].error or "model.safetensors" in both[fault].error
    assert both[f"{fault}_then"].error == ""
    assert both[f"{fault}_then"].result == both["expected"]


@pytest.mark.parametrize("fault", ["cut_ever", "error", "short", "hang", "hang_weights"])
def test_our_loader_says_in_one_line_that_it_is_the_connection(ours, fault):
    assert ours[fault].error.startswith("ConnectionError: `name` must be a folder, or a Hub id")
    assert "\n" not in ours[fault].error
    assert "try again" in ours[fault].error


def test_weights_with_one_wrong_bit_are_refused_and_fetched_again_by_the_next_load(ours):
    assert ours["wrong"].result is None
    assert "got tester/faulty with another sha256 of model.safetensors" in ours["wrong"].error
    assert count(ours["wrong_then"], "GET", "model.safetensors") == 1
    assert ours["wrong_then"].result == ours["expected"]
