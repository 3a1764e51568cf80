"""A model of 1.8M parameters (11.4M with its embeddings) in GPT-2's BPE on local text, for the chain to spin_k3_gsm8k on a CPU.

python -m data.jsonl.prepare ../shared/data/pretrain.jsonl.gz --out=data/local --tokenizer=gpt2
python train.py config/local/pretrain.py         2 CPU cores, 8 minutes (14 on one), validation loss 5.4
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

batch_size = 12  # x 320 = 3,840 tokens a step
max_steps = 300  # 1.2M tokens
optimizer = "muon"
muon_lr = 0.05
lr = 1e-2
warmup_ratio = 0.05
schedule = "linear"
eval_interval = 100
eval_batches = 10
log_interval = 10
