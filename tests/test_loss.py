"""Each fast path against a slow, obvious one; float64 where it settles a question."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from loss import (
    focal_nll,
    linear_logprobs,
    plackett_luce,
    preference_loss,
    sequence_logprobs,
    smoothed_nll,
    taylor_nll,
)

torch.manual_seed(0)
EPS32, EPS64 = 2**-23, 2**-52


def slow_plackett_luce(scores, present, ranks, depth):
    """One row, in Python: each present response against itself and the strictly worse."""
    total, seen = 0.0, 0
    for k in range(len(scores)):
        if present[k] and (depth is None or seen < depth):
            seen += 1
            pool = [
                scores[j]
                for j in range(len(scores))
                if present[j] and (j == k or ranks[j] > ranks[k])
            ]
            top = max(pool)
            total += top + math.log(sum(math.exp(s - top) for s in pool)) - scores[k]
    return total


@pytest.mark.parametrize("K", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("depth", [None, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_plackett_luce_equals_a_loop(K, depth, scale):
    g = torch.Generator().manual_seed(K)
    scores = (scale * torch.randn(50, K, dtype=torch.float64, generator=g)).requires_grad_()
    present = torch.rand(50, K, generator=g) > 0.3
    ranks = torch.randint(0, K, (50, K), generator=g).sort(1).values
    nll = plackett_luce(scores, present, depth, ranks)
    slow = [
        slow_plackett_luce(*row, depth)
        for row in zip(scores.tolist(), present.tolist(), ranks.tolist())
    ]
    torch.testing.assert_close(nll, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(nll.sum(), scores)
    assert torch.isfinite(grad).all()
    # a ranking does not change when every score grows alike, so the gradient sums to 0: K terms of at most K each
    assert grad.sum(1).abs().max() < 10 * K * K * EPS64
    assert (grad[~present] == 0).all()


def test_plackett_luce_gradient_in_closed_form():
    """dL/ds_j = sum_{k<=j} softmax_{i>=k}(s)_j - 1, at scores up to 1e4, also in float32."""
    for dtype, eps in ((torch.float64, EPS64), (torch.float32, EPS32)):
        for values in ([0.3, -0.2, 1.1], [1e4, -1e4, 3e4], [1000.0, 1000.5, 999.0]):
            s = torch.tensor([values], dtype=dtype, requires_grad=True)
            (grad,) = torch.autograd.grad(plackett_luce(s).sum(), s)
            exact = torch.full((3,), -1.0, dtype=torch.float64)
            for k in range(3):
                exact[k:] += s.detach().double()[0, k:].softmax(0)
            # differences of scores come first and are exact here, so what is left is a softmax's few roundings
            assert (grad[0].double() - exact).abs().max() < 20 * eps


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
def test_probabilities_of_all_rankings_sum_to_one(K):
    s = torch.randn(K, dtype=torch.float64)
    orders = torch.stack([s[list(o)] for o in itertools.permutations(range(K))])
    assert abs(torch.exp(-plackett_luce(orders)).sum().item() - 1) < 1e-13
    top = torch.stack(
        [s[list(o)] for o in itertools.permutations(range(K))][:: max(1, math.factorial(K - 1))]
    )
    assert (
        abs(torch.exp(-plackett_luce(top, depth=1)).sum().item() - 1) < 1e-13
    )  # of who comes first


def test_fixed_values():
    for s, value in [
        ([0.3, -0.2], 0.474076984180),
        ([1, 0.5, -1], 0.756370197625),
        ([-1, 0.5, 1], 3.529033903822),
        ([2, 1, 0, -1], 1.161057350524),
    ]:
        assert abs(plackett_luce(torch.tensor([s], dtype=torch.float64)).item() - value) < 1e-12
    s = torch.tensor([[1, 0.5, -1]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(plackett_luce(s).sum(), s)
    torch.testing.assert_close(
        grad[0],
        torch.tensor([-0.425903007032, 0.165781904077, 0.260121102955], dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )


def test_two_responses_are_dpo():
    s = 5 * torch.randn(100, 2, dtype=torch.float64)
    torch.testing.assert_close(
        plackett_luce(s), -F.logsigmoid(s[:, 0] - s[:, 1]), rtol=1e-14, atol=1e-15
    )


def test_absent_responses_change_nothing():
    s = torch.randn(20, 3, dtype=torch.float64)
    wide = torch.full((20, 5), math.nan, dtype=torch.float64)
    present = torch.zeros(20, 5, dtype=torch.bool)
    for b in range(20):
        at = sorted(torch.randperm(5, generator=torch.Generator().manual_seed(b))[:3].tolist())
        wide[b, at], present[b, at] = s[b], True
    wide.requires_grad_()
    nll = plackett_luce(wide, present)
    torch.testing.assert_close(
        nll, plackett_luce(s), rtol=1e-14, atol=1e-14
    )  # the sum's order alone may differ
    (grad,) = torch.autograd.grad(nll.sum(), wide)
    assert torch.isfinite(grad).all() and (grad[~present] == 0).all()


def test_ties_do_not_compete():
    s = torch.randn(10, 4, dtype=torch.float64)
    ranks = torch.tensor([0, 1, 1, 2]).expand(10, 4)
    assert torch.allclose(
        plackett_luce(s, ranks=ranks), plackett_luce(s[:, [0, 2, 1, 3]], ranks=ranks), rtol=1e-14
    )
    assert (plackett_luce(s, ranks=torch.zeros(10, 4, dtype=torch.long)).abs() < 1e-15).all()


@pytest.mark.parametrize("K", [2, 3, 4, 5, 6])
def test_a_round_starts_at_ln_k_factorial(K):
    logps = -100 * torch.rand(8, K)
    loss, metrics = preference_loss(logps, logps.clone())
    assert abs(loss.item() - math.log(math.factorial(K))) < 1e-6 and metrics["margin"] == 0


def test_preference_loss_terms():
    policy, ref = (
        -50 * torch.rand(6, 3, dtype=torch.float64),
        -50 * torch.rand(6, 3, dtype=torch.float64),
    )
    lengths = torch.randint(1, 20, (6, 3))
    plain = plackett_luce(0.2 * (policy - ref))
    loss, metrics = preference_loss(policy, ref, beta=0.2)
    assert torch.allclose(loss, plain.mean()) and torch.allclose(metrics["nll"], plain.mean())
    assert torch.allclose(
        preference_loss(policy, ref, beta=0.2, nll_coef=0.5, lengths=lengths)[0],
        (plain - 0.5 * policy[:, 0] / lengths[:, 0]).mean(),
    )
    assert torch.allclose(
        preference_loss(policy, ref, beta=0.2, taylor_order=1.0)[0],
        (plain - (1 - torch.exp(-plain))).mean(),
    )
    # cDPO: (1 - eps) (-log sigmoid(d)) + eps (-log sigmoid(-d))
    d = 0.2 * (policy - ref)[:, 0] - 0.2 * (policy - ref)[:, 1]
    smooth = preference_loss(policy[:, :2], ref[:, :2], beta=0.2, label_smoothing=0.1)[0]
    assert torch.allclose(smooth, (-0.9 * F.logsigmoid(d) - 0.1 * F.logsigmoid(-d)).mean())
    with pytest.raises(ValueError, match="lengths"):
        preference_loss(policy, ref, nll_coef=0.1)


def test_preference_loss_accuracy_and_margin():
    zero = torch.zeros(2, 3)
    policy = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    present = torch.tensor([[True, True, True], [True, True, False]])
    _, metrics = preference_loss(policy, zero, present, beta=1.0)
    assert metrics["acc"] == 0.5 and metrics["margin"] == ((3 - 1.5) + (1 - 2)) / 2


def slow_preference(kind, policy, ref, lengths, present, ranks, beta, margin):
    """One row in Python, from each paper's formula. policy, ref: floats."""
    K = len(policy)
    there = [k for k in range(K) if present[k]]
    pairs = [(i, j) for i in there for j in there if ranks[i] < ranks[j]]
    if kind == "pairs":
        return sum(
            math.log(1 + math.exp(-beta * (policy[i] - ref[i] - policy[j] + ref[j])))
            for i, j in pairs
        ) / max(1, len(pairs))
    if kind == "ipo":
        return sum(
            (policy[i] - ref[i] - policy[j] + ref[j] - 1 / (2 * beta)) ** 2 for i, j in pairs
        ) / max(1, len(pairs))
    if kind == "simpo":
        s = [beta * policy[k] / lengths[k] for k in range(K)]
        return sum(
            math.log(1 + sum(math.exp(s[j] + margin - s[k]) for j in there if ranks[j] > ranks[k]))
            for k in there
        )
    p = [math.exp(policy[k] / lengths[k]) for k in range(K)]
    odds = [x / (1 - x) for x in p]
    return beta * sum(
        -math.log(odds[k] / (odds[k] + sum(odds[j] for j in there if ranks[j] > ranks[k])))
        for k in there
    )


