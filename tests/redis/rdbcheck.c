// SPDX-License-Identifier: GPL-2.0
/*
 * Proves that an RDB file holds the dataset of one instant, and nothing else:
 *
 *	rdbcheck FILE KEYS_PER_CONN VALUE_LEN CUT...
 *
 * CUT is, per connection, the number of its last write before that instant
 * (load.c gets it from Redis, next to the BGSAVE). Reads the file as it is
 * (strings, no compression) and demands, byte for byte: each key there exactly
 * once; its value the one of the last write <= CUT to it; the heads equal to
 * CUT; no other key, no expiry, nothing after the end. A value from before its
 * last write, from after the cut, of another key, torn, or zero: all differ.
 * The file's checksum is left to the server that loads it.
 *
 * Exit status: 0 the file is exact, 1 it is not, 2 called wrongly.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model.h"

#define SHOWN_MAX	10

enum rdb_op {
	RDB_STRING	= 0x00,
	RDB_AUX		= 0xfa,
	RDB_RESIZEDB	= 0xfb,
	RDB_SELECTDB	= 0xfe,
	RDB_EOF		= 0xff,
};

struct blob {
	const unsigned char *p;
	uint64_t len;
};

static const unsigned char *start, *pos, *end;
static uint32_t conns, keys_per_conn;
static uint64_t value_len;
static uint64_t cut[CONNS_MAX];
static bool head_seen[CONNS_MAX];
static uint64_t *last;		/* per key: its last write <= cut; 0 once seen in the file */
static uint64_t problems;

static void __attribute__((format(printf, 1, 2))) problem(const char *fmt, ...)
{
	va_list ap;

	if (problems++ >= SHOWN_MAX)
		return;
	va_start(ap, fmt);
	printf("  ");
	vprintf(fmt, ap);
	printf("\n");
	va_end(ap);
}

static void __attribute__((noreturn)) broken(const char *what)
{
	problem("%s at byte %zu of %zu", what, (size_t)(pos - start), (size_t)(end - start));
	printf("rdbcheck: the file cannot be read on\n");
	exit(1);
}

static const unsigned char *take(uint64_t n)
{
	const unsigned char *p = pos;

	if (n > (uint64_t)(end - pos))
		broken("the file ends early");
	pos += n;
	return p;
}

static uint64_t big_endian(int bytes)
{
	const unsigned char *p = take(bytes);
	uint64_t v = 0;

	while (bytes--)
		v = v << 8 | *p++;
	return v;
}

/* A length; *special is set if it is instead the kind of a special string. */
static uint64_t take_len(bool *special)
{
	unsigned char b = *take(1);

	*special = false;
	switch (b >> 6) {
	case 0:
		return b & 63;
	case 1:
		return (uint64_t)(b & 63) << 8 | *take(1);
	case 2:
		if (b == 0x80)
			return big_endian(4);
		if (b == 0x81)
			return big_endian(8);
		broken("an unknown length");
	default:
		*special = true;
		return b & 63;
	}
}

static uint64_t take_count(void)
{
	bool special;
	uint64_t n = take_len(&special);

	if (special)
		broken("a special string where a count belongs");
	return n;
}

/* A string; numbers, which only auxiliary fields hold, come back raw. */
static struct blob take_string(void)
{
	bool special;
	struct blob s = { .len = take_len(&special) };

	if (special) {
		if (s.len > 2)
			broken("a compressed string (rdbcompression must be off)");
		s.len = 1U << s.len;
	}
	s.p = take(s.len);
	return s;
}

static void check_head(uint32_t conn, struct blob value)
{
	char want[HEAD_VALUE_LEN];

	if (conn >= conns) {
		problem("head of connection %u, which does not exist", conn);
		return;
	}
	if (head_seen[conn])
		problem("head of connection %u twice", conn);
	head_seen[conn] = true;
	head_value(want, cut[conn]);
	if (value.len != HEAD_VALUE_LEN || memcmp(value.p, want, HEAD_VALUE_LEN))
		problem("head of connection %u: '%.*s', want '%.*s'", conn,
			value.len > 40 ? 40 : (int)value.len, (const char *)value.p,
			HEAD_VALUE_LEN, want);
}

static void explain(uint32_t conn, uint32_t key, uint64_t seq, struct blob value,
		    const unsigned char *want)
{
	struct value_header h;
	uint64_t at = 0;

	if (value.len != value_len) {
		problem("key w%02x:%08x: %llu bytes, want %llu", conn, key,
			(unsigned long long)value.len, (unsigned long long)value_len);
		return;
	}
	memcpy(&h, value.p, sizeof(h));
	while (value.p[at] == want[at])
		at++;
	problem("key w%02x:%08x: differs from byte %llu on: holds epoch %llu of w%02x:%08x, want epoch %llu (cut %llu)%s",
		conn, key, (unsigned long long)at, (unsigned long long)h.seq, h.conn, h.key,
		(unsigned long long)seq, (unsigned long long)cut[conn],
		h.seq > cut[conn] ? ": LATER THAN THE SNAPSHOT" :
		h.seq < seq ? ": OLDER THAN THE SNAPSHOT" : "");
}

