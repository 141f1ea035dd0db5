/* SPDX-License-Identifier: MIT */
/*
 * A Linux guest saves and restores itself: C API of "-device snapshot"
 *
 *     struct snapshot s;
 *     int64_t n;
 *
 *     if (snapshot_open(&s) < 0) ...
 *     n = snapshot_save(&s, 0);
 *     if (n < 0)  ... failed: snapshot_strerror(n) says why
 *     if (n == 0) ... just saved
 *     else        ... a restore, the n-th, brought us back to here
 *     ...
 *     snapshot_restore(&s, 0);     does not return, but for an error
 *
 * It is setjmp() and longjmp(), but the whole machine jumps: this process and
 * every other, the kernel, RAM, all vCPUs, devices, timers and the clock go
 * back. So, unlike with setjmp(), each variable has the value it had at the
 * save. What has left the machine, such as text on the serial line, stays out.
 * What was still on its way at the save (in a stdio buffer, in the tty) goes
 * out again after each restore: flush and drain first, as demo.c does.
 *
 * Only the device's registers do not go back. One of them, ARGUMENT, is the
 * guest's to use: the word through which it remembers something across.
 *
 * The device has one SLOT register: its users must take turns. A program that
 * calls from several threads or processes needs a lock around each call; held
 * at a save, such a lock is held again after each restore.
 *
 * A program that a fuzzer on the host gives inputs to (host/README.rst) has
 * this loop, which goes back to its first line by itself:
 *
 *     input = snapshot_memory(size);
 *     map = snapshot_memory(65536);
 *     n = snapshot_fuzz(&s, input, size, map, 65536);
 *     if (n < 0)  ... failed
 *     try_input(input, n);         counts its branches in map
 *     snapshot_done(&s, SNAPSHOT_RESULT_OK);
 *
 * Functions return a negative number on failure, for snapshot_strerror().
 * Needs root, /sys, and nothing but the C library. C or C++.
 */

#ifndef CONTRIB_SNAPSHOT_H
#define CONTRIB_SNAPSHOT_H

#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "hw/misc/snapshot-regs.h"

/* What snapshot_open() can fail with; below, the device's own SNAPSHOT_E_* */
#define SNAPSHOT_E_NO_SYSFS     100     /* no PCI devices in /sys */
#define SNAPSHOT_E_ABSENT       101     /* no snapshot device among them */
#define SNAPSHOT_E_NOT_ROOT     102     /* no right to write to it */
#define SNAPSHOT_E_DISABLED     103     /* could not be enabled */
#define SNAPSHOT_E_LOCKDOWN     104     /* kernel lockdown: no mmap of BARs */
#define SNAPSHOT_E_CLAIMED      105     /* a kernel driver owns the BAR */
#define SNAPSHOT_E_SYSTEM       106     /* anything else: see errno */

struct snapshot {
    unsigned char *bar;         /* the registers, SNAPSHOT_BAR_SIZE bytes */
};

static inline const char *snapshot_strerror(int64_t err)
{
    switch (err < 0 ? -err : err) {
    case 0:
        return "success";
    case SNAPSHOT_E_COMMAND:
        return "the device does not know this command";
    case SNAPSHOT_E_EMPTY:
        return "no snapshot in this slot: save one first";
    case SNAPSHOT_E_SLOT:
        return "no such slot: see -device snapshot,slots=N";
    case SNAPSHOT_E_UNSAVABLE:
        return "this machine cannot be saved: QEMU's output says why";
    case SNAPSHOT_E_CHANGED:
        return "memory or a device was plugged, unplugged or resized since "
               "the save: save again";
    case SNAPSHOT_E_NOMEM:
        return "the host has no memory for it";
    case SNAPSHOT_E_BUSY:
        return "the device is busy with another command: try again";
    case SNAPSHOT_E_CONTROL:
        return "QEMU was started without control=: no host can give inputs";
    case SNAPSHOT_E_REGION:
        return "a buffer is not all in RAM, or longer than the channel";
    case SNAPSHOT_E_RUN:
        return "no run is under way, or the guest is READY already";
    case SNAPSHOT_E_NO_SYSFS:
        return "no /sys/bus/pci/devices: mount -t sysfs sysfs /sys";
    case SNAPSHOT_E_ABSENT:
        return "no snapshot device: start QEMU with -device snapshot";
    case SNAPSHOT_E_NOT_ROOT:
        return "no permission to use the device: run as root";
    case SNAPSHOT_E_DISABLED:
        return "the kernel did not enable the device: see dmesg";
    case SNAPSHOT_E_LOCKDOWN:
        return "kernel lockdown forbids to map the device: turn off secure "
               "boot, or boot without lockdown=";
    case SNAPSHOT_E_CLAIMED:
        return "a driver owns the device: unbind it, or boot with "
               "iomem=relaxed";
    case SNAPSHOT_E_SYSTEM:
        return "system error: see errno";
    default:
        return "unknown error";
    }
}

