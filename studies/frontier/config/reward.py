"""The frontier's learnt reward: Bradley-Terry on three samples of the reference a prompt, ranked by the true one.

python train.py studies/frontier/config/reward.py         70 s on a core; starts at ln 2 = 0.6931, 72 % of held-out pairs. frontier.py makes its data
"""

stage = "reward"
out_dir = "out/frontier/reward"
init = "out/frontier/sft"
data = "out/frontier/ranked"

loss_type = "pairs"
max_prompt = 48
max_response = 32
batch_size = 32  # prompts of three responses
epochs = 2.0
optimizer = "adamw"
lr = 1e-3
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 1000
log_interval = 20
