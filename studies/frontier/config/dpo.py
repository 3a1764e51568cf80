"""The frontier's DPO, on what its reward model learns from. --loss_type=pl: K = 3 Plackett-Luce; --loss_type=simpo: SimPO.

python train.py studies/frontier/config/dpo.py         50 s on a core; starts at ln 2 = 0.6931
"""

from studies.frontier.config.reward import *

stage = "preference"
out_dir = "out/frontier/dpo"
beta = 0.5
epochs = 1.0
lr = 5e-4
