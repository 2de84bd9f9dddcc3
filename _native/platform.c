/* The platform differences themselves: everything here has a Linux side and a portable side. */
#define _GNU_SOURCE 1
#define __APPLE_USE_RFC_3542 1

#include "platform.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <linux/unix_diag.h>
#include <sys/random.h>
#endif

#if defined(__linux__) && !defined(FDP_FORCE_FALLBACK)
#define FDP_LINUX 1
#else
#define FDP_LINUX 0
#endif

/* Takes fd, the result of a system call, to 3 or higher and close-on-exec. */
static int numbered(int fd) {
    int result;
    if (fd < 0)
        return -errno;
    if ((result = fdp_adopt(fd)) < 0)
        close(fd);
    return result;
}

int plat_option(int fd, int name, int *value) {
    socklen_t size = sizeof *value;
    return getsockopt(fd, SOL_SOCKET, name, value, &size) < 0 ? -errno : 0;
}

#if FDP_LINUX

int plat_recv_flags(void) { return MSG_CMSG_CLOEXEC; }

int plat_born(int fd) {
    (void)fd;
    return 0;
}

int plat_pair(int type, int *ends) {
    return socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, ends) < 0 ? -errno : 0;
}

int plat_ask_credentials(int sock) {
    int on = 1;
    return setsockopt(sock, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0 ? -errno : 0;
}

int plat_refuse_rights(int sock) {
    enum { PASSRIGHTS = 83 }; /* SO_PASSRIGHTS, which the headers of most systems do not have yet */
    int off = 0;
    if (setsockopt(sock, SOL_SOCKET, PASSRIGHTS, &off, sizeof off) == 0)
        return 1;
    return errno == ENOPROTOOPT || errno == EOPNOTSUPP ? 0 : -errno;
}

int plat_peer_inode(int sock, unsigned long long inode, unsigned long long *peer) {
    struct {
        struct nlmsghdr head;
        struct unix_diag_req body;
    } request = {
        .head = {.nlmsg_len = sizeof request, .nlmsg_type = SOCK_DIAG_BY_FAMILY, .nlmsg_flags = NLM_F_REQUEST},
        .body = {.sdiag_family = AF_UNIX, .udiag_states = ~0U, .udiag_show = UDIAG_SHOW_PEER, .udiag_cookie = {~0U, ~0U}},
    };
    union {
        struct nlmsghdr head;
        char bytes[1024];
    } answer;
    const struct rtattr *attribute;
    ssize_t got = -1;
    size_t left;
    uint32_t number;
    int result = 0, diagnosis = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);

    (void)sock;
    if (diagnosis < 0)
        return -errno;
    request.body.udiag_ino = (uint32_t)inode;
    /* The kernel answers while it is being asked: nothing to wait for. */
    if (send(diagnosis, &request, sizeof request, 0) < 0 || (got = recv(diagnosis, &answer, sizeof answer, MSG_DONTWAIT)) < 0)
        result = -errno;
    close(diagnosis);
    if (result < 0)
        return result;
    if (!NLMSG_OK(&answer.head, (size_t)got) || answer.head.nlmsg_type != SOCK_DIAG_BY_FAMILY)
        return -ENOENT;
    left = answer.head.nlmsg_len - NLMSG_LENGTH(sizeof(struct unix_diag_msg));
    attribute = (const struct rtattr *)(const void *)((const char *)NLMSG_DATA(&answer.head) + NLMSG_ALIGN(sizeof(struct unix_diag_msg)));
    for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left))
        if (attribute->rta_type == UNIX_DIAG_PEER) {
            memcpy(&number, RTA_DATA(attribute), sizeof number);
            *peer = number;
        }
    return 0;
}

int plat_read_credentials(const struct cmsghdr *control, fdp_message *message) {
    struct ucred sender;
    if (control->cmsg_type != SCM_CREDENTIALS || control->cmsg_len < CMSG_LEN(sizeof sender))
        return 0;
    memcpy(&sender, CMSG_DATA(control), sizeof sender);
    message->has_credentials = 1;
    message->pid = sender.pid;
    message->uid = sender.uid;
    message->gid = sender.gid;
    return 1;
}

void plat_peer_credentials(int sock, fdp_message *message) {
    (void)sock;
    (void)message;
}

int plat_stray_descriptor(const struct cmsghdr *control) {
    int fd = -1;
    /* SCM_PIDFD, 0x04: arrives when somebody set SO_PASSPIDFD; unread it would leak one pidfd per message. */
    if (control->cmsg_type == 0x04 && control->cmsg_len >= CMSG_LEN(sizeof fd))
        memcpy(&fd, CMSG_DATA(control), sizeof fd);
    return fd;
}

