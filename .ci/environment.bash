# For .ci/run and .ci/lowest: a copy of the tree in a temporary folder, which is removed at the end,
# and Python 3.11 as `python3` if it is installed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
mkdir "$temporary/tree" "$temporary/bin"

# The files that git would commit. A copy, so that no .venv or build of the tree is used or changed.
# The tree may belong to another user.
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
# Python compiles imported modules; pip would compile everything that it installs, on one core.
export PIP_COMPILE=0
