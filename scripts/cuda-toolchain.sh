# shellcheck shell=bash
# A CUDA 13.0 compiler for machines that have neither CUDA nor a GPU, so that `--features cuda` compiles and links.
#
#     source scripts/cuda-toolchain.sh
#
# It needs Linux, Python 3 with venv, pip, and a C++ compiler. The first use downloads NVIDIA's own PyPI wheels into
# ${KAIO_CUDA_ROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/kaio-cuda-13.0}: about a minute, 1.2 GB on disk. Later uses only set
# variables. Where nvcc is on PATH and a libcuda can be linked, it changes nothing and says so.
#
# What it makes is for building. There is no driver in it: libcuda.so is a stand-in whose functions do nothing, and it is
# deliberately never put on LD_LIBRARY_PATH, where it would shadow a real driver and turn each call into a silent success.
#
# Two choices that look odd and are not:
# - 13.0, although newer wheels exist: a 580 driver refuses the PTX of a newer toolkit, and candle's kernels are PTX.
# - CUDA_HOME and LIBRARY_PATH, not RUSTFLAGS=-L…: Cargo hashes RUSTFLAGS into every crate, so setting it rebuilds all of
#   them, candle's CUDA kernels (about 13 minutes) included. For the same reason the values below should not change from
#   one shell to the next: CUDA_COMPUTE_CAP alone decides whether those kernels are built again.
#
# Sourced, this file only looks and exports. The set-up is a second bash that runs this same file with --install, so that
# its strict mode, its traps and its functions cannot reach the caller's shell.

if [ -z "${BASH_VERSION:-}" ]; then
  echo "cuda-toolchain: please source me from bash" >&2
  # shellcheck disable=SC2317 # reached when the file is executed instead of sourced
  return 1 2>/dev/null || exit 1
fi

