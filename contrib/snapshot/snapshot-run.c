/* SPDX-License-Identifier: MIT */
/*
 * Have a program that reads a file or stdin process the inputs of a fuzzer
 *
 *     snapshot-run [options] -- program [argument...]
 *
 * Two processes: the child becomes the program. It gives READY inside the
 * program's start, by snapshot-shim.so; or, "whole", in front of its exec. This
 * one waits for its end, and tells the host of all ends that the shim does not
 * tell of itself.
 */

#define _GNU_SOURCE

#include <elf.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/ipc.h>
#include <sys/personality.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <termios.h>

#include "snapshot-target.h"

#define DEFAULT_INPUT   (1 << 20)       /* the largest that AFL++ makes */
#define DEFAULT_MAP     65536
#define MAX_SIZE        (1 << 30)
#define AFL_FORKSRV_FD  198             /* and 199, as AFL++ has them */
#define TMPFS           0x01021994      /* f_type of statfs() */
#define RAMFS           0x858458f6
#define REPORT          "snapshot-run.report"
#define INPUT           "snapshot-run.input"

enum way { ANY, SHIM, WHOLE };

static struct {
    enum way way;
    const char *shim;
    const char *file;
    size_t input_size;
    size_t map_size;            /* 0: as the program wants */
    int crash_status;
    bool verbose;
} options = {
    .input_size = DEFAULT_INPUT,
    .crash_status = -1,
};

static struct snapshot_target *target;
static unsigned char *map;
static const char *tmp;         /* a directory that is memory */
static int kmsg = -1;
static int errors = -1;         /* what the program writes to stderr */

static void __attribute__((noreturn, format(printf, 1, 2)))
die(const char *format, ...)
{
    va_list ap;

    fprintf(stderr, "snapshot-run: ");
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fprintf(stderr, "\n");
    exit(1);
}

static void __attribute__((noreturn)) usage(void)
{
    fprintf(stderr,
            "usage: snapshot-run [options] -- program [argument...]\n"
            "An argument that contains @@ is the input's file; else the input "
            "is on stdin.\n"
            "  -p         save inside the program's start (snapshot-shim.so)\n"
            "  -w         start the program anew in each run\n"
            "  -f FILE    the input's file\n"
            "  -s SIZE    bytes of the largest input (default 1048576)\n"
            "  -m SIZE    bytes of the coverage map (default: as the program\n"
            "             needs, or 65536)\n"
            "  -x STATUS  this exit status is a crash\n"
            "  -l SHIM    snapshot-shim.so, if not beside snapshot-run\n"
            "  -v         show the program's output\n");
    exit(2);
}

static long number(const char *s, long max)
{
    char rest;
    long n;

    if (sscanf(s, "%11li%c", &n, &rest) != 1 || n < 0 || n > max) {
        die("%s is not a number from 0 to %ld", s, max);
    }
    return n;
}

/*
 * The program
 */

static bool executable(const char *path)
{
    struct stat st;

    if (access(path, X_OK) < 0 || stat(path, &st) < 0) {
        return false;
    }
    errno = EACCES;
    return S_ISREG(st.st_mode);
}

/* As execvp() finds it; to be freed */
static char *find_program(const char *name)
{
    const char *path = getenv("PATH");
    char *found = NULL;

    if (strchr(name, '/')) {
        found = strdup(name);
    } else {
        while (path && *path) {
            size_t n = strcspn(path, ":");

            if (asprintf(&found, "%.*s/%s", (int)n, path, name) < 0) {
                die("out of memory");
            }
            if (executable(found)) {
                return found;
            }
            free(found);
            found = NULL;
            path += n + (path[n] == ':');
        }
        errno = ENOENT;
    }
    if (!found || !executable(found)) {
        die("cannot execute \"%s\": %s", name, strerror(errno));
    }
    return found;
}

struct image {
    const char *bytes;
    size_t size;
    struct stat st;
};

static struct image open_image(const char *path)
{
    struct image image = { 0 };
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    void *p;

    if (fd < 0 || fstat(fd, &image.st) < 0) {
        die("cannot read %s: %s", path, strerror(errno));
    }
    image.size = image.st.st_size;
    p = mmap(NULL, image.size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) {
        die("cannot map %s: %s", path, strerror(errno));
    }
    close(fd);
    image.bytes = p;
    return image;
}

static bool contains(const struct image *image, const char *words)
{
    return memmem(image->bytes, image->size, words, strlen(words));
}

