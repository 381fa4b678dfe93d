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

/* The first three travel the common road; the others are odd. */
enum shape {
	LB_PLAIN,	   /* TCP or UDP */
	LB_FIRST_FRAGMENT, /* the same, and more fragments follow */
	LB_QUOTE,	   /* an ICMP error that quotes TCP or UDP */
	LB_LAST_COMMON = LB_QUOTE,
	LB_LATER_FRAGMENT,
	LB_OPTIONS,   /* IPv4 options */
	LB_EXTENSION, /* IPv6 extension header other than a fragment header */
	LB_ECHO,      /* an ICMP echo request */
	LB_ICMP,      /* any other ICMP */
	LB_OTHER,     /* any other protocol */
	LB_TRUNCATED, /* the headers do not fit, or contradict one another */
};

struct packet {
	void *start, *end;
	void *l3, *l4;
	__u32 link;    /* length of the link header */
	__u32 bytes;   /* length of the IP packet, as its header says */
	__u32 ingress; /* interface index */
	__be16 ethertype;
	__be16 vlan;   /* outermost VLAN id, 0: no tag */
	__u8 protocol; /* of the transport header, also of a quoted one */
	__u8 shape;
	__u8 tcp_flags; /* 0 unless TCP */
	/* The other end of the flow: the source, or the destination of what is quoted. */
	__be32 remote[4];
	__be16 remote_port, local_port;
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
	p->link = lb_forget(p->link, type, 31);
	p->l3 = start + p->link;
	LB_KEEP(p->l3);
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
	p->shape = LB_PLAIN;
	if (*(__u8 *)ip != 0x45) {
		if (ip->version != 4)
			return -1;
		p->shape = ip->ihl < 5 ? LB_TRUNCATED : LB_OPTIONS;
	} else if (ip->frag_off & LB_BE16(LB_MORE_FRAGMENTS | LB_FRAGMENT_OFFSET)) {
		p->shape = ip->frag_off & LB_BE16(LB_FRAGMENT_OFFSET) ? LB_LATER_FRAGMENT
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
	p->shape = LB_PLAIN;
	if (ip->nexthdr == IPPROTO_TCP || ip->nexthdr == IPPROTO_UDP)
		return 0;
	if (ip->nexthdr == IPPROTO_FRAGMENT) {
		fragment = p->l4;
		p->shape = LB_TRUNCATED;
		if ((void *)(fragment + 1) > p->end)
			return 0;
		p->l4 = fragment + 1;
		p->protocol = fragment->next;
		p->shape =
			fragment->offset & LB_BE16(0xfff8) ? LB_LATER_FRAGMENT : LB_FIRST_FRAGMENT;
	} else if (ip->nexthdr == IPPROTO_HOPOPTS || ip->nexthdr == IPPROTO_ROUTING ||
		   ip->nexthdr == IPPROTO_DSTOPTS || ip->nexthdr == IPPROTO_AH) {
		p->shape = LB_EXTENSION;
	}
	return 0;
}

/* The addresses: four words, of which IPv4 has the first. Assume the IP header was parsed. */
LB_INLINE __be32 *source_of(struct packet *p, const int v6)
{
	return v6 ? ((struct ipv6hdr *)p->l3)->saddr.s6_addr32 : &((struct iphdr *)p->l3)->saddr;
}

LB_INLINE __be32 *destination_of(struct packet *p, const int v6)
{
	return v6 ? ((struct ipv6hdr *)p->l3)->daddr.s6_addr32 : &((struct iphdr *)p->l3)->daddr;
}

LB_INLINE void copy_address(__be32 *to, const __be32 *from, const int v6)
{
	to[0] = from[0];
	if (v6) {
		to[1] = from[1];
		to[2] = from[2];
		to[3] = from[3];
	}
}

LB_INLINE int same_address(const __be32 *a, const __be32 *b, const int v6)
{
	if (!v6)
		return a[0] == b[0];
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

/* An ICMP error: from now on the packet stands for the flow it quotes, whose ends are reversed.
 * It stays LB_ICMP when that is no flow to our address, or not to be understood.
 */
LB_INLINE void parse_quote(struct packet *p, const int v6)
{
	struct ipv6hdr *ip6 = p->l4 + 8;
	struct iphdr *ip4 = p->l4 + 8;
	__be16 *ports;

	if (v6) {
		ports = (void *)(ip6 + 1);
		if ((void *)(ports + 4) > p->end || ip6->version != 6 ||
		    !same_address(ip6->saddr.s6_addr32, destination_of(p, v6), v6))
			return;
		p->protocol = ip6->nexthdr;
		copy_address(p->remote, ip6->daddr.s6_addr32, v6);
	} else {
		ports = (void *)(ip4 + 1);
		if ((void *)(ports + 4) > p->end || *(__u8 *)ip4 != 0x45 ||
		    ip4->frag_off & LB_BE16(LB_FRAGMENT_OFFSET) ||
		    ip4->saddr != *destination_of(p, v6))
			return;
		p->protocol = ip4->protocol;
		p->remote[0] = ip4->daddr;
	}
	if (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP)
		return;
	p->local_port = ports[0];
	p->remote_port = ports[1];
	p->shape = LB_QUOTE;
}

/* Assumes that the packet's protocol is ICMP of its family. */
LB_INLINE void parse_icmp(struct packet *p, const int v6)
{
	struct icmphdr *icmp = p->l4; /* ICMPv6 begins alike: type, code, checksum, four bytes */

	p->shape = LB_TRUNCATED;
	if ((void *)(icmp + 1) > p->end)
		return;
	p->shape = LB_ICMP;
	if (icmp->type == (v6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO))
		p->shape = LB_ECHO;
	else if (v6 ? icmp->type >= ICMPV6_DEST_UNREACH && icmp->type <= ICMPV6_PARAMPROB
		    : icmp->type == ICMP_DEST_UNREACH || icmp->type == ICMP_TIME_EXCEEDED ||
				 icmp->type == ICMP_PARAMETERPROB)
		parse_quote(p, v6);
}

LB_INLINE void parse_transport(struct packet *p, const int v6)
{
	struct tcphdr *tcp = p->l4;
	struct udphdr *udp = p->l4;

	if (p->protocol == IPPROTO_TCP) {
		if ((void *)(tcp + 1) > p->end) {
			p->shape = LB_TRUNCATED;
			return;
		}
		p->remote_port = tcp->source;
		p->local_port = tcp->dest;
		p->tcp_flags = ((__u8 *)tcp)[13];
	} else if (p->protocol == IPPROTO_UDP) {
		if ((void *)(udp + 1) > p->end) {
			p->shape = LB_TRUNCATED;
			return;
		}
		p->remote_port = udp->source;
		p->local_port = udp->dest;
	} else if (p->shape == LB_PLAIN && p->protocol == (v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
		parse_icmp(p, v6);
	} else {
		p->shape = LB_OTHER;
	}
}

/* What is behind the IP header of a plain packet or a first fragment. */
LB_INLINE void parse_l4(struct packet *p, const int v6)
{
	p->tcp_flags = 0;
	copy_address(p->remote, source_of(p, v6), v6);
	parse_transport(p, v6);
	p->shape = lb_forget(p->shape, p->bytes, 15);
	p->protocol = lb_forget(p->protocol, p->bytes, 255);
	p->tcp_flags = lb_forget(p->tcp_flags, p->bytes, 255);
}

/* A packet that opens a TCP connection. */
LB_INLINE int is_syn(const struct packet *p)
{
	return (p->tcp_flags & (LB_TCP_SYN | LB_TCP_ACK)) == LB_TCP_SYN;
}

#endif
