"""The scheduler as a diffusers component: schedules, sampling of tokens, conventions, bad input."""

import inspect
import math

import pytest
import torch
from diffusers import ConfigMixin, SchedulerMixin
from scipy import stats

from hf_ext.gstar.scheduling_star_shaped import MODES, StarShapedScheduler, _draw, _invert


def mu(t, **options):
    return StarShapedScheduler(**options).mask_ratio(t)


@pytest.mark.parametrize("mode", ["star_loop", "gstar_loop", "remdm_loop"])
@pytest.mark.parametrize(
    "options", [{}, {"plateau": "plato"}, {"noise_schedule": "cosine"}, {"t_on": 0.9, "t_off": 0.9}]
)
def test_plateaus_end_at_no_mask_and_all_masks_and_are_continuous(mode, options):
    scheduler = StarShapedScheduler(mode=mode, **options)
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    ratio = scheduler.mask_ratio(grid)
    assert float(ratio[0]) == pytest.approx(0, abs=1e-9) and float(ratio[-1]) == pytest.approx(1, abs=2e-3)
    steps = ratio.diff()
    assert (steps >= -1e-12).all() and steps.max() < 5e-4  # no slope above 10
    inside = (grid > scheduler.t_off) & (grid <= scheduler.t_on)
    assert ratio[inside].max() - ratio[inside].min() < 1e-9 if inside.any() else True


def test_the_loop_plateau_has_the_published_values():
    values = {0.0: 0.0, 0.025: 0.05, 0.05: 0.1, 0.3: 0.1, 0.55: 0.1, 0.775: 0.55}
    for t, expected in values.items():
        assert mu(t, mode="gstar_loop") == pytest.approx(expected)
    # ReMDM's own form: 1 - (1 - t) alpha_on / (1 - t_on) above the window
    assert mu(0.7, mode="remdm_loop") == pytest.approx(1 - 0.3 * 0.9 / 0.45)


def test_plato_of_the_line_is_close_to_the_loop():
    grid = torch.linspace(0.001, 0.999, 500)
    apart = mu(grid, mode="star_loop", plateau="plato") - mu(grid, mode="star_loop")
    assert apart.abs().max() < 2e-3


def test_schedules_without_plateau():
    assert mu(0.5, mode="mdlm") == pytest.approx(0.4995)
    assert mu(0.5, mode="mdlm", noise_schedule="cosine") == pytest.approx(1 - 0.001 - 0.999 * math.cos(math.pi / 4))
    assert mu(1.0, mode="mdlm", noise_schedule="cosine") == pytest.approx(0.999)
    assert mu(0.5, mode="mdlm", sampling_eps=0.1) == pytest.approx(0.45)


def test_sigma_is_of_the_mask_ratio_in_force():
    scheduler = StarShapedScheduler(mode="gstar_loop")
    assert scheduler.sigma(0.3) == pytest.approx(-math.log(0.9)) == scheduler.sigma(0.5)
    assert torch.allclose(scheduler.sigma(torch.tensor([0.3, 0.5])), torch.full((2,), -math.log(0.9)).double())


def test_ceil_does_not_count_rounding_of_binary_fractions():
    scheduler = StarShapedScheduler(mode="star_loop")
    assert scheduler.num_remask(0.3, torch.tensor([30, 31, 10, 1, 0])).tolist() == [3, 4, 1, 1, 0]


def test_when_tokens_are_final():
    assert not StarShapedScheduler(mode="mdlm").may_revise(0.9)
    assert not StarShapedScheduler(mode="low_confidence").may_revise(0.9)
    assert StarShapedScheduler(mode="star_plus").may_revise(0.9)  # the window is still to come
    loop = StarShapedScheduler(mode="gstar_loop")
    assert loop.may_revise(0.06) and not loop.may_revise(0.04)
    assert StarShapedScheduler(mode="gstar_loop", tail="guided").may_revise(0.01)


