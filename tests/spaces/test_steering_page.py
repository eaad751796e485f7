"""The steering page: both texts against generate, twins that mix nothing, what is refused, what a browser shows."""

import copy
import re
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_ext import SteeringConfig, tiny
from hf_ext.record import edit
from hf_ext.sites import resolve
from hf_ext.steering import add_vectors, save_gguf, save_npy


@pytest.fixture
def texts(lab):
    import steering_texts

    return steering_texts


@pytest.fixture
def store(lab):
    import store

    return store


def asked(**changes):
    from steering_settings import LISTS, Settings

    fields = {
        "model": "", "source": LISTS, "towards": "Yes, it is!", "away": "No, it is not.", "method": "mean_difference",
        "adapter": "", "scale": 1.0, "first": 0, "last": 2, "prompt": "Hello", "chat": False, "max_new_tokens": 20,
    }  # fmt: skip
    return Settings(**{**fields, **changes})


@pytest.fixture
def ours(store, lively):
    """In the lab's own precision, bfloat16."""
    return store.Loaded(lively, *tiny.load(lively))


@pytest.fixture
def exact(store, lively):
    return store.Loaded(lively, *tiny.load(lively, dtype="float32"))


def drawn(seed, size=0.3, layers=(0, 1, 2), width=32):
    generator = torch.Generator().manual_seed(seed)
    return {layer: size * torch.randn(width, generator=generator) for layer in layers}


def ids_of(tokens):
    return [token.id for token in tokens]


def last(steps):
    """Both texts in the end."""
    return list(steps)[-1]


def test_at_scale_0_the_steered_text_is_the_bases_own_to_the_last_bit(texts, ours):
    ids = ours.text_ids("Hello")
    base, steered = last(texts.write_both(ours, drawn(0), 0.0, ids, 20))
    assert base == steered  # ids, probabilities and the likeliest tokens with theirs
    expected = ours.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    assert ids_of(base) == expected.tolist()


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_the_steered_text_is_what_generate_writes_with_the_vectors_on_the_stream(texts, exact, scale):
    vectors, ids = drawn(0), exact.text_ids("Hello")
    base, steered = last(texts.write_both(exact, vectors, scale, ids, 20))
    places = {str(layer): resolve(exact.model, "resid_post", layer) for layer in vectors}
    with edit(exact.model, places, lambda name, hidden, step: hidden + scale * vectors[int(name)]):
        expected = exact.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    assert ids_of(steered) == expected.tolist()
    assert ids_of(steered) != ids_of(base)


def test_a_known_base_is_not_written_again(texts, ours):
    ids = ours.text_ids("Hello")
    base, steered = last(texts.write_both(ours, drawn(0), 1.0, ids, 10))
    known = [token._replace(probability=0.5) for token in base]  # another one's, to be recognised
    assert last(texts.write_both(ours, drawn(0), 1.0, ids, 10, known)) == (known, steered)


def test_a_twin_shares_every_weight_and_steering_it_changes_nothing_of_the_model(texts, ours):
    before = copy.deepcopy(ours.model.state_dict())
    names, ids = [name for name, _ in ours.model.named_modules()], torch.tensor([[5, 6, 7]])
    logits = ours.model(ids).logits
    steered = add_vectors(texts.twin(ours.model), drawn(0))
    assert not torch.equal(steered(input_ids=ids).logits, logits)
    addresses = {weight.data_ptr() for name, weight in steered.named_parameters() if "steering" not in name}
    assert addresses == {weight.data_ptr() for weight in ours.model.parameters()}
    assert torch.equal(ours.model(ids).logits, logits)
    assert [name for name, _ in ours.model.named_modules()] == names
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.model.state_dict().items())


