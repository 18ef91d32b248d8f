#!/usr/bin/env python3
"""Writes an initramfs: busybox, an init, kernel modules with their dependencies, a folder's files.

make_initramfs.py OUT --busybox FILE --init FILE [--kernel-root DIR --modules a,b,c] [--tree DIR]

Modules land in /mod, and /mod/order names them in the order in which to insmod them, so that no
kmod is needed on either side. The archive is `newc`, uncompressed: an emulated CPU would spend
seconds on decompressing it. Nothing of it depends on the clock or on the user: equal inputs give
equal bytes.
"""
import argparse
import lzma
import os
import re
import stat
import subprocess
import sys

FOLDERS = "bin sbin dev proc sys tmp run mod etc mnt root usr usr/bin usr/sbin var".split()
CONSOLE = (stat.S_IFCHR | 0o600, 5, 1)
NULL = (stat.S_IFCHR | 0o666, 1, 3)


class Archive:
    """A cpio archive in the `newc` format (Linux: early-userspace/buffer-format)."""

    def __init__(self):
        self.parts = []
        self.inodes = 0

    def entry(self, name, mode, data=b"", device=(0, 0)):
        self.inodes += 1
        name_bytes = name.encode() + b"\0"
        fields = [self.inodes, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name_bytes), 0]
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name_bytes
        self.parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def write(self, path):
        self.entry("TRAILER!!!", 0)
        with open(path, "wb") as file:
            file.write(b"".join(self.parts))


def read(path):
    with open(path, "rb") as file:
        return file.read()


def plain(name):
    """A module's name as the kernel spells it: no folder, no suffix, underscores."""
    return os.path.basename(name.strip()).split(".ko")[0].replace("-", "_")


def module_bytes(path):
    data = read(path)
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith(".zst"):
        return subprocess.run(["zstd", "-dcq", path], check=True, capture_output=True).stdout
    return data


def modules_in_order(kernel_root, wanted):
    """The (name, bytes) of the wanted modules, each after what it depends on."""
    (version,) = os.listdir(f"{kernel_root}/lib/modules")
    base = f"{kernel_root}/lib/modules/{version}"
    files = {}
    for folder, _, names in os.walk(f"{base}/kernel"):
        files.update({plain(name): f"{folder}/{name}" for name in names if ".ko" in name})
    builtin = {plain(line) for line in read(f"{base}/modules.builtin").decode().splitlines()}
    loaded = {}

    def add(name):
        if name in loaded or name in builtin:
            return
        if name not in files:
            sys.exit(f"{kernel_root}: no module {name}")
        data = module_bytes(files[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in filter(None, depends.group(1).decode().split(",") if depends else []):
            add(plain(needed))
        loaded[name] = data

    for name in wanted:
        add(plain(name))
    return loaded.items()


def add_tree(archive, tree):
    """All folders and files of a folder, each under its path there, executable."""
    for folder, folders, names in os.walk(tree):
        folders.sort()
        place = os.path.relpath(folder, tree)
        if place not in [".", *FOLDERS]:
            archive.entry(place, stat.S_IFDIR | 0o755)
        for name in sorted(names):
            path = os.path.normpath(f"{place}/{name}")
            archive.entry(path, stat.S_IFREG | 0o755, read(f"{folder}/{name}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--busybox", required=True)
    parser.add_argument("--init", required=True)
    parser.add_argument("--kernel-root", help="an unpacked kernel package")
    parser.add_argument("--modules", default="", help="comma-separated names")
    parser.add_argument("--tree", help="a folder whose files are added")
    options = parser.parse_args()

    archive = Archive()
    for folder in FOLDERS:
        archive.entry(folder, stat.S_IFDIR | 0o755)
    archive.entry("dev/console", CONSOLE[0], device=CONSOLE[1:])
    archive.entry("dev/null", NULL[0], device=NULL[1:])
    archive.entry("bin/busybox", stat.S_IFREG | 0o755, read(options.busybox))
    archive.entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    archive.entry("init", stat.S_IFREG | 0o755, read(options.init))
    if options.tree:
        add_tree(archive, options.tree)
    order = []
    if options.modules:
        for name, data in modules_in_order(options.kernel_root, options.modules.split(",")):
            archive.entry(f"mod/{name}.ko", stat.S_IFREG | 0o644, data)
            order.append(name + "\n")
    archive.entry("mod/order", stat.S_IFREG | 0o644, "".join(order).encode())
    archive.write(options.out)


main()
