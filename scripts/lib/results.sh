# What a test runner's log says; sourced. Each prints "PASSED FAILED", "0 0" where the log says
# nothing. A failed test's own output may hold lines of other runners: they are not counted.

# nextest_results LOG: of its one line "Summary [...] N tests run: N passed, N failed, N timed out".
nextest_results() {
    sed -E 's/\x1b\[[0-9;]*m//g' "$1" | grep -E '^ *Summary \[' | tail -n 1 | awk '
        { sub(/.* tests? run: /, ""); gsub(/\([^)]*\)/, ""); parts = split($0, part, ", ") }
        END {
            for (i = 1; i <= parts; i++) {
                if (part[i] ~ / passed *$/) passed += part[i]
                if (part[i] ~ / (failed|timed out) *$/) failed += part[i]
            }
            print passed + 0, failed + 0
        }'
}

# libtest_results LOG: of `cargo test`, a line "test result: ..." for each test program.
libtest_results() {
    sed -nE 's/^test result: [a-zA-Z]+\. ([0-9]+) passed; ([0-9]+) failed;.*/\1 \2/p' "$1" |
        awk '{ passed += $1; failed += $2 } END { print passed + 0, failed + 0 }'
}
