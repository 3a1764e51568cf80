"""Each loss against a slow, obvious one; in float64 where that settles a question."""

import itertools
import math
from dataclasses import dataclass

import mpmath
import pytest
import torch
import torch.nn.functional as F

from loss import (
    LOSS_TYPES,
    OPTION_TYPES,
    grpo_loss,
    plackett_luce,
    ppo_loss,
    preference_loss,
    reward_loss,
    sequence_logprobs,
    taylor_nll,
    wins,
)

torch.manual_seed(0)
EPS32, EPS64 = 2**-23, 2**-52


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


# ---- Plackett-Luce


def slow_plackett_luce(scores, response_mask, ranks, depth):
    """One row in Python: each present response against itself and the strictly worse ones."""
    K = len(scores)
    total, num_terms = 0.0, 0
    for k in range(K):
        if not response_mask[k] or (depth is not None and num_terms == depth):
            continue
        num_terms += 1
        pool = [scores[j] for j in range(K) if response_mask[j] and (j == k or ranks[j] > ranks[k])]
        top = max(pool)
        total += top + math.log(sum(math.exp(s - top) for s in pool)) - scores[k]
    return total


@pytest.mark.parametrize("diff", [0.1, 12.0, 16.7, 30.0, 80.0])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_plackett_luce_gradient_where_the_ranking_is_certain(diff, margin):
    """In float32 it is as exact as that of -log sigmoid, far below 2^-24 too."""
    scores = torch.tensor([[diff, 0.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(plackett_luce(scores, margin=margin).sum(), scores)
    x = scores.detach().double().requires_grad_()
    exact = -F.logsigmoid(x[:, 0] - x[:, 1] - margin)
    (expected,) = torch.autograd.grad(exact.sum(), x)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=0)

    three = torch.tensor([[diff, 0.0, -diff - 2]], requires_grad=True)
    (grad,) = torch.autograd.grad(plackett_luce(three, margin=margin).sum(), three)
    x = three.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plackett_luce(x, margin=margin).sum(), x)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4])
def test_plackett_luce_values_do_not_depend_on_the_diagonal(scale):
    """A constant 0 in place of s_k - s_k changes no bit of a value."""
    g = seeded(5)
    scores = scale * torch.randn(200, 4, generator=g)
    mask = torch.rand(200, 4, generator=g) > 0.3
    ranks = torch.randint(0, 4, (200, 4), generator=g).sort(1).values
    worse = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    diagonal = torch.eye(4, dtype=torch.bool)
    for margin in (0.0, 0.7):
        s = scores.masked_fill(~mask, 0.0)
        diff = s[:, None, :] - s[:, :, None]
        diff = torch.where(diagonal, diff, diff + margin)
        terms = torch.logsumexp(diff.masked_fill(~(worse | diagonal), -math.inf), -1)
        expected = terms.masked_fill(~mask, 0.0).sum(1)
        assert torch.equal(plackett_luce(scores, mask, None, ranks, margin), expected)


