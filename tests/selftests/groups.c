// SPDX-License-Identifier: GPL-2.0
/*
 * What cgroups do to a parent P and its child C while their session is open:
 * they freeze, kill, throttle and move either side, and go themselves. The
 * workers are in none of these groups, so a session ends whatever its sides are
 * kept from; and what a group paid for it gets back.
 *
 * isolation.c has the parent beside a child that is kept from running; here it
 * is the parent that is kept, or both, or the copy is the workers'.
 */
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include "cgroup.h"
#include "module.h"
#include "pair.h"

#define PIECES	6
#define SEED	0x191UL
#define LATER	0x192UL

/* The groups of P and of C. */
#define P	"p"
#define C	"c"

static long do_spin(const struct af_job *job)
{
	while (!*(volatile int *)job->addr)
		;
	return 0;
}

#define SPIN ((struct af_job){ .fn = do_spin, .addr = (char *)pair->stop })

/* One more fork of P; its child has what P has now. */
static long do_fork_and_check(const struct af_job *job)
{
	int status = -1;
	pid_t pid = fork();

	if (!pid)
		_exit(!!af_do_check(job));
	return waitpid(pid, &status, 0) == pid ? status : -1;
}

/* C has the snapshot and P what it wrote last, and each its own; both end. */
#define BOTH_ARE_RIGHT(pair, p_seed) do {				\
	const struct af_region *__r = (pair)->r;			\
	size_t __n = __r->pages;					\
									\
	EXPECT_EQ(0, af_child_check_all(&(pair)->c, __r));		\
	EXPECT_EQ(0, af_child_check(&(pair)->p, __r, 0, __n, (p_seed)));\
	EXPECT_EQ(0, af_child_fill(&(pair)->c, __r, 0, __n, LATER + 7));\
	EXPECT_EQ(0, af_child_check(&(pair)->p, __r, 0, __n, (p_seed)));\
	EXPECT_EQ(0, af_child_fill(&(pair)->p, __r, 0, __n, LATER + 8));\
	EXPECT_EQ(0, af_child_check(&(pair)->c, __r, 0, __n, LATER + 7));\
	EXPECT_EQ(0, pair_end_child(pair));				\
	EXPECT_EQ(0, af_end(&(pair)->p));				\
} while (0)

#define IS_FROZEN(group) cg_number((group), "cgroup.events", "frozen")

FIXTURE(groups) {
	struct af af;
	struct pair pair;
	bool held;		/* the workers were, to begin with */
};

FIXTURE_VARIANT(groups) {
	int hold;
};

FIXTURE_VARIANT_ADD(groups, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(groups, race) { .hold = AF_RACE };

FIXTURE_SETUP(groups)
{
	CG_BEGIN();
	ASSERT_EQ(0, cg_make(P));
	ASSERT_EQ(0, cg_make(C));
	PAIR_MAKE(&self->pair, PIECES, AF_BASE, SEED);
	ASSERT_EQ(0, cg_join(P, self->pair.p.pid));
	AF_SETUP(variant->hold);
	self->held = self->af.held;
	ASSERT_EQ(0, pair_fork(&self->pair, &self->af));
	ASSERT_EQ(0, cg_join(C, self->pair.c.pid));
}

FIXTURE_TEARDOWN(groups)
{
	AF_FINISH();
	EXPECT_EQ(0, cg_end());
}

TEST_F(groups, parent_is_frozen)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, cg_freeze(P));
	EXPECT_EQ(0, af_child_check(&pair->c, pair->r, 0, af_piece(2), SEED));
	EXPECT_COPIED(CHILD, 2);
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PIECES - 2);
	EXPECT_EQ(0, af_child_check_all(&pair->c, pair->r));
	EXPECT_EQ(1, IS_FROZEN(P));
	ASSERT_EQ(0, cg_thaw(P));
	BOTH_ARE_RIGHT(pair, SEED);
}

