/* SPDX-License-Identifier: GPL-2.0 */
/* Loads and unloads the module. */
#ifndef AF_MODULE_H
#define AF_MODULE_H

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "af.h"

static inline int load_module(void)
{
	const char *path = getenv("ASYNC_FORK_KO");
	int fd = open(path ? path : "", O_RDONLY | O_CLOEXEC);
	int ret;

	if (fd < 0)
		return -errno;
	ret = syscall(SYS_finit_module, fd, "", 0) ? -errno : 0;
	close(fd);
	return ret;
}

static inline int unload_module(void)
{
	return syscall(SYS_delete_module, "async_fork", O_NONBLOCK) ? -errno : 0;
}

/* The last reference goes with a work item, some time after the last fork. */
static inline bool unloads(void *arg)
{
	*(int *)arg = unload_module();
	return *(int *)arg != -EWOULDBLOCK;
}

#endif
