// SPDX-License-Identifier: GPL-2.0
/*
 * Memory that goes away on one side while the session is open: munmap(),
 * MAP_FIXED over it, MADV_DONTNEED, MADV_FREE. The other side must keep all of
 * it, and what lies outside the range must stay right on both sides.
 *
 * Guards the hooks in vms_clear_ptes(), zap_page_range_single() and
 * madvise_free_single_vma().
 */
#include "harness.h"

#define PIECES	4
#define SEED	0x41
#define LATER	0x42

FIXTURE(unmap) {
	struct af af;
	struct af_region r;
	struct af_child c;
	size_t after;		/* first page behind the range */
};

/* The range in pages of the region; split: two VMAs meet inside the range. */
FIXTURE_VARIANT(unmap) {
	enum af_kind kind;
	size_t first, pages, split;
};

#define P(n) (AF_HEAD + (n) * AF_PIECE_PAGES)
#define ALL  (AF_HEAD + PIECES * AF_PIECE_PAGES + AF_TAIL)

FIXTURE_VARIANT_ADD(unmap, head) { .first = 0, .pages = P(0) + 100 };
FIXTURE_VARIANT_ADD(unmap, middle) { .first = P(1) + 30, .pages = 256 };
FIXTURE_VARIANT_ADD(unmap, across) { .first = P(0) + 300, .pages = 1100 };
FIXTURE_VARIANT_ADD(unmap, tail) { .first = P(3) + 200, .pages = 312 + AF_TAIL };
FIXTURE_VARIANT_ADD(unmap, one_page) { .first = P(2) - 1, .pages = 1 };
FIXTURE_VARIANT_ADD(unmap, table) { .first = P(1), .pages = 512 };
FIXTURE_VARIANT_ADD(unmap, tables) { .first = P(1), .pages = 1024 };
FIXTURE_VARIANT_ADD(unmap, whole) { .first = 0, .pages = ALL };
FIXTURE_VARIANT_ADD(unmap, two_vmas) {
	.first = P(0) + 9, .pages = 1500, .split = P(1) + 77 };
FIXTURE_VARIANT_ADD(unmap, two_whole_vmas) {
	.first = 0, .pages = ALL, .split = P(2) };
FIXTURE_VARIANT_ADD(unmap, mixed) {
	.kind = AF_MIXED, .first = P(0) + 300, .pages = 1100 };
FIXTURE_VARIANT_ADD(unmap, pte_thp) {
	.kind = AF_PTE_THP, .first = P(0) + 300, .pages = 1100 };
FIXTURE_VARIANT_ADD(unmap, zero) {
	.kind = AF_ZERO, .first = P(0) + 300, .pages = 1100 };
FIXTURE_VARIANT_ADD(unmap, swapped) {
	.kind = AF_SWAPPED, .first = P(0) + 300, .pages = 1100 };

FIXTURE_SETUP(unmap)
{
	self->after = variant->first + variant->pages;
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	if (variant->split)
		ASSERT_EQ(0, madvise(af_page(&self->r, variant->split),
				     (ALL - variant->split) * AF_PAGE,
				     MADV_DONTDUMP));
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(unmap)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/* Pages of the region outside [first, after), at the caller. */
static long check_outside(const struct af_region *r, size_t first,
			  size_t after)
{
	return af_check(r, 0, first, r->seed) +
	       af_check(r, after, r->pages - after, r->seed);
}

/* What may be left after MADV_FREE: the old page or zeroes. */
static long check_free(const struct af_job *job)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < job->pages; i++) {
		uint64_t seen = *(volatile uint64_t *)(job->addr + i * AF_PAGE);

		wrong += seen && seen != af_value(job->seed, job->first + i);
	}
	return wrong;
}

static long is_unmapped(const struct af_job *job)
{
	unsigned char vec;
	size_t i;

	for (i = 0; i < job->pages; i++)
		if (!mincore(job->addr + i * AF_PAGE, 1, &vec) ||
		    errno != ENOMEM)
			return 1;
	return 0;
}

static long do_munmap(const struct af_job *job)
{
	return munmap(job->addr, job->pages * AF_PAGE) || is_unmapped(job);
}

