"""What bench.py compares with: nanoGPT's model and step in plain PyTorch, transformers and TRL.

Also the inputs that both sides get, and the count of the work that they need.
"""

import csv
import functools
import math
import os
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.batch import batch_rows
from loss import preference_loss
from train import backward

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LENGTHS = os.path.join(ROOT, "bench", "lengths.csv")

SHAPE = {  # of GPT-2's block
    "vocab_size": 8192,
    "block_size": 1024,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 256,
}


# -------------------------------------------------------------------------------------- the inputs


def random_windows():
    """(idx, targets) of a pretraining step, each (8, 256)."""
    return torch.randint(1, 8192, (8, 256)), torch.randint(1, 8192, (8, 256))


def random_row(rng, prompt_length, response_lengths, vocab_size=SHAPE["vocab_size"]):
    """An encoded row of random tokens. Lengths of responses include end-of-text, token 0."""
    prompt = rng.integers(1, vocab_size, prompt_length).tolist()
    responses = []
    for length in response_lengths:
        tokens = rng.integers(1, vocab_size, length).tolist()
        responses.append(tokens[:-1] + [0])
    return {"prompt": prompt, "responses": responses, "ranks": list(range(len(responses)))}


def uniform_logps(lengths, vocab_size=SHAPE["vocab_size"]):
    """Log-probabilities of responses under a uniform model, for the reference of a new model.

    With a reference of 0 the implicit rewards of responses of other lengths would differ by up to
    200 nats, and many gradients would be denormal numbers, which slow a CPU's matmuls down up to
    150 times. No training starts like that.
    """
    return -math.log(vocab_size) * lengths


def real_lengths(workload):
    """[(prompt length, response lengths)] in tokens of a workload of lengths.csv, best first.

    They are of real ranked rows; the file says which.
    """
    lengths = []
    with open(LENGTHS, encoding="utf-8") as f:
        lines = (line for line in f if not line.startswith("#"))
        for row in csv.DictReader(lines):
            if row["workload"] == workload:
                responses = [int(length) for length in row["responses"].split()]
                lengths.append((int(row["prompt"]), responses))
    return lengths


@dataclass(frozen=True)
class OnlineSize:
    """Of an online round: K samples of the policy to each prompt."""

    lengths: list  # (prompt length, lengths of its K samples) of each prompt
    K: int
    shape: dict  # of the model
    name: str  # in the tables

    def rows(self):
        """Encoded rows with random tokens in place of the samples."""
        rng = np.random.default_rng(0)
        rows = []
        for prompt_length, response_lengths in self.lengths:
            row = random_row(rng, prompt_length, response_lengths, self.shape["vocab_size"])
            rows.append(row)
        return rows

    def limits(self):
        """Tokens of every sample, those of a prompt after each other."""
        limits = []
        for _, response_lengths in self.lengths:
            limits += response_lengths
        return limits


def equal_size(num_prompts, prompt_length, response_length, K, shape=SHAPE):
    """All prompts have one length, all samples another."""
    lengths = [(prompt_length, [response_length] * K)] * num_prompts
    name = f"K={K}, prompt:response {prompt_length}:{response_length}"
    return OnlineSize(lengths, K, shape, name)


def ragged_size():
    """8 prompts with K = 8 samples each, with lengths drawn from those of real rows."""
    return OnlineSize(real_lengths("groups"), 8, SHAPE, "8 ragged prompts, K=8")


def number_reward(text):
    """The reward of the online rounds: the mean of the numbers in a text."""
    numbers = [int(word) for word in text.split() if word.isdigit()]
    return sum(numbers) / max(1, len(numbers))


def ragged_rows(n, K=3):
    """n encoded rows of K responses, with the lengths of real rows. n <= 64, K <= 3."""
    rng = np.random.default_rng(0)
    chosen = real_lengths("rows")[:n]
    assert len(chosen) == n, f"{LENGTHS} has {len(chosen)} rows"
    return [random_row(rng, prompt, responses[:K]) for prompt, responses in chosen]


@dataclass(frozen=True)
class Request:
    """A prompt to sample from."""

    prompt_length: int
    new_tokens: int


def sampling_requests():
    """{name: [Request]}: equal lengths, and those of real rows."""
    ragged = []
    for prompt_length, response_lengths in real_lengths("requests"):
        ragged.append(Request(min(prompt_length, 256), min(response_lengths[0], 256)))
    return {"32 x 128 new tokens": [Request(64, 128)] * 32, "128 ragged requests": ragged}


