"""Each sparse product equals its plain reference, outputs and gradients, at odd shapes and for odd codes."""

from types import SimpleNamespace

import pytest
import torch

from hf_ext.sae import SparseCodes, sparse_ops
from hf_ext.sae.sparse_ops import REFERENCE, SPARSE, Pattern, bag, pattern_of


# rows, entries a row, latents, width; the last ones are so dense that matrix products take over
SHAPES = [
    (7, 3, 200, 5),
    (1, 1, 100, 1),
    (63, 5, 500, 17),
    (0, 4, 200, 3),
    (7, 0, 60, 5),
    (13, 9, 20, 11),
    (5, 6, 4, 3),
]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64


def draw(shape, dtype=torch.double):
    rows, width, latents, d = shape
    generator = torch.Generator().manual_seed(sum(shape))
    indices = torch.randint(latents, (rows, width), generator=generator)  # with repetitions
    randn = lambda *size: torch.randn(*size, dtype=dtype, generator=generator)  # noqa: E731
    return Pattern.of_rows(indices, latents), randn(rows * width), randn(latents, d), randn(rows, d)


def dense_matrix(pattern, values):
    matrix = values.new_zeros(pattern.num_rows, pattern.num_latents)
    for row, latent, value in zip(pattern.rows, pattern.indices, values, strict=True):
        matrix[row, latent] += value
    return matrix


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ops", [REFERENCE, SPARSE], ids=["reference", "sparse"])
def test_each_product_is_the_one_of_dense_matrices(ops, shape):
    pattern, values, weight, dense = draw(shape)
    matrix = dense_matrix(pattern, values)
    torch.testing.assert_close(ops.bag(pattern, values, weight), matrix @ weight, **CLOSE)
    torch.testing.assert_close(ops.segments(pattern, values, dense), matrix.T @ dense, **CLOSE)
    expected = (dense @ weight.T)[pattern.rows, pattern.indices]
    torch.testing.assert_close(ops.dots(pattern, dense, weight), expected, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_different_lengths_are_taken_by_their_offsets(shape):
    pattern, values, weight, dense = draw(shape)
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(len(pattern.indices) + 1, (max(pattern.num_rows - 1, 0),), generator=generator).sort().values
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), ends, torch.tensor([len(pattern.indices)])])
    ragged = Pattern(pattern.indices, bounds[: pattern.num_rows + 1], pattern.num_latents)
    if pattern.num_rows == 0:
        return
    for name in ("bag", "dots", "segments"):
        arguments = (values, dense) if name == "segments" else (values if name == "bag" else dense, weight)
        found, expected = (getattr(ops, name)(ragged, *arguments) for ops in (SPARSE, REFERENCE))
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_decoder_equal_autograd_of_the_reference(shape):
    pattern, values, weight, dense = draw(shape)
    values.requires_grad_(), weight.requires_grad_()
    found = torch.autograd.grad((bag(pattern, values, weight) * dense).sum(), [values, weight])
    plain = REFERENCE.bag(pattern, values, weight)
    expected = torch.autograd.grad((plain * dense).sum(), [values, weight])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_other_dtypes_come_as_close_as_their_digits_allow(dtype, shape):
    pattern, values, weight, dense = draw(shape, torch.float32)
    eps = torch.finfo(dtype).eps
    for name, a, b in (("bag", values, weight), ("dots", dense, weight), ("segments", values, dense)):
        found = getattr(SPARSE, name)(pattern, a.to(dtype), b.to(dtype)).float()
        expected = getattr(REFERENCE, name)(pattern, a.to(dtype).double(), b.to(dtype).double()).float()
        # sums of at most 17 products of numbers below 4, each rounded once or twice
        torch.testing.assert_close(found, expected, rtol=4 * eps, atol=32 * eps)


def test_the_sort_is_made_once_and_latents_keep_the_order_of_their_tokens():
    pattern = Pattern.of_rows(torch.tensor([[2, 0], [2, 1], [0, 2]]), 4)
    places, starts = pattern.sorted
    assert places.tolist() == [1, 4, 3, 0, 2, 5]
    assert pattern.rows[places].tolist() == [0, 2, 1, 0, 1, 2]
    assert starts.tolist() == [0, 2, 3, 6, 6]
    finer = pattern.split([1, 0, 1])
    assert finer.sorted[0] is pattern.sorted[0] is places
    assert finer.rows[places].tolist() == [2, 6, 5, 0, 3, 8]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32, torch.int16])
def test_indices_of_any_integer_type_and_layout_are_taken(dtype):
    _, values, weight, _ = draw(SHAPES[0])
    indices = torch.randint(200, (3, 7)).T
    expected = bag(Pattern.of_rows(indices.contiguous(), 200), values, weight)
    codes = SparseCodes(values.view(7, 3), indices.to(dtype), 200)
    assert torch.equal(bag(pattern_of(codes), codes.values.reshape(-1), weight), expected)


def test_codes_from_elsewhere_need_values_indices_and_d_sae_alone():
    codes = SimpleNamespace(values=torch.ones(2, 3), indices=torch.arange(6).view(2, 3), d_sae=9)
    assert pattern_of(codes).indices.tolist() == list(range(6))


@pytest.mark.parametrize(("index", "said"), [(-1, "got -1 to 5"), (9, "got 0 to 9")])
def test_indices_outside_of_the_dictionary_are_refused(index, said):
    indices = torch.arange(6).view(2, 3)
    indices[0 if index < 0 else 1, 0] = index
    with pytest.raises(ValueError, match=rf"`indices` must be in \[0, d_sae=9\), {said}"):
        pattern_of(SparseCodes(torch.ones(2, 3), indices, 9))


def test_codes_check_their_shape_and_their_cuts():
    with pytest.raises(ValueError, match=r"`indices` must have the shape of `values`.*\(2, 2\) and \(2, 3\)"):
        SparseCodes(torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.long), 9)
    codes = SparseCodes(torch.tensor([[3.0, 2.0, 0.0]]), torch.tensor([[4, 4, 0]]), 6)
    assert codes.dense().tolist() == [[0, 0, 0, 0, 5, 0]]
    assert codes.l0().tolist() == [2]
    assert codes.first(1).dense().sum() == 3
    assert codes.first(0).dense().sum() == 0
    with pytest.raises(ValueError, match=r"`k` must be in \[0, 3\].*got 4"):
        codes.first(4)


def test_an_implementation_can_be_forced_registered_and_is_logged_once(caplog, monkeypatch):
    pattern, values, weight, _ = draw(SHAPES[0])
    monkeypatch.setattr(sparse_ops, "_logged", set())
    for name in ("_IMPLEMENTATIONS", "_PREFERRED"):
        monkeypatch.setattr(sparse_ops, name, dict(getattr(sparse_ops, name)))
    used = []
    spy = SPARSE._replace(bag=lambda *arguments: used.append("spy") or SPARSE.bag(*arguments))
    with caplog.at_level("INFO", logger=sparse_ops.__name__):
        bag(pattern, values, weight), bag(pattern, values, weight)
        with sparse_ops.implementation("reference"):
            bag(pattern, values, weight)
        sparse_ops.register("spy", spy, "cpu")
        bag(pattern, values, weight)
    assert used == ["spy"]
    assert [record.args for record in caplog.records] == [("cpu", "sparse"), ("cpu", "reference"), ("cpu", "spy")]
    refused = pytest.raises(ValueError, match="`name` must be one of reference, sparse, spy, got 'fast'")
    with refused, sparse_ops.implementation("fast"):
        pass
