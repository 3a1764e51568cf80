"""The fair setting for T_n: our ordinary block and initialisation, AdamW, no added noise, validation posts that training never saw.

    python -m data.shp.prepare                                              # or from local rows: its header says how
    python train.py studies/taylor/config/clean.py --taylor_order=2                 # or --dropout=0.1, --weight_decay=1.0, --label_smoothing=0.1,
                                                                            # --focal=2, --confidence_penalty=0.1
One GPU, an estimate: 4,000 steps of 2,540 tokens, 2 minutes. Not yet run at this size: at a CPU's, validation cross-entropy 4.88 with T_0, stopped
early, and T_n within its interval (studies/taylor/results).
"""

stage = "sft"  # whole texts: every token is asked
out_dir = "out/tn_shp_clean"
data = "data/shp/group"
calibration = True

n_layer = 2
n_head = 4
n_embd = 256
block_size = 128

batch_size = 20  # texts, 400 steps an epoch
epochs = 10.0
lr = 1e-3
schedule = "constant"  # or an early stop would stand on another schedule than the end
warmup_ratio = 0.02
eval_rows = 2000
eval_interval = 200
save_interval = 20000
log_interval = 100
