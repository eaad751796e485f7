"""Each kernel equals its reference in float64, at sizes that divide nothing, and refuses what does not fit."""

import pytest
import torch


# rows, entries a row, latents, width
SHAPES = [(7, 3, 50, 5), (1, 1, 1, 1), (13, 5, 60, 63), (5, 9, 100, 130), (3, 33, 7, 17), (0, 4, 9, 3), (6, 0, 9, 3)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def kernels(device):
    import sae_decoder

    return sae_decoder


def draw(shape, dtype, device, index=torch.int64):
    rows, k, latents, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(rows, k, generator=generator, dtype=torch.double)
    values[torch.rand(rows, k, generator=generator) < 0.2] = 0  # padding
    indices = torch.randint(latents, (rows, k), generator=generator)
    weight = torch.randn(latents, width, generator=generator, dtype=torch.double)
    grad = torch.randn(rows, width, generator=generator, dtype=torch.double)
    return (*(t.to(device, dtype) for t in (values, weight, grad)), indices.to(device, index))


def assert_near(found, expected, terms):
    """Equal up to rounding in the dtype of `found`: sums of some `terms` products of numbers below 5."""
    eps = torch.finfo(found.dtype).eps
    # the interpreter truncates to bfloat16 where a GPU rounds: twice the error; float32 sums have errors of their own
    atol = 4 * terms**0.5 * max(eps if found.dtype == torch.float64 else 2**-23, 0) * 25
    torch.testing.assert_close(found.double(), expected, rtol=2 * eps, atol=atol)


def nan_filled(monkeypatch):
    """Fresh memory holds NaN, so that a place that is never written shows."""
    original = torch.Tensor.new_empty

    def new_empty(self, *args, **options):
        fresh = original(self, *args, **options)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_equals_its_reference(shape, dtype, kernels, device, monkeypatch):
    values, weight, _, indices = draw(shape, dtype, device)
    expected = kernels.reference.decode(values.double(), indices, weight.double())
    nan_filled(monkeypatch)
    found = kernels.decode(values, indices, weight)
    assert found.dtype == dtype and found.shape == (shape[0], shape[3])
    assert_near(found, expected, shape[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_values_gradient_equals_its_reference(shape, dtype, kernels, device, monkeypatch):
    _, weight, grad, indices = draw(shape, dtype, device)
    expected = kernels.reference.values_gradient(grad.double(), indices, weight.double())
    nan_filled(monkeypatch)
    found = kernels.values_gradient(grad, indices, weight)
    assert found.dtype == dtype and found.shape == indices.shape
    assert_near(found, expected, shape[3])


def test_the_references_are_autograds_own(kernels):
    values, weight, grad, indices = draw(SHAPES[2], torch.float64, "cpu")
    matrix = torch.zeros(13, 60, dtype=torch.double)
    for row in range(13):
        for k in range(5):
            matrix[row, indices[row, k]] += values[row, k]
    torch.testing.assert_close(kernels.reference.decode(values, indices, weight), matrix @ weight)
    values.requires_grad_()
    out = kernels.reference.decode(values, indices, weight)
    (expected,) = torch.autograd.grad(out, values, grad)
    torch.testing.assert_close(kernels.reference.values_gradient(grad, indices, weight), expected)


@pytest.mark.parametrize("offsets", [[0, 0, 4, 15, 15], [0, 15], [0, 1, 2, 3, 4, 15]])
def test_rows_of_different_lengths_are_taken_by_their_offsets(offsets, kernels, device):
    values, weight, _, indices = draw((3, 5, 40, 19), torch.float64, device)
    values, indices, offsets = values.view(-1), indices.view(-1), torch.tensor(offsets, device=device)
    grad = torch.randn(len(offsets) - 1, 19, dtype=torch.double, device=device)
    for name, dense in (("decode", values), ("values_gradient", grad)):
        found = getattr(kernels, name)(dense, indices, weight, offsets)
        expected = getattr(kernels.reference, name)(dense, indices, weight, offsets)
        torch.testing.assert_close(found, expected)


def test_a_width_beyond_one_block_is_summed_block_by_block(kernels, device, monkeypatch):
    import sae_decoder.products as module

    monkeypatch.setattr(module, "_WIDEST_BLOCK", 16)
    _, weight, grad, indices = draw((3, 4, 20, 70), torch.float64, device)
    expected = kernels.reference.values_gradient(grad, indices, weight)
    torch.testing.assert_close(kernels.values_gradient(grad, indices, weight), expected)


def test_padding_is_not_read(kernels, device):
    values, weight, _, indices = draw((2, 3, 10, 6), torch.float32, device)
    values[:, 1], indices[:, 1] = 0, 9
    weight[9] = torch.nan
    indices[:, 0::2] %= 9
    assert torch.isfinite(kernels.decode(values, indices, weight)).all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_indices_and_tensors_of_any_layout_are_taken(index, kernels, device):
    values, weight, grad, indices = draw((5, 4, 30, 12), torch.float64, device, index)
    odd = [t.T.contiguous().T for t in (values, weight, grad, indices)]
    torch.testing.assert_close(kernels.decode(odd[0], odd[3], odd[1]), kernels.decode(values, indices, weight))
    found = kernels.values_gradient(odd[2], odd[3], odd[1])
    torch.testing.assert_close(found, kernels.values_gradient(grad, indices, weight))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.full((2, 3), 10)}, ValueError, r"`indices` must be in \[0, F=10\), got 10 to 10"),
        ({"indices": torch.full((2, 3), -1)}, ValueError, "got -1 to -1"),
        ({"indices": torch.zeros(2, 3)}, TypeError, "`indices` must be int32 or int64, got torch.float32"),
        ({"indices": torch.zeros(2, 4, dtype=torch.long)}, ValueError, r"shape \(R, K\), got \(2, 3\) and \(2, 4\)"),
        ({"values": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "`values` must be floats"),
        ({"weight": torch.zeros(10)}, ValueError, r"`weight` must be a matrix \(F, D\)"),
        ({"offsets": torch.tensor([0, 6])}, ValueError, r"shape \(N,\), with `offsets`"),
    ],
)
def test_what_does_not_fit_is_refused_by_decode(change, error, message, kernels, device):
    given = {"values": torch.rand(2, 3), "indices": torch.zeros(2, 3, dtype=torch.long), "weight": torch.rand(10, 4)}
    with pytest.raises(error, match=message):
        kernels.decode(**{name: tensor.to(device) for name, tensor in (given | change).items()})


