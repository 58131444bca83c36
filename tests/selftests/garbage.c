// SPDX-License-Identifier: GPL-2.0
/*
 * Garbage for the switches: only what says a legal number changes one, what is
 * refused changes nothing, and what can be read afterwards is legal.
 *
 * AF_SEED and AF_ROUNDS in the environment repeat a run.
 */
#include <ctype.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include "user.h"

#define ROOT	"/sys/fs/cgroup"
#define GROUP	ROOT "/af-garbage"
#define LONGEST	(70UL << 10)

static uint64_t state;

static uint64_t any(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % below;
}

static long number_from(const char *name, long otherwise)
{
	const char *text = getenv(name);

	return text ? strtol(text, NULL, 0) : otherwise;
}

static uint64_t begin(uint64_t seed)
{
	state = seed;
	any(1);
	return seed;
}

FIXTURE(garbage) {
	struct af af;
	char *text;
};

FIXTURE_VARIANT(garbage) {
	const char *path;
	uint64_t max;
	bool sysctl;
};

FIXTURE_VARIANT_ADD(garbage, mode) {
	.path = AF_MODE_FILE, .max = 2, .sysctl = true,
};

FIXTURE_VARIANT_ADD(garbage, minimum) {
	.path = AF_MIN_FILE, .max = UINT32_MAX, .sysctl = true,
};

FIXTURE_VARIANT_ADD(garbage, group) {
	.path = GROUP "/memory.async_fork", .max = 8,
};

FIXTURE_SETUP(garbage)
{
	if (af_plain_mode())
		SKIP(return, "plain fork has no switches");
	AF_SETUP(AF_RACE);
	af_write_file(ROOT "/cgroup.subtree_control", "+memory");
	ASSERT_EQ(0, mkdir(GROUP, 0755));
	self->text = malloc(LONGEST + 64);
	ASSERT_NE(NULL, self->text);
}

FIXTURE_TEARDOWN(garbage)
{
	free(self->text);
	EXPECT_EQ(0, rmdir(GROUP));
	AF_FINISH();
}

/* The kernel's isspace(): Latin-1, with its no-break space. */
static bool is_space(char c)
{
	return c == ' ' || (c >= '\t' && c <= '\r') || (unsigned char)c == 0xa0;
}

/*
 * Whether a text says a number. A cgroup file wants nothing else; a sysctl is
 * content with white space behind it, and reads one page at most.
 */
static bool says(const char *text, size_t len, bool sysctl, uint64_t *number)
{
	static char word[LONGEST + 64];
	size_t i = 0, n = 0;
	char *end;

	if (sysctl && len > AF_PAGE - 1)
		len = AF_PAGE - 1;
	if (!sysctl)
		len = strnlen(text, len);
	while (i < len && is_space(text[i]))
		i++;
	while (i < len && text[i] && !is_space(text[i]) && n < sizeof(word) - 1)
		word[n++] = text[i++];
	word[n] = 0;
	errno = 0;
	*number = strtoull(word, &end, 0);
	if (!n || *end || errno)
		return false;
	while (!sysctl && i < len && is_space(text[i]))
		i++;
	return sysctl || i == len;
}

/* Prints @number as people, and fuzzers, write numbers. */
static size_t print_number(char *text, uint64_t number)
{
	static const char * const format[] = {
		"%llu", "%llu\n", " %llu", "%llu ", "\t%llu\n\n", "0x%llx",
		"0%llo", "-%llu", "+%llu", "%llu 1", "%llu,", "00%llu", "%llux",
	};

	return sprintf(text, format[any(sizeof(format) / sizeof(format[0]))],
		       (unsigned long long)number);
}

static uint64_t any_number(uint64_t max)
{
	static const uint64_t edge[] = {
		0, 1, 2, 3, 8, 9, 255, 256, INT32_MAX, 1ULL << 31, UINT32_MAX,
		1ULL << 32, (1ULL << 32) + 1, INT64_MAX, 1ULL << 63, UINT64_MAX,
	};

	switch (any(3)) {
	case 0:
		return any(max + 1);
	case 1:
		return edge[any(sizeof(edge) / sizeof(edge[0]))];
	}
	return any(UINT64_MAX) >> any(64);
}