def draw(logits, rows=40_000, temperature=1.0, top_p=1.0, nucleus="usual", seed=0):
    u = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tokens, probs = _draw(torch.tensor(logits).expand(rows, -1).clone(), u, temperature, top_p, nucleus)
    expected = torch.tensor(logits).softmax(0)[tokens]  # whatever temperature and nucleus
    torch.testing.assert_close(probs, expected, rtol=1e-5, atol=0)
    return torch.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature):
    logits = [1.0, 0.0, -1.0, 0.5, -math.inf]
    probs = [math.exp(x / temperature) for x in logits]
    counts = draw(logits, temperature=temperature)
    assert counts[-1] == 0
    expected = [p / sum(probs) * 40_000 for p in probs[:-1]]
    assert stats.chisquare(counts[:-1], expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("top_p", "nucleus", "kept"),
    [
        (0.6, "usual", [1, 3]),  # 0.5 is not enough, so the next one, which crosses, belongs to it
        (0.6, "mdlm", [1]),
        (0.92, "mdlm", [1, 3, 0]),
        (0.3, "usual", [1]),
        (0.3, "mdlm", [1]),  # the first one alone crosses, and is kept
        (0.99, "usual", [0, 1, 2, 3]),
    ],
)
def test_a_nucleus_keeps_what_it_should(top_p, nucleus, kept):
    probs = [0.15, 0.5, 0.1, 0.25]
    counts = draw([math.log(p) for p in probs], top_p=top_p, nucleus=nucleus)
    assert counts.nonzero()[:, 0].tolist() == sorted(kept)
    expected = [probs[i] / sum(probs[j] for j in kept) * 40_000 for i in sorted(kept)]
    assert len(kept) == 1 or stats.chisquare(counts[sorted(kept)], expected).pvalue > 1e-3


@pytest.mark.parametrize("entries", [1, 63, 256, 257, 320, 1000])
def test_tokens_of_any_vocabulary_are_where_the_cumulative_sum_passes_u(entries):
    generator = torch.Generator().manual_seed(entries)
    weights = torch.rand(500, entries, generator=generator) * (torch.rand(500, entries, generator=generator) < 0.3)
    weights[:, 0] += 1e-3  # not all 0
    u = torch.rand(500, dtype=torch.float64, generator=generator)
    tokens = _invert(weights, u)
    cumulative = weights.double().cumsum(1)
    target = u * cumulative[:, -1]
    above = cumulative.gather(1, tokens[:, None])[:, 0]
    below = above - weights.double().gather(1, tokens[:, None])[:, 0]
    assert (below <= target + 1e-9).all() and (target <= above + 1e-9).all()  # sums in another order
    assert (weights.gather(1, tokens[:, None]) > 0).all()


def test_a_nucleus_wider_than_the_first_look_is_found_by_sorting():
    # row 0: 0.5 of a flat distribution over 1000; row 1: one token is enough
    logits = torch.zeros(2, 1000)
    logits[1, 7] = 20.0
    u = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    flat = _draw(logits[:1].expand(1000, -1).clone(), u, 1.0, 0.5, "usual")[0]
    assert abs(len(flat.unique()) - 500) <= 1  # sums of 1/1000 in float32
    assert (_draw(logits[1:].expand(1000, -1).clone(), u, 1.0, 0.5, "usual")[0] == 7).all()
    both = _draw(logits.clone(), u[:2], 1.0, 0.5, "usual")[0]
    assert both[1] == 7


@pytest.mark.parametrize("entries", [2, 700])
def test_float64_noise_reaches_the_tail(entries):
    tail = math.log(1e-9)
    logits = torch.full((3, entries), -math.inf)
    logits[:, 0], logits[:, -1] = tail, 0.0
    u = torch.tensor([5e-10, 2e-9, 0.5], dtype=torch.float64)
    assert _draw(logits.clone(), u, 1.0, 1.0, "usual")[0].tolist() == [0, entries - 1, entries - 1]
    # the other end, where float32 sums would have forgotten the last token
    assert _draw(logits.flip(1), 1 - u, 1.0, 1.0, "usual")[0].tolist() == [entries - 1, 0, 0]


def test_temperatures_near_zero_become_the_most_probable():
    assert draw([1.0, 3.0, 2.0], temperature=0.0).tolist() == [0, 40_000, 0]
    assert draw([1.0, 3.0, 2.0], temperature=1e-45).tolist() == [0, 40_000, 0]


def test_half_precision_logits_are_sampled_in_float32():
    logits = torch.tensor([[[1.0, 2.0, 0.0]]])
    scheduler = StarShapedScheduler(mode="mdlm")
    scheduler.set_timesteps(1)
    for dtype in (torch.float16, torch.bfloat16):
        out = scheduler.step(logits.to(dtype), 1.0, torch.tensor([[2]]), mask_token_id=2, temperature=0)
        assert out.sampled_tokens.tolist() == [[1]]
        assert float(out.sampled_probs) == pytest.approx(math.e / (1 + math.e))


