# make demo         the whole pipeline on this machine, to out/demo/report.md
# make demo-seeds   the same for three seeds, to out/demo_seeds/report.md: mean and spread
# make test         the tests
# make test-faults  the fault harness: kills, full disks, damaged files, hanging ranks; FAULT_SEED=2 for other places; 20 minutes
# make figures-tn   the T_n study, to studies/taylor/results/report.md; RANKED=ranked.jsonl.gz of real threads, else docstrings; FULL=1 the original size
# make figures-tn-map    where the write-up's picture appears: steps, learning rate, noise, width, block; about as long again
# make figures-tn-play   the same of T_n in fine-tuning and self-play, from the demo's models, into the same report
# make rlhf         reward model, PPO and every preference objective on real ranked rows (LOCAL=folder of them), to studies/rlhf/results/report.md
# make test-peers   the objectives against TRL's, Liger's and choix's own code, hf.py against transformers, in an environment of their own
# make frontier     RLHF or DPO: true reward against KL, to studies/frontier/results/report.md
# make bench        the benchmarks beside transformers and TRL, in an environment of their own, to bench/log.txt

PYTHON ?= python3
PY = .venv/bin/python
OUT ?= out/demo
SEED ?= 1337

RUN ?= log

# lines of arguments -> runs, JOBS at a time with a thread each
JOBS ?= 2
AT_ONCE = OMP_NUM_THREADS=1 xargs -P $(JOBS) -L 1 $(PY) train.py

.PHONY: student pipeline demo demo-seeds test test-faults test-peers rlhf frontier bench figures-tn figures-tn-runs figures-tn-map figures-tn-play

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/pydocs/meta.json: data/pydocs/prepare.py | .venv/ready
	$(PY) -m data.pydocs.prepare

# every line may be interrupted and run again: a finished stage says so and is left as it is
student: .venv/ready data/pydocs/meta.json
	$(PY) train.py config/demo/pretrain.py --out_dir=$(OUT)/pretrain --seed=$(SEED)
	$(PY) train.py config/demo/sft.py --out_dir=$(OUT)/sft --init=$(OUT)/pretrain --seed=$(SEED)

pipeline: student
	$(PY) train.py config/demo/pretrain_teacher.py --out_dir=$(OUT)/pretrain_teacher --seed=$(SEED)
	$(PY) train.py config/demo/sft_teacher.py --out_dir=$(OUT)/sft_teacher --init=$(OUT)/pretrain_teacher --seed=$(SEED)
	$(PY) train.py config/demo/sft_more.py --out_dir=$(OUT)/sft_more --init=$(OUT)/sft --seed=$(SEED)
	$(PY) train.py config/demo/spin_k2.py --out_dir=$(OUT)/spin_k2 --init=$(OUT)/sft --seed=$(SEED)
	$(PY) train.py config/demo/spin_k3.py --out_dir=$(OUT)/spin_k3 --init=$(OUT)/sft --teacher=$(OUT)/sft_teacher --seed=$(SEED)
	$(PY) eval.py sft=$(OUT)/sft sft@1.0=$(OUT)/sft@1.0 sft@0.7=$(OUT)/sft@0.7 sft@0.5=$(OUT)/sft@0.5 \
		sft_more=$(OUT)/sft_more spin_k2.round_0=$(OUT)/spin_k2/round_0 spin_k2.round_1=$(OUT)/spin_k2/round_1 \
		spin_k3.round_0=$(OUT)/spin_k3/round_0 spin_k3.round_1=$(OUT)/spin_k3/round_1 sft_teacher=$(OUT)/sft_teacher \
		--judge=$(OUT)/sft_teacher --data=data/pydocs --out=$(OUT)/eval

demo: pipeline
	$(PY) plot.py report $(OUT)

demo-seeds:
	for seed in 1 2 3; do $(MAKE) pipeline OUT=out/demo_seeds/$$seed SEED=$$seed || exit 1; done
	$(PY) plot.py report out/demo_seeds/1 out/demo_seeds/2 out/demo_seeds/3

