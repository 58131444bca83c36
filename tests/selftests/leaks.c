// SPDX-License-Identifier: GPL-2.0
/*
 * What a session took is given back: page tables, their charges, and its
 * reference to the module; however the session ended.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "harness.h"

#define PIECES	200
#define SEED	0x1d1UL
#define LATER	0x1d2UL
#define ROUNDS	6

#define ROOT	"/sys/fs/cgroup"
#define GROUP	ROOT "/af-leaks"

/*
 * Pages that may be off for other reasons, such as what else runs in the guest.
 * Each test copies every table of PIECES several times.
 */
#define TOLERANCE	16

struct usage {
	long tables;		/* the machine's page tables, in pages */
	long group_tables;	/* those charged to the group */
	long group_anon;
};

FIXTURE(leaks) {
	struct af af;
	struct af_region r;
	struct af_child c;
	struct usage before;
};

static long module_users(void)
{
	char text[32];

	if (af_read_file("/sys/module/async_fork/refcnt", text, sizeof(text)))
		return -1;
	return atol(text);
}

static void measure(struct usage *u)
{
	/* Folds what the CPUs have counted on their own. */
	af_write_file("/proc/sys/vm/stat_refresh", "1");
	u->tables = af_number_in("/proc/vmstat", "nr_page_table_pages");
	u->group_tables = af_number_in(GROUP "/memory.stat", "pagetables") /
			  (long)AF_PAGE;
	u->group_anon = af_number_in(GROUP "/memory.stat", "anon") /
			(long)AF_PAGE;
}

/* A dead process's tables are freed after an RCU grace period. */
static bool is_back(void *arg)
{
	const struct usage *before = arg;
	struct usage now;

	measure(&now);
	return now.tables <= before->tables + TOLERANCE &&
	       now.group_tables <= before->group_tables + TOLERANCE &&
	       now.group_anon <= before->group_anon + TOLERANCE;
}

static bool has_tables(void *usage)
{
	struct usage *u = usage;

	measure(u);
	return u->group_tables >= PIECES && u->group_anon >= PIECES;
}

static bool has_copies(void *before)
{
	const struct usage *u = before;
	struct usage now;

	measure(&now);
	return now.tables >= u->tables + PIECES &&
	       now.group_tables >= u->group_tables + PIECES;
}

/* Looks at the one page in each piece that is there, of job->pages pieces. */
static long do_check_pieces(const struct af_job *job)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < job->pages; i++)
		wrong += af_check_at(job->addr + i * AF_PIECE,
				     i * AF_PIECE_PAGES, 1, job->seed);
	return wrong;
}

#define CHECK_PIECES(n) ((struct af_job){ .fn = do_check_pieces,	\
	.addr = self->r.base, .pages = (n), .seed = self->r.seed })

FIXTURE_SETUP(leaks)
{
	af_write_file(ROOT "/cgroup.subtree_control", "+memory");
	if (access(ROOT "/memory.stat", F_OK))
		SKIP(return, "no memory controller at " ROOT);
	AF_SETUP(AF_HOLD);
	ASSERT_EQ(0, mkdir(GROUP, 0755));
	ASSERT_EQ(0, af_write_file(GROUP "/cgroup.procs", "0"));
	/* One page of each piece, so that tables weigh as much as memory. */
	ASSERT_EQ(0, af_region_reserve(&self->r, PIECES, SEED | AF_SPARSE));
	af_fill(&self->r, 0, self->r.pages, self->r.seed);
	/* A group's numbers are up to date after two seconds only. */
	ASSERT_EQ(0, af_poll(has_tables, &self->before, 10));
}

static bool module_is_free(void *unused)
{
	(void)unused;
	return module_users() == 0;
}

FIXTURE_TEARDOWN(leaks)
{
	struct usage now;

	EXPECT_EQ(0, do_check_pieces(&CHECK_PIECES(PIECES)));
	AF_FINISH();
	EXPECT_EQ(0, af_poll(is_back, &self->before, 10));
	measure(&now);
	TH_LOG("page tables %+ld, of the group %+ld, its memory %+ld pages",
	       now.tables - self->before.tables,
	       now.group_tables - self->before.group_tables,
	       now.group_anon - self->before.group_anon);
	if (self->af.async)
		EXPECT_EQ(0, af_poll(module_is_free, NULL, 10));
	EXPECT_EQ(0, af_write_file(ROOT "/cgroup.procs", "0"));
	EXPECT_EQ(0, rmdir(GROUP));
}

