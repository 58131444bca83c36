// SPDX-License-Identifier: GPL-2.0
/*
 * What parent and child see after either of them reads or writes, for every
 * kind of memory. The child must see the parent's memory at the instant of
 * fork(); the parent must see its own.
 */
#include "harness.h"

#define PIECES	4
#define SEED	0x11
#define LATER	0x22
#define OTHER	0x33

FIXTURE(view) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_VARIANT(view) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(view, base) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(view, base_race) { .kind = AF_BASE, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(view, mixed) { .kind = AF_MIXED, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(view, pte_thp) { .kind = AF_PTE_THP, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(view, swapped) { .kind = AF_SWAPPED, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(view, swapped_race) { .kind = AF_SWAPPED, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(view, zero) { .kind = AF_ZERO, .hold = AF_HOLD };

FIXTURE_SETUP(view)
{
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	AF_SETUP(variant->hold);
}

FIXTURE_TEARDOWN(view)
{
	AF_FINISH();
}

/* The workers alone: nobody touches anything until they are through. */
TEST_F(view, background)
{
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, af_release(&self->af));
	if (self->af.async)
		ASSERT_EQ(0, af_settle());
	if (self->af.async)
		EXPECT_GT(af_delta(&self->af, AF_PIECE_WORKER), 0);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check_all(&self->r));
	AF_EXIT_OK(&self->c);
}

/* handle_mm_fault(), parent: a write must not reach the snapshot. */
TEST_F(view, parent_writes)
{
	AF_SPAWN(&self->c);
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
	AF_EXIT_OK(&self->c);
}

/* The same, the memory being written from its end to its start. */
TEST_F(view, parent_writes_descending)
{
	size_t i;

	AF_SPAWN(&self->c);
	for (i = self->r.pages; i-- > 0;)
		af_fill(&self->r, i, 1, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
	AF_EXIT_OK(&self->c);
}

/* handle_mm_fault(), child: a write must find the content, not a zero page. */
TEST_F(view, child_writes)
{
	size_t half = self->r.pages / 2;

	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_child_fill(&self->c, &self->r, 0, half, OTHER));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, half, OTHER));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, half,
				    self->r.pages - half, SEED |
				    (self->r.seed & AF_SPARSE)));
	EXPECT_EQ(0, af_check_all(&self->r));
	AF_EXIT_OK(&self->c);
}

static long write_half_words(const struct af_job *job)
{
	size_t i;

	for (i = 0; i < job->pages; i++)
		*(volatile uint64_t *)(job->addr + i * AF_PAGE + 1024) =
			job->seed + i;
	return 0;
}

static long check_half_words(const struct af_job *job)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < job->pages; i++)
		wrong += *(volatile uint64_t *)(job->addr + i * AF_PAGE + 1024)
			!= job->seed + i;
	return wrong;
}

/*
 * A write to the middle of a page: the rest of the page must come along, on
 * both sides. A child that got a fresh zero page instead shows here.
 */
TEST_F(view, both_write_inside_pages)
{
	struct af_job mine = { .addr = self->r.base, .pages = self->r.pages,
			       .seed = 1000000 };

	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_call(&self->c, write_half_words, .addr = self->r.base,
			     .pages = self->r.pages, .seed = 5000000));
	write_half_words(&mine);
	EXPECT_EQ(0, check_half_words(&mine));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_call(&self->c, check_half_words, .addr = self->r.base,
			     .pages = self->r.pages, .seed = 5000000));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
}

/*
 * The parent reads, then writes what it read: the read must not leave a writable
 * translation behind. It makes no copy but where it faults: where all is swapped.
 */
TEST_F(view, parent_reads_then_writes)
{
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_check_all(&self->r));
	if (self->af.held)
		EXPECT_EQ(variant->kind == AF_SWAPPED ? PIECES : 0,
			  af_delta(&self->af, AF_PIECE_PARENT));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
}

/* One page of each piece, alternately by parent and child. */
TEST_F(view, alternate_pages)
{
	size_t i, page;

	AF_SPAWN(&self->c);
	for (i = 0; i < PIECES; i++) {
		page = af_piece(i) + 17 + i;
		if (i % 2)
			af_fill(&self->r, page, 1, LATER);
		else
			EXPECT_EQ(0, af_child_fill(&self->c, &self->r, page, 1,
						   OTHER));
	}
	for (i = 0; i < PIECES; i++) {
		page = af_piece(i) + 17 + i;
		EXPECT_EQ(0, af_check(&self->r, page, 1,
				      i % 2 ? LATER : self->r.seed));
		EXPECT_EQ(0, af_child_check(&self->c, &self->r, page, 1,
					    i % 2 ? self->r.seed : OTHER));
	}
	AF_EXIT_OK(&self->c);
}

/* One writer at a time in one page: each keeps its own. */
TEST_F(view, same_page)
{
	size_t page = af_piece(1) + 100;

	AF_SPAWN(&self->c);
	af_fill(&self->r, page, 1, LATER);
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, page, 1, self->r.seed));
	EXPECT_EQ(0, af_child_fill(&self->c, &self->r, page, 1, OTHER));
	af_fill(&self->r, page, 1, LATER + 1);
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, page, 1, OTHER));
	EXPECT_EQ(0, af_check(&self->r, page, 1, LATER + 1));
	AF_EXIT_OK(&self->c);
}

/* A child that exits at once leaves nothing behind in the parent. */
TEST_F(view, child_exits_untouched)
{
	AF_SPAWN(&self->c);
	AF_EXIT_OK(&self->c);
	if (self->af.held)
		EXPECT_EQ(1, af_delta(&self->af, AF_CANCEL));
	EXPECT_EQ(0, af_check_all(&self->r));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
}

/* The parent writes half, the child goes, the parent writes the rest. */
TEST_F(view, child_exits_midway)
{
	size_t half = self->r.pages / 2;

	AF_SPAWN(&self->c);
	af_fill(&self->r, 0, half, LATER);
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, half,
				    self->r.seed));
	AF_EXIT_OK(&self->c);
	af_fill(&self->r, half, self->r.pages - half, LATER);
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
}

/*
 * Who pays: with the workers held, one write costs the parent one piece, and
 * one read costs the child one piece.
 */
TEST_F(view, cost_is_one_piece)
{
	if (!self->af.held)
		SKIP(return, "needs held workers (debug kernel)");
	AF_SPAWN(&self->c);
	af_fill(&self->r, af_piece(1), 1, LATER);
	EXPECT_EQ(1, af_delta(&self->af, AF_PIECE_PARENT));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, af_piece(3), 1,
				    self->r.seed));
	EXPECT_EQ(1, af_delta(&self->af, AF_PIECE_CHILD));
	EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_WORKER));
	AF_EXIT_OK(&self->c);
}

TEST_HARNESS_MAIN
