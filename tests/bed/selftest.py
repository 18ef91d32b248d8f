#!/usr/bin/env python3
"""The bed's own judgement, tested without QEMU: what it must call a failure, it does. And how
scripts/test.sh adds up what test runners say, and what scripts make of their arguments.

Takes half a minute, most of it asleep, and needs busybox, bash and e2fsprogs: tests/bed/selftest.py
"""
import os
import shutil
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
                f"run_case() {{ :; }}; CASE={case}; L1={BED}/l1; LINUX_COUNTS={last}; "
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

    def cut(self, stream, seen, begun):
        """A stream of which the primary wrote `seen` bytes, and the backup all from `begun` on."""
        return stream[:seen], stream[begun:]

    def test_a_seamless_take_over_passes(self):
        self.good(counts(1, 20), counts(21, 50),
                  "to 20 on the primary, from 21 on the backup, 0 bytes twice")

    def test_a_line_cut_by_the_kill_is_whole_again(self):
        whole = counts(1, 50)
        for cut in range(len(counts(1, 19)), len(counts(1, 20)) + 1, 3):
            self.good(*self.cut(whole, cut, cut), " 0 bytes twice")

    def test_whole_lines_twice(self):
        self.good(counts(1, 20), counts(20, 50), f" {len(counts(20, 20))} bytes twice")
        self.good(counts(1, 20), counts(5, 50), f" {len(counts(5, 20))} bytes twice")
        self.good(counts(1, 20), counts(1, 50), f" {len(counts(1, 20))} bytes twice")

    def test_a_piece_twice_from_and_to_mid_line(self):
        whole, line = counts(1, 50), len(counts(1, 19))
        for seen in (line + 1, line + 9, line + 24, line + 35, line + 36, line + 37):
            for twice in (1, 2, 5, 17, 36, 38, 60, 77, 200, 500):
                self.good(*self.cut(whole, seen, seen - twice), f" {twice} bytes twice")

    def test_a_piece_twice_among_other_text(self):
        other = "L2 READY cpus 2\r\n\r\n[    9.1] [drm] a\r\n"
        whole = other + counts(1, 9) + other + counts(10, 10) + other + counts(11, 50) + other
        middle = len(other + counts(1, 9) + other + counts(10, 10) + other)
        for seen in (middle - 60, middle - 20, middle - 1, middle, middle + 30):
            for twice in (0, 1, 21, 80, 120):
                self.good(*self.cut(whole, seen, seen - twice), " bytes twice")

    def test_no_carriage_returns(self):
        whole = counts(1, 50).replace("\r", "")
        self.good(*self.cut(whole, 700, 650), " 50 bytes twice")

    def test_a_primary_that_showed_no_whole_count(self):
        self.good(*self.cut(counts(1, 50), 10, 4), "to 0 on the primary, from 2 on the backup")

    def test_missing_counts(self):
        self.bad(counts(1, 20), counts(22, 50), "counts 21 to 21 are missing")
        self.bad(counts(1, 20), counts(24, 50), "counts 21 to 23 are missing")
        self.bad(counts(1, 20), counts(21, 30) + counts(32, 50), "counts 31 to 31 are missing")
        self.bad(counts(1, 9) + counts(11, 20), counts(21, 50), "counts 10 to 10 are missing")
        self.bad(counts(2, 20), counts(21, 50), "counts 1 to 1 are missing")

    def test_missing_bytes(self):
        whole = counts(1, 50)
        line = len(counts(1, 20))
        for lost in range(1, 41):
            for seen in range(line, line + 41, 13):
                status, text = self.judge(*self.cut(whole, seen, seen + lost))
                self.assertEqual(status, 1, f"{lost} bytes lost after {seen}: {text}")

    def test_a_count_within_one_file_twice(self):
        self.bad(counts(1, 20) + counts(20, 25), counts(26, 50), "count 20 came after 20")
        self.bad(counts(1, 20), counts(21, 30) + counts(30, 50), "count 30 came after 30")

    def test_a_repetition_that_differs(self):
        self.bad(counts(1, 20), counts(18, 50, up=100.1), "count 18 came after 20")
        self.bad(counts(1, 20), counts(18, 18) + counts(19, 50, up=100.1), "repeats count 18, but")
        self.bad(counts(1, 20), "other\r\n" + counts(20, 50), "repeats count 20, but")

    def test_a_repetition_of_what_is_not_the_end(self):
        self.bad(counts(1, 20), counts(5, 9) + counts(21, 50), "repeats count 5, but")

    def test_a_clock_that_goes_back(self):
        self.bad(counts(1, 20), counts(21, 50, up=90), "uptime went back")
        self.bad(counts(1, 20), counts(21, 50, wall=1_600_000_000), "wall clock went back")

    def test_a_clock_that_jumps(self):
        self.bad(counts(1, 20), counts(21, 50, up=300), "clock jumped")
        self.bad(counts(1, 20), counts(21, 50, wall=1_700_000_030), "drifted")

    def test_a_silent_backup(self):
        self.bad(counts(1, 20), "", "no count after the primary's 20")
        self.bad(counts(1, 20), counts(19, 20), "no count after the primary's 20")
        self.bad("", "", "no count at all")

    def test_an_early_end(self):
        self.bad(counts(1, 20), counts(21, 49), "the last count is 49")
        self.bad(counts(1, 20), counts(21, 50)[:-2], "torn")

    def test_torn_lines(self):
        for noise in ("count 7 up \r\n", "count x\r\n", "count 30 up 106.00 wall 17000000"):
            self.bad(counts(1, 20), counts(21, 30) + noise + counts(31, 50), "torn")

    def test_bytes_that_are_no_text(self):
        text = counts(21, 50)
        for byte in "\0\1\377":
            self.bad(counts(1, 20), text[:100] + byte + text[100:], "torn")

    def test_a_guest_that_started_anew(self):
        self.bad(counts(1, 12) + "Kernel Offset: dis", "set: disabled\r\n" + counts(1, 50), "")


