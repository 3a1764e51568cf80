"""GRPO, rewarded by the F1 of the arguments: copying the program's name gains nothing.

python train.py studies/smollm2/config/grpo_args.py
"""

from studies.smollm2.config.grpo import *

out_dir = "out/commands/grpo_args"
reward = "studies.smollm2.scorer:argument_f1"