/*
 * Registers. Volatile makes each access one instruction, as wide as the
 * register: the device knows no other. On a 32-bit machine, 64-bit registers
 * take two: nothing but the guest's own commands changes them.
 */
static inline uint32_t snapshot_get32(const struct snapshot *s, unsigned reg)
{
    /* volatile: one load, where it stands */
    return le32toh(*(volatile uint32_t *)(s->bar + reg));
}

static inline void snapshot_put32(struct snapshot *s, unsigned reg, uint32_t v)
{
    /* volatile: one store, where it stands */
    *(volatile uint32_t *)(s->bar + reg) = htole32(v);
}

static inline uint64_t snapshot_get64(const struct snapshot *s, unsigned reg)
{
#if UINTPTR_MAX > 0xffffffffu
    /* volatile: one load */
    return le64toh(*(volatile uint64_t *)(s->bar + reg));
#else
    uint64_t low = snapshot_get32(s, reg);

    return low | (uint64_t)snapshot_get32(s, reg + 4) << 32;
#endif
}

static inline void snapshot_put64(struct snapshot *s, unsigned reg, uint64_t v)
{
#if UINTPTR_MAX > 0xffffffffu
    /* volatile: one store */
    *(volatile uint64_t *)(s->bar + reg) = htole64(v);
#else
    snapshot_put32(s, reg, (uint32_t)v);
    snapshot_put32(s, reg + 4, (uint32_t)(v >> 32));
#endif
}

/*
 * Give a command and return STATUS as it is right behind it.
 *
 * After a SAVE, execution can arrive at the second line any number of times.
 * The compiler need not know (no returns_twice), as registers and memory are
 * then what they were: for it, the store is a call that changes nothing and
 * the load has a value that it cannot foresee. The barriers make the save
 * fall between the statements where it stands: no variable is written early
 * or late, none is kept from before.
 */
static inline uint32_t snapshot_command(struct snapshot *s, unsigned slot,
                                        uint32_t command)
{
    uint32_t status;

    snapshot_put32(s, SNAPSHOT_REG_SLOT, slot);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    snapshot_put32(s, SNAPSHOT_REG_COMMAND, command);
    status = snapshot_get32(s, SNAPSHOT_REG_STATUS);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return status;
}

/* The error that @status reports; that of a status nobody expects is BUSY */
static inline int snapshot_error(uint32_t status)
{
    if (status & SNAPSHOT_STATUS_ERROR) {
        return -(int)(status & ~SNAPSHOT_STATUS_ERROR);
    }
    return -SNAPSHOT_E_BUSY;
}

/* How many slots there are: 0 to snapshot_slots() - 1 */
static inline uint32_t snapshot_slots(const struct snapshot *s)
{
    return snapshot_get32(s, SNAPSHOT_REG_SLOTS);
}

/* SNAPSHOT_FEATURE_* bits */
static inline uint32_t snapshot_features(const struct snapshot *s)
{
    return snapshot_get32(s, SNAPSHOT_REG_FEATURES);
}

/* The guest's own word, 0 at reset: the only one that no restore reverts */
static inline uint64_t snapshot_argument(const struct snapshot *s)
{
    return snapshot_get64(s, SNAPSHOT_REG_ARGUMENT);
}

