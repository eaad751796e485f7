"""Shared by the tests of the lab: its modules, a tiny model, a running server, a browser."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


LAB = Path(__file__).parents[2] / "spaces" / "lab"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def lab():
    """The modules of the Space, imported as it imports them."""
    pytest.importorskip("gradio", reason="the lab needs the extra: pip install hf_ext[demo]")
    sys.path.insert(0, str(LAB))
    try:
        spec = importlib.util.spec_from_file_location("lab_app", LAB / "app.py")
        app = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(app)
        yield app
    finally:
        sys.path.remove(str(LAB))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama that never ends its turn, and a tokenizer with a chat template."""
    target = tmp_path_factory.mktemp("models") / "llama"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[1].zero_()  # the tokenizer's end token: never the likeliest
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def lively(folder, lab, tmp_path_factory):
    """The random Llama again, with weights so large that it says something else after every text."""
    target = str(tmp_path_factory.mktemp("models") / "lively")
    config = LlamaConfig.from_pretrained(folder, initializer_range=0.3)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:4].zero_()  # special tokens
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def server(lab, folder):
    demo = lab.build_demo(str(folder))
    _, url, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **lab.LAUNCH)
    yield url
    demo.close()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """Opens the lab at a width; afterwards: no error in the console, no request to anywhere else."""
    errors, requests, contexts = [], [], []

    def console(message):
        # a cancelled event aborts its own stream
        if message.type == "error" and "queue/data" not in message.location.get("url", ""):
            errors.append(message.text)

    def open_at(width, theme="light"):
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", console)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{server}?__theme={theme}")
        page.get_by_text("million parameters").wait_for()
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert errors == []
    outside = [url for url in requests if not url.startswith((server, "data:", "blob:"))]
    assert outside == []
