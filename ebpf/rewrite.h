/* SPDX-License-Identifier: GPL-2.0-only */
/* Changes to headers in place. All assume that the headers they touch were parsed, that is, fit. */
#ifndef LB_REWRITE_H
#define LB_REWRITE_H

#include "wire.h"
#include "checksum.h"
#include "packet.h"

/* Act as a router: 0 when the packet has come to the end of its life and must not go on. */
LB_INLINE int decrement_ttl(struct packet *p, const int v6)
{
	if (v6) {
		struct ipv6hdr *ip = p->l3;

		if (ip->hop_limit <= 1)
			return 0;
		ip->hop_limit--;
	} else {
		struct iphdr *ip = p->l3;

		if (ip->ttl <= 1)
			return 0;
		ip->ttl--;
		ip->check = checksum_ttl_decremented(ip->check);
	}
	return 1;
}

/* New addresses; the sum of the change, for the transport's checksum. */
LB_INLINE __u64 set_addresses(struct packet *p, const __be32 *source, const __be32 *destination,
			      const int v6)
{
	__be32 *s = source_of(p, v6), *d = destination_of(p, v6);
	__u64 change;

	if (v6) {
		change = change128(s, source) + change128(d, destination);
		__builtin_memcpy(s, source, 16);
		__builtin_memcpy(d, destination, 16);
	} else {
		struct iphdr *ip = p->l3;

		change = change32(s[0], source[0]) + change32(d[0], destination[0]);
		s[0] = source[0];
		d[0] = destination[0];
		ip->check = checksum_changed(ip->check, change);
	}
	return change;
}

/* New ports, and the checksum that covers them and `change`. */
LB_INLINE void set_ports(struct packet *p, __be16 source, __be16 destination, __u64 change)
{
	struct tcphdr *tcp = p->l4;
	struct udphdr *udp = p->l4;

	change += change16(p->source_port, source) + change16(p->destination_port, destination);
	if (p->protocol == IPPROTO_TCP) {
		if ((void *)(tcp + 1) > p->end)
			return;
		tcp->source = source;
		tcp->dest = destination;
		tcp->check = checksum_changed(tcp->check, change);
	} else {
		if ((void *)(udp + 1) > p->end)
			return;
		udp->source = source;
		udp->dest = destination;
		udp->check = udp_checksum_changed(udp->check, change);
	}
}

#endif
