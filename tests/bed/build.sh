#!/bin/bash
# Builds the nested bed's fixed parts from Debian packages, or finds them in the cache.
#
# What enters: the system's own APT configuration (for the mirror, the proxy, the keyring).
# What leaves: one line on file descriptor 9, the folder that holds
#     qemu/              QEMU, its libraries (the C library, too) and its firmware (unpacked)
#     root/              busybox, iproute2, e2fsprogs, the RDMA userland, perftest (unpacked)
#     l1/vmlinux l1.img  the full Debian kernel and the initramfs of L1
#     l2/vmlinux l2/bzImage l2.img   the Debian cloud kernel and the initramfs of L2
#     l2/redis.img       the same with Redis, its libraries (the C library, too) and ext4
#     packages.txt       what it was made of
# What always holds: the folder's name is the recipe's hash, and it is complete: it is built beside
# its place and renamed into it, under a lock. The system's packages and sources stay as they are.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/common.sh"

BED=$ROOT/tests/bed
RELEASE=bookworm
KERNEL_SERIES='6\.12'
# Not the release's own: with QEMU 10.0 L1's kernel died every few minutes. As far as we know its threads
# of emulated CPUs change each other's interrupt word without an order, which later versions do not.
QEMU_RELEASE=trixie
# Versions of the closure come from the archive's resolver, started on an empty system.
FROM_QEMU_BACKPORTS=(qemu-system-x86 seabios ipxe-qemu)
FROM_RELEASE=(busybox-static iproute2 e2fsprogs ibverbs-providers librdmacm1 perftest)
FROM_RELEASE_FOR_L2=(redis-server)
L1_MODULES=kvm-amd,rdma_rxe,rdma_ucm,ib_uverbs,crc32_generic,tun,veth,dummy,bridge
L1_MODULES+=,9p,9pnet_virtio,virtio_pci,virtio_net,virtio_console
L2_MODULES=virtio_blk,failover,net_failover,virtio_net,virtio_rng
REDIS_MODULES=$L2_MODULES,crc32c_generic,ext4
KEEP_OLD_DAYS=7

recipe_hash() {
    cat "$BED/build.sh" "$BED/make_initramfs.py" "$BED/extract_vmlinux.py" "$BED/mend_qemu.py" \
        "$BED/l1-init" "$BED/l2-init" | sha256sum | cut -c 1-16
}

# The mirror that this system uses for Debian, of whatever release; a caller may name another.
debian_mirror() {
    local uri
    if [ -n "${UNDERSTUDY_DEBIAN_MIRROR:-}" ]; then
        echo "${UNDERSTUDY_DEBIAN_MIRROR%/}"
        return
    fi
    # Third-party sources have no "main" that carries a Debian code name.
    uri=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' \
        'Created-By: Packages' | awk '$1 ~ /^(bookworm|trixie|forky|sid|stable|oldstable|testing)$/ &&
            $2 == "main" { print $3; exit }')
    [ -n "$uri" ] || die "APT's sources name no Debian mirror; set UNDERSTUDY_DEBIAN_MIRROR"
    echo "${uri%/}"
}

# private_apt DIR MIRROR RELEASE: a private APT with its own sources, lists, state and cache, for a
# system that has no package.
private_apt() {
    local apt=$1 mirror=$2 release=$3 keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -r "$keyring" ] || need_packages debian-archive-keyring
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    : >"$apt/status"
    printf "deb [signed-by=$keyring] $mirror %s main\n" \
        "$release" "$release-backports" >"$apt/sources.list"
    cat >"$apt/apt.conf" <<END
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferencesparts "-";
Dir::Etc::preferences "-";
Dir::State "$apt";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
APT::Architecture "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "60";
Debug::NoLocking "true";
END
    # `-c` is read last, after the system's own configuration: its proxies stay, and ours wins.
    APT_GET=(apt-get -c "$apt/apt.conf")
    APT_CACHE=(apt-cache -c "$apt/apt.conf")
}

# kernel_package FLAVOUR: the newest signed kernel of the series ("amd64", "cloud-amd64").
kernel_package() {
    "${APT_CACHE[@]}" pkgnames linux-image- | grep -E "^linux-image-$KERNEL_SERIES\.[^-]*-$1\$" |
        sort -V | tail -n 1
}

