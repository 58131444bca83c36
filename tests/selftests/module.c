// SPDX-License-Identifier: GPL-2.0
/*
 * The module's own life: it cannot go while a fork is under way, it leaves
 * nothing behind when it goes, and forks that run meanwhile are right.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "harness.h"
#include "module.h"

#define PIECES	4
#define ROUNDS	20

FIXTURE(module) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_SETUP(module)
{
	if (af_plain_mode() || !getenv("ASYNC_FORK_KO"))
		SKIP(return, "no module is loaded");
	AF_REGION(&self->r, PIECES, AF_BASE, 0x3a);
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(module)
{
	AF_FINISH();
	/* The tests that follow want it. */
	load_module();
}

TEST_F(module, stays_while_a_session_lives)
{
	if (!self->af.held)
		SKIP(return, "needs held workers (debug kernel)");
	AF_SPAWN(&self->c);
	EXPECT_EQ(-EWOULDBLOCK, unload_module());
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
}

TEST_F(module, goes_and_comes_back)
{
	int ret = -EWOULDBLOCK;

	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
	ASSERT_EQ(0, af_poll(unloads, &ret, 30));
	ASSERT_EQ(0, ret);

	self->af.allow |= AF_ALLOW(AF_FB_MODULE);
	ASSERT_EQ(0, af_spawn_other(&self->c));
	EXPECT_LE(1, af_delta(&self->af, AF_FB_MODULE));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);

	ASSERT_EQ(0, load_module());
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&self->c);
}

/* fork() and exec, then an idle parent: nothing may hold the module. */
TEST_F(module, goes_under_an_idle_parent)
{
	int ret = -EWOULDBLOCK, status;
	pid_t pid;

	self->af.spare = 1;
	self->af.allow |= AF_ALLOW(AF_CANCEL);
	pid = fork();
	if (!pid) {
		execl("/bin/true", "true", NULL);
		_exit(1);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	ASSERT_EQ(0, af_poll(unloads, &ret, 30));
	EXPECT_EQ(0, ret);
}

struct traffic {
	struct af_region *r;
	int stop;
	int times;	/* that the module went */
};

/* Forks until it is told to stop. Returns 0 if all children were right. */
static int forks(struct traffic *traffic)
{
	size_t page = af_piece(1) + 3;
	struct af_region *r = traffic->r;
	unsigned int pause = 1000;
	int round = 0, seen = 0, times;
	struct af_child c;
	long wrong = 0;

	while (!__atomic_load_n(&traffic->stop, __ATOMIC_RELAXED)) {
		if (af_spawn_other(&c))
			return 2;
		/* A parent without hooks would wait in its fault. */
		if (round++ % 2)
			wrong = af_child_check(&c, r, page, 8, r->seed);
		af_fill(r, page, 1, 0x77);
		wrong += af_child_check(&c, r, page, 8, r->seed);
		if (af_end(&c))
			return 3;
		if (wrong)
			return 1;
		af_fill(r, page, 1, r->seed);
		if (round % 4)
			continue;
		/*
		 * The module goes only between two sessions, and the last one
		 * ends a grace period later: leave it more time until it goes.
		 */
		times = __atomic_load_n(&traffic->times, __ATOMIC_RELAXED);
		if (times != seen)
			pause = 1000;
		else if (pause < 1000000)
			pause *= 2;
		seen = times;
		usleep(pause);
	}
	return 0;
}

/*
 * A fork that begins while the module comes must find every hook on: a child
 * of a lazy fork without hooks reads zeroes.
 */
TEST_F(module, comes_and_goes_while_forks_run)
{
	struct traffic *traffic = af_shared(sizeof(*traffic));
	time_t until = time(NULL) + 60;
	int status;
	pid_t pid;

	ASSERT_EQ(0, af_release(&self->af));
	self->af.spare = 100000;
	self->af.allow |= AF_ALLOW(AF_FB_MODULE) | AF_ALLOW(AF_CANCEL);
	traffic->r = &self->r;
	pid = fork();
	if (!pid)
		_exit(forks(traffic));
	while (traffic->times < ROUNDS && time(NULL) < until) {
		if (!unload_module()) {
			__atomic_fetch_add(&traffic->times, 1, __ATOMIC_RELAXED);
			EXPECT_EQ(0, load_module());
		}
		usleep(1000);
	}
	EXPECT_GT(traffic->times, 0);
	__atomic_store_n(&traffic->stop, 1, __ATOMIC_RELAXED);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
}

TEST_HARNESS_MAIN
