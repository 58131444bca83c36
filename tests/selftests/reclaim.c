// SPDX-License-Identifier: GPL-2.0
/*
 * What the kernel does to memory on its own account while the session is open:
 * swap, migration, compaction, KSM, THP split and collapse, soft-dirty bits.
 * None of it changes content, on either side.
 *
 * Guards collapse_huge_page(), madvise_collapse(), ksm_enable_merge_any(),
 * clear_refs_write(), add_folio_for_migration(); and that reclaim and
 * migration need no hook.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <time.h>
#include "harness.h"
#include "mover.h"

#define PIECES	3
#define SEED	0xe1UL
#define LATER	0xe2UL

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif
#ifndef MADV_COLD
#define MADV_COLD	20
#define MADV_PAGEOUT	21
#endif

FIXTURE(reclaim) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_VARIANT(reclaim) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(reclaim, base) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(reclaim, race) { .kind = AF_BASE, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(reclaim, pte_thp) { .kind = AF_PTE_THP, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(reclaim, pte_thp_race) {
	.kind = AF_PTE_THP, .hold = AF_RACE };

FIXTURE_SETUP(reclaim)
{
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	AF_SETUP(variant->hold);
}

FIXTURE_TEARDOWN(reclaim)
{
	AF_FINISH();
}

#define LEN (self->r.pages * AF_PAGE)

/* Both views, then the parent writes, then both views again. */
#define CHECK_BOTH() do {						\
	EXPECT_EQ(0, af_check_all(&self->r));				\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	af_fill(&self->r, 0, self->r.pages, LATER);			\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));	\
	AF_EXIT_OK(&self->c);						\
} while (0)

/* madvise() with the advice in job->first. */
static long do_advise(const struct af_job *job)
{
	return madvise(job->addr, job->pages * AF_PAGE, (int)job->first) ?
		-errno : 0;
}

#define CHILD_ADVISES(advice) af_call(&self->c, do_advise,		\
	.addr = self->r.base, .pages = self->r.pages, .first = (advice))

/* A swap entry in place of a page that is not copied yet. */
TEST_F(reclaim, pageout_by_parent)
{
	if (!af_have_swap())
		SKIP(return, "no swap device (scripts/vm --swap)");
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, madvise(self->r.base, LEN, MADV_PAGEOUT));
	CHECK_BOTH();
}

TEST_F(reclaim, pageout_by_child)
{
	if (!af_have_swap())
		SKIP(return, "no swap device (scripts/vm --swap)");
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, af_piece(2), SEED));
	EXPECT_EQ(0, CHILD_ADVISES(MADV_PAGEOUT));
	CHECK_BOTH();
}

TEST_F(reclaim, cold_by_parent)
{
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, madvise(self->r.base, LEN, MADV_COLD));
	CHECK_BOTH();
}

/* swapoff: the parent's swap entries become pages behind everybody's back. */
TEST_F(reclaim, swapoff_during_session)
{
	const char *device = af_swap_device();

	if (!device)
		SKIP(return, "no swap device (scripts/vm --swap)");
	ASSERT_EQ(0, madvise(self->r.base, LEN, MADV_PAGEOUT));
	AF_SPAWN(&self->c);
	af_fill(&self->r, af_piece(1), 1, SEED);
	EXPECT_EQ(0, swapoff(device));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	ASSERT_EQ(0, swapon(device, 0));
	CHECK_BOTH();
}

/*
 * migrate_pages(2) to and fro, of the parent and of the child, while the
 * session is copied: no migration entry may be left behind.
 */
TEST_F(reclaim, migrate_pages)
{
	int i;

	if (!af_two_nodes())
		SKIP(return, "one memory node only (scripts/vm --numa)");
	AF_SPAWN(&self->c);
	EXPECT_GE(mover_move(0, 0, 1), 0);
	EXPECT_EQ(0, af_release(&self->af));
	for (i = 0; i < 6; i++) {
		EXPECT_GE(mover_move(0, i % 2 ? 0 : 1, i % 2), 0);
		EXPECT_GE(mover_move(self->c.pid, i % 2 ? 0 : 1, i % 2), 0);
	}
	CHECK_BOTH();
}

/*
 * The same with a heap that grew in between: the parent's VMA then stands
 * behind the child's in the anon_vma tree (DESIGN.md section 9, item 2).
 */
