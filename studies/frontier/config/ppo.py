"""PPO against the reward model. Against the true reward: --reward=data.pydocs.scorer:concrete.

    python train.py studies/frontier/config/ppo.py

One CPU core, 2 minutes.
"""

stage = "ppo"
out_dir = "out/frontier/ppo"
init = "out/frontier/sft"
reward = "out/frontier/reward"
data = "out/frontier/ranked"

rounds = 16
keep_rounds = 1
max_rows = 128  # prompts per round
epochs = 2  # over the samples of a round
batch_size = 64  # 4 steps per round
max_prompt = 48
max_response = 32
gen_batch_size = 128

kl_coef = 0.1  # for rewards with a standard deviation of 1
missing_eos_penalty = 0.0  # the true reward has none
lr = 5e-4
schedule = "constant"
eval_interval = 1000  # only the last round
eval_rows = 128
log_interval = 4
