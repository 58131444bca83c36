// SPDX-License-Identifier: GPL-2.0
/*
 * An unprivileged user forks as fast and as much as its group allows. What its
 * sessions take is charged to the group; workers do not do more for it than it
 * does itself; and another user's session gets its turn, and its end.
 */
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/times.h>
#include "mover.h"
#include "user.h"

#define ROOT	"/sys/fs/cgroup"
#define GROUP	ROOT "/af-flood"
#define SWITCH	"/memory.async_fork"
#define MAX_PIDS "90"
#define VICTIM_PIECES	20

/* What the user and the test both see. */
struct shared {
	volatile long open;	/* sessions begun by holders */
	volatile long forks;	/* forks of the loops that succeeded */
	volatile long failed;
	volatile bool exit;	/* children that wait for it leave */
};

FIXTURE(flood) {
	struct af af;
	struct af_child user;
	struct shared *shared;
	struct af_region victim;
};

FIXTURE_SETUP(flood)
{
	ASSERT_EQ(0, prctl(PR_SET_CHILD_SUBREAPER, 1));
	self->shared = af_shared(sizeof(*self->shared));
	af_write_file(ROOT "/cgroup.subtree_control", "+memory +pids");
	if (access(ROOT "/memory.stat", F_OK))
		SKIP(return, "no memory controller at " ROOT);
	ASSERT_EQ(0, user_make(&self->user, USER));
	AF_REGION(&self->victim, VICTIM_PIECES, AF_ZERO, 0xf10);
	AF_SETUP(AF_HOLD);
	ASSERT_EQ(0, mkdir(GROUP, 0755));
	ASSERT_EQ(0, af_write_file(GROUP "/pids.max", MAX_PIDS));
	af_write_file(GROUP "/memory.swap.max", "0");
	ASSERT_EQ(0, user_join(self->user.pid, GROUP));
}

FIXTURE_TEARDOWN(flood)
{
	/* Who is out of CPU time dies late. */
	af_write_file(GROUP "/cpu.max", "max");
	EXPECT_EQ(0, user_kill_group(GROUP));
	AF_FINISH();
	EXPECT_EQ(0, rmdir(GROUP));
}

static int set_limit(const char *file, long bytes)
{
	char path[128], text[32];

	snprintf(path, sizeof(path), GROUP "/%s", file);
	snprintf(text, sizeof(text), "%ld", bytes);
	return af_write_file(path, text);
}

/*
 * Sessions that stay open: pairs of a process and its child, both asleep. Each
 * parent is itself a child of the caller, copied before it forks.
 */
static long do_hold_sessions(const struct af_job *job)
{
	struct shared *shared = (struct shared *)job->seed;
	size_t i;

	for (i = 0; i < job->pages; i++) {
		pid_t pid = fork();

		if (pid < 0)
			return -errno;
		if (pid) {
			while (shared->open <= (long)i)
				usleep(1000);
			continue;
		}
		pid = fork();
		if (pid > 0)
			shared->open++;
		for (;;)
			pause();
	}
	return 0;
}

/* What do_map() made, in the user's process. */
static struct {
	char *base;
	size_t count, step;
} map;

/*
 * Makes job->first mappings of job->pages GiB, or of one piece, with one page in
 * each. A session has a range for every one, and a state for every piece.
 */
