// SPDX-License-Identifier: GPL-2.0
/*
 * The write load on Redis, and the snapshot under it:
 *
 *	load fill  SOCKET STATE KEYS_PER_CONN VALUE_LEN CONNS
 *	load round SOCKET STATE RATE BEFORE_MS AFTER_MS SAMPLES
 *
 * "fill" writes every key once. "round" writes for BEFORE_MS, has Redis start a
 * BGSAVE, writes on until it is over and AFTER_MS longer, waits for all replies
 * and prints what happened as one JSON object. STATE carries the connections'
 * epochs from one call to the next.
 *
 * RATE is writes a second over all connections, each due at a fixed time
 * whether or not the server is ready (open loop): a write's latency counts from
 * when it was due, so a stall is felt by every write that falls into it, as it
 * is by independent users. RATE 0: each connection sends its next write when
 * it has the reply to the one before (closed loop). SAMPLES gets three u64 for
 * each write: due, handed to the connection, answered (CLOCK_MONOTONIC, ns).
 */
#define _GNU_SOURCE	/* ppoll() */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "load.h"
#include "model.h"

#define FILL_WINDOW	64	/* unanswered writes of one connection, while filling */
#define COMMAND_MAX	(VALUE_MAX + 256)
#define STALLED		(60 * NSEC)
#define PROGRESS_EVERY	(5 * NSEC)

struct conn *conn;
uint32_t conns;
static uint32_t keys_per_conn;
static size_t value_len;
static uint64_t interval;		/* of one connection; 0: closed loop */
static bool filling;
static FILE *samples;
static uint64_t last_reply;

void fail(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fprintf(stderr, "load: ");
	vfprintf(stderr, fmt, ap);
	fprintf(stderr, "\n");
	va_end(ap);
	exit(1);
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * NSEC + ts.tv_nsec;
}

int connect_to(const char *path)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (strlen(path) >= sizeof(addr.sun_path))
		fail("the socket's path is too long: %s", path);
	memcpy(addr.sun_path, path, strlen(path) + 1);
	if (fd < 0 || connect(fd, (struct sockaddr *)&addr, sizeof(addr)))
		fail("cannot connect to %s: %s", path, strerror(errno));
	if (fcntl(fd, F_SETFL, O_NONBLOCK))
		fail("fcntl: %s", strerror(errno));
	return fd;
}

char *put_bulk(char *p, const void *data, size_t len)
{
	p += sprintf(p, "$%zu\r\n", len);
	memcpy(p, data, len);
	memcpy(p + len, "\r\n", 2);
	return p + len + 2;
}

/* The next write of a connection. The head needs no write before the fill's end. */
static void put_write(struct conn *c, uint64_t due, uint64_t now)
{
	uint32_t n = c - conn;
	uint64_t seq = ++c->sent;
	uint32_t key = model_key(n, seq, keys_per_conn);
	bool with_head = seq >= keys_per_conn;
	char name[KEY_LEN], head[HEAD_LEN], head_val[HEAD_VALUE_LEN];
	unsigned char value[VALUE_MAX];
	char *p = c->out + c->out_len;

	key_name(name, n, key);
	model_value(value, value_len, n, key, seq);
	p += sprintf(p, "*%d\r\n", with_head ? 5 : 3);
	p = put_bulk(p, with_head ? "MSET" : "SET", with_head ? 4 : 3);
	p = put_bulk(p, name, KEY_LEN);
	p = put_bulk(p, value, value_len);
	if (with_head) {
		head_name(head, n);
		head_value(head_val, seq);
		p = put_bulk(p, head, HEAD_LEN);
		p = put_bulk(p, head_val, HEAD_VALUE_LEN);
	}
	c->out_len = p - c->out;
	c->due[seq % RING] = due;
	c->handed[seq % RING] = now;
}

