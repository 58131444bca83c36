// SPDX-License-Identifier: GPL-2.0
/*
 * The end of either side while the session is open: exit, exec, kill; and
 * storms of children that end at once.
 *
 * The test process watches a parent P and its child C, both of which obey it.
 * Guards exit_mmap() (first statement), the drain before exec, cancel, and the
 * lifter that a cancel queues.
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include "harness.h"

#define PIECES	4
#define SEED	0x91
#define LATER	0x92UL

FIXTURE(end) {
	struct af af;
	struct af_child p, c;
	struct af_region r;	/* as P describes it; mapped in P and C only */
	struct af_region *shared;
};

FIXTURE_VARIANT(end) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(end, base) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(end, base_race) { .kind = AF_BASE, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(end, mixed) { .kind = AF_MIXED, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(end, pte_thp_race) { .kind = AF_PTE_THP, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(end, swapped) { .kind = AF_SWAPPED, .hold = AF_HOLD };

static int child_link[2];

static long do_make_region(const struct af_job *job)
{
	return af_region_make((struct af_region *)job->addr, PIECES,
			      (enum af_kind)job->first, job->seed);
}

/* P forks C, which answers the test process through child_link. */
static long do_fork_served(const struct af_job *job)
{
	pid_t pid = fork();

	(void)job;
	if (!pid)
		af_serve(child_link);
	af_unlink(child_link);
	return pid;
}

FIXTURE_SETUP(end)
{
	long made;

	self->shared = af_shared(sizeof(*self->shared));
	ASSERT_EQ(0, prctl(PR_SET_CHILD_SUBREAPER, 1));
	ASSERT_EQ(0, af_link(&self->c, child_link));
	ASSERT_EQ(0, af_spawn_other(&self->p));
	af_unlink(child_link);
	made = af_call(&self->p, do_make_region, .addr = (char *)self->shared,
		       .first = variant->kind, .seed = SEED);
	if (made == AF_SKIPPED)
		SKIP(return, "memory of this kind cannot be had (swap: scripts/vm --swap)");
	ASSERT_EQ(0, made);
	self->r = *self->shared;
	AF_SETUP(variant->hold);
	self->c.pid = af_call(&self->p, do_fork_served);
	ASSERT_GT(self->c.pid, 0);
	self->af.want++;
}

FIXTURE_TEARDOWN(end)
{
	AF_FINISH();
}

static long do_exit(const struct af_job *job)
{
	_exit((int)job->first);
}

static long do_exec_true(const struct af_job *job)
{
	char *argv[] = { "true", NULL };

	(void)job;
	execv("/bin/true", argv);
	return 1;
}

/* C, whose parent is gone, still has the whole snapshot. */
#define CHILD_IS_RIGHT() do {						\
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));		\
	EXPECT_EQ(0, af_child_fill(&self->c, &self->r, 0,		\
				   self->r.pages, LATER));		\
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0,		\
				    self->r.pages, LATER));		\
	EXPECT_EQ(0, af_end(&self->c));					\
} while (0)

/* P, whose child is gone, has its memory and can write it. */
#define PARENT_IS_RIGHT() do {						\
	EXPECT_EQ(0, af_child_check_all(&self->p, &self->r));		\
	EXPECT_EQ(0, af_child_fill(&self->p, &self->r, 0,		\
				   self->r.pages, LATER));		\
	EXPECT_EQ(0, af_child_check(&self->p, &self->r, 0,		\
				    self->r.pages, LATER));		\
	EXPECT_EQ(0, af_end(&self->p));					\
} while (0)

TEST_F(end, parent_exits)
{
	EXPECT_EQ(0, af_end(&self->p));
	CHILD_IS_RIGHT();
}

TEST_F(end, parent_execs)
{
	af_post(&self->p, &(struct af_job){ .fn = do_exec_true });
	EXPECT_EQ(0, af_reap(&self->p));
	CHILD_IS_RIGHT();
}

TEST_F(end, parent_is_killed)
{
	EXPECT_EQ(SIGKILL, af_kill(&self->p));
	CHILD_IS_RIGHT();
}

/* P dies in the middle of writes, C in the middle of a read. */
TEST_F(end, parent_is_killed_at_work)
{
	af_post(&self->p, &(struct af_job){ .fn = af_do_fill,
		.addr = self->r.base, .pages = self->r.pages, .seed = LATER });
	af_post(&self->c, &(struct af_job){ .fn = af_do_check,
		.addr = self->r.base, .pages = self->r.pages,
		.seed = self->r.seed });
	EXPECT_EQ(SIGKILL, af_kill(&self->p));
	EXPECT_EQ(0, af_wait(&self->c));
	CHILD_IS_RIGHT();
}

static void *exit_now(void *unused)
{
	(void)unused;
	_exit(0);
}

