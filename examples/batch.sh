#!/usr/bin/env bash
# A batch job: batch.sh SRC DST [convert options]. Run it again after a stop and it continues.
set -uo pipefail
src=$1 dst=$2
shift 2
moeconv convert "$src" "$dst" --progress plain "$@"
code=$?
case $code in
0) moeconv verify "$dst" ;;
74 | 75 | 130) # input/output failure, SIGTERM, Ctrl-C: nothing is lost
    echo "not finished (exit code $code): submit the same job again" >&2
    exit "$code" ;;
6)
    echo "another job is writing $dst" >&2
    exit "$code" ;;
*)
    exit "$code" ;;
esac
