/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A busy machine whose result must not depend on how often it is restored
 *
 *     work guest restores saves      restores itself at random moments
 *     work host                      someone outside may do so
 *
 * Several processes do each their task: files, pipes, programs, timers,
 * floating point, memory, and a disk if there is one. A task's result is a
 * number that does not depend on time or order. All tasks run twice,
 * undisturbed and then saved and restored in the middle, and must come to the
 * same numbers. What a task can check at once, it checks at once.
 */

#define _GNU_SOURCE     /* O_DIRECT */

#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>

#include "snapshot.h"

static void drain(void)
{
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
}

static void __attribute__((format(printf, 1, 2), noreturn))
fail(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    printf("work: FAILED: ");
    vprintf(fmt, ap);
    printf("\n");
    va_end(ap);
    drain();
    exit(1);
}

#define CHECK(what)     ((what) ? (void)0 : fail("%s", #what))

/* A step of splitmix64: the next random number, or one from a number */
static uint64_t mix(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

#define HASH_START      UINT64_C(0xcbf29ce484222325)

/* FNV-1a */
static uint64_t hash(uint64_t h, const void *data, size_t len)
{
    const unsigned char *p = data;

    while (len--) {
        h = (h ^ *p++) * UINT64_C(0x100000001b3);
    }
    return h;
}

/* Files: write, rename, and read back in two ways what was written */
static uint64_t task_files(void)
{
    enum { FILES = 60, SIZE = 40000 };
    static unsigned char data[SIZE], back[SIZE];
    uint64_t seed = 1, h = HASH_START;
    char name[64], other[64];
    int i, fd;

    mkdir("/tmp/files", 0700);
    for (i = 0; i < FILES; i++) {
        size_t len = mix(&seed) % SIZE + 1, at, part;
        unsigned char *map;

        for (at = 0; at < len; at++) {
            data[at] = mix(&seed);
        }
        snprintf(name, sizeof(name), "/tmp/files/%d.new", i);
        snprintf(other, sizeof(other), "/tmp/files/%d", i);
        fd = open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
        CHECK(fd >= 0);
        for (at = 0; at < len; at += part) {
            part = mix(&seed) % 3000 + 1;
            part = part < len - at ? part : len - at;
            CHECK(write(fd, data + at, part) == (ssize_t)part);
        }
        CHECK(rename(name, other) == 0);
        CHECK(pread(fd, back, SIZE, 0) == (ssize_t)len);
        CHECK(!memcmp(data, back, len));
        map = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, 0);
        CHECK(map != MAP_FAILED);
        CHECK(!memcmp(data, map, len));
        h = hash(h, map, len);
        munmap(map, len);
        close(fd);
        if (i % 2) {
            CHECK(unlink(other) == 0);
        }
    }
    for (i = 0; i < FILES; i += 2) {
        snprintf(other, sizeof(other), "/tmp/files/%d", i);
        CHECK(unlink(other) == 0);
    }
    CHECK(rmdir("/tmp/files") == 0);
    return h;
}

/* Programs: hash a tree of files as a shell does, with fork, exec and pipes */
static uint64_t task_programs(void)
{
    enum { RUNS = 12 };
    static const char *const command =
        "mkdir /tmp/tree && cd /tmp/tree && cp /bin/busybox a && "
        "head -c 300000 a | tail -c 200000 >b && tr a-z b-za <b >c && "
        "find . -type f | sort | xargs sha256sum && cd / && rm -r /tmp/tree";
    char buf[512];
    uint64_t h = HASH_START;
    size_t len, first = 0;
    int i;

    for (i = 0; i < RUNS; i++) {
        FILE *f = popen(command, "r");

        CHECK(f);
        len = fread(buf, 1, sizeof(buf), f);
        CHECK(pclose(f) == 0);
        first = first ? first : len;
        CHECK(len > 150 && len == first);
        h = hash(h, buf, len);
    }
    return h;
}

/* Pipes: two processes hand a number to and fro, each changing it */
static uint64_t task_pipes(void)
{
    enum { TURNS = 8000 };
    uint64_t token = 7, seed;
    int to[2], fro[2], i, status;
    pid_t pid;

    CHECK(pipe(to) == 0 && pipe(fro) == 0);
    pid = fork();
    CHECK(pid >= 0);
    for (i = 0; i < TURNS; i++) {
        if (pid == 0) {
            CHECK(read(to[0], &token, sizeof(token)) == sizeof(token));
        }
        seed = token + i;
        token = mix(&seed);
        if (pid == 0) {
            CHECK(write(fro[1], &token, sizeof(token)) == sizeof(token));
        } else {
            CHECK(write(to[1], &token, sizeof(token)) == sizeof(token));
            CHECK(read(fro[0], &token, sizeof(token)) == sizeof(token));
        }
    }
    if (pid == 0) {
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
    return token;
}

/* volatile: a signal handler writes it */
static volatile sig_atomic_t ticks;

static void tick(int sig)
{
    (void)sig;
    ticks++;
}

static int64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000) + t.tv_nsec / 1000;
}

