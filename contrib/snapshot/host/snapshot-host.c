/* SPDX-License-Identifier: MIT */
/*
 * Runs of a guest of "-device snapshot", for programs on the host
 *
 * Each instance of a description has a directory.  Three files in it say who
 * is there, by locks that end with their process (open file descriptions'):
 *
 *   lock      held by the program that has the machine
 *   daemon    held by the daemon, whose child QEMU is
 *   state     shared memory: the daemon tells of QEMU what it knows
 *
 * The daemon takes what QEMU and the guest's console print, into two rings of
 * a fixed size, and QEMU's exit status; it ends QEMU when nobody has used it
 * for a while.  If the daemon is killed, the kernel kills QEMU.
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "snapshot-host.h"

#define INSTANCES       SNAPSHOT_VM_INSTANCES
#define STATE_MAGIC     0x534e5032      /* changes with struct state */
#define RING_SIZE       (64 * 1024)
#define TAIL_LINES      12              /* of a console, in an error */

/* Limits of waits, in ms */
#define WAIT_SOCKET     30000           /* QEMU makes its sockets */
#define WAIT_HELLO      10000
#define WAIT_ANSWER     5000            /* more than a run's own limit */
#define WAIT_END        8000            /* the daemon ends */
#define WAIT_QUIT       5000            /* QEMU ends, on SIGTERM */
#define TICK            1000

/* The last bytes of an endless text */
struct ring {
    uint64_t written;
    char data[RING_SIZE];
};

struct state {
    uint32_t magic;
    int32_t daemon;
    int32_t qemu;
    int32_t user;
    int32_t ended;              /* QEMU has, with @status as of wait() */
    int32_t status;
    int32_t stop;               /* the daemon shall end QEMU */
    uint64_t description;       /* hash of its content */
    struct ring console;
    struct ring messages;
};

/* What the file says.  Memory is @text's but for args. */
struct description {
    char *path;                 /* canonical */
    char *text;
    uint64_t hash;
    const char *qemu;
    const char *device;
    const char *tcg;            /* options of tcg-coverage; NULL: none */
    uint64_t channel;
    uint64_t coverage;          /* bytes of tcg's map */
    uint64_t boot_ms;
    uint64_t host_ms;
    uint64_t guest_ms;
    uint64_t idle_s;
    bool serial;                /* the console is the first serial port */
    bool follow;                /* QEMU runs where its user does */
    char **args;
    size_t n_args;
};

struct snapshot_vm {
    struct description d;
    int instance;
    char directory[256];
    int lock;
    int fd;                     /* control */
    struct state *state;
    unsigned char *channel;
    size_t channel_size;
    unsigned char *map;         /* tcg's */
    struct snapshot_area areas[SNAPSHOT_REGIONS];
    bool ready;
    uint64_t limit_ms;          /* of the run; 0: none */
    /* The handler of a signal reads them. */
    volatile uint32_t id;
    volatile sig_atomic_t running;
    volatile sig_atomic_t cancelled;
};

static __thread char last_error[8192];
static __thread int last_code;

const char *snapshot_vm_error(void)
{
    return last_error;
}

int snapshot_vm_error_code(void)
{
    return last_code;
}

static int fail(int error, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static int fail(int error, const char *format, ...)
{
    va_list ap;

    va_start(ap, format);
    vsnprintf(last_error, sizeof(last_error), format, ap);
    va_end(ap);
    last_code = error;
    return -error;
}

static int fail_system(const char *what, const char *path)
{
    return fail(SNAPSHOT_VM_E_SYSTEM, "%s %s: %s", what, path,
                strerror(errno));
}

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}

static void sleep_ms(unsigned ms)
{
    struct timespec t = { ms / 1000, ms % 1000 * 1000000l };

    nanosleep(&t, NULL);
}

const char *snapshot_vm_result_name(uint32_t result)
{
    static const char *const names[] = {
        [SNAPSHOT_RESULT_OK] = "ok",
        [SNAPSHOT_RESULT_CRASH] = "crash",
        [SNAPSHOT_RESULT_SANITIZER] = "sanitizer",
        [SNAPSHOT_RESULT_HANG] = "hang",
        [SNAPSHOT_RESULT_STOP] = "stop",
        [SNAPSHOT_RESULT_INVALID] = "invalid",
    };

    return result < sizeof(names) / sizeof(names[0]) ? names[result]
                                                     : "unknown";
}

const char *snapshot_vm_cause_name(uint32_t cause)
{
    static const char *const names[] = {
        [SNAPSHOT_CAUSE_GUEST] = "the guest said so",
        [SNAPSHOT_CAUSE_PANIC] = "panic",
        [SNAPSHOT_CAUSE_RESET] = "reset or triple fault",
        [SNAPSHOT_CAUSE_SHUTDOWN] = "shutdown",
        [SNAPSHOT_CAUSE_STOPPED] = "stopped by QEMU",
        [SNAPSHOT_CAUSE_HOST_TIME] = "limit of host time",
        [SNAPSHOT_CAUSE_GUEST_TIME] = "limit of guest time",
        [SNAPSHOT_CAUSE_CANCELLED] = "cancelled",
    };

    return cause < sizeof(names) / sizeof(names[0]) ? names[cause]
                                                    : "unknown";
}

/* ------------------------------------------------------------ description */

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t len)
{
    const unsigned char *p = data;

    for (; len; len--) {
        hash = (hash ^ *p++) * 0x100000001b3ull;
    }
    return hash;
}

/* A number with K, M or G behind it, at least @min */
static bool parse_number(const char *s, uint64_t min, uint64_t *value)
{
    const char *end = s;
    unsigned shift = 0;

    for (*value = 0; isdigit(*end) && end - s < 18; end++) {
        *value = *value * 10 + (*end - '0');
    }
    switch (*end) {
    case 'G':
        shift += 10;
        /* fall through */
    case 'M':
        shift += 10;
        /* fall through */
    case 'K':
        shift += 10;
        end++;
    }
    if (!isdigit(*s) || *end || *value > UINT64_MAX >> shift) {
        return false;
    }
    *value <<= shift;
    return *value >= min;
}

