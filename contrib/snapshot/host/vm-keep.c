/* SPDX-License-Identifier: MIT */
/*
 * A machine that was booted once is kept in a file ("keep = FILE"), and begins
 * from that
 *
 * FILE is QEMU's.  QEMU takes it for a machine of the same options only, but it
 * does not know what a kernel or a disk had in it.  FILE.key does: it tells
 * what the machine consisted of when it booted, and which FILE it speaks of, so
 * that neither can be taken for another.  Who writes them has FILE.key locked.
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vm-internal.h"

#define KEY_BEGIN       "snapshot-vm keep 1\n"
#define KEY_MAX         (1 << 20)

static void tell(const char *format, ...)
    __attribute__((format(printf, 1, 2)));

static void tell(const char *format, ...)
{
    char *text;
    va_list ap;

    va_start(ap, format);
    if (vm_tell && vasprintf(&text, format, ap) >= 0) {
        vm_tell(text);
        free(text);
    }
    va_end(ap);
}

/* As QEMU sees it, which starts where the description is */
static char *absolute(const struct description *d, const char *name)
{
    int n = *name == '/' ? 0 : strrchr(d->path, '/') + 1 - d->path;
    char *path;

    return asprintf(&path, "%.*s%s", n, d->path, name) < 0 ? NULL : path;
}

int vm_keep_name(struct snapshot_vm *vm)
{
    char *name;

    if (!vm->d.keep) {
        return 0;
    }
    name = vm_expand(vm, vm->d.keep);
    vm->keep = name ? absolute(&vm->d, name) : NULL;
    free(name);
    return vm->keep ? 0 : vm_fail_system("cannot open", vm->d.keep);
}

/* --------------------------------------------- what a machine consists of */

/* If it is a file: a line with its path, size and time */
static void add_file(const struct snapshot_vm *vm, FILE *to, const char *name)
{
    size_t own = strlen(vm->directory);
    char *path = *name ? absolute(&vm->d, name) : NULL;
    struct stat st;

    if (path && !stat(path, &st) &&
        (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode)) &&
        (strncmp(path, vm->directory, own) || path[own] != '/')) {
        fprintf(to, "%lld %lld.%09ld %s\n", (long long)st.st_size,
                (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec, path);
    }
    free(path);
}

/* What begins a value, up to @end; commas in it may be doubled. */
static void add_part(const struct snapshot_vm *vm, FILE *to, const char *value,
                     const char *end)
{
    char *name = malloc(strlen(value) + 1), *p = name;

    for (; p && *value; value++) {
        if (*value == ',' && value[1] == ',') {
            value++;
        } else if (strchr(end, *value)) {
            break;
        }
        *p++ = *value;
    }
    if (p) {
        *p = 0;
        add_file(vm, to, name);
    }
    free(name);
}

/*
 * Where a file's name may be in an option is known to QEMU alone: it is looked
 * for wherever one can begin and end.
 */
static void add_value(const struct snapshot_vm *vm, FILE *to, const char *value)
{
    static const char *const ends[] = { "", ",", "\"", ", " };
    const char *p = value;
    size_t i;

    do {
        for (i = 0; i < sizeof(ends) / sizeof(ends[0]); i++) {
            if (!i || strpbrk(p, ends[i])) {
                add_part(vm, to, p, ends[i]);
            }
        }
        p = strpbrk(p, ",=:\" ");
    } while (p++);
}

/* Does the option say what QEMU writes to, or nothing about files? */
static bool is_other(const char *option, const char *value)
{
    static const char *const others[] = {
        "append", "chardev", "D", "d", "debugcon", "display", "mon", "monitor",
        "name", "net", "netdev", "nic", "parallel", "pidfile", "qmp",
        "qmp-pretty", "serial", "trace", "vnc",
    };
    size_t i;

    option += strspn(option, "-");
    for (i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
        if (!strcmp(option, others[i])) {
            return true;
        }
    }
    return !strcmp(option, "object") && !strncmp(value, "filter-", 7);
}

/* As execvp() finds it */
static void add_program(const struct snapshot_vm *vm, FILE *to)
{
    const char *dirs = getenv("PATH"), *qemu = vm->d.qemu;
    char *path;

    if (strchr(qemu, '/')) {
        add_file(vm, to, qemu);
        return;
    }
    for (dirs = dirs ? dirs : "/bin:/usr/bin"; dirs; dirs = strchr(dirs, ':')) {
        dirs += *dirs == ':';
        if (asprintf(&path, "%.*s/%s", (int)strcspn(dirs, ":"), dirs,
                     qemu) >= 0) {
            bool found = !access(path, X_OK);

            if (found) {
                add_file(vm, to, path);
            }
            free(path);
            if (found) {
                return;
            }
        }
    }
}

