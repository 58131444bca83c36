// SPDX-License-Identifier: GPL-2.0
/*
 * Allocations that fail, one after the other, wherever fork() and its session
 * make one. fork() fails or works; the parent never sees an error of its
 * child's; the child is right, or is killed and counted; nothing stays behind.
 *
 * Guards async_fork_publish() (abort), the ladder of Session::supply(), poison,
 * and the cancel of a child that never ran.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/wait.h>
#include <unistd.h>
#include "harness.h"

#define PIECES	2
#define SEED	0x1a1UL
#define LATER	0x1a2UL
/* No call makes as many allocations. */
#define ENOUGH	4000U

/*
 * A mark that is left behind stops this for ever, or gives the kernel's
 * warning; a session that is left behind copies.
 */
static long write_each_piece(const struct af_region *r, uint64_t seed)
{
	size_t i;

	for (i = 0; i < r->pieces; i++)
		af_fill(r, af_piece(i) + 5, 1, seed);
	for (i = 0; i < r->pieces; i++)
		if (af_check(r, af_piece(i) + 5, 1, seed))
			return -1;
	for (i = 0; i < r->pieces; i++)
		af_fill(r, af_piece(i) + 5, 1, r->seed);
	return 0;
}

FIXTURE(fork_fails) {
	struct af af;
	struct af_region r, second;
	int go[2];
};

/* Lazy VMAs with copied ones before, between and behind them. */
FIXTURE_SETUP(fork_fails)
{
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	AF_REGION(&self->second, PIECES, AF_BASE, SEED + 1);
	ASSERT_EQ(0, madvise(af_page(&self->second, af_piece(1)), AF_PIECE,
			     MADV_DONTDUMP));
	ASSERT_EQ(0, pipe2(self->go, O_CLOEXEC));
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(fork_fails)
{
	AF_FINISH();
}

/* The child waits until the parent has written, then looks. */
static void look(const struct af_region *r, const struct af_region *second,
		 int go)
{
	char c;

	if (read(go, &c, 1) != 1)
		_exit(2);
	_exit(af_check_all(r) || af_check_all(second));
}

/*
 * With @two, two in a row fail from the session's first allocation on. Before
 * that vmalloc() would warn, which has the same done for the new stack.
 */
static void fail_each(struct __test_metadata *_metadata,
		      FIXTURE_DATA(fork_fails) *self, bool two)
{
	long refused = 0, forked = 0, published = 0, partly = 0, sessions, plain;
	bool failed = true, pair = false;
	unsigned int nth;
	int fd, status;
	pid_t pid;

	if (!af_fault_init())
		SKIP(return, AF_NO_FAULTS);
	self->af.spare = ENOUGH;
	self->af.allow |= AF_ALLOW(AF_FB_NOMEM);
	for (nth = 1; failed && nth < ENOUGH; nth++) {
		sessions = af_delta(&self->af, AF_SESSION);
		plain = af_delta(&self->af, AF_FB_NOMEM);
		fd = pair ? af_fault_arm_two(nth) : af_fault_arm(nth);
		ASSERT_GE(fd, 0);
		pid = fork();
		if (!pid)
			look(&self->r, &self->second, self->go[0]);
		if (pid < 0)
			ASSERT_TRUE(errno == ENOMEM || errno == EAGAIN);
		failed = pair ? af_fault_disarm_two(fd) : af_fault_disarm(fd);
		pair = pair || (two && af_delta(&self->af, AF_FB_NOMEM) > plain);
		partly += af_delta(&self->af, AF_FB_NOMEM) > plain &&
			  af_delta(&self->af, AF_SESSION) > sessions;
		ASSERT_EQ(0, write_each_piece(&self->r, LATER + nth));
		ASSERT_EQ(0, write_each_piece(&self->second, LATER + nth));
		if (pid < 0) {
			refused++;
			published += af_delta(&self->af, AF_SESSION) > sessions;
			continue;
		}
		forked++;
		ASSERT_EQ(1, write(self->go[1], "g", 1));
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		ASSERT_EQ(0, status) TH_LOG("allocation %u", nth);
	}
	ASSERT_LT(nth, ENOUGH);
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_check_all(&self->second));
	EXPECT_GT(refused, 20);
	EXPECT_GT(forked, 0);
	if (self->af.async)
		EXPECT_GT(af_delta(&self->af, AF_FB_NOMEM), 0);
	/* Some VMAs were copied by fork(), as there was no memory for a range. */
	if (self->af.async && two)
		EXPECT_GT(partly, 0);
	/* at_the_pids_limit is certain to come behind that point. */
	TH_LOG("%u allocations: %ld forks failed, %ld of them with a session; %ld worked, %ld lazy in part",
	       nth - 1, refused, published, forked, partly);
}

