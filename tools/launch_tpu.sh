#!/usr/bin/env bash
# Books Cloud TPU slices as a queued resource and trains on all their workers until the run has ended (docs/pods.md).
# Every gcloud command and flag here is in Google's "gcloud compute tpus queued-resources" and "... tpu-vm" reference.
set -euo pipefail

usage="usage: tools/launch_tpu.sh COMMAND --name NAME --zone ZONE [OPTIONS] [-- CONFIG.py --FIELD VALUE ...]

  create    book the slices, unless they are there, and wait until they are ACTIVE
  run       create, then install a revision on all workers, train, start again after preemption and faults, and in the
            end collect the logs; it may be interrupted and typed again, a run in progress is not touched
  status    state of the booking and of each worker
  logs      copy the log of each worker to FOLDER/NODE-WORKER.log; \`run\` does it in the end
  stop      ask the workers to save and end (after Ctrl-C on \`run\`, which would start them again)
  delete    give the slices back, with all that is on their disks

  --name NAME --zone ZONE      of the queued resource, needed by every command
  --project PROJECT            instead of gcloud's own
  --accelerator TYPE           of one slice, such as v5p-128; needed by create and run
  --runtime-version VERSION    instead of Google's for that type
  --slices N                   joined by the data-centre network (1); train with --mesh.data N
  --spot                       cheaper, may be taken away at any moment
  --reserved                   of a reservation
  --internal-ip                reach the workers by their internal addresses
  --revision REVISION          of this clone, copied to the workers (HEAD); what is not committed is not
  --setup COMMAND              run on each worker before training, such as mounting a bucket
  --logs FOLDER                (logs/NAME/TIME)
  --poll SECONDS               between two looks (60)
  --max-failures N             bookings that were lost or starts that failed in a row, after which \`run\` gives up (10)
  --dry-run                    print every command instead of running it"

die() { echo "error: $1" >&2 && exit 2; }
note() { [[ -n $dry_run ]] || echo "$(date +%H:%M:%S) $1" >&2; }
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash $BASH_VERSION is too old: it must be 4.4 or newer."

root=$(cd "$(dirname "$0")/.." && pwd)
# ---------------------------------------------------------------- arguments
command=${1-}
case $command in
  create | run | status | logs | stop | delete) shift ;;
  -h | --help) echo "$usage" && exit 0 ;;
  *) die "COMMAND = '$command' is not valid: it must be create, run, status, logs, stop or delete (--help)." ;;
esac

name="" zone="" project="" accelerator="" runtime_version="" slices=1 revision=HEAD setup=true logs=""
poll=60 max_failures=10 spot="" reserved="" internal_ip="" dry_run=""
while (($#)); do
  case $1 in
    --) shift && break ;;
    --spot | --reserved | --internal-ip | --dry-run) declare "$(tr - _ <<<"${1#--}")=1" && shift ;;
    --name | --zone | --project | --accelerator | --runtime-version | --slices | --revision | --setup | --logs | \
      --poll | --max-failures)
      (($# > 1)) || die "$1 needs a value."
      declare "$(tr - _ <<<"${1#--}")=$2" && shift 2
      ;;
    *) die "'$1' is not valid: it must be an option (--help); the config and its fields come after --." ;;
  esac
done
train=("$@")

[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  die "--name = '$name' is not valid: it must be 1 to 40 lower-case letters, digits and hyphens, a letter first."
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone = '$zone' is not valid: it must be a zone such as us-east5-a."
for field in slices poll max-failures; do
  variable=${field/-/_}
  [[ ${!variable} =~ ^[1-9][0-9]{0,4}$ ]] ||
    die "--$field = '${!variable}' is not valid: it must be a whole number from 1 to 99999."
done
[[ -z $spot || -z $reserved ]] || die "--spot and --reserved exclude each other: give one."
logs=${logs:-logs/$name/$(date +%Y%m%d-%H%M%S)}
if [[ $command == create || $command == run ]]; then
  case $accelerator in
    v4-[1-9]*) version=tpu-ubuntu2204-base ;; # Google: "TPU software versions"
    v5litepod-[1-9]*) version=v2-alpha-tpuv5-lite ;;
    v5p-[1-9]*) version=v2-alpha-tpuv5 ;;
    v6e-[1-9]*) version=v2-alpha-tpuv6e ;;
    *) die "--accelerator = '$accelerator' is not valid: it must be v4-N, v5litepod-N, v5p-N or v6e-N." ;;
  esac
  runtime_version=${runtime_version:-$version}
fi
if [[ $command == run ]]; then
  [[ $revision =~ ^[A-Za-z0-9] ]] || die "--revision = '$revision' is not valid: it must be a commit, branch or tag."
  [[ ${train[0]-} == *.py ]] ||
    die "CONFIG = '${train[0]-}' is not valid: it must be a config such as configs/baichuan2_7b.py, after --."
  [[ " ${train[*]}" =~ \ --workdir[\ =]([^\ ]+) ]] ||
    die "--workdir = '' is not valid: it must be a folder that all workers share and that outlives a slice, after --."
  [[ ${BASH_REMATCH[1]} != *://* ]] ||
    die "--workdir = '${BASH_REMATCH[1]}' is not valid: it must be a folder; mount the bucket with --setup."
  [[ " ${train[*]}" =~ \ --resume[\ =] ]] || train+=(--resume auto)
  # Before anything is booked; the workers get the revision, so a file that is not committed is not there.
  git -C "$root" rev-parse --quiet --verify "$revision^{commit}" >/dev/null ||
    die "--revision = '$revision' is not valid: this clone has no such commit, branch or tag."
  git -C "$root" cat-file -e "$revision:./${train[0]}" 2>/dev/null ||
    die "CONFIG = '${train[0]}' is not valid: it must be a file of revision $revision, its path from the top of the clone."
else
  ((${#train[@]} == 0)) || die "'${train[0]}' is not valid: only run takes a config."
fi

# ---------------------------------------------------------------- gcloud
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
exec 3>&1 # where --dry-run prints, also from inside $(...)

quoted() { # The words as the shell reads them.
  local word line=""
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}
call() { if [[ -n $dry_run ]]; then quoted "$@" >&3; else "$@"; fi; }

place=(--zone="$zone") && [[ -z $project ]] || place+=(--project="$project")
booking() { call gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }
vm() { call gcloud compute tpus tpu-vm "$@"; }
on_workers() { booking ssh --node=all --worker=all ${internal_ip:+--internal-ip} --command="$1"; }

# The state of the booking; MISSING if there is none, UNKNOWN if gcloud does not say. $1: what a dry run takes it for.
state() {
  if booking describe '--format=value(state.state)' 2>"$scratch/error"; then
    [[ -z $dry_run ]] || echo "$1"
  elif grep -qiE 'not.found' "$scratch/error"; then
    echo MISSING
  else
    cat "$scratch/error" >&2 && echo UNKNOWN
  fi
}

nodes() { if ((slices == 1)); then echo "$name"; else seq -f "$name-%.0f" 0 $((slices - 1)); fi; }

pause() { [[ -n $dry_run ]] || sleep "$1"; }

failures=0
failed() { # Counts a failure, and waits the longer the more there were in a row.
  failures=$((failures + 1))
  ((failures <= max_failures)) || { note "$1; --max-failures = $max_failures is reached." && exit 1; }
  note "$1; failure $failures of $max_failures."
  pause $((poll * failures))
}

# ---------------------------------------------------------------- steps
book() { # Returns when the slices are ACTIVE.
  local now last="" kind=(--node-id="$name")
  ((slices == 1)) || kind=(--node-count="$slices" --node-prefix="$name")
  [[ -z $spot ]] || kind+=(--spot)
  [[ -z $reserved ]] || kind+=(--reserved)
  now=$(state MISSING)
  while [[ $now != ACTIVE ]]; do
    [[ $now == "$last" ]] || note "$name is $now."
    last=$now
    case $now in
      MISSING)
        booking create --accelerator-type="$accelerator" --runtime-version="$runtime_version" "${kind[@]}" ||
          failed "the slices could not be booked"
        ;;
      SUSPENDED | FAILED) # taken away, or never given: a booking does not come back from there
        booking describe '--format=yaml(state)' >&2 || true
        failed "the booking is $now"
        booking delete --force --quiet || true
        ;;
      UNKNOWN) failed "gcloud does not tell the state" ;;
      *) pause "$poll" ;;
    esac
    now=$(state ACTIVE)
  done
}

# What the workers' shells run, at home, each as one line.
# shellcheck disable=SC2016 # $(...) is for them
idle='[ ! -e bc2_run/lock ] || flock -s -n bc2_run/lock true'
install="mkdir -p bc2_run && if $idle; then rm -rf bc2_jax && mkdir bc2_jax && tar -xzf bc2_jax.tar.gz -C bc2_jax"
install+=" && python3 -m pip install --quiet --user uv" # Python 3.11 whatever the image has
install+=" && { test -d bc2_venv || python3 -m uv venv --quiet --python 3.11 bc2_venv; }"
install+=" && python3 -m uv pip install --quiet --python bc2_venv/bin/python -e './bc2_jax[tpu]'; fi"
start="if $idle; then rm -f bc2_run/exit_code && { ${setup%;}; } && cd ~/bc2_jax && { setsid nohup"
start+=" tools/supervise.sh --folder ../bc2_run -- ../bc2_venv/bin/python train.py $(quoted "${train[@]}")"
start+=" </dev/null >/dev/null 2>&1 & } && cd && for i in 1 2 3 4 5; do" # until it is seen to be there
start+=" [ -f bc2_run/exit_code ] || ! { $idle; } && break; sleep 1; done; fi"
report="free=; if $idle; then free=1; fi; " # before exit_code is looked for: it is there before the lock is free
# shellcheck disable=SC2016
report+='if [ -f bc2_run/exit_code ]; then state="ended $(cat bc2_run/exit_code)"; elif [ $free ]; then state=idle; '
report+="else state=running; fi; echo \"worker \$(hostname) \$state\""
stop="if ! { $idle; }; then kill -TERM \"\$(cat bc2_run/pid)\"; fi"

archive() {
  call git -C "$root" archive --format=tar.gz --output="$scratch/bc2_jax.tar.gz" "$revision" ||
    die "--revision = '$revision' is not valid: git cannot archive it."
}

train_on_workers() { # Workers with a run in progress are not touched.
  call gcloud compute tpus queued-resources scp "$scratch/bc2_jax.tar.gz" "$name:bc2_jax.tar.gz" "${place[@]}" \
    --node=all --worker=all ${internal_ip:+--internal-ip} && on_workers "$install" && on_workers "$start"
}

# Deletes a booking whose only slice was taken away: it may stay ACTIVE, but the slice does not come back. Of several
# slices Cloud TPU makes a lost one again (Google: "Cloud TPU Multislice overview", auto repair).
taken_away() {
  local now
  ((slices == 1)) && now=$(vm describe "$name" "${place[@]}" '--format=value(state)') || return 1
  [[ $now == PREEMPTED || $now == TERMINATED ]] || return 1
  failed "the slice is $now"
  booking delete --force --quiet || true
}

# Watches the run. Returns 0 when it has ended, its exit code in $code, and 1 when it must be started again.
watch() {
  local answer now silent=0
  while :; do
    pause "$poll"
    now=$(state ACTIVE)
    [[ $now == ACTIVE || $now == UNKNOWN ]] || return 1
    if ! answer=$(on_workers "$report" 2>"$scratch/error"); then # it names every worker, each time
      tail -n 3 "$scratch/error" >&2
      silent=$((silent + 1))
      ! taken_away || return 1
      ((silent * poll >= 600)) || continue # the network, or a machine that starts again
      failed "a worker has not answered for $((silent * poll)) s" && return 1
    fi
    silent=0
    [[ -z $dry_run ]] || answer="worker dry ended 0"
    code=$(awk '$1 == "worker" && $3 == "ended" && $4 != 0 && $5 == "" {print $4}' <<<"$answer" | sort -n | head -n 1)
    [[ -z $code ]] || return 0
    if grep -qE '^worker .* (idle|ended .* stopped)' <<<"$answer"; then # a worker that is new, or was started again
      failed "a worker does not train" && return 1
    elif ! grep -qE '^worker .* running' <<<"$answer"; then
      code=0 && return 0
    fi
    failures=0
  done
}

collect() { # One worker at a time: gcloud's --output-directory does not tell the slices apart.
  local node worker count
  call mkdir -p "$logs"
  for node in $(nodes); do
    count=$(vm describe "$node" "${place[@]}" '--format=value(networkEndpoints.len())') ||
      note "$node does not tell its workers."
    for ((worker = 0; worker < ${count:-1}; worker++)); do
      vm scp "$node:bc2_run/train.log" "$logs/$node-$worker.log" "${place[@]}" --worker="$worker" \
        ${internal_ip:+--internal-ip} || note "the log of $node, worker $worker, could not be read."
    done
    [[ -z $dry_run ]] || echo "# the same for its other workers" >&3
  done
  note "logs are in $logs."
}

# ---------------------------------------------------------------- commands
case $command in
  create) book ;;
  run)
    code=""
    archive
    while :; do
      book
      if train_on_workers; then watch && break; else
        taken_away || failed "training could not be started on all workers"
      fi
    done
    ((code == 0)) || on_workers "$stop" || true
    collect
    note "the run has ended with exit code $code."
    exit "$code"
    ;;
  status)
    booking describe '--format=value(state.state)'
    on_workers "$report"
    ;;
  logs) collect ;;
  stop) on_workers "$stop" ;;
  delete) booking delete --force --quiet ;;
esac
