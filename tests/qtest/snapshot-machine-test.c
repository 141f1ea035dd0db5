/*
 * Tests of the snapshot device: which machines it can save, which it refuses,
 * and what it does when the machine changes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include <glib/gstdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include "libqos/libqos-malloc.h"
#include "libqos/malloc-pc.h"
#include "libqos/virtio.h"
#include "libqos/virtio-pci.h"
#include "qobject/qdict.h"
#include "snapshot-utils.h"
#include "standard-headers/linux/virtio_blk.h"
#include "standard-headers/linux/virtio_config.h"

#define STATUS_ERROR(e) (SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_##e)

/* Where both machines put memory that is plugged, if main memory is small */
#define DEVICE_MEMORY (4 * GiB)

static char *temporary_path(const char *name)
{
    g_autofree char *dir = g_dir_make_tmp("snapshot-XXXXXX", NULL);

    g_assert_nonnull(dir);
    return g_build_filename(dir, name, NULL);
}

static void remove_temporary(const char *path)
{
    g_autofree char *dir = g_path_get_dirname(path);

    g_unlink(path);
    g_assert_cmpint(g_rmdir(dir), ==, 0);
}

/* A command has to fail for the guest and, telling why, for the host. */
static void assert_refused(SnapshotVM *vm, const char *command, unsigned slot,
                           uint32_t status, const char *text)
{
    uint32_t guest_command = !strcmp(command, "save") ? SNAPSHOT_CMD_SAVE :
                             SNAPSHOT_CMD_RESTORE;

    g_assert_cmphex(snapshot_command(vm, guest_command, slot), ==, status);
    snapshot_qmp_refused(vm, command, slot, text);
}

static void assert_no_start(const char *args, const char *text)
{
    /* Should it start, it shall end. */
    g_autofree char *cmd = g_strdup_printf("sh -c 'echo quit | %s -accel qtest"
                                           " -display none -monitor stdio %s'",
                                           g_getenv("QTEST_QEMU_BINARY"), args);
    g_autofree char *err = NULL;
    int status;

    g_assert_true(g_spawn_command_line_sync(cmd, NULL, &err, &status, NULL));
    g_test_message("%s: %s", args, err);
    g_assert_true(WIFEXITED(status));
    g_assert_cmpint(WEXITSTATUS(status), ==, 1);
    g_assert_nonnull(strstr(err, text));
}

#define MEMORY(type, shared, size) "-object memory-backend-" #type \
    ",id=m,share=" #shared ",size=" #size

/* Catches: a property or a second device that is taken, then misbehaves. */
static void test_properties(const void *machine)
{
    static const struct {
        const char *args;
        const char *text;
    } refused[] = {
        { "-device snapshot,slots=0", "slots=0 is not between 1 and 64" },
        { "-device snapshot,slots=65", "slots=65 is not between 1 and 64" },
        { "-device snapshot,slots=4294967295", "is not between 1 and 64" },
        { "-device snapshot,slots=x", "slots" },
        { "-device snapshot,verify=x", "neither on, off nor a number" },
        { "-device snapshot,verify=-1", "neither on, off nor a number" },
        { "-device snapshot -device snapshot", "snapshot device already" },
        { "-device snapshot,file=/nonexistent/ram", "No such file" },
        { "-chardev null,id=c -device snapshot,control=c", "needs channel=" },
        { MEMORY(ram, off, 1M) " -chardev null,id=c"
          " -device snapshot,control=c,channel=m", "use share=on" },
        { MEMORY(memfd, on, 32K) " -chardev null,id=c"
          " -device snapshot,control=c,channel=m", "smaller than 65536" },
        { MEMORY(memfd, on, 3M) " -device snapshot,channel=m",
          "3145728 bytes, is not a power of 2" },
        { MEMORY(memfd, on, 1M) " -device ivshmem-plain,memdev=m"
          " -device snapshot,channel=m", "in use already" },
        { MEMORY(memfd, on, 1M) " -device snapshot,keep=m:x",
          "'x' is not the id of a memory backend" },
    };
    static const unsigned slots[] = { 1, 64 };
    SnapshotVM *vm;
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(refused); i++) {
        g_autofree char *args = g_strdup_printf("-M %s %s",
                                                (const char *)machine,
                                                refused[i].args);

        assert_no_start(args, refused[i].text);
    }
    for (i = 0; i < ARRAY_SIZE(slots); i++) {
        g_autofree char *properties = g_strdup_printf(",slots=%u", slots[i]);

        vm = snapshot_vm_start(properties, "-M %s", (const char *)machine);
        g_assert_cmpuint(snapshot_readl(vm, SNAPSHOT_REG_SLOTS), ==, slots[i]);
        snapshot_save(vm, slots[i] - 1);
        snapshot_restore(vm, slots[i] - 1);
        g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_SAVE, slots[i]), ==,
                        STATUS_ERROR(SLOT));
        snapshot_vm_end(vm);
    }
    vm = snapshot_vm_start("", "-M %s", (const char *)machine);
    g_assert_cmpuint(snapshot_readl(vm, SNAPSHOT_REG_SLOTS), ==, 8);
    snapshot_vm_end(vm);
}