TEST_F(fork_fails, at_each_allocation)
{
	fail_each(_metadata, self, false);
}

TEST_F(fork_fails, at_each_two_allocations)
{
	fail_each(_metadata, self, true);
}

#define ROOT	"/sys/fs/cgroup"
#define GROUP	ROOT "/af-faults"

/* pids.max is looked at when the child's memory is complete. */
TEST_F(fork_fails, at_the_pids_limit)
{
	int i;

	af_write_file(ROOT "/cgroup.subtree_control", "+pids");
	if (mkdir(GROUP, 0755) || access(GROUP "/pids.max", W_OK))
		SKIP(rmdir(GROUP); return, "no pids controller");
	EXPECT_EQ(0, af_write_file(GROUP "/cgroup.procs", "0"));
	EXPECT_EQ(0, af_write_file(GROUP "/pids.max", "1"));
	for (i = 0; i < 10; i++) {
		pid_t pid = fork();

		if (!pid)
			_exit(0);
		EXPECT_EQ(-1, pid);
		EXPECT_EQ(EAGAIN, errno);
		self->af.want++;
		EXPECT_EQ(0, write_each_piece(&self->r, LATER + i));
		EXPECT_EQ(0, write_each_piece(&self->second, LATER + i));
	}
	if (self->af.async)
		EXPECT_EQ(10, af_delta(&self->af, AF_CANCEL));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_write_file(ROOT "/cgroup.procs", "0"));
	EXPECT_EQ(0, rmdir(GROUP));
}

