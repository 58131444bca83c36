// SPDX-License-Identifier: GPL-2.0
/*
 * Pages that the kernel or a device holds by reference: O_DIRECT, vmsplice(),
 * io_uring's registered buffers; before the fork, during it, and while the
 * session is open.
 *
 * Guards gup_fast_pmd_range(), follow_page_mask() and the test of
 * MMF_HAS_PINNED inside the raised write_protect_seq.
 */
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include "harness.h"

#define PIECES	4
#define SEED	0xc1UL
#define LATER	0xc2UL

/* The pages of a transfer: across the border of two tables. */
#define FIRST	(AF_HEAD + AF_PIECE_PAGES - 8)
#define PAGES	16UL
#define LEN	(PAGES * AF_PAGE)

/* A block device that honours O_DIRECT and whose content nobody needs. */
#define RAM_DISK "/dev/ram0"

/*
 * One registered buffer and one request at a time; no rings are mapped but
 * those that such a request needs.
 */
struct ring {
	int fd;
	struct io_uring_params p;
	char *sq, *cq;
	struct io_uring_sqe *sqes;
};

static int ring_open(struct ring *r)
{
	size_t sq_len, cq_len;

	memset(r, 0, sizeof(*r));
	r->fd = syscall(SYS_io_uring_setup, 4, &r->p);
	if (r->fd < 0)
		return -errno;
	sq_len = r->p.sq_off.array + r->p.sq_entries * sizeof(uint32_t);
	cq_len = r->p.cq_off.cqes +
		r->p.cq_entries * sizeof(struct io_uring_cqe);
	r->sq = mmap(NULL, sq_len, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd,
		     IORING_OFF_SQ_RING);
	r->cq = mmap(NULL, cq_len, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd,
		     IORING_OFF_CQ_RING);
	r->sqes = mmap(NULL, r->p.sq_entries * sizeof(struct io_uring_sqe),
		       PROT_READ | PROT_WRITE, MAP_SHARED, r->fd,
		       IORING_OFF_SQES);
	if (r->sq == MAP_FAILED || r->cq == MAP_FAILED ||
	    (void *)r->sqes == MAP_FAILED)
		return -ENOMEM;
	return 0;
}

static int ring_register(struct ring *r, void *addr, size_t len)
{
	struct iovec iov = { addr, len };

	return syscall(SYS_io_uring_register, r->fd, IORING_REGISTER_BUFFERS,
		       &iov, 1) < 0 ? -errno : 0;
}

/* Reads @len bytes from offset 0 of @file into the registered buffer. */
static long ring_read_fixed(struct ring *r, int file, void *addr, size_t len)
{
	uint32_t *tail = (uint32_t *)(r->sq + r->p.sq_off.tail);
	uint32_t *head = (uint32_t *)(r->cq + r->p.cq_off.head);
	uint32_t mask = *(uint32_t *)(r->sq + r->p.sq_off.ring_mask);
	uint32_t slot = *tail & mask;
	struct io_uring_cqe *cqe;

	r->sqes[slot] = (struct io_uring_sqe){
		.opcode = IORING_OP_READ_FIXED, .fd = file,
		.addr = (uintptr_t)addr, .len = len,
	};
	((uint32_t *)(r->sq + r->p.sq_off.array))[slot] = slot;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, r->fd, 1, 1, IORING_ENTER_GETEVENTS,
		    NULL, 0) < 0)
		return -errno;
	cqe = (struct io_uring_cqe *)(r->cq + r->p.cq_off.cqes) + (*head &
		*(uint32_t *)(r->cq + r->p.cq_off.ring_mask));
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return cqe->res;
}

/* A memfd whose pages hold the pattern of @seed from page @first on. */
static int pattern_file(size_t first, size_t pages, uint64_t seed)
{
	char *buf = malloc(pages * AF_PAGE);
	int fd = memfd_create("pattern", MFD_CLOEXEC);

	af_fill_at(buf, first, pages, seed);
	if (pwrite(fd, buf, pages * AF_PAGE, 0) != (ssize_t)(pages * AF_PAGE))
		fd = -1;
	free(buf);
	return fd;
}

