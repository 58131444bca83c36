// SPDX-License-Identifier: GPL-2.0
/*
 * Address spaces of unusual shape: many VMAs in one table, VMAs that are just
 * too small or just large enough for a piece, holes, VMAs that may not be read
 * or written, and kinds of memory that a session leaves alone. Every VMA must
 * be the child's at fork time and the parent's own afterwards.
 */
#include <pthread.h>
#include "harness.h"

#define SEED	0xb1UL
#define LATER	0xb2UL
#define PIECES	8

FIXTURE(layout) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_SETUP(layout)
{
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(layout)
{
	AF_FINISH();
}

/* Both views, the parent writing all that it may between the two looks. */
#define CHECK_BOTH() do {						\
	af_fill(&self->r, 0, self->r.pages, LATER);			\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));	\
	AF_EXIT_OK(&self->c);						\
} while (0)

/* Every other three pages of some pieces get a VMA flag of their own. */
TEST_F(layout, many_vmas_in_one_table)
{
	size_t i;

	for (i = af_piece(1); i < af_piece(4); i += 6)
		ASSERT_EQ(0, madvise(af_page(&self->r, i), 3 * AF_PAGE,
				     MADV_DONTDUMP));
	AF_SPAWN(&self->c);
	CHECK_BOTH();
}

/* Borders one page off a piece's on either side. */
TEST_F(layout, borders_next_to_pieces)
{
	size_t cut[] = { af_piece(1) - 1, af_piece(1) + 1, af_piece(3),
			 af_piece(5) - 1, af_piece(6) + 1 };
	size_t i;

	for (i = 0; i < 5; i++)
		ASSERT_EQ(0, madvise(af_page(&self->r, cut[i]),
				     (self->r.pages - cut[i]) * AF_PAGE,
				     i % 2 ? MADV_DODUMP : MADV_DONTDUMP));
	AF_SPAWN(&self->c);
	CHECK_BOTH();
}

/* A VMA of exactly one piece, and one of a piece less a page. */
TEST_F(layout, exact_vmas)
{
	ASSERT_EQ(0, madvise(af_page(&self->r, af_piece(2)), AF_PIECE,
			     MADV_DONTDUMP));
	ASSERT_EQ(0, madvise(af_page(&self->r, af_piece(4)), AF_PIECE - AF_PAGE,
			     MADV_DONTDUMP));
	AF_SPAWN(&self->c);
	CHECK_BOTH();
}

/* Whole tables that were never there, and tables with few pages. */
TEST_F(layout, holes)
{
	ASSERT_EQ(0, munmap(af_page(&self->r, af_piece(1)), AF_PIECE));
	ASSERT_EQ(0, madvise(af_page(&self->r, af_piece(3)), AF_PIECE,
			     MADV_DONTNEED));
	ASSERT_EQ(0, madvise(af_page(&self->r, af_piece(4) + 1),
			     AF_PIECE - 2 * AF_PAGE, MADV_DONTNEED));
	AF_SPAWN(&self->c);
	af_fill(&self->r, 0, af_piece(1), LATER);
	af_fill(&self->r, af_piece(2), self->r.pages - af_piece(2), LATER);
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, af_piece(1), SEED));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, af_piece(2), 512, SEED));
	EXPECT_EQ(0, af_call(&self->c, af_do_zero,
			     .addr = af_page(&self->r, af_piece(3)),
			     .pages = 512));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, af_piece(4), 1, SEED));
	EXPECT_EQ(0, af_call(&self->c, af_do_zero,
			     .addr = af_page(&self->r, af_piece(4) + 1),
			     .pages = 510));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, af_piece(5) - 1,
				    self->r.pages - af_piece(5) + 1, SEED));
	AF_EXIT_OK(&self->c);
}

static long do_protect_rw(const struct af_job *job)
{
	return mprotect(job->addr, job->pages * AF_PAGE,
			PROT_READ | PROT_WRITE);
}

/* VMAs that were PROT_NONE and read-only at fork, with content. */
TEST_F(layout, no_access_at_fork)
{
	char *p = af_page(&self->r, af_piece(1) + 30);
	size_t pages = 3 * AF_PIECE_PAGES;

	ASSERT_EQ(0, mprotect(p, pages * AF_PAGE, PROT_NONE));
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, do_protect_rw(&(struct af_job){ .addr = p,
						     .pages = pages }));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_call(&self->c, do_protect_rw, .addr = p,
			     .pages = pages));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
	AF_EXIT_OK(&self->c);
}

TEST_F(layout, read_only_at_fork)
{
	ASSERT_EQ(0, mprotect(self->r.base, self->r.pages * AF_PAGE,
			      PROT_READ));
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, af_piece(3), SEED));
	ASSERT_EQ(0, do_protect_rw(&(struct af_job){ .addr = self->r.base,
						     .pages = self->r.pages }));
	CHECK_BOTH();
}

/* PROT_EXEC pages are data like any other. */
TEST_F(layout, executable_at_fork)
{
	ASSERT_EQ(0, mprotect(self->r.base, self->r.pages * AF_PAGE,
			      PROT_READ | PROT_WRITE | PROT_EXEC));
	AF_SPAWN(&self->c);
	CHECK_BOTH();
}

/* Locks are not inherited; the pages are. */
TEST_F(layout, locked_at_fork)
{
	ASSERT_EQ(0, mlock(af_page(&self->r, af_piece(1) + 9), 3 * AF_PIECE));
	AF_SPAWN(&self->c);
	CHECK_BOTH();
}