def step(scheduler, x, generator, t=None, **options):
    logits = torch.arange(7.0).sin().expand(*x.shape, 7)
    return scheduler.step(
        logits, scheduler.timesteps[3] if t is None else t, x, mask_token_id=6, generator=generator, **options
    )


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.mark.parametrize("mode", sorted(MODES))
def test_with_a_list_of_generators_a_row_does_not_depend_on_its_batch(mode):
    scheduler = StarShapedScheduler(mode=mode)
    scheduler.set_timesteps(6)
    x = torch.where(torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.5, 6, 2)
    options = {"error_fn": lambda tokens: torch.sin(tokens.double())}
    together = step(scheduler, x, seeds(5, 6, 7), **options).prev_sample
    for row, seed in enumerate((5, 6, 7)):
        alone = step(scheduler, x[row : row + 1], seeds(seed), **options).prev_sample
        assert torch.equal(alone[0], together[row])
        # nor on padding, on either side
        padded = torch.nn.functional.pad(x[row : row + 1], (3, 2), value=1)
        fixed = torch.nn.functional.pad(torch.zeros(1, 20, dtype=torch.bool), (3, 2), value=True)
        again = step(scheduler, padded, seeds(seed), fixed=fixed, **options).prev_sample
        assert torch.equal(again[0, 3:-2], together[row]) and (again[0, :3] == 1).all()


def test_one_generator_repeats_with_its_seed():
    scheduler = StarShapedScheduler(mode="star")
    scheduler.set_timesteps(6)
    x = torch.full((2, 20), 6)
    first = step(scheduler, x, seeds(5)[0]).prev_sample
    assert torch.equal(first, step(scheduler, x, seeds(5)[0]).prev_sample)
    assert not torch.equal(first, step(scheduler, x, seeds(6)[0]).prev_sample)


def test_add_noise_masks_at_the_rate_of_the_schedule():
    scheduler = StarShapedScheduler(mode="mdlm")
    x = torch.zeros(4, 10_000, dtype=torch.long)
    fixed = torch.zeros_like(x, dtype=torch.bool)
    fixed[:, :100] = True
    t = torch.tensor([0.0, 0.2, 0.7, 1.0])
    noisy = scheduler.add_noise(x, t, mask_token_id=6, fixed=fixed, generator=seeds(0)[0])
    assert not (noisy[:, :100] == 6).any()
    assert torch.allclose((noisy[:, 100:] == 6).double().mean(1), 0.999 * t.double(), atol=0.025)  # 5 deviations
    assert (scheduler.add_noise(x, 0.5, mask_token_id=6, generator=seeds(1, 2, 3, 4)) == 6).any(1).all()


def test_scheduler_is_a_diffusers_scheduler():
    assert issubclass(StarShapedScheduler, SchedulerMixin) and issubclass(StarShapedScheduler, ConfigMixin)
    assert StarShapedScheduler.order == 1
    assert {"sample", "model_output", "timestep", "generator", "return_dict"} <= set(
        inspect.signature(StarShapedScheduler.step).parameters
    )


def test_set_timesteps():
    scheduler = StarShapedScheduler()
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.num_inference_steps == 4 and scheduler.timesteps.dtype == torch.float32
    # 5 equally spaced times from 1 to 1e-5, the last of which no step starts from
    expected = [1 - k * (1 - 1e-5) / 4 for k in range(4)]
    assert scheduler.timesteps.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3", None])
def test_set_timesteps_invalid(steps):
    with pytest.raises(ValueError, match="`num_inference_steps` must be a whole number > 0, got"):
        StarShapedScheduler().set_timesteps(steps)


def test_save_load_config_round_trip(tmp_path):
    options = {
        "mode": "gstar_loop",
        "tail": "guided",
        "t_off": 0.2,
        "remask_temperature": math.inf,
        "plateau": "plato",
    }
    scheduler = StarShapedScheduler(**options)
    scheduler.save_pretrained(tmp_path)
    again = StarShapedScheduler.from_pretrained(tmp_path)
    assert again.config.items() >= options.items() and again.plateau == "plato"
    assert again.mask_ratio(0.3) == scheduler.mask_ratio(0.3)


def test_from_config_changes_one_option():
    scheduler = StarShapedScheduler.from_config(StarShapedScheduler(mode="star").config, mode="star_plus", t_on=0.2)
    assert scheduler.config.mode == "star_plus" and scheduler.t_on == 0.2


