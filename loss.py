"""Every objective, as a pure function of tensors. Plackett-Luce first: it is DPO and SPIN at K = 2.

B rows (a prompt and its responses), K responses a row, best first. Scores and log-probabilities are
(B, K); response_mask (B, K) is False where a row has no k-th response. Losses have the dtype of
their inputs: the model's log-probabilities and scores are float32. `preference_loss`,
`reward_loss`, `ppo_loss` and `grpo_loss` return (loss, metrics): the loss is a mean over rows or
tokens, the metrics are detached means.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanospin.fused_head import linear_logprobs  # noqa: F401  (part of this module)

LOSS_TYPES = ("pl", "pairs", "ipo", "simpo", "orpo", "hinge", "linear", "sppo", "best_of_n")
REFERENCE_TYPES = ("pl", "pairs", "ipo", "hinge", "linear", "sppo")
PLACKETT_LUCE_TYPES = ("pl", "simpo", "orpo")
MEAN_LOGPROB_TYPES = ("simpo", "orpo", "best_of_n")  # these have no reference
OPTION_TYPES = {  # the loss types that take each option
    "rank_depth": PLACKETT_LUCE_TYPES,
    "label_smoothing": PLACKETT_LUCE_TYPES,
    "taylor_order": PLACKETT_LUCE_TYPES,
    "length_normalize": REFERENCE_TYPES,
    "score_margin": ("pl", "pairs"),
    "margin": ("simpo",),
    "nll_coef": (*REFERENCE_TYPES, "simpo", "orpo"),  # best_of_n is this loss already
}
REWARD_LOSS_TYPES = ("pairs", "pl")
AVERAGES = ("token", "sequence", "constant")


# ------------------------------------------------------------------------------------ rankings


def plackett_luce(
    scores: Tensor,
    response_mask: Tensor | None = None,
    depth: int | None = None,
    ranks: Tensor | None = None,
    margin: float | Tensor = 0.0,
) -> Tensor:
    """Negative log-likelihood of a ranking (Plackett 1975; Luce 1959):

        nll = - sum_k [ s_k - logsumexp_{j >= k} s_j ]

    scores         (B, K), best first
    response_mask  (B, K) bool; masked responses take no part, whatever their score
    depth          keep the terms of the first `depth` responses; 1 is "best against the rest"
    ranks          (B, K) int, smaller is better. Equal ranks are ties: tied responses do not
                   compete with each other, so a row of ties costs 0. Default: the position
    margin         by how much s_k has to exceed each worse s_j: a number, or (B, k, j)

    Returns nll (B,). Equal scores give ln K!: ln 2 = 0.6931, ln 6 = 1.7918.
    """
    mask, ranks, worse = pair_mask(scores, response_mask, ranks)
    scores = scores.masked_fill(~mask, 0.0)
    diagonal = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    # Subtract before the log-sum-exp: at scores of 1e4, s_k - logsumexp(s) keeps three decimals.
    diff = scores[:, None, :] - scores[:, :, None]  # (B, k, j): s_j - s_k
    # The diagonal is a constant: were it s_k - s_k, its gradient would cancel up to 2^-24 only.
    diff = torch.where(diagonal, 0.0, diff + margin)
    terms = torch.logsumexp(diff.masked_fill(~(worse | diagonal), -math.inf), -1)  # (B, K)
    counted = mask
    if depth is not None:
        counted = mask & (mask.cumsum(1) <= depth)
    return terms.masked_fill(~counted, 0.0).sum(1)


def preference_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    response_mask: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "pl",
    *,
    ranks: Tensor | None = None,
    rank_depth: int = 0,
    label_smoothing: float = 0.0,
    taylor_order: float = 0.0,
    nll_coef: float = 0.0,
    margin: float = 0.0,
    lengths: Tensor | None = None,
    length_normalize: bool = False,
    data_scores: Tensor | None = None,
    score_margin: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference loss, mean over rows.

    policy_logps, ref_logps  (B, K) log-probabilities of whole responses, best first
    lengths                  (B, K) tokens of each response
    data_scores              (B, K) the scores that ranked the responses, for score_margin

    With implicit rewards s_k = beta (log pi_theta(y_k|x) - log pi_ref(y_k|x)), `loss_type` is

    pl      Plackett-Luce on s. K = 2 is DPO (arXiv 2305.18290, eq. 7; K > 2: appendix A.3), and
            SPIN when y_2 is a sample of the reference (2401.01335, eq. 4.7). rank_depth 1 is
            S-DPO (2406.09215)
    pairs   mean over ordered pairs of -log sigmoid(s_i - s_j): Bradley-Terry
    hinge   mean over ordered pairs of max(0, 1 - (s_i - s_j)): SPIN with the hinge loss; SLiC
            (2305.10425) on implicit rewards
    linear  mean over ordered pairs of -(s_i - s_j): SPIN with the linear loss. It has no minimum
    ipo     mean over ordered pairs of ((s_i - s_j) / beta - 1 / (2 beta))^2 (2310.12036, eq. 17)
    sppo    sum over responses of (s_k / beta - (P_k - 1/2) / beta)^2 (2405.00675). P_k is
            the share of the row's other responses that y_k beats by rank; a tie counts half, and
            P_k = 1/2 if there are no others. K = 2 has P = 1 and 0, TRL's sppo_hard
    simpo   Plackett-Luce on beta log pi_theta(y_k|x) / |y_k|, with `margin` (2405.14734, eq. 6).
            With label_smoothing it is the authors' -(1 - eps) log sigmoid(x) - eps log sigmoid(-x)
            at K = 2, x = s_1 - s_2 - margin; for any K the reversed ranking has -margin
    orpo    beta x Plackett-Luce on the log-odds of exp(log pi_theta(y_k|x) / |y_k|). With
            nll_coef 1 this is ORPO (2403.07691, eq. 6), beta its lambda
    best_of_n  -log pi_theta(y_1|x) / |y_1|: SFT on the best response (RAFT, 2304.06767)

    simpo, orpo and best_of_n have no reference. Options:

    rank_depth        of pl, simpo and orpo: `depth` of `plackett_luce`; 0: the whole ranking
    label_smoothing   of the same: eps is (1 - eps) PL(ranking) + eps PL(reversed), cDPO at K = 2
    taylor_order      of the same: n is T_n of the ranking's probability instead of -log
    length_normalize  of the types with a reference: s_k / |y_k|, rewards per token. pl at K = 2 is
                      then Tulu 3's loss (2411.15124; TRL's sigmoid_norm), ipo is TRL's ipo
    score_margin      of pl and pairs: s_i - s_j - score_margin (data_scores_i - data_scores_j) in
                      place of s_i - s_j (ODPO, 2402.10571, with f the identity)
    nll_coef          of all but best_of_n: adds nll_coef x -log pi_theta(y_1|x) / |y_1| (RPO,
                      2404.19733)

    Returns the loss () and metrics, means over rows: `nll` the loss before label_smoothing,
    taylor_order and nll_coef, `acc` the share of ordered pairs in the right order (a tie counts
    half), `grad_weight` of `gradient_weight`, and those of `chosen_rejected_metrics`. Raises
    ValueError for an unknown loss_type and for options that it cannot have.
    """
    options = {
        "rank_depth": rank_depth,
        "label_smoothing": label_smoothing,
        "taylor_order": taylor_order,
        "length_normalize": length_normalize,
        "score_margin": score_margin,
        "nll_coef": nll_coef,
        "margin": margin,
    }
    check_options(loss_type, options)
    if lengths is None and (loss_type in MEAN_LOGPROB_TYPES or length_normalize or nll_coef):
        raise ValueError(
            "nll_coef, length_normalize, simpo, orpo and best_of_n need lengths of the responses"
        )
    if score_margin and data_scores is None:
        raise ValueError("score_margin needs data_scores")

    mask, ranks, worse = pair_mask(policy_logps, response_mask, ranks)
    if loss_type in MEAN_LOGPROB_TYPES:
        scores = mean_logprobs(policy_logps, mask, lengths)
        if loss_type == "simpo":
            scores = beta * scores
        elif loss_type == "orpo":
            scores = log_odds(scores)
    else:
        scores = beta * (policy_logps - ref_logps).masked_fill(~mask, 0.0)
        if length_normalize:
            scores = scores / lengths.clamp(min=1)
    diff = scores[:, :, None] - scores[:, None, :]  # (B, i, j): s_i - s_j

    # (B, i, j): by how much s_i has to exceed s_j; margins[:, j, i] = -margins[:, i, j]
    margins = torch.zeros_like(diff)
    if loss_type == "simpo":
        margins = margin * (worse.to(diff) - worse.transpose(1, 2).to(diff))
    elif score_margin:
        margins = score_margins(data_scores, mask, score_margin)

    if loss_type in PLACKETT_LUCE_TYPES:
        depth = rank_depth or None
        nll = plackett_luce(scores, mask, depth, ranks, margins)
        loss = taylor_nll(-nll, taylor_order)
        if label_smoothing:
            # reversed, margins[:, j, i] belong to s_j - s_i: x = s_w - s_l - margin is the same
            ranking = scores.flip(1), mask.flip(1), depth, -ranks.flip(1), margins.flip(1, 2)
            reverse = taylor_nll(-plackett_luce(*ranking), taylor_order)
            loss = (1 - label_smoothing) * loss + label_smoothing * reverse
        if loss_type == "orpo":
            nll, loss = beta * nll, beta * loss
    else:
        nll = loss = comparison_loss(loss_type, scores, diff - margins, mask, worse, beta)
    if nll_coef:
        loss = loss - nll_coef * policy_logps[:, 0] / lengths[:, 0]

    with torch.no_grad():
        metrics = {
            "nll": nll.mean(),
            "acc": mean_over_pairs(wins(diff), worse).mean(),
            "grad_weight": gradient_weight(scores, worse),
            **chosen_rejected_metrics(scores, policy_logps, mask),
        }
    return loss.mean(), metrics


