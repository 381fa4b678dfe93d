/* SPDX-License-Identifier: GPL-2.0-only */
/* Who may come in, and which backend gets a new flow. */
#ifndef LB_CHOOSE_H
#define LB_CHOOSE_H

/* Unpacked `target` of a VIP: read once, so that all of it is of one moment. */
struct target {
	__u16 ring;
	__be16 node_port;
	__u8 mode;
	__u16 ranges;
};

LB_INLINE struct target read_target(const struct vip *vip)
{
	__u64 word = ONCE(vip->target);
	struct target t = {
		.ring = word,
		.node_port = word >> 16,
		.mode = word >> 32,
		.ranges = word >> 48,
	};

	return t;
}

LB_INLINE int source_allowed(struct packet *p, __u32 set, const int v6)
{
	if (v6) {
		struct range_key6 key = {.prefix_bits = 160, .set = set};

		copy_address(key.address, p->remote, v6);
		return LOOKUP(lb_ranges6, &key) != 0;
	} else {
		struct range_key4 key = {.prefix_bits = 64, .set = set, .address = p->remote[0]};

		return LOOKUP(lb_ranges4, &key) != 0;
	}
}

LB_INLINE int new_flow_allowed(struct journey *j, const struct vip *vip, __u32 now, const int v6)
{
	struct limit_key key = {.vip = j->result->vip_id};
	struct limit *limit, first = {.tick = now, .spent = 1};

	if (!vip->new_flows_per_tick || j->untraced)
		return 1;
	key.prefix[0] = j->p.remote[0];
	if (v6)
		key.prefix[1] = j->p.remote[1] & LB_BE32(0xffffff00);
	else
		key.prefix[0] &= LB_BE32(0xffffff00);
	limit = LOOKUP(lb_limits, &key);
	if (limit)
		return spend(limit, vip->new_flows_per_tick, now);
	bpf_map_update_elem_(MAP(lb_limits), &key, &first, BPF_ANY);
	return 1;
}

/* The same on every LB host, so it knows neither ids nor salts. With affinity no port counts. */
LB_INLINE __u64 ring_hash(struct journey *j, const struct vip *vip, const int v6)
{
	__u64 x = j->config->seed ^ ((__u64)vip->port << 32 | (__u32)vip->protocol << 16);

	if (!vip->affinity_ticks)
		x ^= j->p.remote_port;
	if (v6)
		return mix(mix_address(j->p.remote, mix_address(vip->address, x)));
	return mix(mix(x ^ (__u64)vip->address[0] << 16) ^ j->p.remote[0]);
}

/* With client affinity: the backend this client had last, as long as it takes new flows. */
LB_INLINE __u32 backend_of_client(struct journey *j, const struct vip *vip, const struct target *t,
				  __u32 backend, __u32 now, const int v6)
{
	struct client_key key = {.vip = j->result->vip_id, .generation = vip->salt};
	struct client *client, first = {.seen = now, .backend = backend};

	copy_address(key.address, j->p.remote, v6);
	client = LOOKUP(lb_affinity, &key);
	if (client) {
		if (now - client->seen <= vip->affinity_ticks &&
		    ring_has(t->ring, client->backend, 1))
			backend = client->backend;
		if (!j->untraced) {
			client->backend = backend;
			client->seen = now;
		}
	} else if (!j->untraced) {
		bpf_map_update_elem_(MAP(lb_affinity), &key, &first, BPF_ANY);
	}
	return backend;
}

/* A backend for a new flow, or the verdict why there is none. */
LB_INLINE enum verdict choose_backend(struct journey *j, const struct vip *vip,
				      const struct target *t, __u32 now, const int v6)
{
	if (!new_flow_allowed(j, vip, now, v6))
		return LB_NEW_FLOW_LIMIT;
	j->result->backend_id = ring_backend(t->ring, ring_hash(j, vip, v6));
	if (!j->result->backend_id)
		return LB_NO_BACKEND;
	if (vip->affinity_ticks)
		j->result->backend_id =
			backend_of_client(j, vip, t, j->result->backend_id, now, v6);
	return LB_CONTINUE;
}

#endif
