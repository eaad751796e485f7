"""Laws of the star-shaped scheduler: each is an identity of the papers, or a distribution with a known answer."""

import math

import pytest
import torch
from scipy import stats

from hf_ext.gstar.scheduling_star_shaped import MODES, StarShapedScheduler, remdm_probabilities


MASK = 5
ALL = sorted(MODES)
UNGUIDED = [mode for mode in ALL if MODES[mode].inside != "guided"]


def guided(mode):
    return MODES[mode].inside == "guided"


def p_value(counts, expected):
    return stats.chisquare(counts, expected).pvalue


def test_sigma_of_one_minus_alpha_s_makes_remdm_the_star_transition():
    for alpha_t, alpha_s in ((0.1, 0.2), (0.3, 0.9), (0.899, 0.9), (0.0, 0.5), (0.95, 0.99999)):
        sigma = 1 - alpha_s
        assert 0 <= sigma <= min(1, (1 - alpha_s) / alpha_t if alpha_t else 1)
        remask, reveal = remdm_probabilities(alpha_t, alpha_s, sigma)
        assert reveal == pytest.approx(alpha_s, abs=1e-12) and 1 - remask == pytest.approx(alpha_s, abs=1e-12)


def test_sigma_of_zero_makes_remdm_ancestral():
    for t, s in ((1.0, 0.5), (0.5, 0.1)):
        remask, reveal = remdm_probabilities(1 - t, 1 - s, 0.0)
        assert remask == 0 and reveal == pytest.approx((t - s) / t)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_remdm_keeps_the_marginal_whatever_sigma(share):
    for alpha_t, alpha_s in ((0.2, 0.25), (0.5, 0.8), (0.9, 0.95)):
        remask, reveal = remdm_probabilities(alpha_t, alpha_s, share * min(1, (1 - alpha_s) / alpha_t))
        assert alpha_t * (1 - remask) + (1 - alpha_t) * reveal == pytest.approx(alpha_s)


@pytest.mark.parametrize("plus", ["star_plus", "gstar_plus"])
def test_ancestral_equals_star_plus_bit_for_bit_while_t_is_above_t_on(plus, exact, sample_chain):
    options = {"error_fn": exact.wrong} if guided(plus) else {}
    mdlm = sample_chain(StarShapedScheduler(mode="mdlm"), exact, 16)
    star = sample_chain(StarShapedScheduler(mode=plus, t_on=0.5), exact, 16, **options)
    # the grid ends at 1e-5, so its time 8 of 16 is a little above 1/2: the star steps begin with time 9
    assert torch.equal(mdlm[:10], star[:10])
    assert not torch.equal(mdlm[10], star[10])


@pytest.mark.parametrize("t_on", [0.3, 0.55, 0.7])
def test_a_time_that_equals_t_on_in_float32_is_inside_the_window(t_on):
    scheduler = StarShapedScheduler(mode="gstar_plus", t_on=t_on)
    assert scheduler.phase(torch.tensor(t_on, dtype=torch.float32)) == "guided"
    assert scheduler.phase(t_on) == "guided" and scheduler.phase(t_on + 1e-4) == "ancestral"
    loop = StarShapedScheduler(mode="gstar_loop", t_on=0.9, t_off=t_on)
    assert loop.phase(torch.tensor(t_on, dtype=torch.float32)) == "guided"
    assert loop.phase(t_on - 1e-4) == "ancestral"
    assert StarShapedScheduler(mode="gstar_loop", tail="guided").phase(1e-5) == "guided"


@pytest.mark.parametrize("rounding", ["ceil", "floor"])
@pytest.mark.parametrize("mode", ["star", "star_loop", "gstar_loop"])
def test_the_schedule_counts_remasked_positions_exactly_in_each_row(mode, rounding, exact, sample_chain):
    scheduler = StarShapedScheduler(mode=mode, remask_rounding=rounding)
    fixed = torch.zeros(5, 30, dtype=torch.bool)
    for row in range(5):
        fixed[row, : 6 * row] = True
    start = torch.where(fixed, 0, MASK)
    options = {"error_fn": exact.wrong} if guided(mode) else {}
    states = sample_chain(scheduler, exact, 20, start=start, fixed=fixed, **options)
    seen = 0
    for k in range(20):
        t, s = 1 - k * (1 - 1e-5) / 20, 1 - (k + 1) * (1 - 1e-5) / 20
        if mode != "star" and not 0.05 <= t <= 0.55 + 1e-6:
            continue
        # on the line below the plateau, on the plateau, or on the plain schedule
        mu = (0.1 * s / 0.05 if s < 0.05 else 0.1) if mode != "star" else (1 - 1e-3) * s
        count = math.ceil if rounding == "ceil" else math.floor
        wanted = [count(round(mu * length, 9)) for length in (30, 24, 18, 12, 6)]
        assert (states[k + 1] == MASK).sum(1).tolist() == wanted, (k, t)
        seen += 1
    assert seen >= 10


