// SPDX-License-Identifier: GPL-2.0
/*
 * The kernel as the user of memory that is not copied yet: system calls that
 * read and write it, and those that look at another process's memory, or say
 * what is there.
 *
 * Guards follow_page_mask(), handle_mm_fault(), pagemap_read(),
 * do_pagemap_scan() and do_mincore().
 */
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/mman.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include "harness.h"

#define PIECES	3
#define SEED	0xa1UL
#define LATER	0xa2UL

FIXTURE(access) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_VARIANT(access) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(access, base) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(access, race) { .kind = AF_BASE, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(access, pte_thp) { .kind = AF_PTE_THP, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(access, swapped) { .kind = AF_SWAPPED, .hold = AF_HOLD };

FIXTURE_SETUP(access)
{
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	AF_SETUP(variant->hold);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(access)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/* The pages that system calls work on: across a table's border. */
#define FIRST	(AF_HEAD + AF_PIECE_PAGES - 20)
#define PAGES	60UL

#define JOB(function, s) (&(struct af_job) { .fn = (function),		\
	.addr = af_page(&self->r, FIRST), .first = FIRST,		\
	.pages = PAGES, .seed = (s) })

/* A memfd with the pattern of @seed. */
static int pattern_file(size_t first, size_t pages, uint64_t seed)
{
	int fd = memfd_create("pattern", MFD_CLOEXEC);
	char *p;

	if (fd < 0 || ftruncate(fd, pages * AF_PAGE))
		return -1;
	p = mmap(NULL, pages * AF_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		 0);
	if (p == MAP_FAILED)
		return -1;
	af_fill_at(p, first, pages, seed);
	munmap(p, pages * AF_PAGE);
	return fd;
}

/* Checks that file @fd holds the pattern of @seed. */
static long check_file(int fd, const struct af_job *job)
{
	size_t len = job->pages * AF_PAGE;
	char *p = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, 0);
	long wrong;

	if (p == MAP_FAILED)
		return -1;
	wrong = af_check_at(p, job->first, job->pages, job->seed);
	munmap(p, len);
	return wrong;
}

/* read(2) puts the pattern of job->seed into the memory. */
static long do_read(const struct af_job *job)
{
	size_t len = job->pages * AF_PAGE;
	int fd = pattern_file(job->first, job->pages, job->seed);
	ssize_t got = pread(fd, job->addr, len, 0);

	close(fd);
	return got != (ssize_t)len || af_do_check(job);
}

/* write(2) takes it from there. */
static long do_write(const struct af_job *job)
{
	size_t len = job->pages * AF_PAGE;
	int fd = memfd_create("written", MFD_CLOEXEC);
	ssize_t put = write(fd, job->addr, len);
	long wrong = put == (ssize_t)len ? check_file(fd, job) : -1;

	close(fd);
	return wrong;
}

/* Through a socket, page by page: copies with page faults switched off first. */
static long do_socket(const struct af_job *job)
{
	static char buf[AF_PAGE] __attribute__((aligned(4096)));
	long wrong = 0;
	size_t i;
	int fd[2];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, fd))
		return -1;
	for (i = 0; i < job->pages; i++) {
		if (send(fd[0], job->addr + i * AF_PAGE, AF_PAGE, 0) !=
		    (ssize_t)AF_PAGE ||
		    recv(fd[1], buf, AF_PAGE, MSG_WAITALL) != (ssize_t)AF_PAGE)
			wrong++;
		wrong += af_check_at(buf, job->first + i, 1, job->seed);
	}
	close(fd[0]);
	close(fd[1]);
	return wrong;
}

TEST_F(access, parent_read_syscall)
{
	EXPECT_EQ(0, do_read(JOB(NULL, LATER)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

TEST_F(access, child_read_syscall)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_read, LATER)));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, FIRST, SEED));
}

TEST_F(access, write_syscall)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_write, SEED)));
	EXPECT_EQ(0, do_write(JOB(NULL, SEED)));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_run(&self->c, JOB(do_write, SEED)));
}

TEST_F(access, socket)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_socket, SEED)));
	EXPECT_EQ(0, do_socket(JOB(NULL, SEED)));
}

/* process_vm_readv/writev of @pid at the same address as ours. */
static long vm_check(pid_t pid, const struct af_job *job)
{
	size_t len = job->pages * AF_PAGE;
	struct iovec remote = { job->addr, len }, local = { malloc(len), len };
	long wrong = -1;

	if (process_vm_readv(pid, &local, 1, &remote, 1, 0) == (ssize_t)len)
		wrong = af_check_at(local.iov_base, job->first, job->pages,
				    job->seed);
	free(local.iov_base);
	return wrong;
}

static long vm_fill(pid_t pid, const struct af_job *job)
{
	size_t len = job->pages * AF_PAGE;
	struct iovec remote = { job->addr, len }, local = { malloc(len), len };
	long ret;

	af_fill_at(local.iov_base, job->first, job->pages, job->seed);
	ret = process_vm_writev(pid, &local, 1, &remote, 1, 0) != (ssize_t)len;
	free(local.iov_base);
	return ret;
}