# The T_n study: a line of arguments a run; one that is finished says so. Every seed has posts,
# a split and a vocabulary of its own. FULL: one at a time at the sizes that the config files have, on the hub's SHP: 135 runs, about
# 40 hours on one GPU by the estimates in their headers, of which studies/taylor/config/first.py takes 30.
TN ?= out/tn$(if $(FULL),_full)
TN_DATA = data/shp/$(if $(FULL),hub,$(if $(RANKED),$(firstword $(subst ., ,$(notdir $(RANKED)))),docstrings))
TN_SETS = $(TN_DATA)/small/3/group/meta.json $(TN_DATA)/large/3/group/meta.json
TN_PREPARE = $(PY) -m data.shp.prepare $(if $(FULL),,$(if $(RANKED),'$(RANKED)',--surrogate) --tokenizer=bpe --vocab_size=1024) --sets=3
TN_LATER = $(if $(FULL),,--n_head=2 --block_size=64 --batch_size=10 --lr=2e-3 --eval_interval=200 --eval_rows=110 --max_steps=2000)
TN_GROUP = $(if $(FULL),,--eval_interval=20 --max_steps=400)
TN_CLEAN = $(if $(FULL),,--n_layer=1 --n_head=2 --n_embd=64 --block_size=64 --lr=2e-3 --eval_interval=25 --eval_rows=100 --max_steps=350)
TN_RUN = $(if $(FULL),xargs -L 1 $(PY) train.py,$(AT_ONCE))
BASELINES = dropout=0.1 weight_decay=1.0 label_smoothing=0.1 focal=2 confidence_penalty=0.1

$(TN_DATA)/small/3/group/meta.json: | .venv/ready
	$(TN_PREPARE) --rows=$(if $(FULL),10000,500) --out=$(TN_DATA)/small
$(TN_DATA)/large/3/group/meta.json: | .venv/ready
	$(TN_PREPARE) --rows=$(if $(FULL),10000,2400) --out=$(TN_DATA)/large

figures-tn-runs: $(TN_SETS)
	for seed in 1 2 3; do \
		for n in 0 0.5 1 2 4; do \
			run="--taylor_order=$$n --seed=$$seed"; \
			echo studies/taylor/config/later.py --data=$(TN_DATA)/small/$$seed/row $(TN_LATER) $$run --out_dir=$(TN)/later/row/T_$$n/$$seed; \
			echo studies/taylor/config/later.py --data=$(TN_DATA)/small/$$seed/group $(TN_LATER) $(TN_GROUP) $$run --out_dir=$(TN)/later/group/T_$$n/$$seed; \
			echo studies/taylor/config/clean.py --data=$(TN_DATA)/large/$$seed/group $(TN_CLEAN) $$run --out_dir=$(TN)/clean/group/T_$$n/$$seed; \
			for split in $(if $(FULL),row group); do \
				echo studies/taylor/config/later.py --data=$(TN_DATA)/small/$$seed/$$split --n_embd=1024 $$run --out_dir=$(TN)/later_1024/$$split/T_$$n/$$seed; \
				echo studies/taylor/config/first.py --data=$(TN_DATA)/small/$$seed/$$split $$run --out_dir=$(TN)/first/$$split/T_$$n/$$seed; \
			done; \
		done; \
		for baseline in $(BASELINES); do \
			echo studies/taylor/config/clean.py --data=$(TN_DATA)/large/$$seed/group $(TN_CLEAN) --$$baseline --seed=$$seed --out_dir=$(TN)/clean/group/$${baseline%=*}/$$seed; \
		done; \
	done | $(TN_RUN)

figures-tn: figures-tn-runs
	$(PY) taylor.py $(TN) results/$(notdir $(TN))

# Where the picture of the row split appears: a name, what differs, the seeds (of one alone a lead, no result). At CPU size
tn_map = for seed in $(3); do for n in 0 1 2; do \
	echo studies/taylor/config/later.py --data=$(TN_DATA)/small/$$seed/row $(TN_LATER) --taylor_order=$$n --seed=$$seed --out_dir=$(TN)/map_$(1)/row/T_$$n/$$seed $(2); done; done

figures-tn-map: $(TN_SETS)
	{ $(call tn_map,long,--max_steps=6000,1 2 3); \
	$(call tn_map,lr_1e-3,--lr=1e-3,1); \
	$(call tn_map,lr_4e-3,--lr=4e-3,1); \
	$(call tn_map,no_noise,--init_noise=0,1); \
	$(call tn_map,width_128,--n_embd=128,1); \
	$(call tn_map,first_block,--attn_scale=embd --mlp_alone=True --schedule=cosine --min_lr_ratio=0.01,1); \
	$(call tn_map,our_block,--position=learned --mlp=gelu --attn_proj=True --head_bias=False --tie_embeddings=True --init_scheme=gpt2 --init_noise=0,1); \
	} | $(TN_RUN)
	$(PY) taylor.py $(TN) results/$(notdir $(TN))