/* All of it by the child's own faults. */
TEST_F(groups, parent_is_frozen_and_child_ends)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, cg_freeze(P));
	EXPECT_EQ(0, af_child_check_all(&pair->c, pair->r));
	EXPECT_EQ(0, af_child_fill(&pair->c, pair->r, 0, pair->r->pages, LATER));
	EXPECT_EQ(0, af_child_check(&pair->c, pair->r, 0, pair->r->pages,
				    LATER));
	EXPECT_COPIED(CHILD, PIECES);
	af_post(&pair->c, &(struct af_job){ .fn = NULL });
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_EQ(1, IS_FROZEN(P));
	ASSERT_EQ(0, cg_thaw(P));
	EXPECT_EQ(0, pair_reap_child(pair));
	PAIR_PARENT_IS_RIGHT(pair, LATER);
}

TEST_F(groups, child_is_frozen_and_workers_finish)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, cg_freeze(C));
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PIECES);
	EXPECT_EQ(1, IS_FROZEN(C));
	ASSERT_EQ(0, cg_thaw(C));
	BOTH_ARE_RIGHT(pair, SEED);
}

TEST_F(groups, child_is_frozen_and_parent_ends)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, cg_freeze(C));
	EXPECT_EQ(0, af_child_fill(&pair->p, pair->r, 0, af_piece(2), LATER));
	EXPECT_COPIED(PARENT, 2);
	EXPECT_EQ(0, af_child_check(&pair->p, pair->r, 0, af_piece(2), LATER));
	EXPECT_EQ(0, af_end(&pair->p));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_COPIED(PARENT, PIECES);
	EXPECT_EQ(1, IS_FROZEN(C));
	ASSERT_EQ(0, cg_thaw(C));
	PAIR_CHILD_IS_RIGHT(pair, LATER);
}

/* A second fork completes the first, whose child cannot help. */
TEST_F(groups, child_is_frozen_and_parent_forks)
{
	struct pair *pair = &self->pair;
	const struct af_region *r = pair->r;

	ASSERT_EQ(0, cg_freeze(C));
	EXPECT_EQ(0, af_child_fill(&pair->p, r, 0, r->pages, LATER));
	EXPECT_EQ(0, af_call(&pair->p, do_fork_and_check, .addr = r->base,
			     .pages = r->pages, .seed = LATER));
	self->af.want++;
	EXPECT_COPIED(PARENT, PIECES);
	EXPECT_EQ(1, IS_FROZEN(C));
	ASSERT_EQ(0, cg_thaw(C));
	BOTH_ARE_RIGHT(pair, LATER);
}

TEST_F(groups, both_are_frozen)
{
	ASSERT_EQ(0, cg_freeze(""));
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PIECES);
	EXPECT_EQ(1, IS_FROZEN(P));
	EXPECT_EQ(1, IS_FROZEN(C));
	ASSERT_EQ(0, cg_thaw(""));
	BOTH_ARE_RIGHT(&self->pair, SEED);
}

/* Wherever they are, again and again, each for itself and both. */
TEST_F(groups, frozen_and_thawed_at_work)
{
	static const char * const who[] = { P, C, "" };
	struct pair *pair = &self->pair;
	int i;

	ASSERT_EQ(0, pair_work(pair, LATER));
	for (i = 0; i < 12; i++) {
		EXPECT_EQ(0, cg_freeze(who[i % 3]));
		if (i == 6)
			EXPECT_EQ(0, af_release(&self->af));
		EXPECT_EQ(0, cg_thaw(who[i % 3]));
	}
	EXPECT_EQ(0, pair_rest(pair));
	BOTH_ARE_RIGHT(pair, LATER);
}

TEST_F(groups, frozen_child_is_killed)
{
	struct pair *pair = &self->pair;

	EXPECT_EQ(0, af_child_check(&pair->c, pair->r, 0, af_piece(2), SEED));
	ASSERT_EQ(0, cg_freeze(C));
	ASSERT_EQ(0, cg_kill(C));
	EXPECT_EQ(SIGKILL, pair_reap_child(pair));
	if (self->held)
		EXPECT_EQ(1, af_delta(&self->af, AF_CANCEL));
	/* Its lifter needs nobody's leave. */
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_COPIED(LIFTED, PIECES - 2);
	PAIR_PARENT_IS_RIGHT(pair, LATER);
}