/* Nothing is begun for a fork that is refused before its memory is looked at. */
TEST_F(fork_fails, at_the_process_limit)
{
	const struct rlimit none = { 0, 0 };
	int status;
	pid_t pid;

	pid = fork();
	self->af.want++;
	if (!pid) {
		if (setrlimit(RLIMIT_NPROC, &none) || setuid(65534))
			_exit(1);
		_exit(fork() != -1 || errno != EAGAIN);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	EXPECT_EQ(0, write_each_piece(&self->r, LATER));
}

/*
 * One call of one side during a session, with failing allocations. It works on
 * pages from FIRST on, which reach into another piece.
 */
#define FIRST	(AF_HEAD + AF_PIECE_PAGES / 2)
#define PAGES	(AF_PIECE_PAGES - 100)

static struct af_region region;
static char *moved_to;

static char *first(void)
{
	return af_page(&region, FIRST);
}

static long result(long ret)
{
	return ret ? -errno : 0;
}

static long op_read(void)
{
	return af_check(&region, FIRST, 1, SEED);
}

static long op_write(void)
{
	af_fill(&region, FIRST, 1, LATER);
	return 0;
}

static long op_write_file(void)
{
	int fd = memfd_create("file", MFD_CLOEXEC);
	char page[AF_PAGE];
	long ret = 0;

	if (fd < 0)
		return -errno;
	/* A memfd that gets no page says ENOSPC. */
	if (write(fd, first(), AF_PAGE) != (ssize_t)AF_PAGE)
		ret = -ENOMEM;
	else if (pread(fd, page, AF_PAGE, 0) != (ssize_t)AF_PAGE ||
		 af_check_at(page, FIRST, 1, SEED))
		ret = 1;
	close(fd);
	return ret;
}

static long op_protect(void)
{
	return result(mprotect(first() + 50 * AF_PAGE, PAGES * AF_PAGE / 2,
			       PROT_READ));
}

static long op_unmap(void)
{
	return result(munmap(first() + 50 * AF_PAGE,
			     (PAGES - 100) * AF_PAGE));
}

static long op_dontneed(void)
{
	return result(madvise(first() + 50 * AF_PAGE, (PAGES - 100) * AF_PAGE,
			      MADV_DONTNEED));
}

static long op_lock(void)
{
	long ret = result(mlock(first(), PAGES * AF_PAGE));

	return ret == -EAGAIN ? -ENOMEM : ret;
}

static long op_move(void)
{
	char *to = moved_to;
	void *at = mremap(first(), PAGES * AF_PAGE, PAGES * AF_PAGE,
			  MREMAP_MAYMOVE | MREMAP_FIXED, to);

	return at == MAP_FAILED ? -errno : 0;
}

static long op_fork(void)
{
	int status;
	pid_t pid = fork();

	if (!pid)
		_exit(!!af_check_all(&region));
	if (pid < 0)
		return errno == EAGAIN ? -ENOMEM : -errno;
	return waitpid(pid, &status, 0) != pid || status;
}

/* How the pages of the call look afterwards, given what it returned. */
static long all_as_before(long ret)
{
	(void)ret;
	return af_check_all(&region);
}

/* All but the pages of the call. */
static long check_rest(void)
{
	return af_check(&region, 0, FIRST, SEED) +
	       af_check(&region, FIRST + PAGES, region.pages - FIRST - PAGES,
			SEED);
}

static long one_written(long ret)
{
	(void)ret;
	return check_rest() + af_check(&region, FIRST, 1, LATER) +
	       af_check(&region, FIRST + 1, PAGES - 1, SEED);
}

/* Of the pages of the call all but 50 at each end are gone. */
static long middle_gone(long ret)
{
	if (ret)
		return all_as_before(ret);
	return check_rest() + af_check(&region, FIRST, 50, SEED) +
	       af_check(&region, FIRST + PAGES - 50, 50, SEED);
}

static long middle_zero(long ret)
{
	if (ret)
		return all_as_before(ret);
	return middle_gone(ret) +
	       af_check_zero(first() + 50 * AF_PAGE, PAGES - 100);
}

static long moved(long ret)
{
	if (ret)
		return all_as_before(ret);
	return check_rest() + af_check_at(moved_to, FIRST, PAGES, SEED);
}

/* What the next child or this process is about to do. */
static struct trial {
	long (*op)(void);
	long (*check)(long ret);
	unsigned int nth;	/* the one allocation that fails, or 0 */
	long tables;		/* how many tables cannot be had */
	bool failed;		/* nth: it was made */
} trial;

/* Returns what is wrong: 0 nothing, 1 the call's result, 2 the memory. */
static long run_trial(void)
{
	long ret;
	int fd;

	if (trial.nth) {
		fd = af_fault_arm(trial.nth);
		ret = trial.op();
		trial.failed = af_fault_disarm(fd);
	} else {
		fd = af_fault_tables(trial.tables);
		ret = trial.op();
		af_fault_pages_end(fd);
	}
	if (ret && ret != -ENOMEM && ret != -ENOSPC) {
		fprintf(stderr, "# the call returned %ld\n", ret);
		return 1;
	}
	return trial.check(ret) ? 2 : 0;
}

/* In the child: bit 8 tells that the allocation was made. */
static long do_trial(const struct af_job *job)
{
	(void)job;
	return run_trial() | (trial.failed ? 0x100 : 0);
}

FIXTURE(call) {
	struct af af;
	struct af_child c;
};

FIXTURE_VARIANT(call) {
	long (*op)(void);
	long (*check)(long ret);
	bool child;
};

#define CALL(name, check_)						\
	FIXTURE_VARIANT_ADD(call, parent_##name) {			\
		.op = op_##name, .check = check_, .child = false };	\
	FIXTURE_VARIANT_ADD(call, child_##name) {			\
		.op = op_##name, .check = check_, .child = true }

CALL(read, all_as_before);
CALL(write, one_written);
CALL(write_file, all_as_before);
CALL(protect, all_as_before);
CALL(unmap, middle_gone);
CALL(dontneed, middle_zero);
CALL(lock, all_as_before);
CALL(move, moved);
CALL(fork, all_as_before);

FIXTURE_SETUP(call)
{
	if (!af_fault_init())
		SKIP(return, AF_NO_FAULTS);
	AF_SETUP(AF_HOLD);
	self->af.spare = ENOUGH;
	self->af.allow |= AF_ALLOW(AF_FB_NOMEM);
	trial.op = variant->op;
	trial.check = variant->check;
}

FIXTURE_TEARDOWN(call)
{
	AF_FINISH();
}

static struct af_region aside;

static int make_regions(void)
{
	if (af_region_make(&region, PIECES, AF_BASE, SEED) ||
	    af_region_reserve(&aside, PIECES, 0))
		return -1;
	/* The place to move to is next to nothing and has no tables. */
	moved_to = af_page(&aside, af_piece(0) + 3);
	return 0;
}

/*
 * One session, one call. The side that makes it is right afterwards, or is the
 * child and is gone; so is the other side. A child that is gone was poisoned.
 */
static int round_trip(struct af *af, struct af_child *c, bool child)
{
	long poison = af_delta(af, AF_POISON), ret, seen = 0;

	if (!region.base && make_regions())
		return 1;
	if (af_spawn(af, c))
		return 2;
	ret = child ? af_call(c, do_trial) : run_trial();
	if (child && ret != AF_GONE) {
		trial.failed = ret & 0x100;
		ret &= 0xff;
		if (af_check_all(&region))
			return 3;
	} else if (!child) {
		seen = af_child_check_all(c, &region);
	}
	if (ret && ret != AF_GONE)
		return 4;
	poison = af_delta(af, AF_POISON) - poison;
	if (poison != (ret == AF_GONE || seen == AF_GONE))
		return 5;
	if (poison ? WTERMSIG(af_reap(c)) != SIGKILL : af_end(c))
		return 6;
	if (seen && seen != AF_GONE)
		return 7;
	if (!child) {
		af_region_free(&region);
		af_region_free(&aside);
		region.base = NULL;
	}
	return 0;
}

/* One failure is nobody's end: each allocation is tried twice. */
TEST_F(call, one_allocation_fails)
{
	int rounds = 0;

	trial.nth = 1;
	do {
		trial.failed = false;
		ASSERT_EQ(0, round_trip(&self->af, &self->c, variant->child))
			TH_LOG("allocation %u", trial.nth);
		rounds++;
		trial.nth += 1 + trial.nth / 6;
	} while (trial.failed && trial.nth < ENOUGH);
	ASSERT_LT(trial.nth, ENOUGH);
	EXPECT_EQ(0, af_delta(&self->af, AF_POISON));
	TH_LOG("%d rounds", rounds);
}

TEST_F(call, no_tables_to_be_had)
{
	static const long times[] = { 1, 2, -1 };
	size_t i;

	self->af.allow |= AF_ALLOW(AF_POISON);
	trial.nth = 0;
	for (i = 0; i < 3; i++) {
		trial.tables = times[i];
		ASSERT_EQ(0, round_trip(&self->af, &self->c, variant->child))
			TH_LOG("%ld tables", times[i]);
	}
	/* Other calls may fail before they reach a page table. */
	if (self->af.held && variant->op == op_write)
		EXPECT_GT(af_delta(&self->af, AF_POISON), 0);
}

/*
 * A swap entry that more processes share than its count can say: the copy makes
 * room. If that takes a sleep it stops in the middle and is run again; so here
 * nothing can be had without one. The folios that it has copied by then are
 * large, and lazily free (DESIGN.md section 9, item 16).
 */
#define CROWD	70

FIXTURE(crowd) {
	struct af af;
	struct af_region r;
	struct af_child c[CROWD];
};

FIXTURE_SETUP(crowd)
{
	AF_REGION(&self->r, 1, AF_PTE_THP, SEED);
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(crowd)
{
	AF_FINISH();
}

static long do_check_lazy(const struct af_job *job)
{
	return af_check_lazy(job->addr, job->first, job->pages, SEED);
}

/* Whatever changes rights copies the piece first. */
static int copy_without_room(struct af_region *r, bool faults)
{
	char *page = af_page(r, af_piece(0));
	int fd = faults ? af_fault_atomic() : -1, ret;

	ret = mprotect(page, AF_PAGE, PROT_READ) ||
	      mprotect(page, AF_PAGE, PROT_READ | PROT_WRITE);
	if (faults)
		af_fault_pages_end(fd);
	return ret;
}

#define LAZY_PAGES	200UL
#define SWAPPED_PAGES	(AF_PIECE_PAGES - LAZY_PAGES)

TEST_F(crowd, shares_swap_entries)
{
	size_t lazy = af_piece(0), swapped = lazy + LAZY_PAGES;
	const char *device = af_swap_device();
	const bool faults = af_fault_init();
	int i;

	if (!device)
		SKIP(return, "no swap device (scripts/vm --swap)");
	/* Room for counts that was made before would still be there. */
	ASSERT_EQ(0, swapoff(device));
	ASSERT_EQ(0, swapon(device, 0));
	ASSERT_EQ(0, madvise(af_page(&self->r, swapped),
			     SWAPPED_PAGES * AF_PAGE, MADV_PAGEOUT));
	ASSERT_EQ(0, madvise(af_page(&self->r, lazy), LAZY_PAGES * AF_PAGE,
			     MADV_FREE));
	for (i = 0; i < CROWD; i++) {
		AF_SPAWN(&self->c[i]);
		ASSERT_EQ(0, copy_without_room(&self->r, faults));
	}
	ASSERT_EQ(0, af_release(&self->af));
	for (i = 0; i < CROWD; i++) {
		EXPECT_EQ(0, af_child_check(&self->c[i], &self->r, swapped,
					    SWAPPED_PAGES, SEED));
		EXPECT_EQ(0, af_call(&self->c[i], do_check_lazy,
				     .addr = af_page(&self->r, lazy),
				     .first = lazy, .pages = LAZY_PAGES));
		AF_EXIT_OK(&self->c[i]);
	}
	EXPECT_EQ(0, af_check(&self->r, swapped, SWAPPED_PAGES, SEED));
}

TEST_HARNESS_MAIN
