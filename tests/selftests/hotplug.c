// SPDX-License-Identifier: GPL-2.0
/*
 * CPUs that go and come, workers that are sent elsewhere, and processes that
 * are moved between CPUs and memory nodes, while sessions are open.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include "cgroup.h"
#include "pair.h"

#define PIECES	4
#define SEED	0x1a1UL
#define LATER	0x1a2UL

#define CPU1	"/sys/devices/system/cpu/cpu1/online"
#define QUEUE	"/sys/devices/virtual/workqueue/async_fork/"

/* Something that a thread does over and over while forks run. */
struct changer {
	int (*change)(int round);	/* 0 or -errno */
	volatile bool stop;
	volatile int rounds;
	int failed;
	pthread_t thread;
};

static void *change_on(void *arg)
{
	struct changer *c = arg;

	for (; !c->stop; c->rounds++)
		if (c->change(c->rounds))
			c->failed++;
	return NULL;
}

static int changer_start(struct changer *c, int (*change)(int round))
{
	memset(c, 0, sizeof(*c));
	c->change = change;
	return pthread_create(&c->thread, NULL, change_on, c);
}

static int changer_end(struct changer *c)
{
	c->stop = true;
	pthread_join(c->thread, NULL);
	return c->failed;
}

/* One fork with a session, both sides right; the parent has @next afterwards. */
#define FORK_IS_RIGHT(next) do {					\
	const struct af_region *__r = &self->r;				\
	uint64_t __was = self->r.seed;					\
									\
	AF_SPAWN(&self->c);						\
	ASSERT_EQ(0, af_post(&self->c, &(struct af_job){		\
		.fn = af_do_check, .addr = __r->base,			\
		.pages = __r->pages, .seed = __was }));			\
	af_fill(__r, 0, __r->pages, (next));				\
	EXPECT_EQ(0, af_wait(&self->c));				\
	EXPECT_EQ(0, af_child_check(&self->c, __r, 0, __r->pages,	\
				    __was));				\
	EXPECT_EQ(0, af_check(__r, 0, __r->pages, (next)));		\
	AF_EXIT_OK(&self->c);						\
	self->r.seed = (next);						\
} while (0)

/* Forks until the changer has made so many rounds, and some times more. */
#define FORKS_AGAINST(changer, least) do {				\
	int __i;							\
									\
	for (__i = 0; __i < 4 || (changer)->rounds < (least); __i++)	\
		FORK_IS_RIGHT(LATER + __i);				\
	EXPECT_EQ(0, changer_end(changer));				\
	TH_LOG("%d forks, %d changes", __i, (changer)->rounds);		\
} while (0)

#define CHILD_ENDS() do {						\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	AF_EXIT_OK(&self->c);						\
} while (0)

static int set_cpu1(bool online)
{
	return af_write_file(CPU1, online ? "1" : "0");
}

static int toggle_cpu1(int round)
{
	return set_cpu1(round % 2);
}

static bool have_cpu1(void)
{
	return !access(CPU1, W_OK) && !set_cpu1(true);
}

FIXTURE(hotplug) {
	struct af af;
	struct af_region r;
	struct af_child c;
	bool held;		/* the workers were, to begin with */
};

FIXTURE_VARIANT(hotplug) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(hotplug, held) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(hotplug, mixed) { .kind = AF_MIXED, .hold = AF_RACE };

FIXTURE_SETUP(hotplug)
{
	if (!have_cpu1())
		SKIP(return, "no CPU that can go");
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	AF_SETUP(variant->hold);
	self->held = self->af.held;
}

FIXTURE_TEARDOWN(hotplug)
{
	EXPECT_EQ(0, set_cpu1(true));
	AF_FINISH();
}

/* With whatever was queued there. */
TEST_F(hotplug, cpu_goes_during_session)
{
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, set_cpu1(false));
	af_fill(&self->r, af_piece(0), 2 * AF_PIECE_PAGES, LATER);
	EXPECT_COPIED(PARENT, 2);
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PIECES - 2);
	EXPECT_EQ(0, af_check(&self->r, af_piece(0), 2 * AF_PIECE_PAGES,
			      LATER));
	CHILD_ENDS();
}

TEST_F(hotplug, cpu_comes_during_session)
{
	ASSERT_EQ(0, set_cpu1(false));
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, set_cpu1(true));
	af_fill(&self->r, af_piece(0), 2 * AF_PIECE_PAGES, LATER);
	EXPECT_COPIED(PARENT, 2);
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PIECES - 2);
	CHILD_ENDS();
}

static long do_pin_to(const struct af_job *job)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(job->first, &set);
	return sched_setaffinity(0, sizeof(set), &set) ? -errno : 0;
}

/* The child runs there and nowhere else, as far as it knows. */
TEST_F(hotplug, cpu_goes_under_the_child)
{
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, af_call(&self->c, do_pin_to, .first = 1));
	ASSERT_EQ(0, af_post(&self->c, &(struct af_job){ .fn = af_do_check,
		.addr = self->r.base, .pages = self->r.pages, .seed = SEED }));
	ASSERT_EQ(0, set_cpu1(false));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_wait(&self->c));
	WORKERS_FINISH();
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
	CHILD_ENDS();
}

