// SPDX-License-Identifier: GPL-2.0
/*
 * Those who take the memory of a process that is still dying: the OOM reaper
 * and process_mrelease(). A parent's memory costs its child what is not copied
 * yet, and so only the OOM killer may take it; a child's costs nobody anything.
 *
 * The victim is traced and stops on its way out, with its memory still there.
 * Guards __oom_reap_task_mm(), process_mrelease() and exit_mmap() of a victim.
 */
#include <fcntl.h>
#include <sys/stat.h>
#include "pair.h"

#define PIECES	4
#define SEED	0x101UL
#define LATER	0x102UL

#define GROUP	"/sys/fs/cgroup/af-oom"

#ifndef SYS_process_mrelease
#define SYS_process_mrelease 448
#endif

FIXTURE(oom) {
	struct af af;
	struct pair pair;
};

FIXTURE_VARIANT(oom) {
	int hold;
};

FIXTURE_VARIANT_ADD(oom, held) { .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(oom, race) { .hold = AF_RACE };

FIXTURE_SETUP(oom)
{
	af_write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	if (access("/sys/fs/cgroup/memory.stat", F_OK))
		SKIP(return, "no memory controller");
	PAIR_MAKE(&self->pair, PIECES, AF_BASE, SEED);
	AF_SETUP(variant->hold);
	self->af.allow |= AF_ALLOW(AF_POISON);
	ASSERT_EQ(0, pair_fork(&self->pair, &self->af));
	mkdir(GROUP, 0755);
}

FIXTURE_TEARDOWN(oom)
{
	AF_FINISH();
	EXPECT_EQ(0, rmdir(GROUP));
}

static long mrelease(pid_t pid)
{
	int fd = syscall(SYS_pidfd_open, pid, 0);
	long ret = syscall(SYS_process_mrelease, fd, 0) ? -errno : 0;

	close(fd);
	return ret;
}

/* From now on @pid's new memory counts against a limit that it will meet. */
static int confine(pid_t pid)
{
	char text[32];

	snprintf(text, sizeof(text), "%d", pid);
	return af_write_file(GROUP "/cgroup.procs", text) ||
	       af_write_file(GROUP "/memory.max", "4M");
}

/* Does not return: the OOM killer comes. */
static long do_exceed(const struct af_job *job)
{
	size_t len = 64 * AF_MIB;
	char *p = mmap(NULL, len, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)job;
	af_write_file(GROUP "/memory.swap.max", "0");
	memset(p, 1, len);
	return 0;
}

static long rss_anon_kb(pid_t pid)
{
	char path[64], text[4096], *line;

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	if (af_read_file(path, text, sizeof(text)))
		return -1;
	line = strstr(text, "RssAnon:");
	return line ? atol(line + 8) : -1;
}

static bool is_reaped(void *pid)
{
	long kb = rss_anon_kb(*(pid_t *)pid);

	return kb >= 0 && kb < 100;
}

/* Nothing is reaped before the session is over; then, all of P is. */
TEST_F(oom, mrelease_of_parent)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, pair_seize(pair->p.pid));
	kill(pair->p.pid, SIGKILL);
	ASSERT_EQ(0, pair_wait_dying(pair->p.pid));
	if (self->af.held) {
		EXPECT_EQ(-EAGAIN, mrelease(pair->p.pid));
		EXPECT_GT(rss_anon_kb(pair->p.pid), PIECES * 2048);
	}
	EXPECT_EQ(0, af_release(&self->af));
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	EXPECT_EQ(0, mrelease(pair->p.pid));
	EXPECT_TRUE(is_reaped(&pair->p.pid));
	EXPECT_EQ(0, af_child_check_all(&pair->c, pair->r));
	EXPECT_EQ(0, pair_let_die(pair->p.pid));
	EXPECT_EQ(SIGKILL, af_reap(&pair->p));
	if (self->af.async)
		EXPECT_EQ(0, af_delta(&self->af, AF_POISON));
	PAIR_CHILD_IS_RIGHT(pair, LATER);
}

