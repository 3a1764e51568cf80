"""GPT-2 124M from scratch on 10B tokens.

    torchrun --nproc_per_node=8 train.py config/pretrain_gpt2.py

Not run at this size yet. On paper, on 8 x 80 GB GPUs: 8.6e8 FLOPs per token x 1e10 tokens at 40 %
of 8 x 989 TFLOP/s is 45 minutes. llm.c reaches validation loss 3.28 with this model on 10B tokens
of FineWeb; FineWeb-Edu has another loss.

Data, a stream in GPT-2's BPE (20 GB; data/fineweb/prepare.py also takes FineWeb and OpenWebText):
    python -m data.fineweb.prepare
or any JSON lines of {"text"}, with --data=data/pretrain:
    python -m data.jsonl.prepare FILE.jsonl.gz --out=data/pretrain --tokenizer=gpt2
"""

stage = "pretrain"
out_dir = "out/pretrain_gpt2"
data = "data/fineweb"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = 512  # x 1,024 = 524,288 tokens a step: 8 ranks x 2 micro-batches of 32,768
max_steps = 19_073  # 10B tokens
optimizer = "adamw"
lr = 6e-4
warmup_ratio = 0.035  # 667 steps; GPT-3 takes 375M tokens, 715 of these steps
schedule = "cosine"
min_lr_ratio = 0.0
weight_decay = 0.1
compile = True
eval_interval = 250  # on 20 x 512 x 1,024 = 10M tokens
save_interval = 1000
log_interval = 10