TEST_F(reclaim, migrate_pages_after_growth)
{
	char *end = self->r.base + LEN;
	int i;

	if (!af_two_nodes())
		SKIP(return, "one memory node only (scripts/vm --numa)");
	ASSERT_EQ(0, munmap(end, AF_PIECE));
	AF_SPAWN(&self->c);
	ASSERT_EQ(self->r.base, mremap(self->r.base, LEN, LEN + AF_PIECE, 0));
	EXPECT_EQ(0, af_release(&self->af));
	for (i = 0; i < 8; i++)
		EXPECT_GE(mover_move(0, i % 2, i % 2 ? 0 : 1), 0);
	CHECK_BOTH();
}

/* mbind() with MPOL_MF_MOVE. */
static long do_mbind(const struct af_job *job)
{
	unsigned long nodes = 1UL << job->first;

	return syscall(SYS_mbind, job->addr, job->pages * AF_PAGE, 2, &nodes,
		       8 * sizeof(nodes), 2);
}

TEST_F(reclaim, mbind_moves)
{
	struct af_job job = { .fn = do_mbind, .addr = self->r.base,
			      .pages = self->r.pages, .first = 1 };

	if (!af_two_nodes())
		SKIP(return, "one memory node only (scripts/vm --numa)");
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, do_mbind(&job));
	EXPECT_EQ(0, af_run(&self->c, &job));
	job.first = 0;
	EXPECT_EQ(0, do_mbind(&job));
	CHECK_BOTH();
}

/* move_pages(2) as a question: how many of the pages are on no node? */
static long do_ask_nodes(const struct af_job *job)
{
	static void *page[4096];
	static int status[4096];
	long missing = 0;
	size_t i;

	for (i = 0; i < job->pages; i++)
		page[i] = job->addr + i * AF_PAGE;
	if (syscall(SYS_move_pages, 0, job->pages, page, NULL, status, 0))
		return -errno;
	for (i = 0; i < job->pages; i++)
		missing += status[i] < 0;
	return missing;
}

TEST_F(reclaim, move_pages_in_child)
{
	long missing;

	AF_SPAWN(&self->c);
	missing = af_call(&self->c, do_ask_nodes, .addr = self->r.base,
			  .pages = self->r.pages);
	if (missing == -ENOSYS)
		SKIP(goto out, "no move_pages(2)");
	EXPECT_EQ(0, missing);
out:
	CHECK_BOTH();
}

TEST_F(reclaim, compaction)
{
	if (access("/proc/sys/vm/compact_memory", W_OK))
		SKIP(return, "no compaction");
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_write_file("/proc/sys/vm/compact_memory", "1"));
	EXPECT_EQ(0, af_release(&self->af));
	EXPECT_EQ(0, af_write_file("/proc/sys/vm/compact_memory", "1"));
	CHECK_BOTH();
}

/* Makes huge pages of the pieces; only whole ones can be. */
static long do_collapse(const struct af_job *job)
{
	char *p = job->addr;

	if (madvise(p, job->pages * AF_PAGE, MADV_HUGEPAGE))
		return -errno;
	return madvise(p, job->pages * AF_PAGE, MADV_COLLAPSE) ? -errno : 0;
}

#define PIECE_JOB(function) (&(struct af_job){ .fn = (function),	\
	.addr = af_page(&self->r, af_piece(1)), .pages = 2 * AF_PIECE_PAGES })

TEST_F(reclaim, collapse_by_parent)
{
	long ret;

	AF_SPAWN(&self->c);
	ret = do_collapse(PIECE_JOB(NULL));
	EXPECT_TRUE(ret == 0 || ret == -EAGAIN || ret == -EBUSY ||
		    ret == -EINVAL) TH_LOG("MADV_COLLAPSE: %ld", ret);
	CHECK_BOTH();
}

/* A child's piece that is not there yet must not collapse into zeroes. */
TEST_F(reclaim, collapse_by_child)
{
	long ret;

	AF_SPAWN(&self->c);
	ret = af_run(&self->c, PIECE_JOB(do_collapse));
	EXPECT_TRUE(ret == 0 || ret == -EAGAIN || ret == -EBUSY ||
		    ret == -EINVAL) TH_LOG("MADV_COLLAPSE: %ld", ret);
	CHECK_BOTH();
}

/* Collapse by the parent against the workers. */
TEST_F(reclaim, collapse_against_workers)
{
	AF_SPAWN(&self->c);
	af_post(&self->c, PIECE_JOB(do_collapse));
	EXPECT_EQ(0, af_release(&self->af));
	do_collapse(PIECE_JOB(NULL));
	EXPECT_NE(AF_GONE, af_wait(&self->c));
	CHECK_BOTH();
}

