/* SPDX-License-Identifier: GPL-2.0-only */
/* What the sender is told when something was wrong: RST, unreachable, too big, time exceeded. */
#ifndef LB_TELL_H
#define LB_TELL_H

LB_INLINE int take_question(struct packet *p, struct question *q, const int v6)
{
	struct ethhdr *eth = p->start;
	struct tcphdr *tcp = p->l4;

	if ((void *)(eth + 1) + 10 > p->end)
		return -1;
	__builtin_memcpy(q->macs, eth, 12);
	__builtin_memcpy(q->types, (void *)eth + 12, sizeof(q->types));
	copy_address(q->source, source_of(p, v6), v6);
	copy_address(q->destination, destination_of(p, v6), v6);
	q->remote_port = p->remote_port;
	q->local_port = p->local_port;
	if (p->protocol != IPPROTO_TCP)
		return 0;
	if ((void *)(tcp + 1) > p->end)
		return -1;
	q->sequence = tcp->seq;
	q->acknowledged = tcp->ack_seq;
	q->segment_bytes = p->bytes - (p->l4 - p->l3) - tcp->doff * 4 +
			   !!(p->tcp_flags & LB_TCP_SYN) + !!(p->tcp_flags & LB_TCP_FIN);
	return 0;
}

/* The packet becomes the answer's size; its link header, turned round, is written. */
LB_INLINE int resize(struct xdp_md *ctx, struct journey *j, const struct question *q,
		     __u32 l3_bytes, __u32 more_in_front)
{
	struct packet *p = &j->p;
	struct ethhdr *eth;
	/* a long packet may lie in several buffers, of which start and end show the first */
	int cut = (int)(p->link + l3_bytes) - (int)bpf_xdp_get_buff_len(ctx);

	if (bpf_xdp_adjust_tail(ctx, cut))
		return -1;
	if (more_in_front && bpf_xdp_adjust_head(ctx, -(int)more_in_front))
		return -1;
	p->start = (void *)(long)ctx->data;
	p->end = (void *)(long)ctx->data_end;
	eth = p->start;
	if ((void *)(eth + 1) + 10 > p->end)
		return -1;
	__builtin_memcpy(eth->h_dest, q->macs + ETH_ALEN, ETH_ALEN);
	__builtin_memcpy(eth->h_source, q->macs, ETH_ALEN);
	/* with more of the old packet behind the Ethertype, where our IP header will stand */
	__builtin_memcpy((void *)eth + 12, q->types, sizeof(q->types));
	p->l3 = p->start + p->link;
	LB_KEEP(p->l3);
	j->result->egress = p->ingress;
	return 0;
}

LB_INLINE int answer_reset(struct xdp_md *ctx, struct journey *j, const struct question *q,
			   const int v6)
{
	const __u32 head = v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	struct tcphdr *tcp;

	if (resize(ctx, j, q, head + sizeof(*tcp), 0))
		return -1;
	tcp = j->p.l3 + head;
	if ((void *)(tcp + 1) > j->p.end)
		return -1;
	if (v6)
		write_ip6(j->p.l3, q, IPPROTO_TCP, sizeof(*tcp));
	else
		write_ip4(j->p.l3, q, IPPROTO_TCP, sizeof(*tcp));
	write_reset(tcp, q, j->p.tcp_flags, v6);
	return 0;
}

LB_INLINE int answer_error(struct xdp_md *ctx, struct journey *j, const struct question *q,
			   enum verdict v, const int v6)
{
	const __u32 head = v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	const __u32 quoted = head + LB_QUOTED_L4;
	struct icmphdr *icmp;
	__u8 type, code = 0;

	if (resize(ctx, j, q, quoted, head + sizeof(*icmp)))
		return -1;
	icmp = j->p.l3 + head;
	if ((void *)(icmp + 1) + quoted > j->p.end)
		return -1;
	if (v6)
		write_ip6(j->p.l3, q, IPPROTO_ICMPV6, sizeof(*icmp) + quoted);
	else
		write_ip4(j->p.l3, q, IPPROTO_ICMP, sizeof(*icmp) + quoted);
	if (v == LB_TOO_BIG) {
		type = v6 ? ICMPV6_PKT_TOOBIG : ICMP_DEST_UNREACH;
		code = v6 ? 0 : ICMP_FRAG_NEEDED;
	} else if (v == LB_TTL_EXPIRED) {
		type = v6 ? ICMPV6_TIME_EXCEED : ICMP_TIME_EXCEEDED;
	} else {
		type = v6 ? ICMPV6_DEST_UNREACH : ICMP_DEST_UNREACH;
		code = v6 ? ICMPV6_PORT_UNREACH : ICMP_PORT_UNREACH;
	}
	write_icmp_error(icmp, q, type, code, v == LB_TOO_BIG ? j->result->mtu : 0, v6);
	return 0;
}

/* Some refusals are told to the sender, if policy and rate allow. The packet is still unchanged. */
LB_INLINE enum verdict answer(struct xdp_md *ctx, struct journey *j, enum verdict v, const int v6)
{
	struct question *q;
	struct scratch *s;
	int is_refused;

	if (v != LB_NO_PORT && v != LB_NO_FLOW && v != LB_TOO_BIG && v != LB_TTL_EXPIRED)
		return v;
	v = lb_forget(v, j->p.bytes, 63);
	is_refused = v == LB_NO_PORT || v == LB_NO_FLOW;
	if (j->p.shape > LB_FIRST_FRAGMENT || (is_refused && j->p.shape != LB_PLAIN))
		return v; /* no errors about errors or about parts (RFC 1122, 3.2.2) */
	if (is_refused && (j->config->no_port != LB_POLICY_ANSWER || j->p.tcp_flags & LB_TCP_RST))
		return v;
	if (!may_answer(j))
		return LB_ICMP_LIMIT;
	s = get_scratch();
	if (!s)
		return v;
	q = &s->question;
	if (take_question(&j->p, q, v6))
		return v;
	if (is_refused && j->p.protocol == IPPROTO_TCP) {
		if (answer_reset(ctx, j, q, v6))
			return LB_NO_HEADROOM;
		return v == LB_NO_FLOW ? LB_NO_FLOW_RESET : LB_PORT_REFUSED;
	}
	if (answer_error(ctx, j, q, v, v6))
		return LB_NO_HEADROOM;
	return v == LB_TOO_BIG	     ? LB_TOO_BIG_ANSWERED
	       : v == LB_TTL_EXPIRED ? LB_TTL_ANSWERED
				     : LB_PORT_REFUSED;
}

#endif
