// SPDX-License-Identifier: GPL-2.0
/*
 * Huge pages made of base pages while the session is open: by khugepaged, which
 * must leave both sides alone, and by MADV_COLLAPSE, which is a request and so
 * does what it does after a plain fork (rows.c says what it copies).
 *
 * Guards khugepaged_scan_mm_slot(), hugepage_vma_revalidate(),
 * madvise_collapse() and collapse_huge_page().
 */
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include "harness.h"

#define PIECES	3
#define SEED	0x151UL
#define LATER	0x152UL

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif

#define THP	"/sys/kernel/mm/transparent_hugepage/"
#define DAEMON	THP "khugepaged/"

/* What the tests change of the daemon, and what they change it to. */
static const struct {
	const char *file, *value;
} settings[] = {
	{ DAEMON "scan_sleep_millisecs", "3600000" },
	{ DAEMON "alloc_sleep_millisecs", "0" },
	{ DAEMON "pages_to_scan", "100000" },
	{ DAEMON "max_ptes_none", "511" },
	{ DAEMON "max_ptes_shared", "511" },
	{ DAEMON "max_ptes_swap", "64" },
	{ DAEMON "defrag", "1" },
};

#define SETTINGS (sizeof(settings) / sizeof(settings[0]))

FIXTURE(khugepaged) {
	struct af af;
	struct af_region r;
	struct af_child c;
	char saved[SETTINGS][32];
};

FIXTURE_VARIANT(khugepaged) {
	int hold;
	uint64_t sparse;	/* one page in each piece, or all of them */
};

FIXTURE_VARIANT_ADD(khugepaged, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(khugepaged, held_sparse) {
	.hold = AF_HOLD, .sparse = AF_SPARSE };
FIXTURE_VARIANT_ADD(khugepaged, race) { .hold = AF_RACE };

/*
 * Advice makes the daemon know the process. Then it may not touch it, until
 * daemon_may(), and only then is there something to make huge.
 */
FIXTURE_SETUP(khugepaged)
{
	size_t i;

	if (access(DAEMON "full_scans", R_OK))
		SKIP(return, "no khugepaged");
	for (i = 0; i < SETTINGS; i++) {
		ASSERT_EQ(0, af_read_file(settings[i].file, self->saved[i], 32));
		ASSERT_EQ(0, af_write_file(settings[i].file,
					   settings[i].value));
	}
	ASSERT_EQ(0, af_region_reserve(&self->r, PIECES,
				       SEED | variant->sparse));
	/* Advice for a VMA without an anon_vma is not heard. */
	*(volatile char *)self->r.base = 1;
	ASSERT_EQ(0, madvise(self->r.base, self->r.pages * AF_PAGE,
			     MADV_HUGEPAGE));
	ASSERT_EQ(0, prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	af_fill(&self->r, 0, self->r.pages, self->r.seed);
	AF_SETUP(variant->hold);
}

FIXTURE_TEARDOWN(khugepaged)
{
	size_t i;

	for (i = 0; i < SETTINGS; i++)
		EXPECT_EQ(0, af_write_file(settings[i].file, self->saved[i]));
	AF_FINISH();
}

/* Lets the daemon work on the caller's memory, and wakes it. */
static long daemon_may(const struct af_job *job)
{
	(void)job;
	af_write_file(DAEMON "scan_sleep_millisecs", "0");
	return prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0);
}

static long full_scans(void)
{
	char text[32];

	return af_read_file(DAEMON "full_scans", text, sizeof(text)) ? -1 :
		atol(text);
}

static bool has_scanned(void *from)
{
	return full_scans() >= *(long *)from + 4;
}

static long huge_kb(const struct af_region *r)
{
	return af_smaps_kb(af_page(r, af_piece(0)), "AnonHugePages");
}

static long do_huge_kb(const struct af_job *job)
{
	return huge_kb((const struct af_region *)job->addr);
}

static bool is_huge(void *r)
{
	return huge_kb(r) >= (long)(PIECES * AF_PIECE / 1024);
}

/*
 * The daemon goes round several times. An mm in a session keeps its tables,
 * and nothing is copied on the daemon's account.
 */
TEST_F(khugepaged, scans_during_session)
{
	long from = full_scans();

	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_call(&self->c, daemon_may));
	EXPECT_EQ(0, daemon_may(NULL));
	EXPECT_EQ(0, af_poll(has_scanned, &from, 60));
	if (self->af.held) {
		EXPECT_EQ(0, huge_kb(&self->r));
		EXPECT_EQ(0, af_call(&self->c, do_huge_kb,
				     .addr = (char *)&self->r));
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_PARENT) +
			     af_delta(&self->af, AF_PIECE_CHILD) +
			     af_delta(&self->af, AF_PIECE_LIFTED));
	}
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	af_fill(&self->r, 0, self->r.pages, LATER | variant->sparse);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages,
			      LATER | variant->sparse));
	AF_EXIT_OK(&self->c);
}

