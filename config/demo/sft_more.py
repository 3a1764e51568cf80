"""The control of self-play: SFT continued on the rows of spin_k2, for the steps of both its rounds.

    python train.py config/demo/sft_more.py

2 CPU cores, half a minute; validation loss 4.53 (4.54 before).
"""

stage = "sft"
out_dir = "out/demo/sft_more"
init = "out/demo/sft"
data = "data/pydocs"

max_rows = 1024  # the rows of spin_k2
max_prompt = 64
max_response = 48
batch_size = 32  # rows per step
max_steps = 64  # 2 x 32; the learning rate falls once, where that of self-play falls in each round

optimizer = "adamw"
lr = 1.5e-4
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 16
log_interval = 4