class Image(unittest.TestCase):
    """The verdict of the suite `redis` over the backup's image, with a file system of e2fsprogs.

    What the client says of keys has its own tests, in tests/redis-writer.
    """

    LOG = "/appendonlydir/appendonly.aof.1.incr.aof"
    TOOLS = os.path.dirname(shutil.which("e2fsck", path="/usr/sbin:/sbin:/usr/bin") or "/sbin/x")

    def judge(self, *changes, log=b"*0\r\n", client="exit 0"):
        """The verdict over an image with `log`, after debugfs made `changes` to it."""
        with tempfile.TemporaryDirectory() as case:
            image = f"{case}/b.img"
            with open(image, "wb") as file:
                file.truncate(8 << 20)
            with open(f"{case}/log", "wb") as file:
                file.write(log)
            with open(f"{case}/client", "w") as file:
                file.write(f"#!/bin/sh\n[ -s $2 ] || exit 9\n{client}\n")
            os.chmod(f"{case}/client", 0o755)
            subprocess.run([f"{self.TOOLS}/mke2fs", "-q", "-F", "-t", "ext4", image], check=True)
            for change in ("mkdir appendonlydir", f"write {case}/log {self.LOG}", *changes):
                subprocess.run([f"{self.TOOLS}/debugfs", "-w", "-R", change, image], check=True,
                               capture_output=True)
            script = (
                f"run_case() {{ :; }}; fail() {{ echo \"$*\"; exit 1; }}; CASE={case}; "
                f"sed 's,^\\. /h/,. {BED}/,' {BED}/suites/redis.sh >{case}/suite.sh; "
                f"TOOLS={self.TOOLS}; . {case}/suite.sh; WRITER={case}/client; "
                f"image_holds_all {image}"
            )
            done = subprocess.run(["busybox", "sh", "-c", script], capture_output=True, text=True)
            return done.returncode, done.stdout.strip() + done.stderr

    def bad(self, says, *changes, **more):
        status, text = self.judge(*changes, **more)
        self.assertEqual(status, 1, text)
        self.assertIn(says, text)

    def test_a_whole_image(self):
        self.assertEqual(self.judge(), (0, ""))

    def test_a_damaged_file_system(self):
        self.bad("e2fsck: status 4", "clri /appendonlydir")
        self.bad("e2fsck: status 4", f"sif {self.LOG} links_count 3")
        self.bad("e2fsck: status 4", "freeb 1 30")

    def test_an_image_that_was_not_unmounted(self):
        self.bad("was not unmounted", "feature needs_recovery")

    def test_a_log_that_is_not_there(self):
        self.bad(f"no {self.LOG} on the image", f"rm {self.LOG}")
        self.bad(f"no {self.LOG} on the image", log=b"")

    def test_a_log_that_lacks_a_key(self):
        self.bad("on the image: key 7", client="echo key 7 >&2; exit 1")