/*
 * Timers and floating point: sums in SSE and x87 registers, for as long as it
 * takes a periodic timer to fire TICKS times; the clock must never go back.
 */
static uint64_t task_timers(void)
{
    enum { TICKS = 500, PERIOD_US = 2000, TERMS = 2000 };
    struct itimerval period = {
        .it_interval.tv_usec = PERIOD_US, .it_value.tv_usec = PERIOD_US,
    };
    struct sigaction sa = { .sa_handler = tick, .sa_flags = SA_RESTART };
    int64_t start = now_us(), last = start, t;
    double sum_want = 0, sum;
    long double root_want = 0, root;
    int i, first = 1;

    ticks = 0;
    CHECK(sigaction(SIGALRM, &sa, NULL) == 0);
    setitimer(ITIMER_REAL, &period, NULL);
    while (ticks < TICKS) {
        sum = 0;
        root = 0;
        for (i = 1; i <= TERMS; i++) {
            sum += 1.0 / i;
            root = sqrtl(root + i);
        }
        if (first) {
            sum_want = sum;
            root_want = root;
            first = 0;
        }
        CHECK(sum == sum_want);
        CHECK(root == root_want);
        t = now_us();
        CHECK(t >= last);
        last = t;
    }
    period.it_value.tv_usec = 0;
    setitimer(ITIMER_REAL, &period, NULL);
    /* Late ticks are merged, so this took at least that long */
    CHECK(last - start >= (int64_t)(TICKS - 1) * PERIOD_US);
    return hash(hash(HASH_START, &sum_want, sizeof(sum_want)),
                &root_want, 10 /* bytes that count in an x87 number */);
}

enum { PAGE = 4096, PAGES = 500 };

static unsigned char *memory;
/* volatile: a signal handler writes it */
static volatile sig_atomic_t faults;

static void unprotect(int sig, siginfo_t *info, void *context)
{
    uintptr_t page = (uintptr_t)info->si_addr & -(uintptr_t)PAGE;

    (void)sig;
    (void)context;
    faults++;
    if (mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE)) {
        _exit(1);
    }
}

/* Memory: page faults that count themselves, and copy on write after fork */
static uint64_t task_memory(void)
{
    enum { RUNS = 10 };
    struct sigaction sa = { .sa_sigaction = unprotect, .sa_flags = SA_SIGINFO };
    uint64_t h = HASH_START, seed = 3, theirs;
    int run, i, status, result[2];
    pid_t pid;

    CHECK(sigaction(SIGSEGV, &sa, NULL) == 0);
    CHECK(pipe(result) == 0);
    for (run = 0; run < RUNS; run++) {
        memory = mmap(NULL, PAGES * PAGE, PROT_READ,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED);
        faults = 0;
        for (i = 0; i < PAGES; i++) {
            CHECK(memory[i * PAGE] == 0);
            memory[i * PAGE + mix(&seed) % PAGE] = mix(&seed);
        }
        CHECK(faults == PAGES);

        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            for (i = 0; i < PAGES; i++) {
                memory[i * PAGE + 1] ^= i;
            }
            h = hash(h, memory, PAGES * PAGE / 4);
            CHECK(write(result[1], &h, sizeof(h)) == sizeof(h));
            _exit(0);
        }
        h = hash(h, memory, PAGES * PAGE / 4);
        CHECK(read(result[0], &theirs, sizeof(theirs)) == sizeof(theirs));
        CHECK(waitpid(pid, &status, 0) == pid && status == 0);
        h = hash(h, &theirs, sizeof(theirs));
        munmap(memory, PAGES * PAGE);
    }
    close(result[0]);
    close(result[1]);
    return h;
}

/* Disk: read /dev/vda past the page cache, here and there, each place twice */
static uint64_t task_disk(void)
{
    enum { READS = 400, SIZE = 16384 };
    static unsigned char buf[2][SIZE] __attribute__((aligned(PAGE)));
    uint64_t h = HASH_START, seed = 4;
    int fd = open("/dev/vda", O_RDONLY | O_DIRECT);
    off_t blocks, at;
    int i;

    if (fd < 0) {
        CHECK(errno == ENOENT);
        return 0;
    }
    blocks = lseek(fd, 0, SEEK_END) / SIZE;
    CHECK(blocks > 0);
    for (i = 0; i < READS; i++) {
        at = (off_t)(mix(&seed) % blocks) * SIZE;
        memset(buf, i, sizeof(buf));
        CHECK(pread(fd, buf[0], SIZE, at) == SIZE);
        CHECK(pread(fd, buf[1], SIZE, at) == SIZE);
        CHECK(!memcmp(buf[0], buf[1], SIZE));
        h = hash(h, buf[0], SIZE);
    }
    close(fd);
    return h;
}

