/* SPDX-License-Identifier: MIT */
/*
 * Where the machines of a description are, and the locks on them
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "vm-internal.h"

int vm_make_directory(const char *path)
{
    struct stat st;

    if (mkdir(path, 0700) < 0 && errno != EEXIST) {
        return vm_fail_system("cannot make", path);
    }
    if (lstat(path, &st) < 0) {
        return vm_fail_system("cannot look at", path);
    }
    if (!S_ISDIR(st.st_mode) || st.st_uid != geteuid() ||
        (st.st_mode & 077)) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "%s is not a directory of this "
                       "user's alone: remove it, or set SNAPSHOT_VM_DIR to "
                       "another", path);
    }
    return 0;
}

int vm_base_directory(const struct description *d, char *path,
                      size_t size, bool make)
{
    const char *env = getenv("SNAPSHOT_VM_DIR");
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    uint64_t id = vm_hash(0xcbf29ce484222325ull, d->path, strlen(d->path));
    const char *name = strrchr(d->path, '/') + 1;
    int ret = 0, n;

    if (env && *env) {
        n = snprintf(path, size, "%s", env);
    } else if (runtime && *runtime && !access(runtime, W_OK)) {
        n = snprintf(path, size, "%s/snapshot-vm", runtime);
    } else {
        n = snprintf(path, size, "%s/snapshot-vm-%u",
                     access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm",
                     (unsigned)geteuid());
    }
    /* One that is there may be another user's, who would be trusted. */
    if (n < (int)size && (make || !access(path, F_OK))) {
        ret = vm_make_directory(path);
    }
    if (!ret && n < (int)size) {
        n += snprintf(path + n, size - n, "/%.16s-%08x", name,
                      (unsigned)(id ^ id >> 32));
    }
    /* The sockets' names must fit as well. */
    if (n + sizeof("/1023/control") > sizeof(((struct sockaddr_un *)0)
                                             ->sun_path)) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "\"%s\" is too long for a socket: "
                       "set SNAPSHOT_VM_DIR to a shorter directory", path);
    }
    return ret || (!make && access(path, F_OK)) ? ret : vm_make_directory(path);
}

void vm_path(const char *directory, const char *name, char *path,
                   size_t size)
{
    snprintf(path, size, "%s/%s", directory, name);
}

static struct flock lock_of(short type)
{
    return (struct flock) { .l_type = type, .l_whence = SEEK_SET };
}

bool vm_is_locked(const char *directory, const char *name)
{
    struct flock l = lock_of(F_WRLCK);
    char path[300];
    bool locked;
    int fd;

    vm_path(directory, name, path, sizeof(path));
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    locked = !fcntl(fd, F_OFD_GETLK, &l) && l.l_type != F_UNLCK;
    close(fd);
    return locked;
}

int vm_lock_file(const char *directory, const char *name)
{
    struct flock l = lock_of(F_WRLCK);
    char path[300];
    int fd;

    vm_path(directory, name, path, sizeof(path));
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) {
        return vm_fail_system("cannot open", path);
    }
    if (fcntl(fd, F_OFD_SETLK, &l) < 0) {
        int error = errno;

        close(fd);
        errno = error;
        return error == EAGAIN || error == EACCES ?
            vm_fail(SNAPSHOT_VM_E_BUSY, "%s is locked", path) :
            vm_fail_system("cannot lock", path);
    }
    return fd;
}

void *vm_map_file(const char *directory, const char *name, size_t size,
                  bool make)
{
    char path[300];
    struct stat st;
    void *p;
    int fd;

    vm_path(directory, name, path, sizeof(path));
    fd = open(path, O_RDWR | O_CLOEXEC | (make ? O_CREAT : 0), 0600);
    if (fd < 0) {
        vm_fail_system("cannot open", path);
        return NULL;
    }
    if (fstat(fd, &st) < 0 ||
        (make && (size_t)st.st_size != size && ftruncate(fd, size) < 0)) {
        vm_fail_system("cannot make", path);
        close(fd);
        return NULL;
    }
    if (!make && (size_t)st.st_size < size) {
        vm_fail(SNAPSHOT_VM_E_PROTOCOL, "%s has %zu bytes, not %zu", path,
                (size_t)st.st_size, size);
        close(fd);
        return NULL;
    }
    p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p == MAP_FAILED) {
        vm_fail_system("cannot map", path);
        return NULL;
    }
    return p;
}
