/* SPDX-License-Identifier: GPL-2.0-only */
/* Mode nat: a slot of the table is a port of a SNAT address, so a reply finds its flow without a
 * hash. */
#ifndef LB_NAT_H
#define LB_NAT_H

LB_INLINE struct nat_bucket *get_bucket(__u32 index)
{
	return LOOKUP(lb_nat, &index);
}

/* Bucket of a hash, among the SNAT addresses of the family. */
LB_INLINE __u32 bucket_of(const struct config *config, __u64 hash, const int v6)
{
	__u32 first = v6 ? config->snats6_first : config->snats4_first;
	__u32 count = v6 ? config->snats6 : config->snats4;
	__u32 snat = first + (((hash & 0xffff) * count) >> 16);

	return (snat << LB_NAT_SHIFT) + (((hash >> 32) * config->nat_buckets) >> 32);
}

/* The words of an entry that name its client. */
struct flow_key {
	__u64 key, more;
	__u32 rest;
};

LB_INLINE struct flow_key flow_key_of(struct journey *j, const int v6)
{
	__be32 *client = j->p.remote;
	struct flow_key k = {
		.key = (__u64)client[0] << 32 | (j->result->vip_id & 0xffff) << 16 |
		       j->p.remote_port,
	};

	if (v6) {
		k.more = (__u64)client[1] << 32 | client[2];
		k.rest = client[3];
	}
	return k;
}

/* Finds a flow in this host's tables. The salt is the VIP's own, and new with every new VIP. */
LB_INLINE __u64 flow_hash(const struct flow_key *k, const struct vip *vip, const int v6)
{
	if (v6)
		return mix(mix(k->key ^ vip->salt) ^ k->more ^ (__u64)k->rest << 17);
	return mix(k->key ^ vip->salt);
}

/* Slot of the flow in this bucket, -1 when it is not there. */
LB_INLINE int nat_find(const struct nat_bucket *b, const struct flow_key *k, __u16 generation,
		       const int v6)
{
	const struct nat_entry *e;

#pragma unroll
	for (int i = 0; i < LB_NAT_WAYS; i++) {
		e = &b->entries[i];
		if (e->key != k->key)
			continue;
		if (v6 && (e->more != k->more || (__u32)e->where != k->rest))
			continue;
		if (nat_generation(e->life) == generation && nat_state(e->life) > LB_NAT_CLAIMED)
			return i;
	}
	return -1;
}

LB_INLINE int nat_is_free(const struct config *config, __u64 life, __u32 now, int pressed)
{
	__u32 state = nat_state(life);

	return nat_idle(life, now) > (pressed ? config->pressure[state] : config->timeout[state]);
}

/* Branch-free, for the verifier's sake: 1 for each slot that is free. */
LB_INLINE __u32 nat_count_free(const struct config *config, const struct nat_bucket *b, __u32 now)
{
	__u64 left, free = 0;

#pragma unroll
	for (int i = 0; i < LB_NAT_WAYS; i++) {
		left = (__u64)config->timeout[nat_state(b->entries[i].life)] -
		       nat_idle(b->entries[i].life, now);
		asm volatile("%0 >>= 63" : "+r"(left));
		free += left;
	}
	return free;
}

/* Claim a slot by compare-and-swap: one that is free in `b`, else one that may be taken under
 * pressure in `b` or `b2`. -> way, + LB_NAT_WAYS when in b2; -1: all are live, and stay so.
 */
LB_INLINE int nat_claim(const struct config *config, struct nat_bucket *b, struct nat_bucket *b2,
			__u16 generation, __u32 now)
{
	struct nat_entry *e;
	__u64 life;

#pragma clang loop unroll(disable)
	for (__u32 i = 0; i < 3 * LB_NAT_WAYS; i++) {
		e = i < 2 * LB_NAT_WAYS ? &b->entries[i % LB_NAT_WAYS]
					: &b2->entries[i % LB_NAT_WAYS];
		life = e->life;
		if (nat_is_free(config, life, now, i >= LB_NAT_WAYS) &&
		    __sync_bool_compare_and_swap(&e->life, life,
						 nat_life(LB_NAT_CLAIMED, generation, now)))
			return i < 2 * LB_NAT_WAYS ? i % LB_NAT_WAYS : i - LB_NAT_WAYS;
	}
	return -1;
}