/* A THP that splits under the session, by order of debugfs. */
TEST_F(reclaim, thp_split)
{
	static const char file[] = "/sys/kernel/debug/split_huge_pages";
	char order[128];

	if (variant->kind != AF_PTE_THP || access(file, W_OK))
		SKIP(return, "needs huge pages and debugfs' split_huge_pages");
	AF_SPAWN(&self->c);
	snprintf(order, sizeof(order), "%d,%p,%p", getpid(), self->r.base,
		 self->r.base + LEN);
	af_write_file(file, order);
	EXPECT_EQ(0, af_release(&self->af));
	snprintf(order, sizeof(order), "%d,%p,%p", self->c.pid, self->r.base,
		 self->r.base + LEN);
	af_write_file(file, order);
	CHECK_BOTH();
}

/* Pages of a MADV_FREE'd range hold their pattern or zeroes. */
static long do_check_free(const struct af_job *job)
{
	return af_check_lazy(job->addr, job->first, job->pages, SEED);
}

/*
 * DESIGN.md section 9, item 16: lazily freed folios that reclaim and migration
 * pull at while they are copied. The kernel checks its counters at exit.
 */
TEST_F(reclaim, lazyfree_before_fork)
{
	struct af_job job = { .fn = do_check_free, .first = af_piece(0),
			      .addr = af_page(&self->r, af_piece(0)),
			      .pages = 3 * AF_PIECE_PAGES };
	int i;

	ASSERT_EQ(0, madvise(job.addr, job.pages * AF_PAGE, MADV_FREE));
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_release(&self->af));
	for (i = 0; af_two_nodes() && i < 4; i++)
		mover_move(0, i % 2, i % 2 ? 0 : 1);
	if (af_have_swap())
		madvise(job.addr, AF_PIECE, MADV_PAGEOUT);
	EXPECT_EQ(0, do_check_free(&job));
	EXPECT_EQ(0, af_run(&self->c, &job));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, AF_HEAD, SEED));
	AF_EXIT_OK(&self->c);
}

#define ROOT	"/sys/fs/cgroup"
#define GROUP	ROOT "/af-reclaim"

/* Moves pages to and fro and reclaims them, until told to stop. */
static void *pull_at_pages(void *stop)
{
	int i;

	for (i = 0; !*(volatile bool *)stop; i++) {
		mover_move(0, i % 2, i % 2 ? 0 : 1);
		af_write_file(GROUP "/memory.reclaim", "1M");
	}
	return NULL;
}

/*
 * The same, all at once, through several sessions: copies that meet a page in
 * migration stop in the middle of a large folio, and are run again.
 */
TEST_F(reclaim, lazyfree_pulled_at)
{
	struct af_job job = { .fn = do_check_free, .first = af_piece(0),
			      .addr = af_page(&self->r, af_piece(0)),
			      .pages = 2 * AF_PIECE_PAGES };
	size_t tail = af_piece(2);
	const bool can_hold = self->af.held;
	time_t until = time(NULL) + 60;
	volatile bool stop = false;
	pthread_t thread;
	int round;

	af_write_file(ROOT "/cgroup.subtree_control", "+memory");
	/* A run that died has left it. */
	rmdir(GROUP);
	if (!af_two_nodes() || mkdir(GROUP, 0755))
		SKIP(return, "needs two nodes (scripts/vm --numa) and cgroup v2");
	EXPECT_EQ(0, af_write_file(GROUP "/cgroup.procs", "0"));
	ASSERT_EQ(0, pthread_create(&thread, NULL, pull_at_pages,
				    (void *)&stop));
	/*
	 * Who holds the workers meets a migration, else this proved nothing.
	 * Workers that are not held may be done each time before one begins.
	 */
	for (round = 0; round < 5 || (time(NULL) < until && can_hold &&
			!af_delta(&self->af, AF_WAIT_MIGRATION)); round++) {
		af_fill(&self->r, af_piece(0), job.pages, SEED);
		EXPECT_EQ(0, madvise(job.addr, job.pages * AF_PAGE, MADV_FREE));
		AF_SPAWN(&self->c);
		/* Odd rounds are held, and so is the fork of the next one. */
		if (can_hold)
			EXPECT_EQ(0, round % 2 ? af_hold(&self->af) :
						 af_release(&self->af));
		EXPECT_EQ(0, do_check_free(&job));
		EXPECT_EQ(0, af_run(&self->c, &job));
		af_fill(&self->r, tail, 200, LATER + round);
		EXPECT_EQ(0, af_child_check(&self->c, &self->r, tail + 200,
					    self->r.pages - tail - 200, SEED));
		EXPECT_EQ(0, af_child_check(&self->c, &self->r, tail, 200,
					    round ? LATER + round - 1 : SEED));
		AF_EXIT_OK(&self->c);
	}
	stop = true;
	pthread_join(thread, NULL);
	if (can_hold)
		EXPECT_GT(af_delta(&self->af, AF_WAIT_MIGRATION), 0);
	EXPECT_EQ(0, af_write_file(ROOT "/cgroup.procs", "0"));
	EXPECT_EQ(0, rmdir(GROUP));
}

