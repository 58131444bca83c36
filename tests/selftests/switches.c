// SPDX-License-Identifier: GPL-2.0
/*
 * The switches: what they take, what they refuse and with which error, and that
 * they decide about the next fork.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "harness.h"

#define ROOT	"/sys/fs/cgroup"
#define GROUP	ROOT "/af-switches"
#define INNER	GROUP "/inner"

/* The content of a file without its newline, or "" if it cannot be read. */
static const char *text_of(const char *path)
{
	static char buf[64];

	if (af_read_file(path, buf, sizeof(buf)))
		return "";
	buf[strcspn(buf, "\n")] = '\0';
	return buf;
}

FIXTURE(sysctl) {
	struct af af;
};

FIXTURE_SETUP(sysctl)
{
	if (af_plain_mode())
		SKIP(return, "plain fork has no switches");
	AF_SETUP(AF_RACE);
}

FIXTURE_TEARDOWN(sysctl)
{
	AF_FINISH();
}

TEST_F(sysctl, mode_takes_what_it_knows)
{
	const char *good[] = { "0", "1", "2" };
	size_t i;

	for (i = 0; i < 3; i++) {
		EXPECT_EQ(0, af_write_file(AF_MODE_FILE, good[i]));
		EXPECT_STREQ(good[i], text_of(AF_MODE_FILE));
	}
}

TEST_F(sysctl, mode_refuses_the_rest)
{
	const char *bad[] = { "3", "-1", "x", "4294967296" };
	size_t i;

	EXPECT_EQ(0, af_write_file(AF_MODE_FILE, "1"));
	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		EXPECT_EQ(-EINVAL, af_write_file(AF_MODE_FILE, bad[i]));
	EXPECT_STREQ("1", text_of(AF_MODE_FILE));
}

TEST_F(sysctl, minimum_refuses_garbage)
{
	EXPECT_EQ(0, af_write_file(AF_MIN_FILE, "7"));
	EXPECT_EQ(-EINVAL, af_write_file(AF_MIN_FILE, "-1"));
	EXPECT_EQ(-EINVAL, af_write_file(AF_MIN_FILE, "many"));
	EXPECT_STREQ("7", text_of(AF_MIN_FILE));
}

static void fork_once(struct __test_metadata *_metadata, struct af_region *r)
{
	struct af_child c;

	ASSERT_EQ(0, af_spawn_other(&c));
	EXPECT_EQ(0, af_child_check_all(&c, r));
	AF_EXIT_OK(&c);
}

TEST_F(sysctl, mode_decides_at_the_next_fork)
{
	struct af_region r;

	AF_REGION(&r, 2, AF_BASE, 0x5);
	self->af.spare = 1;
	self->af.allow |= AF_ALLOW(AF_FB_OFF);
	EXPECT_EQ(0, af_write_file(AF_MODE_FILE, "0"));
	fork_once(_metadata, &r);
	EXPECT_EQ(0, af_delta(&self->af, AF_SESSION));
	/* This task is in the root group, which has no switch of its own. */
	EXPECT_EQ(0, af_write_file(AF_MODE_FILE, "1"));
	fork_once(_metadata, &r);
	EXPECT_EQ(0, af_delta(&self->af, AF_SESSION));
	EXPECT_EQ(0, af_write_file(AF_MODE_FILE, "2"));
	fork_once(_metadata, &r);
	EXPECT_EQ(1, af_delta(&self->af, AF_SESSION));
}

TEST_F(sysctl, small_process_takes_the_plain_path)
{
	struct af_region r;

	AF_REGION(&r, 2, AF_BASE, 0x6);
	self->af.allow |= AF_ALLOW(AF_FB_SMALL);
	EXPECT_EQ(0, af_write_file(AF_MIN_FILE, "4000"));
	fork_once(_metadata, &r);
	EXPECT_EQ(0, af_delta(&self->af, AF_SESSION));
	EXPECT_LE(1, af_delta(&self->af, AF_FB_SMALL));
}

FIXTURE(cgroup) {
	struct af af;
};

