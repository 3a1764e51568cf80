"""Each loss against a slow, obvious one; in float64 where that settles a question."""

import itertools
import math

import mpmath
import pytest
import torch
import torch.nn.functional as F

from loss import LOSS_TYPES, plackett_luce, preference_loss, sequence_logprobs, taylor_nll

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


def slow_preference(loss_type, policy, ref, lengths, response_mask, ranks, beta, margin):
    """One row in Python, by the formula of the paper. policy and ref are lists of floats."""
    K = len(policy)
    present = [k for k in range(K) if response_mask[k]]
    log_ratio = [policy[k] - ref[k] for k in range(K)]
    pairs = [(i, j) for i, j in itertools.permutations(present, 2) if ranks[i] < ranks[j]]

    def worse(k):
        return [j for j in present if ranks[j] > ranks[k]]

    if loss_type == "pairs":
        terms = [math.log(1 + math.exp(-beta * (log_ratio[i] - log_ratio[j]))) for i, j in pairs]
        return sum(terms) / max(1, len(pairs))
    if loss_type == "ipo":
        terms = [(log_ratio[i] - log_ratio[j] - 1 / (2 * beta)) ** 2 for i, j in pairs]
        return sum(terms) / max(1, len(pairs))
    if loss_type == "simpo":
        s = [beta * policy[k] / lengths[k] for k in range(K)]
        total = 0.0
        for k in present:
            total += math.log(1 + sum(math.exp(s[j] + margin - s[k]) for j in worse(k)))
        return total
    assert loss_type == "orpo", f"{loss_type} has no formula here"
    p = [math.exp(policy[k] / lengths[k]) for k in range(K)]
    odds = [x / (1 - x) for x in p]
    total = 0.0
    for k in present:
        total -= math.log(odds[k] / (odds[k] + sum(odds[j] for j in worse(k))))
    return beta * total


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "pl"])
@pytest.mark.parametrize("K", [2, 3, 5])
def test_other_losses_against_their_formulas(loss_type, K):
    g = seeded(K)
    policy = -20 * torch.rand(30, K, generator=g, dtype=torch.float64) - 0.1
    ref = -20 * torch.rand(30, K, generator=g, dtype=torch.float64) - 0.1
    lengths = torch.randint(1, 30, (30, K), generator=g)
    response_mask = torch.rand(30, K, generator=g) > 0.2
    ranks = torch.randint(0, K, (30, K), generator=g).sort(1).values
    policy.requires_grad_()
    loss, _ = preference_loss(
        policy, ref, response_mask, 0.3, loss_type, ranks=ranks, lengths=lengths, margin=0.7
    )
    rows = zip(*(x.tolist() for x in (policy, ref, lengths, response_mask, ranks)))
    slow = sum(slow_preference(loss_type, *row, 0.3, 0.7) for row in rows) / 30
    assert abs(loss.item() - slow) < 1e-12 * max(1, abs(slow))
    (grad,) = torch.autograd.grad(loss, policy)
    assert torch.isfinite(grad).all() and (grad[~response_mask] == 0).all()


def test_other_losses_at_two_responses():
    """As their papers write them."""
    policy = -20 * torch.rand(9, 2, dtype=torch.float64) - 0.1
    ref = -20 * torch.rand(9, 2, dtype=torch.float64)
    lengths = torch.randint(1, 30, (9, 2))
    d = (policy - ref)[:, 0] - (policy - ref)[:, 1]
    mean = policy / lengths
    odds = mean - torch.log1p(-mean.exp())
    expected = {
        "pairs": -F.logsigmoid(0.1 * d),
        "ipo": (d - 5) ** 2,
        "simpo": -F.logsigmoid(0.1 * (mean[:, 0] - mean[:, 1]) - 0.5),
        "orpo": -mean[:, 0] - 0.1 * F.logsigmoid(odds[:, 0] - odds[:, 1]),
    }
    for loss_type, losses in expected.items():
        nll_coef = 1.0 if loss_type == "orpo" else 0.0
        loss, _ = preference_loss(
            policy, ref, loss_type=loss_type, lengths=lengths, margin=0.5, nll_coef=nll_coef
        )
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
        ({"loss_type": "hinge"}, "unknown loss_type"),
        ({"loss_type": "simpo"}, "lengths"),
        ({"loss_type": "ipo", "depth": 1}, "no label_smoothing"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(1, 2), torch.zeros(1, 2), **options)


def test_sequence_logprobs():
    logps = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    seq = torch.tensor([[-1, 0, 0], [2, -1, 2]])
    total = sequence_logprobs(logps, seq, 4)
    assert total.tolist() == [6.0, 0.0, 40.0, 0.0]
    total.sum().backward()
    assert logps.grad.tolist() == [[0, 1, 1], [1, 0, 1]]


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