/* Catches: a device plugged into a running machine, a QMP command without. */
static void test_no_hotplug(const void *machine)
{
    QTestState *qts = qtest_initf("-M %s%s", (const char *)machine,
                                  strcmp(machine, "q35") ? "" :
                                  " -device pcie-pci-bridge,id=b");
    QDict *error;

    error = qtest_qmp_assert_failure_ref(
        qts, "{ 'execute': 'device_add', 'arguments': {"
        " 'driver': 'snapshot', 'id': 's' } }");
    g_assert_nonnull(strstr(qdict_get_str(error, "desc"), "hotplug"));
    qobject_unref(error);

    error = qtest_qmp_assert_failure_ref(
        qts, "{ 'execute': 'x-query-snapshot-device' }");
    g_assert_nonnull(strstr(qdict_get_str(error, "desc"),
                            "no snapshot device"));
    qobject_unref(error);
    qtest_quit(qts);
}

/*
 * Catches: an image that others can read, a file that is written over or
 * followed, and one that stays behind.
 */
static void test_file(const void *machine)
{
    g_autofree char *path = temporary_path("ram");
    g_autofree char *properties = g_strdup_printf(",file=%s", path);
    g_autofree char *args = g_strdup_printf("-M %s -device snapshot%s",
                                            (const char *)machine, properties);
    g_autofree char *content = NULL;
    struct stat st;
    SnapshotVM *vm;
    mode_t mask;

    g_assert_true(g_file_set_contents(path, "precious", -1, NULL));
    assert_no_start(args, "exist");
    g_assert_true(g_file_get_contents(path, &content, NULL, NULL));
    g_assert_cmpstr(content, ==, "precious");
    g_unlink(path);

    g_assert_cmpint(symlink("elsewhere", path), ==, 0);
    assert_no_start(args, "exist");
    g_unlink(path);

    mask = umask(0);
    vm = snapshot_vm_start(properties, "-M %s", (const char *)machine);
    umask(mask);
    g_assert_cmpint(stat(path, &st), ==, 0);
    g_assert_cmphex(st.st_mode, ==, S_IFREG | 0600);
    snapshot_round_trip(vm, 1 * MiB, 64 * MiB);
    snapshot_vm_end(vm);
    g_assert_cmpint(access(path, F_OK), !=, 0);
    remove_temporary(path);
}

typedef struct MemoryShape {
    const char *name;
    const char *options;        /* of the machine */
    const char *args;
    uint64_t base, size;
} MemoryShape;

static const MemoryShape memory_shapes[] = {
    { "tiny", "", "-m 2", 1 * MiB, 1 * MiB },
    { "above 4 GiB", ",max-ram-below-4g=64M", "-m 128", 4 * GiB, 64 * MiB },
    { "NUMA, two backends", "",
      "-m 64 -object memory-backend-ram,id=m0,size=32M"
      " -object memory-backend-memfd,id=m1,size=32M,share=off"
      " -numa node,memdev=m0 -numa node,memdev=m1",
      1 * MiB, 63 * MiB },
    { "NUMA, one node shared", "",
      "-m 64 -object memory-backend-ram,id=m0,size=32M"
      " -object memory-backend-memfd,id=m1,size=32M,share=on"
      " -numa node,memdev=m0 -numa node,memdev=m1",
      1 * MiB, 63 * MiB },
    { "shared", ",memory-backend=m",
      "-m 64 -object memory-backend-ram,id=m,size=64M,share=on",
      1 * MiB, 63 * MiB },
    { "private file", ",memory-backend=m",
      "-m 64 -object memory-backend-file,id=m,size=64M,mem-path=/tmp",
      1 * MiB, 63 * MiB },
    { "shared file", ",memory-backend=m",
      "-m 64 -object memory-backend-file,id=m,size=64M,mem-path=/tmp,share=on",
      1 * MiB, 63 * MiB },
    { "preallocated", ",memory-backend=m",
      "-m 64 -object memory-backend-ram,id=m,size=64M,prealloc=on",
      1 * MiB, 63 * MiB },
    { "not reserved", ",memory-backend=m",
      "-m 64 -object memory-backend-ram,id=m,size=64M,reserve=off",
      1 * MiB, 63 * MiB },
    { "POSIX shared memory", ",memory-backend=m",
      "-m 64 -object memory-backend-shm,id=m,size=64M", 1 * MiB, 63 * MiB },
    { "huge pages", ",memory-backend=m",
      "-m 64 -object memory-backend-memfd,id=m,size=64M,share=off,hugetlb=on",
      1 * MiB, 63 * MiB },
    { "huge pages, shared", ",memory-backend=m",
      "-m 64 -object memory-backend-memfd,id=m,size=64M,hugetlb=on",
      1 * MiB, 63 * MiB },
    { "locked", "", "-m 64 -overcommit mem-lock=on", 1 * MiB, 63 * MiB },
    { "not dumped, not merged", ",dump-guest-core=off,mem-merge=off", "-m 64",
      1 * MiB, 63 * MiB },
    { "auxiliary shared", ",aux-ram-share=on", "-m 64", 1 * MiB, 63 * MiB },
    { "DIMM", "",
      "-m 64,slots=1,maxmem=1G -object memory-backend-ram,id=m,size=64M"
      " -device pc-dimm,memdev=m", DEVICE_MEMORY, 64 * MiB },
    { "shared DIMM", "",
      "-m 64,slots=1,maxmem=1G"
      " -object memory-backend-ram,id=m,size=64M,share=on"
      " -device pc-dimm,memdev=m", DEVICE_MEMORY, 64 * MiB },
    { "NVDIMM", ",nvdimm=on",
      "-m 64,slots=1,maxmem=1G -object memory-backend-ram,id=m,size=64M"
      " -device nvdimm,memdev=m", DEVICE_MEMORY, 64 * MiB },
};

