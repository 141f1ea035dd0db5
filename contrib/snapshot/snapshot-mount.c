/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Runs for a program on the host, each of which mounts its input
 *
 *     snapshot-mount [-w] [-s SIZE] [-o OPTIONS] TYPE
 *
 * The input is the image of a file system of this TYPE, such as vfat. It is
 * mounted, looked at and unmounted. What comes to light is in the kernel: a
 * panic ends the run, and so does an oops with "oops=panic" on the kernel's
 * command line. Give QEMU -device pvpanic, and the guest the module
 * pvpanic-mmio, for a panic to be told as one.
 *
 * -w           mount it writable, and change files, too
 * -s SIZE      of the device, in bytes, 64 KiB by default; what an input is
 *              shorter reads zero
 * -o OPTIONS   for mount(2), such as errors=continue
 *
 * The input's memory is a file, which a loop device is set up with before the
 * first run: nothing is copied in a run, and no process is started.
 */

#define _GNU_SOURCE

#include <stdbool.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/xattr.h>

#include "snapshot.h"

/* Whatever an image says, a run has an end. */
#define DEPTH_MAX       4
#define ENTRIES_MAX     64

/* As in <linux/loop.h>, which musl-gcc does not find */
#define LOOP_SET_FD             0x4c00
#define LOOP_CTL_GET_FREE       0x4c82

#define TEXT_SIZE       4096
#define MOUNTED         "/tmp/snapshot-mount"

struct entry {                  /* as getdents64() has it */
    uint64_t ino;
    int64_t offset;
    uint16_t size;
    uint8_t type;
    char name[];
};

static const char *type, *options;
static bool writable;
static char device[32];
static int loop = -1;
static char *text;

/* Not on the stack, where each level of directories would take another page */
static char buffer[1024];
static struct {
    char bytes[1024];
} __attribute__((aligned(8))) levels[DEPTH_MAX];

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "snapshot-mount: %s: %s\n", what, why);
    exit(1);
}

/* ------------------------------------------------------ what a run looks at */

static void look_at_file(int fd)
{
    const off_t begin = 4 * sizeof(buffer), end = lseek(fd, 0, SEEK_END);
    off_t at;

    for (at = 0; at < begin; at += sizeof(buffer)) {
        if (pread(fd, buffer, sizeof(buffer), at) <= 0) {
            break;
        }
    }
    /* The end may be stored in another way. */
    if (end > begin + (off_t)sizeof(buffer)) {
        at = pread(fd, buffer, sizeof(buffer), end - sizeof(buffer));
    }
    if (writable && pwrite(fd, "snapshot", 8, 0) == 8) {
        fsync(fd);
    }
}

static void look_at_directory(int fd, unsigned depth, unsigned *left);

static void look_at(int directory, const char *name, unsigned depth,
                    unsigned *left)
{
    char link[64];
    struct stat st;
    int fd;

    if (fstatat(directory, name, &st, AT_SYMLINK_NOFOLLOW) < 0) {
        return;
    }
    if (S_ISLNK(st.st_mode) &&
        readlinkat(directory, name, link, sizeof(link)) < 0) {
        return;
    }
    if (!S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) {
        return;                 /* a FIFO would wait, a device is another's */
    }
    fd = openat(directory, name, (writable && S_ISREG(st.st_mode) ? O_RDWR :
                                  O_RDONLY) | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) {
        return;
    }
    if (flistxattr(fd, buffer, sizeof(buffer)) > 0) {
        fgetxattr(fd, buffer, link, sizeof(link));
    }
    if (S_ISREG(st.st_mode)) {
        look_at_file(fd);
    } else if (depth + 1 < DEPTH_MAX) {
        look_at_directory(fd, depth + 1, left);
    }
    close(fd);
}

static void look_at_directory(int fd, unsigned depth, unsigned *left)
{
    char *bytes = levels[depth].bytes;
    long n, i;

    while (*left && (n = syscall(SYS_getdents64, fd, bytes,
                                 sizeof(levels[depth].bytes))) > 0) {
        for (i = 0; i < n && *left; ) {
            struct entry *e = (struct entry *)(bytes + i);

            i += e->size;
            if (strcmp(e->name, ".") && strcmp(e->name, "..")) {
                --*left;
                look_at(fd, e->name, depth, left);
            }
        }
    }
}