/* A cancel queues its lifter on the CPU that it happens on. */
TEST_F(hotplug, cpu_goes_behind_a_cancel)
{
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, af_call(&self->c, do_pin_to, .first = 1));
	EXPECT_EQ(SIGKILL, af_kill(&self->c));
	ASSERT_EQ(0, set_cpu1(false));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_COPIED(LIFTED, PIECES);
	EXPECT_EQ(0, af_check_all(&self->r));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
}

TEST_F(hotplug, cpu_comes_and_goes_while_forks_run)
{
	struct changer changer;

	ASSERT_EQ(0, changer_start(&changer, toggle_cpu1));
	FORKS_AGAINST(&changer, 4);
}

/*
 * The copy queue's attributes below sysfs: they change while work is queued,
 * and while it runs.
 */
FIXTURE(queue) {
	struct af af;
	struct af_region r;
	struct af_child c;
	bool held;
	char cpumask[64], max_active[16];
};

FIXTURE_VARIANT(queue) {
	int hold;
};

FIXTURE_VARIANT_ADD(queue, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(queue, race) { .hold = AF_RACE };

FIXTURE_SETUP(queue)
{
	if (af_plain_mode() || !getenv("ASYNC_FORK_KO"))
		SKIP(return, "no module is loaded");
	ASSERT_EQ(0, af_read_file(QUEUE "cpumask", self->cpumask,
				  sizeof(self->cpumask)));
	ASSERT_EQ(0, af_read_file(QUEUE "max_active", self->max_active,
				  sizeof(self->max_active)));
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	AF_SETUP(variant->hold);
	self->held = self->af.held;
}

FIXTURE_TEARDOWN(queue)
{
	EXPECT_EQ(0, af_write_file(QUEUE "cpumask", self->cpumask));
	EXPECT_EQ(0, af_write_file(QUEUE "max_active", self->max_active));
	AF_FINISH();
}

TEST_F(queue, changes_during_session)
{
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, af_write_file(QUEUE "cpumask", "1"));
	ASSERT_EQ(0, af_write_file(QUEUE "max_active", "1"));
	af_fill(&self->r, af_piece(0), 2 * AF_PIECE_PAGES, LATER);
	ASSERT_EQ(0, af_write_file(QUEUE "cpumask", "2"));
	EXPECT_COPIED(PARENT, 2);
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PIECES - 2);
	CHILD_ENDS();
}

static int change_queue(int round)
{
	static const char * const masks[] = { "1", "2", "3" };
	static const char * const active[] = { "1", "8", "3", "2" };

	return af_write_file(QUEUE "cpumask", masks[round % 3]) ||
	       af_write_file(QUEUE "max_active", active[round % 4]);
}

TEST_F(queue, changes_while_forks_run)
{
	struct changer changer;

	ASSERT_EQ(0, changer_start(&changer, change_queue));
	FORKS_AGAINST(&changer, 6);
}

/* Where no CPU is left the kernel takes another. */
TEST_F(queue, its_only_cpu_goes)
{
	if (!have_cpu1())
		SKIP(return, "no CPU that can go");
	ASSERT_EQ(0, af_write_file(QUEUE "cpumask", "2"));
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, set_cpu1(false));
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PIECES);
	CHILD_ENDS();
	/* A session that never knew the CPU. */
	FORK_IS_RIGHT(LATER);
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_EQ(0, set_cpu1(true));
}

/* Several sessions with several workers each, and one that may run at a time. */
#define PAIRS	3

FIXTURE(narrow) {
	struct af af;
	struct pair pair[PAIRS];
	bool held;
	char max_active[16];
};

FIXTURE_VARIANT(narrow) {
	int hold;
};

FIXTURE_VARIANT_ADD(narrow, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(narrow, race) { .hold = AF_RACE };

FIXTURE_SETUP(narrow)
{
	int i;

	if (af_plain_mode() || !getenv("ASYNC_FORK_KO"))
		SKIP(return, "no module is loaded");
	CG_BEGIN();
	ASSERT_EQ(0, cg_make("many"));
	ASSERT_EQ(0, cg_write("many", "memory.async_fork", "8"));
	for (i = 0; i < PAIRS; i++) {
		PAIR_MAKE(&self->pair[i], PIECES, AF_BASE, SEED);
		ASSERT_EQ(0, cg_join("many", self->pair[i].p.pid));
	}
	ASSERT_EQ(0, af_read_file(QUEUE "max_active", self->max_active,
				  sizeof(self->max_active)));
	ASSERT_EQ(0, af_write_file(QUEUE "max_active", "1"));
	AF_SETUP(variant->hold);
	self->held = self->af.held;
}

FIXTURE_TEARDOWN(narrow)
{
	EXPECT_EQ(0, af_write_file(QUEUE "max_active", self->max_active));
	AF_FINISH();
	EXPECT_EQ(0, cg_end());
}

TEST_F(narrow, every_session_ends)
{
	int i;

	for (i = 0; i < PAIRS; i++)
		ASSERT_EQ(0, pair_fork(&self->pair[i], &self->af));
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PAIRS * PIECES);
	for (i = 0; i < PAIRS; i++) {
		struct pair *pair = &self->pair[i];

		EXPECT_EQ(0, af_child_check_all(&pair->c, pair->r));
		EXPECT_EQ(0, pair_end_child(pair));
		PAIR_PARENT_IS_RIGHT(pair, LATER);
	}
}

