# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2154
# Sourced after common.sh: the kernel source, its patches, its configuration
# and the one way in which make is called.

# Counts up whenever the steps below change what they produce.
recipe=1
tarball=${ASYNC_FORK_TARBALL:-/usr/src/linux-source-6.12.tar.xz}
patches=$root/patches/6.12
configs=$root/configs

# Debian's compiler, never a rustup toolchain that stands first on PATH.
rustc=/usr/bin/rustc
bindgen=$HOME/.cargo/bin/bindgen
[ -x "$bindgen" ] || bindgen=/usr/bin/bindgen

# Directories that no guest kernel compiles; leaving them out halves the tree.
unused=(
	'*/drivers/gpu/drm/*/*.[ch]' '*/drivers/net/ethernet/*.[ch]'
	'*/drivers/net/wireless/*.[ch]' '*/drivers/media/*.[ch]'
	'*/drivers/infiniband/hw/*.[ch]' '*/drivers/staging/*.[ch]'
	'*/sound/*.[ch]' '*/tools/perf/*' '*/Documentation/devicetree/*'
)
for arch in alpha arc arm arm64 csky hexagon loongarch m68k microblaze mips \
	nios2 openrisc parisc powerpc riscv s390 sh sparc um xtensa; do
	unused+=("linux-source-*/arch/$arch/*."{dts,dtsi,'[chS]'})
done

check_tools() {
	local tool
	[ -r "$tarball" ] || die "$tarball is missing; run scripts/setup"
	[ -x "$rustc" ] || die "$rustc is missing; run scripts/setup"
	[ -x "$bindgen" ] || die "bindgen is missing; run scripts/setup"
	for tool in clang-19 ld.lld-19 flex bison bc patch xz; do
		need "$tool"
	done
}

# The content hash of the tarball, remembered by its size and time.
tarball_hash() {
	local id memo sum
	id=$(stat -c '%n %s %Y %i' "$tarball")
	memo=$cache/tarball.sha256
	if [ -r "$memo" ] && [ "$(sed -n 1p "$memo")" = "$id" ]; then
		sed -n 2p "$memo"
		return
	fi
	sum=$(sha256sum "$tarball" | cut -c1-64)
	mkdir -p "$cache"
	printf '%s\n%s\n' "$id" "$sum" >"$memo.$$"
	mv "$memo.$$" "$memo"
	echo "$sum"
}

# The patch names of the series, in order.
series() {
	[ -r "$patches/series" ] || die "$patches/series is missing"
	sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "$patches/series"
}

# fragments KIND: the configuration fragments of a kernel.
fragments() {
	echo "$configs/base.config"
	[ "$1" != debug ] || echo "$configs/debug.config"
}

# kernel_key KIND: a hash of all that decides what the kernel will be.
kernel_key() {
	local names list
	{
		echo "recipe $recipe kind $1"
		tarball_hash
		clang-19 --version | head -n 1
		ld.lld-19 --version
		"$rustc" --version
		"$bindgen" --version
		list=$(fragments "$1")
		xargs -d '\n' cat <<<"$list"
		if [ "$1" != plain ]; then
			names=$(series)
			[ -z "$names" ] ||
				(cd "$patches" && xargs -d '\n' cat <<<"$names")
			echo "$names"
		fi
	} | sha256sum | cut -c1-16
}

# Unpacks the pristine source once and prints its folder.
pristine() {
	local dir
	dir=$cache/source-$(tarball_hash | cut -c1-16)
	if [ ! -e "$dir/.complete" ]; then
		lock "source" || exit
		if [ ! -e "$dir/.complete" ]; then
			say "unpacking $tarball (usually 20 s)"
			rm -rf "$dir"
			mkdir -p "$dir"
			tar -xJf "$tarball" -C "$dir" --strip-components=1 \
				"${unused[@]/#/--exclude=}" ||
				die "cannot unpack $tarball"
			touch "$dir/.complete"
		fi
		unlock
	fi
	echo "$dir"
}

