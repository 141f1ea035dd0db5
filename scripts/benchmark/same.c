/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A mutator of AFL++'s that changes nothing, so that it runs the same input as
 * the others, as often as it can
 */

#include <stddef.h>
#include <stdint.h>

void *afl_custom_init(void *afl, unsigned seed)
{
    (void)seed;
    return afl;
}

void afl_custom_deinit(void *data)
{
    (void)data;
}

size_t afl_custom_fuzz(void *data, uint8_t *buf, size_t size, uint8_t **out,
                       uint8_t *other, size_t other_size, size_t most)
{
    (void)data;
    (void)other;
    (void)other_size;
    *out = buf;
    return size < most ? size : most;
}