class Runner(unittest.TestCase):
    """run_l1.py, with a shell script in QEMU's place.

    The script sees $r (the results), $boot (1, 2, ...) and $list (the suites that it is to run).
    """

    def run_l1(self, script, timeout=20, boots=1, tries=1, suites=("one",)):
        with tempfile.TemporaryDirectory() as folder:
            qemu, logs = f"{folder}/qemu", f"{folder}/logs"
            os.mkdir(logs)
            with open(qemu, "w") as file:
                file.write(f"""#!/bin/sh
                    r={logs}/results.log settled={folder}/settled.list
                    echo >>{folder}/boots; boot=$(wc -l <{folder}/boots)
                    list=$(tr '\\n' ' ' <{folder}/suites.list); echo "list: $list" >>$r
                    {script}
                    """)
            os.chmod(qemu, 0o755)
            done = subprocess.run(
                [sys.executable, f"{BED}/run_l1.py", "--bed", folder, "--qemu", qemu,
                 "--share", f"h={folder}", "--logs", logs, "--timeout", str(timeout),
                 "--boots", str(boots), "--tries", str(tries), *suites],
                capture_output=True, text=True)
            self.logs = {
                os.path.relpath(f"{at}/{name}", logs)
                for at, _, names in os.walk(logs) for name in names}
            return done.returncode, done.stdout + done.stderr

    def check(self, script, status, *says, **more):
        got, text = self.run_l1(script, **more)
        self.assertEqual(got, status, text)
        for words in says:
            self.assertIn(words, text)
        return text

    RUN = "echo @run one case 5 >>$r;"
    PASS = RUN + "echo @pass one case fine >>$r;"
    DONE = "echo @done 0 >>$r;"
    # What the runner reads before it is read before what comes after.
    LATER = "sleep 1;"
    OOPS = "echo 'BUG: TASK stack guard page was hit'; exec sleep 60;"

    @staticmethod
    def case(suite, name, kind="pass"):
        return f"echo @run {suite} {name} 5 >>$r; echo @{kind} {suite} {name} said >>$r;"

    @staticmethod
    def suite(name):
        return f"echo @suite {name} >>$r;"

    def test_a_pass(self):
        text = self.check(self.PASS + self.DONE, 0, "1 passed, 0 failed", boots=3)
        self.assertNotIn("boot", text)

    def test_a_failure(self):
        self.check(self.PASS + self.case("one", "other", "fail") + self.DONE,
                   1, "1 passed, 1 failed", "failed: one other: said")

    def test_a_failure_has_another_try_in_a_new_boot(self):
        def script(second):
            return f"""{self.suite("one")}
                if [ $boot = 1 ]; then {self.case("one", "a", "fail")} {self.case("one", "b")}
                else grep -qx "one b" $settled && {self.case("one", "a", second)[:-1]}; fi
                {self.DONE}"""
        text = self.check(script("pass"), 0, "one a (try 1 of 2): said", "2 passed, 0 failed",
                          "passed at a later try only: one a: said", boots=3, tries=2)
        self.assertNotIn("boot 3", text)
        self.check(script("fail"), 1, "(try 2 of 2)", "failed: one a: said", "1 passed, 1 failed",
                   boots=3, tries=2)

    def test_a_suite_without_results(self):
        self.check(self.DONE, 1, "one: reported nothing")

    def test_a_case_without_an_end(self):
        self.check(self.PASS + "echo @run one other 5 >>$r;" + self.DONE, 1,
                   "other: gave no result")

    def test_an_early_end_of_l1(self):
        self.check(self.PASS, 3, "THE BED FAILED", "ended early", "not finished: one", "1 passed")

    def test_trouble_in_l1(self):
        for words in ("watchdog: BUG: soft lockup - CPU#1 stuck for 22s!", "Kernel panic - not",
                      "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", "Oops: 0000 [#1]",
                      "rcu: INFO: rcu_preempt self-detected stall on CPU"):
            self.check(self.PASS + f"echo '{words}';" + self.DONE, 3, "THE BED FAILED")

    def test_trouble_as_l1_ends(self):
        self.check(self.PASS + self.DONE + self.LATER + self.OOPS, 3, "1 passed, 0 failed")

    def test_a_run_out_of_time(self):
        text = self.check(self.PASS + "exec sleep 60", 3, "not done after 1 s", timeout=1, boots=3)
        self.assertNotIn("again", text)

    def test_a_share_that_does_not_mount(self):
        self.check("echo @bedfail no share >>$r; exec sleep 60", 3, "no share")

    def test_a_bed_that_fails_once(self):
        text = self.check(
            f"""{self.suite("one")} {self.case("one", "a")}
            if [ $boot = 1 ]; then {self.LATER} {self.OOPS} fi
            {self.case("one", "b")} {self.DONE}""",
            0, "the bed failed in boot 1: L1's kernel says: BUG: TASK stack guard page",
            "booting L1 again (boot 2 of at most 3) for one", "bed failure 1 of 1: L1's kernel",
            "2 passed, 0 failed", boots=3)
        self.assertNotIn("THE BED FAILED", text)
        self.assertLessEqual({"boot-1/console.log", "boot-1/results.log", "console.log"}, self.logs)

    def test_three_bed_failures_in_a_row(self):
        text = self.check(self.PASS + self.LATER + self.OOPS, 3, "boot 3 of at most 3",
                          "bed failure 3 of 3", "1 passed, 0 failed", "THE BED FAILED", boots=3)
        self.assertNotIn("boot 4", text)

    def test_boots_that_settle_nothing_end(self):
        text = self.check(self.suite("one") + self.RUN + self.LATER + self.OOPS, 3,
                          "bed failure 5 of 5", "0 passed, 0 failed", "THE BED FAILED", boots=30)
        self.assertNotIn("boot 6 of", text)

    def test_only_unfinished_suites_run_again(self):
        self.check(
            f"""case $boot in
            1) {self.suite("one")} {self.case("one", "a")}
               {self.suite("two")} {self.case("two", "b")} {self.case("two", "c", "skip")}
               {self.LATER} {self.OOPS} ;;
            2) {self.suite("two")} {self.case("two", "b")} {self.case("two", "c")}
               {self.suite("three")} {self.case("three", "d")} {self.DONE} ;;
            esac""",
            0, "list: one two three", "list: two three",
            "for two three", "3 passed, 0 failed, 1 skipped", boots=3, suites=("one", "two", "three"))

    def test_a_failure_stands_when_l1_boots_again(self):
        for again, counted in (("pass", "1 passed, 1 failed"), ("fail", "1 passed, 1 failed")):
            self.check(
                f"""{self.suite("one")}
                if [ $boot = 1 ]; then {self.case("one", "a", "fail")} {self.LATER} {self.OOPS} fi
                {self.case("one", "a", again)} {self.case("one", "b")} {self.DONE}""",
                1, counted, "failed: one a: said", boots=3)

    def test_a_failure_stands_when_the_bed_never_works(self):
        self.check(self.suite("one") + self.case("one", "a", "fail") + self.LATER + self.OOPS,
                   3, "failed: one a: said", "0 passed, 1 failed", "THE BED FAILED", boots=2)

    def test_a_failure_of_a_finished_suite_stands(self):
        self.check(
            f"""if [ $boot = 1 ]; then
                {self.suite("one")} {self.case("one", "a", "fail")} {self.suite("two")}
                {self.LATER} {self.OOPS}
            fi
            {self.suite("two")} {self.case("two", "b")} {self.DONE}""",
            1, "1 passed, 1 failed", "list: two", boots=3, suites=("one", "two"))

    def test_a_failure_that_the_bed_caused_is_none(self):
        self.check(
            f"""{self.suite("one")}
            if [ $boot = 1 ]; then echo 'Oops: 0000'; {self.case("one", "a", "fail")} sleep 60; fi
            {self.case("one", "a")} {self.DONE}""",
            0, "1 passed, 0 failed", "does not count: @fail one a", boots=3)


