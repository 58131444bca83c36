// SPDX-License-Identifier: GPL-2.0
/*
 * get_user_pages() and pin_user_pages() one by one, fast and slow, through the
 * kernel's own test device (CONFIG_GUP_TEST): who copies how much, and what a
 * pin that stays holds.
 *
 * Guards gup_fast_pmd_range(), follow_page_mask(), and the copier where it meets
 * a page that may be pinned.
 */
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include "harness.h"

#define PIECES	4
#define SEED	0x141UL
#define LATER	0x142UL

#define DEVICE	"/sys/kernel/debug/gup_test"

/* Of mm/gup_test.h. */
struct gup_cmd {
	uint64_t get_usec, put_usec, addr, size;
	uint32_t per_call, gup_flags, test_flags, which_pages[8];
};

struct pin_cmd {
	uint64_t addr, size;
	uint32_t flags;
};

#define GUP_FAST	_IOWR('g', 1, struct gup_cmd)
#define PIN_FAST	_IOWR('g', 2, struct gup_cmd)
#define GUP_SLOW	_IOWR('g', 4, struct gup_cmd)
#define PIN_SLOW	_IOWR('g', 5, struct gup_cmd)
#define PIN_START	_IOW('g', 7, struct pin_cmd)
#define PIN_STOP	_IO('g', 8)
#define PIN_READ	_IOW('g', 9, uint64_t)

#define PIN_WRITE	1
#define PIN_USES_FAST	2

#define FOLL_WRITE	1

FIXTURE(pin) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

/* parent: the pieces that the parent copies for two pieces' pages. */
FIXTURE_VARIANT(pin) {
	unsigned long call;
	unsigned int flags;
	long parent;
};

FIXTURE_VARIANT_ADD(pin, get_fast) { .call = GUP_FAST, .parent = 0 };
FIXTURE_VARIANT_ADD(pin, get_slow) { .call = GUP_SLOW, .parent = 0 };
FIXTURE_VARIANT_ADD(pin, get_fast_write) {
	.call = GUP_FAST, .flags = FOLL_WRITE, .parent = 2 };
FIXTURE_VARIANT_ADD(pin, get_slow_write) {
	.call = GUP_SLOW, .flags = FOLL_WRITE, .parent = 2 };
FIXTURE_VARIANT_ADD(pin, pin_fast) { .call = PIN_FAST, .parent = 2 };
FIXTURE_VARIANT_ADD(pin, pin_slow) { .call = PIN_SLOW, .parent = 2 };
FIXTURE_VARIANT_ADD(pin, pin_fast_write) {
	.call = PIN_FAST, .flags = FOLL_WRITE, .parent = 2 };
FIXTURE_VARIANT_ADD(pin, pin_slow_write) {
	.call = PIN_SLOW, .flags = FOLL_WRITE, .parent = 2 };

FIXTURE_SETUP(pin)
{
	if (access(DEVICE, R_OK | W_OK))
		SKIP(return, "no " DEVICE);
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(pin)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/* Across the border of two tables. */
#define FIRST	(AF_HEAD + AF_PIECE_PAGES - 8)
#define PAGES	16UL
#define LEN	(PAGES * AF_PAGE)

/* job->first is the call, job->seed are the flags. */
static long do_get(const struct af_job *job)
{
	struct gup_cmd cmd = {
		.addr = (uintptr_t)job->addr, .size = LEN, .per_call = PAGES,
		.gup_flags = job->seed,
	};
	int fd = open(DEVICE, O_RDWR | O_CLOEXEC);
	long ret = ioctl(fd, job->first, &cmd) ? -errno : cmd.size != LEN;

	close(fd);
	return ret;
}

#define GET (&(struct af_job){ .fn = do_get, .first = variant->call,	\
	.addr = af_page(&self->r, FIRST), .seed = variant->flags })

TEST_F(pin, by_parent)
{
	EXPECT_EQ(0, do_get(GET));
	if (self->af.held)
		EXPECT_EQ(variant->parent,
			  af_delta(&self->af, AF_PIECE_PARENT));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
}

