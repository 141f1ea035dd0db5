/*
 * RAM snapshots: the content of all RAM blocks, kept to be put back
 *
 * What all ways of doing it share; the ways themselves are in
 * ram-snapshot-remap.c and ram-snapshot-dirty.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/madvise.h"
#include "qemu/memfd.h"
#include "qemu/rcu.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "exec/cputlb.h"
#include "exec/memory.h"
#include "exec/ram-dirty-log.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "exec/tb-flush.h"
#include "hw/boards.h"
#include "hw/core/cpu.h"
#include "hw/virtio/vhost.h"
#include "hw/xen/xen.h"
#include "system/hostmem.h"
#include "system/kvm.h"
#include "system/qtest.h"
#include "system/system.h"
#include "system/tcg.h"
#include "ram-snapshot-int.h"

/*
 * A private mapping costs one page fault for each page touched after a
 * restore, and system calls.  Comparing and copying a small block is cheaper.
 */
#define MAP_MIN (256 * KiB)

/* Kernel vhost and vhost-user write to RAM in their own time, unseen. */
static bool has_vhost(void)
{
    return vhost_get_max_memslots() != UINT_MAX;
}

/*
 * Who writes to RAM can be found out, unless it is a vhost device; and who has
 * to know that a restore writes to it, can be told.
 */
static bool can_log_writes(Error **errp)
{
    ERRP_GUARD();

    if (!tcg_enabled() && !kvm_enabled() && !qtest_enabled()) {
        error_setg(errp, "ram=dirty needs the TCG or KVM accelerator");
    } else if (xen_mode == XEN_EMULATE) {
        error_setg(errp, "ram=dirty cannot be had with -accel "
                   "kvm,xen-version=: event channels write to RAM unseen");
    } else if (kvm_enabled() && !kvm_uses_guest_page_tables()) {
        error_setg(errp, "ram=dirty needs a KVM with two-dimensional paging "
                   "(EPT, NPT), and none was found: without it, KVM keeps "
                   "copies of page tables, and does not see that a restore "
                   "changes them");
    } else {
        return true;
    }
    error_append_hint(errp, "Use ram=remap, or ram=auto.\n");
    return false;
}

static const RAMSnapshotOps *choose_ops(SnapshotDeviceRam mode, Error **errp)
{
    switch (mode) {
    case SNAPSHOT_DEVICE_RAM_AUTO:
        return can_log_writes(NULL) && !has_vhost() ? &ram_snapshot_dirty_ops
                                                    : &ram_snapshot_remap_ops;
    case SNAPSHOT_DEVICE_RAM_REMAP:
        return &ram_snapshot_remap_ops;
    case SNAPSHOT_DEVICE_RAM_DIRTY:
        return can_log_writes(errp) ? &ram_snapshot_dirty_ops : NULL;
    default:
        g_assert_not_reached();
    }
}

/* Devices are not unrealized when QEMU ends. */
static void remove_file(Notifier *n, void *data)
{
    unlink(container_of(n, RAMSnapshotStore, exit)->path);
}

RAMSnapshotStore *ram_snapshot_store_new(SnapshotDeviceRam mode,
                                         const char *path, Error **errp)
{
    const RAMSnapshotOps *ops = choose_ops(mode, errp);
    RAMSnapshotStore *store;
    int fd;

    if (!ops) {
        return NULL;
    }
    if (path) {
        fd = qemu_create(path, O_RDWR | O_EXCL, 0600, errp);
        if (fd < 0 && !access(path, F_OK)) {
            error_append_hint(errp, "The RAM image is never written over an "
                              "existing file: remove it, or name another.\n");
        }
    } else {
        fd = qemu_memfd_create("snapshot-ram", 0, false, 0,
                               F_SEAL_SHRINK | F_SEAL_SEAL, errp);
    }
    if (fd < 0) {
        return NULL;
    }

    if (ops == &ram_snapshot_dirty_ops) {
        ram_write_mappings_track();
    }
    store = g_malloc0(ops->store_size);
    store->ops = ops;
    store->fd = fd;
    store->files = g_ptr_array_new();
    if (path) {
        store->path = g_strdup(path);
        store->exit.notify = remove_file;
        qemu_add_exit_notifier(&store->exit);
    }
    ops->store_init(store);
    return store;
}

