/*
 * Coverage of the guest's code, as a fuzzer wants it: -object tcg-coverage
 *
 * Each translation block begins with ops that count the edge that leads to it,
 * in the way of AFL: map[(prev ^ id) & mask]++, prev = id >> 1. An id is a hash
 * of the block's address, so that it is the same however often, and in whatever
 * order, blocks are translated.
 *
 * What is to be counted is decided when a block is translated. A vCPU that is
 * looked at has CF_COVERAGE in its cflags; all its blocks differ from those of
 * before then, so that nothing has to be flushed, and no block asks anything
 * when it is executed.
 *
 * A block that begins because one before it was cut short, to take an interrupt
 * or to carry out I/O, is no block of the program's: it has CF_NO_EDGE. So that
 * this can be known, blocks that are cut return to the main loop, and set
 * coverage_cut.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/log.h"
#include "qemu/main-loop.h"
#include "qemu/range.h"
#include "qemu/units.h"
#include "qemu/xxhash.h"
#include "qapi/error.h"
#include "qapi/qapi-builtin-visit.h"
#include "qapi/qapi-types-qom.h"
#include "accel/tcg/cpu-ops.h"
#include "exec/tb-flush.h"
#include "exec/tcg-coverage.h"
#include "exec/translation-block.h"
#include "exec/translator.h"
#include "hw/core/cpu.h"
#include "qom/object_interfaces.h"
#include "system/cpus.h"
#include "system/hostmem.h"
#include "system/tcg.h"
#include "tcg/tcg-op-common.h"
#include "tcg/tcg-temp-internal.h"
#include "internal-common.h"

#define TYPE_TCG_COVERAGE "tcg-coverage"
OBJECT_DECLARE_SIMPLE_TYPE(TCGCoverage, TCG_COVERAGE)

#define MAP_SIZE_MIN    (4 * KiB)
#define MAP_SIZE_MAX    (1 * GiB)

struct TCGCoverage {
    Object parent;

    HostMemoryBackend *memdev;
    uint64_t base;
    uint64_t page_table;
    TCGCoverageMode mode;
    strList *ranges;
    GArray *range;      /* of Range: what ranges says; NULL: everything */
    bool interrupts;

    /* NULL until the object is complete */
    uint8_t *map;
    size_t size;
};

/* What is known of a vCPU while there is an object */
struct TCGCoverageCPU {
    bool pcrel;         /* it had CF_PCREL before */

    /* What was interrupted and is to be returned to, the latest last */
    unsigned depth;
    struct {
        vaddr pc, sp;
        uint32_t prev;
        bool cut;
    } interrupted[4];
};

/* The only object, while it is complete; BQL */
static TCGCoverage *coverage;

static void tcg_coverage_context(CPUState *cpu, TCGCoverageContext *context)
{
    const TCGCPUOps *ops = cpu->cc->tcg_ops;

    *context = (TCGCoverageContext) { };
    if (ops->coverage_context) {
        ops->coverage_context(cpu, context);
    }
}

/* ------------------------------------------------------------ translation */

static bool tcg_coverage_wants(CPUState *cpu, vaddr pc)
{
    if (coverage->mode != TCG_COVERAGE_MODE_ALL) {
        TCGCoverageContext context;

        tcg_coverage_context(cpu, &context);
        if (context.user != (coverage->mode == TCG_COVERAGE_MODE_USER)) {
            return false;
        }
    }
    if (!coverage->range) {
        return true;
    }
    for (unsigned i = 0; i < coverage->range->len; i++) {
        if (range_contains(&g_array_index(coverage->range, Range, i), pc)) {
            return true;
        }
    }
    return false;
}

