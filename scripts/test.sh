#!/usr/bin/env bash
# All tests: format, lints, units, KVM, whole machines, the nested bed.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

usage() {
    cat <<TXT
usage: scripts/test.sh [--without kvm] [--without nested] [--help]

Runs everything that says whether this tree works, on this machine: formatting, lints, the unit and
property tests, the tests that need /dev/kvm, the tests with whole VMMs, and the nested bed with a
stock Debian guest. Installs what is missing. Ends with 'N passed, N failed'.

  --without kvm      leave out what needs a usable KVM (the nested bed brings its own)
  --without nested   leave out the nested bed

Where this host has no usable /dev/kvm, the KVM tests run inside the nested bed, and the output
says so.
TXT
}

WITH_KVM=1 WITH_NESTED=1
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --without)
        case ${2:-} in
        kvm) WITH_KVM='' ;;
        nested) WITH_NESTED='' ;;
        *) usage_error "--without takes kvm or nested" ;;
        esac
        shift
        ;;
    *) usage_error "Unknown option $1" ;;
    esac
    shift
done

# Crates whose tests open /dev/kvm.
KVM_CRATES=(hypervisor guest-image understudy-tests)
PASSED=0 FAILED=0
scratch_dir SCRATCH

# step NAME COMMAND...: one check that passes or fails as a whole.
step() {
    local name=$1
    shift
    log "$name"
    if "$@"; then PASSED=$((PASSED + 1)); else
        FAILED=$((FAILED + 1))
        warn "$name failed"
    fi
}

# cargo_tests ARGUMENT...: runs cargo's tests with nextest where it is there, and adds them up.
cargo_tests() {
    local out=$SCRATCH/tests.log status=0
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run --release --locked --no-fail-fast "$@" 2>&1 | tee "$out" || status=$?
    else
        cargo test --release --locked --no-fail-fast "$@" 2>&1 | tee "$out" || status=$?
    fi
    count "$out" "$status"
}

# count LOG STATUS: adds up what the runner says. A runner that failed without a failed test, or
# without a count, is a failure of its own.
count() {
    local passed failed
    passed=$(sed -nE 's/.*(Summary|test result).* ([0-9]+) passed.*/\2/p' "$1" |
        awk '{sum += $1} END {print sum + 0}')
    failed=$(sed -nE 's/.*(Summary|test result).* ([0-9]+) failed.*/\2/p' "$1" |
        awk '{sum += $1} END {print sum + 0}')
    if [ "$failed" -eq 0 ] && { [ "$2" -ne 0 ] || [ "$passed" -eq 0 ]; }; then failed=1; fi
    PASSED=$((PASSED + passed)) FAILED=$((FAILED + failed))
}

# kvm_test_list FILE: a line for each test program of a crate that needs KVM.
kvm_test_list() {
    local crates=() crate
    for crate in "${KVM_CRATES[@]}"; do crates+=(-p "$crate"); done
    cargo test --release --locked --no-run --message-format=json "${crates[@]}" 2>/dev/null |
        python3 -c '
import json, os, sys
for line in sys.stdin:
    item = json.loads(line)
    if item.get("executable") and item.get("profile", {}).get("test"):
        print(item["executable"], os.path.dirname(item["manifest_path"]), sep="\t")' >"$1"
    [ -s "$1" ] || die "Cannot build the KVM tests"
}

nested() {
    local out=$SCRATCH/nested.log status=0 passed failed
    "$ROOT/scripts/nested.sh" --binaries "$ROOT/target/release" "$@" 2>&1 | tee "$out" || status=$?
    passed=$(sed -nE 's/^([0-9]+) passed, ([0-9]+) failed.*/\1/p' "$out" | tail -n 1)
    failed=$(sed -nE 's/^([0-9]+) passed, ([0-9]+) failed.*/\2/p' "$out" | tail -n 1)
    if [ "${failed:-0}" -eq 0 ] && { [ "$status" -ne 0 ] || [ "${passed:-0}" -eq 0 ]; }; then
        failed=1
    fi
    PASSED=$((PASSED + ${passed:-0})) FAILED=$((FAILED + ${failed:-0}))
}

usable_kvm() { [ -r /dev/kvm ] && [ -w /dev/kvm ]; }

set -o pipefail
cd "$ROOT"
need_build_tools
step "Formatting" cargo fmt --all --check
step "Lints" cargo clippy --release --locked --workspace --all-targets -- -D warnings
step "Scripts" bash -n scripts/*.sh scripts/lib/*.sh
build_release

NESTED_ARGUMENTS=()
if [ -z "$WITH_KVM" ]; then
    note "left out by --without kvm: tests of ${KVM_CRATES[*]}"
    cargo_tests --workspace "${KVM_CRATES[@]/#/--exclude=}"
elif usable_kvm; then
    log "Tests, with this host's /dev/kvm"
    cargo_tests --workspace
else
    [ -n "$WITH_NESTED" ] ||
        die "No usable /dev/kvm and --without nested: waive the KVM tests with --without kvm"
    log "Tests; no usable /dev/kvm here, so the KVM tests run inside the nested bed"
    cargo_tests --workspace "${KVM_CRATES[@]/#/--exclude=}"
    kvm_test_list "$SCRATCH/kvm-tests"
    NESTED_ARGUMENTS=(--kvm-tests "$SCRATCH/kvm-tests")
fi

if [ -n "$WITH_NESTED" ]; then
    log "The nested bed"
    nested "${NESTED_ARGUMENTS[@]}"
else
    note "left out by --without nested: the nested bed"
fi

echo "$PASSED passed, $FAILED failed"
[ "$FAILED" -eq 0 ]
