// SPDX-License-Identifier: GPL-2.0
/* The switches and counters of async fork, and what a test expects of them. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "af.h"

static const char * const af_counter_names[AF_NR_COUNTERS] = {
	[AF_SESSION]		= "async_fork_session",
	[AF_END]		= "async_fork_end",
	[AF_PIECE_WORKER]	= "async_fork_piece_worker",
	[AF_PIECE_PARENT]	= "async_fork_piece_parent",
	[AF_PIECE_CHILD]	= "async_fork_piece_child",
	[AF_PIECE_LIFTED]	= "async_fork_piece_lifted",
	[AF_CANCEL]		= "async_fork_cancel",
	[AF_POISON]		= "async_fork_poison",
	[AF_WAIT_MIGRATION]	= "async_fork_wait_migration",
	[AF_FB_OFF]		= "async_fork_fallback_off",
	[AF_FB_SMALL]		= "async_fork_fallback_small",
	[AF_FB_NOTIFIER]	= "async_fork_fallback_notifier",
	[AF_FB_PINNED]		= "async_fork_fallback_pinned",
	[AF_FB_NOMEM]		= "async_fork_fallback_nomem",
	[AF_FB_MODULE]		= "async_fork_fallback_module",
};

int af_write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	int ret = 0;

	if (fd < 0)
		return -errno;
	if (write(fd, text, strlen(text)) < 0)
		ret = -errno;
	close(fd);
	return ret;
}

/* Reads a small file as a string, without the newline at its end. */
int af_read_file(const char *path, char *buf, size_t size)
{
	size_t have = 0;
	ssize_t got = 1;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	while (got > 0 && have < size - 1) {
		got = read(fd, buf + have, size - 1 - have);
		if (got > 0)
			have += got;
	}
	if (got < 0)
		have = 0;
	buf[have] = 0;
	if (have && buf[have - 1] == '\n')
		buf[have - 1] = 0;
	close(fd);
	return got < 0 ? -EIO : 0;
}

/* The number behind @key at the start of a line of @path, or -1. */
long af_number_in(const char *path, const char *key)
{
	static char text[65536];
	size_t len = strlen(key);
	char *at;

	if (af_read_file(path, text, sizeof(text)))
		return -1;
	for (at = text; at; at = strchr(at, '\n')) {
		at += *at == '\n';
		if (!strncmp(at, key, len) && at[len] == ' ')
			return atol(at + len);
	}
	return -1;
}

bool af_plain_mode(void)
{
	const char *mode = getenv("AF_MODE");

	return mode && !strcmp(mode, "plain");
}

bool af_can_hold(void)
{
	return !access(AF_HOLD_FILE, W_OK);
}

/* Puts every counter that the kernel has into @c, and -1 for the others. */
void af_counters(struct af_counters *c)
{
	static __thread char text[65536];
	char *line, *save = NULL;
	int i;

	memset(c, 0xff, sizeof(*c));
	if (af_read_file("/proc/vmstat", text, sizeof(text)))
		return;
	for (line = strtok_r(text, "\n", &save); line;
	     line = strtok_r(NULL, "\n", &save)) {
		char *space = strchr(line, ' ');

		if (!space || strncmp(line, "async_fork_", 11))
			continue;
		*space = 0;
		for (i = 0; i < AF_NR_COUNTERS; i++)
			if (!strcmp(line, af_counter_names[i]))
				c->v[i] = strtol(space + 1, NULL, 10);
	}
}

long af_delta(const struct af *af, enum af_counter which)
{
	struct af_counters now;

	af_counters(&now);
	return now.v[which] - af->at.v[which];
}

/*
 * Asks @until again and again, for @seconds at most. Only for what the kernel
 * does in the background and tells nobody about; processes meet by pipes.
 */
int af_poll(bool (*until)(void *arg), void *arg, unsigned int seconds)
{
	const struct timespec pause = { .tv_nsec = 2000000 };
	unsigned int i;

	for (i = 0; i < seconds * 500; i++) {
		if (until(arg))
			return 0;
		nanosleep(&pause, NULL);
	}
	return -ETIMEDOUT;
}