/* The RAM disk with the pattern of @seed at its start, or -1. */
static int pattern_disk(size_t first, size_t pages, uint64_t seed)
{
	size_t len = pages * AF_PAGE;
	void *buf = mmap(NULL, len, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int fd = open(RAM_DISK, O_RDWR | O_DIRECT | O_CLOEXEC);

	if (fd < 0)
		return -1;
	af_fill_at(buf, first, pages, seed);
	if (pwrite(fd, buf, len, 0) != (ssize_t)len) {
		close(fd);
		fd = -1;
	}
	munmap(buf, len);
	return fd;
}

FIXTURE(gup) {
	struct af af;
	struct af_region r;
	struct af_child c;
	struct ring ring;
	char *buf;	/* what the transfers of the tests work on */
};

FIXTURE_VARIANT(gup) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(gup, base) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(gup, race) { .kind = AF_BASE, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(gup, pte_thp) { .kind = AF_PTE_THP, .hold = AF_HOLD };

FIXTURE_SETUP(gup)
{
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	self->buf = af_page(&self->r, FIRST);
	AF_SETUP(variant->hold);
}

FIXTURE_TEARDOWN(gup)
{
	AF_FINISH();
}

/* A fork that must take the plain path, because something was pinned once. */
#define EXPECT_PINNED_FALLBACK() do {					\
	self->af.allow |= AF_ALLOW(AF_FB_PINNED);			\
	ASSERT_EQ(0, af_spawn_other(&self->c));				\
	if (self->af.async)						\
		EXPECT_EQ(1, af_delta(&self->af, AF_FB_PINNED));	\
	af_fill(&self->r, 0, self->r.pages, LATER + 1);			\
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, FIRST, SEED));\
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, FIRST, PAGES,	\
				    LATER));				\
	AF_EXIT_OK(&self->c);						\
} while (0)

/*
 * DESIGN.md section 9, item 11: one O_DIRECT read makes every later fork
 * plain, counted under its own reason.
 */
TEST_F(gup, o_direct_before_fork)
{
	int fd = pattern_disk(FIRST, PAGES, LATER);

	if (fd < 0)
		SKIP(return, "no " RAM_DISK);
	ASSERT_EQ((ssize_t)LEN, pread(fd, self->buf, LEN, 0));
	EXPECT_PINNED_FALLBACK();
}

static long do_direct_write(const struct af_job *job)
{
	int fd = open(RAM_DISK, O_RDWR | O_DIRECT | O_CLOEXEC);
	ssize_t put = pwrite(fd, job->addr, LEN, 0);
	char *buf;
	long wrong;

	if (put != (ssize_t)LEN)
		return -1;
	buf = mmap(NULL, LEN, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pread(fd, buf, LEN, 0) != (ssize_t)LEN)
		return -1;
	wrong = af_check_at(buf, job->first, PAGES, job->seed);
	munmap(buf, LEN);
	close(fd);
	return wrong;
}

static long do_direct_read(const struct af_job *job)
{
	int fd = open(RAM_DISK, O_RDONLY | O_DIRECT | O_CLOEXEC);
	ssize_t got = pread(fd, job->addr, LEN, 0);

	close(fd);
	return got != (ssize_t)LEN || af_do_check(job);
}

#define CHILD(fn, s) af_call(&self->c, fn, .addr = self->buf,		\
			     .first = FIRST, .pages = PAGES, .seed = (s))

/* The device writes into a page that the snapshot still needs. */
TEST_F(gup, o_direct_read_by_parent)
{
	int fd;

	if (access(RAM_DISK, W_OK))
		SKIP(return, "no " RAM_DISK);
	AF_SPAWN(&self->c);
	fd = pattern_disk(FIRST, PAGES, LATER);
	ASSERT_GE(fd, 0);
	ASSERT_EQ((ssize_t)LEN, pread(fd, self->buf, LEN, 0));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, FIRST, PAGES, LATER));
	AF_EXIT_OK(&self->c);
}

