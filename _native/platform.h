/* What differs between Linux, macOS and FreeBSD, as small functions with one meaning everywhere.
 * The rest of the C has no #ifdef. -DFDP_FORCE_FALLBACK compiles the portable side on Linux, so that tests cover it. */
#ifndef FDPASS_PLATFORM_H
#define FDPASS_PLATFORM_H

#include "fdpass_native.h"

#include <sys/socket.h>

/* Flags for recvmsg that make descriptors close-on-exec at birth, 0 where the system has none.
 * Ownership: none. */
int plat_recv_flags(void);

/* Makes an arrived descriptor close-on-exec where plat_recv_flags could not.
 * Ownership: borrows fd. */
int plat_born(int fd);

/* socketpair, both ends close-on-exec.
 * Ownership: on success ends[0] and ends[1] are the caller's; on failure none is open. */
int plat_pair(int type, int *ends);

/* Asks for credentials with every message.
 * Ownership: borrows sock. */
int plat_ask_credentials(int sock);

/* See fdp_refuse_rights. Ownership: borrows sock. */
int plat_refuse_rights(int sock);

/* What fstat calls the socket that sock, itself called `inode`, is connected to. -errno where the system does not tell; 0: none yet.
 * Ownership: borrows sock. */
int plat_peer_inode(int sock, unsigned long long inode, unsigned long long *peer);

/* Fills message's credentials if this control message carries them; returns 1 when it did.
 * Ownership: none. */
int plat_read_credentials(const struct cmsghdr *control, fdp_message *message);

/* Fills message's credentials from the connection where messages carry none (macOS, forced fallback).
 * Ownership: borrows sock. */
void plat_peer_credentials(int sock, fdp_message *message);

/* The descriptor inside a control message that nobody asked for (SCM_PIDFD), or -1.
 * Ownership: the descriptor returned is the caller's to close. */
int plat_stray_descriptor(const struct cmsghdr *control);

/* One integer option of level SOL_SOCKET.
 * Ownership: borrows fd. */
int plat_option(int fd, int name, int *value);

/* Family and protocol of a socket.
 * Ownership: borrows fd. */
int plat_probe(int fd, fdp_socket_info *info);

/* An AF_UNIX socket of this type, close-on-exec and numbered 3 or higher.
 * Ownership: the number returned is the caller's. */
int plat_socket(int type);

/* accept, the connection close-on-exec.
 * Ownership: borrows listener; the connection returned is the caller's. */
int plat_accept(int listener);

/* Who is at the other end: effective uid of whoever connected or listens, FDP_NOBODY when the kernel cannot name it; and pid where
 * the system tells it, else 0.
 * Ownership: borrows sock. */
int plat_peer(int sock, unsigned int *uid, int *pid);

/* Random bytes from the system.
 * Ownership: none. */
int plat_random(unsigned char *out, size_t size);

/* The name of a sender, without the family; returns its length.
 * Ownership: none. */
int plat_address(const void *name, size_t size, char *out);

#endif
