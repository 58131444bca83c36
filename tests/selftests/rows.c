// SPDX-License-Identifier: GPL-2.0
/*
 * One call a row: made on one page (or one piece) of what is not copied yet, by
 * the parent and by the child, with the workers held. Each row says how many
 * pieces the call has copied, exactly: a hook that is missing copies less, a
 * call that needs no hook copies nothing. After that both sides are right.
 *
 * docs/hooks-tests.md lists which row of the design's table stands here.
 */
#include <fcntl.h>
#include <limits.h>
#include <linux/mempolicy.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include "harness.h"
#include "mover.h"

#define PIECES	3
#define SEED	0x171UL
#define LATER	0x172UL

#ifndef MADV_COLD
#define MADV_COLD		20
#define MADV_PAGEOUT		21
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ	22
#define MADV_POPULATE_WRITE	23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE		25
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP	4
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA		0x53564d41
#define PR_SET_VMA_ANON_NAME	0
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE	67
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise	440
#endif
#ifndef SYS_set_mempolicy_home_node
#define SYS_set_mempolicy_home_node 450
#endif
#ifndef SYS_mseal
#define SYS_mseal		462
#endif
#ifndef UFFDIO_MOVE
struct uffdio_move {
	__u64 dst, src, len, mode;
	__s64 move;
};
#define UFFDIO_MOVE		_IOWR(UFFDIO, 0x05, struct uffdio_move)
#define UFFD_FEATURE_MOVE	(1 << 16)
#endif

/* A call that this kernel or guest does not have. */
#define CANNOT	(-7777L)

/* What is known before the fork, and so on both sides. */
static struct af_region *region;
static uint64_t pfn_at_fork;

#define LEN(job) ((job)->pages * AF_PAGE)

static long failed(long ret)
{
	if (ret >= 0)
		return 0;
	return errno == ENOSYS || errno == ENOENT ? CANNOT : -errno;
}

/* madvise(2) */

#define ADVICE(name, advice)						\
	static long act_##name(const struct af_job *job)		\
	{								\
		return failed(madvise(job->addr, LEN(job), (advice)));	\
	}

ADVICE(dontneed, MADV_DONTNEED)
ADVICE(free, MADV_FREE)
ADVICE(willneed, MADV_WILLNEED)
ADVICE(cold, MADV_COLD)
ADVICE(pageout, MADV_PAGEOUT)
ADVICE(populate_read, MADV_POPULATE_READ)
ADVICE(populate_write, MADV_POPULATE_WRITE)
ADVICE(mergeable, MADV_MERGEABLE)

/* Advice that is a flag of the VMA: it splits, and merges again. */
static long act_flags(const struct af_job *job)
{
	static const int advice[] = {
		MADV_DONTDUMP, MADV_DODUMP, MADV_DONTFORK, MADV_DOFORK,
		MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_SEQUENTIAL, MADV_RANDOM,
		MADV_NORMAL, MADV_HUGEPAGE, MADV_NOHUGEPAGE,
	};
	size_t i;

	for (i = 0; i < sizeof(advice) / sizeof(advice[0]); i++)
		if (madvise(job->addr, LEN(job), advice[i]))
			return -errno;
	return 0;
}

/*
 * As after a plain fork: nothing in the piece is writable, and so the kernel
 * sees no use in a huge page there.
 */
static long act_collapse(const struct af_job *job)
{
	int i;

	if (madvise(job->addr, LEN(job), MADV_HUGEPAGE))
		return -errno;
	/* Others may hold a page for a moment. */
	for (i = 0; i < 100; i++) {
		if (!madvise(job->addr, LEN(job), MADV_COLLAPSE))
			return 1;
		if (errno != EAGAIN)
			break;
		usleep(1000);
	}
	return errno == EINVAL ? 0 : -errno;
}

/* munmap(2), mmap(2), mremap(2) */

static long act_munmap(const struct af_job *job)
{
	return failed(munmap(job->addr, LEN(job)));
}

