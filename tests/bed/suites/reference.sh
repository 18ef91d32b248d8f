# The bed's L2 parts under the bed's own QEMU with KVM.
# When this passes and `boot` fails, it is our VMM; when this fails, it is the bed.

qemu_boots_linux() {
    start qemu /h/bin/qemu /bed -M q35 -nodefaults -no-user-config -nographic -no-reboot \
        -accel kvm -cpu host -smp 2 -m 256 -serial "file:$CASE/qemu.serial" \
        -kernel /bed/l2/vmlinux -initrd /bed/l2/l2.img \
        -append "$L2_CMDLINE bed.count=10"
    wait_serial qemu "^L2 READY" 180
    wait_serial qemu "^L2 END" 120
    expect_status qemu 0 60
    detail "$(grep -a '^L2 READY' "$CASE/qemu.serial" | tr -d '\r')"
}

run_case qemu 360 qemu_boots_linux
