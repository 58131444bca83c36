// SPDX-License-Identifier: GPL-2.0
/*
 * NUMA hinting takes rights from entries, on either side, while the session is
 * open. It needs no hook: such entries are copied like any other, and the scan
 * copies nothing in the parent. The fault that follows does, like every fault.
 */
#include <pthread.h>
#include <time.h>
#include <unistd.h>
#include "pair.h"

#define PIECES	4
#define SEED	0x161UL
#define LATER	0x162UL

#define SWITCH	"/proc/sys/kernel/numa_balancing"
#define SCAN	"/sys/kernel/debug/sched/numa_balancing/"

static const struct {
	const char *file, *value;
} settings[] = {
	{ SCAN "scan_delay_ms", "1" },
	{ SCAN "scan_period_min_ms", "1" },
	{ SCAN "scan_period_max_ms", "10" },
	{ SCAN "scan_size_mb", "64" },
	{ SWITCH, "1" },
};

#define SETTINGS (sizeof(settings) / sizeof(settings[0]))

FIXTURE(numa) {
	struct af af;
	struct pair pair;
	char saved[SETTINGS][32];
};

FIXTURE_VARIANT(numa) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(numa, base) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(numa, race) { .kind = AF_BASE, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(numa, pte_thp) { .kind = AF_PTE_THP, .hold = AF_HOLD };

FIXTURE_SETUP(numa)
{
	size_t i;

	if (!af_two_nodes())
		SKIP(return, "one memory node only (scripts/vm --numa)");
	if (access(SWITCH, W_OK) || access(SCAN "scan_size_mb", W_OK))
		SKIP(return, "no NUMA balancing");
	for (i = 0; i < SETTINGS; i++) {
		ASSERT_EQ(0, af_read_file(settings[i].file, self->saved[i], 32));
		ASSERT_EQ(0, af_write_file(settings[i].file,
					   settings[i].value));
	}
	PAIR_MAKE(&self->pair, PIECES, variant->kind, SEED);
	AF_SETUP(variant->hold);
	ASSERT_EQ(0, pair_fork(&self->pair, &self->af));
}

FIXTURE_TEARDOWN(numa)
{
	size_t i;

	for (i = SETTINGS; i-- > 0;)
		EXPECT_EQ(0, af_write_file(settings[i].file, self->saved[i]));
	AF_FINISH();
}

/* A number of /proc/vmstat, or -1. */
static long vmstat(const char *name)
{
	static char text[65536];
	char key[64], *at;

	snprintf(key, sizeof(key), "\n%s ", name);
	if (af_read_file("/proc/vmstat", text, sizeof(text)))
		return -1;
	at = strstr(text, key);
	return at ? atol(at + strlen(key)) : -1;
}

static long seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec;
}

static void *idle(void *unused)
{
	for (;;)
		pause();
	return unused;
}

/*
 * A second thread: without it the kernel leaves pages alone that lie where the
 * only thread runs.
 */
static long do_start_thread(const struct af_job *job)
{
	pthread_t thread;

	(void)job;
	return pthread_create(&thread, NULL, idle, NULL);
}

/*
 * Reads job->pages of the region until the kernel has taken the rights of
 * job->first entries, and some of them faulted. The scan goes with the time that
 * a task computes.
 */
static long do_read_until_hinted(const struct af_job *job)
{
	const struct af_region *r = (const struct af_region *)job->addr;
	long updates = vmstat("numa_pte_updates");
	long faults = vmstat("numa_hint_faults");
	long end = seconds() + 120;
	size_t i;

	while (seconds() < end) {
		for (i = 0; i < 20 * r->pages; i++)
			*(volatile uint64_t *)af_page(r, i % job->pages);
		if (vmstat("numa_pte_updates") - updates >=
		    (long)job->first &&
		    vmstat("numa_hint_faults") - faults >= 50)
			return 0;
	}
	return 1;
}

#define READS(who, n, hints) af_call(&self->pair.who,			\
	do_read_until_hinted, .addr = (char *)self->pair.r,		\
	.pages = (n), .first = (hints))

/*
 * The parent's entries. What both sides map is not hinted; what is not copied
 * yet is, everywhere. The reads of one piece fault, and copy no other.
 */
TEST_F(numa, of_parent)
{
	struct pair *pair = &self->pair;
	size_t pages = pair->r->pages;

	ASSERT_EQ(0, af_call(&pair->p, do_start_thread));
	if (!self->af.held)
		EXPECT_EQ(0, af_child_fill(&pair->p, pair->r, 0, pages, LATER));
	EXPECT_EQ(0, READS(p, af_piece(1), 2 * AF_PIECE_PAGES));
	if (self->af.held) {
		EXPECT_EQ(1, af_delta(&self->af, AF_PIECE_PARENT));
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_CHILD));
		EXPECT_EQ(0, af_child_check_all(&pair->p, pair->r));
	}
	EXPECT_EQ(0, af_child_check_all(&pair->c, pair->r));
	EXPECT_EQ(0, af_child_fill(&pair->p, pair->r, 0, pages, LATER + 1));
	EXPECT_EQ(0, af_child_check(&pair->p, pair->r, 0, pages, LATER + 1));
	EXPECT_EQ(0, af_child_check_all(&pair->c, pair->r));
	EXPECT_EQ(0, af_end(&pair->p));
	PAIR_CHILD_IS_RIGHT(pair, LATER);
}

/* The child's: half of it is written and then hinted, the rest comes later. */
TEST_F(numa, of_child)
{
	struct pair *pair = &self->pair;
	size_t half = af_piece(PIECES / 2), pages = pair->r->pages;

	ASSERT_EQ(0, af_call(&pair->c, do_start_thread));
	EXPECT_EQ(0, af_child_fill(&pair->c, pair->r, 0, half, LATER));
	EXPECT_EQ(0, READS(c, pages, AF_PIECE_PAGES));
	EXPECT_EQ(0, af_release(&self->af));
	EXPECT_EQ(0, af_child_check_all(&pair->p, pair->r));
	EXPECT_EQ(0, af_child_fill(&pair->p, pair->r, 0, pages, LATER + 1));
	EXPECT_EQ(0, af_child_check(&pair->c, pair->r, 0, half, LATER));
	EXPECT_EQ(0, af_child_check(&pair->c, pair->r, half, pages - half,
				    SEED));
	EXPECT_EQ(0, af_end(&pair->p));
	EXPECT_EQ(0, af_end(&pair->c));
}

TEST_HARNESS_MAIN
