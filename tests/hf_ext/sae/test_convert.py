"""Every format, written here as its library writes it, becomes an SAE that computes that library's formula; and back.

The formulas are written out densely, from the libraries' own definitions; nothing of hf_ext makes the files.
"""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ext.sae import SAEModel
from hf_ext.sae.convert import EXPORTS, export_sae, load_sae, main


D, F, K = 12, 40, 5
# float32 sums of 12 or 40 terms in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def raw():
    """Random tensors in the letters of the formulas: W (F, D), c (F,), rows (F, D), b (D,), theta (F,), x (9, D)."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=draw), dim=1)
    return {
        "W": torch.randn(F, D, generator=draw),
        "c": 0.3 * torch.randn(F, generator=draw),
        "rows": rows,
        "b": 0.3 * torch.randn(D, generator=draw),
        "theta": 0.5 + torch.rand(F, generator=draw),
        "x": 2 * torch.randn(9, D, generator=draw) + 0.5,
    }


def topk(u, k=K):
    top = torch.relu(u).topk(k)
    return torch.zeros_like(u).scatter(-1, top.indices, top.values)


def sae_lens(folder, raw, architecture, *, metadata=None, tensors=None, **cfg):
    """As `SAE.save_model` of version 6 leaves a folder."""
    cfg = {
        "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "you/lm", **(metadata or {})},
        "architecture": architecture, **cfg,
    }  # fmt: skip
    if architecture == "topk":
        cfg = {"k": K, "rescale_acts_by_decoder_norm": False, **cfg}
    plain = {"W_enc": raw["W"].T, "b_enc": raw["c"], "W_dec": raw["rows"], "b_dec": raw["b"]}
    folder.mkdir(parents=True)
    kept = {name: t.contiguous() for name, t in {**plain, **(tensors or {})}.items() if t is not None}
    save_file(kept, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in cfg.items() if value is not None}))
    return folder


def dictionary(folder, raw, kind, tensors, **trainer):
    """As dictionary_learning's trainers leave a folder."""
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "you/lm", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return folder


def linear(raw, **others):
    return {
        "encoder.weight": raw["W"], "encoder.bias": raw["c"], "decoder.weight": raw["rows"].T.contiguous(), **others,
    }  # fmt: skip


def by_column(raw, **others):
    return {"W_enc": raw["W"].T.contiguous(), "W_dec": raw["rows"], "b_enc": raw["c"], "b_dec": raw["b"], **others}


def assert_computes(loaded, x, codes, reconstruction):
    output = loaded(x)
    torch.testing.assert_close(output.codes.dense(), codes, **CLOSE)
    torch.testing.assert_close(output.reconstruction, reconstruction, **CLOSE)
    assert (codes > 0).any() and (codes == 0).any()


def check(folder, raw, codes, *, format, reconstruction=None, said=(), **options):
    """Load `folder`; codes (and by default rows . codes + b) are as expected, and the report says so."""
    loaded, report = load_sae(folder, **options)
    assert report.format == format
    for words in said:
        assert words in str(report)
    expected = codes @ raw["rows"] + raw["b"] if reconstruction is None else reconstruction
    assert_computes(loaded, raw["x"], codes, expected)
    return loaded


# SAELens


