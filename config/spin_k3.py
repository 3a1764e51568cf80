"""Self-play distillation: data > a larger model > self.

    torchrun --nproc_per_node=8 train.py config/spin_k3.py

The chain before it: pretrain_gpt2, sft_ultrachat, and the teacher's responses in a ranked file, which any model may have
written ({"prompt", "responses": [text]} for every prompt of the data), or one of ours:
    python -m data.ultrachat.prepare
    python sample.py TEACHER --prompts data/ultrachat/train.jsonl --out data/ultrachat/teacher.jsonl
    python sample.py TEACHER --prompts data/ultrachat/val.jsonl --out teacher_val.jsonl
    cat teacher_val.jsonl >> data/ultrachat/teacher.jsonl
Or set `teacher` to a checkpoint, which then writes them itself. 8 x 80 GB GPUs, half as long again as spin_k2: on paper
three minutes a round and the samples.
Every round starts at ln 6 = 1.7918 + nll_coef x loss. Not yet run at this size.
"""

from config.spin_k2 import *

out_dir = "out/spin_k3"
players = ["data", "teacher", "self"]
teacher = "data/ultrachat/teacher.jsonl"
