"""Online ranking by the F1 of the arguments: copying the program's name gains nothing.

python train.py studies/smollm2/config/online_pl_args.py
"""

from studies.smollm2.config.online_pl import *

out_dir = "out/commands/online_pl_args"
ranked_by = "studies.smollm2.scorer:argument_f1"
