# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are for the scripts that read this
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Where things are, for the other scripts to source.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/build

stock=$build/stock/qemu     # QEMU as it was fetched; nobody edits it
tree=$build/qemu            # the same with our files and patches: edit here
tools=$build/tools          # meson and pycotap, where the system's are too old

# SANITIZE=1 in the environment takes a QEMU that looks for bad addresses and
# undefined behaviour, SANITIZE=thread one that looks for data races.
case ${SANITIZE-} in
'' | 0) obj=$build/obj ;;
1) obj=$build/asan ;;
thread) obj=$build/tsan ;;
*) echo "${0##*/}: SANITIZE is 1, thread, or nothing" >&2; exit 1 ;;
esac

# Debian's interpreter, not one of a version manager earlier in PATH: it sees
# the Python packages that apt installs.
python=/usr/bin/python3

# Sources lie at the same relative place for both trees, so that one ccache
# serves both once the absolute part of a path is out of its key.
export CCACHE_BASEDIR=$build CCACHE_NOHASHDIR=1

packages=$tools/usr/lib/python3/dist-packages
export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}

say() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

die() {
    say "$@"
    exit 1
}

# run COMMAND...: quietly; its output is shown only if it fails
run() {
    local log
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "failed: $*"
    fi
    rm -f "$log"
}

# One at a time: what reads or changes the trees under build/ calls this first.
# Scripts that it starts inherit the lock, and do not ask for it again.
lock() {
    [ -z "${SNAPSHOT_LOCKED-}" ] || return 0
    mkdir -p "$build"
    exec 9>"$build/.lock"
    flock -n 9 || { say "waiting for another command to end"; flock 9; }
    export SNAPSHOT_LOCKED=1
}

# The QEMU files in our repository: all that lies in a directory which QEMU's
# tree has too; of scripts/, patches alone. One path a line, relative.
our_files() {
    local dir dirs=()
    cd "$root" || return
    for dir in */; do
        case $dir in
        build/ | scripts/) ;;
        *) [ -d "$stock/$dir" ] && dirs+=("${dir%/}") ;;
        esac
    done
    # Changes to files at QEMU's top, such as MAINTAINERS.patch
    find . -maxdepth 1 -name '*.patch' -printf '%P\n'
    find scripts -name '*.patch'
    [ ${#dirs[@]} -gt 0 ] || return 0
    # A file removed but not yet committed is still listed by git.
    { git ls-files -co --exclude-standard -- "${dirs[@]}" 2>/dev/null ||
          find "${dirs[@]}" -type f; } | sort -u |
        while read -r file; do
            [ ! -e "$file" ] || printf '%s\n' "$file"
        done
}
