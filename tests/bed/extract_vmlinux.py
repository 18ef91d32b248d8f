#!/usr/bin/env python3
"""extract_vmlinux.py VMLINUZ OUT: writes the ELF image inside a bzImage.

The payload is found through the setup header (Linux x86 boot protocol 2.08 and later:
`setup_sects` at 0x1f1, `payload_offset` at 0x248, `payload_length` at 0x24c). Booting the ELF
spares an emulated CPU the decompression.
"""
import gzip
import lzma
import struct
import subprocess
import sys


def decompress(payload):
    # The last four bytes are the uncompressed size, which is no part of the stream.
    magic, stream = payload[:4], payload[:-4]
    if magic[:2] == b"\x1f\x8b":
        return gzip.decompress(stream)
    if magic == b"\xfd7zX":
        return lzma.LZMADecompressor().decompress(stream)
    for start, tool in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4")):
        if magic == start:
            return subprocess.run([tool, "-dc"], input=stream, capture_output=True).stdout
    sys.exit(f"The kernel's payload has an unknown compression: {magic.hex()}")


def main():
    source, destination = sys.argv[1:]
    with open(source, "rb") as file:
        image = file.read()
    if image[0x202:0x206] != b"HdrS":
        sys.exit(f"{source}: not a bzImage")
    setup_bytes = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    elf = decompress(image[setup_bytes + offset : setup_bytes + offset + length])
    if elf[:4] != b"\x7fELF":
        sys.exit(f"{source}: the payload is not an ELF image")
    with open(destination, "wb") as file:
        file.write(elf)


main()