static bool parse_word(const char *s, const char *yes, const char *no,
                       bool *value)
{
    *value = !strcmp(s, yes);
    return *value || !strcmp(s, no);
}

/* Returns: NULL, or what would be right */
static const char *parse_key(struct description *d, const char *key,
                             char *value)
{
    static const struct {
        const char *key;
        size_t offset;
        uint64_t min;
    } numbers[] = {
        { "channel", offsetof(struct description, channel), 64 * 1024 },
        { "map", offsetof(struct description, coverage), 4096 },
        { "boot", offsetof(struct description, boot_ms), 1 },
        { "timeout", offsetof(struct description, host_ms), 0 },
        { "guest-timeout", offsetof(struct description, guest_ms), 0 },
        { "idle", offsetof(struct description, idle_s), 0 },
    };
    size_t i;

    for (i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        if (!strcmp(key, numbers[i].key)) {
            uint64_t *n = (uint64_t *)((char *)d + numbers[i].offset);

            if (!parse_number(value, numbers[i].min, n)) {
                return "a number, with K, M or G behind it if need be";
            }
            return numbers[i].min > 1 && (*n & (*n - 1)) ? "a power of 2"
                                                         : NULL;
        }
    }
    if (!strcmp(key, "qemu")) {
        d->qemu = value;
        return *value ? NULL : "QEMU's program";
    }
    if (!strcmp(key, "device")) {
        d->device = value;
        return NULL;
    }
    if (!strcmp(key, "coverage")) {
        if (!strncmp(value, "tcg", 3) && (!value[3] || value[3] == ',')) {
            d->tcg = value + 3;
        } else if (strcmp(value, "guest")) {
            return "\"guest\" or \"tcg\", which options may follow";
        }
        return NULL;
    }
    if (!strcmp(key, "console")) {
        return parse_word(value, "serial", "other", &d->serial) ? NULL :
            "\"serial\" or \"other\"";
    }
    if (!strcmp(key, "affinity")) {
        return parse_word(value, "follow", "any", &d->follow) ? NULL :
            "\"follow\" or \"any\"";
    }
    return "one of qemu, device, channel, coverage, map, console, boot, "
        "timeout, guest-timeout, idle, affinity";
}

static char *trim(char *s)
{
    size_t len;

    while (isspace(*s)) {
        s++;
    }
    len = strlen(s);
    while (len && isspace(s[len - 1])) {
        s[--len] = 0;
    }
    return s;
}

/* One line: a comment, an option of QEMU's, or a key and its value */
static int parse_line(struct description *d, char *line, unsigned number)
{
    const char *wanted;
    char *value;

    line = trim(line);
    if (!*line || *line == '#') {
        return 0;
    }
    if (*line == '-') {
        value = line + strcspn(line, " \t");
        d->args[d->n_args++] = line;
        if (*value) {
            *value = 0;
            d->args[d->n_args++] = trim(value + 1);
        }
        return 0;
    }
    value = strchr(line, '=');
    if (!value) {
        return fail(SNAPSHOT_VM_E_DESCRIPTION, "%s:%u: \"%s\" is neither an "
                    "option of QEMU's, such as \"-m 512M\", nor \"key = "
                    "value\"", d->path, number, line);
    }
    *value = 0;
    line = trim(line);
    value = trim(value + 1);
    wanted = parse_key(d, line, value);
    if (wanted) {
        return fail(SNAPSHOT_VM_E_DESCRIPTION, "%s:%u: \"%s = %s\": must be "
                    "%s", d->path, number, line, value, wanted);
    }
    return 0;
}

static void description_free(struct description *d)
{
    free(d->path);
    free(d->text);
    free(d->args);
}

static int read_file(const char *path, char **text, size_t *len)
{
    FILE *f = fopen(path, "re");
    struct stat st;

    if (!f) {
        return fail_system("cannot open", path);
    }
    if (fstat(fileno(f), &st) < 0 || !S_ISREG(st.st_mode)) {
        fclose(f);
        return fail(SNAPSHOT_VM_E_DESCRIPTION, "%s is not a file", path);
    }
    *text = calloc(1, st.st_size + 1);
    if (!*text) {
        fclose(f);
        return fail_system("cannot read", path);
    }
    *len = fread(*text, 1, st.st_size, f);
    fclose(f);
    return 0;
}

static int description_load(struct description *d, const char *path)
{
    unsigned number = 0, lines = 1;
    char *line, *next;
    size_t len = 0, i;
    int ret;

    memset(d, 0, sizeof(*d));
    d->path = realpath(path, NULL);
    if (!d->path) {
        return fail_system("cannot find", path);
    }
    ret = read_file(d->path, &d->text, &len);
    if (ret) {
        return ret;
    }
    if (strlen(d->text) != len) {
        return fail(SNAPSHOT_VM_E_DESCRIPTION, "%s is not a text", d->path);
    }
    d->hash = hash_bytes(0xcbf29ce484222325ull, d->text, len);
    for (i = 0; i < len; i++) {
        lines += d->text[i] == '\n';
    }
    d->args = calloc(2 * lines, sizeof(*d->args));
    if (!d->args) {
        return fail_system("cannot read", d->path);
    }
    d->channel = 2 * 1024 * 1024;
    d->coverage = 64 * 1024;
    d->boot_ms = 120;
    d->host_ms = 1000;
    d->idle_s = 600;
    d->serial = true;
    d->follow = true;
    for (line = d->text; line; line = next) {
        next = strchr(line, '\n');
        if (next) {
            *next++ = 0;
        }
        ret = parse_line(d, line, ++number);
        if (ret) {
            return ret;
        }
    }
    d->boot_ms *= 1000;
    if (!d->qemu) {
        return fail(SNAPSHOT_VM_E_DESCRIPTION, "%s: no \"qemu = PROGRAM\"",
                    d->path);
    }
    return 0;
}

/* ------------------------------------------------------ directories, locks */