fetch_lists() { # APT
    retry 3 quietly "fetching the package lists" "$1/log" "${APT_GET[@]}" update \
        -o APT::Update::Error-Mode=any || die "Cannot fetch the package lists from the mirror"
}

fetch_qemu() { # APT
    fetch_lists "$1"
    retry 3 quietly "fetching QEMU" "$1/log" "${APT_GET[@]}" install -y --download-only \
        -t "$QEMU_RELEASE-backports" "${FROM_QEMU_BACKPORTS[@]}" || die "Cannot fetch QEMU"
}

fetch_packages() {
    local apt=$1 kernel
    fetch_lists "$apt"
    for flavour in amd64 cloud-amd64; do
        kernel=$(kernel_package "$flavour")
        [ -n "$kernel" ] || die "The mirror has no $flavour kernel of the series $KERNEL_SERIES"
        echo "$kernel" >"$apt/kernel-$flavour"
    done
    retry 3 quietly "fetching the userland" "$apt/log" "${APT_GET[@]}" install -y --download-only \
        "${FROM_RELEASE[@]}" || die "Cannot fetch ${FROM_RELEASE[*]}"
    mkdir -p "$apt/cache/l2/partial"
    retry 3 quietly "fetching L2's programs" "$apt/log" "${APT_GET[@]}" install -y --download-only \
        -o "Dir::Cache::archives=$apt/cache/l2" "${FROM_RELEASE_FOR_L2[@]}" ||
        die "Cannot fetch ${FROM_RELEASE_FOR_L2[*]}"
    (cd "$apt/cache" && retry 3 quietly "fetching the kernels" "$apt/log" "${APT_GET[@]}" download \
        "$(cat "$apt/kernel-amd64")" "$(cat "$apt/kernel-cloud-amd64")") ||
        die "Cannot fetch the kernels"
}

# unpack_into FOLDER LIST DEB...
unpack_into() {
    local folder=$1 list=$2 deb name
    shift 2
    mkdir -p "$folder"
    for deb in "$@"; do
        name=$(basename "$deb")
        dpkg -x "$deb" "$folder" || die "Cannot unpack $name"
        echo "${name%.deb}" >>"$list"
    done
}

