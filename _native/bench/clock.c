/* Time as workers use it: sleeping to an instant, burning processor time. Nothing here is about connections. */
#define _GNU_SOURCE 1

#include "loadgen.h"

#include <errno.h>
#include <sys/prctl.h>
#include <time.h>

int flg_timer_slack(int64_t slack) { return prctl(PR_SET_TIMERSLACK, (unsigned long)slack, 0, 0, 0) < 0 ? -errno : 0; }

int flg_sleep_until(int64_t instant) {
    struct timespec until = {.tv_sec = (time_t)(instant / 1000000000), .tv_nsec = (long)(instant % 1000000000)};
    return -clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

static int64_t processor_time(void) {
    struct timespec used;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return (int64_t)used.tv_sec * 1000000000 + used.tv_nsec;
}

void flg_burn_cpu(int64_t duration) {
    int64_t until = processor_time() + duration;
    while (processor_time() < until)
        ;
}