# ---- the set-up: `bash scripts/cuda-toolchain.sh --install ROOT` ---------------------------------------------------------

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail

  say() { echo "cuda-toolchain: $*" >&2; }
  die() {
    say "error: $*"
    exit 1
  }

  if [ "${1:-}" != --install ] || [ -z "${2:-}" ]; then
    die "this file is to be sourced: source scripts/cuda-toolchain.sh"
  fi
  root=$2

  [ "$(uname -s)" = Linux ] || die "NVIDIA publishes these wheels for Linux; on $(uname -s) install the CUDA toolkit itself"
  for need in python3 cc c++; do
    command -v "$need" >/dev/null || die "$need is needed and not on PATH"
  done
  # Never delete what we did not make: KAIO_CUDA_ROOT may have been pointed at somebody's home by mistake.
  if [ -e "$root" ] && ! rmdir "$root" 2>/dev/null; then
    die "$root exists and is not a finished toolchain. Either another set-up is at work there (wait for it), or one was" \
      "interrupted: remove it, or set KAIO_CUDA_ROOT to another place"
  fi

  # The compiler and its parts, the headers and libraries that cudarc links, and the two disassemblers (newer than the
  # compiler on purpose: they read its output, and 13.0 has no wheel of them). --no-deps below: the list is complete.
  wheels=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88
    nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35
    nvidia-cuda-cuobjdump==13.2.78 nvidia-cuda-nvdisasm==13.2.78
  )

  # Built beside its place and renamed into it when whole: nobody ever sees half a toolchain. Links are relative, so that
  # the rename breaks none.
  mkdir -p "$(dirname "$root")"
  build=$(mktemp -d "$root.setup.XXXXXX")
  trap 'rm -rf "$build"' EXIT
  chmod 755 "$build"

  say "setting up CUDA 13.0 in $root (once, about a minute)"
  python3 -m venv "$build/venv" || die "python3 -m venv failed (Debian and Ubuntu: apt install python3-venv)"
  "$build/venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    --no-deps --only-binary=:all: "${wheels[@]}" ||
    die "pip could not install the CUDA wheels; its own message is above. They need network access to PyPI (or a mirror," \
      "see pip config), a Linux x86_64 or aarch64 machine and 1.2 GB of disk in $(dirname "$root")"

  site=$("$build/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  toolkit=$site/nvidia/cu13
  [ -x "$toolkit/bin/nvcc" ] || die "the wheels hold no bin/nvcc where it was expected ($toolkit)"
  ln -s "${toolkit#"$build"/}" "$build/toolkit"

  # The wheels carry run-time names only (libcublas.so.13); the linker looks for libcublas.so, some tools in lib64.
  ln -sfn lib "$toolkit/lib64"
  for library in cudart:13 cublas:13 cublasLt:13 curand:10 nvrtc:13; do
    soname=lib${library%:*}.so.${library#*:}
    [ -e "$toolkit/lib/$soname" ] || die "the wheels hold no $soname"
    ln -sfn "$soname" "$toolkit/lib/lib${library%:*}.so"
  done

  # The stand-in driver: each name that the headers know and each version suffix the driver exports, all empty.
  # The soname is the real one, so a binary linked here finds the real driver where there is one.
  headers=("$toolkit/include/cuda.h")
  [ ! -e "$toolkit/include/cudaTypedefs.h" ] || headers+=("$toolkit/include/cudaTypedefs.h")
  grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "${headers[@]}" |
    awk '{ print $1; print $1 "_v2"; print $1 "_v3"; print $1 "_v4" }' | sort -u |
    awk '{ print "void " $1 "(void) {}" }' >"$build/libcuda.c"
  cc -w -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$toolkit/lib/libcuda.so" "$build/libcuda.c"

  # Better here, in seconds, than ten minutes into candle's kernels: nvcc refuses host compilers that are too new.
  printf '__global__ void k(float* x) { *x += 1.f; }\nint main() { k<<<1, 1>>>(nullptr); return 0; }\n' >"$build/probe.cu"
  "$build/toolkit/bin/nvcc" -arch=sm_90 -o "$build/probe" "$build/probe.cu" -lcuda -lcublas -lcurand -lnvrtc ||
    die "nvcc is installed and cannot compile a five-word kernel; its message is above (a host compiler that is too new?" \
      "NVCC_CCBIN=/path/to/an/older/g++ names another)"
  rm -f "$build"/probe* "$build/libcuda.c"

  touch "$build/ready"
  # -T: if somebody else was faster, fail rather than move into their directory; theirs is as good as ours.
  if mv -T "$build" "$root" 2>/dev/null; then
    trap - EXIT
  elif [ ! -e "$root/ready" ]; then
    die "could not rename $build to $root"
  fi
  say "ready"
  exit 0
fi

# ---- sourced: look, install if need be, export ---------------------------------------------------------------------------

# True if the linker will find a libcuda: in a toolkit (which ships one to link against, in stubs), in LIBRARY_PATH, or in
# the loader's cache. The places are those where cudarc's build script looks.
_kaio_cuda_has_libcuda() {
  local dir sub
  local -a roots=() dirs=()
  for dir in "${CUDA_HOME:-}" "${CUDA_PATH:-}" "${CUDA_ROOT:-}" "${CUDA_TOOLKIT_ROOT_DIR:-}"; do
    [ -z "$dir" ] || roots+=("$dir")
  done
  [ ${#roots[@]} -gt 0 ] || roots=(/usr /usr/local/cuda /opt/cuda /usr/lib/cuda)
  IFS=: read -ra dirs <<<"${LIBRARY_PATH:-}"
  for dir in "${roots[@]}"; do
    for sub in lib lib/stubs lib64 lib64/stubs lib/x86_64-linux-gnu lib/aarch64-linux-gnu targets/x86_64-linux/lib{,/stubs} \
      targets/sbsa-linux/lib{,/stubs}; do
      dirs+=("$dir/$sub")
    done
  done
  # Where cc itself always looks.
  dirs+=(/usr/lib/x86_64-linux-gnu /usr/lib/aarch64-linux-gnu /usr/lib64 /usr/lib /lib64 /lib)
  for dir in "${dirs[@]}"; do
    [ -z "$dir" ] || [ ! -e "$dir/libcuda.so" ] || return 0
  done
  return 1
}

_kaio_cuda_use() {
  local found self root
  if found=$(command -v nvcc) && _kaio_cuda_has_libcuda; then
    echo "cuda-toolchain: using the CUDA compiler that is on PATH ($found); nothing changed" >&2
    if [ -z "${CUDA_COMPUTE_CAP:-}" ] && ! command -v nvidia-smi >/dev/null; then
      echo "cuda-toolchain: no nvidia-smi here to ask for the GPU's generation: export CUDA_COMPUTE_CAP=90 (or yours)" >&2
    fi
    return 0
  fi
  [ -z "$found" ] ||
    echo "cuda-toolchain: $found is on PATH, but no libcuda.so to link was found; setting up one that is complete" >&2

  if [ -z "${KAIO_CUDA_ROOT:-}${XDG_CACHE_HOME:-}${HOME:-}" ]; then
    echo "cuda-toolchain: error: set HOME or KAIO_CUDA_ROOT" >&2
    return 1
  fi
  root=${KAIO_CUDA_ROOT:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/kaio-cuda-13.0}
  root=${root%/}
  case $root in
    /*) ;;
    *) root=$PWD/$root ;; # cargo runs build scripts elsewhere
  esac
  if [ ! -e "$root/ready" ] || [ ! -x "$root/toolkit/bin/nvcc" ]; then
    self=${BASH_SOURCE[0]}
    bash "$self" --install "$root" || return 1
  fi

  export CUDA_HOME=$root/toolkit CUDA_PATH=$root/toolkit CUDA_ROOT=$root/toolkit
  export PATH="$CUDA_HOME/bin:$PATH" LIBRARY_PATH="$CUDA_HOME/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
  # Without this, candle's kernels ask nvidia-smi, which is not here. 90 is Hopper.
  export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}"
  echo "cuda-toolchain: CUDA 13.0 from $root, compute capability $CUDA_COMPUTE_CAP" >&2
}

# The last command decides what `source` returns, after the helpers' names are gone again.
if _kaio_cuda_use; then
  unset -f _kaio_cuda_use _kaio_cuda_has_libcuda
else
  unset -f _kaio_cuda_use _kaio_cuda_has_libcuda
  return 1
fi