static long do_map(const struct af_job *job)
{
	size_t len = job->pages ? job->pages << 30 : AF_PIECE, i;
	size_t step = len + AF_PIECE;
	char *p = mmap(NULL, (job->first + 1) * step, PROT_NONE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return -errno;
	p = (char *)(((uintptr_t)p + AF_PIECE - 1) & ~(AF_PIECE - 1));
	map.base = p;
	map.count = job->first;
	map.step = step;
	for (i = 0; i < job->first; i++, p += step) {
		if (mprotect(p, len, PROT_READ | PROT_WRITE) ||
		    madvise(p, len, MADV_NOHUGEPAGE))
			return -errno;
		*p = 1;
	}
	return 0;
}

#define HOLDERS	16L
#define RANGES	200L

/* The group's kernel memory, but for stacks and page tables. */
static long charged_objects(void)
{
	return user_group_number(GROUP, "memory.stat", "kernel") -
	       user_group_number(GROUP, "memory.stat", "kernel_stack") -
	       user_group_number(GROUP, "memory.stat", "pagetables");
}

struct objects {
	long last;
	int same;	/* looks that saw no change */
};

/* The kernel sums a group's numbers up every two seconds. */
static bool have_settled(void *arg)
{
	struct objects *o = arg;
	long now = charged_objects();

	usleep(100000);
	o->same = now == o->last ? o->same + 1 : 0;
	o->last = now;
	return o->same >= 50;
}

/* What HOLDERS pairs that nobody copies for weigh in the group. */
static long weigh_holders(struct __test_metadata *_metadata, struct af *af,
			  struct af_child *user, struct shared *shared)
{
	struct objects objects = { 0 };

	shared->open = 0;
	EXPECT_EQ(0, af_call(user, do_map, .first = RANGES));
	EXPECT_EQ(0, af_call(user, do_hold_sessions, .pages = HOLDERS,
			     .seed = (uintptr_t)shared));
	EXPECT_EQ(0, af_poll(have_settled, &objects, 1));
	TH_LOG("%ld KiB of objects, %ld sessions", objects.last >> 10,
	       af_delta(af, AF_SESSION) - af_delta(af, AF_END));
	return objects.last;
}

/* As many sessions as the user likes: what they take is the group's. */
TEST_F(flood, sessions_are_charged_to_their_group)
{
	struct af_child plain_user;
	long plain, lazy;

	self->af.want = 2 * HOLDERS;
	lazy = weigh_holders(_metadata, &self->af, &self->user, self->shared);
	if (!self->af.held)
		return;
	EXPECT_LE(HOLDERS, af_delta(&self->af, AF_SESSION) -
			   af_delta(&self->af, AF_END));
	ASSERT_EQ(0, user_kill_group(GROUP));
	self->af.allow |= AF_ALLOW(AF_FB_OFF);
	ASSERT_EQ(0, af_write_file(AF_MODE_FILE, "0"));
	ASSERT_EQ(0, user_make(&plain_user, USER));
	ASSERT_EQ(0, user_join(plain_user.pid, GROUP));
	plain = weigh_holders(_metadata, &self->af, &plain_user, self->shared);
	/* A range takes more than 64 bytes. */
	EXPECT_LT(HOLDERS * RANGES * 64, lazy - plain);
	TH_LOG("a session takes %ld bytes", (lazy - plain) / HOLDERS);
}

/* The ticks of CPU time that all kernel workers had. */
static long worker_ticks(void)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	char path[300], text[1024], *end;
	long user, kernel, sum = 0;

	while (proc && (entry = readdir(proc))) {
		snprintf(path, sizeof(path), "/proc/%s/stat", entry->d_name);
		if (af_read_file(path, text, sizeof(text)))
			continue;
		end = strrchr(text, ')');
		if (end && strstr(text, " (kworker/") &&
		    sscanf(end + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %ld %ld",
			   &user, &kernel) == 2)
			sum += user + kernel;
	}
	closedir(proc);
	return sum;
}

/* Of the caller and its children that are gone. */
static long own_ticks(void)
{
	struct tms t;

	times(&t);
	return t.tms_utime + t.tms_stime + t.tms_cutime + t.tms_cstime;
}

/* Forks, and children look at every mapping, until that took so many ticks. */
static long do_fork_and_look(const struct af_job *job)
{
	long begin = own_ticks();
	int status;
	size_t i;

	do {
		pid_t pid = fork();

		if (!pid) {
			for (i = 0; i < map.count; i++)
				if (map.base[i * map.step] != 1)
					_exit(1);
			_exit(0);
		}
		if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
			return -1;
	} while (own_ticks() - begin < (long)job->seed);
	return own_ticks() - begin;
}

/*
 * Workers run on nobody's account, so what a user can have them do must cost
 * the user about as much. Here it maps 8 TiB that hold four pages; its children
 * look at all four, and then there is nothing left to do.
 */
