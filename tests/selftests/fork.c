// SPDX-License-Identifier: GPL-2.0
/*
 * Forks that meet an open session: by the parent, by the child, by threads,
 * and the kinds of process that share an mm.
 *
 * Guards the drains in copy_process() and dup_mmap(), mm_init() (the new mm must
 * not inherit the pointer) and the publication of the session.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include "harness.h"

#define PIECES	4
#define SEED	0x81
#define LATER	0x82

extern char **environ;

AF_PLAIN_FIXTURE(again, PIECES)

/* Each child keeps the epoch it was forked in, whatever follows. */
TEST_F(again, parent_forks_again)
{
	struct af_child c[5];
	long i;

	for (i = 0; i < 5; i++) {
		af_fill(&self->r, 0, self->r.pages, SEED + i);
		AF_SPAWN(&c[i]);
	}
	af_fill(&self->r, 0, self->r.pages, LATER + 100);
	for (i = 0; i < 5; i++)
		EXPECT_EQ(0, af_child_check(&c[i], &self->r, 0, self->r.pages,
					    SEED + i));
	for (i = 0; i < 5; i++)
		AF_EXIT_OK(&c[i]);
}

/* The second fork finds the first session half done by both sides. */
TEST_F(again, parent_forks_midway)
{
	struct af_child first, second;
	size_t page = af_piece(1) + 5;

	AF_SPAWN(&first);
	af_fill(&self->r, page, 1, LATER);
	EXPECT_EQ(0, af_child_check(&first, &self->r, af_piece(2), 1,
				    self->r.seed));
	AF_SPAWN(&second);
	af_fill(&self->r, 0, self->r.pages, LATER + 1);
	EXPECT_EQ(0, af_child_check(&second, &self->r, page, 1, LATER));
	EXPECT_EQ(0, af_child_check(&second, &self->r, 0, page, self->r.seed));
	EXPECT_EQ(0, af_child_check_all(&first, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER + 1));
	AF_EXIT_OK(&first);
	AF_EXIT_OK(&second);
}

/* Every session is freed, not just over: its module is free to go. */
static bool are_freed(void *unused)
{
	char text[16];

	(void)unused;
	return !af_read_file("/sys/module/async_fork/refcnt", text,
			     sizeof(text)) && !atoi(text);
}

/*
 * A fork from within a session, which is a plain one: the new mm is a copy of
 * the parent's, but for the pointer.
 */
TEST_F(again, plain_fork_follows)
{
	struct af_child first, second;

	self->af.allow |= AF_ALLOW(AF_FB_OFF);
	AF_SPAWN(&first);
	if (self->af.async)
		ASSERT_EQ(0, af_write_file(AF_MODE_FILE, "0"));
	ASSERT_EQ(0, af_spawn_other(&second));
	AF_EXIT_OK(&first);
	if (self->af.async)
		EXPECT_EQ(0, af_poll(are_freed, NULL, 60));
	EXPECT_EQ(0, af_child_fill(&second, &self->r, 0, self->r.pages, LATER));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&second, &self->r, 0, self->r.pages,
				    LATER));
	AF_EXIT_OK(&second);
}

/* The fork as such must not copy its writes into an older child. */
TEST_F(again, first_child_is_gone)
{
	struct af_child first, second;

	AF_SPAWN(&first);
	AF_EXIT_OK(&first);
	AF_SPAWN(&second);
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_check_all(&second, &self->r));
	AF_EXIT_OK(&second);
}

/* In a child: the grandchild, and the region that all of them know. */
static struct af child_af;
static struct af_child grandchild;

static long do_spawn_grandchild(const struct af_job *job)
{
	child_af = *(const struct af *)job->addr;
	return af_spawn(&child_af, &grandchild);
}

static long do_grandchild_check(const struct af_job *job)
{
	return af_call(&grandchild, af_do_check, .addr = job->addr,
		       .first = job->first, .pages = job->pages,
		       .seed = job->seed);
}

static long do_end_grandchild(const struct af_job *job)
{
	(void)job;
	return af_end(&grandchild);
}

#define GRANDCHILD_CHECK(c, s) af_call((c), do_grandchild_check,	\
	.addr = self->r.base, .pages = self->r.pages, .seed = (s))