/* May a process keep more memory from being swapped than our machines take? */
static bool can_lock_memory(void)
{
    const size_t size = 4 * GiB;
    void *map = mmap(NULL, size, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    bool can;

    g_assert_true(map != MAP_FAILED);
    can = !mlock2(map, size, MLOCK_ONFAULT);
    munmap(map, size);
    return can;
}

/* Has the host this many bytes in huge pages? */
static bool has_huge_pages(uint64_t size)
{
    g_autofree char *text = NULL;
    uint64_t pages, kib;
    const char *line;

    g_assert_true(g_file_get_contents("/proc/meminfo", &text, NULL, NULL));
    line = strstr(text, "HugePages_Free:");
    if (!line || sscanf(line, "%*s %" SCNu64, &pages) != 1) {
        return false;
    }
    line = strstr(text, "Hugepagesize:");
    return line && sscanf(line, "%*s %" SCNu64, &kib) == 1 &&
        pages * kib * KiB >= size;
}

/*
 * Catches: RAM that is left out or put back wrongly because of its backend, its
 * place or its size.
 */
static void test_memory_shapes(const void *machine)
{
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(memory_shapes); i++) {
        const MemoryShape *shape = &memory_shapes[i];
        SnapshotVM *vm;

        g_test_message("%s", shape->name);
        if (strstr(shape->args, "mem-lock") && !can_lock_memory()) {
            g_test_message("skipped: no right to lock memory");
            continue;
        }
        if (strstr(shape->args, "hugetlb") && !has_huge_pages(64 * MiB)) {
            g_test_message("skipped: not enough huge pages");
            continue;
        }
        if (strstr(shape->args, "backend-shm") && access("/dev/shm", W_OK)) {
            g_test_message("skipped: no writable /dev/shm");
            continue;
        }
        vm = snapshot_vm_start("", "-M %s%s %s", (const char *)machine,
                               shape->options, shape->args);
        snapshot_round_trip(vm, shape->base, shape->size);
        snapshot_vm_end(vm);
    }
}

/*
 * Catches: shared memory that is taken away from those who share it, a private
 * file that is written to.
 */
static void test_memory_file(const void *machine)
{
    const size_t size = 64 * MiB;
    int shared;

    for (shared = 0; shared < 2; shared++) {
        g_autofree char *path = temporary_path("memory");
        int fd = g_open(path, O_RDWR | O_CREAT, 0600);
        SnapshotVM *vm;
        uint64_t *word;
        char *map;

        g_assert_cmpint(ftruncate(fd, size), ==, 0);
        map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        g_assert_true(map != MAP_FAILED);
        word = (uint64_t *)(map + 2 * MiB);

        vm = snapshot_vm_start("", "-M %s,memory-backend=m -m 64 -object"
                               " memory-backend-file,id=m,size=64M,mem-path=%s,"
                               "share=%s", (const char *)machine, path,
                               shared ? "on" : "off");
        qtest_writeq(vm->qts, 2 * MiB, 1);
        g_assert_cmpuint(*word, ==, shared);
        snapshot_save(vm, 0);
        qtest_writeq(vm->qts, 2 * MiB, 2);
        snapshot_restore(vm, 0);
        g_assert_cmpuint(*word, ==, shared);

        qtest_writeq(vm->qts, 2 * MiB, 3);
        g_assert_cmpuint(*word, ==, 3 * shared);
        snapshot_restore(vm, 0);
        *word = 4;
        g_assert_cmpuint(qtest_readq(vm->qts, 2 * MiB), ==, shared ? 4 : 1);
        snapshot_restore(vm, 0);
        g_assert_cmpuint(qtest_readq(vm->qts, 2 * MiB), ==, 1);
        g_assert_cmpuint(*word, ==, shared ? 1 : 4);

        snapshot_vm_end(vm);
        munmap(map, size);
        close(fd);
        remove_temporary(path);
    }
}

