// SPDX-License-Identifier: GPL-2.0
/*
 * A secondary MMU that is registered while the session is open, by the kernel's
 * own test device (CONFIG_TEST_HMM). Registration ends the session, whoever
 * registers; then the device writes, takes pages away and gives them back.
 *
 * Guards __mmu_notifier_register(). migrate_vma_setup() stands behind it: who
 * migrates to a device is registered, and so in no session.
 */
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include "harness.h"

#define PIECES	4
#define SEED	0x131UL
#define LATER	0x132UL

/* Of lib/test_hmm_uapi.h. */
struct mirror_cmd {
	uint64_t addr, ptr, npages, cpages, faults;
};

#define MIRROR_READ	_IOWR('H', 0x00, struct mirror_cmd)
#define MIRROR_WRITE	_IOWR('H', 0x01, struct mirror_cmd)
#define MIRROR_TO_DEV	_IOWR('H', 0x02, struct mirror_cmd)
#define MIRROR_TO_SYS	_IOWR('H', 0x03, struct mirror_cmd)

#define DEVICE "/dev/hmm_dmirror0"

/* The module of the kernel that runs; scripts/vm says where it was built. */
static int load_device(void)
{
	const char *build = getenv("ASYNC_FORK_BUILD");
	char path[512];
	int fd, ret;

	if (!access(DEVICE, R_OK | W_OK))
		return 0;
	snprintf(path, sizeof(path), "%s/lib/test_hmm.ko", build ? build : "");
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ret = syscall(SYS_finit_module, fd, "", 0) ? -errno : 0;
	close(fd);
	return ret ? ret : access(DEVICE, R_OK | W_OK);
}

FIXTURE(mirror) {
	struct af af;
	struct af_region r;
	struct af_child c;
};

FIXTURE_SETUP(mirror)
{
	if (load_device())
		SKIP(return, "no test_hmm.ko");
	AF_REGION(&self->r, PIECES, AF_BASE, SEED);
	AF_SETUP(AF_HOLD);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(mirror)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/* Across the border of two tables. */
#define FIRST	(AF_HEAD + AF_PIECE_PAGES - 8)
#define PAGES	16UL

#define JOB(function, s) (&(struct af_job){ .fn = (function),		\
	.addr = af_page(&self->r, FIRST), .first = FIRST,		\
	.pages = PAGES, .seed = (s) })

static long command(int fd, unsigned long what, const struct af_job *job,
		    void *buf)
{
	struct mirror_cmd cmd = {
		.addr = (uintptr_t)job->addr, .ptr = (uintptr_t)buf,
		.npages = job->pages,
	};

	if (ioctl(fd, what, &cmd))
		return -errno;
	return cmd.cpages == job->pages ? 0 : 1;
}

/* The device of the process that obeys. */
static int the_device = -1;

static long do_open(const struct af_job *job)
{
	(void)job;
	the_device = open(DEVICE, O_RDWR | O_CLOEXEC);
	return the_device < 0 ? -errno : 0;
}

static char *buffer(void)
{
	return mmap(NULL, PAGES * AF_PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* The device reads what job->seed says, and then writes the pattern LATER. */
static long do_device_writes(const struct af_job *job)
{
	char *buf = buffer();
	long wrong;

	wrong = command(the_device, MIRROR_READ, job, buf) ?:
		af_check_at(buf, job->first, job->pages, job->seed);
	af_fill_at(buf, job->first, job->pages, LATER);
	wrong += command(the_device, MIRROR_WRITE, job, buf);
	wrong += af_check_at(job->addr, job->first, job->pages, LATER);
	munmap(buf, PAGES * AF_PAGE);
	return wrong;
}

/* The pages move to the device's memory, and come back at a look at them. */
static long do_migrate(const struct af_job *job)
{
	char *buf = buffer();
	long wrong = command(the_device, MIRROR_TO_DEV, job, buf);

	if (wrong < 0)
		return wrong;
	wrong = af_check_at(buf, job->first, job->pages, job->seed);
	wrong += af_check_at(job->addr, job->first, job->pages, job->seed);
	munmap(buf, PAGES * AF_PAGE);
	return wrong;
}

/* Opening the device registers; with the workers held, the opener copies all. */
TEST_F(mirror, registered_by_parent)
{
	ASSERT_EQ(0, do_open(NULL));
	if (self->af.held) {
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_PARENT) +
				  af_delta(&self->af, AF_PIECE_WORKER));
		EXPECT_GT(af_delta(&self->af, AF_PIECE_PARENT), 0);
	}
	EXPECT_EQ(0, do_device_writes(JOB(NULL, SEED)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, FIRST, SEED));
}

TEST_F(mirror, registered_by_child)
{
	ASSERT_EQ(0, af_call(&self->c, do_open));
	if (self->af.held)
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_CHILD));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_device_writes, SEED)));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&self->c, &self->r, 0, FIRST, SEED));
}

TEST_F(mirror, parent_migrates)
{
	ASSERT_EQ(0, do_open(NULL));
	EXPECT_EQ(0, do_migrate(JOB(NULL, SEED)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, do_migrate(JOB(NULL, LATER)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

TEST_F(mirror, child_migrates)
{
	ASSERT_EQ(0, af_call(&self->c, do_open));
	EXPECT_EQ(0, af_run(&self->c, JOB(do_migrate, SEED)));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_run(&self->c, JOB(do_migrate, SEED)));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
}

/* Whoever was registered once forks plainly ever after, and is told why. */
TEST_F(mirror, next_fork_is_plain)
{
	struct af_child second;

	ASSERT_EQ(0, do_open(NULL));
	close(the_device);
	self->af.allow |= AF_ALLOW(AF_FB_NOTIFIER);
	ASSERT_EQ(0, af_spawn_other(&second));
	if (self->af.async)
		EXPECT_EQ(1, af_delta(&self->af, AF_FB_NOTIFIER));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_check_all(&second, &self->r));
	EXPECT_EQ(0, af_child_check_all(&self->c, &self->r));
	AF_EXIT_OK(&second);
}

TEST_HARNESS_MAIN
