/* Loaded before the C library (LD_PRELOAD): makes its calls short, interrupts them, or ends the process at one of them.
 * interfere() says what; before it is called everything is as it always is. */
#define _GNU_SOURCE 1
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static int one_byte, interrupted, kill_before, kill_after, calls, odd;

/* short_: every transfer is of one byte. eintr: every other call fails with EINTR. The process is killed before (after) that call, 0: never. */
void interfere(int short_, int eintr, int before, int after) {
    one_byte = short_, interrupted = eintr, kill_before = before, kill_after = after, calls = odd = 0;
}

static int enter(void) {
    if (++calls == kill_before)
        raise(SIGKILL);
    if (interrupted && (odd = !odd)) {
        errno = EINTR;
        return -1;
    }
    return 0;
}

static ssize_t leave(ssize_t result) {
    if (calls == kill_after)
        raise(SIGKILL);
    return result;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define TRANSFER(name, Message)                                                                                                            \
    ssize_t name(int sock, Message *message, int flags) {                                                                                  \
        struct msghdr shorter = *message;                                                                                                  \
        struct iovec part = *message->msg_iov;                                                                                             \
        ssize_t result;                                                                                                                    \
        if (enter() < 0)                                                                                                                   \
            return -1;                                                                                                                     \
        if (one_byte && part.iov_len > 1)                                                                                                  \
            part.iov_len = 1;                                                                                                              \
        shorter.msg_iov = &part;                                                                                                           \
        result = REAL(name)(sock, &shorter, flags);                                                                                        \
        GIVE_BACK_##name;                                                                                                                  \
        return leave(result);                                                                                                              \
    }

#define GIVE_BACK_sendmsg
#define GIVE_BACK_recvmsg                                                                                                                  \
    message->msg_namelen = shorter.msg_namelen, message->msg_controllen = shorter.msg_controllen, message->msg_flags = shorter.msg_flags

TRANSFER(sendmsg, const struct msghdr)
TRANSFER(recvmsg, struct msghdr)

int poll(struct pollfd *fds, nfds_t count, int timeout) {
    return enter() < 0 ? -1 : (int)leave(REAL(poll)(fds, count, timeout));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t start) {
    return enter() < 0 ? -1 : leave(REAL(pwrite64)(fd, data, one_byte && size > 1 ? 1 : size, start));
}

int memfd_create(const char *name, unsigned int flags) {
    /* The kernel never interrupts this one. */
    if (++calls == kill_before)
        raise(SIGKILL);
    return (int)leave(REAL(memfd_create)(name, flags));
}