/* Make a directory that nobody else can write to. */
static int make_directory(const char *path)
{
    struct stat st;

    if (mkdir(path, 0700) < 0 && errno != EEXIST) {
        return fail_system("cannot make", path);
    }
    if (lstat(path, &st) < 0) {
        return fail_system("cannot look at", path);
    }
    if (!S_ISDIR(st.st_mode) || st.st_uid != geteuid() ||
        (st.st_mode & 077)) {
        return fail(SNAPSHOT_VM_E_SYSTEM, "%s is not a directory of this "
                    "user's alone: remove it, or set SNAPSHOT_VM_DIR to "
                    "another", path);
    }
    return 0;
}

/*
 * Where the machines of a description are: on a tmpfs, as the channel is
 * written to at each run.
 */
static int base_directory(const struct description *d, char *path, size_t size,
                          bool make)
{
    const char *env = getenv("SNAPSHOT_VM_DIR");
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    uint64_t id = hash_bytes(0xcbf29ce484222325ull, d->path, strlen(d->path));
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
        ret = make_directory(path);
    }
    if (!ret && n < (int)size) {
        n += snprintf(path + n, size - n, "/%.16s-%08x", name,
                      (unsigned)(id ^ id >> 32));
    }
    /* The sockets' names must fit as well. */
    if (n + sizeof("/1023/control") > sizeof(((struct sockaddr_un *)0)
                                             ->sun_path)) {
        return fail(SNAPSHOT_VM_E_SYSTEM, "\"%s\" is too long for a socket: "
                    "set SNAPSHOT_VM_DIR to a shorter directory", path);
    }
    return ret || (!make && access(path, F_OK)) ? ret : make_directory(path);
}

static void instance_path(const char *directory, const char *name, char *path,
                          size_t size)
{
    snprintf(path, size, "%s/%s", directory, name);
}

static struct flock lock_of(short type)
{
    return (struct flock) { .l_type = type, .l_whence = SEEK_SET };
}

/* Is the file locked?  A file that is not there is not. */
static bool is_locked(const char *directory, const char *name)
{
    struct flock l = lock_of(F_WRLCK);
    char path[300];
    bool locked;
    int fd;

    instance_path(directory, name, path, sizeof(path));
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    locked = !fcntl(fd, F_OFD_GETLK, &l) && l.l_type != F_UNLCK;
    close(fd);
    return locked;
}

/* Returns: the file, locked; a negative error, _E_BUSY if it is */
static int lock_file(const char *directory, const char *name)
{
    struct flock l = lock_of(F_WRLCK);
    char path[300];
    int fd;

    instance_path(directory, name, path, sizeof(path));
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) {
        return fail_system("cannot open", path);
    }
    if (fcntl(fd, F_OFD_SETLK, &l) < 0) {
        int error = errno;

        close(fd);
        errno = error;
        return error == EAGAIN || error == EACCES ?
            fail(SNAPSHOT_VM_E_BUSY, "%s is locked", path) :
            fail_system("cannot lock", path);
    }
    return fd;
}

static void *map_file(const char *directory, const char *name, size_t size,
                      bool make)
{
    char path[300];
    struct stat st;
    void *p;
    int fd;

    instance_path(directory, name, path, sizeof(path));
    fd = open(path, O_RDWR | O_CLOEXEC | (make ? O_CREAT : 0), 0600);
    if (fd < 0) {
        fail_system("cannot open", path);
        return NULL;
    }
    if (fstat(fd, &st) < 0 ||
        (make && (size_t)st.st_size != size && ftruncate(fd, size) < 0)) {
        fail_system("cannot make", path);
        close(fd);
        return NULL;
    }
    if (!make && (size_t)st.st_size < size) {
        fail(SNAPSHOT_VM_E_PROTOCOL, "%s has %zu bytes, not %zu", path,
             (size_t)st.st_size, size);
        close(fd);
        return NULL;
    }
    p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p == MAP_FAILED) {
        fail_system("cannot map", path);
        return NULL;
    }
    return p;
}

/* ----------------------------------------------------------------- daemon */

static void ring_write(struct ring *r, const char *data, size_t len)
{
    uint64_t at = r->written;
    size_t i;

    for (i = 0; i < len; i++) {
        r->data[(at + i) % RING_SIZE] = data[i];
    }
    __atomic_store_n(&r->written, at + len, __ATOMIC_RELEASE);
}

static size_t ring_read(const struct ring *r, char *buf, size_t size)
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

/* Let a process run on these CPUs, with all its threads. */
static void set_affinity(pid_t pid, const cpu_set_t *cpus)
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
        close_from(3);
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