unpack() {
    local qemu=$1 apt=$2 out=$3 deb mended=no
    note "unpacking"
    mkdir -p "$out"
    unpack_into "$out/qemu" "$out/packages.txt" "$qemu"/cache/archives/*.deb
    python3 "$BED/mend_qemu.py" "$out/qemu/usr/bin/qemu-system-x86_64" && mended=yes ||
        note "QEMU is not mended: guests in L1 may die now and then, see tests/bed/mend_qemu.py"
    echo "QEMU's delivery of injected interrupts mended: $mended" >>"$out/packages.txt"
    # In L1 our binaries and these run with the host's C library: two of them do not go together.
    rm -f "$apt"/cache/archives/{libc6,libgcc-s1}_*.deb
    unpack_into "$out/root" "$out/packages.txt" "$apt"/cache/archives/*.deb
    # L2 has nothing of the host's.
    unpack_into "$apt/l2" "$out/packages.txt" "$apt"/cache/l2/*.deb
    for flavour in amd64 cloud-amd64; do
        deb=$(echo "$apt/cache/$(cat "$apt/kernel-$flavour")"_*.deb)
        dpkg -x "$deb" "$apt/$flavour" || die "Cannot unpack $(basename "$deb")"
        # Debian 13 and merged systems keep modules in /usr/lib.
        [ -d "$apt/$flavour/lib" ] || ln -s usr/lib "$apt/$flavour/lib"
        echo "$(basename "${deb%.deb}")" >>"$out/packages.txt"
    done
}

# program_tree ROOT PROGRAM OUT: the program of an unpacked system as /bin/NAME, its loader and the
# libraries that this loader finds for it.
program_tree() {
    local root=$1 program=$2 out=$3 lib library
    lib=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu
    mkdir -p "$out/bin" "$out/lib64" "$out/lib/x86_64-linux-gnu"
    cp -L "$root/$program" "$out/bin/"
    cp -L "$root/lib64/ld-linux-x86-64.so.2" "$out/lib64/"
    "$root/lib64/ld-linux-x86-64.so.2" --library-path "$lib" --list "$root/$program" >"$out.list" ||
        { cat "$out.list" >&2 && die "$program lacks a library"; }
    for library in $(grep -o " => /[^ ]*" "$out.list" | cut -c 5-); do
        # Nothing may come from this system: it would not be there, or not fit, in L2.
        [[ $library == "$root"/* ]] || die "$program takes $library"
        cp -L "$library" "$out/lib/x86_64-linux-gnu/"
    done
}

make_images() {
    local apt=$1 out=$2
    note "making the kernels' ELF images and the initramfs"
    mkdir -p "$out/l1" "$out/l2"
    python3 "$BED/extract_vmlinux.py" "$apt"/amd64/boot/vmlinuz-* "$out/l1/vmlinux"
    python3 "$BED/extract_vmlinux.py" "$apt"/cloud-amd64/boot/vmlinuz-* "$out/l2/vmlinux"
    cp "$apt"/cloud-amd64/boot/vmlinuz-* "$out/l2/bzImage"
    python3 "$BED/make_initramfs.py" "$out/l1/l1.img" --busybox "$out/root/bin/busybox" \
        --init "$BED/l1-init" --kernel-root "$apt/amd64" --modules "$L1_MODULES"
    python3 "$BED/make_initramfs.py" "$out/l2/l2.img" --busybox "$out/root/bin/busybox" \
        --init "$BED/l2-init" --kernel-root "$apt/cloud-amd64" --modules "$L2_MODULES"
    program_tree "$apt/l2" usr/bin/redis-server "$apt/l2-tree"
    python3 "$BED/make_initramfs.py" "$out/l2/redis.img" --busybox "$out/root/bin/busybox" \
        --init "$BED/l2-init" --kernel-root "$apt/cloud-amd64" --modules "$REDIS_MODULES" \
        --tree "$apt/l2-tree"
    "$BED/qemu" "$out" --version >"$apt/log" 2>&1 ||
        { cat "$apt/log" >&2 && die "The fetched QEMU does not run on this system"; }
    head -n 1 "$apt/log" >>"$out/packages.txt"
}

drop_old() {
    local cache=$1 keep=$2 old
    # Beds of other recipes that nobody used for long, and what an interrupted build left.
    find "$cache" -mindepth 1 -maxdepth 1 -type d ! -name "$keep" -mtime "+$KEEP_OLD_DAYS" |
        while read -r old; do rm -rf -- "$old"; done
    find "$cache" -mindepth 1 -maxdepth 1 -type d -name '.building.*' |
        while read -r old; do rm -rf -- "$old"; done
}

main() {
    local cache hash place work started=$SECONDS
    [ "$(dpkg --print-architecture)" = amd64 ] || die "The bed needs an amd64 system"
    cache=$(cache_dir bed)
    hash=$(recipe_hash)
    place=$cache/$hash
    if [ ! -d "$place" ]; then
        mkdir -p "$cache"
        exec 8>"$cache/.lock"
        flock -n 8 || { note "waiting for another build of the bed" && flock 8; }
        if [ ! -d "$place" ]; then
            log "Building the nested bed (about 210 MB to fetch, once)"
            need_packages python3 zstd
            drop_old "$cache" "$hash"
            work=$(mktemp -d "$cache/.building.XXXXXX")
            on_exit rm -rf -- "$work"
            private_apt "$work/qemu" "$(debian_mirror)" "$QEMU_RELEASE"
            fetch_qemu "$work/qemu"
            private_apt "$work/apt" "$(debian_mirror)" "$RELEASE"
            fetch_packages "$work/apt"
            unpack "$work/qemu" "$work/apt" "$work/bed"
            make_images "$work/apt" "$work/bed"
            sync -f "$work/bed"
            mv -T "$work/bed" "$place"
            note "built in $((SECONDS - started)) s, $(du -sh "$place" | cut -f 1)"
        fi
        exec 8>&-
    fi
    touch "$place"
    echo "$place" >&9
}

main