/* The child gets pages of its own side: it lacks them all. */
TEST_F(pin, by_child)
{
	EXPECT_EQ(0, af_run(&self->c, GET));
	if (self->af.held)
		EXPECT_EQ(2, af_delta(&self->af, AF_PIECE_CHILD));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

FIXTURE(long_pin) {
	struct af af;
	struct af_region r;
	struct af_child c;
	int fd;
};

FIXTURE_VARIANT(long_pin) {
	unsigned int flags;
	enum af_kind kind;
};

FIXTURE_VARIANT_ADD(long_pin, fast) { .flags = PIN_USES_FAST };
FIXTURE_VARIANT_ADD(long_pin, fast_write) {
	.flags = PIN_USES_FAST | PIN_WRITE };
FIXTURE_VARIANT_ADD(long_pin, slow) { .flags = 0 };
FIXTURE_VARIANT_ADD(long_pin, slow_write) { .flags = PIN_WRITE };
FIXTURE_VARIANT_ADD(long_pin, fast_pte_thp) {
	.flags = PIN_USES_FAST, .kind = AF_PTE_THP };
FIXTURE_VARIANT_ADD(long_pin, fast_swapped) {
	.flags = PIN_USES_FAST, .kind = AF_SWAPPED };

FIXTURE_SETUP(long_pin)
{
	self->fd = open(DEVICE, O_RDWR);
	if (self->fd < 0)
		SKIP(return, "no " DEVICE);
	AF_REGION(&self->r, PIECES, variant->kind, SEED);
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(long_pin)
{
	EXPECT_EQ(0, ioctl(self->fd, PIN_STOP));
	close(self->fd);
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

static long pin_start(int fd, const struct af_job *job)
{
	struct pin_cmd cmd = { (uintptr_t)job->addr, LEN, job->pages };

	return ioctl(fd, PIN_START, &cmd) ? -errno : 0;
}

/* The number of pinned pages that do not hold the pattern of @seed. */
static long pin_check(int fd, uint64_t seed)
{
	char *buf = mmap(NULL, LEN, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	uint64_t addr = (uintptr_t)buf;
	long wrong = ioctl(fd, PIN_READ, &addr) ? -errno :
		af_check_at(buf, FIRST, PAGES, seed);

	munmap(buf, LEN);
	return wrong;
}

static long do_pin_write_check(const struct af_job *job)
{
	int fd = (int)job->first;
	long wrong = pin_start(fd, job) ?: pin_check(fd, SEED);

	af_fill_at(job->addr, FIRST, PAGES, job->seed);
	return wrong + pin_check(fd, job->seed) +
	       af_check_at(job->addr, FIRST, PAGES, job->seed);
}

#define PIN (&(struct af_job){ .fn = do_pin_write_check,		\
	.addr = af_page(&self->r, FIRST), .first = self->fd,		\
	.pages = variant->flags, .seed = LATER })

/*
 * What is pinned stays the parent's: a write reaches the pinned page, and does
 * not reach the child.
 */
TEST_F(long_pin, by_parent)
{
	EXPECT_EQ(0, do_pin_write_check(PIN));
	if (self->af.held)
		EXPECT_EQ(2, af_delta(&self->af, AF_PIECE_PARENT));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	af_fill(&self->r, 0, self->r.pages, LATER + 1);
	EXPECT_EQ(0, pin_check(self->fd, LATER + 1));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

TEST_F(long_pin, by_child)
{
	EXPECT_EQ(0, af_run(&self->c, PIN));
	EXPECT_EQ(0, af_check_all(&self->r));
	af_fill(&self->r, 0, self->r.pages, LATER + 1);
	EXPECT_EQ(0, pin_check(self->fd, LATER));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, FIRST, PAGES, LATER));
}

/* A region that was read-only at fork: nothing of it can be written by a fault. */
FIXTURE(forced) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_SETUP(forced)
{
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	ASSERT_EQ(0, mprotect(self->r.base, self->r.pages * AF_PAGE,
			      PROT_READ));
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(forced)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/* /proc/self/mem writes through the rights of the VMA. */
static long do_force(const struct af_job *job)
{
	char *buf = malloc(LEN);
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	ssize_t put;

	memcpy(buf, job->addr, LEN);
	af_fill_at(buf, FIRST, PAGES, job->seed);
	put = pwrite(fd, buf, LEN, (uintptr_t)job->addr);
	close(fd);
	free(buf);
	return put != (ssize_t)LEN ||
	       af_check_at(job->addr, FIRST, PAGES, job->seed);
}

#define FORCE (&(struct af_job){ .fn = do_force,			\
	.addr = af_page(&self->r, FIRST), .seed = LATER })

