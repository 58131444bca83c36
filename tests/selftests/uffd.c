// SPDX-License-Identifier: GPL-2.0
/*
 * userfaultfd, registered on either side while the session is open (DESIGN.md
 * section 9, item 6): what UFFDIO_* puts into one side's holes must not reach
 * the other side, and must not hide what the other side's fork left there.
 *
 * Guards userfaultfd_register_range(), move_pages() and handle_mm_fault().
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include "harness.h"

#define PIECES	4
#define SEED	0xd1UL
#define LATER	0xd2UL

/* UFFDIO_MOVE of Linux 6.8, which Debian 12's headers lack. */
#ifndef UFFDIO_MOVE
struct uffdio_move {
	__u64 dst, src, len, mode;
	__s64 move;
};
#define UFFDIO_MOVE		_IOWR(UFFDIO, 0x05, struct uffdio_move)
#define UFFD_FEATURE_MOVE	(1 << 16)
#endif
#ifndef UFFDIO_WRITEPROTECT
#define UFFDIO_WRITEPROTECT	_IOWR(UFFDIO, 0x06, struct uffdio_writeprotect)
#endif

/* The first page of each piece holds the pattern, the others were never there. */
FIXTURE(uffd) {
	struct af af;
	struct af_region r;
	struct af_child c;
	char *hole;		/* pages that were none at fork */
	size_t hole_first;
};

#define HOLE_PAGES 40UL

static int uffd_open(uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

/* Registers all of the region, as a VMA manager would. */
static int uffd_register(const struct af_region *r, uint64_t mode,
			 uint64_t features)
{
	struct uffdio_register reg = {
		.range = { (uintptr_t)r->base, r->pages * AF_PAGE },
		.mode = mode,
	};
	int fd = uffd_open(features);

	if (fd >= 0 && ioctl(fd, UFFDIO_REGISTER, &reg)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

FIXTURE_SETUP(uffd)
{
	int fd = uffd_open(0);

	if (fd < 0)
		SKIP(return, "no userfaultfd");
	close(fd);
	ASSERT_EQ(0, af_region_reserve(&self->r, PIECES, SEED | AF_SPARSE));
	af_fill(&self->r, 0, self->r.pages, self->r.seed);
	self->hole_first = af_piece(1) - HOLE_PAGES / 2;
	self->hole = af_page(&self->r, self->hole_first);
	ASSERT_EQ(0, madvise(self->hole, HOLE_PAGES * AF_PAGE, MADV_DONTNEED));
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(uffd)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/* UFFDIO_COPY of the pattern of job->seed into the job's pages. */
static long copy_in(int fd, const struct af_job *job)
{
	size_t len = job->pages * AF_PAGE;
	char *buf = mmap(NULL, len, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_copy copy = { .dst = (uintptr_t)job->addr,
				    .src = (uintptr_t)buf, .len = len };
	long ret;

	af_fill_at(buf, job->first, job->pages, job->seed);
	ret = ioctl(fd, UFFDIO_COPY, &copy) ? -errno : 0;
	munmap(buf, len);
	return ret;
}

static long zero_in(int fd, const struct af_job *job)
{
	struct uffdio_zeropage zero = {
		.range = { (uintptr_t)job->addr, job->pages * AF_PAGE },
	};

	return ioctl(fd, UFFDIO_ZEROPAGE, &zero) ? -errno : 0;
}

/* In the child: its region and its userfaultfd. */
static struct af_region *the_region;
static int the_uffd = -1;

static long do_register(const struct af_job *job)
{
	the_region = (struct af_region *)job->addr;
	the_uffd = uffd_register(the_region, job->first, job->seed);
	return the_uffd < 0 ? -1 : 0;
}

static long do_copy_in(const struct af_job *job)
{
	return copy_in(the_uffd, job);
}

static long do_zero_in(const struct af_job *job)
{
	return zero_in(the_uffd, job);
}

static long do_dontneed(const struct af_job *job)
{
	return madvise(job->addr, job->pages * AF_PAGE, MADV_DONTNEED);
}

#define HOLE(s) (&(struct af_job){ .addr = self->hole,			\
	.first = self->hole_first, .pages = HOLE_PAGES, .seed = (s) })
#define REST_FIRST (self->hole_first + HOLE_PAGES)

/* The child's hole is all zeroes and its other pages are as at fork. */
#define CHILD_IS_RIGHT() do {						\
	EXPECT_EQ(0, af_call(&self->c, af_do_zero, .addr = self->hole,	\
			     .pages = HOLE_PAGES));			\
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0,		\
				    self->hole_first, self->r.seed));	\
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, REST_FIRST,	\
				    self->r.pages - REST_FIRST,		\
				    self->r.seed));			\
} while (0)