static inline void snapshot_set_argument(struct snapshot *s, uint64_t v)
{
    snapshot_put64(s, SNAPSHOT_REG_ARGUMENT, v);
}

/* How often @slot was restored since it was saved */
static inline uint64_t snapshot_restores(struct snapshot *s, unsigned slot)
{
    snapshot_put32(s, SNAPSHOT_REG_SLOT, slot);
    return snapshot_get64(s, SNAPSHOT_REG_RESTORES);
}

/* RAM pages that the last restore put back; 0 if the device counts none */
static inline uint64_t snapshot_pages(const struct snapshot *s)
{
    return snapshot_get64(s, SNAPSHOT_REG_PAGES);
}

/* Nanoseconds of the host's clock that the last restore took */
static inline uint64_t snapshot_nanoseconds(const struct snapshot *s)
{
    return snapshot_get64(s, SNAPSHOT_REG_NANOSECONDS);
}

/*
 * Save the machine in @slot, in place of what is there.
 * Returns 0 when it is saved, and again, with the number of restores so far
 * (from 1 on), each time that it is restored.
 */
static inline int64_t snapshot_save(struct snapshot *s, unsigned slot)
{
    uint32_t status = snapshot_command(s, slot, SNAPSHOT_CMD_SAVE);

    if (status == SNAPSHOT_STATUS_SAVED) {
        return 0;
    }
    if (status == SNAPSHOT_STATUS_RESTORED) {
        return (int64_t)snapshot_restores(s, slot);
    }
    return snapshot_error(status);
}

/* Go back to the save in @slot. Returns only if that failed: an error. */
static inline int snapshot_restore(struct snapshot *s, unsigned slot)
{
    return snapshot_error(snapshot_command(s, slot, SNAPSHOT_CMD_RESTORE));
}

/* Forget the snapshot in @slot and give its memory back to the host */
static inline int snapshot_discard(struct snapshot *s, unsigned slot)
{
    uint32_t status = snapshot_command(s, slot, SNAPSHOT_CMD_DISCARD);

    return status == SNAPSHOT_STATUS_DISCARDED ? 0 : snapshot_error(status);
}

/*
 * Zeroed memory for a region, of whole pages, or NULL. Its pages are there and
 * stay where they are; children share it, so that what a child counts is seen.
 */
static inline void *snapshot_memory(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED) {
        return NULL;
    }
    if (mlock(p, size) < 0) {
        munmap(p, size);
        return NULL;
    }
    memset(p, 0, size);
    return p;
}

/*
 * Tell the device where SNAPSHOT_REGION_* is: memory of snapshot_memory(), or
 * other whose pages are present, and stay, when snapshot_ready() is called
 */
static inline void snapshot_region(struct snapshot *s, unsigned region,
                                   const void *p, size_t size)
{
    snapshot_put32(s, SNAPSHOT_REG_REGION, region);
    snapshot_put64(s, SNAPSHOT_REG_ADDRESS, (uintptr_t)p);
    snapshot_put64(s, SNAPSHOT_REG_LENGTH, size);
}

/*
 * Wait for the next tick of the kernel's clock. Each run begins as the first:
 * if a tick is due 20 us later, it comes in all runs that last longer, and its
 * work, several times as long as a short run, is done and undone each time.
 */
static inline void snapshot_await_tick(void)
{
    struct timespec before, now;
    int failed = clock_gettime(CLOCK_MONOTONIC_COARSE, &before);

    while (!failed) {
        failed = clock_gettime(CLOCK_MONOTONIC_COARSE, &now) ||
            now.tv_nsec != before.tv_nsec;
    }
}

/*
 * Save the machine in @slot and wait for an input. Returns its length, for each
 * input anew.
 */
static inline int64_t snapshot_ready(struct snapshot *s, unsigned slot)
{
    uint32_t status;

    snapshot_await_tick();
    status = snapshot_command(s, slot, SNAPSHOT_CMD_READY);
    if (status != SNAPSHOT_STATUS_RUN) {
        return snapshot_error(status);
    }
    return snapshot_get32(s, SNAPSHOT_REG_INPUT_LENGTH);
}

