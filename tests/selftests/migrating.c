// SPDX-License-Identifier: GPL-2.0
/*
 * mprotect() of pages that are in migration, whose session is open. The kernel
 * puts such a page back with the rights that the VMA has by then, and takes no
 * mmap_lock for it: the child must have its entry before the VMA changes.
 *
 * Guards mprotect_fixup().
 */
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "harness.h"
#include "mover.h"

#define PIECES	6

#define RET	0xc3	/* x86: an instruction that returns */

static sigjmp_buf fault_env;

static void on_fault(int sig)
{
	siglongjmp(fault_env, sig);
}

static void read_it(char *p)
{
	*(volatile char *)p;
}

static void call_it(char *p)
{
	((void (*)(void))p)();
}

/* The number of pages where @touch faults. */
static long count_faults(const struct af_job *job, void (*touch)(char *p))
{
	struct sigaction act = { .sa_handler = on_fault }, old;
	volatile long faults = 0;
	volatile size_t i;

	sigaction(SIGSEGV, &act, &old);
	for (i = 0; i < job->pages; i++) {
		if (sigsetjmp(fault_env, 1))
			faults++;
		else
			touch(job->addr + i * AF_PAGE);
	}
	sigaction(SIGSEGV, &old, NULL);
	return faults;
}

static long do_count_unreadable(const struct af_job *job)
{
	return count_faults(job, read_it);
}

static long do_count_uncallable(const struct af_job *job)
{
	return count_faults(job, call_it);
}

FIXTURE(migrating) {
	struct af af;
	struct af_region r;
	struct mover mover;
	struct af_child c;
};

/* Rights at fork, which the child keeps, and those that the parent takes. */
FIXTURE_VARIANT(migrating) {
	int before, after;
	long (*count)(const struct af_job *job);
	bool all_fault;		/* else none does */
};

FIXTURE_VARIANT_ADD(migrating, opened) {
	.before = PROT_NONE, .after = PROT_READ | PROT_WRITE,
	.count = do_count_unreadable, .all_fault = true };
FIXTURE_VARIANT_ADD(migrating, code_to_data) {
	.before = PROT_READ | PROT_EXEC, .after = PROT_READ | PROT_WRITE,
	.count = do_count_uncallable };
FIXTURE_VARIANT_ADD(migrating, data_to_code) {
	.before = PROT_READ, .after = PROT_READ | PROT_EXEC,
	.count = do_count_uncallable, .all_fault = true };

FIXTURE_SETUP(migrating)
{
	if (!af_two_nodes())
		SKIP(return, "one memory node only (scripts/vm --numa)");
	ASSERT_EQ(0, mover_make(&self->mover));
	AF_REGION(&self->r, PIECES, AF_BASE, 0x1b1);
	memset(self->r.base, RET, self->r.pages * AF_PAGE);
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(migrating)
{
	AF_EXIT_OK(&self->mover.process);
	AF_FINISH();
}

#define LEN (self->r.pages * AF_PAGE)

TEST_F(migrating, parent_mprotect)
{
	time_t until = time(NULL) + 60;
	int round;

	/* Only a mprotect() that met a migration proves something. */
	for (round = 0; round < 4 || (self->af.held && time(NULL) < until &&
			af_delta(&self->af, AF_WAIT_MIGRATION) < 4); round++) {
		ASSERT_EQ(0, mprotect(self->r.base, LEN, variant->before));
		AF_SPAWN(&self->c);
		ASSERT_EQ(0, mover_start(&self->mover, &self->r));
		EXPECT_EQ(0, mprotect(self->r.base, LEN, variant->after));
		EXPECT_EQ(0, mover_stop(&self->mover));
		EXPECT_EQ(variant->all_fault ? (long)self->r.pages : 0,
			  af_call(&self->c, variant->count,
				  .addr = self->r.base,
				  .pages = self->r.pages));
		AF_EXIT_OK(&self->c);
	}
	if (self->af.held)
		EXPECT_LT(0, af_delta(&self->af, AF_WAIT_MIGRATION));
}

TEST_HARNESS_MAIN
