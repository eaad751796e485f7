"""The lab: what its API answers, what its pages say when something is wrong, and what a browser shows."""

import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch


gradio_client = pytest.importorskip("gradio_client", reason="the lab needs the extra: pip install hf_ext[demo]")
LAB = Path(__file__).parents[2] / "spaces" / "lab"


@pytest.fixture(scope="module")
def client(server):
    return gradio_client.Client(server, verbose=False)


@pytest.fixture
def slow(lab, monkeypatch):
    """Tokens take their time, so that there is something to stop."""
    import store

    step = store.Loaded._step

    def later(self, ids, cache):
        time.sleep(0.03)
        return step(self, ids, cache)

    monkeypatch.setattr(store.Loaded, "_step", later)


def loaded(lab, folder):
    return lab.Store(str(folder)).get("")


def test_without_temperature_the_lab_writes_what_generate_writes(lab, folder):
    ours = loaded(lab, folder)
    ids = ours.chat_ids([{"role": "user", "content": "Hello"}])
    expected = ours.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    tokens = list(ours.write(ids, max_new_tokens=20))
    assert [token.id for token in tokens] == expected.tolist()


def test_a_tokens_probability_is_the_models_own(lab, folder):
    ours = loaded(lab, folder)
    ids = ours.text_ids("Hello")
    tokens = list(ours.write(ids, max_new_tokens=5))
    written = [token.id for token in tokens]
    logits = ours.model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1].float()
    expected = logits.softmax(-1).gather(1, torch.tensor(written)[:, None])[:, 0]
    # bf16 keeps 8 bits, and the cached and the whole forward round differently: some steps of 2^-8, relative
    torch.testing.assert_close(torch.tensor([token.probability for token in tokens]), expected, rtol=2**-5, atol=0)
    assert all(token.top[0] == (token.id, pytest.approx(token.probability)) for token in tokens)


def test_a_text_as_long_as_the_context_is_refused_and_one_shorter_gets_a_token(lab, folder):
    ours = loaded(lab, folder)
    ours.model.config.max_position_embeddings = 8
    assert len(list(ours.write([5] * 7, max_new_tokens=20))) == 1
    with pytest.raises(ValueError, match="got 8 tokens"):
        next(ours.write([5] * 8, max_new_tokens=20))


def test_the_store_loads_a_model_once_and_keeps_two(lab, folder, tmp_path):
    store = lab.Store(str(folder))
    assert store.get("").model is store.get(str(folder)).model
    other = str(shutil.copytree(folder, tmp_path / "other"))
    twin = store.lime(other)
    assert len(store) == 2
    assert store.lime(other) is twin


def test_a_fresh_conversion_says_that_nothing_is_routed_and_writes_the_originals_text(lab, folder):
    from pages import lime

    store = lab.Store(str(folder))
    plain, twin = store.get(""), store.lime("")
    routers = lime.model_routers(twin)
    assert "Nothing is routed yet" in lime.describe("it", routers)
    assert list(lime.continuation(plain, "Hello"))[-1] == list(lime.continuation(twin, "Hello"))[-1]


def cells(table):
    rows = re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1])
    return [re.findall(r"<td [^>]*--p:(\d+)[^>]*>([^<]*)</td>", row) for row in rows]


def test_the_router_map_shows_each_weight_in_the_row_that_reads_and_the_column_that_is_read(lab):
    from pages import lime

    own = np.eye(2)[:, None]
    weight = np.zeros((2, 3, 2))
    weight[:, -1] = np.eye(2)
    weight[0, 1, 1] = -0.5  # layer 2, head 0 reads layer 1, head 1
    weight[1, 1, 0] = 0.25
    weight[1, 0, 1] = 0.25
    middle = np.concatenate([np.zeros((2, 1, 2)), own], axis=1)
    routers = [([0], own), ([0, 1], middle), ([0, 1, 2], weight)]
    assert cells(lime.router_map(routers, lime.MAX, lime.ALL, lime.ALL))[2] == [
        ("50", ".25"),
        ("100", ".5"),
        ("100", "1"),
    ]
    assert cells(lime.router_map(routers, lime.SUM, lime.ALL, lime.ALL))[2][1] == ("100", ".75")
    assert cells(lime.router_map(routers, lime.MAX, "0", "1"))[2] == [("0", "0"), ("100", "-.5"), ("0", "0")]
    assert "2 as a LIMe model" not in lime.describe("it", routers)
    assert "at most 0.50 away" in lime.describe("it", routers)


@pytest.fixture
def routed(lab, folder):
    """A store of the random Llama, in whose LIMe twin head 0 of layer 2 reads head 1 of layer 1 besides itself."""
    store = lab.Store(str(folder))
    with torch.no_grad():
        store.lime("").model.model.layers[2].self_attn.router.weight[0, 1, 1] = 0.5
    return store