/* Reaping a child lifts the parent's marks at once. */
TEST_F(oom, mrelease_of_child)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, pair_seize(pair->c.pid));
	kill(pair->c.pid, SIGKILL);
	ASSERT_EQ(0, pair_wait_dying(pair->c.pid));
	EXPECT_EQ(0, mrelease(pair->c.pid));
	EXPECT_TRUE(is_reaped(&pair->c.pid));
	if (self->af.held) {
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_LIFTED));
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_WORKER));
	}
	EXPECT_EQ(0, af_child_check_all(&pair->p, pair->r));
	EXPECT_EQ(0, pair_let_die(pair->c.pid));
	EXPECT_EQ(SIGKILL, pair_reap_child(pair));
	PAIR_PARENT_IS_RIGHT(pair, LATER);
}

/* The snapshot goes with its parent, if it is not complete. */
#define CHILD_IS_LOST_OR_RIGHT() do {					\
	long __n = af_child_check_all(&pair->c, pair->r);		\
									\
	if (self->af.async && self->af.held) {				\
		EXPECT_EQ(1, af_delta(&self->af, AF_POISON));		\
		EXPECT_EQ(AF_GONE, __n);				\
	} else if (!self->af.async) {					\
		EXPECT_EQ(0, __n);					\
	}								\
	EXPECT_TRUE(__n == 0 || __n == AF_GONE);			\
	lost = __n == AF_GONE;						\
} while (0)

TEST_F(oom, parent_is_reaped)
{
	struct pair *pair = &self->pair;
	bool lost;

	ASSERT_EQ(0, confine(pair->p.pid));
	ASSERT_EQ(0, pair_seize(pair->p.pid));
	af_post(&pair->p, &(struct af_job){ .fn = do_exceed });
	ASSERT_EQ(0, pair_wait_dying(pair->p.pid));
	EXPECT_EQ(0, af_poll(is_reaped, &pair->p.pid, 30));
	CHILD_IS_LOST_OR_RIGHT();
	EXPECT_EQ(0, pair_let_die(pair->p.pid));
	EXPECT_EQ(SIGKILL, af_reap(&pair->p) & 0x7f);
	if (lost) {
		EXPECT_EQ(SIGKILL, af_reap(&pair->c) & 0x7f);
	} else {
		PAIR_CHILD_IS_RIGHT(pair, LATER);
	}
}

/* The same before the reaper comes: the victim itself gives its memory back. */
TEST_F(oom, victim_parent_exits)
{
	struct pair *pair = &self->pair;
	bool lost;

	ASSERT_EQ(0, confine(pair->p.pid));
	af_post(&pair->p, &(struct af_job){ .fn = do_exceed });
	EXPECT_EQ(SIGKILL, af_reap(&pair->p) & 0x7f);
	CHILD_IS_LOST_OR_RIGHT();
	if (lost) {
		EXPECT_EQ(SIGKILL, af_reap(&pair->c) & 0x7f);
	} else {
		PAIR_CHILD_IS_RIGHT(pair, LATER);
	}
}

TEST_F(oom, child_is_reaped)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, confine(pair->c.pid));
	ASSERT_EQ(0, pair_seize(pair->c.pid));
	af_post(&pair->c, &(struct af_job){ .fn = do_exceed });
	ASSERT_EQ(0, pair_wait_dying(pair->c.pid));
	EXPECT_EQ(0, af_poll(is_reaped, &pair->c.pid, 30));
	if (self->af.held) {
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_LIFTED));
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_WORKER));
	}
	EXPECT_EQ(0, af_child_check_all(&pair->p, pair->r));
	EXPECT_EQ(0, pair_let_die(pair->c.pid));
	EXPECT_EQ(SIGKILL, pair_reap_child(pair) & 0x7f);
	PAIR_PARENT_IS_RIGHT(pair, LATER);
}

TEST_F(oom, victim_child_exits)
{
	struct pair *pair = &self->pair;

	ASSERT_EQ(0, confine(pair->c.pid));
	af_post(&pair->c, &(struct af_job){ .fn = do_exceed });
	EXPECT_EQ(SIGKILL, pair_reap_child(pair) & 0x7f);
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_PARENT) +
			     af_delta(&self->af, AF_PIECE_CHILD) +
			     af_delta(&self->af, AF_PIECE_WORKER));
	PAIR_PARENT_IS_RIGHT(pair, LATER);
}

TEST_HARNESS_MAIN
