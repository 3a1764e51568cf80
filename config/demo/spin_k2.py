"""SPIN: data > self, two rounds.

    python train.py config/demo/spin_k2.py

2 CPU cores, 1.5 minutes. Each round starts at ln 2 = 0.6931 + nll_coef x next-token loss.
"""

stage = "spin"
out_dir = "out/demo/spin_k2"
init = "out/demo/sft"
data = "data/pydocs"

players = ["data", "self"]
rounds = 2
max_rows = 1024  # prompts a round, the same ones each round; rows that SFT has seen, as SPIN's are
max_prompt = 64
max_response = 48
batch_size = 32  # prompts a step
max_steps = 32  # one epoch

beta = 0.1
nll_coef = 0.2  # against the fall of the data's likelihood
optimizer = "adamw"
lr = 1.5e-4  # of four tried, where SFT continued does least harm; all three arms have it
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 16
log_interval = 4
