#!/usr/bin/env bash
# Everything that needs a GPU, within 9 minutes and without a network: builds, tests, benchmarks, sanitizers.
#   scripts/gpu_check.sh [--part tests|bench|sanitize] [--output FOLDER] [--dry-run]
# The interpreter is $PYTHON, by default python3, which has to have torch, pytest, pybind11 and ninja.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
