"""Self-play distillation on ranked rows, two rounds.

The ranking is: a person's solution > a 175B model's > the policy's own sample.

    python -m data.gsm8k.prepare --solutions=175b_verification --out=data/gsm8k_ranked
    python train.py config/local/spin_k3_gsm8k.py

Two CPU cores, 10 minutes. Each round starts at ln 6 = 1.7918 plus nll_coef times the SFT loss.
The prompts are GSM8K's test split: report results on the held-out rows of data/gsm8k_ranked, never
as GSM8K scores.
"""

stage = "spin"
out_dir = "out/spin_k3_gsm8k"
init = "out/sft_gsm8k"
data = "data/gsm8k_ranked"

players = ["data", "teacher", "self"]
teacher = "rows"  # the second response of each row
rounds = 2
max_rows = 512
max_prompt = 160
max_response = 160

batch_size = 32  # prompts, 16 steps per round
epochs = 1.0
beta = 0.1
nll_coef = 0.2
optimizer = "adamw"
lr = 2e-4
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 8
eval_rows = 96
