"""Rows, sources, buffers and caches: each token comes once, in its order, and positions can be kept and taken up."""

import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file

from hf_ext.sites import Hook
from trainers.sae.cache import ActivationCache, RowBatches, TensorRows, describe, fingerprint, harvest
from trainers.sae.streaming import Chunk, ModelSource, ShuffledStream, TokenRows


PLACE = "model.layers.1.output"


@pytest.fixture
def source(lm, tokenizer, texts):
    """`source(**options)`: the tiny model over its texts."""

    def build(data=None, hooks=None, **options):
        rows = TokenRows(data or texts, tokenizer, options.pop("context_size", 32), "text")
        hooks = hooks or {PLACE: Hook("model.layers.1", "output")}
        defaults = {"rows_at_once": 3, "skip_positions": 1, "special_ids": {0}, "max_norm_ratio": None}
        return ModelSource(lm, hooks, rows, **{**defaults, **options})

    return build


class Counting:
    """A source of tokens that are numbered, in chunks of changing size."""

    def __init__(self):
        self.at = 0
        self.model = torch.nn.Linear(1, 1)

    def next(self):
        size = 5 + self.at % 4
        numbers = torch.arange(self.at, self.at + size)
        self.at += size
        return Chunk({"a": numbers[:, None].float(), "b": -numbers[:, None].float()}, numbers)

    def state(self):
        return {"at": self.at}

    def load(self, state):
        self.at = state["at"]


def test_rows_are_the_documents_end_to_end_with_an_end_between(tokenizer, texts):
    rows = TokenRows(texts, tokenizer, 32, "text")
    ids = [i for text in texts for i in [*tokenizer(text["text"]).input_ids, tokenizer.eos_token_id]]
    assert rows.take(5).flatten().tolist() == ids[: 5 * 32]
    assert rows.take(1).flatten().tolist() == ids[5 * 32 : 6 * 32]


@pytest.mark.parametrize("kind", ["list", "dataset", "stream", "input_ids"])
def test_rows_go_round_and_on_from_where_they_were(kind, tokenizer, texts):
    few = texts[:3]
    data = {
        "dataset": lambda: Dataset.from_list(few),
        "stream": lambda: IterableDataset.from_generator(lambda: iter(few)),
        "input_ids": lambda: [{"input_ids": [*tokenizer(row["text"]).input_ids, 0]} for row in few],
    }.get(kind, lambda: few)
    rows = TokenRows(data(), None if kind == "input_ids" else tokenizer, 16, "text")
    ids = [i for text in few for i in [*tokenizer(text["text"]).input_ids, 0]]
    seen = rows.take(4).flatten().tolist()
    state = json.loads(json.dumps(rows.state()))
    again = TokenRows(data(), None if kind == "input_ids" else tokenizer, 16, "text")
    again.load(state)
    for _ in range(6):
        more = rows.take(3)
        assert torch.equal(again.take(3), more)
        seen += more.flatten().tolist()
    assert seen == (ids * 5)[: len(seen)]
    assert rows.epoch >= 1


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "`train_dataset` must hold at least one row, got none"),
        ("text", TypeError, "`train_dataset` must be a dataset of rows, got str"),
        (iter([{"text": "a"}]), TypeError, "readable more than once, got an iterator"),
        ([{"txt": "a"}], ValueError, r"must have a text 'text' \(dataset_text_field\) or input_ids, got txt"),
        ([{"text": 3}], ValueError, "must have a text 'text'"),
    ],
)
def test_data_that_cannot_be_read_are_refused_at_the_door(data, error, message, tokenizer):
    with pytest.raises(error, match=message):
        TokenRows(data, tokenizer, 8, "text")


def test_empty_texts_and_special_tokens_alone_end_with_an_error_not_a_loop(source, tokenizer):
    class Bare:
        eos_token_id = None

        def __call__(self, texts):
            return type("Out", (), {"input_ids": [[] for _ in texts]})

    with pytest.raises(ValueError, match="must hold tokens, got rows that are all empty"):
        TokenRows([{"text": ""}], Bare(), 8, "text").take(1)
    with pytest.raises(ValueError, match="must leave tokens to train on, got only special tokens"):
        source([{"text": ""}]).next()


def test_texts_without_a_tokenizer_are_refused(texts):
    with pytest.raises(ValueError, match="`processing_class` must be given"):
        TokenRows(texts, None, 8, "text")