@pytest.mark.parametrize("K", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("depth", [None, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_plackett_luce_equals_a_loop(K, depth, scale):
    g = seeded(K)
    scores = (scale * torch.randn(50, K, dtype=torch.float64, generator=g)).requires_grad_()
    response_mask = torch.rand(50, K, generator=g) > 0.3
    ranks = torch.randint(0, K, (50, K), generator=g).sort(1).values
    nll = plackett_luce(scores, response_mask, depth, ranks)
    rows = zip(scores.tolist(), response_mask.tolist(), ranks.tolist())
    slow = float64([slow_plackett_luce(*row, depth) for row in rows])
    torch.testing.assert_close(nll, slow, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(nll.sum(), scores)
    assert torch.isfinite(grad).all()
    # Adding a constant to all scores changes nothing, so the gradient sums to 0: K terms of size
    # <= K.
    assert grad.sum(1).abs().max() < 10 * K * K * EPS64
    assert (grad[~response_mask] == 0).all()


@pytest.mark.parametrize("dtype, eps", [(torch.float64, EPS64), (torch.float32, EPS32)])
@pytest.mark.parametrize("scores", [[0.3, -0.2, 1.1], [1e4, -1e4, 3e4], [1000.0, 1000.5, 999.0]])
def test_plackett_luce_gradient_in_closed_form(dtype, eps, scores):
    """dL/ds_j = sum_{k<=j} softmax_{i>=k}(s)_j - 1. The differences of these scores are exact,
    which leaves a few roundings of the softmax."""
    s = torch.tensor([scores], dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(plackett_luce(s).sum(), s)
    exact = torch.full((3,), -1.0, dtype=torch.float64)
    for k in range(3):
        exact[k:] += s.detach().double()[0, k:].softmax(0)
    assert (grad[0].double() - exact).abs().max() < 20 * eps


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
def test_probabilities_of_all_rankings_sum_to_one(K):
    s = torch.randn(K, dtype=torch.float64)
    rankings = torch.stack([s[list(order)] for order in itertools.permutations(range(K))])
    assert abs(torch.exp(-plackett_luce(rankings)).sum().item() - 1) < 1e-13
    one_for_each_first = rankings[:: math.factorial(K - 1)]
    first_place = torch.exp(-plackett_luce(one_for_each_first, depth=1))
    assert abs(first_place.sum().item() - 1) < 1e-13


@pytest.mark.parametrize(
    "scores, value",
    [
        ([0.3, -0.2], 0.474076984180),
        ([1, 0.5, -1], 0.756370197625),
        ([-1, 0.5, 1], 3.529033903822),
        ([2, 1, 0, -1], 1.161057350524),
    ],
)
def test_worked_values(scores, value):
    assert abs(plackett_luce(float64([scores])).item() - value) < 1e-12


def test_worked_gradient():
    s = float64([[1, 0.5, -1]]).requires_grad_()
    (grad,) = torch.autograd.grad(plackett_luce(s).sum(), s)
    expected = float64([-0.425903007032, 0.165781904077, 0.260121102955])
    torch.testing.assert_close(grad[0], expected, rtol=0, atol=1e-12)


def test_two_responses_are_dpo():
    s = 5 * torch.randn(100, 2, dtype=torch.float64)
    dpo = -F.logsigmoid(s[:, 0] - s[:, 1])
    torch.testing.assert_close(plackett_luce(s), dpo, rtol=1e-14, atol=1e-15)


def test_absent_responses_change_nothing():
    """Wherever they are, up to the order of a sum."""
    s = torch.randn(20, 3, dtype=torch.float64)
    wide = torch.full((20, 5), math.nan, dtype=torch.float64)
    response_mask = torch.zeros(20, 5, dtype=torch.bool)
    for b in range(20):
        columns = torch.randperm(5, generator=seeded(b))[:3].sort().values
        wide[b, columns] = s[b]
        response_mask[b, columns] = True
    wide.requires_grad_()
    nll = plackett_luce(wide, response_mask)
    torch.testing.assert_close(nll, plackett_luce(s), rtol=1e-14, atol=1e-14)
    (grad,) = torch.autograd.grad(nll.sum(), wide)
    assert torch.isfinite(grad).all() and (grad[~response_mask] == 0).all()


def test_ties_do_not_compete():
    s = torch.randn(10, 4, dtype=torch.float64)
    ranks = torch.tensor([0, 1, 1, 2]).expand(10, 4)
    a, b = plackett_luce(s, ranks=ranks), plackett_luce(s[:, [0, 2, 1, 3]], ranks=ranks)
    assert torch.allclose(a, b, rtol=1e-14)
    all_tied = torch.zeros(10, 4, dtype=torch.long)
    assert (plackett_luce(s, ranks=all_tied).abs() < 1e-15).all()


# ---- preference losses


@pytest.mark.parametrize("K", [2, 3, 4, 5, 6])
def test_a_round_starts_at_ln_k_factorial(K):
    logps = -100 * torch.rand(8, K)
    loss, metrics = preference_loss(logps, logps.clone())
    assert abs(loss.item() - math.log(math.factorial(K))) < 1e-6 and metrics["margin"] == 0


def test_terms_of_the_preference_loss():
    policy = -50 * torch.rand(6, 3, dtype=torch.float64)
    ref = -50 * torch.rand(6, 3, dtype=torch.float64)
    lengths = torch.randint(1, 20, (6, 3))
    s = 0.2 * (policy - ref)
    nll = plackett_luce(s)

    loss, metrics = preference_loss(policy, ref, beta=0.2)
    assert torch.allclose(loss, nll.mean()) and torch.allclose(metrics["nll"], nll.mean())

    loss, _ = preference_loss(policy, ref, beta=0.2, nll_coef=0.5, lengths=lengths)
    assert torch.allclose(loss, (nll - 0.5 * policy[:, 0] / lengths[:, 0]).mean())

    loss, _ = preference_loss(policy, ref, beta=0.2, taylor_order=1.0)
    assert torch.allclose(loss, (nll - (1 - torch.exp(-nll))).mean())

    # cDPO: (1 - eps) (-log sigmoid(d)) + eps (-log sigmoid(-d))
    loss, _ = preference_loss(policy[:, :2], ref[:, :2], beta=0.2, label_smoothing=0.1)
    d = s[:, 0] - s[:, 1]
    assert torch.allclose(loss, (-0.9 * F.logsigmoid(d) - 0.1 * F.logsigmoid(-d)).mean())

    with pytest.raises(ValueError, match="lengths"):
        preference_loss(policy, ref, nll_coef=0.1)


def test_simpo_with_margin_and_label_smoothing():
    """The authors' -(1 - e) log s(x) - e log s(-x), x = beta (m_w - m_l) - gamma."""
    options = {"beta": 2.0, "loss_type": "simpo", "margin": 0.6, "label_smoothing": 0.1}
    means = float64([[-1.0, -1.5]])
    loss, _ = preference_loss(means, means, lengths=torch.ones(1, 2), **options)
    assert abs(loss - 0.5530) < 5e-5

    g = seeded(3)
    policy = -10 * torch.rand(20, 2, dtype=torch.float64, generator=g)
    lengths = torch.randint(1, 9, (20, 2), generator=g)
    loss, metrics = preference_loss(policy, policy, lengths=lengths, **options)
    means = policy / lengths
    x = 2.0 * (means[:, 0] - means[:, 1]) - 0.6
    assert torch.allclose(loss, (-0.9 * F.logsigmoid(x) - 0.1 * F.logsigmoid(-x)).mean())
    assert torch.allclose(metrics["nll"], -F.logsigmoid(x).mean())

    # K = 3: Plackett-Luce of the reversed ranking, whose worse responses get -margin
    policy = -10 * torch.rand(20, 3, dtype=torch.float64, generator=g)
    lengths = torch.randint(1, 9, (20, 3), generator=g)
    loss, _ = preference_loss(policy, policy, lengths=lengths, **options)
    scores = 2.0 * policy / lengths
    reverse = plackett_luce(scores.flip(1), margin=-0.6)
    assert torch.allclose(loss, (0.9 * plackett_luce(scores, margin=0.6) + 0.1 * reverse).mean())


def test_accuracy_and_margin():
    policy = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    response_mask = torch.tensor([[True, True, True], [True, True, False]])
    _, metrics = preference_loss(policy, torch.zeros(2, 3), response_mask, beta=1.0)
    assert metrics["acc"] == 0.5 and metrics["margin"] == ((3 - 1.5) + (1 - 2)) / 2


def test_a_tie_counts_half():
    """In the accuracy of both losses; at a round's start all scores are equal."""
    scores = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]])  # right: 2.5 of 3 pairs, 1.5 of 3
    _, metrics = preference_loss(scores, torch.zeros(2, 3), beta=1.0)
    assert metrics["acc"] == pytest.approx((2.5 / 3 + 0.5) / 2)
    _, metrics = reward_loss(scores, torch.ones(2, 3, dtype=torch.bool), "pairs")
    assert metrics["acc"] == pytest.approx((2.5 / 3 + 0.5) / 2)
    assert wins(torch.tensor([-2.0, 0.0, -0.0, 1e-30])).tolist() == [0.0, 0.5, 0.5, 1.0]


def test_gradient_weight():
    """It is what DPO's gradient is scaled by: d loss / d s_1 = -weight. At the start it is 1/2."""
    policy = float64([[0.5, -0.25]]).requires_grad_()
    loss, metrics = preference_loss(policy, torch.zeros(1, 2, dtype=torch.float64), beta=1.0)
    (grad,) = torch.autograd.grad(loss, policy)
    assert abs(metrics["grad_weight"] - 1 / (1 + math.exp(0.75))) < 1e-12
    assert torch.allclose(grad, metrics["grad_weight"] * float64([[-1.0, 1.0]]))

    # three responses: the mean over the pairs, those with an absent response excepted
    policy = float64([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    _, metrics = preference_loss(policy, torch.zeros_like(policy), mask, beta=1.0)
    one, two, minus_one = torch.sigmoid(float64([-1.0, -2.0, 1.0])).tolist()
    expected = ((2 * one + two) / 3 + minus_one) / 2
    assert abs(metrics["grad_weight"] - expected) < 1e-12
    _, metrics = preference_loss(policy, policy, mask)
    assert metrics["grad_weight"] == 0.5


@dataclass
class Rows:
    """Random arguments of preference_loss for B rows of K responses, in float64."""

    policy: torch.Tensor
    ref: torch.Tensor
    lengths: torch.Tensor
    response_mask: torch.Tensor
    ranks: torch.Tensor
    data_scores: torch.Tensor

    def loss(self, loss_type, beta=0.3, **options):
        return preference_loss(
            self.policy,
            self.ref,
            self.response_mask,
            beta,
            loss_type,
            ranks=self.ranks,
            lengths=self.lengths,
            data_scores=self.data_scores,
            **options,
        )


def random_rows(B, K, seed=0):
    """With absent responses and ties. The scores in the data need not follow the ranks."""
    g = seeded(seed)
    policy = -20 * torch.rand(B, K, generator=g, dtype=torch.float64) - 0.1
    ref = -20 * torch.rand(B, K, generator=g, dtype=torch.float64) - 0.1
    lengths = torch.randint(1, 30, (B, K), generator=g)
    response_mask = torch.rand(B, K, generator=g) > 0.2
    ranks = torch.randint(0, K, (B, K), generator=g).sort(1).values
    data_scores = torch.randn(B, K, generator=g, dtype=torch.float64)
    return Rows(policy.requires_grad_(), ref, lengths, response_mask, ranks, data_scores)


@dataclass
class Row:
    """One row of Rows, in lists, and what the formulas of the papers are made of."""

    policy: list[float]
    ref: list[float]
    lengths: list[int]
    response_mask: list[bool]
    ranks: list[int]
    data_scores: list[float]
    length_normalize: bool = False
    score_margin: float = 0.0

    def present(self):
        return [k for k in range(len(self.policy)) if self.response_mask[k]]

    def worse(self, k):
        return [j for j in self.present() if self.ranks[j] > self.ranks[k]]

    def log_ratio(self, k):
        ratio = self.policy[k] - self.ref[k]
        return ratio / self.lengths[k] if self.length_normalize else ratio

    def mean_logp(self, k):
        return self.policy[k] / self.lengths[k]

    def reward_diff(self, i, j):
        """Of implicit rewards with beta 0.3, less the margin."""
        margin = self.score_margin * (self.data_scores[i] - self.data_scores[j])
        return 0.3 * (self.log_ratio(i) - self.log_ratio(j)) - margin

    def win_rate(self, k):
        wins = []
        for j in self.present():
            if j != k:
                wins.append(
                    (1 + (self.ranks[k] < self.ranks[j]) - (self.ranks[j] < self.ranks[k])) / 2
                )
        return sum(wins) / len(wins) if wins else 0.5


SLOW_PAIR_LOSSES = {
    "pairs": lambda row, i, j: math.log(1 + math.exp(-row.reward_diff(i, j))),
    "hinge": lambda row, i, j: max(0.0, 1 - row.reward_diff(i, j)),
    "linear": lambda row, i, j: -row.reward_diff(i, j),
    "ipo": lambda row, i, j: (row.log_ratio(i) - row.log_ratio(j) - 1 / (2 * 0.3)) ** 2,
}


def slow_preference(loss_type, row):
    """One row in Python, with beta 0.3 and margin 0.7."""
    if loss_type in SLOW_PAIR_LOSSES:
        losses = []
        for i in row.present():
            losses += [SLOW_PAIR_LOSSES[loss_type](row, i, j) for j in row.worse(i)]
        return sum(losses) / max(1, len(losses))
    if loss_type == "best_of_n":
        return -row.mean_logp(0) if row.response_mask[0] else 0.0
    total = 0.0
    for k in row.present():
        if loss_type == "pl":
            total += math.log(1 + sum(math.exp(-row.reward_diff(k, j)) for j in row.worse(k)))
        elif loss_type == "simpo":
            s = [0.3 * row.mean_logp(j) for j in range(len(row.policy))]
            total += math.log(1 + sum(math.exp(s[j] + 0.7 - s[k]) for j in row.worse(k)))
        elif loss_type == "orpo":
            p = [math.exp(row.mean_logp(j)) for j in range(len(row.policy))]
            odds = [x / (1 - x) for x in p]
            total -= 0.3 * math.log(odds[k] / (odds[k] + sum(odds[j] for j in row.worse(k))))
        else:
            assert loss_type == "sppo", f"{loss_type} has no formula here"
            total += (row.log_ratio(k) - (row.win_rate(k) - 0.5) / 0.3) ** 2
    return total


def assert_equals_slow_preference(rows, loss_type, **options):
    """Sums of some tens of terms, each a few roundings off, leave 1e-12 of the loss in float64."""
    margin = 0.7 if loss_type == "simpo" else 0.0
    loss, _ = rows.loss(loss_type, margin=margin, **options)
    columns = (
        rows.policy,
        rows.ref,
        rows.lengths,
        rows.response_mask,
        rows.ranks,
        rows.data_scores,
    )
    slow = 0.0
    for values in zip(*(x.tolist() for x in columns)):
        slow += slow_preference(loss_type, Row(*values, **options)) / len(rows.policy)
    assert abs(loss.item() - slow) < 1e-12 * max(1, abs(slow))
    (grad,) = torch.autograd.grad(loss, rows.policy)
    assert torch.isfinite(grad).all() and (grad[~rows.response_mask] == 0).all()


@pytest.mark.parametrize("K", range(2, 9))
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_against_their_formulas(loss_type, K):
    assert_equals_slow_preference(random_rows(30, K, seed=K), loss_type)


@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("loss_type", OPTION_TYPES["length_normalize"])
def test_rewards_per_token(loss_type, K):
    assert_equals_slow_preference(random_rows(30, K), loss_type, length_normalize=True)


@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("loss_type", OPTION_TYPES["score_margin"])
def test_score_margins(loss_type, K):
    rows = random_rows(30, K)
    assert_equals_slow_preference(rows, loss_type, score_margin=0.4)
    assert_equals_slow_preference(rows, loss_type, score_margin=0.4, length_normalize=True)


def test_a_score_margin_and_label_smoothing():
    """At two responses -(1 - e) log s(x) - e log s(-x), x = s_1 - s_2 - margin. At more, the
    reversed ranking is Plackett-Luce with the scores of the data in its order."""
    rows = random_rows(20, 2)
    rows.response_mask[:] = True
    rows.ranks = None
    loss, _ = rows.loss("pl", score_margin=0.4, label_smoothing=0.1)
    s = 0.3 * (rows.policy - rows.ref) - 0.4 * rows.data_scores
    x = s[:, 0] - s[:, 1]
    expected = (-0.9 * F.logsigmoid(x) - 0.1 * F.logsigmoid(-x)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)

    rows = random_rows(20, 4)
    loss, _ = rows.loss("pl", score_margin=0.4, label_smoothing=0.1)
    s = 0.3 * (rows.policy - rows.ref) - 0.4 * rows.data_scores
    nll = plackett_luce(s, rows.response_mask, None, rows.ranks)
    reverse = plackett_luce(s.flip(1), rows.response_mask.flip(1), None, -rows.ranks.flip(1))
    # s is rounded before the differences are: a few units in the last place of s, at most 10
    torch.testing.assert_close(loss, (0.9 * nll + 0.1 * reverse).mean(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_against_finite_differences(loss_type):
    """With gradcheck's own tolerances. No pair of these rows is at the kink of the hinge."""
    rows = random_rows(5, 4, seed=1)
    options = {}
    for name in ("length_normalize", "score_margin", "nll_coef"):
        if loss_type in OPTION_TYPES[name]:
            options[name] = 0.5

    def loss(policy):
        rows.policy = policy
        return rows.loss(loss_type, **options)[0]

    assert torch.autograd.gradcheck(loss, rows.policy)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_absent_responses_hold_does_not_matter(loss_type):
    rows = random_rows(20, 5)
    loss, metrics = rows.loss(loss_type)
    rows.policy = rows.policy.detach().masked_fill(~rows.response_mask, math.nan).requires_grad_()
    rows.ref = rows.ref.masked_fill(~rows.response_mask, math.nan)
    rows.data_scores = rows.data_scores.masked_fill(~rows.response_mask, math.nan)
    rows.lengths = rows.lengths.masked_fill(~rows.response_mask, 0)
    same, _ = rows.loss(loss_type)
    assert torch.equal(loss, same)
    (grad,) = torch.autograd.grad(same, rows.policy)
    assert torch.isfinite(grad).all()
    for name in ("length_normalize", "score_margin"):
        if loss_type in OPTION_TYPES[name]:
            loss, _ = rows.loss(loss_type, **{name: 0.4})
            (grad,) = torch.autograd.grad(loss, rows.policy)
            assert torch.isfinite(loss) and torch.isfinite(grad).all()


@pytest.mark.parametrize("loss_type", ["pl", "pairs", "hinge", "linear", "ipo", "simpo", "orpo"])
def test_a_row_of_ties_has_no_gradient(loss_type):
    rows = random_rows(20, 4)
    rows.ranks = torch.zeros(20, 4, dtype=torch.long)
    loss, _ = rows.loss(loss_type)
    (grad,) = torch.autograd.grad(loss, rows.policy)
    assert loss == 0 and (grad == 0).all()


def test_sppo_win_rates():
    """Three responses are pulled to log-ratios of 1 / (2 beta), 0 and -1 / (2 beta); of ties and
    of a response alone, to 0."""
    ref = torch.zeros(1, 3, dtype=torch.float64)
    options = {"beta": 0.5, "loss_type": "sppo"}
    loss, _ = preference_loss(float64([[1, 0, -1]]), ref, **options)
    assert loss == 0
    ranks = torch.tensor([[0, 1, 1]])  # 1, 1/4, 1/4
    loss, _ = preference_loss(float64([[1, -0.5, -0.5]]), ref, ranks=ranks, **options)
    assert loss == 0
    loss, _ = preference_loss(ref, ref, ranks=torch.zeros(1, 3, dtype=torch.long), **options)
    assert loss == 0
    alone = torch.tensor([[False, True, False]])
    loss, _ = preference_loss(float64([[9, 2, 9]]), ref, alone, **options)
    assert loss == 4


def test_losses_at_two_responses():
    """As their papers write them. Float64 leaves 1e-12."""
    policy = -20 * torch.rand(9, 2, dtype=torch.float64) - 0.1
    ref = -20 * torch.rand(9, 2, dtype=torch.float64)
    lengths = torch.randint(1, 30, (9, 2))
    ratio = policy - ref
    d = ratio[:, 0] - ratio[:, 1]
    mean = policy / lengths
    odds = mean - torch.log1p(-mean.exp())
    expected = {
        "pairs": -F.logsigmoid(0.1 * d),
        "hinge": (1 - 0.1 * d).clamp(min=0),
        "linear": -0.1 * d,
        "ipo": (d - 5) ** 2,
        "sppo": (ratio[:, 0] - 5) ** 2 + (ratio[:, 1] + 5) ** 2,
        "simpo": -F.logsigmoid(0.1 * (mean[:, 0] - mean[:, 1]) - 0.5),
        "orpo": -mean[:, 0] - 0.1 * F.logsigmoid(odds[:, 0] - odds[:, 1]),
        "best_of_n": -mean[:, 0],
    }
    assert set(expected) == set(LOSS_TYPES) - {"pl"}
    for loss_type, losses in expected.items():
        options = {"simpo": {"margin": 0.5}, "orpo": {"nll_coef": 1.0}}.get(loss_type, {})
        loss, _ = preference_loss(policy, ref, loss_type=loss_type, lengths=lengths, **options)
        torch.testing.assert_close(loss, losses.mean(), rtol=1e-12, atol=1e-12)


def test_orpo_of_a_certain_response_is_finite():
    """Every token's probability rounds to 1."""
    certain = torch.zeros(1, 2, requires_grad=True)
    lengths = torch.ones(1, 2, dtype=torch.long)
    loss, _ = preference_loss(certain, certain.detach(), loss_type="orpo", lengths=lengths)
    (grad,) = torch.autograd.grad(loss, certain)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "bradley_terry"}, "unknown loss_type"),
        ({"loss_type": "simpo"}, "lengths"),
        ({"loss_type": "best_of_n"}, "lengths"),
        ({"length_normalize": True}, "lengths"),
        ({"nll_coef": 0.1}, "lengths"),
        ({"score_margin": 1.0}, "needs data_scores"),
    ],
)
def test_options_without_their_data_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(1, 2), torch.zeros(1, 2), **options)


@pytest.mark.parametrize("name", OPTION_TYPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_options_that_a_loss_cannot_have_are_refused(loss_type, name):
    options = {name: 1, "lengths": torch.ones(1, 2), "data_scores": torch.zeros(1, 2)}
    logps = torch.full((1, 2), -1.0)
    if loss_type in OPTION_TYPES[name]:
        loss, _ = preference_loss(logps, logps, loss_type=loss_type, **options)
        assert torch.isfinite(loss)
    else:
        with pytest.raises(ValueError, match=f"{loss_type} has no {name}, only these: "):
            preference_loss(logps, logps, loss_type=loss_type, **options)


def test_sequence_logprobs():
    logps = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    response_index = torch.tensor([[-1, 0, 0], [2, -1, 2]])
    total = sequence_logprobs(logps, response_index, 4)
    assert total.tolist() == [6.0, 0.0, 40.0, 0.0]
    total.sum().backward()
    assert logps.grad.tolist() == [[0, 1, 1], [1, 0, 1]]


# ---- policy gradient without a value function


@dataclass
class Tokens:
    """Random arguments of grpo_loss, in float64."""

    logps: torch.Tensor
    old_logps: torch.Tensor
    advantages: torch.Tensor
    response_index: torch.Tensor
    lengths: torch.Tensor
    ref_logps: torch.Tensor

    def loss(self, **options):
        return grpo_loss(
            self.logps,
            self.old_logps,
            self.advantages,
            self.response_index,
            self.lengths,
            self.ref_logps,
            **options,
        )


def random_tokens(lengths=(3, 1, 0, 5, 2), seed=0):
    """Responses of these lengths, their tokens in any order. Half of the ratios are outside the
    range of clip 0.2."""
    g = seeded(seed)
    lengths = torch.tensor(lengths)
    response_index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    response_index = response_index[torch.randperm(len(response_index), generator=g)]
    logps = -3 * torch.rand(len(response_index), generator=g, dtype=torch.float64) - 0.5
    old_logps = logps - 0.3 * torch.randn(len(response_index), generator=g, dtype=torch.float64)
    advantages = torch.randn(len(response_index), generator=g, dtype=torch.float64)
    ref_logps = logps + 0.5 * torch.randn(len(response_index), generator=g, dtype=torch.float64)
    return Tokens(logps.requires_grad_(), old_logps, advantages, response_index, lengths, ref_logps)


def slow_average(values, response_index, lengths, average, max_length):
    if average == "token":
        return sum(values) / len(values)
    num_responses, total = 0, 0.0
    for response, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        num_responses += 1
        tokens = sum(value for value, i in zip(values, response_index.tolist()) if i == response)
        total += tokens / (length if average == "sequence" else max_length)
    return total / num_responses


def slow_grpo(t, average, max_length, clip, clip_high, kl_coef, entropy_coef):
    """The loss and metrics, token by token. Its gradient is autograd's."""
    policy_losses, kls, approx_kls, entropies, outside, losses = [], [], [], [], [], []
    for logp, old, advantage, ref in zip(t.logps, t.old_logps, t.advantages, t.ref_logps):
        ratio = torch.exp(logp - old)
        objective = ratio * advantage
        is_outside = False
        if clip:
            low, high = 1 - clip, 1 + (clip if clip_high is None else clip_high)
            is_outside = bool(ratio < low) or bool(ratio > high)
            clipped = min(max(ratio.item(), low), high) * advantage  # no gradient
            if is_outside and clipped < objective:
                objective = clipped
        policy_losses.append(-objective)
        outside.append(float(is_outside))
        kls.append(torch.exp(ref - logp) - (ref - logp) - 1)
        approx_kls.append(torch.exp(logp - old) - (logp - old) - 1)
        entropies.append(-ratio * logp.detach())
        losses.append(policy_losses[-1] + kl_coef * kls[-1] - entropy_coef * entropies[-1])

    of_metrics = "token" if average == "token" else "sequence"
    metrics = {
        "policy_loss": slow_average(policy_losses, t.response_index, t.lengths, average, max_length)
    }
    for name, values in [
        ("entropy", entropies),
        ("clip_fraction", outside),
        ("approx_kl", approx_kls),
        ("kl", kls),
    ]:
        metrics[name] = slow_average(values, t.response_index, t.lengths, of_metrics, 0)
    metrics = {name: torch.as_tensor(value).item() for name, value in metrics.items()}
    return slow_average(losses, t.response_index, t.lengths, average, max_length), metrics


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("clip, clip_high", [(0.2, None), (0.2, 0.28), (0.1, 0.5), (0.0, None)])
@pytest.mark.parametrize("kl_coef, entropy_coef", [(0.0, 0.0), (0.1, 0.0), (0.04, 0.02)])
def test_grpo_against_loops(average, clip, clip_high, kl_coef, entropy_coef):
    """Value, gradient and metrics. Sums of ten terms of about 1: 1e-13 is hundreds of roundings;
    clip_fraction is counted in float32."""
    t = random_tokens()
    options = {
        "average": average,
        "max_length": 7,
        "clip": clip,
        "clip_high": clip_high,
        "kl_coef": kl_coef,
        "entropy_coef": entropy_coef,
    }
    loss, metrics = t.loss(**options)
    expected, expected_metrics = slow_grpo(t, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    (grad,) = torch.autograd.grad(loss, t.logps)
    (expected_grad,) = torch.autograd.grad(expected, t.logps)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-13)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert not value.requires_grad
        tolerance = 1e-6 if name == "clip_fraction" else 1e-13
        assert value.item() == pytest.approx(expected_metrics[name], abs=tolerance), name


def test_grpo_worked_example():
    """Ratios of 1.5 and 0.5 and advantages of both signs, clipped at 0.8 and 1.28."""
    old_logps = float64([-1, -1, -1, -1])
    logps = old_logps + float64([1.5, 1.5, 0.5, 0.5]).log()
    advantages = float64([1, -1, 1, -1])
    response_index, lengths = torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1])
    options = {"clip": 0.2, "clip_high": 0.28}
    per_token = float64([-1.28, 1.5, -0.5, 0.8])
    expected = {
        "token": per_token.sum() / 4,
        "sequence": (per_token[:3].sum() / 3 + per_token[3]) / 2,
        "constant": per_token.sum() / (2 * 5),
    }
    for average, value in expected.items():
        loss, metrics = grpo_loss(
            logps,
            old_logps,
            advantages,
            response_index,
            lengths,
            average=average,
            max_length=5,
            **options,
        )
        torch.testing.assert_close(loss, value, rtol=1e-14, atol=1e-15)
        assert metrics["clip_fraction"] == 1 and "kl" not in metrics