@pytest.mark.parametrize("mode", ALL)
def test_fixed_positions_never_change_and_no_mask_is_left_elsewhere(mode, exact, sample_chain):
    fixed = torch.rand(64, 12, generator=torch.Generator().manual_seed(3)) < 0.4
    fixed[0], fixed[1] = True, False
    start = torch.where(fixed, torch.arange(12) % 5, MASK)
    start[0, 0] = MASK  # a mask in a fixed place stays one
    options = {"error_fn": exact.wrong} if guided(mode) else {}
    states = sample_chain(StarShapedScheduler(mode=mode), exact, 7, start=start, fixed=fixed, **options)
    for state in states:
        assert torch.equal(state[fixed], start[fixed])
    assert not (states[-1][~fixed] == MASK).any()


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize(("steps", "length", "rows"), [(1, 12, 4), (4, 3, 4), (50, 3, 2), (3, 0, 2), (3, 12, 1)])
def test_every_mode_runs_at_the_edges(mode, steps, length, rows, exact, sample_chain):
    options = {"error_fn": exact.wrong} if guided(mode) else {}
    states = sample_chain(StarShapedScheduler(mode=mode), exact, steps, rows=rows, length=length, **options)
    assert states.shape == (steps + 2, rows, length) and not (states[-1] == MASK).any()


@pytest.mark.parametrize("mode", ALL)
def test_every_mode_runs_on_one_position(mode, sample_chain):
    def denoiser(x):
        return torch.tensor([1.0, 2.0, -1.0]).expand(*x.shape, 3)

    options = {"error_fn": lambda x: torch.zeros(x.shape)} if guided(mode) else {}
    states = sample_chain(StarShapedScheduler(mode=mode), denoiser, 4, length=1, mask_token_id=2, **options)
    # ceil makes a star step mask the only position again and again, so the end is the most probable token
    greedy = {"star": {1}, "star_plus": {1}, "gstar_plus": {1}, "star_loop": {1}, "gstar_loop": {1}}
    assert set(states[-1].unique().tolist()) == greedy.get(mode, {0, 1})


def one_guided_step(errors, temperature, rows, n, seed=0):
    """How often each position is chosen, when n of L are to be masked."""
    length = len(errors)
    scheduler = StarShapedScheduler(
        mode="gstar_loop", t_on=1.0, t_off=0.0, plateau_mask_ratio=n / length, remask_temperature=temperature
    )
    scheduler.set_timesteps(2)
    x = torch.zeros(rows, length, dtype=torch.long)
    out = scheduler.step(
        torch.zeros(rows, length, 2),
        scheduler.timesteps[0],
        x,
        mask_token_id=1,
        error_fn=lambda tokens: torch.tensor(errors).expand(tokens.shape),
        generator=torch.Generator().manual_seed(seed),
    )
    assert (out.remask_index.sum(1) == n).all()
    return out.remask_index


def test_remask_temperature_zero_is_top_k():
    errors = [0.3, -2.0, 5.0, 0.1, 0.4, -1.0]
    chosen = one_guided_step(errors, 0.0, 32, 3)
    assert torch.equal(chosen, torch.tensor([True, False, True, False, True, False]).expand(32, 6))
    # and the limit of small temperatures
    assert torch.equal(one_guided_step(errors, 1e-6, 32, 3), chosen)


def test_remask_temperature_infinity_is_uniform():
    counts = one_guided_step([0.3, -2.0, 50.0, 0.1, 0.4, -1.0], math.inf, 6000, 1).sum(0)
    assert p_value(counts, [1000] * 6) > 1e-3


def test_at_temperature_one_positions_are_drawn_by_plackett_and_luce():
    errors = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.float64)
    rows = 20_000
    pairs = one_guided_step(errors.tolist(), 1.0, rows, 2)
    w = errors.exp() / errors.exp().sum()
    expected, counts = [], []
    for i in range(4):
        for j in range(i):
            expected.append(float(w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j])) * rows)
            counts.append(int((pairs[:, i] & pairs[:, j]).sum()))
    assert p_value(counts, expected) > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_predictor_without_an_opinion_is_the_unguided_sampler_to_the_bit(temperature, exact, sample_chain):
    for plain, led in (("star_plus", "gstar_plus"), ("star_loop", "gstar_loop")):
        ours = StarShapedScheduler(mode=led, remask_temperature=temperature)
        zero = sample_chain(ours, exact, 12, error_fn=lambda tokens: torch.zeros(tokens.shape))
        assert torch.equal(zero, sample_chain(StarShapedScheduler(mode=plain), exact, 12))


@pytest.mark.parametrize("steps", [8, 24])
@pytest.mark.parametrize(("led", "plain"), [("gstar_plus", "star_plus"), ("gstar_loop", "star_loop")])
def test_an_oracle_predictor_improves_validity(steps, led, plain, exact, sample_chain):
    # with the ancestral tail of a loop, what the oracle has just masked would be filled unchecked
    tail = "guided" if led == "gstar_loop" else "ancestral"
    with_oracle = sample_chain(StarShapedScheduler(mode=led, tail=tail), exact, steps, 400, error_fn=exact.wrong)
    without = sample_chain(StarShapedScheduler(mode=plain, tail=tail), exact, steps, 400)
    # 400 rows: the standard error of each is at most 0.025
    assert exact.valid(with_oracle[-1]) > exact.valid(without[-1]) + 0.1


