"""SPIN with K = 2: the data's command above the model's own, one round over the same rows.

    python train.py studies/smollm2/config/spin.py

One core of a shared Xeon, 8 minutes. It starts at ln 2 = 0.6931 plus the next-token loss.
"""

from studies.smollm2.config.sft import *

stage = "spin"
out_dir = "out/commands/spin"
init = "out/commands/sft"
lr = 5e-5

players = ["data", "self"]
rounds = 1
beta = 0.1
nll_coef = 1.0
gen_batch_size = 64
