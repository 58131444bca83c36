// SPDX-License-Identifier: GPL-2.0
/*
 * Threads of the parent at work through forks and through the copy: nothing
 * that they write may be lost, nothing of it may reach a child.
 */
#include <pthread.h>
#include <time.h>
#include "harness.h"

#define PIECES	12
#define SEED	0xf1UL
#define LATER	0xf2UL

FIXTURE(stress) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_SETUP(stress)
{
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	AF_SETUP(AF_RACE);
}

FIXTURE_TEARDOWN(stress)
{
	AF_FINISH();
}

/* Two threads increment words of the same pages until they are told to stop. */
#define COUNTERS 4

struct counting {
	struct af_region *r;
	int lane;
	volatile bool *stop;
	uint64_t rounds;
	pthread_t thread;
};

static volatile uint64_t *counter(struct af_region *r, int i, int lane)
{
	return (volatile uint64_t *)(af_page(r, af_piece(i * 3) + 11 * i) +
				     64 + 8 * lane);
}

static void *count_up(void *arg)
{
	struct counting *c = arg;
	int i;

	while (!*c->stop) {
		for (i = 0; i < COUNTERS; i++)
			*counter(c->r, i, c->lane) += 1;
		c->rounds++;
	}
	return NULL;
}

/*
 * In a child the counters stand still: each must read the same twice. No two
 * words of one lane can differ by more than the one that is under way, except
 * by what was counted while fork() was at work elsewhere, which a plain fork
 * shows just as well: nothing is asked of that.
 */
static int counters_stand_still(struct af_region *r)
{
	uint64_t seen[COUNTERS][2];
	int i, lane, round, moved = 0;

	for (round = 0; round < 3; round++)
		for (i = 0; i < COUNTERS; i++)
			for (lane = 0; lane < 2; lane++) {
				uint64_t now = *counter(r, i, lane);

				moved += round && now != seen[i][lane];
				seen[i][lane] = now;
			}
	return moved;
}

/*
 * DESIGN.md section 9, item 3: no increment is lost while children come and
 * go. A mark that is lifted while a copier is in mid-piece loses some.
 */
TEST_F(stress, no_increment_is_lost)
{
	volatile bool stop = false;
	struct counting c[2] = { { .r = &self->r, .lane = 0, .stop = &stop },
				 { .r = &self->r, .lane = 1, .stop = &stop } };
	int i, k, status;

	for (i = 0; i < 2; i++)
		ASSERT_EQ(0, pthread_create(&c[i].thread, NULL, count_up,
					    &c[i]));
	for (k = 0; k < 60; k++) {
		pid_t pid = fork();

		if (!pid)
			_exit(k % 2 ? 0 : counters_stand_still(&self->r));
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		EXPECT_EQ(0, status);
		self->af.want++;
	}
	stop = true;
	for (i = 0; i < 2; i++)
		pthread_join(c[i].thread, NULL);
	for (i = 0; i < COUNTERS; i++)
		for (k = 0; k < 2; k++)
			EXPECT_EQ(c[k].rounds, *counter(&self->r, i, k));
	EXPECT_EQ(0, af_check_all(&self->r));
}

/* A thread that writes pages of its own stripe, epoch by epoch. */
struct writer {
	struct af_region *r;
	size_t first, step;
	uint64_t seed;
	pthread_t thread;
};

static void *write_stripe(void *arg)
{
	struct writer *w = arg;
	size_t i;

	for (i = w->first; i < w->r->pages; i += w->step)
		af_fill(w->r, i, 1, w->seed);
	return NULL;
}

/* Four writers through the whole region while the child looks at all of it. */
TEST_F(stress, writers_against_reading_child)
{
	struct writer w[4];
	int round, i;

	for (round = 0; round < 4; round++) {
		uint64_t before = round ? LATER + round - 1 : SEED;

		AF_SPAWN(&self->c);
		ASSERT_EQ(0, af_post(&self->c, &(struct af_job){
			.fn = af_do_check, .addr = self->r.base,
			.pages = self->r.pages, .seed = before }));
		for (i = 0; i < 4; i++) {
			w[i] = (struct writer){ .r = &self->r, .first = i,
				.step = 4, .seed = LATER + round };
			ASSERT_EQ(0, pthread_create(&w[i].thread, NULL,
						    write_stripe, &w[i]));
		}
		for (i = 0; i < 4; i++)
			pthread_join(w[i].thread, NULL);
		EXPECT_EQ(0, af_wait(&self->c));
		EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0,
					    self->r.pages, before));
		EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages,
				      LATER + round));
		AF_EXIT_OK(&self->c);
	}
}

