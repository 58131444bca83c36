// SPDX-License-Identifier: GPL-2.0
/* Options, rounds and totals of the fuzzer; fuzz.h tells how it works. */
#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

static const char usage[] =
	"usage: fuzz [OPTION...]\n"
	"  --seed N         of the first round (by the clock)\n"
	"  --seconds N      begin no round after so long (60)\n"
	"  --rounds N       so many at most\n"
	"  --ops N          operations of each thread of a round's first process\n"
	"  --mode async|plain   plain is the oracle (async)\n"
	"  --limit N        seconds of one round before it counts as hung (900)\n"
	"  --allow-poison   children that the kernel kills are no failure\n"
	"  --verbose        a line for each round\n"
	"A failing round prints its seed: --seed SEED --rounds 1 repeats it.\n";

static struct {
	unsigned long seconds, rounds;
	unsigned int limit;
	const char *mode;
} options = { 60, ULONG_MAX, 900, "async" };

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void on_alarm(int sig)
{
	(void)sig;
}

static void print_file(const char *path)
{
	char text[8192];

	if (!af_read_file(path, text, sizeof(text)))
		fprintf(stderr, "# %s:\n%s\n", path, text);
}

/* A round that does not end: where do its processes stand? */
static void print_hung(void)
{
	static const char * const files[] = { "status", "wchan", "stack" };
	char path[64];
	int i, k;

	for (i = 0; i < fz->nodes && i < FZ_NODES; i++) {
		if (fz->node[i].reaped)
			continue;
		for (k = 0; k < 3; k++) {
			snprintf(path, sizeof(path), "/proc/%d/%s",
				 fz->node[i].pid, files[k]);
			print_file(path);
		}
	}
}

/* Waits until none of the round's processes is left, orphans included. */
static void reap_round(pid_t group)
{
	const struct sigaction sa = { .sa_handler = on_alarm };
	int status;
	pid_t pid;

	sigaction(SIGALRM, &sa, NULL);
	alarm(options.limit);
	for (;;) {
		pid = waitpid(-group, &status, 0);
		if (pid > 0) {
			reaped(pid, status);
		} else if (errno == EINTR) {
			fail("the round does not end");
			print_hung();
		} else {
			break;
		}
		if (failing()) {
			wait_for_report();
			kill(-group, SIGKILL);
		}
	}
	alarm(0);
}

static void __attribute__((noreturn)) start_root(struct node *root)
{
	setpgid(0, 0);
	me = root;
	build(root);
	atomic_store(&root->pid, getpid());
	atomic_store(&root->state, ND_LIVE);
	run_node(root);
}

static bool run_round(uint64_t seed)
{
	pid_t root, third;
	struct node *n;
	int status;

	atomic_store(&fz->nodes, 0);
	atomic_store(&fz->failed, 0);
	atomic_store(&fz->over, 0);
	n = node_new(NULL);
	n->seed = mix(seed, 0);
	plan_round(&fz->plan, seed);
	root = fork();
	if (!root)
		start_root(n);
	setpgid(root, root);
	third = fork();
	if (!third)
		observe(seed);
	reap_round(root);
	atomic_store(&fz->over, 1);
	if (waitpid(third, &status, 0) == third && status)
		fail("the third party ended with status %#x", status);
	hold_workers(false);
	return !failing();
}

static void print_replay(uint64_t seed)
{
	printf("# repeat it: fuzz --mode %s --seed %#llx --rounds 1",
		options.mode, (unsigned long long)seed);
	if (fz->ops)
		printf(" --ops %u", fz->ops);
	printf("\n# (%u slots, %u pages, %u threads, %u forks, ops %#llx, %u ticket writers)\n",
		fz->plan.slots, fz->plan.pages, fz->plan.threads,
		fz->plan.forks, (unsigned long long)fz->plan.ops,
		fz->plan.writers);
}

/* Returns the number of rounds that passed; @failed is set if the last did not. */
static unsigned long run_rounds(uint64_t seed, bool *failed)
{
	double end = now() + options.seconds;
	unsigned long i;

	*failed = false;
	for (i = 0; i < options.rounds && now() < end; i++) {
		uint64_t round = i ? mix(seed, i) : seed;
		double start = now();

		*failed = !run_round(round);
		if (fz->verbose || *failed)
			printf("%s round %lu seed %#llx: %.2f s, %d processes\n",
			       *failed ? "FAILED" : "ok", i,
			       (unsigned long long)round, now() - start,
			       fz->nodes);
		if (*failed) {
			print_replay(round);
			break;
		}
	}
	return i;
}

