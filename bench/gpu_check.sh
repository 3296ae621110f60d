#!/usr/bin/env bash
# Everything that only a GPU can show, in one run of at most nine minutes:
#
#   bench/gpu_check.sh OUTDIR [--only PART[,PART...]] [--commit ID]
#
# parts, in this order:
#   build info emulation golden tests memcheck racecheck bench blocks experts voxels codes zeros
#
# OUTDIR gets summary.md (rewritten after each part), build.log, checks.log, bench.log, a record
# bench-DTYPE.json for each dtype, bench.png, NAME.log and NAME.json of blocks, experts, voxels, codes
# and zeros, and golden.npz. A part that fails or runs out of time does not stop the others.
# Exit status: 0 if every part passed, 1 if one failed, 3 if none failed but some could not run
# (no GPU, no compute-sanitizer). It needs no network: python3 has torch, the build tools and what
# the extra "test" installs; with pytest-xdist the tests run side by side.
set -u -o pipefail

readonly PARTS=(
  build info emulation golden tests memcheck racecheck bench blocks experts voxels codes zeros
)
readonly TOTAL=525   # seconds, of which the summary takes none
readonly NOT_RUN=3   # the exit status of a part that found nothing to run on

usage() {
  sed -n '4,7s/^# *//p' "$0" >&2
  exit 2
}

out='' only=("${PARTS[@]}") commit=''
while [ $# -gt 0 ]; do
  case $1 in
    --only) [ $# -ge 2 ] || usage; IFS=, read -r -a only <<<"$2"; shift ;;
    --commit) [ $# -ge 2 ] || usage; commit=$2; shift ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || usage
for part in "${only[@]}"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "no part is called '$part'" >&2; usage; }
done

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit
# Not a virtual environment: one made from another's python would not see that one's packages.
site=$PWD/build/gpu_check
[ -n "$commit" ] || commit=$(git rev-parse HEAD 2>/dev/null) || commit=unversioned
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  gpu=yes
else
  gpu=''
fi
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

# ---- the parts: each prints its log, and returns 0, NOT_RUN or another status ---------------------

pytest_here() { python3 -m pytest -p no:cacheprovider -W default --continue-on-collection-errors "$@"; }

part_build() {
  rm -rf "$site"
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) python3 -m pip install --verbose --no-build-isolation \
    --no-deps --no-index --no-cache-dir --target "$site" .
}

part_info() {
  if [ -n "$gpu" ]; then nvidia-smi; fi
  (cd / && python3 -m gossamer info)
}

part_emulation() {
  [ -n "$gpu" ] || { echo "no GPU"; return "$NOT_RUN"; }
  pytest_here -q -k "gpu or cuda" tests/emulation/test_primitives_*.py \
    tests/emulation/test_sample_gemm.py
}

part_golden() { python3 tests/emulation/record_golden.py "$out/golden.npz"; }

part_tests() {
  [ -n "$gpu" ] || { echo "no GPU"; return "$NOT_RUN"; }
  # By file: the others may import packages that are not here. The fixture `target` marks its "cuda".
  local file package files=()
  while read -r file; do
    for package in hypothesis safetensors; do
      if grep -q "^from $package" "$file" && ! python3 -c "import $package" 2>/dev/null; then
        echo "left out, for there is no $package here: $file"
        continue 2
      fi
    done
    files+=("$file")
  done < <(grep -rlE --include='test_*.py' 'mark\.cuda|\btarget: str' tests)
  [ "${#files[@]}" -gt 0 ] || { echo "no test is marked cuda"; return "$NOT_RUN"; }
  local spread=()
  if python3 -c 'import xdist' 2>/dev/null; then spread=(-n 6 --dist loadfile); fi
  pytest_here -q -m cuda "${spread[@]}" "${files[@]}"
}

sanitize() {
  [ -n "$gpu" ] || { echo "no GPU"; return "$NOT_RUN"; }
  local tool
  tool=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) ||
    { echo "no compute-sanitizer"; return "$NOT_RUN"; }
  # torch asks the driver for things that it may not have: those answers are no errors.
  local quiet=()
  [ "$1" != memcheck ] || quiet=(--report-api-errors no)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" "${quiet[@]}" --error-exitcode 9 \
    --print-limit 20 --target-processes all python3 tests/small_products.py
}
part_memcheck() { sanitize memcheck; }
part_racecheck() { sanitize racecheck; }

part_bench() {
  [ -n "$gpu" ] || { echo "no GPU"; return "$NOT_RUN"; }
  # Each dtype by itself: a rival's kernel that fails may take CUDA's context with it.
  local dtype status=0 seconds=$(($1 - 35))
  for dtype in bf16 fp8 int4 int8 fp16; do
    local share=$((seconds / 10)) plot=()
    [ $dtype != bf16 ] || { share=$((seconds * 6 / 10)) && plot=(--plot "$out/bench.png"); }
    python3 bench/run.py --device cuda --feature sparse24 --quick --dtype $dtype \
      --seconds "$share" --commit "$commit" --json "$out/bench-$dtype.json" "${plot[@]}" || status=1
  done
  return $status
}

part_blocks() {
  [ -n "$gpu" ] || { echo "no GPU"; return "$NOT_RUN"; }
  # With 2:4 convolutions: --block 2:4 has those alone.
  python3 bench/run.py --device cuda --feature blocksparse --dtype bf16 --quick \
    --seconds $(($1 - 15)) --commit "$commit" --json "$out/blocks.json"
}

