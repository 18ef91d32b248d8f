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

# need_kvm: /dev/kvm that this user can open.
need_kvm() {
    [ -e /dev/kvm ] || die "/dev/kvm is missing: enable virtualization, load kvm_intel or kvm_amd"
    [ -r /dev/kvm ] && [ -w /dev/kvm ] ||
        die "/dev/kvm cannot be opened: run as root, or join the group 'kvm'"
}
