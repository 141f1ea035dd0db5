/* SPDX-License-Identifier: MIT */
/*
 * A machine as a target of AFL++: a fork server whose children are runs
 *
 *     afl-fuzz -i in -o out -- afl-snapshot VM
 *     afl-snapshot VM <input             one run, without a fuzzer
 *
 * VM is a description (README.rst).  What AFL++ expects of a target, in short:
 * it writes a word to file 199 and, for each word that it reads from file 198,
 * a process and the status that wait() would return for it.  The process here
 * is one that waits until the fuzzer kills it, or has gone: the run is then
 * cancelled, and the next word gets another.
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "snapshot-host.h"

#define FROM_FUZZER     198
#define TO_FUZZER       199

/* The first word, until AFL++ 4.20, and accepted ever after */
#define OLD_HELLO       0x80000001u
#define OLD_MAP         0x40000000u
#define OLD_MAP_MAX     (8u << 20)
#define OLD_INPUT       0x01000000u
#define OLD_FAILED      0xf800008fu     /* | reason << 8 */
#define OLD_FAILED_SIZE 0x00000100u

/* ... and since then */
#define NEW_HELLO       0x41464c01u
#define NEW_MAP         1u
#define NEW_INPUT       2u

#define LOG_MAX         (4 << 20)

/* How long a run that the guest's own limit has ended waits to be killed */
#define KILL_WAIT_MS    60000

static struct snapshot_vm *vm;
static const char *description, *input_file;
static char log_path[PATH_MAX];
static unsigned char *map;
static size_t map_size;
static const unsigned char *shared_input;
static size_t shared_size;

static volatile sig_atomic_t dummy;     /* 0: none lives */
static volatile sig_atomic_t dummy_status;

/*
 * AFL++ leads a target's output to /dev/null.  What is said goes to a file
 * beside the machine's, too.
 */
