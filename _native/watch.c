/* The worker's lifeline: a thread that ends this process when its supervisor is gone, whoever holds the GIL. */
#define _GNU_SOURCE 1

#include "fdpass_native.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

enum { PIDFD, CHANNEL, WAKE, WATCHED };
enum { BLIND_MS = 500 }; /* how often a watch that lost its descriptors asks for the supervisor by its pid */

static struct {
    pthread_t thread;
    int running;
    int grace_ms;
    pid_t supervisor, parent;
    int wake;  /* write end of the pipe that ends the thread */
    int fds[WATCHED];
} watch = {.wake = -1, .fds = {-1, -1, -1}};

/* Ownership: consumes the watch's duplicates. */
static void close_all(void) {
    int i;
    for (i = 0; i < WATCHED; i++) {
        if (watch.fds[i] >= 0)
            close(watch.fds[i]);
        watch.fds[i] = -1;
    }
    if (watch.wake >= 0)
        close(watch.wake);
    watch.wake = -1;
    watch.running = 0;
}

static void *watch_supervisor(void *unused) {
    struct pollfd polled[WATCHED];
    int i, gone = 0, blind = 0;
    (void)unused;
    for (i = 0; i < WATCHED; i++) {
        polled[i].fd = watch.fds[i];
        polled[i].events = POLLIN;
        polled[i].revents = 0;
    }
    /* Orders on the channel are Python's to read: only its end concerns us, and POLLHUP is always reported. */
    polled[CHANNEL].events = 0;
    while (!gone) {
        if (poll(polled, WATCHED, blind ? BLIND_MS : -1) < 0) {
            if (errno == EINTR || errno == EAGAIN)
                continue; /* all signals are blocked here: this is no loop that keeps a handler from running */
            return NULL;
        }
        if (polled[WAKE].revents & POLLIN)
            return NULL;
        gone = (polled[PIDFD].revents & POLLIN) || (polled[CHANNEL].revents & (POLLHUP | POLLERR));
        for (i = 0; i < WATCHED; i++)
            if (polled[i].revents & POLLNVAL) {
                polled[i].fd = -1; /* closed by the worker, with everything else: poll would spin on it */
                blind = 1;
            }
        /* A dead supervisor that nobody has collected still has its pid; but its children have another parent by then. */
        if (blind && (getppid() != watch.parent || (kill(watch.supervisor, 0) < 0 && errno == ESRCH)))
            gone = 1;
    }
    kill(getpid(), SIGTERM);
    /* The grace ends early only when the process does, or when it ends the watch itself by a byte: a wake pipe that the
     * worker has closed along with everything else is no such word. */
    polled[WAKE].revents = 0;
    if (poll(&polled[WAKE], 1, watch.grace_ms) == 1) {
        if (polled[WAKE].revents & POLLIN)
            return NULL;
        poll(NULL, 0, watch.grace_ms);
    }
    _exit(128 + SIGTERM);
}

int fdp_watch_start(int pidfd, int channel, int supervisor, int grace_ms) {
    sigset_t every, before;
    int ends[2], result;
    if (watch.running)
        return -EBUSY;
    if (pipe(ends) < 0)
        return -errno;
    if ((result = fdp_adopt(ends[0])) < 0) {
        close(ends[0]);
        close(ends[1]);
        return result;
    }
    watch.fds[WAKE] = result;
    if ((result = fdp_adopt(ends[1])) < 0) {
        close(ends[1]);
        close_all();
        return result;
    }
    watch.wake = result;
    if (pidfd >= 0 && (watch.fds[PIDFD] = fdp_dup(pidfd)) < 0) {
        result = watch.fds[PIDFD];
        close_all();
        return result;
    }
    if (channel >= 0 && (watch.fds[CHANNEL] = fdp_dup(channel)) < 0) {
        result = watch.fds[CHANNEL];
        close_all();
        return result;
    }
    watch.grace_ms = grace_ms;
    watch.supervisor = supervisor;
    watch.parent = getppid();
    /* Python's handlers run on the main thread; a signal taken by this thread would interrupt nobody's wait. */
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    result = pthread_create(&watch.thread, NULL, watch_supervisor, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (result) {
        close_all();
        return -result;
    }
    watch.running = 1;
    return 0;
}

void fdp_watch_stop(int in_child) {
    if (!watch.running)
        return;
    if (!in_child) { /* the thread does not exist in a forked child: there is nothing to wake or to join */
        /* A byte, not a close: a child forked outside Python may hold the write end as well. */
        if (write(watch.wake, "", 1) == 1)
            pthread_join(watch.thread, NULL);
    }
    close_all();
}
