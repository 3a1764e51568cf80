"""The frontier's base model: 1.1M parameters from scratch on the documentation of the installed packages.

python train.py studies/frontier/config/pretrain.py         three minutes on two cores, validation loss 4.31
"""

from config.demo.pretrain import *

out_dir = "out/frontier/pretrain"
n_layer = 3
n_head = 4
n_embd = 128
block_size = 128
batch_size = 32  # x 128 = 4,096 tokens a step