int plat_probe(int fd, fdp_socket_info *info) {
    int result = plat_option(fd, SO_DOMAIN, &info->family);
    return result < 0 ? result : plat_option(fd, SO_PROTOCOL, &info->protocol);
}

int plat_socket(int type) { return numbered(socket(AF_UNIX, type | SOCK_CLOEXEC, 0)); }

int plat_accept(int listener) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

int plat_random(unsigned char *out, size_t size) {
    return getrandom(out, size, 0) == (ssize_t)size ? 0 : -errno;
}

#else

static int cloexec(int fd) {
    int flags = fcntl(fd, F_GETFD);
    if (flags < 0 || fcntl(fd, F_SETFD, flags | FD_CLOEXEC) < 0)
        return -errno;
    return 0;
}

int plat_recv_flags(void) { return 0; }

int plat_born(int fd) { return cloexec(fd); }

int plat_pair(int type, int *ends) {
    int result;
    if (socketpair(AF_UNIX, type, 0, ends) < 0)
        return -errno;
    if ((result = cloexec(ends[0])) < 0 || (result = cloexec(ends[1])) < 0) {
        close(ends[0]);
        close(ends[1]);
        return result;
    }
    return 0;
}

int plat_ask_credentials(int sock) {
    (void)sock;
    return 0;
}

int plat_refuse_rights(int sock) {
    (void)sock;
    return 0;
}

int plat_peer_inode(int sock, unsigned long long inode, unsigned long long *peer) {
    (void)sock;
    (void)inode;
    (void)peer;
    return -EOPNOTSUPP;
}

int plat_read_credentials(const struct cmsghdr *control, fdp_message *message) {
    (void)control;
    (void)message;
    return 0;
}

void plat_peer_credentials(int sock, fdp_message *message) {
#if defined(__linux__)
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
        return;
    message->pid = peer.pid;
    message->uid = peer.uid;
    message->gid = peer.gid;
#else
    uid_t uid;
    gid_t gid;
    if (getpeereid(sock, &uid, &gid) < 0)
        return;
    message->pid = 0;
    message->uid = uid;
    message->gid = gid;
#endif
    message->has_credentials = 1;
}

int plat_stray_descriptor(const struct cmsghdr *control) {
    (void)control;
    return -1;
}

int plat_probe(int fd, fdp_socket_info *info) {
    struct sockaddr_storage name;
    socklen_t size = sizeof name;
    if (getsockname(fd, (struct sockaddr *)&name, &size) < 0)
        return -errno;
    info->family = name.ss_family;
    info->protocol = 0;
    /* There is no SO_PROTOCOL to ask; these two are what the protocols of the internet families come down to. */
    if (info->family == AF_INET || info->family == AF_INET6)
        info->protocol = info->type == SOCK_STREAM ? IPPROTO_TCP : info->type == SOCK_DGRAM ? IPPROTO_UDP : 0;
    return 0;
}

int plat_socket(int type) { return numbered(socket(AF_UNIX, type, 0)); }

int plat_accept(int listener) {
    int result, fd = accept(listener, NULL, NULL);
    if (fd < 0)
        return -errno;
    if ((result = cloexec(fd)) < 0) {
        close(fd);
        return result;
    }
    return fd;
}

int plat_random(unsigned char *out, size_t size) {
    ssize_t got;
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    got = read(fd, out, size);
    close(fd);
    return got == (ssize_t)size ? 0 : -EIO;
}

#endif

#if defined(__linux__)

/* The uid that the kernel writes for a user outside this user namespace, and that of the user "nobody". */
enum { OVERFLOW_UID = 65534 };

int plat_peer(int sock, unsigned int *uid, int *pid) {
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
        return -errno;
    *uid = peer.uid == OVERFLOW_UID && peer.pid == 0 ? (unsigned int)FDP_NOBODY : peer.uid;
    *pid = peer.pid;
    return 0;
}

#else

int plat_peer(int sock, unsigned int *uid, int *pid) {
    uid_t user;
    gid_t group;
    if (getpeereid(sock, &user, &group) < 0)
        return -errno;
    *uid = user;
    *pid = 0;
#ifdef LOCAL_PEERPID
    {
        socklen_t size = sizeof *pid;
        if (getsockopt(sock, SOL_LOCAL, LOCAL_PEERPID, pid, &size) < 0)
            *pid = 0;
    }
#endif
    return 0;
}

#endif

int plat_address(const void *name, size_t size, char *out) {
    const struct sockaddr_un *address = name;
    size_t head = offsetof(struct sockaddr_un, sun_path);
    if (size <= head || address->sun_family != AF_UNIX)
        return 0;
    size -= head;
    if (size > sizeof address->sun_path)
        size = sizeof address->sun_path;
    memcpy(out, address->sun_path, size);
    return (int)size;
}
