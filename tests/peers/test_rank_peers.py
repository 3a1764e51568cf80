"""Losses of rankings and groups against the code of others: TRL 1.16, transformers, verl 0.9.

Each test is skipped where its library is not installed; `make test-peers` installs all but verl.
verl needs Ray, so its functions are also written out here, and both are compared. Ours and theirs
are equal except for these conventions:

- SPPO's authors take half of our sum over two responses; TRL's sppo_hard is the sum.
- TRL's loss types dapo and bnpo are our average "token", grpo is "sequence", dr_grpo "constant".
  verl calls them token-mean, seq-mean-token-mean and seq-mean-token-sum-norm.
- A response without tokens is not counted by ours and verl's averages, and is counted by TRL's.
- TRL multiplies k3 by the ratio by default, for an unbiased gradient (use_bias_correction_kl,
  2512.02556). GRPO's paper and ours do not, so it is off here.
- GRPO's advantages divide by std + 1e-4 in TRL and here, by std + 1e-6 in verl.
- TRL's RLOO has one ratio per response, the product of its tokens'; ours has one per token. They
  have the same gradient where the policy is the one that sampled.
- verl bounds the loss where A < 0 and the ratio is above 3 (dual clip), clamps its k3 to [-10, 10],
  and counts a ratio as clipped only where clipping changes the loss.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loss import grpo_loss, kl_k3, preference_loss
from ppo import group_advantages
from tests.peers.test_peers import (
    BETA,
    INSTALL,
    B,
    assert_equal,
    our_loss,
    random_pairs,
    trl_dpo_loss,
)

# ------------------------------------------------------------------------------------- preferences


@pytest.fixture
def pairs():
    pairs = random_pairs()
    pairs.policy.requires_grad_()
    return pairs


def assert_same_loss(pairs, ours, theirs):
    """Value, and gradient of each token: 1e-12 of float64 sums of 66 tokens."""
    assert_equal(ours, theirs)
    (grad,) = torch.autograd.grad(ours, pairs.policy)
    (expected,) = torch.autograd.grad(theirs, pairs.policy)
    assert_equal(grad, expected)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("sigmoid", {"loss_type": "pl"}),
        ("sigmoid", {"loss_type": "pairs"}),
        ("hinge", {"loss_type": "hinge"}),
        ("sppo_hard", {"loss_type": "sppo"}),
        ("ipo", {"loss_type": "ipo", "length_normalize": True}),
        ("sigmoid_norm", {"loss_type": "pl", "length_normalize": True}),
        ("sigmoid_norm", {"loss_type": "pairs", "length_normalize": True}),
    ],
)
def test_trl_dpo_losses(pairs, theirs, ours):
    assert_same_loss(pairs, our_loss(pairs, **ours), trl_dpo_loss(theirs, pairs))


# 2401.01335, section 4.1: the loss functions of t in eq. 4.7
SPIN_LOSSES = {
    "linear": lambda t: -t,
    "hinge": lambda t: torch.clamp(1 - t, min=0),
    "pl": lambda t: torch.log(1 + torch.exp(-t)),  # logistic
}


@pytest.mark.parametrize("loss_type", SPIN_LOSSES)
def test_spin(pairs, loss_type):
    """Eq. 4.7: the mean of l(lambda log p(y)/p_t(y) - lambda log p(y')/p_t(y')), lambda = beta."""
    data, samples = (pairs.policy.sum(1) - pairs.ref.sum(1)).chunk(2)
    theirs = SPIN_LOSSES[loss_type](BETA * data - BETA * samples).mean()
    assert_same_loss(pairs, our_loss(pairs, loss_type=loss_type), theirs)


def test_sppo_of_its_authors(pairs):
    """Loss type "sppo" of trainer.py at github.com/uclaml/SPPO, with P = 1 and 0."""
    winner, loser = (pairs.policy.sum(1) - pairs.ref.sum(1)).chunk(2)
    loss_w = (winner - (1 / BETA) * (1.0 - 0.5)) ** 2
    loss_l = (loser - (1 / BETA) * (0.0 - 0.5)) ** 2
    theirs = ((loss_w + loss_l) / 2).mean()
    assert_same_loss(pairs, our_loss(pairs, loss_type="sppo") / 2, theirs)


@pytest.mark.parametrize("loss_type", ["pl", "pairs"])
def test_odpo(pairs, loss_type):
    """2402.10571, eq. 5: -log sigmoid(r_w - r_l - Delta), Delta = alpha (score_w - score_l)."""
    scores = torch.randn(B, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    winner, loser = (BETA * (pairs.policy.sum(1) - pairs.ref.sum(1))).chunk(2)
    delta = 0.5 * (scores[:, 0] - scores[:, 1])
    theirs = -torch.log(torch.sigmoid(winner - loser - delta)).mean()
    ours = our_loss(pairs, loss_type=loss_type, data_scores=scores, score_margin=0.5)
    assert_same_loss(pairs, ours, theirs)


# ---------------------------------------------------------------------- a small model, with samples

V, PROMPT, COMPLETION = 31, 3, 6
EOS, PAD = 29, 30


def hf_model(seed=0):
    transformers = pytest.importorskip("transformers", reason=f"transformers is {INSTALL}")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return transformers.LlamaForCausalLM(config)


def completion_logps(model, inputs):
    """(n, COMPLETION) log-probabilities of the tokens of completions, in the model's dtype."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logps = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    return logps[:, PROMPT - 1 : -1].gather(-1, inputs["completion_ids"][..., None])[..., 0]


