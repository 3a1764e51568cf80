"""Self-play distillation: data > teacher > self, two rounds.

    python train.py config/demo/spin_k3.py

2 CPU cores, 2 minutes. Each round starts at ln 6 = 1.7918 + nll_coef x next-token loss.
"""

from config.demo.spin_k2 import *

out_dir = "out/demo/spin_k3"
players = ["data", "teacher", "self"]
teacher = "out/demo/sft_teacher"
