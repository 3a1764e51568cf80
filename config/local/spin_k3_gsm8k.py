"""Self-play distillation on ranked rows: a person's solution > a 175B model's > the policy's own, two rounds.

    python -m data.jsonl.prepare ../shared/data/ranked.jsonl.gz --out=data/gsm8k --where=source=gsm8k --authors=human,175b_verification
    python train.py config/local/spin_k3_gsm8k.py         2 CPU cores, 10 minutes; each round starts at ln 6 = 1.7918 + nll_coef x loss

The prompts are GSM8K's test split: report the held-out rows of data/gsm8k, never GSM8K.
"""

stage = "spin"
out_dir = "out/spin_k3_gsm8k"
init = "out/sft_gsm8k"
data = "data/gsm8k"

players = ["data", "teacher", "self"]
teacher = "rows"  # each row's second response
rounds = 2
max_rows = 512
max_prompt = 160
max_response = 160

batch_size = 32  # prompts, 16 steps a round
epochs = 1.0
beta = 0.1
nll_coef = 0.2
optimizer = "adamw"
lr = 2e-4
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 8
eval_rows = 96