/* Behind the session the daemon does its work: the test above could fail. */
TEST_F(khugepaged, works_after_session)
{
	AF_SPAWN(&self->c);
	af_fill(&self->r, 0, self->r.pages, LATER | variant->sparse);
	EXPECT_EQ(0, af_release(&self->af));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_EQ(0, af_call(&self->c, daemon_may));
	EXPECT_EQ(0, daemon_may(NULL));
	EXPECT_EQ(0, af_poll(is_huge, &self->r, 60));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages,
			      LATER | variant->sparse));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
}

/* The daemon takes and drops the lock while one fork follows the other. */
TEST_F(khugepaged, scans_against_forks)
{
	int i;

	/* No session, if the daemon is so quick that all pieces are huge. */
	self->af.spare = 12;
	EXPECT_EQ(0, af_release(&self->af));
	EXPECT_EQ(0, daemon_may(NULL));
	for (i = 0; i < 12; i++) {
		size_t page = af_piece(i % PIECES);
		uint64_t seed = LATER + i;

		ASSERT_EQ(0, af_spawn_other(&self->c));
		af_fill(&self->r, page, 1, seed);
		EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
		af_fill(&self->r, page, 1, self->r.seed);
		AF_EXIT_OK(&self->c);
		/* Base pages again, which the daemon can work on. */
		EXPECT_EQ(0, madvise(af_page(&self->r, page), AF_PIECE,
				     MADV_DONTNEED));
		af_fill(&self->r, page, AF_PIECE_PAGES, self->r.seed);
	}
	EXPECT_EQ(0, af_check_all(&self->r));
}

FIXTURE(collapse) {
	struct af af;
	struct af_region r;
	struct af_child c;
	char saved[64];
};

/* Stops the daemon, which would do what only a request may; those ignore it. */
FIXTURE_SETUP(collapse)
{
	ASSERT_EQ(0, af_read_file(THP "enabled", self->saved,
				  sizeof(self->saved)));
	ASSERT_EQ(0, af_write_file(THP "enabled", "never"));
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	ASSERT_EQ(0, madvise(self->r.base, self->r.pages * AF_PAGE,
			     MADV_HUGEPAGE));
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(collapse)
{
	char *chosen = strchr(self->saved, '[');

	if (chosen)
		EXPECT_EQ(0, af_write_file(THP "enabled", strtok(chosen, "[]")));
	AF_FINISH();
}

/*
 * After a write, without which nothing in the piece is writable and the kernel
 * sees no use in a huge page. Somebody else may hold a page for a moment.
 */
static long do_collapse(const struct af_job *job)
{
	int i, ret = -EAGAIN;

	af_fill_at(job->addr, job->first, 1, SEED);
	for (i = 0; i < 100 && ret == -EAGAIN; i++) {
		ret = madvise(job->addr, job->pages * AF_PAGE, MADV_COLLAPSE) ?
			-errno : 0;
		usleep(1000);
	}
	return ret;
}

#define ONE_PIECE (&(struct af_job){ .fn = do_collapse,			\
	.addr = af_page(&self->r, af_piece(1)), .first = af_piece(1),	\
	.pages = AF_PIECE_PAGES })

#define BOTH_ARE_RIGHT() do {						\
	EXPECT_EQ(0, af_check_all(&self->r));				\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	af_fill(&self->r, 0, self->r.pages, LATER);			\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));	\
	AF_EXIT_OK(&self->c);						\
} while (0)

TEST_F(collapse, by_parent)
{
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, do_collapse(ONE_PIECE));
	EXPECT_EQ(2048, huge_kb(&self->r));
	if (self->af.held)
		EXPECT_EQ(1, af_delta(&self->af, AF_PIECE_PARENT));
	BOTH_ARE_RIGHT();
}

