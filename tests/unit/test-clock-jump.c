/*
 * Test of timers on a clock that is set
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "qapi/error.h"

#define SECOND  ((int64_t)NANOSECONDS_PER_SECOND)

static void not_now(void *opaque)
{
    g_assert_not_reached();
}

static void now(void *opaque)
{
    ++*(unsigned *)opaque;
}

/*
 * Unsaved timers keep their distance from the clock, whichever way it goes, and
 * however often.  Catches a timer that fires later with each restore; and one
 * of a device, which is in the machine's state, that is moved.
 */
static void test_timers(void)
{
    static const int attributes[] = {
        0, QEMU_TIMER_ATTR_UNSAVED, QEMU_TIMER_ATTR_EXTERNAL,
        QEMU_TIMER_ATTR_UNSAVED | QEMU_TIMER_ATTR_EXTERNAL, 0,
    };
    QEMUTimer *timers[ARRAY_SIZE(attributes)];
    int64_t soon = qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL) + 1000 * SECOND;
    unsigned i, n;

    for (i = 0; i < ARRAY_SIZE(attributes); i++) {
        timers[i] = timer_new_full(NULL, QEMU_CLOCK_VIRTUAL, SCALE_NS,
                                   attributes[i], not_now, NULL);
        timer_mod(timers[i], soon + i);
    }
    for (n = 1; n <= 1000; n++) {
        qemu_clock_jumped(QEMU_CLOCK_VIRTUAL, n % 3 ? -SECOND : SECOND);
    }
    for (i = 0; i < ARRAY_SIZE(attributes); i++) {
        g_assert_cmpint(timer_expire_time_ns(timers[i]), ==,
                        soon + i - (attributes[i] ? 334 * SECOND : 0));
    }
    /* In their list they are in order: the first is one of those moved. */
    g_assert_cmpint(qemu_clock_deadline_ns_all(QEMU_CLOCK_VIRTUAL,
                                               QEMU_TIMER_ATTR_ALL), <=,
                    666 * SECOND + 2);
    for (i = 0; i < ARRAY_SIZE(attributes); i++) {
        timer_free(timers[i]);
    }
}

/*
 * A timer that is due is due still; one that is not armed stays so; those of
 * other clocks are left alone.
 */
static void test_due(void)
{
    unsigned count = 0;
    QEMUTimer *due = timer_new_full(NULL, QEMU_CLOCK_VIRTUAL, SCALE_NS,
                                    QEMU_TIMER_ATTR_UNSAVED, now, &count);
    QEMUTimer *idle = timer_new_full(NULL, QEMU_CLOCK_VIRTUAL, SCALE_NS,
                                     QEMU_TIMER_ATTR_UNSAVED, not_now, NULL);
    QEMUTimer *other = timer_new_full(NULL, QEMU_CLOCK_REALTIME, SCALE_NS,
                                      QEMU_TIMER_ATTR_UNSAVED, not_now, NULL);

    timer_mod(due, 0);
    timer_mod(other, INT64_MAX);
    qemu_clock_jumped(QEMU_CLOCK_VIRTUAL, -SECOND);
    g_assert_false(timer_pending(idle));
    g_assert_cmpint(timer_expire_time_ns(other), ==, INT64_MAX);
    g_assert_true(qemu_clock_run_timers(QEMU_CLOCK_VIRTUAL));
    g_assert_cmpuint(count, ==, 1);
    timer_free(due);
    timer_free(idle);
    timer_free(other);
}

static void count_notify(void *opaque, QEMUClockType type)
{
    ++*(unsigned *)opaque;
}

/*
 * Catches: a jump back that wakes who waits for a timer, which each restore
 * would; a jump ahead that does not, though a timer is due sooner then.
 */
static void test_notify(void)
{
    static const int attributes[] = { 0, QEMU_TIMER_ATTR_UNSAVED };
    QEMUTimerListGroup group;
    unsigned i, count = 0;

    timerlistgroup_init(&group, count_notify, &count);
    for (i = 0; i < ARRAY_SIZE(attributes); i++) {
        QEMUTimer timer;

        timer_init_full(&timer, &group, QEMU_CLOCK_VIRTUAL, SCALE_NS,
                        attributes[i], not_now, NULL);
        timer_mod(&timer, qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL) +
                  1000 * SECOND);
        count = 0;
        qemu_clock_jumped(QEMU_CLOCK_VIRTUAL, -SECOND);
        g_assert_cmpuint(count, ==, 0);
        qemu_clock_jumped(QEMU_CLOCK_VIRTUAL, SECOND);
        g_assert_cmpuint(count, ==, 1);
        timer_del(&timer);
        qemu_clock_jumped(QEMU_CLOCK_VIRTUAL, SECOND);
        g_assert_cmpuint(count, ==, 1);
    }
    timerlistgroup_deinit(&group);
}

int main(int argc, char **argv)
{
    qemu_init_main_loop(&error_abort);
    qemu_clock_enable(QEMU_CLOCK_VIRTUAL, true);
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/clock-jump/timers", test_timers);
    g_test_add_func("/clock-jump/due", test_due);
    g_test_add_func("/clock-jump/notify", test_notify);
    return g_test_run();
}
