/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A process that moves the caller's pages from one memory node to the other and
 * back, on and on. What it moves stands in the page tables as a migration entry
 * for a while, and it holds none of the caller's locks meanwhile.
 */
#ifndef AF_MOVER_H
#define AF_MOVER_H

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "af.h"

struct mover {
	struct af_child process;
	volatile int *stop;
};

static inline bool mover_can(void)
{
	return !access("/sys/devices/system/node/node1", F_OK);
}

/* Before the caller's memory is made, so that the process does not share it. */
static inline int mover_make(struct mover *m)
{
	m->stop = af_shared(sizeof(*m->stop));
	return af_spawn_other(&m->process);
}

/* Moves all of process @pid from one node to the other. */
static inline long mover_move(pid_t pid, unsigned long from, unsigned long to)
{
	unsigned long old = 1UL << from, new = 1UL << to;

	return syscall(SYS_migrate_pages, pid, 8 * sizeof(old), &old, &new);
}

static long mover_do_move_on(const struct af_job *job)
{
	volatile int *stop = (volatile int *)job->addr;
	long ret = 0;
	int i;

	for (i = 0; ret >= 0 && !*stop; i++)
		ret = mover_move((pid_t)job->first, i % 2, !(i % 2));
	return ret < 0 ? -errno : 0;
}

/* Whether entries of @region say that their page is on its way. */
static bool mover_moves(void *region)
{
	const struct af_region *r = region;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t map[AF_PIECE_PAGES];
	size_t first, i, found = 0;

	for (first = 0; fd >= 0 && first < r->pages; first += AF_PIECE_PAGES) {
		size_t n = r->pages - first;

		n = n < AF_PIECE_PAGES ? n : AF_PIECE_PAGES;
		if (pread(fd, map, 8 * n, (uintptr_t)af_page(r, first) /
			  AF_PAGE * 8) != (ssize_t)(8 * n))
			break;
		for (i = 0; i < n; i++)
			found += map[i] >> 62 & 1;
	}
	close(fd);
	return found > 0;
}

/* From its return on the caller's pages, some of which are in @r, are moved. */
static inline int mover_start(struct mover *m, struct af_region *r)
{
	*m->stop = 0;
	if (af_post(&m->process, &(struct af_job){ .fn = mover_do_move_on,
			.addr = (char *)m->stop, .first = getpid() }))
		return -1;
	return af_poll(mover_moves, r, 60);
}

static inline long mover_stop(struct mover *m)
{
	*m->stop = 1;
	return af_wait(&m->process);
}

#endif
