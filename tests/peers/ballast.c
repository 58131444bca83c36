// SPDX-License-Identifier: GPL-2.0
/*
 * Preloaded into the programs of other suites, which are mostly too small for
 * async fork: a session needs a whole 2 MiB of private anonymous memory. This
 * adds some to each process, so that its forks are lazy and all that the test
 * does next happens to processes in a session. It is never written again, so
 * no memory limit and no counter of the test sees it twice.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define BALLAST	(8UL << 20)

__attribute__((constructor)) static void load(void)
{
	char *p = mmap(NULL, BALLAST, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		return;
	/* Huge pages are copied at fork. */
	madvise(p, BALLAST, MADV_NOHUGEPAGE);
	memset(p, 0xb5, BALLAST);
}