static void change(int root)
{
    int fd = openat(root, "snapshot.new", O_RDWR | O_CREAT, 0644);

    if (fd >= 0) {
        if (write(fd, buffer, sizeof(buffer)) > 0) {
            fsync(fd);
        }
        close(fd);
    }
    if (!mkdirat(root, "snapshot.dir", 0755)) {
        renameat(root, "snapshot.new", root, "snapshot.dir/new");
    }
    unlinkat(root, "snapshot.new", 0);
}

/* Returns: false if it was not mounted */
static bool run(void)
{
    unsigned left = ENTRIES_MAX;
    struct statfs fs;
    int root;

    if (mount(device, MOUNTED, type, writable ? 0 : MS_RDONLY, options) < 0) {
        snprintf(text, TEXT_SIZE, "mount: %s", strerror(errno));
        return false;
    }
    root = open(MOUNTED, O_RDONLY | O_DIRECTORY);
    if (root >= 0) {
        look_at_directory(root, 0, &left);
        if (writable) {
            change(root);
        }
        fstatfs(root, &fs);
        close(root);
    }
    if (umount2(MOUNTED, 0) < 0) {
        snprintf(text, TEXT_SIZE, "umount: %s", strerror(errno));
    } else {
        snprintf(text, TEXT_SIZE, "%u entries", ENTRIES_MAX - left);
    }
    return true;
}

/* --------------------------------------------------------- before the first */

/* Memory that is a loop device's */
static unsigned char *make_device(size_t size)
{
    int file = memfd_create("image", MFD_CLOEXEC);
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    unsigned char *image;
    int n;

    if (file < 0 || ftruncate(file, size) < 0) {
        fail("memory for the image", strerror(errno));
    }
    image = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (image == MAP_FAILED || mlock(image, size) < 0) {
        fail("memory for the image", strerror(errno));
    }
    memset(image, 0, size);
    n = control < 0 ? -1 : ioctl(control, LOOP_CTL_GET_FREE);
    if (n < 0) {
        fail("/dev/loop-control (is the module \"loop\" there?)",
             strerror(errno));
    }
    close(control);
    snprintf(device, sizeof(device), "/dev/loop%d", n);
    loop = open(device, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (loop < 0 || ioctl(loop, LOOP_SET_FD, file) < 0) {
        fail(device, strerror(errno));
    }
    return image;
}

/* Let what is done once only, in the kernel and here, be done before READY. */
static void warm_up(void)
{
    const char *wanted = type;

    run();                              /* of zeroes: not one is valid */
    type = "tmpfs";
    if (!run()) {
        fail("tmpfs on " MOUNTED, text);
    }
    type = wanted;
    *text = 0;
    /* What the kernel has read of the device, and keeps, is not the input. */
    if (ioctl(loop, BLKFLSBUF) < 0) {
        fail(device, strerror(errno));
    }
}

static bool known(void)
{
    char line[128];
    FILE *f = fopen("/proc/filesystems", "re");
    bool found = false;

    while (f && !found && fgets(line, sizeof(line), f)) {
        char *name = strrchr(line, '\t');

        line[strcspn(line, "\n")] = 0;
        found = name && !strcmp(name + 1, type);
    }
    if (f) {
        fclose(f);
    }
    return found;
}

int main(int argc, char **argv)
{
    size_t size = 64 * 1024;
    struct snapshot s;
    unsigned char *image;
    int64_t n;
    int c;

    while ((c = getopt(argc, argv, "ws:o:")) != -1) {
        switch (c) {
        case 'w':
            writable = true;
            break;
        case 's':
            size = (atol(optarg) + 4095) & ~4095ul;
            break;
        case 'o':
            options = optarg;
            break;
        default:
            argc = 0;
        }
    }
    if (argc != optind + 1 || !size) {
        fprintf(stderr, "usage: snapshot-mount [-w] [-s SIZE] [-o OPTIONS] "
                "TYPE\n");
        return 2;
    }
    type = argv[optind];
    if (!known()) {
        fail(type, "the kernel has no such file system: load its module");
    }
    text = snapshot_memory(TEXT_SIZE);
    if (!text || (mkdir(MOUNTED, 0700) < 0 && errno != EEXIST)) {
        fail(MOUNTED, strerror(errno));
    }
    image = make_device(size);
    warm_up();
    n = snapshot_open(&s);
    if (n >= 0) {
        snapshot_region(&s, SNAPSHOT_REGION_TEXT, text, TEXT_SIZE);
        n = snapshot_fuzz(&s, image, size, NULL, 0);
    }
    if (n >= 0) {
        /* What the kernel does not take, it has processed as well. */
        run();
        n = snapshot_done(&s, SNAPSHOT_RESULT_OK);
    }
    fail("snapshot", snapshot_strerror(n));
}