@pytest.mark.parametrize("beta", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_saelens_of_version_6(architecture, beta, raw, tmp_path):
    tensors = {"threshold": raw["theta"]} if architecture == "jumprelu" else None
    folder = sae_lens(tmp_path / "a", raw, architecture, tensors=tensors, apply_b_dec_to_input=beta)
    u = (raw["x"] - beta * raw["b"]) @ raw["W"].T + raw["c"]
    codes = {"topk": topk(u), "standard": torch.relu(u), "jumprelu": torch.relu(u) * (u > raw["theta"])}
    told = "b_dec is subtracted" if beta else "b_dec is not subtracted"
    loaded = check(folder, raw, codes[architecture], format="sae_lens", said=("W_enc transposed", told))
    assert torch.equal(loaded.encoder.weight, raw["W"]) and torch.equal(loaded.W_dec, raw["rows"])
    assert loaded.config.base_model_name_or_path == "you/lm"


def test_saelens_topk_with_decoder_norms_in_the_choice(raw, tmp_path):
    raw["rows"] = raw["rows"] * torch.linspace(0.2, 3, F)[:, None]
    folder = sae_lens(tmp_path / "a", raw, "topk", rescale_acts_by_decoder_norm=True)
    norms = raw["rows"].norm(dim=1)
    codes = topk(((raw["x"] - raw["b"]) @ raw["W"].T + raw["c"]) * norms)
    expected = (codes / norms) @ raw["rows"] + raw["b"]
    check(folder, raw, codes, reconstruction=expected, format="sae_lens", said=("Norms of decoder rows (0.2 to 3)",))


def test_saelens_gated_is_a_jumprelu(raw, tmp_path):
    draw = torch.Generator().manual_seed(1)
    r, gate, mag = (0.5 * torch.randn(F, generator=draw) for _ in range(3))
    tensors = {"b_enc": None, "r_mag": r, "b_gate": gate, "b_mag": mag}
    folder = sae_lens(tmp_path / "a", raw, "gated", tensors=tensors)
    pi = (raw["x"] - raw["b"]) @ raw["W"].T
    codes = (pi + gate > 0) * torch.relu(pi * r.exp() + mag)
    assert ((pi + gate > 0) != (codes > 0)).any()  # both conditions bind
    check(folder, raw, codes, format="sae_lens", said=("The gate folded",))


def test_saelens_layer_norm_of_the_input(raw, tmp_path):
    folder = sae_lens(tmp_path / "a", raw, "topk", normalize_activations="layer_norm")
    mean, std = raw["x"].mean(1, keepdim=True), raw["x"].std(1, keepdim=True)
    codes = topk(((raw["x"] - mean) / (std + 1e-5) - raw["b"]) @ raw["W"].T + raw["c"])
    expected = (codes @ raw["rows"] + raw["b"]) * std + mean
    check(folder, raw, codes, reconstruction=expected, format="sae_lens", said=("layer-normalised",))


def test_saelens_average_norm_needs_its_number(raw, tmp_path):
    folder = sae_lens(tmp_path / "a", raw, "topk", normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match="`input_scale` must be given for .*sae_weights"):
        load_sae(folder)
    codes = topk((0.37 * raw["x"] - raw["b"]) @ raw["W"].T + raw["c"])
    expected = (codes @ raw["rows"] + raw["b"]) / 0.37
    check(folder, raw, codes, reconstruction=expected, format="sae_lens", said=("input_scale 0.37",), input_scale=0.37)


def test_saelens_of_versions_before_6(raw, tmp_path):
    old = {
        "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "d_in": D,
        "d_sae": F, "hook_point": "blocks.2.hook_resid_post", "model_name": "you/lm", "normalize_activations": False,
        "dtype": "float32", "prepend_bos": True,
    }  # fmt: skip
    folder = sae_lens(tmp_path / "a", raw, "standard", tensors={"scaling_factor": torch.ones(F)})
    (folder / "cfg.json").write_text(json.dumps(old))
    codes = topk((raw["x"] - raw["b"]) @ raw["W"].T + raw["c"])
    check(folder, raw, codes, format="sae_lens", said=("'blocks.2.hook_resid_post'", "pass model="))


def test_a_batchtopk_that_saelens_saved_as_a_jumprelu_is_one_again(raw, tmp_path):
    trained = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 4.5}}
    tensors = {"threshold": torch.full((F,), 0.8)}
    folder = sae_lens(tmp_path / "a", raw, "jumprelu", tensors=tensors, metadata=trained)
    u = (raw["x"] - raw["b"]) @ raw["W"].T + raw["c"]
    loaded = check(folder, raw, torch.relu(u) * (u > 0.8), format="sae_lens", said=("0.8",))
    assert loaded.config.activation == "batchtopk" and loaded.config.k == 4.5


