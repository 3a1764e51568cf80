"""Preferred-FT: SFT on each row's best response, the reference where there is no SFT model (DPO, arXiv 2305.18290, section 5).

python train.py config/local/preferred_ft.py         one busy CPU core, 5 minutes with a vocabulary of 4,096 (`make rlhf`), validation loss 4.60; then --init=out/preferred_ft_local for DPO
"""

from config.local.dpo import *

stage = "sft"
out_dir = "out/preferred_ft_local"
init = "out/pretrain_local"
max_rows = 0
batch_size = 32  # rows, 95 steps
lr = 1e-3
