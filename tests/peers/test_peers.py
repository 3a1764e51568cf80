"""Our objectives against the code of others: TRL 1.16, Liger Kernel 0.8.5, choix.

Each test is skipped where its library is not installed; `make test-peers` installs them. Losses are
equal except for these conventions: TRL's IPO divides each log-ratio by the response's length, the
paper's does not; ours does with length_normalize. TRL's ORPO and SimPO take mean log-probabilities;
ours computes them from sums and lengths. test_rank_peers.py has the other losses.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from loss import linear_logprobs, plackett_luce, preference_loss, reward_loss, sequence_logprobs
from nanospin.wandb_logger import wandb_names

B, T, BETA = 6, 11, 0.3
CPU = SimpleNamespace(device="cpu")
INSTALL = "not installed; make test-peers installs it"


@dataclass
class Pairs:
    """Token log-probabilities of B pairs (2B, T), float64: the chosen ones, then the rejected."""

    policy: torch.Tensor
    ref: torch.Tensor
    mask: torch.Tensor

    def lengths(self):
        return self.mask.sum(1, keepdim=True)

    def policy_means(self):
        """(chosen (B,), rejected (B,)): mean log-probabilities under the policy."""
        return (self.policy.sum(1) / self.mask.sum(1)).chunk(2)


def random_pairs():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, T + 1, (2 * B,), generator=g)
    mask = torch.arange(T) < lengths[:, None]
    policy = -3 * torch.rand(2 * B, T, generator=g, dtype=torch.float64) * mask
    ref = -3 * torch.rand(2 * B, T, generator=g, dtype=torch.float64) * mask
    return Pairs(policy, ref, mask)


@pytest.fixture
def pairs():
    return random_pairs()


def rows(per_token):
    """(2B, T) -> sums of each response (B, 2), chosen first."""
    return per_token.sum(1).view(2, B).T


def our_loss(pairs, **options):
    lengths = rows(pairs.mask)
    loss, _ = preference_loss(
        rows(pairs.policy), rows(pairs.ref), None, BETA, lengths=lengths, **options
    )
    return loss


def assert_equal(found, expected, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


# -------------------------------------------------------------------------------------------- TRL


def trl_dpo_loss(loss_type, pairs, metrics=None):
    """The loss of DPOTrainer's own method. `metrics` receives what it logs."""
    trl = pytest.importorskip("trl", reason=f"TRL is {INSTALL}")
    from trl.trainer.dpo_trainer import DPOTrainer

    assert trl.__version__.startswith("1.16")
    zeros = torch.zeros_like(pairs.policy)
    outputs = SimpleNamespace(
        log_probs=pairs.policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=BETA,
        use_weighting=False,
        _metrics={"eval": defaultdict(list) if metrics is None else metrics},
        _total_train_tokens=0,
    )
    prompt = torch.zeros(2 * B, 1, dtype=torch.long)
    with_prompt = torch.cat([prompt, pairs.mask.long()], 1)
    chosen, rejected = pairs.ref.sum(1).chunk(2)
    inputs = {
        "completion_mask": with_prompt,
        "input_ids": with_prompt,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False)


def test_dpo(pairs):
    assert_equal(our_loss(pairs), trl_dpo_loss("sigmoid", pairs))


def test_metrics_sent_to_wandb(pairs):
    """Names and values are those that DPOTrainer logs, and DPO's gradient weight beside them."""
    logged = defaultdict(list)
    loss = trl_dpo_loss("sigmoid", pairs, metrics=logged)
    expected = {"eval/loss": loss.item()}
    for name, (value,) in logged.items():
        if name.startswith(("rewards/", "logps/")):
            expected[f"eval/{name}"] = pytest.approx(value, rel=1e-6)  # accuracies are float32
    assert len(expected) == 7

    _, metrics = preference_loss(rows(pairs.policy), rows(pairs.ref), None, BETA)
    record = {name: value.item() for name, value in metrics.items()}
    record["rank_nll"] = record.pop("nll")
    found = wandb_names({"kind": "eval"} | record, "spin")
    assert found.pop("eval/loss") == pytest.approx(expected.pop("eval/loss"), rel=1e-6)
    scores = BETA * (rows(pairs.policy) - rows(pairs.ref))
    weight = torch.sigmoid(scores[:, 1] - scores[:, 0]).mean().item()
    assert found.pop("eval/grad_weight") == pytest.approx(weight, rel=1e-6)
    assert found == expected


def test_ipo(pairs):
    """Equal with length_normalize; for sums, as in the paper, it is a different loss."""
    theirs = trl_dpo_loss("ipo", pairs)
    assert_equal(our_loss(pairs, loss_type="ipo", length_normalize=True), theirs)
    assert abs(our_loss(pairs, loss_type="ipo") - theirs) > 1


def trl_cpo_loss(loss_type, pairs, label_smoothing=0.0):
    pytest.importorskip("trl", reason=f"TRL is {INSTALL}")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        beta=BETA,
        simpo_gamma=0.5,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        accelerator=CPU,
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, *pairs.policy_means())
    return losses.mean()


def test_simpo(pairs):
    assert_equal(our_loss(pairs, loss_type="simpo", margin=0.5), trl_cpo_loss("simpo", pairs))
    smooth = our_loss(pairs, loss_type="simpo", margin=0.5, label_smoothing=0.1)
    assert_equal(smooth, trl_cpo_loss("simpo", pairs, label_smoothing=0.1))


