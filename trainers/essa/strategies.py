"""Evolution strategies by ask and tell, in numpy: they know vectors and fitness, nothing of models.

- Noise is counter-based: a candidate is a function of (state, seed, generation, index), so any worker rebuilds any
  candidate, and a resumed run needs no random state.
- A strategy is a value: its state is a dict of JSON and a dict of float64 arrays. Bad input raises before anything is
  changed. Nothing is pickled.
- Fitness is maximised, and only its order counts. NaN marks a candidate that was lost: the rest are told, with the
  weights, mu_eff and learning rates of the smaller population. Nothing is imputed.
- Tied candidates share the mean of their ranks' weights, so the order of the indices decides nothing. mu_eff is that
  of the weights in use: with the untied one, step-size control would take their shorter sums for a sign to shrink.
  A generation of equals says nothing and changes nothing (rewards of 0 and 1 on small batches do this often).
- Sums over the population are numpy's, not BLAS's, whose last bits may depend on the number of threads.

Source: arXiv 2507.04453 v3 says CMA-ES without variant or constants. The default here is the separable form of Ros and
Hansen (PPSN 2008), O(dim) in time and memory: the learning rate of a full covariance is about 1 / dim^2, so in
hundreds of dimensions it hardly moves within a run. Full CMA-ES is in `full_cma.py`.
A long file: the base class, its checks and its file format serve the three short strategies, and are read with them.
"""

import json
import math
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save


JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

LARGEST_WORD = 2**64 - 1
# Below, float32 parameters above 1e-4 do not change any more; above, offsets leave float16. Either way the search has
# failed, and the bounds only keep its numbers finite.
SMALLEST_SIGMA, LARGEST_SIGMA = 1e-12, 1e6
# two candidates would select one parent, whatever the noise
FEWEST = 3
SETTINGS, ARRAYS = "strategy.json", "strategy.safetensors"


class TooFewCandidates(RuntimeError):
    """Too many candidates were lost: `found` of `needed` are there. The state is unchanged; evaluate them again."""

    def __init__(self, found: int, needed: int, population_size: int) -> None:
        super().__init__(found, needed, population_size)
        self.found, self.needed, self.population_size = found, needed, population_size

    def __str__(self) -> str:
        return (
            f"`fitness` must hold at least {self.needed} usable values of {self.population_size}, got {self.found}. "
            f"Evaluate the lost candidates again, or lower `min_population_fraction`."
        )


class Told(NamedTuple):
    """What `tell` did: `updated` is False if nothing was learned, `ties` counts candidates that tie with others."""

    updated: bool
    effective_population: int
    ties: int
    sigma: float


