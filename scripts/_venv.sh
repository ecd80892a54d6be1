# Sourced by the scripts beside it, which then call `ensure_venv plain` or `ensure_venv test`.
# Sets $root (the checkout) and $venv ($root/.venv).

root="$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/.qtrain-installed"

say() { printf 'qtrain: %s\n' "$*" >&2; }

# What an install depends on: pyproject.toml, and the checkout's place, for a venv does not survive being moved.
# cksum, because POSIX has it on every system.
install_key() { printf '%s %s' "$(cksum <"$root/pyproject.toml")" "$root"; }

# The stamp holds the kind of install and its key. A test install serves the plain command as well.
is_installed() {
    local kind key
    [ -x "$venv/bin/python" ] && [ -r "$stamp" ] || return 1
    { IFS= read -r kind && IFS= read -r key; } <"$stamp" || return 1
    [ "$key" = "$(install_key)" ] && { [ "$kind" = "$1" ] || [ "$kind" = test ]; }
}

# Prints the first Python that can make the venv.
find_python() {
    local candidate incomplete=''
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        # Run, not only looked up: pyenv's shims exist also for versions that are not active.
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
        if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return
        fi
        incomplete="${incomplete:-$candidate}"
    done
    if [ -n "$incomplete" ]; then
        say "$(command -v "$incomplete") lacks the venv or ensurepip module, which $venv is made with."
        say "Install it (Debian and Ubuntu: apt install $incomplete-venv), then run this again."
    else
        say "Python 3.11 or newer is needed, and no python3.11 to python3.14, python3 or python on the PATH is one."
        say "Install it (Debian and Ubuntu: apt install python3.11 python3.11-venv), then run this again."
    fi
    return 1
}

# Makes the venv, or repairs what a broken-off install left of it, unless that is of a checkout since moved.
make_venv() {
    local python
    { "$venv/bin/python" -m pip --version && grep -qF " $venv" "$venv/pyvenv.cfg"; } >/dev/null 2>&1 && return
    rm -f -- "$stamp"
    python="$(find_python)" || return 1
    say "creating $venv with $(command -v "$python")"
    "$python" -m venv --clear "$venv" >&2 && return
    say "$python could not create $venv (its message is above)."
    return 1
}

install_qtrain() {
    local before='' what=.
    [ "$1" = plain ] || what=".[$1]"
    make_venv || return 1
    # No stamp while the install is in pieces: should it be broken off, the next start does it again. Where pip itself
    # gives up, it leaves all as it was, and a stamp from before is still right.
    [ ! -r "$stamp" ] || before="$(cat -- "$stamp")"
    rm -f -- "$stamp"
    say "installing into $venv (the first time this fetches PyTorch: several GB, several minutes)"
    if ! (cd -- "$root" && "$venv/bin/python" -m pip install --editable "$what") >&2; then
        [ -z "$before" ] || printf '%s\n' "$before" >"$stamp"
        say "pip could not install qtrain (its messages are above). Often there is no network, or less than 8 GB of"
        say "free disk. Run this again once that is solved; if it fails all the same, delete $venv first."
        return 1
    fi
    printf '%s\n%s\n' "$1" "$(install_key)" >"$stamp"
}

ensure_venv() {
    is_installed "$1" && return
    if [ ! -w "$root" ]; then
        say "$root is not writable, and .venv has to be made there."
        return 1
    fi
    (
        # One install at a time; whoever waited finds it done. Where flock is missing, do not start two at once.
        if command -v flock >/dev/null && ! flock --nonblock 9; then
            say "waiting for another install into $venv"
            flock 9
        fi
        is_installed "$1" || install_qtrain "$1"
    ) 9>"$root/.venv.lock"
}