#if UINTPTR_MAX > 0xffffffffu
typedef Elf64_Ehdr Ehdr;
typedef Elf64_Phdr Phdr;
#define NATIVE_CLASS    ELFCLASS64
#else
typedef Elf32_Ehdr Ehdr;
typedef Elf32_Phdr Phdr;
#define NATIVE_CLASS    ELFCLASS32
#endif

/* The program's dynamic linker, or NULL */
static const char *interpreter(const struct image *image)
{
    const Ehdr *ehdr = (const void *)image->bytes;
    const Phdr *phdr;

    if (image->size < sizeof(*ehdr) || memcmp(ehdr->e_ident, ELFMAG, SELFMAG) ||
        ehdr->e_ident[EI_CLASS] != NATIVE_CLASS ||
        ehdr->e_phentsize != sizeof(*phdr) || ehdr->e_phoff > image->size ||
        ehdr->e_phnum > (image->size - ehdr->e_phoff) / sizeof(*phdr)) {
        return NULL;
    }
    phdr = (const void *)(image->bytes + ehdr->e_phoff);
    for (int i = 0; i < ehdr->e_phnum; i++) {
        if (phdr[i].p_type == PT_INTERP && phdr[i].p_filesz &&
            phdr[i].p_offset < image->size &&
            phdr[i].p_filesz <= image->size - phdr[i].p_offset &&
            !image->bytes[phdr[i].p_offset + phdr[i].p_filesz - 1]) {
            return image->bytes + phdr[i].p_offset;
        }
    }
    return NULL;
}

/* Why the shim cannot be loaded into the program, or NULL */
static const char *no_shim(const struct image *image)
{
    const char *linker = interpreter(image);
    const mode_t mode = image->st.st_mode;

    if (!linker) {
        return "it is not dynamically linked, or for another machine";
    }
    if (!strstr(linker, "/ld-linux")) {
        return "it does not use the GNU C library";
    }
    if (!contains(image, "__libc_start_main")) {
        return "it does not start as C programs do";
    }
    if (((mode & S_ISUID) && image->st.st_uid != geteuid()) ||
        ((mode & S_ISGID) && image->st.st_gid != getegid())) {
        return "it is set-user-ID or set-group-ID";
    }
    if (access(options.shim, R_OK) < 0) {
        return "there is no snapshot-shim.so: see -l";
    }
    return NULL;
}

/* What a program of afl-cc's tells of its map: bytes, or 0 */
static size_t ask_map_size(const char *path, char **argv)
{
    unsigned long size = 0;
    char buf[32] = "", rest;
    int fds[2];
    pid_t pid;

    if (pipe2(fds, O_CLOEXEC) < 0) {
        die("pipe: %s", strerror(errno));
    }
    pid = fork();
    if (!pid) {
        int null = open("/dev/null", O_RDWR);

        dup2(null, STDIN_FILENO);
        dup2(fds[1], STDOUT_FILENO);
        dup2(null, STDERR_FILENO);
        setenv("AFL_DUMP_MAP_SIZE", "1", 1);
        /* It may be one that does not know this. */
        alarm(10);
        execv(path, argv);
        _exit(127);
    }
    close(fds[1]);
    if (pid < 0 || read(fds[0], buf, sizeof(buf) - 1) < 0) {
        *buf = 0;
    }
    close(fds[0]);
    if (pid > 0) {
        waitpid(pid, NULL, 0);
    }
    /* Nothing but a number: else it is the program's own output. */
    return sscanf(buf, "%10lu %c", &size, &rest) == 1 ? size : 0;
}

static void choose_map_size(const struct image *image, const char *path,
                            char **argv)
{
    size_t need = 0;

    if (contains(image, "__AFL_SHM_ID") &&
        contains(image, "AFL_DUMP_MAP_SIZE")) {
        need = ask_map_size(path, argv);
    }
    if (need > MAX_SIZE) {
        die("%s needs a map of %zu bytes", path, need);
    }
    if (options.map_size && options.map_size < need) {
        die("%s needs a map of %zu bytes: -m %zu is less", path, need,
            options.map_size);
    }
    if (!options.map_size) {
        /* AFL++ has whole multiples of 64. */
        options.map_size = need ? (need + 63) / 64 * 64 : DEFAULT_MAP;
    }
}

/*
 * Memory and files
 */

