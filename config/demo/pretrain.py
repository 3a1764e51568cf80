"""Pretrain a 2.6M-parameter student on the documentation of the installed packages.

    python train.py config/demo/pretrain.py

2 CPU cores, 1.5 minutes; validation loss 4.3.
"""

stage = "pretrain"
out_dir = "out/demo/pretrain"
data = "data/pydocs"

n_layer = 4
n_head = 4
n_embd = 192
block_size = 256
position = "rotary"
norm = "rmsnorm"
mlp = "swiglu"
bias = False

batch_size = 16  # x 256 = 4,096 tokens a step
max_steps = 200  # 0.8M tokens of 3.1M
optimizer = "muon"
muon_lr = 0.05
lr = 1e-2
warmup_ratio = 0.05
schedule = "linear"
eval_interval = 50
eval_batches = 10
log_interval = 10
