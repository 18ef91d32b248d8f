# Linux finds the PCI bus, virtio-rng and the virtio console; the first two live through the loss of
# the primary.

# The suite linux's helpers, without its cases.
LINUX_ROUNDS=0 LINUX_VCPUS=''
. /h/suites/linux.sh
LINUX_COUNTS=60

finds_devices() {
    start a "$VMM" --api-socket "path=$CASE/a.sock" --kernel /bed/l2/vmlinux \
        --initramfs /bed/l2/l2.img --cmdline "$L2_CMDLINE bed.count=10 bed.rng=1" \
        --cpus boot=2 --memory size=256M --serial "file=$CASE/a.serial" --console off \
        --event-monitor "path=$CASE/a.events"
    wait_serial a "^hwrng virtio_rng" "$L2_READY_S"
    wait_serial a "^rng [0-9a-f]\{16\}" 60
    "$REMOTE" "--api-socket=$CASE/a.sock" info >"$CASE/info" || fail "no info"
    "$REMOTE" "--api-socket=$CASE/a.sock" counters >"$CASE/counters" || fail "no counters"
    wait_serial a "^L2 END" 60
    expect_status a 0 60
    no_complaints a
    serial_has a "^pci 0000:00:00.0 0x1b36:0x0008 class 0x060000 " || fail "no host bridge"
    serial_has a "^pci 0000:00:01.0 0x1af4:0x1044 class 0xff0000 driver virtio_rng" ||
        fail "no virtio-rng: $(grep -a '^pci' "$CASE/a.serial" | tr '\r\n' '  ')"
    grep -q '0000:00:01.0' "$CASE/info" || fail "vm.info does not tell where virtio-rng is"
    grep -q '"__rng"' "$CASE/counters" || fail "vm.counters does not know virtio-rng"
    grep -q '"activated"' "$CASE/a.events" || fail "no event told of the activation"
    [ "$(grep -a '^rng ' "$CASE/a.serial" | sort -u | wc -l)" = 10 ] ||
        fail "random numbers came twice"
    detail "$(grep -a '^pci 0000:00:01' "$CASE/a.serial" | tr -d '\r'), $(
    )$(tr -d '\n ' <"$CASE/counters" | grep -o '"__rng":{[^}]*}')"
}

# Each count reads the device: it stands still where the device does.
rng_survives() {
    L2_CMDLINE="$L2_CMDLINE bed.rng=1"
    survives 2
    serial_has b "^rng [0-9a-f]\{16\}" || fail "virtio-rng is silent on the backup"
}

# The kernel has the console's driver built in.
talks_on_console() {
    local n
    start a "$VMM" --api-socket "path=$CASE/a.sock" --kernel /bed/l2/vmlinux \
        --initramfs /bed/l2/l2.img --cmdline "$L2_CMDLINE bed.count=10 bed.hvc=1" \
        --cpus boot=2 --memory size=256M --serial "file=$CASE/a.serial" \
        --console "file=$CASE/a.console"
    wait_serial a "^L2 END" "$L2_READY_S"
    expect_status a 0 60
    no_complaints a
    serial_has a "^pci 0000:00:02.0 0x1af4:0x1043 class 0x078000 driver virtio_console" ||
        fail "no virtio console: $(grep -a '^pci' "$CASE/a.serial" | tr '\r\n' '  ')"
    tr -d '\r' <"$CASE/a.console" >"$CASE/console"
    n=1
    while [ "$n" -le 10 ]; do
        grep -qx "hvc $n" "$CASE/console" || fail "count $n is not on the console"
        n=$((n + 1))
    done
    detail "10 counts on hvc0"
}

run_case devices 400 finds_devices
run_case console 400 talks_on_console
run_case kill-with-rng "$limit" rng_survives