def random_prompts(requests):
    rng = np.random.default_rng(0)
    return [rng.integers(1, 8192, request.prompt_length).tolist() for request in requests]


# ------------------------------------------------------------------------------ the work they need


@dataclass(frozen=True)
class Work:
    """What a forward pass cannot avoid.

    Output positions are those that predict something. Of all other positions the last block
    needs no more than keys and values.
    """

    tokens: int  # that enter the model, each prompt once
    pairs: float  # (query, key) of all tokens, under the causal mask
    outputs: int  # output positions
    output_pairs: float  # (query, key) of the output positions
    targets: int  # the last token of a prompt has one target for each response


def work_of_windows(idx):
    """Work of pretraining windows (B, T): every position has a target."""
    pairs = idx.numel() * (idx.shape[1] + 1) / 2
    return Work(
        tokens=idx.numel(),
        pairs=pairs,
        outputs=idx.numel(),
        output_pairs=pairs,
        targets=idx.numel(),
    )


def work_of_rows(rows):
    """Work of encoded rows, if the responses of a row share its prompt."""
    tokens = pairs = outputs = output_pairs = targets = 0
    for row in rows:
        P = len(row["prompt"])
        lengths = [len(response) for response in row["responses"]]
        inputs = sum(n - 1 for n in lengths)  # the last token of a response is only a target
        response_pairs = sum((n - 1) * P + n * (n - 1) / 2 for n in lengths)
        tokens += P + inputs
        pairs += P * (P + 1) / 2 + response_pairs
        outputs += 1 + inputs
        output_pairs += P + response_pairs
        targets += sum(lengths)
    return Work(tokens, pairs, outputs, output_pairs, targets)


def work_of_requests(requests):
    """Work of sampling with a key-value cache."""
    tokens = pairs = new_tokens = output_pairs = 0
    for request in requests:
        P = request.prompt_length
        R = request.new_tokens
        tokens += P + R
        pairs += (P + R) ** 2 / 2
        new_tokens += R
        output_pairs += R * (P + R / 2)
    return Work(tokens, pairs, new_tokens, output_pairs, new_tokens)


# --------------------------------------------------------------------------------- in plain PyTorch


class PlainBlock(nn.Module):
    def __init__(self, n_head, n_embd, bias=True):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.out = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """nanoGPT's model: rectangular batches, fused attention, the logits of every position."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, bias=True):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(PlainBlock(n_head, n_embd, bias) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0.0, 0.02)

    def forward(self, idx):
        """(B, T) -> logits (B, T, V)."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def update(model, losses, optimizers=()):
    """The backward pass of each loss, one after the other, then a step of the optimizers.

    losses: an iterable; each loss is computed when it is its turn.
    """
    for loss in losses:
        backward(loss)
    if optimizers:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def plain_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def plain_step(model, optimizer, loss_function, dtype):
    """A training step as nanoGPT takes it. loss_function(model) -> loss ()."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_function(model)
    update(model, [loss], [optimizer])


def plain_logprobs(model, idx, targets):
    """Log-probability of each target (B, T), 0 where it is -1, by a softmax of all logits."""
    logps = torch.log_softmax(model(idx).float(), -1)
    of_targets = logps.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return of_targets.masked_fill(targets < 0, 0.0)


def padded_scores(model, idx, targets):
    """Log-probability of each padded response (N, T) -> (N,)."""
    return plain_logprobs(model, idx, targets).sum(1)


def padded_step(model, rows, dtype):
    """-> function: a preference step in one padded forward pass over all responses."""
    batch = batch_rows(rows, "padded")
    optimizer = plain_optimizer(model)

    ref = uniform_logps(batch.lengths)

    def loss_function(model):
        scores = padded_scores(model, batch.idx, batch.targets).view(len(rows), -1)
        return preference_loss(scores, ref)[0]

    return functools.partial(plain_step, model, optimizer, loss_function, dtype)


# --------------------------------------------------------------------------- transformers and TRL


def transformers_model(shape=None):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = shape or SHAPE
    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["block_size"],
        n_embd=shape["n_embd"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def number_tokenizer(vocab_size=SHAPE["vocab_size"]):
    """A tokenizer whose text for token i is " i", so that TRL sees the same ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>": 0}
    for i in range(1, vocab_size):
        vocab[str(i)] = i
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def number_text(ids):
    return "".join(f" {i}" if i else " <eos>" for i in ids)


