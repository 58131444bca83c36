// SPDX-License-Identifier: GPL-2.0
/*
 * Rights, locks and the heap's end: mprotect(), mlock() and brk() on either
 * side while the session is open.
 *
 * Guards the hooks in mprotect_fixup(), mlock_fixup() and vms_clear_ptes() (brk).
 */
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <linux/mman.h>
#include "harness.h"

#define PIECES	3
#define SEED	0x61
#define LATER	0x62

#define P(n) (AF_HEAD + (n) * AF_PIECE_PAGES)
#define ALL  (AF_HEAD + PIECES * AF_PIECE_PAGES + AF_TAIL)

static sigjmp_buf fault_env;

static void on_fault(int sig)
{
	siglongjmp(fault_env, sig);
}

/* The signal that a write (or a read) of @p brings, or 0. */
static int probe(volatile char *p, bool write)
{
	struct sigaction act = { .sa_handler = on_fault }, old_segv, old_bus;
	int sig;

	sigaction(SIGSEGV, &act, &old_segv);
	sigaction(SIGBUS, &act, &old_bus);
	sig = sigsetjmp(fault_env, 1);
	if (!sig) {
		char c = *p;

		if (write)
			*p = c;
	}
	sigaction(SIGSEGV, &old_segv, NULL);
	sigaction(SIGBUS, &old_bus, NULL);
	return sig;
}

FIXTURE(protect) {
	struct af af;
	struct af_region r;
	struct af_child c;
	char *addr;
	size_t len;
};

FIXTURE_VARIANT(protect) {
	enum af_kind kind;
	size_t first, pages;
};

FIXTURE_VARIANT_ADD(protect, part) { .first = P(1) + 40, .pages = 700 };
FIXTURE_VARIANT_ADD(protect, one_page) { .first = P(2) + 9, .pages = 1 };
FIXTURE_VARIANT_ADD(protect, table) { .first = P(1), .pages = 512 };
FIXTURE_VARIANT_ADD(protect, whole) { .first = 0, .pages = ALL };
FIXTURE_VARIANT_ADD(protect, mixed) {
	.kind = AF_MIXED, .first = P(1) + 40, .pages = 700 };
FIXTURE_VARIANT_ADD(protect, pte_thp) {
	.kind = AF_PTE_THP, .first = P(1) + 40, .pages = 700 };
FIXTURE_VARIANT_ADD(protect, zero) {
	.kind = AF_ZERO, .first = P(1) + 40, .pages = 700 };
FIXTURE_VARIANT_ADD(protect, swapped) {
	.kind = AF_SWAPPED, .first = P(1) + 40, .pages = 700 };

FIXTURE_SETUP(protect)
{
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	self->addr = af_page(&self->r, variant->first);
	self->len = variant->pages * AF_PAGE;
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(protect)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

static long do_protect_none(const struct af_job *job)
{
	if (mprotect(job->addr, job->pages * AF_PAGE, PROT_NONE))
		return 1;
	return probe(job->addr, false) != SIGSEGV;
}

static long do_protect_read(const struct af_job *job)
{
	if (mprotect(job->addr, job->pages * AF_PAGE, PROT_READ))
		return 1;
	return probe(job->addr, true) != SIGSEGV || af_do_check(job);
}

static long do_protect_rw(const struct af_job *job)
{
	return mprotect(job->addr, job->pages * AF_PAGE, PROT_READ | PROT_WRITE);
}

#define JOB(function) (&(struct af_job) { .fn = (function),		\
	.addr = self->addr, .first = variant->first,			\
	.pages = variant->pages, .seed = self->r.seed })

/*
 * The parent makes its range inaccessible: the child's must stay readable and
 * writable (entries with the new rights must not reach the child), and the
 * content comes back with the rights.
 */
TEST_F(protect, parent_none_and_back)
{
	EXPECT_EQ(0, do_protect_none(JOB(NULL)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_child_fill(&self->c, &self->r, 0, ALL, LATER));
	EXPECT_EQ(0, do_protect_rw(JOB(NULL)));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, ALL, LATER));
}

TEST_F(protect, parent_read_only)
{
	EXPECT_EQ(0, do_protect_read(JOB(NULL)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_child_fill(&self->c, &self->r, 0, ALL, LATER));
	EXPECT_EQ(SIGSEGV, probe(self->addr, true));
	EXPECT_EQ(0, af_check_all(&self->r));
}

/* Read-only and back to writable: the write must still be copied on write. */
TEST_F(protect, parent_read_only_and_back)
{
	EXPECT_EQ(0, do_protect_read(JOB(NULL)));
	EXPECT_EQ(0, do_protect_rw(JOB(NULL)));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, ALL, LATER));
}

/* The child's new rights must hold for what arrives later, too. */
TEST_F(protect, child_none_and_back)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_protect_none)));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, af_run(&self->c, JOB(do_protect_rw)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, ALL, LATER));
}

static long do_probe_every_page(const struct af_job *job)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < job->pages; i++)
		wrong += probe(job->addr + i * AF_PAGE, true) != SIGSEGV;
	return wrong;
}

TEST_F(protect, child_read_only)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_protect_read)));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, af_run(&self->c, JOB(do_probe_every_page)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, ALL, LATER));
}

