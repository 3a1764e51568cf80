"""Online ranking on real text: four samples a prompt, ranked by how concrete they are.

    python train.py config/demo/online_pl.py

2 CPU cores, 2 minutes. After config/demo/sft.py. The scorer (data/pydocs/scorer.py) counts names of
kinds of things, from -1 to 1. score/self is the mean score on held-out prompts: 0.39 at first, 0.44
after a round. It says nothing about whether a description is true; the validation loss rises.
"""

from config.demo.spin_k2 import *

out_dir = "out/demo/online_pl"
players = ["self:4"]
ranked_by = "data.pydocs.scorer:concrete"
max_rows = 512  # prompts a round, others in each
max_steps = 0  # one epoch