TEST_F(gup, o_direct_by_child)
{
	int fd;

	if (access(RAM_DISK, W_OK))
		SKIP(return, "no " RAM_DISK);
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, CHILD(do_direct_write, SEED));
	fd = pattern_disk(FIRST, PAGES, LATER);
	ASSERT_GE(fd, 0);
	EXPECT_EQ(0, CHILD(do_direct_read, LATER));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, FIRST, SEED));
	AF_EXIT_OK(&self->c);
}

/* Puts the pages into a pipe by reference, writes them, reads the pipe. */
static long vmsplice_check(const struct af_job *job, bool overwrite)
{
	struct iovec iov = { job->addr, LEN };
	static char buf[LEN] __attribute__((aligned(4096)));
	int fd[2];
	long wrong = -1;

	if (pipe2(fd, O_CLOEXEC))
		return -1;
	if (vmsplice(fd[1], &iov, 1, 0) == (ssize_t)LEN) {
		if (overwrite)
			af_fill_at(job->addr, job->first, PAGES, LATER);
		wrong = read(fd[0], buf, LEN) != (ssize_t)LEN ||
			af_check_at(buf, job->first, PAGES, job->seed);
	}
	close(fd[0]);
	close(fd[1]);
	return wrong;
}

static long do_vmsplice(const struct af_job *job)
{
	return vmsplice_check(job, false);
}

#define JOB(s) (&(struct af_job){ .addr = self->buf, .first = FIRST,	\
				  .pages = PAGES, .seed = (s) })

/*
 * A reference to an uncopied page, then a write: as after a plain fork, the
 * pipe keeps the page that the child has, and the parent gets a new one.
 */
TEST_F(gup, vmsplice_by_parent)
{
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, vmsplice_check(JOB(SEED), true));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, FIRST, PAGES, LATER));
	AF_EXIT_OK(&self->c);
}

TEST_F(gup, vmsplice_by_child)
{
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, CHILD(do_vmsplice, SEED));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, CHILD(do_vmsplice, SEED));
	AF_EXIT_OK(&self->c);
}

TEST_F(gup, io_uring_before_fork)
{
	int fd = pattern_file(FIRST, PAGES, LATER);

	if (ring_open(&self->ring))
		SKIP(return, "no io_uring");
	ASSERT_EQ(0, ring_register(&self->ring, self->buf, LEN));
	ASSERT_EQ((long)LEN, ring_read_fixed(&self->ring, fd, self->buf, LEN));
	EXPECT_PINNED_FALLBACK();
}

/* Registered while the session is open: pinned, then written through the pin. */
TEST_F(gup, io_uring_by_parent)
{
	int fd = pattern_file(FIRST, PAGES, LATER);

	if (ring_open(&self->ring))
		SKIP(return, "no io_uring");
	AF_SPAWN(&self->c);
	ASSERT_EQ(0, ring_register(&self->ring, self->buf, LEN));
	ASSERT_EQ((long)LEN, ring_read_fixed(&self->ring, fd, self->buf, LEN));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, FIRST, PAGES, LATER));
	AF_EXIT_OK(&self->c);
}

static long do_uring(const struct af_job *job)
{
	int fd = pattern_file(job->first, PAGES, job->seed);
	struct ring ring;

	if (ring_open(&ring) || ring_register(&ring, job->addr, LEN))
		return -1;
	if (ring_read_fixed(&ring, fd, job->addr, LEN) != (long)LEN)
		return -2;
	return af_do_check(job);
}

TEST_F(gup, io_uring_by_child)
{
	if (ring_open(&self->ring))
		SKIP(return, "no io_uring");
	close(self->ring.fd);
	AF_SPAWN(&self->c);
	EXPECT_EQ(0, CHILD(do_uring, LATER));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, FIRST, SEED));
	AF_EXIT_OK(&self->c);
}

/*
 * DESIGN.md section 9, item 13. A process with many VMAs forks while one of
 * its threads pins the pages of one VMA after the other. Whatever is pinned
 * when the fork is over is then written through the pin. The child must see
 * the fork-time bytes, be it by a session, by the fallback, or by both.
 */
#define RACE_VMAS	96
#define RACE_ROUNDS	16

struct pinner {
	struct af_region r;
	void *(*loop)(void *pinner);
	struct ring ring;
	int file;
	/* Spins between the start of fork() and that of the loop. */
	unsigned int delay;
	volatile bool go, stop;
	size_t vma;	/* the one that is pinned at the end */
};

