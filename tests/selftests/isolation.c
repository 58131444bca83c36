// SPDX-License-Identifier: GPL-2.0
/*
 * Nobody waits for somebody else's sleep (DESIGN.md section 9, item 7): a child
 * that is frozen, stopped, out of CPU time or over its memory.high, and workers
 * at nice 19, do not hold the parent up.
 *
 * Counted where it can be: the parent's writes are over while the child's own
 * work has not moved. The times that are looked at are compared with how long
 * the kernel puts the child to sleep, never with how fast the machine is.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "harness.h"

#define PIECES	12
#define SEED	0x1b1UL
#define LATER	0x1b2UL

#define ROOT	"/sys/fs/cgroup"
#define GROUP	ROOT "/af-isolation"

/* The longest that the kernel lets a group wait for CPU time. */
#define PERIOD_US	1000000L

FIXTURE(child) {
	struct af af;
	struct af_region r;
	struct af_child c;
	volatile uint64_t *progress;	/* pages the child has looked at */
	long worst_us;			/* the parent's worst wait */
};

FIXTURE_SETUP(child)
{
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	self->progress = af_shared(AF_PAGE);
	af_write_file(ROOT "/cgroup.subtree_control", "+cpu +memory");
	/* A run that died has left it. */
	rmdir(GROUP);
	if (mkdir(GROUP, 0755))
		SKIP(return, "no cgroup v2 at " ROOT);
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(child)
{
	AF_FINISH();
	EXPECT_EQ(0, rmdir(GROUP));
}

static long now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000L + t.tv_nsec / 1000;
}

/* How often this thread has gone to sleep. */
static long sleeps(void)
{
	struct rusage used;

	return getrusage(RUSAGE_THREAD, &used) ? -1 : used.ru_nvcsw;
}

/*
 * Writes one page in every piece; the time of the slowest write that waited for
 * something. One that did not sleep was slow by the host, which has other work.
 */
static long write_every_piece(const struct af_region *r)
{
	long worst = 0;
	size_t i;

	for (i = 0; i < r->pieces; i++) {
		long start = now_us(), before = sleeps(), took;

		af_fill(r, af_piece(i) + 9, 1, LATER);
		took = sleeps() == before ? 0 : now_us() - start;
		worst = took > worst ? took : worst;
	}
	return worst;
}

static long check_written(const struct af_region *r)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < r->pieces; i++)
		wrong += af_check(r, af_piece(i) + 9, 1, LATER);
	return wrong;
}

static int join(pid_t pid, const char *group)
{
	char path[128], text[16];

	snprintf(path, sizeof(path), "%s/cgroup.procs", group);
	snprintf(text, sizeof(text), "%d", pid);
	return af_write_file(path, text);
}

/* The number behind @key in the group's file @file, or -1. */
static long group_number(const char *file, const char *key)
{
	char path[128], text[4096], *at;

	snprintf(path, sizeof(path), GROUP "/%s", file);
	if (af_read_file(path, text, sizeof(text)))
		return -1;
	at = strstr(text, key);
	return at ? atol(at + strlen(key)) : -1;
}

static bool group_is_frozen(void *unused)
{
	(void)unused;
	return group_number("cgroup.events", "frozen ") == 1;
}

/* Looks at the pages again and again, a word of each, and counts them. */
static long do_look_on(const struct af_job *job)
{
	volatile uint64_t *progress = (volatile uint64_t *)job->seed;
	size_t i;

	for (;;)
		for (i = 0; i < job->pages; i++) {
			if (*(volatile uint64_t *)(job->addr + i * AF_PAGE) !=
			    af_value(SEED, job->first + i))
				_exit(9);
			(*progress)++;
		}
}

#define LOOK_ON() ASSERT_EQ(0, af_post(&self->c, &(struct af_job){	\
	.fn = do_look_on, .addr = self->r.base, .first = 0,		\
	.pages = self->r.pages, .seed = (uintptr_t)self->progress }))

static bool has_begun(void *progress)
{
	return *(volatile uint64_t *)progress > 0;
}

/* The parent copies everything, and its child has not moved meanwhile. */
#define PARENT_COPIES_ALL() do {					\
	self->worst_us = write_every_piece(&self->r);			\
	EXPECT_EQ(0, check_written(&self->r));				\
	if (self->af.held)						\
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_PARENT) +\
			  af_delta(&self->af, AF_PIECE_CHILD));		\
} while (0)

