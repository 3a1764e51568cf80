"""The write-up's T_n figure, its first version.

As the later version (later.py), but: attention scores are divided by the square root of n_embd
instead of head_dim, one LayerNorm is used twice, the MLP has no residual connection, texts are cut
to 119 tokens and padded to 128, padding is fed and its labels count, and the learning rate follows
a cosine from 1e-4 to 1e-6 over 1,000 epochs.

    python -m data.shp.prepare
    python -m studies.taylor.train studies/taylor/config/first.py --taylor_order=2

Variant: --data=data/shp/group (split by post).

Estimate for one GPU: 400,000 steps of 2,540 tokens, about an hour. Not run at this size. In the
write-up, up to epoch 1,180, T_0 falls to about 0.20 by epoch 20 to 40 and rises to 0.25; T_1 ends
near 0.19 and T_2 near 0.175.

Difference from the write-up: the run ends with the cosine at epoch 1,000 (the write-up planned
2,000 and shows 1,180).
"""

from studies.taylor.config.later import *

out_dir = "out/taylor_first"
write_up = "first"
n_embd = 1024

epochs = 1000.0
lr = 1e-4
schedule = "cosine"
min_lr_ratio = 0.01
eval_interval = 4000  # 10 epochs
