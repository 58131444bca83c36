// SPDX-License-Identifier: GPL-2.0
/*
 * Memory that is never part of a session, next to memory that is: fork() treats
 * it as ever, and nothing that either side does with it copies a piece.
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include "harness.h"

#define SEED	0x1b1UL
#define LATER	0x1b2UL
#define LEN	(4 * AF_PIECE)
#define PAGES	(LEN / AF_PAGE)

#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE	0x08
#endif
#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK	18
#endif

/* What the child sees of what was there at fork and was written later. */
enum view { FORK_TIME, LATEST, NOTHING };

static char *map(int prot_flags, int fd)
{
	return mmap(NULL, LEN, PROT_READ | PROT_WRITE, prot_flags, fd, 0);
}

static char *map_file(int flags)
{
	int fd = memfd_create("excluded", MFD_CLOEXEC);

	return fd < 0 || ftruncate(fd, LEN) ? MAP_FAILED : map(flags, fd);
}

static char *make_private_file(void)
{
	return map_file(MAP_PRIVATE);
}

static char *make_shared_file(void)
{
	return map_file(MAP_SHARED);
}

static char *make_shared(void)
{
	return map(MAP_SHARED | MAP_ANONYMOUS, -1);
}

static char *make_stack(void)
{
	return map(MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1);
}

static char *make_droppable(void)
{
	return map(MAP_DROPPABLE | MAP_ANONYMOUS, -1);
}

static char *make_wiped(void)
{
	char *p = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);

	return madvise(p, LEN, MADV_WIPEONFORK) ? MAP_FAILED : p;
}

#define HUGE_PAGES "/proc/sys/vm/nr_hugepages"

/* Twice what it takes: a private write needs a page of its own. */
static char *make_hugetlb(void)
{
	char pages[32];

	if (af_write_file(HUGE_PAGES, "16") ||
	    af_read_file(HUGE_PAGES, pages, sizeof(pages)) || atol(pages) < 16)
		return MAP_FAILED;
	return map(MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);
}

static char *make_watched(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	char *p = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct uffdio_register reg = {
		.range = { (uintptr_t)p, LEN },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	memset(p, 1, LEN);
	return fd < 0 || ioctl(fd, UFFDIO_API, &api) ||
	       ioctl(fd, UFFDIO_REGISTER, &reg) ? MAP_FAILED : p;
}

FIXTURE(excluded) {
	struct af af;
	struct af_region r;
	struct af_child c;
	char *p;
};

FIXTURE_VARIANT(excluded) {
	char *(*make)(void);
	enum view view;
};

FIXTURE_VARIANT_ADD(excluded, private_file) {
	.make = make_private_file, .view = FORK_TIME };
FIXTURE_VARIANT_ADD(excluded, shared_file) {
	.make = make_shared_file, .view = LATEST };
FIXTURE_VARIANT_ADD(excluded, shared) {
	.make = make_shared, .view = LATEST };
FIXTURE_VARIANT_ADD(excluded, stack) {
	.make = make_stack, .view = FORK_TIME };
FIXTURE_VARIANT_ADD(excluded, droppable) {
	.make = make_droppable, .view = NOTHING };
FIXTURE_VARIANT_ADD(excluded, wiped) { .make = make_wiped, .view = NOTHING };
FIXTURE_VARIANT_ADD(excluded, hugetlb) {
	.make = make_hugetlb, .view = FORK_TIME };
FIXTURE_VARIANT_ADD(excluded, watched) {
	.make = make_watched, .view = FORK_TIME };

FIXTURE_SETUP(excluded)
{
	self->p = variant->make();
	if (self->p == MAP_FAILED)
		SKIP(return, "this kernel or guest has no such memory");
	AF_REGION(&self->r, 1, AF_BASE, SEED);
	madvise(self->p, LEN, MADV_NOHUGEPAGE);
	af_fill_at(self->p, 0, PAGES, SEED);
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(excluded)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
	if (variant->make == make_hugetlb) {
		munmap(self->p, LEN);
		af_write_file(HUGE_PAGES, "0");
	}
}

#define CHILD(fn, s) af_call(&self->c, fn, .addr = self->p,		\
			     .pages = PAGES, .seed = (s))

TEST_F(excluded, both_write)
{
	bool one = variant->view == LATEST;
	uint64_t seen = variant->view == FORK_TIME ? SEED : LATER;

	af_fill_at(self->p, 0, PAGES, LATER);
	if (variant->view == NOTHING)
		seen = AF_ZEROES;
	EXPECT_EQ(0, CHILD(af_do_check, seen));
	EXPECT_EQ(0, CHILD(af_do_fill, LATER + 1));
	EXPECT_EQ(0, CHILD(af_do_check, LATER + 1));
	EXPECT_EQ(0, af_check_at(self->p, 0, PAGES, one ? LATER + 1 : LATER));
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_PARENT) +
			     af_delta(&self->af, AF_PIECE_CHILD) +
			     af_delta(&self->af, AF_PIECE_LIFTED));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

static long do_unmap(const struct af_job *job)
{
	return munmap(job->addr, job->pages * AF_PAGE);
}

TEST_F(excluded, both_unmap)
{
	EXPECT_EQ(0, CHILD(do_unmap, 0));
	EXPECT_EQ(0, af_check_at(self->p, 0, PAGES, SEED));
	EXPECT_EQ(0, munmap(self->p, LEN));
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_PARENT) +
			     af_delta(&self->af, AF_PIECE_CHILD) +
			     af_delta(&self->af, AF_PIECE_LIFTED));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

TEST_HARNESS_MAIN
