#!/usr/bin/env bash
# What to run on a machine with a GPU:  bench/device.sh STAGE...
#
#   build     the CUDA sources            check   every op against the fp64 reference
#   test      pytest -m gpu               sanitize  compute-sanitizer on a small set of ops
#   bench     our own figures             peers   the same beside every peer that is installed
#   tune      configuration tables        all     build check test sanitize bench peers
#
# Needs no network: Python with torch, typer and rich (test: pytest as well; build: setuptools, ninja, nvcc).
# Each stage prints a short summary last, leaves one JSON file under $OUT (default: bench/out), keeps its
# share of BUDGET seconds (default 560, so that one call fits into ten minutes), and says what it left out.
# Also read: PYTHON (python3), DEVICE (cuda), CASES (24, of the check), PYDECODE_COMMIT (where there is no git).
# bench/collect.py files the results.
set -uo pipefail
OUT=${OUT:+$(realpath -m "$OUT")}  # as the caller sees it
cd "$(dirname "$0")/.."

OUT=${OUT:-bench/out}
BUDGET=${BUDGET:-560}
PYTHON=${PYTHON:-python3}
export DEVICE=${DEVICE:-cuda}  # cpu: a rehearsal where there is no GPU
export PYTHONSAFEPATH=1  # the checkout itself is no installed package
STAGES=("$@")
[ ${#STAGES[@]} -gt 0 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
[ "${STAGES[*]}" != all ] || STAGES=(build check test sanitize bench peers)
for stage in "${STAGES[@]}"; do
  case $stage in build|check|test|sanitize|bench|peers|tune) ;; *) echo "unknown stage: $stage"; exit 2 ;; esac
done
mkdir -p "$OUT"
# an installed copy does not know its commit
commit=$(git rev-parse --short=12 HEAD 2>/dev/null) && [ -n "$(git status --porcelain)" ] && commit=$commit+
export PYDECODE_COMMIT=${PYDECODE_COMMIT:-$commit}
started=$SECONDS
failed=()

say() { printf '%s\n' "$*"; }
left() { echo $((BUDGET - (SECONDS - started))); }

# Shares of what is left, so that an early stage cannot eat a late one's time.
share() {
  local weight=0 mine=0 w s
  for s in "${waiting[@]}"; do
    case $s in build) w=2 ;; check) w=4 ;; test) w=4 ;; sanitize) w=4 ;; bench) w=4 ;; peers) w=6 ;; tune) w=8 ;; *) w=1 ;; esac
    weight=$((weight + w)); [ "$mine" != 0 ] || mine=$w
  done
  echo $(($(left) * mine / weight))
}

install() {
  $PYTHON -c 'import pydecode.bench.command' 2>/dev/null && return
  say "installing pydecode (no network, no dependencies)"
  local site=$PWD/bench/out/site
  $PYTHON -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target "$site" . 2>&1 | tail -12
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  $PYTHON -c 'import pydecode.bench.command' || { say "pydecode cannot be imported: see the last line above"; exit 1; }
}

# A stage's JSON: its facts, and the machine that they hold for.
result() {
  $PYTHON - "$OUT/$1.json" "$2" <<'PY'
import json, os, sys
from pydecode.check.report import machine
facts = dict(json.loads(sys.argv[2]), machine=machine(os.environ["DEVICE"]))
open(sys.argv[1], "w").write(json.dumps(facts) + "\n")
PY
}

machine() {
  $PYTHON - <<'PY'
import os
from pydecode.check.report import machine
device = os.environ["DEVICE"]
print(", ".join(f"{k} {v}" for k, v in machine(device).items() if v is not None))
PY
}

