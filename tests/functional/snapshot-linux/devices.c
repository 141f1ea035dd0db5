/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Keep devices busy, and see that each of them still does what it should
 *
 *     devices KIND=WHERE[:OPTION] ...
 *
 * Each argument is a task in a process of its own, which goes through rounds
 * for ever and fails if it reads something wrong. The host asks for the number
 * of rounds over the second serial line: "TOKEN\n" is answered with the token
 * and a number for each task, "stop\n" with the end of it all. So it can see
 * which devices work after a restore. What is lost because the world outside
 * did not go back, such as a packet, is asked for again.
 */

#define _GNU_SOURCE     /* O_DIRECT */

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "snapshot.h"

#define GOLDEN          UINT64_C(0x9e3779b97f4a7c15)
#define MAX_TASKS       24

/* What a task tells its parent; in shared memory, and so part of the machine */
typedef struct Task {
    char *kind, *where, *option;
    pid_t group;
    uint64_t rounds;
    char failed[120];
} Task;

static Task *tasks;
static int nr_tasks;
static Task *task;              /* that of this process */

static void __attribute__((format(printf, 1, 2), noreturn))
fail(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(task->failed, sizeof(task->failed), fmt, ap);
    va_end(ap);
    for (;;) {
        pause();                /* for the parent to tell */
    }
}

#define CHECK(what) \
    ((what) ? (void)0 : fail("%s (%s)", #what, strerror(errno)))

static void round_done(void)
{
    __atomic_add_fetch(&task->rounds, 1, __ATOMIC_RELAXED);
}

/* Open the first file that matches, once it is there. */
static int open_device(const char *pattern, int flags)
{
    glob_t paths;
    int fd, i;

    /* A driver may still be looking at what there is on its bus. */
    for (i = 0; i < 1200; i++) {
        if (!glob(pattern, 0, NULL, &paths)) {
            fd = open(paths.gl_pathv[0], flags);
            globfree(&paths);
            if (fd >= 0) {
                return fd;
            }
        }
        usleep(50000);
    }
    fail("open %s (%s)", pattern, strerror(errno));
}

/* Word i of a disk, or of a stream, is this. */
static bool words_are_right(const uint64_t *words, size_t bytes, uint64_t first)
{
    size_t i;

    for (i = 0; i < bytes / 8; i++) {
        if (words[i] != (first + i) * GOLDEN) {
            return false;
        }
    }
    return true;
}

/* Reads at random places, four at a time, none of them from a cache */
static void task_disk(void)
{
    enum { CHUNK = 32768, READS = 16, PROCESSES = 4 };
    int fd = open_device(task->where, O_RDONLY | O_DIRECT);
    uint64_t size = lseek(fd, 0, SEEK_END), at;
    uint64_t *buf;
    int i;

    CHECK(size >= CHUNK);
    for (i = 1; i < PROCESSES && fork(); i++) {
        continue;
    }
    srandom(i);
    CHECK(!posix_memalign((void **)&buf, 4096, CHUNK));
    for (;;) {
        for (i = 0; i < READS; i++) {
            at = random() % (size / CHUNK) * CHUNK;
            CHECK(pread(fd, buf, CHUNK, at) == CHUNK);
            if (!words_are_right(buf, CHUNK, at / 8)) {
                fail("wrong data at %" PRIu64, at);
            }
        }
        round_done();
    }
}

/* A socket that uses this network card only */
static int open_socket(int type, int timeout_ms)
{
    struct timeval t = { .tv_usec = timeout_ms * 1000 };
    struct sockaddr_in to = { .sin_family = AF_INET };
    int fd = socket(AF_INET, type, 0);
    char net[16];

    CHECK(fd >= 0);
    CHECK(!setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, task->where,
                      strlen(task->where) + 1));
    CHECK(!setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof(t)));
    CHECK(!setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof(t)));
    /* ethN has the network 10.N.0.0 */
    snprintf(net, sizeof(net), "10.%d.0.2", atoi(task->where + 3));
    to.sin_addr.s_addr = inet_addr(net);
    to.sin_port = htons(atoi(task->option));
    if (connect(fd, (struct sockaddr *)&to, sizeof(to))) {
        close(fd);
        return -1;
    }
    return fd;
}

