/* SPDX-License-Identifier: MIT */
/*
 * Machines for runs, by hand: start, look, run, stop
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "replay.h"
#include "snapshot-host.h"

#define CHECK_RUNS      50

static const char usage[] =
"snapshot-vm start VM [N]        start instance N, or attach to it\n"
"snapshot-vm start VM -n N       start instances 0 to N - 1, on all CPUs\n"
"snapshot-vm status VM           which instances run, and who has them\n"
"snapshot-vm run VM FILE...      run inputs, tell how each one ended\n"
"snapshot-vm replay VM FILE      run one for gdb, stopped at its begin; or with\n"
"    --trace LOG                 write down each block of code it executes; or\n"
"    --log LOG                   write down what the guest says\n"
"snapshot-vm check VM [FILE]     run one (or none) some times: is all well?\n"
"snapshot-vm measure VM FILE [S] run one for S s (5), tell runs a second\n"
"snapshot-vm console VM [N]      what instance N wrote last, and QEMU\n"
"snapshot-vm stop VM [N]         end instance N, or all\n"
"\n"
"VM is the path of a description; see contrib/snapshot/host/README.rst.\n";

static int complain(const char *what)
{
    fprintf(stderr, "snapshot-vm: %s: %s\n", what, snapshot_vm_error());
    return 1;
}

static void tell(const char *text)
{
    fprintf(stderr, "snapshot-vm: %s\n", text);
}

/* Returns: whether it is a number of that range */
static bool number(const char *s, double min, double max, double *value)
{
    char *end;

    *value = strtod(s, &end);
    return *s && !*end && *value >= min && *value <= max;
}

static double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int start(const char *path, int instance)
{
    double before = seconds();
    struct snapshot_vm *vm = snapshot_vm_open(path, instance, 0);
    char how[4200] = "";
    const char *file;
    uint64_t boot_ms;
    size_t size;
    int began;

    if (!vm) {
        return complain(path);
    }
    began = snapshot_vm_began(vm, &file, &boot_ms);
    if (file && began == SNAPSHOT_VM_LOADED) {
        snprintf(how, sizeof(how), ", from %s (its boot took %.1f s)", file,
                 boot_ms / 1e3);
    } else if (file && began == SNAPSHOT_VM_KEPT) {
        snprintf(how, sizeof(how), ", booted, and kept in %s", file);
    } else if (file && began == SNAPSHOT_VM_BOOTED) {
        snprintf(how, sizeof(how), ", booted");
    }
    snapshot_vm_input(vm, &size);
    printf("instance %d is READY after %.1f s%s: inputs up to %zu bytes, "
           "coverage of %zu; %s\n", snapshot_vm_instance(vm),
           seconds() - before, how, size, snapshot_vm_coverage_size(vm),
           snapshot_vm_directory(vm));
    snapshot_vm_close(vm);
    return 0;
}

/* The instances that a CPU gets, by turns.  Returns: 1 if one fails */
static int start_on(const char *path, int cpu, int from, int step, int n)
{
    cpu_set_t cpus;
    int i, bad = 0;

    CPU_ZERO(&cpus);
    CPU_SET(cpu, &cpus);
    sched_setaffinity(0, sizeof(cpus), &cpus);
    for (i = from; i < n; i += step) {
        bad |= start(path, i);
    }
    return bad;
}

/* Instances 0 to @n - 1, on all CPUs at once */
static int start_many(const char *path, int n)
{
    double before = seconds();
    int cpu, i = 0, status, bad;
    cpu_set_t cpus;
    int step;

    /* Each line at once, so that those of several processes do not mix */
    setlinebuf(stdout);
    /* If there is a file to be written, it does that, and the others wait. */
    bad = start(path, 0);
    if (bad || sched_getaffinity(0, sizeof(cpus), &cpus)) {
        return bad ? bad : (perror("snapshot-vm"), 1);
    }
    step = CPU_COUNT(&cpus);
    for (cpu = 0; cpu < CPU_SETSIZE && i < n; cpu++) {
        pid_t child = CPU_ISSET(cpu, &cpus) && i < step ? fork() : 1;

        if (!child) {
            _exit(start_on(path, cpu, i ? i : step, step, n));
        }
        bad |= child < 0;
        i += CPU_ISSET(cpu, &cpus);
    }
    while (wait(&status) > 0) {
        bad |= status != 0;
    }
    printf("%d instances%s after %.1f s\n", n, bad ? ", of which some failed,"
           : " are READY", seconds() - before);
    return bad;
}

static int status(const char *path)
{
    struct snapshot_vm_status s;
    int i, n = 0;

    for (i = 0; i < SNAPSHOT_VM_INSTANCES && n >= 0; i++) {
        n = snapshot_vm_status(path, i, &s);
        if (n <= 0) {
            continue;
        }
        printf("%d: ", i);
        if (!s.daemon) {
            printf("does not run\n");
            continue;
        }
        printf("QEMU is process %d, ", (int)s.qemu);
        if (s.user) {
            printf("process %d has it", (int)s.user);
        } else {
            printf("nobody has it");
        }
        printf("; %s\n", s.directory);
    }
    return n < 0 ? complain(path) : 0;
}

