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

/* What the test process, P and C share. */
struct pair_shared {
	struct af_region r;
	volatile int stop;
};

struct pair {
	struct af_child p, c;
	struct af_region *r;	/* mapped in P and C only */
	volatile int *stop;	/* ends what pair_work() began */
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

/* P, without a region. Before af_setup(): the fork that makes P is plain. */
static inline int pair_start(struct pair *pair)
{
	struct pair_shared *shared = af_shared(sizeof(*shared));

	/* The page is this process's, whichever group of cgroups P is in. */
	memset(shared, 0, sizeof(*shared));
	pair->r = &shared->r;
	pair->stop = &shared->stop;
	if (prctl(PR_SET_CHILD_SUBREAPER, 1) || af_link(&pair->c, pair_ends) ||
	    af_spawn_other(&pair->p))
		return -1;
	af_unlink(pair_ends);
	return 0;
}

/* P, with a region. */
static inline int pair_make(struct pair *pair, size_t pieces, enum af_kind kind,
			    uint64_t seed)
{
	if (pair_start(pair))
		return -1;
	return af_call(&pair->p, pair_do_make, .addr = (char *)pair->r,
		       .first = kind, .pages = pieces, .seed = seed);
}

/* P has forked C, which is @pid: one session. */
static inline int pair_forked(struct pair *pair, struct af *af, long pid)
{
	pair->c.pid = pid;
	af->want++;
	if (af->async && af->held &&
	    af_delta(af, AF_SESSION) <= af_delta(af, AF_END)) {
		fprintf(stderr, "# fork() began no session\n");
		return -1;
	}
	return pid > 0 ? 0 : -1;
}

static inline int pair_fork(struct pair *pair, struct af *af)
{
	return pair_forked(pair, af, af_call(&pair->p, pair_do_fork));
}

static long pair_do_write_on(const struct af_job *job)
{
	const struct pair_shared *shared = (struct pair_shared *)job->addr;

	do {
		af_fill(&shared->r, 0, shared->r.pages, job->seed);
	} while (!shared->stop);
	return 0;
}

static long pair_do_check_on(const struct af_job *job)
{
	const struct pair_shared *shared = (struct pair_shared *)job->addr;
	long wrong;

	do {
		wrong = af_check_all(&shared->r);
	} while (!wrong && !shared->stop);
	return wrong;
}

/* P writes on and on, C looks on, until pair_rest(). */
static inline int pair_work(struct pair *pair, uint64_t later)
{
	char *shared = (char *)pair->r;

	return af_post(&pair->p, &(struct af_job){ .fn = pair_do_write_on,
			.addr = shared, .seed = later }) ||
	       af_post(&pair->c, &(struct af_job){ .fn = pair_do_check_on,
			.addr = shared });
}

/* The number of pages that C found wrong. */
static inline long pair_rest(struct pair *pair)
{
	*pair->stop = 1;
	return af_wait(&pair->p) ? -1 : af_wait(&pair->c);
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

/* Lets C exit while P lives; its wait status. */
static inline long pair_end_child(struct pair *pair)
{
	af_post(&pair->c, &(struct af_job){ .fn = NULL });
	return pair_reap_child(pair);
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
