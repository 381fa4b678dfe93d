/* SPDX-License-Identifier: GPL-2.0-only */
/* One packet while we look at it: a cursor, its end, and what the headers said.
 *
 * Every parse function checks and then reads, in adjacent lines. They are inlined twice, for IPv4
 * and IPv6: `v6` is a compile-time constant, because the verifier cannot follow "one of two
 * pointers is null".
 */
#ifndef LB_PACKET_H
#define LB_PACKET_H

#include "wire.h"

#define LB_MAX_TAGS 2

/* Why a packet needs more than the fast path. */
enum oddity {
	LB_PLAIN,
	LB_HAS_OPTIONS,	  /* IPv4 options */
	LB_HAS_EXTENSION, /* IPv6 extension header other than a fragment header */
	LB_FIRST_FRAGMENT,
	LB_LATER_FRAGMENT,
	LB_IS_ICMP,
	LB_OTHER_PROTOCOL,
	LB_TRUNCATED, /* the headers do not fit, or contradict one another */
};

struct packet {
	void *start, *end;
	void *l3, *l4;
	__u32 link;    /* length of the link header */
	__u32 bytes;   /* length of the IP packet, as its header says */
	__u32 ingress; /* interface index */
	__be16 ethertype;
	__be16 vlan; /* outermost VLAN id, 0: no tag */
	__u8 protocol;
	__u8 oddity;
	__u8 tcp_flags; /* 0 unless TCP */
	__be16 source_port, destination_port;
};

/* Ethernet and up to two VLAN tags. The packet's Ethertype is 0 when even that does not fit. */
LB_INLINE void parse_link(struct packet *p, void *start, void *end)
{
	struct ethhdr *eth = start;
	struct vlan_tag *tag;
	__be16 type;

	p->start = start;
	p->end = end;
	p->ethertype = 0;
	p->vlan = 0;
	if ((void *)(eth + 1) > end)
		return;
	type = eth->h_proto;
	p->l3 = eth + 1;
	p->link = sizeof(*eth);
#pragma unroll
	for (int i = 0; i < LB_MAX_TAGS; i++) {
		if (type != LB_BE16(ETH_P_8021Q) && type != LB_BE16(ETH_P_8021AD))
			break;
		tag = p->l3;
		if ((void *)(tag + 1) > end)
			return;
		if (!i)
			p->vlan = tag->control & LB_BE16(0x0fff);
		type = tag->protocol;
		p->l3 = tag + 1;
		p->link += sizeof(*tag);
	}
	p->ethertype = type;
}

/* The IPv4 header. -1: not a header we understand at all. */
LB_INLINE int parse_ip4(struct packet *p)
{
	struct iphdr *ip = p->l3;

	if ((void *)(ip + 1) > p->end)
		return -1;
	p->l4 = ip + 1;
	p->bytes = LB_HOST16(ip->tot_len);
	p->protocol = ip->protocol;
	p->oddity = LB_PLAIN;
	if (*(__u8 *)ip != 0x45) {
		if (ip->version != 4)
			return -1;
		p->oddity = ip->ihl < 5 ? LB_TRUNCATED : LB_HAS_OPTIONS;
	} else if (ip->frag_off & LB_BE16(LB_MORE_FRAGMENTS | LB_FRAGMENT_OFFSET)) {
		p->oddity = ip->frag_off & LB_BE16(LB_FRAGMENT_OFFSET) ? LB_LATER_FRAGMENT
								       : LB_FIRST_FRAGMENT;
	}
	return 0;
}

/* The IPv6 header and, behind it, at most a fragment header. -1: not a header we understand. */
LB_INLINE int parse_ip6(struct packet *p)
{
	struct ipv6hdr *ip = p->l3;
	struct fragment6 *fragment;

	if ((void *)(ip + 1) > p->end || ip->version != 6)
		return -1;
	p->l4 = ip + 1;
	p->bytes = LB_HOST16(ip->payload_len) + sizeof(*ip);
	p->protocol = ip->nexthdr;
	p->oddity = LB_PLAIN;
	switch (ip->nexthdr) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
		return 0;
	case IPPROTO_FRAGMENT:
		fragment = p->l4;
		if ((void *)(fragment + 1) > p->end) {
			p->oddity = LB_TRUNCATED;
			return 0;
		}
		p->l4 = fragment + 1;
		p->protocol = fragment->next;
		p->oddity = fragment->offset & LB_BE16(0xfff8) ? LB_LATER_FRAGMENT
							       : LB_FIRST_FRAGMENT;
		return 0;
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case IPPROTO_AH:
		p->oddity = LB_HAS_EXTENSION;
	}
	return 0;
}

/* Ports and TCP flags, with whole transport headers: assumes a plain packet or a first fragment. */
LB_INLINE void parse_l4(struct packet *p)
{
	struct tcphdr *tcp = p->l4;
	struct udphdr *udp = p->l4;

	p->tcp_flags = 0;
	if (p->protocol == IPPROTO_TCP) {
		if ((void *)(tcp + 1) > p->end) {
			p->oddity = LB_TRUNCATED;
			return;
		}
		p->source_port = tcp->source;
		p->destination_port = tcp->dest;
		p->tcp_flags = ((__u8 *)tcp)[13];
	} else if (p->protocol == IPPROTO_UDP) {
		if ((void *)(udp + 1) > p->end) {
			p->oddity = LB_TRUNCATED;
			return;
		}
		p->source_port = udp->source;
		p->destination_port = udp->dest;
	} else if (p->protocol == IPPROTO_ICMP || p->protocol == IPPROTO_ICMPV6) {
		p->oddity = LB_IS_ICMP;
	} else {
		p->oddity = LB_OTHER_PROTOCOL;
	}
}

/* The addresses, four words each; of an IPv4 packet the first word counts. */
LB_INLINE __be32 *source_of(struct packet *p, const int v6)
{
	return v6 ? ((struct ipv6hdr *)p->l3)->saddr.s6_addr32 : &((struct iphdr *)p->l3)->saddr;
}

LB_INLINE __be32 *destination_of(struct packet *p, const int v6)
{
	return v6 ? ((struct ipv6hdr *)p->l3)->daddr.s6_addr32 : &((struct iphdr *)p->l3)->daddr;
}

LB_INLINE int same_address(const __be32 *a, const __be32 *b, const int v6)
{
	if (!v6)
		return a[0] == b[0];
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

/* A packet that opens a TCP connection. */
LB_INLINE int is_syn(const struct packet *p)
{
	return (p->tcp_flags & (LB_TCP_SYN | LB_TCP_ACK)) == LB_TCP_SYN;
}

#endif
