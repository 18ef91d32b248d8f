#!/bin/bash
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"

BED=$ROOT/tests/bed
EXIT_BED=3
DEFAULT_SUITES=(smoke verbs reference boot linux pci devices)

usage() {
    cat <<END
Usage: scripts/nested.sh [OPTION...] [SUITE...]

Runs suites in the nested bed: QEMU emulates a machine with AMD virtualization (no /dev/kvm is
needed here), a Debian kernel in it (L1) offers KVM and Soft-RoCE, and our VMMs in it run a stock
Debian guest (L2). The bed is built from Debian packages once and cached in
$(cache_dir bed).
When the bed itself fails (L1's kernel, QEMU), L1 boots again for the cases that are not settled, as
long as that settles any; a case that fails is tried twice more, each time in a new boot. See docs/nested-bed.md.

Suites (default: ${DEFAULT_SUITES[*]}):
$(for file in "$BED"/suites/*.sh; do
        printf '  %-12s%s\n' "$(basename "$file" .sh)" "$(sed -n '1s/^# //p' "$file")"
    done)

Options:
  --binaries DIR    use cloud-hypervisor, ch-remote and (suites redis, rdma) redis-writer, (suite verbs)
                    examples/verbs_check, (suites rdma, rdma-bench) kill-rounds, check-equality and
                    bench of DIR (default: build in release mode)
  --kvm-tests PATH  test programs for the suite "kvm": a folder of them, or a file that lists them
                    as PROGRAM<tab>WORKING-FOLDER; see docs/nested-bed.md. Adds "kvm" to the suites
  --set NAME=VALUE  a setting of a suite (LINUX_ROUNDS=2, say); they stand at the top of its file
  --timeout S       hard limit for the whole run, all boots of L1 (default: 3600)
  --memory MIB      L1's memory (default: 3072)
  --thread KIND     single: L1's CPUs share one thread of the emulator (default); multi: each has its
                    own, which is faster, and now and then a guest dies of it
  --tries N         tries of a case, each in a boot of its own (default: 3)
  --keep            keep all logs, those of cases that passed too
  --build-only      build or find the bed, print its folder, run nothing
  --help            this text

Exit status: 0 all passed, 1 something failed, 2 wrong usage, 3 the bed cannot be built here, or
itself failed each time.
Logs of a run in which anything failed: target/nested/; those of a boot that failed in boot-N/ there
END
}

SUITES=() BINARIES='' KVM_TESTS='' SETTINGS=() TIMEOUT=3600 MEMORY=3072 TRIES=3 THREAD=single KEEP='' BUILD_ONLY=''

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            --help | -h) usage && exit 0 ;;
            --keep) KEEP=1 ;;
            --build-only) BUILD_ONLY=1 ;;
            --binaries | --kvm-tests | --set | --timeout | --memory | --thread | --tries)
                [ $# -ge 2 ] || usage_error "$1 needs a value"
                option "$1" "$2" && shift
                ;;
            -*) usage_error "Unknown option $1" ;;
            *)
                [ -f "$BED/suites/$1.sh" ] || usage_error "There is no suite '$1'"
                SUITES+=("$1")
                ;;
        esac
        shift
    done
    [ ${#SUITES[@]} -gt 0 ] || SUITES=("${DEFAULT_SUITES[@]}")
    if [ -n "$KVM_TESTS" ] && ! wanted kvm; then SUITES+=(kvm); fi
    if [ -z "$KVM_TESTS" ] && wanted kvm; then usage_error "The suite kvm needs --kvm-tests"; fi
}

option() {
    case $1 in
        --binaries) BINARIES=$(realpath -e "$2") || usage_error "There is no $2" ;;
        --kvm-tests) KVM_TESTS=$(realpath -e "$2") || usage_error "There is no $2" ;;
        --timeout) [[ $2 =~ ^[1-9][0-9]*$ ]] && TIMEOUT=$2 || usage_error "$1 wants seconds" ;;
        --tries) [[ $2 =~ ^[1-9]$ ]] && TRIES=$2 || usage_error "$1 wants 1 to 9" ;;
        --thread) [[ $2 =~ ^(multi|single)$ ]] && THREAD=$2 || usage_error "$1 wants multi or single" ;;
        --memory) [[ $2 =~ ^[1-9][0-9]*$ ]] && MEMORY=$2 || usage_error "$1 wants MiB" ;;
        --set)
            [[ $2 =~ ^[A-Z][A-Z0-9_]*=.*$ ]] || usage_error "$1 wants NAME=VALUE"
            SETTINGS+=("$2")
            ;;
    esac
}

# wanted SUITE: whether it is to run.
wanted() { [[ " ${SUITES[*]} " == *" $1 "* ]]; }

build_binaries() {
    [ -n "$BINARIES" ] && return
    log "Building the release binaries"
    local packages=(-p cloud-hypervisor)
    ! { wanted redis || wanted rdma; } || packages+=(-p redis-writer)
    ! { wanted rdma || wanted rdma-bench; } || packages+=(-p understudy-tests)
    quietly "cargo build --release ${packages[*]}" "$SCRATCH/cargo.log" \
        cargo build --release "${packages[@]}" --manifest-path "$ROOT/Cargo.toml"
    ! wanted verbs || quietly "cargo build --release -p rdma" "$SCRATCH/cargo.log" \
        cargo build --release -p rdma --example verbs_check --manifest-path "$ROOT/Cargo.toml"
    BINARIES=${CARGO_TARGET_DIR:-$ROOT/target}/release
}

# libraries_of PROGRAM: what ldd finds for it, with the bed's libraries in reach.
libraries_of() {
    LD_LIBRARY_PATH=$BED_DIR/root/usr/lib/x86_64-linux-gnu:$BED_DIR/root/lib/x86_64-linux-gnu \
        ldd "$1" 2>/dev/null | tr -s ' \t' '\n' | grep '^/' | sort -u
}

# add_program FILE [NAME]: into the share, with the libraries that it needs.
add_program() {
    local library
    cp -L "$1" "$SHARE/bin/${2:-$(basename "$1")}"
    add_libraries "$1"
}

add_libraries() {
    local library
    for library in $(libraries_of "$1"); do
        [ -e "$SHARE/lib/$(basename "$library")" ] || cp -L "$library" "$SHARE/lib/"
    done
}

list_kvm_tests() {
    local program
    if [ -d "$KVM_TESTS" ] && [ ! -f "$KVM_TESTS/list" ]; then
        for program in "$KVM_TESTS"/*; do
            [ -f "$program" ] && [ -x "$program" ] && printf '%s\t%s\n' "$program" "$ROOT"
        done >"$SHARE/kvm-tests.list"
    else
        [ -d "$KVM_TESTS" ] && KVM_TESTS=$KVM_TESTS/list
        grep -vE '^(#|$)' "$KVM_TESTS" >"$SHARE/kvm-tests.list" || true
    fi
    [ -s "$SHARE/kvm-tests.list" ] || die "$KVM_TESTS names no test program"
    # A test that needs it and does not find it fails, and says so.
    ! command -v etcd >/dev/null || add_program "$(command -v etcd)"
    mkdir "$SHARE/kvm"
    # Programs are copied: the source tree's folder is shared, but a build folder may be elsewhere.
    local folder copy number=0
    while IFS=$'\t' read -r program folder; do
        [ -x "$program" ] || die "$KVM_TESTS names $program, which is no program"
        number=$((number + 1))
        copy=kvm/$number/$(basename "$program")
        mkdir "$SHARE/kvm/$number"
        ln "$program" "$SHARE/$copy" 2>/dev/null || cp "$program" "$SHARE/$copy"
        add_libraries "$program"
        printf '/h/%s\t%s\n' "$copy" "${folder:-$ROOT}"
    done <"$SHARE/kvm-tests.list" >"$SHARE/kvm-tests.new"
    mv "$SHARE/kvm-tests.new" "$SHARE/kvm-tests.list"
    echo "$ROOT" >"$SHARE/workspace"
}

fill_share() {
    local lib=$BED_DIR/root/usr/lib/x86_64-linux-gnu program
    mkdir -p "$SHARE/bin" "$SHARE/lib/libibverbs" "$SHARE/etc/libibverbs.d" "$OUT"
    for program in cloud-hypervisor ch-remote; do
        [ -x "$BINARIES/$program" ] || die "There is no $program in $BINARIES"
        add_program "$BINARIES/$program"
    done
    add_program "$(ls -d "$BED_DIR"/root/{usr/,}bin/ip 2>/dev/null | head -n 1)"
    add_program "$(ls -d "$BED_DIR"/root/{usr/,}{s,}bin/rdma 2>/dev/null | head -n 1)"
    add_program "$lib"/libibverbs/librxe-rdmav*.so
    mv "$SHARE"/bin/librxe-rdmav*.so "$SHARE/lib/libibverbs/"
    cp -L "$lib"/libibverbs.so.1 "$lib"/librdmacm.so.1 "$SHARE/lib/"
    cp "$BED_DIR/root/etc/libibverbs.d/rxe.driver" "$SHARE/etc/libibverbs.d/"
    # The reference suite runs the bed's own QEMU in L1, from the bed's folder.
    cp "$BED/qemu" "$SHARE/bin/qemu"
    cp -r "$BED/l1" "$BED/suites" "$SHARE/"
    [ ! -f "$ROOT/target/guest/understudy-guest" ] ||
        cp "$ROOT/target/guest/understudy-guest" "$SHARE/"
    {
        [ -z "$KEEP" ] || echo "KEEP=1"
        for setting in "${SETTINGS[@]}"; do
            printf "%s='%s'\n" "${setting%%=*}" "${setting#*=}"
        done
    } >"$SHARE/settings"
    [ -z "$KVM_TESTS" ] || list_kvm_tests
    ! { wanted redis || wanted rdma; } || add_redis_tools
    ! wanted verbs || add_verbs_check
    ! wanted rdma || add_rdma_tools
    ! wanted rdma-bench || add_bench
}

# add_test_programs NAME...: the test guest, and the programs that run it and judge.
add_test_programs() {
    local program
    [ -f "$SHARE/understudy-guest" ] || die "There is no test guest in $ROOT/target/guest: build the workspace"
    for program in "$@"; do
        [ -x "$BINARIES/$program" ] || die "There is no $program in $BINARIES"
        add_program "$BINARIES/$program"
    done
}

# What judges a pair, a way to run it without the right to lock memory, and certificates for the device's address.
add_rdma_tools() {
    add_test_programs kill-rounds check-equality
    add_program "$(ls -d "$BED_DIR"/root/{usr/,}sbin/capsh 2>/dev/null | head -n 1)"
    "$ROOT/scripts/make-certificates.sh" "$SHARE/tls" 10.77.0.1 >/dev/null ||
        die "No certificates for the suite rdma: it needs openssl"
}

# The benchmark, and what it holds RDMA against.
add_bench() {
    add_test_programs bench
    add_program "$BED_DIR/root/usr/bin/ib_write_bw"
    add_program "$BED_DIR/root/usr/bin/ib_send_bw"
}

add_verbs_check() {
    local program=$BINARIES/examples/verbs_check
    [ -x "$program" ] || die "There is no examples/verbs_check in $BINARIES"
    add_program "$program"
}

# The client, and what looks at the file system that the guest left.
add_redis_tools() {
    local program
    [ -x "$BINARIES/redis-writer" ] || die "There is no redis-writer in $BINARIES"
    add_program "$BINARIES/redis-writer"
    for program in mke2fs e2fsck debugfs; do
        add_program "$(ls -d "$BED_DIR"/root/{usr/,}sbin/"$program" 2>/dev/null | head -n 1)"
    done
    cp "$BED_DIR/root/etc/mke2fs.conf" "$SHARE/etc/"
}

keep_logs() {
    local place=$ROOT/target/nested
    rm -rf -- "$place" && mkdir -p "$(dirname "$place")" && cp -r "$OUT" "$place"
    note "logs: $place"
}

main() {
    parse "$@"
    scratch_dir SCRATCH
    SHARE=$SCRATCH/share OUT=$SCRATCH/out
    need_packages python3
    BED_DIR=$("$BED/build.sh" 9>&1 >&2) || exit "$EXIT_BED"
    if [ -n "$BUILD_ONLY" ]; then
        echo "$BED_DIR"
        exit 0
    fi
    build_binaries
    fill_share
    log "Booting L1 (${SUITES[*]})"
    local status=0 shares=(--share "h=$SHARE" --share "bed=$BED_DIR" --share "out=$OUT")
    [ -z "$KVM_TESTS" ] || shares+=(--share "w=$ROOT")
    python3 "$BED/run_l1.py" --bed "$BED_DIR" "${shares[@]}" --logs "$OUT" \
        --timeout "$TIMEOUT" --memory "$MEMORY" --thread "$THREAD" --tries "$TRIES" "${SUITES[@]}" &
    RUNNER=$!
    on_exit stop_process "$RUNNER"
    wait "$RUNNER" || status=$?
    if [ "$status" -ne 0 ] || [ -n "$KEEP" ] || [ -d "$OUT/boot-1" ]; then keep_logs; fi
    exit "$status"
}

main "$@"