/* Of the mapping that starts where a RAM block does, those of flags dd, mg */
static char *mapping_flags(SnapshotVM *vm, const char *block)
{
    g_autofree char *info = qtest_hmp(vm->qts, "info ramblock");
    g_autofree char *path = g_strdup_printf("/proc/%d/smaps",
                                            qtest_pid(vm->qts));
    g_autofree char *maps = NULL, *start = NULL;
    g_auto(GStrv) words = NULL;
    GString *flags = g_string_new("");
    const char *line = strstr(info, block);
    uint64_t host;

    g_assert_nonnull(line);
    g_assert_cmpint(sscanf(line, "%*s %*s %*s %*s %*s %*s %" SCNx64, &host),
                    ==, 1);
    start = g_strdup_printf("\n%" PRIx64 "-", host);
    g_assert_true(g_file_get_contents(path, &maps, NULL, NULL));
    line = strstr(maps, start);
    g_assert_nonnull(line);
    line = strstr(line, "VmFlags:");
    g_assert_nonnull(line);
    words = g_strsplit(line, "\n", 2);
    if (strstr(words[0], " dd")) {
        g_string_append(flags, "not dumped ");
    }
    if (strstr(words[0], " mg")) {
        g_string_append(flags, "merged ");
    }
    return g_string_free(flags, FALSE);
}

/* Catches: a mapping of the image that is not dumped, or merged, as RAM was. */
static void test_mapping_flags(const void *machine)
{
    static const struct {
        const char *options;
        const char *backend;
    } cases[] = {
        { "", "" },
        { ",dump-guest-core=off,mem-merge=off", "" },
        { ",mem-merge=off", ",dump=off" },
        { ",mem-merge=off", ",merge=on" },
    };
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        SnapshotVM *vm = snapshot_vm_start(
            "", "-M %s,memory-backend=main%s -m 64"
            " -object memory-backend-ram,id=main,size=64M%s",
            (const char *)machine, cases[i].options, cases[i].backend);
        g_autofree char *before = mapping_flags(vm, "main");
        g_autofree char *after = NULL;

        snapshot_round_trip(vm, 1 * MiB, 63 * MiB);
        after = mapping_flags(vm, "main");
        g_test_message("%s%s: %s", cases[i].options, cases[i].backend, before);
        g_assert_cmpstr(after, ==, before);
        snapshot_vm_end(vm);
    }
}

/* Catches: a read-only mapping written to (a crash), or read as something. */
static void test_read_only_memory(const void *machine)
{
    g_autofree char *path = temporary_path("nvdimm");
    g_autofree char *content = g_malloc(2 * MiB);
    SnapshotVM *vm;

    memset(content, 'x', 2 * MiB);
    g_assert_true(g_file_set_contents(path, content, 2 * MiB, NULL));
    vm = snapshot_vm_start("", "-M %s,nvdimm=on -m 64,slots=1,maxmem=1G"
                           " -object memory-backend-file,id=m,size=2M,"
                           "mem-path=%s,readonly=on"
                           " -device nvdimm,memdev=m,unarmed=on",
                           (const char *)machine, path);
    snapshot_round_trip(vm, 1 * MiB, 1 * MiB);
    g_assert_cmphex(qtest_readl(vm->qts, DEVICE_MEMORY), ==, 0x78787878);
    snapshot_vm_end(vm);
    remove_temporary(path);
}

static unsigned count_ram_blocks(SnapshotVM *vm)
{
    g_autofree char *text = qtest_hmp(vm->qts, "info ramblock");
    unsigned n = 0;
    char *c;

    for (c = text; *c; c++) {
        n += *c == '\n';
    }
    return n;
}

static void add_memory(SnapshotVM *vm, const char *id, unsigned size)
{
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'object-add', 'arguments': {"
        " 'qom-type': 'memory-backend-ram', 'id': %s, 'size': %u } }",
        id, size);
}

static void delete_memory(SnapshotVM *vm, const char *id)
{
    unsigned blocks = count_ram_blocks(vm);

    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'object-del', 'arguments': { 'id': %s } }", id);
    /* Its RAM block goes when RCU allows. */
    while (count_ram_blocks(vm) == blocks) {
        g_usleep(1000);
    }
}

static void plug_dimm(SnapshotVM *vm, unsigned n)
{
    g_autofree char *memory = g_strdup_printf("m%u", n);
    g_autofree char *dimm = g_strdup_printf("d%u", n);

    add_memory(vm, memory, 64 * MiB);
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'device_add', 'arguments': {"
        " 'driver': 'pc-dimm', 'id': %s, 'memdev': %s, 'slot': %u,"
        " 'addr': %lld } }", dimm, memory, n,
        (long long)(DEVICE_MEMORY + n * 128 * MiB));
}

/* The guest's part is that of its ACPI code. */
static void unplug_dimm(SnapshotVM *vm, unsigned n)
{
    g_autofree char *memory = g_strdup_printf("m%u", n);
    g_autofree char *dimm = g_strdup_printf("d%u", n);

    qtest_qmp_device_del_send(vm->qts, dimm);
    qtest_outl(vm->qts, 0xa00, n);              /* selector */
    qtest_outl(vm->qts, 0xa14, 8);              /* flags: eject */
    qtest_qmp_eventwait(vm->qts, "DEVICE_DELETED");
    delete_memory(vm, memory);
}

/*
 * Catches: plugged memory that is left out; a restore into a machine with
 * other memory; the machine touched by such an attempt; memory that comes or
 * goes while RAM is mapped from an image.
 */
