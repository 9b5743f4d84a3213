#!/usr/bin/env bash
# A libcuda.so.1 whose every function reports CUDA_ERROR_NO_DEVICE, so that programs built with `--features cuda` start on
# a machine without a driver and can be seen to say that there is no GPU:
#
#     source scripts/cuda-toolchain.sh
#     scripts/no-gpu-driver.sh /tmp/no-gpu
#     LD_LIBRARY_PATH=/tmp/no-gpu:$CUDA_HOME/lib cargo test --release --features cuda --test gpu
#
# Never for a machine that has a driver: this one would hide it.
set -euo pipefail

directory=${1:?usage: no-gpu-driver.sh DIRECTORY, after sourcing cuda-toolchain.sh}
for candidate in "$CUDA_HOME"/lib/libcuda.so "$CUDA_HOME"/lib64/stubs/libcuda.so; do
  [ ! -e "$candidate" ] || names_from=$candidate
done
mkdir -p "$directory"
{
  nm -D --defined-only "${names_from:?no libcuda.so below CUDA_HOME to take the names from}" |
    awk '$2 == "T" && $3 !~ /^cuGetError/ { print "int " $3 "(void) { return 100; }" }'
  echo 'int cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_NO_DEVICE"; return 0; }'
  echo 'int cuGetErrorString(int e, const char **s) { *s = "no CUDA-capable device is detected"; return 0; }'
} >"$directory/driver.c"
cc -w -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$directory/libcuda.so.1" "$directory/driver.c"