/* The parent owns its pages alone, as far as they can tell: no fault needed. */
TEST_F(forced, by_parent)
{
	EXPECT_EQ(0, do_force(FORCE));
	if (self->af.held)
		EXPECT_EQ(2, af_delta(&self->af, AF_PIECE_PARENT));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, FIRST, SEED));
}

TEST_F(forced, by_child)
{
	EXPECT_EQ(0, af_run(&self->c, FORCE));
	if (self->af.held)
		EXPECT_EQ(2, af_delta(&self->af, AF_PIECE_CHILD));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, FIRST, SEED));
}

FIXTURE(looks_pinned) {
	struct af af;
	struct af_region r;
	struct af_child c;
	int fd, full[5][2];
};

/* Pages that a pipe can hold, if asked to. */
#define PIPE_PAGES	256
#define SHARED		(AF_HEAD + AF_PIECE_PAGES + 5)

/* So many references to one page as the kernel takes for a pin: 1024. */
FIXTURE_SETUP(looks_pinned)
{
	struct iovec iov[PIPE_PAGES];
	int i;

	self->fd = open(DEVICE, O_RDWR);
	if (self->fd < 0)
		SKIP(return, "no " DEVICE);
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	for (i = 0; i < PIPE_PAGES; i++)
		iov[i] = (struct iovec){ af_page(&self->r, SHARED), AF_PAGE };
	for (i = 0; i < 5; i++) {
		ASSERT_EQ(0, pipe2(self->full[i], O_CLOEXEC));
		ASSERT_EQ(PIPE_PAGES * AF_PAGE,
			  fcntl(self->full[i][1], F_SETPIPE_SZ,
				PIPE_PAGES * AF_PAGE));
		ASSERT_EQ(PIPE_PAGES * AF_PAGE,
			  vmsplice(self->full[i][1], iov, PIPE_PAGES, 0));
	}
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
	/* Pages that were copied at fork. From now on it is one that pins. */
	ASSERT_EQ(0, pin_start(self->fd, &(struct af_job){
		.addr = self->r.base, .pages = PIN_WRITE }));
}

FIXTURE_TEARDOWN(looks_pinned)
{
	int i;

	EXPECT_EQ(0, ioctl(self->fd, PIN_STOP));
	close(self->fd);
	for (i = 0; i < 5; i++) {
		close(self->full[i][0]);
		close(self->full[i][1]);
	}
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/*
 * As far as the copy can tell the parent has pinned this page, too. It gives the
 * child a page of its own, and the parent's stays the one that others refer to,
 * whatever is written to it. Plain fork knew of no pin and shared the page.
 */
static void both_write(struct __test_metadata *_metadata,
		       FIXTURE_DATA(looks_pinned) *self)
{
	uint64_t buf[AF_PAGE / 8];

	af_fill(&self->r, SHARED, 1, LATER);
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_child_fill(&self->c, &self->r, SHARED, 1, LATER + 1));
	EXPECT_EQ(0, af_check(&self->r, SHARED, 1, LATER));
	EXPECT_EQ(AF_PAGE, read(self->full[0][0], buf, AF_PAGE));
	EXPECT_NE(af_value(LATER + 1, SHARED), buf[0]);
	if (self->af.held)
		EXPECT_EQ(0, af_check_at(buf, SHARED, 1, LATER));
}

TEST_F(looks_pinned, by_parent)
{
	both_write(_metadata, self);
}

TEST_F(looks_pinned, by_child)
{
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, SHARED, 1, SEED));
	if (self->af.held)
		EXPECT_EQ(1, af_delta(&self->af, AF_PIECE_CHILD));
	both_write(_metadata, self);
}

TEST_HARNESS_MAIN
