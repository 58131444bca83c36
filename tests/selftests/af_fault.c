// SPDX-License-Identifier: GPL-2.0
/* Allocations that fail on demand, by the kernel's fault injection. */
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "af.h"

#define SLAB	"/sys/kernel/debug/failslab/"
#define PAGES	"/sys/kernel/debug/fail_page_alloc/"

static int set_number(const char *path, long number)
{
	char text[32];

	snprintf(text, sizeof(text), "%ld", number);
	return af_write_file(path, text);
}

/*
 * On its way back to user space the kernel writes to a thread's rseq area, if
 * the thread was preempted. Should that be a copy-on-write fault, and its
 * allocation be the one that fails, then it sends SIGSEGV, whoever forked how.
 * The area's length is the C library's business: 32 bytes, or what it says.
 */
static void forget_rseq(void)
{
	void *area = (char *)__builtin_thread_pointer() + __rseq_offset;

	if (__rseq_size && syscall(SYS_rseq, area, 32, RSEQ_FLAG_UNREGISTER,
				   RSEQ_SIG))
		syscall(SYS_rseq, area, __rseq_size, RSEQ_FLAG_UNREGISTER,
			RSEQ_SIG);
}

/*
 * Lets allocations that may sleep fail, too, and says nothing about them.
 * Nothing fails before one of the calls below.
 */
bool af_fault_init(void)
{
	forget_rseq();
	if (access(SLAB "probability", W_OK) ||
	    access(PAGES "probability", W_OK) ||
	    access("/proc/thread-self/fail-nth", W_OK))
		return false;
	return !set_number(SLAB "verbose", 0) &&
	       !set_number(PAGES "verbose", 0) &&
	       !set_number(SLAB "probability", 0) &&
	       !set_number(PAGES "probability", 0) &&
	       !set_number(SLAB "ignore-gfp-wait", 0) &&
	       !set_number(PAGES "ignore-gfp-wait", 0) &&
	       !set_number(PAGES "ignore-gfp-highmem", 0) &&
	       !set_number(PAGES "min-order", 0) &&
	       !set_number(PAGES "task-filter", 1);
}

/*
 * The @nth allocation that the calling thread makes from now on fails. Returns
 * what af_fault_disarm() wants: a file that is open already.
 */
int af_fault_arm(unsigned int nth)
{
	int fd = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);

	if (fd >= 0)
		dprintf(fd, "%u", nth);
	return fd;
}

/* Returns whether that allocation has been made, and has failed. */
bool af_fault_disarm(int fd)
{
	char left[16] = "";
	bool failed = pread(fd, left, sizeof(left) - 1, 0) > 0 && !atoi(left);

	if (write(fd, "0", 1) != 1)
		perror("# /proc/thread-self/fail-nth");
	close(fd);
	return failed;
}

static int probability = -1;

/*
 * As af_fault_arm(), and the slab allocation behind that one fails, too, as
 * kvmalloc() tries twice. Ends with af_fault_disarm_two(), which opens nothing:
 * that could fail.
 */
int af_fault_arm_two(unsigned int nth)
{
	int fd = af_fault_arm(0);

	probability = open(SLAB "probability", O_WRONLY | O_CLOEXEC);
	if (probability < 0 || set_number(SLAB "task-filter", 1) ||
	    set_number(SLAB "times", 2) ||
	    af_write_file("/proc/thread-self/make-it-fail", "1") ||
	    fd < 0 || write(probability, "100", 3) != 3)
		return -1;
	dprintf(fd, "%u", nth);
	return fd;
}

bool af_fault_disarm_two(int fd)
{
	bool failed;

	if (write(probability, "0", 1) != 1)
		perror("# failslab/probability");
	close(probability);
	failed = af_fault_disarm(fd);
	af_write_file("/proc/thread-self/make-it-fail", "0");
	return failed;
}

static int populate_segments(struct dl_phdr_info *info, size_t size, void *arg)
{
	int i;

	(void)size;
	(void)arg;
	for (i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *ph = &info->dlpi_phdr[i];
		uintptr_t from = info->dlpi_addr + ph->p_vaddr;
		uintptr_t start = from & -AF_PAGE;

		if (ph->p_type != PT_LOAD || ph->p_flags & PF_W)
			continue;
		/* The vDSO cannot be populated, and is not called here. */
		madvise((void *)start, from + ph->p_memsz - start,
			MADV_POPULATE_READ);
	}
	return 0;
}

/*
 * What the kernel tries again for ever, as long as it cannot be had, must end: a
 * fault for want of a page table (VM_FAULT_OOM), a change of a maple tree that
 * got some of the nodes it wants (mas_nomem()).
 */
#define ALL	4096

/*
 * The same as below, but for the allocations that @spared names. Whatever the
 * call touches in passing has its page table before. What shares a table with
 * what differs from start to start. fork() does not copy the tables of the
 * program's code; the stack may end one anywhere, and so may the thread's own
 * variables, of which errno is far from all others and is not written before a
 * call fails. The programs are linked with -z now, so no symbol is looked up.
 */
static int fault_pages(const char *spared, long times)
{
	volatile char deep[32 << 10];
	size_t i;
	int fd;

	dl_iterate_phdr(populate_segments, NULL);
	errno = 0;
	for (i = 0; i < sizeof(deep); i += AF_PAGE)
		deep[i] = 0;
	if (set_number(spared, 1) ||
	    set_number(PAGES "times", times < 0 ? ALL : times) ||
	    set_number(PAGES "probability", 100))
		return -1;
	fd = open("/proc/thread-self/make-it-fail", O_WRONLY | O_CLOEXEC);
	if (fd >= 0 && write(fd, "1", 1) != 1)
		perror("# /proc/thread-self/make-it-fail");
	return fd;
}

/*
 * The next @times pages that the calling thread allocates for the kernel's own
 * use, such as page tables, cannot be had; -1: none can, but see ALL. Pages for
 * user memory are spared. Returns what af_fault_pages_end() wants.
 */
int af_fault_tables(long times)
{
	return fault_pages(PAGES "ignore-gfp-highmem", times);
}

/* The same for all pages that the thread must have without a sleep. */
int af_fault_atomic(void)
{
	return fault_pages(PAGES "ignore-gfp-wait", -1);
}

void af_fault_pages_end(int fd)
{
	if (write(fd, "0", 1) != 1)
		perror("# /proc/thread-self/make-it-fail");
	close(fd);
	set_number(PAGES "probability", 0);
	set_number(PAGES "ignore-gfp-highmem", 0);
	set_number(PAGES "ignore-gfp-wait", 0);
}
