#!/usr/bin/env bash
# Runs tests of the GPU suite on an emulated GPU, where there is none (x86-64 Linux). Those that need no more on the
# device than this crate's kernels, which KAIO_RESULTS_ALONE=1 asks of the tables: tests/emulator/src/lib.rs says more.
#
#     source scripts/cuda-toolchain.sh
#     scripts/emulated-gpu.sh matmul_kinds attention_kinds
#     KAIO_ARCH=sm_80 scripts/emulated-gpu.sh attention_kinds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -gt 0 ] || { echo 'usage: emulated-gpu.sh FILTER..., after sourcing cuda-toolchain.sh' >&2; exit 2; }
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
cargo build --release --manifest-path tests/emulator/Cargo.toml

export KAIO_REQUIRE_GPU=1 KAIO_RESULTS_ALONE=1 KAIO_RANDOM_CASES=${KAIO_RANDOM_CASES:-60}
export LD_LIBRARY_PATH=$CUDA_HOME/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# For the tests alone: Cargo and the compiler want no driver.
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$CARGO_TARGET_DIR/release/libemulator.so"
exec cargo test --release --features cuda --test gpu -- --test-threads=1 "$@"
