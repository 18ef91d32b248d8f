#!/usr/bin/env python3
"""mend_qemu.py QEMU: mends one instruction of the bed's own copy of QEMU, in place.

What is wrong there. When L1's KVM enters L2 with an interrupt to inject (SVM, event injection of the
type INTR), QEMU's TCG delivers it, and leaves its vector in the CPU's `exception_index`, where the
main loop looks for an exception that is still to be delivered. Most often nobody looks before the
next exit to L1 clears it. When QEMU asks the CPU to leave its loop just then without an interrupt
to take (a kick that comes late, because the kicking thread was not running), the vector is
delivered a second time, as an exception, whether L2 has its interrupts off or not. L2 then runs an
interrupt handler at any place of its kernel: a double fault, a triple fault, or a CPU that spins.
The more the host is loaded, the later kicks come.

It has nothing to do with the VMM in L1: with `thread=single`, where kicks without an interrupt are
common, a guest of QEMU's own dies as well, within seconds.

What is done: the store is replaced by a no-op. The index is -1 then, as it is whenever a guest's
code runs. The place is found by QEMU's own dynamic symbols and checked byte by byte; a QEMU that
looks different is left as it is, and the exit status says so: 0 mended (or was mended before),
3 not recognised.
"""

import struct
import sys

UNKNOWN = 3
NOP6 = bytes.fromhex("660f1f440000")
# mov %esi, disp32(%rbx): `exception_index` lies before the CPU's registers, so disp32 < 0.
STORE = bytes.fromhex("89b3")
CALL = 0xE8
# From the store to the call that delivers the interrupt, at most.
REACH = 96


class Elf:
    """As much of a 64-bit little-endian ELF file as is needed here."""

    def __init__(self, data):
        self.data = data
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit ELF file")
        table, = struct.unpack_from("<Q", data, 40)
        size, count, _ = struct.unpack_from("<HHH", data, 58)
        self.sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + size * at)
                         for at in range(count)]

    def symbols(self):
        """Dynamic symbols: name to (address, size)."""
        found = {}
        for _, kind, _, _, offset, size, link, _, _, entry in self.sections:
            if kind != 11:
                continue
            names = self.sections[link][4]
            for at in range(offset, offset + size, entry):
                name, _, _, _, value, length = struct.unpack_from("<IBBHQQ", self.data, at)
                end = self.data.index(b"\0", names + name)
                found[self.data[names + name:end].decode()] = (value, length)
        return found

    def offset(self, address):
        for _, kind, _, start, offset, size, *_ in self.sections:
            if kind != 8 and start and start <= address < start + size:
                return offset + address - start
        raise ValueError(f"nothing of the file is at {address:#x}")


def calls(code, start, target):
    """Offsets of `call target` in code that lies at the address `start`."""
    for at in range(len(code) - 4):
        if code[at] == CALL:
            distance, = struct.unpack_from("<i", code, at + 1)
            if start + at + 5 + distance == target:
                yield at


def place(elf):
    """Offset in the file of the store, and whether it is still there."""
    symbols = elf.symbols()
    start, size = symbols["helper_vmrun"]
    target, _ = symbols["do_interrupt_x86_hardirq"]
    offset = elf.offset(start)
    code = elf.data[offset:offset + size]
    found = list(calls(code, start, target))
    if len(found) != 1:
        raise ValueError(f"{len(found)} calls of the delivery in helper_vmrun, not one")
    before = code[max(0, found[0] - REACH):found[0]]
    base = offset + found[0] - len(before)
    stores = [at for at in range(len(before) - 5)
              if before[at:at + 2] == STORE and before[at + 5] & 0x80]
    nops = [at for at in range(len(before) - 5) if before[at:at + 6] == NOP6]
    if len(stores) == 1 and not nops:
        return base + stores[0], True
    if len(nops) == 1 and not stores:
        return base + nops[0], False
    raise ValueError(f"{len(stores)} stores of the index before the delivery, not one")


def main():
    path = sys.argv[1]
    with open(path, "rb") as file:
        data = file.read()
    try:
        at, is_there = place(Elf(data))
    except (KeyError, ValueError, struct.error) as error:
        print(f"{path} is not the QEMU that can be mended: {error!r}", file=sys.stderr)
        return UNKNOWN
    if is_there:
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(NOP6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
