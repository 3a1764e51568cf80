"""Preferred-FT: supervised fine-tuning on the best of the three samples.

    python train.py studies/frontier/config/preferred_ft.py

One CPU core, 20 seconds, validation loss 4.66.
"""

stage = "sft"
out_dir = "out/frontier/preferred_ft"
init = "out/frontier/sft"
data = "out/frontier/ranked"

max_prompt = 48
max_response = 32
batch_size = 32  # rows per step
epochs = 1.0
optimizer = "adamw"
lr = 5e-4
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 1000  # only at the start and the end
log_interval = 20

# SFT does not use these two; they are what the published runs recorded
loss_type = "pairs"
beta = 0.5
