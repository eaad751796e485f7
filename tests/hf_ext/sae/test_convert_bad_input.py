"""Foreign files that are unsafe, damaged or of another function are refused in a sentence, before anything runs."""

import json
import os
import pickle
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save_file

from hf_ext.sae.convert import export_sae, load_sae, main, read_tensors


D, F, K = 12, 40, 5


class Payload:
    """Unpickling one runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def lens(tmp_path):
    """`lens(name="a", tensors={}, **cfg)` -> a SAELens folder, some things of which are changed (None: left out)."""

    def write(name="a", tensors=None, **cfg):
        torch.manual_seed(0)
        plain = {
            "W_enc": torch.randn(D, F),
            "b_enc": torch.randn(F),
            "W_dec": torch.randn(F, D),
            "b_dec": torch.randn(D),
        }
        folder = tmp_path / name
        folder.mkdir()
        found = {**plain, **(tensors or {})}
        save_file({n: t for n, t in found.items() if t is not None}, folder / "sae_weights.safetensors")
        settings = {
            "architecture": "topk",
            "d_in": D,
            "d_sae": F,
            "k": K,
            "metadata": {"sae_lens_version": "6.1"},
            **cfg,
        }
        (folder / "cfg.json").write_text(json.dumps({n: v for n, v in settings.items() if v is not None}))
        return folder

    return write


@pytest.fixture
def sparsify(tmp_path):
    def write(tensors=None, **cfg):
        plain = {"encoder.weight": torch.randn(F, D), "encoder.bias": torch.randn(F), "W_dec": torch.randn(F, D),
                 "b_dec": torch.randn(D)}  # fmt: skip
        folder = tmp_path / "layers.1"
        folder.mkdir()
        save_file({**plain, **(tensors or {})}, folder / "sae.safetensors")
        settings = {"activation": "topk", "d_in": D, "num_latents": F, "k": K, **cfg}
        (folder / "cfg.json").write_text(json.dumps({n: v for n, v in settings.items() if v is not None}))
        return folder

    return write


# unsafe


@pytest.mark.parametrize("name", ["ae.pt", "ae.pth", "ae.bin", "ae.safetensors", "ae.npz"])
@pytest.mark.parametrize("by", ["pickle", "torch"])
def test_a_hidden_pickle_runs_nothing_whatever_its_name(name, by, tmp_path):
    payload = {"W_enc": torch.zeros(2, 2), "extra": Payload(tmp_path / "ran")}
    if by == "torch":
        torch.save(payload, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match=name):
        read_tensors(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_an_array_of_objects_in_an_npz_is_refused_by_its_name(tmp_path):
    numpy.savez(tmp_path / "params.npz", W_enc=numpy.zeros((2, 2)), b_enc=numpy.array([Payload(tmp_path / "ran")]))
    with pytest.raises(ValueError, match="'b_enc' in .*params.npz must be an array of numbers.*could run code"):
        read_tensors(tmp_path / "params.npz")
    assert not (tmp_path / "ran").exists()


def test_a_whole_module_that_was_pickled_is_refused_with_what_to_do(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "sae.pt")
    with pytest.raises(ValueError, match="could run code. Ask for safetensors"):
        load_sae(tmp_path / "sae.pt")


def test_what_is_read_safely_comes_with_its_plain_values(tmp_path):
    torch.save({"W": torch.ones(2), "activation": "TopK", "state": {"k": 3}}, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")
    assert found["activation"] == "TopK" and found["state"] == {"k": 3} and torch.equal(found["W"], torch.ones(2))
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(ValueError, match="must hold a dict of tensors, got list"):
        read_tensors(tmp_path / "b.pt")


# damaged


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.npz"])
def test_a_truncated_file_is_called_damaged(name, share, tmp_path):
    tensors = {"W_enc": torch.randn(30, 20), "b_enc": torch.randn(20)}
    if name.endswith("npz"):
        numpy.savez(tmp_path / name, **{key: tensor.numpy() for key, tensor in tensors.items()})
    elif name.endswith("pt"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="must be (a whole|an archive).*ownload it again"):
        read_tensors(tmp_path / name)


def test_an_npz_whose_array_is_damaged_names_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00 nothing")
    with pytest.raises(ValueError, match="'W_enc' in .*params.npz"):
        read_tensors(tmp_path / "params.npz")


@pytest.mark.parametrize(
    ("path", "message"), [("none.pt", "there is none. Check the path"), ("weights.h5", "must end in .safetensors")]
)
def test_a_missing_file_and_an_unknown_kind_are_named(path, message, tmp_path):
    (tmp_path / "weights.h5").touch()
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_tensors(tmp_path / path)


def test_a_damaged_settings_file_is_named(lens):
    folder = lens()
    (folder / "cfg.json").write_text('{"k": ')
    with pytest.raises(ValueError, match="cfg.json must be a whole JSON file"):
        load_sae(folder)


def test_weights_with_nan_are_refused(lens):
    with pytest.raises(ValueError, match="encoder.bias of .* must be finite, got NaN"):
        load_sae(lens(tensors={"b_enc": torch.full((F,), torch.nan)}))


# settings and weights


@pytest.mark.parametrize(
    ("tensors", "cfg", "message"),
    [
        ({}, {"d_in": 13}, r"`d_in` of .* must be the width of its tensors, 12 .*got 13"),
        ({}, {"d_sae": 41}, r"`d_sae` of .* 40 .*got 41"),
        ({"W_enc": torch.randn(D, F + 1)}, {}, r"encoder.weight of .* must have shape \(40, 12\), got \(41, 12\)"),
        ({"b_enc": torch.randn(F + 1)}, {}, r"encoder.bias of .* must have shape \(40,\), got \(41,\)"),
        ({"b_dec": torch.randn(F)}, {}, r"b_dec of .* must have shape \(12,\)"),
        ({"W_dec": torch.randn(F)}, {}, "W_dec in .* must be a matrix"),
        ({"b_enc": None}, {}, "lacks b_enc; it has .*W_enc"),
        ({}, {"k": None}, "`k` must be in cfg.json or be given, got neither.*Pass k="),
        ({}, {"architecture": "jumprelu"}, "lacks threshold"),
        ({}, {"architecture": "transcoder"}, "must hold an autoencoder, got a transcoder"),
        ({}, {"architecture": "jumprelu_skip_transcoder"}, "got a transcoder .jumprelu_skip_transcoder"),
        ({}, {"architecture": "matching_pursuit"}, "got 'matching_pursuit', whose function SAEModel does not have"),
        ({}, {"normalize_activations": "constant_norm_rescale"}, "got 'constant_norm_rescale'"),
        ({"scaling_factor": torch.full((F,), 2.0)}, {}, "scaling_factor in .* must be 1"),
    ],
)
def test_what_is_wrong_with_a_saelens_folder_is_said(tensors, cfg, message, lens):
    with pytest.raises(ValueError, match=message):
        load_sae(lens(tensors=tensors, **cfg))


def test_a_missing_k_can_be_given_and_must_fit(lens):
    folder = lens(k=None)
    assert load_sae(folder, k=3)[0].config.k == 3
    with pytest.raises(Exception, match=r"`k` must be in \[1, d_sae=40\]"):
        load_sae(folder, k=41)


@pytest.mark.parametrize(
    ("tensors", "cfg", "message"),
    [
        ({}, {"k": None}, "`k` must be in .*cfg.json or be given, got neither"),
        ({}, {"activation": "groupmax"}, "`activation` in .* must be topk, got 'groupmax'"),
        ({}, {"signed": True}, "got 'signed'"),
        ({}, {"transcode": True}, "got a transcoder .transcode"),
        ({"W_skip": torch.randn(D, D)}, {"skip_connection": True}, "got a transcoder .W_skip"),
        ({"W_dec": torch.randn(D, F)}, {}, r"`d_in` of .* must be the width of its tensors, 40 .*got 12"),
    ],
)
def test_what_is_wrong_with_a_sparsify_folder_is_said(tensors, cfg, message, sparsify):
    with pytest.raises(ValueError, match=message):
        load_sae(sparsify(tensors=tensors, **cfg))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "IdentityDict"}, "`dict_class` in .* must be one of AutoEncoder.*got 'IdentityDict'"),
        ({"dict_class": "Transcoder"}, "got a transcoder"),
        ({}, "must hold .*dict_class"),
    ],
)
def test_what_is_wrong_with_a_dictionary_is_said(trainer, message, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(ValueError, match=message):
        load_sae(tmp_path)


def test_what_gemma_scope_has_besides_and_another_width_are_refused(tmp_path):
    arrays = {"W_enc": numpy.zeros((D, F)), "W_dec": numpy.zeros((F, D)), "b_enc": numpy.zeros(F),
              "b_dec": numpy.zeros(D), "threshold": numpy.zeros(F)}  # fmt: skip
    for name, message in (
        ("gemma-scope-2b-pt-transcoders/layer_3", "got a transcoder"),
        ("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_5", "of width_16k, as its name says, got 40 latents"),
    ):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        numpy.savez(folder / "params.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            load_sae(folder)


def test_a_transcoder_of_llama_scope_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    tensors = {"encoder.weight": torch.zeros(F, D), "encoder.bias": torch.zeros(F),
               "decoder.weight": torch.zeros(D, F), "decoder.bias": torch.zeros(D)}  # fmt: skip
    save_file(tensors, tmp_path / "checkpoints" / "final.safetensors")
    hyper = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.9, "dataset_average_activation_norm": {"in": 5.0},
             "hook_point_in": "blocks.1.ln2.hook_normalized", "hook_point_out": "blocks.1.hook_mlp_out"}  # fmt: skip
    (tmp_path / "hyperparams.json").write_text(json.dumps(hyper))
    with pytest.raises(ValueError, match="got a transcoder .blocks.1.ln2.hook_normalized to blocks.1.hook_mlp_out"):
        load_sae(tmp_path)
    del hyper["dataset_average_activation_norm"]
    (tmp_path / "hyperparams.json").write_text(json.dumps(hyper))
    with pytest.raises(ValueError, match="must hold 'dataset_average_activation_norm'"):
        load_sae(tmp_path)


# the door


def test_a_folder_of_no_format_is_told_with_what_is_in_it(tmp_path, sae):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        ValueError, match="in one of the formats sae_lens, .*with notes.txt. Name the SAE's own folder"
    ):
        load_sae(tmp_path)
    sae("topk").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="It is a model of ours: SAEModel.from_pretrained loads it"):
        load_sae(tmp_path / "ours")
    with pytest.raises(ValueError, match="`subfolder` must be in .*got 'layers.9'"):
        load_sae(tmp_path, subfolder="layers.9")
    with pytest.raises(ValueError, match="`source` must be a folder, a file or a Hub id, got 'no/such/place'"):
        load_sae("no/such/place")
    with pytest.raises(ValueError, match="`format` must be one of sae_lens.*got 'saelens'"):
        load_sae(tmp_path, format="saelens")


def test_a_file_of_another_format_than_named_says_what_it_lacks(lens):
    folder = lens()
    with pytest.raises(ValueError, match="sae.safetensors"):
        load_sae(folder, format="sparsify")


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_what_sparsify_does_not_have_is_refused(activation, sae, tmp_path):
    with pytest.raises(ValueError, match=f'`sae` must have activation="topk" for sparsify, got {activation!r}'):
        export_sae(sae(activation), tmp_path / "out", "sparsify")
    assert not list(tmp_path.iterdir())


def test_export_refuses_other_models_formats_and_full_folders(sae, tmp_path, tiny_model):
    with pytest.raises(ValueError, match="`to` must be one of sae_lens, sparsify, dictionary_learning, got 'gemma"):
        export_sae(sae("topk"), tmp_path / "out", "gemma_scope")
    with pytest.raises(ValueError, match="`sae` must be an SAEModel .* got LlamaForCausalLM"):
        export_sae(tiny_model("llama"), tmp_path / "out", "sae_lens")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="`folder` must be new or empty"):
        export_sae(sae("topk"), tmp_path / "full", "sae_lens")


def test_the_command_says_errors_in_a_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "`source` must be" in said.err and "Traceback" not in said.err
    assert not (tmp_path / "out").exists()