def trl_trainer(rows):
    """TRL's DPOTrainer on encoded rows of two responses, and their batch as trainer.batch.

    The reference log-probabilities are computed beforehand, as nanoSPIN does.
    """
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    texts = []
    for row in rows:
        texts.append(
            {
                "prompt": number_text(row["prompt"]),
                "chosen": number_text(row["responses"][0]),
                "rejected": number_text(row["responses"][1]),
            }
        )
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(rows),
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=1024,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        transformers_model(),
        args=args,
        train_dataset=Dataset.from_list(texts),
        processing_class=number_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1  # as its own loop sets it
    trainer.batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    num_targets = 0
    for row in rows:
        num_targets += sum(len(response) for response in row["responses"])
    assert trainer.batch["completion_mask"].sum() == num_targets
    return trainer


def trl_step(trainer):
    """-> function: one training step of the trainer on its batch."""
    optimizer = plain_optimizer(trainer.model)

    def step():
        trainer.training_step(trainer.model, dict(trainer.batch))
        update(trainer.model, [], [optimizer])

    return step


def transformers_generate(model, prompts, limits, batch_size=32):
    """Sample with transformers' generate, in left-padded batches of prompts of similar length.

    A batch runs until its longest response has ended. limits: new tokens of each prompt.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in batch)
        new_tokens = max(limits[i] for i in batch)
        padded = [[0] * (width - len(prompts[i])) + prompts[i] for i in batch]
        idx = torch.tensor(padded, device=model.device)
        model.generate(
            idx,
            attention_mask=(idx > 0).long(),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )


GRPO_KL_COEF = 0.04  # weight of k3 to the reference, on both sides
TRL_BATCH = 8  # TRL's default micro-batch: completions (GRPO) or prompts (online DPO)


def trl_online_trainer(name, size, batch=TRL_BATCH, gradient_checkpointing=False):
    """TRL's "GRPO" or "OnlineDPO" trainer for an `OnlineSize`, with its own sampling and reference.

    The responses have the lengths of the size, for OnlineDPO all the longest one. batch:
    completions (GRPO) or prompts (OnlineDPO) of a micro-batch. Gradient checkpointing is TRL's
    default; it saves memory and takes a third more time in training.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    texts = [number_text(row["prompt"]) for row in size.rows()]
    data = Dataset.from_list([{"prompt": text} for text in texts])
    folder = tempfile.mkdtemp()
    transformers_model(size.shape).save_pretrained(folder)  # from where TRL takes the reference
    longest = max(size.limits())
    options = {
        "output_dir": folder,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": gradient_checkpointing,
    }

    def reward(prompts, completions, **kwargs):
        return [number_reward(text) for text in completions]

    if name == "GRPO":
        from trl import GRPOConfig as Settings
        from trl import GRPOTrainer as Trainer

        num_micro_batches = len(size.limits()) // batch
        options |= {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": num_micro_batches,
            "num_generations": size.K,
            "max_completion_length": longest,
            "beta": GRPO_KL_COEF,
        }
    else:
        from trl.experimental.online_dpo import OnlineDPOConfig as Settings
        from trl.experimental.online_dpo import OnlineDPOTrainer as Trainer

        assert size.K == 2  # all that TRL's trainer can do
        num_micro_batches = len(size.lengths) // batch
        options |= {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": num_micro_batches,
            "max_new_tokens": longest,
            "max_length": max(prompt_length for prompt_length, _ in size.lengths) + longest,
            "generation_kwargs": {"min_new_tokens": longest},
        }
    trainer = Trainer(
        folder,
        reward_funcs=reward,
        args=Settings(**options),
        train_dataset=data,
        processing_class=number_tokenizer(size.shape["vocab_size"]),
    )
    assert trainer.model.dtype == torch.float32
    trainer.current_gradient_accumulation_steps = num_micro_batches  # as its own loop sets it
    if name == "GRPO":
        trainer.model.generate = functools.partial(
            generate_to_limits,
            trainer.model.generate,
            torch.tensor(size.limits()),
            trainer.processing_class.eos_token_id,
        )
    return trainer


def generate_to_limits(generate, limits, end, input_ids, **options):
    """transformers' `generate`, but sequence i ends with its limits[i]-th new token, `end`, and not
    before."""

    def end_at_limits(idx, logits):
        num_new = idx.shape[1] - input_ids.shape[1]
        logits[:, end] = -torch.inf
        ends = limits == num_new + 1
        logits[ends] = -torch.inf
        logits[ends, end] = 0.0
        return logits

    return generate(input_ids=input_ids, logits_processor=[end_at_limits], **options)


