// SPDX-License-Identifier: GPL-2.0
/*
 * A session opens nobody's memory to others: who may look at a child, or at its
 * parent, is as after a plain fork, and what it never had is zeroes and not what
 * the pages and page tables held before.
 *
 * Readers that do have the right are in kernel_access.c, children that lost
 * memory in poison.c, core dumps in coredump.c.
 */
#include <fcntl.h>
#include <linux/seccomp.h>
#include <sys/uio.h>
#include "pair.h"
#include "user.h"

#define PIECES	8
#define SEED	0xf0eUL
#define LATER	0xf0fUL

/* P and C belong to USER, as does the fellow; the stranger is OTHER. */
FIXTURE(look) {
	struct af af;
	struct pair pair;
	struct af_child fellow, stranger;
	int pipe[2];
};

FIXTURE_SETUP(look)
{
	ASSERT_EQ(0, pipe(self->pipe));
	ASSERT_EQ(0, user_make(&self->fellow, USER));
	ASSERT_EQ(0, user_make(&self->stranger, OTHER));
	PAIR_MAKE(&self->pair, PIECES, AF_BASE, SEED);
	ASSERT_EQ(0, af_call(&self->pair.p, user_do_become, .first = USER));
	AF_SETUP(AF_HOLD);
	ASSERT_EQ(0, pair_fork(&self->pair, &self->af));
}

FIXTURE_TEARDOWN(look)
{
	AF_EXIT_OK(&self->fellow);
	AF_EXIT_OK(&self->stranger);
	AF_FINISH();
}

/* What a process can be asked for by somebody who may trace it. */
enum {
	MEM = 1, PAGEMAP = 2, MAPS = 4, VM_READ = 8, TRACE = 16, EVERYTHING = 31,
};

static bool opens(pid_t pid, const char *name)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0)
		close(fd);
	else if (errno != EACCES && errno != EPERM)
		fprintf(stderr, "# %s: %s\n", path, strerror(errno));
	return fd >= 0;
}

static bool traces(pid_t pid)
{
	int status;

	if (ptrace(PTRACE_SEIZE, pid, NULL, NULL))
		return false;
	ptrace(PTRACE_INTERRUPT, pid, NULL, NULL);
	waitpid(pid, &status, __WALL);
	ptrace(PTRACE_DETACH, pid, NULL, NULL);
	return true;
}

/* What the caller gets of process job->first. */
static long do_look(const struct af_job *job)
{
	pid_t pid = job->first;
	char byte;
	struct iovec local = { &byte, 1 }, remote = { job->addr, 1 };
	long got = 0;

	got |= opens(pid, "mem") ? MEM : 0;
	got |= opens(pid, "pagemap") ? PAGEMAP : 0;
	got |= opens(pid, "maps") ? MAPS : 0;
	got |= process_vm_readv(pid, &local, 1, &remote, 1, 0) == 1 ? VM_READ : 0;
	got |= traces(pid) ? TRACE : 0;
	return got;
}

#define LOOK(who, pid_of) af_call(&self->who, do_look, .first = (pid_of), \
	.addr = af_page(self->pair.r, af_piece(3)))

/* C, whose parent lives, has its snapshot; then both end. */
#define BOTH_ARE_RIGHT() do {						\
	EXPECT_EQ(0, af_child_fill(&self->pair.p, self->pair.r, 0,	\
				   self->pair.r->pages, LATER));	\
	EXPECT_EQ(0, af_child_check_all(&self->pair.c, self->pair.r));	\
	af_post(&self->pair.c, &(struct af_job){ .fn = NULL });		\
	EXPECT_EQ(0, pair_reap_child(&self->pair));			\
	EXPECT_EQ(0, af_child_check(&self->pair.p, self->pair.r, 0,	\
				    self->pair.r->pages, LATER));	\
	EXPECT_EQ(0, af_end(&self->pair.p));				\
} while (0)

