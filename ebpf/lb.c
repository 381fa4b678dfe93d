/* SPDX-License-Identifier: GPL-2.0-only */
/* lbagent's data path: the journey of a packet through one LB host. Read it from the end.
 *
 *   parse -> is the address ours? -> reply of a backend? -> which VIP -> may the client? ->
 *   which backend -> rewrite or encapsulate -> answer, if something was wrong -> the one exit
 *
 * The first ten headers are pure; the others are the stages of the journey and touch the maps,
 * whose names stand in maps.h. BCC compiles it all as one function: everything is inlined, there
 * are no globals. Not ours: XDP_PASS. Ours but broken: a named, counted drop.
 *
 * A packet that "arrives" on interface 1 (loopback, which can have no native XDP) is a trial: it
 * takes the whole journey but leaves no trace in flows or counters, and the return value tells
 * what was decided: action | verdict << 8 | backend << 16.
 */
#include "wire.h"
#include "verdict.h"
#include "layout.h"
#include "checksum.h"
#include "hash.h"
#include "packet.h"
#include "state.h"
#include "rewrite.h"
#include "tunnel.h"
#include "answer.h"

/* the stages */
#include "maps.h"
#include "choose.h"
#include "leave.h"
#include "fragment.h"
#include "nat.h"
#include "dsr.h"
#include "odd.h"
#include "tell.h"

LB_INLINE enum verdict journey(struct xdp_md *ctx, struct journey *j, const int v6)
{
	struct packet *p = &j->p;
	struct vip *vip;
	struct target t;
	enum verdict v;
	__u32 snat_id;
	__u16 hint;

	if (v6 ? parse_ip6(p) : parse_ip4(p))
		return LB_NOT_OURS;
	j->result->bytes = p->bytes;
	hint = address_hint(p, v6);
	if (!hint)
		return LB_NOT_OURS;
	j->config = get_config();
	if (!j->config)
		return LB_NOT_OURS;
	if (p->shape <= LB_FIRST_FRAGMENT)
		parse_l4(p, v6);
	if (p->shape > LB_LAST_COMMON) {
		v = LB_CONTINUE;
		if (p->shape == LB_LATER_FRAGMENT)
			v = follow_first_fragment(ctx, j, v6);
		return v == LB_CONTINUE ? odd_packet(ctx, j, v6) : v;
	}
	if (p->shape == LB_QUOTE)
		j->untraced = 1;
	if (hint & LB_HINT_SNAT && find_snat(p, hint, &snat_id, v6))
		return nat_reply(ctx, j, snat_id, v6);
	vip = find_vip(j, v6);
	if (!vip)
		return odd_packet(ctx, j, v6);
	t = read_target(vip);
	if (t.ranges && !source_allowed(p, t.ranges, v6))
		return LB_SOURCE_DENIED;
	if (t.mode == LB_MODE_NAT)
		return nat_forward(ctx, j, vip, &t, v6);
	return dsr_forward(ctx, j, vip, &t, v6);
}

LB_INLINE void count(const struct result *r, enum verdict v, __u32 id)
{
	struct counter *c = get_counter(id);

	if (!c)
		return;
	if (v > LB_LAST_ANSWER) {
		c->drops++;
	} else if (r->is_reply) {
		c->replies++;
		c->reply_bytes += r->bytes;
	} else {
		c->packets++;
		c->bytes += r->bytes;
	}
	c->flows += r->is_new;
}

/* The one exit: count the verdict and make it an action. */
LB_INLINE int leave(const struct journey *j, enum verdict v)
{
	struct result *r = j->result;
	int action = XDP_DROP;
	struct counter *c;

	v = lb_forget(v, r->bytes, 63);
	r->vip_id = lb_forget(r->vip_id, r->bytes, 0xffff);
	r->backend_id = lb_forget(r->backend_id, r->bytes, 0xffff);
	r->is_reply = lb_forget(r->is_reply, r->bytes, 1);
	r->is_new = lb_forget(r->is_new, r->bytes, 1);
	if (v <= LB_LAST_PASS)
		action = XDP_PASS;
	else if (v <= LB_LAST_ANSWER)
		action = r->egress == j->p.ingress ? XDP_TX : XDP_REDIRECT;
	if (j->trial)
		return action | v << 8 | r->backend_id << 16;
	c = get_counter(v);
	if (c) {
		c->packets++;
		c->bytes += r->bytes;
	}
	if (r->vip_id)
		count(r, v, LB_COUNTER_VERDICTS + r->vip_id);
	if (r->backend_id)
		count(r, v, LB_COUNTER_VERDICTS + LB_VIPS + r->backend_id);
	return action == XDP_REDIRECT ? bpf_redirect(r->egress, 0) : action;
}

int lb(struct xdp_md *ctx)
{
	struct result result = {};
	struct journey j;
	enum verdict v;

	asm volatile("" : : "r"(&result) : "memory"); /* in memory, see there */
	j.result = &result;
	j.p.ingress = ctx->ingress_ifindex;
	j.trial = lb_forget(j.p.ingress == TRIAL_IFINDEX, j.p.ingress, 1);
	j.untraced = j.trial;
	parse_link(&j.p, (void *)(long)ctx->data, (void *)(long)ctx->data_end);
	if (j.p.ethertype == LB_BE16(ETH_P_IP))
		v = answer(ctx, &j, journey(ctx, &j, 0), 0);
	else if (j.p.ethertype == LB_BE16(ETH_P_IPV6))
		v = answer(ctx, &j, journey(ctx, &j, 1), 1);
	else
		v = LB_NOT_IP;
	return leave(&j, v);
}