static void test_dimm(const void *machine)
{
    const uint64_t size = 64 * MiB, d0 = DEVICE_MEMORY, d1 = d0 + 128 * MiB;
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -m 64,slots=4,maxmem=1G",
                                       (const char *)machine);
    int i;

    snapshot_save(vm, 7);
    snapshot_restore(vm, 7);
    plug_dimm(vm, 0);
    assert_refused(vm, "restore", 7, STATUS_ERROR(CHANGED), "plugged");
    snapshot_round_trip(vm, d0, size);          /* slot 0 */

    plug_dimm(vm, 1);
    snapshot_fill(vm, d0, size, 5);
    snapshot_fill(vm, d1, size, 6);
    assert_refused(vm, "restore", 0, STATUS_ERROR(CHANGED), "plugged");
    snapshot_assert_state(vm, "running");
    snapshot_check(vm, d0, size, 5);
    snapshot_check(vm, d1, size, 6);
    snapshot_save(vm, 1);
    for (i = 7; i < 10; i++) {
        snapshot_fill(vm, d0, size, i);
        snapshot_fill(vm, d1, size, i);
        snapshot_restore(vm, 1);
        snapshot_check(vm, d0, size, 5);
        snapshot_check(vm, d1, size, 6);
    }

    unplug_dimm(vm, 1);
    assert_refused(vm, "restore", 1, STATUS_ERROR(CHANGED), "plugged");
    snapshot_restore(vm, 0);
    snapshot_check(vm, d0, size, 1);
    /* Another of the same size, at the same place, may be taken for it. */
    plug_dimm(vm, 1);
    snapshot_fill(vm, d1, size, 10);
    if (snapshot_command(vm, SNAPSHOT_CMD_RESTORE, 1) !=
        STATUS_ERROR(CHANGED)) {
        g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==,
                        SNAPSHOT_STATUS_RESTORED);
        snapshot_check(vm, d1, size, 6);
    }
    unplug_dimm(vm, 1);
    snapshot_fill(vm, d0, size, 10);
    snapshot_restore(vm, 0);
    snapshot_check(vm, d0, size, 1);

    unplug_dimm(vm, 0);
    assert_refused(vm, "restore", 0, STATUS_ERROR(CHANGED), "plugged");
    snapshot_restore(vm, 7);

    /* A backend that no DIMM uses is no part of the machine. */
    add_memory(vm, "small", 4 * KiB);
    snapshot_restore(vm, 7);
    snapshot_save(vm, 2);
    snapshot_restore(vm, 2);
    delete_memory(vm, "small");
    snapshot_restore(vm, 2);
    snapshot_restore(vm, 7);
    snapshot_vm_end(vm);
}

/* Catches: a restore into a machine with other devices or CPUs. */
static void test_device_plug(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -smp 1,sockets=2,maxcpus=2"
                                       " -device qemu-xhci",
                                       (const char *)machine);
    int i;

    snapshot_round_trip(vm, 1 * MiB, 1 * MiB);
    for (i = 0; i < 2; i++) {
        qtest_qmp_device_add(vm->qts, "usb-kbd", "kbd", "{}");
        assert_refused(vm, "restore", 0, STATUS_ERROR(CHANGED), "plugged");
        snapshot_assert_state(vm, "running");
        snapshot_save(vm, 1 + i);
        snapshot_restore(vm, 1 + i);
        qtest_qmp_device_del(vm->qts, "kbd");
        assert_refused(vm, "restore", 1 + i, STATUS_ERROR(CHANGED), "plugged");
        snapshot_restore(vm, 0);
    }
    qtest_qmp_device_add(vm->qts, "usb-kbd", "kbd", "{}");
    for (i = 0; i < 3; i++) {
        assert_refused(vm, "restore", i, STATUS_ERROR(CHANGED), "plugged");
    }
    qtest_qmp_device_del(vm->qts, "kbd");
    snapshot_restore(vm, 0);

    qtest_qmp_device_add(vm->qts, "qemu64-x86_64-cpu", "cpu1",
                         "{ 'socket-id': 1, 'core-id': 0, 'thread-id': 0 }");
    assert_refused(vm, "restore", 0, STATUS_ERROR(CHANGED), "plugged");
    snapshot_round_trip(vm, 1 * MiB, 1 * MiB);
    snapshot_vm_end(vm);
}

#define DISK "-drive if=none,id=d,driver=null-co,read-zeroes=on"

static const struct {
    const char *args;
    const char *text;
} unsavable[] = {
    { "-device ufs", "ufs" },
    { "-object memory-backend-ram,id=m,size=1M,share=on"
      " -device ivshmem-plain,memdev=m", "peer mode" },
    { DISK " -device virtio-blk-pci,drive=d,id=vda", "vda" },
    { DISK " -device ide-hd,drive=d,id=sda", "sda" },
    { DISK " -device virtio-scsi-pci -device scsi-hd,drive=d,id=sdb", "sdb" },
    { "-m 64,maxmem=1G -object memory-backend-ram,id=m,size=64M"
      " -device virtio-mem-pci,memdev=m", "discard" },
};

/*
 * Catches: a machine that is saved although it would not come back whole, one
 * that a refusal stops, a refusal without its reason.
 */
