# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034
# Sourced by the scripts next to it: where things are, and how to say so.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=${ASYNC_FORK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/async-fork}
me=$(basename "$0")

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() { say "error: $*"; exit 1; }

# Prints the usage text: the comment block at the head of the script.
usage() { sed -n '3,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

need() {
	command -v "$1" >/dev/null || die "$1 is not installed; run scripts/setup"
}

# lock NAME: one holder at a time, until the script ends or unlock is called.
lock() {
	mkdir -p "$cache"
	exec {lock_fd}>"$cache/lock-$1"
	flock -n "$lock_fd" && return
	say "another call is building $1; waiting for it"
	flock "$lock_fd"
}
unlock() { exec {lock_fd}>&-; }