/* Returns: memory of the caller's, or NULL */
static char *consists_of(const struct snapshot_vm *vm)
{
    char *text = NULL;
    size_t size, i;
    FILE *to = open_memstream(&text, &size);

    if (!to) {
        return NULL;
    }
    fprintf(to, "description %016llx\n", (unsigned long long)vm->d.hash);
    add_program(vm, to);
    for (i = 0; i < vm->d.n_args; i++) {
        const char *arg = vm->d.args[i];
        bool has_value = *arg == '-' && i + 1 < vm->d.n_args &&
            *vm->d.args[i + 1] != '-';

        if (has_value && !is_other(arg, vm->d.args[i + 1])) {
            char *value = vm_expand(vm, vm->d.args[i + 1]);

            if (value) {
                add_value(vm, to, value);
            }
            free(value);
        }
        i += has_value;
    }
    if (fclose(to)) {
        free(text);
        return NULL;
    }
    return text;
}

static uint64_t hash_of(const char *text)
{
    /* 0 is none */
    return vm_hash(0xcbf29ce484222325ull, text, strlen(text)) | 1;
}

uint64_t vm_keep_hash(const struct snapshot_vm *vm)
{
    char *text = vm->keep ? consists_of(vm) : NULL;
    uint64_t hash = text ? hash_of(text) : 0;

    free(text);
    return hash;
}

/* --------------------------------------------------------------- FILE.key */

static char *key_name(const struct snapshot_vm *vm)
{
    char *name;

    return asprintf(&name, "%s.key", vm->keep) < 0 ? NULL : name;
}

static int open_key(const struct snapshot_vm *vm, int flags)
{
    char *name = key_name(vm);
    int fd = name ? open(name, flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK,
                         0600) : -1;

    free(name);
    return fd;
}

/* Returns: memory of the caller's; NULL if there is none, or no whole one */
static char *read_key(int fd)
{
    char *text = calloc(1, KEY_MAX + 1);
    ssize_t n = text ? pread(fd, text, KEY_MAX, 0) : -1;

    if (n < 0 || strncmp(text, KEY_BEGIN, strlen(KEY_BEGIN))) {
        free(text);
        return NULL;
    }
    return text;
}

/* A line that tells which file it is: it was never written to since. */
static char *identity(const struct stat *st)
{
    char *line;

    return asprintf(&line, "%llx %llu %lld %lld.%09ld\n",
                    (unsigned long long)st->st_dev,
                    (unsigned long long)st->st_ino, (long long)st->st_size,
                    (long long)st->st_mtim.tv_sec, st->st_mtim.tv_nsec) < 0 ?
        NULL : line;
}

/* Into @why, what differs first.  Returns: false if nothing does */
static bool differs(const char *now, const char *then, char *why, size_t size)
{
    for (;;) {
        size_t a = strcspn(now, "\n"), b = strcspn(then, "\n");
        const char *line = a ? now : then;

        if (!a && !b) {
            return false;
        }
        if (a != b || memcmp(now, then, a)) {
            const char *name = strchr(strchr(line, ' ') + 1, ' ');

            if (!strncmp(line, "description", 11) || !name) {
                snprintf(why, size, "the description has changed");
            } else {
                snprintf(why, size, "%.*s has changed, or is none of its files "
                         "before", (int)strcspn(name + 1, "\n"), name + 1);
            }
            return true;
        }
        now += a + 1;
        then += b + 1;
    }
}

/*
 * Is FILE what the machine would be?
 *
 * Returns: the file; -1, with the reason in @why, which is empty if there is
 * nothing at all
 */
