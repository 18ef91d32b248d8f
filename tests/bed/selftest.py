#!/usr/bin/env python3
"""The bed's own judgement, tested without QEMU: what it must call a failure, it does.

Takes a second and needs busybox: tests/bed/selftest.py
"""
import os
import subprocess
import sys
import tempfile
import unittest

BED = os.path.dirname(os.path.abspath(__file__))


def counts(start, end, up=100.0, wall=1_700_000_000):
    """Records as L2's init prints them, five a second."""
    lines = []
    for number in range(start, end + 1):
        seconds = up + number / 5
        lines.append(f"count {number} up {seconds:.2f} wall {wall + int(seconds)} cpu 0\r\n")
    return "".join(lines)


class Judge(unittest.TestCase):
    """The verdict of the suite `linux` over the two serial files."""

    def judge(self, primary, backup, last=50):
        with tempfile.TemporaryDirectory() as case:
            for name, text in (("a", primary), ("b", backup)):
                with open(f"{case}/{name}.serial", "w", newline="") as file:
                    file.write(text)
            script = (
                f'run_case() {{ :; }}; CASE={case}; LINUX_COUNTS={last}; '
                f". {BED}/suites/linux.sh; judge"
            )
            done = subprocess.run(["busybox", "sh", "-c", script], capture_output=True, text=True)
            return done.returncode, done.stdout.strip() + done.stderr

    def good(self, primary, backup, says):
        status, text = self.judge(primary, backup)
        self.assertEqual(status, 0, text)
        self.assertIn(says, text)

    def bad(self, primary, backup, says, last=50):
        status, text = self.judge(primary, backup, last)
        self.assertEqual(status, 1, text)
        self.assertIn(says, text)

    def test_a_seamless_take_over_passes(self):
        self.good(counts(1, 20), counts(21, 50), "20|21 (0 missing)")

    def test_a_line_cut_by_the_kill_is_whole_again(self):
        whole = counts(1, 50)
        for cut in range(len(counts(1, 19)) + 1, len(counts(1, 20))):
            self.good(whole[:cut], whole[cut:], "(0 missing)")

    def test_lost_releases_are_told(self):
        self.good(counts(1, 20), counts(24, 50), "20|24 (3 missing)")

    def test_too_many_missing(self):
        self.bad(counts(1, 20), counts(200, 250), "too many are missing", last=250)

    def test_a_repeated_count(self):
        self.bad(counts(1, 20), counts(20, 50), "count 20 came after 20")
        self.bad(counts(1, 20), counts(5, 50), "count 5 came after 20")

    def test_a_skipped_count(self):
        self.bad(counts(1, 20), counts(21, 30) + counts(32, 50), "jumped from 30 to 32")
        self.bad(counts(1, 9) + counts(11, 20), counts(21, 50), "jumped from 9 to 11")

    def test_a_clock_that_goes_back(self):
        self.bad(counts(1, 20), counts(21, 50, up=90), "uptime went back")
        self.bad(counts(1, 20), counts(21, 50, wall=1_600_000_000), "wall clock went back")

    def test_a_clock_that_jumps(self):
        self.bad(counts(1, 20), counts(21, 50, up=300), "clock jumped")
        self.bad(counts(1, 20), counts(21, 50, wall=1_700_000_030), "drifted")

    def test_a_silent_backup(self):
        self.bad(counts(1, 20), "", "no count after the primary")
        self.bad("", "", "no count at all")

    def test_an_early_end(self):
        self.bad(counts(1, 20), counts(21, 49), "the last count is 49")

    def test_torn_lines(self):
        noise = "count 7 up \r\ncount x\r\n"
        self.bad(counts(1, 20), counts(21, 30) + noise + counts(31, 50), "torn")


class Runner(unittest.TestCase):
    """run_l1.py, with a shell script in QEMU's place."""

    def run_l1(self, script, timeout=20, suites=("one",)):
        with tempfile.TemporaryDirectory() as folder:
            qemu = f"{folder}/qemu"
            with open(qemu, "w") as file:
                file.write(f"#!/bin/sh\nr={folder}/results.log\n{script}\n")
            os.chmod(qemu, 0o755)
            done = subprocess.run(
                [sys.executable, f"{BED}/run_l1.py", "--bed", folder, "--qemu", qemu,
                 "--logs", folder, "--timeout", str(timeout), *suites],
                capture_output=True, text=True)
            return done.returncode, done.stdout + done.stderr

    def check(self, script, status, *says, **more):
        got, text = self.run_l1(script, **more)
        self.assertEqual(got, status, text)
        for words in says:
            self.assertIn(words, text)

    RUN = "echo @run one case 5 >>$r;"
    PASS = RUN + "echo @pass one case fine >>$r;"

    def test_a_pass(self):
        self.check(self.PASS + "echo @done 0 >>$r", 0, "1 passed, 0 failed")

    def test_a_failure(self):
        self.check(self.PASS + self.RUN + "echo @fail one case because >>$r; echo @done 0 >>$r",
                   1, "1 passed, 1 failed", "because")

    def test_a_suite_without_results(self):
        self.check("echo @done 0 >>$r", 1, "one: reported nothing")

    def test_a_case_without_an_end(self):
        self.check(self.PASS + self.RUN + "echo @done 0 >>$r", 1, "case: gave no result")

    def test_an_early_end_of_l1(self):
        self.check(self.PASS, 3, "THE BED FAILED", "ended early")

    def test_trouble_in_l1(self):
        for words in ("watchdog: BUG: soft lockup - CPU#1 stuck for 22s!", "Kernel panic - not",
                      "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", "Oops: 0000 [#1]",
                      "rcu: INFO: rcu_preempt self-detected stall on CPU"):
            self.check(self.PASS + f"echo '{words}'; echo @done 0 >>$r", 3, "THE BED FAILED")

    def test_a_run_out_of_time(self):
        self.check(self.PASS + "exec sleep 60", 3, "not done after 1 s", timeout=1)

    def test_a_share_that_does_not_mount(self):
        self.check("echo @bedfail no share >>$r; exec sleep 60", 3, "no share")


unittest.main(verbosity=1)
