"""A denoiser that knows its language exactly, and what counts its validity: chains of equations a+b=c modulo 5."""

import itertools
from collections.abc import Callable

import pytest
import torch


BASE = 5
MASK = BASE


class ExactDenoiser:
    """p(x_i | what is seen) of rows that are chains of independent equations `a b c` with c = a + b mod 5."""

    def __init__(self):
        self.words = torch.tensor([(a, b, (a + b) % BASE) for a, b in itertools.product(range(BASE), repeat=2)])

    def __call__(self, sample):
        """Logits (B, L, 6) for ids (B, L), L a multiple of 3, id 5 the mask."""
        cells = sample.view(len(sample), -1, 3)
        fits = ((cells[:, :, None] == self.words) | (cells[:, :, None] == MASK)).all(-1).double()
        # where what is seen is no word, anything goes
        fits = torch.where(fits.sum(-1, keepdim=True) == 0, 1.0, fits)
        one_hot = torch.nn.functional.one_hot(self.words, BASE + 1).double()
        probs = torch.einsum("bew,wpv->bepv", fits, one_hot) / fits.sum(-1)[..., None, None]
        return probs.clamp(min=1e-30).log().view(*sample.shape, BASE + 1)

    def wrong(self, tokens):
        """Logits (B, L) of a predictor that sees every broken equation."""
        cells = tokens.view(len(tokens), -1, 3)
        bad = (cells[..., 0] + cells[..., 1]) % BASE != cells[..., 2]
        return (bad[..., None].expand_as(cells).double() * 20 - 10).reshape(tokens.shape)

    def valid(self, tokens):
        """Share of rows whose equations all hold."""
        return float((self.wrong(tokens) < 0).all(1).double().mean())


@pytest.fixture
def exact() -> ExactDenoiser:
    return ExactDenoiser()


@pytest.fixture
def sample_chain() -> Callable[..., torch.Tensor]:
    """`sample_chain(scheduler, denoiser, steps, rows, length, seed=0, ...)` -> every x_t, [T + 2, B, L].

    The last one has its remaining masks filled. Further arguments go to `scheduler.step`.
    """

    def run(scheduler, denoiser, steps, rows=64, length=12, seed=0, start=None, mask_token_id=MASK, **options):
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(seed)
        x = torch.full((rows, length), mask_token_id) if start is None else start
        states = [x]
        for t in scheduler.timesteps:
            x = scheduler.step(
                denoiser(x), t, x, mask_token_id=mask_token_id, generator=generator, **options
            ).prev_sample
            states.append(x)
        fixed = options.get("fixed")
        states.append(scheduler.fill(denoiser(x), x, mask_token_id=mask_token_id, fixed=fixed))
        return torch.stack(states)

    return run
