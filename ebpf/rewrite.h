/* SPDX-License-Identifier: GPL-2.0-only */
/* Changes to headers in place. All assume that the headers they touch were parsed, that is, fit. */
#ifndef LB_REWRITE_H
#define LB_REWRITE_H

#include "wire.h"
#include "checksum.h"
#include "packet.h"

/* Both ends of a flow, as the packet is to show them. */
struct ends {
	const __be32 *source, *destination;
	__be16 source_port, destination_port;
};

LB_INLINE int ttl_is_over(struct packet *p, const int v6)
{
	return (v6 ? ((struct ipv6hdr *)p->l3)->hop_limit : ((struct iphdr *)p->l3)->ttl) <= 1;
}

/* Act as a router. */
LB_INLINE void decrement_ttl(struct packet *p, const int v6)
{
	if (v6) {
		((struct ipv6hdr *)p->l3)->hop_limit--;
	} else {
		struct iphdr *ip = p->l3;

		ip->ttl--;
		ip->check = checksum_ttl_decremented(ip->check);
	}
}

/* New addresses; the sum of the change, for the transport's checksum. */
LB_INLINE __u64 set_addresses(void *l3, const __be32 *source, const __be32 *destination,
			      const int v6)
{
	__u64 change;

	if (v6) {
		struct ipv6hdr *ip = l3;

		change = change128(ip->saddr.s6_addr32, source) +
			 change128(ip->daddr.s6_addr32, destination);
		copy_address(ip->saddr.s6_addr32, source, v6);
		copy_address(ip->daddr.s6_addr32, destination, v6);
	} else {
		struct iphdr *ip = l3;

		change = change32(ip->saddr, source[0]) + change32(ip->daddr, destination[0]);
		ip->saddr = source[0];
		ip->daddr = destination[0];
		ip->check = checksum_changed(ip->check, change);
	}
	return change;
}

/* An ICMP error gets the new addresses outside, and inside what its receiver had sent: the same
 * ends reversed. ICMP's checksum covers the quoted bytes, ICMPv6's the outer addresses too.
 */
LB_INLINE void rewrite_quote(struct packet *p, const struct ends *new, const int v6)
{
	struct icmphdr *icmp = p->l4;
	void *quote = icmp + 1;
	__be16 *ports = quote + (v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	__u64 outer = set_addresses(p->l3, new->source, new->destination, v6), inner;
	__u16 check;

	if ((void *)(icmp + 1) > p->end || (void *)(ports + 4) > p->end)
		return;
	check = v6 ? 0 : ((struct iphdr *)quote)->check;
	inner = set_addresses(quote, new->destination, new->source, v6);
	inner += change16(ports[0], new->destination_port) + change16(ports[1], new->source_port);
	ports[0] = new->destination_port;
	ports[1] = new->source_port;
	if (v6)
		inner += outer;
	else
		inner += change16(check, ((struct iphdr *)quote)->check);
	icmp->checksum = checksum_changed(icmp->checksum, inner);
}

/* New ends: addresses, ports, and the checksums that cover them. */
LB_INLINE void rewrite_ends(struct packet *p, const struct ends *new, const int v6)
{
	struct tcphdr *tcp = p->l4;
	struct udphdr *udp = p->l4;
	__u64 change;

	if (p->shape == LB_QUOTE) {
		rewrite_quote(p, new, v6);
		return;
	}
	change = set_addresses(p->l3, new->source, new->destination, v6) +
		 change16(p->remote_port, new->source_port) +
		 change16(p->local_port, new->destination_port);
	if (p->protocol == IPPROTO_TCP) {
		if ((void *)(tcp + 1) > p->end)
			return;
		tcp->source = new->source_port;
		tcp->dest = new->destination_port;
		tcp->check = checksum_changed(tcp->check, change);
	} else {
		if ((void *)(udp + 1) > p->end)
			return;
		udp->source = new->source_port;
		udp->dest = new->destination_port;
		udp->check = udp_checksum_changed(udp->check, change);
	}
}

#endif
