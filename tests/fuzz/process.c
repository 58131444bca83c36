// SPDX-License-Identifier: GPL-2.0
/* The threads and processes of a round: what they do, and how they end. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

#define NO_TICKET	UINT64_MAX

/* How this process works; its children make their own. */
static struct {
	unsigned int threads, ops, forks;
	pthread_t thread[FZ_THREADS], writer[2];
	bool writing, wrote;	/* tickets: now, ever */
	uint64_t last;		/* ticket, if known */
} self;

void hold_workers(bool on)
{
	if (fz->async && fz->plan.hold)
		af_write_file(AF_HOLD_FILE, on ? "1" : "0");
}

static struct node *node_by_pid(pid_t pid)
{
	int i, n = atomic_load(&fz->nodes);

	for (i = 0; i < n && i < FZ_NODES; i++)
		if (atomic_load(&fz->node[i].pid) == pid)
			return &fz->node[i];
	return NULL;
}

/* What became of a process of the round, as its parent or the runner learns. */
void reaped(pid_t pid, int status)
{
	struct node *n = node_by_pid(pid);

	if (n) {
		atomic_store(&n->state, ND_GONE);
		atomic_store(&n->reaped, true);
	}
	if (!status || failing())
		return;
	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL &&
	    ((n && n->killed) || fz->poison))
		return;
	fail("process %d (node %d, parent %d) ended with status %#x%s", pid,
	     n ? n->number : -1, n ? n->parent : -1, status,
	     WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL ?
	     ": killed by nobody of ours" : "");
}

static void __attribute__((noreturn)) run_child(struct node *n)
{
	me = n;
	atomic_store(&n->pid, getpid());
	run_node(n);
}

/* What the parent changes before anybody had the time to copy. */
static void burst(struct rng *rng)
{
	size_t n = below(rng, 40), i;

	for (i = 0; i < n && !failing(); i++) {
		struct slot *s = &me->slot[below(rng, fz->plan.slots)];

		slot_lock(s);
		write_page(s, below(rng, s->pages), BY_LOAD);
		slot_unlock(s);
	}
}

/* A child with a model of its own. */
static void fork_node(struct rng *rng)
{
	struct node *child;
	pid_t pid;

	if (me->depth >= FZ_DEPTH || self.forks == 0)
		return;
	child = node_new(me);
	if (!child)
		return;
	self.forks--;
	child->seed = mix(me->seed, ++me->forks);
	if (one_in(rng, 3))
		hold_workers(true);
	slots_lock(me);
	node_inherit(child, me);
	/* Without writers of its own a process knows nothing of its tickets. */
	child->floor = self.writing ? atomic_load(&me->written) : 0;
	atomic_store(&child->state, ND_LIVE);
	pid = fork();
	if (!pid)
		run_child(child);
	if (self.writing)
		atomic_store(&child->ceiling, atomic_load(&me->taken) + 1);
	slots_unlock(me);
	atomic_fetch_add(&fz->nr_forks, 1);
	if (pid > 0) {
		atomic_store(&child->pid, pid);
		burst(rng);
		return;
	}
	atomic_store(&child->state, ND_GONE);
	fail("fork: %s", strerror(errno));
}

/*
 * A child that only looks at the tickets. Nobody is stopped for it, so that
 * several threads may be in fork() at once.
 */
static void fork_light(struct rng *rng)
{
	uint64_t floor = atomic_load(&me->written), last = NO_TICKET;
	bool look = fz->plan.writers && self.writing && !one_in(rng, 4);
	int status = -1;
	pid_t pid = fork();

	if (!pid) {
		if (look && tickets_check(floor, &last))
			tickets_check(floor, &last);
		_exit(0);
	}
	atomic_fetch_add(&fz->nr_forks, 1);
	if (pid < 0)
		fail("fork: %s", strerror(errno));
	else if (waitpid(pid, &status, 0) == pid)
		reaped(pid, status);
}

static char * const nop[] = { "fuzz", "--nop", NULL };

