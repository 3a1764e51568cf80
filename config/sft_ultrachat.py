"""Fine-tune GPT-2 124M on instructions: the first turn of UltraChat's conversations.

    torchrun --nproc_per_node=8 train.py config/sft_ultrachat.py

Not run at this size yet. On paper, on 8 x 80 GB GPUs: 50k rows x 3 epochs x up to 1,024 tokens x
8.6e8 FLOPs at 30 % of 8 x 989 TFLOP/s is 1 minute. The validation loss should fall from that of the
base model in the first epoch.

Data, 50,000 rows chosen by a hash of the prompt (SPIN's own 50,000 are not published as a list):
    python -m data.ultrachat.prepare
"""

stage = "sft"
out_dir = "out/sft_ultrachat"
init = "out/pretrain_gpt2"
data = "data/ultrachat"  # self-play uses the same rows

max_prompt = 512
max_response = 512
batch_size = 128  # rows = 16 x 8 ranks
epochs = 3.0
lr = 5e-5
warmup_ratio = 0.05
schedule = "cosine"
min_lr_ratio = 0.0
eval_interval = 100
eval_rows = 1024
log_interval = 10
