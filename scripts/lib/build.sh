# Building the workspace, for scripts that run it; sourced after common.sh.

# need_build_tools: what a fresh Debian lacks for a build without the RDMA feature.
need_build_tools() {
    need_packages gcc libc6-dev
    command -v cargo >/dev/null ||
        die "Rust is missing: install Rust 1.95 or newer with rustup, then run this again"
}

# build_release: the whole workspace in release mode, with cargo's own progress.
build_release() {
    log "Building in release mode"
    (cd "$ROOT" && cargo build --release --workspace --locked) || die "The build failed"
}

# kvm_problem: why /dev/kvm cannot be used, nothing if it can. Permission bits do not say it (a
# container's device rules, a security module): it is opened.
kvm_problem() {
    local said
    if [ ! -c /dev/kvm ]; then
        echo "/dev/kvm is missing: enable virtualization, load kvm_intel or kvm_amd"
    elif ! said=$( (exec 9<>/dev/kvm) 2>&1); then
        echo "/dev/kvm cannot be opened (${said##*: }): run as root, or join the group 'kvm'"
    fi
}

# need_kvm: /dev/kvm that this user can open.
need_kvm() {
    local problem
    problem=$(kvm_problem)
    [ -z "$problem" ] || die "$problem"
}

# run_release PROGRAM ARGUMENT...: a program of ours that runs machines, built in release mode, in the
# place of this script. With `--help` (or -h) among the arguments: the script's `usage`.
run_release() {
    local program=$1 argument
    shift
    for argument in "$@"; do
        case "$argument" in
        -h | --help) usage && exit 0 ;;
        esac
    done
    need_build_tools
    need_kvm
    case " $* " in
    *" kv "* | *=kv\ *) need_packages iproute2 ;;
    esac
    build_release
    cd "$ROOT"
    exec "target/release/$program" "$@"
}
