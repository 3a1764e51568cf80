"""Pretrain the teacher: wider than the student, for as many steps.

    python train.py config/demo/pretrain_teacher.py

2 CPU cores, 2 minutes; validation loss 4.2.
"""

from config.demo.pretrain import *

out_dir = "out/demo/pretrain_teacher"
n_embd = 256
