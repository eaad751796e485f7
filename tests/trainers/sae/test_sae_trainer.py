"""Training works on texts, tensors and caches; several SAEs learn what each alone does; a stopped run goes on."""

import json
from functools import partial

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file

from hf_ext import SAEModel, hierarchical_loss
from hf_ext.record import record
from hf_ext.sae.metrics import reconstruction_metrics
from hf_ext.sites import Hook


def weights(trainer):
    return {f"{n}.{k}": t.clone() for n, s in trainer.saes.items() for k, t in s.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def planted(rows=4096, d=16, latents=24, active=2, seed=0):
    """Activations that are sums of a few of some directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(latents, d, generator=generator), dim=1)
    chosen = torch.rand(rows, latents, generator=generator).topk(active).indices
    amounts = 1 + torch.rand(rows, active, 1, generator=generator)
    return (amounts * directions[chosen]).sum(1), directions


def test_an_sae_learns_the_directions_that_activations_are_made_of(trainer, config):
    x, directions = planted()
    run = trainer(config(d_sae=48, k=2), x, {"model": None}, num_train_epochs=20, learning_rate=1e-2)
    before = reconstruction_metrics(run.saes["sae"], x)["ev_global"]
    run.train()
    sae = run.saes["sae"].eval()
    assert reconstruction_metrics(sae, x)["ev_global"] > max(0.95, before)
    found = (directions @ sae.W_dec.T).max(1).values
    assert (found > 0.9).float().mean() > 0.8


def test_texts_are_read_as_the_activations_that_a_plain_hook_sees(trainer, lm, tokenizer, texts):
    run = trainer(buffer_tokens=64, buffer_mix=0.0)
    batch = run.batches.next()["model.layers.1.output"]
    ids = [i for text in texts for i in [*tokenizer(text["text"]).input_ids, tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: 3 * 32]).view(3, 32)
    with torch.no_grad(), record(lm, {"h": Hook("model.layers.1", "output")}) as seen:
        lm(rows)
    keep = rows != tokenizer.eos_token_id
    keep[:, 0] = False
    expected = seen["h"][0][keep][:64]
    assert torch.equal(batch.sort(dim=0).values, expected.sort(dim=0).values)


def test_several_saes_in_one_pass_become_what_each_becomes_alone(trainer, config):
    saes = {
        "small": config(d_sae=32, k=2),
        "layers.0/k4": config(hook_name="model.layers.0.mlp"),
        "jump": config(activation="jumprelu", k=None, jump_threshold=0.1, jump_bandwidth=0.1),
    }
    torch.manual_seed(0)
    starts = {name: SAEModel(one) for name, one in saes.items()}
    copies = {name: {k: v.clone() for k, v in one.state_dict().items()} for name, one in starts.items()}
    together = trainer(starts, sparsity_coefficient=0.01)
    together.train()
    for name, one in saes.items():
        alone = SAEModel(one)
        alone.load_state_dict(copies[name])
        run = trainer({name: alone}, sparsity_coefficient=0.01)
        run.train()
        for key, tensor in run.saes[name].state_dict().items():
            assert torch.equal(tensor, together.saes[name].state_dict()[key]), (name, key)


@pytest.mark.parametrize(
    ("options", "sae"),
    [
        ({"loss": "hierarchical"}, {}),
        ({"loss": "hierarchical", "budgets": "powers_of_two"}, {}),
        ({"loss": "multi_topk"}, {}),
        ({"loss": "matryoshka", "groups": [16, 32]}, {}),
        ({}, {"activation": "batchtopk", "k": 3.5}),
        ({"sparsity_coefficient": 0.01}, {"activation": "relu", "k": None}),
        ({}, {"input_norm": "layer_norm"}),
        ({}, {"input_norm": "scalar"}),
    ],
)
def test_every_loss_and_activation_trains_and_lowers_the_error(options, sae, trainer, config):
    run = trainer(config(**sae), max_steps=30, **options)
    run.train()
    first, last = (entry for entry in run.state.log_history if "fvu" in entry and entry["step"] in (5, 30))
    assert last["fvu"] < first["fvu"]
    assert {"l0", "auxk", "dead_fraction", "num_tokens", "tokens_per_second", "grad_norm"} <= last.keys()
    assert last["num_tokens"] == 30 * 64
    norms = run.saes["sae"].W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_hierarchical_loss_is_what_is_minimised(trainer, config):
    run = trainer(max_steps=1, loss="hierarchical", auxk_coefficient=0.0, logging_steps=1)
    run.begin()
    state = run.batches.state()
    x = run.batches.next()["model.layers.1.output"]
    run.batches.load(state)
    sae = run.saes["sae"]
    expected = hierarchical_loss(x, sae.encode(x), sae.W_dec, sae.b_dec)[0] / x.var(0, correction=0).mean()
    run.train()
    (entry,) = (entry for entry in run.state.log_history if "fvu" in entry)
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-5)  # float32


def test_each_sae_may_have_a_loss_of_its_own(trainer, config):
    calls = []

    def spy(*arguments):
        calls.append(arguments[1].k)
        return hierarchical_loss(*arguments, budgets=[2, 4])

    loss_funcs = {"b": spy, "c": "multi_topk"}
    saes = {name: config() for name in "abc"}
    run = trainer(saes, more={"loss_funcs": loss_funcs}, max_steps=2)
    run.train()
    assert calls == [4, 4]
    partial_one = trainer(more={"loss_funcs": partial(hierarchical_loss, budgets=[1])}, max_steps=1)
    partial_one.train()


def test_dead_latents_are_counted_and_learn_by_auxk_alone(trainer, config):
    def dying():
        torch.manual_seed(0)
        sae = SAEModel(config(d_sae=32, k=2))
        with torch.no_grad():
            sae.encoder.bias[:16] = -1.5  # now and then above 0, rarely among the two largest
        return sae

    x, _ = planted()
    start, last, moved = dying(), {}, {}
    for coefficient in (0.0, 1 / 32):
        schedule = {"max_steps": 300, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
        options = {"dead_after_tokens": 256, "auxk_coefficient": coefficient, "logging_steps": 30}
        run = trainer(dying(), x, {"model": None}, **schedule, **options)
        run.train()
        last[coefficient] = [entry["dead_fraction"] for entry in run.state.log_history if "dead_fraction" in entry][-1]
        since, sae = run.tokens_since_fired["sae"], run.saes["sae"]
        never = since == 300 * 64
        moved[coefficient] = (sae.encoder.weight - start.encoder.weight).abs().amax(1)[never]
        assert (since >= 256).float().mean() == pytest.approx(last[coefficient], abs=2 / 32)
    assert len(moved[0.0]) > 4 and not moved[0.0].any()
    assert last[1 / 32] < last[0.0] - 0.05


class Stop(Exception):
    pass


def interrupted(make, at):
    """Train `make()` until step `at`, where it is stopped after its checkpoint; then a new one to the end."""
    from transformers import TrainerCallback

    class Halt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == at + 2:
                raise Stop

    first = make()
    first.add_callback(Halt())
    with pytest.raises(Stop):
        first.train()
    again = make()
    again.train(resume_from_checkpoint=True)
    return again


@pytest.mark.parametrize("kind", ["list", "dataset", "stream", "tensor", "cache", "norms"])
def test_an_interrupted_run_goes_on_to_the_same_bits(kind, trainer, config, texts, tmp_path):
    data = {
        "dataset": Dataset.from_list(texts),
        "stream": IterableDataset.from_generator(lambda: iter(texts)),
        "tensor": planted(200)[0],
    }.get(kind, texts)
    more = {"model": None} if kind == "tensor" else {}
    options = {"save_strategy": "steps", "save_steps": 7, "max_steps": 23, "dead_after_tokens": 200}
    if kind == "cache":
        options |= {"activation_cache": str(tmp_path / "cache"), "cache_tokens": 500}
    if kind == "norms":
        options |= {"max_norm_ratio": 1.2, "gradient_accumulation_steps": 2}
    sae = {"a": config(), "b": config(activation="batchtopk", k=3.5)} if kind != "tensor" else config()

    def make(name):
        return trainer(sae, data, more, output_dir=str(tmp_path / name), **options)

    straight = make("straight")
    straight.train()
    resumed = interrupted(lambda: make("interrupted"), 14)
    assert_same(weights(resumed), weights(straight))
    assert_same(resumed.tokens_since_fired, straight.tokens_since_fired)
    # Trainer's own means of a log entry begin anew with a resumed run; the next whole window is the same
    last = [next(e for e in run.state.log_history if e["step"] == 20 and "loss" in e) for run in (resumed, straight)]
    for key in ("loss", "epoch", "num_tokens", *(key for key in last[0] if key.endswith("fvu"))):
        assert last[0][key] == last[1][key]


def test_a_checkpoint_loads_as_a_model_and_holds_no_half_file(trainer, tmp_path):
    run = trainer(save_strategy="steps", save_steps=5)
    run.train()
    folder = tmp_path / "run" / "checkpoint-10"
    sae = SAEModel.from_pretrained(folder)
    assert_same(sae.state_dict(), run.saes["sae"].state_dict())
    assert {"modeling_sae.py", "sae_state.json", "sae_state.safetensors", "optimizer.pt"} <= {
        path.name for path in folder.iterdir()
    }
    assert not list((tmp_path / "run").glob(".*part"))
    # the buffer is the largest thing in it
    tensors = load_file(folder / "sae_state.safetensors")
    assert tensors["stream.buffer.model.layers.1.output"].shape == (256, 16)


def test_an_error_in_the_midst_of_a_save_leaves_the_last_checkpoint(trainer, tmp_path, monkeypatch):
    run = trainer(save_strategy="steps", save_steps=5)
    original = run._save_rng_state

    def fail(folder):
        if "checkpoint-10" in str(folder):
            raise OSError("disk full")
        original(folder)

    monkeypatch.setattr(run, "_save_rng_state", fail)
    with pytest.raises(OSError, match="disk full"):
        run.train()
    assert (tmp_path / "run" / "checkpoint-5").is_dir()
    assert not (tmp_path / "run" / "checkpoint-10").exists()


def test_b_dec_starts_as_the_mean_and_a_scale_is_estimated(trainer, config):
    run = trainer(config(input_norm="scalar"))
    state = run.batches.state()
    x = run.batches.next()["model.layers.1.output"]
    run.batches.load(state)
    run.begin()
    sae = run.saes["sae"]
    scale = 4 / x.norm(dim=1).mean()  # sqrt(d_in) over the mean norm
    assert sae.config.input_scale == pytest.approx(scale.item(), rel=1e-6)
    torch.testing.assert_close(sae.b_dec.data, (scale * x).mean(0))
    kept = trainer(config(), init_b_dec=False)
    kept.begin()
    assert not kept.saes["sae"].b_dec.any()


def test_evaluation_measures_held_out_tokens_and_takes_each_once(trainer, texts, lm):
    run = trainer(more={"eval_dataset": texts[:5]}, eval_strategy="steps", eval_steps=5)
    run.train()
    entries = [entry for entry in run.state.log_history if "eval_ev_global" in entry]
    assert [entry["step"] for entry in entries] == [5, 10]
    assert entries[1]["eval_ev_global"] > entries[0]["eval_ev_global"] - 0.2
    assert {f"eval_ev_global_at_{k}" for k in (1, 2, 4)} <= entries[0].keys()
    assert entries[0]["eval_ev_global_at_4"] == pytest.approx(entries[0]["eval_ev_global"], abs=1e-6)
    assert entries[0]["eval_tokens"] < 400  # five short texts, not eval_tokens of them over again
    assert run.saes["sae"].training


def test_the_best_checkpoint_can_be_loaded_at_the_end(trainer, texts):
    options = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "ev_global", "greater_is_better": True}
    run = trainer(more={"eval_dataset": texts[:5]}, **options, **best)
    run.train()
    path = run.state.best_model_checkpoint
    assert_same(SAEModel.from_pretrained(path).state_dict(), run.saes["sae"].state_dict())


def test_the_models_own_weights_and_mode_are_left_alone(trainer, lm):
    before = {name: p.clone() for name, p in lm.named_parameters()}
    trainer().train()
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in lm.named_parameters())
    assert not any(module._forward_hooks for module in lm.modules())


def test_the_model_runs_no_further_than_the_hook(trainer, lm):
    ran = []
    handle = lm.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    try:
        trainer(max_steps=2).train()
    finally:
        handle.remove()
    assert not ran


def test_the_card_names_saes_options_and_figures(trainer, config, texts, tmp_path):
    saes = {"k4": config(), "k2": config(k=2)}
    run = trainer(saes, more={"eval_dataset": texts[:5]}, eval_strategy="steps", eval_steps=10, loss="hierarchical")
    run.train()
    run.create_model_card("tiny-saes", dataset_name="words")
    text = (tmp_path / "run" / "README.md").read_text()
    assert "| k4 | model.layers.1 (output) | topk | 16 | 48 | 4 |" in text
    assert 'subfolder="k4"' in text and "640 tokens in 10 steps of words" in text
    assert "| k2 | ev_global_at_2 |" in text and "| loss | hierarchical |" in text
    assert "arxiv:2505.24473" in text


PUSH = """
import torch
from hf_ext import SAEConfig
from trainers.sae import SAETrainer, SAETrainingArguments

torch.manual_seed(0)
args = SAETrainingArguments(
    "out", num_train_epochs=1, per_device_train_batch_size=64, use_cpu=True, push_to_hub=True, disable_tqdm=True,
    hub_model_id="tester/sae-trained", save_strategy="no", report_to="none",
)
trainer = SAETrainer(sae={"a": SAEConfig(d_in=8, d_sae=20, k=3), "b": SAEConfig(d_in=8, d_sae=30, k=3)}, args=args,
                     train_dataset=torch.randn(256, 8))
trainer.train()
trainer.push_to_hub()
print(trainer.saes["b"](torch.ones(8)).reconstruction.tolist())
"""
PULL = """
import torch
from huggingface_hub import ModelCard, list_repo_files
from transformers import AutoModel
sae = AutoModel.from_pretrained("tester/sae-trained", subfolder="b", trust_remote_code=True)
assert type(sae).__module__.startswith("transformers_modules")
assert "sparse-autoencoder" in ModelCard.load("tester/sae-trained").data.tags
assert not [name for name in list_repo_files("tester/sae-trained") if name.endswith((".bin", ".pt"))]
print(sae(torch.ones(8)).reconstruction.tolist())
"""


def test_a_pushed_run_is_loaded_where_hf_ext_is_absent(run_python, loopback_hub):
    pushed = run_python(PUSH, env=loopback_hub.env, block=()).splitlines()[-1]
    pulled = run_python(PULL, env=loopback_hub.env).splitlines()[-1]
    assert json.loads(pulled) == json.loads(pushed)