def test_layer_figures_are_those_of_the_library_for_both_models(lab, routed):
    from pages import lime

    from hf_ext.analysis.depth import layer_entropies

    steps = list(lime.layer_figures(routed, "", "A cat is here.\n\nA dog."))
    assert [title for title, _ in steps[:4]] == [
        f"{kind}: {what}"
        for kind in lime.KINDS
        for what in ("entropy of 20 tokens in 2 rows ...", "telling 4 verbs apart ...")
    ]
    # every byte is a token here, so no verb is one
    assert "got several for ' is', ' are', ' was', ' were' in this model" in steps[-1][0]
    figures = steps[-1][1]
    assert figures[lime.ACCURACY] == {}
    for title, loaded in (("Original", routed.get("")), ("LIMe", routed.lime(""))):
        ids, mask = lime.rows_of(loaded, "A cat is here.\nA dog.")
        expected = layer_entropies(loaded.model, ids, attention_mask=mask)
        assert figures[lime.ENTROPY][title]["values"] == pytest.approx(expected.values.tolist(), abs=1e-4)  # rounded
        assert figures[lime.ENTROPY][title]["hidden"] == pytest.approx(expected.hidden.tolist(), abs=1e-4)
    shown = lime.depth_charts(figures)
    assert shown.count("<svg") == 2
    for title in lime.KINDS:
        for value in figures[lime.ENTROPY][title]["values"]:
            assert f"{title} {value:.3f}" in shown


def test_the_default_text_has_each_verb_often_enough_for_five_folds(lab):
    from pages import lime

    lines = lime.default_text().splitlines()
    assert len(set(lines)) == len(lines) == 100
    assert all(sum(f"{verb} " in line for line in lines) == 25 for verb in lime.VERBS)


def test_a_verb_is_one_token_where_the_tokenizer_has_it_behind_a_word(lab, folder):
    from pages import lime

    ours = loaded(lab, folder)
    ours.tokenizer.add_tokens([*lime.VERBS])
    assert lime.verb_ids(ours) == ours.tokenizer.convert_tokens_to_ids([*lime.VERBS])


@pytest.mark.parametrize(
    ("text", "reason"), [(" \n ", "must have a line, got none"), ("a" * 4097, "in the longest line")]
)
def test_a_text_without_a_word_or_too_long_is_refused(lab, routed, text, reason):
    from pages import lime

    with pytest.raises(ValueError, match=reason):
        list(lime.layer_figures(routed, "", text))


def test_the_circuit_table_has_the_planted_circuit_and_nothing_for_a_fresh_conversion(lab, routed, folder):
    from pages import lime

    rows = lime.circuit_rows(routed.lime(""), "Hello")
    assert [(row["reader"], row["source"]) for row in rows] == [([2, 0], [1, 1])]
    assert sorted(rows[0]["tokens"]) == sorted(set("Hello"))
    shown = lime.circuit_table(rows)
    assert ">2/0</th>" in shown and ">1/1</td>" in shown and f">{rows[0]['strength']:.2f}</td>" in shown
    fresh = lime.circuit_rows(lab.Store(str(folder)).lime(""), "Hello")
    assert "Nothing is routed yet" in lime.circuit_table(fresh)


def test_v1_routers_are_refused_by_the_map_with_the_function_that_shows_them(lab):
    from pages import lime
    from store import Loaded

    from hf_ext import LimeConfig, LimeForCausalLM

    config = LimeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        router_type="static",
    )  # fmt: skip
    with pytest.raises(ValueError, match="got 'static'. hf_ext.analysis.depth.router_map"):
        lime.model_routers(Loaded("v1", LimeForCausalLM(config), None))


def test_the_lens_map_ends_in_the_models_own_next_tokens(lab, folder):
    from pages import lens
    from views import visible

    ours = loaded(lab, folder)
    ids = ours.text_ids("Hello there")
    found = lens.lens_example(ours, ids, len(ids) - 2)
    top = ours.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert [guesses[0][0] for guesses in found["guesses"][-1]] == [ours.text([i], special=True) for i in top]
    shown = cells(lens.lens_map(found, lens.TOP))
    assert len(shown) == ours.model.config.num_hidden_layers + 1
    assert [html.unescape(text) for _, text in shown[0]] == [visible(ours.text([i], special=True)) for i in top]