static void up_network(void)
{
    char command[200], path[64];

    snprintf(path, sizeof(path), "/sys/class/net/%s/address", task->where);
    close(open_device(path, O_RDONLY));
    snprintf(command, sizeof(command), "ip addr add 10.%d.0.15/24 dev %s 2>&-; "
             "ip link set %s up", atoi(task->where + 3), task->where,
             task->where);
    CHECK(!system(command));
}

/* Eight packets at a time, echoed by the host */
static void task_udp(void)
{
    enum { PACKETS = 8, WORDS = 120 };
    uint64_t packet[WORDS], next = 0;
    int fd = -1, i, got;

    up_network();
    while (fd < 0) {
        fd = open_socket(SOCK_DGRAM, 200);
    }
    for (;;) {
        for (i = 0; i < PACKETS; i++, next++) {
            packet[0] = next;
            for (int w = 1; w < WORDS; w++) {
                packet[w] = (next + w) * GOLDEN;
            }
            send(fd, packet, sizeof(packet), 0);
        }
        for (got = 0; got < PACKETS; got++) {
            ssize_t len = recv(fd, packet, sizeof(packet), 0);

            if (len < 0) {
                break;          /* lost */
            }
            CHECK(len == sizeof(packet));
            if (!words_are_right(packet + 1, len - 8, packet[0] + 1)) {
                fail("wrong data in packet %" PRIu64, packet[0]);
            }
        }
        if (got == PACKETS) {
            round_done();
        }
    }
}

/* Downloads, each over a connection of its own */
static void task_tcp(void)
{
    enum { BYTES = 256 << 10 };
    static uint64_t data[BYTES / 8];

    up_network();
    for (;;) {
        int fd = open_socket(SOCK_STREAM, 300);
        size_t have = 0;
        ssize_t len;

        if (fd < 0) {
            continue;
        }
        do {
            len = recv(fd, (char *)data + have, BYTES - have, 0);
            have += len > 0 ? len : 0;
        } while (len > 0 && have < BYTES);
        close(fd);
        if (!words_are_right(data, have, 0)) {
            fail("wrong data in %zu bytes", have);
        }
        if (have == BYTES) {
            round_done();
        }
    }
}

/* Records through a port, echoed by the host */
static void task_serial(void)
{
    enum { WORDS = 64 };
    uint64_t out[WORDS], in[WORDS * 2], next = 0;
    int fd = open_device(task->where, O_RDWR | O_NONBLOCK);
    struct pollfd p = { .fd = fd, .events = POLLIN };
    struct termios tty;

    if (!tcgetattr(fd, &tty)) {
        cfmakeraw(&tty);
        tcsetattr(fd, TCSANOW, &tty);
    }
    for (;; next++) {
        const char *from = (char *)out;
        size_t have = 0, left = sizeof(out);
        bool echoed = false;

        for (int w = 0; w < WORDS; w++) {
            out[w] = (next + w) * GOLDEN;
        }
        while (left) {
            ssize_t n = write(fd, from, left);

            if (n > 0) {
                from += n;
                left -= n;
            } else {
                usleep(1000);
            }
        }
        while (!echoed && poll(&p, 1, 300) == 1) {
            ssize_t n = read(fd, (char *)in + have, sizeof(in) - have);

            if (n <= 0) {
                usleep(1000);   /* nobody has opened the host's end yet */
                continue;
            }
            have += n;
            echoed = memmem(in, have, out, sizeof(out));
            if (have == sizeof(in)) {
                /* What is older than the record may go. */
                memmove(in, in + WORDS, sizeof(out));
                have = sizeof(out);
            }
        }
        if (echoed) {
            round_done();
        }
    }
}