/* Both sides are moved between CPUs, and their memory between nodes. */
FIXTURE(cpuset) {
	struct af af;
	struct pair pair;
	bool held;
};

FIXTURE_VARIANT(cpuset) {
	int hold;
};

FIXTURE_VARIANT_ADD(cpuset, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(cpuset, race) { .hold = AF_RACE };

FIXTURE_SETUP(cpuset)
{
	CG_BEGIN();
	ASSERT_EQ(0, cg_make("a"));
	ASSERT_EQ(0, cg_make("b"));
	if (!cg_has("a", "cpuset.cpus") || access(CPU1, F_OK))
		SKIP(return, "no cpuset controller, or one CPU only");
	ASSERT_EQ(0, cg_write("a", "cpuset.cpus", "0"));
	ASSERT_EQ(0, cg_write("b", "cpuset.cpus", "1"));
	PAIR_MAKE(&self->pair, PIECES, AF_BASE, SEED);
	AF_SETUP(variant->hold);
	self->held = self->af.held;
	ASSERT_EQ(0, pair_fork(&self->pair, &self->af));
}

FIXTURE_TEARDOWN(cpuset)
{
	AF_FINISH();
	EXPECT_EQ(0, cg_end());
}

#define BOTH_STOP_AND_ARE_RIGHT(pair) do {				\
	EXPECT_EQ(0, pair_rest(pair));					\
	EXPECT_EQ(0, af_child_check_all(&(pair)->c, (pair)->r));	\
	EXPECT_EQ(0, af_child_check(&(pair)->p, (pair)->r, 0,		\
				    (pair)->r->pages, LATER));		\
	EXPECT_EQ(0, pair_end_child(pair));				\
	EXPECT_EQ(0, af_end(&(pair)->p));				\
} while (0)

/* Apart, together, and against each other. */
TEST_F(cpuset, both_change_cpus)
{
	struct pair *pair = &self->pair;
	int i;

	ASSERT_EQ(0, pair_work(pair, LATER));
	for (i = 0; i < 24; i++) {
		EXPECT_EQ(0, cg_join(i & 1 ? "a" : "b", pair->c.pid));
		EXPECT_EQ(0, cg_join(i & 2 ? "a" : "b", pair->p.pid));
		if (i == 12)
			EXPECT_EQ(0, af_release(&self->af));
	}
	BOTH_STOP_AND_ARE_RIGHT(pair);
}

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

/*
 * New memory nodes of a cpuset migrate what its processes have: first P's, of
 * which C has nothing yet, then C's, then P's again, at work.
 */
TEST_F(cpuset, memory_changes_nodes)
{
	struct pair *pair = &self->pair;
	static const char * const nodes[] = { "0", "1" };
	long before = vmstat("pgmigrate_success");
	int i;

	if (!af_two_nodes())
		SKIP(goto out, "one memory node only (scripts/vm --numa)");
	ASSERT_EQ(0, cg_join("a", pair->p.pid));
	ASSERT_EQ(0, cg_join("b", pair->c.pid));
	for (i = 0; i < 2; i++)
		EXPECT_EQ(0, cg_write("a", "cpuset.mems", nodes[i]));
	EXPECT_EQ(0, af_child_check(&pair->c, pair->r, 0, af_piece(2), SEED));
	EXPECT_COPIED(CHILD, 2);
	for (i = 0; i < 2; i++)
		EXPECT_EQ(0, cg_write("b", "cpuset.mems", nodes[i]));
	ASSERT_EQ(0, pair_work(pair, LATER));
	for (i = 0; i < 8; i++) {
		EXPECT_EQ(0, cg_write(i & 2 ? "a" : "b", "cpuset.mems",
				      nodes[i & 1]));
		if (i == 4)
			EXPECT_EQ(0, af_release(&self->af));
	}
	EXPECT_GT(vmstat("pgmigrate_success"), before);
	BOTH_STOP_AND_ARE_RIGHT(pair);
	return;
out:
	af_kill(&pair->p);
	af_kill(&pair->c);
}

/* The only CPU of C's cpuset goes while C works there. */
TEST_F(cpuset, its_only_cpu_goes)
{
	struct pair *pair = &self->pair;

	if (!have_cpu1())
		SKIP(goto out, "no CPU that can go");
	ASSERT_EQ(0, cg_join("b", pair->c.pid));
	ASSERT_EQ(0, pair_work(pair, LATER));
	EXPECT_EQ(0, set_cpu1(false));
	EXPECT_EQ(0, af_release(&self->af));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_EQ(0, set_cpu1(true));
	BOTH_STOP_AND_ARE_RIGHT(pair);
	return;
out:
	af_kill(&pair->p);
	af_kill(&pair->c);
}

TEST_HARNESS_MAIN