static void tell(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void tell(const char *format, ...)
{
    time_t now = time(NULL);
    struct stat st;
    struct tm tm;
    char when[32];
    va_list ap;
    FILE *f;
    int fd;

    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fputc('\n', stderr);
    if (!*log_path) {
        return;
    }
    if (!lstat(log_path, &st) && st.st_size > LOG_MAX) {
        char old[PATH_MAX + 4];

        snprintf(old, sizeof(old), "%s.old", log_path);
        rename(log_path, old);
    }
    fd = open(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC |
              O_NOFOLLOW | O_NONBLOCK, 0600);
    f = fd < 0 ? NULL : fdopen(fd, "a");
    if (!f) {
        return;
    }
    localtime_r(&now, &tm);
    strftime(when, sizeof(when), "%F %T ", &tm);
    fputs(when, f);
    va_start(ap, format);
    vfprintf(f, format, ap);
    va_end(ap);
    fputc('\n', f);
    fclose(f);
}

static pid_t parent_of(pid_t pid)
{
    char path[64], text[512];
    const char *end;
    ssize_t n;
    int fd, parent;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return 0;
    }
    n = read(fd, text, sizeof(text) - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    /* Its name, in brackets, may have any character. */
    end = strrchr(text, ')');
    return end && sscanf(end, ") %*c %d", &parent) == 1 ? parent : 0;
}

/* Has it the end of this pipe that is read from? */
static bool reads_from(pid_t pid, const struct stat *pipe)
{
    char path[320];
    struct dirent *e;
    struct stat st, link;
    bool found = false;
    DIR *dir;

    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    dir = opendir(path);
    while (dir && !found && (e = readdir(dir))) {
        snprintf(path, sizeof(path), "/proc/%d/fd/%s", (int)pid, e->d_name);
        found = !stat(path, &st) && st.st_dev == pipe->st_dev &&
            st.st_ino == pipe->st_ino && !lstat(path, &link) &&
            (link.st_mode & S_IRUSR);
    }
    if (dir) {
        closedir(dir);
    }
    return found;
}

/*
 * Who reads what is written to it: a script, or a debugger, may be between us
 * and the fuzzer.  Returns: 0 if that is none of those that we descend from
 */
static pid_t fuzzer(void)
{
    struct stat pipe;
    pid_t pid = fstat(TO_FUZZER, &pipe) < 0 ? 0 : getppid();

    while (pid > 0 && !reads_from(pid, &pipe)) {
        pid = parent_of(pid);
    }
    return pid;
}

/*
 * What the user has to know now is told where the fuzzer tells things, who has
 * led our own output to /dev/null.
 */
static void tell_user(const char *text)
{
    pid_t pid = fuzzer();
    char path[64];
    int fd;

    tell("afl-snapshot: %s", text);
    snprintf(path, sizeof(path), "/proc/%d/fd/2", (int)pid);
    /* Not if it is a pipe that nobody reads. */
    fd = pid <= 0 ? -1 :
        open(path, O_WRONLY | O_APPEND | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd >= 0) {
        dprintf(fd, "\nafl-snapshot: %s\n", text);
        close(fd);
    }
}

static void open_machine(void)
{
    vm = snapshot_vm_open(description, -1, 0);
    if (!vm) {
        tell_user(snapshot_vm_error());
        exit(1);
    }
    snprintf(log_path, sizeof(log_path), "%s/log", snapshot_vm_directory(vm));
}

static bool put(uint32_t word)
{
    return write(TO_FUZZER, &word, sizeof(word)) == sizeof(word);
}

static bool get(uint32_t *word)
{
    ssize_t n;

    do {
        n = read(FROM_FUZZER, word, sizeof(*word));
    } while (n < 0 && errno == EINTR);
    return n == sizeof(*word);
}

/* ------------------------------------------------------------ shared memory */

/* A number of System V's, or a name of POSIX's */
static void *attach(const char *variable, size_t *size)
{
    const char *name = getenv(variable);
    struct shmid_ds ds;
    struct stat st;
    void *p;
    int fd;

    if (!name || !*name) {
        return NULL;
    }
    if (*name != '/') {
        int id = atoi(name);

        p = shmat(id, NULL, 0);
        if (p == (void *)-1 || shmctl(id, IPC_STAT, &ds) < 0) {
            tell("cannot attach to %s=%s: %s", variable, name,
                 strerror(errno));
            exit(1);
        }
        *size = ds.shm_segsz;
        return p;
    }
    fd = shm_open(name, O_RDWR, 0600);
    if (fd < 0 || fstat(fd, &st) < 0) {
        tell("cannot open %s=%s: %s", variable, name, strerror(errno));
        exit(1);
    }
    *size = st.st_size;
    p = mmap(NULL, *size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p == MAP_FAILED) {
        tell("cannot map %s=%s: %s", variable, name, strerror(errno));
        exit(1);
    }
    return p;
}

/* ------------------------------------------------- the process to be killed */

static void on_child(int signal)
{
    int error = errno, status;
    pid_t pid = dummy;

    (void)signal;
    if (pid && waitpid(pid, &status, WNOHANG) == pid) {
        dummy = 0;
        dummy_status = status;
        snapshot_vm_cancel(vm);
    }
    errno = error;
}

static void need_dummy(void)
{
    sigset_t set, old;
    pid_t parent = getpid(), pid;

    if (dummy) {
        return;
    }
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, &old);
    pid = fork();
    if (!pid) {
        struct pollfd gone = { .fd = 0 };

        /*
         * It must not hold the machine's lock.  If the fuzzer ends without a
         * word, it ends as well, and so the run that it stands for.
         */
        dup2(FROM_FUZZER, gone.fd);
        closefrom(1);
        signal(SIGTERM, SIG_DFL);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        sigprocmask(SIG_SETMASK, &old, NULL);
        while (getppid() == parent && poll(&gone, 1, -1) < 0) {
            /* a signal */
        }
        _exit(1);
    }
    if (pid < 0) {
        tell("cannot fork: %s", strerror(errno));
        exit(1);
    }
    dummy = pid;
    sigprocmask(SIG_SETMASK, &old, NULL);
}

