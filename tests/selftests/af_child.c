// SPDX-License-Identifier: GPL-2.0
/* Children that run one function after the other for their parent. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "af.h"

/* Where this process answers its own parent, or -1. */
static int my_reply = -1;

/* A short read of a pipe means that the other side is gone. */
static bool get(int fd, void *buf, size_t size)
{
	size_t have = 0;

	while (have < size) {
		ssize_t got = read(fd, (char *)buf + have, size - have);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return false;
		have += got;
	}
	return true;
}

/* Obeys until told to end, or until the other side is gone. */
void af_serve(const int theirs[2])
{
	struct af_job job;
	long result;

	if (my_reply >= 0)
		close(my_reply);
	my_reply = theirs[1];
	while (get(theirs[0], &job, sizeof(job)) && job.fn) {
		result = job.fn(&job);
		if (write(theirs[1], &result, sizeof(result)) != sizeof(result))
			_exit(3);
	}
	_exit(0);
}

/* Held workers keep the session of a fork that just returned alive. */
static int session_is_open(const struct af *af)
{
	struct af_counters now;

	if (!af->async || !af->held)
		return 0;
	af_counters(&now);
	if (now.v[AF_SESSION] > now.v[AF_END])
		return 0;
	fprintf(stderr, "# fork() began no session\n");
	return -1;
}

/*
 * Makes the pipes to a child-to-be: @c gets this side's ends, @theirs the ends
 * that the child gives to af_serve() and that this side closes after the fork.
 */
int af_link(struct af_child *c, int theirs[2])
{
	int cmd[2], reply[2];

	if (pipe2(cmd, O_CLOEXEC) || pipe2(reply, O_CLOEXEC))
		return -1;
	signal(SIGPIPE, SIG_IGN);
	theirs[0] = cmd[0];
	theirs[1] = reply[1];
	c->cmd = cmd[1];
	c->reply = reply[0];
	return 0;
}

void af_unlink(const int theirs[2])
{
	close(theirs[0]);
	close(theirs[1]);
}

/* Forks a child that waits for af_call(), and expects nothing of that fork. */
int af_spawn_other(struct af_child *c)
{
	int theirs[2];

	if (af_link(c, theirs))
		return -1;
	c->pid = fork();
	if (c->pid < 0)
		return -1;
	if (!c->pid) {
		close(c->cmd);
		close(c->reply);
		af_serve(theirs);
	}
	af_unlink(theirs);
	return 0;
}

/* The same, as one session that the test expects. */
int af_spawn(struct af *af, struct af_child *c)
{
	if (af_spawn_other(c))
		return -1;
	af->want++;
	return session_is_open(af);
}

int af_post(struct af_child *c, const struct af_job *job)
{
	return write(c->cmd, job, sizeof(*job)) == sizeof(*job) ? 0 : -1;
}

long af_wait(struct af_child *c)
{
	long result;

	return get(c->reply, &result, sizeof(result)) ? result : AF_GONE;
}

long af_run(struct af_child *c, const struct af_job *job)
{
	return af_post(c, job) ? AF_GONE : af_wait(c);
}

int af_reap(struct af_child *c)
{
	int status = -1;

	close(c->cmd);
	close(c->reply);
	while (waitpid(c->pid, &status, 0) < 0 && errno == EINTR)
		;
	return status;
}

/* By a message: a brother may have inherited our end of its pipe. */
int af_end(struct af_child *c)
{
	af_post(c, &(struct af_job){ .fn = NULL });
	return af_reap(c);
}

int af_kill(struct af_child *c)
{
	kill(c->pid, SIGKILL);
	return af_reap(c);
}

long af_do_check(const struct af_job *job)
{
	return af_check_at(job->addr, job->first, job->pages, job->seed);
}

long af_do_zero(const struct af_job *job)
{
	return af_check_zero(job->addr, job->pages);
}

long af_do_fill(const struct af_job *job)
{
	af_fill_at(job->addr, job->first, job->pages, job->seed);
	return 0;
}
