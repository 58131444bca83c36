/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Groups of cgroup v2 that a test makes for itself, all of them below CG_TOP.
 * Functions that take a group want its name there; "" is CG_TOP itself.
 */
#ifndef AF_CGROUP_H
#define AF_CGROUP_H

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "af.h"

#define CG_ROOT	"/sys/fs/cgroup"
#define CG_TOP	CG_ROOT "/af-groups"

static inline int cg_write(const char *group, const char *file,
			   const char *text)
{
	char path[256];

	snprintf(path, sizeof(path), CG_TOP "/%s/%s", group, file);
	return af_write_file(path, text);
}

static inline bool cg_has(const char *group, const char *file)
{
	char path[256];

	snprintf(path, sizeof(path), CG_TOP "/%s/%s", group, file);
	return !access(path, W_OK);
}

/* The number behind @key at the start of a line of @file, or -1. */
static inline long cg_number(const char *group, const char *file,
			     const char *key)
{
	char path[256];

	snprintf(path, sizeof(path), CG_TOP "/%s/%s", group, file);
	return af_number_in(path, key);
}

struct cg_wish {
	const char *group, *file, *key;
	long low, high;
};

static bool cg_has_come(void *arg)
{
	const struct cg_wish *w = arg;
	long n = cg_number(w->group, w->file, w->key);

	return n >= w->low && n <= w->high;
}

/* Waits until cg_number() is in that range. */
static inline int cg_wait(const char *group, const char *file, const char *key,
			  long low, long high)
{
	struct cg_wish w = { group, file, key, low, high };

	return af_poll(cg_has_come, &w, 60);
}

static inline int cg_join(const char *group, pid_t pid)
{
	char text[16];

	snprintf(text, sizeof(text), "%d", pid);
	return cg_write(group, "cgroup.procs", text);
}

/* Whether thread @tid sleeps as it is over memory.high. */
static inline bool cg_pays(pid_t tid)
{
	char path[64], symbol[128];

	snprintf(path, sizeof(path), "/proc/%d/wchan", tid);
	return !af_read_file(path, symbol, sizeof(symbol)) &&
	       (strstr(symbol, "over_high") || strstr(symbol, "try_charge"));
}

static inline int cg_freeze(const char *group)
{
	int ret = cg_write(group, "cgroup.freeze", "1");

	return ret ? ret : cg_wait(group, "cgroup.events", "frozen", 1, 1);
}

static inline int cg_thaw(const char *group)
{
	int ret = cg_write(group, "cgroup.freeze", "0");

	return ret ? ret : cg_wait(group, "cgroup.events", "frozen", 0, 0);
}

static inline int cg_kill(const char *group)
{
	return cg_write(group, "cgroup.kill", "1");
}

static inline int cg_wait_empty(const char *group)
{
	return cg_wait(group, "cgroup.events", "populated", 0, 0);
}

static inline int cg_make(const char *group)
{
	char path[256];

	snprintf(path, sizeof(path), CG_TOP "/%s", group);
	return mkdir(path, 0755) ? -errno : 0;
}

static inline int cg_remove(const char *group)
{
	char path[256];

	snprintf(path, sizeof(path), CG_TOP "/%s", group);
	return rmdir(path) ? -errno : 0;
}

/* Removes all groups, with whoever is left in them. */
static inline int cg_end(void)
{
	DIR *dir = opendir(CG_TOP);
	struct dirent *entry;
	int bad = 0;

	if (!dir)
		return 0;
	cg_kill("");
	bad += !!cg_wait_empty("");
	while ((entry = readdir(dir)))
		if (entry->d_type == DT_DIR && entry->d_name[0] != '.')
			bad += !!cg_remove(entry->d_name);
	closedir(dir);
	return bad + !!cg_remove("");
}

/* Makes CG_TOP, with all controllers that there are, or returns AF_SKIPPED. */
static inline int cg_begin(void)
{
	static const char * const controllers[] = { "+cpu", "+cpuset",
						    "+memory" };
	size_t i;

	if (access(CG_ROOT "/cgroup.controllers", F_OK))
		return AF_SKIPPED;
	if (cg_end() || cg_make(""))
		return -1;
	for (i = 0; i < sizeof(controllers) / sizeof(controllers[0]); i++) {
		af_write_file(CG_ROOT "/cgroup.subtree_control",
			      controllers[i]);
		cg_write("", "cgroup.subtree_control", controllers[i]);
	}
	return 0;
}

/* In a fixture's setup, before AF_SETUP(). */
#define CG_BEGIN() do {							\
	int __made = cg_begin();					\
									\
	if (__made == AF_SKIPPED)					\
		SKIP(return, "no cgroup v2 at " CG_ROOT);		\
	ASSERT_EQ(0, __made);						\
} while (0)

/* Nobody but the workers is left to do it. */
#define WORKERS_FINISH() do {						\
	EXPECT_EQ(0, af_release(&self->af));				\
	if (self->af.async)						\
		EXPECT_EQ(0, af_settle());				\
} while (0)

/* Exact only where the workers were held from the start. */
#define EXPECT_COPIED(who, n) do {					\
	if (self->held)							\
		EXPECT_EQ((n), af_delta(&self->af, AF_PIECE_##who));	\
} while (0)

#endif