static pid_t vfork_exec(void)
{
	pid_t pid = vfork();

	if (!pid) {
		execv("/proc/self/exe", nop);
		_exit(126);
	}
	return pid;
}

static pid_t fork_exec(void)
{
	pid_t pid = fork();

	if (!pid) {
		execv("/proc/self/exe", nop);
		_exit(126);
	}
	atomic_fetch_add(&fz->nr_forks, 1);
	return pid;
}

static pid_t spawn_exec(void)
{
	pid_t pid;

	return posix_spawn(&pid, "/proc/self/exe", NULL, NULL, nop, NULL) ?
	       -1 : pid;
}

/* A child that execs at once: its session, if it has one, is cancelled. */
static void start_other(pid_t (*how)(void))
{
	int status = -1;
	pid_t pid = how();

	if (pid < 0)
		fail("cannot start a program: %s", strerror(errno));
	else if (waitpid(pid, &status, 0) == pid)
		reaped(pid, status);
}

/* One of this process's children, or NULL. */
static struct node *pick_child(struct rng *rng)
{
	int n = atomic_load(&fz->nodes), start = below(rng, n), i;

	for (i = 0; i < n; i++) {
		struct node *c = &fz->node[(start + i) % n];

		if ((start + i) % n < FZ_NODES && c->parent == me->number &&
		    c->pid && c != me && !c->reaped)
			return c;
	}
	return NULL;
}

static void kill_child(struct rng *rng)
{
	struct node *c = pick_child(rng);

	if (!c)
		return;
	atomic_store(&c->killed, true);
	kill(c->pid, SIGKILL);
}

static void wait_for(struct node *c)
{
	int status;

	if (waitpid(c->pid, &status, 0) == c->pid)
		reaped(c->pid, status);
}

/* By the thread that forks, as no other may reap what it picks. */
static void process_op(struct rng *rng)
{
	struct node *c;

	switch (below(rng, 14)) {
	case 0:
		fork_light(rng);
		break;
	case 1:
		if (one_in(rng, 3))
			start_other(one_in(rng, 2) ? vfork_exec : spawn_exec);
		break;
	case 2:
		if (one_in(rng, 3))
			kill_child(rng);
		break;
	case 3:
		c = pick_child(rng);
		if (c && one_in(rng, 2))
			wait_for(c);
		break;
	case 4:
		af_write_file("/proc/self/clear_refs", one_in(rng, 2) ? "4" :
			      "1");
		break;
	case 5:
		hold_workers(one_in(rng, 3));
		break;
	case 6:
		if (one_in(rng, 2))
			start_other(fork_exec);
		break;
	default:
		fork_node(rng);
	}
}

/* Each thread has the slots whose number leaves its own as the remainder. */
static void work(unsigned int number)
{
	unsigned int own = (fz->plan.slots - number + self.threads - 1) /
			   self.threads;
	uint64_t seed = mix(me->seed, 1000 + number);
	unsigned int i;

	thread_number = number;
	for (i = 0; i < self.ops && !failing(); i++) {
		struct rng rng = { mix(seed, i) };

		if (number ? one_in(&rng, 40) : one_in(&rng, 5)) {
			if (number)
				fork_light(&rng);
			else
				process_op(&rng);
		} else if (fz->plan.slots > number) {
			slot_op(&me->slot[number + self.threads *
					  below(&rng, own)], &rng);
		}
	}
}

static void *thread_main(void *arg)
{
	work((uintptr_t)arg);
	return NULL;
}

/* A fault that should not have been. Says where, in terms of the model. */
static void on_fault(int sig, siginfo_t *info, void *unused)
{
	char *at = info->si_addr;
	unsigned int i;

	(void)unused;
	for (i = 0; me && i < fz->plan.slots; i++) {
		struct slot *s = &me->slot[i];

		if (at < s->base || at >= addr_of(s, s->pages))
			continue;
		errno = EFAULT;
		fail_op(s, strsignal(sig), (at - s->base) / AF_PAGE, 1);
		_exit(1);
	}
	fail("%s at %p, outside of all slots", strsignal(sig), (void *)at);
	_exit(1);
}