static long do_mlock(const struct af_job *job)
{
	return mlock(job->addr, job->pages * AF_PAGE);
}

static long do_mlock_onfault(const struct af_job *job)
{
	return syscall(SYS_mlock2, job->addr, job->pages * AF_PAGE, MLOCK_ONFAULT);
}

static long do_munlock(const struct af_job *job)
{
	return munlock(job->addr, job->pages * AF_PAGE);
}

static long do_mlockall(const struct af_job *job)
{
	(void)job;
	return mlockall(MCL_CURRENT);
}

static long do_munlockall(const struct af_job *job)
{
	(void)job;
	return munlockall();
}

/*
 * Locks in the parent are not the child's, and back. A page that is copied
 * into a locked VMA after the fact would be unlocked without having been
 * locked, which the kernel reports at the child's exit.
 */
TEST_F(protect, parent_mlock)
{
	EXPECT_EQ(0, do_mlock(JOB(NULL)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, do_munlock(JOB(NULL)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, ALL, LATER));
}

TEST_F(protect, child_mlock)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_mlock)));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_munlock)));
	EXPECT_EQ(0, af_check(&self->r, 0, ALL, LATER));
}

TEST_F(protect, child_mlock_onfault)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_mlock_onfault)));
	EXPECT_EQ(0, af_release(&self->af));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_munlock)));
}

TEST_F(protect, mlockall)
{
	EXPECT_EQ(0, do_mlockall(NULL));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_mlockall)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, do_munlockall(NULL));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_munlockall)));
	EXPECT_EQ(0, af_check(&self->r, 0, ALL, LATER));
}

/* A heap of its own: the test process has used little of it before. */
FIXTURE(heap) {
	struct af af;
	struct af_child c;
	char *base;
	size_t pages;
};

FIXTURE_SETUP(heap)
{
	uintptr_t now = (uintptr_t)sbrk(0);

	sbrk(((now + AF_PAGE - 1) & ~(AF_PAGE - 1)) - now);
	self->pages = 4 * AF_PIECE_PAGES + 100;
	self->base = sbrk(self->pages * AF_PAGE);
	ASSERT_NE((char *)-1, self->base);
	af_fill_at(self->base, 0, self->pages, SEED);
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(heap)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

static long do_brk(const struct af_job *job)
{
	return syscall(SYS_brk, job->addr) != (long)job->addr;
}

#define CHILD_HEAP(from, n, s) af_call(&self->c, af_do_check,		\
	.addr = self->base + (from) * AF_PAGE, .first = (from),		\
	.pages = (n), .seed = (s))

/* The end moves down by 1 MiB, an unaligned piece of a table, and up again. */
TEST_F(heap, parent_shrinks_and_grows)
{
	size_t keep = self->pages - 256;
	char *end = self->base + self->pages * AF_PAGE;

	ASSERT_EQ(0, do_brk(&(struct af_job){
		.addr = self->base + keep * AF_PAGE }));
	EXPECT_EQ(0, CHILD_HEAP(0, self->pages, SEED));
	EXPECT_EQ(0, af_check_at(self->base, 0, keep, SEED));
	ASSERT_EQ(0, do_brk(&(struct af_job){ .addr = end }));
	EXPECT_EQ(0, af_check_zero(self->base + keep * AF_PAGE, 256));
	af_fill_at(self->base, 0, self->pages, LATER);
	EXPECT_EQ(0, CHILD_HEAP(0, self->pages, SEED));
}

TEST_F(heap, child_shrinks_and_grows)
{
	size_t keep = self->pages - 700;
	char *end = self->base + self->pages * AF_PAGE;

	EXPECT_EQ(0, af_call(&self->c, do_brk,
			     .addr = self->base + keep * AF_PAGE));
	EXPECT_EQ(0, CHILD_HEAP(0, keep, SEED));
	EXPECT_EQ(0, af_check_at(self->base, 0, self->pages, SEED));
	EXPECT_EQ(0, af_call(&self->c, do_brk, .addr = end));
	EXPECT_EQ(0, af_call(&self->c, af_do_zero,
			     .addr = self->base + keep * AF_PAGE,
			     .pages = 700));
	EXPECT_EQ(0, af_check_at(self->base, 0, self->pages, SEED));
}

/* New memory behind the old belongs to the side that made it. */
TEST_F(heap, both_grow)
{
	char *end = self->base + (self->pages + 1024) * AF_PAGE;

	ASSERT_EQ(0, do_brk(&(struct af_job){ .addr = end }));
	af_fill_at(self->base + self->pages * AF_PAGE, self->pages, 1024,
		   LATER);
	EXPECT_EQ(0, af_call(&self->c, do_brk, .addr = end));
	EXPECT_EQ(0, af_call(&self->c, af_do_zero,
			     .addr = self->base + self->pages * AF_PAGE,
			     .pages = 1024));
	EXPECT_EQ(0, CHILD_HEAP(0, self->pages, SEED));
	EXPECT_EQ(0, af_check_at(self->base, 0, self->pages, SEED));
	EXPECT_EQ(0, af_check_at(self->base + self->pages * AF_PAGE,
				 self->pages, 1024, LATER));
}

TEST_HARNESS_MAIN
