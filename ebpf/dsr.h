/* SPDX-License-Identifier: GPL-2.0-only */
/* The DSR modes: a flow is a tag in a line of eight. */
#ifndef LB_DSR_H
#define LB_DSR_H

#define FLOW_AGE(e)	  ((__u32)((e) >> 16) & 0xfff)
#define FLOW_STAGE(e)	  ((__u32)((e) >> 28) & 3)
#define FLOW_TAG(e)	  ((e) & ~0x3fffffffull)
#define FLOW_IDLE(e, now) (((now) - FLOW_AGE(e)) & 0xfff)

enum flow_stage { FLOW_AGAIN, FLOW_ONCE, FLOW_CLOSING }; /* the higher, the less it is missed */

LB_INLINE __u64 flow_entry(__u64 tag, __u32 stage, __u32 now, __u32 backend)
{
	return tag | (__u64)stage << 28 | (now & 0xfff) << 16 | backend;
}

/* Place of the flow in its line, -1 when it is not there. */
LB_INLINE int flow_find(const struct flow_line *line, __u64 tag)
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		if (FLOW_TAG(line->flows[i]) == tag)
			return i;
	return -1;
}

/* Whom to push out of a full line: nobody, else a closing flow, else one seen once, else the
 * oldest. So what a flood of single packets pushes out are other such packets' flows. Without a
 * branch: 8 entries of 3 stages would be too many paths for the verifier.
 */
LB_INLINE __u32 flow_victim(const struct flow_line *line, __u32 now)
{
	__s64 best = 0, worth, less;
	__u64 e;

#pragma unroll
	for (int i = 0; i < 8; i++) {
		e = line->flows[i];
		worth = ((~e & (e - 1)) >> 63) << 18; /* empty */
		worth |= FLOW_STAGE(e) << 15 | FLOW_IDLE(e, now) << 3 | i;
		less = best - worth;
		asm volatile("%0 s>>= 63" : "+r"(less));
		best ^= (best ^ worth) & less;
	}
	return best & 7;
}

LB_INLINE int flow_stays(struct journey *j, const struct target *t, __u64 e, __u32 now)
{
	return ring_has(t->ring, (__u16)e, 0) &&
	       (j->p.protocol == IPPROTO_TCP || FLOW_IDLE(e, now) <= j->config->udp_ticks);
}

/* The backend of a DSR flow: the one it has, else the ring's, remembered from the first packet
 * after the SYN on. Until then the ring gives the same answer, so a flood of SYNs writes nothing.
 */
LB_INLINE enum verdict flow_backend(struct journey *j, const struct vip *vip,
				    const struct target *t, const int v6)
{
	struct flow_key k = flow_key_of(j, v6);
	__u64 hash = flow_hash(&k, vip, v6), tag = FLOW_TAG(hash), e, fresh;
	__u32 index = hash & (LB_FLOW_LINES - 1), now = now_ticks(), stage;
	struct flow_line *line;
	enum verdict v;
	int i = -1;

	line = LOOKUP(lb_flows, &index);
	if (!line)
		return LB_NO_BACKEND;
	if (!is_syn(&j->p))
		i = flow_find(line, tag);
	if (i >= 0) {
		i = lb_forget(i, hash, 7);
		e = line->flows[i & 7];
		if (flow_stays(j, t, e, now)) {
			j->result->backend_id = (__u16)e;
			stage = j->p.tcp_flags & (LB_TCP_FIN | LB_TCP_RST) ? FLOW_CLOSING
				: FLOW_STAGE(e) == FLOW_CLOSING		   ? FLOW_CLOSING
									   : FLOW_AGAIN;
			fresh = flow_entry(tag, stage, now, j->result->backend_id);
			if (fresh != e && !j->untraced)
				line->flows[i & 7] = fresh;
			return LB_CONTINUE;
		}
	}
	v = choose_backend(j, vip, t, now, v6);
	if (v != LB_CONTINUE)
		return v;
	j->result->is_new = is_syn(&j->p) || j->p.protocol == IPPROTO_UDP;
	if (!is_syn(&j->p) && !j->untraced) {
		if (i < 0)
			i = flow_victim(line, now);
		line->flows[i & 7] = flow_entry(tag, FLOW_ONCE, now, j->result->backend_id);
	}
	return LB_CONTINUE;
}

/* Send the packet, unchanged but for its TTL, to its backend's MAC address or through a tunnel. */
LB_INLINE enum verdict dsr_send(struct xdp_md *ctx, struct journey *j, __u8 mode, const int v6)
{
	struct neighbour *backend = get_backend(j->result->backend_id);
	struct packet *p = &j->p;
	__u32 path, outer = 0;
	enum verdict v;

	if (!backend)
		return LB_NO_BACKEND;
	path = ONCE(backend->path);
	if (mode == LB_MODE_DSR_IPIP)
		outer = backend->family == 6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	v = may_leave(j, path, outer, v6);
	if (v != LB_CONTINUE)
		return v;
	if (p->shape == LB_FIRST_FRAGMENT)
		remember_fragment(j, 0, mode, 0, v6);
	decrement_ttl(p, v6);
	if (!outer)
		return set_link(ctx, j, backend, path, p->ethertype, 0) ? LB_NO_HEADROOM
									: LB_DSR_L2;
	struct tunnel tunnel = {
		.bytes = p->bytes,
		.spread = source_of(p, v6)[v6 ? 3 : 0] ^ (__u32)p->remote_port << 16,
		.protocol = v6 ? IPPROTO_IPV6 : IPPROTO_IPIP,
		.class = v6 ? traffic_class6(p->l3) : ((struct iphdr *)p->l3)->tos,
	};

	if (backend->family == 6) {
		if (set_link(ctx, j, backend, path, LB_BE16(ETH_P_IPV6), sizeof(struct ipv6hdr)) ||
		    write_tunnel6(p->l3, p->end, &tunnel, j->config, backend->address))
			return LB_NO_HEADROOM;
	} else {
		if (set_link(ctx, j, backend, path, LB_BE16(ETH_P_IP), sizeof(struct iphdr)) ||
		    write_tunnel4(p->l3, p->end, &tunnel, j->config, backend->address))
			return LB_NO_HEADROOM;
	}
	return LB_DSR_IPIP;
}

LB_INLINE enum verdict dsr_forward(struct xdp_md *ctx, struct journey *j, const struct vip *vip,
				   const struct target *t, const int v6)
{
	enum verdict v = flow_backend(j, vip, t, v6);

	if (v != LB_CONTINUE)
		return v;
	v = dsr_send(ctx, j, t->mode, v6);
	if (j->p.shape == LB_QUOTE && v <= LB_LAST_FORWARD)
		return LB_ICMP_TO_BACKEND;
	return v;
}

#endif