#define KSM "/sys/kernel/mm/ksm/"

static long ksm_number(const char *file)
{
	char path[64], text[32];

	snprintf(path, sizeof(path), KSM "%s", file);
	return af_read_file(path, text, sizeof(text)) ? -1 : atol(text);
}

/* Two full scans: a page is merged in the second one at the earliest. */
static bool ksm_has_scanned(void *from)
{
	return ksm_number("full_scans") >= *(long *)from + 3;
}

static int ksm_scan(void)
{
	long from = ksm_number("full_scans");

	af_write_file(KSM "pages_to_scan", "4000");
	af_write_file(KSM "sleep_millisecs", "0");
	if (af_write_file(KSM "run", "1"))
		return -1;
	return af_poll(ksm_has_scanned, &from, 60);
}

/* Pages of equal content, so that KSM has something to merge. */
static void fill_equal(struct af_region *r)
{
	size_t i;

	for (i = 0; i < r->pages; i++)
		af_fill_at(af_page(r, i), i % 4, 1, SEED);
}

static long check_equal(const struct af_region *r)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < r->pages; i++)
		wrong += af_check_at(af_page(r, i), i % 4, 1, SEED);
	return wrong;
}

static long do_check_equal(const struct af_job *job)
{
	return check_equal((const struct af_region *)job->addr);
}

#define KSM_BOTH() do {							\
	EXPECT_EQ(0, ksm_scan());					\
	EXPECT_EQ(0, check_equal(&self->r));				\
	EXPECT_EQ(0, af_call(&self->c, do_check_equal,			\
			     .addr = (char *)&self->r));		\
	af_fill(&self->r, 0, self->r.pages, LATER);			\
	EXPECT_EQ(0, af_call(&self->c, do_check_equal,			\
			     .addr = (char *)&self->r));		\
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));	\
	AF_EXIT_OK(&self->c);						\
	af_write_file(KSM "run", "0");					\
} while (0)

TEST_F(reclaim, ksm_merges_during_session)
{
	if (access(KSM "run", W_OK))
		SKIP(return, "no KSM");
	fill_equal(&self->r);
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, madvise(self->r.base, LEN, MADV_MERGEABLE));
	KSM_BOTH();
}

TEST_F(reclaim, ksm_merged_before_fork)
{
	if (access(KSM "run", W_OK))
		SKIP(return, "no KSM");
	fill_equal(&self->r);
	ASSERT_EQ(0, madvise(self->r.base, LEN, MADV_MERGEABLE));
	ASSERT_EQ(0, ksm_scan());
	/* No session: a VMA that KSM merges is copied at fork. */
	ASSERT_EQ(0, af_spawn_other(&self->c));
	EXPECT_EQ(0, CHILD_ADVISES(MADV_UNMERGEABLE));
	KSM_BOTH();
}

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif

TEST_F(reclaim, memory_merge_by_prctl)
{
	if (access(KSM "run", W_OK))
		SKIP(return, "no KSM");
	fill_equal(&self->r);
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0));
	KSM_BOTH();
}

/* Pages of the region whose soft-dirty bit pagemap does not show. */
static long clean_pages(const struct af_region *r)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t entry;
	long clean = 0;
	size_t i;

	for (i = 0; i < r->pages; i++) {
		if (pread(fd, &entry, 8, (uintptr_t)af_page(r, i) / AF_PAGE *
			  8) != 8)
			return -1;
		clean += !(entry >> 55 & 1);
	}
	close(fd);
	return clean;
}

static long do_clean_pages(const struct af_job *job)
{
	return clean_pages((const struct af_region *)job->addr);
}

/*
 * The child has the soft-dirty bits of the instant of fork, though the parent
 * clears its own right afterwards.
 */
TEST_F(reclaim, soft_dirty)
{
	long clean;

	if (af_write_file("/proc/self/clear_refs", "4") ||
	    clean_pages(&self->r) != (long)self->r.pages)
		SKIP(return, "no soft-dirty bits");
	af_fill(&self->r, 0, self->r.pages, SEED);
	clean = clean_pages(&self->r);
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, af_write_file("/proc/self/clear_refs", "4"));
	EXPECT_EQ(clean, af_call(&self->c, do_clean_pages,
				 .addr = (char *)&self->r));
	EXPECT_EQ((long)self->r.pages, clean_pages(&self->r));
	CHECK_BOTH();
}

TEST_HARNESS_MAIN
