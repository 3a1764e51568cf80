"""DPO on the rows that config/local/reward.py learns from: every pair of a prompt.

    python train.py config/local/dpo.py     # data: config/local/reward.py

One CPU core, 2:20 minutes of CPU time with a vocabulary of 4,096 (studies/rlhf).
Starts at ln 2 = 0.6931; ranks 56.2 % of held-out pairs right.

Other objectives:
    --loss_type=pl                        Plackett-Luce on the whole ranking
    --loss_type=ipo --beta=0.05
    --loss_type=simpo --beta=2 --margin=0.5 --lr=5e-5
    --loss_type=orpo --beta=0.5 --nll_coef=1
"""

stage = "preference"
out_dir = "out/dpo_local"
init = "out/sft_local"
data = "data/ranked"

loss_type = "pairs"
beta = 0.1
max_prompt = 128
max_response = 96
max_rows = 768  # of 3,038 prompts
batch_size = 16  # prompts, 48 steps
epochs = 1.0
optimizer = "adamw"
lr = 3e-4
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 95  # only at the start and the end
eval_rows = 329  # all of them
log_interval = 10
