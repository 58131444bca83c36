// SPDX-License-Identifier: GPL-2.0
/*
 * A child that has lost memory, as there was none for its page tables: whoever
 * asks for it gets the pattern or an error, and never zeroes.
 *
 * The child is killed at once. A process that shares its memory, and that
 * nobody kills as long as it touches none of it, keeps the holes for the tests
 * to look at (DESIGN.md section 9, items 14 and 17).
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include "harness.h"

#define PIECES	4
#define SEED	0x1c1UL
#define LATER	0x1c2UL

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise	440
#endif

FIXTURE(poisoned) {
	struct af af;
	struct af_region r;
	struct af_child c, sharer;
	bool holes;		/* there are some: not in plain mode */
	int file;		/* that all of them have open */
};

static int sharer_link[2];
static char sharer_stack[65536] __attribute__((aligned(16)));

static int sharer_main(void *unused)
{
	(void)unused;
	af_serve(sharer_link);
}

static long do_share(const struct af_job *job)
{
	pid_t pid = clone(sharer_main, sharer_stack + sizeof(sharer_stack),
			  CLONE_VM | SIGCHLD, NULL);

	(void)job;
	af_unlink(sharer_link);
	return pid;
}

static long do_allow_huge(const struct af_job *job)
{
	return madvise(job->addr, job->pages * AF_PAGE, MADV_HUGEPAGE);
}

/* The parent's write finds no memory for its child's copy. */
static void poison(const struct af_region *r)
{
	int fd = af_fault_tables(-1);

	af_fill(r, af_piece(0) + 1, 1, LATER);
	af_fault_pages_end(fd);
}

FIXTURE_SETUP(poisoned)
{
	const struct rlimit all = { RLIM_INFINITY, RLIM_INFINITY };

	if (!af_fault_init())
		SKIP(return, AF_NO_FAULTS);
	ASSERT_EQ(0, prctl(PR_SET_CHILD_SUBREAPER, 1));
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	ASSERT_EQ(0, setrlimit(RLIMIT_CORE, &all));
	AF_SETUP(AF_HOLD);
	self->file = memfd_create("file", 0);
	ASSERT_GE(self->file, 0);
	ASSERT_EQ(0, af_link(&self->sharer, sharer_link));
	AF_SPAWN(&self->c);
	self->sharer.pid = af_call(&self->c, do_share);
	ASSERT_GT(self->sharer.pid, 0);
	af_unlink(sharer_link);
	/* Not before the fork: khugepaged would leave no page table to copy. */
	ASSERT_EQ(0, af_call(&self->sharer, do_allow_huge,
			     .addr = self->r.base, .pages = self->r.pages));
	/* One piece is whole. */
	ASSERT_EQ(0, af_child_check(&self->sharer, &self->r, af_piece(3),
				    AF_PIECE_PAGES, SEED));
	self->holes = self->af.async && self->af.held;
	if (self->holes) {
		self->af.allow |= AF_ALLOW(AF_POISON);
		poison(&self->r);
		ASSERT_EQ(1, af_delta(&self->af, AF_POISON));
		ASSERT_EQ(SIGKILL, WTERMSIG(af_reap(&self->c)));
	} else {
		ASSERT_EQ(SIGKILL, af_kill(&self->c));
	}
}

FIXTURE_TEARDOWN(poisoned)
{
	EXPECT_EQ(0, af_check(&self->r, af_piece(0) + 2, 100, SEED));
	AF_FINISH();
}

/* The sharer is gone, killed at its first hole, or goes now. */
static int sharer_ends(struct af_child *sharer, bool holes)
{
	int status = holes ? af_reap(sharer) : af_end(sharer);

	return holes ? WTERMSIG(status) != SIGKILL : status;
}

/* A read of page @page: its length if it worked. */
typedef ssize_t (*page_reader)(pid_t pid, int fd, void *buf, char *addr);

static ssize_t by_vm_readv(pid_t pid, int fd, void *buf, char *addr)
{
	struct iovec local = { buf, AF_PAGE }, remote = { addr, AF_PAGE };

	(void)fd;
	return process_vm_readv(pid, &local, 1, &remote, 1, 0);
}

static ssize_t by_proc_mem(pid_t pid, int fd, void *buf, char *addr)
{
	(void)pid;
	return pread(fd, buf, AF_PAGE, (uintptr_t)addr);
}