class Counts(unittest.TestCase):
    """scripts/lib/results.sh: what a test runner's log says, as test.sh adds it up."""

    def count(self, runner, text):
        with tempfile.NamedTemporaryFile("w") as log:
            log.write(text)
            log.flush()
            done = subprocess.run(
                ["bash", "-c",
                 f". {BED}/../../scripts/lib/results.sh; {runner}_results {log.name}"],
                capture_output=True, text=True)
            return done.stdout.strip() + done.stderr

    INNER = "    test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured\n"

    def test_nextest_counts_its_summary_only(self):
        for summary, wanted in (
                ("9 tests run: 7 passed, 2 failed, 1 skipped", "7 2"),
                ("9 tests run: 6 passed (1 slow), 1 failed, 2 timed out, 0 skipped", "6 3"),
                ("8 tests run: 7 passed (1 slow, 2 flaky), 1 failed, 0 skipped", "7 1"),
                ("1 test run: 1 passed, 3 skipped", "1 0"),
                ("4/9 tests run: 3 passed, 1 exec failed, 0 skipped", "3 1")):
            text = self.INNER + self.INNER.strip() + "\n"
            text += f"\x1b[32m     Summary\x1b[0m [   2.1s] {summary}\n"
            self.assertEqual(self.count("nextest", text + "        FAIL [ 0.1s] a b\n"), wanted)
        self.assertEqual(self.count("nextest", self.INNER), "0 0")

    def test_cargo_test_adds_up_its_programs(self):
        text = ("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured\n" + self.INNER +
                "test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured\n")
        self.assertEqual(self.count("libtest", text), "7 2")
        self.assertEqual(self.count("libtest", "error: could not compile\n"), "0 0")


