/* The two packets of the claim protocol, in the byte order of the host that both ends share. docs/claims.md explains them. */
#ifndef FDPASS_PACKET_H
#define FDPASS_PACKET_H

#include "fdpass_native.h"

#define PACKET_MAGIC "fdC1"

typedef struct {
    char magic[4];
    uint32_t status; /* of an answer; of a request 0 */
    unsigned char ticket[FDP_TICKET];
    int32_t pid;     /* of an answer: whose claim came before */
    uint32_t spare;  /* 0 */
} fdp_packet;

_Static_assert(sizeof(fdp_packet) == FDP_PACKET, "a packet has one size on every machine");

#endif
