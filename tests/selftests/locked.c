// SPDX-License-Identifier: GPL-2.0
/*
 * mlock() counts pages. A child that locks what it does not have yet, and gets
 * it later, would unlock what it never locked: its parent's pages.
 *
 * Guards mlock_fixup(). Whether a page is locked is read from
 * /proc/kpageflags, page by page.
 */
#include <fcntl.h>
#include <linux/mman.h>
#include <sys/syscall.h>
#include "harness.h"

#define PIECES	3
#define SEED	0x181UL
#define LATER	0x182UL

#define KPF_MLOCKED	33

/*
 * The kernel's count may be off, either way, by what lies in another CPU's
 * batches when it is taken, see mm/mlock.c; a missing hook costs whole tables.
 */
#define SLACK	128

FIXTURE(locked) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_VARIANT(locked) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(locked, base) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(locked, race) { .kind = AF_BASE, .hold = AF_RACE };

/* The number of the caller's pages that are locked, or -1. */
static long locked_pages(const struct af_region *r)
{
	int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int flags = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
	long locked = map < 0 || flags < 0 ? -1 : 0;
	uint64_t entry, bits;
	size_t i;

	for (i = 0; locked >= 0 && i < r->pages; i++) {
		if (pread(map, &entry, 8, (uintptr_t)af_page(r, i) / AF_PAGE *
			  8) != 8)
			locked = -1;
		else if (entry >> 63 && pread(flags, &bits, 8, (entry &
			 ((1ULL << 55) - 1)) * 8) == 8)
			locked += bits >> KPF_MLOCKED & 1;
	}
	close(map);
	close(flags);
	return locked;
}

static long do_locked_pages(const struct af_job *job)
{
	return locked_pages((const struct af_region *)job->addr);
}

static long do_mlock(const struct af_job *job)
{
	return mlock(job->addr, job->pages * AF_PAGE);
}

static long do_mlock_onfault(const struct af_job *job)
{
	return syscall(SYS_mlock2, job->addr, job->pages * AF_PAGE,
		       MLOCK_ONFAULT);
}

static long do_munlock(const struct af_job *job)
{
	return munlock(job->addr, job->pages * AF_PAGE);
}

FIXTURE_SETUP(locked)
{
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	if (locked_pages(&self->r) < 0)
		SKIP(return, "no /proc/kpageflags");
	AF_SETUP(variant->hold);
}

FIXTURE_TEARDOWN(locked)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

#define ALL (long)self->r.pages
#define JOB(function) (&(struct af_job){ .fn = (function),		\
	.addr = self->r.base, .pages = self->r.pages })
#define CHILD_LOCKED() af_call(&self->c, do_locked_pages,		\
			       .addr = (char *)&self->r)

/* Locked at fork: the parent's stay locked, whatever the child does. */
TEST_F(locked, child_unlocks_its_own)
{
	ASSERT_EQ(0, do_mlock(JOB(NULL)));
	ASSERT_GE(locked_pages(&self->r), ALL - SLACK);
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_run(&self->c, JOB(do_mlock_onfault)));
	if (self->af.held)
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_CHILD));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_munlock)));
	EXPECT_GE(locked_pages(&self->r), ALL - SLACK);
	EXPECT_EQ(0, af_check_all(&self->r));
}

/* The child leaves with its locks: the same, at its exit. */
TEST_F(locked, child_exits_with_locks)
{
	struct af_child second;

	ASSERT_EQ(0, do_mlock(JOB(NULL)));
	AF_SPAWN(&second);
	EXPECT_EQ(0, af_run(&second, JOB(do_mlock_onfault)));
	EXPECT_EQ(0, af_child_check_all(&second, &self->r));
	AF_EXIT_OK(&second);
	EXPECT_GE(locked_pages(&self->r), ALL - SLACK);
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

/* Each side's locks are its own, and a write takes them along. */
TEST_F(locked, both_lock)
{
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, do_mlock(JOB(NULL)));
	if (self->af.held)
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_PARENT));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_mlock)));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_GE(locked_pages(&self->r), ALL - SLACK);
	EXPECT_GE(CHILD_LOCKED(), ALL - SLACK);
	EXPECT_EQ(0, do_munlock(JOB(NULL)));
	EXPECT_LE(locked_pages(&self->r), SLACK);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_munlock)));
	EXPECT_LE(CHILD_LOCKED(), SLACK);
}

/* The parent unlocks what the child has not got yet. */
TEST_F(locked, parent_unlocks)
{
	ASSERT_EQ(0, do_mlock(JOB(NULL)));
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, do_munlock(JOB(NULL)));
	EXPECT_LE(locked_pages(&self->r), SLACK);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_LE(CHILD_LOCKED(), SLACK);
	EXPECT_EQ(0, af_run(&self->c, JOB(do_mlock)));
	EXPECT_GE(CHILD_LOCKED(), ALL - SLACK);
}

TEST_HARNESS_MAIN