def test_special_tokens_first_positions_and_outliers_are_left_out(source, lm):
    chunk = source().next()
    ids = source().rows.take(3)
    expected = ids[:, 1:][ids[:, 1:] != 0]
    assert torch.equal(chunk.token_ids, expected)
    norms = chunk.activations[PLACE].norm(dim=1)
    ratio = float(norms.quantile(0.9) / norms.median())
    cut = source(max_norm_ratio=ratio)
    kept = cut.next()
    assert len(expected) * 0.6 < len(kept.token_ids) < len(expected)
    assert kept.activations[PLACE].norm(dim=1).max() <= ratio * cut.medians[PLACE]
    # the median is of the same rows however many go through the model at once
    assert source(max_norm_ratio=ratio, rows_at_once=1).next() and cut.medians
    other = source(max_norm_ratio=ratio, rows_at_once=1)
    other.next()
    assert other.medians == cut.medians


def test_all_hooks_keep_the_same_tokens(source):
    hooks = {"a": Hook("model.layers.0", "input"), "b": Hook("model.layers.1.mlp", "output")}
    chunk = source(hooks=hooks, max_norm_ratio=1.1).next()
    assert len(chunk.activations["a"]) == len(chunk.activations["b"]) == len(chunk.token_ids)


def test_activations_that_are_not_finite_name_the_hook_and_the_count(source, lm):
    handle = lm.model.layers[1].register_forward_hook(
        lambda m, a, out: out.clone().index_fill_(1, torch.tensor([4]), torch.nan)
    )
    try:
        with pytest.raises(FloatingPointError, match=r"in 3 of 96 tokens at hook 'model.layers.1' \(output\)"):
            source().next()
    finally:
        handle.remove()


@pytest.mark.parametrize(("batch", "capacity", "mix"), [(4, 32, 0.5), (7, 20, 0.0), (8, 8, 0.9), (5, 23, 0.3)])
def test_a_stream_serves_every_token_once_shuffled_and_places_stay_together(batch, capacity, mix):
    stream = ShuffledStream(Counting(), batch, capacity, mix, seed=0)
    served = []
    for _ in range(60):
        found = stream.next()
        assert torch.equal(found["a"], -found["b"])
        assert found["a"].shape == (batch, 1)
        served += found["a"].flatten().int().tolist()
    assert len(set(served)) == len(served)
    assert served != sorted(served)
    left = set(range(max(served))) - set(served)
    assert len(left) < capacity  # the rest is still in the buffer


def test_two_processes_share_the_batches_of_one():
    one = ShuffledStream(Counting(), 6, 32, 0.5, seed=3)
    two = [ShuffledStream(Counting(), 6, 32, 0.5, seed=3, rank=rank, world=2) for rank in range(2)]
    rows = RowBatches(TensorRows({"a": torch.randn(50, 2)}), 6, 3)
    halves = [RowBatches(rows.rows, 6, 3, rank, 2) for rank in range(2)]
    for _ in range(20):
        assert torch.equal(torch.cat([part.next()["a"] for part in two]), one.next()["a"])
        assert torch.equal(torch.cat([part.next()["a"] for part in halves]), rows.next()["a"])


@pytest.mark.parametrize("steps", [0, 1, 5, 6])
def test_a_stream_goes_on_from_its_state(steps):
    stream = ShuffledStream(Counting(), 4, 24, 0.4, seed=1)
    for _ in range(steps):
        stream.next()
    tensors, facts = stream.state()
    again = ShuffledStream(Counting(), 4, 24, 0.4, seed=1)
    again.load(({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts))))
    for _ in range(20):
        assert torch.equal(again.next()["a"], stream.next()["a"])
    other = ShuffledStream(Counting(), 5, 24, 0.4, seed=1)
    with pytest.raises(ValueError, match="the same batch in tokens, got 4 there and 5 here"):
        other.load((tensors, facts))


def test_ready_rows_come_once_a_pass_in_a_new_order_and_go_on():
    x = torch.arange(23.0)[:, None]
    batches = RowBatches(TensorRows({"x": x}), 5, seed=0)
    passes = [torch.cat([batches.next()["x"] for _ in range(4)]).flatten().tolist() for _ in range(3)]
    for one in passes:
        assert len(set(one)) == 20
    assert passes[0] != passes[1] != passes[2]
    batches.next()
    state = batches.state()
    again = RowBatches(TensorRows({"x": x}), 5, seed=0)
    again.load(state)
    for _ in range(9):
        assert torch.equal(again.next()["x"], batches.next()["x"])
    with pytest.raises(ValueError, match="the same number of rows, got 23 there and 22 here"):
        RowBatches(TensorRows({"x": x[:22]}), 5, seed=0).load(state)
    with pytest.raises(ValueError, match="at least one batch of 24 tokens, got 23"):
        RowBatches(TensorRows({"x": x}), 24, seed=0)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (
            {"a": torch.zeros(3, 2, dtype=torch.long)},
            TypeError,
            r"tensors \(N, d_in\) of floats, got \(3, 2\) for 'a'",
        ),
        ({"a": torch.zeros(3)}, TypeError, r"got \(3,\)"),
        ({"a": torch.full((3, 2), torch.nan)}, FloatingPointError, "in 3 of 3 tokens of 'a'"),
        (
            {"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)},
            ValueError,
            "as many rows for every SAE, got {'a': 3, 'b': 4}",
        ),
    ],
)
def test_ready_rows_that_are_no_activations_are_refused(tensors, error, message):
    with pytest.raises(error, match=message):
        TensorRows(tensors)