stage_build() {
  local sources
  sources=$(ls csrc/*.cu 2>/dev/null | wc -l)
  result build "{\"kind\": \"build\", \"sources\": $sources}"
  [ "$sources" = 0 ] && { say "no CUDA sources in csrc/ yet: nothing to build"; return 0; }
  timeout "$1" $PYTHON setup.py build_ext --inplace 2>&1 | tail -20
}

stage_check() {
  timeout "$1" $PYTHON -m pydecode.cli check --device $DEVICE --cases "${CASES:-24}" \
    --budget $(($1 * 4 / 5)) --json "$OUT/check.json" | tail -60
}

stage_test() {
  timeout "$1" $PYTHON -m pytest tests/test_gpu.py -m gpu -q --maxfail=20 -p no:cacheprovider \
    -c pyproject.toml --junitxml="$OUT/test.xml" | tail -25
  local status=${PIPESTATUS[0]}
  $PYTHON - "$OUT" <<'PY'
import json, os, sys, xml.etree.ElementTree as tree
from pathlib import Path
from pydecode.check.report import machine
out = Path(sys.argv[1])
if not (out / "test.xml").exists():
    sys.exit("pytest ran out of time")
suite = tree.parse(out / "test.xml").getroot().find("testsuite").attrib
result = {k: int(suite[k]) for k in ("tests", "failures", "errors", "skipped")}
(out / "test.json").write_text(json.dumps(dict(kind="test", machine=machine(os.environ["DEVICE"]), **result)) + "\n")
(out / "test.xml").unlink()
print(result)
if result["tests"] == result["skipped"] and os.environ["DEVICE"] != "cpu":
    sys.exit("no test ran")
PY
  local said=$?
  return $((status ? status : said))
}

stage_sanitize() {
  command -v compute-sanitizer >/dev/null || { say "compute-sanitizer is not installed"; return 1; }
  local tool each=$(($1 / 4)) status=0 verdicts=""
  for tool in memcheck racecheck initcheck synccheck; do
    # without the caching allocator, so that a read past a tensor is a read past an allocation
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$each" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      $PYTHON -m pydecode.cli check --device $DEVICE --cases 1 --seed 1 --dtype float16 --budget $((each * 3 / 5)) >"$OUT/$tool.txt" 2>&1
    local code=$?
    case $code in
      0) say "$tool: clean; $(grep -h 'rows left out' "$OUT/$tool.txt" || echo 'every op')" ;;
      124) say "$tool: left out, over $each s" ;;
      *) say "$tool: FAILED ($code)"; grep -m5 '=====' "$OUT/$tool.txt"; status=1 ;;
    esac
    verdicts="$verdicts${verdicts:+, }\"$tool\": $code"
    [ $code = 0 ] && rm -f "$OUT/$tool.txt"
  done
  result sanitize "{\"kind\": \"sanitize\", \"exit\": {$verdicts}}"
  return $status
}

stage_bench() {
  $PYTHON -m pydecode.cli bench --device $DEVICE --no-peers --budget "$1" --json "$OUT/bench.json" | tail -60
}

stage_peers() {
  $PYTHON -m pydecode.cli bench --device $DEVICE --budget "$1" --json "$OUT/peers.json" | tail -60
}

stage_tune() {
  timeout "$1" $PYTHON -m pydecode.bench.tune --json "$OUT/tune.json" | tail -40
}

install
machine
waiting=("${STAGES[@]}")
for stage in "${STAGES[@]}"; do
  if [ "$(left)" -lt 15 ]; then
    say "== $stage: left out, no time"
    failed+=("$stage")
  else
    seconds=$(share)
    say "== $stage ($seconds s)"
    before=$SECONDS
    "stage_$stage" "$seconds" && say "== $stage: ok, $((SECONDS - before)) s" || {
      say "== $stage: FAILED, $((SECONDS - before)) s"
      failed+=("$stage")
    }
  fi
  waiting=("${waiting[@]:1}")
done
say "results in $OUT: $(ls "$OUT" | tr '\n' ' ')"
[ ${#failed[@]} = 0 ] && say "all stages ok" || { say "not ok: ${failed[*]}"; exit 1; }