# T_n of the fine-tuning loss, and of the ranking in self-play with history: K = 2 in the first round, 3 in the second.
# (nll_coef: T_0 with nll_coef as much larger, against the ranking's gradient, as T_2 makes it when K = 2 starts, (1 - 1/2)^-2)
figures-tn-play: student
	spin="config/demo/spin_k2.py --players=data,self,self-1 --rounds=2 --max_rows=512 --max_steps=16 --init=$(OUT)/sft"; \
	for seed in 1 2 3; do \
		for n in 0 1 2; do \
			run="--taylor_order=$$n --seed=$$seed"; \
			echo config/demo/sft.py --init=$(OUT)/pretrain --calibration=True --max_steps=60 --eval_interval=20 $$run --out_dir=$(TN)/sft/group/T_$$n/$$seed; \
			echo $$spin $$run --out_dir=$(TN)/spin/group/T_$$n/$$seed; \
		done; \
		echo $$spin --nll_coef=0.8 --seed=$$seed --out_dir=$(TN)/spin/group/nll_coef/$$seed; \
	done | $(TN_RUN)
	$(PY) taylor.py $(TN) results/$(notdir $(TN))

test: .venv/ready
	$(PY) -m pytest -q tests

test-faults: .venv/ready
	$(PY) -m tests.faults --seed=$(or $(FAULT_SEED),1)

.venv-peers/ready: requirements.txt tests/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r tests/peers/requirements.txt
	touch $@

test-peers: .venv-peers/ready
	.venv-peers/bin/python -m pytest -q tests/peers

# The stages of "RLHF or DPO?" at CPU size on rows ranked by votes and by correctness
LOCAL ?= ../shared/data
RLHF ?= out/rlhf
OBJECTIVES = kind=pairs kind=pl kind=pl,depth=1 kind=pl,taylor_order=1 kind=ipo,beta=0.05 kind=simpo,beta=2,margin=0.5,lr=5e-5 kind=orpo,beta=0.5,nll_coef=1
comma = ,

data/local_bpe/meta.json: | .venv/ready
	$(PY) -m data.jsonl.prepare '$(LOCAL)/pretrain.jsonl.gz' --out=data/local_bpe --tokenizer=bpe
data/local_sft/meta.json: | .venv/ready
	$(PY) -m data.jsonl.prepare '$(LOCAL)/sft.jsonl.gz' --out=data/local_sft
data/ranked/meta.json: | .venv/ready
	$(PY) -m data.jsonl.prepare '$(LOCAL)/ranked.jsonl.gz' --out=data/ranked

rlhf: data/local_bpe/meta.json data/local_sft/meta.json data/ranked/meta.json
	$(PY) train.py config/local/pretrain.py --data=data/local_bpe --out_dir=$(RLHF)/pretrain
	$(PY) train.py config/local/sft.py --init=$(RLHF)/pretrain --out_dir=$(RLHF)/sft
	{ echo config/local/reward.py --init=$(RLHF)/sft --out_dir=$(RLHF)/reward; \
	  echo config/local/preferred_ft.py --init=$(RLHF)/pretrain --out_dir=$(RLHF)/preferred_ft; \
	$(foreach o,$(OBJECTIVES),echo config/local/dpo.py --init=$(RLHF)/sft --$(subst $(comma), --,$(o)) --out_dir=$(RLHF)/$(subst $(comma),_,$(subst =,_,$(o)));) \
	} | $(AT_ONCE)
	{ echo config/local/ppo.py --init=$(RLHF)/sft --reward=$(RLHF)/reward --pretrain_data=data/local_bpe --out_dir=$(RLHF)/ppo; \
	  echo config/local/dpo.py --init=$(RLHF)/preferred_ft --out_dir=$(RLHF)/dpo_of_preferred_ft; \
	} | $(AT_ONCE)
	$(PY) plot.py table studies/rlhf/results $(RLHF)/*
	$(PY) eval.py reward=$(RLHF)/reward --data=data/ranked --rows=1000 | tee studies/rlhf/results/reward.txt

frontier: .venv/ready data/pydocs/meta.json
	$(PY) frontier.py

.venv-bench/ready: requirements.txt bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	touch $@

bench: .venv-bench/ready
	.venv-bench/bin/python bench.py --peers 2>bench/$(RUN).err | tee bench/$(RUN).txt