/* The VMAs of the region: every second piece has another flag. */
static size_t race_page(size_t vma)
{
	return af_piece(vma) + 3 * vma;
}

static char *race_buf(struct pinner *p)
{
	return af_page(&p->r, race_page(p->vma));
}

/* The first pin of a process is made in the middle of its fork(), or near. */
static void wait_for_fork(const struct pinner *p)
{
	unsigned int spins = 0;

	while (!p->go)
		;
	while (spins < p->delay && p->go)
		spins++;
}

static void *pin_once(void *arg)
{
	struct pinner *p = arg;

	wait_for_fork(p);
	/* fork() comes to it last. */
	p->vma = RACE_VMAS - 1;
	return (void *)(long)!!ring_register(&p->ring, race_buf(p), LEN);
}

/* A device that writes to one VMA after the other, through short pins. */
static void *direct_loop(void *arg)
{
	struct pinner *p = arg;

	wait_for_fork(p);
	do {
		p->vma = (p->vma + 7) % RACE_VMAS;
		if (pread(p->file, race_buf(p), LEN, 0) != (ssize_t)LEN)
			return (void *)1;
	} while (!p->stop);
	return NULL;
}

/* References without a pin: a pipe has the pages, and is emptied. */
static void *splice_loop(void *arg)
{
	static char buf[LEN] __attribute__((aligned(4096)));
	struct pinner *p = arg;
	int fd[2];

	if (pipe2(fd, O_CLOEXEC))
		return (void *)1;
	wait_for_fork(p);
	do {
		struct iovec iov = { .iov_len = LEN };

		p->vma = (p->vma + 7) % RACE_VMAS;
		iov.iov_base = race_buf(p);
		if (vmsplice(fd[1], &iov, 1, 0) != (ssize_t)LEN ||
		    read(fd[0], buf, LEN) != (ssize_t)LEN)
			return (void *)1;
	} while (!p->stop);
	return NULL;
}

static void race_fill(const struct af_region *r, uint64_t seed)
{
	size_t i;

	for (i = 0; i < RACE_VMAS; i++)
		af_fill(r, race_page(i), PAGES, seed);
}

static long race_check(const struct af_region *r, uint64_t seed)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < RACE_VMAS; i++)
		wrong += af_check(r, race_page(i), PAGES, seed);
	return wrong;
}

/* Differs when any word of the pages does. */
static uint64_t race_sum(const struct af_region *r)
{
	uint64_t sum = 0;
	size_t i, k;

	for (i = 0; i < RACE_VMAS; i++)
		for (k = 0; k < LEN / sizeof(sum); k++)
			sum = sum * 31 + ((volatile uint64_t *)
					  af_page(r, race_page(i)))[k];
	return sum;
}

/*
 * Looks at the region when the parent says so, and again. What a device wrote
 * while fork() was at work is anybody's guess, but it stands still.
 */
static void race_child(const struct pinner *p, int go, int seen)
{
	uint64_t sum;
	char c;

	if (read(go, &c, 1) != 1)
		_exit(2);
	if (p->loop != direct_loop)
		_exit(!!race_check(&p->r, SEED));
	sum = race_sum(&p->r);
	if (write(seen, "s", 1) != 1 || read(go, &c, 1) != 1)
		_exit(3);
	_exit(race_sum(&p->r) != sum);
}

static int write_through_pin(struct pinner *p)
{
	int fd = pattern_file(race_page(p->vma), PAGES, LATER);

	return ring_read_fixed(&p->ring, fd, race_buf(p), LEN) != (long)LEN;
}