def random_completions(n=8, seed=0):
    """What GRPOTrainer's loss takes, for n completions of 1 to COMPLETION tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, COMPLETION + 1, (n,), generator=g)
    completion_mask = (torch.arange(COMPLETION) < lengths[:, None]).long()
    completion_ids = torch.randint(0, EOS, (n, COMPLETION), generator=g)
    return {
        "prompt_ids": torch.randint(0, EOS, (n, PROMPT), generator=g),
        "prompt_mask": torch.ones(n, PROMPT, dtype=torch.long),
        "completion_ids": completion_ids.masked_fill(completion_mask == 0, PAD),
        "completion_mask": completion_mask,
        "advantages": torch.randn(n, generator=g, dtype=torch.float64),
        "num_items_in_batch": lengths.sum(),
    }


def test_best_of_n_is_cross_entropy_on_the_best_response():
    """RAFT: the loss of transformers on the first of three responses to each prompt, mean over
    prompts. In float32, where losses of about 4 have a unit in the last place of 5e-7."""
    model = hf_model()
    inputs = random_completions(n=6)
    logps = completion_logps(model, inputs) * inputs["completion_mask"]
    lengths = inputs["completion_mask"].sum(1).view(2, 3)
    policy = logps.sum(1).view(2, 3)
    ours, _ = preference_loss(
        policy, torch.zeros(2, 3), loss_type="best_of_n", lengths=lengths.float()
    )
    theirs = 0.0
    for best in (0, 3):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[best][None]
        is_response = torch.cat([torch.zeros(PROMPT), inputs["completion_mask"][best]]).bool()
        labels = ids.masked_fill(~is_response, -100)
        theirs = theirs + model(input_ids=ids, labels=labels).loss / 2
    assert_equal(ours, theirs, rtol=1e-6, atol=0)
    params = list(model.parameters())
    for grad, expected in zip(
        torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params)
    ):
        assert_equal(grad, expected, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------- TRL's trainers


def make_trainer(name, folder, rewards=None, **options):
    """A GRPOTrainer or RLOOTrainer of the small model, whose rewards are `rewards`, in order."""
    trl = pytest.importorskip("trl", reason=f"TRL is {INSTALL}")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(EOS)] + ["<eos>", "<pad>"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    enc = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    path = str(folder / "model")
    hf_model().save_pretrained(path)
    enc.save_pretrained(path)

    def reward(prompts, completions, **kwargs):
        return list(rewards)

    args = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=COMPLETION,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=path,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "w1 w2 w3"}, {"prompt": "w4 w5"}]),
        processing_class=enc,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@dataclass
class Average:
    trl: str  # TRL's loss_type
    ours: str


AVERAGES = [
    Average("dapo", "token"),
    Average("bnpo", "token"),
    Average("grpo", "sequence"),
    Average("dr_grpo", "constant"),
]


@dataclass
class GRPOCase:
    average: Average
    epsilon_high: float
    beta: float


GRPO_CASES = []
for average in AVERAGES:
    GRPO_CASES.append(GRPOCase(average, 0.2, 0.0))
    GRPO_CASES.append(GRPOCase(average, 0.28, 0.05))


def case_name(case):
    return f"{case.average.trl}-{case.epsilon_high}-{case.beta}"


def our_grpo_loss(case, logps, inputs):
    """grpo_loss of the tokens of the completions alone. logps (n, COMPLETION)."""
    is_token = inputs["completion_mask"].bool()
    lengths = is_token.sum(1)
    n = len(lengths)
    loss, metrics = grpo_loss(
        logps[is_token],
        inputs["old_per_token_logps"][is_token],
        inputs["advantages"][:, None].expand(n, COMPLETION)[is_token],
        torch.arange(n)[:, None].expand(n, COMPLETION)[is_token],
        lengths,
        inputs["ref_per_token_logps"][is_token] if case.beta else None,
        clip=0.2,
        clip_high=case.epsilon_high,
        kl_coef=case.beta,
        average=case.average.ours,
        max_length=COMPLETION,
    )
    return loss, metrics


@pytest.fixture(scope="module")
def grpo_trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    return make_trainer("GRPO", folder, beta=0.05, use_bias_correction_kl=False)


def configure(trainer, case):
    trainer.model.train()  # it has no dropout
    trainer.loss_type = case.average.trl
    trainer.epsilon_low = 0.2
    trainer.epsilon_high = case.epsilon_high
    trainer.beta = case.beta
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}


def in_float64(monkeypatch, trainer, model):
    """TRL's log-probabilities are float32, whatever the model is. Here they are the model's."""

    def float64_logps(model, input_ids, attention_mask, logits_to_keep, **kwargs):
        logps = model(input_ids=input_ids, attention_mask=attention_mask).logits.log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        logps = logps[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
        return logps[:, -logits_to_keep:], entropy[:, -logits_to_keep - 1 : -1], None

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", float64_logps)
    return model.double()


@pytest.mark.parametrize("case", GRPO_CASES, ids=case_name)
def test_grpo_five_steps(monkeypatch, grpo_trainer, case):
    """Losses, gradients, metrics and, after five steps of AdamW on the same samples, parameters.

    All in float64. Gradients of about 0.1 are equal to 1e-13. AdamW divides by their size, so that
    parameters with small gradients, of 1e-6 and less, differ by some 1e-13 / 1e-6 x the learning
    rate: 1e-8 bounds the parameters, whose change is 0.1.
    """
    configure(grpo_trainer, case)
    inputs = random_completions()
    reference = hf_model(seed=7).double()
    ours, theirs = hf_model(), hf_model()
    ours.double()
    in_float64(monkeypatch, grpo_trainer, theirs)
    start = [p.detach().clone() for p in ours.parameters()]
    with torch.no_grad():
        inputs["old_per_token_logps"] = completion_logps(ours, inputs)
        inputs["ref_per_token_logps"] = completion_logps(reference, inputs)

    our_optimizer = torch.optim.AdamW(ours.parameters(), lr=0.02)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.02)
    clip_fractions = []
    for step in range(5):
        our_optimizer.zero_grad()
        their_optimizer.zero_grad()
        loss, metrics = our_grpo_loss(case, completion_logps(ours, inputs), inputs)
        their_loss = grpo_trainer._compute_loss(theirs, inputs)
        assert_equal(loss, their_loss, rtol=1e-8, atol=1e-8)
        loss.backward()
        their_loss.backward()
        if step == 0:
            assert_equal(loss, their_loss, rtol=1e-13, atol=1e-13)
            for p, q in zip(ours.parameters(), theirs.parameters()):
                assert_equal(p.grad, q.grad, rtol=1e-12, atol=1e-13)
        if case.beta and case.average.ours == "token":
            logged = grpo_trainer._metrics["train"]["kl"][-1]
            assert metrics["kl"].item() == pytest.approx(logged, rel=1e-6)
        clip_fractions.append(metrics["clip_fraction"].item())
        our_optimizer.step()
        their_optimizer.step()

    assert clip_fractions[0] == 0 and clip_fractions[-1] > 0.3  # the clipped branch is compared
    changes = []
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start):
        assert_equal(p, q, rtol=0, atol=1e-8)
        changes.append((p - before).abs().max().item())
    assert min(changes) > 0.01


@pytest.mark.parametrize("case", GRPO_CASES, ids=case_name)
def test_grpo_with_trls_own_logprobs(grpo_trainer, case):
    """A step through TRL's fused head, in float32. Off-policy: the old ones are another model's."""
    configure(grpo_trainer, case)
    inputs = random_completions(seed=1)
    model = grpo_trainer.model
    with torch.no_grad():
        logps = completion_logps(model, inputs)
        noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
        inputs["old_per_token_logps"] = logps + 0.3 * noise
        inputs["ref_per_token_logps"] = completion_logps(hf_model(seed=7), inputs)
    inputs["advantages"] = inputs["advantages"].float()
    ours, _ = our_grpo_loss(case, completion_logps(model, inputs), inputs)
    theirs = grpo_trainer._compute_loss(model, inputs)
    assert_equal(ours, theirs, rtol=1e-5, atol=1e-6)
    params = list(model.parameters())
    for grad, expected in zip(
        torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params)
    ):
        assert_equal(grad, expected, rtol=1e-4, atol=1e-6)


REWARDS = [0.3, 1.7, -0.4, 0.9, 2.5, 2.5, 2.5, 2.6]


def advantages(rewards, estimator):
    """group_advantages of two groups of four, as a flat list."""
    groups = np.array(rewards, dtype=np.float64).reshape(2, 4)
    return np.asarray(group_advantages(groups, estimator)).ravel().tolist()


PROMPTS = [{"prompt": "w1 w2 w3"}] * 4 + [{"prompt": "w4 w5"}] * 4


@pytest.mark.parametrize("rewards", [REWARDS, [1.0] * 4 + [0.0, 0.0, 1.0, 0.0]])
@pytest.mark.parametrize(
    "trainer, options, estimator",
    [
        ("GRPO", {"scale_rewards": "group"}, "grpo"),
        ("GRPO", {"scale_rewards": "none"}, "dr_grpo"),
        ("RLOO", {"beta": 0.0}, "rloo"),
    ],
)
def test_trl_advantages(tmp_path, trainer, options, estimator, rewards):
    """Of rewards that the trainer got for its own samples. It computes them in float32; divided by
    a small standard deviation, 0.05, roundings of 2.5 become 1e-5."""
    trainer = make_trainer(trainer, tmp_path, rewards, **options)
    theirs = trainer._generate_and_score_completions(PROMPTS)["advantages"]
    assert advantages(rewards, estimator) == pytest.approx(theirs.tolist(), rel=1e-5, abs=1e-5)


def test_trl_rloo(tmp_path):
    """On-policy, its gradient is ours summed over tokens, mean over responses. float32."""
    trainer = make_trainer("RLOO", tmp_path, beta=0.0)
    inputs = random_completions()
    inputs["advantages"] = torch.tensor(advantages(REWARDS, "rloo"))
    model, mask = trainer.model, inputs["completion_mask"]
    with torch.no_grad():
        inputs["old_per_token_logps"] = completion_logps(model, inputs)
        inputs["old_logps"] = (inputs["old_per_token_logps"] * mask).sum(1)
    case = GRPOCase(Average("", "constant"), 0.2, 0.0)
    ours, _ = our_grpo_loss(case, completion_logps(model, inputs), inputs)
    ours = ours * COMPLETION  # the constant average with max_length 1
    theirs = trainer._compute_loss(model, inputs)
    params = list(model.parameters())
    for grad, expected in zip(
        torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params)
    ):
        assert_equal(grad, expected, rtol=1e-4, atol=1e-5)


def test_on_policy_distillation_is_gkd_with_beta_1():
    """Over all tokens of the policy at each prefix, the loss of sampled tokens with advantages
    log T - log pi has the value and the gradient of GKDTrainer's. 1e-13: sums of 155 terms."""
    pytest.importorskip("trl", reason=f"TRL is {INSTALL}")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    g = torch.Generator().manual_seed(3)
    student = torch.randn(1, 5, V, generator=g, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(1, 5, V, generator=g, dtype=torch.float64)
    labels = torch.zeros(1, 5, dtype=torch.long)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=1)

    logps = student.log_softmax(-1)[0]  # (5, V)
    old_logps = logps.detach()
    token_advantages = teacher.log_softmax(-1)[0] - old_logps
    ours = 0.0
    for token in range(V):
        # the same token at all prefixes, each weighted by its probability there
        for prefix in range(5):
            loss, _ = grpo_loss(
                logps[prefix, token][None],
                old_logps[prefix, token][None],
                token_advantages[prefix, token][None],
                torch.tensor([0]),
                torch.tensor([1]),
                average="token",
            )
            ours = ours + old_logps[prefix, token].exp() * loss / 5
    assert_equal(ours, theirs, rtol=1e-13, atol=1e-13)
    (grad,) = torch.autograd.grad(ours, student)
    (expected,) = torch.autograd.grad(theirs, student)
    assert_equal(grad, expected, rtol=1e-13, atol=1e-13)


