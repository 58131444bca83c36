// SPDX-License-Identifier: GPL-2.0
/*
 * Who may write the switches: root; and of cgroups whoever they belong to, as
 * Documentation/admin-guide/cgroup-v2.rst has delegation.
 */
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include "user.h"

#define ROOT	"/sys/fs/cgroup"
#define GROUP	ROOT "/af-security"
#define INNER	GROUP "/inner"
#define SWITCH	"/memory.async_fork"
#define MAX_ACTIVE_FILE "/sys/devices/virtual/workqueue/async_fork/max_active"
#define SKIP_FILE "/sys/kernel/debug/async_fork/skip"

/* The content of a file, or "" if it cannot be read. */
static const char *text_of(const char *path)
{
	static char buf[4096];

	return af_read_file(path, buf, sizeof(buf)) ? "" : buf;
}

#define EXPECT_OWNER(uid, want_mode, path) do {				\
	struct stat __st;						\
	ASSERT_EQ(0, stat((path), &__st));				\
	EXPECT_EQ((uid), __st.st_uid);					\
	EXPECT_EQ((want_mode), __st.st_mode & 07777);			\
} while (0)

FIXTURE(user) {
	struct af af;
	struct af_child user, other;
	int mode_fd, min_fd;	/* that root opened and the users inherited */
	bool remounted;
};

FIXTURE_SETUP(user)
{
	if (af_plain_mode())
		SKIP(return, "plain fork has no switches");
	self->mode_fd = open(AF_MODE_FILE, O_WRONLY);
	self->min_fd = open(AF_MIN_FILE, O_WRONLY);
	ASSERT_EQ(0, user_make(&self->user, USER));
	ASSERT_EQ(0, user_make(&self->other, OTHER));
	AF_SETUP(AF_RACE);
	af_write_file(ROOT "/cgroup.subtree_control", "+memory");
	ASSERT_EQ(0, mkdir(GROUP, 0755));
}

FIXTURE_TEARDOWN(user)
{
	AF_EXIT_OK(&self->user);
	AF_EXIT_OK(&self->other);
	if (self->remounted)
		EXPECT_EQ(0, mount("none", ROOT, NULL, MS_REMOUNT, ""));
	rmdir(INNER);
	EXPECT_EQ(0, rmdir(GROUP));
	AF_FINISH();
}

TEST_F(user, sysctls_are_for_root)
{
	EXPECT_OWNER(0, 0644, AF_MODE_FILE);
	EXPECT_OWNER(0, 0644, AF_MIN_FILE);
	EXPECT_EQ(-EACCES, user_write(&self->user, AF_MODE_FILE, "0"));
	EXPECT_EQ(-EACCES, user_write(&self->user, AF_MIN_FILE, "1"));
	EXPECT_STREQ("2", text_of(AF_MODE_FILE));
	EXPECT_STREQ("0", text_of(AF_MIN_FILE));
}

static long do_write_fd(const struct af_job *job)
{
	return write(job->first, "1", 1) < 0 ? -errno : 0;
}

/* Who writes is asked, not who opened the file. */
TEST_F(user, descriptor_is_no_permission)
{
	EXPECT_EQ(-EPERM, af_call(&self->user, do_write_fd,
				  .first = self->mode_fd));
	EXPECT_EQ(-EPERM, af_call(&self->user, do_write_fd,
				  .first = self->min_fd));
	EXPECT_STREQ("2", text_of(AF_MODE_FILE));
	EXPECT_STREQ("0", text_of(AF_MIN_FILE));
	ASSERT_EQ(1, write(self->mode_fd, "1", 1));
	EXPECT_STREQ("1", text_of(AF_MODE_FILE));
}

/* Root of a new user namespace, and of a cgroup namespace with it. */
static long do_unshare(const struct af_job *job)
{
	(void)job;
	if (unshare(CLONE_NEWUSER))
		return -errno;
	if (af_write_file("/proc/self/uid_map", "0 1000 1") ||
	    af_write_file("/proc/self/setgroups", "deny") ||
	    af_write_file("/proc/self/gid_map", "0 1000 1") || geteuid())
		return -1;
	return unshare(CLONE_NEWCGROUP | CLONE_NEWNS) ? -errno : 0;
}