def test_a_batchtopk_of_saelens_trainer_has_its_running_threshold(raw, tmp_path):
    tensors = {"topk_threshold": torch.tensor(0.8, dtype=torch.double)}
    folder = sae_lens(tmp_path / "a", raw, "batchtopk", tensors=tensors, k=4, rescale_acts_by_decoder_norm=True)
    u = (raw["x"] - raw["b"]) @ raw["W"].T + raw["c"]  # rows have norm 1
    loaded, _ = load_sae(folder, dtype=torch.float32)
    assert_computes(loaded, raw["x"], torch.relu(u) * (u > 0.8), torch.relu(u) * (u > 0.8) @ raw["rows"] + raw["b"])


# sparsify


@pytest.mark.parametrize("latents", [{"num_latents": F}, {"num_latents": 0, "expansion_factor": 4, "wide": True}])
def test_sparsify(latents, raw, tmp_path):
    wide = latents.pop("wide", False)
    if wide:  # num_latents = 0 stands for d_in * expansion_factor
        raw = {**raw, **{name: torch.cat([raw[name], 0.5 * raw[name][:8]]) for name in ("W", "c", "rows")}}
    folder = tmp_path / "layers.1"
    folder.mkdir()
    tensors = {"encoder.weight": raw["W"], "encoder.bias": raw["c"], "W_dec": raw["rows"], "b_dec": raw["b"]}
    save_file(tensors, folder / "sae.safetensors")
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "k": K, "multi_topk": False,
           "skip_connection": False, "transcode": False, "d_in": D, **latents}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))
    codes = topk((raw["x"] - raw["b"]) @ raw["W"].T + raw["c"])
    loaded = check(folder, raw, codes, format="sparsify", said=("Nothing is transposed", "'layers.1'"))
    assert loaded.config.d_sae == (48 if wide else F)


def test_a_hookpoint_is_a_module_of_the_model_that_is_given(raw, tmp_path, tiny_model):
    folder = tmp_path / "layers.1.mlp"
    folder.mkdir()
    tensors = {"encoder.weight": raw["W"], "encoder.bias": raw["c"], "W_dec": raw["rows"], "b_dec": raw["b"]}
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": K, "d_in": D, "num_latents": F}))
    for family, path in (("llama", "model.layers.1.mlp"), ("gpt_neox", "gpt_neox.layers.1.mlp")):
        loaded, report = load_sae(folder, model=tiny_model(family))
        assert (loaded.config.hook_name, loaded.config.hook_io) == (path, "output")
        assert path in str(report)
    with pytest.raises(ValueError, match="`model` must have the module 'transformer.layers.1.mlp'"):
        load_sae(folder, model=tiny_model("gpt2"))


# dictionary_learning


def test_dictionary_learning_relu_has_its_rows_scaled_as_its_loader_does(raw, tmp_path):
    raw["rows"] = raw["rows"] * torch.linspace(0.2, 3, F)[:, None]
    folder = dictionary(tmp_path / "a", raw, "AutoEncoder", linear(raw, bias=raw["b"]))
    norms = raw["rows"].norm(dim=1)
    plain = torch.relu((raw["x"] - raw["b"]) @ raw["W"].T + raw["c"])
    expected = plain @ raw["rows"] + raw["b"]
    check(folder, raw, plain * norms, reconstruction=expected, format="dictionary_learning", said=("its own loader",))


def test_dictionary_learning_topk(raw, tmp_path):
    tensors = linear(raw, b_dec=raw["b"], k=torch.tensor(K), threshold=torch.tensor(-1.0))
    folder = dictionary(tmp_path / "a", raw, "AutoEncoderTopK", tensors, k=K)
    codes = topk((raw["x"] - raw["b"]) @ raw["W"].T + raw["c"])
    check(folder, raw, codes, format="dictionary_learning", said=("decoder.weight transposed", "layer_3"))


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_dictionary_learning_batchtopk_uses_its_threshold(kind, raw, tmp_path):
    others = {"b_dec": raw["b"], "k": torch.tensor(K), "threshold": torch.tensor(0.8)}
    grouped = {**others, "group_sizes": torch.tensor([8, 32])}
    tensors = linear(raw, **others) if kind == "BatchTopKSAE" else by_column(raw, **grouped)
    folder = dictionary(tmp_path / "a", raw, kind, tensors, k=K)
    u = (raw["x"] - raw["b"]) @ raw["W"].T + raw["c"]
    check(folder, raw, torch.relu(u) * (u > 0.8), format="dictionary_learning")


