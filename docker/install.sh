#!/usr/bin/env bash
# Installs M5. The Makefile runs these steps (and so does CI, in a clean virtual environment), and so do both images.
#
#   docker/install.sh requirements cpu|cuda VENV   the pinned set, into VENV; made with $PYTHON where it is missing
#   docker/install.sh project VENV                 m5 itself, from this folder, without touching the set
#
# They are two steps so that a change of the code leaves an image's layer with the set, some gigabytes, as it is.
# From the environment: PYTHON (a Python 3.11; default python3.11), PIP_ARGS (more options for pip, split at blanks).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  echo "usage: docker/install.sh requirements cpu|cuda VENV, or docker/install.sh project VENV" >&2
  exit 2
}

install_with_pip() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

make_venv() {
  local python="${PYTHON:-python3.11}"
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "M5's pinned set is for Python 3.11. Say where it is: make PYTHON=/path/to/python3.11" >&2
    exit 1
  }
  # pip comes last into a virtual environment, so one without it was interrupted.
  test -x "$venv/bin/pip" || "$python" -m venv --clear "$venv"
}

install_requirements() {
  local pip_args
  read -r -a pip_args <<<"${PIP_ARGS:-}"
  make_venv
  echo "Installing requirements/$set.txt into $venv: some minutes and 3 GB the first time."
  install_with_pip "${pip_args[@]}" -r "requirements/$set.txt"
  # torchrec's metadata names fbgemm-gpu, which would overwrite fbgemm-gpu-cpu.
  install_with_pip "${pip_args[@]}" --no-deps -r requirements/no-deps.txt
}

case "${1:-} $#" in
  "requirements 3")
    set="$2" venv="$3"
    test -f "requirements/$set.txt" || usage
    install_requirements
    ;;
  "project 2")
    venv="$2"
    install_with_pip --no-deps --no-build-isolation -e .
    ;;
  *) usage ;;
esac