/* The words that af_check_at() looks at. */
static ssize_t by_ptrace(pid_t pid, int fd, void *buf, char *addr)
{
	char *last = addr + AF_PAGE - 8;
	uint64_t *word = buf;

	(void)fd;
	errno = 0;
	word[0] = ptrace(PTRACE_PEEKDATA, pid, addr, NULL);
	word[AF_PAGE / 8 - 1] = ptrace(PTRACE_PEEKDATA, pid, last, NULL);
	return errno ? -1 : (ssize_t)AF_PAGE;
}

/* Pages that cannot be read; -1 if one reads as something else than it was. */
static long read_pages(pid_t pid, const struct af_region *r, page_reader reader)
{
	char buf[AF_PAGE], path[64];
	long lost = 0;
	size_t i;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	for (i = 0; i < r->pages; i += 8) {
		ssize_t got = reader(pid, fd, buf, af_page(r, i));

		if (got != (ssize_t)AF_PAGE)
			lost++;
		else if (af_check_at(buf, i, 1, SEED))
			return -1;
	}
	close(fd);
	return lost;
}

#define EXPECT_NO_ZEROES(reader) do {					\
	long lost = read_pages(self->sharer.pid, &self->r, reader);	\
	EXPECT_GE(lost, 0);						\
	if (self->holes) {						\
		EXPECT_GT(lost, 0);					\
	} else {							\
		EXPECT_EQ(0, lost);					\
	}								\
} while (0)

TEST_F(poisoned, is_read_by_others)
{
	EXPECT_NO_ZEROES(by_vm_readv);
	EXPECT_NO_ZEROES(by_proc_mem);
	kill(self->sharer.pid, SIGKILL);
	af_reap(&self->sharer);
}

TEST_F(poisoned, is_traced)
{
	pid_t pid = self->sharer.pid;

	ASSERT_EQ(0, ptrace(PTRACE_SEIZE, pid, NULL, NULL));
	ASSERT_EQ(0, ptrace(PTRACE_INTERRUPT, pid, NULL, NULL));
	ASSERT_EQ(pid, waitpid(pid, NULL, __WALL));
	EXPECT_NO_ZEROES(by_ptrace);
	kill(pid, SIGKILL);
	af_reap(&self->sharer);
}

/* Huge pages made of the holes by somebody else would be huge zeroes. */
TEST_F(poisoned, is_collapsed_by_others)
{
	int pidfd = syscall(SYS_pidfd_open, self->sharer.pid, 0);
	struct iovec range = { af_page(&self->r, af_piece(0)),
			       PIECES * AF_PIECE };
	long ret;

	ASSERT_GE(pidfd, 0);
	ret = syscall(SYS_process_madvise, pidfd, &range, 1, MADV_COLLAPSE, 0);
	TH_LOG("process_madvise: %ld (%s)", ret, ret < 0 ? strerror(errno) : "");
	if (self->holes)
		EXPECT_NE((long)(PIECES * AF_PIECE), ret);
	EXPECT_NO_ZEROES(by_vm_readv);
	kill(self->sharer.pid, SIGKILL);
	af_reap(&self->sharer);
}

static long do_collapse(const struct af_job *job)
{
	return madvise(job->addr, job->pages * AF_PAGE, MADV_COLLAPSE);
}

TEST_F(poisoned, collapses_itself)
{
	long ret = af_call(&self->sharer, do_collapse,
			   .addr = af_page(&self->r, af_piece(0)),
			   .pages = PIECES * AF_PIECE_PAGES);

	if (self->holes)
		EXPECT_NE(0, ret);
	EXPECT_NE(-1L, read_pages(self->sharer.pid, &self->r, by_vm_readv));
	kill(self->sharer.pid, SIGKILL);
	af_reap(&self->sharer);
}

/* write(2) page by page to file job->seed until it fails. */
static long do_write_pages(const struct af_job *job)
{
	size_t i;

	for (i = 0; i < job->pages; i++)
		if (pwrite((int)job->seed, job->addr + i * AF_PAGE, AF_PAGE,
			   (job->first + i) * AF_PAGE) != (ssize_t)AF_PAGE)
			return -errno;
	return 0;
}

#define WRITE_PAGES(f, n) af_call(&self->sharer, do_write_pages,	\
	.addr = af_page(&self->r, (f)), .first = (f), .pages = (n),	\
	.seed = self->file)