TEST_F(flood, workers_do_no_more_than_their_user)
{
	long second = sysconf(_SC_CLK_TCK), begin, user_had, workers_had;

	ASSERT_EQ(0, af_release(&self->af));
	self->af.spare = 100000000;
	if (self->af.async)
		ASSERT_EQ(0, af_write_file(GROUP SWITCH, "8"));
	ASSERT_EQ(0, af_call(&self->user, do_map, .first = 4, .pages = 2048));
	begin = worker_ticks();
	user_had = af_call(&self->user, do_fork_and_look, .seed = second / 2);
	ASSERT_LT(0, user_had);
	if (self->af.async)
		EXPECT_EQ(0, af_settle());
	workers_had = worker_ticks() - begin;
	TH_LOG("the user had %ld ms, the workers %ld ms, %ld sessions",
	       user_had * 1000 / second, workers_had * 1000 / second,
	       af_delta(&self->af, AF_SESSION));
	EXPECT_LT(workers_had, 16 * user_had);
}

/* Forks all the time; children leave at once, or look around before, or exec. */
static void loop(struct shared *shared, unsigned int kind, const char *base,
		 size_t pages)
{
	char *const argv[] = { (char *)"true", NULL };
	volatile char sink;
	size_t i;

	for (;; kind++) {
		pid_t pid = fork();

		if (!pid) {
			for (i = 0; kind % 4 && i < pages; i += 97)
				sink = base[i * AF_PAGE];
			(void)sink;
			if (kind % 4 == 2)
				execv("/bin/true", argv);
			if (kind % 4 == 3)
				usleep(4000);
			_exit(0);
		}
		if (pid < 0) {
			shared->failed++;
			usleep(1000);
		} else {
			shared->forks++;
		}
		while (waitpid(-1, NULL, kind % 8 < 5 ? WNOHANG : 0) > 0)
			;
	}
}

#define LOOPS	6
/* The flood lasts for so many rounds of its victim, and for so many forks. */
#define ROUNDS	6
#define FORKS	30

/* Keeps so many loops running; the OOM killer shall take those. */
static void keep_looping(struct shared *shared, const char *base, size_t pages)
{
	unsigned int i;

	for (i = 0;; i++) {
		pid_t pid = fork();

		if (!pid) {
			af_write_file("/proc/self/oom_score_adj", "1000");
			loop(shared, i, base, pages);
		}
		if (pid < 0) {
			shared->failed++;
			usleep(1000);
		}
		if (i >= LOOPS - 1)
			wait(NULL);
	}
}

static long do_loop(const struct af_job *job)
{
	pid_t pid = fork();

	if (!pid)
		keep_looping((struct shared *)job->seed, job->addr, job->pages);
	return pid > 0 ? 0 : -errno;
}

static long do_make_region(const struct af_job *job)
{
	struct af_region r;

	if (af_region_make(&r, job->pages, AF_ZERO, 0xf1))
		return -1;
	return (long)r.base;
}

/* The pages of @pid's page tables. */
static long tables_of(pid_t pid)
{
	char path[64], text[4096], *at;

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	if (af_read_file(path, text, sizeof(text)))
		return -1;
	at = strstr(text, "VmPTE:");
	return at ? atol(at + 6) / 4 : -1;
}

static bool is_whole(void *child)
{
	return tables_of(((struct af_child *)child)->pid) >= VICTIM_PIECES;
}

/*
 * The flood's own forks may fail, and the OOM killer comes for its processes.
 * The victim sits elsewhere: its sessions are begun, and brought to their end by
 * workers alone while its child sleeps, by the child, or by its parent.
 */