static long act_map_fixed(const struct af_job *job)
{
	return mmap(job->addr, LEN(job), PROT_READ | PROT_WRITE, MAP_FIXED |
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != job->addr;
}

/* There and back: the content is as it was. A whole piece moves as a table. */
static long act_mremap(const struct af_job *job)
{
	size_t len = LEN(job);
	uintptr_t to = (uintptr_t)mmap(NULL, 2 * AF_PIECE, PROT_NONE,
				       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *p = mremap(job->addr, len, len, MREMAP_MAYMOVE | MREMAP_FIXED,
			 (void *)((to + AF_PIECE - 1) & ~(AF_PIECE - 1)));

	if (p == MAP_FAILED)
		return -errno;
	return mremap(p, len, len, MREMAP_MAYMOVE | MREMAP_FIXED,
		      job->addr) != job->addr;
}

static long act_dontunmap(const struct af_job *job)
{
	size_t len = LEN(job);
	char *p = mremap(job->addr, len, len, MREMAP_MAYMOVE | MREMAP_DONTUNMAP,
			 NULL);

	return p == MAP_FAILED ? -errno :
		af_check_at(p, job->first, job->pages, SEED);
}

static long act_grow(const struct af_job *job)
{
	size_t len = region->pages * AF_PAGE;

	(void)job;
	if (munmap(region->base + len, 8 * AF_PAGE))
		return -errno;
	return mremap(region->base, len, len + 8 * AF_PAGE, 0) != region->base;
}

/* Shared memory comes and goes in the table that holds the region's tail. */
static long act_shm(const struct af_job *job)
{
	int id = shmget(IPC_PRIVATE, 4 * AF_PAGE, IPC_CREAT | 0600);
	char *p = region->base + (region->pages + 4) * AF_PAGE;

	(void)job;
	if (id < 0)
		return failed(-1);
	if (shmat(id, p, SHM_REMAP) != p)
		return -errno;
	memset(p, 1, 4 * AF_PAGE);
	return shmdt(p) || shmctl(id, IPC_RMID, NULL);
}

/* Rights and locks */

static long act_mprotect(const struct af_job *job)
{
	return mprotect(job->addr, LEN(job), PROT_NONE) ||
	       mprotect(job->addr, LEN(job), PROT_READ | PROT_WRITE);
}

static long act_pkey(const struct af_job *job)
{
	int key = syscall(SYS_pkey_alloc, 0, 0);

	if (key < 0)
		return CANNOT;
	return syscall(SYS_pkey_mprotect, job->addr, LEN(job),
		       PROT_READ | PROT_WRITE, key) ||
	       syscall(SYS_pkey_mprotect, job->addr, LEN(job),
		       PROT_READ | PROT_WRITE, 0);
}

/* Only what is there is locked: nothing is faulted in. */
static long act_mlock(const struct af_job *job)
{
	return syscall(SYS_mlock2, job->addr, LEN(job), MLOCK_ONFAULT) ||
	       munlock(job->addr, LEN(job));
}

static long act_mlockall(const struct af_job *job)
{
	(void)job;
	return mlockall(MCL_CURRENT | MCL_ONFAULT) || munlockall();
}

static long act_seal(const struct af_job *job)
{
	return failed(syscall(SYS_mseal, job->addr, LEN(job), 0));
}

static long act_name(const struct af_job *job)
{
	if (prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, job->addr, LEN(job), "af"))
		return errno == EINVAL ? CANNOT : -errno;
	return 0;
}

/* Policy without a move of pages. */
static long act_home_node(const struct af_job *job)
{
	unsigned long nodes = 1;

	if (syscall(SYS_mbind, job->addr, LEN(job), 2, &nodes,
		    8 * sizeof(nodes), 0))
		return failed(-1);
	return failed(syscall(SYS_set_mempolicy_home_node, job->addr, LEN(job),
			      0, 0));
}

/* userfaultfd */

static int uffd_on(void *addr, size_t len, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	struct uffdio_register reg = {
		.range = { (uintptr_t)addr, len },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && (ioctl(fd, UFFDIO_API, &api) ||
			ioctl(fd, UFFDIO_REGISTER, &reg))) {
		close(fd);
		return -1;
	}
	return fd;
}

static long act_uffd_register(const struct af_job *job)
{
	int fd = uffd_on(job->addr, LEN(job), 0);

	return fd < 0 ? CANNOT : close(fd);
}

/* Out of the region, which is not registered: a shared page does not move. */
static long act_uffd_move(const struct af_job *job)
{
	char *to = mmap(NULL, AF_PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_move move = { .dst = (uintptr_t)to, .len = AF_PAGE,
				    .src = (uintptr_t)job->addr };
	int fd = uffd_on(to, AF_PAGE, UFFD_FEATURE_MOVE), ret;

	if (fd < 0)
		return CANNOT;
	ret = ioctl(fd, UFFDIO_MOVE, &move) ? errno : 0;
	close(fd);
	return ret == EBUSY ? 0 : 1000 + ret;
}

/* KSM, soft-dirty bits */

static long act_merge_any(const struct af_job *job)
{
	(void)job;
	return prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) ? CANNOT : 0;
}

static long act_clear_refs(const struct af_job *job)
{
	(void)job;
	return af_write_file("/proc/self/clear_refs", "4") ? CANNOT : 0;
}

/* References and other people's eyes */

static long act_vm_read(const struct af_job *job)
{
	static char buf[AF_PAGE];
	struct iovec local = { buf, AF_PAGE }, remote = { job->addr, AF_PAGE };

	if (process_vm_readv(getpid(), &local, 1, &remote, 1, 0) !=
	    (ssize_t)AF_PAGE)
		return failed(-1);
	return af_check_at(buf, job->first, 1, SEED);
}

static long act_mem_read(const struct af_job *job)
{
	static char buf[AF_PAGE];
	int fd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	ssize_t got = pread(fd, buf, AF_PAGE, (uintptr_t)job->addr);

	close(fd);
	return got != (ssize_t)AF_PAGE || af_check_at(buf, job->first, 1, SEED);
}

static long act_mem_write(const struct af_job *job)
{
	uint64_t word = af_value(SEED, job->first);
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	ssize_t put = pwrite(fd, &word, 8, (uintptr_t)job->addr);

	close(fd);
	return put != 8;
}

/* The key of a futex that processes share is its page. */
static long act_futex(const struct af_job *job)
{
	return failed(syscall(SYS_futex, job->addr, FUTEX_WAKE, 1, NULL, NULL,
			      0));
}

static long act_vmsplice(const struct af_job *job)
{
	static char buf[AF_PAGE];
	struct iovec iov = { job->addr, AF_PAGE };
	int fd[2];
	long ret;

	if (pipe2(fd, O_CLOEXEC))
		return -errno;
	ret = vmsplice(fd[1], &iov, 1, 0) != (ssize_t)AF_PAGE ||
	      read(fd[0], buf, AF_PAGE) != (ssize_t)AF_PAGE ||
	      af_check_at(buf, job->first, 1, SEED);
	close(fd[0]);
	close(fd[1]);
	return ret;
}

static uint64_t pagemap_entry(const char *addr)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t entry = 0;

	if (pread(fd, &entry, 8, (uintptr_t)addr / AF_PAGE * 8) != 8)
		entry = 0;
	close(fd);
	return entry;
}