def comparison_loss(
    loss_type: str,
    scores: Tensor,
    diff: Tensor,
    response_mask: Tensor,
    worse: Tensor,
    beta: float,
) -> Tensor:
    """The losses of `preference_loss` that are no ranking's probability, (B,). scores (B, K), diff
    (B, i, j) their differences s_i - s_j less the margins, worse (B, i, j) of `pair_mask`."""
    if loss_type == "pairs":
        return mean_over_pairs(F.softplus(-diff), worse)
    if loss_type == "hinge":
        return mean_over_pairs(F.relu(1 - diff), worse)
    if loss_type == "linear":
        return mean_over_pairs(-diff, worse)
    if loss_type == "ipo":
        return mean_over_pairs(((diff - 0.5) / beta).square(), worse)
    if loss_type == "sppo":
        win_rates = mean_win_rates(response_mask, worse, scores.dtype)
        errors = (scores - (win_rates - 0.5)) / beta
        return errors.square().masked_fill(~response_mask, 0.0).sum(1)
    assert loss_type == "best_of_n"
    return -scores[:, 0].masked_fill(~response_mask[:, 0], 0.0)


def check_options(loss_type: str, options: dict[str, float]):
    """Raise ValueError for an unknown loss_type of `preference_loss`, and for options that are set
    and that it cannot have. options: {name: value}, the names of OPTION_TYPES."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}: use one of {', '.join(LOSS_TYPES)}")
    for name, value in options.items():
        allowed = OPTION_TYPES[name]
        if value and loss_type not in allowed:
            raise ValueError(
                f"loss_type {loss_type} has no {name}, only these: {', '.join(allowed)}"
            )


def reward_loss(
    scores: Tensor,
    response_mask: Tensor | None = None,
    loss_type: str = "pairs",
    *,
    ranks: Tensor | None = None,
    data_scores: Tensor | None = None,
    score_margin: float = 0.0,
    center_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a reward model, mean over rows. scores (B, K) of the responses, best first.

    pairs   mean over a row's ordered pairs of -log sigmoid(s_i - s_j): InstructGPT (arXiv
            2203.02155, eq. 1), averaged per prompt, so that a prompt with more responses does not
            count for more
    pl      Plackett-Luce of the whole ranking; the same at K = 2

    data_scores (B, K) are the scores in the data. Each pair gets the margin m_ij = score_margin x
    their difference: s_i - s_j - m_ij (Llama 2, 2307.09288, eq. 2). center_coef adds center_coef x
    the mean over pairs of (s_i + s_j)^2 (2312.09244, eq. 2), which fixes the free constant.

    Returns the loss () and metrics: `nll` the ranking part, `acc` the share of ordered pairs in the
    right order (a tie counts half), `margin` the mean of s_i - s_j. Equal scores give ln 2, or
    ln K!. Raises ValueError for another loss_type, and for score_margin without data_scores.
    """
    if loss_type not in REWARD_LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}: a reward model has pairs or pl")
    if score_margin and data_scores is None:
        raise ValueError("score_margin needs data_scores")
    mask, ranks, worse = pair_mask(scores, response_mask, ranks)
    scores = scores.masked_fill(~mask, 0.0)
    diff = scores[:, :, None] - scores[:, None, :]  # (B, i, j): s_i - s_j
    margins = torch.zeros_like(diff)
    if score_margin:
        margins = score_margins(data_scores, mask, score_margin)

    if loss_type == "pairs":
        nll = mean_over_pairs(F.softplus(margins - diff), worse)
    else:
        nll = plackett_luce(scores, mask, None, ranks, margins)
    loss = nll
    if center_coef:
        sums = scores[:, :, None] + scores[:, None, :]
        loss = nll + center_coef * mean_over_pairs(sums.square(), worse)

    with torch.no_grad():
        metrics = {
            "nll": nll.mean(),
            "acc": mean_over_pairs(wins(diff), worse).mean(),
            "margin": mean_over_pairs(diff, worse).mean(),
        }
    return loss.mean(), metrics