def test_what_does_not_fit_is_refused_by_the_gradient_and_of_offsets(kernels, device):
    indices, weight = torch.zeros(2, 3, dtype=torch.long, device=device), torch.rand(10, 4, device=device)
    with pytest.raises(ValueError, match=r"`grad` must be \(R, D=4\) of torch.float32, got \(2, 5\)"):
        kernels.values_gradient(torch.rand(2, 5, device=device), indices, weight)
    with pytest.raises(ValueError, match="`grad` must have the 2 rows of `indices`, got 3"):
        kernels.values_gradient(torch.rand(3, 4, device=device), indices, weight)
    for offsets in ([0, 4, 2, 6], [1, 6], [0, 5]):
        with pytest.raises(ValueError, match="`offsets` must rise from 0 to the 6 entries"):
            kernels.decode(
                torch.rand(6, device=device), indices.view(-1), weight, torch.tensor(offsets, device=device)
            )


def test_an_sae_by_triton_equals_one_by_plain_torch(device, monkeypatch):
    from hf_ext.sae import SAEConfig, SAEModel, fused, hierarchical_loss, sparse_ops

    for name in ("_IMPLEMENTATIONS", "_PREFERRED"):
        monkeypatch.setattr(sparse_ops, name, dict(getattr(sparse_ops, name)))
    assert fused.register()
    torch.manual_seed(0)
    sae = SAEModel(SAEConfig(d_in=13, d_sae=90, k=5)).double().to(device)
    x, found = torch.randn(4, 13, dtype=torch.double, device=device), {}
    for name in ("triton", "reference"):
        with sparse_ops.implementation(name):
            output = sae(x)
            loss, _ = hierarchical_loss(x, output.codes, sae.W_dec, sae.b_dec)
            grads = torch.autograd.grad(loss + output.reconstruction.square().sum(), list(sae.parameters()))
            found[name] = [output.reconstruction, loss, *grads]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_large_decode_on_a_gpu_repeats_to_the_bit_and_equals_its_reference():
    import sae_decoder

    values, weight, grad, indices = draw((4096, 64, 16384, 576), torch.float32, "cuda")
    found = sae_decoder.decode(values, indices, weight)
    assert torch.equal(found, sae_decoder.decode(values, indices, weight))
    parts = zip(values.split(256), indices.split(256), strict=True)
    expected = torch.cat([sae_decoder.reference.decode(*part, weight) for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    found = sae_decoder.values_gradient(grad, indices, weight)
    parts = zip(grad.split(256), indices.split(256), strict=True)
    expected = torch.cat([sae_decoder.reference.values_gradient(*part, weight) for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