void tcg_coverage_gen_tb_start(CPUState *cpu, const DisasContextBase *db)
{
    const intptr_t prev = offsetof(CPUState, neg.coverage_prev) -
        sizeof(CPUState);
    vaddr pc = db->pc_first - coverage->base;
    uint32_t id;
    TCGv_i32 count, carry;
    TCGv_ptr byte;

    if (tb_cflags(db->tb) & CF_NO_EDGE || !tcg_coverage_wants(cpu, pc)) {
        return;
    }
    id = qemu_xxhash2(pc) & (coverage->size - 1);
    count = tcg_temp_ebb_new_i32();
    carry = tcg_temp_ebb_new_i32();
    byte = tcg_temp_ebb_new_ptr();

    /* id and prev are less than the map's size, so their XOR is. */
    tcg_gen_ld_i32(count, tcg_env, prev);
    tcg_gen_xori_i32(count, count, id);
    tcg_gen_ext_i32_ptr(byte, count);
    tcg_gen_add_ptr(byte, byte, tcg_constant_ptr(coverage->map));
    tcg_gen_ld8u_i32(count, byte, 0);
    tcg_gen_addi_i32(count, count, 1);
    /* Behind 255 comes 1: an edge that was taken is not to look as if not. */
    tcg_gen_shri_i32(carry, count, 8);
    tcg_gen_add_i32(count, count, carry);
    tcg_gen_st8_i32(count, byte, 0);
    tcg_gen_st_i32(tcg_constant_i32(id >> 1), tcg_env, prev);

    tcg_temp_free_i32(count);
    tcg_temp_free_i32(carry);
    tcg_temp_free_ptr(byte);
}

void tcg_coverage_gen_cut(void)
{
    QEMU_BUILD_BUG_ON(sizeof_field(CPUState, neg.coverage_cut) != 1);
    tcg_gen_st8_i32(tcg_constant_i32(true), tcg_env,
                    offsetof(CPUState, neg.coverage_cut) - sizeof(CPUState));
}

/* ------------------------------------------------------------------ vCPUs */

void tcg_coverage_update(CPUState *cpu)
{
    TCGCoverageContext context;
    uint32_t cflags = CF_COVERAGE;

    if (!cpu->tcg_coverage) {
        return;
    }
    if (coverage->page_table) {
        tcg_coverage_context(cpu, &context);
        if (context.page_table != coverage->page_table) {
            cflags = 0;
        }
    }
    if (cpu->tcg_coverage->depth && !coverage->interrupts) {
        cflags |= CF_NO_EDGE;
    }
    cpu->tcg_cflags &= ~(CF_COVERAGE | CF_NO_EDGE);
    cpu->tcg_cflags |= cflags;
}

/* Has the vCPU returned from an interrupt? Then it goes on as before. */
static bool tcg_coverage_return(CPUState *cpu, struct TCGCoverageCPU *c)
{
    vaddr pc = cpu->cc->get_pc(cpu);
    TCGCoverageContext context;
    unsigned i = c->depth;

    tcg_coverage_context(cpu, &context);
    while (i-- > 0) {
        if (c->interrupted[i].pc == pc && c->interrupted[i].sp == context.sp) {
            c->depth = i;
            cpu->neg.coverage_prev = c->interrupted[i].prev;
            cpu->neg.coverage_cut = c->interrupted[i].cut;
            tcg_coverage_update(cpu);
            return true;
        }
    }
    if (context.user) {
        /* No handler is unprivileged: this is another task. */
        c->depth = 0;
        cpu->neg.coverage_prev = 0;
        cpu->neg.coverage_cut = false;
        tcg_coverage_update(cpu);
        return true;
    }
    return false;
}

/*
 * An interrupt comes when it likes. For what it interrupts to count the same
 * edges in each run, it goes on as if there had been no interrupt; and so that
 * a handler counts the same ones, nothing is left to it of what was before.
 */
