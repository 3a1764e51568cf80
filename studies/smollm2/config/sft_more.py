"""The baseline: SFT continued, two more passes over the same rows.

    python train.py studies/smollm2/config/sft_more.py

One core of a shared Xeon, 8 minutes; validation loss 1.98.
"""

from studies.smollm2.config.sft import *

out_dir = "out/commands/sft_more"
init = "out/commands/sft"
lr = 5e-5
epochs = 2.0
