# make demo         SFT, self-play and online ranking on sums, to out/addition/report.md
# make demo-text    pretrain, fine-tune and self-play on docstrings, to out/demo/report.md
# make demo-seeds   make demo-text for three seeds, to out/demo_seeds/report.md: mean and spread
# make test         the quick tests
# make test-slow    the other tests: whole pipelines, several processes, every kill
# make test-faults  kills, full disks, damaged files, hanging ranks; FAULT_SEED=2 for another draw
# make test-peers   objectives against TRL, Liger and choix, tools/hf.py against transformers
# make lint         ruff format and ruff check
# make format       format the code
# make bench        benchmarks beside transformers and TRL, to bench/log.txt
# make bench-online  a GRPO step and rounds of online ranking beside TRL
# make gpu          every check and measurement for one GPU, to GPU_OUT; at most 7 minutes
#
# The studies, each to its folder in studies/:
# make figures-tn, figures-tn-map, figures-tn-play     T_n; RANKED=ranked.jsonl.gz, FULL=1
# make rlhf LOCAL=FOLDER                               reward model, PPO, preference objectives
# make frontier                                        RLHF or DPO: true reward against KL

PYTHON ?= python3
PY = .venv/bin/python
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
OUT ?= out/demo
SEED ?= 1337
FAULT_SEED ?= 1
LOCAL ?=
JOBS ?= 2
LOG ?= log
GPU_OUT ?= out/gpu
SHELL = bash
.SHELLFLAGS = -o pipefail -c

.PHONY: demo demo-online demo-baselines student pipeline demo-text demo-seeds \
	test test-slow test-faults test-peers lint format bench bench-online gpu \
	figures-tn figures-tn-map figures-tn-play rlhf frontier

# ---- environments

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) $(PIP_INSTALL) -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(PY) $(PIP_INSTALL) -r requirements-dev.txt
	touch $@

.venv-peers/ready: requirements.txt tests/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python $(PIP_INSTALL) torch==2.13.0
	.venv-peers/bin/python $(PIP_INSTALL) -r tests/peers/requirements.txt
	touch $@

.venv-bench/ready: requirements.txt bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(PIP_INSTALL) torch==2.13.0
	.venv-bench/bin/python $(PIP_INSTALL) -r bench/requirements.txt
	touch $@

# ---- the demos. Every line may be interrupted: run again, it resumes; a finished run is left alone

# on sums: tiny models, so one thread each, and the baselines beside the online run
SUMS = out/addition
SUMS_SEED ?= 1
TRAIN_SUMS = OMP_NUM_THREADS=1 $(PY) train.py config/demo/addition_

data/sums/prompts/meta.json: | .venv/ready
	$(PY) -m data.addition.prepare --answers=1500 --out=data/sums

demo: .venv/ready data/sums/prompts/meta.json
	$(TRAIN_SUMS)sft.py --seed=$(SUMS_SEED)
	$(MAKE) -j2 demo-online demo-baselines
	$(PY) -m tools.demo $(SUMS)

demo-online:
	$(TRAIN_SUMS)online_pl.py --seed=$(SUMS_SEED)

demo-baselines:
	@echo "beside it run sft_more and spin; they print to $(SUMS)/sft_more.log and spin.log"
	@$(TRAIN_SUMS)sft_more.py --seed=$(SUMS_SEED) > $(SUMS)/sft_more.log 2>&1
	@$(TRAIN_SUMS)spin.py --seed=$(SUMS_SEED) > $(SUMS)/spin.log 2>&1

# on text
data/pydocs/meta.json: data/pydocs/prepare.py | .venv/ready
	$(PY) -m data.pydocs.prepare

student: .venv/ready data/pydocs/meta.json
	$(PY) train.py config/demo/pretrain.py --out_dir=$(OUT)/pretrain --seed=$(SEED)
	$(PY) train.py config/demo/sft.py --out_dir=$(OUT)/sft --init=$(OUT)/pretrain --seed=$(SEED)