static void catch_faults(void)
{
	struct sigaction sa = { .sa_sigaction = on_fault,
				.sa_flags = SA_SIGINFO };

	sigaction(SIGSEGV, &sa, NULL);
	sigaction(SIGBUS, &sa, NULL);
}

/* A child's tickets are at rest until it starts writers of its own. */
static void check_tickets(void)
{
	uint64_t ceiling;

	if (!fz->plan.writers || self.writing || failing())
		return;
	if (!tickets_check(me->floor, &self.last))
		return;
	ceiling = atomic_load(&me->ceiling);
	if (ceiling && !self.wrote && self.last > ceiling)
		fail("tickets: %llu is from after fork(), which saw %llu",
		     (unsigned long long)self.last,
		     (unsigned long long)ceiling);
}

static void start_tickets(void)
{
	unsigned int i;

	if (!fz->plan.writers || failing())
		return;
	check_tickets();
	tickets_resume(self.last);
	for (i = 0; i < fz->plan.writers; i++)
		if (pthread_create(&self.writer[i], NULL, ticket_writer, NULL))
			fail("pthread_create");
	self.writing = true;
	self.wrote = true;
}

static void stop_tickets(void)
{
	unsigned int i;

	if (!self.writing)
		return;
	atomic_store(&me->stop_tickets, true);
	for (i = 0; i < fz->plan.writers; i++)
		pthread_join(self.writer[i], NULL);
	self.writing = false;
	self.last = atomic_load(&me->written);
}

static void prepare(struct node *n, struct rng *rng)
{
	bool root = !n->depth;

	memset(&self, 0, sizeof(self));
	thread_number = 0;
	self.threads = root ? fz->plan.threads : 1 + below(rng, 2);
	self.ops = root ? fz->plan.nr_ops : below(rng, fz->plan.nr_ops);
	self.forks = root ? fz->plan.forks : below(rng, 3);
	self.last = root ? 0 : NO_TICKET;
	catch_faults();
}

/* A child's first look: at all, at nothing, or at some of it. */
static void first_look(struct rng *rng)
{
	switch (below(rng, 5)) {
	case 0:
	case 1:
		verify_all(rng);
		break;
	case 2:
		check_tickets();
		break;
	case 3:
		verify_slot(&me->slot[below(rng, fz->plan.slots)], false, 1);
		break;
	}
}

static void work_in_threads(bool join)
{
	unsigned int i;

	for (i = 1; i < self.threads; i++)
		if (pthread_create(&self.thread[i], NULL, thread_main,
				   (void *)(uintptr_t)i))
			fail("pthread_create");
	work(0);
	for (i = 1; join && i < self.threads; i++)
		pthread_join(self.thread[i], NULL);
}

static void wait_for_children(void)
{
	int i, n = atomic_load(&fz->nodes);

	for (i = 0; i < n && i < FZ_NODES; i++)
		if (fz->node[i].parent == me->number && fz->node[i].pid &&
		    !fz->node[i].reaped)
			wait_for(&fz->node[i]);
}

static void __attribute__((noreturn)) end(struct rng *rng)
{
	size_t way = below(rng, 8);

	atomic_store(&me->state, ND_GONE);
	if (way == 0 && !failing()) {
		execv("/proc/self/exe", nop);
		_exit(126);
	}
	if (way == 1) {
		atomic_store(&me->killed, true);
		kill(getpid(), SIGKILL);
	}
	_exit(0);
}

void run_node(struct node *n)
{
	struct rng rng = { mix(n->seed, 3) };
	bool hasty = one_in(&rng, 5);

	prepare(n, &rng);
	if (n->depth)
		first_look(&rng);
	if (!n->depth || one_in(&rng, 3))
		start_tickets();
	work_in_threads(!hasty);
	if (hasty)
		end(&rng);
	stop_tickets();
	if (one_in(&rng, 2))
		wait_for_children();
	if (!n->depth || !one_in(&rng, 4))
		verify_all(&rng);
	check_tickets();
	end(&rng);
}