/* Each of two threads has a word of its own in every page. */
static volatile uint64_t *word_of(const struct af_region *r, size_t page,
				  int lane)
{
	return (volatile uint64_t *)(af_page(r, page) + 512 + 8 * lane);
}

/* Writers that run on through forks: each child must see one state, twice. */
static void *write_on(void *arg)
{
	struct counting *c = arg;

	while (!*c->stop) {
		size_t page = (c->rounds++ * 97) % c->r->pages;

		*word_of(c->r, page, c->lane) += 1;
	}
	return NULL;
}

static uint64_t sum_lanes(const struct af_region *r)
{
	uint64_t sum = 0;
	size_t i;

	for (i = 0; i < r->pages; i++)
		sum += *word_of(r, i, 0) * 31 + *word_of(r, i, 1);
	return sum;
}

TEST_F(stress, snapshot_does_not_move)
{
	volatile bool stop = false;
	struct counting c[2] = { { .r = &self->r, .lane = 0, .stop = &stop },
				 { .r = &self->r, .lane = 1, .stop = &stop } };
	uint64_t total = 0;
	int i, k, status;

	for (i = 0; i < 2; i++)
		ASSERT_EQ(0, pthread_create(&c[i].thread, NULL, write_on,
					    &c[i]));
	for (k = 0; k < 12; k++) {
		pid_t pid = fork();

		if (!pid)
			_exit(sum_lanes(&self->r) != sum_lanes(&self->r) ||
			      af_check_all(&self->r));
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		EXPECT_EQ(0, status);
		self->af.want++;
	}
	stop = true;
	for (i = 0; i < 2; i++)
		pthread_join(c[i].thread, NULL);
	for (i = 0; i < (int)self->r.pages; i++)
		total += *word_of(&self->r, i, 0) + *word_of(&self->r, i, 1);
	EXPECT_EQ(c[0].rounds + c[1].rounds, total);
}

/* Writes the stamp of now all over the region: how many fork()s have returned. */
struct stamper {
	struct af_region *r;
	int lane;
	volatile bool *stop;
	volatile uint64_t *now;
	pthread_t thread;
};

static void *stamp_on(void *arg)
{
	struct stamper *s = arg;
	size_t i;

	/* From piece to piece, so that many copies are met half way. */
	for (i = s->lane; !*s->stop; i += AF_PIECE_PAGES + 97)
		*word_of(s->r, i % s->r->pages, s->lane) = *s->now;
	return NULL;
}

static long count_stamps_behind(struct af_region *r, uint64_t mine)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < r->pages; i++)
		wrong += *word_of(r, i, 0) > mine || *word_of(r, i, 1) > mine;
	return wrong;
}

/* What was written when fork() had returned is in no child. */
TEST_F(stress, nothing_later_reaches_a_child)
{
	volatile uint64_t now = 0;
	volatile bool stop = false;
	struct stamper s[2] = {
		{ .r = &self->r, .lane = 0, .stop = &stop, .now = &now },
		{ .r = &self->r, .lane = 1, .stop = &stop, .now = &now } };
	int i, status;

	for (i = 0; i < (int)self->r.pages; i++)
		*word_of(&self->r, i, 0) = *word_of(&self->r, i, 1) = 0;
	for (i = 0; i < 2; i++)
		ASSERT_EQ(0, pthread_create(&s[i].thread, NULL, stamp_on,
					    &s[i]));
	for (i = 0; i < 12; i++) {
		pid_t pid = fork();

		if (!pid)
			_exit(!!count_stamps_behind(&self->r, i));
		now = i + 1;
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		EXPECT_EQ(0, status);
		self->af.want++;
	}
	stop = true;
	for (i = 0; i < 2; i++)
		pthread_join(s[i].thread, NULL);
	EXPECT_EQ(0, af_check_all(&self->r));
}

/* One thread unmaps and maps again, another protects, while children read. */
struct changer {
	struct af_region *r;
	size_t first;
	volatile bool *stop;
	long wrong;
	pthread_t thread;
};

static void *map_and_unmap(void *arg)
{
	struct changer *c = arg;
	size_t pages = 700, len = pages * AF_PAGE;
	char *p = af_page(c->r, c->first);

	while (!*c->stop) {
		if (munmap(p, len) ||
		    mmap(p, len, PROT_READ | PROT_WRITE, MAP_PRIVATE |
			 MAP_ANONYMOUS | MAP_FIXED, -1, 0) != p)
			c->wrong++;
		af_fill(c->r, c->first, pages, c->r->seed);
		c->wrong += af_check(c->r, c->first, pages, c->r->seed);
	}
	return NULL;
}