/* exit_group() by a second thread while the first one writes. */
static long do_exit_by_thread(const struct af_job *job)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, exit_now, NULL))
		return 1;
	for (;;)
		af_do_fill(job);
}

TEST_F(end, parent_exits_by_thread)
{
	af_post(&self->p, &(struct af_job){ .fn = do_exit_by_thread,
		.addr = self->r.base, .pages = self->r.pages, .seed = LATER });
	EXPECT_EQ(0, af_reap(&self->p));
	CHILD_IS_RIGHT();
}

/* A reader of P's files may drop the last reference (section 9, item 18). */
static void *read_smaps(void *arg)
{
	char path[64], buf[4096];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/smaps", *(pid_t *)arg);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return NULL;
	do {
		lseek(fd, 0, SEEK_SET);
	} while (read(fd, buf, sizeof(buf)) > 0);
	close(fd);
	return NULL;
}

TEST_F(end, parent_is_killed_under_a_reader)
{
	pthread_t thread;
	pid_t pid = self->p.pid;

	ASSERT_EQ(0, pthread_create(&thread, NULL, read_smaps, &pid));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, 10, self->r.seed));
	EXPECT_EQ(SIGKILL, af_kill(&self->p));
	pthread_join(thread, NULL);
	CHILD_IS_RIGHT();
}

static long do_reap_child(const struct af_job *job)
{
	int status = -1;

	waitpid((pid_t)job->first, &status, 0);
	return status;
}

#define REAP_C() af_call(&self->p, do_reap_child, .first = self->c.pid)

/*
 * A reader of /proc/PID/mem that the kernel keeps waiting, with a reference to
 * the address space, as the buffer it reads to is a page that this process
 * hands out itself.
 */
struct reader {
	pid_t pid;
	char *from;		/* there */
	char *to;		/* here */
	int uffd;
	ssize_t got;
	pthread_t thread;
};

static void *read_mem(void *arg)
{
	struct reader *reader = arg;
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/mem", reader->pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	reader->got = pread(fd, reader->to, AF_PAGE, (uintptr_t)reader->from);
	close(fd);
	return NULL;
}

/* Starts the reader and waits until it waits. */
static int reader_start(struct reader *reader, pid_t pid, char *from)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct uffd_msg msg;

	reader->pid = pid;
	reader->from = from;
	reader->to = mmap(NULL, AF_PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	reader->uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (reader->uffd < 0 || ioctl(reader->uffd, UFFDIO_API, &api))
		return AF_SKIPPED;
	reg.range.start = (uintptr_t)reader->to;
	reg.range.len = AF_PAGE;
	if (ioctl(reader->uffd, UFFDIO_REGISTER, &reg) ||
	    pthread_create(&reader->thread, NULL, read_mem, reader))
		return -1;
	return read(reader->uffd, &msg, sizeof(msg)) == sizeof(msg) ? 0 : -1;
}

/* Lets it go on; returns what it read. */
static ssize_t reader_end(struct reader *reader)
{
	struct uffdio_zeropage zero = {
		.range = { (uintptr_t)reader->to, AF_PAGE } };

	if (ioctl(reader->uffd, UFFDIO_ZEROPAGE, &zero))
		return -1;
	pthread_join(reader->thread, NULL);
	close(reader->uffd);
	return reader->got;
}

/*
 * P is dead and reaped, its memory is not: C still copies from it. The reader
 * then drops the last reference, and with it what C still needs (section 9,
 * item 18).
 */
TEST_F(end, parent_is_outlived_by_a_reader)
{
	struct reader reader;
	size_t at = af_piece(1) + 3;
	int ret = reader_start(&reader, self->p.pid, af_page(&self->r, at));

	if (ret == AF_SKIPPED)
		SKIP(goto out, "no userfaultfd");
	ASSERT_EQ(0, ret);
	EXPECT_EQ(SIGKILL, af_kill(&self->p));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, af_piece(2),
				    self->r.seed));
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_END));
	EXPECT_EQ((ssize_t)AF_PAGE, reader_end(&reader));
	EXPECT_EQ(0, af_check_at(reader.to, at, 1, self->r.seed));
	CHILD_IS_RIGHT();
	return;
out:
	af_kill(&self->p);
	af_kill(&self->c);
}

/* The other way round: the cancel comes with the reader's last reference. */
TEST_F(end, child_is_outlived_by_a_reader)
{
	struct reader reader;
	size_t at = af_piece(1) + 3;
	int ret = reader_start(&reader, self->c.pid, af_page(&self->r, at));

	if (ret == AF_SKIPPED)
		SKIP(goto out, "no userfaultfd");
	ASSERT_EQ(0, ret);
	kill(self->c.pid, SIGKILL);
	EXPECT_EQ(SIGKILL, REAP_C());
	EXPECT_EQ(0, af_child_fill(&self->p, &self->r, 0, af_piece(1), LATER));
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_CANCEL));
	EXPECT_EQ((ssize_t)AF_PAGE, reader_end(&reader));
	EXPECT_EQ(0, af_check_at(reader.to, at, 1, self->r.seed));
	if (self->af.held)
		EXPECT_EQ(1, af_delta(&self->af, AF_CANCEL));
	EXPECT_EQ(0, af_child_fill(&self->p, &self->r, 0, self->r.pages,
				   self->r.seed));
	PARENT_IS_RIGHT();
	return;