TEST_F(groups, frozen_parent_is_killed)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, cg_freeze(P));
	ASSERT_EQ(0, cg_kill(P));
	EXPECT_EQ(SIGKILL, af_reap(&pair->p));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_COPIED(PARENT, PIECES);
	PAIR_CHILD_IS_RIGHT(pair, LATER);
}

/* One write kills both sides of an open session, at work or not. */
TEST_F(groups, both_are_killed)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, cg_kill(""));
	EXPECT_EQ(SIGKILL, af_reap(&pair->p));
	EXPECT_EQ(SIGKILL, af_reap(&pair->c));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
}

TEST_F(groups, both_are_killed_at_work)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, pair_work(pair, LATER));
	ASSERT_EQ(0, cg_kill(""));
	EXPECT_EQ(SIGKILL, af_reap(&pair->p));
	EXPECT_EQ(SIGKILL, af_reap(&pair->c));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
}

/*
 * A millisecond of CPU time in a hundred: C neither copies nor is in anybody's
 * way, and the workers, who run on nobody's time, do the rest.
 */
TEST_F(groups, child_is_out_of_cpu_time)
{
	struct pair *pair = &self->pair;
	size_t i;

	if (!cg_has(C, "cpu.max"))
		SKIP(return, "no cpu controller");
	ASSERT_EQ(0, cg_write(C, "cpu.max", "1000 100000"));
	ASSERT_EQ(0, af_post(&pair->c, &SPIN));
	ASSERT_EQ(0, cg_wait(C, "cpu.stat", "nr_throttled", 1, 1L << 40));
	for (i = 0; i < PIECES / 2; i++)
		EXPECT_EQ(0, af_child_fill(&pair->p, pair->r, af_piece(i) + 9,
					   1, LATER));
	EXPECT_COPIED(PARENT, PIECES / 2);
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PIECES - PIECES / 2);
	EXPECT_COPIED(CHILD, 0);
	for (i = 0; i < PIECES / 2; i++)
		EXPECT_EQ(0, af_child_fill(&pair->p, pair->r, af_piece(i) + 9,
					   1, SEED));
	*pair->stop = 1;
	ASSERT_EQ(0, cg_write(C, "cpu.max", "max"));
	EXPECT_EQ(0, af_wait(&pair->c));
	BOTH_ARE_RIGHT(pair, SEED);
}

/* The same with P: C and the workers do not need it. */
TEST_F(groups, parent_is_out_of_cpu_time)
{
	struct pair *pair = &self->pair;

	if (!cg_has(P, "cpu.max"))
		SKIP(return, "no cpu controller");
	ASSERT_EQ(0, cg_write(P, "cpu.max", "1000 100000"));
	ASSERT_EQ(0, af_post(&pair->p, &SPIN));
	ASSERT_EQ(0, cg_wait(P, "cpu.stat", "nr_throttled", 1, 1L << 40));
	EXPECT_EQ(0, af_child_check(&pair->c, pair->r, 0, af_piece(2), SEED));
	EXPECT_COPIED(CHILD, 2);
	WORKERS_FINISH();
	EXPECT_COPIED(WORKER, PIECES - 2);
	*pair->stop = 1;
	ASSERT_EQ(0, cg_write(P, "cpu.max", "max"));
	EXPECT_EQ(0, af_wait(&pair->p));
	BOTH_ARE_RIGHT(pair, SEED);
}

/* Both are moved again and again while they work and the copy is under way. */
TEST_F(groups, both_are_moved_at_work)
{
	struct pair *pair = &self->pair;
	int i;

	ASSERT_EQ(0, cg_make("other"));
	ASSERT_EQ(0, pair_work(pair, LATER));
	for (i = 0; i < 30; i++) {
		EXPECT_EQ(0, cg_join(i % 2 ? P : "other", pair->p.pid));
		EXPECT_EQ(0, cg_join(i % 3 ? C : "other", pair->c.pid));
		if (i == 15)
			EXPECT_EQ(0, af_release(&self->af));
	}
	EXPECT_EQ(0, pair_rest(pair));
	BOTH_ARE_RIGHT(pair, LATER);
}

