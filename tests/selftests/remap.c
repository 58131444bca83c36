// SPDX-License-Identifier: GPL-2.0
/*
 * mremap() on either side while the session is open: whole tables (the kernel
 * moves the tables themselves), parts of tables (it moves the entries), growth,
 * shrinking, and MREMAP_DONTUNMAP. The other side keeps the old place.
 *
 * Guards the hook in move_vma(); shrinking guards vms_clear_ptes().
 */
#include "harness.h"

#define PIECES	3
#define SEED	0x71
#define LATER	0x72

#define P(n) (AF_HEAD + (n) * AF_PIECE_PAGES)
#define ALL  (AF_HEAD + PIECES * AF_PIECE_PAGES + AF_TAIL)

FIXTURE(remap) {
	struct af af;
	struct af_region r;
	struct af_child c;
	char *target;		/* reserved, as aligned as the range is */
};

/* skew: pages by which the target's alignment differs from the range's. */
FIXTURE_VARIANT(remap) {
	enum af_kind kind;
	size_t first, pages, skew;
};

FIXTURE_VARIANT_ADD(remap, table) { .first = P(1), .pages = 512 };
FIXTURE_VARIANT_ADD(remap, tables) { .first = P(1), .pages = 1024 };
FIXTURE_VARIANT_ADD(remap, table_skewed) {
	.first = P(1), .pages = 512, .skew = 5 };
FIXTURE_VARIANT_ADD(remap, part) { .first = P(1) + 77, .pages = 200 };
FIXTURE_VARIANT_ADD(remap, across) { .first = P(0) + 300, .pages = 1100 };
FIXTURE_VARIANT_ADD(remap, across_skewed) {
	.first = P(0) + 300, .pages = 1100, .skew = 33 };
FIXTURE_VARIANT_ADD(remap, whole) { .first = 0, .pages = ALL };
FIXTURE_VARIANT_ADD(remap, mixed) {
	.kind = AF_MIXED, .first = P(0), .pages = 1024 };
FIXTURE_VARIANT_ADD(remap, pte_thp) {
	.kind = AF_PTE_THP, .first = P(0) + 300, .pages = 1100 };
FIXTURE_VARIANT_ADD(remap, zero) {
	.kind = AF_ZERO, .first = P(0) + 300, .pages = 1100 };
FIXTURE_VARIANT_ADD(remap, swapped) {
	.kind = AF_SWAPPED, .first = P(0) + 300, .pages = 1100 };

/* A free place with the alignment that the variant wants. */
static char *reserve_target(const char *from, size_t pages, size_t skew)
{
	size_t len = pages * AF_PAGE + 4 * AF_PIECE;
	uintptr_t p, low = (uintptr_t)from & (AF_PIECE - 1);

	p = (uintptr_t)mmap(NULL, len, PROT_NONE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	p = (p + 2 * AF_PIECE - 1) & ~(AF_PIECE - 1);
	return (char *)(p + low + skew * AF_PAGE);
}

FIXTURE_SETUP(remap)
{
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	self->target = reserve_target(af_page(&self->r, variant->first),
				      variant->pages, variant->skew);
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(remap)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/* A range of region @r that moves to @to. */
struct move {
	struct af_region *r;
	char *to;
	size_t first, pages;
	int flags;
};

static long do_move(const struct af_job *job)
{
	const struct move *m = (const struct move *)job->addr;
	size_t len = m->pages * AF_PAGE;
	char *from = af_page(m->r, m->first);

	if (mremap(from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED | m->flags,
		   m->to) != m->to)
		return 1;
	if (m->flags & MREMAP_DONTUNMAP)
		return af_check_zero(from, m->pages);
	return 0;
}

/* All of the region, the moved part where it is now. */
static long do_check_moved(const struct af_job *job)
{
	const struct move *m = (const struct move *)job->addr;
	size_t after = m->first + m->pages;

	return af_check(m->r, 0, m->first, job->seed) +
	       af_check_at(m->to, m->first, m->pages, job->seed) +
	       af_check(m->r, after, m->r->pages - after, job->seed);
}

static long do_fill_moved(const struct af_job *job)
{
	const struct move *m = (const struct move *)job->addr;

	af_fill_at(m->to, m->first, m->pages, job->seed);
	return af_check_at(m->to, m->first, m->pages, job->seed);
}

#define MOVE(flag) struct move *m = &(struct move){			\
	.r = &self->r, .to = self->target, .first = variant->first,	\
	.pages = variant->pages, .flags = (flag) }
#define JOB(s) (&(struct af_job){ .addr = (char *)m, .seed = (s) })

/* The child has no copy of a description made after the fork: pass it on. */
static struct move child_move;

static long do_set_move(const struct af_job *job)
{
	child_move.r = (struct af_region *)job->addr;
	child_move.first = job->first;
	child_move.pages = job->pages;
	child_move.flags = (int)job->seed;
	return 0;
}

static long do_set_target(const struct af_job *job)
{
	child_move.to = job->addr;
	return 0;
}

#define SEND_MOVE(flag) do {						\
	EXPECT_EQ(0, af_call(&self->c, do_set_move,			\
			     .addr = (char *)&self->r,			\
			     .first = variant->first,			\
			     .pages = variant->pages, .seed = (flag)));	\
	EXPECT_EQ(0, af_call(&self->c, do_set_target,			\
			     .addr = self->target));			\
} while (0)
#define CHILD(fn, s) af_call(&self->c, fn, .addr = (char *)&child_move,	\
			     .seed = (s))