/* Read a file into the input.  Returns: its length, or -1 */
static long load(struct snapshot_vm *vm, const char *path)
{
    size_t size, n;
    unsigned char *input = snapshot_vm_input(vm, &size);
    FILE *f;

    if (!input) {
        complain(path);
        return -1;
    }
    f = fopen(path, "re");

    if (!f) {
        fprintf(stderr, "snapshot-vm: %s: %s\n", path, strerror(errno));
        return -1;
    }
    n = fread(input, 1, size, f);
    if (ferror(f)) {
        fprintf(stderr, "snapshot-vm: %s: %s\n", path, strerror(errno));
        n = -1;
    } else if (n == size && fgetc(f) != EOF) {
        fprintf(stderr, "snapshot-vm: %s: the guest takes %zu bytes only\n",
                path, size);
        n = -1;
    }
    fclose(f);
    return n;
}

static size_t edges(const struct snapshot_vm_result *r)
{
    size_t i, n = 0;

    for (i = 0; i < r->coverage_size; i++) {
        n += r->coverage[i] != 0;
    }
    return n;
}

static void tell_result(const char *file, const struct snapshot_vm_result *r)
{
    printf("%s: %s (%s), %.3f ms, %zu edges%s%.*s\n", file,
           snapshot_vm_result_name(r->result), snapshot_vm_cause_name(r->cause),
           r->host_ns / 1e6, edges(r), r->text_length ? ": " : "",
           (int)r->text_length, r->text);
}

static int run_files(struct snapshot_vm *vm, char **files, int n)
{
    struct snapshot_vm_result r;
    int i, bad = 0;

    for (i = 0; i < n; i++) {
        long length = load(vm, files[i]);

        if (length < 0) {
            bad = 1;
        } else if (snapshot_vm_run(vm, length, NULL, &r) < 0) {
            return complain(files[i]);
        } else {
            tell_result(files[i], &r);
        }
    }
    return bad;
}

static int measure(struct snapshot_vm *vm, const char *file, double limit)
{
    long length = load(vm, file), runs = 0;
    double start = seconds(), now = start;
    struct snapshot_vm_result r;
    uint64_t in_guest = 0;

    if (length < 0) {
        return 1;
    }
    do {
        if (snapshot_vm_run(vm, length, NULL, &r) < 0) {
            return complain(file);
        }
        in_guest += r.host_ns;
        if (++runs % 64 == 0) {
            now = seconds();
        }
    } while (now < start + limit);
    printf("%.0f runs a second, %.1f us of each in the guest\n",
           runs / (seconds() - start), in_guest / 1e3 / runs);
    return 0;
}

static int replay_file(struct snapshot_vm *vm, char **args, int n)
{
    const enum replay_how how = n == 1 ? REPLAY_GDB :
        !strcmp(args[1], "--trace") ? REPLAY_TRACE : REPLAY_LOG;
    long length = load(vm, args[0]);
    struct snapshot_vm_result r;

    if (length < 0) {
        return 1;
    }
    if (replay(vm, length, how, n > 2 ? args[2] : NULL, &r) < 0) {
        return complain(args[0]);
    }
    tell_result(args[0], &r);
    return 0;
}

/* Counts are the same for AFL++ if they are of the same of its classes. */
static unsigned class_of(unsigned char n)
{
    return n < 4 ? n : n < 8 ? 4 : n < 16 ? 5 : n < 32 ? 6 : n < 128 ? 7 : 8;
}

static int check_coverage(const unsigned char *classes, const bool *vary,
                          size_t size)
{
    size_t i, seen = 0, varied = 0;

    for (i = 0; i < size; i++) {
        seen += classes[i] || vary[i];
        varied += vary[i];
    }
    if (!size) {
        printf("NO COVERAGE: the guest registers no region for it, and the "
               "description has no \"coverage = tcg\"\n");
    } else if (!seen) {
        printf("EMPTY COVERAGE: nothing is counted in its %zu bytes\n", size);
    } else if (varied) {
        printf("UNSTABLE COVERAGE: %zu of %zu edges differ between runs of "
               "the same input, stability is %.1f %%\n", varied, seen,
               100.0 * (seen - varied) / seen);
    } else {
        printf("coverage: %zu edges, the same in each run\n", seen);
    }
    return !seen || varied;
}

