"""Every formula in float64 against a loop over plain numbers, and against worlds whose answer is known."""

import math

import pytest
import torch

from trainers.vldac import losses


T, N, B, L = 7, 3, 5, 6
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of a few dozen terms


@pytest.fixture
def world():
    """A rollout with both kinds of ends, one step that is both, and one that ends with the buffer."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    terminated, truncated = torch.zeros(T, N, dtype=torch.bool), torch.zeros(T, N, dtype=torch.bool)
    terminated[2, 0] = terminated[4, 1] = terminated[6, 1] = True
    truncated[3, 2] = truncated[5, 0] = truncated[4, 1] = True
    return {
        "rewards": draw(T, N), "values": draw(T, N), "last_values": draw(N),
        "terminated": terminated, "truncated": truncated, "final_values": draw(T, N),
    }  # fmt: skip


def looped_gae(world, gamma, lam, counted=None):
    advantages = [[0.0] * N for _ in range(T)]
    for n in range(N):
        following = 0.0
        for t in range(T - 1, -1, -1):
            ended = bool(world["terminated"][t, n]) or bool(world["truncated"][t, n])
            if bool(world["terminated"][t, n]):
                rest = 0.0
            elif bool(world["truncated"][t, n]):
                rest = float(world["final_values"][t, n])
            else:
                rest = float(world["last_values"][n] if t == T - 1 else world["values"][t + 1, n])
            if ended:
                following = 0.0
            delta = float(world["rewards"][t, n]) + gamma * rest - float(world["values"][t, n])
            following = delta + gamma * lam * following
            if counted is not None and not bool(counted[t, n]):
                following = 0.0
            advantages[t][n] = following
    return torch.tensor(advantages, dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.5, 0.0), (0.0, 0.9)])
def test_gae_is_the_loop(world, gamma, lam):
    advantages, returns = losses.gae(**world, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, looped_gae(world, gamma, lam), **EXACT)
    torch.testing.assert_close(returns, advantages + world["values"], **EXACT)


def test_gae_of_a_perfect_critic_is_zero():
    """A corridor of five steps with reward 1 at its end: V(s_t) = gamma^(4 - t), whatever lambda is."""
    gamma = 0.9
    values = torch.tensor([[gamma ** (4 - t)] for t in range(5)], dtype=torch.float64)
    rewards = torch.tensor([[0.0]] * 4 + [[1.0]], dtype=torch.float64)
    ends = torch.tensor([[False]] * 4 + [[True]])
    advantages, _ = losses.gae(
        rewards, values, torch.tensor([7.0], dtype=torch.float64), ends, ends & False, gamma=gamma, lam=0.7
    )
    torch.testing.assert_close(advantages, torch.zeros_like(values), **EXACT)


def test_truncation_is_worth_its_last_observation_and_termination_nothing(world):
    """Reward 1 for ever is worth 1 / (1 - gamma): a clock must not change that, an end must."""
    gamma = 0.8
    worth = 1 / (1 - gamma)
    shape = (4, 1)
    values = torch.full(shape, worth, dtype=torch.float64)
    last, never = values[0], torch.zeros(shape, dtype=torch.bool)
    at_end = never.clone()
    at_end[-1] = True
    rewards = torch.ones(shape, dtype=torch.float64)
    cut, _ = losses.gae(rewards, values, last * 0, never, at_end, values, gamma=gamma, lam=0.9)
    torch.testing.assert_close(cut, torch.zeros_like(cut), **EXACT)
    ended, _ = losses.gae(rewards, values, last * 0, at_end, never, values, gamma=gamma, lam=0.0)
    torch.testing.assert_close(ended[-1], torch.tensor([1 - worth], dtype=torch.float64), **EXACT)
    nothing_known, _ = losses.gae(rewards, values, last, never, at_end, gamma=gamma, lam=0.0)
    torch.testing.assert_close(nothing_known[-1], ended[-1], **EXACT)


def test_lambda_1_gives_the_discounted_return(world):
    gamma = 0.9
    _, returns = losses.gae(**world, gamma=gamma, lam=1.0)
    rewards = world["rewards"]
    expected = sum(gamma**i * rewards[i, 0] for i in range(3))
    torch.testing.assert_close(returns[0, 0], expected, **EXACT)
    cut = sum(gamma**i * rewards[i, 2] for i in range(4)) + gamma**4 * world["final_values"][3, 2]
    torch.testing.assert_close(returns[0, 2], cut, **EXACT)


def test_a_step_that_never_happened_is_left_out(world):
    counted = torch.ones(T, N, dtype=torch.bool)
    counted[1, 1] = counted[6, 2] = False
    world["rewards"][1, 1] = math.nan
    advantages, returns = losses.gae(**world, counted=counted, gamma=0.9, lam=0.8)
    world["rewards"][1, 1] = 0.0
    torch.testing.assert_close(advantages, looped_gae(world, 0.9, 0.8, counted), **EXACT)
    assert advantages[1, 1] == 0
    assert returns[1, 1] == world["values"][1, 1]


@pytest.mark.parametrize("name", ["rewards", "values", "last_values", "final_values"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gae_refuses_what_is_not_finite(world, name, value):
    place = (3, 2) if world[name].dim() == 2 else (0,)
    world[name][place] = value
    with pytest.raises(ValueError, match=f"`{name}` must be finite, got .* at "):
        losses.gae(**world)


def test_gae_does_not_read_what_an_end_hides(world):
    before, _ = losses.gae(**world)
    world["final_values"][0, 0] = math.nan  # nothing was cut there
    world["last_values"][1] = math.inf  # its episode ended with the buffer
    after, _ = losses.gae(**world)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.1}, "`gamma` must be in"),
        ({"lam": -0.1}, "`lam` must be in"),
        ({"values": torch.zeros(T, N + 1)}, "`values` must have shape"),
        ({"last_values": torch.zeros(N + 1)}, "`last_values`"),
        ({"truncated": torch.zeros(T - 1, N, dtype=torch.bool)}, "`truncated` must have shape"),
    ],
)
def test_gae_refuses_what_does_not_fit(world, change, message):
    with pytest.raises(ValueError, match=message):
        losses.gae(**{**world, **change})


@pytest.fixture
def tokens():
    """Values before each token of responses of 1 to 4 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 5, (T, N), generator=generator)
    return torch.randn(T, N, 4, generator=generator, dtype=torch.float64), torch.arange(4) < lengths[..., None]


