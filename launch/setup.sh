#!/usr/bin/env bash
# Makes the environment in .venv, or brings it up to date; does nothing when it is. Run it, or source it from a script:
# it then leaves ROOT (the repository) and VENV_PYTHON (the interpreter with everything installed).
#
#   PYTHON  the interpreter to make .venv from; python3 where it is not set
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV_PYTHON="$ROOT/.venv/bin/python"

setup_fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

setup_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

setup_make_venv() {
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null ||
        setup_fail "there is no $python here. Install Python 3.11 or later, or name one: PYTHON=python3.11 $0"
    setup_is_new_enough "$python" ||
        setup_fail "$python is $("$python" --version 2>&1); ltx_sp needs Python 3.11 or later. Name one: PYTHON=python3.11 $0"
    echo "setup: making .venv with $("$python" --version 2>&1)"
    if ! "$python" -m venv "$ROOT/.venv"; then
        rm -rf "$ROOT/.venv" # a half-made one would be taken for a whole one next time
        setup_fail "$python cannot make a virtual environment (see above). Debian and Ubuntu have it in python3-venv."
    fi
}

setup_install() {
    # The path belongs to the stamp because an editable install points at it.
    local stamp="$ROOT/.venv/.ltx_sp_stamp" log="$ROOT/.venv/setup.log" wanted
    wanted="$({ cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" && echo "$ROOT"; } | sha256sum)"
    [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && return

    echo "setup: installing into .venv (a minute or more the first time)"
    local start=$SECONDS
    if ! (
        cd "$ROOT" # pip takes no extras after a path with spaces
        "$VENV_PYTHON" -m pip install --no-input --disable-pip-version-check -c constraints.txt -e '.[test]'
    ) >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        setup_fail "pip failed; the end of its output is above, all of it in $log"
    fi
    printf '%s\n' "$wanted" >"$stamp"
    echo "setup: installed in $((SECONDS - start)) s"
}

[[ -e "$ROOT/.venv" ]] || setup_make_venv
setup_is_new_enough "$VENV_PYTHON" ||
    setup_fail "$ROOT/.venv holds no working Python 3.11 or later. Remove the folder and start this again."
setup_install
