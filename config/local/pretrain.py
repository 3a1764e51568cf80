r"""Pretrain a model of 1.8M parameters (11.4M with the embeddings of GPT-2's BPE) on local text.

    python -m data.stackexchange.prepare
    python -m data.jsonl.prepare data/stackexchange/threads/*.jsonl --out=data/local \
        --tokenizer=gpt2
    python train.py config/local/pretrain.py

Two CPU cores, 8 minutes (14 on one), validation loss 5.4 on these threads and 42 books.
The first of three stages: then config/local/sft_gsm8k.py and config/local/spin_k3_gsm8k.py.
studies/rlhf runs it with a BPE of 4,096 tokens.
"""

stage = "pretrain"
out_dir = "out/pretrain_local"
data = "data/local"

n_layer = 4
n_head = 4
n_embd = 192
block_size = 320
position = "rotary"
norm = "rmsnorm"
mlp = "swiglu"
bias = False

batch_size = 12  # x 320 = 3,840 tokens per step
max_steps = 300  # 1.2M tokens
optimizer = "muon"
muon_lr = 0.05
lr = 1e-2
warmup_ratio = 0.05
schedule = "linear"
eval_interval = 100
eval_batches = 10
log_interval = 10
