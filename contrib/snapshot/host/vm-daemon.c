/* SPDX-License-Identifier: MIT */
/*
 * The daemon that looks after QEMU: how it starts, what it does, how it ends
 *
 * It takes what QEMU and the guest's console print, into two rings of a fixed
 * size, and QEMU's exit status; it ends QEMU when nobody has used it for a
 * while.  If the daemon is killed, the kernel kills QEMU.
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vm-internal.h"

/* The daemon's lock and, for QEMU, the file it begins from */
#define LOCK_FD         3
#define LOAD_FD         4
#define LOAD_SET        1048575     /* no number of the user's own -add-fd */
#define TEXT_OF(x)      TEXT_OF_(x)
#define TEXT_OF_(x)     #x

static void ring_write(struct ring *r, const char *data, size_t len)
{
    uint64_t at = r->written;
    size_t i;

    for (i = 0; i < len; i++) {
        r->data[(at + i) % RING_SIZE] = data[i];
    }
    __atomic_store_n(&r->written, at + len, __ATOMIC_RELEASE);
}

size_t vm_ring_read(const struct ring *r, char *buf, size_t size)
{
    uint64_t end = __atomic_load_n(&r->written, __ATOMIC_ACQUIRE);
    uint64_t at = end < RING_SIZE ? 0 : end - RING_SIZE;
    size_t n = 0;

    if (!size) {
        return 0;
    }
    if (end - at > size - 1) {
        at = end - (size - 1);
    }
    while (at < end) {
        buf[n++] = r->data[at++ % RING_SIZE];
    }
    buf[n] = 0;
    return n;
}

/* Take what is there.  Returns: false at its end */
static bool ring_fill(struct ring *r, int fd)
{
    char buf[4096];
    ssize_t n;

    while ((n = read(fd, buf, sizeof(buf))) > 0) {
        ring_write(r, buf, n);
    }
    return n < 0 && (errno == EAGAIN || errno == EINTR);
}

static void close_from(int fd)
{
#ifdef SYS_close_range
    if (!syscall(SYS_close_range, fd, ~0u, 0)) {
        return;
    }
#endif
    for (; fd < 4096; fd++) {
        close(fd);
    }
}

void vm_set_affinity(pid_t pid, const cpu_set_t *cpus)
{
    char path[64];
    struct dirent *e;
    DIR *dir;

    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    dir = opendir(path);
    if (!dir) {
        return;
    }
    while ((e = readdir(dir))) {
        pid_t thread = atoi(e->d_name);

        if (thread > 0) {
            sched_setaffinity(thread, sizeof(*cpus), cpus);
        }
    }
    closedir(dir);
}

static cpu_set_t all_cpus(void)
{
    cpu_set_t cpus;

    memset(&cpus, 0xff, sizeof(cpus));
    return cpus;
}

static void become_qemu(const struct snapshot_vm *vm, char **argv,
                        pid_t daemon, int out, int err)
{
    char *slash;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != daemon) {
        _exit(127);
    }
    dup2(out, 1);
    dup2(err, 2);
    /* Paths in the description start where it lies. */
    slash = strrchr(vm->d.path, '/');
    *slash = 0;
    if (!chdir(*vm->d.path ? vm->d.path : "/")) {
        close(LOCK_FD);
        close_from(LOAD_FD + 1);
        execvp(argv[0], argv);
    }
    dprintf(2, "cannot start %s: %s\n", argv[0], strerror(errno));
    _exit(127);
}

struct watch {
    struct snapshot_vm *vm;
    pid_t qemu;
    int signals;
    int out, err;
    uint64_t quit_at;           /* when QEMU must have ended; 0: it need not */
    uint64_t used_at;
    uint32_t uses;              /* as of the last tick */
};

/* QEMU has ended: the last thing that the daemon tells */
static void watch_end(struct watch *w, int status)
{
    struct state *state = w->vm->state;

    ring_fill(&state->console, w->out);
    ring_fill(&state->messages, w->err);
    state->status = status;
    __atomic_store_n(&state->ended, 1, __ATOMIC_RELEASE);
    _exit(0);
}

/*
 * Nobody has used it for a while: end it.  Who opens it this moment has the
 * lock before he looks at what is said here, so that he sees it, or is seen.
 */
static void watch_idle(struct watch *w)
{
    struct state *state = w->vm->state;

    __atomic_store_n(&state->stop, 1, __ATOMIC_SEQ_CST);
    if (vm_is_locked(w->vm->directory, "lock")) {
        __atomic_store_n(&state->stop, 0, __ATOMIC_SEQ_CST);
    }
}