def test_dictionary_learning_jumprelu_subtracts_nothing(raw, tmp_path):
    folder = dictionary(tmp_path / "a", raw, "JumpReluAutoEncoder", by_column(raw, threshold=raw["theta"]))
    u = raw["x"] @ raw["W"].T + raw["c"]
    said = ("b_dec is not subtracted",)
    check(folder, raw, torch.relu(u) * (u > raw["theta"]), format="dictionary_learning", said=said)


def test_dictionary_learning_gated(raw, tmp_path):
    draw = torch.Generator().manual_seed(1)
    r, gate, mag = (0.5 * torch.randn(F, generator=draw) for _ in range(3))
    tensors = {"encoder.weight": raw["W"], "decoder.weight": raw["rows"].T.contiguous(), "decoder_bias": raw["b"],
               "r_mag": r, "gate_bias": gate, "mag_bias": mag}  # fmt: skip
    folder = dictionary(tmp_path / "a", raw, "GatedAutoEncoder", tensors)
    pi = (raw["x"] - raw["b"]) @ raw["W"].T
    codes = (pi + gate > 0) * torch.relu(r.exp() * pi + mag)
    check(folder, raw, codes, format="dictionary_learning", said=("The gate folded",))


def test_an_unset_threshold_is_told_at_the_load_and_refused_at_the_use(raw, tmp_path):
    tensors = linear(raw, b_dec=raw["b"], k=torch.tensor(K), threshold=torch.tensor(-1.0))
    folder = dictionary(tmp_path / "a", raw, "BatchTopKSAE", tensors, k=K)
    loaded, report = load_sae(folder)
    assert "threshold is unset (-1): ask for a budget" in str(report)
    with pytest.raises(ValueError, match="`threshold` must be estimated"):
        loaded(raw["x"])
    assert loaded.encode(raw["x"], k=3).values.shape == (9, 3)
    with pytest.raises(ValueError, match="`threshold` of a BatchTopK SAE must be estimated before it is written"):
        export_sae(loaded, tmp_path / "out", "sae_lens")
    assert not (tmp_path / "out").exists()


# collections


@pytest.mark.parametrize("second", [False, True])
def test_gemma_scope(second, raw, tmp_path):
    u = raw["x"] @ raw["W"].T + raw["c"]
    codes = torch.relu(u) * (u > raw["theta"])
    if second:
        folder = tmp_path / "gemma-scope-2-1b-pt" / "resid_post" / "layer_7_width_small"
        folder.mkdir(parents=True)
        lower = {name.lower(): tensor for name, tensor in by_column(raw, threshold=raw["theta"]).items()}
        save_file(lower, folder / "params.safetensors")
        cfg = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.7.output", "model_name": "google/g"}
        (folder / "config.json").write_text(json.dumps(cfg))
    else:
        folder = tmp_path / "gemma-scope-2b-pt-att" / "layer_7" / "average_l0_5"
        folder.mkdir(parents=True)
        arrays = {name: tensor.numpy() for name, tensor in by_column(raw, threshold=raw["theta"]).items()}
        numpy.savez(folder / "params.npz", **arrays)
    loaded = check(folder, raw, codes, format="gemma_scope", said=("W_enc transposed", "b_dec is not subtracted"))
    place = ("model.layers.7", "output") if second else ("model.layers.7.self_attn.o_proj", "input")
    assert (loaded.config.hook_name, loaded.config.hook_io) == place


