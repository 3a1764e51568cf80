"""The frontier's reference: what does `name(signature)` do? -> the docstring's summary.

python train.py studies/frontier/config/sft.py         two minutes on two cores, validation loss 4.46
"""

from config.demo.sft import *

out_dir = "out/frontier/sft"
init = "out/frontier/pretrain"
max_prompt = 48
max_response = 32
max_steps = 150
