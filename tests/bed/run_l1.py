#!/usr/bin/env python3
"""Boots L1 under QEMU, follows what the suites in it report, and gives the verdict.

What enters: the bed, the shared folders, a hard time limit. What leaves: every result as a line,
a sign of life each 10 s, `N passed, N failed`, and the status: 0 all passed, 1 something failed,
3 the bed itself failed (L1 locked up, panicked, ended early, or ran out of time), each time.
What always holds: a case has one result; one that failed as often as it may (`--tries`) has failed,
and one that passed at a later try only is named at the end; QEMU dies with this program.

When the bed failed, or a case has another try, L1 boots again for what is not settled:

    boot --> suites --> L1 off in order --> verdict (0 or 1)
     ^         |
     |         v  the bed failed, or a case that has another try
     +---------+--> after BOOTS boots, or with no time left: status 3

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
# As long as each few of them settle something: what passed stays passed.
BOOTS, FRUITLESS = 30, 5
# What L1 may take to come up; to report a case whose limit is over, which it ends itself.
READY_S, OVERDUE_S = 300, 120
# For the rest of what L1's kernel says about its trouble.
LAST_WORDS_S = 0.3
EXIT_FAILED, EXIT_BED = 1, 3
PR_SET_PDEATHSIG = 1
COLOUR = sys.stdout.isatty()


def paint(code, text):
    return f"\x1b[{code}m{text}\x1b[0m" if COLOUR else text


def out(text):
    print(text, flush=True)


class BedFailed(Exception):
    """L1 or QEMU, not what is tested in it."""


class OutOfTime(BedFailed):
    """The whole run's limit is over: there is no time for another boot."""


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
    """What the suites said so far, over all boots of L1.

    A suite is finished when the next one begins, the last one when L1 has ended in order. A case
    is settled when it has passed, was skipped, or has failed `tries` times: an L1 that is about to
    fail has been seen to reset its guests first, so a failure is tried again in a new boot.
    """

    def __init__(self, suites, tries=1):
        self.suites, self.tries = list(suites), tries
        self.unfinished = list(suites)
        self.reported = {suite: 0 for suite in suites}
        # (suite, case) of each; with failures, what each said.
        self.passed, self.skipped, self.failures = [], [], {}
        self.troubles = []
        self.begin_boot()

    def begin_boot(self):
        self.suite = self.running = None
        self.ready = self.done = False

    def settled(self):
        lost = [name for name, said in self.failures.items() if len(said) >= self.tries]
        return self.passed + self.skipped + lost

    def again(self):
        """Cases that failed and have another try."""
        settled = self.settled()
        return [name for name in self.failures if name not in settled]

    def to_run(self):
        again = {suite for suite, _ in self.again()}
        return [suite for suite in self.suites if suite in self.unfinished or suite in again]

    def take(self, line):
        kind, _, rest = line.partition(" ")
        handler = getattr(self, "on_" + kind[1:], None) if kind.startswith("@") else None
        if handler:
            handler(rest)
        elif line.strip():
            out(f"    {line}")

    def on_ready(self, seconds):
        self.ready = True
        out(f"    L1 is up, its clock says {seconds} s")

    def on_suite(self, suite):
        self.close_running()
        if self.suite:
            self.finish(self.suite)
        self.suite = suite
        out(paint(1, f"suite {suite}"))

    def finish(self, suite):
        if suite in self.unfinished:
            self.unfinished.remove(suite)

    def finish_all(self):
        """L1 went through its list and is off."""
        self.unfinished = []

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
        self.reported[suite] = self.reported.get(suite, 0) + 1
        return (suite, case), f"{seconds:5.1f} s", detail

    def on_pass(self, rest):
        name, took, detail = self.ended(rest)
        if name not in self.settled():
            self.passed.append(name)
        out(f"  {paint(32, 'ok')}   {took}  {' '.join(name)}" + (f": {detail}" if detail else ""))

    def on_fail(self, rest):
        name, took, detail = self.ended(rest)
        said = self.failures.setdefault(name, []) if name not in self.settled() else []
        said.append(detail)
        of = f" (try {len(said)} of {self.tries})" if self.tries > 1 else ""
        out(f"  {paint(31, 'FAIL')} {took}  {' '.join(name)}{of}: {detail}")

    def on_skip(self, rest):
        name, took, detail = self.ended(rest)
        if name not in self.settled():
            self.skipped.append(name)
        out(f"  skip {took}  {' '.join(name)}: {detail}")

    def on_note(self, text):
        out(f"    {text}")

    def on_log(self, text):
        out(f"       | {text}")

    def on_bedfail(self, text):
        raise BedFailed(text)

    def on_done(self, _):
        self.close_running()
        self.done = True

    def bed_failed(self, reason):
        """What was settled before stays so; whatever ran at that time runs again."""
        self.troubles.append(str(reason))
        out(paint(31, f"the bed failed in boot {len(self.troubles)}: {reason}"))

    def beat(self):
        if not self.running:
            return "L1 works"
        suite, case, limit, since = self.running
        return f"{suite} {case}: {time.monotonic() - since:.0f} s of at most {limit} s"

    def overdue(self):
        """A case is over its limit and L1, which ends such cases, does not say so."""
        return self.running and time.monotonic() - self.running[3] > self.running[2] + OVERDUE_S

    def verdict(self):
        lost = {name: said for name, said in self.failures.items() if name not in self.passed}
        failed = [f"{' '.join(name)}: {said[-1]}" for name, said in lost.items()]
        failed += [f"{suite}: reported nothing" for suite, results in self.reported.items()
                   if not results and suite not in self.unfinished]
        for name, said in self.failures.items():
            if name not in lost:
                out(f"passed at a later try only: {' '.join(name)}: {said[0]}")
        for failure in failed:
            out(paint(31, f"failed: {failure}"))
        for suite in self.unfinished:
            out(paint(31, f"not finished: {suite}"))
        for boot, trouble in enumerate(self.troubles, 1):
            out(f"bed failure {boot} of {len(self.troubles)}: {trouble}")
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        out(f"{len(self.passed)} passed, {len(failed)} failed{skipped}")
        return EXIT_FAILED if failed else 0


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def qemu_command(options, results):
    folder = os.path.dirname(os.path.abspath(__file__))
    command = [options.qemu or f"{folder}/qemu", options.bed]
    command += "-M q35 -nodefaults -no-user-config -nographic -no-reboot".split()
    command += f"-accel tcg,thread={options.thread} -cpu EPYC,+svm,+npt,check=off -smp 2".split()
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
    """One boot: QEMU, L1's console, and the results, until L1 is off."""

    def __init__(self, options, report, deadline):
        self.report, self.deadline, self.limit = report, deadline, options.timeout
        self.console = Tail(f"{options.logs}/console.log")
        self.results = Tail(f"{options.logs}/results.log")
        self.recent = []
        self.started = self.spoken = time.monotonic()
        with open(self.console.path, "wb") as log:
            self.qemu = subprocess.Popen(
                qemu_command(options, self.results.path), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, preexec_fn=die_with_parent)

    def read(self):
        # Results first, and the console judged first: trouble comes before what it makes fail.
        results = self.results.lines()
        self.read_console(results)
        for line in results:
            self.report.take(line)
            self.spoken = time.monotonic()

    def read_console(self, results):
        for line in self.console.lines():
            self.recent = (self.recent + [line])[-40:]
            if BED_TROUBLE.search(line):
                for result in results:
                    out(f"    came with the bed's failure and does not count: {result}")
                raise BedFailed(f"L1's kernel says: {line.strip()}")

    def follow(self):
        while self.qemu.poll() is None:
            self.read()
            now = time.monotonic()
            if now > self.deadline:
                raise OutOfTime(
                    f"not done after {self.limit} s; at that time: {self.report.beat()}")
            if self.report.overdue():
                raise BedFailed(f"L1 stands still; {self.report.beat()}")
            if not self.report.ready and now - self.started > READY_S:
                raise BedFailed(f"L1 is not up after {READY_S} s")
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


