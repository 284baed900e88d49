#!/usr/bin/env bash
# What is measured on one GPU, for machines that are lent by the minute and have no network:
#
#   pip download --dest wheels --no-deps datasets evaluate simplejpeg ...    # beforehand: what `check` says is missing
#   benchmarks/gpu.sh check  OUTPUT WHEELS           # installs, runs the models' fast tests, times each family's trainer
#   benchmarks/gpu.sh step   OUTPUT GROUP            # a group of step.yaml, "batch 256": speed, memory, kernels, waits
#   benchmarks/gpu.sh study  OUTPUT DATA [MINUTES]   # the transfer study; DATA holds its datasets. Code 75: call again
set -euo pipefail
part=$1 output=$(realpath -m "$2")
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
mkdir -p "$output"
case $part in
check)
    python3 -m pip install --quiet --no-index --find-links "$3" datasets evaluate simplejpeg mlxtend pytest
    python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
    python3 -m pytest tests/modeling -m "not slow"
    for family in mae cl_mae cmae; do
        python3 -m clmae bench --family "$family" --model_size small --image_size 96 --patch_size 8 --bf16 true
    done | tee "$output/bench.txt"
    ;;
step)
    python3 benchmarks/step.py --preset gpu --only "$3" --output "$output"
    ;;
study)
    mkdir -p "$output/study"
    cd "$3"
    python3 "$OLDPWD/benchmarks/study.py" run transfer_study --scale gpu --dataset tiny-imagenet \
        --output_dir "$output/study" --minutes "${4:-9}"
    ;;
*)
    echo "gpu.sh: $part is none of check, step, study" >&2
    exit 2
    ;;
esac
