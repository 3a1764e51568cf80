"""Fine-tune the student: "What does `name(signature)` do?" -> the summary of its docstring.

    python train.py config/demo/sft.py

2 CPU cores, 1 minute; validation loss 4.5.
"""

stage = "sft"
out_dir = "out/demo/sft"
init = "out/demo/pretrain"
data = "data/pydocs"

max_prompt = 64
max_response = 48
batch_size = 64  # rows a step
max_steps = 100  # 6,400 rows of 15,500
optimizer = "muon"
muon_lr = 0.02
lr = 3e-3
warmup_ratio = 0.05
schedule = "linear"
eval_interval = 50
log_interval = 10