def pair_mask(
    scores: Tensor, response_mask: Tensor | None, ranks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs of responses are ordered. Without a mask every response is there; without ranks
    the position is the rank.

    Returns response_mask (B, K), ranks (B, K) and worse (B, i, j): both are there and j is worse.
    """
    B, K = scores.shape
    if response_mask is None:
        response_mask = torch.ones_like(scores, dtype=torch.bool)
    if ranks is None:
        ranks = torch.arange(K, device=scores.device).expand(B, K)
    worse = ranks[:, :, None] < ranks[:, None, :]
    worse = worse & response_mask[:, :, None] & response_mask[:, None, :]
    return response_mask, ranks, worse


def wins(diff: Tensor) -> Tensor:
    """Whether each s_i - s_j is above 0, as a number: 1, 0, or 1/2 for a tie. Ranking
    accuracies and win rates count like this, so that equal scores give 1/2, as guessing does."""
    return 0.5 + 0.5 * diff.sign()


def mean_over_pairs(values: Tensor, pairs: Tensor) -> Tensor:
    """Mean of values (B, K, K) over the pairs (B, K, K) of each row -> (B,); 0 without pairs."""
    return (values * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def score_margins(data_scores: Tensor, response_mask: Tensor, score_margin: float) -> Tensor:
    """m_ij = score_margin (data_scores_i - data_scores_j), (B, K, K), of data_scores (B, K). The
    score of an absent response is taken as 0, whatever it is."""
    data_scores = data_scores.masked_fill(~response_mask, 0.0)
    return score_margin * (data_scores[:, :, None] - data_scores[:, None, :])


def mean_win_rates(response_mask: Tensor, worse: Tensor, dtype: torch.dtype) -> Tensor:
    """P_k (B, K), the share of a row's other responses that y_k beats; a tie counts half. worse is
    `pair_mask`'s. Three responses without ties have 1, 1/2 and 0; a response alone has 1/2."""
    num_others = response_mask.sum(1, keepdim=True) - 1
    wins_minus_losses = (worse.sum(2) - worse.sum(1)).to(dtype)
    return 0.5 + 0.5 * wins_minus_losses / num_others.clamp(min=1)


def gradient_weight(scores: Tensor, worse: Tensor) -> Tensor:
    """sigmoid(s_j - s_i), by which DPO scales the gradient of a pair whose response i is the better
    one (arXiv 2305.18290, section 4); it is 1/2 where the policy is the reference.

    scores (B, K), worse (B, i, j) of `pair_mask`. Returns the mean over rows of the mean over a
    row's ordered pairs, (). For K > 2 it is the weight in the loss `pairs`; Plackett-Luce weighs a
    pair with the softmax over all the responses that compete.
    """
    diff = scores[:, :, None] - scores[:, None, :]  # (B, i, j): s_i - s_j
    return mean_over_pairs(torch.sigmoid(-diff), worse).mean()


def chosen_rejected_metrics(
    scores: Tensor, logps: Tensor, response_mask: Tensor
) -> dict[str, Tensor]:
    """The metrics that DPO implementations log, for any K: means over rows (B, K) of the best
    response (chosen) and of the mean of the others (rejected).

    `reward_chosen`, `reward_rejected`, `margin` of the scores; `logp_chosen`, `logp_rejected`.
    """

    def rejected(x: Tensor) -> Tensor:
        others = response_mask[:, 1:]
        return (x[:, 1:].masked_fill(~others, 0.0).sum(1) / others.sum(1).clamp(min=1)).mean()

    reward_chosen = scores[:, 0].mean()
    reward_rejected = rejected(scores)
    return {
        "margin": reward_chosen - reward_rejected,
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "logp_chosen": logps[:, 0].mean(),
        "logp_rejected": rejected(logps),
    }


# ----------------------------------------------------------------------------------- sequences


def sequence_logprobs(logps: Tensor, response_index: Tensor, num_responses: int) -> Tensor:
    """log pi(y|x) of each sequence: the sum of the log-probabilities of its tokens.

    logps (...) float; response_index (...) int64, the response of each token, -1 for none. Returns
    (num_responses,).
    """
    # not by a boolean mask, for whose size the CPU would have to wait for a GPU
    logps = logps.masked_fill(response_index < 0, 0.0)
    index = response_index.clamp(min=0)
    return logps.new_zeros(num_responses).index_add(0, index.flatten(), logps.flatten())


def mean_logprobs(logps: Tensor, response_mask: Tensor, lengths: Tensor) -> Tensor:
    """Mean log-probability of a token of each response, (B, K). Masked responses get some negative
    number, at which the log-odds are finite."""
    return logps.masked_fill(~response_mask, -1.0) / lengths.clamp(min=1)


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps), of the same shape.

    p is kept below 1 - 2^-24: the mean log-probability of a certain response rounds to 0.
    """
    return mean_logps - torch.log(-torch.expm1(mean_logps.clamp(max=-(2.0**-24))))


# ------------------------------------------------------------------------------ policy gradient


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip: float, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss of each token (arXiv 1707.06347, eq. 7), with r = pi / pi_old:

        - min( r A, clip(r, 1 - clip, 1 + clip_high) A )

    ratio, advantages (m,). clip_high None is clip; a clip of 0 does not clip. Returns the losses
    (m,) and, (m,), 1 where the ratio is outside the range and 0 elsewhere.
    """
    losses = -ratio * advantages
    if not clip:
        return losses, torch.zeros_like(ratio)
    if clip_high is None:
        clip_high = clip
    clipped = -ratio.clamp(1 - clip, 1 + clip_high) * advantages
    outside = (ratio - 1 < -clip) | (ratio - 1 > clip_high)
    return torch.maximum(losses, clipped), outside.float()


