"""Shakespeare in characters, to nanoGPT's validation loss in a third of the time.

    python -m data.shakespeare.prepare tinyshakespeare.txt
    OMP_NUM_THREADS=1 python train.py config/shakespeare.py

75 to 84 seconds on one core of a shared Xeon; validation loss 1.85 to 1.88. Against nanoGPT's
recipe: a tenth of the steps, twice the batch, Muon, rotary positions, QK-norm.
"""

from config.shakespeare_nanogpt import *

out_dir = "out/shakespeare"
position = "rotary"
qk_norm = True
mlp = "relu2"

batch_size = 24
max_steps = 200
optimizer = "muon"
muon_lr = 0.03
lr = 1e-2
schedule = "linear"
warmup_ratio = 0.0
min_lr_ratio = 0.05
weight_decay = 0.0
adam_betas = [0.9, 0.95]
eval_interval = 200
log_interval = 20