TEST_F(look, strangers_get_nothing)
{
	EXPECT_EQ(0, LOOK(stranger, self->pair.c.pid));
	EXPECT_EQ(0, LOOK(stranger, self->pair.p.pid));
	/* Nor does the kernel copy for one. */
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_PIECE_CHILD) +
			     af_delta(&self->af, AF_PIECE_PARENT));
	EXPECT_EQ(EVERYTHING, LOOK(fellow, self->pair.c.pid));
	EXPECT_EQ(EVERYTHING, LOOK(fellow, self->pair.p.pid));
	if (self->af.held)
		EXPECT_LT(0, af_delta(&self->af, AF_PIECE_CHILD));
	BOTH_ARE_RIGHT();
}

static long do_hide(const struct af_job *job)
{
	return prctl(PR_SET_DUMPABLE, job->first);
}

/* A child that hides, and one whose parent does, are hidden alone. */
TEST_F(look, dumpable_is_each_sides_own)
{
	ASSERT_EQ(0, af_call(&self->pair.c, do_hide, .first = 0));
	EXPECT_EQ(0, LOOK(fellow, self->pair.c.pid));
	EXPECT_EQ(EVERYTHING, LOOK(fellow, self->pair.p.pid));
	ASSERT_EQ(0, af_call(&self->pair.c, do_hide, .first = 1));
	ASSERT_EQ(0, af_call(&self->pair.p, do_hide, .first = 0));
	EXPECT_EQ(EVERYTHING, LOOK(fellow, self->pair.c.pid));
	EXPECT_EQ(0, LOOK(fellow, self->pair.p.pid));
	BOTH_ARE_RIGHT();
}

#define SETUID_FILE	"/tmp/setuid-sleep"