static bool af_no_session_lives(void *unused)
{
	struct af_counters now;

	(void)unused;
	af_counters(&now);
	return now.v[AF_SESSION] == now.v[AF_END];
}

/* Waits until the kernel has freed every session. */
int af_settle(void)
{
	return af_poll(af_no_session_lives, NULL, 60);
}

int af_hold(struct af *af)
{
	int ret = af_write_file(AF_HOLD_FILE, "1");

	af->held = !ret;
	return ret;
}

int af_release(struct af *af)
{
	if (!af->held)
		return 0;
	af->held = false;
	return af_write_file(AF_HOLD_FILE, "0");
}

static int af_save(struct af *af)
{
	if (af_read_file(AF_MODE_FILE, af->saved_mode, sizeof(af->saved_mode)))
		return -1;
	return af_read_file(AF_MIN_FILE, af->saved_min, sizeof(af->saved_min));
}

/*
 * Switches async fork on for every process, however small, or off for all of
 * them in plain mode. A kernel without the switches is good enough for plain
 * mode only.
 */
int af_setup(struct af *af, int hold)
{
	memset(af, 0, sizeof(*af));
	af->async = !af_plain_mode();
	af_counters(&af->at);
	if (af_save(af)) {
		if (!af->async)
			return 0;
		fprintf(stderr, "# %s is missing: run on a kernel with async fork, or set AF_MODE=plain\n",
			AF_MODE_FILE);
		return -1;
	}
	if (af_write_file(AF_MODE_FILE, af->async ? "2" : "0") ||
	    af_write_file(AF_MIN_FILE, "0")) {
		fprintf(stderr, "# cannot write %s: run the tests as root\n",
			AF_MODE_FILE);
		return -1;
	}
	if (af->async && af_settle())
		fprintf(stderr, "# a session of an earlier test is still alive\n");
	af_counters(&af->at);
	if (af->async && af->at.v[AF_SESSION] < 0) {
		fprintf(stderr, "# /proc/vmstat has no async_fork counters\n");
		return -1;
	}
	if (af->async && hold == AF_HOLD && af_can_hold())
		return af_hold(af);
	return 0;
}

/* The counters that stand for a fork or a child that went wrong. */
static int af_check_quiet(const struct af *af, const struct af_counters *now)
{
	int i, bad = 0;

	for (i = AF_POISON; i < AF_NR_COUNTERS; i++) {
		long moved = now->v[i] - af->at.v[i];

		if (i == AF_WAIT_MIGRATION || !moved ||
		    (af->allow & AF_ALLOW(i)))
			continue;
		fprintf(stderr, "# %s grew by %ld\n", af_counter_names[i],
			moved);
		bad++;
	}
	return bad;
}

static int af_check_counters(const struct af *af)
{
	struct af_counters now;
	long begun;
	int bad = 0;

	af_counters(&now);
	begun = now.v[AF_SESSION] - af->at.v[AF_SESSION];
	if (!af->async) {
		if (begun)
			fprintf(stderr, "# %ld sessions in plain mode\n", begun);
		return !!begun;
	}
	if (begun < af->want || begun > af->want + af->spare) {
		fprintf(stderr, "# %ld sessions began, %ld to %ld expected\n",
			begun, af->want, af->want + af->spare);
		bad++;
	}
	if (now.v[AF_SESSION] != now.v[AF_END]) {
		fprintf(stderr, "# %ld sessions never ended\n",
			now.v[AF_SESSION] - now.v[AF_END]);
		bad++;
	}
	return bad + af_check_quiet(af, &now);
}

/*
 * Lets the sessions end, puts the switches back, and returns the number of
 * counters that are not what the test expects.
 */
int af_finish(struct af *af)
{
	int bad = 0;

	if (af_release(af))
		bad++;
	if (af->async)
		af_settle();
	bad += af_check_counters(af);
	if (af->saved_mode[0] && af_write_file(AF_MODE_FILE, af->saved_mode))
		bad++;
	if (af->saved_min[0] && af_write_file(AF_MIN_FILE, af->saved_min))
		bad++;
	return bad;
}