static long do_dontneed(const struct af_job *job)
{
	return madvise(job->addr, job->pages * AF_PAGE, MADV_DONTNEED) ||
	       af_do_zero(job);
}

static long do_free(const struct af_job *job)
{
	return madvise(job->addr, job->pages * AF_PAGE, MADV_FREE) ||
	       check_free(job);
}

static long do_map_fixed(const struct af_job *job)
{
	char *p = mmap(job->addr, job->pages * AF_PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	if (p != job->addr || af_do_zero(job))
		return 1;
	af_fill_at(job->addr, job->first, job->pages, LATER);
	return af_check_at(job->addr, job->first, job->pages, LATER);
}

typedef long (*job_fn)(const struct af_job *job);

#define JOB(function) (&(struct af_job) { .fn = (function),		\
	.addr = af_page(&self->r, variant->first),			\
	.first = variant->first, .pages = variant->pages,		\
	.seed = self->r.seed })

static long do_check_outside(const struct af_job *job)
{
	return check_outside((struct af_region *)job->addr, job->first,
			     job->first + job->pages);
}

/* The parent does @fn to the range; the child must not notice. */
#define PARENT_DOES(fn) do {						\
	EXPECT_EQ(0, fn(JOB(fn)));					\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	EXPECT_EQ(0, check_outside(&self->r, variant->first,		\
				   self->after));			\
} while (0)

/* The child does @fn to the range; the parent must not notice. */
#define CHILD_DOES(fn) do {						\
	EXPECT_EQ(0, af_run(&self->c, JOB(fn)));			\
	EXPECT_EQ(0, af_check_all(&self->r));				\
	EXPECT_EQ(0, af_call(&self->c, do_check_outside,		\
			     .addr = (char *)&self->r,			\
			     .first = variant->first,			\
			     .pages = variant->pages));			\
} while (0)

TEST_F(unmap, parent_munmap)
{
	PARENT_DOES(do_munmap);
}

TEST_F(unmap, child_munmap)
{
	CHILD_DOES(do_munmap);
}

TEST_F(unmap, parent_dontneed)
{
	PARENT_DOES(do_dontneed);
}

TEST_F(unmap, child_dontneed)
{
	CHILD_DOES(do_dontneed);
}

TEST_F(unmap, parent_free)
{
	PARENT_DOES(do_free);
}

TEST_F(unmap, child_free)
{
	CHILD_DOES(do_free);
}

TEST_F(unmap, parent_map_fixed)
{
	PARENT_DOES(do_map_fixed);
}

TEST_F(unmap, child_map_fixed)
{
	CHILD_DOES(do_map_fixed);
}

/* Both sides unmap the range, then both look at the rest. */
TEST_F(unmap, both_munmap)
{
	EXPECT_EQ(0, do_munmap(JOB(do_munmap)));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_munmap)));
	EXPECT_EQ(0, check_outside(&self->r, variant->first, self->after));
	EXPECT_EQ(0, af_call(&self->c, do_check_outside,
			     .addr = (char *)&self->r,
			     .first = variant->first, .pages = variant->pages));
}

/*
 * The child unmaps while the workers, let loose at the same instant, copy.
 * (DESIGN.md section 9, items 5 and 14: no walk of freed tables.)
 */
TEST_F(unmap, munmap_against_workers)
{
	af_post(&self->c, JOB(do_munmap));
	EXPECT_EQ(0, af_release(&self->af));
	EXPECT_EQ(0, do_munmap(JOB(do_munmap)));
	EXPECT_EQ(0, af_wait(&self->c));
	EXPECT_EQ(0, check_outside(&self->r, variant->first, self->after));
	EXPECT_EQ(0, af_call(&self->c, do_check_outside,
			     .addr = (char *)&self->r,
			     .first = variant->first, .pages = variant->pages));
}

AF_PLAIN_FIXTURE(unmap_cost, 12)

/*
 * DESIGN.md section 9, item 1: a parent that gives back a little memory inside
 * a large range copies only the pieces it touches, and the rest of the range
 * is neither copied then nor lost afterwards.
 */
