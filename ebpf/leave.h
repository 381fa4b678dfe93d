/* SPDX-License-Identifier: GPL-2.0-only */
/* Putting the link header of the way to a neighbour in front. */
#ifndef LB_LEAVE_H
#define LB_LEAVE_H

/* May the packet go this way, with so many bytes more? */
LB_INLINE enum verdict may_leave(struct journey *j, __u32 path, __u32 more, const int v6)
{
	if (!(path & LB_PATH_USABLE))
		return LB_NO_NEXTHOP;
	if (ttl_is_over(&j->p, v6))
		return LB_TTL_EXPIRED;
	j->result->mtu = (path >> LB_PATH_MTU_SHIFT) - more;
	if (j->p.bytes + more > path >> LB_PATH_MTU_SHIFT)
		return LB_TOO_BIG;
	return LB_CONTINUE;
}

/* Put the link header of the way to `n` in front, with room for `outer` more bytes behind it.
 * Packet pointers are void afterwards, but for p->start, p->end and p->l3 (unchecked).
 */
LB_INLINE int set_link(struct xdp_md *ctx, struct journey *j, const struct neighbour *n, __u32 path,
		       __be16 ethertype, __u32 outer)
{
	const struct hop *hop = &n->hops[path & LB_PATH_SECOND];
	struct packet *p = &j->p;
	__u32 link = ETH_HLEN;
	struct ethhdr *eth;

	if (hop->outer)
		link += hop->inner ? 8 : 4;
	link = lb_forget(link, hop->ifindex, 31);
	if (link + outer != p->link) {
		if (bpf_xdp_adjust_head(ctx, (int)p->link - (int)(link + outer)))
			return -1;
		p->start = (void *)(long)ctx->data;
		p->end = (void *)(long)ctx->data_end;
	}
	eth = p->start;
	if ((void *)(eth + 1) + 8 > p->end)
		return -1;
	__builtin_memcpy(eth, hop->macs, 12);
	if (link == ETH_HLEN) {
		eth->h_proto = ethertype;
	} else {
		struct vlan_tag *tag = (void *)(eth + 1);

		eth->h_proto = hop->inner ? LB_BE16(ETH_P_8021AD) : LB_BE16(ETH_P_8021Q);
		tag->control = hop->outer;
		if (hop->inner) {
			tag->protocol = LB_BE16(ETH_P_8021Q);
			tag++;
			tag->control = hop->inner;
		}
		tag->protocol = ethertype;
	}
	p->link = link;
	p->l3 = p->start + link;
	LB_KEEP(p->l3);
	j->result->egress = hop->ifindex;
	return 0;
}

#endif
