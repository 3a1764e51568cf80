"""The reference model: what does `name(signature)` do? -> the docstring's summary.

    python train.py studies/frontier/config/sft.py

Two CPU cores, 2 minutes, validation loss 4.46.
"""

stage = "sft"
out_dir = "out/frontier/sft"
init = "out/frontier/pretrain"
data = "data/pydocs"

max_prompt = 48
max_response = 32
batch_size = 64  # rows per step
max_steps = 150
optimizer = "muon"
muon_lr = 0.02
lr = 3e-3
warmup_ratio = 0.05
schedule = "linear"
eval_interval = 50
log_interval = 10
