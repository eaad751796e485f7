"""Full CMA-ES: pycma (`pip install "hf_ext[cma]"`) driven by our noise, for searches of at most a few hundred values.

- pycma draws through our counter-based noise, so here too a candidate is a function of (state, seed, generation,
  index). But pycma makes whole generations only: asking for one candidate costs O(population dim^2).
- pycma's defaults hold but for three things that would make some candidates depend on others: no mirrored candidates
  (its default for fewer than 6), cumulative step-size adaptation in every dimension (its default from 300 on puts two
  candidates on a line), and no stopping: how long to search is the caller's business.
- pycma's state is spread over dozens of attributes and meant for pickle, so ours is what was told: loading replays it,
  which costs one `tell` per generation and ends in the same bits. The saved mean proves that it did.
- pycma breaks ties in its own order, and does not re-scale its learning rates when candidates are lost.
- Eigenvectors come from LAPACK: workers agree to the bit only with equal machines, libraries and numbers of threads.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from trainers.essa.strategies import JSON, LARGEST_SIGMA, SMALLEST_SIGMA, Strategy, TooFewCandidates, noise


LARGEST_DIM = 4000


class FullCMAES(Strategy):
    """
    CMA-ES with a full covariance; arguments as in [`Strategy`].

    Raises:
        ImportError: without pycma.
        ValueError: for a `dim` above 4000, and for a `min_population_fraction` below 0.5: pycma takes no less.
    """

    name = "cma"
    _arrays = ("mean", "start_mean", "start_sigma", "told", "sigmas")

    def _start(self) -> None:
        if self.dim > LARGEST_DIM:
            # eight arrays of dim^2 float64 were measured at the peak, an eigendecomposition
            raise ValueError(
                f"`dim` must be at most {LARGEST_DIM} for the strategy 'cma', got {self.dim}, which takes about "
                f"{64 * self.dim**2 / 1e9:.1f} GB and an eigendecomposition of that size. Use 'sep-cma'."
            )
        if self.min_population_fraction < 0.5:
            raise ValueError(
                f"`min_population_fraction` must be in [0.5, 1] for the strategy 'cma', "
                f"got {self.min_population_fraction}."
            )
        self.start_mean, self.start_sigma = self.mean, np.array([self.sigma])
        self.told, self.sigmas = np.empty((0, self.population_size)), np.empty(0)
        self._feed: list[np.ndarray] = []
        self._search = _pycma(self.mean, self.sigma, self.population_size, self._feed)

    def _draw(self, index: int) -> np.ndarray:
        return self._draws()[index]

    def _draws(self) -> np.ndarray:
        """The candidates themselves, of which pycma insists on having made them."""
        if self._cached is None or self._search.sigma != self.sigma:
            self._search.sigma = self.sigma
            self._feed.append(
                np.stack([noise(self.seed, self.generation, k, self.dim) for k in range(self.population_size)])
            )
            with _quiet():
                self._cached = np.stack(self._search.ask())
        return self._cached

    def _place(self, draws: np.ndarray) -> np.ndarray:
        return draws.copy()

    def _update(self, kept: np.ndarray, values: np.ndarray) -> bool:
        fitness = np.full(self.population_size, np.nan)
        fitness[kept] = values
        self.told, self.sigmas = np.vstack([self.told, fitness]), np.append(self.sigmas, self.sigma)
        informative = bool(values.min() < values.max())
        if informative:
            asked = self._draws()
            with _quiet():
                self._search.tell(list(asked[kept]), list(-values))
                # pycma may have moved to other coordinates
                self.mean = np.array(self._search.gp.pheno(self._search.mean), dtype=np.float64)
            self.sigma = min(max(float(self._search.sigma), SMALLEST_SIGMA), LARGEST_SIGMA)
            self._search.sigma = self.sigma
        return informative

    def load_state_dict(self, settings: Mapping[str, JSON], arrays: Mapping[str, np.ndarray]) -> None:
        self._checked_state(settings, arrays)
        replay = type(self)(
            self.dim,
            self.population_size,
            arrays["start_sigma"].item(),
            self.seed,
            arrays["start_mean"],
            min_population_fraction=self.min_population_fraction,
        )
        try:
            for fitness, sigma in zip(arrays["told"], arrays["sigmas"], strict=True):
                replay.sigma = sigma
                replay.tell(fitness)
        except TooFewCandidates as error:
            raise ValueError(f"`arrays` must hold 'told' as it was told, but {error}") from error
        # another processor may round otherwise, but must find the candidates whose fitness was told
        for key in ("generation", "mean", "sigma"):
            saved: Any = arrays["mean"] if key == "mean" else settings[key]
            if not np.allclose(getattr(replay, key), saved, rtol=0, atol=1e-3 * replay.sigma):
                raise ValueError(
                    f"The state must be of this pycma: what was told leads to another `{key}` than the saved one. "
                    f"Install the version that it was saved with, or start anew."
                )
        self.__dict__.update(replay.__dict__)


def _pycma(mean: np.ndarray, sigma: float, population_size: int, feed: list[np.ndarray]) -> Any:
    """pycma's search, which takes its standard normal numbers `[population_size, dim]` from `feed`."""
    with _quiet():
        try:
            import cma
            from cma.sigma_adaptation import CMAAdaptSigmaCSA
        except ImportError as error:
            raise ImportError('The strategy "cma" needs pycma: pip install "hf_ext[cma]".') from error
        options = {
            "popsize": population_size,
            "randn": lambda number, dim: feed.pop(),
            "AdaptSigma": CMAAdaptSigmaCSA,
            "CMA_mirrors": 0,
            "verbose": -9,
        }
        return cma.CMAEvolutionStrategy(mean, sigma, options)


@contextmanager
def _quiet() -> Iterator[None]:
    """pycma warns about what is meant here, such as populations that are not complete."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
