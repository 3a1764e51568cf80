"""Every objective, as pure functions of tensors.

Names: B rows (prompts), K responses a row (best first), T positions, V vocabulary, C width.
`targets` is -1 where nothing is asked. From the log-sum-exp on everything is float32 (float64 if the input is).
"""

import math

import torch
import torch.nn.functional as F


def sequence_logprobs(logps, seq, n_seq):
    """log pi(y|x) of each sequence: the sum of its tokens' log-probabilities.

    logps (...) float; seq (...) int64: the sequence a token belongs to, -1 for none. Returns (n_seq,).
    """
    mine = seq >= 0
    return logps.new_zeros(n_seq).index_add(0, seq[mine], logps[mine])


def ordered_pairs(scores, present, ranks):
    """(present, ranks (B, K), above (B, i, j): both are there and i is better, their number (B,), at least 1) of scores (B, K);
    without `present` all are there, without `ranks` position is rank."""
    B, K = scores.shape
    present = torch.ones_like(scores, dtype=torch.bool) if present is None else present
    ranks = torch.arange(K, device=scores.device).expand(B, K) if ranks is None else ranks
    above = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
    return present, ranks, above, above.sum((1, 2)).clamp(min=1)


def plackett_luce(scores, present=None, depth=None, ranks=None, margin=0.0):
    """Negative log-likelihood of a ranking, - sum_k [ s_k - logsumexp_{j >= k} s_j ] (Plackett 1975; Luce 1959).

    scores (B, K), best first; present (B, K) bool: absent responses take no part, whatever their score.
    depth d keeps the terms of the first d present responses: d = 1 is "the best against all the rest".
    ranks (B, K) int: smaller is better, equal is a tie. Tied responses do not compete: each is drawn against itself and
    the strictly worse, so a row of ties costs 0 and swapping them changes nothing. Without `ranks` position is rank.
    margin: what the worse ones are ahead by, in each term; a number, or (B, k, j): j before k.
    Returns nll (B,). Equal scores give ln K!: ln 2 = 0.6931, ln 6 = 1.7918.
    """
    present, ranks, rivals, _ = ordered_pairs(
        scores, present, ranks
    )  # (B, k, j): j is strictly worse than k
    scores = scores.masked_fill(~present, 0.0)
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    # differences first: at scores of 1e4, s_k - logsumexp(s) would keep three decimals
    lead = scores[:, None, :] - scores[:, :, None]  # (B, k, j): s_j - s_k
    lead = torch.where(itself, lead, lead + margin)
    terms = torch.logsumexp(lead.masked_fill(~(rivals | itself), -math.inf), -1)  # (B, K)
    counted = present if depth is None else present & (present.cumsum(1) <= depth)
    return terms.masked_fill(~counted, 0.0).sum(1)


class TaylorNLL(torch.autograd.Function):
    """T_n by its two series in float64; its gradient in closed form, dT_n = -(1-p)^n d(log p)."""

    @staticmethod
    def forward(ctx, logps, n):
        ctx.save_for_backward(logps)
        ctx.n = n
        x = logps.double()
        p, q = x.exp(), -torch.expm1(x)
        # p > 1/2: sum_{j>=1} q^(n+j) / (n+j); 54 terms leave 2^-54
        small_q = q.clamp(max=0.5)
        near_one, power = torch.zeros_like(q), small_q**n
        for j in range(1, 55):
            power = power * small_q
            near_one += power / (n + j)
        # p <= 1/2: -log p - (digamma(n+1) + gamma) + sum_{j>=1} (-1)^(j+1) C(n,j) p^j / j
        small_p = p.clamp(max=0.5)
        harmonic = (
            torch.special.digamma(torch.tensor(n + 1.0, dtype=torch.float64)).item()
            + 0.57721566490153286
        )
        near_zero, power, binomial = -x - harmonic, torch.ones_like(p), 1.0
        for j in range(1, 55):
            power, binomial = power * small_p, binomial * (n - j + 1) / j
            near_zero += (-1) ** (j + 1) * binomial / j * power
        return torch.where(p > 0.5, near_one, near_zero).to(logps.dtype)

    @staticmethod
    def backward(ctx, grad):
        (logps,) = ctx.saved_tensors
        return -grad * (-torch.expm1(logps)) ** ctx.n, None


