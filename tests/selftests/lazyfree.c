// SPDX-License-Identifier: GPL-2.0
/*
 * MADV_FREE while the session is open, and then reclaim: what the one side
 * gives up, the other keeps. Pages that both sides map are not given up at all.
 *
 * Guards madvise_free_single_vma().
 */
#include "harness.h"

#define PIECES	3
#define SEED	0x191UL
#define LATER	0x192UL

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT	21
#endif

FIXTURE(lazyfree) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_VARIANT(lazyfree) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(lazyfree, base) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(lazyfree, race) { .kind = AF_BASE, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(lazyfree, pte_thp) { .kind = AF_PTE_THP, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(lazyfree, swapped) { .kind = AF_SWAPPED, .hold = AF_HOLD };

FIXTURE_SETUP(lazyfree)
{
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	AF_SETUP(variant->hold);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(lazyfree)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/* The pages inside [first, first + pages) hold the pattern or zeroes. */
static long check_free(const struct af_job *job)
{
	return af_check_lazy(job->addr, job->first, job->pages, SEED);
}

/* Gives the pages up, and has the kernel take what it can. */
static long do_free(const struct af_job *job)
{
	size_t len = job->pages * AF_PAGE;

	if (madvise(job->addr, len, MADV_FREE))
		return -errno;
	return madvise(job->addr, len, MADV_PAGEOUT) || check_free(job);
}

/* Across the tables, and not all of any. */
#define FIRST	(af_piece(0) + 100)
#define PAGES	(2 * AF_PIECE_PAGES)
#define BEHIND	(FIRST + PAGES)
#define GIVEN	(&(struct af_job){ .fn = do_free, .first = FIRST,	\
	.addr = af_page(&self->r, FIRST), .pages = PAGES })

TEST_F(lazyfree, by_parent)
{
	EXPECT_EQ(0, do_free(GIVEN));
	if (self->af.held)
		EXPECT_EQ(3, af_delta(&self->af, AF_PIECE_PARENT));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, FIRST, SEED));
	EXPECT_EQ(0, af_check(&self->r, BEHIND, self->r.pages - BEHIND, SEED));
	af_fill(&self->r, FIRST, PAGES, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

TEST_F(lazyfree, by_child)
{
	EXPECT_EQ(0, af_run(&self->c, GIVEN));
	if (self->af.held)
		EXPECT_EQ(3, af_delta(&self->af, AF_PIECE_CHILD));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_fill(&self->c, &self->r, FIRST, PAGES, LATER));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, FIRST, SEED));
	EXPECT_EQ(0, af_release(&self->af));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, FIRST, PAGES, LATER));
	EXPECT_EQ(0, af_check_all(&self->r));
}

TEST_HARNESS_MAIN