static long act_pagemap(const struct af_job *job)
{
	return !(pagemap_entry(job->addr) >> 63);
}

struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask;
	uint64_t return_mask;
};

#define SCAN_PRESENT	(1 << 3)

static long act_pagemap_scan(const struct af_job *job)
{
	uint64_t found[3];
	struct scan_arg arg = {
		.size = sizeof(arg), .start = (uintptr_t)job->addr,
		.end = (uintptr_t)job->addr + LEN(job),
		.vec = (uintptr_t)found, .vec_len = 1,
		.category_mask = SCAN_PRESENT, .return_mask = SCAN_PRESENT,
	};
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int n = ioctl(fd, _IOWR('f', 16, struct scan_arg), &arg);

	close(fd);
	return n < 0 ? CANNOT : n != 1;
}

static long act_mincore(const struct af_job *job)
{
	unsigned char vec = 0;

	return mincore(job->addr, AF_PAGE, &vec) || !(vec & 1);
}

static long act_where(const struct af_job *job)
{
	void *page = job->addr;
	int status = -1;

	if (syscall(SYS_move_pages, 0, 1, &page, NULL, &status, 0))
		return failed(-1);
	return status < 0 ? status : 0;
}

/* To both nodes in turn; with the right to move what others map, too. */
static long act_move(const struct af_job *job)
{
	void *page = job->addr;
	int node, status = -1;

	if (!af_two_nodes())
		return CANNOT;
	for (node = 1; node >= 0; node--) {
		if (syscall(SYS_move_pages, 0, 1, &page, &node, &status, 4) < 0)
			return failed(-1);
		if (status != node)
			return status < 0 ? status : 1;
	}
	return 0;
}