def taylor_nll(logps, order):
    """T_n(p) = -log p - sum_{j<=n} (1-p)^j / j = integral from p to 1 of (1-u)^n / u du, for p = exp(logps).

    T_0 is cross-entropy; each further order drops one Taylor term of -log p at p = 1, so the gradient is
    cross-entropy's times (1-p)^n: focal loss's factor without its extra term (arXiv 1708.02002), PolyLoss without its
    first n terms (arXiv 2204.12511). `order` n may be real, from 0 to 20, where the series still hold double precision's
    half. logps (...), all <= 0. Returns the same shape. Raises ValueError for another order.
    """
    if not 0 <= order <= 20:
        raise ValueError(f"order must be in [0, 20], got {order}")
    return -logps if order == 0 else TaylorNLL.apply(logps, float(order))


def focal_nll(logps, gamma):
    """Focal loss, -(1-p)^gamma log p of p = exp(logps) (arXiv 1708.02002, eq. 4). logps (...) <= 0; gamma >= 0. Returns the same
    shape. Its gradient is that of T_gamma and gamma (1-p)^(gamma-1) p log p beside it, so gamma < 1 has none at p = 1."""
    q = -torch.expm1(logps.clamp(max=-(2.0**-24)))
    return -(q**gamma) * logps


def smoothed_nll(logits, targets, label_smoothing=0.0, confidence_penalty=0.0):
    """Cross-entropy to (1 - eps) one-hot + eps uniform (label smoothing, arXiv 1512.00567, section 7), less confidence_penalty x
    the entropy of the prediction (arXiv 1701.06548, eq. 3). logits (n, V); targets (n,) -> (n,). Both need every logit, so
    here alone training holds a (tokens, V) matrix: they are what T_n is compared with, not a way to train large models."""
    logps = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
    asked = logps.gather(-1, targets[:, None]).squeeze(-1)
    loss = -(1 - label_smoothing) * asked - label_smoothing * logps.mean(-1)
    return loss + confidence_penalty * (logps.exp() * logps).sum(-1) if confidence_penalty else loss


def reward_loss(
    scores, present=None, loss_type="pairs", *, ranks=None, gaps=None, score_margin=0.0, center_coef=0.0
):
    """The loss of a reward model, mean over rows: scores (B, K) of the responses, best first; present, ranks as in `plackett_luce`.

    pairs   mean over a row's ordered pairs i above j of -log sigmoid(s_i - s_j): InstructGPT (arXiv 2203.02155, eq. 1), all
            K-choose-2 pairs of a prompt at once, averaged, so that a prompt of many responses does not count for more
    pl      Plackett-Luce of the whole ranking; at K = 2 the same

    gaps (B, K): the data's own scores; a pair's margin is score_margin times their difference, s_i - s_j - m_ij (Llama 2,
    2307.09288, eq. 2; under pl the worse response is ahead by it in each term). center_coef adds center_coef times the mean
    over pairs of (s_i + s_j)^2 (2312.09244, eq. 2), which fixes the constant that a ranking leaves free.
    Equal scores give ln 2, or ln K!. Returns the mean () and metrics, detached means over rows: `nll` the ranking's part, `acc`
    share of the ordered pairs that are right, `margin` the mean of s_i - s_j. Raises ValueError for another loss_type.
    """
    if loss_type not in ("pairs", "pl"):
        raise ValueError(f"unknown loss_type {loss_type!r}: a reward model has pairs or pl")
    present, ranks, above, pairs = ordered_pairs(scores, present, ranks)
    scores = scores.masked_fill(~present, 0.0)
    lead = scores[:, :, None] - scores[:, None, :]
    margins = (
        torch.zeros_like(lead)
        if gaps is None
        else score_margin * (gaps[:, :, None] - gaps[:, None, :])
    )
    if loss_type == "pairs":
        nll = (F.softplus(margins - lead) * above).sum((1, 2)) / pairs
    else:
        nll = plackett_luce(scores, present, None, ranks, margins)
    centre = ((scores[:, :, None] + scores[:, None, :]).square() * above).sum((1, 2)) / pairs
    with torch.no_grad():
        metrics = {
            "nll": nll.mean(),
            "acc": (((lead > 0) & above).sum((1, 2)) / pairs).mean(),
            "margin": ((lead * above).sum((1, 2)) / pairs).mean(),
        }
    return (nll + center_coef * centre).mean() if center_coef else nll.mean(), metrics