void ram_snapshot_store_free(RAMSnapshotStore *store)
{
    if (!store) {
        return;
    }
    store->ops->store_clear(store);
    if (store->path) {
        qemu_remove_exit_notifier(&store->exit);
        unlink(store->path);
    }
    close(store->fd);
    g_ptr_array_unref(store->files);
    g_free(store->path);
    g_free(store);
}

bool ram_snapshot_grow(RAMSnapshotStore *store, off_t size, Error **errp)
{
    if (size <= store->size) {
        return true;
    }
    if (ftruncate(store->fd, size) < 0) {
        error_setg_errno(errp, errno, "Growing the RAM image to %jd bytes "
                         "failed", (intmax_t)size);
        return false;
    }
    store->size = size;
    return true;
}

/* The images are mapped: to read what is no more is a bus error. */
static bool store_is_truncated(const RAMSnapshotStore *store, Error **errp)
{
    struct stat st;

    for (unsigned i = 0; i < store->files->len; i++) {
        if (!image_file_is_as_opened(g_ptr_array_index(store->files, i),
                                     errp)) {
            return true;
        }
    }
    if (!store->path || (!fstat(store->fd, &st) && st.st_size >= store->size)) {
        return false;
    }
    error_setg(errp, "The RAM image '%s' was truncated", store->path);
    error_append_hint(errp, "Its snapshots are lost. Start QEMU anew, with a "
                      "file that nobody else writes to.\n");
    return true;
}

SnapshotDeviceRam ram_snapshot_store_mode(const RAMSnapshotStore *store)
{
    return store->ops->mode;
}

/* A backend that no device uses has no name of its own. */
const char *ram_block_name(const RAMBlock *rb)
{
    return *rb->idstr ? rb->idstr : memory_region_name(rb->mr);
}

bool ram_block_is_outside(const RAMBlock *rb)
{
    return rb->flags & RAM_KEPT ||
        (!(rb->flags & RAM_MIGRATABLE) && !memory_region_is_mapped(rb->mr) &&
         object_dynamic_cast(rb->mr->owner, TYPE_MEMORY_BACKEND));
}

static const char *block_refusal(const RAMBlock *rb)
{
    if (ram_block_is_outside(rb)) {
        return NULL;
    }
    if (memory_region_is_ram_device(rb->mr)) {
        return "it is a host device's own memory";
    }
    if (rb->guest_memfd >= 0) {
        return "it is private to the guest (guest_memfd)";
    }
    if (rb->flags & RAM_PMEM) {
        return "it is persistent memory (pmem=on)";
    }
    return NULL;
}

bool ram_snapshot_blocked(const RAMSnapshotStore *store, Error **errp)
{
    RAMBlock *rb;

    if (store_is_truncated(store, errp)) {
        return true;
    }
    if (store->ops->mode == SNAPSHOT_DEVICE_RAM_DIRTY && has_vhost()) {
        error_setg(errp, "A vhost device writes to RAM unseen");
        error_append_hint(errp, "Use ram=remap, or a device without vhost.\n");
        return true;
    }
    if (ram_block_discard_is_required()) {
        error_setg(errp, "A device needs to discard RAM (virtio-mem?), which "
                   "a snapshot cannot allow");
        return true;
    }
    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        const char *reason = block_refusal(rb);

        if (reason) {
            error_setg(errp, "RAM block '%s' cannot be put back: %s",
                       ram_block_name(rb), reason);
            return true;
        }
    }
    return false;
}

bool ram_snapshot_has_other_writers(const RAMBlock *rb)
{
    return (rb->flags & (RAM_SHARED | RAM_PREALLOC)) || rb->mr->rom_device;
}

/* The backend that a block was made by, if it was one */
static const HostMemoryBackend *block_backend(const SavedBlock *b)
{
    Object *owner = memory_region_owner(b->rb->mr);

    return (HostMemoryBackend *)object_dynamic_cast(owner, TYPE_MEMORY_BACKEND);
}