def ppo_loss(
    logps: Tensor,
    values: Tensor,
    old_logps: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    clip_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO (arXiv 1707.06347), mean over tokens. All tensors are (m,). The old ones, the
    advantages A and the returns G are of the time of sampling. With r = pi(token) / pi_old(token):

        policy   - min( r A, clip(r, 1 - clip, 1 + clip_high) A )    of `clipped_surrogate`
        value    max( (V - G)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - G)^2 ) / 2
        entropy  H = - E_old[ r log pi ], estimated on the sampled tokens: the LM head returns
                 their log-probabilities only
        loss   = policy + value_coef x value - entropy_coef x H

    A clip of 0 does not clip; clip_high None is clip. Returns the loss () and metrics:
    `policy_loss`, `value_loss`, `entropy`, `clip_fraction` the share of ratios outside the range,
    `approx_kl` = KL(pi_old || pi) by `kl_k3`.
    """
    ratio = (logps - old_logps).exp()
    policy_losses, outside = clipped_surrogate(ratio, advantages, clip, clip_high)
    value_loss = (values - returns).square()
    if value_clip:
        change = (values - old_values).clamp(-value_clip, value_clip)
        value_loss = torch.maximum(value_loss, (old_values + change - returns).square())
    value_loss = value_loss.mean() / 2
    entropy = -ratio * logps.detach()  # its gradient is that of H
    loss = policy_losses.mean() + value_coef * value_loss - entropy_coef * entropy.mean()

    with torch.no_grad():
        metrics = {
            "policy_loss": policy_losses.mean(),
            "value_loss": value_loss,
            "entropy": entropy.mean(),
            "clip_fraction": outside.mean(),
            "approx_kl": kl_k3(old_logps, logps).mean(),
        }
    return loss, {name: value.detach() for name, value in metrics.items()}


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    response_index: Tensor,
    lengths: Tensor,
    ref_logps: Tensor | None = None,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    kl_coef: float = 0.0,
    average: str = "token",
    max_length: int = 0,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient without a value function: GRPO (arXiv 2402.03300, eq. 3), Dr. GRPO, DAPO,
    RLOO and on-policy distillation, by their advantages and averages.

    logps, old_logps, advantages, ref_logps  (m,) of each token
    response_index                           (m,) int64 in [0, n), the response of each token
    lengths                                  (n,) tokens of each response, 0 where there is none

    The loss of a token is that of `clipped_surrogate`, plus kl_coef x `kl_k3` to the reference
    (2402.03300, eq. 4), minus entropy_coef x H as in `ppo_loss`. `average` is

        token     the mean over all tokens (DAPO, 2503.14476, eq. 8)
        sequence  the mean over responses of the mean over their tokens (GRPO)
        constant  the sum over tokens / (responses x max_length) (Dr. GRPO, 2503.20783)

    Returns the loss () and metrics: those of `ppo_loss` but for value_loss, and `kl`, the k3 to the
    reference, if ref_logps are given. `policy_loss` is averaged as the loss is. The other metrics
    are means over tokens with "token", and over responses of their tokens' means otherwise; both
    can be summed over micro-batches, with tokens or responses as weights. Raises ValueError for an
    unknown average, constant without max_length, and kl_coef without ref_logps.
    """
    if average not in AVERAGES:
        raise ValueError(f"unknown average {average!r}: use one of {', '.join(AVERAGES)}")
    if average == "constant" and max_length < 1:
        raise ValueError("the constant average needs max_length, the most tokens of a response")
    if kl_coef and ref_logps is None:
        raise ValueError("kl_coef needs ref_logps")

    num_responses = (lengths > 0).sum()

    def mean(x: Tensor) -> Tensor:
        if average == "token":
            return x.mean()
        return (x / lengths[response_index]).sum() / num_responses

    def loss_mean(x: Tensor) -> Tensor:
        if average == "constant":
            return x.sum() / (num_responses * max_length)
        return mean(x)

    ratio = (logps - old_logps).exp()
    policy_losses, outside = clipped_surrogate(ratio, advantages, clip, clip_high)
    entropy = -ratio * logps.detach()  # its gradient is that of H
    losses = policy_losses
    if kl_coef:
        losses = losses + kl_coef * kl_k3(logps, ref_logps)
    if entropy_coef:
        losses = losses - entropy_coef * entropy
    loss = loss_mean(losses)

    with torch.no_grad():
        metrics = {
            "policy_loss": loss_mean(policy_losses),
            "entropy": mean(entropy),
            "clip_fraction": mean(outside),
            "approx_kl": mean(kl_k3(old_logps, logps)),
        }
        if ref_logps is not None:
            metrics["kl"] = mean(kl_k3(logps, ref_logps))
    return loss, metrics


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """An estimate of KL(p || q) from samples of p, to be averaged: unbiased and never negative.

    logps, ref_logps (...): log p and log q of the samples. Returns (...), with r = q / p (J.
    Schulman, "Approximating KL divergence", joschu.net/blog):

        k3 = (r - 1) - log r
    """
    log_r = ref_logps - logps
    return torch.expm1(log_r) - log_r