/* A child forks while its own content still comes from the parent. */
TEST_F(again, child_forks)
{
	struct af_child c;

	AF_SPAWN(&c);
	EXPECT_EQ(0, af_call(&c, do_spawn_grandchild,
			     .addr = (char *)&self->af));
	self->af.want++;
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_fill(&c, &self->r, 0, self->r.pages, LATER + 1));
	EXPECT_EQ(0, GRANDCHILD_CHECK(&c, self->r.seed));
	EXPECT_EQ(0, af_child_check(&c, &self->r, 0, self->r.pages, LATER + 1));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
	EXPECT_EQ(0, af_call(&c, do_end_grandchild));
	AF_EXIT_OK(&c);
}

/* Child and parent fork at the same time, from the two ends of a session. */
TEST_F(again, both_fork)
{
	struct af_child c, second;

	AF_SPAWN(&c);
	ASSERT_EQ(0, af_post(&c, &(struct af_job){ .fn = do_spawn_grandchild,
						  .addr = (char *)&self->af }));
	ASSERT_EQ(0, af_spawn_other(&second));
	EXPECT_EQ(0, af_wait(&c));
	self->af.want += 2;
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, GRANDCHILD_CHECK(&c, self->r.seed));
	EXPECT_EQ(0, af_child_check_all(&second, &self->r));
	EXPECT_EQ(0, af_child_check_all(&c, &self->r));
	EXPECT_EQ(0, af_call(&c, do_end_grandchild));
	AF_EXIT_OK(&second);
	AF_EXIT_OK(&c);
}

/* The child goes on as its own child, which answers in its place. */
static long do_become_grandchild(const struct af_job *job)
{
	pid_t pid = fork();

	(void)job;
	if (pid > 0)
		_exit(0);
	return pid;
}

TEST_F(again, grandchild_outlives_child)
{
	struct af_child c;
	int i;

	AF_SPAWN(&c);
	for (i = 0; i < 4; i++) {
		EXPECT_EQ(0, af_call(&c, do_become_grandchild));
		self->af.want++;
	}
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_check_all(&c, &self->r));
	AF_EXIT_OK(&c);
}

/*
 * Forks @left generations more, each of which checks its ancestor's epoch,
 * writes its own, and checks it again when its descendants are done.
 */
static int generation(struct af_region *r, int left)
{
	int status;
	pid_t pid;

	if (!left)
		return 0;
	pid = fork();
	if (pid < 0)
		return 1;
	if (!pid) {
		if (af_check(r, 0, r->pages, SEED + left))
			_exit(1);
		af_fill(r, 0, r->pages, SEED + left - 1);
		_exit(generation(r, left - 1) ||
		      af_check(r, 0, r->pages, SEED + left - 1));
	}
	af_fill(r, 0, r->pages / 2, LATER + left);
	waitpid(pid, &status, 0);
	return status || af_check(r, 0, r->pages / 2, LATER + left) ||
	       (af_fill(r, 0, r->pages / 2, SEED + left), 0);
}

TEST_F(again, six_generations)
{
	ASSERT_EQ(0, af_release(&self->af));
	af_fill(&self->r, 0, self->r.pages, SEED + 6);
	EXPECT_EQ(0, generation(&self->r, 6));
	self->af.want += 6;
}

/* What a forking thread does, and how often it got through. */
struct forker {
	struct af_region *r;
	int rounds, done, wrong;
	unsigned int linger;	/* how long a child lives, in us */
	pthread_t thread;
};

static void *fork_loop(void *arg)
{
	struct forker *f = arg;
	int status;

	for (f->done = 0; f->done < f->rounds; f->done++) {
		size_t page = af_piece(f->done % PIECES) + f->done;
		/* fork() holds the C library's locks: two never meet in it. */
		pid_t pid = _Fork();

		if (!pid) {
			/* So that the other thread's fork() finds a session. */
			usleep(f->linger);
			_exit(!!af_check(f->r, page, 100, f->r->seed));
		}
		if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
			f->wrong++;
	}
	return NULL;
}

/* DESIGN.md section 9, item 18: both threads make progress. */
TEST_F(again, two_threads_fork)
{
	struct forker f[2] = { { .r = &self->r, .rounds = 25 },
			       { .r = &self->r, .rounds = 25 } };
	int i;

	ASSERT_EQ(0, af_release(&self->af));
	for (i = 0; i < 2; i++)
		ASSERT_EQ(0, pthread_create(&f[i].thread, NULL, fork_loop,
					    &f[i]));
	for (i = 0; i < 2; i++)
		pthread_join(f[i].thread, NULL);
	for (i = 0; i < 2; i++) {
		EXPECT_EQ(25, f[i].done);
		EXPECT_EQ(0, f[i].wrong);
	}
	self->af.want += 50;
	EXPECT_EQ(0, af_check_all(&self->r));
}

