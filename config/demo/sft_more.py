"""The control of self-play: SFT continued on the rows of demo_spin_k2 for the steps of both its rounds.

python train.py config/demo/sft_more.py         2 CPU cores, half a minute, validation loss 4.53 (4.54 before)
"""

from config.demo.spin_k2 import *

stage = "sft"
out_dir = "out/demo/sft_more"
rounds = 1
max_steps = 64  # 2 x 32; the learning rate falls once, where self-play's falls in each round