/*
 * cgroup.kill in a storm of forks, by processes that it finds anywhere in
 * fork(), with children that read, that wait, and that are not born yet.
 */
#define FORKERS	2
#define ROUNDS	3

#define FORKS	12

struct storm {
	long wrong;		/* pages that a child did not have */
	long forks[FORKERS];	/* in this round; 0 before the forker has begun */
};

FIXTURE(storm) {
	struct af af;
	struct af_region r;
	struct storm *storm;
};

FIXTURE_VARIANT(storm) {
	int hold;
};

FIXTURE_VARIANT_ADD(storm, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(storm, race) { .hold = AF_RACE };

FIXTURE_SETUP(storm)
{
	CG_BEGIN();
	ASSERT_EQ(0, cg_make(P));
	ASSERT_EQ(0, prctl(PR_SET_CHILD_SUBREAPER, 1));
	self->storm = af_shared(sizeof(*self->storm));
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	AF_SETUP(variant->hold);
	self->af.spare = 1000000;
}

FIXTURE_TEARDOWN(storm)
{
	AF_FINISH();
	EXPECT_EQ(0, cg_end());
}

#define STORM_PAGES	20

/* What the first pages of @piece hold when the next write is number @next. */
static uint64_t storm_seed(long next, long piece)
{
	long last = next - 1 - (next - 1 - piece) % PIECES;

	return next > piece ? LATER + last : SEED;
}

static long storm_check(const struct af_region *r, long next)
{
	long wrong = 0, i;

	for (i = 0; i < PIECES; i++)
		wrong += af_check(r, af_piece(i), STORM_PAGES,
				  storm_seed(next, i));
	return wrong;
}

static void storm_write(const struct af_region *r, long number)
{
	af_fill(r, af_piece(number % PIECES), STORM_PAGES, LATER + number);
}

/* Forks until it is killed. Each third child stays until the next that does. */
static void fork_on(const struct af_region *r, struct storm *storm, int self)
{
	pid_t pid, stays = 0;
	long i;

	for (i = 0;; i++) {
		__atomic_store_n(&storm->forks[self], i, __ATOMIC_RELAXED);
		pid = fork();
		if (!pid) {
			long wrong = storm_check(r, i);

			__atomic_add_fetch(&storm->wrong, wrong,
					   __ATOMIC_RELAXED);
			if (i % 3 == 0)
				pause();
			_exit(0);
		}
		storm_write(r, i);
		if (i % 3) {
			waitpid(pid, NULL, 0);
		} else {
			if (stays > 0) {
				kill(stays, SIGKILL);
				waitpid(stays, NULL, 0);
			}
			stays = pid;
		}
	}
}

/* Each forker is in its group and has forked so often. */
static bool is_raging(void *storm)
{
	int i;

	for (i = 0; i < FORKERS; i++)
		if (__atomic_load_n(&((struct storm *)storm)->forks[i],
				    __ATOMIC_RELAXED) < FORKS)
			return false;
	return true;
}

TEST_F(storm, group_is_killed)
{
	int i, round, ret = -EWOULDBLOCK;
	pid_t pid;

	for (round = 0; round < ROUNDS; round++) {
		for (i = 0; i < FORKERS; i++) {
			self->storm->forks[i] = 0;
			pid = fork();
			ASSERT_GE(pid, 0);
			if (!pid) {
				if (cg_join(P, 0))
					_exit(1);
				fork_on(&self->r, self->storm, i);
			}
		}
		EXPECT_EQ(0, af_poll(is_raging, self->storm, 100));
		ASSERT_EQ(0, cg_kill(P));
		while (waitpid(-1, NULL, 0) > 0)
			;
		EXPECT_EQ(0, cg_wait_empty(P));
		if (self->af.async)
			EXPECT_EQ(0, af_settle());
	}
	EXPECT_EQ(0, self->storm->wrong);
	EXPECT_EQ(0, af_check_all(&self->r));
	self->af.want = ROUNDS * FORKERS * FORKS;
	if (!self->af.async || !getenv("ASYNC_FORK_KO"))
		return;
	/* Nothing of all that holds the module. */
	EXPECT_EQ(0, af_poll(unloads, &ret, 30));
	EXPECT_EQ(0, ret);
	EXPECT_EQ(0, load_module());
}

/* fork() straight into a group, as clone3() can. */
static pid_t fork_into(const char *group)
{
	struct clone_args args = { .flags = CLONE_INTO_CGROUP,
				   .exit_signal = SIGCHLD };
	char path[256];
	pid_t pid;
	int fd;

	snprintf(path, sizeof(path), CG_TOP "/%s", group);
	fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	args.cgroup = fd;
	pid = syscall(SYS_clone3, &args, sizeof(args));
	close(fd);
	return pid;
}

/* Children that are killed by their group at birth; their parent lives on. */
TEST_F(storm, children_are_killed_at_birth)
{
	int i, status;
	pid_t pid;

	for (i = 0; i < 40; i++) {
		pid = fork_into(P);
		ASSERT_GE(pid, 0);
		if (!pid) {
			if (storm_check(&self->r, i))
				self->storm->wrong++;
			pause();
			_exit(0);
		}
		self->af.want++;
		if (i % 2)
			storm_write(&self->r, i);
		ASSERT_EQ(0, cg_kill(P));
		if (i % 2 == 0)
			storm_write(&self->r, i);
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		EXPECT_EQ(SIGKILL, status);
		EXPECT_EQ(0, storm_check(&self->r, i + 1));
	}
	EXPECT_EQ(0, self->storm->wrong);
}

/*
 * memory.high, of P's group or of C's. The region has one page in each piece,
 * and more tables than a CPU holds charges in stock (64 pages).
 */
#define MANY	200
#define HIGH	"4096"

FIXTURE(high) {
	struct af af;
	struct pair pair;
};

FIXTURE_VARIANT(high) {
	int hold;
};

FIXTURE_VARIANT_ADD(high, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(high, race) { .hold = AF_RACE };

static long do_make_sparse(const struct af_job *job)
{
	struct af_region *r = (struct af_region *)job->addr;
	int ret = af_region_reserve(r, job->pages, job->seed | AF_SPARSE);

	if (!ret)
		af_fill(r, 0, r->pages, r->seed);
	return ret;
}

/* The pages that are there: one before the first piece, and one in each. */
static long do_check_sparse(const struct af_job *job)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i <= MANY; i++)
		wrong += af_check_at(job->addr + i * AF_PIECE,
				     i * AF_PIECE_PAGES, 1, job->seed);
	return wrong;
}