TEST_F(unmap_cost, parent_pays_for_the_range_only)
{
	size_t first = af_piece(5) + 200, pages = 256;
	struct af_child c;

	AF_SPAWN(&c);
	EXPECT_EQ(0, munmap(af_page(&self->r, first), pages * AF_PAGE));
	EXPECT_EQ(0, madvise(af_page(&self->r, af_piece(7) + 8), AF_PAGE,
			     MADV_DONTNEED));
	EXPECT_EQ(0, mprotect(af_page(&self->r, af_piece(9) + 8), AF_PAGE,
			      PROT_READ));
	if (self->af.held)
		EXPECT_EQ(3, af_delta(&self->af, AF_PIECE_PARENT));
	EXPECT_EQ(0, af_child_check_all(&c, &self->r));
	af_fill(&self->r, af_piece(10), 600, LATER);
	EXPECT_EQ(0, af_child_check_all(&c, &self->r));
	AF_EXIT_OK(&c);
}

/* A piece that the child throws away whole is not copied for it first. */
TEST_F(unmap_cost, child_discards_whole_pieces)
{
	struct af_child c;

	AF_SPAWN(&c);
	EXPECT_EQ(0, af_call(&c, do_munmap,
			     .addr = af_page(&self->r, af_piece(2)),
			     .first = af_piece(2),
			     .pages = 4 * AF_PIECE_PAGES));
	if (self->af.held) {
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_CHILD));
		EXPECT_EQ(4, af_delta(&self->af, AF_PIECE_LIFTED));
	}
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
	EXPECT_EQ(0, af_child_check(&c, &self->r, 0, af_piece(2), self->r.seed));
	AF_EXIT_OK(&c);
}

/*
 * DESIGN.md section 9, item 14: a child throws two GiB away while the workers
 * copy them. One page in each piece is there.
 */
#define HUGE_PIECES	1024UL

FIXTURE(unmap_huge) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_SETUP(unmap_huge)
{
	ASSERT_EQ(0, af_region_reserve(&self->r, HUGE_PIECES, 0x9e | AF_SPARSE));
	af_fill(&self->r, 0, self->r.pages, self->r.seed);
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(unmap_huge)
{
	AF_FINISH();
}

static long do_munmap_all(const struct af_job *job)
{
	return munmap(job->addr, job->pages * AF_PAGE) ? -errno : 0;
}

static long do_dontneed_all(const struct af_job *job)
{
	if (madvise(job->addr, job->pages * AF_PAGE, MADV_DONTNEED))
		return -errno;
	return af_check_zero(job->addr, AF_PIECE_PAGES);
}

/* From both ends towards the middle, where the workers are by then. */
static long do_munmap_parts(const struct af_job *job)
{
	size_t part = job->pages / 8 * AF_PAGE, len = job->pages * AF_PAGE;
	char *p = job->addr;
	int i;

	for (i = 0; i < 4; i++)
		if (munmap(p + i * part, part) ||
		    munmap(p + len - (i + 1) * part, part))
			return -errno;
	return 0;
}

TEST_F(unmap_huge, child_against_workers)
{
	static long (* const how[])(const struct af_job *job) = {
		do_munmap_all, do_munmap_parts, do_dontneed_all, do_munmap_all,
	};
	size_t i, pages = HUGE_PIECES * AF_PIECE_PAGES;
	int round;

	for (round = 0; round < 4; round++) {
		if (round)
			af_write_file(AF_HOLD_FILE, self->af.held ? "1" : "0");
		AF_SPAWN(&self->c);
		/* In the last round the child is first. */
		if (self->af.held && round < 3)
			af_write_file(AF_HOLD_FILE, "0");
		EXPECT_EQ(0, af_call(&self->c, how[round],
				     .addr = af_page(&self->r, af_piece(0)),
				     .pages = pages));
		EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, 1,
					    self->r.seed));
		AF_EXIT_OK(&self->c);
		for (i = 0; i < HUGE_PIECES; i++)
			ASSERT_EQ(0, af_check(&self->r, i * AF_PIECE_PAGES, 1,
					      self->r.seed));
	}
	if (self->af.async)
		TH_LOG("pieces: %ld by workers, %ld lifted, %ld by the child",
		       af_delta(&self->af, AF_PIECE_WORKER),
		       af_delta(&self->af, AF_PIECE_LIFTED),
		       af_delta(&self->af, AF_PIECE_CHILD));
}

TEST_HARNESS_MAIN