TEST_F(flood, others_have_their_turn)
{
	struct af_region *r = &self->victim;
	struct af_child c;
	char *base;
	int i;

	self->af.spare = 100000000;
	self->af.allow |= AF_ALLOW(AF_POISON) | AF_ALLOW(AF_FB_NOMEM);
	ASSERT_EQ(0, af_release(&self->af));
	base = (char *)af_call(&self->user, do_make_region, .pages = 30);
	ASSERT_LT((char *)0x1000, base);
	ASSERT_EQ(0, set_limit("memory.max",
			       user_group_number(GROUP, "memory.current", "") +
			       (4L << 20)));
	if (self->af.async)
		ASSERT_EQ(0, af_write_file(GROUP SWITCH, "8"));
	ASSERT_EQ(0, af_call(&self->user, do_loop, .addr = base,
			     .pages = 30 * AF_PIECE_PAGES,
			     .seed = (uintptr_t)self->shared));
	for (i = 0; i < ROUNDS || self->shared->forks < FORKS; i++) {
		AF_SPAWN(&c);
		if (i % 3 == 0)
			EXPECT_EQ(0, af_poll(is_whole, &c, 100));
		if (i % 3 == 1)
			af_fill(r, 0, r->pages, r->seed);
		EXPECT_EQ(0, af_child_check_all(&c, r));
		AF_EXIT_OK(&c);
	}
	TH_LOG("%d rounds, %ld forks of the flood, %ld failed; at most %ld KiB",
	       i, self->shared->forks, self->shared->failed,
	       user_group_number(GROUP, "memory.peak", "") >> 10);
	EXPECT_LE(user_group_number(GROUP, "memory.peak", ""),
		  user_group_number(GROUP, "memory.max", ""));
	EXPECT_EQ(0, user_kill_group(GROUP));
	EXPECT_EQ(0, af_settle());
	EXPECT_EQ(0, af_check_all(r));
}

/* Makes a child that stays until shared->exit. Returns its pid. */
static long do_fork_waiter(const struct af_job *job)
{
	struct shared *shared = (struct shared *)job->seed;
	pid_t pid = fork();

	if (!pid) {
		while (!shared->exit)
			usleep(1000);
		_exit(0);
	}
	return pid > 0 ? pid : -errno;
}

/* Opens a session of 4 million pieces. Returns the child's pid, or an error. */
static pid_t fork_of_many_pieces(struct af_child *user, struct shared *shared)
{
	long ret = af_call(user, do_map, .first = 4, .pages = 2048);

	return ret ? ret : af_call(user, do_fork_waiter,
				   .seed = (uintptr_t)shared);
}

/* Whether process *@pid has let go of its memory, or is about to unmap it. */
static bool has_no_memory(void *pid)
{
	char path[64], text[64];

	snprintf(path, sizeof(path), "/proc/%d/statm", *(pid_t *)pid);
	return !af_read_file(path, text, sizeof(text)) && !strncmp(text, "0 ", 2);
}

static bool is_gone(pid_t pid)
{
	char path[64], text[1024], *end;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	if (af_read_file(path, text, sizeof(text)))
		return true;
	end = strrchr(text, ')');
	return !end || end[2] == 'Z' || end[2] == 'X';
}

static bool has_ended(void *af)
{
	return af_delta(af, AF_END) > 0;
}

/* Stops the user almost: its group has 1 ms of a CPU each second. */
static int stop_user(bool stop)
{
	return af_write_file(GROUP "/cpu.max", stop ? "1000 1000000" : "max");
}

static bool can_stop_user(void)
{
	af_write_file(ROOT "/cgroup.subtree_control", "+cpu");
	return !access(GROUP "/cpu.max", W_OK);
}

/*
 * The user's child has 4 million pieces to look at as it exits, in 1 ms a second.
 * Sessions are freed after a grace period, which must not wait for that child.
 */
TEST_F(flood, others_end_while_one_stands_still)
{
	struct af_child c;
	pid_t waiter;

	if (!self->af.held)
		SKIP(return, "needs held workers (debug kernel)");
	if (!can_stop_user())
		SKIP(return, "no bandwidth control of the CPU");
	self->af.want = 1;
	waiter = fork_of_many_pieces(&self->user, self->shared);
	ASSERT_LT(0, waiter);
	ASSERT_EQ(0, stop_user(true));
	self->shared->exit = true;
	ASSERT_EQ(0, af_poll(has_no_memory, &waiter, 60));

	AF_SPAWN(&c);
	EXPECT_EQ(0, af_child_check_all(&c, &self->victim));
	AF_EXIT_OK(&c);
	EXPECT_EQ(0, af_poll(has_ended, &self->af, 20));
	/* Else this proved nothing. */
	EXPECT_FALSE(is_gone(waiter));
	EXPECT_EQ(0, stop_user(false));
}

/* The first piece is copied here, the others in vain looked at. */
static long do_protect(const struct af_job *job)
{
	(void)job;
	return mprotect(map.base, map.step - AF_PIECE, PROT_READ) ? -errno : 0;
}

static bool is_inside(void *af)
{
	return af_delta(af, AF_PIECE_PARENT) > 0;
}

