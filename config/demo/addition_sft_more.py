"""The baseline: fine-tune on the same 1,500 answers for longer.

    python train.py config/demo/addition_sft_more.py

One CPU core, 3 to 5 minutes. The training loss goes to 0, the validation loss rises from 0.5 to 1.2
with --seed=1.
"""

from config.demo.addition_sft import *

out_dir = "out/addition/sft_more"
init = "out/addition/sft"
optimizer = "adamw"
lr = 3e-4
max_steps = 2000
eval_interval = 500
save_interval = 250
keep_last = 8  # for the curve of make demo
log_interval = 100
loss_spike_factor = 0.0  # the loss is near zero
