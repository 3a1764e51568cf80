# make demo         the whole pipeline on this machine, to out/demo/report.md
# make demo-seeds   the same for three seeds, to out/demo_seeds/report.md: mean and spread
# make test         the tests
# make test-peers   the objectives against TRL's, Liger's and choix's own code, in an environment of their own
# make frontier     RLHF or DPO: true reward against KL, to results/frontier/report.md
# make bench        the benchmarks beside transformers and TRL, in an environment of their own, to bench/log.txt

PYTHON ?= python3
PY = .venv/bin/python
OUT ?= out/demo
SEED ?= 1337

RUN ?= log

.PHONY: pipeline demo demo-seeds test test-peers frontier bench

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/pydocs/meta.json: data/pydocs/prepare.py | .venv/ready
	$(PY) -m data.pydocs.prepare

# every line may be interrupted and run again: a finished stage says so and is left as it is
pipeline: .venv/ready data/pydocs/meta.json
	$(PY) train.py config/demo_pretrain.py --out_dir=$(OUT)/pretrain --seed=$(SEED)
	$(PY) train.py config/demo_pretrain_teacher.py --out_dir=$(OUT)/pretrain_teacher --seed=$(SEED)
	$(PY) train.py config/demo_sft.py --out_dir=$(OUT)/sft --init=$(OUT)/pretrain --seed=$(SEED)
	$(PY) train.py config/demo_sft_teacher.py --out_dir=$(OUT)/sft_teacher --init=$(OUT)/pretrain_teacher --seed=$(SEED)
	$(PY) train.py config/demo_sft_more.py --out_dir=$(OUT)/sft_more --init=$(OUT)/sft --seed=$(SEED)
	$(PY) train.py config/demo_spin_k2.py --out_dir=$(OUT)/spin_k2 --init=$(OUT)/sft --seed=$(SEED)
	$(PY) train.py config/demo_spin_k3.py --out_dir=$(OUT)/spin_k3 --init=$(OUT)/sft --teacher=$(OUT)/sft_teacher --seed=$(SEED)
	$(PY) eval.py sft=$(OUT)/sft sft@1.0=$(OUT)/sft@1.0 sft@0.7=$(OUT)/sft@0.7 sft@0.5=$(OUT)/sft@0.5 \
		sft_more=$(OUT)/sft_more spin_k2.round_0=$(OUT)/spin_k2/round_0 spin_k2.round_1=$(OUT)/spin_k2/round_1 \
		spin_k3.round_0=$(OUT)/spin_k3/round_0 spin_k3.round_1=$(OUT)/spin_k3/round_1 sft_teacher=$(OUT)/sft_teacher \
		--judge=$(OUT)/sft_teacher --data=data/pydocs --out=$(OUT)/eval

demo: pipeline
	$(PY) plot.py report $(OUT)

demo-seeds:
	for seed in 1 2 3; do $(MAKE) pipeline OUT=out/demo_seeds/$$seed SEED=$$seed || exit 1; done
	$(PY) plot.py report out/demo_seeds/1 out/demo_seeds/2 out/demo_seeds/3

test: .venv/ready
	$(PY) -m pytest -q tests

.venv-peers/ready: requirements.txt tests/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r tests/peers/requirements.txt
	touch $@

test-peers: .venv-peers/ready
	.venv-peers/bin/python -m pytest -q tests/peers

frontier: .venv/ready data/pydocs/meta.json
	$(PY) frontier.py

.venv-bench/ready: requirements.txt bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	touch $@

bench: .venv-bench/ready
	.venv-bench/bin/python bench.py --peers 2>bench/$(RUN).err | tee bench/$(RUN).txt
