/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Unprivileged users, and the cgroups that root makes for them. A user is a
 * child for af_call() that gave up root; make it before af_setup(), so that the
 * fork that makes it is plain.
 */
#ifndef AF_USER_H
#define AF_USER_H

#include <errno.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "harness.h"

#define USER	1000
#define OTHER	1001

/* Becomes user job->first for good, with no other group than its own. */
static inline long user_do_become(const struct af_job *job)
{
	if (setgroups(0, NULL) ||
	    setresgid(job->first, job->first, job->first) ||
	    setresuid(job->first, job->first, job->first))
		return -errno;
	/* The change took it; a process that starts as this user has it. */
	return prctl(PR_SET_DUMPABLE, 1) ? -errno : 0;
}

static inline int user_make(struct af_child *c, uid_t uid)
{
	if (af_spawn_other(c))
		return -1;
	return af_call(c, user_do_become, .first = uid);
}

static inline long user_do_write(const struct af_job *job)
{
	return af_write_file(job->addr, (const char *)job->seed);
}

/* Child @c writes @text to @path; both are strings that it has, too. */
#define user_write(c, path, text) af_call((c), user_do_write,		\
	.addr = (char *)(path), .seed = (uintptr_t)(text))

static inline int user_join(pid_t pid, const char *group)
{
	char path[128], text[16];

	snprintf(path, sizeof(path), "%s/cgroup.procs", group);
	snprintf(text, sizeof(text), "%d", pid);
	return af_write_file(path, text);
}

/* The number behind @key in a file of @group, or the only one: @key is "". */
static inline long user_group_number(const char *group, const char *file,
				     const char *key)
{
	char path[128], text[8192], *at;
	size_t len = strlen(key);

	snprintf(path, sizeof(path), "%s/%s", group, file);
	if (af_read_file(path, text, sizeof(text)))
		return -1;
	if (!len)
		return atol(text);
	for (at = text; at; at = strchr(at, '\n')) {
		at += *at == '\n';
		if (!strncmp(at, key, len) && at[len] == ' ')
			return atol(at + len);
	}
	return -1;
}

static inline bool user_group_is_empty(void *group)
{
	/* Its orphans are ours: the caller is their subreaper. */
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
	return user_group_number(group, "cgroup.events", "populated") == 0;
}

/* Kills everybody in @group, who are children and orphans of the caller. */
static inline int user_kill_group(const char *group)
{
	char path[128];
	int ret;

	snprintf(path, sizeof(path), "%s/cgroup.kill", group);
	ret = af_write_file(path, "1");
	return ret ? ret : af_poll(user_group_is_empty, (void *)group, 60);
}

#endif