static void watch_tick(struct watch *w)
{
    struct state *state = w->vm->state;
    uint64_t now = now_ms(), idle = w->vm->d.idle_s * 1000;
    bool used = is_locked(w->vm->directory, "lock");
    int status;

    if (waitpid(w->qemu, &status, WNOHANG) == w->qemu) {
        watch_end(w, status);
    }
    if (used) {
        w->used_at = now;
    } else if (w->vm->d.follow) {
        /* Fuzzers look for a CPU that nothing is bound to. */
        cpu_set_t cpus = all_cpus();

        set_affinity(w->qemu, &cpus);
    }
    if (w->quit_at && now > w->quit_at) {
        kill(w->qemu, SIGKILL);
    } else if (!w->quit_at &&
               (__atomic_load_n(&state->stop, __ATOMIC_ACQUIRE) ||
                (idle && now - w->used_at > idle))) {
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
static void become_daemon(struct snapshot_vm *vm, char **argv, int lock)
{
    struct watch w = { .vm = vm, .used_at = now_ms() };
    cpu_set_t cpus = all_cpus();
    int null, out[2], err[2];
    pid_t daemon;
    sigset_t set;
    int i;

    setsid();
    umask(077);
    prctl(PR_SET_NAME, "snapshot-vmd");
    if (lock != 3) {
        dup2(lock, 3);
    }
    close_from(4);
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (i = 0; i < 3; i++) {
        dup2(null, i);
    }
    fcntl(3, F_SETFD, FD_CLOEXEC);
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

/* --------------------------------------------------------- starting, ending */

/* The last lines of a ring, into the error's text */
static void tail(const struct ring *r, char *buf, size_t size)
{
    size_t n = ring_read(r, buf, size), lines = 0;
    char *p = buf + n;

    while (n && isspace(buf[n - 1])) {
        buf[--n] = 0;
    }
    for (p = buf + n; p > buf; p--) {
        if (p[-1] == '\n' && ++lines == TAIL_LINES) {
            break;
        }
    }
    memmove(buf, p, buf + n - p + 1);
}

static int fail_with_output(const struct snapshot_vm *vm, int error,
                            const char *what)
{
    char messages[2048], console[3072];

    tail(&vm->state->messages, messages, sizeof(messages));
    tail(&vm->state->console, console, sizeof(console));
    return fail(error, "%s%s%s%s%s", what,
                *messages ? "\nQEMU wrote:\n" : "", messages,
                *console ? "\nthe last lines of the guest's console:\n"
                         : "\nthe guest wrote nothing to its console",
                console);
}

/* Has QEMU ended, or will at once? */
static bool has_ended(const struct snapshot_vm *vm, unsigned ms)
{
    uint64_t end = now_ms() + ms;

    while (!__atomic_load_n(&vm->state->ended, __ATOMIC_ACQUIRE)) {
        if (!is_locked(vm->directory, "daemon")) {
            /* It was killed, and QEMU with it. */
            return true;
        }
        if (now_ms() >= end) {
            return false;
        }
        sleep_ms(2);
    }
    return true;
}

static int fail_ended(const struct snapshot_vm *vm, int error)
{
    const struct state *state = vm->state;
    char what[128];

    if (!state->ended) {
        return fail(error, "the daemon that looks after QEMU was killed");
    }
    if (WIFSIGNALED(state->status)) {
        snprintf(what, sizeof(what), "QEMU was ended by signal %d (%s)",
                 WTERMSIG(state->status), strsignal(WTERMSIG(state->status)));
    } else {
        snprintf(what, sizeof(what), "QEMU has ended, with exit status %d",
                 WEXITSTATUS(state->status));
    }
    return fail_with_output(vm, error, what);
}

/* ${instance} and ${directory} in an argument */
static char *expand(const struct snapshot_vm *vm, const char *arg)
{
    static const char instance[] = "${instance}", directory[] = "${directory}";
    size_t size = strlen(arg) + 1;
    const char *p;
    char *s, *to;

    for (p = arg; (p = strchr(p, '$')); p++) {
        size += sizeof(vm->directory);
    }
    s = to = malloc(size);
    for (p = arg; s && *p;) {
        if (!strncmp(p, instance, sizeof(instance) - 1)) {
            to += sprintf(to, "%d", vm->instance);
            p += sizeof(instance) - 1;
        } else if (!strncmp(p, directory, sizeof(directory) - 1)) {
            to += sprintf(to, "%s", vm->directory);
            p += sizeof(directory) - 1;
        } else {
            *to++ = *p++;
        }
    }
    if (s) {
        *to = 0;
    }
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

/* QEMU's command line.  Returns: NULL without memory */
static char **arguments(const struct snapshot_vm *vm)
{
    const struct description *d = &vm->d;
    const char *dir = vm->directory;
    char object[400], tcg[400], edges[400], control[400], qmp[400];
    char device[400];
    const char *const first[] = {
        d->qemu, "-display", "none", "-monitor", "none",
        "-object", object, "-chardev", control, "-chardev", qmp,
        "-mon", "chardev=snapshot-qmp,mode=control",
        "-chardev", "file,id=console,path=/proc/self/fd/1",
    };
    const char *const last[] = {
        "-device", device,
        "-serial", d->serial ? "chardev:console" : NULL,
    };
    const char *const map[] = { "-object", tcg, "-object", edges };
    const size_t n_first = sizeof(first) / sizeof(first[0]);
    const size_t n_last = d->serial ? 4 : 2, n_map = d->tcg ? 4 : 0;
    char **argv = calloc(n_first + d->n_args + n_last + n_map + 1,
                         sizeof(*argv));
    bool whole = true;
    size_t i, n = 0;

    if (!argv) {
        return NULL;
    }
    snprintf(object, sizeof(object), "memory-backend-file,share=on,"
             "id=snapshot-channel,size=%llu,mem-path=%s/channel",
             (unsigned long long)d->channel, dir);
    snprintf(control, sizeof(control), "socket,id=snapshot-control,server=on,"
             "wait=off,path=%s/control", dir);
    snprintf(qmp, sizeof(qmp), "socket,id=snapshot-qmp,server=on,wait=off,"
             "path=%s/qmp", dir);
    snprintf(device, sizeof(device), "snapshot,channel=snapshot-channel,"
             "control=snapshot-control%s%s",
             d->device && *d->device ? "," : "", d->device ? d->device : "");
    snprintf(tcg, sizeof(tcg), "memory-backend-file,share=on,"
             "id=snapshot-map,size=%llu,mem-path=%s/map",
             (unsigned long long)d->coverage, dir);
    snprintf(edges, sizeof(edges), "tcg-coverage,id=snapshot-edges,"
             "memdev=snapshot-map%s", d->tcg ? d->tcg : "");
    for (i = 0; i < n_first; i++) {
        argv[n++] = strdup(first[i]);
    }
    for (i = 0; i < n_map; i++) {
        argv[n++] = strdup(map[i]);
    }
    for (i = 0; i < d->n_args; i++) {
        argv[n++] = expand(vm, d->args[i]);
    }
    for (i = 0; i < n_last; i++) {
        argv[n++] = strdup(last[i]);
    }
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

static int start(struct snapshot_vm *vm)
{
    static const char *const stale[] = { "control", "qmp", "channel", "map" };
    struct state *state = vm->state;
    int lock, status;
    char path[300];
    char **argv;
    pid_t child;
    size_t i;

    lock = lock_file(vm->directory, "daemon");
    if (lock < 0) {
        return lock;
    }
    argv = arguments(vm);
    if (!argv) {
        close(lock);
        return fail_system("cannot start", vm->d.qemu);
    }
    for (i = 0; i < sizeof(stale) / sizeof(stale[0]); i++) {
        instance_path(vm->directory, stale[i], path, sizeof(path));
        unlink(path);
    }
    state->magic = STATE_MAGIC;
    state->daemon = state->qemu = 0;
    state->ended = state->status = state->stop = 0;
    state->console.written = state->messages.written = 0;
    state->description = vm->d.hash;
    child = fork();
    if (!child) {
        if (!fork()) {
            become_daemon(vm, argv, lock);
        }
        _exit(0);
    }
    if (child < 0) {
        fail_system("cannot start", vm->d.qemu);
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

/* Returns: 1 if one was ended, 0 if there was none */
static int end_daemon(const char *directory, struct state *state)
{
    uint64_t end = now_ms() + WAIT_END;
    int ended = 0;

    while (is_locked(directory, "daemon")) {
        pid_t daemon = __atomic_load_n(&state->daemon, __ATOMIC_ACQUIRE);

        ended = 1;
        __atomic_store_n(&state->stop, 1, __ATOMIC_RELEASE);
        if (now_ms() > end) {
            return fail(SNAPSHOT_VM_E_STUCK, "the daemon of %s, process %d, "
                        "does not end: kill it with SIGKILL", directory,
                        daemon);
        }
        if (daemon > 0) {
            kill(daemon, SIGTERM);
        }
        sleep_ms(20);
    }
    return ended;
}

/* ---------------------------------------------------------------- messages */

static int send_message(struct snapshot_vm *vm,
                        const struct snapshot_message *m)
{
    ssize_t n;

    do {
        n = send(vm->fd, m, sizeof(*m), MSG_NOSIGNAL);
    } while (n < 0 && errno == EINTR);
    return n == sizeof(*m) ? 0 : -1;
}

/* Returns: 1; 0 if there was no message for a second; a negative error */
static int receive(struct snapshot_vm *vm, struct snapshot_message *m)
{
    size_t have = 0;

    while (have < sizeof(*m)) {
        ssize_t n = read(vm->fd, (char *)m + have, sizeof(*m) - have);

        if (n > 0) {
            have += n;
        } else if (n < 0 && errno == EINTR) {
            continue;
        } else if (n < 0 && errno == EAGAIN) {
            if (!have) {
                return 0;
            }
        } else {
            vm->ready = false;
            return has_ended(vm, 3000) ?
                fail_ended(vm, SNAPSHOT_VM_E_DIED) :
                fail_with_output(vm, SNAPSHOT_VM_E_PROTOCOL, "the device has "
                                 "closed the connection");
        }
    }
    return 1;
}

static int set_ready(struct snapshot_vm *vm, const struct snapshot_message *m)
{
    const struct snapshot_area *areas[SNAPSHOT_REGIONS] = {
        [SNAPSHOT_REGION_INPUT] = &m->ready.input,
        [SNAPSHOT_REGION_COVERAGE] = &m->ready.coverage,
        [SNAPSHOT_REGION_TEXT] = &m->ready.text,
    };
    unsigned i;

    for (i = 0; i < SNAPSHOT_REGIONS; i++) {
        vm->areas[i].offset = le64toh(areas[i]->offset);
        vm->areas[i].size = le64toh(areas[i]->size);
        if (vm->areas[i].offset > vm->channel_size ||
            vm->areas[i].size > vm->channel_size - vm->areas[i].offset) {
            return fail(SNAPSHOT_VM_E_PROTOCOL, "READY has an area outside "
                        "the channel");
        }
    }
    vm->ready = true;
    return 0;
}

static int fail_reason(int error, const char *what, const char *const *reasons,
                       size_t n, uint32_t reason)
{
    return fail(error, "%s: %s", what,
                reason < n && reasons[reason] ? reasons[reason]
                                              : "an unknown reason");
}

static int fail_refused(const struct snapshot_message *m)
{
    static const char *const reasons[] = {
        [SNAPSHOT_REFUSED_TYPE] = "it does not know its type",
        [SNAPSHOT_REFUSED_HELLO] = "it wants HELLO first",
        [SNAPSHOT_REFUSED_VERSION] = "it speaks another version",
        [SNAPSHOT_REFUSED_NOT_READY] = "the guest is not READY",
        [SNAPSHOT_REFUSED_LENGTH] = "the input is too long",
        [SNAPSHOT_REFUSED_FLAGS] = "it does not know the flags",
    };
    uint32_t reason = le32toh(m->error.reason);

    return fail_reason(reason == SNAPSHOT_REFUSED_NOT_READY ?
                       SNAPSHOT_VM_E_ENDED : SNAPSHOT_VM_E_PROTOCOL,
                       "the device has refused a message", reasons,
                       sizeof(reasons) / sizeof(reasons[0]), reason);
}

static int fail_not_ready(const struct snapshot_message *m)
{
    static const char *const reasons[] = {
        [SNAPSHOT_ENDED_RESET] = "somebody has reset it",
        [SNAPSHOT_ENDED_RESTORED] = "somebody has restored a snapshot",
        [SNAPSHOT_ENDED_FAILED] = "it could not be put back; see QEMU's "
                                  "messages",
        [SNAPSHOT_ENDED_SAVED] = "its slot holds something else",
    };

    return fail_reason(SNAPSHOT_VM_E_ENDED, "the guest is not READY any more",
                       reasons, sizeof(reasons) / sizeof(reasons[0]),
                       le32toh(m->ended.reason));
}

static int wait_ready(struct snapshot_vm *vm)
{
    uint64_t end = now_ms() + vm->d.boot_ms;
    struct snapshot_message m;

    while (!vm->ready) {
        int ret = receive(vm, &m);

        if (ret < 0) {
            return ret;
        }
        if (ret && le32toh(m.type) == SNAPSHOT_MSG_READY) {
            ret = set_ready(vm, &m);
            if (ret) {
                return ret;
            }
        } else if (now_ms() > end) {
            char what[200];

            snprintf(what, sizeof(what), "the guest did not get READY in %llu "
                     "s (\"boot =\" in %.100s)",
                     (unsigned long long)vm->d.boot_ms / 1000, vm->d.path);
            return fail_with_output(vm, SNAPSHOT_VM_E_NOT_READY, what);
        }
    }
    return 0;
}

static int hello(struct snapshot_vm *vm)
{
    uint64_t end = now_ms() + WAIT_HELLO;
    struct snapshot_message m, reply = {
        .type = htole32(SNAPSHOT_MSG_HELLO),
        .hello = {
            .magic = htole32(SNAPSHOT_CONTROL_MAGIC),
            .version = htole32(SNAPSHOT_CONTROL_VERSION),
        },
    };
    int ret;

    while (!(ret = receive(vm, &m))) {
        if (now_ms() > end) {
            return fail(SNAPSHOT_VM_E_BUSY, "%s/control: no HELLO: another "
                        "program is connected to it, or QEMU hangs",
                        vm->directory);
        }
    }
    if (ret < 0) {
        return ret;
    }
    if (le32toh(m.type) != SNAPSHOT_MSG_HELLO ||
        le32toh(m.hello.magic) != SNAPSHOT_CONTROL_MAGIC) {
        return fail(SNAPSHOT_VM_E_PROTOCOL, "%s/control: not a snapshot "
                    "device", vm->directory);
    }
    if (le32toh(m.hello.version) != SNAPSHOT_CONTROL_VERSION) {
        return fail(SNAPSHOT_VM_E_PROTOCOL, "the device speaks version %u of "
                    "the protocol, this program version %u",
                    le32toh(m.hello.version), SNAPSHOT_CONTROL_VERSION);
    }
    vm->channel_size = le64toh(m.hello.channel);
    vm->channel = map_file(vm->directory, "channel", vm->channel_size, false);
    if (!vm->channel) {
        return -SNAPSHOT_VM_E_PROTOCOL;
    }
    if (vm->d.tcg) {
        vm->map = map_file(vm->directory, "map", vm->d.coverage, false);
        if (!vm->map) {
            return -SNAPSHOT_VM_E_PROTOCOL;
        }
    }
    return send_message(vm, &reply) ? fail_system("cannot write to",
                                                  vm->directory) : 0;
}

static int connect_control(struct snapshot_vm *vm)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    struct timeval tick = { .tv_sec = TICK / 1000 };
    uint64_t end = now_ms() + WAIT_SOCKET;

    snprintf(addr.sun_path, sizeof(addr.sun_path), "%.90s/control",
             vm->directory);
    for (;;) {
        vm->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (vm->fd < 0) {
            return fail_system("cannot connect to", addr.sun_path);
        }
        setsockopt(vm->fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof(tick));
        setsockopt(vm->fd, SOL_SOCKET, SO_SNDTIMEO, &tick, sizeof(tick));
        if (!connect(vm->fd, (struct sockaddr *)&addr, sizeof(addr))) {
            return hello(vm);
        }
        if (errno != ENOENT && errno != ECONNREFUSED && errno != EINTR &&
            errno != EAGAIN) {
            return fail_system("cannot connect to", addr.sun_path);
        }
        close(vm->fd);
        vm->fd = -1;
        if (has_ended(vm, 0)) {
            return fail_ended(vm, SNAPSHOT_VM_E_START);
        }
        if (now_ms() > end) {
            return fail_with_output(vm, SNAPSHOT_VM_E_STUCK, "QEMU does not "
                                    "open its sockets");
        }
        sleep_ms(5);
    }
}

static void disconnect(struct snapshot_vm *vm)
{
    vm->running = 0;
    vm->ready = false;
    if (vm->fd >= 0) {
        close(vm->fd);
        vm->fd = -1;
    }
    if (vm->channel) {
        munmap(vm->channel, vm->channel_size);
        vm->channel = NULL;
    }
    if (vm->map) {
        munmap(vm->map, vm->d.coverage);
        vm->map = NULL;
    }
}

static int attach(struct snapshot_vm *vm)
{
    int ret = connect_control(vm);

    if (!ret) {
        ret = wait_ready(vm);
    }
    if (ret == -SNAPSHOT_VM_E_DIED) {
        return fail_ended(vm, SNAPSHOT_VM_E_START);
    }
    if (!ret && vm->d.follow) {
        cpu_set_t cpus;

        if (!sched_getaffinity(0, sizeof(cpus), &cpus)) {
            set_affinity(vm->state->qemu, &cpus);
        }
    }
    return ret;
}

/* ------------------------------------------------------------------- open */

/* Take the instance's lock and map its state. */
static int take(struct snapshot_vm *vm, const char *base, int instance)
{
    int ret;

    vm->instance = instance;
    if ((size_t)snprintf(vm->directory, sizeof(vm->directory), "%s/%d", base,
                         instance) >= sizeof(vm->directory)) {
        return fail(SNAPSHOT_VM_E_SYSTEM, "%s: too long", base);
    }
    ret = make_directory(vm->directory);
    if (ret) {
        return ret;
    }
    vm->lock = lock_file(vm->directory, "lock");
    if (vm->lock < 0) {
        return vm->lock;
    }
    vm->state = map_file(vm->directory, "state", sizeof(*vm->state), true);
    if (!vm->state) {
        return -SNAPSHOT_VM_E_SYSTEM;
    }
    vm->state->user = getpid();
    return 0;
}

static void leave(struct snapshot_vm *vm)
{
    if (vm->state) {
        if (vm->lock >= 0) {
            vm->state->user = 0;
        }
        munmap(vm->state, sizeof(*vm->state));
        vm->state = NULL;
    }
    if (vm->lock >= 0) {
        close(vm->lock);
        vm->lock = -1;
    }
}

static bool exists(const char *base, int instance)
{
    char path[300];

    snprintf(path, sizeof(path), "%s/%d", base, instance);
    return !access(path, F_OK);
}

static bool usable(const struct snapshot_vm *vm)
{
    return vm->state->magic == STATE_MAGIC &&
        vm->state->description == vm->d.hash && !vm->state->ended &&
        !vm->state->stop && is_locked(vm->directory, "daemon");
}

/* The first free instance, preferably one that runs */
static int take_any(struct snapshot_vm *vm, const char *base)
{
    int i, ret;

    for (i = 0; i < INSTANCES && exists(base, i); i++) {
        ret = take(vm, base, i);
        if (!ret && usable(vm)) {
            return 0;
        }
        leave(vm);
        if (ret && ret != -SNAPSHOT_VM_E_BUSY) {
            return ret;
        }
    }
    for (i = 0; i < INSTANCES; i++) {
        ret = take(vm, base, i);
        if (ret != -SNAPSHOT_VM_E_BUSY) {
            return ret;
        }
        leave(vm);
    }
    return fail(SNAPSHOT_VM_E_BUSY, "all %d instances are in use", INSTANCES);
}

static int open_vm(struct snapshot_vm *vm, const char *path, int instance,
                   unsigned flags)
{
    char base[256];
    int ret = description_load(&vm->d, path);

    if (!ret) {
        ret = base_directory(&vm->d, base, sizeof(base), true);
    }
    if (ret) {
        return ret;
    }
    ret = instance < 0 ? take_any(vm, base) : take(vm, base, instance);
    if (ret == -SNAPSHOT_VM_E_BUSY && instance >= 0) {
        struct snapshot_vm_status status;

        snapshot_vm_status(path, instance, &status);
        return fail(SNAPSHOT_VM_E_BUSY, "instance %d of %s is in use by "
                    "process %d", instance, path, (int)status.user);
    }
    if (ret) {
        return ret;
    }
    if (!usable(vm) || (flags & SNAPSHOT_VM_FRESH)) {
        if (flags & SNAPSHOT_VM_ATTACH) {
            return fail(SNAPSHOT_VM_E_ABSENT, "instance %d of %s does not run",
                        vm->instance, path);
        }
        ret = end_daemon(vm->directory, vm->state);
        if (ret >= 0) {
            ret = start(vm);
        }
        if (ret < 0) {
            return ret;
        }
    }
    return attach(vm);
}

struct snapshot_vm *snapshot_vm_open(const char *description, int instance,
                                     unsigned flags)
{
    struct snapshot_vm *vm = calloc(1, sizeof(*vm));

    if (!vm || instance >= INSTANCES) {
        fail(SNAPSHOT_VM_E_SYSTEM, "no memory, or no such instance");
        free(vm);
        return NULL;
    }
    vm->lock = vm->fd = -1;
    if (open_vm(vm, description, instance, flags) < 0) {
        snapshot_vm_close(vm);
        return NULL;
    }
    return vm;
}

void snapshot_vm_close(struct snapshot_vm *vm)
{
    if (vm) {
        disconnect(vm);
        leave(vm);
        description_free(&vm->d);
        free(vm);
    }
}

int snapshot_vm_restart(struct snapshot_vm *vm)
{
    int ret;

    disconnect(vm);
    ret = end_daemon(vm->directory, vm->state);
    if (ret >= 0) {
        ret = start(vm);
    }
    return ret < 0 ? ret : attach(vm);
}

int snapshot_vm_status(const char *description, int instance,
                       struct snapshot_vm_status *status)
{
    struct description d;
    struct state *state;
    char base[256];
    int ret;

    memset(status, 0, sizeof(*status));
    status->instance = instance;
    memset(&d, 0, sizeof(d));
    d.path = realpath(description, NULL);
    if (!d.path) {
        return fail_system("cannot find", description);
    }
    ret = base_directory(&d, base, sizeof(base), false);
    free(d.path);
    if (ret || instance < 0 || !exists(base, instance)) {
        return ret;
    }
    snprintf(status->directory, sizeof(status->directory), "%.240s/%d", base,
             instance);
    state = map_file(status->directory, "state", sizeof(*state), false);
    if (!state) {
        return 1;
    }
    if (is_locked(status->directory, "daemon") &&
        state->magic == STATE_MAGIC) {
        status->daemon = state->daemon;
        status->qemu = state->ended ? 0 : state->qemu;
    }
    if (is_locked(status->directory, "lock")) {
        status->user = state->user;
    }
    munmap(state, sizeof(*state));
    return 1;
}

int snapshot_vm_stop(const char *description, int instance)
{
    int i = instance < 0 ? 0 : instance, n = 0, ret = 0;
    const int last = instance < 0 ? INSTANCES - 1 : instance;
    struct snapshot_vm_status status;

    for (; i <= last && ret >= 0; i++) {
        struct state *state;

        ret = snapshot_vm_status(description, i, &status);
        state = ret > 0 ? map_file(status.directory, "state", sizeof(*state),
                                   false) : NULL;
        if (state) {
            ret = end_daemon(status.directory, state);
            munmap(state, sizeof(*state));
            n += ret > 0;
        }
    }
    return ret < 0 ? ret : n;
}

/* -------------------------------------------------------------------- runs */

int snapshot_vm_instance(const struct snapshot_vm *vm)
{
    return vm->instance;
}

const char *snapshot_vm_directory(const struct snapshot_vm *vm)
{
    return vm->directory;
}

void snapshot_vm_limits(const struct snapshot_vm *vm,
                        struct snapshot_vm_limits *limits)
{
    limits->host_ns = vm->d.host_ms * 1000000;
    limits->guest_ns = vm->d.guest_ms * 1000000;
    limits->flags = 0;
}

unsigned char *snapshot_vm_input(struct snapshot_vm *vm, size_t *size)
{
    *size = vm->areas[SNAPSHOT_REGION_INPUT].size;
    return vm->channel + vm->areas[SNAPSHOT_REGION_INPUT].offset;
}

size_t snapshot_vm_coverage_size(const struct snapshot_vm *vm)
{
    return vm->map ? vm->d.coverage : vm->areas[SNAPSHOT_REGION_COVERAGE].size;
}

int snapshot_vm_fd(const struct snapshot_vm *vm)
{
    return vm->fd;
}

int snapshot_vm_begin(struct snapshot_vm *vm, size_t length,
                      const struct snapshot_vm_limits *limits)
{
    struct snapshot_message m = { .type = htole32(SNAPSHOT_MSG_RUN) };
    struct snapshot_vm_limits own;
    int ret;

    if (vm->fd < 0) {
        return fail(SNAPSHOT_VM_E_DIED, "QEMU has ended: call "
                    "snapshot_vm_restart()");
    }
    if (!vm->ready) {
        ret = wait_ready(vm);
        if (ret) {
            return ret;
        }
    }
    if (length > vm->areas[SNAPSHOT_REGION_INPUT].size) {
        return fail(SNAPSHOT_VM_E_LENGTH, "the input has %zu bytes, but the "
                    "guest takes %llu at most", length, (unsigned long long)
                    vm->areas[SNAPSHOT_REGION_INPUT].size);
    }
    if (!limits) {
        snapshot_vm_limits(vm, &own);
        limits = &own;
    }
    m.id = htole32(vm->id + 1);
    m.run.length = htole64(length);
    m.run.host_ns = htole64(limits->host_ns);
    m.run.guest_ns = htole64(limits->guest_ns);
    m.run.flags = htole32(limits->flags);
    vm->limit_ms = limits->flags & SNAPSHOT_RUN_STOPPED ? 0 :
        (limits->host_ns + 999999) / 1000000;
    vm->cancelled = 0;
    vm->id++;
    vm->running = 1;
    /* What is wrong with the connection, the end tells. */
    send_message(vm, &m);
    return 0;
}

void snapshot_vm_cancel(struct snapshot_vm *vm)
{
    struct snapshot_message m = {
        .type = htole32(SNAPSHOT_MSG_CANCEL),
        .id = htole32(vm->id),
    };
    int error = errno;

    if (vm->running) {
        vm->cancelled = 1;
        send(vm->fd, &m, sizeof(m), MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    errno = error;
}

static void set_result(struct snapshot_vm *vm, struct snapshot_vm_result *r,
                       const struct snapshot_message *m)
{
    const struct snapshot_area *coverage =
        &vm->areas[SNAPSHOT_REGION_COVERAGE];
    const struct snapshot_area *text = &vm->areas[SNAPSHOT_REGION_TEXT];
    uint64_t length = le64toh(m->result.text);

    r->result = le32toh(m->result.result);
    r->cause = le32toh(m->result.cause);
    r->host_ns = le64toh(m->result.host_ns);
    r->guest_ns = le64toh(m->result.guest_ns);
    r->coverage_size = snapshot_vm_coverage_size(vm);
    r->coverage = vm->map ? vm->map :
        r->coverage_size ? vm->channel + coverage->offset : NULL;
    r->text = length < text->size ? (char *)vm->channel + text->offset : "";
    r->text_length = length < text->size ? length : 0;
}

int snapshot_vm_end(struct snapshot_vm *vm, struct snapshot_vm_result *result)
{
    uint64_t waited = 0, since_cancel = 0;
    struct snapshot_message m;
    int ret;

    for (;;) {
        ret = receive(vm, &m);
        if (ret < 0) {
            vm->running = 0;
            if (ret == -SNAPSHOT_VM_E_DIED) {
                close(vm->fd);
                vm->fd = -1;
            }
            return ret;
        }
        if (!ret) {
            waited += TICK;
            since_cancel += vm->cancelled ? TICK : 0;
            if (vm->limit_ms && waited > vm->limit_ms + WAIT_ANSWER &&
                !vm->cancelled) {
                snapshot_vm_cancel(vm);
            } else if (since_cancel > WAIT_ANSWER) {
                vm->running = 0;
                return fail_with_output(vm, SNAPSHOT_VM_E_STUCK, "QEMU does "
                                        "not answer any more");
            }
            continue;
        }
        switch (le32toh(m.type)) {
        case SNAPSHOT_MSG_RESULT:
            if (le32toh(m.id) != vm->id) {
                continue;
            }
            vm->running = 0;
            set_result(vm, result, &m);
            if (result->result > SNAPSHOT_RESULT_INVALID) {
                return fail(SNAPSHOT_VM_E_PROTOCOL, "QEMU sends result %u, "
                            "which is none", (unsigned)result->result);
            }
            return result->result;
        case SNAPSHOT_MSG_ENDED:
            vm->running = 0;
            vm->ready = false;
            return fail_not_ready(&m);
        case SNAPSHOT_MSG_READY:
            ret = set_ready(vm, &m);
            if (ret) {
                return ret;
            }
            continue;
        case SNAPSHOT_MSG_ERROR:
            if (le32toh(m.id) != vm->id) {
                continue;
            }
            vm->running = 0;
            ret = fail_refused(&m);
            vm->ready = vm->ready && ret != -SNAPSHOT_VM_E_ENDED;
            return ret;
        default:
            vm->running = 0;
            return fail(SNAPSHOT_VM_E_PROTOCOL, "the device sent a message "
                        "of unknown type %u", le32toh(m.type));
        }
    }
}

int snapshot_vm_run(struct snapshot_vm *vm, size_t length,
                    const struct snapshot_vm_limits *limits,
                    struct snapshot_vm_result *result)
{
    int ret = snapshot_vm_begin(vm, length, limits);

    return ret ? ret : snapshot_vm_end(vm, result);
}

size_t snapshot_vm_console(const char *directory, int qemu, char *buf,
                           size_t size)
{
    struct state *state = map_file(directory, "state", sizeof(*state), false);
    size_t n;

    if (!state) {
        return 0;
    }
    n = ring_read(qemu ? &state->messages : &state->console, buf, size);
    munmap(state, sizeof(*state));
    return n;
}

size_t snapshot_vm_console_since(const char *directory, uint64_t *position,
                                 char *buf, size_t size)
{
    struct state *state = map_file(directory, "state", sizeof(*state), false);
    const struct ring *r;
    uint64_t end;
    size_t n = 0;

    if (!state) {
        return 0;
    }
    r = &state->console;
    end = __atomic_load_n(&r->written, __ATOMIC_ACQUIRE);
    if (*position > end) {
        *position = 0;              /* of a machine that was there before */
    }
    if (size && end > *position) {
        n = end - *position < size - 1 ? end - *position : size - 1;
        n = ring_read(r, buf, n + 1);
    } else if (size) {
        *buf = 0;
    }
    *position = end;
    munmap(state, sizeof(*state));
    return n;
}
