"""What bench.py times against, nanoGPT's model and step in plain PyTorch, and transformers' and TRL's own code; and the work that
both sides are given."""

import gzip
import json
import os
import tempfile
import typing

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.batch import batch_rows
from loss import preference_loss
from train import backward

SHAPE = dict(vocab_size=8192, block_size=1024, n_layer=4, n_head=4, n_embd=256)  # GPT-2's block
ROWS = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "..", "shared", "data", "ranked.jsonl.gz"
)


# --------------------------------------------------------------------------------------------------------------- the work


def windows():
    """(idx, targets) of a pretraining step."""
    return torch.randint(1, 8192, (8, 256)), torch.randint(1, 8192, (8, 256))


def random_row(rng, prompt, responses, vocab_size=SHAPE["vocab_size"]):
    ids = [rng.integers(1, vocab_size, n).tolist() for n in (prompt, *responses)]
    return {
        "prompt": ids[0],
        "responses": [y[:-1] + [0] for y in ids[1:]],
        "ranks": list(range(len(responses))),
    }


def real_lengths():
    """[(prompt, responses)] in tokens, of the ranked rows with at least three responses; without them a like distribution."""
    if os.path.exists(ROWS):
        with gzip.open(ROWS, "rt", encoding="utf-8") as f:
            rows = [json.loads(text) for text in f]
        # four characters a token, the usual figure for English
        return [
            (
                max(1, len(r["prompt"]) // 4),
                [max(1, len(y["text"]) // 4) for y in r["responses"][:3]],
            )
            for r in rows
        ]
    rng = np.random.default_rng(0)
    return [
        (
            int(np.clip(rng.lognormal(4.4, 0.6), 8, 350)),
            np.clip(rng.lognormal(4.6, 0.7, 3), 8, 400).astype(int).tolist(),
        )
        for _ in range(2000)
    ]


def ragged_rows(n, K=3):
    rng = np.random.default_rng(0)
    fitting = [(P, lengths) for P, lengths in real_lengths() if P + max(lengths) < 1000]
    return [
        random_row(rng, P, lengths[:K])
        for P, lengths in (fitting[i] for i in rng.permutation(len(fitting))[:n])
    ]


def requests():
    """{what: [(prompt's length, new tokens)]}"""
    return {
        "32 x 128 new tokens": [(64, 128)] * 32,
        "128 ragged requests": [
            (min(P, 256), min(lengths[0], 256)) for P, lengths in real_lengths()[:128]
        ],
    }


def prompts_of(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(1, 8192, P).tolist() for P, _ in lengths]


class Work(typing.NamedTuple):
    tokens: int  # read
    pairs: float  # of tokens that see each other
    places: (
        int  # whose output is asked for: of the others the last block needs keys and values alone
    )
    place_pairs: float  # of such a place and what it sees
    asked: int  # targets: a prompt's last place has one for each response


def work_of_windows(idx):
    n, pairs = idx.numel(), idx.numel() * (idx.shape[1] + 1) / 2
    return Work(n, pairs, n, pairs, n)


def work_of(rows):
    """Work of rows with shared prompts."""
    tokens = pairs = places = place_pairs = asked = 0
    for row in rows:
        P, lengths = len(row["prompt"]), [len(y) for y in row["responses"]]
        answers = sum((n - 1) * P + n * (n - 1) / 2 for n in lengths)
        tokens, pairs = tokens + P + sum(lengths) - len(lengths), pairs + P * (P + 1) / 2 + answers
        places, place_pairs, asked = (
            places + 1 + sum(lengths) - len(lengths),
            place_pairs + P + answers,
            asked + sum(lengths),
        )
    return Work(tokens, pairs, places, place_pairs, asked)


def work_of_requests(lengths):
    new = sum(R for _, R in lengths)
    return Work(
        sum(P + R for P, R in lengths),
        sum((P + R) ** 2 / 2 for P, R in lengths),
        new,
        sum(R * (P + R / 2) for P, R in lengths),
        new,
    )


# ------------------------------------------------------------------------------------------------- the plain way to do it


class Plain(nn.Module):
    """nanoGPT's model in plain PyTorch: rectangular batches, fused attention, the logits of every position."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd):
        super().__init__()
        self.n_head = n_head
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    ln_1=nn.LayerNorm(n_embd),
                    c_attn=nn.Linear(n_embd, 3 * n_embd),
                    c_proj=nn.Linear(n_embd, n_embd),
                    ln_2=nn.LayerNorm(n_embd),
                    c_fc=nn.Linear(n_embd, 4 * n_embd),
                    out=nn.Linear(4 * n_embd, n_embd),
                )
            )
            for _ in range(n_layer)
        )
        self.ln_f = nn.LayerNorm(n_embd)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0.0, 0.02)

    def forward(self, idx):
        B, T = idx.shape
        x = self.wte(idx) + self.wpe(torch.arange(T))
        for block in self.h:
            q, k, v = (
                block["c_attn"](block["ln_1"](x))
                .view(B, T, 3, self.n_head, -1)
                .permute(2, 0, 3, 1, 4)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["c_proj"](y.transpose(1, 2).reshape(B, T, -1))
            x = x + block["out"](F.gelu(block["c_fc"](block["ln_2"](x)), approximate="tanh"))
        return self.ln_f(x) @ self.wte.weight.T


def update(model, losses, optimizers=()):
    """The backward pass of each loss, one after the other, and a step of the optimizers."""
    for loss in losses:
        backward(loss)
    if optimizers:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def plain_step(model, optimizer, loss, dtype):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = loss(model)
    update(model, [value], [optimizer])


def plain_logps(model, idx, targets):
    logps = torch.log_softmax(model(idx).float(), -1)
    return (
        logps.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1).masked_fill(targets < 0, 0.0)
    )


def plain_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def padded_step(plain, rows, dtype):
    whole, optimizer = batch_rows(rows, "padded"), plain_optimizer(plain)

    def together(model):
        scores = plain_logps(model, whole["idx"], whole["targets"]).sum(1).view(len(rows), -1)
        return preference_loss(scores, torch.zeros_like(scores))[0]

    return lambda: plain_step(plain, optimizer, together, dtype)


# ----------------------------------------------------------------------------------------------- the peers' own packages


def transformers_model(**shape):
    from transformers import GPT2Config, GPT2LMHeadModel

    s = SHAPE | shape
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=s["vocab_size"],
            n_positions=s["block_size"],
            n_embd=s["n_embd"],
            n_layer=s["n_layer"],
            n_head=s["n_head"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def trl_trainer(rows):
    """TRL's DPOTrainer over these rows with kept reference log-probabilities, and its batch of them."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    tokenizer = Tokenizer(
        models.WordLevel(
            {"<eos>": 0} | {str(i): i for i in range(1, SHAPE["vocab_size"])}, unk_token="<eos>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    )

    def text(ids):
        return "".join(f" {i}" if i else " <eos>" for i in ids)

    data = Dataset.from_list(
        [
            {
                "prompt": text(r["prompt"]),
                "chosen": text(r["responses"][0]),
                "rejected": text(r["responses"][1]),
            }
            for r in rows
        ]
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
        transformers_model(), args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = 1  # as its own loop sets it
    trainer.batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    assert trainer.batch["completion_mask"].sum() == sum(
        len(y) for r in rows for y in r["responses"]
    )
    return trainer


def trl_step(trainer):
    optimizer = plain_optimizer(trainer.model)

    def step():
        trainer.training_step(trainer.model, dict(trainer.batch))
        update(trainer.model, [], [optimizer])

    return step


def hf_generate(hf, prompts, limits, batch_size=32):
    """By batches of like prompts, left-padded, each until its longest response has ended, as its `generate` goes on."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        width, new = max(len(prompts[i]) for i in rows), max(limits[i] for i in rows)
        idx = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in rows])
        hf.generate(
            idx,
            attention_mask=(idx > 0).long(),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