def info_of(source, dataset, **changes):
    return {**describe(source.model, source, {PLACE: 16}, torch.float32, dataset), **changes}


def test_a_cache_holds_what_the_model_gives_in_order(source, texts, tmp_path):
    one = source()
    harvest(tmp_path, one, info_of(one, texts), 300, progress=False, shard_tokens=100)
    cache = ActivationCache(tmp_path)
    assert len(cache) >= 300 and cache.widths() == {PLACE: 16}
    fresh, ids, parts = source(), [], []
    while sum(map(len, ids)) < len(cache):
        chunk = fresh.next()
        ids.append(chunk.token_ids), parts.append(chunk.activations[PLACE])
    assert torch.equal(cache.token_ids(), torch.cat(ids)[: len(cache)])
    everything = torch.cat(parts)[: len(cache)]
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(0))
    assert torch.equal(cache.gather(order)[PLACE], everything[order])
    shards = sorted(tmp_path.glob("shard-*.safetensors"))
    assert len(shards) >= 2
    assert set(load_file(shards[0])) == {PLACE, "token_ids"}
    assert len(ActivationCache(tmp_path, tokens=50)) == 50


def test_a_harvest_goes_on_after_its_last_shard_and_a_full_cache_is_left_alone(source, texts, tmp_path, monkeypatch):
    whole = source()
    harvest(tmp_path / "whole", whole, info_of(whole, texts), 300, progress=False, shard_tokens=80)

    class Stop(Exception):
        pass

    broken, calls = source(), []
    original = broken.next

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return original()

    broken.next = stop
    with pytest.raises(Stop):
        harvest(tmp_path / "parts", broken, info_of(broken, texts), 300, progress=False, shard_tokens=80)
    again = source()
    harvest(tmp_path / "parts", again, info_of(again, texts), 300, progress=False, shard_tokens=80)
    everything = torch.arange(300)
    expected = ActivationCache(tmp_path / "whole").gather(everything)[PLACE]
    assert torch.equal(ActivationCache(tmp_path / "parts").gather(everything)[PLACE], expected)
    idle = source()
    monkeypatch.setattr(idle, "next", lambda: pytest.fail("the cache was full"))
    harvest(tmp_path / "parts", idle, info_of(idle, texts), 200, progress=False)
    longer = source()
    harvest(tmp_path / "parts", longer, info_of(longer, texts), 500, progress=False)
    assert torch.equal(ActivationCache(tmp_path / "parts").gather(everything)[PLACE], expected)
    assert len(ActivationCache(tmp_path / "parts")) >= 500


def test_a_cache_of_something_else_is_refused_with_what_differs(source, texts, tmp_path, lm):
    one = source()
    harvest(tmp_path, one, info_of(one, texts), 60, progress=False)
    for name, value in (("dtype", "float16"), ("context_size", 64), ("model", {"name": "x", "fingerprint": "y"})):
        with pytest.raises(ValueError, match=f"`activation_cache` must be of the same {name}"):
            harvest(tmp_path, one, info_of(one, texts, **{name: value}), 60, progress=False)
    with pytest.raises(ValueError, match="must hold model.layers.9.output, but .* has model.layers.1.output"):
        harvest(tmp_path, one, info_of(one, texts, hooks={"model.layers.9.output": 16}), 60, progress=False)
    with pytest.raises(ValueError, match="must hold nothing, but"):
        ActivationCache(tmp_path, ["nothing"])
    with pytest.raises(ValueError, match="must be a cache of activations"):
        ActivationCache(tmp_path / "elsewhere")
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="must be the index of a cache"):
        ActivationCache(tmp_path)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(source, texts, tmp_path, monkeypatch):
    import shutil

    free = shutil._ntuple_diskusage(100, 50, 30 * 2**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    one = source()
    monkeypatch.setattr(one, "next", lambda: pytest.fail("the model ran"))
    with pytest.raises(OSError, match="needs 0.1 GiB for 1,000,000 tokens at 1 hooks, but .* has 0.0 GiB free"):
        harvest(tmp_path / "cache", one, info_of(one, texts), 1_000_000, progress=False)


def test_the_fingerprint_of_a_model_changes_with_any_weight(lm):
    before = fingerprint(lm)
    assert fingerprint(lm) == before
    with torch.no_grad():
        lm.lm_head.weight[0, 0] += 1
    try:
        assert fingerprint(lm) != before
    finally:
        with torch.no_grad():
            lm.lm_head.weight[0, 0] -= 1
