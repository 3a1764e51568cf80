"""Fine-tune a small model from scratch on 1,500 sums: "What is 347 + 58?" -> "405".

    python -m data.addition.prepare --answers=1500 --out=data/sums
    python train.py config/demo/addition_sft.py

One CPU core, 0.7 minutes. The seed matters much: after 350 steps 35 to 77 % of held-out sums are
right greedily for seeds 1 to 5 (validation loss 0.29 to 0.59), and 78 % for 1337 (0.29).
"""

stage = "sft"
out_dir = "out/addition/sft"
data = "data/sums/answers"
tokenizer = "bytes"
template = "{prompt} "

n_layer = 4
n_head = 4
n_embd = 128  # 0.84M parameters
block_size = 64

max_prompt = 32
max_response = 8
batch_size = 64
max_steps = 350  # 15 epochs
optimizer = "muon"
lr = 1e-3
schedule = "cosine"
eval_interval = 50
eval_rows = 500
log_interval = 10