def test_what_a_model_writes_is_escaped(lab):
    from pages import essa, lime, steering
    from views import Cell, heat_map, key, line_chart, token_text, write_text

    evil = "<img src=x onerror=alert(1)>\"'"
    cell = Cell(evil, 0.5, evil)
    said = {"question": evil, "answer": evil, "before": evil, "after": evil}
    said |= {"before_reward": 0.0, "after_reward": None}
    token = [evil, 0.5, [[evil, 0.5]]]
    texts = {"prompt": evil, "chat": True, "scale": 1, "first": 0, "last": 1, "base": [token], "steered": []}
    for shown in (
        token_text([cell]),
        heat_map(evil, [evil], [(evil, [cell])], label=evil),
        write_text(evil, evil, evil),
        key([evil]),
        line_chart(evil, [(evil, [1.0, 2.0])]),
        lime.circuit_table([{"reader": [1, 0], "source": [0, 0], "strength": 0.5, "tokens": [evil]}]),
        essa.answer_table({"answers": [said]}),
        *steering.texts(texts),
        steering.lens_table({0: {"length": 1.0, "top": [[evil, 0.5, 1.0]], "bottom": []}}),
    ):
        assert "<img" not in shown
        assert 'onerror=alert(1)>"' not in shown


def test_chat_streams_the_answer_token_by_token(client, lab, folder):
    parts = list(client.submit("Hello", max_new_tokens=12, api_name="/chat"))
    assert len(parts) == 12
    assert all(later.startswith(earlier) for earlier, later in zip(parts, parts[1:], strict=False))
    ours = loaded(lab, folder)
    ids = ours.chat_ids([{"role": "user", "content": "Hello"}])
    assert parts[-1] == ours.text([token.id for token in ours.write(ids, max_new_tokens=12)])


def test_a_cancelled_chat_stops_and_the_next_one_is_answered(client, slow):
    job = client.submit("Hello", max_new_tokens=3000, api_name="/chat")
    next(iter(job))
    job.cancel()
    # one event at a time: this one would wait for all of the 3000 tokens, 90 s
    start = time.monotonic()
    assert len(list(client.submit("Hello", max_new_tokens=3, api_name="/chat"))) == 3
    assert time.monotonic() - start < 30


def test_a_bad_model_is_answered_with_the_sentence_that_names_the_cure(client, tmp_path):
    with pytest.raises(Exception, match='without config.json. Give "smollm2", a model folder, a Hub id'):
        client.predict("Hello", model=str(tmp_path), api_name="/chat")


def test_an_unknown_page_is_refused_with_the_list(lab):
    with pytest.raises(ValueError, match="lens, lime, steering, essa, got 'lenz'"):
        lab.build_demo(only="lenz")


def test_a_port_in_use_is_one_sentence_that_names_another_and_exit_code_1(folder):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        run = subprocess.run(
            [sys.executable, str(LAB / "app.py"), "--model", str(folder)],
            env={**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert run.returncode == 1
    assert f"Port {port} is in use. Choose another one, for example GRADIO_SERVER_PORT={port + 1}." in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("page", ["lens", "lime", "steering", "essa"])
def test_the_python_code_of_a_page_runs(lab, folder, page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = lab.PAGES[page].CODE
    assert 'load("smollm2")' in code
    code = code.replace(getattr(lab.PAGES[page], "TRAINED", ""), "")  # these fit SmolLM2 alone; see test_tiny.py
    code = code.replace("max_steps=12", "max_steps=1")
    exec(compile(code.replace('load("smollm2")', f"load({str(folder)!r})"), page, "exec"), {})
    assert capsys.readouterr().out


def test_the_computed_examples_are_of_the_real_model():
    lens = json.loads((LAB / "examples" / "lens.json").read_text())
    assert lens["model"] == "smollm2"
    assert lens["lens"]["layers"] == list(range(31))
    assert "Paris" in lens["messages"][-1]["content"]
    lime = json.loads((LAB / "examples" / "lime.json").read_text())
    assert sum(np.size(router["weight"]) for router in lime["routers"][1:]) == 4176
    assert {len(line) for found in lime["depth"].values() for kind in found.values() for line in kind.values()} == {30}
    assert [len(found) for found in lime["depth"].values()] == [2, 2]
    assert len(lime["circuits"]) == 20
    essa = json.loads((LAB / "examples" / "essa.json").read_text())
    assert (essa["model"], essa["dim"]) == ("smollm2", 480)  # 30 layers, 4 matrices, 2 factors, rank 2
    assert len(essa["generations"]) == essa["planned"]
    assert {len(found["fitness"]) for found in essa["generations"]} == {8}
    assert any(row["before"] != row["after"] for row in essa["answers"])
    steering = json.loads((LAB / "examples" / "steering.json").read_text())
    assert (steering["model"], steering["layers"]) == ("smollm2", 30)
    assert steering["lens"].keys() == steering["effects"].keys() == {str(layer) for layer in range(10, 20)}
    said = {name: "".join(text for text, *_ in steering[name]) for name in ("base", "steered")}
    assert "amazing" in said["steered"] and "amazing" not in said["base"]


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1280, "light")])
def test_all_pages_are_full_at_once_and_no_wider_than_the_window(page, width, theme):
    opened = page(width, theme)
    for tab in ("Lens", "LIMe", "Steering", "ESSA"):
        opened.get_by_role("tab", name=tab, exact=True).click()
        opened.locator(".lab-scroll td:visible").first.wait_for()
        assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_pointing_at_a_cell_tells_its_details(page):
    opened = page(1280)
    opened.locator(".lab-scroll td:visible").nth(3).hover()
    opened.get_by_text("(position 3), layer 30:").wait_for()


