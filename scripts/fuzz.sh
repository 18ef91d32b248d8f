#!/usr/bin/env bash
# Fuzzes what reads foreign bytes: devices, the wire, saved states, HTTP, options.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

TARGETS=(blk net rng console pci wire state http options etcd)

usage() {
    cat <<TXT
usage: scripts/fuzz.sh [TARGET...] [--seconds N] [--jobs N] [--help]

Runs fuzz targets, all of them without a name:

  blk net rng console
                virtio devices: rings, chains, requests, resets, parks, take-overs
  pci           configuration space and the registers of the virtio transport
  wire          frames and messages of the replication stream
  state         machine states of epochs, snapshots and single functions
  http          requests of clients, up to the control loop
  options       values of command line flags
  etcd          answers of an arbiter's servers

  --seconds N   how long each target runs (default 60)
  --jobs N      targets at a time (default 1)

Installs what is missing: a nightly toolchain, cargo-fuzz, a C++ compiler. What was found before is in
fuzz/corpus and is gone on from. Says two lines a target (runs, coverage, units that were new, crashes;
how many of the places that matter some input of the corpus gets to), and 'N passed, N failed'. On a
crash it names the reproducer and exits 1. More: docs/fuzzing.md.
TXT
}

SECONDS_EACH=60 JOBS=1 CHOSEN=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --seconds | --jobs)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage_error "$1 takes a number from 1"
        if [ "$1" = --seconds ]; then SECONDS_EACH=$2; else JOBS=$2; fi
        shift
        ;;
    -*) usage_error "Unknown option $1" ;;
    *)
        [[ " ${TARGETS[*]} " == *" $1 "* ]] || usage_error "No target $1; there are: ${TARGETS[*]}"
        CHOSEN+=("$1")
        ;;
    esac
    shift
done
[ ${#CHOSEN[@]} -gt 0 ] || CHOSEN=("${TARGETS[@]}")

FUZZ=$ROOT/fuzz
# The whole VMM takes long to build: only where a target needs it.
FEATURES=targets
for target in "${CHOSEN[@]}"; do
    case $target in state | http) FEATURES=targets,machine ;; esac
done
# The longest input worth its time: what a guest does takes longer than a parser.
input_bytes_max() {
    case $1 in blk | net | rng | console | pci) echo 1024 ;; *) echo 4096 ;; esac
}
# A unit that takes longer hangs.
UNIT_SECONDS_MAX=20
PASSED=0 FAILED=0
scratch_dir SCRATCH

need_tools() {
    need_build_tools
    need_packages g++
    if ! cargo +nightly --version >/dev/null 2>&1; then
        command -v rustup >/dev/null || die "Needs rustup, to install a nightly toolchain"
        quietly "installing a nightly toolchain" "$SCRATCH/nightly.log" \
            rustup toolchain install nightly --profile minimal || die "No nightly toolchain"
    fi
    cargo fuzz --version >/dev/null 2>&1 ||
        quietly "installing cargo-fuzz" "$SCRATCH/install.log" \
            cargo install cargo-fuzz --locked || die "No cargo-fuzz"
}

# in_fuzz SUBCOMMAND ARGUMENT...: cargo-fuzz, with this folder's lock file as it is.
in_fuzz() {
    local subcommand=$1
    shift
    (cd "$FUZZ" && cargo +nightly fuzz "$subcommand" --fuzz-dir . --features "$FEATURES" "$@")
}

# example NAME ARGUMENT...: runs one of this folder's programs, which need no nightly toolchain.
example() {
    local name=$1
    shift
    (cd "$FUZZ" && cargo run --quiet --locked --features "${FEATURES#targets}" --example "$name" -- "$@")
}

build() {
    local target
    log "Building ${#CHOSEN[@]} targets"
    quietly "building the seeds" "$SCRATCH/build.log" example seeds corpus || die "No seeds"
    for target in "${CHOSEN[@]}"; do
        quietly "building $target" "$SCRATCH/build.log" in_fuzz build "$target" ||
            die "The build failed"
    done
}

# fuzz TARGET: runs it; its output goes to a file of its name.
fuzz() {
    local dictionary=()
    [ ! -f "$FUZZ/dictionaries/$1.dict" ] || dictionary=("-dict=dictionaries/$1.dict")
    mkdir -p "$FUZZ/corpus/$1"
    # Without len_control=0 inputs have 30 bytes after a minute: too few for anything to happen.
    in_fuzz run "$1" -- "-max_total_time=$SECONDS_EACH" "-timeout=$UNIT_SECONDS_MAX" \
        "-max_len=$(input_bytes_max "$1")" -len_control=0 -print_final_stats=1 -use_value_profile=1 \
        "${dictionary[@]}" >"$SCRATCH/$1.log" 2>&1
}

# statistic LOG NAME: one of libFuzzer's final numbers.
statistic() {
    sed -n "s/^stat::$2: *//p" "$1" | tail -n 1
}

# judge TARGET STATUS: the line about a run.
judge() {
    local target=$1 status=$2 log=$SCRATCH/$1.log runs coverage new artifact
    runs=$(statistic "$log" number_of_executed_units)
    new=$(statistic "$log" new_units_added)
    coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    local line
    line=$(printf '%-8s %10s runs, coverage %6s, %6s new units' "$target" "${runs:-0}" \
        "${coverage:-0}" "${new:-0}")
    if [ "$status" -eq 0 ] && [ "${runs:-0}" -gt 0 ]; then
        PASSED=$((PASSED + 1))
        echo "$line, 0 crashes"
        example replay "$target" "corpus/$target" >"$SCRATCH/places" ||
            die "The corpus of $target cannot be run again"
        note "$(tail -n 1 "$SCRATCH/places")"
        return
    fi
    FAILED=$((FAILED + 1))
    artifact=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
    echo "$line, 1 crash"
    grep -E 'panicked at|ERROR: |SUMMARY: ' -A 1 "$log" | head -n 12 >&2 || true
    if [ -n "$artifact" ]; then
        warn "$target: the reproducer is $(cd "$FUZZ" && realpath "$artifact")"
    else
        tail -n 20 "$log" >&2
        warn "$target did not run to its end (status $status)"
    fi
}

need_tools
build
log "Fuzzing ${CHOSEN[*]}, $SECONDS_EACH s each"
while [ ${#CHOSEN[@]} -gt 0 ]; do
    batch=("${CHOSEN[@]:0:JOBS}") pids=()
    CHOSEN=("${CHOSEN[@]:JOBS}")
    for target in "${batch[@]}"; do
        fuzz "$target" &
        pids+=($!)
    done
    for at in "${!batch[@]}"; do
        status=0
        wait "${pids[at]}" || status=$?
        judge "${batch[at]}" "$status"
    done
done
echo "$PASSED passed, $FAILED failed"
[ "$FAILED" -eq 0 ]
