/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernel's netlink sockets, for a fuzzer: what contrib/snapshot/README.rst
 * shows
 *
 *     snapshot-run -- netlink
 *
 * The input is a sequence of messages, each behind two bytes: the protocol, and
 * the length. Those of a protocol go to one socket.
 */

#include <linux/netlink.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
    static unsigned char input[65536], answer[65536];
    struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };
    size_t size = fread(input, 1, sizeof(input), stdin), i = 0;
    int sockets[MAX_LINKS] = { 0 };
    ssize_t got;

    while (i + 2 <= size) {
        unsigned protocol = input[i] % MAX_LINKS, length = input[i + 1];
        struct nlmsghdr header = { .nlmsg_len = sizeof(header) };

        i += 2;
        length = length < size - i ? length : size - i;
        if (!sockets[protocol]) {
            sockets[protocol] = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK,
                                       protocol);
        }
        /* The length in the message is right: others are refused at once. */
        memcpy(&header, input + i,
               length < sizeof(header) ? length : sizeof(header));
        header.nlmsg_len = length;
        memcpy(input + i, &header,
               length < sizeof(header) ? length : sizeof(header));
        sendto(sockets[protocol], input + i, length, 0,
               (struct sockaddr *)&kernel, sizeof(kernel));
        do {
            got = recv(sockets[protocol], answer, sizeof(answer), 0);
        } while (got > 0);
        i += length;
    }
    return 0;
}