/*
 * The fuzzer has killed it, when its run had ended already: its end, which may
 * be still to come, is not the next run's.
 */
static void drop_dummy(void)
{
    sigset_t set, old;

    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, &old);
    if (dummy) {
        kill(dummy, SIGKILL);
        while (waitpid(dummy, NULL, 0) < 0 && errno == EINTR) {
            /* again */
        }
        dummy = 0;
    }
    sigprocmask(SIG_SETMASK, &old, NULL);
}

/* Wait until the fuzzer kills it. */
static int wait_for_kill(void)
{
    int waited;

    for (waited = 0; dummy && waited < KILL_WAIT_MS; waited += 100) {
        struct timespec t = { 0, 100 * 1000000l };

        nanosleep(&t, NULL);        /* SIGCHLD ends it */
    }
    return dummy ? SIGALRM : dummy_status;
}

/* As the user would end it */
static void end_campaign(void)
{
    pid_t pid = fuzzer();

    if (pid > 0) {
        kill(pid, SIGINT);
    } else {
        tell("the guest asks for the campaign's end, but no process that this "
             "one descends from is the fuzzer: it goes on");
    }
}

/* --------------------------------------------------------------------- runs */

/* Returns: false without a machine for it */
static bool load(size_t *len)
{
    static bool told;
    size_t size, length;
    unsigned char *input = snapshot_vm_input(vm, &size);

    if (!input) {
        return false;
    }
    if (shared_input) {
        uint32_t n;

        memcpy(&n, shared_input, sizeof(n));
        length = n <= shared_size - sizeof(n) ? n : shared_size - sizeof(n);
        memcpy(input, shared_input + sizeof(n), length < size ? length : size);
    } else {
        int fd = input_file ? open(input_file, O_RDONLY | O_CLOEXEC) : 0;
        unsigned char more;
        ssize_t n;

        if (fd < 0) {
            tell("cannot open %s: %s", input_file, strerror(errno));
            exit(1);
        }
        length = 0;
        while (length < size &&
               ((n = pread(fd, input + length, size - length, length)) > 0 ||
                (n < 0 && errno == ESPIPE &&
                 (n = read(fd, input + length, size - length)) > 0))) {
            length += n;
        }
        length += length == size && pread(fd, &more, 1, size) > 0;
        if (input_file) {
            close(fd);
        }
    }
    if (length > size) {
        if (!told) {
            tell("inputs are cut to the %zu bytes that the guest takes: give "
                 "afl-fuzz -G %zu", size, size);
        }
        told = true;
        length = size;
    }
    *len = length;
    return true;
}

/*
 * How a run ended, as a wait status.  AFL++ puts the signal into a crash
 * file's name (sig:NN).
 */
static int status_of(const struct snapshot_vm_result *r)
{
    static const int signals[] = {
        [SNAPSHOT_CAUSE_GUEST] = SIGSEGV,
        [SNAPSHOT_CAUSE_PANIC] = SIGBUS,
        [SNAPSHOT_CAUSE_RESET] = SIGILL,
        [SNAPSHOT_CAUSE_SHUTDOWN] = SIGFPE,
        [SNAPSHOT_CAUSE_STOPPED] = SIGTRAP,
    };

    switch (r->result) {
    case SNAPSHOT_RESULT_OK:
    case SNAPSHOT_RESULT_STOP:
        return 0;
    case SNAPSHOT_RESULT_CRASH:
        return r->cause < sizeof(signals) / sizeof(signals[0]) ?
            signals[r->cause] : SIGSEGV;
    case SNAPSHOT_RESULT_SANITIZER:
        return SIGABRT;
    case SNAPSHOT_RESULT_HANG:
        return SIGALRM;
    default:
        return 1 << 8;
    }
}

/* What an input is known by in the log */
static uint32_t hash(const unsigned char *p, size_t len)
{
    uint32_t h = 0x811c9dc5;

    for (; len; len--) {
        h = (h ^ *p++) * 0x01000193;
    }
    return h;
}

