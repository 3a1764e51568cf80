"""PPO on the local prompts against the reward model of reward_local, the pretraining stream beside (PPO-ptx).

python train.py config/local/ppo.py         one busy CPU core, 9 minutes with a vocabulary of 4,096 (`make rlhf`); reward -0.03 -> 0.07 at 0.9 nats, by not ending
"""

stage = "ppo"
out_dir = "out/ppo_local"
init = "out/sft_local"
reward = "out/reward_local"
data = "data/ranked"

rounds = 20
keep_rounds = 1
max_rows = 64  # prompts a round
epochs = 2  # over a round's samples
batch_size = 32  # 4 steps a round
max_prompt = 128
max_response = 64
gen_batch_size = 64

kl_coef = 0.1
pretrain_coef = 0.1  # gamma
pretrain_data = "data/local"
pretrain_batch_size = 2  # x 320 tokens a step
lr = 1e-4
schedule = "constant"
eval_interval = 10  # rounds
eval_batches = 10
eval_rows = 64
log_interval = 4