static void test_unsavable(const void *machine)
{
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(unsavable); i++) {
        SnapshotVM *vm;
        QDict *info;

        g_test_message("%s", unsavable[i].args);
        vm = snapshot_vm_start(",disks=refuse", "-M %s %s",
                               (const char *)machine, unsavable[i].args);
        assert_refused(vm, "save", 0, STATUS_ERROR(UNSAVABLE),
                       unsavable[i].text);
        snapshot_assert_state(vm, "running");
        assert_refused(vm, "restore", 0, STATUS_ERROR(EMPTY), "no snapshot");
        info = snapshot_query(vm);
        g_assert_true(qlist_empty(qdict_get_qlist(info, "saved")));
        qobject_unref(info);
        snapshot_vm_end(vm);
    }
}

/* Catches: disks refused that need not be. */
static void test_disks(const void *machine)
{
    static const struct {
        const char *properties;
        const char *args;
    } savable[] = {
        { "", DISK " -device virtio-blk-pci,drive=d" },
        { ",disks=keep", DISK " -device virtio-blk-pci,drive=d" },
        { ",disks=refuse",
          DISK ",read-only=on -device virtio-blk-pci,drive=d" },
        { ",disks=refuse", DISK ",read-only=on -device ide-cd,drive=d" },
        { ",disks=refuse", DISK },                      /* nobody's */
        { ",disks=refuse",
          "-device virtio-scsi-pci -device scsi-cd" },  /* empty */
    };
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(savable); i++) {
        SnapshotVM *vm = snapshot_vm_start(savable[i].properties, "-M %s %s",
                                           (const char *)machine,
                                           savable[i].args);

        snapshot_round_trip(vm, 1 * MiB, 1 * MiB);
        snapshot_vm_end(vm);
    }
}

/*
 * Catches: RAM discarded behind the back of a snapshot, which would reach
 * through a private mapping into the image.
 */
static void test_discard_refused(const void *machine)
{
    const bool pc = !strcmp(machine, "pc");
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -m 64,maxmem=1G"
                                       " -object memory-backend-ram,id=m,"
                                       "size=64M%s", (const char *)machine,
                                       pc ? "" :
                                       " -device pcie-root-port,id=rp");
    const char *bus = pc ? "pci.0" : "rp";
    QDict *error;

    snapshot_save(vm, 0);
    error = qtest_qmp_assert_failure_ref(
        vm->qts, "{ 'execute': 'device_add', 'arguments': {"
        " 'driver': 'virtio-mem-pci', 'id': 'vm0', 'memdev': 'm',"
        " 'bus': %s } }", bus);
    g_test_message("%s", qdict_get_str(error, "desc"));
    g_assert_nonnull(strstr(qdict_get_str(error, "desc"), "iscard"));
    qobject_unref(error);

    snapshot_discard(vm, 0);
    qtest_qmp_device_add(vm->qts, "virtio-mem-pci", "vm0",
                         "{ 'memdev': 'm', 'bus': %s }", bus);
    snapshot_vm_end(vm);
}

static void wait_for_migration(QTestState *qts, const char *wanted)
{
    for (;;) {
        QDict *info = qtest_qmp_assert_success_ref(
            qts, "{ 'execute': 'query-migrate' }");
        const char *status = qdict_get_str(info, "status");
        bool done = !strcmp(status, wanted);

        g_assert_cmpstr(status, !=, "failed");
        qobject_unref(info);
        if (done) {
            return;
        }
        g_usleep(10000);
    }
}

static void migrate(QTestState *qts, const char *uri, uint64_t bandwidth)
{
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'migrate-set-parameters',"
        " 'arguments': { 'max-bandwidth': %lld } }", (long long)bandwidth);
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'migrate', 'arguments': { 'uri': %s } }", uri);
}

/*
 * Catches: commands that run in a migration's way; a migration that a snapshot
 * hinders; registers that do not migrate.
 */
static void test_migration(const void *machine)
{
    g_autofree char *path = temporary_path("migration");
    g_autofree char *uri = g_strdup_printf("file:%s", path);
    SnapshotVM *vm = snapshot_vm_start("", "-M %s", (const char *)machine);
    SnapshotVM *target;
    uint64_t argument = 0x1122334455667788;

    snapshot_fill(vm, 1 * MiB, 64 * MiB, 1);
    snapshot_save(vm, 0);
    snapshot_restore(vm, 0);

    migrate(vm->qts, "exec:cat >/dev/null", 4096);
    wait_for_migration(vm->qts, "active");
    assert_refused(vm, "save", 1, STATUS_ERROR(UNSAVABLE), "migration");
    assert_refused(vm, "save", 0, STATUS_ERROR(UNSAVABLE), "migration");
    assert_refused(vm, "restore", 0, STATUS_ERROR(UNSAVABLE), "migration");
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'migrate_cancel' }");
    wait_for_migration(vm->qts, "cancelled");
    snapshot_restore(vm, 0);
    snapshot_save(vm, 1);

    snapshot_writeq(vm, SNAPSHOT_REG_ARGUMENT, argument);
    migrate(vm->qts, uri, 1 * GiB);
    wait_for_migration(vm->qts, "completed");
    snapshot_qmp_refused(vm, "save", 1, "migrated");
    snapshot_qmp_refused(vm, "restore", 0, "migrated");
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'cont' }");
    qtest_qmp_eventwait(vm->qts, "RESUME");
    snapshot_round_trip(vm, 1 * MiB, 1 * MiB);
    snapshot_vm_end(vm);

    target = snapshot_vm_start("", "-M %s -incoming defer",
                               (const char *)machine);
    snapshot_qmp_refused(target, "save", 0, "migrated");
    qtest_qmp_assert_success(target->qts, "{ 'execute': 'migrate-incoming',"
                             " 'arguments': { 'uri': %s } }", uri);
    qtest_qmp_eventwait(target->qts, "RESUME");
    g_assert_cmphex(snapshot_readq(target, SNAPSHOT_REG_ARGUMENT), ==,
                    argument);
    g_assert_cmphex(snapshot_readl(target, SNAPSHOT_REG_STATUS), ==,
                    SNAPSHOT_STATUS_SAVED);
    g_assert_cmpuint(snapshot_readl(target, SNAPSHOT_REG_SLOT), ==, 1);
    assert_refused(target, "restore", 0, STATUS_ERROR(EMPTY), "no snapshot");
    snapshot_round_trip(target, 1 * MiB, 1 * MiB);
    snapshot_vm_end(target);
    remove_temporary(path);
}

