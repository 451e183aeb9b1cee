# For .ci/run: runs checks one after another, and some in parallel. All run, even if some fail.

failed=() begun=()
logs=$(mktemp -d)
trap 'stop_and_clean' EXIT

stop_and_clean() {
  jobs -p | xargs -r kill 2>/dev/null || true
  rm -rf "$logs" ${temporary:+"$temporary"}
}

check() { # NAME COMMAND…
  local name=$1 start=$SECONDS
  shift
  printf '\n── %s\n' "$name"
  "$@" </dev/null || failed+=("$name")
  printf '── %s: %s s\n' "$name" $((SECONDS - start))
}

begin() { # NAME COMMAND… in the background; `finish` tells what it printed
  local name=$1
  shift
  begun+=("$name")
  {
    local start=$SECONDS outcome=passed
    "$@" </dev/null >"$logs/$name" 2>&1 || outcome=failed
    printf '%s %s s\n' "$outcome" $((SECONDS - start)) >"$logs/$name.outcome"
  } &
}

finish() {
  local name outcome
  wait
  for name in "${begun[@]}"; do
    outcome=$(cat "$logs/$name.outcome" || echo failed)
    printf '\n── %s, meanwhile\n' "$name"
    cat "$logs/$name"
    printf '── %s: %s\n' "$name" "${outcome#* }"
    [[ $outcome == passed* ]] || failed+=("$name")
  done
}

tell_outcome() {
  if ((${#failed[@]})); then
    printf '\nFailed: %s\n' "${failed[*]}"
    exit 1
  fi
  printf '\nAll checks passed.\n'
  exit 0
}
