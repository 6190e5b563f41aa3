#!/bin/sh
# A shell loop over pipelines of short-lived processes: every line follows from its number and the line before.
#     pipeline.sh [ROUNDS [BYTES [GATE]]]
# With GATE it goes on after half of the rounds only when there is a file of that name.
# Reads stdin first if it is not a terminal or empty; the digest of what came is the start value.
set -eu
rounds=${1:-200}
bytes=${2:-300000}

if [ -t 0 ]; then state=start; else state=$(sha256sum | cut -c 1-16); fi
echo "start $state"
round=1
while [ "$round" -le "$rounds" ]; do
    state=$(yes "$state $round" | head -c "$bytes" | sort | uniq -c | sha256sum | cut -c 1-16)
    echo "round $round $state"
    [ $((round % 10)) -ne 0 ] || echo "mark $round" >&2
    while [ -n "${3:-}" ] && [ "$round" -eq $((rounds / 2)) ] && [ ! -e "$3" ]; do sleep 0.1; done
    round=$((round + 1))
done
(
    sleep 0.1 &
    wait
    echo "done $rounds $state"
) | tee /dev/null
