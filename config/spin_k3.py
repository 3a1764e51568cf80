"""Self-play distillation: data > a larger model > self, four rounds.

    torchrun --nproc_per_node=8 train.py config/spin_k3.py

Not run at this size yet. On paper, on 8 x 80 GB GPUs, training takes 1.4 times as long as in
spin_k2: from the second round on 3 minutes, and the samples. Every round starts at ln 6 = 1.7918 +
nll_coef x next-token loss.

Before it: config/pretrain_gpt2.py and config/sft_ultrachat.py. The teacher's responses come from
any model, as a ranked file with {"prompt", "responses": [text]} for every prompt, or from one of
ours:
    python -m data.ultrachat.prepare
    python sample.py TEACHER --prompts data/ultrachat/train.jsonl --out data/ultrachat/teacher.jsonl
    python sample.py TEACHER --prompts data/ultrachat/val.jsonl --out teacher_val.jsonl
    cat teacher_val.jsonl >> data/ultrachat/teacher.jsonl
Or set `teacher` to a checkpoint, which then writes them itself.
"""

from config.spin_k2 import *

out_dir = "out/spin_k3"
players = ["data", "teacher", "self"]
teacher = "data/ultrachat/teacher.jsonl"