def test_token_gae_is_the_loop_over_an_episode_of_tokens(world, tokens):
    values, mask = tokens
    gamma, lam = 0.9, 0.8
    del world["values"]
    advantages, returns = losses.token_gae(values=values, mask=mask, **world, gamma=gamma, lam=lam)
    for n in range(N):
        rows = []  # one for each token: place, its reward, what follows it, discount to what follows, does it go on
        for t in range(T):
            length = int(mask[t, n].sum())
            for i in range(length):
                if i < length - 1:
                    rows.append(((t, n, i), 0.0, float(values[t, n, i + 1]), 1.0, True))
                    continue
                if world["terminated"][t, n]:
                    rest = 0.0
                elif world["truncated"][t, n]:
                    rest = float(world["final_values"][t, n])
                else:
                    rest = float(world["last_values"][n] if t == T - 1 else values[t + 1, n, 0])
                goes_on = not (world["terminated"][t, n] or world["truncated"][t, n])
                rows.append(((t, n, i), float(world["rewards"][t, n]), rest, gamma, goes_on))
        following = 0.0
        for place, reward, rest, discount, goes_on in reversed(rows):
            delta = reward + discount * rest - float(values[place])
            following = delta + (discount * lam * following if goes_on else 0.0)
            assert float(advantages[place]) == pytest.approx(following, abs=1e-12)
    torch.testing.assert_close(returns[mask], (advantages + values)[mask], **EXACT)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_token_gae_of_one_token_is_gae(world):
    mask = torch.ones(T, N, 1, dtype=torch.bool)
    values = world.pop("values")
    token, _ = losses.token_gae(values=values[..., None], mask=mask, **world, gamma=0.9, lam=0.8)
    step, _ = losses.gae(values=values, **world, gamma=0.9, lam=0.8)
    torch.testing.assert_close(token[..., 0], step, **EXACT)