/* UFFDIO_COPY into what was none at fork must not reach the snapshot. */
TEST_F(uffd, parent_copies_into_hole)
{
	int fd = uffd_register(&self->r, UFFDIO_REGISTER_MODE_MISSING, 0);

	ASSERT_GE(fd, 0);
	ASSERT_EQ(0, copy_in(fd, HOLE(LATER)));
	CHILD_IS_RIGHT();
	EXPECT_EQ(0, af_check(&self->r, self->hole_first, HOLE_PAGES, LATER));
}

/* The same into pages that the parent has just given up. */
TEST_F(uffd, parent_copies_over_dropped)
{
	int fd = uffd_register(&self->r, UFFDIO_REGISTER_MODE_MISSING, 0);
	size_t first = af_piece(2) + AF_PIECE_PAGES - AF_HEAD;
	struct af_job job = { .addr = af_page(&self->r, first), .first = first,
			      .pages = 1, .seed = LATER };

	ASSERT_GE(fd, 0);
	ASSERT_EQ(0, do_dontneed(&job));
	ASSERT_EQ(0, copy_in(fd, &job));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, first, 1,
				    self->r.seed));
	EXPECT_EQ(0, af_check(&self->r, first, 1, LATER));
	ASSERT_EQ(0, zero_in(fd, HOLE(0)));
	CHILD_IS_RIGHT();
}

/* In the child: its holes are its own, its content is not missing. */
TEST_F(uffd, child_copies_into_hole)
{
	struct af_job over = { .fn = do_copy_in, .first = af_piece(3) - AF_HEAD,
			       .pages = 1, .seed = LATER };
	struct af_job job = *HOLE(LATER);

	over.addr = af_page(&self->r, over.first);
	EXPECT_EQ(0, af_call(&self->c, do_register, .addr = (char *)&self->r,
			     .first = UFFDIO_REGISTER_MODE_MISSING));
	EXPECT_EQ(-EEXIST, af_run(&self->c, &over));
	job.fn = do_copy_in;
	EXPECT_EQ(0, af_run(&self->c, &job));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, self->hole_first,
				    HOLE_PAGES, LATER));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, over.first, 1,
				    self->r.seed));
	EXPECT_EQ(0, af_check_zero(self->hole, HOLE_PAGES));
}

TEST_F(uffd, child_zeroes_dropped)
{
	size_t first = af_piece(2) - AF_HEAD;
	struct af_job job = { .fn = do_dontneed, .first = first, .pages = 1,
			      .addr = af_page(&self->r, first) };

	EXPECT_EQ(0, af_call(&self->c, do_register, .addr = (char *)&self->r,
			     .first = UFFDIO_REGISTER_MODE_MISSING));
	EXPECT_EQ(0, af_run(&self->c, &job));
	job.fn = do_zero_in;
	EXPECT_EQ(0, af_run(&self->c, &job));
	EXPECT_EQ(0, af_release(&self->af));
	EXPECT_EQ(0, af_call(&self->c, af_do_zero, .addr = job.addr,
			     .pages = 1));
	EXPECT_EQ(0, af_check(&self->r, first, 1, self->r.seed));
}

/*
 * The parent has read the hole meanwhile, and so has the zero page there. That is
 * younger than the fork: the child still has nothing.
 */