/* Fill a slot that is ours: a new flow, or one whose backend is gone or whose time was over. */
LB_INLINE void nat_admit(struct journey *j, const struct vip *vip, struct nat_entry *e,
			 const struct flow_key *k, __u32 now, const int v6)
{
	__u32 state = vip->protocol == IPPROTO_TCP ? LB_NAT_SYN : LB_NAT_UDP;

	e->key = k->key;
	e->more = k->more;
	e->where = (__u64)k->rest | (__u64)j->result->backend_id << 32 |
		   (__u64)router_id_of(j, v6) << 48;
	*(volatile __u64 *)&e->life = nat_life(state, vip->salt, now);
}

/* Does the flow keep its backend? */
LB_INLINE int nat_stays(struct journey *j, const struct target *t, __u64 life, __u32 now)
{
	__u32 state = nat_state(life);

	if (!ring_has(t->ring, j->result->backend_id, 0))
		return 0;
	if (state >= LB_NAT_UDP)
		return nat_idle(life, now) <= j->config->timeout[state];
	return state != LB_NAT_CLOSED || !is_syn(&j->p);
}

LB_INLINE void nat_touch(struct journey *j, struct nat_entry *e, __u64 life, __u32 state, __u32 now)
{
	__u64 fresh = nat_life(state, nat_generation(life), now);

	if (fresh != life && !j->untraced)
		__sync_bool_compare_and_swap(&e->life, life, fresh);
}

/* Send the packet on to its backend from the slot's address and port. */
LB_INLINE enum verdict nat_send(struct xdp_md *ctx, struct journey *j, const struct target *t,
				__u32 bucket, __u32 way, const int v6)
{
	__u32 snat_id = bucket >> LB_NAT_SHIFT;
	__u32 slot = ((bucket & ((1u << LB_NAT_SHIFT) - 1)) << 2) + way;
	struct snat *snat = LOOKUP(lb_snats, &snat_id);
	struct neighbour *backend = get_backend(j->result->backend_id);
	enum verdict v;
	__u32 path;

	if (!snat || !backend)
		return LB_NO_BACKEND;
	struct ends ends = {
		.source = snat->address,
		.destination = backend->address,
		.source_port = LB_BE16(j->config->port_first + slot),
		.destination_port = t->node_port,
	};

	path = ONCE(backend->path);
	v = may_leave(j, path, 0, v6);
	if (v != LB_CONTINUE)
		return v;
	remember_fragment(j, &ends, LB_MODE_NAT, 0, v6);
	decrement_ttl(&j->p, v6);
	rewrite_ends(&j->p, &ends, v6);
	if (set_link(ctx, j, backend, path, j->p.ethertype, 0))
		return LB_NO_HEADROOM;
	return j->p.shape == LB_QUOTE ? LB_ICMP_TO_BACKEND : LB_NAT_FORWARD;
}