static void set_limit(SnapshotVM *vm, int resource, uint64_t bytes)
{
    struct rlimit limit;

    g_assert_cmpint(prlimit(qtest_pid(vm->qts), resource, NULL, &limit), ==, 0);
    limit.rlim_cur = MIN(bytes, limit.rlim_max);
    g_assert_cmpint(prlimit(qtest_pid(vm->qts), resource, &limit, NULL), ==, 0);
}

static uint64_t address_space(SnapshotVM *vm)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/statm",
                                            qtest_pid(vm->qts));
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    return g_ascii_strtoull(text, NULL, 10) * qemu_real_host_page_size();
}

/*
 * Catches: a host out of memory that ends QEMU, costs the snapshot that was
 * there before, or leaves the machine half restored.
 */
static void test_no_memory(const void *machine)
{
    static const struct {
        int resource;
        const char *text;
    } limits[] = {
        { RLIMIT_FSIZE, "RAM image" },
        { RLIMIT_AS, "RAM image" },
    };
    const uint64_t base = 1 * MiB, size = 127 * MiB;
    SnapshotVM *vm;
    unsigned i;

    signal(SIGXFSZ, SIG_IGN);                   /* QEMU inherits that. */
    vm = snapshot_vm_start("", "-M %s -m 128", (const char *)machine);
    snapshot_fill(vm, base, size, 1);
    snapshot_save(vm, 0);
    snapshot_fill(vm, base, size, 2);

    for (i = 0; i < ARRAY_SIZE(limits); i++) {
        set_limit(vm, limits[i].resource,
                  limits[i].resource == RLIMIT_AS ?
                  address_space(vm) + 32 * MiB : 160 * MiB);
        assert_refused(vm, "save", 0, STATUS_ERROR(NOMEM), limits[i].text);
        assert_refused(vm, "save", 1, STATUS_ERROR(NOMEM), limits[i].text);
        if (limits[i].resource == RLIMIT_AS) {
            assert_refused(vm, "restore", 0, STATUS_ERROR(NOMEM),
                           limits[i].text);
        }
        snapshot_assert_state(vm, "running");
        snapshot_check(vm, base, size, 2);

        set_limit(vm, limits[i].resource, RLIM_INFINITY);
        assert_refused(vm, "restore", 1, STATUS_ERROR(EMPTY), "no snapshot");
    }
    snapshot_restore(vm, 0);
    snapshot_check(vm, base, size, 1);
    snapshot_save(vm, 1);
    snapshot_restore(vm, 1);
    snapshot_vm_end(vm);
    signal(SIGXFSZ, SIG_DFL);
}

/* Catches: a virtio device that is not put back. */
static void test_virtio(const void *machine)
{
    static const char *const types[] = {
        "virtio-rng-pci", "virtio-net-pci", "virtio-serial-pci",
        "virtio-balloon-pci", "virtio-scsi-pci", "virtio-keyboard-pci",
    };
    QVirtioPCIDevice *devs[ARRAY_SIZE(types)];
    g_autoptr(GString) args = g_string_new("");
    SnapshotVM *vm;
    int i, round;

    for (i = 0; i < ARRAY_SIZE(types); i++) {
        g_string_append_printf(args, " -device %s,addr=0x%x", types[i], 8 + i);
    }
    vm = snapshot_vm_start("", "-M %s%s", (const char *)machine, args->str);
    for (i = 0; i < ARRAY_SIZE(types); i++) {
        QPCIAddress addr = { .devfn = QPCI_DEVFN(8 + i, 0) };

        devs[i] = virtio_pci_new(vm->pci, &addr);
        qvirtio_pci_device_enable(devs[i]);
        qvirtio_start_device(&devs[i]->vdev);
    }
    snapshot_save(vm, 0);
    for (round = 0; round < 3; round++) {
        for (i = 0; i < ARRAY_SIZE(types); i++) {
            QVirtioDevice *d = &devs[i]->vdev;

            d->bus->set_status(d, 0);
            g_assert_cmphex(d->bus->get_status(d), ==, 0);
        }
        snapshot_restore(vm, 0);
        for (i = 0; i < ARRAY_SIZE(types); i++) {
            QVirtioDevice *d = &devs[i]->vdev;

            g_assert_cmphex(d->bus->get_status(d), ==,
                            VIRTIO_CONFIG_S_ACKNOWLEDGE |
                            VIRTIO_CONFIG_S_DRIVER);
        }
    }
    for (i = 0; i < ARRAY_SIZE(types); i++) {
        g_free(devs[i]->pdev);
        g_free(devs[i]);
    }
    snapshot_vm_end(vm);
}