@pytest.mark.parametrize("kind", ["pairs", "ipo", "simpo", "orpo"])
@pytest.mark.parametrize("K", [2, 3, 5])
def test_other_objectives_against_their_formulas(kind, K):
    g = torch.Generator().manual_seed(K)
    policy, ref = (
        -20 * torch.rand(30, K, generator=g, dtype=torch.float64) - 0.1 for _ in range(2)
    )
    lengths, present = (
        torch.randint(1, 30, (30, K), generator=g),
        torch.rand(30, K, generator=g) > 0.2,
    )
    ranks = torch.randint(0, K, (30, K), generator=g).sort(1).values
    policy.requires_grad_()
    loss, _ = preference_loss(
        policy, ref, present, 0.3, kind, ranks=ranks, lengths=lengths, margin=0.7
    )
    slow = (
        sum(
            slow_preference(kind, *row, 0.3, 0.7)
            for row in zip(
                policy.tolist(), ref.tolist(), lengths.tolist(), present.tolist(), ranks.tolist()
            )
        )
        / 30
    )
    assert abs(loss.item() - slow) < 1e-12 * max(1, abs(slow))
    (grad,) = torch.autograd.grad(loss, policy)
    assert torch.isfinite(grad).all() and (grad[~present] == 0).all()


def test_other_objectives_at_two_responses():
    """As their papers write them."""
    policy, ref = (
        -20 * torch.rand(9, 2, dtype=torch.float64) - 0.1,
        -20 * torch.rand(9, 2, dtype=torch.float64),
    )
    lengths = torch.randint(1, 30, (9, 2))
    d = (policy - ref)[:, 0] - (policy - ref)[:, 1]
    mean = policy / lengths
    odds = mean - torch.log1p(-mean.exp())
    for kind, expected in (
        ("pairs", -F.logsigmoid(0.1 * d)),
        ("ipo", (d - 5) ** 2),
        ("simpo", -F.logsigmoid(0.1 * (mean[:, 0] - mean[:, 1]) - 0.5)),
        ("orpo", -mean[:, 0] - 0.1 * F.logsigmoid(odds[:, 0] - odds[:, 1])),
    ):
        loss, _ = preference_loss(
            policy, ref, kind=kind, lengths=lengths, margin=0.5, nll_coef=float(kind == "orpo")
        )
        torch.testing.assert_close(loss, expected.mean(), rtol=1e-12, atol=1e-12)
    certain = torch.zeros(1, 2, requires_grad=True)  # every token's probability rounds to 1
    loss, _ = preference_loss(
        certain, certain.detach(), kind="orpo", lengths=torch.ones(1, 2, dtype=torch.long)
    )
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, certain)[0]).all()
    for kind, options, message in (
        ("hinge", {}, "unknown kind"),
        ("simpo", {}, "lengths"),
        ("ipo", {"depth": 1}, "no label_smoothing"),
    ):
        with pytest.raises(ValueError, match=message):
            preference_loss(policy, ref, kind=kind, **options)