static const struct task {
    const char *name;
    uint64_t (*run)(void);
} tasks[] = {
    { "files", task_files },
    { "programs", task_programs },
    { "pipes", task_pipes },
    { "timers", task_timers },
    { "memory", task_memory },
    { "disk", task_disk },
};

#define TASKS   (sizeof(tasks) / sizeof(*tasks))

/* Start all tasks; results go to @results, which is shared memory */
static void start(uint64_t *results, pid_t *pids)
{
    size_t i;

    drain();
    for (i = 0; i < TASKS; i++) {
        pids[i] = fork();
        CHECK(pids[i] >= 0);
        if (pids[i] == 0) {
            results[i] = tasks[i].run();
            exit(0);
        }
    }
}

static void finish(const pid_t *pids)
{
    int status;
    size_t i;

    for (i = 0; i < TASKS; i++) {
        CHECK(waitpid(pids[i], &status, 0) == pids[i]);
        if (status) {
            fail("task %s ended with status 0x%x", tasks[i].name, status);
        }
    }
}

static int running(const pid_t *pids)
{
    siginfo_t info;
    int n = 0;
    size_t i;

    for (i = 0; i < TASKS; i++) {
        info.si_pid = 0;
        CHECK(waitid(P_PID, pids[i], &info, WEXITED | WNOHANG | WNOWAIT) == 0);
        n += info.si_pid == 0;
    }
    return n;
}

static void sleep_us(unsigned us)
{
    struct timespec t = { .tv_nsec = us * 1000L };

    nanosleep(&t, NULL);
}

/*
 * Save @saves times while the tasks run; go back to each @restores / @saves
 * times, up to 8 ms later, now and then up to 80, for damage to show. How much
 * later comes from ARGUMENT, which counts the restores: a random number kept
 * in memory would be the same each time.
 */
static void disturb(struct snapshot *s, int64_t restores, int64_t saves,
                    const pid_t *pids)
{
    static unsigned char witness[PAGES * PAGE];
    int64_t i, n;
    uint64_t seed;
    int busy = 0, page;

    /* Ahead of the tasks, to restore when it is meant to */
    nice(-20);
    snapshot_set_argument(s, 0);
    for (i = 0; i < saves; i++) {
        sleep_us(20000);
        busy += running(pids) > 1;
        memset(witness, i, sizeof(witness));
        drain();
        n = snapshot_save(s, 0);
        if (n < 0) {
            fail("save: %s", snapshot_strerror(n));
        }
        /* What a restore leaves wrong, the next one may put right: look now */
        for (page = 0; page < PAGES; page++) {
            CHECK(witness[page * PAGE] == (unsigned char)i);
        }
        if (n < restores / saves) {
            memset(witness, i + 1, sizeof(witness));
            seed = snapshot_argument(s);
            snapshot_set_argument(s, seed + 1);
            sleep_us(mix(&seed) % (n % 10 ? 8000 : 80000));
            n = snapshot_restore(s, 0);
            fail("restore: %s", snapshot_strerror(n));
        }
    }
    printf("work: restored %" PRIu64 " times, to %" PRId64 " saves, "
           "%d of them while at work\n", snapshot_argument(s), saves, busy);
}

static int usage(void)
{
    puts("usage: work host | work guest restores saves");
    return 2;
}

int main(int argc, char **argv)
{
    uint64_t *results, *undisturbed;
    int64_t restores = 0, saves = 0;
    struct snapshot s;
    pid_t pids[TASKS];
    size_t i;
    int err;

    if (argc == 4 && !strcmp(argv[1], "guest")) {
        restores = atoll(argv[2]);
        saves = atoll(argv[3]);
        err = snapshot_open(&s);
        if (err) {
            fail("%s", snapshot_strerror(err));
        }
    } else if (argc != 2 || strcmp(argv[1], "host")) {
        return usage();
    }

    results = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(results != MAP_FAILED);
    undisturbed = results + TASKS;

    start(undisturbed, pids);
    finish(pids);
    printf("work: go\n");
    start(results, pids);
    if (saves) {
        disturb(&s, restores, saves, pids);
    }
    finish(pids);

    for (i = 0; i < TASKS; i++) {
        printf("work: %-8s %016" PRIx64 " %016" PRIx64 "\n", tasks[i].name,
               undisturbed[i], results[i]);
        if (results[i] != undisturbed[i]) {
            fail("%s came to another result", tasks[i].name);
        }
    }
    printf("work: same result\n");
    return 0;
}