/* All of the caller to node 1; what cannot move is not this page. */
static long act_migrate(const struct af_job *job)
{
	void *page = job->addr;
	int status = -1;

	if (!af_two_nodes())
		return CANNOT;
	if (mover_move(0, 0, 1) < 0 ||
	    syscall(SYS_move_pages, 0, 1, &page, NULL, &status, 0))
		return failed(-1);
	return status == 1 ? 0 : 1;
}

/* The page is on one of the two nodes: one of two strict bindings must fail. */
static long act_bind_strict(const struct af_job *job)
{
	unsigned long nodes;
	int refused = 0;

	if (!af_two_nodes())
		return CANNOT;
	for (nodes = 1; nodes <= 2; nodes++) {
		if (!syscall(SYS_mbind, job->addr, LEN(job), MPOL_BIND, &nodes,
			     64, MPOL_MF_STRICT))
			continue;
		if (errno != EIO)
			return failed(-1);
		refused++;
	}
	if (syscall(SYS_mbind, job->addr, LEN(job), MPOL_DEFAULT, NULL, 0, 0))
		return failed(-1);
	return refused != 1;
}

static long act_smaps(const struct af_job *job)
{
	static const char * const file[] = {
		"smaps", "smaps_rollup", "maps", "numa_maps", "status",
	};
	static char text[1 << 18];
	char path[64];
	size_t i;

	(void)job;
	for (i = 0; i < sizeof(file) / sizeof(file[0]); i++) {
		snprintf(path, sizeof(path), "/proc/self/%s", file[i]);
		if (af_read_file(path, text, sizeof(text)) == -EIO)
			return 1;
	}
	return 0;
}

/* What the kernel does on its own account */

static long act_compact(const struct af_job *job)
{
	(void)job;
	return af_write_file("/proc/sys/vm/compact_memory", "1") ? CANNOT : 0;
}

/* Marks the page idle, and asks whether it still is. */
static long act_idle(const struct af_job *job)
{
	int fd = open("/sys/kernel/mm/page_idle/bitmap", O_RDWR | O_CLOEXEC);
	uint64_t bits = 1ULL << (pfn_at_fork % 64);
	long ret;

	(void)job;
	if (fd < 0 || !pfn_at_fork)
		return CANNOT;
	ret = pwrite(fd, &bits, 8, pfn_at_fork / 64 * 8) != 8 ||
	      pread(fd, &bits, 8, pfn_at_fork / 64 * 8) != 8;
	close(fd);
	return ret;
}

