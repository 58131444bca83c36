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
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "af.h"

struct mover {
	struct af_child process;
	volatile bool *stop;
};

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

/* Moves process job->first, 0 being the caller, until *job->addr. */
static inline long mover_do_move_on(const struct af_job *job)
{
	volatile bool *stop = (volatile bool *)job->addr;
	long ret = 0;
	int i;

	for (i = 0; ret >= 0 && !*stop; i++)
		ret = mover_move((pid_t)job->first, i % 2, !(i % 2));
	return ret < 0 ? -errno : 0;
}

struct moved {
	pid_t pid;
	const char *base;
	size_t pages;
};

/* Whether page table entries of @moved say that their page is on its way. */
static inline bool mover_moves(void *moved)
{
	const struct moved *m = moved;
	uint64_t map[AF_PIECE_PAGES];
	size_t first, i, n, found = 0;
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", m->pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	for (first = 0; fd >= 0 && first < m->pages; first += n) {
		n = m->pages - first;
		n = n < AF_PIECE_PAGES ? n : AF_PIECE_PAGES;
		if (pread(fd, map, 8 * n, ((uintptr_t)m->base / AF_PAGE +
			  first) * 8) != (ssize_t)(8 * n))
			break;
		for (i = 0; i < n; i++)
			found += map[i] >> 62 & 1;
	}
	close(fd);
	return found > 0;
}

/* From its return on the caller's pages, some of which are in @r, are moved. */
static inline int mover_start(struct mover *m, const struct af_region *r)
{
	struct moved moved = { getpid(), r->base, r->pages };

	*m->stop = false;
	if (af_post(&m->process, &(struct af_job){ .fn = mover_do_move_on,
			.addr = (char *)m->stop, .first = getpid() }))
		return -1;
	return af_poll(mover_moves, &moved, 60);
}

static inline long mover_stop(struct mover *m)
{
	*m->stop = true;
	return af_wait(&m->process);
}

#endif