static int check(struct snapshot_vm *vm, const char *file)
{
    const size_t size = snapshot_vm_coverage_size(vm);
    unsigned char *classes = calloc(1, size + 1);
    bool *vary = calloc(size + 1, sizeof(*vary));
    uint64_t least = UINT64_MAX, most = 0;
    long length = file ? load(vm, file) : 0;
    struct snapshot_vm_result r;
    uint32_t result = 0;
    int i, bad = !classes || !vary || length < 0;
    size_t j;

    for (i = 0; i < CHECK_RUNS && !bad; i++) {
        if (snapshot_vm_run(vm, length, NULL, &r) < 0) {
            complain(file ? file : "an empty input");
            bad = 1;
            break;
        }
        least = r.host_ns < least ? r.host_ns : least;
        most = r.host_ns > most ? r.host_ns : most;
        if (i && r.result != result) {
            printf("UNSTABLE RESULT: %s, then %s\n",
                   snapshot_vm_result_name(result),
                   snapshot_vm_result_name(r.result));
            bad = 1;
        }
        result = r.result;
        for (j = 0; j < size && r.coverage; j++) {
            unsigned char class = class_of(r.coverage[j]);

            vary[j] |= i && class != classes[j];
            classes[j] = class;
        }
    }
    if (!bad) {
        printf("result: %s (%s), %.3f to %.3f ms\n",
               snapshot_vm_result_name(result),
               snapshot_vm_cause_name(r.cause), least / 1e6, most / 1e6);
        bad = result != SNAPSHOT_RESULT_OK;
        bad |= check_coverage(classes, vary, size);
    }
    free(classes);
    free(vary);
    return bad;
}

static int console(const char *path, int instance)
{
    static char buf[64 * 1024];
    struct snapshot_vm_status s;

    if (instance < 0) {
        instance = 0;
    }
    if (snapshot_vm_status(path, instance, &s) <= 0) {
        fprintf(stderr, "snapshot-vm: %s: no instance %d\n", path, instance);
        return 1;
    }
    fwrite(buf, 1, snapshot_vm_console(s.directory, 0, buf, sizeof(buf)),
           stdout);
    fwrite(buf, 1, snapshot_vm_console(s.directory, 1, buf, sizeof(buf)),
           stderr);
    return 0;
}

static int with_vm(const char *command, char **args, int n, double limit)
{
    struct snapshot_vm *vm = snapshot_vm_open(args[0], -1, 0);
    int ret;

    if (!vm) {
        return complain(args[0]);
    }
    if (!strcmp(command, "run")) {
        ret = run_files(vm, args + 1, n - 1);
    } else if (!strcmp(command, "replay")) {
        ret = replay_file(vm, args + 1, n - 1);
    } else if (!strcmp(command, "check")) {
        ret = check(vm, args[1]);
    } else {
        ret = measure(vm, args[1], limit);
    }
    snapshot_vm_close(vm);
    return ret;
}

int main(int argc, char **argv)
{
    const char *command = argc > 2 ? argv[1] : "";
    const bool has_instance = !strcmp(command, "start") ||
        !strcmp(command, "console") || !strcmp(command, "stop");
    double instance = -1, limit = 5;

    if (has_instance && argc == 4 &&
        (!number(argv[3], 0, SNAPSHOT_VM_INSTANCES - 1, &instance) ||
         instance != (int)instance)) {
        fprintf(stderr, "snapshot-vm: \"%s\" is no instance: they are 0 to "
                "%d\n", argv[3], SNAPSHOT_VM_INSTANCES - 1);
        return 2;
    }
    if (!strcmp(command, "measure") && argc == 5 &&
        !number(argv[4], 0, 86400, &limit)) {
        fprintf(stderr, "snapshot-vm: \"%s\" is no time: it is a number of "
                "seconds up to 86400\n", argv[4]);
        return 2;
    }
    snapshot_vm_on_wait(tell);
    if (!strcmp(command, "start") && argc == 5 && !strcmp(argv[3], "-n")) {
        if (!number(argv[4], 1, SNAPSHOT_VM_INSTANCES, &instance) ||
            instance != (int)instance) {
            fprintf(stderr, "snapshot-vm: \"%s\" is no number of instances: "
                    "they are 1 to %d\n", argv[4], SNAPSHOT_VM_INSTANCES);
            return 2;
        }
        return start_many(argv[2], instance);
    }
    if (!strcmp(command, "start") && argc < 5) {
        return start(argv[2], instance);
    }
    if (!strcmp(command, "status") && argc == 3) {
        return status(argv[2]);
    }
    if (!strcmp(command, "console") && argc < 5) {
        return console(argv[2], instance);
    }
    if (!strcmp(command, "stop") && argc < 5) {
        int n = snapshot_vm_stop(argv[2], instance);

        if (n >= 0) {
            printf("%d ended\n", n);
        }
        return n < 0 ? complain(argv[2]) : 0;
    }
    if ((!strcmp(command, "run") && argc > 3) ||
        (!strcmp(command, "replay") &&
         (argc == 4 || (argc == 6 && (!strcmp(argv[4], "--trace") ||
                                      !strcmp(argv[4], "--log"))))) ||
        (!strcmp(command, "check") && (argc == 3 || argc == 4)) ||
        (!strcmp(command, "measure") && (argc == 4 || argc == 5))) {
        return with_vm(command, argv + 2, argc - 2, limit);
    }
    fputs(usage, stderr);
    return 2;
}