static int open_kept(struct snapshot_vm *vm, const char *text, char *why,
                     size_t size)
{
    int fd = open(vm->keep, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    int key_fd = open_key(vm, O_RDONLY);
    char *key = key_fd < 0 ? NULL : read_key(key_fd), *id = NULL;
    unsigned long long boot_ms = 0;
    struct stat st;
    bool good = false, known = fd >= 0 && !fstat(fd, &st);

    *why = 0;
    if (known && key) {
        id = identity(&st);
    }
    if (fd < 0) {
        if (errno != ENOENT) {
            snprintf(why, size, "%s", strerror(errno));
        }
    } else if (!known || !S_ISREG(st.st_mode) ||
               st.st_uid != geteuid() || (st.st_mode & 022)) {
        snprintf(why, size, "it is not a file that this user alone can write "
                 "to");
    } else if (!id) {
        snprintf(why, size, "%s.key does not tell what it is of", vm->keep);
    } else {
        const char *rest = key + strlen(KEY_BEGIN);

        if (strncmp(rest, id, strlen(id))) {
            snprintf(why, size, "it is not the one that %s.key tells of",
                     vm->keep);
        } else if (sscanf(rest + strlen(id), "%llu\n", &boot_ms) != 1) {
            snprintf(why, size, "%s.key is damaged", vm->keep);
        } else {
            rest = strchr(rest + strlen(id), '\n');
            good = rest && !differs(text, rest + 1, why, size);
        }
    }
    if (key_fd >= 0) {
        close(key_fd);
    }
    free(key);
    free(id);
    if (!good) {
        if (fd >= 0) {
            close(fd);
        }
        return -1;
    }
    vm->boot_ms = boot_ms;
    return fd;
}

int vm_keep_open(struct snapshot_vm *vm)
{
    char *text = vm->keep ? consists_of(vm) : NULL;
    char why[4200];
    int fd = -1;

    if (text) {
        fd = open_kept(vm, text, why, sizeof(why));
        if (fd < 0 && *why) {
            tell("%s is not used, the machine boots: %s", vm->keep, why);
        }
    }
    free(text);
    return fd;
}

void vm_keep_refused(struct snapshot_vm *vm)
{
    vm->refused_file = true;
    tell("the machine does not begin from %s, but boots: %s", vm->keep,
         snapshot_vm_error());
}

/* ----------------------------------------------------------------- export */

/* The next object in an array of such; strings may have anything in them. */
static char *next_object(char *p, char **end)
{
    char *begin = NULL;
    bool in_string = false;

    for (; *p; p++) {
        if (in_string && *p == '\\' && p[1]) {
            p++;
        } else if (*p == '"') {
            in_string = !in_string;
        } else if (!in_string && *p == '{') {
            begin = p;
        } else if (!in_string && *p == '}' && begin) {
            *end = p + 1;
            return begin;
        }
    }
    return NULL;
}

/* Returns: 1 if the job has ended well; 0 if it goes on; a negative error */
static int look_at_job(struct vm_monitor *m, const char *id)
{
    char *p, *end, *error;
    int ret = vm_monitor_execute(m, "query-jobs", NULL);

    if (ret) {
        return ret;
    }
    for (p = strchr(m->line, '['); p && (p = next_object(p, &end)); p = end) {
        char last = *end;
        bool is_it, concluded;

        *end = 0;
        is_it = strstr(p, id);
        concluded = strstr(p, "\"status\": \"concluded\"");
        error = strstr(p, "\"error\": \"");
        if (is_it && concluded && error) {
            error += strlen("\"error\": \"");
            return vm_fail(SNAPSHOT_VM_E_SYSTEM, "QEMU says: %.*s",
                           (int)strcspn(error, "\""), error);
        }
        if (is_it) {
            return concluded;
        }
        *end = last;
    }
    return vm_fail(SNAPSHOT_VM_E_SYSTEM, "QEMU has lost the job that writes "
                   "it");
}

/* Which slot does the guest wait in?  Returns: a negative error if unknown */
static int find_slot(struct vm_monitor *m)
{
    static const char name[] = "\"slot\": ";
    int ret = vm_monitor_execute(m, "x-query-snapshot-device", NULL);
    char *p, *saved = m->line;
    unsigned n = 0;

    if (ret) {
        return ret;
    }
    for (p = m->line; (p = strstr(p, name)); p += sizeof(name) - 1) {
        saved = p;
        n++;
    }
    return n == 1 ? atoi(saved + sizeof(name) - 1) :
        vm_fail(SNAPSHOT_VM_E_SYSTEM, "the guest has %u slots, and a file has "
                "one", n);
}

static int export_with(struct vm_monitor *m, const char *file)
{
    uint64_t end = vm_now_ms() + WAIT_KEEP;
    char id[48], *quoted = vm_monitor_quote(file), *arguments;
    int slot = find_slot(m), ret;

    snprintf(id, sizeof(id), "\"snapshot-vm-keep-%d\"", (int)getpid());
    if (slot < 0 || !quoted ||
        asprintf(&arguments, "\"job-id\": %s, \"slot\": %d, \"file\": %s", id,
                 slot, quoted) < 0) {
        free(quoted);
        return slot < 0 ? slot : vm_fail_system("cannot write", file);
    }
    ret = vm_monitor_execute(m, "x-snapshot-device-export", arguments);
    free(quoted);
    free(arguments);
    if (ret) {
        return ret;
    }
    while (!(ret = look_at_job(m, id)) && vm_now_ms() < end) {
        vm_sleep_ms(10);
    }
    if (asprintf(&arguments, "\"id\": %s", id) < 0) {
        return ret > 0 ? 0 : ret;
    }
    if (ret) {
        char *why = ret < 0 ? strdup(snapshot_vm_error()) : NULL;

        vm_monitor_execute(m, "job-dismiss", arguments);
        if (ret < 0) {
            vm_fail(-ret, "%s", why ? why : "out of memory");
        }
        free(why);
    } else {
        vm_monitor_execute(m, "job-cancel", arguments);
        ret = vm_fail(SNAPSHOT_VM_E_STUCK, "QEMU has not written it in %u s",
                      WAIT_KEEP / 1000);
    }
    free(arguments);
    return ret > 0 ? 0 : ret;
}

/*
 * Files that are being written, or are left by those that were killed while
 * they wrote: QEMU, and its user
 *
 * Returns: how many there are
 */
static size_t find_unfinished(const struct snapshot_vm *vm, bool remove)
{
    char *escaped = malloc(2 * strlen(vm->keep) + sizeof(".new.*"));
    const char *p = vm->keep;
    char *to = escaped;
    glob_t found;
    size_t i, n = 0;

    if (!escaped) {
        return 0;
    }
    for (; *p; *to++ = *p++) {
        if (strchr("*?[\\", *p)) {
            *to++ = '\\';
        }
    }
    strcpy(to, ".new.*");
    if (!glob(escaped, GLOB_NOSORT, NULL, &found)) {
        n = found.gl_pathc;
        for (i = 0; i < n && remove; i++) {
            unlink(found.gl_pathv[i]);
        }
        globfree(&found);
    }
    free(escaped);
    return n;
}

static int export_to(struct snapshot_vm *vm, const char *file)
{
    struct vm_monitor m;
    int ret = vm_monitor_open(&m, vm->directory);

    if (!ret) {
        ret = export_with(&m, file);
    }
    vm_monitor_close(&m);
    return ret;
}

/* Write both files; @fd is FILE.key, which is locked. */
static int write_kept(struct snapshot_vm *vm, int fd, const char *text)
{
    char *file = NULL, *id = NULL, *key = NULL;
    struct stat st;
    int n, ret;

    find_unfinished(vm, true);
    /* A name of its own: who was killed may have a job that goes on. */
    if (ftruncate(fd, 0) < 0 ||
        asprintf(&file, "%s.new.%d", vm->keep, (int)getpid()) < 0) {
        return vm_fail_system("cannot write", vm->keep);
    }
    ret = export_to(vm, file);
    if (!ret && find_unfinished(vm, false) > 1) {
        /* What it holds is in images beside it, which no -drive names. */
        ret = vm_fail(SNAPSHOT_VM_E_SYSTEM, "the guest has written to a disk "
                      "while it booted");
        find_unfinished(vm, true);
    }
    if (ret) {
        free(file);
        return ret;
    }
    id = stat(file, &st) < 0 ? NULL : identity(&st);
    n = !id ? -1 : asprintf(&key, "%s%s%llu\n%s", KEY_BEGIN, id,
                            (unsigned long long)vm->state->boot_ms, text);
    if (n < 0 || rename(file, vm->keep) < 0 || pwrite(fd, key, n, 0) != n) {
        ret = vm_fail_system("cannot write", vm->keep);
        unlink(file);
    }
    free(file);
    free(id);
    if (n >= 0) {
        free(key);
    }
    return ret;
}

void vm_keep_save(struct snapshot_vm *vm)
{
    struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    char *text = vm->keep && vm->state->keep ? consists_of(vm) : NULL;
    char why[4200];
    int fd, kept;

    if (!text) {
        return;
    }
    fd = open_key(vm, O_RDWR | O_CREAT);
    if (fd < 0) {
        tell("%s.key: %s: each start boots", vm->keep, strerror(errno));
    } else if (fcntl(fd, F_OFD_SETLK, &l) < 0) {
        /* Another instance writes it, which may be killed. */
        close(fd);
        free(text);
        return;
    } else if (hash_of(text) != vm->state->keep) {
        tell("%s is not written: since the machine was booted, what it "
             "consists of has changed", vm->keep);
    } else {
        /* Another instance may have written it meanwhile. */
        kept = vm->refused_file ? -1 : open_kept(vm, text, why, sizeof(why));
        if (kept >= 0) {
            close(kept);
        } else if (write_kept(vm, fd, text) < 0) {
            tell("%s is not written, each start boots: %s", vm->keep,
                 snapshot_vm_error());
        } else if (vm->began == SNAPSHOT_VM_BOOTED) {
            vm->began = SNAPSHOT_VM_KEPT;
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    vm->refused_file = false;
    vm->state->keep = 0;
    free(text);
}