class Scripts(unittest.TestCase):
    """What a script of scripts/ runs, with programs and packages that only say that they are asked for."""

    BUILD = """
        need_packages() { echo "installs $*"; }
        build_release() { echo builds; }
        run_release() { echo "runs $*"; }
    """

    def said(self, script, *arguments, program=None):
        """Lines of the standard output, of a script that ends with 0."""
        with tempfile.TemporaryDirectory() as tree:
            shutil.copytree(f"{BED}/../../scripts", f"{tree}/scripts")
            with open(f"{tree}/scripts/lib/build.sh", "w") as file:
                file.write(self.BUILD)
            if program is not None:
                os.makedirs(f"{tree}/target/release")
                with open(f"{tree}/target/release/{program}", "w") as file:
                    file.write('#!/bin/sh\necho "program $*"\n')
                os.chmod(f"{tree}/target/release/{program}", 0o755)
            done = subprocess.run(["bash", f"{tree}/scripts/{script}", *arguments],
                                  capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            return done.stdout.splitlines()

    def test_a_list_of_rows_needs_nothing_else(self):
        for arguments in (["--list"], ["--quick", "--list"]):
            said = self.said("fault-matrix.sh", *arguments, program="fault-matrix")
            self.assertEqual(said, ["program " + " ".join(arguments)])

    def test_a_matrix_is_one_wherever_it_is_asked_for(self):
        runs = [self.said("check-equality.sh", *arguments) for arguments in (
            ["--matrix", "--epochs", "300"], ["--epochs", "300", "--matrix"])]
        self.assertEqual(*runs)
        self.assertGreater(len(runs[0]), 20)
        self.assertNotIn("--matrix", " ".join(runs[0]))
        counted = [line for line in runs[0] if line.endswith("--epochs 300")]
        self.assertEqual(len(counted), len(runs[0]) - 4, "all but two builds that are broken")
        self.assertEqual(self.said("check-equality.sh", "--epochs", "3"),
                         ["runs check-equality --epochs 3"])


unittest.main(verbosity=1)
