"""The reward model: Bradley-Terry on three samples of the reference, ranked by the true reward.

    python train.py studies/frontier/config/reward.py

One CPU core, 70 seconds. Starts at ln 2 = 0.6931.
Its data, out/frontier/ranked, are made by `python -m studies.frontier.frontier`.
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
eval_interval = 1000  # only at the start and the end
log_interval = 20
