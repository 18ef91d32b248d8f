#!/usr/bin/env python3
"""Boots L1 once under QEMU, follows what the suites in it report, and gives the verdict.

What enters: the bed, the shared folders, a hard time limit. What leaves: every result as a line,
a sign of life each 10 s, `N passed, N failed`, and the status: 0 all passed, 1 something failed,
3 the bed itself failed (L1 locked up, panicked, ended early, or ran out of time).
What always holds: a bed that failed is never reported as a pass; QEMU dies with this program.

The suites' lines (@run, @pass, ...; see l1/driver.sh) come through L1's second serial port, so
that the kernel's messages on the first cannot tear them.
"""
import argparse
import ctypes
import os
import re
import signal
import subprocess
import sys
import time

KERNEL_LINE = "console=ttyS0 panic=-1 quiet mitigations=off tsc=reliable"
BED_TROUBLE = re.compile(
    r"soft lockup|hard LOCKUP|rcu.*(self-detected stall|detected stalls|detected expedited stalls)"
    r"|Kernel panic|Oops|BUG: |general protection fault|double fault|Out of memory: Killed"
)
BEAT_S = 10
EXIT_FAILED, EXIT_BED = 1, 3
PR_SET_PDEATHSIG = 1
COLOUR = sys.stdout.isatty()


def paint(code, text):
    return f"\x1b[{code}m{text}\x1b[0m" if COLOUR else text


def out(text):
    print(text, flush=True)


class BedFailed(Exception):
    """L1 or QEMU, not what is tested in it."""


class Tail:
    """The new whole lines of a file that another process appends to."""

    def __init__(self, path):
        self.path, self.offset, self.rest = path, 0, b""

    def lines(self):
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self.offset += len(data)
        *whole, self.rest = (self.rest + data).split(b"\n")
        return [line.rstrip(b"\r").decode("utf-8", "replace") for line in whole]


class Report:
    """What the suites said so far."""

    def __init__(self, suites):
        self.expected = list(suites)
        self.results = {suite: 0 for suite in suites}
        self.passed, self.failed, self.skipped = 0, [], 0
        self.running = None
        self.done = False

    def take(self, line):
        kind, _, rest = line.partition(" ")
        handler = getattr(self, "on_" + kind[1:], None) if kind.startswith("@") else None
        if handler:
            handler(rest)
        elif line.strip():
            out(f"    {line}")

    def on_ready(self, seconds):
        out(f"    L1 is up, its clock says {seconds} s")

    def on_suite(self, suite):
        out(paint(1, f"suite {suite}"))

    def on_run(self, rest):
        self.close_running()
        suite, case, limit = rest.split()
        self.running = (suite, case, int(limit), time.monotonic())

    def close_running(self):
        if self.running:
            suite, case, *_ = self.running
            self.on_fail(f"{suite} {case} gave no result")

    def ended(self, rest):
        suite, _, rest = rest.partition(" ")
        case, _, detail = rest.partition(" ")
        seconds = time.monotonic() - self.running[3] if self.running else 0
        self.running = None
        self.results[suite] = self.results.get(suite, 0) + 1
        return f"{suite} {case}", f"{seconds:5.1f} s", detail

    def on_pass(self, rest):
        name, took, detail = self.ended(rest)
        self.passed += 1
        out(f"  {paint(32, 'ok')}   {took}  {name}" + (f": {detail}" if detail else ""))

    def on_fail(self, rest):
        name, took, detail = self.ended(rest)
        self.failed.append(f"{name}: {detail}")
        out(f"  {paint(31, 'FAIL')} {took}  {name}: {detail}")

    def on_skip(self, rest):
        name, took, detail = self.ended(rest)
        self.skipped += 1
        out(f"  skip {took}  {name}: {detail}")

    def on_note(self, text):
        out(f"    {text}")

    def on_log(self, text):
        out(f"       | {text}")

    def on_bedfail(self, text):
        raise BedFailed(text)

    def on_done(self, _):
        self.close_running()
        self.done = True

    def beat(self):
        if not self.running:
            return "L1 works"
        suite, case, limit, since = self.running
        return f"{suite} {case}: {time.monotonic() - since:.0f} s of at most {limit} s"

    def verdict(self):
        for suite in self.expected:
            if self.results[suite] == 0:
                self.failed.append(f"{suite}: reported nothing")
        for failure in self.failed:
            out(paint(31, f"failed: {failure}"))
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        out(f"{self.passed} passed, {len(self.failed)} failed{skipped}")
        return EXIT_FAILED if self.failed else 0


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def qemu_command(options, results):
    folder = os.path.dirname(os.path.abspath(__file__))
    command = [options.qemu or f"{folder}/qemu", options.bed]
    command += "-M q35 -nodefaults -no-user-config -nographic -no-reboot".split()
    command += "-accel tcg,thread=multi -cpu EPYC,+svm,+npt,check=off -smp 2".split()
    command += ["-m", str(options.memory)]
    command += ["-kernel", f"{options.bed}/l1/vmlinux", "-initrd", f"{options.bed}/l1/l1.img"]
    command += ["-append", KERNEL_LINE, "-serial", "stdio", "-serial", f"file:{results}"]
    for share in options.share:
        tag, _, path = share.partition("=")
        writable = "off" if tag == "out" else "on"
        command += ["-virtfs", f"local,path={path},mount_tag={tag},security_model=none,"
                    f"multidevs=remap,readonly={writable}"]
    return command