/* One process of its own: what is pinned once is never lazy again. */
static int race_round(struct pinner *p)
{
	void *failed = (void *)1;
	int go[2], seen[2], status = -1;
	pthread_t thread;
	pid_t pid;
	char c;

	if ((p->loop == pin_once && ring_open(&p->ring)) ||
	    pipe2(go, O_CLOEXEC) || pipe2(seen, O_CLOEXEC) ||
	    pthread_create(&thread, NULL, p->loop, p))
		return 10;
	p->go = true;
	pid = fork();
	if (!pid)
		race_child(p, go[0], seen[1]);
	if (p->loop == direct_loop &&
	    (write(go[1], "g", 1) != 1 || read(seen[0], &c, 1) != 1))
		return 14;
	p->stop = true;
	pthread_join(thread, &failed);
	if (failed || pid < 0 || (p->loop == pin_once && write_through_pin(p)))
		return 11;
	race_fill(&p->r, LATER + 1);
	if (write(go[1], "g", 1) != 1 || waitpid(pid, &status, 0) != pid)
		return 12;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 13;
}

FIXTURE(pin_race) {
	struct af af;
	struct pinner *p;
};

FIXTURE_SETUP(pin_race)
{
	/* Nobody copies before the device writes, if that can be. */
	AF_SETUP(AF_HOLD);
	self->p = calloc(1, sizeof(*self->p));
	self->af.allow = AF_ALLOW(AF_FB_PINNED);
	self->af.spare = RACE_ROUNDS;
}

FIXTURE_TEARDOWN(pin_race)
{
	AF_FINISH();
}

static int race_process(struct pinner *p)
{
	size_t i;

	if (af_region_reserve(&p->r, RACE_VMAS + 1, SEED))
		return 20;
	race_fill(&p->r, SEED);
	for (i = 0; i < RACE_VMAS; i += 2)
		madvise(af_page(&p->r, af_piece(i)), AF_PIECE, MADV_DONTDUMP);
	return race_round(p);
}

/*
 * Where in fork() the first pin came: before all VMAs, which made all of it
 * plain, or behind them. The next round's comes later, or earlier.
 */
static int race(struct af *af, struct pinner *p, void *(*loop)(void *))
{
	long lazy, pinned, middle = 0, bad = 0;
	int round, status;
	pid_t pid;

	p->loop = loop;
	p->delay = 30000;
	for (round = 0; round < RACE_ROUNDS; round++) {
		lazy = af_delta(af, AF_SESSION);
		pinned = af_delta(af, AF_FB_PINNED);
		pid = fork();
		if (!pid)
			_exit(race_process(p));
		if (waitpid(pid, &status, 0) != pid || status) {
			fprintf(stderr, "# round %d: status %x\n", round, status);
			bad++;
		}
		lazy = af_delta(af, AF_SESSION) - lazy;
		pinned = af_delta(af, AF_FB_PINNED) - pinned;
		middle += lazy && pinned;
		if (lazy && !pinned)
			p->delay -= p->delay / 3;
		else if (!lazy)
			p->delay += p->delay / 4 + 100;
	}
	if (af->async)
		fprintf(stderr, "# %ld of %d forks were lazy in part\n", middle,
			RACE_ROUNDS);
	return bad;
}

TEST_F(pin_race, pins_during_fork)
{
	if (ring_open(&self->p->ring))
		SKIP(return, "no io_uring");
	close(self->p->ring.fd);
	EXPECT_EQ(0, race(&self->af, self->p, pin_once));
}

TEST_F(pin_race, o_direct_during_fork)
{
	int from = pattern_file(0, PAGES, LATER);
	char buf[AF_PAGE];
	size_t i;
	int fd = open(RAM_DISK, O_RDWR | O_CLOEXEC);

	/* Through the page cache: this process must not pin anything. */
	for (i = 0; fd >= 0 && i < PAGES; i++)
		if (pread(from, buf, AF_PAGE, i * AF_PAGE) != (ssize_t)AF_PAGE ||
		    pwrite(fd, buf, AF_PAGE, i * AF_PAGE) != (ssize_t)AF_PAGE)
			break;
	self->p->file = open(RAM_DISK, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (fd < 0 || fsync(fd) || self->p->file < 0)
		SKIP(return, "no " RAM_DISK);
	ASSERT_EQ(PAGES, i);
	EXPECT_EQ(0, race(&self->af, self->p, direct_loop));
}

TEST_F(pin_race, vmsplice_during_fork)
{
	EXPECT_EQ(0, race(&self->af, self->p, splice_loop));
}

TEST_HARNESS_MAIN
