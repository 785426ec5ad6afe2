#!/usr/bin/env bash
# The comparison with every rival on the PostgreSQL 15 manual (Debian's postgresql-doc-15), from nothing:
#
#   bash bench/domain_postgresql.sh OUT [--tokens N] [--epochs N] [further options of memdec fit]
#
# SmolLM2-135M is the base; a page is a document; the split is by hash with seed 0. Stopped, the same command continues. The table
# is in OUT/comparison (comparison.html, .json, .md, .tex). Wants memdec with its extras demo, corpus and rivals on the PATH
# (or in .venv/bin, as `make .venv/test.stamp .venv/demo.stamp` leaves it), and apt-get where the manual is not installed.
# --tokens 0 takes the whole manual, 1.8M tokens. On two CPU cores with bf16 instructions the default takes about an hour and a half.
set -euo pipefail
out=${1:?usage: bash bench/domain_postgresql.sh OUT [--tokens N] [--epochs N] [options of memdec fit]}
shift
tokens=130000 epochs=3
while [ $# -gt 0 ]; do
  case $1 in
    --tokens) tokens=$2; shift 2 ;;
    --epochs) epochs=$2; shift 2 ;;
    *) break ;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -x "$root/.venv/bin/memdec" ]; then PATH="$root/.venv/bin:$PATH"; fi
command -v memdec >/dev/null || { echo "memdec is not on the PATH; install it, or run 'make test' once." >&2; exit 1; }

mkdir -p "$out"
manual=/usr/share/doc/postgresql-doc-15/html
if [ ! -d "$manual" ]; then
  manual=$(cd "$out" && pwd)/manual/usr/share/doc/postgresql-doc-15/html
  if [ ! -d "$manual" ]; then
    command -v apt-get >/dev/null || { echo "Install the package postgresql-doc-15 first: there is no apt-get here." >&2; exit 1; }
    download=$(mktemp -d "$out/.download.XXXXXX")
    (cd "$download" && apt-get download postgresql-doc-15)
    rm -rf "$out/.manual"
    dpkg-deb -x "$download"/postgresql-doc-15_*.deb "$out/.manual"
    mv "$out/.manual" "$out/manual"
    rm -rf "$download"
  fi
fi
base=$(python -c 'from memdec.demo.model import default_cache_dir, smollm2_folder; print(smollm2_folder(default_cache_dir()))' | tail -1)
limit=()
if [ "$tokens" != 0 ]; then limit=(--max-tokens "$tokens"); fi
memdec fit "$base" "$manual" --out "$out" --seed 0 --context 512 --epochs "$epochs" "${limit[@]}" "$@"
memdec evaluate --base "$base" --memory "$out/memory" --text "$out/corpus" --compare all --out "$out/comparison"
