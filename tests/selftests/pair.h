/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A parent P and its child C, both of which obey the test process: for tests
 * that must outlive P, or that look at both sides from outside.
 */
#ifndef AF_PAIR_H
#define AF_PAIR_H

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include "harness.h"

struct pair {
	struct af_child p, c;
	struct af_region *r;	/* mapped in P and C only */
};

/* The ends of C's pipes that C will use; P hands them on. */
static int pair_ends[2];

static long pair_do_make(const struct af_job *job)
{
	return af_region_make((struct af_region *)job->addr, job->pages,
			      (enum af_kind)job->first, job->seed);
}

static long pair_do_fork(const struct af_job *job)
{
	pid_t pid = fork();

	(void)job;
	if (!pid)
		af_serve(pair_ends);
	af_unlink(pair_ends);
	return pid;
}

/* P, with a region. Before af_setup(), so that the fork that makes P is plain. */
static inline int pair_make(struct pair *pair, size_t pieces, enum af_kind kind,
			    uint64_t seed)
{
	pair->r = af_shared(sizeof(*pair->r));
	if (prctl(PR_SET_CHILD_SUBREAPER, 1) || af_link(&pair->c, pair_ends) ||
	    af_spawn_other(&pair->p))
		return -1;
	af_unlink(pair_ends);
	return af_call(&pair->p, pair_do_make, .addr = (char *)pair->r,
		       .first = kind, .pages = pieces, .seed = seed);
}

/* P forks C: one session. */
static inline int pair_fork(struct pair *pair, struct af *af)
{
	pair->c.pid = af_call(&pair->p, pair_do_fork);
	af->want++;
	if (af->async && af->held &&
	    af_delta(af, AF_SESSION) <= af_delta(af, AF_END)) {
		fprintf(stderr, "# fork() began no session\n");
		return -1;
	}
	return pair->c.pid > 0 ? 0 : -1;
}

static long pair_do_reap(const struct af_job *job)
{
	int status = -1;

	waitpid((pid_t)job->first, &status, 0);
	return status;
}

/* C's wait status, from P. */
static inline long pair_reap_child(struct pair *pair)
{
	return af_call(&pair->p, pair_do_reap, .first = pair->c.pid);
}

/* In a fixture's setup, before AF_SETUP(). */
#define PAIR_MAKE(pair, pieces, kind, seed) do {			\
	int __made = pair_make((pair), (pieces), (kind), (seed));	\
	if (__made == AF_SKIPPED)					\
		SKIP(return, "memory of this kind cannot be had");	\
	ASSERT_EQ(0, __made);						\
} while (0)

/* C has the whole snapshot and can write it; then it ends. */
#define PAIR_CHILD_IS_RIGHT(pair, later) do {				\
	EXPECT_EQ(0, af_child_check_all(&(pair)->c, (pair)->r));	\
	EXPECT_EQ(0, af_child_fill(&(pair)->c, (pair)->r, 0,		\
				   (pair)->r->pages, (later)));		\
	EXPECT_EQ(0, af_child_check(&(pair)->c, (pair)->r, 0,		\
				    (pair)->r->pages, (later)));	\
	EXPECT_EQ(0, af_end(&(pair)->c));				\
} while (0)

/* P has its memory and can write it; then it ends. */
#define PAIR_PARENT_IS_RIGHT(pair, later) do {				\
	EXPECT_EQ(0, af_child_check_all(&(pair)->p, (pair)->r));	\
	EXPECT_EQ(0, af_child_fill(&(pair)->p, (pair)->r, 0,		\
				   (pair)->r->pages, (later)));		\
	EXPECT_EQ(0, af_child_check(&(pair)->p, (pair)->r, 0,		\
				    (pair)->r->pages, (later)));	\
	EXPECT_EQ(0, af_end(&(pair)->p));				\
} while (0)

/* From now on @pid, once killed, stops before it gives its memory back. */
static inline int pair_seize(pid_t pid)
{
	return ptrace(PTRACE_SEIZE, pid, NULL, PTRACE_O_TRACEEXIT) ? -errno : 0;
}

/* Waits until the seized @pid is dying; its memory is still there. */
static inline int pair_wait_dying(pid_t pid)
{
	int status = -1;

	if (waitpid(pid, &status, __WALL) != pid)
		return -errno;
	return status >> 8 == (SIGTRAP | PTRACE_EVENT_EXIT << 8) ? 0 : status;
}

static inline int pair_let_die(pid_t pid)
{
	return ptrace(PTRACE_DETACH, pid, NULL, NULL) ? -errno : 0;
}

#endif
