"""The write-up's T_n figure, its later version.

One layer, ReLU, normalization after attention and MLP, the write-up's sinusoidal positions, no
attention output projection, an untied LM head with bias, noise of 0.1 added to every parameter,
constant learning rate. Losses are means over the tokens of a row, then over rows.

    python -m data.shp.prepare
    python -m studies.taylor.train studies/taylor/config/later.py --taylor_order=2

Variants: --data=data/shp/group (split by post), --n_embd=1024.

Estimate for one GPU: 40,000 steps of 2,540 tokens, 4 minutes of training and 4 of evaluation (10
and 10 at width 1024). In the write-up, at width 64, the minimum of T_0 is 0.34 near epoch 22 and
that of T_2 is 0.33. The README says how far a CPU came and what is not known of the write-up's
model.
"""

stage = "sft"  # rows are whole texts: every token has a loss
out_dir = "out/taylor_later"
data = "data/shp/row"
dtype = "float32"

write_up = "later"
n_layer = 1
n_head = 8
n_embd = 64
block_size = 128  # the first 128 tokens of history + preferred comment
position = "sinusoidal"
mlp = "relu"
tie_embeddings = False
init_noise = 0.1

batch_size = 20  # 8,000 training texts: 400 steps per epoch
epochs = 100.0
lr = 1e-3
schedule = "constant"
adam_betas = [0.9, 0.999]
grad_clip = 10.0
eval_rows = 2000
eval_interval = 400
save_interval = 20000
log_interval = 100