static void hold_again(struct af *af)
{
	if (af->held)
		af_write_file(AF_HOLD_FILE, "1");
}

/* While the child lives its tables show, so the measure is no dead letter. */
TEST_F(leaks, copied_by_the_child)
{
	int i;

	for (i = 0; i < ROUNDS; i++) {
		AF_SPAWN(&self->c);
		if (self->af.held)
			EXPECT_GT(module_users(), 0);
		EXPECT_EQ(0, af_run(&self->c, &CHECK_PIECES(PIECES)));
		if (!i)
			EXPECT_EQ(0, af_poll(has_copies, &self->before, 10));
		AF_EXIT_OK(&self->c);
	}
}

TEST_F(leaks, copied_by_workers)
{
	int i;

	for (i = 0; i < ROUNDS; i++) {
		hold_again(&self->af);
		AF_SPAWN(&self->c);
		if (self->af.held)
			af_write_file(AF_HOLD_FILE, "0");
		if (self->af.async)
			EXPECT_EQ(0, af_settle());
		/* What a worker allocates is charged to the parent's group. */
		if (!i)
			EXPECT_EQ(0, af_poll(has_copies, &self->before, 10));
		AF_EXIT_OK(&self->c);
	}
}

TEST_F(leaks, cancelled)
{
	int i;

	for (i = 0; i < ROUNDS; i++) {
		AF_SPAWN(&self->c);
		af_fill(&self->r, 0, self->r.pages / 2, self->r.seed);
		EXPECT_EQ(0, af_run(&self->c, &CHECK_PIECES(150)));
		EXPECT_EQ(SIGKILL, af_kill(&self->c));
	}
}

static long do_make_and_fork(const struct af_job *job)
{
	int status;
	pid_t pid = fork();

	if (!pid)
		_exit(!!do_check_pieces(job));
	return waitpid(pid, &status, 0) != pid || status;
}

/* A child forks in turn; a parent goes before its child. */
TEST_F(leaks, generations)
{
	int i;

	for (i = 0; i < ROUNDS; i++) {
		AF_SPAWN(&self->c);
		EXPECT_EQ(0, af_call(&self->c, do_make_and_fork,
				     .addr = self->r.base,
				     .pages = PIECES, .seed = self->r.seed));
		self->af.want++;
		AF_EXIT_OK(&self->c);
	}
}

TEST_F(leaks, poisoned)
{
	int i, fd;

	if (!af_fault_init())
		SKIP(return, AF_NO_FAULTS);
	self->af.allow |= AF_ALLOW(AF_POISON);
	for (i = 0; i < ROUNDS; i++) {
		AF_SPAWN(&self->c);
		EXPECT_EQ(0, af_run(&self->c, &CHECK_PIECES(90)));
		fd = af_fault_tables(-1);
		af_fill(&self->r, 0, self->r.pages, self->r.seed);
		af_fault_pages_end(fd);
		EXPECT_EQ(self->af.held ? SIGKILL : 0,
			  self->af.held ? WTERMSIG(af_reap(&self->c)) :
					  af_end(&self->c));
	}
	if (self->af.held)
		EXPECT_EQ(ROUNDS, af_delta(&self->af, AF_POISON));
}

TEST_F(leaks, fork_failed)
{
	unsigned int nth;
	int fd, status;
	pid_t pid;

	if (!af_fault_init())
		SKIP(return, AF_NO_FAULTS);
	self->af.spare = 1000;
	self->af.allow |= AF_ALLOW(AF_FB_NOMEM);
	for (nth = 1; nth < 300; nth += 9) {
		fd = af_fault_arm(nth);
		pid = fork();
		if (!pid)
			_exit(0);
		af_fault_disarm(fd);
		if (pid > 0)
			EXPECT_EQ(pid, waitpid(pid, &status, 0));
	}
}

TEST_HARNESS_MAIN