def trl_online_round(name, size, **options):
    """-> function: a round of TRL's trainer: sample, score, reference, one optimizer step."""
    trainer = trl_online_trainer(name, size, **options)
    optimizer = plain_optimizer(trainer.model)
    texts = [number_text(row["prompt"]) for row in size.rows()]
    num_micro_batches = trainer.current_gradient_accumulation_steps
    if name == "GRPO":  # it samples for all micro-batches at once
        repeated = []
        for text in texts:
            repeated += [{"prompt": text}] * size.K
        micro_batches = [repeated] * num_micro_batches
    else:
        n = len(texts) // num_micro_batches
        micro_batches = [{"prompt": texts[i * n : (i + 1) * n]} for i in range(num_micro_batches)]

    def play():
        for micro_batch in micro_batches:
            trainer.training_step(trainer.model, micro_batch, None)
        update(trainer.model, [], [optimizer])

    return play


def trl_grpo_batches(rows, batch=TRL_BATCH):
    """Encoded rows with scored samples -> micro-batches as GRPOTrainer's loss takes them.

    A row has "advantages" and "refs", (tokens,) of its responses after each other.
    """
    sequences = []  # (prompt, response, its advantage, its reference log-probabilities)
    for row in rows:
        start = 0
        for response in row["responses"]:
            part = slice(start, start + len(response))
            start += len(response)
            sequences.append((row["prompt"], response, row["advantages"][part], row["refs"][part]))
    P = max(len(prompt) for prompt, _, _, _ in sequences)
    R = max(len(response) for _, response, _, _ in sequences)
    n = len(sequences)
    tensors = {
        "prompt_ids": torch.zeros(n, P, dtype=torch.long),
        "prompt_mask": torch.zeros(n, P, dtype=torch.long),
        "completion_ids": torch.zeros(n, R, dtype=torch.long),
        "completion_mask": torch.zeros(n, R, dtype=torch.long),
        "ref_per_token_logps": torch.zeros(n, R),
        "advantages": torch.zeros(n),
    }
    for i, (prompt, response, advantages, refs) in enumerate(sequences):
        length = len(response)
        tensors["prompt_ids"][i, P - len(prompt) :] = torch.tensor(prompt)
        tensors["prompt_mask"][i, P - len(prompt) :] = 1
        tensors["completion_ids"][i, :length] = torch.tensor(response)
        tensors["completion_mask"][i, :length] = 1
        tensors["ref_per_token_logps"][i, :length] = torch.as_tensor(refs)
        tensors["advantages"][i] = float(advantages[0])
    num_tokens = tensors["completion_mask"].sum()
    batches = []
    for start in range(0, n, batch):
        part = {name: tensor[start : start + batch] for name, tensor in tensors.items()}
        batches.append(part | {"num_items_in_batch": num_tokens})
    return batches


def trl_grpo_step(rows, size, **options):
    """-> function: an optimizer step of GRPOTrainer on rows of `trl_grpo_batches`."""
    trainer = trl_online_trainer("GRPO", size, **options)
    trainer.model.train()
    optimizer = plain_optimizer(trainer.model)
    batches = trl_grpo_batches(rows, options.get("batch", TRL_BATCH))

    def step():
        losses = (trainer.compute_loss(trainer.model, batch) for batch in batches)
        update(trainer.model, losses, [optimizer])

    return step


def trl_sampling_parts(size, rows):
    """-> two functions: GRPOTrainer's sampling with the rewards, and its reference's
    log-probabilities of encoded rows."""
    trainer = trl_online_trainer("GRPO", size)
    inputs = []
    for row in rows:
        inputs += [{"prompt": number_text(row["prompt"])}] * size.K
    prompts = [one["prompt"] for one in inputs]
    batches = trl_grpo_batches(rows)

    def sample():
        trainer.model.train()
        _, completion_ids, _, completions, *_ = trainer._generate(prompts)
        trainer._calculate_rewards(inputs, prompts, completions, completion_ids)

    @torch.no_grad()
    def reference():
        for batch in batches:
            trainer._get_per_token_logps_and_entropies(
                trainer.ref_model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
                batch["completion_ids"].shape[1],
            )

    return sample, reference