def test_runs_that_take_turns_token_by_token_write_what_each_writes_alone(texts, ours):
    runs = [(drawn(0), 1.0, "Hello"), (drawn(1), 1.0, "Hello"), (drawn(0), -1.0, "Hello"), (drawn(0), 0.0, "Good")]

    def begin(run):
        vectors, scale, prompt = run
        return texts.write_both(ours, vectors, scale, ours.text_ids(prompt), 12)

    alone = [last(begin(run)) for run in runs]
    assert len({tuple(ids_of(steered)) for _, steered in alone}) == len(runs)
    together = [begin(run) for run in runs]
    for _ in range(12):
        seen = [next(steps) for steps in together]
    assert seen == alone


def test_vectors_of_two_lists_are_the_mean_difference_at_the_last_tokens(texts, exact):
    towards, away = ["Yes!", "It is so good."], ["No.", "It is bad, I am afraid."]
    found = texts.find_vectors(exact, asked(towards="\n".join(towards), away="\n\n".join(away)))
    # hidden states of transformers; those of the last layer are after the norm
    read = [
        [
            exact.model(torch.tensor([exact.text_ids(text)]), output_hidden_states=True).hidden_states[1:3]
            for text in some
        ]
        for some in (towards, away)
    ]
    assert list(found) == [0, 1, 2]
    for layer in (0, 1):
        ends = [torch.stack([states[layer][0, -1] for states in some]).mean(0) for some in read]
        # sums in another order, of a padded batch
        torch.testing.assert_close(found[layer], ends[0] - ends[1], rtol=1e-4, atol=1e-5)


def test_an_adapter_a_twin_for_peft_an_array_and_a_control_vector_are_the_same_vectors(texts, exact, tmp_path):
    vectors = drawn(0, layers=(1, 2))  # llama.cpp has no place for layer 0
    model = add_vectors(texts.twin(exact.model), vectors, scale=2.0)
    model.save_pretrained(tmp_path / "adapter")
    save_npy(model, tmp_path / "vectors.npy")
    save_gguf(model, tmp_path / "vectors.gguf")
    for name in ("adapter", "adapter/beft", "vectors.npy", "vectors.gguf"):
        found = texts.from_adapter(exact, str(tmp_path / name))
        for layer, vector in vectors.items():
            assert torch.equal(found[layer], 2.0 * vector), name
    assert found.keys() == {1, 2}


def save(model, config, folder):
    get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return str(folder)


def other_llama(**sizes):
    config = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**{**config, "num_attention_heads": 2, **sizes}))