# --------------------------------------------------------------------------------- Taylor loss


def taylor_nll(logps: Tensor, order: float) -> Tensor:
    """T_n(p) = -log p - sum_{j<=n} (1-p)^j / j, with p = exp(logps) and n = order.

    T_0 is cross-entropy. Each order drops one more Taylor term of -log p at p = 1, so the gradient
    is that of cross-entropy times (1-p)^n: the factor of focal loss (arXiv 1708.02002) without its
    extra term, PolyLoss (2204.12511) without its first n terms. T_n is the integral of (1-u)^n / u
    from p to 1, so n may be any real number.

    logps (...), all <= 0. Returns the same shape. Raises ValueError unless 0 <= order <= 20, the
    range in which the series keep half of double precision's digits.
    """
    if not 0 <= order <= 20:
        raise ValueError(f"order must be in [0, 20], got {order}")
    if order == 0:
        return -logps
    return TaylorNLL.apply(logps, float(order))


class TaylorNLL(torch.autograd.Function):
    """T_n by two series in float64; the gradient in closed form, dT_n = -(1-p)^n d(log p)."""

    @staticmethod
    def forward(ctx, logps: Tensor, n: float) -> Tensor:
        ctx.save_for_backward(logps)
        ctx.n = n
        x = logps.double()
        p = x.exp()
        q = -torch.expm1(x)  # 1 - p

        # p > 1/2: sum_{j>=1} q^(n+j) / (n+j). 54 terms leave an error of 2^-54.
        small_q = q.clamp(max=0.5)
        power = small_q**n
        near_one = torch.zeros_like(q)
        for j in range(1, 55):
            power = power * small_q
            near_one += power / (n + j)

        # p <= 1/2: -log p - (digamma(n+1) + gamma) + sum_{j>=1} (-1)^(j+1) C(n,j) p^j / j
        small_p = p.clamp(max=0.5)
        euler_gamma = 0.57721566490153286
        digamma = torch.special.digamma(torch.tensor(n + 1.0, dtype=torch.float64)).item()
        near_zero = -x - (digamma + euler_gamma)
        power = torch.ones_like(p)
        binomial = 1.0
        for j in range(1, 55):
            power = power * small_p
            binomial = binomial * (n - j + 1) / j
            near_zero += (-1) ** (j + 1) * binomial / j * power
        return torch.where(p > 0.5, near_one, near_zero).to(logps.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (logps,) = ctx.saved_tensors
        return -grad * (-torch.expm1(logps)) ** ctx.n, None