static void tell_run(const struct snapshot_vm_result *r, size_t length)
{
    static char console[64 * 1024];
    size_t size;
    const unsigned char *input = snapshot_vm_input(vm, &size);
    const char *last = "";

    if (r->result == SNAPSHOT_RESULT_CRASH &&
        r->cause != SNAPSHOT_CAUSE_GUEST) {
        /* A kernel's last words take their way through the daemon. */
        usleep(20000);
        size = snapshot_vm_console(snapshot_vm_directory(vm), 0, console,
                                   sizeof(console));
        last = console + (size > 2000 ? size - 2000 : 0);
    }
    tell("%s (%s), input of %zu bytes, hash %08x%s%.*s%s%s",
         snapshot_vm_result_name(r->result), snapshot_vm_cause_name(r->cause),
         length, hash(input, length), r->text_length ? ": " : "",
         (int)r->text_length, r->text, *last ? "\n" : "", last);
}

/* QEMU has ended, or hangs: the next run has a new one. */
static void revive(void)
{
    tell("%s; starting it anew", snapshot_vm_error());
    if (snapshot_vm_restart(vm) < 0) {
        tell_user(snapshot_vm_error());
        exit(1);
    }
}

/* A guest whose map stays empty is told of once: AFL++ only says "no". */
static void check_coverage(const struct snapshot_vm_result *r)
{
    static bool checked;
    size_t i;

    if (checked || r->result != SNAPSHOT_RESULT_OK) {
        return;
    }
    checked = true;
    for (i = 0; i < r->coverage_size; i++) {
        if (r->coverage[i]) {
            return;
        }
    }
    if (r->coverage_size) {
        tell_user("the first run has left its coverage empty: the guest does "
                  "not fill the region that it registered, or nothing that is "
                  "counted was executed");
    }
}

static void run(bool *again, int *status)
{
    static struct snapshot_vm_limits limits;
    struct snapshot_vm_result r;
    size_t length;
    int ret;

    *again = false;
    if (!load(&length)) {
        revive();
        *again = true;
        return;
    }
    snapshot_vm_limits(vm, &limits);
    if (getenv("__AFL_SHM_ID")) {
        /* The fuzzer has a limit of its own. */
        limits.host_ns = 0;
    }
    ret = snapshot_vm_begin(vm, length, &limits);
    if (!ret) {
        if (!dummy && dummy_status) {
            snapshot_vm_cancel(vm);
        }
        ret = snapshot_vm_end(vm, &r);
    }
    if (ret == -SNAPSHOT_VM_E_ENDED) {
        tell("%s", snapshot_vm_error());
        *again = true;
    } else if (ret < 0) {
        revive();
        *status = SIGSYS;
    } else {
        if (map && r.coverage) {
            memcpy(map, r.coverage, r.coverage_size < map_size ?
                   r.coverage_size : map_size);
        }
        *status = status_of(&r);
        if (r.result != SNAPSHOT_RESULT_OK &&
            r.cause != SNAPSHOT_CAUSE_CANCELLED) {
            tell_run(&r, length);
        }
        check_coverage(&r);
        if (r.result == SNAPSHOT_RESULT_STOP) {
            end_campaign();
        }
    }
}

static void serve(void)
{
    uint32_t word;

    while (get(&word)) {
        bool again = true;
        int status = 0;

        if (!vm) {
            open_machine();
        }
        /* What is not 0 says that the fuzzer has killed the last. */
        if (word) {
            drop_dummy();
        }
        dummy_status = 0;
        need_dummy();
        if (!put(dummy)) {
            return;
        }
        while (again) {
            run(&again, &status);
        }
        if (status == SIGALRM && dummy) {
            status = wait_for_kill();
        } else if (status == SIGALRM) {
            status = dummy_status;
        }
        if (!put(status)) {
            return;
        }
    }
}

/* -------------------------------------------------------------------- start */