FIXTURE_SETUP(cgroup)
{
	if (af_plain_mode())
		SKIP(return, "plain fork has no switches");
	AF_SETUP(AF_RACE);
	af_write_file(ROOT "/cgroup.subtree_control", "+memory");
	ASSERT_EQ(0, mkdir(GROUP, 0755));
	ASSERT_EQ(0, af_write_file(GROUP "/cgroup.subtree_control", "+memory"));
	ASSERT_EQ(0, af_write_file(AF_MODE_FILE, "1"));
}

FIXTURE_TEARDOWN(cgroup)
{
	rmdir(INNER);
	EXPECT_EQ(0, rmdir(GROUP));
	AF_FINISH();
}

TEST_F(cgroup, root_has_no_file)
{
	EXPECT_NE(0, access(ROOT "/memory.async_fork", F_OK));
	EXPECT_EQ(0, access(GROUP "/memory.async_fork", F_OK));
}

TEST_F(cgroup, takes_0_to_8)
{
	char n[2] = "0";

	EXPECT_STREQ("0", text_of(GROUP "/memory.async_fork"));
	for (; n[0] <= '8'; n[0]++) {
		EXPECT_EQ(0, af_write_file(GROUP "/memory.async_fork", n));
		EXPECT_STREQ(n, text_of(GROUP "/memory.async_fork"));
	}
}

TEST_F(cgroup, refuses_the_rest)
{
	const char *file = GROUP "/memory.async_fork";

	ASSERT_EQ(0, af_write_file(file, "3"));
	EXPECT_EQ(-ERANGE, af_write_file(file, "9"));
	EXPECT_EQ(-ERANGE, af_write_file(file, "-1"));
	EXPECT_EQ(-ERANGE, af_write_file(file, "4294967297"));
	EXPECT_EQ(-EINVAL, af_write_file(file, "on"));
	EXPECT_EQ(-EINVAL, af_write_file(file, "1 2"));
	EXPECT_EQ(-EINVAL, af_write_file(file, " "));
	EXPECT_STREQ("3", text_of(file));
}

TEST_F(cgroup, new_groups_inherit)
{
	ASSERT_EQ(0, af_write_file(GROUP "/memory.async_fork", "5"));
	ASSERT_EQ(0, mkdir(INNER, 0755));
	EXPECT_STREQ("5", text_of(INNER "/memory.async_fork"));
	ASSERT_EQ(0, af_write_file(GROUP "/memory.async_fork", "0"));
	EXPECT_STREQ("5", text_of(INNER "/memory.async_fork"));
}

/* In a process that sits in INNER: 0 if it forked with @sessions sessions. */
static int forks_in_group(struct af *af, const char *value, long sessions)
{
	struct af_region r;
	struct af_child c;
	long before;

	if (af_write_file(INNER "/memory.async_fork", value) ||
	    af_region_make(&r, 2, AF_BASE, 0x9))
		return 1;
	before = af_delta(af, AF_SESSION);
	if (af_spawn_other(&c) || af_child_check_all(&c, &r) || af_end(&c))
		return 2;
	af_region_free(&r);
	return af_delta(af, AF_SESSION) - before == sessions ? 0 : 3;
}

TEST_F(cgroup, decides_for_its_own_processes)
{
	int status;
	pid_t pid;

	self->af.spare = 2;
	self->af.allow |= AF_ALLOW(AF_FB_OFF);
	ASSERT_EQ(0, mkdir(INNER, 0755));
	pid = fork();
	if (!pid) {
		if (af_write_file(INNER "/cgroup.procs", "0"))
			_exit(10);
		status = forks_in_group(&self->af, "0", 0);
		if (!status)
			status = 20 * forks_in_group(&self->af, "1", 1);
		if (!status)
			status = 40 * forks_in_group(&self->af, "8", 1);
		if (!status)
			status = af_write_file(AF_MODE_FILE, "0") ? 60 :
				60 * forks_in_group(&self->af, "8", 0);
		_exit(status);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
}

TEST_HARNESS_MAIN
