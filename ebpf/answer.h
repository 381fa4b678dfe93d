/* SPDX-License-Identifier: GPL-2.0-only */
/* Packets that we write ourselves, over the one that caused them: echo replies, TCP resets, ICMP
 * errors. They go back to the sender, from the address it wrote to. Only resizing needs the
 * context, so the caller does that; here is what is written then.
 */
#ifndef LB_ANSWER_H
#define LB_ANSWER_H

#include "wire.h"
#include "checksum.h"
#include "layout.h"
#include "packet.h"

#define LB_ANSWER_TTL 64
#define LB_QUOTED_L4  8 /* bytes behind the IP header that an ICMP error quotes (RFC 792) */

/* The link header, turned round. Room for p->link bytes was checked. */
LB_INLINE void turn_link(struct ethhdr *eth)
{
	__u8 mac[ETH_ALEN];

	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
}

/* An echo request becomes its reply: type and TTL change, addresses change places. */
LB_INLINE void write_echo_reply(struct packet *p, const int v6)
{
	struct icmphdr *icmp = p->l4;
	__be32 *source = source_of(p, v6), *destination = destination_of(p, v6), word;

	if ((void *)(icmp + 1) > p->end)
		return;
#pragma unroll
	for (int i = 0; i < (v6 ? 4 : 1); i++) {
		word = source[i];
		source[i] = destination[i];
		destination[i] = word;
	}
	if (v6) {
		((struct ipv6hdr *)p->l3)->hop_limit = LB_ANSWER_TTL;
		icmp->type = ICMPV6_ECHO_REPLY;
		icmp->checksum =
			checksum_changed(icmp->checksum, change16(LB_BE16(ICMPV6_ECHO_REQUEST << 8),
								  LB_BE16(ICMPV6_ECHO_REPLY << 8)));
	} else {
		struct iphdr *ip = p->l3;
		__u8 ttl = ip->ttl;

		ip->ttl = LB_ANSWER_TTL;
		ip->check = checksum_changed(
			ip->check, change16(LB_BE16(ttl << 8), LB_BE16(LB_ANSWER_TTL << 8)));
		icmp->type = ICMP_ECHOREPLY;
		icmp->checksum =
			checksum_changed(icmp->checksum, change16(LB_BE16(ICMP_ECHO << 8), 0));
	}
}

/* An IP header from us to the sender; `bytes` behind it. */
LB_INLINE void write_ip4(struct iphdr *ip, const struct question *q, __u8 protocol, __u32 bytes)
{
	__u64 sum;

	*(lb_half *)ip = LB_BE16(0x4500);
	ip->tot_len = LB_BE16(sizeof(*ip) + bytes);
	ip->id = 0;
	ip->frag_off = LB_BE16(LB_DONT_FRAGMENT);
	ip->ttl = LB_ANSWER_TTL;
	ip->protocol = protocol;
	ip->saddr = q->destination[0];
	ip->daddr = q->source[0];
	sum = LB_BE16(0x4500);
	sum += ip->tot_len;
	sum += ip->frag_off;
	sum += LB_BE16(LB_ANSWER_TTL << 8 | protocol);
	sum += ip->saddr;
	sum += ip->daddr;
	ip->check = ~fold(sum);
}

LB_INLINE void write_ip6(struct ipv6hdr *ip, const struct question *q, __u8 protocol, __u32 bytes)
{
	*(lb_word *)ip = LB_BE32(0x60000000);
	ip->payload_len = LB_BE16(bytes);
	ip->nexthdr = protocol;
	ip->hop_limit = LB_ANSWER_TTL;
	copy_address(ip->saddr.s6_addr32, q->destination, 1);
	copy_address(ip->daddr.s6_addr32, q->source, 1);
}

/* Sum of the pseudo header of what we send. */
LB_INLINE __u64 pseudo_sum(const struct question *q, __u8 protocol, __u32 bytes, const int v6)
{
	__u64 sum = LB_BE16(protocol);

	sum += LB_BE16(bytes);
#pragma unroll
	for (int i = 0; i < (v6 ? 4 : 1); i++) {
		sum += q->source[i];
		sum += q->destination[i];
	}
	return sum;
}

LB_INLINE __u64 sum_words(const void *from, const int words)
{
	const lb_word *word = from;
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < words; i++)
		sum += word[i];
	return sum;
}

/* RFC 9293, 3.10.7.1: a segment to nobody, whose flags were `flags`. */
LB_INLINE void write_reset(struct tcphdr *tcp, const struct question *q, __u8 flags, const int v6)
{
	lb_word *word = (void *)tcp;

	tcp->source = q->local_port;
	tcp->dest = q->remote_port;
	word[1] = word[2] = 0;
	if (flags & LB_TCP_ACK) {
		word[1] = q->acknowledged;
		word[3] = LB_BE32(0x50000000 | LB_TCP_RST << 16);
	} else {
		word[2] = LB_BE32(LB_HOST32(q->sequence) + q->segment_bytes);
		word[3] = LB_BE32(0x50000000 | (LB_TCP_RST | LB_TCP_ACK) << 16);
	}
	word[4] = 0;
	tcp->check = ~fold(pseudo_sum(q, IPPROTO_TCP, sizeof(*tcp), v6) + sum_words(tcp, 5));
}

/* The eight bytes of an ICMP error before the packet it quotes, which lies there already. */
LB_INLINE void write_icmp_error(struct icmphdr *icmp, const struct question *q, __u8 type,
				__u8 code, __u32 mtu, const int v6)
{
	const int quoted = (v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) + LB_QUOTED_L4;
	__u64 sum = 0;

	icmp->type = type;
	icmp->code = code;
	icmp->checksum = 0;
	icmp->un.gateway = LB_BE32(mtu); /* ICMPv4: two zero bytes and the MTU; ICMPv6: 32 bits */
	if (v6)
		sum = pseudo_sum(q, IPPROTO_ICMPV6, sizeof(*icmp) + quoted, v6);
	icmp->checksum = ~fold(sum + sum_words(icmp, (sizeof(*icmp) + quoted) / 4));
}

#endif
