/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A kernel module with a planted fault, for scripts/fuzz-demo to find
 *
 * Who writes to /dev/planted sends a message of fields: a letter, and what
 * belongs to it, such as a label's length and text.  Fields can be in groups.  A
 * label is copied to 32 bytes of the heap; whether it fits is looked at
 * everywhere but in a group in a group.
 */

#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#define MESSAGE_MAX     4096
#define LABEL_SIZE      32
#define DEPTH_MAX       4

enum { NUMBER = 'n', LABEL = 'l', GROUP = '(', END = ')' };

struct state {
    u32 sum;
    unsigned int labels;
};

/* Where "~" is, a byte with its highest bit set follows. */
static void copy_label(u8 *to, const u8 *from, size_t length)
{
    bool high = false;

    for (; length; length--, from++) {
        if (*from == '~' && !high) {
            high = true;
        } else {
            *to++ = high ? *from | 0x80 : *from;
            high = false;
        }
    }
}

static int take_label(struct state *s, const u8 *bytes, size_t length,
                      unsigned int depth)
{
    u8 *label;

    /* The planted fault: depth 2 is not looked at. */
    if (depth < 2 && length > LABEL_SIZE) {
        return -ENAMETOOLONG;
    }
    label = kzalloc(LABEL_SIZE, GFP_KERNEL);
    if (!label) {
        return -ENOMEM;
    }
    copy_label(label, bytes, length);
    s->labels += label[0] != 0;
    kfree(label);
    return 0;
}

static int take_fields(struct state *s, const u8 *bytes, size_t length)
{
    unsigned int depth = 0;

    while (length) {
        size_t n = 0;
        u8 kind = *bytes++;
        int err = 0;
        u32 number;

        length--;
        switch (kind) {
        case NUMBER:
            n = sizeof(number);
            if (n > length) {
                return -EINVAL;
            }
            memcpy(&number, bytes, n);
            s->sum += number;
            break;
        case LABEL:
            if (!length || bytes[0] > length - 1) {
                return -EINVAL;
            }
            n = 1 + bytes[0];
            err = take_label(s, bytes + 1, bytes[0], depth);
            break;
        case GROUP:
            err = ++depth > DEPTH_MAX ? -ELOOP : 0;
            break;
        case END:
            err = depth-- ? 0 : -EINVAL;
            break;
        default:
            return -EINVAL;
        }
        if (err) {
            return err;
        }
        bytes += n;
        length -= n;
    }
    return depth ? -EINVAL : 0;
}

static ssize_t planted_write(struct file *file, const char __user *from,
                             size_t length, loff_t *offset)
{
    struct state s = { };
    u8 *message;
    int err;

    if (length > MESSAGE_MAX) {
        return -EMSGSIZE;
    }
    message = memdup_user(from, length);
    if (IS_ERR(message)) {
        return PTR_ERR(message);
    }
    err = take_fields(&s, message, length);
    kfree(message);
    return err ? err : length;
}

static const struct file_operations planted_operations = {
    .owner = THIS_MODULE,
    .write = planted_write,
};

static struct miscdevice planted = {
    .minor = MISC_DYNAMIC_MINOR,
    .name = "planted",
    .fops = &planted_operations,
};

module_misc_device(planted);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("a planted fault, for a fuzzer to find");
