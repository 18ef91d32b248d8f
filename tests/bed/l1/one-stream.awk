# Two serial files are one stream: what the guest said on the primary, then on the backup.
#
# What enters: FIRST and SECOND, the files; COUNTS, the guest's last count; JUMP_S, how far its
# clock may jump. What leaves: one line, and the status: 0 one stream, 1 not.
# What always holds: the second file begins with nothing but the end of the first, of any length
# from no byte to all of it, in mid-line perhaps; the stream, that piece taken once, has every count
# from 1 to COUNTS once, each after the one before; no clock goes back, jumps or drifts.
#
# For busybox awk, in an emulated machine: text is searched, not walked through byte by byte.

BEGIN {
    COUNT = "count [0-9]+ up [0-9]+[.][0-9][0-9] wall [0-9]+ cpu [0-9]+\r?"
    first = contents(FIRST)
    second = contents(SECOND)
    from = last_count(first)
    if (!match("\n" second, "\n" COUNT "\n"))
        verdict(1, from ? "the backup shows no count after the primary's " from : "no count at all")
    # The backup's first whole count: its text says where it belongs.
    landmark = substr(second, RSTART, RLENGTH - 1)
    start = RSTART
    end = RSTART + RLENGTH - 2
    at = index("\n" first, "\n" landmark)
    if (at) {
        twice = length(first) - at + start
        if (!overlaps(first, second, twice))
            verdict(1, "the backup repeats count " number(landmark) ", but not all around it")
        judge(twice)
    } else {
        # It repeats less than that: each length that fits is one way to read the stream.
        most = end < length(first) ? end : length(first)
        tail = substr(first, length(first) - most + 1)
        head = substr(second, 1, most)
        for (twice = most; twice >= 0; twice--)
            if (overlaps(tail, head, twice)) judge(twice)
    }
    verdict(1, why)
}

# judge(BYTES): ends with the verdict when the stream is good if so many bytes are there twice.
function judge(bytes) {
    why = fault(bytes)
    if (!why)
        verdict(0, sprintf("counts to %d on the primary, from %d on the backup, %d bytes twice, " \
            "clock steps up to %.2f s after the kill (before: %.2f s)", from, number(landmark),
            bytes, step_after, step_before))
}

function verdict(status, text) {
    print text
    exit status
}

function contents(file, text, found) {
    RS = "\001"
    found = getline text < file
    if (found < 0) verdict(1, "cannot read " file)
    return found ? text : ""
}

# overlaps(A, B, BYTES): A ends with what B begins with.
function overlaps(a, b, bytes) {
    if (bytes > length(a) || bytes > length(b)) return 0
    return substr(a, length(a) - bytes + 1) == substr(b, 1, bytes)
}

# number(LINE): of a line "count N ...".
function number(line, words) {
    split(line, words, " ")
    return words[2] + 0
}

# last_count(TEXT): the number of its last whole count, 0 if it has none.
function last_count(text, lines, n) {
    for (n = split(text, lines, "\n") - 1; n > 0; n--)
        if (lines[n] ~ ("^" COUNT "$")) return number(lines[n])
    return 0
}

# fault(BYTES): what is wrong with the stream when so many bytes are there twice; "" if nothing.
function fault(bytes, lines, words, n, i, last, up, wall, rise, tick, off, distance, ending) {
    step_before = step_after = last = 0
    n = split(first substr(second, bytes + 1), lines, "\n")
    for (i = 1; i <= n; i++) {
        if (lines[i] !~ /^count/) continue
        # The text after the last line feed is no line.
        if (i == n || lines[i] !~ ("^" COUNT "$"))
            return "a line is torn after count " last ": " substr(lines[i], 1, 60)
        split(lines[i], words, " ")
        if (words[2] <= last) return "count " words[2] " came after " last
        if (words[2] != last + 1)
            return "counts " last + 1 " to " words[2] - 1 " are missing"
        if (!last) { distance = words[6] - words[4]; ending = lines[i] ~ /\r$/ }
        else {
            rise = words[4] - up; tick = words[6] - wall; off = words[6] - words[4] - distance
            if (rise < 0) return "uptime went back from " up " to " words[4]
            if (tick < 0) return "the wall clock went back from " wall " to " words[6]
            if (rise > JUMP_S || tick > JUMP_S)
                return "the clock jumped by " rise " s (uptime), " tick " s (wall)"
            if (off > 5 || off < -5) return "wall clock and uptime drifted by " off " s"
            if (last < from && rise > step_before) step_before = rise
            if (last >= from && rise > step_after) step_after = rise
        }
        if ((lines[i] ~ /\r$/) != ending) return "count " words[2] " ends unlike the others"
        last = words[2] + 0; up = words[4]; wall = words[6]
    }
    if (last == from && last < COUNTS) return "the backup shows no count after the primary's " from
    if (last != COUNTS) return "the last count is " last ", not " COUNTS
    return ""
}
