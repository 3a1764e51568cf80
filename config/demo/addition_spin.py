"""SPIN on sums: the data's answer above the model's own sample.

    python train.py config/demo/addition_spin.py

After config/demo/addition_sft.py. One CPU core, a minute. The prompts and answers are those of SFT.
Each round starts at ln 2 = 0.6931 + nll_coef x next-token loss. Exact match hardly changes.
"""

from config.demo.addition_online_pl import *

out_dir = "out/addition/spin"
data = "data/sums/answers"
players = ["data", "self"]
ranked_by = "order"
max_rows = 0  # all
beta = 0.1
lr = [1e-4] * 4 + [5e-5] * 2 + [2e-5] * 2