def test_an_answer_is_stopped_by_the_button_and_the_lens_follows(page, slow):
    opened = page(390)
    opened.get_by_role("spinbutton", name="Tokens at most").fill("128")
    opened.get_by_role("textbox", name="Message").fill("Hello")
    opened.get_by_role("button", name="Send").click()
    opened.locator(".lab-text:visible span").nth(2).wait_for()
    opened.get_by_role("button", name="Stop").first.click()
    # the tiny model has 3 layers: 4 rows, where the example had 31
    opened.wait_for_function("document.querySelectorAll('.lab-scroll')[0]?.querySelectorAll('tbody tr').length === 4")
    assert opened.locator(".lab-text:visible span").count() < 128


def test_a_model_that_cannot_be_had_is_said_plainly_and_the_example_stays(page, tmp_path):
    opened = page(1280)
    box = opened.get_by_role("textbox", name="Model").first
    box.fill(str(tmp_path))
    box.press("Enter")
    opened.get_by_text("is not available").wait_for()
    opened.get_by_text("without config.json").wait_for()
    opened.get_by_role("textbox", name="Message").fill("Hello")
    opened.get_by_role("button", name="Send").click()
    opened.get_by_text("without config.json").wait_for()
    assert opened.get_by_role("textbox", name="Message").input_value() == "Hello"
    assert opened.locator(".lab-scroll td:visible").count() > 100


@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (1280, "dark")])
def test_the_sections_of_the_lime_page_open_full_and_no_wider_than_the_window(page, width, theme):
    opened = page(width, theme)
    opened.get_by_role("tab", name="LIMe", exact=True).click()
    for section, inside in (
        ("Entropy and separability by layer", ".lab-charts svg"),
        ("Depthwise circuits", ".words"),
    ):
        assert not opened.locator(inside).first.is_visible()
        opened.get_by_role("button", name=section).click()
        opened.locator(inside).first.wait_for()
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.locator(".lab-charts rect").nth(5).hover()
    opened.get_by_text("values: entropy, nats, layer 5: Original").wait_for()


def test_layers_are_measured_and_circuits_found_on_request(page):
    opened = page(390)
    opened.get_by_role("tab", name="LIMe", exact=True).click()
    opened.get_by_role("button", name="Entropy and separability by layer").click()
    opened.get_by_role("textbox", name="Text, a row a line").fill("A cat is here.\nA dog was there.")
    opened.get_by_role("button", name="Measure").click()
    opened.get_by_text("tokens in 2 rows. The verbs cannot be told apart here").wait_for()
    # the tiny model has 3 layers in 2 charts, where the example had 30 in 4
    assert opened.locator(".lab-charts rect").count() == 6
    opened.get_by_role("button", name="Depthwise circuits").click()
    opened.get_by_role("button", name="Find circuits").click()
    opened.get_by_text("Nothing is routed yet").wait_for()


def test_a_measurement_is_stopped_by_the_button_and_what_was_shown_stays(page, lab, monkeypatch):
    from pages import lime

    def slow(*args, **options):
        time.sleep(1)
        raise ValueError("too late to be seen")

    monkeypatch.setattr(lime, "verb_ids", lambda loaded: [1, 2])
    monkeypatch.setattr(lime, "separability", slow)
    opened = page(1280)
    opened.get_by_role("tab", name="LIMe", exact=True).click()
    opened.get_by_role("button", name="Entropy and separability by layer").click()
    opened.get_by_role("button", name="Measure").click()
    opened.get_by_text("Original: telling 4 verbs apart").wait_for()
    opened.get_by_role("button", name="Stop").last.click()
    opened.get_by_text("Stopped.").wait_for()
    opened.wait_for_timeout(1500)
    assert opened.get_by_text("Stopped.").is_visible()
    assert opened.locator(".lab-charts rect").count() == 6  # 3 layers of the original, two sides


def test_a_conversion_on_the_spot_shows_its_own_routers(page):
    opened = page(1280)
    opened.get_by_role("tab", name="LIMe", exact=True).click()
    opened.get_by_role("button", name="Convert to LIMe").click()
    opened.wait_for_function("document.querySelectorAll('.lab-scroll')[1]?.querySelectorAll('tbody tr').length === 3")
    opened.get_by_text("Nothing is routed yet").wait_for()