def log_odds(mean_logps):
    """log( p / (1 - p) ) of p = exp(mean_logps), finite down to p = 1 - 2^-24: a response of certain tokens has a mean
    log-probability that rounds to 0."""
    return mean_logps - torch.log(-torch.expm1(mean_logps.clamp(max=-(2.0**-24))))


def preference_loss(
    policy_logps,
    ref_logps,
    present=None,
    beta=0.1,
    loss_type="pl",
    *,
    ranks=None,
    depth=None,
    label_smoothing=0.0,
    taylor_order=0.0,
    nll_coef=0.0,
    margin=0.0,
    lengths=None,
):
    """The loss of a ranking of responses, mean over rows.

    policy_logps, ref_logps (B, K): sequence log-probabilities, best response first; present (B, K) bool; lengths (B, K)
    in tokens. With implicit rewards r_k = beta (log pi_theta(y_k|x) - log pi_ref(y_k|x)), `loss_type` is

    pl      Plackett-Luce on r. K = 2: DPO (arXiv 2305.18290, eq. 7; K > 2 its appendix A.3), SPIN with the previous policy
            as reference and its samples as y_2 (2401.01335, eq. 4.7, logistic); depth 1: S-DPO (2406.09215)
    pairs   mean over ordered pairs i above j of -log sigmoid(r_i - r_j): Bradley-Terry of each pair (their number times it is
            the sum over pairs)
    ipo     mean over those pairs of ((r_i - r_j) / beta - 1 / (2 beta))^2 (2310.12036, eq. 17; TRL's divides each log-ratio
            by its length first)
    simpo   Plackett-Luce on beta log pi_theta(y_k|x) / |y_k|, each worse response `margin` ahead (2405.14734, eq. 6)
    orpo    beta x Plackett-Luce on the log-odds of exp(log pi_theta(y_k|x) / |y_k|); with nll_coef 1 it is ORPO
            (2403.07691, eq. 6), beta its lambda

    The last two have no reference. ranks, depth: as in `plackett_luce`. Of the three Plackett-Luce kinds:
    label_smoothing eps gives (1-eps) PL(ranking) + eps PL(the reverse), at K = 2 cDPO's; taylor_order n gives T_n of the
    ranking's probability instead of -log. nll_coef adds nll_coef * -log pi_theta(y_1|x) / |y_1| (RPO, 2404.19733).
    Returns the mean () and metrics, detached means over rows: `nll` the ranking's part of the loss, `acc` the share of
    ordered pairs that the scores put right, and `best_and_others` of scores and log-probabilities.
    Raises ValueError for an unknown loss_type, and for options that a loss_type cannot have or that lack lengths.
    """
    if loss_type not in ("pl", "pairs", "ipo", "simpo", "orpo"):
        raise ValueError(f"unknown loss_type {loss_type!r}: pl, pairs, ipo, simpo or orpo")
    if lengths is None and (nll_coef or loss_type in ("simpo", "orpo")):
        raise ValueError("nll_coef, simpo and orpo need the responses' lengths")
    if loss_type in ("pairs", "ipo") and (label_smoothing or taylor_order or depth):
        raise ValueError(f"{loss_type} has no label_smoothing, taylor_order or depth")
    present, ranks, above, pairs = ordered_pairs(policy_logps, present, ranks)
    if loss_type in ("simpo", "orpo"):
        mean_logps = policy_logps.masked_fill(~present, -1.0) / lengths.clamp(min=1)
        scores = beta * mean_logps if loss_type == "simpo" else log_odds(mean_logps)
    else:
        scores = beta * (policy_logps - ref_logps).masked_fill(~present, 0.0)
    lead = scores[:, :, None] - scores[:, None, :]
    if loss_type == "pairs":
        nll = loss = (F.softplus(-lead) * above).sum((1, 2)) / pairs
    elif loss_type == "ipo":
        nll = loss = (((lead - 0.5) / beta).square() * above).sum((1, 2)) / pairs
    else:
        margin = margin if loss_type == "simpo" else 0.0
        nll = plackett_luce(scores, present, depth, ranks, margin)
        loss = taylor_nll(-nll, taylor_order)
        if label_smoothing:
            reverse = plackett_luce(scores.flip(1), present.flip(1), depth, -ranks.flip(1), margin)
            loss = (1 - label_smoothing) * loss + label_smoothing * taylor_nll(
                -reverse, taylor_order
            )
        if loss_type == "orpo":
            nll, loss = beta * nll, beta * loss
    if nll_coef:
        loss = loss - nll_coef * policy_logps[:, 0] / lengths[:, 0]
    with torch.no_grad():
        metrics = {
            "nll": nll.mean(),
            "acc": (((lead > 0) & above).sum((1, 2)) / pairs).mean(),
            **chosen_rejected_metrics(scores, policy_logps, present),
        }
    return loss.mean(), metrics