static long do_fill_sparse(const struct af_job *job)
{
	size_t i;

	for (i = 0; i <= MANY; i++)
		af_fill_at(job->addr + i * AF_PIECE, i * AF_PIECE_PAGES, 1,
			   job->seed);
	return 0;
}

static long do_fork_and_check_sparse(const struct af_job *job)
{
	int status = -1;
	pid_t pid = fork();

	if (!pid)
		_exit(!!do_check_sparse(job));
	return waitpid(pid, &status, 0) == pid ? status : -1;
}

static long do_protect(const struct af_job *job)
{
	return mprotect(job->addr, job->pages * AF_PAGE, PROT_READ) ? -errno : 0;
}

#define SPARSE(which, s) ((struct af_job){ .fn = (which),		\
	.addr = self->pair.r->base, .pages = self->pair.r->pages,	\
	.seed = (s) | AF_SPARSE })
#define CHECK_SPARSE(side, s) \
	EXPECT_EQ(0, af_run(&(side), &SPARSE(do_check_sparse, (s))))

static int sparse_pair(struct pair *pair)
{
	if (pair_start(pair))
		return -1;
	return cg_join(P, pair->p.pid) ||
	       af_call(&pair->p, do_make_sparse, .addr = (char *)pair->r,
		       .pages = MANY, .seed = SEED);
}

