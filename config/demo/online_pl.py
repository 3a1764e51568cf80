"""Online ranking on real text: four samples a prompt, ranked by how concrete they are.

    python train.py config/demo/online_pl.py

2 CPU cores, 2 minutes. After config/demo/sft.py. The scorer (data/pydocs/scorer.py) counts names of
kinds of things, from -1 to 1. score/self is the mean score on held-out prompts: 0.39 at first, 0.47
after a round. It says nothing about whether a description is true; the validation loss rises.
"""

stage = "spin"
out_dir = "out/demo/online_pl"
init = "out/demo/sft"
data = "data/pydocs"

players = ["self:4"]
ranked_by = "data.pydocs.scorer:concrete"
rounds = 2
max_rows = 512  # prompts a round, others in each
max_prompt = 64
max_response = 48
batch_size = 32  # prompts a step

beta = 0.1
nll_coef = 0.2
optimizer = "adamw"
lr = 1.5e-4
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 16
log_interval = 4
