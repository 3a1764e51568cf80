"""The objectives against other people's own code: TRL 1.16, Liger Kernel 0.8.5, choix. `make test-peers` has them installed;
elsewhere these are skipped.

What is equal and what is not: TRL's IPO divides each sequence's log-ratio by its length, where the paper and ours do not;
given such means ours is TRL's. TRL's ORPO and SimPO take mean log-probabilities, as ours make of sums and lengths.
"""

import math
import types
from collections import defaultdict

import pytest
import torch

from nanospin.wandb_logger import wandb_names
from loss import linear_logprobs, plackett_luce, preference_loss, reward_loss, sequence_logprobs

B, T, BETA = 6, 11, 0.3


@pytest.fixture
def pairs():
    """(token logps (2B, T) of policy and of reference, best responses first, mask (2B, T)) in float64."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, T + 1, (2 * B,), generator=g)
    mask = torch.arange(T) < lengths[:, None]
    policy, ref = (
        -3 * torch.rand(2 * B, T, generator=g, dtype=torch.float64) * mask for _ in range(2)
    )
    return policy, ref, mask


def ours(policy, ref, mask, **options):
    """preference_loss on rows of two responses."""
    policy, ref, lengths = (x.sum(1).view(2, B).T for x in (policy, ref, mask))
    return preference_loss(policy, ref, None, BETA, lengths=lengths, **options)[0]


def trl_dpo(loss_type, policy, ref, mask, metrics=None):
    """DPOTrainer's loss, computed by its own method on given log-probabilities; what it logs goes into `metrics`."""
    trl = pytest.importorskip("trl", reason="TRL is not installed; make test-peers installs it")
    from trl.trainer.dpo_trainer import DPOTrainer

    assert trl.__version__.startswith("1.16")
    nothing = torch.zeros_like(policy)
    outputs = types.SimpleNamespace(
        log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    same = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        accelerator=same,
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
    with_prompt = torch.cat([torch.zeros(2 * B, 1, dtype=torch.long), mask.long()], 1)
    chosen, rejected = ref.sum(1).chunk(2)
    inputs = {
        "completion_mask": with_prompt,
        "input_ids": with_prompt,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **kw: outputs, inputs, False)


def test_dpo_is_trls(pairs):
    torch.testing.assert_close(ours(*pairs), trl_dpo("sigmoid", *pairs), rtol=1e-12, atol=1e-12)


def test_what_is_sent_to_wandb_is_trls(pairs):
    """The names and the values that DPOTrainer logs."""
    theirs, (policy, ref, _) = defaultdict(list), pairs
    loss = trl_dpo("sigmoid", *pairs, metrics=theirs)
    _, mine = preference_loss(*(x.sum(1).view(2, B).T for x in (policy, ref)), None, BETA)
    mine = wandb_names(
        {"kind": "eval", "rank_nll": mine["nll"].item()}
        | {name: value.item() for name, value in mine.items() if name != "nll"},
        "spin",
    )
    theirs = {
        f"eval/{name}": value
        for name, (value,) in theirs.items()
        if name.startswith(("rewards/", "logps/"))
    } | {"eval/loss": loss.item()}
    assert len(theirs) == 7 and mine == {
        name: pytest.approx(value, rel=1e-6) for name, value in theirs.items()
    }  # their accuracy is float32


def test_ipo_is_trls_given_means(pairs):
    policy, ref, mask = pairs
    means = [x / mask.sum(1, keepdim=True) for x in (policy, ref)]
    torch.testing.assert_close(
        ours(*means, mask, kind="ipo"), trl_dpo("ipo", *pairs), rtol=1e-12, atol=1e-12
    )
    assert (
        abs(ours(*pairs, kind="ipo") - trl_dpo("ipo", *pairs)) > 1
    )  # of sums it is another loss, the paper's


def test_simpo_and_ipo_are_trls_cpo(pairs):
    pytest.importorskip("trl", reason="TRL is not installed; make test-peers installs it")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    policy, ref, mask = pairs
    chosen, rejected = (policy.sum(1) / mask.sum(1)).chunk(2)
    for kind, more in (("simpo", {"margin": 0.5}), ("ipo", {})):
        trainer = types.SimpleNamespace(
            alpha=0.0,
            beta=BETA,
            simpo_gamma=0.5,
            label_smoothing=0.0,
            loss_type=kind,
            accelerator=types.SimpleNamespace(device="cpu"),
        )
        if kind == "simpo":
            mine = ours(policy, ref, mask, kind=kind, **more)
        else:  # CPO's has no reference
            mine = ours(policy / mask.sum(1, keepdim=True), torch.zeros_like(ref), mask, kind=kind)
        torch.testing.assert_close(
            mine, CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean(), rtol=1e-12, atol=1e-12
        )


def test_orpo_is_trls(pairs):
    pytest.importorskip("trl", reason="TRL is not installed; make test-peers installs it")
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    policy, ref, mask = pairs
    chosen, rejected = (policy.sum(1) / mask.sum(1)).chunk(2)
    trainer = types.SimpleNamespace(beta=BETA, accelerator=types.SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()
    torch.testing.assert_close(
        ours(policy, ref, mask, kind="orpo").float(), theirs, rtol=1e-5, atol=1e-6
    )  # theirs is float32
    both = ours(policy, ref, mask, kind="orpo", nll_coef=1.0)
    torch.testing.assert_close(both.float(), theirs - chosen.mean().float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, kind, options",
    [("DPO", "pl", {}), ("SimPO", "simpo", {"margin": 0.5}), ("ORPO", "orpo", {})],
)
def test_ligers_chunked_losses(name, kind, options):
    """From hidden states to the loss and back: Liger's fused head and ours, values and gradients by hidden states and weight."""
    chunked = pytest.importorskip(
        "liger_kernel.chunked_loss",
        reason="Liger Kernel is not installed; make test-peers installs it",
    )
    g, V, C = torch.Generator().manual_seed(1), 37, 16
    hidden, weight, ref_hidden = (
        torch.randn(*shape, generator=g) for shape in ((2 * B, T, C), (V, C), (2 * B, T, C))
    )
    lengths = torch.randint(1, T + 1, (2 * B,), generator=g)
    mask = torch.arange(T) < lengths[:, None]
    targets = torch.randint(0, V, (2 * B, T), generator=g).masked_fill(~mask, -1)
    seq = (
        (torch.arange(2 * B) % B * 2 + torch.arange(2 * B) // B)[:, None]
        .expand(-1, T)
        .masked_fill(~mask, -1)
    )  # b K + k
    grads = []
    for theirs in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if theirs:
            more = {"gamma": 0.5} if name == "SimPO" else {}
            module = getattr(chunked, f"LigerFusedLinear{name}Loss")(
                beta=BETA, compute_nll_loss=False, compiled=False, **more
            )
            loss = module(
                lin_weight=w,
                _input=h,
                target=targets.masked_fill(~mask, -100),
                **({"ref_input": ref_hidden, "ref_weight": weight} if name == "DPO" else {}),
            )
            loss = loss[0] if isinstance(loss, tuple) else loss
        else:
            policy = sequence_logprobs(linear_logprobs(h, w, targets), seq, 2 * B).view(B, 2)
            ref = sequence_logprobs(linear_logprobs(ref_hidden, weight, targets), seq, 2 * B).view(
                B, 2
            )
            loss, _ = preference_loss(
                policy, ref, None, BETA, kind, lengths=lengths.view(2, B).T, **options
            )
        grads.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    for mine, their in zip(*grads):
        torch.testing.assert_close(
            mine, their, rtol=1e-4, atol=1e-6 * max(1.0, their.abs().max().item())
        )  # float32 through a head of another order


@pytest.mark.parametrize("K", [2, 3, 6])
def test_plackett_luce_is_choixs(K):
    choix = pytest.importorskip(
        "choix", reason="choix is not installed; make test-peers installs it"
    )
    scores = 3 * torch.randn(20, K, generator=torch.Generator().manual_seed(K), dtype=torch.float64)
    for row, nll in zip(scores, plackett_luce(scores)):
        assert nll.item() == pytest.approx(
            -choix.log_likelihood_rankings([tuple(range(K))], row.numpy()), rel=1e-12
        )
    # and the pairs of a reward model: Bradley-Terry of each
    for row in scores:
        every = [(i, j) for i in range(K) for j in range(i + 1, K)]
        theirs = -choix.log_likelihood_pairwise(every, row.numpy()) / math.comb(K, 2)
        assert reward_loss(row[None])[0].item() == pytest.approx(theirs, rel=1e-12)
