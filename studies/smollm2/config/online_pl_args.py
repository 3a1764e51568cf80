"""Online ranking by the F1 of the arguments: the name alone earns nothing, unless it is all.

    python train.py studies/smollm2/config/online_pl_args.py

One core of a shared Xeon beside other jobs, 16 minutes; score/self from 12 to 18 % after the first
round.
"""

from studies.smollm2.config.online_pl import *

out_dir = "out/commands/online_pl_args"
ranked_by = "studies.smollm2.scorer:argument_f1"