# tree DIR: a fresh copy of the pristine source. Files are hard links: a build
# only adds files, and patch replaces a file instead of writing into it.
tree() {
	local from
	from=$(pristine)
	rm -rf "$1"
	cp -al "$from" "$1"
	rm -f "$1/.complete"
}

version_of() {
	awk '/^(VERSION|PATCHLEVEL|SUBLEVEL) =/ { v = v sep $3; sep = "." }
		END { print v }' "$1/Makefile"
}

# apply DIR PATCH: strict about the context; says what does not fit.
apply() {
	local out
	if out=$(patch -d "$1" -p1 --fuzz=0 --forward --batch \
		--no-backup-if-mismatch <"$patches/$2" 2>&1); then
		return
	fi
	say "patches/6.12/$2 does not apply to this source: 6.12 patch level" \
		"$(version_of "$1") ($tarball). What failed:"
	awk '/^patching file|^can.t find file/ { file = $0 }
		/FAILED|can.t find file|No file to patch|previously applied|malformed|ignored/ {
			if (file != said) { print "  " file; said = file }
			if ($0 != file) print "    " $0
		}' <<<"$out" >&2
	say "rebase that patch onto the new source and export it again"
	return 1
}

# configure DIR KIND LOG: merges the fragments and checks that each symbol
# stuck. A tree without the patches does not know ASYNC_FORK.
configure() {
	local dir=$1 kind=$2 log=$3 list missing
	list=$(fragments "$kind")
	kmake "$dir" tinyconfig >>"$log" 2>&1 || return
	(cd "$dir" && xargs -d '\n' scripts/kconfig/merge_config.sh -m .config \
		<<<"$list") >>"$log" 2>&1 || return
	kmake "$dir" olddefconfig >>"$log" 2>&1 || return
	missing=$(xargs -d '\n' cat <<<"$list" | unmet "$dir/.config")
	[ "$kind" != plain ] || missing=$(sed '/^CONFIG_ASYNC_FORK/d' <<<"$missing")
	[ -n "$missing" ] || return 0
	say "these symbols did not end up as configs/ asks:"
	printf '  %s\n' "${missing//$'\n'/$'\n'  }" >&2
	return 1
}

# unmet CONFIG <FRAGMENTS: the wishes that the configuration does not fulfil.
# The last of several wishes for one symbol counts.
unmet() {
	awk -F= '
		FILENAME != "-" { if (/^CONFIG_/) got[$1] = substr($0, length($1) + 2); next }
		/^CONFIG_/ { want[$1] = substr($0, length($1) + 2) }
		END {
			for (k in want) {
				g = (k in got) ? got[k] : "n"
				if (g != want[k]) print k "=" want[k] " (is " g ")"
			}
		}' "$1" - | sort
}

# kmake DIR ARG...: make in a kernel tree, cut off from any make around it.
kmake() {
	local dir=$1 cc=clang-19
	shift
	# The build is in-tree and so all paths are relative: trees of any name
	# share the compiler cache.
	! command -v ccache >/dev/null || cc="ccache clang-19"
	env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL -u MAKEOVERRIDES -u KBUILD_OUTPUT \
		-u CROSS_COMPILE -u RUSTFLAGS -u KCFLAGS LC_ALL=C \
		CCACHE_DIR="$cache/ccache" CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE=5G \
		CCACHE_COMPILERCHECK=content \
		make -C "$dir" ARCH=x86 LLVM=-19 CC="$cc" \
		RUSTC="$rustc" HOSTRUSTC="$rustc" BINDGEN="$bindgen" \
		KBUILD_BUILD_TIMESTAMP='Thu Jan 1 00:00:00 UTC 2026' \
		KBUILD_BUILD_USER=async-fork KBUILD_BUILD_HOST=async-fork "$@"
}
