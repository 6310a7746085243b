#!/usr/bin/env bash
# Make the environment: setup.sh ENV PREFIX PYTHON TORCH_INDEX EXTRAS (called by the Makefile).
set -euo pipefail
env=$1 prefix=$2 python=$3 torch_index=$4 extras=$5

stop() { echo "setup: $*" >&2; exit 1; }

if [ "$env" = current ]; then
  [ -n "$prefix" ] || stop "ENV=current needs an active conda or virtual environment (neither VIRTUAL_ENV nor CONDA_PREFIX is set)"
  python=$prefix/bin/python
else
  command -v "$python" >/dev/null || stop "PYTHON=$python was not found; install Python 3.11 to 3.13 or name another with PYTHON=..."
fi
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  stop "Python 3.11 to 3.13 is needed, $python is $("$python" -c 'import platform; print(platform.python_version())'); name another with PYTHON=..."

if [ "$env" != current ] && [ ! -x "$prefix/bin/python" ]; then
  "$python" -c 'import ensurepip, venv' 2>/dev/null || stop "Python's venv module is missing; install it with: apt install python3-venv"
  "$python" -m venv "$prefix"
fi
pip=("$prefix/bin/python" -m pip install --quiet --constraint constraints.txt)
echo "setup: installing into $prefix${extras:+ $extras} (several minutes the first time) ..."
# Only torch itself comes from PyTorch's index, which mirrors few of its dependencies in our versions.
[ -z "$torch_index" ] || "${pip[@]}" --index-url "$torch_index" --no-deps --force-reinstall torch
"${pip[@]}" --editable ".$extras"