def test_grpo_without_options_is_ppo_without_values():
    """The token average: the same policy term, entropy and metrics, bit for bit."""
    t = random_tokens()
    zeros = torch.zeros_like(t.logps)
    grpo, metrics = t.loss(entropy_coef=0.01)
    ppo, ppo_metrics = ppo_loss(
        t.logps, zeros, t.old_logps, zeros, t.advantages, zeros, entropy_coef=0.01
    )
    # losses of tokens are added before the mean in one and after it in the other
    torch.testing.assert_close(grpo, ppo, rtol=1e-14, atol=1e-15)
    for name in ("policy_loss", "entropy", "clip_fraction", "approx_kl"):
        assert torch.equal(metrics[name], ppo_metrics[name])


def test_ppo_with_its_clip_ends_apart():
    t = random_tokens()
    zeros = torch.zeros_like(t.logps)
    arguments = (t.logps, zeros, t.old_logps, zeros, t.advantages, zeros)
    apart, metrics = ppo_loss(*arguments, clip=0.1, clip_high=0.5)
    expected, expected_metrics = t.loss(clip=0.1, clip_high=0.5)
    assert torch.equal(apart, expected)
    assert torch.equal(metrics["clip_fraction"], expected_metrics["clip_fraction"])
    same, _ = ppo_loss(*arguments, clip=0.2)
    assert torch.equal(same, ppo_loss(*arguments, clip=0.2, clip_high=0.2)[0])


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_micro_batches_add_up_to_the_whole_batch(average):
    """Loss, metrics and gradient, with tokens or responses as weights. Only the order of sums
    differs: 1e-13 in float64; clip_fraction is float32."""
    whole = random_tokens(lengths=(3, 1, 0, 5, 2, 4, 7))
    options = {"average": average, "max_length": 8, "kl_coef": 0.1, "entropy_coef": 0.01}
    loss, metrics = whole.loss(**options)
    total_units = len(whole.response_index) if average == "token" else 6
    total, totals = 0.0, dict.fromkeys(metrics, 0.0)
    for first, last in [(0, 3), (3, 5), (5, 7)]:
        here = (whole.response_index >= first) & (whole.response_index < last)
        lengths = whole.lengths[first:last]
        part = Tokens(
            whole.logps[here],
            whole.old_logps[here],
            whole.advantages[here],
            whole.response_index[here] - first,
            lengths,
            whole.ref_logps[here],
        )
        units = len(part.response_index) if average == "token" else (lengths > 0).sum().item()
        part_loss, part_metrics = part.loss(**options)
        total = total + part_loss * units / total_units
        for name, value in part_metrics.items():
            totals[name] += value.item() * units / total_units
    torch.testing.assert_close(total, loss, rtol=1e-13, atol=1e-13)
    (grad,) = torch.autograd.grad(total, whole.logps)
    (expected,) = torch.autograd.grad(loss, whole.logps)
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=1e-13)
    for name, value in metrics.items():
        tolerance = 1e-6 if name == "clip_fraction" else 1e-13
        assert totals[name] == pytest.approx(value.item(), abs=tolerance), name


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_an_on_policy_step_is_reinforce(average, clip):
    """The gradient is that of the averaged -A log pi, exactly: the ratio is 1."""
    t = random_tokens()
    t.old_logps = t.logps.detach().clone()
    loss, _ = t.loss(average=average, max_length=6, clip=clip)
    (grad,) = torch.autograd.grad(loss, t.logps)
    weights = {
        "token": torch.full((11,), 1 / 11, dtype=torch.float64),
        "sequence": 1 / (4 * t.lengths[t.response_index].double()),
        "constant": torch.full((11,), 1 / (4 * 6), dtype=torch.float64),
    }
    expected = -t.advantages * weights[average]
    torch.testing.assert_close(grad, expected, rtol=1e-15, atol=0)  # two divisions, in any order


