"""The paper's toy on digits (Sec. 3.2): a search over the singular values of one update follows gradient descent.

Logistic regression, trained on the digits 0 to 5. A few supervised steps on 6 to 9 give an update dW = U diag(s) V^T;
then only offsets of s are learned, by evolution or by gradient descent, on the same minibatches.
"""

import numpy as np
import pytest
import torch

from trainers.essa.strategies import SepCMAES


datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is in the dev extra")
POPULATION, BATCH, GENERATIONS = 24, 64, 100


def descend(weight, x, y, steps, lr):
    """`weight` [10, 65] after steps of gradient descent on the cross-entropy of all of x."""
    weight = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x @ weight.T, y).backward()
        optimizer.step()
    return weight.detach()


@pytest.fixture(scope="module")
def toy():
    """(weight before, U, s, V^T of the update, training and held-out images of 6 to 9)."""
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.from_numpy(np.c_[images / 16, np.ones(len(images))])
    y = torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    old, new = y <= 5, y > 5
    weight = descend(torch.zeros(10, x.shape[1], dtype=torch.float64), x[old], y[old], steps=200, lr=0.05)
    x, y = x[new], y[new]
    update = descend(weight, x[:40], y[:40], steps=4, lr=0.05) - weight
    return weight, *torch.linalg.svd(update, full_matrices=False), (x[:400], y[:400]), (x[400:], y[400:])


def loss(weight, x, y):
    return torch.nn.functional.cross_entropy(x @ weight.T, y)


def batches(seed, x):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(len(x), generator=generator)[:BATCH] for _ in range(GENERATIONS)]


def evolved(weight, U, s, Vt, x, y, seed):
    """The weight that the search ends with; nothing but losses of minibatches goes into it."""
    strategy = SepCMAES(len(s), POPULATION, sigma=0.3 * float(s.mean()), seed=seed)

    def at(offset):
        return weight + (U * (s + torch.from_numpy(offset))) @ Vt

    for rows in batches(seed, x):
        strategy.tell([-float(loss(at(offset), x[rows], y[rows])) for offset in strategy.ask()])
    return at(strategy.mean)


def by_gradients(weight, U, s, Vt, x, y, seed):
    """The same offsets by gradient descent on the same minibatches."""
    offset = torch.zeros_like(s).requires_grad_()
    optimizer = torch.optim.Adam([offset], lr=0.3)
    for rows in batches(seed, x):
        optimizer.zero_grad()
        loss(weight + (U * (s + offset)) @ Vt, x[rows], y[rows]).backward()
        optimizer.step()
    return weight + (U * (s + offset.detach())) @ Vt


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evolution_of_singular_values_follows_gradient_descent(toy, seed):
    weight, U, s, Vt, train, held_out = toy
    before = float(loss(weight + (U * s) @ Vt, *held_out))
    descent = float(loss(by_gradients(weight, U, s, Vt, *train, seed), *held_out))
    evolution = float(loss(evolved(weight, U, s, Vt, *train, seed), *held_out))
    assert descent < 0.2 * before  # five nats, so that what seeds differ by is small beside the way there is
    assert before - evolution >= 0.95 * (before - descent)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_from_random_bases_the_search_lags(toy, seed):
    weight, U, s, Vt, train, held_out = toy
    generator = torch.Generator().manual_seed(seed)
    random_U = torch.linalg.qr(torch.randn(U.shape, dtype=U.dtype, generator=generator)).Q
    random_Vt = torch.linalg.qr(torch.randn(Vt.T.shape, dtype=U.dtype, generator=generator)).Q.T
    ours = float(loss(evolved(weight, U, s, Vt, *train, seed), *held_out))
    theirs = float(loss(evolved(weight, random_U, s, random_Vt, *train, seed), *held_out))
    assert ours < 0.5 * theirs