static void watch_tick(struct watch *w)
{
    struct state *state = w->vm->state;
    uint64_t now = vm_now_ms(), idle = w->vm->d.idle_s * 1000;
    uint32_t uses = __atomic_load_n(&state->uses, __ATOMIC_RELAXED);
    bool used = vm_is_locked(w->vm->directory, "lock") || uses != w->uses;
    int status;

    w->uses = uses;

    if (waitpid(w->qemu, &status, WNOHANG) == w->qemu) {
        watch_end(w, status);
    }
    if (used) {
        w->used_at = now;
    } else if (w->vm->d.follow) {
        /* Fuzzers look for a CPU that nothing is bound to. */
        cpu_set_t cpus = all_cpus();

        vm_set_affinity(w->qemu, &cpus);
    }
    if (!w->quit_at && idle && now - w->used_at > idle) {
        watch_idle(w);
    }
    if (w->quit_at && now > w->quit_at) {
        kill(w->qemu, SIGKILL);
    } else if (!w->quit_at &&
               __atomic_load_n(&state->stop, __ATOMIC_ACQUIRE)) {
        w->quit_at = now + WAIT_QUIT;
        kill(w->qemu, SIGTERM);
    }
}

static void watch(struct watch *w)
{
    struct state *state = w->vm->state;
    struct pollfd fds[] = {
        { .fd = w->signals, .events = POLLIN },
        { .fd = w->out, .events = POLLIN },
        { .fd = w->err, .events = POLLIN },
    };
    struct signalfd_siginfo info;

    for (;;) {
        poll(fds, 3, TICK);
        if (fds[0].revents) {
            while (read(w->signals, &info, sizeof(info)) > 0) {
                if (info.ssi_signo != SIGCHLD) {
                    __atomic_store_n(&state->stop, 1, __ATOMIC_RELEASE);
                }
            }
        }
        if (fds[1].revents && !ring_fill(&state->console, w->out)) {
            fds[1].fd = -1;
        }
        if (fds[2].revents && !ring_fill(&state->messages, w->err)) {
            fds[2].fd = -1;
        }
        watch_tick(w);
    }
}

/*
 * A process of its own, made by fork() alone: no program has to be found, and
 * only functions are called that may be in a child of a program with threads.
 */
static void become_daemon(struct snapshot_vm *vm, char **argv, int lock,
                          int file)
{
    struct watch w = { .vm = vm, .used_at = vm_now_ms() };
    cpu_set_t cpus = all_cpus();
    int null, out[2], err[2];
    pid_t daemon;
    sigset_t set;
    int i;

    setsid();
    umask(077);
    prctl(PR_SET_NAME, "snapshot-vmd");
    /* Neither may be in the other's place. */
    lock = fcntl(lock, F_DUPFD_CLOEXEC, LOAD_FD + 1);
    file = file < 0 ? -1 : fcntl(file, F_DUPFD_CLOEXEC, LOAD_FD + 1);
    dup2(lock, LOCK_FD);
    if (file >= 0) {
        dup2(file, LOAD_FD);
    } else {
        close(LOAD_FD);
    }
    close_from(LOAD_FD + 1);
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (i = 0; i < 3; i++) {
        dup2(null, i);
    }
    fcntl(LOCK_FD, F_SETFD, FD_CLOEXEC);
    for (i = 1; i < NSIG; i++) {
        signal(i, SIG_DFL);
    }
    sigemptyset(&set);
    sigprocmask(SIG_SETMASK, &set, NULL);
    if (!vm->d.follow) {
        sched_setaffinity(0, sizeof(cpus), &cpus);
    }
    daemon = getpid();
    if (null < 0 || pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0) {
        _exit(1);
    }
    w.qemu = fork();
    if (!w.qemu) {
        become_qemu(vm, argv, daemon, out[1], err[1]);
    }
    if (file >= 0) {
        close(LOAD_FD);
    }
    if (w.qemu < 0 || chdir("/") < 0) {
        _exit(1);
    }
    sched_setaffinity(0, sizeof(cpus), &cpus);
    close(out[1]);
    close(err[1]);
    w.out = out[0];
    w.err = err[0];
    fcntl(w.out, F_SETFL, O_NONBLOCK);
    fcntl(w.err, F_SETFL, O_NONBLOCK);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    w.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    vm->state->qemu = w.qemu;
    __atomic_store_n(&vm->state->daemon, daemon, __ATOMIC_RELEASE);
    watch(&w);
}

/* The last lines of a ring, into the error's text */
static void tail(const struct ring *r, char *buf, size_t size)
{
    size_t n = vm_ring_read(r, buf, size), lines = 0;
    char *p = buf + n;

    while (n && isspace((unsigned char)buf[n - 1])) {
        buf[--n] = 0;
    }
    for (p = buf + n; p > buf; p--) {
        if (p[-1] == '\n' && ++lines == TAIL_LINES) {
            break;
        }
    }
    memmove(buf, p, buf + n - p + 1);
}

