"""nanoGPT's recipe for a CPU: characters of Shakespeare, 0.8M parameters, 2,000 steps of 12 x 64.

    python -m data.shakespeare.prepare tinyshakespeare.txt
    OMP_NUM_THREADS=1 python train.py config/shakespeare_nanogpt.py

4 to 6 minutes on one core of a shared Xeon; validation loss 1.88 to 1.90.
"""

stage = "pretrain"
out_dir = "out/shakespeare_nanogpt"
data = "data/shakespeare"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

batch_size = 12
max_steps = 2000
lr = 1e-3
warmup_ratio = 0.05
weight_decay = 0.1
adam_betas = [0.9, 0.99]
eval_interval = 500
eval_batches = 200
save_interval = 1000
log_interval = 100