TEST_F(user, user_namespace_gives_nothing)
{
	ASSERT_EQ(0, user_join(self->user.pid, GROUP));
	ASSERT_EQ(0, af_call(&self->user, do_unshare));
	EXPECT_EQ(-EACCES, user_write(&self->user, AF_MODE_FILE, "0"));
	EXPECT_EQ(-EACCES, user_write(&self->user, AF_MIN_FILE, "1"));
	EXPECT_EQ(-EPERM, af_call(&self->user, do_write_fd,
				  .first = self->mode_fd));
	EXPECT_EQ(-EACCES, user_write(&self->user, GROUP SWITCH, "1"));
	EXPECT_NE(0, user_write(&self->user, AF_HOLD_FILE, "0"));
	EXPECT_STREQ("2", text_of(AF_MODE_FILE));
	EXPECT_STREQ("0", text_of(GROUP SWITCH));
}

TEST_F(user, debugfs_is_for_root)
{
	const char *hold;

	if (!af_can_hold())
		SKIP(return, "no debugfs files (debug kernel)");
	EXPECT_OWNER(0, 0600, AF_HOLD_FILE);
	EXPECT_OWNER(0, 0600, SKIP_FILE);
	hold = strdupa(text_of(AF_HOLD_FILE));
	EXPECT_EQ(-EACCES, user_write(&self->user, AF_HOLD_FILE, "1"));
	EXPECT_EQ(-EACCES, user_write(&self->user, SKIP_FILE, "1"));
	EXPECT_STREQ(hold, text_of(AF_HOLD_FILE));
}

/* Whatever users queue, so many workers run at once, on each NUMA node. */
TEST_F(user, few_workers_run_at_once)
{
	EXPECT_OWNER(0, 0644, MAX_ACTIVE_FILE);
	EXPECT_EQ(-EACCES, user_write(&self->user, MAX_ACTIVE_FILE, "64"));
	EXPECT_STREQ("8", text_of(MAX_ACTIVE_FILE));
}

TEST_F(user, new_group_is_for_root)
{
	EXPECT_OWNER(0, 0644, GROUP SWITCH);
	EXPECT_EQ(-EACCES, user_write(&self->user, GROUP SWITCH, "1"));
	EXPECT_STREQ("0", text_of(GROUP SWITCH));
}

/* "write access of the directory and its cgroup.procs, cgroup.threads and ..." */
static int delegate(uid_t uid)
{
	return chown(GROUP, uid, uid) ||
	       chown(GROUP "/cgroup.procs", uid, uid) ||
	       chown(GROUP "/cgroup.threads", uid, uid) ||
	       chown(GROUP "/cgroup.subtree_control", uid, uid);
}

static long do_settle_inside(const struct af_job *job)
{
	(void)job;
	if (mkdir(INNER, 0755))
		return -errno;
	return af_write_file(INNER "/cgroup.procs", "0") ?:
	       af_write_file(GROUP "/cgroup.subtree_control", "+memory");
}

/* The user sits in a group of its own below the one that root gave it. */
#define DELEGATE() do {							\
	ASSERT_EQ(0, delegate(USER));					\
	ASSERT_EQ(0, user_join(self->user.pid, GROUP));			\
	ASSERT_EQ(0, af_call(&self->user, do_settle_inside));		\
} while (0)

TEST_F(user, delegatee_rules_below_its_group)
{
	DELEGATE();
	/* What its parent gave the group is not its own to change. */
	EXPECT_OWNER(0, 0644, GROUP SWITCH);
	EXPECT_EQ(-EACCES, user_write(&self->user, GROUP SWITCH, "1"));
	EXPECT_EQ(-EACCES, user_write(&self->user, GROUP "/memory.max", "max"));

	EXPECT_OWNER(USER, 0644, INNER SWITCH);
	EXPECT_EQ(0, user_write(&self->user, INNER SWITCH, "3"));
	EXPECT_EQ(-ERANGE, user_write(&self->user, INNER SWITCH, "9"));
	EXPECT_EQ(-EACCES, user_write(&self->other, INNER SWITCH, "1"));
	EXPECT_STREQ("3", text_of(INNER SWITCH));
	EXPECT_EQ(0, af_write_file(INNER SWITCH, "1"));
	EXPECT_STREQ("1", text_of(INNER SWITCH));
	EXPECT_STREQ("0", text_of(GROUP SWITCH));
}

