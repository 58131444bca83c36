// SPDX-License-Identifier: GPL-2.0
/*
 * The module's own life: it cannot go while a fork is under way, it leaves
 * nothing behind when it goes, and forks that run meanwhile are right.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/wait.h>
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

/*
 * A fork that begins while the module comes must find every hook on: a child
 * of a lazy fork without hooks reads zeroes.
 */
TEST_F(module, comes_and_goes_while_forks_run)
{
	int *stop = af_shared(4096), status, i, times = 0;
	size_t page = af_piece(1) + 3;
	pid_t pid;

	ASSERT_EQ(0, af_release(&self->af));
	self->af.spare = 100000;
	self->af.allow |= AF_ALLOW(AF_FB_MODULE) | AF_ALLOW(AF_CANCEL);
	pid = fork();
	if (!pid) {
		struct af_child c;
		long wrong = 0;
		int round = 0;

		while (!__atomic_load_n(stop, __ATOMIC_RELAXED) && !wrong) {
			if (af_spawn_other(&c))
				_exit(2);
			/* A parent without hooks would wait in its fault. */
			if (round++ % 2)
				wrong = af_child_check(&c, &self->r, page, 8,
						       self->r.seed);
			af_fill(&self->r, page, 1, 0x77);
			wrong += af_child_check(&c, &self->r, page, 8,
						self->r.seed);
			if (af_end(&c))
				_exit(3);
			af_fill(&self->r, page, 1, self->r.seed);
		}
		_exit(wrong ? 1 : 0);
	}
	/* It goes only between two sessions. */
	for (i = 0; i < 50 * ROUNDS && times < ROUNDS; i++) {
		if (!unload_module()) {
			times++;
			EXPECT_EQ(0, load_module());
		}
		usleep(20000);
	}
	EXPECT_GT(times, 0);
	__atomic_store_n(stop, 1, __ATOMIC_RELAXED);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
}

TEST_HARNESS_MAIN
