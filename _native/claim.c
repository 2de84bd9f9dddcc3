/* The claimant's side of a claim: one packet out, one packet and a descriptor in. */
#define _GNU_SOURCE 1

#include "packet.h"
#include "platform.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

/* Numbers that a fork must not leave open in the child: connections, and the ones that claims keep free. Whatever makes or closes
 * one holds the lock, and so does a fork: else it may copy the descriptors before and the memory after. */
static struct {
    pthread_mutex_t lock;
    int hooked, count, size;
    int *fds;
} held = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void before_fork(void) { pthread_mutex_lock(&held.lock); }

static void after_fork_in_parent(void) { pthread_mutex_unlock(&held.lock); }

static void after_fork_in_child(void) {
    pthread_mutex_init(&held.lock, NULL);
    while (held.count)
        close(held.fds[--held.count]);
}

static int room(void) {
    int result, *fds, size = 2 * held.size + 16;
    if (!held.hooked && (result = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child)) != 0)
        return -result;
    held.hooked = 1;
    if (held.count < held.size)
        return 0;
    if (!(fds = realloc(held.fds, sizeof *fds * (size_t)size)))
        return -ENOMEM;
    held.fds = fds;
    held.size = size;
    return 0;
}

/* A duplicate of a descriptor, or with -1 a new socket. Ownership: the number returned is the caller's, to give to let_go. */
static int hold(int fd) {
    int result;
    pthread_mutex_lock(&held.lock);
    if ((result = room()) == 0 && (result = fd < 0 ? plat_socket(SOCK_STREAM) : fdp_dup(fd)) >= 0)
        held.fds[held.count++] = result;
    pthread_mutex_unlock(&held.lock);
    return result;
}

/* Ownership: closes fd if it is held, in this process. */
static void let_go(int fd) {
    int i;
    pthread_mutex_lock(&held.lock);
    for (i = 0; i < held.count && held.fds[i] != fd; i++)
        continue;
    if (i < held.count) {
        held.fds[i] = held.fds[--held.count];
        close(fd);
    }
    pthread_mutex_unlock(&held.lock);
}

void fdp_claim_close(fdp_claim *claim) {
    if (claim->spare >= 0)
        let_go(claim->spare);
    if (claim->fd >= 0)
        close(claim->fd);
    claim->spare = claim->fd = -1;
}

int fdp_claim_open(const char *path, int timeout_ms, int *sock) {
    struct sockaddr_un name;
    struct timeval wait = {timeout_ms / 1000, timeout_ms % 1000 * 1000 + 1}; /* 0 would mean for ever */
    size_t size = strlen(path) + 1;
    int result;
    if (size > sizeof name.sun_path)
        return -ENAMETOOLONG;
    memset(&name, 0, sizeof name);
    name.sun_family = AF_UNIX;
    memcpy(name.sun_path, path, size);
    fdp_claim_leave(sock);
    if ((result = hold(-1)) < 0)
        return result;
    *sock = result;
    /* It blocks: behind a full backlog the kernel lets everybody in by turns, while somebody who comes back again and again finds
     * it full again and again. */
    if (!setsockopt(*sock, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait) && !connect(*sock, (const struct sockaddr *)&name, sizeof name))
        return 0;
    result = -errno;
    fdp_claim_leave(sock);
    return result;
}

void fdp_claim_leave(int *sock) {
    if (*sock >= 0)
        let_go(*sock);
    *sock = -1;
}

int fdp_peer_uid(int sock, unsigned int *uid) {
    int pid;
    return plat_peer(sock, uid, &pid);
}

static int request(int sock, fdp_claim *claim) {
    fdp_packet packet;
    ssize_t sent;
    /* A claimant without a free number would lose the descriptor and have used the ticket: a number is held until the
     * moment before the answer is read. */
    if (claim->spare < 0 && (claim->spare = hold(sock)) < 0) {
        int result = claim->spare;
        claim->spare = -1;
        return result;
    }
    memset(&packet, 0, sizeof packet);
    memcpy(packet.magic, PACKET_MAGIC, sizeof packet.magic);
    memcpy(packet.ticket, claim->ticket, FDP_TICKET);
    sent = fdp_send(sock, (const char *)&packet, sizeof packet, NULL, 0, MSG_DONTWAIT);
    if (sent == -EINTR)
        return -EINTR;
    /* An owner that refuses has closed by now, and its answer is there to be read. */
    claim->stage = 1;
    if (sent == -EPIPE)
        return 0;
    if (sent < 0)
        return sent == -EAGAIN ? -EPIPE : (int)sent;
    return sent == (ssize_t)sizeof packet ? 0 : -EPIPE;
}

static int answer(int sock, fdp_claim *claim) {
    fdp_message message;
    fdp_packet packet;
    ssize_t got;
    int valid;
    if (claim->spare >= 0)
        let_go(claim->spare);
    claim->spare = -1;
    got = fdp_recv(sock, (char *)&packet, sizeof packet, MSG_DONTWAIT, &message);
    if (got < 0)
        return got == -EAGAIN ? -EINTR : (int)got;
    if (got == 0)
        return -ECONNRESET;
    valid = got == (ssize_t)sizeof packet && !memcmp(packet.magic, PACKET_MAGIC, sizeof packet.magic);
    if (valid && packet.status != FDP_REFUSED)
        valid = !memcmp(packet.ticket, claim->ticket, FDP_TICKET);
    if (!valid || message.nfds > (packet.status == FDP_GIVEN)) {
        fdp_message_close(&message);
        return -EPROTO;
    }
    claim->status = (int)packet.status;
    claim->pid = packet.pid;
    claim->fd = message.nfds ? message.fds[0] : -1;
    return 0;
}

int fdp_claim_run(int sock, fdp_claim *claim, int timeout_ms) {
    int result = 0;
    if (claim->stage == 0)
        result = request(sock, claim);
    if (result == 0) {
        result = fdp_wait(sock, 0, timeout_ms);
        if (result == 0)
            result = -ETIMEDOUT;
        else if (result > 0)
            result = answer(sock, claim);
    }
    if (result < 0 && result != -EINTR)
        fdp_claim_close(claim);
    return result;
}