# --------------------------------------------------------------------------------------------- verl
# verl/trainer/ppo/core_algos.py of verl 0.9.1, as formulas.


def verl_grpo_advantage(token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=True):
    scores = token_level_rewards.sum(-1)
    result = torch.zeros_like(scores)
    for group in set(index.tolist()):
        members = torch.tensor(index == group)
        result[members] = scores[members] - scores[members].mean()
        if norm_adv_by_std_in_grpo:
            result[members] /= scores[members].std() + 1e-6
    return result[:, None] * response_mask, None


def verl_rloo_advantage(token_level_rewards, response_mask, index):
    scores = token_level_rewards.sum(-1)
    result = torch.zeros_like(scores)
    for group in set(index.tolist()):
        members = torch.tensor(index == group)
        size = members.sum()
        result[members] = (scores[members] - scores[members].mean()) * size / (size - 1)
    return result[:, None] * response_mask, None


def verl_agg_loss(loss_mat, loss_mask, loss_agg_mode, loss_scale_factor=None):
    tokens = loss_mask.sum(-1)
    sums = (loss_mat * loss_mask).sum(-1)
    if loss_agg_mode == "token-mean":
        return sums.sum() / tokens.sum()
    if loss_agg_mode == "seq-mean-token-mean":
        return (sums / (tokens + 1e-8)).sum() / (tokens > 0).sum()
    assert loss_agg_mode == "seq-mean-token-sum-norm"
    return sums.sum() / (tokens > 0).sum() / (loss_scale_factor or loss_mask.shape[1])