static void *protect_and_back(void *arg)
{
	struct changer *c = arg;
	size_t pages = 700, len = pages * AF_PAGE;
	char *p = af_page(c->r, c->first);

	while (!*c->stop) {
		c->wrong += !!mprotect(p, len, PROT_READ);
		c->wrong += af_check(c->r, c->first, pages, c->r->seed);
		c->wrong += !!mprotect(p, len, PROT_READ | PROT_WRITE);
		af_fill(c->r, c->first, pages, c->r->seed);
	}
	return NULL;
}

TEST_F(stress, changes_of_layout_during_forks)
{
	volatile bool stop = false;
	struct changer c[2] = {
		{ .r = &self->r, .first = af_piece(2) + 100, .stop = &stop },
		{ .r = &self->r, .first = af_piece(6) + 30, .stop = &stop } };
	size_t quiet = af_piece(8);
	int k, status;

	ASSERT_EQ(0, pthread_create(&c[0].thread, NULL, map_and_unmap, &c[0]));
	ASSERT_EQ(0, pthread_create(&c[1].thread, NULL, protect_and_back,
				    &c[1]));
	for (k = 0; k < 30; k++) {
		pid_t pid = fork();

		if (!pid)
			_exit(!!af_check(&self->r, quiet,
					 self->r.pages - quiet, SEED));
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		EXPECT_EQ(0, status);
		self->af.want++;
	}
	stop = true;
	pthread_join(c[0].thread, NULL);
	pthread_join(c[1].thread, NULL);
	EXPECT_EQ(0, c[0].wrong);
	EXPECT_EQ(0, c[1].wrong);
}

/* Each has upper tables of its own, and a page in each of its pieces. */
#define FAR		6
#define FAR_PIECES	2

static char *far_piece(size_t i)
{
	return (char *)0x100000000000 + ((i / FAR_PIECES) << 40) +
	       i % FAR_PIECES * AF_PIECE;
}

static long do_check_far(const struct af_job *job)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < job->pages; i++)
		wrong += af_check_at(far_piece(i), i, 1, job->seed);
	return wrong;
}

/*
 * All of it is lazy, so fork() leaves the child no table of any level there:
 * its own reads, the parent's writes and workers meet in installing them.
 */
TEST_F(stress, upper_tables_by_many)
{
	struct af_job check = { .fn = do_check_far, .pages = FAR * FAR_PIECES,
				.seed = SEED };
	size_t i;
	int round;

	for (i = 0; i < FAR * FAR_PIECES; i += FAR_PIECES) {
		ASSERT_EQ(far_piece(i), mmap(far_piece(i),
			  FAR_PIECES * AF_PIECE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
			  -1, 0));
		madvise(far_piece(i), FAR_PIECES * AF_PIECE, MADV_NOHUGEPAGE);
	}
	for (i = 0; i < FAR * FAR_PIECES; i++)
		af_fill_at(far_piece(i), i, 1, SEED);
	for (round = 0; round < 20; round++) {
		AF_SPAWN(&self->c);
		ASSERT_EQ(0, af_post(&self->c, &check));
		for (i = FAR * FAR_PIECES; i-- > 0;)
			af_fill_at(far_piece(i), i, 1, LATER + round);
		EXPECT_EQ(0, af_wait(&self->c));
		EXPECT_EQ(0, af_run(&self->c, &check));
		AF_EXIT_OK(&self->c);
		check.seed = LATER + round;
		EXPECT_EQ(0, do_check_far(&check));
	}
}

/*
 * DESIGN.md section 9, item 12: an ascending writer meets ascending workers.
 * It must not pay for every piece: the workers have to get ahead of it.
 * Counted, not timed: some pieces are the workers'.
 */
TEST_F(stress, ascending_writer)
{
	time_t until = time(NULL) + 60;
	long worker, parent;
	int round;

	/* Workers may be kept from the CPU for longer than a write takes. */
	for (round = 0; round < 5 || (self->af.async && time(NULL) < until &&
			!af_delta(&self->af, AF_PIECE_WORKER)); round++) {
		AF_SPAWN(&self->c);
		af_fill(&self->r, 0, self->r.pages, LATER + round);
		EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0,
					    self->r.pages, round ?
					    LATER + round - 1 : SEED));
		AF_EXIT_OK(&self->c);
	}
	if (!self->af.async)
		return;
	worker = af_delta(&self->af, AF_PIECE_WORKER);
	parent = af_delta(&self->af, AF_PIECE_PARENT);
	TH_LOG("pieces: %ld by workers, %ld by the parent", worker, parent);
	EXPECT_GT(worker, 0);
}

TEST_HARNESS_MAIN
