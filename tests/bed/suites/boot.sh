# Our VMM boots a stock Debian kernel (ELF, bzImage), reboots it, ends with it.

boots() { # KERNEL VCPUS
    start a "$VMM" --api-socket "path=$CASE/a.sock" --kernel "/bed/l2/$1" \
        --initramfs /bed/l2/l2.img --cmdline "$L2_CMDLINE bed.count=10" \
        --cpus "boot=$2" --memory size=256M --serial "file=$CASE/a.serial" --console off
    wait_serial a "^L2 READY cpus $2 " "$L2_READY_S"
    wait_serial a "^count 10 " 60
    wait_serial a "^L2 END" 60
    expect_status a 0 60
    no_complaints a
    detail "$(grep -a '^L2 READY' "$CASE/a.serial" | tr -d '\r')"
}

reboots() {
    start a "$VMM" --api-socket "path=$CASE/a.sock" --kernel /bed/l2/vmlinux \
        --initramfs /bed/l2/l2.img --cmdline "$L2_CMDLINE bed.count=2 bed.end=reboot" \
        --cpus boot=1 --memory size=256M --serial "file=$CASE/a.serial" --console off
    wait_for 150 "the guest to come up a second time" \
        sh -c "[ \$(grep -ac '^L2 READY' '$CASE/a.serial') -ge 2 ]"
    still_up a
    detail "came up again in the same process"
}

run_case elf-2-vcpus 400 boots vmlinux 2
run_case bzimage-1-vcpu 500 boots bzImage 1
run_case reboot 400 reboots