/* One new generation of each control group's pages: MGLRU walks the tables. */
static long age_all(void)
{
	static char text[1 << 18];
	char *line, *save = NULL;
	unsigned int memcg = 0, node = 0;
	unsigned long seq = 0, n;
	long aged = 0;
	char order[64];

	if (af_read_file("/sys/kernel/debug/lru_gen", text, sizeof(text)))
		return 0;
	for (line = strtok_r(text, "\n", &save);; ) {
		char *next = strtok_r(NULL, "\n", &save);
		bool is_gen = line && sscanf(line, " %lu", &n) == 1;

		if (is_gen)
			seq = n;
		else if (line && sscanf(line, "memcg %u", &memcg) != 1)
			sscanf(line, " node %u", &node);
		/* The last generation of a list is the youngest. */
		if (is_gen && (!next || sscanf(next, " %lu", &n) != 1)) {
			snprintf(order, sizeof(order), "+ %u %u %lu 1 1", memcg,
				 node, seq);
			aged += !af_write_file("/sys/kernel/debug/lru_gen",
					       order);
		}
		if (!next)
			return aged;
		line = next;
	}
}

static long act_mglru(const struct af_job *job)
{
	static const char file[] = "/sys/kernel/mm/lru_gen/enabled";
	char saved[32];
	long aged;

	(void)job;
	if (af_read_file(file, saved, sizeof(saved)) ||
	    af_write_file(file, "7"))
		return CANNOT;
	aged = age_all() + age_all();
	af_write_file(file, saved);
	return aged ? 0 : -ENODATA;
}

#define DAMON	"/sys/kernel/mm/damon/admin/kdamonds/"
#define MONITOR	DAMON "0/contexts/0/"

static int damon_set(const char *file, unsigned long value)
{
	char text[32];

	snprintf(text, sizeof(text), "%lu", value);
	return af_write_file(file, text);
}

/* Has the daemon looked for long enough to judge a region? */
static bool damon_judged(void *unused)
{
	char text[32];

	(void)unused;
	return !af_write_file(DAMON "0/state", "update_schemes_stats") &&
	       !af_read_file(MONITOR "schemes/0/stats/nr_tried", text,
			     sizeof(text)) && atol(text) > 0;
}

/* A daemon makes entries old, and looks whether they are still. */
static long act_damon(const struct af_job *job)
{
	unsigned long start = (unsigned long)job->addr & ~(AF_PIECE - 1);
	long ret;

	if (damon_set(DAMON "nr_kdamonds", 1))
		return CANNOT;
	ret = damon_set(DAMON "0/contexts/nr_contexts", 1) ||
	      af_write_file(MONITOR "operations", "vaddr") ||
	      damon_set(MONITOR "monitoring_attrs/intervals/sample_us", 1000) ||
	      damon_set(MONITOR "monitoring_attrs/intervals/aggr_us", 20000) ||
	      damon_set(MONITOR "monitoring_attrs/intervals/update_us",
			3600000000UL) ||
	      damon_set(MONITOR "targets/nr_targets", 1) ||
	      damon_set(MONITOR "targets/0/pid_target", getpid()) ||
	      damon_set(MONITOR "targets/0/regions/nr_regions", 1) ||
	      damon_set(MONITOR "targets/0/regions/0/start", start) ||
	      damon_set(MONITOR "targets/0/regions/0/end", start + AF_PIECE) ||
	      damon_set(MONITOR "schemes/nr_schemes", 1) ||
	      af_write_file(MONITOR "schemes/0/action", "stat") ||
	      damon_set(MONITOR "schemes/0/access_pattern/sz/max", ~0UL) ||
	      damon_set(MONITOR "schemes/0/access_pattern/nr_accesses/max",
			UINT_MAX) ||
	      damon_set(MONITOR "schemes/0/access_pattern/age/max", UINT_MAX) ||
	      af_write_file(DAMON "0/state", "on") ||
	      af_poll(damon_judged, NULL, 20) ||
	      af_write_file(DAMON "0/state", "off");
	damon_set(DAMON "nr_kdamonds", 0);
	return ret;
}

/* Processes that borrow the memory for a while */

static long act_vfork(const struct af_job *job)
{
	char *argv[] = { "true", NULL };
	int status = -1;
	pid_t pid = vfork();

	(void)job;
	if (!pid) {
		execv("/bin/true", argv);
		_exit(127);
	}
	return waitpid(pid, &status, 0) != pid || status;
}