LB_INLINE enum verdict nat_forward(struct xdp_md *ctx, struct journey *j, const struct vip *vip,
				   const struct target *t, const int v6)
{
	const struct config *config = j->config;
	struct flow_key k = flow_key_of(j, v6);
	__u64 hash = flow_hash(&k, vip, v6), life;
	__u32 now = now_ticks(), at = bucket_of(config, hash, v6), at2 = 0;
	struct nat_bucket *b = get_bucket(at), *b2 = b;
	struct nat_entry *e;
	enum verdict v;
	int way;

	if (!b || !b2)
		return LB_NAT_FULL;
	way = nat_find(b, &k, vip->salt, v6);
	if (way < 0) {
		at2 = bucket_of(config, second_hash(hash), v6);
		b2 = get_bucket(at2);
		if (!b2)
			return LB_NAT_FULL;
		way = nat_find(b2, &k, vip->salt, v6);
		if (way >= 0) {
			at = at2;
			b = b2;
		}
	}
	if (way >= 0) {
		way = lb_forget(way, hash, LB_NAT_WAYS - 1);
		e = &b->entries[way];
		life = ONCE(e->life);
		j->result->backend_id = (__u16)(e->where >> 32);
		if (nat_stays(j, t, life, now)) {
			nat_touch(j, e, life,
				  nat_state_after_client(nat_state(life), j->p.tcp_flags), now);
			goto send;
		}
	}
	if (j->p.shape == LB_QUOTE)
		return LB_ICMP_UNMATCHED;
	if (way < 0 && j->p.protocol == IPPROTO_TCP && !is_syn(&j->p))
		return LB_NO_FLOW; /* the backend knows nothing of it either */
	v = choose_backend(j, vip, t, now, v6);
	if (v != LB_CONTINUE)
		return v;
	if (j->untraced) {
		way = way < 0 ? 0 : way;
		goto send;
	}
	if (way < 0) {
		if (nat_count_free(config, b2, now) > nat_count_free(config, b, now)) {
			struct nat_bucket *b_ = b;
			__u32 at_ = at;

			b = b2;
			b2 = b_;
			at = at2;
			at2 = at_;
		}
		way = nat_claim(config, b, b2, vip->salt, now);
		if (way < 0)
			return LB_NAT_FULL;
		if (way >= LB_NAT_WAYS) {
			b = b2;
			at = at2;
		}
		way = lb_forget(way, hash, LB_NAT_WAYS - 1);
	}
	nat_admit(j, vip, &b->entries[(__u32)way % LB_NAT_WAYS], &k, now, v6);
	j->result->is_new = 1;
send:
	return nat_send(ctx, j, t, at, (__u32)way % LB_NAT_WAYS, v6);
}

/* A packet to a SNAT address: a backend's reply when it fits the slot that its port names. */
LB_INLINE enum verdict nat_reply(struct xdp_md *ctx, struct journey *j, __u32 snat_id, const int v6)
{
	struct packet *p = &j->p;
	__u32 slot = LB_HOST16(p->local_port) - j->config->port_first, path;
	struct neighbour *backend, *router;
	struct nat_bucket *b;
	struct nat_entry *e;
	struct vip *vip;
	enum verdict v;
	__be32 client[4];
	__u64 life;

	if (slot >= (__u32)j->config->nat_buckets * LB_NAT_WAYS)
		return LB_NO_SLOT;
	b = get_bucket((snat_id << LB_NAT_SHIFT) + slot / LB_NAT_WAYS);
	if (!b)
		return LB_NO_SLOT;
	e = &b->entries[slot % LB_NAT_WAYS];
	life = ONCE(e->life);
	vip = get_vip((__u16)(e->key >> 16));
	backend = get_backend((__u16)(e->where >> 32));
	if (!vip || !backend || nat_state(life) <= LB_NAT_CLAIMED ||
	    nat_generation(life) != (__u16)vip->salt || vip->protocol != p->protocol ||
	    read_target(vip).node_port != p->remote_port ||
	    !same_address(backend->address, p->remote, v6))
		return LB_NO_SLOT;
	j->result->vip_id = (__u16)(e->key >> 16);
	j->result->backend_id = (__u16)(e->where >> 32);
	j->result->is_reply = 1;
	router = get_router(e->where >> 48, v6);
	if (!router)
		return LB_NO_NEXTHOP;
	path = ONCE(router->path);
	v = may_leave(j, path, 0, v6);
	if (v != LB_CONTINUE)
		return v;
	nat_touch(j, e, life, nat_state_after_backend(nat_state(life), p->tcp_flags), now_ticks());
	client[0] = e->key >> 32;
	client[1] = e->more >> 32;
	client[2] = e->more;
	client[3] = e->where;
	struct ends ends = {
		.source = vip->address,
		.destination = client,
		.source_port = vip->port,
		.destination_port = (__be16)e->key,
	};

	remember_fragment(j, &ends, LB_MODE_NAT, e->where >> 48, v6);
	decrement_ttl(p, v6);
	rewrite_ends(p, &ends, v6);
	if (set_link(ctx, j, router, path, p->ethertype, 0))
		return LB_NO_HEADROOM;
	return p->shape == LB_QUOTE ? LB_ICMP_TO_CLIENT : LB_NAT_REPLY;
}

#endif
