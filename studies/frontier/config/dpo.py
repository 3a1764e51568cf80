"""DPO on all pairs of the rows that the reward model is fitted to.

    python train.py studies/frontier/config/dpo.py

One CPU core, 50 seconds. Starts at ln 2 = 0.6931.
Plackett-Luce on the three responses: --loss_type=pl.
SimPO: --loss_type=simpo --beta=2 --margin=0.5.
"""

stage = "preference"
out_dir = "out/frontier/dpo"
init = "out/frontier/sft"
data = "out/frontier/ranked"

loss_type = "pairs"
beta = 0.5
max_prompt = 48
max_response = 32
batch_size = 32  # prompts of three responses
epochs = 1.0
optimizer = "adamw"
lr = 5e-4
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 1000  # only at the start and the end
log_interval = 20
