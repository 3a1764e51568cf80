"""Preferred-FT: supervised fine-tuning on the best response of each ranked row.

The DPO paper (arXiv 2305.18290, section 6) uses it as the reference where there is no SFT model:
then train config/local/dpo.py with --init=out/preferred_ft_local.

    python train.py config/local/preferred_ft.py     # data: config/local/reward.py

One busy CPU core, 2 to 5 minutes with a vocabulary of 4,096 (studies/rlhf), validation loss 4.59.
"""

stage = "sft"
out_dir = "out/preferred_ft_local"
init = "out/pretrain_local"
data = "data/ranked"

max_prompt = 128
max_response = 96
batch_size = 32  # rows, 95 steps
epochs = 1.0
optimizer = "adamw"
lr = 1e-3
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 95
eval_rows = 329  # all of them
log_interval = 10