static void check_value(uint32_t conn, uint32_t key, struct blob value)
{
	unsigned char want[VALUE_MAX];
	uint64_t *slot, seq;

	if (conn >= conns || key >= keys_per_conn) {
		problem("key w%02x:%08x, which was never written", conn, key);
		return;
	}
	slot = &last[(uint64_t)conn * keys_per_conn + key];
	seq = *slot;
	if (!seq) {
		problem("key w%02x:%08x twice", conn, key);
		return;
	}
	*slot = 0;
	model_value(want, value_len, conn, key, seq);
	if (value.len != value_len || memcmp(value.p, want, value_len))
		explain(conn, key, seq, value, want);
}

static void check_pair(struct blob key, struct blob value)
{
	const char *name = (const char *)key.p;
	uint64_t conn, number;

	if (key.len == KEY_LEN && name[0] == 'w' && name[3] == ':' &&
	    !get_hex(name + 1, 2, &conn) && !get_hex(name + 4, 8, &number))
		check_value(conn, number, value);
	else if (key.len == HEAD_LEN && !memcmp(name, "head:", 5) &&
		 !get_hex(name + 5, 2, &conn))
		check_head(conn, value);
	else
		problem("foreign key '%.*s'", key.len > 40 ? 40 : (int)key.len, name);
}

static void check_file(void)
{
	struct blob key;

	if (memcmp(take(5), "REDIS", 5))
		broken("no RDB file");
	take(4);
	for (;;) {
		switch (*take(1)) {
		case RDB_STRING:
			key = take_string();
			check_pair(key, take_string());
			break;
		case RDB_AUX:
			take_string();
			take_string();
			break;
		case RDB_SELECTDB:
			if (take_count())
				problem("a database other than 0");
			break;
		case RDB_RESIZEDB:
			if (take_count() != (uint64_t)conns * keys_per_conn + conns)
				problem("the file's own key count is wrong");
			if (take_count())
				problem("the file announces keys that expire");
			break;
		case RDB_EOF:
			take(8);	/* the checksum */
			if (pos != end)
				problem("bytes after the end");
			return;
		default:
			pos--;
			broken("an unknown type or opcode");
		}
	}
}

/* Replays all writes up to the cut; returns how many keys the load changed. */
static uint64_t replay(void)
{
	uint64_t changed = 0, i, seq;
	uint32_t c;

	last = calloc((uint64_t)conns * keys_per_conn, sizeof(*last));
	if (!last) {
		perror("rdbcheck");
		exit(2);
	}
	for (c = 0; c < conns; c++)
		for (seq = 1; seq <= cut[c]; seq++)
			last[(uint64_t)c * keys_per_conn + model_key(c, seq, keys_per_conn)] = seq;
	for (i = 0; i < (uint64_t)conns * keys_per_conn; i++)
		changed += last[i] > keys_per_conn;
	return changed;
}

static void map_file(const char *path)
{
	struct stat st;
	int fd = open(path, O_RDONLY);

	if (fd < 0 || fstat(fd, &st)) {
		perror(path);
		exit(2);
	}
	if (!st.st_size) {
		printf("rdbcheck: %s is empty\n", path);
		exit(1);
	}
	start = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (start == MAP_FAILED) {
		perror(path);
		exit(2);
	}
	close(fd);
	pos = start;
	end = start + st.st_size;
}

int main(int argc, char **argv)
{
	uint64_t changed, missing = 0, i;
	uint32_t c;

	if (argc < 5 || argc > 4 + CONNS_MAX) {
		fprintf(stderr, "usage: rdbcheck FILE KEYS_PER_CONN VALUE_LEN CUT...\n");
		return 2;
	}
	keys_per_conn = number_arg("KEYS_PER_CONN", argv[2], 1, KEYS_MAX);
	value_len = number_arg("VALUE_LEN", argv[3], VALUE_MIN, VALUE_MAX);
	conns = argc - 4;
	for (c = 0; c < conns; c++)
		cut[c] = number_arg("CUT", argv[4 + c], keys_per_conn, UINT64_MAX);
	map_file(argv[1]);
	changed = replay();
	check_file();

	for (i = 0; i < (uint64_t)conns * keys_per_conn; i++)
		missing += last[i] != 0;
	if (missing)
		problem("%llu keys are missing", (unsigned long long)missing);
	for (c = 0; c < conns; c++)
		if (!head_seen[c])
			problem("head of connection %u is missing", c);
	if (problems) {
		printf("rdbcheck: %llu differences\n", (unsigned long long)problems);
		return 1;
	}
	printf("%llu keys exact (%llu of them overwritten since the fill), %.2f GiB\n",
	       (unsigned long long)conns * keys_per_conn, (unsigned long long)changed,
	       (double)(end - start) / (1 << 30));
	return 0;
}
