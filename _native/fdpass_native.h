/* The contract between C and Python: every type and function that crosses the border, and who owns what.
 * C includes this file; cffi parses the part between the two marks. No Python.h, no state, no policy.
 *
 * Results are a value >= 0 or -errno. EINTR is returned, never retried: Python runs its signal handlers and calls again. */
#ifndef FDPASS_NATIVE_H
#define FDPASS_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* cffi: begin */
enum {
    FDP_MAX_FDS = 253,  /* SCM_MAX_FD of Linux: one more is a bare EINVAL */
    FDP_FIRST_FD = 3,   /* no descriptor of ours is ever stdin, stdout or stderr */
    FDP_ADDRESS_MAX = 112
};

/* One received message. fds[0..nfds-1] belong to the message until Python stores -1 in their place. */
typedef struct {
    int nfds;
    int plain;            /* nfds when dropped, msg_flags and address_size are all 0 and need not be read, else -1 */
    int dropped;          /* 1: the kernel (or the lack of a free number) kept descriptors back */
    int msg_flags;        /* MSG_TRUNC, MSG_EOR ... as the kernel set them */
    int has_credentials;  /* 1: pid, uid and gid are the kernel's word about this message's sender */
    int pid;
    unsigned int uid;
    unsigned int gid;
    int address_size;     /* bytes of address in use, 0 when the sender has no name */
    char address[112];    /* sun_path of the sender */
    int fds[253];
} fdp_message;

typedef struct {
    int family;
    int type;
    int protocol;
    int listening;    /* 1 when listen() was called on it */
    int nonblocking;  /* 1 when the open file description has O_NONBLOCK */
} fdp_socket_info;

/* Sends `size` bytes with `nfds` descriptors on their first byte; returns the bytes that went.
 * Ownership: borrows sock and every fds[i], on success and on failure; they stay the caller's. */
ssize_t fdp_send(int sock, const char *data, size_t size, const int *fds, int nfds, int flags);

/* fdp_send for exactly one descriptor, which spares the caller an array.
 * Ownership: borrows sock and fd, on success and on failure; they stay the caller's. */
ssize_t fdp_send_one(int sock, const char *data, size_t size, int fd, int flags);

/* Receives into buffer; returns the bytes that came. Every descriptor is close-on-exec and numbered 3 or higher.
 * Ownership: borrows sock. On success message->fds[0..nfds-1] are the caller's, to take or to give to fdp_message_close;
 * on failure nothing was received and nfds is 0. Descriptors that the caller has no name for (SCM_PIDFD) are closed here. */
ssize_t fdp_recv(int sock, char *buffer, size_t size, int flags, fdp_message *message);

/* Closes what is left in the message and sets nfds to 0.
 * Ownership: consumes message->fds[0..nfds-1] except those that are -1. */
void fdp_message_close(fdp_message *message);

/* A connected pair of AF_UNIX sockets of the given type, both ends asking for the sender's credentials.
 * Ownership: on success ends[0] and ends[1] are the caller's; on failure none was left open and ends is untouched. */
int fdp_pair(int type, int *ends);

/* A duplicate, close-on-exec and numbered 3 or higher.
 * Ownership: borrows fd; the number returned is the caller's. */
int fdp_dup(int fd);

/* Makes fd close-on-exec and numbered 3 or higher; returns its number, which differs only when fd was 0, 1 or 2.
 * Ownership: consumes fd and returns it (or its substitute) to the caller; on failure fd is still the caller's, unchanged. */
int fdp_adopt(int fd);

/* What the kernel says about a socket; -ENOTSOCK when fd is something else.
 * Ownership: borrows fd. */
int fdp_socket_probe(int fd, fdp_socket_info *info);

/* Waits until fd is readable (writing = 0) or writable (1); timeout in milliseconds, negative for ever.
 * Returns 1 when ready (errors and hang-ups count as ready), 0 on time-out.
 * Ownership: borrows fd. */
int fdp_wait(int fd, int writing, int timeout_ms);

/* Asks the kernel to attach the sender's credentials to every message that sock receives.
 * Ownership: borrows sock. */
int fdp_ask_credentials(int sock);

/* Starts a thread that never needs the interpreter: when the process behind pidfd ends, or the peer of channel closes,
 * it sends SIGTERM to this process, and after grace_ms milliseconds ends it with _exit(143). Either descriptor may be -1.
 * Should the process close the watch's descriptors along with all others, the supervisor's pid is asked for instead.
 * Ownership: borrows both; the thread watches duplicates of its own, closed by fdp_watch_stop. At most one watch at a time (-EBUSY). */
int fdp_watch_start(int pidfd, int channel, int supervisor, int grace_ms);

/* Ends the watch, or forgets the one of the parent process when called in a forked child (in_child = 1).
 * Ownership: consumes the duplicates that fdp_watch_start made. */
void fdp_watch_stop(int in_child);
/* cffi: end */

#endif
