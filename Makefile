# make demo | make compare | make test        SEED=3: another seed.  PYTHON=python3 VENV= : the current environment, nothing installed
PYTHON ?= python3
VENV   ?= .venv
SEED   ?= 1
RUN    ?= runs/atlas
override RUN := $(patsubst %/,%,$(RUN))

ifeq ($(strip $(VENV)),)
PY        := $(PYTHON)
INSTALLED :=
ENGINES   :=
else
PY        := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
ENGINES   := $(VENV)/.engines
endif

help:
	@echo "make demo      Atlas from nothing: data, SFT, value model, DVPO, evaluation, figures; about 5 minutes"
	@echo "make compare   DVPO, PPO, GRPO, ReMax and DPO, five seeds; about 90 minutes on two cores (QUICK=1: about 12)"
	@echo "make claims    nine claims of the paper, against the truth: results/*.md; hours on two cores (QUICK=1: under 10 minutes)"
	@echo "make compute   time and memory of a step of each method, with a tiny model: about 4 minutes"
	@echo "make test      ruff and the whole test suite"
	@echo "make test-distributed  every script under DDP, ZeRO-1 to 3 and FSDP2 (two processes on CPU; about 20 minutes)"
	@echo "make test-resume  kills all training scripts at random moments and resumes them; minutes (KILLS=100: more)"
	@echo "make test-peers  losses and advantages against trl's and verl's own (installs them in .venv-peers)"
	@echo "options        SEED=3 (every seed) | RUN=folder (default runs/atlas) | PYTHON=python3 VENV= (no new environment)"

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# DeepSpeed, for the tests alone.
$(VENV)/.engines: $(VENV)/.installed tests/engines_requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/engines_requirements.txt
	@touch $@

# A demo with another seed is set aside under its seed's name, and taken up again when that seed is asked for.
demo: $(INSTALLED)
	@was=$$(sed -n 's/.*"seed": \([0-9]*\).*/\1/p' $(RUN)/base/args.json 2>/dev/null); \
	if [ -n "$$was" ] && [ "$$was" != "$(SEED)" ]; then \
	    if [ -e $(RUN)-seed$$was ]; then echo "error: $(RUN)-seed$$was is in the way: move it"; exit 1; fi; \
	    mv $(RUN) $(RUN)-seed$$was || exit 1; echo "the demo of seed $$was is now in $(RUN)-seed$$was"; fi; \
	if [ ! -e $(RUN) ] && [ -e $(RUN)-seed$(SEED) ]; then mv $(RUN)-seed$(SEED) $(RUN); fi
	@$(MAKE) --no-print-directory stages
	@$(PY) atlas.py summary --run $(RUN)

stages: $(addprefix $(RUN)/,figures/tokens.png figures/curves.png figures/wins.png eval/values.json eval/policy.json)

# Each stage waits for the stage before it and for its own script; --overwrite only replaces what is older than these.
$(RUN)/data/manifest.json: atlas.py
	$(PY) atlas.py world --output $(RUN) --seed $(SEED) --overwrite

$(RUN)/sft/model.safetensors: sft.py $(RUN)/data/manifest.json
	$(PY) sft.py --model $(RUN)/base --data $(RUN)/data --output $(RUN)/sft --seed $(SEED) --overwrite

$(RUN)/gvm/model.safetensors: train_gvm.py $(RUN)/sft/model.safetensors
	$(PY) train_gvm.py --model $(RUN)/sft --data $(RUN)/data --output $(RUN)/gvm --seed $(SEED) --overwrite

$(RUN)/dvpo/model.safetensors: train_dvpo.py $(RUN)/gvm/model.safetensors
	$(PY) train_dvpo.py --model $(RUN)/sft --gvm $(RUN)/gvm --data $(RUN)/data --output $(RUN)/dvpo --seed $(SEED) --overwrite

$(RUN)/eval/values.json: evaluate.py $(RUN)/gvm/model.safetensors
	$(PY) evaluate.py values --models $(RUN)/gvm --data $(RUN)/data --output $@ --seed $(SEED) --overwrite

$(RUN)/eval/policy.json: evaluate.py $(RUN)/dvpo/model.safetensors
	$(PY) evaluate.py policy --models $(RUN)/sft $(RUN)/dvpo --data $(RUN)/data --judge atlas.py:oracle --output $(RUN)/eval --seed $(SEED) --overwrite

$(RUN)/figures/tokens.png: figures.py $(RUN)/gvm/model.safetensors $(RUN)/dvpo/model.safetensors
	$(PY) figures.py tokens --gvm $(RUN)/gvm --policy $(RUN)/dvpo --output $(RUN)/figures --overwrite

$(RUN)/figures/curves.png: figures.py $(RUN)/dvpo/model.safetensors
	$(PY) figures.py curves --runs $(RUN)/dvpo --judge atlas.py:oracle --output $(RUN)/figures --overwrite

$(RUN)/figures/wins.png: figures.py $(RUN)/eval/policy.json
	$(PY) figures.py wins --results $(RUN)/eval/policy.json --output $(RUN)/figures --overwrite

# QUICK: one seed, 20 steps, the scripts' own learning rates, and nothing written to results/.
compare: $(INSTALLED)
ifdef QUICK
	$(PY) experiments/compare.py --seeds 11 --sweep_seeds --steps 20 --rounds 1 --runs runs/compare-quick --output runs/compare-quick
else
	$(PY) experiments/compare.py
endif

# Each is a script to be read and run alone. What is finished under runs/claims is kept: a stopped make claims goes on.
# QUICK: one seed, a tenth of data, steps and answers, and nothing written to results/.
CLAIMS := equivalence credit tau drift advantage kl scaling shift refresh
QUICKLY := $(if $(QUICK),--seeds 21 --jobs 1 --scale 0.1 --runs runs/claims-quick --output runs/claims-quick/results)
claims: $(INSTALLED)
	@for name in $(CLAIMS); do echo "==== $$name"; $(PY) experiments/$$name.py $(QUICKLY) || exit 1; done

test: $(INSTALLED) $(ENGINES)
	$(PY) -m ruff check .
	$(PY) -m pytest --numprocesses 2 --dist loadfile

# Every script under DDP, ZeRO-1 to 3 and FSDP2, two processes on CPU: about 20 minutes.
test-distributed: $(INSTALLED) $(ENGINES)
	$(PY) -m pytest -m distributed

# Tables 6 and 7; on a GPU, larger shapes: python experiments/compute.py --help.
compute: $(INSTALLED)
	$(PY) experiments/compute.py --shape tiny

# FUZZ=5000 make test: so many damaged files, rather than some hundred.
test-resume: $(INSTALLED)
	$(PY) tests/kill_resume.py --kills $(or $(KILLS),25)

# The formulas against trl's and verl's own, in an environment of its own.
test-peers: .venv-peers/.installed
	.venv-peers/bin/python -m pytest --noconftest tests/check_peers.py

.venv-peers/.installed: tests/peers_requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r tests/peers_requirements.txt
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps verl==0.9.1
	@touch $@

.PHONY: help demo stages compare claims compute test test-distributed test-resume test-peers