/* With the workers held, the sessions end by drain and by exit alone. */
TEST_F(again, two_threads_fork_held)
{
	struct forker f[2] = {
		{ .r = &self->r, .rounds = 10, .linger = 30000 },
		{ .r = &self->r, .rounds = 10, .linger = 30000 } };
	int i;

	for (i = 0; i < 2; i++)
		ASSERT_EQ(0, pthread_create(&f[i].thread, NULL, fork_loop,
					    &f[i]));
	for (i = 0; i < 2; i++)
		pthread_join(f[i].thread, NULL);
	EXPECT_EQ(0, f[0].wrong + f[1].wrong);
	self->af.want += 20;
}

/*
 * A process that shares the parent's mm is the parent, as far as a session is
 * concerned: what it writes must not reach the snapshot.
 */
static int clone_vm_writer(void *arg)
{
	struct af_region *r = arg;

	af_fill(r, 0, r->pages, LATER);
	return 0;
}

static char clone_stack[65536] __attribute__((aligned(16)));

static long run_clone_vm(struct af_region *r)
{
	int status = -1;
	pid_t pid = clone(clone_vm_writer, clone_stack + sizeof(clone_stack),
			  CLONE_VM | SIGCHLD, r);

	return pid < 0 || waitpid(pid, &status, 0) != pid || status;
}

static long do_clone_vm(const struct af_job *job)
{
	return run_clone_vm((struct af_region *)job->addr);
}

TEST_F(again, clone_vm_of_parent_writes)
{
	struct af_child c;

	AF_SPAWN(&c);
	EXPECT_EQ(0, run_clone_vm(&self->r));
	EXPECT_EQ(0, af_child_check_all(&c, &self->r));
	EXPECT_EQ(0, af_check(&self->r, 0, self->r.pages, LATER));
	AF_EXIT_OK(&c);
}

TEST_F(again, clone_vm_of_child_writes)
{
	struct af_child c;

	AF_SPAWN(&c);
	EXPECT_EQ(0, af_call(&c, do_clone_vm, .addr = (char *)&self->r));
	EXPECT_EQ(0, af_check_all(&self->r));
	EXPECT_EQ(0, af_child_check(&c, &self->r, 0, self->r.pages, LATER));
	AF_EXIT_OK(&c);
}

/* vfork() and posix_spawn() end with an exec that is not the session's. */
TEST_F(again, vfork_and_posix_spawn)
{
	char *argv[] = { "true", NULL };
	struct af_child c;
	int status = -1;
	pid_t pid;

	AF_SPAWN(&c);
	pid = vfork();
	if (!pid) {
		execv("/bin/true", argv);
		_exit(127);
	}
	EXPECT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	ASSERT_EQ(0, posix_spawn(&pid, "/bin/true", NULL, NULL, argv, environ));
	EXPECT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	if (self->af.held)
		EXPECT_EQ(0, af_delta(&self->af, AF_CANCEL));
	af_fill(&self->r, 0, self->r.pages, LATER);
	EXPECT_EQ(0, af_child_check_all(&c, &self->r));
	AF_EXIT_OK(&c);
}

/* Regions that fork() treats in its own way lie between ordinary ones. */
TEST_F(again, wipeonfork_and_dontfork)
{
	char *wipe = af_page(&self->r, af_piece(1));
	char *dont = af_page(&self->r, af_piece(2) + 100);
	unsigned char vec;
	struct af_child c;

	ASSERT_EQ(0, madvise(wipe, AF_PIECE, MADV_WIPEONFORK));
	ASSERT_EQ(0, madvise(dont, 100 * AF_PAGE, MADV_DONTFORK));
	AF_SPAWN(&c);
	EXPECT_EQ(0, af_child_check(&c, &self->r, 0, af_piece(1),
				    self->r.seed));
	EXPECT_EQ(0, af_call(&c, af_do_zero, .addr = wipe,
			     .pages = AF_PIECE_PAGES));
	EXPECT_EQ(0, af_child_check(&c, &self->r, af_piece(2), 100,
				    self->r.seed));
	EXPECT_EQ(0, af_child_check(&c, &self->r, af_piece(2) + 200,
				    self->r.pages - af_piece(2) - 200,
				    self->r.seed));
	EXPECT_EQ(0, mincore(dont, 1, &vec));
	EXPECT_EQ(0, af_check_all(&self->r));
	AF_EXIT_OK(&c);
}

