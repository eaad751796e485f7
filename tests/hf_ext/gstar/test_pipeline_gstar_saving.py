"""A saved pipeline loads where hf_ext is not installed, from a folder and from the Hub, with the same outputs.

One clean process does all that it can: starting it costs seconds.
"""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from hf_ext.gstar.modeling_error_predictor import ErrorPredictor
from hf_ext.gstar.modeling_mdlm import MDLMConfig, MDLMForMaskedLM
from hf_ext.gstar.pipeline_gstar import GStarPipeline
from hf_ext.gstar.scheduling_star_shaped import StarShapedScheduler


WORDS = ["<pad>", "<eos>", "<mask>", *"abcdefghij"]
SHAPE = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CALL = {"prompt": ["a b", "c"], "gen_length": 8, "num_inference_steps": 6, "eos_early_stop": False}


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>")


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pipeline(kind="mdlm", num_layers=1, mode="gstar_loop"):
    torch.manual_seed(0)
    if kind == "mdlm":
        denoiser = MDLMForMaskedLM(MDLMConfig(**SHAPE, mask_token_id=2, pad_token_id=0))
    else:
        denoiser = BertForMaskedLM(BertConfig(**SHAPE, intermediate_size=48))
    randomised(denoiser)
    predictor = None if num_layers is None else randomised(ErrorPredictor.from_denoiser(denoiser, num_layers))
    pipe = GStarPipeline(denoiser, StarShapedScheduler(mode=mode, t_off=0.1), tokenizer(), predictor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokens(pipe):
    return pipe(**CALL, generator=torch.Generator().manual_seed(3)).sequences.tolist()


# a pipeline of ours; one whose denoiser is transformers' own, with a head alone; one without a predictor
CASES = {"ours": {}, "bert": {"kind": "bert", "num_layers": 0}, "plain": {"num_layers": None, "mode": "star_loop"}}
CLEAN = """
import json, sys, torch
from diffusers import DiffusionPipeline

call, folders, hub = json.loads({call!r}), json.loads({folders!r}), {hub!r}

def tokens(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, generator=torch.Generator().manual_seed(3)).sequences.tolist()

report = {{}}
for name, folder in folders.items():
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    seen = report[name] = {{"tokens": tokens(pipe), "module": type(pipe).__module__}}
    seen["has_predictor"] = pipe.error_predictor is not None
    pipe.save_pretrained(folder + "-again")
    again = DiffusionPipeline.from_pretrained(folder + "-again", trust_remote_code=True)
    seen["again"] = tokens(again)
    again.save_pretrained(folder + "-again")  # into the folder that it was loaded from
without = DiffusionPipeline.from_pretrained(folders["ours"], trust_remote_code=True, error_predictor=None)
report["without"] = without.error_predictor is None
without.scheduler = without.scheduler.from_config(without.scheduler.config, mode="star_loop")
without.save_pretrained(folders["ours"] + "-without")
report["without_again"] = tokens(
    DiffusionPipeline.from_pretrained(folders["ours"] + "-without", trust_remote_code=True)
) == tokens(without)
half = DiffusionPipeline.from_pretrained(folders["ours"], trust_remote_code=True, dtype=torch.float16)
report["half"] = [str(half.denoiser.dtype), str(half.error_predictor.dtype)]
try:
    DiffusionPipeline.from_pretrained(folders["ours"])
except Exception as error:
    report["unasked"] = f"{{type(error).__name__}}: {{error}}"
pipe = DiffusionPipeline.from_pretrained(folders["ours"], trust_remote_code=True)
pipe.push_to_hub("tester/g-star")
report["hub"] = tokens(DiffusionPipeline.from_pretrained("tester/g-star", trust_remote_code=True))
print()
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name, options in CASES.items():
        folders[name] = str(tmp_path_factory.mktemp("saved") / name)
        pipeline(**options).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def clean(saved, run_python, loopback_hub):
    code = CLEAN.format(call=json.dumps(CALL), folders=json.dumps(saved), hub=loopback_hub.url)
    return json.loads(run_python(code, env=loopback_hub.env).splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_where_hf_ext_is_absent_tokens_are_the_same(name, clean):
    assert clean[name]["tokens"] == tokens(pipeline(**CASES[name]))
    assert clean[name]["module"].startswith("diffusers_modules.")
    assert clean[name]["has_predictor"] == (name != "plain")


@pytest.mark.parametrize("name", CASES)
def test_what_was_loaded_can_be_saved_and_loaded_again(name, clean):
    assert clean[name]["again"] == clean[name]["tokens"]


def test_none_in_the_place_of_a_predictor_works_and_is_saved(clean):
    assert clean["without"] and clean["without_again"]


def test_save_load_float16(clean):
    assert clean["half"] == ["torch.float16", "torch.float16"]


def test_code_that_nobody_asked_for_does_not_run(clean):
    assert "trust_remote_code" in clean["unasked"]


def test_a_pipeline_that_was_pushed_loads_from_the_hub(clean):
    assert clean["hub"] == clean["ours"]["tokens"]


def test_the_folder_names_one_file_for_each_component(saved, tmp_path):
    index = json.loads((tmp_path.__class__(saved["ours"]) / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_gstar", "GStarPipeline"]
    assert index["denoiser"] == ["modeling_mdlm", "MDLMForMaskedLM"]
    assert index["scheduler"] == ["scheduling_star_shaped", "StarShapedScheduler"]
    assert index["error_predictor"] == ["modeling_error_predictor", "ErrorPredictor"]
    assert index["tokenizer"][0] == "transformers"
    assert index["right_shift_logits"] is False


def test_save_load_local(saved):
    pipe = DiffusionPipeline.from_pretrained(saved["ours"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert tokens(pipe) == tokens(pipeline())


def test_options_of_the_pipeline_are_saved(tmp_path):
    made = pipeline(num_layers=None, mode="star_loop")
    made = GStarPipeline(**made.components, mask_token_id=3, right_shift_logits=True)
    made.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.config.mask_token_id == 3 and again.config.right_shift_logits is True


def test_a_repository_whose_parts_do_not_fit_is_refused_at_load(tmp_path):
    pipeline().save_pretrained(tmp_path)
    other = MDLMForMaskedLM(MDLMConfig(**{**SHAPE, "vocab_size": 40}))
    ErrorPredictor.from_denoiser(other, num_layers=1).save_pretrained(tmp_path / "error_predictor")
    with pytest.raises(ValueError, match="`error_predictor` must have the denoiser's vocab_size, 13, got 40"):
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_denoiser_with_remote_code_of_its_own_is_not_saved(tmp_path):
    made = pipeline(num_layers=None, mode="star_loop")
    made.denoiser.__class__ = type(
        "Llada", (MDLMForMaskedLM,), {"__module__": "transformers_modules.x.modeling_llada"}
    )
    with pytest.raises(ValueError, match="`denoiser` must be a class of transformers or hf_ext to be saved"):
        made.save_pretrained(tmp_path)