def test_an_adapter_that_is_not_the_models_is_refused_with_what_it_is_for(texts, exact, tmp_path):
    wide = save(other_llama(hidden_size=16), SteeringConfig(), tmp_path / "wide")
    deep = save(other_llama(num_hidden_layers=5), SteeringConfig(), tmp_path / "deep")
    lora = save(exact.model, LoraConfig(target_modules=["q_proj"]), tmp_path / "lora")
    first = save(exact.model, SteeringConfig(positions="first"), tmp_path / "first")
    elsewhere = save(exact.model, SteeringConfig(placement="self_attn.o_proj"), tmp_path / "elsewhere")
    save_npy(add_vectors(other_llama(hidden_size=16), drawn(0, width=16)), tmp_path / "wide.npy")
    save_npy(add_vectors(other_llama(num_hidden_layers=5), drawn(0, layers=range(5))), tmp_path / "deep.npy")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        (wide, "`hidden_size` of the adapter must be the base model's, 32, got 16"),
        (deep, "`num_hidden_layers` of the adapter must be the base model's, 3, got 5"),
        (lora, "must be an adapter of type STEERING or BEFT, got 'LORA'"),
        (first, "adapters that add to the residual stream at every token"),
        (elsewhere, "adapters that add to the residual stream at every token"),
        (str(tmp_path / "wide.npy"), "must have the width of"),
        (str(tmp_path / "deep.npy"), "must be for layers 0 to 2"),
        (str(tmp_path / "empty"), "without adapter_config.json"),
        ("nobody/has-this-adapter", "that can be reached, got nobody/has-this-adapter"),
        ("no id, no file", "that can be reached, got no id, no file"),
        ("", "or a Hub id, got nothing"),
    ):
        with pytest.raises((OSError, ValueError), match=re.escape(reason)):
            texts.find_vectors(exact, asked(source="an adapter", adapter=name))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"towards": " \n", "away": ""}, "one at least, got 0 and 0"),
        (
            {"towards": "a\nb", "away": "c"},
            "Both lists must have as many prompts, a line each, and one at least, got 2",
        ),
        ({"method": "pca"}, "at least 2 for 'pca', got 1 and 1"),
        ({"towards": "a" * 4000, "away": "b" * 200}, "at most 4096 tokens together, got 4200"),
    ],
)
def test_lists_that_say_nothing_are_refused(texts, ours, changes, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        texts.find_vectors(ours, asked(**changes))


@pytest.mark.parametrize(
    ("first", "end", "reason"),
    [
        (2, 1, "must go up within 0 to 2, got 2 to 1"),
        (0, 3, "must go up within 0 to 2, got 0 to 3"),
        (-1, 1, "must go up within 0 to 2, got -1 to 1"),
        (0, 0, "got 0 to 0; there are vectors in 1, 2."),
    ],
)
def test_layers_outside_the_model_or_without_a_vector_are_refused(lab, first, end, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        asked(first=first, last=end).chosen(drawn(0, layers=(1, 2)), 3)


def test_only_the_layers_between_the_sliders_are_steered_both_ends_included(lab):
    assert list(asked(first=1, last=2).chosen(drawn(0, layers=range(5)), 5)) == [1, 2]


def test_a_prompt_without_a_word_is_refused(ours):
    with pytest.raises(ValueError, match="The prompt must have a word"):
        asked(prompt=" ", chat=True).ids(ours)


def test_two_lists_begin_in_the_middle_third_and_an_adapter_as_it_is(lab):
    from steering_settings import ADAPTER, LISTS, defaults

    assert defaults(LISTS, 30) == (pytest.approx(0.2), 10, 19)
    assert [defaults(LISTS, layers)[1:] for layers in (1, 2, 3)] == [(0, 0), (0, 0), (1, 1)]
    assert all(0 < defaults(LISTS, layers)[0] <= 1 for layers in range(1, 100))
    assert defaults(ADAPTER, 30) == (1.0, 0, 29)


def test_the_lists_that_the_page_offers_are_pairs(lab):
    from steering_settings import PRESETS

    for towards, away in PRESETS.values():
        lines = towards.splitlines(), away.splitlines()
        assert len(lines[0]) == len(lines[1]) == len({*lines[0]}) == len({*lines[1]})
        assert not {*lines[0]} & {*lines[1]}


def test_a_bundled_adapter_is_offered_only_where_it_lies_in_the_package(texts, exact, tmp_path, monkeypatch):
    import steering_settings

    for module in (texts, steering_settings):
        monkeypatch.setattr(module, "BUNDLED_FOLDER", tmp_path / "bundled")
    assert steering_settings.sources() == [steering_settings.LISTS, steering_settings.ADAPTER]
    add_vectors(texts.twin(exact.model), drawn(0)).save_pretrained(tmp_path / "bundled")
    assert steering_settings.sources()[2:] == [steering_settings.BUNDLED]
    found = texts.find_vectors(exact, asked(source=steering_settings.BUNDLED))
    assert torch.equal(found[2], drawn(0)[2])


def test_marks_are_on_the_tokens_that_the_other_text_lacks(texts):
    base, steered = ["I", " am", " sad", "."], ["I", " am", " so", " happy", "."]
    assert texts.changed(base, steered) == ([False, False, True, False], [False, False, True, True, False])
    said = {name: [[text, 1.0, []] for text in some] for name, some in (("base", base), ("steered", steered))}
    assert texts.summary({**said, "scale": 1.0}) == "2 of 5 tokens have changed; the texts part at token 3."
    same = {"base": said["base"], "steered": said["base"], "scale": 0}
    assert texts.summary(same).endswith("the base's own, token by token. Nothing is added at scale 0.")


def test_the_texts_show_marks_prompt_scale_and_layers(texts):
    from pages import steering

    row = [["a", 0.5, [["a", 0.5], ["b", 0.25]]]]
    found = {"prompt": "Say", "chat": False, "scale": -0.25, "first": 1, "last": 2, "base": row}
    base, steered = steering.texts({**found, "steered": [*row, ["c", 0.75, []]]})
    spans = [re.findall(r"<span [^>]*--p:(\d+)[^>]*>([^<]*)</span>", shown) for shown in (base, steered)]
    assert spans == [[("0", "a")], [("0", "a"), ("45", "c")]]
    assert "Steered: scale -0.25, layers 1 to 2" in steered and ">Say</span>" in steered
    assert "a 50.0%. Likeliest: a 50.0%, b 25.0%" in base


def test_a_character_of_several_tokens_is_written_once_it_is_whole(texts, ours, store):
    ids = ours.text_ids("a🌱b")  # bytes: the plant is four tokens
    found = {"base": [], "steered": []}
    for length in range(1, len(ids) + 1):
        tokens = [store.Token(i, 0.5, [(i, 0.5)]) for i in ids[:length]]
        texts.add_tokens(found, ours, (tokens, []))
    assert [text for text, *_ in found["base"]] == ["a", "", "", "", "🌱", "b"]
    assert found["steered"] == []


def test_the_lens_of_an_unembedding_row_is_its_token_and_of_zeros_nothing_in_particular(texts, exact):
    token = exact.text_ids("x")[0]
    row = texts.lens_row(exact, 2 * exact.model.lm_head.weight[token].detach())
    assert row["top"][0][:2] == ["x", pytest.approx(1.0, abs=1e-3)]  # rounded
    assert row["length"] == pytest.approx(2 * float(exact.model.lm_head.weight[token].detach().norm()), abs=0.01)
    assert [cos for _, cos, _ in row["bottom"]] == sorted(cos for _, cos, _ in row["bottom"])
    zeros = texts.lens_row(exact, torch.zeros(32))
    assert zeros["length"] == 0 and {cos for _, cos, _ in zeros["top"]} == {0.0}


def test_the_effect_of_the_last_layers_vector_is_that_vector(texts, exact):
    vector = drawn(0)[2]
    expected, found = texts.lens_row(exact, vector), texts.effect_row(exact, 2, vector, exact.text_ids("Hello"))
    assert found["length"] == pytest.approx(expected["length"], abs=0.02)  # rounded
    assert [text for text, *_ in found["top"]] == [text for text, *_ in expected["top"]]
    assert texts.effect_row(exact, 0, vector, exact.text_ids("Hello"))["top"] != expected["top"]


def test_the_lens_table_has_the_last_layer_on_top_and_colours_by_cosine(lab):
    from pages import steering

    row = {"length": 2.5, "top": [["·b", 0.2, 1.0]], "bottom": [["c", -0.4, -2.0]]}
    shown = steering.lens_table({"9": row, "10": {**row, "top": [["a", 0.1, 1.0]]}})
    assert re.findall(r'<th scope="row">(\d+)</th>', shown) == ["10", "9"]
    cells = re.findall(r"--p:(\d+)[^>]*>([^<∅]+)</td>", shown)
    assert cells == [("0", "2.5"), ("25", "a"), ("100", "c"), ("0", "2.5"), ("50", "·b"), ("100", "c")]
    assert "Layer 9, away 1: c, cosine -0.400, dot product -2.00" in shown


@pytest.fixture
def opened(page):
    def open_at(width, theme="light"):
        opened = page(width, theme)
        opened.set_default_timeout(120_000)  # only ends a test that would hang
        opened.get_by_role("tab", name="Steering", exact=True).click()
        # set for the model's own layers, the middle one of three
        opened.wait_for_function("[...document.querySelectorAll('input[type=number]')].some((x) => x.max === '2')")
        return opened

    return open_at


def fill(shown, **fields):
    for label, value in fields.items():
        shown.get_by_role("spinbutton", name=label.replace("_", " "), exact=False).fill(str(value))


def write(shown):
    shown.get_by_role("button", name="Write").last.click()


def written(shown):
    """The two texts, and how many tokens of each are marked."""
    marked = "(box) => [...box.querySelectorAll('.heat')].filter((x) => x.style.getPropertyValue('--p') > 0).length"
    boxes = shown.locator(".lab-text:visible")
    return boxes.all_inner_texts(), [box.evaluate(marked) for box in boxes.all()]


def test_both_texts_are_written_side_by_side_and_are_equal_at_scale_0(opened):
    shown = opened(1280)
    fill(shown, Tokens_at_most=24, Scale=0, First_layer=0, Last_layer=2)
    write(shown)
    shown.get_by_text("the base's own, token by token. Nothing is added at scale 0.").wait_for()
    (base, steered), marks = written(shown)
    assert base == steered and marks == [0, 0]
    fill(shown, Scale=2)
    write(shown)
    shown.get_by_text(re.compile(r"[1-9]\d* of 24 tokens have changed")).wait_for()
    (again, steered), marks = written(shown)
    assert again == base != steered and min(marks) > 0
    # the lens follows: a row for each of the three layers, where the example had ten
    shown.wait_for_function(
        "[...document.querySelectorAll('.lab-scroll')]"
        ".some((x) => x.offsetParent && x.querySelectorAll('tbody tr').length === 3)"
    )


def test_two_windows_at_once_show_each_its_own_texts(opened):
    plain, strong = opened(1280), opened(390, "dark")
    for shown, scale in ((plain, 0), (strong, 2)):
        fill(shown, Tokens_at_most=32, Scale=scale)
    for shown in (plain, strong):
        write(shown)
    plain.get_by_text("Nothing is added at scale 0").wait_for()
    strong.get_by_text(re.compile(r"[1-9]\d* of 32 tokens have changed")).wait_for()
    (base, steered), _ = written(plain)
    assert base == steered
    (again, other), _ = written(strong)
    assert again == base != other
    assert strong.get_by_text("Steered: scale 2, layers 1 to 1").is_visible()
    assert plain.get_by_text("Steered: scale 0, layers 1 to 1").is_visible()
    assert strong.evaluate("document.documentElement.scrollWidth") <= 390


def test_texts_are_stopped_by_the_button_and_what_was_written_stays(opened, monkeypatch):
    import store

    step = store.Loaded._step

    def later(self, ids, cache):
        time.sleep(0.05)
        return step(self, ids, cache)

    monkeypatch.setattr(store.Loaded, "_step", later)
    shown = opened(1280)
    fill(shown, Tokens_at_most=128)
    write(shown)
    shown.get_by_text("Writing ...").wait_for()
    # some tokens are there, and no longer the example's forty
    shown.wait_for_function(
        "[...document.querySelectorAll('.lab-text')].filter((x) => x.offsetParent)"
        ".every((x) => x.querySelectorAll('.heat').length > 2 && x.querySelectorAll('.heat').length < 30)"
    )
    shown.get_by_role("button", name="Stop").and_(shown.locator(":visible")).first.click()
    shown.get_by_text("Stopped.").wait_for()
    before = written(shown)
    shown.wait_for_timeout(1000)
    assert written(shown) == before
    assert shown.get_by_text("Stopped.").is_visible()
    assert 2 < shown.locator(".lab-text:visible").last.locator(".heat").count() < 128


def test_what_is_shown_already_is_not_written_again(opened, monkeypatch):
    from pages import steering

    write_both, runs = steering.write_both, []

    def counted(*args):
        runs.append(args[2])  # the scale
        return write_both(*args)

    monkeypatch.setattr(steering, "write_both", counted)
    shown = opened(1280)
    fill(shown, Tokens_at_most=8, Scale=0)
    write(shown)
    shown.get_by_text("Nothing is added at scale 0").wait_for()
    before = written(shown)
    write(shown)
    shown.wait_for_timeout(500)
    shown.get_by_text("Nothing is added at scale 0").wait_for()
    assert written(shown) == before
    assert runs == [0]


def test_a_slider_that_is_let_go_steers_anew(opened):
    shown = opened(1280)
    fill(shown, Tokens_at_most=8)
    slider = shown.get_by_role("slider", name="Scale")
    place = slider.bounding_box()
    y = place["y"] + place["height"] / 2
    shown.mouse.move(place["x"] + place["width"] * 0.6, y)
    shown.mouse.down()
    shown.mouse.move(place["x"] + place["width"] * 0.25, y, steps=4)
    shown.mouse.up()
    shown.get_by_text(re.compile(r"Steered: scale -[01]\.\d+, layers 1 to 1")).wait_for()


def test_what_cannot_be_steered_is_said_plainly_and_the_example_stays(opened, tmp_path):
    shown = opened(1280)
    example = written(shown)
    shown.get_by_role("textbox", name="Away from").fill("")
    write(shown)
    shown.get_by_text("Both lists must have as many prompts").wait_for()
    shown.get_by_role("radio", name="an adapter").check()
    shown.get_by_role("textbox", name="Adapter").wait_for()
    assert not shown.get_by_role("textbox", name="Away from").is_visible()
    # an adapter is taken as it is: all layers, scale 1
    shown.wait_for_function(
        "[...document.querySelectorAll('input[type=number]')].filter((x) => x.max === '2')"
        ".map((x) => x.value).join() === '1,0,2'"
    )
    save_npy(add_vectors(other_llama(hidden_size=16), drawn(0, width=16)), tmp_path / "wide.npy")
    for name, reason in (
        (str(tmp_path), "without adapter_config.json"),
        (str(tmp_path / "wide.npy"), "must have the width of"),
        ("nobody/has-this-adapter", "or a Hub id that can be reached, got nobody/has-this-adapter"),
    ):
        shown.get_by_role("textbox", name="Adapter").fill(name)
        write(shown)
        shown.get_by_text(reason).wait_for()
    box = shown.get_by_role("textbox", name="Model").and_(shown.locator(":visible"))
    box.fill(str(tmp_path))
    write(shown)
    shown.get_by_text("without config.json").wait_for()
    assert written(shown) == example


def test_an_adapter_is_read_and_steers(opened, folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder)
    add_vectors(model, drawn(0, size=1.0)).save_pretrained(tmp_path)
    shown = opened(1280)
    shown.get_by_role("radio", name="an adapter").check()
    shown.get_by_role("textbox", name="Adapter").fill(str(tmp_path))
    fill(shown, Tokens_at_most=8)
    write(shown)
    shown.get_by_text("Steered: scale 1, layers 0 to 2").wait_for()
    shown.get_by_text(re.compile("[1-8] of 8 tokens have changed")).wait_for()


def test_effects_are_measured_layer_by_layer(opened):
    shown = opened(390)
    shown.get_by_role("button", name="What they do in the last layer").click()
    fill(shown, First_layer=0, Last_layer=2)
    shown.get_by_role("button", name="Measure").and_(shown.locator(":visible")).click()
    shown.get_by_text("after the prompt above.").wait_for()
    rows = shown.locator(".lab-scroll:visible").last.locator("tbody tr")
    assert [row.locator("th").inner_text() for row in rows.all()] == ["2", "1", "0"]
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_model_of_other_depth_moves_the_sliders(opened, folder, tmp_path):
    deep = other_llama(num_hidden_layers=6, vocab_size=LlamaConfig.from_pretrained(folder).vocab_size)
    deep.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    shown = opened(1280)
    box = shown.get_by_role("textbox", name="Model").and_(shown.locator(":visible"))
    box.fill(str(tmp_path))
    box.press("Enter")
    shown.get_by_text("is ready: 6 layers.").wait_for()
    fill(shown, Tokens_at_most=8)
    write(shown)
    shown.get_by_text("Steered: scale 1, layers 2 to 3").wait_for()