static void *segment(size_t size, int *id)
{
    void *p;

    *id = shmget(IPC_PRIVATE, size, IPC_CREAT | 0600);
    if (*id < 0) {
        die("no shared memory of %zu bytes: %s", size, strerror(errno));
    }
    p = shmat(*id, NULL, 0);
    if (p == (void *)-1 || mlock(p, size) < 0) {
        die("cannot lock %zu bytes of memory: %s", size, strerror(errno));
    }
    memset(p, 0, size);
    return p;
}

static bool in_memory(const char *path)
{
    struct statfs fs;

    return !statfs(path, &fs) &&
        ((unsigned)fs.f_type == TMPFS || (unsigned)fs.f_type == RAMFS);
}

static void choose_tmp(void)
{
    static const char *const candidates[] = { "/dev/shm", "/tmp", "/run" };

    for (int i = 0; i < 3; i++) {
        if (in_memory(candidates[i])) {
            tmp = candidates[i];
            return;
        }
    }
    die("none of /dev/shm, /tmp and /run is memory: mount -t tmpfs tmpfs /tmp");
}

static int memory_file(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC);

    if (fd < 0) {
        die("memfd_create: %s", strerror(errno));
    }
    return fd;
}

/* Put the name of the input's file into the arguments. Returns: if it is */
static bool name_file(char **argv, const char *file)
{
    bool named = false;

    for (; *argv; argv++) {
        char *at;

        while ((at = strstr(*argv, "@@"))) {
            char *new;

            if (asprintf(&new, "%.*s%s%s", (int)(at - *argv), *argv, file,
                         at + 2) < 0) {
                die("out of memory");
            }
            *argv = new;
            named = true;
        }
    }
    return named;
}

/*
 * The report is in a file, as the program may have closed stderr. Of options
 * that are given twice, the last counts: the user's. UBSan's runtime is in all
 * that clang counts edges in; what it says of a signal is not a finding of its
 * own, but it also speaks for ASan, if that is there.
 */
static void set_sanitizers(const struct image *image)
{
    static const char *const names[] = {
        "ASAN_OPTIONS", "LSAN_OPTIONS", "MSAN_OPTIONS", "TSAN_OPTIONS",
        "UBSAN_OPTIONS",
    };
    const bool asan = contains(image, "__asan_init");

    for (unsigned i = 0; i < sizeof(names) / sizeof(*names); i++) {
        const char *user = getenv(names[i]);

        if (user && strstr(user, "detect_leaks=1")) {
            target->whole_end = 1;
        }
    }
    for (unsigned i = 0; i < sizeof(names) / sizeof(*names); i++) {
        const char *user = getenv(names[i]);
        char *value;

        if (asprintf(&value, "abort_on_error=1:halt_on_error=1:symbolize=0:"
                     "allocator_may_return_null=1:log_path=%s/" REPORT
                     "%s%s%s%s%s", tmp,
                     target->whole_end ? "" : ":detect_leaks=0",
                     *names[i] == 'A' ? ":verify_asan_link_order=0" : "",
                     *names[i] == 'U' && !asan ?
                     ":handle_segv=0:handle_sigbus=0:handle_sigfpe=0" : "",
                     user ? ":" : "", user ? user : "") < 0 ||
            setenv(names[i], value, 1) < 0) {
            die("out of memory");
        }
        free(value);
    }
}

static void set_environment(const struct image *image, bool shim, int id)
{
    const char *preload = getenv("LD_PRELOAD");
    char buf[600];

    set_sanitizers(image);
    snprintf(buf, sizeof(buf), "%d", target->map_id);
    setenv("__AFL_SHM_ID", buf, 1);
    snprintf(buf, sizeof(buf), "%zu", options.map_size);
    setenv("AFL_MAP_SIZE", buf, 1);
    if (!shim) {
        return;
    }
    snprintf(buf, sizeof(buf), "%d", id);
    setenv(SNAPSHOT_TARGET_ENV, buf, 1);
    if (preload && strlen(preload) >= sizeof(target->preload)) {
        die("LD_PRELOAD is too long");
    }
    strcpy(target->preload, preload ? preload : "");
    snprintf(buf, sizeof(buf), "%s%s%s", options.shim, preload ? ":" : "",
             target->preload);
    setenv("LD_PRELOAD", buf, 1);
    /* What is looked up before READY is not looked up in each run. */
    setenv("LD_BIND_NOW", "1", 1);
}

/*
 * The child
 */