def tell_driver(options, report):
    """What the driver in L1 is to run, and which cases of that it shall pass over."""
    for share in options.share:
        tag, _, path = share.partition("=")
        if tag == "h":
            with open(f"{path}/suites.list", "w", encoding="utf-8") as file:
                file.writelines(f"{suite}\n" for suite in report.to_run())
            with open(f"{path}/settled.list", "w", encoding="utf-8") as file:
                file.writelines(f"{suite} {case}\n" for suite, case in report.settled())


def set_logs_aside(options, boot):
    """All of a failed boot's logs go to a folder of their own."""
    aside = f"{options.logs}/boot-{boot}"
    os.mkdir(aside)
    for entry in os.listdir(options.logs):
        if not entry.startswith("boot-"):
            os.rename(f"{options.logs}/{entry}", f"{aside}/{entry}")


def boot(options, report, deadline):
    """Boots L1 for what is unfinished; whether it lived, and whether there is time for another."""
    report.begin_boot()
    tell_driver(options, report)
    bed = Bed(options, report, deadline)
    try:
        bed.follow()
        report.finish_all()
        return True, True
    except BedFailed as reason:
        time.sleep(LAST_WORDS_S)
        bed.stop()
        bed.recent += bed.console.lines()
        for line in bed.recent[-30:]:
            out(f"       | {line}")
        report.bed_failed(reason)
        return False, not isinstance(reason, OutOfTime)
    finally:
        bed.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bed", required=True, help="what build.sh made")
    parser.add_argument("--qemu", help="another program in QEMU's place (for tests)")
    parser.add_argument("--share", action="append", default=[], metavar="TAG=FOLDER")
    parser.add_argument("--logs", required=True, help="console.log and results.log go here")
    parser.add_argument("--timeout", type=int, required=True, metavar="SECONDS")
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB")
    parser.add_argument("--boots", type=int, default=BOOTS, help="at most, when the bed fails")
    parser.add_argument("--tries", type=int, default=1, help="of a case, each in its own boot")
    parser.add_argument("--thread", choices=("multi", "single"), default="single",
                        help="whether each of L1's CPUs has a thread of the emulator to itself")
    parser.add_argument("suites", nargs="+")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report(options.suites, options.tries)
    deadline = time.monotonic() + options.timeout
    try:
        fruitless = 0
        for number in range(1, options.boots + 1):
            before = len(report.settled())
            lived, in_time = boot(options, report, deadline)
            fruitless = 0 if len(report.settled()) > before else fruitless + 1
            if lived and not report.again():
                return report.verdict()
            if number == options.boots or fruitless == FRUITLESS or not in_time:
                break
            set_logs_aside(options, number)
            out(paint(1, f"booting L1 again (boot {number + 1} of at most {options.boots}) for "
                         f"{' '.join(report.to_run())}"))
    except KeyboardInterrupt:
        return 130
    status = report.verdict()
    if not report.unfinished:
        return status
    out(paint(31, f"THE BED FAILED, no verdict on what it tests: {report.troubles[-1]}"))
    return EXIT_BED


sys.exit(main())
