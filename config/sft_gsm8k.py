"""Fine-tune Qwen2.5-0.5B on GSM8K, before config/online_pl.py and config/grpo.py.

    python -m data.gsm8k.prepare
    python -m tools.hf import Qwen/Qwen2.5-0.5B --out=out/qwen2.5-0.5b --block_size=1024
    torchrun --nproc_per_node=8 train.py config/sft_gsm8k.py

Not run at this size yet. On paper, on 8 x 80 GB GPUs: 7,473 rows of 250 tokens x 3 epochs are 5.6M
tokens, 1.7e16 FLOPs at 6 x 0.5B a token: seconds of computing, a minute with everything around it.
The validation loss of the first step is that of the base model.
"""

stage = "sft"
out_dir = "out/sft_gsm8k_qwen"
init = "out/qwen2.5-0.5b"
data = "data/gsm8k"

max_prompt = 256
max_response = 320
batch_size = 64  # rows a step: 117 steps an epoch
epochs = 3.0
optimizer = "adamw"
lr = 1e-5
warmup_ratio = 0.05
schedule = "cosine"
eval_interval = 50
log_interval = 10
