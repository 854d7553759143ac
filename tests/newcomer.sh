#!/usr/bin/env bash
# A newcomer's first day: build the wheel, install it into an empty environment, and use fastdpo without the repository.
#
#     tests/newcomer.sh [FOLDER]
#
# It takes some minutes. Every step must end as the newcomer expects, say something, and show no traceback.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
day=${1:-$(mktemp -d)}
mkdir -p "$day" && day=$(cd "$day" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} FASTDPO_CACHE="$day/cache/fastdpo" HF_HOME="$day/cache/huggingface"

step() { # step EXPECTED_CODE TITLE COMMAND...
    local expected=$1 title=$2 code=0
    shift 2
    echo "== $title"
    "$@" >"$day/out.txt" 2>&1 || code=$?
    tail -n 4 "$day/out.txt"
    [[ -s "$day/out.txt" ]] || { echo "FAILED: not a word"; exit 1; }
    if grep -q "Traceback (most recent" "$day/out.txt" || [[ $code != "$expected" ]]; then
        echo "FAILED with code $code, expected $expected:"
        cat "$day/out.txt"
        exit 1
    fi
}

cd "$day"
python3 -m venv venv
PATH="$day/venv/bin:$PATH"
cp -r "$repository" source && rm -rf source/.venv source/build source/dist
step 0 "build and install the wheel" pip install -c source/constraints.txt "./source[peft]"
rm -rf source

step 0 "look around" fastdpo --help
step 0 "is my machine all right?" fastdpo doctor
step 0 "the demo" fastdpo demo
test -f fastdpo-demo/run/report.html

mkdir my_pairs
python - <<'PYTHON'
import json, random
random.seed(3)
rows = []
for number in range(120):
    a, b = random.randint(2, 99), random.randint(2, 99)
    rows.append({"prompt": f"What is {a} plus {b}?", "chosen": f" {a + b}", "rejected": f" It is about {a + b + random.randint(1, 9)}."})
for name, part in (("train", rows[:96]), ("test", rows[96:])):
    with open(f"my_pairs/{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in part)
PYTHON
mine=(--dataset_name my_pairs --model_name_or_path fastdpo-demo/run)

step 0 "what would it need?" fastdpo plan "${mine[@]}" --gpu_memory 80 --output_dir runs/plan
step 2 "a mistyped setting" fastdpo train "${mine[@]}" --learning_rat 1e-4
step 0 "my own pairs" fastdpo train "${mine[@]}" --output_dir runs/full --num_train_epochs 2 --learning_rate 1e-4
step 1 "the same command again must not overwrite" fastdpo train "${mine[@]}" --output_dir runs/full
step 0 "a LoRA adapter" fastdpo train "${mine[@]}" --use_peft --lora_r 8 --output_dir runs/lora --learning_rate 1e-3
step 0 "merge it" fastdpo merge runs/lora --output_dir runs/merged

long=("${mine[@]}" --output_dir runs/long --num_train_epochs 40 --save_steps 5 --logging_steps 5)
stopped() { # as a scheduler does it, when the run has its first checkpoint
    fastdpo train "${long[@]}" &
    until compgen -G "runs/long/checkpoint-*" || ! kill -0 $!; do sleep 0.2; done
    kill -TERM $!
    wait $!
}
step 143 "a run that the scheduler stops" stopped
step 0 "go on where it stopped" fastdpo train "${long[@]}" --max_steps 60 --resume_from_checkpoint auto
test -f runs/long/model.safetensors

step 0 "the reference, once for all runs" fastdpo precompute "${mine[@]}" --output_dir runs/cache
step 0 "rewards of the trained model" fastdpo score --dataset_name my_pairs --model_name_or_path runs/full \
    --ref_model_name_or_path fastdpo-demo/run --output_dir runs/scores
test "$(wc -l <runs/scores/scores.jsonl)" -eq 24
step 0 "how fast is the head here?" fastdpo bench head --smoke --peers PyTorch --repetitions 2
step 0 "the table of that" fastdpo bench report
step 0 "the model answers" python -c "
from transformers import pipeline
print(pipeline('text-generation', model='runs/merged')('What is 3 plus 4?', max_new_tokens=4)[0]['generated_text'])"
echo "== a good day"