@pytest.mark.parametrize("order", [0, 0.5, 1, 2, 5])
def test_taylor_nll_against_its_series_and_gradient(order):
    """T_n = sum_{j>=1} (1-p)^(n+j)/(n+j) from p near 0 (where it takes many terms) to p near 1 (where it cancels)."""
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


@pytest.mark.parametrize("order", [0.5, 1, 2, 4, 7.3])
def test_taylor_nll_against_its_integral(order):
    """The integral from p to 1 of (1-u)^n / u du in 40 digits, for p from 1e-12 to 1 - 1e-12, real n too."""
    import mpmath

    mpmath.mp.dps = 40
    near_one = [-(mpmath.mpf(10) ** -k) for k in range(1, 13)]  # log p = log(1 - q) is about -q
    for x in (
        [mpmath.log(mpmath.mpf(10) ** -k) for k in range(1, 13)]
        + near_one
        + [mpmath.log(0.5) - 1e-9, mpmath.log(0.5) + 1e-9]
    ):
        x = mpmath.mpf(float(x))  # what a float64 holds
        p, q = mpmath.exp(x), -mpmath.expm1(x)
        exact = q ** (order + 1) / (order + 1) * mpmath.hyp2f1(1, order + 1, order + 2, q)
        if 1e-3 < p < 0.5:
            assert abs(mpmath.quad(lambda u: (1 - u) ** order / u, [p, 1]) / exact - 1) < 1e-12
        value = taylor_nll(torch.tensor([float(x)], dtype=torch.float64), order).item()
        # up to p = 1/2 the series for small p subtracts terms of the order of 1; beyond it nothing cancels
        assert abs(value - exact) < 1e-13 * exact + (2e-15 if p <= 0.5 else 0), (order, float(x))


