/* SPDX-License-Identifier: GPL-2.0-only */
/* Packets that are neither TCP nor UDP to a VIP: later fragments, ping, ICMP errors. */
#ifndef LB_ODD_H
#define LB_ODD_H

#define FRAGMENT_TICKS 30 /* longest time between the first fragment and the last */

/* LB_CONTINUE when its first fragment did not come by. */
LB_INLINE enum verdict follow_first_fragment(struct xdp_md *ctx, struct journey *j, const int v6)
{
	struct scratch *s = get_scratch();
	struct neighbour *n;
	struct fragment *f;
	enum verdict v;
	__u32 path;

	if (!s || fragment_key_of(&j->p, &s->fragment_key, v6))
		return LB_CONTINUE;
	f = LOOKUP(lb_fragments, &s->fragment_key);
	if (!f || now_ticks() - f->seen > FRAGMENT_TICKS)
		return LB_CONTINUE;
	j->result->vip_id = f->vip;
	j->result->backend_id = f->backend;
	j->result->is_reply = f->is_reply;
	if (f->mode != LB_MODE_NAT) {
		v = dsr_send(ctx, j, f->mode, v6);
		return v <= LB_LAST_FORWARD ? LB_FRAGMENT_FORWARD : v;
	}
	n = f->is_reply ? get_router(f->router, v6) : get_backend(f->backend);
	if (!n)
		return LB_NO_NEXTHOP;
	path = ONCE(n->path);
	v = may_leave(j, path, 0, v6);
	if (v != LB_CONTINUE)
		return v;
	decrement_ttl(&j->p, v6);
	set_addresses(j->p.l3, f->source, f->destination, v6);
	if (set_link(ctx, j, n, path, j->p.ethertype, 0))
		return LB_NO_HEADROOM;
	return LB_FRAGMENT_FORWARD;
}

LB_INLINE enum verdict answer_echo(struct journey *j, const int v6)
{
	struct ethhdr *eth = j->p.start;

	if (j->config->echo != LB_POLICY_ANSWER)
		return LB_PROTOCOL;
	if (!may_answer(j))
		return LB_ICMP_LIMIT;
	if ((void *)(eth + 1) > j->p.end)
		return LB_MALFORMED;
	turn_link(eth);
	write_echo_reply(&j->p, v6);
	j->result->egress = j->p.ingress;
	return LB_ECHO_ANSWERED;
}

/* Not for a port that we serve. If the address is a VIP's, nobody else shall see the packet: a node
 * that does not know the port would route it back to us.
 */
LB_INLINE enum verdict odd_packet(struct xdp_md *ctx, struct journey *j, const int v6)
{
	struct icmphdr *icmp = j->p.l4;

	if (!is_vip_address(&j->p, v6))
		return LB_NOT_OURS;
	switch (j->p.shape) {
	case LB_PLAIN:
	case LB_FIRST_FRAGMENT:
		return LB_NO_PORT;
	case LB_LATER_FRAGMENT:
		return LB_FRAGMENT_LOST;
	case LB_OPTIONS:
		return j->config->options == LB_POLICY_PASS ? LB_NOT_OURS : LB_IP_OPTIONS;
	case LB_EXTENSION:
		return j->config->options == LB_POLICY_PASS ? LB_NOT_OURS : LB_EXTENSION_HEADER;
	case LB_ECHO:
		return answer_echo(j, v6);
	case LB_ICMP:
		if (v6 && (void *)(icmp + 1) <= j->p.end && icmp->type >= 133 && icmp->type <= 137)
			return LB_NOT_OURS; /* neighbour discovery is the kernel's */
		return LB_ICMP_UNMATCHED;
	case LB_QUOTE:
		return LB_ICMP_UNMATCHED;
	case LB_OTHER:
		return LB_PROTOCOL;
	default:
		return LB_MALFORMED;
	}
}

#endif
