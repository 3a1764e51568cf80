r"""A reward model on ranked answers: K = 3 to 6, ranked by votes or by correctness.

    python -m data.gsm8k.prepare --solutions=all --out=data/gsm8k_solutions
    python -m data.stackexchange.prepare
    python -m data.jsonl.prepare data/gsm8k_solutions/*.jsonl data/stackexchange/ranked/*.jsonl \
        --out=data/ranked
    python train.py config/local/reward.py
    python eval.py rm=out/reward_local --data=data/ranked

One busy CPU core, 4 to 6 minutes with a vocabulary of 4,096 (studies/rlhf).
Starts at ln 2 = 0.6931; ranks 54.9 % of held-out pairs right.
"""

stage = "reward"
out_dir = "out/reward_local"
init = "out/sft_local"
data = "data/ranked"

loss_type = "pairs"  # all pairs of a prompt in one pass; "pl": Plackett-Luce on the same scores
center_coef = 0.01  # keeps the scores near 0
max_prompt = 128
max_response = 96
batch_size = 16  # prompts, 190 steps
epochs = 1.0
optimizer = "adamw"
lr = 3e-4
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 95
eval_rows = 329  # all of them
log_interval = 10