/* Every page that reached the file is right. */
static long check_file(int fd, size_t first, size_t pages)
{
	char buf[AF_PAGE];
	size_t i;

	for (i = first; i < first + pages; i++)
		if (pread(fd, buf, AF_PAGE, i * AF_PAGE) == (ssize_t)AF_PAGE &&
		    af_check_at(buf, i, 1, SEED))
			return -1;
	return lseek(fd, 0, SEEK_END) / AF_PAGE;
}

TEST_F(poisoned, writes_to_a_file)
{
	size_t from = af_piece(0), pages = PIECES * AF_PIECE_PAGES;
	long ret = WRITE_PAGES(from, pages);

	if (self->holes) {
		EXPECT_NE(0, ret);
		EXPECT_EQ(0, check_file(self->file, 0, from + pages));
	} else {
		EXPECT_EQ(0, ret);
		EXPECT_EQ((long)(from + pages),
			  check_file(self->file, from, pages));
	}
	EXPECT_EQ(0, sharer_ends(&self->sharer, self->holes));
}

/* Not the C library's fork(), which writes: any fault ends a sharer now. */
static long do_fork_and_look(const struct af_job *job)
{
	int status;
	pid_t pid = syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);

	if (!pid)
		_exit(!!af_do_check(job));
	if (pid < 0)
		return -errno;
	return waitpid(pid, &status, 0) != pid || status;
}

/* There is no grandchild, or it is right. */
TEST_F(poisoned, forks)
{
	long ret = af_call(&self->sharer, do_fork_and_look,
			   .addr = self->r.base, .pages = self->r.pages,
			   .seed = SEED);

	if (self->holes) {
		EXPECT_TRUE(ret == AF_GONE || ret == -ENOMEM)
			TH_LOG("fork: %ld", ret);
	} else {
		EXPECT_EQ(0, ret);
	}
	kill(self->sharer.pid, SIGKILL);
	af_reap(&self->sharer);
}

TEST_F(poisoned, touches_a_hole)
{
	long ret = af_child_check(&self->sharer, &self->r, 0, self->r.pages,
				  SEED);

	EXPECT_EQ(self->holes ? AF_GONE : 0, ret);
	EXPECT_EQ(0, sharer_ends(&self->sharer, self->holes));
}

#define CORE_PATTERN	"/proc/sys/kernel/core_pattern"
#define CORE		P_tmpdir "/af-poison-core"

/* How many pages of the region the core file has, -1 if one is wrong. */
static long check_core(int fd, const struct af_region *r)
{
	char buf[AF_PAGE];
	Elf64_Ehdr head;
	Elf64_Phdr seg;
	long seen = 0;
	size_t i, k;

	if (pread(fd, &head, sizeof(head), 0) != sizeof(head))
		return 0;
	for (k = 0; k < head.e_phnum; k++) {
		if (pread(fd, &seg, sizeof(seg), head.e_phoff +
			  k * sizeof(seg)) != sizeof(seg))
			return 0;
		for (i = 0; i < r->pages; i++) {
			uint64_t addr = (uintptr_t)af_page(r, i);

			if (seg.p_type != PT_LOAD || addr < seg.p_vaddr ||
			    addr >= seg.p_vaddr + seg.p_filesz ||
			    pread(fd, buf, AF_PAGE, seg.p_offset + addr -
				  seg.p_vaddr) != (ssize_t)AF_PAGE)
				continue;
			if (af_check_at(buf, i, 1, SEED))
				return -1;
			seen++;
		}
	}
	return seen;
}

TEST_F(poisoned, dumps_core)
{
	char pattern[256];
	long seen;
	int fd, status;

	if (af_read_file(CORE_PATTERN, pattern, sizeof(pattern)) ||
	    af_write_file(CORE_PATTERN, CORE))
		SKIP(af_kill(&self->sharer); return, "no core dumps");
	unlink(CORE);
	kill(self->sharer.pid, SIGABRT);
	status = af_reap(&self->sharer);
	EXPECT_EQ(0, af_write_file(CORE_PATTERN, pattern));
	EXPECT_TRUE(WIFSIGNALED(status));
	fd = open(CORE, O_RDONLY | O_CLOEXEC);
	ASSERT_GE(fd, 0);
	seen = check_core(fd, &self->r);
	close(fd);
	unlink(CORE);
	TH_LOG("the core file has %ld pages of the region", seen);
	EXPECT_GE(seen, 0);
	if (!self->holes)
		EXPECT_EQ((long)self->r.pages, seen);
}