# A toy policy: texts of one or two tokens of three, where token 0 ends a text. logits[0] are those
# of the first token, logits[1 + v] of the second after v.
TOY_TEXTS = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


def toy_logps(logits, text):
    """(tokens,) log-probabilities."""
    logps = logits.log_softmax(-1)
    contexts = [0] + [1 + token for token in text[:-1]]
    return torch.stack([logps[context, token] for context, token in zip(contexts, text)])


def toy_group_loss(logits, group, advantages):
    """grpo_loss of the texts of a group: the sum over tokens, mean over texts."""
    logps = torch.cat([toy_logps(logits, text) for text in group])
    lengths = torch.tensor([len(text) for text in group])
    response_index = torch.repeat_interleave(torch.arange(len(group)), lengths)
    loss, _ = grpo_loss(
        logps,
        logps.detach(),
        advantages[response_index],
        response_index,
        lengths,
        average="constant",
        max_length=1,
    )
    return loss


def leave_one_out(rewards):
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


@pytest.mark.parametrize(
    "K, advantages, share",
    [
        (1, lambda rewards: rewards, 1.0),
        (1, lambda rewards: rewards - 0.7, 1.0),  # a constant baseline
        (2, leave_one_out, 1.0),
        (3, leave_one_out, 1.0),
        (2, lambda rewards: rewards - rewards.mean(), 1 / 2),  # the mean holds its own reward
        (3, lambda rewards: rewards - rewards.mean(), 2 / 3),
    ],
)
def test_expected_gradient_is_that_of_the_expected_reward(K, advantages, share):
    """Over all groups of K texts. A baseline that is the group's mean scales it by (K - 1) / K.
    Sums of up to 7^3 terms below 1 in float64 leave 1e-13."""
    g = seeded(4)
    logits = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()
    rewards = dict(zip(TOY_TEXTS, torch.randn(7, generator=g, dtype=torch.float64)))
    probs = {text: toy_logps(logits, text).sum().exp() for text in TOY_TEXTS}
    assert abs(sum(probs.values()).item() - 1) < 1e-14
    expected_reward = sum(probs[text] * rewards[text] for text in TOY_TEXTS)
    (policy_gradient,) = torch.autograd.grad(expected_reward, logits, retain_graph=True)

    expected_loss = 0.0
    for group in itertools.product(TOY_TEXTS, repeat=K):
        prob = math.prod(probs[text].item() for text in group)
        group_rewards = torch.stack([rewards[text] for text in group])
        expected_loss = expected_loss + prob * toy_group_loss(
            logits, group, advantages(group_rewards)
        )
    (grad,) = torch.autograd.grad(expected_loss, logits)
    torch.testing.assert_close(-grad, share * policy_gradient, rtol=1e-13, atol=1e-13)