part_experts() {
  [ -n "$gpu" ] || { echo "no GPU"; return "$NOT_RUN"; }
  python3 bench/run.py --device cuda --feature grouped --dtype bf16 --quick \
    --seconds $(($1 - 15)) --commit "$commit" --json "$out/experts.json"
}

part_voxels() {
  [ -n "$gpu" ] || { echo "no GPU"; return "$NOT_RUN"; }
  python3 bench/run.py --device cuda --feature pointcloud --dtype bf16 --quick \
    --seconds $(($1 - 15)) --commit "$commit" --json "$out/voxels.json"
}

part_codes() {
  [ -n "$gpu" ] || { echo "no GPU"; return "$NOT_RUN"; }
  python3 bench/run.py --device cuda --feature codes --dtype bf16 --quick \
    --seconds $(($1 - 15)) --commit "$commit" --json "$out/codes.json"
}

part_zeros() {
  [ -n "$gpu" ] || { echo "no GPU"; return "$NOT_RUN"; }
  python3 bench/run.py --device cuda --feature actsparse --dtype bf16 --quick \
    --seconds $(($1 - 15)) --commit "$commit" --json "$out/zeros.json"
}

# ---- running them --------------------------------------------------------------------------------

# Seconds a part may take, and what has to be left for those after it.
limit_of() {
  case $1 in
    build) echo 240 ;; info) echo 40 ;; emulation) echo 100 ;; golden) echo 80 ;;
    tests) echo 120 ;; memcheck | racecheck) echo 60 ;; bench) echo 180 ;;
    blocks | voxels | codes | zeros) echo 75 ;; experts) echo 45 ;;
  esac
}
reserve_after() {
  case $1 in
    build) echo 300 ;; info) echo 385 ;; emulation) echo 355 ;; golden) echo 340 ;;
    tests) echo 310 ;; memcheck) echo 290 ;; racecheck) echo 270 ;; bench) echo 200 ;;
    blocks) echo 155 ;; experts) echo 120 ;; voxels) echo 80 ;; codes) echo 40 ;; zeros) echo 0 ;;
  esac
}
log_of() {
  case $1 in
    build | bench | blocks | experts | voxels | codes | zeros) echo "$out/$1.log" ;;
    *) echo "$out/checks.log" ;;
  esac
}

declare -A verdict took detail
failed='' missing=''

summarise() {
  local part
  {
    echo "# gossamer on a GPU"
    echo
    if [ -n "$gpu" ]; then
      nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    else
      echo "no GPU: torch sees none here"
    fi
    echo
    echo "commit $commit, $(date -u +%FT%TZ), $(nproc) cores, $SECONDS s"
    echo
    echo "| part | result | s | last line |"
    echo "|---|---|---|---|"
    for part in "${PARTS[@]}"; do
      echo "| $part | ${verdict[$part]:-not run} | ${took[$part]:-} | ${detail[$part]:-} |"
    done
    if [ -f "$out/bench.log" ]; then
      echo
      sed -n '/^Times faster/,$p' "$out/bench.log"
    fi
    if [ -f "$out/blocks.log" ]; then
      echo
      sed -n '/^Blocks, times faster/,$p' "$out/blocks.log"
    fi
    local part
    for part in experts voxels codes zeros; do
      [ -f "$out/$part.log" ] || continue
      printf '\n```\n'
      sed -nE '/^(experts|pointcloud|codes|zero inputs,) /,$p' "$out/$part.log"
      echo '```'
    done
  } >"$out/summary.md"
}

run_part() {
  local part=$1 log status=0 begin=$SECONDS limit left
  log=$(log_of "$part")
  case $part in
    build | bench | blocks | experts | voxels | codes | zeros) rm -f "$out/$part".* "$out/$part"-*.json ;;
    golden) rm -f "$out/golden.npz" ;;
  esac
  limit=$(limit_of "$part")
  left=$((TOTAL - SECONDS - $(reserve_after "$part")))
  # The reserves are there for parts that are asked for.
  [ ${#only[@]} -lt ${#PARTS[@]} ] && left=$((TOTAL - SECONDS))
  [ "$left" -lt "$limit" ] && limit=$left
  [ "$limit" -lt 10 ] && limit=10
  printf '\n=== %s (at %d s, at most %d s)\n' "$part" "$SECONDS" "$limit" | tee -a "$log"
  if [ "$part" != build ] && [ "$part" != golden ] && [ ! -d "$site/gossamer" ]; then
    echo "nothing is built: run the part build first" | tee -a "$log"
    status=1
  else
    # In a process of its own, which timeout can end with all that it started.
    timeout -k 10 "$limit" bash -c "set -u -o pipefail; part_$part $limit" 2>&1 |
      tee -a "$log" || status=${PIPESTATUS[0]}
  fi
  took[$part]=$((SECONDS - begin))
  case $status in
    0) verdict[$part]=passed ;;
    "$NOT_RUN") verdict[$part]='could not run'; missing=yes ;;
    124 | 137) verdict[$part]='**out of time**'; failed=yes ;;
    *) verdict[$part]="**failed** (status $status)"; failed=yes ;;
  esac
  detail[$part]=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c1-120 | tr '|' '/')
  summarise
}

export -f pytest_here sanitize
for part in "${PARTS[@]}"; do export -f "part_$part"; done
export NOT_RUN out site gpu commit

[ ${#only[@]} -lt ${#PARTS[@]} ] || rm -f "$out"/checks.log
trap 'summarise; exit 1' INT TERM
for part in "${PARTS[@]}"; do
  [[ " ${only[*]} " == *" $part "* ]] && run_part "$part"
done

echo
cat "$out/summary.md"
[ -z "$failed" ] || exit 1
[ -z "$missing" ] || exit 3
