#!/usr/bin/env bash
# Train a small Qwen3 from scratch on 4 local ranks (dp_shard 2 x tp 2) and the Python standard library's sources, stop,
# resume on another mesh, convert, and generate with plain transformers.  bash launch/quickstart.sh [RUN_DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run_dir="${1:-runs/quickstart}"
if [ -e "$run_dir" ] && [ ! -f "$run_dir/recipe.toml" ]; then
    echo "$run_dir exists and is not from an earlier quickstart; give another directory" >&2
    exit 2
fi
rm -rf "$run_dir"
text="$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')/*.py"
common=(--set "data.path=$text" --set "run.dir=$run_dir")

echo "== 1. inspect the plan"
ndtrain inspect recipes/quickstart.toml "${common[@]}" --world-size 4

echo "== 2. train 40 of 80 steps on dp_shard 2 x tp 2, and save"
torchrun --nproc-per-node 4 --standalone -m ndtrain run recipes/quickstart.toml "${common[@]}" --set train.steps=40

echo "== 3. resume on another mesh, dp_shard 4, and train the other 40 steps"
torchrun --nproc-per-node 4 --standalone -m ndtrain run recipes/quickstart.toml "${common[@]}" \
    --set mesh.dp_shard=4 --set mesh.tp=1 --set train.micro_batch_size=2

echo "== 4. convert to safetensors"
ndtrain convert "$run_dir/checkpoints/step-00000080" "$run_dir/hf"

echo "== 5. load with plain transformers and generate"
python - "$run_dir/hf" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = "def __init__(self, "
ids = tokenizer(prompt, return_tensors="pt").input_ids
print(repr(tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=False)[0])))
PYTHON
