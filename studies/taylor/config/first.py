"""The write-up's T_n figure, its first version: as the later one, with attention divided by the square root of the whole width,
one LayerNorm used twice and no residual around the MLP; a cosine from 1e-4 to 1e-6 over 1,000 epochs.

    python -m data.shp.prepare                                              # or from local rows: its header says how
    python train.py studies/taylor/config/first.py --taylor_order=2                 # and --data=data/shp/group

One GPU, an estimate: 400,000 steps of 2,540 tokens, about an hour. The write-up, up to epoch 1,180: T_0 falls to about 0.20 by
epoch 20 to 40 and climbs to 0.25, T_1 settles near 0.19, T_2 near 0.175. Not yet run at this size.

What differs, beside what studies/taylor/config/later.py says: the norm stands before attention and before the MLP, and the run ends with
the cosine, at epoch 1,000 (the write-up planned 2,000 and shows 1,180).
"""

from studies.taylor.config.later import *

out_dir = "out/tn_shp_first"
n_embd = 1024
attn_scale = "embd"
mlp_alone = True

epochs = 1000.0
lr = 1e-4
schedule = "cosine"
min_lr_ratio = 0.01
eval_interval = 4000  # 10 epochs