def verl_policy_loss(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    cliprange,
    cliprange_high,
    clip_ratio_c,
    loss_agg_mode,
):
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = torch.clamp(ratio, 1 - cliprange, 1 + cliprange_high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    bounded = torch.minimum(losses, -advantages * clip_ratio_c)
    losses = torch.where(advantages < 0, bounded, losses)
    is_clipped = (-advantages * clipped > -advantages * ratio).double()
    clip_fraction = (is_clipped * response_mask).sum() / response_mask.sum()
    return verl_agg_loss(losses, response_mask, loss_agg_mode), clip_fraction, None, None


def verl_kl_penalty(log_prob, ref_log_prob, kind):
    log_r = ref_log_prob - log_prob
    if kind == "k3":
        return (torch.exp(log_r) - log_r - 1).clamp(-10, 10)
    return {"k1": -log_r, "k2": log_r**2 / 2}[kind]


VERL_FORMULAS = SimpleNamespace(
    compute_grpo_outcome_advantage=verl_grpo_advantage,
    compute_rloo_outcome_advantage=verl_rloo_advantage,
    compute_policy_loss=verl_policy_loss,
    agg_loss=verl_agg_loss,
    kl_penalty=verl_kl_penalty,
)


@pytest.fixture(params=["formulas", "package"])
def verl(request):
    if request.param == "formulas":
        return VERL_FORMULAS
    return pytest.importorskip(
        "verl.trainer.ppo.core_algos",
        reason="verl 0.9.1 and Ray are not installed",
        exc_type=ImportError,
    )


@pytest.mark.parametrize("rewards", [REWARDS, [1.0] * 4 + [0.0, 0.0, 1.0, 0.0]])
def test_verl_advantages(verl, rewards):
    """verl adds 1e-6 to the standard deviation, TRL and we 1e-4: at 0.05, the smallest here that
    is not 0, advantages differ by 1e-4 / 0.05 = 2e-3 of their size."""
    token_rewards = torch.zeros(8, COMPLETION, dtype=torch.float64)
    token_rewards[:, 2] = torch.tensor(rewards, dtype=torch.float64)
    mask = torch.ones(8, COMPLETION, dtype=torch.float64)
    index = np.array([0] * 4 + [1] * 4)

    theirs, _ = verl.compute_rloo_outcome_advantage(token_rewards, mask, index)
    assert advantages(rewards, "rloo") == pytest.approx(theirs[:, 0].tolist(), abs=1e-13)
    theirs, _ = verl.compute_grpo_outcome_advantage(
        token_rewards, mask, index, norm_adv_by_std_in_grpo=False
    )
    assert advantages(rewards, "dr_grpo") == pytest.approx(theirs[:, 0].tolist(), abs=1e-13)
    theirs, _ = verl.compute_grpo_outcome_advantage(token_rewards, mask, index)
    theirs = theirs[:, 0].tolist()
    assert advantages(rewards, "grpo") == pytest.approx(theirs, rel=2.1e-3, abs=1e-12)
    std = np.array(rewards).reshape(2, 4).std(1, ddof=1).repeat(4)
    rescaled = np.array(theirs) * (std + 1e-6) / (std + 1e-4)
    assert advantages(rewards, "grpo") == pytest.approx(rescaled.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    "mode, average, rtol",
    [
        ("token-mean", "token", 1e-13),
        ("seq-mean-token-mean", "sequence", 2e-8),  # verl adds 1e-8 to a length
        ("seq-mean-token-sum-norm", "constant", 1e-13),
    ],
)
def test_verl_policy_loss(verl, mode, average, rtol):
    """Value and gradient, with k3 to the reference, the clip ends apart, and one response empty.
    The dual clip is out of reach, at 100. The constant is verl's default, the padded length."""
    inputs = random_completions()
    inputs["completion_mask"][3] = 0
    mask = inputs["completion_mask"].double()
    g = torch.Generator().manual_seed(6)
    logps = -3 * torch.rand(8, COMPLETION, generator=g, dtype=torch.float64)
    inputs["old_per_token_logps"] = logps + 0.4 * torch.randn(logps.shape, generator=g)
    inputs["ref_per_token_logps"] = logps + 0.4 * torch.randn(logps.shape, generator=g)
    logps.requires_grad_()

    case = GRPOCase(Average("", average), 0.28, 0.05)
    ours, _ = our_grpo_loss(case, logps, inputs)
    policy, *_ = verl.compute_policy_loss(
        inputs["old_per_token_logps"],
        logps,
        inputs["advantages"][:, None].expand(8, COMPLETION),
        mask,
        cliprange=0.2,
        cliprange_high=0.28,
        clip_ratio_c=100.0,
        loss_agg_mode=mode,
    )
    kl = verl.kl_penalty(logps, inputs["ref_per_token_logps"], "k3")
    theirs = policy + 0.05 * verl.agg_loss(kl, mask, mode)
    assert_equal(ours, theirs, rtol=rtol, atol=1e-13)
    (grad,) = torch.autograd.grad(ours, logps)
    (expected,) = torch.autograd.grad(theirs, logps)
    assert_equal(grad, expected, rtol=rtol, atol=1e-13)
    assert (grad[mask == 0] == 0).all()


def test_verl_kl_k3(verl):
    """k3 is below 10 here, where verl clamps it."""
    g = torch.Generator().manual_seed(6)
    logps = -2 * torch.rand(50, generator=g, dtype=torch.float64)
    ref_logps = -2 * torch.rand(50, generator=g, dtype=torch.float64)
    theirs = verl.kl_penalty(logps, ref_logps, "k3")
    assert_equal(kl_k3(logps, ref_logps), theirs, rtol=1e-13, atol=1e-14)


def test_verl_counts_clipped_tokens_otherwise(verl):
    """Our clip_fraction counts every ratio outside the range, as PPO's here. verl's pg_clipfrac,
    as TRL's clip_ratio, leaves out those at which the minimum is the unclipped term."""
    old_logps = torch.zeros(1, 2)
    logps = torch.tensor([[0.5, -0.5]])
    ones = torch.ones(1, 2)  # advantages, so that the low ratio is not clipped; and the mask
    _, metrics = grpo_loss(
        logps[0], old_logps[0], ones[0], torch.zeros(2).long(), torch.tensor([2])
    )
    _, clip_fraction, *_ = verl.compute_policy_loss(
        old_logps,
        logps,
        ones,
        ones,
        0.2,
        cliprange_high=0.2,
        clip_ratio_c=3.0,
        loss_agg_mode="token-mean",
    )
    assert metrics["clip_fraction"] == 1 and clip_fraction == 0.5
