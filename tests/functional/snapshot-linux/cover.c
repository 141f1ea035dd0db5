/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Work for the kernel that is the same after each restore
 *
 *     cover        saves, works, and tells a panic device when it is done: the
 *                  host stops the machine there (-action panic=pause)
 */

#define _GNU_SOURCE

#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "snapshot.h"

#define PANIC_PORT      0x505
#define PANICKED        1

static void check(bool ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static void files(void)
{
    char name[64], buf[8192];

    for (int i = 0; i < 20; i++) {
        int fd;

        snprintf(name, sizeof(name), "/tmp/cover%d", i);
        mkdir(name, 0755);
        strcat(name, "/file");
        fd = open(name, O_RDWR | O_CREAT, 0644);
        check(fd >= 0, name);
        memset(buf, i, sizeof(buf));
        check(write(fd, buf, sizeof(buf)) == sizeof(buf) &&
              !ftruncate(fd, i * 100) && !lseek(fd, 0, SEEK_SET) &&
              read(fd, buf, sizeof(buf)) == i * 100, name);
        close(fd);
    }
}

static void memory(void)
{
    const size_t size = 1 << 20;
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    check(p != MAP_FAILED, "mmap");
    memset(p, 1, size);
    munmap(p, size);
}

static void processes(void)
{
    char buf[100] = "";
    int fds[2];

    check(!pipe(fds), "pipe");
    for (int i = 0; i < 5; i++) {
        pid_t pid = fork();

        check(pid >= 0, "fork");
        if (!pid) {
            _exit(write(fds[1], buf, sizeof(buf)) != sizeof(buf));
        }
        check(waitpid(pid, NULL, 0) == pid &&
              read(fds[0], buf, sizeof(buf)) == sizeof(buf), "pipe");
    }
    close(fds[0]);
    close(fds[1]);
}

static void work(void)
{
    files();
    memory();
    processes();
}

int main(void)
{
    struct snapshot s;
    int64_t n = snapshot_open(&s);

    check(n < 0 || !iopl(3), "iopl");
    if (n >= 0) {
        work();         /* what is done once only is not to differ */
        n = snapshot_save(&s, 0);
    }
    if (n < 0) {
        printf("cover: %s\n", snapshot_strerror(n));
        return 1;
    }
    work();
    outb(PANICKED, PANIC_PORT);
    return 0;
}