FIXTURE_SETUP(high)
{
	CG_BEGIN();
	ASSERT_EQ(0, cg_make(P));
	ASSERT_EQ(0, cg_make(C));
	if (!cg_has(P, "memory.high"))
		SKIP(return, "no memory controller");
	/* So that reclaim does not help. */
	cg_write(P, "memory.swap.max", "0");
	cg_write(C, "memory.swap.max", "0");
	ASSERT_EQ(0, sparse_pair(&self->pair));
	AF_SETUP(variant->hold);
}

FIXTURE_TEARDOWN(high)
{
	AF_FINISH();
	EXPECT_EQ(0, cg_end());
}

static bool child_pays(void *pid)
{
	return cg_pays(*(pid_t *)pid);
}

/* A look at somebody's mappings, which waits for the lock of its memory. */
static void look_at_maps(pid_t pid)
{
	char path[64], text[8192];

	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	af_read_file(path, text, sizeof(text));
}

/* How often P was seen asleep for memory.high during one call. */
struct watch {
	int amid;	/* some of its pieces were copied, some were not */
	int behind;	/* all were, and a look at its mappings did not wait */
	int ever;
};

/*
 * Watches P until it answers. "Did not wait" means that P had not answered yet
 * after the look, nor begun a session that is not expected yet.
 */
static struct watch watch_parent(struct pair *pair, const struct af *af)
{
	struct pollfd reply = { .fd = pair->p.reply, .events = POLLIN };
	struct watch w = { 0 };
	long pieces;

	while (!poll(&reply, 1, 1)) {
		pieces = af_delta(af, AF_PIECE_PARENT);
		if (!cg_pays(pair->p.pid))
			continue;
		/* What it copied since it paid says nothing. */
		if (pieces != af_delta(af, AF_PIECE_PARENT))
			continue;
		w.ever++;
		if (pieces && pieces < MANY)
			w.amid++;
		if (pieces < MANY)
			continue;
		look_at_maps(pair->p.pid);
		if (af_delta(af, AF_SESSION) == af->want &&
		    !poll(&reply, 1, 0))
			w.behind++;
	}
	return w;
}

#define P_IS_OVER_HIGH() ASSERT_EQ(0, cg_write(P, "memory.high", HIGH))
#define P_MAY_GROW() ASSERT_EQ(0, cg_write(P, "memory.high", "max"))
#define EXPECT_HIGH_EVENTS() \
	EXPECT_GT(cg_number(P, "memory.events", "high"), events)

/*
 * fork() completes the session that P is in, which brings its group further
 * over memory.high. It pays for that as plain fork does, but before it takes
 * its locks.
 */
TEST_F(high, parent_forks)
{
	struct pair *pair = &self->pair;
	struct watch w;
	long events;

	ASSERT_EQ(0, pair_fork(pair, &self->af));
	P_IS_OVER_HIGH();
	events = cg_number(P, "memory.events", "high");
	ASSERT_EQ(0, af_post(&pair->p, &SPARSE(do_fork_and_check_sparse, SEED)));
	w = watch_parent(pair, &self->af);
	EXPECT_EQ(0, af_wait(&pair->p));
	self->af.want++;
	if (!self->af.async || self->af.held)
		EXPECT_HIGH_EVENTS();
	P_MAY_GROW();
	if (self->af.held) {
		EXPECT_EQ(0, w.amid);
		EXPECT_GT(w.behind, 0);
	}
	CHECK_SPARSE(pair->c, SEED);
	EXPECT_EQ(0, af_run(&pair->p, &SPARSE(do_fill_sparse, LATER)));
	CHECK_SPARSE(pair->c, SEED);
	CHECK_SPARSE(pair->p, LATER);
	EXPECT_EQ(0, pair_end_child(pair));
	EXPECT_EQ(0, af_end(&pair->p));
}