/*
 * A parent with many tables, whose child is poisoned and which is killed itself
 * while the marks are being lifted. A busy real-time thread on the lifter's CPU
 * makes that slow: the tables go under it.
 */
#define MANY		48
#define ROUNDS		6
#define CPUMASK "/sys/devices/virtual/workqueue/async_fork/cpumask"

FIXTURE(lifter) {
	struct af af;
	struct af_child p, c;
	struct af_region *shared;	/* as P describes it */
	char saved[64];
	pthread_t hog;
	volatile bool stop;
};

FIXTURE_SETUP(lifter)
{
	if (!af_fault_init())
		SKIP(return, AF_NO_FAULTS);
	ASSERT_EQ(0, prctl(PR_SET_CHILD_SUBREAPER, 1));
	self->shared = af_shared(sizeof(*self->shared));
	AF_SETUP(AF_HOLD);
	self->af.spare = ROUNDS;	/* P's own fork, where it is big enough */
	self->af.allow |= AF_ALLOW(AF_POISON);
}

FIXTURE_TEARDOWN(lifter)
{
	AF_FINISH();
}

static int child_link[2];

static long do_make_sparse(const struct af_job *job)
{
	struct af_region *r = (struct af_region *)job->addr;
	size_t i;

	if (af_region_reserve(r, MANY, SEED))
		return 1;
	for (i = 0; i < MANY; i++)
		af_fill(r, af_piece(i), 1, SEED);
	return 0;
}

static long do_fork_served(const struct af_job *job)
{
	pid_t pid = fork();

	(void)job;
	if (!pid)
		af_serve(child_link);
	af_unlink(child_link);
	return pid;
}

static long do_poison(const struct af_job *job)
{
	poison((const struct af_region *)job->addr);
	return 0;
}

static void *be_busy(void *stop)
{
	const struct sched_param first = { .sched_priority = 1 };
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(1, &one);
	if (sched_setaffinity(0, sizeof(one), &one) ||
	    sched_setscheduler(0, SCHED_FIFO, &first))
		return (void *)1;
	while (!*(volatile bool *)stop)
		;
	return NULL;
}

/* P and its child C, both ready. */
static int start_pair(struct af_child *p, struct af_child *c,
		      struct af_region *shared)
{
	if (af_link(c, child_link) || af_spawn_other(p))
		return -1;
	af_unlink(child_link);
	if (af_call(p, do_make_sparse, .addr = (char *)shared))
		return -1;
	c->pid = af_call(p, do_fork_served);
	return c->pid > 0 ? 0 : -1;
}

TEST_F(lifter, is_slow_while_the_parent_dies)
{
	void *failed = NULL;
	int round;

	if (self->af.async) {
		ASSERT_EQ(0, af_read_file(CPUMASK, self->saved,
					  sizeof(self->saved)));
		ASSERT_EQ(0, af_write_file(CPUMASK, "2"));
	}
	for (round = 0; round < ROUNDS; round++) {
		ASSERT_EQ(0, start_pair(&self->p, &self->c, self->shared));
		self->af.want++;
		self->stop = false;
		ASSERT_EQ(0, pthread_create(&self->hog, NULL, be_busy,
					    (void *)&self->stop));
		EXPECT_EQ(0, af_call(&self->p, do_poison,
				     .addr = (char *)self->shared));
		if (round % 3 == 1)
			self->stop = true;
		EXPECT_EQ(SIGKILL, af_kill(&self->p));
		self->stop = true;
		pthread_join(self->hog, &failed);
		EXPECT_EQ(NULL, failed);
		if (self->af.async && self->af.held) {
			EXPECT_EQ(SIGKILL, WTERMSIG(af_reap(&self->c)));
		} else {
			AF_EXIT_OK(&self->c);
		}
	}
	if (!self->af.async)
		return;
	EXPECT_EQ(0, af_write_file(CPUMASK, self->saved));
	if (self->af.held)
		EXPECT_EQ(ROUNDS, af_delta(&self->af, AF_POISON));
}

TEST_HARNESS_MAIN
