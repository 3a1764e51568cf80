"""PPO-ptx on the local prompts: reward model of config/local/reward.py, plus a pretraining loss.

    python train.py config/local/ppo.py     # data: config/local/reward.py

One busy CPU core, 3 to 4 minutes with a vocabulary of 4,096 (studies/rlhf).
The reward rises from -0.01 to 0.07 at a KL of 1.0 nats, by responses that no longer end.
"""

stage = "ppo"
out_dir = "out/ppo_local"
init = "out/sft_local"
reward = "out/reward_local"
data = "data/ranked"

rounds = 20
keep_rounds = 1
max_rows = 64  # prompts per round
epochs = 2  # over the samples of a round
batch_size = 32  # 4 steps per round
max_prompt = 128
max_response = 64
gen_batch_size = 64

kl_coef = 0.1
pretrain_coef = 0.1  # gamma of PPO-ptx
pretrain_data = "data/local"
pretrain_batch_size = 2  # x 320 tokens per step
lr = 1e-4
schedule = "constant"
eval_interval = 10  # rounds
eval_batches = 10
eval_rows = 64
log_interval = 4