def test_gemma_scope_of_embeddings_has_another_scale(raw, tmp_path):
    folder = tmp_path / "embedding" / "average_l0_5"
    folder.mkdir(parents=True)
    arrays = {name: tensor.numpy() for name, tensor in by_column(raw, threshold=raw["theta"]).items()}
    numpy.savez(folder / "params.npz", **arrays)
    u = raw["x"] @ raw["W"].T / D**0.5 + raw["c"]
    codes = torch.relu(u) * (u > raw["theta"])
    expected = codes @ raw["rows"] * D**0.5 + raw["b"]
    check(folder, raw, codes, reconstruction=expected, format="gemma_scope", said=("sqrt(d)",))


def test_llama_scope_scales_input_output_and_threshold(raw, tmp_path):
    folder = tmp_path / "Llama3_1-8B-Base-L5R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {"encoder.weight": raw["W"], "encoder.bias": raw["c"], "decoder.weight": raw["rows"].T.contiguous(),
               "decoder.bias": raw["b"]}  # fmt: skip
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    hyper = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.9, "hook_point_in": "blocks.1.hook_resid_post",
             "hook_point_out": "blocks.1.hook_resid_post", "dataset_average_activation_norm": {"in": 5.0}}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(hyper))
    scale = D**0.5 / 5
    u = scale * raw["x"] @ raw["W"].T + raw["c"]
    codes = torch.relu(u) * (u > 0.9 * scale)
    expected = (codes @ raw["rows"] + raw["b"]) / scale
    check(folder, raw, codes, reconstruction=expected, format="llama_scope", said=("threshold 0.9 multiplied",))


