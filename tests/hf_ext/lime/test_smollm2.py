"""The main job on a real model: SmolLM2 becomes a LIMe model, is saved, loaded without hf_ext, pushed and pulled."""

import json
import os

import pytest
import torch

from hf_ext.tiny import smollm2


PROMPT = "The lighthouse keeper opened the door and saw"

pytestmark = pytest.mark.skipif(
    not (smollm2.cache_dir() / smollm2.FOLDER).is_dir() and not os.environ.get("HF_EXT_TEST_DOWNLOAD"),
    reason="SmolLM2 is not in the user's cache: `make demo` fetches it, or set HF_EXT_TEST_DOWNLOAD=1",
)


@pytest.fixture(scope="module")
def llama():
    from hf_ext import tiny

    return tiny.load("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def lime(llama):
    from hf_ext import LimeForCausalLM

    return LimeForCausalLM.from_llama(llama[0])


@pytest.fixture(scope="module")
def saved(lime, llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2-lime")
    lime.save_pretrained(folder)
    llama[1].save_pretrained(folder)
    return folder


def continue_text(model, tokenizer, new=64):
    inputs = tokenizer(PROMPT, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=new, do_sample=False)


def test_logits_do_not_differ_in_float32_nor_bfloat16(llama, lime):
    from hf_ext import LimeForCausalLM, tiny

    ids = llama[1](PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert (lime(ids).logits - llama[0](ids).logits).abs().max() == 0
        half, _ = tiny.load("smollm2", dtype="bfloat16")
        assert (LimeForCausalLM.from_llama(half)(ids).logits - half(ids).logits).abs().max() == 0


def test_64_greedy_tokens_are_equal_and_routers_are_4176_numbers(llama, lime):
    assert torch.equal(continue_text(lime, llama[1]), continue_text(*llama))
    assert sum(p.numel() for n, p in lime.named_parameters() if ".router." in n) == 4176


def test_padded_batches_and_caches_give_single_rows_tokens_and_logits(llama, lime):
    tokenizer = llama[1]
    texts = [PROMPT, "Once upon a time", "In the middle of the night, when all the others were asleep, the youngest"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    out = lime.generate(**batch, max_new_tokens=16, do_sample=False, return_dict_in_generate=True, output_logits=True)
    length = batch.input_ids.shape[1]
    for row, text in enumerate(texts):
        single = tokenizer(text, return_tensors="pt")
        for cache in (True, False):
            alone = lime.generate(
                **single,
                max_new_tokens=16,
                do_sample=False,
                use_cache=cache,
                return_dict_in_generate=True,
                output_logits=True,
            )
            new = alone.sequences[0, single.input_ids.shape[1] :]
            assert torch.equal(new, out.sequences[row, length : length + len(new)])
            a, b = (torch.stack(o.logits)[: len(new), r] for o, r in ((alone, 0), (out, row)))
            # float32 sums over other shapes, under logits of about 30
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_padded_prompt_of_one_token_has_llamas_logits_to_the_last_bit(llama, lime):
    # left out above: there a padded batch and a single row of Llama itself differ by more than 1e-4
    batch = llama[1]([PROMPT, "Once"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.equal(lime(**batch).logits, llama[0](**batch).logits)


CLEAN = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = {folder!r}
kwargs = {kwargs!r}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True, **kwargs)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32", **kwargs)
base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32", **kwargs)
tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
inputs = tokenizer({prompt!r}, return_tensors="pt")
same = bool((model.lm_head(base(**inputs).last_hidden_state) == model(**inputs).logits).all())
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
if {again!r}:
    model.save_pretrained({again!r})
print("JSON:" + json.dumps([type(config).__name__, type(model).__name__, type(base).__name__, same, ids[0].tolist()]))
"""


def test_a_process_without_hf_ext_writes_the_same_text_and_saves_the_code_again(
    llama, lime, saved, run_python, tmp_path
):
    code = CLEAN.format(folder=str(saved), kwargs={}, prompt=PROMPT, again=str(tmp_path))
    config, model, base, same, ids = json.loads(run_python(code).split("JSON:")[1])
    assert (config, model, base, same) == ("LimeConfig", "LimeForCausalLM", "LimeModel", True)
    assert ids == continue_text(lime, llama[1])[0].tolist()
    for name in ("configuration_lime.py", "modeling_lime.py"):
        assert (tmp_path / name).read_text() == (saved / name).read_text()


def test_the_same_after_push_to_and_pull_from_the_hub(llama, lime, saved, run_python, loopback_hub):
    push = f"""
from hf_ext import LimeForCausalLM
from transformers import AutoTokenizer
LimeForCausalLM.from_pretrained({str(saved)!r}).push_to_hub("tester/smollm2-lime")
AutoTokenizer.from_pretrained({str(saved)!r}).push_to_hub("tester/smollm2-lime")
from huggingface_hub import create_tag
create_tag("tester/smollm2-lime", tag="v1")
"""
    run_python(push, env=loopback_hub.env, block=())
    code = CLEAN.format(folder="tester/smollm2-lime", kwargs={"revision": "v1"}, prompt=PROMPT, again="")
    *names, same, ids = json.loads(run_python(code, env=loopback_hub.env).split("JSON:")[1])
    assert names == ["LimeConfig", "LimeForCausalLM", "LimeModel"] and same
    assert ids == continue_text(lime, llama[1])[0].tolist()


def test_the_bundled_routers_fit_and_change_the_model(llama, lime):
    from hf_ext import LimeForCausalLM, tiny

    routed = LimeForCausalLM.from_llama(llama[0])
    routers = tiny.lime_routers()
    missing, unexpected = routed.load_state_dict(routers, strict=False)
    assert not unexpected and not any(".router." in name for name in missing)
    assert sum(r.numel() for r in routers.values()) == 4176
    ids = llama[1](PROMPT, return_tensors="pt").input_ids
    assert not torch.allclose(routed(ids).logits, lime(ids).logits, atol=0.1)