/* Some garbage, perhaps with a number in it; returns its length. */
static size_t any_text(char *text, uint64_t max)
{
	static const char soup[] = "0123456789012 \n\t-+xXabcdefoO.,#";
	static const char * const fixed[] = {
		"", " ", "\n", "-", "+", "0x", "0b1", "1 2", "1\n2", "1e0", "on",
		"18446744073709551616", "18446744073709551617", "max", "-0",
		"0000000000000000000000000000000000000000000001", "%d%s%n",
	};
	size_t len, i;

	switch (any(6)) {
	case 0:
		len = any(40);
		for (i = 0; i < len; i++)
			text[i] = any(256);
		return len;
	case 1:
		len = any(24);
		for (i = 0; i < len; i++)
			text[i] = soup[any(sizeof(soup))];
		return len;
	case 2:
		return sprintf(text, "%s", fixed[any(sizeof(fixed) /
						     sizeof(fixed[0]))]);
	case 3:
		/* A number somewhere in something long. */
		len = any(8) ? any(2 * AF_PAGE) : any(LONGEST);
		memset(text, " 0\n\0x9"[any(6)], len);
		i = any(len + 1);
		i += print_number(text + i, any_number(max));
		return i > len ? i : len;
	case 4:
		len = print_number(text, any_number(max));
		text[any(len)] = any(256);
		return len;
	}
	return print_number(text, any_number(max));
}

/* What the file holds, or -1 if that is no number and a newline. */
static long long value_of(const char *path, uint64_t max)
{
	char text[64], again[64];
	ssize_t len;
	uint64_t number;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	len = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (len <= 0)
		return -1;
	text[len] = 0;
	number = strtoull(text, NULL, 10);
	sprintf(again, "%llu\n", (unsigned long long)number);
	return strcmp(text, again) || number > max ? -1 : (long long)number;
}

struct attempt {
	const char *path;
	uint64_t max;
	bool sysctl;
	const char *text;
	size_t len;
	off_t at;
	int how;
};

enum { WRITE, PWRITE, WRITEV, TWICE, HOWS };

/* Writes the text in one of the ways there are; what the last call gave. */
static ssize_t do_attempt(struct attempt *a)
{
	size_t half = any(a->len + 1);
	struct iovec parts[2] = {
		{ (void *)a->text, half },
		{ (void *)(a->text + half), a->len - half },
	};
	int fd = open(a->path, O_WRONLY | O_CLOEXEC);
	ssize_t ret = -1;

	if (fd < 0)
		return -ENOENT;
	switch (a->how) {
	case WRITE:
		ret = write(fd, a->text, a->len);
		break;
	case PWRITE:
		a->at = any(4) ? (off_t)any(100) : (off_t)(any(1ULL << 40));
		ret = pwrite(fd, a->text, a->len, a->at);
		break;
	case WRITEV:
		ret = writev(fd, parts, 2);
		break;
	case TWICE:
		/* The first does not move the second, on any of them. */
		if (write(fd, "1", 1) != 1)
			break;
		ret = write(fd, a->text, a->len);
		break;
	}
	if (ret < 0)
		ret = -errno;
	close(fd);
	return ret;
}

static bool is_refusal(const struct attempt *a, ssize_t ret)
{
	return ret == -EINVAL || ret == -ERANGE ||
	       (ret == -E2BIG && !a->sysctl && a->len > AF_PAGE);
}

/* What is wrong with an attempt that found @before and gave @ret, or NULL. */
static const char *wrong_with(const struct attempt *a, long long before,
			      ssize_t ret)
{
	long long after = value_of(a->path, a->max);
	uint64_t said = 0;
	bool number = says(a->text, a->len, a->sysctl, &said);

	if (after < 0)
		return "the value that is left is not legal";
	if (ret <= 0 && after != before)
		return "refused, and changed";
	if (ret < 0 && !is_refusal(a, ret))
		return "refused with another error";
	if (ret > 0 && (size_t)ret != a->len)
		return "a part was taken";
	if (!ret && a->len)
		return "nothing was taken";
	if (a->sysctl && a->at)
		return after == before ? NULL : "changed behind the start";
	if (ret > 0 && !number)
		return "taken, and no number";
	if (ret > 0 && (uint64_t)after != said)
		return "another number was taken";
	if (ret < 0 && number && isdigit(a->text[0]) && said <= a->max &&
	    strspn(a->text, "0123456789") == a->len && a->len < 20)
		return "a legal number was refused";
	return NULL;
}

