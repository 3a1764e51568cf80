"""Online ranking on sums: four samples a prompt, ranked by whether they are right.

    python train.py config/demo/addition_online_pl.py

After config/demo/addition_sft.py. One CPU core, 3 minutes. No answers are used: the scorer adds the
numbers of the prompt itself. score/self is the share of right samples on held-out prompts. With
half as many prompts a round it rises from 37 to 54 %, the mean of five seeds (studies/verifiable).
"""

stage = "spin"
out_dir = "out/addition/online_pl"
init = "out/addition/sft"
data = "data/sums/prompts"

players = ["self:4"]
ranked_by = "data.addition.scorer:exact_match"
rounds = 8
keep_rounds = 0  # all, for the curve of make demo
max_rows = 4096  # prompts a round, others in each
max_prompt = 32
max_response = 8
gen_batch_size = 1024

beta = 1.0
nll_coef = 1.0  # against the fall of the likelihood of right samples
batch_size = 32  # prompts that have both kinds, about four in ten
optimizer = "adamw"
lr = [2e-4] * 4 + [1e-4] * 2 + [4e-5] * 2
schedule = "constant"
micro_batch_tokens = 8192
eval_interval = 1000  # at the start and the end of each round
eval_rows = 500
log_interval = 10
loss_spike_factor = 0.0