/* A source of random numbers does not repeat itself. */
static void task_rng(void)
{
    uint64_t last[4] = { 0 }, now[4];
    int fd = open_device(task->where, O_RDONLY);

    for (;;) {
        CHECK(read(fd, now, sizeof(now)) == sizeof(now));
        CHECK(memcmp(now, last, sizeof(now)));
        memcpy(last, now, sizeof(now));
        round_done();
    }
}

/* Open the one of /dev/WHAT0, 1, ... whose name in /sys begins so. */
static int open_by_name(const char *what, const char *sys, int flags)
{
    char path[80], name[80];
    int round, i;

    for (round = 0; round < 1200; round++) {
        for (i = 0; i < 16; i++) {
            FILE *f;

            snprintf(path, sizeof(path), sys, i);
            f = fopen(path, "r");
            if (f && fgets(name, sizeof(name), f) &&
                !strncmp(name, task->where, strlen(task->where))) {
                fclose(f);
                snprintf(path, sizeof(path), "/dev/%s%d", what, i);
                return open_device(path, flags);
            }
            if (f) {
                fclose(f);
            }
        }
        usleep(50000);
    }
    fail("no %s of the name %s", what, task->where);
}

/* The host moves the pointers, and presses a key, all the time. */
static void task_input(void)
{
    struct { struct timeval time; uint16_t type, code; int32_t value; } event;
    int fd = open_by_name("input/event", "/sys/class/input/event%d/device/name",
                          O_RDONLY);

    for (;;) {
        CHECK(read(fd, &event, sizeof(event)) == sizeof(event));
        if (event.type == 3 /* EV_ABS */ && event.code < 2) {
            CHECK(event.value >= 0 && event.value < 32768);
        }
        if (event.type) {
            round_done();
        }
    }
}

/*
 * Sound goes out as fast as it shall, and comes in, but not where the driver
 * has a + before its name. The driver gives up a codec
 * that does not answer at once, which happens if the host is busy.
 */
static void task_sound(void)
{
    static char buf[9600];
    char command[80];
    const char *driver = task->option + (*task->option == '+');
    bool records = driver == task->option;
    int fd, v;

    snprintf(command, sizeof(command), "modprobe -r %s; modprobe %s",
             driver, driver);
    for (v = 0; v < 10 && access(task->where, F_OK); v++) {
        sleep(v);
        if (v > 1 && access(task->where, F_OK)) {
            CHECK(!system(command));
        }
    }
    fd = open_device(task->where, records ? O_RDWR : O_WRONLY);

    v = 16;                     /* AFMT_S16_LE */
    CHECK(!ioctl(fd, _IOWR('P', 5, int), &v) && v == 16);
    v = 2;
    CHECK(!ioctl(fd, _IOWR('P', 6, int), &v) && v == 2);
    v = 48000;
    CHECK(!ioctl(fd, _IOWR('P', 2, int), &v) && v == 48000);
    for (;;) {
        CHECK(write(fd, buf, sizeof(buf)) == sizeof(buf));
        CHECK(!records || read(fd, buf, sizeof(buf)) == sizeof(buf));
        round_done();
    }
}