/* A call that copies all pieces under P's lock pays when it has let go of it. */
TEST_F(high, parent_changes_all)
{
	struct pair *pair = &self->pair;
	struct watch w;
	long events;

	ASSERT_EQ(0, pair_fork(pair, &self->af));
	P_IS_OVER_HIGH();
	events = cg_number(P, "memory.events", "high");
	ASSERT_EQ(0, af_post(&pair->p, &SPARSE(do_protect, SEED)));
	w = watch_parent(pair, &self->af);
	EXPECT_EQ(0, af_wait(&pair->p));
	if (self->af.held) {
		EXPECT_EQ(MANY, af_delta(&self->af, AF_PIECE_PARENT));
		EXPECT_HIGH_EVENTS();
		EXPECT_EQ(0, w.amid);
		EXPECT_GT(w.behind, 0);
	}
	P_MAY_GROW();
	CHECK_SPARSE(pair->c, SEED);
	EXPECT_EQ(0, af_run(&pair->c, &SPARSE(do_fill_sparse, LATER)));
	CHECK_SPARSE(pair->p, SEED);
	EXPECT_EQ(0, pair_end_child(pair));
	EXPECT_EQ(0, af_end(&pair->p));
}

static long do_fork_into_c(const struct af_job *job)
{
	pid_t pid = fork_into(C);

	(void)job;
	if (!pid)
		af_serve(pair_ends);
	af_unlink(pair_ends);
	return pid;
}

static long group_tables(const char *group)
{
	return cg_number(group, "memory.stat", "pagetables") / (long)AF_PAGE;
}

/*
 * C is born in a group that it is soon over memory.high of, and sleeps for
 * that. P does not, whoever copies; and its group pays for the tables, as it
 * does for those of a plain fork.
 */
TEST_F(high, child_is_born_over_it)
{
	struct pair *pair = &self->pair;
	struct watch w;

	ASSERT_EQ(0, cg_write(C, "memory.high", HIGH));
	ASSERT_EQ(0, pair_forked(pair, &self->af,
				 af_call(&pair->p, do_fork_into_c)));
	ASSERT_EQ(0, af_post(&pair->c, &SPARSE(do_fill_sparse, LATER)));
	ASSERT_EQ(0, af_poll(child_pays, &pair->c.pid, 120));
	ASSERT_EQ(0, af_post(&pair->p, &SPARSE(do_fill_sparse, LATER + 1)));
	w = watch_parent(pair, &self->af);
	EXPECT_EQ(0, af_wait(&pair->p));
	EXPECT_EQ(0, w.ever);
	ASSERT_EQ(0, cg_write(C, "memory.high", "max"));
	EXPECT_EQ(0, af_wait(&pair->c));
	if (self->af.held)
		EXPECT_EQ(MANY, af_delta(&self->af, AF_PIECE_PARENT) +
				af_delta(&self->af, AF_PIECE_CHILD));
	CHECK_SPARSE(pair->p, LATER + 1);
	CHECK_SPARSE(pair->c, LATER);
	EXPECT_GT(cg_number(C, "memory.events", "high"), 0);
	EXPECT_EQ(0, cg_number(P, "memory.events", "high"));
	if (self->af.async)
		EXPECT_EQ(0, af_release(&self->af));
	EXPECT_EQ(0, cg_wait(P, "memory.stat", "pagetables",
			     2 * MANY * (long)AF_PAGE, 1L << 40));
	EXPECT_LT(group_tables(C), MANY / 2);
	EXPECT_EQ(0, pair_end_child(pair));
	EXPECT_EQ(0, af_end(&pair->p));
}

/*
 * The group that P was in when it forked is removed while the session is open,
 * P and C being elsewhere by then. The tables still count where they counted
 * with plain fork, which is above that group now, and nothing keeps its remains
 * once all is over.
 */
FIXTURE(leaves) {
	struct af af;
	struct pair pair;
};

FIXTURE_VARIANT(leaves) {
	int hold;
};

FIXTURE_VARIANT_ADD(leaves, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(leaves, race) { .hold = AF_RACE };

/* Maps in what there is of this program's files, so that no group has to. */
static void read_own_files(void)
{
	unsigned long from, to, inode;
	char line[512];
	FILE *f = fopen("/proc/self/maps", "r");

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "%lx-%lx r%*s %*x %*s %lu", &from, &to,
			   &inode) == 3 && inode)
			madvise((void *)from, to - from, MADV_POPULATE_READ);
	if (f)
		fclose(f);
}