out:
	af_kill(&self->p);
	af_kill(&self->c);
}

TEST_F(end, child_exits)
{
	af_post(&self->c, &(struct af_job){ .fn = do_exit, .first = 3 });
	EXPECT_EQ(3 << 8, REAP_C());
	if (self->af.held)
		EXPECT_EQ(1, af_delta(&self->af, AF_CANCEL));
	PARENT_IS_RIGHT();
}

/*
 * The lifter that the cancel queues ends the session, although nobody touches
 * anything any more (section 9, item 15).
 */
TEST_F(end, child_execs_and_parent_idles)
{
	af_post(&self->c, &(struct af_job){ .fn = do_exec_true });
	EXPECT_EQ(0, REAP_C());
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	PARENT_IS_RIGHT();
}

TEST_F(end, child_is_killed)
{
	kill(self->c.pid, SIGKILL);
	EXPECT_EQ(SIGKILL, REAP_C());
	PARENT_IS_RIGHT();
}

TEST_F(end, child_is_killed_while_it_reads)
{
	af_post(&self->c, &(struct af_job){ .fn = af_do_check,
		.addr = self->r.base, .pages = self->r.pages,
		.seed = self->r.seed });
	EXPECT_EQ(0, af_release(&self->af));
	kill(self->c.pid, SIGKILL);
	EXPECT_EQ(SIGKILL, REAP_C());
	PARENT_IS_RIGHT();
}

/* The marks are still there when P unmaps what C no longer needs. */
TEST_F(end, both_are_killed)
{
	af_post(&self->c, &(struct af_job){ .fn = af_do_check,
		.addr = self->r.base, .pages = self->r.pages,
		.seed = self->r.seed });
	kill(self->c.pid, SIGKILL);
	EXPECT_EQ(SIGKILL, af_kill(&self->p));
	waitpid(self->c.pid, NULL, 0);
}

AF_PLAIN_FIXTURE(storm, PIECES)

/* fork() and _exit(), the parent writing between two forks. */
TEST_F(storm, fork_and_exit)
{
	int i, status;

	ASSERT_EQ(0, af_release(&self->af));
	for (i = 0; i < 100; i++) {
		pid_t pid = fork();

		ASSERT_GE(pid, 0);
		if (!pid)
			_exit(0);
		af_fill(&self->r, af_piece(i % PIECES) + i, 50, LATER + i);
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		ASSERT_EQ(0, status);
		ASSERT_EQ(0, af_check(&self->r, af_piece(i % PIECES) + i, 50,
				      LATER + i));
		self->af.want++;
	}
}

TEST_F(storm, fork_and_exit_held)
{
	int i, status;

	for (i = 0; i < 30; i++) {
		pid_t pid = fork();

		ASSERT_GE(pid, 0);
		if (!pid)
			_exit(0);
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		af_fill(&self->r, af_piece(i % PIECES), 1, LATER + i);
		self->af.want++;
	}
}

TEST_F(storm, fork_and_exec)
{
	char *argv[] = { "true", NULL };
	int i, status;

	ASSERT_EQ(0, af_release(&self->af));
	for (i = 0; i < 20; i++) {
		pid_t pid = fork();

		ASSERT_GE(pid, 0);
		if (!pid) {
			execv("/bin/true", argv);
			_exit(127);
		}
		af_fill(&self->r, 0, self->r.pages, LATER + i);
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		ASSERT_EQ(0, status);
		self->af.want++;
	}
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER + 19));
}

/* Many children alive at once, killed in the order they came. */
TEST_F(storm, many_children_killed)
{
	struct af_child c[8];
	int i;

	ASSERT_EQ(0, af_release(&self->af));
	for (i = 0; i < 8; i++) {
		AF_SPAWN(&c[i]);
		af_post(&c[i], &(struct af_job){ .fn = af_do_check,
			.addr = self->r.base, .pages = self->r.pages,
			.seed = i ? LATER + i - 1 : self->r.seed });
		af_fill(&self->r, 0, self->r.pages, LATER + i);
	}
	for (i = 0; i < 8; i += 2)
		EXPECT_EQ(SIGKILL, af_kill(&c[i]));
	for (i = 1; i < 8; i += 2) {
		EXPECT_EQ(0, af_wait(&c[i]));
		AF_EXIT_OK(&c[i]);
	}
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER + 7));
}

TEST_HARNESS_MAIN
