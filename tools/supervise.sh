#!/usr/bin/env bash
# Runs a command, and runs it again when it was preempted or broke down:
#
#   tools/supervise.sh [--max-restarts N] [--backoff S] [--folder DIR] -- python train.py CONFIG.py --resume auto ...
#
#   the command ended with           so the supervisor
#   0                                ends with 0
#   1 an error, 2 bad arguments      ends with the same code: another start would end like this one
#   126, 127 no such program         ends with the same code
#   75 preempted                     starts it again
#   any other code, or a signal      starts it again
#
# Before the n-th restart in a row it waits backoff * 2^(n-1) seconds (10 for the first), at most 300; a command that
# ran for --steady seconds (1800) begins a new row. After --max-restarts (20) in a row it ends with the last code.
# SIGTERM and SIGINT are passed on as SIGTERM; the supervisor then ends as soon as the command does, with its code.
# With --folder, output is appended to DIR/train.log, DIR/pid names the supervisor, and DIR/exit_code appears when it
# ends ("75 stopped" after a signal, else the code alone); DIR/lock is held as long as the supervisor or its command
# lives, so that no second one starts.
set -euo pipefail

max_restarts=20 backoff=10 steady=1800 folder=""

die() {
  echo "error: $1" >&2
  exit 2
}

while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --max-restarts | --backoff | --steady)
      [[ ${2-} =~ ^[0-9]{1,7}$ ]] || die "$1 = '${2-}' is not valid: it must be a whole number, at least 0."
      declare "$(tr - _ <<<"${1#--}")=$((10#$2))"
      ;;
    --folder)
      [[ -d ${2-} ]] || die "--folder = '${2-}' is not valid: it must be a folder that exists."
      folder=$2
      ;;
    *) die "'$1' is not valid: it must be --max-restarts, --backoff, --steady or --folder, or -- and the command." ;;
  esac
  shift 2
done
(($# > 1)) || die "there is no command: give it after --."
shift

say() { echo "supervise: $1"; }

end() {
  if [[ -n $folder ]]; then
    echo "$1${stopping:+ stopped}" >"$folder/exit_code.new"
    mv "$folder/exit_code.new" "$folder/exit_code" # whole, or not there
  fi
  exit "$1"
}

if [[ -n $folder ]]; then
  exec 9>>"$folder/lock"
  flock -w 1 9 || die "--folder = '$folder' is in use by another supervisor."
  rm -f "$folder/exit_code"
  echo $$ >"$folder/pid"
  exec >>"$folder/train.log" 2>&1
fi

child="" stopping="" interrupted=""
stop() {
  stopping=1 interrupted=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

# Waits for $child, through signals to this script, and leaves its exit code in $code.
await() {
  while :; do
    interrupted="" code=0
    wait "$child" || code=$?
    [[ -n $interrupted ]] || break
  done
  child=""
}

code=0 restarts=0
while :; do
  started=$SECONDS
  "$@" &
  child=$!
  [[ -z $stopping ]] || kill -TERM "$child" 2>/dev/null || true # the signal came just before there was a child
  await
  [[ -z $stopping ]] || { say "stopped, exit code $code" && end "$code"; }
  case $code in
    0) end 0 ;;
    1 | 2 | 126 | 127) say "exit code $code, an error that another start would meet again" && end "$code" ;;
    130) say "stopped by Ctrl-C, exit code 130" && end "$code" ;;
    75) reason="preempted, exit code 75" ;;
    *) if ((code > 128)); then reason="killed by signal $((code - 128))"; else reason="exit code $code"; fi ;;
  esac
  ((SECONDS - started < steady)) || restarts=0
  if ((restarts >= max_restarts)); then
    say "$reason; --max-restarts = $max_restarts is reached"
    end "$code"
  fi
  restarts=$((restarts + 1))
  delay=$((restarts > 16 ? 300 : backoff << (restarts - 1)))
  ((delay <= 300)) || delay=300
  say "$reason; start again in $delay s ($restarts of $max_restarts)"
  sleep "$delay" 9>&- &
  last=$code child=$!
  [[ -z $stopping ]] || kill -TERM "$child" 2>/dev/null || true # the signal came just before there was a child
  await
  [[ -z $stopping ]] || { say "stopped" && end "$last"; }
done
