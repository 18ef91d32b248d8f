#!/bin/busybox sh
# Runs the suites that /h/suites.list names, in L1. Started by l1-init; descriptor 3 is ttyS1.
#
# What leaves, on descriptor 3, one line each (run_l1.py reads them):
#   @suite NAME
#   @run SUITE CASE LIMIT_S, then exactly one of
#   @pass SUITE CASE DETAIL | @fail SUITE CASE REASON | @skip SUITE CASE REASON
#   @note TEXT (shown) | @log TEXT (shown after a failure)
# What always holds: a case cannot outlive its limit; what a case started is gone before the next
# one begins.

ln -sf /h/bin/ip /sbin/ip
if [ -s /h/workspace ]; then
    # Test programs name files of the source tree by the paths that they were built with.
    workspace=$(cat /h/workspace)
    mkdir -p "$workspace"
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro w "$workspace" ||
        echo "@note cannot mount the source tree" >&3
    mount -t tmpfs tmp "$workspace/target/tmp" 2>/dev/null
fi

. /h/l1/lib.sh

while read -r SUITE; do
    say "@suite $SUITE"
    # A suite's file defines functions and calls `run_case` for each of its cases.
    ( . "/h/suites/$SUITE.sh" ) </dev/null
done </h/suites.list
