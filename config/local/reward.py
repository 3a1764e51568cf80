"""A reward model on ranked answers, people's by votes and models' by correctness, K = 3 to 6: all pairs of a prompt in one pass.

python -m data.jsonl.prepare ../shared/data/ranked.jsonl.gz --out=data/ranked
python train.py config/local/reward.py         one busy CPU core, 13 minutes with a vocabulary of 4,096 (`make rlhf`); starts at ln 2 = 0.6931
python eval.py rm=out/reward_local --data=data/ranked
"""

stage = "reward"
out_dir = "out/reward_local"
init = "out/sft_local"
data = "data/ranked"

loss_type = "pairs"  # "pl": Plackett-Luce on the same scores
center_coef = 0.01  # scores about 0
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