static long act_spawn(const struct af_job *job)
{
	char *argv[] = { "true", NULL };
	int status = -1;
	pid_t pid;

	(void)job;
	if (posix_spawn(&pid, "/bin/true", NULL, NULL, argv, environ))
		return 1;
	return waitpid(pid, &status, 0) != pid || status;
}

/* A third process's advice; job->seed is whom it is for. */
static long other_advises(const struct af_job *job, int advice)
{
	struct iovec iov = { job->addr, LEN(job) };
	int fd = syscall(SYS_pidfd_open, (pid_t)job->seed, 0);
	long ret = syscall(SYS_process_madvise, fd, &iov, 1, advice, 0);

	ret = failed(ret);
	close(fd);
	return ret;
}

#define OTHER(name, advice)						\
	static long act_other_##name(const struct af_job *job)		\
	{								\
		return other_advises(job, (advice));			\
	}

OTHER(cold, MADV_COLD)
OTHER(pageout, MADV_PAGEOUT)
OTHER(willneed, MADV_WILLNEED)

/* What is left of the pages that a call was made on. */
enum left { KEPT, LOST };

FIXTURE(row) {
	struct af af;
	struct af_region r;
	struct af_child c, other;
};

/* parent, child: pieces that the call copies there; lifted: that it discards. */
FIXTURE_VARIANT(row) {
	long (*act)(const struct af_job *job);
	long parent, child, lifted;
	enum left left;
	enum af_kind kind;
	bool whole_piece, third;
};

#define ROW(name, copied_by_parent, copied_by_child, ...)		\
	FIXTURE_VARIANT_ADD(row, name) {				\
		.act = act_##name, .parent = (copied_by_parent),	\
		.child = (copied_by_child), ##__VA_ARGS__ }

/* Change entries, on both sides. */
ROW(dontneed, 1, 1, .left = LOST);
ROW(free, 1, 1, .left = LOST);
ROW(munmap, 1, 1, .left = LOST);
ROW(map_fixed, 1, 1, .left = LOST);
ROW(mremap, 1, 1);
ROW(dontunmap, 1, 1, .left = LOST);
ROW(mprotect, 1, 1);
ROW(pkey, 1, 1);
ROW(mlock, 1, 1);
ROW(mlockall, PIECES, PIECES);
ROW(uffd_register, 1, 1);
ROW(uffd_move, 1, 1);
ROW(collapse, 1, 1, .whole_piece = true);
ROW(mergeable, 1, 1);
ROW(merge_any, PIECES, PIECES);
ROW(clear_refs, PIECES, PIECES);
FIXTURE_VARIANT_ADD(row, dontneed_piece) {
	.act = act_dontneed, .parent = 1, .child = 0, .lifted = 1,
	.left = LOST, .whole_piece = true };
FIXTURE_VARIANT_ADD(row, munmap_piece) {
	.act = act_munmap, .parent = 1, .child = 0, .lifted = 1,
	.left = LOST, .whole_piece = true };
FIXTURE_VARIANT_ADD(row, mremap_piece) {
	.act = act_mremap, .parent = 1, .child = 1, .whole_piece = true };

/* Write or pin. */
ROW(populate_write, 1, 1);
ROW(vm_read, 1, 1);
ROW(mem_write, 1, 1);
ROW(futex, 1, 1);

/* Look: the child must not miss anything, the parent has it all. */
ROW(populate_read, 0, 1);
ROW(mem_read, 0, 1);
ROW(vmsplice, 0, 1);
ROW(pagemap, 0, 1);
ROW(pagemap_scan, 0, 1);
ROW(mincore, 0, 1);
ROW(where, 0, 1);
ROW(move, 0, 1);
ROW(bind_strict, 0, 1);
ROW(migrate, 0, PIECES);

/* Need nothing. */
ROW(flags, 0, 0);
ROW(willneed, 0, 0, .kind = AF_SWAPPED, .whole_piece = true);
ROW(cold, 0, 0, .whole_piece = true);
ROW(pageout, 0, 0, .whole_piece = true);
ROW(grow, 0, 0);
ROW(shm, 0, 0);
ROW(seal, 0, 0);
ROW(name, 0, 0);
ROW(home_node, 0, 0);
ROW(smaps, 0, 0);
ROW(compact, 0, 0);
ROW(idle, 0, 0);
ROW(mglru, 0, 0);
ROW(damon, 0, 0);
ROW(vfork, 0, 0);
ROW(spawn, 0, 0);
ROW(other_cold, 0, 0, .third = true, .whole_piece = true);
ROW(other_pageout, 0, 0, .third = true, .whole_piece = true);
ROW(other_willneed, 0, 0, .third = true, .whole_piece = true,
    .kind = AF_SWAPPED);

FIXTURE_SETUP(row)
{
	ASSERT_EQ(0, af_spawn_other(&self->other));
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	region = &self->r;
	pfn_at_fork = pagemap_entry(af_page(region, af_piece(1) + 5)) &
		((1ULL << 55) - 1);
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(row)
{
	AF_EXIT_OK(&self->c);
	AF_EXIT_OK(&self->other);
	AF_FINISH();
}

#define FIRST (af_piece(1) + (variant->whole_piece ? 0 : 5))
#define PAGES (variant->whole_piece ? AF_PIECE_PAGES : 1)
#define BEHIND (FIRST + PAGES)

#define CALL(target) (&(struct af_job){ .fn = variant->act,		\
	.addr = af_page(&self->r, FIRST), .first = FIRST,		\
	.pages = PAGES, .seed = (target) })