static void __attribute__((noreturn))
child(const char *path, char **argv, bool shim, int input)
{
    const struct rlimit core = { 1, 1 };
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    int in = *target->file ? null : input;
    struct snapshot s;
    int64_t n;

    setsid();
    if (dup2(in, STDIN_FILENO) < 0 ||
        (!options.verbose && (dup2(null, STDOUT_FILENO) < 0 ||
                              dup2(errors, STDERR_FILENO) < 0))) {
        die("dup2: %s", strerror(errno));
    }
    /* A server of forks, which AFL's programs have, does not start without. */
    close(AFL_FORKSRV_FD);
    close(AFL_FORKSRV_FD + 1);
    /* 1 stands for no core dump: with 0, one would go to a pipe. */
    setrlimit(RLIMIT_CORE, &core);
    /* The same addresses in each machine: gcc's trace-pc counts by them. */
    personality(ADDR_NO_RANDOMIZE);
    target->pid = getpid();
    if (!shim) {
        n = snapshot_open(&s);
        if (n >= 0) {
            n = snapshot_target_ready(&s, target, map);
        }
        if (n < 0) {
            die("%s", snapshot_strerror(n));
        }
        target->error = snapshot_target_put_input(target, input, n);
        if (target->error) {
            _exit(1);
        }
    }
    execv(path, argv);
    target->error = errno;
    _exit(127);
}

/*
 * The end of a run
 */

static void __attribute__((format(printf, 1, 2))) say(const char *format, ...)
{
    size_t done = strlen(target->text);
    va_list ap;

    va_start(ap, format);
    vsnprintf(target->text + done, sizeof(target->text) - done, format, ap);
    va_end(ap);
}

/* The last bytes of a file, behind the text. Returns: how many */
static size_t append(int fd, bool last)
{
    size_t done = strlen(target->text);
    size_t room = sizeof(target->text) - 1 - done;
    off_t size = lseek(fd, 0, SEEK_END);
    ssize_t n;

    n = pread(fd, target->text + done, room,
              last && size > (off_t)room ? size - (off_t)room : 0);
    if (n < 0) {
        n = 0;
    }
    for (ssize_t i = 0; i < n; i++) {
        /* What is behind a zero byte would be lost. */
        if (!target->text[done + i]) {
            target->text[done + i] = '?';
        }
    }
    target->text[done + n] = 0;
    return n;
}

/* The report of a sanitizer in this process, if there is one */
static bool append_report(pid_t pid)
{
    bool found = false;
    char path[100];
    int fd;

    snprintf(path, sizeof(path), "%s/" REPORT ".%d", tmp, (int)pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        found = append(fd, false);
        close(fd);
    }
    return found;
}

/* What the kernel has said in this run, as "target[9]: segfault at 0 ip ..." */
static void append_kernel(void)
{
    char record[2048];
    ssize_t n;

    while ((n = read(kmsg, record, sizeof(record) - 1)) > 0) {
        char *message;

        record[n] = 0;
        message = strchr(record, ';');
        if (message && strlen(target->text) < sizeof(target->text) / 2) {
            message[strcspn(message, "\n")] = 0;
            say("%s\n", message + 1);
        }
    }
}

static uint32_t judge(pid_t pid, int status)
{
    const int sig = WIFSIGNALED(status) ? WTERMSIG(status) : 0;

    /* Whatever the program has put there by mistake */
    *target->text = 0;
    if (target->error) {
        say("cannot start the program: %s\n", strerror(target->error));
        return SNAPSHOT_RESULT_INVALID;
    }
    if (!status && options.crash_status) {
        return SNAPSHOT_RESULT_OK;
    }
    if (append_report(pid)) {
        return SNAPSHOT_RESULT_SANITIZER;
    }
    if (sig) {
        say("signal %d (%s)", sig, strsignal(sig));
        if (target->fault_pid == pid && target->fault_signal == sig) {
            say(" at 0x%llx", (unsigned long long)target->fault_address);
        }
        say("\n");
        append_kernel();
    } else if (WEXITSTATUS(status) == options.crash_status) {
        say("exit status %d\n", options.crash_status);
    } else {
        return SNAPSHOT_RESULT_OK;
    }
    append(errors, true);
    return SNAPSHOT_RESULT_CRASH;
}