@pytest.mark.parametrize("order", [0.5, 1, 2, 4])
def test_a_tokens_gradient_is_cross_entropys_times_a_power(order):
    """Through the whole softmax: dT_n / dlogits = (1-p)^n dT_0 / dlogits, token by token."""
    logits = (
        torch.randn(50, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        .mul(3)
        .requires_grad_()
    )
    logps = logits.log_softmax(-1)[:, 4]
    (plain,) = torch.autograd.grad(-logps.sum(), logits, retain_graph=True)
    (bent,) = torch.autograd.grad(taylor_nll(logps, order).sum(), logits)
    torch.testing.assert_close(
        bent, plain * (1 - logps.exp().detach())[:, None] ** order, rtol=1e-12, atol=1e-15
    )


def test_what_t_n_is_compared_with():
    logits = torch.randn(
        40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).mul(2)
    targets = torch.arange(40) % 7
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(smoothed_nll(logits, targets), plain)
    smooth = torch.nn.functional.cross_entropy(
        logits, targets, reduction="none", label_smoothing=0.2
    )
    torch.testing.assert_close(smoothed_nll(logits, targets, 0.2), smooth, rtol=1e-12, atol=1e-12)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(
        smoothed_nll(logits, targets, 0.0, 0.3), plain - 0.3 * entropy, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        focal_nll(-plain, 2.0), (1 - torch.exp(-plain)) ** 2 * plain, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(focal_nll(-plain, 0.0), plain)
    logps = (-plain).requires_grad_()  # as focal_nll says: T_gamma's gradient and its extra term
    (grad,) = torch.autograd.grad(focal_nll(logps, 2.0).sum(), logps)
    p = logps.exp().detach()
    torch.testing.assert_close(
        grad, -((1 - p) ** 2) + 2 * (1 - p) * p * logps.detach(), rtol=1e-10, atol=1e-12
    )
    certain = torch.zeros(3, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(focal_nll(certain, 0.5).sum(), certain)[0]).all()


def test_taylor_nll_edges():
    assert torch.equal(taylor_nll(torch.tensor([-2.0]), 0), torch.tensor([2.0]))
    assert taylor_nll(torch.zeros(3), 1.5).tolist() == [0.0] * 3
    with pytest.raises(ValueError):
        taylor_nll(torch.zeros(1), -1)


def plain_logprobs(hidden, weight, targets, softcap=0.0, vocab_size=None):
    logits = (hidden @ weight.T).float() if hidden.dtype != torch.float64 else hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logps = logits[..., :vocab_size].log_softmax(-1)
    return logps.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * (targets >= 0)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(
    "chunk, kept", [(1, 7 * 37), (7, None), (7, 14 * 37 + 5), (7, 0), (1000, None)]
)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_linear_logprobs_equals_the_plain_one(dtype, tolerance, chunk, kept, softcap):
    """Odd sizes, chunks smaller and larger than the input, all, some or none of them kept, a padded vocabulary. bfloat16 products
    differ in their last of 8 bits, and so do gradients that were rounded once more."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 11, 13, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(37, 13, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(-1, 33, (3, 11), generator=g)
    upstream = torch.rand(3, 11, generator=g).to(torch.promote_types(dtype, torch.float32))
    fast = linear_logprobs(
        hidden, weight, targets, softcap=softcap, vocab_size=33, chunk=chunk, kept=kept
    )
    slow = plain_logprobs(hidden, weight, targets, softcap, 33)
    assert fast.dtype == upstream.dtype
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    for a, b in zip(
        torch.autograd.grad((fast * upstream).sum(), (hidden, weight)),
        torch.autograd.grad((slow * upstream).sum(), (hidden, weight)),
    ):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item())
        )
    assert (fast[targets < 0] == 0).all()


def test_linear_logprobs_with_nothing_asked():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    logps = linear_logprobs(hidden, weight, torch.full((4,), -1))
    assert logps.tolist() == [0.0] * 4
    logps.sum().backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert linear_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_linear_logprobs_refuses_a_target_outside():
    for bad in (16, -2):
        with pytest.raises(ValueError, match="targets must be"):
            linear_logprobs(torch.randn(2, 8), torch.randn(16, 8), torch.tensor([1, bad]))


def test_sequence_logprobs():
    logps = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    seq = torch.tensor([[-1, 0, 0], [2, -1, 2]])
    total = sequence_logprobs(logps, seq, 4)
    assert total.tolist() == [6.0, 0.0, 40.0, 0.0]
    total.sum().backward()
    assert logps.grad.tolist() == [[0, 1, 1], [1, 0, 1]]
