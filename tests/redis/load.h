/* SPDX-License-Identifier: GPL-2.0 */
/* What the writing connections (load.c) and the snapshot (snapshot.c) share. */
#ifndef ASYNC_FORK_REDIS_LOAD_H
#define ASYNC_FORK_REDIS_LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NSEC		UINT64_C(1000000000)
#define MSEC		UINT64_C(1000000)
#define RING		4096	/* unanswered writes of one connection */
#define OUT_SIZE	(64 << 10)
#define POLL_EVERY	(50 * MSEC)

struct conn {
	int fd;
	uint64_t sent, acked;		/* sequence numbers; sent: put into out */
	uint64_t next_due;
	uint64_t due[RING], handed[RING];
	char out[OUT_SIZE];
	size_t out_len, out_pos;
	unsigned int reply_pos;		/* bytes of the next "+OK\r\n" that are here */
	uint64_t acked_before, cut, sent_by_reply;	/* of the snapshot */
};

enum phase { BEFORE, FORKING, SAVING, AFTER, DRAIN };

extern struct conn *conn;
extern uint32_t conns;

void fail(const char *fmt, ...) __attribute__((noreturn, format(printf, 1, 2)));
uint64_t now_ns(void);
int connect_to(const char *path);
char *put_bulk(char *p, const void *data, size_t len);

extern enum phase phase;
extern int control;		/* -1: none */
extern uint64_t t_bgsave;

void snapshot_begin(const char *socket, uint64_t before, uint64_t after);
void snapshot_step(uint64_t now);
void snapshot_input(void);
void snapshot_print(void);

#endif
