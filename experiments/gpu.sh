#!/usr/bin/env bash
# bash experiments/gpu.sh OUT: all that a GPU has to show, in at most 9 minutes on one H100 or H200. Needs no network.
#   (a) Atlas's four stages in bfloat16, the demo's numbers beside the CPU's (experiments/results/demo.json)
#   (b) experiments/compute.py with Llama-3.2-1B and 3B shapes: OUT/compute.json and compute.md, written round by round
#   (c) a run that is killed and resumed
# DRY=1: the same on a CPU with tiny sizes, about three minutes.   PYTHON=python3: which python.
set -u
OUT=$(mkdir -p "${1:?bash experiments/gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DRY=${DRY:-} RUN=$OUT/atlas
export HF_HUB_OFFLINE=1
LAUNCH="$PYTHON -m accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision"
[ -n "$DRY" ] && LAUNCH="$LAUNCH no --cpu" || LAUNCH="$LAUNCH bf16"
SHORT=${DRY:+--epochs 1}
STEPS=${DRY:+--steps 4 --batch_size 16 --mini_batch_size 8}

part() {  # part NAME SECONDS COMMAND...: one part's failure, or its time limit, does not stop the next
    local name=$1 limit=$2 started=$SECONDS; shift 2
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 && result=finished || result="FAILED or cut off: see $name.log"
    echo "$name: $result, $((SECONDS - started)) s" | tee -a "$OUT/summary.txt"
}

kill_and_resume() {
    flags="--model $RUN/sft --gvm $RUN/gvm --data $RUN/data --output $RUN/killed --steps 12 --save_steps 2"
    setsid $LAUNCH train_dvpo.py $flags $STEPS --steps 12 &
    launcher=$!
    until ls "$RUN"/killed/checkpoints/step_* >/dev/null 2>&1; do
        kill -0 $launcher || return 1
        sleep 0.2
    done
    kill -9 -- -$launcher
    $LAUNCH train_dvpo.py $flags $STEPS --steps 12 --resume || return 1
    $PYTHON -c "import json; steps = [json.loads(line)['step'] for line in open('$RUN/killed/metrics.jsonl')]
assert steps == list(range(1, 13)), steps"
}
export -f kill_and_resume
export RUN LAUNCH STEPS PYTHON

: >"$OUT/summary.txt"
part world 30 $PYTHON data/atlas.py world --output "$RUN" --overwrite
if [ -n "$DRY" ]; then
    for file in "$RUN"/data/*.jsonl; do head -n 160 "$file" >"$file.part" && mv "$file.part" "$file"; done
fi
part sft 60 $LAUNCH sft.py --model "$RUN/base" --data "$RUN/data" --output "$RUN/sft" --overwrite $SHORT
part gvm 80 $LAUNCH train_gvm.py --model "$RUN/sft" --data "$RUN/data" --output "$RUN/gvm" --overwrite $SHORT
part dvpo 60 $LAUNCH train_dvpo.py --model "$RUN/sft" --gvm "$RUN/gvm" --data "$RUN/data" --output "$RUN/dvpo" \
    --overwrite $STEPS
part values 30 $PYTHON evaluate.py values --models "$RUN/gvm" --data "$RUN/data" --output "$OUT/values.json" --overwrite
part policy 40 $PYTHON evaluate.py policy --models "$RUN/sft" "$RUN/dvpo" --data "$RUN/data" \
    --judge data/atlas.py:oracle --output "$OUT" --overwrite
part resume 60 bash -c kill_and_resume
if [ -n "$DRY" ]; then
    part compute_tiny 90 $PYTHON experiments/compute.py --shape tiny --prompt_length 16 --response_length 32 \
        --batch_size 16 --mini_batch_size 8 --micro_batch_size 4 --rounds 1 --steps 1 --output "$OUT"
else
    part compute_1b 120 $PYTHON experiments/compute.py --shape llama-3.2-1b --prompt_length 512 --response_length 512 \
        --batch_size 16 --mini_batch_size 8 --micro_batch_size 4 --gradient_checkpointing --rounds 2 --steps 1 \
        --output "$OUT"
    part compute_3b 60 $PYTHON experiments/compute.py --shape llama-3.2-3b --prompt_length 256 --response_length 256 \
        --batch_size 8 --mini_batch_size 4 --micro_batch_size 2 --gradient_checkpointing --rounds 1 --steps 1 \
        --methods DVPO ReMax GRPO --output "$OUT"       # PPO needs 16 bytes for each of 6.4 billion weights: 140 GB
fi
$PYTHON - "$OUT" <<'PY' | tee -a "$OUT/summary.txt"
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
cpu = json.loads(Path("experiments/results/demo.json").read_text())["seeds"]["1"]
policy = json.loads((out / "policy.json").read_text())
models, values = policy["models"], json.loads((out / "values.json").read_text())["models"]["gvm"]
rows = {"oracle score, SFT": (models["sft"]["score"]["mean"], cpu["sft"]["oracle_mean"]),
        "oracle score, DVPO": (models["dvpo"]["score"]["mean"], cpu["dvpo"]["oracle_mean"]),
        "KL, nats per answer": (models["dvpo"]["kl"]["mean"], cpu["dvpo"]["kl_to_ref"]),
        "pair accuracy, last value": (values["pair_accuracy"]["last"]["mean"], cpu["gvm"]["pair_accuracy"]["last"])}
print("\n| | here | CPU, demo.json, seed 1 |\n|---|---|---|")
for name, (here, there) in rows.items():
    print(f"| {name} | {here:.3f} | {there:.3f} |")
PY