void tcg_coverage_interrupt(CPUState *cpu)
{
    struct TCGCoverageCPU *c = cpu->tcg_coverage;
    TCGCoverageContext context;

    if (!c || !tcg_cflags_has(cpu, CF_COVERAGE)) {
        return;
    }
    if (c->depth) {
        /* The one before may have been returned from just now. */
        tcg_coverage_return(cpu, c);
    }
    if (c->depth == ARRAY_SIZE(c->interrupted)) {
        /* Tasks were switched: it will be long before that is returned to. */
        memmove(&c->interrupted[0], &c->interrupted[1],
                sizeof(c->interrupted) - sizeof(c->interrupted[0]));
        c->depth--;
    }
    tcg_coverage_context(cpu, &context);
    c->interrupted[c->depth].pc = cpu->cc->get_pc(cpu);
    c->interrupted[c->depth].sp = context.sp;
    c->interrupted[c->depth].prev = cpu->neg.coverage_prev;
    c->interrupted[c->depth].cut = cpu->neg.coverage_cut;
    c->depth++;
    cpu->neg.coverage_prev = 0;
    cpu->neg.coverage_cut = false;
    tcg_coverage_update(cpu);
}

uint32_t tcg_coverage_cflags(CPUState *cpu, uint32_t cflags,
                             TranslationBlock **last_tb)
{
    struct TCGCoverageCPU *c = cpu->tcg_coverage;

    if (c->depth && tcg_coverage_return(cpu, c)) {
        cflags &= ~CF_NO_EDGE;
        cflags |= cpu->tcg_cflags & CF_NO_EDGE;
        *last_tb = NULL;
    }
    if (cflags & CF_COUNT_MASK) {
        /* Come back here for what follows. */
        cflags |= CF_NO_GOTO_TB | CF_NO_GOTO_PTR;
    }
    /* With CF_NOIRQ, an instruction of a block that was counted is redone. */
    if (cpu->neg.coverage_cut || cflags & CF_NOIRQ) {
        cpu->neg.coverage_cut = false;
        cflags |= CF_NO_EDGE;
        *last_tb = NULL;
    }
    return cflags;
}

static void tcg_coverage_restart_cpu(CPUState *cpu)
{
    cpu->tcg_coverage->depth = 0;
    cpu->neg.coverage_prev = 0;
    cpu->neg.coverage_cut = false;
    tcg_coverage_update(cpu);
}

void tcg_coverage_reset_cpu(CPUState *cpu)
{
    if (cpu->tcg_coverage) {
        tcg_coverage_restart_cpu(cpu);
    }
}

void tcg_coverage_add_cpu(CPUState *cpu)
{
    if (!coverage) {
        return;
    }
    cpu->tcg_coverage = g_new0(struct TCGCoverageCPU, 1);
    cpu->tcg_coverage->pcrel = tcg_cflags_has(cpu, CF_PCREL);
    cpu->tcg_cflags &= ~CF_PCREL;
    tcg_coverage_restart_cpu(cpu);
}

void tcg_coverage_remove_cpu(CPUState *cpu)
{
    if (!cpu->tcg_coverage) {
        return;
    }
    cpu->tcg_cflags &= ~(CF_COVERAGE | CF_NO_EDGE);
    if (cpu->tcg_coverage->pcrel) {
        cpu->tcg_cflags |= CF_PCREL;
    }
    /* What was to be executed next was chosen for the flags of before. */
    if (cpu->cflags_next_tb != -1) {
        cpu->cflags_next_tb &= ~(CF_COVERAGE | CF_NO_EDGE);
    }
    g_clear_pointer(&cpu->tcg_coverage, g_free);
}

void tcg_coverage_restored(void)
{
    CPUState *cpu;

    if (!coverage) {
        return;
    }
    CPU_FOREACH(cpu) {
        tcg_coverage_restart_cpu(cpu);
    }
}

void tcg_coverage_begin_run(void)
{
    if (!coverage) {
        return;
    }
    memset(coverage->map, 0, coverage->size);
    tcg_coverage_restored();
}

uint8_t *tcg_coverage_map(size_t *size)
{
    *size = coverage ? coverage->size : 0;
    return coverage ? coverage->map : NULL;
}