static bool is_copied(void *af)
{
	return af_delta(af, AF_PIECE_PARENT) + af_delta(af, AF_PIECE_WORKER) >= 4;
}

/*
 * A session is over while its parent is still inside, who looks at a million
 * pieces in 1 ms a second: he has the last reference, and gives it up.
 */
TEST_F(flood, last_one_inside_ends_the_session)
{
	pid_t waiter;

	if (!self->af.held)
		SKIP(return, "needs held workers (debug kernel)");
	if (!can_stop_user())
		SKIP(return, "no bandwidth control of the CPU");
	self->af.want = 1;
	waiter = fork_of_many_pieces(&self->user, self->shared);
	ASSERT_LT(0, waiter);
	ASSERT_EQ(0, stop_user(true));
	ASSERT_EQ(0, af_post(&self->user, &(struct af_job){ .fn = do_protect }));
	ASSERT_EQ(0, af_poll(is_inside, &self->af, 60));
	ASSERT_EQ(0, af_release(&self->af));
	ASSERT_EQ(0, af_poll(is_copied, &self->af, 60));
	sleep(2);
	/* Else this proved nothing. */
	EXPECT_EQ(0, af_delta(&self->af, AF_END));
	EXPECT_EQ(0, stop_user(false));
	EXPECT_EQ(0, af_wait(&self->user));
	EXPECT_EQ(0, af_poll(has_ended, &self->af, 20));
	self->shared->exit = true;
}

#define MAX_ACTIVE_FILE "/sys/devices/virtual/workqueue/async_fork/max_active"

#define MOVED_PIECES	20

/* Pieces with content. Returns where. */
static long do_make_content(const struct af_job *job)
{
	struct af_region r;

	(void)job;
	if (af_region_make(&r, MOVED_PIECES, AF_BASE, 0xf2))
		return -1;
	return (long)r.base;
}

/*
 * The user's parent migrates its pages in 1 ms a second, so workers find them in
 * migration all the time. They must not wait for that: one of all runs at a time,
 * and it is the victim's turn.
 */
TEST_F(flood, others_are_copied_during_a_migration)
{
	struct moved moved = { .pid = self->user.pid,
			       .pages = MOVED_PIECES * AF_PIECE_PAGES };
	char active[16];
	struct af_child c;
	pid_t waiter;

	if (!self->af.held)
		SKIP(return, "needs held workers (debug kernel)");
	if (!can_stop_user() || !af_two_nodes())
		SKIP(return, "needs bandwidth control of the CPU and two nodes");
	ASSERT_EQ(0, af_read_file(MAX_ACTIVE_FILE, active, sizeof(active)));
	ASSERT_EQ(0, af_write_file(MAX_ACTIVE_FILE, "1"));
	self->af.want = 1;
	moved.base = (char *)af_call(&self->user, do_make_content);
	ASSERT_LT((char *)0x1000, moved.base);
	waiter = af_call(&self->user, do_fork_waiter,
			 .seed = (uintptr_t)self->shared);
	ASSERT_LT(0, waiter);
	ASSERT_EQ(0, af_post(&self->user, &(struct af_job){ .fn = mover_do_move_on,
		.addr = (char *)&self->shared->exit }));
	sleep(1);
	ASSERT_EQ(0, stop_user(true));
	ASSERT_EQ(0, af_poll(mover_moves, &moved, 60));
	ASSERT_EQ(0, af_release(&self->af));
	sleep(2);

	AF_SPAWN(&c);
	EXPECT_EQ(0, af_poll(is_whole, &c, 20));
	EXPECT_EQ(0, af_child_check_all(&c, &self->victim));
	AF_EXIT_OK(&c);
	TH_LOG("%ld copies met a page in migration",
	       af_delta(&self->af, AF_WAIT_MIGRATION));
	/* Else this proved nothing. */
	EXPECT_LT(0, af_delta(&self->af, AF_WAIT_MIGRATION));
	EXPECT_EQ(0, stop_user(false));
	self->shared->exit = true;
	EXPECT_EQ(0, af_wait(&self->user));
	EXPECT_EQ(0, af_write_file(MAX_ACTIVE_FILE, active));
}

TEST_HARNESS_MAIN
