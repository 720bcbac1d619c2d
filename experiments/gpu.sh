#!/usr/bin/env bash
# bash experiments/gpu.sh OUT: what a GPU has to show, in at most 9 minutes on an H100 or H200, all offline.
#   (a) Atlas's four stages in bfloat16, the demo's numbers beside the CPU's (experiments/results/demo.json)
#   (b) a run that is killed and resumed   (c) experiments/compute.py, shapes of Llama-3.2-1B and 3B
# OUT gets summary.md, log.txt and the results as they come; models stay in a temporary folder.
# DRY=1: on a CPU with tiny sizes, two minutes.   PYTHON=python3: which python.   PARTS=atlas, PARTS=compute: (a)
# and (b) alone, (c) alone.
set -u
OUT=$(mkdir -p "${1:?bash experiments/gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export RUN=$WORK/atlas HF_HUB_OFFLINE=1
PYTHON=${PYTHON:-python3} DRY=${DRY:-} PARTS=${PARTS:-atlas compute}
LAUNCH="$PYTHON -m accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no"
LAUNCH="$LAUNCH --mixed_precision bf16" COMPUTE="$PYTHON experiments/compute.py --steps 1 --output $OUT"
ROWS="--micro_batch_size 16" ONLINE="" SAMPLES="" SLOWER=1
if [ -n "$DRY" ]; then
    LAUNCH="$LAUNCH --cpu" ROWS="--epochs 1" SAMPLES="--samples 1" SLOWER=4
    ONLINE="--steps 4 --batch_size 16 --mini_batch_size 8 --max_response_length 16"
fi
if ! $PYTHON -c "import datasets" 2>/dev/null; then           # only hub data sets need it
    mkdir "$WORK/stub" && echo "load_dataset = None" >"$WORK/stub/datasets.py"
    export PYTHONPATH=$WORK/stub${PYTHONPATH:+:$PYTHONPATH}
fi

part() {  # part NAME SECONDS COMMAND...: its failure, or its time limit, does not stop the next part
    local name=$1 limit=$2 began=$SECONDS result=finished; shift 2
    echo "==== $name" >>"$OUT/log.txt"
    timeout -k 5 $((limit * SLOWER)) "$@" >>"$OUT/log.txt" 2>&1 || result="FAILED ($?; 124: cut off)"
    echo "$name: $result, $((SECONDS - began)) s" | tee -a "$OUT/summary.md"
}

kill_and_resume() {
    local run="$LAUNCH train_dvpo.py $DVPO --output $RUN/killed $ONLINE --steps 12 --save_steps 2"
    setsid $run & local group=$!
    trap "kill -9 -- -$group" TERM                            # in case the part is cut off here
    until ls "$RUN"/killed/checkpoints/step_* >/dev/null 2>&1; do
        kill -0 $group || return 1
        sleep 0.2
    done
    kill -9 -- -$group
    $run --resume && diff <(grep -o '"step": [0-9]*' "$RUN/killed/metrics.jsonl") <(seq -f '"step": %g' 12)
}
DATA="--data $RUN/data" DVPO="--model $RUN/sft --gvm $RUN/gvm --data $RUN/data"
export LAUNCH ONLINE DVPO; export -f kill_and_resume

: >"$OUT/summary.md"; : >"$OUT/log.txt"
if [[ $PARTS == *atlas* ]]; then
part world 20 $PYTHON data/atlas.py world --output "$RUN"
[ -z "$DRY" ] || sed -i '161,$d' "$RUN"/data/*.jsonl
part sft 60 $LAUNCH sft.py --model "$RUN/base" $DATA --output "$RUN/sft" $ROWS
part gvm 95 $LAUNCH train_gvm.py --model "$RUN/sft" $DATA --output "$RUN/gvm" $ROWS
part dvpo 50 $LAUNCH train_dvpo.py $DVPO --output "$RUN/dvpo" $ONLINE
part values 40 $PYTHON evaluate.py values --models "$RUN/gvm" $DATA --output "$RUN/eval/values.json"
part policy 30 $PYTHON evaluate.py policy --models "$RUN"/{sft,dvpo} $DATA --output "$RUN/eval" $SAMPLES
cp "$RUN"/eval/*.json "$OUT"
part resume 50 bash -c kill_and_resume
fi
if [[ $PARTS != *compute* ]]; then
    echo
elif [ -n "$DRY" ]; then
    part compute_tiny 60 $COMPUTE --shape tiny --rounds 1 --prompt_length 16 --response_length 16 \
        --batch_size 16 --mini_batch_size 8 --micro_batch_size 4
else
    part compute_1b 110 $COMPUTE --shape llama-3.2-1b --prompt_length 512 --response_length 512 \
        --batch_size 16 --mini_batch_size 8 --micro_batch_size 4 --gradient_checkpointing --rounds 2
    # PPO is last: it needs 16 bytes for each of 6.4 billion weights, and an H100 has 80 GB.
    part compute_3b 75 $COMPUTE --shape llama-3.2-3b --prompt_length 256 --response_length 256 \
        --batch_size 8 --mini_batch_size 4 --micro_batch_size 2 --gradient_checkpointing --rounds 1 \
        --methods DVPO GRPO PPO
fi
[[ $PARTS != *atlas* ]] || PYTHONPATH=data${PYTHONPATH:+:$PYTHONPATH} $PYTHON - <<'PY' >>"$OUT/summary.md" 2>>"$OUT/log.txt"
import atlas, json, os, pathlib
both = [atlas.read_summary(pathlib.Path(os.environ["RUN"])),
        json.loads(pathlib.Path("experiments/results/demo.json").read_text())["seeds"]["1"]]
rows = {"gain of DVPO over SFT": [x["dvpo"]["oracle_mean"] - x["sft"]["oracle_mean"] for x in both],
        "win rate": [x["dvpo"]["win_rate_vs_sft"] for x in both],
        "KL, nats per answer": [x["dvpo"]["kl_to_ref"] for x in both],
        "pair accuracy, mean value": [x["gvm"]["pair_accuracy"]["mean"] for x in both],
        "pair accuracy, last value": [x["gvm"]["pair_accuracy"]["last"] for x in both],
        **{f"seconds, {key}": [x["seconds"][key] for x in both] for key in both[0]["seconds"]}}
print("\n| | here | CPU, demo.json, seed 1 |\n|---|---|---|")
for name, (here, there) in rows.items():
    print(f"| {name} | {here:.3f} | {there:.3f} |")
PY
[[ $PARTS != *compute* ]] || tail -n +4 "$OUT/compute.md" >>"$OUT/summary.md"
cat "$OUT/summary.md"
