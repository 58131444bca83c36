// SPDX-License-Identifier: GPL-2.0
/*
 * A fork() that fails: before its session is published (the marks are lifted
 * where they were set), and after that (an ordinary child that exits before it
 * ran). Either way the parent has its memory, and its next fork is lazy.
 *
 * Guards the error paths of dup_mmap(), dup_mm() and copy_process().
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "harness.h"

#define PIECES	4
#define SEED	0x121UL
#define LATER	0x122UL

#define GROUP	"/sys/fs/cgroup/af-pids"

AF_PLAIN_FIXTURE(fork_fails, PIECES)

/* A fork that works, and whose child has what the parent has now. */
#define NEXT_FORK_IS_RIGHT(s) do {					\
	struct af_child __c;						\
									\
	AF_SPAWN(&__c);							\
	af_fill(&self->r, 0, self->r.pages, (s) + 1);			\
	EXPECT_EQ(0, af_child_check(&__c, &self->r, 0, self->r.pages,	\
				    (s)));				\
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, (s) + 1));	\
	AF_EXIT_OK(&__c);						\
} while (0)

/* The limit of processes is looked at when the memory is copied already. */
TEST_F(fork_fails, behind_the_copy)
{
	pid_t pid;

	af_write_file("/sys/fs/cgroup/cgroup.subtree_control", "+pids");
	if (mkdir(GROUP, 0755) && errno != EEXIST)
		SKIP(return, "no cgroup2");
	if (access(GROUP "/pids.max", W_OK))
		SKIP(goto out, "no pids controller");
	ASSERT_EQ(0, af_write_file(GROUP "/cgroup.procs", "0"));
	ASSERT_EQ(0, af_write_file(GROUP "/pids.max", "1"));
	pid = fork();
	if (!pid)
		_exit(0);
	EXPECT_EQ(-1, pid);
	EXPECT_EQ(EAGAIN, errno);
	if (self->af.async) {
		EXPECT_EQ(1, af_delta(&self->af, AF_SESSION));
		EXPECT_EQ(1, af_delta(&self->af, AF_CANCEL));
		/* No worker was ever started: the lifter is queued by itself. */
		EXPECT_EQ(0, af_settle());
	}
	self->af.want++;
	EXPECT_EQ(0, af_check_all(&self->r));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_PARENT));
	ASSERT_EQ(0, af_write_file(GROUP "/pids.max", "max"));
	NEXT_FORK_IS_RIGHT(LATER);
	EXPECT_EQ(0, af_write_file("/sys/fs/cgroup/cgroup.procs", "0"));
out:
	rmdir(GROUP);
}

#define FAIL_NTH	"/proc/thread-self/fail-nth"

/*
 * Forks with the @nth allocation failing. Returns the child or -1, and in *hit
 * whether there were so many allocations.
 */
static pid_t fork_with_failure(int fd, int nth, bool *hit)
{
	char text[16] = "";
	pid_t pid;
	int error;

	snprintf(text, sizeof(text), "%d", nth);
	if (pwrite(fd, text, strlen(text), 0) < 0)
		return -2;
	pid = fork();
	if (!pid)
		_exit(0);
	error = errno;
	memset(text, 0, sizeof(text));
	*hit = pread(fd, text, sizeof(text) - 1, 0) > 0 && atoi(text) == 0;
	if (!*hit && pwrite(fd, "0", 1, 0) < 0)
		return -2;
	errno = error;
	return pid;
}

/* A word in each piece, and one in what was copied at once. */
static long touch(const struct af_region *r, uint64_t seed)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i <= r->pieces; i++) {
		size_t page = i ? af_piece(i - 1) + 9 : 0;

		af_fill(r, page, 1, seed);
		wrong += af_check(r, page, 1, seed);
		af_fill(r, page, 1, r->seed);
	}
	return wrong;
}

#define MOST_ALLOCATIONS 3000

/*
 * One allocation of fork() after the other fails. fork() fails or falls back;
 * it leaves no mark behind, which a write would stumble over.
 */
TEST_F(fork_fails, at_every_allocation)
{
	int fd = open(FAIL_NTH, O_RDWR | O_CLOEXEC);
	int nth, failed = 0, status;
	bool hit = true;

	if (fd < 0 || !af_fault_init())
		SKIP(return, "needs fault injection (debug kernel)");
	self->af.spare = MOST_ALLOCATIONS;
	self->af.allow |= AF_ALLOW(AF_FB_NOMEM);
	for (nth = 1; hit && nth < MOST_ALLOCATIONS; nth++) {
		long fallbacks = af_delta(&self->af, AF_FB_NOMEM);
		pid_t pid = fork_with_failure(fd, nth, &hit);

		ASSERT_NE(-2, pid);
		/* What only a session needs fails no fork(). */
		if (af_delta(&self->af, AF_FB_NOMEM) > fallbacks)
			EXPECT_GT(pid, 0) TH_LOG("allocation %d", nth);
		if (pid > 0) {
			ASSERT_EQ(pid, waitpid(pid, &status, 0));
			EXPECT_EQ(0, status);
		} else {
			EXPECT_EQ(ENOMEM, errno) TH_LOG("allocation %d", nth);
			failed++;
		}
		EXPECT_EQ(0, touch(&self->r, LATER))
			TH_LOG("after allocation %d", nth);
	}
	close(fd);
	EXPECT_FALSE(hit);
	EXPECT_GT(failed, 20);
	TH_LOG("fork() makes %d allocations and failed %d times", nth - 2,
	       failed);
	EXPECT_EQ(0, af_check_all(&self->r));
	NEXT_FORK_IS_RIGHT(self->r.seed);
}

TEST_HARNESS_MAIN