def test_on_policy_distillation_has_the_gradient_of_the_reverse_kl():
    """A_t = log T(y_t) - log pi_old(y_t), each token by itself. Over all tokens y_t at the same
    prefixes, value and gradient are those of the mean of KL(pi || T). 1e-14: sums of 35 terms."""
    g = seeded(5)
    prefixes, V = 5, 7
    logits = torch.randn(prefixes, V, generator=g, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(prefixes, V, generator=g, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    reverse_kl = (policy.exp() * (policy - teacher)).sum(-1).mean()
    (kl_gradient,) = torch.autograd.grad(reverse_kl, logits, retain_graph=True)

    expected_loss = 0.0
    for prefix in range(prefixes):
        for token in range(V):
            logps = policy[prefix, token][None]
            old_logps = logps.detach()
            advantages = teacher[prefix, token] - old_logps
            loss, _ = grpo_loss(logps, old_logps, advantages, torch.tensor([0]), torch.tensor([1]))
            expected_loss = expected_loss + old_logps.exp() * loss / prefixes
    torch.testing.assert_close(expected_loss.sum(), reverse_kl, rtol=1e-14, atol=1e-14)
    (grad,) = torch.autograd.grad(expected_loss, logits)
    torch.testing.assert_close(grad, kl_gradient, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_grpo_reads_no_value_on_the_host(average):
    """On a GPU a host read waits for the device. A meta tensor has no values to read."""
    t = random_tokens()
    on_meta = Tokens(*(x.detach().to("meta") for x in vars(t).values()))
    loss, metrics = on_meta.loss(average=average, max_length=9, kl_coef=0.1, entropy_coef=0.1)
    assert loss.shape == () and all(value.shape == () for value in metrics.values())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_preference_loss_reads_no_value_on_the_host(loss_type):
    rows = random_rows(3, 4)
    on_meta = Rows(*(x.detach().to("meta") for x in vars(rows).values()))
    loss, _ = on_meta.loss(loss_type)
    assert loss.shape == ()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"average": "mean"}, "unknown average"),
        ({"average": "constant"}, "max_length"),
        ({"kl_coef": 0.1}, "ref_logps"),
    ],
)
def test_impossible_options_of_grpo_are_refused(options, message):
    t = random_tokens()
    t.ref_logps = None
    with pytest.raises(ValueError, match=message):
        t.loss(**options)