static void with_output(const struct snapshot_vm *vm, const char *what,
                        char *text, size_t size)
{
    char messages[2048], console[3072];

    tail(&vm->state->messages, messages, sizeof(messages));
    tail(&vm->state->console, console, sizeof(console));
    snprintf(text, size, "%s%s%s%s%s", what,
             *messages ? "\nQEMU wrote:\n" : "", messages,
             *console ? "\nthe last lines of the guest's console:\n"
                      : "\nthe guest wrote nothing to its console", console);
}

int vm_fail_with_output(const struct snapshot_vm *vm, int error,
                        const char *what)
{
    char text[6144];

    with_output(vm, what, text, sizeof(text));
    return vm_fail(error, "%s", text);
}

void vm_tell_output(const struct snapshot_vm *vm, const char *what)
{
    char text[6144];

    with_output(vm, what, text, sizeof(text));
    vm_tell(text);
}

bool vm_has_ended(const struct snapshot_vm *vm, unsigned ms)
{
    uint64_t end = vm_now_ms() + ms;

    while (!__atomic_load_n(&vm->state->ended, __ATOMIC_ACQUIRE)) {
        if (!vm_is_locked(vm->directory, "daemon")) {
            /* It was killed, and QEMU with it. */
            return true;
        }
        if (vm_now_ms() >= end) {
            return false;
        }
        vm_sleep_ms(2);
    }
    return true;
}

int vm_fail_ended(const struct snapshot_vm *vm, int error)
{
    const struct state *state = vm->state;
    char what[128];

    if (!state->ended) {
        return vm_fail(error, "the daemon that looks after QEMU was killed");
    }
    if (WIFSIGNALED(state->status)) {
        snprintf(what, sizeof(what), "QEMU was ended by signal %d (%s)",
                 WTERMSIG(state->status), strsignal(WTERMSIG(state->status)));
    } else {
        snprintf(what, sizeof(what), "QEMU has ended, with exit status %d",
                 WEXITSTATUS(state->status));
    }
    return vm_fail_with_output(vm, error, what);
}

/* A value in an option of QEMU's: commas are doubled */
static char *escape(const char *value)
{
    char *s = malloc(2 * strlen(value) + 1), *to = s;

    while (s && (*to++ = *value)) {
        if (*value++ == ',') {
            *to++ = ',';
        }
    }
    return s;
}

/* ${instance} and ${directory} in an argument */
char *vm_expand(const struct snapshot_vm *vm, const char *arg)
{
    static const char instance[] = "${instance}", directory[] = "${directory}";
    char *escaped = escape(vm->directory);
    size_t size = strlen(arg) + 1;
    const char *p;
    char *s, *to;

    for (p = arg; (p = strchr(p, '$')); p++) {
        size += 2 * sizeof(vm->directory);
    }
    s = to = escaped ? malloc(size) : NULL;
    for (p = arg; s && *p;) {
        if (!strncmp(p, instance, sizeof(instance) - 1)) {
            to += sprintf(to, "%d", vm->instance);
            p += sizeof(instance) - 1;
        } else if (!strncmp(p, directory, sizeof(directory) - 1)) {
            to += sprintf(to, "%s", p > arg && p[-1] == '=' ? escaped :
                          vm->directory);
            p += sizeof(directory) - 1;
        } else {
            *to++ = *p++;
        }
    }
    if (s) {
        *to = 0;
    }
    free(escaped);
    return s;
}

static void free_arguments(char **argv)
{
    char **p;

    for (p = argv; p && *p; p++) {
        free(*p);
    }
    free(argv);
}

static char *format(const char *f, ...) __attribute__((format(printf, 1, 2)));

static char *format(const char *f, ...)
{
    va_list ap;
    char *s;
    int n;

    va_start(ap, f);
    n = vasprintf(&s, f, ap);
    va_end(ap);
    return n < 0 ? NULL : s;
}

