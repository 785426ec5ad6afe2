#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes, on a machine with torch, nvcc and a build chain but no network:
#
#     bash bench/gpu/run.sh OUTDIR              build for this GPU, tests, sanitizers, benchmarks
#     bash bench/gpu/run.sh OUTDIR --rehearse   the same steps where there is no GPU: the CPU stands in for it
#     PARTS="bench" bash bench/gpu/run.sh OUT   some of: tests sanitizers decoding profiles bench
#
# OUTDIR gets a log a kind of step, steps.jsonl (a line a step), bench.jsonl (a line a contestant), profile.jsonl (a line a kernel)
# and decoding.jsonl (a line a pair), all with device, driver, versions and commit (MEMDEC_COMMIT=… where the folder has no git history). A step has a time limit of its own, and one that
# fails does not stop the others. The last thing printed is a table; the exit status is 0 if every step was green.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { echo "usage: bash bench/gpu/run.sh OUTDIR [--rehearse]" >&2; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
REHEARSE=no
[ "${2:-}" = --rehearse ] && REHEARSE=yes
PYTHON=${PYTHON:-python3}
PARTS=${PARTS:-tests sanitizers decoding profiles bench}
BUDGET=${BUDGET:-570} # seconds in all
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SITE=${MEMDEC_SITE:-$WORK/site} # where this build of memdec is installed; nothing else is touched. Given: one that is built already
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$WORK/triton}
if [ $REHEARSE = yes ]; then DEVICE=cpu CUDA=off; else DEVICE=cuda CUDA=on; fi
# A line a test: what ran out of time has told by then which failed. (pytest-benchmark warns once a worker.)
PYTEST=("$PYTHON" -m pytest -v -rfEs --tb=short -p no:cacheprovider -p no:benchmark)
BENCH=("$PYTHON" -m pytest -q -p no:cacheprovider)
rm -f "$OUT"/{build,tests,sanitizers,bench}.log "$OUT"/{steps,bench,decoding,profile}.jsonl

# step NAME LOG SECONDS COMMAND…: runs it within its time and what is left of the whole, and notes how it went. Steps may run
# side by side (&, then wait): what one has printed goes to its log when it ends.
step() {
  local name=$1 log=$OUT/$2.log limit=$3 begin=$SECONDS status=0 own
  shift 3
  own=$(mktemp "$WORK/step.XXXXXX")
  local left=$((BUDGET - SECONDS))
  [ "$limit" -gt $left ] && limit=$left
  echo "== $name (at $SECONDS s)" >"$own"
  if [ "$limit" -lt 5 ]; then
    echo "no time left" >>"$own"
    status=124
  else
    timeout --kill-after=5 "$limit" "$@" >>"$own" 2>&1 || status=$?
  fi
  cat "$own" >>"$log"
  "$PYTHON" bench/gpu/report.py step "$OUT" "$name" "$status" $((SECONDS - begin)) "$own"
}
# The same for a step that has shown something only if a test of it ran.
tests() { PASSES=wanted step "$@"; }
part() { [[ " $PARTS " == *" $1 "* ]]; }

[ -n "${MEMDEC_SITE:-}" ] || step build build 280 "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --disable-pip-version-check -v \
  --target "$SITE" --config-settings=cmake.define.MEMDEC_CUDA=$CUDA \
  --config-settings=cmake.define.MEMDEC_CUDA_ARCHITECTURES=native --config-settings=build-dir="$WORK/build" .
step "what it is" build 60 "$PYTHON" -c "import memdec, sys
print(memdec.__file__, memdec.build_info())
sys.exit(not memdec.__file__.startswith('$(realpath -m "$SITE")'))"

# What is not timed runs side by side: most of it waits for the CPU.
if part tests; then
  ops=(tests/ops tests/pipeline/test_search.py)
  [ $REHEARSE = yes ] && ops=(tests/ops/test_token_log_prob.py)
  tests "ops on $DEVICE" tests 200 "${PYTEST[@]}" -n "${WORKERS:-8}" --timeout=150 "${ops[@]}" -k "$DEVICE" &
  draws="frequencies or independent"
  [ $REHEARSE = yes ] || draws="$DEVICE and ($draws)"
  tests "chi-square of the samplers" tests 100 "${PYTEST[@]}" tests/ops/test_interpolate_sample.py -k "$draws" &
  if [ $REHEARSE = no ]; then
    for file in tests/cuda/test_gpu*.py; do
      tests "$(basename "$file" .py)" tests 200 "${PYTEST[@]}" -n 3 --timeout=150 "$file" &
    done
  else
    step "tests for a GPU, which skip here" tests 60 "${PYTEST[@]}" tests/cuda/test_gpu*.py &
  fi
fi

if part sanitizers; then
  # A few tests of each kernel, at small shapes: slowed down a hundred times, the rest would take an hour.
  small="edges or views or odd_addresses or lowest_of_equals or most_probable or absent or cuts_as or threshold"
  small="$DEVICE and ($small or small_temperature or outside_0_to_1 or cannot_check or without_mass)"
  files=(tests/ops/test_{token_log_prob,aggregate_neighbors,alignment_loss,interpolate_argmax,interpolate_sample,verify_draft,linear_of_rows}.py
    tests/pipeline/test_search.py)
  for tool in memcheck racecheck; do
    if [ $REHEARSE = yes ]; then
      step "what $tool would watch" sanitizers 60 "${PYTEST[@]}" --collect-only "${files[@]}" -k "$small" &
    else
      tests "compute-sanitizer $tool" sanitizers 200 compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20 \
        "${PYTEST[@]}" "${files[@]}" -k "$small" &
    fi
  done
fi
wait

if part decoding && [ $REHEARSE = no ]; then
  step "decoding" bench 110 "$PYTHON" bench/gpu/decoding.py --new-tokens 64 --out "$OUT/decoding.jsonl"
fi
if part profiles && [ $REHEARSE = no ]; then
  step "profiles" bench 75 "$PYTHON" bench/gpu/profiles.py --out "$OUT/profile.jsonl"
fi
if part bench; then
  # Last, since they take what time is left; those with goals first, which are in half precision. One process: to start a dozen
  # takes a minute.
  benches=(alignment_loss interpolate_argmax interpolate_sample interpolate_log_prob aggregate_neighbors decoding_step host_cost
    linear_of_rows linear_alignment_loss interpolate token_log_prob search training)
  [ $REHEARSE = yes ] && benches=(token_log_prob decoding_step linear_of_rows)
  # shellcheck disable=SC2046  # a word a file
  step "benches" bench 300 "${BENCH[@]}" -s --timeout=60 $(printf "bench/bench_%s.py " "${benches[@]}") --device=$DEVICE \
    -k "not float32" --json-lines="$OUT/bench.jsonl"
fi

"$PYTHON" bench/gpu/report.py table "$OUT"