TEST_F(uffd, child_copies_into_hole_that_parent_read)
{
	struct af_job job = *HOLE(LATER);

	EXPECT_EQ(0, af_check_zero(self->hole, HOLE_PAGES));
	EXPECT_EQ(0, af_call(&self->c, do_register, .addr = (char *)&self->r,
			     .first = UFFDIO_REGISTER_MODE_MISSING));
	job.fn = do_copy_in;
	EXPECT_EQ(0, af_run(&self->c, &job));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, self->hole_first,
				    HOLE_PAGES, LATER));
	EXPECT_EQ(0, af_check_zero(self->hole, HOLE_PAGES));
}

/*
 * UFFDIO_MOVE takes a page out of an area that need not be registered. After a
 * plain fork the page is shared, and so the move fails with EBUSY; in no case
 * may the snapshot lose the page.
 */
TEST_F(uffd, parent_moves_a_page)
{
	size_t first = af_piece(2) - AF_HEAD;
	struct uffdio_move move = {
		.dst = (uintptr_t)self->hole,
		.src = (uintptr_t)af_page(&self->r, first), .len = AF_PAGE,
	};
	int fd = uffd_register(&self->r, UFFDIO_REGISTER_MODE_MISSING,
			       UFFD_FEATURE_MOVE);

	if (fd < 0)
		SKIP(return, "no UFFDIO_MOVE");
	EXPECT_EQ(-1, ioctl(fd, UFFDIO_MOVE, &move));
	EXPECT_EQ(EBUSY, errno);
	CHILD_IS_RIGHT();
	EXPECT_EQ(0, af_check(&self->r, first, 1, self->r.seed));
}

/* The source lies in a VMA of the session, the destination in another one. */
TEST_F(uffd, parent_moves_from_unregistered)
{
	size_t first = af_piece(2) - AF_HEAD;
	char *to = mmap(NULL, AF_PIECE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct af_region other = { .base = to, .pages = AF_PIECE_PAGES };
	struct uffdio_move move = {
		.dst = (uintptr_t)to,
		.src = (uintptr_t)af_page(&self->r, first), .len = AF_PAGE,
	};
	int fd = uffd_register(&other, UFFDIO_REGISTER_MODE_MISSING,
			       UFFD_FEATURE_MOVE);

	if (fd < 0)
		SKIP(return, "no UFFDIO_MOVE");
	EXPECT_EQ(-1, ioctl(fd, UFFDIO_MOVE, &move));
	EXPECT_EQ(EBUSY, errno);
	CHILD_IS_RIGHT();
}

/* Write protection by userfaultfd, set and lifted in the parent. */
TEST_F(uffd, parent_write_protects)
{
	struct uffdio_writeprotect wp = {
		.range = { (uintptr_t)self->r.base,
			   self->r.pages * AF_PAGE },
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	int fd = uffd_register(&self->r, UFFDIO_REGISTER_MODE_WP,
			       UFFD_FEATURE_PAGEFAULT_FLAG_WP);

	if (fd < 0)
		SKIP(return, "no userfaultfd write protection");
	ASSERT_EQ(0, ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
	CHILD_IS_RIGHT();
	EXPECT_EQ(0, af_child_fill(&self->c, &self->r, 0, self->r.pages,
				   LATER));
	wp.mode = 0;
	ASSERT_EQ(0, ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
	af_fill(&self->r, 0, self->r.pages, LATER + 1);
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, self->r.pages,
				    LATER));
}

/* A region that was registered before the fork is no part of a session. */
TEST_F(uffd, registered_before_second_fork)
{
	int fd = uffd_register(&self->r, UFFDIO_REGISTER_MODE_MISSING, 0);
	struct af_child second;

	ASSERT_GE(fd, 0);
	ASSERT_EQ(0, copy_in(fd, HOLE(LATER)));
	self->af.spare = 1;
	ASSERT_EQ(0, af_spawn_other(&second));
	EXPECT_EQ(0, af_child_check(&second, &self->r, self->hole_first,
				    HOLE_PAGES, LATER));
	CHILD_IS_RIGHT();
	AF_EXIT_OK(&second);
}

TEST_HARNESS_MAIN
