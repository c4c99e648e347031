#!/usr/bin/env bash
# The GPU's part of the benchmarks on a machine that has torch, transformers and no network.
#
#   benchmarks/gpu.sh wheels FOLDER [3.12]   where there is a network: what such a machine lacks
#   benchmarks/gpu.sh run FOLDER [ARGUMENTS]  there: python -m benchmarks gpu ARGUMENTS
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in
wheels)
  platforms="--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64"
  # shellcheck disable=SC2086
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "${3:-3.12}" \
    --implementation cp $platforms --dest "$2" \
    datasets dill==0.4.1 multiprocess==0.70.19 xxhash peft gguf brotli trl==1.16.0 liger-kernel \
    papermill nbconvert nbformat ipython traitlets
  ;;
run)
  wheels=$2; shift 2
  site=$(mktemp -d)
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  PYTHONPATH="$site:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 \
    python3 -m benchmarks gpu "$@"
  ;;
*)
  sed -n '2,5p' "$0"; exit 2
  ;;
esac