static long do_vm_check_parent(const struct af_job *job)
{
	return vm_check(getppid(), job);
}

static long do_vm_fill_parent(const struct af_job *job)
{
	return vm_fill(getppid(), job);
}

TEST_F(access, process_vm_read)
{
	EXPECT_EQ(0, vm_check(self->c.pid, JOB(NULL, SEED)));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_vm_check_parent, SEED)));
}

TEST_F(access, process_vm_write_to_child)
{
	EXPECT_EQ(0, vm_fill(self->c.pid, JOB(NULL, LATER)));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, FIRST, PAGES, LATER));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, FIRST, SEED));
}

TEST_F(access, process_vm_write_to_parent)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_vm_fill_parent, LATER)));
	EXPECT_EQ(0, af_check(&self->r, FIRST, PAGES, LATER));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

static int open_mem(pid_t pid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	return open(path, O_RDWR | O_CLOEXEC);
}

/* /proc/PID/mem: reads what @want says, then writes the pattern of @put. */
static long mem_check_fill(pid_t pid, const struct af_job *job, uint64_t put)
{
	size_t len = job->pages * AF_PAGE;
	char *buf = malloc(len);
	int fd = open_mem(pid);
	long wrong = -1;

	if (pread(fd, buf, len, (uintptr_t)job->addr) == (ssize_t)len)
		wrong = af_check_at(buf, job->first, job->pages, job->seed);
	af_fill_at(buf, job->first, job->pages, put);
	if (pwrite(fd, buf, len, (uintptr_t)job->addr) != (ssize_t)len)
		wrong = -1;
	close(fd);
	free(buf);
	return wrong;
}

static long do_mem_of_parent(const struct af_job *job)
{
	return mem_check_fill(getppid(), job, LATER);
}

TEST_F(access, proc_mem_of_child)
{
	EXPECT_EQ(0, mem_check_fill(self->c.pid, JOB(NULL, SEED), LATER));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, FIRST, PAGES, LATER));
}

TEST_F(access, proc_mem_of_parent)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_mem_of_parent, SEED)));
	EXPECT_EQ(0, af_check(&self->r, FIRST, PAGES, LATER));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

/* FOLL_FORCE through a read-only VMA: a write that mprotect() forbids. */
TEST_F(access, proc_mem_forces_read_only)
{
	ASSERT_EQ(0, mprotect(self->r.base, self->r.pages * AF_PAGE, PROT_READ));
	EXPECT_EQ(0, mem_check_fill(getpid(), JOB(NULL, SEED), LATER));
	EXPECT_EQ(0, af_check(&self->r, FIRST, PAGES, LATER));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

/* Stops @pid, reads a word of each page, and writes one of another seed. */
static long trace(pid_t pid, const struct af_job *job, uint64_t put)
{
	long wrong = 0;
	size_t i;

	if (ptrace(PTRACE_SEIZE, pid, NULL, NULL) ||
	    ptrace(PTRACE_INTERRUPT, pid, NULL, NULL) ||
	    waitpid(pid, NULL, __WALL) != pid)
		return -1;
	for (i = 0; i < job->pages; i++) {
		char *p = job->addr + i * AF_PAGE;
		uint64_t v = af_value(put, job->first + i);

		errno = 0;
		wrong += (uint64_t)ptrace(PTRACE_PEEKDATA, pid, p, NULL) !=
			af_value(job->seed, job->first + i) || errno;
		wrong += !!ptrace(PTRACE_POKEDATA, pid, p, v);
		wrong += !!ptrace(PTRACE_POKEDATA, pid, p + AF_PAGE - 8, v);
	}
	wrong += !!ptrace(PTRACE_DETACH, pid, NULL, NULL);
	return wrong;
}

static long do_trace_parent(const struct af_job *job)
{
	return trace(getppid(), job, LATER);
}

TEST_F(access, ptrace_child)
{
	EXPECT_EQ(0, trace(self->c.pid, JOB(NULL, SEED), LATER));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, FIRST, PAGES, LATER));
}

TEST_F(access, ptrace_parent)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_trace_parent, SEED)));
	EXPECT_EQ(0, af_check(&self->r, FIRST, PAGES, LATER));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

/* Pages of @pid's memory that pagemap calls neither present nor swapped. */
static long pagemap_holes(pid_t pid, const struct af_region *r)
{
	uint64_t entry[256];
	char path[64];
	long holes = 0;
	size_t i, n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	for (i = 0; i < r->pages; i += n) {
		n = r->pages - i < 256 ? r->pages - i : 256;
		if (pread(fd, entry, n * 8, (uintptr_t)af_page(r, i) / AF_PAGE *
			  8) != (ssize_t)n * 8)
			return -1;
		for (size_t k = 0; k < n; k++)
			holes += !(entry[k] >> 62);
	}
	close(fd);
	return holes;
}

static long do_pagemap(const struct af_job *job)
{
	return pagemap_holes(getpid(), (struct af_region *)job->addr);
}

TEST_F(access, pagemap_of_child)
{
	EXPECT_EQ(0, pagemap_holes(self->c.pid, &self->r));
	EXPECT_EQ(0, pagemap_holes(getpid(), &self->r));
}