/* Shared memory lies in the midst of a region and stays shared. */
TEST_F(layout, shared_neighbour)
{
	char *p = af_page(&self->r, af_piece(2) + 100);
	size_t pages = 1000, after = af_piece(2) + 1100;

	ASSERT_EQ(p, mmap(p, pages * AF_PAGE, PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	AF_SPAWN(&self->c);
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, af_piece(2) + 100,
				    SEED));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, af_piece(2) + 100,
				    pages, LATER));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, after,
				    self->r.pages - after, SEED));
	AF_EXIT_OK(&self->c);
}

/* A private file mapping with pages of its own lies next to a region. */
TEST_F(layout, private_file_neighbour)
{
	size_t pages = 700, first = af_piece(3) + 11;
	int fd = memfd_create("file", MFD_CLOEXEC);
	char *p = af_page(&self->r, first);

	ASSERT_EQ(0, ftruncate(fd, pages * AF_PAGE));
	ASSERT_EQ(p, mmap(p, pages * AF_PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_FIXED, fd, 0));
	af_fill(&self->r, first, pages, SEED);
	AF_SPAWN(&self->c);
	CHECK_BOTH();
}

/*
 * VMAs split and merge on both sides while the session is open. The copies
 * read fork-time facts, so nothing may change.
 */
TEST_F(layout, vmas_change_during_session)
{
	size_t i;

	AF_SPAWN(&self->c);
	for (i = 100; i < self->r.pages; i += 200)
		ASSERT_EQ(0, madvise(af_page(&self->r, i), 100 * AF_PAGE,
				     MADV_DONTDUMP));
	for (i = 100; i < self->r.pages - 300; i += 400)
		ASSERT_EQ(0, madvise(af_page(&self->r, i), 300 * AF_PAGE,
				     MADV_DONTDUMP));
	ASSERT_EQ(0, madvise(self->r.base, self->r.pages * AF_PAGE,
			     MADV_DODUMP));
	CHECK_BOTH();
}

/* A neighbour that comes into being merges with a VMA of the session. */
TEST_F(layout, neighbour_appears)
{
	char *end = af_page(&self->r, self->r.pages);
	size_t more = AF_PIECE / 2;

	AF_SPAWN(&self->c);
	ASSERT_EQ(end, mmap(end, more, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	madvise(end, more, MADV_NOHUGEPAGE);
	af_fill_at(end, 0, more / AF_PAGE, LATER);
	CHECK_BOTH();
	EXPECT_EQ(0, af_check_at(end, 0, more / AF_PAGE, LATER));
}

/* A thread's stack and heap are regions, too, and live ones. */
static void *spin_on_stack(void *arg)
{
	volatile int *stop = arg;
	volatile uint64_t words[4096];
	uint64_t round = 0, wrong = 0;
	size_t i;

	while (!*stop) {
		round++;
		for (i = 0; i < 4096; i++)
			words[i] = round + i;
		for (i = 0; i < 4096; i++)
			wrong += words[i] != round + i;
	}
	return (void *)wrong;
}

TEST_F(layout, running_thread)
{
	volatile int stop = 0;
	pthread_t thread;
	void *wrong;

	ASSERT_EQ(0, pthread_create(&thread, NULL, spin_on_stack,
				    (void *)&stop));
	AF_SPAWN(&self->c);
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	stop = 1;
	pthread_join(thread, &wrong);
	EXPECT_EQ(NULL, wrong);
	AF_EXIT_OK(&self->c);
}

/*
 * Far apart: each region has upper tables of its own. Every other one is all
 * lazy: fork() leaves the child none of them.
 */
TEST_F(layout, regions_far_apart)
{
	static struct af_region far[6];
	char *hint = (char *)0x100000000000;
	size_t i;

	for (i = 0; i < 6; i++) {
		size_t len = AF_PIECE + i % 2 * 33 * AF_PAGE;

		far[i].pages = len / AF_PAGE;
		far[i].base = mmap(hint + (i << 40), len,
				   PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS |
				   MAP_FIXED_NOREPLACE, -1, 0);
		ASSERT_EQ(hint + (i << 40), far[i].base);
		madvise(far[i].base, len, MADV_NOHUGEPAGE);
		af_fill(&far[i], 0, far[i].pages, SEED + i);
	}
	AF_SPAWN(&self->c);
	for (i = 0; i < 6; i++)
		af_fill(&far[i], 0, far[i].pages, LATER);
	for (i = 0; i < 6; i++)
		EXPECT_EQ(0, af_child_check(&self->c, &far[i], 0, far[i].pages,
					    SEED + i));
	CHECK_BOTH();
}

/* How many pieces a session has that nobody uses. */
static long count_pieces(struct __test_metadata *_metadata,
			 FIXTURE_DATA(layout) *self)
{
	const enum af_counter done[] = { AF_PIECE_WORKER, AF_PIECE_PARENT,
					 AF_PIECE_CHILD, AF_PIECE_LIFTED };
	long pieces = 0;
	size_t i;

	for (i = 0; i < 4; i++)
		pieces -= af_delta(&self->af, done[i]);
	AF_SPAWN(&self->c);
	AF_EXIT_OK(&self->c);
	EXPECT_EQ(0, af_settle());
	for (i = 0; i < 4; i++)
		pieces += af_delta(&self->af, done[i]);
	return pieces;
}

/* There is nothing to copy, or to look at, where nothing was ever touched. */
TEST_F(layout, untouched_pieces)
{
	char *base = (char *)0x100000000000;
	long before;

	if (!self->af.async)
		SKIP(return, "plain fork has no pieces");
	before = count_pieces(_metadata, self);
	ASSERT_EQ(base, mmap(base, 5 * AF_PIECE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
			     -1, 0));
	madvise(base, 5 * AF_PIECE, MADV_NOHUGEPAGE);
	af_fill_at(base + AF_PIECE, 0, 1, SEED);
	EXPECT_EQ(before + 1, count_pieces(_metadata, self));
}

TEST_HARNESS_MAIN