def test_step_return_tuple_equals_the_output():
    scheduler = StarShapedScheduler(mode="star")
    scheduler.set_timesteps(6)
    x = torch.full((2, 20), 6)
    output = step(scheduler, x, seeds(5)[0])
    values = step(scheduler, x, seeds(5)[0], return_dict=False)
    assert torch.equal(values[0], output.prev_sample) and len(values) == 6  # no error logits in this mode
    assert list(output) == [
        "prev_sample",
        "sampled_tokens",
        "sampled_probs",
        "pred_logits",
        "transfer_index",
        "remask_index",
    ]
    assert torch.equal(x != output.prev_sample, output.transfer_index)


def test_step_does_not_write_into_what_it_is_given():
    scheduler = StarShapedScheduler(mode="p2")
    scheduler.set_timesteps(6)
    x, logits = torch.tensor([[6, 1, 6, 2]]), torch.zeros(1, 4, 7)
    before = x.clone(), logits.clone()
    scheduler.step(logits, scheduler.timesteps[2], x, mask_token_id=6)
    assert torch.equal(x, before[0]) and torch.equal(logits, before[1])


def test_threshold_mode_masks_as_many_as_the_predictor_suspects():
    scheduler = StarShapedScheduler(
        mode="gstar_plus", remask_mode="threshold", remask_threshold=0.0, remask_temperature=0
    )
    scheduler.set_timesteps(10)
    error = torch.tensor([[3.0, -1, -1, -1, 2, -1, -1], [-1.0, -1, -1, -1, -1, -1, -1]])
    out = scheduler.step(
        torch.zeros(2, 7, 7),
        scheduler.timesteps[8],
        torch.zeros(2, 7, dtype=torch.long),
        mask_token_id=6,
        error_fn=lambda tokens: error,
    )
    assert out.remask_index.tolist() == [[True, False, False, False, True, False, False], [False] * 7]


def test_nan_of_a_predictor_counts_as_right_and_is_told_once():
    scheduler = StarShapedScheduler(mode="gstar_loop", remask_temperature=0)
    scheduler.set_timesteps(10)
    error = torch.zeros(1, 20)
    error[0, :10] = float("nan")
    x = torch.zeros(1, 20, dtype=torch.long)
    options = {"t": scheduler.timesteps[6], "error_fn": lambda tokens: error}
    with pytest.warns(UserWarning, match="`error_logits` must be numbers, got NaN at 10 positions"):
        out = step(scheduler, x, None, **options)
    assert out.remask_index[0, 10:].sum() == 2 and not out.remask_index[0, :10].any()
    step(scheduler, x, None, **options)  # warnings of ours are errors, so a second one would fail
    error[:] = float("nan")
    assert int(step(scheduler, x, None, **options).remask_index.sum()) == 2


def given(**options):
    """A call of `step` on (2, 4) positions, with one argument changed."""
    scheduler = options.pop("scheduler", None) or StarShapedScheduler(mode="gstar_loop")
    scheduler.set_timesteps(10)
    call = {
        "model_output": torch.zeros(2, 4, 7),
        "timestep": scheduler.timesteps[6],
        "sample": torch.zeros(2, 4, dtype=torch.long),
        "mask_token_id": 6,
        "error_fn": lambda tokens: torch.zeros(2, 4),
    }
    return lambda: scheduler.step(**{**call, **options})