/* QEMU's command line.  Returns: NULL without memory */
static char **arguments(const struct snapshot_vm *vm, bool load)
{
    const struct description *d = &vm->d;
    char **argv = calloc(d->n_args + 32, sizeof(*argv));
    char *dir = escape(vm->directory);
    const char *more = d->device && *d->device ? "," : "";
    size_t i, n = 0;
    bool whole = true;

    if (!argv || !dir) {
        free(argv);
        free(dir);
        return NULL;
    }
    argv[n++] = strdup(d->qemu);
    argv[n++] = strdup("-display");
    argv[n++] = strdup("none");
    argv[n++] = strdup("-monitor");
    argv[n++] = strdup("none");
    argv[n++] = strdup("-object");
    argv[n++] = format("memory-backend-file,share=on,id=snapshot-channel,"
                       "size=%llu,mem-path=%s/channel",
                       (unsigned long long)d->channel, dir);
    argv[n++] = strdup("-chardev");
    argv[n++] = format("socket,id=snapshot-control,server=on,wait=off,"
                       "path=%s/control", dir);
    argv[n++] = strdup("-chardev");
    argv[n++] = format("socket,id=snapshot-qmp,server=on,wait=off,path=%s/qmp",
                       dir);
    argv[n++] = strdup("-mon");
    argv[n++] = strdup("chardev=snapshot-qmp,mode=control");
    argv[n++] = strdup("-chardev");
    argv[n++] = strdup("file,id=console,path=/proc/self/fd/1");
    if (d->tcg) {
        argv[n++] = strdup("-object");
        argv[n++] = format("memory-backend-file,share=on,id=snapshot-map,"
                           "size=%llu,mem-path=%s/map",
                           (unsigned long long)d->coverage, dir);
        argv[n++] = strdup("-object");
        argv[n++] = format("tcg-coverage,id=snapshot-edges,"
                           "memdev=snapshot-map%s", d->tcg);
    }
    for (i = 0; i < d->n_args; i++) {
        argv[n++] = vm_expand(vm, d->args[i]);
    }
    if (load) {
        argv[n++] = strdup("-add-fd");
        argv[n++] = format("fd=%d,set=%d,opaque=keep", LOAD_FD, LOAD_SET);
    }
    argv[n++] = strdup("-device");
    argv[n++] = format("snapshot,channel=snapshot-channel,"
                       "control=snapshot-control%s%s%s", more,
                       d->device ? d->device : "",
                       load ? ",load=/dev/fdset/" TEXT_OF(LOAD_SET) : "");
    if (d->serial) {
        argv[n++] = strdup("-serial");
        argv[n++] = strdup("chardev:console");
    }
    free(dir);
    for (i = 0; i < n; i++) {
        whole = whole && argv[i];
    }
    if (!whole) {
        for (i = 0; i < n; i++) {
            free(argv[i]);
        }
        free(argv);
        return NULL;
    }
    return argv;
}

/* What QEMU will map.  Sockets of one before are in the way of its own. */
static int make_files(const struct snapshot_vm *vm)
{
    static const char *const stale[] = { "control", "qmp", "map" };
    char path[VM_PATH];
    size_t i;
    int ret;

    for (i = 0; i < sizeof(stale) / sizeof(stale[0]); i++) {
        vm_path(vm->directory, stale[i], path, sizeof(path));
        unlink(path);
    }
    ret = vm_new_file(vm->directory, "channel", vm->d.channel);
    if (!ret && vm->d.tcg) {
        ret = vm_new_file(vm->directory, "map", vm->d.coverage);
    }
    return ret;
}

int vm_start(struct snapshot_vm *vm, int file)
{
    struct state *state = vm->state;
    int lock, status, ret;
    char **argv;
    pid_t child;

    lock = vm_lock_file(vm->directory, "daemon");
    if (lock < 0) {
        return lock;
    }
    ret = make_files(vm);
    if (ret) {
        close(lock);
        return ret;
    }
    argv = arguments(vm, file >= 0);
    if (!argv) {
        close(lock);
        return vm_fail_system("cannot start", vm->d.qemu);
    }
    state->magic = STATE_MAGIC;
    state->daemon = state->qemu = 0;
    state->ended = state->status = state->stop = state->answers = 0;
    state->console.written = state->messages.written = 0;
    state->description = vm->d.hash;
    state->keep = state->boot_ms = 0;
    child = fork();
    if (!child) {
        if (!fork()) {
            become_daemon(vm, argv, lock, file);
        }
        _exit(0);
    }
    if (child < 0) {
        vm_fail_system("cannot start", vm->d.qemu);
    } else {
        while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
            /* again */
        }
    }
    /* The daemon has the lock. */
    close(lock);
    free_arguments(argv);
    return child < 0 ? -SNAPSHOT_VM_E_SYSTEM : 0;
}

int vm_end_daemon(const char *directory, struct state *state)
{
    uint64_t end = vm_now_ms() + WAIT_END;
    int ended = 0;

    while (vm_is_locked(directory, "daemon")) {
        pid_t daemon = __atomic_load_n(&state->daemon, __ATOMIC_ACQUIRE);

        ended = 1;
        __atomic_store_n(&state->stop, 1, __ATOMIC_RELEASE);
        if (vm_now_ms() > end) {
            return vm_fail(SNAPSHOT_VM_E_STUCK, "the daemon of %s, process %d, "
                           "does not end: kill it with SIGKILL", directory,
                           daemon);
        }
        if (daemon > 0) {
            kill(daemon, SIGTERM);
        }
        vm_sleep_ms(20);
    }
    return ended;
}