TEST_F(access, pagemap_in_child)
{
	EXPECT_EQ(0, af_call(&self->c, do_pagemap, .addr = (char *)&self->r));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

/* PAGEMAP_SCAN of Linux 6.7, which Debian 12's headers lack. */
struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask;
	uint64_t return_mask;
};

struct scan_region {
	uint64_t start, end, categories;
};

#define SCAN		_IOWR('f', 16, struct scan_arg)
#define SCAN_PRESENT	(1 << 3)
#define SCAN_SWAPPED	(1 << 4)

/* Returns how many pages of the region are there, by PAGEMAP_SCAN. */
static long do_pagemap_scan(const struct af_job *job)
{
	const struct af_region *r = (const struct af_region *)job->addr;
	static struct scan_region found[4096];
	struct scan_arg arg = {
		.size = sizeof(arg), .start = (uintptr_t)r->base,
		.end = (uintptr_t)af_page(r, r->pages),
		.vec = (uintptr_t)found, .vec_len = 4096,
		.category_anyof_mask = SCAN_PRESENT | SCAN_SWAPPED,
		.return_mask = SCAN_PRESENT | SCAN_SWAPPED,
	};
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int i, n = ioctl(fd, SCAN, &arg);
	long pages = 0;

	close(fd);
	for (i = 0; i < n; i++)
		pages += (found[i].end - found[i].start) / AF_PAGE;
	return n < 0 ? -errno : pages;
}

TEST_F(access, pagemap_scan_in_child)
{
	long seen = af_call(&self->c, do_pagemap_scan, .addr = (char *)&self->r);

	if (seen == -ENOTTY)
		SKIP(return, "the kernel has no PAGEMAP_SCAN");
	EXPECT_EQ((long)self->r.pages, seen);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

static long do_mincore(const struct af_job *job)
{
	static unsigned char vec[8192];
	long absent = 0;
	size_t i;

	if (mincore(job->addr, job->pages * AF_PAGE, vec))
		return -1;
	for (i = 0; i < job->pages; i++)
		absent += !(vec[i] & 1);
	return absent;
}

TEST_F(access, mincore_in_child)
{
	if (variant->kind == AF_SWAPPED)
		SKIP(return, "mincore() asks for resident pages");
	EXPECT_EQ(0, af_call(&self->c, do_mincore, .addr = self->r.base,
			     .pages = self->r.pages));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

/* FUTEX_WAIT compares with what the kernel reads: the fork-time word. */
static long do_futex(const struct af_job *job)
{
	const struct timespec now = { 0 };
	uint32_t value = (uint32_t)af_value(job->seed, job->first);

	errno = 0;
	syscall(SYS_futex, job->addr, FUTEX_WAIT, value, &now, NULL, 0);
	return errno != ETIMEDOUT;
}

TEST_F(access, futex)
{
	EXPECT_EQ(0, af_run(&self->c, JOB(do_futex, SEED)));
	EXPECT_EQ(0, do_futex(JOB(NULL, SEED)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

static void on_signal(int sig)
{
	(void)sig;
}

/* The kernel writes a signal frame into the memory. */
static long do_signal_stack(const struct af_job *job)
{
	struct sigaction act = { .sa_handler = on_signal,
				 .sa_flags = SA_ONSTACK };
	stack_t stack = { .ss_sp = job->addr, .ss_size = job->pages * AF_PAGE };
	stack_t off = { .ss_flags = SS_DISABLE };

	if (sigaltstack(&stack, NULL) || sigaction(SIGUSR1, &act, NULL))
		return -1;
	raise(SIGUSR1);
	return sigaltstack(&off, NULL);
}

TEST_F(access, signal_stack)
{
	EXPECT_EQ(0, do_signal_stack(JOB(NULL, 0)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_signal_stack, 0)));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, FIRST, SEED));
	EXPECT_EQ(0, af_check(&self->r, 0, FIRST, SEED));
}

static long do_populate(const struct af_job *job)
{
	return madvise(job->addr, job->pages * AF_PAGE, (int)job->first);
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ	22
#define MADV_POPULATE_WRITE	23
#endif

TEST_F(access, madv_populate)
{
	struct af_job job = { .addr = self->r.base, .pages = self->r.pages,
			      .fn = do_populate, .first = MADV_POPULATE_READ };

	EXPECT_EQ(0, af_run(&self->c, &job));
	job.first = MADV_POPULATE_WRITE;
	EXPECT_EQ(0, do_populate(&job));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_run(&self->c, &job));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check_all(&self->r));
}

/* smaps shows what the child has so far; to look must not disturb. */
TEST_F(access, smaps)
{
	static char text[1 << 20];
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/smaps", self->c.pid);
	EXPECT_EQ(0, af_read_file(path, text, sizeof(text)));
	EXPECT_EQ(0, af_read_file("/proc/self/smaps", text, sizeof(text)));
	af_read_file("/proc/self/numa_maps", text, sizeof(text));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check_all(&self->r));
}

TEST_HARNESS_MAIN