FIXTURE_SETUP(leaves)
{
	CG_BEGIN();
	ASSERT_EQ(0, cg_make(P));
	ASSERT_EQ(0, cg_make(C));
	ASSERT_EQ(0, cg_make("later"));
	if (!cg_has(P, "memory.high"))
		SKIP(return, "no memory controller");
	read_own_files();
	ASSERT_EQ(0, sparse_pair(&self->pair));
	AF_SETUP(variant->hold);
	ASSERT_EQ(0, pair_fork(&self->pair, &self->af));
}

FIXTURE_TEARDOWN(leaves)
{
	AF_FINISH();
	EXPECT_EQ(0, cg_end());
}

/*
 * CPUs keep charges and pages of a group for later use, with a reference to it.
 * A limit that is exceeded, and drop_caches, have them give these back.
 */
static bool nothing_is_dying(void *unused)
{
	(void)unused;
	cg_write("", "memory.high", "0");
	cg_write("", "memory.high", "max");
	af_write_file("/proc/sys/vm/drop_caches", "1");
	return cg_number("", "cgroup.stat", "nr_dying_descendants") == 0;
}

TEST_F(leaves, group_of_the_fork_goes)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, cg_join(C, pair->c.pid));
	ASSERT_EQ(0, cg_join("later", pair->p.pid));
	ASSERT_EQ(0, cg_remove(P));
	EXPECT_EQ(1, cg_number("", "cgroup.stat", "nr_dying_descendants"));
	if (self->af.held) {
		CHECK_SPARSE(pair->c, SEED);
		EXPECT_EQ(MANY, af_delta(&self->af, AF_PIECE_CHILD));
	}
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_EQ(0, cg_wait("", "memory.stat", "pagetables",
			     2 * MANY * (long)AF_PAGE, 1L << 40));
	EXPECT_LT(group_tables(C), MANY / 2);
	EXPECT_LT(group_tables("later"), MANY / 2);
	CHECK_SPARSE(pair->c, SEED);
	EXPECT_EQ(0, af_run(&pair->p, &SPARSE(do_fill_sparse, LATER)));
	CHECK_SPARSE(pair->c, SEED);
	EXPECT_EQ(0, pair_end_child(pair));
	EXPECT_EQ(0, af_end(&pair->p));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_EQ(0, af_poll(nothing_is_dying, NULL, 30));
}

/* By the workers, who belong to no group. */
TEST_F(leaves, group_goes_and_workers_copy)
{
	struct pair *pair = &self->pair;
	bool held = self->af.held;

	ASSERT_EQ(0, cg_join(C, pair->c.pid));
	ASSERT_EQ(0, cg_join("later", pair->p.pid));
	ASSERT_EQ(0, cg_remove(P));
	EXPECT_EQ(0, af_release(&self->af));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	if (held)
		EXPECT_EQ(MANY, af_delta(&self->af, AF_PIECE_WORKER));
	EXPECT_EQ(0, cg_wait("", "memory.stat", "pagetables",
			     2 * MANY * (long)AF_PAGE, 1L << 40));
	EXPECT_LT(group_tables(C), MANY / 2);
	EXPECT_LT(group_tables("later"), MANY / 2);
	CHECK_SPARSE(pair->c, SEED);
	EXPECT_EQ(0, pair_end_child(pair));
	EXPECT_EQ(0, af_end(&pair->p));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_EQ(0, af_poll(nothing_is_dying, NULL, 30));
}

/* C's group goes, C with it, while P is elsewhere; the session is cancelled. */
TEST_F(leaves, group_goes_with_the_child)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, cg_join("later", pair->p.pid));
	ASSERT_EQ(0, cg_kill(P));
	EXPECT_EQ(SIGKILL, pair_reap_child(pair));
	ASSERT_EQ(0, cg_wait_empty(P));
	ASSERT_EQ(0, cg_remove(P));
	CHECK_SPARSE(pair->p, SEED);
	EXPECT_EQ(0, af_run(&pair->p, &SPARSE(do_fill_sparse, LATER)));
	CHECK_SPARSE(pair->p, LATER);
	EXPECT_EQ(0, af_end(&pair->p));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_EQ(0, af_poll(nothing_is_dying, NULL, 30));
}

TEST_HARNESS_MAIN