# ---- T_n


@pytest.mark.parametrize("order", [0, 0.5, 1, 2, 5])
def test_taylor_nll_against_its_series_and_gradient(order):
    """T_n = sum_{j>=1} (1-p)^(n+j) / (n+j), from p near 0 (many terms) to p near 1
    (cancellation)."""
    logps = torch.cat(
        [
            torch.linspace(-3, -1e-3, 60, dtype=torch.float64),
            -torch.logspace(-12, -3, 10, dtype=torch.float64),
        ]
    ).requires_grad_()
    q = -torch.expm1(logps.detach())
    slow = torch.zeros_like(q)
    for j in range(2000, 0, -1):
        slow += q ** (order + j) / (order + j)
    value = taylor_nll(logps, order)
    torch.testing.assert_close(value.detach(), slow, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(value.sum(), logps)
    torch.testing.assert_close(grad, -(q**order), rtol=1e-14, atol=0)  # dT_n = (1-p)^n d(-log p)
    inside = logps.detach()[(logps < -1e-2)]
    slope = (taylor_nll(inside + 1e-5, order) - taylor_nll(inside - 1e-5, order)) / 2e-5
    torch.testing.assert_close(slope, -((-torch.expm1(inside)) ** order), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_taylor_nll_near_zero_drops_the_first_terms(order):
    logps = torch.log(torch.logspace(-12, -1, 30, dtype=torch.float64))
    q = -torch.expm1(logps)
    direct = -logps - sum(q**j / j for j in range(1, order + 1))
    torch.testing.assert_close(taylor_nll(logps, order), direct, rtol=1e-12, atol=1e-12)


def logps_from_near_zero_to_near_one():
    """Exact values of float64 log-probabilities, for p from 1e-12 to 1 - 1e-12."""
    powers = [mpmath.mpf(10) ** -k for k in range(1, 13)]
    values = [mpmath.log(p) for p in powers]
    values += [-q for q in powers]  # log(1 - q) is about -q
    values += [mpmath.log(0.5) - 1e-9, mpmath.log(0.5) + 1e-9]  # where the series change
    return [mpmath.mpf(float(x)) for x in values]


@pytest.mark.parametrize("order", [0.5, 1, 2, 4, 7.3])
def test_taylor_nll_against_its_integral(order):
    """The integral of (1-u)^n / u from p to 1, in 40 digits."""
    mpmath.mp.dps = 40
    for x in logps_from_near_zero_to_near_one():
        p, q = mpmath.exp(x), -mpmath.expm1(x)
        exact = q ** (order + 1) / (order + 1) * mpmath.hyp2f1(1, order + 1, order + 2, q)
        if 1e-3 < p < 0.5:
            integral = mpmath.quad(lambda u: (1 - u) ** order / u, [p, 1])
            assert abs(integral / exact - 1) < 1e-12
        value = taylor_nll(float64([float(x)]), order).item()
        # The series for p <= 1/2 subtracts terms of about 1. In the other nothing cancels.
        tolerance = 1e-13 * exact + (2e-15 if p <= 0.5 else 0)
        assert abs(value - exact) < tolerance, (order, float(x))


@pytest.mark.parametrize("order", [0.5, 1, 2, 4])
def test_a_tokens_gradient_is_cross_entropys_times_a_power(order):
    """Through the whole softmax: dT_n / dlogits = (1-p)^n dT_0 / dlogits, token by token."""
    logits = 3 * torch.randn(50, 11, dtype=torch.float64, generator=seeded(0))
    logits.requires_grad_()
    logps = logits.log_softmax(-1)[:, 4]
    (plain,) = torch.autograd.grad(-logps.sum(), logits, retain_graph=True)
    (grad,) = torch.autograd.grad(taylor_nll(logps, order).sum(), logits)
    factor = (1 - logps.exp().detach())[:, None] ** order
    torch.testing.assert_close(grad, plain * factor, rtol=1e-12, atol=1e-15)


def test_taylor_nll_at_its_limits():
    assert torch.equal(taylor_nll(torch.tensor([-2.0]), 0), torch.tensor([2.0]))
    assert taylor_nll(torch.zeros(3), 1.5).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="order"):
        taylor_nll(torch.zeros(1), -1)
