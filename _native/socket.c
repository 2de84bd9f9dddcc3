/* Sockets and descriptors as such: pairs, duplicates, what a descriptor is, waiting, mapping. Nothing here sends or receives. */
#define _GNU_SOURCE 1

#include "platform.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int fdp_dup(int fd) {
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, FDP_FIRST_FD);
    return copy < 0 ? -errno : copy;
}

int fdp_adopt(int fd) {
    int flags, copy;
    if (fd >= 0 && fd < FDP_FIRST_FD) {
        if ((copy = fdp_dup(fd)) >= 0)
            close(fd);
        return copy;
    }
    if ((flags = fcntl(fd, F_GETFD)) < 0)
        return -errno;
    if (!(flags & FD_CLOEXEC) && fcntl(fd, F_SETFD, flags | FD_CLOEXEC) < 0)
        return -errno;
    return fd;
}

int fdp_ask_credentials(int sock) { return plat_ask_credentials(sock); }

int fdp_refuse_rights(int sock) { return plat_refuse_rights(sock); }

int fdp_find_end(int sock, const int *fds, int nfds, unsigned long long *ends) {
    struct stat status;
    int i;
    if (!ends[0]) {
        if (fstat(sock, &status) < 0)
            return -errno;
        ends[0] = status.st_ino;
    }
    for (i = 0; i < nfds; i++) {
        /* One that is not open is the business of whoever sends it. */
        if (fstat(fds[i], &status) < 0 || !S_ISSOCK(status.st_mode))
            continue;
        if (!ends[1] && plat_peer_inode(sock, ends[0], &ends[1]) < 0)
            ends[1] = ~0ULL;
        if (status.st_ino == ends[0] || status.st_ino == ends[1])
            return i;
    }
    return nfds;
}

int fdp_map(int fd, size_t size, char **memory) {
    void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    *memory = mapped;
    return 0;
}

void fdp_unmap(char *memory, size_t size) { munmap(memory, size); }

int fdp_pair(int type, int *ends) {
    int pair[2], result, i;
    if ((result = plat_pair(type, pair)) < 0)
        return result;
    for (i = 0; i < 2; i++) {
        if ((result = fdp_adopt(pair[i])) < 0)
            goto fail;
        pair[i] = result;
        if ((result = plat_ask_credentials(pair[i])) < 0)
            goto fail;
    }
    ends[0] = pair[0];
    ends[1] = pair[1];
    return 0;
fail:
    close(pair[0]);
    close(pair[1]);
    return result;
}

int fdp_socket_probe(int fd, fdp_socket_info *info) {
    fdp_socket_info found;
    int flags, result;
    memset(&found, 0, sizeof found);
    if ((result = plat_option(fd, SO_TYPE, &found.type)) < 0)
        return result;
    if ((result = plat_probe(fd, &found)) < 0)
        return result;
    if (plat_option(fd, SO_ACCEPTCONN, &found.listening) < 0)
        found.listening = 0;
    if ((flags = fcntl(fd, F_GETFL)) < 0)
        return -errno;
    found.nonblocking = (flags & O_NONBLOCK) != 0;
    *info = found;
    return 0;
}

int fdp_listens(int fd) {
    int listening = 0;
    int result = plat_option(fd, SO_ACCEPTCONN, &listening);
    if (result < 0)
        return result == -EBADF ? result : 0;
    return listening != 0;
}

int fdp_wait(int fd, int writing, int timeout_ms) {
    struct pollfd one = {.fd = fd, .events = writing ? POLLOUT : POLLIN, .revents = 0};
    int ready = poll(&one, 1, timeout_ms);
    if (ready < 0)
        return -errno;
    if (ready && (one.revents & POLLNVAL))
        return -EBADF;
    return ready;
}