static long do_fork(const struct af_job *job)
{
	struct af_region r;
	struct af_child c;
	long wrong;

	(void)job;
	if (af_region_make(&r, 2, AF_BASE, 0x5ec) || af_spawn_other(&c))
		return -1;
	wrong = af_child_check_all(&c, &r);
	af_region_free(&r);
	return af_end(&c) ?: wrong;
}

/* The delegatee's value counts for its processes; root has the last word. */
TEST_F(user, delegatee_decides_unless_root_does)
{
	DELEGATE();
	self->af.want = 1;
	self->af.allow |= AF_ALLOW(AF_FB_OFF);
	ASSERT_EQ(0, af_write_file(AF_MODE_FILE, "1"));
	EXPECT_EQ(0, af_call(&self->user, do_fork));
	EXPECT_EQ(0, af_delta(&self->af, AF_SESSION));
	ASSERT_EQ(0, user_write(&self->user, INNER SWITCH, "2"));
	EXPECT_EQ(0, af_call(&self->user, do_fork));
	EXPECT_EQ(1, af_delta(&self->af, AF_SESSION));
	ASSERT_EQ(0, af_write_file(AF_MODE_FILE, "0"));
	EXPECT_EQ(0, af_call(&self->user, do_fork));
	EXPECT_EQ(1, af_delta(&self->af, AF_SESSION));
}

static bool lists(const char *path, const char *name)
{
	size_t len = strlen(name);
	const char *at;

	for (at = text_of(path); (at = strstr(at, name)); at += len)
		if ((at == text_of(path) || at[-1] == '\n') &&
		    (!at[len] || at[len] == '\n'))
			return true;
	return false;
}

/*
 * How a group forks is its own business, as is memory.oom.group, and not a share
 * of its parent's resources, as is memory.max. So who delegates may give it away.
 */
TEST_F(user, root_may_give_the_switch_away)
{
	EXPECT_TRUE(lists("/sys/kernel/cgroup/delegate", "memory.async_fork"));
	EXPECT_FALSE(lists("/sys/kernel/cgroup/delegate", "memory.max"));
	DELEGATE();
	ASSERT_EQ(0, chown(GROUP SWITCH, USER, USER));
	EXPECT_EQ(0, user_write(&self->user, GROUP SWITCH, "4"));
	EXPECT_EQ(-EACCES, user_write(&self->other, GROUP SWITCH, "1"));
	EXPECT_STREQ("4", text_of(GROUP SWITCH));
	EXPECT_STREQ("0", text_of(INNER SWITCH));
}

static long do_enter_namespace(const struct af_job *job)
{
	(void)job;
	return unshare(CLONE_NEWCGROUP) ? -errno : 0;
}

/* The second way of delegation: the root of a cgroup namespace, "nsdelegate". */
TEST_F(user, namespace_root_is_delegated)
{
	struct af_child inside;

	if (!strstr(text_of("/proc/self/mounts"), "nsdelegate")) {
		ASSERT_EQ(0, mount("none", ROOT, NULL, MS_REMOUNT, "nsdelegate"));
		self->remounted = true;
	}
	self->af.spare = 1;
	ASSERT_EQ(0, af_spawn_other(&inside));
	ASSERT_EQ(0, user_join(inside.pid, GROUP));
	ASSERT_EQ(0, af_call(&inside, do_enter_namespace));
	EXPECT_EQ(0, user_write(&inside, GROUP SWITCH, "2"));
	EXPECT_EQ(-EPERM, user_write(&inside, GROUP "/memory.max", "max"));
	AF_EXIT_OK(&inside);
	EXPECT_STREQ("2", text_of(GROUP SWITCH));
}

TEST_HARNESS_MAIN
