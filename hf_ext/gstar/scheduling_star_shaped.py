"""Star-shaped re-masking for masked diffusion, and the samplers that it is compared with, behind one `mode`.

- Time t falls from 1 (all masked) to 0. The mask ratio mu(t) = 1 - alpha(t) is stored under its own name: codes that
  call either of the two "alpha" are the easiest way to break such a sampler.
- A step has two halves, since a guided one needs the error predictor in between: `propose` samples a token for every
  masked position, `remask` decides which positions are masked next. `step` is both.
- Whatever is compared shares everything up to `remask`: the same random numbers give the same proposal in every mode.
- Every position that is not fixed takes its own float64 number from its own row's generator, so a row does not depend
  on the rest of the batch, nor on which positions are masked.
- This file is loaded alone from a Hub repository, so it imports nothing else of ours. It is long, because it may not
  be cut.
"""

import bisect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput


class Mode(NamedTuple):
    """What a mode does inside its window t_off <= t <= t_on; outside of it, every mode is ancestral."""

    inside: str
    t_on: float
    t_off: float
    plateau: bool
    eta: float | None = None


# windows and eta are those of the papers; a window that reaches 1 is no window at all
MODES = {
    "mdlm": Mode("ancestral", 1.0, 0.0, False),
    "star": Mode("star", 1.0, 0.0, False),
    "star_plus": Mode("star", 0.3, 0.0, False),
    "star_loop": Mode("star", 0.55, 0.05, True),
    "gstar_plus": Mode("guided", 0.3, 0.0, False),
    "gstar_loop": Mode("guided", 0.55, 0.05, True),
    "remdm_cap": Mode("remdm", 1.0, 0.0, False, 0.008),
    "remdm_loop": Mode("remdm", 0.55, 0.05, True, 0.02),
    "p2": Mode("p2", 1.0, 0.0, False, 1.0),
    "low_confidence": Mode("low_confidence", 1.0, 0.0, False),
}
WINDOWED = ("star_plus", "star_loop", "gstar_plus", "gstar_loop", "remdm_loop")
# timesteps are float32, so a t that equals t_on may lie this far above it
_NEAR = 1e-6
# floats of logits that are worked on at once: a GPU wants many, a CPU what its cache holds
_CHUNK, _CHUNK_CPU = 1 << 24, 1 << 18
# entries of the vocabulary that are summed up before one looks into them
_BLOCK = 64
# a nucleus is looked for among this many tokens first; few distributions need a full sort
_HEAD = 128


@dataclass
class StarShapedProposal(BaseOutput):
    """
    What [`StarShapedScheduler.propose`] gives to `remask`. B rows of L positions, V entries of the vocabulary.

    Attributes:
        sampled_tokens (`torch.LongTensor` of shape `(B, L)`): x^_0: the sample with every masked position filled.
        sampled_probs (`torch.Tensor` of shape `(B, L)`):
            Probability of each sampled token by the denoiser alone (temperature 1, whole vocabulary); 1 at revealed
            positions, but in mode `"p2"`, which needs the denoiser's probability of the present token there.
        sample (`torch.LongTensor` of shape `(B, L)`): x_t, as it was given.
        pred_logits (`torch.Tensor` of shape `(B, L, V)`): The model's output, as it was given.
        fixed (`torch.BoolTensor` of shape `(B, L)`): Positions that never change.
        mask_token_id (`int`): Id of the mask.
    """

    sampled_tokens: torch.Tensor
    sampled_probs: torch.Tensor
    sample: torch.Tensor
    pred_logits: torch.Tensor
    fixed: torch.Tensor
    mask_token_id: int


@dataclass
class StarShapedSchedulerOutput(BaseOutput):
    """
    Attributes:
        prev_sample (`torch.LongTensor` of shape `(B, L)`): x_s, the sample at the next, smaller time.
        sampled_tokens (`torch.LongTensor` of shape `(B, L)`): x^_0, the proposal.
        sampled_probs (`torch.Tensor` of shape `(B, L)`): See [`StarShapedProposal`].
        pred_logits (`torch.Tensor` of shape `(B, L, V)`): The model's output, as it was given.
        transfer_index (`torch.BoolTensor` of shape `(B, L)`): Positions that were masked and are now revealed.
        remask_index (`torch.BoolTensor` of shape `(B, L)`): Positions that were revealed and are now masked.
        error_logits (`torch.Tensor` of shape `(B, L)`, *optional*): What the predictor said, in guided steps.
    """

    prev_sample: torch.Tensor
    sampled_tokens: torch.Tensor
    sampled_probs: torch.Tensor
    pred_logits: torch.Tensor
    transfer_index: torch.Tensor
    remask_index: torch.Tensor
    error_logits: torch.Tensor | None = None


class StarShapedScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Samplers of masked diffusion whose latents are independent given x_0: q(x_1..x_T | x_0) = prod_t q(x_t | x_0).

    One step from t to s < t, with x^_0 ~ x_theta(x_t) at masked positions and copied at revealed ones:

    - star: x_s is x^_0 with N = ceil(mu(s) L') positions masked, whichever they were before; L' counts the positions
      that are not fixed. Unguided modes choose them uniformly, guided ones (G-Star) sample them without replacement
      from softmax(e / T_r), with the logits e = g(x^_0) of a learned error predictor.
    - ancestral: a masked position is revealed with probability (mu(t) - mu(s)) / mu(t); revealed ones stay.

    | mode | inside t_off <= t <= t_on | window, plateau |
    |---|---|---|
    | `mdlm` | ancestral (MDLM, arXiv 2406.07524) | - |
    | `star`, `star_plus`, `star_loop` | star | [0, 1]; [0, 0.3]; [0.05, 0.55] on a plateau |
    | `gstar_plus`, `gstar_loop` | guided star (G-Star, arXiv 2510.08369) | [0, 0.3]; [0.05, 0.55] on a plateau |
    | `remdm_cap`, `remdm_loop` | ReMDM (arXiv 2503.00307), sigma at most `eta` | [0, 1]; [0.05, 0.55] on a plateau |
    | `p2` | path planning (arXiv 2502.03540) without a planner, `eta` | [0, 1] |
    | `low_confidence` | LLaDA's (arXiv 2502.09992): keeps the most probable tokens, never revises | [0, 1] |

    Star is ReMDM at sigma_t = 1 - alpha_s; what G-Star adds is which tokens go. Outside the window all are ancestral.

    Args:
        mode (`str`, *optional*, defaults to `"gstar_plus"`): A mode of the table.
        noise_schedule (`str`, *optional*, defaults to `"loglinear"`):
            mu(t) outside of a plateau: `"loglinear"`, (1 - eps) t; `"cosine"`, 1 - eps - (1 - eps) cos(pi t / 2).
        plateau (`str`, *optional*):
            How `*_loop` modes hold mu inside the window: `"loop"`, `plateau_mask_ratio`, with straight lines to 0 and
            1 on either side (the default); `"plato"`, the noise schedule with the window cut out and stretched, which
            works for any schedule (the default for `"cosine"`).
        plateau_mask_ratio (`float`, *optional*): c in [0, 1), for `"loop"` alone, 0.1 if not given.
        t_on, t_off (`float`, *optional*): The window, 0 <= t_off <= t_on <= 1, for modes that have one in the table.
        tail (`str`, *optional*, defaults to `"ancestral"`):
            What happens below t_off: `"ancestral"` (the paper), or `"guided"` (ours): the window stays open down to
            0, so that the last positions are checked too. On the puzzle of the system's card that is far better.
        remask_temperature (`float`, *optional*, defaults to 1.0):
            T_r >= 0 of guided steps: 0 takes the N largest logits, infinity is uniform.
        remask_mode (`str`, *optional*, defaults to `"count"`):
            `"count"`: N of the schedule. `"threshold"`: as many as have e > `remask_threshold`, where N > 0.
        remask_threshold (`float`, *optional*): For `"threshold"`, -1.0 if not given: 27 % to be wrong.
        remask_rounding (`str`, *optional*, defaults to `"ceil"`): `"ceil"` or `"floor"` of mu(s) L'.
        eta (`float`, *optional*): Of ReMDM (0.008 `remdm_cap`, 0.02 `remdm_loop`) and P2 (1.0), >= 0.
        nucleus (`str`, *optional*, defaults to `"usual"`):
            Which tokens `top_p` keeps: `"usual"`, up to and with the one that crosses it; `"mdlm"`, those before it.
        sampling_eps (`float`, *optional*, defaults to 1e-3): eps of the noise schedule.
        final_eps (`float`, *optional*, defaults to 1e-5): The last time of the grid, in (0, 1).

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import StarShapedScheduler

    >>> scheduler = StarShapedScheduler(mode="star_plus")
    >>> scheduler.set_timesteps(8)
    >>> sample = torch.full((2, 12), 5)                                     # 5 is the mask
    >>> for t in scheduler.timesteps:
    ...     logits = torch.zeros(2, 12, 6)                                  # a denoiser that knows nothing
    ...     sample = scheduler.step(logits, t, sample, mask_token_id=5).prev_sample
    >>> int((scheduler.fill(logits, sample, mask_token_id=5) == 5).sum())
    0

    ```"""

    order = 1

    @register_to_config
    def __init__(
        self,
        mode: str = "gstar_plus",
        noise_schedule: str = "loglinear",
        plateau: str | None = None,
        plateau_mask_ratio: float | None = None,
        t_on: float | None = None,
        t_off: float | None = None,
        tail: str = "ancestral",
        remask_temperature: float = 1.0,
        remask_mode: str = "count",
        remask_threshold: float | None = None,
        remask_rounding: str = "ceil",
        eta: float | None = None,
        nucleus: str = "usual",
        sampling_eps: float = 1e-3,
        final_eps: float = 1e-5,
    ) -> None:
        _one_of("mode", mode, MODES)
        _one_of("noise_schedule", noise_schedule, ("loglinear", "cosine"))
        _one_of("tail", tail, ("ancestral", "guided"))
        _one_of("remask_mode", remask_mode, ("count", "threshold"))
        _one_of("remask_rounding", remask_rounding, ("ceil", "floor"))
        _one_of("nucleus", nucleus, ("usual", "mdlm"))
        kind = MODES[mode]
        _belongs("plateau", plateau, kind.plateau, f"mode={mode!r}", "a *_loop mode")
        _belongs("t_on", t_on, mode in WINDOWED, f"mode={mode!r}", ", ".join(WINDOWED))
        _belongs("t_off", t_off, mode in WINDOWED, f"mode={mode!r}", ", ".join(WINDOWED))
        _belongs("eta", eta, kind.eta is not None, f"mode={mode!r}", "remdm_cap, remdm_loop and p2")
        by_threshold = remask_mode == "threshold"
        _belongs("remask_threshold", remask_threshold, by_threshold, f"remask_mode={remask_mode!r}", '"threshold"')
        if by_threshold and kind.inside != "guided":
            raise ValueError(f"`remask_mode` must be 'count' for mode={mode!r}, got 'threshold': it has no predictor.")
        if tail == "guided" and (mode not in WINDOWED or mode == "remdm_loop"):
            raise ValueError(
                f"`tail` must be 'ancestral' for mode={mode!r}, got 'guided'. It belongs to star windows."
            )
        self.t_on = kind.t_on if t_on is None else float(t_on)
        self.t_off = kind.t_off if t_off is None else float(t_off)
        if not 0 <= self.t_off <= self.t_on <= 1:
            raise ValueError(
                f"`t_off` and `t_on` must hold 0 <= t_off <= t_on <= 1, got t_off={self.t_off}, t_on={self.t_on}."
            )
        self.plateau = (plateau or ("loop" if noise_schedule == "loglinear" else "plato")) if kind.plateau else None
        if self.plateau is not None:
            _one_of("plateau", self.plateau, ("loop", "plato"))
        if self.plateau == "loop" and noise_schedule != "loglinear":
            raise ValueError(
                f"`plateau` must be 'plato' for noise_schedule={noise_schedule!r}, got 'loop': it is straight."
            )
        is_loop = self.plateau == "loop"
        _belongs("plateau_mask_ratio", plateau_mask_ratio, is_loop, f"plateau={self.plateau!r}", 'plateau="loop"')
        self.plateau_mask_ratio = 0.1 if plateau_mask_ratio is None else float(plateau_mask_ratio)
        if not 0 <= self.plateau_mask_ratio < 1:
            raise ValueError(f"`plateau_mask_ratio` must be in [0, 1), got {plateau_mask_ratio}.")
        if self.plateau == "plato" and self.t_on - self.t_off >= 1:
            raise ValueError("`t_on` - `t_off` must be below 1 for plateau='plato': nothing would be left, got 1.")
        if not remask_temperature >= 0:
            raise ValueError(f"`remask_temperature` must be in [0, infinity], got {remask_temperature}.")
        self.remask_threshold = -1.0 if remask_threshold is None else float(remask_threshold)
        self.eta = kind.eta if eta is None else float(eta)
        if self.eta is not None and not 0 <= self.eta < math.inf:
            raise ValueError(f"`eta` must be a number >= 0, got {eta}.")
        for name, value in (("sampling_eps", sampling_eps), ("final_eps", final_eps)):
            if not 0 < value < 1:
                raise ValueError(f"`{name}` must be in (0, 1), got {value}.")
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self._grid: list[float] = []
        self._warned = False

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Lay the grid t_k = 1 .. `final_eps` of T + 1 equally spaced times; `timesteps` holds the first T.

        Args:
            num_inference_steps (`int`): T, at least 1.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall lie.
        """
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be a whole number > 0, got {num_inference_steps!r}.")
        self.num_inference_steps = num_inference_steps
        self._grid = torch.linspace(1, self.config.final_eps, num_inference_steps + 1, dtype=torch.float64).tolist()
        self.timesteps = torch.tensor(self._grid[:-1], dtype=torch.float32, device=device)

    def mask_ratio(self, t: float | torch.Tensor) -> Any:
        """
        mu(t), the share of positions that are masked at time `t` in [0, 1], plateau included.

        Returns:
            `float` or `torch.Tensor`: As `t`: a tensor keeps its shape and becomes float64.
        """
        if not isinstance(t, torch.Tensor):
            return float(self.mask_ratio(torch.tensor(float(t), dtype=torch.float64)))
        t = (t.cpu() if t.device.type == "mps" else t).double()
        on, off, c = self.t_on, self.t_off, self.plateau_mask_ratio
        if self.plateau == "loop":
            above = c + (1 - c) * (t - on) / max(1 - on, 1e-12)
            below = c * t / max(off, 1e-12)
            mu = torch.where(t >= on, above, torch.where(t >= off, torch.full_like(t, c), below))
            return mu.clamp(0, 1 - 1e-6)
        if self.plateau == "plato":
            # progress from 1 down to 0, standing still inside the window
            progress = (1 - torch.where(t > on, t, torch.where(t >= off, on, t + on - off))) / (1 - on + off)
            t = (1 - progress).clamp(min=0)
        eps = self.config.sampling_eps
        if self.config.noise_schedule == "loglinear":
            return (1 - eps) * t
        return (1 - eps) * (1 - torch.cos(math.pi / 2 * t))

    def sigma(self, t: float | torch.Tensor) -> Any:
        """-log alpha(t), what a time-conditioned denoiser reads: of the mask ratio in force, never of raw t."""
        mu = self.mask_ratio(t)
        return -torch.log1p(-mu) if isinstance(mu, torch.Tensor) else -math.log1p(-mu)

    def phase(self, t: float | torch.Tensor) -> str:
        """What a step from `t` does: `"ancestral"`, `"star"`, `"guided"`, `"remdm"`, `"p2"`, `"low_confidence"`."""
        t = float(t)
        open_below = self.config.tail == "guided" or t >= self.t_off - _NEAR
        return MODES[self.config.mode].inside if t <= self.t_on + _NEAR and open_below else "ancestral"

    def needs_error(self, t: float | torch.Tensor) -> bool:
        """Whether a step from `t` needs the error predictor."""
        return self.phase(t) == "guided"

    def may_revise(self, t: float | torch.Tensor) -> bool:
        """Whether a token that is revealed before the step from `t` may still be masked again, then or later."""
        revises = MODES[self.config.mode].inside not in ("ancestral", "low_confidence")
        return revises and (self.config.tail == "guided" or float(t) >= self.t_off - _NEAR)

    def num_remask(self, t: float | torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """
        N: how many positions a star step that arrives at time `t` leaves masked.

        Args:
            t (`float`): The time s that the step arrives at.
            lengths (`torch.Tensor` of any shape): L', positions that are not fixed.
        """
        exact = self.mask_ratio(float(t)) * lengths.double().cpu()
        # 0.1 * 30 is a little more than 3 in binary
        rounded = (exact - 1e-9).ceil() if self.config.remask_rounding == "ceil" else (exact + 1e-9).floor()
        return rounded.clamp(min=0).long().to(lengths.device).minimum(lengths.long())

    def add_noise(
        self,
        original_samples: torch.Tensor,
        timesteps: float | torch.Tensor,
        *,
        mask_token_id: int,
        fixed: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        x_t ~ q(x_t | x_0): each position that is not fixed is masked with probability mu(t), by itself.

        Args:
            original_samples (`torch.LongTensor` of shape `(B, L)`): x_0.
            timesteps (`float` or `torch.Tensor` of shape `(B,)`): t in [0, 1], for all rows or each.
            mask_token_id (`int`): Id of the mask.
            fixed (`torch.BoolTensor` of shape `(B, L)`, *optional*): Positions that stay: padding, a prompt.
            generator (`torch.Generator` or a list of one for each row, *optional*): Source of the random numbers.
        """
        fixed = _check_sample(original_samples, fixed)
        t = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        if t.dim() > 1 or (t.dim() == 1 and len(t) not in (1, len(original_samples))):
            raise ValueError(
                f"`timesteps` must be one number or {len(original_samples)}, one a row, got shape {tuple(t.shape)}."
            )
        u = _uniform(fixed, generator)
        mu = self.mask_ratio(t).reshape(-1, 1).to(u)
        return torch.where((u < mu) & ~fixed, mask_token_id, original_samples)

    def propose(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *,
        mask_token_id: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        fixed: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> StarShapedProposal:
        """
        First half of a step: x^_0, one sampled token at every masked position, the present one elsewhere.

        The SUBS projection is done here, so the output of any masked language model will do: the mask itself is never
        sampled, and revealed tokens are carried over.

        Args:
            model_output (`torch.Tensor` of shape `(B, L, V)`): The denoiser's logits for x_t.
            timestep (`float` or `torch.Tensor`): t, one of `timesteps`.
            sample (`torch.LongTensor` of shape `(B, L)`): x_t.
            mask_token_id (`int`): Id of the mask, below V.
            temperature (`float`, *optional*, defaults to 1.0): T_d >= 0 of the tokens; 0 takes the most probable.
            top_p (`float`, *optional*, defaults to 1.0): Nucleus in (0, 1], taken after the temperature.
            fixed (`torch.BoolTensor` of shape `(B, L)`, *optional*): Positions that never change, even if masked.
            generator (`torch.Generator` or a list of one for each row, *optional*):
                Source of the random numbers. With a list, a row does not depend on the others.

        Returns:
            [`StarShapedProposal`]
        """
        fixed = _check_sample(sample, fixed)
        if model_output.dim() != 3 or model_output.shape[:2] != sample.shape:
            raise ValueError(
                f"`model_output` must have shape (B, L, V) with (B, L) = {tuple(sample.shape)}, got "
                f"{tuple(model_output.shape)}."
            )
        if not 0 <= mask_token_id < model_output.shape[-1]:
            raise ValueError(
                f"`mask_token_id` must be in [0, {model_output.shape[-1]}), the vocabulary of `model_output`, got "
                f"{mask_token_id}. Give the id of the mask that the denoiser was trained with."
            )
        if not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be a number >= 0, got {temperature}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")
        u = _uniform(fixed, generator)
        rows, columns = ((sample == mask_token_id) & ~fixed).nonzero(as_tuple=True)
        tokens, probs = sample.clone(), torch.ones(sample.shape, device=sample.device)
        chunk = _CHUNK_CPU if sample.device.type == "cpu" else _CHUNK
        size = max(chunk // model_output.shape[-1], 1)
        for row, column in zip(rows.split(size), columns.split(size), strict=True):
            logits = model_output[row, column].float()
            logits[:, mask_token_id] = -math.inf
            tokens[row, column], probs[row, column] = _draw(
                logits, u[row, column], temperature, top_p, self.config.nucleus
            )
        if self.phase(timestep) == "p2":
            rows, columns = ((sample != mask_token_id) & ~fixed).nonzero(as_tuple=True)
            logits = model_output[rows, columns].float()
            logits[:, mask_token_id] = -math.inf
            probs[rows, columns] = _probability(logits, sample[rows, columns])
        return StarShapedProposal(
            sampled_tokens=tokens,
            sampled_probs=probs,
            sample=sample,
            pred_logits=model_output,
            fixed=fixed,
            mask_token_id=mask_token_id,
        )

    def remask(
        self,
        proposal: StarShapedProposal,
        timestep: float | torch.Tensor,
        *,
        error_logits: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> StarShapedSchedulerOutput:
        """
        Second half of a step: which positions of the proposal are masked at the next time s.

        Args:
            proposal ([`StarShapedProposal`]): Of `propose`, for the same timestep.
            timestep (`float` or `torch.Tensor`): t, one of `timesteps`.
            error_logits (`torch.Tensor` of shape `(B, L)`, *optional*):
                e of the predictor for `proposal.sampled_tokens`, larger = more likely wrong; where `needs_error(t)`.
                NaN counts as minus infinity, with a warning.
            generator (`torch.Generator` or a list of one for each row, *optional*): As in `propose`.

        Returns:
            [`StarShapedSchedulerOutput`]
        """
        index = self._index(timestep)
        t, s = self._grid[index], self._grid[index + 1]
        phase = self.phase(timestep)
        x, tokens, fixed, mask_id = proposal.sample, proposal.sampled_tokens, proposal.fixed, proposal.mask_token_id
        masked = (x == mask_id) & ~fixed
        u = _uniform(fixed, generator)
        if phase == "guided":
            error_logits = self._check_error(error_logits, x)
        else:
            error_logits = None
        if phase in ("star", "guided"):
            n, score = self._count(s, fixed, error_logits), self._score(error_logits, u)
            chosen = _largest(score, u, n, fixed)
        elif phase == "ancestral":
            # at t = t_off of a plateau with c = 0 nothing is masked, and nothing is there to reveal
            chosen = masked & (u >= 1 - self.mask_ratio(s) / max(self.mask_ratio(t), 1e-12))
        elif phase == "remdm":
            chosen = self._remdm(t, s, masked, u) & ~fixed
        elif phase == "p2":
            log_prob = proposal.sampled_probs.log().clamp(min=-1e30).to(u)
            score = -torch.where(masked, log_prob, self.eta * log_prob)
            left = self.num_inference_steps - index - 1
            n = (~fixed).sum(1) * left // self.num_inference_steps
            chosen = _largest(score, u, n, fixed)
        else:
            left = self.num_inference_steps - index
            # spread over the steps left: LLaDA's counts, whose remainder goes to the first steps
            n = masked.sum(1) - (masked.sum(1) + left - 1) // left
            chosen = _largest(-proposal.sampled_probs.to(u), u, n, ~masked)
        return StarShapedSchedulerOutput(
            prev_sample=torch.where(chosen, mask_id, tokens),
            sampled_tokens=tokens,
            sampled_probs=proposal.sampled_probs,
            pred_logits=proposal.pred_logits,
            transfer_index=masked & ~chosen,
            remask_index=chosen & ~masked,
            error_logits=error_logits,
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *,
        mask_token_id: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        fixed: torch.Tensor | None = None,
        error_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> StarShapedSchedulerOutput | tuple[Any, ...]:
        """
        One step from `timestep` to the next time of the grid: `propose`, the predictor, `remask`.

        Args:
            error_fn (`Callable`, *optional*):
                The predictor: proposal of shape `(B, L)` -> error logits of the same shape. Called only in guided
                steps, which need it.
            return_dict (`bool`, *optional*, defaults to `True`): A tuple of the output's fields if `False`.
            model_output, timestep, sample, mask_token_id, temperature, top_p, fixed, generator: See `propose`.

        Returns:
            [`StarShapedSchedulerOutput`] or `tuple`
        """
        self._index(timestep)
        proposal = self.propose(
            model_output,
            timestep,
            sample,
            mask_token_id=mask_token_id,
            temperature=temperature,
            top_p=top_p,
            fixed=fixed,
            generator=generator,
        )
        guided = self.needs_error(timestep) and error_fn is not None
        error_logits = error_fn(proposal.sampled_tokens) if guided else None
        output = self.remask(proposal, timestep, error_logits=error_logits, generator=generator)
        return output if return_dict else output.to_tuple()

    def fill(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        *,
        mask_token_id: int,
        fixed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The most probable token at every position that is still masked and not fixed: the end of a chain."""
        fixed = _check_sample(sample, fixed)
        rows, columns = ((sample == mask_token_id) & ~fixed).nonzero(as_tuple=True)
        logits = model_output[rows, columns].float()
        logits[:, mask_token_id] = -math.inf
        filled = sample.clone()
        filled[rows, columns] = logits.argmax(-1)
        return filled

    def _index(self, timestep: float | torch.Tensor) -> int:
        """Place of `timestep` in the grid, whose times fall."""
        t = float(timestep)
        if not self._grid:
            raise ValueError("`set_timesteps` must be called before a step, got no grid of times.")
        first = bisect.bisect_left(self._grid, -t - _NEAR, key=lambda time: -time)
        if first >= len(self._grid) - 1 or abs(self._grid[first] - t) > _NEAR:
            raise ValueError(f"`timestep` must be one of `scheduler.timesteps`, got {t}.")
        return first

    def _count(self, s: float, fixed: torch.Tensor, error_logits: torch.Tensor | None) -> torch.Tensor:
        n = self.num_remask(s, (~fixed).sum(1))
        if error_logits is None or self.config.remask_mode == "count":
            return n
        return ((error_logits > self.remask_threshold) & ~fixed).sum(1) * (n > 0)

    def _score(self, error_logits: torch.Tensor | None, u: torch.Tensor) -> torch.Tensor:
        """e / T_r + Gumbel: the largest N are N draws without replacement from softmax(e / T_r) (Plackett-Luce)."""
        gumbel = -torch.log(-torch.log(u))
        temperature = self.config.remask_temperature
        if error_logits is None or math.isinf(temperature):
            return gumbel
        e = error_logits.to(u)
        return e if temperature == 0 else e / temperature + gumbel

    def _remdm(self, t: float, s: float, masked: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        # on a plateau alpha stands still, and its last step still belongs to it
        alpha_t, alpha_s = 1 - self.mask_ratio(t), 1 - self.mask_ratio(t if self.plateau is not None else s)
        sigma = min(self.eta, 1.0, (1 - alpha_s) / max(alpha_t, 1e-12))
        remask, reveal = remdm_probabilities(alpha_t, alpha_s, sigma)
        return torch.where(masked, u >= reveal, u < remask)

    def _check_error(self, error_logits: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor:
        if error_logits is None:
            raise ValueError(
                f"`error_logits` must be given in the guided steps of mode={self.config.mode!r}, got None. Pass "
                "`error_fn`, or use an unguided mode such as 'star_plus'."
            )
        if error_logits.shape != sample.shape:
            raise ValueError(
                f"`error_logits` must have the shape of the sample, {tuple(sample.shape)}, got "
                f"{tuple(error_logits.shape)}."
            )
        lost = error_logits.isnan()
        if lost.any():
            if not self._warned:
                warnings.warn(
                    f"`error_logits` must be numbers, got NaN at {int(lost.sum())} positions: they count as right, "
                    "here and in later steps. Run the predictor in float32.",
                    stacklevel=4,
                )
                self._warned = True
            error_logits = error_logits.masked_fill(lost, -math.inf)
        return error_logits


def remdm_probabilities(alpha_t: float, alpha_s: float, sigma: float) -> tuple[float, float]:
    """
    ReMDM's transition from t to s: with which probability a revealed token is masked, and a masked one revealed.

        sigma,    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t),    0 <= sigma <= min(1, (1 - alpha_s) / alpha_t)

    sigma = 0 is MDLM's ancestral step; sigma = 1 - alpha_s is the star transition: both reveal with alpha_s.
    Source: arXiv 2503.00307.
    """
    reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t) if alpha_t < 1 else 1.0
    return sigma, min(max(reveal, 0.0), 1.0)


def _uniform(fixed: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """One number in (0, 1) for each position, float64 (float32 on MPS, which has no other); with a list, each row's
    open positions take from its own."""
    device = fixed.device
    if isinstance(generator, list | tuple):
        if len(generator) != len(fixed):
            raise ValueError(
                f"`generator` must be one generator or a list of {len(fixed)}, one a row, got {len(generator)}."
            )
        u = torch.full(fixed.shape, 0.5, dtype=torch.float64)
        is_open = ~fixed.cpu()
        for row, (own, count) in enumerate(zip(generator, is_open.sum(1).tolist(), strict=True)):
            drawn = torch.rand(count, dtype=torch.float64, generator=own, device=own.device)
            u[row, is_open[row]] = drawn.cpu()
    else:
        # a generator of another device must draw there
        place = generator.device if generator is not None else "cpu" if device.type == "mps" else device
        u = torch.rand(fixed.shape, dtype=torch.float64, generator=generator, device=place)
    return u.clamp_(min=1e-300).to(device) if device.type != "mps" else u.float().clamp_(1e-30, 1 - 2**-24).to(device)


def _draw(
    logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float, nucleus: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One token for each row of `logits` (M, V), where the cumulative distribution passes `u` (M,), and its probability
    at temperature 1 in the whole vocabulary. Writes into `logits`.
    """
    best = logits.max(-1)
    if not torch.isfinite(best.values).all():
        bad = int((~torch.isfinite(best.values)).sum())
        raise ValueError(
            f"`model_output` must leave a token to sample at every masked position, got only -infinity, or NaN, at "
            f"{bad} of {len(logits)}. Suppress fewer tokens, or run the denoiser in float32."
        )
    logits.sub_(best.values[:, None])
    # below, 1 / temperature overflows
    greedy = temperature < 1e-30
    tempered = None if greedy or temperature == 1 else (logits / temperature).exp_()
    weights = logits.exp_()
    tempered = weights if tempered is None else tempered
    if greedy:
        tokens = best.indices
    elif top_p < 1:
        tokens = _draw_nucleus(tempered, u, top_p, nucleus)
    else:
        tokens = _invert(tempered, u)
    return tokens, weights.gather(1, tokens[:, None])[:, 0] / weights.sum(-1)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first token of each row (M, V) at which the sum of weights exceeds u times their total, in u's precision.

    Sums of blocks first, then the entries of one block: long cumulative sums in float64 would cost as much as a small
    model.
    """
    entries = weights.shape[1]
    if entries > 4 * _BLOCK:
        whole = entries // _BLOCK * _BLOCK
        sums = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1, dtype=u.dtype)
        if whole < entries:
            sums = torch.cat((sums, weights[:, whole:].sum(-1, dtype=u.dtype, keepdim=True)), 1)
        block, rest = _first_above(sums, u * sums.sum(-1))
        at = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=weights.device)
        inside = weights.gather(1, at.clamp(max=entries - 1)).masked_fill(at >= entries, 0)
        return block * _BLOCK + _first_above(inside.to(u.dtype), rest)[0]
    weights = weights.to(u.dtype)
    return _first_above(weights, u * weights.sum(-1))[0]


def _first_above(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cumulative sum of each row first exceeds `target` (M,), and what of the target is left before it."""
    cumulative = weights.cumsum(-1)
    at = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    # rounding may point behind the last entry that has a weight
    place = torch.arange(weights.shape[1], device=weights.device)
    at = at.minimum(torch.where(weights > 0, place, 0).amax(-1))
    before = cumulative.gather(1, at[:, None])[:, 0] - weights.gather(1, at[:, None])[:, 0]
    return at, target - before


def _draw_nucleus(weights: torch.Tensor, u: torch.Tensor, top_p: float, nucleus: str) -> torch.Tensor:
    """A token of the nucleus of each row (M, V); all entries are sorted only where the first ones do not suffice."""
    total = weights.sum(-1, dtype=u.dtype)
    tokens = torch.empty(len(weights), dtype=torch.long, device=weights.device)
    left = torch.arange(len(weights), device=weights.device)
    for width in (_HEAD, weights.shape[1]):
        width = min(width, weights.shape[1])
        rows = weights[left]
        top = rows.topk(width) if width < weights.shape[1] else rows.sort(-1, descending=True)
        cumulative = top[0].cumsum(-1, dtype=u.dtype) / total[left, None]
        kept = cumulative <= top_p if nucleus == "mdlm" else cumulative - top[0] / total[left, None] < top_p
        kept[:, 0] = True
        enough = cumulative[:, -1] >= top_p if width < weights.shape[1] else torch.ones_like(left, dtype=torch.bool)
        found = left[enough]
        at = _invert((top[0] * kept)[enough], u[found])
        tokens[found] = top[1][enough].gather(1, at[:, None])[:, 0]
        left = left[~enough]
        if not len(left):
            break
    return tokens


def _probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).exp()


def _largest(score: torch.Tensor, u: torch.Tensor, n: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """Mask (B, L) of the `n` (B,) largest scores of each row; ties are broken by `u`, the excluded come last."""
    by_chance = u.masked_fill(excluded, -1.0).argsort(dim=1, descending=True)
    score = score.masked_fill(excluded, -math.inf)
    order = score.gather(1, by_chance).argsort(dim=1, descending=True, stable=True)
    order = by_chance.gather(1, order).to(excluded.device)
    first = torch.arange(score.shape[1], device=excluded.device) < n[:, None]
    return torch.zeros_like(excluded).scatter_(1, order, first) & ~excluded


def _check_sample(sample: torch.Tensor, fixed: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(sample, torch.Tensor) or sample.dim() != 2 or sample.dtype != torch.long:
        what = f"{sample.dtype} of shape {tuple(sample.shape)}" if isinstance(sample, torch.Tensor) else sample
        raise ValueError(f"`sample` must be an int64 tensor of shape (B, L), got {what}.")
    if fixed is None:
        return torch.zeros_like(sample, dtype=torch.bool)
    if fixed.shape != sample.shape or fixed.dtype != torch.bool:
        raise ValueError(
            f"`fixed` must be a bool tensor of the sample's shape, {tuple(sample.shape)}, got {fixed.dtype} of "
            f"{tuple(fixed.shape)}."
        )
    return fixed


def _one_of(name: str, value: Any, options: Any) -> None:
    if value not in options:
        raise ValueError(f"`{name}` must be one of {', '.join(options)}, got {value!r}.")


def _belongs(name: str, value: Any, fits: bool, given: str, owner: str) -> None:
    if value is not None and not fits:
        raise ValueError(f"`{name}` must be None for {given}, got {value!r}. It belongs to {owner}.")


__all__ = ["StarShapedProposal", "StarShapedScheduler", "StarShapedSchedulerOutput", "remdm_probabilities"]