class Bed:
    """QEMU, L1's console, and the results, until L1 is off."""

    def __init__(self, options, report):
        self.report, self.limit = report, options.timeout
        self.console = Tail(f"{options.logs}/console.log")
        self.results = Tail(f"{options.logs}/results.log")
        self.recent = []
        self.started = self.spoken = time.monotonic()
        with open(self.console.path, "wb") as log:
            self.qemu = subprocess.Popen(
                qemu_command(options, self.results.path), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, preexec_fn=die_with_parent)

    def read(self):
        for line in self.results.lines():
            self.report.take(line)
            self.spoken = time.monotonic()
        for line in self.console.lines():
            self.recent = (self.recent + [line])[-40:]
            if BED_TROUBLE.search(line):
                raise BedFailed(f"L1's kernel says: {line.strip()}")

    def follow(self):
        while self.qemu.poll() is None:
            self.read()
            now = time.monotonic()
            if now - self.started > self.limit:
                raise BedFailed(f"not done after {self.limit} s; at that time: {self.report.beat()}")
            if now - self.spoken >= BEAT_S:
                out(f"    ... {self.report.beat()}, {now - self.started:.0f} s in all")
                self.spoken = now
            time.sleep(0.2)
        self.read()
        if not self.report.done:
            raise BedFailed(f"L1 ended early (QEMU's status {self.qemu.returncode})")

    def stop(self):
        if self.qemu.poll() is None:
            self.qemu.kill()
        self.qemu.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bed", required=True, help="what build.sh made")
    parser.add_argument("--qemu", help="another program in QEMU's place (for tests)")
    parser.add_argument("--share", action="append", default=[], metavar="TAG=FOLDER")
    parser.add_argument("--logs", required=True, help="console.log and results.log go here")
    parser.add_argument("--timeout", type=int, required=True, metavar="SECONDS")
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB")
    parser.add_argument("suites", nargs="+")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report(options.suites)
    bed = Bed(options, report)
    try:
        bed.follow()
    except BedFailed as reason:
        bed.stop()
        bed.recent += bed.console.lines()
        for line in bed.recent[-30:]:
            out(f"       | {line}")
        report.verdict()
        out(paint(31, f"THE BED FAILED, no verdict on what it tests: {reason}"))
        return EXIT_BED
    except KeyboardInterrupt:
        return 130
    finally:
        bed.stop()
    return report.verdict()


sys.exit(main())
