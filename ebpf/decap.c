/* SPDX-License-Identifier: GPL-2.0-only */
/* For a node of mode dsr-ipip whose kernel has no ipip or ip6tnl device: takes the outer header off
 * (IPv4 or IPv6 around either) and passes the packet on to the kernel. No maps, no state.
 *
 *   clang -O2 -target bpf -D__$(uname -m)__ -I/usr/include/$(uname -m)-linux-gnu \
 *         -DDECAP_SOURCE4=0x0a000900 -DDECAP_MASK4=0xffffff00 -c decap.c
 *   ip link set dev eth0 xdp obj decap.o sec xdp
 *
 * Only tunnels from these sources are opened: whoever may send one may send as anybody. Without
 * the constants every source may, which is for laboratories. BCC takes this file as it is, too.
 */
#include "wire.h"
#include "packet.h"

#ifndef DECAP_MASK4
#define DECAP_SOURCE4 0
#define DECAP_MASK4   0
#endif
#ifndef DECAP_MASK6 /* compared with the first 64 bits of the outer source */
#define DECAP_SOURCE6 0ull
#define DECAP_MASK6   0ull
#endif

#ifndef __KERNEL__
static long (*bpf_xdp_adjust_head)(struct xdp_md *ctx, int delta) = (void *)44;
#define SEC(name) __attribute__((section(name), used))
SEC("license") static const char licence[] = "GPL";
#else
#define SEC(name)
#endif

/* Length of the outer header, 0: not a tunnel of ours. `inner` is the Ethertype of what is in it.
 */
LB_INLINE __u32 outer_bytes(struct packet *p, __be16 *inner)
{
	struct iphdr *ip4 = p->l3;
	struct ipv6hdr *ip6 = p->l3;
	__u8 protocol;
	__u32 bytes;

	if (p->ethertype == LB_BE16(ETH_P_IP)) {
		if ((void *)(ip4 + 1) > p->end || *(__u8 *)ip4 != 0x45 ||
		    ip4->frag_off & LB_BE16(LB_MORE_FRAGMENTS | LB_FRAGMENT_OFFSET) ||
		    (LB_HOST32(ip4->saddr) & DECAP_MASK4) != (DECAP_SOURCE4 & DECAP_MASK4))
			return 0;
		protocol = ip4->protocol;
		bytes = sizeof(*ip4);
	} else if (p->ethertype == LB_BE16(ETH_P_IPV6)) {
		if ((void *)(ip6 + 1) > p->end)
			return 0;
		__u64 source = (__u64)LB_HOST32(ip6->saddr.s6_addr32[0]) << 32 |
			       LB_HOST32(ip6->saddr.s6_addr32[1]);

		if ((source & DECAP_MASK6) != (DECAP_SOURCE6 & DECAP_MASK6))
			return 0;
		protocol = ip6->nexthdr;
		bytes = sizeof(*ip6);
	} else {
		return 0;
	}
	*inner = protocol == IPPROTO_IPV6 ? LB_BE16(ETH_P_IPV6) : LB_BE16(ETH_P_IP);
	return protocol == IPPROTO_IPIP || protocol == IPPROTO_IPV6 ? bytes : 0;
}

SEC("xdp")
int decap(struct xdp_md *ctx)
{
	struct packet p = {};
	__u8 link[ETH_HLEN + 4 * LB_MAX_TAGS];
	__be16 inner = 0;
	__u32 bytes;
	void *at;

	parse_link(&p, (void *)(long)ctx->data, (void *)(long)ctx->data_end);
	bytes = outer_bytes(&p, &inner);
	if (!bytes || p.start + sizeof(link) > p.end)
		return XDP_PASS;
	__builtin_memcpy(link, p.start, sizeof(link));
	if (bpf_xdp_adjust_head(ctx, bytes))
		return XDP_DROP;
	at = (void *)(long)ctx->data;
	if (at + sizeof(link) > (void *)(long)ctx->data_end)
		return XDP_DROP;
	if (p.link == ETH_HLEN) {
		__builtin_memcpy(at, link, ETH_HLEN - 2);
		*(lb_half *)(at + ETH_HLEN - 2) = inner;
	} else if (p.link == ETH_HLEN + 4) {
		__builtin_memcpy(at, link, ETH_HLEN + 2);
		*(lb_half *)(at + ETH_HLEN + 2) = inner;
	} else {
		__builtin_memcpy(at, link, ETH_HLEN + 6);
		*(lb_half *)(at + ETH_HLEN + 6) = inner;
	}
	return XDP_PASS;
}