/*
 * A second fork() has to complete the first one's session, which takes a while,
 * and another thread goes on meanwhile. The child must be the process of one
 * instant: not with the heap's end, the files and the handlers of before, and the
 * memory of after.
 */
FIXTURE(drain) {
	struct af af;
	struct af_region r;
};

FIXTURE_VARIANT(drain) {
	int (*act)(void);	/* in the parent, meanwhile */
	long (*look)(const struct af_job *job);	/* in the child */
};

#define SHRINK	(256 * AF_PAGE)

static int shrink_heap(void)
{
	char *end = (char *)syscall(SYS_brk, 0) - SHRINK;

	return syscall(SYS_brk, end) != (long)end;
}

/* What lies right below the heap's end must be there. */
static long do_heap_has_end(const struct af_job *job)
{
	char *end = (char *)syscall(SYS_brk, 0);
	unsigned char vec;

	(void)job;
	return mincore(end - AF_PAGE, AF_PAGE, &vec) ? -errno : 0;
}

/* What memory says of files and handlers. */
static volatile int new_file, has_handler;

static void on_signal(int sig)
{
	(void)sig;
}

static int open_and_handle(void)
{
	if (signal(SIGUSR1, on_signal) == SIG_ERR)
		return -1;
	has_handler = true;
	new_file = dup(0);
	return new_file < 0;
}

/* It must be so. */
static long do_memory_is_true(const struct af_job *job)
{
	struct sigaction act;

	(void)job;
	if (new_file && fcntl(new_file, F_GETFD) < 0)
		return -errno;
	if (sigaction(SIGUSR1, NULL, &act))
		return -errno;
	return has_handler && act.sa_handler != on_signal;
}

FIXTURE_VARIANT_ADD(drain, heap) {
	.act = shrink_heap, .look = do_heap_has_end };
FIXTURE_VARIANT_ADD(drain, files) {
	.act = open_and_handle, .look = do_memory_is_true };

#define DRAINED	48

FIXTURE_SETUP(drain)
{
	AF_REGION(&self->r, DRAINED, AF_ZERO, SEED);
	ASSERT_NE((void *)-1, sbrk(2 * SHRINK));
	AF_SETUP(AF_HOLD);
}

FIXTURE_TEARDOWN(drain)
{
	AF_FINISH();
}

static bool parent_copies(void *af)
{
	return af_delta(af, AF_PIECE_PARENT) > 0;
}

struct meanwhile {
	struct af *af;
	int (*act)(void);
	int ret;
	bool late;
};

/* Acts while fork() copies; it is late if all is copied by then. */
static void *do_meanwhile(void *arg)
{
	struct meanwhile *m = arg;

	m->ret = af_poll(parent_copies, m->af, 60) || m->act();
	m->late = af_delta(m->af, AF_PIECE_PARENT) >= DRAINED;
	return NULL;
}

TEST_F(drain, child_is_of_one_instant)
{
	struct meanwhile m = { .af = &self->af, .act = variant->act };
	struct af_child first, second;
	pthread_t thread;

	if (!self->af.held)
		SKIP(return, "needs held workers (debug kernel)");
	AF_SPAWN(&first);
	ASSERT_EQ(0, pthread_create(&thread, NULL, do_meanwhile, &m));
	AF_SPAWN(&second);
	pthread_join(thread, NULL);
	EXPECT_EQ(0, m.ret);
	/* Behind the drain it proves nothing, and plain fork() is as loose. */
	if (m.late)
		TH_LOG("the other thread came too late");
	else
		EXPECT_EQ(0, af_call(&second, variant->look));
	EXPECT_EQ(0, af_call(&first, variant->look));
	EXPECT_EQ(0, af_child_check_all(&first, &self->r));
	EXPECT_EQ(0, af_child_check_all(&second, &self->r));
	AF_EXIT_OK(&second);
	AF_EXIT_OK(&first);
}

TEST_HARNESS_MAIN
