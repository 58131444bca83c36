// SPDX-License-Identifier: GPL-2.0
/*
 * MADV_FREE while the session is open, and then reclaim: what the one side
 * gives up, the other keeps. Pages that both sides map are not given up at all.
 *
 * Guards madvise_free_single_vma(), and faults that read.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/swap.h>
#include "harness.h"
#include "cgroup.h"

#define PIECES	3
#define SEED	0x191UL
#define LATER	0x192UL

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT	21
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
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

/*
 * A swap device that is done at once, such as zram: a page that only one process
 * maps comes back without the swap cache, clean, and its slot is given back.
 * MADV_FREE takes a clean page outside the swap cache without counting who maps
 * it. After a plain fork two map it, and it stays in the cache.
 */
FIXTURE(swapin) {
	struct af af;
	struct af_region r;
	struct af_child c, ballast, watcher;
};

#define DISK	"/dev/ram0"
#define GROUP	"swapin"

/* Prepares DISK and uses it before all others. */
static int swap_to_ram(void)
{
	static union {
		char bytes[AF_PAGE];
		struct {
			char boot[1024];
			uint32_t version, last_page;
		} info;
	} head;
	int fd = open(DISK, O_RDWR | O_CLOEXEC);
	off_t size = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
	int bad;

	if (fd < 0)
		return -errno;
	head.info.version = 1;
	head.info.last_page = size / AF_PAGE - 1;
	memcpy(head.bytes + AF_PAGE - 10, "SWAPSPACE2", 10);
	bad = pwrite(fd, &head, AF_PAGE, 0) != AF_PAGE || fsync(fd);
	close(fd);
	return bad ? -EIO : swapon(DISK, SWAP_FLAG_PREFER | SWAP_FLAG_PRIO_MASK) ?
		-errno : 0;
}

FIXTURE_SETUP(swapin)
{
	if (access(DISK, W_OK) || !af_have_swap())
		SKIP(return, "needs " DISK " and a swap device");
	CG_BEGIN();
	/* It stays outside, where no memory.high stops it. */
	ASSERT_EQ(0, af_spawn_other(&self->watcher));
	ASSERT_EQ(0, cg_make(GROUP));
	ASSERT_EQ(0, cg_join(GROUP, getpid()));
	/* A run that died has left it. */
	swapoff(DISK);
	ASSERT_EQ(0, swap_to_ram());
	ASSERT_EQ(0, af_spawn_other(&self->ballast));
	AF_REGION(&self->r, 1, AF_BASE, SEED);
	ASSERT_EQ(0, madvise(af_page(&self->r, AF_HEAD), AF_PIECE,
			     MADV_PAGEOUT));
	ASSERT_LE((long)(AF_PIECE / 1024) / 2,
		  af_smaps_kb(self->r.base, "Swap"));
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(swapin)
{
	AF_EXIT_OK(&self->c);
	AF_EXIT_OK(&self->ballast);
	AF_EXIT_OK(&self->watcher);
	EXPECT_EQ(0, swapoff(DISK));
	EXPECT_EQ(0, af_write_file(CG_ROOT "/cgroup.procs", "0"));
	EXPECT_EQ(0, cg_end());
	AF_FINISH();
}

static long do_just_free(const struct af_job *job)
{
	return madvise(job->addr, job->pages * AF_PAGE, MADV_FREE);
}

#define PIECE (&(struct af_job){ .fn = do_just_free, .first = AF_HEAD,	\
	.addr = af_page(&self->r, AF_HEAD), .pages = AF_PIECE_PAGES })

/* Has the kernel take what it can, which MADV_PAGEOUT leaves alone. */
static void reclaim_all(void)
{
	int i;

	for (i = 0; i < 20; i++)
		cg_write(GROUP, "memory.reclaim", "8M");
}

TEST_F(swapin, parent_reads_and_frees)
{
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, do_just_free(PIECE));
	reclaim_all();
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

