/* SPDX-License-Identifier: GPL-2.0-only */
/* Outer headers of mode dsr-ipip: IPv4 or IPv6 around a whole IP packet (RFC 2003, RFC 2473). */
#ifndef LB_TUNNEL_H
#define LB_TUNNEL_H

#include "wire.h"
#include "checksum.h"
#include "layout.h"

struct tunnel {
	__u32 bytes;   /* of the inner packet */
	__u32 spread;  /* of the flow: varies the outer source, so that the node's RSS spreads */
	__u8 protocol; /* IPPROTO_IPIP or IPPROTO_IPV6: what is inside */
	__u8 class;    /* copied outwards (RFC 2983, 4.1 uniform model) */
};

#define LB_TUNNEL_TTL 64

LB_INLINE __u8 traffic_class6(const void *ip6)
{
	return (LB_HOST16(*(const lb_half *)ip6) >> 4) & 0xff;
}

/* -1: no room between `at` and `end`. */
LB_INLINE int write_tunnel4(void *at, void *end, const struct tunnel *t,
			    const struct config *config, const __be32 *destination)
{
	struct iphdr *ip = at;
	__u64 sum;

	if ((void *)(ip + 1) > end)
		return -1;
	*(lb_half *)ip = LB_BE16(0x4500 | t->class);
	ip->tot_len = LB_BE16(t->bytes + sizeof(*ip));
	ip->id = 0;
	ip->frag_off = LB_BE16(LB_DONT_FRAGMENT);
	ip->ttl = LB_TUNNEL_TTL;
	ip->protocol = t->protocol;
	ip->saddr = config->tunnel4 | (t->spread & config->tunnel4_mask);
	ip->daddr = destination[0];
	sum = LB_BE16(0x4500 | t->class);
	sum += ip->tot_len;
	sum += ip->frag_off;
	sum += LB_BE16(LB_TUNNEL_TTL << 8 | t->protocol);
	sum += ip->saddr;
	sum += ip->daddr;
	ip->check = ~fold(sum);
	return 0;
}

LB_INLINE int write_tunnel6(void *at, void *end, const struct tunnel *t,
			    const struct config *config, const __be32 *destination)
{
	struct ipv6hdr *ip = at;
	__be32 *source;

	if ((void *)(ip + 1) > end)
		return -1;
	*(lb_word *)ip =
		LB_BE32(0x60000000 | (__u32)t->class << 20) | (t->spread & LB_BE32(0xfffff));
	ip->payload_len = LB_BE16(t->bytes);
	ip->nexthdr = t->protocol;
	ip->hop_limit = LB_TUNNEL_TTL;
	source = ip->saddr.s6_addr32;
	source[0] = config->tunnel6[0];
	source[1] = config->tunnel6[1];
	source[2] = config->tunnel6[2];
	source[3] = config->tunnel6[3] | (t->spread & config->tunnel6_mask);
	__builtin_memcpy(&ip->daddr, destination, 16);
	return 0;
}

#endif