TEST_F(remap, parent_moves)
{
	MOVE(0);

	ASSERT_EQ(0, do_move(JOB(0)));
	EXPECT_EQ(0, do_check_moved(JOB(self->r.seed)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, do_fill_moved(JOB(LATER)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

/* The write comes before anybody looked: the mark must not get lost. */
TEST_F(remap, parent_moves_and_writes)
{
	MOVE(0);

	ASSERT_EQ(0, do_move(JOB(0)));
	EXPECT_EQ(0, do_fill_moved(JOB(LATER)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

TEST_F(remap, child_moves)
{
	SEND_MOVE(0);
	EXPECT_EQ(0, CHILD(do_move, 0));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, CHILD(do_check_moved, self->r.seed));
	EXPECT_EQ(0, CHILD(do_fill_moved, LATER + 1));
	EXPECT_EQ(0, af_check(&self->r, 0, ALL, LATER));
}

TEST_F(remap, both_move)
{
	MOVE(0);

	SEND_MOVE(0);
	ASSERT_EQ(0, do_move(JOB(0)));
	EXPECT_EQ(0, CHILD(do_move, 0));
	EXPECT_EQ(0, do_check_moved(JOB(self->r.seed)));
	EXPECT_EQ(0, do_fill_moved(JOB(LATER)));
	EXPECT_EQ(0, CHILD(do_check_moved, self->r.seed));
}

/* There and back again: the old place is as it was. */
TEST_F(remap, parent_moves_back)
{
	MOVE(0);
	size_t len = variant->pages * AF_PAGE;
	char *from = af_page(&self->r, variant->first);

	ASSERT_EQ(0, do_move(JOB(0)));
	ASSERT_EQ(from, mremap(m->to, len, len, MREMAP_MAYMOVE | MREMAP_FIXED,
			       from));
	EXPECT_EQ(0, af_check_all(&self->r));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

/* The old place stays mapped and empty. */
TEST_F(remap, parent_dontunmap)
{
	MOVE(MREMAP_DONTUNMAP);

	ASSERT_EQ(0, do_move(JOB(0)));
	EXPECT_EQ(0, do_check_moved(JOB(self->r.seed)));
	af_fill(&self->r, variant->first, variant->pages, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, do_check_moved(JOB(self->r.seed)));
}

TEST_F(remap, child_dontunmap)
{
	SEND_MOVE(MREMAP_DONTUNMAP);
	EXPECT_EQ(0, CHILD(do_move, 0));
	af_fill(&self->r, 0, ALL, LATER);
	EXPECT_EQ(0, CHILD(do_check_moved, self->r.seed));
	EXPECT_EQ(0, af_check(&self->r, 0, ALL, LATER));
}

/* MREMAP_FIXED onto a place that holds uncopied memory unmaps it first. */
TEST_F(remap, parent_moves_onto_uncopied)
{
	size_t len = 300 * AF_PAGE;
	char *to = af_page(&self->r, P(2) + 10), *from = af_page(&self->r, P(0));

	ASSERT_EQ(to, mremap(from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED,
			     to));
	EXPECT_EQ(0, af_check_at(to, P(0), 300, self->r.seed));
	af_fill_at(to, 0, 300, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

AF_PLAIN_FIXTURE(resize, PIECES)

static long do_shrink(const struct af_job *job)
{
	return mremap(job->addr, job->first * AF_PAGE, job->pages * AF_PAGE, 0)
		!= job->addr;
}

TEST_F(resize, parent_shrinks)
{
	size_t keep = P(2) + 123;
	struct af_child c;

	AF_SPAWN(&c);
	EXPECT_EQ(0, do_shrink(&(struct af_job){ .addr = self->r.base,
						 .first = ALL, .pages = keep }));
	EXPECT_EQ(0, af_check(&self->r, 0, keep, self->r.seed));
	EXPECT_EQ(0, af_child_check_all(&c, &self->r));
	AF_EXIT_OK(&c);
}

TEST_F(resize, child_shrinks)
{
	size_t keep = P(2) + 123;
	struct af_child c;

	AF_SPAWN(&c);
	EXPECT_EQ(0, af_call(&c, do_shrink, .addr = self->r.base,
			     .first = ALL, .pages = keep));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&c, &self->r, 0, keep, self->r.seed));
	AF_EXIT_OK(&c);
}

/* Growth in place: the new pages belong to the session of neither side. */
TEST_F(resize, parent_grows_in_place)
{
	size_t more = AF_PIECE_PAGES, len = ALL * AF_PAGE;
	struct af_child c;

	ASSERT_EQ(0, munmap(self->r.base + len, more * AF_PAGE));
	AF_SPAWN(&c);
	ASSERT_EQ(self->r.base, mremap(self->r.base, len, len + more * AF_PAGE,
				       0));
	af_fill_at(self->r.base + len, ALL, more, LATER);
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check_all(&c, &self->r));
	EXPECT_EQ(0, af_check_at(self->r.base + len, ALL, more, LATER));
	AF_EXIT_OK(&c);
}

/* Growth with a move, as realloc() does it. */
TEST_F(resize, parent_grows_and_moves)
{
	size_t len = ALL * AF_PAGE;
	struct af_child c;
	char *to;

	AF_SPAWN(&c);
	to = mremap(self->r.base, len, 2 * len, MREMAP_MAYMOVE);
	ASSERT_NE(MAP_FAILED, to);
	EXPECT_EQ(0, af_check_at(to, 0, ALL, self->r.seed));
	af_fill_at(to, 0, 2 * ALL, LATER);
	EXPECT_EQ(0, af_child_check_all(&c, &self->r));
	AF_EXIT_OK(&c);
}

static long do_grow(const struct af_job *job)
{
	size_t len = job->pages * AF_PAGE;
	char *to = mremap(job->addr, len, 2 * len, MREMAP_MAYMOVE);

	if (to == MAP_FAILED)
		return 1;
	return af_check_at(to, 0, job->pages, job->seed) +
	       af_check_zero(to + len, job->pages);
}

TEST_F(resize, child_grows_and_moves)
{
	struct af_child c;

	AF_SPAWN(&c);
	EXPECT_EQ(0, af_call(&c, do_grow, .addr = self->r.base, .pages = ALL,
			     .seed = self->r.seed));
	EXPECT_EQ(0, af_check_all(&self->r));
	AF_EXIT_OK(&c);
}

TEST_HARNESS_MAIN