def chosen_rejected_metrics(scores, logps, present):
    """Means over rows of (B, K): `reward_chosen` of the best response's score, `reward_rejected` of the mean of the others that are
    there, `margin` of the difference; `logp_chosen`, `logp_rejected` the same of log-probabilities. At K = 2 they are those of DPO's pair."""
    there = present[:, 1:]
    (score, others), (logp, others_logp) = (
        (
            x[:, 0].mean(),
            (x[:, 1:].masked_fill(~there, 0.0).sum(1) / there.sum(1).clamp(min=1)).mean(),
        )
        for x in (scores, logps)
    )
    return {
        "margin": score - others,
        "reward_chosen": score,
        "reward_rejected": others,
        "logp_chosen": logp,
        "logp_rejected": others_logp,
    }


def kl_estimates(logps, refs):
    """Estimates of KL(p || q) from samples of p: logps, refs (...) of log p and log q at them. Returns (k1, k2, k3), each (...),
    to be averaged (J. Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html): with log r = log q - log p

    k1 = -log r             without bias, of either sign
    k2 = (log r)^2 / 2      little variance, biased where p and q are far apart
    k3 = (r - 1) - log r    without bias, never negative
    """
    log_r = refs - logps
    return -log_r, log_r.square() / 2, torch.expm1(log_r) - log_r


def ppo_loss(
    logps,
    values,
    old_logps,
    old_values,
    advantages,
    returns,
    clip=0.2,
    value_clip=0.2,
    value_coef=0.1,
    entropy_coef=0.0,
):
    """PPO's loss (arXiv 1707.06347), mean over tokens: all arguments (m,), the old ones and advantages and returns from when the
    tokens were sampled, with r = pi(token) / pi_old(token)

    policy    - min( r A, clip(r, 1 - clip, 1 + clip) A )                              (eq. 7)
    value     max( (V - G)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - G)^2 ) / 2
    entropy   H = - E_old[ r log pi ], whose gradient is that of - E_old[ r stopgrad(log pi) ]: what is drawn stands for the
              vocabulary, since the log-probabilities of all ids are never there

    and policy + value_coef value - entropy_coef H is returned. A clip of 0 does not clip.
    Returns the mean () and metrics, detached means over tokens: `policy_loss`, `value_loss`, `entropy`, `clip_fraction` of tokens
    whose r is outside, `approx_kl` = KL(pi_old || pi), k3 of `kl_estimates`.
    """
    log_ratio = logps - old_logps
    ratio = log_ratio.exp()
    policy = -ratio * advantages
    if clip:
        policy = torch.maximum(policy, -ratio.clamp(1 - clip, 1 + clip) * advantages)
    value = (values - returns).square()
    if value_clip:
        value = torch.maximum(
            value,
            (old_values + (values - old_values).clamp(-value_clip, value_clip) - returns).square(),
        )
    value = value.mean() / 2
    entropy = -ratio * logps.detach()
    loss = policy.mean() + value_coef * value - entropy_coef * entropy.mean()
    with torch.no_grad():
        outside = ((ratio - 1).abs() > clip).float() if clip else torch.zeros_like(ratio)
        metrics = {
            "policy_loss": policy.mean(),
            "value_loss": value,
            "entropy": entropy.mean(),
            "clip_fraction": outside.mean(),
            "approx_kl": kl_estimates(old_logps, logps)[2].mean(),
        }
    return loss, {name: v.detach() for name, v in metrics.items()}
