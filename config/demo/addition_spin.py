"""SPIN on sums: the data's answer above the model's own sample.

    python train.py config/demo/addition_spin.py

After config/demo/addition_sft.py. One CPU core, a minute. The prompts and answers are those of SFT.
Each round starts at ln 2 = 0.6931 + nll_coef x next-token loss. Exact match hardly changes.
"""

stage = "spin"
out_dir = "out/addition/spin"
init = "out/addition/sft"
data = "data/sums/answers"

players = ["data", "self"]
rounds = 8
keep_rounds = 0  # all, for the curve of make demo
max_prompt = 32
max_response = 8
gen_batch_size = 1024

beta = 0.1
nll_coef = 1.0  # without it the answers lose likelihood together with the samples
batch_size = 32
optimizer = "adamw"
lr = [1e-4] * 4 + [5e-5] * 2 + [2e-5] * 2
schedule = "constant"
micro_batch_tokens = 8192
eval_interval = 1000  # at the start and the end of each round
eval_rows = 500
log_interval = 10
loss_spike_factor = 0.0
