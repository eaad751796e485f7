"""Every way to misuse LIMe says what is wrong; and its optimiser groups."""

import pytest
import torch
from transformers import StaticCache

from hf_ext.lime import LimeConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"num_attention_heads": 3}, "multiple of `num_key_value_heads`, got 3 and 2"),
        ({"head_dim": 7}, "`head_dim` must be even"),
        ({"head_dim": 0}, "`head_dim` must be at least 1"),
        ({"routing": "first"}, r"`routing_window` must be in \[1, num_hidden_layers=4\).*got None"),
        ({"routing": "last", "routing_window": 0}, "got 0"),
        ({"routing": "period", "routing_window": 4}, "got 4"),
        ({"routing_window": 2}, "must be None for routing='full', got 2"),
        ({"routing": "some"}, "routing"),
        ({"router_init": "zeros"}, "router_init"),
        ({"rms_norm_eps": 1}, "rms_norm_eps"),
        ({"router_inti": "identity"}, "Did you mean `router_init`"),
        ({"routr": 3}, "routing options are"),
        ({"n_layers": 3}, "`n_layers` is not an option of LimeConfig, got 3"),
        ({"layer_types": ["sliding_attention"] * 4}, "`sliding_window` must be given"),
        ({"sliding_window": 0}, "`sliding_window` must be at least 1"),
    ],
)
def test_a_wrong_option_is_named_before_a_model_is_built(options, message, shape):
    with pytest.raises(Exception, match=message):
        LimeConfig(**{**shape, **options})


def test_notes_of_other_tools_in_a_config_file_are_kept(tmp_path, shape):
    import json

    LimeConfig(**shape).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"some_tools_note": 1}))
    config = LimeConfig.from_pretrained(tmp_path)
    assert config.some_tools_note == 1
    file.write_text(json.dumps(json.loads(file.read_text()) | {"routing_windw": 1}))
    with pytest.raises(ValueError, match="Did you mean `routing_window`"):
        LimeConfig.from_pretrained(tmp_path)


def test_one_layer_routes_nothing(lime, tokens):
    model = lime(num_hidden_layers=1)
    assert model.model.layers[0].self_attn.router is None
    assert torch.equal(model(tokens()).logits, lime(num_hidden_layers=1, routing="none")(tokens()).logits)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_empty_input_is_refused(shape, lime):
    with pytest.raises(ValueError, match="at least one row and one token"):
        lime()(torch.zeros(shape, dtype=torch.long))


def test_neither_or_both_inputs_are_refused(lime, tokens):
    model = lime()
    with pytest.raises(ValueError, match="got neither"):
        model()
    with pytest.raises(ValueError, match="got both"):
        model(tokens(), inputs_embeds=model.model.embed_tokens(tokens()))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_infinite_keys_are_reported_with_their_layer(implementation, lime, tokens):
    model = lime(router_implementation=implementation)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="layer 2"):
        model(tokens())


def test_a_cache_of_another_model_is_refused(lime, tokens):
    other = lime(num_key_value_heads=4)(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"\(2, 2, 8\), got \(2, 4, 8\)"):
        lime()(tokens(), past_key_values=other)
    deeper = lime(num_hidden_layers=6)(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="got one of 6"):
        lime()(tokens(), past_key_values=deeper)


def test_a_static_cache_shorter_than_the_chunk_is_refused(lime, tokens):
    model = lime()
    with pytest.raises(ValueError, match="max_cache_len=9"):
        cache = StaticCache(config=model.config, max_cache_len=4)
        model(tokens()[:, :4], past_key_values=cache)
        model(tokens(), past_key_values=cache)


def test_a_router_missing_its_gradient_group_is_not_decayed(lime):
    from hf_ext.lime import lime_param_groups

    groups = {g["name"]: g for g in lime_param_groups(lime(attention_bias=True))}
    assert groups["routers"]["lr"] == 1e-2 and groups["routers"]["weight_decay"] == 0
    assert len(groups["routers"]["params"]) == 3
    assert all(p.dim() == 1 for p in groups["vectors"]["params"]) and groups["vectors"]["weight_decay"] == 0
    assert sum(len(g["params"]) for g in groups.values()) == len(list(lime(attention_bias=True).parameters()))
    with pytest.raises(ValueError, match="`router_lr` must be a number >= 0, got -1"):
        lime_param_groups(lime(), router_lr=-1)
    with pytest.raises(ValueError, match="require a gradient"):
        lime_param_groups(lime().requires_grad_(False))


def test_a_plain_trainer_takes_the_groups_by_one_argument(tmp_path, lime, tokens):
    from transformers import Trainer, TrainingArguments

    from hf_ext.lime import lime_param_groups

    model = lime().train()
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, save_strategy="no"),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": lime_param_groups(model)}),
    )
    before = model(tokens(8), labels=tokens(8)).loss.item()
    trainer.train()
    assert model(tokens(8), labels=tokens(8)).loss.item() < before
    # a linear schedule over 3 steps: after the last step every group is at 0 of its own initial rate
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-2, 1e-3, 1e-3]
