// SPDX-License-Identifier: GPL-2.0
/*
 * The snapshot under load, over a connection of its own.
 *
 * The snapshot's instant is learnt from Redis: one write(2) sends "MGET heads,
 * BGSAVE, MGET heads". Redis executes what one read brought it from one client
 * back to back, and forks inside BGSAVE; both MGETs must agree, which proves
 * that no write came between them and the fork. The heads are then the epoch of
 * each connection in the snapshot (the cut). The cut must also lie between what
 * was acknowledged when BGSAVE was sent and what was sent when it was answered.
 */
#include <errno.h>
#include <inttypes.h>
#include <sys/socket.h>

#include "load.h"
#include "model.h"

#define CONTROL_SIZE	(64 << 10)

enum phase phase;
int control = -1;
static char control_in[CONTROL_SIZE];
static size_t control_len;
static bool asked;			/* an INFO is on its way */
uint64_t t_bgsave;
static uint64_t t_before, t_reply, t_over, t_polled;
static uint64_t before_ns, after_ns;

void snapshot_begin(const char *socket, uint64_t before, uint64_t after)
{
	control = connect_to(socket);
	before_ns = before;
	after_ns = after;
	t_before = now_ns();
}

/* The length of the complete reply at buf, 0 if there is none yet. */
static size_t reply_len(const char *buf, size_t len)
{
	const char *eol = memchr(buf, '\n', len);
	size_t used, part;
	long n, i;

	if (!eol)
		return 0;
	used = eol + 1 - buf;
	n = strtol(buf + 1, NULL, 10);
	switch (buf[0]) {
	case '$':
		used += n >= 0 ? (size_t)n + 2 : 0;
		return used <= len ? used : 0;
	case '*':
		for (i = 0; i < n; i++) {
			part = reply_len(buf + used, len - used);
			if (!part)
				return 0;
			used += part;
		}
	}
	return used;
}

static void send_control(const char *buf, size_t len)
{
	if (send(control, buf, len, MSG_NOSIGNAL) != (ssize_t)len)
		fail("cannot send to the server at once: %s", strerror(errno));
}

static char *put_heads(char *p)
{
	char head[HEAD_LEN];
	uint32_t i;

	p += sprintf(p, "*%u\r\n$4\r\nMGET\r\n", conns + 1);
	for (i = 0; i < conns; i++) {
		head_name(head, i);
		p = put_bulk(p, head, HEAD_LEN);
	}
	return p;
}

static void start_snapshot(uint64_t now)
{
	char buf[8192], *p = buf;
	uint32_t i;

	p = put_heads(p);
	p += sprintf(p, "*1\r\n$6\r\nBGSAVE\r\n");
	p = put_heads(p);
	for (i = 0; i < conns; i++)
		conn[i].acked_before = conn[i].acked;
	t_bgsave = now;
	phase = FORKING;
	send_control(buf, p - buf);
}

/* "MGET heads" answers: *N, then N times $20 and the head. */
static void take_cuts(const char *reply)
{
	const char *p = strchr(reply, '\n') + 1;
	uint32_t i;

	for (i = 0; i < conns; i++) {
		if (strncmp(p, "$20\r\nseq:", 9) || get_hex(p + 9, 16, &conn[i].cut))
			fail("connection %u has no head in the server", i);
		p += 5 + HEAD_VALUE_LEN + 2;
	}
}

static void take_snapshot_reply(uint64_t now)
{
	size_t first = reply_len(control_in, control_len), status = 0, second = 0;
	const char *text = control_in + first;
	uint32_t i;

	if (first)
		status = reply_len(text, control_len - first);
	if (status)
		second = reply_len(text + status, control_len - first - status);
	if (!second)
		return;
	if (strncmp(text, "+Background saving started", 26))
		fail("BGSAVE: %.*s", (int)status, text);
	if (first != second || memcmp(control_in, text + status, first))
		fail("the heads before and after BGSAVE differ: the snapshot's instant is unknown");
	take_cuts(control_in);
	for (i = 0; i < conns; i++) {
		struct conn *c = &conn[i];

		c->sent_by_reply = c->sent;
		if (c->cut < c->acked_before || c->cut > c->sent_by_reply)
			fail("connection %u: the cut %" PRIu64 " is not in %" PRIu64 "..%" PRIu64,
			     i, c->cut, c->acked_before, c->sent_by_reply);
	}
	control_len = 0;
	t_reply = now;
	t_polled = now;
	phase = SAVING;
}

static void take_info(uint64_t now)
{
	if (!reply_len(control_in, control_len))
		return;
	control_in[control_len] = 0;
	control_len = 0;
	asked = false;
	if (strstr(control_in, "rdb_bgsave_in_progress:1"))
		return;
	if (!strstr(control_in, "rdb_bgsave_in_progress:0"))
		fail("INFO persistence: no rdb_bgsave_in_progress");
	if (!strstr(control_in, "rdb_last_bgsave_status:ok"))
		fail("the snapshot failed (rdb_last_bgsave_status is not ok)");
	t_over = now;
	phase = AFTER;
}

void snapshot_input(void)
{
	ssize_t n = recv(control, control_in + control_len, CONTROL_SIZE - 1 - control_len, 0);
	uint64_t now = now_ns();

	if (n < 0 && errno == EAGAIN)
		return;
	if (n <= 0)
		fail("the server closed the control connection: did it crash?");
	control_len += n;
	if (phase == FORKING)
		take_snapshot_reply(now);
	else if (phase == SAVING)
		take_info(now);
}

void snapshot_step(uint64_t now)
{
	static const char info[] = "*2\r\n$4\r\nINFO\r\n$11\r\npersistence\r\n";

	if (phase == BEFORE && now >= t_before + before_ns) {
		start_snapshot(now);
	} else if (phase == SAVING && !asked && now >= t_polled + POLL_EVERY) {
		t_polled = now;
		asked = true;
		send_control(info, sizeof(info) - 1);
	} else if (phase == AFTER && now >= t_over + after_ns) {
		phase = DRAIN;
	}
}

static void print_numbers(const char *name, size_t offset, const char *after)
{
	uint32_t i;

	printf("\"%s\": [", name);
	for (i = 0; i < conns; i++)
		printf("%s%" PRIu64, i ? ", " : "", *(uint64_t *)((char *)&conn[i] + offset));
	printf("]%s", after);
}

void snapshot_print(void)
{
	printf("{\"bgsave_ns\": %" PRIu64 ", \"reply_ns\": %" PRIu64 ", \"over_ns\": %" PRIu64 ", ",
	       t_bgsave, t_reply, t_over);
	print_numbers("acked_before", offsetof(struct conn, acked_before), ", ");
	print_numbers("cut", offsetof(struct conn, cut), ", ");
	print_numbers("sent_by_reply", offsetof(struct conn, sent_by_reply), ", ");
	print_numbers("final", offsetof(struct conn, acked), "}\n");
}
