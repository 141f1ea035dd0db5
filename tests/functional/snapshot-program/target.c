/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A program that a fuzzer gives inputs to: knows nothing of the snapshot device
 *
 *     target [--file=FILE]
 *
 * The input's first byte says what it does, the others are counted; each way to
 * end that a program has is one. What is undone after a run is checked at the
 * next start: a file, the number of bytes that stdin has, a variable.
 */

#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MARK    "/tmp/target.mark"

static char **arguments;
static unsigned char data[1 << 20];
static size_t size;
/* volatile: what is done to it shall be done */
static volatile unsigned sum;
/* volatile: the compiler is not to know what goes wrong */
static volatile int zero;
static int runs;

static void check(bool ok, const char *what)
{
    if (!ok) {
        perror(what);
        _exit(99);
    }
}

static void read_input(const char *file)
{
    int fd = file ? open(file, O_RDONLY) : STDIN_FILENO;
    struct stat st;
    ssize_t n;

    check(fd >= 0 && !fstat(fd, &st), "input");
    while ((n = read(fd, data + size, sizeof(data) - size)) > 0) {
        size += n;
    }
    check(n == 0 && (!S_ISREG(st.st_mode) || st.st_size == (off_t)size),
          "size of the input");
    if (file) {
        char c;

        check(read(STDIN_FILENO, &c, 1) == 0, "stdin");
        close(fd);
    }
}

static void crash(unsigned long address)
{
    /* volatile: to be done, even here */
    *(volatile int *)address = 1;
}

static void __attribute__((noinline)) one(void)
{
    sum += 1;
}

static void __attribute__((noinline)) two(void)
{
    sum += 2;
}

static void __attribute__((noinline)) loop(unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        sum += i;
    }
}

/* What is counted before main() belongs to no run that begins there. */
static void __attribute__((constructor)) before_main(void)
{
    loop(3);
}

static int __attribute__((noinline)) recurse(int n)
{
    /* volatile: to be there */
    volatile char frame[4096];

    frame[n % sizeof(frame)] = n;
    return zero ? 0 : recurse(n + 1) + frame[0];
}

static void *thread(void *how)
{
    if (how) {
        crash(0x1230);
    }
    sum++;
    return NULL;
}

static void use_thread(bool crash)
{
    pthread_t id;

    check(!pthread_create(&id, NULL, thread, crash ? data : NULL) &&
          !pthread_join(id, NULL), "thread");
}

static int use_child(int how)
{
    int status;
    pid_t pid = fork();

    if (!pid) {
        switch (how) {
        case 'c':
            crash(0x1230);
            break;
        case 'q':
            quick_exit(3);
            break;
        case 'e':
            exit(3);
        }
        _exit(3);
    }
    check(pid > 0 && waitpid(pid, &status, 0) == pid, "child");
    return status;
}

static void use_file(void)
{
    int fd = open(MARK, O_WRONLY | O_CREAT, 0644);

    check(fd >= 0 && write(fd, data, size) == (ssize_t)size, MARK);
    close(fd);
}

static void handled(int sig)
{
    _exit(sig);
}

static void bus(void)
{
    int fd = memfd_create("bus", 0);
    /* volatile: to be written to */
    volatile char *p = mmap((void *)0x20000000, 4096, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_FIXED, fd, 0);

    check(p != MAP_FAILED, "mmap");
    p[0x123] = 1;
}

static int act(void)
{
    const struct sigaction handler = { .sa_handler = handled };
    /* As the second byte, if there is one, of the same meaning for all */
    const int arg = size > 1 ? data[1] : 0;
    /* volatile: neither a leak nor an overflow is to be optimised away */
    volatile char *volatile heap;

    switch (size ? data[0] : 0) {
    case '1':
        one();
        break;
    case '2':
        two();
        break;
    case '3':
        one();
        two();
        break;
    case 'l':
        loop(size > 1 ? arg + size - 2 : 0);
        break;
    case 'r':
        return arg;
    case 'e':
        exit(arg);
    case '_':
        _exit(arg);
    case '-':
        _Exit(arg);
    case 'q':
        quick_exit(arg);
    case 'y':
        syscall(SYS_exit_group, arg);
        break;
    case 't':
        use_thread(false);
        break;
    case 'f':
        return WEXITSTATUS(use_child(arg));
    case 'g':
        use_child(arg);
        crash(0x1230);
        break;
    case 'm':
        pthread_exit(NULL);
        break;
    case 'x':
        execl("/proc/self/exe", arguments[0], "--status", "7", NULL);
        check(false, "exec");
        break;
    case 'X':
        execl("/proc/self/exe", arguments[0], "--crash", NULL);
        check(false, "exec");
        break;
    case 'c':
        close(STDIN_FILENO);
        break;
    case 'C':
        syscall(SYS_close_range, 0, ~0u, 0);
        break;
    case 'w':
        use_file();
        break;
    case 'h':
        sigaction(SIGSEGV, &handler, NULL);
        crash(0x1230);
        break;
    case 'A':
        fprintf(stderr, "about to abort\n");
        abort();
    case 'S':
        crash(0x1230);
        break;
    case 'B':
        bus();
        break;
    case 'F':
        sum = 100 / zero;
        break;
    case 'I':
        __builtin_trap();
        break;
    case 'K':
        raise(SIGKILL);
        break;
    case 'R':
        sum = recurse(0);
        break;
    case 'T':
        use_thread(true);
        break;
    case 'H':
        for (;;) {
            pause();
        }
    case 'O':
        syscall(SYS_close_range, 0, ~0u, 0);
        /* fall through */
    case 'o':
        heap = malloc(16);
        check(heap, "malloc");
        heap[zero + 16] = 1;
        free((void *)heap);
        break;
    case 'k':
        heap = malloc(1000);
        check(heap, "malloc");
        heap[zero] = 1;
        heap = NULL;
        break;
    case 'u':
        zero += 0x7fffffff;
        zero++;
        break;
    }
    return 0;
}

int main(int argc, char **argv)
{
    const char *file = NULL;

    arguments = argv;
    if (argc > 1 && !strcmp(argv[1], "--status")) {
        return atoi(argv[2]);
    }
    if (argc > 1 && !strcmp(argv[1], "--crash")) {
        crash(0x1240);
    }
    if (argc > 1 && !strncmp(argv[1], "--file=", 7)) {
        file = argv[1] + 7;
    }
    check(!runs++ && access(MARK, F_OK) < 0 && errno == ENOENT, "undone");
    read_input(file);
    return act();
}
