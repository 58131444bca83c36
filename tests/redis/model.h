/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the dataset holds, as a function of nothing but "how many writes has
 * each connection done". load.c writes by it, rdbcheck.c judges by it.
 *
 * Connection c owns keys_per_conn keys that nobody else writes. Its writes are
 * numbered 1, 2, 3, ...: this sequence number is the epoch that every value
 * carries. Writes 1..keys_per_conn fill each key once, in order; every later
 * write picks a key by a hash of its number. From the end of the fill on, one
 * command (MSET) sets the key and the connection's head, which holds the
 * number of its last write: Redis itself then knows each connection's epoch.
 */
#ifndef ASYNC_FORK_REDIS_MODEL_H
#define ASYNC_FORK_REDIS_MODEL_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONNS_MAX	64
#define KEYS_MAX	(1U << 31)
#define KEY_LEN		12	/* w01:0000beef */
#define HEAD_LEN	7	/* head:01 */
#define HEAD_VALUE_LEN	20	/* seq:00000000000beef1 */
#define VALUE_MIN	sizeof(struct value_header)
#define VALUE_MAX	4096

struct value_header {
	uint64_t seq;
	uint32_t conn;
	uint32_t key;
};

static inline uint64_t mix64(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static inline uint32_t model_key(uint32_t conn, uint64_t seq, uint32_t keys_per_conn)
{
	if (seq <= keys_per_conn)
		return seq - 1;
	return mix64(((uint64_t)conn << 56) ^ seq) % keys_per_conn;
}

/* Every byte of a value depends on the connection, the key and the epoch. */
static inline void model_value(unsigned char *out, size_t len, uint32_t conn,
			       uint32_t key, uint64_t seq)
{
	struct value_header h = { .seq = seq, .conn = conn, .key = key };
	uint64_t x = mix64(mix64(((uint64_t)conn << 32) | key) ^ seq);
	size_t pos = sizeof(h);

	memcpy(out, &h, sizeof(h));
	for (; pos < len; pos += sizeof(x)) {
		size_t n = len - pos < sizeof(x) ? len - pos : sizeof(x);

		memcpy(out + pos, &x, n);
		x = x * 6364136223846793005ULL + 1442695040888963407ULL;
	}
}

static inline void put_hex(char *out, uint64_t v, int digits)
{
	while (digits--) {
		out[digits] = "0123456789abcdef"[v & 15];
		v >>= 4;
	}
}

/* Returns 0, or -1 if one of the digits is none. */
static inline int get_hex(const char *in, int digits, uint64_t *out)
{
	uint64_t v = 0;

	for (; digits--; in++) {
		if (*in >= '0' && *in <= '9')
			v = v << 4 | (uint64_t)(*in - '0');
		else if (*in >= 'a' && *in <= 'f')
			v = v << 4 | (uint64_t)(*in - 'a' + 10);
		else
			return -1;
	}
	*out = v;
	return 0;
}

static inline void key_name(char out[KEY_LEN], uint32_t conn, uint32_t key)
{
	memcpy(out, "w00:", 4);
	put_hex(out + 1, conn, 2);
	put_hex(out + 4, key, 8);
}

static inline void head_name(char out[HEAD_LEN], uint32_t conn)
{
	memcpy(out, "head:", 5);
	put_hex(out + 5, conn, 2);
}

static inline void head_value(char out[HEAD_VALUE_LEN], uint64_t seq)
{
	memcpy(out, "seq:", 4);
	put_hex(out + 4, seq, 16);
}

/* A number from the command line, or the end of the program. */
static inline uint64_t number_arg(const char *what, const char *text, uint64_t min, uint64_t max)
{
	char *end;
	unsigned long long v = strtoull(text, &end, 10);

	if (*text < '0' || *text > '9' || *end || v < min || v > max) {
		fprintf(stderr, "%s: want a number from %llu to %llu, got '%s'\n", what,
			(unsigned long long)min, (unsigned long long)max, text);
		exit(2);
	}
	return v;
}

#endif
