/* The claimant's side of a claim: one packet out, one packet and a descriptor in. */
#define _GNU_SOURCE 1

#include "packet.h"
#include "platform.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

void fdp_claim_close(fdp_claim *claim) {
    if (claim->spare >= 0)
        close(claim->spare);
    if (claim->fd >= 0)
        close(claim->fd);
    claim->spare = claim->fd = -1;
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
    if (claim->spare < 0 && (claim->spare = fdp_dup(sock)) < 0) {
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
        close(claim->spare);
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