/* The lower part of a screen, painted in one colour after the other */
static void task_screen(void)
{
    struct {
        uint32_t xres, yres, virtual[2], offset[2], bits_per_pixel, rest[33];
    } var;
    int fd = open_device(task->where, O_RDWR);
    uint32_t colour = 0;
    size_t size, i;             /* in words, of a quarter */
    uint32_t *p;

    CHECK(!ioctl(fd, 0x4600 /* FBIOGET_VSCREENINFO */, &var));
    size = (size_t)var.xres * var.yres * (var.bits_per_pixel / 8) / 16;
    p = mmap(NULL, size * 16, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(p != MAP_FAILED);
    p += size * 3;              /* The console's cursor blinks further up. */
    for (;;) {
        colour += 0x01030507;
        for (i = 0; i < size; i++) {
            p[i] = colour;
        }
        for (i = 0; i < size; i++) {
            CHECK(p[i] == colour);
        }
        usleep(20000);
        round_done();
    }
}

/* A byte of an EEPROM on the SMBus, which is written to and read back */
static void task_smbus(void)
{
    union { uint8_t byte; uint16_t word; uint8_t block[34]; } data;
    struct {
        uint8_t read_write, command;
        uint32_t size;
        void *data;
    } access = { .size = 2 /* byte data */, .data = &data };
    int fd = open_by_name("i2c-", "/sys/class/i2c-dev/i2c-%d/name", O_RDWR);
    uint8_t n;

    CHECK(!ioctl(fd, 0x0706 /* I2C_SLAVE_FORCE */, 0x50));
    for (n = 0;; n++) {
        access.command = n * 3;
        access.read_write = 0;
        data.byte = n;
        CHECK(!ioctl(fd, 0x0720 /* I2C_SMBUS */, &access));
        access.read_write = 1;
        CHECK(!ioctl(fd, 0x0720, &access));
        CHECK(data.byte == n);
        round_done();
    }
}

/* The memory that a balloon leaves goes up and down with the host's wishes. */
static void task_balloon(void)
{
    char line[80];
    long last = 0, now;

    for (;;) {
        FILE *f = fopen("/proc/meminfo", "r");

        CHECK(f && fgets(line, sizeof(line), f));
        CHECK(sscanf(line, "MemTotal: %ld", &now) == 1);
        fclose(f);
        if (now != last) {
            round_done();
        }
        last = now;
        usleep(10000);
    }
}

/* A register of a device, option bytes into BAR 0: does it keep its value? */
static void task_register(void)
{
    volatile uint32_t *reg;     /* each access is one, where it stands */
    uint32_t n, inverted = 0;
    char *bar;
    int fd = open_device(task->where, O_RDWR | O_SYNC);

    bar = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(bar != MAP_FAILED);
    reg = (uint32_t *)(bar + atoi(task->option));
    *reg = 1;
    inverted = *reg ^ 1;        /* edu's gives the complement */
    for (n = 1;; n++) {
        if (*reg != (n ^ inverted)) {
            fail("keeps the state that it has");
        }
        *reg = n + 1;
        usleep(1000);
        round_done();
    }
}

/* A watchdog that has to hear of us, and says that it does */
static void task_watchdog(void)
{
    int fd = open_device(task->where, O_RDWR), v = 2000;

    /* In seconds; the machine may be slow */
    CHECK(!ioctl(fd, _IOWR('W', 6, int) /* WDIOC_SETTIMEOUT */, &v));
    for (;;) {
        CHECK(!ioctl(fd, _IOR('W', 5, int) /* WDIOC_KEEPALIVE */, &v));
        usleep(1000);
        round_done();
    }
}

/* A file of the host's is there, in a directory that the host exports. */
static void task_export(void)
{
    struct stat st;
    char path[64];

    snprintf(path, sizeof(path), "/tmp/%s", task->option);
    CHECK(!mount(task->where, "/tmp", "9p", MS_RDONLY,
                 "trans=virtio,version=9p2000.L"));
    for (;;) {
        CHECK(!stat(path, &st));
        usleep(1000);
        round_done();
    }
}

/* Send a command to a TPM; the length of the answer, without its header. */
static ssize_t tpm(int fd, void *command, size_t length, uint8_t *answer)
{
    uint32_t code;
    ssize_t got;

    CHECK(write(fd, command, length) == (ssize_t)length);
    got = read(fd, answer, 512);
    CHECK(got >= 10);
    memcpy(&code, answer + 6, sizeof(code));
    if (code) {
        fail("the TPM says 0x%x", ntohl(code));
    }
    memmove(answer, answer + 10, got - 10);
    return got - 10;
}

/* A register of a TPM changes when it is extended, and at no other time. */
static void task_tpm(void)
{
    static uint8_t extend[65] = {
        0x80, 0x02, 0, 0, 0, 65, 0, 0, 0x01, 0x82,      /* PCR_Extend */
        0, 0, 0, 16, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0,
        0, 0, 0, 1, 0, 11,                              /* by a SHA-256 */
    };
    static uint8_t read[20] = {
        0x80, 0x01, 0, 0, 0, 20, 0, 0, 0x01, 0x7e,      /* PCR_Read */
        0, 0, 0, 1, 0, 11, 3, 0, 0, 1,
    };
    int fd = open_device(task->where, O_RDWR);
    uint8_t answer[512], last[32];
    bool first = true, extended = false;

    for (;;) {
        ssize_t length = tpm(fd, read, sizeof(read), answer);
        const uint8_t *now = answer + length - sizeof(last);

        CHECK(length > (ssize_t)sizeof(last));
        if (!first && extended == !memcmp(now, last, sizeof(last))) {
            fail("the register is not as it was");
        }
        memcpy(last, now, sizeof(last));
        first = false;
        extended = !extended;
        if (extended) {
            tpm(fd, extend, sizeof(extend), answer);
        }
        round_done();
    }
}

/* Let the kernel encrypt or decrypt, by the cipher that is bound to a socket */
static void cipher(int fd, bool encrypt, const uint8_t *from, uint8_t *to,
                  size_t length)
{
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(4) + CMSG_SPACE(20)];
    } control = { 0 };
    struct iovec iov = { .iov_base = (void *)from, .iov_len = length };
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1,
        .msg_control = &control, .msg_controllen = sizeof(control),
    };
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

    c->cmsg_level = 279;        /* SOL_ALG */
    c->cmsg_type = 3;           /* ALG_SET_OP */
    c->cmsg_len = CMSG_LEN(4);
    *CMSG_DATA(c) = encrypt;
    c = CMSG_NXTHDR(&msg, c);
    c->cmsg_level = 279;
    c->cmsg_type = 2;           /* ALG_SET_IV: the length, and zeroes */
    c->cmsg_len = CMSG_LEN(20);
    *CMSG_DATA(c) = 16;
    CHECK(sendmsg(fd, &msg, 0) == (ssize_t)length);
    CHECK(read(fd, to, length) == (ssize_t)length);
}