def test_both_critics_have_one_return_at_lambda_1(world, tokens):
    values, mask = tokens
    step, _ = losses.gae(**{**world, "values": values[..., 0]}, gamma=0.9, lam=1.0)
    del world["values"]
    token, _ = losses.token_gae(values=values, mask=mask, **world, gamma=0.9, lam=1.0)
    torch.testing.assert_close(token[..., 0], step, **EXACT)


def test_token_gae_refuses_a_step_without_tokens(world, tokens):
    values, mask = tokens
    del world["values"]
    mask[0, 0] = False
    with pytest.raises(ValueError, match="a step with none"):
        losses.token_gae(values=values, mask=mask, **world)


def test_leave_one_out_is_the_formula_and_sums_to_zero():
    returns = torch.tensor([1.0, 0.0, 0.0, 3.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([4, 4, 4, 9, 9])
    found = losses.leave_one_out(returns, groups)
    torch.testing.assert_close(found, torch.tensor([1, -0.5, -0.5, 2, -2], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(found[:3], 3 / 2 * (returns[:3] - returns[:3].mean()), **EXACT)


def test_leave_one_out_refuses_a_group_of_one():
    with pytest.raises(ValueError, match="at least 2 episodes"):
        losses.leave_one_out(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="`returns` must be finite"):
        losses.leave_one_out(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))


def test_normalize_counts_what_counts():
    advantages = torch.tensor([[1.0, 50.0], [3.0, 5.0]], dtype=torch.float64)
    found = losses.normalize(advantages, torch.tensor([[True, False], [True, True]]))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), atol=1e-7, rtol=0)
    same = torch.full((2, 2), 0.1)  # the mean of equal floats need not be that float
    assert not losses.normalize(same, torch.ones(2, 2, dtype=torch.bool)).any()
    assert not losses.normalize(advantages, torch.tensor([[True, False], [False, False]])).any()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(11)
    lengths = torch.tensor([6, 1, 3, 0, 4])
    mask = torch.arange(L) < lengths[:, None]
    old = -torch.rand(B, L, generator=generator, dtype=torch.float64) * 3
    new = old + 0.3 * torch.randn(B, L, generator=generator, dtype=torch.float64)
    old[~mask], new[~mask] = math.nan, math.inf  # whatever stands at padding
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    return new, old, advantages, mask


def surrogate(ratio, advantage, eps):
    return min(ratio * advantage, min(max(ratio, 1 - eps), 1 + eps) * advantage)


@pytest.mark.parametrize("aggregation", ["step_mean", "token_mean"])
@pytest.mark.parametrize("per_token", [False, True])
def test_policy_loss_over_tokens_is_the_loop(batch, aggregation, per_token):
    new, old, advantages, mask = batch
    if per_token:
        advantages = advantages[:, None] + torch.arange(L)
    rows = []
    for b in range(B):
        terms = []
        for i in range(L):
            if mask[b, i]:
                advantage = float(advantages[b, i] if per_token else advantages[b])
                terms.append(surrogate(math.exp(float(new[b, i] - old[b, i])), advantage, 0.1))
        rows.append(terms)
    if aggregation == "token_mean":
        expected = -sum(sum(terms) for terms in rows) / sum(len(terms) for terms in rows)
    else:
        means = [sum(terms) / len(terms) for terms in rows if terms]
        expected = -sum(means) / len(means)
    loss, figures = losses.policy_loss(new, old, advantages, mask, cliprange=0.1, aggregation=aggregation)
    assert float(loss) == pytest.approx(expected, abs=1e-12)
    assert 0 < float(figures["clip_fraction"]) < 1


@pytest.mark.parametrize("thought", [None, 0.3])
def test_policy_loss_over_steps_is_rl4vlm(batch, thought):
    new, old, advantages, mask = batch
    weights = None
    if thought is not None:
        weights = torch.full((B, L), thought, dtype=torch.float64)
        weights[:, 2:] = 1.0
    terms = []
    for b in range(B):
        score = {"new": 0.0, "old": 0.0}
        for i in range(L):
            if mask[b, i]:
                weight = 1.0 if weights is None else float(weights[b, i])
                score["new"] += weight * float(new[b, i])
                score["old"] += weight * float(old[b, i])
        if mask[b].any():
            terms.append(surrogate(math.exp(score["new"] - score["old"]), float(advantages[b]), 0.2))
    loss, _ = losses.policy_loss(new, old, advantages, mask, cliprange=0.2, level="step", weights=weights)
    assert float(loss) == pytest.approx(-sum(terms) / len(terms), abs=1e-12)


def test_levels_agree_for_one_token(batch):
    new, old, advantages, mask = batch
    mask = mask & (torch.arange(L) == 0)
    token, _ = losses.policy_loss(new, old, advantages, mask)
    step, _ = losses.policy_loss(new, old, advantages, mask, level="step")
    torch.testing.assert_close(token, step, **EXACT)


def test_at_the_first_epoch_the_loss_is_minus_the_mean_advantage(batch):
    """Ratio 1: the value is -mean A, the gradient that of REINFORCE, -A_t / (L_t S) at each token."""
    _, old, advantages, mask = batch
    new = torch.where(mask, old, 0.0).requires_grad_()
    loss, figures = losses.policy_loss(new, old, advantages, mask)
    rows = mask.any(1)
    torch.testing.assert_close(loss.detach(), -advantages[rows].mean(), **EXACT)
    loss.backward()
    expected = -(advantages / mask.sum(1).clamp(min=1) / rows.sum())[:, None] * mask
    torch.testing.assert_close(new.grad, expected, **EXACT)
    assert figures["clip_fraction"] == 0
    assert figures["approx_kl"] == 0


def test_the_clip_stops_only_what_goes_too_far():
    """A ratio of 2: no gradient towards a good token, but one away from a bad one."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    new = torch.full((1, 2), math.log(2.0), dtype=torch.float64, requires_grad=True)
    loss, _ = losses.policy_loss(new, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), mask, cliprange=0.1)
    assert float(loss.detach()) == pytest.approx(-(1.1 - 2.0) / 2)
    loss.backward()
    assert new.grad[0].tolist() == pytest.approx([0.0, 1.0])


def test_a_ratio_beyond_e20_is_cut_and_counted():
    mask = torch.ones(1, 1, dtype=torch.bool)
    new = torch.full((1, 1), 500.0, requires_grad=True)
    loss, figures = losses.policy_loss(new, torch.zeros(1, 1), torch.tensor([-1.0]), mask)
    assert float(loss.detach()) == pytest.approx(math.exp(20), rel=1e-5)
    assert figures["ratio_clamped"] == 1


@pytest.mark.parametrize("aggregation", ["step_mean", "token_mean"])
def test_micro_batches_and_padding_change_nothing(batch, aggregation):
    new, old, advantages, mask = batch
    returns, values = torch.linspace(-1, 1, B).double(), torch.linspace(2, 0, B).double()
    count = int(mask.any(1).sum()) if aggregation == "step_mean" else int(mask.sum())
    options = {"aggregation": aggregation, "num_items": count}

    def total(rows, width):
        piece = [new[rows, :width], old[rows, :width], mask[rows, :width]]
        policy, _ = losses.policy_loss(piece[0], piece[1], advantages[rows], piece[2], **options)
        kl = losses.kl_loss(*piece, **options)
        return policy + kl + losses.value_loss(values[rows], returns[rows], mask[rows].any(1), num_items=count)

    whole = total(slice(0, 5), L)
    parts = total(slice(0, 1), 6) + total(slice(1, 4), 3) + total(slice(4, 5), 4)
    torch.testing.assert_close(parts, whole, **EXACT)
    policy, _ = losses.policy_loss(new, old, advantages, mask, aggregation=aggregation)
    kl = losses.kl_loss(new, old, mask, aggregation=aggregation)
    value = losses.value_loss(values, returns, mask.any(1), num_items=count)
    torch.testing.assert_close(policy + kl + value, whole, **EXACT)


@pytest.mark.parametrize("estimator", ["k3", "k1"])
def test_the_mean_of_an_estimator_is_the_kl(estimator):
    """Over a whole vocabulary, weighed by the policy, each is sum pi log(pi / ref)."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    expected = sum(math.exp(p) * (p - r) for p, r in zip(policy.tolist(), reference.tolist(), strict=True))
    each = getattr(losses, estimator)(policy, reference)
    assert float((policy.exp() * each).sum()) == pytest.approx(expected, abs=1e-12)
    assert estimator == "k1" or bool((each >= 0).all())


def test_kl_loss_is_the_loop(batch):
    new, old, _, mask = batch
    means = []
    for b in range(B):
        d = [float(old[b, i] - new[b, i]) for i in range(L) if mask[b, i]]
        if d:
            means.append(sum(math.exp(x) - x - 1 for x in d) / len(d))
    assert float(losses.kl_loss(new, old, mask)) == pytest.approx(sum(means) / len(means), abs=1e-12)


def test_k3_pulls_towards_the_reference():
    """d/d log pi (exp(d) - d - 1) = 1 - exp(d): 0 at the reference, positive above it."""
    new = torch.tensor([[0.0, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    losses.kl_loss(new, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)).backward()
    expected = [(1 - math.exp(-x)) / 3 for x in (0.0, 0.5, -0.5)]
    assert new.grad[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_value_loss_is_half_the_square_and_its_clip_the_larger():
    values = torch.tensor([1.0, 0.0, 9.0], dtype=torch.float64)
    returns = torch.tensor([3.0, 0.5, 0.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False])
    assert float(losses.value_loss(values, returns, mask)) == pytest.approx((4 / 2 + 0.25 / 2) / 2)
    # V moved from 0 to 1 towards 3: the clip holds it at 0.1, whose error is larger
    old = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)
    found = losses.value_loss(values, returns, mask, old_values=old, cliprange_value=0.1)
    assert float(found) == pytest.approx((2.9**2 / 2 + 0.25 / 2) / 2)


def test_value_loss_over_tokens_gives_each_step_one_weight(batch):
    _, _, _, mask = batch
    values = torch.arange(B * L, dtype=torch.float64).view(B, L) / 7
    means = [float((values[b][mask[b]] ** 2 / 2).mean()) for b in range(B) if mask[b].any()]
    found = losses.value_loss(values, torch.zeros(B, L), mask)
    assert float(found) == pytest.approx(sum(means) / len(means), abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs"])
def test_log_probabilities_that_are_not_finite_are_refused(batch, name, value):
    new, old, advantages, mask = batch
    (new if name == "logprobs" else old)[2, 1] = value
    with pytest.raises(FloatingPointError, match=f"`{name}` must be finite, got .* at token 1 of row 2"):
        if name == "ref_logprobs":
            losses.kl_loss(new, old, mask)
        else:
            losses.policy_loss(new, old, advantages, mask)


def test_options_that_do_not_fit_are_refused(batch):
    new, old, advantages, mask = batch
    for options, message in (
        ({"cliprange": 0.0}, "`cliprange` must be above 0"),
        ({"level": "turn"}, "`level` must be"),
        ({"aggregation": "sum"}, "`aggregation` must be"),
        ({"weights": mask.double()}, '`weights` belong to level="step"'),
    ):
        with pytest.raises(ValueError, match=message):
            losses.policy_loss(new, old, advantages, mask, **options)
    with pytest.raises(ValueError, match="a step has one ratio"):
        losses.policy_loss(new, old, torch.zeros(B, L), mask, level="step")
    with pytest.raises(ValueError, match="`advantages` must be finite"):
        losses.policy_loss(new, old, advantages * math.nan, mask)
    with pytest.raises(ValueError, match="`returns` must be finite"):
        losses.value_loss(advantages, advantages * math.inf, mask.any(1))
    with pytest.raises(ValueError, match="`cliprange_value` must be"):
        losses.value_loss(advantages, advantages, mask.any(1), cliprange_value=0.1)
    with pytest.raises(ValueError, match="`estimator` must be"):
        losses.kl_loss(new, old, mask, estimator="k2")
    with pytest.raises(ValueError, match="the mask's shape"):
        losses.policy_loss(new[:, :3], old, advantages, mask)


def test_explained_variance_of_a_perfect_and_of_a_constant_critic():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert losses.explained_variance(returns, returns) == 1
    assert losses.explained_variance(torch.zeros(3), returns) == pytest.approx(0)
    assert losses.explained_variance(-returns, returns) == pytest.approx(1 - 4)
    assert math.isnan(losses.explained_variance(returns, torch.ones(3)))