TEST_F(swapin, parent_reads_child_frees)
{
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_run(&self->c, PIECE));
	reclaim_all();
	EXPECT_EQ(0, af_check_all(&self->r));
}

#define BALLAST	(64UL << 20)

/* What memory.high cannot push out. */
static long do_lock_ballast(const struct af_job *job)
{
	void *p = mmap(NULL, BALLAST, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)job;
	return p == MAP_FAILED || mlock(p, BALLAST);
}

struct collapser {
	char *addr;
	volatile pid_t tid;
	volatile bool go, done;
	pthread_t thread;
};

static void *collapse(void *arg)
{
	struct collapser *c = arg;

	c->tid = gettid();
	while (!c->go)
		sched_yield();
	/* Pages that a child shares cannot be collapsed: it may well fail. */
	madvise(c->addr, AF_PIECE, MADV_COLLAPSE);
	c->done = true;
	return NULL;
}

static bool is_stopped(void *tid)
{
	return cg_pays(*(pid_t *)tid);
}

static long do_set_high(const struct af_job *job)
{
	return cg_write(GROUP, "memory.high", job->addr);
}

/* Lifts the limit as soon as thread job->pages is stopped by it, or not at all. */
static long do_lift_high(const struct af_job *job)
{
	pid_t tid = job->pages;

	af_poll(is_stopped, &tid, 10);
	return cg_write(GROUP, "memory.high", "max");
}

/*
 * MADV_COLLAPSE swaps in, without a fault. Its charge for the huge page is above
 * memory.high: it sleeps in there for 2 s with no lock held, and fork() comes
 * between. Pages that it swapped in before fork() are lost by plain fork, too:
 * returns false if a busy host was too late. This process is in the group: while
 * the limit is low and the thread sleeps it allocates nothing.
 */
static bool collapse_around_fork(struct __test_metadata *_metadata,
				 FIXTURE_DATA(swapin) *self)
{
	struct collapser c = { .addr = af_page(&self->r, AF_HEAD) };
	long swapped = af_smaps_kb(self->r.base, "Swap");
	bool in_time;

	ASSERT_EQ(0, af_call(&self->ballast, do_lock_ballast));
	ASSERT_EQ(0, madvise(self->r.base, self->r.pages * AF_PAGE,
			     MADV_HUGEPAGE));
	ASSERT_EQ(0, pthread_create(&c.thread, NULL, collapse, &c));
	while (!c.tid)
		sched_yield();
	ASSERT_EQ(0, af_call(&self->watcher, do_set_high, .addr = "4M"));
	/* A page that can be written, else there is nothing to collapse. */
	af_fill(&self->r, AF_HEAD + 7, 1, SEED);
	ASSERT_EQ(0, af_post(&self->watcher, &(struct af_job){
		.fn = do_lift_high, .pages = c.tid }));
	c.go = true;
	EXPECT_EQ(0, af_wait(&self->watcher));
	AF_SPAWN(&self->c);
	/* All but the page above are out still: it has not begun. */
	in_time = cg_pays(c.tid) && !c.done &&
		  af_smaps_kb(self->r.base, "Swap") >= swapped - 4;
	pthread_join(c.thread, NULL);
	return in_time && (!self->af.held ||
			   af_delta(&self->af, AF_PIECE_PARENT) == 1);
}

#define TOO_LATE "fork() came too late, the host is busy"

TEST_F(swapin, parent_collapses_child_frees)
{
	if (!collapse_around_fork(_metadata, self))
		SKIP(return, TOO_LATE);
	EXPECT_EQ(0, af_run(&self->c, PIECE));
	reclaim_all();
	EXPECT_EQ(0, af_check_all(&self->r));
}

TEST_F(swapin, parent_collapses_and_frees)
{
	if (!collapse_around_fork(_metadata, self))
		SKIP(return, TOO_LATE);
	EXPECT_EQ(0, do_just_free(PIECE));
	reclaim_all();
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

TEST_HARNESS_MAIN