static bool old_hello(size_t size)
{
    const uint32_t word = OLD_HELLO | OLD_MAP | (size - 1) << 1 |
        (shared_input ? OLD_INPUT : 0);
    uint32_t answer;

    if (size > OLD_MAP_MAX) {
        tell("the coverage's %zu bytes are more than this AFL++ takes, %u",
             size, OLD_MAP_MAX);
        put(OLD_FAILED | OLD_FAILED_SIZE);
        return false;
    }
    if (!put(word)) {
        return false;
    }
    /* It answers what it was offered. */
    if (shared_input) {
        if (!get(&answer)) {
            return false;
        }
        if ((answer & (OLD_HELLO | OLD_INPUT)) != (OLD_HELLO | OLD_INPUT)) {
            shared_input = NULL;
        }
    }
    return true;
}

static bool new_hello(size_t size)
{
    uint32_t answer;

    if (!put(NEW_HELLO) || !get(&answer)) {
        return false;
    }
    if (answer != ~NEW_HELLO) {
        tell("the fuzzer answers 0x%08x to version 1 of the fork server",
             answer);
        return false;
    }
    return put(NEW_MAP | (shared_input ? NEW_INPUT : 0)) && put(size) &&
        put(NEW_HELLO);
}

/* One run, that ends this program as it ended */
static int run_once(void)
{
    struct snapshot_vm_result r;
    size_t length;
    int status;

    if (!load(&length) || snapshot_vm_run(vm, length, NULL, &r) < 0) {
        tell("%s", snapshot_vm_error());
        return 1;
    }
    if (map && r.coverage) {
        memcpy(map, r.coverage, r.coverage_size < map_size ? r.coverage_size
                                                           : map_size);
    }
    tell_run(&r, length);
    status = status_of(&r);
    snapshot_vm_close(vm);
    if (WIFSIGNALED(status)) {
        const struct rlimit none = { 0, 0 };

        setrlimit(RLIMIT_CORE, &none);
        raise(WTERMSIG(status));
    }
    return WEXITSTATUS(status);
}

static int usage(void)
{
    fputs("afl-fuzz -i in -o out -- afl-snapshot VM [@@]\n"
          "afl-snapshot VM [FILE]     one run of FILE, or of stdin\n"
          "afl-snapshot --stop VM     end VM's machines\n"
          "\n"
          "VM is the path of a description; see README.rst.\n", stderr);
    return 2;
}

int main(int argc, char **argv)
{
    struct sigaction child = { .sa_handler = on_child };
    bool server = fcntl(TO_FUZZER, F_GETFD) >= 0;
    size_t size;

    if (argc == 3 && !strcmp(argv[1], "--stop")) {
        if (snapshot_vm_stop(argv[2], -1) < 0) {
            tell("%s", snapshot_vm_error());
            return 1;
        }
        return 0;
    }
    if (argc < 2 || argc > 3) {
        return usage();
    }
    description = argv[1];
    input_file = argc > 2 ? argv[2] : NULL;
    sigaction(SIGCHLD, &child, NULL);
    signal(SIGPIPE, SIG_IGN);

    snapshot_vm_on_wait(tell_user);
    map = attach("__AFL_SHM_ID", &map_size);
    open_machine();
    if (!server) {
        return run_once();
    }
    shared_input = attach("__AFL_SHM_FUZZ_ID", &shared_size);
    /* AFL++ wants a size that it can look at by words. */
    size = (snapshot_vm_coverage_size(vm) + 63) & ~(size_t)63;
    if (!size) {
        tell_user("the guest has no coverage: it registers no region for it, "
                  "and the description has no \"coverage = tcg\"");
        size = 64;
    }
    /*
     * afl-showmap and afl-cmin leave a fork server that they have only asked
     * for this size alone, and start the next: who runs nothing has no machine.
     */
    snapshot_vm_close(vm);
    vm = NULL;
    if (getenv("__AFL_SHM_FUZZ_MAP_SIZE") || getenv("AFL_CHILD_SYNC_SHM") ?
        new_hello(size) : old_hello(size)) {
        serve();
    }
    snapshot_vm_close(vm);
    return 0;
}
