#!/usr/bin/env bash
# Installs a wheel into a new, clean environment and uses it there: check_wheel.sh dist/memdec-*.whl
# Run from the project's root; the environment is thrown away.
set -euo pipefail
wheel=$(realpath "$1")
constraints=$(realpath constraints.txt)
script=$(realpath tests/packaging/use_installed.py)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT

if unzip -l "$wheel" 2>/dev/null | grep -E 'libtorch|libc10|libcuda'; then
  echo "the wheel carries a torch or CUDA library" >&2
  exit 1
fi
"${PYTHON:-python3}" -m venv "$room/venv"
pip=("$room/venv/bin/python" -m pip install -q --disable-pip-version-check -c "$constraints")
"${pip[@]}" "$(grep '^torch==' "$constraints")"
"${pip[@]}" "$wheel"
cd "$room" # so that nothing is imported from the checkout
"$room/venv/bin/python" "$script"
"$room/venv/bin/memdec" --help >/dev/null
echo "the wheel works: $(basename "$wheel")"