static int make_setuid_file(void)
{
	int from = open("/bin/sleep", O_RDONLY | O_CLOEXEC);
	int to = open(SETUID_FILE, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
	char buf[4096];
	ssize_t n;

	if (from < 0 || to < 0)
		return -1;
	while ((n = read(from, buf, sizeof(buf))) > 0)
		if (write(to, buf, n) != n)
			return -1;
	n |= fchmod(to, 04755);
	close(from);
	close(to);
	return n;
}

static long do_exec_setuid(const struct af_job *job)
{
	char *const argv[] = { (char *)"sleep", (char *)"1000", NULL };

	(void)job;
	execv(SETUID_FILE, argv);
	return -errno;
}

static bool belongs_to_root(pid_t pid)
{
	char path[64], text[4096], *at;
	int real, effective;

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	if (af_read_file(path, text, sizeof(text)))
		return false;
	at = strstr(text, "Uid:");
	return at && sscanf(at, "Uid: %d %d", &real, &effective) == 2 &&
	       real == USER && !effective;
}

/*
 * In the middle of the session the child becomes a program that its user may
 * not look at. Nothing of the session is left in its new memory.
 */
TEST_F(look, setuid_exec_closes_the_child)
{
	pid_t pid = self->pair.c.pid;

	ASSERT_EQ(0, make_setuid_file());
	EXPECT_EQ(EVERYTHING, LOOK(fellow, pid));
	ASSERT_EQ(0, af_post(&self->pair.c,
			     &(struct af_job){ .fn = do_exec_setuid }));
	/* Its pipes are closed by exec. */
	ASSERT_EQ(AF_GONE, af_wait(&self->pair.c));
	unlink(SETUID_FILE);
	ASSERT_TRUE(belongs_to_root(pid));
	EXPECT_EQ(0, LOOK(fellow, pid));
	EXPECT_EQ(0, LOOK(pair.p, pid));
	EXPECT_EQ(0, LOOK(stranger, pid));
	if (self->af.held)
		EXPECT_EQ(1, af_delta(&self->af, AF_CANCEL));
	ASSERT_EQ(0, kill(pid, SIGKILL));
	EXPECT_EQ(SIGKILL, pair_reap_child(&self->pair));
	PAIR_PARENT_IS_RIGHT(&self->pair, LATER);
}

/* From here on: read(2), write(2) and exit(2), by anything else it dies. */
static long do_write_jailed(const struct af_job *job)
{
	size_t i, step = AF_PIECE_PAGES / 2;
	int ok = 1;

	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
		syscall(SYS_exit, 3);
	for (i = 0; ok && i < job->pages; i += step)
		ok = write(job->seed, job->addr + i * AF_PAGE, AF_PAGE) ==
		     (ssize_t)AF_PAGE;
	for (i = 0; ok && i < job->pages; i++)
		ok = *(volatile uint64_t *)(job->addr + i * AF_PAGE) ==
		     af_value(SEED, i);
	syscall(SYS_exit, !ok);
	return -1;
}

/* A child in a jail of system calls is served as any other. */
TEST_F(look, jailed_child_has_its_snapshot)
{
	struct af_region *r = self->pair.r;
	char page[AF_PAGE];
	size_t i;

	ASSERT_EQ(0, af_post(&self->pair.c, &(struct af_job){
		.fn = do_write_jailed, .addr = r->base, .pages = r->pages,
		.seed = self->pipe[1] }));
	EXPECT_EQ(0, af_child_fill(&self->pair.p, r, 0, r->pages, LATER));
	for (i = 0; i < r->pages; i += AF_PIECE_PAGES / 2) {
		ASSERT_EQ((ssize_t)AF_PAGE, read(self->pipe[0], page, AF_PAGE));
		EXPECT_EQ(0, af_check_at(page, i, 1, SEED));
	}
	EXPECT_EQ(0, pair_reap_child(&self->pair));
	EXPECT_EQ(0, af_child_check(&self->pair.p, r, 0, r->pages, LATER));
	EXPECT_EQ(0, af_end(&self->pair.p));
}

/*
 * Memory that somebody else has just given back. As a page table entry the
 * secret is not present, but it is something.
 */
#define SECRET		0x5ec7e75ec7e75ec0UL
#define SECRET_BYTES	(96UL << 20)

static long do_keep_secret(const struct af_job *job)
{
	uint64_t *p = mmap(NULL, SECRET_BYTES, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	size_t i;

	(void)job;
	if (p == MAP_FAILED)
		return -errno;
	for (i = 0; i < SECRET_BYTES / sizeof(*p); i++)
		p[i] = SECRET;
	return 0;
}

FIXTURE(secret) {
	struct af af;
	struct af_region r;
	struct af_child c;
	int pipe[2];
};

/* Even pieces hold one page, odd ones none at all. */
FIXTURE_SETUP(secret)
{
	struct af_child owner;
	size_t i;

	ASSERT_EQ(0, pipe(self->pipe));
	ASSERT_EQ(0, af_region_reserve(&self->r, PIECES, SEED | AF_SPARSE));
	for (i = 0; i < PIECES; i += 2)
		af_fill_at(af_page(&self->r, af_piece(i)), i * AF_PIECE_PAGES,
			   AF_PIECE_PAGES, self->r.seed);
	ASSERT_EQ(0, af_spawn_other(&owner));
	ASSERT_EQ(0, af_call(&owner, do_keep_secret));
	AF_SETUP(AF_HOLD);
	AF_EXIT_OK(&owner);
	AF_SPAWN(&self->c);
}

FIXTURE_TEARDOWN(secret)
{
	AF_EXIT_OK(&self->c);
	AF_FINISH();
}

/* Every word of pages that lie at @pages and are page @first on of piece @piece. */
static long check_words(const char *pages, size_t piece, size_t first, size_t n)
{
	long wrong = 0;
	size_t i, k, words = AF_PAGE / sizeof(uint64_t);

	for (i = 0; i < n; i++) {
		const uint64_t *word = (const uint64_t *)(pages + i * AF_PAGE);
		uint64_t want = 0;

		if (piece % 2 == 0)
			want = af_value(SEED | AF_SPARSE,
					piece * AF_PIECE_PAGES + first + i);
		for (k = 0; k < words; k++)
			wrong += word[k] !=
				 (k == 0 || k == words - 1 ? want : 0);
	}
	return wrong;
}

static long do_check_words(const struct af_job *job)
{
	return check_words(job->addr, job->first, 0, job->pages);
}

static long do_write_pages(const struct af_job *job)
{
	size_t i;

	for (i = 0; i < job->pages; i++)
		if (write(job->seed, job->addr + i * AF_PAGE, AF_PAGE) !=
		    (ssize_t)AF_PAGE)
			return -errno;
	return 0;
}

/* Puts one byte in every page; no other may have come with it. */
static long do_write_bytes(const struct af_job *job)
{
	long wrong = 0;
	size_t i, k;

	for (i = 0; i < job->pages; i++) {
		char *page = job->addr + i * AF_PAGE;

		page[100] = 1;
		for (k = 8; k < AF_PAGE - 8; k++)
			wrong += page[k] != (k == 100);
	}
	return wrong;
}

#define EVERY_PIECE(i) for ((i) = 0; (i) < PIECES; (i)++)

TEST_F(secret, child_loads)
{
	size_t i;

	EVERY_PIECE(i)
		EXPECT_EQ(0, af_call(&self->c, do_check_words,
				     .addr = af_page(&self->r, af_piece(i)),
				     .first = i, .pages = AF_PIECE_PAGES));
}

TEST_F(secret, child_stores)
{
	size_t i;

	EVERY_PIECE(i)
		EXPECT_EQ(0, af_call(&self->c, do_write_bytes,
				     .addr = af_page(&self->r, af_piece(i)),
				     .pages = AF_PIECE_PAGES));
}

TEST_F(secret, parent_stores)
{
	size_t i;

	EVERY_PIECE(i) {
		struct af_job job = {
			.addr = af_page(&self->r, af_piece(i)),
			.pages = AF_PIECE_PAGES,
		};

		EXPECT_EQ(0, do_write_bytes(&job));
		EXPECT_EQ(0, af_call(&self->c, do_check_words,
				     .addr = af_page(&self->r, af_piece(i)),
				     .first = i, .pages = AF_PIECE_PAGES));
	}
}

TEST_F(secret, child_writes_to_a_pipe)
{
	char page[AF_PAGE];
	size_t i, k;

	EVERY_PIECE(i) {
		ASSERT_EQ(0, af_post(&self->c, &(struct af_job){
			.fn = do_write_pages, .seed = self->pipe[1],
			.addr = af_page(&self->r, af_piece(i)),
			.pages = AF_PIECE_PAGES }));
		for (k = 0; k < AF_PIECE_PAGES; k++) {
			ASSERT_EQ((ssize_t)AF_PAGE,
				  read(self->pipe[0], page, AF_PAGE));
			EXPECT_EQ(0, check_words(page, i, k, 1));
		}
		EXPECT_EQ(0, af_wait(&self->c));
	}
}

/* Through /proc/PID/mem and process_vm_readv(). */
TEST_F(secret, others_read_the_child)
{
	char *buf = malloc(AF_PIECE), path[64];
	struct iovec local = { buf, AF_PIECE };
	size_t i;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/mem", self->c.pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	EVERY_PIECE(i) {
		char *at = af_page(&self->r, af_piece(i));
		struct iovec remote = { at, AF_PIECE };

		memset(buf, 0x77, AF_PIECE);
		EXPECT_EQ((ssize_t)AF_PIECE, i & 2 ?
			  pread(fd, buf, AF_PIECE, (uintptr_t)at) :
			  process_vm_readv(self->c.pid, &local, 1, &remote, 1, 0));
		EXPECT_EQ(0, check_words(buf, i, 0, AF_PIECE_PAGES));
	}
	close(fd);
	free(buf);
}

TEST_HARNESS_MAIN
