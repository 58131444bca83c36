// SPDX-License-Identifier: GPL-2.0
/*
 * Memory limits. The parent never sees an error and is never killed for its
 * child's page tables; the child is right, or is killed, and nobody ever reads
 * zeroes where it lost memory.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "harness.h"

#define ROOT	"/sys/fs/cgroup"
#define GROUP	ROOT "/af-memcg"
/* More tables than a CPU holds charges in stock (64 pages). */
#define PIECES	200
/* Enough for what both sides touch of their own, not for 800 KiB of tables. */
#define SPARE	(200L << 10)

FIXTURE(memcg) {
	struct af af;
	struct af_region r;
	struct af_child c;
	int pipe[2];
};

/* From now on the group gets @spare bytes more. */
static int tighten(long spare)
{
	char now[32];

	if (af_read_file(GROUP "/memory.current", now, sizeof(now)))
		return -1;
	snprintf(now, sizeof(now), "%ld", atol(now) + spare);
	return af_write_file(GROUP "/memory.max", now);
}

static int loosen(void)
{
	return af_write_file(GROUP "/memory.max", "max");
}

FIXTURE_SETUP(memcg)
{
	af_write_file(ROOT "/cgroup.subtree_control", "+memory");
	if (access(ROOT "/memory.stat", F_OK))
		SKIP(return, "no memory controller at " ROOT);
	AF_SETUP(AF_HOLD);
	ASSERT_EQ(0, mkdir(GROUP, 0755));
	af_write_file(GROUP "/memory.swap.max", "0");
	ASSERT_EQ(0, af_write_file(GROUP "/cgroup.procs", "0"));
	AF_REGION(&self->r, PIECES, AF_ZERO, 0x3e3c);
	ASSERT_EQ(0, pipe(self->pipe));
}

FIXTURE_TEARDOWN(memcg)
{
	EXPECT_EQ(0, loosen());
	AF_FINISH();
	EXPECT_EQ(0, af_write_file(ROOT "/cgroup.procs", "0"));
	EXPECT_EQ(0, rmdir(GROUP));
}

/*
 * Should a page of somebody's own be missing at the limit, then the OOM killer
 * comes, as it does after a plain fork. It must not take the test.
 */
static long volunteer(const struct af_job *job)
{
	(void)job;
	return af_write_file("/proc/self/oom_score_adj", "1000");
}

static long write_to_pipe(const struct af_job *job)
{
	long ret = write(job->seed, job->addr, AF_PAGE);

	return ret < 0 ? -errno : ret;
}

/*
 * A child in write(2) from what is not copied yet, at the limit: what reaches
 * the reader is the pattern, or the call fails. After that the parent forks as
 * if nothing had been.
 */
TEST_F(memcg, child_writes_at_the_limit)
{
	char page[AF_PAGE];
	size_t i;
	long n = 0;

	self->af.allow |= AF_ALLOW(AF_POISON);
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, af_call(&self->c, volunteer));
	ASSERT_EQ(0, tighten(SPARE));
	for (i = 0; i < PIECES && n != AF_GONE; i++) {
		size_t at = af_piece(i);

		n = af_call(&self->c, write_to_pipe,
			    .addr = af_page(&self->r, at),
			    .seed = self->pipe[1]);
		if (n <= 0)
			continue;
		ASSERT_EQ(n, read(self->pipe[0], page, n));
		if (n == AF_PAGE)
			EXPECT_EQ(0, af_check_at(page, at, 1, self->r.seed));
	}
	ASSERT_EQ(0, loosen());
	if (self->af.async && self->af.held) {
		EXPECT_EQ(1, af_delta(&self->af, AF_POISON));
		EXPECT_EQ(AF_GONE, n);
	}
	if (n == AF_GONE) {
		EXPECT_EQ(SIGKILL, WTERMSIG(af_reap(&self->c)));
	} else {
		AF_EXIT_OK(&self->c);
	}
	EXPECT_EQ(0, af_check_all(&self->r));

	ASSERT_EQ(0, af_release(&self->af));
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
}

/*
 * The parent changes what the child has no memory for: the call succeeds, the
 * child is killed.
 */
TEST_F(memcg, parent_unmaps_at_the_limit)
{
	self->af.allow |= AF_ALLOW(AF_POISON);
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, af_call(&self->c, volunteer));
	ASSERT_EQ(0, tighten(SPARE));
	EXPECT_EQ(0, munmap(self->r.base, self->r.pages * AF_PAGE));
	ASSERT_EQ(0, loosen());
	if (self->af.async && self->af.held) {
		EXPECT_EQ(1, af_delta(&self->af, AF_POISON));
		EXPECT_EQ(SIGKILL, WTERMSIG(af_reap(&self->c)));
		return;
	}
	if (af_child_check_all(&self->c, &self->r) == AF_GONE) {
		EXPECT_EQ(SIGKILL, WTERMSIG(af_reap(&self->c)));
	} else {
		AF_EXIT_OK(&self->c);
	}
}

/* A parent at its limit forks: it lives, and its child is right or gone. */
TEST_F(memcg, parent_forks_at_the_limit)
{
	int status;
	pid_t pid;

	if (self->af.async && !self->af.held)
		SKIP(return, "needs held workers (debug kernel)");
	if (!self->af.async)
		SKIP(return, "plain fork is OOM-killed here");
	self->af.spare = 1;
	self->af.allow |= AF_ALLOW(AF_POISON) | AF_ALLOW(AF_CANCEL) |
			  AF_ALLOW(AF_FB_NOMEM);
	ASSERT_EQ(0, tighten(SPARE));
	pid = fork();
	if (!pid)
		_exit(0);
	ASSERT_EQ(0, loosen());
	if (pid > 0) {
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		EXPECT_TRUE(status == 0 || WTERMSIG(status) == SIGKILL);
	} else {
		EXPECT_EQ(ENOMEM, errno);
	}
	EXPECT_EQ(0, af_check_all(&self->r));
}

TEST_HARNESS_MAIN