/*
 * Tell the host SNAPSHOT_RESULT_*, and go back to snapshot_ready(). Returns
 * only if that failed: an error.
 */
static inline int snapshot_done(struct snapshot *s, uint32_t result)
{
    snapshot_put32(s, SNAPSHOT_REG_RESULT, result);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    snapshot_put32(s, SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_DONE);
    return snapshot_error(snapshot_get32(s, SNAPSHOT_REG_STATUS));
}

/*
 * Wait for an input, in slot 0: regions and snapshot_ready() in one. @map, of
 * @map_size bytes, has the counts of branches; NULL if QEMU counts them.
 */
static inline int64_t snapshot_fuzz(struct snapshot *s, void *input,
                                    size_t size, void *map, size_t map_size)
{
    snapshot_region(s, SNAPSHOT_REGION_INPUT, input, size);
    snapshot_region(s, SNAPSHOT_REGION_COVERAGE, map, map ? map_size : 0);
    return snapshot_ready(s, 0);
}

/* The number in sysfs file @name of PCI device @dev, or -1 */
static inline int snapshot_sysfs(const char *dev, const char *name)
{
    char path[512];
    int value = -1;
    FILE *f;

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/%s", dev, name);
    f = fopen(path, "re");
    if (f) {
        if (fscanf(f, "%i", &value) != 1) {
            value = -1;
        }
        fclose(f);
    }
    return value;
}

/* Let PCI device @dev answer to its addresses: no driver has done so */
static inline int snapshot_enable(const char *dev)
{
    char path[512];
    ssize_t len;
    int fd;

    if (snapshot_sysfs(dev, "enable") > 0) {
        return 0;
    }
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/enable", dev);
    fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) {
        return errno == EACCES || errno == EPERM ? -SNAPSHOT_E_NOT_ROOT
                                                 : -SNAPSHOT_E_SYSTEM;
    }
    len = write(fd, "1", 1);
    close(fd);
    return len == 1 ? 0 : -SNAPSHOT_E_DISABLED;
}

/* Map the registers of PCI device @dev */
static inline int snapshot_map(struct snapshot *s, const char *dev)
{
    char path[512];
    void *bar;
    int fd;

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/resource%d", dev,
             SNAPSHOT_BAR);
    fd = open(path, O_RDWR | O_SYNC | O_CLOEXEC);
    if (fd < 0) {
        if (errno == EPERM && geteuid() == 0) {
            return -SNAPSHOT_E_LOCKDOWN;
        }
        return errno == EACCES || errno == EPERM ? -SNAPSHOT_E_NOT_ROOT
                                                 : -SNAPSHOT_E_SYSTEM;
    }
    bar = mmap(NULL, SNAPSHOT_BAR_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
               fd, 0);
    close(fd);
    if (bar == MAP_FAILED) {
        return errno == EPERM ? -SNAPSHOT_E_LOCKDOWN
             : errno == EINVAL ? -SNAPSHOT_E_CLAIMED : -SNAPSHOT_E_SYSTEM;
    }
    s->bar = (unsigned char *)bar;
    return 0;
}

/* Find the snapshot device, enable it and map its registers */
static inline int snapshot_open(struct snapshot *s)
{
    DIR *dir = opendir("/sys/bus/pci/devices");
    int err = -SNAPSHOT_E_ABSENT;
    struct dirent *e;

    s->bar = NULL;
    if (!dir) {
        return -SNAPSHOT_E_NO_SYSFS;
    }
    while ((e = readdir(dir))) {
        if (snapshot_sysfs(e->d_name, "vendor") != SNAPSHOT_VENDOR_ID ||
            snapshot_sysfs(e->d_name, "device") != SNAPSHOT_DEVICE_ID) {
            continue;
        }
        err = snapshot_enable(e->d_name);
        if (!err) {
            err = snapshot_map(s, e->d_name);
        }
        break;
    }
    closedir(dir);
    return err;
}

static inline void snapshot_close(struct snapshot *s)
{
    if (s->bar) {
        munmap(s->bar, SNAPSHOT_BAR_SIZE);
        s->bar = NULL;
    }
}

#endif /* CONTRIB_SNAPSHOT_H */
