# What a healthy Linux never prints. Sourced by lib.sh.

BAD_WORDS='Oops|BUG:|BUG at|Kernel panic|soft lockup|hard LOCKUP|blocked for more than'
BAD_WORDS="$BAD_WORDS|rcu:.*stall|unstable|general protection|double fault|Call Trace"
BAD_WORDS="$BAD_WORDS|segfault|Unable to handle|WARNING:|bad page|corruption|clocksource: .*skew"

# complaints NAME: the first of them on NAME's serial port, in one line.
complaints() {
    grep -aE "$BAD_WORDS" "$CASE/$1.serial" | head -n 4 | tr -d '\r' | tr '\n' ';'
}

# no_complaints NAME: NAME's serial file (the kernel's log at its end included) shows no trouble.
no_complaints() {
    local found
    found=$(complaints "$1")
    [ -z "$found" ] || fail "$1's guest complains: $found"
    grep -qa "^L2 DMESG END" "$CASE/$1.serial" || fail "$1's guest did not show its whole log"
}