def test_ipo_without_a_reference(pairs):
    means = pairs.policy / pairs.lengths()
    no_reference = Pairs(means, torch.zeros_like(means), pairs.mask)
    assert_equal(our_loss(no_reference, loss_type="ipo"), trl_cpo_loss("ipo", pairs))


def test_orpo(pairs):
    pytest.importorskip("trl", reason=f"TRL is {INSTALL}")
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    chosen, rejected = pairs.policy_means()
    trainer = SimpleNamespace(beta=BETA, accelerator=CPU)
    log_sigmoid, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    theirs = -log_sigmoid.mean()  # float32
    ours = our_loss(pairs, loss_type="orpo").float()
    assert_equal(ours, theirs, rtol=1e-5, atol=1e-6)
    with_nll = our_loss(pairs, loss_type="orpo", nll_coef=1.0).float()
    assert_equal(with_nll, theirs - chosen.mean().float(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ Liger


@dataclass
class LigerLoss:
    name: str  # LigerFusedLinear{name}Loss
    loss_type: str
    their_options: dict
    our_options: dict
    has_reference: bool


LIGER_LOSSES = [
    LigerLoss("DPO", "pl", {}, {}, has_reference=True),
    LigerLoss("SimPO", "simpo", {"gamma": 0.5}, {"margin": 0.5}, has_reference=False),
    LigerLoss("ORPO", "orpo", {}, {}, has_reference=False),
]


@dataclass
class HeadInputs:
    """What a fused LM head needs: hidden states and targets of B pairs, chosen first."""

    hidden: torch.Tensor  # (2B, T, C)
    ref_hidden: torch.Tensor  # (2B, T, C)
    weight: torch.Tensor  # (V, C)
    targets: torch.Tensor  # (2B, T), -1 where there is none
    lengths: torch.Tensor  # (2B,)


def head_inputs():
    g = torch.Generator().manual_seed(1)
    V, C = 37, 16
    hidden = torch.randn(2 * B, T, C, generator=g)
    weight = torch.randn(V, C, generator=g)
    ref_hidden = torch.randn(2 * B, T, C, generator=g)
    lengths = torch.randint(1, T + 1, (2 * B,), generator=g)
    outside = torch.arange(T) >= lengths[:, None]
    targets = torch.randint(0, V, (2 * B, T), generator=g).masked_fill(outside, -1)
    return HeadInputs(hidden, ref_hidden, weight, targets, lengths)


def liger_head_loss(case, inputs, hidden, weight):
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason=f"Liger Kernel is {INSTALL}")
    module_class = getattr(chunked, f"LigerFusedLinear{case.name}Loss")
    module = module_class(beta=BETA, compute_nll_loss=False, compiled=False, **case.their_options)
    reference = {}
    if case.has_reference:
        reference = {"ref_input": inputs.ref_hidden, "ref_weight": inputs.weight}
    targets = inputs.targets.masked_fill(inputs.targets < 0, -100)
    loss = module(lin_weight=weight, _input=hidden, target=targets, **reference)
    return loss[0] if isinstance(loss, tuple) else loss


def our_head_loss(case, inputs, hidden, weight):
    pair = torch.arange(2 * B) % B
    response = torch.arange(2 * B) // B
    response_index = (
        (2 * pair + response)[:, None].expand(-1, T).masked_fill(inputs.targets < 0, -1)
    )

    def response_logps(hidden, weight):
        logps = linear_logprobs(hidden, weight, inputs.targets)
        return sequence_logprobs(logps, response_index, 2 * B).view(B, 2)

    policy = response_logps(hidden, weight)
    ref = response_logps(inputs.ref_hidden, inputs.weight)
    lengths = inputs.lengths.view(2, B).T
    loss, _ = preference_loss(
        policy, ref, None, BETA, case.loss_type, lengths=lengths, **case.our_options
    )
    return loss


@pytest.mark.parametrize("case", LIGER_LOSSES, ids=lambda case: case.name)
def test_liger_fused_losses(case):
    """From hidden states to the loss: values, and gradients of hidden states and head."""
    inputs = head_inputs()
    results = []
    for head_loss in (our_head_loss, liger_head_loss):
        hidden = inputs.hidden.clone().requires_grad_()
        weight = inputs.weight.clone().requires_grad_()
        loss = head_loss(case, inputs, hidden, weight)
        results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    for ours, theirs in zip(*results):
        largest = theirs.abs().max().item()
        assert_equal(ours, theirs, rtol=1e-4, atol=1e-6 * max(1.0, largest))  # float32


# ------------------------------------------------------------------------------------------ choix


@pytest.mark.parametrize("K", [2, 3, 6])
def test_choix(K):
    """Plackett-Luce of whole rankings, Bradley-Terry of all pairs."""
    choix = pytest.importorskip("choix", reason=f"choix is {INSTALL}")
    g = torch.Generator().manual_seed(K)
    scores = 3 * torch.randn(20, K, generator=g, dtype=torch.float64)
    all_pairs = []
    for i in range(K):
        all_pairs += [(i, j) for j in range(i + 1, K)]

    for row, nll in zip(scores, plackett_luce(scores)):
        ranking = tuple(range(K))
        theirs = -choix.log_likelihood_rankings([ranking], row.numpy())
        assert nll.item() == pytest.approx(theirs, rel=1e-12)

        loss, _ = reward_loss(row[None])
        theirs = -choix.log_likelihood_pairwise(all_pairs, row.numpy()) / math.comb(K, 2)
        assert loss.item() == pytest.approx(theirs, rel=1e-12)