/* Read the first sector into memory; returns the request's descriptor. */
static uint32_t start_read(SnapshotVM *vm, QVirtioDevice *d, QVirtQueue *vq,
                           uint64_t request)
{
    uint32_t head;

    qtest_memset(vm->qts, request, 0, 16);      /* VIRTIO_BLK_T_IN, sector 0 */
    qtest_memset(vm->qts, request + 16, 0xff, 513);
    head = qvirtqueue_add(vm->qts, vq, request, 16, false, true);
    qvirtqueue_add(vm->qts, vq, request + 16, 512, true, true);
    qvirtqueue_add(vm->qts, vq, request + 528, 1, true, false);
    qvirtqueue_kick(vm->qts, d, vq, head);
    return head;
}

static void finish_read(SnapshotVM *vm, QVirtioDevice *d, QVirtQueue *vq,
                        uint32_t head, uint64_t request)
{
    qvirtio_wait_used_elem(vm->qts, d, vq, head, NULL, 10 * 1000 * 1000);
    g_assert_cmphex(qtest_readb(vm->qts, request + 16), ==, 0);
    g_assert_cmphex(qtest_readb(vm->qts, request + 528), ==, VIRTIO_BLK_S_OK);
}

/*
 * Catches: a queue whose indexes do not go back with its rings, and a request
 * under way at the save that gets lost.
 */
static void test_virtio_queue(const void *machine)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(8, 0) };
    SnapshotVM *vm = snapshot_vm_start("", "-M %s " DISK ",read-only=on,"
                                       "latency-ns=100000000"
                                       " -device virtio-blk-pci,drive=d,addr=8,"
                                       "ioeventfd=off",
                                       (const char *)machine);
    QVirtioPCIDevice *pci = virtio_pci_new(vm->pci, &addr);
    QVirtioDevice *d = &pci->vdev;
    QGuestAllocator alloc;
    QVirtQueue *vq, at_save;
    uint64_t request;
    uint32_t head;
    int i;

    pc_alloc_init(&alloc, vm->qts, ALLOC_NO_FLAGS);
    request = guest_alloc(&alloc, 529);
    qvirtio_pci_device_enable(pci);
    qvirtio_start_device(d);
    qvirtio_set_features(d, qvirtio_get_features(d) &
                         ~(QVIRTIO_F_BAD_FEATURE |
                           1ull << VIRTIO_RING_F_INDIRECT_DESC |
                           1ull << VIRTIO_RING_F_EVENT_IDX));
    vq = qvirtqueue_setup(d, &alloc, 0);
    qvirtio_set_driver_ok(d);

    head = start_read(vm, d, vq, request);
    snapshot_save(vm, 0);
    at_save = *vq;
    finish_read(vm, d, vq, head, request);

    for (i = 0; i < 3; i++) {
        head = start_read(vm, d, vq, request);
        finish_read(vm, d, vq, head, request);
        snapshot_restore(vm, 0);
        *vq = at_save;
        finish_read(vm, d, vq, 0, request);
    }
    head = start_read(vm, d, vq, request);
    finish_read(vm, d, vq, head, request);

    qvirtqueue_cleanup(d->bus, vq, &alloc);
    g_free(pci->pdev);
    g_free(pci);
    alloc_destroy(&alloc);
    snapshot_vm_end(vm);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot")) {
        g_test_skip("there is no snapshot device");
        return g_test_run();
    }

    snapshot_add_tests("properties", test_properties);
    snapshot_add_tests("no-hotplug", test_no_hotplug);
    snapshot_add_tests("file", test_file);
    snapshot_add_tests("memory-shapes", test_memory_shapes);
    snapshot_add_tests("memory-file", test_memory_file);
    snapshot_add_tests("mapping-flags", test_mapping_flags);
    snapshot_add_tests("read-only-memory", test_read_only_memory);
    snapshot_add_tests("dimm", test_dimm);
    snapshot_add_tests("device-plug", test_device_plug);
    snapshot_add_tests("unsavable", test_unsavable);
    snapshot_add_tests("disks", test_disks);
    snapshot_add_tests("discard-refused", test_discard_refused);
    snapshot_add_tests("migration", test_migration);
    snapshot_add_test("pc", "remap", "no-memory", test_no_memory);
    snapshot_add_test("q35", "remap", "no-memory", test_no_memory);
    snapshot_add_tests("virtio", test_virtio);
    snapshot_add_tests("virtio-queue", test_virtio_queue);
    return g_test_run();
}