TEST_F(child, is_frozen)
{
	ASSERT_EQ(0, join(self->c.pid, GROUP));
	ASSERT_EQ(0, af_write_file(GROUP "/cgroup.freeze", "1"));
	ASSERT_EQ(0, af_poll(group_is_frozen, NULL, 20));
	PARENT_COPIES_ALL();
	EXPECT_EQ(0, munmap(af_page(&self->r, af_piece(1)), AF_PIECE));
	EXPECT_EQ(1, group_number("cgroup.events", "frozen "));
	if (self->af.held)
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_PARENT));
	ASSERT_EQ(0, af_write_file(GROUP "/cgroup.freeze", "0"));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
}

/* In the middle of its reads, wherever that is. */
TEST_F(child, is_frozen_at_work)
{
	uint64_t seen;

	LOOK_ON();
	ASSERT_EQ(0, af_poll(has_begun, (void *)self->progress, 20));
	ASSERT_EQ(0, join(self->c.pid, GROUP));
	ASSERT_EQ(0, af_write_file(GROUP "/cgroup.freeze", "1"));
	ASSERT_EQ(0, af_poll(group_is_frozen, NULL, 20));
	seen = *self->progress;
	PARENT_COPIES_ALL();
	EXPECT_EQ(seen, *self->progress);
	ASSERT_EQ(0, af_write_file(GROUP "/cgroup.freeze", "0"));
	EXPECT_EQ(SIGKILL, af_kill(&self->c));
}

TEST_F(child, is_stopped)
{
	int status;

	ASSERT_EQ(0, kill(self->c.pid, SIGSTOP));
	ASSERT_EQ(self->c.pid, waitpid(self->c.pid, &status, WUNTRACED));
	PARENT_COPIES_ALL();
	if (self->af.held)
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_PARENT));
	ASSERT_EQ(0, kill(self->c.pid, SIGCONT));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
}

static long do_nice(const struct af_job *job)
{
	(void)job;
	return nice(19) == 19 ? 0 : -1;
}

static bool is_throttled(void *unused)
{
	(void)unused;
	return group_number("cpu.stat", "nr_throttled ") > 0;
}

static bool is_at_second_piece(void *progress)
{
	return *(volatile uint64_t *)progress >= AF_PIECE_PAGES;
}

/*
 * Five milliseconds of CPU time a second, at nice 19: the child is put to sleep
 * anywhere in its faults. Whoever waits for it there waits for a second.
 */
TEST_F(child, is_out_of_cpu_time)
{
	if (access(GROUP "/cpu.max", W_OK))
		SKIP(af_kill(&self->c); return, "no cpu controller");
	ASSERT_EQ(0, af_call(&self->c, do_nice));
	ASSERT_EQ(0, af_write_file(GROUP "/cpu.max", "5000 1000000"));
	ASSERT_EQ(0, join(self->c.pid, GROUP));
	LOOK_ON();
	ASSERT_EQ(0, af_poll(is_throttled, NULL, 20));
	ASSERT_EQ(0, af_poll(is_at_second_piece, (void *)self->progress, 60));
	/* Its fault there has begun. */
	usleep(20000);
	PARENT_COPIES_ALL();
	EXPECT_LT(self->worst_us, PERIOD_US / 2);
	if (self->af.held)
		EXPECT_GT(af_delta(&self->af, AF_PIECE_PARENT), 0);
	TH_LOG("worst wait %ld us; pieces: %ld by the parent, %ld by the child",
	       self->worst_us, af_delta(&self->af, AF_PIECE_PARENT),
	       af_delta(&self->af, AF_PIECE_CHILD));
	ASSERT_EQ(0, af_write_file(GROUP "/cpu.max", "max"));
	EXPECT_EQ(SIGKILL, af_kill(&self->c));
}

/* Writes pages of its own, one by one, and counts them. */
static long do_write_on(const struct af_job *job)
{
	volatile uint64_t *progress = (volatile uint64_t *)job->seed;
	size_t i;

	for (i = 0; i < job->pages; i++) {
		*(volatile char *)(job->addr + i * AF_PAGE) = 1;
		(*progress)++;
	}
	return 0;
}

static bool is_over_high(void *unused)
{
	(void)unused;
	return group_number("memory.events", "high ") > 20;
}