#define COPIED(by_parent, by_child, discarded) do {			\
	if (!self->af.held)						\
		break;							\
	EXPECT_EQ((by_parent), af_delta(&self->af, AF_PIECE_PARENT));	\
	EXPECT_EQ((by_child), af_delta(&self->af, AF_PIECE_CHILD));	\
	EXPECT_EQ((discarded), af_delta(&self->af, AF_PIECE_LIFTED));	\
	EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_WORKER));		\
} while (0)

/* All of the region, but not what the call may have dropped. */
static long check_kept(const struct af_job *job)
{
	long wrong = af_check(region, 0, job->first, job->seed) +
		af_check(region, job->first + job->pages, region->pages -
			 job->first - job->pages, job->seed);

	if ((enum left)(uintptr_t)job->addr == KEPT)
		wrong += af_check(region, job->first, job->pages, job->seed);
	return wrong;
}

static long fill_kept(const struct af_job *job)
{
	af_fill(region, 0, job->first, job->seed);
	af_fill(region, job->first + job->pages, region->pages - job->first -
		job->pages, job->seed);
	if ((enum left)(uintptr_t)job->addr == KEPT)
		af_fill(region, job->first, job->pages, job->seed);
	return check_kept(job);
}

#define KEPT_JOB(function, s) (&(struct af_job){ .fn = (function),	\
	.addr = (char *)(uintptr_t)variant->left, .first = FIRST,	\
	.pages = PAGES, .seed = (s) })

TEST_F(row, by_parent)
{
	long ret = variant->third ? af_run(&self->other, CALL(getpid())) :
				    variant->act(CALL(0));

	if (ret == CANNOT)
		SKIP(return, "this kernel or guest cannot do that");
	EXPECT_EQ(0, ret);
	COPIED(variant->parent, 0, 0);
	EXPECT_EQ(0, check_kept(KEPT_JOB(NULL, SEED)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, fill_kept(KEPT_JOB(NULL, LATER)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

TEST_F(row, by_child)
{
	long ret = af_run(variant->third ? &self->other : &self->c,
			  CALL(self->c.pid));

	if (ret == CANNOT)
		SKIP(return, "this kernel or guest cannot do that");
	EXPECT_EQ(0, ret);
	COPIED(0, variant->child, variant->lifted);
	EXPECT_EQ(0, af_check_all(&self->r));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_run(&self->c, KEPT_JOB(check_kept, SEED)));
	EXPECT_EQ(0, af_run(&self->c, KEPT_JOB(fill_kept, LATER + 1)));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
}

TEST_HARNESS_MAIN