static void flush(struct conn *c)
{
	while (c->out_pos < c->out_len) {
		ssize_t n = send(c->fd, c->out + c->out_pos, c->out_len - c->out_pos, MSG_NOSIGNAL);

		if (n < 0 && errno == EAGAIN)
			break;
		if (n < 0)
			fail("the server is gone: %s", strerror(errno));
		c->out_pos += n;
	}
	if (c->out_pos == c->out_len) {
		c->out_pos = 0;
		c->out_len = 0;
	}
}

/* Whether this connection may put one more write into its buffer, and due when. */
static bool may_write(struct conn *c, uint64_t now, uint64_t *due)
{
	uint64_t pending = c->sent - c->acked;

	if (phase == DRAIN || c->out_len + COMMAND_MAX > OUT_SIZE)
		return false;
	*due = now;
	if (filling)
		return pending < FILL_WINDOW && c->sent < keys_per_conn;
	if (!interval)
		return !pending;
	if (pending == RING || c->next_due > now)
		return false;
	*due = c->next_due;
	c->next_due += interval;
	return true;
}

static void take_replies(struct conn *c)
{
	char buf[16 << 10];
	ssize_t n = recv(c->fd, buf, sizeof(buf), 0);
	uint64_t now = now_ns();
	ssize_t i;

	if (n < 0 && errno == EAGAIN)
		return;
	if (n <= 0)
		fail("the server closed a connection: did it crash?");
	last_reply = now;
	for (i = 0; i < n; i++) {
		if (buf[i] != "+OK\r\n"[c->reply_pos])
			fail("a write was refused: %.*s", (int)(n - i), buf + i);
		if (++c->reply_pos < 5)
			continue;
		c->reply_pos = 0;
		c->acked++;
		if (samples) {
			size_t at = c->acked % RING;
			uint64_t s[3] = { c->due[at], c->handed[at], now };

			if (fwrite(s, sizeof(s), 1, samples) != 1)
				fail("cannot write the samples: %s", strerror(errno));
		}
	}
}

static bool all_answered(void)
{
	uint32_t i;

	for (i = 0; i < conns; i++)
		if (conn[i].acked != conn[i].sent)
			return false;
	return true;
}

static bool finished(void)
{
	uint32_t i;

	if (!filling)
		return phase == DRAIN && all_answered();
	for (i = 0; i < conns; i++)
		if (conn[i].acked < keys_per_conn)
			return false;
	return true;
}

static void show_progress(uint64_t now)
{
	static uint64_t begun, shown;
	uint64_t done = 0;
	uint32_t i;

	if (!begun)
		begun = shown = now;
	if (now < shown + PROGRESS_EVERY)
		return;
	shown = now;
	if (filling) {
		for (i = 0; i < conns; i++)
			done += conn[i].acked;
		fprintf(stderr, "    %3" PRIu64 " s: %" PRIu64 "%% filled\n", (now - begun) / NSEC,
			done * 100 / ((uint64_t)conns * keys_per_conn));
	} else if (phase == SAVING) {
		fprintf(stderr, "    %3" PRIu64 " s: BGSAVE runs for %" PRIu64 " s\n",
			(now - begun) / NSEC, (now - t_bgsave) / NSEC);
	}
}

static void wait_for_events(void)
{
	struct pollfd fds[CONNS_MAX + 1];
	struct timespec ts = { 0 };
	uint64_t now = now_ns(), wake = now + POLL_EVERY;
	uint32_t i;

	for (i = 0; i < conns; i++) {
		struct conn *c = &conn[i];

		fds[i].fd = c->fd;
		fds[i].events = POLLIN | (c->out_len ? POLLOUT : 0);
		if (interval && phase != DRAIN && c->next_due < wake && c->sent - c->acked < RING)
			wake = c->next_due;
	}
	fds[conns].fd = control;	/* poll() skips fd -1 */
	fds[conns].events = POLLIN;
	if (wake > now)
		ts.tv_nsec = wake - now;
	if (ppoll(fds, conns + 1, &ts, NULL) < 0 && errno != EINTR)
		fail("ppoll: %s", strerror(errno));
	for (i = 0; i < conns; i++)
		if (fds[i].revents)
			take_replies(&conn[i]);
	if (fds[conns].revents)
		snapshot_input();
}