class Strategy(ABC):
    """
    Ask for candidates, tell their fitness.

    `generation` counts from 0; `mean` (float64 `[dim]`) and `sigma` are the present ones.

    Args:
        dim (`int`): Length of a candidate, at least 1.
        population_size (`int`): Candidates a generation, at least 4.
        sigma (`float`): Initial standard deviation of a candidate's offset from the mean, in [1e-12, 1e6].
        seed (`int`): Of the noise, in [0, 2^64 - 1].
        mean (`[dim]`, *optional*, defaults to zeros): Where the search starts; copied.
        min_population_fraction (`float`, *optional*, defaults to 0.75): `tell` raises [`TooFewCandidates`] if less
            than this part of the population, or fewer than 3, are left. In [0, 1].

    Raises:
        TypeError, ValueError: for an argument of the wrong type, or out of its range.
    """

    name: ClassVar[str]
    # the attributes that make up the state; options, like what identifies the search, must be equal to load it
    _options: ClassVar[tuple[str, ...]] = ("min_population_fraction",)
    _counters: ClassVar[tuple[str, ...]] = ("generation",)
    _arrays: ClassVar[tuple[str, ...]] = ("mean",)

    def __init__(
        self,
        dim: int,
        population_size: int,
        sigma: float,
        seed: int,
        mean: Sequence[float] | np.ndarray | None = None,
        *,
        min_population_fraction: float = 0.75,
    ) -> None:
        self.dim = _integer("dim", dim, 1)
        self.population_size = _integer("population_size", population_size, 4)
        self.sigma = sigma
        self.seed = _integer("seed", seed, 0)
        self.mean = _vector("mean", np.zeros(self.dim) if mean is None else mean, self.dim)
        self.min_population_fraction = _real("min_population_fraction", min_population_fraction, 0, 1)
        self.generation = 0
        self._cached: np.ndarray | None = None
        self._start()

    @property
    def sigma(self) -> float:
        """Standard deviation of the search. May be set before a generation is asked for, or asked for again."""
        return self._sigma

    @sigma.setter
    def sigma(self, sigma: float) -> None:
        self._sigma = _real("sigma", sigma, SMALLEST_SIGMA, LARGEST_SIGMA)

    def candidate(self, index: int) -> np.ndarray:
        """Candidate `index` of this generation, float64 `[dim]`, without drawing the others."""
        index = _integer("index", index, 0, self.population_size - 1)
        return self._place(self._draw(index))

    def ask(self) -> np.ndarray:
        """All candidates of this generation `[population_size, dim]`: row i is `candidate(i)`, bit for bit."""
        return self._place(self._draws())

    def tell(self, fitness: Sequence[float] | np.ndarray) -> Told:
        """
        Learn from this generation, and go on to the next.

        Args:
            fitness (`[population_size]`): Of each candidate, higher is better; NaN where it was lost.

        Raises:
            TooFewCandidates: if too many are NaN.
            TypeError, ValueError: if it holds no numbers, is of another length, or holds an infinite value.
        """
        values = np.asarray(fitness)
        if values.dtype.kind not in "biuf":
            raise TypeError(f"`fitness` must be numbers, NaN where a candidate was lost, got {fitness!r}.")
        values = values.astype(np.float64)
        if values.shape != (self.population_size,):
            raise ValueError(f"`fitness` must be of shape ({self.population_size},), got {values.shape}.")
        if np.isinf(values).any():
            index = int(np.argmax(np.isinf(values)))
            raise ValueError(
                f"`fitness` must be finite, got {values[index]} for candidate {index}. Tell NaN for a candidate that "
                f"could not be evaluated."
            )
        kept = self._usable(values)
        # the small number undoes products such as 0.55 * 20 = 11.000000000000002
        needed = max(FEWEST, math.ceil(self.min_population_fraction * self.population_size - 1e-9))
        if len(kept) < needed:
            raise TooFewCandidates(len(kept), needed, self.population_size)
        counts = np.unique(values[kept], return_counts=True)[1]
        updated = self._update(kept, values[kept])
        self.generation += 1
        self._cached = None
        return Told(updated, len(kept), int(counts[counts > 1].sum()), self.sigma)

    def state_dict(self) -> tuple[dict[str, JSON], dict[str, np.ndarray]]:
        """All that the search depends on: settings for JSON, and float64 arrays (copies)."""
        settings = {key: getattr(self, key) for key in (*self._identity(), *self._counters, "sigma")}
        return settings, {key: getattr(self, key).copy() for key in self._arrays}

    def load_state_dict(self, settings: Mapping[str, JSON], arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from a state of the same strategy, dim, population, seed and options; ValueError for any other."""
        own = self._checked_state(settings, arrays)
        counters = {key: _integer(key, settings[key], 0) for key in self._counters}
        sigma = _real("sigma", settings["sigma"], SMALLEST_SIGMA, LARGEST_SIGMA)
        for key, array in arrays.items():
            if (array.shape, array.dtype) != (own[key].shape, own[key].dtype) or np.isnan(array).any():
                raise ValueError(
                    f"`arrays` must hold {key!r} as {own[key].dtype} of shape {own[key].shape} without NaN, "
                    f"got {array.dtype} of shape {array.shape}."
                )
        for key, value in {**counters, "sigma": sigma}.items():
            setattr(self, key, value)
        for key, array in arrays.items():
            setattr(self, key, array.copy())
        self._cached = None

    def save(self, folder: str | Path) -> None:
        """
        Write `strategy.json` and `strategy.safetensors` into `folder`, which is made if need be.

        Each file is replaced as a whole. A crash between the two is noticed by `load`, which refuses the pair: where
        an earlier save must survive, give each a folder of its own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings, arrays = self.state_dict()
        _write(folder / ARRAYS, save(arrays))
        content = {**settings, "fingerprint": _fingerprint(settings, arrays)}
        _write(folder / SETTINGS, f"{json.dumps(content, indent=1)}\n".encode())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """
        The strategy that was saved; `Strategy.load` takes any, a subclass its own only.

        Raises:
            FileNotFoundError: if one of the two files is not there.
            ValueError: naming the file, if it is truncated, of another program, another strategy or another save.
        """
        settings, arrays = _read(Path(folder))
        try:
            found = _class(settings.get("name"))
            if not issubclass(found, cls):
                raise ValueError(f"`name` must be {cls.name!r}, got {found.name!r}")
            arguments: dict[str, Any] = {
                key: settings[key] for key in ("dim", "population_size", "sigma", "seed", *found._options)
            }
            strategy = found(**arguments)
            strategy.load_state_dict(settings, arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(folder) / SETTINGS} must hold a state of {cls.__name__}: {error}") from error
        return strategy

    def fingerprint(self) -> str:
        """32 hexadecimal digits of the whole state; workers whose digits differ have diverged."""
        return _fingerprint(*self.state_dict())

    def _identity(self) -> tuple[str, ...]:
        return ("name", "dim", "population_size", "seed", *self._options)

    def _checked_state(self, settings: Mapping[str, JSON], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Refuse another search's state, or an incomplete one; the own arrays."""
        for key in self._identity():
            own, found = getattr(self, key), settings.get(key)
            if found != own:
                raise ValueError(
                    f"The state must be of `{key}` {own!r}, got {found!r}. Start anew, or set up the strategy as it "
                    f"was when the state was saved."
                )
        own_settings, own_arrays = self.state_dict()
        if (settings.keys(), arrays.keys()) != (own_settings.keys(), own_arrays.keys()):
            raise ValueError(
                f"The state must hold {', '.join([*own_settings, *own_arrays])}, "
                f"got {', '.join([*settings, *arrays])}."
            )
        return own_arrays

    def _usable(self, values: np.ndarray) -> np.ndarray:
        """Indices of the candidates to learn from."""
        return np.flatnonzero(~np.isnan(values))

    def _draw(self, index: int) -> np.ndarray:
        """Standard normal numbers of a candidate `[dim]`."""
        return noise(self.seed, self.generation, index, self.dim)

    def _draws(self) -> np.ndarray:
        """Those of all `[population_size, dim]`, kept from `ask` to `tell`."""
        if self._cached is None:
            self._cached = np.empty((self.population_size, self.dim))
            for index in range(self.population_size):
                self._cached[index] = self._draw(index)
        return self._cached

    def _place(self, draws: np.ndarray) -> np.ndarray:
        """Candidates from their standard normal numbers `[..., dim]`, element by element: rows do not mix."""
        return self.mean + self.sigma * draws

    @abstractmethod
    def _start(self) -> None:
        """Set up the rest of the state."""

    @abstractmethod
    def _update(self, kept: np.ndarray, values: np.ndarray) -> bool:
        """Learn from the candidates `kept` [n], whose fitness is `values` [n]; False if they say nothing."""


class SepCMAES(Strategy):
    """
    CMA-ES with a diagonal covariance, x ~ N(mean, sigma^2 diag(C)); arguments as in [`Strategy`].

    Weights ln(mu + 1) - ln(i) for the i-th best of mu = n / 2 parents, cumulative step-size adaptation, rank-one and
    rank-mu update of C, constants of [`sep_cma_rates`]. The numbers are those of `cmaes.SepCMA` 0.13 (while it keeps
    C positive), whose test for h_sigma takes 2 (g + 1) with g = 1 in the first generation, where others have 0.
    """

    name = "sep-cma"
    _counters = ("generation", "updates")
    _arrays = ("mean", "C", "p_sigma", "p_c")

    def _start(self) -> None:
        self.updates = 0
        self.C = np.ones(self.dim)
        self.p_sigma, self.p_c = np.zeros(self.dim), np.zeros(self.dim)

    def _place(self, draws: np.ndarray) -> np.ndarray:
        return self.mean + self.sigma * (np.sqrt(self.C) * draws)

    def _update(self, kept: np.ndarray, values: np.ndarray) -> bool:
        if values.min() == values.max():
            return False
        mu = len(values) // 2
        by_rank = np.zeros(len(values))
        by_rank[:mu] = math.log(mu + 1) - np.log(np.arange(1, mu + 1))
        weights = np.zeros(self.population_size)
        weights[kept] = shaped(values, by_rank / by_rank.sum())
        mu_eff = 1 / float((weights**2).sum())
        c_sigma, d_sigma, c_c, c_1, c_mu, chi = sep_cma_rates(self.dim, mu_eff)

        z = self._draws()
        z_w = _weighted(weights, z)
        y_w = np.sqrt(self.C) * z_w
        p_sigma = (1 - c_sigma) * self.p_sigma + math.sqrt(c_sigma * (2 - c_sigma) * mu_eff) * z_w
        norm = math.sqrt(float((p_sigma**2).sum()))
        sigma = self.sigma * math.exp(c_sigma / d_sigma * (norm / chi - 1))

        # generations that taught nothing do not count: the test is about how often p_sigma was updated
        updates = self.updates + 1
        norm /= math.sqrt(1 - (1 - c_sigma) ** (2 * (updates + 1)))
        h_sigma = float(norm < (1.4 + 2 / (self.dim + 1)) * chi)
        p_c = (1 - c_c) * self.p_c + h_sigma * math.sqrt(c_c * (2 - c_c) * mu_eff) * y_w
        # gives back the variance that is missing where h_sigma stalls p_c
        kept_part = 1 - c_1 - c_mu + (1 - h_sigma) * c_1 * c_c * (2 - c_c)
        C = (kept_part + c_mu * _weighted(weights, z, z)) * self.C + c_1 * p_c**2

        self.mean = self.mean + self.sigma * y_w
        self.C, self.p_sigma, self.p_c, self.updates = C, p_sigma, p_c, updates
        self.sigma = min(max(sigma, SMALLEST_SIGMA), LARGEST_SIGMA)
        return True


class OpenAIES(Strategy):
    """
    The plain comparison: x ~ N(mean, sigma^2 I) with sigma fixed, and gradient ascent on the smoothed fitness.

        velocity = momentum * velocity + 1 / (n sigma) * sum_k s_k z_k        mean = mean + learning_rate * velocity

    s_k are centred ranks in [-0.5, 0.5], z_k the standard normal numbers of the n usable candidates.

    Args:
        learning_rate (`float`, *optional*): Above 0, in squared units of the search space, as the gradient is in
            inverse ones. Defaults to sigma^2: the mean then moves by sigma times the mean of s_k z_k.
        momentum (`float`, *optional*, defaults to 0.0): In [0, 0.999]. The steps grow by 1 / (1 - momentum).
        antithetic (`bool`, *optional*, defaults to `True`): Candidate 2i + 1 takes -z of candidate 2i. The population
            must be even, and a candidate whose partner is lost is left out.
        others: as in [`Strategy`].

    Source: Salimans et al., arXiv 1703.03864; there the optimiser is Adam.
    """

    name = "openai-es"
    _options = ("min_population_fraction", "learning_rate", "momentum", "antithetic")
    _arrays = ("mean", "velocity")

    def __init__(
        self,
        *args: Any,
        learning_rate: float | None = None,
        momentum: float = 0.0,
        antithetic: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(*args, **others)
        if not isinstance(antithetic, bool):
            raise TypeError(f"`antithetic` must be True or False, got {antithetic!r}.")
        if antithetic and self.population_size % 2:
            raise ValueError(
                f"`population_size` must be even with `antithetic=True`, got {self.population_size}. Add a candidate, "
                f"or set `antithetic=False`."
            )
        if learning_rate is not None:
            learning_rate = _real("learning_rate", learning_rate, SMALLEST_SIGMA**2, LARGEST_SIGMA**2)
        self.learning_rate = learning_rate
        self.momentum = _real("momentum", momentum, 0, 0.999)
        self.antithetic = antithetic

    def _start(self) -> None:
        self.velocity = np.zeros(self.dim)

    def _draw(self, index: int) -> np.ndarray:
        if not self.antithetic:
            return super()._draw(index)
        return super()._draw(index - index % 2) * (1 - 2 * (index % 2))

    def _usable(self, values: np.ndarray) -> np.ndarray:
        if self.antithetic:
            # the sum of a pair is NaN where one of them is
            values = values.reshape(-1, 2).sum(1).repeat(2)
        return super()._usable(values)

    def _update(self, kept: np.ndarray, values: np.ndarray) -> bool:
        if values.min() == values.max():
            return False
        weights = np.zeros(self.population_size)
        weights[kept] = shaped(values, np.linspace(0.5, -0.5, len(values)))
        gradient = _weighted(weights, self._draws()) / (len(values) * self.sigma)
        self.velocity = self.momentum * self.velocity + gradient
        rate = self.sigma**2 if self.learning_rate is None else self.learning_rate
        self.mean = self.mean + rate * self.velocity
        return True


class RandomSearch(Strategy):
    """
    The control: x ~ N(center, sigma^2 I) around the initial mean for ever; arguments as in [`Strategy`].

    `mean` is the best candidate ever told, by its own noisy fitness `best_fitness`, and before that the initial mean,
    with -inf. Of two equal ones the earlier stays. `Told.updated` says whether a better one was found.
    """

    name = "random"
    _arrays = ("mean", "center", "best")

    def _start(self) -> None:
        self.center, self.best = self.mean, np.array([-np.inf])

    @property
    def best_fitness(self) -> float:
        return float(self.best[0])

    def _place(self, draws: np.ndarray) -> np.ndarray:
        return self.center + self.sigma * draws

    def _update(self, kept: np.ndarray, values: np.ndarray) -> bool:
        first = int(np.argmax(values))
        if values[first] <= self.best_fitness:
            return False
        self.mean, self.best = self.candidate(int(kept[first])), values[[first]]
        return True


def make_strategy(
    name: str,
    dim: int,
    population_size: int,
    sigma: float,
    seed: int,
    mean: Sequence[float] | np.ndarray | None = None,
    **options: Any,
) -> Strategy:
    """The strategy "sep-cma", "cma", "openai-es" or "random"; arguments as in [`Strategy`] and the one named."""
    return _class(name)(dim, population_size, sigma, seed, mean, **options)


def noise(seed: int, generation: int, index: int, dim: int) -> np.ndarray:
    """
    Standard normal numbers of one candidate, float64 `[dim]`, the same in every process.

    They are Philox's, with `seed` as key. The counter of 256 bits starts with `generation` and `index` in its two
    upper words and counts in its two lower ones, so streams are apart by 2^128 blocks of numbers. Equal numbers take
    equal numpy versions: numpy may change how it turns bits into normal numbers.

    Args:
        seed, generation, index (`int`): Each in [0, 2^64 - 1].
        dim (`int`): How many numbers.
    """
    words = {"seed": seed, "generation": generation, "index": index}
    key, *upper = (_integer(name, word, 0) for name, word in words.items())
    bits = np.random.Philox(key=key, counter=np.array([0, 0, *upper], dtype=np.uint64))
    return np.random.Generator(bits).standard_normal(dim)


def shaped(fitness: np.ndarray, by_rank: np.ndarray) -> np.ndarray:
    """Each candidate's weight `[n]`, from the weights by rank (best first) `[n]`: tied ones get their mean."""
    _, group, size = np.unique(fitness, return_inverse=True, return_counts=True)
    first = np.cumsum(size) - size
    return (np.add.reduceat(by_rank[::-1], first) / size)[group]


def sep_cma_rates(dim: int, mu_eff: float) -> tuple[float, float, float, float, float, float]:
    """
    Constants of the separable CMA-ES for `mu_eff` = 1 / sum w_i^2.

    Returns:
        `(c_sigma, d_sigma, c_c, c_1, c_mu, chi)`: learning rate and damping of sigma, learning rates of p_c and of the
        two updates of C (c_mu is that of the full CMA-ES times (dim + 2) / 3), expected length of a standard normal
        vector.
    """
    c_sigma = (mu_eff + 2) / (dim + mu_eff + 3)
    d_sigma = 1 + 2 * max(0, math.sqrt((mu_eff - 1) / (dim + 1)) - 1) + c_sigma
    c_c = 4 / (dim + 4)
    c_1 = 2 / ((dim + 1.3) ** 2 + mu_eff)
    c_mu = 2 / (mu_eff * (dim + math.sqrt(2)) ** 2)
    c_mu += (1 - 1 / mu_eff) * min(1, (2 * mu_eff - 1) / ((dim + 2) ** 2 + mu_eff))
    # a large population in few dimensions would otherwise make C negative
    c_mu = min(1 - c_1, (dim + 2) / 3 * c_mu)
    return c_sigma, d_sigma, c_c, c_1, c_mu, math.sqrt(dim) * (1 - 1 / (4 * dim) + 1 / (21 * dim**2))


def _weighted(weights: np.ndarray, *factors: np.ndarray) -> np.ndarray:
    """Sum over the population of weight times factors `[n, dim]`: `[dim]`."""
    return np.einsum(f"k{',kd' * len(factors)}->d", weights, *factors)


def _class(name: Any) -> type[Strategy]:
    if name == "cma":
        from trainers.essa.full_cma import FullCMAES

        return FullCMAES
    known: dict[str, type[Strategy]] = {cls.name: cls for cls in (SepCMAES, OpenAIES, RandomSearch)}
    if name not in known:
        raise ValueError(f"`name` must be one of 'cma', {', '.join(map(repr, known))}, got {name!r}.")
    return known[name]


def _integer(name: str, value: Any, low: int, high: int = LARGEST_WORD) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if not low <= operator.index(value) <= high:
        raise ValueError(f"`{name}` must be in [{low}, {'2^64 - 1' if high == LARGEST_WORD else high}], got {value}.")
    return operator.index(value)


def _real(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be in [{low:g}, {high:g}], got {value}.")
    return float(value)


def _vector(name: str, value: Any, dim: int) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"`{name}` must be numbers, got {value!r}.")
    if array.shape != (dim,) or not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be {dim} finite numbers, got {array} of shape {array.shape}.")
    return array.astype(np.float64)


def _fingerprint(settings: Mapping[str, JSON], arrays: Mapping[str, np.ndarray]) -> str:
    digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _read(folder: Path) -> tuple[dict[str, JSON], dict[str, np.ndarray]]:
    cure = "Load an earlier checkpoint."
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS} must be whole JSON, got what is not ({error}). {cure}") from error
    try:
        arrays = load((folder / ARRAYS).read_bytes())
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{folder / ARRAYS} must be a whole safetensors file: {error}. {cure}") from error
    told = settings.pop("fingerprint", None) if isinstance(settings, dict) else None
    if told is None:
        raise ValueError(f"{folder / SETTINGS} must be written by a strategy's `save`, got another file. {cure}")
    if (found := _fingerprint(settings, arrays)) != told:
        raise ValueError(
            f"{folder / SETTINGS} and {ARRAYS} must be of one save, got fingerprints {told} and {found}. {cure}"
        )
    return settings, arrays