pipeline: student
	$(PY) train.py config/demo/pretrain_teacher.py \
		--out_dir=$(OUT)/pretrain_teacher --seed=$(SEED)
	$(PY) train.py config/demo/sft_teacher.py \
		--out_dir=$(OUT)/sft_teacher --init=$(OUT)/pretrain_teacher --seed=$(SEED)
	$(PY) train.py config/demo/sft_more.py \
		--out_dir=$(OUT)/sft_more --init=$(OUT)/sft --seed=$(SEED)
	$(PY) train.py config/demo/spin_k2.py \
		--out_dir=$(OUT)/spin_k2 --init=$(OUT)/sft --seed=$(SEED)
	$(PY) train.py config/demo/spin_k3.py \
		--out_dir=$(OUT)/spin_k3 --init=$(OUT)/sft --teacher=$(OUT)/sft_teacher --seed=$(SEED)
	$(PY) train.py config/demo/online_pl.py \
		--out_dir=$(OUT)/online_pl --init=$(OUT)/sft --seed=$(SEED)
	$(PY) eval.py \
		sft=$(OUT)/sft \
		sft@1.0=$(OUT)/sft@1.0 \
		sft@0.7=$(OUT)/sft@0.7 \
		sft@0.5=$(OUT)/sft@0.5 \
		sft_more=$(OUT)/sft_more \
		spin_k2.round_0=$(OUT)/spin_k2/round_0 \
		spin_k2.round_1=$(OUT)/spin_k2/round_1 \
		spin_k3.round_0=$(OUT)/spin_k3/round_0 \
		spin_k3.round_1=$(OUT)/spin_k3/round_1 \
		online_pl.round_1=$(OUT)/online_pl/round_1 \
		sft_teacher=$(OUT)/sft_teacher \
		--judge=$(OUT)/sft_teacher --data=data/pydocs --out=$(OUT)/eval

demo-text: pipeline
	$(PY) -m tools.plot report $(OUT)

demo-seeds:
	for seed in 1 2 3; do \
		$(MAKE) pipeline OUT=out/demo_seeds/$$seed SEED=$$seed || exit 1; \
	done
	$(PY) -m tools.plot report out/demo_seeds/1 out/demo_seeds/2 out/demo_seeds/3

# ---- tests. The models are tiny: one thread each is fastest

test: .venv/ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m "not slow" tests

test-slow: .venv/ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m slow tests

test-faults: .venv/ready-dev
	$(PY) -m tests.faults --seed=$(FAULT_SEED)

test-peers: .venv-peers/ready
	.venv-peers/bin/python -m pytest -q tests/peers

lint: .venv/ready-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

format: .venv/ready-dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# ---- studies and benchmarks

TAYLOR = $(PY) -m studies.taylor.run
TAYLOR_OPTIONS = --jobs=$(JOBS) $(if $(FULL),--full) $(if $(RANKED),--ranked='$(RANKED)')

figures-tn: .venv/ready
	$(TAYLOR) main $(TAYLOR_OPTIONS)

figures-tn-map: .venv/ready
	$(TAYLOR) map $(TAYLOR_OPTIONS)

figures-tn-play: student
	$(TAYLOR) play $(TAYLOR_OPTIONS) --demo=$(OUT)

rlhf: .venv/ready
	JOBS=$(JOBS) studies/rlhf/run.sh '$(LOCAL)'

frontier: .venv/ready data/pydocs/meta.json
	$(PY) -m studies.frontier.frontier

bench: .venv-bench/ready
	.venv-bench/bin/python -m bench.bench --peers 2>bench/$(LOG).err | tee bench/$(LOG).partial
	mv bench/$(LOG).partial bench/$(LOG).txt

bench-online: .venv-bench/ready
	.venv-bench/bin/python -m bench.bench online --peers

# with PYTHON and its packages: its torch must have CUDA
gpu:
	PYTHON=$(PYTHON) bash bench/gpu.sh $(GPU_OUT)