/* What is encrypted comes back, with one key after the other. */
static void task_crypto(void)
{
    struct {
        uint16_t family;
        char type[14];
        uint32_t feature, mask;
        char name[64];
    } addr = { 38 /* AF_ALG */, "skcipher", 0, 0, "virtio_crypto_aes_cbc" };
    static uint8_t plain[4096], secret[4096], again[4096];
    uint8_t key[16];
    int fd, op, i, n;

    for (i = 0; i < 1200; i++) {
        fd = socket(addr.family, SOCK_SEQPACKET, 0);
        CHECK(fd >= 0);
        if (!bind(fd, (struct sockaddr *)&addr, sizeof(addr))) {
            break;              /* The driver is there. */
        }
        close(fd);
        usleep(50000);
    }
    CHECK(i < 1200);
    for (n = 0;; n++) {
        memset(key, n, sizeof(key));
        CHECK(!setsockopt(fd, 279, 1 /* ALG_SET_KEY */, key, sizeof(key)));
        op = accept(fd, NULL, NULL);
        CHECK(op >= 0);
        for (i = 0; i < 8; i++) {
            memset(plain, n + i, sizeof(plain));
            cipher(op, true, plain, secret, sizeof(plain));
            CHECK(memcmp(plain, secret, sizeof(plain)));
            cipher(op, false, secret, again, sizeof(plain));
            CHECK(!memcmp(plain, again, sizeof(plain)));
        }
        close(op);
        round_done();
    }
}

/* Each other task goes on from where it was. */
static void wait_for_others(void)
{
    uint64_t from[MAX_TASKS];
    int i, round;

    for (i = 0; i < nr_tasks; i++) {
        from[i] = tasks[i].rounds;
    }
    for (i = 0; i < nr_tasks; i++) {
        for (round = 0; &tasks[i] != task && tasks[i].rounds == from[i] &&
                        !tasks[i].failed[0]; round++) {
            if (round == 30000) {
                fail("%s %s stands still", tasks[i].kind, tasks[i].where);
            }
            usleep(1000);
        }
    }
}