def test_a_guided_tail_is_no_worse_than_the_ancestral_one(exact, sample_chain):
    valid = {}
    for tail in ("ancestral", "guided"):
        scheduler = StarShapedScheduler(mode="gstar_loop", tail=tail, plateau_mask_ratio=0.3)
        valid[tail] = exact.valid(sample_chain(scheduler, exact, 32, 400, error_fn=exact.wrong)[-1])
    assert valid["guided"] > valid["ancestral"] + 0.05


def test_an_exact_denoiser_with_one_position_a_step_draws_from_its_language(exact, sample_chain):
    # ancestral with T >> L reveals almost always one at a time, which is exact
    final = sample_chain(StarShapedScheduler(mode="mdlm"), exact, 400, rows=2000, length=3)[-1]
    assert exact.valid(final) > 0.98
    counts = torch.bincount(final[:, 0] * 5 + final[:, 1], minlength=25)
    assert p_value(counts, [80] * 25) > 1e-3


def test_the_share_of_masks_follows_the_schedule(sample_chain):
    def denoiser(x):
        return torch.zeros(*x.shape, 6)

    for options in ({}, {"noise_schedule": "cosine"}):
        scheduler = StarShapedScheduler(mode="mdlm", **options)
        states = sample_chain(scheduler, denoiser, 10, rows=200, length=50)
        for k in range(1, 10):
            t = 1 - k * (1 - 1e-5) / 10
            mu = 0.999 * t if not options else 1 - (0.001 + 0.999 * math.cos(math.pi * t / 2))
            # 10,000 positions: 5 standard errors; the chain starts wholly masked, not at mu(1) = 0.999
            assert float((states[k] == MASK).double().mean()) == pytest.approx(mu, abs=0.026)


@pytest.mark.parametrize("mode", ["remdm_cap", "remdm_loop"])
def test_remdm_masks_revealed_tokens_at_the_rate_eta(mode):
    scheduler = StarShapedScheduler(mode=mode, eta=0.04)
    scheduler.set_timesteps(10)
    x = torch.zeros(100, 100, dtype=torch.long)
    t = scheduler.timesteps[5]
    out = scheduler.step(torch.zeros(100, 100, 2), t, x, mask_token_id=1, generator=torch.Generator().manual_seed(0))
    assert int(out.remask_index.sum()) == pytest.approx(400, abs=100)  # binomial: 5 standard deviations
    x = torch.ones(100, 100, dtype=torch.long)
    out = scheduler.step(torch.zeros(100, 100, 2), t, x, mask_token_id=1, generator=torch.Generator().manual_seed(0))
    alpha_t, alpha_s = 1 - 0.999 * 0.5, 1 - 0.999 * 0.4
    reveal = (alpha_s - 0.96 * alpha_t) / (1 - alpha_t) if mode == "remdm_cap" else 0.04 * 0.9 / 0.1
    assert float(out.transfer_index.double().mean()) == pytest.approx(reveal, abs=0.025)


def test_low_confidence_keeps_llada_s_counts_and_the_most_probable():
    scheduler = StarShapedScheduler(mode="low_confidence")
    scheduler.set_timesteps(4)
    x = torch.full((1, 10), 10)
    logits = torch.zeros(1, 10, 11)
    logits[0, torch.arange(10), torch.arange(10)] = torch.tensor([5.0, 1, 9, 2, 8, 3, 7, 4, 6, 10])
    kept = []
    for t in scheduler.timesteps:
        out = scheduler.step(logits, t, x, mask_token_id=10, temperature=0)
        assert not out.remask_index.any()
        kept.append(out.transfer_index[0].nonzero()[:, 0].tolist())
        x = out.prev_sample
    # 10 // 4 = 2, and the remainder of 2 goes to the first steps; in the order of the logits above
    assert kept == [[2, 4, 9], [0, 6, 8], [5, 7], [1, 3]]


def test_p2_reads_raw_logits_at_revealed_positions():
    logits = torch.zeros(1, 4, 3)
    logits[0, :, 0] = torch.tensor([-6.0, 6.0, 6.0, 6.0])
    x = torch.tensor([[0, 0, 0, 2]])
    chosen = {}
    for eta in (0.0, 1.0):
        scheduler = StarShapedScheduler(mode="p2", eta=eta)
        scheduler.set_timesteps(4)
        out = scheduler.step(logits, scheduler.timesteps[2], x, mask_token_id=2, temperature=0)
        chosen[eta] = (out.prev_sample == 2)[0].tolist()  # floor((1 - 3/4) 4) = 1 position is masked
    # eta 0 never revises; eta 1 takes back the token that the denoiser finds improbable
    assert chosen == {0.0: [False, False, False, True], 1.0: [True, False, False, False]}