static void tcg_coverage_update_on_cpu(CPUState *cpu, run_on_cpu_data data)
{
    tcg_coverage_update(cpu);
}

bool tcg_coverage_set_page_table(uint64_t page_table)
{
    CPUState *cpu;

    if (!coverage ||
        (first_cpu && !first_cpu->cc->tcg_ops->coverage_context)) {
        return false;
    }
    coverage->page_table = page_table;
    CPU_FOREACH(cpu) {
        async_run_on_cpu(cpu, tcg_coverage_update_on_cpu, RUN_ON_CPU_NULL);
    }
    return true;
}

/*
 * Calls @fn while no vCPU executes or translates anything. In a vCPU's thread,
 * where that cannot be waited for, it is the next thing that vCPU does.
 */
static void tcg_coverage_exclusively(run_on_cpu_func fn, void *opaque)
{
    if (!first_cpu) {
        fn(NULL, RUN_ON_CPU_HOST_PTR(opaque));
    } else if (qemu_in_vcpu_thread()) {
        async_safe_run_on_cpu(current_cpu, fn, RUN_ON_CPU_HOST_PTR(opaque));
    } else {
        pause_all_vcpus();
        fn(first_cpu, RUN_ON_CPU_HOST_PTR(opaque));
        resume_all_vcpus();
    }
}

static void tcg_coverage_do_set_base(CPUState *cpu, run_on_cpu_data data)
{
    g_autofree uint64_t *base = data.host_ptr;

    /* The object may have been deleted since it was asked for. */
    if (coverage) {
        coverage->base = *base;
        tb_flush_exclusive();
    }
}

bool tcg_coverage_set_base(uint64_t base)
{
    if (!coverage) {
        return false;
    }
    tcg_coverage_exclusively(tcg_coverage_do_set_base,
                             g_memdup2(&base, sizeof(base)));
    return true;
}

/* ----------------------------------------------------------------- object */

static void tcg_coverage_start(CPUState *cpu, run_on_cpu_data data)
{
    coverage = data.host_ptr;
    CPU_FOREACH(cpu) {
        tcg_coverage_add_cpu(cpu);
    }
}

static void tcg_coverage_stop(CPUState *cpu, run_on_cpu_data data)
{
    CPU_FOREACH(cpu) {
        tcg_coverage_remove_cpu(cpu);
    }
    coverage = NULL;
    tb_flush_exclusive();
}

/* Has this CPU's target what @c looks at? */
static bool tcg_coverage_fits_cpu(const TCGCoverage *c, CPUState *cpu,
                                  Error **errp)
{
    if ((c->page_table || c->mode != TCG_COVERAGE_MODE_ALL) &&
        !cpu->cc->tcg_ops->coverage_context) {
        error_setg(errp, "tcg-coverage: 'page-table' and 'mode' are not known "
                   "for this target");
        return false;
    }
    return true;
}

bool tcg_coverage_check_cpu(CPUState *cpu, Error **errp)
{
    return !coverage || tcg_coverage_fits_cpu(coverage, cpu, errp);
}

static bool tcg_coverage_check(TCGCoverage *c, Error **errp)
{
    g_autofree char *other = NULL;
    const char *name;

    if (!tcg_enabled()) {
        error_setg(errp, "tcg-coverage counts what TCG translates; use it with "
                   "-accel tcg");
        return false;
    }
    if (coverage) {
        other = object_get_canonical_path(OBJECT(coverage));
        error_setg(errp, "there is a tcg-coverage object, %s; delete it first",
                   other);
        return false;
    }
    if (!c->memdev) {
        error_setg(errp, "'memdev' must name the memory backend to count in");
        return false;
    }
    name = object_get_canonical_path_component(OBJECT(c->memdev));
    if (host_memory_backend_is_mapped(c->memdev)) {
        error_setg(errp, "memory backend '%s' is in use; tcg-coverage needs "
                   "one of its own", name);
        return false;
    }
    if (!is_power_of_2(c->memdev->size) || c->memdev->size < MAP_SIZE_MIN ||
        c->memdev->size > MAP_SIZE_MAX) {
        error_setg(errp, "memory backend '%s' has %" PRIu64 " bytes; a map "
                   "must have a power of two, from 4 KiB to 1 GiB", name,
                   c->memdev->size);
        return false;
    }
    return !first_cpu || tcg_coverage_fits_cpu(c, first_cpu, errp);
}

