"""The frontier's DPO, on what its reward model learns from. --kind=pl: K = 3 Plackett-Luce; --kind=simpo: SimPO.

python train.py config/frontier_dpo.py         50 s on a core; starts at ln 2 = 0.6931
"""

from config.frontier_reward import *

stage = "preference"
out_dir = "out/frontier/dpo"
beta = 0.5
epochs = 1.0
lr = 5e-4
