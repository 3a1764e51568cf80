"""Online ranking: four samples a prompt, ranked by their F1 with the data's command.

    python train.py studies/smollm2/config/online_pl.py

Two rounds of half of the prompts each: every prompt once. The best sample has a next-token loss.
One core of a shared Xeon, 17 minutes; score/self from 34 to 47 % after the first round.
"""

from studies.smollm2.config.spin import *

out_dir = "out/commands/online_pl"
players = ["self:4"]
ranked_by = "studies.smollm2.scorer:token_f1"
rounds = 2
max_rows = 387  # prompts a round, others in each
