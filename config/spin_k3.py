"""Self-play distillation: data > a larger model > self, four rounds.

    torchrun --nproc_per_node=8 train.py config/spin_k3.py

spin_k2.py with a teacher's response between the data's and the policy's. Not run at this size yet.
Estimated on 8 x 80 GB GPUs: training takes 1.4 times as long as spin_k2's, 3 minutes a round from
the second on, plus sampling. Every round starts at ln 6 = 1.7918 + nll_coef x next-token loss.

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
