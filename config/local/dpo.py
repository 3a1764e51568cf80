"""DPO on the ranked rows that reward_local learns from, Bradley-Terry of every pair of a prompt.

    python train.py config/local/dpo.py         one busy CPU core, 6 minutes with a vocabulary of 4,096 (`make rlhf`); starts at ln 2 = 0.6931, ends with 54.7 % of
held-out pairs ranked right

--loss_type=pl is Plackett-Luce on the whole ranking, --loss_type=simpo --beta=2 --margin=0.5 --lr=5e-5, --loss_type=ipo, --loss_type=orpo --nll_coef=1 the others.
"""

from config.local.reward import *

stage = "preference"
out_dir = "out/dpo_local"
center_coef = 0.0
beta = 0.1
max_rows = 768  # of 3,038 prompts: 48 steps
lr = 3e-4
