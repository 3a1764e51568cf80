"""The fair setting for T_n: GPT-2 block and initialization, validation posts not seen in training.

    python -m data.shp.prepare
    python -m studies.taylor.train studies/taylor/config/clean.py --taylor_order=2

Baselines, instead of --taylor_order: --dropout=0.1, --weight_decay=1.0, --focal=2,
--token_label_smoothing=0.1, --confidence_penalty=0.1.

Estimate for one GPU: 4,000 steps of 2,540 tokens, 2 minutes. Not run at this size. At CPU size
(studies/taylor/run.py) the validation loss is 4.88 with T_0 and early stopping; T_1 and T_2 are not
different from it.
"""

stage = "sft"  # rows are whole texts: every token has a loss
out_dir = "out/taylor_clean"
data = "data/shp/group"

n_layer = 2
n_head = 4
n_embd = 256
block_size = 128

batch_size = 20  # 8,000 training texts: 400 steps per epoch
epochs = 10.0
lr = 1e-3
schedule = "constant"  # so that early stopping and the last step have the same schedule
warmup_ratio = 0.02
eval_rows = 2000
eval_interval = 200
save_interval = 20000
log_interval = 100
