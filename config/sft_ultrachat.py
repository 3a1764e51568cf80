"""Fine-tune it on instructions, the first turn of UltraChat's conversations.

    torchrun --nproc_per_node=8 train.py config/sft_ultrachat.py

8 x 80 GB GPUs: on paper 50k rows x 3 epochs x up to 1,024 tokens x 8.6e8 FLOPs at 30 % of 8 x 989 TFLOP/s is 1 minute. Not yet run at this size, so no figure
to expect but that its validation loss falls from the base model's in the first epoch.
Data, 50,000 of them by the hash of a prompt (SPIN's own 50,000 are not published as a list):
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
