# For .ci/run and .ci/lowest: a copy of the tree in a temporary folder that goes when they end, and
# Python 3.11 as `python3` where there is one.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
mkdir "$temporary/tree" "$temporary/bin"

# What git would commit. Into a copy, so that no .venv or build of the tree is used or written over.
# The tree may belong to someone else than who checks it.
(
  cd "$root"
  git -c safe.directory='*' ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
    tar --create --null --no-recursion --files-from=-
) | tar --extract --no-same-owner --directory="$temporary/tree"

if command -v python3.11 >/dev/null; then
  printf '#!/bin/sh\nexec python3.11 "$@"\n' >"$temporary/bin/python3"
  chmod +x "$temporary/bin/python3"
  PATH=$temporary/bin:$PATH
fi

unset VIRTUAL_ENV PYTHONPATH PYTHONHOME
export MPLBACKEND=agg PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
# Python compiles what is imported; pip would all that it installs, on one core.
export PIP_COMPILE=0