bool ram_block_can_lie_on(const SavedBlock *b)
{
    const HostMemoryBackend *backend = block_backend(b);

    return (!backend || backend->policy == HOST_MEM_POLICY_DEFAULT) &&
        !(b->rb->flags & (RAM_SHARED | RAM_PREALLOC | RAM_RESIZEABLE)) &&
        b->rb->page_size == qemu_real_host_page_size() &&
        b->length >= MAP_MIN;
}

/* As those who made the block did for the mapping that this one replaces */
static void block_advise(const SavedBlock *b, void *p)
{
    const HostMemoryBackend *backend = block_backend(b);

    if (!machine_dump_guest_core(current_machine) ||
        (backend && !backend->dump)) {
        qemu_madvise(p, b->length, QEMU_MADV_DONTDUMP);
    }
    if (backend ? backend->merge : machine_mem_merge(current_machine)) {
        qemu_madvise(p, b->length, QEMU_MADV_MERGEABLE);
    }
    if (!qtest_enabled()) {
        qemu_madvise(p, b->length, QEMU_MADV_DONTFORK);
    }
}

void *ram_block_map(const SavedBlock *b, int fd, off_t pos, Error **errp)
{
    int flags = b->rb->flags & RAM_NORESERVE ? MAP_NORESERVE : 0;
    void *p = mmap(NULL, b->length, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | flags, fd, pos);

    if (p == MAP_FAILED) {
        error_setg_errno(errp, errno, "Mapping %" PRIu64 " bytes of the RAM "
                         "image for '%s' failed", (uint64_t)b->length,
                         b->idstr);
        return NULL;
    }
    block_advise(b, p);
    return p;
}

bool ram_block_move_mapping(const SavedBlock *b, void *mapping, Error **errp)
{
    if (mremap(mapping, b->length, b->length, MREMAP_MAYMOVE | MREMAP_FIXED,
               b->host) == MAP_FAILED) {
        error_setg_errno(errp, errno, "Moving the RAM image over '%s' failed",
                         b->idstr);
        return false;
    }
    return true;
}

void ram_snapshot_flush_tcg(void)
{
    CPUState *cpu;

    if (tcg_enabled()) {
        CPU_FOREACH(cpu) {
            tlb_flush(cpu);
            tb_flush(cpu);
        }
    }
}

static ram_addr_t block_length(const RAMBlock *rb)
{
    /* What nobody can write to needs no putting back. */
    return rb->flags & RAM_READONLY ? 0 :
        ROUND_UP(rb->used_length, qemu_real_host_page_size());
}

bool ram_snapshot_pwrite(const RAMSnapshotStore *store, const uint8_t *buf,
                         size_t len, off_t pos, Error **errp)
{
    while (len) {
        ssize_t n = RETRY_ON_EINTR(pwrite(store->fd, buf, len, pos));

        if (n <= 0) {
            error_setg_errno(errp, n ? errno : ENOSPC,
                             "Writing the RAM image failed");
            error_append_hint(errp, "The image takes as much memory, or "
                              "space with file=, as the guest's RAM.\n");
            return false;
        }
        buf += n;
        pos += n;
        len -= n;
    }
    return true;
}

static void saved_block_clear(void *block)
{
    g_free(((SavedBlock *)block)->idstr);
    g_free(((SavedBlock *)block)->bitmap);
}

RAMSnapshot *ram_snapshot_new(RAMSnapshotStore *store, Error **errp)
{
    RAMSnapshot *snap;

    if (ram_block_discard_disable(true)) {
        error_setg(errp, "RAM is being discarded");
        return NULL;
    }
    snap = g_malloc0(store->ops->snapshot_size);
    snap->store = store;
    snap->refs = 1;
    snap->blocks = g_array_new(false, true, sizeof(SavedBlock));
    g_array_set_clear_func(snap->blocks, saved_block_clear);
    return snap;
}