def noisy(t, **options):
    x = torch.zeros(2, 4, dtype=torch.long)
    return lambda: StarShapedScheduler().add_noise(x, t, mask_token_id=6, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "gstar"}, "`mode` must be one of mdlm, star, .*, got 'gstar'"),
        ({"noise_schedule": "sqrt"}, "`noise_schedule` must be one of loglinear, cosine, got 'sqrt'"),
        ({"mode": "gstar_loop", "plateau": "hill"}, "`plateau` must be one of loop, plato, got 'hill'"),
        ({"mode": "star_loop", "plateau": "loop", "noise_schedule": "cosine"}, "`plateau` must be 'plato'"),
        ({"mode": "star_plus", "plateau": "loop"}, "`plateau` must be None for mode='star_plus', got 'loop'"),
        ({"mode": "star_plus", "plateau_mask_ratio": 0.2}, "`plateau_mask_ratio` must be None for plateau=None"),
        ({"mode": "star_loop", "plateau_mask_ratio": 1.0}, r"`plateau_mask_ratio` must be in \[0, 1\), got 1.0"),
        ({"mode": "star_loop", "plateau_mask_ratio": -0.1}, r"`plateau_mask_ratio` must be in \[0, 1\), got -0.1"),
        ({"t_on": 0.2, "t_off": 0.3}, "0 <= t_off <= t_on <= 1, got t_off=0.3, t_on=0.2"),
        ({"t_on": 1.2}, "0 <= t_off <= t_on <= 1, got t_off=0.0, t_on=1.2"),
        ({"t_off": -0.1}, "0 <= t_off <= t_on <= 1, got t_off=-0.1"),
        ({"mode": "mdlm", "t_on": 0.3}, "`t_on` must be None for mode='mdlm', got 0.3. It belongs to star_plus"),
        ({"mode": "star_loop", "plateau": "plato", "t_on": 1.0, "t_off": 0.0}, "`t_on` - `t_off` must be below 1"),
        ({"tail": "none"}, "`tail` must be one of ancestral, guided, got 'none'"),
        ({"mode": "mdlm", "tail": "guided"}, "`tail` must be 'ancestral' for mode='mdlm', got 'guided'"),
        ({"remask_temperature": -1.0}, r"`remask_temperature` must be in \[0, infinity\], got -1.0"),
        ({"remask_temperature": float("nan")}, "`remask_temperature` must be in .* got nan"),
        ({"remask_mode": "all"}, "`remask_mode` must be one of count, threshold, got 'all'"),
        ({"remask_threshold": 0.0}, "`remask_threshold` must be None for remask_mode='count', got 0.0"),
        ({"mode": "star", "remask_mode": "threshold"}, "`remask_mode` must be 'count' for mode='star'"),
        ({"remask_rounding": "round"}, "`remask_rounding` must be one of ceil, floor, got 'round'"),
        ({"eta": 0.1}, "`eta` must be None for mode='gstar_plus', got 0.1. It belongs to remdm_cap"),
        ({"mode": "p2", "eta": -1.0}, "`eta` must be a number >= 0, got -1.0"),
        ({"nucleus": "top"}, "`nucleus` must be one of usual, mdlm, got 'top'"),
        ({"sampling_eps": 0.0}, r"`sampling_eps` must be in \(0, 1\), got 0.0"),
        ({"final_eps": 1.0}, r"`final_eps` must be in \(0, 1\), got 1.0"),
    ],
)
def test_an_option_out_of_range_is_refused_when_the_scheduler_is_made(options, said):
    with pytest.raises(ValueError, match=said):
        StarShapedScheduler(**options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (given(sample=torch.zeros(2, 4)), r"`sample` must be an int64 tensor of shape \(B, L\), got torch.float32"),
        (given(sample=torch.zeros(4, dtype=torch.long)), r"`sample` must be .* got torch.int64 of shape \(4,\)"),
        (given(model_output=torch.zeros(2, 5, 7)), r"`model_output` must have shape .* \(2, 4\), got \(2, 5, 7\)"),
        (given(mask_token_id=7), r"`mask_token_id` must be in \[0, 7\), .* got 7"),
        (given(mask_token_id=-1), r"`mask_token_id` must be in \[0, 7\), .* got -1"),
        (given(temperature=-0.5), "`temperature` must be a number >= 0, got -0.5"),
        (given(top_p=0.0), r"`top_p` must be in \(0, 1\], got 0.0"),
        (given(top_p=1.5), r"`top_p` must be in \(0, 1\], got 1.5"),
        (given(timestep=0.33), "`timestep` must be one of `scheduler.timesteps`, got 0.33"),
        (given(fixed=torch.zeros(2, 3, dtype=torch.bool)), r"`fixed` must be a bool tensor .* \(2, 4\), got"),
        (given(fixed=torch.zeros(2, 4)), "`fixed` must be a bool tensor .* got torch.float32"),
        (given(error_fn=None), "`error_logits` must be given in the guided steps of mode='gstar_loop', got None"),
        (given(error_fn=lambda x: torch.zeros(2, 4, 1)), r"`error_logits` must have the shape .* got \(2, 4, 1\)"),
        (given(generator=seeds(1)), "`generator` must be one generator or a list of 2, one a row, got 1"),
        (
            given(sample=torch.full((2, 4), 6), model_output=torch.full((2, 4, 7), -math.inf)),
            "`model_output` must leave a token to sample at every masked position, .* at 8 of 8",
        ),
        (
            given(sample=torch.full((2, 4), 6), model_output=torch.full((2, 4, 7), math.nan)),
            "`model_output` must leave a token to sample .* or NaN, at 8 of 8",
        ),
        (noisy(torch.tensor([0.1, 0.2, 0.3])), r"`timesteps` must be one number or 2, one a row, got shape \(3,\)"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused_with_value_and_cure(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_step_before_set_timesteps_says_so():
    x = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="`set_timesteps` must be called before a step"):
        StarShapedScheduler().step(torch.zeros(1, 2, 3), 1.0, x, mask_token_id=2)