TEST_F(collapse, by_child)
{
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_run(&self->c, ONE_PIECE));
	EXPECT_EQ(2048, af_call(&self->c, do_huge_kb,
				.addr = (char *)&self->r));
	if (self->af.held)
		EXPECT_EQ(1, af_delta(&self->af, AF_PIECE_CHILD));
	BOTH_ARE_RIGHT();
}

/* A third process makes the request for @pid. */
static long collapse_other(pid_t pid, char *addr)
{
	struct iovec iov = { addr, AF_PIECE };
	int fd = syscall(SYS_pidfd_open, pid, 0);
	long ret = -EAGAIN;
	int i;

	for (i = 0; i < 100 && ret == -EAGAIN; i++) {
		ret = syscall(SYS_process_madvise, fd, &iov, 1, MADV_COLLAPSE,
			      0) < 0 ? -errno : 0;
		usleep(1000);
	}
	close(fd);
	return ret;
}

static long do_collapse_other(const struct af_job *job)
{
	return collapse_other((pid_t)job->first, job->addr);
}

TEST_F(collapse, by_somebody_else)
{
	struct af_child other;

	self->af.spare = 1;
	AF_SPAWN(&self->c);
	/* Ends the session of the first child, and begins its own. */
	ASSERT_EQ(0, af_spawn_other(&other));
	af_fill(&self->r, af_piece(1), 1, SEED);
	EXPECT_EQ(0, af_child_fill(&other, &self->r, af_piece(0), 1, SEED));
	EXPECT_EQ(0, collapse_other(other.pid,
				    af_page(&self->r, af_piece(0))));
	EXPECT_EQ(0, af_call(&other, do_collapse_other, .first = getpid(),
			     .addr = af_page(&self->r, af_piece(1))));
	EXPECT_EQ(2048, huge_kb(&self->r));
	EXPECT_EQ(2048, af_call(&other, do_huge_kb, .addr = (char *)&self->r));
	if (self->af.held)
		EXPECT_EQ(1, af_delta(&self->af, AF_PIECE_CHILD));
	EXPECT_EQ(0, af_child_check_all(&other, &self->r));
	BOTH_ARE_RIGHT();
	EXPECT_EQ(0, af_child_check_all(&other, &self->r));
	AF_EXIT_OK(&other);
}

struct collapser {
	const struct af_region *r;
	volatile bool stop;
	volatile long done;
};

/* One piece after the other becomes a huge page, and base pages again. */
static void *collapse_loop(void *arg)
{
	struct collapser *w = arg;
	size_t i;

	for (i = 0; !w->stop; i = (i + 1) % PIECES) {
		char *p = af_page(w->r, af_piece(i));

		w->done += !madvise(p, AF_PIECE, MADV_COLLAPSE);
		/* A change of one page's rights splits the mapping. */
		mprotect(p + 7 * AF_PAGE, AF_PAGE, PROT_READ);
		mprotect(p + 7 * AF_PAGE, AF_PAGE, PROT_READ | PROT_WRITE);
	}
	return NULL;
}

static bool has_collapsed(void *collapser)
{
	return ((struct collapser *)collapser)->done > 0;
}

/*
 * MADV_COLLAPSE drops the lock between its first look and the collapse: a fork
 * that comes in between marks the table that is to be replaced.
 */
TEST_F(collapse, against_forks)
{
	struct collapser w = { .r = &self->r };
	pthread_t thread;
	int i;

	self->af.spare = 40;
	EXPECT_EQ(0, af_release(&self->af));
	ASSERT_EQ(0, pthread_create(&thread, NULL, collapse_loop, &w));
	ASSERT_EQ(0, af_poll(has_collapsed, &w, 60));
	for (i = 0; i < 40; i++) {
		size_t page = af_piece(i % PIECES) + 100;

		ASSERT_EQ(0, af_spawn_other(&self->c));
		af_fill(&self->r, page, 1, LATER);
		EXPECT_EQ(0, af_child_check(&self->c, &self->r,
					    af_piece(i % PIECES), 200, SEED));
		af_fill(&self->r, page, 1, SEED);
		AF_EXIT_OK(&self->c);
	}
	w.stop = true;
	pthread_join(thread, NULL);
	if (self->af.async)
		EXPECT_GT(af_delta(&self->af, AF_SESSION), 0);
	/* Advice may leave the region in several VMAs. */
	EXPECT_EQ(0, af_check_all(&self->r));
}

TEST_HARNESS_MAIN