static void tcg_coverage_complete(UserCreatable *uc, Error **errp)
{
    TCGCoverage *c = TCG_COVERAGE(uc);
    MemoryRegion *mr;

    if (!tcg_coverage_check(c, errp)) {
        return;
    }
    mr = host_memory_backend_get_memory(c->memdev);
    if (mr->readonly) {
        error_setg(errp, "'memdev' is read-only: nothing can be counted there");
        return;
    }
    host_memory_backend_set_mapped(c->memdev, true);
    host_memory_backend_set_kept(c->memdev, true);
    c->map = memory_region_get_ram_ptr(mr);
    c->size = memory_region_size(mr);
    tcg_coverage_exclusively(tcg_coverage_start, c);
}

static void tcg_coverage_finalize(Object *obj)
{
    TCGCoverage *c = TCG_COVERAGE(obj);

    if (c->map) {
        tcg_coverage_exclusively(tcg_coverage_stop, c);
        host_memory_backend_set_kept(c->memdev, false);
        host_memory_backend_set_mapped(c->memdev, false);
    }
    qapi_free_strList(c->ranges);
    g_clear_pointer(&c->range, g_array_unref);
}

/* Most properties cannot change when blocks were translated by them. */
static bool tcg_coverage_may_set(TCGCoverage *c, const char *name,
                                 Error **errp)
{
    if (c->map) {
        error_setg(errp, "'%s' of a tcg-coverage object cannot be changed",
                   name);
        return false;
    }
    return true;
}

static void tcg_coverage_check_memdev(const Object *obj, const char *name,
                                      Object *val, Error **errp)
{
    tcg_coverage_may_set(TCG_COVERAGE(obj), name, errp);
}

static void tcg_coverage_get_base(Object *obj, Visitor *v, const char *name,
                                  void *opaque, Error **errp)
{
    visit_type_uint64(v, name, &TCG_COVERAGE(obj)->base, errp);
}

static void tcg_coverage_prop_set_base(Object *obj, Visitor *v,
                                       const char *name, void *opaque,
                                       Error **errp)
{
    TCGCoverage *c = TCG_COVERAGE(obj);
    uint64_t base;

    if (!visit_type_uint64(v, name, &base, errp)) {
        return;
    }
    if (c->map) {
        tcg_coverage_set_base(base);
    } else {
        c->base = base;
    }
}

static void tcg_coverage_get_page_table(Object *obj, Visitor *v,
                                        const char *name, void *opaque,
                                        Error **errp)
{
    visit_type_uint64(v, name, &TCG_COVERAGE(obj)->page_table, errp);
}

static void tcg_coverage_prop_set_page_table(Object *obj, Visitor *v,
                                             const char *name, void *opaque,
                                             Error **errp)
{
    TCGCoverage *c = TCG_COVERAGE(obj);
    uint64_t page_table;

    if (!visit_type_uint64(v, name, &page_table, errp)) {
        return;
    }
    if (!c->map) {
        c->page_table = page_table;
    } else if (!tcg_coverage_set_page_table(page_table)) {
        error_setg(errp, "'%s' is not known for this target", name);
    }
}

static int tcg_coverage_get_mode(Object *obj, Error **errp)
{
    return TCG_COVERAGE(obj)->mode;
}

