"""The lens of a vector against float64 written out, and of its effect against a model where the effect is known."""

import pytest
import torch
import transformers

from hf_ext.analysis.vector_lens import mean_effects, plot_cosines, token_text, vector_lens


VOCAB, WIDTH, LAYERS = 61, 32, 3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=None, bos_token_id=None, initializer_range=0.2,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 2.0)
    return model


@pytest.mark.parametrize("fold_norm", [False, True])
def test_cosines_and_dots_are_those_of_the_rows_of_the_head(model, fold_norm):
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    lens = vector_lens(model, vector, top_k=5, fold_norm=fold_norm)
    rows = model.lm_head.weight.detach().double()
    if fold_norm:
        rows = rows * model.model.norm.weight.detach().double()
    dots = rows @ vector.double()
    cosines = (dots / (rows.norm(dim=1) * vector.double().norm())).nan_to_num(0)  # the row of padding is zero
    torch.testing.assert_close(lens.dots.double(), dots, rtol=0, atol=1e-5)  # float32 sums of 32 terms
    torch.testing.assert_close(lens.cosines.double(), cosines, rtol=0, atol=1e-6)
    assert lens.top_ids.tolist() == cosines.argsort(descending=True)[:5].tolist()
    assert lens.bottom_ids.tolist() == cosines.argsort()[:5].tolist()


def test_the_row_of_a_token_is_most_like_itself_and_padded_ids_are_never_named(model):
    row = model.lm_head.weight.detach()[17]
    lens = vector_lens(model, row, top_k=3, vocabulary=40)
    assert lens.top_ids[0] == 17 and float(lens.cosines[17]) == pytest.approx(1, abs=1e-6)
    assert len(lens.cosines) == 40
    assert vector_lens(model, model.lm_head.weight.detach()[50], vocabulary=40, top_k=40).top_ids.max() < 40


def test_a_vector_of_zeros_is_like_nothing(model):
    lens = vector_lens(model, torch.zeros(WIDTH), top_k=2)
    assert not lens.cosines.any() and not lens.dots.any()


def test_a_vector_of_the_last_layer_has_itself_as_its_effect(model):
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([[4, 5]])]
    found = mean_effects(model, {LAYERS - 1: vector}, prompts, max_new_tokens=4)
    torch.testing.assert_close(found[LAYERS - 1], vector, rtol=0, atol=1e-5)  # (h + v) - h in float32


def test_an_effect_is_the_mean_over_the_tokens_of_what_the_steered_model_writes(model):
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    prompt = torch.tensor([[1, 2, 3]])
    (found,) = mean_effects(model, {0: vector}, [prompt], max_new_tokens=5, temperature=0).values()

    layer = model.model.layers[0]
    handle = layer.register_forward_hook(lambda module, args, out: out + vector)
    seen = []
    watch = model.model.layers[-1].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    with torch.no_grad():
        text = prompt
        for _ in range(5):
            text = torch.cat((text, model(text).logits[:, -1:].argmax(-1)), dim=1)
        seen.clear()
        model(text)
        handle.remove()
        model(text)
    watch.remove()
    expected = (seen[0] - seen[1])[0, :-1].mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sampling_depends_on_the_seed_alone_and_leaves_torchs_own_state(model):
    vectors, prompts = {1: torch.ones(WIDTH)}, [torch.tensor([1, 2])]
    before = torch.get_rng_state()
    one, two = (mean_effects(model, vectors, prompts, max_new_tokens=6, seed=4)[1] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)
    assert not torch.equal(one, mean_effects(model, vectors, prompts, max_new_tokens=6, seed=5)[1])


class Pieces:
    """A tokenizer one of whose tokens is half a character."""

    names = ("a", "Ġword", "ä", "")

    def decode(self, ids):
        return "".join({0: "a", 1: " word", 2: "\ufffd", 3: ""}[i] for i in ids)

    def convert_ids_to_tokens(self, token):
        return self.names[token]


def test_a_token_that_is_no_text_alone_is_written_as_the_tokenizer_does():
    assert [token_text(Pieces(), token) for token in range(3)] == ["a", " word", "ä"]


def test_the_table_has_both_ends_with_their_figures(model):
    class Numbers:
        def decode(self, ids):
            return str(ids[0])

    lens = vector_lens(model, torch.ones(WIDTH), top_k=4)
    rows = lens.table(Numbers())
    assert [row["rank"] for row in rows] == [1, 2, 3, 4] * 2 and {row["end"] for row in rows} == {"top", "bottom"}
    assert all(row["cos"] == float(lens.cosines[row["id"]]) and row["token"] == str(row["id"]) for row in rows)


def test_the_plot_has_a_panel_for_each_lens(model):
    figure = pytest.importorskip("matplotlib.figure", reason="extra recipes").Figure()
    lenses = {f"layer {i}": vector_lens(model, torch.randn(WIDTH), top_k=1) for i in range(5)}
    plot_cosines(lenses, figure)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == list(lenses)
    assert all(sum(patch.get_height() for patch in axis.patches) == VOCAB for axis in shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": torch.ones(5)}, r"`vector` must be a tensor of shape \(32,\).*\(5,\)"),
        ({"vector": torch.full((WIDTH,), torch.nan)}, "finite"),
        ({"top_k": 0}, "`top_k`"),
        ({"vocabulary": 62}, "`vocabulary`"),
    ],
)
def test_bad_arguments_are_refused_by_name(model, change, message):
    arguments = {"vector": torch.ones(WIDTH), **change}
    with pytest.raises(ValueError, match=message):
        vector_lens(model, arguments.pop("vector"), **arguments)


@pytest.mark.parametrize(
    ("vectors", "prompts", "message"),
    [
        ({0: torch.ones(WIDTH)}, [], "`prompts`"),
        ({7: torch.ones(WIDTH)}, [torch.tensor([1])], "layers 0 to 2, got 7"),
        ({0: torch.ones(3)}, [torch.tensor([1])], r"`vectors\[0\]`"),
    ],
)
def test_bad_arguments_of_effects_are_refused_by_name(model, vectors, prompts, message):
    with pytest.raises(ValueError, match=message):
        mean_effects(model, vectors, prompts)
