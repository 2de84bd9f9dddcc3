/* Descriptors in control messages: one sendmsg, one recvmsg. No retries, no waiting, no policy. */
#define _GNU_SOURCE 1

#include "platform.h"

#include <errno.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

/* Room for a full SCM_RIGHTS beside everything else that the kernel may attach (credentials, a pidfd, a security label),
 * so that MSG_CTRUNC never means "the buffer was small" and the sender's count is always known. */
#define CONTROL_ROOM (CMSG_SPACE(FDP_MAX_FDS * sizeof(int)) + CMSG_SPACE(sizeof(int)) + CMSG_SPACE(64) + CMSG_SPACE(512))

ssize_t fdp_send(int sock, const char *data, size_t size, const int *fds, int nfds, int flags) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(FDP_MAX_FDS * sizeof(int))];
    } control;
    struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = size};
    struct msghdr header;
    struct cmsghdr *rights;
    size_t payload;
    ssize_t sent;

    if (nfds < 0 || nfds > FDP_MAX_FDS)
        return -EINVAL;
    memset(&header, 0, sizeof header);
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    if (nfds) {
        payload = (size_t)nfds * sizeof(int);
        header.msg_control = control.bytes;
        header.msg_controllen = CMSG_SPACE(payload);
        /* The padding behind an odd number of descriptors goes to the kernel too. */
        memset(control.bytes, 0, header.msg_controllen);
        rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(payload);
        memcpy(CMSG_DATA(rights), fds, payload);
    }
    sent = sendmsg(sock, &header, flags | MSG_NOSIGNAL);
    return sent < 0 ? -errno : sent;
}

ssize_t fdp_send_one(int sock, const char *data, size_t size, int fd, int flags) {
    return fdp_send(sock, data, size, &fd, 1, flags);
}

ssize_t fdp_send_frame(int sock, const char *data, size_t size, const int *fds, int nfds, int flags, unsigned long long *ends) {
    int place = nfds;
    if (nfds && ends && (place = fdp_find_end(sock, fds, nfds, ends)) < 0)
        return place;
    return place < nfds ? -ELOOP : fdp_send(sock, data, size, fds, nfds, flags);
}

/* Takes the descriptors of one SCM_RIGHTS. Counts from cmsg_len, because CMSG_SPACE of one descriptor admits two.
 * Ownership: every descriptor in the control message ends in message->fds or is closed here. */
static void take_rights(const struct cmsghdr *control, fdp_message *message) {
    size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int), i;
    const int room = (int)(sizeof message->fds / sizeof *message->fds);
    int fd, kept;
    for (i = 0; i < count; i++) {
        memcpy(&fd, CMSG_DATA(control) + i * sizeof fd, sizeof fd);
        kept = message->nfds < room && plat_born(fd) == 0 ? fd : -1;
        /* A process whose stdin is closed would receive it as number 0, and print into it later. */
        if (kept >= 0 && kept < FDP_FIRST_FD)
            kept = fdp_adopt(kept);
        if (kept < 0) {
            close(fd);
            message->dropped = 1;
        } else {
            message->fds[message->nfds++] = kept;
        }
    }
}

/* One recvmsg, whose descriptors are added to those in message; everything else there is this receive's. */
static ssize_t receive(int sock, char *buffer, size_t size, int flags, fdp_message *message, uid_t self) {
    union {
        struct cmsghdr align;
        char bytes[CONTROL_ROOM];
    } room;
    struct sockaddr_un name;
    struct iovec part = {.iov_base = buffer, .iov_len = size};
    struct msghdr header;
    struct cmsghdr *control;
    ssize_t got;
    int stray;

    message->received = 0;
    message->dropped = 0;
    message->own = 0;
    message->has_credentials = 0;
    message->address_size = 0;
    memset(&header, 0, sizeof header);
    header.msg_name = &name;
    header.msg_namelen = sizeof name;
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = room.bytes;
    header.msg_controllen = sizeof room.bytes;
    got = recvmsg(sock, &header, flags | plat_recv_flags());
    if (got < 0)
        return -errno;
    message->received = (int)got;
    /* The kernel echoes our own MSG_CMSG_CLOEXEC; the caller asked for no such thing. */
    message->msg_flags = header.msg_flags & ~plat_recv_flags();
    if (header.msg_namelen)
        message->address_size = plat_address(&name, header.msg_namelen, message->address);
    for (control = CMSG_FIRSTHDR(&header); control; control = CMSG_NXTHDR(&header, control)) {
        if (control->cmsg_level != SOL_SOCKET)
            continue;
        if (control->cmsg_type == SCM_RIGHTS)
            take_rights(control, message);
        else if (!plat_read_credentials(control, message) && (stray = plat_stray_descriptor(control)) >= 0)
            close(stray);
    }
    if (!message->has_credentials)
        plat_peer_credentials(sock, message);
    /* Without a pid, 65534 is what the kernel writes for a sender that it does not know. */
    message->own = message->has_credentials && message->uid == self && (message->pid || message->uid != 65534);
    /* With this much room the flag has two causes left: no free descriptor number, or a security module said no.
     * The kernel installs what fits, delivers the payload and tells in no other way. */
    if (header.msg_flags & MSG_CTRUNC)
        message->dropped = 1;
    message->plain = message->dropped || message->msg_flags || message->address_size ? -1 : message->nfds;
    return got;
}

ssize_t fdp_recv(int sock, char *buffer, size_t size, int flags, fdp_message *message) {
    message->nfds = 0;
    return receive(sock, buffer, size, flags, message, getuid());
}

static unsigned long long number_at(const char *bytes, size_t size) {
    unsigned long long number = 0;
    while (size--)
        number = number << 8 | (unsigned char)*bytes++;
    return number;
}

ssize_t fdp_recv_frame(int sock, char *buffer, size_t size, int flags, fdp_message *message) {
    uid_t self = getuid();
    ssize_t more, got;
    unsigned long long payload, end;
    int announced, own, has_credentials;

    message->nfds = 0;
    message->frame = -1;
    /* No frame is shorter, so this reads one frame only; most are not longer, so this is all. */
    got = receive(sock, buffer, FDP_LEAST, flags, message, self);
    own = message->own, has_credentials = message->has_credentials;
    announced = message->nfds;
    if (got < FDP_HEADER || message->dropped || announced > FDP_BATCH || number_at(buffer + 4, 4) != (unsigned long long)announced ||
        (has_credentials && !own) || (payload = number_at(buffer + 8, 8)) > size - FDP_HEADER)
        return got;
    end = payload < FDP_LEAST - FDP_HEADER ? FDP_LEAST : payload + FDP_HEADER;
    if ((unsigned long long)got < end) {
        /* Sent in one piece it is there. Where it is not, whoever calls waits, which takes the clock and the signals of Python. */
        more = receive(sock, buffer + got, (size_t)end - (size_t)got, flags | MSG_DONTWAIT, message, self);
        if (more <= 0)
            more = 0, message->own = own;
        message->own = message->own && own;
        message->has_credentials = message->has_credentials && has_credentials;
        message->received = (int)(got += more);
    }
    if ((unsigned long long)got == end && message->plain == announced && memcmp(buffer, "fd\1", 3) == 0) {
        message->frame = (unsigned char)buffer[3];
        message->size = (int)payload;
    }
    return got;
}

void fdp_message_close(fdp_message *message) {
    int i;
    for (i = 0; i < message->nfds; i++)
        if (message->fds[i] >= 0)
            close(message->fds[i]);
    message->nfds = 0;
}
