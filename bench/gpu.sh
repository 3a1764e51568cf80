#!/usr/bin/env bash
# bash bench/gpu.sh OUT [NAME ...] [--small]: every check and measurement for one GPU, see gpu.py
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.gpu "$@"
