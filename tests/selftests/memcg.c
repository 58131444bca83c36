// SPDX-License-Identifier: GPL-2.0
/*
 * Memory limits. The parent never sees an error and is never killed for its
 * child's page tables; the child is right, or is killed, and nobody ever reads
 * zeroes where it lost memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
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
	/*
	 * Workers that run may pass the new limit while it is being set, for
	 * which somebody must die. With the workers held the parent takes part.
	 */
	if (!self->af.held)
		ASSERT_EQ(0, af_write_file("/proc/self/oom_score_adj", "-1000"));
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

/* Whatever the limit, a child that lives reads what is right. */
TEST_F(memcg, child_reads_at_any_limit)
{
	long poisoned = 0, seen;
	int kib;

	self->af.allow |= AF_ALLOW(AF_POISON);
	for (kib = 0; kib <= 900; kib += 100) {
		if (self->af.held)
			ASSERT_EQ(0, af_write_file(AF_HOLD_FILE, "1"));
		AF_SPAWN(&self->c);
		ASSERT_EQ(0, af_call(&self->c, volunteer));
		ASSERT_EQ(0, tighten((long)kib << 10));
		seen = af_child_check_all(&self->c, &self->r);
		ASSERT_EQ(0, loosen());
		if (seen == AF_GONE) {
			poisoned++;
			EXPECT_EQ(SIGKILL, WTERMSIG(af_reap(&self->c)));
		} else {
			EXPECT_EQ(0, seen);
			AF_EXIT_OK(&self->c);
		}
		EXPECT_EQ(0, af_check(&self->r, af_piece(1), AF_PIECE_PAGES,
				      self->r.seed));
	}
	if (self->af.async)
		EXPECT_LE(af_delta(&self->af, AF_POISON), poisoned);
	TH_LOG("%ld of 10 children were killed", poisoned);
}

/* A file that can be read for long and whose cache is easy to reclaim. */
static int open_swap_device(void)
{
	char text[256], *at, *end;

	if (!af_have_swap() || af_read_file("/proc/swaps", text, sizeof(text)))
		return -1;
	at = strchr(text, '\n') + 1;
	end = strpbrk(at, " \t");
	if (end)
		*end = 0;
	return open(at, O_RDONLY | O_CLOEXEC);
}

struct presser {
	int fd;
	volatile bool stop;
	pthread_t thread;
};

/* Keeps the group at its limit with page cache. */
static void *press(void *arg)
{
	struct presser *p = arg;
	static char buf[64 << 10];
	off_t at;

	for (at = 0; !p->stop; at = (at + sizeof(buf)) & ((128 << 20) - 1))
		if (pread(p->fd, buf, sizeof(buf), at) <= 0)
			return (void *)1;
	return NULL;
}

static bool is_at_the_limit(void *unused)
{
	char text[512], *at;

	(void)unused;
	if (af_read_file(GROUP "/memory.events", text, sizeof(text)))
		return false;
	at = strstr(text, "\nmax ");
	return at && atol(at + 5) > 3;
}

/*
 * DESIGN.md section 9, item 17: a group that is full of page cache has memory
 * for a child's tables, if one asks for it twice.
 */
TEST_F(memcg, fork_under_page_cache_pressure)
{
	struct presser p = { .fd = open_swap_device() };
	void *failed = NULL;
	int round;

	if (p.fd < 0)
		SKIP(return, "no swap device (scripts/vm --swap)");
	ASSERT_EQ(0, tighten(24 << 20));
	ASSERT_EQ(0, pthread_create(&p.thread, NULL, press, &p));
	EXPECT_EQ(0, af_poll(is_at_the_limit, NULL, 60));
	for (round = 0; round < 3; round++) {
		if (self->af.held)
			af_write_file(AF_HOLD_FILE, round == 1 ? "0" : "1");
		AF_SPAWN(&self->c);
		if (round == 2)
			af_fill(&self->r, af_piece(0), PIECES / 2 *
				AF_PIECE_PAGES, self->r.seed);
		EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
		AF_EXIT_OK(&self->c);
	}
	p.stop = true;
	pthread_join(p.thread, &failed);
	EXPECT_EQ(NULL, failed);
	close(p.fd);
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_delta(&self->af, AF_POISON));
}

TEST_HARNESS_MAIN