def test_qwen_scope_takes_k_from_the_name_of_its_repository(raw, tmp_path):
    folder = tmp_path / f"SAE-Res-Tiny-W1K-L0_{K}"
    folder.mkdir()
    tensors = {"W_enc": raw["W"], "W_dec": raw["rows"].T.contiguous(), "b_enc": raw["c"], "b_dec": raw["b"]}
    torch.save(tensors, folder / "layer2.sae.pt")
    codes = topk(raw["x"] @ raw["W"].T + raw["c"])
    loaded = check(folder, raw, codes, format="qwen_scope", subfolder="layer2.sae.pt")
    assert loaded.config.hook_name == "model.layers.2"
    torch.save(tensors, tmp_path / "layer2.sae.pt")
    with pytest.raises(ValueError, match="`k` must be given for .*layer2.sae.pt.*Pass k=50"):
        load_sae(tmp_path / "layer2.sae.pt")
    check(tmp_path / "layer2.sae.pt", raw, codes, format="qwen_scope", k=K)


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openai(activation, raw, tmp_path):
    tensors = {"pre_bias": raw["b"], "encoder.weight": raw["W"], "latent_bias": raw["c"],
               "decoder.weight": raw["rows"].T.contiguous(), "stats_last_nonzero": torch.zeros(F)}  # fmt: skip
    mean, std = torch.zeros(9, 1), torch.ones(9, 1)
    x = raw["x"]
    if activation == "TopK":
        tensors |= {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    torch.save(tensors, tmp_path / "sae.pt")
    u = (x - raw["b"]) @ raw["W"].T + raw["c"]
    codes = topk(u) if activation == "TopK" else torch.relu(u)
    expected = (codes @ raw["rows"] + raw["b"]) * std + mean
    check(tmp_path / "sae.pt", raw, codes, reconstruction=expected, format="openai")


# out and back


CAN = {
    "sae_lens": ["topk", "batchtopk", "jumprelu", "relu"],
    "sparsify": ["topk"],
    "dictionary_learning": ["topk", "batchtopk", "jumprelu", "relu"],
}
ROUND_TRIPS = [(to, activation) for to, activations in CAN.items() for activation in activations]


@pytest.fixture
def saved(sae, raw):
    """`saved(activation, **options)`: an SAE of ours with unit rows, a place, and a set threshold."""

    def build(activation, **options):
        options = {
            "hook_name": "model.layers.3.mlp",
            "hook_io": "input",
            "base_model_name_or_path": "you/lm",
        } | options
        model = sae(activation, **options).float()
        model.constrain_()
        if activation == "batchtopk":
            model.threshold.fill_(0.8)
        return model.eval()

    return build


@pytest.mark.parametrize(("to", "activation"), ROUND_TRIPS)
def test_a_round_trip_changes_no_bit(to, activation, saved, raw, tmp_path):
    beta = to != "dictionary_learning" or activation != "jumprelu"
    model = saved(activation, apply_b_dec_to_input=beta)
    said = export_sae(model, tmp_path / "layers.3", to).said
    assert not any("folded" in line for line in said)
    again, report = load_sae(tmp_path / "layers.3")
    assert report.format == to
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    training_alone = {"jump_threshold", "jump_bandwidth", "normalize_decoder"}
    for name in set(type(model.config).__annotations__) - training_alone - {"model_type"}:
        assert getattr(again.config, name) == getattr(model.config, name), name
    assert torch.equal(again(raw["x"]).reconstruction, model(raw["x"]).reconstruction)


@pytest.mark.parametrize("to", EXPORTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_it_is(to, dtype, saved, tmp_path):
    model = saved("topk").to(dtype)
    export_sae(model, tmp_path / "out", to)
    again, _ = load_sae(tmp_path / "out")
    assert again.W_dec.dtype == dtype
    assert torch.equal(again.encoder.weight, model.encoder.weight)


@pytest.mark.parametrize(
    ("to", "activation", "options"),
    [
        ("sae_lens", "topk", {"input_norm": "scalar", "input_scale": 0.3}),
        ("sparsify", "topk", {"input_norm": "scalar", "input_scale": 0.3}),
        ("sparsify", "topk", {"apply_b_dec_to_input": False}),
        ("dictionary_learning", "jumprelu", {"input_norm": "scalar", "input_scale": 0.3}),
        ("dictionary_learning", "relu", {"apply_b_dec_to_input": False}),
    ],
)
def test_what_a_format_cannot_say_is_folded_and_told(to, activation, options, saved, raw, tmp_path):
    model = saved(activation, **options).double()
    report = export_sae(model, tmp_path / "out", to)
    assert "folded" in str(report)
    again, _ = load_sae(tmp_path / "out")
    x = raw["x"].double()
    torch.testing.assert_close(again(x).reconstruction, model(x).reconstruction, rtol=1e-10, atol=1e-10)


def test_another_budget_is_exported_by_setting_k(saved, raw, tmp_path):
    model = saved("topk")
    expected = model(raw["x"], k=2).reconstruction
    model.config.k = 2
    export_sae(model, tmp_path / "out", "sae_lens")
    assert torch.equal(load_sae(tmp_path / "out")[0](raw["x"]).reconstruction, expected)


def test_a_layer_norm_goes_to_saelens_alone(saved, raw, tmp_path):
    model = saved("topk", input_norm="layer_norm")
    export_sae(model, tmp_path / "out", "sae_lens")
    assert torch.equal(load_sae(tmp_path / "out")[0](raw["x"]).reconstruction, model(raw["x"]).reconstruction)
    for to in ("sparsify", "dictionary_learning"):
        with pytest.raises(ValueError, match=r'input_norm="none" or "scalar" for .*got "layer_norm"'):
            export_sae(model, tmp_path / to, to)


def test_files_hold_what_each_library_reads(saved, tmp_path):
    model = saved("topk")
    export_sae(model, tmp_path / "lens", "sae_lens")
    tensors = load_file(tmp_path / "lens" / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)
    }  # fmt: skip
    cfg = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    assert cfg["architecture"] == "topk" and cfg["k"] == K and cfg["metadata"]["sae_lens_version"] >= "6"
    export_sae(model, tmp_path / "layers.3", "sparsify")
    tensors = load_file(tmp_path / "layers.3" / "sae.safetensors")
    assert torch.equal(tensors["W_dec"], model.W_dec) and torch.equal(tensors["encoder.weight"], model.encoder.weight)
    export_sae(model, tmp_path / "dl", "dictionary_learning")
    tensors = torch.load(tmp_path / "dl" / "ae.pt", weights_only=True)
    assert torch.equal(tensors["decoder.weight"], model.W_dec.T) and tensors["k"] == K and tensors["threshold"] == -1
    trainer = json.loads((tmp_path / "dl" / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["layer"], trainer["lm_name"]) == ("AutoEncoderTopK", 3, "you/lm")


def test_saebench_gets_dense_codes_in_its_own_shapes(saved, raw):
    from hf_ext.sae.formats.saebench import to_saebench

    model = saved("topk", hook_name="model.layers.3", hook_io="output")
    bench = to_saebench(model)
    u = (raw["x"] - bench.b_dec) @ bench.W_enc + bench.b_enc
    torch.testing.assert_close(bench.encode(raw["x"]), topk(u), **CLOSE)
    torch.testing.assert_close(bench.decode(bench.encode(raw["x"])), topk(u) @ bench.W_dec + bench.b_dec, **CLOSE)
    assert (bench.cfg.d_in, bench.cfg.d_sae, bench.cfg.hook_layer, bench.cfg.model_name) == (D, F, 3, "you/lm")
    with torch.no_grad():
        model.W_dec.mul_(2)
    with pytest.raises(ValueError, match="decoder rows of norm 1 .* got 40 others"):
        to_saebench(model)
    with pytest.raises(ValueError, match="`model_name` must be given"):
        to_saebench(saved("topk", base_model_name_or_path=None))


@pytest.mark.parametrize("subfolder", ["", "layers.1"])
def test_of_a_hub_repository_only_the_sae_that_is_meant_is_downloaded(subfolder, raw, tmp_path, monkeypatch):
    sae_lens(tmp_path / "repo", raw, "topk")
    sae_lens(tmp_path / "repo" / "layers.1", raw, "topk")
    names = [path.relative_to(tmp_path / "repo").as_posix() for path in (tmp_path / "repo").rglob("*.*")]
    names = [name for name in names if not name.endswith(".1")]
    asked = []

    def snapshot(repo, revision=None, allow_patterns=None, local_files_only=False):
        asked.append((repo, allow_patterns))
        return str(tmp_path / "repo")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo, revision=None: names)
    load_sae("you/saes", subfolder=subfolder)
    root = {"cfg.json", "sae_weights.safetensors"}
    assert len(asked) == 1 and asked[0][0] == "you/saes"
    assert set(asked[0][1]) == ({"layers.1", "layers.1/**"} if subfolder else root)


# the command


@pytest.mark.parametrize("to", ["hf_ext", *EXPORTS])
def test_the_command_converts_and_says_what_it_did(to, raw, tmp_path, capsys):
    folder = sae_lens(tmp_path / "in", raw, "topk", metadata={"hf_hook_name": "model.layers.2.output"})
    assert main([str(folder), str(tmp_path / "out"), "--to", to]) == 0
    said = capsys.readouterr().out
    assert "Format: sae_lens." in said and "W_enc transposed" in said and "40 latents of width 12" in said
    load = SAEModel.from_pretrained if to == "hf_ext" else lambda path: load_sae(path)[0]
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded.W_dec, raw["rows"]) and torch.equal(loaded.encoder.weight, raw["W"])
    assert loaded.config.hook_name == "model.layers.2"
    assert main([str(folder), str(tmp_path / "out"), "--to", to]) == 1
    assert "must be new or empty" in capsys.readouterr().err


def test_the_command_reads_a_model_of_ours_too(saved, tmp_path):
    from hf_ext.sae.__main__ import main as dispatch

    model = saved("topk")
    model.save_pretrained(tmp_path / "ours")
    assert dispatch(["convert", str(tmp_path / "ours"), str(tmp_path / "lens"), "--to", "sae_lens"]) == 0
    assert torch.equal(load_sae(tmp_path / "lens")[0].W_dec, model.W_dec)
    assert dispatch(["nonsense"]) == 2
