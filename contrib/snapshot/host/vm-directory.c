/* SPDX-License-Identifier: MIT */
/*
 * Where the machines of a description are, and the locks on them
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
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

/* QEMU starts elsewhere: no path may depend on where this program is. */
static int absolute(const char *path, char *to, size_t size)
{
    char here[PATH_MAX];
    int n;

    if (*path == '/') {
        n = snprintf(to, size, "%s", path);
    } else if (!getcwd(here, sizeof(here))) {
        return vm_fail_system("cannot find the current directory, for", path);
    } else {
        n = snprintf(to, size, "%s/%s", strcmp(here, "/") ? here : "", path);
    }
    return n < (int)size ? 0 :
        vm_fail(SNAPSHOT_VM_E_SYSTEM, "\"%s\" is too long for a socket: set "
                "SNAPSHOT_VM_DIR to a shorter directory", path);
}

/* Is it this user's?  sudo leaves variables as they were. */
static bool is_own(const char *path)
{
    struct stat st;

    return !stat(path, &st) && st.st_uid == geteuid() &&
        !access(path, W_OK);
}

static int root_directory(char *path, size_t size)
{
    const char *env = secure_getenv("SNAPSHOT_VM_DIR");
    const char *runtime = secure_getenv("XDG_RUNTIME_DIR");
    char name[PATH_MAX];

    if (env && *env) {
        return absolute(env, path, size);
    }
    if (runtime && *runtime == '/' && is_own(runtime)) {
        snprintf(name, sizeof(name), "%s/snapshot-vm", runtime);
    } else {
        snprintf(name, sizeof(name), "%s/snapshot-vm-%u",
                 access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm",
                 (unsigned)geteuid());
    }
    return absolute(name, path, size);
}

int vm_base_directory(const struct description *d, char *path, size_t size,
                      bool make)
{
    uint64_t id = vm_hash(0xcbf29ce484222325ull, d->path, strlen(d->path));
    char *name;
    size_t len;
    int ret = root_directory(path, size);

    /* One that is there may be another user's, who would be trusted. */
    if (!ret && (make || !access(path, F_OK))) {
        ret = vm_make_directory(path);
    }
    if (ret) {
        return ret;
    }
    len = strlen(path);
    name = path + len + 1;
    len += snprintf(path + len, size - len, "/%.16s-%08x",
                    strrchr(d->path, '/') + 1, (unsigned)(id ^ id >> 32));
    /* The sockets' names must fit as well. */
    if (len + sizeof("/1023/control") > sizeof(((struct sockaddr_un *)0)
                                               ->sun_path)) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "\"%s\" is too long for a socket: "
                       "set SNAPSHOT_VM_DIR to a shorter directory", path);
    }
    /* It becomes part of options of QEMU's. */
    for (; *name; name++) {
        if (!isalnum((unsigned char)*name) && !strchr("-_.", *name)) {
            *name = '_';
        }
    }
    return !make && access(path, F_OK) ? 0 : vm_make_directory(path);
}

void vm_path(const char *directory, const char *name, char *path, size_t size)
{
    snprintf(path, size, "%s/%s", directory, name);
}

/* Open a file of an instance, unless it is something that was put there. */
static int open_file(const char *path, int flags)
{
    struct stat st;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | flags,
                  0600);

    if (fd >= 0 && (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) ||
                    st.st_uid != geteuid())) {
        close(fd);
        errno = EPERM;
        fd = -1;
    }
    return fd;
}

static struct flock lock_of(short type)
{
    return (struct flock) { .l_type = type, .l_whence = SEEK_SET };
}

bool vm_is_locked(const char *directory, const char *name)
{
    struct flock l = lock_of(F_WRLCK);
    char path[VM_PATH];
    bool locked;
    int fd;

    vm_path(directory, name, path, sizeof(path));
    fd = open_file(path, 0);
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
    char path[VM_PATH];
    int fd;

    vm_path(directory, name, path, sizeof(path));
    fd = open_file(path, O_CREAT);
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

/*
 * Make a file at least of that size.  Its memory is there from now on, as what lacks
 * later ends a program, and QEMU, by SIGBUS.
 */
static int allocate(int fd, const char *path, size_t size)
{
    struct stat st;
    int error;

    if (fstat(fd, &st) < 0 ||
        ((size_t)st.st_size < size && ftruncate(fd, size) < 0)) {
        return vm_fail_system("cannot make", path);
    }
    do {
        error = posix_fallocate(fd, 0, size);
    } while (error == EINTR);
    if (error) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "cannot make %s, of %zu bytes: "
                       "%s", path, size, strerror(error));
    }
    return 0;
}

int vm_new_file(const char *directory, const char *name, size_t size)
{
    char path[VM_PATH];
    int fd, ret;

    vm_path(directory, name, path, sizeof(path));
    unlink(path);
    fd = open_file(path, O_CREAT | O_EXCL);
    if (fd < 0) {
        return vm_fail_system("cannot make", path);
    }
    ret = allocate(fd, path, size);
    close(fd);
    if (ret) {
        unlink(path);
    }
    return ret;
}

void *vm_map_file(const char *directory, const char *name, size_t size,
                  bool make)
{
    char path[VM_PATH];
    struct stat st;
    void *p;
    int fd;

    vm_path(directory, name, path, sizeof(path));
    fd = open_file(path, make ? O_CREAT : 0);
    if (fd < 0) {
        vm_fail_system("cannot open", path);
        return NULL;
    }
    if (make && allocate(fd, path, size)) {
        close(fd);
        return NULL;
    }
    if (fstat(fd, &st) < 0 || (size_t)st.st_size < size) {
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