static int not_ready(const char *path, int status)
{
    char buf[1000];
    ssize_t n = pread(errors, buf, sizeof(buf), 0);

    fprintf(stderr, "snapshot-run: %s has ended before it was READY, with "
            "%s %d%s%s\n%.*s", path,
            WIFSIGNALED(status) ? "signal" : "status",
            WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status),
            target->error ? ": " : "",
            target->error ? strerror(target->error) : "",
            n > 0 ? (int)n : 0, buf);
    return 1;
}

static void parse(int argc, char **argv)
{
    int c;

    while ((c = getopt(argc, argv, "+pwf:s:m:x:l:v")) >= 0) {
        switch (c) {
        case 'p':
            options.way = SHIM;
            break;
        case 'w':
            options.way = WHOLE;
            break;
        case 'f':
            options.file = optarg;
            break;
        case 's':
            options.input_size = number(optarg, MAX_SIZE);
            break;
        case 'm':
            options.map_size = number(optarg, MAX_SIZE);
            break;
        case 'x':
            options.crash_status = number(optarg, 255);
            break;
        case 'l':
            options.shim = optarg;
            break;
        case 'v':
            options.verbose = true;
            break;
        default:
            usage();
        }
    }
    if (optind >= argc || !options.input_size) {
        usage();
    }
}

/* Beside this program */
static void find_shim(void)
{
    static char path[256];
    ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 20);

    if (!options.shim) {
        path[n > 0 ? n : 0] = 0;
        strcpy(strrchr(path, '/') ? strrchr(path, '/') + 1 : path,
               "snapshot-shim.so");
        options.shim = path;
    }
}

int main(int argc, char **argv)
{
    int input, id, status = 0;
    const char *reason;
    struct image image;
    char *path, file[256];
    struct snapshot s;
    bool shim, named;
    int64_t n;
    pid_t pid;

    parse(argc, argv);
    argv += optind;
    choose_tmp();
    find_shim();
    path = find_program(argv[0]);
    snprintf(file, sizeof(file), "%s/" INPUT, tmp);
    named = name_file(argv, options.file ? options.file : file);
    image = open_image(path);
    reason = no_shim(&image);
    if (reason && options.way == SHIM) {
        die("cannot save inside %s, for %s", path, reason);
    }
    shim = !reason && options.way != WHOLE;
    choose_map_size(&image, path, argv);
    n = snapshot_open(&s);
    if (n < 0) {
        die("%s", snapshot_strerror(n));
    }

    target = segment(sizeof(*target) + options.input_size, &id);
    target->version = SNAPSHOT_TARGET_VERSION;
    target->input_size = options.input_size;
    target->map_size = options.map_size;
    target->crash_status = options.crash_status;
    map = segment(options.map_size < DEFAULT_MAP ? DEFAULT_MAP
                                                 : options.map_size,
                  &target->map_id);
    if (named || options.file) {
        snprintf(target->file, sizeof(target->file), "%s",
                 options.file ? options.file : file);
        input = open(target->file, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC,
                     0644);
        if (input < 0) {
            die("cannot create %s: %s", target->file, strerror(errno));
        }
        if (!in_memory(target->file)) {
            fprintf(stderr, "snapshot-run: %s is not in memory: each run "
                    "writes to a disk\n", target->file);
        }
    } else {
        input = memory_file("input");
    }
    /* So that no run has to get pages. A ramfs cannot, and does without. */
    fallocate(input, FALLOC_FL_KEEP_SIZE, 0, options.input_size);
    errors = memory_file("stderr");
    fcntl(errors, F_SETFL, O_APPEND);
    kmsg = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    lseek(kmsg, 0, SEEK_END);
    set_environment(&image, shim, id);
    munmap((void *)image.bytes, image.size);

    fprintf(stderr, "snapshot-run: %s: %s\n", path,
            shim ? "saves inside its start" : "is started in each run");
    /* What is not out yet would go out in each run. */
    tcdrain(STDERR_FILENO);
    pid = fork();
    if (pid < 0) {
        die("fork: %s", strerror(errno));
    }
    if (!pid) {
        child(path, argv, shim, input);
    }
    while (waitpid(pid, &status, 0) != pid) {
        if (errno != EINTR) {
            die("waitpid: %s", strerror(errno));
        }
    }
    shmctl(target->map_id, IPC_RMID, NULL);
    shmctl(id, IPC_RMID, NULL);
    if (!target->ready) {
        return not_ready(path, status);
    }
    n = snapshot_done(&s, judge(pid, status));
    die("%s", snapshot_strerror(n));
}
