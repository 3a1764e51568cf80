"""The teacher: wider than the student, and longer at it.

    python train.py config/demo_pretrain_teacher.py         2 CPU cores, 3 minutes, validation loss 4.0
"""
from config.demo_pretrain import *

out_dir = "out/demo/pretrain_teacher"
n_embd = 256
max_steps = 350