TEST_F(garbage, only_legal_numbers_count)
{
	long rounds = number_from("AF_ROUNDS", 1500), i, taken = 0;
	uint64_t seed = begin(number_from("AF_SEED", time(NULL)));

	TH_LOG("AF_SEED=%llu", (unsigned long long)seed);
	for (i = 0; i < rounds; i++) {
		struct attempt a = {
			.path = variant->path, .max = variant->max,
			.sysctl = variant->sysctl, .text = self->text,
		};
		long long before;
		const char *wrong;
		ssize_t ret;

		memset(self->text, 0, 64);
		a.len = any_text(self->text, a.max);
		a.how = any(HOWS);
		before = a.how == TWICE ? 1 : value_of(a.path, a.max);
		ret = do_attempt(&a);
		taken += ret > 0;
		wrong = wrong_with(&a, before, ret);
		ASSERT_EQ(NULL, wrong) {
			TH_LOG("round %ld: %s: %zu bytes at %lld, way %d, gave %zd: '%.40s'",
			       i, wrong, a.len, (long long)a.at, a.how, ret,
			       a.text);
		}
	}
	/* Garbage that never gets through would prove nothing. */
	EXPECT_LT(rounds / 50, taken);
	EXPECT_GT(rounds * 9 / 10, taken);
	TH_LOG("%ld of %ld taken", taken, rounds);
}

/* What no kernel buffer holds. */
TEST_F(garbage, endless_and_unreadable)
{
	const size_t huge = 16UL << 20;
	char *text = malloc(huge);
	int fd = open(variant->path, O_WRONLY | O_CLOEXEC);
	long long before = value_of(variant->path, variant->max);

	ASSERT_NE(NULL, text);
	memset(text, '1', huge);
	EXPECT_EQ(-1, write(fd, text, huge));
	EXPECT_TRUE(errno == EINVAL || errno == E2BIG || errno == ENOMEM);
	EXPECT_EQ(-1, syscall(SYS_write, fd, 8, 4));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_EQ(0, write(fd, text, 0));
	EXPECT_EQ(before, value_of(variant->path, variant->max));
	close(fd);
	free(text);
}

static void scribble(const char *path, uint64_t max)
{
	struct attempt a = { .path = path, .max = max, .how = WRITE };
	char text[LONGEST + 64];

	a.text = text;
	a.len = any_text(text, max);
	do_attempt(&a);
}

/* Whatever happens to the switches while it forks, a child is right. */
FIXTURE(storm) {
	struct af af;
	struct af_region r;
	pid_t scribbler;
};

FIXTURE_SETUP(storm)
{
	if (af_plain_mode())
		SKIP(return, "plain fork has no switches");
	af_write_file(ROOT "/cgroup.subtree_control", "+memory");
	ASSERT_EQ(0, mkdir(GROUP, 0755));
	AF_REGION(&self->r, 4, AF_BASE, 0x9a7b);
	ASSERT_EQ(0, af_write_file(GROUP "/cgroup.procs", "0"));
	begin(number_from("AF_SEED", time(NULL)));
	TH_LOG("AF_SEED=%llu", (unsigned long long)state);
	self->scribbler = fork();
	while (!self->scribbler) {
		scribble(AF_MODE_FILE, 2);
		scribble(AF_MIN_FILE, 30);
		scribble(GROUP "/memory.async_fork", 8);
	}
	ASSERT_EQ(0, kill(self->scribbler, SIGSTOP));
	AF_SETUP(AF_RACE);
	ASSERT_EQ(0, kill(self->scribbler, SIGCONT));
}

FIXTURE_TEARDOWN(storm)
{
	AF_FINISH();
	EXPECT_EQ(0, af_write_file(ROOT "/cgroup.procs", "0"));
	EXPECT_EQ(0, rmdir(GROUP));
}

#define FORKS	32

TEST_F(storm, forks_while_switches_change)
{
	struct af_child c;
	int i;

	self->af.spare = FORKS;
	self->af.allow |= AF_ALLOW(AF_FB_OFF) | AF_ALLOW(AF_FB_SMALL);
	for (i = 0; i < FORKS; i++) {
		ASSERT_EQ(0, af_spawn_other(&c));
		af_fill(&self->r, af_piece(i % 4), AF_PIECE_PAGES, i);
		EXPECT_EQ(0, af_child_check(&c, &self->r, af_piece(i % 4),
					    AF_PIECE_PAGES,
					    i < 4 ? self->r.seed : i - 4UL));
		AF_EXIT_OK(&c);
	}
	kill(self->scribbler, SIGKILL);
	ASSERT_EQ(self->scribbler, waitpid(self->scribbler, NULL, 0));
	TH_LOG("%ld of %d forks were lazy", af_delta(&self->af, AF_SESSION),
	       FORKS);
	ASSERT_EQ(0, af_write_file(AF_MODE_FILE, "2"));
	ASSERT_EQ(0, af_write_file(AF_MIN_FILE, "0"));
	AF_SPAWN(&c);
	EXPECT_EQ(0, af_child_check(&c, &self->r, af_piece(0), AF_PIECE_PAGES,
				    FORKS - 4UL));
	AF_EXIT_OK(&c);
}

TEST_HARNESS_MAIN
