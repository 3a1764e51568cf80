"""The write-up's T_n figure, its later version.

One layer, ReLU, sinusoidal positions, no attention output projection, an untied LM head with bias,
noise of 0.1 added to every parameter, constant learning rate.

    python -m data.shp.prepare
    python -m studies.taylor.train studies/taylor/config/later.py --taylor_order=2

Variants: --data=data/shp/group (split by post), --n_embd=1024.

Estimate for one GPU: 40,000 steps of 2,540 tokens, 4 minutes of training and 4 of evaluation (10
and 10 at width 1024). Not run at this size. In the write-up, at width 64, the minimum of T_0 is
0.34 near epoch 22 and that of T_2 is 0.33.

Differences from the write-up: losses are means over tokens (there over the tokens of a row, then
over rows); a text shorter than block_size ends in end-of-text, which has a loss too; a LayerNorm
before the LM head; the vocabulary is padded to a multiple of 64; on a GPU matmuls are in bfloat16
(--dtype=float32 for float32).
"""

stage = "sft"  # rows are whole texts: every token has a loss
out_dir = "out/taylor_later"
data = "data/shp/row"

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
