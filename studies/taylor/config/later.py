"""The write-up's T_n figure, its later version: one layer, ReLU, sinusoidal positions, no output projection, an untied head with
bias, noise of 0.1 on every parameter, constant learning rate. taylor_order is n; `make figures-tn` runs all of them.

    python -m data.shp.prepare                                              # or from local rows: its header says how
    python train.py studies/taylor/config/later.py --taylor_order=2                 # and --data=data/shp/group, --n_embd=1024

One GPU, an estimate: 40,000 steps of 2,540 tokens, at 5 ms a step 4 minutes and as many for evaluation (width 1024: 10).
On raw values the write-up's curves at width 64 have T_0's minimum 0.34 near epoch 22 and T_2's 0.33. Not yet run at this size.

What differs: means are per target token (there per row, then over rows), a text shorter than the window ends in end-of-text,
which is asked too, there is a last LayerNorm before the head, as in every model of ours, the vocabulary is padded to a multiple
of 64, and on a GPU products are bfloat16 (--dtype=float32).
"""

stage = "sft"  # whole texts: every token is asked
out_dir = "out/tn_shp_later"
data = "data/shp/row"
calibration = True

n_layer = 1
n_head = 8
n_embd = 64
block_size = 128  # the first 128 tokens of history + preferred comment
position = "sinusoidal"
mlp = "relu"
attn_proj = False
tie_embeddings = False
head_bias = True
init_scheme = "glorot"
init_noise = 0.1

batch_size = 20  # texts, 400 steps an epoch
epochs = 100.0
lr = 1e-3
schedule = "constant"
adam_betas = [0.9, 0.999]
grad_clip = 10.0
eval_rows = 2000
eval_interval = 400
save_interval = 20000
log_interval = 100