/* The kernel lets a task that is over memory.high sleep up to two seconds. */
TEST_F(child, is_over_memory_high)
{
	uint64_t seen;

	if (access(GROUP "/memory.high", W_OK))
		SKIP(af_kill(&self->c); return, "no memory controller");
	af_write_file(GROUP "/memory.swap.max", "0");
	ASSERT_EQ(0, af_write_file(GROUP "/memory.high", "8192"));
	ASSERT_EQ(0, join(self->c.pid, GROUP));
	ASSERT_EQ(0, af_post(&self->c, &(struct af_job){ .fn = do_write_on,
		.addr = af_page(&self->r, af_piece(0)),
		.pages = 3 * AF_PIECE_PAGES,
		.seed = (uintptr_t)self->progress }));
	ASSERT_EQ(0, af_poll(is_over_high, NULL, 30));
	seen = *self->progress;
	PARENT_COPIES_ALL();
	EXPECT_LT(self->worst_us, PERIOD_US / 2);
	TH_LOG("worst wait %ld us; the child wrote %ld pages meanwhile",
	       self->worst_us, (long)(*self->progress - seen));
	ASSERT_EQ(0, af_write_file(GROUP "/memory.high", "max"));
	EXPECT_EQ(0, af_wait(&self->c));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, af_piece(3),
				    self->r.pages - af_piece(3), SEED));
	AF_EXIT_OK(&self->c);
}

/*
 * Workers at nice 19 get next to no time besides busy threads at nice 0. The
 * parent does not wait for one that has lost its CPU: claims are not preempted.
 */
#define HOGS	4
#define NICE_FILE "/sys/devices/virtual/workqueue/async_fork/nice"

FIXTURE(workers) {
	struct af af;
	struct af_region r;
	struct af_child c;
	char saved[16];
	volatile bool stop;
	pthread_t hog[HOGS];
};

FIXTURE_SETUP(workers)
{
	AF_REGION(&self->r, 4 * PIECES, AF_BASE, SEED);
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(workers)
{
	AF_FINISH();
}

static void *hog(void *stop)
{
	while (!*(volatile bool *)stop)
		;
	return NULL;
}

static long median_of_writes(const struct af_region *r, size_t page, long *worst)
{
	long took[4 * PIECES];
	size_t i, k;

	for (i = 0; i < r->pieces; i++) {
		long start = now_us(), this;

		af_fill(r, af_piece(i) + page, 1, LATER);
		this = now_us() - start;
		for (k = i; k && took[k - 1] > this; k--)
			took[k] = took[k - 1];
		took[k] = this;
	}
	*worst = took[r->pieces - 1];
	return took[r->pieces / 2];
}

TEST_F(workers, at_nice_19)
{
	long median, worst, idle_median, idle_worst, pieces;
	size_t i;

	if (self->af.async) {
		if (af_read_file(NICE_FILE, self->saved, sizeof(self->saved)))
			SKIP(return, "the workqueue has no " NICE_FILE);
		ASSERT_EQ(0, af_write_file(NICE_FILE, "19"));
	}
	for (i = 0; i < HOGS; i++)
		ASSERT_EQ(0, pthread_create(&self->hog[i], NULL, hog,
					    (void *)&self->stop));
	/* Of pages that nobody shares, then of those of an open session. */
	idle_median = median_of_writes(&self->r, 30, &idle_worst);
	af_fill(&self->r, 0, self->r.pages, SEED);
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, af_release(&self->af));
	median = median_of_writes(&self->r, 40, &worst);
	self->stop = true;
	for (i = 0; i < HOGS; i++)
		pthread_join(self->hog[i], NULL);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
	TH_LOG("writes: %ld us, %ld at worst; without a session %ld and %ld",
	       median, worst, idle_median, idle_worst);
	if (!self->af.async)
		return;
	ASSERT_EQ(0, af_write_file(NICE_FILE, self->saved));
	ASSERT_EQ(0, af_settle());
	pieces = af_delta(&self->af, AF_PIECE_PARENT) +
		 af_delta(&self->af, AF_PIECE_WORKER) +
		 af_delta(&self->af, AF_PIECE_CHILD);
	EXPECT_GE(pieces, 4 * PIECES);
	EXPECT_GT(af_delta(&self->af, AF_PIECE_PARENT), 0);
}

TEST_HARNESS_MAIN