SavedBlock *ram_snapshot_add_block(RAMSnapshot *snap, RAMBlock *rb)
{
    SavedBlock b = {
        .rb = rb,
        .idstr = g_strdup(ram_block_name(rb)),
        .host = rb->host,
        .offset = rb->offset,
        .length = block_length(rb),
        .pos = snap->size,
        .used_length = rb->used_length,
        .migratable = rb->flags & RAM_MIGRATABLE,
    };

    g_array_append_val(snap->blocks, b);
    snap->size += b.length;
    return saved_block(snap, snap->blocks->len - 1);
}

RAMSnapshot *ram_snapshot_save(RAMSnapshotStore *store, Error **errp)
{
    g_autoptr(RAMSnapshot) snap = ram_snapshot_new(store, errp);
    RAMBlock *rb;

    if (!snap) {
        return NULL;
    }
    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        if (!ram_block_is_outside(rb)) {
            ram_snapshot_add_block(snap, rb);
        }
    }
    return store->ops->save(snap, errp) ? g_steal_pointer(&snap) : NULL;
}

static bool is_saved_block(const SavedBlock *b, const RAMBlock *rb)
{
    return b->rb == rb && b->host == rb->host && b->offset == rb->offset &&
        !strcmp(b->idstr, ram_block_name(rb));
}

/* @b may be of a block that is no more: it is only compared. */
static bool saved_block_is_there(const SavedBlock *b)
{
    RAMBlock *rb;

    RAMBLOCK_FOREACH(rb) {
        if (is_saved_block(b, rb)) {
            return true;
        }
    }
    return false;
}

bool ram_snapshot_matches(const RAMSnapshot *snap, Error **errp)
{
    RAMBlock *rb;
    unsigned i = 0;

    if (store_is_truncated(snap->store, errp)) {
        return false;
    }
    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        const SavedBlock *b = saved_block(snap, i);

        if (ram_block_is_outside(rb)) {
            continue;
        }
        if (i < snap->blocks->len && !is_saved_block(b, rb) &&
            !saved_block_is_there(b)) {
            break;
        }
        if (i == snap->blocks->len || !is_saved_block(b, rb)) {
            error_setg(errp, "RAM block '%s' was plugged after the save",
                       ram_block_name(rb));
            return false;
        }
        if (b->length != block_length(rb)) {
            error_setg(errp, "RAM block '%s' was resized after the save",
                       ram_block_name(rb));
            return false;
        }
        i++;
    }
    /* Blocks are in an order: this one is missing, whatever is at its place. */
    if (i < snap->blocks->len) {
        error_setg(errp, "RAM block '%s' was unplugged after the save",
                   saved_block(snap, i)->idstr);
        return false;
    }
    return true;
}

bool ram_snapshot_prepare(RAMSnapshot *snap, Error **errp)
{
    return !snap->store->ops->prepare || snap->store->ops->prepare(snap, errp);
}

void ram_snapshot_cancel(RAMSnapshot *snap)
{
    if (snap->store->ops->cancel) {
        snap->store->ops->cancel(snap);
    }
}

bool ram_snapshot_restore(RAMSnapshot *snap, uint64_t *pages, Error **errp)
{
    return snap->store->ops->restore(snap, pages, errp);
}

void ram_snapshot_verify(const RAMSnapshot *snap, RAMDifferenceFn *fn,
                         void *opaque)
{
    const size_t size = qemu_target_page_size();
    unsigned i;

    for (i = 0; i < snap->blocks->len; i++) {
        const SavedBlock *b = saved_block(snap, i);
        ram_addr_t off;

        for (off = 0; off < b->length; off += size) {
            const uint8_t *found = b->host + off;
            const uint8_t *saved = snap->store->ops->page(snap, b, off,
                                                           NULL);

            if (memcmp(found, saved, size)) {
                fn(b->idstr, off, saved, found, opaque);
            }
        }
    }
}

uint64_t ram_snapshot_size(const RAMSnapshot *snap)
{
    return snap->size;
}

void ram_snapshot_free(RAMSnapshot *snap)
{
    if (!snap || --snap->refs) {
        return;
    }
    snap->store->ops->release(snap);
    g_array_unref(snap->blocks);
    image_file_unref(snap->file);
    g_free(snap);
    ram_block_discard_disable(false);
}
