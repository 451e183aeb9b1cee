# For .ci/run --fast: checks that take less than two minutes, in the existing environment.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -x .venv/bin/python ]]; then
  echo ".ci/run --fast: expected an environment in .venv; CONTRIBUTING.md says how to make it" >&2
  exit 1
fi
export MPLBACKEND=agg

# A few tests of every part that compile little.
always=(tests/test_layers.py tests/test_repository.py tests/test_thresholds.py tests/test_equations.py
  tests/test_verification.py tests/test_unit_axes.py tests/test_optimizers.py)

tests_of_changes() { # changed tests, examples of changed modules, and the tests of their names
  { git diff --name-only HEAD && git ls-files --others --exclude-standard; } | while read -r file; do
    [[ -e $file ]] || continue
    case $file in
      tests/*test_*.py) echo "$file" ;;
      psclip_optax/*.py)
        echo "$file"
        find tests -name "test_$(basename "$file")"
        ;;
    esac
  done
}

mapfile -t selected < <({ printf '%s\n' "${always[@]}" && tests_of_changes; } | sort -u)
begin types .venv/bin/pyright --pythonpath .venv/bin/python
check lint .venv/bin/ruff check .
check format .venv/bin/ruff format --check .
check tests .venv/bin/python -m pytest -q -n auto "${selected[@]}"
finish