static void run_load(void)
{
	uint64_t now = now_ns(), due;
	uint32_t i;

	last_reply = now;
	for (i = 0; i < conns; i++)
		conn[i].next_due = now + interval * (i + 1) / conns;
	while (!finished()) {
		now = now_ns();
		if (!filling)
			snapshot_step(now);
		for (i = 0; i < conns; i++) {
			while (may_write(&conn[i], now, &due))
				put_write(&conn[i], due, now);
			flush(&conn[i]);
		}
		show_progress(now);
		wait_for_events();
		if (now > last_reply + STALLED)
			fail("no reply for %" PRIu64 " s: the server hangs", STALLED / NSEC);
	}
}

static void read_state(const char *path)
{
	FILE *f = fopen(path, "r");
	uint32_t i;

	if (!f || fscanf(f, "%" SCNu32 " %" SCNu32 " %zu", &conns, &keys_per_conn, &value_len) != 3 ||
	    conns > CONNS_MAX || value_len > VALUE_MAX)
		fail("%s: not the state that 'load fill' leaves", path);
	for (i = 0; i < conns; i++) {
		if (fscanf(f, "%" SCNu64, &conn[i].sent) != 1)
			fail("%s: not the state that 'load fill' leaves", path);
		conn[i].acked = conn[i].sent;
	}
	fclose(f);
}

static void write_state(const char *path)
{
	FILE *f = fopen(path, "w");
	uint32_t i;

	if (!f)
		fail("%s: %s", path, strerror(errno));
	fprintf(f, "%u %u %zu\n", conns, keys_per_conn, value_len);
	for (i = 0; i < conns; i++)
		fprintf(f, "%" PRIu64 "\n", conn[i].acked);
	if (fclose(f))
		fail("%s: %s", path, strerror(errno));
}

int main(int argc, char **argv)
{
	uint64_t rate;
	uint32_t i;

	filling = argc == 7 && !strcmp(argv[1], "fill");
	if (!filling && !(argc == 8 && !strcmp(argv[1], "round"))) {
		fprintf(stderr, "usage: load fill SOCKET STATE KEYS_PER_CONN VALUE_LEN CONNS\n"
			"       load round SOCKET STATE RATE BEFORE_MS AFTER_MS SAMPLES\n");
		return 2;
	}
	conn = calloc(CONNS_MAX, sizeof(*conn));
	if (!conn)
		fail("no memory");
	if (filling) {
		keys_per_conn = number_arg("KEYS_PER_CONN", argv[4], 1, KEYS_MAX);
		value_len = number_arg("VALUE_LEN", argv[5], VALUE_MIN, VALUE_MAX);
		conns = number_arg("CONNS", argv[6], 1, CONNS_MAX);
	} else {
		read_state(argv[3]);
		rate = number_arg("RATE", argv[4], 0, 10000000);
		interval = rate ? conns * NSEC / rate : 0;
		samples = fopen(argv[7], "w");
		if (!samples)
			fail("%s: %s", argv[7], strerror(errno));
		snapshot_begin(argv[2], number_arg("BEFORE_MS", argv[5], 0, 600000) * MSEC,
			       number_arg("AFTER_MS", argv[6], 0, 600000) * MSEC);
		/* The server is measured, not how long this program waits for a CPU. */
		if (setpriority(PRIO_PROCESS, 0, -10))
			fprintf(stderr, "load: not root, so not at a higher priority\n");
	}
	for (i = 0; i < conns; i++)
		conn[i].fd = connect_to(argv[2]);
	run_load();
	write_state(argv[3]);
	if (samples && fclose(samples))
		fail("cannot write the samples: %s", strerror(errno));
	if (!filling)
		snapshot_print();
	return 0;
}