/* In a guest of ours: a cgroup whose memory can be reclaimed, and KSM. */
static void prepare_guest(void)
{
	char text[32];

	if (!getenv("ASYNC_FORK_KERNEL"))
		return;
	snprintf(fz->cgroup, sizeof(fz->cgroup), "/sys/fs/cgroup/fuzz");
	snprintf(text, sizeof(text), "%d", getpid());
	if ((mkdir(fz->cgroup, 0755) && errno != EEXIST) ||
	    af_write_file("/sys/fs/cgroup/fuzz/cgroup.procs", text))
		fz->cgroup[0] = 0;
	af_write_file("/sys/kernel/mm/ksm/run", "1");
}

static void print_totals(const struct af *af, unsigned long rounds)
{
	printf("%lu rounds, %lu operations, %lu checks, %lu forks\n", rounds,
	       fz->nr_ops, fz->nr_checks, fz->nr_forks);
	if (!fz->async)
		return;
	printf("%ld sessions; pieces: %ld by workers, %ld by parents, %ld by children, %ld lifted; %ld cancelled, %ld waits for migration, %ld plain forks after pins\n",
	       af_delta(af, AF_SESSION), af_delta(af, AF_PIECE_WORKER),
	       af_delta(af, AF_PIECE_PARENT), af_delta(af, AF_PIECE_CHILD),
	       af_delta(af, AF_PIECE_LIFTED), af_delta(af, AF_CANCEL),
	       af_delta(af, AF_WAIT_MIGRATION), af_delta(af, AF_FB_PINNED));
}

static uint64_t parse(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "seed", 1, NULL, 's' }, { "seconds", 1, NULL, 't' },
		{ "rounds", 1, NULL, 'r' }, { "ops", 1, NULL, 'o' },
		{ "mode", 1, NULL, 'm' }, { "limit", 1, NULL, 'l' },
		{ "allow-poison", 0, NULL, 'p' }, { "verbose", 0, NULL, 'v' },
		{ "nop", 0, NULL, 'n' }, { }
	};
	uint64_t seed = mix(time(NULL), getpid());
	int c;

	while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		switch (c) {
		case 's':
			seed = strtoull(optarg, NULL, 0);
			break;
		case 't':
			options.seconds = strtoul(optarg, NULL, 0);
			break;
		case 'r':
			options.rounds = strtoul(optarg, NULL, 0);
			break;
		case 'o':
			fz->ops = strtoul(optarg, NULL, 0);
			break;
		case 'm':
			options.mode = optarg;
			break;
		case 'l':
			options.limit = strtoul(optarg, NULL, 0);
			break;
		case 'p':
			fz->poison = true;
			break;
		case 'v':
			fz->verbose = true;
			break;
		case 'n':
			_exit(0);
		default:
			fputs(usage, stderr);
			exit(2);
		}
	}
	if (optind < argc || (strcmp(options.mode, "async") &&
			      strcmp(options.mode, "plain"))) {
		fputs(usage, stderr);
		exit(2);
	}
	return seed;
}

int main(int argc, char **argv)
{
	unsigned long passed, bad;
	struct af af;
	uint64_t seed;
	bool failed;

	/* One stream, so that a report stands next to its round. */
	dup2(STDOUT_FILENO, STDERR_FILENO);
	setvbuf(stdout, NULL, _IOLBF, 0);
	fz = af_shared(sizeof(*fz));
	seed = parse(argc, argv);
	setenv("AF_MODE", options.mode, 1);
	prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	if (af_setup(&af, AF_RACE))
		return 1;
	fz->async = af.async;
	prepare_guest();
	printf("seed %#llx, %s mode\n", (unsigned long long)seed, options.mode);
	passed = run_rounds(seed, &failed);
	/* A short run on a busy host may have come to nothing that can fork lazily. */
	af.want = passed + failed >= 5;
	af.spare = LONG_MAX / 2;
	af.allow = AF_ALLOW(AF_FB_PINNED) |
		   (fz->poison ? AF_ALLOW(AF_POISON) : 0);
	print_totals(&af, passed + failed);
	bad = af_finish(&af);
	if (bad && !failed)
		failed = true;
	printf("%lu passed, %d failed\n", passed, failed);
	return failed;
}
