#!/usr/bin/env bash
# Trains the small model of examples/train_gpt from several seeds: in this crate's ops in bf16, in candle's in f32, and in PyTorch
# in bf16, from the same weights and on the same batches; and says whether they differ by less than seeds do.
#
#     scripts/loss_curves.sh cuda:0 1 2 3    # or cpu; the seeds
#
# 500 steps each, or $STEPS. Losses go to out/losses (or $OUT) as CSV. $PYTHON is a Python with PyTorch; $GPT a built example, where
# there is no cargo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -gt 2 ] || { echo 'usage: loss_curves.sh DEVICE SEED SEED...' >&2; exit 2; }
device=$1
shift
out=${OUT:-out/losses}
features=()
[ "$device" = cpu ] || features=(--features cuda)
read -ra gpt <<<"${GPT:-cargo run --quiet --release ${features[*]} --example train_gpt --}"

mkdir -p "$out"
runs=()
for seed in "$@"; do
    "${gpt[@]}" --device "$device" --seed "$seed" --steps "${STEPS:-500}" --reference --sample 0 \
        --export "$out/run-$seed.safetensors" --log "$out/ours-$seed.csv" --out "$out/$seed"
    "${PYTHON:-python3}" scripts/torch_train_gpt.py "$out/run-$seed.safetensors" "$out/torch-$seed.csv"
    runs+=("$out/ours-$seed.csv,$out/torch-$seed.csv")
done
python3 scripts/compare_losses.py --seeds "${runs[@]}"