static void tcg_coverage_set_mode(Object *obj, int mode, Error **errp)
{
    TCGCoverage *c = TCG_COVERAGE(obj);

    if (tcg_coverage_may_set(c, "mode", errp)) {
        c->mode = mode;
    }
}

static void tcg_coverage_get_ranges(Object *obj, Visitor *v, const char *name,
                                    void *opaque, Error **errp)
{
    visit_type_strList(v, name, &TCG_COVERAGE(obj)->ranges, errp);
}

static void tcg_coverage_set_ranges(Object *obj, Visitor *v, const char *name,
                                    void *opaque, Error **errp)
{
    TCGCoverage *c = TCG_COVERAGE(obj);
    g_autoptr(GArray) range = g_array_new(FALSE, FALSE, sizeof(Range));
    g_autoptr(strList) ranges = NULL;
    strList *one;

    if (!tcg_coverage_may_set(c, name, errp) ||
        !visit_type_strList(v, name, &ranges, errp)) {
        return;
    }
    for (one = ranges; one; one = one->next) {
        g_autoptr(GArray) some = qemu_parse_ranges(one->value, errp);

        if (!some) {
            error_prepend(errp, "'%s' has \"%s\": ", name, one->value);
            return;
        }
        g_array_append_vals(range, some->data, some->len);
    }
    qapi_free_strList(c->ranges);
    g_clear_pointer(&c->range, g_array_unref);
    c->ranges = g_steal_pointer(&ranges);
    c->range = g_steal_pointer(&range);
}

static bool tcg_coverage_get_interrupts(Object *obj, Error **errp)
{
    return TCG_COVERAGE(obj)->interrupts;
}

static void tcg_coverage_set_interrupts(Object *obj, bool interrupts,
                                        Error **errp)
{
    TCGCoverage *c = TCG_COVERAGE(obj);

    if (tcg_coverage_may_set(c, "interrupts", errp)) {
        c->interrupts = interrupts;
    }
}

static void tcg_coverage_init(Object *obj)
{
    TCG_COVERAGE(obj)->interrupts = true;
}

static void tcg_coverage_class_init(ObjectClass *oc, void *data)
{
    USER_CREATABLE_CLASS(oc)->complete = tcg_coverage_complete;

    object_class_property_add_link(oc, "memdev", TYPE_MEMORY_BACKEND,
                                   offsetof(TCGCoverage, memdev),
                                   tcg_coverage_check_memdev,
                                   OBJ_PROP_LINK_STRONG);
    object_class_property_add(oc, "base", "uint64", tcg_coverage_get_base,
                              tcg_coverage_prop_set_base, NULL, NULL);
    object_class_property_add(oc, "page-table", "uint64",
                              tcg_coverage_get_page_table,
                              tcg_coverage_prop_set_page_table, NULL, NULL);
    object_class_property_add_enum(oc, "mode", "TCGCoverageMode",
                                   &TCGCoverageMode_lookup,
                                   tcg_coverage_get_mode,
                                   tcg_coverage_set_mode);
    object_class_property_add(oc, "ranges", "strList",
                              tcg_coverage_get_ranges,
                              tcg_coverage_set_ranges, NULL, NULL);
    object_class_property_add_bool(oc, "interrupts",
                                   tcg_coverage_get_interrupts,
                                   tcg_coverage_set_interrupts);
}

static const TypeInfo tcg_coverage_info = {
    .name = TYPE_TCG_COVERAGE,
    .parent = TYPE_OBJECT,
    .class_init = tcg_coverage_class_init,
    .instance_size = sizeof(TCGCoverage),
    .instance_init = tcg_coverage_init,
    .instance_finalize = tcg_coverage_finalize,
    .interfaces = (InterfaceInfo[]) {
        { TYPE_USER_CREATABLE },
        { }
    }
};

static void tcg_coverage_register_types(void)
{
    type_register_static(&tcg_coverage_info);
}

type_init(tcg_coverage_register_types);
