# Test programs (libtest) that need a KVM, for hosts that have none.
# Each test runs in a process of its own, one after the other, with a limit. nested.sh --kvm-tests makes /h/kvm-tests.list, whose lines
# are PROGRAM<tab>FOLDER (the folder in which cargo would run it).
KVM_TEST_LIMIT_S=${KVM_TEST_LIMIT_S:-120}

one_test() { # PROGRAM FOLDER TEST
    local status=0
    cd "$2" || fail "no folder $2"
    export TMPDIR=/tmp RUST_BACKTRACE=1
    [ -r /h/kvm-tests.env ] && . /h/kvm-tests.env
    "$1" --exact "$3" --test-threads=1 --nocapture || status=$?
    if [ "$status" -ne 0 ]; then
        fail "status $status: $(grep -a 'panicked at' -A 1 "$CASE/log" | tr '\n' ' ' |
            cut -c 1-200)"
    fi
    grep -qa '^test result: ok\. 1 passed' "$CASE/log" && return 0
    grep -qa '^test result: ok\. 0 passed; 0 failed; 1 ignored' "$CASE/log" && skip "ignored"
    fail "the program ended well without a result"
}

all_tests_of() { # PROGRAM FOLDER
    local name test
    name=$(basename "$1" | sed 's/-[0-9a-f]\{16\}$//')
    (cd "$2" && timeout 120 "$1" --list --format terse) >/run/tests.list 2>/run/tests.err
    if [ $? -ne 0 ]; then
        say "@run kvm $name 120"
        say "@fail kvm $name cannot list its tests: $(tail -n 1 /run/tests.err)"
        return
    fi
    sed -n 's/: test$//p' /run/tests.list >/run/tests.names
    while read -r test; do
        run_case "$name::$test" "$KVM_TEST_LIMIT_S" one_test "$1" "$2" "$test"
    done </run/tests.names
}

# The shell of a case reads this file too, and must not list the tests again.
if [ -z "${CASE_FUNCTION:-}" ]; then
    tab=$(printf '\t')
    while IFS=$tab read -r program folder; do
        all_tests_of "$program" "$folder"
    done </h/kvm-tests.list
fi
