// SPDX-License-Identifier: GPL-2.0
/*
 * Memory errors while the session is open. A page that is taken out of use
 * moves, and nobody notices; a page that is lost is lost to both sides, as
 * after a plain fork: whoever touches it gets SIGBUS, and nobody zeroes.
 *
 * Needs nothing: both go by the entries they find, and those are copied as
 * they are. Each test costs the guest a page or two.
 */
#include <setjmp.h>
#include <signal.h>
#include "harness.h"

#define PIECES	3
#define SEED	0x1a1UL
#define LATER	0x1a2UL

#ifndef MADV_HWPOISON
#define MADV_HWPOISON		100
#endif
#ifndef MADV_SOFT_OFFLINE
#define MADV_SOFT_OFFLINE	101
#endif

FIXTURE(hwpoison) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_VARIANT(hwpoison) {
	int hold;
};

FIXTURE_VARIANT_ADD(hwpoison, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(hwpoison, race) { .hold = AF_RACE };

FIXTURE_SETUP(hwpoison)
{
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	AF_SETUP(variant->hold);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(hwpoison)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

#define BAD	(af_piece(1) + 77)
#define BEHIND	(BAD + 1)

static sigjmp_buf env;

static void on_bus(int sig)
{
	siglongjmp(env, sig);
}

/* job->first is the advice. Who loses a page by it is told by SIGBUS. */
static long do_break(const struct af_job *job)
{
	long ret = 0;

	signal(SIGBUS, on_bus);
	if (!sigsetjmp(env, 1) &&
	    madvise(job->addr, AF_PAGE, (int)job->first))
		ret = -errno;
	signal(SIGBUS, SIG_DFL);
	return ret;
}

/* The signal that a look at the page brings, or 0. */
static long do_probe(const struct af_job *job)
{
	int sig;

	signal(SIGBUS, on_bus);
	sig = sigsetjmp(env, 1);
	if (!sig)
		*(volatile char *)job->addr;
	signal(SIGBUS, SIG_DFL);
	return sig;
}

#define JOB(function, advice) (&(struct af_job){ .fn = (function),	\
	.addr = af_page(&self->r, BAD), .first = (advice) })

static long check_rest(const struct af_job *job)
{
	const struct af_region *r = (const struct af_region *)job->addr;

	return af_check(r, 0, BAD, job->seed) +
	       af_check(r, BEHIND, r->pages - BEHIND, job->seed);
}

#define REST(s) (&(struct af_job){ .fn = check_rest,			\
	.addr = (char *)&self->r, .seed = (s) })

static long do_give_up(const struct af_job *job)
{
	return munmap(job->addr, AF_PAGE);
}

#define BOTH_LOST_IT() do {						\
	EXPECT_EQ(SIGBUS, do_probe(JOB(NULL, 0)));			\
	EXPECT_EQ(0, check_rest(REST(SEED)));				\
	EXPECT_EQ(SIGBUS, af_run(&self->c, JOB(do_probe, 0)));		\
	EXPECT_EQ(0, af_run(&self->c, REST(SEED)));			\
	EXPECT_EQ(0, do_give_up(JOB(NULL, 0)));				\
	af_fill(&self->r, BEHIND, self->r.pages - BEHIND, LATER);	\
	EXPECT_EQ(0, af_run(&self->c, REST(SEED)));			\
	EXPECT_EQ(SIGBUS, af_run(&self->c, JOB(do_probe, 0)));		\
} while (0)

TEST_F(hwpoison, parent_loses_a_page)
{
	long ret = do_break(JOB(NULL, MADV_HWPOISON));

	if (ret == -EINVAL)
		SKIP(return, "no MADV_HWPOISON");
	EXPECT_EQ(0, ret);
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_PARENT));
	BOTH_LOST_IT();
}

TEST_F(hwpoison, child_loses_a_page)
{
	long ret = af_run(&self->c, JOB(do_break, MADV_HWPOISON));

	if (ret == -EINVAL)
		SKIP(return, "no MADV_HWPOISON");
	EXPECT_EQ(0, ret);
	BOTH_LOST_IT();
}

#define NOBODY_NOTICES() do {						\
	EXPECT_EQ(0, af_check_all(&self->r));				\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	af_fill(&self->r, 0, self->r.pages, LATER);			\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));	\
} while (0)

TEST_F(hwpoison, parent_retires_a_page)
{
	long ret = do_break(JOB(NULL, MADV_SOFT_OFFLINE));

	if (ret == -EINVAL)
		SKIP(return, "no MADV_SOFT_OFFLINE");
	EXPECT_EQ(0, ret);
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_PARENT));
	NOBODY_NOTICES();
}

TEST_F(hwpoison, child_retires_a_page)
{
	long ret = af_run(&self->c, JOB(do_break, MADV_SOFT_OFFLINE));

	if (ret == -EINVAL)
		SKIP(return, "no MADV_SOFT_OFFLINE");
	EXPECT_EQ(0, ret);
	if (self->af.held)
		EXPECT_EQ(1, af_delta(&self->af, AF_PIECE_CHILD));
	NOBODY_NOTICES();
}

TEST_HARNESS_MAIN