/* The machine is restored, so many times, by the machine itself. */
static void task_restore(void)
{
    struct snapshot s;
    int64_t n;

    CHECK(snapshot_open(&s) == 0);
    wait_for_others();
    n = snapshot_save(&s, 0);
    if (n < 0) {
        fail("save: %s", snapshot_strerror(n));
    }
    wait_for_others();
    if (n < atoi(task->where)) {
        usleep(n * 7919 % 10000);
        fail("restore: %s", snapshot_strerror(snapshot_restore(&s, 0)));
    }
    for (;;) {
        usleep(1000);
        round_done();
    }
}

static const struct {
    const char *kind;
    void (*run)(void);
} kinds[] = {
    { "disk", task_disk },
    { "udp", task_udp },
    { "tcp", task_tcp },
    { "serial", task_serial },
    { "rng", task_rng },
    { "input", task_input },
    { "sound", task_sound },
    { "screen", task_screen },
    { "smbus", task_smbus },
    { "balloon", task_balloon },
    { "register", task_register },
    { "export", task_export },
    { "tpm", task_tpm },
    { "watchdog", task_watchdog },
    { "crypto", task_crypto },
    { "restore", task_restore },
};

static void start(Task *t, char *arg)
{
    unsigned i;
    pid_t group;
    char *c;

    /* The kernel's command line has no place for blanks. */
    for (c = arg; *c; c++) {
        *c = *c == '_' ? ' ' : *c;
    }
    t->kind = strsep(&arg, "=");
    t->where = arg;
    t->option = arg ? strrchr(arg, ':') : NULL;
    if (t->option) {
        *t->option++ = '\0';
    }
    for (i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
        if (strcmp(kinds[i].kind, t->kind) || !t->where) {
            continue;
        }
        group = fork();
        if (!group) {
            task = t;
            setpgid(0, 0);
            kinds[i].run();
        }
        setpgid(group, group);
        t->group = group;
    }
}

/* A kernel that turns the machine off shall not have to do with their work. */
static void end_tasks(void)
{
    int i;

    for (i = 0; i < nr_tasks; i++) {
        if (tasks[i].group > 0) {
            kill(-tasks[i].group, SIGKILL);
        }
    }
    while (wait(NULL) > 0 || errno == EINTR) {
        continue;
    }
}

static void answer(FILE *line, const char *token)
{
    int i;

    fprintf(line, "%s", token);
    for (i = 0; i < nr_tasks; i++) {
        if (tasks[i].failed[0]) {
            fprintf(line, ";FAILED %s", tasks[i].failed);
        } else {
            fprintf(line, ";%" PRIu64, tasks[i].rounds);
        }
    }
    fprintf(line, "\n");
}

int main(int argc, char **argv)
{
    FILE *in = fopen("/dev/ttyS1", "r"), *out = fopen("/dev/ttyS1", "w");
    struct termios tty;
    char token[64];
    int i;

    tasks = mmap(NULL, MAX_TASKS * sizeof(Task), PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    nr_tasks = argc - 1;
    if (tasks == MAP_FAILED || !in || !out || argc > MAX_TASKS ||
        tcgetattr(fileno(in), &tty)) {
        perror("devices");
        return 1;
    }
    tty.c_lflag &= ~ECHO;
    tty.c_oflag &= ~OPOST;
    tcsetattr(fileno(in), TCSANOW, &tty);
    for (i = 1; i < argc; i++) {
        start(&tasks[i - 1], argv[i]);
    }
    printf("devices: go\n");
    fflush(stdout);
    while (fgets(token, sizeof(token), in)) {
        token[strcspn(token, "\n")] = '\0';
        if (!strcmp(token, "stop")) {
            end_tasks();
            return 0;
        }
        answer(out, token);
        fflush(out);
    }
    return 1;
}
